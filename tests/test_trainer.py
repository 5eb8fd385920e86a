"""What `AdaptiveTrainer` chooses where nothing is said, and what it recalls."""

import gc
import inspect
import json
import math
import time
import types
from unittest import mock

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from comparing import BASE
from comparing import SUPERBATCH
from comparing import dense
from comparing import regression

import keras_batchsize as kb
from keras_batchsize import _trainer_fit
from keras_batchsize import scaling
from keras_batchsize._callbacks_base import settings_of
from keras_batchsize._train_function_tally import Tally
from keras_batchsize.controller import Controller
from keras_batchsize.noise import NoiseScaleEstimate
from keras_batchsize.plan import Ladder
from keras_batchsize.records import Measurement

# Keras says so of any data that do not tell their length.
OUT_OF_DATA = "ignore:Your input ran out of data:UserWarning"


def regressor():
    model = dense()
    model.compile("sgd", "mse")
    return model


def unknown(examples):
    """Returns a dataset that does not tell its length."""
    data = tf.data.Dataset.from_tensor_slices(regression(examples))
    return data.filter(lambda x, y: True).batch(BASE)


# The largest size.


@pytest.mark.parametrize(
    ("examples", "largest"),
    # A sixteenth of the examples, on the ladder of 8.
    [(70, 8), (255, 8), (256, 16), (1023, 32), (1024, 64)],
)
def test_the_largest_batch_is_a_sixteenth_of_the_data(examples, largest):
    trainer = kb.AdaptiveTrainer(regressor(), "fixed", verbose=0)
    trainer.fit(*regression(examples), batch_size=BASE, verbose=0)
    assert trainer.report.settings["max_batch_size"] == largest


@pytest.mark.filterwarnings(OUT_OF_DATA)
def test_the_largest_batch_is_64_of_the_stated_where_the_length_is_unknown():
    trainer = kb.AdaptiveTrainer(regressor(), "fixed", verbose=0)
    trainer.fit(unknown(70), verbose=0)
    assert trainer.report.settings["max_batch_size"] == 64 * BASE


# The budget of measuring.


@pytest.fixture()
def ahead(monkeypatch):
    """Examples whose budget may be spent in advance, at each superbatch."""
    seen = []

    def asked(controller, examples, examples_ahead):
        seen.append(examples_ahead)
        return False

    monkeypatch.setattr(Controller, "wants_measurement", asked)
    return seen


def test_the_budget_of_what_is_left_is_spent_and_of_an_epoch_at_most(ahead):
    trainer = kb.AdaptiveTrainer(
        regressor(), "measure", superbatch_size=SUPERBATCH, verbose=0
    )
    data = regression()  # Superbatches of 32, 32 and 6.

    trainer.fit(*data, batch_size=BASE, epochs=3, verbose=0)

    # An epoch is taken for three whole superbatches until one has ended.
    assert ahead[:3] == [96, 96, 96]
    assert ahead[3:6] == [70, 70, 70]
    assert ahead[6:] == [70, 38, 6]


def test_a_second_fit_has_a_budget_of_its_own(ahead):
    trainer = kb.AdaptiveTrainer(
        regressor(), "measure", superbatch_size=SUPERBATCH, verbose=0
    )
    data = regression(64)

    trainer.fit(*data, batch_size=BASE, epochs=2, verbose=0)
    first = list(ahead)
    trainer.fit(*data, batch_size=BASE, epochs=2, verbose=0)
    assert ahead[len(first) :] == first == [64, 64, 64, 32]


def test_a_budget_is_that_of_the_epochs_left_after_the_initial_one(ahead):
    trainer = kb.AdaptiveTrainer(
        regressor(), "measure", superbatch_size=SUPERBATCH, verbose=0
    )
    trainer.fit(
        *regression(64), batch_size=BASE, epochs=5, initial_epoch=4, verbose=0
    )
    assert ahead == [64, 32]


@pytest.mark.filterwarnings(OUT_OF_DATA)
def test_nothing_is_spent_in_advance_where_no_end_is_known(ahead):
    trainer = kb.AdaptiveTrainer(
        regressor(), "measure", superbatch_size=SUPERBATCH, verbose=0
    )
    trainer.fit(unknown(64), epochs=2, verbose=0)
    assert set(ahead[:2]) == {0}


# What is traced once.


