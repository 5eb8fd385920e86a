"""Laws of every policy, and what each one is for.

A policy is asked on a grid of states: the laws hold for all of them, whatever
their formulas; the formulas are checked afterwards, against other ones.
"""

import copy
import dataclasses
import json
import math
import pathlib
import random

import numpy as np
import pytest

from keras_batchsize import policies
from keras_batchsize import throughput
from keras_batchsize.noise import UNKNOWN
from keras_batchsize.noise import NoiseScaleEstimate
from keras_batchsize.plan import Ladder
from keras_batchsize.policies import Status
from keras_batchsize.policies import next_batch_size
from keras_batchsize.throughput import StepTime

LADDER = Ladder(32, 4, 4096)

EVERY_POLICY = [
    *(policy() for policy in policies.POLICIES.values()),
    policies.Goodput(min_speedup=1.0),
    policies.NoiseScale(factor=0.25),
    policies.Fixed(256),
    policies.BatchSizeSchedule({0: 32, 3: 256}),
    policies.BatchSizeSchedule(lambda epoch: 32 * 2**epoch),
]


def named(policy):
    return repr(policy).partition(" at 0x")[0]


every_policy = pytest.mark.parametrize("policy", EVERY_POLICY, ids=named)
every_noise_policy = pytest.mark.parametrize(
    "policy", [one for one in EVERY_POLICY if one.needs_noise], ids=named
)


def status_at(batch_size, ladder=LADDER, **known):
    smaller, larger = ladder.neighbours(batch_size)
    fields = {
        "step_time": StepTime(fixed=1e-3, per_example=2e-5),
        "learning_rate": 0.1,
        "loss": 0.5,
        "epoch": 3,
        **known,
    }
    return Status(batch_size, ladder.base, smaller, larger, **fields)


def estimate_of(noise_scale, spread=1.0, squared_norm=0.02):
    """An estimate whose interval goes from 1/spread to spread times φ."""
    return NoiseScaleEstimate(
        value=noise_scale,
        standard_error=noise_scale * math.log(spread) / 2,
        lower=noise_scale / spread,
        upper=noise_scale * spread,
        resolved=True,
        squared_norm=squared_norm,
        trace=noise_scale * squared_norm,
    )


def wish_at(policy, batch_size, noise_scale):
    estimate = estimate_of(noise_scale)
    status = status_at(batch_size)
    return policy.wish(policies.at_noise(status, estimate, noise_scale))


NOISE_SCALES = [0.0, 0.5, 3.0, 20.0, 64.0, 65.0, 500.0, 1e4, 1e7]


# Laws of all policies.


@every_policy
@pytest.mark.parametrize("batch_size", [4, 32, 512, 4096])
def test_more_noise_never_shrinks_the_wish(policy, batch_size):
    wishes = [wish_at(policy, batch_size, phi) for phi in NOISE_SCALES]
    assert wishes == sorted(wishes)


@every_policy
def test_more_noise_never_shrinks_the_next_size(policy):
    for batch_size in LADDER.sizes:
        status = status_at(batch_size)
        for spread in (1.0, 1.5):
            sizes = [
                next_batch_size(
                    policy, status, estimate_of(phi, spread), LADDER
                )
                for phi in NOISE_SCALES
            ]
            assert sizes == sorted(sizes)


@every_policy
@pytest.mark.parametrize("noise_scale", NOISE_SCALES)
@pytest.mark.parametrize("spread", [1.0, 1.4])
def test_a_constant_input_has_a_fixed_point(policy, noise_scale, spread):
    estimate = estimate_of(noise_scale, spread)
    for start in LADDER.sizes:
        path = [start]
        # From one end of the ladder to the other, and then some.
        for _ in range(2 * len(LADDER.sizes)):
            path.append(
                next_batch_size(policy, status_at(path[-1]), estimate, LADDER)
            )
        settled = path[len(LADDER.sizes) :]
        assert len(set(settled)) == 1
        # It never turns back on the way.
        assert path in (sorted(path), sorted(path, reverse=True))


EFFICIENCIES = [throughput.efficiency, throughput.linear_efficiency]


