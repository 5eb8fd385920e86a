"""Files of a backup, each whole at any moment.

A process that is killed leaves what it was writing half-written; so does an
exception in it, and of that HDF5 even makes a file which can be opened. (h5py
comes with Keras, which writes weights by it.)
"""

import contextlib
import json
import os
import tempfile

import h5py
import numpy as np
import tensorflow as tf

from keras_batchsize import keras_private

# Beside the groups of Keras, whose names have no dot at the root.
_STATE = "keras_batchsize.json"


@contextlib.contextmanager
def replacing(path):
    """Puts a new file in the place of another once it is complete.

    Args:
        path: Where it belongs, also on a remote file system.

    Yields:
        Path of a local file to write. It ends like `path`.
    """
    folder, name = os.path.split(path)
    new = tf.io.gfile.join(folder, f"new.{name}")
    if keras_private.is_remote_path(path):
        with tempfile.TemporaryDirectory() as local:
            yield os.path.join(local, name)
            tf.io.gfile.copy(os.path.join(local, name), new, overwrite=True)
    else:
        yield new
        with open(new, "rb+") as file:
            # A machine that goes down would keep the name and lose the rest.
            os.fsync(file.fileno())
    tf.io.gfile.rename(new, path, overwrite=True)


def add_state(path, text):
    """Adds a text to a local file of weights.

    In one file with the weights it is theirs, whichever file is lost, gone
    back to or copied. Keras reads what it knows of.

    Args:
        path: Path of what `Model.save_weights` has written.
        text: What to add.
    """
    with h5py.File(path, "r+") as file:
        # Bytes are numbers: Keras's `KerasFileEditor` knows no texts.
        file.create_dataset(_STATE, data=np.frombuffer(text.encode(), "uint8"))


def state_in(path):
    """Returns the JSON that `add_state` has added to weights, or None.

    Args:
        path: Path of the weights, also on a remote file system.
    """
    with tf.io.gfile.GFile(path, "rb") as whole, h5py.File(whole, "r") as file:
        if _STATE not in file:
            return None
        return json.loads(file[_STATE][()].tobytes())
