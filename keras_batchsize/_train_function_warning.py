"""The warning of a loss that is not finite. Part of `train_function.py`."""

import math
import warnings


def warn_once(measurement, controller, has_warned):
    """Warns the first time that a loss is not finite.

    Args:
        measurement: The `Measurement` of a superbatch.
        controller: The `Controller`, before it takes it in.
        has_warned: Whether the warning was given already.

    Returns:
        Bool, whether it is given by now.
    """
    if measurement.loss is None or math.isfinite(measurement.loss):
        return has_warned
    if not has_warned:
        warnings.warn(
            f"The loss became {measurement.loss} between updates "
            f"{controller.updates + 1} and "
            f"{controller.updates + measurement.updates}. The batch size is "
            f"held at {controller.batch_size} while it is not finite.",
            RuntimeWarning,
            stacklevel=3,
        )
    return True
