"""Law 2 of docs/design.md: k micro-batches are one batch, to rounding.

The oracle is always plain `fit` with the whole batch at once.
"""

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from comparing import BASE
from comparing import SUPERBATCH
from comparing import adaptive
from comparing import compiled
from comparing import dense
from comparing import plain
from keras import layers

from keras_batchsize import learning_rate
from keras_batchsize import slicing
from keras_batchsize.policies import BatchSizeSchedule
from keras_batchsize.update_graphs import UpdateGraphs

optimizers, schedules = keras.optimizers, keras.optimizers.schedules

# Float32 sums in another order: rounding of 6e-8 per term, in gradients that
# are differences of terms some hundred times larger. Three updates carry it on.
RTOL = 2e-5

BATCH, EXAMPLES = 24, 70


def accumulated(make_model, *data, micro):
    """Trains an epoch in batches of 24, made of micro-batches."""
    model = comparing.seeded(make_model)
    graphs = UpdateGraphs(model, BATCH, True)
    if model.run_eagerly:
        # `fit` has built the loss and the metrics before it trains.
        model.evaluate(*data, verbose=0)
        model.reset_metrics()
    data = keras.tree.map_structure(tf.convert_to_tensor, data)
    graphs.build(data)
    logs, _, _, norms = graphs.accumulate(
        graphs.zeros(),
        data,
        len(data[0]),
        (BATCH, micro),
        True,
        learning_rate.rate_in_force(1.0, 1.0, 0, 0),
    )
    # The end of `fit`, which swaps in the averages of EMA.
    model.optimizer.finalize_variable_values(model.trainable_weights)
    history = {name: [float(value)] for name, value in logs.items()}
    variables = comparing.variables_of(model)
    return comparing.Trained(model, history, variables, norms.numpy())


def test_loops_cut_batches_from_data_where_they_are_used():
    """What a loop is handed as it is stays on the host, where there is a GPU.

    Each update would send the whole superbatch to it.
    """
    handed = []

    def examples(data, start, size):
        handed.append({leaf.op.type for leaf in data})
        return slicing.examples(data, start, size)

    model = comparing.seeded(compiled(dense))
    data = tuple(map(tf.convert_to_tensor, comparing.regression(BATCH)))
    graphs = UpdateGraphs(model, BATCH, True, examples)
    graphs.build(data)
    rate = learning_rate.rate_in_force(1.0, 1.0, 0, 0)
    graphs.plain(data, 0, BATCH, 8, rate)
    graphs.measure(data, BATCH)
    graphs.accumulate(graphs.zeros(), data, BATCH, (BATCH, 8), True, rate)
    assert len(handed) >= 3
    assert all(types == {"Identity"} for types in handed), handed


def assert_law_holds(make_model, *data, micro, rtol=RTOL, **plain_arguments):
    x, y, *weights = data
    if weights:
        plain_arguments["sample_weight"] = weights[0]
    theirs = plain(
        make_model,
        x,
        y,
        batch_size=BATCH,
        epochs=1,
        shuffle=False,
        **plain_arguments,
    )
    ours = accumulated(make_model, *data, micro=micro)
    comparing.assert_close(ours, theirs, rtol)
    return ours


