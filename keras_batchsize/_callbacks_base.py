"""What the callbacks share."""

from keras_batchsize import scaling
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


def settings_of(function):
    """Returns the settings of a training as a dict of JSON values."""
    controller = function.controller
    counts = function.tally.of(controller)
    elapsed = counts["measuring.elapsed"]
    return {
        "policy": repr(controller.policy),
        "learning_rate_scaling": scaling.name_of(function.rule),
        "base_batch_size": controller.ladder.base,
        "superbatch_size": controller.superbatch_size,
        "min_batch_size": controller.ladder.sizes[0],
        "max_batch_size": controller.ladder.sizes[-1],
        "measuring_share": (
            counts["measuring.spent"] / elapsed if elapsed else 0.0
        ),
    }
