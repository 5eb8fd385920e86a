"""What a `fit` reports of itself: totals, a row per superbatch, changes."""

import math
from operator import attrgetter

from keras_batchsize.report import Change
from keras_batchsize.report import Row

# What the controller counts on and on, through all fits of a trainer.
_COUNTS = (
    "examples",
    "updates",
    "base_steps",
    "skipped_measurements",
    "measuring.elapsed",
    "measuring.spent",
)


class Tally:
    """Totals of one `fit`, whether resumed or not.

    Statistics and clocks of a trainer go on from one `fit` to the next, and
    with them the controller's counts. A report is about one `fit`: what was
    counted before it is subtracted.

    Attributes:
        seconds: Wall time of its superbatches, tracing included.
        tracing_seconds: That of the first superbatch if something was traced
            in it, measuring apart: what any training of the model pays.
        traced_examples: Examples in it.
        seconds_before: Those of the earlier fits whose run in TensorBoard it
            goes on with.
        epoch: The epoch it began with, counted from zero.
        state_getters: Dict from names to functions that return what callbacks
            want to have again when the training is resumed, as plain JSON
            types.
        restored: Dict from those names to what they returned, for the callbacks
            to take out at the first superbatch.
    """

    def __init__(self):
        self.seconds = 0.0
        self.tracing_seconds = 0.0
        self.traced_examples = 0
        self.seconds_before = 0.0
        self.epoch = 0
        self.state_getters, self.restored = {}, {}
        self._before = dict.fromkeys(_COUNTS, 0)

    def begin(self, controller, epoch):
        """Counts from here on.

        Args:
            controller: The `Controller`, with what it has counted before.
            epoch: The first epoch, counted from zero.
        """
        self.epoch = epoch
        self._before = {name: attrgetter(name)(controller) for name in _COUNTS}

    def add(self, measurement):
        """Adds the time of a superbatch.

        Args:
            measurement: Its `Measurement`.
        """
        if measurement.traced and not self.seconds:
            trained = measurement.seconds - measurement.measuring_seconds
            self.tracing_seconds = trained
            self.traced_examples = measurement.examples
        self.seconds += measurement.seconds

    def of(self, controller):
        """Returns the counts of this `fit`, a dict of numbers.

        Args:
            controller: The `Controller`.
        """
        return {
            name: attrgetter(name)(controller) - before
            for name, before in self._before.items()
        }

    def get_state(self):
        """Returns everything as plain JSON types."""
        return {
            "seconds": self.seconds,
            "tracing_seconds": self.tracing_seconds,
            "traced_examples": self.traced_examples,
            "seconds_before": self.seconds_before,
            "epoch": self.epoch,
            "before": self._before,
            "kept": {name: get() for name, get in self.state_getters.items()},
        }

    def set_state(self, state):
        """Goes on from what `get_state` returned.

        Args:
            state: Dict of plain JSON types, which may hold more.
        """
        self.seconds = state["seconds"]
        self.tracing_seconds = state["tracing_seconds"]
        self.traced_examples = state["traced_examples"]
        self.seconds_before = state["seconds_before"]
        self.epoch = state["epoch"]
        self._before = dict(state["before"])
        self.restored = dict(state["kept"])


def row_of(function, measurement):
    """Returns the `report.Row` of the superbatch just trained on.

    Args:
        function: The `AdaptiveTrainFunction`.
        measurement: The `Measurement` of that superbatch.
    """
    controller = function.controller
    plan, estimate = controller.plan, controller.noise_scale
    known = estimate.resolved
    counts = function.tally.of(controller)
    return Row(
        examples=counts["examples"],
        updates=counts["updates"],
        epoch=function.epoch,
        seconds=function.tally.seconds,
        batch_size=plan.batch_size,
        micro_batch_size=plan.micro_batch_size,
        accumulation_steps=plan.accumulation_steps,
        noise_scale=estimate.value if known else math.nan,
        noise_lower=estimate.lower if known else math.nan,
        noise_upper=estimate.upper if known else math.nan,
        learning_rate=measurement.learning_rate,
        base_learning_rate=measurement.learning_rate / function.factor,
        learning_rate_factor=function.factor,
        examples_per_second=measurement.examples / measurement.seconds,
        goodput=controller.goodput,
        loss=math.nan if measurement.loss is None else measurement.loss,
    )


def change_of(function, decision):
    """Returns the `report.Change` of a decision that takes effect now.

    Args:
        function: The `AdaptiveTrainFunction`.
        decision: The `Decision`.
    """
    counts = function.tally.of(function.controller)
    return Change(
        epoch=function.epoch,
        examples=counts["examples"],
        updates=counts["updates"],
        old_batch_size=decision.old_batch_size,
        new_batch_size=decision.new_batch_size,
        noise_scale=decision.noise_scale,
        learning_rate=function.next_learning_rate(),
        reason=decision.reason,
        predicted_speedup=decision.predicted_speedup,
        observed_speedup=math.nan,
    )
