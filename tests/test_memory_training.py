"""The probe in training, and dtype policies side by side."""

import copy
import functools
import math

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from comparing import compiled
from comparing import dense
from fake_memory import MB
from fake_memory import FakeMeter
from fake_memory import FakeWorkload

import keras_batchsize as kb
from keras_batchsize import _memory_compare
from keras_batchsize import _memory_workload
from keras_batchsize import keras_private
from keras_batchsize import memory
from keras_batchsize import model_state
from keras_batchsize import out_of_memory
from keras_batchsize import replicas
from keras_batchsize import throughput
from keras_batchsize._controller_speed import Speed
from keras_batchsize._memory_examples import read_examples
from keras_batchsize._memory_workload import Workload
from keras_batchsize._trainer_model import largest_by_default
from keras_batchsize.batch_profile import BatchProfile
from keras_batchsize.batch_profile import ProfileRow
from keras_batchsize.throughput import StepTime

pytestmark = pytest.mark.minutes(4)

make = compiled(
    dense, optimizer=lambda: keras.optimizers.SGD(0.05, momentum=0.9)
)


def found(size, fixed=0.01, per_example=0.001, reason="memory"):
    """A profile of two sizes."""
    rows = [
        ProfileRow(one, 1000 * one, None, fixed + per_example * one, True)
        for one in (1, size)
    ]
    return BatchProfile(rows, size, reason)


def test_callback_caps_what_is_run_at_once():
    data = comparing.regression(128)
    probe = kb.MemoryProbe(time_budget=math.inf)
    sizes = kb.DynamicBatchSize("fixed", initial_batch_size=8)
    model = comparing.seeded(make)
    model.fit(
        *data, batch_size=32, shuffle=False, verbose=0, callbacks=[probe, sizes]
    )
    assert probe.profile.max_batch_size == 32
    assert probe.profile.reason == "maximum"
    other = comparing.seeded(make)
    other.fit(*data, batch_size=8, shuffle=False, verbose=0)
    for ours, theirs in zip(model.get_weights(), other.get_weights()):
        np.testing.assert_array_equal(ours, theirs)


def test_callback_makes_larger_batches_of_smaller_passes(monkeypatch):
    monkeypatch.setattr(
        memory, "probe", lambda model, examples, limits: found(4)
    )
    data = comparing.regression(128)
    sizes = kb.DynamicBatchSize("fixed", initial_batch_size=8)
    model = make()
    model.fit(
        *data,
        batch_size=32,
        verbose=0,
        callbacks=[sizes, kb.MemoryProbe()],
    )
    row = sizes.report.rows[-1]
    assert (row.batch_size, row.micro_batch_size) == (8, 4)


@pytest.mark.parametrize(
    ("examples", "batched", "tails"),
    [
        (128, False, set()),
        (134, False, {6}),
        (20, False, set()),
        # Up to 128, as far as anybody knows.
        (121, True, {31}),
    ],
)
def test_callback_runs_the_ragged_batch_of_an_epoch(
    examples, batched, tails, monkeypatch
):
    meter = FakeMeter(None)
    monkeypatch.setattr(memory, "meter_for", lambda model: meter)
    monkeypatch.setattr(memory, "Workload", FakeWorkload)
    trainer = kb.AdaptiveTrainer(
        make(), policy="fixed", superbatch_size=32, verbose=0
    )
    probe = kb.MemoryProbe()
    data = comparing.regression(examples)
    if batched:
        data = [tf.data.Dataset.from_tensor_slices(data).batch(8)]
    trainer.fit(*data, batch_size=8, verbose=0, callbacks=[probe])
    assert probe.profile.max_batch_size == 32
    # Not by fewer data, should there be less than a superbatch of them.
    assert probe.profile.reason == "maximum"
    assert {size for what, size in meter.ran if what == "tail"} == tails


def test_callback_may_raise_the_limit_of_an_earlier_fit(monkeypatch):
    sizes = iter((4, 16))
    monkeypatch.setattr(
        memory, "probe", lambda model, examples, limits: found(next(sizes))
    )
    data = comparing.regression(128)
    trainer = kb.AdaptiveTrainer(make(), policy="fixed", verbose=0)
    for largest in (4, 16):
        trainer.fit(
            *data, batch_size=32, verbose=0, callbacks=[kb.MemoryProbe()]
        )
        assert trainer.plan.micro_batch_size == largest


def test_callback_needs_somebody_who_decides():
    with pytest.raises(ValueError, match="beside a `DynamicBatchSize`"):
        make().fit(
            *comparing.regression(), verbose=0, callbacks=[kb.MemoryProbe()]
        )


def test_callback_checks_its_arguments_and_is_copied():
    with pytest.raises(ValueError, match="safety_margin"):
        kb.MemoryProbe(safety_margin=1.0)
    with pytest.raises(ValueError, match="memory_limit"):
        kb.MemoryProbe(memory_limit=0)
    assert copy.deepcopy(kb.MemoryProbe()).profile is None


def test_trainer_starts_from_its_probe():
    x, y = comparing.regression(256)
    trainer = kb.AdaptiveTrainer(make(), policy="fixed", verbose=0)
    profile = trainer.probe(x, y, maximum=16, time_budget=math.inf)
    assert profile.max_batch_size == 16
    trainer.fit(x, y, batch_size=64, verbose=0)
    assert trainer.plan.batch_size == 64
    assert trainer.plan.micro_batch_size <= 16
    state = trainer.get_state()
    assert state["largest_micro_batch_size"] == 16
    assert state["expected"] == [
        profile.step_time.fixed,
        profile.step_time.per_example,
        0,
    ]


