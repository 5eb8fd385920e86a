"""Kept profiles: what makes a model another one, and what does not."""

import dataclasses
import functools
import os
import platform
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_batchsize as kb
from keras_batchsize import _memory_cache
from keras_batchsize import _memory_host
from keras_batchsize import _memory_key
from keras_batchsize import memory
from keras_batchsize._memory_meters import Meter
from keras_batchsize.batch_profile import BatchProfile
from keras_batchsize.batch_profile import ProfileRow

X, Y = np.zeros((48, 8, 8, 1), "float32"), np.zeros((48, 1), "float32")
FOUND = BatchProfile([ProfileRow(4, 10, None, 0.1, True)], 4, "maximum")


def doubled(x):
    return 2.0 * x


def own_loss(weight):
    def loss(y, y_pred):
        return weight * keras.ops.mean(keras.ops.square(y - y_pred), -1)

    return loss


class OwnLoss(keras.losses.Loss):
    def __init__(self, parts=1):
        super().__init__()
        self.parts = parts

    def call(self, y, y_pred):
        return keras.ops.mean(keras.ops.repeat(y - y_pred, self.parts), -1)

    def get_config(self):
        return {**super().get_config(), "parts": self.parts}


def model_of(
    activation="relu",
    strides=1,
    rate=0.1,
    side=8,
    dtype="float32",
    skips=False,
    function=doubled,
    optimizer="adam",
    loss="mse",
    **settings,
):
    inputs = keras.Input((side, side, 1))
    convolution = keras.layers.Conv2D(
        2, 3, strides=strides, padding="same", activation=activation,
        dtype=dtype,
    )
    hidden = once = convolution(inputs)
    hidden = keras.layers.Dropout(rate)(hidden)
    hidden = keras.layers.Lambda(function)(hidden)
    if skips:
        hidden = hidden + once
    else:
        hidden = hidden + hidden
    hidden = keras.layers.GlobalAveragePooling2D()(hidden)
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile(optimizer, loss, **settings)
    return model


def digest(model):
    return _memory_key.digest_of(_memory_key.described(model))


SAME = {
    "nothing": {},
    "lambda": {"function": lambda x: 3.0 * x},
    "dict of losses": {"loss": {"out": keras.losses.MeanSquaredError}},
    "list of losses": {"loss": [keras.losses.Huber]},
    "function": {"loss": functools.partial(own_loss, 2.0)},
    "own class": {"loss": OwnLoss},
    "metrics": {"metrics": ["mae", keras.metrics.MeanSquaredError]},
    "momentum": {"optimizer": functools.partial(keras.optimizers.SGD, 0.1)},
}


def made(setting):
    """Makes objects anew from classes and functions, all the way down."""
    if isinstance(setting, dict):
        return {name: made(value) for name, value in setting.items()}
    if isinstance(setting, list):
        return [made(value) for value in setting]
    if isinstance(setting, (type, functools.partial)):
        return setting()
    return setting


@pytest.mark.parametrize("settings", SAME.values(), ids=SAME)
def test_a_model_that_is_built_twice_is_the_same(settings):
    first, second = (model_of(**made(settings)) for _ in range(2))
    assert first.layers[1].name != second.layers[1].name
    assert digest(first) == digest(second)


def test_all_that_takes_memory_or_time_makes_another_model():
    models = {
        "the first": model_of(),
        "activation": model_of(activation="tanh"),
        "own activation": model_of(activation=doubled),
        "strides": model_of(strides=2),
        "resolution": model_of(side=16),
        "no dropout": model_of(rate=0.0),
        "dtype": model_of(dtype="bfloat16"),
        "dtype policy": model_of(dtype="mixed_bfloat16"),
        "wiring": model_of(skips=True),
        "lambda": model_of(function=lambda x: 2.0 * x + 1.0),
        "other lambda": model_of(function=lambda x: 3.0 * x),
        "optimizer": model_of(optimizer="sgd"),
        "slots": model_of(optimizer=keras.optimizers.SGD(momentum=0.9)),
        "average": model_of(optimizer=keras.optimizers.Adam(use_ema=True)),
        "loss": model_of(loss="mae"),
        "own loss": model_of(loss=own_loss(1.0)),
        "own loss, otherwise": model_of(loss=own_loss(2.0)),
        "own class": model_of(loss=OwnLoss()),
        "own class, otherwise": model_of(loss=OwnLoss(2)),
        "dict of losses": model_of(loss={"out": keras.losses.Huber()}),
        "another": model_of(loss={"out": keras.losses.LogCosh()}),
        "metrics": model_of(metrics=["mae"]),
        "other metrics": model_of(metrics=["mse"]),
        "weighted": model_of(weighted_metrics=["mse"]),
        "eager": model_of(run_eagerly=True),
        "frozen": frozen(),
    }
    digests = {name: digest(model) for name, model in models.items()}
    assert len(set(digests.values())) == len(models), digests


