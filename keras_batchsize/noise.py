"""The gradient noise scale and how well it is known.

The train function measures squared norms of gradients; everything that is
concluded from them happens here, on Python floats, without TensorFlow.

Three traps decide the shape of this module (each has a test):

- Both moments of a step may come out negative. They are averaged as they are
  and divided last; clipping or dividing per step is biased by a factor of two
  and more when the noise is large.
- How far an average looks back is counted in examples, so that nothing
  changes its meaning when the batch size does.
- A ratio whose denominator may be zero has no useful value. Such an estimate
  is `resolved=False`, and nobody acts on it.
"""

import dataclasses
import math
from typing import NamedTuple

# Two standard errors: about 95 % confidence.
_CONFIDENCE = 2.0

# Below this many (effective) measurements their spread is not known either.
_MINIMUM_MEASUREMENTS = 8.0

# The shortest horizon is preferred once it is known this well.
_WANTED_RELATIVE_ERROR = 0.25


@dataclasses.dataclass(frozen=True)
class GradientMoments:
    """Signal and noise in a stochastic gradient.

    Attributes:
        squared_norm: ‖G‖², squared l2 norm of the expected gradient, in
            (loss / parameter)². Estimates may be negative near a minimum;
            they are averaged as they are and clipped only where divided.
        trace: tr(Σ), trace of the covariance of one example's gradient,
            same unit.
    """

    squared_norm: float
    trace: float


class MicroBatchNorms(NamedTuple):
    """What one update reports about the gradients of its micro-batches.

    With cᵢ examples in micro-batch i and gᵢ its mean gradient, before
    clipping and with the loss scale removed:

    Attributes:
        micro_sq_norm: Σᵢ cᵢ‖gᵢ‖² / Σᵢ cᵢ, in (loss / parameter)².
        mean_sq_norm: ‖Σᵢ cᵢgᵢ / Σᵢ cᵢ‖², same unit.
        examples: Σᵢ cᵢ, examples in the update.
        count: Number of micro-batches, over all replicas.
    """

    micro_sq_norm: float
    mean_sq_norm: float
    examples: float
    count: float

    @property
    def is_finite(self):
        """Whether both norms are finite numbers."""
        return math.isfinite(self.micro_sq_norm) and math.isfinite(
            self.mean_sq_norm
        )


def gradient_moments(micro_sq_norm, mean_sq_norm, micro_batch_size, count):
    """Separates signal from noise using the micro-batches of one update.

    Let gᵢ be the mean gradient of micro-batch i (m i.i.d. examples each) and
    ḡ the mean of the n of them. Then (McCandlish et al. 2018,
    arXiv:1812.06162, App. A.1, with B_small = m and B_big = n·m)

        E‖gᵢ‖² = ‖G‖² + tr(Σ)/m,        E‖ḡ‖² = ‖G‖² + tr(Σ)/(n·m),

    two equations in two unknowns. Both solutions are unbiased; their ratio,
    the noise scale, is not, so average the moments over steps before dividing.

    The same lines hold for micro-batches of unequal sizes cᵢ if both norms are
    weighted by cᵢ and m is the mean size: Σcᵢ(‖G‖² + tr(Σ)/cᵢ)/B = ‖G‖² +
    n·tr(Σ)/B. They hold, too, for micro-batches drawn without replacement from
    D examples, up to a factor D/(D-1): disjoint parts need no correction for
    the finite population.

    Args:
        micro_sq_norm: Float, (1/n) Σᵢ ‖gᵢ‖².
        mean_sq_norm: Float, ‖ḡ‖².
        micro_batch_size: Float m, mean number of examples in a micro-batch.
        count: Integer n, micro-batches in the update, over all replicas.

    Returns:
        A `GradientMoments`.

    Raises:
        ValueError: If `count` is less than 2.
    """
    if count < 2:
        raise ValueError(
            "`count` must be at least 2: gradient noise is measured from how "
            f"micro-batches differ. Received: count={count}. Use a smaller "
            "`micro_batch_size` or more replicas."
        )
    noise = (micro_sq_norm - mean_sq_norm) / (count - 1)  # tr(Σ) / (n·m)
    return GradientMoments(
        squared_norm=mean_sq_norm - noise,
        trace=noise * count * micro_batch_size,
    )


