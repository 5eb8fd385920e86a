"""Every built-in callback of Keras behaves as it does under plain `fit`.

One test over all of them: the same callback is given to plain `fit` and to a
trainer that holds the batch size. What it did, the weights and the `History`
are the same; our numbers may be added. A callback that counts the steps of
Keras counts superbatches here, see `PER_STEP`.
"""

import csv
import inspect
import json
import math
import random
import types

import comparing
import keras
import numpy as np
import pytest
import requests
from comparing import BASE
from comparing import SUPERBATCH
from comparing import dense
from comparing import regression
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)

import keras_batchsize as kb
from keras_batchsize.noise import UNKNOWN
from keras_batchsize.plan import Ladder

X, Y = regression()
VALIDATION = regression(30, seed=1)
OURS = {"batch_size", "noise_scale", "examples_per_second"}
EPOCHS = 4


def regressor(rate=0.01, **options):
    model = dense()
    model.compile(keras.optimizers.SGD(rate, momentum=0.9, **options), "mse")
    return model


def overfitting():
    """Its validation loss rises after the first epochs."""
    return regressor(rate=0.1)


def averaging():
    return regressor(use_ema=True, ema_momentum=0.8)


def diverging():
    """Its loss is not finite in the first epoch."""
    return regressor(rate=1e30)


def without_ours(logs):
    """The logs, rounded to what a file can hold."""
    return {
        name: round(float(value), 6)
        for name, value in logs.items()
        if name not in OURS
    }


class Case:
    """A callback and what it does.

    A subclass for each built-in callback, named after it.

    Args:
        folder: An empty folder.
        monkeypatch: The fixture of pytest.
    """

    make_model = staticmethod(regressor)

    def __init__(self, folder, monkeypatch):
        self.folder = folder

    def callback(self, model):
        """Returns the callback to be tested."""
        return getattr(keras.callbacks, type(self).__name__)()

    def train(self, fit, model):
        """Calls `fit`, which takes a list of callbacks."""
        self.used = self.callback(model)
        return fit([self.used])

    def effect(self, model, history):
        """Returns what the callback did, to be compared by ==."""
        return None


class Callback(Case):
    pass


class History(Case):
    def effect(self, model, history):
        assert history is self.used
        assert model.history is self.used
        return self.used.epoch


class CallbackList(Case):
    def callback(self, model):
        self.seen = []
        inner = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: self.seen.append(
                (epoch, without_ours(logs))
            )
        )
        return keras.callbacks.CallbackList(
            [inner], add_history=True, model=model, epochs=EPOCHS
        )

    def train(self, fit, model):
        self.used = self.callback(model)
        return fit(self.used)

    def effect(self, model, history):
        return self.seen


class LambdaCallback(Case):
    def callback(self, model):
        self.seen = []

        def record(hook):
            def called(*arguments):
                logs = arguments[-1] or {}
                self.seen.append((hook, arguments[:-1], without_ours(logs)))

            return called

        hooks = (
            "on_epoch_begin",
            "on_epoch_end",
            "on_train_begin",
            "on_train_end",
        )
        return keras.callbacks.LambdaCallback(
            **{hook: record(hook) for hook in hooks}
        )

    def effect(self, model, history):
        assert len(self.seen) == 2 * EPOCHS + 2
        return self.seen


class CSVLogger(Case):
    def callback(self, model):
        return keras.callbacks.CSVLogger(self.folder / "log.csv")

    def effect(self, model, history):
        with open(self.folder / "log.csv", encoding="utf-8") as file:
            return [without_ours(row) for row in csv.DictReader(file)]


class EarlyStopping(Case):
    make_model = staticmethod(overfitting)

    def callback(self, model):
        return keras.callbacks.EarlyStopping(
            patience=1, restore_best_weights=True
        )

    def effect(self, model, history):
        assert len(history.epoch) < EPOCHS
        return self.used.stopped_epoch, self.used.best_epoch, self.used.best


class ModelCheckpoint(Case):
    def callback(self, model):
        return keras.callbacks.ModelCheckpoint(
            self.folder / "{epoch:02d}-{val_loss:.5f}.keras"
        )

    def effect(self, model, history):
        saved = sorted(self.folder.iterdir())
        assert len(saved) == EPOCHS
        return [
            (
                path.name,
                [one.tolist() for one in self.load(path).get_weights()],
                int(self.load(path).optimizer.iterations),
            )
            for path in saved
        ]

    def load(self, path):
        return keras.models.load_model(path)


class LearningRateScheduler(Case):
    def callback(self, model):
        return keras.callbacks.LearningRateScheduler(
            lambda epoch, rate: rate * 0.5
        )

    def effect(self, model, history):
        rate = float(model.optimizer.learning_rate)
        assert rate == pytest.approx(0.01 * 0.5**EPOCHS, rel=1e-6)
        assert len(set(history.history["learning_rate"])) == EPOCHS
        return rate


