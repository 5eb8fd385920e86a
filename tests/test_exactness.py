"""Every loss is put together exactly from micro-batches, or refused.

Refused means: a ValueError that says what to do, before anything has changed.
"""

import functools
import types

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from comparing import BASE
from comparing import SUPERBATCH
from comparing import adaptive
from comparing import compiled
from comparing import dense
from comparing import plain
from keras import layers
from keras import losses

import keras_batchsize as kb
from keras_batchsize import exactness
from keras_batchsize import scaling
from keras_batchsize.policies import BatchSizeSchedule

pytestmark = pytest.mark.minutes(4)

# Rounding of float32 sums in another order, see test_micro_batches.py.
RTOL = 2e-5


def assert_exact(make_model, x, y, **arguments):
    """Two superbatches, accumulated, are the batch of plain `fit`."""
    batch_size = 2 * SUPERBATCH
    theirs = plain(make_model, x, y, batch_size=batch_size, **arguments)
    ours = adaptive(
        make_model,
        x,
        y,
        policy=BatchSizeSchedule({0: batch_size}),
        learning_rate_scaling="none",
        max_batch_size=batch_size,
        **arguments,
    )
    comparing.assert_close(ours, theirs, RTOL)


def assert_refused(make_model, x, y, match, policy="goodput", **arguments):
    """Training raises and leaves the model as it was."""
    model = comparing.seeded(make_model)
    model.evaluate(x, y, verbose=0)  # So that everything is built.
    model.optimizer.build(model.trainable_variables)
    model.reset_metrics()
    before = comparing.variables_of(model)
    trainer = kb.AdaptiveTrainer(
        model, policy, superbatch_size=SUPERBATCH, verbose=0
    )
    trainer.max_batch_size = SUPERBATCH
    with pytest.raises(ValueError, match=match) as caught:
        trainer.fit(x, y, batch_size=comparing.BASE, verbose=0, **arguments)
    assert "Received: " in str(caught.value)
    assert "Use " in str(caught.value) or "Give " in str(caught.value)
    after = comparing.variables_of(model)
    assert list(after) == list(before)
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, path)
    assert model.train_function is None or not isinstance(
        model.train_function, kb.callbacks.AdaptiveTrainFunction
    )


# Reductions.


@pytest.mark.parametrize(
    "reduction", ["sum_over_batch_size", "mean", "mean_with_sample_weight"]
)
def test_means_are_exact(reduction):
    weights = np.random.default_rng(1).uniform(0.1, 3.0, comparing.EXAMPLES)
    loss = losses.MeanSquaredError(reduction=reduction)
    assert_exact(
        compiled(dense, loss=loss),
        *comparing.regression(),
        sample_weight=weights,
    )


def test_weights_may_be_named_as_the_output_is():
    inputs = keras.Input((comparing.FEATURES,))

    def make():
        output = keras.layers.Dense(1, name="size")(inputs)
        return keras.Model(inputs, {"size": output})

    x, y = comparing.regression()
    loss = losses.MeanSquaredError(reduction="mean_with_sample_weight")
    assert_exact(
        compiled(make, loss={"size": loss}),
        *(x, {"size": y}),
        sample_weight={"size": np.linspace(0.1, 3.0, len(x))},
    )


@pytest.mark.parametrize("name", ["crossentropy", "CE"])
def test_names_that_only_compile_knows_are_exact(name):
    assert_exact(
        compiled(
            lambda: comparing.dense(comparing.CLASSES, activation="softmax"),
            loss=name,
        ),
        *comparing.classification(),
    )


@pytest.mark.parametrize("reduction", ["sum", "none", None])
def test_sums_are_refused(reduction):
    loss = losses.MeanSquaredError(reduction=reduction)
    assert_refused(
        compiled(dense, loss=loss),
        *comparing.regression(),
        match="a sum grows with the batch size",
    )


