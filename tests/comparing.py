"""What the tests of the laws share: small data, and two trainings compared.

A law says that training through the package equals training in another way.
Both start from `make_model()`, seeded alike; what they leave behind is read
into a `Trained` and compared.
"""

import dataclasses

import keras
import numpy as np

import keras_batchsize as kb

# Base batch size, superbatch size and examples: an epoch is two superbatches
# and a third that ends in a ragged batch, 8 updates of 8 and one of 6.
BASE, SUPERBATCH, EXAMPLES = 8, 32, 70
FEATURES, CLASSES = 5, 3

schedules = keras.optimizers.schedules

SCHEDULES = {
    "CosineDecay": lambda: schedules.CosineDecay(
        0.1, 12, warmup_target=0.2, warmup_steps=4
    ),
    "CosineDecayRestarts": lambda: schedules.CosineDecayRestarts(0.1, 5),
    "ExponentialDecay": lambda: schedules.ExponentialDecay(0.1, 5, 0.5),
    "InverseTimeDecay": lambda: schedules.InverseTimeDecay(
        0.1, 5, 0.5, staircase=True
    ),
    "PiecewiseConstantDecay": lambda: schedules.PiecewiseConstantDecay(
        [4, 11], [0.1, 0.05, 0.01]
    ),
    "PolynomialDecay": lambda: schedules.PolynomialDecay(0.1, 15),
}


def regression(examples=EXAMPLES, seed=0):
    """Returns x of shape (examples, 5) and y of shape (examples, 1)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, FEATURES)).astype("float32")
    y = x @ rng.normal(size=(FEATURES, 1)) + rng.normal(size=(examples, 1))
    return x, y.astype("float32")


def classification(examples=EXAMPLES, seed=0):
    """Returns x of shape (examples, 5) and integer y of 3 classes."""
    x, _ = regression(examples, seed)
    y = (x[:, 0] > 0).astype("int32") + (x[:, 1] > 0.5)
    return x, y


def dense(units=1, hidden=6, activation=None, **options):
    """Returns an uncompiled functional model of one hidden layer."""
    inputs = keras.Input((FEATURES,))
    hidden = keras.layers.Dense(hidden, activation="tanh", **options)(inputs)
    return keras.Model(
        inputs, keras.layers.Dense(units, activation=activation)(hidden)
    )


def compiled(make_model, **options):
    """Returns a function that makes and compiles a model each time."""

    def make():
        model = make_model()
        made = {
            # Optimizers are made anew: a second model cannot share one.
            name: value() if name == "optimizer" else value
            for name, value in options.items()
        }
        model.compile(**{"optimizer": "sgd", "loss": "mse", **made})
        return model

    return make


def two_outputs():
    """Returns an uncompiled model with a number and a class as outputs."""
    inputs = keras.Input((FEATURES,))
    hidden = keras.layers.Dense(6, activation="tanh")(inputs)
    return keras.Model(
        inputs,
        [
            keras.layers.Dense(1, name="size")(hidden),
            keras.layers.Dense(
                CLASSES, activation="softmax", name="kind"
            )(hidden),
        ],
    )


def in_two_outputs(optimizer, **options):
    """Returns a factory of `two_outputs` with weighted losses."""
    return compiled(
        two_outputs,
        optimizer=optimizer,
        loss={"size": "mse", "kind": "sparse_categorical_crossentropy"},
        loss_weights={"size": 0.3, "kind": 2.0},
        metrics={"size": ["mae"], "kind": ["accuracy"]},
        **options,
    )


def for_two_outputs(examples=EXAMPLES):
    """Returns (x, dict of y)."""
    x, size = regression(examples)
    return x, {"size": size, "kind": classification(examples)[1]}


class Offset(keras.layers.Layer):
    """Returns w - x."""

    def __init__(self, regularizer=None, **options):
        super().__init__(**options)
        self.regularizer = regularizer

    def build(self, input_shape):
        self.w = self.add_weight(
            shape=input_shape[1:],
            initializer=keras.initializers.Constant(0.5),
            regularizer=self.regularizer,
        )

    def call(self, x):
        return self.w - x


class HalfSquare(keras.losses.Loss):
    """Half a squared norm per example: its gradient is that of the output."""

    def call(self, y_true, y_pred):
        return 0.5 * keras.ops.sum(y_pred**2, axis=-1)


def stand_still():
    """An optimizer that changes nothing."""
    return keras.optimizers.SGD(0.0)


def of_layer(layer, optimizer=stand_still, **loss_arguments):
    """Returns a factory of models of one layer."""

    def make():
        model = keras.Sequential([keras.Input((FEATURES,)), layer()])
        loss = HalfSquare(**loss_arguments)
        model.compile(optimizer=optimizer(), loss=loss)
        return model

    return make


def offset(*compile_arguments, **loss_arguments):
    """Returns a factory of models of which all is known."""
    return of_layer(Offset, *compile_arguments, **loss_arguments)


@dataclasses.dataclass
class Trained:
    """What a training leaves behind.

    Attributes:
        model: The model.
        history: `History.history`.
        variables: Dict from path to array: weights, optimizer slots, metric
            and seed states.
        result: What `fit` was called on, a model or a trainer.
    """

    model: keras.Model
    history: dict
    variables: dict
    result: object


def of_dtype(make_model, dtype):
    """Returns a factory of the same models under a dtype policy."""

    def make():
        keras.config.set_dtype_policy(dtype)
        try:
            return make_model()
        finally:
            keras.config.set_dtype_policy("float32")

    return make


def variables_of(model):
    """Returns every value that training changes, by position and path."""
    optimizer = getattr(model, "optimizer", None)  # None if not compiled.
    slots = optimizer.variables if optimizer else []
    return {
        f"{index} {variable.path}": np.array(
            keras.ops.convert_to_numpy(variable)
        )
        for index, variable in enumerate([*model.variables, *slots])
    }


def seeded(make_model):
    """Makes a model with the weights and the names that each one gets."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    return make_model()


