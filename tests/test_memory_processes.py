"""What takes a process of its own: real allocators, XLA, workers."""

import concurrent.futures
import json
import math
import os
import pathlib
import random
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_workers import TIME_LIMIT
from test_workers import config
from test_workers import free_ports

import keras_batchsize as kb
from keras_batchsize import _memory_process
from keras_batchsize import _memory_worker
from keras_batchsize import memory

SCRIPT = pathlib.Path(__file__).with_name("memory_in_process.py")
LIMIT = {
    "TF_CPU_ALLOCATOR_USE_BFC": "true",
    "TF_CPU_BFC_MEM_LIMIT_IN_MB": "150",
}


# Those that take longest first.
IN_A_PROCESS = {
    "xla_fails_three_times": LIMIT,
    "a_limit_is_kept": LIMIT,
    "training_goes_on": LIMIT,
    "training_takes_no_more_than_its_trial": {
        **LIMIT,
        "TF_CPU_BFC_MEM_LIMIT_IN_MB": "600",
    },
    "plain_fit_keeps_batches_of_arrays": LIMIT,
    "settled_memory_is_cut_to_measure": LIMIT,
}


@pytest.fixture(scope="module")
def under_a_limit(run_python):
    """Runs the laws of the script, two at a time: most of it is waiting."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(
                run_python,
                str(SCRIPT),
                name,
                environment=limit,
                timeout=TIME_LIMIT,
            )
            for name, limit in IN_A_PROCESS.items()
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_in_a_process(name, under_a_limit):
    process = under_a_limit[name].result()
    assert process.returncode == 0, process.stderr[-4000:]
    assert process.stdout.endswith("KEPT\n")


def run_workers(folder, environments):
    """Runs a worker in each environment; returns what each printed."""
    addresses = [f"localhost:{port}" for port in free_ports(2)]
    processes = []
    try:
        for index, environment in enumerate(environments):
            with open(folder / f"{index}.err", "w") as errors:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "memory_in_workers.py", str(folder)],
                        cwd=SCRIPT.parent,
                        env={
                            **os.environ,
                            **environment,
                            "PYTHONPATH": str(SCRIPT.parents[1]),
                            "TF_CONFIG": config(addresses, index),
                        },
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                    )
                )
        printed = [one.communicate(timeout=TIME_LIMIT)[0] for one in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert all(printed), (folder / "0.err").read_text()[-3000:]
    return [json.loads(one.splitlines()[-1]) for one in printed]


@pytest.mark.slow
def test_two_workers_agree_on_what_the_smaller_one_takes(tmp_path):
    larger = {**LIMIT, "TF_CPU_BFC_MEM_LIMIT_IN_MB": "260"}
    first, second = run_workers(tmp_path, (larger, LIMIT))
    # Same sizes in the same order, the same answer, the same training.
    assert first == second
    assert first["limit"] == 150 * 2**20
    assert first["reason"] == "memory"
    assert not any(first["failed"])
    assert first["size"] % 2 == 0 and first["size"] in first["tried"]
    assert np.all(np.isfinite(first["losses"]))
    # A profile that one of them has lost is none; the next is of both.
    _, probed, kept = first["kept"]
    assert probed == kept
    assert "examples=64 on worker 0, examples=56 on" in first["error"]
    assert "memory_limit=1000," in first["too_small"]


def model_of(activation="relu", optimizer="adam", width=32):
    inputs = keras.Input((16,))
    hidden = keras.layers.Dense(width, activation=activation)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile(optimizer, "mse", metrics=["mae"])
    return model


X, Y = np.zeros((96, 16), "float32"), np.zeros((96, 1), "float32")


@pytest.mark.parametrize(
    ("own", "limit", "expected"),
    [
        (None, 300, "300"),
        ("200", 300, "200"),
        ("400", 300, "300"),
        ("none", 300, "300"),
        ("200", None, "200"),
    ],
)
def test_a_child_process_gets_no_more_memory_than_its_parent(
    own, limit, expected, monkeypatch
):
    name = "TF_CPU_BFC_MEM_LIMIT_IN_MB"
    monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv(name, own)
    limits = memory.Limits(memory_limit=limit and limit * 2**20)
    assert _memory_process.environment_of(limits)[name] == expected


def test_nothing_fits_in_a_child_process():
    with pytest.raises(ValueError, match="No batch size fits"):
        kb.find_max_batch_size(
            model_of(width=2**17),
            X,
            Y,
            isolation=True,
            memory_limit=30 * 2**20,
        )


@keras.saving.register_keras_serializable()
class KnowsFloat32(keras.layers.Layer):
    """Raises an error under every other type that is computed in."""

    def __init__(self, kind, **options):
        super().__init__(**options)
        self.kind = kind

    def call(self, x, training=False):
        if training and self.compute_dtype != "float32":
            raise _memory_process.ERRORS[self.kind](*self._arguments())
        return x

    def _arguments(self):
        text = f"no {self.compute_dtype} here"
        kind = _memory_process.ERRORS[self.kind]
        is_tensorflow = issubclass(kind, tf.errors.OpError)
        return (None, None, text) if is_tensorflow else (text,)

    def get_config(self):
        return {**super().get_config(), "kind": self.kind}


class NotRegistered(keras.layers.Dense):
    """Can be found by its module and name all the same."""


@keras.saving.register_keras_serializable()
def own_error(y, y_pred):
    return keras.ops.square(y - y_pred)


def of_own_objects():
    """Returns a model for which a child process has to import this module."""
    kind = _memory_process.ERRORS.index(NotImplementedError)
    inputs = keras.Input((16,))
    hidden = NotRegistered(4)(KnowsFloat32(kind)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile("adam", own_error, metrics=["mae"])
    return model


@pytest.mark.slow
def test_trials_in_a_child_process():
    model = of_own_objects()
    state = random.getstate()
    profile = kb.find_max_batch_size(
        *(model, X, Y),
        isolation=True,
        memory_limit=300 * 2**20,
        time_budget=math.inf,
    )
    assert profile.max_batch_size == 96
    assert profile.reason == "dataset"
    assert profile.memory_limit == 300 * 2**20
    assert profile.measured_by == "allocator statistics"
    assert random.getstate() == state
    # Nothing of it happened here.
    assert not model.optimizer.built


def of_kind(kind):
    """Returns a model of half precision that fails in its first step."""
    inputs = keras.Input((16,))
    hidden = KnowsFloat32(kind, dtype="mixed_bfloat16")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize("kind", _memory_process.ERRORS)
def test_an_error_is_handed_back_as_it_is(kind):
    is_tensorflow = issubclass(kind, tf.errors.OpError)
    error = kind(*((None, None, "why") if is_tensorflow else ("why",)))
    answer = json.loads(json.dumps(_memory_process.answer_of(error)))
    back = _memory_process._error_from(answer)
    assert type(back) is kind
    assert str(back) == str(error)


@pytest.fixture
def in_name_only(monkeypatch):
    """Lets this process be its own child: one takes ten seconds to start."""

    def run(folder, limits):
        request = json.loads((folder / "request.json").read_text("utf-8"))
        return json.loads(json.dumps(_memory_worker.answer_to(request, folder)))

    monkeypatch.setattr(_memory_process, "_run", run)


# Of Keras, and of TensorFlow.
@pytest.mark.parametrize(
    "expected", [NotImplementedError, tf.errors.UnimplementedError]
)
def test_an_error_of_the_child_is_the_one_that_there_would_be_without(
    expected, in_name_only
):
    kind = _memory_process.ERRORS.index(expected)
    for isolation in (False, True):
        with pytest.raises(expected, match="no bfloat16 here") as caught:
            kb.find_max_batch_size(of_kind(kind), X, Y, isolation=isolation)
        assert type(caught.value) is expected


def test_a_child_process_has_the_settings_of_keras(monkeypatch):
    seen = []

    def run(folder, limits):
        request = json.loads((folder / "request.json").read_text("utf-8"))
        keras.config.set_floatx("float32")
        keras.config.set_image_data_format("channels_last")
        keras.config.set_dtype_policy("float32")
        _memory_worker.set_up(request)
        seen.append(keras.config.floatx())
        seen.append(keras.config.image_data_format())
        seen.append(keras.config.dtype_policy().name)
        return _memory_worker.answer_to(request, folder)

    monkeypatch.setattr(_memory_process, "_run", run)
    for name in ("intra", "inter"):
        # Too late in this process, which has begun to compute.
        setter = f"set_{name}_op_parallelism_threads"
        monkeypatch.setattr(tf.config.threading, setter, lambda _: None)
    built = _memory_worker._built

    def build(request):
        model = built(request)
        seen.append(model.run_eagerly)
        return model

    monkeypatch.setattr(_memory_worker, "_built", build)
    model = model_of()
    # Not an argument of `compile`.
    model.run_eagerly = True
    before = keras.config.floatx(), keras.config.image_data_format()
    try:
        keras.config.set_floatx("float64")
        keras.config.set_image_data_format("channels_first")
        keras.config.set_dtype_policy("mixed_bfloat16")
        kb.find_max_batch_size(model, X, Y, isolation=True)
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_image_data_format(before[1])
        keras.config.set_dtype_policy("float32")
    assert seen == ["float64", "channels_first", "mixed_bfloat16", True]


def test_a_policy_that_does_not_run_in_a_child_process_says_so(in_name_only):
    found = kb.compare_dtype_policies(
        *(of_own_objects, X, Y),
        policies=("float32", "mixed_bfloat16"),
        isolation=True,
    )
    float32, half = found.results
    assert float32.profile.max_batch_size == 96
    assert half.profile is None
    assert half.note == "does not run: NotImplementedError"


class WithoutConfig(keras.Model):
    def __init__(self, units):
        super().__init__()
        self.dense = keras.layers.Dense(units)

    def call(self, x):
        return self.dense(x)


def test_model_that_cannot_be_handed_over_is_refused_with_the_reason():
    lambdas = keras.Sequential(
        [keras.Input((16,)), keras.layers.Lambda(lambda x: x[:, :1])]
    )
    here = model_of()
    here.__class__ = type("Mine", (type(here),), {"__module__": "__main__"})
    for model, reason in (
        (lambdas, "Lambda"),
        (WithoutConfig(1), "NotImplementedError|get_config|TypeError"),
        (here, "__main__"),
    ):
        model.compile("sgd", "mse")
        with pytest.raises(ValueError, match=f"isolation=True; .*{reason}"):
            kb.find_max_batch_size(model, X, Y, isolation=True)


class OwnCompile(keras.Sequential):
    """Keras builds it again, but does not compile it."""

    def compile(self, *args, **kwargs):
        super().compile(*args, **kwargs)


class CompilesNothing(OwnCompile):
    """Says that it does."""

    def compile_from_config(self, config):
        pass


def refusal_of(model, monkeypatch):
    """Returns what is said of a model, in a child in name only."""

    def run(folder, limits):
        request = json.loads((folder / "request.json").read_text("utf-8"))
        return _memory_worker.answer_to(request, folder)

    monkeypatch.setattr(_memory_process, "_run", run)
    with pytest.raises(ValueError, match="isolation=True; ") as caught:
        kb.find_max_batch_size(model, X, Y, isolation=True)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OwnCompile, "OwnCompile has a `compile` of its own, but no compile_f"),
        (CompilesNothing, "compile_from_config() does not compile it"),
    ],
)
def test_a_model_that_is_not_compiled_again_is_refused(
    kind, reason, monkeypatch
):
    model = kind([keras.Input((16,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    assert reason in refusal_of(model, monkeypatch)


@pytest.mark.parametrize("what", ["layer", "inner layer", "operation"])
def test_what_is_computed_twice_to_save_memory_is_refused(what, monkeypatch):
    inputs = keras.Input((16,))
    outputs = keras.layers.Dense(1)(inputs)
    with keras.RematScope(mode="full"):
        if what == "operation":
            outputs = keras.ops.tanh(outputs)
        else:
            outputs = keras.layers.Dense(1, name="twice")(outputs)
    model = keras.Model(inputs, outputs)
    if what == "inner layer":
        model = keras.Sequential([keras.Input((16,)), model])
    model.compile("sgd", "mse")
    text = refusal_of(model, monkeypatch)
    assert "was made in a keras.RematScope" in text
    assert what == "operation" or "'twice'" in text


@pytest.mark.parametrize("kind", ["string", "bfloat16"])
def test_examples_that_cannot_be_handed_over_are_refused(kind):
    x = tf.constant([["a"], ["b"]])
    if kind == "bfloat16":
        x = tf.zeros((2, 16), kind)
    with pytest.raises(ValueError, match=f"isolation=True; .*dtype {kind}"):
        kb.find_max_batch_size(
            model_of(), tf.data.Dataset.from_tensors((x, Y[:2])), isolation=True
        )


def test_profiles_are_kept(tmp_path, monkeypatch):
    first = kb.find_max_batch_size(model_of(), X, Y, cache=tmp_path)

    def refuse(*_):
        raise AssertionError("probed again")

    with monkeypatch.context() as patched:
        patched.setattr(memory, "probe", refuse)
        again = kb.find_max_batch_size(model_of(), X, Y, cache=tmp_path)
        assert again == first
        for other in (
            model_of(activation="tanh"),
            model_of(optimizer="sgd"),
            model_of(width=33),
        ):
            with pytest.raises(AssertionError, match="probed again"):
                kb.find_max_batch_size(other, X, Y, cache=tmp_path)
        for changed in ({"safety_margin": 0.1}, {"maximum": 50}):
            with pytest.raises(AssertionError, match="probed again"):
                kb.find_max_batch_size(
                    model_of(), X, Y, cache=tmp_path, **changed
                )
    # One that cannot be read is made anew.
    (file,) = tmp_path.iterdir()
    file.write_text("{")
    third = kb.find_max_batch_size(model_of(), X, Y, cache=tmp_path)
    assert third.max_batch_size == first.max_batch_size
