"""The search for the largest size, on devices whose memory is a formula."""

import itertools
import math

import numpy as np
import pytest

from keras_batchsize import size_search
from keras_batchsize.size_search import Bounds
from keras_batchsize.size_search import Trial

MB = 1e6


@pytest.fixture
def no_trial_is_cheap():
    """Times are stated here, not measured."""


class Device:
    """A device on which a step of B examples takes `peak(B)` bytes.

    Args:
        peak: Function of the size.
        limit: Bytes beyond which a step fails; None for never.
        known: Whether the search may read peaks and the limit.
        constant: Bytes that are known not to grow.
        seconds: Seconds of a trial per example.
    """

    def __init__(
        self, peak, limit=None, known=True, constant=0.0, seconds=0.0
    ):
        self.peak = peak
        self.limit = limit
        self.known = known
        self.constant = constant
        self.seconds = seconds

    def run(self, size):
        peak, elapsed = self.peak(size), self.seconds * size
        step = max(elapsed / 5, 1e-9)
        if self.limit is not None and peak > self.limit:
            return Trial(size, failed=True, trial_seconds=elapsed)
        seen = peak if self.known else None
        return Trial(size, seen, step, False, elapsed, self.constant)


def search(device, time_budget=math.inf, **bounds):
    """Runs a search to its end.

    Returns:
        Tuple of the trials, the best of them, and the reason.
    """
    usable = None
    if device.known and device.limit is not None:
        usable = 0.8 * device.limit
        bounds.setdefault("hard_bytes", 0.9 * device.limit)
    bounds = Bounds(usable_bytes=usable, **bounds)
    trials, left = [], time_budget
    while True:
        size, reason = size_search.next_size(trials, bounds, left)
        if size is None:
            break
        trials.append(device.run(size))
        left -= trials[-1].trial_seconds
    return trials, size_search.largest_that_fits(trials, usable), reason


def truth(device):
    """The largest size below the margin, by counting up."""
    usable = 0.8 * device.limit
    return next(
        size - 1
        for size in itertools.count(1)
        if device.peak(size) > usable
    )


def convex(workspace, slope, steep, kink):
    """Largest of two straight lines: the phases of a step."""
    return lambda size: 20 * MB + max(
        workspace + slope * size, steep * (size - kink)
    )


# With the bytes known not to grow; workspaces, say, are not among them.
PEAKS = {
    "straight": (lambda size: 30 * MB + 0.3 * MB * size, 20 * MB),
    "steep": (lambda size: 30 * MB + 9 * MB * size, 20 * MB),
    "flat": (lambda size: 60 * MB + 0.02 * MB * size, 20 * MB),
    "kinked": (convex(40 * MB, 0.01 * MB, 0.05 * MB, 100), 20 * MB),
    "weights": (lambda size: 280 * MB + 0.2 * MB * size, 270 * MB),
    "stairs": (lambda size: 30 * MB + 9 * MB * math.ceil(size / 32), 20 * MB),
}


@pytest.mark.parametrize(("peak", "constant"), PEAKS.values(), ids=PEAKS)
@pytest.mark.parametrize("start", [1, 8])
def test_finds_the_limit_in_few_trials_without_failing(peak, constant, start):
    device = Device(peak, 400 * MB, constant=constant)
    trials, best, reason = search(device, start=start)
    assert not any(trial.failed for trial in trials)
    assert len(trials) <= size_search.MOST_TRIALS
    # Nearly all of the memory, rounded down to a multiple of 8 at most.
    assert 0.85 * truth(device) - 8 <= best.batch_size <= truth(device)
    assert reason in ("memory", "trials")


def test_returns_only_what_was_run_and_stayed_below():
    rng = np.random.default_rng(0)
    for _ in range(200):
        constant, slope = 10 ** rng.uniform(6, 8), 10 ** rng.uniform(3, 7.5)
        noise = iter(rng.uniform(0.92, 1.08, size=50))
        device = Device(
            lambda size: (constant + slope * size) * next(noise), 400 * MB
        )
        trials, best, _ = search(device)
        assert len(trials) <= size_search.MOST_TRIALS
        assert best in trials
        assert not best.failed and best.peak_bytes <= 0.8 * device.limit
        assert all(
            not size_search.fits(trial, 0.8 * device.limit)
            for trial in trials
            if trial.batch_size > best.batch_size
        )


