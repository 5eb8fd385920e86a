"""Training with `jit_compile=True`, where shapes are static.

XLA fuses and reorders what TensorFlow computes one by one, so equal means to
rounding. Each shape costs seconds of compiling: the models are tiny, and few.
"""

import comparing
import keras
import numpy as np
import pytest
from comparing import BASE
from comparing import SUPERBATCH
from comparing import adaptive
from comparing import compiled
from comparing import dense
from comparing import plain
from fake_memory import FakeMeter

import keras_batchsize as kb
from keras_batchsize import memory
from keras_batchsize._memory_examples import read_examples
from keras_batchsize._memory_workload import Workload
from keras_batchsize.batch_profile import BatchProfile
from keras_batchsize.batch_profile import ProfileRow
from keras_batchsize.policies import BatchSizeSchedule

optimizers = keras.optimizers

# Float32 in another order, carried on over some twenty updates.
RTOL = 2e-5


def plain_momentum():
    return optimizers.SGD(0.05, momentum=0.9)


def scaled_momentum():
    return optimizers.LossScaleOptimizer(
        plain_momentum(), dynamic_growth_steps=5
    )


def momentum(**options):
    return compiled(
        dense,
        optimizer=plain_momentum,
        metrics=["mae"],
        **options,
    )


def test_fixed_size_equals_plain_fit(graphs):
    # The last superbatch and its last batch are ragged.
    data = comparing.regression()
    ours = adaptive(momentum(jit_compile=True), *data, policy="fixed")
    assert graphs[0].compiles
    # One graph for whole batches, whatever the superbatch holds of them, and
    # one without XLA for the ragged batch.
    assert graphs[0].traces == 2
    comparing.assert_close(ours, plain(momentum(), *data), RTOL)


def test_measuring_gives_the_same_and_leaves_training_alone(graphs):
    data = comparing.regression()
    arguments = {"policy": "measure", "measure_every": 1}

    ours = adaptive(momentum(jit_compile=True), *data, **arguments)
    theirs = adaptive(momentum(), *data, **arguments)

    comparing.assert_close(ours, plain(momentum(), *data), RTOL)
    assert graphs[0].traces == 2 + 1
    one, other = ours.result.noise_scale, theirs.result.noise_scale
    # Differences of norms: a digit is lost.
    np.testing.assert_allclose(
        [one.squared_norm, one.trace],
        [other.squared_norm, other.trace],
        rtol=1e-4,
    )


def test_accumulating_is_one_batch_with_several_outputs():
    def make(**options):
        return comparing.in_two_outputs(plain_momentum, **options)

    data = comparing.for_two_outputs(128)
    batch_size = 2 * SUPERBATCH
    ours = adaptive(
        make(jit_compile=True),
        *data,
        policy=BatchSizeSchedule({0: batch_size}),
        learning_rate_scaling="none",
        max_batch_size=batch_size,
    )
    theirs = plain(make(), *data, batch_size=batch_size)
    assert ours.history["batch_size"] == [batch_size, batch_size]
    comparing.assert_close(ours, theirs, RTOL)


@pytest.mark.slow
def test_size_changes_equal_those_without_xla_and_compile_once_per_size(graphs):
    sizes = [BASE, SUPERBATCH, 2 * BASE, 2 * SUPERBATCH]
    # A power of two that leaves no ragged superbatch: these have their own.
    data = comparing.regression(128)
    arguments = {
        "policy": BatchSizeSchedule(lambda epoch: sizes[epoch % 4]),
        "learning_rate_scaling": "sqrt",
        "max_batch_size": 2 * SUPERBATCH,
        "measure_every": 1,
        "epochs": 8,
    }
    ours = adaptive(momentum(jit_compile=True), *data, **arguments)
    xla = graphs.pop()
    theirs = adaptive(momentum(), *data, **arguments)
    comparing.assert_close(
        ours, theirs, 10 * RTOL, skip=["examples_per_second", "noise_scale"]
    )

    # Each size twice: plain at three of them, accumulated at the fourth,
    # measured on whole superbatches.
    assert xla.traces == 3 + 1 + 1
    assert ours.history["batch_size"] == 2 * sizes


