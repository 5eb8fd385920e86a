"""Laws of the noise statistics.

The estimators are checked against populations small enough to enumerate: their
expectation is then a finite sum, without a seed and without a statistical
tolerance. Only the interval is checked by simulation.
"""

import itertools
import json
import math

import numpy as np
import pytest
from quadratics import SPREAD
from quadratics import measured
from quadratics import norms_of_means
from quadratics import quadratic

from keras_batchsize import noise
from keras_batchsize.noise import MicroBatchNorms
from keras_batchsize.noise import NoiseScaleEstimator
from keras_batchsize.noise import gradient_moments
from keras_batchsize.noise import inverse_rank

# Three examples stand for the population, so its moments are known.
EXAMPLES = np.array([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.25]])
SQUARED_NORM = np.square(EXAMPLES.mean(axis=0)).sum()
TRACE = EXAMPLES.var(axis=0, ddof=0).sum()


def norms_of(parts):
    """The norms of one update, straight from their definitions.

    Args:
        parts: List of arrays of shape (examples, parameters).
    """
    means = np.array([np.mean(part, axis=0) for part in parts])
    return norms_of_means(means, np.array([len(part) for part in parts]))


def moments_of(norms):
    return gradient_moments(
        norms.micro_sq_norm,
        norms.mean_sq_norm,
        norms.examples / norms.count,
        norms.count,
    )


def every_update(draws, sizes):
    """Yields the norms of every equally likely update.

    Args:
        draws: Iterable of sequences of examples.
        sizes: Examples in each micro-batch.
    """
    ends = np.cumsum(sizes)[:-1]
    for draw in draws:
        yield norms_of(np.split(np.array(draw), ends))


def with_replacement(sizes, examples=EXAMPLES):
    draws = itertools.product(examples, repeat=sum(sizes))
    return every_update(draws, sizes)


def without_replacement(sizes, examples):
    return every_update(itertools.permutations(examples, sum(sizes)), sizes)


def expectation(updates):
    return np.mean(
        [(m.squared_norm, m.trace) for m in map(moments_of, updates)], axis=0
    )


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (1, 1, 1, 1), (3, 3)])
def test_moments_are_unbiased(sizes):
    estimate = expectation(with_replacement(sizes))
    # float64 sums of at most 3^6 terms: only rounding is left.
    np.testing.assert_allclose(estimate, [SQUARED_NORM, TRACE], rtol=1e-12)


@pytest.mark.parametrize("sizes", [(1, 2), (3, 1), (1, 1, 2), (2, 1, 3)])
def test_moments_of_unequal_micro_batches_are_unbiased(sizes):
    estimate = expectation(with_replacement(sizes))
    np.testing.assert_allclose(estimate, [SQUARED_NORM, TRACE], rtol=1e-12)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (1, 3), (1, 1, 2), (2, 3)])
def test_moments_without_replacement_are_those_of_the_distribution(sizes):
    # An epoch sees each example once. The D = 5 examples are all there are, so
    # the trace is their variance with D - 1 in the denominator, and ‖G‖² lacks
    # the share of it that is in their mean.
    examples = np.vstack([EXAMPLES, [[0.0, 1.0], [2.0, -1.5]]])
    trace = examples.var(axis=0, ddof=1).sum()
    squared_norm = np.square(examples.mean(axis=0)).sum() - trace / 5

    estimate = expectation(without_replacement(sizes, examples))

    np.testing.assert_allclose(estimate, [squared_norm, trace], rtol=1e-12)


def test_two_halves_have_the_dot_product_as_their_squared_norm():
    # Another formula for two parts, from which nothing is subtracted.
    one, two = EXAMPLES[:1], EXAMPLES[1:2]
    moments = moments_of(norms_of([one, two]))
    assert moments.squared_norm == pytest.approx(one[0] @ two[0], rel=1e-12)
    gap = one[0] - two[0]
    assert moments.trace == pytest.approx(gap @ gap / 2, rel=1e-12)


# The traps: what the formula is given wrongly, it misses.


