"""The callbacks alone, on a plain `model.fit`, and what they show the user.

Law 5 of docs/design.md is here, too: interrupted and resumed = uninterrupted.
"""

import functools
import json
import math
import re

import comparing
import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from comparing import BASE
from comparing import SUPERBATCH
from comparing import dense
from comparing import regression
from comparing import variables_of

import keras_batchsize as kb
from keras_batchsize.controller import Controller
from keras_batchsize.noise import NoiseScaleEstimate

pytestmark = pytest.mark.minutes(4)

X, Y = regression()
OURS = ("batch_size", "noise_scale", "examples_per_second")


def regressor(rate=0.05):
    model = dense()
    model.compile(keras.optimizers.SGD(rate, momentum=0.9), "mse")
    return model


def schedule(sizes):
    return kb.policies.BatchSizeSchedule(
        lambda epoch: sizes[min(epoch, len(sizes) - 1)]
    )


def fit(callbacks, model=None, batch_size=SUPERBATCH, **arguments):
    """Trains by plain `fit`; returns the model and the history."""
    model = model or comparing.seeded(regressor)
    settings = {"epochs": 3, "shuffle": False, "verbose": 0, **arguments}
    history = model.fit(
        X, Y, batch_size=batch_size, callbacks=callbacks, **settings
    )
    return model, history.history


def assert_equal(model, twin):
    ours, theirs = variables_of(model), variables_of(twin)
    for one, two in zip(ours.values(), theirs.values(), strict=True):
        np.testing.assert_array_equal(one, two)


# Callbacks and trainer.


def dynamic(policy=None, maximum=2 * SUPERBATCH, **options):
    return kb.DynamicBatchSize(
        policy or schedule([8, 32, 64]),
        initial_batch_size=BASE,
        max_batch_size=maximum,
        **options,
    )


def test_callbacks_train_as_the_trainer_does_in_any_order():
    def scaling():
        return kb.LearningRateScaling("linear", warmup_epochs=1.5)

    first, _ = fit([dynamic(), scaling()])
    second, _ = fit([scaling(), dynamic()])
    unscaled, _ = fit([dynamic()])

    model = comparing.seeded(regressor)
    trainer = kb.AdaptiveTrainer(
        model,
        schedule([8, 32, 64]),
        superbatch_size=SUPERBATCH,
        max_batch_size=2 * SUPERBATCH,
        learning_rate_scaling="none",
        verbose=0,
    )
    # A `LearningRateScaling` that is given takes the place of the trainer's.
    trainer.fit(
        X,
        Y,
        BASE,
        epochs=3,
        shuffle=False,
        callbacks=[scaling()],
        verbose=0,
    )

    assert_equal(first, second)
    assert_equal(first, model)
    with pytest.raises(AssertionError):
        assert_equal(first, unscaled)


@pytest.mark.parametrize(
    "make_callbacks",
    [
        lambda: [kb.LearningRateScaling("linear", BASE, SUPERBATCH)],
        lambda: [dynamic(schedule([16])), kb.LearningRateScaling("linear")],
    ],
    ids=["static", "dynamic"],
)
def test_a_schedule_goes_on_in_a_second_fit(make_callbacks):
    def train(*epochs):
        model = comparing.seeded(
            lambda: regressor(
                rate=keras.optimizers.schedules.PolynomialDecay(0.05, 30, 0.0)
            )
        )
        callbacks = make_callbacks()
        for number in epochs:
            fit(callbacks, model, epochs=number)
        return model

    # By the examples seen: updates are of 16 or 32, the schedule counts 8.
    assert_equal(train(2), train(1, 1))


def test_a_schedule_asks_the_optimizer_where_an_earlier_state_was_loaded():
    def train(callbacks, again):
        model = comparing.seeded(
            lambda: regressor(
                rate=keras.optimizers.schedules.PolynomialDecay(0.05, 30, 0.0)
            )
        )
        fit(callbacks, model, epochs=2)
        model.optimizer.iterations.assign(1)
        fit(again or callbacks, model, epochs=1)
        return model

    def callbacks():
        return [kb.LearningRateScaling("linear", BASE, SUPERBATCH)]

    # As callbacks do that have seen nothing.
    assert_equal(train(callbacks(), None), train(callbacks(), callbacks()))


