"""The warning of a loss that is not finite. Part of `train_function.py`."""

import math
import warnings


def warn_of_loss(function, measurement, has_warned):
    """Warns the first time that a loss is not finite.

    Args:
        function: The `AdaptiveTrainFunction`.
        measurement: The `Measurement` of a superbatch, not yet observed.
        has_warned: Whether the warning was given already.

    Returns:
        Bool, whether it is given by now.
    """
    if measurement.loss is None or math.isfinite(measurement.loss):
        return has_warned
    if not has_warned:
        before = function.tally.of(function.controller)["updates"]
        # None may have been finished yet, and the next one is not finite.
        last = before + max(measurement.updates, 1)
        warnings.warn(
            f"The loss became {measurement.loss} in step "
            f"{function.steps.done + 1} of epoch {function.epoch + 1}, between "
            f"updates {before + 1} and {last}. The batch size is held at "
            f"{function.controller.batch_size} while it is not finite.",
            RuntimeWarning,
            stacklevel=3,
        )
    return True
