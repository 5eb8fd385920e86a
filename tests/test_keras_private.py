"""Every private name of Keras that is relied on, and the facts of the design.

A release of Keras or TensorFlow that changes one fails here, with a text that
says what changed and who uses it. Nothing here imports the package before it
is asked for: with a name gone, that would hide which.
"""

import ast
import importlib
import inspect
import pathlib
import random

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from comparing import compiled
from comparing import dense
from keras.src.backend.common import global_state as keras_globals
from keras.src.utils import rng_utils

ROOT = pathlib.Path(__file__).parents[1]


def changed(name, users, what="is gone or means something else"):
    return (
        f"Private name of Keras or TensorFlow: `{name}` {what} in Keras "
        f"{keras.__version__}, TensorFlow {tf.__version__}. It is used by "
        f"{users}. Find the new way, change it there, and pin it here."
    )


IMPORTED = {
    "keras.src.backend.common.global_state.get_global_attribute": (
        "the probe, for global seeds and names"
    ),
    "keras.src.losses.loss.apply_mask": "masked_weight",
    "keras.src.models.functional.Functional": "first_computed_twice",
    "keras.src.trainers.data_adapters.array_slicing.convert_to_sliceable": (
        "tensors_of"
    ),
    "keras.src.trainers.data_adapters.array_slicing.train_validation_split": (
        "AdaptiveTrainer.fit"
    ),
    "keras.src.trainers.data_adapters.data_adapter.DataAdapter": (
        "superbatches.Superbatches"
    ),
    "keras.src.trainers.data_adapters.get_data_adapter": (
        "superbatches.make_superbatches"
    ),
    "keras.src.trainers.data_adapters.py_dataset_adapter.PyDatasetAdapter": (
        "_superbatches_host.may_read_ahead"
    ),
    "keras.src.trainers.data_adapters.tf_dataset_adapter.TFDatasetAdapter": (
        "_superbatches_alike.facts_of"
    ),
    "keras.src.utils.file_utils.is_remote_path": (
        "BackupAndRestore, which writes to a local file first"
    ),
    "keras.src.utils.io_utils.print_msg": "callbacks, for the line of a change",
}

ATTRIBUTES = {
    "_auto_config": "fixed_batch_size",
    "_all_reduce_sum_gradients": "gradients_are_sums",
    "_batch_size": "batch_size_of and in_order",
    "_call_has_training_arg": "predict_for_training",
    "_compile_config": "compiled",
    "_compile_loss": "output_loss_metrics",
    "_compute_loss": "compute_loss",
    "_count": "in_order and passes_of",
    "_distributed_dataset": "built_from_specs",
    "_drop_remainder": "in_order",
    "_expected_cardinality": "in_order",
    "_func": "in_order",
    "_initial_epoch": "resume_at and resumes_at",
    "_input_dataset": "batch_size_of, passes_of and in_order",
    "_flatten_layers": "flatten_layers",
    "_get_own_metrics": "own_metrics",
    "_inputs": "makes_batches, is_fed_by_python and tensors_of",
    "_keras_history": "fixed_batch_size",
    "_keras_mask": "mask_of",
    "_remat_mode": "remat_mode",
    "_learning_rate": "learning_rate_replaced and held_learning_rate",
    "_linears": "linears",
    "_loss_tracker": "track_loss and loss_metrics",
    "_map_func": "in_order and is_fed_by_python",
    "_maybe_symbolic_build": "built_from_specs",
    "_metrics": "own_metrics",
    "_momentums": "velocities",
    "_padded_shapes": "in_order",
    "_padding_values": "in_order",
    "_predicate": "in_order",
    "_rng": "global_state and states_kept",
    "_seed": "shuffle_seeds and states_kept",
    "_seed2": "shuffle_seeds",
    "_symbolic_build": "build_symbolically",
    "_value_specs": "built_from_specs",
}


FILES = (
    "keras_private.py",
    "_keras_private_backups.py",
    "_keras_private_datasets.py",
    "_keras_private_random.py",
)


def user(name):
    return f"{ATTRIBUTES[name]} in {' or '.join(FILES)}"


