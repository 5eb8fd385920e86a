"""Several workers that must decide alike.

Each worker runs the same program with a controller of its own. They stay in
step because each controller sees the same numbers: what is summed in the graph
is the same everywhere, and the rest, times above all, is exchanged here, once
per superbatch.
"""

import math

import numpy as np
import tensorflow as tf


class Workers:
    """The processes that a strategy spans; one, most of the time.

    Args:
        strategy: A `tf.distribute.Strategy`.
    """

    def __init__(self, strategy):
        self._strategy = strategy
        self._local = len(strategy.extended.worker_devices)
        self.number = strategy.num_replicas_in_sync // self._local
        self._gather = tf.function(
            lambda values: strategy.gather(values, axis=0), autograph=False
        )

    def gathered(self, values):
        """Returns a number of each replica, in the order of the replicas.

        Args:
            values: A number of each replica of this worker.

        Returns:
            List of as many numbers as there are replicas.
        """
        if self.number == 1:
            return list(values)
        rows = self._exchanged([[float(value)] for value in values])
        return [type(values[0])(row[0]) for row in rows]

    def slowest(self, seconds):
        """Returns the longest of each worker's times.

        Args:
            seconds: Sequence of times of this worker. One that is not a
                positive number tells nothing.

        Returns:
            List of as many floats, the same on every worker.
        """
        known = [
            float(one) if math.isfinite(one) and one > 0.0 else 0.0
            for one in seconds
        ]
        if self.number == 1:
            return known
        rows = self._exchanged([known] * self._local)
        return [float(one) for one in rows.max(axis=0)]

    def _exchanged(self, rows):
        """Returns an array with a row of each replica of all workers."""
        values = self._strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(
                rows[context.replica_id_in_sync_group % self._local],
                tf.float64,
            )[None]
        )
        return np.asarray(self._gather(values))
