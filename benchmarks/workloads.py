"""Data and models that the benchmarks share."""

import keras
import numpy as np


def load(name, path=None):
    """Returns ((x_train, y_train), (x_test, y_test)), pixels in [0, 1].

    Args:
        name: "mnist" or "digits".
        path: File that holds MNIST in the form of `keras.datasets.mnist`.
            None for Keras's own cache, or its download.
    """
    if name == "digits":
        return _digits()
    if path is None:
        train, test = keras.datasets.mnist.load_data()
    else:
        with np.load(path) as file:
            train = file["x_train"], file["y_train"]
            test = file["x_test"], file["y_test"]
    return tuple(
        ((x / 255.0).astype("float32"), y.astype("int32"))
        for x, y in (train, test)
    )


def _digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = (digits.images / 16.0).astype("float32")
    y = digits.target.astype("int32")
    return (x[:1437], y[:1437]), (x[1437:], y[1437:])


def mlp(side):
    """A small multilayer perceptron."""
    return keras.Sequential(
        [
            keras.Input((side, side)),
            keras.layers.Flatten(),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


def cnn(side):
    """A small convolutional network."""
    return keras.Sequential(
        [
            keras.Input((side, side)),
            keras.layers.Reshape((side, side, 1)),
            keras.layers.Conv2D(8, 3, strides=2, activation="relu"),
            keras.layers.Conv2D(16, 3, strides=2, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )


MODELS = {"mlp": mlp, "cnn": cnn}


def make(name, side=28, seed=0, learning_rate=0.01, **compile_arguments):
    """Returns a compiled classifier: SGD, momentum 0.9."""
    keras.utils.set_random_seed(seed)
    model = MODELS[name](side)
    model.compile(
        keras.optimizers.SGD(learning_rate, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **compile_arguments,
    )
    return model
