"""Laws 1, 3 and 8 of docs/design.md; law 2 has a file of its own.

1. With the size held at B₀ training equals plain `fit`, bit for bit, whether
   noise is measured or not.
3. A schedule on the examples clock with B = B₀ is the schedule of plain `fit`.
8. The number of traces does not grow with the number of size changes.
"""

import math

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from comparing import BASE
from comparing import SCHEDULES
from comparing import SUPERBATCH
from comparing import adaptive
from comparing import compiled
from comparing import dense
from comparing import plain
from keras import layers

import keras_batchsize as kb
from keras_batchsize import learning_rate
from keras_batchsize.policies import BatchSizeSchedule

# Law 1.


def with_dropout_and_batch_norm():
    return keras.Sequential(
        [
            keras.Input((comparing.FEATURES,)),
            layers.Dense(6, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dropout(0.3, seed=7),
            layers.Dense(1),
        ]
    )


class Subclassed(keras.Model):
    """Built by its first batch, with a loss added inside of `call`."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(6, activation="relu")
        self.out = layers.Dense(1)
        self.drop = layers.Dropout(0.2)

    def call(self, x, training=False):
        hidden = self.drop(self.hidden(x), training=training)
        self.add_loss(1e-3 * keras.ops.mean(hidden**2))
        return self.out(hidden)


def in_policy(dtype_policy, **options):
    """Returns a factory of models computed in a dtype policy."""

    def make():
        keras.config.set_dtype_policy(dtype_policy)
        try:
            return dense(**options)
        finally:
            keras.config.set_dtype_policy("float32")

    return make


optimizers, schedules = keras.optimizers, keras.optimizers.schedules

SINGLE_OUTPUT = {
    "functional, momentum, weighted metric": compiled(
        dense,
        optimizer=lambda: optimizers.SGD(0.05, momentum=0.9),
        metrics=["mae"],
        weighted_metrics=["mse"],
    ),
    "sequential, dropout, batch norm, nesterov": compiled(
        with_dropout_and_batch_norm,
        optimizer=lambda: optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    ),
    "subclassed, Adam, clipnorm": compiled(
        Subclassed, optimizer=lambda: optimizers.Adam(0.01, clipnorm=0.5)
    ),
    "AdamW, schedule": compiled(
        dense,
        optimizer=lambda: optimizers.AdamW(
            schedules.ExponentialDecay(0.01, 3, 0.7), weight_decay=0.01
        ),
    ),
    "EMA, global clipnorm, weight decay": compiled(
        dense,
        optimizer=lambda: optimizers.RMSprop(
            0.01,
            momentum=0.5,
            global_clipnorm=0.5,
            weight_decay=0.01,
            use_ema=True,
            ema_momentum=0.9,
            ema_overwrite_frequency=5,
        ),
    ),
    "mixed_float16, loss scale": compiled(
        in_policy("mixed_float16"),
        optimizer=lambda: optimizers.LossScaleOptimizer(
            optimizers.Adam(0.01), dynamic_growth_steps=5
        ),
    ),
    "mixed_bfloat16, regulariser": compiled(
        in_policy("mixed_bfloat16", kernel_regularizer="l2"),
        optimizer=lambda: optimizers.Adam(0.01),
    ),
    "eager": compiled(
        with_dropout_and_batch_norm,
        optimizer=lambda: optimizers.Adam(0.01),
        run_eagerly=True,
    ),
}


@pytest.mark.parametrize("name", SINGLE_OUTPUT)
def test_fixed_size_equals_plain_fit_bit_for_bit(name):
    data = comparing.regression()

    ours = adaptive(SINGLE_OUTPUT[name], *data, policy="fixed")
    theirs = plain(SINGLE_OUTPUT[name], *data)

    comparing.assert_same(ours, theirs)


def test_fixed_size_equals_plain_fit_bit_for_bit_unshuffled():
    make_model = SINGLE_OUTPUT["functional, momentum, weighted metric"]
    weights = np.random.default_rng(1).uniform(size=comparing.EXAMPLES)
    arguments = {"shuffle": False, "sample_weight": weights}
    data = comparing.regression()

    ours = adaptive(make_model, *data, policy="fixed", **arguments)
    theirs = plain(make_model, *data, **arguments)

    comparing.assert_same(ours, theirs)


@pytest.fixture
def in_float64():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def test_fixed_size_equals_plain_fit_bit_for_bit_in_float64(in_float64):
    make_model = compiled(
        # No float32 is 0.1 or 0.03 exactly.
        dense, optimizer=lambda: optimizers.AdamW(0.1, weight_decay=0.03)
    )
    data = comparing.regression()

    ours = adaptive(make_model, *data, policy="fixed")
    theirs = plain(make_model, *data)

    assert ours.model.weights[0].dtype == "float64"
    comparing.assert_same(ours, theirs)


# Keras weights the losses of single outputs by the size of a batch where its
# graphs know that. Scaling by a power of two would hide it.
@pytest.mark.parametrize("examples", [7 * 10, 7 * 10 - 3])
@pytest.mark.parametrize("policy", ["fixed", "measure"])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_bit_for_bit_with_several_outputs(examples, policy, run_eagerly):
    make_model = comparing.in_two_outputs(
        lambda: optimizers.Adam(0.01), run_eagerly=run_eagerly
    )
    data = comparing.for_two_outputs(examples)
    batch = {"batch_size": 7}

    ours = adaptive(
        make_model, *data, policy=policy, superbatch_size=28, **batch
    )
    theirs = plain(make_model, *data, **batch)

    comparing.assert_same(ours, theirs)


def test_bit_for_bit_with_several_outputs_from_batches_of_one_size():
    make_model = comparing.in_two_outputs(lambda: optimizers.Adam(0.01))
    x, y = comparing.for_two_outputs()
    data = tf.data.Dataset.from_tensor_slices((x, y))
    data = data.batch(7, drop_remainder=True)
    both = {"batch_size": None, "shuffle": False}

    ours = adaptive(
        make_model, data, policy="fixed", superbatch_size=28, **both
    )

    comparing.assert_same(ours, plain(make_model, data, **both))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_losses_of_outputs_add_up_to_the_loss_while_sizes_change(jit_compile):
    make_model = comparing.in_two_outputs(
        lambda: optimizers.SGD(0.05), jit_compile=jit_compile
    )
    # Updates of 70 examples: 16, ..., 16 and 6; 64 and 6, which accumulate.
    history = adaptive(
        make_model,
        *comparing.for_two_outputs(),
        policy=BatchSizeSchedule({0: 16, 1: 2 * SUPERBATCH}),
        max_batch_size=2 * SUPERBATCH,
    ).history

    parts = [np.array(history[one]) for one in ("size_loss", "kind_loss")]
    np.testing.assert_allclose(
        0.3 * parts[0] + 2.0 * parts[1], history["loss"], rtol=1e-6
    )


def test_losses_of_outputs_under_xla_are_those_of_plain_fit():
    def make(**options):
        return comparing.in_two_outputs(lambda: optimizers.SGD(0.05), **options)

    data = comparing.for_two_outputs()
    ours = adaptive(make(jit_compile=True), *data, policy="fixed")
    comparing.assert_close(ours, plain(make(), *data), 2e-5)


@pytest.mark.parametrize(
    "name",
    [
        "sequential, dropout, batch norm, nesterov",
        "mixed_float16, loss scale",
        "eager",
    ],
)
def test_measuring_leaves_plain_fit_bit_for_bit(name):
    data = comparing.regression()

    ours = adaptive(
        SINGLE_OUTPUT[name], *data, policy="measure", measure_every=1
    )
    theirs = plain(SINGLE_OUTPUT[name], *data)

    # Dropout seeds, BatchNorm's statistics and the metrics among it all.
    assert ours.result.noise_scale.trace > 0.0
    comparing.assert_same(ours, theirs)


# Law 3.

def test_every_schedule_of_keras_is_tried():
    known = {
        name
        for name, one in vars(schedules).items()
        if isinstance(one, type)
        and issubclass(one, schedules.LearningRateSchedule)
        and one is not schedules.LearningRateSchedule
    }
    assert known == set(SCHEDULES), "Add the new one to `SCHEDULES`."


def last_rates(trained):
    """The base rate of the last update of each epoch."""
    rows = {row.epoch: row for row in trained.result.report.rows}
    return [rows[epoch].base_learning_rate for epoch in sorted(rows)]


# With a warm-up, and one that jumps. What a schedule is asked for does not
# depend on its kind.
@pytest.mark.parametrize("name", ["CosineDecay", "PiecewiseConstantDecay"])
def test_schedule_runs_on_the_examples_clock(name):
    make_model = compiled(
        dense, optimizer=lambda: optimizers.SGD(SCHEDULES[name]())
    )
    data = comparing.regression()
    theirs = plain(make_model, *data)
    steps = int(theirs.model.optimizer.iterations) // 2
    # The update that ends epoch e is number (e + 1)·steps, counted from 0.
    expected = [float(SCHEDULES[name]()(steps * e - 1)) for e in (1, 2)]

    ours = adaptive(make_model, *data, policy="fixed")
    comparing.assert_same(ours, theirs)
    # One rounding of float32 in factor x rate.
    np.testing.assert_allclose(last_rates(ours), expected, rtol=1e-6)

    larger = adaptive(
        make_model,
        *data,
        policy=BatchSizeSchedule({0: 4 * BASE}),
        learning_rate_scaling="linear",
    )
    assert int(larger.model.optimizer.iterations) == 2 * 3
    np.testing.assert_allclose(last_rates(larger), expected, rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_asked_for_the_step_of_an_example(name):
    schedule = SCHEDULES[name]()
    held = optimizers.SGD(schedule)
    rate = learning_rate.rate_in_force(2.0, 4.0, 2, 3)
    for position in (-12, 0, 4, 5, 13, 100):
        # Three examples after step 2, in steps of eight.
        step = 2 + math.floor((3 + position) / BASE)
        found = learning_rate.effective_rate(held, rate.at(position, BASE))
        np.testing.assert_allclose(
            found, 2.0 * float(schedule(step)), rtol=1e-6
        )


def test_schedule_goes_on_in_a_second_fit():
    make_model = compiled(
        dense, optimizer=lambda: optimizers.SGD(SCHEDULES["CosineDecay"]())
    )
    data = comparing.regression()

    def twice(train):
        def make():
            first = train(make_model, *data, epochs=1).model
            return first

        return make

    theirs = plain(twice(plain), *data, epochs=1)
    ours = adaptive(twice(plain), *data, policy="fixed", epochs=1)

    comparing.assert_same(ours, theirs)


@pytest.mark.parametrize("between", ["compiled anew", "plain fit"])
def test_schedule_is_that_of_plain_fit_after(between):
    data = comparing.regression()
    compile_model = compiled(
        dense, optimizer=lambda: optimizers.SGD(SCHEDULES["CosineDecay"]())
    )

    def losses(trains):
        keras.utils.set_random_seed(0)
        model = compile_model()
        arguments = {"batch_size": BASE, "verbose": 0, "shuffle": False}
        fit = model.fit
        if trains:
            fit = kb.AdaptiveTrainer(model, policy="fixed").fit
        first = fit(*data, **arguments)
        if between == "compiled anew":
            again = optimizers.SGD(SCHEDULES["CosineDecay"]())
            model.compile(again, model.loss)
        else:
            model.fit(*data, **arguments)
        second = fit(*data, epochs=2, **arguments)
        return first.history["loss"] + second.history["loss"]

    assert losses(trains=True) == losses(trains=False)


def test_a_quiet_fit_writes_nothing(capfd):
    comparing.adaptive(compiled(dense), *comparing.regression())
    said = capfd.readouterr()
    assert said.out == ""
    assert "WARNING:tensorflow" not in said.err


# Law 8.


def test_traces_do_not_grow_with_size_changes(graphs):
    def traces(sizes):
        adaptive(
            compiled(dense),
            *comparing.regression(),
            policy=BatchSizeSchedule(lambda epoch: sizes[epoch % len(sizes)]),
            measure_every=1,
            min_batch_size=2,
            max_batch_size=4 * SUPERBATCH,
            epochs=8,
        )
        return graphs.pop().traces

    # 64 and 128 are above the superbatch, so gradients accumulate; the last
    # superbatch of an epoch is ragged.
    few = traces([8, 8, 8, 8, 64, 64, 64, 64])
    many = traces([8, 64, 2, 16, 128, 4, 32, 64])

    # There are three loops, each for any number of examples. Keras traces plain
    # `fit` twice: for a whole batch, and for any.
    assert few == many == 3
