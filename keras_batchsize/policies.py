"""Which batch size training should use next.

A policy answers one question, `wish(status)`: how many examples should an
update have, given what is known. It is small, usually stateless, and knows
nothing of ladders, bounds or waiting; `next_batch_size` applies those to all
policies alike. To add a policy, subclass `BatchSizePolicy` and list it in
`POLICIES`.
"""

import math

from keras_batchsize import _checks
from keras_batchsize import throughput
from keras_batchsize._policies_base import BatchSizePolicy
from keras_batchsize._policies_base import Status
from keras_batchsize._policies_base import at_noise
from keras_batchsize._policies_base import efficiency_under
from keras_batchsize._policies_base import next_batch_size
from keras_batchsize._policies_stated import BatchSizeSchedule
from keras_batchsize._policies_stated import Fixed
from keras_batchsize._policies_stated import GrowOnPlateau
from keras_batchsize.throughput import StepTime

__all__ = [
    "CABS",
    "POLICIES",
    "BatchSizePolicy",
    "BatchSizeSchedule",
    "CosineSimilarity",
    "Fixed",
    "Goodput",
    "GradientDiversity",
    "GrowOnPlateau",
    "Measure",
    "NoiseScale",
    "NormTest",
    "Status",
    "at_noise",
    "efficiency_under",
    "get",
    "next_batch_size",
]


class Goodput(BatchSizePolicy):
    """The size that trains fastest: throughput x statistical efficiency.

    Goodput (Qiao et al. 2021, Pollux, OSDI, Sec. 3) is examples per second
    times progress per example. The latter depends on what the learning
    rate does: under the linear rule it is `throughput.linear_efficiency`;
    else it is Pollux's (φ + B₀)/(φ + B), with which goodput is largest at
    √(φ·a/c) if an update takes a + c·B seconds. The size changes only if
    the speed-up predicted for the change reaches `min_speedup`.

    While one size only has been timed, c is taken for zero: a larger size is
    tried unless it could not pay even then. From two sizes on the line is
    known, but may say too little of a third one: on a CPU an example got
    cheaper with every doubling. So a larger size is also tried once where the
    middle between what the line says and c = 0 would pay. Where a size turns
    out slower than the one before, by the times of both, training goes back.

    Args:
        min_speedup: Smallest speed-up worth a change; 1.05 is 5 %.
    """

    for_speed = True

    def __init__(self, min_speedup=1.05):
        self.min_speedup = _checks.real(
            "min_speedup",
            min_speedup,
            1.0,
            10.0,
            "below 1 a change would slow training down",
            "Use 1.05.",
        )

    def wish(self, status):
        """Returns the neighbouring size with the largest goodput."""
        step_time = status.step_time
        if step_time is None:
            return status.batch_size
        if step_time.guessed:
            step_time = _free(step_time)
        gains = {
            size: _speedup(status, size, step_time)
            for size in (status.smaller, status.larger)
        }
        best = max(gains, key=gains.get)
        return best if gains[best] >= self.min_speedup else status.batch_size

    def is_worth_a_try(self, status):
        """Returns whether the line and the best case together speak for it."""
        if status.step_time is None:
            return False
        by_the_line, at_best = (
            _speedup(status, status.larger, step_time)
            for step_time in (status.step_time, _free(status.step_time))
        )
        return math.sqrt(by_the_line * at_best) >= self.min_speedup


def _free(step_time):
    """The same if an example cost nothing, as long as it is in one piece."""
    # Of any length: only ratios of times matter.
    return StepTime(1.0, 0.0, step_time.largest)


def _speedup(status, size, step_time):
    return throughput.speedup(
        status.batch_size,
        size,
        step_time,
        status.noise_scale,
        status.reference_batch_size,
        status.efficiency,
    )


class NoiseScale(BatchSizePolicy):
    """A fixed multiple of the noise scale, B = factor·φ.

    McCandlish et al. 2018 (arXiv:1812.06162), φ by their eq. 2.9: at B = φ
    training needs twice the examples and twice the updates of the respective
    minimum (their eqs. 2.11 and 2.12). On image classifiers φ was 2 to 8 times
    the measured critical batch size (their Table 1), which speaks for a factor
    below one there.

    Args:
        factor: Batch size in units of the noise scale.
    """

    def __init__(self, factor=1.0):
        self.factor = _checks.real(
            "factor",
            factor,
            1e-6,
            1e6,
            "the batch size is this multiple of the noise scale",
            "Use 1.0, or 0.25 for fewer examples in all.",
        )

    def wish(self, status):
        """Returns factor·φ."""
        return self.factor * status.noise_scale


