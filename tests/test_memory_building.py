"""A probe makes the variables of an eager model as plain `fit` would.

The oracle is a twin that is trained without a probe: bit for bit the same
losses, variables and random states.
"""

import math
import random

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_batchsize as kb


class WithStep(keras.Model):
    """Has a step of its own: the loss of two layers, one per optimizer."""

    def __init__(self):
        super().__init__()
        self.one, self.other = keras.layers.Dense(4), keras.layers.Dense(1)

    def predicted(self, x):
        return self.other(self.one(x))

    def apply(self, pairs):
        self.optimizer.apply_gradients(pairs)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.predicted(x) - y))
        variables = self.one.trainable_weights + self.other.trainable_weights
        gradients = tape.gradient(loss, variables)
        self.apply(list(zip(gradients, variables)))
        return {"loss": loss}


class WithTwoOptimizers(WithStep):
    """Has an optimizer that `compile` does not know."""

    def __init__(self):
        super().__init__()
        # Its slots do not start from zero.
        self.others = [keras.optimizers.Adagrad(0.1, 0.7)]

    def apply(self, pairs):
        self.optimizer.apply_gradients(pairs[:2])
        self.others[0].apply_gradients(pairs[2:])


class DrawsInStep(WithStep):
    """Draws from the random states of Python and NumPy in each step."""

    def predicted(self, x):
        noise = random.gauss(0.0, 0.1) + np.random.normal(0.0, 0.1)
        return super().predicted(x) + noise


class KeepsTensors(WithStep):
    """Keeps what it computes from step to step, in its layers, too."""

    average = None

    def predicted(self, x):
        predicted = super().predicted(x)
        mean = tf.reduce_mean(predicted)
        if self.average is not None:
            mean = 0.9 * self.average + 0.1 * mean
        self.average = mean
        self.one.last = {"mean": [mean + getattr(self.one, "offset", 0.0)]}
        self.one.offset = mean
        return predicted


class Scaled(keras.layers.Layer):
    """Draws the seed of its weight where that is made."""

    def build(self, input_shape):
        self.scale = self.add_weight(
            shape=input_shape[1:], initializer="random_normal"
        )
        self.turned = self.add_weight(
            shape=(4, 4), initializer="orthogonal", trainable=False
        )

    def call(self, x):
        return x * self.scale


class Samples(keras.layers.Layer):
    """Draws also where nothing is trained, as the middle of a VAE does."""

    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(1337)

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x), seed=self.seeds)


class SharesSeeds(keras.layers.Layer):
    """Draws from the seeds that layers without their own ones share."""

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x))


def of_layers():
    layers = [
        keras.layers.Dense(4),
        Scaled(),
        keras.layers.BatchNormalization(),
        Samples(),
        SharesSeeds(),
        keras.layers.Dense(1),
    ]
    return keras.Sequential(layers)


MODELS = {
    "a step": WithStep,
    "optimizers": WithTwoOptimizers,
    "draws": DrawsInStep,
    "tensors": KeepsTensors,
    "layers": of_layers,
}


def compiled(make_model):
    """Returns a function that makes a model which runs eagerly."""

    def make():
        model = make_model()
        loss = None if isinstance(model, WithStep) else "mse"
        model.compile("adam", loss, run_eagerly=True)
        return model

    return make


def probed(model):
    """Probes a model."""
    profile = kb.find_max_batch_size(
        model, *comparing.regression(16), maximum=8, time_budget=math.inf
    )
    assert profile.max_batch_size == 8


def trained_after(act, make):
    """Returns all that is left of a training after something was done."""
    model = comparing.seeded(make)
    act(model)
    # It would draw from NumPy's state, were it to shuffle.
    history = model.fit(
        *comparing.regression(32), batch_size=8, shuffle=False, verbose=0
    )
    optimizers = [model.optimizer, *getattr(model, "others", [])]
    slots = [one for each in optimizers for one in each.variables]
    return {
        "losses": history.history["loss"],
        "variables": [
            np.array(one).tobytes() for one in [*model.variables, *slots]
        ],
        "random": random.random(),
        "numpy": np.random.rand(),
    }


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_runs_eagerly_is_left_as_it_was(kind):
    make = compiled(MODELS[kind])
    without = trained_after(lambda model: None, make)
    assert trained_after(probed, make) == without


class ReadsValues(keras.Model):
    """Cannot be traced: it reads what it computes."""

    def __init__(self):
        super().__init__()
        self.one, self.scaled = keras.layers.Dense(4), Scaled()
        self.other = keras.layers.Dense(1)

    def call(self, x):
        x = self.scaled(self.one(x))
        return self.other(x if float(keras.ops.sum(x)) > 0.0 else -x)


def test_an_eager_model_that_no_trace_builds_is_refused():
    def refused(model):
        with pytest.raises(ValueError, match="Received: a ReadsValues") as why:
            probed(model)
        assert "train_on_batch" in str(why.value)

    make = compiled(ReadsValues)
    without = trained_after(lambda model: None, make)
    assert trained_after(refused, make) == without
    # What the error says is enough.
    model = comparing.seeded(make)
    model.train_on_batch(*comparing.regression(8))
    probed(model)


class ReadsBesideATeacher(ReadsValues):
    """Holds a compiled model that it never trains."""

    def __init__(self):
        super().__init__()
        self.teacher = keras.Sequential([keras.layers.Dense(1)])
        self.teacher.compile("adam", "mse")


def test_what_a_trained_model_has_not_built_it_does_not_use():
    model = comparing.seeded(compiled(ReadsBesideATeacher))
    model.train_on_batch(*comparing.regression(8))
    probed(model)


class BuiltReadsValues(WithStep):
    """Is built, and cannot be traced."""

    def __init__(self):
        super().__init__()
        self.one.build((None, comparing.FEATURES))
        self.other.build((None, 4))

    def predicted(self, x):
        return super().predicted(x) * (1.0 if float(x[0, 0]) > 0.0 else 2.0)


def test_an_eager_model_that_is_built_needs_no_trace():
    make = compiled(BuiltReadsValues)
    without = trained_after(lambda model: None, make)
    assert trained_after(probed, make) == without


def test_no_optimizer_is_built_for_no_variables():
    model = compiled(of_layers)()
    model.trainable = False
    with pytest.warns(UserWarning, match="does not have any trainable"):
        probed(model)
    assert not model.optimizer.built
