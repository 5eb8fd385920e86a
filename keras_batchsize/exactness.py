"""Whether the loss of a batch is the weighted mean of the losses of its parts.

Measuring noise and accumulating gradients both cut a batch into micro-batches.
That is exact only if the parts can be put together again. What is known about
Keras's reductions is used where it suffices; the rest is found out by trying.
"""

import contextlib

import keras
import numpy as np
import tensorflow as tf

from keras_batchsize import keras_private
from keras_batchsize import model_state
from keras_batchsize import out_of_memory
from keras_batchsize import slicing
from keras_batchsize._exactness_compared import compared

# Losses of Keras that compare the examples of a batch with each other.
_WHOLE_BATCH_LOSSES = (
    keras.losses.Circle,
    keras.losses.Dice,
    keras.losses.Tversky,
)
_WHOLE_BATCH_FUNCTIONS = (
    keras.losses.circle,
    keras.losses.dice,
    keras.losses.tversky,
)

# What `compile` makes cross-entropies of itself: means over examples.
_NAMES_OF_COMPILE = ("crossentropy", "ce")

# Reductions after which the gradient is that of the sum of the losses.
SUMS = {"sum", "none", None}

# Examples on which a loss is tried out, and the size of the parts: what a loss
# makes of how examples differ shows most in the smallest parts.
TRIAL_EXAMPLES = 16
_TRIAL_PART = 2


class CannotBeCut(ValueError):
    """The loss of a batch cannot be put together from those of its parts."""


def check_step(model, cause="batches to be cut", edits="do not cut them"):
    """Raises if the model's own training step cannot be cut.

    Args:
        model: A compiled Keras model.
        cause: What asks for gradients of parts of a batch, in words.
        edits: What to change so that nothing asks for them.

    Raises:
        ValueError: If `train_step` is overridden.
    """
    if model_state.overrides(model, "train_step"):
        raise ValueError(
            "A model that overrides `train_step` cannot be measured, nor its "
            "batches cut: its gradients are computed where they cannot be "
            f"seen. Received: model of type {type(model).__name__}, with "
            f"{cause}. Override `compute_loss` instead of `train_step`. Or "
            f"{edits}: no gradients are looked at then."
        )


def reductions_of(model):
    """Returns how the compiled losses are reduced, a set.

    Args:
        model: A compiled Keras model. Losses given by name become means.
    """
    return {
        getattr(loss, "reduction", "sum_over_batch_size")
        for loss in _losses(model)
    }


def normaliser(model):
    """Finds what the compiled losses are divided by.

    Args:
        model: A compiled Keras model.

    Returns:
        "examples" or "sample_weight".

    Raises:
        CannotBeCut: If a reduction cannot be put together from parts.
    """
    losses, reductions = _losses(model), reductions_of(model)
    for loss in losses:
        _check_known(loss)
    if reductions & SUMS:
        _refuse(
            "a sum grows with the batch size, and the rate would have to "
            "shrink with it",
            f"reduction={sorted(map(str, reductions))}",
            'Use reduction="sum_over_batch_size" and a learning rate '
            "multiplied by the batch size.",
        )
    if "mean_with_sample_weight" not in reductions:
        return "examples"
    if len(losses) > 1:
        _refuse_several_weights(f"{len(losses)} losses")
    return "sample_weight"


def _losses(model):
    return [one for one in keras.tree.flatten(model.loss) if one is not None]


def _check_known(loss):
    """Refuses what is known to compare or to count the examples of a batch."""
    name = loss if isinstance(loss, str) else type(loss).__name__
    if name.lower() in _NAMES_OF_COMPILE:
        return
    resolved = keras.losses.get(loss) if isinstance(loss, str) else loss
    # With axes, as for pictures, Dice and Tversky are made for each example.
    compares = (
        isinstance(resolved, _WHOLE_BATCH_LOSSES)
        and getattr(resolved, "axis", None) is None
    )
    if compares or resolved in _WHOLE_BATCH_FUNCTIONS:
        _refuse("this one compares all examples of a batch", f"loss={name}")
    ignored = getattr(resolved, "ignore_class", None)
    if ignored is not None:
        _refuse(
            "with `ignore_class` it is divided by the number of labels that "
            "are not ignored, which each micro-batch has another of",
            f"ignore_class={ignored}",
            "Give these labels another class and a `sample_weight` of 0, with "
            'reduction="mean_with_sample_weight".',
        )


