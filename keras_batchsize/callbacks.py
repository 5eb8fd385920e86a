"""Keras callbacks: the batch size follows the noise, the rate the batch size.

Thin shells. A callback puts the train function in place, tells it when epochs
begin and end, and carries what it reports into logs, lines and the report;
measuring and deciding happen elsewhere. None of them holds anything but its
arguments before `on_train_begin`, so that they can be deep-copied.
"""

import math

import keras

from keras_batchsize import _checks
from keras_batchsize import keras_private
from keras_batchsize import policies
from keras_batchsize import replicas
from keras_batchsize import requirements
from keras_batchsize import slicing
from keras_batchsize._callbacks_backup import BackupAndRestore
from keras_batchsize._callbacks_base import settings_of
from keras_batchsize._callbacks_clock import LastClock
from keras_batchsize._callbacks_learning_rate import LearningRateScaling
from keras_batchsize._callbacks_memory import MemoryProbe
from keras_batchsize._callbacks_progress import ExamplesProgbarLogger
from keras_batchsize._callbacks_tensorboard import BatchSizeTensorBoard
from keras_batchsize._callbacks_time_to_target import TimeToTarget
from keras_batchsize._controller_advice import recommended_batch_size
from keras_batchsize._controller_advice import why_unchanged
from keras_batchsize.controller import Controller
from keras_batchsize.measuring import checked_every
from keras_batchsize.plan import Ladder
from keras_batchsize.plan import largest_on_ladder
from keras_batchsize.plan import multiples_in_words
from keras_batchsize.report import Report
from keras_batchsize.train_function import AdaptiveTrainFunction
from keras_batchsize.update_graphs import KeptSteps

__all__ = [
    "BackupAndRestore",
    "BatchSizeTensorBoard",
    "DynamicBatchSize",
    "ExamplesProgbarLogger",
    "LearningRateScaling",
    "MemoryProbe",
    "TimeToTarget",
]


