"""Any input that Keras takes, handed over in superbatches.

Keras counts the steps of an epoch once, when `fit` starts, so a pipeline whose
batch size varies loses data silently. What Keras sees here never varies: one
step is one superbatch. Arrays are batched that way at once; whatever comes in
batches of its own is cut anew by `Dataset.rebatch`, where these can be joined:
batches padded to lengths of their own are superbatches as they are.

Keras's own adapters read the input, so that every kind they know works, with
its shuffling, its weights and its errors. Another input kind is a matter of
`_superbatches_batched.py`, at most.
"""

import functools
import math

import keras
import tensorflow as tf

from keras_batchsize import _checks
from keras_batchsize import _superbatches_arrays as _arrays
from keras_batchsize import _superbatches_sizes as _sizes
from keras_batchsize import keras_private
from keras_batchsize import replicas
from keras_batchsize import slicing
from keras_batchsize._superbatches_alike import facts_of
from keras_batchsize._superbatches_batched import DEFAULT_BATCH_SIZE
from keras_batchsize._superbatches_batched import Batched
from keras_batchsize._superbatches_batched import batched
from keras_batchsize._superbatches_batched import check_enough
from keras_batchsize._superbatches_datasets import starting_over
from keras_batchsize._superbatches_host import dataset_of
from keras_batchsize._superbatches_host import in_superbatches
from keras_batchsize._superbatches_host import may_read_ahead
from keras_batchsize._superbatches_rows import RowIterator
from keras_batchsize.keras_private import data_adapter_for
from keras_batchsize.plan import checked_superbatch_size

# What Keras hands to a train function while it fits.
ITERATORS = tf.data.Iterator, tf.distribute.DistributedIterator, RowIterator


