"""The warning of a loss that is not finite. Part of `train_function.py`."""

import math
import warnings


def warn_once(measurement, batch_size, where, has_warned):
    """Warns the first time that a loss is not finite.

    Args:
        measurement: The `Measurement` of a superbatch.
        batch_size: Integer, examples per update.
        where: Tuple of the epoch and the Keras step in it, counted from zero,
            and the updates made in this `fit` before.
        has_warned: Whether the warning was given already.

    Returns:
        Bool, whether it is given by now.
    """
    if measurement.loss is None or math.isfinite(measurement.loss):
        return has_warned
    if not has_warned:
        epoch, step, updates = where
        warnings.warn(
            f"The loss became {measurement.loss} in step {step + 1} of epoch "
            f"{epoch + 1}, between updates {updates + 1} and "
            f"{updates + measurement.updates}. The batch size is held at "
            f"{batch_size} while it is not finite.",
            RuntimeWarning,
            stacklevel=3,
        )
    return True
