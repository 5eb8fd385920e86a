"""Two workers are one device: a program that `test_workers.py` runs on each.

TF_CONFIG says which worker it is. It tries its laws and prints one line of
JSON per law, with digests of what must be the same on both workers. The last
law ends with the death of worker 1.
"""

import functools
import hashlib
import json
import os
import pathlib
import sys
import tempfile
import time

import comparing
import keras
import numpy as np
import replica_laws
import tensorflow as tf
from comparing import adaptive
from comparing import compiled
from comparing import dense
from replica_laws import momentum
from replica_laws import under

import keras_batchsize as kb
from keras_batchsize import learning_rate
from keras_batchsize import replicas
from keras_batchsize import train_function
from keras_batchsize.replica_graphs import ReplicaGraphs

INDEX = json.loads(os.environ.get("TF_CONFIG", '{"task": {"index": 0}}'))
INDEX = INDEX["task"]["index"]

# Seconds within which the loss of a worker is told. TensorFlow takes a worker
# for crashed after ten seconds without a heartbeat.
TOLD_WITHIN = 30

OF_REPLICAS = (
    "momentum_is_that_of_one_device",
    "adam_with_average_weights_and_regularisers",
    "the_size_may_rise_and_fall",
    "a_batch_may_be_larger_than_a_superbatch",
    "noise_scale_comes_free_with_every_update",
    "an_infinity_on_the_last_replica_skips_the_update",
    "every_kind_of_input",
)

LAWS = {name: replica_laws.LAWS[name][0] for name in OF_REPLICAS}


def law(function):
    LAWS[function.__name__] = function
    return function


def digest(what):
    """Notes something that must be the same on all workers."""
    text = json.dumps(what, sort_keys=True)
    replica_laws.DIGESTS.append(hashlib.sha256(text.encode()).hexdigest())


class WrongClock:
    """Stands for the module `time`, with seconds that no one agrees on."""

    def __init__(self, clock):
        self.perf_counter = clock


@law
def a_slow_worker_and_a_wrong_clock_change_no_plan(strategy):
    """Each worker has its own seconds; what they decide is the same."""
    x, y = comparing.regression(2048)

    def slow(*row):
        if INDEX == 1:
            time.sleep(0.002)
        return row

    backwards = iter(range(10**9, 0, -1))
    clocks = (
        WrongClock(lambda: 50.0 * time.perf_counter()),
        WrongClock(lambda: float(next(backwards))),
    )

    def delayed(*batch):
        types = [tf.float32, tf.float32]
        a, b = tf.numpy_function(slow, batch, types)
        return tf.ensure_shape(a, (None, 5)), tf.ensure_shape(b, (None, 1))

    model = comparing.seeded(under(strategy, momentum()))
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(64).map(delayed)
    trainer = kb.AdaptiveTrainer(model, superbatch_size=128, verbose=0)
    held = train_function.time
    train_function.time = clocks[INDEX]
    try:
        trainer.fit(data, batch_size=8, epochs=6, verbose=0)
    finally:
        train_function.time = held
    sizes = [row.batch_size for row in trainer.report.rows]
    assert len(set(sizes)) > 1, "nothing was decided"
    digest(sizes)
    digest(trainer.get_state())
    digest([one.tolist() for one in model.get_weights()])


def collectives(graph):
    """Names of the operations between workers in a graph and its functions."""
    definition = graph.as_graph_def()
    nodes = list(definition.node)
    for function in definition.library.function:
        nodes += function.node_def
    return [one.op for one in nodes if one.op.startswith("Collective")]


@law
def one_all_reduce_per_update(strategy):
    """Gradients, norms, counts, losses and flags travel together."""

    def make_model():
        model = comparing.two_outputs()
        model.compile(
            optimizer=keras.optimizers.LossScaleOptimizer(
                keras.optimizers.AdamW(0.01, global_clipnorm=1.0)
            ),
            loss=["mse", "sparse_categorical_crossentropy"],
            metrics=[["mae"], ["accuracy"]],
        )
        return model

    model = comparing.seeded(under(strategy, make_model))
    x, y = comparing.for_two_outputs(24)
    data = tf.data.Dataset.from_tensor_slices((x, tuple(y.values()))).batch(24)
    data = next(iter(replicas.dealt_out(data, strategy)))
    graphs = ReplicaGraphs(model, 8, True)
    graphs.build(replicas.local_shares(strategy, data)[0])
    start, end = tf.constant(0), tf.constant(8)
    rate = learning_rate.rate_in_force(1.0, 1.0, 0, 0)
    update = graphs._update.get_concrete_function(data, start, end, rate, False)
    assert collectives(update.graph) == ["CollectiveReduceV2"]
    # Micro-batches stay where they are, until the update.
    sums = graphs._zeros()
    add = graphs._add.get_concrete_function(sums, data, start, end, False)
    assert collectives(add.graph) == []
    apply = graphs._apply.get_concrete_function(sums, rate)
    assert collectives(apply.graph) == ["CollectiveReduceV2"]


@law
def workers_that_are_not_seeded_shuffle_alike(strategy):
    """A rate of zero: the loss of an epoch is the mean over all examples."""
    model = comparing.seeded(under(strategy, comparing.offset()))
    x, y = comparing.regression(64)
    keras.utils.set_random_seed(INDEX)
    history = kb.fit(model, x, y, batch_size=8, policy="fixed", verbose=0)
    expected = 0.5 * np.square(0.5 - x).sum(axis=1).mean()
    np.testing.assert_allclose(history.history["loss"], expected, rtol=1e-6)


