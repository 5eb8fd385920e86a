"""The function that takes the place of `model.train_function`.

Keras's `fit` calls it once per step with its iterator. It takes one
superbatch, has it cut into updates by `update_graphs`, and tells the
controller what was measured. The graph sums, the host decides.
"""

import functools
import math
import time

import numpy as np
import tensorflow as tf

from keras_batchsize import learning_rate
from keras_batchsize import scaling
from keras_batchsize import slicing
from keras_batchsize._train_function_checks import checked_graphs
from keras_batchsize._train_function_memory import MemoryGuard
from keras_batchsize._train_function_memory import VariablesFreed
from keras_batchsize._train_function_memory import halved
from keras_batchsize._train_function_place import Place
from keras_batchsize._train_function_steps import EpochSteps
from keras_batchsize._train_function_tally import Tally
from keras_batchsize._train_function_tally import change_of
from keras_batchsize._train_function_tally import row_of
from keras_batchsize._train_function_team import team_of
from keras_batchsize._train_function_timing import Stopwatch
from keras_batchsize._train_function_timing import awaited_loss
from keras_batchsize._train_function_timing import losses_of
from keras_batchsize._train_function_timing import number
from keras_batchsize._train_function_warning import warn_of_loss
from keras_batchsize.learning_rate import rate_in_force
from keras_batchsize.measuring import PARTS
from keras_batchsize.noise import MicroBatchNorms
from keras_batchsize.records import Listeners
from keras_batchsize.superbatches import ITERATORS


