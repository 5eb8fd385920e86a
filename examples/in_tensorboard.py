"""Trains three ways and shows them side by side in TensorBoard.

    python examples/in_tensorboard.py --logdir logs
    tensorboard --logdir logs        # then its tab "Batch size"

The picture in the README is that of `--data mnist`.
"""

import argparse
import pathlib

import keras
import numpy as np
import quickstart

import keras_batchsize as kb

# Name of the run: policy, rule for the learning rate.
RUNS = {
    "goodput": ("goodput", "linear"),
    "noise scale": ("noise_scale", "sqrt"),
    "fixed": ("fixed", "none"),
}
# Base batch size, epochs, largest batch size.
SETTINGS = {"digits": (8, 40, 256), "mnist": (32, 8, 2048)}


def load(name, path):
    """Returns ((x_train, y_train), (x_test, y_test)), pixels in [0, 1]."""
    if path is None:
        return quickstart.load(name)
    with np.load(path) as file:
        train = file["x_train"] / 255.0, file["y_train"]
        return train, (file["x_test"] / 255.0, file["y_test"])


def train(name, data, settings, logdir):
    """Trains a new model and writes what happens to `logdir`/`name`."""
    (x, y), test = data
    batch_size, epochs, largest = settings
    policy, rule = RUNS[name]
    # Keras's own callback may stand beside ours; the two share a folder.
    board = keras.callbacks.TensorBoard(pathlib.Path(logdir, name))
    trainer = kb.AdaptiveTrainer(
        quickstart.make_model(x.shape[1:], 0.01),
        policy,
        learning_rate_scaling=rule,
        max_batch_size=largest,
        tensorboard=board,
    )
    trainer.fit(
        x,
        y,
        batch_size=batch_size,
        epochs=epochs,
        validation_data=test,
        callbacks=[board],
        verbose=2,
    )
    trainer.report.summary()


def main():
    """Trains all of `RUNS`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=SETTINGS, default="digits")
    parser.add_argument("--path", help="file that holds MNIST")
    parser.add_argument("--logdir", default="logs")
    options = parser.parse_args()
    if options.path and options.data != "mnist":
        parser.error(
            "--path must come with --data mnist: it holds MNIST, and other "
            f"data are trained on otherwise. Received: --data {options.data}. "
            "Add --data mnist."
        )
    data = load(options.data, options.path)
    for name in RUNS:
        train(name, data, SETTINGS[options.data], options.logdir)
    print(f'\ntensorboard --logdir {options.logdir}, and its tab "Batch size"')


if __name__ == "__main__":
    main()
