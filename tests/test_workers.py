"""Two workers are one device, in two processes on loopback.

Both run `worker_laws.py`, once; each law is a test here. What several workers
need besides is tested without any.
"""

import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
import types

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
import worker_laws

import keras_batchsize as kb
from keras_batchsize import distributed
from keras_batchsize import workers

pytestmark = pytest.mark.minutes(6)

PROGRAM = pathlib.Path(worker_laws.__file__)
ROOT = PROGRAM.parents[1]
# Seconds for all laws of two workers, and for whatever else is waited for: some
# times what they take while other tests run beside them.
TIME_LIMIT = 900


def free_ports(number):
    """Returns ports that nobody listens on, all different."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def config(addresses, index, job="worker"):
    task = {"type": job, "index": index}
    return json.dumps({"cluster": {"worker": addresses}, "task": task})


def run_workers(number, folder, *laws):
    """Runs the program on so many workers.

    Returns:
        For each worker, a dict from law to outcome, and stderr.
    """
    addresses = [f"localhost:{port}" for port in free_ports(number)]
    files = [
        (folder / f"{index}.out", folder / f"{index}.err")
        for index in range(number)
    ]
    processes = []
    try:
        for index, (out, err) in enumerate(files):
            with open(out, "w") as stdout, open(err, "w") as stderr:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, PROGRAM.name, str(folder), *laws],
                        cwd=PROGRAM.parent,
                        env={
                            **os.environ,
                            "PYTHONPATH": str(ROOT),
                            "TF_CONFIG": config(addresses, index),
                        },
                        stdout=stdout,
                        stderr=stderr,
                    )
                )
        end = time.monotonic() + TIME_LIMIT
        # Then each law looks for itself in what was printed.
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(max(end - time.monotonic(), 0.1))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    printed = [(out.read_text(), err.read_text()) for out, err in files]
    return [
        ({one["law"]: one for one in map(json.loads, out.splitlines())}, err)
        for out, err in printed
    ]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_workers(2, tmp_path_factory.mktemp("workers"))


@pytest.mark.slow
@pytest.mark.parametrize("law", worker_laws.LAWS)
def test_two_workers_are_one_device(outcomes, law):
    (first, stderr), (second, _) = outcomes
    assert law in first, stderr
    assert first[law]["error"] is None, first[law]["error"]
    if law == "a_worker_that_dies_is_named":
        return  # The second is dead.
    assert second[law]["error"] is None, second[law]["error"]
    # Weights, plans and statistics: the same bits on both.
    assert first[law]["digests"] == second[law]["digests"]


# Eight examples make uneven shares of three.
OF_THREE = (
    "momentum_is_that_of_one_device",
    "the_first_worker_that_dies_is_named",
)


@pytest.fixture(scope="module")
def outcomes_of_three(tmp_path_factory):
    return run_workers(3, tmp_path_factory.mktemp("three"), *OF_THREE)


@pytest.mark.slow
@pytest.mark.parametrize("law", OF_THREE)
def test_three_workers_are_one_device(outcomes_of_three, law):
    digests = []
    for index, (found, stderr) in enumerate(outcomes_of_three):
        if index == 0 and law == OF_THREE[-1]:
            continue  # It is dead.
        assert law in found, stderr
        assert found[law]["error"] is None, found[law]["error"]
        digests.append(found[law]["digests"])
    assert all(one == digests[0] for one in digests)


TRAINING = {"epochs": 1, "steps_per_epoch": 4, "batch_size": 8, "verbose": 0}


@pytest.fixture
def compared(monkeypatch):
    """Returns a function that trains; it returns what workers would compare."""
    found = []

    def collect(model, facts_of_data, **facts):
        found.append(distributed.described(model, {**facts_of_data(), **facts}))

    monkeypatch.setattr(distributed, "check_alike", collect)

    def train(rate=0.1, **changed):
        training = {
            name: changed.pop(name, value) for name, value in TRAINING.items()
        }
        make = comparing.compiled(
            comparing.dense, optimizer=lambda: keras.optimizers.SGD(rate)
        )
        trainer = kb.AdaptiveTrainer(
            comparing.seeded(make),
            **{"policy": "measure", "max_batch_size": 16, **changed},
            superbatch_size=32,
            verbose=0,
        )
        trainer.fit(*comparing.regression(128), **training)
        return found.pop()

    return train


@pytest.mark.parametrize(
    "changed",
    [
        {"epochs": 2},
        {"steps_per_epoch": 8},
        {"batch_size": 16},
        {"policy": "goodput"},
        {"learning_rate_scaling": "linear"},
        {"measure_every": 3},
        {"max_batch_size": 32},
        {"rate": 0.2},
    ],
    ids=lambda one: "".join(one),
)
def test_what_makes_another_training_is_compared(changed, compared):
    expected = compared()
    assert compared() == expected
    assert compared(**changed) != expected


def test_several_workers_without_tf_config_are_refused(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    # Once it computes, the strategy leaves TensorFlow's settings alone.
    tf.zeros(())
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = comparing.compiled(comparing.dense)()
    before = [one.numpy() for one in model.weights]
    with pytest.raises(ValueError, match="^TF_CONFIG must .*it is not set"):
        kb.fit(model, *comparing.regression(), verbose=0)
    assert model.train_function is None
    for one, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(one, value)


ADDRESSES = ["a:1111", "b:2222"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "it is not set"),
        ("{", "it is not JSON"),
        ("{}", 'needs a "cluster" and a "task"'),
        ("[]", 'needs a "cluster" and a "task"'),
        (config(["a:1111", "a:1111"], 0), "the same address"),
        (config(["a", "b:2222"], 0), "not 'a'"),
        (config(5, 0), "a list of addresses"),
        (config("a:1111", 0), "a list of addresses"),
        (config(ADDRESSES, 2), '"index" of its "task" is 2, of 2 workers'),
        (config(ADDRESSES, "2"), "is '2', of 2 workers"),
        (config(ADDRESSES, -1), "is -1, of 2 workers"),
        (config(ADDRESSES, None), "is None, of 2 workers"),
        (config(ADDRESSES, 0.5), "is 0.5, of 2 workers"),
        (config(ADDRESSES, 0, job="ps"), "'ps', is not in the cluster"),
        (
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": []}}',
            "[], is not in the cluster",
        ),
        (
            '{"cluster": {"ps": ["a:1"]}, "task": {"type": "ps", "index": 0}}',
            'the jobs of a cluster are "worker"',
        ),
    ],
)
def test_what_is_wrong_with_tf_config_is_said(text, why):
    environment = {} if text is None else {"TF_CONFIG": text}
    with pytest.raises(ValueError) as caught:
        workers.check_tf_config(environment)
    assert why in str(caught.value)
    assert f"Received: TF_CONFIG={text}" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        config(ADDRESSES, 0),
        config(ADDRESSES, 1),
        # TensorFlow makes an integer of it.
        config(ADDRESSES, "1"),
        # As the training operator of Kubernetes sets it.
        """{"cluster": {"worker": ["job-worker-0.default.svc:2222",
        "job-worker-1.default.svc:2222"]}, "task": {"type": "worker",
        "index": 1}, "environment": "cloud"}""",
        # As Vertex AI sets it.
        """{"cluster": {"chief": ["cmle-training-workerpool0-ab-0:2222"],
        "worker": ["cmle-training-workerpool1-ab-0:2222"]}, "environment":
        "cloud", "task": {"type": "chief", "index": 0}, "job": "{}"}""",
        # As Ray sets it, the second with IPv6.
        config(["10.0.0.1:40001", "10.0.0.2:40001"], 0),
        config(["[fd00::1]:40001", "[fd00::2]:40001"], 1),
    ],
)
def test_a_right_tf_config_passes(text):
    workers.check_tf_config({"TF_CONFIG": text})
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TF_CONFIG", text)
        told = resolver()
        tasks = workers._tasks_of(told.cluster_spec().as_dict())
        assert (told.task_type, told.task_id) in tasks


def job_script():
    """Returns the SLURM script that the documentation shows."""
    text = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    [script] = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", text, re.S)
    return script


def two_free_ports_in_a_row():
    while True:
        [port] = free_ports(1)
        try:
            socket.create_server(("localhost", port + 1)).close()
        except OSError:
            continue
        return port


# What the programs of SLURM do with two nodes, both of them this machine. Two
# epochs are as good as the ten of the example.
SLURM = {
    "scontrol": """
        [ "$*" = "show hostnames node[1-2]" ] || exit 1
        printf 'localhost\\n127.0.0.1\\n'
    """,
    "srun": """
        for index in 0 1; do
            SLURM_PROCID=$index "$@" > out.$index 2> err.$index &
        done
        wait
    """,
    "python": f"""
        exec {sys.executable} {ROOT}/"$@" --epochs 2
    """,
}


@pytest.mark.slow
def test_the_job_script_of_slurm_starts_workers_that_train(tmp_path):
    for name, text in SLURM.items():
        file = tmp_path / name
        file.write_text("#!/bin/bash\n" + text)
        file.chmod(0o755)
    script = job_script()
    assert script.count("12345 + NR") == 1
    port = two_free_ports_in_a_row()
    script = script.replace("12345 + NR", f"{port} - 1 + NR")
    subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SLURM_JOB_NODELIST": "node[1-2]",
        },
        check=True,
        timeout=TIME_LIMIT,
    )
    first, second = (
        (tmp_path / f"out.{index}").read_text().splitlines()
        for index in range(2)
    )
    errors = (tmp_path / "err.0").read_text()
    assert first and first[0].startswith("worker 0: test accuracy"), errors
    assert second[0] == first[0].replace("worker 0", "worker 1")
    # The report: what was decided, the same on both.
    assert len(first) > 5 and len(first) == len(second)


def test_the_resolver_of_slurm_needs_gpus(monkeypatch):
    """What the documentation says of it."""
    for name, value in (
        ("PROCID", "1"),
        ("STEP_NUM_TASKS", "2"),
        ("STEP_NODELIST", "node[1-2]"),
        ("STEP_TASKS_PER_NODE", "1(x2)"),
    ):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    resolver = tf.distribute.cluster_resolver.SlurmClusterResolver
    with pytest.raises(ValueError):
        resolver(gpus_per_node=0).cluster_spec()
    told = resolver(gpus_per_node=1)
    tasks = workers._tasks_of(told.cluster_spec().as_dict())
    assert tasks[1] == (told.task_type, told.task_id) == ("worker", 1)


def told(monkeypatch, *descriptions):
    """Lets workers of such descriptions compare what they are about to do."""
    strategy = types.SimpleNamespace(
        extended=types.SimpleNamespace(worker_devices=["/cpu:0"]),
        num_replicas_in_sync=len(descriptions),
    )
    monkeypatch.setattr(
        workers.Workers,
        "_told",
        lambda self, text: [json.dumps(one) for one in descriptions],
    )
    workers.Workers(strategy).check_alike(descriptions[0])


@pytest.mark.parametrize(
    ("first", "second", "received"),
    [
        ({"a": "1"}, {"a": "2"}, "a=1 on worker 0, a=2 on worker 1"),
        # A dataset that is shuffled tells more of itself.
        ({}, {"seeds": [7]}, r"seeds=None on .*seeds=\[7\] on worker 1"),
        ({"seeds": [7]}, {}, r"seeds=\[7\] on .*seeds=None on worker 1"),
    ],
)
def test_what_any_worker_has_more_than_another_is_named(
    first, second, received, monkeypatch
):
    told(monkeypatch, first, first)
    with pytest.raises(ValueError, match=f"Received: {received}"):
        told(monkeypatch, first, second)


class Alone:
    """A worker of a cluster, as far as `explained` asks."""

    class cluster_resolver:
        task_type, task_id = "worker", 1

        @staticmethod
        def cluster_spec():
            return tf.train.ClusterSpec({"worker": ADDRESSES})


def test_errors_that_name_no_other_worker_are_passed_on():
    for text in ("out of memory", "on /job:worker/task:1", "/job:ps/task:7"):
        error = tf.errors.UnavailableError(None, None, text)
        with pytest.raises(tf.errors.UnavailableError):
            with workers.explained(Alone):
                raise error


def test_a_lost_worker_is_named():
    text = "/job:worker/replica:0/task:1: lost /job:worker/replica:0/task:0"
    with pytest.raises(RuntimeError, match=r"lost /job:worker/task:0 \(a:1111"):
        with workers.explained(Alone):
            raise tf.errors.UnavailableError(None, None, text)
