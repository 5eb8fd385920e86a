"""Two workers with unequal memory: a program that each of them runs.

TF_CONFIG says which worker it is, the environment how much TensorFlow's
allocator may hand out, the argument where each may keep profiles of its own.
Prints one line of JSON with all that must be the same on both.
"""

import hashlib
import json
import os
import pathlib
import sys

import comparing
import keras
import numpy as np
import tensorflow as tf

import keras_batchsize as kb

WIDTH, LAYERS, EXAMPLES = 256, 12, 2**16


def wide():
    """Many small tensors: few holes, so that no trial runs out of memory."""
    hidden = inputs = keras.Input((comparing.FEATURES,))
    for _ in range(LAYERS):
        hidden = keras.layers.Dense(WIDTH, activation="relu")(hidden)
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    return model


INDEX = json.loads(os.environ["TF_CONFIG"])["task"]["index"]


def kept(model):
    """Returns what three probes found, of which one worker forgets the first.

    A worker that probes alone would wait for the other one.
    """
    folder = pathlib.Path(sys.argv[1]) / f"profiles of {INDEX}"
    data, found = comparing.regression(64), []
    for _ in range(3):
        profile = kb.find_max_batch_size(
            model, *data, maximum=8, time_budget=10_000.0, cache=folder
        )
        found.append([row.step_seconds for row in profile.rows])
        if INDEX == 1 and len(found) == 1:
            [file] = folder.iterdir()
            file.unlink()
    return found


def error_with_other_data(model):
    """Returns the error of workers that have not as many examples."""
    try:
        kb.find_max_batch_size(model, *comparing.regression(64 - 8 * INDEX))
    except ValueError as error:
        return str(error)


def error_with_less_memory(model):
    """Returns the error where the weights do not fit on one worker."""
    limit = 1000 if INDEX == 1 else None
    try:
        kb.find_max_batch_size(
            model, *comparing.regression(64), memory_limit=limit
        )
    except ValueError as error:
        return str(error)


def main():
    strategy = tf.distribute.MultiWorkerMirroredStrategy()

    def make():
        with strategy.scope():
            return wide()

    data = comparing.regression(EXAMPLES)
    model = comparing.seeded(make)
    # Memory is to end it, however slow the machine.
    profile = kb.find_max_batch_size(model, *data, time_budget=10_000.0)
    trainer = kb.AdaptiveTrainer(model, policy="fixed", verbose=0)
    history = trainer.fit(
        *data, batch_size=profile.max_batch_size, epochs=2, verbose=0
    )
    weights = b"".join(np.array(one).tobytes() for one in model.get_weights())
    outcome = {
        "size": profile.max_batch_size,
        "reason": profile.reason,
        "limit": profile.memory_limit,
        "tried": [row.batch_size for row in profile.rows],
        "failed": [row.note == "out of memory" for row in profile.rows],
        "losses": history.history["loss"],
        "weights": hashlib.sha256(weights).hexdigest(),
        "kept": kept(model),
        "error": error_with_other_data(model),
        "too_small": error_with_less_memory(model),
    }
    sys.stdout.write(json.dumps(outcome) + "\n")


if __name__ == "__main__":
    main()
