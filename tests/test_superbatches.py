"""Every input of `fit`, and law 4: each example exactly once per epoch.

The oracle is plain `fit` of a twin model. With the batch size held, whatever
Keras does with an input must be done here, bit for bit; see `INPUTS` for the
kinds. Law 4 counts the examples that a model has trained on.
"""

import dataclasses
import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable

import comparing
import keras
import numpy as np
import pandas
import pytest
import tensorflow as tf
from comparing import BASE
from comparing import EXAMPLES
from comparing import SUPERBATCH
from comparing import classification
from comparing import dense
from comparing import plain
from comparing import regression
from keras import layers

import keras_batchsize as kb
from keras_batchsize import keras_private
from keras_batchsize._superbatches_batched import batched
from keras_batchsize._superbatches_rows import RowNumbers
from keras_batchsize.superbatches import make_superbatches

pytestmark = pytest.mark.minutes(6)

X, Y = regression()
CLASSES = classification()[1]
WEIGHTS = np.linspace(0.1, 2.0, EXAMPLES).astype("float32")
# Whole batches only, for data that repeat or are shuffled by the batch: there
# plain `fit` trains on the ragged batch in the middle of an epoch.
WHOLE = EXAMPLES // BASE * BASE
# Rows of one to four integers, below.
LENGTHS = np.arange(EXAMPLES) % 4 + 1


# The models.


def compiled(model, loss="mse", **options):
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss, **options)
    return model


def linear(units=1, **options):
    """Most inputs are fed to a model as small as can be: tracing is dear."""
    inputs = keras.Input((comparing.FEATURES,), **options)
    return keras.Model(inputs, layers.Dense(units)(inputs))


def regressor():
    return compiled(linear())


def with_metrics():
    return compiled(
        dense(),
        metrics=["mae"],
        weighted_metrics=[keras.metrics.MeanSquaredError()],
    )


def classifier():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return compiled(linear(comparing.CLASSES), loss)


def of_columns():
    """Looks at shapes: labels and weights are columns, as pandas gives them."""
    inputs = keras.Input((comparing.FEATURES,))
    output = layers.Dense(comparing.CLASSES, activation="softmax")(inputs)
    return compiled(
        keras.Model(inputs, output),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        weighted_metrics=["accuracy"],
    )


def of_pictures():
    """Keras convolves another way where the channels are not known."""
    inputs = keras.Input((comparing.FEATURES, 1))
    hidden = layers.Conv1D(2, 3, activation="tanh")(inputs)
    return compiled(keras.Model(inputs, layers.Dense(1)(hidden)[:, 0]))


def of_sparse():
    return compiled(linear(sparse=True))


def two_inputs():
    one = keras.Input((comparing.FEATURES,), name="one")
    two = keras.Input((1,), name="two")
    both = layers.Concatenate()([one, two])
    return {"one": one, "two": two}, layers.Dense(1)(both)


def of_dict():
    return compiled(keras.Model(*two_inputs()))


def of_inputs_in_another_order():
    """By order instead of by name each input would be taken for the other."""
    table = keras.Input((4, 3), name="z")
    row = keras.Input((3,), name="a")
    both = layers.Concatenate()([layers.Flatten()(table), row])
    return compiled(keras.Model([table, row], layers.Dense(1)(both)))


def of_one_number():
    inputs = keras.Input((1,))
    return compiled(keras.Model(inputs, layers.Dense(1)(inputs)))


def of_nest():
    inputs, output = two_inputs()
    nest = {"pair": (inputs["one"], [inputs["two"]])}
    return compiled(keras.Model(nest, output))


def two_outputs():
    inputs = keras.Input((comparing.FEATURES,))
    outputs = {
        "size": layers.Dense(1, name="size")(inputs),
        "kind": layers.Dense(comparing.CLASSES, name="kind")(inputs),
    }
    return compiled(
        keras.Model(inputs, outputs),
        {
            "size": "mse",
            "kind": keras.losses.SparseCategoricalCrossentropy(True),
        },
        loss_weights={"size": 1.0, "kind": 0.5},
        metrics={"size": ["mae"], "kind": ["accuracy"]},
        weighted_metrics={"size": ["mse"], "kind": []},
    )


class AddsLoss(keras.Model):
    """Needs no targets: its loss is made inside of `call`."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(comparing.FEATURES)

    def call(self, x):
        y = self.dense(x)
        self.add_loss(keras.ops.mean(keras.ops.square(y - x)))
        return y


class Autoencoder(keras.Model):
    """Needs no targets: its inputs are what it is compared with."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(comparing.FEATURES)

    def call(self, x):
        return self.dense(x)

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        return keras.ops.mean(keras.ops.square(y_pred - x))


def adds_loss():
    return compiled(AddsLoss(), loss=None)


def autoencoder():
    return compiled(Autoencoder(), loss=None)


class OfRagged(keras.Model):
    """Averages the embeddings of rows of different length."""

    def __init__(self):
        super().__init__()
        self.table = self.add_weight(shape=(20, 1), initializer="normal")

    def call(self, rows):
        table = tf.convert_to_tensor(self.table)
        looked_up = tf.ragged.map_flat_values(tf.gather, table, rows)
        return tf.reduce_mean(looked_up, axis=1)


def of_ragged():
    return compiled(OfRagged())


# The data.


def ragged():
    values = np.arange(LENGTHS.sum()) % 20
    return tf.RaggedTensor.from_row_lengths(values, LENGTHS)


def sparse():
    return tf.sparse.from_dense(X * (X > 0))


def sliced(*data):
    return tf.data.Dataset.from_tensor_slices(data)


def batches(data=(X, Y), count=None):
    """Yields the whole batches of arrays, over and over or `count` of them."""
    for index in range(10**9 if count is None else count):
        start = index * BASE % WHOLE
        yield tuple(
            array if array is None else array[start : start + BASE]
            for array in data
        )