def test_the_rate_may_belong_to_another_size_than_the_first():
    # Meant for 16 examples: at the initial 8 it is halved, without momentum
    # correction, which needs a rate that has been in force.
    model, _ = fit([dynamic("fixed"), kb.LearningRateScaling("linear", 16)])

    twin = comparing.seeded(lambda: regressor(rate=0.025))
    twin.fit(X, Y, BASE, epochs=3, shuffle=False, verbose=0)

    for one, two in zip(model.get_weights(), twin.get_weights()):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("size", [BASE, 30, 200])
def test_a_size_off_the_ladder_is_taken_where_it_is_the_whole_epoch(size):
    # One superbatch, and no other to compare it with.
    model, _ = fit([dynamic("fixed")], batch_size=max(size, 70))
    twin, _ = fit([], batch_size=BASE)

    assert_equal(model, twin)


# The static rule of Goyal et al. 2017.


def train_by_hand(model, factor_at, size, epochs):
    """Plain updates, the rate and the velocity set before each of them."""
    optimizer = model.optimizer
    base, old = float(optimizer.learning_rate), 1.0
    for seen in range(0, epochs * 64, size):
        factor = factor_at(seen)
        for slot in optimizer.momentums if optimizer.built else ():
            slot.assign(slot * (factor / old))
        optimizer.learning_rate = base * factor
        old = factor
        batch = slice(seen % 64, seen % 64 + size)
        model.train_on_batch(X[batch], Y[batch])


@pytest.mark.parametrize(
    ("rule", "factor", "warmup_epochs"),
    [("linear", 4.0, 0), ("linear", 4.0, 2), ("sqrt", 2.0, 0.75)],
)
def test_static_scaling_is_the_rule_of_goyal(rule, factor, warmup_epochs):
    model = comparing.seeded(regressor)
    scaling = kb.LearningRateScaling(
        rule, base_batch_size=8, batch_size=32, warmup_epochs=warmup_epochs
    )
    model.fit(
        X[:64],
        Y[:64],
        batch_size=32,
        epochs=4,
        shuffle=False,
        callbacks=[scaling],
        verbose=0,
    )

    twin = comparing.seeded(regressor)
    warmup = 64 * warmup_epochs

    def factor_at(seen):
        progress = min(seen / warmup, 1.0) if warmup else 1.0
        return 1.0 + (factor - 1.0) * progress

    train_by_hand(twin, factor_at, 32, 4)

    # The rate is multiplied in another order: a rounding per update.
    for one, two in zip(model.get_weights(), twin.get_weights()):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_static_scaling_without_momentum_correction_lags():
    def scaled(corrects):
        return fit(
            [
                kb.LearningRateScaling(
                    "linear",
                    base_batch_size=8,
                    batch_size=32,
                    warmup_epochs=1,
                    momentum_correction=corrects,
                )
            ]
        )[0]

    with pytest.raises(AssertionError):
        assert_equal(scaled(True), scaled(False))


def test_static_scaling_adds_nothing_to_the_logs():
    scaling = kb.LearningRateScaling(base_batch_size=8, batch_size=32)

    _, history = fit([scaling])

    assert list(history) == ["loss"]


# What is logged, printed and reported.


def test_history_has_one_number_of_each_kind_per_epoch():
    _, history = fit([dynamic()], epochs=3, validation_data=(X, Y))

    assert list(history) == ["loss", "val_loss", *OURS]
    for values in history.values():
        assert [type(value) for value in values] == [float] * 3
    assert history["batch_size"] == [8.0, 32.0, 64.0]
    assert all(math.isnan(value) for value in history["noise_scale"])
    assert all(value > 0 for value in history["examples_per_second"])
    json.dumps(history)


def test_the_noise_scale_is_logged_once_it_is_resolved():
    callback = dynamic(kb.policies.Measure(), measure_every=1)
    _, history = fit([callback], epochs=12)

    last = callback.report.rows[-1].noise_scale
    logged = history["noise_scale"][-1]
    np.testing.assert_equal(logged, last)
    assert any(value > 0 for value in history["noise_scale"])


def test_a_noise_scale_that_is_not_resolved_is_not_logged(monkeypatch):
    unresolved = NoiseScaleEstimate(
        7.0, math.inf, 1.0, math.inf, False, squared_norm=1.0, trace=7.0
    )
    monkeypatch.setattr(
        Controller, "noise_scale", property(lambda self: unresolved)
    )
    callback = dynamic(kb.policies.Measure(), measure_every=1)
    _, history = fit([callback])

    assert len(history["noise_scale"]) == 3
    assert all(map(math.isnan, history["noise_scale"]))
    rows = callback.report.rows
    assert rows and all(math.isnan(row.noise_scale) for row in rows)


