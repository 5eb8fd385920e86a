"""A few real examples of any Keras input, repeated to batches of any size.

Real ones, because indices must lie within vocabularies and types must be
right. Of those read, ragged ones that differ in length, the longest is taken:
it decides what a batch costs. A longer one further on in the data costs more
than was probed, and batches padded to lengths of their own are as wide as the
first: keep a larger `safety_margin` for such data, or put the longest first.
"""

import math

import keras
import tensorflow as tf

from keras_batchsize import _memory_data
from keras_batchsize import keras_private
from keras_batchsize import slicing
from keras_batchsize.superbatches import make_superbatches
from keras_batchsize.superbatches import told_of

# Of so many batches are made, or fewer where they are large: they lie in memory
# as long as a probe lasts. What a step takes does not depend on their values.
_MOST, _FEWEST, _MOST_BYTES = 64, 8, 2**26
# Not on an accelerator, where what they take would not be the step's.
_HOST = "CPU:0"


class Examples:
    """Examples from which batches are made.

    Args:
        batch: Nested structure of tensors, as `train_step` receives it.
        count: Number of examples in the data, infinite if not known.
        data_bytes: Bytes of the arrays that `fit` copies, 0 for data that it
            reads piece by piece.
        fewer: By how many examples the data may hold less than `count`.

    Attributes:
        superbatch_bytes: Bytes of the superbatches that `AdaptiveTrainer.fit`
            holds at once; 0 if it holds none, or this is not known.
    """

    def __init__(self, batch, count=math.inf, data_bytes=0, fewer=0):
        with tf.device(_HOST):
            self._batch = _longest_first(batch)
        self.count = count
        self.data_bytes = data_bytes
        self.fewer = fewer
        self.superbatch_bytes = 0
        self.size = slicing.number_of_examples(self._batch)

    @property
    def one(self):
        """A batch of one example."""
        return self.few(1)

    def few(self, size):
        """Returns the first few of the examples.

        Args:
            size: Integer, how many at most.
        """
        with tf.device(_HOST):
            return slicing.examples(self._batch, 0, min(size, self.size))

    def tail(self, size):
        """Returns how many examples the last batch of an epoch holds, or 0.

        Where that is not sure, the most that it may hold: of batches that are
        not whole the largest needs the most memory.

        Args:
            size: Integer, examples in the other batches.
        """
        if math.isinf(self.count) and not self.fewer:
            return 0
        if math.isfinite(self.count) and self.count % size >= self.fewer:
            return int(self.count) % size
        return size - 1  # Of so many counts one leaves that.

    @property
    def bytes_each(self):
        """Bytes of the largest example."""
        return sum(
            leaf.shape.num_elements() * leaf.dtype.size
            for leaf in tf.nest.flatten(self.one, expand_composites=True)
            if leaf is not None and leaf.shape.num_elements() is not None
        )

    @property
    def bytes_in_all(self):
        """Bytes of all examples as they are read; 0 if that is not known."""
        is_dense = all(
            leaf is None or isinstance(leaf, tf.Tensor)
            for leaf in keras.tree.flatten(self._batch)
        )
        if not is_dense or math.isinf(self.count):
            return 0
        return int(self.count) * self.bytes_each

    @property
    def accelerator_bytes(self):
        """Bytes of the arrays that plain `fit` keeps on an accelerator."""
        if not (self.data_bytes and self.bytes_in_all):
            return self.data_bytes
        return _memory_data.bytes_on_accelerator(self.one, int(self.count))

    def batch(self, size):
        """Returns a batch in which the examples repeat.

        Args:
            size: Integer, examples in it.
        """
        with tf.device(_HOST):
            return self._repeated(size)

    def _repeated(self, size):
        if any(
            isinstance(leaf, tf.SparseTensor)
            for leaf in keras.tree.flatten(self._batch)
        ):
            return _repeated_sparse(self._batch, size, self.size)
        return keras.tree.map_structure(
            lambda leaf: (
                None
                if leaf is None
                else tf.gather(leaf, tf.range(size) % self.size)
            ),
            self._batch,
        )

    def repeated(self, size):
        """Returns an endless dataset of batches.

        Args:
            size: Integer, examples in each.
        """
        numbers = tf.data.Dataset.from_tensors(0).repeat()
        # Made parallel, it would make some ahead, beside those that the caller
        # wants ahead. And without anything to tune: an iterator ends when its
        # tuner wakes up next, after up to half a second.
        options = tf.data.Options()
        options.experimental_optimization.map_parallelization = False
        options.autotune.enabled = False
        return numbers.map(lambda _: self._repeated(size)).with_options(options)


def _repeated_sparse(batch, size, available):
    times = math.ceil(size / available)

    def repeat(leaf):
        if leaf is None:
            return None
        if isinstance(leaf, tf.SparseTensor):
            return tf.sparse.concat(0, [leaf] * times)
        return tf.concat([leaf] * times, 0)

    return slicing.examples(
        keras.tree.map_structure(repeat, batch), 0, size
    )


