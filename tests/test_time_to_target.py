"""`TimeToTarget`: the clock, and the order of what it reports."""

import copy
import json
import math
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_batchsize as kb
from keras_batchsize import _callbacks_time_to_target
from keras_batchsize import records
from keras_batchsize._callbacks_time_to_target import TrainingClock
from keras_batchsize._train_function_tally import Tally

RNG = np.random.default_rng(0)
X = RNG.normal(size=(256, 4)).astype("float32")
Y = X @ np.array([[1.0], [-2.0], [0.5], [0.0]], "float32")
# Seconds that no training takes. Until a second step is booked the first one
# counts with its tracing.
LONG = 1e6


def regressor():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return model


class Told(keras.callbacks.Callback):
    """Tells the logs of each epoch, as a metric would."""

    def __init__(self, **values):
        super().__init__()
        self.values = values

    def on_epoch_end(self, epoch, logs=None):
        logs.update({name: one[epoch] for name, one in self.values.items()})


class Continues(keras.callbacks.Callback):
    """Lets training go on at the end of an epoch, whoever would stop it."""

    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = False

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = False


def train(callback, epochs, values, **arguments):
    """Trains by plain `fit` with given values of `val_accuracy`."""
    return (
        regressor()
        .fit(
            X,
            Y,
            epochs=epochs,
            verbose=0,
            callbacks=[Told(val_accuracy=values), callback],
            **arguments,
        )
        .history
    )


# The clock.


