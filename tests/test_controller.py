"""Laws of the controller, on trainings whose truth is known.

`Machine` stands for model, data and computer: gradients with a known noise
scale, updates of known duration. What the controller should find can then be
computed.
"""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
from quadratics import SPREAD
from quadratics import measured
from quadratics import quadratic

from keras_batchsize import policies
from keras_batchsize import scaling
from keras_batchsize import throughput
from keras_batchsize._controller_advice import recommended_batch_size
from keras_batchsize._controller_advice import why_unchanged
from keras_batchsize.controller import Controller
from keras_batchsize.noise import MicroBatchNorms
from keras_batchsize.plan import Ladder
from keras_batchsize.records import Decision
from keras_batchsize.records import Measurement
from keras_batchsize.records import Timing

SUPERBATCH = 2048
EPOCH = 20 * SUPERBATCH


class Machine:
    """A training of known noise and speed, without TensorFlow.

    Args:
        noise_scale: φ in examples.
        fixed: Seconds per update that do not depend on its size.
        per_example: Seconds per example.
        seed: Of the gradients.
        hiccups: Whether the first superbatch after each change takes a hundred
            times as long.
    """

    def __init__(
        self, noise_scale, fixed=1e-3, per_example=2e-6, seed=0, hiccups=False
    ):
        self.quadratic = quadratic(SPREAD, noise_scale, np.sqrt(SPREAD))
        self.fixed = fixed
        self.per_example = per_example
        self.hiccups = hiccups
        self.random = np.random.default_rng(seed)
        self.loss = 0.5
        self.seconds = 0.0
        self.measuring_seconds = 0.0

    def update_seconds(self, size):
        return self.fixed + self.per_example * size

    def superbatch(self, controller, examples=SUPERBATCH):
        """Trains on a superbatch; returns the `Decision` before it, if any."""
        decision = controller.decide()
        size = controller.batch_size
        norms, cost = (), 0.0
        if controller.wants_measurement(examples, EPOCH):
            count = controller.examples_to_measure
            norms = (measured(self.random, *self.quadratic, count),)
            cost = 8 * self.fixed / 4 + self.per_example * count
        updates = math.ceil(examples / size)
        seconds = examples / size * self.update_seconds(size)
        if self.hiccups and decision is not None:
            seconds *= 100.0
        self.seconds += seconds + cost
        self.measuring_seconds += cost
        controller.observe(
            Measurement(
                examples=examples,
                updates=updates,
                norms=norms,
                timing=Timing(seconds, examples / size),
                measuring_seconds=cost,
                seconds=seconds + cost,
                loss=self.loss,
                learning_rate=0.1 * controller.learning_rate_factor,
                factor=controller.learning_rate_factor,
            )
        )
        return decision


def make_controller(policy=None, ladder=None, **arguments):
    return Controller(
        policy or policies.Goodput(),
        ladder or Ladder(32, 8, SUPERBATCH),
        SUPERBATCH,
        **arguments,
    )


def trained(controller, machine, superbatches):
    """Returns the size in force at each superbatch, and the decisions."""
    sizes, decisions = [], []
    for _ in range(superbatches):
        decision = machine.superbatch(controller)
        if decision is not None:
            decisions.append(decision)
        sizes.append(controller.batch_size)
    return sizes, decisions


# Convergence.

# φ, fixed and variable cost, and √(φ·a/c), which is on the ladder.
OPTIMA = [
    (512.0, 1e-3, 1e-3 / 512, 512),
    (2048.0, 1e-3, 1e-3 / 128, 512),
    (64.0, 1e-2, 1e-2 / 1024, 256),
    (64.0, 1e-4, 1e-4 / 64, 64),
    (64.0, 1e-4, 1e-4 / 4, 16),
    (8192.0, 1e-2, 1e-2 / 8192, 2048),
]