@pytest.mark.parametrize(
    "wrong",
    [
        # The two norms for each other.
        lambda u: (u.mean_sq_norm, u.micro_sq_norm, 1, 2),
        # The variance of a micro-batch taken for that of the batch.
        lambda u: (u.micro_sq_norm, u.mean_sq_norm, u.examples, 2),
        # A micro-batch too many.
        lambda u: (u.micro_sq_norm, u.mean_sq_norm, 1, 3),
        # Gradients that are 1/replicas of the mean, as Keras makes them.
        lambda u: (u.micro_sq_norm / 4, u.mean_sq_norm / 4, 1, 2),
    ],
    ids=["swapped", "examples", "count", "scaled"],
)
def test_moments_of_wrong_arguments_are_biased(wrong):
    updates = list(with_replacement((1, 1)))
    np.testing.assert_allclose(
        expectation(updates), [SQUARED_NORM, TRACE], rtol=1e-12
    )
    mean = np.mean([gradient_moments(*wrong(u)).trace for u in updates])
    assert mean != pytest.approx(TRACE, rel=0.2)


def test_what_training_moves_is_no_noise():
    # Two successive updates taken for two parts: between them the weights
    # moved, and the gradient with them.
    drift = np.array([3.0, -1.0])
    draws = list(itertools.product(EXAMPLES, repeat=4))
    at_once = [norms_of([d[:1], d[1:2]]) for d in map(np.array, draws)]
    in_turn = [
        norms_of([d[:2], d[2:] + drift]) for d in map(np.array, draws)
    ]
    np.testing.assert_allclose(
        expectation(at_once), [SQUARED_NORM, TRACE], rtol=1e-12
    )
    squared_norm, trace = expectation(in_turn)
    assert trace == pytest.approx(TRACE + 2 * drift @ drift / 2, rel=1e-12)
    # Of two gradients there is the product, of neither the squared norm.
    product = EXAMPLES.mean(axis=0) @ (EXAMPLES.mean(axis=0) + drift)
    assert squared_norm == pytest.approx(product, rel=1e-12)
    assert squared_norm != pytest.approx(SQUARED_NORM, rel=0.2)


@pytest.mark.parametrize("count", [1, 1.0, 0])
def test_one_micro_batch_is_told_what_to_do(count):
    with pytest.raises(ValueError) as caught:
        gradient_moments(1.0, 0.5, 16, count)
    text = str(caught.value)
    # The constraint and why; what was received; an edit.
    assert text.startswith("`count` must be at least 2: ")
    assert f"Received: count={count}." in text
    assert text.endswith(
        "Use a smaller `micro_batch_size` or more replicas."
    )


# How precise a measurement is.


@pytest.mark.parametrize(("size", "count"), [(1, 3), (1, 4), (1, 6), (2, 3)])
def test_rank_is_that_of_the_noise(size, count):
    # Without a signal, tr(Σ²) of the micro-batch gradients is unbiased.
    noise_only = EXAMPLES - EXAMPLES.mean(axis=0)
    covariance = np.cov(noise_only.T, ddof=0) / size
    micro_trace = np.trace(covariance)

    def squared_covariance(norms):
        # The trace is taken as known: a ratio of estimates is not unbiased.
        known = noise.GradientMoments(
            moments_of(norms).squared_norm, micro_trace * size
        )
        one, freedom = inverse_rank(norms, known)
        assert freedom == count - 2
        return one * micro_trace**2

    updates = with_replacement([size] * count, noise_only)
    mean = np.mean([squared_covariance(one) for one in updates])

    assert mean == pytest.approx(np.trace(covariance @ covariance), rel=1e-12)


def test_a_signal_makes_the_rank_look_smaller_never_larger():
    # Then the intervals are too wide, which is the safe side.
    noise_only = EXAMPLES - EXAMPLES.mean(axis=0)
    trace = noise_only.var(axis=0, ddof=0).sum()

    def mean_inverse_rank(signal):
        updates = with_replacement([1, 1, 1], noise_only + signal)
        return np.mean(
            [
                inverse_rank(
                    one,
                    noise.GradientMoments(moments_of(one).squared_norm, trace),
                )[0]
                for one in updates
            ]
        )

    values = [mean_inverse_rank([s, -s / 2]) for s in (0.0, 0.5, 2.0)]
    assert values == sorted(values)


