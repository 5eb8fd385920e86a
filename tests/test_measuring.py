"""Laws of when to measure, and of the timings that are remembered."""

import itertools
import json
import random

import pytest

from keras_batchsize import measuring
from keras_batchsize.measuring import MeasuringSchedule
from keras_batchsize.measuring import Timings


def trained(
    schedule,
    superbatches,
    cost,
    epoch=20,
    seconds=1.0,
    updates=8,
    examples=lambda index: 64,
):
    """Runs a training of known costs, and yields whether it measured.

    Args:
        schedule: A `MeasuringSchedule`.
        superbatches: Number of superbatches planned.
        cost: Function from the superbatch to the seconds of measuring it.
        epoch: Superbatches in an epoch.
        seconds: Seconds of training on one.
        updates: Updates in one.
        examples: Function from the superbatch to the examples measured of it.
    """
    for index in range(superbatches):
        ahead = max(min(epoch, superbatches - index), 1) * seconds
        made, count = index * updates, examples(index)
        measures = schedule.is_due(made, ahead, count)
        paid = cost(index) if measures else None
        schedule.book(made, seconds + (paid or 0.0), paid, count)
        yield measures


COSTS = [0.001, 0.02, 0.3, 1.0, 5.0]


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("superbatches", [20, 100, 3000])
def test_measuring_stays_within_its_share_of_the_planned_time(
    cost, superbatches
):
    taken = list(
        trained(MeasuringSchedule(), superbatches, lambda index: cost)
    )
    # All but the first few, which are free.
    paid = max(sum(taken) - measuring._FIRST, 0) * cost
    elapsed = superbatches + sum(taken) * cost
    assert paid <= 0.02 * elapsed * (1 + 1e-12)


@pytest.mark.parametrize("cost", COSTS)
def test_measuring_uses_the_share_it_has(cost):
    taken = list(trained(MeasuringSchedule(), 3000, lambda index: cost))
    elapsed = 3000 + sum(taken) * cost
    # One measurement more would not be paid for, if there is room for more.
    if not all(taken[20:]):
        paid = (sum(taken) - measuring._FIRST) * cost
        assert paid > 0.016 * elapsed - cost


def test_the_budget_of_an_epoch_is_spent_in_advance():
    # The early estimates are worth most. After the first few, in 14 seconds
    # or so, 2 % pay for nothing yet; with 40 seconds ahead for two of 0.3,
    # and for one of them to take twice as long.
    schedule = MeasuringSchedule()
    taken = list(trained(schedule, 100, lambda index: 0.3, epoch=40))
    assert taken[12:15] == [True, True, False]


def test_a_hiccup_in_the_last_measurement_stays_within_the_share():
    # 16 measurements are planned, the last of which takes four times as long.
    paid = []

    def cost(index):
        paid.append(1.0 if len(paid) < measuring._FIRST + 15 else 4.0)
        return paid[-1]

    superbatches = 985
    list(trained(MeasuringSchedule(), superbatches, cost))
    spent = sum(paid[measuring._FIRST :])
    assert spent == 19.0
    assert spent <= 0.02 * (superbatches + sum(paid))


@pytest.mark.parametrize("hiccup", [0, 1])
def test_a_hiccup_in_a_short_training_stays_within_the_share(hiccup):
    # 2 % of 45 seconds pay for two of 0.4, but for none that takes 0.8.
    paid = []

    def cost(index):
        late = len(paid) == measuring._FIRST + hiccup
        paid.append(0.8 if late else 0.4)
        return paid[-1]

    list(trained(MeasuringSchedule(), 45, cost, epoch=45))
    spent = sum(paid[measuring._FIRST :])
    assert 0.0 < spent <= 0.02 * (45 + sum(paid))


def test_costs_that_change_overdraw_by_one_measurement_at_most():
    dice = random.Random(0)
    costs = [dice.choice([0.01, 0.1, 1.0]) for _ in range(3000)]
    schedule = MeasuringSchedule()
    taken = list(trained(schedule, 3000, lambda index: costs[index]))
    paid = [cost for cost, measured in zip(costs, taken) if measured]
    elapsed = 3000 + sum(paid)
    assert sum(paid[measuring._FIRST :]) <= 0.02 * elapsed + 1.0
    spent = sum(paid[measuring._FIRST :])
    assert schedule.spent == pytest.approx(spent, rel=1e-9)
    assert schedule.elapsed == pytest.approx(elapsed, rel=1e-9)


def test_a_cheap_measurement_does_not_make_the_next_one_cheap():
    schedule, spent, elapsed, taken = MeasuringSchedule(), 0.0, 0.0, 0
    for index in range(3000):
        measures = schedule.is_due(index, 0.0, 64)
        cost = (1.0, 0.1)[taken % 2] if measures else None
        schedule.book(index, 1.0 + (cost or 0.0), cost, 64)
        elapsed += 1.0 + (cost or 0.0)
        taken += measures
        spent += cost or 0.0
        if taken <= measuring._FIRST:
            spent = 0.0
        assert spent <= 0.02 * elapsed
    assert taken > 2 * measuring._FIRST


