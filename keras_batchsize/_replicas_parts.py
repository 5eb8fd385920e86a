"""What a replica finds of its examples in a superbatch.

Part of `replicas.py`. TensorFlow's distributed iterators hand over shares, and
takes a tenth of a second and more to make one. Where replicas and host share
their memory, a plain iterator does: each replica sees the whole superbatch and
takes from it what is its own.
"""

import keras
import tensorflow as tf

from keras_batchsize import slicing


def own_index():
    """Returns which replica this is, in a replica context."""
    context = tf.distribute.get_replica_context()
    return tf.cast(context.replica_id_in_sync_group, tf.int32)


class Shares:
    """Each replica holds the examples that are its own, and no others.

    Args:
        strategy: A `tf.distribute.Strategy`.
        examples: Function (share, start, size) that returns a batch.
    """

    def __init__(self, strategy, examples=slicing.examples):
        self._strategy = strategy
        self._replicas = strategy.num_replicas_in_sync
        self._examples = examples

    def counts(self, data):
        """Returns how many examples each replica of this worker holds.

        Args:
            data: The superbatch, as a distributed iterator returns it.

        Returns:
            List of integers.
        """
        return [slicing.number_of_examples(one) for one in self.local(data)]

    def local(self, data):
        """Returns the shares of the replicas of this worker.

        Args:
            data: The superbatch.

        Returns:
            List of nested structures of tensors.
        """
        strategy = self._strategy

        def share(index):
            return keras.tree.map_structure(
                lambda leaf: (
                    None
                    if leaf is None
                    else strategy.experimental_local_results(leaf)[index]
                ),
                data,
            )

        return list(map(share, range(len(strategy.extended.worker_devices))))

    def extent(self, data, gathered):
        """Returns the examples of a superbatch, and where they end.

        Args:
            data: The superbatch.
            gathered: `Workers.gathered`.

        Returns:
            Tuple of two integers, over all replicas.
        """
        counts = gathered(self.counts(data))
        return sum(counts), end_of(counts)

    def specs(self, data):
        """Returns the types of superbatches of any number of examples."""
        shares = self.local(data)

        def spec(leaf, *parts):
            parts = [slicing.batch_spec(one) for one in parts]
            if not isinstance(leaf, tf.distribute.DistributedValues):
                return parts[0]
            return type(tf.type_spec_from_value(leaf))(*parts)

        return keras.tree.map_structure(spec, data, *shares)

    def sample(self, data, size):
        """Returns a few examples of one replica, at most `size`."""
        share = max(self.local(data), key=slicing.number_of_examples)
        total = slicing.number_of_examples(share)
        return self._examples(share, 0, min(total, size))

    def of_replica(self, share, start, stop):
        """Returns what this replica holds of the examples [start, stop).

        To be called in a replica context.

        Args:
            share: What the replica sees of the superbatch.
            start: Scalar int32 tensor, position in the whole superbatch.
            stop: Likewise.

        Returns:
            Tuple of a function that returns them as a batch, and their number,
            which may be zero.
        """
        index, held = own_index(), slicing.count_examples(share)
        first, last = (
            tf.minimum(
                (position - index + self._replicas - 1) // self._replicas, held
            )
            for position in (start, stop)
        )
        number = last - first
        return lambda: self._examples(share, first, number), number


class Whole:
    """Each replica sees the whole superbatch, or the numbers of its rows.

    Args:
        strategy: A `tf.distribute.Strategy`.
        examples: Function (superbatch, start, size) that returns a batch.
    """

    def __init__(self, strategy, examples=slicing.examples):
        self._replicas = strategy.num_replicas_in_sync
        self._examples = examples

    def extent(self, data, gathered):
        """Returns the number of examples, and where they end: as many."""
        total = slicing.number_of_examples(data)
        return total, total

    def specs(self, data):
        """Returns the types of superbatches of any number of examples."""
        return keras.tree.map_structure(slicing.batch_spec, data)

    def sample(self, data, size):
        """Returns a few examples, at most `size`."""
        total = slicing.number_of_examples(data)
        return self._examples(data, 0, min(total, size))

    def of_replica(self, data, start, stop):
        """Returns which of the examples [start, stop) are this replica's.

        See `Shares.of_replica`.
        """
        step = self._replicas
        first = tf.minimum(start + (own_index() - start) % step, stop)
        number = (stop - first + step - 1) // step

        def batch():
            own = slicing.every_nth(data, first, stop, step)
            return self._examples(own, 0, number)

        return batch, number


def end_of(counts):
    """Returns the position behind the last example of any share.

    Args:
        counts: Examples in the share of each replica.

    Returns:
        Integer: the number of examples, if they are dealt out evenly.
    """
    replicas = len(counts)
    ends = [
        (held - 1) * replicas + index + 1
        for index, held in enumerate(counts)
        if held
    ]
    return max(ends, default=0)