@pytest.mark.parametrize("efficiency", EFFICIENCIES)
@pytest.mark.parametrize("min_speedup", [1.0, 1.05])
@pytest.mark.parametrize("seed", range(10))
def test_goodput_settles_whatever_the_rate_does(efficiency, min_speedup, seed):
    dice = random.Random(seed)
    policy = policies.Goodput(min_speedup)
    for noise_scale in NOISE_SCALES:
        estimate = estimate_of(noise_scale, dice.choice([1.0, 1.4]))
        step_time = StepTime(10.0 ** dice.uniform(-6, 0), 2e-5)
        known = {"step_time": step_time, "efficiency": efficiency}
        for start in LADDER.sizes:
            path = [start]
            for _ in range(2 * len(LADDER.sizes)):
                status = status_at(path[-1], **known)
                path.append(next_batch_size(policy, status, estimate, LADDER))
            assert set(path) <= set(LADDER.sizes)
            assert len(set(path[len(LADDER.sizes) :])) == 1
            assert path in (sorted(path), sorted(path, reverse=True))


@every_policy
def test_any_input_gives_a_size_on_the_ladder(policy):
    dice = random.Random(0)
    odd = [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-300, 1e300]

    def number():
        return dice.choice([*odd, 10.0 ** dice.uniform(-6, 6)])

    for _ in range(500):
        base = dice.choice([1, 25, 32])
        ladder = Ladder(base, 1, base * dice.choice([1, 3, 1000]))
        step_time = StepTime(*(abs(dice.gauss(0, 1)) for _ in range(2)))
        status = status_at(
            dice.choice(ladder.sizes),
            ladder,
            step_time=dice.choice([None, step_time]),
            learning_rate=number(),
            loss=number(),
            epoch=dice.randrange(5),
            efficiency=dice.choice(EFFICIENCIES),
        )
        # No such estimate is made from moments; a state may hold anything.
        estimate = NoiseScaleEstimate(
            value=number(),
            standard_error=number(),
            lower=abs(number()),
            upper=abs(number()),
            resolved=dice.choice([True, False]),
            squared_norm=number(),
            trace=number(),
        )
        size = next_batch_size(policy, status, estimate, ladder)
        assert size in ladder.sizes
        if policy.gradual:
            assert status.batch_size / 2 <= size <= status.batch_size * 2


@every_noise_policy
@pytest.mark.parametrize("batch_size", LADDER.sizes)
def test_unresolved_noise_holds_the_size(policy, batch_size):
    seen = NoiseScaleEstimate(1e6, math.inf, 10.0, math.inf, False, 1e-6, 1.0)
    for estimate in (UNKNOWN, seen):
        size = next_batch_size(policy, status_at(batch_size), estimate, LADDER)
        assert size == batch_size


@every_noise_policy
def test_a_wide_interval_holds_the_size(policy):
    # It could be anything from 1 to 10⁸: no change is right for all of them.
    wide = estimate_of(1e4, spread=1e4)
    if isinstance(policy, policies.CABS):
        wide = estimate_of(32 * 0.5 / 0.1 / 0.02, spread=1e4)
    assert next_batch_size(policy, status_at(32), wide, LADDER) == 32


def test_hysteresis_keeps_a_noise_scale_near_the_middle_from_flapping():
    policy, size, changes = policies.NoiseScale(), 32, 0
    dice = random.Random(0)
    for _ in range(1000):
        # 4 % of scatter around the middle between 32 and 64.
        wanted = math.sqrt(32 * 64) * math.exp(dice.gauss(0.0, 0.04))
        new = next_batch_size(
            policy, status_at(size), estimate_of(wanted), LADDER
        )
        changes += new != size
        size = new
    # To flap it must pass the middle by 10 % each way, 2.4 deviations.
    assert changes <= 20


@every_policy
def test_repr_is_the_call_that_makes_it(policy):
    if callable(getattr(policy, "schedule", None)):
        assert repr(policy).startswith("BatchSizeSchedule(schedule=<function")
        return
    again = eval(repr(policy), vars(policies))  # noqa: S307
    assert vars(again) == vars(policy)
    assert repr(again) == repr(policy)


