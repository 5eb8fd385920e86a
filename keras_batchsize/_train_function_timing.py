"""The times of a superbatch, tracing told apart from training."""

import time

import keras

from keras_batchsize import keras_private
from keras_batchsize.records import Measurement
from keras_batchsize.records import Timing


class Stopwatch:
    """Times measuring and training of one superbatch.

    Args:
        graphs: The graphs, whose `traces` count.
    """

    def __init__(self, graphs):
        self._graphs = graphs
        self._marks = []
        self.mark()

    def mark(self):
        """Ends a part: first measuring, then training."""
        self._marks.append((time.perf_counter(), self._graphs.traces))

    def measurement(self, examples, batch_size, waited, **rest):
        """Returns the `Measurement`, after both parts have ended.

        Args:
            examples: Examples in the superbatch.
            batch_size: Examples per update.
            waited: Seconds that reading the data took.
            **rest: The other fields; `measured` says whether the first part
                was more than nothing.
        """
        (began, traces), (half, half_traces), (ended, end) = self._marks
        timing = Timing()
        if end == half_traces:
            # Waiting for data belongs to every example alike.
            timing = Timing(ended - half + waited, examples / batch_size)
        return Measurement(
            examples=examples,
            timing=timing,
            measuring_seconds=half - began if rest.pop("measured") else 0.0,
            seconds=ended - began + waited,
            traced=end > traces,
            **rest,
        )


def scalar_of(logs, name):
    """Returns an entry of logs as a float, None if there is none.

    Args:
        logs: What `train_step` returned.
        name: String.
    """
    value = logs.get(name) if isinstance(logs, dict) else None
    return None if value is None else float(number(value))


def awaited_loss(logs):
    """Returns the loss that a step logged, once the device has computed it.

    Args:
        logs: What a `train_step` returned.

    Returns:
        Float, or None if there is none; then all else has been computed.
    """
    loss = scalar_of(logs, "loss")
    if loss is None:
        wait_for(logs)
    return loss


def wait_for(logs):
    """Waits until the device has computed all that a step returned."""
    for leaf in keras.tree.flatten(logs):
        keras.ops.convert_to_numpy(leaf)


def losses_of(model, logs):
    """Returns the losses among the logs of a step, a dict of floats.

    Args:
        model: The Keras model.
        logs: What its step returned.
    """
    names = [one.name for one in keras_private.loss_metrics(model)]
    return {name: scalar_of(logs, name) for name in names if name in logs}


def number(value):
    """Returns a scalar as a Python number, after the device has made it."""
    return keras.ops.convert_to_numpy(value).item()