@pytest.mark.parametrize("hiccups", [False, True])
@pytest.mark.parametrize(("noise_scale", "fixed", "each", "optimum"), OPTIMA)
def test_goodput_converges_to_the_optimum_and_stays(
    noise_scale, fixed, each, optimum, hiccups
):
    machine = Machine(noise_scale, fixed, each, hiccups=hiccups)
    # Measured on every superbatch, so that φ is known well.
    controller = make_controller(measure_every=1)
    sizes, decisions = trained(controller, machine, 300)
    # Five epochs to get there, then ten to stay.
    assert set(sizes[100:]) == {optimum}
    # Straight there, but for tries that tell what a larger size costs.
    path = [32, *(one.new_batch_size for one in decisions)]
    straight = without_tries(path)
    assert straight in (sorted(straight), sorted(straight, reverse=True))
    larger = [new for old, new in zip(path, path[1:]) if new > old]
    assert len(larger) == len(set(larger))


def without_tries(path):
    """Leaves out sizes from which training went back to the one before."""
    straight = []
    for size in path:
        if straight[-2:-1] == [size]:
            straight.pop()
        else:
            straight.append(size)
    return straight


class Curved(Machine):
    """An example gets cheaper by a share with every doubling: T = t·B^p.

    Args:
        noise_scale: φ in examples.
        share: Of an example's time, which a doubling saves.
        arguments: Those of `Machine`.
    """

    def __init__(self, noise_scale, share, **arguments):
        super().__init__(noise_scale, **arguments)
        self.share = share

    def update_seconds(self, size):
        return 1e-5 * size * (1.0 - self.share) ** math.log2(size)


class Untried(policies.Goodput):
    """Goodput that believes the line."""

    for_speed = False


@pytest.mark.parametrize(
    ("noise_scale", "share", "optimum", "by_the_line"),
    [(1024.0, 0.1, 128, 64), (2048.0, 0.1, 256, 64), (512.0, 0.2, 256, 64)],
)
def test_what_the_line_does_not_say_is_found_by_tries(
    noise_scale, share, optimum, by_the_line
):
    machine = Curved(noise_scale, share)

    def goodput(size):
        per_second = size / machine.update_seconds(size)
        return per_second * throughput.efficiency(size, noise_scale, 32)

    sizes = Ladder(32, 8, SUPERBATCH).sizes
    assert max(sizes, key=goodput) == optimum
    found, _ = trained(make_controller(measure_every=1), machine, 300)
    assert goodput(found[-1]) >= 0.97 * goodput(optimum)
    believed, _ = trained(
        make_controller(Untried(), measure_every=1),
        Curved(noise_scale, share),
        300,
    )
    assert believed[-1] == by_the_line


def test_each_size_is_tried_once():
    controller, machine = make_controller(measure_every=1), Machine(512.0)
    _, decisions = trained(controller, machine, 300)
    tried = [
        one.new_batch_size for one in decisions if "a try" in one.reason
    ]
    assert tried and len(tried) == len(set(tried))


def left_again():
    """A controller and its machine in the middle of a try in vain."""
    controller = make_controller(measure_every=1)
    machine = Machine(512.0, fixed=1e-3, per_example=1e-3 / 512)
    for _ in range(200):
        decision = machine.superbatch(controller)
        if decision is not None and decision.new_batch_size == 1024:
            return controller, machine
    raise AssertionError("It never tried.")


def test_a_try_in_vain_ends_with_the_reason():
    controller, machine = left_again()
    _, (back,) = trained(controller, machine, 4)
    assert (back.old_batch_size, back.new_batch_size) == (1024, 512)
    # (512 + 512)/(512 + 1024) of the progress, 4/3 of the speed.
    assert back.reason == "1024 turned out 0.89 times as fast"
    assert back.predicted_speedup == pytest.approx(9 / 8, rel=0.05)


def test_a_try_goes_on_after_a_resumption():
    controller, machine = left_again()
    resumed = make_controller(measure_every=1)
    resumed.set_state(json.loads(json.dumps(controller.get_state())))
    _, (back,) = trained(resumed, machine, 4)
    assert back.new_batch_size == 512 and "turned out" in back.reason


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_a_try_is_judged_by_times_that_a_hiccup_does_not_move(factor):
    controller, machine = left_again()
    machine.superbatch(controller)
    machine.fixed, machine.per_example = 0.1, 0.0
    machine.superbatch(controller)
    machine.fixed, machine.per_example = 1e-3, factor * 1e-3 / 512
    size = trained(controller, machine, 3)[0][-1]
    assert size == (1024 if factor == 0.5 else 512)


