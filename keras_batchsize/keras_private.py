"""Every private name of Keras that this library uses, each in one place.

There is no public way to do what is done here. `tests/test_keras_private.py`
pins each name, so that a Keras release that changes one is noticed by a test
that says which, not by a user.
"""

import contextlib

import keras
from keras.src.losses import loss as loss_module
from keras.src.trainers.data_adapters import array_slicing
from keras.src.trainers.data_adapters import data_adapter
from keras.src.trainers.data_adapters import get_data_adapter
from keras.src.utils import io_utils

print_message = io_utils.print_msg
DataAdapter = data_adapter.DataAdapter
data_adapter_for = get_data_adapter
train_validation_split = array_slicing.train_validation_split

# Datasets of TensorFlow that make batches, and that pass them on as they are.
_BATCHING = ("_BatchDataset", "_PaddedBatchDataset", "_ParallelBatchDataset")
_PASSING_ON = (
    "CacheDataset",
    "_AssertCardinalityDataset",
    "_OptionsDataset",
    "_PrefetchDataset",
    "_RepeatDataset",
    "_ShuffleDataset",
    "_SkipDataset",
    "_TakeDataset",
)


def batch_size_of(dataset):
    """Returns the batch size of a `tf.data.Dataset` without reading from it.

    Whoever reads a batch takes the order of the first epoch away from a
    dataset that shuffles anew each time (private names of TensorFlow).

    Args:
        dataset: A dataset of batches.

    Returns:
        Integer, or None where only reading would tell.
    """
    size = keras.tree.flatten(dataset.element_spec)[0].shape[0]
    while type(dataset).__name__ in _PASSING_ON:
        dataset = dataset._input_dataset
    if type(dataset).__name__ in _BATCHING:
        size = int(dataset._batch_size)
    return size


def makes_batches(dataset):
    """Whether batches are made somewhere in a `tf.data.Dataset`.

    Args:
        dataset: A dataset.

    Returns:
        Bool; False if the batches have been taken apart again.
    """
    kind = type(dataset).__name__
    if kind == "_UnbatchDataset":
        return False
    inputs = dataset._inputs()
    return kind in _BATCHING or any(makes_batches(one) for one in inputs)


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


def output_loss_metrics(model):
    """Returns the metrics of the outputs' losses; none for a single loss."""
    losses = model._compile_loss
    return [] if losses is None else losses.metrics


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
