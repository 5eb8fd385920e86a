"""The history of a trial, in the form in which KerasTuner reads it.

KerasTuner takes the n-th values of all metrics to be of one epoch, and looks
for the objective in each. With `validation_freq` neither holds.
"""

import math

import keras


class LoggedNames(keras.callbacks.Callback):
    """Notes which metrics each epoch has, to be called after all others."""

    def __init__(self):
        super().__init__()
        self._names = []

    def on_epoch_end(self, epoch, logs=None):
        """Notes them."""
        self._names.append(set(logs))

    def epochs(self, logs):
        """Returns a list with a dict of the metrics of each epoch.

        Args:
            logs: Dict from the names of metrics to lists of their values.
        """
        count = max([len(self._names), *map(len, logs.values())])
        epochs = [{} for _ in range(count)]
        for name, values in logs.items():
            held = [i for i, names in enumerate(self._names) if name in names]
            if len(held) != len(values):
                held = range(len(values))  # Put in by the user's `fit`.
            for i, value in zip(held, values):
                epochs[i][name] = value
        return epochs


def compared(epochs, objectives, objective):
    """Returns what KerasTuner compares, and which is the best of it.

    Args:
        epochs: List of dicts of metrics.
        objectives: Dict from the names of objectives to "min" or "max".
        objective: KerasTuner's `Objective`.

    Returns:
        Tuple of a dict from the names of metrics to lists of their values, in
        epochs with the objective and with NaN for what was not measured in
        one, and the index of the epoch that the metrics of the trial are
        taken from.
    """
    epochs = [one for one in epochs if objectives.keys() <= one.keys()]
    values = [objective.get_value(one) for one in epochs]
    best = 0
    for epoch, value in enumerate(values):
        if objective.better_than(value, values[best]):
            best = epoch
    names = dict.fromkeys(name for one in epochs for name in one)
    logs = {
        name: [one.get(name, math.nan) for one in epochs] for name in names
    }
    return logs, best


def is_unknown(name, history, arguments):
    """Whether a metric is none of a training.

    Where that ended before its first validation, which may be epochs away with
    `validation_freq`, a metric of validation may still have been to come.

    Args:
        name: Name of the metric.
        history: The Keras `History`.
        arguments: Dict of the arguments of `fit`.
    """
    planned = arguments.get("epochs", 1) - arguments.get("initial_epoch", 0)
    validates = arguments.get("validation_data") is not None or bool(
        arguments.get("validation_split")
    )
    was_to_come = (
        validates
        and name.startswith("val_")
        and not any(one.startswith("val_") for one in history.history)
        and len(history.epoch) < planned
    )
    return name not in history.history and not was_to_come