@every_policy
def test_a_copy_is_equal_and_shares_no_state(policy):
    again = copy.deepcopy(policy)
    assert vars(again) == vars(policy)
    before = json.dumps(policy.get_state())
    for epoch in range(3):
        again.on_epoch_end(
            status_at(32, epoch=epoch), {"val_loss": 1.0 + epoch}
        )
    assert json.dumps(policy.get_state()) == before


@every_policy
def test_every_policy_gives_its_reason_in_a_line(policy):
    estimate = estimate_of(500.0)
    status = policies.at_noise(status_at(64), estimate, 500.0)
    reason = policy.reason(status)
    assert reason and "\n" not in reason


# Goodput.

TIMES = [StepTime(1e-2, 1e-6), StepTime(1e-3, 2e-5), StepTime(1e-3, 2e-5, 256)]


@pytest.mark.parametrize("step_time", TIMES)
@pytest.mark.parametrize("min_speedup", [1.0, 1.05, 1.3])
@pytest.mark.parametrize("efficiency", EFFICIENCIES)
@pytest.mark.parametrize("meant_for", [None, 256])
def test_goodput_changes_only_for_the_speedup_asked_for(
    step_time, min_speedup, efficiency, meant_for
):
    policy = policies.Goodput(min_speedup)
    for batch_size in LADDER.sizes:
        status = status_at(
            batch_size,
            step_time=step_time,
            efficiency=efficiency,
            reference_batch_size=meant_for,
        )
        for noise_scale in NOISE_SCALES[1:]:

            def useful(size):
                return throughput.goodput(
                    *(size, step_time, noise_scale),
                    *(meant_for or 32, efficiency),
                )

            if useful(batch_size) == 0.0:
                continue  # test_linear_efficiency_ends_where_...

            new = next_batch_size(
                policy, status, estimate_of(noise_scale), LADDER
            )

            gains = [
                useful(size) / useful(batch_size)
                for size in (status.smaller, status.larger)
            ]
            if new == batch_size:
                # Rounding decides where a gain is the threshold itself.
                assert max(gains) < min_speedup * (1 + 1e-12)
            else:
                gain = useful(new) / useful(batch_size)
                assert gain == max(gains)
                assert gain >= min_speedup


def test_goodput_settles_at_its_maximum():
    # √(φ·a/c) = √(1280·50) = 253. A factor of two is worth 12 % here.
    step_time = StepTime(1e-3, 2e-5)
    for start in LADDER.sizes:
        size = start
        for _ in LADDER.sizes:
            size = next_batch_size(
                policies.Goodput(),
                status_at(size, step_time=step_time),
                estimate_of(1280.0),
                LADDER,
            )
        assert size == 256


def test_goodput_holds_before_the_first_timing():
    status = status_at(32, step_time=None)
    assert next_batch_size(
        policies.Goodput(), status, estimate_of(1e6), LADDER
    ) == 32


@pytest.mark.parametrize("noise_scale", [4.0, 32.0, 1e4])
def test_goodput_tries_a_second_size_unless_it_cannot_pay(noise_scale):
    # From one size a and c cannot be told apart. Half of the time taken as
    # fixed, a/c = 32 whatever the machine, √(φ·a/c) would be 32 at φ = 32:
    # where the size timed is near the noise scale it would never change.
    guess = throughput.fit_step_time([32], [0.01])
    status = status_at(32, step_time=guess)
    size = next_batch_size(
        policies.Goodput(), status, estimate_of(noise_scale), LADDER
    )
    # At best twice the examples are as fast.
    at_best = 2.0 * (noise_scale + 32) / (noise_scale + 64)
    assert size == (64 if at_best >= 1.05 else 32)


def test_goodput_never_accumulates_for_a_try():
    guess = throughput.fit_step_time([256, 512], [1.0, 2.0], largest=256)
    status = status_at(512, step_time=guess)
    size = next_batch_size(
        policies.Goodput(), status, estimate_of(1e4), LADDER
    )
    assert size <= 512


# The others that look at the noise.


