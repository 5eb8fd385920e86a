"""The model is as it was, apart from being trained, however `fit` ended.

No attribute, optimizer or train function of ours is left in it. A trainer puts
things in order itself. With the callbacks alone nobody can: Keras calls no one
when another callback raises. Then what is left behind steps aside at the next
use of the model.
"""

import copy
import functools
import math

import comparing
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

X, Y = regression()
RATE = 0.05


def regressor(loss="mse"):
    model = dense()
    model.compile(keras.optimizers.SGD(RATE, momentum=0.9), loss)
    return model


def ready():
    """Returns a model as if trained before, and its train function."""
    model = comparing.seeded(regressor)
    model.optimizer.build(model.trainable_variables)
    model.make_train_function()
    return model, model.train_function


def growing():
    """From the second epoch on the rate is multiplied by 4."""
    return kb.policies.BatchSizeSchedule({0: BASE, 1: 4 * BASE})


# Three ways to train.


def by_trainer(model, x, y, callbacks=(), rule="linear"):
    trainer = kb.AdaptiveTrainer(
        model,
        growing(),
        learning_rate_scaling=rule,
        superbatch_size=SUPERBATCH,
        max_batch_size=SUPERBATCH,
        verbose=0,
    )
    trainer.fit(
        x,
        y,
        batch_size=BASE,
        epochs=3,
        shuffle=False,
        callbacks=list(callbacks),
        verbose=0,
    )


def by_callbacks(model, x, y, callbacks=(), rule="linear"):
    ours = [
        kb.DynamicBatchSize(growing(), BASE, max_batch_size=SUPERBATCH),
        kb.LearningRateScaling(rule),
    ]
    fit_superbatches(model, x, y, [*ours, *callbacks])


def by_static_rule(model, x, y, callbacks=(), rule="linear"):
    ours = kb.LearningRateScaling(
        rule, base_batch_size=BASE, batch_size=SUPERBATCH
    )
    fit_superbatches(model, x, y, [ours, *callbacks])


def by_plain_fit(model, x, y, callbacks=(), rule=None):
    fit_superbatches(model, x, y, callbacks)


def fit_superbatches(model, x, y, callbacks):
    if isinstance(x, tf.data.Dataset):
        x = x.batch(SUPERBATCH)
    model.fit(
        x,
        y,
        batch_size=None if y is None else SUPERBATCH,
        epochs=3,
        shuffle=False,
        callbacks=list(callbacks),
        verbose=0,
    )


WAYS = [by_trainer, by_callbacks, by_static_rule]
every_way = pytest.mark.parametrize("train", WAYS)


# What may end a training, in its second epoch where it can.


class Breaks(keras.callbacks.Callback):
    """Raises in one of its hooks."""

    def __init__(self, where, error=RuntimeError):
        super().__init__()
        self.where, self.error, self.epoch = where, error, 0

    def _at(self, where):
        if where == self.where and (self.epoch or where == "on_train_begin"):
            raise self.error("broken")

    def on_train_begin(self, logs=None):
        self._at("on_train_begin")

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        self._at("on_epoch_begin")

    def on_train_batch_begin(self, batch, logs=None):
        self._at("on_train_batch_begin")

    def on_train_batch_end(self, batch, logs=None):
        self._at("on_train_batch_end")

    def on_epoch_end(self, epoch, logs=None):
        self._at("on_epoch_end")


HOOKS = [
    "on_train_begin",
    "on_epoch_begin",
    "on_train_batch_begin",
    "on_train_batch_end",
    "on_epoch_end",
]


def breaking_dataset(error):
    """Raises in the middle of its second round."""
    begun = []

    def read(index):
        if index == 0:
            begun.append(index)
        if index == 40 and len(begun) > 1:
            raise error("broken")
        return X[index], Y[index]

    def element(index):
        x, y = tf.numpy_function(read, [index], ["float32", "float32"])
        return tf.ensure_shape(x, X.shape[1:]), tf.ensure_shape(y, Y.shape[1:])

    return tf.data.Dataset.range(len(X)).map(element)


class BreakingBatches(keras.utils.PyDataset):
    """Raises in the middle of the second epoch."""

    num_batches = 3

    def __init__(self, error):
        super().__init__()
        self.error, self.epochs = error, 0

    def __getitem__(self, index):
        if index == 1 and self.epochs:
            raise self.error("broken")
        batch = slice(index * SUPERBATCH, (index + 1) * SUPERBATCH)
        return X[batch], Y[batch]

    def on_epoch_begin(self):
        self.epochs += 1


def broken_loss(y, y_pred):
    raise RuntimeError("broken")


def assert_in_order(model, train_function, optimizer, attributes):
    assert sorted(vars(model)) == attributes
    assert model.train_function is train_function
    assert_untouched(model, optimizer)


def assert_untouched(model, optimizer):
    assert model.optimizer is optimizer
    rate = keras.ops.convert_to_numpy(optimizer.learning_rate)
    assert rate == np.float32(RATE)


# What becomes of a training.


def ends(train, model):
    train(model, X, Y)