class Superbatches(keras_private.DataAdapter):
    """A Keras data adapter whose batches are superbatches.

    Args:
        adapter: Keras's adapter of the input.
        sizes: Sizes of the superbatches of an epoch, in examples; they repeat.
            None if the adapter's batches are superbatches already.
        bounds: Pair (at least, at most) of the examples in one pass over the
            data, or None if it is not known.
        arrays: Nested structure of tensors whose row numbers are handed
            over, or None if examples are.
        rows: Function that makes these `RowNumbers`, under the global seed
            of that moment; None where there are no arrays.
        model: The model to whose replicas they are dealt out; None where they
            are already.
        copies: What `replicas.copies_read` returns.
        is_guess: Whether `bounds` rest on the size of one batch.

    Attributes:
        base_batch_size: B₀, in examples.
        superbatch_size: Examples in a superbatch.
        has_static_sizes: Whether graphs of plain `fit` would know the size of a
            batch: all have the same, and Keras says so.
        steps_per_epoch: What to pass to Keras as `steps_per_epoch`.
    """

    def __init__(
        self,
        adapter,
        sizes,
        bounds,
        arrays=None,
        rows=None,
        model=None,
        copies=None,
        is_guess=False,
    ):
        self.base_batch_size = None
        self.superbatch_size = None
        self.has_static_sizes = False
        self._strategy = model and replicas.strategy_of(model)
        self._arrays = arrays
        self._rows = rows
        self._adapter = adapter
        self._copies = copies
        self._sizes = sizes
        self._is_guess = is_guess
        self._bounds = bounds
        self._has_steps = False
        # Told the number, Keras makes one iterator per epoch instead of two.
        self.steps_per_epoch = None if arrays is None else self.num_batches

    def get_tf_dataset(self):
        """Returns the superbatches as a `tf.data.Dataset`.

        Under a strategy examples are dealt out to the replicas already, unless
        each can take its own by itself; row numbers go to all of them.
        """
        if self._rows is not None:
            return self._rows()
        dataset = self._whole()
        if self._strategy is None:
            return dataset
        if replicas.share_memory(self._strategy):
            return replicas.Undealt(dataset)
        if self._copies:
            return self._strategy.experimental_distribute_dataset(dataset)
        ahead = may_read_ahead(self._adapter)
        return replicas.dealt_out(dataset, self._strategy, ahead)

    def first(self):
        """Returns the first superbatch as one device reads it, or None."""
        dataset = self._rows() if self._rows else self._whole().take(1)
        return next(iter(dataset), None)

    def _whole(self):
        """Returns the superbatches as one device would read them."""
        dataset = dataset_of(self._adapter)
        if self._sizes is not None:
            if slicing.has_optionals(dataset):
                dataset = dataset.map(slicing.without_nones)
            # What is read apart cannot be cut short at the same place.
            sizes = self._sizes[:1] if self._copies else self._sizes
            ahead = may_read_ahead(self._adapter)
            dataset = in_superbatches(dataset, sizes, ahead)
            if self._starts_over:
                dataset = starting_over(dataset, self._most_steps)
        return dataset

    @property
    def num_batches(self):
        """Superbatches in one pass over the data, or None if not known."""
        if self._bounds is None or self._copies == 1:
            return None  # Until the last worker has read all its files.
        if self._starts_over:
            return None  # Keras would start over after so many.
        if self._sizes is None:
            return self._adapter.num_batches
        least, most = (self._superbatches_of(count) for count in self._bounds)
        return most * (self._copies or 1) if least == most else None

    @property
    def may_hold_more(self):
        """Whether an epoch may have more superbatches than `num_batches`."""
        is_told = self._most_steps is not None or self._sizes is None
        return self._is_guess and not is_told and self.num_batches is not None

    @property
    def _most_steps(self):
        """Superbatches after which Keras ends an epoch anyway, or None."""
        given = self.steps_per_epoch if self._has_steps else None
        limits = given, keras.config.max_steps_per_epoch()
        return min(filter(None, limits), default=None)

    @property
    def _starts_over(self):
        """Whether the data start over by themselves, not by a guess."""
        is_cut = self._is_guess and self._sizes is not None
        is_known = self._bounds is not None and not self._copies
        return is_cut and is_known and self._most_steps is not None

    def _superbatches_of(self, examples):
        rounds, rest = divmod(examples, sum(self._sizes))
        count, sizes = rounds * len(self._sizes), iter(self._sizes)
        while rest > 0:
            rest -= next(sizes)
            count += 1
        return count

    @property
    def examples(self):
        """Function (superbatch, start, size) that returns its examples."""
        if self._arrays is None:
            return slicing.examples
        return functools.partial(slicing.gathered, self._arrays)

    @property
    def specs(self):
        """Types of a batch, where row numbers do not show them, or None."""
        if self._arrays is None:
            return None
        return keras.tree.map_structure(slicing.batch_spec, self._arrays)

    def count_steps(self, steps_per_epoch):
        """Ends an epoch after so many superbatches, not with the data."""
        self.steps_per_epoch = steps_per_epoch
        self._has_steps = self._sizes is not None

    def facts(self):
        """Returns what all workers must have alike, a dict."""
        is_shared = self._strategy is not None and not self._copies
        return {
            "examples_per_epoch": self.examples_per_epoch,
            "steps_per_epoch": self.steps_per_epoch,
            "superbatch_size": self.superbatch_size,
            **(facts_of(self._adapter, self._arrays) if is_shared else {}),
        }

    @property
    def examples_per_epoch(self):
        """Examples in an epoch (at most, by a batch), or None."""
        if self._has_steps:  # Then the sizes are those of an epoch.
            if self._copies:
                return len(self._sizes) * self._sizes[0]
            return sum(self._sizes)
        return self._bounds and self._bounds[1] * (self._copies or 1)

    @property
    def fewer(self):
        """By how many examples an epoch may be less than is told."""
        if self._has_steps or self._bounds is None:
            return 0
        least, most = self._bounds
        apart = math.inf if self._is_guess else most - least
        return apart * (self._copies or 1)

    @property
    def batch_size(self):
        """Examples in a superbatch."""
        return self.superbatch_size

    def on_epoch_begin(self):
        """Passes the start of an epoch on."""
        self._adapter.on_epoch_begin()

    def on_epoch_end(self):
        """Passes the end of an epoch on."""
        self._adapter.on_epoch_end()


