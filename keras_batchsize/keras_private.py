"""Every private name of Keras that this library uses, each in one place.

There is no public way to do what is done here. `tests/test_keras_private.py`
pins each name, so that a Keras release that changes one is noticed by a test
that says which, not by a user.
"""

import contextlib

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state as keras_globals
from keras.src.losses import loss as loss_module
from keras.src.models import functional
from keras.src.trainers.data_adapters import array_slicing
from keras.src.trainers.data_adapters import data_adapter
from keras.src.trainers.data_adapters import get_data_adapter
from keras.src.trainers.data_adapters import py_dataset_adapter
from keras.src.trainers.data_adapters import tf_dataset_adapter
from keras.src.utils import io_utils
from tensorflow.python.eager import context

from keras_batchsize import _keras_private_backups
from keras_batchsize import _keras_private_datasets

print_message = io_utils.print_msg
DataAdapter = data_adapter.DataAdapter
DatasetAdapter = tf_dataset_adapter.TFDatasetAdapter
PyDatasetAdapter = py_dataset_adapter.PyDatasetAdapter
data_adapter_for = get_data_adapter
train_validation_split = array_slicing.train_validation_split
batch_size_of = _keras_private_datasets.batch_size_of
in_order = _keras_private_datasets.in_order
is_fed_by_python = _keras_private_datasets.is_fed_by_python
is_remote_path = _keras_private_backups.is_remote_path
makes_batches = _keras_private_datasets.makes_batches
passes_of = _keras_private_datasets.passes_of
resume_at = _keras_private_backups.resume_at
resumes_at = _keras_private_backups.resumes_at
shuffle_seeds = _keras_private_datasets.shuffle_seeds


def tensors_of(adapter):
    """Returns the data of a Keras adapter of arrays as it hands them over.

    Args:
        adapter: What `data_adapter_for` returned for arrays.

    Returns:
        Nested structure of tensors, floats of Keras's `floatx`, weights of
        classes included. What is sparse comes in a wrapper of Keras.
    """
    arrays = array_slicing.convert_to_sliceable(
        adapter._inputs, target_backend="tensorflow"
    )
    return keras.tree.map_structure(
        lambda leaf: (
            tf.convert_to_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf
        ),
        keras.tree.lists_to_tuples(arrays),
    )


_GLOBAL_SEEDS, _NAMES = "global_seed_generator", "object_name_uids"


def global_state():
    """Copies what Keras and TensorFlow draw seeds and names from.

    Returns:
        Tuple for `set_global_state` and `global_seeds`.
    """
    names = keras_globals.get_global_attribute(_NAMES)
    generator = _eager_seeds()
    return (
        keras_globals.get_global_attribute(_GLOBAL_SEEDS),
        None if names is None else names.copy(),
        None if generator is None else generator.getstate(),
    )


def _eager_seeds():
    """What eager operations draw seeds from; there once a seed was set."""
    return getattr(context.context(), "_rng", None)


def set_global_state(state):
    """Puts back what `global_state` returned; values of variables apart."""
    generator, names, seeds = state
    keras_globals.set_global_attribute(_GLOBAL_SEEDS, generator)
    keras_globals.set_global_attribute(
        _NAMES, None if names is None else names.copy()
    )
    if seeds is not None:
        _eager_seeds().setstate(seeds)


def global_seeds(state):
    """Returns the variables of the global seed generator, if there is one."""
    return [] if state[0] is None else [state[0].state]


def fixed_batch_size(model):
    """Returns the batch size that a model was made for, or None for any.

    A `Sequential` that was built by its first batch has taken over the size
    of that, which Keras ignores and nobody wanted.

    Args:
        model: A Keras model.
    """
    for tensor in keras.tree.flatten(getattr(model, "inputs", None) or []):
        if tensor.shape and tensor.shape[0] is not None:
            layer = tensor._keras_history.operation
            # None where Keras keeps no arguments: a user stated them.
            given = layer._auto_config and layer._auto_config.config
            by_data = given and given["batch_size"] is None and given["dtype"]
            if not (isinstance(model, keras.Sequential) and by_data):
                return tensor.shape[0]
    return None


def flatten_layers(model):
    """Returns all layers of a model, those inside of others, too."""
    return model._flatten_layers(include_self=False)


def own_metrics(layer):
    """Returns the metrics of a layer, without those of layers inside of it.

    Args:
        layer: A Keras layer or model.

    Returns:
        List of Keras metrics; of a model also those that it was compiled with,
        which `Model.metrics` may leave out.
    """
    if isinstance(layer, keras.Model):
        return layer._get_own_metrics()
    return layer._metrics


def predict_for_training(model, x):
    """Calls the model as `Model.train_step` does."""
    if model._call_has_training_arg:
        return model(x, training=True)
    return model(x)


def compute_loss(model, x, y, y_pred, sample_weight, training=True):
    """Computes the loss as `Model.train_step` does.

    Unlike the public `compute_loss` it serves overrides with and without a
    `training` argument.
    """
    return model._compute_loss(
        x=x,
        y=y,
        y_pred=y_pred,
        sample_weight=sample_weight,
        training=training,
    )


def track_loss(model, loss, examples):
    """Adds to the metric "loss", which `Model.metrics` may leave out."""
    model._loss_tracker.update_state(loss, sample_weight=examples)


def loss_metrics(model):
    """Returns all metrics of losses: of the whole, and of several outputs."""
    return [model._loss_tracker, *output_loss_metrics(model)]


