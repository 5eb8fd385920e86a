"""The probe leaves everything as it was, bit for bit, however it ended.

A model that was probed and one that was not, of the same seeds, train on: their
losses, variables, names and random numbers must be the same.
"""

import functools
import math
import random

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_batchsize as kb
from keras_batchsize import _memory_workload
from keras_batchsize import memory


class Noise(keras.layers.Layer):
    """Draws from Keras's global seed generator."""

    def call(self, x, training=False):
        if not training:
            return x
        noise = keras.random.normal(keras.ops.shape(x), dtype=x.dtype)
        return x + noise / 100


def image_model(policy, jit_compile, built, eager=False):
    """All that has state: BatchNorm, dropout, global seeds, slots, EMA."""
    keras.config.set_dtype_policy(policy)
    try:
        layers = [
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            Noise(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(3, dtype="float32"),
        ]
    finally:
        keras.config.set_dtype_policy("float32")
    inputs = [keras.Input((6, 6, 1))] if built else []
    model = keras.Sequential(inputs + layers)
    schedule = keras.optimizers.schedules.CosineDecay(1e-2, 100)
    model.compile(
        keras.optimizers.AdamW(schedule, use_ema=True, clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=jit_compile,
        run_eagerly=eager,
    )
    return model


def everything(model):
    """All that a probe might change, as comparable values."""
    history = model.fit(*images(), batch_size=10, epochs=2, verbose=0)
    return {
        "losses": history.history,
        "variables": {
            name: value.tobytes()
            for name, value in comparing.variables_of(model).items()
        },
        "name": keras.layers.Dense(1).name,
        "random": random.random(),
        "numpy": np.random.rand(),
        "seed": tf.random.uniform(()).numpy(),
    }


def images():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 6, 6, 1)).astype("float32")
    return x, rng.integers(0, 3, 30)