def test_adapter_of_arrays_shows_what_its_dataset_would_hold():
    from keras_batchsize import keras_private

    x, y = np.arange(12.0).reshape(6, 2), np.arange(6)
    adapter = keras_private.data_adapter_for(x, y, batch_size=6)

    tensors = keras_private.tensors_of(adapter)

    message = changed("ArrayDataAdapter._inputs", user("_inputs"))
    for one, other in zip(tensors, next(iter(adapter.get_tf_dataset()))):
        assert one.dtype == other.dtype, message
        np.testing.assert_array_equal(one, other, err_msg=message)


@pytest.mark.parametrize("path", IMPORTED)
def test_imported_name_is_there(path):
    module, name = path.rsplit(".", 1)
    message = changed(path, f"{IMPORTED[path]}, through keras_private.py")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        found = None
    assert callable(found), message


def test_every_private_name_is_pinned():
    files = [ROOT / "keras_batchsize" / name for name in FILES]
    nodes = [
        node
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    ]
    attributes = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and node.attr.startswith("_")
    }
    attributes |= {
        node.value
        for node in nodes
        if isinstance(node, ast.Constant)
        and node.value in ATTRIBUTES
    }
    assert attributes - {"__setattr__", "__name__"} == set(ATTRIBUTES)
    imported = {
        f"{node.module}.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        and node.module.startswith("keras.src")
        for alias in node.names
    }
    assert {
        path
        for path in IMPORTED
        # A module is imported, or the name itself.
        if path in imported or path.rsplit(".", 1)[0] in imported
    } == set(IMPORTED)
    assert all(
        any(f"{path}.".startswith(f"{one}.") for path in IMPORTED)
        for one in imported
    )


# What the names mean.


def test_apply_mask_merges_mask_and_weights():
    from keras.src.losses.loss import apply_mask

    mask = tf.constant([[True, True], [True, False]])
    weight = tf.constant([[2.0, 3.0], [5.0, 7.0]])
    for given, expected in (
        (weight, [[2.0, 3.0], [5.0, 0.0]]),
        (None, [[1.0, 1.0], [1.0, 0.0]]),
    ):
        merged = apply_mask(given, mask, "float32", "mean_with_sample_weight")
        np.testing.assert_array_equal(
            merged,
            expected,
            changed("keras.src.losses.loss.apply_mask", "masked_weight"),
        )


def test_train_validation_split_takes_the_last_examples():
    from keras.src.trainers.data_adapters.array_slicing import (
        train_validation_split,
    )

    x = np.arange(8)
    (ours, none), (theirs, _) = train_validation_split(
        (x, None), validation_split=0.25
    )
    message = changed("train_validation_split", "AdaptiveTrainer.fit")
    assert none is None, message
    assert (list(ours), list(theirs)) == (list(x[:6]), [6, 7]), message


def test_data_adapter_is_taken_by_fit_as_it_is():
    from keras.src.trainers.data_adapters import get_data_adapter
    from keras.src.trainers.data_adapters.data_adapter import DataAdapter

    x, y = comparing.regression(12)
    inner = get_data_adapter(x, y, batch_size=4)
    called = []

    class Outer(DataAdapter):
        def get_tf_dataset(self):
            called.append("get_tf_dataset")
            return inner.get_tf_dataset()

        @property
        def num_batches(self):
            return inner.num_batches

        @property
        def batch_size(self):
            return 4

        def on_epoch_begin(self):
            called.append("on_epoch_begin")

        def on_epoch_end(self):
            called.append("on_epoch_end")

    model = compiled(dense)()
    model.fit(Outer(), verbose=0, batch_size=None)
    message = changed("DataAdapter", "superbatches.Superbatches")
    assert int(model.optimizer.iterations) == inner.num_batches == 3, message
    assert "get_tf_dataset" in called, message
    assert "on_epoch_begin" in called, message
    assert "on_epoch_end" in called, message


def test_print_msg_prints_a_line(capsys):
    from keras.src.utils.io_utils import print_msg

    print_msg("a line")
    assert capsys.readouterr().out == "a line\n", changed(
        "print_msg", IMPORTED["keras.src.utils.io_utils.print_msg"]
    )


def test_call_has_training_arg_says_whether_it_has():
    class Without(keras.Model):
        def call(self, x):
            return x

    class With(keras.Model):
        def call(self, x, training=False):
            return x

    message = changed("_call_has_training_arg", user("_call_has_training_arg"))
    assert With()._call_has_training_arg is True, message
    assert Without()._call_has_training_arg is False, message


