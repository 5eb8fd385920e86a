"""What Keras's `BackupAndRestore` leaves in a model, and where it can write."""

from keras.src.utils import file_utils

is_remote_path = file_utils.is_remote_path


def resume_at(model, epoch):
    """Lets the next `fit` start at an epoch.

    Keras notes in the model at which epoch to go on, and never forgets it
    (backup_and_restore.py).

    Args:
        model: A Keras model.
        epoch: Zero-based integer; None for the `initial_epoch` of `fit`.
    """
    model._initial_epoch = epoch


def resumes_at(model):
    """Returns the epoch that `resume_at`, or Keras, has noted, or None."""
    return model._initial_epoch