def test_a_callback_listed_later_sees_the_numbers():
    seen = []
    later = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(dict(logs))
    )

    fit([dynamic(), later], epochs=1)

    assert set(seen[0]) == {"loss", *OURS}


def test_each_change_is_a_line_in_the_words_of_keras(capsys):
    fit([dynamic(verbose=1), kb.LearningRateScaling("linear")])

    lines = [
        line for line in capsys.readouterr().out.splitlines() if "set" in line
    ]
    assert lines == [
        "Epoch 2: DynamicBatchSize setting batch size to 32 (scheduled for "
        "epoch 2), learning rate to 0.2.",
        "Epoch 3: DynamicBatchSize setting batch size to 64 (scheduled for "
        "epoch 3), learning rate to 0.4.",
    ]


def test_changes_are_quiet_unless_asked_for(capsys):
    fit([dynamic(), kb.LearningRateScaling("linear")])

    assert capsys.readouterr().out == ""


def test_the_report_tells_what_happened():
    callback = dynamic()
    assert callback.report is None

    model, _ = fit([callback, kb.LearningRateScaling("linear")])

    changes = [
        (one.epoch, one.old_batch_size, one.new_batch_size)
        for one in callback.report.changes
    ]
    assert changes == [(1, 8, 32), (2, 32, 64)]
    rows = callback.report.rows
    assert rows[-1].examples == 3 * len(X)
    assert rows[-1].updates == model.optimizer.iterations
    assert {row.batch_size for row in rows} == {8, 32, 64}
    assert rows[-1].learning_rate == pytest.approx(8 * 0.05, rel=1e-6)
    assert rows[-1].base_learning_rate == pytest.approx(0.05, rel=1e-6)


class Root:
    """A rule for the rate that is an object, without a name of its own."""

    def __call__(self, ratio, noise_scale):
        return ratio**0.5


@pytest.mark.parametrize("rule", [Root(), functools.partial(Root())])
def test_the_report_names_a_rule_that_is_no_function(rule):
    callback = dynamic()

    _, history = fit([callback, kb.LearningRateScaling(rule)])

    assert history["batch_size"] == [8, 32, 64]
    assert callback.report.settings["learning_rate_scaling"] == "Root"


# The progress bar.


def printed(capsys):
    """The bars that were printed, one list of frames per epoch."""
    text = capsys.readouterr().out
    text = re.sub(r"\x1b\[\d*m|\x08", "", text)
    return [
        [frame for frame in re.split(r"[\r\n]", epoch) if "/70" in frame]
        for epoch in text.split("Epoch ")[1:]
    ]


def trainer_fit(**arguments):
    trainer = kb.AdaptiveTrainer(
        regressor(),
        schedule([8, 32, 64]),
        superbatch_size=SUPERBATCH,
        max_batch_size=2 * SUPERBATCH,
        verbose=0,
    )
    return trainer.fit(
        X, Y, **{"batch_size": BASE, "epochs": 3, "verbose": 1, **arguments}
    )


def test_the_bar_counts_examples_and_shows_the_size(capsys):
    trainer_fit(validation_data=(X, Y))

    epochs = printed(capsys)
    assert len(epochs) == 3
    for frames, size in zip(epochs, (8, 32, 64)):
        assert frames[-1].startswith("70/70 ")
        assert f"batch_size: {size}.0000" in frames[-1]
        assert "/example" in frames[-1]
        assert "/step" not in frames[-1]
        assert "val_loss" in frames[-1]
    counts = [int(frame.split("/")[0]) for frame in epochs[0]]
    assert set(counts) <= {32, 64, 70}


def test_the_bar_works_on_a_plain_fit_with_the_callbacks(capsys):
    fit([dynamic(), kb.ExamplesProgbarLogger()], verbose=1)

    epochs = printed(capsys)
    assert len(epochs) == 3
    assert all(frames[-1].startswith("70/70 ") for frames in epochs)


def test_the_bar_is_that_of_keras_where_nothing_varies(capsys):
    model, _ = fit([kb.ExamplesProgbarLogger()], verbose=1, epochs=2)

    text = capsys.readouterr().out
    assert "3/3" in text
    assert "/step" in text
    model.evaluate(X, Y, 32, callbacks=[kb.ExamplesProgbarLogger()])
    assert "3/3" in capsys.readouterr().out


