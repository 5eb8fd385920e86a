"""What a user's own classes and functions do, told by their code.

A configuration names them only, and two that do something else may have one
name: functions that were made by a function, or a class before and after it
was edited. Names of files and numbers of lines do not count.
"""

import inspect
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


def of_class(kind, describe):
    """Returns what the own parts of a class do, as JSON values.

    Args:
        kind: A class.
        describe: Function from what its functions hold to JSON values.
    """
    found = []
    for one in filter(is_own, kind.__mro__):
        found.append(one.__qualname__)
        for name, value in sorted(vars(one).items()):
            function = _function_in(value)
            if function is not None:
                found.append([name, of_function(function, describe)])
            elif isinstance(value, PLAIN) and not name.startswith("__"):
                found.append([name, repr(value)])
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


def of_function(function, describe, known=()):
    """Returns what a function does, as JSON values.

    Args:
        function: A function.
        describe: Function from what it holds, by default or from where it
            was made, to JSON values.
        known: Functions that are described already: it may call itself.
    """
    known = (*known, function)
    found = [_lines(function.__code__)]
    # Constants and helpers of its module, which it uses by name.
    for code in _codes(function.__code__):
        for name in code.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, types.FunctionType) and is_own(value):
                if value not in known:
                    found.append([name, of_function(value, describe, known)])
            elif isinstance(value, PLAIN) and value is not None:
                found.append([name, repr(value)])
    for name, value in _held(function):
        if not isinstance(value, types.FunctionType):
            found.append([name, describe(value)])
        elif value not in known:
            found.append([name, of_function(value, describe, known)])
    return found


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
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    return repr(value)
