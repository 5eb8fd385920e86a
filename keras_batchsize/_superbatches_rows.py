"""Shuffled row numbers, a superbatch at a time.

Part of `superbatches.py`. A pipeline of Keras's would do, but each epoch it
takes some ten milliseconds to start and to end, as long as a small model takes
for a thousand examples and more. Here a function draws the order of an epoch as
Keras's pipeline does, and the rest is slicing.
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
        shuffle: As in `Model.fit`.
        batch_size: Rows that "batch" shuffles among themselves.
    """

    def __init__(self, examples, sizes, shuffle, batch_size=None):
        self._sizes = sizes
        self._draw, self._is_random = (
            _drawing_by_batch(examples, batch_size)
            if shuffle == "batch"
            else _drawing(examples, shuffle)
        )
        self._kept = None

    def __iter__(self):
        order = self._kept
        if order is None:
            order = self._draw(tf.constant(0, tf.int64)).numpy()
        if not self._is_random:
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
    them seeds, below the global one. The argument has a name, because it
    names an operation, and TensorFlow warns of "_".

    Returns:
        Tuple of the function and whether it draws another order each time.
    """

    def order(unused):
        rows = tf.range(examples, dtype=tf.int64)
        return tf.random.shuffle(rows) if shuffle else rows

    function = _traced(order, ())
    return function, _is_random(function)


def _drawing_by_batch(examples, batch_size):
    """Likewise, where the rows of each batch are shuffled among themselves."""
    shuffled = _traced(tf.random.shuffle, (None,))

    def order(unused):
        rows = tf.range(examples, dtype=tf.int64)
        number = -(-examples // batch_size)
        batches = tf.TensorArray(tf.int64, number, infer_shape=False)
        # One operation draws for all batches, one after the other.
        _, batches = tf.while_loop(
            lambda index, _: index < number,
            lambda index, batches: (
                index + 1,
                batches.write(
                    index, shuffled(rows[index * batch_size :][:batch_size])
                ),
            ),
            (tf.constant(0), batches),
            parallel_iterations=1,
        )
        return batches.concat()

    return _traced(order, ()), _is_random(shuffled)


def _traced(function, shape):
    traced = tf.function(function, autograph=False)
    return traced.get_concrete_function(tf.TensorSpec(shape, tf.int64))


def _is_random(drawing):
    """Whether every epoch has an order of its own.

    With a global seed it does not: Keras's pipeline draws the same one again.
    """
    return any(
        operation.type == "RandomShuffle"
        and (operation.get_attr("seed"), operation.get_attr("seed2")) == (0, 0)
        for operation in drawing.graph.get_operations()
    )
