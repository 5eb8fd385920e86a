"""Bad input gets a clear error before anything is changed or trained.

Every error has three parts: what must hold and why, what was received, under
the name the caller used, and the edit that mends it. After it the model is as
it was.
"""

import dataclasses
import functools
import json
import math
import warnings
from collections.abc import Callable

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from comparing import BASE
from comparing import EXAMPLES
from comparing import dense
from comparing import regression

import keras_batchsize as kb
from keras_batchsize import replicas

X, Y = regression()


def compiled(model, loss="mse", optimizer="sgd", **options):
    model.compile(optimizer, loss, **options)
    return model


def regressor(**options):
    return compiled(dense(), **options)


class OwnTrainFunction(keras.Sequential):
    """Is not trained by `train_step`."""

    def make_train_function(self, force=False):
        self.train_function = lambda iterator: {"loss": 0.0}


class OwnStep(keras.Model):
    """Computes its gradients where nobody can see them."""

    def __init__(self):
        super().__init__()
        self.out = keras.layers.Dense(1)

    def call(self, x):
        return self.out(x)

    def train_step(self, data):
        return super().train_step(data)


def largest_error(y, y_pred):
    """A loss that is no mean over examples."""
    return keras.ops.max(keras.ops.square(y - y_pred))


def fit(
    model=None, x=X, y=Y, batch_size=BASE, steps_per_epoch=None, **arguments
):
    """Trains `model`, or one that has been trained before, by a trainer."""
    trainer = kb.AdaptiveTrainer(model or trained(), **arguments)
    return trainer.fit(
        x, y, batch_size, steps_per_epoch=steps_per_epoch, verbose=0
    )


def fit_with_callbacks(*callbacks, batch_size=4 * BASE):
    return trained().fit(X, Y, batch_size, callbacks=list(callbacks), verbose=0)


