"""The objective of a trial that has none: out of memory, or not a number.

KerasTuner counts such a trial as failed, and after three in a row it ends the
search; and BayesianOptimization never learns from failed trials, while an
infinite value counts as 0 there (bayesian.py), the best of all. So a trial gets
a finite value, and a modest one: the scale of the Gaussian process is that of
the values.
"""

import math

import keras
import tensorflow as tf

from keras_batchsize._tuner_fit import ran_out
from keras_batchsize._tuner_target import COUNTS
from keras_batchsize._tuner_target import EXAMPLES
from keras_batchsize._tuner_target import SECONDS
from keras_batchsize._tuner_target import TIME

# The untrained model is evaluated on so many examples, or batches of a dataset.
_EXAMPLES = 1024
_BATCHES = 16


class Penalties:
    """Finite values for objectives that came out as none.

    A time or a number of examples to the target counts as twice the budget; a
    metric of the model as that of an untrained one: as good as knowing
    nothing. A count that should be large is 0; one that should be small is
    twice the examples of the training.

    Args:
        given: Number to use for all objectives. None for the above.
    """

    def __init__(self, given=None):
        self._given = given
        self._untrained = {}

    def of(self, name, direction, target, examples, evaluate):
        """Returns the penalty of one objective.

        Args:
            name: Name of the objective.
            direction: "min" or "max".
            target: The `TimeToTarget` of the trial, or None.
            examples: Examples of the training, 0 if not known.
            evaluate: Function from the name to the value of an untrained
                model, or None; called where nothing else helps.

        Returns:
            Float, or None if there is no saying what is bad.
        """
        if self._given is not None:
            return self._given
        if direction == "max" and name in (*SECONDS, *COUNTS):
            return 0.0
        if name in (TIME, *SECONDS) and target is not None:
            return 2.0 * target.budget
        if name == EXAMPLES and target is not None:
            return 2.0 * target.examples_limit or None
        if name in COUNTS:
            return 2.0 * examples or None
        if self._untrained.get(name) is None:
            # That one trial tells none says nothing about the next.
            self._untrained[name] = evaluate(name)
        return self._untrained[name]


def untrained_value(name, build, arguments):
    """Returns what a metric is before training.

    Args:
        name: Key of the epoch logs.
        build: Function that returns a new, compiled model.
        arguments: Dict of the arguments of `fit`.

    Returns:
        Float; None where it is not among the metrics, not finite, or nothing
        can be evaluated without using up the data.
    """
    data = arguments.get("x"), arguments.get("y")
    if name.startswith("val_"):
        data = arguments.get("validation_data") or data
    if isinstance(data, (tuple, list)):
        x, y = [*data, None][:2]
    else:
        x, y = data, None
    few = _first_of(x, y)
    if few is None:
        return None
    try:
        model = build()
        if not model.compiled:
            return None
        logs = model.evaluate(**few, verbose=0, return_dict=True)
    except Exception as error:
        if ran_out(error):
            return None
        raise
    value = logs.get(name.removeprefix("val_"), math.nan)
    return float(value) if math.isfinite(value) else None


def _first_of(x, y):
    """Returns a small part of the data, as arguments of `evaluate`."""
    if isinstance(x, tf.data.Dataset):
        return {"x": x.take(_BATCHES)}
    if y is None or isinstance(x, keras.utils.PyDataset):
        return None
    x, y = keras.tree.map_structure(lambda part: part[:_EXAMPLES], (x, y))
    return {"x": x, "y": y}
