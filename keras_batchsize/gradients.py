"""Gradients of micro-batches: summed, measured and applied.

Gradients are means here. Whatever Keras does to them (the loss scale) is
undone once, in this module, before anything is squared.
"""

import contextlib
from typing import Any
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_batchsize import exactness
from keras_batchsize import keras_private
from keras_batchsize import slicing


class Accumulated(NamedTuple):
    """Sums over the micro-batches of an update that is being made.

    With cᵢ what the loss Lᵢ of micro-batch i was divided by (its examples, or
    the sum of its weights) and gᵢ its gradient:

    Attributes:
        gradients: List of Σ cᵢgᵢ, one dense tensor per trainable weight, of
            float32 at least, still multiplied by the loss scale.
        loss: Σ cᵢLᵢ, scalar float32.
        output_losses: Σ cᵢ times the loss of each output, float32 of shape
            (outputs,), or (0,) for one output only.
        sq_norm: Σ cᵢ‖gᵢ‖², scalar float64, loss scale removed.
        products: Σ (k-1)·(g_k·ḡ_{<k})², likewise; see `MicroBatchNorms`.
        weight: Σ cᵢ, scalar float32.
        examples: Number of examples, scalar int32.
        count: Number of micro-batches, scalar int32.
        logs: Dict of Σ nᵢ times what an own `compute_metrics` returns besides
            the results of metrics, nᵢ the examples of micro-batch i.
    """

    gradients: Any
    loss: tf.Tensor
    output_losses: tf.Tensor
    sq_norm: tf.Tensor
    products: tf.Tensor
    weight: tf.Tensor
    examples: tf.Tensor
    count: tf.Tensor
    logs: dict


class Part(NamedTuple):
    """What forward and backward pass of a micro-batch give.

    Attributes:
        gradients: List of gᵢ times the loss scale, None where there is none.
        loss: Lᵢ, scalar float32.
        output_losses: The loss of each output, as in `Accumulated`.
        weight: cᵢ, scalar float32.
        examples: nᵢ, scalar int32.
        logs: Dict of what `compute_metrics` returned.
    """

    gradients: Any
    loss: tf.Tensor
    output_losses: tf.Tensor
    weight: tf.Tensor
    examples: tf.Tensor
    logs: dict


