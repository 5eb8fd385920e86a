"""The factor is applied around updates, and nobody else can tell.

The oracle of the factor is a second model compiled with rate x factor and
trained by plain `fit`; the oracle of momentum is a loop in NumPy.
"""

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from comparing import BASE
from comparing import EXAMPLES
from comparing import FEATURES
from comparing import SUPERBATCH
from comparing import adaptive
from comparing import compiled
from comparing import dense
from comparing import of_layer
from comparing import offset
from comparing import plain

import keras_batchsize as kb
from keras_batchsize import learning_rate
from keras_batchsize.policies import BatchSizeSchedule

optimizers = keras.optimizers

# A power of two: factor x rate loses no digit, so the oracle is exact.
FACTOR = 4.0
STATIC = {"base_batch_size": BASE, "batch_size": 4 * BASE}


def scaled(
    make_model, *data, rule="linear", callbacks=(), epochs=2, **scaling
):
    """Trains by plain `fit` with the static `LearningRateScaling`."""
    ours = kb.LearningRateScaling(rule, **{**STATIC, **scaling})
    return plain(
        make_model,
        *data,
        batch_size=4 * BASE,
        callbacks=[ours, *callbacks],
        epochs=epochs,
    )


OPTIMIZERS = {
    "Adadelta": lambda rate: optimizers.Adadelta(rate),
    "Adafactor": lambda rate: optimizers.Adafactor(
        # Large enough for its relative rate, 1/√step, to be smaller.
        128.0 * rate
    ),
    "Adagrad": lambda rate: optimizers.Adagrad(rate),
    "Adam": lambda rate: optimizers.Adam(rate, amsgrad=True),
    "AdamW": lambda rate: optimizers.AdamW(rate, weight_decay=0.1),
    "Adamax": lambda rate: optimizers.Adamax(rate),
    "Ftrl": lambda rate: optimizers.Ftrl(rate),
    "Lamb": lambda rate: optimizers.Lamb(rate),
    "Lion": lambda rate: optimizers.Lion(rate),
    "LossScaleOptimizer": lambda rate: optimizers.LossScaleOptimizer(
        optimizers.Adam(rate)
    ),
    "MultiOptimizer": lambda rate: optimizers.MultiOptimizer(
        optimizers.OptimizerMap(
            optimizers.SGD(rate, momentum=0.9),
            {"dense/kernel": optimizers.Adam(2.0 * rate)},
        )
    ),
    "Muon": lambda rate: optimizers.Muon(rate),
    "Nadam": lambda rate: optimizers.Nadam(rate),
    "RMSprop": lambda rate: optimizers.RMSprop(rate, momentum=0.5),
    "SGD": lambda rate: optimizers.SGD(rate, momentum=0.9, nesterov=True),
    "ScheduleFreeAdamW": lambda rate: optimizers.ScheduleFreeAdamW(rate),
}


