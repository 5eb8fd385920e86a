"""What the data of `fit` take beside its steps, by where they lie."""

import math

import tensorflow as tf

from keras_batchsize import _memory_host
from keras_batchsize import _superbatches_sizes
from keras_batchsize import replicas
from keras_batchsize._superbatches_batched import DEFAULT_BATCH_SIZE
from keras_batchsize._superbatches_host import WAITING
from keras_batchsize._superbatches_sizes import MOST_BYTES

# Batches that there are at once: one in use, and two that a pipeline has read
# ahead.
BATCHES_HELD = 3
# TensorFlow begins with so many parallel calls where it may choose, or as many
# as there are cores if that is less (`GetAutotuneDefaultParallelism`).
_MOST_CALLS = 16


def bytes_beside_steps(examples, meter, accumulates):
    """Returns the bytes that lie in the memory of steps as long as they run.

    On an accelerator Keras puts arrays there as a whole, for plain `fit`; of
    several it takes the first, but all must try the same sizes. Of those that
    an `AdaptiveTrainer` trains on one superbatch lies there, of 256 MB at most.

    Args:
        examples: An `Examples`.
        meter: A `Meter`.
        accumulates: Whether an `AdaptiveTrainer` is to train.
    """
    if not meter.is_shared:
        if accumulates:
            return min(examples.superbatch_bytes, MOST_BYTES)
        return examples.accelerator_bytes
    waiting = examples.superbatch_bytes if accumulates else 0
    return examples.data_bytes + waiting


def batches_at_once(model, examples, meter, accumulates, size):
    """Returns how many batches lie in memory while one is trained on.

    Of arrays plain `fit` holds more, though no more than there are. Keras
    gathers them in a parallel `map`, which keeps as many as it makes at a time;
    `prefetch` keeps two: one at first, twice as many once that was not
    enough (prefetch_autotuner.cc); one is in use.

    Args:
        model: The Keras model.
        examples: An `Examples`.
        meter: A `Meter`.
        accumulates: Whether an `AdaptiveTrainer` is to train.
        size: Integer, examples per batch.
    """
    if accumulates or not (examples.data_bytes and meter.is_shared):
        return BATCHES_HELD
    of_epoch = math.ceil(examples.count / size)
    return max(BATCHES_HELD, min(_of_keras(model), of_epoch))


def _of_keras(model):
    """Returns how many batches Keras makes of arrays, and the one in use."""
    if replicas.workers(model) > 1:
        # They may have other processors, and must all try the same sizes.
        return _MOST_CALLS + 3
    _, cores = _memory_host.processor()
    return min(_MOST_CALLS, cores) + 3


def superbatch_bytes(model, told, examples):
    """Returns the bytes of the superbatches that `AdaptiveTrainer.fit` holds.

    Of the size that it chooses: one is in use, others wait, and one is made.

    Args:
        model: The Keras model.
        told: The `Batched` of the data.
        examples: Their `Examples`.

    Returns:
        Integer; 0 for arrays whose rows a step gathers by itself.
    """
    is_arrays, each = told.batch_size is None, examples.bytes_each
    if is_arrays:
        if not told.bytes_each:
            return 0
        told = told._replace(bytes_each=each)
    size = _superbatches_sizes.superbatch_size(
        None,
        DEFAULT_BATCH_SIZE if is_arrays else told.batch_size,
        examples.count,
        replicas.count(model),
        told,
    )
    at_once = _of_keras(model) if is_arrays else WAITING + 2
    return int(min(at_once * size, examples.count) * each)


def bytes_on_accelerator(batch, count):
    """Returns the bytes of arrays without those that stay on the host.

    Args:
        batch: Nested structure of dense tensors, a batch of one example.
        count: Number of examples.
    """
    leaves = [one for one in tf.nest.flatten(batch) if one is not None]
    return count * sum(
        math.prod(leaf.shape) * leaf.dtype.size
        for leaf in leaves
        # Kernels of accelerators take integers of 32 bits from there.
        if leaf.dtype != tf.int32
    )
