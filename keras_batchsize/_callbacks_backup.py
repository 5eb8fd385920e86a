"""`BackupAndRestore`: Keras's, and the batch size's state with it."""

import json
import warnings

import keras
import tensorflow as tf

from keras_batchsize import keras_private
from keras_batchsize._callbacks_base import put_in_order
from keras_batchsize._callbacks_base import train_function_of
from keras_batchsize._train_function_timing import number


class BackupAndRestore(keras.callbacks.BackupAndRestore):
    """Keras's callback of that name, with the batch size's state added.

    Beside the weights it saves the batch size, the noise statistics, the
    clocks and the policy's state, so that an interrupted training goes on as
    if it had not been. The state before that is kept, too: whichever weights
    Keras finds or goes back to (`double_checkpoint=True`), theirs is used.
    Takes the arguments of `keras.callbacks.BackupAndRestore`. Of several
    workers the chief writes, and all read: the folder must be one that all of
    them see.
    """

    _STATE_FILE = "batch_size.json"

    def on_train_begin(self, logs=None):
        """Loads the weights, and the state for the first epoch."""
        put_in_order(self.model)  # Its momentum, before that is loaded.
        keras_private.forget_resumption(self.model)
        super().on_train_begin(logs)
        self._state = self._state_of_weights()

    def on_epoch_begin(self, epoch, logs=None):
        """Hands the state over, once every callback has begun."""
        super().on_epoch_begin(epoch, logs)
        # `fit` has read where to start. Now, as it may end in an exception.
        keras_private.forget_resumption(self.model)
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
        function = train_function_of(self.model)
        if function is not None and function.controller is not None:
            # First: wherever a crash comes, the state of the weights that it
            # leaves is there.
            self._write_state(function.get_state())
        super()._save_model()

    def _write_state(self, state):
        path = self._state_path()
        tf.io.gfile.makedirs(str(self.backup_dir))
        with tf.io.gfile.GFile(path + ".new", "w") as file:
            file.write(json.dumps({**state, "iterations": self._iterations()}))
        if tf.io.gfile.exists(path):
            tf.io.gfile.rename(path, path + ".bkp", overwrite=True)
        tf.io.gfile.rename(path + ".new", path, overwrite=True)

    def _state_of_weights(self):
        """Returns the state that was saved with the weights, or None."""
        path, iterations = self._state_path(), self._iterations()
        files = [
            one for one in (path, path + ".bkp") if tf.io.gfile.exists(one)
        ]
        for file in files:
            state = _read(file)
            if state and state["iterations"] == iterations:
                if file != path and self._is_chief():
                    # As Keras does: the other was of weights that are lost.
                    tf.io.gfile.copy(file, path, overwrite=True)
                return state
        if files and iterations:
            warnings.warn(
                "Training goes on from the weights only, its batch size and "
                "noise statistics begin anew: no state in "
                f"{str(self.backup_dir)!r} was saved with these weights, of "
                f"{iterations} updates.",
                RuntimeWarning,
                stacklevel=2,
            )
        return None

    def _iterations(self):
        """Updates made: the weights of a backup are known by them."""
        optimizer = self.model.optimizer
        # A `train_step` of one's own may do without.
        return 0 if optimizer is None else number(optimizer.iterations)

    def on_train_end(self, logs=None):
        """Removes the folder, unless it is to be kept."""
        # Where no epoch was left to train.
        keras_private.forget_resumption(self.model)
        if self._is_chief():
            super().on_train_end(logs)

    def _is_chief(self):
        """Whether this worker, of several, is the one that writes."""
        return self.model.distribute_strategy.extended.should_checkpoint

    def _state_path(self):
        return tf.io.gfile.join(str(self.backup_dir), self._STATE_FILE)


def _read(path):
    """Returns the JSON of a file, None where it is damaged."""
    with tf.io.gfile.GFile(path) as file:
        try:
            return json.loads(file.read())
        except ValueError:
            return None
