"""Profiles kept in a folder, for models that have not changed."""

import hashlib
import json
import os
import pathlib

import keras
import tensorflow as tf

from keras_batchsize import keras_private
from keras_batchsize._version import __version__
from keras_batchsize.batch_profile import BatchProfile


def path_of(folder, model, examples, limits, device, accumulates):
    """Returns the file of a profile: its name depends on all that counts.

    Args:
        folder: Where profiles are kept.
        model: A compiled Keras model.
        examples: Its `Examples`.
        limits: The `Limits`.
        device: Name of the device.
        accumulates: Whether gradients may be summed over micro-batches.

    Returns:
        A `pathlib.Path`.
    """
    key = {
        "layers": [
            [type(layer).__name__, layer.dtype_policy.name, _config(layer)]
            for layer in keras_private.flatten_layers(model)
        ],
        "variables": [
            [list(one.shape), str(one.dtype), one.trainable]
            for one in model.variables
        ],
        "optimizer": [type(model.optimizer).__name__, _config(model.optimizer)],
        "loss": repr(_named(model.loss)),
        "metrics": sorted(metric.name for metric in model.metrics),
        "jit_compile": bool(model.jit_compile),
        "run_eagerly": bool(model.run_eagerly),
        "data": [
            [list(spec.shape[1:]), spec.dtype.name]
            for spec in tf.nest.flatten(
                keras.tree.map_structure(_spec, examples.one),
                expand_composites=True,
            )
            if spec is not None
        ],
        "examples": examples.count,
        "data_bytes": examples.data_bytes,
        "limits": vars(limits),
        "accumulates": accumulates,
        "device": [device, *_details()],
        "replicas": model.distribute_strategy.num_replicas_in_sync,
        "versions": [__version__, keras.__version__, tf.__version__],
    }
    text = json.dumps(key, sort_keys=True, default=repr)
    name = hashlib.sha256(text.encode()).hexdigest()[:20]
    return pathlib.Path(folder) / f"profile_{name}.json"


def _config(thing):
    """The configuration without names, which change from run to run."""
    try:
        config = thing.get_config()
    except NotImplementedError:
        return type(thing).__name__
    return {
        name: value for name, value in config.items() if name != "name"
    }


def _named(loss):
    return getattr(loss, "name", None) or getattr(loss, "__name__", loss)


def _spec(leaf):
    return None if leaf is None else tf.type_spec_from_value(leaf)


def _details():
    """What the device is, and how it is set up."""
    gpus = [
        tf.config.experimental.get_device_details(one)
        for one in tf.config.list_physical_devices("GPU")
    ]
    return [
        gpus,
        os.environ.get("TF_CPU_ALLOCATOR_USE_BFC"),
        os.environ.get("TF_CPU_BFC_MEM_LIMIT_IN_MB"),
        tf.config.threading.get_intra_op_parallelism_threads(),
        tf.config.threading.get_inter_op_parallelism_threads(),
    ]


def load(path):
    """Returns the profile in a file, None if there is none to be read.

    Args:
        path: A `pathlib.Path`.
    """
    try:
        return BatchProfile.load(path)
    except (OSError, ValueError, TypeError, KeyError):
        return None
