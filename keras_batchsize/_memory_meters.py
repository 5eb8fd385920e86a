"""Meters: how much memory a step took, and how much there is.

One interface, `Meter`. A device whose allocator keeps statistics is read
exactly: every GPU, and the CPU with `TF_CPU_ALLOCATOR_USE_BFC=true`. Else the
peak of the process is read, and else memory cannot be measured, which the
profile says.
"""

import contextlib

import numpy as np
import tensorflow as tf

from keras_batchsize import _memory_host
from keras_batchsize import out_of_memory
from keras_batchsize import replicas

MEMORY, HOST_MEMORY = "memory", "host memory"
# Of the memory that the host has free a trial may take this share: there,
# running out means that the system ends the process.
HOST_SHARE = 0.5


class Meter:
    """Measures the memory of one kind of device.

    Attributes:
        device: Name of what is measured.
        name: How, in a few words.
        reserve: Share of what the margin leaves that stays free as well.
        lost_bytes: Bytes of the limit that large tensors cannot use.
        holes: How many tensors of the typical size would fit into what is
            lost at times: pieces are cut only if they are at least twice as
            large as what they are used for.
        counts_first_call: Whether the peak of a first call tells of the
            step, and not of tracing or compiling.
        is_shared: Whether it is the memory of the host, which all replicas
            of a process share, and in which the whole data of `fit` lie, too.
    """

    device = ""
    name = ""
    reserve = 0.0
    lost_bytes = 0
    holes = 0.0
    counts_first_call = True
    is_shared = False

    def limit(self):
        """Returns the bytes that there are for steps, or None, and whose."""
        return None, MEMORY

    def hole(self, forward):
        """Returns what fragmentation may take, in bytes per example.

        Args:
            forward: The `Forward` of the model, None if not known.

        Returns:
            Float; None if the sizes of tensors are not known.
        """
        if not self.holes:
            return 0.0
        if forward is None or forward.typical is None:
            return None
        return self.holes * forward.typical

    def settle(self, most_bytes):
        """Brings the memory into a state in which peaks can be compared.

        Args:
            most_bytes: Bytes that the caller allows, or None.
        """

    def reset(self, resident_bytes):
        """Starts a new peak.

        Args:
            resident_bytes: Bytes of the variables, for meters that cannot
                tell them from the rest of the process.
        """

    def peak(self):
        """Returns the largest number of bytes in use since `reset`, or None."""
        return None

    def current(self):
        """Returns the bytes in use now, or None."""
        return None


class Unmeasured(Meter):
    """Knows no peak, and says so; what a host has it may know all the same.

    Args:
        device: Name such as "GPU:0".
    """

    def __init__(self, device):
        self.device = device
        self.name = "this system tells neither allocator nor process memory"
        self.is_shared = device.startswith("CPU")
        self._resident = 0

    def limit(self):
        """Returns what the host has free and may be used, on a CPU."""
        if not self.is_shared:
            return None, MEMORY
        return _share_of_host(self._resident, _memory_host.most_bytes())

    def reset(self, resident_bytes):
        """Takes note of the bytes of the variables."""
        self._resident = resident_bytes