def test_what_is_cut_after_a_probe_stays_compiled(graphs, monkeypatch):
    # An update of two superbatches, each in two pieces.
    batch_size, fits, micro = 64, 20, 16
    # Of 64 examples none is left over: pieces of 20 would leave some.
    rows = [
        ProfileRow(size, 1, None, 0.001 * size, True) for size in (1, fits)
    ]
    monkeypatch.setattr(
        memory,
        "find_max_batch_size",
        lambda *_, **__: BatchProfile(rows, fits, "memory"),
    )
    data = comparing.regression(64)
    trainer = kb.AdaptiveTrainer(
        momentum(jit_compile=True)(),
        BatchSizeSchedule({0: batch_size}),
        superbatch_size=SUPERBATCH,
        max_batch_size=64,
        verbose=0,
    )
    trainer.probe(*data)
    trainer.fit(*data, batch_size=BASE, verbose=0)
    assert trainer.plan.batch_size == batch_size
    assert trainer.plan.micro_batch_size == micro
    # One graph, of XLA's, and none without it.
    assert graphs[0].traces == 1
    assert graphs[0]._accumulate_xla.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("by_the_trainer", [False, True])
def test_the_ragged_tail_is_probed_as_it_is_trained(by_the_trainer):
    model = momentum(jit_compile=True)()
    examples = read_examples(model, *comparing.regression(BASE))
    with Workload(
        model, examples, FakeMeter(None), by_the_trainer
    ) as workload:
        graphs = workload._graphs
        workload.train(BASE)
        assert graphs.traces == 1
        workload.finish_epoch(BASE, 3)
        # As in training, `test_fixed_size_equals_plain_fit`; plain `fit`
        # compiles it.
        assert graphs.traces == 2
        without_xla = graphs._plain.experimental_get_tracing_count()
        assert without_xla == by_the_trainer


class Buckets(keras.utils.PyDataset):
    """Batches of sequences, each of another length and number."""

    num_batches = 2

    def __getitem__(self, index):
        number, length = ((4, 3), (8, 5))[index]
        y = np.arange(number, dtype="float32")[:, None]
        return np.ones((number, length, 1), "float32"), y


def pieces(epochs):
    """Yields the updates that `Buckets` make, of as many as the first batch."""
    data = Buckets()
    for _ in range(epochs):
        for x, y in (data[0], data[1]):
            for start in range(0, len(x), 4):
                piece = slice(start, start + 4)
                yield x[piece], y[piece]


@pytest.mark.parametrize("jit_compile", [False, True])
def test_batches_larger_than_the_first_are_cut_into_several_updates(
    jit_compile,
):
    def train(jit_compile):
        inputs = keras.Input((None, 1))
        mean = keras.layers.GlobalAveragePooling1D()(inputs)
        model = keras.Model(inputs, keras.layers.Dense(1)(mean))
        model.compile("sgd", "mse", jit_compile=jit_compile)
        return model

    settings = {"batch_size": None, "shuffle": False}
    ours = adaptive(
        lambda: train(jit_compile),
        Buckets(),
        policy="fixed",
        superbatch_size=None,
        **settings,
    )
    theirs = plain(
        lambda: train(False), pieces(2), steps_per_epoch=3, **settings
    )
    assert ours.model.optimizer.iterations == 2 * 3
    comparing.assert_close(ours, theirs, RTOL)


class WithExtra(keras.Model):
    """Logs more than the results of its metrics."""

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        return {**logs, "extra": 1.0}


def test_own_logs_have_the_losses_of_outputs_over_the_epoch():
    def make():
        model = comparing.two_outputs()
        model = WithExtra(model.inputs, model.outputs)
        model.compile(
            "sgd",
            ["mse", "sparse_categorical_crossentropy"],
            jit_compile=True,
        )
        return model

    x, y = comparing.for_two_outputs(64)
    history = adaptive(make, x, [*y.values()], policy="fixed").history
    names = [one for one in history if one.endswith("_loss")]
    assert len(names) == 2
    np.testing.assert_allclose(
        np.sum([history[one] for one in names], axis=0),
        history["loss"],
        rtol=1e-6,
    )


def test_half_precision_equals_plain_fit():
    def make(**options):
        return compiled(
            comparing.of_dtype(dense, "mixed_float16"),
            optimizer=scaled_momentum,
            **options,
        )

    data = comparing.regression()
    ours = adaptive(
        make(jit_compile=True), *data, policy="measure", measure_every=1
    )
    # XLA keeps what it fuses in float32: equal to some roundings of 2⁻¹¹.
    comparing.assert_close(ours, plain(make(), *data), 2e-2)
    assert ours.result.noise_scale.trace > 0.0


def test_measuring_in_bfloat16_leaves_training_alone_bit_for_bit():
    def make():
        return compiled(
            comparing.of_dtype(dense, "mixed_bfloat16"),
            optimizer=plain_momentum,
            jit_compile=True,
        )

    data = comparing.regression()
    ours = adaptive(make(), *data, policy="measure", measure_every=1)
    theirs = adaptive(make(), *data, policy="fixed")
    del theirs.history["noise_scale"], theirs.history["examples_per_second"]
    comparing.assert_same(ours, theirs)
