"""What the callbacks share."""

import math

from keras_batchsize.report import Change
from keras_batchsize.report import Row
from keras_batchsize.train_function import AdaptiveTrainFunction


def train_function_of(model):
    """Returns the `AdaptiveTrainFunction` of the running `fit`, or None."""
    function = model.train_function
    is_adaptive = isinstance(function, AdaptiveTrainFunction)
    return function if is_adaptive and function.is_current else None


def put_in_order(model):
    """Removes what a `fit` has left that an exception in a callback ended.

    Nobody is called then, so its train function stays until the next `fit`.
    """
    function = model.train_function
    if isinstance(function, AdaptiveTrainFunction) and not function.is_current:
        function.uninstall()


def row_of(function, measurement):
    """Returns the `report.Row` of the superbatch just trained on.

    Args:
        function: The `AdaptiveTrainFunction`.
        measurement: The `Measurement` of that superbatch.
    """
    controller = function.controller
    plan, estimate = controller.plan, controller.noise_scale
    known = estimate.resolved
    return Row(
        examples=controller.examples,
        updates=controller.updates,
        epoch=function.epoch,
        seconds=function.seconds,
        batch_size=plan.batch_size,
        micro_batch_size=plan.micro_batch_size,
        accumulation_steps=plan.accumulation_steps,
        noise_scale=estimate.value if known else math.nan,
        noise_lower=estimate.lower if known else math.nan,
        noise_upper=estimate.upper if known else math.nan,
        learning_rate=measurement.learning_rate,
        base_learning_rate=measurement.learning_rate / function.factor,
        learning_rate_factor=function.factor,
        examples_per_second=measurement.examples / measurement.seconds,
        goodput=controller.goodput,
        loss=math.nan if measurement.loss is None else measurement.loss,
    )


def change_of(function, decision):
    """Returns the `report.Change` of a decision that takes effect now.

    Args:
        function: The `AdaptiveTrainFunction`.
        decision: The `Decision`.
    """
    controller = function.controller
    return Change(
        epoch=function.epoch,
        examples=controller.examples,
        updates=controller.updates,
        old_batch_size=decision.old_batch_size,
        new_batch_size=decision.new_batch_size,
        noise_scale=decision.noise_scale,
        learning_rate=function.next_learning_rate(),
        reason=decision.reason,
        predicted_speedup=decision.predicted_speedup,
        observed_speedup=math.nan,
    )


def settings_of(function):
    """Returns the settings of a training as a dict of JSON values."""
    controller = function.controller
    return {
        "policy": repr(controller.policy),
        "learning_rate_scaling": function.rule.__name__,
        "base_batch_size": controller.ladder.base,
        "superbatch_size": controller.superbatch_size,
        "min_batch_size": controller.ladder.sizes[0],
        "max_batch_size": controller.ladder.sizes[-1],
        "measuring_share": controller.measuring.share,
    }


def profile_of(function):
    """Returns the `BatchProfile` that a training was planned with, or None.

    Args:
        function: The `AdaptiveTrainFunction`.
    """
    return getattr(function, "profile", None)