@pytest.mark.parametrize("fixed", [0.0, 0.1])
@pytest.mark.parametrize("superbatches", range(60, 300, 8))
def test_measuring_more_examples_stays_within_the_share(superbatches, fixed):
    # As the noise scale grows in training, each measurement needs more.
    counts = [64 * 2 ** (index // 40) for index in range(superbatches)]
    paid = []

    def cost(index):
        paid.append(fixed + 0.05 * counts[index] / 64)
        return paid[-1]

    list(
        trained(
            MeasuringSchedule(), superbatches, cost, examples=counts.__getitem__
        )
    )
    spent = sum(paid[measuring._FIRST :])
    assert 0.0 < spent <= 0.02 * (superbatches + sum(paid))


def test_a_measurement_is_as_dear_as_one_of_as_many_examples():
    schedule = MeasuringSchedule()
    for _ in range(measuring._FIRST):
        schedule.book(0, 10.0, 0.01, 64)
    # 1.2 seconds would pay for one that took 0.6, but a hundred times as many
    # examples may take 1.0.
    assert schedule.is_due(0, 0.0, 64)
    assert not schedule.is_due(0, 0.0, 6400)
    schedule.book(0, 1.0, 0.1, 6400)
    assert schedule.is_due(0, 0.0, 6400)
    assert not schedule.is_due(0, 0.0, 12800)
    # By the time of updates they cannot take longer than 0.4.
    assert schedule.is_due(0, 0.0, 12800, most=0.4)


@pytest.mark.parametrize("cost", COSTS)
def test_the_first_few_are_measured_whatever_they_cost(cost):
    first = 2 * measuring._FIRST
    taken = list(trained(MeasuringSchedule(), first, lambda index: cost))
    # Every other superbatch, so that there is a timing to compare with.
    assert taken == [False, True] * measuring._FIRST


@pytest.mark.parametrize("updates", [1, 8, 64])
@pytest.mark.parametrize("every", [1, 5, 8, 20, 64, 1000])
def test_every_k_measures_when_k_updates_have_passed(every, updates):
    schedule = MeasuringSchedule(every)
    taken = list(
        trained(schedule, 3000, lambda index: 1.0, updates=updates)
    )
    # A superbatch is measured at its beginning, so the distance is the first
    # multiple of its updates that is long enough, from the start on.
    distance = -(-every // updates)
    assert taken == [
        index > 0 and index % distance == 0 for index in range(3000)
    ]


@pytest.mark.parametrize(
    ("every", "phases"), [(20, {0}), (10, {0, 10}), (21, set(range(20)))]
)
def test_a_cycle_is_seen_where_it_does_not_divide_what_lies_between(
    every, phases
):
    # A learning rate that comes back every 20 updates, an update at a time.
    schedule = MeasuringSchedule(every)
    taken = trained(schedule, 3000, lambda index: 1.0, updates=1)
    assert {index % 20 for index, one in enumerate(taken) if one} == phases


def test_none_measures_nothing():
    assert not any(trained(MeasuringSchedule(None), 100, lambda index: 0.0))


@pytest.mark.parametrize("every", [0, -1, 1.5, "often", True])
def test_every_must_be_a_count(every):
    with pytest.raises((TypeError, ValueError)) as caught:
        MeasuringSchedule(every)
    text = str(caught.value)
    assert f"Received: measure_every={every!r}." in text
    assert text.endswith('Use measure_every="auto".')


@pytest.mark.parametrize("every", ["auto", 50, None])
@pytest.mark.parametrize("cut", [0, 3, 50])
def test_schedule_resumes_from_json_as_if_uninterrupted(every, cut):
    def run(resume):
        schedule, taken = MeasuringSchedule(every), []
        for index in range(100):
            if resume and index == cut:
                text = json.dumps(schedule.get_state(), allow_nan=False)
                schedule = MeasuringSchedule(every)
                schedule.set_state(json.loads(text))
            measures = schedule.is_due(8 * index, 5.0, 64)
            paid = 0.1 if measures else None
            schedule.book(8 * index, 1.0, paid, 64)
            taken.append(measures)
        return taken, schedule.spent, schedule.elapsed

    assert run(resume=True) == run(resume=False)


# Timings.


def test_median_is_of_the_latest_timings():
    timings = Timings()
    assert timings.median(32) is None
    for seconds in range(100):
        timings.add(32, seconds)
    # 85 to 99: what the machine did long ago is forgotten.
    assert timings.median(32) == 92.0
    assert len(timings.of(32)) == 15


@pytest.mark.parametrize("count", [2, 3, 4, 15])
def test_a_hiccup_does_not_move_the_median(count):
    for hit in range(count):
        timings = Timings()
        for index in range(count):
            timings.add(32, 100.0 if index == hit else 1.0)
        assert timings.median(32) == 1.0


def test_samples_pair_each_time_with_its_size():
    timings = Timings()
    wanted = [(32, 1.0), (64, 3.0), (32, 2.0)]
    for size, seconds in wanted:
        timings.add(size, seconds)
    sizes, seconds = timings.samples()
    assert sorted(zip(sizes, seconds)) == sorted(wanted)


def test_timings_resume_from_json():
    one, two = Timings(), Timings()
    for size, index in itertools.product((32, 256), range(20)):
        one.add(size, index / 7)
    saved = one.get_state()
    two.set_state(json.loads(json.dumps(saved)))
    one.add(32, 5.0)
    assert saved == two.get_state()  # It is a copy.
    two.add(32, 5.0)
    assert one.samples() == two.samples()
