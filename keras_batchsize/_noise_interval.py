"""Running averages of both moments, and the interval of their ratio.

Part of `noise.py`: from decayed sums to a `NoiseScaleEstimate`.
"""

import dataclasses
import math
from typing import NamedTuple

# The normal quantile of a 95 % interval.
_NORMAL_QUANTILE = 1.96


class RunningMoments(NamedTuple):
    """Decayed sums over measurements with weights w.

    Dividing by `weight` removes the bias of a young average exactly, whatever
    the decays were in between. The last four are variances of the first two,
    times the effective rank; with M examples in n parts and t the level of
    tr(Σ), a measurement of Gaussian noise has

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
            the interval is finite, and tr(Σ) is positive. Nothing may be
            decided on an estimate that is not resolved.
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
    if not (x > 0.0 and significant > 0.0 and y > 0.0):
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