class AdaptiveTrainFunction:
    """Trains on one superbatch per call.

    Args:
        model: The compiled Keras model whose `train_function` it becomes.
        controller_for: Function from the number of examples in the first
            superbatch to the `Controller` that decides.
        steps: Keras steps per epoch, or None if not known.
        epochs: Number of epochs planned.
        examples: Function (superbatch, start, size) that returns a batch as
            `train_step` receives it.
        kept: The `KeptSteps` of earlier fits, or None.
        has_static_sizes: Whether graphs of plain `fit` would know batch sizes.

    Attributes:
        controller: The `Controller`; None before the first superbatch.
        warmup_epochs: Length of the learning-rate warm-up, in epochs.
        corrects_momentum: Whether momentum is rescaled with the factor.
        factor: The learning-rate factor in force, warm-up included.
        rule: The learning-rate rule.
        reference_batch_size: B₀ where it is not the base batch size, or None.
        on_superbatch: `Listeners` called with the `Row` of each superbatch.
        on_decision: `Listeners` called with each `Change` of the size.
        on_first_superbatch: Function called with it and the controller.
        on_epoch_end: Function called with the epoch and its logs, once or
            more often, when the epoch has ended.
        tally: The `Tally` of this `fit`.
        identity: Name of the training, kept when it is resumed, or None.
        backup_dir: Folder that backups go to, None if not known.
        steps: The `EpochSteps`.
    """

    def __init__(
        self,
        model,
        controller_for,
        steps=None,
        epochs=1,
        examples=slicing.examples,
        kept=None,
        has_static_sizes=False,
    ):
        self.controller = None
        self.warmup_epochs = 0
        self.corrects_momentum = True
        self.on_superbatch = Listeners()
        self.on_decision = Listeners()
        self.on_first_superbatch = lambda data, controller: None
        self.on_epoch_end = lambda epoch, logs: None
        self.steps = EpochSteps(steps)
        self._epochs = epochs
        self.tally = Tally()
        self.identity = self.backup_dir = self.reference_batch_size = None
        self.epoch = self.epoch_examples = 0
        self.epoch_seconds, self.factor = 0.0, 1.0
        self.rule = scaling.none
        self._model = model
        self._controller_for = controller_for
        self._place = Place(model)
        self._team = team_of(model, examples, kept, has_static_sizes)
        self._guard = MemoryGuard(model, self._team.is_alone)
        self._in_one_pass = self._pending = self._state = self._graphs = None
        self._has_warned = self._measures = False

    def install(self):
        """Becomes the model's train function, also in place of another."""
        if isinstance(self._model.train_function, AdaptiveTrainFunction):
            self._model.train_function.uninstall()
        self._place.take(self)

    def uninstall(self):
        """Gives the model its own train function and momentum back."""
        self._place.give_back(self)
        self.restore_momentum()

    def restore_momentum(self):
        """Gives the momentum back until the next update: others may save."""
        self._set_factor(1.0)

    @property
    def is_current(self):
        """Whether the `fit` it was installed for is the latest one."""
        return self._place.is_current

    def start_epoch(self, epoch):
        """Starts counting the steps of an epoch.

        Args:
            epoch: Zero-based integer.
        """
        self._place.start_epoch()
        self.epoch = epoch
        self.epoch_examples, self.epoch_seconds = 0, 0.0
        self.steps.done = 0
        if self.controller is not None:
            self.controller.start_epoch(epoch)

    def __call__(self, iterator):
        """Trains on the next superbatch.

        Args:
            iterator: Iterator over superbatches.

        Returns:
            Dict of logs, as a Keras train function returns them.
        """
        if not isinstance(iterator, ITERATORS):
            return self._place.replaced(iterator)  # From `train_on_batch`.
        if not self.is_current:
            return self._left_over(iterator)
        try:
            return self._next_steps(iterator)
        except (StopIteration, tf.errors.OutOfRangeError):
            raise
        except BaseException as error:
            # `fit` calls no callback when it fails: this is the only place
            # from which the model can be put in order.
            self.corrects_momentum &= not isinstance(error, VariablesFreed)
            self.uninstall()
            raise

    def _left_over(self, iterator):
        """Serves a later `fit` that this function was not installed for.

        An exception in another callback ends `fit` without a call to
        `on_train_end`; then this function still sits in the model.
        """
        self.uninstall()
        self._model.make_train_function()
        return self._model.train_function(iterator)

    def _next_steps(self, iterator):
        logs, steps = None, self.steps
        end = steps.end_of_call(self._model.steps_per_execution)
        while steps.done < end:
            started = time.perf_counter()
            try:
                data = self._team.next_of(iterator)
            except (StopIteration, tf.errors.OutOfRangeError):
                self.finish_pending()
                if logs is None:
                    raise
                break
            logs = self._train_on(data, time.perf_counter() - started)
            steps.done += 1
        return logs

    def _train_on(self, data, waited):
        total, stop = self._team.extent(data)
        self._prepare(data, total)
        self._graphs.uneven = total != stop
        self._decide()
        logs, measurement = self._guard.run(
            lambda: self._attempt(data, total, stop, waited),
            self._decide_on_measuring(total),
            functools.partial(self._halve, data, total, self.factor),
            self.backup_dir,
        )
        self._report(self._team.agreed(measurement))
        return logs

    def _decide_on_measuring(self, total):
        """Returns what says how much memory a superbatch needs, or its tail."""
        ahead, plan = self._examples_ahead(total), self.controller.plan
        self._measures = self.controller.wants_measurement(total, ahead)
        return plan, self._measures, total % plan.micro_batch_size > 0

    def _halve(self, data, total, factor):
        """Halves what is in memory at a time, at the factor put back."""
        self.factor, controller = factor, self.controller
        half = halved(self._in_one_pass, controller.batch_size)
        controller.limit_micro_batch_size(half)
        if not self._graphs.splits:
            self._graphs = checked_graphs(
                self._team, self._model, controller, data, cuts=True
            )
        return self._decide_on_measuring(total)

    def _attempt(self, data, total, stop, waited):
        """Returns logs and `Measurement`; changes nothing that stays."""
        watch = Stopwatch(self._graphs)
        norms = self._measure(data)
        watch.mark()
        logs, used, free_norms, updates = self._update(data, stop)
        loss = awaited_loss(logs)
        watch.mark()
        return logs, watch.measurement(
            total,
            self.controller.batch_size,
            waited,
            measured=bool(norms),
            updates=updates,
            norms=(*norms, *free_norms),
            loss=loss,
            learning_rate=float(used),
            factor=self.factor,
        )

    def _prepare(self, data, total):
        """Builds the graphs at the first superbatch and checks the loss."""
        if self._graphs is not None:
            return
        self._start_controller(total)
        self.on_first_superbatch(self._team.sample(data), self.controller)
        self._graphs = checked_graphs(
            self._team, self._model, self.controller, data
        )

    def _start_controller(self, total):
        controller = self._controller_for(total)
        controller.rule = self.rule
        controller.epoch = self.epoch
        if self.reference_batch_size is not None:
            controller.clock.batch_size = self.reference_batch_size
        if self.rule not in scaling.NEED_NO_NOISE:
            controller.measure_for_rule()
        self.tally.begin(controller, self.epoch)
        if self._state is not None:
            controller.set_state(self._state["controller"])
            self.tally.set_state(self._state)
            self.factor = self._state["factor"]
            controller.epoch = self.epoch
        elif controller.examples == 0 and controller.clock.steps == 0:
            # After an earlier `fit` a schedule goes on, it does not restart.
            controller.clock.steps = number(self._model.optimizer.iterations)
        controller.clock.start_epoch()
        self.controller = controller

    def get_state(self):
        """Returns everything a resumed training needs, as plain JSON types."""
        return {
            "controller": self.controller.get_state(),
            "factor": self.factor,
            "identity": self.identity,
            **self.tally.get_state(),
        }

    def set_state(self, state):
        """Takes over what `get_state` returned, at the next superbatch.

        Args:
            state: Dict of plain JSON types.
        """
        self._state = state
        self.identity = state["identity"]

    def _decide(self):
        """Lets the controller change the size, but not within an update."""
        decision = None if self._pending else self.controller.decide()
        if decision is not None:
            self.on_decision(change_of(self, decision))

    def _next_factor(self):
        """Returns the learning-rate factor of the next update."""
        factor = self.controller.learning_rate_factor
        if not self.warmup_epochs:
            return factor
        warmup = self.warmup_epochs * self._examples_per_epoch()
        progress = min(self.controller.examples / warmup, 1.0)
        return scaling.warmed_up(factor, progress)

    def _rate(self, factor):
        """Returns the `RateInForce` of the next update with a factor."""
        controller, clock = self.controller, self.controller.clock
        ratio = controller.batch_size / clock.batch_size
        if controller.rule is scaling.none:
            ratio = factor
        return rate_in_force(factor, ratio, clock.steps, clock.examples)

    def next_learning_rate(self):
        """Returns the effective rate of the next update, as a float."""
        rate = self._rate(self._next_factor())
        return float(learning_rate.effective_rate(self._model.optimizer, rate))

    def _set_factor(self, factor):
        """Puts a factor in force, also in the momentum."""
        ratio = factor / self.factor
        if ratio != 1.0 and self.corrects_momentum:
            learning_rate.correct_momentum(self._model.optimizer, ratio)
        self.factor = factor

    def _measure(self, data):
        """Measures gradient noise on the superbatch, if it is time to."""
        if not self._measures:
            return ()
        examples = self.controller.examples_to_measure
        self._in_one_pass = max(examples // PARTS, 1)
        row = self._graphs.measure(data, examples)
        return (MicroBatchNorms(*np.asarray(row).tolist()),)

    def _examples_ahead(self, total):
        """Examples whose measuring budget may be spent in advance."""
        if self.steps.number is None:
            return 0
        epoch = self._examples_per_epoch()
        left = (self._epochs - self.epoch) * epoch - self.epoch_examples
        return max(min(epoch, left), total)

    def _examples_per_epoch(self):
        clock, size = self.controller.clock, self.controller.superbatch_size
        return clock.length_of_epoch(self.steps.number, size)

    def _update(self, data, total):
        """Trains on the superbatch.

        Returns:
            Tuple of logs, the rate of the last update, a list of the
            `MicroBatchNorms` that came free, and the number of updates.
        """
        self._set_factor(self._next_factor())
        plan, rate = self.controller.plan, self._rate(self.factor)
        self._in_one_pass = plan.micro_batch_size
        if self._graphs.compiles and total < self.controller.superbatch_size:
            # XLA makes a graph per shape: all but larger ones get the same.
            data = slicing.padded(data, self.controller.superbatch_size)
        if plan.accumulation_steps > 1 or self._team.replicated:
            return self._accumulate(data, total, plan, rate)
        size, whole = plan.batch_size, total
        if self._graphs.compiles:
            whole = total // size * size  # The ragged tail goes without it.
        if whole:
            logs, used = self._graphs.plain(data, 0, whole, size, rate)
        if whole < total:
            logs, used = self._graphs.plain(data, whole, total, size, rate)
        return logs, used, [], math.ceil(total / size)

    def _accumulate(self, data, total, plan, rate):
        sums, _ = self._pending or (self._graphs.zeros(), None)
        logs, used, sums, rows = self._graphs.accumulate(
            sums,
            data,
            total,
            (plan.batch_size, plan.micro_batch_size),
            self.steps.next_is_last,
            rate,
        )
        rows = [MicroBatchNorms(*row) for row in np.asarray(rows).tolist()]
        self._pending = (sums, logs) if int(sums.count) else None
        return logs, used, [row for row in rows if row.count >= 2], len(rows)

    def finish_pending(self):
        """Makes the update that the end of an epoch cut short, if any.

        Returns:
            Dict from names to the mean losses of the epoch with it, floats.
        """
        if self._pending is None:
            return {}
        (sums, logs), self._pending = self._pending, None
        self._set_factor(self._next_factor())
        row = np.asarray(self._graphs.finish(sums, self._rate(self.factor)))
        self.controller.observe_update(MicroBatchNorms(*row.tolist()))
        return losses_of(self._model, logs)

    def _report(self, measurement):
        self.epoch_seconds += measurement.seconds
        self.epoch_examples += measurement.examples
        self._has_warned = warn_of_loss(self, measurement, self._has_warned)
        self.controller.observe(measurement)
        self.tally.add(measurement)
        self.on_superbatch(row_of(self, measurement))
