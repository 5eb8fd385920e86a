"""Private names of TensorFlow that tell how a `tf.data.Dataset` was made."""

import itertools

import keras
import tensorflow as tf

# What makes batches, and what passes them on as they are.
_BATCHING = ("_BatchDataset", "_PaddedBatchDataset", "_ParallelBatchDataset")
_SHUFFLING = ("_ShuffleDataset", "_ShuffleAndRepeatDataset")
_PASSING_ON = (
    "CacheDataset",
    "_AssertCardinalityDataset",
    "_OptionsDataset",
    "_PrefetchDataset",
    "_RepeatDataset",
    "_ShuffleDataset",
    "_SkipDataset",
    "_TakeDataset",
)


def batch_size_of(dataset):
    """Returns the batch size of a `tf.data.Dataset` without reading from it.

    Whoever reads a batch takes the order of the first epoch away from a
    dataset that shuffles anew each time.

    Args:
        dataset: A dataset of batches.

    Returns:
        Integer, or None where only reading would tell.
    """
    size = keras.tree.flatten(dataset.element_spec)[0].shape[0]
    while type(dataset).__name__ in _PASSING_ON:
        dataset = dataset._input_dataset
    if type(dataset).__name__ in _BATCHING:
        size = int(dataset._batch_size)
    return size


def passes_of(dataset):
    """Returns how many times a `tf.data.Dataset` goes through its batches.

    Args:
        dataset: A dataset of batches.

    Returns:
        Integer, 1 where batches are not repeated.
    """
    passes = 1
    while type(dataset).__name__ in _PASSING_ON:
        if type(dataset).__name__ == "_RepeatDataset":
            passes *= int(dataset._count)
        dataset = dataset._input_dataset
    return passes


def makes_batches(dataset):
    """Whether batches are made somewhere in a `tf.data.Dataset`.

    Args:
        dataset: A dataset.

    Returns:
        Bool; False if the batches have been taken apart again.
    """
    kind = type(dataset).__name__
    if kind == "_UnbatchDataset":
        return False
    inputs = dataset._inputs()
    return kind in _BATCHING or any(makes_batches(one) for one in inputs)


def is_fed_by_python(dataset):
    """Whether a Python generator feeds a `tf.data.Dataset`.

    What is read from it ahead may be gone for good.

    Args:
        dataset: A dataset.
    """
    mapped = getattr(dataset, "_map_func", None)
    if mapped is not None:
        graph = mapped.function.graph.as_graph_def()
        functions = [one.node_def for one in graph.library.function]
        nodes = itertools.chain(graph.node, *functions)
        if any(node.op == "GeneratorDataset" for node in nodes):
            return True
    return any(is_fed_by_python(one) for one in dataset._inputs())


def shuffle_seeds(dataset):
    """Returns the seeds by which a `tf.data.Dataset` shuffles.

    Args:
        dataset: A dataset.

    Returns:
        List of pairs of integers, one per shuffle; zeros where it has no seed
        and none was set for TensorFlow either, so that each process draws its
        own.
    """
    seeds = []
    if type(dataset).__name__ in _SHUFFLING:
        seeds.append((int(dataset._seed), int(dataset._seed2)))
    for one in dataset._inputs():
        seeds += shuffle_seeds(one)
    return seeds


def _batched(below, dataset):
    return below.batch(
        int(dataset._batch_size),
        drop_remainder=bool(dataset._drop_remainder),
    )


def _padded(below, dataset):
    return below.padded_batch(
        int(dataset._batch_size),
        padded_shapes=dataset._padded_shapes,
        padding_values=dataset._padding_values,
        drop_remainder=bool(dataset._drop_remainder),
    )


def _mapped(below, dataset):
    return below.map(dataset._map_func._func)


def _flattened(below, dataset):
    # In another order where they were interleaved.
    return below.flat_map(dataset._map_func._func)


def _counted(below, dataset):
    count = tf.data.experimental.assert_cardinality(
        dataset._expected_cardinality
    )
    return below.apply(count)


def _as_it_is(below, dataset):
    return below


# How to make the same of other data, by what was made.
_ANEW = {
    "CacheDataset": _as_it_is,
    "_AssertCardinalityDataset": _counted,
    "_BatchDataset": _batched,
    "_FilterDataset": lambda below, of: below.filter(of._predicate._func),
    "_FlatMapDataset": _flattened,
    "_InterleaveDataset": _flattened,
    "_MapDataset": _mapped,
    "_OptionsDataset": _as_it_is,
    "_PaddedBatchDataset": _padded,
    "_ParallelBatchDataset": _batched,
    "_ParallelInterleaveDataset": _flattened,
    "_ParallelMapDataset": _mapped,
    "_PrefetchDataset": _as_it_is,
    "_RepeatDataset": lambda below, of: below.repeat(of._count),
    "_ShuffleDataset": _as_it_is,
    "_SkipDataset": lambda below, of: below.skip(of._count),
    "_TakeDataset": lambda below, of: below.take(of._count),
}
# Reading a part of these leaves traces: of one that shuffles anew each time the
# order of the first epoch is gone, and a file of a cache stays half written.
_DISTURBED = ("CacheDataset", "_ShuffleDataset")


def in_order(dataset):
    """Returns a dataset of the same examples that may be read in part.

    Args:
        dataset: A dataset.

    Returns:
        A dataset without shuffling and caches; the given one if there are
        none, or where they lie below something that cannot be made anew: a
        `zip` or an `unbatch`, say.
    """
    kind = type(dataset).__name__
    if kind not in _ANEW:
        return dataset
    given = dataset._input_dataset
    below = in_order(given)
    if below is given and kind not in _DISTURBED:
        return dataset
    return _ANEW[kind](below, dataset)