def test_norm_test_never_shrinks():
    for batch_size in LADDER.sizes:
        for noise_scale in NOISE_SCALES:
            assert wish_at(policies.NormTest(), batch_size, noise_scale) >= (
                batch_size
            )


@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
def test_norm_test_grows_until_the_error_is_eta(eta):
    size = 32
    for _ in LADDER.sizes:
        size = next_batch_size(
            policies.NormTest(eta), status_at(size), estimate_of(1000.0), LADDER
        )
    # ‖error‖/‖G‖ of a batch gradient; the size is within a factor of √2·1.1
    # of the one wanted.
    relative_error = math.sqrt(1000.0 / size)
    slack = math.sqrt(math.sqrt(2.0) * 1.1)
    assert eta / slack <= relative_error <= eta * slack


def test_norm_test_divides_by_a_norm_without_noise():
    # By that of the batch gradient, as it is usually written, it would wish
    # for φ/(1 + φ/B), which is below B for every φ: it could not grow.
    assert wish_at(policies.NormTest(eta=1.0), 32, 500.0) == 500.0


def test_cosine_of_one_half_is_twice_the_noise_scale():
    for noise_scale in NOISE_SCALES:
        wish = wish_at(policies.CosineSimilarity(0.5), 32, noise_scale)
        assert wish == pytest.approx(2 * noise_scale, rel=1e-12)


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
def test_cosine_has_its_target_at_the_size_wished(target):
    half = wish_at(policies.CosineSimilarity(target), 32, 70.0) / 2
    # E(g₁·g₂) = ‖G‖² = 1 and E‖gᵢ‖² = 1 + φ/half for the two halves.
    assert 1.0 / (1.0 + 70.0 / half) == pytest.approx(target, rel=1e-12)


def test_noise_scale_is_a_multiple_of_it():
    assert wish_at(policies.NoiseScale(), 32, 70.0) == 70.0
    assert wish_at(policies.NoiseScale(0.25), 32, 70.0) == 17.5


def test_diversity_is_that_of_the_examples():
    # n·Σ‖gᵢ‖²/‖Σgᵢ‖² of n = 4 examples on a line, and their φ = variance/mean².
    gradients = [1.0, -2.0, 4.0, 3.0]
    diversity = 4 * sum(g * g for g in gradients) / sum(gradients) ** 2
    mean = sum(gradients) / 4
    noise_scale = sum((g - mean) ** 2 for g in gradients) / 4 / mean**2
    wish = wish_at(policies.GradientDiversity(1.0), 32, noise_scale)
    assert wish == pytest.approx(diversity, rel=1e-12)


def test_cabs_is_its_formula_and_holds_without_a_loss():
    estimate = estimate_of(500.0, squared_norm=0.02)  # Trace 10.
    for loss, wanted in [(0.5, 2.0), (math.nan, 32), (0.0, 32), (-1.0, 32)]:
        status = status_at(32, loss=loss, learning_rate=0.1)
        status = policies.at_noise(status, estimate, 500.0)
        assert policies.CABS().wish(status) == pytest.approx(wanted)


def test_measure_changes_nothing():
    for noise_scale in NOISE_SCALES:
        assert wish_at(policies.Measure(), 64, noise_scale) == 64


# Those that state a size.


def size_in(policy, epoch, start=32):
    status = status_at(start, epoch=epoch)
    return next_batch_size(policy, status, UNKNOWN, LADDER)


def test_schedule_by_dict_holds_from_its_epoch_on():
    schedule = policies.BatchSizeSchedule({2: 64, 10: 1000, 5: 256})
    sizes = [size_in(schedule, epoch) for epoch in range(12)]
    # 1000 is not on the ladder; the first epochs keep what they have.
    assert sizes == [32] * 2 + [64] * 3 + [256] * 5 + [1024] * 2


def test_schedule_by_function_is_asked_for_each_epoch():
    schedule = policies.BatchSizeSchedule(lambda epoch: 32 + 16 * epoch)
    assert [size_in(schedule, epoch) for epoch in (0, 1, 2, 14)] == [
        32,
        64,  # 48: above the middle in ratio, 45.3.
        64,
        256,
    ]


