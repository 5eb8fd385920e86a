"""R replicas are one device: a program that `test_replicas.py` runs for each R.

Logical devices must be made before TensorFlow does anything else, so each R
has a process of its own, which tries all its laws and prints one line of JSON
per law. Run it by hand as `python tests/replica_laws.py 3 [law ...]`.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback
import warnings

import comparing
import fake_memory
import keras
import memory_of_replicas
import numpy as np
import tensorflow as tf
import test_superbatches as inputs
from comparing import adaptive
from comparing import compiled
from comparing import dense
from comparing import plain
from test_gradients import Remembering
from test_gradients import norms_of

import keras_batchsize as kb
from keras_batchsize import _train_function_team
from keras_batchsize import learning_rate
from keras_batchsize import replicas
from keras_batchsize import throughput
from keras_batchsize.plan import largest_on_ladder
from keras_batchsize.policies import BatchSizeSchedule
from keras_batchsize.replica_graphs import ReplicaGraphs

optimizers = keras.optimizers

# Float32 sums in another order, carried on over some twenty updates. Adam and
# its relatives divide by the root of a squared gradient, which for a gradient
# near zero passes its relative rounding on in full.
RTOL, RTOL_ADAPTIVE = 5e-5, 5e-4

LAWS = {}

# Three are the harder case: their shares are uneven, and even where the size is
# a multiple of three. With two what all shares being even may change, with four
# only what depends on how many there are.
REPLICAS = (2, 3, 4)
MOST_LAWS = (3,)

# Of all weights and logs, to be compared between workers.
DIGESTS = []


def law(*replica_numbers):
    """Registers a law for so many replicas, for three as a rule."""

    def register(function):
        LAWS[function.__name__] = (function, replica_numbers or MOST_LAWS)
        return function

    return register


def under(strategy, make_model):
    """Makes models under the scope of a strategy, as its users do."""

    def make():
        with strategy.scope():
            return make_model()

    return make


def assert_replicas_agree(model):
    """Every replica holds the same values, bit for bit."""
    strategy = model.distribute_strategy
    values = hashlib.sha256()
    for variable in [*model.weights, *model.optimizer.variables]:
        first, *others = strategy.experimental_local_results(variable.value)
        for other in others:
            np.testing.assert_array_equal(other, first, variable.path)
        values.update(first.numpy().tobytes())
    DIGESTS.append(values.hexdigest())


def superbatch_of(strategy, batch_size=comparing.BASE):
    """About 32 examples; three replicas hold 8 in uneven shares."""
    return largest_on_ladder(
        batch_size, comparing.SUPERBATCH, strategy.num_replicas_in_sync
    )


def assert_one_device(strategy, make_model, *data, rtol=RTOL, **arguments):
    """Compares with plain `fit` on one device, at a fixed batch size.

    Returns:
        Two `Trained`, ours and the other one.
    """
    ours_only = {
        "policy": "fixed",
        "superbatch_size": arguments.pop(
            "superbatch_size", superbatch_of(strategy)
        ),
    }
    theirs = plain(make_model, *data, **arguments)
    ours = adaptive(
        under(strategy, make_model), *data, **ours_only, **arguments
    )
    comparing.assert_close(ours, theirs, rtol)
    assert_replicas_agree(ours.model)
    return ours, theirs


def momentum(**options):
    return compiled(
        dense,
        optimizer=lambda: optimizers.SGD(0.05, momentum=0.9),
        metrics=["mae"],
        **options,
    )


@law(2, 3)
def momentum_is_that_of_one_device(strategy):
    """Shuffled; the last update and the last of validation are ragged."""
    x, y = comparing.regression()
    ours, theirs = assert_one_device(
        strategy, momentum(), x, y, validation_split=0.3
    )
    np.testing.assert_allclose(
        ours.result.evaluate(x, y, verbose=0),
        theirs.model.evaluate(x, y, verbose=0),
        rtol=RTOL,
    )
    np.testing.assert_allclose(
        ours.result.predict(x, verbose=0),
        theirs.model.predict(x, verbose=0),
        rtol=RTOL,
        atol=RTOL,
    )


@law(2)
def a_strategy_of_one_device_measures_as_without(strategy):
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    data = comparing.regression()
    arguments = {"policy": "measure", "measure_every": 1}
    theirs = adaptive(momentum(), *data, **arguments)
    ours = adaptive(under(strategy, momentum()), *data, **arguments)
    del theirs.history["examples_per_second"]
    comparing.assert_close(ours, theirs, RTOL)
    np.testing.assert_allclose(
        ours.result.noise_scale.value, theirs.result.noise_scale.value, 1e-3
    )


@law(3, 4)
def a_share_may_be_empty(strategy):
    """The last superbatch, and so the last update, is a single example."""
    assert_one_device(strategy, momentum(), *comparing.regression(65))


@law()
def a_replica_without_examples_keeps_its_statistics(strategy):
    """The mean of no examples is no number; the last update is of one."""

    def make_model():
        model = keras.Sequential(
            [
                keras.Input((comparing.FEATURES,)),
                keras.layers.BatchNormalization(),
                keras.layers.Dense(1),
            ]
        )
        model.compile(optimizers.SGD(0.05), "mse")
        return model

    number = strategy.num_replicas_in_sync
    x, y = comparing.regression(4 * number + 1)
    for examples in (4 * number, 4 * number + 1):
        ours = adaptive(
            under(strategy, make_model), x[:examples], y[:examples],
            policy="fixed", batch_size=2 * number,
            superbatch_size=2 * number, epochs=1, shuffle=False,
        )
        statistics = [
            np.stack(strategy.experimental_local_results(one.value))
            for one in ours.model.layers[0].non_trainable_weights
        ]
        if examples == 4 * number:
            before = statistics
    for one, other in zip(before, statistics):
        # The first replica has seen the last example, and no other any.
        np.testing.assert_array_equal(one[1:], other[1:])
        assert np.isfinite(other).all() and (one[0] != other[0]).all()


@law()
def a_batch_may_be_smaller_than_the_replicas(strategy):
    assert_one_device(
        strategy,
        momentum(),
        *comparing.regression(11),
        batch_size=2,
        superbatch_size=6,
    )


@law()
def clipnorm_clips_the_sum(strategy):
    make = compiled(dense, optimizer=lambda: optimizers.SGD(0.1, clipnorm=0.1))
    assert_one_device(strategy, make, *comparing.regression())


@law()
def global_clipnorm_clips_the_sum(strategy):
    make = compiled(
        dense, optimizer=lambda: optimizers.SGD(0.1, global_clipnorm=0.1)
    )
    assert_one_device(strategy, make, *comparing.regression())


@law()
def clipvalue_clips_the_sum(strategy):
    make = compiled(
        dense, optimizer=lambda: optimizers.SGD(0.1, clipvalue=0.02)
    )
    assert_one_device(strategy, make, *comparing.regression())


@law()
def adam_with_average_weights_and_regularisers(strategy):
    def regularised():
        return dense(kernel_regularizer="l2", activity_regularizer="l1")

    make = compiled(
        regularised,
        optimizer=lambda: optimizers.Adam(
            0.01, use_ema=True, ema_momentum=0.9
        ),
    )
    assert_one_device(
        strategy, make, *comparing.regression(), rtol=RTOL_ADAPTIVE
    )


@law()
def adamw_with_a_schedule(strategy):
    make = compiled(
        dense,
        optimizer=lambda: optimizers.AdamW(
            comparing.SCHEDULES["ExponentialDecay"](), weight_decay=0.05
        ),
    )
    assert_one_device(
        strategy, make, *comparing.regression(), rtol=RTOL_ADAPTIVE
    )


@law()
def weight_decay_and_constraints(strategy):
    def constrained():
        return dense(kernel_constraint=keras.constraints.MaxNorm(0.7))

    make = compiled(
        constrained,
        optimizer=lambda: optimizers.SGD(
            0.05, momentum=0.9, nesterov=True, weight_decay=0.1
        ),
    )
    assert_one_device(strategy, make, *comparing.regression())


@law()
def sample_weights(strategy):
    weights = np.random.default_rng(1).uniform(size=comparing.EXAMPLES)
    # Some shares weigh nothing at all.
    weights[:16] = 0.0
    for reduction in ("sum_over_batch_size", "mean_with_sample_weight"):
        make = momentum(
            loss=keras.losses.MeanSquaredError(reduction=reduction),
            weighted_metrics=["mse"],
        )
        assert_one_device(
            strategy, make, *comparing.regression(), sample_weight=weights
        )


@law()
def several_outputs(strategy):
    make = comparing.in_two_outputs(lambda: optimizers.SGD(0.05))
    assert_one_device(strategy, make, *comparing.for_two_outputs())


def assert_sizes_are_those_of_one_device(strategy, policy, **arguments):
    """The base size is a multiple of all numbers of replicas."""
    data = comparing.regression(210)
    decay = keras.optimizers.schedules.ExponentialDecay(0.05, 10, 0.9)
    make = compiled(
        dense,
        optimizer=lambda: optimizers.SGD(decay, momentum=0.9),
        metrics=["mae"],
    )
    theirs = adaptive(make, *data, policy=policy(), epochs=4, **arguments)
    ours = adaptive(
        under(strategy, make), *data, policy=policy(), epochs=4, **arguments
    )
    for trained in (theirs, ours):
        del trained.history["examples_per_second"]
        del trained.history["noise_scale"]
    # Momentum and a high rate carry rounding on for four epochs.
    comparing.assert_close(ours, theirs, 4 * RTOL)
    assert_replicas_agree(ours.model)
    rates, expected = (
        [row.learning_rate for row in trained.result.report.rows]
        for trained in (ours, theirs)
    )
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    return ours


@law()
def the_size_may_rise_and_fall(strategy):
    ours = assert_sizes_are_those_of_one_device(
        strategy,
        lambda: BatchSizeSchedule({1: 96, 2: 48, 3: 12}),
        batch_size=24,
        min_batch_size=12,
        superbatch_size=96,
    )
    assert ours.history["batch_size"] == [24, 96, 48, 12]


@law()
def a_batch_may_be_larger_than_a_superbatch(strategy):
    ours = assert_sizes_are_those_of_one_device(
        strategy,
        lambda: BatchSizeSchedule({1: 96, 3: 12}),
        learning_rate_scaling="sqrt",
        batch_size=12,
        superbatch_size=24,
        max_batch_size=96,
    )
    assert ours.history["batch_size"] == [12, 96, 96, 12]


@law()
def eager_training_is_that_of_one_device(strategy):
    """Uneven shares, then batches of several micro-batches."""
    data = comparing.regression(38)
    assert_one_device(strategy, momentum(run_eagerly=True), *data, epochs=1)
    large = {
        "policy": BatchSizeSchedule({0: 24}),
        "batch_size": 6,
        "superbatch_size": 12,
        "max_batch_size": 24,
    }
    theirs = adaptive(momentum(), *data, **large)
    ours = adaptive(
        under(strategy, momentum(run_eagerly=True)), *data, **large
    )
    del theirs.history["examples_per_second"]
    comparing.assert_close(ours, theirs, RTOL)
    x, y = data
    np.testing.assert_allclose(
        ours.result.evaluate(x, y, verbose=0),
        theirs.result.evaluate(x, y, verbose=0),
        rtol=RTOL,
    )


@law(2)
def a_loss_that_is_not_divided_is_refused(strategy):
    """And one that is trains as on one device."""

    class Own(keras.Model):
        divided = True

        def compute_loss(
            self, x=None, y=None, y_pred=None, sample_weight=None,
            training=True,
        ):
            loss = keras.ops.mean((y - y_pred) ** 2)
            strategy = tf.distribute.get_strategy()
            return loss / (strategy.num_replicas_in_sync if self.divided else 1)

    class Undivided(Own):
        divided = False

    class Summed(keras.losses.Loss):
        def __call__(self, y_true, y_pred, sample_weight=None):
            return keras.ops.mean((y_true - y_pred) ** 2)

    def made_of(kind, **options):
        def make_model():
            inputs = keras.Input((comparing.FEATURES,))
            model = kind(inputs, keras.layers.Dense(1)(inputs))
            model.compile(optimizers.SGD(0.05, momentum=0.9), **options)
            return model

        return make_model

    data = comparing.regression()
    assert_one_device(strategy, made_of(Own), *data)
    for kind, options in (
        (Undivided, {}),
        (keras.Model, {"loss": Summed()}),
    ):
        make_model = under(strategy, made_of(kind, **options))
        try:
            adaptive(make_model, *data, policy="fixed")
        except ValueError as error:
            assert "divided by the number of replicas" in str(error), error
        else:
            raise AssertionError(f"{kind} passed")
        # One device need not be divided by anything.
        adaptive(made_of(kind, **options), *data, policy="fixed")


@law(3, 4)
def sizes_are_multiples_of_the_replicas(strategy):
    """A base that is none is kept, its cost told; all others are multiples."""
    number = strategy.num_replicas_in_sync
    larger = {3: 30, 4: 20}[number]
    x, y = comparing.regression()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = adaptive(
            under(strategy, momentum()),
            x,
            y,
            policy=BatchSizeSchedule({1: 25}),
            learning_rate_scaling="none",
            batch_size=10,
            superbatch_size=None,
            max_batch_size=70,
            shuffle=False,
        )
    [told] = [str(one.message) for one in caught if "multiple" in str(one)]
    assert "17%" in told and "batch_size=12 would cost nothing" in told, told
    assert f"used is {larger}." in told, told
    assert ours.history["batch_size"] == [10, larger]
    theirs = plain(momentum(), x, y, batch_size=10, epochs=1, shuffle=False)
    theirs.model.fit(
        x, y, batch_size=larger, initial_epoch=1, epochs=2, shuffle=False,
        verbose=0,
    )
    for one, other in zip(ours.model.weights, theirs.model.weights):
        np.testing.assert_allclose(
            one.numpy(), other.numpy(), rtol=RTOL, atol=RTOL
        )


@law(3, 4)
def a_probe_tries_multiples_of_the_replicas(strategy):
    number = strategy.num_replicas_in_sync
    model = comparing.seeded(under(strategy, momentum()))
    profile = kb.find_max_batch_size(
        model, *comparing.regression(71), time_budget=math.inf
    )
    assert profile.max_batch_size == 71 // number * number
    sizes = [row.batch_size for row in profile.rows]
    for size in (*sizes, profile.saturation_batch_size):
        assert size % number == 0 and size >= number


@law(2)
def replicas_that_share_memory_add_up(strategy):
    """What they hold, and the holes between that."""
    model = comparing.seeded(under(strategy, momentum()))
    profiles = []
    for is_shared in (False, True):
        meter = fake_memory.FakeMeter(10**8, slope=10**4)
        meter.holes, meter.is_shared = 2.0, is_shared
        profiles.append(fake_memory.probe(meter, model, 40, maximum=40))
    alone, shared = profiles
    kept_free = [one.fragmentation_per_example for one in profiles]
    assert kept_free[1] == 2.0 * kept_free[0] > 0.0
    assert shared.resident_bytes == 2 * alone.resident_bytes


@law(2)
def memory_that_runs_out_halves_what_a_replica_runs_at_once(strategy):
    """The batch size stays, nothing is lost and nothing is done twice."""
    fitted = functools.partial(
        adaptive, under(strategy, momentum()), *comparing.regression(),
        policy="fixed", shuffle=False,
    )
    theirs = fitted()
    accumulate, tried = ReplicaGraphs.accumulate, []

    def limited(self, total, data, stop, sizes, *others):
        result = accumulate(self, total, data, stop, sizes, *others)
        tried.append(sizes[1])
        if sizes[1] > 1:
            # Variables have changed already.
            raise tf.errors.ResourceExhaustedError(None, None, "made up")
        return result

    ReplicaGraphs.accumulate = limited
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours = fitted()
    finally:
        ReplicaGraphs.accumulate = accumulate
    told = [str(one.message) for one in caught if "ran out" in str(one)]
    assert len(told) == 2 and "batch size stays 8" in told[0], told
    assert tried[:3] == [4, 2, 1] and set(tried[3:]) == {1}, tried
    assert ours.result.batch_size == comparing.BASE
    skip = ("noise_scale", "examples_per_second")
    comparing.assert_close(ours, theirs, RTOL, skip=skip)
    assert_replicas_agree(ours.model)


def updates_of_twelve(strategy, make_model, micro, *data):
    """Trains on 22 examples; returns the model and a row per update."""
    model = comparing.seeded(under(strategy, make_model))
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(22)
    data = next(iter(replicas.dealt_out(dataset, strategy)))
    parts = replicas.Shares(strategy)
    graphs = ReplicaGraphs(model, 12, True, parts)
    graphs.build(parts.local(data)[0])
    *_, rows = graphs.accumulate(
        graphs.zeros(),
        data,
        22,
        (12, micro),
        True,
        learning_rate.rate_in_force(1.0, 1.0, 0, 0),
    )
    return model, rows.numpy()


law(2)(memory_of_replicas.replicas_are_left_as_they_were)
law(2)(memory_of_replicas.unbuilt_replicas_are_mirrored)
law(2)(memory_of_replicas.a_model_is_measured_on_its_own_device)
law(2)(memory_of_replicas.arrays_stay_on_the_host)
law(2)(memory_of_replicas.values_are_held_where_they_are)


def shares_of(start, end, piece, number):
    """Returns which examples each replica has of each piece, if it has any."""
    cuts = [*range(piece, end - start, piece)]
    shares = [
        part[part % number == index]
        for part in np.split(np.arange(start, end), cuts)
        for index in range(number)
    ]
    return [one for one in shares if len(one)]


def assert_norms_are_those_of_the_shares(strategy, make_model, *weights):
    """The gradients of `offset` are w - x: all moments are known."""
    number = strategy.num_replicas_in_sync
    x, y = comparing.regression(22)
    weigh = weights[0] if weights else np.ones(22)
    for micro in (12, 2):  # In one micro-batch, and in several.
        _, rows = updates_of_twelve(strategy, make_model, micro, x, y, *weights)
        for row, start, end in zip(rows, (0, 12), (12, 22)):
            shares = shares_of(start, end, micro * number, number)
            gradients = [
                np.average(0.5 - x[one], axis=0, weights=weigh[one])
                for one in shares
            ]
            squares, mean, _ = norms_of(
                np.array(gradients), [weigh[one].sum() for one in shares]
            )
            np.testing.assert_allclose(
                row, [squares, mean, end - start, len(shares)], rtol=1e-5
            )


@law(2, 3)
def norms_are_those_of_the_shares(strategy):
    assert_norms_are_those_of_the_shares(strategy, comparing.offset())


@law()
def norms_are_weighted_and_without_the_loss_scale(strategy):
    weights = np.random.default_rng(1).uniform(0.1, 3.0, 22)
    assert_norms_are_those_of_the_shares(
        strategy,
        comparing.offset(
            lambda: optimizers.SGD(0.0, loss_scale_factor=1024.0),
            reduction="mean_with_sample_weight",
        ),
        weights.astype("float32"),
    )


@law()
def variables_overwritten_by_their_gradient_take_the_largest(strategy):
    """Of all replicas and all micro-batches of an update: the last one's."""
    x, y = comparing.regression(22)
    for micro in (12, 2):
        model, _ = updates_of_twelve(
            strategy, comparing.of_layer(Remembering), micro, x, y
        )
        largest = model.layers[0].largest.value
        for one in strategy.experimental_local_results(largest):
            assert float(one) == np.abs(x[12:]).max()


