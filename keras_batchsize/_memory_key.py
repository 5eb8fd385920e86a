"""What decides how much memory and time a model's step takes, as JSON values.

Two that are described alike take the same; what cannot be described for sure
is an error, so that nothing is taken for something else. Left out is what
changes from one run to the next and takes no memory: names, seeds, numbers
such as rates.
"""

import functools
import hashlib
import inspect
import json
import types
import warnings

import keras
import numpy as np
import tensorflow as tf

from keras_batchsize import _memory_code
from keras_batchsize import keras_private

# Shapes are those of the variables; the others are of no matter, or told apart.
_LEFT_OUT = {
    "build_config",
    "build_input_shape",
    "compile_config",
    "learning_rate",
    "seed",
    "shared_object_id",
}
_HOLDING_NAMES = {"keras_history", "input_layers", "output_layers"}


class NotDescribed(Exception):
    """Raised where something could be taken for something else."""


def digest_of(description):
    """Returns a short text that is another one for another description.

    Args:
        description: JSON values.
    """
    text = json.dumps(description, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def described(model):
    """Describes a compiled model.

    Args:
        model: A compiled Keras model.

    Returns:
        JSON values.

    Raises:
        NotDescribed: If some part of it cannot be told from another one.
    """
    return _Description(model).whole()


def spec_of(leaf):
    """Describes a tensor or an array but for its number of examples.

    Args:
        leaf: What has a shape and a dtype, or a `tf.TypeSpec`; or None.
    """
    if leaf is None:
        return None
    if not isinstance(leaf, tf.TypeSpec):
        leaf = tf.type_spec_from_value(leaf)
    parts = tf.nest.flatten(leaf, expand_composites=True)
    return [
        type(leaf).__name__,
        *([one.shape[1:].as_list(), one.dtype.name] for one in parts),
    ]


class _Description:
    """Describes a model, and remembers what stands for what in it."""

    def __init__(self, model):
        self._model = model
        self._layers = list(keras_private.flatten_layers(model))
        # What is being described, or is described elsewhere.
        self._known = {id(one): i for i, one in enumerate(self._layers)}
        self._names = {}
        self._functions = {
            one.__name__
            for layer in [model, *self._layers]
            for one in _functions_in(layer)
        }

    def whole(self):
        """Returns the description of the model."""
        model = self._model
        settings = dict(keras_private.compiled(model).config)
        settings["optimizer"] = model.optimizer
        for name in ("jit_compile", "run_eagerly"):
            settings[name] = bool(getattr(model, name))
        return {
            "model": self._object(model),
            "layers": [self._object(layer) for layer in self._layers],
            "variables": [
                [list(one.shape), str(one.dtype), bool(one.trainable)]
                for one in model.variables
            ],
            "compile": self.of(settings),
        }

    def of(self, value):
        """Describes any value that a part of a model may hold."""
        if isinstance(value, _memory_code.PLAIN):
            return repr(value)
        if isinstance(value, np.generic):
            return repr(value.item())
        if isinstance(value, dict):
            return {str(key): self.of(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(one) for one in value]
        if isinstance(value, functools.partial):
            return self.of([value.func, value.args, value.keywords])
        if isinstance(value, types.MethodType):
            return self.of([value.__func__, value.__self__])
        if isinstance(value, types.ModuleType):
            return value.__name__
        if isinstance(value, type) or inspect.isroutine(value):
            return self._code(value)
        if isinstance(getattr(value, "shape", None), (tuple, tf.TensorShape)):
            return [str(value.shape), str(value.dtype)]
        if id(value) in self._known:
            return ["known", self._known[id(value)]]
        return self._object(value)

    def _code(self, thing):
        """Describes a class or a function."""
        name = f"{thing.__module__}.{thing.__qualname__}"
        if not _memory_code.is_own(thing):
            return [name]
        if isinstance(thing, type):
            return [name, _memory_code.of_class(thing, self.of)]
        if not isinstance(thing, types.FunctionType):
            raise NotDescribed(f"{name} has no code in Python")
        return [name, _memory_code.of_function(thing, self.of)]

    def _object(self, thing):
        """Describes an object, by its configuration if it has one."""
        self._known.setdefault(id(thing), len(self._known))
        functions, config = _functions_in(thing), _config_of(thing)
        result = {
            "class": self._code(type(thing)),
            "dtype": str(getattr(thing, "dtype", None)),
            "remat": self._remat_of(thing),
            "functions": [
                self._code(one) for one in functions
                if _memory_code.is_own(one)
            ],
        }
        if config is not None:
            self._functions |= {one.__name__ for one in functions}
            result["config"] = self._plain(config)
        if config is None or _has_own_compile(thing):
            result["attributes"] = self._attributes(thing)
        return result

    def _remat_of(self, thing):
        """Describes what of a layer is computed twice, to save memory."""
        mode = keras_private.remat_mode(thing)
        return mode and self.of(list(mode))

    def _attributes(self, thing):
        """Describes the attributes that the own code of a class uses."""
        kind, held = type(thing), getattr(thing, "__dict__", None)
        if held is None or not _memory_code.is_own(kind):
            raise NotDescribed(f"{kind.__name__} has no get_config()")
        used = _memory_code.names_used(kind) - {"built", "name", "optimizer"}
        return {name: self.of(held[name]) for name in sorted(used & {*held})}

    def _plain(self, node, of_keras=False, key=None):
        """Takes out of a configuration what changes from run to run."""
        if isinstance(node, dict):
            return self._plain_dict(node, of_keras, key)
        if isinstance(node, (list, tuple)):
            return [self._plain(one, of_keras, key) for one in node]
        if isinstance(node, str) and key in {"name", *_HOLDING_NAMES}:
            return self._names.setdefault(node, f"#{len(self._names)}")
        if isinstance(node, float) and of_keras:
            # A rate or a factor. Without it, less may be computed.
            return bool(node)
        if isinstance(node, _memory_code.PLAIN):
            return repr(node)
        raise NotDescribed(f"a configuration holds a {type(node).__name__}")

    def _plain_dict(self, node, of_keras, key):
        kind = str(node.get("class_name"))
        if kind == "__lambda__":
            kind, node = "function", {"config": "<lambda>"}
        if kind == "function" and node.get("config") not in self._functions:
            # It is given by its name only, and its code is not known.
            raise NotDescribed(f"{node.get('config')} is a function somewhere")
        if kind.endswith("DTypePolicy"):
            return repr(node["config"])
        module = node.get("module")
        if module:
            # Not operations: there a number may be one of examples.
            of_keras = module.startswith("keras.") and "src" not in module
        held = key if key in _HOLDING_NAMES else None
        return {
            str(name): self._plain(value, of_keras, held or str(name))
            for name, value in node.items()
            if name not in _LEFT_OUT
        }


def _config_of(thing):
    """Returns the configuration of an object, None if it has none."""
    try:
        with warnings.catch_warnings():
            # That functions without a name are not safe to load.
            warnings.simplefilter("ignore")
            if isinstance(thing, keras.Model):
                return thing.get_config()  # How it is compiled comes apart.
            return keras.saving.serialize_keras_object(thing)
    except Exception:  # Of a user's own get_config(), too.
        return None


def _has_own_compile(thing):
    """Whether a model is compiled with more than Keras knows of."""
    return isinstance(thing, keras.Model) and (
        type(thing).compile is not keras.Model.compile
    )


def _functions_in(thing):
    """Returns the functions that an object holds, those of its class not."""
    return [
        one
        for name, value in sorted(getattr(thing, "__dict__", {}).items())
        for one in _leaves(value)
        if isinstance(one, types.FunctionType)
        and not _is_method(one, getattr(type(thing), name, None))
    ]


def _is_method(function, method):
    """Whether a function does what a method does: Keras wraps some."""
    inside = inspect.unwrap(function)
    return getattr(inside, "__func__", inside) is method


def _leaves(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for one in value for leaf in _leaves(one)]
    return [value]