@pytest.mark.parametrize(
    ("policy", "reduction"),
    [
        (kb.policies.GrowOnPlateau("loss"), "sum"),
        (BatchSizeSchedule({1: SUPERBATCH}), "sum"),
        (kb.policies.Fixed(2 * comparing.BASE), "none"),
        (BatchSizeSchedule({0: SUPERBATCH}), None),
    ],
)
def test_sums_are_refused_where_only_the_size_changes(policy, reduction):
    # Nothing is cut, but one update of 64 would move the weights as far as
    # 64 of 8: the gradient grows with the size, and the rate does.
    loss = losses.MeanSquaredError(reduction=reduction)
    assert_refused(
        compiled(dense, loss=loss),
        *comparing.regression(),
        match="the gradient of a sum grows with the size",
        policy=policy,
    )


def test_sums_are_refused_where_the_rate_is_for_another_size():
    model = compiled(dense, loss=losses.MeanSquaredError(reduction="sum"))()
    scaled = kb.LearningRateScaling(
        "linear", base_batch_size=8, batch_size=SUPERBATCH
    )
    with pytest.raises(ValueError, match="32 examples with the rate for 8"):
        model.fit(
            *comparing.regression(), SUPERBATCH, callbacks=[scaled], verbose=0
        )


@pytest.mark.parametrize(
    ("policy", "reduction"),
    [
        ("fixed", "sum"),
        ("fixed", "none"),
        (BatchSizeSchedule({0: comparing.BASE}), "sum"),
    ],
)
def test_sums_of_one_size_are_those_of_plain_fit(policy, reduction):
    loss = losses.MeanSquaredError(reduction=reduction)
    make_model = compiled(
        dense, loss=loss, optimizer=lambda: keras.optimizers.SGD(0.001)
    )
    data = comparing.regression()
    ours = adaptive(
        make_model, *data, policy=policy, max_batch_size=comparing.BASE
    )
    comparing.assert_same(ours, plain(make_model, *data))


def test_every_reduction_of_keras_is_tried():
    tried = {
        "sum", "none", None, "mean", "mean_with_sample_weight",
        "sum_over_batch_size",
    }
    with pytest.raises(ValueError) as caught:
        losses.MeanSquaredError(reduction="?")
    listed = str(caught.value).split("{")[1].split("}")[0]
    known = {
        None if name == "None" else name.strip("'")
        for name in listed.split(", ")
    }
    assert known == tried, "Say in exactness.normaliser what it divides by."


def test_own_weights_per_output_are_refused():
    each = losses.MeanSquaredError(reduction="mean_with_sample_weight")

    def make():
        model = comparing.two_outputs()
        model.compile(
            loss={"size": each, "kind": "sparse_categorical_crossentropy"}
        )
        return model

    assert_refused(
        make, *comparing.for_two_outputs(), match="another sum of weights"
    )


def test_own_weights_per_output_are_refused_with_one_loss_for_all():
    inputs = keras.Input((comparing.FEATURES,))

    def make():
        model = keras.Model(
            inputs, [layers.Dense(1)(inputs), layers.Dense(1)(inputs)]
        )
        model.compile(
            loss=losses.MeanSquaredError(reduction="mean_with_sample_weight")
        )
        return model

    x, y = comparing.regression()
    assert_refused(make, x, [y, y], match="another sum of weights")


# Losses that look at a batch as a whole.


def to_classes(y):
    return keras.utils.to_categorical(y, comparing.CLASSES)


def softmax(units=comparing.CLASSES):
    return dense(units=units, activation="softmax")


@pytest.mark.parametrize(
    "loss",
    [
        losses.Dice(),
        losses.Tversky(),
        "dice",
        losses.tversky,
        "Dice",
    ],
    ids=["Dice", "Tversky", "dice", "tversky", "by class name"],
)
def test_losses_over_all_examples_are_refused(loss):
    x, y = comparing.classification()
    assert_refused(
        compiled(softmax, loss=loss),
        x,
        to_classes(y),
        match="compares all examples",
    )