class DynamicBatchSize(keras.callbacks.Callback):
    """Lets the batch size follow the gradient noise scale.

    To be used with a plain `model.fit` whose `batch_size` is the superbatch,
    `initial_batch_size` times a power of two: each Keras step hands over a
    superbatch, which is cut into updates of the size in force.

    ```python
    model.fit(x, y, batch_size=2048, callbacks=[
        kb.DynamicBatchSize(initial_batch_size=32),
        kb.LearningRateScaling("linear"),
    ])
    ```

    At the end of each epoch it adds to the logs, and so to `History`:
    `batch_size` (examples per update), `noise_scale` (examples; NaN while not
    resolved) and `examples_per_second`.

    Args:
        policy: Name of a policy or a `BatchSizePolicy`.
        initial_batch_size: The base batch size B₀ that the learning rate was
            meant for.
        min_batch_size: Smallest size, in examples. None for B₀.
        max_batch_size: Largest size, in examples. None for the superbatch.
            Above the superbatch gradients are accumulated.
        measure_every: Measure once in so many updates, but no more than once
            per superbatch; "auto" for as often as 2 % of the time pay for.
        verbose: 1 to print a line at each change.

    Attributes:
        report: The `Report` of the latest training.
    """

    # From `on_train_begin` through Keras to who called `fit`.
    _depth = 4
    # Whether the last step of an epoch takes all that is left.
    _takes_the_rest = False
    # Whether graphs of plain `fit` would know the size of a batch.
    _has_static_sizes = False
    # Where another callback saves backups, and how many examples an epoch has,
    # if that is known; and by how many it may have fewer.
    _backup_dir = _examples_per_epoch = None
    _fewer = 0

    def __init__(
        self,
        policy="goodput",
        initial_batch_size=32,
        min_batch_size=None,
        max_batch_size=None,
        measure_every="auto",
        verbose=0,
    ):
        super().__init__()
        self.policy = policies.get(policy)
        self.initial_batch_size = initial_batch_size
        self.min_batch_size = min_batch_size
        self.max_batch_size = max_batch_size
        self.measure_every = checked_every(measure_every)
        self.verbose = verbose
        self.report = None
        self._train_function = None
        self._kept_steps = KeptSteps()
        self._last_clock = LastClock()
        self._has_ended = False
        self.make_ladder(math.inf)

    def make_ladder(self, superbatch_size):
        """Returns the `Ladder` of sizes for a superbatch size."""
        base, maximum = self.initial_batch_size, self.max_batch_size
        if maximum is None:
            maximum = base if superbatch_size == math.inf else superbatch_size
        minimum = self.min_batch_size
        return Ladder(
            base,
            base if minimum is None else minimum,
            maximum,
            base_name="initial_batch_size",
            replicas=replicas.count(self.model) if self.model else 1,
        )

    def make_controller(self, superbatch_size):
        """Returns the `Controller` of a training.

        Args:
            superbatch_size: Examples in the first superbatch.

        Raises:
            ValueError: If it is not on the ladder of the initial size.
        """
        base = self.initial_batch_size
        number = replicas.count(self.model)
        fitting = largest_on_ladder(base, superbatch_size, number)
        is_all = self.params.get("steps") == 1
        if is_all:
            _checks.enough_examples(superbatch_size, "an epoch")
        if superbatch_size < base or superbatch_size != fitting:
            if is_all:
                fitting *= 2 if superbatch_size > fitting else 1
            else:
                raise ValueError(
                    "The batch size given to `fit` must be "
                    f"`initial_batch_size` {multiples_in_words(base, number)}"
                    ": it is the superbatch that updates are cut from. "
                    f"Received: batch_size={superbatch_size}, "
                    f"initial_batch_size={base}. Use model.fit(..., "
                    f"batch_size={math.lcm(fitting * 2, number)}). If the "
                    "data shuffle whole batches, let none be short: the first "
                    "one counts."
                )
        measure = self.measure_every
        if measure == "auto" and not self.policy.needs_noise:
            measure = None
        controller = Controller(
            self.policy,
            self.make_ladder(fitting),
            fitting,
            measure,
            replicas=replicas.count(self.model),
        )
        self._last_clock.tell(self.model, controller)
        return controller

    def examples(self, superbatch, start, size):
        """Returns so many examples of a superbatch, from `start` on."""
        return slicing.examples(superbatch, start, size)

    def on_train_begin(self, logs=None):
        """Puts the adaptive train function in place."""
        requirements.check_model(self.model)
        requirements.warn_of_steps_per_execution(self.model, 1 + self._depth)
        function = AdaptiveTrainFunction(
            self.model,
            self.make_controller,
            steps=self.params.get("steps"),
            epochs=self.params.get("epochs", 1),
            examples=self.examples,
            kept=self._kept_steps,
            has_static_sizes=self._has_static_sizes,
        )
        function.on_decision.append(self._announce)
        function.on_epoch_end = self.on_epoch_end
        function.steps.takes_the_rest = self._takes_the_rest
        function.steps.examples = self._examples_per_epoch
        function.steps.fewer = self._fewer
        function.backup_dir = self._backup_dir
        self.report = Report()
        function.on_superbatch.append(self.report.add_row)
        self._train_function = function
        function.install()

    def on_epoch_begin(self, epoch, logs=None):
        """Starts the epoch's count of examples and seconds."""
        function = self.model.train_function
        if function is not self._train_function:
            self.close()
            self._refuse(function)
        self._has_ended = False
        function.start_epoch(epoch)

    def _refuse(self, function):
        """Raises, as another train function has taken the place."""
        if not isinstance(function, AdaptiveTrainFunction):
            raise ValueError(
                "The model must not be compiled in `fit`: that takes the train "
                "function out. Received: a callback that did so. Compile the "
                "model before."
            )
        function.uninstall()
        raise ValueError(
            "Only one callback may decide the batch size: an update has one "
            "size. Received: callbacks with two `DynamicBatchSize`, or one "
            "beside an `AdaptiveTrainer`. Remove one of them."
        )

    def on_epoch_end(self, epoch, logs=None):
        """Adds batch size, noise scale and speed to the logs."""
        function = self._train_function
        controller = function.controller
        if self._has_ended:
            return  # A `BackupAndRestore` has been here first.
        self._check_enough(function)
        self._has_ended = True
        losses = function.finish_pending()
        # Keras has read its metrics before that.
        logs.update((one, losses[one]) for one in losses.keys() & logs.keys())
        # Who goes on from what others save knows the optimizer's rate only.
        function.restore_momentum()
        seconds = function.epoch_seconds
        estimate = controller.noise_scale
        logs["batch_size"] = float(controller.batch_size)
        logs["noise_scale"] = estimate.value if estimate.resolved else math.nan
        logs["examples_per_second"] = (
            function.epoch_examples / seconds if seconds else math.nan
        )
        controller.on_epoch_end(epoch, logs)

    def _check_enough(self, function):
        """Raises if the data have ended before there were two examples.

        Of a source that is not read ahead it shows when the epoch is over.
        """
        controller, steps, number = function.controller, function.steps, 0
        if controller is not None:
            number = function.tally.of(controller)["examples"]
            is_cut = number < controller.superbatch_size
            if self.model.stop_training or (
                steps.done == steps.number and not is_cut
            ):
                return  # There may be more.
        if number < 2:
            self.close()
            _checks.enough_examples(number, "an epoch")

    def on_train_end(self, logs=None):
        """Gives the model back as it was."""
        # Not after an error, when variables may be gone.
        self._last_clock.note(self.model, self._train_function.controller)
        self.close()

    def close(self):
        """Gives the model its train function back and ends the report."""
        function = self._train_function
        if function is None:
            return
        function.uninstall()
        if function.controller is not None:
            self._complete_report(function)

    def __getstate__(self):
        """Leaves graphs out: a copy can train, but not go on with them."""
        left_out = {"_train_function": None, "_kept_steps": KeptSteps()}
        return {**vars(self), **left_out, "_last_clock": LastClock()}

    def _announce(self, change):
        """Prints and records a change of the size."""
        self.report.add_change(change)
        if self.verbose:
            keras_private.print_message(
                f"\nEpoch {change.epoch + 1}: DynamicBatchSize setting "
                f"batch size to {change.new_batch_size} ({change.reason}), "
                f"learning rate to {change.learning_rate:.4g}."
            )

    def _complete_report(self, function):
        controller, report = function.controller, self.report
        for index, change in enumerate(report.changes):
            report.replace_change(
                index, observed_speedup=controller.observed_speedup(change)
            )
        base, tally = controller.ladder.base, function.tally
        counts = tally.of(controller)
        report.complete(counts["updates"])
        report.base_updates = counts["base_steps"]
        seconds = controller.timings.median(base)
        if seconds is not None:
            # What the first superbatch took was not tracing alone.
            trained = seconds * tally.traced_examples / base
            report.base_seconds = seconds * report.base_updates + max(
                tally.tracing_seconds - trained, 0.0
            )
        report.skipped_measurements = counts["skipped_measurements"]
        report.settings.update(settings_of(function), first_epoch=tally.epoch)
        if isinstance(controller.policy, policies.Measure):
            size = recommended_batch_size(controller)
            report.settings["recommended_batch_size"] = size
        if not report.changes:
            report.settings["reason_unchanged"] = why_unchanged(controller)
