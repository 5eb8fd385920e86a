"""The warning of a loss that is not finite. Part of `train_function.py`."""

import math
import warnings


def warn_once(measurement, batch_size, updates, has_warned):
    """Warns the first time that a loss is not finite.

    Args:
        measurement: The `Measurement` of a superbatch.
        batch_size: Integer, examples per update.
        updates: Integer, updates made in this `fit` before.
        has_warned: Whether the warning was given already.

    Returns:
        Bool, whether it is given by now.
    """
    if measurement.loss is None or math.isfinite(measurement.loss):
        return has_warned
    if not has_warned:
        warnings.warn(
            f"The loss became {measurement.loss} between updates "
            f"{updates + 1} and {updates + measurement.updates}. The batch "
            f"size is held at {batch_size} while it is not finite.",
            RuntimeWarning,
            stacklevel=3,
        )
    return True
