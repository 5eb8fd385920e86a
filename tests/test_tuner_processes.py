"""KerasTuner with TensorBoard, on several replicas, and on several workers."""

import importlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import keras
import keras_tuner
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator
from test_tensorboard_plugin import ask
from test_tensorboard_plugin import client_for
from test_workers import TIME_LIMIT

from keras_batchsize import tuner as kbt

ROOT = pathlib.Path(__file__).parents[1]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(currentThread|getName).*:DeprecationWarning",
)

# What the scripts of other processes begin with.
PROBLEM = """
import json
import os
import sys
import time
import pathlib

import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 2,
)

import keras
import keras_tuner
import numpy as np

from keras_batchsize import tuner as kbt

RNG = np.random.default_rng(0)
X = RNG.normal(size=(1024, 8)).astype("float32")
Y = (X[:, 0] * X[:, 1] > 0).astype("int32")


def build(hp):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(hp.Choice("units", [16, 32]), "relu"),
            keras.layers.Dense(2),
        ]
    )
    model.compile(
        keras.optimizers.SGD(momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def space(**arguments):
    return kbt.BatchSizeSpace(
        (8, 32), max_batch_size=64, learning_rate=(0.1, 1.0), **arguments
    )


TARGET = kbt.Target(
    "val_accuracy", 0.99, budget_seconds=600, budget_examples=4096
)
"""


def test_tensorboard_shows_each_execution_of_each_trial(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 4)).astype("float32")
    y = x @ np.ones((4, 1), "float32")

    def build(hp):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.01), "mse")
        return model

    tuner = keras_tuner.RandomSearch(
        kbt.AdaptiveHyperModel(
            build, kbt.BatchSizeSpace((8, 16), 32, ["fixed", "measure"])
        ),
        objective="val_loss",
        max_trials=1,
        executions_per_trial=2,
        directory=tmp_path / "search",
        seed=1,
    )
    board = keras.callbacks.TensorBoard(tmp_path / "logs")
    tuner.search(
        x, y, epochs=2, validation_split=0.2, verbose=0, callbacks=[board]
    )

    (trial,) = tuner.oracle.trials.values()
    assert trial.status == "COMPLETED", trial.message
    for execution in ("execution0", "execution1"):
        folder = tmp_path / "logs" / trial.trial_id / execution
        # Beside Keras's, in a run of our own; the settings of the trial are in
        # the run above, where KerasTuner writes them.
        runs = {one.name for one in folder.iterdir() if one.is_dir()}
        assert {"train", "validation", "batch_size"} <= runs
        assert "batch_size_2" not in runs
        assert hparams_sessions(folder) == 1
        assert hparams_sessions(folder / "batch_size") == 0
        sizes = scalars(folder / "batch_size", "batch_size/global")
        initial = trial.hyperparameters.get("batch_size/initial")
        assert set(sizes) == {initial}
    # The tab has them all.
    runs = ask(client_for(tmp_path / "logs"), "runs")
    assert {one["run"] for one in runs} == {
        f"{trial.trial_id}/execution{execution}/batch_size"
        for execution in (0, 1)
    }


def events_in(folder):
    accumulator = event_accumulator.EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def scalars(folder, tag):
    accumulator = events_in(folder)
    if tag in accumulator.Tags()["scalars"]:
        return [one.value for one in accumulator.Scalars(tag)]
    return [
        float(one.tensor_proto.float_val[0])
        for one in accumulator.Tensors(tag)
    ]


def hparams_sessions(folder):
    """How many trainings are announced with their hyperparameters."""
    metadata = events_in(folder).summary_metadata
    return sum(
        one.plugin_data.plugin_name == "hparams" and "session_start" in tag
        for tag, one in metadata.items()
    )


def start(script, folder, **environment):
    """Starts a process that runs a script in a folder."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-c", PROBLEM + textwrap.dedent(script)],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, seconds=TIME_LIMIT):
    """Waits for a process to succeed; returns what it printed last, as JSON."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    return json.loads(out.splitlines()[-1])