def output_loss_metrics(model):
    """Returns the metrics of the outputs' losses; none for a single loss."""
    losses = model._compile_loss
    return [] if losses is None else losses.metrics


def compiled(model):
    """Returns an object that `Model.compile` makes anew at each call."""
    return model._compile_config


def attributes_of(model):
    """Returns what was assigned to a model, a dict.

    Args:
        model: A Keras model.

    Returns:
        Its attributes, without those in which TensorFlow lists what has been
        assigned, also where something else has taken its place.
    """
    return {
        name: value
        for name, value in vars(model).items()
        if not name.startswith("_self_")
    }


def remat_mode(layer):
    """Returns what a `keras.RematScope` told a layer to compute twice.

    Args:
        layer: A Keras layer, or any other object.

    Returns:
        A named tuple, or None.
    """
    return getattr(layer, "_remat_mode", None)


def first_computed_twice(model):
    """Returns the name of what a `keras.RematScope` lets compute twice.

    Args:
        model: A Keras model.

    Returns:
        That of the model, of a layer or of an operation of a functional
        model, whichever is first; None if there is none.
    """
    parts = [model, *flatten_layers(model)]
    for one in parts[:]:
        if isinstance(one, functional.Functional):
            parts += one.operations
    modes = ((one.name, remat_mode(one)) for one in parts)
    return next((name for name, mode in modes if mode and mode.mode), None)


def mask_of(y_pred):
    """Returns the Keras mask that a tensor carries, or None."""
    return getattr(y_pred, "_keras_mask", None)


def masked_weight(sample_weight, mask):
    """Merges weights and mask as `reduction="mean_with_sample_weight"` does.

    Args:
        sample_weight: Tensor or None.
        mask: Tensor or None, but not both None.

    Returns:
        float32 tensor.
    """
    if sample_weight is not None:
        sample_weight = keras.ops.cast(sample_weight, "float32")
    return loss_module.apply_mask(
        sample_weight, mask, "float32", "mean_with_sample_weight"
    )


@contextlib.contextmanager
def learning_rate_replaced(optimizer, replace, weight_decays):
    """Lets an optimizer see another rate and weight decay, while in scope.

    Only what the optimizer object refers to is exchanged, no value of any
    variable, so even an exception leaves nothing behind. Attributes are set
    past `Optimizer.__setattr__`, which would track the replacements.

    Args:
        optimizer: A Keras optimizer without optimizers inside.
        replace: Function from the held rate (a variable, a schedule or a
            callable) to the tensor to use instead.
        weight_decays: Dict from attributes of the optimizer to the tensors to
            use instead.

    Yields:
        None.
    """
    held = optimizer._learning_rate
    rate = replace(held)
    # Adafactor does not take a callable for a relative rate (adafactor.py).
    exchanged = {
        "_learning_rate": (lambda: rate) if callable(held) else rate,
        **weight_decays,
    }
    before = {name: getattr(optimizer, name) for name in exchanged}
    try:
        for name, value in exchanged.items():
            object.__setattr__(optimizer, name, value)
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(optimizer, name, value)


def held_learning_rate(optimizer):
    """Returns what an optimizer holds: a variable, schedule or callable."""
    return optimizer._learning_rate


def velocities(optimizer):
    """Returns the momentum slots of an RMSprop."""
    return optimizer._momentums


def linears(optimizer):
    """Returns the slots of an Ftrl from which it makes weights."""
    return optimizer._linears


@contextlib.contextmanager
def gradients_are_sums(optimizers):
    """Lets optimizers know that gradients are summed over replicas already.

    Args:
        optimizers: Keras optimizers without optimizers inside.

    Yields:
        None.
    """
    name = "_all_reduce_sum_gradients"
    try:
        for one in optimizers:
            object.__setattr__(one, name, lambda pairs: pairs)
        yield
    finally:
        for one in optimizers:
            vars(one).pop(name, None)


@contextlib.contextmanager
def built_from_specs(model):
    """Lets `fit` and `evaluate` build a model without reading any data.

    Under a strategy Keras reads a batch and averages it over the replicas,
    which fails for shares of different lengths, and with several workers for
    any. Shapes are all that it needs.

    Args:
        model: A Keras model, made under a strategy.

    Yields:
        None.
    """

    def build(iterator=None, data_batch=None):
        if data_batch is None:
            data_batch = keras.tree.map_structure(
                _share_spec, iterator._distributed_dataset.element_spec
            )
        build_symbolically(model, data_batch)

    name = "_maybe_symbolic_build"
    try:
        object.__setattr__(model, name, build)
        yield
    finally:
        vars(model).pop(name, None)


def build_symbolically(model, data):
    """Makes all variables of a model, its metrics and its optimizer.

    Args:
        model: A compiled Keras model.
        data: A batch as `train_step` receives it, or its specs.
    """
    with model.distribute_strategy.scope():
        model._symbolic_build(data_batch=data)


def tell_workers(key, text):
    """Puts a text where the other workers of a cluster can read it."""
    context.context().set_config_key_value(key, text)


def told_by_worker(key, seconds):
    """Reads what a worker of the cluster has put, and waits for it.

    Args:
        key: What the worker has put it under.
        seconds: How long to wait.

    Returns:
        Text.

    Raises:
        tf.errors.DeadlineExceededError: If there is nothing by then.
    """
    return context.context().get_config_key_value(key, seconds * 1000)


def _share_spec(spec):
    """The type of one replica's share; an `Optional` stands for None."""
    if isinstance(spec, tf.OptionalSpec):
        return None
    return getattr(spec, "_value_specs", [spec])[0]