@pytest.mark.parametrize("loss", [losses.Circle(), "circle"])
def test_circle_is_refused(loss):
    def make():
        return keras.Sequential(
            [dense(units=4), layers.UnitNormalization()]
        )

    assert_refused(
        compiled(make, loss=loss),
        *comparing.classification(),
        match="compares all examples",
    )


def test_dice_of_each_example_is_exact():
    x, y = comparing.classification()
    loss = losses.Dice(axis=(1,))
    assert_exact(compiled(softmax, loss=loss), x, to_classes(y))


def spread(y_true, y_pred):
    """A user's loss that compares the examples of a batch."""
    error = keras.ops.square(y_true - y_pred)
    return error + 0.1 * keras.ops.var(y_pred)


def test_own_loss_that_compares_examples_is_refused():
    assert_refused(
        compiled(dense, loss=spread),
        *comparing.regression(),
        match="put together from pairs",
    )


def test_few_examples_show_that_a_loss_compares_them():
    x, y = comparing.regression(12)
    assert_refused(
        compiled(dense, loss=spread), x, y, match="put together from pairs"
    )


NOTHING = -9.0


def masked_mean(y_true, y_pred):
    """A user's loss that is divided by the number of targets that count."""
    counts = keras.ops.cast(y_true != NOTHING, y_pred.dtype)
    error = keras.ops.square(y_true - y_pred)
    return keras.ops.sum(counts * error) / keras.ops.sum(counts)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_own_loss_of_which_a_pair_has_nothing_is_refused(dtype):
    # All other pairs count in full: nothing else shows that it is no mean.
    x, y = comparing.regression()
    y[2:4] = NOTHING
    assert_refused(
        comparing.of_dtype(compiled(dense, loss=masked_mean), dtype),
        x,
        y,
        match="put together from pairs it is nan",
        shuffle=False,
    )


@pytest.mark.parametrize(
    "reduction", ["sum_over_batch_size", "mean_with_sample_weight"]
)
def test_weights_of_zero_leave_a_mean_a_mean(reduction):
    weights = np.ones(comparing.EXAMPLES)
    weights[2:6] = 0.0
    loss = losses.MeanSquaredError(reduction=reduction)
    assert_exact(
        compiled(dense, loss=loss),
        *comparing.regression(),
        sample_weight=weights,
        shuffle=False,
    )


def test_own_loss_of_each_example_is_exact():
    assert_exact(
        compiled(dense, loss=lambda y, p: keras.ops.abs(y - p) ** 1.5),
        *comparing.regression(),
    )


def test_own_loss_that_is_a_mean_already_is_exact():
    def mean_of_all(y, y_pred):
        return keras.ops.mean(keras.ops.square(y - y_pred))

    assert_exact(
        compiled(dense, loss=mean_of_all), *comparing.regression()
    )


def test_ignored_classes_are_refused():
    # None of the first examples is of it, so trying would not notice.
    x, y = comparing.classification(140)
    loss = losses.SparseCategoricalCrossentropy(ignore_class=7)
    assert_refused(
        compiled(softmax, loss=loss),
        x,
        y,
        match="labels that are not ignored",
    )


# Losses added by layers.


class Penalty(layers.Layer):
    """Adds a loss of its inputs, summed or averaged over the examples."""

    def __init__(self, reduce):
        super().__init__()
        self.reduce = reduce

    def call(self, x):
        self.add_loss(0.01 * self.reduce(keras.ops.sum(x**2, axis=-1)))
        return x


def with_penalty(reduce):
    return lambda: keras.Sequential(
        [
            keras.Input((comparing.FEATURES,)),
            layers.Dense(1),
            Penalty(reduce),
        ]
    )


def test_added_mean_is_exact():
    assert_exact(
        compiled(with_penalty(keras.ops.mean)), *comparing.regression()
    )


def test_added_sum_is_refused():
    assert_refused(
        compiled(with_penalty(keras.ops.sum)),
        *comparing.regression(),
        match="put together from pairs",
    )