class RunningMoments(NamedTuple):
    """Decayed sums over measurements; a measurement of B examples weighs B.

    A larger batch measures ‖G‖² more precisely, hence the weight. Dividing by
    `weight` removes the bias of a young average exactly, whatever the decays
    were in between.

    Attributes:
        weight: Σw.
        weight_squared: Σw², which tells how many measurements count.
        squared_norm: Σw·x with x = ‖G‖² of a measurement.
        trace: Σw·y with y = tr(Σ).
        squared_norm_2: Σw·x².
        trace_2: Σw·y².
        product: Σw·x·y.
    """

    weight: float = 0.0
    weight_squared: float = 0.0
    squared_norm: float = 0.0
    trace: float = 0.0
    squared_norm_2: float = 0.0
    trace_2: float = 0.0
    product: float = 0.0


def decayed(running, examples, horizon):
    """Lets `examples` pass: what is `horizon` examples old weighs 1/e.

    Args:
        running: A `RunningMoments`.
        examples: Examples seen since the last call.
        horizon: Examples after which a measurement's weight is 1/e.

    Returns:
        The `RunningMoments` with all weights reduced.
    """
    keep = math.exp(-examples / horizon)
    sums = [keep * value for value in running]
    sums[1] = keep * sums[1]  # The sum of squared weights decays twice.
    return RunningMoments(*sums)


def averaged(running, moments, weight):
    """Adds one measurement to the sums.

    Args:
        running: A `RunningMoments`.
        moments: The `GradientMoments` of one update, signed as they are.
        weight: Examples in that update.

    Returns:
        The new `RunningMoments`.
    """
    x, y = moments.squared_norm, moments.trace
    return RunningMoments(
        running.weight + weight,
        running.weight_squared + weight * weight,
        running.squared_norm + weight * x,
        running.trace + weight * y,
        running.squared_norm_2 + weight * x * x,
        running.trace_2 + weight * y * y,
        running.product + weight * x * y,
    )


@dataclasses.dataclass(frozen=True)
class NoiseScaleEstimate:
    """The noise scale φ = tr(Σ)/‖G‖², in examples, and how well it is known.

    φ is the batch size at which the noise of a batch gradient is as large as
    the gradient (McCandlish et al. 2018, eq. 2.9, "B_simple").

    Attributes:
        value: φ in examples. NaN before the first measurement, infinite where
            the average of ‖G‖² is not positive.
        standard_error: Of `value`, in examples, by the delta method.
        lower: Lower end of the 95 % interval, in examples.
        upper: Upper end, in examples. Infinite while not resolved.
        resolved: Whether ‖G‖² differs from zero by more than two standard
            errors, so that the interval is finite. Nothing may be decided on
            an estimate that is not resolved.
        squared_norm: ‖G‖² in (loss / parameter)², the denominator.
        trace: tr(Σ), the numerator, same unit.
    """

    value: float
    standard_error: float
    lower: float
    upper: float
    resolved: bool
    squared_norm: float
    trace: float


UNKNOWN = NoiseScaleEstimate(
    value=math.nan,
    standard_error=math.inf,
    lower=0.0,
    upper=math.inf,
    resolved=False,
    squared_norm=math.nan,
    trace=math.nan,
)