def test_memory_that_jumps_at_one_size_is_survived():
    # cuDNN chose an algorithm with 15 times the memory at one batch size.
    def peak(size):
        return (3766 if 20 <= size < 40 else 40 + 2 * size) * MB

    trials, best, _ = search(Device(peak, 1000 * MB), start=29)
    assert trials[0].failed
    # Half way down from what failed, at least.
    assert 15 <= best.batch_size < 20


def test_first_size_too_large_goes_down():
    device = Device(PEAKS["straight"][0], 400 * MB, constant=30 * MB)
    trials, best, _ = search(device, start=100_000)
    # One failure is enough: from then on it is known what an example takes.
    assert [trial.failed for trial in trials].count(True) == 1
    assert len(trials) <= size_search.MOST_TRIALS
    assert 0.85 * truth(device) <= best.batch_size <= truth(device)


def test_failure_on_the_way_is_no_reason_to_forget_what_was_measured():
    lucky = iter([True])

    def peak(size):
        # Fragments: what should have fitted does not, once.
        unlucky = size > 500 and next(lucky, False)
        return 500 * MB if unlucky else 30 * MB + 0.3 * MB * size

    trials, best, _ = search(Device(peak, 400 * MB, constant=20 * MB))
    assert [trial.failed for trial in trials].count(True) == 1
    assert best.batch_size >= 0.5 * 966


@pytest.mark.parametrize("known", [True, False])
def test_nothing_fits(known):
    device = Device(lambda size: (500 + size) * MB, 400 * MB, known)
    trials, best, _ = search(device, start=64)
    assert best is None
    assert min(trial.batch_size for trial in trials) == 1


def test_without_a_measure_failures_bound_the_size():
    device = Device(PEAKS["straight"][0], 400 * MB, known=False)
    trials, best, _ = search(device)
    assert any(trial.failed for trial in trials)
    assert device.peak(best.batch_size) <= device.limit
    # A jump from the largest size that runs.
    assert best.batch_size > (400 - 30) / 0.3 / 4


def test_ends_at_the_cap():
    device = Device(PEAKS["flat"][0], 400 * MB)
    _, best, reason = search(device, cap=501, cap_reason="dataset")
    assert (best.batch_size, reason) == (501, "dataset")


def test_ends_with_the_time():
    device = Device(PEAKS["flat"][0], 400 * MB, seconds=0.01)
    trials, best, reason = search(device, time_budget=20.0)
    assert reason == "time"
    assert sum(trial.trial_seconds for trial in trials) <= 20.0
    assert best.batch_size > 100


def test_sizes_are_shared_by_all_replicas():
    device = Device(PEAKS["straight"][0], 400 * MB)
    trials, _, _ = search(device, start=6, multiple_of=6)
    assert all(trial.batch_size % 6 == 0 for trial in trials)


def test_one_trial_is_enough_where_one_example_fills_it():
    device = Device(lambda size: 300 * MB * size, 400 * MB)
    trials, best, _ = search(device)
    assert best.batch_size == 1
    assert [trial.batch_size for trial in trials] == [1]


def test_what_tensors_take_together_shortens_the_way():
    # A constant that nobody knows hides what an example takes.
    device = Device(lambda size: 150 * MB + 0.05 * MB * size, 400 * MB)
    slow, _, _ = search(device)
    fast, best, _ = search(device, growth_bytes=(0.15 * MB,))
    assert len(fast) < len(slow)
    assert not any(trial.failed for trial in fast)
    assert best.batch_size >= 0.85 * truth(device)


# Per example and per pair: alone, hidden behind a workspace, and behind what
# the examples take by themselves.
PAIRS = {
    "pairs": (20 * MB, 0, 40),
    "many": (20 * MB, 1000, 40_000),
    "mixed": (20 * MB, 0.02 * MB, 40),
    "hidden": (60 * MB, 0.02 * MB, 40),
}


def paired(constant, slope, pairs):
    return lambda size: constant + slope * size + pairs * size**2


