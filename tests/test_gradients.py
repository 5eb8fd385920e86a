"""Measured gradients of a model whose gradients are known.

`comparing.Offset` has the gradient w - xᵢ for example i, so both moments are
functions of the data: G = w - mean(x), tr(Σ) = trace of the covariance of x.
The graph's norms are compared with NumPy's for the same parts.
"""

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from comparing import FEATURES
from comparing import Offset
from comparing import adaptive
from comparing import of_layer
from comparing import offset

from keras_batchsize import learning_rate
from keras_batchsize import noise
from keras_batchsize.update_graphs import UpdateGraphs

optimizers = keras.optimizers

# Sums of some hundred float32 squares; what is kept in float64 adds nothing.
RTOL = 2e-6


def rows(examples, seed=0):
    """Returns x with a known mean and covariance, far from isotropic."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, FEATURES)) * [2.0, 1.0, 0.5, 0.2, 0.1]
    return (x + 0.2).astype("float32")


def graphs_for(model, *data):
    """Returns the graphs of a model and its data as tensors."""
    graphs = UpdateGraphs(model, 8, True)
    data = keras.tree.map_structure(tf.convert_to_tensor, data)
    graphs.build(data)
    return graphs, data


def measured(make_model, *data, examples=None):
    """Returns the `MicroBatchNorms` of a measurement."""
    graphs, data = graphs_for(comparing.seeded(make_model), *data)
    row = graphs.measure(data, examples or int(data[0].shape[0]))
    return noise.MicroBatchNorms(*row.numpy().tolist())


def accumulated(make_model, *data, batch_size, micro):
    """Returns the model and the `MicroBatchNorms` of each update."""
    model = comparing.seeded(make_model)
    graphs, data = graphs_for(model, *data)
    *_, norms = graphs.accumulate(
        graphs.zeros(),
        data,
        int(data[0].shape[0]),
        (batch_size, micro),
        True,
        learning_rate.rate_in_force(1.0, 1.0, 0, 0),
    )
    return model, [noise.MicroBatchNorms(*row) for row in norms.numpy()]


def norms_of(gradients, weights):
    """The fields of `MicroBatchNorms` from the gradients of the parts.

    Args:
        gradients: float64 array of shape (parts, parameters).
        weights: What each part weighs.
    """
    weights = np.asarray(weights, float)
    products = 0.0
    for k in range(1, len(weights)):
        before = np.average(gradients[:k], axis=0, weights=weights[:k])
        products += k * (gradients[k] @ before) ** 2
    mean = np.average(gradients, axis=0, weights=weights)
    squares = np.average(np.sum(gradients**2, axis=1), weights=weights)
    return squares, mean @ mean, products


def parts_of(per_example, sizes, weights=None):
    """Weighted mean gradient and weight of each part of the examples."""
    weights = np.ones(len(per_example)) if weights is None else weights
    ends = np.cumsum(sizes)
    slices = [slice(end - size, end) for end, size in zip(ends, sizes)]
    means = [
        np.average(per_example[one], axis=0, weights=weights[one])
        for one in slices
    ]
    return np.array(means), [weights[one].sum() for one in slices]


def assert_norms(norms, gradients, weights, examples, rtol=RTOL):
    squares, mean, products = norms_of(gradients, weights)
    assert (norms.examples, norms.count) == (examples, len(weights))
    np.testing.assert_allclose(
        [norms.micro_sq_norm, norms.mean_sq_norm, norms.products],
        [squares, mean, products],
        rtol=rtol,
    )


# The graph measures what NumPy computes.


@pytest.mark.parametrize(
    ("examples", "sizes"),
    [
        (64, [8] * 8),
        (32, [4] * 8),
        # What does not fill a part is left out.
        (70, [8] * 8),
        (8, [1] * 8),
        (5, [1] * 5),
        (2, [1] * 2),
    ],
)
def test_measurement_is_that_of_the_parts(examples, sizes):
    x = rows(70)
    norms = measured(offset(), x, x, examples=examples)
    gradients = parts_of(0.5 - x.astype(float), sizes)
    assert_norms(norms, *gradients, sum(sizes))


@pytest.mark.parametrize(
    ("micro", "sizes"),
    [
        (12, [[12, 12], [12, 12], [12, 10]]),
        (8, [[8, 8, 8], [8, 8, 8], [8, 8, 6]]),
        (7, [[7, 7, 7, 3], [7, 7, 7, 3], [7, 7, 7, 1]]),
    ],
)
def test_accumulation_measures_ragged_micro_batches(micro, sizes):
    x = rows(70)
    _, updates = accumulated(offset(), x, x, batch_size=24, micro=micro)
    assert len(updates) == 3
    for update, norms in enumerate(updates):
        batch = 0.5 - x[24 * update : 24 * update + 24].astype(float)
        assert_norms(
            norms, *parts_of(batch, sizes[update]), sum(sizes[update])
        )


def test_sample_weights_weigh_the_parts():
    x = rows(24)
    weights = np.random.default_rng(1).uniform(0.1, 3.0, 24)
    _, [norms] = accumulated(
        offset(reduction="mean_with_sample_weight"),
        *(x, x, weights.astype("float32")),
        batch_size=24,
        micro=8,
    )
    gradients = parts_of(0.5 - x.astype(float), [8, 8, 8], weights)
    assert_norms(norms, *gradients, 24)


def test_measuring_does_not_train():
    x = rows(64)
    model = comparing.seeded(offset(lambda: optimizers.Adam(0.1)))
    graphs, data = graphs_for(model, x, x)
    before = comparing.variables_of(model)
    graphs.measure(data, 64)
    for path, value in comparing.variables_of(model).items():
        np.testing.assert_array_equal(value, before[path], path)


def test_noise_scale_of_a_run_covers_the_truth():
    x = rows(1024)
    trained = adaptive(
        offset(),
        x,
        x,
        policy="measure",
        measure_every=1,
        superbatch_size=64,
        epochs=3,
    )

    per_example = 0.5 - x.astype(float)
    signal = np.sum(per_example.mean(axis=0) ** 2)
    # Parts are drawn without replacement: the unbiased covariance.
    noise_trace = per_example.var(axis=0, ddof=1).sum()
    estimate = trained.result.noise_scale
    assert estimate.resolved
    assert estimate.lower <= noise_trace / signal <= estimate.upper
    # Three epochs of 1024 examples: the trace is known to some percent.
    np.testing.assert_allclose(estimate.trace, noise_trace, rtol=0.1)


# What Keras does to gradients is undone before they are squared.


def test_loss_scale_is_removed():
    x = rows(64)
    in_float32 = measured(offset(), x, x)
    in_float16 = measured(
        of_layer(
            lambda: Offset(dtype="mixed_float16"),
            lambda: optimizers.LossScaleOptimizer(
                optimizers.SGD(0.0), initial_scale=2.0**15
            ),
        ),
        x,
        x,
    )
    # Products of half precision, 2^-11; squares of the scale would be 2^30.
    np.testing.assert_allclose(in_float16, in_float32, rtol=5e-3)


def test_fixed_loss_scale_is_removed():
    x = rows(64)
    scaled = offset(lambda: optimizers.SGD(0.0, loss_scale_factor=1024.0))
    # A power of two leaves every digit as it is.
    assert measured(scaled, x, x) == measured(offset(), x, x)


@pytest.mark.parametrize(
    "clipping",
    [{"clipnorm": 1e-3}, {"global_clipnorm": 1e-3}, {"clipvalue": 1e-3}],
)
def test_gradients_are_measured_before_clipping(clipping):
    x = rows(48)
    arguments = {"batch_size": 24, "micro": 8}
    _, free = accumulated(
        offset(lambda: optimizers.SGD(0.0)), x, x, **arguments
    )
    _, clipped = accumulated(
        offset(lambda: optimizers.SGD(0.0, **clipping)), x, x, **arguments
    )
    assert clipped == free


class Pair(keras.layers.Layer):
    """Two weights with the gradients 1e4·(w + x₀) and w + x₁."""

    def build(self, input_shape):
        self.large = self.add_weight(shape=(1,), initializer="zeros")
        self.small = self.add_weight(shape=(1,), initializer="zeros")

    def call(self, x):
        return keras.ops.concatenate(
            [100.0 * (self.large + x[:, :1]), self.small + x[:, 1:2]], axis=-1
        )


def test_norms_of_tensors_are_added_in_float64():
    x = np.ones((16, FEATURES), "float32")
    norms = measured(of_layer(Pair), x, x)
    # Next to 1e8 float32 resolves 8.
    assert norms.micro_sq_norm == norms.mean_sq_norm == 1e8 + 1.0


def embedding(sparse):
    """A bag of tokens, looked up (sparse gradients) or multiplied (dense)."""

    def make():
        tokens = keras.Input((3,), dtype="int32")
        if sparse:
            vectors = keras.layers.Embedding(
                5, FEATURES, embeddings_initializer="ones"
            )(tokens)
        else:
            vectors = keras.layers.Dense(
                FEATURES, use_bias=False, kernel_initializer="ones"
            )(keras.ops.one_hot(tokens, 5))
        model = keras.Model(tokens, keras.ops.mean(vectors, axis=1))
        model.compile(optimizers.Adam(0.1), comparing.HalfSquare())
        return model

    return make


def test_duplicate_rows_of_an_embedding_are_summed_before_squaring():
    # Three of five tokens per example: every micro-batch has duplicates.
    tokens = np.random.default_rng(0).integers(0, 5, size=(48, 3))
    targets = np.zeros((48, 1), "float32")
    arguments = {"batch_size": 24, "micro": 8}
    model, sparse = accumulated(embedding(True), tokens, targets, **arguments)
    twin, dense = accumulated(embedding(False), tokens, targets, **arguments)
    np.testing.assert_allclose(sparse, dense, rtol=RTOL)
    np.testing.assert_allclose(
        model.weights[0], twin.weights[0], rtol=RTOL, atol=RTOL
    )


class Unused(Offset):
    """Has a second weight, without influence."""

    def build(self, input_shape):
        self.unused = self.add_weight(shape=(3,))
        super().build(input_shape)


def test_weights_without_gradient_are_left_out():
    make = of_layer(Unused, lambda: optimizers.SGD(0.1))
    x = rows(24)
    gradients = parts_of(0.5 - x.astype(float), [3] * 8)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        # Keras warns while it traces the update, as it does in plain `fit`.
        assert_norms(measured(make, x, x), *gradients, 24)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        model, _ = accumulated(make, x, x, batch_size=24, micro=8)
    unused, w = model.layers[0].unused, model.layers[0].w
    np.testing.assert_array_equal(
        unused, comparing.seeded(make).layers[0].unused
    )
    np.testing.assert_allclose(
        w, 0.5 - 0.1 * (0.5 - x.astype(float)).mean(axis=0), rtol=RTOL
    )


def test_regulariser_shifts_the_signal_and_not_the_noise():
    x = rows(64)
    strength = 3.0

    def moments(make):
        norms = measured(make, x, x)
        return noise.gradient_moments(
            norms.micro_sq_norm, norms.mean_sq_norm, 8.0, 8
        )

    plain = moments(offset())
    penalised = moments(
        of_layer(lambda: Offset(keras.regularizers.L2(strength)))
    )
    # Its gradient is 2·strength·w, the same for every example.
    per_example = 0.5 - x.astype(float)
    shift = 2.0 * strength * 0.5
    mean = per_example.mean(axis=0)
    shifted = np.sum((mean + shift) ** 2) - np.sum(mean**2)
    # The trace is a small difference of large norms now.
    np.testing.assert_allclose(penalised.trace, plain.trace, rtol=1e-4)
    np.testing.assert_allclose(
        penalised.squared_norm - plain.squared_norm, shifted, rtol=1e-4
    )


def test_measurement_that_is_not_finite_is_counted_and_not_averaged():
    x = rows(256)
    spoilt = x.copy()
    spoilt[40] = np.inf  # In the second superbatch of 32.
    make_model = offset(
        lambda: optimizers.LossScaleOptimizer(optimizers.SGD(0.0))
    )
    arguments = {
        "policy": "measure",
        "measure_every": 1,
        "shuffle": False,
        "epochs": 1,
    }
    sound = adaptive(make_model, x, x, **arguments).result
    with pytest.warns(RuntimeWarning, match="updates 5 and 8"):
        trainer = adaptive(make_model, spoilt, x, **arguments).result

    assert sound.report.skipped_measurements == 0
    assert trainer.report.skipped_measurements == 1
    assert np.isfinite(trainer.noise_scale.value)
    # Seven measurements of eight, each of the same weights.
    np.testing.assert_allclose(
        trainer.noise_scale.trace, sound.noise_scale.trace, rtol=0.5
    )


def test_sorted_rows_hide_the_noise_that_shuffled_ones_show():
    # A superbatch of sorted rows holds neighbours, which are alike.
    x = rows(512)
    x = x[np.argsort(x[:, 0])]
    per_example = 0.5 - x.astype(float)
    trace = per_example.var(axis=0, ddof=1).sum()
    squared_norm = np.square(per_example.mean(axis=0)).sum() - trace / 512

    def found(shuffle):
        trainer = adaptive(
            *(offset(), x, x),
            policy="measure",
            measure_every=1,
            superbatch_size=64,
            shuffle=shuffle,
            epochs=1,
        ).result
        return trainer.noise_scale

    hidden, shown = found(shuffle=False), found(shuffle=True)

    assert shown.lower < trace / squared_norm < shown.upper
    # Less than a quarter: how superbatches differ is taken for the signal.
    assert hidden.upper < 0.25 * trace / squared_norm


class Remembering(Offset):
    """Keeps the largest input in a variable overwritten by its gradient.

    This is how Keras does the scales of float8 (`DTypePolicy("float8")`).
    """

    def build(self, input_shape):
        super().build(input_shape)
        self.largest = self.add_weight(shape=(), initializer="zeros")
        self.largest.overwrite_with_gradient = True

    def call(self, x):
        @tf.custom_gradient
        def remember(x, largest):
            def gradient(upstream):
                return upstream, tf.reduce_max(tf.abs(x))

            return tf.identity(x), gradient

        return super().call(remember(x, self.largest.value))


def test_variables_overwritten_by_their_gradient_take_the_largest():
    x = rows(24)
    make_model = of_layer(Remembering)
    model, [norms] = accumulated(make_model, x, x, batch_size=24, micro=8)
    assert float(model.layers[0].largest) == np.abs(x).max()
    # They are no gradients, so they are no part of the norms.
    assert_norms(norms, *parts_of(0.5 - x.astype(float), [8] * 3), 24)