def frozen():
    model = model_of()
    model.layers[1].trainable = False
    return model


def test_what_is_computed_twice_makes_another_model():
    def within(**scope):
        with keras.RematScope(**scope):
            return model_of()

    models = [
        model_of(),
        within(mode="full"),
        within(mode="larger_than", output_size_threshold=64),
        within(mode="larger_than", output_size_threshold=65),
    ]
    assert len({digest(model) for model in models}) == len(models)
    assert digest(within(mode="full")) == digest(models[1])


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, True), (11, True), (10, False)]
)
def test_a_profile_holds_where_there_is_the_memory_it_takes(limit, expected):
    assert _memory_cache.still_fits(FOUND, limit, 0.05) == expected


@pytest.mark.parametrize(
    ("limit", "expected"), [(1000, True), (990, True), (989, False)]
)
def test_a_profile_holds_where_a_trial_would_still_fit(limit, expected):
    # Of 1000 bytes 780 may be used: margin, data, what is lost. 730 were, and
    # 10 for each of 4 examples stay free for fragments.
    found = dataclasses.replace(
        FOUND,
        rows=[ProfileRow(4, 730, None, 0.1, True)],
        memory_limit=1000,
        usable_bytes=780,
        fragmentation_per_example=10.0,
    )
    assert _memory_cache.still_fits(found, limit, 0.05) == expected


def test_a_limit_that_is_given_does_not_hide_what_is_left(probes, monkeypatch):
    left = [10**9]

    class Emptier(Meter):
        def limit(self):
            return left[0], "host memory"

    monkeypatch.setattr(memory, "meter_for", lambda model: Emptier())
    assert probes(memory_limit=10**8)
    assert not probes(memory_limit=10**8)
    # Of 10 bytes the margin leaves less than what was taken.
    left[0] = 10
    assert probes(memory_limit=10**8)
    left[0] = None
    assert not probes(memory_limit=10**8)