class Counts(keras.layers.Layer):
    """Counts how often it is traced, or run eagerly, in training."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def call(self, x, training=False):
        self.calls += bool(training)
        return x


def counting():
    inputs = keras.Input((comparing.FEATURES,))
    hidden = keras.layers.Dense(4, activation="tanh")(Counts()(inputs))
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    return model


def compiled_anew(model):
    # With the same optimizer, so that nothing else tells.
    model.compile(model.optimizer, "mae")


def frozen(model):
    model.layers[2].trainable = False
    model.compile(model.optimizer, "mse")


def on_a_schedule(model):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)
    model.optimizer.learning_rate = schedule


def eager(model):
    model.run_eagerly = True


def by_trainer(model):
    trainer = kb.AdaptiveTrainer(
        model, "measure", superbatch_size=SUPERBATCH, verbose=0
    )
    return lambda x, y: trainer.fit(
        x, y, batch_size=BASE, shuffle=False, verbose=0
    )


def by_callback(model):
    sizes = kb.DynamicBatchSize("measure", BASE)
    return lambda x, y: model.fit(
        x, y, SUPERBATCH, shuffle=False, callbacks=[sizes], verbose=0
    )


@pytest.mark.parametrize("ready", [by_trainer, by_callback])
def test_a_second_fit_does_not_trace_the_model_anew(ready):
    model = comparing.seeded(counting)
    fit = ready(model)
    fit(*regression())
    calls = model.layers[1].calls

    # Other data, and another number of them.
    fit(*regression(90, seed=1))
    fit(*regression(64, seed=2))

    assert model.layers[1].calls == calls


@pytest.mark.parametrize("ready", [by_trainer, by_callback])
@pytest.mark.parametrize(
    "change", [compiled_anew, frozen, on_a_schedule, eager]
)
def test_a_second_fit_traces_anew_what_has_changed(ready, change):
    x, y = regression(64)
    models = [comparing.seeded(counting) for _ in range(2)]
    fit = ready(models[0])
    fit(x, y)
    models[1].fit(x, y, BASE, shuffle=False, verbose=0)
    for model in models:
        change(model)
        if change is on_a_schedule:
            model.train_function = None  # Or Keras would not notice.

    fit(x, y)
    models[1].fit(x, y, BASE, shuffle=False, verbose=0)

    for one, two in zip(*(model.get_weights() for model in models)):
        # Eagerly, operations are not fused: another rounding.
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)


def graphs_alive():
    """How many graphs there are that hold a whole step."""
    gc.collect()
    return sum(
        type(one).__name__ == "FuncGraph" and one.name == "_one_step"
        for one in gc.get_objects()
    )


def test_no_graph_is_left_by_each_fit():
    fit = by_trainer(comparing.seeded(counting))
    fit(*regression())
    before = graphs_alive()
    assert before > 0  # Or they are called by another name by now.
    for seed in range(3):
        fit(*regression(seed=seed))
    assert graphs_alive() == before


@pytest.mark.parametrize("fits", [0, 1])
def test_a_profile_is_that_of_the_model_as_it_was_compiled(fits):
    x, y = regression(128)
    model = regressor()
    trainer = kb.AdaptiveTrainer(model, policy="fixed", verbose=0)
    trainer.probe(x, y, maximum=8, time_budget=math.inf)
    for _ in range(fits):
        trainer.fit(x, y, batch_size=16, verbose=0)
        assert trainer.plan.micro_batch_size == 8
    model.compile("adam", "mse")
    trainer.fit(x, y, batch_size=16, verbose=0)
    assert trainer.plan.micro_batch_size == 16
    trainer.probe(x, y, maximum=8, time_budget=math.inf)
    trainer.fit(x, y, batch_size=16, verbose=0)
    assert trainer.plan.micro_batch_size == 8


# What the step time is fitted to.


@pytest.mark.parametrize("steps", [None, 3])
def test_validation_is_that_of_keras_where_no_batch_size_is_stated(steps):
    # A mean of batch means, for targets by name: it depends on their size.
    x, y = comparing.regression(50)
    arguments = {"validation_data": (x, {"size": y}), "shuffle": False}
    seen = []
    for trainer in (kb.AdaptiveTrainer, lambda model, policy: model):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((comparing.FEATURES,))
        outputs = {"size": keras.layers.Dense(1)(inputs)}
        model = keras.Model(inputs, outputs)
        model.compile("sgd", {"size": "mse"})
        data = tf.data.Dataset.from_tensor_slices((x, {"size": y})).batch(8)
        seen.append(
            trainer(model, policy="fixed").fit(
                data, validation_steps=steps, verbose=0, **arguments
            )
        )
    ours, theirs = (one.history["val_loss"] for one in seen)
    assert ours == theirs


def test_a_schedule_goes_on_where_the_next_fit_has_another_base_size():
    # Nine steps an epoch at the first base size, though three updates.
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([10], [0.1, 0.01])
    model = dense()
    model.compile(keras.optimizers.SGD(rate), "mse")
    trainer = kb.AdaptiveTrainer(
        model,
        kb.policies.Fixed(32),
        learning_rate_scaling="none",
        max_batch_size=32,
        verbose=0,
    )
    trainer.fit(*regression(), batch_size=8, epochs=2, verbose=0)
    trainer.fit(*regression(), batch_size=16, verbose=0)
    assert model.optimizer.iterations < 10
    for row in trainer.report.rows:
        assert row.learning_rate == pytest.approx(0.01)


def test_a_schedule_goes_on_after_a_fit_that_did_not_begin():
    # Eight updates, a fit that fails, and eight more.
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([10], [0.1, 0.01])
    model = dense()
    model.compile(keras.optimizers.SGD(rate), "mse")
    trainer = kb.AdaptiveTrainer(model, "fixed", superbatch_size=8, verbose=0)
    data = regression(64)

    def fail(logs):
        raise KeyboardInterrupt

    failing = keras.callbacks.LambdaCallback(on_train_begin=fail)
    model.fit(*data, batch_size=8, verbose=0)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(*data, batch_size=8, verbose=0, callbacks=[failing])
    model.fit(*data, batch_size=8, verbose=0)
    trainer.fit(*data, batch_size=8, verbose=0)

    assert trainer.report.rows[0].learning_rate == pytest.approx(0.01)


class PreparesItsInput(keras.Sequential):
    def fit(self, x, *args, **kwargs):
        return super().fit(tf.constant(x), *args, **kwargs)


class OnlyDelegates(keras.Sequential):
    def fit(self, *args, **kwargs):
        return super().fit(*args, **kwargs)


def test_a_fit_of_its_own_is_named_where_it_fails():
    x, y = comparing.regression()

    def fit(kind):
        model = kind([keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        kb.AdaptiveTrainer(model).fit(x, y, verbose=0)

    fit(OnlyDelegates)
    with pytest.raises((TypeError, ValueError)) as caught:
        fit(PreparesItsInput)
    (note,) = caught.value.__notes__
    assert "PreparesItsInput has a `fit` of its own" in note
    assert "DynamicBatchSize" in note


class Ticking:
    """A clock on which a second passes from one look to the next."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


