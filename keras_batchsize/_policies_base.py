"""What a policy is, and how its wish becomes a size on the ladder."""

import dataclasses
import math
from collections.abc import Callable

from keras_batchsize import scaling
from keras_batchsize import throughput
from keras_batchsize.throughput import StepTime


@dataclasses.dataclass(frozen=True)
class Status:
    """What a policy may look at.

    Attributes:
        batch_size: Examples per update now.
        base_batch_size: The size that training starts from; B₀ as well,
            unless `reference_batch_size` is given.
        smaller: The next smaller size that may be used, or `batch_size`.
        larger: The next larger size that may be used, or `batch_size`.
        noise_scale: φ in examples. NaN while it is not resolved.
        squared_norm: ‖G‖² in (loss / parameter)².
        trace: tr(Σ), same unit.
        step_time: The `StepTime` of this run, or None before the first timed
            update.
        learning_rate: The base rate, without the factor for `batch_size`.
        loss: Mean training loss of the epoch so far. NaN if there is none.
        epoch: Zero-based integer.
        efficiency: Progress per example under the learning-rate rule in
            force: `throughput.efficiency` or `throughput.linear_efficiency`.
        reference_batch_size: B₀, the size the user's learning rate was meant
            for. None stands for `base_batch_size`.
    """

    batch_size: int
    base_batch_size: int
    smaller: int
    larger: int
    noise_scale: float = math.nan
    squared_norm: float = math.nan
    trace: float = math.nan
    step_time: StepTime | None = None
    learning_rate: float = math.nan
    loss: float = math.nan
    epoch: int = 0
    efficiency: Callable[..., float] = throughput.efficiency
    reference_batch_size: int | None = None

    def __post_init__(self):
        if self.reference_batch_size is None:
            # The class is frozen: nobody else may set it.
            object.__setattr__(
                self, "reference_batch_size", self.base_batch_size
            )


class BatchSizePolicy:
    """Base class of all policies.

    Attributes:
        needs_noise: Whether `wish` looks at gradient statistics. If so, it is
            asked only while the noise scale is resolved.
        gradual: Whether its wishes are followed by at most a factor of two per
            change, with a waiting time in between. False for policies that
            state a size outright.
        for_speed: Whether it wishes for speed. Then a larger size that was
            never timed is in use on trial: if the times of both sizes say that
            training got slower, the size goes back.
    """

    needs_noise = True
    gradual = True
    for_speed = False

    def wish(self, status):
        """Returns the batch size this policy wants, in examples.

        Args:
            status: A `Status`.

        Returns:
            Float; `status.batch_size` for no change.
        """
        raise NotImplementedError(
            "A policy must implement `wish(status)`: it is asked for the next "
            f"batch size. Received: {type(self).__name__} without it. Return "
            "a number of examples."
        )

    def is_worth_a_try(self, status):
        """Returns whether to try `status.larger`, which was never timed.

        Asked of a policy `for_speed` that wishes for no change.

        Args:
            status: A `Status` at the smallest noise scale the data allow.
        """
        return False

    def reason(self, status):
        """Returns a few words that explain the wish, for logs and report."""
        return f"noise scale {status.noise_scale:,.0f}"

    def on_epoch_end(self, status, logs):
        """Is told the `Status` and the metrics at the end of each epoch."""

    def reset(self):
        """Forgets an earlier training: another one begins."""

    def get_state(self):
        """Returns what evolves during training, as plain JSON types."""
        return {}

    def set_state(self, state):
        """Takes over what `get_state` returned."""

    def __repr__(self):
        arguments = ", ".join(
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if not name.startswith("_")
        )
        return f"{type(self).__name__}({arguments})"


def efficiency_under(rule):
    """Returns the progress per example under a learning-rate rule.

    Args:
        rule: A function as in `scaling.RULES`.

    Returns:
        `throughput.linear_efficiency` or `throughput.efficiency`.
    """
    if rule is scaling.linear:
        return throughput.linear_efficiency
    return throughput.efficiency


# A wish must pass the middle between two sizes by this factor: without it a
# noise scale near the middle would move the size to and fro.
_HYSTERESIS = 1.1


def next_batch_size(policy, status, estimate, ladder):
    """Turns a policy's wish into a size on the ladder.

    A gradual policy is asked twice, at both ends of the confidence interval
    of the noise scale: the size grows only if growing is right even for the
    smallest noise scale the data allow, and shrinks only if shrinking is right
    for the largest. In between it is held; so it is while not resolved.

    Args:
        policy: A `BatchSizePolicy`.
        status: A `Status`; its noise fields are filled in here.
        estimate: The `NoiseScaleEstimate`.
        ladder: The `Ladder` of sizes that may be used.

    Returns:
        Integer on the ladder; `status.batch_size` for no change.
    """
    if policy.needs_noise and not estimate.resolved:
        return status.batch_size
    if not policy.gradual:
        wish = policy.wish(status)
        return status.batch_size if math.isnan(wish) else ladder.nearest(wish)
    wish_if_low = policy.wish(at_noise(status, estimate, estimate.lower))
    wish_if_high = policy.wish(at_noise(status, estimate, estimate.upper))
    up = math.sqrt(status.batch_size * status.larger) * _HYSTERESIS
    down = math.sqrt(status.batch_size * status.smaller) / _HYSTERESIS
    if status.larger > status.batch_size and wish_if_low >= up:
        return status.larger
    if status.smaller < status.batch_size and wish_if_high <= down:
        return status.smaller
    return status.batch_size


def at_noise(status, estimate, noise_scale):
    """Returns the status under the assumption of a noise scale.

    The trace keeps its estimate: it is known far better than ‖G‖².

    Args:
        status: A `Status`.
        estimate: The `NoiseScaleEstimate`.
        noise_scale: φ in examples.

    Returns:
        A `Status`.
    """
    return dataclasses.replace(
        status,
        noise_scale=noise_scale,
        squared_norm=estimate.squared_norm,
        trace=estimate.trace,
    )
