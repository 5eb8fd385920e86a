"""What workers must have alike of their data.

Part of `superbatches.py`. Where each worker reads all the data and keeps its
own part, that is only right if all read the same examples in the same order.
They validate together, too: one that has a batch less leaves the others
waiting.
"""

import hashlib

import keras
import numpy as np
import tensorflow as tf

from keras_batchsize import keras_private
from keras_batchsize import slicing
from keras_batchsize._superbatches_arrays import is_arrays
from keras_batchsize.workers import ORDERED_BY_PYTHON

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
    if isinstance(adapter, keras_private.PyDatasetAdapter):
        return {ORDERED_BY_PYTHON: True} if adapter.shuffle else {}
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


def facts_of_validation(
    validation_data,
    validation_steps,
    validation_batch_size,
    validation_freq,
    batch_size,
    **others,
):
    """Describes how `fit` validates, so that workers can compare.

    Args:
        validation_data: As in `Model.fit`, like the others.
        validation_steps: See there.
        validation_batch_size: See there.
        validation_freq: See there.
        batch_size: See there.
        **others: Further arguments of `Model.fit`.

    Returns:
        Dict from names to values.
    """
    kind, length = _kind_and_length(validation_data)
    facts = {
        "kind of validation_data": kind,
        "length of validation_data": length,
        "validation_steps": validation_steps,
        "validation_batch_size": validation_batch_size or batch_size,
        "validation_freq": validation_freq,
    }
    if validation_steps is not None:
        # It ends sooner; a dataset of one's own may be as long as it is.
        del facts["length of validation_data"]
    return facts


def _kind_and_length(data):
    """Returns two values: the length in examples or batches, if known."""
    if data is None:
        return None, None
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    if is_arrays(x):
        leaves = [one for one in keras.tree.flatten(x) if one is not None]
        return "arrays", leaves[0].shape[0] if leaves else None
    # Of datasets there are many types, which tell of nothing but their making.
    kind = tf.data.Dataset if isinstance(x, tf.data.Dataset) else type(x)
    try:
        return kind.__name__, len(x)
    except (TypeError, NotImplementedError):
        return kind.__name__, None