def make_superbatches(
    model,
    x,
    y=None,
    sample_weight=None,
    batch_size=None,
    superbatch_size=None,
    steps_per_epoch=None,
    shuffle=True,
    class_weight=None,
    fewest=2,
):
    """Turns the input of `fit` into superbatches.

    Args:
        model: The Keras model, whose inputs tell whether a dataset is batched.
        x: As in `Model.fit`.
        y: As in `Model.fit`.
        sample_weight: As in `Model.fit`.
        batch_size: B₀. None for the input's own batch size, or 32.
        superbatch_size: Examples per superbatch, B₀·2ᵏ. None to choose.
        steps_per_epoch: Base batches per epoch, as in `Model.fit`.
        shuffle: As in `Model.fit`.
        class_weight: As in `Model.fit`.
        fewest: Examples that there must be: two, to measure noise.

    Returns:
        A `Superbatches`.

    Raises:
        ValueError: If there are fewer examples, or if the superbatch does not
            fit the base batch size.
    """
    steps_per_epoch = _checked_steps(steps_per_epoch)
    batch_size = _checked_batch_size(batch_size)
    if isinstance(x, tf.distribute.DistributedDataset):
        return _dealt_out_already(model, x, batch_size, steps_per_epoch)
    data = batched(x, y, sample_weight, model, batch_size)
    adapter_for = functools.partial(data_adapter_for, class_weight=class_weight)
    adapter, arrays, rows = None, None, None
    if not (is_arrays := data.batch_size is None):
        shuffle = shuffle and isinstance(x, keras.utils.PyDataset)
        adapter = adapter_for(data.x, y, sample_weight, shuffle=shuffle)
    check_enough(bounds := _bounds(data, adapter), x, fewest)
    base = _base_batch_size(batch_size, data, steps_per_epoch)
    epoch = _examples_of_epoch(bounds, steps_per_epoch, base)
    size = _sizes.superbatch_size(
        superbatch_size, base, epoch, replicas.count(model), data
    )
    sizes = _cut_to(data, size, epoch, steps_per_epoch)
    if is_arrays:
        # "batch" shuffles within batches, so these must be the base ones.
        read = base if shuffle == "batch" else sizes[0]
        adapter = adapter_for(x, y, sample_weight, read, shuffle=shuffle)
        order = data.examples, sizes, shuffle, base
        arrays, rows = _arrays.at_hand(model, adapter, *order)
        if steps_per_epoch is None and shuffle != "batch":
            sizes = None
    result = Superbatches(
        adapter, sizes, bounds, arrays, rows, model, data.copies, data.is_guess
    )
    return _sized(result, base, size, steps_per_epoch, data)


def _cut_to(data, size, epoch, steps_per_epoch):
    """Returns the sizes that batches are cut to, None for as they are."""
    if data.varies:
        return None
    return [size] if steps_per_epoch is None else _sizes.of_epoch(size, epoch)


def told_of(model, x):
    """Returns what can be told of an input of `fit`, a `Batched`.

    Args:
        model: The Keras model.
        x: As in `Model.fit`, of a kind that can be read more than once.
    """
    return batched(x, None, None, model, None)


def base_batch_size_of(
    model, x, y=None, sample_weight=None, steps_per_epoch=None
):
    """Returns the base batch size of data where none is stated.

    Args:
        model: The Keras model.
        x: As in `Model.fit`, of a kind that can be read more than once.
        y: As in `Model.fit`.
        sample_weight: As in `Model.fit`.
        steps_per_epoch: As in `Model.fit`.
    """
    data = batched(x, y, sample_weight, model, None)
    return _base_batch_size(None, data, _checked_steps(steps_per_epoch))


def _dealt_out_already(model, x, batch_size, steps_per_epoch):
    """Takes each element of a distributed dataset as a superbatch."""
    size = replicas.batch_size_of(model.distribute_strategy, x)
    adapter = data_adapter_for(x)
    bounds = _bounds(Batched(x, size), adapter)
    result = Superbatches(adapter, None, bounds)
    base = batch_size or size
    checked_superbatch_size(size, base, replicas.count(model))
    return _sized(result, base, size, steps_per_epoch)


def _sized(result, base, size, steps_per_epoch, data=None):
    result.has_static_sizes = data is not None and data.has_static_sizes(base)
    result.base_batch_size, result.superbatch_size = base, size
    if steps_per_epoch is not None:
        result.count_steps(math.ceil(steps_per_epoch * base / size))
    return result


def _checked_batch_size(batch_size):
    if batch_size is None:
        return None
    return _checks.positive_int(
        "batch_size",
        batch_size,
        "it is the number of examples the learning rate was meant for",
        "Use batch_size=32.",
    )


def _checked_steps(steps_per_epoch):
    if not steps_per_epoch:
        return None  # As Keras takes a zero.
    return _checks.positive_int(
        "steps_per_epoch",
        steps_per_epoch,
        "it is the number of base batches in an epoch",
        "Use steps_per_epoch=10, or None for a whole pass over the data.",
    )


def _base_batch_size(batch_size, data, steps_per_epoch):
    if batch_size is not None:
        return batch_size
    if data.batch_size is not None:
        return data.batch_size
    if steps_per_epoch is not None:
        return math.ceil(data.examples / steps_per_epoch)  # As Keras does.
    return DEFAULT_BATCH_SIZE


def _bounds(data, adapter):
    """Returns the least and most examples in one pass, None if not known."""
    if data.examples is not None:
        return data.examples, data.examples
    batches, size = adapter.num_batches, data.batch_size
    if batches is None:
        return None
    # The last batch of each pass may be short.
    short = 1
    if isinstance(data.x, tf.data.Dataset):
        short = keras_private.passes_of(data.x)
    short = min(short, batches)
    return (batches - short) * size + short, batches * size


def _examples_of_epoch(bounds, steps_per_epoch, base):
    if steps_per_epoch is not None:
        return steps_per_epoch * base
    return math.inf if bounds is None else bounds[1]