class NormTest(BatchSizePolicy):
    """The norm test: the error of the gradient at most `eta` of its norm.

    Byrd et al. 2012 (Math. Program. 134), eq. 3.9: tr(Σ)/B <= η²‖G‖²,
    that is B >= φ/η². The test in its usual form divides by the squared norm of
    the batch gradient, which contains the noise it is compared with, so that
    no η >= 1 could ever grow the batch; here ‖G‖² is the unbiased estimate.
    As in the paper, the size never shrinks.

    Args:
        eta: Largest relative error of a batch gradient.
    """

    def __init__(self, eta=1.0):
        self.eta = _checks.real(
            "eta",
            eta,
            1e-3,
            1e3,
            "it is the relative error allowed in a gradient",
            "Use 1.0.",
        )

    def wish(self, status):
        """Returns φ/η², or the present size if that is larger."""
        return max(status.batch_size, status.noise_scale / self.eta**2)


class CosineSimilarity(BatchSizePolicy):
    """Two halves of a batch point the same way up to a cosine of `target`.

    Qin et al. 2021 (SimiGrad, NeurIPS). The cosine between the
    gradients of two halves is 1/(1 + 2φ/B) on average, hence
    B = 2φ·target/(1 - target). Using the moments instead of the cosine of
    each step avoids its bias where the noise is large.

    Args:
        target: Wanted cosine, between 0 and 1.
    """

    def __init__(self, target=0.5):
        self.target = _checks.real(
            "target",
            target,
            0.01,
            0.99,
            "it is a cosine between the gradients of two half batches",
            "Use 0.5, which is B = 2 x noise scale.",
        )

    def wish(self, status):
        """Returns 2φ·target/(1 - target)."""
        odds = self.target / (1.0 - self.target)
        return 2.0 * status.noise_scale * odds


class CABS(BatchSizePolicy):
    """Coupled adaptive batch size: B = c·(learning rate)·tr(Σ)/loss.

    Balles et al. 2017 (UAI; arXiv:1612.05086), eq. 22. Derived for plain SGD
    on a loss whose minimum is near zero.

    Args:
        constant: c, dimensionless.
    """

    def __init__(self, constant=1.0):
        self.constant = _checks.real(
            "constant",
            constant,
            1e-6,
            1e6,
            "the batch size is proportional to it",
            "Use 1.0.",
        )

    def wish(self, status):
        """Returns c·lr·tr(Σ)/loss, or the present size without a loss."""
        if not status.loss > 0.0:
            return status.batch_size
        noise = status.learning_rate * max(status.trace, 0.0)
        return self.constant * noise / status.loss

    def reason(self, status):
        """Names the two quantities of the formula."""
        return f"gradient variance {status.trace:.3g}, loss {status.loss:.3g}"


class GradientDiversity(BatchSizePolicy):
    """A multiple of the gradient diversity, B = delta·(1 + φ).

    Yin et al. 2018 (AISTATS; arXiv:1706.05699): mini-batch SGD converges as
    single-example SGD does while B is below a fraction of n·Δ, their
    batch-size bound, where n·Δ = n·Σ‖gᵢ‖²/‖Σgᵢ‖² is 1 + φ for the data as a
    whole. DiveBatch (Chen et al. 2025; arXiv:2509.16173) re-estimates it
    during training.

    Args:
        delta: Fraction of the diversity bound to use.
    """

    def __init__(self, delta=0.1):
        self.delta = _checks.real(
            "delta",
            delta,
            1e-6,
            1e6,
            "the batch size is this fraction of the diversity bound",
            "Use 0.1.",
        )

    def wish(self, status):
        """Returns delta·(1 + φ)."""
        return self.delta * (1.0 + status.noise_scale)


class Measure(BatchSizePolicy):
    """Changes nothing and measures: for looking before adapting."""

    def wish(self, status):
        """Returns the present size."""
        return status.batch_size


POLICIES = {
    "goodput": Goodput,
    "noise_scale": NoiseScale,
    "norm_test": NormTest,
    "cosine": CosineSimilarity,
    "cabs": CABS,
    "diversity": GradientDiversity,
    "plateau": GrowOnPlateau,
    "fixed": Fixed,
    "measure": Measure,
}


def get(policy):
    """Resolves a policy given by name or as an object.

    Args:
        policy: A name in `POLICIES` or a `BatchSizePolicy`.

    Returns:
        A `BatchSizePolicy`.

    Raises:
        ValueError: If the name is not known.
        TypeError: If it is neither a name nor a policy.
    """
    if isinstance(policy, BatchSizePolicy):
        return policy
    if not isinstance(policy, str):
        raise TypeError(
            "`policy` must be a name or a `BatchSizePolicy`: it decides the "
            f"batch size. Received: policy={policy!r} of type "
            f'{type(policy).__name__}. Use policy="goodput".'
        )
    _checks.known(
        "policy", policy, POLICIES, "it names who decides the batch size"
    )
    return POLICIES[policy]()