@pytest.mark.parametrize("verbose", [0, 2])
def test_verbose_means_what_it_does_in_keras(verbose, capsys):
    trainer_fit(verbose=verbose)

    out = capsys.readouterr().out
    assert out.count("\n") == (0 if verbose == 0 else 6)
    assert "\r" not in out


def test_the_bar_finds_the_length_of_data_that_do_not_tell_it(capsys):
    dataset = tf.data.Dataset.from_tensor_slices((X, Y))
    dataset = dataset.filter(lambda x, y: True).batch(BASE)

    with pytest.warns(UserWarning, match="Your input ran out of data"):
        kb.AdaptiveTrainer(
            regressor(), "fixed", superbatch_size=SUPERBATCH
        ).fit(dataset, epochs=2)

    epochs = printed(capsys)
    assert epochs[-1][-1].startswith("70/70 ")


# Law 5.


class Interrupts(keras.callbacks.Callback):
    """Raises at the end of an epoch, or in the middle of it."""

    def __init__(self, epoch, batch=None):
        super().__init__()
        self.epoch, self.batch = epoch, batch

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.now == self.epoch and batch == self.batch:
            raise KeyboardInterrupt

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch and self.batch is None:
            raise KeyboardInterrupt


SIZES = [8, 16, 64, 16, 8]
EPOCHS = len(SIZES)


def decaying():
    """A model whose updates depend on the clock, too.

    It learns slowly, so that gradients stay large and the noise resolved.
    """
    rate = keras.optimizers.schedules.ExponentialDecay(0.002, 7, 0.9)
    return regressor(rate)


def on_plateau():
    # No improvement is large enough, so that it grows again and again.
    return kb.policies.GrowOnPlateau("loss", patience=2, min_delta=100.0)


def by_noise():
    return kb.policies.NoiseScale(factor=100.0)


def schedule_of_sizes():
    return schedule(SIZES)


def trained_by_trainer(policy, callbacks, folder):
    model = comparing.seeded(decaying)
    trainer = kb.AdaptiveTrainer(
        model,
        policy(),
        learning_rate_scaling="linear",
        superbatch_size=SUPERBATCH,
        max_batch_size=2 * SUPERBATCH,
        measure_every=1,
        backup_dir=folder,
        verbose=0,
    )
    return model, lambda: trainer.fit(
        X,
        Y,
        BASE,
        epochs=EPOCHS,
        shuffle=False,
        callbacks=callbacks,
        verbose=0,
    )


def trained_by_callbacks(policy, callbacks, folder, first=True):
    model = comparing.seeded(decaying)
    ours = [
        dynamic(policy(), measure_every=1),
        # Still warming up where it resumes.
        kb.LearningRateScaling("linear", warmup_epochs=4),
    ]
    backup = [] if folder is None else [kb.BackupAndRestore(folder)]
    order = backup + ours if first else ours + backup
    return model, lambda: model.fit(
        X,
        Y,
        SUPERBATCH,
        epochs=EPOCHS,
        shuffle=False,
        callbacks=[*order, *callbacks],
        verbose=0,
    )


def with_backup_last(policy, callbacks, folder):
    return trained_by_callbacks(policy, callbacks, folder, first=False)


