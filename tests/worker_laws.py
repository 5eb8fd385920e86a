"""Two workers are one device: a program that `test_workers.py` runs on each.

TF_CONFIG says which worker it is. It tries its laws and prints one line of
JSON per law, with digests of what must be the same on both workers. The last
law ends with the death of worker 1.
"""

import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
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

# Those in which something goes from worker to worker that goes from replica to
# replica otherwise.
OF_REPLICAS = (
    "momentum_is_that_of_one_device",
    "the_size_may_rise_and_fall",
    "a_batch_may_be_larger_than_a_superbatch",
    "noise_scale_comes_free_with_every_update",
    "an_infinity_on_the_last_replica_skips_the_update",
    "every_kind_of_input",
    "eager_training_is_that_of_one_device",
    "the_all_reduce_enters_the_step_time",
    "callbacks_of_keras_see_what_they_see_on_one_device",
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
    parts = replicas.Shares(strategy)
    graphs = ReplicaGraphs(model, 8, True, parts)
    graphs.build(parts.local(data)[0])
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


class Batches(keras.utils.PyDataset):
    """Arrays in batches, of which the last may be shorter."""

    def __init__(self, x, y, size, **options):
        super().__init__(**options)
        self.x, self.y, self.size = x, y, size

    def __len__(self):
        return math.ceil(len(self.x) / self.size)

    def __getitem__(self, index):
        rows = slice(index * self.size, (index + 1) * self.size)
        return self.x[rows], self.y[rows]


@law
def workers_that_are_not_seeded_shuffle_alike(strategy):
    """A rate of zero: the loss of an epoch is the mean over all examples."""
    model = comparing.seeded(under(strategy, comparing.offset()))
    x, y = comparing.regression(64)
    expected = 0.5 * np.square(0.5 - x).sum(axis=1).mean()
    # The last batch of these is short: where it lies moves who reads what.
    for data in ((x, y), (Batches(x, y, 12),)):
        keras.utils.set_random_seed(INDEX)
        history = kb.fit(model, *data, batch_size=8, policy="fixed", verbose=0)
        np.testing.assert_allclose(history.history["loss"], expected, rtol=1e-6)


class Slow(Batches):
    """Takes longer to read than to train on."""

    def __getitem__(self, index):
        time.sleep(0.03)
        return super().__getitem__(index)


@law
def what_keras_stops_after_an_epoch_is_not_read_ahead(strategy):
    """The reading would end then, and the next epoch fail."""
    model = comparing.seeded(under(strategy, momentum()))
    data = Slow(*comparing.regression(512), 8, workers=4)
    history = kb.fit(
        *(model, data), batch_size=8, policy="fixed", superbatch_size=32,
        steps_per_epoch=40, epochs=3, shuffle=False, verbose=0,
    )
    assert len(history.history["loss"]) == 3


SHARDING = tf.data.experimental.AutoShardPolicy
NUMBERED = 64


def numbers(folder=None, policy=SHARDING.AUTO):
    """Returns a dataset of the numbers below 64, and what was read of it.

    Args:
        folder: Where to put four files that hold them, of 17, 3, 13 and 31;
            None for no files.
        policy: How workers share it.
    """
    data, read = tf.data.Dataset.range(NUMBERED), []
    if folder is not None:
        files = [os.path.join(folder, f"{part}.tfrecord") for part in range(4)]
        bounds = (0, 17, 20, 33, NUMBERED)
        for file, start, end in zip(files, bounds, bounds[1:]):
            with tf.io.TFRecordWriter(file) as writer:
                for number in range(start, end):
                    writer.write(str(number).encode())
        data = tf.data.TFRecordDataset(files).map(
            lambda text: tf.strings.to_number(text, tf.int64)
        )

    def note(number):
        read.append(int(number))
        return number

    def one_hot(number):
        number = tf.numpy_function(note, [number], tf.int64)
        return tf.one_hot(tf.ensure_shape(number, ()), NUMBERED), [0.0]

    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = policy
    return data.map(one_hot).batch(8).with_options(options), read


def trained_on(strategy, data, **arguments):
    """Trains for an epoch; returns how often each number was trained on.

    The loss is the mean of w[number] and the rate is 1, so that an update of
    8 examples takes 1/8 off the weight of each.

    Returns:
        Array of 64 counts, larger than that for numbers in smaller updates,
        and the examples of all updates.
    """

    def make_model():
        dense = keras.layers.Dense(
            1, use_bias=False, kernel_initializer="zeros"
        )
        model = keras.Sequential([keras.Input((NUMBERED,)), dense])
        model.compile(
            keras.optimizers.SGD(1.0),
            loss=lambda y, y_pred: keras.ops.mean(y_pred, axis=-1),
        )
        return model

    model = comparing.seeded(under(strategy, make_model))
    trainer = kb.AdaptiveTrainer(
        model, "fixed", superbatch_size=16, verbose=0
    )
    trainer.fit(data, batch_size=8, verbose=0, **arguments)
    counts = -8.0 * model.get_weights()[0][:, 0]
    return counts, trainer.get_state()["examples"]


def assert_dealt_out(strategy, folder, policy):
    """Each worker reads all numbers; each is trained on once."""
    data, read = numbers(folder, policy)
    counts, examples = trained_on(strategy, data, steps_per_epoch=8)
    np.testing.assert_allclose(counts, 1.0, rtol=1e-5)
    assert examples == NUMBERED and set(read) == {*range(NUMBERED)}


def read_apart(folder, policy):
    """Returns a dataset of files, what is read, and what this worker may."""
    data, read = numbers(folder, policy)
    data = data.apply(tf.data.experimental.assert_cardinality(8))
    own = {*range(17), *range(20, 33)}
    if INDEX:
        own = {*range(NUMBERED)} - own
    return data, read, own


@law
def sharding_data(strategy):
    """Whether or not there are files."""
    with tempfile.TemporaryDirectory() as folder:
        assert_dealt_out(strategy, folder, SHARDING.DATA)


@law
def sharding_auto_without_files(strategy):
    assert_dealt_out(strategy, None, SHARDING.AUTO)


@law
def sharding_auto_with_files(strategy):
    """Each worker reads files of its own; each number is trained on once."""
    with tempfile.TemporaryDirectory() as folder:
        data, read, own = read_apart(folder, SHARDING.AUTO)
        counts, examples = trained_on(strategy, data)
        # One worker has read 30 numbers, the other 34: its tail is small.
        assert counts.min() > 1.0 - 1e-5 and examples == NUMBERED
        assert set(read) == own


@law
def sharding_file(strategy):
    """The same, as long as it is told to."""
    with tempfile.TemporaryDirectory() as folder:
        data, read, own = read_apart(folder, SHARDING.FILE)
        _, examples = trained_on(strategy, data.repeat(), steps_per_epoch=20)
        assert examples == 160 and set(read) == own


@law
def sharding_off(strategy):
    """Each worker reads all numbers and trains on all."""
    data, read = numbers(policy=SHARDING.OFF)
    counts, examples = trained_on(strategy, data)
    np.testing.assert_allclose(counts, 2.0, rtol=1e-5)
    assert examples == 2 * NUMBERED
    assert sorted(set(read)) == list(range(NUMBERED))
    # In an epoch of half the length each trains on its own first half.
    data, _ = numbers(policy=SHARDING.OFF)
    counts, examples = trained_on(strategy, data.repeat(), steps_per_epoch=8)
    np.testing.assert_allclose(counts[:32], 2.0, rtol=1e-5)
    assert examples == NUMBERED and not counts[32:].any()


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


@law
def evaluating_again_traces_nothing(strategy):
    """Until `compile` is called again, as with Keras's own function.

    One trace serves batches of any length.
    """
    traced = []

    def loss(y, y_pred):
        traced.append(y)
        return keras.ops.mean((y - y_pred) ** 2, axis=-1)

    def compile_it():
        with strategy.scope():
            trainer.model.compile("sgd", loss)

    trainer = kb.AdaptiveTrainer(
        comparing.seeded(under(strategy, momentum())), verbose=0
    )
    data = comparing.regression(4 * 32)
    compile_it()
    first = trainer.evaluate(*data, verbose=0)
    count = len(traced)
    assert trainer.evaluate(*data, verbose=0) == first
    trainer.evaluate(*comparing.regression(2 * 32 + 7), verbose=0)
    assert len(traced) == count > 0
    assert trainer.model.test_function is None
    compile_it()
    assert trainer.evaluate(*data, verbose=0) == first
    assert len(traced) > count


@law
def evaluating_takes_all_data_whatever_the_steps_per_execution(strategy):
    """Keras calls once for so many batches; 5 are no multiple of 3."""
    x, y = comparing.regression(4 * 32 + 9)

    # Each batch differs from the others, so that none can miss.
    y += np.arange(len(y), dtype="float32")[:, None]

    for eagerly in (False, True):
        make_model = compiled(dense, run_eagerly=eagerly)
        trainer = kb.AdaptiveTrainer(
            comparing.seeded(under(strategy, make_model)), verbose=0
        )
        expected = trainer.evaluate(x, y, verbose=0)
        trainer.model.steps_per_execution = 3
        several = trainer.evaluate(x, y, verbose=0)
        np.testing.assert_allclose(several, expected, rtol=1e-6)


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


def error_of_fit(strategy, *data):
    model = comparing.seeded(under(strategy, momentum()))
    return error_of(
        lambda: kb.fit(model, *data, batch_size=8, policy="fixed", verbose=0)
    )


@law
def other_arrays_are_named(strategy):
    """As long, but cut up by hand: each worker brings examples of its own."""
    x, y = comparing.regression(128)
    error = error_of_fit(strategy, x[INDEX::2], y[INDEX::2])
    assert "first and last examples=" in error, error
    assert "on worker 0" in error and "on worker 1" in error, error


@law
def other_shuffles_are_named(strategy):
    x, y = comparing.regression(64)
    data = tf.data.Dataset.from_tensor_slices((x, y))
    error = error_of_fit(strategy, data.shuffle(64, seed=INDEX).batch(8))
    assert "seeds of Dataset.shuffle=" in error, error
    assert "on worker 0" in error and "on worker 1" in error, error
    tf.random.set_seed(None)
    unseeded = data.shuffle(64).batch(8).map(lambda x, y: (x, y))
    error = error_of_fit(strategy, unseeded)
    assert "`Dataset.shuffle` must have a seed" in error, error
    # With a seed, or where each worker reads by itself, all is well.
    model = comparing.seeded(under(strategy, momentum()))
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = SHARDING.OFF
    for good in (
        data.shuffle(64, seed=3).batch(8),
        unseeded.with_options(options),
    ):
        kb.fit(model, good, batch_size=8, policy="fixed", verbose=0)


@law
def other_validation_is_named(strategy):
    """A worker that validated on less would leave the other waiting."""
    x, y = comparing.regression(128)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)

    def error_with(**arguments):
        model = comparing.seeded(under(strategy, momentum()))
        return error_of(
            lambda: kb.fit(
                model, x, y, batch_size=8, policy="fixed", verbose=0,
                **arguments,
            )
        )

    fewer = 100 - 10 * INDEX
    for arguments, named in (
        ({"validation_data": (x[:fewer], y[:fewer])}, "90 on worker 1"),
        ({"validation_data": data.take(4 - INDEX)}, "3 on worker 1"),
        ({"validation_data": None if INDEX else (x, y)}, "None on worker 1"),
        (
            {"validation_data": (x, y), "validation_steps": fewer},
            "validation_steps=90 on worker 1",
        ),
        ({"initial_epoch": INDEX, "epochs": 3}, "initial_epoch=1 on worker 1"),
    ):
        error = error_with(**arguments)
        assert named in error and "on worker 0" in error, error


