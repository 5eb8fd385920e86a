"""Gradients of an update that several replicas share: one sum over all.

Part of `gradients.py`. Whatever Keras does for several replicas is undone
here: it divides losses by R, clips before gradients are summed (so that a norm
of 1 becomes one of R), sums each gradient by itself, and looks for infinities
on the first replica only. Here one packed vector is summed, and what follows
is, on every replica, what one device would do.
"""

import tensorflow as tf

from keras_batchsize.gradients import Accumulated
from keras_batchsize.gradients import GradientAccumulator


class ReplicatedGradients(GradientAccumulator):
    """Sums gradients on each replica, and over all at the update.

    `zeros`, `add`, `add_sums`, `apply` and `norms` are to be called in a
    replica context.

    Args:
        model: A compiled Keras model, made under a strategy.
        measures: Whether norms are wanted.
        weighs_examples: As for `GradientAccumulator`.
    """

    def __init__(self, model, measures, weighs_examples):
        super().__init__(model, weighs_examples)
        self._replicas = model.distribute_strategy.num_replicas_in_sync
        self._measures = measures

    def add(self, total, data):
        """Adds a micro-batch of this replica; see `GradientAccumulator.add`.

        Products of gradients on different replicas cannot be had from one
        sum, so that they are left out: how precise norms are follows from how
        they scatter from update to update.
        """
        if self._replicas == 1:
            return super().add(total, data)
        return self.add_sums(total, data)

    def add_sums(self, total, data):
        """Adds a micro-batch without products, of which a first one has none.

        Args:
            total: An `Accumulated`.
            data: The micro-batch, as `train_step` receives a batch.

        Returns:
            The new `Accumulated`.
        """
        return self._sums(total, self._backward(data))

    def _weighted_sq_norm(self, part):
        if not self._measures:
            return tf.zeros((), tf.float64)
        return super()._weighted_sq_norm(part)

    def _losses(self, x, y, y_pred, sample_weight):
        loss, outputs = super()._losses(x, y, y_pred, sample_weight)
        return loss * tf.cast(self._replicas, loss.dtype), outputs

    def apply(self, total):
        """Makes the update: sum over replicas, mean, norms, optimizer.

        The learning rate must be in force already, and the optimizer know that
        gradients are sums: replicas are traced in turns, and what one of them
        exchanges in the optimizer all of them see.

        Args:
            total: This replica's `Accumulated`.

        Returns:
            float64 tensor of shape (`columns`,): the fields of
            `MicroBatchNorms`.
        """
        return super().apply(self.over_replicas(total))

    def _track_losses(self, total):
        # Metrics are summed over the replicas.
        examples = tf.cast(total.examples, tf.float32) / self._replicas
        super()._track_losses(total._replace(examples=examples))

    def track_pending(self, total):
        """Lets metrics of losses see an update in progress, for a while.

        Args:
            total: This replica's `Accumulated`.

        Returns:
            What they held, for `untrack`.
        """
        held = [tf.identity(one.value) for one in self._loss_variables()]
        # Its gradients stay where they are.
        self._track_losses(self.over_replicas(total._replace(gradients=[])))
        return held

    def untrack(self, values):
        """Assigns what `track_pending` returned."""
        for variable, value in zip(self._loss_variables(), values):
            variable.assign(value)

    def _norms(self, total, mean):
        if not self._measures:
            mean = []
        return super()._norms(total, mean)[: self.columns]

    @property
    def columns(self):
        """Fields of `MicroBatchNorms` that there are: all but `products`."""
        return 5 if self._replicas == 1 else 4

    def norms(self, total):
        """Returns the norms of an update without making it."""
        return super().norms(self.over_replicas(total))

    def held(self):
        """Returns what this replica holds besides weights, to `put_back`."""
        return [tf.identity(one.value) for one in self._changing()]

    def put_back(self, values):
        """Assigns what `held` returned."""
        for variable, value in zip(self._changing(), values):
            variable.assign(value)

    def _changing(self):
        model = self._model
        return [*model.non_trainable_variables, *model.metrics_variables]

    def over_replicas(self, total):
        """Sums over all replicas, in one all-reduce.

        Args:
            total: This replica's `Accumulated`.

        Returns:
            The `Accumulated` of all, the same on each.
        """
        context = tf.distribute.get_replica_context()
        parts = [
            self._in_own_row(one, variable)
            for one, variable in zip(
                total.gradients, self._model.trainable_weights
            )
        ]
        parts += [total.loss, total.output_losses, total.sq_norm]
        parts += [total.weight, total.examples, total.count]
        dtype = tf.float32
        if any(one.dtype == tf.float64 for one in total.gradients):
            dtype = tf.float64
        packed = tf.concat(
            [tf.cast(tf.reshape(one, [-1]), dtype) for one in parts], axis=0
        )
        packed = context.all_reduce(tf.distribute.ReduceOp.SUM, packed)
        sizes = [one.shape.num_elements() for one in parts]
        summed = [
            tf.cast(tf.reshape(flat, part.shape), part.dtype)
            for flat, part in zip(tf.split(packed, sizes), parts)
        ]
        number = len(total.gradients)
        gradients = [
            tf.reduce_max(one, 0) if variable.overwrite_with_gradient else one
            for one, variable in zip(
                summed, self._model.trainable_weights
            )
        ]
        return Accumulated(
            gradients, *summed[number : number + 3], total.products,
            *summed[number + 3 :], total.logs,
        )

    def _in_own_row(self, gradient, variable):
        """Leaves to each replica a row, where the largest is asked for."""
        if not variable.overwrite_with_gradient:
            return gradient
        context = tf.distribute.get_replica_context()
        row = tf.one_hot(
            context.replica_id_in_sync_group, self._replicas, dtype=bool,
            on_value=True, off_value=False,
        )
        row = tf.reshape(row, [-1] + [1] * len(gradient.shape))
        return tf.where(row, gradient[None], tf.zeros_like(gradient)[None])
