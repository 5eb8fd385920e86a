"""Shuffled row numbers, a superbatch at a time.

Part of `superbatches.py`. Keras's own pipeline of row numbers is right, but
each epoch it takes some ten milliseconds to start and to end, as long as a
small model takes for a thousand examples and more. Here a small pipeline draws
the order of an epoch as Keras's does, and the rest is slicing.
"""

import itertools

import numpy as np
import tensorflow as tf


class RowNumbers(tf.distribute.DistributedDataset):
    """The row numbers of an epoch, in superbatches.

    Keras leaves alone what says that it is distributed, so it iterates over
    this as it is, and under a strategy every replica gets all row numbers:
    handing them out takes longer than reading them.

    Args:
        examples: Number of rows.
        sizes: Sizes of superbatches, which repeat; the last may be smaller.
        shuffle: Whether each epoch has an order of its own.
    """

    def __init__(self, examples, sizes, shuffle):
        self._sizes = sizes
        self._orders = _orders(examples, shuffle)

    def __iter__(self):
        return RowIterator(self._orders, self._sizes)

    @property
    def element_spec(self):
        """Type of a superbatch of row numbers."""
        return tf.TensorSpec((None,), tf.int64)


class RowIterator:
    """One pass over the row numbers.

    Args:
        orders: `tf.data.Dataset` whose one element is the order of an epoch.
        sizes: Sizes of superbatches, which repeat.
    """

    def __init__(self, orders, sizes):
        self._orders = orders
        self._sizes = itertools.cycle(sizes)
        self._order = None
        self._position = 0

    def __iter__(self):
        return self

    def __next__(self):
        if self._order is None:
            self._order = np.asarray(next(iter(self._orders)))
        start = self._position
        if start >= len(self._order):
            raise StopIteration
        self._position = start + next(self._sizes)
        return tf.constant(self._order[start : self._position])


def _orders(examples, shuffle):
    """Returns a dataset whose only element is the order of an epoch.

    It is Keras's order bit for bit: the same operations, in a function of
    their own, so that the global seed gives them the same seeds.
    """

    def order(_):
        rows = tf.range(examples, dtype=tf.int64)
        return tf.random.shuffle(rows) if shuffle else rows

    options = tf.data.Options()
    # There is nothing to tune, and both take longer than the rest.
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    return tf.data.Dataset.range(1).map(order).with_options(options)
