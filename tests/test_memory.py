"""The probe: what it returns, what it leaves, and what it refuses."""

import collections
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
from keras_batchsize import memory
from keras_batchsize._memory_course import Seen
from keras_batchsize._memory_examples import Examples
from keras_batchsize._memory_forward import forward_of
from keras_batchsize._memory_meters import AllocatorMeter

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
    seen = Seen()
    seen.add(peaks, None, [])
    assert seen.usual == seen.most == 9.0


def test_of_more_peaks_the_mean_counts_without_the_first():
    seen = Seen()
    seen.add([9.0, 7.0], 3.0, [11.0])
    seen.add([6.0, 5.0], 4.0, [])
    assert (seen.usual, seen.other, seen.most) == (6.0, 4.0, 11.0)


def test_fragmentation_takes_two_tensors_of_typical_size():
    meter = FirstPeakMeter(1.0, limit=10 * MB, slope=1000)
    profile = probe(meter, wide())
    hole = profile.hole_per_example
    # Inputs are small: nearly all bytes lie in tensors of 2000.
    assert 0.95 * 4000 < hole < 4000
    room = 10 * MB * 0.95
    assert 0.85 * room <= (1000 + hole) * profile.max_batch_size <= room


def test_a_forward_pass_tells_how_large_its_tensors_are():
    model = keras.Sequential(
        [keras.Input((10, 1)), keras.layers.Conv1D(100, 3, padding="same")]
    )
    example = (tf.zeros([1, 10, 1]), tf.zeros([1, 10, 100]))
    forward = forward_of(model, example)
    assert forward.largest == 10 * 100 * 4
    assert forward.total >= forward.largest
    # Of all bytes nearly all lie in tensors as large as the largest.
    assert 0.95 * forward.largest < forward.typical < forward.largest
    meter = AllocatorMeter(["CPU:0"])
    assert meter.hole(forward) == 2.0 * forward.typical
    assert meter.hole(None) is None


def test_typical_is_where_most_bytes_are():
    inputs = keras.Input((10,))
    narrow = keras.layers.Dense(30, use_bias=False)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(60, use_bias=False)(narrow))
    forward = forward_of(model, (tf.zeros([1, 10]), tf.zeros([1, 60])))
    # What comes out of the model is named once more.
    sizes = [40, 120, 240, 240]
    assert forward.total == sum(sizes)
    assert forward.typical == sum(one * one for one in sizes) / sum(sizes)


def test_what_a_loop_hides_cannot_be_added_up():
    model = keras.Sequential([keras.Input((5, 4)), keras.layers.LSTM(3)])
    example = (tf.zeros([1, 5, 4]), tf.zeros([1, 3]))
    assert forward_of(model, example).total is None


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
    ("times", "note"), [(4.0, "over the margin"), (10.0, "out of memory")]
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
        kb.find_max_batch_size(model, x, y, start=4)
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
    profile = kb.find_max_batch_size(model, x, np.zeros(4096), maximum=4096)
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

    course = memory.Course
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
    profile = kb.find_max_batch_size(model, *arguments)
    assert profile.max_batch_size == 40
    assert profile.reason == "dataset"


# What it refuses, before it touches anything.


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
    with pytest.raises(ValueError, match=f"Received: .*{text}"):
        kb.find_max_batch_size(model, *comparing.regression())


def test_model_that_took_its_first_batch_for_its_size_is_probed():
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x, y = comparing.regression(24)
    model.fit(x, y, batch_size=8, verbose=0)
    assert kb.find_max_batch_size(model, x, y).max_batch_size == 24


def test_uncompiled_model_is_refused():
    with pytest.raises(ValueError, match="must be compiled"):
        kb.find_max_batch_size(dense(), *comparing.regression())
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
    before = comparing.variables_of(model)
    with pytest.raises(ValueError, match="Received: "):
        kb.find_max_batch_size(model, data, y)
    assert comparing.variables_of(model).keys() == before.keys()
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


def test_host_without_room_for_a_copy_of_the_weights_is_refused(monkeypatch):
    model = make_dense()
    before = comparing.variables_of(model)
    state = random.getstate()
    monkeypatch.setattr(_memory_host, "available_bytes", lambda: 100)
    with pytest.raises(ValueError, match="(?s)host must have room.*Received"):
        kb.find_max_batch_size(model, *comparing.regression())
    assert random.getstate() == state
    after = comparing.variables_of(model)
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name])


def test_limit_below_the_weights_is_refused():
    model = make_dense()
    with pytest.raises(ValueError, match="(?s)weights.*Received: memory_limit"):
        kb.find_max_batch_size(
            model, *comparing.regression(), memory_limit=200
        )
    assert not model.optimizer.built


def test_data_that_leave_no_room_are_named():
    x = np.zeros((1000, comparing.FEATURES), "float32")
    meter = FakeMeter(limit=20_000, slope=1)
    meter.is_shared = True
    model = make_dense()
    examples = Examples((x, x[:, :1]), 1000, data_bytes=x.nbytes)
    with pytest.raises(ValueError, match="(?s)copy of the data.*Received"):
        memory.probe(model, examples, memory.Limits(), True, meter)


def test_a_strategy_tells_the_device():
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        model = make_dense()
    gpu = mock.Mock(name="GPU:0")
    with mock.patch.object(
        tf.config, "list_logical_devices", return_value=[gpu]
    ):
        assert memory.devices_of(model) == ["CPU:0"]
        assert memory.devices_of(make_dense()) == ["GPU:0"]
