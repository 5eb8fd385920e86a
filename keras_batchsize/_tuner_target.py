"""`Target`: what a search looks for the shortest way to."""

import dataclasses

from keras_batchsize._callbacks_time_to_target import checked_seconds
from keras_batchsize._callbacks_time_to_target import checked_value
from keras_batchsize.callbacks import TimeToTarget

# The metrics of a trial that are not those of its model.
TIME = "time_to_target"
EXAMPLES = "examples_to_target"
SECONDS = ("training_seconds", "tracing_seconds")
COUNTS = ("batch_size", "examples_per_second", "examples_seen", "noise_scale")
# Those that other work on the machine changes.
WALL_CLOCK = (TIME, "examples_per_second", *SECONDS)


class _OfATrial(TimeToTarget):
    """The callback, in a trial: an objective must be there, if it can."""

    def on_train_end(self, logs=None):
        """Leaves the monitor to the trial, which may train in parts."""

    def _unknown_length(self, seen):
        """As much as was seen, where a first epoch was cut short."""
        return seen


@dataclasses.dataclass(frozen=True)
class Target:
    """A value of a metric to reach, and what may be spent on the way.

    Attributes:
        monitor: Key of the epoch logs, such as "val_accuracy".
        value: Value to reach.
        budget_seconds: Seconds of training after which a trial gives up.
        budget_examples: Examples after which it gives up. None for the epochs
            of the search, with Hyperband its `max_epochs`; those of all parts
            so far where the wrapped `fit` trains in several.
        mode: "min", "max", or "auto" to tell from the name.

    Raises:
        TypeError: If a field is of another kind than stated.
        ValueError: If a number is out of its range, or "auto" cannot tell.
    """

    monitor: str
    value: float
    budget_seconds: float
    budget_examples: int | None = None
    mode: str = "auto"

    def __post_init__(self):
        # Under the names that they have here; the others have the same there.
        checked_value("value", self.value)
        checked_seconds("budget_seconds", self.budget_seconds)
        self.make_callback()

    def make_callback(self):
        """Returns a new `TimeToTarget`."""
        return _OfATrial(
            self.monitor,
            self.value,
            self.budget_seconds,
            mode=self.mode,
            budget_examples=self.budget_examples,
        )
