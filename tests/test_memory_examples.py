"""What a probe reads of the data, and data whose sizes no graph tells."""

import math
import random
import re
import sys
import threading
import types

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from comparing import compiled
from comparing import dense
from fake_memory import FakeMeter
from fake_memory import FakeWorkload

import keras_batchsize as kb
from keras_batchsize import _memory_examples
from keras_batchsize import memory
from keras_batchsize._memory_examples import Examples
from keras_batchsize._memory_examples import read_examples
from keras_batchsize._memory_forward import forward_of

MB = 10**6


def words():
    """A model of sentences that differ in length."""
    model = keras.Sequential(
        [
            keras.Input((None,), ragged=True, dtype="int32"),
            keras.layers.Embedding(9, 3),
            keras.layers.Lambda(lambda t: tf.reduce_mean(t, 1)),
            keras.layers.Dense(1),
        ]
    )
    model.compile("sgd", "mse")
    return model


SENTENCES = tf.ragged.constant([[1, 2], [3]] * 20)


def eager():
    model = compiled(dense)()
    model.run_eagerly = True
    return model


def single(x):
    """A model of one number, on a pipeline of pairs of them."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model, tf.data.Dataset.from_tensor_slices((x, x))


PIPELINES = {
    "batch": lambda data: data.shuffle(64, seed=5).batch(8).prefetch(1),
    "map": lambda data: data.shuffle(64, seed=5)
    .map(lambda x, y: (-x, y), num_parallel_calls=2)
    .batch(8),
    "take": lambda data: data.shuffle(64, seed=5).take(64).batch(8),
}


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_shuffled_dataset_keeps_its_order(pipeline):
    def order(dataset):
        return [x.numpy().ravel().tolist() for x, _ in dataset]

    model, data = single(tf.range(64, dtype=tf.float32)[:, None])
    probed, alike = (PIPELINES[pipeline](data) for _ in range(2))
    profile = kb.find_max_batch_size(
        model, probed, maximum=16, time_budget=math.inf
    )
    assert profile.max_batch_size == 16
    assert order(probed) == order(alike)


def test_the_cap_is_what_the_pipeline_takes():
    model, data = single(tf.range(64, dtype=tf.float32)[:, None])
    taken = data.shuffle(64).take(24).batch(8)
    profile = kb.find_max_batch_size(model, taken, time_budget=math.inf)
    assert (profile.max_batch_size, profile.reason) == (24, "dataset")


@pytest.mark.parametrize("size", [1, 3])
def test_the_advice_for_what_can_be_read_once_works(size):
    def numbers():
        while True:
            yield np.ones((size, 1), "float32"), np.zeros((size, 1), "float32")

    model, _ = single(tf.zeros([1, 1]))
    x = numbers()
    with pytest.raises(ValueError, match="read more than once") as caught:
        kb.find_max_batch_size(model, x)
    code = re.search(r"repeat the first batch: (.+)\.$", str(caught.value))[1]
    data = eval(code, {"tf": tf, "x": x})
    profile = kb.find_max_batch_size(
        model, data, maximum=24, time_budget=math.inf
    )
    # The batch is no bound.
    assert (profile.max_batch_size, profile.reason) == (24, "maximum")


@pytest.mark.parametrize("kind", ["arrays", "dataset"])
def test_one_example_does_for_a_probe(kind):
    model, _ = single(tf.zeros([1, 1]))
    one = np.ones((1, 1), "float32")
    data = (one, one)
    if kind == "dataset":
        data = [tf.data.Dataset.from_tensors(data)]
    profile = kb.find_max_batch_size(model, *data, time_budget=math.inf)
    assert (profile.max_batch_size, profile.reason) == (1, "dataset")


def test_reading_leaves_random_states():
    class Random(keras.utils.PyDataset):
        """Draws its examples."""

        def __len__(self):
            return 4

        def __getitem__(self, index):
            x = [[random.random(), np.random.random()] for _ in range(8)]
            return np.array(x), np.zeros(8)

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    random.seed(1)
    np.random.seed(1)
    kb.find_max_batch_size(model, Random(), maximum=8)
    drawn = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    assert drawn == (random.random(), np.random.random())


class ReadByWorkers(keras.utils.PyDataset):
    """More batches than its workers keep ready."""

    def __init__(self):
        super().__init__(workers=2, max_queue_size=4)

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return np.full((8, 1), index, "float32"), np.zeros(8)


def test_reading_leaves_no_worker_behind():
    model, _ = single(tf.zeros([1, 1]))
    before = threading.active_count()
    examples = read_examples(model, ReadByWorkers())
    # One of an earlier test may have ended meanwhile.
    assert threading.active_count() <= before
    assert (examples.size, examples.count) == (64, 320)


def torch_or_something_like_it(monkeypatch):
    """Returns torch, or what it is asked for here."""
    try:
        import torch
    except ImportError:
        state, torch = random.Random(0), types.ModuleType("torch")
        torch.get_rng_state, torch.set_rng_state = (
            state.getstate,
            state.setstate,
        )
        torch.rand = lambda _: state.random()
        monkeypatch.setitem(sys.modules, "torch", torch)
    return torch


def test_reading_leaves_the_random_state_of_torch(monkeypatch):
    torch = torch_or_something_like_it(monkeypatch)

    class Random(ReadByWorkers):
        """Draws from torch, as its `DataLoader` does when it is read."""

        def __getitem__(self, index):
            drawn.append(float(torch.rand(1)))
            return super().__getitem__(index)

    drawn = []
    model, _ = single(tf.zeros([1, 1]))
    state = torch.get_rng_state()
    expected = float(torch.rand(1))
    torch.set_rng_state(state)
    kb.find_max_batch_size(model, Random(), maximum=8)
    assert drawn and float(torch.rand(1)) == expected


# How many examples there are.


@pytest.mark.parametrize("size", [1, 7, 32])
@pytest.mark.parametrize("fewer", [0, 1, 6, 7, 31, 32, 100])
def test_where_the_number_is_not_sure_the_largest_rest_counts(size, fewer):
    for count in range(100, 140):
        examples = Examples(tf.zeros([2, 1]), count, fewer=fewer)
        rests = [n % size for n in range(count - fewer, count + 1)]
        assert examples.tail(size) == max(rests)


COUNTED = {
    "arrays": (lambda x: x, 4),
    "examples": (lambda x: sliced(x), 4),
    # 97 to 128, or 97 to 104.
    "batches": (lambda x: sliced(x).batch(32), 31),
    "small batches": (lambda x: sliced(x).batch(8), 8),
    "some": (lambda x: sliced(x).batch(32).filter(lambda x, y: True), 31),
    "no end": (lambda x: sliced(x).batch(32).repeat(), 0),
    "a guess": (lambda x: ReadByWorkers(), 31),
}


def sliced(x):
    return tf.data.Dataset.from_tensor_slices((x, x))


@pytest.mark.parametrize(("make_data", "tail"), COUNTED.values(), ids=COUNTED)
def test_the_ragged_batch_is_run_of_any_data(make_data, tail, monkeypatch):
    monkeypatch.setattr(memory, "Workload", FakeWorkload)
    x = np.zeros((100, 1), "float32")
    model, _ = single(x)
    data = make_data(x)
    examples = read_examples(model, data, x if data is x else None)
    meter, limits = FakeMeter(limit=None), memory.Limits(maximum=32)
    profile = memory.probe(model, examples, limits, True, meter)
    assert profile.max_batch_size == 32
    tails = [size for what, size in meter.ran if what == "tail"]
    assert {*tails} == {tail} - {0}


# How many are kept, and what they take.

KINDS = {
    "arrays": lambda x: x,
    "examples": sliced,
    "batches": lambda x: sliced(x).batch(20),
    "other batches": lambda x: sliced(x).batch(20).map(forgetting),
    "py": lambda x: keras_data(x),
}


def forgetting(x, y):
    """Leaves it open what shape the examples have."""
    return tf.boolean_mask(x, tf.reduce_all(x >= 0.0, axis=0), axis=1), y


def keras_data(x):
    class Data(keras.utils.PyDataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            batch = x[20 * index :][:20]
            return batch, batch

    return Data()


@pytest.mark.parametrize("make_data", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    ("most_bytes", "size"), [(None, 64), (8 * 15, 15), (8, 8)]
)
def test_of_large_examples_few_are_kept(
    make_data, most_bytes, size, monkeypatch
):
    # Of two floats each.
    if most_bytes is not None:
        monkeypatch.setattr(_memory_examples, "_MOST_BYTES", most_bytes)
    x = np.arange(80, dtype="float32")[:, None]
    model, _ = single(x)
    data = make_data(x)
    read = read_examples(model, data, x if data is x else None)
    if most_bytes is None and make_data is KINDS["other batches"]:
        size = 20  # They cannot be joined.
    assert read.size == size
    kept = read.batch(size)[0].numpy().ravel().tolist()
    assert kept == x.ravel().tolist()[:size]


def test_frames_are_counted_as_fit_copies_them():
    pandas = pytest.importorskip("pandas")
    x, y = comparing.regression(64)
    model = compiled(dense)()
    frame = pandas.DataFrame(x, columns=["nbytes", *"abcd"])
    assert read_examples(model, frame, y).data_bytes == x.nbytes + y.nbytes
    # What is smaller is copied as what is larger.
    frame["a"] = (10 * frame["a"]).astype("int8")
    assert read_examples(model, frame, y).data_bytes == x.nbytes + y.nbytes
    frame = frame.astype("float64")
    assert read_examples(model, frame, y).data_bytes >= x.nbytes + y.nbytes


def test_no_graph_tells_the_sizes_of_ragged_tensors():
    model = words()
    y = np.zeros(40)
    forward = forward_of(model, read_examples(model, SENTENCES, y).one)
    assert forward.typical is None and forward.totals == ()
    fixed = forward_of(compiled(dense)(), comparing.regression(1))
    assert fixed.typical > 0 and fixed.totals[0] > 0


class Fragmenting(FakeMeter):
    """Loses what two tensors of typical size take."""

    holes = 2.0


@pytest.mark.parametrize("kind", ["ragged", "eager"])
def test_where_no_size_is_known_a_share_is_left_for_fragments(
    kind, monkeypatch
):
    monkeypatch.setattr(memory, "Workload", FakeWorkload)
    model, data = words(), (SENTENCES, np.zeros(40))
    if kind == "eager":
        model, data = eager(), comparing.regression(40)
    examples = read_examples(model, *data)
    examples.count = 10_000
    meter = Fragmenting(limit=100 * MB, slope=0.02 * MB)
    limits = memory.Limits(safety_margin=0.05)
    profile = memory.probe(model, examples, limits, True, meter)
    share = 0.25 * 0.02 * MB
    assert profile.fragmentation_per_example == pytest.approx(share, rel=0.01)
    needed = (0.02 * MB + share) * profile.max_batch_size
    assert 0.85 * 95 * MB <= needed <= 95 * MB
    # No jump is larger than what was measured allows.
    assert max(meter.sizes) * 0.02 * MB <= 95 * MB