def test_a_profile_that_cannot_be_kept_is_not_lost(tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.warns(RuntimeWarning, match="not be kept.*Received: cache"):
        _memory_cache.keep(FOUND, file / "profile.json")
    file.write_text("[]")
    assert _memory_cache.load(file) is None


def test_xla_makes_another_model():
    def small(jit_compile):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse", jit_compile=jit_compile)
        return model

    assert digest(small(True)) != digest(small(False))


def test_rates_seeds_and_training_do_not_matter():
    base = digest(model_of())
    assert digest(model_of(rate=0.7)) == base
    assert digest(model_of(optimizer=keras.optimizers.Adam(0.5))) == base
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    assert digest(model_of(optimizer=keras.optimizers.Adam(schedule))) == base
    model = model_of()
    model.fit(X, Y, verbose=0)
    assert digest(model) == base


class Subclassed(keras.Model):
    """Has no configuration that Keras could make."""

    def __init__(self, step, held=None):
        super().__init__()
        self.dense = keras.layers.Dense(1)
        self.step = step
        self.held = held
        self.unused = object()

    def call(self, x):
        if self.held is not None:
            x = x + 0.0
        return self.dense(keras.layers.Flatten()(x)[:, :: self.step])


def subclassed(*arguments):
    model = Subclassed(*arguments)
    model.compile("sgd", "mse")
    model(X[:1])
    return model


def test_a_subclassed_model_is_told_by_what_its_code_uses():
    base = digest(subclassed(64))
    assert digest(subclassed(64)) == base
    # Weights have the same shapes.
    assert digest(subclassed(65)) != base
    assert digest(subclassed(64, np.zeros(3))) != base
    with pytest.raises(_memory_key.NotDescribed, match="object"):
        digest(subclassed(64, object()))


class OwnCompile(Subclassed):
    """Keras has a configuration of it, but not of how it is compiled."""

    def compile(self, critic, rounds, **options):
        super().compile(**options)
        self.critic, self.rounds = critic, rounds

    def train_step(self, data):
        for _ in range(self.rounds):
            self.critic.build(self.trainable_variables)
        return super().train_step(data)

    def get_config(self):
        return {"step": self.step}


def test_what_an_own_compile_takes_makes_another_model():
    def of(critic, rounds=1):
        model = OwnCompile(64)
        model.compile(critic(), rounds, optimizer="sgd", loss="mse")
        return digest(model)

    base = of(keras.optimizers.Adam)
    assert of(keras.optimizers.Adam) == base
    assert of(keras.optimizers.SGD) != base
    assert of(keras.optimizers.Adam, 2) != base


def make_class(factor):
    class Scaled(keras.layers.Layer):
        def call(self, x):
            return factor * x

    return Scaled


def test_classes_of_one_name_are_told_by_their_code():
    def of(factor):
        model = keras.Sequential([keras.Input((3,)), make_class(factor)()])
        model.compile("sgd", "mse")
        return digest(model)

    assert of(2) == of(2) != of(3)


# What own code refers to.


def own_module(source):
    """Returns a module of the user's, from its text."""
    module = types.ModuleType("own")
    vars(module).update(keras=keras)
    exec(source, vars(module))
    return module


def digest_with(expression, scales="None", **held):
    """Returns the digest of a model whose own layer computes something.

    Args:
        expression: What it returns, by `x`.
        scales: Its class attribute SCALES, as text.
        **held: What else is in its module.
    """
    module = own_module("")
    vars(module).update(held)
    source = (
        "class Own(keras.layers.Layer):\n"
        f"    SCALES = {scales}\n"
        f"    def call(self, x):\n        return {expression}\n"
    )
    exec(source, vars(module))
    model = keras.Sequential([keras.Input((3,)), module.Own()])
    model.compile("sgd", "mse")
    return digest(model)


def heavy(times):
    return {"own": own_module(f"def heavy(x):\n    return x * {times}")}


def config(scales):
    source = (
        "class Config:\n"
        f"    SCALES = {scales}\n"
        "    def all(self):\n        return Config.SCALES\n"
    )
    return {"Config": own_module(source).Config}


EDITED = {
    "tuple": ("x * len(S)", {"S": (1, 2)}, {"S": (1, 2, 4, 8)}),
    "lists": ("x * len(S)", {"S": [[1], [2]]}, {"S": [[1], [3]]}),
    "dict": ("x * len(S)", {"S": {"a": (1, 2)}}, {"S": {"a": (1, 3)}}),
    "set": ("x * len(S)", {"S": {1, 2}}, {"S": {1, 2, 3}}),
    "class": ("x * len(Config.SCALES)", config((1, 2)), config((1, 2, 4))),
    "module": ("own.heavy(x)", heavy(2), heavy(3)),
    "attribute": (
        "x * len(self.SCALES)", {"scales": (1, 2)}, {"scales": (1, 2, 4)}
    ),
}


@pytest.mark.parametrize(
    ("expression", "one", "other"), EDITED.values(), ids=EDITED
)
def test_what_code_refers_to_makes_another_model(expression, one, other):
    first = digest_with(expression, **one)
    assert digest_with(expression, **one) == first
    assert digest_with(expression, **other) != first


def test_code_that_refers_to_itself_is_described_once():
    source = (
        "def down(n):\n    return again(n)\n"
        "def again(n):\n    return n and Own.times(down, n - 1) or ALL\n"
        "ALL = [down]\n"
        "ALL.append(ALL)\n"
        "class Own:\n    times = staticmethod(lambda f, n: Own and f(n))\n"
    )
    first, second = (
        digest_with("x if own.again(0) else x", own=own_module(source))
        for _ in range(2)
    )
    assert first == second


def test_a_description_is_the_same_in_another_process(run_python):
    code = (
        "import test_memory_cache as t;"
        "print(t.digest(t.model_of(loss=t.own_loss(2.0))))"
    )
    folder = __file__.rpartition("test_memory_cache")[0]
    process = run_python("-c", code, cwd=folder or ".")
    assert process.returncode == 0, process.stderr[-2000:]
    # Keras counts names on.
    digests = {digest(model_of(loss=own_loss(2.0))) for _ in range(3)}
    assert digests == {process.stdout.strip().splitlines()[-1]}


# Looked up.


@pytest.fixture
def probes(tmp_path, monkeypatch):
    """Returns a function that says whether a probe was run."""
    ran = []

    def probe(*_):
        ran.append(True)
        return FOUND

    monkeypatch.setattr(memory, "probe", probe)

    def run(model=None, x=X, y=Y, **arguments):
        ran.clear()
        model = model_of() if model is None else model
        found = kb.find_max_batch_size(
            model, x, y, cache=tmp_path, **arguments
        )
        assert found == FOUND
        return bool(ran)

    return run


def test_what_is_kept_is_found_again(probes):
    assert probes()
    assert not probes()
    assert probes(model_of(metrics=["mae"]))
    assert not probes(model_of(metrics=["mae"]))


@pytest.mark.parametrize(
    "arguments",
    [
        {"memory_limit": 10**9},
        {"maximum": 9},
        {"start": 2},
        {"safety_margin": 0.1},
        {"time_budget": 5.0},
        {"accumulates": True},
        {"y": np.zeros((48, 1), "int32")},
        {"x": X[:40], "y": Y[:40]},
        {"sample_weight": np.ones(48)},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_limits_and_data_are_told_apart(probes, arguments):
    assert probes()
    assert probes(**arguments)
    assert not probes(**arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TF_CPU_BFC_MEM_LIMIT_IN_MB", "500"),
        ("TF_GPU_ALLOCATOR", "cuda_malloc_async"),
        ("TF_FORCE_GPU_ALLOW_GROWTH", "true"),
        ("TF_MKL_ALLOC_MAX_BYTES", "100000000"),
        ("XLA_FLAGS", ""),
    ],
)
def test_allocators_are_told_apart_by_the_environment(
    probes, name, value, monkeypatch
):
    monkeypatch.delenv(name, raising=False)
    assert probes()
    monkeypatch.setenv(name, value)
    assert probes()
    assert not probes()


def test_processors_are_told_apart(probes, tmp_path, monkeypatch):
    file = tmp_path.parent / f"{tmp_path.name} cpuinfo"
    monkeypatch.setattr(_memory_host, "_CPUINFO", file)
    file.write_text("processor : 0\nmodel name\t: A CPU @ 2 GHz\nflags : fpu")
    for usable in ({0}, {0, 1}):
        monkeypatch.setattr(
            os, "sched_getaffinity", lambda _: usable, raising=False
        )
        assert probes()
        assert not probes()
    assert _memory_host.processor() == ("A CPU @ 2 GHz", 2)
    file.write_text("model name\t: Another\n")
    assert probes()
    file.unlink()
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert _memory_host.processor() == (platform.processor(), 3)


def test_limits_of_logical_devices_are_told_apart(probes, monkeypatch):
    def configure(limit):
        devices = [tf.config.LogicalDeviceConfiguration(memory_limit=limit)]
        monkeypatch.setattr(
            tf.config, "get_logical_device_configuration", lambda _: devices
        )

    configure(1000)
    assert probes()
    configure(2000)
    assert probes()
    configure(1000)
    assert not probes()


def test_a_child_process_is_told_apart(probes, monkeypatch):
    assert probes()
    ran = []
    monkeypatch.setattr(
        memory, "probe_in_process", lambda *_: ran.append(True) or FOUND
    )
    for _ in range(2):
        probes(isolation=True)
    assert len(ran) == 1


def test_what_could_be_another_model_is_not_kept(probes, tmp_path):
    model = subclassed(64, object())
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=r"Received: cache=.*object"):
            assert probes(model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cache", [True, False, 3, ["profiles"]])
def test_a_cache_that_is_no_folder_is_refused_at_once(cache):
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(TypeError, match="`cache` must.*Received: cache=.*Use"):
        kb.find_max_batch_size(model, X, Y, cache=cache)
    assert not model.built
    _memory_cache.check_folder("profiles")