@pytest.mark.parametrize(
    ("micro", "counts"),
    [
        (12, [2, 2, 2]),
        (8, [3, 3, 3]),
        # 24 = 6 + 6 + 6 + 6, and the ragged batch 22 = 6 + 6 + 6 + 4.
        (6, [4, 4, 4]),
        # Neither batch is a multiple: 24 = 7 + 7 + 7 + 3, 22 = 7 + 7 + 7 + 1.
        (7, [4, 4, 4]),
        (24, [1, 1, 1]),
    ],
)
def test_micro_batches_are_one_batch(micro, counts):
    make_model = compiled(
        dense,
        optimizer=lambda: optimizers.SGD(0.05, momentum=0.9),
        metrics=["mae"],
    )
    ours = assert_law_holds(
        make_model, *comparing.regression(EXAMPLES), micro=micro
    )
    assert ours.result[:, 3].tolist() == counts
    assert ours.result[:, 2].tolist() == [24, 24, 22]


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: optimizers.SGD(0.05, clipnorm=0.1),
        lambda: optimizers.SGD(0.05, global_clipnorm=0.1),
        lambda: optimizers.SGD(0.05, clipvalue=0.02),
        lambda: optimizers.AdamW(0.01, weight_decay=0.1),
        lambda: optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5),
    ],
    ids=["clipnorm", "global_clipnorm", "clipvalue", "AdamW", "EMA"],
)
def test_micro_batches_are_one_batch_to_the_optimizer(optimizer):
    def regularised():
        return dense(kernel_regularizer="l2", activity_regularizer="l1")

    make_model = compiled(regularised, optimizer=optimizer)
    # Adam divides by the root of a squared gradient, which for a gradient
    # near zero passes its relative rounding on in full.
    assert_law_holds(
        make_model, *comparing.regression(EXAMPLES), micro=6, rtol=1e-4
    )


def weights_of(shape):
    return np.random.default_rng(1).uniform(0.1, 3.0, shape).astype("float32")


@pytest.mark.parametrize(
    "reduction", ["sum_over_batch_size", "mean", "mean_with_sample_weight"]
)
def test_micro_batches_are_one_batch_with_sample_weights(reduction):
    make_model = compiled(
        dense,
        optimizer=lambda: optimizers.SGD(0.05, momentum=0.9),
        loss=keras.losses.MeanSquaredError(reduction=reduction),
        weighted_metrics=["mae"],
    )
    data = comparing.regression(EXAMPLES)
    assert_law_holds(make_model, *data, weights_of(EXAMPLES), micro=7)


def sequences():
    """Returns (x, y): tokens with zeros for padding, two values per token."""
    rng = np.random.default_rng(2)
    x = rng.integers(1, 6, size=(EXAMPLES, 4))
    lengths = rng.integers(1, 5, size=EXAMPLES)
    x[np.arange(4) >= lengths[:, None]] = 0
    y = rng.normal(size=(EXAMPLES, 4, 2)).astype("float32")
    return x, y


def tagger():
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Embedding(6, 3, mask_zero=True),
            layers.Dense(3, activation="tanh"),
            layers.Dense(2),
        ]
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "reduction", ["sum_over_batch_size", "mean_with_sample_weight"]
)
def test_micro_batches_are_one_batch_with_masks(reduction, weighted):
    make_model = compiled(
        tagger,
        optimizer=lambda: optimizers.SGD(0.1),
        loss=keras.losses.MeanSquaredError(reduction=reduction),
        metrics=["mae"],
    )
    weights = [weights_of((EXAMPLES, 4))] if weighted else []
    assert_law_holds(make_model, *sequences(), *weights, micro=7)


def test_micro_batches_are_one_batch_with_a_mask_per_example():
    def one_output_per_sequence():
        inputs = keras.Input((comparing.FEATURES,))
        masked = layers.Masking()(keras.ops.expand_dims(inputs, 1))
        return keras.Model(inputs, layers.Dense(1)(masked))

    make_model = compiled(
        one_output_per_sequence,
        loss=keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"),
    )
    x, y = comparing.regression(EXAMPLES)
    x[::3] = 0.0
    assert_law_holds(
        make_model, x, y[:, None], weights_of((EXAMPLES,)), micro=7
    )


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_micro_batches_are_one_batch_with_several_outputs(run_eagerly):
    make_model = comparing.in_two_outputs(
        lambda: optimizers.SGD(0.05), run_eagerly=run_eagerly
    )
    assert_law_holds(make_model, *comparing.for_two_outputs(EXAMPLES), micro=7)


# Batches larger than a superbatch.