@pytest.mark.parametrize(
    ("on_accelerator", "fits", "largest"),
    [
        # The ladder is 8, 16, 32, ...; a sixteenth of the data is 32.
        (True, 100, 64),
        (True, 20, 16),
        (False, 100, 32),
    ],
)
def test_largest_size_is_probed_on_an_accelerator(
    on_accelerator, fits, largest, monkeypatch
):
    probed = []

    def find(model, *data, **arguments):
        probed.append(arguments)
        return found(fits)

    monkeypatch.setattr(memory, "on_accelerator", lambda: on_accelerator)
    monkeypatch.setattr(memory, "find_max_batch_size", find)
    trainer = kb.AdaptiveTrainer(make(), policy="measure", verbose=0)
    for _ in range(2):
        trainer.fit(*comparing.regression(512), batch_size=8, verbose=0)
        assert trainer.report.settings["max_batch_size"] == largest
    # Once for all.
    assert len(probed) == on_accelerator


EARLY = "The probe ended early"


@pytest.mark.parametrize("reason", ["time", "trials"])
def test_what_time_or_trials_ended_is_no_limit(reason, monkeypatch):
    monkeypatch.setattr(memory, "on_accelerator", lambda: True)
    profiles = iter([found(2, reason=reason)])
    monkeypatch.setattr(
        memory, "find_max_batch_size", lambda *_, **__: next(profiles)
    )
    trainer = kb.AdaptiveTrainer(make(), policy="measure", verbose=0)
    data = comparing.regression(512)
    with pytest.warns(RuntimeWarning, match=f"{EARLY}, by {reason}") as caught:
        for _ in range(2):
            trainer.fit(*data, batch_size=8, verbose=0)
            assert trainer.plan.micro_batch_size == 8
            # A sixteenth of the data, as without a probe.
            assert trainer.report.settings["max_batch_size"] == 32
    [text] = [
        str(one.message) for one in caught if one.category is RuntimeWarning
    ]
    assert "Received: 2 sizes in 0 s, of which 2 is the largest" in text


def test_what_ran_before_time_was_over_may_be_used(monkeypatch):
    monkeypatch.setattr(memory, "on_accelerator", lambda: True)
    profile = found(200, reason="time")
    monkeypatch.setattr(memory, "find_max_batch_size", lambda *_, **__: profile)
    trainer = kb.AdaptiveTrainer(make(), policy="measure", verbose=0)
    with pytest.warns(RuntimeWarning, match=EARLY):
        trainer.fit(*comparing.regression(512), batch_size=8, verbose=0)
    assert trainer.report.settings["max_batch_size"] == 128


@pytest.mark.parametrize(("workers", "largest"), [(1, 32), (2, 16)])
def test_several_workers_train_with_no_more_than_was_run(
    workers, largest, monkeypatch
):
    monkeypatch.setattr(memory, "on_accelerator", lambda: True)
    monkeypatch.setattr(replicas, "workers", lambda model: workers)
    profile = found(20, reason="time")
    # A sixteenth of the data is 32: one worker may find out what fits.
    assert largest_by_default(make(), 8, 512, profile) == largest


@pytest.mark.parametrize("how", ["trainer", "callback"])
def test_a_probe_for_a_training_begins_with_its_batch_size(how, monkeypatch):
    # Updates of 100 s: there is no time for a second size.
    meter = FakeMeter(limit=10**12, seconds=100.0)
    monkeypatch.setattr(memory, "on_accelerator", lambda: how == "trainer")
    monkeypatch.setattr(memory, "meter_for", lambda model: meter)
    monkeypatch.setattr(memory, "Workload", FakeWorkload)
    trainer = kb.AdaptiveTrainer(
        make(), policy="fixed", superbatch_size=32, verbose=0
    )
    probes = [kb.MemoryProbe()] if how == "callback" else []
    with pytest.warns(RuntimeWarning, match=f"{EARLY}, by time"):
        trainer.fit(
            *comparing.regression(512),
            batch_size=16,
            verbose=0,
            callbacks=probes,
        )
    assert set(meter.sizes) == {16}
    assert trainer.plan.micro_batch_size == 16


@pytest.mark.parametrize(
    ("kind", "steps", "first"),
    [("arrays", None, 32), ("arrays", 32, 16), ("dataset", None, 4)],
)
def test_a_batch_size_that_is_not_stated_is_that_of_the_data(
    kind, steps, first, monkeypatch
):
    started = []

    def find(*_, start, **__):
        started.append(start)
        return found(64)

    monkeypatch.setattr(memory, "on_accelerator", lambda: True)
    monkeypatch.setattr(memory, "find_max_batch_size", find)
    data = comparing.regression(512)
    if kind == "dataset":
        data = [tf.data.Dataset.from_tensor_slices(data).batch(4)]
    trainer = kb.AdaptiveTrainer(make(), policy="measure", verbose=0)
    trainer.fit(*data, steps_per_epoch=steps, verbose=0)
    assert started == [first]
    assert trainer.report.settings["base_batch_size"] == first


