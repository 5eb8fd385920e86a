"""The profile: what follows from its rows, and where they go."""

import json
import math
import sys

import pytest

from keras_batchsize.batch_profile import BatchProfile
from keras_batchsize.batch_profile import ProfileRow

MB = 10**6


def row(size, fits=True, **changes):
    """50 MB + 2 MB, 10 ms + 1 ms per example."""
    values = {
        "batch_size": size,
        "peak_bytes": (50 + 2 * size) * MB,
        "predicted_bytes": None,
        "step_seconds": 0.01 + 0.001 * size,
        "fits": fits,
    }
    return ProfileRow(**values | changes)


def profile(**changes):
    values = {
        "rows": [row(1), row(32), row(100), row(150, False, note="over")],
        "max_batch_size": 100,
        "reason": "memory",
        "memory_limit": 400 * MB,
        "usable_bytes": 320 * MB,
        "dtype_policy": "float32",
        "device": "CPU:0",
        "measured_by": "allocator statistics",
    }
    return BatchProfile(**values | changes)


def test_step_time_is_that_of_the_rows():
    step_time = profile().step_time
    assert step_time.fixed == pytest.approx(0.01)
    assert step_time.per_example == pytest.approx(0.001)


def test_saturation_is_the_smallest_size_near_the_best_speed():
    found = profile()

    def speed(size):
        return size / (0.01 + 0.001 * size)

    expected = next(
        size for size in range(1, 101) if speed(size) >= 0.95 * speed(100)
    )
    assert found.saturation_batch_size == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 100),
        ({"reason": "maximum", "rows": [row(100)]}, 100),
        ({"replicas": 2}, 50),
        # Nothing says that more would not fit.
        ({"reason": "time", "rows": [row(100)]}, math.inf),
        ({"reason": "trials", "rows": [row(1), row(100)]}, math.inf),
        ({"reason": "time", "rows": [row(100)], "replicas": 2}, math.inf),
        # Half of what does not fit, as when memory runs out in training.
        ({"reason": "time"}, 100),
        ({"reason": "time", "max_batch_size": 1}, 75),
        ({"reason": "trials", "max_batch_size": 2, "replicas": 2}, 37),
    ],
)
def test_what_ended_early_limits_training_only_by_what_did_not_fit(
    changes, expected
):
    found = profile(**changes)
    assert found.largest_micro_batch_size == expected
    beyond = expected * found.replicas > found.max_batch_size
    assert found.ended_early == beyond


def test_saturation_stays_within_what_was_run():
    slow = [row(8, step_seconds=1.0), row(16, step_seconds=4.0)]
    assert profile(rows=slow, max_batch_size=16).saturation_batch_size == 8
    one = profile(rows=[row(5)], max_batch_size=5)
    assert 1 <= one.saturation_batch_size <= 5


def test_saturation_is_above_a_size_measured_to_be_slower():
    # No line fits: 71, 231 and 276 examples per second.
    times = {1: 0.01404, 47: 0.20337, 99: 0.35853}
    rows = [row(size, step_seconds=times[size]) for size in times]
    size = profile(rows=rows, max_batch_size=99).saturation_batch_size

    best = 99 / times[99]
    seconds = times[47] + (size - 47) / (99 - 47) * (times[99] - times[47])
    assert 47 < size < 99
    assert size / seconds == pytest.approx(0.95 * best, rel=5e-3)


def test_saturation_is_a_multiple_of_the_replicas():
    for replicas in (2, 3, 7):
        most = 100 // replicas * replicas
        alone = profile(max_batch_size=most).saturation_batch_size
        size = profile(
            max_batch_size=most, replicas=replicas
        ).saturation_batch_size
        assert size % replicas == 0
        assert size == most or 0 <= size - alone < replicas


def test_memory_line():
    constant, slope = profile().memory_line()
    assert constant == pytest.approx(50 * MB)
    assert slope == pytest.approx(2 * MB)
    assert profile().estimated_batch_size == 135


def test_unmeasured_memory_is_said():
    blind = profile(
        rows=[row(1, peak_bytes=None), row(4, peak_bytes=None)],
        max_batch_size=4,
        memory_limit=None,
        usable_bytes=None,
        measured_by="this system tells nothing",
    )
    assert math.isnan(blind.estimated_batch_size)
    assert "not measured" in str(blind)


def test_summary_shows_every_row_and_what_ended_it():
    texts = []
    profile().summary(texts.append)
    (text,) = texts
    for shown in ("100", "over", "ended by memory", "float32", "400.0 MB"):
        assert shown in text
    assert text == str(profile())


def test_summary_prints(capsys):
    profile().summary()
    assert capsys.readouterr().out.strip() == str(profile()).strip()


def test_saved_and_loaded_is_the_same(tmp_path):
    path = tmp_path / "new" / "profile.json"
    profile().save(path)
    assert BatchProfile.load(path) == profile()
    assert json.loads(path.read_text())["max_batch_size"] == 100


def test_a_stranger_is_not_loaded():
    with pytest.raises(ValueError, match="Received: format='other'"):
        BatchProfile.from_dict({"format": "other"})


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_plot(tmp_path, rows):
    failed = row(300, False, peak_bytes=None, step_seconds=None, note="oom")
    found = profile(rows=[*profile().rows[:rows], failed])
    figure = found.plot(to_file=tmp_path / "profile.png")
    memory, speed = figure.axes
    assert (tmp_path / "profile.png").stat().st_size > 1000
    labels = [text.get_text() for text in memory.get_legend().get_texts()]
    assert {"limit", "margin", "ran out of memory"} <= set(labels)
    assert "largest: 100" in labels
    # A point for each row with a time.
    assert len(speed.lines[0].get_xdata()) == rows


def test_plot_says_what_to_install(monkeypatch):
    name = "keras_batchsize._batch_profile_plot"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'"keras-batchsize\[plot\]"'):
        profile().plot()


def test_plot_shows_what_is_kept_for_fragments():
    found = profile(fragmentation_per_example=2e5)
    memory, _ = found.plot().axes
    (kept,) = [
        one
        for one in memory.collections
        if one.get_label() == "kept for fragments"
    ]
    corners = kept.get_paths()[0].vertices
    largest = corners[:, 0].max()
    at_largest = corners[corners[:, 0] == largest, 1] * 1e6
    usable = found.usable_bytes
    assert at_largest.max() == pytest.approx(usable)
    assert at_largest.min() == pytest.approx(usable - 2e5 * largest)


def test_plot_without_memory():
    found = profile(
        rows=[row(1, peak_bytes=None), row(4, peak_bytes=None)],
        max_batch_size=4,
        memory_limit=None,
        usable_bytes=None,
    )
    assert len(found.plot().axes) == 2


def test_plot_shows_a_limit_that_was_given_where_memory_is_not_measured():
    failed = row(8, False, peak_bytes=None, step_seconds=None)
    found = profile(
        rows=[row(1, peak_bytes=None), row(4, peak_bytes=None), failed],
        max_batch_size=4,
        usable_bytes=None,
    )
    memory, _ = found.plot().axes
    labels = [text.get_text() for text in memory.get_legend().get_texts()]
    assert "limit" in labels and "margin" not in labels
    assert "not measured" in str(found)
