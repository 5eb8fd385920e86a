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

The precision is not read off the scatter of past measurements, which contains
the drift of training and needs many of them. Each measurement tells it: from
how its own parts scatter follows the effective rank of the noise, and from
that the variance of both moments.
"""

import dataclasses
import math
from typing import NamedTuple

# The normal quantile of a 95 % interval.
_NORMAL_QUANTILE = 1.96

# The effective rank is averaged over about so many measurements: it belongs to
# the model and the data and moves slowly.
_RANK_MEASUREMENTS = 32


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
        count: Number n of micro-batches, over all replicas.
        products: Σ_{k=2..n} (k-1)·(g_k·ḡ_{<k})² with ḡ_{<k} the mean of the
            gradients before the k-th, in (loss / parameter)⁴. It tells how
            precise the norms are. None if it was not measured.
    """

    micro_sq_norm: float
    mean_sq_norm: float
    examples: float
    count: float
    products: float | None = None

    @property
    def is_finite(self):
        """Whether all that was measured is finite."""
        return math.isfinite(
            self.micro_sq_norm + self.mean_sq_norm + (self.products or 0.0)
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


def inverse_rank(norms, moments):
    """Estimates 1/r, r = tr(Σ)²/tr(Σ²) the effective rank of the noise.

    Noise in r equally strong directions has effective rank r, and the scatter
    of squared norms falls as 1/√r. With n micro-batches of m examples and
    d_k = (k-1)·g_k·ḡ_{<k}, all d_k have the mean (k-1)‖G‖²; their deviations
    are uncorrelated with variance (k-1)·tr(Σ²)/m² as far as noise outweighs
    signal [our algebra; a test compares it with enumeration]. ‖G‖² is fitted,
    which costs one of the n-1 degrees of freedom.

    Args:
        norms: A `MicroBatchNorms` with `products`.
        moments: Its `GradientMoments`.

    Returns:
        Tuple of the estimate and its degrees of freedom, n-2; (0, 0) where
        nothing can be said.
    """
    freedom = norms.count - 2
    if norms.products is None or freedom < 1 or moments.trace <= 0.0:
        return 0.0, 0.0
    pairs = norms.count * (norms.count - 1) / 2.0
    deviation = norms.products - pairs * moments.squared_norm**2
    micro_trace = moments.trace * norms.count / norms.examples
    return deviation / freedom / micro_trace**2, float(freedom)


class RunningMoments(NamedTuple):
    """Decayed sums over measurements with weights w.

    Dividing by `weight` removes the bias of a young average exactly, whatever
    the decays were in between. The last four are variances of the first two,
    times the effective rank; with M examples in n parts and t the level of
    tr(Σ), a measurement has (Gaussian noise, see `variances`)

        Var ‖G‖² = (2n/(n-1)·(t/M)² + 4‖G‖²·t/M)/r,  Var tr(Σ) = 2t²/(n-1)/r.

    Attributes:
        weight: Σw.
        squared_norm: Σw·x with x = ‖G‖² of a measurement.
        trace: Σw·y with y = tr(Σ).
        noise_noise: Σw²·2n/(n-1)·(t/M)².
        signal_noise: Σw²·4t/M.
        trace_variance: Σw²·2t²/(n-1).
        covariance: -Σw²·2t²/(n-1)/M.
    """

    weight: float = 0.0
    squared_norm: float = 0.0
    trace: float = 0.0
    noise_noise: float = 0.0
    signal_noise: float = 0.0
    trace_variance: float = 0.0
    covariance: float = 0.0


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
    # Variances carry the weight twice.
    return RunningMoments(
        *(keep * one for one in running[:3]),
        *(keep * keep * one for one in running[3:]),
    )


def averaged(running, moments, weight, examples, count, level):
    """Adds one measurement to the sums.

    Args:
        running: A `RunningMoments`.
        moments: The `GradientMoments` of the measurement, signed as they are.
        weight: Positive float that does not depend on `moments`.
        examples: Examples M in the measurement.
        count: Number n of its parts.
        level: Level t of tr(Σ), positive.

    Returns:
        The new `RunningMoments`.
    """
    share, spread = level / examples, 2.0 * level**2 / (count - 1)
    added = (
        weight,
        weight * moments.squared_norm,
        weight * moments.trace,
        weight**2 * 2.0 * count / (count - 1) * share**2,
        weight**2 * 4.0 * share,
        weight**2 * spread,
        -(weight**2) * spread / examples,
    )
    return RunningMoments(*(a + b for a, b in zip(running, added)))


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
        resolved: Whether ‖G‖² differs from zero at 95 % confidence, so that
            the interval is finite. Nothing may be decided on
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


def estimate(running, rank_inverse, freedom):
    """Divides the averages, with the confidence interval of a ratio.

    The interval is Fieller's (1954): the set of ratios r for which
    tr(Σ) - r‖G‖² does not differ from zero at 95 % confidence, with Student's
    quantile for how well the variance is known. It takes into account that
    both averages come from the same gradients, and it says by itself when the
    data do not bound the ratio: then the denominator cannot be told from zero.

    Args:
        running: A `RunningMoments`.
        rank_inverse: 1/r, the inverse of the effective rank of the noise.
        freedom: Degrees of freedom of that number.

    Returns:
        A `NoiseScaleEstimate`.
    """
    if running.weight <= 0.0:
        return UNKNOWN
    x = running.squared_norm / running.weight
    y = running.trace / running.weight
    if freedom <= 0.0:
        return _unresolved(x, y, 0.0)
    factor = min(max(rank_inverse, 1e-12), 1.0) / running.weight**2
    var_x = running.noise_noise + running.signal_noise * max(x, 0.0)
    return _fieller(
        (x, y),
        factor * var_x,
        factor * running.trace_variance,
        factor * running.covariance,
        _quantile(freedom),
    )


def _quantile(freedom):
    """Student's 97.5 % quantile, for a variance that is estimated itself.

    Cornish-Fisher expansion (Abramowitz & Stegun 26.7.5) to second order:
    3.06 for 3 degrees of freedom (exact: 3.18), 2.23 for 10 (2.23).
    """
    z = _NORMAL_QUANTILE
    first = (z**3 + z) / 4.0
    second = (5.0 * z**5 + 16.0 * z**3 + 3.0 * z) / 96.0
    return z + first / freedom + second / freedom**2


def _unresolved(x, y, lower):
    if y <= 0.0:
        value = 0.0 if x > 0.0 else math.nan
    else:
        value = y / x if x > 0.0 else math.inf
    return NoiseScaleEstimate(
        value, math.inf, lower, math.inf, False, squared_norm=x, trace=y
    )


def _fieller(averages, var_x, var_y, cov, quantile):
    x, y = averages
    z2 = quantile**2
    significant = x * x - z2 * var_x
    if x <= 0.0 or significant <= 0.0 or y <= 0.0:
        high = x + quantile * math.sqrt(var_x)
        low = y - quantile * math.sqrt(var_y)
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
    few horizons; the answer is the shortest horizon that is resolved, else
    the longest. A young training moves φ by a factor of five in an epoch: what
    a long average gains in precision it loses in being out of date.

    Horizons are examples, so that they keep their meaning when the batch size
    changes; each is stretched where measurements are so rare that it would
    not hold enough of them.

    Gradients shrink by orders of magnitude while a model learns. So that the
    first, largest ones do not outvote all later ones, a measurement weighs
    its examples divided by the level of tr(Σ) at the time. The level is taken
    from *earlier* measurements: a weight that does not depend on what it
    weighs leaves the averages unbiased.

    Args:
        horizons: Increasing sequence of horizons, in examples.
        measurements: Sequence of the same length: the fewest measurements
            that a horizon must hold, 0 for no such bound.
    """

    def __init__(self, horizons, measurements=None):
        self.horizons = tuple(float(horizon) for horizon in horizons)
        self.measurements = tuple(measurements or [0] * len(self.horizons))
        self._running = [RunningMoments() for _ in self.horizons]
        self._rank = (0.0, 0.0)
        self._level = 0.0
        self._since = 0.0
        self._spacing = 0.0
        self.skipped = 0

    def add(self, norms, examples):
        """Takes in the measurements of some updates.

        A measurement that is not finite (an overflow of float16, a diverged
        loss) is counted in `skipped` and never averaged.

        Args:
            norms: Iterable of `MicroBatchNorms`, each with `count` >= 2.
            examples: Examples seen since the last call, measured or not.
        """
        self._since += examples
        for one in norms:
            if not one.is_finite:
                self.skipped += 1
                continue
            self._add_one(one)

    def _add_one(self, norms):
        self._pass()
        moments = gradient_moments(
            norms.micro_sq_norm,
            norms.mean_sq_norm,
            norms.examples / norms.count,
            norms.count,
        )
        trace = max(moments.trace, 0.0)
        weight = norms.examples / (self._level or trace or 1.0)
        self._level = (self._level + trace) / 2.0 if self._level else trace
        self._running = [
            averaged(
                running,
                moments,
                weight,
                norms.examples,
                norms.count,
                self._level,
            )
            for running in self._running
        ]
        one, freedom = inverse_rank(norms, moments)
        if freedom:
            keep = 1.0 - 1.0 / _RANK_MEASUREMENTS
            total, known = self._rank
            self._rank = (keep * total + freedom * one, keep * known + freedom)

    def _pass(self):
        """Lets the examples since the last measurement pass."""
        since, self._since = self._since, 0.0
        spacing = (self._spacing + since) / 2.0 if self._spacing else since
        self._spacing = spacing
        self._running = [
            decayed(running, since, max(horizon, fewest * spacing))
            for running, horizon, fewest in zip(
                self._running, self.horizons, self.measurements
            )
        ]

    def estimate(self):
        """Returns the `NoiseScaleEstimate` of the best horizon."""
        total, freedom = self._rank
        rank_inverse = total / freedom if freedom else 0.0
        for running in self._running:
            candidate = estimate(running, rank_inverse, freedom)
            if candidate.resolved:
                return candidate
        return candidate

    def get_state(self):
        """Returns the state as plain JSON types."""
        return {
            "horizons": list(self.horizons),
            "running": [list(running) for running in self._running],
            "rank": list(self._rank),
            "level": self._level,
            "since": self._since,
            "spacing": self._spacing,
            "skipped": self.skipped,
        }

    def set_state(self, state):
        """Takes over what `get_state` returned."""
        self.horizons = tuple(state["horizons"])
        self._running = [RunningMoments(*sums) for sums in state["running"]]
        self._rank = tuple(state["rank"])
        self._level = state["level"]
        self._since = state["since"]
        self._spacing = state["spacing"]
        self.skipped = state["skipped"]
