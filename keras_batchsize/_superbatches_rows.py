"""Shuffled row numbers, a superbatch at a time.

Part of `superbatches.py`. Keras's own pipeline of row numbers is right, but
each epoch it takes some ten milliseconds to start and to end, as long as a
small model takes for a thousand examples and more. Here a function draws the
order of an epoch as Keras's pipeline does, and the rest is slicing.
"""

import itertools

import tensorflow as tf


class RowNumbers(tf.distribute.DistributedDataset):
    """The row numbers of an epoch, in superbatches.

    Keras leaves alone what says that it is distributed, so it iterates over
    this as it is, and under a strategy every replica gets all row numbers:
    handing them out takes longer than reading them.

    Args:
        examples: Number of rows.
        sizes: Sizes of superbatches, which repeat; the last may be smaller.
        shuffle: Whether rows are shuffled.
    """

    def __init__(self, examples, sizes, shuffle):
        self._sizes = sizes
        self._draw = _drawing(examples, shuffle)
        self._kept = None

    def __iter__(self):
        order = self._kept
        if order is None:
            order = self._draw(tf.constant(0, tf.int64)).numpy()
        if not _is_random(self._draw):
            self._kept = order
        return RowIterator(order, self._sizes)

    @property
    def element_spec(self):
        """Type of a superbatch of row numbers."""
        return tf.TensorSpec((None,), tf.int64)


class RowIterator:
    """One pass over the row numbers.

    Args:
        order: Integer array of shape (rows,).
        sizes: Sizes of superbatches, which repeat.
    """

    def __init__(self, order, sizes):
        self._order = order
        self._sizes = itertools.cycle(sizes)
        self._position = 0

    def __iter__(self):
        return self

    def __next__(self):
        start = self._position
        if start >= len(self._order):
            raise StopIteration
        self._position = start + next(self._sizes)
        return tf.constant(self._order[start : self._position])


def _drawing(examples, shuffle):
    """Returns a function that draws the order of an epoch.

    Its first order is Keras's, bit for bit: the same operations after the same
    argument, for it is from their place in a function that TensorFlow gives
    them seeds, below the global one.
    """

    def order(_):
        rows = tf.range(examples, dtype=tf.int64)
        return tf.random.shuffle(rows) if shuffle else rows

    function = tf.function(order, autograph=False)
    return function.get_concrete_function(tf.TensorSpec((), tf.int64))


def _is_random(drawing):
    """Whether every epoch has an order of its own.

    With a global seed it does not: Keras's pipeline draws the same one again.
    """
    return any(
        operation.type == "RandomShuffle"
        and (operation.get_attr("seed"), operation.get_attr("seed2")) == (0, 0)
        for operation in drawing.graph.get_operations()
    )
