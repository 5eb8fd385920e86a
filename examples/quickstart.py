"""Trains a classifier with a batch size that follows the gradient noise.

    python examples/quickstart.py                    # digits, from scikit-learn
    python examples/quickstart.py --data mnist       # from Keras's cache or net
    python examples/quickstart.py --plot run.png     # needs matplotlib

It ends with the report: when the size changed, why, and what that bought
against the same model trained at the fixed base batch size.
"""

import argparse

import keras

import keras_batchsize as kb

# Base batch size, learning rate meant for it, epochs, largest batch size.
SETTINGS = {"digits": (8, 0.01, 40, 256), "mnist": (32, 0.01, 6, None)}


def load(name):
    """Returns ((x_train, y_train), (x_test, y_test)), pixels in [0, 1]."""
    if name == "mnist":
        train, test = keras.datasets.mnist.load_data()
        return (train[0] / 255.0, train[1]), (test[0] / 255.0, test[1])
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = digits.images / 16.0, digits.target
    return (x[:1400], y[:1400]), (x[1400:], y[1400:])


def make_model(input_shape, learning_rate):
    """Returns a compiled Keras model; nothing in it knows of this library."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input(input_shape),
            keras.layers.Flatten(),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.SGD(learning_rate, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def train(policy, train_data, test_data, settings, verbose):
    """Trains a new model; returns its trainer and its test accuracy."""
    batch_size, learning_rate, epochs, largest = settings
    model = make_model(train_data[0].shape[1:], learning_rate)
    trainer = kb.AdaptiveTrainer(model, policy, max_batch_size=largest)
    trainer.fit(
        *train_data,
        batch_size=batch_size,
        epochs=epochs,
        validation_data=test_data,
        verbose=verbose,
    )
    return trainer, trainer.evaluate(*test_data, verbose=0)[1]


def main():
    """Trains adaptively, then at the fixed base batch size, and compares."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=SETTINGS, default="digits")
    parser.add_argument("--policy", default="noise_scale")
    parser.add_argument("--plot", help="file to draw the report to")
    options = parser.parse_args()

    data = load(options.data)
    settings = SETTINGS[options.data]
    trainer, accuracy = train(options.policy, *data, settings, verbose=2)
    trainer.report.summary()
    if options.plot:
        trainer.report.plot(options.plot)

    fixed, fixed_accuracy = train("fixed", *data, settings, verbose=0)
    ours, theirs = trainer.report, fixed.report
    print(
        f"\nTest accuracy     {accuracy:.3f}, fixed: {fixed_accuracy:.3f}\n"
        f"Updates           {ours.updates:,}, fixed: {theirs.updates:,}\n"
        f"Training seconds  {ours.seconds:.2f}, fixed: {theirs.seconds:.2f} "
        "(tracing included)"
    )


if __name__ == "__main__":
    main()
