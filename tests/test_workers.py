"""Two workers are one device, in two processes on loopback.

Both run `worker_laws.py`, once; each law is a test here. What several workers
need besides is tested without any.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest
import tensorflow as tf
import worker_laws

from keras_batchsize import workers

PROGRAM = pathlib.Path(worker_laws.__file__)
# Seconds for all laws; about 90 on a quiet machine.
TIME_LIMIT = 550


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


def run_workers(number, folder):
    """Runs the program on so many workers; returns what each has printed."""
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
                        [sys.executable, PROGRAM.name, str(folder)],
                        cwd=PROGRAM.parent,
                        env={
                            **os.environ,
                            "PYTHONPATH": str(PROGRAM.parents[1]),
                            "TF_CONFIG": config(addresses, index),
                        },
                        stdout=stdout,
                        stderr=stderr,
                    )
                )
        end = time.monotonic() + TIME_LIMIT
        for process in processes:
            process.wait(max(end - time.monotonic(), 0.1))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(out.read_text(), err.read_text()) for out, err in files]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Returns, for each worker, a dict from law to outcome, and stderr."""
    printed = run_workers(2, tmp_path_factory.mktemp("workers"))
    return [
        ({one["law"]: one for one in map(json.loads, out.splitlines())}, err)
        for out, err in printed
    ]


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
        (config(ADDRESSES, 2), '"index" of its "task" is 2, of 2 workers'),
        (config(ADDRESSES, "0"), "is '0', of 2 workers"),
        (config(ADDRESSES, 0, job="ps"), "'ps', is not in the cluster"),
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


def test_a_right_tf_config_passes():
    for index in range(2):
        workers.check_tf_config({"TF_CONFIG": config(ADDRESSES, index)})


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
