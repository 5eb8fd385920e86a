"""What goes into the controller, and what comes out of it."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Timing:
    """Time of some full-sized updates; zero updates if none was timed.

    Attributes:
        seconds: Wall time of all of them.
        updates: How many updates, a float where an update is in progress.
    """

    seconds: float = 0.0
    updates: float = 0.0


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What the train function reports about one superbatch.

    Attributes:
        examples: Examples in it.
        updates: Optimizer updates finished in it.
        norms: Tuple of `MicroBatchNorms`: one of the superbatch, if it was
            measured, and one of each update that was accumulated.
        timing: `Timing` of the updates. Empty if they were traced first.
        measuring_seconds: Seconds that measuring took, tracing included.
        seconds: Wall time of the superbatch, waiting for data included.
        traced: Whether the time contains tracing or compiling.
        loss: Mean loss of the epoch so far. None if there is none.
        learning_rate: The rate of its last update, which a later one may
            finish.
        factor: What the base rate was multiplied by in that.
    """

    examples: int
    updates: int
    norms: tuple = ()
    timing: Timing = Timing()
    measuring_seconds: float = 0.0
    seconds: float = 0.0
    traced: bool = False
    loss: float | None = None
    learning_rate: float = math.nan
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Decision:
    """A change of the batch size.

    Attributes:
        old_batch_size: Examples per update before.
        new_batch_size: Examples per update from now on.
        noise_scale: φ in examples, NaN if not resolved.
        predicted_speedup: Predicted goodput ratio, NaN if not known.
        reason: A few words.
    """

    old_batch_size: int
    new_batch_size: int
    noise_scale: float
    predicted_speedup: float
    reason: str


class Listeners(list):
    """Functions of one value, called together, in the order they came."""

    def __call__(self, value):
        for listener in self:
            listener(value)


def finite_or_none(value):
    """Returns a value as JSON takes it: neither NaN nor an infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def nan_if_none(value):
    """Returns a number as it was before `finite_or_none`, infinities apart."""
    return math.nan if value is None else value
