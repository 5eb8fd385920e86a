"""What a user's own classes and functions do, told by their code.

A configuration names them only, and two that do something else may have one
name: functions that were made by a function, or a class before and after it
was edited. Names of files and numbers of lines do not count.
"""

import inspect
import sys
import types

# These change with their versions, not with what the user writes.
_LIBRARIES = {
    "builtins",
    "functools",
    "keras",
    "keras_batchsize",
    "keras_tuner",
    "numpy",
    "tensorflow",
}
PLAIN = (type(None), bool, int, float, complex, str, bytes)


def is_own(thing):
    """Whether a class or function was not made by Keras or TensorFlow.

    Args:
        thing: A class or function.
    """
    module = getattr(thing, "__module__", None) or "builtins"
    return module.partition(".")[0] not in _LIBRARIES


def of_class(kind, describe, known=None):
    """Returns what the own parts of a class do, as JSON values.

    Args:
        kind: A class.
        describe: Function from what its functions hold to JSON values.
        known: List of what is described already, which grows.
    """
    known = [] if known is None else known
    known.append(kind)
    found = []
    for one in filter(is_own, kind.__mro__):
        found.append(one.__qualname__)
        for name, value in sorted(vars(one).items()):
            function = _function_in(value)
            if function is not None:
                found.append([name, of_function(function, describe, known)])
            elif _is_plain(value) and not name.startswith("__"):
                found.append([name, _constant(value)])
    return found


def names_used(kind):
    """Returns the names that the own code of a class uses, as a set.

    Those apart that are only assigned when an object is made.

    Args:
        kind: A class.
    """
    functions = [
        _function_in(value)
        for one in filter(is_own, kind.__mro__)
        for name, value in vars(one).items()
        if name != "__init__"
    ]
    return {
        name
        for function in functions
        if function is not None
        for code in _codes(function.__code__)
        for name in code.co_names
    }


def of_function(function, describe, known=None):
    """Returns what a function does, as JSON values.

    Args:
        function: A function.
        describe: Function from what it holds, by default or from where it
            was made, to JSON values.
        known: List of what is described already, which grows: it may call
            itself.
    """
    known = [] if known is None else known
    if function in known:
        return known.index(function)
    known.append(function)
    found = [_lines(function.__code__)]
    # Constants and helpers of its module, which it uses by name.
    for code in _codes(function.__code__):
        found += _named(code.co_names, function.__globals__, describe, known)
    for name, value in _held(function):
        if isinstance(value, types.FunctionType):
            found.append([name, of_function(value, describe, known)])
        else:
            found.append([name, describe(value)])
    return found


def _named(names, held, describe, known):
    """Returns what names stand for in a module, as far as code may use them.

    Of objects other than constants, functions, classes and modules nothing is
    told: whoever changes these needs a new folder.
    """
    found = []
    for name in names:
        value = held.get(name)
        if isinstance(value, types.FunctionType) and is_own(value):
            found.append([name, of_function(value, describe, known)])
        elif isinstance(value, type) and _is_users(value.__module__):
            if value not in known:
                found.append([name, of_class(value, describe, known)])
        elif isinstance(value, types.ModuleType):
            if _is_users(value.__name__) and vars(value) is not held:
                used = [one for one in names if one != name]
                used = _named(used, vars(value), describe, known)
                found.append([name, used])
        elif value is not None and _is_plain(value):
            found.append([name, _constant(value)])
    return found


def _is_users(module):
    top = module.partition(".")[0]
    return top not in _LIBRARIES and top not in sys.stdlib_module_names


def _is_plain(value, depth=8):
    """Whether a value is all that its text says."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (tuple, list, set, frozenset)):
        # One that contains itself has no end.
        return depth > 0 and all(_is_plain(one, depth - 1) for one in value)
    return isinstance(value, PLAIN)


def _function_in(value):
    """Returns the function of a method, a property or a decorated one."""
    value = getattr(value, "fget", value)
    value = getattr(value, "__func__", value)
    if not isinstance(value, types.FunctionType) and callable(value):
        value = inspect.unwrap(value)
    return value if isinstance(value, types.FunctionType) else None


def _held(function):
    """Yields (name, value) of defaults, and of variables around it."""
    yield from enumerate(function.__defaults__ or ())
    yield from sorted((function.__kwdefaults__ or {}).items())
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or ()):
        # Not that of `super()`, nor one that has no value yet.
        if name != "__class__" and cell != types.CellType():
            yield name, cell.cell_contents


def _codes(code):
    """Yields a code object and those inside of it."""
    yield code
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            yield from _codes(one)


def _lines(code):
    return [
        code.co_code.hex(),
        [_constant(one) for one in code.co_consts],
        [*code.co_names, *code.co_varnames, *code.co_freevars],
    ]


def _constant(value):
    if isinstance(value, types.CodeType):
        return _lines(value)
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    return repr(value)