class Batches(keras.utils.PyDataset):
    """Counts what Keras asks of it."""

    def __init__(self, *data, examples=EXAMPLES, endless=False, **options):
        super().__init__(**options)
        self.data = data
        self.count = math.ceil(examples / BASE)
        self.endless = endless
        self.epochs_begun = self.epochs_ended = 0

    @property
    def num_batches(self):
        return None if self.endless else self.count

    def __getitem__(self, index):
        start = index % self.count * BASE
        batch = slice(start, start + BASE)
        return tuple(
            keras.tree.map_structure(lambda array: array[batch], array)
            for array in self.data
        )

    def on_epoch_begin(self):
        self.epochs_begun += 1

    def on_epoch_end(self):
        self.epochs_ended += 1


class Slow(Batches):
    """Takes longer to read than to train on."""

    def __getitem__(self, index):
        time.sleep(0.03)
        return super().__getitem__(index)


@dataclasses.dataclass(frozen=True)
class Input:
    """A way to hand data to `fit`.

    Attributes:
        name: What it is.
        make_model: Returns a compiled model.
        arguments: Returns the arguments of `fit`, made anew.
        plain: Returns those of plain `fit`, where it needs others.
        like: Name of another input that plain `fit` trains alike: the same
            examples in the same batches. It is trained once for all.
        warns: Part of the warning that Keras gives in both.
    """

    name: str
    make_model: Callable
    arguments: Callable
    plain: Callable | None = None
    like: str | None = None
    warns: str | None = None


def arrays(x=X, y=Y, **arguments):
    return {"x": x, "y": y, "batch_size": BASE, **arguments}


def stream(x, **arguments):
    return {"x": x, "shuffle": False, **arguments}


TABLES = {
    "a": X[:, :3],
    "z": np.repeat(X[:, None, 2:], 4, axis=1),
}
DICT = {"one": X, "two": X[:, :1]}
TWO_TARGETS = {"size": Y, "kind": CLASSES}
OUT_OF_DATA = "Your input ran out of data"