def _refuse_several_weights(received):
    _refuse(
        "with several outputs each loss would be divided by another sum of "
        "weights",
        f"reduction='mean_with_sample_weight' with {received}",
        'Use reduction="sum_over_batch_size".',
    )


def _refuse(why, received, remedy="Use a loss that is a mean over examples."):
    raise CannotBeCut(
        "A loss must be a mean over examples for batches to be cut into "
        f"micro-batches: {why}. Received: {received}. {remedy}"
    )


def weight_of(kind, y_pred, sample_weight, examples):
    """Returns what the loss of a micro-batch was divided by.

    Args:
        kind: What `normaliser` returned.
        y_pred: Output of the model; a Keras mask on it counts.
        sample_weight: Weights of the micro-batch, or None.
        examples: Number of examples, a scalar tensor.

    Returns:
        Scalar float32 tensor.

    Raises:
        CannotBeCut: If several outputs are masked differently.
    """
    outputs = keras.tree.flatten(y_pred)
    masks = [keras_private.mask_of(output) for output in outputs]
    mask = masks[0]
    if len(outputs) > 1 and any(one is not None for one in masks):
        _refuse(
            "with several outputs and masks each loss is divided by another "
            "number of time steps",
            f"{len(outputs)} outputs with masks",
            "Use `sample_weight` instead of a mask.",
        )
    if kind == "sample_weight" and len(outputs) > 1:
        _refuse_several_weights(f"{len(outputs)} outputs")
    if kind == "examples":
        sample_weight = None
    if sample_weight is not None:
        (sample_weight,) = keras.tree.flatten(sample_weight)
    if sample_weight is not None or mask is not None:
        return tf.reduce_sum(
            keras_private.masked_weight(sample_weight, mask)
        )
    return tf.cast(examples, tf.float32)


def check_loss(model, kind, data):
    """Tries out whether the pairs of a batch give the loss of the whole.

    Covers what no list can: losses and `compute_loss` written by users,
    `add_loss`, masks made by a loss. The model runs in inference mode, and
    whatever that changes is put back. What is random there, too, is compared
    in the mean of several draws: a difference within their spread passes.

    Args:
        model: A compiled and built Keras model.
        kind: What `normaliser` returned.
        data: A batch as `train_step` receives it.

    Raises:
        CannotBeCut: If the loss of the whole is not that of the pairs.
    """
    size = min(int(slicing.count_examples(data)), TRIAL_EXAMPLES)
    _with_memory_for(size, lambda fewer: _check_pairs(model, kind, data, fewer))


def _with_memory_for(size, check):
    """Calls a check, with half as many examples while memory runs out.

    More are tried at once than training may have to take. Where there is no
    memory for any, nothing is checked.

    Args:
        size: Integer, examples to check with.
        check: Function of their number.
    """
    while size > 0:
        try:
            check(size)
            return
        except Exception as error:
            if not out_of_memory.is_out_of_memory(error):
                raise
        size //= 2


def _check_pairs(model, kind, data, size):
    """Checks on the first `size` examples, if these are two pairs or more."""
    starts = range(0, size - _TRIAL_PART + 1, _TRIAL_PART)
    size = len(starts) * _TRIAL_PART
    if len(starts) < 2:
        return
    parts = [slicing.examples(data, start, _TRIAL_PART) for start in starts]
    first = slicing.examples(data, 0, size)
    is_half = model.dtype_policy.compute_dtype == "float16"
    with put_back(model):
        found = compared(
            lambda: _inference_losses(model, kind, first)[0],
            lambda: _mean_of_parts(model, kind, parts),
            _tolerance(model),
            # A pair may be too large for float16 where the whole is not. What
            # is not a number is divided by what the pair has nothing of.
            np.isnan if is_half else lambda loss: ~np.isfinite(loss),
        )
    if found is not None:
        _refuse(
            f"on the first {size} examples the loss is {found.one:.6g}, but "
            f"put together from pairs it is {found.other:.6g}{found.how}",
            f"loss={model.loss!r}",
        )