def plain(make_model, *data, seed=1, **fit_arguments):
    """Trains by plain `fit`."""
    model = seeded(make_model)
    keras.utils.set_random_seed(seed)
    fit_arguments = {"batch_size": BASE, "epochs": 2, **fit_arguments}
    history = model.fit(*data, verbose=0, **fit_arguments)
    return Trained(model, history.history, variables_of(model), model)


def trainer_arguments(arguments):
    """Splits off the arguments that `AdaptiveTrainer` takes."""
    names = (
        "policy",
        "learning_rate_scaling",
        "min_batch_size",
        "max_batch_size",
        "superbatch_size",
        "measure_every",
    )
    given = {name: arguments.pop(name) for name in names if name in arguments}
    defaults = {
        "superbatch_size": SUPERBATCH,
        "max_batch_size": given.get("superbatch_size", SUPERBATCH),
    }
    return {**defaults, **given}


def adaptive(make_model, *data, seed=1, **arguments):
    """Trains through the package, with a superbatch of 32 if not given."""
    model = seeded(make_model)
    trainer = kb.AdaptiveTrainer(
        model, verbose=0, **trainer_arguments(arguments)
    )
    keras.utils.set_random_seed(seed)
    arguments = {"batch_size": BASE, "epochs": 2, **arguments}
    history = trainer.fit(*data, verbose=0, **arguments)
    return Trained(model, history.history, variables_of(model), trainer)


def assert_same(ours, theirs):
    """Bit for bit: all variables, and all that plain `fit` logs."""
    assert list(ours.variables) == list(theirs.variables)
    for path, value in theirs.variables.items():
        np.testing.assert_array_equal(ours.variables[path], value, path)
    for name, value in theirs.history.items():
        assert ours.history[name] == value, name


def assert_close(ours, theirs, rtol, atol=None, skip=()):
    """To a tolerance; `atol` is `rtol` times the largest value if not given.

    Args:
        ours: A `Trained`.
        theirs: The expected one.
        rtol: Relative tolerance.
        atol: Absolute tolerance. A weight or slot near zero is a difference
            of large ones and keeps their rounding, hence the default.
        skip: Parts of paths and names in `History` to leave out.
    """
    assert list(ours.variables) == list(theirs.variables)
    for path, value in theirs.variables.items():
        if not any(part in path for part in skip):
            scale = max(np.abs(value).max(), 1e-3) if value.size else 0.0
            np.testing.assert_allclose(
                ours.variables[path],
                value,
                rtol=rtol,
                atol=rtol * scale if atol is None else atol,
                err_msg=path,
            )
    for name, value in theirs.history.items():
        if name not in skip:
            np.testing.assert_allclose(
                ours.history[name], value, rtol=rtol, atol=rtol, err_msg=name
            )