def test_two_micro_batches_do_not_tell_how_precise_they_are():
    norms = norms_of([EXAMPLES[:1], EXAMPLES[1:2]])
    assert inverse_rank(norms, moments_of(norms)) == (0.0, 0.0)
    unmeasured = norms_of([[one] for one in EXAMPLES])._replace(products=None)
    assert inverse_rank(unmeasured, moments_of(unmeasured)) == (0.0, 0.0)


@pytest.mark.parametrize("noise_scale", [256.0, 4096.0])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_variances_are_those_of_gaussian_noise(noise_scale, count):
    # All eigenvalues equal, for which the effective rank says everything.
    gradient, deviation = quadratic(np.ones(60), noise_scale, np.ones(60))
    random = np.random.default_rng(0)
    moments = [
        moments_of(measured(random, gradient, deviation, count=count))
        for _ in range(4000)
    ]
    pairs = [(one.squared_norm, one.trace) for one in moments]

    one = noise.averaged(
        noise.RunningMoments(),
        noise.GradientMoments(gradient @ gradient, 60.0),
        weight=1.0,
        examples=1024,
        count=count,
        level=60.0,
    )
    variance = one.noise_noise + one.signal_noise * (gradient @ gradient)

    # A variance of 4000 has a relative standard error of 2 %.
    (var_x, cov), (_, var_y) = np.cov(np.transpose(pairs))
    assert variance / 60 == pytest.approx(var_x, rel=0.08)
    assert one.trace_variance / 60 == pytest.approx(var_y, rel=0.08)
    correlation = one.covariance / 60 / math.sqrt(var_x * var_y)
    assert correlation == pytest.approx(
        cov / math.sqrt(var_x * var_y), abs=0.05
    )


# The interval.


def interval(x, y, var_x, var_y, cov, freedom=1e9):
    """The estimate from averages with these (co)variances."""
    running = noise.RunningMoments(
        weight=1.0,
        squared_norm=x,
        trace=y,
        noise_noise=var_x,
        trace_variance=var_y,
        covariance=cov,
    )
    return noise.estimate(running, rank_inverse=1.0, freedom=freedom)


INTERVALS = [
    (1.0, 50.0, 0.01, 4.0, -0.1),
    (1.0, 50.0, 0.2, 4.0, -0.1),
    (1.0, 0.5, 0.2, 0.4, 0.2),
    (0.02, 3.0, 1e-5, 0.1, 0.0),
]


@pytest.mark.parametrize("numbers", INTERVALS)
def test_interval_holds_the_ratios_that_the_data_allow(numbers):
    x, y, var_x, var_y, cov = numbers
    found = interval(*numbers)

    # By trial: φ is allowed if y - φx is zero within 1.96 of its deviation.
    ratios = np.linspace(0.0, 30.0 * y / x, 300_001)
    deviation = np.sqrt(var_y - 2 * ratios * cov + ratios**2 * var_x)
    allowed = ratios[np.abs(y - ratios * x) <= 1.96 * deviation]

    spacing = ratios[1]
    assert found.resolved
    assert found.lower == pytest.approx(allowed[0], abs=2 * spacing)
    assert found.upper == pytest.approx(allowed[-1], abs=2 * spacing)
    assert found.lower <= found.value <= found.upper
    assert found.value == y / x


@pytest.mark.parametrize("numbers", INTERVALS)
def test_standard_error_is_that_of_a_small_change(numbers):
    x, y, *spread = numbers
    # Small enough for the delta method: the interval is then symmetric.
    found = interval(x, y, *(one * 1e-6 for one in spread))
    half = (found.upper - found.lower) / 2
    assert found.standard_error == pytest.approx(half / 1.96, rel=1e-3)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    # Student's t, 97.5 %, from a table.
    [(6, 2.447), (12, 2.179), (30, 2.042), (120, 1.980)],
)
def test_little_knowledge_widens_the_interval_as_student_says(
    freedom, quantile
):
    found = interval(1.0, 50.0, 1e-8, 0.0, 0.0, freedom)
    half = (found.upper - found.lower) / 2
    # The expansion is good to 1 % from 6 on, which one measurement has.
    assert half / 50.0 / 1e-4 == pytest.approx(quantile, rel=0.01)