def float8_model():
    """Scales of float8 are weights whose gradient is their new value."""
    layers = [
        keras.layers.Flatten(),
        keras.layers.Dense(8, dtype="float8_from_float32"),
        keras.layers.Dense(3),
    ]
    model = keras.Sequential([keras.Input((6, 6, 1)), *layers])
    model.compile(
        "adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return model


def test_float8_is_probed_where_it_runs():
    model = comparing.seeded(float8_model)
    try:
        model.train_on_batch(*images())
    except (NotImplementedError, TypeError, tf.errors.OpError) as error:
        pytest.skip(f"float8 does not run here: {error}")
    outcomes = []
    for probes in (False, True):
        model = comparing.seeded(float8_model)
        if probes:
            profile = kb.find_max_batch_size(
                model, *images(), maximum=20, time_budget=math.inf
            )
            assert profile.max_batch_size == 20
            assert "float8" in profile.dtype_policy
        outcomes.append(everything(model))
    assert outcomes[0] == outcomes[1]


@functools.cache
def trained_after(probes, policy, jit_compile, built, warm, eager=False):
    """What is left of a model after a training, a probe, and a training."""
    model = prepared(policy, jit_compile, built, warm, eager)
    if probes:
        before = metrics_of(model)
        # With XLA each size more takes seconds.
        profile = kb.find_max_batch_size(
            *(model, *images()),
            start=20 if jit_compile else 1,
            maximum=20,
            time_budget=math.inf,
        )
        assert profile.max_batch_size == 20
        assert profile.jit_compile == jit_compile
        # Those that the probe made, of a model never trained, are at zero.
        after = metrics_of(model)
        assert after[: len(before)] == before
        assert not any(after[len(before) :])
    return everything(model)


def metrics_of(model):
    """Returns what the metrics have summed up, as a list of numbers."""
    return [float(one.value) for one in model.metrics_variables]


def prepared(policy, jit_compile, built, warm, eager=False):
    """Returns a model, trained before if it is to be warm."""
    model = comparing.seeded(
        lambda: image_model(policy, jit_compile, built, eager)
    )
    if warm:
        model.fit(*images(), batch_size=10, verbose=0)
    return model


def compiled_by_xla(policy, built, warm):
    """A case that takes more than ten seconds."""
    return pytest.param(policy, True, built, warm, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("policy", "jit_compile", "built", "warm"),
    [
        # Of each pair of policy, compiler and temperature one at least.
        ("float32", False, True, False),
        ("float32", False, True, True),
        ("mixed_float16", False, False, False),
        ("mixed_bfloat16", False, True, True),
        compiled_by_xla("float32", built=False, warm=True),
        compiled_by_xla("mixed_float16", built=True, warm=True),
        compiled_by_xla("mixed_bfloat16", built=False, warm=False),
    ],
)
def test_training_after_a_probe_is_training_without(
    policy, jit_compile, built, warm
):
    case = (policy, jit_compile, built, warm)
    assert trained_after(True, *case) == trained_after(False, *case)


def test_training_after_an_eager_probe_is_training_without():
    case = ("mixed_float16", False, False, False, True)
    assert trained_after(True, *case) == trained_after(False, *case)


# After an error, in the middle of a trial.


def parts_of(model):
    """Returns the values of all that a step changes, by what it is."""
    seeds, statistics = [], []
    for variable in model.non_trainable_variables:
        is_seed = "seed_generator" in variable.path
        (seeds if is_seed else statistics).append(variable)
    groups = {
        "weights": model.trainable_variables,
        "statistics": statistics,
        "seeds": seeds,
        "metrics": model.metrics_variables,
        "slots": model.optimizer.variables,
    }
    return {
        name: [np.array(keras.ops.convert_to_numpy(one)) for one in group]
        for name, group in groups.items()
    }


def same(ours, theirs):
    """Whether two lists of arrays are equal, bit for bit."""
    return len(ours) == len(theirs) and all(
        one.tobytes() == two.tobytes() for one, two in zip(ours, theirs)
    )


# What a trial runs, or what is traced before, in which call it is to fail, and
# the parts of a model that have changed then.
TRAINED = {"weights", "statistics", "seeds", "metrics", "slots"}
RUNS = {
    "forward_of": (1, set()),
    "_plain": (3, TRAINED),
    "_summed": (2, TRAINED),
    "_validate": (1, {"metrics"}),
}


def break_after(monkeypatch, run, error, note):
    """Lets a part of a trial fail when it has run."""
    calls = []

    def breaking(function):
        @functools.wraps(function)
        def runs(*arguments, **options):
            result = function(*arguments, **options)
            calls.append(run)
            if len(calls) == RUNS[run][0]:
                note()
                # What a user's own step may draw, too. Of another type than
                # below: a kernel that was made for a seed counts on.
                random.random(), np.random.rand()
                tf.random.uniform((), dtype="float64")
                keras.layers.Dense(1)
                raise error("made up")
            return result

        return runs

    if run == "_validate":
        # Another function for each workload.
        make = memory.Workload._validation_step
        monkeypatch.setattr(
            memory.Workload,
            "_validation_step",
            lambda self: breaking(make(self)),
        )
        return
    place = memory.Workload
    if run == "forward_of":
        place = _memory_workload
    monkeypatch.setattr(place, run, breaking(getattr(place, run)))


@pytest.mark.parametrize(
    ("error", "run", "warm"),
    [
        (KeyboardInterrupt, "forward_of", True),
        (KeyboardInterrupt, "_plain", False),
        (RuntimeError, "_summed", True),
        (KeyboardInterrupt, "_validate", False),
    ],
)
def test_all_is_as_before_after_an_error_in_a_trial(
    error, run, warm, monkeypatch
):
    model = prepared("float32", False, True, warm)
    attributes, before, broken = dict(vars(model)), parts_of(model), []
    with monkeypatch.context() as patched:
        break_after(
            patched, run, error, lambda: broken.append(parts_of(model))
        )
        with pytest.raises(error, match="made up"):
            kb.find_max_batch_size(
                *(model, *images()),
                maximum=20,
                accumulates=True,
                time_budget=math.inf,
            )
    # It did come in the middle, when nothing was as before.
    (during,) = broken
    changed = {name for name in before if not same(before[name], during[name])}
    assert changed >= RUNS[run][1]
    after = parts_of(model)
    for name, values in before.items():
        # Slots and metrics of a model never trained are there now, unused.
        assert same(after[name][: len(values)], values), name
    assert vars(model).keys() == attributes.keys()
    for name, value in attributes.items():
        # Functions, the optimizer, what `compile` made. One flag tells that a
        # model has been called.
        assert vars(model)[name] is value or name == "_called", name
    case = ("float32", False, True, warm)
    assert everything(model) == trained_after(False, *case)
