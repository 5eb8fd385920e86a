"""`BackupAndRestore`: Keras's, and the batch size's state with it."""

import json

import keras
import tensorflow as tf

from keras_batchsize import keras_private
from keras_batchsize._callbacks_backup_files import add_state
from keras_batchsize._callbacks_backup_files import replacing
from keras_batchsize._callbacks_backup_files import state_in
from keras_batchsize._callbacks_base import put_in_order
from keras_batchsize._callbacks_base import train_function_of


class BackupAndRestore(keras.callbacks.BackupAndRestore):
    """Keras's callback of that name, with the batch size's state added.

    With the weights it saves the batch size, the noise statistics, the clocks
    and the policy's state, so that an interrupted training goes on as if it
    had not been. All that is one file, which takes the place of the last one
    when it is complete: whenever training is killed, there is a backup to go
    on from, once there was one. The other file is for Keras.
    Takes the arguments of `keras.callbacks.BackupAndRestore`. Of several
    workers the chief writes, and all read: the folder must be one that all of
    them see.

    Attributes:
        state: The batch size's state that was found with the weights; None
            if there was none, or once training has taken it over.
    """

    # Where Keras looks for them.
    _WEIGHTS_FILE = "latest.weights.h5"
    _METADATA_FILE = "training_metadata.json"

    def on_train_begin(self, logs=None):
        """Loads the weights, and the state for the first epoch."""
        put_in_order(self.model)  # Its momentum, before that is loaded.
        keras_private.resume_at(self.model, None)
        super().on_train_begin(logs)
        self.state, found, weights = None, None, self._path(self._WEIGHTS_FILE)
        if tf.io.gfile.exists(weights):
            found = state_in(weights)
        else:
            # Where an epoch is noted, it is that of weights that are gone.
            keras_private.resume_at(self.model, None)
        if found is not None:
            keras_private.resume_at(self.model, found["epoch"])
            self.state = found["batch_size"]

    def on_epoch_begin(self, epoch, logs=None):
        """Hands the state over, once every callback has begun."""
        super().on_epoch_begin(epoch, logs)
        # `fit` has read where to start. Now, as it may end in an exception.
        keras_private.resume_at(self.model, None)
        # Keras would count from 0, also where training was resumed.
        self._epoch = epoch
        self._hand_over()

    def on_train_batch_begin(self, batch, logs=None):
        """Hands it to a train function that a later callback has made."""
        super().on_train_batch_begin(batch, logs)
        self._hand_over()

    def _hand_over(self):
        function = train_function_of(self.model)
        if function is None:
            return
        function.backup_dir = str(self.backup_dir)
        if self.state is not None:
            function.set_state(self.state)
        self.state = None

    def on_train_batch_end(self, batch, logs=None):
        """Saves, if it is time to."""
        self._batch = batch
        super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch, logs=None):
        """Saves, after the policy has been told of the epoch."""
        function = train_function_of(self.model)
        if function is not None:
            function.on_epoch_end(epoch, logs)
        self._epoch, self._batch = epoch + 1, 0
        super().on_epoch_end(epoch, logs)

    def _save_model(self):
        """Saves as Keras does, in whose place it is (a private hook)."""
        if not self._is_chief():
            return
        state = json.dumps({"epoch": self._epoch, "batch_size": self._state()})
        weights = self._path(self._WEIGHTS_FILE)
        tf.io.gfile.makedirs(str(self.backup_dir))
        if self.double_checkpoint and tf.io.gfile.exists(weights):
            with replacing(weights + ".bkp") as new:
                tf.io.gfile.copy(weights, new, overwrite=True)
        with replacing(weights) as new:
            self.model.save_weights(new, overwrite=True)
            add_state(new, state)
        # For Keras's own callback; this one knows it from the weights' file.
        with replacing(self._path(self._METADATA_FILE)) as new:
            with tf.io.gfile.GFile(new, "w") as file:
                metadata = {"epoch": self._epoch, "batch": self._batch}
                file.write(json.dumps(metadata))

    def _state(self):
        """Returns the batch size's state now, None if nothing follows it."""
        function = train_function_of(self.model)
        if function is None or function.controller is None:
            return None
        return function.get_state()

    def on_train_end(self, logs=None):
        """Removes the folder, unless it is to be kept."""
        # Where no epoch was left to train.
        keras_private.resume_at(self.model, None)
        if self._is_chief():
            super().on_train_end(logs)

    def _is_chief(self):
        """Whether this worker, of several, is the one that writes."""
        return self.model.distribute_strategy.extended.should_checkpoint

    def _path(self, name):
        return tf.io.gfile.join(str(self.backup_dir), name)
