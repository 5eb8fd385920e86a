"""A probe in a process of its own, for models that can be handed over.

An out-of-memory error then hurts nobody, and a CPU can be measured by the
statistics of TensorFlow's own allocator. What is handed over is the model's
configuration (memory does not depend on weights), how it is compiled, and a
few examples; classes are imported from their modules, so those of a script or
notebook cannot be handed over.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import keras
import numpy as np
import tensorflow as tf

from keras_batchsize import keras_private
from keras_batchsize._memory_limits import NothingFits
from keras_batchsize.batch_profile import BatchProfile

_WORKER = "keras_batchsize._memory_worker"
_LIMIT = "TF_CPU_BFC_MEM_LIMIT_IN_MB"
# Keras says that a layer lacks a type by the first two, TensorFlow that an
# operation does by the last three.
NOT_SUPPORTED = (
    NotImplementedError,
    TypeError,
    tf.errors.InvalidArgumentError,
    tf.errors.NotFoundError,
    tf.errors.UnimplementedError,
)
# What a model and its dtypes may be the cause of is handed back as it is, so
# that nobody has to know where it was raised.
ERRORS = (*NOT_SUPPORTED, NothingFits, ValueError)
# Starting TensorFlow takes some of the time; no step does.
_START_SECONDS = 120
# Longer ones the system cannot wait: milliseconds in 32 bits.
_LONGEST_SECONDS = 2**31 // 1000


def probe_in_process(model, examples, limits, accumulates):
    """Runs a probe in a child process.

    Args:
        model: A compiled Keras model.
        examples: Its `Examples`.
        limits: The `Limits`.
        accumulates: Whether gradients may be summed over micro-batches.

    Returns:
        A `BatchProfile`.

    Raises:
        ValueError: If the model cannot be handed over, or if nothing fits.
        RuntimeError: If the child process did not come back.
        Exception: One of `ERRORS` that the child process raised.
    """
    _check_device(model)
    built = {
        "model": _handed_over(model),
        "compile": model.get_compile_config(),
    }
    request = {
        **built,
        "objects": _own_objects(json.loads(json.dumps(built))),
        # Attributes may have been set since `compile`.
        "jit_compile": bool(model.jit_compile),
        "run_eagerly": bool(model.run_eagerly),
        "limits": vars(limits) | {"maximum": _finite(limits.maximum)},
        "accumulates": accumulates,
        "count": _finite(examples.count),
        "fewer": _finite(examples.fewer),
        "data_bytes": examples.data_bytes,
        "superbatch_bytes": examples.superbatch_bytes,
        "floatx": keras.config.floatx(),
        "image_data_format": keras.config.image_data_format(),
        "global_policy": keras.config.dtype_policy().name,
        "threads": [
            tf.config.threading.get_intra_op_parallelism_threads(),
            tf.config.threading.get_inter_op_parallelism_threads(),
        ],
    }
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        _save_examples(folder, request, examples)
        answer = _run(folder, limits)
    if "error" in answer:
        raise _error_from(answer)
    return BatchProfile.from_dict(answer["profile"])


def answer_of(error):
    """Returns how a child process hands an error back, or raises it again.

    Args:
        error: An exception.

    Returns:
        Dict of JSON values.
    """
    for index, kind in enumerate(ERRORS):
        if isinstance(error, kind):
            return {"error": str(error), "kind": index}
    raise error


def _error_from(answer):
    """Returns the error that was handed back."""
    kind, text = ERRORS[answer["kind"]], answer["error"]
    if issubclass(kind, tf.errors.OpError):
        return kind(None, None, text)
    return kind(text)


def _check_device(model):
    if tf.config.list_physical_devices("GPU"):
        raise ValueError(
            "A child process cannot use the GPU while this one holds its "
            "memory. Received: isolation=True with "
            f"{tf.config.list_physical_devices('GPU')[0].name}. Use "
            "isolation=False, or start with CUDA_VISIBLE_DEVICES=-1."
        )
    if model.distribute_strategy.num_replicas_in_sync > 1:
        raise ValueError(
            "A strategy cannot be handed over to a child process. Received: "
            "isolation=True with "
            f"{type(model.distribute_strategy).__name__}. Use isolation=False."
        )


def _handed_over(model):
    """Returns the configuration of a model, or raises with the reason."""
    own = [
        one
        for one in [model, *keras_private.flatten_layers(model)]
        if type(one).__module__ == "__main__"
    ]
    if own:
        _refuse(f"{type(own[0]).__name__} is defined in __main__")
    _check_built_alike(model)
    try:
        config = keras.saving.serialize_keras_object(model)
        json.dumps([config, model.get_compile_config()])
    except (NotImplementedError, TypeError, ValueError) as error:
        raise not_built_again(error) from error
    if "__lambda__" in json.dumps(config):
        _refuse("a Lambda layer holds a function that has no name")
    return config


def _check_built_alike(model):
    """Refuses what Keras leaves out without a word when it builds a model."""
    kind, standard = type(model), keras.Model
    if (
        kind.compile is not standard.compile
        and kind.compile_from_config is standard.compile_from_config
    ):
        _refuse(
            f"{kind.__name__} has a `compile` of its own, but no "
            "compile_from_config() and get_compile_config(), without which "
            "Keras does not compile it again"
        )
    name = keras_private.first_computed_twice(model)
    if name is not None:
        _refuse(
            f"{name!r} was made in a keras.RematScope, which its "
            "configuration does not tell: without it more memory is needed"
        )


def _own_objects(configuration):
    """Returns where the classes and functions come from that Keras has not.

    Keras looks them up by the names that they were registered by, and never
    imports a module for it.

    Args:
        configuration: JSON values.

    Returns:
        Dict from registered names to pairs (module, name in it).
    """
    found, text = {}, json.dumps(configuration)
    for name, known in keras.saving.get_custom_objects().items():
        if json.dumps(name) in text:
            found[name] = known.__module__, known.__qualname__
    nodes = [configuration]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            module = node.get("module")
            if module and module.split(".")[0] not in ("keras", "builtins"):
                name = node.get("registered_name") or node["class_name"]
                found.setdefault(name, (module, node["class_name"]))
            node = list(node.values())
        if isinstance(node, list):
            nodes += node
    for name, (module, _) in found.items():
        if module == "__main__":
            _refuse(f"{name} is defined in __main__")
    return found


def not_built_again(error):
    """Returns the error that a model cannot be built again.

    Args:
        error: The exception by which that failed.
    """
    return _refusal(f"{type(error).__name__}: {error}"[:300])


def _refuse(why):
    raise _refusal(why)


def _refusal(why):
    return ValueError(
        "The model must be one that can be built again from its "
        f"configuration, in another process. Received: isolation=True; {why}. "
        "Put classes into a module with get_config() and "
        "@keras.saving.register_keras_serializable(), or use "
        "isolation=False."
    )


def _finite(value):
    return None if value == float("inf") else int(value)


def _save_examples(folder, request, examples):
    leaves = keras.tree.flatten(examples.few(64))
    if not all(isinstance(one, tf.Tensor) for one in leaves if one is not None):
        _refuse("the examples are ragged or sparse")
    for one in leaves:
        # A file of arrays holds neither texts nor what NumPy has no type for.
        if one is not None and np.asarray(one).dtype.kind not in "biufc":
            _refuse(f"the examples are of dtype {one.dtype.name}")
    x, y, weight = keras.utils.unpack_x_y_sample_weight(examples.few(64))
    arrays, parts = {}, []
    for part in (x, y, weight):
        paths = [] if part is None else keras.tree.flatten(part)
        keys = [f"a{len(arrays) + i}" for i in range(len(paths))]
        arrays |= dict(zip(keys, map(np.asarray, paths)))
        parts.append(
            None if part is None else keras.tree.pack_sequence_as(part, keys)
        )
    request["data"] = parts
    np.savez(folder / "examples.npz", **arrays)
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")


def environment_of(limits):
    """Returns the environment variables of a child process, as a dict.

    Args:
        limits: The `Limits`.
    """
    environment = {**os.environ, "TF_CPU_ALLOCATOR_USE_BFC": "true"}
    if limits.memory_limit is not None:
        # It may have no more than this process has.
        own = environment.get(_LIMIT, "")
        allowed = [max(limits.memory_limit // 2**20, 1)]
        allowed += [int(own)] if own.isdigit() else []
        environment[_LIMIT] = str(min(allowed))
    path = [*filter(None, sys.path), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    return environment


def _run(folder, limits):
    seconds = _START_SECONDS + 2 * limits.time_budget
    try:
        process = subprocess.run(
            [sys.executable, "-m", _WORKER, str(folder)],
            env=environment_of(limits),
            capture_output=True,
            text=True,
            timeout=seconds if seconds < _LONGEST_SECONDS else None,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            "The child process did not come back in "
            f"{error.timeout:.0f} s. Use isolation=False."
        ) from error
    answer = folder / "answer.json"
    if not answer.exists():
        raise RuntimeError(
            "The child process ended without an answer, with code "
            f"{process.returncode}; the system may have run out of memory. "
            f"It said: {process.stderr[-500:]}"
        )
    return json.loads(answer.read_text(encoding="utf-8"))
