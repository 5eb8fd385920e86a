"""Memory that runs out in training: nothing is lost, nothing done twice.

The step fails as a device would let it: in the middle, when some variables have
changed already.
"""

import itertools

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from comparing import BASE
from comparing import compiled

import keras_batchsize as kb
from keras_batchsize import _train_function_memory
from keras_batchsize import exactness
from keras_batchsize import model_state
from keras_batchsize import out_of_memory
from keras_batchsize.policies import BatchSizeSchedule
from keras_batchsize.train_function import AdaptiveTrainFunction

HALVED = "ignore:Memory ran out:RuntimeWarning"

# k micro-batches are one batch up to rounding, as in test_micro_batches.py.
RTOL = 2e-5


class TooLarge(keras.layers.Layer):
    """Fails on more than `most` examples, after it has changed its state."""

    def __init__(self, most, calls=None, **options):
        super().__init__(**options)
        self.most = most
        # Keras would track a copy of the list.
        self.note = None if calls is None else calls.append

    def build(self, input_shape):
        self.seen = self.add_weight(
            shape=(), initializer="zeros", trainable=False
        )

    def call(self, x, training=False):
        if training:
            size = tf.shape(x)[0]
            self.seen.assign_add(tf.cast(size, tf.float32))
            x = tf.numpy_function(self._check, [x, size], x.dtype)
            x.set_shape((None, comparing.FEATURES))
        return x

    def _check(self, x, size):
        if self.note is not None:
            self.note(int(size))
        if size > self.most:
            raise MemoryError("made up")
        return x


class AlwaysTooLarge(TooLarge):
    """Fails without training, too."""

    def call(self, x, training=False):
        return super().call(x, training=True)


def of_limited(most, calls=None, layer=TooLarge):
    """Returns a factory of models that fail above so many examples."""

    def make():
        inputs = keras.Input((comparing.FEATURES,))
        hidden = layer(most, calls)(inputs)
        hidden = keras.layers.Dense(6, activation="tanh")(hidden)
        return keras.Model(inputs, keras.layers.Dense(1)(hidden))

    return compiled(
        make,
        optimizer=lambda: keras.optimizers.SGD(0.05, momentum=0.9),
        metrics=["mae"],
    )


@pytest.mark.filterwarnings(HALVED)
@pytest.mark.parametrize("most", [3, 1, 5])
def test_batch_is_carried_out_in_smaller_parts(most):
    data = comparing.regression()
    ours = comparing.adaptive(of_limited(most), *data, policy="fixed")
    theirs = comparing.plain(of_limited(10**6), *data)
    # Each example once, that is: `seen` counts them.
    comparing.assert_close(ours, theirs, RTOL)
    assert ours.result.batch_size == BASE
    assert ours.result.plan.micro_batch_size <= most
    assert ours.result.plan.batch_size == BASE


class Shrinks(keras.callbacks.Callback):
    """Leaves room for 3 examples, once the first superbatch is done."""

    def on_train_batch_end(self, batch, logs=None):
        self.model.layers[1].most = 3


@pytest.mark.filterwarnings(HALVED)
def test_metrics_of_an_epoch_go_on_where_memory_runs_out_within_it():
    data = comparing.regression()
    ours = comparing.adaptive(
        *(of_limited(10**6), *data), policy="fixed", callbacks=[Shrinks()]
    )
    assert ours.result.plan.micro_batch_size <= 3
    theirs = comparing.plain(of_limited(10**6), *data)
    comparing.assert_close(ours, theirs, RTOL)


def test_one_line_says_so():
    data = comparing.regression()
    with pytest.warns(RuntimeWarning) as caught:
        comparing.adaptive(of_limited(4), *data, policy="fixed")
    texts = [
        str(one.message) for one in caught if one.category is RuntimeWarning
    ]
    assert texts == [
        "Memory ran out with 8 examples in one pass. Going on with 4; the "
        "batch size stays 8, nothing is lost."
    ]


@pytest.mark.filterwarnings(HALVED)
def test_measuring_in_smaller_parts_changes_nothing():
    # Parts of a superbatch of 128 are 16 examples, batches are 8.
    data = comparing.regression(256)
    arguments = {"superbatch_size": 128, "max_batch_size": 8}
    ours = comparing.adaptive(
        of_limited(8),
        *data,
        policy="measure",
        measure_every=1,
        **arguments,
    )
    theirs = comparing.plain(of_limited(10**6), *data)
    comparing.assert_same(ours, theirs)
    assert ours.result.noise_scale.squared_norm > 0