def test_compute_loss_serves_overrides_without_training():
    class Old(keras.Sequential):
        def compute_loss(self, x, y, y_pred, sample_weight=None):
            return keras.ops.sum(y_pred)

    model = Old([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(loss="mse")
    value = model._compute_loss(
        x=None,
        y=None,
        y_pred=tf.ones((3, 1)),
        sample_weight=None,
        training=True,
    )
    assert float(value) == 3.0, changed("_compute_loss", user("_compute_loss"))


def test_training_step_is_made_of_the_names_that_replace_it():
    """`gradients._backward` does what `train_step` does, name by name."""
    names = []

    class Watched(keras.Sequential):
        def _compute_loss(self, **arguments):
            names.append("_compute_loss")
            assert set(arguments) == {
                "x", "y", "y_pred", "sample_weight", "training",
            }
            return super()._compute_loss(**arguments)

        def compute_metrics(self, *arguments, **others):
            names.append("compute_metrics")
            return super().compute_metrics(*arguments, **others)

    class Optimizer(keras.optimizers.SGD):
        def scale_loss(self, loss):
            names.append("scale_loss")
            return super().scale_loss(loss)

        def apply_gradients(self, pairs):
            names.append("apply_gradients")
            return super().apply_gradients(pairs)

    model = Watched([keras.Input((5,)), keras.layers.Dense(1)])
    model.compile(Optimizer(0.1), "mse", run_eagerly=True)
    x, y = comparing.regression(4)
    model.train_on_batch(x, y)
    names.clear()
    loss = model.train_on_batch(x, y)

    message = changed("Model.train_step", "gradients.GradientAccumulator")
    assert names == [
        "_compute_loss",
        "scale_loss",
        "apply_gradients",
        "compute_metrics",
    ], message
    tracker = model._loss_tracker
    message = changed("_loss_tracker", user("_loss_tracker"))
    assert float(tracker.result()) == float(loss), message
    # Each of the four examples counts.
    assert float(tracker.count) == 4.0, message


def test_a_model_remembers_at_which_epoch_to_go_on():
    model = compiled(dense)()
    message = changed("Model._initial_epoch", user("_initial_epoch"))
    assert model._initial_epoch is None, message
    model._initial_epoch = 2
    x, y = comparing.regression(8)
    assert model.fit(x, y, epochs=3, verbose=0).epoch == [2], message


def test_compile_makes_a_new_object_each_time():
    model = compiled(dense)()
    first = model._compile_config
    assert model._compile_config is first
    model.compile(model.optimizer, model.loss)
    assert model._compile_config is not first, changed(
        "_compile_config", user("_compile_config")
    )


def test_tensorflow_lists_what_was_assigned_in_attributes_of_its_own():
    from keras_batchsize import keras_private

    model = compiled(dense)()
    model.critic = critic = keras.optimizers.Adam()
    model.critic = None
    hidden = {*vars(model)} - {*keras_private.attributes_of(model)}
    message = changed("_self_", "attributes_of")
    assert keras_private.attributes_of(model)["critic"] is None, message
    assert hidden and all(one.startswith("_self_") for one in hidden), message
    listed = model._self_unconditional_checkpoint_dependencies
    assert any(one.ref is critic for one in listed), message


def test_compile_loss_has_a_metric_for_each_of_several_outputs():
    message = changed("_compile_loss", user("_compile_loss"))
    model = comparing.in_two_outputs(lambda: "sgd")()
    x, y = comparing.for_two_outputs(12)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    metrics = model._compile_loss.metrics
    assert {one.name for one in metrics} == {"size_loss", "kind_loss"}, message
    # Each batch alike: with a ragged one, no size is known in the graph.
    assert {float(one.count) for one in metrics} == {2.0}, changed(
        "CompileLoss.call", "gradients._track_losses", "weighs batches now"
    )

    single = compiled(dense)()
    single.fit(*comparing.regression(8), verbose=0)
    assert single._compile_loss.metrics == [], message
    assert compiled(dense, loss=None)()._compile_loss is None, message


def test_a_layer_remembers_the_scope_it_was_made_in():
    from keras_batchsize import keras_private

    with keras.RematScope(mode="full"):
        inside = keras.layers.Dense(1)
    message = changed("_remat_mode", user("_remat_mode"))
    mode = getattr(inside, "_remat_mode", None)
    assert getattr(mode, "mode", None) == "full", message
    assert keras.layers.Dense(1)._remat_mode is None, message
    # A scope that switches it off.
    with keras.RematScope(mode=None):
        without = keras.layers.Dense(1)
    mode = getattr(without, "_remat_mode", None)
    assert mode is None or mode.mode is None, message
    model = keras.Sequential([without])
    assert keras_private.first_computed_twice(model) is None, message
    model.add(inside)
    assert keras_private.first_computed_twice(model) == inside.name, message


def test_a_functional_model_tells_its_operations():
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.ops.tanh(inputs))
    path = "keras.src.models.functional.Functional"
    message = changed(path, IMPORTED[path], "does not hold its operations")
    functional = importlib.import_module("keras.src.models.functional")
    assert isinstance(model, functional.Functional), message
    assert "Tanh" in {type(one).__name__ for one in model.operations}, message


def test_mask_travels_with_a_tensor():
    masked = keras.layers.Masking()(tf.constant([[[1.0], [0.0]]]))
    message = changed("_keras_mask", user("_keras_mask"))
    np.testing.assert_array_equal(
        getattr(masked, "_keras_mask", None), [[True, False]], message
    )
    # The loss is divided by the number of steps that are not masked.
    loss = keras.losses.MeanSquaredError()(tf.zeros((1, 2, 1)), masked)
    assert float(loss) == 1.0, changed(
        "Loss.__call__", "exactness.weight_of", "divides otherwise"
    )


@pytest.mark.parametrize("kind", ["number", "schedule", "callable"])
def test_optimizer_takes_its_rate_from_one_attribute(kind):
    rates = {
        "number": 0.5,
        "schedule": keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5),
        "callable": lambda: 0.5,
    }
    optimizer = keras.optimizers.SGD(rates[kind], weight_decay=0.5)
    weight = keras.Variable(1.0)
    optimizer.build([weight])
    message = changed("_learning_rate", user("_learning_rate"))
    held = {
        "number": keras.Variable,
        "schedule": keras.optimizers.schedules.LearningRateSchedule,
        "callable": type(rates["callable"]),
    }
    assert isinstance(optimizer._learning_rate, held[kind]), message

    new = tf.constant(0.25)
    object.__setattr__(
        optimizer, "_learning_rate", new if kind == "number" else lambda: new
    )
    object.__setattr__(optimizer, "weight_decay", tf.constant(1.0))
    optimizer.apply([tf.constant(2.0)], [weight])

    # 1 - 1·1·0.25, then minus 2·0.25.
    assert float(weight) == 0.25, message