@law(2, 3)
def noise_scale_comes_free_with_every_update(strategy):
    x, y = comparing.regression(4096)
    make = comparing.offset()
    ours = adaptive(
        under(strategy, make),
        x,
        y,
        policy="measure",
        batch_size=12,
        superbatch_size=192,
        epochs=4,
    )
    estimate = ours.result.noise_scale
    gradients = 0.5 - x
    signal = np.square(gradients.mean(axis=0)).sum()
    truth = gradients.var(axis=0).sum() / signal
    assert estimate.resolved
    assert estimate.standard_error < 0.1 * truth
    assert abs(estimate.value - truth) < 3.0 * estimate.standard_error
    # Nothing was measured by itself, nothing was paid for.
    assert ours.result.report.settings["measuring_share"] == 0.0


@law(2)
def the_all_reduce_enters_the_step_time(strategy):
    """It is timed at the start; a slow one speaks for larger batches."""
    slow, fast = (
        recommended_with(strategy, seconds) for seconds in (10.0, 0.0)
    )
    assert slow > fast
    own = adaptive(
        under(strategy, momentum()), *comparing.regression(), policy="measure"
    )
    known = own.result._controller.speed.communication
    assert 0.0 < known < 10.0, known
    assert 0.0 < own.result._controller.step_time.communication <= known
    alone = adaptive(momentum(), *comparing.regression(), policy="measure")
    assert alone.result._controller.speed.communication == 0.0
    DIGESTS.append(str(known))  # The slowest worker's, on all.