def test_nothing_is_tried_after_a_probe():
    controller = make_controller(measure_every=1)
    controller.speed.expect(throughput.StepTime(1e-3, 1e-3 / 512))
    _, decisions = trained(controller, Machine(512.0, 1e-3, 1e-3 / 512), 300)
    assert [one.new_batch_size for one in decisions] == [64, 128, 256, 512]


@pytest.mark.parametrize("noise_scale", [64.0, 1024.0])
@pytest.mark.parametrize("base", [16, 2048])
def test_noise_scale_policy_converges_from_both_sides(noise_scale, base):
    controller = make_controller(
        policies.NoiseScale(), Ladder(base, 16, SUPERBATCH), measure_every=1
    )
    sizes, _ = trained(controller, Machine(noise_scale), 300)
    assert set(sizes[100:]) == {noise_scale}


def test_size_follows_a_noise_scale_that_changes():
    controller = make_controller(policies.NoiseScale(), measure_every=1)
    machine = Machine(64.0)
    assert trained(controller, machine, 100)[0][-1] == 64
    machine.quadratic = Machine(1024.0).quadratic
    assert trained(controller, machine, 100)[0][-1] == 1024
    machine.quadratic = Machine(64.0).quadratic
    assert trained(controller, machine, 100)[0][-1] == 64


def test_estimates_are_near_the_truth():
    controller, machine = make_controller(), Machine(500.0, 1e-3, 2e-6)
    trained(controller, machine, 200)
    found = controller.noise_scale
    assert found.lower <= 500.0 <= found.upper
    assert controller.step_time.fixed == pytest.approx(1e-3, rel=1e-6)
    assert controller.step_time.per_example == pytest.approx(2e-6, rel=1e-6)
    size = controller.batch_size
    useful = (
        size / (1e-3 + 2e-6 * size) * (found.value + 32) / (found.value + size)
    )
    assert controller.goodput == pytest.approx(useful, rel=1e-6)


@pytest.mark.parametrize("noise_scale", [64.0, 8192.0])
def test_measuring_costs_two_percent_of_the_time(noise_scale):
    controller, machine = make_controller(), Machine(noise_scale)
    resolved = 0
    for superbatch in range(600):
        machine.superbatch(controller)
        resolved += controller.noise_scale.resolved
        if superbatch == 12:
            free = machine.measuring_seconds
    paid = machine.measuring_seconds - free
    # An epoch in advance, 3 % of this training, stays unpaid at its end.
    assert paid <= 0.02 * machine.seconds * 620 / 600
    assert paid >= 0.01 * machine.seconds
    # One in dozens of superbatches: enough of them are remembered.
    assert resolved > 300


def test_what_a_measurement_costs_is_there_before_it_is_made():
    controller = make_controller(policies.Fixed(512))
    machine, counts, free = Machine(64.0, fixed=1e-5), set(), 0.0
    ahead = 20 * (SUPERBATCH * 2e-6 + 4 * 1e-5)
    for superbatch in range(400):
        if superbatch == 100:
            # Measurements are of 2048 examples soon instead of 128.
            machine.quadratic = quadratic(SPREAD, 4096.0, np.sqrt(SPREAD))
        seconds, before = machine.seconds, machine.measuring_seconds
        counts.add(controller.examples_to_measure)
        machine.superbatch(controller)
        after = machine.measuring_seconds
        if superbatch <= 12:
            free = after
        elif after > before:
            # A fifth of 2 % is left for hiccups.
            assert after - free <= 0.016 * (seconds + ahead) * (1 + 1e-9)
    assert min(counts) <= 256 and max(counts) == SUPERBATCH


@pytest.mark.parametrize("count", [64, 512, 2048])
@pytest.mark.parametrize("size", [32, 256, 1024])
def test_no_measurement_takes_longer_than_updates_tell(size, count):
    controller = make_controller()
    assert controller.speed.most_to_measure(size, count) == math.inf
    update = 1e-3 + 2e-6 * size
    controller.speed.add(size, update)
    found = controller.speed.most_to_measure(size, count)
    # Eight parts at the same weights, without an update.
    assert found >= 8 * (0.7e-3 + 2e-6 * count / 8)
    # No longer than eight updates, or those that the examples would make.
    updates = 8 if count <= 8 * size else count / size
    assert found == pytest.approx(updates * update, rel=1e-12)


