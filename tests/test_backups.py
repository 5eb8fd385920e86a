"""Laws of backups: at any moment there is one that training can go on from."""

import functools
import json
import shutil
import time

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from comparing import BASE
from comparing import SUPERBATCH
from comparing import variables_of

import keras_batchsize as kb

X, Y = comparing.regression()
EPOCHS = 3


def decaying():
    model = comparing.dense()
    rate = keras.optimizers.schedules.PolynomialDecay(0.05, 40)
    model.compile(keras.optimizers.SGD(rate, momentum=0.9), "mse")
    return model


def fit(*callbacks, model=None, epochs=EPOCHS, **arguments):
    """Trains with sizes that change; returns the Keras `History`."""
    sizes = kb.policies.BatchSizeSchedule(lambda epoch: [8, 32, 64][epoch])
    ours = kb.DynamicBatchSize(sizes, BASE, max_batch_size=2 * SUPERBATCH)
    return (model or comparing.seeded(decaying)).fit(
        X,
        Y,
        SUPERBATCH,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[ours, kb.LearningRateScaling("linear"), *callbacks],
        **arguments,
    )


@functools.cache
def uninterrupted():
    return fit()


def assert_equal(model, twin):
    ours, theirs = variables_of(model), variables_of(twin)
    for one, two in zip(ours.values(), theirs.values(), strict=True):
        np.testing.assert_array_equal(one, two)


class Stops(keras.callbacks.Callback):
    """Ends a training as Ctrl-C would, after a step of an epoch."""

    def __init__(self, epoch, batch):
        super().__init__()
        self._at = epoch, batch
        self._epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self._epoch, batch) == self._at:
            raise KeyboardInterrupt