@pytest.mark.parametrize("regulariser", ["kernel", "activity"])
def test_regularisers_are_exact(regulariser):
    options = {f"{regulariser}_regularizer": keras.regularizers.L2(0.1)}
    assert_exact(
        compiled(lambda: dense(**options)), *comparing.regression()
    )


def test_model_without_compiled_loss_is_exact():
    assert_exact(
        compiled(with_penalty(keras.ops.mean), loss=None),
        *comparing.regression(),
    )


# Models with a loss of their own.


class WithLoss(keras.Model):
    """Overrides `compute_loss`; `reduce` makes one number of the errors."""

    reduce = staticmethod(keras.ops.mean)

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(1)

    def call(self, x):
        return self.out(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return self.reduce(keras.ops.abs(y - y_pred))


class WithSum(WithLoss):
    reduce = staticmethod(keras.ops.sum)


def test_overridden_compute_loss_is_exact_if_it_is_a_mean():
    assert_exact(compiled(WithLoss), *comparing.regression())


def test_overridden_compute_loss_is_refused_if_it_is_a_sum():
    assert_refused(
        compiled(WithSum),
        *comparing.regression(),
        match="put together from pairs",
    )


class Sampling(layers.Layer):
    """Adds noise in inference, too, as a variational autoencoder does."""

    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(3)

    def call(self, x):
        return x + keras.random.normal(
            keras.ops.shape(x), stddev=0.1, seed=self.seeds
        )


def test_model_that_is_random_in_inference_passes():
    def make():
        return keras.Sequential(
            [keras.Input((comparing.FEATURES,)), Sampling(), layers.Dense(1)]
        )

    data = comparing.regression()
    # Trying the loss out takes no seeds away from training.
    ours = adaptive(compiled(make), *data, policy="measure", measure_every=1)
    comparing.assert_same(ours, plain(compiled(make), *data))


class DropsAlways(layers.Layer):
    """Drops units in inference, too, as for an estimate of uncertainty."""

    def __init__(self):
        super().__init__()
        self.dropout = layers.Dropout(0.5, seed=4)

    def call(self, x):
        return self.dropout(x, training=True)


class NoisyAlways(layers.Layer):
    """Adds Gaussian noise in inference, too."""

    def __init__(self):
        super().__init__()
        self.noise = layers.GaussianNoise(0.3, seed=5)

    def call(self, x):
        return self.noise(x, training=True)


class RarelyOff(layers.Layer):
    """Is off at each fifth call, as a layer with a stochastic depth may be.

    Two draws of the whole agree then, and those of the pairs do not.
    """

    def __init__(self):
        super().__init__()
        self.calls = self.add_weight(
            shape=(), initializer="zeros", trainable=False, dtype="int32"
        )

    def call(self, x):
        on = keras.ops.cast(self.calls % 5 != 3, "float32")
        self.calls.assign_add(1)
        return x * on


RANDOM = [Sampling, DropsAlways, NoisyAlways]


def random_with_penalty(layer, reduce):
    return lambda: keras.Sequential(
        [
            keras.Input((comparing.FEATURES,)),
            layer(),
            layers.Dense(1),
            Penalty(reduce),
        ]
    )


@pytest.mark.parametrize("layer", RANDOM)
def test_added_sum_is_refused_in_a_model_that_is_random_in_inference(layer):
    assert_refused(
        compiled(random_with_penalty(layer, keras.ops.sum)),
        *comparing.regression(),
        match="in the mean of 8 draws: it is random",
    )


@pytest.mark.parametrize("layer", [*RANDOM, RarelyOff])
def test_added_mean_passes_in_a_model_that_is_random_in_inference(layer):
    trained = adaptive(
        compiled(random_with_penalty(layer, keras.ops.mean)),
        *comparing.regression(),
        policy="measure",
        measure_every=1,
    )
    assert np.isfinite(trained.history["loss"]).all()


def test_infinite_loss_proves_nothing():
    x, y = comparing.regression()
    y[3] = np.inf
    with pytest.warns(RuntimeWarning, match="The loss became"):
        adaptive(compiled(dense), x, y, policy="measure", epochs=1)


@pytest.mark.parametrize("dtype", ["mixed_float16", "float32"])
def test_a_pair_too_large_for_half_precision_proves_nothing(dtype):
    def mean(values):
        # A pair of 50,000 each, times 4, is beyond 65,504; the whole is not.
        values = 4.0 * keras.ops.mean(keras.ops.cast(values, "float32"))
        return keras.ops.cast(keras.ops.cast(values, "float16"), "float32")

    def of_inputs():
        inputs = keras.Input((comparing.FEATURES,))
        return keras.Sequential([inputs, Penalty(mean), layers.Dense(1)])

    model = comparing.of_dtype(compiled(of_inputs), dtype)()
    x, y = np.zeros((16, comparing.FEATURES)), np.zeros((16, 1))
    x[2:4] = 100.0
    data = tf.constant(x, "float32"), tf.constant(y, "float32")
    model.evaluate(*data, verbose=0)
    if dtype == "mixed_float16":
        exactness.check_loss(model, "examples", data)
    else:
        with pytest.raises(exactness.CannotBeCut, match="pairs it is inf"):
            exactness.check_loss(model, "examples", data)


def test_outputs_with_masks_of_their_own_are_refused():
    def make():
        tokens = keras.Input((4,))
        embedded = layers.Embedding(5, 2, mask_zero=True)(tokens)
        model = keras.Model(
            tokens, [layers.Dense(1)(embedded), layers.Dense(1)(embedded)]
        )
        model.compile(loss="mse")
        return model

    x = np.random.default_rng(0).integers(0, 5, size=(64, 4))
    y = np.ones((64, 4, 1), "float32")
    assert_refused(make, x, [y, y], match="several outputs and masks")


# Models with logs of their own.


class WithLogs(keras.Model):
    """Logs what is no metric: in `fit`, that of an epoch's last batch."""

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(2)

    def call(self, x):
        return self.out(x)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        means = {
            "mean_output": keras.ops.mean(y_pred),
            "each_output": keras.ops.mean(y_pred, axis=0)[1],
            "constant": 2,
        }
        return {**logs, **means}


@pytest.mark.parametrize(
    ("examples", "jit_compile"),
    # Compiling takes seconds, of what holds for all three.
    [(70, False), (128, False), (150, False), (150, True)],
)
def test_own_logs_are_those_of_the_whole_batch(examples, jit_compile):
    make = compiled(WithLogs, metrics=["mae"], jit_compile=jit_compile)
    assert_exact(make, *comparing.regression(examples))


def test_own_logs_are_there_in_every_epoch():
    trained = adaptive(
        compiled(WithLogs),
        *comparing.regression(),
        policy=BatchSizeSchedule({0: BASE, 1: 2 * SUPERBATCH, 2: BASE}),
        max_batch_size=2 * SUPERBATCH,
        epochs=3,
    )
    for name in ("mean_output", "each_output", "constant", "loss"):
        assert len(trained.history[name]) == 3


# Models with a training step of their own.


class WithStep(keras.Model):
    """Trains in a step of its own and says so in its own logs."""

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(1)
        self.seen = self.add_weight(
            shape=(), initializer="zeros", trainable=False
        )

    def call(self, x):
        return self.out(x)

    def train_step(self, data):
        x, y = data
        error = keras.ops.mean((y - self(x)) ** 2)
        self.seen.assign_add(keras.ops.cast(keras.ops.shape(x)[0], "float32"))
        gradients = [
            0.01 * keras.ops.ones_like(weight) * error
            for weight in self.trainable_weights
        ]
        self.optimizer.apply(gradients, self.trainable_weights)
        return {"my_error": error, "seen": self.seen.value, "two": 2.0}


POLICIES = {
    "fixed": "fixed",
    "plateau": kb.policies.GrowOnPlateau("my_error", mode="min"),
    "schedule": BatchSizeSchedule({0: comparing.BASE}),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_overridden_train_step_keeps_its_logs(policy):
    data = comparing.regression()
    make_model = compiled(WithStep)

    ours = adaptive(make_model, *data, policy=POLICIES[policy])
    theirs = plain(make_model, *data)

    assert set(theirs.history) == {"my_error", "seen", "two"}
    comparing.assert_same(ours, theirs)


def with_step_of_its_own():
    """A model that was given the step itself, not by its class."""

    def train_step(self, data):
        x, y = data
        error = keras.ops.mean((y - self(x)) ** 2)
        steps = [0.01 * error * one for one in self.trainable_weights]
        self.optimizer.apply(steps, self.trainable_weights)
        return {"my_error": error}

    model = compiled(dense)()
    model.train_step = types.MethodType(train_step, model)
    return model


def test_a_train_step_that_only_this_model_has_is_seen():
    data = comparing.regression()

    ours = adaptive(with_step_of_its_own, *data, policy="fixed")
    theirs = plain(with_step_of_its_own, *data)

    assert set(theirs.history) == {"my_error"}
    comparing.assert_same(ours, theirs)
    error = error_of(with_step_of_its_own, {"policy": "goodput"})
    assert "overrides `train_step`" in error


def test_overridden_train_step_follows_a_schedule():
    trained = adaptive(
        compiled(WithStep),
        *comparing.regression(),
        policy=BatchSizeSchedule({1: SUPERBATCH}),
    )
    assert trained.history["batch_size"] == [comparing.BASE, SUPERBATCH]
    assert int(trained.model.optimizer.iterations) == 9 + 3


NO_POLICY = 'use policy="plateau", "fixed" or a `BatchSizeSchedule`'
NO_RULE = 'scale the rate by "linear", "sqrt" or "none"'

# Arguments that ask for gradients, and the edits after which none does.
ASKING = {
    "policy": ({"policy": "goodput"}, [NO_POLICY]),
    "rule": (
        {"policy": "fixed", "learning_rate_scaling": "adascale"},
        [NO_RULE],
    ),
    "rule without a name": (
        {
            "policy": "fixed",
            "learning_rate_scaling": functools.partial(scaling.adascale),
        },
        [NO_RULE],
    ),
    "both": (
        {"policy": "measure", "learning_rate_scaling": "adascale"},
        [NO_POLICY, NO_RULE],
    ),
    "measuring": (
        {"policy": "fixed", "measure_every": 4},
        ['leave measure_every="auto"'],
    ),
    "accumulating": (
        {
            "policy": kb.policies.Fixed(2 * SUPERBATCH),
            "max_batch_size": 2 * SUPERBATCH,
        },
        [f"use max_batch_size={SUPERBATCH}, the superbatch"],
    ),
}


def error_of(make_model, arguments):
    with pytest.raises(ValueError, match="Received: ") as caught:
        adaptive(make_model, *comparing.regression(), **arguments)
    return str(caught.value)


@pytest.mark.parametrize(("arguments", "edits"), ASKING.values(), ids=ASKING)
def test_overridden_train_step_is_refused_where_gradients_are_needed(
    arguments, edits
):
    error = error_of(compiled(WithStep), arguments)

    assert "Received: model of type WithStep, with " in error
    assert "Override `compute_loss`" in error
    # What is not the cause is not to be changed.
    assert f"Or {' and '.join(edits)}: no gradients" in error


@pytest.mark.parametrize(("arguments", "edits"), ASKING.values(), ids=ASKING)
def test_an_error_of_a_loss_names_what_asks_for_gradients(arguments, edits):
    loss = losses.MeanSquaredError(reduction="sum")
    error = error_of(compiled(dense, loss=loss), arguments)

    constraint, rest = error.split("Received: ")
    assert "must be a mean over examples" in constraint
    assert "reduction=['sum']" in rest
    assert 'Use reduction="sum_over_batch_size"' in rest
    assert f"Or {' and '.join(edits)}: no batch is cut then." in rest
