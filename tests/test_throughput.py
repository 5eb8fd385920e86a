"""Laws of step time, efficiency and goodput."""

import math

import numpy as np
import pytest

from keras_batchsize import throughput
from keras_batchsize.throughput import StepTime

SIZES = 2.0 ** np.arange(15)

# (fixed seconds, seconds per example, noise scale): from a machine on which
# only the number of updates counts to one on which only examples do.
TASKS = [(1e-2, 1e-6, 300.0), (1e-3, 2e-5, 5_000.0), (1e-5, 1e-3, 50_000.0)]


@pytest.mark.parametrize("noise_scale", [0.0, 1.0, 300.0, 1e6])
def test_efficiency_is_one_at_the_base_and_falls_with_the_batch(noise_scale):
    values = [throughput.efficiency(b, noise_scale, 32) for b in SIZES]
    assert throughput.efficiency(32, noise_scale, 32) == 1.0
    assert all(np.diff(values) < 0.0)


def test_efficiency_is_what_the_examples_law_says():
    # McCandlish et al. 2018, eq. 2.11: E examples at batch size B, where Emin
    # would do one at a time, with (S/Smin - 1)(E/Emin - 1) = 1 and S = E/B.
    # Solved for E it is Emin·(1 + B/φ), φ = Emin/Smin.
    least_updates, least_examples = 100.0, 30_000.0
    noise_scale = least_examples / least_updates

    def examples(batch_size):
        needed = least_examples * (1.0 + batch_size / noise_scale)
        updates = needed / batch_size
        law = (updates / least_updates - 1) * (needed / least_examples - 1)
        assert law == pytest.approx(1.0, rel=1e-12)
        return needed

    for batch_size in SIZES:
        assert throughput.efficiency(
            batch_size, noise_scale, 32
        ) == pytest.approx(examples(32) / examples(batch_size), rel=1e-12)


def test_infinite_noise_makes_every_example_fully_useful():
    assert throughput.efficiency(4096, math.inf, 32) == 1.0
    # The limit, not a special case.
    assert throughput.efficiency(4096, 1e15, 32) == pytest.approx(1.0)


def brute_force_optimum(step_time, noise_scale):
    """The best of a grid whose neighbours differ by 0.1 %."""
    grid = np.exp(np.arange(0.0, math.log(1e6), 1e-3))
    useful = [throughput.goodput(b, step_time, noise_scale, 32) for b in grid]
    return grid[np.argmax(useful)]


@pytest.mark.parametrize(("fixed", "per_example", "noise_scale"), TASKS)
@pytest.mark.parametrize("largest", [math.inf, 256.0])
def test_closed_form_is_the_goodput_maximum(
    fixed, per_example, noise_scale, largest
):
    step_time = StepTime(fixed, per_example, largest)

    best = throughput.time_optimal_batch_size(step_time, noise_scale)

    # The spacing of the grid.
    assert best == pytest.approx(
        brute_force_optimum(step_time, noise_scale), rel=1e-3
    )


def test_optimum_is_the_limit_where_examples_cost_nothing():
    assert throughput.time_optimal_batch_size(StepTime(1.0, 0.0), 9) == math.inf
    limited = StepTime(1.0, 0.0, largest=512)
    assert throughput.time_optimal_batch_size(limited, 9) == 512


def progress_of_an_update(batch_size, rate, curvature=3.0, trace=50.0):
    """Expected decrease of h/2·‖w‖² by one update, computed as it is defined.

    With w = (2, 0, ..) the gradient is G = h·w, and a batch adds noise of the
    variance tr(Σ)/B: E‖w - ε(G + noise)‖² is a sum of two squares.
    """
    squared_distance = 4.0
    left = squared_distance * (1.0 - rate * curvature) ** 2
    left += rate**2 * trace / batch_size
    return curvature / 2.0 * (squared_distance - left)