def test_rmsprop_keeps_its_momentum_with_the_rate_in_it():
    optimizer = keras.optimizers.RMSprop(0.5, rho=0.0, momentum=0.9, epsilon=0)
    weight = keras.Variable([1.0])
    optimizer.apply([tf.constant([4.0])], [weight])
    np.testing.assert_allclose(
        # The increment rate·g/√g² is added, and subtracted from the weight.
        [optimizer._momentums[0].numpy(), 1.0 - weight.numpy()],
        [[0.5], [0.5]],
        rtol=1e-6,
        err_msg=changed("RMSprop._momentums", user("_momentums")),
    )


DATASETS = {
    "batch": lambda data: data.batch(4),
    "padded_batch": lambda data: data.padded_batch(4),
    "parallel batch": lambda data: data.batch(4, num_parallel_calls=2),
    "cache": lambda data: data.batch(4).cache(),
    "assert_cardinality": lambda data: data.batch(4).apply(
        tf.data.experimental.assert_cardinality(3)
    ),
    "options": lambda data: data.batch(4).with_options(tf.data.Options()),
    "prefetch": lambda data: data.batch(4).prefetch(2),
    "repeat": lambda data: data.batch(4).repeat(),
    "shuffle": lambda data: data.batch(4).shuffle(8),
    "skip": lambda data: data.batch(4).skip(1),
    "take": lambda data: data.batch(4).take(2),
}


