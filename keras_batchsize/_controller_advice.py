"""What a finished training has to say: part of `controller.py`."""

import math

from keras_batchsize import throughput
from keras_batchsize.plan import largest_on_ladder


def recommended_batch_size(controller):
    """Returns the size that the measurements speak for, on no bounds.

    The time-optimal size if more than one size was timed, else the noise
    scale itself (McCandlish et al. 2018: there, updates and examples are each
    twice their minimum), rounded to B₀·2ᵏ.

    Args:
        controller: A `Controller`.

    Returns:
        Integer; None while the noise scale is not resolved.
    """
    estimate, step_time = controller.noise_scale, controller.step_time
    if not estimate.resolved:
        return None
    wanted = estimate.value
    if step_time is not None and not step_time.guessed:
        wanted = throughput.time_optimal_batch_size(step_time, wanted)
    if math.isinf(wanted):
        return controller.ladder.sizes[-1]
    return largest_on_ladder(controller.ladder.base, wanted * math.sqrt(2.0))


def why_unchanged(controller):
    """Returns a few words on why the size is what it is.

    Args:
        controller: A `Controller` whose size never changed.
    """
    if controller.policy.needs_noise and not controller.noise_scale.resolved:
        return "the noise scale was not resolved from zero"
    if len(controller.ladder.sizes) == 1:
        return "the bounds leave one size only"
    return "no other size was better"
