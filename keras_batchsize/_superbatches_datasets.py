"""Whether a `tf.data.Dataset` holds batches: part of `superbatches.py`."""

import keras

from keras_batchsize import keras_private


def is_batched(dataset, model, batch_size):
    """Whether the elements of a dataset are batches, by their shapes.

    The rank of the model's input decides. Where the model has none yet, a
    first axis of one known length is that of a batch, unless it contradicts
    the batch size asked for and nothing has made batches.
    """
    leaves = [
        spec.shape
        for spec in keras.tree.flatten(dataset.element_spec)
        if getattr(spec, "shape", None) is not None
    ]
    if any(shape.rank == 0 for shape in leaves):
        return False
    sizes = {shape[0] for shape in leaves if shape.rank} - {None}
    if len(sizes) > 1:
        return False
    inputs = keras.tree.flatten(getattr(model, "inputs", None) or [])
    if inputs and leaves[0].rank is not None:
        return leaves[0].rank != len(inputs[0].shape) - 1
    if not sizes or batch_size is None or batch_size in sizes:
        return True
    return keras_private.makes_batches(dataset)