@pytest.mark.parametrize("start", [1, 8, 64])
@pytest.mark.parametrize("form", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("times", [None, 1.5])
def test_memory_known_to_grow_with_the_square_never_overshoots(
    form, start, times
):
    device = Device(paired(*form), 400 * MB, constant=20 * MB)
    growth = () if times is None else [times * one for one in form[1:]]
    trials, best, _ = search(
        device, start=start, degree=2, growth_bytes=growth
    )
    assert not any(trial.failed for trial in trials)
    assert all(trial.peak_bytes <= 0.8 * 400 * MB for trial in trials)
    # Where a workspace hides all, and no graph tells, the way is long.
    if times is not None or form != PAIRS["hidden"]:
        assert 0.85 * truth(device) <= best.batch_size


@pytest.mark.parametrize("start", [1, 8])
@pytest.mark.parametrize("slope", [0.02 * MB, 0.05 * MB, 0.2 * MB])
def test_memory_seen_to_grow_with_the_square_does_not_overshoot(slope, start):
    device = Device(
        paired(20 * MB, slope, 40), 400 * MB, constant=20 * MB
    )
    trials, best, _ = search(device, start=start)
    assert not any(trial.failed for trial in trials)
    assert all(trial.peak_bytes <= 0.9 * 400 * MB for trial in trials)
    assert 0.85 * truth(device) <= best.batch_size


def test_a_line_is_not_followed_where_memory_rose_by_more():
    device = Device(paired(20 * MB, 0.02 * MB, 40), 400 * MB)
    trials = [
        Trial(size, device.peak(size), constant_bytes=20 * MB)
        for size in (32, 1024)
    ]
    bounds = Bounds(usable_bytes=320 * MB, hard_bytes=360 * MB)
    size, _ = size_search.next_size(trials, bounds)
    assert 1024 < size <= truth(device)
    per_example = (trials[1].peak_bytes - trials[0].peak_bytes) / (1024 - 32)
    straight = 1024 + (312 * MB - trials[1].peak_bytes) / per_example
    assert device.peak(straight) > device.limit


def test_cubes_take_a_third_root():
    device = Device(
        lambda size: 20 * MB + 5.0 * size**3, 400 * MB, constant=20 * MB
    )
    trials, best, _ = search(device, degree=3)
    assert not any(trial.failed for trial in trials)
    assert 0.85 * truth(device) <= best.batch_size <= truth(device)


@pytest.mark.parametrize(
    ("peak", "near"),
    [(96.9, False), (97.1, True), (102.9, True), (103.1, False), (None, False)],
)
def test_near_the_margin_is_what_noise_may_decide(peak, near):
    # 50 of the 100 are there for batches: 6 % of them to either side.
    trial = Trial(8, peak_bytes=peak, constant_bytes=50.0)
    assert size_search.is_near(trial, 100.0) == near
    assert not size_search.is_near(trial, None)


@pytest.mark.parametrize(("size", "larger"), [(60, 117), (100, 192)])
def test_large_sizes_are_multiples_of_8_and_that_costs_little(size, larger):
    # At a byte per example half of the memory is left, of which 97.5 % count.
    trials = [Trial(size, peak_bytes=size)]
    bounds = Bounds(usable_bytes=2 * size)
    assert size_search.next_size(trials, bounds) == (larger, None)
    assert larger > 0.94 * 1.95 * size


@pytest.mark.parametrize(
    ("seconds", "made", "goes_on"),
    [(1.4, 5, True), (1.4, 6, False), (1.6, 5, False)],
)
def test_only_cheap_trials_are_made_for_the_last_percent(
    seconds, made, goes_on
):
    # 95 % are taken, where 94 are enough and 97.5 are aimed at.
    trials = [
        Trial(size, peak_bytes=size, trial_seconds=seconds)
        for size in (95 - made + 1 + step for step in range(made))
    ]
    size, _ = size_search.next_size(trials, Bounds(usable_bytes=100))
    assert size == (97 if goes_on else None)


@pytest.mark.parametrize("replicas", [1, 2, 3, 5, 7, 8, 12])
@pytest.mark.parametrize("size", [84, 840, 8400])
def test_rounding_costs_little_with_any_number_of_replicas(size, replicas):
    size -= size % replicas
    bounds = Bounds(usable_bytes=2 * size, multiple_of=replicas)
    larger, _ = size_search.next_size([Trial(size, peak_bytes=size)], bounds)
    assert larger % replicas == 0
    # One of 16 multiples at most, or one example of each replica.
    least = min(15 / 16, 1.0 - replicas / (1.95 * size))
    assert larger >= least * 1.95 * size - 1e-6
    if size >= 16 * math.lcm(replicas, 8):
        assert larger % 8 == 0