def coverage(direction, noise_scale, times, repetitions=300):
    """Shares of trainings whose interval holds φ, at so many measurements."""
    gradient, deviation = quadratic(SPREAD, noise_scale, direction)
    random = np.random.default_rng(0)
    held = np.zeros(len(times))
    for _ in range(repetitions):
        estimator = NoiseScaleEstimator([4096, 16384, 65536], [1, 4, 16])
        for time in range(max(times)):
            norms = measured(random, gradient, deviation)
            estimator.add([norms], examples=1024)
            if time + 1 in times:
                found = estimator.estimate()
                inside = found.lower <= noise_scale <= found.upper
                held[times.index(time + 1)] += inside
    return held / repetitions


@pytest.mark.parametrize("noise_scale", [512.0, 2048.0, 16384.0])
@pytest.mark.parametrize(
    ("direction", "least", "most"),
    [
        # A signal where the noise is, as in training: what the interval is
        # made for.
        (np.sqrt(SPREAD), 0.93, 0.995),
        # A signal in all directions: too wide, since the rank is taken for
        # smaller than it is.
        (np.ones(200), 0.95, 1.0),
        # A signal in the one noisiest direction: the worst case, too narrow.
        (np.eye(200)[0], 0.87, 1.0),
    ],
    ids=["noisy", "any", "noisiest"],
)
def test_interval_covers_the_truth(noise_scale, direction, least, most):
    # 95 % is the aim. 300 repetitions have a standard error of 1.3 %.
    shares = coverage(direction, noise_scale, times=(2, 5, 9))
    assert all(least <= shares)
    assert all(shares <= most)


def test_interval_shrinks_as_measurements_come_in():
    gradient, deviation = quadratic(SPREAD, 1024.0, np.sqrt(SPREAD))
    random = np.random.default_rng(0)
    estimator = NoiseScaleEstimator([1e9])
    widths = []
    for time in range(256):
        estimator.add([measured(random, gradient, deviation)], 1024)
        if time + 1 in (16, 64, 256):
            found = estimator.estimate()
            widths.append(found.upper - found.lower)
    # As 1/√n, to within what the estimate itself moves.
    assert widths[0] / widths[1] == pytest.approx(2.0, rel=0.3)
    assert widths[1] / widths[2] == pytest.approx(2.0, rel=0.3)


# What is not resolved.


def test_nothing_is_known_before_the_first_measurement():
    found = NoiseScaleEstimator([1024]).estimate()
    assert not found.resolved
    assert math.isnan(found.value)
    assert (found.lower, found.upper) == (0.0, math.inf)


def fed(norms, horizons=(1e9,), examples=1024, **kwargs):
    estimator = NoiseScaleEstimator(horizons, **kwargs)
    for one in norms:
        estimator.add([one], examples)
    return estimator


def test_measurements_of_unknown_precision_are_never_resolved():
    random = np.random.default_rng(0)
    gradient, deviation = quadratic(SPREAD, 10.0, np.ones(200))
    halves = [
        measured(random, gradient, deviation, count=2) for _ in range(100)
    ]
    found = fed(halves).estimate()
    assert not found.resolved
    assert found.value == pytest.approx(10.0, rel=0.2)


def test_a_denominator_like_zero_is_not_resolved():
    random = np.random.default_rng(0)
    gradient, deviation = quadratic(SPREAD, 1e6, np.ones(200))
    found = fed(
        [measured(random, gradient, deviation) for _ in range(8)]
    ).estimate()
    assert not found.resolved
    assert found.upper == math.inf
    # What can be said: φ is not small.
    assert 100.0 < found.lower < 1e6