def test_the_schedule_is_told_what_measuring_takes_at_most(monkeypatch):
    controller, told = make_controller(policies.Fixed(256)), []

    def is_due(updates, ahead, count, most=math.inf):
        told.append((count, most))

    monkeypatch.setattr(controller.measuring, "is_due", is_due)
    size = controller.batch_size
    for seconds in (None, 0.25):
        if seconds is not None:
            controller.speed.add(size, seconds)
        controller.wants_measurement(SUPERBATCH, EPOCH)
    (count, unknown), (_, known) = told
    assert unknown == math.inf
    assert known == controller.speed.most_to_measure(size, count)
    assert known < math.inf


# What holds the size.


def ready(policy=None):
    """A controller that is about to grow, and its machine."""
    controller, machine = make_controller(policy), Machine(2048.0)
    for _ in range(100):
        if copy.deepcopy(controller).decide() is not None:
            return controller, machine
        machine.superbatch(controller)
    raise AssertionError("It never wanted to grow.")


def after(controller, **changes):
    """The controller after another superbatch."""
    fields = {
        "examples": SUPERBATCH,
        "updates": SUPERBATCH // controller.batch_size,
        "loss": 0.5,
        **changes,
    }
    controller.observe(Measurement(**fields))
    return controller


INFINITE = MicroBatchNorms(math.inf, 1.0, SUPERBATCH, 8.0, 1.0)


@pytest.mark.parametrize(
    "policy",
    [policies.Goodput(), policies.Fixed(256), policies.NoiseScale()],
    ids=repr,
)
@pytest.mark.parametrize(
    "broken",
    [{"loss": math.nan}, {"loss": math.inf}, {"norms": (INFINITE,)}],
    ids=["nan", "inf", "norms"],
)
def test_a_loss_or_gradient_that_is_not_finite_holds_the_size(policy, broken):
    controller, _ = ready(policy)
    assert after(copy.deepcopy(controller)).decide() is not None
    assert after(controller, **broken).decide() is None
    # Once it is finite again, so are decisions.
    assert after(controller).decide() is not None


def test_a_model_without_a_loss_is_not_held():
    controller, _ = ready()
    assert after(controller, loss=None).decide() is not None


def test_skipped_measurements_are_counted():
    controller, _ = ready()
    assert controller.skipped_measurements == 0
    assert after(controller, norms=(INFINITE,)).skipped_measurements == 1


@pytest.mark.parametrize("batch_size", [32, 1024, SUPERBATCH])
def test_changes_keep_their_distance(batch_size):
    # Starting from 32 the examples decide, from a superbatch the updates.
    ladder = Ladder(batch_size, 8, SUPERBATCH)
    policy = policies.NoiseScale()
    controller, machine = make_controller(policy, ladder), Machine(50.0)
    if batch_size == 32:
        machine = Machine(50_000.0)
    examples, updates, distances = 0, 0, []
    for _ in range(200):
        before = controller.examples, controller.updates
        if machine.superbatch(controller) is not None:
            distances.append((before[0] - examples, before[1] - updates))
            examples, updates = before
    assert len(distances) >= 3
    assert all(examples >= 4 * SUPERBATCH for examples, _ in distances)
    assert all(updates >= 8 for _, updates in distances)


def test_a_stated_size_is_taken_at_once():
    controller = make_controller(policies.BatchSizeSchedule({0: 64, 1: 512}))
    machine = Machine(100.0)
    assert machine.superbatch(controller).new_batch_size == 64
    controller.epoch = 1
    assert machine.superbatch(controller).new_batch_size == 512


def test_plateau_is_told_the_logs_and_grows():
    policy = policies.GrowOnPlateau("loss", patience=2)
    policy.set_state({**policy.get_state(), "best": 0.0, "wished": 128})
    # Another training begins, which knows nothing of the last one.
    controller = make_controller(policy)
    for epoch in range(3):
        assert controller.decide() is None
        controller.on_epoch_end(epoch, {"loss": 1.0})
    assert controller.decide().new_batch_size == 64


