"""The real training step, run at any batch size.

Not a copy of it: `update_graphs`, which training goes through, makes updates
and accumulates gradients; the model's own `test_step` validates.
"""

import itertools
import math
import time

import keras
import tensorflow as tf

from keras_batchsize import exactness
from keras_batchsize import learning_rate
from keras_batchsize import out_of_memory
from keras_batchsize import replicas
from keras_batchsize import slicing
from keras_batchsize._memory_building import build_layers
from keras_batchsize._memory_data import BATCHES_HELD
from keras_batchsize._memory_data import batches_at_once
from keras_batchsize._memory_forward import forward_of
from keras_batchsize._memory_forward import is_called_once
from keras_batchsize._memory_scale import lower_loss_scales
from keras_batchsize._memory_snapshot import Snapshot
from keras_batchsize._memory_validation import validation_step
from keras_batchsize._train_function_memory import changed_by_training
from keras_batchsize._train_function_memory import held_always
from keras_batchsize._train_function_timing import wait_for
from keras_batchsize.train_function import team_of

# `BATCHES_HELD` updates a call makes where both they and the batches are small:
# calling takes time of its own. Large ones come from a pipeline, as in `fit`.
_SHORT_SECONDS = 0.05
_SMALL_BYTES = 2**23
# Timed calls at one size, after the first; one where a call is long.
CALLS = 3
_LONG_SECONDS = 0.15
# Calls more at a size near the margin, as peaks of equal steps differ; where
# calls are short, up to so many in so many seconds.
_MORE, _MORE_SHORT, _MORE_SECONDS = 2, 15, 0.5