INPUTS = [
    # Arrays, each shuffled as it is by default.
    Input("numpy", with_metrics, arrays),
    Input("numpy-in-order", regressor, lambda: arrays(shuffle=False)),
    Input("numpy-by-the-batch", regressor, lambda: arrays(shuffle="batch")),
    Input("numpy-default-size", regressor, lambda: {"x": X, "y": Y}),
    Input("float64", regressor, lambda: arrays(X.astype("float64"))),
    Input(
        "tensors",
        regressor,
        lambda: arrays(tf.constant(X), tf.constant(Y)),
        like="float64",
    ),
    Input(
        "pandas",
        regressor,
        lambda: arrays(pandas.DataFrame(X), pandas.Series(Y[:, 0])),
        like="float64",
    ),
    Input("dict", of_dict, lambda: arrays(DICT)),
    Input("nested", of_nest, lambda: arrays({"pair": (X, [X[:, :1]])})),
    Input("two-outputs", two_outputs, lambda: arrays(y=TWO_TARGETS)),
    Input(
        "two-outputs-weighted",
        two_outputs,
        lambda: arrays(
            y=TWO_TARGETS,
            sample_weight={"size": WEIGHTS, "kind": WEIGHTS[::-1].copy()},
        ),
    ),
    Input("no-targets-add-loss", adds_loss, lambda: arrays(y=None)),
    Input("no-targets-autoencoder", autoencoder, lambda: arrays(y=None)),
    Input("ragged", of_ragged, lambda: arrays(ragged())),
    Input("sparse", of_sparse, lambda: arrays(sparse())),
    Input("weighted", with_metrics, lambda: arrays(sample_weight=WEIGHTS)),
    Input(
        "class-weight",
        classifier,
        lambda: arrays(y=CLASSES, class_weight={0: 1.0, 1: 3.0, 2: 0.5}),
    ),
    Input(
        "validation-split", with_metrics, lambda: arrays(validation_split=0.2)
    ),
    Input(
        "validation-data",
        regressor,
        lambda: arrays(
            validation_data=(X[:30], Y[:30], WEIGHTS[:30]),
            validation_batch_size=4,
            validation_steps=5,
            validation_freq=[2, 4],
            epochs=4,
        ),
    ),
    Input(
        "initial-epoch",
        regressor,
        lambda: arrays(initial_epoch=1, epochs=3),
    ),
    Input("steps-of-arrays", regressor, lambda: arrays(steps_per_epoch=4)),
    Input(
        "steps-of-arrays-give-size",
        regressor,
        lambda: {"x": X, "y": Y, "steps_per_epoch": 9},
    ),
    Input(
        "steps-beyond-arrays",
        regressor,
        lambda: arrays(steps_per_epoch=7),
        warns=OUT_OF_DATA,
    ),
    # tf.data.
    Input(
        "dataset",
        regressor,
        lambda: stream(sliced(X, Y).batch(BASE)),
        like="numpy-in-order",
    ),
    Input(
        "dataset-unbatched",
        regressor,
        lambda: stream(sliced(X, Y), batch_size=BASE),
        like="numpy-in-order",
    ),
    Input(
        "dataset-unbatched-inputs-only",
        autoencoder,
        lambda: stream(tf.data.Dataset.from_tensor_slices(X), batch_size=BASE),
        lambda: stream(tf.data.Dataset.from_tensor_slices(X).batch(BASE)),
    ),
    Input(
        "dataset-without-the-last-axis",
        of_one_number,
        lambda: stream(sliced(X[:, 0], Y).batch(BASE)),
    ),
    Input(
        "dataset-of-numbers-unbatched",
        of_one_number,
        lambda: stream(sliced(X[:, :1], Y), batch_size=BASE),
        like="dataset-without-the-last-axis",
    ),
    Input(
        "dataset-of-inputs-only",
        autoencoder,
        lambda: stream(tf.data.Dataset.from_tensor_slices(X).batch(BASE)),
        like="dataset-unbatched-inputs-only",
    ),
    Input(
        "dataset-drop-remainder",
        regressor,
        lambda: stream(sliced(X, Y).batch(BASE, drop_remainder=True)),
    ),
    Input(
        "dataset-endless",
        regressor,
        lambda: stream(sliced(X, Y).repeat().batch(BASE), steps_per_epoch=10),
    ),
    Input(
        "dataset-endless-unbatched",
        regressor,
        lambda: stream(
            sliced(X, Y).repeat(), steps_per_epoch=10, batch_size=BASE
        ),
        like="dataset-endless",
    ),
    Input(
        "dataset-steps",
        regressor,
        lambda: stream(sliced(X, Y).batch(BASE), steps_per_epoch=4),
    ),
    Input(
        "dataset-shuffled",
        regressor,
        lambda: stream(sliced(X, Y).shuffle(EXAMPLES, seed=3).batch(BASE)),
    ),
    Input(
        "dataset-of-dicts",
        of_dict,
        lambda: stream(sliced(DICT, Y).batch(BASE)),
    ),
    Input(
        "dataset-of-dicts-in-another-order",
        of_inputs_in_another_order,
        lambda: stream(sliced(TABLES, Y).batch(BASE)),
    ),
    Input(
        "dataset-of-dicts-in-another-order-unbatched",
        of_inputs_in_another_order,
        lambda: stream(sliced(TABLES, Y), batch_size=BASE),
        like="dataset-of-dicts-in-another-order",
    ),
    Input(
        "dataset-weighted",
        regressor,
        lambda: stream(sliced(X, Y, WEIGHTS).batch(BASE)),
    ),
    Input(
        "dataset-of-columns",
        of_columns,
        lambda: stream(
            sliced(X, CLASSES[:, None], WEIGHTS[:, None]).batch(BASE)
        ),
    ),
    Input(
        "dataset-of-pictures",
        of_pictures,
        lambda: stream(sliced(X[:, :, None], Y).batch(BASE)),
    ),
    Input(
        "dataset-class-weight",
        classifier,
        lambda: stream(
            sliced(X, CLASSES).batch(BASE),
            class_weight={0: 1.0, 1: 3.0, 2: 1.0},
        ),
    ),
    Input(
        "dataset-ragged",
        of_ragged,
        lambda: stream(sliced(ragged(), Y).batch(BASE)),
    ),
    Input(
        "dataset-ragged-unbatched",
        of_ragged,
        lambda: stream(sliced(ragged(), Y), batch_size=BASE),
        like="dataset-ragged",
    ),
    Input(
        "dataset-sparse",
        of_sparse,
        lambda: stream(sliced(sparse(), Y).batch(BASE)),
    ),
    Input(
        "dataset-validated-on-dataset",
        regressor,
        lambda: stream(
            sliced(X, Y).batch(BASE),
            validation_data=sliced(X, Y).batch(5),
            validation_steps=3,
        ),
    ),
    # PyDataset.
    Input(
        "py-dataset",
        regressor,
        lambda: stream(Batches(X, Y)),
        like="numpy-in-order",
    ),
    Input(
        "py-dataset-weighted-dicts",
        of_dict,
        lambda: stream(Batches(DICT, Y, WEIGHTS)),
    ),
    Input(
        "py-dataset-two-workers",
        regressor,
        lambda: stream(Batches(X, Y, workers=2)),
        like="numpy-in-order",
    ),
    # Keras stops the workers at the end of an epoch. What reads on then fails.
    Input(
        "py-dataset-four-workers-endless",
        regressor,
        lambda: stream(
            Slow(X, Y, examples=WHOLE, endless=True, workers=4),
            steps_per_epoch=40,
            epochs=3,
        ),
    ),
    # Superbatches of 32, 32 and 6 examples, then of 32, 16 and 22.
    Input(
        "py-dataset-steps",
        regressor,
        lambda: stream(Batches(X, Y), steps_per_epoch=9, epochs=3),
    ),
    Input(
        "py-dataset-steps-that-end-within-an-epoch",
        regressor,
        lambda: stream(Batches(X, Y), steps_per_epoch=6, epochs=4),
        warns=OUT_OF_DATA,
    ),
    Input(
        "py-dataset-class-weight",
        classifier,
        lambda: stream(Batches(X, CLASSES), class_weight={0: 1.0, 1: 3.0}),
        like="dataset-class-weight",
    ),
    Input(
        "py-dataset-endless",
        regressor,
        lambda: stream(
            Batches(X, Y, examples=WHOLE, endless=True), steps_per_epoch=5
        ),
    ),
    # Generators.
    Input(
        "generator",
        regressor,
        lambda: stream(batches(), steps_per_epoch=6),
    ),
    Input(
        "generator-of-none-weights",
        regressor,
        lambda: stream(batches((X, Y, None)), steps_per_epoch=6),
        like="generator",
    ),
    Input(
        "generator-that-ends",
        regressor,
        lambda: stream(batches(count=12), steps_per_epoch=6),
        like="generator",
    ),
]


def held(make_model, **arguments):
    """Trains through the package with the batch size held."""
    return comparing.adaptive(
        make_model,
        policy="fixed",
        **{"superbatch_size": SUPERBATCH, "batch_size": None, **arguments},
    )


@functools.cache
def trained_plainly(name):
    """Returns the twin of an input."""
    [one] = [one for one in INPUTS if one.name == name]
    keras.utils.set_random_seed(0)  # By which datasets shuffle.
    arguments = {"batch_size": None, **(one.plain or one.arguments)()}
    return plain(one.make_model, **arguments)