def test_schedule_is_followed_at_once_in_both_directions():
    schedule = policies.BatchSizeSchedule({0: 4096, 1: 4})
    assert [size_in(schedule, 0, 4), size_in(schedule, 1, 4096)] == [4096, 4]


@pytest.mark.parametrize("schedule", [None, 64, [32, 64]])
def test_schedule_of_another_kind_is_told_what_works(schedule):
    with pytest.raises(TypeError) as caught:
        policies.BatchSizeSchedule(schedule)
    text = str(caught.value)
    assert f"Received: schedule={schedule!r}." in text
    remedy = eval(text.partition("Use ")[2].rstrip("."))  # noqa: S307
    assert size_in(policies.BatchSizeSchedule(remedy), 10) == 128


def test_fixed_is_its_size_or_the_base():
    assert size_in(policies.Fixed(), 0, start=512) == 32
    assert size_in(policies.Fixed(256), 0, start=512) == 256
    assert size_in(policies.Fixed(10**9), 0, start=512) == 4096


@pytest.mark.parametrize("size", [None, "a", 0, -5, math.inf, math.nan])
def test_schedule_refuses_what_is_no_size(size):
    with pytest.raises((TypeError, ValueError), match="at epoch 3.*Received"):
        policies.BatchSizeSchedule({0: 32, 3: size})
    stated = policies.BatchSizeSchedule(lambda epoch: size)
    with pytest.raises((TypeError, ValueError), match="at epoch 3.*Received"):
        stated.wish(dataclasses.replace(status_at(32), epoch=3))


def test_schedule_refuses_what_is_no_epoch():
    with pytest.raises(TypeError, match="zero-based epochs. Received"):
        policies.BatchSizeSchedule({"a": 32})


# GrowOnPlateau.


@pytest.mark.parametrize("replicas", [1, 3, 5, 7])
def test_plateau_grows_to_the_next_size_however_far(replicas):
    policy = policies.GrowOnPlateau("loss", patience=1)
    ladder = Ladder(32, 32, 4096, replicas=replicas)
    smaller, larger = ladder.neighbours(32)
    status = policies.Status(32, 32, smaller, larger)
    for _ in range(2):
        policy.on_epoch_end(status, {"loss": 1.0})
    assert ladder.nearest(policy.wish(status)) == larger