class AllocatorMeter(Meter):
    """Reads the statistics of TensorFlow's allocators.

    Of several devices the fullest counts, against the smallest limit.

    Args:
        devices: List of names such as "GPU:0".
    """

    holes = 2.0
    # Untested on GPUs, which begin with one region.
    reserve = 0.09

    def __init__(self, devices):
        self._devices = devices
        self.device = ", ".join(devices)
        self.name = "allocator statistics"
        self.is_shared = devices[0].startswith("CPU")
        if self.is_shared:
            # A CPU's allocator grows by regions. The first, of 2, 4 and 8 MB,
            # are too small for large tensors. Judged by the sizes at which
            # fresh processes began to fail: an MLP, a CNN, a Transformer, two
            # dtype policies.
            self.reserve, self.lost_bytes = 0.02, 16 * 2**20

    def limit(self):
        """Returns the smallest limit of the devices, and whose it is."""
        known = [allocator_limit(device) for device in self._devices]
        known = [one for one in known if one[0] is not None]
        return min(known, default=(None, MEMORY))

    def settle(self, most_bytes):
        """Lets an allocator that grows take the rest of its limit at once.

        One that grows holds regions of many sizes, and gives a tensor up to
        twice what it asked for if that is the piece it has. What a step takes
        then depends on what ran before: a CNN of 105 examples took 359 MB
        where one of 127 took 311. From one region pieces are cut to measure.

        On CPUs only: there memory that is not written to costs nothing. GPUs
        begin with one region, unless the user wanted them to grow.
        """
        if not self.is_shared:
            return
        limit, _ = self.limit()
        if most_bytes is not None and limit is not None:
            limit = min(limit, most_bytes)
        # Regions double: there is hardly more than twice what was ever used.
        # One too large would be waited for, ten seconds.
        held = 2 * self.peak() + self.lost_bytes
        if limit is None or limit - held < limit / 2:
            return
        # Its shape is told in 32 bits.
        shape = [int(limit - held) // 2**20, 2**20]
        # What was there may have been taken meanwhile, or lie in pieces.
        with contextlib.suppress(tf.errors.ResourceExhaustedError):
            with tf.device(self._devices[0]):
                tf.raw_ops.Empty(shape=shape, dtype=tf.uint8, init=False)

    def reset(self, resident_bytes):
        """Starts a new peak on all devices."""
        for device in self._devices:
            tf.config.experimental.reset_memory_stats(device)

    def _most(self, key):
        return max(
            tf.config.experimental.get_memory_info(device)[key]
            for device in self._devices
        )

    def peak(self):
        """Returns the peak of the fullest device."""
        return self._most("peak")

    def current(self):
        """Returns the bytes in use on the fullest device."""
        return self._most("current")


class HostMeter(Meter):
    """Reads how far the memory of the process rose above where it was.

    What the process held before is replaced by the bytes of the variables, so
    that the numbers compare with those of an allocator.
    """

    counts_first_call = False
    is_shared = True

    def __init__(self):
        self.device = "CPU:0"
        self.name = "peak of the process's resident memory"
        self._before = 0
        self._resident = 0

    def limit(self):
        """Returns what is free now and may be used, variables included."""
        return _share_of_host(self._resident, _memory_host.available_bytes())

    def reset(self, resident_bytes):
        """Starts a new peak."""
        _memory_host.reset_peak()
        self._resident = resident_bytes
        self._before = _memory_host.resident_bytes() or 0

    def peak(self):
        """Returns the rise of the process's memory, above the variables."""
        rise = _memory_host.peak_bytes() - self._before
        return self._resident + max(rise, 0)

    def current(self):
        """Returns the bytes of the variables."""
        return self._resident


def _share_of_host(resident_bytes, free):
    """Returns the limit that the memory of a host is, or None, and whose."""
    limit = None if free is None else resident_bytes + HOST_SHARE * free
    return limit, HOST_MEMORY


def devices_of(model):
    """Returns the names of the devices that a model trains on.

    Args:
        model: A Keras model.
    """
    strategy = replicas.strategy_of(model)
    if strategy is not None:
        # Also with one replica: it need not be on the first device.
        names = strategy.extended.worker_devices
        specs = [tf.DeviceSpec.from_string(name) for name in names]
        return [f"{one.device_type}:{one.device_index}" for one in specs]
    own = next((one.value.device for one in model.trainable_variables), "")
    placed = tf.DeviceSpec.from_string(own or "")
    computes = default_device()
    if computes.device_type == "GPU" and placed.device_type != "GPU":
        # Whatever lies on the host.
        return [f"GPU:{computes.device_index}"]
    return [f"{placed.device_type or 'CPU'}:{placed.device_index or 0}"]


def default_device():
    """Returns the `tf.DeviceSpec` of where operations run by default."""
    return tf.DeviceSpec.from_string(tf.identity(tf.zeros(())).device)


def meter_for(model):
    """Returns the best meter that there is for a model.

    Args:
        model: A Keras model.
    """
    devices = devices_of(model)
    if _keeps_statistics(devices):
        return AllocatorMeter(devices)
    if devices[0].startswith("CPU") and _memory_host.reset_peak():
        return HostMeter()
    return Unmeasured(devices[0])


def _keeps_statistics(devices):
    try:
        for device in devices:
            with tf.device(device):
                # Large: oneDNN's allocator does not count small ones.
                held = tf.identity(np.zeros(2**18, "float32"))
            info = tf.config.experimental.get_memory_info(device)
            del held
            # oneDNN with the system's allocator answers, but with zeros.
            if not info["peak"]:
                return False
    except ValueError:  # "Allocator stats not available".
        return False
    return True


def allocator_limit(device):
    """Returns the bytes that an allocator may hand out, or None, and whose.

    Args:
        device: Name such as "GPU:0".
    """
    kind, _, index = device.partition(":")
    if kind != "CPU":
        limit = _configured_limit(kind, int(index))
        return limit if limit is not None else _session_limit(device), MEMORY
    found, stated = [], out_of_memory.stated_limit_on_cpu()
    if stated is not None:
        found.append((stated, MEMORY))
    free = _memory_host.available_bytes()
    if free is not None:
        used = tf.config.experimental.get_memory_info(device)["current"]
        found.append((HOST_SHARE * free + used, HOST_MEMORY))
    return min(found, default=(None, MEMORY))


def _configured_limit(kind, index):
    """The limit that the user gave to a logical device."""
    position = index
    for physical in tf.config.get_visible_devices(kind):
        configured = tf.config.get_logical_device_configuration(physical)
        configured = configured or [None]
        if position < len(configured):
            chosen = configured[position]
            limit = getattr(chosen, "memory_limit", None)
            return None if limit is None else int(limit * 2**20)
        position -= len(configured)
    return None


def _session_limit(device):
    """The only place where TensorFlow tells what an allocator was given."""
    with tf.compat.v1.Session(graph=tf.Graph()) as session:
        for found in session.list_devices():
            if found.name.endswith(device):
                return int(found.memory_limit_bytes)
    return None