def _mean_of_parts(model, kind, parts):
    losses, weights = zip(
        *(_inference_losses(model, kind, part) for part in parts)
    )
    return np.dot(weights, losses) / max(sum(weights), 1e-30)


def check_division(model, data):
    """Tries out whether replicas divide a loss of the user's own by R.

    Keras sums the gradients of replicas, so that each divides its loss by
    their number R. Its own losses do; a `compute_loss` or the `__call__` of a
    loss has to be written that way.

    Args:
        model: A compiled and built Keras model, made under a strategy.
        data: A batch as `train_step` receives it.

    Raises:
        ValueError: If the loss on a replica is not 1/R of that of one device.
    """
    strategy = model.distribute_strategy
    number = strategy.num_replicas_in_sync
    if number == 1 or not _computes_loss_itself(model):
        return
    size = int(slicing.count_examples(data))
    _with_memory_for(
        size, lambda fewer: _check_shares(model, strategy, data, fewer)
    )


def _check_shares(model, strategy, data, size):
    """Checks on the first `size` examples."""
    data = slicing.examples(data, 0, size)
    number = strategy.num_replicas_in_sync
    on_replicas = tf.function(
        lambda: strategy.run(_loss_of, (model, data)), autograph=False
    )
    with put_back(model):
        found = compared(
            lambda: np.array([_loss_of(model, data)], float),
            lambda: np.array(
                [strategy.experimental_local_results(on_replicas())[0]], float
            )
            * number,
            _tolerance(model),
        )
    if found is not None:
        raise ValueError(
            "A loss must be divided by the number of replicas: their gradients "
            "are summed. Keras's losses are; one that is computed in a "
            "`compute_loss`, or a `__call__`, of your own has to be. Received: "
            f"on the same examples {found.one:.6g} on one device, "
            f"{found.other / number:.6g} on each of {number} replicas"
            f"{found.how}. Divide it by "
            "tf.distribute.get_strategy().num_replicas_in_sync."
        )


def _computes_loss_itself(model):
    losses = keras.tree.flatten(model.loss)
    return model_state.overrides(model, "compute_loss") or any(
        isinstance(loss, keras.losses.Loss)
        and type(loss).__call__ is not keras.losses.Loss.__call__
        for loss in losses
    )


def _loss_of(model, data):
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    loss = keras_private.compute_loss(
        model,
        x,
        y,
        model(x, training=False),
        sample_weight,
        training=False,
    )
    return tf.reduce_sum(loss)


@contextlib.contextmanager
def put_back(model):
    """Puts back what a model changes even in inference, if it does.

    Args:
        model: A built Keras model.
    """
    metrics = model.metrics_variables  # Not among the variables of a model.
    others = [one for one in model.variables if not one.trainable] + metrics
    held = [keras.ops.convert_to_numpy(one) for one in others]
    try:
        yield
    finally:
        for variable, value in zip(others, held):
            # Replicas may hold values of their own, which are not all read.
            now = keras.ops.convert_to_numpy(variable)
            if not np.array_equal(now, value):
                variable.assign(value)
        if len(model.metrics_variables) > len(metrics):
            model.reset_metrics()  # Some have been made by that.


def _inference_losses(model, kind, data):
    """Returns the loss and what layers have added to it, and the weight."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    y_pred = model(x, training=False)
    loss = keras_private.compute_loss(
        model, x, y, y_pred, sample_weight, training=False
    )
    examples = slicing.count_examples(data)
    weight = weight_of(kind, y_pred, sample_weight, examples)
    terms = [float(tf.reduce_sum(one)) for one in [loss, *model.losses]]
    return np.array(terms), float(weight)


def _tolerance(model):
    """Square root of the resolution of the type that is computed in."""
    digits = {"float16": 10, "bfloat16": 7, "float64": 52, "float32": 23}
    if tf.config.list_logical_devices("GPU"):
        # GPUs may multiply float32 in TensorFloat-32.
        if tf.config.experimental.tensor_float_32_execution_enabled():
            digits["float32"] = 10
    return 2.0 ** (-digits.get(model.dtype_policy.compute_dtype, 23) / 2)