class FakeTime:
    """A second more at each look."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1.0
        return self.now


def test_clock_counts_training_steps_only(monkeypatch):
    # Each look at this clock takes a second: one look at the beginning of an
    # epoch, one at the end of each step. Validation is not looked at.
    monkeypatch.setattr(_callbacks_time_to_target, "time", FakeTime())
    callback = kb.TimeToTarget("val_accuracy", 0.9, budget=100)

    history = train(
        callback, 3, [0.1, 0.2, 0.95], batch_size=64, validation_split=0.25
    )

    # 192 examples are 3 steps an epoch. The traced one counts like the others.
    assert history["training_seconds"] == [3.0, 6.0, 9.0]
    assert history["tracing_seconds"] == [0.0, 0.0, 0.0]
    assert history["time_to_target"][-1] == 9.0


def test_tracing_is_no_training():
    clock = TrainingClock()
    clock.book(seconds=5.0, examples=64, traced=True)
    assert clock.seconds == 5.0  # Nothing to compare with.
    clock.book(seconds=1.0, examples=32, traced=False)
    clock.book(seconds=3.0, examples=96, traced=False)
    # 128 examples in 4 s, so the 64 of the traced step would take 2 s.
    assert clock.seconds == pytest.approx(6.0)
    assert clock.tracing_seconds == pytest.approx(3.0)
    assert clock.examples == 192


def test_seconds_are_never_more_than_have_passed():
    clock = TrainingClock()
    clock.book(seconds=1.0, examples=64, traced=True)
    clock.book(seconds=4.0, examples=64, traced=False)
    assert clock.seconds == pytest.approx(5.0)
    assert clock.tracing_seconds == pytest.approx(0.0)


# What it reports.


def test_what_is_not_reached_is_finite_and_ordered_by_closeness():
    reports = {}
    for best in (-1e300, 0.1, 0.5, 0.8, 0.89, 0.95):
        callback = kb.TimeToTarget("val_accuracy", 0.9, budget=LONG)
        reports[best] = train(callback, 1, [best])["time_to_target"][0]

    values = list(reports.values())
    assert all(math.isfinite(one) for one in values)
    assert values == sorted(values, reverse=True)
    assert LONG < values[-2] < values[0] <= 2.0 * LONG  # Not reached.
    assert values[-1] < LONG  # Reached.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_counts_as_twice_the_budget(value):
    callback = kb.TimeToTarget("val_loss", -0.5, budget=LONG)
    logs = {"val_loss": value}
    callback.set_model(regressor())
    callback.set_params({"epochs": 1})
    callback.on_train_begin()
    callback.on_epoch_end(0, logs)
    if value == -math.inf:
        assert callback.reached
    else:
        assert logs["time_to_target"] == 2.0 * LONG


def test_the_best_value_so_far_counts():
    callback = kb.TimeToTarget("val_accuracy", 0.9, budget=LONG)
    history = train(callback, 3, [0.5, 0.8, 0.3])["time_to_target"]
    assert history[2] == history[1] < history[0]


def test_training_stops_at_the_target():
    callback = kb.TimeToTarget("val_accuracy", 0.9, budget=LONG)
    history = train(callback, 5, [0.1, 0.91, 0.1, 0.1, 0.1])
    assert len(history["time_to_target"]) == 2
    assert callback.reached
    assert history["time_to_target"][-1] == history["training_seconds"][-1]


def test_training_stops_within_an_epoch_when_the_budget_is_spent(monkeypatch):
    monkeypatch.setattr(_callbacks_time_to_target, "time", FakeTime())
    callback = kb.TimeToTarget("val_accuracy", 0.9, budget=10)

    history = train(callback, 5, [0.1, 0.95, 0.1, 0.1, 0.1], batch_size=32)

    # 8 steps in the first epoch, and 3 in the second until it is over 10 s:
    # the target, reached too late, counts as the budget.
    assert history["training_seconds"] == [8.0, 11.0]
    assert history["time_to_target"][-1] == 10.0
    assert not callback.reached


def test_smaller_is_better_for_a_loss():
    callback = kb.TimeToTarget("loss", 1e-3, budget=LONG)
    model = regressor()
    history = model.fit(
        X, Y, epochs=60, verbose=0, callbacks=[callback]
    ).history
    assert callback.reached
    assert history["loss"][-1] <= 1e-3 < history["loss"][-2]
    assert history["time_to_target"] == sorted(
        history["time_to_target"], reverse=True
    )


def test_examples_are_those_of_the_trainer():
    callback = kb.TimeToTarget("val_accuracy", 0.9, budget=LONG)
    told = Told(val_accuracy=[0.1, 0.2, 0.95, 0.1])
    history = kb.fit(
        regressor(),
        X,
        Y,
        batch_size=8,
        policy="fixed",
        epochs=4,
        verbose=0,
        callbacks=[told, callback],
    ).history
    assert history["examples_seen"] == [256.0, 512.0, 768.0]
    assert history["examples_to_target"][-1] == 768.0
    # Not reached: over the four epochs that were planned.
    assert 4 * 256 < history["examples_to_target"][0] < 8 * 256


def test_workers_stop_by_the_time_that_they_agree_on(monkeypatch):
    # One worker that stopped alone would leave the others waiting.
    monkeypatch.setattr(_callbacks_time_to_target, "time", FakeTime())
    monkeypatch.setattr(
        _callbacks_time_to_target.replicas, "count", lambda model: 2
    )
    callback = kb.TimeToTarget("loss", 0.0, budget=100)
    callback.set_model(regressor())
    last = records.Measurement(64, 8, seconds=0.25)
    function = types.SimpleNamespace(
        controller=types.SimpleNamespace(last=last),
        tally=Tally(),
        on_superbatch=records.Listeners(),
    )
    monkeypatch.setattr(
        _callbacks_time_to_target, "train_function_of", lambda model: function
    )
    callback.on_train_begin()
    for epoch in range(2):
        callback.on_epoch_begin(epoch)
        callback.on_train_batch_begin(0)
        function.on_superbatch("a row")
        callback.on_train_batch_end(0)
    assert callback.get_state()["clock"]["steady"] == [0.5, 128]


@pytest.mark.parametrize("first", [True, False])
def test_the_first_epoch_counts_where_a_rate_is_scaled_statically(
    first, monkeypatch
):
    # Its train function is there when all callbacks have begun the epoch.
    monkeypatch.setattr(_callbacks_time_to_target, "time", FakeTime())
    callback = kb.TimeToTarget("val_accuracy", 0.9, budget=100)
    ours = [callback, kb.LearningRateScaling("linear", 8, 64)]

    history = regressor().fit(
        X,
        Y,
        batch_size=64,
        epochs=2,
        verbose=0,
        callbacks=[Told(val_accuracy=[0.95]), *ours[:: 1 if first else -1]],
    ).history

    assert history["examples_to_target"] == [256.0]
    assert history["time_to_target"] == history["training_seconds"] == [4.0]


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
@pytest.mark.parametrize("budget", [3, 100])
def test_the_examples_of_an_epoch_that_was_left_are_not_told(
    budget, monkeypatch
):
    monkeypatch.setattr(_callbacks_time_to_target, "time", FakeTime())
    endless = tf.data.Dataset.from_tensor_slices((X, Y)).filter(
        lambda x, y: True
    )
    history = kb.fit(
        regressor(),
        endless.batch(8),
        policy="fixed",
        superbatch_size=32,
        epochs=3,
        verbose=0,
        callbacks=[kb.TimeToTarget("loss", -1.0, budget=budget)],
    ).history
    if budget == 3:
        # In the middle of the first: nobody knows how long it would be.
        assert history["examples_seen"] == [4 * 32]
        assert "examples_to_target" not in history
    else:
        over = history["time_to_target"][-1] / budget
        assert history["examples_to_target"][-1] == 3 * 256 * over


def test_budget_of_examples_ends_training():
    callback = kb.TimeToTarget("loss", 0.0, budget=LONG, budget_examples=512)
    history = kb.fit(
        regressor(),
        X,
        Y,
        batch_size=8,
        policy="fixed",
        epochs=9,
        verbose=0,
        callbacks=[callback],
    ).history
    assert 2 <= len(history["loss"]) <= 3
    assert 512 < history["examples_to_target"][-1] < 1024


@pytest.mark.filterwarnings("ignore:`steps_per_execution` is superseded")
def test_every_superbatch_counts_where_keras_calls_back_for_several():
    callback = kb.TimeToTarget("loss", 0.0, budget=LONG)
    model = regressor()
    model.compile(model.optimizer, "mse", steps_per_execution=4)
    trainer = kb.AdaptiveTrainer(
        model, "fixed", superbatch_size=32, verbose=0
    )
    history = trainer.fit(
        X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[callback]
    ).history
    assert history["examples_seen"] == [256.0, 512.0]
    clock = callback.get_state()["clock"]
    # What was traced is one superbatch of the first four.
    assert clock["traced"][1] == 32
    assert clock["steady"][1] == 512 - 32
    # Both clocks run from one superbatch to the next.
    seconds = clock["traced"][0] + clock["steady"][0]
    assert seconds >= trainer.report.seconds


def test_plain_fit_counts_no_examples():
    callback = kb.TimeToTarget("loss", 0.0, budget=LONG)
    history = train(callback, 1, [0.0])
    assert "examples_to_target" not in history
    assert "examples_seen" not in history


def test_a_budget_of_examples_is_refused_where_they_are_not_counted():
    callback = kb.TimeToTarget("loss", 0.0, budget=LONG, budget_examples=512)
    with pytest.raises(ValueError, match="Received: budget_examples=512"):
        train(callback, 1, [0.0])
    # The batch size is decided by a callback, wherever that stands.
    history = regressor().fit(
        X,
        Y,
        batch_size=64,
        epochs=9,
        verbose=0,
        callbacks=[callback, kb.DynamicBatchSize("fixed")],
    ).history
    assert history["examples_seen"][-1] == 512 + 64


# State.


def test_clock_and_arrival_go_on_from_a_state(monkeypatch):
    monkeypatch.setattr(_callbacks_time_to_target, "time", FakeTime())
    whole = kb.TimeToTarget("val_accuracy", 0.9, budget=100)
    expected = train(whole, 4, [0.5, 0.3, 0.95, 0.9], batch_size=64)

    first = kb.TimeToTarget("val_accuracy", 0.9, budget=100)
    train(first, 2, [0.5, 0.3], batch_size=64)
    second = kb.TimeToTarget("val_accuracy", 0.9, budget=100)
    second.set_state(json.loads(json.dumps(first.get_state())))
    history = train(second, 2, [0.95, 0.9], batch_size=64)

    assert history["time_to_target"][-1] == expected["time_to_target"][-1]
    assert history["training_seconds"][-1] == expected["training_seconds"][-1]


def test_who_has_arrived_trains_no_more_and_reports_the_same():
    first = kb.TimeToTarget("val_accuracy", 0.9, budget=LONG)
    reported = train(first, 2, [0.5, 0.95])["time_to_target"][-1]
    second = kb.TimeToTarget("val_accuracy", 0.9, budget=LONG)
    second.set_state(first.get_state())
    model = regressor()
    history = model.fit(
        X,
        Y,
        batch_size=8,
        epochs=5,
        verbose=0,
        callbacks=[Told(val_accuracy=[0.2] * 5), second],
    )
    assert history.history["time_to_target"] == [reported]
    assert int(model.optimizer.iterations) == 1


def by_trainer(callbacks, folder):
    return kb.fit(
        regressor(),
        X,
        Y,
        batch_size=8,
        policy="fixed",
        epochs=4,
        verbose=0,
        callbacks=callbacks,
        backup_dir=folder,
    )


def by_callbacks(callbacks, folder):
    # Its train function is made after all of them have begun.
    scaling = kb.LearningRateScaling("linear", 8, 64)
    backup = kb.BackupAndRestore(folder)
    return regressor().fit(
        X,
        Y,
        batch_size=64,
        epochs=4,
        verbose=0,
        callbacks=[*callbacks, backup, scaling],
    )


@pytest.mark.parametrize("fit", [by_trainer, by_callbacks])
def test_the_clock_of_a_training_that_is_resumed_goes_on(
    fit, tmp_path, monkeypatch
):
    monkeypatch.setattr(_callbacks_time_to_target, "time", FakeTime())

    def interrupt(epoch, logs):
        if epoch == 2:
            raise KeyboardInterrupt

    def run(*others):
        told = Told(val_accuracy=[0.5, 0.8, 0.3, 0.2])
        callback = kb.TimeToTarget("val_accuracy", 0.9, budget=100)
        return fit([told, callback, *others], tmp_path / "backup").history

    expected = run()
    with pytest.raises(KeyboardInterrupt):
        run(keras.callbacks.LambdaCallback(on_epoch_begin=interrupt))
    resumed = run()

    for name in (
        "training_seconds",
        "time_to_target",
        "examples_seen",
        "examples_to_target",
    ):
        assert resumed[name] == expected[name][2:], name


@pytest.mark.parametrize("fit", [by_trainer, by_callbacks])
def test_two_that_differ_in_their_budgets_alone_resume_as_themselves(
    fit, tmp_path
):
    def interrupt(epoch, logs):
        if epoch == 2:
            raise KeyboardInterrupt

    # The target is reached in the second epoch, over the second one's budget.
    budgets = None, 256
    for others in [
        [keras.callbacks.LambdaCallback(on_epoch_begin=interrupt)],
        [],
    ]:
        two = [
            kb.TimeToTarget("val_accuracy", 0.9, LONG, budget_examples=one)
            for one in budgets
        ]
        told = Told(val_accuracy=[0.5, 0.95, 0.3, 0.2])
        # Who has arrived, or may not go on, would end the training before.
        goes_on = Continues()
        if others:
            with pytest.raises(KeyboardInterrupt):
                fit([told, *two, goes_on, *others], tmp_path / "backup")
        else:
            fit([told, *two, goes_on], tmp_path / "backup")
        assert [one.reached for one in two] == [True, False]


def test_copies_start_anew():
    callback = kb.TimeToTarget("val_accuracy", 0.9, budget=LONG)
    copy.deepcopy(callback)
    train(callback, 1, [0.95])
    twin = copy.deepcopy(callback)
    history = train(twin, 1, [0.2])
    assert not twin.reached
    assert history["time_to_target"][0] > LONG


# Errors.


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (("val_loss", "low", 10), TypeError, "Received: target='low'"),
        (("val_loss", 0.1, 0), ValueError, "Received: budget=0"),
        (("val_f1", 0.9, 10), ValueError, "monitor='val_f1'"),
        (("val_loss", 0.1, 10, "up"), ValueError, "Received: mode='up'"),
        (
            ("val_loss", 0.1, 10, "auto", 0),
            ValueError,
            "Received: budget_examples=0",
        ),
    ],
)
def test_errors_name_argument_and_remedy(arguments, kind, text):
    with pytest.raises(kind, match="Use ") as caught:
        kb.TimeToTarget(*arguments)
    assert text in str(caught.value)


def test_unknown_monitor_is_told_with_those_there_are():
    callback = kb.TimeToTarget("accuracy", 0.9, budget=LONG)
    with pytest.raises(ValueError, match=r"have \['loss', 'val_accuracy'\]"):
        train(callback, 1, [0.5])


def test_a_monitor_that_never_was_there_is_warned_of():
    callback = kb.TimeToTarget("val_accuracy", 0.9, budget=LONG)
    with pytest.warns(UserWarning, match="`val_accuracy` .* are: loss. Pass"):
        regressor().fit(X, Y, verbose=0, callbacks=[callback])


def test_a_monitor_that_was_there_before_is_not_warned_of():
    first = kb.TimeToTarget("val_accuracy", 0.9, budget=LONG)
    train(first, 1, [0.5])
    second = kb.TimeToTarget("val_accuracy", 0.9, budget=LONG)
    second.set_state(first.get_state())
    # No epoch that is left has a validation; warnings are errors.
    regressor().fit(X, Y, verbose=0, callbacks=[second])


def test_validation_may_be_left_out_of_an_epoch():
    callback = kb.TimeToTarget("val_loss", 1e-9, budget=LONG)
    history = regressor().fit(
        X,
        Y,
        epochs=2,
        verbose=0,
        validation_split=0.2,
        validation_freq=2,
        callbacks=[callback],
    )
    reports = history.history["time_to_target"]
    assert reports[0] == 2.0 * LONG > reports[1]
