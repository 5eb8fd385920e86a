"""Running out of memory: how it looks, and how not to be hurt by it.

A step that fails half-way leaves its mark: statistics, seeds, the optimizer's
counter, perhaps some weights are already new. And where XLA compiled it, worse:
the buffers of variables are given to XLA for its results, freed when it fails,
and still belong to the variables. The next step computes NaN, the one after
that ends the process. A buffer that somebody else holds, too, is not given
away. So: hold the values while a step may fail, and assign them back.
"""

import math
import os
import re

import tensorflow as tf

# What TensorFlow's own allocator may hand out on a CPU if nothing is said.
_DEFAULT_MEGABYTES = 2**16
# What devices say in errors of other classes than ResourceExhaustedError.
_TEXTS = re.compile(
    "out of memory|CUDA_ERROR_OUT_OF_MEMORY|RESOURCE_EXHAUSTED"
    "|failed to allocate|No algorithm worked|CUBLAS_STATUS_ALLOC_FAILED"
    "|CUDNN_STATUS_ALLOC_FAILED|Failed to load in-memory CUBIN"
    # A copy to the device for which there was no room.
    "|Dst tensor is not initialized"
    # cuDNN's LSTM and GRU: why is in the log only.
    "|Failed to call (Do|Then)Rnn(Forward|Backward)",
    re.IGNORECASE,
)
_CLASSES = (
    tf.errors.InternalError,
    tf.errors.NotFoundError,
    tf.errors.UnknownError,
)


def is_out_of_memory(error):
    """Whether an exception says that a device or the host is out of memory.

    Args:
        error: An exception.
    """
    if isinstance(error, (tf.errors.ResourceExhaustedError, MemoryError)):
        return True
    return isinstance(error, _CLASSES) and bool(_TEXTS.search(str(error)))


def raises_when_exhausted():
    """Whether running out of memory is an error, to expect at any time.

    Accelerators have a memory of their own, and TensorFlow's own allocator may
    have a limit on CPU. Else memory is the host's: there is more of it than
    there is, and who takes too much is ended without being asked. Only what
    could never be had is refused, and the first time already.
    """
    return has_allocator_on_cpu() or any(
        device.device_type != "CPU"
        for device in tf.config.list_logical_devices()
    )


def has_allocator_on_cpu():
    """Whether TensorFlow was told to use its own allocator on CPU."""
    given = os.environ.get("TF_CPU_ALLOCATOR_USE_BFC", "")
    return given.lower() in ("1", "true")


def stated_limit_on_cpu():
    """Returns what the allocator that keeps statistics of a CPU was told.

    If it is not TensorFlow's own, it is that of oneDNN, which holds to no more
    than all the memory that the machine has if nothing is said.

    Returns:
        Bytes, or None.
    """
    if has_allocator_on_cpu():
        given = os.environ.get("TF_CPU_BFC_MEM_LIMIT_IN_MB", "")
        megabytes = int(given) if given.isdigit() else _DEFAULT_MEGABYTES
        return megabytes * 2**20
    given = os.environ.get("TF_MKL_ALLOC_MAX_BYTES", "")
    return int(given) if given.isdigit() else None


def components(variable):
    """Returns the variables of the replicas, or the one that there is.

    Under a strategy they may differ (statistics of BatchNorm, metrics), so
    that assigning to all what one of them held would be no restoring.

    Args:
        variable: A Keras variable.

    Returns:
        List of TensorFlow variables.
    """
    value = variable.value
    if isinstance(value, tf.distribute.DistributedValues):
        return list(value.values)
    return [value]


def bytes_of(variables):
    """Returns the bytes of variables on one replica."""
    return sum(
        math.prod(one.shape) * tf.as_dtype(one.dtype).size for one in variables
    )


def value_of(component):
    """Returns the value of a variable, on the device that it is on.

    By itself TensorFlow would put it on the device of the caller, the first
    accelerator as a rule, whatever lies there.

    Args:
        component: A TensorFlow variable.
    """
    with tf.device(component.device):
        return component.read_value()


class HeldValues:
    """The values of variables, held on the device that they are on.

    Holding costs nothing until a variable changes: only then its value is
    copied, instead of overwritten.

    Args:
        variables: Sequence of Keras variables.
    """

    def __init__(self, variables):
        self._held = [
            (component, value_of(component))
            for variable in variables
            for component in components(variable)
        ]

    def put_back(self):
        """Assigns the values that the variables had."""
        for component, value in self._held:
            component.assign(value)
