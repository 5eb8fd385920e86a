"""The graphs of `update_graphs`, for the replicas of a strategy.

The loops run outside of the replicas and send each micro-batch and each update
to all of them: what Keras optimizers need, `merge_call`, may not stand inside a
loop of a replica. Gradients of micro-batches stay where they were computed
until the update, which takes one all-reduce.
"""

import contextlib
from typing import Any
from typing import NamedTuple

import tensorflow as tf

from keras_batchsize import keras_private
from keras_batchsize import learning_rate
from keras_batchsize import replicas
from keras_batchsize._gradients_replicated import ReplicatedGradients
from keras_batchsize.measuring import PARTS


class Unfinished(NamedTuple):
    """An update that is being made, over several superbatches.

    Attributes:
        sums: `Accumulated` on each replica; None if nothing was summed yet.
        examples: Examples in it, over all replicas.
        count: Rounds of micro-batches in it.
    """

    sums: Any
    examples: int
    count: int


class ReplicaGraphs:
    """Holds the graphs of a model made under a strategy.

    Args:
        model: A compiled Keras model.
        base_batch_size: B₀, in which the schedule's clock counts.
        measures: Whether norms of gradients are wanted.
        parts: `Shares` or `Whole`: how replicas find their examples.
        weighs_examples: Whether the losses of single outputs weigh updates by
            their examples.
    """

    splits = True
    compiles = False

    def __init__(
        self, model, base_batch_size, measures, parts, weighs_examples=False
    ):
        # Whether shares differ by more than an example, as only a dataset
        # that a user distributes can make them.
        self.uneven = False
        self._parts = parts
        self._traced = set()
        self._model = model
        self._base = base_batch_size
        self._strategy = model.distribute_strategy
        self._replicas = self._strategy.num_replicas_in_sync
        self._gradients = ReplicatedGradients(model, measures, weighs_examples)
        self._eager = model.run_eagerly
        self._add = self._function(self._add_everywhere)
        self._apply = self._function(self._apply_everywhere)
        self._update = self._function(self._update_everywhere)
        self._whole_loop = self._function(self._loop_over_updates)
        self._sum = self._function(self._loop_over_micro_batches)
        self._zeros = self._function(self._zeros_everywhere)
        self._state_now = self._function(self._state)
        self._pending_now = self._function(self._state_with_pending)
        self._measure = self._function(self._measure_everywhere)

    def _function(self, function):
        if self._eager:
            return function
        return tf.function(function, reduce_retracing=True, autograph=False)

    @property
    def normaliser(self):
        """What losses are divided by, see `exactness`."""
        return self._gradients.normaliser

    @property
    def traces(self):
        """How many graphs have been traced so far."""
        if self._eager:
            return 0
        # All that is called from Python, but for what a first sum needs, too.
        functions = self._whole_loop, self._sum, self._apply, self._measure
        return sum(
            function.experimental_get_tracing_count()
            for function in (*functions, self._pending_now)
        )

    def zeros(self):
        """Returns the `Unfinished` of an update that has not begun."""
        return Unfinished(None, 0, 0)

    def build(self, data):
        """Creates all variables, which cannot be made inside the loops.

        Args:
            data: A batch as `train_step` receives it.
        """
        keras_private.build_symbolically(self._model, data)

    def accumulate(self, total, data, stop, sizes, finish, rate):
        """Makes the updates of a superbatch.

        Args:
            total: What an earlier call left `Unfinished`, or `zeros()`.
            data: The superbatch, as the iterator returns it.
            stop: Integer, position behind its last example.
            sizes: Pair of integers (examples per update, examples per
                micro-batch of a replica).
            finish: Bool, whether to make an update of what is left at `stop`.
            rate: A `RateInForce`.

        Returns:
            Tuple of the logs, the learning rate of the last update, finished
            or not, the `Unfinished` update and a float64 tensor of shape
            (updates, fields of `MicroBatchNorms`).
        """
        batch_size, micro = sizes[0], sizes[1] * self._replicas
        is_begun = total.sums is not None
        ends = finish or stop % batch_size == 0
        if ends and micro >= batch_size and not is_begun:
            logs, used, rows = self._general(
                self._whole_loop,
                self._guards(stop, batch_size),
                data,
                *map(self._size, (stop, batch_size)),
                rate,
            )
            return logs, used, total, rows
        return self._micro_batches(
            total, data, stop, (batch_size, micro), finish, rate
        )

    def _guards(self, examples, piece):
        return self.uneven or replicas.leaves_one_out(
            examples, piece, self._replicas
        )

    def _size(self, size):
        return size if self._eager else tf.constant(size)

    def _general(self, loop, guarded, data, *arguments):
        """Calls a loop, traced for superbatches of any number of examples.

        Traced for the first one's number, it would be traced again for the
        last one of an epoch.
        """
        if not self._eager and (loop, guarded) not in self._traced:
            specs = self._parts.specs(data)
            loop.get_concrete_function(guarded, specs, *arguments)
            self._traced.add((loop, guarded))
        return loop(guarded, data, *arguments)

    # Updates of one micro-batch.

    def _loop_over_updates(self, guarded, data, stop, batch_size, rate):
        updates = (stop + batch_size - 1) // batch_size
        rows = self._rows(updates)

        def body(index, rows):
            start = index * batch_size
            end = tf.minimum(start + batch_size, stop)
            row = self._update(
                data, start, end, rate.at(start, self._base), guarded
            )
            return index + 1, rows.write(index, row)

        _, rows = self._while(
            lambda index, _: index < updates, body, (tf.constant(0), rows)
        )
        last = (updates - 1) * batch_size
        return *self._state(rate, last), rows.stack()

    def _update_everywhere(self, data, start, end, rate, guarded):
        """Makes an update of the examples [start, end)."""

        def on_replica(share):
            sums = self._with_part(
                self._gradients.zeros,
                self._gradients.add_sums,
                share,
                (start, end),
                guarded,
            )
            return self._gradients.apply(sums)

        with self._rate_applied(rate):
            return self._first(self._strategy.run(on_replica, (data,)))

    # Updates of several micro-batches.

    def _micro_batches(
        self, total, data, stop, sizes, finish, rate
    ):
        """Goes from update to update outside of the graph.

        Updates of many micro-batches are few, and TensorFlow cannot have them
        inside of a condition: it loses what replicas hold.
        """
        position, rows, (batch_size, micro) = 0, [], sizes
        while position < stop:
            end = min(position + batch_size - total.examples, stop)
            sums = self._zeros() if total.sums is None else total.sums
            sums, rounds = self._general(
                self._sum,
                self._guards(end - position, micro),
                data,
                *map(self._size, (position, end, micro)),
                sums,
            )
            total = Unfinished(
                sums,
                total.examples + end - position,
                total.count + int(rounds),
            )
            position, began = end, end - total.examples
            if total.examples >= batch_size or (finish and end >= stop):
                rate_now = rate.at(began, self._base)
                rows.append(self._apply(total.sums, rate_now))
                total = self.zeros()
        where = rate, self._size(began)
        if total.sums is None:
            logs, used = self._state_now(*where)
        else:
            logs, used = self._pending_now(*where, total.sums)
        return logs, used, total, tf.stack(rows) if rows else ()

    def _loop_over_micro_batches(
        self, guarded, data, position, stop, micro, sums
    ):
        def body(position, rounds, sums):
            end = tf.minimum(position + micro, stop)
            sums = self._add(sums, data, position, end, guarded)
            return end, rounds + 1, sums

        _, rounds, sums = self._while(
            lambda position, *_: position < stop,
            body,
            (position, tf.constant(0), sums),
        )
        return sums, rounds

    def _zeros_everywhere(self):
        return self._strategy.run(self._gradients.zeros)

    def _add_everywhere(self, sums, data, start, end, guarded):
        def on_replica(sums, share):
            return self._with_part(
                lambda: sums,
                self._gradients.add,
                share,
                (start, end),
                guarded,
            )

        return self._strategy.run(on_replica, (sums, data))

    def _apply_everywhere(self, sums, rate):
        with self._rate_applied(rate):
            rows = self._strategy.run(self._gradients.apply, (sums,))
        return self._first(rows)

    def finish(self, total, rate):
        """Makes the update of what `accumulate` left unfinished.

        Args:
            total: An `Unfinished` of at least one micro-batch.
            rate: The `RateInForce` at its end.

        Returns:
            float64 tensor, a row of `MicroBatchNorms`.
        """
        began = rate.at(-total.examples, self._base)
        return self._apply(total.sums, began)

    def measure(self, data, examples):
        """Measures gradient norms of the parts of a superbatch.

        Args:
            data: The superbatch.
            examples: Integer, how many of its examples to use.

        Returns:
            float64 tensor, a row of `MicroBatchNorms`.
        """
        part = max(examples // (PARTS * self._replicas), 1) * self._replicas
        sizes = part, max(examples // part, 1)
        sizes = map(self._size, sizes)
        return self._general(self._measure, False, data, *sizes)

    def _measure_everywhere(self, guarded, data, part, parts):
        def add(sums, share, start):
            bounds = start, start + part
            return self._with_part(lambda: sums, self._gradients.add, share,
                                   bounds, guarded)

        def body(index, sums):
            return index + 1, self._strategy.run(
                add, (sums, data, index * part)
            )

        held = self._strategy.run(self._gradients.held)
        _, sums = self._while(
            lambda index, _: index < parts,
            body,
            (tf.constant(0), self._zeros_everywhere()),
        )
        self._strategy.run(self._gradients.put_back, (held,))
        return self._first(self._strategy.run(self._gradients.norms, (sums,)))

    # What all of them need.

    def _with_part(self, otherwise, function, share, bounds, guarded):
        """Gives a function the part of a share that lies within bounds.

        A share without examples has no mean loss: where there may be one, the
        replica sits the micro-batch out.
        """
        batch, number = self._parts.of_replica(share, *bounds)

        def with_examples():
            return function(otherwise(), batch())

        if not guarded:
            return with_examples()
        return tf.cond(number > 0, with_examples, otherwise)

    @contextlib.contextmanager
    def _rate_applied(self, rate):
        optimizer = self._model.optimizer
        inside = learning_rate.optimizers_inside(optimizer)
        with learning_rate.applied(optimizer, rate):
            with keras_private.gradients_are_sums(inside):
                yield

    def _rows(self, number):
        return tf.TensorArray(
            tf.float64,
            size=number,
            dynamic_size=True,
            element_shape=(self._gradients.columns,),
        )

    def _while(self, condition, body, start):
        return tf.while_loop(condition, body, start, parallel_iterations=1)

    def _state(self, rate, position):
        """Returns the logs and the learning rate at a position."""
        used = learning_rate.effective_rate(
            self._model.optimizer, rate.at(position, self._base)
        )
        return self._model.get_metrics_result(), used

    def _state_with_pending(self, rate, position, sums):
        """Returns the same, an update in progress included in losses.

        See `GradientAccumulator.results`.
        """
        held = self._strategy.run(self._gradients.track_pending, (sums,))
        state = self._state(rate, position)
        self._strategy.run(self._gradients.untrack, (held,))
        return state

    def _first(self, value):
        return replicas.local_values(self._strategy, value)[0]
