"""How long an update takes, and which batch size trains fastest.

The time of an update of B examples is modelled as T(B) = a + c·B seconds: a
fixed cost (launching kernels, the optimizer, communication) and a cost per
example, so that examples per second rise as B/(a + c·B). Progress per example
falls with the size, the faster the smaller the noise scale φ is; how, depends
on the rule of the learning rate: as `linear_efficiency` under the linear one,
the default with SGD, as `efficiency` under any other. The product of both is
the goodput.
"""

import dataclasses
import math
import statistics

import numpy as np

# What part of the best rate at B₀ the base rate is taken for, under the linear
# rule. Nothing in a run tells it without measuring curvature. With a quarter
# the goodput of two models on MNIST had its maximum where a sweep over fixed
# sizes had it, with a half or with `efficiency` well below
# (benchmarks/time_to_target.py).
RATE_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class StepTime:
    """The time of an update of B examples, T(B) = fixed + per_example·B.

    A batch that is accumulated from micro-batches pays the fixed cost for
    each of them. Of what is paid only once per update, the all-reduce over
    replicas is timed by itself; the optimizer's share cannot be told apart.

    Attributes:
        fixed: Seconds per update that do not depend on the batch size.
        per_example: Seconds per example.
        largest: Largest batch size that is computed in one piece.
        guessed: Whether the two costs could not be told apart.
        communication: Seconds per update of the all-reduce over replicas,
            paid once also by a batch that is accumulated.
    """

    fixed: float
    per_example: float
    largest: float = math.inf
    guessed: bool = False
    communication: float = 0.0

    def __call__(self, batch_size):
        """Returns the seconds that an update of `batch_size` examples takes."""
        pieces = max(batch_size / self.largest, 1.0)
        computing = self.fixed * pieces + self.per_example * batch_size
        return self.communication + computing


def fit_step_time(
    batch_sizes, seconds, largest=math.inf, communication=0.0
):
    """Fits T(B) = m + a·max(1, B/largest) + c·B to timed updates.

    Each size is represented by the lower quartile of its times: whatever else
    runs on a machine only ever adds time, often to several updates in a row,
    and a size that was unlucky must not be given up for it. The line through
    these minimises the *relative* error (a size of 16 must count as much as
    one of 4096, whose seconds are a hundred times as many), with both
    coefficients kept non-negative.

    With one size only, or only sizes beyond `largest`, a and c cannot be told
    apart. Then half of the time is taken as fixed, as Pollux does (Qiao et al.
    2021, OSDI), and the result is marked as guessed.

    Args:
        batch_sizes: Sequence of batch sizes, in examples. Sizes may repeat.
        seconds: Sequence of seconds per update, positive, of the same length.
        largest: Largest batch size that is computed in one piece.
        communication: Seconds m of the all-reduce, timed by itself. At most
            half of the fastest update, since a network is slow at times.

    Returns:
        A `StepTime`.

    Raises:
        ValueError: If the sequences are empty or differ in length, or a time
            is not a positive number.
    """
    sizes = np.asarray(batch_sizes, dtype=float)
    times = np.asarray(seconds, dtype=float)
    if sizes.size == 0 or sizes.shape != times.shape:
        raise ValueError(
            "`batch_sizes` and `seconds` must be sequences of the same, "
            "positive length: each size needs its time. Received: "
            f"len(batch_sizes)={sizes.size}, len(seconds)={times.size}. "
            "Pass one time for each size."
        )
    if not (np.isfinite(times) & (times > 0.0)).all():
        raise ValueError(
            "`seconds` must be positive numbers: errors are weighed relative "
            f"to them. Received: seconds={seconds!r}. Leave out updates that "
            "were not timed."
        )
    communication = min(communication, times.min() / 2.0)
    times = times - communication
    groups = {}
    for size, one in zip(sizes.tolist(), times.tolist()):
        groups.setdefault(size, []).append(one)
    points = [
        (max(size / largest, 1.0), size, lower_quartile(one), len(one))
        for size, one in sorted(groups.items())
    ]
    if len({min(size, largest) for _, size, _, _ in points}) == 1:
        half = statistics.median(t / k for k, _, t, _ in points) / 2.0
        per_example = half / min(points[0][1], largest)
        return StepTime(half, per_example, largest, True, communication)
    return StepTime(*_line(points), largest, False, communication)