@pytest.mark.parametrize("one", INPUTS, ids=lambda one: one.name)
def test_training_equals_plain_fit(one):
    keras.utils.set_random_seed(0)
    arguments = {"superbatch_size": None, **one.arguments()}
    if arguments.get("batch_size") == BASE or "shuffle" in arguments:
        arguments["superbatch_size"] = SUPERBATCH

    with warnings.catch_warnings():
        if one.warns:
            warnings.filterwarnings("ignore", one.warns)
        ours = held(one.make_model, **arguments)
        theirs = trained_plainly(one.like or one.name)

    comparing.assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("make_model", "data"),
    [
        (of_columns, (X, CLASSES[:, None], WEIGHTS[:, None])),
        (of_pictures, (X[:, :, None], Y)),
    ],
    ids=["columns", "pictures"],
)
def test_what_callbacks_cut_is_known_by_its_shape(make_model, data):
    x, y, *weights = data
    options = {"sample_weight": weights[0]} if weights else {}

    ours = plain(
        make_model,
        *(x, y),
        batch_size=SUPERBATCH,
        shuffle=False,
        callbacks=[kb.DynamicBatchSize("fixed", BASE, verbose=0)],
        **options,
    )
    theirs = plain(make_model, x, y, shuffle=False, **options)

    comparing.assert_same(ours, theirs)


