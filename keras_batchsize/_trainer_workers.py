"""What the workers of a training must have alike, before and after a backup."""

import keras

from keras_batchsize import distributed
from keras_batchsize import keras_private
from keras_batchsize import replicas
from keras_batchsize._superbatches_alike import facts_of_validation
from keras_batchsize.callbacks import BackupAndRestore


def backups_in(callbacks):
    """Returns the callbacks that restore backups, Keras's own among them.

    Args:
        callbacks: List of Keras callbacks.
    """
    kind = keras.callbacks.BackupAndRestore
    return [one for one in callbacks if isinstance(one, kind)]


def check_workers(trainer, controller, superbatches, callbacks, arguments):
    """Raises on every worker if they are about to train differently.

    Args:
        trainer: The `AdaptiveTrainer`.
        controller: Its `Controller`.
        superbatches: The `Superbatches` to train on.
        callbacks: List of Keras callbacks.
        arguments: Dict of what else `Model.fit` is called with.

    Raises:
        ValueError: If workers differ, or TF_CONFIG is missing.
        RuntimeError: If a worker does not come.
    """

    def facts_of_data():
        return {**superbatches.facts(), **facts_of_validation(**arguments)}

    distributed.check_alike(
        trainer.model,
        facts_of_data,
        epochs=arguments["epochs"],
        initial_epoch=arguments["initial_epoch"],
        policy=trainer.policy,
        learning_rate_scaling=trainer.learning_rate_scaling,
        measure_every=trainer.measure_every,
        batch_sizes=controller.ladder.sizes,
        # Those of backup_dir among them. Each compares what it has restored.
        BackupAndRestore=len(backups_in(callbacks)),
    )


def with_restored_compared(callbacks, model):
    """Adds a `RestoredAlike` where several workers restore backups.

    Args:
        callbacks: List of Keras callbacks.
        model: The Keras model to train.

    Returns:
        List of Keras callbacks.
    """
    backups = backups_in(callbacks)
    if not backups or replicas.workers(model) == 1:
        return callbacks
    return [*callbacks, RestoredAlike(backups)]


class RestoredAlike(keras.callbacks.Callback):
    """Compares what workers have restored, and lets them wait for each other.

    To stand behind all callbacks that restore: a worker whose folder holds no
    backup, or another one, would train on by itself. Where no epoch is left
    the first worker removes the folder, which the others must have read.

    Args:
        backups: List of `BackupAndRestore` callbacks, ours or Keras's.
    """

    def __init__(self, backups):
        super().__init__()
        self._backups = backups

    def on_train_begin(self, logs=None):
        """Raises on every worker if they have restored different states."""
        states = [
            one.state for one in self._backups
            if isinstance(one, BackupAndRestore)
        ]
        try:
            distributed.check_restored(self.model, states)
        except BaseException:
            # No epoch begins, with which it would be forgotten.
            keras_private.resume_at(self.model, None)
            raise