def recommended_with(strategy, seconds):
    """Returns the best size after a training with a given network."""
    held = replicas.all_reduce_seconds
    replicas.all_reduce_seconds = lambda *_: seconds
    try:
        ours = adaptive(
            under(strategy, momentum()),
            *comparing.regression(),
            policy="measure",
        )
    finally:
        replicas.all_reduce_seconds = held
    # Of the same timings: updates of a second, as many examples in one piece.
    speed = ours.result._controller.speed
    assert speed.communication == seconds
    for size in (8, 16, 32):
        for _ in range(50):
            speed.add(size, 30.0 + 0.5 * size)
    return throughput.time_optimal_batch_size(
        dataclasses.replace(speed.step_time, largest=16), 100.0
    )


@law()
def an_infinity_on_the_last_replica_skips_the_update(strategy):
    number = strategy.num_replicas_in_sync

    def mixed():
        keras.config.set_dtype_policy("mixed_float16")
        try:
            return dense()
        finally:
            keras.config.set_dtype_policy("float32")

    make = compiled(
        mixed,
        optimizer=lambda: optimizers.LossScaleOptimizer(
            optimizers.SGD(0.05, momentum=0.9),
            initial_scale=1024.0,
            dynamic_growth_steps=1000,
        ),
    )
    x, y = comparing.regression(4 * number)
    y[number + number - 1] = 6e4  # Example of the last replica, second update.
    ours = adaptive(
        under(strategy, make),
        x,
        y,
        policy="measure",
        shuffle=False,
        batch_size=number,
        superbatch_size=4 * number,
        epochs=1,
    )
    kept = [0, 2, 3]
    x, y = (one.reshape(4, number, -1)[kept] for one in (x, y))
    theirs = plain(
        make,
        x.reshape(3 * number, -1),
        y.reshape(3 * number, -1),
        batch_size=number,
        epochs=1,
        shuffle=False,
    )
    optimizer = ours.model.optimizer
    scales = strategy.experimental_local_results(optimizer.dynamic_scale.value)
    assert {float(one) for one in scales} == {512.0}
    assert int(keras.ops.convert_to_numpy(optimizer.iterations)) == 3
    for one, other in zip(ours.model.weights, theirs.model.weights):
        # Half precision, in shares of one example.
        np.testing.assert_allclose(
            one.numpy(), other.numpy(), rtol=2e-2, atol=2e-3
        )
    assert_replicas_agree(ours.model)


