"""Data that wait for training, in the memory of the host.

Part of `superbatches.py`.
"""

import tensorflow as tf

from keras_batchsize import keras_private

# Superbatches that wait for the one in use to be done. Of each there are many
# batches, which even out how long they take to read.
WAITING = 2


def dataset_of(adapter):
    """Returns the dataset of a Keras adapter, with its data on the host.

    Keras makes constants of arrays, and names no device. TensorFlow puts all
    but int32 on an accelerator, if there is one, for as long as the dataset
    lives (`from_tensors` in array_data_adapter.py); what reads them is on the
    host, and copies them back.

    Args:
        adapter: What `data_adapter_for` returned.

    Returns:
        A `tf.data.Dataset` or `tf.distribute.DistributedDataset`.
    """
    with tf.device("CPU:0"):
        return adapter.get_tf_dataset()


def may_read_ahead(adapter):
    """Whether data may be read before they are asked for.

    Keras stops the workers of a `PyDataset` at the end of an epoch. If it is
    read on then, in another thread, the reading ends, and the next epoch fails.

    Args:
        adapter: What `data_adapter_for` returned.
    """
    is_py_dataset = isinstance(adapter, keras_private.PyDatasetAdapter)
    return not (is_py_dataset and adapter.enqueuer is not None)


def in_superbatches(dataset, sizes, ahead=True):
    """Cuts batches anew, and reads a few superbatches ahead.

    A number that TensorFlow chose could grow, and with it the memory that
    they take: each may hold 256 MB.

    Args:
        dataset: A `tf.data.Dataset` of batches.
        sizes: Examples in the superbatches, which repeat.
        ahead: Whether superbatches may be read before they are asked for.
    """
    cut = dataset.rebatch(sizes)
    return cut.prefetch(WAITING) if ahead else cut
