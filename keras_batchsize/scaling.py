"""By how much the learning rate changes when the batch size does.

A rule is a function `factor(ratio, noise_scale) -> float` with ratio = B/B₀:
what the user's learning rate, meant for B₀ examples, is multiplied by for
updates of B examples. To add a rule, write the function and list it in
`RULES`.
"""

import functools
import math

from keras_batchsize import _checks


def linear(ratio, noise_scale=None):
    """The linear rule, factor = B/B₀.

    Goyal et al. 2017 (arXiv:1706.02677), Sec. 2.1. Meant for SGD while the
    batch is smaller than the noise scale.

    Args:
        ratio: B/B₀, positive float.
        noise_scale: Not used.

    Returns:
        Float factor for the learning rate.
    """
    del noise_scale
    return float(ratio)


def sqrt(ratio, noise_scale=None):
    """The square-root rule, factor = √(B/B₀).

    Krizhevsky 2014 (arXiv:1404.5997), and, for Adam, Malladi et al.
    2022 (arXiv:2205.10287): adaptive optimizers divide by the size of the
    noise, so only its square root is left to scale.

    Args:
        ratio: B/B₀, positive float.
        noise_scale: Not used.

    Returns:
        Float factor for the learning rate.
    """
    del noise_scale
    return math.sqrt(ratio)


def adascale(ratio, noise_scale=None):
    """The AdaScale gain, factor = s(φ + B₀)/(φ + s·B₀) with s = B/B₀.

    Johnson et al. 2020 (arXiv:2007.05105), App. B.3, written with the noise
    scale. It is also the ratio of optimal rates of McCandlish et al. 2018,
    eq. 2.6. Between 1 (no noise: a larger batch teaches nothing more) and s
    (all noise: the linear rule).

    Args:
        ratio: s = B/B₀, positive float.
        noise_scale: φ/B₀, the noise scale in units of the base batch size.
            None or NaN, not known, counts as 0: without evidence of noise the
            rate is left alone.

    Returns:
        Float factor for the learning rate.
    """
    if noise_scale is None or math.isnan(noise_scale):
        noise_scale = 0.0
    if math.isinf(noise_scale):
        return float(ratio)
    return ratio * (noise_scale + 1.0) / (noise_scale + ratio)


def none(ratio, noise_scale=None):
    """Leaves the learning rate alone, factor = 1."""
    del ratio, noise_scale
    return 1.0


RULES = {"linear": linear, "sqrt": sqrt, "adascale": adascale, "none": none}

# With any other rule, a function of the user's too, the noise is measured.
NEED_NO_NOISE = (linear, sqrt, none)


def get(rule, auto, name="learning_rate_scaling"):
    """Resolves a rule given by name or as a function.

    Args:
        rule: A name in `RULES`, "auto", or a function
            `factor(ratio, noise_scale) -> float`.
        auto: The name that "auto" stands for.
        name: What the caller calls the argument.

    Returns:
        The function.

    Raises:
        ValueError: If the name is not known.
        TypeError: If `rule` is neither a name nor a function.
    """
    if callable(rule):
        return rule
    if not isinstance(rule, str):
        raise TypeError(
            f"`{name}` must be the name of a rule or a function "
            "factor(ratio, noise_scale) -> float: it is called at each change "
            f"of the batch size. Received: {name}={rule!r} of type "
            f'{type(rule).__name__}. Use "auto".'
        )
    _checks.known(
        name,
        rule,
        [*RULES, "auto"],
        "it names how the rate follows the batch size",
    )
    return RULES[auto if rule == "auto" else rule]


def name_of(rule):
    """Returns what to call a rule, for messages and the report.

    Args:
        rule: What `get` returned: any callable, so that it may be without a
            name of its own.
    """
    if isinstance(rule, functools.partial):
        return name_of(rule.func)
    return getattr(rule, "__name__", type(rule).__name__)


def warmed_up(factor, progress):
    """The gradual warm-up: from 1 to `factor` in a straight line.

    Goyal et al. 2017, Sec. 2.2.

    Args:
        factor: What the rule says.
        progress: Share of the warm-up that is done, from 0 to 1; a float or a
            tensor.

    Returns:
        The factor in force, of the type of `progress`.
    """
    return 1.0 + (factor - 1.0) * progress
