"""Real allocators, real limits, real out-of-memory errors.

Each function is run in a process of its own by test_memory_processes.py, with
TensorFlow's own allocator limited to 150 MB. A failed allocation makes it wait
for ten seconds, so there are few of them.
"""

import os
import sys
import warnings

if hasattr(os, "sched_setaffinity"):
    # On two processors, wherever it runs: each may hold batches and tensors.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

import keras
import numpy as np
import tensorflow as tf

import keras_batchsize as kb
from keras_batchsize import _memory_meters
from keras_batchsize._memory_examples import read_examples
from keras_batchsize._memory_workload import Workload

FEATURES, WIDTH = 256, 512
# 4 MB per 1000 examples and tensor: more than fits, by far.
TOO_MANY = 40_000
# Seconds that no probe takes: memory ends it, however slow the machine.
PATIENT = 10_000.0


def make(jit_compile=False, features=FEATURES):
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((features,)),
            keras.layers.Dense(WIDTH, activation="relu"),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(WIDTH, activation="relu"),
            keras.layers.Dense(1),
        ]
    )
    model.compile("adam", "mse", jit_compile=jit_compile)
    return model


def dataset(size, features=FEATURES):
    examples = 2**18
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, features)).astype("float32")
    y = rng.normal(size=(64, 1)).astype("float32")
    pool = tf.data.Dataset.from_tensor_slices((x, y))
    return pool.repeat(examples // 64).batch(size)


def losses(model):
    features = model.input_shape[1]
    history = model.fit(
        dataset(64, features), steps_per_epoch=4, epochs=2, verbose=0
    )
    return history.history["loss"]


def a_limit_is_kept():
    """The answer fits, a failure on the way is survived, nothing changes."""
    expected = losses(make())
    model = make()
    profile = kb.find_max_batch_size(model, dataset(64), time_budget=PATIENT)
    assert profile.reason == "memory", profile
    assert profile.measured_by == "allocator statistics"
    assert profile.memory_limit == 150 * 2**20
    assert not any(row.note == "out of memory" for row in profile.rows)
    # From above: already the first batch runs out of memory. (Inside a product
    # of oneDNN TensorFlow would go on with a tensor that is not there.)
    other = kb.find_max_batch_size(
        model, dataset(64), start=4 * TOO_MANY, time_budget=PATIENT
    )
    assert other.rows[-1].note == "out of memory", other
    assert losses(model) == expected
    model.fit(
        dataset(profile.max_batch_size), steps_per_epoch=5, verbose=0
    )


def plain_fit_keeps_batches_of_arrays():
    """Arrays take memory, and so do the batches that Keras makes ahead."""
    # Far more than the step takes: an example has 16 kB, all have 64 MB.
    count, features = 4096, 4096
    x = np.zeros((count, features), "float32")
    y = np.zeros((count, 1), "float32")
    model = keras.Sequential([keras.Input((features,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    profile = kb.find_max_batch_size(model, x, y, time_budget=PATIENT)
    assert profile.reason == "memory", profile
    assert profile.usable_bytes < profile.memory_limit - x.nbytes
    # So many that those which wait count.
    assert count / profile.max_batch_size > 5, profile
    model.fit(x, y, batch_size=profile.max_batch_size, epochs=3, verbose=0)


def settled_memory_is_cut_to_measure():
    """What a tensor takes is what it asks for, whatever ran before."""
    meter = _memory_meters.AllocatorMeter(["CPU:0"])

    def taken(megabytes):
        before = meter.current()
        held = tf.zeros([megabytes * 2**20], tf.uint8)
        rise = meter.current() - before
        del held
        return rise / 2**20

    # The first region that it fits into has 16 MB, and is not cut.
    assert taken(9) > 12
    meter.settle(None)
    for megabytes in (21, 34, 50, 23):
        assert taken(megabytes) == megabytes
    # Again, and with hardly anything left: it neither fails nor waits.
    meter.settle(None)
    held = tf.zeros([90 * 2**20], tf.uint8)
    meter.settle(None)
    assert meter.current() >= 90 * 2**20
    del held


def xla_fails_three_times():
    """Variables are held, so that XLA cannot take them apart."""
    # A batch has 6 MB, the first tensor that is made of it 205.
    size, features = 100_000, 16
    expected = losses(make(True, features))
    model = make(True, features)
    examples = read_examples(model, dataset(64, features))
    meter = _memory_meters.meter_for(model)
    with Workload(model, examples, meter, False) as workload:
        assert workload.compiles
        for _ in range(3):
            # More of them than ever wait.
            waiting = [examples.batch(size) for _ in range(5)]
            del waiting
            try:
                workload.train(size)
            except tf.errors.ResourceExhaustedError as error:
                # The step's, not the pipeline's, which XLA does not compile.
                assert "[Op:__inference__plain_loop" in str(error), error
            else:
                raise AssertionError("It fitted.")
            workload.restore_values()
        peaks, _ = workload.train(64)
        assert 0 < max(peaks) < 150 * 2**20
    assert losses(model) == expected
    xla_fails_in_training()


def xla_fails_in_training():
    """A base batch that XLA cannot hold is carried out in parts."""
    # A tensor has 33 MB, in a half 17.
    size, features = 2**14, 16
    x, y = in_two_batches(size, features)

    def deep(jit_compile):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((features,)),
                keras.layers.Dense(WIDTH, activation="relu"),
                keras.layers.Dense(WIDTH, activation="relu"),
                keras.layers.Dense(1),
            ]
        )
        optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
        model.compile(optimizer, "mse", jit_compile=jit_compile)
        return model

    trainer = halves_a_batch(deep(True), x, y, size)
    compare_with_sums_by_hand(trainer.model, deep(False), x, y, size)


def training_goes_on():
    """A base batch that is too large is carried out in parts."""
    size = 16_384
    x, y = in_two_batches(size, 16)

    def wide():
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((16,)),
                keras.layers.Dense(2048, activation="relu"),
                keras.layers.Dense(1),
            ]
        )
        model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
        return model

    trainer = halves_a_batch(wide(), x, y, size)
    compare_with_sums_by_hand(trainer.model, wide(), x, y, size)


class OwnStep(keras.Sequential):
    """Has a step of its own, whose gradients are never summed."""

    def train_step(self, data):
        return super().train_step(data)


def training_takes_no_more_than_its_trial():
    """Not in the second update of a superbatch either, beside copies."""
    size, width, updates = 1500, 1024, 4
    for kind in (keras.Sequential, OwnStep):
        keras.utils.clear_session()
        model = kind(
            [
                keras.Input((16,)),
                *(keras.layers.Dense(width, "relu") for _ in range(4)),
                keras.layers.Dense(1),
            ]
        )
        model.compile("adam", "mse")
        trainer = kb.AdaptiveTrainer(
            model, "fixed", superbatch_size=updates * size, verbose=0
        )
        data = dataset(size, 16).take(2 * updates)
        profile = trainer.probe(data, start=size, maximum=size)
        (row,) = profile.rows
        variables = profile.resident_bytes
        assert 30 * 2**20 < variables < 256 * 2**20, variables
        tf.config.experimental.reset_memory_stats("CPU:0")
        trainer.fit(data, verbose=0)
        assert int(model.optimizer.iterations) == 2 * updates
        peak = tf.config.experimental.get_memory_info("CPU:0")["peak"]
        sys.stderr.write(f"{row.peak_bytes=} {peak=} {variables=}\n")
        # Equal steps differ. A copy of the variables is far more than that.
        assert row.peak_bytes > peak - variables / 2, (row, peak)


def in_two_batches(size, features):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2 * size, features)).astype("float32")
    return x, rng.normal(size=(2 * size, 1)).astype("float32")


def halves_a_batch(model, x, y, size):
    """Trains on batches that do not fit; returns the trainer."""
    trainer = kb.AdaptiveTrainer(model, policy="fixed", verbose=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = trainer.fit(
            x, y, batch_size=size, epochs=2, shuffle=False, verbose=0
        )
    assert any("Memory ran out" in str(one.message) for one in caught)
    assert trainer.plan.batch_size == size
    assert trainer.plan.accumulation_steps >= 2
    assert len(history.history["loss"]) == 2
    return trainer


def compare_with_sums_by_hand(trained, model, x, y, size):
    """The oracle: the same mean gradients, summed from small parts."""
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    for start in 2 * [*range(0, len(x), size)]:
        total = None
        for first in range(start, start + size, 1024):
            part = slice(first, first + 1024)
            with tf.GradientTape() as tape:
                error = model(x[part], training=True) - y[part]
                loss = tf.reduce_sum(error**2) / size
            found = tape.gradient(loss, model.trainable_weights)
            total = found if total is None else [
                a + b for a, b in zip(total, found)
            ]
        optimizer.apply(total, model.trainable_weights)
    for ours, theirs in zip(trained.get_weights(), model.get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-5)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    sys.stdout.write("KEPT\n")