def _longest_first(batch):
    """Keeps the longest example only, where lengths differ."""
    ragged = [
        leaf
        for leaf in keras.tree.flatten(batch)
        if isinstance(leaf, tf.RaggedTensor)
    ]
    if not ragged:
        return batch
    lengths = tf.add_n([tf.cast(one.row_lengths(), tf.int64) for one in ragged])
    return slicing.examples(batch, tf.argmax(lengths, output_type=tf.int32), 1)


def read_examples(model, x, y=None, sample_weight=None):
    """Reads a few examples of the data without disturbing them.

    Args:
        model: A compiled Keras model.
        x: As in `Model.fit`.
        y: As in `Model.fit`.
        sample_weight: As in `Model.fit`.

    Returns:
        An `Examples`.

    Raises:
        ValueError: If the data can be read only once, or are empty.
    """
    _check_readable_twice(x)
    is_dataset, given = isinstance(x, tf.data.Dataset), x
    if is_dataset:
        given = keras_private.in_order(x)
    elif isinstance(x, keras.utils.PyDataset):
        given = _WithoutWorkers(x)
    told = told_of(model, given)
    given_bytes = slicing.bytes_of((x, y, sample_weight))
    size = _kept(told.bytes_each or given_bytes / (told.examples or 1))
    if told.varies:
        size = None  # Batches that cannot be joined.
    superbatches = make_superbatches(
        model,
        given,
        y,
        sample_weight,
        batch_size=size,
        superbatch_size=size,
        shuffle=False,
        fewest=1,
    )
    examples = _examples_of(superbatches, x)
    if told.batch_size is None:  # Arrays, of which `fit` makes a copy.
        examples.data_bytes = max(given_bytes, examples.bytes_in_all)
    examples.superbatch_bytes = _memory_data.superbatch_bytes(
        model, told, examples
    )
    return examples


def _kept(bytes_each):
    """How many examples to keep, by the bytes of one, 0 if not known."""
    most = _MOST_BYTES // bytes_each if bytes_each else _MOST
    return max(_FEWEST, min(_MOST, int(most)))


def _examples_of(superbatches, x):
    """Returns the `Examples` of the first superbatch."""
    # The replicas get their shares when a batch is made.
    first = superbatches.first()
    if first is None:
        raise ValueError(
            "The data must hold examples: a training step is run on them. "
            f"Received: x of type {type(x).__name__} that gives none. Pass "
            "the data that you train on."
        )
    count, fewer = superbatches.examples_per_epoch, superbatches.fewer
    if count is None:
        count, fewer = math.inf, math.inf if _ends_somewhere(x) else 0
    first = slicing.without_optionals(first)
    number = slicing.number_of_examples(first)
    with tf.device(_HOST):
        batch = superbatches.examples(first, 0, number)
    examples = Examples(batch, count, fewer=fewer)
    number = _kept(examples.bytes_each)
    if examples.size > number:
        examples = Examples(examples.few(number), count, fewer=fewer)
    return examples


def _ends_somewhere(x):
    """Whether data end, though nobody knows where."""
    return (
        isinstance(x, tf.data.Dataset)
        and int(x.cardinality()) == tf.data.UNKNOWN_CARDINALITY
    )


class _WithoutWorkers(keras.utils.PyDataset):
    """The batches of a `PyDataset`, read in the thread that asks for them.

    Its own workers read ahead, and for ever wait for somebody to take what
    they have where only the first few batches are taken.

    Args:
        data: The `PyDataset`.
    """

    def __init__(self, data):
        super().__init__()
        self._data = data

    @property
    def num_batches(self):
        """Batches in an epoch, or None."""
        return self._data.num_batches

    def __getitem__(self, index):
        return self._data[index]


def can_be_read_twice(x):
    """Whether reading data leaves them as they are.

    Args:
        x: As in `Model.fit`.
    """
    if isinstance(x, (keras.utils.PyDataset, tf.data.Dataset)):
        return True
    if isinstance(x, tf.distribute.DistributedDataset):
        return False  # It can, but is of batches of one size.
    try:
        return iter(x) is not x
    except TypeError:
        return True  # Not iterable: whoever reads it knows more about it.


def may_be_read_ahead(x):
    """Whether examples may be read that nobody asked to have read.

    Not of a dataset that a Python generator feeds: whether that begins anew
    would only show when it does not.

    Args:
        x: As in `Model.fit`.
    """
    if isinstance(x, tf.data.Dataset):
        return not keras_private.is_fed_by_python(x)
    return can_be_read_twice(x)


def _check_readable_twice(x):
    if isinstance(x, tf.distribute.DistributedDataset):
        raise TypeError(
            "`x` must be data that are not dealt out to replicas yet: batches "
            "of other sizes are made of them. Received: x of type "
            f"{type(x).__name__}. Pass the `tf.data.Dataset` that it was made "
            "of; the model's strategy deals it out."
        )
    if not can_be_read_twice(x):
        raise ValueError(
            "`x` must be data that can be read more than once: what a probe "
            "reads would be missing in the training that follows. Received: "
            f"x of type {type(x).__name__}. Pass arrays, a `tf.data.Dataset` "
            "or a `PyDataset`; or repeat the first batch: "
            "tf.data.Dataset.from_tensors(next(x)).repeat()."
        )