@pytest.mark.parametrize("batch_size", [2 * SUPERBATCH, 4 * SUPERBATCH])
def test_accumulating_over_superbatches_is_one_batch(batch_size):
    # Epochs of 150 examples end with a batch of 22, in whichever superbatch.
    data = comparing.classification(150)
    make_model = compiled(
        lambda: dense(units=comparing.CLASSES, activation="softmax"),
        optimizer=lambda: optimizers.SGD(0.05, momentum=0.9, clipnorm=0.3),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    arguments = {"class_weight": {0: 1.0, 1: 3.0, 2: 0.5}}
    theirs = plain(make_model, *data, batch_size=batch_size, **arguments)

    ours = adaptive(
        make_model,
        *data,
        policy=BatchSizeSchedule({0: batch_size}),
        learning_rate_scaling="none",
        max_batch_size=batch_size,
        **arguments,
    )

    assert ours.history["batch_size"] == [batch_size, batch_size]
    comparing.assert_close(ours, theirs, RTOL)


def test_accumulated_updates_take_the_rate_of_their_first_example():
    def decaying(steps):
        return compiled(
            dense,
            optimizer=lambda: optimizers.SGD(
                schedules.ExponentialDecay(0.1, steps, 0.5)
            ),
        )

    # On the examples clock the updates are steps 0, 8 and 16.
    data = comparing.regression(150)
    theirs = plain(decaying(1), *data, batch_size=64, epochs=1)
    ours = adaptive(
        decaying(8),
        *data,
        policy=BatchSizeSchedule({0: 64}),
        learning_rate_scaling="none",
        max_batch_size=64,
        epochs=1,
    )
    comparing.assert_close(ours, theirs, RTOL)


def test_update_that_data_of_unknown_length_cuts_short():
    x, y = comparing.regression(150)

    def batches():
        for start in range(0, 150, BASE):
            yield x[start : start + BASE], y[start : start + BASE]

    # On the examples clock the two updates are steps 0 and 16.
    decay = schedules.ExponentialDecay(0.1, 16, 0.5)
    make_model = compiled(dense, optimizer=lambda: optimizers.SGD(decay))
    theirs = plain(
        compiled(
            dense,
            optimizer=lambda: optimizers.SGD(
                schedules.ExponentialDecay(0.1, 1, 0.5)
            ),
        ),
        *(x, y),
        batch_size=128,
        epochs=1,
        shuffle=False,
    )
    # Plain `fit` warns so, too, at the end of a generator.
    with pytest.warns(UserWarning, match="ran out of data"):
        ours = adaptive(
            make_model,
            batches(),
            batch_size=None,
            policy=BatchSizeSchedule({0: 128}),
            learning_rate_scaling="none",
            max_batch_size=128,
            epochs=1,
        )

    assert int(ours.model.optimizer.iterations) == 2
    comparing.assert_close(ours, theirs, RTOL)


def test_stopping_within_an_accumulated_update_makes_it():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 2

    make_model = compiled(dense, optimizer=lambda: optimizers.SGD(0.05))
    x, y = comparing.regression(150)
    stopped = 3 * SUPERBATCH
    theirs = plain(
        make_model, x[:stopped], y[:stopped], batch_size=stopped, epochs=1,
        shuffle=False,
    )
    ours = adaptive(
        make_model,
        x,
        y,
        policy=BatchSizeSchedule({0: 128}),
        learning_rate_scaling="none",
        max_batch_size=128,
        shuffle=False,
        callbacks=[Stop()],
    )

    assert int(ours.model.optimizer.iterations) == 1
    comparing.assert_close(ours, theirs, RTOL)


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_losses_are_told_before_the_first_update_of_an_epoch(run_eagerly):
    seen = []

    class Seen(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(logs)

    make_model = comparing.in_two_outputs(
        lambda: optimizers.SGD(0.05), run_eagerly=run_eagerly
    )
    x, y = comparing.for_two_outputs(4 * SUPERBATCH)
    ours = adaptive(
        make_model,
        x,
        y,
        policy=BatchSizeSchedule({0: 4 * SUPERBATCH}),
        max_batch_size=4 * SUPERBATCH,
        shuffle=False,
        callbacks=[Seen()],
    )

    # Weights are what they were until the update, which the fourth makes.
    model = comparing.seeded(make_model)
    for index, logs in enumerate(seen[:4]):
        stop = (index + 1) * SUPERBATCH
        expected = model.evaluate(
            x[:stop],
            {name: values[:stop] for name, values in y.items()},
            batch_size=stop,
            verbose=0,
            return_dict=True,
        )
        assert set(logs) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(logs[name], value, RTOL, err_msg=name)
    assert min(logs["loss"] for logs in seen[4:]) > 0.0
    rows = ours.result.report.rows
    assert [row.loss for row in rows] == [logs["loss"] for logs in seen]


# What cannot be one batch.


def test_batch_norm_normalises_by_micro_batches():
    """The limit of the law: BatchNorm compares the examples it sees at once."""
    norm = layers.BatchNormalization(momentum=0.5)

    def make():
        model = keras.Sequential(
            [keras.Input((comparing.FEATURES,)), norm, layers.Dense(1)]
        )
        model.compile(optimizer=optimizers.SGD(0.0), loss="mse")
        return model

    x, y = comparing.regression(EXAMPLES)
    accumulated(make, x[:BATCH], y[:BATCH], micro=8)

    expected = np.zeros(comparing.FEATURES)
    for start in range(0, BATCH, 8):
        mean = x[start : start + 8].mean(axis=0)
        expected = 0.5 * expected + 0.5 * mean
    np.testing.assert_allclose(norm.moving_mean, expected, rtol=1e-5)


# Half precision.


def in_float16(initial_scale):
    def make():
        keras.config.set_dtype_policy("mixed_float16")
        try:
            model = dense()
        finally:
            keras.config.set_dtype_policy("float32")
        model.compile(
            optimizer=optimizers.LossScaleOptimizer(
                optimizers.SGD(0.05, momentum=0.9),
                initial_scale=initial_scale,
            ),
            loss="mse",
        )
        return model

    return make


def test_infinity_in_the_last_micro_batch_skips_the_update():
    x, y = comparing.regression(EXAMPLES)
    # The last micro-batch of the first update.
    x[BATCH - 1] = np.inf

    ours = accumulated(in_float16(2.0**10), x, y, micro=6)

    optimizer = ours.model.optimizer
    assert float(optimizer.dynamic_scale) == 2.0**9
    assert int(optimizer.iterations) == 2
    assert all(np.isfinite(one).all() for one in ours.model.get_weights())
    # The first row is not finite, so it is counted and not averaged; the
    # other two are the updates of a training that never saw the first batch.
    assert not np.isfinite(ours.result[0, :2]).any()
    without = accumulated(
        in_float16(2.0**9), x[BATCH:], y[BATCH:], micro=6
    )
    comparing.assert_close(ours, without, RTOL, skip=["loss"])


def test_gradients_are_summed_in_float32():
    def halves():
        keras.config.set_dtype_policy("float16")
        try:
            return dense()
        finally:
            keras.config.set_dtype_policy("float32")

    make_model = compiled(
        halves,
        optimizer=lambda: optimizers.SGD(1e-3, loss_scale_factor=2.0**10),
    )
    x, y = comparing.regression(EXAMPLES)

    ours = accumulated(make_model, x, 10 * y, micro=6)

    # Mean gradients of about 20, times the scale, fit float16; 24 of them do
    # not.
    assert ours.model.weights[0].dtype == "float16"
    assert np.isfinite(ours.result).all()
    assert all(np.isfinite(one).all() for one in ours.model.get_weights())


def test_a_single_feature():
    # A dimension of 1 is not told from one that is not known.
    def one_feature():
        return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])

    x, y = comparing.regression()
    make = comparing.compiled(one_feature)
    arguments = {"policy": "measure", "measure_every": 1}
    ours = comparing.adaptive(make, x[:, :1], y, **arguments)
    comparing.assert_same(ours, comparing.plain(make, x[:, :1], y))


@pytest.mark.filterwarnings("ignore:The model does not have any trainable")
def test_a_model_without_trainable_weights():
    def frozen():
        model = dense()
        model.trainable = False
        return model

    data, make = comparing.regression(), compiled(frozen)
    theirs = plain(make, *data, batch_size=4 * BASE)
    ours = adaptive(
        make,
        *data,
        policy=BatchSizeSchedule({0: 4 * BASE}),
        superbatch_size=BASE,
        max_batch_size=4 * BASE,
    )
    comparing.assert_close(ours, theirs, RTOL)
