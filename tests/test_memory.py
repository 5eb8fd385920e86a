"""The probe: what it returns, what it leaves, and what it refuses."""

import collections
import contextlib
import itertools
import math
import random
from unittest import mock

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

import keras_batchsize as kb
from keras_batchsize import _memory_host
from keras_batchsize import _memory_meters
from keras_batchsize import memory
from keras_batchsize._memory_examples import Examples
from keras_batchsize._memory_forward import forward_of
from keras_batchsize._memory_meters import AllocatorMeter
from keras_batchsize._memory_probing import Peaks

# What it returns.


def test_answer_was_run_and_stayed_within_the_margin():
    meter = FakeMeter(limit=100 * MB, constant=10 * MB, slope=0.01 * MB)
    profile = probe(meter, safety_margin=0.1)
    assert profile.max_batch_size in meter.sizes
    chosen = {row.batch_size: row for row in profile.rows}[
        profile.max_batch_size
    ]
    assert chosen.fits and chosen.peak_bytes <= 90 * MB
    # The largest of all, by the formula, is 8000.
    assert 0.85 * 8000 <= profile.max_batch_size <= 8000
    assert profile.reason == "memory"
    assert len(profile.rows) <= 7


def test_data_of_unknown_length_are_probed_as_others():
    limits = {"limit": 100 * MB, "constant": 10 * MB, "slope": 0.01 * MB}
    profile = probe(FakeMeter(**limits), count=math.inf)
    assert 0.85 * 8500 <= profile.max_batch_size <= 8500
    assert all(row.batch_size % 8 in (0, 1) for row in profile.rows)
    assert profile.reason == "memory"


class SpikyMeter(FakeMeter):
    """Every fourth peak is higher."""

    reserve = 0.09

    def __init__(self, spike, **arguments):
        super().__init__(**arguments)
        self._spike = spike
        self._read = itertools.count(1)

    def peak(self):
        rare = next(self._read) % 4 == 0
        return super().peak() * (self._spike if rare else 1.0)


@pytest.mark.parametrize("spike", [1.0, 1.04, 1.3])
def test_rare_peaks_count(spike):
    meter = SpikyMeter(
        spike, limit=100 * MB, constant=10 * MB, slope=0.01 * MB
    )
    size = probe(meter, safety_margin=0.05).max_batch_size
    most = spike * (10 * MB + 0.01 * MB * size)
    usable = 0.95 * 0.91 * 100 * MB
    # What there is is used: the tensors of the model are small.
    assert 0.85 * usable <= most <= usable


class FirstPeakMeter(FakeMeter):
    """The first peaks at a size are higher or lower than those that follow."""

    holes = 2.0
    is_shared = True

    def __init__(self, part, first=1, **arguments):
        super().__init__(**arguments)
        self._part = part
        self._first = first
        self._seen = collections.Counter()

    def peak(self):
        self._seen[self.size] += 1
        first = self._seen[self.size] <= self._first
        return super().peak() * (self._part if first else 1.0)


def wide():
    """A model with one large tensor, of 2000 bytes per example."""
    model = keras.Sequential(
        [keras.Input((comparing.FEATURES,)), keras.layers.Dense(500)]
    )
    model.compile("sgd", lambda y, y_pred: keras.ops.mean(y_pred, -1))
    return model


@pytest.mark.parametrize("part", [0.1, 1.2])
def test_the_first_peak_at_a_size_is_not_typical(part):
    meter = FirstPeakMeter(part, limit=100 * MB, slope=0.01 * MB)
    # Of 95 MB that may be used 60, and less than 24 for holes.
    profile = probe(meter, wide(), start=6000, maximum=6000)
    assert profile.max_batch_size == 6000
    most = max(1.0, part) * 60 * MB
    assert max(row.peak_bytes for row in profile.rows) == most


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("seconds", [0.001, 0.2])
def test_a_device_that_tries_algorithms_first_is_not_judged_by_that(
    seconds, is_shared
):
    # 80 MB, and 120 while the first call looks for the best algorithm.
    meter = FirstPeakMeter(
        1.5, limit=100 * MB, slope=MB, seconds=seconds
    )
    meter.holes, meter.is_shared = 0.0, is_shared
    profile = probe(meter, start=80, maximum=80)
    assert (profile.max_batch_size < 80) == is_shared