@pytest.mark.parametrize("base", [1, 32])
@pytest.mark.parametrize("batch_size", [1, 8, 32, 40])
def test_linear_efficiency_is_that_of_a_quadratic(base, batch_size):
    curvature, trace = 3.0, 50.0
    noise_scale = trace / (4.0 * curvature**2)
    # The best rate at the base size, found by search.
    rates = np.linspace(1e-6, 1.0, 200_001)
    best = rates[np.argmax(progress_of_an_update(base, rates))]
    rate = throughput.RATE_SHARE * best

    scaled = progress_of_an_update(batch_size, rate * batch_size / base)
    ratio = scaled / batch_size / (progress_of_an_update(base, rate) / base)

    # The spacing of the rates; what is lost counts as nothing gained.
    assert throughput.linear_efficiency(
        batch_size, noise_scale, base
    ) == pytest.approx(max(ratio, 0.0), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("noise_scale", [1.0, 80.0, 5000.0])
def test_linear_efficiency_ends_where_the_rate_is_too_large(noise_scale):
    def efficiency(size):
        return throughput.linear_efficiency(size, noise_scale, 32)

    values = [efficiency(2**k) for k in range(5, 30)]
    assert values[0] == 1.0 and values[-1] == 0.0
    assert all(one >= two for one, two in zip(values, values[1:]))
    # However cheap examples are: no speed makes up for no progress.
    cheap, end = StepTime(1.0, 0.0), 2**29
    args = cheap, noise_scale, 32, throughput.linear_efficiency
    assert throughput.speedup(end, 2 * end, *args) == 0.0
    assert throughput.speedup(end, end // 2, *args) == math.inf
    assert throughput.speedup(end, end, *args) == 1.0


@pytest.mark.parametrize("old", [32, 64, 128, 1024])
def test_more_noise_never_speaks_against_a_larger_size(old):
    ratios = [
        throughput.progress_ratio(
            old, 2 * old, noise, 32, throughput.linear_efficiency
        )
        for noise in np.geomspace(1.0, 1e6, 200)
    ]
    assert all(one <= two + 1e-12 for one, two in zip(ratios, ratios[1:]))


@pytest.mark.parametrize(("fixed", "per_example", "noise_scale"), TASKS)
def test_speedups_multiply_along_a_path(fixed, per_example, noise_scale):
    step_time = StepTime(fixed, per_example, largest=1024)

    def speedup(old, new):
        return throughput.speedup(old, new, step_time, noise_scale)

    for a, b, c in [(32, 64, 128), (32, 4096, 8), (2048, 1, 64)]:
        assert speedup(a, c) == pytest.approx(
            speedup(a, b) * speedup(b, c), rel=1e-12
        )
        assert speedup(a, b) * speedup(b, a) == pytest.approx(1.0, rel=1e-12)
        assert speedup(a, a) == 1.0


@pytest.mark.parametrize("base", [1, 32, 4096])
def test_speedup_does_not_depend_on_the_base(base):
    step_time, noise_scale = StepTime(1e-3, 2e-5), 700.0
    ratio = throughput.goodput(
        256, step_time, noise_scale, base
    ) / throughput.goodput(64, step_time, noise_scale, base)
    assert throughput.speedup(
        64, 256, step_time, noise_scale
    ) == pytest.approx(ratio, rel=1e-12)


@pytest.mark.parametrize(("fixed", "per_example"), [task[:2] for task in TASKS])
@pytest.mark.parametrize("largest", [math.inf, 128.0])
def test_fit_recovers_exact_times(fixed, per_example, largest):
    sizes = np.array([16, 32, 128, 512, 4096])
    pieces = np.where(sizes > largest, sizes / largest, 1.0)
    seconds = fixed * pieces + per_example * sizes

    fit = throughput.fit_step_time(sizes, seconds, largest)

    # Times 4096 apart in size: some digits go to the condition of the system.
    assert fit.fixed == pytest.approx(fixed, rel=1e-9)
    assert fit.per_example == pytest.approx(per_example, rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("hit", range(4))
def test_a_hiccup_does_not_move_the_fit(count, hit):
    sizes = np.repeat([32, 64, 256, 1024], count)
    seconds = 1e-3 + 2e-5 * sizes
    seconds[hit * count] *= 100.0

    fit = throughput.fit_step_time(sizes, seconds)

    assert fit.fixed == pytest.approx(1e-3, rel=1e-9)
    assert fit.per_example == pytest.approx(2e-5, rel=1e-9)


def test_fit_moves_little_under_noise_and_a_hiccup():
    random = np.random.default_rng(0)
    sizes = np.repeat([32, 64, 256, 1024], 9)
    # Timings scatter upwards, by 5 % here.
    seconds = (1e-3 + 2e-5 * sizes) * (1 + random.exponential(0.05, sizes.size))
    calm = throughput.fit_step_time(sizes, seconds)
    seconds[3] *= 100.0

    fit = throughput.fit_step_time(sizes, seconds)

    # One of nine moves a lower quartile by a fraction of a rank: less than 1 %
    # here, and the intercept is four to forty times smaller than what it is a
    # part of.
    assert fit.fixed == pytest.approx(calm.fixed, rel=0.05)
    assert fit.per_example == pytest.approx(calm.per_example, rel=0.05)


@pytest.mark.parametrize(
    ("seconds", "zero"),
    [
        # Twice the size takes more than twice the time, and less time.
        ([1.0, 2.5, 6.0], "fixed"),
        ([3.0, 2.0, 1.0], "per_example"),
    ],
)
def test_coefficients_are_never_negative(seconds, zero):
    sizes = [32, 64, 128]
    fit = throughput.fit_step_time(sizes, seconds)
    assert getattr(fit, zero) == 0.0

    # Of all non-negative pairs it has the smallest relative error.
    def error(fixed, per_example):
        times = fixed + per_example * np.array(sizes)
        return np.square(times / seconds - 1.0).sum()

    least = error(fit.fixed, fit.per_example)
    for a in np.linspace(0.0, 3.0, 61):
        for c in np.linspace(0.0, 0.06, 61):
            assert error(a, c) >= least - 1e-12


def test_small_sizes_count_as_much_as_large_ones():
    # Times that no line fits. Minimising seconds, the largest size decides
    # alone, and the smallest is missed by half of its time and more.
    sizes, seconds = np.array([32, 320, 3200]), np.array([1.3, 4.2, 50.0])
    slope, intercept = np.polyfit(sizes, seconds, 1)
    assert abs((intercept + slope * 32) / 1.3 - 1.0) > 0.5

    fit = throughput.fit_step_time(sizes, seconds)

    errors = [fit(b) / t - 1.0 for b, t in zip(sizes, seconds)]
    assert max(np.abs(errors)) < 0.2


@pytest.mark.parametrize(
    ("sizes", "largest"),
    [
        ([256, 256], math.inf),
        # What lies beyond `largest` is made of the same pieces.
        ([256, 512], 256),
        ([512, 1024], 256),
        ([256, 512, 1024], 256),
    ],
)
def test_one_size_is_taken_as_half_fixed(sizes, largest):
    seconds = [one / 256 for one in sizes]  # A second per piece.
    fit = throughput.fit_step_time(sizes, seconds, largest)
    assert fit.fixed == pytest.approx(0.5, rel=1e-12)
    assert fit.per_example * 256 == pytest.approx(0.5, rel=1e-12)
    assert fit(1024) == pytest.approx(4.0 if largest == 256 else 2.5, rel=1e-12)
    # Whoever decides on it must know.
    assert fit.guessed
    both = throughput.fit_step_time([*sizes, 64], [*seconds, 0.2], largest)
    assert not both.guessed


def test_accumulation_pays_the_fixed_cost_for_each_piece():
    step_time = StepTime(fixed=1.0, per_example=0.01, largest=100)
    assert step_time(50) == pytest.approx(1.5)
    assert step_time(100) == pytest.approx(2.0)
    for pieces in (2, 3, 8):
        assert step_time(100 * pieces) == pytest.approx(2.0 * pieces)


def test_accumulation_is_never_credited_with_a_gain():
    step_time = StepTime(fixed=1.0, per_example=0.01, largest=128)
    for larger in (256, 512, 4096):
        assert throughput.speedup(128, larger, step_time, math.inf) <= 1.0


@pytest.mark.parametrize(("fixed", "per_example"), [task[:2] for task in TASKS])
@pytest.mark.parametrize("fraction", [0.5, 0.95])
@pytest.mark.parametrize("largest", [math.inf, 128.0])
def test_saturation_reaches_the_fraction_of_the_best_throughput(
    fixed, per_example, fraction, largest
):
    step_time = StepTime(fixed, per_example, largest)

    def examples_per_second(batch_size):
        return batch_size / step_time(batch_size)

    # 2^60 examples stand for infinitely many: one update costs nothing then.
    best = examples_per_second(min(largest, 2.0**60))
    size = throughput.saturation_batch_size(step_time, fraction)

    assert examples_per_second(size) == pytest.approx(fraction * best, rel=1e-6)
    assert examples_per_second(0.99 * size) < fraction * best
    assert size <= largest


def test_nothing_saturates_where_examples_cost_nothing():
    assert throughput.saturation_batch_size(StepTime(1.0, 0.0)) == math.inf
    limited = StepTime(1.0, 0.0, largest=512)
    assert throughput.saturation_batch_size(limited, 0.5) == 256


@pytest.mark.parametrize(
    ("sizes", "seconds", "named"),
    [
        ([], [], "len\\(batch_sizes\\)=0"),
        ([32], [1.0, 2.0], "len\\(seconds\\)=2"),
        ([32, 64], [1.0, 0.0], "Received: seconds=\\[1.0, 0.0\\]"),
        ([32, 64], [1.0, math.nan], "Received: seconds=\\[1.0, nan\\]"),
    ],
)
def test_times_that_cannot_be_fitted_are_named(sizes, seconds, named):
    with pytest.raises(ValueError, match=named):
        throughput.fit_step_time(sizes, seconds)


# Largest piece and seconds of the all-reduce: without one, with one that
# micro-batches save, and with one that costs more than everything else.
SHARED = [(math.inf, 0.0), (math.inf, 1e-2), (256, 0.0), (256, 1e-3), (64, 1.0)]


@pytest.mark.parametrize(("largest", "communication"), SHARED)
@pytest.mark.parametrize(("fixed", "per_example", "noise_scale"), TASKS)
def test_optimum_with_communication_is_found_by_a_search(
    fixed, per_example, noise_scale, largest, communication
):
    step_time = StepTime(
        fixed, per_example, largest, communication=communication
    )
    optimum = throughput.time_optimal_batch_size(step_time, noise_scale)
    searched = np.geomspace(1.0, 1e8, 20_001)
    goodputs = [
        throughput.goodput(size, step_time, noise_scale, 32)
        for size in searched
    ]
    best = throughput.goodput(optimum, step_time, noise_scale, 32)
    # A step of the search is 0.1 %, which may miss the kink at the largest.
    assert max(goodputs) <= best * (1.0 + 1e-6)
    assert best <= max(goodputs) * (1.0 + 1e-3)


@pytest.mark.parametrize(("largest", "communication"), SHARED)
def test_saturation_has_the_fraction_it_is_asked_for(largest, communication):
    step_time = StepTime(1e-3, 2e-5, largest, communication=communication)
    size = throughput.saturation_batch_size(step_time)
    speeds = [one / step_time(one) for one in (size, 1e12)]
    assert speeds[0] == pytest.approx(0.95 * speeds[1], rel=1e-6)


@pytest.mark.parametrize("largest", [math.inf, 64])
def test_fit_recovers_what_communication_leaves(largest):
    truth = StepTime(1e-3, 2e-5, largest, communication=4e-4)
    sizes = [16, 32, 64, 128, 256, 512]
    seconds = [truth(size) for size in sizes]
    fitted = throughput.fit_step_time(sizes, seconds, largest, 4e-4)
    for size in sizes:
        assert fitted(size) == pytest.approx(truth(size), rel=1e-9)
    # A network that was slow when it was asked does not eat the whole update.
    slow = throughput.fit_step_time(sizes, seconds, largest, 1.0)
    assert slow.communication == min(seconds) / 2.0