@functools.cache
def trained():
    """Returns the model that all mistakes are made with: they leave it alone.

    It has been trained before, so that Keras has nothing to add to it either.
    """
    model = regressor()
    model.fit(X, Y, verbose=0)
    return model


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A call that cannot work.

    Attributes:
        name: What is wrong.
        call: Makes the call.
        constraint: What the message says must hold.
        received: What it says was received.
        remedy: What it says helps.
        error: Type of the error.
    """

    name: str
    call: Callable
    constraint: str
    received: str
    remedy: str
    error: type = ValueError


def numbers(argument):
    """The mistakes one can make with a number of examples."""
    for value, error in (
        (0, ValueError),
        (-8, ValueError),
        (2.5, TypeError),
        ("32", TypeError),
        (True, TypeError),
    ):
        yield Mistake(
            f"{argument}={value!r}",
            lambda value=value: fit(**{argument: value}),
            f"`{argument}` must be",
            f"{argument}={value!r}",
            f"{argument}=",
            error,
        )


def dataset(examples, known=True):
    made = tf.data.Dataset.from_tensor_slices((X[:examples], Y[:examples]))
    return made if known else made.filter(lambda x, y: True)


class NoBatches(keras.utils.PyDataset):
    num_batches = 0

    def __getitem__(self, index):
        raise IndexError(index)


class OneExample(keras.utils.PyDataset):
    num_batches = 1

    def __getitem__(self, index):
        return X[:1], Y[:1]


class Compiles(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.model.compile("sgd", "mse")


def too_few(name, examples, *data, **arguments):
    return Mistake(
        f"{examples}-examples-{name}",
        lambda: fit(None, *data, **arguments),
        "The data must hold at least 2 examples",
        f"{examples} examples",
        "Pass more data",
    )


ON_TRAINER = [
    Mistake(
        "not-a-keras-model",
        lambda: kb.AdaptiveTrainer(lambda x: x),
        "`model` must be a `keras.Model`",
        "type function",
        "functional or subclassed model",
        TypeError,
    ),
    Mistake(
        "not-compiled",
        lambda: kb.AdaptiveTrainer(dense()),
        "`model` must be compiled",
        "not compiled",
        "Call model.compile(",
    ),
    Mistake(
        "own-train-function",
        lambda: kb.AdaptiveTrainer(
            compiled(OwnTrainFunction([keras.layers.Dense(1)]))
        ),
        "`make_train_function` must be that of Keras",
        "OwnTrainFunction with one of its own",
        "Override `train_step`",
    ),
    Mistake(
        "without-optimizer",
        lambda: kb.AdaptiveTrainer(regressor(optimizer=None)),
        "`model` must be compiled with an optimizer",
        "optimizer=None",
        'optimizer="adam"',
    ),
    Mistake(
        "optimizer-accumulates",
        lambda: kb.AdaptiveTrainer(
            regressor(
                optimizer=keras.optimizers.SGD(gradient_accumulation_steps=4)
            )
        ),
        "`gradient_accumulation_steps` must not be set",
        "gradient_accumulation_steps=4",
        "Remove it",
    ),
    Mistake(
        "optimizer-inside-accumulates",
        lambda: kb.AdaptiveTrainer(
            regressor(
                optimizer=keras.optimizers.LossScaleOptimizer(
                    keras.optimizers.SGD(gradient_accumulation_steps=4)
                )
            )
        ),
        "`gradient_accumulation_steps` must not be set",
        "gradient_accumulation_steps=4",
        "Remove it",
    ),
    Mistake(
        "unknown-policy",
        lambda: kb.AdaptiveTrainer(trained(), policy="best"),
        '`policy` must be one of "cabs", "cosine", "diversity", "fixed", '
        '"goodput", "measure", "noise_scale", "norm_test", "plateau"',
        "policy='best'",
        "Use one of these names",
    ),
    Mistake(
        "policy-class-not-object",
        lambda: kb.AdaptiveTrainer(trained(), policy=kb.policies.Goodput),
        "`policy` must be a name or a `BatchSizePolicy`",
        "type type",
        'policy="goodput"',
        TypeError,
    ),
    Mistake(
        "unknown-rule",
        lambda: kb.AdaptiveTrainer(trained(), learning_rate_scaling="cubic"),
        '`learning_rate_scaling` must be one of "adascale", "auto", "linear"',
        "learning_rate_scaling='cubic'",
        "Use one of these names",
    ),
    Mistake(
        "unknown-rule-of-callback",
        lambda: kb.LearningRateScaling("cubic"),
        '`rule` must be one of "adascale", "auto", "linear", "none", "sqrt"',
        "rule='cubic'",
        "Use one of these names",
    ),
    Mistake(
        "rule-of-wrong-kind",
        lambda: kb.AdaptiveTrainer(trained(), learning_rate_scaling=2.0),
        "`learning_rate_scaling` must be the name of a rule or a function",
        "learning_rate_scaling=2.0 of type float",
        'Use "auto"',
        TypeError,
    ),
    Mistake(
        "schedule-of-wrong-kind",
        lambda: kb.policies.BatchSizeSchedule([8, 16]),
        "`schedule` must be a function of the epoch or a dict",
        "schedule=[8, 16]",
        "Use {0: 32, 10: 128}",
        TypeError,
    ),
]

ON_SIZES = [
    *numbers("batch_size"),
    *numbers("min_batch_size"),
    *numbers("max_batch_size"),
    *numbers("superbatch_size"),
    *numbers("measure_every"),
    Mistake(
        "measure-never",
        lambda: fit(measure_every=None),
        "`measure_every` must be an integer",
        "measure_every=None",
        'Use measure_every="auto"',
        TypeError,
    ),
    # Zero is none at all, as in Keras.
    *list(numbers("steps_per_epoch"))[1:],
    Mistake(
        "min-above-max",
        lambda: fit(min_batch_size=64, max_batch_size=32),
        "`min_batch_size` must not be larger than `max_batch_size`",
        "min_batch_size=64, max_batch_size=32",
        "Use min_batch_size=8",
    ),
    Mistake(
        "base-below-min",
        lambda: fit(min_batch_size=16, max_batch_size=32),
        "The base batch size must lie between",
        "batch_size=8, min_batch_size=16, max_batch_size=32",
        "Use batch_size=16",
    ),
    Mistake(
        "base-above-max",
        lambda: fit(max_batch_size=4, min_batch_size=2),
        "The base batch size must lie between",
        "batch_size=8, min_batch_size=2, max_batch_size=4",
        "Use batch_size=4",
    ),
    Mistake(
        "base-above-max-alone",
        lambda: fit(max_batch_size=4),
        "The base batch size must lie between",
        "batch_size=8, max_batch_size=4",
        "Use max_batch_size=8.",
    ),
    Mistake(
        "base-below-min-alone",
        lambda: kb.DynamicBatchSize("fixed", 8, min_batch_size=16),
        "The base batch size must lie between",
        "initial_batch_size=8, min_batch_size=16",
        "Use min_batch_size=8.",
    ),
    Mistake(
        "superbatch-below-base",
        lambda: fit(superbatch_size=4),
        "`superbatch_size` must be the base batch size times a power of two",
        "superbatch_size=4, batch_size=8",
        "Use superbatch_size=8",
    ),
    Mistake(
        "superbatch-between-sizes",
        lambda: fit(superbatch_size=40),
        "`superbatch_size` must be the base batch size times a power of two",
        "superbatch_size=40, batch_size=8",
        "Use superbatch_size=32",
    ),
    Mistake(
        "initial-size-0",
        lambda: kb.DynamicBatchSize(initial_batch_size=0),
        "`initial_batch_size` must be at least 1",
        "initial_batch_size=0",
        "Use initial_batch_size=32",
    ),
    Mistake(
        "initial-size-above-max",
        lambda: kb.DynamicBatchSize(
            initial_batch_size=32, min_batch_size=8, max_batch_size=16
        ),
        "The base batch size must lie between",
        "initial_batch_size=32, min_batch_size=8, max_batch_size=16",
        "Use initial_batch_size=16",
    ),
    Mistake(
        "base-size-of-rate-0",
        lambda: kb.LearningRateScaling(base_batch_size=0),
        "`base_batch_size` must be at least 1",
        "base_batch_size=0",
        "Use base_batch_size=32",
    ),
    *[
        Mistake(
            f"{name}-of-wrong-kind",
            lambda name=name: kb.policies.GrowOnPlateau(**{name: "3"}),
            f"`{name}` must be a number",
            f"{name}='3'",
            f"Use {name}=",
            TypeError,
        )
        for name in ("patience", "cooldown", "min_delta")
    ],
    Mistake(
        "one-example-by-callbacks",
        lambda: trained().fit(
            X[:1], Y[:1], callbacks=[kb.DynamicBatchSize()], verbose=0
        ),
        "The data must hold at least 2 examples",
        "an epoch with 1 examples",
        "Pass more data",
    ),
    Mistake(
        "one-example-by-callbacks-of-its-size",
        lambda: trained().fit(
            *(X[:1], Y[:1]),
            callbacks=[kb.DynamicBatchSize("fixed", 1)],
            verbose=0,
        ),
        "The data must hold at least 2 examples",
        "an epoch with 1 examples",
        "Pass more data",
    ),
    Mistake(
        "compiled-in-fit",
        lambda: regressor().fit(
            *(X, Y, 4 * BASE),
            callbacks=[kb.DynamicBatchSize("fixed", BASE), Compiles()],
            verbose=0,
        ),
        "The model must not be compiled in `fit`",
        "a callback that did so",
        "Compile the model before",
    ),
    Mistake(
        "two-deciders",
        lambda: trained().fit(
            X,
            Y,
            4 * BASE,
            callbacks=[
                kb.DynamicBatchSize("fixed", BASE),
                kb.DynamicBatchSize("fixed", BASE),
            ],
            verbose=0,
        ),
        "Only one callback may decide the batch size",
        "two `DynamicBatchSize`",
        "Remove one",
    ),
    Mistake(
        "decider-beside-trainer",
        lambda: kb.AdaptiveTrainer(trained()).fit(
            X, Y, BASE, callbacks=[kb.DynamicBatchSize("fixed", BASE)]
        ),
        "Only one callback may decide the batch size",
        "beside an `AdaptiveTrainer`",
        "Remove one",
    ),
    Mistake(
        "superbatch-of-fit-between-sizes",
        lambda: fit_with_callbacks(
            kb.DynamicBatchSize("fixed", BASE), batch_size=20
        ),
        "The batch size given to `fit` must be `initial_batch_size` times a "
        "power of two",
        "batch_size=20, initial_batch_size=8",
        "batch_size=32)",
    ),
    Mistake(
        "superbatch-of-fit-below-base",
        lambda: fit_with_callbacks(
            kb.DynamicBatchSize("fixed", 32), batch_size=16
        ),
        "The batch size given to `fit` must be `initial_batch_size` times a "
        "power of two",
        "batch_size=16, initial_batch_size=32",
        "batch_size=64)",
    ),
    Mistake(
        "static-scaling-without-sizes",
        lambda: fit_with_callbacks(kb.LearningRateScaling("linear")),
        "`base_batch_size` and `batch_size` must be given",
        "base_batch_size=None, batch_size=None",
        "add kb.DynamicBatchSize()",
    ),
    Mistake(
        "static-scaling-for-another-size",
        lambda: fit_with_callbacks(
            kb.LearningRateScaling(base_batch_size=8, batch_size=64),
            batch_size=16,
        ),
        "`batch_size` of `LearningRateScaling` must be that of `fit`",
        "batch_size=64, and batches of 16 examples",
        "LearningRateScaling(..., batch_size=16)",
    ),
    Mistake(
        "warmup-below-zero",
        lambda: kb.LearningRateScaling(warmup_epochs=-1),
        "`warmup_epochs` must be between",
        "warmup_epochs=-1",
        "Use 5",
    ),
]

ON_DATA = [
    Mistake(
        "x-and-y-differ",
        lambda: fit(y=Y[:-1]),
        "All arrays must hold the same number of examples",
        "x of 70, y of 69 examples",
        "first 69 of each",
    ),
    Mistake(
        "x-and-y-differ-before-they-are-split",
        lambda: kb.AdaptiveTrainer(trained()).fit(
            X, Y[:-1], validation_split=0.2
        ),
        "All arrays must hold the same number of examples",
        "x of 70, y of 69 examples",
        "first 69 of each",
    ),
    Mistake(
        "inputs-differ",
        lambda: fit(x={"one": X, "two": X[:9]}),
        "All arrays must hold the same number of examples",
        "x of 70, x of 9 examples",
        "first 9 of each",
    ),
    Mistake(
        "weights-differ",
        lambda: kb.AdaptiveTrainer(trained()).fit(
            X, Y, sample_weight=np.ones(EXAMPLES + 1)
        ),
        "All arrays must hold the same number of examples",
        "x of 70, sample_weight of 71 examples",
        "first 70 of each",
    ),
    Mistake(
        "no-data",
        lambda: fit(x=None, y=None),
        "`x` must be given",
        "x=None",
        "Pass arrays",
    ),
    too_few("of-arrays", 1, X[:1], Y[:1]),
    too_few("of-arrays", 0, X[:0], Y[:0]),
    too_few("of-dataset", 0, dataset(0).batch(BASE), None),
    too_few("of-dataset", 1, dataset(1).batch(BASE), None),
    too_few("of-unknown", 0, dataset(0, known=False).batch(BASE), None),
    too_few("of-unknown", 1, dataset(1, known=False).batch(BASE), None),
    too_few("in-batches-of-1", 1, dataset(1, known=False).batch(1), None),
    too_few("unbatched", 0, dataset(0), None),
    too_few("unbatched", 1, dataset(1), None),
    too_few("unbatched-unknown", 0, dataset(0, known=False), None),
    too_few("unbatched-unknown", 1, dataset(1, known=False), None),
    too_few("of-py-dataset", 0, NoBatches(), None),
    too_few("of-py-dataset", 1, OneExample(), None),
    too_few("of-generator", 1, (one for one in [(X[:1], Y[:1])]), None),
    too_few("of-generator", 0, (one for one in ()), None, steps_per_epoch=1),
]


def loss_mistake(name, make_model, constraint, received, remedy):
    return Mistake(
        name, lambda: fit(make_model()), constraint, received, remedy
    )


@pytest.mark.parametrize(
    "mistake", ON_TRAINER + ON_SIZES + ON_DATA, ids=lambda one: one.name
)
def test_a_mistake_is_named_with_its_remedy(mistake):
    before = state_of(trained())

    with pytest.raises(mistake.error, match="Received: ") as caught:
        mistake.call()

    assert_three_parts(caught.value, mistake)
    assert_as_it_was(trained(), before)


def assert_three_parts(error, mistake):
    constraint, received = str(error).split("Received: ", 1)
    received, remedy = received.split(". ", 1)
    assert mistake.constraint in constraint
    assert constraint.rstrip().endswith((".", ":"))
    assert mistake.received in received
    assert mistake.remedy in remedy
    assert remedy.endswith(".")


def state_of(model):
    return {
        "weights": [
            np.array(keras.ops.convert_to_numpy(one))
            for one in [*model.variables, *model.optimizer.variables]
        ],
        "train_function": model.train_function,
        "optimizer": model.optimizer,
        "attributes": sorted(vars(model)),
    }


def assert_as_it_was(model, before):
    after = state_of(model)
    for one, two in zip(before["weights"], after["weights"], strict=True):
        np.testing.assert_array_equal(one, two)
    assert after["train_function"] is before["train_function"]
    assert after["optimizer"] is before["optimizer"]
    assert after["attributes"] == before["attributes"]


# What cannot be cut into micro-batches.


@pytest.mark.parametrize(
    ("make_model", "constraint", "received", "remedy"),
    [
        (
            lambda: regressor(loss=keras.losses.MeanSquaredError("sum")),
            "A loss must be a mean over examples",
            "reduction=",
            'reduction="sum_over_batch_size"',
        ),
        (
            lambda: regressor(loss=keras.losses.Dice()),
            "compares all examples of a batch",
            "Dice",
            "Use a loss that is a mean over examples",
        ),
        (
            lambda: regressor(loss=largest_error),
            "A loss must be a mean over examples",
            "largest_error",
            "Use a loss that is a mean over examples",
        ),
        (
            lambda: compiled(OwnStep()),
            "A model that overrides `train_step` cannot be measured",
            "type OwnStep",
            'policy="plateau", "fixed"',
        ),
    ],
    ids=["sum", "dice", "maximum", "train-step"],
)
def test_what_cannot_be_cut_is_refused(
    make_model, constraint, received, remedy
):
    model = make_model()
    model.fit(X, Y, verbose=0)
    before = state_of(model)

    with pytest.raises(ValueError, match="Received: ") as caught:
        fit(model, policy="goodput")

    mistake = Mistake("", None, constraint, received, remedy)
    assert_three_parts(caught.value, mistake)
    assert_as_it_was(model, before)


def test_what_cannot_be_cut_is_refused_by_a_callback():
    model = regressor(loss=largest_error)
    model.fit(X, Y, verbose=0)
    before = state_of(model)
    callback = kb.DynamicBatchSize("goodput", BASE)

    with pytest.raises(ValueError, match="Received: .*largest_error"):
        model.fit(X, Y, 4 * BASE, callbacks=[callback], verbose=0)

    assert_as_it_was(model, before)


@pytest.mark.parametrize(
    "make_model",
    [
        lambda: regressor(loss=largest_error),
        lambda: compiled(OwnStep()),
    ],
    ids=["loss", "train-step"],
)
def test_a_policy_without_gradients_takes_what_cannot_be_cut(make_model):
    for policy, size in (
        ("fixed", BASE),
        (kb.policies.BatchSizeSchedule({0: 2 * BASE}), 2 * BASE),
    ):
        model = make_model()
        # Left to itself, a sixteenth of the data is the largest: eight.
        largest = {"superbatch_size": 2 * BASE, "max_batch_size": 2 * BASE}
        history = fit(model, policy=policy, **largest)
        assert np.isfinite(history.history["loss"]).all()
        assert model.optimizer.iterations == math.ceil(EXAMPLES / size)


def by_python(examples):
    return tf.data.Dataset.from_generator(
        lambda: zip(X[:examples], Y[:examples]),
        output_signature=tuple(
            tf.TensorSpec(data.shape[1:], data.dtype) for data in (X, Y)
        ),
    )


def fit_by_callback(model, data, size=32):
    callback = kb.DynamicBatchSize("fixed", size)
    model.fit(data, callbacks=[callback], verbose=0, shuffle=False)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_a_source_that_is_not_read_ahead_may_not_be_empty():
    # A Python generator may be used up; when the epoch is over, it shows.
    model = trained()
    before = state_of(model)
    for fit_on in (lambda *of: fit(*of, None), fit_by_callback):
        with pytest.raises(ValueError, match="at least 2 examples"):
            fit_on(model, by_python(0).batch(BASE))
        assert_as_it_was(model, before)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize(
    "fit_on",
    [
        lambda *of: fit(*of, None, policy="fixed"),
        # The end is not seen, but fewer come than were asked for.
        lambda *of: fit(*of, None, policy="fixed", steps_per_epoch=1),
        lambda *of: fit_by_callback(*of, size=1),
    ],
    ids=["trainer", "one-step", "callback"],
)
def test_a_source_that_is_not_read_ahead_may_not_hold_one_example(fit_on):
    model = regressor()
    with pytest.raises(ValueError, match="at least 2 .* with 1 examples"):
        fit_on(model, by_python(1).batch(BASE))
    own = kb.callbacks.AdaptiveTrainFunction
    assert not isinstance(model.train_function, own)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_an_epoch_of_one_example_is_no_end_of_the_data():
    model = regressor()
    data = by_python(EXAMPLES).batch(1)
    fit(model, data, None, batch_size=1, steps_per_epoch=1, policy="fixed")
    stop = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: setattr(
            model, "stop_training", True
        )
    )
    sizes = kb.DynamicBatchSize("fixed", 1)
    model.fit(data, callbacks=[sizes, stop], verbose=0, shuffle=False)
    # What is read ahead of a pipeline of unknown length is no end of it either.
    fit(model, dataset(2, known=False).batch(1), None, policy="fixed")
    assert int(model.optimizer.iterations) == 3


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_a_data_loader_of_one_example_is_refused():
    data = pytest.importorskip("torch.utils.data")
    from_numpy = pytest.importorskip("torch").from_numpy
    one = data.TensorDataset(from_numpy(X[:1]), from_numpy(Y[:1]))
    more = data.TensorDataset(from_numpy(X), from_numpy(Y))
    for loader in (
        data.DataLoader(one, batch_size=BASE),
        data.DataLoader(
            more, batch_size=BASE, sampler=data.SubsetRandomSampler([3])
        ),
    ):
        with pytest.raises(ValueError, match="at least 2 .* with 1 examples"):
            fit(trained(), loader, None)
    # One batch is not one example.
    whole = data.DataLoader([more[:]], batch_size=None)
    fit(regressor(), whole, None, policy="fixed")


class TwoOptimizers(OwnStep):
    """As a GAN: the optimizer it is compiled with is not the only one."""

    def compile(self, *args, **kwargs):
        super().compile(*args, **kwargs)
        self.critics_optimizer = keras.optimizers.Adam(1e-3)


def test_several_optimizers_get_no_rate_that_only_one_would_follow():
    schedule = kb.policies.BatchSizeSchedule({0: 2 * BASE})
    model = compiled(TwoOptimizers())
    with pytest.raises(ValueError, match="Received: critics_optimizer") as why:
        fit(model, policy=schedule, max_batch_size=2 * BASE)
    assert 'learning_rate_scaling="none"' in str(why.value)
    fit(model, policy=schedule, learning_rate_scaling="none")
    fit(model, policy="fixed")
    # That of the loss scale, and those it holds, are the compiled one.
    model = compiled(OwnStep(), optimizer=keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.1)
    ))
    fit(model, policy=schedule)


class Several(OwnStep):
    """Holds optimizers beside the one it is compiled with."""

    def __init__(self, **held):
        super().__init__()
        for name, value in held.items():
            setattr(self, name, value)


def small_and_compiled():
    layers = [keras.Input((1,)), keras.layers.Dense(1)]
    return compiled(keras.Sequential(layers))


HELD = {
    "critic": lambda: {"critic": keras.optimizers.Adam(1e-3)},
    "critics['one']": lambda: {"critics": {"one": keras.optimizers.Adam()}},
    "critics[0]": lambda: {"critics": [keras.optimizers.Adam(1e-3)]},
    "critics[1][0]": lambda: {"critics": (None, [keras.optimizers.Adam()])},
    "critic.optimizer": lambda: {"critic": small_and_compiled()},
}


def by_static_scaling(model):
    scaling = kb.LearningRateScaling("linear", BASE, 4 * BASE)
    model.fit(X, Y, 4 * BASE, callbacks=[scaling], verbose=0)


def by_a_fixed_size(model):
    sizes = {"policy": kb.policies.Fixed(4 * BASE), "max_batch_size": 4 * BASE}
    fit(model, **sizes)


@pytest.mark.parametrize(
    ("fit_model", "name"),
    [
        (by_static_scaling, "critic"),
        *((by_a_fixed_size, name) for name in HELD),
    ],
)
def test_one_size_is_another_than_that_of_the_rate(fit_model, name):
    model = compiled(Several(**HELD[name]()))
    with pytest.raises(ValueError, match="Received: ") as why:
        fit_model(model)
    assert f"Received: {name} beside the compiled optimizer" in str(why.value)
    assert "32 examples with the rate for 8" in str(why.value)


def test_what_is_held_twice_or_no_more_is_no_other_optimizer():
    model = compiled(Several(critic=keras.optimizers.Adam()))
    model.critic = None
    model.all = [model.optimizer]
    by_a_fixed_size(model)


def test_what_is_compiled_inside_and_not_trained_is_no_other_optimizer():
    frozen = small_and_compiled()
    frozen.trainable = False
    by_a_fixed_size(compiled(Several(critic=frozen)))
    # Keras's own step uses one optimizer only.
    layers = [keras.Input((X.shape[1],)), keras.layers.Dense(1)]
    by_a_fixed_size(compiled(keras.Sequential([*layers, small_and_compiled()])))


def test_bounds_that_a_policy_does_not_use_ask_for_no_cutting():
    sizes = {"superbatch_size": 2 * BASE, "max_batch_size": 4 * BASE}
    fit(compiled(OwnStep()), policy="fixed", **sizes)
    with pytest.raises(ValueError, match=f"max_batch_size={2 * BASE}, the"):
        schedule = kb.policies.BatchSizeSchedule({0: BASE})
        fit(compiled(OwnStep()), policy=schedule, **sizes)


def test_superbatches_of_one_example_show_no_noise():
    model = regressor()
    trainer = kb.AdaptiveTrainer(model, superbatch_size=1, verbose=0)
    trainer.fit(X, Y, batch_size=1, epochs=2, verbose=0)
    assert int(model.optimizer.iterations) == 2 * len(X)
    assert not trainer.noise_scale.resolved
    assert "no noise was measured" in str(trainer.report)


# States that are none.


@functools.cache
def a_state():
    """Returns what a trainer saves after a training."""
    trainer = kb.AdaptiveTrainer(regressor(), "measure", verbose=0)
    trainer.fit(X, Y, BASE, verbose=0)
    return trainer.get_state()


def without(key):
    return {name: value for name, value in a_state().items() if name != key}


def within(key, **changed):
    return a_state() | {key: a_state()[key] | changed}


NO_STATES = {
    "list": (lambda: [a_state()], TypeError, "of type list, not a dict"),
    "none": (lambda: None, TypeError, "state=None of type NoneType"),
    "json": (lambda: json.dumps(a_state()), TypeError, "of type str"),
    "key-missing": (lambda: without("noise"), ValueError, "without 'noise'"),
    "keys-missing": (
        lambda: {"batch_size": 8},
        ValueError,
        "without 'base_batch_size', 'base_steps', 'before_try', 'changed_at'",
    ),
    "key-unknown": (
        lambda: a_state() | {"new": 1},
        ValueError,
        "state with 'new'",
    ),
    "of-a-backup": (
        lambda: {"controller": a_state(), "factor": 1.0, "seconds": 0.0},
        ValueError,
        "and with 'controller', 'factor', 'seconds'",
    ),
    "size-of-text": (
        lambda: a_state() | {"batch_size": "8"},
        TypeError,
        "state['batch_size']='8', not a positive integer",
    ),
    "size-0": (
        lambda: a_state() | {"batch_size": 0},
        TypeError,
        "state['batch_size']=0, not a positive integer",
    ),
    "clock-of-number": (
        lambda: a_state() | {"clock": 7},
        TypeError,
        "state['clock']=7 of type int, not a dict",
    ),
    "clock-stopped": (
        lambda: a_state() | {"clock": {"steps": 1}},
        ValueError,
        "state['clock'] without 'epoch_length', 'examples'",
    ),
    "noise-of-text": (
        lambda: within("noise", level="much"),
        TypeError,
        "state['noise']['level']='much', not a number",
    ),
    "noise-of-other-shape": (
        lambda: within("noise", running=[1.0]),
        TypeError,
        "state['noise']['running']=[1.0], not a list of lists of numbers",
    ),
    "timings-of-text": (
        lambda: a_state() | {"timings": {"eight": [0.1]}},
        TypeError,
        "state['timings']={'eight': [0.1]}, not a dict from sizes",
    ),
    "health-of-number": (
        lambda: a_state() | {"healthy": 1},
        TypeError,
        "state['healthy']=1, not True or False",
    ),
}


@functools.cache
def a_trainer():
    """Returns the trainer that all of them are offered to."""
    trainer = kb.AdaptiveTrainer(regressor(), "measure", verbose=0)
    trainer.fit(X, Y, BASE, verbose=0)
    return trainer


@pytest.mark.parametrize("name", NO_STATES)
def test_what_is_no_state_changes_nothing(name):
    make, error, received = NO_STATES[name]
    trainer = a_trainer()
    model = trainer.model
    before, held = trainer.get_state(), state_of(model)

    with pytest.raises(error, match="Received: ") as caught:
        trainer.set_state(make())

    mistake = Mistake(
        *("", None, "`state` must be what `get_state` of this version"),
        *(received, "set_state({}) to start anew"),
    )
    assert_three_parts(caught.value, mistake)
    assert trainer.get_state() == before
    assert_as_it_was(model, held)


def test_an_empty_state_starts_anew():
    trainer = kb.AdaptiveTrainer(regressor(), "measure", verbose=0)
    trainer.set_state(a_state())
    assert trainer.get_state() == a_state()
    trainer.set_state({})
    assert trainer.get_state() == {}


# Models that were made for one batch size.


def of_one_size(size=BASE):
    """Has taken that batch size down for good."""
    inputs = keras.Input(batch_shape=(size, X.shape[1]))
    hidden = keras.ops.reshape(inputs, (size, X.shape[1], 1))
    hidden = keras.layers.Flatten()(hidden)
    return keras.Model(inputs, keras.layers.Dense(1)(hidden))


def stateful():
    """Goes on from the states that the last batch left behind."""
    inputs = keras.Input(batch_shape=(BASE, *X.shape[1:]))
    hidden = keras.layers.Reshape((X.shape[1], 1))(inputs)
    hidden = keras.layers.SimpleRNN(4, stateful=True)(hidden)
    return keras.Model(inputs, keras.layers.Dense(1)(hidden))


def indifferent():
    """States a batch size, and takes any."""
    # Of arguments that are no plain values Keras takes no note.
    inputs = keras.Input(batch_shape=(BASE, *X.shape[1:]), dtype=tf.float32)
    return keras.Model(inputs, keras.layers.Dense(1)(inputs))


WHOLE = 8 * BASE
FIXED_SIZE = {
    "measuring": ("cut into parts", {"policy": "measure"}),
    "accumulating": (
        "cut into parts",
        {
            "policy": kb.policies.Fixed(WHOLE),
            "max_batch_size": WHOLE,
            "superbatch_size": 32,
        },
    ),
    "growing": (
        "of 16 or 32 examples",
        {
            "policy": kb.policies.BatchSizeSchedule({1: 2 * BASE}),
            "max_batch_size": 32,
        },
    ),
    "other-base": ("of 16 examples", {"policy": "fixed", "batch_size": 16}),
    "other-fixed": (
        "of 16 examples",
        {"policy": kb.policies.Fixed(16), "max_batch_size": 32},
    ),
}


@functools.cache
def trained_at_one_size(make):
    """Returns a model that was trained, one for all that leave it as it is."""
    model = compiled(make())
    model.fit(X[:WHOLE], Y[:WHOLE], BASE, verbose=0)
    return model


@pytest.mark.parametrize("make", [of_one_size, stateful, indifferent])
@pytest.mark.parametrize("name", FIXED_SIZE)
def test_a_model_of_one_batch_size_gets_no_other(make, name):
    constraint, arguments = FIXED_SIZE[name]
    model = trained_at_one_size(make)
    before = state_of(model)

    with pytest.raises(ValueError, match="Received: ") as caught:
        fit(model, X[:WHOLE], Y[:WHOLE], **arguments)

    mistake = Mistake(
        *("", None, constraint, f"batch_size={BASE}"),
        "Use keras.Input(shape) without `batch_size`",
    )
    assert_three_parts(caught.value, mistake)
    assert_as_it_was(model, before)


@pytest.mark.parametrize(
    ("make", "through"),
    [
        (of_one_size, "trainer"),
        (of_one_size, "callback"),
        (stateful, "trainer"),
    ],
)
def test_a_short_last_batch_is_refused_by_a_model_of_one_size(make, through):
    model = compiled(make())
    model.fit(X[:WHOLE], Y[:WHOLE], BASE, verbose=0)
    before = state_of(model)

    with pytest.raises(ValueError, match="6 examples that are left") as caught:
        if through == "trainer":
            fit(model, policy="fixed")
        else:
            callback = kb.DynamicBatchSize("fixed", BASE)
            model.fit(X, Y, WHOLE, callbacks=[callback], verbose=0)

    assert f"Received: an input with batch_size={BASE}" in str(caught.value)
    if through == "trainer":
        assert_as_it_was(model, before)


@pytest.mark.parametrize(
    ("make", "examples"),
    [(of_one_size, WHOLE), (stateful, WHOLE), (indifferent, EXAMPLES)],
)
def test_a_model_of_one_size_trains_at_that_size(make, examples):
    data = X[:examples], Y[:examples]
    arguments = {"batch_size": BASE, "epochs": 2, "shuffle": False}
    ours, theirs = (
        comparing.seeded(lambda: compiled(make())) for _ in range(2)
    )
    trainer = kb.AdaptiveTrainer(
        ours, "fixed", superbatch_size=4 * BASE, verbose=0
    )

    mine = trainer.fit(*data, verbose=0, **arguments)
    their = theirs.fit(*data, verbose=0, **arguments)

    # A loop over time steps rounds otherwise where it knows the batch size.
    np.testing.assert_allclose(
        mine.history["loss"], their.history["loss"], rtol=1e-6
    )


def under_a_strategy(make_model):
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        return make_model()


def of_overwriting_average():
    average = keras.optimizers.SGD(
        0.1, use_ema=True, ema_overwrite_frequency=2
    )
    return regressor(optimizer=average)


def test_no_average_overwrites_weights_under_a_strategy():
    with pytest.raises(ValueError, match="ema_overwrite_frequency=2. Use None"):
        kb.AdaptiveTrainer(under_a_strategy(of_overwriting_average))
    # On one device it may.
    kb.AdaptiveTrainer(of_overwriting_average())


def test_a_step_of_ones_own_is_refused_under_a_strategy():
    model = under_a_strategy(lambda: compiled(OwnStep()))
    with pytest.raises(ValueError, match="OwnStep, with a strategy.*Or train"):
        fit(model, policy="fixed")
    assert int(model.optimizer.iterations) == 0


def test_a_strategy_that_is_not_known_is_refused(monkeypatch):
    model = regressor()
    monkeypatch.setattr(replicas, "strategy_of", lambda model: object())
    with pytest.raises(ValueError, match="Received: object. Use one of Mirr"):
        kb.AdaptiveTrainer(model)


def test_a_stateful_layer_gets_no_parts_of_batches():
    model = regressor()
    model.layers[1].stateful = True

    with pytest.raises(ValueError, match="Received: layer '.*stateful=True"):
        fit(model, policy="measure")


def test_another_backend_is_named(monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")

    with pytest.raises(ValueError, match="KERAS_BACKEND=tensorflow") as caught:
        kb.AdaptiveTrainer(trained())

    assert "Received: keras.config.backend()='jax'" in str(caught.value)


# A loss that is not finite is no mistake of the call.

# Superbatches of 32 examples have four updates of 8, the last one of 6 has
# one; the second superbatch is the first whose loss is not finite.
WITH_NAN = X.copy()
WITH_NAN[40, 0] = math.nan


def fit_on_nan(policy, **options):
    model = regressor(**options)
    trainer = kb.AdaptiveTrainer(
        model,
        policy,
        superbatch_size=32,
        max_batch_size=32,
        measure_every=1,
        verbose=0,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = trainer.fit(
            WITH_NAN, Y, BASE, epochs=3, shuffle=False, verbose=0
        )
    said = [
        str(one.message)
        for one in caught
        if issubclass(one.category, RuntimeWarning)
    ]
    return trainer, history.history, said


@pytest.mark.parametrize(
    "policy", ["goodput", kb.policies.BatchSizeSchedule({0: 8, 1: 16})]
)
def test_a_loss_that_is_not_finite_holds_the_size_and_warns_once(policy):
    trainer, history, said = fit_on_nan(policy)

    assert len(said) == 1
    where = "in step 2 of epoch 1, between updates 5 and 8"
    assert f"loss became nan {where}" in said[0]
    assert "held at 8" in said[0]
    assert history["batch_size"] == [8, 8, 8]
    assert not trainer.noise_scale.resolved
    assert len(history["loss"]) == 3
    assert np.isnan(history["loss"]).all()


def test_the_warning_counts_the_updates_of_its_fit():
    trainer = kb.AdaptiveTrainer(
        regressor(), "fixed", superbatch_size=32, verbose=0
    )
    trainer.fit(X, Y, BASE, shuffle=False, verbose=0)
    with pytest.warns(RuntimeWarning, match="step 2 of .* updates 5 and 8"):
        trainer.fit(WITH_NAN, Y, BASE, shuffle=False, verbose=0)


def test_the_warning_names_an_update_in_progress():
    model = regressor()
    trainer = kb.AdaptiveTrainer(
        *(model, kb.policies.Fixed(4 * 32)),
        superbatch_size=32,
        max_batch_size=4 * 32,
        verbose=0,
    )
    with pytest.warns(RuntimeWarning, match="step 2 of .* updates 1 and 1"):
        trainer.fit(WITH_NAN, Y, BASE, shuffle=False, verbose=0)


def test_an_update_that_loss_scaling_skips_warns_once_too():
    # The optimizer leaves the weights alone, so that each epoch begins with a
    # finite loss and comes upon the same example again.
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01))
    _, history, said = fit_on_nan("goodput", optimizer=optimizer)

    assert len(said) == 1
    assert np.isnan(history["loss"]).all()
