"""What can be told of an input before Keras's adapter reads it.

Part of `superbatches.py`.
"""

import itertools
import types
from collections.abc import Sized
from typing import Any
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_batchsize import _checks
from keras_batchsize import _superbatches_arrays as _arrays
from keras_batchsize import keras_private
from keras_batchsize import replicas
from keras_batchsize import slicing
from keras_batchsize._superbatches_datasets import bytes_of_example
from keras_batchsize._superbatches_datasets import is_batched
from keras_batchsize._superbatches_datasets import shapes_vary
from keras_batchsize.keras_private import data_adapter_for

# Keras's default for arrays.
DEFAULT_BATCH_SIZE = 32


class Batched(NamedTuple):
    """What can be told.

    Attributes:
        x: The input, in batches or as arrays.
        batch_size: Examples in its batches; None for arrays.
        examples: Examples in one pass over it, if known exactly.
        copies: What `replicas.copies_read` returns.
        varies: Whether batches may differ in shape, not in their number of
            examples alone, so that they cannot be joined.
        bytes_each: Bytes of an example that is copied into superbatches; 0
            where that is not known, or none is copied.
        is_guess: Whether the batch size is that of a batch that was read, and
            others may have others.
    """

    x: Any
    batch_size: int | None
    examples: int | None = None
    copies: int | None = None
    varies: bool = False
    bytes_each: float = 0.0
    is_guess: bool = False

    @property
    def as_it_is(self):
        """Examples in a batch if it must stay as it is, else None."""
        return self.batch_size if self.varies else None

    def has_static_sizes(self, base):
        """Whether graphs would know the size of batches of `base` examples."""
        if self.batch_size is None:
            return self.examples % base == 0
        if not isinstance(self.x, tf.data.Dataset):
            return False
        return keras.tree.flatten(self.x.element_spec)[0].shape[:1] == [base]


def batched(x, y, sample_weight, model, batch_size):
    """Returns what can be told of the input of `fit`.

    Args:
        x: As in `Model.fit`.
        y: As in `Model.fit`.
        sample_weight: As in `Model.fit`.
        model: The Keras model.
        batch_size: Integer, as the user stated it, or None.

    Returns:
        A `Batched`.
    """
    if isinstance(x, tf.data.Dataset):
        data = _of_dataset(x, model, batch_size)
        return data._replace(copies=replicas.copies_read(model, data.x))
    if isinstance(x, keras.utils.PyDataset):
        return _of_py_dataset(x, model)
    if isinstance(x, types.GeneratorType):
        few = list(itertools.islice(x, 2))
        if len(few) == 1:
            check_enough((0, _count(few[0])), x)
        return _of_few(_chained(few, x), few)
    if _arrays.is_arrays(x):
        count = _arrays.count(x, y, sample_weight)
        copied = not _arrays.can_be_at_hand(model)
        size = copied and slicing.bytes_of((x, y, sample_weight))
        return Batched(x, None, count, bytes_each=size / max(count, 1))
    size, may_vary = data_adapter_for(x).batch_size, _may_vary(model)
    if size is not None:
        _check_source(x)
        if not may_vary:
            return Batched(x, size)
    data = _of_few(x, list(itertools.islice(iter(x), 2 if may_vary else 1)))
    if size is None:
        return data
    return data._replace(batch_size=size, is_guess=False)


def _check_source(x):
    """Raises if what a `DataLoader` of torch draws from is too little.

    Its batches are only counted, and a single one may hold a single example.
    """
    for source in (getattr(x, "dataset", None), getattr(x, "sampler", None)):
        if isinstance(source, Sized):
            check_enough((0, len(source)), x)


def _of_few(x, few):
    """Tells what a few batches show."""
    size = _count(few[0]) if few else 0
    if size == 0:
        check_enough((0, 0), x)
    shapes = [[leaf.shape[1:] for leaf in _leaves(one)] for one in few]
    return Batched(
        x,
        size,
        varies=any(one != shapes[0] for one in shapes),
        bytes_each=slicing.bytes_of(few[0]) / size,
        is_guess=True,
    )


def _of_py_dataset(x, model):
    number = x.num_batches
    if number == 1:
        return _of_few(x, [x[0]])._replace(is_guess=False)
    if number != 0:
        number = 2 if _may_vary(model) else 1
    return _of_few(x, [x[i] for i in range(number)])


def _may_vary(model):
    """Whether a model takes examples of more than one shape, by its inputs."""
    inputs = keras.tree.flatten(getattr(model, "inputs", None) or [])
    return not inputs or any(None in one.shape[1:] for one in inputs)


def _of_dataset(x, model, batch_size):
    if not is_batched(x, model, batch_size):
        return _of_examples(x, batch_size or DEFAULT_BATCH_SIZE)
    size, number = keras_private.batch_size_of(x), int(x.cardinality())
    data = Batched(x, size)
    if size is None or number in (0, 1) or _may_be_empty(x):
        data = _of_few(x, _first_of(x))
    if number != 1:
        # How the batches were made tells more than what one of them holds.
        data = data._replace(batch_size=size or data.batch_size)
    return data._replace(
        varies=shapes_vary(x),
        bytes_each=bytes_of_example(x),
        is_guess=size is None and number != 1,
    )


def _first_of(x):
    """Reads a batch of a dataset, and looks whether it is all there is."""
    batches = iter(keras_private.in_order(x).take(2))
    few = list(itertools.islice(batches, 1))
    # A second one is read only where that is asked for and disturbs nothing.
    is_one = few and _count(few[0]) == 1 and _may_be_empty(x)
    if is_one and next(batches, None) is None:
        check_enough((0, 1), x)
    return few


def _of_examples(x, size):
    examples = int(x.cardinality())
    if _may_be_empty(x):
        examples = len(list(keras_private.in_order(x).take(2)))
        examples = None if examples == 2 else examples
    elif examples < 0:
        examples = None
    x = x.batch(size)
    return Batched(x, size, examples, bytes_each=bytes_of_example(x))


def _may_be_empty(dataset):
    """Whether only reading tells, which takes nothing away."""
    unknown = dataset.cardinality() == tf.data.UNKNOWN_CARDINALITY
    return unknown and not keras_private.is_fed_by_python(dataset)


def _chained(few, rest):
    """A generator again, as Keras insists, that starts with `few`."""
    yield from itertools.chain(few, rest)


def _leaves(data):
    return [leaf for leaf in keras.tree.flatten(data) if leaf is not None]


def _count(data):
    return int(_leaves(data)[0].shape[0])


def check_enough(bounds, x, fewest=2):
    """Raises if the data are too few to tell noise from signal.

    Args:
        bounds: Pair (at least, at most) of their number, or None.
        x: As in `Model.fit`.
        fewest: Examples that do: one where noise is no matter.

    Raises:
        ValueError: If there are fewer.
    """
    if bounds is not None and bounds[1] < fewest:
        _checks.enough_examples(bounds[1], f"x of type {type(x).__name__}")
