"""What a finished training has to say: part of `controller.py`."""

import math

from keras_batchsize import throughput
from keras_batchsize.noise import UNKNOWN
from keras_batchsize.plan import Ladder
from keras_batchsize.plan import largest_on_ladder

# Where examples cost next to nothing, goodput need not have a maximum.
_LARGEST_RECOMMENDED = 2**20


def recommended_batch_size(controller):
    """Returns the size that the measurements speak for, on no bounds.

    That of the largest goodput, among the sizes of an endless ladder, if more
    than one size was timed, else the next to the noise scale itself
    (McCandlish et al. 2018: there, updates and examples are each twice their
    minimum).

    Args:
        controller: A `Controller`.

    Returns:
        Integer; None while the noise scale is not resolved.
    """
    estimate, step_time = controller.noise_scale, controller.step_time
    if not estimate.resolved:
        return None
    if step_time is None or step_time.guessed:
        return largest_on_ladder(
            controller.ladder.base,
            estimate.value * math.sqrt(2.0),
            controller.replicas,
        )
    return _size_of_largest_goodput(controller, step_time, estimate.value)


def _size_of_largest_goodput(controller, step_time, noise_scale):
    """Grows B₀ while that speeds up; goodput has one maximum only."""
    base = size = controller.ladder.base
    most = max(base, _LARGEST_RECOMMENDED)
    ladder = Ladder(base, base, most, replicas=controller.replicas)
    for larger in ladder.sizes[1:]:
        if 1.0 >= throughput.speedup(
            size,
            larger,
            step_time,
            noise_scale,
            controller.clock.batch_size,
            controller.efficiency,
        ):
            break
        size = larger
    return size


def why_unchanged(controller):
    """Returns a few words on why the size is what it is.

    Args:
        controller: A `Controller` whose size never changed.
    """
    if controller.policy.needs_noise and not controller.noise_scale.resolved:
        if controller.noise_scale is not UNKNOWN:
            return "the noise scale could not be told from infinity"
        return "no noise was measured, which takes two whole superbatches"
    if len(controller.ladder.sizes) == 1:
        return "the bounds leave one size only"
    return "no other size was better"