class GradientAccumulator:
    """Sums the gradients of micro-batches and applies them as one update.

    One batch in one micro-batch is the training step of Keras; in several it
    is the same step up to rounding, for every loss that `exactness` lets pass.

    Args:
        model: A compiled Keras model.
        weighs_examples: Whether the losses of single outputs weigh updates by
            their examples, not each alike.
    """

    def __init__(self, model, weighs_examples=False):
        self._model = model
        self._weighs_examples = weighs_examples or model.run_eagerly
        self._kind = exactness.normaliser(model)
        self._with_gradient = set()
        # Logs besides the results of metrics, as zeros.
        self.own_logs = {}

    @property
    def normaliser(self):
        """What the loss is divided by, see `exactness.normaliser`."""
        return self._kind

    def zeros(self):
        """Returns the `Accumulated` of no micro-batch."""
        return Accumulated(
            gradients=[
                tf.zeros(weight.shape, _sum_dtype(weight))
                for weight in self._model.trainable_weights
            ],
            loss=tf.zeros((), tf.float32),
            output_losses=tf.zeros((len(self._trackers()),), tf.float32),
            sq_norm=tf.zeros((), tf.float64),
            products=tf.zeros((), tf.float64),
            weight=tf.zeros((), tf.float32),
            examples=tf.zeros((), tf.int32),
            count=tf.zeros((), tf.int32),
            logs=dict(self.own_logs),
        )

    def add(self, total, data):
        """Adds a micro-batch: forward, backward, metrics.

        Args:
            total: An `Accumulated`.
            data: The micro-batch, as `train_step` receives a batch.

        Returns:
            The new `Accumulated`.
        """
        part = self._backward(data)
        product = tf.math.divide_no_nan(
            self._dot(part.gradients, total.gradients, self._loss_scale()),
            tf.cast(total.weight, tf.float64),
        )
        return self._sums(total, part)._replace(
            products=total.products
            + tf.cast(total.count, tf.float64) * tf.square(product),
            logs={
                name: value
                + tf.cast(part.examples, value.dtype)
                * tf.cast(part.logs[name], value.dtype)
                for name, value in total.logs.items()
            },
        )

    def _sums(self, total, part):
        """Adds a `Part`, but for products and logs."""
        weight = part.weight
        return total._replace(
            gradients=self._summed(total.gradients, part.gradients, weight),
            loss=total.loss + weight * part.loss,
            output_losses=total.output_losses + weight * part.output_losses,
            sq_norm=total.sq_norm + self._weighted_sq_norm(part),
            weight=total.weight + weight,
            examples=total.examples + part.examples,
            count=total.count + 1,
        )

    def _weighted_sq_norm(self, part):
        norm = self._dot(part.gradients, part.gradients, self._loss_scale())
        return tf.cast(part.weight, tf.float64) * norm

    def _backward(self, data):
        """Does what `Model.train_step` does before the update."""
        model = self._model
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            y_pred = keras_private.predict_for_training(model, x)
            losses = self._losses(x, y, y_pred, sample_weight)
            scaled = model.optimizer.scale_loss(losses[0])
        gradients = tape.gradient(scaled, model.trainable_weights)
        logs = model.compute_metrics(
            x, y, y_pred, sample_weight=sample_weight
        )
        examples = slicing.count_examples(x)
        weight = exactness.weight_of(
            self._kind, y_pred, sample_weight, examples
        )
        dense = [
            _dense(gradient, variable)
            for gradient, variable in zip(gradients, model.trainable_weights)
        ]
        losses = [tf.cast(loss, tf.float32) for loss in losses]
        return Part(dense, *losses, weight, examples, logs)

    def _losses(self, x, y, y_pred, sample_weight):
        """Computes the loss and, if there are several, that of each output.

        Keras adds the latter to its metrics batch by batch, each batch alike
        (compile_utils.py); so they wait here until the batch is complete.
        """
        trackers = self._trackers()
        with _put_back([one for each in trackers for one in each.variables]):
            for tracker in trackers:
                tracker.reset_state()
            loss = keras_private.compute_loss(
                self._model, x, y, y_pred, sample_weight
            )
            parts = [tracker.result() for tracker in trackers]
        return loss, tf.stack(parts) if parts else tf.zeros((0,))

    def _trackers(self):
        return keras_private.output_loss_metrics(self._model)

    def _summed(self, sums, gradients, weight):
        result = []
        for index, (total, gradient) in enumerate(zip(sums, gradients)):
            variable = self._model.trainable_weights[index]
            if gradient is None:
                result.append(total)
                continue
            self._with_gradient.add(index)
            if variable.overwrite_with_gradient:
                # float8: not a gradient but the new value of a scale, of
                # which Keras keeps the largest (base_optimizer.py).
                result.append(tf.maximum(total, gradient))
            else:
                weighted = tf.cast(weight, total.dtype) * tf.cast(
                    gradient, total.dtype
                )
                # Cutting loses the shape of an example; where that is 1, the
                # sum would not know it either.
                weighted.set_shape(total.shape)
                result.append(total + weighted)
        return result

    def _dot(self, first, second, scale):
        """Inner product, in float32 per tensor and float64 over all."""
        products = []
        for one, two, variable in zip(
            first, second, self._model.trainable_weights
        ):
            if one is not None and not variable.overwrite_with_gradient:
                one = tf.cast(one, tf.float32) / scale
                two = tf.cast(two, tf.float32) / scale
                products.append(
                    tf.cast(tf.reduce_sum(one * two), tf.float64)
                )
        return tf.add_n(products) if products else tf.zeros((), tf.float64)

    def _loss_scale(self):
        return tf.cast(
            self._model.optimizer.scale_loss(tf.ones((), tf.float32)),
            tf.float32,
        )

    def apply(self, total):
        """Makes the update: mean, norms, optimizer, loss metric.

        The rate must be in force already, see `learning_rate.applied`. Norms
        are taken before the optimizer clips. A gradient that is not finite
        goes to the optimizer as it is: `LossScaleOptimizer` skips it, any
        other treats it as plain `fit` would.

        Args:
            total: An `Accumulated` of at least one micro-batch.

        Returns:
            float64 tensor of shape (5,): the fields of `MicroBatchNorms`.
        """
        model = self._model
        mean = self._mean(total)
        norms = self._norms(total, mean)
        self._track_losses(total)
        if mean:  # A model may be frozen as a whole.
            model.optimizer.apply_gradients(
                list(zip(mean, model.trainable_weights))
            )
        return norms

    def _track_losses(self, total):
        divide = tf.math.divide_no_nan
        keras_private.track_loss(
            self._model, divide(total.loss, total.weight), total.examples
        )
        # As in Keras, which weights by a size that graphs do not know: each
        # batch alike, if there is one.
        weight = tf.cast(total.count > 0, tf.float32)
        if self._weighs_examples:
            weight = total.examples
        for index, tracker in enumerate(self._trackers()):
            mean = divide(total.output_losses[index], total.weight)
            tracker.update_state(mean, sample_weight=weight)

    def results(self, total):
        """Returns the results of the metrics, an update in progress included.

        Metrics of losses learn of an update when it is made; until the first
        one of an epoch they would say zero.

        Args:
            total: An `Accumulated`, with or without micro-batches.
        """
        with _put_back(self._loss_variables()):
            self._track_losses(total)
            return self._model.get_metrics_result()

    def _loss_variables(self):
        metrics = keras_private.loss_metrics(self._model)
        return [one for each in metrics for one in each.variables]

    def logs(self, total):
        """Returns the logs of an update, its own ones as means over examples.

        Args:
            total: An `Accumulated` of at least one micro-batch.
        """
        return {
            name: value / tf.cast(total.examples, value.dtype)
            for name, value in total.logs.items()
        }

    def norms(self, total):
        """Returns the norms of an update without making it.

        Args:
            total: An `Accumulated` of at least one micro-batch.

        Returns:
            float64 tensor of shape (5,): the fields of `MicroBatchNorms`.
        """
        return self._norms(total, self._mean(total))

    def leaving_no_trace(self):
        """Puts back what gradients change besides gradients.

        Forward passes move the statistics of BatchNorm, the seeds of dropout
        and the metrics. Measuring is to leave training as it would have been
        without.

        Returns:
            A context manager.
        """
        model = self._model
        return _put_back(
            [*model.non_trainable_variables, *model.metrics_variables]
        )

    def _mean(self, total):
        """Mean gradients; None where no micro-batch had one."""
        means = [None] * len(total.gradients)
        for index in self._with_gradient:
            means[index] = total.gradients[index]
            variable = self._model.trainable_weights[index]
            if not variable.overwrite_with_gradient:
                weight = tf.cast(total.weight, means[index].dtype)
                means[index] = tf.math.divide_no_nan(means[index], weight)
            means[index] = tf.cast(means[index], variable.dtype)
        return means

    def _norms(self, total, mean):
        scale = self._loss_scale()
        weight = tf.cast(total.weight, tf.float64)
        return tf.stack(
            [
                tf.math.divide_no_nan(total.sq_norm, weight),
                self._dot(mean, mean, scale),
                tf.cast(total.examples, tf.float64),
                tf.cast(total.count, tf.float64),
                total.products,
            ]
        )


@contextlib.contextmanager
def _put_back(variables):
    """Assigns the values that variables had before, also after an error."""
    held = [tf.identity(variable.value) for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, held):
            variable.assign(value)


def _sum_dtype(variable):
    """Half precision overflows or stalls in a sum of many gradients."""
    return "float64" if variable.dtype == "float64" else "float32"


def _dense(gradient, variable):
    """Sums the duplicate rows of an embedding's sparse gradient."""
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    return tf.math.unsorted_segment_sum(
        gradient.values, gradient.indices, variable.shape[0]
    )
