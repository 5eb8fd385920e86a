"""What a state must be that a training goes on from. Part of `controller.py`.

A state comes from a file as a rule, which may be of another version, of
something else, or written by hand.
"""

import numbers
from collections.abc import Callable
from typing import NamedTuple


class _Kind(NamedTuple):
    """What a value of a state must be.

    Attributes:
        name: In words.
        holds: Function that says whether a value is one.
    """

    name: str
    holds: Callable


def _is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_count(value):
    return (
        isinstance(value, numbers.Integral)
        and not isinstance(value, bool)
        and value >= 0
    )


def _is_list_of(holds, value):
    return isinstance(value, (list, tuple)) and all(map(holds, value))


def _are_numbers(value):
    return _is_list_of(_is_number, value)


def _are_timings(value):
    return isinstance(value, dict) and all(
        str(size).isdecimal() and _are_numbers(seconds)
        for size, seconds in value.items()
    )


_SIZE = _Kind("a positive integer", lambda one: _is_count(one) and one > 0)
_SIZE_IF_ANY = _Kind(
    "a positive integer or None",
    lambda one: one is None or _SIZE.holds(one),
)
_COUNT = _Kind("an integer, at least 0", _is_count)
_NUMBER = _Kind("a number", _is_number)
_KNOWN = _Kind("a number or None", lambda one: one is None or _is_number(one))
_FLAG = _Kind("True or False", lambda one: isinstance(one, bool))
_PAIR = _Kind(
    "a list of two integers",
    lambda one: _is_list_of(_is_count, one) and len(one) == 2,
)
_NUMBERS = _Kind("a list of numbers", _are_numbers)
_TABLE = _Kind(
    "a list of lists of numbers",
    lambda one: _is_list_of(_are_numbers, one),
)
_IF_ANY = _Kind(
    "a list of numbers or None",
    lambda one: one is None or _are_numbers(one),
)
_THREE_IF_ANY = _Kind(
    "a list of three numbers or None",
    lambda one: one is None or _are_numbers(one) and len(one) == 3,
)
_TIMINGS = _Kind("a dict from sizes to lists of seconds", _are_timings)
_ANYTHING = _Kind("what the policy takes", lambda one: True)

_STATE = {
    "base_batch_size": _SIZE,
    "superbatch_size": _SIZE,
    "batch_size": _SIZE,
    "largest_micro_batch_size": _KNOWN,
    "examples": _COUNT,
    "updates": _COUNT,
    "base_steps": _COUNT,
    "clock": {
        "steps": _COUNT,
        "examples": _COUNT,
        "epoch_length": _COUNT,
    },
    "epoch": _COUNT,
    "changed_at": _PAIR,
    "known_noise_scale": _KNOWN,
    "healthy": _FLAG,
    "loss": _KNOWN,
    "learning_rate": _KNOWN,
    "replicas": _SIZE,
    "timings": _TIMINGS,
    "expected": _THREE_IF_ANY,
    "measuring": {
        "_elapsed": _NUMBER,
        "_spent": _NUMBER,
        "_costs": _NUMBERS,
        "_counts": _NUMBERS,
        "_taken": _COUNT,
        "_updates": _COUNT,
        "_superbatches": _COUNT,
    },
    "noise": {
        "horizons": _NUMBERS,
        "running": _TABLE,
        "rank": _NUMBERS,
        "level": _NUMBER,
        "since": _NUMBER,
        "spacing": _NUMBER,
        "unpaired": _IF_ANY,
        "skipped": _COUNT,
    },
    "policy": _ANYTHING,
    "before_try": _SIZE_IF_ANY,
}


def check_state(state):
    """Raises if a state is none that `Controller.get_state` returns.

    Args:
        state: What the caller passed.

    Raises:
        TypeError: If it, or a value in it, is of another kind.
        ValueError: If keys are missing, or are not known.
    """
    _check(state, _STATE, "state")


def _check(value, expected, name):
    if not isinstance(expected, dict):
        if not expected.holds(value):
            _refuse(TypeError, f"{name}={value!r:.80}, not {expected.name}")
        return
    if not isinstance(value, dict):
        kind = type(value).__name__
        _refuse(TypeError, f"{name}={value!r:.80} of type {kind}, not a dict")
    missing = sorted(expected.keys() - value.keys())
    unknown = sorted(map(str, value.keys() - expected.keys()))
    if missing or unknown:
        parts = [
            f"{word} {', '.join(map(repr, keys))}"
            for word, keys in (("without", missing), ("with", unknown))
            if keys
        ]
        _refuse(ValueError, f"{name} {' and '.join(parts)}")
    for key, kind in expected.items():
        _check(value[key], kind, f"{name}[{key!r}]")


def _refuse(error, received):
    raise error(
        "`state` must be what `get_state` of this version returned: training "
        f"goes on from it. Received: {received}. Use "
        "set_state(trainer.get_state()), or set_state({}) to start anew."
    )