def test_plateau_resumes_from_its_state():
    one = policies.GrowOnPlateau("loss", patience=2, cooldown=1)
    values = [3.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    for value in values[:4]:
        one.on_epoch_end(status_at(32), {"loss": value})
    two = policies.GrowOnPlateau("loss", patience=2, cooldown=1)
    saved = one.get_state()
    two.set_state(json.loads(json.dumps(saved)))
    for value in values[4:]:
        one.on_epoch_end(status_at(64), {"loss": value})
    assert saved == two.get_state()  # It is a copy, not the state itself.
    for value in values[4:]:
        two.on_epoch_end(status_at(64), {"loss": value})
    assert one.get_state() == two.get_state()


@pytest.mark.parametrize(
    ("monitor", "better"),
    [
        ("loss", "min"),
        ("val_loss", "min"),
        ("val_accuracy", "max"),
        ("sparse_categorical_accuracy", "max"),
        ("val_auc", "max"),
    ],
)
def test_plateau_tells_the_direction_from_the_name(monitor, better):
    grows_while = {"min": [1.0, 2.0, 3.0], "max": [3.0, 2.0, 1.0]}
    for direction, values in grows_while.items():
        policy = policies.GrowOnPlateau(monitor, patience=2)
        for value in values:
            policy.on_epoch_end(status_at(32), {monitor: value})
        assert policy.wish(status_at(32)) == (64 if direction == better else 32)


def test_plateau_asks_for_the_direction_it_cannot_tell():
    with pytest.raises(ValueError, match="Received: monitor='val_mae'"):
        policies.GrowOnPlateau("val_mae")
    assert policies.GrowOnPlateau("val_mae", mode="min").mode == "min"


def test_plateau_waits_where_the_metric_is_missing():
    # With `validation_freq=2` every other epoch has no `val_loss`.
    policy = policies.GrowOnPlateau(patience=2)
    for epoch in range(5):
        if epoch % 2 == 0:
            policy.on_epoch_end(status_at(32), {"loss": 1.0, "val_loss": 1.0})
        else:
            with pytest.warns(UserWarning, match="the logs have \\['loss'\\]"):
                policy.on_epoch_end(status_at(32), {"loss": 1.0})
        # The first value is an improvement; the second and third are not.
        assert policy.wish(status_at(32)) == (64 if epoch == 4 else 32)


def test_plateau_takes_no_nan_for_the_best_value():
    policy = policies.GrowOnPlateau("loss", patience=2)
    for value in (math.nan, 3.0, 2.0, 1.0):
        policy.on_epoch_end(status_at(32), {"loss": value})
    assert policy.wish(status_at(32)) == 32
    assert policy.get_state()["best"] == 1.0


def test_a_plateau_of_numpy_numbers_can_be_saved():
    # A callback of the user's may put them into the logs.
    policy = policies.GrowOnPlateau("loss", patience=2)
    for loss in (1.0, 0.5, 0.75):
        policy.on_epoch_end(status_at(32), {"loss": np.float32(loss)})
    saved = json.loads(json.dumps(policy.get_state()))
    assert saved["best"] == 0.5 and saved["wait"] == 1


def test_plateau_refuses_a_factor_that_no_size_follows():
    with pytest.raises(ValueError, match="doublings .* Received: factor=1.2"):
        policies.GrowOnPlateau(factor=1.2)


# Names and errors.


@pytest.mark.parametrize("name", policies.POLICIES)
def test_policies_are_found_by_name(name):
    assert type(policies.get(name)) is policies.POLICIES[name]


@every_policy
def test_a_policy_is_taken_as_it_is(policy):
    assert policies.get(policy) is policy


def test_unknown_policy_is_told_the_known_ones():
    with pytest.raises(ValueError) as caught:
        policies.get("godput")
    for name in policies.POLICIES:
        assert f'"{name}"' in str(caught.value)


@pytest.mark.parametrize("policy", [None, 32, policies.Goodput])
def test_policy_of_another_kind_is_told_what_works(policy):
    with pytest.raises(TypeError, match='Use policy="goodput"\\.'):
        policies.get(policy)


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (policies.Goodput, "min_speedup", 0.95),
        (policies.NoiseScale, "factor", 0.0),
        (policies.NormTest, "eta", math.nan),
        (policies.CosineSimilarity, "target", 1.0),
        (policies.CABS, "constant", -1.0),
        (policies.GradientDiversity, "delta", math.inf),
        (policies.Fixed, "batch_size", 0),
    ],
)
def test_impossible_arguments_are_named(make, name, value):
    with pytest.raises(ValueError, match=f"Received: {name}={value}"):
        make(**{name: value})
    with pytest.raises(TypeError, match=f"Received: {name}='many'"):
        make(**{name: "many"})


def test_a_policy_without_a_wish_is_told_what_to_write():
    class Empty(policies.BatchSizePolicy):
        pass

    with pytest.raises(NotImplementedError, match="Received: Empty"):
        Empty().wish(status_at(32))


# Their cards.


def test_every_policy_has_a_card():
    folder = pathlib.Path(__file__).parents[1] / "docs" / "policies"
    table = (folder / "README.md").read_text(encoding="utf-8")
    named = {**policies.POLICIES, "schedule": policies.BatchSizeSchedule}

    cards = {card.stem for card in folder.glob("*.md")} - {"README"}

    assert cards == set(named)
    for name, policy in named.items():
        card = (folder / f"{name}.md").read_text(encoding="utf-8")
        headings = [line for line in card.splitlines() if line[:3] == "## "]
        assert headings[:4] == [
            "## What it does",
            "## Formula",
            "## Source",
            "## When to use (and when not)",
        ]
        assert "## Cost" in headings
        assert f"]({name}.md)" in table and f"`{policy.__name__}`" in table