@law
def other_backups_are_named(strategy):
    """Each worker sees a disk of its own, or has none to look at."""
    x, y = comparing.regression(512)
    disk = pathlib.Path(sys.argv[1]) / f"disk of {INDEX}"
    fitted = functools.partial(
        adaptive, under(strategy, momentum()), x, y, policy="fixed",
        batch_size=16, superbatch_size=64, epochs=4, shuffle=False,
    )
    for kind in (kb.BackupAndRestore, keras.callbacks.BackupAndRestore):
        folder = disk / kind.__module__
        try:
            fitted(callbacks=[kind(folder), Interrupt()])
        except Interrupted:
            pass
        if INDEX and folder.exists():
            shutil.rmtree(folder)
        error = error_of(lambda: fitted(callbacks=[kind(folder)]))
        assert "epoch to go on at=2 on worker 0" in error, error
        assert "epoch to go on at=None on worker 1" in error, error
    error = error_of(lambda: fitted(callbacks=[kind(folder)][INDEX:]))
    assert "BackupAndRestore=0 on worker 1" in error, error


class Dawdle(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        time.sleep(3.0 * INDEX)


@law
def a_backup_stays_until_all_workers_have_read_it(strategy):
    """Where no epoch is left the first one removes it."""
    x, y = comparing.regression(128)
    folder = pathlib.Path(sys.argv[1]) / "to be removed"
    fitted = functools.partial(
        adaptive, under(strategy, momentum()), x, y, policy="fixed", epochs=2,
    )
    whole = fitted(
        callbacks=[kb.BackupAndRestore(folder, delete_checkpoint=False)]
    )
    again = fitted(callbacks=[Dawdle(), kb.BackupAndRestore(folder)])
    assert again.model.history.epoch == []
    for one, other in zip(again.model.weights, whole.model.weights):
        np.testing.assert_array_equal(one.numpy(), other.numpy(), one.path)


def assert_is_named(strategy, dying):
    """One worker ends without a word; the others say which."""
    model = comparing.seeded(under(strategy, momentum()))
    x, y = comparing.regression(512)

    class Die(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if INDEX == dying and epoch == 1:
                os._exit(9)

    error = error_of(
        lambda: kb.fit(
            model, x, y, policy="fixed", epochs=10**6, verbose=0,
            callbacks=[Die()],
        )
    )
    assert f"lost /job:worker/task:{dying} (localhost:" in error, error
    assert "backup_dir" in error, error


@law
def a_worker_that_dies_is_named(strategy):
    assert_is_named(strategy, 1)


def the_first_worker_that_dies_is_named(strategy):
    """All others had been talking to it."""
    assert_is_named(strategy, 0)


# Only where they are asked for: a worker dies once.
ASKED_FOR = {
    function.__name__: function
    for function in (the_first_worker_that_dies_is_named,)
}


if __name__ == "__main__":
    replica_laws.try_out(
        tf.distribute.MultiWorkerMirroredStrategy(),
        {name: {**LAWS, **ASKED_FOR}[name] for name in sys.argv[2:] or LAWS},
    )
