"""The steps that the loops of `update_graphs.py` make, kept between fits.

A step is most of what tracing takes, and does not depend on where its batch
comes from, as a loop does. Keras traces it once for all fits, too. There is
another reason: an optimizer sums gradients over replicas, even of one, by an
operation with a gradient of its own, and TensorFlow keeps each graph that
holds such a one as long as the process lives. A trace per fit would be memory
lost per fit.
"""

import contextlib

import tensorflow as tf

from keras_batchsize import keras_private
from keras_batchsize import learning_rate
from keras_batchsize import model_state
from keras_batchsize import slicing
from keras_batchsize.gradients import GradientAccumulator


class Steps:
    """The step of a model on a batch, and on a micro-batch.

    Args:
        model: A compiled Keras model.
        splits: Whether there are micro-batches.
        weighs_examples: Whether the losses of single outputs weigh updates by
            their examples; see `weighing`.

    Attributes:
        whole: Function (batch, rate) that makes an update and returns logs.
        part: Function (`Accumulated`, batch) that adds a micro-batch.
        accumulator: The `GradientAccumulator`, None without micro-batches.
    """

    def __init__(self, model, splits, weighs_examples=False):
        self._model = model
        self._weighs_examples = weighs_examples
        self._traced_for = _what_is_traced(model)
        self.accumulator = None
        if splits:
            self.accumulator = GradientAccumulator(
                model, weighs_examples and not has_own_logs(model)
            )
        self.whole = self._function(self._one_step)
        self.part = self._function(self._one_micro_batch)

    def _function(self, function):
        if self._model.run_eagerly:
            return function
        return tf.function(function, reduce_retracing=True, autograph=False)

    def build(self, batch, rate):
        """Traces `whole`, which creates all variables.

        Args:
            batch: Specs of a batch as `train_step` receives it.
            rate: A `RateInForce`.

        Returns:
            What it returns, as nested specs.
        """
        before = len(keras_private.output_loss_metrics(self._model))
        concrete = self.whole.get_concrete_function(batch, rate)
        if len(keras_private.output_loss_metrics(self._model)) > before:
            # A trace that makes the metrics cannot weigh them.
            self.whole = self._function(self._one_step)
        return concrete.structured_outputs

    def matches(self, model, splits, weighs_examples):
        """Whether they are those of a model as it is now.

        Args:
            model: A compiled Keras model.
            splits: Whether there are micro-batches.
            weighs_examples: As for the constructor.
        """
        if weighs_examples != self._weighs_examples:
            if keras_private.output_loss_metrics(model):
                return False
        if splits and self.accumulator is None:
            return False
        now = _what_is_traced(model)
        return len(now) == len(self._traced_for) and all(
            one is other for one, other in zip(now, self._traced_for)
        )

    def _one_step(self, batch, rate):
        with learning_rate.applied(self._model.optimizer, rate):
            with self._weighing(batch):
                return self._model.train_step(batch)

    def _weighing(self, batch):
        model = self._model
        # Own logs may show what a step holds; eager steps know all sizes.
        if not (has_own_logs(model) or model.run_eagerly):
            if self._weighs_examples:
                return weighing(model, slicing.count_examples(batch))
            if model.jit_compile:
                # XLA knows the sizes of whole batches, not of a ragged one.
                return weighing(model, 1)
        return contextlib.nullcontext()

    def _one_micro_batch(self, total, batch):
        return self.accumulator.add(total, batch)


class KeptSteps:
    """Holds the steps of the last fit for the next one."""

    def __init__(self):
        self._steps = None

    def of(self, *arguments):
        """Returns the `Steps` of a model, the last ones if they still serve.

        Args:
            *arguments: Those of `Steps`.
        """
        if self._steps is None or not self._steps.matches(*arguments):
            self._steps = Steps(*arguments)
        return self._steps


def has_own_logs(model):
    """Whether a step may return other logs than the metrics' results."""
    names = "train_step", "compute_metrics", "get_metrics_result"
    return any(model_state.overrides(model, name) for name in names)


@contextlib.contextmanager
def weighing(model, weight):
    """Lets the losses of single outputs weigh a step by a number.

    Keras weights a batch by its size where graphs know it, and by 1 where they
    do not (compile_utils.py). Where batches are cut they do not, but for XLA.

    Args:
        model: A compiled Keras model.
        weight: The number, an integer or a scalar tensor.
    """
    trackers = keras_private.output_loss_metrics(model)
    held = [
        [tf.identity(one.value) for one in each.variables] for each in trackers
    ]
    for tracker in trackers:
        tracker.reset_state()
    # Entered only while a graph is traced: after an error there is none.
    yield
    for tracker, values in zip(trackers, held):
        loss = tracker.result()
        for variable, value in zip(tracker.variables, values):
            variable.assign(value)
        tracker.update_state(loss, sample_weight=weight)


def _what_is_traced(model):
    """Returns the objects that a trace depends on, besides its arguments."""
    return [
        model,
        keras_private.compiled(model),
        model.run_eagerly,
        model.optimizer,
        *(
            keras_private.held_learning_rate(one)
            for one in learning_rate.optimizers_inside(model.optimizer)
        ),
        *model.trainable_variables,
    ]
