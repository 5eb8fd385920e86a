"""Arrays: how many examples they hold, and batches gathered from them.

Where data and model share one memory, the pipeline hands over nothing but
shuffled row numbers, and each batch is gathered where it is used: no
superbatch is copied, and an epoch does not wait for its first one.
"""

import functools

import keras
import numpy as np
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


def at_hand(model, adapter, sizes, shuffle):
    """Returns an adapter of row numbers, and the arrays to gather rows from.

    Keras draws the same order for the numbers as for the rows.

    Args:
        model: The Keras model to train.
        adapter: Keras's adapter of the arrays.
        sizes: Sizes of the superbatches, which repeat.
        shuffle: As in `Model.fit`.

    Returns:
        Tuple of a Keras adapter, a nested structure of dense tensors, and a
        function that makes `RowNumbers`, None where batches are shuffled one
        by one. The adapter as it is, None and None where there are
        accelerators, XLA (to which the arrays would be parameters of every
        step), or arrays that are not dense.
    """
    devices = tf.config.list_logical_devices()
    if model.jit_compile or any(one.device_type != "CPU" for one in devices):
        return adapter, None, None
    arrays = keras_private.tensors_of(adapter)
    leaves = [one for one in keras.tree.flatten(arrays) if one is not None]
    if not all(isinstance(one, tf.Tensor) for one in leaves):
        return adapter, None, None
    examples = leaves[0].shape[0]
    numbers = keras_private.data_adapter_for(
        np.arange(examples), batch_size=adapter.batch_size, shuffle=shuffle
    )
    if shuffle == "batch":
        return numbers, arrays, None
    rows = functools.partial(RowNumbers, examples, sizes, shuffle)
    return numbers, arrays, rows


def specs_of(arrays):
    """Returns the types of batches of arrays, of any number of examples."""
    return keras.tree.map_structure(
        lambda leaf: (
            None
            if leaf is None
            else tf.TensorSpec([None] + leaf.shape[1:], leaf.dtype)
        ),
        arrays,
    )


def pipeline_options():
    """Options for a pipeline of row numbers, which has nothing to tune.

    The thread that tunes holds up the end of an iterator, and so the next
    epoch, by 50 ms and more, now and then.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return options
