"""Data that wait for training, in the memory of the host.

Part of `superbatches.py`.
"""

import tensorflow as tf

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


def in_superbatches(dataset, sizes):
    """Cuts batches anew, and reads a few superbatches ahead.

    A number that TensorFlow chose could grow, and with it the memory that
    they take: each may hold 256 MB.

    Args:
        dataset: A `tf.data.Dataset` of batches.
        sizes: Examples in the superbatches, which repeat.
    """
    return dataset.rebatch(sizes).prefetch(WAITING)