class ReduceLROnPlateau(Case):
    def callback(self, model):
        return keras.callbacks.ReduceLROnPlateau(
            patience=1, factor=0.1, min_delta=100.0
        )

    def effect(self, model, history):
        rate = float(model.optimizer.learning_rate)
        assert rate < 0.002
        return rate, history.history["learning_rate"]


class TerminateOnNaN(Case):
    make_model = staticmethod(diverging)

    def effect(self, model, history):
        assert model.stop_training
        return len(history.epoch)


class BackupAndRestore(Case):
    def callback(self, model):
        return keras.callbacks.BackupAndRestore(self.folder / "backup")

    def train(self, fit, model):
        def interrupt(epoch, logs):
            if epoch == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(
                [
                    self.callback(model),
                    keras.callbacks.LambdaCallback(on_epoch_begin=interrupt),
                ]
            )
        self.iterations = int(model.optimizer.iterations)
        return fit([self.callback(model)])

    def effect(self, model, history):
        assert history.epoch == [2, 3]
        assert not (self.folder / "backup").exists()
        return self.iterations, int(model.optimizer.iterations)


class SwapEMAWeights(Case):
    make_model = staticmethod(averaging)

    def callback(self, model):
        return keras.callbacks.SwapEMAWeights(swap_on_epoch=True)


class TensorBoard(Case):
    def callback(self, model):
        return keras.callbacks.TensorBoard(self.folder, histogram_freq=1)

    def effect(self, model, history):
        return {run: self.read(run) for run in ("train", "validation")}

    def read(self, run):
        events = EventAccumulator(str(self.folder / run))
        events.Reload()
        has_graph = events.Tags()["graph"]
        tags = events.Tags()["tensors"]
        ours = {f"epoch_{name}" for name in OURS}
        assert run == "validation" or ours & set(tags) in (ours, set())
        return has_graph, {
            tag: [(one.step, scalar(one)) for one in events.Tensors(tag)]
            for tag in tags
            if tag not in ours
        }


def scalar(event):
    return event.tensor_proto.float_val[:] or event.tensor_proto.tensor_content


class RemoteMonitor(Case):
    def __init__(self, folder, monkeypatch):
        self.sent = []
        monkeypatch.setattr(
            requests,
            "post",
            lambda url, data, headers: self.sent.append((url, data)),
        )

    def effect(self, model, history):
        assert len(self.sent) == EPOCHS
        return [
            (url, without_ours(json.loads(data["data"])))
            for url, data in self.sent
        ]


class ProgbarLogger(Case):
    """The user's own bar counts the steps of Keras, as is its nature."""

    def effect(self, model, history):
        assert self.used.target == self.used.seen
        return self.used.epochs


class OrbaxCheckpoint(Case):
    def callback(self, model):
        return keras.callbacks.OrbaxCheckpoint(
            self.folder / "orbax", save_freq="epoch", max_to_keep=None
        )

    def effect(self, model, history):
        self.used.wait_until_finished()
        steps = sorted(
            path.name for path in (self.folder / "orbax").iterdir()
        )
        assert len(steps) == EPOCHS
        return len(steps)


CASES = {case.__name__: case for case in Case.__subclasses__()}

# What these do within an epoch follows the steps of Keras, here superbatches:
# `TerminateOnNaN` looks at the loss after each of them.
PER_STEP = {"TerminateOnNaN"}


def test_every_callback_of_keras_is_tested_here():
    built_in = {
        name
        for name, one in inspect.getmembers(keras.callbacks, inspect.isclass)
        if issubclass(
            one, (keras.callbacks.Callback, keras.callbacks.CallbackList)
        )
    }

    assert built_in <= set(CASES), "Keras has a new callback: add it here."


def by_plain_fit(model):
    def fit(callbacks):
        return train(model.fit, callbacks)

    return fit


def by_trainer(model):
    def fit(callbacks):
        trainer = kb.AdaptiveTrainer(
            model, "fixed", superbatch_size=SUPERBATCH, verbose=0
        )
        return train(trainer.fit, callbacks)

    return fit


def train(fit, callbacks):
    keras.utils.set_random_seed(1)
    return fit(
        X,
        Y,
        batch_size=BASE,
        epochs=EPOCHS,
        validation_data=VALIDATION,
        callbacks=callbacks,
        verbose=0,
    )


@pytest.mark.parametrize("name", CASES)
# Diverging is what `TerminateOnNaN` is for; our warning has its own test.
@pytest.mark.filterwarnings("ignore:The loss became:RuntimeWarning")
def test_behaves_as_under_plain_fit(name, tmp_path, monkeypatch):
    results = []
    for way in (by_plain_fit, by_trainer):
        folder = tmp_path / way.__name__
        folder.mkdir()
        case = CASES[name](folder, monkeypatch)
        model = comparing.seeded(case.make_model)
        history = case.train(way(model), model)
        results.append((model, history, case.effect(model, history)))

    (model, history, effect), (twin, ours, our_effect) = results
    assert our_effect == effect
    assert ours.epoch == history.epoch
    assert set(ours.history) - OURS == set(history.history)
    if name not in PER_STEP:
        assert_same_training(model, history, twin, ours)