def ends_by_data(train, model, data, error):
    with pytest.raises(BaseException, match="broken|Error"):
        train(model, data(error), None)


def ends_by_callback(train, model, hook):
    with pytest.raises(KeyboardInterrupt, match="broken"):
        train(model, X, Y, [Breaks(hook, KeyboardInterrupt)])


@functools.cache
def attributes_after_plain_fit(end, *arguments):
    """What plain `fit` leaves in a model, interrupted or not."""
    model, _ = ready()
    end(by_plain_fit, model, *arguments)
    return sorted(vars(model))


def assert_usable(model, tmp_path):
    """Saving, loading, evaluating and training work as they always do."""
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loss = model.evaluate(X, Y, verbose=0)
    assert loss == loaded.evaluate(X, Y, verbose=0)
    for twin in (model, loaded):
        keras.utils.set_random_seed(3)
        twin.fit(X, Y, BASE, epochs=2, verbose=0)
    for one, two in zip(model.get_weights(), loaded.get_weights()):
        np.testing.assert_array_equal(one, two)


# The end of a training.


@every_way
def test_nothing_is_left_after_a_training(train, tmp_path):
    model, function = ready()
    optimizer = model.optimizer

    ends(train, model)

    attributes = attributes_after_plain_fit(ends)
    assert_in_order(model, function, optimizer, attributes)
    assert_usable(model, tmp_path)


@every_way
def test_nothing_is_left_after_the_first_training(train):
    model, twin = regressor(), regressor()

    train(model, X, Y)
    by_plain_fit(twin, X, Y)

    assert sorted(vars(model)) == sorted(vars(twin))
    assert type(model.train_function) is type(twin.train_function)


@every_way
@pytest.mark.parametrize(
    ("data", "error"),
    [
        (breaking_dataset, KeyboardInterrupt),
        (BreakingBatches, ValueError),
    ],
    ids=["dataset", "py-dataset"],
)
def test_nothing_is_left_after_data_that_break(train, data, error):
    model, function = ready()
    optimizer = model.optimizer

    ends_by_data(train, model, data, error)

    attributes = attributes_after_plain_fit(ends_by_data, data, error)
    assert_in_order(model, function, optimizer, attributes)


@every_way
def test_nothing_is_left_after_a_loss_that_breaks(train):
    def broken():
        model = regressor(broken_loss)
        with pytest.raises(RuntimeError, match="broken"):
            train(model, X, Y)
        return model

    model = broken()
    optimizer = model.optimizer

    assert_untouched(model, optimizer)
    assert not type(model.train_function).__module__.startswith("keras_batch")
    model.compile(optimizer, "mse")
    model.fit(X, Y, BASE, verbose=0)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_trainer_leaves_nothing_after_a_callback_that_breaks(hook):
    model, function = ready()
    optimizer = model.optimizer

    ends_by_callback(by_trainer, model, hook)

    attributes = attributes_after_plain_fit(ends_by_callback, hook)
    assert_in_order(model, function, optimizer, attributes)


def test_a_model_can_be_used_after_its_trainer_was_interrupted(tmp_path):
    model, _ = ready()
    with pytest.raises(RuntimeError, match="broken"):
        by_trainer(model, X, Y, [Breaks("on_epoch_end")])

    assert_usable(model, tmp_path)
    by_trainer(model, X, Y)


# The callbacks alone: what is left steps aside at the next use.


def interrupted(train, hook="on_train_batch_end", rule="none", **options):
    """Returns a model whose training by callbacks was interrupted."""
    model, function = ready()
    with pytest.raises(KeyboardInterrupt, match="broken"):
        train(
            model, X, Y, [Breaks(hook, KeyboardInterrupt)], rule=rule, **options
        )
    return model, function


def twin_of(model):
    """Returns a model in the same state that only Keras has trained."""
    twin, _ = ready()
    ours = [*model.variables, *model.optimizer.variables]
    theirs = [*twin.variables, *twin.optimizer.variables]
    for one, two in zip(ours, theirs, strict=True):
        two.assign(one)
    return twin


def assert_equal(model, twin):
    ours, theirs = variables_of(model), variables_of(twin)
    for one, two in zip(ours.values(), theirs.values(), strict=True):
        np.testing.assert_array_equal(one, two)


BY_CALLBACKS = pytest.mark.parametrize("train", [by_callbacks, by_static_rule])


@BY_CALLBACKS
@pytest.mark.parametrize("hook", HOOKS)
def test_a_later_fit_is_as_if_nothing_had_been(train, hook):
    model, function = interrupted(train, hook)
    optimizer, twin = model.optimizer, twin_of(model)

    for one in (model, twin):
        keras.utils.set_random_seed(3)
        one.fit(X, Y, 12, epochs=2, verbose=0)

    assert_equal(model, twin)
    assert model.train_function is function
    assert_untouched(model, optimizer)
    assert sorted(vars(model)) == sorted(vars(twin))


