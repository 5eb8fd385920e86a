"""`BackupAndRestore`: Keras's, and the batch size's state with it."""

import json

import keras
import tensorflow as tf

from keras_batchsize._callbacks_base import put_in_order
from keras_batchsize._callbacks_base import train_function_of


class BackupAndRestore(keras.callbacks.BackupAndRestore):
    """Keras's callback of that name, with the batch size's state added.

    Beside the weights it saves the batch size, the noise statistics, the
    clocks and the policy's state, so that an interrupted training goes on as
    if it had not been. Takes the arguments of
    `keras.callbacks.BackupAndRestore`. Of several workers the chief writes,
    and all read: the folder must be one that all of them see.
    """

    _STATE_FILE = "batch_size.json"

    def on_train_begin(self, logs=None):
        """Loads the weights, and the state for the first epoch."""
        put_in_order(self.model)  # Its momentum, before that is loaded.
        super().on_train_begin(logs)
        self._state = None
        path = self._state_path()
        if tf.io.gfile.exists(path):
            with tf.io.gfile.GFile(path) as file:
                self._state = json.loads(file.read())

    def on_epoch_begin(self, epoch, logs=None):
        """Hands the state over, once every callback has begun."""
        super().on_epoch_begin(epoch, logs)
        function = train_function_of(self.model)
        if function is not None:
            function.backup_dir = str(self.backup_dir)
            if self._state is not None:
                function.set_state(self._state)
        self._state = None

    def on_epoch_end(self, epoch, logs=None):
        """Saves, after the policy has been told of the epoch."""
        function = train_function_of(self.model)
        if function is not None:
            function.on_epoch_end(epoch, logs)
        super().on_epoch_end(epoch, logs)

    def _save_model(self):
        """Adds a file to what Keras saves (a private hook of Keras)."""
        if not self._is_chief():
            return
        super()._save_model()
        function = train_function_of(self.model)
        if function is None or function.controller is None:
            return
        path = self._state_path()
        with tf.io.gfile.GFile(path + ".new", "w") as file:
            file.write(json.dumps(function.get_state()))
        tf.io.gfile.rename(path + ".new", path, overwrite=True)

    def on_train_end(self, logs=None):
        """Removes the folder, unless it is to be kept."""
        if self._is_chief():
            super().on_train_end(logs)

    def _is_chief(self):
        """Whether this worker, of several, is the one that writes."""
        return self.model.distribute_strategy.extended.should_checkpoint

    def _state_path(self):
        return tf.io.gfile.join(str(self.backup_dir), self._STATE_FILE)