def estimate(running):
    """Divides the averages, with the confidence interval of a ratio.

    The interval is Fieller's (1954): the set of ratios r for which
    tr(Σ) - r‖G‖² does not differ from zero by more than two standard errors.
    It takes into account that both averages come from the same gradients, and
    it says by itself when the data do not bound the ratio: then the
    denominator cannot be told from zero.

    Args:
        running: A `RunningMoments`.

    Returns:
        A `NoiseScaleEstimate`.
    """
    if running.weight <= 0.0:
        return UNKNOWN
    x = running.squared_norm / running.weight
    y = running.trace / running.weight
    share = running.weight_squared / running.weight**2  # 1 / measurements
    if share * _MINIMUM_MEASUREMENTS > 1.0:
        return _unresolved(x, y, 0.0)
    # Variance of a weighted mean with the bias of the weighted variance
    # removed: s²·Σw²/(Σw)² with s² = Σw(x - mean)²/Σw / (1 - Σw²/(Σw)²).
    spread = share / (1.0 - share)
    var_x = max(running.squared_norm_2 / running.weight - x * x, 0.0) * spread
    var_y = max(running.trace_2 / running.weight - y * y, 0.0) * spread
    cov = (running.product / running.weight - x * y) * spread
    return _fieller(x, y, var_x, var_y, cov)


def _unresolved(x, y, lower):
    if y <= 0.0:
        value = 0.0 if x > 0.0 else math.nan
    else:
        value = y / x if x > 0.0 else math.inf
    return NoiseScaleEstimate(
        value, math.inf, lower, math.inf, False, squared_norm=x, trace=y
    )


def _fieller(x, y, var_x, var_y, cov):
    z2 = _CONFIDENCE**2
    significant = x * x - z2 * var_x
    if x <= 0.0 or significant <= 0.0 or y <= 0.0:
        high = x + _CONFIDENCE * math.sqrt(var_x)
        low = y - _CONFIDENCE * math.sqrt(var_y)
        bound = max(low, 0.0) / high if high > 0.0 else 0.0
        return _unresolved(x, y, bound)
    middle = x * y - z2 * cov
    outside = y * y - z2 * var_y
    root = math.sqrt(max(middle * middle - significant * outside, 0.0))
    ratio = y / x
    variance = var_x / x**2 + var_y / y**2 - 2.0 * cov / (x * y)
    return NoiseScaleEstimate(
        value=ratio,
        standard_error=ratio * math.sqrt(max(variance, 0.0)),
        lower=max((middle - root) / significant, 0.0),
        upper=(middle + root) / significant,
        resolved=True,
        squared_norm=x,
        trace=y,
    )


class NoiseScaleEstimator:
    """Averages measurements over several horizons and picks the best one.

    A short horizon follows the training, a long one sees through more noise.
    Instead of a fixed compromise the same measurements are averaged over a
    few horizons; the answer is the shortest horizon whose relative standard
    error is at most 25 %, else the longest.

    Args:
        horizons: Increasing sequence of horizons, in examples.
    """

    def __init__(self, horizons):
        self.horizons = tuple(float(horizon) for horizon in horizons)
        self._running = [RunningMoments() for _ in self.horizons]
        self.skipped = 0

    def add(self, norms, examples):
        """Takes in the measurements of some updates.

        A measurement that is not finite (an overflow of float16, a diverged
        loss) is counted in `skipped` and never averaged.

        Args:
            norms: Iterable of `MicroBatchNorms`, each with `count` >= 2.
            examples: Examples seen since the last call, measured or not.
        """
        self._running = [
            decayed(running, examples, horizon)
            for running, horizon in zip(self._running, self.horizons)
        ]
        for one in norms:
            if not one.is_finite:
                self.skipped += 1
                continue
            moments = gradient_moments(
                one.micro_sq_norm,
                one.mean_sq_norm,
                one.examples / one.count,
                one.count,
            )
            self._running = [
                averaged(running, moments, one.examples)
                for running in self._running
            ]

    def estimate(self):
        """Returns the `NoiseScaleEstimate` of the best horizon."""
        for running in self._running:
            candidate = estimate(running)
            wanted = _WANTED_RELATIVE_ERROR * candidate.value
            if candidate.resolved and candidate.standard_error <= wanted:
                return candidate
        return candidate

    def get_state(self):
        """Returns the state as plain JSON types."""
        return {
            "horizons": list(self.horizons),
            "running": [list(running) for running in self._running],
            "skipped": self.skipped,
        }

    def set_state(self, state):
        """Takes over what `get_state` returned."""
        self.horizons = tuple(state["horizons"])
        self._running = [RunningMoments(*sums) for sums in state["running"]]
        self.skipped = state["skipped"]
