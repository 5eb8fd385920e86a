"""Two workers with unequal memory: a program that each of them runs.

TF_CONFIG says which worker it is, the environment how much TensorFlow's
allocator may hand out. Prints one line of JSON with all that must be the same
on both.
"""

import hashlib
import json
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
    }
    sys.stdout.write(json.dumps(outcome) + "\n")


if __name__ == "__main__":
    main()