@pytest.mark.parametrize("name", DATASETS)
def test_dataset_tells_its_batch_size(name):
    from keras_batchsize import keras_private

    dataset = DATASETS[name](tf.data.Dataset.range(12).map(lambda x: (x, x)))
    assert keras_private.batch_size_of(dataset) == 4, changed(
        f"{type(dataset).__name__}._batch_size or ._input_dataset",
        user("_batch_size"),
    )


@pytest.mark.parametrize("name", DATASETS)
def test_dataset_tells_whether_it_makes_batches(name):
    from keras_batchsize import keras_private

    made = DATASETS[name](tf.data.Dataset.range(12).map(lambda x: (x, x)))
    for dataset, expected in (
        (made, True),
        (made.map(lambda x, y: (x, y)), True),
        (made.unbatch(), False),
        (tf.data.Dataset.range(12).prefetch(2), False),
    ):
        assert keras_private.makes_batches(dataset) is expected, changed(
            f"{type(dataset).__name__}._inputs", user("_inputs")
        )


def test_dataset_tells_whether_python_feeds_it():
    from keras_batchsize import keras_private

    def generated():
        return tf.data.Dataset.from_generator(
            lambda: range(12), output_signature=tf.TensorSpec([], "int64")
        )

    numbers = tf.data.Dataset.range(12)
    for dataset, expected in (
        (generated(), True),
        (generated().shuffle(2).map(lambda x: x).batch(4), True),
        (numbers.interleave(lambda x: generated()), True),
        (tf.data.Dataset.zip((numbers, generated())), True),
        (numbers.map(lambda x: x).filter(lambda x: True).batch(4), False),
        (numbers.flat_map(lambda x: tf.data.Dataset.range(x)), False),
        (numbers.interleave(lambda x: tf.data.Dataset.range(x)), False),
    ):
        assert keras_private.is_fed_by_python(dataset) is expected, changed(
            "_FlatMapDataset._map_func.function, or GeneratorDataset",
            user("_map_func"),
        )


def test_dataset_tells_the_seeds_it_shuffles_by():
    from keras_batchsize import keras_private

    numbers = tf.data.Dataset.range(12)
    name = "_ShuffleDataset._seed"
    alike = numbers.shuffle(12, seed=3).batch(2).prefetch(1).shuffle(2, seed=4)
    seeds = keras_private.shuffle_seeds(alike)
    assert len(set(seeds)) == 2 and (0, 0) not in seeds, changed(
        name, user("_seed")
    )
    tf.random.set_seed(None)
    none = numbers.shuffle(12).batch(2)
    assert keras_private.shuffle_seeds(none) == [(0, 0)], changed(
        name, user("_seed2")
    )
    assert keras_private.shuffle_seeds(numbers.batch(2)) == []


@pytest.mark.parametrize("kind", [keras.optimizers.SGD, keras.optimizers.Adam])
def test_optimizer_sums_gradients_in_one_method(kind, monkeypatch):
    asked = []
    optimizer = kind(0.1)
    name = "_all_reduce_sum_gradients"
    object.__setattr__(
        optimizer, name, lambda pairs: asked.append(len(pairs)) or pairs
    )
    variable = keras.Variable([1.0, 2.0])
    optimizer.apply([tf.constant([1.0, 1.0])], [variable])
    assert asked == [1], changed(name, user(name))


def test_fit_builds_in_one_method_from_its_iterator():
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    seen = []
    with strategy.scope():
        model = compiled(dense)()
    name = "_maybe_symbolic_build"
    message = changed(name, user(name))
    object.__setattr__(model, name, lambda iterator: seen.append(iterator))
    x = np.zeros((4, comparing.FEATURES))
    model.fit(x, x[:, 0], verbose=0)
    model.evaluate(x, x[:, 0], verbose=0)
    assert len(seen) == 2, message
    for iterator in seen:
        specs = keras.tree.flatten(iterator._distributed_dataset.element_spec)
        shapes = [spec.shape.as_list() for spec in specs]
        assert shapes == [[None, comparing.FEATURES], [None]], message


def test_workers_can_leave_texts_for_each_other():
    from tensorflow.python.eager import context

    for name, arguments in (
        ("set_config_key_value", ["self", "key", "value"]),
        ("get_config_key_value", ["self", "key", "timeout_in_ms"]),
    ):
        method = getattr(type(context.context()), name, None)
        message = changed(name, "tell_workers and told_by_worker")
        assert method is not None, message
        assert list(inspect.signature(method).parameters) == arguments, message