def test_a_base_size_that_does_not_fit_is_gone_down_from(monkeypatch):
    meter = FakeMeter(MB, slope=MB // 10)
    monkeypatch.setattr(memory, "on_accelerator", lambda: True)
    monkeypatch.setattr(memory, "meter_for", lambda model: meter)
    monkeypatch.setattr(memory, "Workload", FakeWorkload)
    trainer = kb.AdaptiveTrainer(make(), policy="fixed", verbose=0)
    trainer.fit(*comparing.regression(64), batch_size=16, verbose=0)
    assert meter.sizes[0] == 16
    assert trainer.plan.batch_size == 16
    # Of 9.5 that may be used, as many as were run and are a part of 16.
    assert trainer.plan.micro_batch_size == 8


def test_a_largest_size_that_is_given_is_not_probed(monkeypatch):
    monkeypatch.setattr(memory, "on_accelerator", lambda: True)
    monkeypatch.setattr(memory, "find_max_batch_size", None)
    trainer = kb.AdaptiveTrainer(
        make(), policy="measure", max_batch_size=16, verbose=0
    )
    trainer.fit(*comparing.regression(512), batch_size=8, verbose=0)
    assert trainer.report.settings["max_batch_size"] == 16


def test_only_what_is_trained_on_is_probed(monkeypatch):
    counts = []

    def find(model, *data, **arguments):
        counts.append([len(one) for one in data if one is not None])
        return found(20)

    monkeypatch.setattr(memory, "on_accelerator", lambda: True)
    monkeypatch.setattr(memory, "find_max_batch_size", find)
    trainer = kb.AdaptiveTrainer(make(), policy="measure", verbose=0)
    history = trainer.fit(
        *comparing.regression(512),
        batch_size=8,
        validation_split=0.25,
        verbose=0,
    )
    assert counts == [[384, 384]]
    assert "val_loss" in history.history


def test_sums_of_gradients_fit_where_a_trainer_probes(monkeypatch):
    # Adding them up takes twice as much here.
    meter = FakeMeter(MB, slope=1000, slopes={"sums": 2000})
    monkeypatch.setattr(memory, "meter_for", lambda model: meter)
    monkeypatch.setattr(memory, "Workload", FakeWorkload)
    data = comparing.regression(2000)
    plain = kb.find_max_batch_size(make(), *data).max_batch_size
    trainer = kb.AdaptiveTrainer(make(), policy="fixed", verbose=0)
    summed = trainer.probe(*data).max_batch_size
    assert 0.85 * 950 <= plain <= 950
    assert 0.85 * 475 <= summed <= 475
    assert ("sums", summed) in meter.ran


@pytest.mark.parametrize("may_fail", [True, False])
@pytest.mark.parametrize("trains", ["adaptive", "plain"])
def test_a_probe_holds_what_training_always_holds(
    may_fail, trains, monkeypatch
):
    monkeypatch.setenv("TF_CPU_ALLOCATOR_USE_BFC", "1" if may_fail else "0")
    held, hold = [], out_of_memory.HeldValues
    monkeypatch.setattr(
        out_of_memory, "HeldValues", lambda which: held.append(1) or hold(which)
    )
    model, guards = make(), trains == "adaptive"
    examples = read_examples(model, *comparing.regression(16))
    with Workload(model, examples, FakeMeter(None), guards) as workload:
        workload.train(8)
    # Each of its calls, as long as training does.
    assert bool(held) == (may_fail and guards)


@pytest.mark.parametrize("splits", [True, False])
def test_a_trial_holds_what_training_holds_while_a_size_is_new(
    splits, monkeypatch
):
    # Too large to be held always, and nothing that raises errors.
    held, hold = [], out_of_memory.HeldValues
    model = make() if splits else compiled(of_own_step(OwnLoss))()

    def holds(variables):
        held.append(int(model.optimizer.iterations))
        return hold(variables)

    examples = read_examples(model, *comparing.regression(16))
    with Workload(model, examples, FakeMeter(None), True) as workload:
        monkeypatch.setattr(out_of_memory, "HeldValues", holds)
        workload.superbatch(4)
        # One call, of which the second update finds copies.
        assert held == [0]
        assert int(model.optimizer.iterations) == 2
        workload.train(4)
        assert held == [0]


def test_nothing_is_held_beside_other_workers(monkeypatch):
    team = _memory_workload.team_of

    def not_alone(*arguments):
        made = team(*arguments)
        made.is_alone = False
        return made

    monkeypatch.setattr(_memory_workload, "team_of", not_alone)
    monkeypatch.setattr(out_of_memory, "HeldValues", None)
    monkeypatch.setenv("TF_CPU_ALLOCATOR_USE_BFC", "1")
    model = make()
    examples = read_examples(model, *comparing.regression(16))
    with Workload(model, examples, FakeMeter(None), True) as workload:
        workload.train(8)
        # Sums of gradients there are.
        assert workload.has_superbatches
        workload.superbatch(8)


def test_a_fit_that_probes_says_what_it_can_be_told(monkeypatch):
    monkeypatch.setattr(memory, "on_accelerator", lambda: True)
    monkeypatch.setattr(memory, "meter_for", lambda model: FakeMeter(900))
    monkeypatch.setattr(memory, "Workload", FakeWorkload)
    monkeypatch.setattr(FakeMeter, "bytes_of", lambda *_: 1000)
    trainer = kb.AdaptiveTrainer(make(), policy="fixed", verbose=0)
    data = comparing.regression(64)
    with pytest.raises(memory.NothingFits) as caught:
        trainer.fit(*data, batch_size=8, verbose=0)
    text = str(caught.value)
    assert text.startswith("No batch size fits: a batch of 1 ")
    assert "Received: max_batch_size=None" in text
    assert "safety_margin" not in text and "memory_limit" not in text
    # Its remedy is one.
    trainer = kb.AdaptiveTrainer(
        make(), policy="fixed", max_batch_size=32, verbose=0
    )
    trainer.fit(*data, batch_size=8, verbose=0)


@pytest.fixture
def finds(monkeypatch):
    """Returns a function that says what the next probes find."""

    def say(*profiles):
        found_next = iter(profiles)
        monkeypatch.setattr(
            memory, "find_max_batch_size", lambda *_, **__: next(found_next)
        )

    return say


def largest_of(trainer):
    return trainer.get_state()["largest_micro_batch_size"]


def test_a_new_profile_may_raise_the_limit_of_an_earlier_one(finds):
    finds(found(4), found(16))
    data = comparing.regression(64)
    trainer = kb.AdaptiveTrainer(make(), policy="fixed", verbose=0)
    for largest in (4, 16):
        trainer.probe(*data)
        trainer.fit(*data, batch_size=32, verbose=0)
        assert largest_of(trainer) == largest
    # It is new once: what training found out afterwards stays.
    state = trainer.get_state()
    trainer.set_state({**state, "largest_micro_batch_size": 2})
    for _ in range(2):
        trainer.fit(*data, batch_size=32, verbose=0)
        assert largest_of(trainer) == 2
        assert trainer.plan.micro_batch_size == 2


GROWING = {
    "schedule": lambda: kb.policies.BatchSizeSchedule({0: 8, 1: 64}),
    "fixed": lambda: kb.policies.Fixed(64),
}


def grown(policy, probed, make_model=make):
    """Trains at sizes that grow, perhaps with what a probe has found."""
    trainer = kb.AdaptiveTrainer(
        comparing.seeded(make_model), policy, "none", verbose=0
    )
    data = comparing.regression(1024)
    if probed:
        trainer.probe(*data)
    trainer.fit(*data, batch_size=8, epochs=2, shuffle=False, verbose=0)
    return trainer


@pytest.mark.parametrize("name", GROWING)
def test_a_size_may_grow_past_what_was_probed(name, finds):
    finds(found(16))
    ours, theirs = (grown(GROWING[name](), probed) for probed in (True, False))
    row = ours.report.rows[-1]
    assert (row.batch_size, row.micro_batch_size) == (64, 16)
    # Sums of micro-batches are rounded otherwise.
    for one, two in zip(ours.model.get_weights(), theirs.model.get_weights()):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


class OwnStep(keras.Model):
    """Computes its gradients where nobody can see them."""

    def train_step(self, data):
        return super().train_step(data)


def test_what_cannot_be_cut_may_not_grow_past_what_was_probed(finds):
    make_model = compiled(of_own_step(OwnStep))
    finds(found(16))
    with pytest.raises(ValueError, match="memory for 16 examples") as caught:
        grown(GROWING["schedule"](), True, make_model)
    assert "Or use max_batch_size=16: no gradients" in str(caught.value)


def of_own_step(kind):
    """Returns a factory of functional models of a class."""

    def make_model():
        inputs = keras.Input((comparing.FEATURES,))
        return kind(inputs, keras.layers.Dense(1)(inputs))

    return make_model


def test_what_cannot_be_cut_may_grow_where_time_ended_the_probe(finds):
    finds(found(4, reason="time"))
    with pytest.warns(RuntimeWarning, match=EARLY):
        trainer = grown(
            GROWING["schedule"](), True, compiled(of_own_step(OwnStep))
        )
    row = trainer.report.rows[-1]
    assert (row.batch_size, row.micro_batch_size) == (64, 64)


@pytest.mark.parametrize(
    ("reason", "examples", "change", "holds"),
    [
        ("memory", 64, None, True),
        ("memory", 128, None, True),
        ("dataset", 64, None, True),
        ("dataset", 32, None, True),
        # There were no more, that is all.
        ("dataset", 128, None, False),
        ("memory", 64, "shape", False),
        ("memory", 64, "dtype", False),
        ("memory", 64, "targets", False),
    ],
)
def test_a_profile_is_of_its_data(reason, examples, change, holds, finds):
    inputs = keras.Input((None,))
    mean = keras.layers.Lambda(
        lambda x: keras.ops.mean(keras.ops.cast(x, "float32"), -1, True)
    )(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(mean))
    model.compile("sgd", lambda y, guess: keras.ops.mean((y - guess) ** 2, -1))
    finds(found(8, reason=reason))
    trainer = kb.AdaptiveTrainer(model, policy="fixed", verbose=0)
    trainer.probe(*comparing.regression(64))
    x, y = comparing.regression(examples)
    if change == "shape":
        x = x[:, 1:]
    if change == "dtype":
        x = x.astype("int32")
    if change == "targets":
        y = np.repeat(y, 3, axis=1)
    trainer.fit(x, y, batch_size=32, verbose=0)
    assert largest_of(trainer) == (8 if holds else None)


def test_other_data_lift_the_limit_of_a_profile(finds):
    finds(found(8, reason="dataset"))
    trainer = kb.AdaptiveTrainer(make(), policy="fixed", verbose=0)
    trainer.probe(*comparing.regression(8))
    trainer.fit(*comparing.regression(8), batch_size=32, verbose=0)
    assert largest_of(trainer) == 8
    trainer.fit(*comparing.regression(64), batch_size=32, verbose=0)
    assert largest_of(trainer) is None


def read_once(x, y):
    """Batches of eight that can be read one time only."""
    return ((x[i : i + 8], y[i : i + 8]) for i in range(0, len(x), 8))


def fed_once(x, y):
    """The same as a `tf.data.Dataset`, which does not show it."""
    batches = read_once(x, y)
    return tf.data.Dataset.from_generator(
        lambda: batches,
        output_signature=tuple(
            tf.TensorSpec((8, *data.shape[1:]), data.dtype) for data in (x, y)
        ),
    )


@pytest.mark.parametrize("make_data", [read_once, fed_once])
def test_what_can_be_read_once_is_not_read_for_a_profile(make_data, finds):
    finds(found(8))
    x, y = comparing.regression(64)
    trainer = kb.AdaptiveTrainer(make(), policy="fixed", verbose=0)
    trainer.probe(x, y)
    trainer.fit(make_data(x, y), batch_size=8, steps_per_epoch=8, verbose=0)
    assert trainer.report.rows[-1].examples == 64
    assert largest_of(trainer) == 8


class Counted:
    """Data that count how often they are asked for an iterator."""

    asked = 0

    def __iter__(self):
        self.asked += 1
        return iter(())


def test_nothing_is_asked_of_data_where_no_profile_is_known():
    data = Counted()
    trainer = kb.AdaptiveTrainer(make(), verbose=0)
    trainer._probe_first(data, None, None)
    assert data.asked == 0


@pytest.mark.parametrize("how", ["one size", "stateful"])
def test_models_of_one_size_are_not_probed(how, monkeypatch):
    monkeypatch.setattr(memory, "on_accelerator", lambda: True)
    model = keras.Sequential(
        [
            keras.Input(
                (comparing.FEATURES,),
                batch_size=8 if how == "one size" else None,
            ),
            keras.layers.Dense(1),
        ]
    )
    model.layers[-1].stateful = how == "stateful"
    model.compile("sgd", "mse")
    trainer = kb.AdaptiveTrainer(model, policy="fixed", verbose=0)
    trainer.fit(*comparing.regression(64), batch_size=8, verbose=0)
    with pytest.raises(ValueError, match="Received: "):
        trainer.probe(*comparing.regression(64))


def test_an_argument_of_the_probe_may_be_given():
    trainer = kb.AdaptiveTrainer(make(), policy="fixed", verbose=0)
    data = comparing.regression(64)
    profile = trainer.probe(
        *data, accumulates=False, maximum=8, time_budget=math.inf
    )
    assert profile.max_batch_size == 8


class TwoNetworks(keras.Model):
    """Has a step of its own, and no `call`: as models of two parts do."""

    def __init__(self):
        super().__init__()
        self.one, self.other = keras.layers.Dense(4), keras.layers.Dense(1)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.other(self.one(x)) - y))
        variables = self.trainable_variables
        self.optimizer.apply_gradients(
            zip(tape.gradient(loss, variables), variables)
        )
        return {"loss": loss}