@pytest.mark.parametrize(("most", "tried"), [(3, [16, 8, 4]), (8, [16, 8])])
def test_the_loss_is_tried_on_no_more_examples_than_fit(most, tried):
    # Parts of a superbatch of 16 are two examples, as are batches.
    data, calls = comparing.regression(32), []
    ours = comparing.adaptive(
        of_limited(most, calls, AlwaysTooLarge),
        *data,
        policy="measure",
        measure_every=1,
        batch_size=2,
        superbatch_size=16,
        max_batch_size=2,
    )
    theirs = comparing.plain(
        of_limited(10**6, layer=AlwaysTooLarge), *data, batch_size=2
    )
    comparing.assert_same(ours, theirs)
    # From the first that fits on it is drawn several times.
    larger = [size for size in calls if size > 2]
    assert list(dict.fromkeys(larger)) == tried
    assert max(calls.count(size) for size in larger if size > most) == 1


def test_a_loss_is_tried_on_fewer_examples_where_more_do_not_fit():
    def total(y, y_pred):
        return keras.ops.sum(keras.ops.square(y - y_pred))

    model = of_limited(5, layer=AlwaysTooLarge)()
    model.compile("sgd", total)
    data = tuple(map(tf.constant, comparing.regression(16)))
    with pytest.raises(exactness.CannotBeCut, match="on the first 4 examples"):
        exactness.check_loss(model, "examples", data)


@pytest.mark.filterwarnings(HALVED)
def test_a_size_that_grows_too_large():
    data = comparing.regression(64)
    calls = []
    sizes = BatchSizeSchedule({0: 8, 1: 32})
    ours = comparing.adaptive(
        of_limited(10, calls), *data, policy=sizes, epochs=3
    )
    assert ours.result.batch_size == 32
    assert max(ours.history["batch_size"]) == 32
    # Failures at 32 and 16; else no more than 8 at a time.
    assert [size for size in calls if size > 10] == [32, 16]
    other = comparing.adaptive(
        of_limited(10**6), *data, policy=sizes, epochs=3
    )
    # Micro-batches are measured for free, whole batches are not.
    skip = ("noise_scale", "examples_per_second")
    comparing.assert_close(ours, other, RTOL, skip=skip)


@pytest.mark.filterwarnings(HALVED)
def test_the_limit_is_remembered_in_the_state():
    data, calls = comparing.regression(), []
    ours = comparing.adaptive(of_limited(4), *data, policy="fixed")
    state = ours.result.get_state()
    assert state["largest_micro_batch_size"] == 4
    trainer = kb.AdaptiveTrainer(
        of_limited(4, calls)(), policy="fixed", superbatch_size=32, verbose=0
    )
    trainer.set_state(state)
    trainer.fit(*data, batch_size=8, epochs=1, verbose=0)
    assert max(calls) == 4


@pytest.mark.filterwarnings(HALVED)
def test_one_example_too_many():
    with pytest.raises(ValueError, match="One example must fit"):
        comparing.adaptive(
            of_limited(0), *comparing.regression(), policy="fixed"
        )


def test_model_that_cannot_be_cut_says_so():
    class Own(keras.Model):
        def train_step(self, data):
            size = tf.shape(data[0])[0]
            tf.numpy_function(fails, [size], tf.int32)
            return super().train_step(data)

    def fails(size):
        raise MemoryError("made up")

    def make():
        inputs = keras.Input((comparing.FEATURES,))
        return Own(inputs, keras.layers.Dense(1)(inputs))

    with pytest.warns(RuntimeWarning, match="Memory ran out"):
        with pytest.raises(ValueError, match="overrides `train_step`"):
            comparing.adaptive(
                compiled(make), *comparing.regression(), policy="fixed"
            )


