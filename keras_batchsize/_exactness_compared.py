"""Two losses compared, that may be random. Part of `exactness.py`."""

from typing import NamedTuple

import numpy as np

# A loss that is random in inference, too, is drawn so often, and is refused
# if the means lie so many standard errors apart. Of means that are equal three
# in 100,000 do, by Student's distribution of 14 degrees of freedom.
_DRAWS = 8
_ERRORS = 6.0


class Difference(NamedTuple):
    """Two losses that ought to be equal and are not.

    Attributes:
        one: The first, or the mean of several draws of it.
        other: The second.
        how: A few words that say so, "" if there was one draw.
    """

    one: float
    other: float
    how: str


def compared(draw_one, draw_other, tolerance, is_never=np.zeros_like):
    """Compares two losses, and the terms of them, that may be random.

    One draw of each is compared, and the first is drawn again: models are
    rarely random in inference, and each draw takes time. Where they differ,
    several draws of both tell: of a loss that is not random all agree, and
    the difference stands; of one that is, the difference of the means is
    measured by Welch's standard error. A term says more than the whole, in
    whose spread it may drown.

    Args:
        draw_one: Function that returns the first loss and terms of it.
        draw_other: Function that returns the second and its terms.
        tolerance: Difference that rounding makes, relative to the loss.
        is_never: Function from second losses to which of them no first one
            that is finite can equal. None by default, whatever they are.

    Returns:
        A `Difference`, or None if they are equal as far as can be told.
    """
    ones, others = [draw_one(), draw_one()], [draw_other()]
    if not np.all(np.isfinite(ones)):
        return None  # Infinities prove nothing.
    rounding = tolerance * abs(ones[0][0]) + 1e-6
    is_random = not np.array_equal(*ones)
    if not is_random and np.all(np.abs(ones[0] - others[0]) <= rounding):
        return None
    ones += [draw_one() for _ in range(_DRAWS - len(ones))]
    others += [draw_other() for _ in range(_DRAWS - len(others))]
    with np.errstate(invalid="ignore"):
        return _difference(np.array(ones), np.array(others), rounding, is_never)


def _difference(ones, others, rounding, is_never):
    """Compares several draws, arrays of shape (draws, terms)."""
    one, other = ones.mean(axis=0), others.mean(axis=0)
    variance = np.var(ones, axis=0, ddof=1) + np.var(others, axis=0, ddof=1)
    errors = _ERRORS * np.sqrt(variance / _DRAWS)
    # NaN, where a draw was not finite, is never positive.
    excess = np.abs(one - other) - np.maximum(rounding, errors)
    never = np.all(is_never(others), axis=0) & np.isfinite(one)
    if not np.any((excess > 0.0) | never):
        return None
    is_random = np.any(np.ptp([ones, others], axis=1) > 0.0)
    how = f", in the mean of {_DRAWS} draws: it is random" if is_random else ""
    return Difference(one[0], other[0], how)