# Clocks.


@pytest.mark.parametrize("batch_size", [8, 32, 128, 2048])
@pytest.mark.parametrize("examples", [2048, 5000, 4097, 31, 6144])
def test_base_steps_are_those_of_an_ordinary_fit(batch_size, examples):
    controller = make_controller(policies.Fixed(batch_size))
    machine = Machine(100.0)
    for epoch in range(3):
        left = examples
        while left > 0:
            machine.superbatch(controller, min(left, SUPERBATCH))
            left -= SUPERBATCH
        # Batches of 32, the last one ragged.
        assert controller.base_steps == (epoch + 1) * math.ceil(examples / 32)
        assert controller.examples == (epoch + 1) * examples
        updates = [
            math.ceil(min(SUPERBATCH, examples - start) / batch_size)
            for start in range(0, examples, SUPERBATCH)
        ]
        assert controller.updates == (epoch + 1) * sum(updates)


def test_an_update_at_the_end_of_an_epoch_counts_and_is_measured():
    controller = make_controller()
    random = np.random.default_rng(0)
    norms = measured(random, *quadratic(SPREAD, 100.0, np.ones(200)))
    controller.observe_update(norms)
    assert controller.updates == 1
    assert controller.noise_scale.trace > 0.0
    # One micro-batch has no noise to measure.
    controller.observe_update(norms._replace(count=1.0))
    assert (controller.updates, controller.base_steps) == (2, 0)


# What is measured.


def test_tracing_is_no_cost_of_measuring():
    controller, machine = make_controller(), Machine(500.0)
    # So many that the next measurement is charged.
    trained(controller, machine, 40)
    before = controller.get_state()["measuring"]
    norms = measured(machine.random, *machine.quadratic, SUPERBATCH)
    after(
        controller,
        norms=(norms,),
        measuring_seconds=5.0,
        seconds=9.0,
        traced=True,
    )
    booked = controller.get_state()["measuring"]
    assert booked["_taken"] == before["_taken"] + 1
    for name in ("_elapsed", "_spent", "_costs"):
        assert booked[name] == before[name]


def test_ragged_and_accumulated_superbatches_are_not_measured():
    controller = make_controller(
        ladder=Ladder(32, 8, 4 * SUPERBATCH), measure_every=1
    )
    after(controller)
    assert controller.wants_measurement(SUPERBATCH, 0)
    assert not controller.wants_measurement(SUPERBATCH - 1, 0)
    controller.batch_size = 2 * SUPERBATCH
    # Their micro-batches measure for free, four of them at least.
    assert controller.measures_for_free
    assert controller.plan.accumulation_steps >= 4
    assert not controller.wants_measurement(SUPERBATCH, 0)


def test_without_measuring_a_batch_is_cut_as_little_as_possible():
    controller = make_controller(
        ladder=Ladder(32, 8, 4 * SUPERBATCH), measure_every=None
    )
    controller.batch_size = 2 * SUPERBATCH
    assert controller.plan.accumulation_steps == 2
    assert not controller.measures