def test_a_model_with_nothing_but_a_step_is_probed():
    model = TwoNetworks()
    model.compile("sgd")
    data = comparing.regression(64)
    profile = kb.find_max_batch_size(
        model, *data, maximum=16, time_budget=math.inf
    )
    assert profile.max_batch_size == 16
    model.fit(*data, verbose=0)


class OwnLoss(keras.Model):
    """The way of Keras's guide: a step of one's own, and no loss compiled."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
        variables = self.trainable_variables
        self.optimizer.apply_gradients(
            zip(tape.gradient(loss, variables), variables)
        )
        return {"loss": loss}


@pytest.mark.parametrize("how", ["graph", "eager", "xla"])
def test_a_model_that_cannot_be_validated_is_probed(how):
    model = of_own_step(OwnLoss)()
    model.compile("adam", run_eagerly=how == "eager", jit_compile=how == "xla")
    data = comparing.regression(64)
    with pytest.raises(ValueError, match="No loss to compute"):
        model.evaluate(*data, verbose=0)
    model.fit(*data, verbose=0)
    before = comparing.variables_of(model)
    profile = kb.find_max_batch_size(
        model, *data, maximum=16, time_budget=math.inf
    )
    assert profile.max_batch_size == 16
    for name, value in comparing.variables_of(model).items():
        np.testing.assert_array_equal(before[name], value, name)


def test_a_model_that_cannot_be_validated_is_trained_after_a_probe(
    monkeypatch,
):
    monkeypatch.setattr(memory, "on_accelerator", lambda: True)
    patient = functools.partial(
        memory.find_max_batch_size, time_budget=math.inf
    )
    monkeypatch.setattr(memory, "find_max_batch_size", patient)
    model = of_own_step(OwnLoss)()
    model.compile("adam")
    trainer = kb.AdaptiveTrainer(model, policy="fixed", verbose=0)
    trainer.fit(*comparing.regression(64), batch_size=8, verbose=0)
    assert largest_of(trainer) == 64


class CountsValidation(keras.Sequential):
    """Notes the examples of each batch that it is validated on."""

    def test_step(self, data):
        tf.numpy_function(self.note, [tf.shape(data[0])[0]], tf.int32)
        return super().test_step(data)


@pytest.mark.parametrize("how", ["graph", "eager", "strategy"])
def test_what_can_be_validated_is(how):
    strategy, sizes = tf.distribute.get_strategy(), []
    if how == "strategy":
        strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    with strategy.scope():
        layers = [keras.Input((comparing.FEATURES,)), keras.layers.Dense(1)]
        model = CountsValidation(layers)
        model.compile("sgd", "mse", run_eagerly=how == "eager")

    def note(size):
        sizes.append(int(size))
        return np.int32(size)

    # Keras would track a copy of the list.
    model.note = note
    kb.find_max_batch_size(
        model, *comparing.regression(16), maximum=8, time_budget=math.inf
    )
    # An eager step is tried on one example before.
    assert sizes == ([1, 8] if how == "eager" else [8])


class RaisesInValidation(keras.Model):
    """Fails where it is validated."""

    error = None

    def test_step(self, data):
        raise self.error


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyboardInterrupt("made up"), KeyboardInterrupt),
        # That is no model without a validation: none of its sizes fits.
        (tf.errors.ResourceExhaustedError(None, None, ""), memory.NothingFits),
    ],
)
def test_neither_memory_nor_an_interruption_is_taken_for_no_validation(
    error, expected, eager, monkeypatch
):
    monkeypatch.setattr(RaisesInValidation, "error", error)
    model = compiled(of_own_step(RaisesInValidation))()
    model.run_eagerly = eager
    with pytest.raises(expected):
        kb.find_max_batch_size(model, *comparing.regression(16), maximum=4)


class TwoOptimizers(TwoNetworks):
    """Trains each part by an optimizer of its own."""

    def __init__(self):
        super().__init__()
        self.others = [keras.optimizers.Adam()]

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.other(self.one(x)) - y))
        variables = self.one.trainable_weights + self.other.trainable_weights
        gradients = tape.gradient(loss, variables)
        pairs = list(zip(gradients, variables))
        self.optimizer.apply_gradients(pairs[:2])
        self.others[0].apply_gradients(pairs[2:])
        return {"loss": loss}


def test_all_optimizers_of_a_model_are_put_back():
    model = TwoOptimizers()
    model.compile("sgd")
    data = comparing.regression(64)
    model.fit(*data, verbose=0)
    before = [one.numpy() for one in model.others[0].variables]
    kb.find_max_batch_size(model, *data, maximum=16)
    after = [one.numpy() for one in model.others[0].variables]
    assert len(after) == len(before) > 2
    for one, other in zip(before, after):
        np.testing.assert_array_equal(one, other)


class ShowsOneMetric(keras.Sequential):
    """Has Keras's step, but not its metrics: as Keras's docstring does it."""

    def __init__(self, layers):
        super().__init__(layers)
        self.shown = keras.metrics.Mean(name="loss")

    @property
    def metrics(self):
        return [self.shown]


class CompiledInside(keras.Model):
    """Its second part is compiled by itself, and counts by itself."""

    def __init__(self):
        super().__init__()
        self.one = keras.layers.Dense(4)
        self.other = keras.Sequential([keras.Input((4,))])
        self.other.add(keras.layers.Dense(1))

    def compile(self, optimizer):
        super().compile(optimizer)
        self.other.compile("adam")

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.other(self.one(x)) - y))
        variables = self.other.trainable_weights
        gradients = tape.gradient(loss, variables)
        self.other.optimizer.apply_gradients(zip(gradients, variables))
        self.other.metrics[0].update_state(loss)
        return {"loss": loss}


def values_of(variables):
    return [one.numpy().tolist() for one in variables]


def shows_one_metric():
    layers = [keras.Input((comparing.FEATURES,)), keras.layers.Dense(1)]
    model = compiled(lambda: ShowsOneMetric(layers))()
    return model, lambda: keras_private.loss_metrics(model)[0].variables


def compiled_inside():
    model = CompiledInside()
    model.compile("sgd")
    return model, lambda: [
        *model.other.optimizer.variables, *model.other.metrics[0].variables
    ]


@pytest.mark.parametrize("make_model", [shows_one_metric, compiled_inside])
def test_what_a_model_does_not_show_is_put_back(make_model):
    model, hidden = make_model()
    data = comparing.regression(64)
    model.fit(*data, verbose=0)
    before = values_of(hidden())
    assert all(map(np.any, before))
    kb.find_max_batch_size(model, *data, maximum=16)
    assert values_of(hidden()) == before
    changed = model_state.variables_of(model)
    assert {*map(id, hidden())} <= {*map(id, changed)}


def test_what_a_step_of_ones_own_takes_is_not_foretold():
    class TwoViews(keras.Sequential):
        def train_step(self, data):
            return super().train_step(data)

    class Penalised(keras.Sequential):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    forwards = []
    for kind in (keras.Sequential, TwoViews, Penalised):
        layers = [keras.Input((comparing.FEATURES,)), keras.layers.Dense(1)]
        model = kind(layers)
        model.compile("sgd", "mse")
        examples = read_examples(model, *comparing.regression(16))
        with Workload(model, examples, FakeMeter(MB), False) as workload:
            forwards.append(workload.forward)
    assert forwards[0] is not None
    assert forwards[1:] == [None, None]


@pytest.mark.parametrize("make_data", [read_once, fed_once])
def test_generators_are_not_probed(make_data, monkeypatch):
    data = make_data(*comparing.regression(64))
    monkeypatch.setattr(memory, "on_accelerator", lambda: True)
    trainer = kb.AdaptiveTrainer(make(), policy="fixed", verbose=0)
    trainer.fit(data, batch_size=8, steps_per_epoch=8, verbose=0)
    assert trainer.batch_size == 8
    assert trainer.report.rows[-1].examples == 64


def goodput_after(profile, monkeypatch):
    """Returns the report of a training that may start from a profile."""
    monkeypatch.setattr(
        memory, "find_max_batch_size", lambda *_, **__: profile
    )
    # Targets of noise alone: a batch is soon too small for any direction.
    x, _ = comparing.regression(512)
    y = np.random.default_rng(1).normal(size=(512, 1)).astype("float32")
    keras.utils.set_random_seed(0)
    trainer = kb.AdaptiveTrainer(
        make(), max_batch_size=64, measure_every=1, verbose=0
    )
    if profile is not None:
        trainer.probe(x, y)
    trainer.fit(x, y, batch_size=8, epochs=3, verbose=0)
    return trainer.report


def test_goodput_needs_no_try_where_a_probe_has_timed(monkeypatch):
    # Without a probe a larger size is tried, to see what an example takes.
    tried = goodput_after(None, monkeypatch).changes[0]
    assert (tried.old_batch_size, tried.new_batch_size) == (8, 16)
    assert math.isnan(tried.predicted_speedup)
    # It takes all of the time: twice as many take twice as long.
    report = goodput_after(found(64, 0.0, 0.001), monkeypatch)
    assert report.changes == ()
    # It takes nothing, and then the gain is known before.
    known = goodput_after(found(64, 0.001, 0.0), monkeypatch).changes[0]
    assert (known.old_batch_size, known.new_batch_size) == (8, 16)
    assert known.predicted_speedup == pytest.approx(
        2 * throughput.linear_efficiency(16, known.noise_scale, 8)
    )


def test_speed_is_the_probes_until_two_sizes_are_timed():
    speed = Speed(largest=64)
    speed.expect(StepTime(0.01, 0.001))
    assert speed.step_time(32) == pytest.approx(0.042)
    # Training is twice as slow: the shape stays, the level follows.
    for _ in range(4):
        speed.add(32, 0.084)
    assert speed.step_time(32) == pytest.approx(0.084)
    assert speed.step_time(64) == pytest.approx(0.148)
    assert not speed.step_time.guessed
    speed.add(64, 0.160)
    assert speed.step_time(64) == pytest.approx(0.16)
    again = Speed(largest=64)
    again.set_state(speed.timings.get_state(), speed.get_state())
    assert again.step_time == speed.step_time


def build():
    inputs = keras.Input((comparing.FEATURES,))
    hidden = keras.layers.Dense(16, activation="relu")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1, dtype="float32")(hidden))
    model.compile("sgd", "mse")
    return model


def test_policies_are_compared_and_put_back():
    keras.config.set_dtype_policy("float32")
    name = keras.layers.Dense(1).name
    number = int(name.rpartition("_")[2]) if "_" in name else 0
    comparison = kb.compare_dtype_policies(
        build, *comparing.regression(64), maximum=64, time_budget=math.inf
    )
    assert keras.config.dtype_policy().name == "float32"
    assert keras.layers.Dense(1).name == f"dense_{number + 1}"
    policies = [result.dtype_policy for result in comparison.results]
    assert policies == ["float32", "mixed_bfloat16", "mixed_float16"]
    for result in comparison.results:
        assert result.profile.max_batch_size == 64
        assert result.dtype_policy in result.profile.dtype_policy
        assert result.agrees, result.losses
    texts = []
    comparison.summary(texts.append)
    (text,) = texts
    lines = text.splitlines()
    assert len(lines) == 6
    assert "mixed_float16" in lines[3] and "agree" in lines[3]


class Batches(keras.utils.PyDataset):
    """Batches of eight examples of given arrays."""

    def __init__(self, *arrays):
        super().__init__()
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays[0]) // 8

    def __getitem__(self, index):
        return tuple(one[8 * index : 8 * index + 8] for one in self.arrays)


def of_itself():
    """Learns without targets, by a loss of its own output."""

    class Smaller(keras.Model):
        def compute_loss(self, x, y, y_pred, sample_weight, training=True):
            return keras.ops.mean(keras.ops.square(y_pred))

    inputs = keras.Input((comparing.FEATURES,))
    outputs = keras.layers.Dense(1, dtype="float32")(inputs)
    model = Smaller(inputs, outputs)
    model.compile("sgd")
    return model


TWO_POLICIES = {
    "policies": ["float32", "mixed_bfloat16"],
    "maximum": 64,
    "time_budget": math.inf,
}


@functools.cache
def losses_on_arrays():
    """Returns the first losses on 64 examples, with the seed of every test."""
    keras.utils.set_random_seed(0)
    found = kb.compare_dtype_policies(
        *(build, *comparing.regression(64)), **TWO_POLICIES
    )
    return found.results[0].losses


@pytest.mark.parametrize(
    "kind", ["dataset", "weighted", "py_dataset", "no targets"]
)
def test_policies_are_compared_on_any_data_that_can_be_probed(kind):
    x, y = comparing.regression(64)
    weighted = x, y, np.linspace(0, 2, 64, dtype="float32")
    build_fn, arguments = {
        "dataset": (
            build,
            [tf.data.Dataset.from_tensor_slices((x, y)).batch(8)],
        ),
        "weighted": (
            build,
            [tf.data.Dataset.from_tensor_slices(weighted).batch(8)],
        ),
        "py_dataset": (build, [Batches(x, y)]),
        "no targets": (of_itself, [x]),
    }[kind]
    found = kb.compare_dtype_policies(build_fn, *arguments, **TWO_POLICIES)
    first, second = found.results
    assert first.profile.max_batch_size == 64
    assert len(first.losses) == 5 and second.agrees
    if kind in ("dataset", "py_dataset"):
        # The same examples as of arrays.
        assert first.losses == pytest.approx(losses_on_arrays())


def with_dropout():
    keras.utils.set_random_seed(0)  # As many a user's function does.
    inputs = keras.Input((comparing.FEATURES,))
    hidden = keras.layers.Dense(16, activation="relu")(inputs)
    hidden = keras.layers.Dropout(0.5)(hidden)
    model = keras.Model(inputs, keras.layers.Dense(1, dtype="float32")(hidden))
    model.compile("sgd", "mse")
    return model


def test_dropout_does_not_make_policies_disagree():
    # Under mixed policies masks are drawn in another type, hence other ones.
    comparison = kb.compare_dtype_policies(
        *(with_dropout, *comparing.regression(64)),
        maximum=64,
        time_budget=math.inf,
    )
    losses = [result.losses for result in comparison.results]
    rounding = 16 * 2**-10  # Of float16.
    assert abs(losses[2][0] / losses[0][0] - 1) > rounding
    assert all(result.agrees for result in comparison.results), losses


class OnlyFloat32(keras.layers.Layer):
    """Fails under any other type, as what knows no half precision does."""

    def __init__(self, error, when):
        super().__init__()
        self.error, self.when = error, when
        self._maybe_fail("made")

    def call(self, x, training=False):
        if training:
            self._maybe_fail("run")
        return x

    def _maybe_fail(self, when):
        if when == self.when and self.compute_dtype != "float32":
            raise self.error


def compared_where_one_fails(error, when):
    """Compares two policies, of which the second raises an error."""

    def build_with_layer():
        inputs = keras.Input((comparing.FEATURES,))
        hidden = OnlyFloat32(error, when)(inputs)
        model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
        model.compile("sgd", "mse")
        return model

    return kb.compare_dtype_policies(
        *(build_with_layer, *comparing.regression(16)),
        policies=["float32", "mixed_bfloat16"],
        maximum=16,
        time_budget=math.inf,
    )


@pytest.mark.parametrize(
    ("error", "when"),
    [
        (NotImplementedError("no such layer"), "made"),
        (NotImplementedError("no such layer"), "run"),
        (TypeError("no such type"), "run"),
        # As TensorFlow says that there is no kernel, or no such attribute.
        (tf.errors.InvalidArgumentError(None, None, "No OpKernel"), "run"),
        (tf.errors.NotFoundError(None, None, "Could not find device"), "run"),
        (tf.errors.UnimplementedError(None, None, "no such type"), "run"),
    ],
    ids=lambda one: one if isinstance(one, str) else type(one).__name__,
)
def test_a_policy_that_does_not_run_ends_no_comparison(error, when):
    found = compared_where_one_fails(error, when)

    assert found.results[0].profile.max_batch_size == 16
    assert found.results[1].profile is None
    name = type(error).__name__
    assert found.results[1].note == f"does not run: {name}"
    assert found.recommended is None


@pytest.fixture
def limited(monkeypatch):
    """Returns a function that says how many bytes each policy may have."""

    def limit(limits):
        monkeypatch.setattr(
            memory,
            "meter_for",
            lambda model: FakeMeter(
                limits[model.layers[1].dtype_policy.name], slope=1000
            ),
        )
        monkeypatch.setattr(memory, "Workload", FakeWorkload)
        return kb.compare_dtype_policies(
            *(build, *comparing.regression(64)), policies=[*limits]
        )

    return limit


def test_a_policy_that_does_not_fit_is_a_line(limited):
    # Of 2400 bytes 1536 are for the arrays, and an example takes 1000.
    found = limited({"float32": 10**9, "mixed_bfloat16": 2400})
    first, second = found.results
    assert first.profile.max_batch_size == 64 and first.agrees
    assert second.profile is None and not second.agrees
    assert second.note.startswith("No batch size fits: a batch of 1 ")
    assert "Received" not in second.note
    assert second.note in str(found)
    assert found.recommended is None


def test_policies_are_compared_where_the_first_does_not_fit(limited):
    names = "float32", "mixed_bfloat16", "mixed_float16"
    found = limited(dict(zip(names, (900, 10**9, 10**9))))
    assert [one.profile is None for one in found.results] == [True, 0, 0]
    # With each other.
    assert [one.agrees for one in found.results] == [False, True, True]
    assert found.recommended is None
    assert "mixed_bfloat16, mixed_float16" in found.reason
    nothing = limited(dict.fromkeys(names, 900))
    assert nothing.recommended is None
    assert not any(one.agrees for one in nothing.results)
    assert len(str(nothing).splitlines()) == 6


def test_a_model_that_cannot_be_held_is_a_line():
    error = tf.errors.ResourceExhaustedError(None, None, "OOM")
    found = compared_where_one_fails(error, "made")
    assert found.results[1].note == "does not fit: ResourceExhaustedError"


def test_losses_are_compared_on_no_more_examples_than_fit(
    limited, monkeypatch
):
    sizes = []
    train_on_batch = keras.Model.train_on_batch

    def noted(self, x, *arguments, **options):
        sizes.append(len(x))
        return train_on_batch(self, x, *arguments, **options)

    monkeypatch.setattr(keras.Model, "train_on_batch", noted)
    found = limited(
        {"float32": 12_000, "mixed_bfloat16": 9000, "mixed_float16": 10**9}
    )
    first, smaller, larger = found.results
    assert first.profile.max_batch_size < 32
    assert set(sizes) == {first.profile.max_batch_size}
    assert first.agrees and larger.agrees
    assert smaller.profile.max_batch_size < first.profile.max_batch_size
    assert not smaller.agrees and "not compared" in str(found)


def test_random_states_are_as_before():
    keras.utils.set_random_seed(5)
    kb.compare_dtype_policies(
        *(with_dropout, *comparing.regression(16)),
        policies=["float32", "mixed_bfloat16"],
        maximum=16,
    )
    got = float(tf.random.uniform(())), float(keras.random.uniform(()))
    keras.utils.set_random_seed(5)
    expected = float(tf.random.uniform(())), float(keras.random.uniform(()))
    assert got == expected


def outcome_of(policy, losses):
    return _memory_compare.PolicyResult(policy, None, losses, False)


@pytest.mark.parametrize(
    ("first", "second", "tolerance"),
    [
        ("float32", "float64", 16 * 2**-23),
        ("float32", "mixed_float16", 16 * 2**-10),
        ("float32", "mixed_bfloat16", 16 * 2**-7),
        # The coarser decides, wherever it stands.
        ("mixed_bfloat16", "float32", 16 * 2**-7),
        ("float32", "float8_from_float32", 0.25),
        ("float32", "float8_from_mixed_bfloat16", 0.25),
        ("float32", "float8_from_mixed_float16", 0.25),
    ],
)
def test_losses_agree_up_to_the_coarser_rounding(first, second, tolerance):
    reference = outcome_of(first, (1.0,))
    for part, agrees in ((0.99, True), (1.01, False)):
        other = outcome_of(second, (1.0 + part * tolerance,))
        assert _memory_compare._agree(other, reference, 0.0) == agrees


@pytest.mark.parametrize("spread", [0.0, 0.6])
def test_losses_agree_up_to_rounding_and_other_seeds(spread):
    def agree(*losses):
        return _memory_compare._agree(
            outcome_of("mixed_bfloat16", losses),
            outcome_of("float32", (1.0, 2.0)),
            spread,
        )

    assert agree(1.1, 2.1)
    assert agree(1.5, 2.5) == (spread > 0)
    assert not agree(1.0, 3.5)
    assert not agree(1.0, float("nan"))


def result(policy, size, speed, agrees=True, reason="memory"):
    profile = found(size, 0.0, 1.0 / speed, reason)
    return _memory_compare.PolicyResult(policy, profile, (), agrees)


@pytest.mark.parametrize(
    ("other", "recommended"),
    [
        (result("mixed", 20, 10), "mixed"),
        (result("mixed", 10, 20), "mixed"),
        (result("mixed", 10, 10), None),
        # Twice as large and three times as slow does not pay.
        (result("mixed", 20, 3), None),
        (result("mixed", 20, 20, agrees=False), None),
    ],
)
def test_recommends_what_pays_or_nothing(other, recommended):
    name, reason = _memory_compare._recommendation(
        [result("float32", 10, 10), other]
    )
    assert name == recommended
    assert ("None pays" in reason) == (recommended is None)


@pytest.mark.parametrize(
    ("reason", "fits", "recommended"),
    [
        ("host memory", True, "mixed"),
        ("trials", False, "mixed"),
        # Not one that was too large: who knows what ended it.
        ("trials", True, None),
        ("dataset", True, None),
        ("time", True, None),
    ],
)
def test_larger_batches_pay_where_memory_of_any_kind_is_scarce(
    reason, fits, recommended
):
    first = result("float32", 10, 10, reason=reason)
    row = ProfileRow(99, 99_000, None, None, fits)
    first.profile.rows.append(row)
    name, _ = _memory_compare._recommendation(
        [first, result("mixed", 20, 10)]
    )
    assert name == recommended


def test_comparison_refuses_what_it_cannot_compare():
    data = comparing.regression()
    with pytest.raises(TypeError, match="build_fn"):
        kb.compare_dtype_policies(build(), *data)
    with pytest.raises(ValueError, match="at least two"):
        kb.compare_dtype_policies(build, *data, policies=["float32"])
