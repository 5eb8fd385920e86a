"""The graphs that turn a superbatch into updates and measurements.

Three loops, each inside one `tf.function` call per superbatch:

- `plain`: cuts batches and calls the model's own `train_step` on each. With
  the batch size held fixed this is plain `fit`, bit for bit, only without the
  way through Python between updates.
- `accumulate`: cuts micro-batches, sums their gradients and applies them. It
  takes what an earlier superbatch left unfinished and returns what it leaves,
  so that a batch may be larger than a superbatch. It measures for free.
- `measure`: takes the gradients of the parts of a superbatch at the same
  weights and puts everything back that this changed, except what it learned.

Without XLA one trace serves all sizes. XLA needs static shapes: there, sizes
are Python integers, and each has a graph of its own.
"""

import functools

import keras
import tensorflow as tf

from keras_batchsize import learning_rate
from keras_batchsize import requirements
from keras_batchsize import slicing
from keras_batchsize._update_graphs_steps import KeptSteps
from keras_batchsize._update_graphs_steps import has_own_logs
from keras_batchsize.learning_rate import RateInForce
from keras_batchsize.measuring import PARTS


class UpdateGraphs:
    """Holds the graphs of one model.

    Args:
        model: A compiled Keras model.
        base_batch_size: B₀, in which the schedule's clock counts.
        splits: Whether batches are cut, to accumulate or to measure.
        examples: Function (superbatch, start, size) that returns a batch as
            `train_step` receives it.
        kept: The `KeptSteps` of earlier fits, or None.
        weighs_examples: Whether the losses of single outputs weigh updates by
            their examples.

    Attributes:
        splits: Whether batches are cut.
    """

    def __init__(
        self,
        model,
        base_batch_size,
        splits,
        examples=slicing.examples,
        kept=None,
        weighs_examples=False,
    ):
        self._model = model
        self._base = base_batch_size
        self._examples = examples
        self.splits = splits
        self._outputs = None
        self._has_own_logs = has_own_logs(model)
        self._eager = model.run_eagerly
        self._steps = (kept or KeptSteps()).of(model, splits, weighs_examples)
        self._accumulator = self._steps.accumulator
        self._plain = self._function(self._plain_loop)
        self._accumulate = self._function(self._accumulate_loop)
        self._measure = self._function(self._measure_loop)
        self._plain_xla = self._compiled(self._plain_loop)
        self._accumulate_xla = self._compiled(self._accumulate_loop)
        self._measure_xla = self._compiled(self._measure_loop)

    def _function(self, function):
        if self._eager:
            return function
        return tf.function(function, reduce_retracing=True, autograph=False)

    def _compiled(self, function):
        if self._eager or not self._model.jit_compile:
            return None
        return tf.function(function, jit_compile=True, autograph=False)

    @property
    def normaliser(self):
        """What losses are divided by, see `exactness`; None if never split."""
        return self._accumulator and self._accumulator.normaliser

    @property
    def compiles(self):
        """Whether XLA compiles the loops."""
        return self._plain_xla is not None

    @property
    def traces(self):
        """How many graphs have been traced so far."""
        functions = [self._plain, self._accumulate, self._measure]
        if self.compiles:
            functions += [
                self._plain_xla,
                self._accumulate_xla,
                self._measure_xla,
            ]
        if self._eager:
            # Nothing is; but a first step builds the optimizer.
            return int(self._model.optimizer.built)
        return sum(
            function.experimental_get_tracing_count() for function in functions
        )

    def zeros(self):
        """Returns sums of no micro-batch, to start `accumulate` with."""
        return self._accumulator.zeros()

    def build(self, data):
        """Creates all variables, by tracing a step without running it.

        Variables cannot be made inside the loops. Keras makes them, too, when
        it traces its first step, in the same order.

        Args:
            data: A batch as `train_step` receives it.
        """
        if self._outputs is not None:
            return
        rate = RateInForce(
            tf.constant(1.0),
            tf.constant(1.0),
            tf.constant(0, tf.int64),
            tf.constant(0, tf.int64),
        )
        if self._eager:
            self._outputs = ()
            return
        specs = keras.tree.map_structure(slicing.batch_spec, data)
        self._outputs = keras.tree.map_structure(
            lambda spec: tf.zeros(spec.shape, spec.dtype),
            self._steps.build(specs, rate),
        )
        if self._accumulator is not None:
            self._accumulator.own_logs = self._own_logs()

    def _own_logs(self):
        """Returns zeros for the logs that are no results of metrics."""
        if not self._has_own_logs:
            return {}
        results = self._model.get_metrics_result()
        return {
            name: tf.zeros(value.shape, tf.float32)
            for name, value in self._outputs.items()
            if name not in results and isinstance(value, tf.Tensor)
        }

    def plain(self, data, start, stop, batch_size, rate):
        """Makes unmeasured updates of examples [start, stop).

        Args:
            data: The superbatch.
            start: Integer, first example.
            stop: Integer, end of the range.
            batch_size: Integer, examples per update; the last may be smaller.
            rate: A `RateInForce`.

        Returns:
            Tuple of logs as `train_step` returns them, and the learning rate
            of the last update.
        """
        begin, end = _constant(start), _constant(stop)
        if rest := (stop - start) % batch_size:
            requirements.check_short(
                self._model, lambda: self._examples(data, stop - rest, rest)
            )
        if self.compiles and (stop - start) % batch_size == 0:
            return self._plain_xla(data, begin, end, batch_size, rate)
        size = self._size(batch_size)
        return self._general(self._plain, data, begin, end, size, rate)

    def _general(self, loop, data, *arguments):
        """Calls a loop, traced for superbatches of any number of examples.

        Traced for the first one's number, it would be traced again for the
        last one of an epoch.
        """
        if not self._eager and not loop.experimental_get_tracing_count():
            specs = keras.tree.map_structure(slicing.batch_spec, data)
            loop.get_concrete_function(specs, *arguments)
        return loop(data, *arguments)

    def _size(self, size):
        return size if self._eager else _constant(size)

    def _plain_loop(self, data, start, stop, batch_size, rate):
        static = isinstance(batch_size, int) and not self._eager
        data = slicing.where_used(data)

        def body(position, _):
            take = batch_size
            if not static:
                take = tf.minimum(batch_size, stop - position)
            batch = self._examples(data, position, take)
            outputs = self._steps.whole(batch, rate.at(position, self._base))
            return position + take, outputs if self._has_own_logs else ()

        if self._eager:
            position = start
            while position < stop:
                position, outputs = body(position, None)
        else:
            _, outputs = tf.while_loop(
                lambda position, _: position < stop,
                body,
                (start, self._outputs if self._has_own_logs else ()),
                parallel_iterations=1,
            )
        if not self._has_own_logs:
            # Read once, not after every update.
            outputs = self._model.get_metrics_result()
        last = stop - 1 - (stop - 1 - start) % batch_size
        return outputs, self._final_rate(rate, last)

    def _final_rate(self, rate, position):
        return learning_rate.effective_rate(
            self._model.optimizer, rate.at(position, self._base)
        )

    def accumulate(self, total, data, stop, sizes, finish, rate):
        """Makes updates that are summed up from micro-batches.

        Args:
            total: What an earlier call left unfinished, or `zeros()`.
            data: The superbatch.
            stop: Integer, examples of it to use.
            sizes: Pair of integers (examples per update, examples per
                micro-batch).
            finish: Bool, whether to make an update of what is left at `stop`.
            rate: A `RateInForce`.

        Returns:
            Tuple of the logs, the learning rate of the last update, finished
            or not, the unfinished `Accumulated`, and a float64 tensor of shape
            (updates, 5) with a row of `MicroBatchNorms` per update.
        """
        end, last = _constant(stop), tf.constant(finish)
        batch_size, micro = sizes
        if self.compiles and stop % micro == 0 and batch_size % micro == 0:
            # One more row than the superbatch has batches: the first may
            # finish what an earlier superbatch began.
            rows = slicing.number_of_examples(data) // batch_size + 2
            logs, used, total, (norms, count) = self._accumulate_xla(
                data, total, end, sizes, last, rate, rows
            )
            return logs, used, total, norms[:count]
        sizes = self._size(batch_size), self._size(micro)
        return self._general(
            self._accumulate, data, total, end, sizes, last, rate, None
        )

    def _accumulate_loop(self, data, total, stop, sizes, finish, rate, rows):
        batch_size, micro = sizes
        data = slicing.where_used(data)
        norms = _array_of_norms(rows)

        def body(position, row, _, total, norms, logs):
            take = micro
            if rows is None:
                missing = batch_size - total.examples
                take = tf.minimum(micro, tf.minimum(missing, stop - position))
            batch = self._examples(data, position, take)
            total = self._steps.part(total, batch)
            logs = self._accumulator.logs(total)
            end = position + take
            full = tf.logical_or(
                total.examples >= batch_size,
                tf.logical_and(finish, end >= stop),
            )
            # An update's rate is that of its first example, which an earlier
            # superbatch may have held.
            began = end - total.examples
            total, norms = tf.cond(
                full,
                lambda: self._apply(total, norms, row, rate, began),
                lambda: (total, norms),
            )
            return end, row + tf.cast(full, tf.int32), began, total, norms, logs

        _, count, began, total, norms, logs = tf.while_loop(
            lambda position, *_: position < stop,
            body,
            (*[tf.constant(0)] * 3, total, norms, total.logs),
            parallel_iterations=1,
        )
        return (
            {**self._accumulator.results(total), **logs},
            self._final_rate(rate, began),
            total,
            norms.stack()[:count] if rows is None else (norms.stack(), count),
        )

    def _apply(self, total, norms, row, rate, began):
        norms = norms.write(row, self._update(total, rate, began))
        return self._accumulator.zeros(), norms

    def _update(self, total, rate, began):
        """Makes an update, at the rate of its first example."""
        optimizer, rate = self._model.optimizer, rate.at(began, self._base)
        with learning_rate.applied(optimizer, rate):
            return self._accumulator.apply(total)

    def finish(self, total, rate):
        """Makes the update of what `accumulate` left unfinished.

        Args:
            total: An `Accumulated` of at least one micro-batch.
            rate: The `RateInForce` at its end.

        Returns:
            float64 tensor of shape (5,), a row of `MicroBatchNorms`.
        """
        return self._update(total, rate, -total.examples)

    def measure(self, data, examples):
        """Measures gradient norms of the parts of a superbatch.

        Args:
            data: The superbatch.
            examples: Integer, how many of its examples to use, at least two.

        Returns:
            float64 tensor of shape (5,), a row of `MicroBatchNorms`.
        """
        part = max(examples // PARTS, 1)
        parts = examples // part
        if self.compiles:
            return self._measure_xla(data, part, parts)
        part, parts = self._size(part), self._size(parts)
        return self._general(self._measure, data, part, parts)

    def _measure_loop(self, data, part, parts):
        data = slicing.where_used(data)

        def body(index, total):
            batch = self._examples(data, index * part, part)
            return index + 1, self._steps.part(total, batch)

        with self._accumulator.leaving_no_trace():
            _, total = tf.while_loop(
                lambda index, _: index < parts,
                body,
                (tf.constant(0), self._accumulator.zeros()),
                parallel_iterations=1,
            )
            return self._accumulator.norms(total)


@functools.lru_cache(maxsize=256)
def _constant(value):
    """Makes the same few integers into tensors only once."""
    return tf.constant(value)


def _array_of_norms(rows):
    """Makes an array of so many rows of norms; of any number, if None."""
    return tf.TensorArray(
        tf.float64,
        size=rows or 0,
        dynamic_size=rows is None,
        element_shape=(5,),
    )
