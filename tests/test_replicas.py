"""R replicas are one device, on 2, 3 and 4 logical CPUs.

Each number of replicas is a process of its own, see `replica_laws.py`, which
tries all its laws once; each law is a test here.
"""

import json
import pathlib
import types

import comparing
import numpy as np
import pytest
import replica_laws
import tensorflow as tf

from keras_batchsize import replicas

pytestmark = pytest.mark.minutes(8)

PROGRAM = pathlib.Path(replica_laws.__file__)
# Seconds for all laws of a process, some times what they take while other tests
# run beside them.
TIME_LIMIT = 900


@pytest.fixture(scope="module")
def outcome_of(run_python):
    """Returns a function from replicas and law to the law's outcome."""
    outcomes = {}

    def run(number):
        result = run_python(
            PROGRAM.name, str(number), cwd=PROGRAM.parent, timeout=TIME_LIMIT
        )
        lines = map(json.loads, result.stdout.splitlines())
        return {one["law"]: one["error"] for one in lines}, result.stderr

    def outcome(number, law):
        if number not in outcomes:
            outcomes[number] = run(number)
        errors, stderr = outcomes[number]
        assert law in errors, stderr
        return errors[law]

    return outcome


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "law"),
    [
        (number, name)
        for number in replica_laws.REPLICAS
        for name, (_, numbers) in replica_laws.LAWS.items()
        if number in numbers
    ],
)
def test_replicas_are_one_device(outcome_of, number, law):
    error = outcome_of(number, law)
    assert error is None, error


def test_xla_under_a_strategy_is_said_to_have_no_effect():
    def under_a_strategy():
        with tf.distribute.OneDeviceStrategy("/cpu:0").scope():
            return comparing.compiled(comparing.dense, jit_compile=True)()

    with pytest.warns(UserWarning, match="jit_compile.* no effect"):
        comparing.adaptive(
            under_a_strategy, *comparing.regression(), policy="fixed"
        )


def test_a_model_frozen_as_a_whole_is_left_as_it_is_under_a_strategy():
    def frozen():
        with tf.distribute.OneDeviceStrategy("/cpu:0").scope():
            model = comparing.compiled(comparing.dense)()
        model.trainable = False
        return model

    trained = comparing.adaptive(
        frozen, *comparing.regression(), policy="fixed"
    )
    assert len(trained.history["loss"]) == 2
    untrained = comparing.seeded(frozen)
    for one, two in zip(trained.model.weights, untrained.weights):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("devices", "number", "expected"),
    [
        (("/job:localhost/device:CPU:0",), 1, True),
        (("/device:CPU:0", "/device:CPU:1"), 2, True),
        (("/device:GPU:0", "/device:GPU:1"), 2, False),
        (("/device:CPU:0", "/device:GPU:0"), 2, False),
        # Of several workers.
        (("/job:worker/replica:0/task:0/device:CPU:0",), 2, False),
    ],
)
def test_who_takes_examples_from_the_memory_of_the_host(
    devices, number, expected
):
    strategy = types.SimpleNamespace(
        num_replicas_in_sync=number,
        extended=types.SimpleNamespace(worker_devices=devices),
    )

    assert replicas.share_memory(strategy) is expected