def test_a_device_that_runs_out_in_the_first_call_has_run_out():
    meter = FakeMeter(limit=100 * MB, slope=MB, fails_at=80)
    profile = probe(meter, start=80, maximum=80)
    assert profile.rows[-1].note == "out of memory"
    assert 40 <= profile.max_batch_size < 80


@pytest.mark.parametrize("part", [0.1, 1.2])
def test_room_for_holes_is_kept_above_the_usual_peak(part):
    meter = FirstPeakMeter(part, limit=100 * MB, slope=0.01 * MB)
    # 75 MB and the holes are more than 95 MB, whatever the first peak was.
    profile = probe(meter, wide(), start=7500, maximum=7500)
    assert profile.max_batch_size < 7500
    assert not max(profile.rows, key=lambda row: row.batch_size).fits


@pytest.mark.parametrize(("seconds", "updates"), [(0.001, 4), (0.2, 2)])
def test_a_size_near_the_margin_is_not_judged_by_its_first_peaks(
    seconds, updates
):
    # All peaks of its trial, fewer where updates are long, let it seem to take
    # 1.1 * 64 MB and 25 for holes, more than 95. Two peaks more are as usual:
    # the mean is below 70.
    meter = FirstPeakMeter(
        1.1,
        first=updates,
        limit=100 * MB,
        slope=0.01 * MB,
        seconds=seconds,
    )
    profile = probe(meter, wide(), start=6400, maximum=6400)
    assert profile.max_batch_size == 6400
    assert meter.sizes == 3 * [6400]  # Its trial, more of it, an epoch's end.


@pytest.mark.parametrize(
    ("start", "times"), [(3200, 2), (8400, 2), (9000, 2), (9400, 1)]
)
def test_only_near_the_margin_a_size_is_run_again(start, times):
    # Of 85.5 MB 32 are far from it, 84 and 90 near, 94 too much. One that may
    # be the answer ends an epoch at once, and with it the probe.
    meter = FakeMeter(limit=95 * MB, slope=0.01 * MB)
    profile = probe(meter, start=start, maximum=start, safety_margin=0.1)
    assert meter.sizes.count(start) == times
    fits = start < 8550
    assert (profile.max_batch_size == start) == fits
    assert (("validation", start) in meter.ran) == fits


@pytest.mark.parametrize("peaks", [[9.0, 7.0], [7.0, 9.0], [9.0, 7.0, 7.0]])
def test_of_few_peaks_the_largest_counts(peaks):
    seen = Peaks()
    seen.add(peaks, None, [])
    assert seen.usual == seen.most == 9.0


def test_of_more_peaks_the_mean_counts_without_the_first():
    seen = Peaks()
    seen.add([9.0, 7.0], 3.0, [11.0])
    seen.add([6.0, 5.0], 4.0, [])
    assert (seen.usual, seen.other, seen.most) == (6.0, 4.0, 11.0)


def test_fragmentation_takes_two_tensors_of_typical_size():
    meter = FirstPeakMeter(1.0, limit=10 * MB, slope=1000)
    profile = probe(meter, wide())
    hole = profile.fragmentation_per_example
    # Inputs are small: nearly all bytes lie in tensors of 2000.
    assert 0.95 * 4000 < hole < 4000
    room = 10 * MB * 0.95
    assert 0.85 * room <= (1000 + hole) * profile.max_batch_size <= room


class ConvexMeter(FakeMeter):
    """The largest of two phases, the second of which begins late."""

    def bytes_of(self, what, size):
        return max(0.2 * MB + 20 * size, 200 * (size - 500))


def test_convex_memory_is_followed():
    meter = ConvexMeter(limit=2 * MB)
    profile = probe(meter, safety_margin=0.1)
    largest = 500 + 1.8 * MB / 200
    assert 0.85 * largest <= profile.max_batch_size <= largest
    assert "out of memory" not in {row.note for row in profile.rows}


class BumpyMeter(FakeMeter):
    """Takes more from one size to another, by another algorithm, say."""

    def __init__(self, sizes, more, **arguments):
        super().__init__(**arguments)
        self._sizes = sizes
        self._more = more

    def bytes_of(self, what, size):
        more = self._more if size in self._sizes else 0
        return super().bytes_of(what, size) + more