class Counted(layers.Layer):
    """Counts how often it is traced, and with what dimensions unknown."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def call(self, x):
        self.shapes.append(tuple(x.shape))
        return x


def test_a_dataset_is_traced_as_often_as_arrays():
    def traced(**data):
        counted = Counted()
        inputs = keras.Input((comparing.FEATURES, 1))
        hidden = layers.Flatten()(counted(inputs))
        model = compiled(keras.Model(inputs, layers.Dense(1)(hidden)))
        counted.shapes.clear()
        trainer = kb.AdaptiveTrainer(
            model, "measure", superbatch_size=SUPERBATCH, verbose=0
        )
        trainer.fit(epochs=3, verbose=0, **data)
        return counted.shapes

    x = X[:, :, None]
    dataset = sliced(x, Y).batch(BASE)
    shapes = traced(x=dataset)
    assert all(None not in shape[1:] for shape in shapes)
    assert len(shapes) <= len(traced(x=x, y=Y, batch_size=BASE))


# Batches that are padded to lengths of their own.


def of_sentences():
    words = keras.Input((None,), dtype="int32")
    vectors = layers.Embedding(20, 3, mask_zero=True)(words)
    mean = layers.GlobalAveragePooling1D()(vectors)
    return compiled(keras.Model(words, layers.Dense(1)(mean)))


# Batches of three, four and five words in turn, and of shorter ones among them.
SENTENCES = [
    np.arange(1, 3 + i // BASE % 3 + i % 2, dtype="int32")
    for i in range(EXAMPLES)
]


def padded(start, stop):
    """Returns a batch of sentences, as long as the longest."""
    longest = max(len(one) for one in SENTENCES[start:stop])
    rows = [
        np.pad(one, (0, longest - len(one))) for one in SENTENCES[start:stop]
    ]
    return np.array(rows), Y[start:stop]


class PaddedBatches(Batches):
    """Pads each batch to its longest sentence."""

    def __getitem__(self, index):
        return padded(index * BASE, min(index * BASE + BASE, EXAMPLES))


def padded_dataset(size):
    words = tf.data.Dataset.from_generator(
        lambda: iter(SENTENCES), output_signature=tf.TensorSpec([None], "int32")
    )
    known = tf.data.experimental.assert_cardinality(EXAMPLES)
    data = tf.data.Dataset.zip((words, tf.data.Dataset.from_tensor_slices(Y)))
    return data.apply(known).padded_batch(size)


PADDED = {
    "dataset": lambda: stream(padded_dataset(BASE)),
    "dataset-steps": lambda: stream(
        padded_dataset(BASE).repeat(), steps_per_epoch=5
    ),
    "py-dataset": lambda: stream(PaddedBatches(X, Y)),
    "py-dataset-two-workers": lambda: stream(PaddedBatches(X, Y, workers=2)),
    "generator": lambda: stream(
        (padded(8 * i % 64, 8 * i % 64 + 8) for i in range(100)),
        steps_per_epoch=6,
    ),
}


@pytest.mark.parametrize("kind", PADDED)
def test_padded_batches_are_trained_on_as_they_are(kind):
    ours = held(of_sentences, **{**PADDED[kind](), "superbatch_size": None})
    theirs = plain(of_sentences, **{"batch_size": None, **PADDED[kind]()})
    comparing.assert_same(ours, theirs)


def test_padded_batches_are_summed_up_to_larger_ones():
    ours = comparing.adaptive(
        of_sentences,
        policy=kb.policies.Fixed(32),
        superbatch_size=None,
        max_batch_size=32,
        learning_rate_scaling="none",
        batch_size=None,
        **stream(padded_dataset(BASE)),
    )
    # Padding is masked: the same, whatever a batch is padded to.
    theirs = plain(of_sentences, batch_size=None, **stream(padded_dataset(32)))
    comparing.assert_close(ours, theirs, rtol=1e-5)


def test_padded_batches_cannot_be_joined():
    trainer = kb.AdaptiveTrainer(of_sentences(), verbose=0)
    with pytest.raises(ValueError, match="(?s)cannot be joined.*batch_size=8 "):
        trainer.fit(padded_dataset(BASE), batch_size=32)
    trainer = kb.AdaptiveTrainer(of_sentences(), superbatch_size=64, verbose=0)
    with pytest.raises(ValueError, match="(?s)Received.*superbatch_size=64"):
        trainer.fit(padded_dataset(BASE))


# Kinds that are cut in a way of their own.
CUT_APART = (
    "class-weight",
    "dict",
    "no-targets-add-loss",
    "ragged",
    "sparse",
    "two-outputs-weighted",
)


@pytest.mark.parametrize(
    "one",
    [one for one in INPUTS if one.name in CUT_APART],
    ids=lambda one: one.name,
)
def test_every_kind_of_input_is_put_together_from_micro_batches(one):
    # An update of 64 examples is summed up over four superbatches of 16.
    arguments = {**one.arguments(), "shuffle": False}

    ours = comparing.adaptive(
        one.make_model,
        policy=kb.policies.Fixed(64),
        superbatch_size=16,
        max_batch_size=64,
        learning_rate_scaling="none",
        **arguments,
    )
    theirs = plain(one.make_model, **{**arguments, "batch_size": 64})

    # float32: the order of a sum of at most 70 terms.
    comparing.assert_close(ours, theirs, rtol=1e-5)


def test_training_equals_plain_fit_on_a_data_loader():
    data = pytest.importorskip("torch.utils.data")
    tensors = [data_tensor(array) for array in (X, Y)]
    dataset = data.TensorDataset(*tensors)

    def loader(**options):
        return stream(data.DataLoader(dataset, **options), superbatch_size=32)

    for options in (
        {"batch_size": BASE},
        {"batch_size": BASE, "drop_last": True},
        # No batch size of its own: the sampler makes the batches.
        {
            "batch_sampler": data.BatchSampler(
                data.SequentialSampler(dataset), BASE, drop_last=False
            )
        },
    ):
        expected = {**loader(**options), "batch_size": None}
        expected.pop("superbatch_size")
        comparing.assert_same(
            held(regressor, **loader(**options)), plain(regressor, **expected)
        )


def data_tensor(array):
    return pytest.importorskip("torch").from_numpy(array)


# Where plain `fit` and this package differ, and should.


def test_no_update_is_counted_that_was_not_made():
    # Without a known cardinality Keras counts one update too many in each
    # epoch: the train function that finds no data has raised the counter.
    def unknown():
        dataset = sliced(X, Y).batch(BASE).filter(lambda x, y: True)
        return stream(dataset, epochs=3)

    with pytest.warns(UserWarning, match=OUT_OF_DATA):
        ours = held(regressor, **unknown())
    with pytest.warns(UserWarning, match=OUT_OF_DATA):
        theirs = plain(regressor, batch_size=None, **unknown())

    updates = 3 * math.ceil(EXAMPLES / BASE)
    assert ours.model.optimizer.iterations == updates
    for one, two in zip(ours.model.get_weights(), theirs.model.get_weights()):
        np.testing.assert_array_equal(one, two)
    for name, values in theirs.history.items():
        assert ours.history[name] == values


def test_a_generator_without_steps_is_trained_on_to_its_end():
    with pytest.warns(UserWarning, match=OUT_OF_DATA):
        ours = held(regressor, **stream(batches(count=9), epochs=1))

    assert ours.model.optimizer.iterations == 9


def test_ragged_batches_in_the_middle_are_cut_anew():
    # 8 whole batches and one of 6, over and over: superbatches are cut from
    # the examples, so each update has as many as were asked for.
    dataset = sliced(X, Y).batch(BASE).repeat()

    ours = held(regressor, **stream(dataset, steps_per_epoch=10, epochs=2))

    comparing.assert_same(ours, trained_plainly("dataset-endless"))


@pytest.mark.parametrize("shuffles", [False, True])
def test_batches_that_are_repeated_promise_no_more_than_there_are(shuffles):
    # 9 batches of 70 examples, of 27 times: 1,890 examples, not 1,944.
    dataset = sliced(X, Y).batch(BASE).repeat(27)
    if shuffles:
        dataset = dataset.shuffle(20, seed=1)

    # Keras is told no number, and says what it says of data of unknown length.
    assert make_superbatches(regressor(), dataset).num_batches is None
    with pytest.warns(UserWarning, match=OUT_OF_DATA):
        ours = held(regressor, **stream(dataset, epochs=3))

    assert ours.model.optimizer.iterations == 3 * math.ceil(27 * 70 / BASE)


def test_a_dataset_can_be_cut_into_another_base_size():
    dataset = sliced(X, Y).batch(5)

    ours = held(regressor, **stream(dataset, batch_size=BASE))

    comparing.assert_same(ours, trained_plainly("numpy-in-order"))


@pytest.mark.parametrize("mapped", [False, True])
def test_whole_batches_are_known_without_a_model_to_tell(mapped):
    # A subclassed model has no inputs yet, and (5, 5) may be five examples or
    # one; batches were made, so it is five.
    dataset = tf.data.Dataset.from_tensor_slices(X).batch(5, True)
    if mapped:
        dataset = dataset.map(lambda x: x)

    ours = held(autoencoder, **stream(dataset, batch_size=BASE))
    theirs = trained_plainly("dataset-unbatched-inputs-only")

    comparing.assert_same(ours, theirs)


def test_a_shuffled_py_dataset_hands_over_every_batch():
    # Keras shuffles by Python's `random`, which both seed alike.
    def data():
        return {"x": Batches(X[:WHOLE], Y[:WHOLE], examples=WHOLE)}

    ours = held(regressor, **data())
    theirs = plain(regressor, batch_size=None, **data())

    comparing.assert_same(ours, theirs)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_py_dataset_is_told_of_epochs_as_often_as_by_plain_fit(workers):
    ours, theirs = (Batches(X, Y, workers=workers) for _ in range(2))

    held(regressor, **stream(ours), epochs=3)
    plain(regressor, batch_size=None, **stream(theirs), epochs=3)

    assert ours.epochs_begun == theirs.epochs_begun
    assert ours.epochs_ended == theirs.epochs_ended


# Law 4.


class Seen(keras.metrics.Metric):
    """Counts how often each example, named by its target, was trained on."""

    def __init__(self, examples):
        super().__init__(name="seen")
        self.counts = self.add_weight(
            shape=(examples,), initializer="zeros", dtype="int32"
        )

    def update_state(self, y, y_pred, sample_weight=None):
        ids = tf.cast(tf.reshape(y, [-1]), tf.int32)
        size = self.counts.shape[0]
        self.counts.assign_add(tf.math.bincount(ids, minlength=size))

    def result(self):
        return keras.ops.sum(self.counts)

    def reset_state(self):
        """Keeps the counts: `EpochCounts` empties them."""


class EpochCounts(keras.callbacks.Callback):
    """Reads at each epoch's end what was seen and how many updates made."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen
        self.counts, self.updates, self.steps = [], [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.steps.append(0)
        self.begin = int(self.model.optimizer.iterations)

    def on_train_batch_end(self, batch, logs=None):
        self.steps[-1] += 1

    def on_epoch_end(self, epoch, logs=None):
        self.counts.append(keras.ops.convert_to_numpy(self.seen.counts))
        self.seen.counts.assign(0 * self.seen.counts)
        self.updates.append(int(self.model.optimizer.iterations) - self.begin)


# Up and down, below and above the superbatch of 16 examples, and by more than
# one step of the ladder at once.
SIZES = [8, 32, 16, 64, 8, 128]
IDS = np.arange(EXAMPLES, dtype="float32")[:, None]


def train_on_schedule(
    x, y=None, policy=None, steps_per_execution=1, **arguments
):
    seen = Seen(EXAMPLES)
    model = linear()
    model.compile(
        *(keras.optimizers.SGD(1e-6), "mse"),
        metrics=[seen],
        steps_per_execution=steps_per_execution,
    )
    counts = EpochCounts(seen)
    trainer = kb.AdaptiveTrainer(
        model,
        policy=policy or kb.policies.BatchSizeSchedule(lambda e: SIZES[e]),
        learning_rate_scaling="none",
        superbatch_size=16,
        max_batch_size=128,
        verbose=0,
    )
    history = trainer.fit(
        x,
        y,
        epochs=len(SIZES),
        verbose=0,
        callbacks=[counts],
        **arguments,
    )
    return counts, history.history["batch_size"]


@pytest.mark.parametrize(
    ("data", "warns"),
    [
        (lambda: {"x": X, "y": IDS, "batch_size": BASE}, False),
        (lambda: {"x": sliced(X, IDS).batch(BASE)}, False),
        (lambda: {"x": sliced(X, IDS).shuffle(70).batch(BASE)}, False),
        (lambda: {"x": Batches(X, IDS, workers=2)}, False),
        (
            lambda: {
                "x": sliced(X, IDS).batch(BASE).filter(lambda x, y: True)
            },
            True,
        ),
    ],
    ids=["arrays", "dataset", "shuffled", "py-dataset", "unknown-length"],
)
def test_each_example_exactly_once_per_epoch(data, warns):
    with warnings.catch_warnings():
        if warns:
            warnings.filterwarnings("ignore", OUT_OF_DATA)
        counts, batch_sizes = train_on_schedule(**data())

    assert batch_sizes == SIZES
    for seen in counts.counts:
        np.testing.assert_array_equal(seen, 1)
    assert counts.updates == [math.ceil(EXAMPLES / size) for size in SIZES]


class Uneven(keras.utils.PyDataset):
    """Batches of the sizes given."""

    def __init__(self, *sizes):
        super().__init__()
        self.ends = np.cumsum([0, *sizes])

    @property
    def num_batches(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        rows = slice(*self.ends[index : index + 2])
        return X[rows], IDS[rows]


# The first batch, from which sizes are guessed, is the smallest, the largest
# or like the second.
UNEVEN = [(6, 32, 32), (32, 32, 6), (64, 2, 2, 2), (8, 8, 40, 14), (69, 1)]


@pytest.mark.filterwarnings(
    f"ignore:{OUT_OF_DATA}", "ignore:`steps_per_execution`:UserWarning"
)
@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("sizes", UNEVEN, ids=str)
def test_no_example_is_left_out_where_batch_sizes_are_guessed(sizes, at_once):
    counts, batch_sizes = train_on_schedule(
        Uneven(*sizes),
        batch_size=BASE,
        shuffle=False,
        steps_per_execution=at_once,
    )

    assert batch_sizes == SIZES
    for seen in counts.counts:
        np.testing.assert_array_equal(seen, 1)


@pytest.mark.filterwarnings(f"ignore:{OUT_OF_DATA}")
def test_no_example_is_left_out_where_short_batches_come_first():
    # The short batch of six is the first that is read, one time in three.
    data = sliced(X, IDS).batch(32).map(lambda x, y: (x, y))
    short_first = data.skip(2).concatenate(data.take(2)).map(lambda *one: one)
    assert keras_private.batch_size_of(short_first) is None

    counts, _ = train_on_schedule(short_first, batch_size=BASE)

    for seen in counts.counts:
        np.testing.assert_array_equal(seen, 1)


def seen_of(x, epochs, **arguments):
    """Returns how often each example is seen in each epoch."""
    seen = Seen(EXAMPLES)
    model = linear()
    model.compile(keras.optimizers.SGD(1e-6), "mse", metrics=[seen])
    counts = EpochCounts(seen)
    trainer = kb.AdaptiveTrainer(model, "fixed", superbatch_size=16, verbose=0)
    trainer.fit(
        *(x, None, BASE, epochs), verbose=0, callbacks=[counts], **arguments
    )
    return counts.counts


def test_no_example_is_left_out_where_epochs_are_longer_than_a_guess():
    # By the first batch there are 14 examples, and 24 in an epoch. Three
    # epochs are a pass, then the data start over: warnings are errors.
    data = Uneven(2, *[12] * 5, 8)
    counts = seen_of(data, 6, steps_per_epoch=3, shuffle=False)

    np.testing.assert_array_equal(sum(counts[:3]), 1)
    np.testing.assert_array_equal(counts[3:], counts[:3])
    assert [int(one.sum()) for one in counts[:3]] == [24, 24, 22]


@pytest.fixture()
def limit():
    """Sets Keras's limit to the steps of an epoch, for one test."""
    yield keras.config.set_max_steps_per_epoch
    keras.config.set_max_steps_per_epoch(None)


@pytest.mark.filterwarnings(f"ignore:{OUT_OF_DATA}", "ignore:Limiting steps")
@pytest.mark.parametrize(
    ("most", "examples"), [(2, [32, 32, 6, 32]), (5, [70] * 4), (9, [70] * 4)]
)
def test_a_limit_to_the_steps_holds_where_batch_sizes_are_guessed(
    most, examples, limit
):
    limit(most)
    data = sliced(X, IDS).batch(BASE).map(lambda *one: one)
    assert keras_private.batch_size_of(data) is None

    counts = seen_of(data, len(examples))

    assert [int(one.sum()) for one in counts] == examples
    assert max(map(np.max, counts)) == 1


class Walk(kb.policies.BatchSizePolicy):
    """Goes up and down the ladder at every occasion."""

    needs_noise = False
    gradual = False

    def __init__(self):
        self.sizes = itertools.cycle([2, 64, 8, 16, 256, 32, 4, 128])

    def wish(self, status):
        return next(self.sizes)


@pytest.mark.parametrize(
    "data",
    [
        lambda x, ids: {"x": x, "y": ids, "batch_size": BASE},
        lambda x, ids: {"x": sliced(x, ids).shuffle(500).batch(BASE)},
    ],
    ids=["arrays", "dataset"],
)
def test_each_example_exactly_once_while_the_size_changes_in_an_epoch(data):
    examples = 1010
    x = np.resize(X, (examples, X.shape[1]))
    ids = np.arange(examples, dtype="float32")[:, None]
    seen = Seen(examples)
    model = linear()
    model.compile(keras.optimizers.SGD(1e-6), "mse", metrics=[seen])
    counts = EpochCounts(seen)
    trainer = kb.AdaptiveTrainer(
        model,
        Walk(),
        learning_rate_scaling="none",
        superbatch_size=64,
        min_batch_size=2,
        max_batch_size=256,
        verbose=0,
    )

    trainer.fit(**data(x, ids), epochs=2, verbose=0, callbacks=[counts])

    for one in counts.counts:
        np.testing.assert_array_equal(one, 1)
    for epoch in range(2):
        changes = [
            one.new_batch_size > one.old_batch_size
            for one in trainer.report.changes
            if one.epoch == epoch
        ]
        # Most superbatches of an epoch have another size than the one before.
        assert len(changes) >= 5 and len(set(changes)) == 2
    used = {row.batch_size for row in trainer.report.rows}
    assert used >= {2, 4, 16, 64, 256}


def test_each_example_exactly_once_per_epoch_while_noise_is_measured():
    counts, _ = train_on_schedule(X, IDS, batch_size=BASE, policy="goodput")

    for seen in counts.counts:
        np.testing.assert_array_equal(seen, 1)


def test_steps_per_epoch_go_on_where_the_last_epoch_ended():
    # 5 batches of 8 a time, over 70 examples that repeat: 240 in 6 epochs.
    dataset = sliced(X, IDS).repeat().batch(BASE)

    counts, _ = train_on_schedule(dataset, steps_per_epoch=5)

    total = np.sum(counts.counts, axis=0)
    expected = np.bincount(np.arange(6 * 5 * BASE) % EXAMPLES)
    np.testing.assert_array_equal(total, expected)
    assert counts.updates == [math.ceil(5 * BASE / size) for size in SIZES]


@pytest.mark.parametrize("steps", [1, 4, 5, 9, 20])
@pytest.mark.parametrize("repeats", [False, True])
def test_an_epoch_of_steps_has_so_many_base_batches(steps, repeats):
    data = (sliced(X, Y).repeat().batch(BASE),) if repeats else (X, Y)
    made = make_superbatches(
        *(regressor(), *data),
        batch_size=BASE,
        superbatch_size=SUPERBATCH,
        steps_per_epoch=steps,
    )
    assert made.examples_per_epoch == steps * BASE


def test_keras_counts_the_same_steps_in_every_epoch():
    counts, _ = train_on_schedule(X, IDS, batch_size=BASE)

    superbatches = math.ceil(EXAMPLES / 16)
    assert counts.steps == [superbatches] * len(SIZES)
    assert counts.params["steps"] == superbatches


# What Keras is told.


@pytest.mark.parametrize("batch_size", [8, 24, 32, 500])
@pytest.mark.parametrize("steps", [None, 400])
def test_the_superbatch_leaves_room_to_change_within_an_epoch(
    batch_size, steps
):
    x = np.zeros((20_000, 1), "float32")

    made = make_superbatches(
        regressor(), x, x, batch_size=batch_size, steps_per_epoch=steps
    )

    batches_in_one = made.superbatch_size / batch_size
    assert made.base_batch_size == batch_size
    assert batches_in_one >= 1
    assert math.log2(batches_in_one).is_integer()
    epoch = len(x) if steps is None else steps * batch_size
    assert made.examples_per_epoch == epoch
    assert epoch / made.superbatch_size >= 8


def test_arrays_are_handed_over_as_row_numbers():
    x = {"a": np.arange(40.0), "b": np.arange(80.0).reshape(40, 2)}
    y = np.arange(40)

    made = make_superbatches(
        regressor(), x, y, batch_size=8, shuffle=False, class_weight={3: 0.5}
    )

    rows = next(iter(made.get_tf_dataset()))
    assert rows.dtype.is_integer and rows.shape == (32,)
    batch, targets, weights = made.examples(rows, 1, 4)
    np.testing.assert_array_equal(batch["b"], x["b"][1:5])
    np.testing.assert_array_equal(targets, [1, 2, 3, 4])
    np.testing.assert_array_equal(weights, [1.0, 1.0, 0.5, 1.0])
    # Keras computes in 32 bits whatever the arrays are of.
    assert batch["a"].dtype == "float32"


@pytest.mark.parametrize("shuffle", [True, False, "batch"])
@pytest.mark.parametrize("sizes", [[32], [16, 8]])
def test_row_numbers_come_in_the_order_of_keras(shuffle, sizes):
    def epochs(dataset):
        return [
            np.concatenate([np.asarray(rows) for rows in dataset])
            for _ in range(3)
        ]

    keras.utils.set_random_seed(5)
    ours = RowNumbers(70, sizes, shuffle, 32)
    theirs = keras_private.data_adapter_for(
        np.arange(70), batch_size=32, shuffle=shuffle
    )
    expected = epochs(theirs.get_tf_dataset())[0]

    for found in epochs(ours):
        # A global seed gives every epoch the same order, in Keras, too.
        np.testing.assert_array_equal(found, expected)
    assert [len(rows) for rows in ours] == (
        [32, 32, 6] if sizes == [32] else [16, 8, 16, 8, 16, 6]
    )


@pytest.mark.parametrize(("shuffle", "size"), [(True, 1000), ("batch", 100)])
def test_row_numbers_of_an_epoch_have_an_order_of_their_own(shuffle, size):
    # As it is in a program that sets none. The next test sets its own.
    tf.random.set_seed(None)
    rows = RowNumbers(1000, [1000], shuffle, size)
    first, second = (next(iter(rows)).numpy() for _ in range(2))
    for one in (first, second):
        batches = np.sort(one.reshape(-1, size))
        assert (batches == np.arange(1000).reshape(-1, size)).all()
    assert (first != second).any()


def test_arrays_that_are_not_dense_are_handed_over_themselves():
    x = tf.sparse.from_dense(np.eye(40, dtype="float32"))

    made = make_superbatches(regressor(), x, np.arange(40), batch_size=8)

    superbatch = next(iter(made.get_tf_dataset()))
    assert isinstance(superbatch[0], tf.SparseTensor)


def shuffled():
    return sliced(X, Y).shuffle(EXAMPLES, seed=3)


def is_known(x, y):
    return True


def once():
    """A pipeline whose source can be read one time only."""
    rows = iter(zip(X, Y))
    return tf.data.Dataset.from_generator(
        lambda: rows,
        output_signature=tuple(
            tf.TensorSpec(data.shape[1:], data.dtype) for data in (X, Y)
        ),
    )


@pytest.mark.parametrize(
    "make",
    [
        # How many examples a batch has is told, or it is read in order; an
        # iteration would take the first order of a seeded shuffle away.
        lambda: shuffled().batch(BASE),
        lambda: shuffled().batch(BASE).map(lambda x, y: (x, y)),
        lambda: shuffled().filter(is_known),
        lambda: sliced(X, Y).filter(is_known).shuffle(9, seed=3).batch(BASE),
        # Of one example, after which a second batch is looked for.
        lambda: sliced(X, Y).filter(is_known).shuffle(9, seed=3).batch(1),
        # What is read would be gone.
        once,
        lambda: once().batch(BASE),
        lambda: once().batch(BASE, drop_remainder=True).map(lambda *one: one),
    ],
)
def test_reading_ahead_disturbs_nothing(make):
    dataset = make()

    make_superbatches(regressor(), dataset, batch_size=BASE)

    first, other = next(iter(dataset)), next(iter(make()))
    np.testing.assert_array_equal(first[0], other[0])


def slow():
    return compiled(linear(), steps_per_execution=4)


def by_trainer(model):
    kb.AdaptiveTrainer(model, "fixed", superbatch_size=16, verbose=0).fit(
        X, Y, batch_size=BASE, epochs=2, verbose=0
    )


def by_callback(model):
    sizes = kb.DynamicBatchSize("fixed", BASE)
    model.fit(X, Y, batch_size=16, epochs=2, callbacks=[sizes], verbose=0)


def by_static_callback(model):
    rate = kb.LearningRateScaling("linear", BASE, 16)
    model.fit(X, Y, batch_size=16, epochs=2, callbacks=[rate], verbose=0)


@pytest.mark.parametrize(
    "train", [by_trainer, by_callback, by_static_callback]
)
def test_steps_per_execution_is_superseded_and_said_to_be(train):
    with pytest.warns(UserWarning) as caught:
        train(slow())

    # Once, and where `fit` is called.
    (warning,) = (one for one in caught if one.category is UserWarning)
    assert "steps_per_execution=4" in str(warning.message)
    assert "steps_per_execution=1" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.filterwarnings("ignore:`steps_per_execution`:UserWarning")
def test_steps_per_execution_changes_nothing():
    ours = held(slow, **arrays(superbatch_size=16))
    comparing.assert_same(ours, trained_plainly("float64"))


def test_steps_per_execution_does_not_lengthen_an_epoch():
    model = compiled(linear(), steps_per_execution=4)
    trainer = kb.AdaptiveTrainer(model, "fixed", superbatch_size=8, verbose=0)
    dataset = sliced(X, Y).repeat().batch(BASE)

    with pytest.warns(UserWarning, match="steps_per_execution"):
        trainer.fit(dataset, steps_per_epoch=10, epochs=2, verbose=0)

    assert model.optimizer.iterations == 2 * 10


def large(axes):
    """An endless pipeline of batches of large examples, never read."""
    spec = tf.TensorSpec([BASE, *axes], "float32")
    return tf.data.Dataset.from_generator(iter, output_signature=spec).repeat()


@pytest.mark.parametrize(
    ("axes", "examples"),
    # Of 4 kB: 64 batches. Of 1 MiB: 256. Of 1 GiB: a batch, all the same.
    [([1024], 64 * BASE), ([512, 512], 256), ([2**28], BASE)],
)
def test_a_superbatch_that_is_copied_holds_at_most_256_megabytes(
    axes, examples
):
    model = keras.Sequential([keras.Input(axes)])
    assert make_superbatches(model, large(axes)).superbatch_size == examples
    # What the user states is kept.
    stated = make_superbatches(
        model, large(axes), superbatch_size=2 * examples
    )
    assert stated.superbatch_size == 2 * examples


def test_arrays_count_where_they_are_copied():
    # 1 MiB each with its target, all the same one. XLA is handed copies.
    width = 2**18 - 2
    x = np.broadcast_to(np.float32(0.0), (4096, width))
    model = keras.Sequential([keras.Input((width,))])
    model.compile("sgd", "mse", jit_compile=True)
    found = make_superbatches(model, x, np.zeros((4096, 1)), batch_size=BASE)
    assert found.superbatch_size == 256
    # Where the loop gathers rows by itself, nothing is copied.
    model.jit_compile = False
    assert batched(x, None, None, model, BASE).bytes_each == 0
