"""The steps that the loops of `update_graphs.py` make, kept between fits.

A step is most of what tracing takes, and does not depend on where its batch
comes from, as a loop does. Keras traces it once for all fits, too. There is
another reason: an optimizer sums gradients over replicas, even of one, by an
operation with a gradient of its own, and TensorFlow keeps each graph that
holds such a one as long as the process lives. A trace per fit would be memory
lost per fit.
"""

import tensorflow as tf

from keras_batchsize import keras_private
from keras_batchsize import learning_rate
from keras_batchsize.gradients import GradientAccumulator


class Steps:
    """The step of a model on a batch, and on a micro-batch.

    Args:
        model: A compiled Keras model.
        splits: Whether there are micro-batches.

    Attributes:
        whole: Function (batch, rate) that makes an update and returns logs.
        part: Function (`Accumulated`, batch) that adds a micro-batch.
        accumulator: The `GradientAccumulator`, None without micro-batches.
    """

    def __init__(self, model, splits):
        self._model = model
        self._traced_for = _what_is_traced(model)
        self.accumulator = GradientAccumulator(model) if splits else None
        self.whole, self.part = self._one_step, self._one_micro_batch
        if not model.run_eagerly:
            self.whole, self.part = (
                tf.function(one, reduce_retracing=True, autograph=False)
                for one in (self.whole, self.part)
            )

    def serve(self, model, splits):
        """Whether they are those of a model as it is now.

        Args:
            model: A compiled Keras model.
            splits: Whether there are micro-batches.
        """
        if splits and self.accumulator is None:
            return False
        now = _what_is_traced(model)
        return len(now) == len(self._traced_for) and all(
            one is other for one, other in zip(now, self._traced_for)
        )

    def _one_step(self, batch, rate):
        with learning_rate.applied(self._model.optimizer, rate):
            return self._model.train_step(batch)

    def _one_micro_batch(self, total, batch):
        return self.accumulator.add(total, batch)


class KeptSteps:
    """Holds the steps of the last fit for the next one."""

    def __init__(self):
        self._steps = None

    def of(self, model, splits):
        """Returns the `Steps` of a model, the last ones if they still serve.

        Args:
            model: A compiled Keras model.
            splits: Whether there are micro-batches.
        """
        if self._steps is None or not self._steps.serve(model, splits):
            self._steps = Steps(model, splits)
        return self._steps


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
