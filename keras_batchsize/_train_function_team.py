"""Who takes part in an update, as far as the train function has to know.

Part of `train_function.py`: one device, or the replicas of a strategy on one
or several workers.
"""

import dataclasses
import math
import warnings

from keras_batchsize import exactness
from keras_batchsize import replicas
from keras_batchsize import slicing
from keras_batchsize.records import Timing
from keras_batchsize.replica_graphs import ReplicaGraphs
from keras_batchsize.update_graphs import UpdateGraphs
from keras_batchsize.workers import Workers


def team_of(model, examples, kept=None, has_static_sizes=False):
    """Returns the `OneDevice` or the `Team` that trains a model.

    Args:
        model: A Keras model.
        examples: Function (superbatch, start, size) that returns a batch on
            one device.
        kept: The `KeptSteps` of earlier fits, or None.
        has_static_sizes: Whether graphs of Keras would know batch sizes.
    """
    strategy = replicas.strategy_of(model)
    if strategy is None:
        return OneDevice(examples, kept, has_static_sizes)
    return Team(strategy, examples)


class OneDevice:
    """A device that trains alone.

    Args:
        examples: Function (superbatch, start, size) that returns a batch.
        kept: The `KeptSteps` of earlier fits, or None.
        has_static_sizes: Whether graphs of Keras would know batch sizes, by
            which they weight the losses of single outputs then.
    """

    replicated = False
    is_alone = True

    def __init__(self, examples, kept=None, has_static_sizes=False):
        self._examples = examples
        self._kept = kept
        self._has_static_sizes = has_static_sizes

    def next_of(self, iterator):
        """Returns the next superbatch of an iterator."""
        return slicing.without_optionals(next(iterator))

    def make_graphs(self, model, base_batch_size, splits, size_varies=False):
        """Returns the `UpdateGraphs` of a model.

        Args:
            model: A compiled Keras model.
            base_batch_size: B₀, in which the schedule's clock counts.
            splits: Whether batches are cut, to accumulate or to measure.
            size_varies: Whether the batch size may change.
        """
        return UpdateGraphs(
            model,
            base_batch_size,
            splits,
            self._examples,
            self._kept,
            weighs_examples=size_varies or self._has_static_sizes,
        )

    def warn_of_unequal_shares(self, batch_size):
        """Warns of shares that differ in size: one device has no shares."""

    def extent(self, data):
        """Returns the examples of a superbatch, and where they end."""
        total = slicing.number_of_examples(data)
        return total, total

    def sample(self, data):
        """Returns a batch to build and try the model with."""
        total = slicing.number_of_examples(data)
        return self._examples(data, 0, min(total, exactness.TRIAL_EXAMPLES))

    def communication(self, model):
        """Returns the seconds that an all-reduce takes: there is none."""
        return 0.0

    def agreed(self, measurement):
        """Returns the `Measurement` that everybody decides on."""
        return measurement


class Team:
    """The replicas of a strategy.

    Args:
        strategy: A `tf.distribute.Strategy`.
        examples: Function (superbatch, start, size) that returns a batch.

    Attributes:
        is_alone: Whether there is no other worker.
    """

    replicated = True

    def __init__(self, strategy, examples):
        self._strategy = strategy
        self._examples = examples
        self._parts = replicas.Shares(strategy, examples)
        self._workers = Workers(strategy)
        self.is_alone = self._workers.number == 1

    def next_of(self, iterator):
        """Returns the next superbatch of an iterator.

        Args:
            iterator: Iterator over superbatches. The first one tells how
                replicas find their examples.
        """
        self._parts = replicas.parts_of(
            self._strategy, iterator, self._examples
        )
        return slicing.without_optionals(next(iterator))

    def make_graphs(self, model, base_batch_size, splits, size_varies=False):
        """Returns the `ReplicaGraphs` of a model.

        Replicas split every batch; where one device would not, they measure
        nothing.

        Args:
            model: A compiled Keras model.
            base_batch_size: B₀, in which the schedule's clock counts.
            splits: Whether one device would split batches.
            size_varies: Whether the batch size may change.
        """
        if model.jit_compile:
            warnings.warn(
                "`jit_compile` has no effect under a strategy: what replicas "
                "exchange is not compiled. Received: jit_compile=True under "
                f"{type(self._strategy).__name__}. Compile the model with "
                "jit_compile=False.",
                stacklevel=2,
            )
        return ReplicaGraphs(
            model,
            base_batch_size,
            splits,
            self._parts,
            weighs_examples=size_varies,
        )

    def warn_of_unequal_shares(self, batch_size):
        """Says what a base batch size costs that is not shared evenly.

        Args:
            batch_size: Examples per update, as the user stated it.
        """
        number = self._strategy.num_replicas_in_sync
        even = math.ceil(batch_size / number) * number
        if even == batch_size:
            return
        warnings.warn(
            "A batch size is best a multiple of the number of replicas: with "
            f"shares that differ, {1.0 - batch_size / even:.0%} of their time "
            "is spent waiting for the largest, and the next size that may be "
            f"used is {math.lcm(batch_size, number)}. Received: "
            f"batch_size={batch_size} with {number} replicas. It is kept as it "
            f"is; batch_size={even} would cost nothing.",
            stacklevel=2,
        )

    def extent(self, data):
        """Returns the examples of a superbatch, and where they end.

        Args:
            data: The superbatch, as the iterator returns it.

        Returns:
            Tuple of two integers, over all replicas.
        """
        return self._parts.extent(data, self._workers.gathered)

    def sample(self, data):
        """Returns a batch of one replica, to build and try the model with.

        It has as many examples on every worker: whether there are enough to
        try the loss must be the same everywhere, as workers wait for each
        other where the trial reads metrics.
        """
        sample = self._parts.sample(data, exactness.TRIAL_EXAMPLES)
        own = slicing.number_of_examples(sample)
        fewest = min(self._workers.gathered([own] * self._workers.replicas))
        return sample if fewest == own else self._parts.sample(data, fewest)

    def communication(self, model):
        """Returns the seconds that an all-reduce of all gradients takes."""
        size = sum(math.prod(one.shape) for one in model.trainable_weights)
        seconds = replicas.all_reduce_seconds(self._strategy, size)
        return self._workers.largest([seconds])[0]

    def agreed(self, measurement):
        """Returns the `Measurement` that all workers decide on.

        An update is over when the slowest has done its part. A clock that
        does not run forward tells nothing.

        Args:
            measurement: A `Measurement` with the times of this worker.

        Returns:
            The same on every worker.
        """
        timing = measurement.timing
        seconds, measuring, whole, *flags = self._workers.largest(
            (
                timing.seconds,
                measurement.measuring_seconds,
                measurement.seconds,
                # Bits: whether it was traced, whether it was not timed.
                measurement.traced + 2 * (not timing.updates),
            )
        )
        traced, untimed = int(flags[0]) % 2 == 1, flags[0] >= 2.0
        if untimed or seconds == 0.0:
            timing = Timing()
        else:
            timing = dataclasses.replace(timing, seconds=seconds)
        return dataclasses.replace(
            measurement,
            timing=timing,
            measuring_seconds=measuring,
            seconds=whole,
            traced=traced or measurement.traced,
        )