@pytest.mark.parametrize("jit_compile", [False, True])
def test_unheld_variables_end_training_with_the_backup_named(
    jit_compile, monkeypatch, tmp_path
):
    monkeypatch.setenv("TF_CPU_ALLOCATOR_USE_BFC", "true")
    monkeypatch.setattr(_train_function_memory, "_HELD_ALWAYS", 1)
    model = of_limited(10**6)()
    model.jit_compile = jit_compile
    guard = _train_function_memory.MemoryGuard(model)

    def fails():
        raise tf.errors.ResourceExhaustedError(None, None, "OOM")

    for _ in range(2):
        assert guard.run(lambda: 1, "key", None) == 1
    reason = "XLA has freed" if jit_compile else "half-made"
    backup = tmp_path / "backup"
    with pytest.raises(RuntimeError, match="Nothing has been saved"):
        guard.run(fails, "key", None, str(backup))
    backup.mkdir()
    with pytest.raises(RuntimeError, match="Nothing has been saved"):
        guard.run(fails, "key", None, str(backup))
    model.save_weights(backup / "latest.weights.h5")
    with pytest.raises(RuntimeError, match=f"{reason}(?s:.*)'{backup}'"):
        guard.run(fails, "key", None, str(backup))
    with pytest.raises(RuntimeError, match="Without a `BackupAndRestore`"):
        guard.run(fails, "key", None)
    # A size that has not run yet is held, whatever it costs.
    sizes = iter(["smaller"])
    results = iter([fails, lambda: 2])
    assert guard.run(lambda: next(results)(), "new", lambda: next(sizes)) == 2


@pytest.mark.parametrize("jit_compile", [False, True])
def test_variables_that_xla_has_freed_are_not_used(jit_compile, monkeypatch):
    attempt, attempts = AdaptiveTrainFunction._attempt, itertools.count()
    value, used = keras.Variable.value, []

    def noted(variable):
        used.append(variable.path)
        return value.fget(variable)

    def runs_out(self, *arguments):
        # Superbatches of 32, 32 and 6 examples: the next has run twice.
        if next(attempts) < 3:
            return attempt(self, *arguments)
        self._model.jit_compile = jit_compile
        monkeypatch.setattr(keras.Variable, "value", property(noted))
        raise tf.errors.ResourceExhaustedError(None, None, "OOM")

    monkeypatch.setattr(AdaptiveTrainFunction, "_attempt", runs_out)
    make = of_limited(10**6)
    # Momentum is that of four times the rate, and is to be given back.
    policy = BatchSizeSchedule({0: 4 * BASE})
    arguments = {"policy": policy, "learning_rate_scaling": "linear"}
    with pytest.raises(RuntimeError, match="training cannot go on"):
        comparing.adaptive(make, *comparing.regression(), **arguments)
    assert bool(used) == (not jit_compile)


@pytest.mark.parametrize("is_limited", [True, False])
def test_variables_are_held_where_memory_may_run_out(is_limited, monkeypatch):
    if is_limited:
        monkeypatch.setenv("TF_CPU_ALLOCATOR_USE_BFC", "true")
    guard = _train_function_memory.MemoryGuard(of_limited(10**6)())
    held = []
    monkeypatch.setattr(
        out_of_memory,
        "HeldValues",
        lambda variables: held.append(len(variables)),
    )
    for _ in range(4):
        guard.run(lambda: 1, "key", None)
    guard.run(lambda: 1, "a new size", None)
    # Where it may not, a size that has run twice will run again.
    assert len(held) == (5 if is_limited else 3)


def test_running_out_unheld_on_a_plain_cpu_says_why():
    guard = _train_function_memory.MemoryGuard(of_limited(1)())

    def fails():
        raise MemoryError

    for _ in range(2):
        guard.run(lambda: 1, "key", None)
    with pytest.raises(RuntimeError, match="only until a size has run"):
        guard.run(fails, "key", None)


def test_seeds_that_layers_share_are_put_back():
    keras.utils.set_random_seed(0)
    keras.random.normal(())  # Makes the generator, if there is none yet.
    guard = _train_function_memory.MemoryGuard(of_limited(1)())
    drawn = []

    def draws_then_fails():
        drawn.append(float(keras.random.normal(())))
        if len(drawn) == 1:
            raise MemoryError

    guard.run(draws_then_fails, "key", lambda: "smaller")
    assert drawn[0] == drawn[1]


