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

from keras_batchsize import keras_private
from keras_batchsize import slicing
from keras_batchsize.superbatches import can_be_joined
from keras_batchsize.superbatches import make_superbatches

# Read so many. Memory does not depend on what is in them.
_POOL = 64


class Examples:
    """Examples from which batches are made.

    Args:
        batch: Nested structure of tensors, as `train_step` receives it.
        count: Number of examples in the data, infinite if not known.
        data_bytes: Bytes of the arrays that `fit` copies, 0 for data that it
            reads piece by piece.
    """

    def __init__(self, batch, count=math.inf, data_bytes=0):
        self._batch = _longest_first(batch)
        self.count = count
        self.data_bytes = data_bytes
        self.size = slicing.number_of_examples(self._batch)

    @property
    def one(self):
        """A batch of one example."""
        return slicing.examples(self._batch, 0, 1)

    def few(self, size):
        """Returns the first few of the examples.

        Args:
            size: Integer, how many at most.
        """
        return slicing.examples(self._batch, 0, min(size, self.size))

    @property
    def bytes_each(self):
        """Bytes of the largest example."""
        return sum(
            leaf.shape.num_elements() * leaf.dtype.size
            for leaf in tf.nest.flatten(self.one, expand_composites=True)
            if leaf is not None and leaf.shape.num_elements() is not None
        )

    def batch(self, size):
        """Returns a batch in which the examples repeat.

        Args:
            size: Integer, examples in it.
        """
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
        return numbers.map(lambda _: self.batch(size)).with_options(options)


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
    size = _POOL if can_be_joined(model, given) else None
    superbatches = make_superbatches(
        *(model, given, y, sample_weight),
        batch_size=size,
        superbatch_size=size,
        shuffle=False,
    )
    # The replicas get their shares when a batch is made.
    first = superbatches.first()
    if first is None:
        raise ValueError(
            "The data must hold examples: a training step is run on them. "
            f"Received: x of type {type(x).__name__} that gives none. Pass "
            "the data that you train on."
        )
    count = superbatches.examples_per_epoch
    first = slicing.without_optionals(first)
    examples = Examples(
        superbatches.examples(first, 0, slicing.number_of_examples(first)),
        math.inf if count is None else count,
    )
    if not is_dataset and superbatches.num_batches is not None:
        examples.data_bytes = slicing.bytes_of((x, y, sample_weight))
    return examples


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
            "or a `PyDataset`; or the first batch: "
            "kb.find_max_batch_size(model, *next(x))."
        )