@law()
def batch_norm_is_that_of_keras(strategy):
    """Each replica normalises by its own share, as under Keras's own `fit`.

    Keras gives a replica a run of each batch, so that it gets the examples in
    the order in which they are dealt out here.
    """

    def make_model():
        model = keras.Sequential(
            [
                keras.Input((comparing.FEATURES,)),
                # A bias would be normalised away, and its gradient be noise.
                keras.layers.Dense(6, use_bias=False),
                keras.layers.BatchNormalization(momentum=0.7),
                keras.layers.Dense(1),
            ]
        )
        model.compile(optimizer=optimizers.SGD(0.05), loss="mse")
        return model

    number = strategy.num_replicas_in_sync
    x, y = comparing.regression(96)
    dealt = np.arange(96).reshape(-1, 12 // number, number)
    dealt = dealt.swapaxes(1, 2).reshape(-1)
    arguments = {"batch_size": 12, "shuffle": False}
    theirs = plain(
        under(strategy, make_model), x[dealt], y[dealt], **arguments
    )
    ours = adaptive(
        under(strategy, make_model),
        x,
        y,
        policy="fixed",
        superbatch_size=48,
        **arguments,
    )
    comparing.assert_close(ours, theirs, RTOL)
    for one, other in zip(ours.model.weights, theirs.model.weights):
        for own, its in zip(
            strategy.experimental_local_results(one.value),
            strategy.experimental_local_results(other.value),
        ):
            np.testing.assert_allclose(own, its, rtol=RTOL, atol=RTOL)


class Batches(keras.utils.PyDataset):
    """The examples in batches of 10."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        part = slice(10 * index, 10 * index + 10)
        return tuple(one[part] for one in comparing.regression())


@law()
def every_kind_of_input(strategy):
    """All but arrays come in batches of their own, and are cut anew."""
    x, y = comparing.regression()

    def batches():
        while True:
            for start in range(0, 70, 10):
                yield x[start : start + 10], y[start : start + 10]

    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(10)
    theirs = plain(momentum(), x, y, batch_size=10, epochs=2, shuffle=False)
    for data, steps in (
        (dataset, None),
        (dataset.filter(lambda x, y: True), None),  # Of unknown length.
        (batches(), 7),
        (Batches(), None),
        (Batches(), 7),
    ):
        ours = adaptive(
            under(strategy, momentum()),
            data,
            policy="fixed",
            batch_size=10,
            superbatch_size=superbatch_of(strategy, 10),
            steps_per_epoch=steps,
            epochs=2,
            shuffle=False,
        )
        comparing.assert_close(ours, theirs, RTOL)


@law()
def ragged_and_sparse_examples(strategy):
    """The last update is of one example: most replicas sit it out."""
    for make, x in (
        (inputs.of_ragged, inputs.ragged()),
        (inputs.of_sparse, inputs.sparse()),
    ):
        data = tf.data.Dataset.from_tensor_slices((x, inputs.Y))
        data = data.take(4 * comparing.BASE + 1).batch(comparing.BASE)
        assert_one_device(strategy, make, data, batch_size=None, epochs=1)


@law()
def what_accelerators_get_is_one_device(strategy):
    """They are handed shares; the host's memory is that of CPUs only."""
    assert replicas.share_memory(strategy)
    held = replicas.share_memory
    replicas.share_memory = lambda _: False
    try:
        every_kind_of_input(strategy)
        ragged_and_sparse_examples(strategy)
    finally:
        replicas.share_memory = held


def traces(make_model, sizes):
    """Returns how many graphs are traced while the size changes per epoch."""
    made = []

    class Remembered(ReplicaGraphs):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    held = _train_function_team.ReplicaGraphs
    _train_function_team.ReplicaGraphs = Remembered
    try:
        adaptive(
            make_model,
            *comparing.regression(),
            policy=BatchSizeSchedule(lambda epoch: sizes[epoch % len(sizes)]),
            batch_size=12,
            min_batch_size=12,
            superbatch_size=48,
            max_batch_size=192,
            epochs=len(sizes),
        )
    finally:
        _train_function_team.ReplicaGraphs = held
    [graphs] = made
    return graphs.traces


@law(2, 3)
def traces_do_not_grow_with_size_changes(strategy):
    """96 and 192 are accumulated; the last superbatch of an epoch is ragged."""
    make_model = under(strategy, momentum())
    few = traces(make_model, [12, 12, 12, 96, 96, 96])
    many = traces(make_model, [12, 24, 96, 48, 192, 12, 96, 24])
    # There are two loops, of updates and of micro-batches, each for any number
    # of examples, the update that sums of micro-batches make, and the logs of
    # one in progress.
    assert few == many == 4, (few, many)


@law(2)
def a_superbatch_that_traces_is_not_timed(strategy):
    """An update of two superbatches: the second of them traces it."""
    traced = []

    class Seen(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            last = self.model.train_function.controller.last
            traced.append((last.traced, last.timing.updates == 0))

    adaptive(
        under(strategy, momentum()),
        *comparing.regression(4 * comparing.SUPERBATCH),
        policy=BatchSizeSchedule({0: 2 * comparing.SUPERBATCH}),
        max_batch_size=2 * comparing.SUPERBATCH,
        epochs=1,
        callbacks=[Seen()],
    )
    assert traced == 2 * [(True, True)] + 2 * [(False, False)], traced


@law()
def losses_are_told_before_an_update_is_made(strategy):
    """Updates of two superbatches; the last of an epoch is cut short."""
    x, y = comparing.for_two_outputs(5 * 24 + 1)

    def losses(make_model):
        seen = []

        class Seen(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                names = "loss", "size_loss", "kind_loss"
                seen.append([logs[name] for name in names])

        adaptive(
            *(make_model, x, y),
            policy=BatchSizeSchedule({0: 48}),
            learning_rate_scaling="none",
            batch_size=12,
            superbatch_size=24,
            max_batch_size=48,
            callbacks=[Seen()],
        )
        return seen

    make_model = comparing.in_two_outputs(lambda: optimizers.SGD(0.05))
    ours, theirs = losses(under(strategy, make_model)), losses(make_model)
    np.testing.assert_allclose(ours, theirs, RTOL)


def mirrored(number):
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * number
    )
    return tf.distribute.MirroredStrategy(
        [f"CPU:{index}" for index in range(number)]
    )


@law(2)
def callbacks_of_keras_see_what_they_see_on_one_device(strategy):
    """Stopping, the rate, logs and checkpoints, in the middle of training."""
    data = x, y = comparing.regression()

    def trained(make_model, train, folder, **arguments):
        return train(
            make_model,
            *data,
            epochs=8,
            validation_data=(x[:30], y[:30]),
            callbacks=[
                keras.callbacks.EarlyStopping(
                    "val_loss", min_delta=0.02, restore_best_weights=True
                ),
                keras.callbacks.ReduceLROnPlateau(
                    "val_loss", min_delta=0.1, patience=1
                ),
                keras.callbacks.CSVLogger(f"{folder}/log.csv"),
                keras.callbacks.ModelCheckpoint(f"{folder}/model.keras"),
                keras.callbacks.TensorBoard(f"{folder}/logs"),
            ],
            **arguments,
        )

    with tempfile.TemporaryDirectory() as one:
        with tempfile.TemporaryDirectory() as other:
            theirs = trained(momentum(), plain, one)
            ours = trained(
                under(strategy, momentum()), adaptive, other, policy="fixed"
            )
            assert len(theirs.history["loss"]) in range(2, 8)
            comparing.assert_close(ours, theirs, RTOL)
            lines = [
                pathlib.Path(folder, "log.csv").read_text().splitlines()
                for folder in (one, other)
            ]
            assert len(lines[0]) == len(lines[1])
            saved = keras.models.load_model(f"{other}/model.keras")
            expected = keras.models.load_model(f"{one}/model.keras")
            for value, its in zip(saved.weights, expected.weights):
                np.testing.assert_allclose(value, its, rtol=RTOL, atol=RTOL)
            assert list(pathlib.Path(other, "logs").rglob("*tfevents*"))


@law()
def datasets_from_a_function_are_dealt_out_already(strategy):
    """Each replica gets superbatches of 8; cut into updates of 4 each."""
    number = strategy.num_replicas_in_sync
    x, y = comparing.regression(48 * number)

    def of_worker(context):
        data = tf.data.Dataset.from_tensor_slices((x, y))
        return data.batch(8)

    data = strategy.distribute_datasets_from_function(of_worker)
    model = comparing.seeded(under(strategy, momentum()))
    history = kb.fit(
        model, data, batch_size=4 * number, policy="fixed",
        steps_per_epoch=12, verbose=0,
    )
    # Position p of a superbatch belongs to replica p mod R.
    order = np.arange(48 * number).reshape(-1, number, 8)
    order = order.swapaxes(1, 2).reshape(-1)
    theirs = plain(
        momentum(), x[order], y[order], batch_size=4 * number, epochs=1,
        shuffle=False,
    )
    np.testing.assert_allclose(
        history.history["loss"], theirs.history["loss"], rtol=RTOL
    )
    for one, its in zip(model.weights, theirs.model.weights):
        np.testing.assert_allclose(one.numpy(), its.numpy(), rtol=RTOL,
                                   atol=RTOL)


@law(2)
def callbacks_alone_on_a_plain_fit(strategy):
    """Keras hands out runs of each superbatch; all examples count once."""
    x, y = comparing.regression(128)
    model = comparing.seeded(under(strategy, comparing.offset()))
    history = model.fit(
        x,
        y,
        batch_size=32,
        verbose=0,
        callbacks=[kb.DynamicBatchSize("fixed", initial_batch_size=8)],
    )
    expected = 0.5 * np.square(0.5 - x).sum(axis=1).mean()
    np.testing.assert_allclose(history.history["loss"], expected, rtol=1e-5)
    assert history.history["batch_size"] == [8]


@law()
def a_static_size_gets_its_noise_free(strategy):
    """On a plain `fit`, which takes no size that is no multiple of R."""
    data = comparing.regression(64)
    seen = []

    class Seen(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            last = self.model.train_function.controller.last
            if last.examples == 12:
                seen.append((len(last.norms), last.measuring_seconds))

    def trained(make_model, *callbacks):
        # For any rule of the user's the noise is measured.
        rate = kb.LearningRateScaling(
            lambda ratio, noise_scale: ratio, base_batch_size=6, batch_size=12
        )
        return plain(
            make_model, *data, batch_size=12, shuffle=False,
            callbacks=[rate, *callbacks],
        )

    ours = trained(under(strategy, momentum()), Seen())
    comparing.assert_close(ours, trained(momentum()), RTOL)
    # Five whole updates per epoch, and nothing but their own norms.
    assert seen == 10 * [(1, 0.0)], seen


class Interrupted(Exception):
    """Ends a training in the middle."""


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise Interrupted


# The size grows in the second epoch; training stops before the third.
RESUMED = {
    "epochs": 4,
    "batch_size": 12,
    "superbatch_size": 24,
    "max_batch_size": 48,
    "shuffle": False,
}


def with_a_schedule(make_model, *callbacks):
    """Trains with growing batches; on the way it may be stopped."""
    return adaptive(
        make_model,
        *comparing.regression(),
        callbacks=list(callbacks),
        policy=BatchSizeSchedule({1: 48}),
        **RESUMED,
    )


def stopped(make_model, folder):
    """Leaves a backup of two epochs in a folder."""
    backup = kb.BackupAndRestore(folder)
    try:
        with_a_schedule(make_model, backup, Interrupt())
    except Interrupted:
        return
    raise AssertionError("it was not interrupted")


def assert_resumes(make_model, folder):
    """Compares with one device that trained all along."""
    whole = with_a_schedule(momentum())
    resumed = with_a_schedule(make_model, kb.BackupAndRestore(folder))
    assert resumed.model.history.epoch == [2, 3]
    assert resumed.history["batch_size"] == [48, 48]
    for name in ("loss", "mae"):
        np.testing.assert_allclose(
            resumed.history[name], whole.history[name][2:], rtol=4 * RTOL
        )
    assert list(resumed.variables) == list(whole.variables)
    for path, value in whole.variables.items():
        np.testing.assert_allclose(
            resumed.variables[path],
            value,
            rtol=4 * RTOL,
            atol=4 * RTOL,
            err_msg=path,
        )
    counts = ("examples", "updates", "base_steps", "clock")
    ours, theirs = resumed.result.get_state(), whole.result.get_state()
    assert [ours[one] for one in counts] == [theirs[one] for one in counts]


@law(4)
def training_resumes_on_more_replicas(strategy):
    """From one device to 4 replicas."""
    with tempfile.TemporaryDirectory() as folder:
        stopped(momentum(), folder)
        assert_resumes(under(strategy, momentum()), folder)


@law(4)
def two_replicas_are_resumed_by_four(strategy):
    with tempfile.TemporaryDirectory() as folder:
        # A process has collectives of one number of replicas.
        subprocess.run(
            [sys.executable, __file__, "2", "stopped", folder], check=True
        )
        assert_resumes(under(strategy, momentum()), folder)


@law(2)
def two_replicas_are_resumed_by_one_device(strategy):
    with tempfile.TemporaryDirectory() as folder:
        stopped(under(strategy, momentum()), folder)
        assert_resumes(momentum(), folder)


def try_out(strategy, laws):
    """Prints a line of JSON for each law."""
    for name, function in laws.items():
        began, error = time.perf_counter(), None
        try:
            function(strategy)
        except Exception:
            error = traceback.format_exc()
        outcome = {
            "law": name,
            "error": error,
            "seconds": round(time.perf_counter() - began, 1),
            "digests": list(DIGESTS),
        }
        DIGESTS.clear()
        print(json.dumps(outcome))
        sys.stdout.flush()


def main(number, names):
    laws = {
        name: function
        for name, (function, numbers) in LAWS.items()
        if number in numbers and (name in names or not names)
    }
    try_out(mirrored(number), laws)


if __name__ == "__main__":
    if sys.argv[2:3] == ["stopped"]:
        stopped(under(mirrored(int(sys.argv[1])), momentum()), sys.argv[3])
    else:
        main(int(sys.argv[1]), sys.argv[2:])
