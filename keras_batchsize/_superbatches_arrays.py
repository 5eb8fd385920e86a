"""Arrays: how many examples they hold, and batches gathered from them.

Where data and model share one memory, the pipeline hands over nothing but
shuffled row numbers, and each batch is gathered where it is used: no
superbatch is copied, and an epoch does not wait for its first one.
"""

import functools

import keras
import tensorflow as tf

from keras_batchsize import keras_private
from keras_batchsize._superbatches_rows import RowNumbers


def is_arrays(x):
    """Whether an input of `fit` consists of arrays."""
    return all(
        getattr(leaf, "shape", None) is not None
        for leaf in keras.tree.flatten(x)
        if leaf is not None
    )


def count(x, y, sample_weight):
    """Returns the number of examples.

    Args:
        x: As in `Model.fit`.
        y: As in `Model.fit`.
        sample_weight: As in `Model.fit`.

    Raises:
        ValueError: If there are none, or the arrays disagree.
    """
    lengths = {}
    for name, data in (("x", x), ("y", y), ("sample_weight", sample_weight)):
        for leaf in keras.tree.flatten(data):
            if getattr(leaf, "shape", None):
                lengths.setdefault(int(leaf.shape[0]), name)
    if not lengths:
        raise ValueError(
            "`x` must be given: it is what the model is trained on. Received: "
            f"x={x!r}. Pass arrays, a `tf.data.Dataset`, a `PyDataset` or a "
            "generator."
        )
    if len(lengths) > 1:
        listed = ", ".join(f"{name} of {n}" for n, name in lengths.items())
        raise ValueError(
            "All arrays must hold the same number of examples: they are cut "
            f"into batches together. Received: {listed} examples. Use the "
            f"first {min(lengths)} of each, if they belong together."
        )
    return next(iter(lengths))


def can_be_at_hand(model):
    """Whether a model's device may gather rows of arrays by itself.

    Args:
        model: The Keras model to train.
    """
    devices = tf.config.list_logical_devices()
    return not model.jit_compile and all(
        one.device_type == "CPU" for one in devices
    )


def at_hand(model, adapter, *order):
    """Returns the arrays to gather rows from, and which rows.

    Args:
        model: The Keras model to train.
        adapter: Keras's adapter of the arrays.
        *order: Arguments of `RowNumbers`.

    Returns:
        Tuple of a nested structure of dense tensors and a function that makes
        `RowNumbers`. None and None where there are accelerators, XLA (to which
        the arrays would be parameters of every step), or arrays that are not
        dense.
    """
    if not can_be_at_hand(model):
        return None, None
    arrays = keras_private.tensors_of(adapter)
    leaves = [one for one in keras.tree.flatten(arrays) if one is not None]
    if not all(isinstance(one, tf.Tensor) for one in leaves):
        return None, None
    return arrays, functools.partial(RowNumbers, *order)