def test_example_searches_and_compares(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    tune = importlib.import_module("tune")
    settings = {"digits": (0.5, 30.0, 2, (32, 64))}
    monkeypatch.setattr(tune, "SETTINGS", settings)
    monkeypatch.setattr(tune, "SEEDS", 1)
    monkeypatch.setattr(sys, "argv", ["tune.py", "--directory", str(tmp_path)])

    tune.main()

    printed = capsys.readouterr().out
    assert "batch_size/initial" in printed
    assert "time_to_target" in printed
    assert printed.count(" times\n") == 3


MIRRORED = """
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
rows = {}
for name, strategy in (("one", None), ("two", strategy)):
    tuner = keras_tuner.RandomSearch(
        kbt.AdaptiveHyperModel(build, space(policies=["fixed"]), TARGET),
        objective="val_loss",
        max_trials=1,
        seed=1,
        distribution_strategy=strategy,
        project_name=name,
    )
    tuner.search(X, Y, epochs=2, validation_split=0.2, verbose=0)
    rows[name] = [
        [
            trial.status,
            trial.hyperparameters.values,
            trial.score,
            trial.metrics.get_best_value("batch_size"),
        ]
        for trial in tuner.oracle.trials.values()
    ]
print()
print(json.dumps(rows))
"""


@pytest.mark.slow
def test_mirrored_replicas_train_trials_as_one_device_does(tmp_path):
    rows = finish(start(MIRRORED, tmp_path))
    [one], [two] = rows["one"], rows["two"]
    assert one[0] == two[0] == "COMPLETED"
    assert one[1] == two[1]
    # Law 2: the same but for rounding, which training carries on.
    assert two[2] == pytest.approx(one[2], rel=1e-3)
    assert one[3] == two[3]


WORKER = """
name = os.environ["KERASTUNER_TUNER_ID"]
ran = []


class Together(keras_tuner.HyperModel):
    # The first trial of a worker waits for that of the other, so that both
    # certainly have one.

    def build(self, hp):
        return build(hp)

    def fit(self, hp, model, *args, **kwargs):
        if not ran:
            pathlib.Path(name).touch()
            while not all(map(os.path.exists, ("worker0", "worker1"))):
                time.sleep(0.1)
        ran.append(hp.values.get("tuner/trial_id"))
        return model.fit(*args, **kwargs)


tuner = keras_tuner.Hyperband(
    kbt.AdaptiveHyperModel(Together(), space(policies=["measure"]), TARGET),
    objective=keras_tuner.Objective("examples_to_target", "min"),
    max_epochs=2,
    factor=2,
    seed=1,
    project_name="search",
)
tuner.search(X, Y, validation_split=0.2, verbose=0)
best = None
if "worker" in name:
    best = tuner.oracle.get_best_trials(1)[0].trial_id
print()
print(json.dumps({"ran": ran, "best": best}))
"""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


@pytest.mark.slow
def test_chief_and_two_workers_share_a_search(tmp_path):
    address = {
        "KERASTUNER_ORACLE_IP": "127.0.0.1",
        "KERASTUNER_ORACLE_PORT": free_port(),
    }
    processes = [
        start(WORKER, tmp_path, KERASTUNER_TUNER_ID=name, **address)
        for name in ("chief", "worker0", "worker1")
    ]
    chief, *workers = processes
    try:
        results = [finish(one) for one in workers]
    finally:
        # It looks every 20 seconds whether it is still needed.
        for one in processes:
            one.kill()
        _, errors = chief.communicate(timeout=20)

    trials = {
        trial["trial_id"]: trial
        for trial in (
            json.loads(file.read_text())
            for file in tmp_path.glob("search/trial_*/trial.json")
        )
    }
    assert [one["status"] for one in trials.values()] == (
        ["COMPLETED"] * len(trials)
    ), errors
    assert all(one["ran"] for one in results)
    assert sum(len(one["ran"]) for one in results) == len(trials)
    scores = {name: one["score"] for name, one in trials.items()}
    assert results[0]["best"] in scores
    assert scores[results[0]["best"]] == min(scores.values())
    resumed = 0
    for trial in trials.values():
        past = trial["hyperparameters"]["values"].get("tuner/trial_id")
        if past is not None:
            # Whoever ran that one: the state is in the folder they share.
            resumed += 1
            assert seen(trial) > seen(trials[past])
    assert resumed


def seen(trial):
    """Examples at the best epoch of a trial."""
    metric = trial["metrics"]["metrics"]["examples_seen"]
    return metric["observations"][0]["value"][0]