class Workload:
    """Runs the step of a model on repeated examples, and puts it back.

    Args:
        model: A compiled Keras model.
        examples: An `Examples`.
        meter: A `Meter`.
        accumulates: Whether training may sum the gradients of micro-batches.

    Attributes:
        forward: The `Forward` of the model; None if it runs eagerly, if a
            step may be more than a forward pass and the way back, or if the
            loss cannot be traced.
    """

    def __init__(self, model, examples, meter, accumulates):
        self.forward = None
        # Who accumulates guards training, too: `AdaptiveTrainer`.
        self._accumulates = self._is_guarded = accumulates
        self._replicated = False
        self._replicas = model.distribute_strategy.num_replicas_in_sync
        self._model = model
        self._examples = examples
        self._meter = meter
        self._at_once = lambda size: batches_at_once(
            model, examples, meter, accumulates, size
        )
        self._graphs = None
        self._snapshot = None
        self._validate = None

    def __enter__(self):
        build_layers(self._model, self._examples.one)
        self._snapshot = Snapshot(self._model)
        try:
            self._trace()
        except BaseException:
            self._snapshot.restore()
            raise
        return self

    def __exit__(self, *_):
        self._graphs = self._validate = None
        self._snapshot.restore()

    def _trace(self):
        model, team = self._model, team_of(self._model, slicing.examples)
        self._replicated = team.replicated
        self._is_guarded = self._is_guarded and team.is_alone
        if self._accumulates:
            self._accumulates = self._has_known_step()
        self._graphs = team.make_graphs(model, 1, self._accumulates)
        self._graphs.build(self._examples.one)
        if not model.run_eagerly and is_called_once(model):
            self.forward = forward_of(
                model, self._examples.one, training=not self._replicated
            )
        self._snapshot.add_variables()
        lower_loss_scales(model)
        if self._accumulates and not self._replicated:
            self._accumulates = self._can_be_split()
        self._validate = self._validation_step()

    def _has_known_step(self):
        try:
            exactness.check_step(self._model)
            exactness.normaliser(self._model)
        except ValueError:
            # Its gradients are never accumulated, then.
            return False
        return True

    def _can_be_split(self):
        try:
            exactness.check_loss(
                self._model, self._graphs.normaliser, self._examples.few(8)
            )
        except ValueError:
            return False
        return True

    def _validation_step(self):
        smallest = self._batch(self._replicas)
        step = validation_step(self._model, smallest, self.compiles)
        if self._model.run_eagerly:
            self.restore_values()  # It has been tried.
        return step

    @property
    def growth(self):
        """Bytes by which an example can raise the peak, a pair of them, ...

        All tensors of a forward pass and the loss together, with the largest
        twice more for the way back, and the batches that wait are more than
        that. Empty if not known.
        """
        if self.forward is None or not self.forward.totals:
            return ()
        waiting = (self._at_once(1) + 1) * self._examples.bytes_each
        first, *others = map(sum, zip(self.forward.totals, self.forward.back))
        return (first + waiting, *others)

    @property
    def degree(self):
        """Power of the size with which memory grows, as far as is known."""
        return 1 if self.forward is None else self.forward.degree

    @property
    def compiles(self):
        """Whether XLA compiles the step."""
        return self._graphs.compiles

    @property
    def resident_bytes(self):
        """Bytes of weights, slots and whatever else stays between steps."""
        return out_of_memory.bytes_of(self._snapshot.variables)

    def restore_values(self):
        """Puts the model's values back; the probe goes on."""
        self._snapshot.restore_values()
        lower_loss_scales(self._model)

    def train(self, size):
        """Makes updates at a size.

        Args:
            size: Integer, examples per update.

        Returns:
            Pair of the peaks of the calls in bytes, as a list, empty if they
            cannot be told, and the seconds of an update.

        Raises:
            Exception: Whatever the step raises, also out-of-memory errors.
        """
        meter, peaks, seconds = self._meter, [], []
        meter.reset(self.resident_bytes)
        data = self._waiting(size)
        first = self._timed(next(data), size, 1)
        if meter.counts_first_call:
            self._note_peak(peaks)
            if not meter.is_shared:
                # While algorithms are chosen, others are tried, too.
                peaks.clear()
        else:
            # What lies in memory already does not show in the rise.
            data = None
            meter.reset(self.resident_bytes)
            data = self._waiting(size)
        # Replicas wait for each other, and workers have clocks of their own:
        # all must make the same calls.
        long = first >= _LONG_SECONDS and not self._replicated
        for _ in range(1 if long else CALLS):
            shortest = min(seconds, default=first)
            updates = 1
            if shortest < _SHORT_SECONDS and not (
                self.compiles or self._replicated
            ):
                # With XLA, another number would be another graph.
                updates = self._updates_at_once(size)
            seconds.append(self._timed(next(data), size, updates) / updates)
            self._note_peak(peaks)
        return peaks, min(seconds)

    def _note_peak(self, peaks):
        """Adds the peak so far, and starts a new one where that is exact."""
        peak = self._meter.peak()
        if peak is not None:
            peaks.append(peak)
        if self._meter.counts_first_call:
            self._meter.reset(self.resident_bytes)

    def _updates_at_once(self, size):
        """How many updates a call makes of what `_waiting` returns."""
        together = self._at_once(size) * size * self._examples.bytes_each
        return BATCHES_HELD if together <= _SMALL_BYTES else 1

    def _waiting(self, size):
        """Returns an iterator of batches, which lie in memory as in `fit`."""
        held = self._at_once(size)
        if self._updates_at_once(size) > 1:
            return itertools.repeat(self._batch(held * size))
        dataset = self._examples.repeated(size).prefetch(held - 1)
        if self._replicated:
            dataset = replicas.dealt_out(
                dataset, self._model.distribute_strategy
            )
        return iter(dataset)

    def _timed(self, data, size, updates):
        started = time.perf_counter()
        self._plain(data, updates * size, size)
        return time.perf_counter() - started

    def _held(self, is_new=False):
        """Holds values that XLA would take apart, see `out_of_memory`.

        Also those that training holds. Anew for each call: what a call made
        has only one owner again.

        Args:
            is_new: Whether to hold what training holds while a size is new,
                too. Not where the time counts: nearly always it is not.
        """
        if not self.compiles and not self._is_guarded:
            return None
        variables = changed_by_training(self._model)
        holds = self.compiles or is_new or held_always(variables)
        return out_of_memory.HeldValues(variables) if holds else None

    def _rate(self):
        step = int(keras.ops.convert_to_numpy(self._model.optimizer.iterations))
        return learning_rate.rate_in_force(1.0, 1.0, step, 0)

    def _plain(self, data, stop, size):
        """Makes updates of `size` of the examples [0, stop), as `fit` does.

        Where XLA compiles, one that is not whole goes without it.
        """
        held = self._held()
        if self._replicated:
            size = min(size, stop)
            logs = self._summed(data, stop, size, size)
        else:
            logs, _ = self._graphs.plain(data, 0, stop, size, self._rate())
        wait_for(logs)
        del held

    def _summed(self, data, stop, size, micro):
        """Makes updates of `size` from parts of `micro`, over all replicas."""
        share = math.ceil(micro / self._replicas)
        logs, *_ = self._graphs.accumulate(
            self._graphs.zeros(), data, stop, (size, share), True, self._rate()
        )
        return logs

    @property
    def has_superbatches(self):
        """Whether a call of training may take more than one of `train`."""
        # XLA finds room for all results, so for copies, before it begins.
        return self._accumulates or (self._is_guarded and not self.compiles)

    def superbatch(self, size):
        """Makes two updates in one call, as training does on a superbatch.

        What is held costs nothing until it changes. From the second update on
        it is a copy, beside all that an update takes. Where gradients may be
        summed, so are those of two micro-batches for the first.

        Args:
            size: Integer, examples per micro-batch.

        Returns:
            The peak in bytes, or None.
        """
        self._meter.reset(self.resident_bytes)
        total = (3 if self._accumulates else 2) * size
        data = self._batch(total)
        held = self._held(is_new=True)
        if self._accumulates:
            wait_for(self._summed(data, total, 2 * size, size))
        else:
            self._plain(data, total, size)
        del held
        return self._meter.peak()

    def repeat(self, size):
        """Makes a few updates more.

        Args:
            size: Integer, examples per update.

        Returns:
            As `finish_epoch`, of which it does nothing else.
        """
        self._meter.reset(self.resident_bytes)
        peaks, seconds = self._repeat(size, self._waiting(size))
        return peaks, [], [], seconds

    def _repeat(self, size, data):
        """Makes single updates: returns their peaks, and the fewest seconds."""
        peaks, seconds = [], []
        most = _MORE if self._replicated else _MORE_SHORT
        while len(seconds) < _MORE or (
            len(seconds) < most and sum(seconds) < _MORE_SECONDS
        ):
            seconds.append(self._timed(next(data), size, 1))
            self._note_peak(peaks)
        return peaks, min(seconds)

    def finish_epoch(self, size, tail):
        """Trains on the ragged last batch, validates, and trains some more.

        Args:
            size: Integer, examples per update.
            tail: Integer, examples in the last batch of an epoch, or 0.

        Returns:
            Tuple of the peaks of the calls in bytes, as a list, that of the
            ragged batch and that of validation, each as a list of one or
            none, and the seconds of a call.
        """
        self._meter.reset(self.resident_bytes)
        data, of_tail, of_validation = self._waiting(size), [], []
        if tail:
            # Training cuts it; plain `fit` compiles it as a batch of its own.
            self._plain(next(data), tail, size if self._is_guarded else tail)
            self._note_peak(of_tail)
        held = self._held()
        wait_for(self._validate(self._batch(size)))
        del held
        self._note_peak(of_validation)
        # What ran in between leaves memory in other pieces, as it does in an
        # epoch after the first.
        peaks, seconds = self._repeat(size, data)
        return peaks, of_tail, of_validation, seconds

    def _batch(self, examples):
        """Returns a batch, dealt out to the replicas if there are several."""
        batch = self._examples.batch(examples)
        if not self._replicated:
            return batch
        dataset = tf.data.Dataset.from_tensors(batch)
        return next(
            iter(replicas.dealt_out(dataset, self._model.distribute_strategy))
        )
