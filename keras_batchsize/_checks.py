"""Checks of arguments, with error texts that say how to mend the call.

Every text has three parts: the constraint and why it exists, what was
received under the name the caller used, and an edit that helps.
"""

import importlib
import math
import numbers


def positive_int(name, value, why, remedy):
    """Returns `value` as int, or raises if it is not a positive integer.

    Args:
        name: Argument name as the caller wrote it.
        value: What was received.
        why: Why the constraint exists, a clause without a full stop.
        remedy: The edit that mends the call, a whole sentence.

    Returns:
        `value` as a Python int.

    Raises:
        TypeError: If `value` is not an integer.
        ValueError: If `value` is smaller than 1.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"`{name}` must be an integer: {why}. "
            f"Received: {name}={value!r}. {remedy}"
        )
    if value < 1:
        raise ValueError(
            f"`{name}` must be at least 1: {why}. "
            f"Received: {name}={value}. {remedy}"
        )
    return int(value)


def real(name, value, low, high, why, remedy):
    """Returns `value` as float, or raises if it is not within [low, high]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"`{name}` must be a number: {why}. "
            f"Received: {name}={value!r}. {remedy}"
        )
    if not low <= value <= high or math.isnan(value):
        raise ValueError(
            f"`{name}` must be between {low:g} and {high:g}: {why}. "
            f"Received: {name}={value}. {remedy}"
        )
    return float(value)


def enough_examples(number, received):
    """Raises if there are too few examples to tell noise from signal.

    Args:
        number: Integer, how many there are at most.
        received: What holds them, in words.

    Raises:
        ValueError: If there are fewer than two.
    """
    if number < 2:
        raise ValueError(
            "The data must hold at least 2 examples: gradient noise is how "
            f"examples differ. Received: {received} with {number} examples. "
            "Pass more data."
        )


def known(name, value, choices, why):
    """Returns `value`, or raises with the list of known names."""
    if value not in [*choices]:
        listed = ", ".join(f'"{choice}"' for choice in sorted(choices))
        raise ValueError(
            f"`{name}` must be one of {listed}: {why}. "
            f"Received: {name}={value!r}. Use one of these names."
        )
    return value


def module_that_draws(name, method):
    """Imports a module that needs matplotlib.

    Args:
        name: Full name of the module.
        method: What draws by it, as the caller wrote it.

    Returns:
        The module.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"`{method}` needs matplotlib, which is optional. Received: "
            f'{error}. Install it with `pip install "keras-batchsize[plot]"`.'
        ) from error
