"""What workers that share their data must have alike.

Part of `superbatches.py`. Each worker reads all the data and keeps its own
part: that is only right if all read the same examples in the same order.
"""

import hashlib

import numpy as np
import tensorflow as tf

from keras_batchsize import keras_private
from keras_batchsize import slicing

# Examples at both ends of arrays that are compared.
_COMPARED = 16


def facts_of(adapter, arrays):
    """Describes the data, so that workers can compare.

    Args:
        adapter: Keras's adapter of the input.
        arrays: Nested structure of tensors whose row numbers the adapter
            hands over, or None.

    Returns:
        Dict from names to values; empty for what shows nothing of itself.

    Raises:
        ValueError: If a dataset shuffles without a seed.
    """
    if arrays is not None:
        return {"sha256 of the first and last examples": _digest(arrays)}
    if not isinstance(adapter, keras_private.DatasetAdapter):
        return {}
    seeds = keras_private.shuffle_seeds(adapter.get_tf_dataset())
    if (0, 0) in seeds:
        raise ValueError(
            "`Dataset.shuffle` must have a seed where workers share the data: "
            "each shuffles all and keeps its own part, so that with orders of "
            "their own some examples would be seen twice and others never. "
            "Received: a dataset that is shuffled without a seed. Use "
            "shuffle(..., seed=0), or call keras.utils.set_random_seed(0) "
            "before it is made. Or let each worker read all by itself, with "
            "tf.data.experimental.AutoShardPolicy.OFF."
        )
    return {"seeds of Dataset.shuffle": seeds} if seeds else {}


def _digest(arrays):
    number = slicing.number_of_examples(arrays)
    count = min(number, _COMPARED)
    digest = hashlib.sha256()
    for start in (0, number - count):
        rows = slicing.examples(arrays, start, count)
        for leaf in tf.nest.flatten(rows, expand_composites=True):
            if leaf is not None:
                digest.update(repr(np.asarray(leaf).tolist()).encode())
    return digest.hexdigest()