def test_a_measurement_that_is_too_large_is_no_surprise(monkeypatch):
    # Updates of eight examples have run often; parts of 16 have not.
    monkeypatch.setattr(_train_function_memory, "_HELD_ALWAYS", 0)
    trainer = kb.AdaptiveTrainer(
        of_limited(8)(),
        "measure",
        superbatch_size=128,
        max_batch_size=8,
        measure_every=64,
        verbose=0,
    )
    with pytest.warns(RuntimeWarning, match="16 examples in one pass"):
        trainer.fit(*comparing.regression(1024), batch_size=8, verbose=0)
    assert trainer.noise_scale.trace > 0.0


class RaggedIsLarge(TooLarge):
    """Fails on the ragged batch alone: XLA, say, does not compile that."""

    def _check(self, x, size):
        if size == 6:
            raise MemoryError("made up")
        return x


def test_a_ragged_tail_that_is_too_large_is_no_surprise(monkeypatch):
    # Whole batches have run often; the last one, of six examples, has not.
    monkeypatch.setattr(_train_function_memory, "_HELD_ALWAYS", 0)
    inputs = keras.Input((comparing.FEATURES,))
    hidden = RaggedIsLarge(0)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile("sgd", "mse")
    trainer = kb.AdaptiveTrainer(
        model, "fixed", superbatch_size=8, max_batch_size=8, verbose=0
    )
    with pytest.warns(RuntimeWarning, match="Memory ran out"):
        trainer.fit(*comparing.regression(), batch_size=8, verbose=0)
    assert float(model.layers[1].seen.value) == comparing.EXAMPLES


def test_other_workers_are_not_left_waiting(monkeypatch):
    guard = _train_function_memory.MemoryGuard(of_limited(1)(), False)
    # Nothing would come of it.
    monkeypatch.setattr(out_of_memory, "HeldValues", None)

    def fails():
        raise MemoryError

    with pytest.raises(RuntimeError, match="other workers wait"):
        guard.run(fails, "key", None)


class RunsOut(keras.callbacks.Callback):
    """Lets what is left of memory go at the end of an epoch."""

    def on_epoch_end(self, epoch, logs=None):
        self.model.layers[1].most = 0


@pytest.mark.parametrize("kind", ["argument", "ours", "of Keras"])
def test_backup_is_named_whoever_makes_it(kind, tmp_path):
    folder, callbacks = str(tmp_path / "backup"), [RunsOut()]
    if kind == "ours":
        callbacks.append(kb.BackupAndRestore(folder))
    if kind == "of Keras":
        callbacks.append(keras.callbacks.BackupAndRestore(folder))
    trainer = kb.AdaptiveTrainer(
        of_limited(10**6)(),
        policy="fixed",
        superbatch_size=32,
        backup_dir=folder if kind == "argument" else None,
        verbose=0,
    )
    # On a CPU without a limit a size that has run twice is not held.
    with pytest.raises(RuntimeError, match="cannot go on") as caught:
        trainer.fit(
            *comparing.regression(96),
            batch_size=8,
            epochs=3,
            verbose=0,
            callbacks=callbacks,
        )
    assert f"Start again with backup_dir={folder!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (tf.errors.ResourceExhaustedError(None, None, "x"), True),
        (MemoryError(), True),
        (tf.errors.InternalError(None, None, "CUDA_ERROR_OUT_OF_MEMORY"), True),
        (tf.errors.UnknownError(None, None, "Failed to allocate 4 B"), True),
        (
            tf.errors.InternalError(
                None, None, "Failed copying: Dst tensor is not initialized."
            ),
            True,
        ),
        (
            tf.errors.InternalError(
                None, None, "Failed to call DoRnnForward with model config: "
            ),
            True,
        ),
        (tf.errors.InternalError(None, None, "Blas GEMM failed"), False),
        (ValueError("out of memory"), False),
        (tf.errors.InvalidArgumentError(None, None, "out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert out_of_memory.is_out_of_memory(error) == expected


def test_held_values_are_those_from_before():
    model = of_limited(10**6)()
    model.fit(*comparing.regression(), verbose=0)
    before = comparing.variables_of(model)
    held = out_of_memory.HeldValues(model_state.variables_of(model))
    model.fit(*comparing.regression(), batch_size=10, verbose=0)
    held.put_back()
    after = comparing.variables_of(model)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, name)