def assert_same_training(model, history, twin, ours):
    expected = comparing.variables_of(model)
    for one, two in zip(
        expected.values(), comparing.variables_of(twin).values(), strict=True
    ):
        np.testing.assert_array_equal(one, two)
    for key, values in history.history.items():
        np.testing.assert_array_equal(ours.history[key], values)


# What differs where a callback looks within an epoch.


def test_hooks_of_batches_are_called_for_superbatches():
    seen = []
    record = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append((batch, logs))
    )

    by_trainer(comparing.seeded(regressor))([record])

    steps = math.ceil(len(X) / SUPERBATCH)
    assert [batch for batch, _ in seen] == list(range(steps)) * EPOCHS
    assert all(set(logs) == {"loss"} for _, logs in seen)


def test_a_checkpoint_by_steps_counts_superbatches(tmp_path):
    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / "{epoch:02d}-{batch:02d}.keras", save_freq=2
    )

    by_trainer(comparing.seeded(regressor))([checkpoint])

    assert len(list(tmp_path.iterdir())) == EPOCHS * 3 // 2


def test_a_rate_set_by_a_callback_is_the_base_rate():
    # At 32 examples instead of 8 the rate in force is four times that rate.
    rates = []
    record = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: rates.append(
            (float(model.optimizer.learning_rate), logs["learning_rate"])
        )
    )
    model = comparing.seeded(regressor)
    trainer = kb.AdaptiveTrainer(
        model,
        kb.policies.BatchSizeSchedule({1: 32}),
        learning_rate_scaling="linear",
        superbatch_size=SUPERBATCH,
        max_batch_size=SUPERBATCH,
        verbose=0,
    )
    halve = keras.callbacks.LearningRateScheduler(lambda _, rate: rate / 2)
    trainer.fit(X, Y, BASE, epochs=3, callbacks=[halve, record], verbose=0)

    base = [0.005, 0.0025, 0.00125]
    np.testing.assert_allclose(rates, np.transpose([base, base]), rtol=1e-6)
    in_force = {row.epoch: row.learning_rate for row in trainer.report.rows}
    expected = [0.005, 4 * 0.0025, 4 * 0.00125]
    np.testing.assert_allclose(list(in_force.values()), expected, rtol=1e-6)


def test_growing_on_a_plateau_waits_as_reducing_the_rate_does():
    ours = inspect.signature(kb.policies.GrowOnPlateau).parameters
    theirs = inspect.signature(keras.callbacks.ReduceLROnPlateau).parameters
    shared = ("monitor", "patience", "min_delta", "cooldown", "mode")
    assert {*ours} == {*shared, "factor"}
    for name in shared:
        assert ours[name].default == theirs[name].default, name


# The twin of one of them.


def metric_of(dice, epochs):
    """A metric that falls, stalls and rises, with a NaN now and then.

    Sums of powers of two, which Keras and we round alike: not at all. No NaN
    comes first: for Keras it would stay the best value for ever.
    """
    value, values = 2.0, []
    for epoch in range(epochs):
        value += dice.choice([0.0, 0.0, 0.0, -0.375, -0.0625, 0.25])
        is_lost = epoch > 0 and dice.random() < 0.03
        values.append(math.nan if is_lost else value)
    return values


@pytest.mark.parametrize("patience", [0, 1, 2, 5])
@pytest.mark.parametrize("cooldown", [0, 1, 4])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_batch_grows_exactly_when_keras_would_reduce_the_rate(
    patience, cooldown, mode
):
    ladder = Ladder(32, 32, 32 * 2**5)
    changes = 0
    for seed in range(10):
        dice = random.Random(seed)
        min_delta = dice.choice([0.0, 0.125])
        waiting = ("metric", patience, min_delta, cooldown, mode)
        names = ("monitor", "patience", "min_delta", "cooldown", "mode")
        waiting = dict(zip(names, waiting, strict=True))
        reducing = keras.callbacks.ReduceLROnPlateau(
            factor=0.5, min_lr=0.5**5, **waiting
        )
        optimizer = types.SimpleNamespace(learning_rate=1.0)
        reducing.set_model(types.SimpleNamespace(optimizer=optimizer))
        reducing.on_train_begin()
        growing = kb.policies.GrowOnPlateau(factor=2, **waiting)
        size = 32
        for epoch, value in enumerate(metric_of(dice, 60)):
            reducing.on_epoch_end(epoch, {"metric": value})
            status = kb.policies.Status(size, 32, *ladder.neighbours(size))
            growing.on_epoch_end(status, {"metric": value})
            before, size = size, kb.policies.next_batch_size(
                growing, status, UNKNOWN, ladder
            )
            assert size == 32 / optimizer.learning_rate
            changes += size != before
    assert changes > 0