@pytest.mark.parametrize(
    ("start", "bump", "more", "least"),
    [
        # Within what there is, before the first jump: it is left behind.
        (128, range(100, 300), 0.5, 0.85 * 8000),
        # Where the first jump ends: what is above it is not looked for.
        (1, range(2000, 6000), 0.5, 2000),
        (1, range(2000, 6000), 1.2, 1),
        (1, range(2000, 6000), 3.0, 1000),
    ],
)
def test_beside_a_bump_of_memory_no_size_is_the_answer_that_did_not_fit(
    start, bump, more, least
):
    meter = BumpyMeter(
        bump, more * MB, limit=2 * MB, constant=0.2 * MB, slope=200
    )
    profile = probe(meter, start=start, safety_margin=0.1)
    size = profile.max_batch_size
    assert any(one in bump for one in meter.sizes)
    [chosen] = [row for row in profile.rows if row.batch_size == size]
    assert chosen.fits and least <= size
    assert chosen.peak_bytes == meter.bytes_of("update", size) <= 1.8 * MB


class NoisyMeter(FakeMeter):
    """No two peaks are the same."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self._rng = np.random.default_rng(0)

    def bytes_of(self, what, size):
        return super().bytes_of(what, size) * self._rng.uniform(0.95, 1.05)


def test_noisy_memory_is_followed():
    meter = NoisyMeter(limit=2 * MB, constant=0.2 * MB, slope=200)
    profile = probe(meter, safety_margin=0.1)
    chosen = [
        row
        for row in profile.rows
        if row.batch_size == profile.max_batch_size
    ]
    # All of its peaks stayed below, and what is not noise nearly does.
    assert chosen[0].fits and chosen[0].peak_bytes <= 1.8 * MB
    assert 0.85 * 8000 / 1.05 <= profile.max_batch_size <= 8000 / 0.95
    assert len(profile.rows) <= 7


def of_any_size(y, y_pred):
    """A loss that cannot be traced for the size of `_memory_forward.py`."""
    if y_pred.shape[0] == 61:
        raise ValueError("any size but this")
    return keras.ops.mean(keras.ops.square(y - y_pred), -1)


def pairs_of(embedding):
    """A model whose loss compares each example with each other one."""

    def loss(y, y_pred):
        likeness = keras.ops.matmul(y_pred, keras.ops.transpose(y_pred))
        return keras.ops.mean(keras.ops.square(likeness - y), -1)

    model = keras.Sequential(
        [keras.Input((comparing.FEATURES,)), keras.layers.Dense(embedding)]
    )
    model.compile("sgd", loss)
    return model


@pytest.mark.parametrize("told", [True, False])
def test_memory_that_grows_with_the_square_does_not_overshoot(told):
    # Slopes that the graph of the model lets expect, or else of any size.
    model = pairs_of(4) if told else compiled(dense, loss=of_any_size)()
    slope = 100 if told else 1000
    meter = FakeMeter(20 * MB, slope=slope, squares=10)
    profile = probe(meter, model, accumulates=False, safety_margin=0.1)
    assert "out of memory" not in {row.note for row in profile.rows}
    assert max(row.peak_bytes for row in profile.rows) <= 18.5 * MB
    largest = (math.sqrt(slope**2 + 40 * 18 * MB) - slope) / 20
    assert 0.85 * largest <= profile.max_batch_size <= largest


def test_a_forward_pass_tells_how_large_its_tensors_are():
    model = keras.Sequential(
        [keras.Input((10, 1)), keras.layers.Conv1D(100, 3, padding="same")]
    )
    model.compile("sgd", "mse")
    example = (tf.zeros([1, 10, 1]), tf.zeros([1, 10, 100]))
    forward = forward_of(model, example)
    largest = 10 * 100 * 4
    assert forward.back[0] == 2.0 * largest
    assert forward.totals[0] >= largest
    # Of all bytes nearly all lie in tensors as large as the largest.
    assert 0.95 * largest < forward.typical < largest
    meter = AllocatorMeter(["CPU:0"])
    assert meter.hole(forward) == 2.0 * forward.typical
    assert meter.hole(None) is None


def test_typical_is_where_most_bytes_are():
    inputs = keras.Input((10,))
    narrow = keras.layers.Dense(30, use_bias=False)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(60, use_bias=False)(narrow))
    model.compile("sgd", "mse")
    forward = forward_of(model, (tf.zeros([1, 10]), tf.zeros([1, 60])))
    # What comes out of the model is named once more.
    sizes = [40, 120, 240, 240]
    assert forward.typical == sum(one * one for one in sizes) / sum(sizes)
    # Of the loss at least the targets, the difference and its square.
    [total] = forward.totals
    assert sum(sizes) + 3 * 240 <= total <= sum(sizes) + 6 * 240
    assert forward.degree == 1


@pytest.mark.parametrize("units", [8, 61, 134])
def test_a_loss_that_compares_all_examples_is_seen(units):
    inputs = keras.Input((10,))
    model = keras.Model(inputs, keras.layers.Dense(units)(inputs))
    example = tf.zeros([1, 10]), tf.zeros([1], "int32")
    model.compile("sgd", keras.losses.Circle())
    forward = forward_of(model, example)
    assert forward.degree == 2
    assert forward.typical is None
    # Cosines, and what says who is alike, of 4 bytes and 1.
    assert forward.totals[1] >= 4 + 1 and forward.back[1] == 8.0
    # Without such a loss nothing is one, whatever its shapes are.
    model.compile("sgd", "sparse_categorical_crossentropy")
    assert forward_of(model, example).degree == 1


def test_a_loss_that_cannot_be_traced_foretells_nothing():
    model = compiled(dense, loss=of_any_size)()
    example = tf.zeros([1, comparing.FEATURES]), tf.zeros([1, 1])
    assert forward_of(model, example) is None
    profile = kb.find_max_batch_size(
        model, *comparing.regression(16), maximum=8, time_budget=math.inf
    )
    assert profile.max_batch_size == 8


def test_what_a_loop_hides_cannot_be_added_up():
    model = keras.Sequential([keras.Input((5, 4)), keras.layers.LSTM(3)])
    model.compile("sgd", "mse")
    example = (tf.zeros([1, 5, 4]), tf.zeros([1, 3]))
    assert forward_of(model, example).totals == ()


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"maximum": 77}, "maximum"),
        ({}, "dataset"),
        ({"time_budget": 0.0}, "time"),
    ],
)
def test_says_what_ended_it(limits, reason):
    profile = probe(FakeMeter(limit=10**12), count=200, **limits)
    assert profile.reason == reason
    expected = {"maximum": 77, "dataset": 200, "time": 1}[reason]
    assert profile.max_batch_size == expected


def test_failures_are_answers():
    meter = FakeMeter(limit=None, fails_at=100)
    profile = probe(meter, maximum=4000)
    assert profile.max_batch_size < 100
    assert any(row.note == "out of memory" for row in profile.rows)
    assert not profile.rows[-1].fits


def test_memory_that_cannot_be_measured_is_said():
    profile = probe(FakeMeter(None, fails_at=50, measures=False))
    assert all(row.peak_bytes is None for row in profile.rows)
    assert "not measured" in str(profile)
    assert 1 <= profile.max_batch_size < 50


def test_the_rest_of_an_epoch_is_run_at_the_answer():
    meter = FakeMeter(limit=10**12)
    profile = probe(meter, count=70, maximum=32)
    assert profile.max_batch_size == 32
    # Of 70 examples 6 are left, and batches that are whole come after them.
    last = meter.ran.index(("tail", 6))
    assert meter.ran[last + 1 : last + 3] == [
        ("validation", 32),
        ("update", 32),
    ]
    assert ("sums", 32) in meter.ran


@pytest.mark.parametrize("count", [64, math.inf])
def test_no_ragged_batch_is_run_where_there_is_none(count):
    meter = FakeMeter(limit=10**12)
    assert probe(meter, count=count, maximum=32).max_batch_size == 32
    assert "tail" not in {what for what, _ in meter.ran}
    assert ("validation", 32) in meter.ran


@pytest.mark.parametrize(
    ("what", "times", "note"),
    [
        ("validation", 1.2, "over the margin"),
        ("validation", 3.0, "out of memory"),
        ("sums", 1.2, ""),
        ("sums", 3.0, "out of memory"),
    ],
)
def test_all_that_an_epoch_runs_must_fit(what, times, note):
    # Of updates 8000 fit. Slopes as small as the model's own: else sizes from
    # which an update fails are tried at once.
    meter = FakeMeter(
        2 * MB, 0.2 * MB, slope=200, slopes={what: times * 200}
    )
    profile = probe(meter, safety_margin=0.1)
    size, largest = profile.max_batch_size, 8000 / times
    assert 0.65 * largest <= size <= largest
    assert (what, size) in meter.ran
    chosen = [row for row in profile.rows if row.batch_size == size]
    assert chosen[0].peak_bytes == 0.2 * MB + times * 200 * size
    larger = [row for row in profile.rows if row.batch_size > size]
    assert not any(row.fits for row in larger)
    assert {row.note for row in larger} >= {note} - {""}


def test_sums_of_gradients_must_fit_where_xla_compiles_them():
    # Compiled for the answer only: of 7600 updates fit, sums do not.
    meter = FakeMeter(
        2 * MB, 0.2 * MB, slope=200, slopes={"sums": 1.1 * 200}
    )
    model = make_dense()
    model.jit_compile = True
    limits = {"start": 7600, "maximum": 7600, "safety_margin": 0.1}
    profile = probe(meter, model, math.inf, **limits)
    assert profile.jit_compile
    assert profile.rows[-1].note == "over the margin"
    size = profile.max_batch_size
    assert 0.85 * 7600 / 1.1 <= size <= 8000 / 1.1
    sums = [count for what, count in meter.ran if what == "sums"]
    assert sums == [7600, size]


@pytest.mark.parametrize(
    ("times", "note"), [(4.0, "over the margin"), (6.0, "out of memory")]
)
def test_a_ragged_batch_that_does_not_fit_is_no_answer(times, note):
    # Batches of 7800 fit, but not the 2200 of 10,000 examples that are left.
    meter = FakeMeter(
        2 * MB, 0.2 * MB, slope=200, slopes={"tail": times * 200}
    )
    profile = probe(meter, safety_margin=0.1)
    ragged = {size for what, size in meter.ran if what == "tail"}
    largest = profile.rows[-1]
    assert 0.85 * 8000 < largest.batch_size <= 8000
    assert largest.note == note
    assert 10_000 % largest.batch_size in ragged
    left = 10_000 % profile.max_batch_size
    assert left in ragged and times * 200 * left <= 1.6 * MB


def test_other_errors_are_not_swallowed():
    sizes = []

    def check(x):
        sizes.append(len(x))
        if len(x) > 4:
            raise ValueError("not of memory")
        return x

    def broken():
        inputs = keras.Input((comparing.FEATURES,))
        checked = keras.layers.Lambda(
            lambda x: tf.ensure_shape(
                tf.numpy_function(check, [x], x.dtype), x.shape
            )
        )(inputs)
        return keras.Model(inputs, keras.layers.Dense(1)(checked))

    model = compiled(broken)()
    before = comparing.variables_of(model)
    x, y = comparing.regression(16)
    with pytest.raises(tf.errors.InvalidArgumentError, match="not of memory"):
        kb.find_max_batch_size(model, x, y, start=4, time_budget=math.inf)
    # A trial had been made, in another one it came.
    assert 4 in sizes and sizes[-1] > 4
    after = comparing.variables_of(model)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, name)


def test_nothing_fits():
    with pytest.raises(ValueError, match="(?s)No batch size fits.*Received"):
        probe(FakeMeter(limit=MB, constant=2 * MB), start=64)
    with pytest.raises(ValueError, match="ran out of memory"):
        probe(FakeMeter(limit=None, fails_at=1))
    with pytest.raises(ValueError, match="weights, optimizer slots"):
        probe(FakeMeter(limit=MB), memory_limit=100)


def test_real_memory_is_measured():
    x = np.zeros((4096, 256), "float32")
    model = keras.Sequential(
        [keras.Input((256,)), keras.layers.Dense(512), keras.layers.Dense(1)]
    )
    model.compile("sgd", "mse")
    profile = kb.find_max_batch_size(
        *(model, x, np.zeros(4096)), maximum=4096, time_budget=math.inf
    )
    assert profile.max_batch_size == 4096
    # Data and activations of a batch, if not more.
    least = 4096 * (256 + 512) * 4
    assert least < profile.rows[-1].peak_bytes < 20 * least
    assert profile.dtype_policy == "float32"
    assert profile.step_time(4096) > 0


def test_workers_agree_on_the_fullest_and_the_slowest(monkeypatch):
    class TwoWorkers:
        """The other worker needs twice as much, and has half the memory."""

        number = 2

        def largest(self, values):
            return [2.0 * value for value in values]

    course = memory.Probing
    agreed = course._agreed

    def with_another(self, *values):
        self._workers = TwoWorkers()
        return agreed(self, *values)

    arguments = {"constant": 0, "slope": 0.01 * MB}
    alone = probe(FakeMeter(limit=100 * MB, **arguments))
    monkeypatch.setattr(course, "_agreed", with_another)
    both = probe(FakeMeter(limit=100 * MB, **arguments))
    assert both.memory_limit == 50 * MB
    quarter = alone.max_batch_size / 4
    assert 0.85 * quarter <= both.max_batch_size <= 1.15 * quarter
    # A worker that runs out of memory does not go on alone.
    with pytest.raises(RuntimeError, match="wait for its part"):
        probe(FakeMeter(limit=None, fails_at=100))


@pytest.mark.parametrize("kind", ["dict", "ragged", "weights", "py_dataset"])
def test_every_kind_of_input(kind):
    x, y = comparing.regression(40)
    if kind == "dict":
        inputs = {"a": keras.Input((2,), name="a")}
        out = keras.layers.Dense(1)(inputs["a"])
        model = keras.Model(inputs, out)
        arguments = ({"a": x[:, :2]}, y)
    elif kind == "ragged":
        model = keras.Sequential(
            [
                keras.Input((None,), ragged=True, dtype="int32"),
                keras.layers.Embedding(9, 3),
                keras.layers.Lambda(lambda t: tf.reduce_mean(t, 1)),
                keras.layers.Dense(1),
            ]
        )
        arguments = (tf.ragged.constant([[1, 2], [3]] * 20), y)
    else:
        model = dense()
        arguments = (x, y)
    model.compile("sgd", "mse")
    if kind == "weights":
        arguments += (np.ones(40),)
    if kind == "py_dataset":

        class Batches(keras.utils.PyDataset):
            def __len__(self):
                return 5

            def __getitem__(self, index):
                part = slice(index * 8, index * 8 + 8)
                return x[part], y[part]

        arguments = (Batches(),)
    profile = kb.find_max_batch_size(model, *arguments, time_budget=math.inf)
    assert profile.max_batch_size == 40
    assert profile.reason == "dataset"


# What it refuses, before it touches anything.


@contextlib.contextmanager
def untouched(model):
    """Checks that a model and all random states are left as they are."""

    before, functions = comparing.variables_of(model), model.train_function
    states = random.getstate(), np.random.get_state()[1].tolist()
    yield
    after = comparing.variables_of(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, name)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    assert model.train_function is functions


def stateful():
    return keras.Sequential(
        [
            keras.Input((4, 5), batch_size=8),
            keras.layers.LSTM(3, stateful=True),
            keras.layers.Dense(1),
        ]
    )


def hidden_stateful():
    inputs = keras.Input((4, 5))
    layer = keras.layers.LSTM(3)
    outputs = keras.layers.Dense(1)(layer(inputs))
    layer.stateful = True
    return keras.Model(inputs, outputs)


def fixed():
    return keras.Sequential(
        [keras.Input((5,), batch_size=8), keras.layers.Dense(1)]
    )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (stateful, "batch_size=8"),
        (hidden_stateful, "stateful=True"),
        (fixed, "batch_size=8"),
    ],
)
def test_model_of_one_batch_size_is_refused(make, text):
    model = compiled(make)()
    with untouched(model):
        with pytest.raises(ValueError, match=f"Received: .*{text}"):
            kb.find_max_batch_size(model, *comparing.regression())


class OwnStep(keras.Sequential):
    """Has a step that no strategy lets run."""

    def train_step(self, data):
        return super().train_step(data)


def test_a_step_of_ones_own_under_a_strategy_is_refused():
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        model = OwnStep([keras.Input((5,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    data = comparing.regression()
    with untouched(model):
        with pytest.raises(ValueError, match="OwnStep, with a strategy.*Or pr"):
            kb.find_max_batch_size(model, *data)
    assert not model.optimizer.built
    with pytest.raises(ValueError, match="OwnStep, with a strategy.*Or probe"):
        model.fit(*data, verbose=0, callbacks=[kb.MemoryProbe()])


def test_model_that_took_its_first_batch_for_its_size_is_probed():
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x, y = comparing.regression(24)
    model.fit(x, y, batch_size=8, verbose=0)
    profile = kb.find_max_batch_size(model, x, y, time_budget=math.inf)
    assert profile.max_batch_size == 24


def test_uncompiled_model_is_refused():
    model = dense()
    with untouched(model):
        with pytest.raises(ValueError, match="must be compiled"):
            kb.find_max_batch_size(model, *comparing.regression())
    with pytest.raises(TypeError, match="keras.Model"):
        kb.find_max_batch_size("model", *comparing.regression())


def numbers(x, y):
    yield x, y


@pytest.mark.parametrize("kind", ["generator", "iterator", "empty"])
def test_data_that_cannot_be_probed_are_refused(kind):
    x, y = comparing.regression()
    data = {
        "generator": numbers(x, y),
        "iterator": iter([(x, y)]),
        "empty": x[:0],
    }[kind]
    y = y[:0] if kind == "empty" else None
    model = make_dense()
    with untouched(model):
        with pytest.raises(ValueError, match="Received: "):
            kb.find_max_batch_size(model, data, y)
    if kind == "generator":
        assert next(data) is not None


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"start": 0}, ValueError),
        ({"start": 1.5}, TypeError),
        ({"start": 9, "maximum": 8}, ValueError),
        ({"maximum": 0}, ValueError),
        ({"memory_limit": 0}, ValueError),
        ({"memory_limit": -5}, ValueError),
        ({"memory_limit": 1e9}, TypeError),
        ({"safety_margin": 0.0}, ValueError),
        ({"safety_margin": 1.0}, ValueError),
        ({"safety_margin": -0.1}, ValueError),
        ({"safety_margin": "5 %"}, TypeError),
        ({"time_budget": -1.0}, ValueError),
    ],
)
def test_impossible_arguments_are_refused(arguments, error):
    model = make_dense()
    with pytest.raises(error, match="Received: "):
        kb.find_max_batch_size(model, *comparing.regression(), **arguments)
    assert not model.optimizer.built


@pytest.mark.parametrize("warm", [False, True])
def test_host_without_room_for_a_copy_of_the_weights_is_refused(
    warm, monkeypatch
):
    model = make_dense()
    if warm:
        model.fit(*comparing.regression(), verbose=0)
    before = comparing.variables_of(model)
    metrics = [float(one.value) for one in model.metrics_variables]
    assert any(metrics) == warm
    state = random.getstate()
    monkeypatch.setattr(_memory_host, "available_bytes", lambda: 100)
    with pytest.raises(ValueError, match="(?s)host must have room.*Received"):
        kb.find_max_batch_size(model, *comparing.regression())
    assert random.getstate() == state
    after = comparing.variables_of(model)
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name])
    # Those of a model that was never trained are made by tracing.
    found = [float(one.value) for one in model.metrics_variables]
    assert found[: len(metrics)] == metrics and any(found) == warm


def test_limit_below_the_weights_is_refused():
    model = make_dense()
    with pytest.raises(ValueError, match="(?s)weights.*Received: memory_limit"):
        kb.find_max_batch_size(
            model, *comparing.regression(), memory_limit=200
        )
    assert not model.optimizer.built


def test_limit_below_weights_that_are_not_there_yet_is_refused():
    model = keras.Sequential([keras.layers.Dense(500), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    limits = {"memory_limit": 2000}
    with pytest.raises(ValueError, match="(?s)weights.*Received: memory_limit"):
        kb.find_max_batch_size(model, *comparing.regression(), **limits)


def test_data_that_leave_no_room_are_named():
    x = np.zeros((1000, comparing.FEATURES), "float32")
    meter = FakeMeter(limit=20_000, slope=1)
    meter.is_shared = True
    model = make_dense()
    examples = Examples((x, x[:, :1]), 1000, data_bytes=x.nbytes)
    with pytest.raises(ValueError, match="(?s)copy of data.*Received"):
        memory.probe(model, examples, memory.Limits(), True, meter)


@pytest.mark.parametrize("index", [0, 1])
def test_a_model_is_measured_on_the_device_that_it_is_on(index):
    value = mock.Mock(device=f"/job:localhost/task:0/device:GPU:{index}")
    variable = mock.Mock(value=value)
    model = mock.Mock(trainable_variables=[variable])
    model.distribute_strategy = make_dense().distribute_strategy
    assert memory.devices_of(model) == [f"GPU:{index}"]


def test_a_strategy_tells_the_device():
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        model = make_dense()
    gpu = tf.DeviceSpec(device_type="GPU", device_index=1)
    with mock.patch.object(
        _memory_meters, "default_device", return_value=gpu
    ):
        assert memory.devices_of(model) == ["CPU:0"]
        # What lies on the host is computed with where operations go.
        assert memory.devices_of(make_dense()) == ["GPU:1"]