def lower_quartile(seconds):
    """Returns the lower quartile of times, one of them.

    Args:
        seconds: List of floats, at least one; or of their ratios.
    """
    return sorted(seconds)[(len(seconds) - 1) // 4]


def _line(points):
    """Least squares of the relative error of a·pieces + c·size, a, c >= 0.

    A size that was timed more often is known better. With two unknowns the
    normal equations are solved by hand: this runs after every superbatch.
    """
    aa = sum(n * (k / t) ** 2 for k, _, t, n in points)
    cc = sum(n * (b / t) ** 2 for _, b, t, n in points)
    ac = sum(n * k * b / t**2 for k, b, t, n in points)
    a1 = sum(n * k / t for k, _, t, n in points)
    c1 = sum(n * b / t for _, b, t, n in points)
    determinant = aa * cc - ac * ac
    fixed = (a1 * cc - c1 * ac) / determinant
    per_example = (c1 * aa - a1 * ac) / determinant
    if fixed < 0.0:
        return 0.0, c1 / cc
    if per_example < 0.0:
        return a1 / aa, 0.0
    return fixed, per_example


def efficiency(batch_size, noise_scale, base_batch_size):
    """Progress per example, relative to training at the base batch size.

    (φ + B₀)/(φ + B), Qiao et al. 2021 (Pollux, OSDI): the ratio of the examples
    that McCandlish et al. 2018, eq. 2.11, asks for. 1 at the base batch size,
    and falling as 1/B once the batch is larger than the noise scale.

    Args:
        batch_size: Examples per update.
        noise_scale: φ in examples; infinite is allowed and gives 1.
        base_batch_size: Examples per update of the comparison.

    Returns:
        Float.
    """
    if math.isinf(noise_scale):
        return 1.0
    return (noise_scale + base_batch_size) / (noise_scale + batch_size)


def linear_efficiency(batch_size, noise_scale, base_batch_size):
    """Progress per example where the rate grows in proportion to the size.

    `efficiency` takes the best rate at every size for granted. An update at
    rate ε is expected to lower the loss by ε‖G‖² - ½ε²(GᵀHG + tr(HΣ)/B)
    (McCandlish et al. 2018, eq. 2.5), most of all at ε_max/(1 + φ/B) (their
    eq. 2.6). Be the base rate the share r of the best one at B₀, and let it
    grow as B/B₀. Dividing by B and by the same at B₀ leaves

        (1 - r/2·(φ + B)/(φ + B₀)) / (1 - r/2).

    A rate well below the best loses little when the size grows, since B small
    updates and one of B times the rate go the same way; but it has an end,
    which the other formula has not: where the rate gets too large for the
    curvature, progress is zero. (The algebra is ours.) For r see `RATE_SHARE`.

    Args:
        batch_size: Examples per update.
        noise_scale: φ in examples; infinite is allowed and gives 1.
        base_batch_size: B₀, the size that the base rate was meant for.

    Returns:
        Float, 1 at the base batch size and never below 0.
    """
    if math.isinf(noise_scale):
        return 1.0
    growth = (noise_scale + batch_size) / (noise_scale + base_batch_size)
    lost = RATE_SHARE / 2.0
    return max((1.0 - lost * growth) / (1.0 - lost), 0.0)


def progress_ratio(
    old_batch_size,
    new_batch_size,
    noise_scale,
    base_batch_size,
    efficiency=efficiency,
):
    """Progress per example at one size, divided by that at another.

    Args:
        old_batch_size: Examples per update now.
        new_batch_size: Examples per update after the change.
        noise_scale: φ in examples.
        base_batch_size: B₀.
        efficiency: `efficiency` or `linear_efficiency`.

    Returns:
        Float. Where the old size makes no progress, infinite for any smaller
        one and zero for a larger one.
    """
    before = efficiency(old_batch_size, noise_scale, base_batch_size)
    if before != 0.0:
        after = efficiency(new_batch_size, noise_scale, base_batch_size)
        return after / before
    if new_batch_size == old_batch_size:
        return 1.0
    return math.inf if new_batch_size < old_batch_size else 0.0


def goodput(
    batch_size,
    step_time,
    noise_scale,
    base_batch_size,
    efficiency=efficiency,
):
    """Useful examples per second: throughput times statistical efficiency.

    Qiao et al. 2021 (Pollux, OSDI).

    Args:
        batch_size: Examples per update.
        step_time: A `StepTime`.
        noise_scale: φ in examples.
        base_batch_size: Batch size whose examples count as fully useful.
        efficiency: `efficiency` or `linear_efficiency`.

    Returns:
        Examples of the base batch size that one second of training is worth.
    """
    per_second = batch_size / step_time(batch_size)
    return per_second * efficiency(batch_size, noise_scale, base_batch_size)


def speedup(
    old_batch_size,
    new_batch_size,
    step_time,
    noise_scale,
    base_batch_size=1,
    efficiency=efficiency,
):
    """Factor by which training gets faster when the batch size changes.

    Args:
        old_batch_size: Examples per update now.
        new_batch_size: Examples per update after the change.
        step_time: A `StepTime`.
        noise_scale: φ in examples.
        base_batch_size: B₀; of no influence on `efficiency`.
        efficiency: `efficiency` or `linear_efficiency`.

    Returns:
        goodput(new)/goodput(old); 1.05 means 5 % faster to the same loss.
    """
    old_seconds = step_time(old_batch_size) / old_batch_size
    new_seconds = step_time(new_batch_size) / new_batch_size
    return (old_seconds / new_seconds) * progress_ratio(
        old_batch_size,
        new_batch_size,
        noise_scale,
        base_batch_size,
        efficiency,
    )


def time_optimal_batch_size(step_time, noise_scale):
    """The batch size with the largest goodput, √(φ·a/c), at most `largest`.

    Setting the derivative of B/((a + c·B)(φ + B)) to zero gives B² = φ·a/c:
    the geometric mean of the noise scale and of the "overhead batch" a/c, at
    which fixed and variable cost are equal. It is the form of McCandlish et
    al. 2018, App. D, with a measured number in the place of a trade-off knob.
    Beyond `step_time.largest` only the all-reduce is left of the fixed cost:
    T(B) = m + (a/largest + c)·B, which has its own optimum, if it lies there.

    Args:
        step_time: A `StepTime`.
        noise_scale: φ in examples.

    Returns:
        Float, in examples; infinite if an example costs nothing and any
        number is computed in one piece.
    """
    largest, communication = step_time.largest, step_time.communication
    per_example = step_time.per_example
    if per_example > 0.0:
        overhead = (step_time.fixed + communication) / per_example
        inside = math.sqrt(noise_scale * overhead)
        if inside <= largest:
            return inside
    elif largest == math.inf:
        return largest
    per_example += step_time.fixed / largest
    if per_example == 0.0:
        return largest
    return max(largest, math.sqrt(noise_scale * communication / per_example))


def saturation_batch_size(step_time, fraction=0.95):
    """The smallest batch size with `fraction` of the largest throughput.

    Args:
        step_time: A `StepTime`.
        fraction: Float in (0, 1).

    Returns:
        Float, in examples; infinite if an example costs nothing and any
        number is computed in one piece.
    """
    fixed, per_example = step_time.fixed, step_time.per_example
    communication = step_time.communication
    # Seconds per example at the largest throughput, and at a fraction of it.
    least = fixed / step_time.largest + per_example
    if least == 0.0:
        return math.inf
    size = (fixed + communication) / (least / fraction - per_example)
    if size <= step_time.largest:
        return size
    return communication / (least / fraction - least)
