"""The callbacks that a trainer adds to those of its user."""

import keras

from keras_batchsize._trainer_workers import backups_in
from keras_batchsize._trainer_workers import with_restored_compared
from keras_batchsize.callbacks import BackupAndRestore
from keras_batchsize.callbacks import BatchSizeTensorBoard
from keras_batchsize.callbacks import DynamicBatchSize
from keras_batchsize.callbacks import ExamplesProgbarLogger
from keras_batchsize.callbacks import LearningRateScaling


class TrainerBatchSize(DynamicBatchSize):
    """`DynamicBatchSize` with a controller that outlives one `fit`.

    Args:
        controller: The trainer's `Controller`.
        superbatches: The `Superbatches` that `fit` trains on.
        kept_steps: The trainer's `KeptSteps`.
        last_optimizer: The trainer's `LastOptimizer`.
        verbose: 1 to print a line at each change.
    """

    # The trainer's `fit` and `_fit` stand before that of Keras.
    _depth = DynamicBatchSize._depth + 2

    def __init__(
        self, controller, superbatches, kept_steps, last_optimizer, verbose
    ):
        super().__init__(controller.policy, controller.ladder.base)
        self.verbose = verbose
        self._kept_steps = kept_steps
        self._last_optimizer = last_optimizer
        self._takes_the_rest = superbatches.may_hold_more
        self._examples_per_epoch = superbatches.examples_per_epoch
        self._fewer = superbatches.fewer
        self._has_static_sizes = superbatches.has_static_sizes
        self.examples = superbatches.examples
        self._controller = controller

    def make_controller(self, superbatch_size):
        """Returns the trainer's controller."""
        # Another callback may have loaded a backup, Keras's own does.
        self._last_optimizer.tell_if_earlier(self.model, self._controller.clock)
        return self._controller

    def look_for_backups(self, callbacks):
        """Takes note of where backups go, Keras's own among them.

        Args:
            callbacks: List of Keras callbacks.
        """
        for one in backups_in(callbacks):
            self._backup_dir = str(one.backup_dir)


def callbacks_of(trainer, given, sizes, superbatches, verbose):
    """Returns the callbacks of a `fit`, ours first.

    Args:
        trainer: The `AdaptiveTrainer`.
        given: Its user's callbacks, as in `Model.fit`.
        sizes: The `TrainerBatchSize`.
        superbatches: The `Superbatches` to train on.
        verbose: As in `Model.fit`.

    Returns:
        List of Keras callbacks.
    """
    if isinstance(given, keras.callbacks.CallbackList):
        given = given.callbacks
    given = keras.tree.flatten(given) if given else []
    ours = [sizes, LearningRateScaling(trainer.learning_rate_scaling)]
    if trainer.tensorboard is not None:
        given.append(trainer.tensorboard)
    if trainer.backup_dir is not None:
        given.append(BackupAndRestore(trainer.backup_dir))
    sizes.look_for_backups(given)
    has_bar = any(
        isinstance(one, keras.callbacks.ProgbarLogger) for one in given
    )
    if verbose != 0 and not has_bar:
        given.append(ExamplesProgbarLogger(superbatches.examples_per_epoch))
    return with_restored_compared(ours + given, trainer.model)


def board_of(tensorboard):
    """Returns the `BatchSizeTensorBoard` of a trainer's argument, or None.

    Args:
        tensorboard: A folder, a `keras.callbacks.TensorBoard`, or None.
    """
    if tensorboard is None:
        return None
    if isinstance(tensorboard, keras.callbacks.TensorBoard):
        return BatchSizeTensorBoard(tensorboard=tensorboard)
    return BatchSizeTensorBoard(tensorboard)