@pytest.fixture()
def ticking(monkeypatch):
    """Puts a `Ticking` in the place of the clock of this process."""
    clock = Ticking()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


class SlowToTrace(keras.layers.Layer):
    """Takes very long, but only in Python."""

    clock = None

    def call(self, x, training=False):
        self.clock.now += 1e6
        return x


def slow_to_trace(clock, monkeypatch):
    monkeypatch.setattr(SlowToTrace, "clock", clock)
    model = keras.Sequential(
        [
            keras.Input((comparing.FEATURES,)),
            SlowToTrace(),
            keras.layers.Dense(1),
        ]
    )
    model.compile("sgd", "mse")
    return model


def test_calls_that_traced_are_left_out_of_the_step_time(ticking, monkeypatch):
    trainer = to_grow(slow_to_trace(ticking, monkeypatch), growing)

    # In the last epoch gradients accumulate, which is traced anew.
    report, _ = trained(trainer)

    jumps = np.diff([0.0, *(row.seconds for row in report.rows)]) > 1e6
    assert jumps.any()
    timings = trainer.get_state()["timings"]
    assert max(max(seconds) for seconds in timings.values()) < 1e3
    # Of three superbatches per epoch; the loop is made at the first.
    counts = {size: len(seconds) for size, seconds in timings.items()}
    assert counts == {"8": 2, "32": 3, "64": 2}


def test_a_first_eager_step_is_left_out_of_the_step_time():
    model = regressor()
    model.run_eagerly = True
    trainer = kb.AdaptiveTrainer(
        model, "fixed", superbatch_size=SUPERBATCH, verbose=0
    )
    trained(trainer, epochs=1)
    timings = trainer.get_state()["timings"]
    assert {size: len(times) for size, times in timings.items()} == {"8": 2}


