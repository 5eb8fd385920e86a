"""What the data of `fit` take beside its steps."""

import math
import time

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from comparing import compiled
from comparing import dense
from fake_memory import MB
from fake_memory import FakeMeter
from fake_memory import make_dense
from fake_memory import probe

from keras_batchsize import _memory_data
from keras_batchsize import _memory_host
from keras_batchsize import memory
from keras_batchsize import replicas
from keras_batchsize._memory_examples import Examples
from keras_batchsize._memory_examples import read_examples
from keras_batchsize._memory_workload import Workload
from keras_batchsize.superbatches import make_superbatches

CORES = 4
# In use, made by as many cores at once, and waiting.
OF_ARRAYS = CORES + 3
# Of float32, x and y of `comparing.regression`.
EACH = (comparing.FEATURES + 1) * 4


@pytest.fixture(autouse=True)
def cores(monkeypatch):
    """A machine of some cores, whatever it is that runs the tests."""
    monkeypatch.setattr(_memory_host, "processor", lambda: ("CPU", CORES))


def meter_of(is_shared, **arguments):
    meter = FakeMeter(**{"limit": 100 * MB, "slope": 0.01 * MB, **arguments})
    meter.is_shared = is_shared
    return meter


# On accelerators.


@pytest.mark.parametrize("accumulates", [False, True])
def test_plain_fit_keeps_arrays_on_an_accelerator(accumulates):
    count = 40 * MB // EACH
    profile = probe(
        meter_of(False), count=count, data_bytes=1, accumulates=accumulates
    )
    # An `AdaptiveTrainer` leaves them on the host.
    usable = 95 * MB - (not accumulates) * count * EACH
    assert profile.usable_bytes == usable
    most = 0.01 * MB * profile.max_batch_size
    assert 0.85 * usable <= most <= usable


def test_integers_of_32_bits_stay_on_the_host():
    x = {"a": np.zeros((40, 3), "int32"), "b": np.zeros((40, 2), "int64")}
    inputs = {
        "a": keras.Input((3,), dtype="int32", name="a"),
        "b": keras.Input((2,), dtype="int64", name="b"),
    }
    model = keras.Model(inputs, inputs["b"] + inputs["a"][:, :2])
    model.compile("sgd", "mse")
    # Keras hands over doubles as float32.
    examples = read_examples(model, x, np.zeros((40, 2)), np.ones(40))
    assert examples.data_bytes >= 40 * (3 * 4 + 2 * 8 + 2 * 4 + 4)
    assert examples.accelerator_bytes == 40 * (2 * 8 + 2 * 4 + 4)


def test_all_bytes_count_where_examples_differ_in_length():
    words = tf.ragged.constant([[1, 2], [3]] * 20)
    model = keras.Sequential(
        [
            keras.Input((None,), ragged=True, dtype="int32"),
            keras.layers.Embedding(9, 3),
            keras.layers.Lambda(lambda t: tf.reduce_mean(t, 1)),
        ]
    )
    model.compile("sgd", "mse")
    examples = read_examples(model, words, np.zeros((40, 3)))
    assert examples.accelerator_bytes == examples.data_bytes > 0


def test_a_dataset_takes_nothing_of_an_accelerator():
    dataset = tf.data.Dataset.from_tensor_slices(comparing.regression())
    assert read_examples(make_dense(), dataset.batch(8)).accelerator_bytes == 0


# Batches of arrays, on a CPU.


def of_arrays(count=1000):
    x, y = comparing.regression(16)
    return Examples((tf.constant(x), tf.constant(y)), count, count * EACH)


@pytest.mark.parametrize(
    ("cores", "size", "batches"),
    [
        (2, 1, 5),
        (16, 1, 19),
        (64, 1, 19),  # With more calls TensorFlow does not begin.
        (16, 100, 10),  # There are no more in 1000 examples, ...
        (16, 101, 10),
        (16, 1000, 3),  # ... but not fewer than of a dataset.
    ],
)
def test_batches_that_keras_makes_of_arrays(cores, size, batches, monkeypatch):
    monkeypatch.setattr(_memory_host, "processor", lambda: ("CPU", cores))
    held = _memory_data.batches_at_once(
        make_dense(), of_arrays(), meter_of(True), False, size
    )
    assert held == batches


def test_workers_count_as_many_whatever_their_processors(monkeypatch):
    monkeypatch.setattr(replicas, "workers", lambda model: 2)
    held = _memory_data.batches_at_once(
        make_dense(), of_arrays(), meter_of(True), False, 1
    )
    assert held == 19


@pytest.mark.parametrize(
    ("is_shared", "accumulates", "data_bytes"),
    [(False, False, 1), (True, True, 1), (True, False, 0)],
    ids=["accelerator", "trainer", "dataset"],
)
def test_others_make_no_such_batches(is_shared, accumulates, data_bytes):
    examples = of_arrays()
    examples.data_bytes = data_bytes
    held = _memory_data.batches_at_once(
        make_dense(), examples, meter_of(is_shared), accumulates, 1
    )
    assert held == 3