def test_symbolic_build_makes_all_variables():
    model = compiled(lambda: keras.Sequential([keras.layers.Dense(1)]))()
    spec = tf.TensorSpec([None, 3], tf.float32)
    model._symbolic_build(data_batch=(spec, spec))
    message = changed("_symbolic_build", user("_symbolic_build"))
    assert model.built and model.optimizer.built, message


def test_backup_and_restore_saves_in_one_method(tmp_path):
    saved = []

    class Backup(keras.callbacks.BackupAndRestore):
        def _save_model(self):
            super()._save_model()
            saved.append(sorted(tmp_path.iterdir()))

    model = compiled(dense)()
    model.fit(
        *comparing.regression(8),
        epochs=2,
        verbose=0,
        callbacks=[Backup(tmp_path)],
    )
    message = changed(
        "BackupAndRestore._save_model", "our BackupAndRestore._save_model"
    )
    names = ["latest.weights.h5", "training_metadata.json"]
    assert saved == [[tmp_path / name for name in names]] * 2, message


# The facts that the design stands on (docs/design.md).


def fact(consequence):
    return (
        "What docs/design.md says of Keras no longer holds in Keras "
        f"{keras.__version__}. {consequence}"
    )


class Counts(keras.callbacks.Callback):
    """Counts the calls of each kind in each epoch."""

    def __init__(self):
        super().__init__()
        self.begun, self.ended, self.iterations = [], [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.begun.append(0)
        self.ended.append(0)

    def on_train_batch_begin(self, batch, logs=None):
        self.begun[-1] += 1

    def on_train_batch_end(self, batch, logs=None):
        self.ended[-1] += 1

    def on_epoch_end(self, epoch, logs=None):
        self.iterations.append(int(self.model.optimizer.iterations))


def test_varying_batches_lose_data_and_count_wrongly():
    sizes = iter([32, 64, 16])
    x, y = comparing.regression(256)

    def batches():
        size = next(sizes)
        for start in range(0, 256, size):
            yield x[start : start + size], y[start : start + size]

    dataset = tf.data.Dataset.from_generator(
        batches,
        output_signature=(
            tf.TensorSpec((None, 5), "float32"),
            tf.TensorSpec((None, 1), "float32"),
        ),
    )
    counts = Counts()
    with pytest.warns(UserWarning, match="ran out of data"):
        compiled(dense)().fit(
            dataset, epochs=3, shuffle=False, verbose=0, callbacks=[counts]
        )
    assert counts.ended[0] == 8 and counts.ended[2] < 16, fact(
        "If Keras counts the steps of each epoch anew, batches of varying "
        f"size need no superbatches. Steps per epoch: {counts.ended}.",
    )
    assert counts.begun[0] == counts.ended[0] + 1, fact(
        "Data of unknown length began a batch that there was not. Begun: "
        f"{counts.begun}, ended: {counts.ended}.",
    )


def test_known_cardinality_is_exact():
    counts = Counts()
    data = tf.data.Dataset.from_tensor_slices(comparing.regression(70))
    compiled(dense)().fit(
        data.batch(8), epochs=2, shuffle=False, verbose=0, callbacks=[counts]
    )
    message = fact("Steps of known cardinality are counted otherwise.")
    assert counts.begun == counts.ended == [9, 9], message
    assert counts.iterations == [9, 18], message


def test_fit_calls_the_train_function_it_finds():
    model = compiled(dense)()
    calls = []

    class Installs(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.model.train_function = lambda iterator: calls.append(
                next(iterator)
            ) or {"loss": 1.0}

    model.fit(
        *comparing.regression(16),
        batch_size=8,
        epochs=2,
        verbose=0,
        callbacks=[Installs()],
    )
    message = fact("AdaptiveTrainFunction.install puts itself there.")
    assert len(calls) == 4, message
    assert int(model.optimizer.iterations) == 0, message
    model.compile("sgd", "mse")
    assert model.train_function is None, message


def test_velocity_of_sgd_contains_the_rate():
    optimizer = keras.optimizers.SGD(0.5, momentum=0.5)
    weight = keras.Variable([1.0])
    optimizer.apply([tf.constant([1.0])], [weight])
    optimizer.learning_rate = 0.25
    optimizer.apply([tf.constant([1.0])], [weight])
    # v = momentum·v - rate·g: -0.5, then -0.25 - 0.25.
    np.testing.assert_array_equal(
        optimizer.momentums[0],
        [-0.5],
        fact("learning_rate.correct_momentum need not rescale it."),
    )


def test_progress_bar_in_callbacks_replaces_that_of_keras():
    class Bar(keras.callbacks.ProgbarLogger):
        pass

    bar = Bar()
    callbacks = keras.callbacks.CallbackList(
        [bar], add_progbar=True, model=compiled(dense)()
    )
    bars = [
        one
        for one in callbacks.callbacks
        if isinstance(one, keras.callbacks.ProgbarLogger)
    ]
    assert bars == [bar], fact("ExamplesProgbarLogger stands beside it.")


def test_input_layer_remembers_its_arguments():
    given = keras.Input((3,), batch_size=4)
    sequential = keras.Sequential([keras.layers.Dense(1)])
    sequential(np.zeros((4, 3)))
    for tensor, batch_size, has_dtype in (
        (given, 4, False),
        (sequential.inputs[0], None, True),
    ):
        config = tensor._keras_history.operation._auto_config.config
        assert config["batch_size"] == batch_size, user("_auto_config")
        assert (config["dtype"] is not None) == has_dtype, user("_auto_config")


def test_flatten_layers_goes_inside():
    inner = keras.Sequential([keras.layers.Dense(1)])
    outer = keras.Sequential([keras.Input((3,)), inner])
    layers = outer._flatten_layers(include_self=False)
    assert {inner, inner.layers[0]} <= set(layers), user("_flatten_layers")


def test_own_metrics_are_those_that_were_given_to_a_layer_itself():
    class Shown(keras.Sequential):
        """Shows none of its metrics."""

        @property
        def metrics(self):
            return []

    layer = keras.layers.Dense(1)
    layer.own = keras.metrics.Mean()
    model = Shown([keras.Input((3,)), layer])
    model.own = keras.metrics.Mean()
    model.compile("sgd", "mse", metrics=["mae"])
    own = model._get_own_metrics()
    assert {model.own, model._loss_tracker} <= {*own}, user("_get_own_metrics")
    kinds = [type(one).__name__ for one in own]
    assert kinds.count("CompileMetrics") == 1, user("_get_own_metrics")
    held = [*model.layers[0]._metrics]
    assert held == [model.layers[0].own], user("_metrics")


def test_eager_seeds_come_from_one_generator():
    from tensorflow.python.eager import context

    tf.random.set_seed(1)
    generator = context.context()._rng
    state = generator.getstate()
    tf.random.uniform(())
    assert generator.getstate() != state, user("_rng")


def test_names_and_global_seeds_are_global_attributes():
    from keras_batchsize import keras_private

    before = keras_private.global_state()
    name = keras.layers.Dense(1).name
    value = keras.ops.convert_to_numpy(keras.random.normal((2,)))
    assert keras_private.global_seeds(before) == []
    (seeds,) = keras_private.global_seeds(keras_private.global_state())
    assert seeds.shape == (2,)
    keras_private.set_global_state(before)
    assert keras.layers.Dense(1).name == name, changed(
        "object_name_uids", "keras_private.global_state"
    )
    assert keras_private.global_seeds(keras_private.global_state()) == []
    assert value.shape == (2,)


def drawn():
    return [
        random.random(),
        np.random.rand(),
        float(tf.random.uniform(())),
        float(keras.random.uniform(())),
    ]


def test_random_states_are_those_before_a_seed_was_set():
    from keras_batchsize import _keras_private_random

    keras.utils.set_random_seed(3)
    drawn()
    expected = drawn()
    keras.utils.set_random_seed(3)
    drawn()
    with pytest.raises(KeyboardInterrupt):
        with _keras_private_random.states_kept():
            keras.utils.set_random_seed(9)
            drawn()
            raise KeyboardInterrupt
    assert drawn() == expected
    assert rng_utils.get_random_seed() == 3, changed(
        "global_random_seed", "_keras_private_random.states_kept"
    )


def test_where_no_seed_was_set_none_is_afterwards(monkeypatch):
    from tensorflow.python.eager import context

    from keras_batchsize import _keras_private_random

    monkeypatch.setattr(context.context(), "_seed", None)
    monkeypatch.setattr(context.context(), "_rng", None)
    keras_globals.set_global_attribute("global_random_seed", None)
    with _keras_private_random.states_kept():
        keras.utils.set_random_seed(9)
        assert rng_utils.get_random_seed() == 9
    assert rng_utils.get_random_seed() is None
    assert context.context()._seed is None, user("_seed")
    assert context.context()._rng is None, user("_rng")


def lengthened(x):
    return tf.range(x % 3 + 1)


SHUFFLED = {
    "assert_cardinality": lambda data: data.apply(
        tf.data.experimental.assert_cardinality(60)
    ),
    "batch": lambda data: data.batch(7, drop_remainder=True),
    "batch, parallel": lambda data: data.batch(7, num_parallel_calls=2),
    "cache": lambda data: data.cache(),
    "filter": lambda data: data.filter(lambda x: x % 2 == 0),
    "flat_map": lambda data: data.flat_map(
        lambda x: tf.data.Dataset.from_tensors(x).repeat(2)
    ),
    "interleave": lambda data: data.interleave(
        tf.data.Dataset.from_tensors, cycle_length=2
    ),
    "interleave, parallel": lambda data: data.interleave(
        tf.data.Dataset.from_tensors, num_parallel_calls=2
    ),
    "map": lambda data: data.map(lambda x: x + 1),
    "map, parallel": lambda data: data.map(
        lambda x: x + 1, num_parallel_calls=2
    ),
    "options": lambda data: data.with_options(tf.data.Options()),
    "padded_batch": lambda data: data.map(lengthened).padded_batch(
        7, padding_values=tf.constant(-1, tf.int64)
    ),
    "prefetch": lambda data: data.prefetch(1),
    "repeat": lambda data: data.repeat(2),
    "skip": lambda data: data.skip(0),
    "take": lambda data: data.take(60),
}


@pytest.mark.parametrize("kind", SHUFFLED)
def test_shuffled_data_are_made_anew_in_order(kind):
    from keras_batchsize import keras_private

    numbers = tf.data.Dataset.range(60)
    shuffled, alike = (
        SHUFFLED[kind](numbers.shuffle(60, seed=1)) for _ in range(2)
    )
    anew = keras_private.in_order(shuffled)
    message = changed(kind, "in_order in _keras_private_datasets.py")
    assert anew.element_spec == shuffled.element_spec, message
    assert anew.cardinality() == shuffled.cardinality(), message
    read = [one.numpy().tolist() for one in anew]
    expected = [one.numpy().tolist() for one in SHUFFLED[kind](numbers)]
    # Interleaved, they may come in another order.
    order = sorted if kind.startswith("interleave") else list
    assert order(read) == order(expected), message
    # The order of the first epoch is still there.
    for one, other in zip(shuffled, alike):
        np.testing.assert_array_equal(one, other, err_msg=message)


def test_a_shuffle_below_several_is_found():
    from keras_batchsize import keras_private

    numbers = tf.data.Dataset.range(60).shuffle(60)
    made = numbers.take(10).map(lambda x: -x).batch(4).prefetch(1)
    read = [b.numpy().tolist() for b in keras_private.in_order(made)]
    assert read == [[0, -1, -2, -3], [-4, -5, -6, -7], [-8, -9]]


def test_data_that_may_be_read_stay_as_they_are():
    from keras_batchsize import keras_private

    plain = tf.data.Dataset.range(6).map(lambda x: x).batch(2)
    assert keras_private.in_order(plain) is plain
    shuffled = tf.data.Dataset.range(6).shuffle(6)
    zipped = tf.data.Dataset.zip((shuffled, shuffled)).batch(2)
    assert keras_private.in_order(zipped) is zipped


def test_a_file_of_a_cache_is_not_left_half_written(tmp_path):
    from keras_batchsize import keras_private

    cached = tf.data.Dataset.range(60).cache(str(tmp_path / "cache")).batch(2)
    next(iter(keras_private.in_order(cached)))
    assert not list(tmp_path.iterdir())