@pytest.mark.parametrize("noise_scale", [4.0, 100.0, 1000.0, 1e5])
def test_measurements_are_as_large_as_the_noise_needs(noise_scale):
    controller = make_controller()
    assert controller.examples_to_measure == SUPERBATCH
    trained(controller, Machine(noise_scale), 60)
    examples = controller.examples_to_measure
    assert (examples // 64).bit_count() == 1
    # Up to twice the noise scale, as far as that is known.
    wanted = 2 * controller.noise_scale.upper
    if wanted < 64:
        assert examples == 64
    elif wanted > SUPERBATCH:
        assert examples == SUPERBATCH
    else:
        assert wanted / 2 < examples <= wanted


@pytest.mark.parametrize(("every", "distance"), [(1, 1), (64, 1), (65, 2)])
def test_every_k_counts_updates_from_measurement_to_measurement(
    every, distance
):
    # A superbatch has 64 updates.
    controller = make_controller(policies.Fixed(), measure_every=every)
    machine, spent = Machine(100.0), [0.0]
    for _ in range(20):
        machine.superbatch(controller)
        spent.append(machine.measuring_seconds)
    measured_at = np.flatnonzero(np.diff(spent))
    assert measured_at.tolist() == list(range(distance, 20, distance))


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_plan_covers_the_batch_within_a_superbatch(replicas):
    controller = make_controller(
        ladder=Ladder(32, 8, 8 * SUPERBATCH), replicas=replicas
    )
    for size in controller.ladder.sizes:
        controller.batch_size = size
        plan = controller.plan
        piece = plan.micro_batch_size * replicas
        assert size <= plan.accumulation_steps * piece < size + piece
        assert plan.micro_batch_size <= math.ceil(SUPERBATCH / replicas)


# The learning rate.


@pytest.mark.parametrize("meant_for", [32, 8])
def test_rate_follows_the_rule_with_the_latest_known_noise_scale(meant_for):
    controller = make_controller(rule=scaling.adascale, measure_every=1)
    controller.clock.batch_size = meant_for
    assert controller.learning_rate_factor == 1.0
    machine = Machine(500.0)
    trained(controller, machine, 60)
    size, phi = controller.batch_size, controller.noise_scale.value
    assert size > 32
    gain = (1 + phi / meant_for) / (1 + phi / size)
    assert controller.learning_rate_factor == pytest.approx(gain, rel=1e-9)

    # While it is not resolved the rate does not jump back.
    machine.quadratic = Machine(1e9).quadratic
    for _ in range(1000):
        if not controller.noise_scale.resolved:
            break
        known = controller.noise_scale.value
        machine.superbatch(controller)
    assert not controller.noise_scale.resolved
    gain = (1 + known / meant_for) / (1 + known / controller.batch_size)
    assert controller.learning_rate_factor == pytest.approx(gain, rel=1e-9)


def test_rate_may_be_meant_for_another_size_than_the_base():
    controller = make_controller(rule=scaling.linear)
    controller.clock.batch_size = 256
    assert controller.learning_rate_factor == 32 / 256


# Speed-ups.


def test_predicted_and_observed_speedups_are_those_of_the_model():
    machine = Machine(500.0, 1e-3, 4e-6)
    controller = make_controller()
    _, decisions = trained(controller, machine, 300)
    assert len(decisions) >= 2

    def goodput(size, phi):
        return size / (1e-3 + 4e-6 * size) / (phi + size)

    for index, one in enumerate(decisions):
        old, new = one.old_batch_size, one.new_batch_size
        ratio = goodput(new, one.noise_scale) / goodput(old, one.noise_scale)
        assert controller.observed_speedup(one) == pytest.approx(ratio)
        # The first is a try: one size does not tell the speed of another.
        if index == 0 or "a try" in one.reason:
            assert math.isnan(one.predicted_speedup)
        else:
            assert one.predicted_speedup == pytest.approx(ratio, rel=1e-6)
            assert one.predicted_speedup >= 1.05


def test_speedup_is_unknown_without_a_timing_or_a_noise_scale():
    controller, machine = make_controller(), Machine(500.0)
    unknown = Decision(32, 64, 500.0, math.nan, "")
    assert math.isnan(controller.observed_speedup(unknown))
    trained(controller, machine, 2)
    assert math.isnan(controller.observed_speedup(unknown))
    after(controller, timing=Timing(1.0, 8))
    blind = dataclasses.replace(
        unknown, new_batch_size=32, noise_scale=math.nan
    )
    assert math.isnan(controller.observed_speedup(blind))
    assert math.isnan(make_controller().goodput)


def test_a_schedule_knows_the_speedup_only_where_the_noise_is_known():
    policy = policies.BatchSizeSchedule({0: 32, 1: 64})
    controller = make_controller(policy, measure_every=None)
    machine = Machine(500.0)
    trained(controller, machine, 10)
    controller.epoch = 1
    decision = controller.decide()
    assert math.isnan(decision.noise_scale)
    assert math.isnan(decision.predicted_speedup)
    assert decision.reason == "scheduled for epoch 2"


def test_goodput_is_of_the_size_that_the_rate_was_meant_for():
    controller = make_controller(rule=scaling.linear, measure_every=1)
    controller.clock.batch_size = 256
    sizes, decisions = trained(controller, Machine(50.0), 200)
    step_time, known = controller.step_time, controller.noise_scale.value

    def goodput(size, noise_scale=known):
        return throughput.goodput(
            *(size, step_time, noise_scale),
            *(256, throughput.linear_efficiency),
        )

    best = max(controller.ladder.sizes, key=goodput)
    assert recommended_batch_size(controller) == best
    # The size stays where another would not bring 5 %.
    assert controller.goodput == goodput(sizes[-1]) >= goodput(best) / 1.05
    for index, one in enumerate(decisions):
        gain = goodput(one.new_batch_size, one.noise_scale) / goodput(
            one.old_batch_size, one.noise_scale
        )
        assert controller.observed_speedup(one) == pytest.approx(gain)
        if index > 0 and "a try" not in one.reason:
            assert one.predicted_speedup == pytest.approx(gain)


def test_one_example_is_not_measured():
    controller = Controller(
        policies.Goodput(), Ladder(1, 1, 64), superbatch_size=1
    )
    for _ in range(20):
        assert not controller.wants_measurement(1, EPOCH)
        controller.observe(Measurement(1, 1, loss=0.5, learning_rate=0.1))


def test_it_says_why_the_size_stays():
    controller = make_controller()
    assert why_unchanged(controller) == (
        "no noise was measured, which takes two whole superbatches"
    )
    trained(controller, Machine(1e6), 4)
    assert why_unchanged(controller) == (
        "the noise scale could not be told from infinity"
    )
    controller = make_controller()
    trained(controller, Machine(1.0), 60)
    assert why_unchanged(controller) == "no other size was better"
    single = make_controller(policies.Fixed(), Ladder(32, 32, 32))
    assert why_unchanged(single) == "the bounds leave one size only"


def test_measuring_recommends_the_noise_scale():
    # One size only was timed, so nothing better than φ itself can be said.
    controller = make_controller(policies.Measure())
    assert recommended_batch_size(controller) is None
    trained(controller, Machine(500.0), 60)
    doublings = round(math.log2(controller.noise_scale.value / 32))
    assert recommended_batch_size(controller) == 32 * 2**doublings


@pytest.mark.parametrize("sizes", [1, 3])
@pytest.mark.parametrize("replicas", [3, 4, 7])
def test_what_is_recommended_suits_the_replicas(sizes, replicas):
    controller = make_controller(policies.Measure())
    trained(controller, Machine(5000.0), 60)
    for size in (32, 64, 128)[:sizes]:
        controller.speed.add(size, 1e-3 + 2e-6 * size)
    alone = recommended_batch_size(controller)
    controller.replicas = replicas
    size = recommended_batch_size(controller)
    assert alone > 256 and size % replicas == 0
    assert 0.5 < size / alone < 2.0


@pytest.mark.parametrize("replicas", [1, 2, 3, 5, 7])
def test_a_resumed_size_suits_the_new_number_of_replicas(replicas):
    controller = make_controller(policies.Fixed(256))
    trained(controller, Machine(500.0), 10)
    assert controller.batch_size == 256
    ladder = Ladder(32, 32, SUPERBATCH, replicas=replicas)
    resumed = make_controller(ladder=ladder, replicas=replicas)
    resumed.set_state(controller.get_state())
    if replicas in (1, 2):
        assert resumed.batch_size == 256
    assert resumed.batch_size % replicas == 0
    assert abs(math.log2(resumed.batch_size / 256)) <= 0.5


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_a_rule_must_return_a_positive_number(factor):
    controller = make_controller(rule=lambda ratio, noise_scale: factor)
    with pytest.raises(ValueError, match="positive number.*Received"):
        controller.learning_rate_factor


# State.

POLICIES = {
    **policies.POLICIES,
    "plateau": lambda: policies.GrowOnPlateau("loss", patience=1),
    "fixed": lambda: policies.Fixed(256),
}


def record(policy, resumed_at=()):
    """Everything a training does, resumed from JSON at some superbatches."""
    controller = make_controller(policy(), rule=scaling.adascale)
    machine, told = Machine(700.0), []
    for superbatch in range(60):
        if superbatch in resumed_at:
            text = json.dumps(controller.get_state(), allow_nan=False)
            controller = make_controller(policy(), rule=scaling.adascale)
            controller.set_state(json.loads(text))
            assert json.dumps(controller.get_state()) == text
        # A loss that is lost for a while, and one that comes to a rest.
        machine.loss = math.nan if superbatch in (20, 21) else 0.9**superbatch
        told.append(
            (
                machine.superbatch(controller),
                controller.batch_size,
                controller.noise_scale,
                controller.step_time,
                controller.learning_rate_factor,
                controller.measuring.spent,
                controller.examples,
                controller.updates,
                controller.base_steps,
            )
        )
        if superbatch % 10 == 9:
            logs = {"loss": max(0.9**superbatch, 0.05)}
            controller.on_epoch_end(superbatch // 10, logs)
    return told


@pytest.mark.parametrize("name", POLICIES)
def test_a_resumed_training_is_the_uninterrupted_one(name):
    whole = record(POLICIES[name])
    for resumed_at in [(0,), (3,), (21, 22), (10, 40), range(60)]:
        # NaN is equal to nothing, but prints alike.
        assert repr(record(POLICIES[name], resumed_at)) == repr(whole)


def test_a_resumed_training_still_holds_after_a_loss_that_was_not_finite():
    controller, _ = ready(policies.Fixed(256))
    after(controller, loss=math.nan)
    resumed = make_controller(policies.Fixed(256))
    resumed.set_state(json.loads(json.dumps(controller.get_state())))
    assert resumed.decide() is None


def test_state_of_another_base_is_refused_with_the_right_one():
    state = make_controller().get_state()
    other = make_controller(ladder=Ladder(64, 8, SUPERBATCH))
    with pytest.raises(ValueError) as caught:
        other.set_state(state)
    text = str(caught.value)
    assert "Received: batch_size=64, saved with 32." in text
    assert text.endswith("Use batch_size=32.")


def test_a_state_is_checked_before_anything_is_taken_over():
    controller = make_controller()
    before = controller.get_state()
    state = {**before, "batch_size": 64, "examples": 5, "noise": {}}
    with pytest.raises(ValueError, match=r"state\['noise'\] without"):
        controller.set_state(state)
    assert controller.get_state() == before


def test_every_value_of_a_state_is_checked():
    state = make_controller().get_state()
    names = {(key,) for key in state if key != "policy"} | {
        (key, inner)
        for key in ("clock", "measuring", "noise")
        for inner in state[key]
    }
    for name in names:
        changed = json.loads(json.dumps(state))
        inner = changed
        for key in name[:-1]:
            inner = inner[key]
        inner[name[-1]] = "something else"
        with pytest.raises(TypeError, match="something else"):
            make_controller().set_state(changed)


def test_a_plateau_is_waited_for_anew_after_another_policy():
    state = make_controller(policies.Fixed(64)).get_state()
    controller = make_controller(policies.GrowOnPlateau("loss"))
    for of_another in ({}, [1, 2], {"best": 0.5}):
        controller.set_state({**state, "policy": of_another})
        controller.on_epoch_end(0, {"loss": 1.0})
        assert controller.policy.get_state()["best"] == 1.0


def test_state_fits_other_bounds():
    controller = make_controller(policies.Fixed(512))
    trained(controller, Machine(100.0), 10)
    narrow = make_controller(ladder=Ladder(32, 32, 128))
    narrow.set_state(controller.get_state())
    assert narrow.batch_size == 128
    assert narrow.examples == controller.examples


def test_speed_is_carried_over_to_another_number_of_replicas():
    # Seconds 1e-3 + 2e-5 per example of a replica, on two of them.
    controller = make_controller(replicas=2)
    for size in (32, 64, 128):
        controller.speed.add(size, 1e-3 + 2e-5 * size / 2)
    state = json.loads(json.dumps(controller.get_state()))
    state["batch_size"] = 64
    for replicas in (1, 2, 8):
        resumed = make_controller(replicas=replicas)
        resumed.set_state(state)
        assert resumed.batch_size == 64  # The same global batch goes on.
        for size in (32, 64, 128):
            assert resumed.timings.median(size) == pytest.approx(
                1e-3 + 2e-5 * size / replicas, rel=1e-9
            )
