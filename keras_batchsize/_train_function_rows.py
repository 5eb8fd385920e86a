"""What a training reports of itself: a row per superbatch, and its changes."""

import math

from keras_batchsize.report import Change
from keras_batchsize.report import Row


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