@law
def files_are_shared_out(strategy):
    """Under AUTO each worker reads a file of its own, and all are read."""
    x, _ = comparing.regression(64)
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for part in range(2):
            files.append(os.path.join(folder, f"part-{part}.csv"))
            np.savetxt(files[-1], x[part::2], fmt="%.9g", delimiter=",")
        data = tf.data.TextLineDataset(files)
        data = data.map(
            lambda line: tf.strings.to_number(tf.strings.split(line, ","))
        )
        data = data.map(lambda row: (tf.ensure_shape(row, (5,)), row[:1]))
        data = data.batch(8).apply(tf.data.experimental.assert_cardinality(8))
        model = comparing.seeded(under(strategy, comparing.offset()))
        history = kb.fit(
            model, data, batch_size=8, superbatch_size=16, policy="fixed",
            epochs=2, verbose=0,
        )
    expected = 0.5 * np.square(0.5 - x).sum(axis=1).mean()
    np.testing.assert_allclose(history.history["loss"], expected, rtol=1e-5)


@law
def datasets_from_a_function_are_taken_as_they_are(strategy):
    """Uneven shares: worker 1 has 5 examples where worker 0 has 8."""
    x, _ = comparing.regression(64)

    def of_worker(context):
        part = x[context.input_pipeline_id :: context.num_input_pipelines]
        part = part[: 32 - 3 * context.input_pipeline_id]
        data = tf.data.Dataset.from_tensor_slices((part, part[:, :1]))
        return data.batch(8)

    data = strategy.distribute_datasets_from_function(of_worker)
    model = comparing.seeded(under(strategy, comparing.offset()))
    history = kb.fit(
        model, data, batch_size=4, policy="fixed", steps_per_epoch=16,
        verbose=0,
    )
    seen = np.concatenate([x[0::2], x[1::2][:29]])
    expected = 0.5 * np.square(0.5 - seen).sum(axis=1).mean()
    np.testing.assert_allclose(history.history["loss"], expected, rtol=1e-5)


class Interrupted(Exception):
    """Ends a training in the middle."""


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise Interrupted


@law
def interrupted_and_resumed_is_uninterrupted(strategy):
    x, y = comparing.regression(512)
    # Both workers see one folder; the first decides which.
    folder = pathlib.Path(sys.argv[1]) / "backup"
    fitted = functools.partial(
        adaptive, under(strategy, momentum()), x, y, policy="measure",
        batch_size=16, superbatch_size=64, epochs=4, shuffle=False,
    )
    whole = fitted()
    backup = functools.partial(kb.BackupAndRestore, folder)
    try:
        fitted(callbacks=[backup(), Interrupt()])
    except Interrupted:
        pass
    resumed = fitted(callbacks=[backup()])
    assert resumed.model.history.epoch == [2, 3]
    for one, other in zip(resumed.model.weights, whole.model.weights):
        np.testing.assert_array_equal(one.numpy(), other.numpy(), one.path)
    assert resumed.result.noise_scale == whole.result.noise_scale
    assert not folder.exists() or INDEX


@law
def the_chief_writes_for_tensorboard(strategy):
    """Both workers are given one folder; one run in one file comes of it."""
    folder = pathlib.Path(sys.argv[1]) / "logs"
    x, y = comparing.regression(256)
    model = comparing.seeded(under(strategy, momentum()))
    kb.fit(
        model, x, y, batch_size=16, superbatch_size=64, policy="measure",
        epochs=2, tensorboard=folder, verbose=0,
    )
    [file] = folder.rglob("*tfevents*")
    assert file.parent.name == "batch_size"


def error_of(function):
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return str(error)
    raise AssertionError("no error")


@law
def what_differs_is_named(strategy):
    x, y = comparing.regression(64)

    def error_with(length=64, policy="fixed", activation="tanh", loss="mse"):
        make_model = functools.partial(dense, activation=activation)
        make = compiled(make_model, loss=loss)
        model = comparing.seeded(under(strategy, make))
        return error_of(
            lambda: kb.fit(
                model, x[:length], y[:length], policy=policy, verbose=0
            )
        )

    for of_worker_1, named in (
        ({"length": 48}, "examples_per_epoch=48 on worker 1"),
        ({"policy": "goodput"}, "policy=Goodput"),
        ({"loss": "mae"}, "loss=mae on worker 1"),
        ({"activation": "relu"}, '"relu"'),
    ):
        error = error_with(**of_worker_1 if INDEX else {})
        assert named in error and "on worker 0" in error, error


@law
def a_worker_that_dies_is_named(strategy):
    model = comparing.seeded(under(strategy, momentum()))
    x, y = comparing.regression(512)
    last = []

    class Die(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            last.append(time.perf_counter())
            if INDEX == 1 and epoch == 1:
                os._exit(9)

    error = error_of(
        lambda: kb.fit(
            model, x, y, policy="fixed", epochs=10**6, verbose=0,
            callbacks=[Die()],
        )
    )
    assert "lost /job:worker/task:1 (localhost:" in error, error
    assert "backup_dir" in error, error
    assert time.perf_counter() - last[-1] < TOLD_WITHIN


if __name__ == "__main__":
    replica_laws.try_out(
        tf.distribute.MultiWorkerMirroredStrategy(),
        {
            name: function
            for name, function in LAWS.items()
            if name in sys.argv[2:] or not sys.argv[2:]
        },
    )
