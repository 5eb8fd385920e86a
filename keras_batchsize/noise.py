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

from keras_batchsize._noise_interval import UNKNOWN
from keras_batchsize._noise_interval import NoiseScaleEstimate
from keras_batchsize._noise_interval import RunningMoments
from keras_batchsize._noise_interval import averaged
from keras_batchsize._noise_interval import decayed
from keras_batchsize._noise_interval import estimate

__all__ = [
    "UNKNOWN",
    "GradientMoments",
    "MicroBatchNorms",
    "NoiseScaleEstimate",
    "NoiseScaleEstimator",
    "gradient_moments",
    "inverse_rank",
    "inverse_rank_of_pair",
]

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
    n·tr(Σ)/B. They hold, too, for disjoint micro-batches, drawn without
    replacement from D examples: tr(Σ) is then the examples' variance with D-1
    in the denominator, and ‖G‖² smaller by tr(Σ)/D than that of their mean
    gradient. Both are unbiased for the distribution that the D examples were
    drawn from, so the finite population needs no correction.

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


def inverse_rank_of_pair(squared_norms, examples, count, level, signal):
    """Estimates 1/r from how ‖G‖² differs between two updates in a row.

    From the replicas of an update comes one inner product, which says nothing
    about how precise it is; two say something. Half of their squared
    difference has the mean Var ‖G‖² = (2n/(n-1)·(t/M)² + 4‖G‖²·t/M)/r, see
    `RunningMoments`, and more where ‖G‖² itself has changed in between: then
    the precision is understated, never overstated.

    Args:
        squared_norms: Pair of estimates of ‖G‖² from two updates.
        examples: Examples M of each of them.
        count: Number n of replicas.
        level: Level t of tr(Σ), positive.
        signal: Average of ‖G‖² so far.

    Returns:
        Float, with one degree of freedom.
    """
    first, second = squared_norms
    share = level / examples
    variance = 2.0 * count / (count - 1) * share**2
    variance += 4.0 * max(signal, 0.0) * share
    return (first - second) ** 2 / 2.0 / variance


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
        # ‖G‖², examples and count of an update that waits for another.
        self._unpaired = None
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
        before = self._level or moments.trace
        if before <= 0.0:
            return  # Parts that do not differ: there is no noise to speak of.
        if moments.trace > 0.0:
            self._level = (before + moments.trace) / 2.0
        weight = norms.examples / before
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
        if norms.products is None:
            one, freedom = self._inverse_rank_of_pair(norms, moments)
        if freedom:
            keep = 1.0 - 1.0 / _RANK_MEASUREMENTS
            total, known = self._rank
            self._rank = (keep * total + freedom * one, keep * known + freedom)

    def _inverse_rank_of_pair(self, norms, moments):
        """Pairs updates of the same size; (0, 0) while one waits."""
        kind = (norms.examples, norms.count)
        waiting, self._unpaired = self._unpaired, None
        if waiting is None or tuple(waiting[1:]) != kind:
            self._unpaired = (moments.squared_norm, *kind)
            return 0.0, 0.0
        running = self._running[0]
        pair = waiting[0], moments.squared_norm
        signal = running.squared_norm / running.weight
        return inverse_rank_of_pair(pair, *kind, self._level, signal), 1.0

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
            "unpaired": self._unpaired and list(self._unpaired),
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
        waiting = state["unpaired"]
        self._unpaired = waiting and tuple(waiting)
        self.skipped = state["skipped"]
