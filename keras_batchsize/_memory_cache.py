"""Profiles kept in a folder, for models that have not changed."""

import os
import pathlib
import warnings

import keras
import tensorflow as tf

from keras_batchsize import _memory_host
from keras_batchsize import _memory_key
from keras_batchsize._version import __version__
from keras_batchsize.batch_profile import BatchProfile

# What allocators, XLA and oneDNN are told by the environment.
_VARIABLES = (
    "NVIDIA_TF32_OVERRIDE",
    "TF_CPU_ALLOCATOR_USE_BFC",
    "TF_CPU_BFC_MEM_LIMIT_IN_MB",
    "TF_CUDNN_WORKSPACE_LIMIT_IN_MB",
    "TF_DETERMINISTIC_OPS",
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_FORCE_GPU_ALLOW_GROWTH",
    "TF_GPU_ALLOCATOR",
    "TF_MKL_ALLOC_MAX_BYTES",
    "TF_ONEDNN_USE_SYSTEM_ALLOCATOR",
    "TF_XLA_FLAGS",
    "XLA_FLAGS",
)


def check_folder(cache):
    """Raises if an argument names no folder.

    Args:
        cache: What the user passed as the cache, or None.

    Raises:
        TypeError: If it is neither a path nor None.
    """
    if cache is not None and not isinstance(cache, (str, os.PathLike)):
        raise TypeError(
            "`cache` must be the path of a folder: profiles are kept there, "
            f"in a file each. Received: cache={cache!r}. Use "
            'cache="profiles", or None to probe always.'
        )


def path_of(folder, model, examples, limits, isolation, device, accumulates):
    """Returns the file of a profile: its name depends on all that counts.

    Args:
        folder: Where profiles are kept.
        model: A compiled Keras model.
        examples: Its `Examples`.
        limits: The `Limits`.
        isolation: Whether the trials run in a child process.
        device: Name of the device.
        accumulates: Whether gradients may be summed over micro-batches.

    Returns:
        A `pathlib.Path`; None, with a warning, for a model that might be
        taken for another one.
    """
    try:
        described = _memory_key.described(model)
    except _memory_key.NotDescribed as error:
        warnings.warn(
            "A profile is kept only for a model that can be told from all "
            f"others. Received: cache={str(folder)!r}, and a model of which "
            f"{error}. Give its classes get_config(), or use cache=None.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    name = _memory_key.digest_of(
        {
            "model": described,
            "data": str(
                keras.tree.map_structure(_memory_key.spec_of, examples.one)
            ),
            "examples": [examples.count, examples.fewer, examples.bytes_each],
            "data_bytes": [examples.data_bytes, examples.superbatch_bytes],
            "limits": vars(limits),
            "isolation": bool(isolation),
            "accumulates": bool(accumulates),
            "device": [device, *_details()],
            "replicas": model.distribute_strategy.num_replicas_in_sync,
            "floatx": keras.config.floatx(),
            "versions": [__version__, keras.__version__, tf.__version__],
        }
    )
    return pathlib.Path(folder) / f"profile_{name}.json"


def _details():
    """What the devices are, and how they are set up."""
    devices = tf.config.list_physical_devices()
    gpus = [one for one in devices if one.device_type == "GPU"]
    return [
        _memory_host.processor(),
        [tf.config.experimental.get_device_details(one) for one in gpus],
        [tf.config.experimental.get_memory_growth(one) for one in gpus],
        [
            [one.name, getattr(logical, "memory_limit", None)]
            for one in devices
            for logical in _logical_devices(one)
        ],
        {name: os.environ.get(name) for name in _VARIABLES},
        tf.config.threading.get_intra_op_parallelism_threads(),
        tf.config.threading.get_inter_op_parallelism_threads(),
        tf.config.experimental.tensor_float_32_execution_enabled(),
        tf.config.optimizer.get_jit(),
        tf.config.optimizer.get_experimental_options(),
    ]


def _logical_devices(device):
    """The logical devices that a user made of a device, with their limits."""
    return tf.config.get_logical_device_configuration(device) or [None]


def load(path):
    """Returns the profile in a file, None if there is none to be read.

    Args:
        path: A `pathlib.Path`.
    """
    try:
        return BatchProfile.load(path)
    except (AttributeError, OSError, ValueError, TypeError, KeyError):
        return None


def keep(profile, path):
    """Writes a profile to a file; a failure is no reason to lose it.

    Args:
        profile: A `BatchProfile`.
        path: A `pathlib.Path`.
    """
    try:
        profile.save(path)
    except OSError as error:
        warnings.warn(
            f"The profile could not be kept: {error}. Received: "
            f"cache={str(path.parent)!r}. Use a folder that can be written.",
            RuntimeWarning,
            stacklevel=3,
        )


def still_fits(profile, limit, safety_margin):
    """Whether there is the memory now that a profile's largest size takes.

    Where no limit is given it is what the device, or the host, has free:
    another machine may have less, and so may the same one at another time.

    Args:
        profile: A `BatchProfile`.
        limit: Bytes that there are now, None if not known.
        safety_margin: Share of them that stays free.
    """
    size = profile.max_batch_size
    peaks = [row.peak_bytes for row in profile.rows if row.batch_size == size]
    then = profile.memory_limit
    if limit is None or (then and limit >= then):
        return True
    if peaks == [None]:
        # What was not measured was bounded by the limit, if anything was.
        return not (then and "memory" in profile.reason)
    usable = limit * (1.0 - safety_margin)
    if then and profile.usable_bytes:
        # Of less memory as much has to stay free, for data and the like.
        usable = profile.usable_bytes - (then - limit)
    return max(peaks) + profile.fragmentation_per_example * size <= usable