def test_fit_takes_what_that_of_keras_takes():
    ours = inspect.signature(kb.AdaptiveTrainer.fit).parameters.values()
    theirs = inspect.signature(keras.Model.fit).parameters.values()
    assert [(one.name, one.default) for one in ours] == [
        (one.name, one.default) for one in theirs
    ]


def test_the_line_that_trains_hands_everything_over(monkeypatch):
    parameters = dict(inspect.signature(kb.AdaptiveTrainer).parameters)
    ours = inspect.signature(kb.fit).parameters
    # These are the model, and what `fit_arguments` has of that name.
    for name in ("model", "verbose"):
        del parameters[name]
    made = mock.Mock()
    monkeypatch.setattr(_trainer_fit, "AdaptiveTrainer", made)
    given = {name: object() for name in parameters}
    model, x, y, batch_size, epochs = (object() for _ in range(5))

    result = kb.fit(
        model, x, y, batch_size=batch_size, epochs=epochs, **given
    )

    made.assert_called_once_with(model, **given)
    trainer = made.return_value
    trainer.fit.assert_called_once_with(
        x, y, batch_size=batch_size, epochs=epochs
    )
    assert result is trainer.fit.return_value
    for name, one in parameters.items():
        assert ours[name].default == one.default, name


# What a report is about.


def growing():
    return kb.policies.BatchSizeSchedule(lambda epoch: [8, 32, 64][epoch])


def to_grow(model, policy, **options):
    return kb.AdaptiveTrainer(
        model,
        policy(),
        superbatch_size=SUPERBATCH,
        max_batch_size=2 * SUPERBATCH,
        verbose=0,
        **options,
    )


def trained(trainer, epochs=3, **arguments):
    """Trains; returns the report and how many updates were made."""
    before = int(trainer.model.optimizer.iterations)
    trainer.fit(
        *regression(), batch_size=BASE, epochs=epochs, verbose=0, **arguments
    )
    made = int(trainer.model.optimizer.iterations) - before
    return trainer.report, made


def in_a_new_trainer(trainer, policy):
    other = to_grow(trainer.model, policy)
    other.set_state(trainer.get_state())
    return other


@pytest.mark.parametrize("policy", [kb.policies.Fixed, growing])
@pytest.mark.parametrize(
    "next_of", [lambda trainer, policy: trainer, in_a_new_trainer]
)
def test_a_report_is_about_its_fit(next_of, policy, ticking):
    trainer = to_grow(regressor(), policy)
    trained(trainer)
    reports = []
    for _ in range(2):
        trainer = next_of(trainer, policy)
        reports.append(trained(trainer))

    for report, made in reports:
        assert report.examples == 3 * comparing.EXAMPLES
        assert report.updates == made
        assert report.base_updates == 3 * 9
        assert report.rows[0].examples == SUPERBATCH
        # Changes are where the rows are: at the end of one of them, or before.
        ends = {0, *(row.examples for row in report.rows)}
        assert ends.issuperset(change.examples for change in report.changes)
    (first, _), (second, _) = reports
    # Of equal fits all totals are equal, speeds among them.
    assert str(first) == str(second)
    assert first.base_seconds == second.base_seconds > 0.0


def test_speeds_are_examples_by_seconds(ticking, monkeypatch):
    trainer = to_grow(slow_to_trace(ticking, monkeypatch), growing)
    history = trainer.fit(
        *regression(), batch_size=BASE, epochs=3, verbose=0
    ).history
    report = trainer.report
    rows = report.rows

    ends = np.array([(row.examples, row.seconds) for row in rows])
    examples, seconds = np.diff([(0, 0), *ends], axis=0).T
    # In the last epoch gradients accumulate, which is traced anew.
    assert max(seconds) > 1e6 > seconds[0]
    np.testing.assert_allclose(
        [row.examples_per_second for row in rows], examples / seconds
    )
    epochs = [[row.epoch == epoch for row in rows] for epoch in range(3)]
    np.testing.assert_allclose(
        history["examples_per_second"],
        [examples[one].sum() / seconds[one].sum() for one in epochs],
    )
    # What 27 updates of eight take, and what the first superbatch took longer.
    first, second = sorted(trainer.get_state()["timings"]["8"])
    tracing = seconds[0] - first * examples[0] / BASE
    assert 0.0 < first <= second and tracing > 0.0
    assert report.base_seconds == pytest.approx(27 * first + tracing)


