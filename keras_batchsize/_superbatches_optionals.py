"""The `Optional`s by which Keras's adapters pass None.

Part of `superbatches.py`.
"""

import keras
import tensorflow as tf

from keras_batchsize import slicing


def has_optionals(dataset):
    """Whether the elements of a dataset contain any."""
    return any(
        isinstance(spec, tf.OptionalSpec)
        for spec in keras.tree.flatten(dataset.element_spec)
    )


def without_nones(*data):
    """Drops the `Optional`s by which Keras's adapters pass None."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(
        slicing.without_optionals(data)
    )
    packed = keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
    return packed