def test_every_optimizer_of_keras_is_tried():
    known = {
        name
        for name, one in vars(optimizers).items()
        if isinstance(one, type)
        and issubclass(one, optimizers.Optimizer)
        and one is not optimizers.Optimizer
    }
    assert known == set(OPTIMIZERS), (
        "Add the new optimizer to OPTIMIZERS. If it keeps the rate in a slot "
        "or decays weights in a way of its own, see learning_rate.py."
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_factor_is_that_of_an_optimizer_with_a_scaled_rate(name):
    make = OPTIMIZERS[name]
    rate = 2.0**-7
    data = comparing.regression()

    # Three updates.
    ours = scaled(
        compiled(dense, optimizer=lambda: make(rate)), *data, epochs=1
    )
    theirs = plain(
        compiled(dense, optimizer=lambda: make(FACTOR * rate)),
        *data,
        batch_size=4 * BASE,
        epochs=1,
    )

    for one, other in zip(ours.model.weights, theirs.model.weights):
        np.testing.assert_array_equal(one, other)
    assert ours.history == theirs.history
    # Momentum is left in units of the base rate.
    leaves = learning_rate.optimizers_inside(ours.model.optimizer)
    twins = learning_rate.optimizers_inside(theirs.model.optimizer)
    for leaf, twin in zip(leaves, twins):
        slots = learning_rate.slots_holding_the_rate(leaf)
        assert bool(slots) == isinstance(
            leaf, (optimizers.SGD, optimizers.RMSprop)
        )
        for slot, theirs_slot in zip(
            slots, learning_rate.slots_holding_the_rate(twin)
        ):
            np.testing.assert_array_equal(FACTOR * slot.numpy(), theirs_slot)


class OnBaseClock(keras.optimizers.schedules.LearningRateSchedule):
    """Another schedule times the factor, at the steps of the base size.

    An epoch of 70 examples has 3 updates of 32 or 9 steps of 8, so the
    updates are the steps 0, 4, 8, then 9, 13, 17.
    """

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, step):
        return FACTOR * self.schedule(step // 3 * 9 + step % 3 * 4)

    def get_config(self):
        return {}


# What is multiplied does not depend on the schedule: those with a warm-up, and
# with jumps. test_laws.py asks all of them.
@pytest.mark.parametrize("name", ["CosineDecay", "PiecewiseConstantDecay"])
def test_factor_multiplies_a_schedule(name):
    schedule = comparing.SCHEDULES[name]
    data = comparing.regression()

    ours = scaled(
        compiled(dense, optimizer=lambda: optimizers.SGD(schedule())), *data
    )
    theirs = plain(
        compiled(
            dense, optimizer=lambda: optimizers.SGD(OnBaseClock(schedule()))
        ),
        *data,
        batch_size=4 * BASE,
    )

    for one, other in zip(ours.model.weights, theirs.model.weights):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("rate", [2.0**-7, 1], ids=["float", "integer"])
def test_factor_multiplies_a_callable_rate(rate):
    data = comparing.regression()
    data = data[0], 1e-3 * data[1]

    ours = scaled(
        compiled(dense, optimizer=lambda: optimizers.Lion(lambda: rate)), *data
    )
    theirs = plain(
        compiled(
            dense, optimizer=lambda: optimizers.Lion(lambda: FACTOR * rate)
        ),
        *data,
        batch_size=4 * BASE,
    )

    for one, other in zip(ours.model.weights, theirs.model.weights):
        np.testing.assert_array_equal(one, other)


class AssignsRate(keras.callbacks.Callback):
    """Sets the rate in the second epoch and looks at it after each step."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate
        self.seen = []

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            self.model.optimizer.learning_rate = self.rate

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(float(self.model.optimizer.learning_rate))


@pytest.mark.parametrize("loss_scale", [False, True])
def test_rate_assigned_by_the_user_stays_the_base_rate(loss_scale):
    def make_model(rate):
        def make():
            inner = optimizers.SGD(rate, momentum=0.9)
            return (
                optimizers.LossScaleOptimizer(inner) if loss_scale else inner
            )

        return compiled(dense, optimizer=make)

    data = comparing.regression()
    user, oracle = AssignsRate(2.0**-7), AssignsRate(FACTOR * 2.0**-7)

    ours = scaled(make_model(2.0**-5), *data, callbacks=[user])
    theirs = plain(
        make_model(FACTOR * 2.0**-5),
        *data,
        batch_size=4 * BASE,
        callbacks=[oracle],
    )

    assert user.seen == [2.0**-5] * 3 + [2.0**-7] * 3
    for one, other in zip(ours.model.weights, theirs.model.weights):
        np.testing.assert_array_equal(one, other)


def test_rate_seen_by_the_user_does_not_follow_the_size():
    user = AssignsRate(2.0**-7)
    trained = adaptive(
        compiled(dense, optimizer=lambda: optimizers.SGD(2.0**-5)),
        *comparing.regression(),
        policy=BatchSizeSchedule({0: SUPERBATCH, 1: BASE, 2: 2 * BASE}),
        learning_rate_scaling="linear",
        callbacks=[user],
        epochs=3,
    )

    assert user.seen == [2.0**-5] * 3 + [2.0**-7] * 6
    in_force = [row.learning_rate for row in trained.result.report.rows]
    assert in_force == [2.0**-3] * 3 + [2.0**-7] * 3 + [2.0**-6] * 3
    # Nor does the rate that policies see, at twice the base size by now.
    assert trained.result._controller._status().learning_rate == 2.0**-7


@pytest.mark.parametrize("size", [2 * BASE, 2 * SUPERBATCH])
def test_the_rate_of_a_superbatch_is_that_of_its_last_update(size):
    decay = optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    trained = adaptive(
        compiled(dense, optimizer=lambda: optimizers.SGD(decay)),
        *comparing.regression(150),
        policy=BatchSizeSchedule({0: size}),
        learning_rate_scaling="none",
        max_batch_size=size,
        epochs=1,
    )
    rows = trained.result.report.rows
    # Where the update of the last example began, in steps of plain `fit`.
    steps = [(row.examples - 1) // size * size // BASE for row in rows]
    expected = [0.1 * 0.5**step for step in steps]
    np.testing.assert_allclose(
        [row.learning_rate for row in rows], expected, rtol=1e-6
    )


def test_what_an_optimizer_holds_is_put_back_after_an_error():
    model = compiled(dense, optimizer=lambda: optimizers.AdamW(0.1))()
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    variables, rate = list(optimizer.variables), optimizer.learning_rate
    in_force = learning_rate.rate_in_force(4.0, 16.0, 0, 0)

    with pytest.raises(RuntimeError, match="inside"):
        with learning_rate.applied(optimizer, in_force):
            assert float(optimizer.learning_rate) == np.float32(0.1) * 4
            assert float(optimizer.weight_decay) == np.float32(0.004) * 4
            raise RuntimeError("inside")

    assert optimizer.learning_rate is rate
    assert optimizer.weight_decay == 0.004
    assert all(
        one is other for one, other in zip(optimizer.variables, variables)
    )
    assert optimizer.get_config()["learning_rate"] == np.float32(0.1)


# Momentum.

MOMENTUM, RATE, RHO, EPSILON = 0.9, 2.0**-6, 0.5, 1e-3
SIZES = {0: BASE, 1: SUPERBATCH, 2: 2 * BASE}

WITH_MOMENTUM = {
    "SGD": lambda: optimizers.SGD(RATE, momentum=MOMENTUM),
    "nesterov": lambda: optimizers.SGD(
        RATE, momentum=MOMENTUM, nesterov=True
    ),
    "RMSprop": lambda: optimizers.RMSprop(
        RATE, rho=RHO, momentum=MOMENTUM, epsilon=EPSILON
    ),
}


def loop_in_numpy(name, x, lagging=False):
    """Trains `comparing.Offset` in the form that PyTorch has.

    The velocity is a sum of gradients, multiplied by the rate when it is
    used: v = momentum·v + g, w -= rate·v. So a new rate holds at once.

    Args:
        name: Key of `WITH_MOMENTUM`.
        x: The data.
        lagging: Keras's form instead, in which the velocity contains the
            rates of the past.

    Returns:
        Weights, and velocity in the units of Keras at the base rate.
    """
    w, velocity, square = np.full(FEATURES, 0.5), 0.0, 0.0
    for size in SIZES.values():
        rate = RATE * size / BASE
        inside, outside = (rate, 1.0) if lagging else (1.0, rate)
        for start in range(0, EXAMPLES, size):
            step = w - x[start : start + size].mean(axis=0)
            if name == "RMSprop":
                square = RHO * square + (1.0 - RHO) * step**2
                step = step / np.sqrt(square + EPSILON)
            velocity = MOMENTUM * velocity + inside * step
            ahead = velocity
            if name == "nesterov":
                ahead = inside * step + MOMENTUM * velocity
            w = w - outside * ahead
    sign = 1.0 if name == "RMSprop" else -1.0
    return w, sign * velocity * (1.0 if lagging else RATE)


@pytest.mark.parametrize("name", WITH_MOMENTUM)
def test_momentum_holds_gradients_when_the_factor_jumps(name):
    x, _ = comparing.regression()
    trained = adaptive(
        offset(WITH_MOMENTUM[name]),
        x,
        x,
        policy=BatchSizeSchedule(SIZES),
        learning_rate_scaling="linear",
        shuffle=False,
        epochs=3,
    )
    weights, velocity = loop_in_numpy(name, x.astype(float))
    [slot] = learning_rate.slots_holding_the_rate(trained.model.optimizer)
    # Seventeen updates in float32.
    np.testing.assert_allclose(
        trained.model.weights[0], weights, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(slot, velocity, rtol=1e-4, atol=1e-6)


def test_momentum_is_left_alone_if_the_user_wants_it_so():
    x, _ = comparing.regression()

    def train(corrects):
        size = kb.DynamicBatchSize(
            BatchSizeSchedule(SIZES), initial_batch_size=BASE
        )
        rate = kb.LearningRateScaling("linear", momentum_correction=corrects)
        return plain(
            offset(WITH_MOMENTUM["SGD"]),
            x,
            x,
            batch_size=SUPERBATCH,
            callbacks=[size, rate],
            shuffle=False,
            epochs=3,
        ).model

    for corrects in (True, False):
        expected, velocity = loop_in_numpy(
            "SGD", x.astype(float), lagging=not corrects
        )
        model = train(corrects)
        np.testing.assert_allclose(
            model.weights[0], expected, rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            model.optimizer.momentums[0], velocity, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("power", [-0.5, -0.25])
def test_ftrl_goes_on_from_its_weights_when_the_factor_jumps(power):
    # It makes weights anew from what it has summed up, divided by the rate.
    inputs = keras.Input((FEATURES,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    optimizer = optimizers.Ftrl(0.5, learning_rate_power=power)
    model.compile(optimizer, "mse")
    model.fit(*comparing.regression(), verbose=0)
    before = model.get_weights()

    learning_rate.correct_momentum(optimizer, 4.0)
    optimizer.learning_rate = 4.0 * 0.5
    optimizer.apply([keras.ops.zeros_like(one) for one in model.weights])

    for one, expected in zip(model.get_weights(), before):
        assert np.abs(expected).min() > 0.01
        np.testing.assert_allclose(one, expected, rtol=1e-5)


def test_asking_for_the_next_rate_changes_nothing():
    x, _ = comparing.regression()
    told, used = [], []

    class Asks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            function = self.model.train_function
            [slot] = learning_rate.slots_holding_the_rate(self.model.optimizer)
            before, factor = np.array(slot), function.factor
            used.append(function.controller.last.learning_rate)
            told.append(function.next_learning_rate())
            np.testing.assert_array_equal(slot, before)
            assert function.factor == factor

    rate = kb.LearningRateScaling("linear", BASE, SUPERBATCH, warmup_epochs=2)
    plain(
        offset(WITH_MOMENTUM["SGD"]),
        x,
        x,
        batch_size=SUPERBATCH,
        callbacks=[rate, Asks()],
        shuffle=False,
        epochs=3,
    )
    # It is another one before each update of two epochs. Where an epoch ends,
    # after three updates, its length is not known yet.
    for index, rate in enumerate(told[:-1]):
        assert rate == used[index + 1] or index % 3 == 2
    assert len(set(used)) > 2


# Weight decay.

DECAY = 0.25

DECAYING = {
    "AdamW": lambda: optimizers.AdamW(RATE, weight_decay=DECAY),
    "SGD": lambda: optimizers.SGD(RATE, weight_decay=DECAY),
    # Muon leaves weights of one dimension to Adam, with a decay of its own.
    "Muon": lambda: optimizers.Muon(
        RATE, weight_decay=0.0, adam_weight_decay=DECAY
    ),
}


def decayed(name, train=adaptive, **arguments):
    """What an epoch of 64 examples leaves of a weight without gradient."""
    x = np.zeros((64, FEATURES), "float32")

    def make():
        model = offset(DECAYING[name])()
        model.compile(
            optimizer=DECAYING[name](), loss="mse", loss_weights=0.0
        )
        return model

    trained = train(make, x, x, epochs=1, **arguments)
    return float(trained.model.weights[0][0]) / 0.5


def decayed_at(name, size, rule):
    return decayed(
        name, policy=BatchSizeSchedule({0: size}), learning_rate_scaling=rule
    )


@pytest.mark.parametrize("name", DECAYING)
def test_weight_decay_keeps_its_timescale(name):
    # Under the linear rule the rate does it all, as the warm-up below shows.
    small = decayed_at(name, BASE, "sqrt")
    large = decayed_at(name, 4 * BASE, "sqrt")
    # Per update 1 - rate·decay, eight times, and 1 - 4·rate·decay, twice.
    once = RATE * DECAY
    np.testing.assert_allclose(small, (1.0 - once) ** 8, rtol=1e-6)
    np.testing.assert_allclose(large, (1.0 - 4.0 * once) ** 2, rtol=1e-6)
    # The same up to second order: 8·7/2 against 2·1/2·16 squares of `once`.
    assert abs(large - small) < 13.0 * once**2


def test_weight_decay_is_left_alone_without_scaling():
    once = RATE * DECAY
    np.testing.assert_allclose(
        decayed_at("AdamW", 4 * BASE, "none"), (1.0 - once) ** 2, rtol=1e-6
    )


def test_weight_decay_is_not_warmed_up():
    # The rate is: in two updates it is once and 2.5 times the base rate.
    left = decayed("AdamW", scaled, rule="linear", warmup_epochs=1)
    once = RATE * DECAY
    np.testing.assert_allclose(left, (1.0 - 4.0 * once) ** 2, rtol=1e-6)


# The rule named "auto".


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_auto_is_linear_for_sgd_and_sqrt_for_all_others(name):
    rule = learning_rate.rule_for(OPTIMIZERS[name](0.1))
    assert rule == ("linear" if name == "SGD" else "sqrt")


def test_auto_looks_inside_of_optimizers_that_hold_others():
    sgd = optimizers.SGD
    both = optimizers.MultiOptimizer(
        optimizers.OptimizerMap(sgd(0.1), {"a": sgd(0.2)})
    )
    unknown = optimizers.MultiOptimizer(lambda variable: sgd(0.1))
    assert learning_rate.rule_for(both) == "linear"
    assert learning_rate.rule_for(unknown) == "sqrt"
    half = optimizers.LossScaleOptimizer(sgd(0.1))
    assert learning_rate.rule_for(half) == "linear"


def test_the_rate_of_optimizers_not_made_yet_is_not_known():
    unknown = optimizers.MultiOptimizer(lambda variable: optimizers.SGD(0.1))
    rate = learning_rate.rate_in_force(2.0, 2.0, 0, 0)
    assert np.isnan(learning_rate.effective_rate(unknown, rate))


# Warm-up.


class Slope(keras.layers.Layer):
    """A weight whose gradient is one."""

    def build(self, input_shape):
        self.w = self.add_weight(shape=(), initializer="zeros")

    def call(self, x):
        return self.w + 0.0 * x


def is_output(y, y_pred):
    del y
    return keras.ops.mean(y_pred, axis=-1)


class Weights(keras.callbacks.Callback):
    """Remembers the weight after each Keras step."""

    def __init__(self):
        super().__init__()
        self.seen = [0.0]

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(float(self.model.weights[0]))


def slope():
    model = of_layer(Slope)()
    model.compile(optimizer=optimizers.SGD(RATE), loss=is_output)
    return model


def factors_of(seen):
    """The rate of each update in units of the base rate."""
    return -np.diff(seen) / RATE


def test_warm_up_grows_from_one_to_the_factor():
    x, weights = np.zeros((128, FEATURES), "float32"), Weights()
    scaled(slope, x, x, warmup_epochs=0.5, callbacks=[weights])
    # Four updates of 32 per epoch; the warm-up ends after 64 examples.
    expected = [1.0, 2.5] + [4.0] * 6
    np.testing.assert_allclose(factors_of(weights.seen), expected, rtol=1e-5)


def test_warm_up_follows_a_size_that_changes():
    x, weights = np.zeros((128, FEATURES), "float32"), Weights()
    plain(
        slope,
        x,
        x,
        batch_size=SUPERBATCH,
        callbacks=[
            kb.DynamicBatchSize(
                BatchSizeSchedule({0: SUPERBATCH}), initial_batch_size=BASE
            ),
            kb.LearningRateScaling("sqrt", warmup_epochs=2),
            weights,
        ],
        epochs=3,
    )
    # √4 = 2, reached after 256 examples.
    expected = [1.0 + min(seen / 256, 1.0) for seen in range(0, 384, 32)]
    np.testing.assert_allclose(factors_of(weights.seen), expected, rtol=1e-5)


def test_warm_up_counts_a_short_last_superbatch_once_an_epoch_has_ended():
    # 70 examples: superbatches of 32, 32 and 6, which Keras tells as three.
    x, weights = np.zeros((70, FEATURES), "float32"), Weights()
    scaled(slope, x, x, warmup_epochs=2, epochs=3, callbacks=[weights])
    first = [1.0 + 3.0 * seen / (2 * 96) for seen in (0, 32, 64)]
    later = [1.0 + 3.0 * seen / (2 * 70) for seen in (70, 102, 134)]
    # Two epochs, and not an example more.
    expected = [*first, *later, 4.0, 4.0, 4.0]
    np.testing.assert_allclose(factors_of(weights.seen), expected, rtol=1e-5)


def test_warm_up_over_data_of_unknown_length_starts_with_its_second_epoch():
    weights = Weights()
    x = np.zeros((SUPERBATCH, FEATURES), "float32")
    unknown = tf.data.Dataset.from_tensors((x, x)).repeat(4)
    unknown = unknown.filter(lambda *_: True)
    with pytest.warns(UserWarning, match="ran out of data"):
        plain(
            slope,
            unknown,
            batch_size=None,
            shuffle=False,
            callbacks=[
                kb.LearningRateScaling("linear", **STATIC, warmup_epochs=2),
                weights,
            ],
            epochs=3,
        )
    # 128 examples per epoch, as is known after the first.
    expected = [1.0] * 4 + [2.5, 2.875, 3.25, 3.625] + [4.0] * 4
    np.testing.assert_allclose(factors_of(weights.seen), expected, rtol=1e-5)