def test_batches_that_wait_are_part_of_what_an_example_takes():
    growth = []
    for examples in (of_arrays(), of_arrays()):
        examples.data_bytes *= not growth
        with Workload(make_dense(), examples, meter_of(True), False) as load:
            growth.append(load.growth[0])
    assert growth[0] - growth[1] == (OF_ARRAYS - 3) * EACH


@pytest.mark.parametrize("size", [8, 2**16])
def test_batches_that_wait_lie_in_memory(size, monkeypatch):
    """Small ones together, large ones in a pipeline: as many are made."""
    made = []
    examples = of_arrays(count=2**20)
    repeated = examples._repeated

    def noted(size):
        made.append(size)
        return repeated(size)

    monkeypatch.setattr(examples, "_repeated", noted)
    ahead = []
    prefetch = tf.data.Dataset.prefetch
    monkeypatch.setattr(
        tf.data.Dataset,
        "prefetch",
        lambda self, count: ahead.append(count) or prefetch(self, count),
    )
    meter = meter_of(True, limit=None)
    with Workload(make_dense(), examples, meter, False) as workload:
        made.clear()
        workload.train(size)
    if size == 8:
        assert set(made) == {OF_ARRAYS * size} and not ahead
    else:
        assert set(made) == {size} and set(ahead) == {OF_ARRAYS - 1}


# Superbatches, on a CPU.


def pipeline(size=8, examples=4096):
    data = tf.data.Dataset.from_tensor_slices(comparing.regression(examples))
    return data.batch(size)


def test_superbatches_of_a_dataset_wait():
    model = make_dense()
    size = make_superbatches(model, pipeline()).superbatch_size
    examples = read_examples(model, pipeline())
    # One in use, two that wait, one that is made.
    assert examples.superbatch_bytes == 4 * size * EACH
    few = read_examples(model, pipeline(examples=64))
    assert few.superbatch_bytes == 64 * EACH


def test_superbatches_of_arrays_wait_where_they_are_copied():
    data = comparing.regression(4096)
    assert read_examples(make_dense(), *data).superbatch_bytes == 0
    model = compiled(dense, jit_compile=True)()
    size = make_superbatches(model, *data).superbatch_size
    examples = read_examples(model, *data)
    assert examples.superbatch_bytes == OF_ARRAYS * size * EACH


@pytest.mark.parametrize(
    ("is_shared", "accumulates", "counts"),
    [(True, True, True), (True, False, False), (False, True, True)],
)
def test_superbatches_take_of_the_memory_of_training(
    is_shared, accumulates, counts
):
    examples = of_arrays(math.inf)
    examples.data_bytes, examples.superbatch_bytes = 0, 30 * MB
    found = _memory_data.bytes_beside_steps(
        examples, meter_of(is_shared), accumulates
    )
    assert found == counts * 30 * MB


def test_what_waits_leaves_less_for_steps():
    examples = Examples(tuple(map(tf.constant, comparing.regression(16))))
    examples.superbatch_bytes = 30 * MB
    profile = memory.probe(
        *(make_dense(), examples, memory.Limits(maximum=8), True),
        meter_of(True),
    )
    assert profile.usable_bytes == 65 * MB


def test_few_superbatches_are_read_ahead():
    read = []

    def note(number):
        read.append(int(number))
        return np.float32(number)

    numbers = tf.data.Dataset.range(4096).map(
        lambda n: tf.ensure_shape(tf.numpy_function(note, [n], "float32"), [])
    )
    data = numbers.map(lambda n: (n[None], n[None])).batch(8)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    superbatches = make_superbatches(model, data, superbatch_size=64)
    read.clear()
    batches = iter(superbatches.get_tf_dataset())
    for taken in range(1, 9):
        next(batches)
        # Never more, however long it takes until the next one is asked for.
        known = -1
        while known < len(read):
            known = len(read)
            time.sleep(0.2)
        assert len(read) <= (taken + 3) * 64


@pytest.mark.parametrize(
    ("environment", "examples"),
    [
        ({}, 512),
        # A 32nd of 4 MiB, by examples of 1 KiB.
        ({"TF_CPU_BFC_MEM_LIMIT_IN_MB": "4"}, 128),
        ({"TF_CPU_BFC_MEM_LIMIT_IN_MB": "1"}, 32),
        ({"TF_CPU_BFC_MEM_LIMIT_IN_MB": ""}, 512),
    ],
)
def test_a_superbatch_takes_little_of_an_allocator(
    environment, examples, monkeypatch
):
    monkeypatch.setenv("TF_CPU_ALLOCATOR_USE_BFC", "true" * bool(environment))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    zeros = tf.zeros((4096, 256))
    data = tf.data.Dataset.from_tensor_slices(zeros).batch(8)
    model = keras.Sequential([keras.Input((256,)), keras.layers.Dense(1)])
    found = make_superbatches(model, data)
    assert found.superbatch_size == examples