@pytest.mark.parametrize("policy", [kb.policies.Measure, kb.policies.Fixed])
def test_measuring_ends_with_a_size_that_is_recommended(policy, monkeypatch):
    known = NoiseScaleEstimate(
        100.0, 1.0, 98.0, 102.0, True, squared_norm=1.0, trace=100.0
    )
    monkeypatch.setattr(Controller, "noise_scale", property(lambda _: known))
    report, _ = trained(to_grow(regressor(), policy))

    measures = policy is kb.policies.Measure
    # The next to it on the ladder 8, 16, 32, ...: one size alone was timed.
    assert report.settings.get("recommended_batch_size") == (
        128 if measures else None
    )
    assert ("Recommended size" in str(report)) == measures


@pytest.mark.filterwarnings(OUT_OF_DATA)
def test_the_update_that_an_epoch_cuts_short_is_in_the_report():
    trainer = to_grow(regressor(), lambda: kb.policies.Fixed(2 * SUPERBATCH))
    trainer.fit(unknown(70), epochs=2, verbose=0)
    # 70 examples in updates of 64, and one of the rest.
    assert trainer.report.updates == trainer.model.optimizer.iterations == 4


def test_a_rule_that_looks_at_noise_keeps_its_account_from_fit_to_fit():
    def rule(ratio, noise_scale):
        return ratio

    trainer = kb.AdaptiveTrainer(
        regressor(), "fixed", rule, superbatch_size=BASE, verbose=0
    )
    taken = []
    for _ in range(3):
        trained(trainer)
        taken.append(trainer.get_state()["measuring"]["_superbatches"])
    assert taken == [27, 54, 81]


def test_of_what_traces_a_fixed_batch_pays_for_its_own():
    def traced(seconds, measuring=0.0):
        return Measurement(
            64, 2, seconds=seconds, measuring_seconds=measuring, traced=True
        )

    tally = Tally()
    tally.add(traced(5.0, measuring=2.0))
    tally.add(traced(4.0, measuring=3.5))
    assert tally.seconds == 9.0
    assert (tally.tracing_seconds, tally.traced_examples) == (3.0, 64)
    untraced = Tally()
    untraced.add(Measurement(64, 2, seconds=1.0))
    untraced.add(traced(4.0))
    assert (untraced.tracing_seconds, untraced.traced_examples) == (0.0, 0)


def test_the_share_of_measuring_is_that_of_its_fit():
    controller = Controller(
        kb.policies.Measure(), Ladder(BASE, BASE, BASE), SUPERBATCH
    )

    def measured(count, cost):
        for _ in range(count):
            controller.measuring.book(0, 1.0, cost, SUPERBATCH)

    def share_of(tally):
        return settings_of(
            types.SimpleNamespace(
                controller=controller, tally=tally, rule=scaling.none
            )
        )["measuring_share"]

    # An earlier fit: the first six are not charged.
    measured(10, cost=0.5)
    tally = Tally()
    tally.begin(controller, 0)
    assert share_of(tally) == 0.0
    measured(1, cost=0.25)
    measured(4, cost=None)
    assert share_of(tally) == 0.25 / 5

    state = json.loads(json.dumps(tally.get_state()))
    resumed = Tally()
    resumed.set_state(state)
    assert share_of(resumed) == 0.25 / 5


class Interrupt(keras.callbacks.Callback):
    """Ends training after its second epoch, as Ctrl-C does."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


def test_the_report_of_a_resumed_fit_is_about_the_whole(tmp_path, ticking):
    expected, made = trained(to_grow(regressor(), growing))

    model = regressor()
    trainer = to_grow(model, growing)
    trained(trainer)  # An earlier fit, which no report after it tells of.
    trainer.backup_dir = tmp_path / "backup"
    with pytest.raises(KeyboardInterrupt):
        trained(trainer, callbacks=[Interrupt()])
    # In a new process nobody knows of the earlier fit.
    resumed = to_grow(model, growing, backup_dir=tmp_path / "backup")
    report, made_since = trained(resumed)

    assert made_since < made
    assert [row.epoch for row in report.rows] == [2, 2, 2]
    for name in ("examples", "updates", "seconds", "base_updates"):
        assert getattr(report, name) == getattr(expected, name), name
    assert "210 in 3 epochs" in str(report)