@pytest.mark.parametrize(
    ("prepare", "policy"),
    [
        (trained_by_trainer, schedule_of_sizes),
        (trained_by_trainer, on_plateau),
        (trained_by_trainer, by_noise),
        (trained_by_callbacks, on_plateau),
        (with_backup_last, by_noise),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    prepare, policy, tmp_path
):
    folder = tmp_path / "backup"
    expected, run = prepare(policy, [], None)
    history = run().history

    # At the end of the second epoch, then in the middle of the fourth.
    for interrupt in (Interrupts(1), Interrupts(3, batch=1)):
        _, run = prepare(policy, [interrupt], folder)
        with pytest.raises(KeyboardInterrupt):
            run()
    resumed, run = prepare(policy, [], folder)
    rest = run()

    assert_equal(resumed, expected)
    assert rest.epoch == [3, 4]
    for name in ("loss", "batch_size", "noise_scale"):
        np.testing.assert_equal(rest.history[name], history[name][3:])
    assert len(set(history["batch_size"])) > 1
    assert not folder.exists()


@pytest.mark.parametrize("backup_first", [True, False])
def test_a_static_scaling_resumes_wherever_the_backup_stands(
    backup_first, tmp_path
):
    def run(*others):
        # Still warming up where it resumes.
        ours = [kb.LearningRateScaling("linear", BASE, SUPERBATCH, 4)]
        if others:
            backup = kb.BackupAndRestore(tmp_path / "backup")
            ours.insert(0 if backup_first else 1, backup)
        model = comparing.seeded(decaying)
        return fit([*ours, *others], model, epochs=EPOCHS)

    expected, history = run()
    for interrupt in (Interrupts(1), Interrupts(3, batch=1)):
        with pytest.raises(KeyboardInterrupt):
            run(interrupt)
    resumed, rest = run(keras.callbacks.Callback())

    assert_equal(resumed, expected)
    assert rest["loss"] == history["loss"][3:]


@pytest.mark.parametrize("ends", [[], [Interrupts(1)], [Interrupts(1, 0)]])
def test_a_fit_after_a_resumed_one_starts_at_its_own_epoch(ends, tmp_path):
    def run(*callbacks):
        return fit([kb.BackupAndRestore(tmp_path / "one"), *callbacks], model)

    model = comparing.seeded(regressor)
    with pytest.raises(KeyboardInterrupt):
        run(Interrupts(0))
    if ends:
        with pytest.raises(KeyboardInterrupt):
            run(*ends)
    else:
        assert len(run()[1]["loss"]) == 2

    # With and without a folder, of which none has a backup for it.
    for callbacks in ([], [kb.BackupAndRestore(tmp_path / "other")]):
        assert len(fit(callbacks, model, epochs=2)[1]["loss"]) == 2


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_a_warm_up_that_is_over_is_over_in_the_next_fit():
    def unknown():
        data = tf.data.Dataset.from_tensor_slices((X, Y))
        return data.filter(lambda x, y: True).batch(BASE)

    trainer = kb.AdaptiveTrainer(
        comparing.seeded(regressor), kb.policies.Fixed(16), verbose=0
    )
    scaling = kb.LearningRateScaling("linear", warmup_epochs=2)
    rates = []
    for epochs in (3, 1):
        trainer.fit(unknown(), epochs=epochs, callbacks=[scaling], verbose=0)
        rates += [row.learning_rate_factor for row in trainer.report.rows]
    assert rates[0] == 1.0
    assert set(rates[-len(rates) // 4 :]) == {2.0}


def test_a_schedule_resumes_from_the_backup_of_keras(tmp_path):
    # It knows nothing of the factor by which the velocity is larger.
    def fit(*callbacks):
        model = comparing.seeded(lambda: regressor(0.002))
        trainer = kb.AdaptiveTrainer(
            model,
            schedule_of_sizes(),
            "linear",
            superbatch_size=SUPERBATCH,
            max_batch_size=2 * SUPERBATCH,
            verbose=0,
        )
        trainer.fit(
            X,
            Y,
            BASE,
            epochs=EPOCHS,
            shuffle=False,
            callbacks=callbacks,
            verbose=0,
        )
        return model

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    with pytest.raises(KeyboardInterrupt):
        fit(backup(), Interrupts(2))
    assert_equal(fit(backup()), fit())


@pytest.mark.parametrize("scaled", ["dynamically", "statically"])
def test_what_a_checkpoint_saves_is_what_fit_leaves(scaled, tmp_path):
    model = comparing.seeded(decaying)
    path = tmp_path / "model.keras"
    ours = [kb.LearningRateScaling("linear", BASE, SUPERBATCH)]
    if scaled == "dynamically":
        sizes = kb.policies.Fixed(SUPERBATCH)
        ours = [dynamic(sizes), kb.LearningRateScaling("linear")]
    model.fit(
        X,
        Y,
        SUPERBATCH,
        epochs=2,
        verbose=0,
        callbacks=[*ours, keras.callbacks.ModelCheckpoint(path)],
    )
    saved = keras.models.load_model(path)
    for one, other in zip(saved.optimizer.variables, model.optimizer.variables):
        np.testing.assert_array_equal(one, other, one.name)


def test_a_training_resumes_in_the_process_that_was_interrupted(tmp_path):
    # The model still holds the velocity of the interrupted training.
    def run(interrupt):
        return model.fit(
            X,
            Y,
            SUPERBATCH,
            epochs=EPOCHS,
            shuffle=False,
            callbacks=[
                kb.BackupAndRestore(tmp_path / "backup"),
                dynamic(schedule(SIZES)),
                kb.LearningRateScaling("linear"),
                *interrupt,
            ],
            verbose=0,
        )

    expected = model = comparing.seeded(decaying)
    run([])

    model = comparing.seeded(decaying)
    with pytest.raises(KeyboardInterrupt):
        run([Interrupts(2)])
    run([])

    assert_equal(model, expected)


@pytest.mark.parametrize(
    ("superbatches", "interrupt", "own"),
    [
        (1, (1, 0), True),
        (2, (2, 0), False),
        (2, (2, 0), True),
        (3, (2, 0), True),
    ],
)
def test_a_backup_within_an_epoch_is_resumed_as_under_plain_fit(
    superbatches, interrupt, own, tmp_path
):
    # Keras goes back to the beginning of the epoch, with what it has learned;
    # the clock of a schedule goes on.
    per_superbatch = SUPERBATCH // BASE
    data = regression(2 * SUPERBATCH)
    arguments = {"epochs": 4, "shuffle": False, "verbose": 0}

    def resumed(fit, kind, batches, epoch, last):
        folder = tmp_path / f"{kind.__module__}{batches}"
        with pytest.raises(KeyboardInterrupt):
            fit([kind(folder, save_freq=batches), Interrupts(epoch, last)])
        return fit([kind(folder, save_freq=batches)])

    def ours(callbacks):
        trainer = kb.AdaptiveTrainer(
            comparing.seeded(decaying),
            *("fixed", "linear"),
            superbatch_size=SUPERBATCH,
            verbose=0,
        )
        return trainer.fit(*data, BASE, callbacks=callbacks, **arguments)

    def theirs(callbacks):
        model = comparing.seeded(decaying)
        return model.fit(*data, BASE, callbacks=callbacks, **arguments)

    kind = kb.BackupAndRestore if own else keras.callbacks.BackupAndRestore
    epoch, superbatch = interrupt
    mine = resumed(ours, kind, superbatches, epoch, superbatch)
    their = resumed(
        theirs,
        keras.callbacks.BackupAndRestore,
        superbatches * per_superbatch,
        epoch,
        (superbatch + 1) * per_superbatch - 1,
    )

    assert mine.epoch == their.epoch
    assert mine.history["loss"] == their.history["loss"]
    assert_equal(mine.model, their.model)


def test_a_backup_is_made_between_epochs_too(tmp_path):
    backup = kb.BackupAndRestore(tmp_path, save_freq=2, delete_checkpoint=False)

    fit([dynamic(), backup], epochs=1)

    with h5py.File(tmp_path / "latest.weights.h5") as file:
        saved = json.loads(file["keras_batchsize.json"][()].tobytes())
    saved = saved["batch_size"]
    assert saved["controller"]["examples"] == 2 * SUPERBATCH


class WithoutOptimizer(keras.Model):
    """Trains by hand, if at all."""

    def train_step(self, data):
        return {"loss": 0.0}


def test_a_backup_of_a_model_without_optimizer_is_that_of_keras(tmp_path):
    inputs = keras.Input(X.shape[1:])
    model = WithoutOptimizer(inputs, keras.layers.Dense(1)(inputs))
    model.compile(optimizer=None)

    backup = kb.BackupAndRestore(tmp_path, delete_checkpoint=False)
    _, history = fit([backup], model, epochs=2)

    assert history["loss"] == [0.0, 0.0]
    assert list(tmp_path.glob("*.weights.h5"))


def test_a_backup_without_our_callbacks_is_that_of_keras(tmp_path):
    backup = kb.BackupAndRestore(tmp_path, delete_checkpoint=False)

    fit([backup])

    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"latest.weights.h5", "training_metadata.json"}


class Crashes(keras.callbacks.Callback):
    """Breaks off a call of a method.

    Args:
        monkeypatch: The fixture of pytest, which repairs it.
        epoch: Epoch from whose beginning on calls are counted.
        owner_of: Function from the model to the object with the method.
        name: Name of the method.
        call: Number of the call that is broken off, from 1.
    """

    def __init__(self, monkeypatch, epoch, owner_of, name, call=1):
        super().__init__()
        self._monkeypatch, self._epoch = monkeypatch, epoch
        self._owner_of, self._name, self._left = owner_of, name, call

    def on_epoch_begin(self, epoch, logs=None):
        if epoch != self._epoch:
            return
        owner = self._owner_of(self.model)
        method = getattr(owner, self._name)

        def counted(*args, **kwargs):
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt
            return method(*args, **kwargs)

        self._monkeypatch.setattr(owner, self._name, counted)


AMID_SAVING = {
    "before the weights": (lambda model: model, "save_weights"),
    "amid the weights": (lambda model: model.optimizer, "save_own_variables"),
    "before renaming": (lambda model: tf.io.gfile, "rename", 1),
    "between renaming": (lambda model: tf.io.gfile, "rename", 2),
}


@functools.cache
def uninterrupted():
    """Returns the model and the history of a training that was not broken."""
    model, run = trained_by_callbacks(by_noise, [], None)
    return model, run().history


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("crash", AMID_SAVING)
def test_a_crash_amid_saving_parts_no_state_from_its_weights(
    crash, epoch, tmp_path, monkeypatch
):
    expected, history = uninterrupted()
    folder = tmp_path / "backup"

    with monkeypatch.context() as patch:
        crashes = Crashes(patch, epoch, *AMID_SAVING[crash])
        _, run = trained_by_callbacks(by_noise, [crashes], folder)
        with pytest.raises(KeyboardInterrupt):
            run()
    resumed, run = trained_by_callbacks(by_noise, [], folder)
    rest = run()

    assert_equal(resumed, expected)
    # Once the weights have their name, they are the backup.
    assert rest.epoch[0] == epoch + (crash == "between renaming")
    assert len(set(history["batch_size"])) > 1
    for name in ("loss", "batch_size", "noise_scale"):
        np.testing.assert_equal(
            rest.history[name], history[name][rest.epoch[0] :]
        )


def damage(file):
    file.write_bytes(file.read_bytes()[:100])


def test_the_state_follows_keras_back_to_the_backup_before(tmp_path):
    folder = tmp_path / "backup"

    def run(*callbacks):
        ours = dynamic(by_noise(), measure_every=1)
        scaling = kb.LearningRateScaling("linear")
        model = comparing.seeded(decaying)
        return fit([ours, scaling, *callbacks], model, epochs=4)

    def backup():
        return kb.BackupAndRestore(folder, double_checkpoint=True)

    expected, history = run()
    # Twice: the state of weights that were lost takes nobody's place.
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(backup(), Interrupts(2, batch=1))
        damage(folder / "latest.weights.h5")
    resumed, rest = run(backup())

    assert_equal(resumed, expected)
    for name in ("loss", "batch_size", "noise_scale"):
        np.testing.assert_equal(rest[name], history[name][1:])


def test_a_backup_of_keras_is_gone_on_from(tmp_path):
    def run(kind, *callbacks):
        backup = kind(tmp_path, delete_checkpoint=False)
        fit([dynamic(), backup, *callbacks])

    with pytest.raises(KeyboardInterrupt):
        run(keras.callbacks.BackupAndRestore, Interrupts(2, batch=0))
    run(kb.BackupAndRestore)

    with h5py.File(tmp_path / "latest.weights.h5") as file:
        saved = json.loads(file["keras_batchsize.json"][()].tobytes())
    saved = saved["batch_size"]
    # Only the third epoch was trained, with statistics of its own.
    assert saved["controller"]["examples"] == len(X)
    assert saved["controller"]["clock"]["steps"] > 0


def test_a_backup_of_another_base_size_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit([dynamic(), kb.BackupAndRestore(tmp_path), Interrupts(1)])
    other = kb.DynamicBatchSize("fixed", initial_batch_size=16)

    with pytest.raises(ValueError, match="Received: .*Use .*batch_size=8"):
        fit([other, kb.BackupAndRestore(tmp_path)])


def test_a_metric_of_the_user_hides_none_of_ours():
    class Counted(keras.metrics.MeanSquaredError):
        def __init__(self):
            super().__init__(name="batch_size")

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=[Counted()])
    x = np.zeros((64, 4), "float32")
    trainer = kb.AdaptiveTrainer(model, "fixed", verbose=0)
    history = trainer.fit(x, x[:, 0], batch_size=8, epochs=2, verbose=0)
    assert {"noise_scale", "examples_per_second"} <= set(history.history)
    assert history.history["batch_size"] == [8.0, 8.0]
