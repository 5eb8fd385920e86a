"""How memory is read: devices, allocators, the process, the host."""

import math
import resource

import comparing
import numpy as np
import pytest
import tensorflow as tf
from fake_memory import MB
from fake_memory import FakeMeter
from fake_memory import make_dense
from fake_memory import probe

import keras_batchsize as kb
from keras_batchsize import _memory_host
from keras_batchsize import _memory_meters
from keras_batchsize._memory_examples import read_examples
from keras_batchsize._memory_meters import AllocatorMeter
from keras_batchsize._memory_meters import HostMeter
from keras_batchsize._memory_meters import Unmeasured
from keras_batchsize._memory_meters import allocator_limit
from keras_batchsize._memory_meters import meter_for

MIB = 2**20

# The host.


def test_host_meter_sees_what_a_process_takes():
    _memory_host.reset_peak()
    before = _memory_host.resident_bytes()
    if before is None:
        pytest.skip("no /proc")
    held = np.ones(50 * MB // 8)
    del held
    assert _memory_host.peak_bytes() - before >= 40 * MB
    assert _memory_host.available_bytes() > 0


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host whose files are written by a test; at first it tells nothing."""
    for name in ("STATUS", "CLEAR", "MEMINFO", "OWN_GROUPS"):
        monkeypatch.setattr(_memory_host, f"_{name}", tmp_path / name)
    groups = (
        ("max2", "current2", "inactive_file"),
        ("limit1", "usage1", "total_inactive_file"),
    )
    monkeypatch.setattr(
        _memory_host, "_GROUPS", [(tmp_path, *names) for names in groups]
    )
    limits = {"soft": resource.RLIM_INFINITY}
    monkeypatch.setattr(
        resource, "getrlimit", lambda _: (limits["soft"], None)
    )

    def write(soft=resource.RLIM_INFINITY, **texts):
        limits["soft"] = soft
        for name, text in texts.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


FREE = "MemTotal:       9000000 kB\nMemAvailable:    8000000 kB\n"
NESTED = {
    "MEMINFO": FREE,
    "job__max2": "9000\n",
    "job__current2": "7500\n",
    "job__step__max2": "max\n",
    "job__step__current2": "7000\n",
    "job__step__task__max2": "1000\n",
    "job__step__task__current2": "300\n",
}
STAT = "anon 900\ninactive_file 6000\ntotal_inactive_file 7000\n"
VIRTUAL = "VmPeak:\t  999999 kB\nVmSize:\t  100000 kB\nVmRSS:\t  5000 kB\n"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"MEMINFO": FREE}, 8_000_000 * 1024),
        ({"MEMINFO": FREE, "max2": "max\n", "current2": "7\n"}, 8192 * MB),
        ({"MEMINFO": FREE, "max2": "9000\n", "current2": "7000\n"}, 2000),
        ({"MEMINFO": FREE, "limit1": "9000\n", "usage1": "8000\n"}, 1000),
        # Version 1 writes a number larger than any memory for no limit.
        ({"MEMINFO": FREE, "limit1": f"{2**63}", "usage1": "8"}, 8192 * MB),
        ({"max2": "9000", "current2": "9500"}, 0),
        # Files that were read long ago make room for what is asked for.
        ({"max2": "9000", "current2": "8900", "memory.stat": STAT}, 6100),
        ({"limit1": "9000", "usage1": "8900", "memory.stat": STAT}, 7100),
        # Without a container the own group lies below: job, step, task.
        ({"OWN_GROUPS": "0::/job/step\n", **NESTED}, 1500),
        ({"OWN_GROUPS": "0::/job/step/task\n", **NESTED}, 700),
        ({"OWN_GROUPS": "9:memory:/job\n", **NESTED}, 1500),
        ({"OWN_GROUPS": "9:cpu,cpuacct:/job\n", **NESTED}, 8192 * MB),
        ({"OWN_GROUPS": "0::/\n", **NESTED}, 8192 * MB),
        ({"OWN_GROUPS": "0::/../job\n", **NESTED}, 8192 * MB),
        ({"MEMINFO": FREE, "STATUS": VIRTUAL}, 8192 * MB),
        ({"STATUS": VIRTUAL, "soft": 100_000 * 1024 + 77}, 77),
        ({"MEMINFO": FREE, "STATUS": VIRTUAL, "soft": 5}, 0),
        # What is used of it is not known.
        ({"MEMINFO": FREE, "soft": 5}, 8192 * MB),
    ],
)
def test_free_is_what_the_tightest_limit_leaves(host, files, free):
    host(**files)
    assert _memory_host.available_bytes() == free


def test_the_peak_of_a_process_is_read(host):
    host(STATUS="VmHWM:\t  7000 kB\nVmRSS:\t  5000 kB\n")
    assert _memory_host.peak_bytes() == 7000 * 1024
    assert _memory_host.resident_bytes() == 5000 * 1024


@pytest.mark.parametrize("forbidden", ["CLEAR", "STATUS"])
def test_a_peak_since_the_start_is_none_of_a_step(
    forbidden, host, tmp_path, monkeypatch
):
    monkeypatch.setattr(_memory_meters, "_keeps_statistics", lambda _: False)
    host(STATUS="VmHWM:\t  7000 kB\nVmRSS:\t  5000 kB\n")
    assert _memory_host.reset_peak()
    assert type(meter_for(make_dense())) is HostMeter
    # What cannot be opened, even by root.
    (tmp_path / forbidden).unlink()
    (tmp_path / forbidden).mkdir()
    assert not _memory_host.reset_peak()
    assert type(meter_for(make_dense())) is Unmeasured


def test_a_host_leaves_half_of_what_is_free(monkeypatch):
    meter = HostMeter()
    monkeypatch.setattr(_memory_host, "available_bytes", lambda: 600)
    meter.reset(50)
    assert meter.limit() == (50 + 300, "host memory")
    monkeypatch.setattr(_memory_host, "available_bytes", lambda: None)
    assert meter.limit() == (None, "host memory")


class FakeHost(HostMeter, FakeMeter):
    """A process whose memory rises by a formula above what it holds."""

    def __init__(self, monkeypatch, held, free, **arguments):
        HostMeter.__init__(self)
        FakeMeter.__init__(self, None, **arguments)
        for name, function in {
            "available_bytes": lambda: free,
            "resident_bytes": lambda: held,
            "peak_bytes": lambda: held + FakeMeter.peak(self),
            "reset_peak": lambda: FakeMeter.reset(self, 0),
        }.items():
            monkeypatch.setattr(_memory_host, name, function)


def test_the_memory_of_the_host_ends_a_probe(monkeypatch):
    meter = FakeHost(
        monkeypatch, held=900 * MB, free=200 * MB, slope=0.01 * MB
    )
    profile = probe(meter, safety_margin=0.1)
    assert profile.reason == "host memory"
    # The variables count on both sides.
    variables = profile.resident_bytes
    assert 0 < variables < 0.01 * MB
    assert profile.memory_limit == 100 * MB + variables
    assert 0.85 * 9000 <= profile.max_batch_size <= 9000
    chosen = profile.rows[-1]
    assert chosen.peak_bytes == variables + 0.01 * MB * chosen.batch_size


def test_a_limit_that_is_given_is_no_memory_of_the_host(monkeypatch):
    meter = FakeHost(
        monkeypatch, held=900 * MB, free=200 * MB, slope=0.01 * MB
    )
    profile = probe(meter, memory_limit=50 * MB)
    assert profile.reason == "memory"
    assert profile.memory_limit == 50 * MB
    # More than there is cannot be given.
    assert probe(meter, memory_limit=500 * MB).reason == "host memory"


# Data that lie where the model lies.


@pytest.mark.parametrize("is_shared", [True, False])
def test_data_take_of_the_memory_of_a_cpu(is_shared):
    meter = FakeMeter(limit=100 * MB, slope=0.01 * MB)
    meter.is_shared = is_shared
    profile = probe(meter, data_bytes=40 * MB)
    usable = 95 * MB - is_shared * 40 * MB
    assert profile.usable_bytes == usable
    most = 0.01 * MB * profile.max_batch_size
    assert 0.85 * usable <= most <= usable


def test_arrays_are_counted_and_datasets_are_not():
    x, y = comparing.regression(64)
    weights = np.ones(64)
    model = make_dense()
    read = read_examples(model, x, y, weights)
    assert read.data_bytes == 64 * (5 * 4 + 4 + 8)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    assert read_examples(model, dataset).data_bytes == 0


# Which meter.


def of_statistics(found):
    """Returns a function in the place of `get_memory_info`."""

    def get_memory_info(device):
        if found is None:
            raise ValueError("Allocator stats not available for device")
        return {"peak": found, "current": found}

    return get_memory_info


@pytest.mark.parametrize(
    ("statistics", "tells", "kind"),
    [
        (1000, True, AllocatorMeter),
        (0, True, HostMeter),  # As oneDNN answers.
        (None, True, HostMeter),
        (0, False, Unmeasured),
        (None, False, Unmeasured),
    ],
)
def test_the_best_meter_there_is(statistics, tells, kind, monkeypatch):
    monkeypatch.setattr(
        tf.config.experimental, "get_memory_info", of_statistics(statistics)
    )
    monkeypatch.setattr(_memory_host, "reset_peak", lambda: tells)
    monkeypatch.setattr(_memory_meters, "devices_of", lambda _: ["CPU:0"])
    assert type(meter_for(make_dense())) is kind


def test_what_is_not_measured_has_the_limit_of_its_host(monkeypatch):
    meter = Unmeasured("CPU:0")
    monkeypatch.setattr(_memory_host, "available_bytes", lambda: 600)
    meter.reset(50)
    assert meter.limit() == (50 + 300, "host memory")
    assert meter.peak() is None and meter.is_shared
    # Where the system does not tell what is free.
    monkeypatch.setattr(_memory_host, "available_bytes", lambda: None)
    pages = {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 40}
    monkeypatch.setattr(_memory_host.os, "sysconf", pages.__getitem__)
    assert meter.limit() == (50 + 200, "host memory")
    monkeypatch.delattr(_memory_host.os, "sysconf")
    assert meter.limit() == (None, "host memory")
    # Nor does a host tell what an accelerator has.
    other = Unmeasured("GPU:0")
    assert other.limit() == (None, "memory") and not other.is_shared


def test_the_process_says_nothing_of_an_accelerator(monkeypatch):
    monkeypatch.setattr(_memory_meters, "devices_of", lambda _: ["GPU:0"])
    monkeypatch.setattr(_memory_meters, "_keeps_statistics", lambda _: False)
    meter = meter_for(make_dense())
    assert type(meter) is Unmeasured and meter.device == "GPU:0"


def test_a_system_that_tells_nothing_is_probed_all_the_same(monkeypatch):
    monkeypatch.setattr(_memory_meters, "_keeps_statistics", lambda _: False)
    monkeypatch.setattr(_memory_host, "reset_peak", lambda: False)
    profile = kb.find_max_batch_size(
        *(make_dense(), *comparing.regression(48)),
        memory_limit=10**9,
        time_budget=math.inf,
    )
    assert profile.max_batch_size == 48 and profile.reason == "dataset"
    assert [row.peak_bytes for row in profile.rows] == [None] * len(
        profile.rows
    )
    assert profile.measured_by == Unmeasured("").name
    assert "not measured" in str(profile)
    assert profile.usable_bytes is None


# What an allocator has.


class Physical:
    """A device in hardware, cut into logical ones by their limits."""

    def __init__(self, limits):
        self.logical = limits and [
            tf.config.LogicalDeviceConfiguration(memory_limit=limit)
            for limit in limits
        ]


@pytest.fixture
def gpus(monkeypatch):
    """Three devices: cut in two, as it is, and with a limit of its own."""
    physical = [Physical([100, 200]), Physical(None), Physical([300.5])]
    config = tf.config
    monkeypatch.setattr(config, "get_visible_devices", lambda _: physical)
    monkeypatch.setattr(
        config, "get_logical_device_configuration", lambda one: one.logical
    )
    monkeypatch.setattr(
        _memory_meters, "_session_limit", lambda device: f"all of {device}"
    )


@pytest.mark.parametrize(
    ("index", "limit"),
    [
        (0, 100 * MIB),
        (1, 200 * MIB),
        (2, "all of GPU:2"),
        (3, int(300.5 * MIB)),
        (4, "all of GPU:4"),
    ],
)
def test_limits_of_logical_devices(gpus, index, limit):
    assert allocator_limit(f"GPU:{index}") == (limit, "memory")


def test_the_smallest_limit_and_the_fullest_device_count(gpus, monkeypatch):
    meter = AllocatorMeter(["GPU:3", "GPU:1"])
    assert meter.limit() == (200 * MIB, "memory")
    info = {
        "GPU:3": {"peak": 50, "current": 4},
        "GPU:1": {"peak": 60, "current": 3},
    }
    monkeypatch.setattr(
        tf.config.experimental, "get_memory_info", info.__getitem__
    )
    assert (meter.peak(), meter.current()) == (60, 4)
    cleared = []
    monkeypatch.setattr(
        tf.config.experimental, "reset_memory_stats", cleared.append
    )
    meter.reset(0)
    assert cleared == ["GPU:3", "GPU:1"]


def test_a_session_tells_what_its_allocators_were_given():
    with tf.compat.v1.Session(graph=tf.Graph()) as session:
        told = {
            one.name.rpartition("device:")[2]: one.memory_limit_bytes
            for one in session.list_devices()
        }
    assert _memory_meters._session_limit("CPU:0") == told["CPU:0"] > 0
    assert _memory_meters._session_limit("GPU:77") is None


@pytest.mark.parametrize(
    ("given", "free", "limit"),
    [
        ("100", 10**12, (100 * MIB, "memory")),
        # What is in use is not free any more, but may be used again.
        ("100", 20 * MIB, (17 * MIB, "host memory")),
        ("", 20 * MIB, (17 * MIB, "host memory")),
        ("100", None, (100 * MIB, "memory")),
        # TensorFlow's own default.
        ("", None, (2**36, "memory")),
        ("", 10**12, (2**36, "memory")),
    ],
)
def test_limit_of_the_allocator_of_a_cpu(given, free, limit, monkeypatch):
    monkeypatch.setenv("TF_CPU_ALLOCATOR_USE_BFC", "true")
    monkeypatch.setenv("TF_CPU_BFC_MEM_LIMIT_IN_MB", given)
    monkeypatch.setattr(_memory_host, "available_bytes", lambda: free)
    monkeypatch.setattr(
        tf.config.experimental, "get_memory_info", of_statistics(7 * MIB)
    )
    assert allocator_limit("CPU:0") == limit


@pytest.mark.parametrize(
    ("own", "given", "free", "limit"),
    [
        ("", "100", None, (100, "memory")),
        ("", "100", 10**12, (100, "memory")),
        ("false", "100", None, (100, "memory")),
        ("", "9" * 15, 20 * MIB, (17 * MIB, "host memory")),
        # As much as the machine has.
        ("", "", 10**12, (10**12 / 2 + 7 * MIB, "host memory")),
        ("", "", None, (None, "memory")),
        # TensorFlow's own comes first.
        ("TRUE", "100", None, (3 * MIB, "memory")),
    ],
)
def test_limit_of_the_allocator_of_onednn(
    own, given, free, limit, monkeypatch
):
    monkeypatch.setenv("TF_CPU_ALLOCATOR_USE_BFC", own)
    monkeypatch.setenv("TF_CPU_BFC_MEM_LIMIT_IN_MB", "3")
    monkeypatch.setenv("TF_MKL_ALLOC_MAX_BYTES", given)
    monkeypatch.setattr(_memory_host, "available_bytes", lambda: free)
    monkeypatch.setattr(
        tf.config.experimental, "get_memory_info", of_statistics(7 * MIB)
    )
    assert allocator_limit("CPU:0") == limit
    assert AllocatorMeter(["CPU:0"]).limit() == limit