class Snapshots(keras.callbacks.Callback):
    """Copies a folder whenever something is done to a file in an epoch's save.

    A copy holds what a process leaves that is killed at that moment.

    Attributes:
        folders: Dict from the names of moments to the copies.
    """

    def __init__(self, patch, folder, copies, epoch):
        super().__init__()
        self._patch, self._folder, self._copies = patch, folder, copies
        self._epoch = epoch
        self.folders = {}

    def _take(self, moment):
        copy = self._copies / str(len(self.folders))
        self.folders[f"{len(self.folders)} {moment}"] = copy
        shutil.copytree(self._folder, copy)

    def _around(self, owner, name):
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            self._take(f"before {name}")
            returned = function(*args, **kwargs)
            self._take(f"after {name}")
            return returned

        self._patch.setattr(owner, name, watched)

    def _amid_texts(self):
        take = self._take

        class InTwoParts(tf.io.gfile.GFile):
            def write(self, text):
                super().write(text[: len(text) // 2])
                self.flush()
                take("amid a text")
                super().write(text[len(text) // 2 :])

        self._patch.setattr(tf.io.gfile, "GFile", InTwoParts)

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self._epoch:
            for owner, name in (
                (self.model, "save_weights"),
                # In the middle of the weights.
                (self.model.optimizer, "save_own_variables"),
                (self.model.layers[-1], "save_own_variables"),
                (tf.io.gfile, "copy"),
                (tf.io.gfile, "rename"),
            ):
                self._around(owner, name)
            self._amid_texts()
        elif epoch == self._epoch + 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("double", [False, True])
def test_whenever_it_is_killed_training_goes_on(double, tmp_path, monkeypatch):
    # As if it had never been interrupted, from one epoch or the other.
    kind = functools.partial(kb.BackupAndRestore, double_checkpoint=double)
    with monkeypatch.context() as patch:
        watch = Snapshots(patch, tmp_path / "a", tmp_path, epoch=1)
        with pytest.raises(KeyboardInterrupt):
            fit(kind(tmp_path / "a"), watch)
    expected = uninterrupted()

    started = []
    for moment, folder in watch.folders.items():
        rest = fit(kind(folder))
        assert_equal(rest.model, expected.model)
        losses = expected.history["loss"][rest.epoch[0] :]
        assert rest.history["loss"] == losses, moment
        started.append(rest.epoch[0])

    # With the name of the weights, and no sooner, the backup is the new one.
    assert set(started) == {1, 2} and started == sorted(started)
    assert any("amid" in moment for moment in watch.folders)


def test_a_damaged_backup_is_gone_back_from(tmp_path):
    folder = tmp_path / "backup"
    kind = functools.partial(kb.BackupAndRestore, double_checkpoint=True)
    with pytest.raises(KeyboardInterrupt):
        fit(kind(folder), Stops(2, 0))
    weights = folder / "latest.weights.h5"
    weights.write_bytes(weights.read_bytes()[:100])
    # Of an epoch that is gone, and none is noted for the one before.
    (folder / "training_metadata.json.bkp").unlink(missing_ok=True)

    rest = fit(kind(folder))

    assert rest.epoch == [1, 2]
    assert_equal(rest.model, uninterrupted().model)


def test_an_epoch_without_its_weights_is_not_gone_on_from(tmp_path):
    # What a process leaves that is killed while it removes the folder.
    folder = tmp_path / "backup"
    with pytest.raises(KeyboardInterrupt):
        fit(kb.BackupAndRestore(folder), Stops(2, 0))
    (folder / "latest.weights.h5").unlink()
    assert json.loads((folder / "training_metadata.json").read_text())

    whole = fit(kb.BackupAndRestore(folder))

    assert whole.epoch == [0, 1, 2]
    assert_equal(whole.model, uninterrupted().model)


def test_a_backup_within_a_resumed_epoch_is_of_that_epoch(tmp_path):
    # Keras counts epochs from 0 then, until one has ended.
    def backup():
        return kb.BackupAndRestore(tmp_path / "backup", save_freq=1)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fit(backup(), Stops(1, 1))

    assert fit(backup()).epoch == [1, 2]


def test_the_backup_of_a_remote_folder_is_resumed_from():
    # TensorFlow's file system in memory stands for that of a cloud.
    folder = f"ram://backups/{time.time_ns()}"
    with pytest.raises(KeyboardInterrupt):
        fit(kb.BackupAndRestore(folder), Stops(2, 0))
    names = set(tf.io.gfile.listdir(folder))
    assert names == {"latest.weights.h5", "training_metadata.json"}

    rest = fit(kb.BackupAndRestore(folder))

    assert rest.epoch == [2]
    assert_equal(rest.model, uninterrupted().model)
    assert not tf.io.gfile.exists(folder)


# Keras's own callback.


def trainer_of(model):
    return kb.AdaptiveTrainer(model, "fixed", superbatch_size=32, verbose=0)


def fit_by(trainer, *callbacks, epochs=EPOCHS):
    return trainer.fit(
        X, Y, BASE, epochs=epochs, shuffle=False, callbacks=callbacks, verbose=0
    )


def test_a_schedule_goes_back_with_the_weights(tmp_path):
    # As those of a backup, in the middle of training; and between two fits.
    expected = comparing.seeded(decaying)
    fit_by(trainer_of(expected))
    path = tmp_path / "first.weights.h5"

    trainer = trainer_of(comparing.seeded(decaying))
    keeps = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        fit_by(trainer, keeps, Stops(2, 1))
    rest = fit_by(trainer, keeps)
    assert rest.epoch == [2]
    assert_equal(trainer.model, expected)

    trainer = trainer_of(comparing.seeded(decaying))
    fit_by(trainer, epochs=1)
    trainer.model.save_weights(path)
    fit_by(trainer, epochs=1)
    trainer.model.load_weights(path)
    fit_by(trainer, epochs=EPOCHS - 1)
    assert_equal(trainer.model, expected)


def test_a_stated_state_holds_whatever_the_optimizer_counted(tmp_path):
    # Updates of 16: the clock counts two steps for each.
    def make():
        model = comparing.seeded(decaying)
        policy = kb.policies.Fixed(2 * BASE)
        return kb.AdaptiveTrainer(model, policy, superbatch_size=32, verbose=0)

    expected = make()
    fit_by(expected)
    path = tmp_path / "first.weights.h5"

    trainer = make()
    fit_by(trainer, epochs=1)
    state = trainer.get_state()
    trainer.model.save_weights(path)
    fit_by(trainer, epochs=1)
    trainer.model.load_weights(path)
    trainer.set_state(state)
    fit_by(trainer, epochs=EPOCHS - 1)
    assert_equal(trainer.model, expected.model)


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("static", [False, True])
def test_a_warm_up_goes_on_after_a_part_of_an_epoch(epoch, static, tmp_path):
    # That part tells nothing of the epoch's length, and the data neither.
    factors = []

    class Notes(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            factors.append(self.model.train_function.factor)

    def run(*callbacks):
        ours = [kb.LearningRateScaling("linear", BASE, SUPERBATCH, 5)]
        if not static:
            sizes = kb.policies.Fixed(SUPERBATCH)
            dynamic = kb.DynamicBatchSize(sizes, BASE)
            ours = [dynamic, kb.LearningRateScaling("linear", warmup_epochs=5)]
        data = tf.data.Dataset.from_tensor_slices((X[:64], Y[:64])).repeat(4)
        data = data.filter(lambda x, y: True).batch(SUPERBATCH)
        backup = kb.BackupAndRestore(tmp_path / "backup", save_freq=1)
        comparing.seeded(decaying).fit(
            data, epochs=3, callbacks=[*ours, backup, *callbacks, Notes()],
            shuffle=False, verbose=0,
        )

    with pytest.raises(KeyboardInterrupt):
        run(Stops(epoch, 0))
    # From 1 to 4 in five epochs of 8 superbatches; unknown is for ever.
    begun = 8 * epoch + 1
    expected = [
        1.0 + 3.0 * done / 40 if epoch else 1.0
        for done in range(begun, begun + 8)
    ]
    factors.clear()
    run()

    np.testing.assert_allclose(factors[:8], expected, rtol=1e-12)
    assert factors[8] > 1.0