@BY_CALLBACKS
def test_a_later_fit_with_the_same_history_is_as_if_nothing_had_been(train):
    # The `History` tells trainings apart; one given by the user does not.
    history = keras.callbacks.History()
    model, _ = ready()
    breaks = Breaks("on_epoch_end", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        train(model, X, Y, [history, breaks], rule="none")
    twin = twin_of(model)

    model.fit(X, Y, 12, callbacks=[history], shuffle=False, verbose=0)
    twin.fit(X, Y, 12, shuffle=False, verbose=0)

    assert_equal(model, twin)


@BY_CALLBACKS
def test_a_later_train_on_batch_is_as_if_nothing_had_been(train):
    model, _ = interrupted(train)
    twin = twin_of(model)

    ours = model.train_on_batch(X, Y)
    theirs = twin.train_on_batch(X, Y)

    assert_equal(model, twin)
    assert ours == theirs


@BY_CALLBACKS
def test_a_model_left_behind_can_be_saved_and_compiled(train, tmp_path):
    model, _ = interrupted(train)
    assert_usable(model, tmp_path)

    model, _ = interrupted(train)
    model.compile(keras.optimizers.SGD(RATE), "mse")

    assert model.train_function is None
    model.fit(X, Y, BASE, verbose=0)


@pytest.mark.parametrize(
    ("hook", "factor"), [("on_train_batch_end", 4), ("on_epoch_end", 1)]
)
def test_momentum_is_put_in_order_by_the_next_fit(hook, factor):
    # Interrupted at a rate multiplied by 4, which the velocity holds until the
    # end of an epoch.
    model, _ = interrupted(by_callbacks, hook, "linear")
    twin = twin_of(model)
    for slot in twin.optimizer.momentums:
        slot.assign(slot / factor)

    for one in (model, twin):
        one.fit(X, Y, BASE, shuffle=False, verbose=0)

    assert_equal(model, twin)


@BY_CALLBACKS
def test_the_same_callbacks_can_be_used_again(train):
    model, function = interrupted(train)

    train(model, X, Y)

    assert model.train_function is function


def test_another_training_takes_over_what_was_left_behind():
    model, function = interrupted(by_callbacks)
    twin = twin_of(model)

    by_trainer(model, X, Y)
    by_trainer(twin, X, Y)

    assert_equal(model, twin)
    assert model.train_function is function


def test_a_model_in_training_may_be_trained_on_a_batch_by_a_callback():
    class TrainsToo(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.train_on_batch(X[:12], Y[:12])

    models = [ready()[0] for _ in range(2)]
    by_trainer(models[0], X, Y, [TrainsToo()], rule="none")
    for epoch, size in enumerate((BASE, 4 * BASE, 4 * BASE)):
        models[1].fit(X, Y, size, shuffle=False, verbose=0)
        models[1].train_on_batch(X[:12], Y[:12])

    assert_equal(*models)


# Callbacks are copied, as KerasTuner does for each execution.

PUBLIC_CALLBACKS = {
    "DynamicBatchSize": lambda path: kb.DynamicBatchSize(growing(), BASE),
    "LearningRateScaling": lambda path: kb.LearningRateScaling(
        "linear", base_batch_size=BASE, batch_size=SUPERBATCH
    ),
    "BackupAndRestore": lambda path: kb.BackupAndRestore(path / "backup"),
    # It shows what another one decides, and is copied with it.
    "BatchSizeTensorBoard": lambda path: [
        kb.BatchSizeTensorBoard(path / "logs"),
        kb.DynamicBatchSize(growing(), BASE),
    ],
    "MemoryProbe": lambda path: [
        kb.MemoryProbe(time_budget=math.inf),
        kb.DynamicBatchSize(growing(), BASE),
    ],
    "ExamplesProgbarLogger": lambda path: kb.ExamplesProgbarLogger(),
    "TimeToTarget": lambda path: kb.TimeToTarget("loss", 0.0, 100.0),
}


def test_every_public_callback_is_copied_here():
    public = {
        name
        for name in kb.__all__
        if isinstance(getattr(kb, name), type)
        and issubclass(getattr(kb, name), keras.callbacks.Callback)
    }

    assert public <= set(PUBLIC_CALLBACKS), "Add it to PUBLIC_CALLBACKS."


@pytest.mark.parametrize("name", PUBLIC_CALLBACKS)
def test_a_copy_of_a_callback_trains_as_the_original_does(name, tmp_path):
    original = PUBLIC_CALLBACKS[name](tmp_path)
    before = copy.deepcopy(original)
    fit_superbatches(ready()[0], X, Y, [original])
    after = copy.deepcopy(original)

    models = []
    for callback in (before, after):
        models.append(ready()[0])
        fit_superbatches(models[-1], X, Y, [callback])

    assert_equal(*models)


@pytest.mark.parametrize("name", ["DynamicBatchSize", "LearningRateScaling"])
def test_a_callback_can_be_copied_after_an_interruption(name, tmp_path):
    original = PUBLIC_CALLBACKS[name](tmp_path)
    breaks = Breaks("on_epoch_end")
    with pytest.raises(RuntimeError, match="broken"):
        fit_superbatches(ready()[0], X, Y, [original, breaks])

    fit_superbatches(ready()[0], X, Y, [copy.deepcopy(original)])