@pytest.mark.parametrize(
    ("x", "y", "value"),
    [
        (1.0, -1.0, 0.0),
        (1.0, 0.0, 0.0),
        (-1.0, 1.0, math.inf),
        (0.0, 1.0, math.inf),
        (-1.0, -1.0, math.nan),
        (math.nan, 1.0, math.inf),
    ],
)
def test_moments_without_a_ratio_are_not_resolved(x, y, value):
    for spread in (0.0, 1e-9, 10.0):
        found = interval(x, y, spread, spread, 0.0)
        assert not found.resolved
        assert found.upper == math.inf
        assert found.value == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize(
    "broken", ["micro_sq_norm", "mean_sq_norm", "products"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_measurement_that_is_not_finite_is_skipped_and_counted(broken, value):
    random = np.random.default_rng(0)
    gradient, deviation = quadratic(SPREAD, 100.0, np.ones(200))
    good = [measured(random, gradient, deviation) for _ in range(10)]
    bad = good[0]._replace(**{broken: value})

    estimator = NoiseScaleEstimator([4096.0])
    without = NoiseScaleEstimator([4096.0])
    for one in good:
        estimator.add([one, bad], 1024)
        without.add([one], 1024)

    assert not bad.is_finite
    assert estimator.skipped == 10
    assert estimator.estimate() == without.estimate()
    assert without.skipped == 0


def test_gradients_that_vanish_stop_nothing():
    # A network whose units have all died has gradients of exactly zero.
    random = np.random.default_rng(0)
    gradient, deviation = quadratic(SPREAD, 100.0, np.ones(200))
    dead = MicroBatchNorms(0.0, 0.0, 1024.0, 8.0, 0.0)
    estimator = fed([dead] * 10, horizons=[4096.0])
    assert not estimator.estimate().resolved
    for _ in range(10):
        estimator.add([measured(random, gradient, deviation)], 1024)
    assert estimator.estimate().resolved
    for _ in range(2000):
        estimator.add([dead], 1024)
    assert not estimator.estimate().resolved
    json.dumps(estimator.get_state(), allow_nan=False)


# Averaging.


def history(length, seed=0):
    """Measurements of changing size and level, and the examples between."""
    random = np.random.default_rng(seed)
    levels = np.exp(random.normal(0.0, 0.5, length).cumsum())
    for level in levels:
        spectrum = level * SPREAD[:20]
        gradient, deviation = quadratic(spectrum, 2000.0, np.ones(20))
        examples = int(2 ** random.integers(6, 11))
        norms = measured(random, gradient, deviation, examples)
        yield norms, examples * int(random.integers(1, 9))


def test_average_is_the_weighted_mean_of_the_history():
    horizon = 3000.0
    estimator = NoiseScaleEstimator([horizon])
    past, position, level = [], 0, None
    for norms, examples in history(30):
        estimator.add([norms], examples)

        # The whole history anew, each time: a measurement weighs its examples,
        # over the level of the trace before it, and 1/e for each horizon.
        position += examples
        moments = moments_of(norms)
        level = moments.trace if level is None else level
        past.append((position, norms.examples / level, moments))
        level = (level + moments.trace) / 2
        weights = [w * math.exp((p - position) / horizon) for p, w, _ in past]
        x = np.average([m.squared_norm for *_, m in past], weights=weights)
        y = np.average([m.trace for *_, m in past], weights=weights)

        found = estimator.estimate()
        # From the first measurement on: no bias of a young average.
        assert found.squared_norm == pytest.approx(x, rel=1e-9)
        assert found.trace == pytest.approx(y, rel=1e-9)


@pytest.mark.parametrize("horizon", [10.0, 1e3, 1e7])
def test_constant_moments_are_returned_from_the_first_on(horizon):
    norms = measured(
        np.random.default_rng(0), *quadratic(SPREAD, 300.0, np.ones(200))
    )
    moments = moments_of(norms)
    estimator = NoiseScaleEstimator([horizon])
    for examples in (5, 3, 700, 1, 40):
        estimator.add([norms], examples)
        found = estimator.estimate()
        assert found.squared_norm == pytest.approx(
            moments.squared_norm, rel=1e-12
        )
        assert found.trace == pytest.approx(moments.trace, rel=1e-12)


def test_debiasing_is_exact_whatever_the_decays():
    # The running sums themselves, with a horizon that changes at every step.
    random = np.random.default_rng(0)
    running, past = noise.RunningMoments(), []
    for _ in range(20):
        examples, horizon = random.uniform(1, 100), random.uniform(10, 1000)
        running = noise.decayed(running, examples, horizon)
        keep = math.exp(-examples / horizon)
        past = [(keep * weight, x, y) for weight, x, y in past]
        weight, x, y = random.uniform(1, 9), random.normal(), random.normal()
        running = noise.averaged(
            running, noise.GradientMoments(x, y), weight, 64, 8, 1.0
        )
        past.append((weight, x, y))
        weights, xs, ys = np.transpose(past)
        assert running.squared_norm / running.weight == pytest.approx(
            np.average(xs, weights=weights), rel=1e-9
        )
        assert running.trace / running.weight == pytest.approx(
            np.average(ys, weights=weights), rel=1e-9
        )
        # The variance of a weighted mean of equally precise measurements.
        assert running.trace_variance / running.weight**2 == pytest.approx(
            2.0 / 7.0 * np.square(weights / weights.sum()).sum(), rel=1e-9
        )


def test_signs_are_kept_in_the_average():
    # Half of the measurements of ‖G‖² are negative at this noise scale.
    random = np.random.default_rng(0)
    gradient, deviation = quadratic(SPREAD, 50_000.0, np.ones(200))
    norms = [measured(random, gradient, deviation) for _ in range(400)]
    signed = [moments_of(one).squared_norm for one in norms]
    assert 0.3 < np.mean(np.array(signed) < 0.0) < 0.6

    found = fed(norms, horizons=[1e15]).estimate()

    # The weights differ by the scatter of the trace, 5 %, so the average is
    # close to the plain mean on the scale of one measurement; the mean of the
    # clipped ones is ten standard errors away.
    error = np.std(signed) / math.sqrt(400)
    assert found.squared_norm == pytest.approx(np.mean(signed), abs=error / 3)
    assert np.mean(np.maximum(signed, 0.0)) > np.mean(signed) + 5 * error


@pytest.mark.parametrize("cuts", [1, 2, 16])
def test_horizon_counts_examples_not_calls(cuts):
    # The same measurements at the same positions; the examples between them
    # are reported at once or in many superbatches, of whatever batch size.
    one, other = NoiseScaleEstimator([5000]), NoiseScaleEstimator([5000])
    for norms, examples in history(20):
        one.add([norms], examples)
        for _ in range(cuts - 1):
            other.add([], examples / cuts)
        other.add([norms], examples / cuts)
        assert other.estimate().value == pytest.approx(
            one.estimate().value, rel=1e-9
        )


def test_horizon_keeps_its_meaning_when_the_batch_size_changes():
    # Measurements 1024 examples apart, over batches of 32 and then of 1024:
    # the share of the last one depends on their distance alone.
    random = np.random.default_rng(0)
    gradient, deviation = quadratic(SPREAD, 100.0, np.ones(200))
    norms = [measured(random, gradient, deviation) for _ in range(10)]
    small = NoiseScaleEstimator([4096.0])
    both = NoiseScaleEstimator([4096.0])
    for index, one in enumerate(norms):
        for _ in range(31):
            small.add([], 32)
        small.add([one], 32)
        if index < 5:
            for _ in range(31):
                both.add([], 32)
            both.add([one], 32)
        else:
            both.add([one], 1024)
    assert both.estimate().value == pytest.approx(
        small.estimate().value, rel=1e-9
    )


def test_a_horizon_holds_enough_measurements_where_they_are_rare():
    random = np.random.default_rng(0)
    gradient, deviation = quadratic(SPREAD, 100.0, np.ones(200))
    norms = [measured(random, gradient, deviation) for _ in range(50)]
    # A measurement every 10,000 examples, a horizon of 100: alone, each would
    # forget all others.
    rare = fed(norms, [100.0], examples=10_000, measurements=[16]).estimate()
    alone = fed(norms, [100.0], examples=10_000).estimate()
    stretched = fed(norms, [160_000.0], examples=10_000).estimate()
    assert rare.value == pytest.approx(stretched.value, rel=1e-9)
    assert alone.value == pytest.approx(
        moments_of(norms[-1]).trace / moments_of(norms[-1]).squared_norm
    )


def test_the_shortest_resolved_horizon_is_preferred():
    # φ falls from 30,000 to 300 after a while.
    random = np.random.default_rng(0)
    before = quadratic(SPREAD, 30_000.0, np.ones(200))
    after = quadratic(SPREAD, 300.0, np.ones(200))
    horizons = [4096, 16384, 65536]
    estimator = NoiseScaleEstimator(horizons)
    alone = [NoiseScaleEstimator([one]) for one in horizons]
    chosen = set()
    for time in range(240):
        norms = measured(random, *(before if time < 200 else after))
        for one in (estimator, *alone):
            one.add([norms], 1024)
        estimates = [one.estimate() for one in alone]
        resolved = [index for index in range(3) if estimates[index].resolved]
        index = resolved[0] if resolved else 2
        chosen.add(index)
        assert estimator.estimate() == estimates[index]
    assert chosen == {0, 1, 2}
    # Forty measurements after the change it is known, and up to date.
    assert estimator.estimate().value == pytest.approx(300.0, rel=0.25)
    assert estimates[2].value > 1.3 * 300.0


def test_late_small_gradients_are_not_outvoted_by_early_large_ones():
    # Gradients fall by a factor of 1000 while φ rises from 100 to 1000.
    random = np.random.default_rng(0)
    early = quadratic(SPREAD, 100.0, np.ones(200))
    late = quadratic(SPREAD * 1e-6, 1000.0, np.ones(200))
    norms = [measured(random, *early) for _ in range(5)]
    norms += [measured(random, *late) for _ in range(60)]
    moments = [moments_of(one) for one in norms]
    unweighted = sum(one.trace for one in moments) / sum(
        one.squared_norm for one in moments
    )
    assert unweighted < 110.0

    found = fed(norms, horizons=[1e9]).estimate()

    # Each counts alike: 5 x 1/100 and, once the level has fallen by 2^20, 40 x
    # 1/1000. Horizons do the rest.
    assert found.value == pytest.approx(45 / (5 / 100 + 40 / 1000), rel=0.15)


# State.


@pytest.mark.parametrize("cut", [0, 1, 7])
def test_estimator_resumes_from_json_as_if_uninterrupted(cut):
    steps = list(history(20))
    one = NoiseScaleEstimator([2000, 30_000], [1, 4])
    for norms, examples in steps[:cut]:
        one.add([norms], examples)
    one.add([steps[0][0]._replace(micro_sq_norm=math.nan)], 64)

    text = json.dumps(one.get_state(), allow_nan=False)
    two = NoiseScaleEstimator([2000, 30_000], [1, 4])
    two.set_state(json.loads(text))

    assert json.dumps(two.get_state()) == text
    for norms, examples in steps[cut:]:
        for estimator in (one, two):
            estimator.add([norms], examples)
        assert two.estimate() == one.estimate()
    assert two.skipped == one.skipped == 1


@pytest.mark.parametrize("signal", [0.0, 0.3])
def test_precision_of_replicas_follows_from_pairs_of_updates(signal):
    # Gradients of two replicas in r equally strong directions.
    rank, count, examples, level = 40, 2, 16, 5.0
    random = np.random.default_rng(0)
    truth = np.zeros(rank)
    truth[0] = math.sqrt(signal)
    spread = math.sqrt(level / rank * count / examples)

    def squared_norm():
        parts = truth + spread * random.normal(size=(count, rank))
        norms = MicroBatchNorms(
            np.square(parts).sum(axis=1).mean(),
            np.square(parts.mean(axis=0)).sum(),
            examples,
            count,
        )
        return moments_of(norms).squared_norm

    ranks = [
        noise.inverse_rank_of_pair(
            (squared_norm(), squared_norm()), examples, count, level, signal
        )
        for _ in range(4000)
    ]
    # A squared normal number spreads by √2 of its mean: 4 errors of the mean.
    error = math.sqrt(2.0 / 4000)
    assert np.mean(ranks) * rank == pytest.approx(1.0, abs=4.0 * error)


def test_an_update_waits_for_another_of_its_kind():
    estimator = NoiseScaleEstimator([1e4])
    random = np.random.default_rng(0)

    def add(examples):
        parts = 1.0 + random.normal(size=(2, 40))
        mean = np.square(parts.mean(axis=0)).sum()
        micro = np.square(parts).sum(axis=1).mean()
        norms = MicroBatchNorms(micro, mean, examples, 2)
        estimator.add([norms], examples)

    add(16)
    assert not estimator.estimate().resolved
    add(32)  # Another size: nothing to compare with.
    waiting = estimator.get_state()
    assert waiting["unpaired"][1:] == [32, 2]
    add(32)
    assert estimator.get_state()["unpaired"] is None
    again = NoiseScaleEstimator([1e4])
    again.set_state(json.loads(json.dumps(waiting)))
    assert again.get_state() == waiting
