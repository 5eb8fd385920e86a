"""Going on after memory ran out: the same superbatch again, in smaller parts.

A step that failed half-way has changed some variables already. Their values
are held while it runs, so that it can be repeated as if nothing had been:
nothing is lost, nothing trained on twice. Under XLA this is also what keeps the
process whole, see `out_of_memory`.
"""

import gc
import math
import warnings

import tensorflow as tf

from keras_batchsize import keras_private
from keras_batchsize import model_state
from keras_batchsize import out_of_memory
from keras_batchsize import replicas

# Holding costs one more copy of the variables while a superbatch is trained on.
# Up to so many bytes always, where memory may run out at any time; beyond, and
# elsewhere, only until a size has run.
_HELD_ALWAYS = 2**28
# Calls after which a size counts as one that fits.
_PROVEN_AFTER = 2


class VariablesFreed(RuntimeError):
    """Raised where any use of a variable may end the process."""


class MemoryGuard:
    """Runs superbatches, and repeats one that ran out of memory.

    Args:
        model: The Keras model.
        is_alone: Whether no other worker takes part, which would wait for
            this one in the middle of an update.
    """

    def __init__(self, model, is_alone=True):
        self._model = model
        self._is_alone = is_alone
        self._is_replicated = replicas.strategy_of(model) is not None
        self._held_always = (
            _HELD_ALWAYS if out_of_memory.raises_when_exhausted() else 0
        )
        self._succeeded = {}

    def run(self, train, key, shrink, backup_dir=None):
        """Calls `train` until there is memory enough.

        Args:
            train: Function without arguments.
            key: What is run: calls with the same key need the same memory.
            shrink: Function without arguments that lets `train` need less
                and returns the new key; it raises if there is no way.
            backup_dir: Folder that backups go to, None if not known.

        Returns:
            What `train` returned.

        Raises:
            RuntimeError: If the variables are not what they were, and were too
                large to be held, or if other workers wait; `VariablesFreed`
                where XLA has taken them apart.
        """
        while True:
            held = self._hold(key)
            try:
                result = train()
            except Exception as error:
                if not out_of_memory.is_out_of_memory(error):
                    raise
                if held is None or not self._is_alone:
                    self._give_up(error, backup_dir)
            else:
                self._succeeded[key] = self._succeeded.get(key, 0) + 1
                return result
            # Only now has the error let go of the tensors of its step.
            gc.collect()
            held.put_back()
            key = shrink()

    def _hold(self, key):
        if not (self._is_alone or self._compiles()):
            return None  # What runs out is not repeated.
        proven = self._succeeded.get(key, 0) >= _PROVEN_AFTER
        if proven and not self._held_always:
            return None
        variables = changed_by_training(self._model)
        if proven and out_of_memory.bytes_of(variables) > self._held_always:
            return None
        return out_of_memory.HeldValues(variables)

    def _give_up(self, error, backup_dir):
        kind = VariablesFreed if self._compiles() else RuntimeError
        raise kind(
            f"Memory ran out, and training cannot go on: {self._why()}. "
            f"Received: {str(error)[:200]!r}. {_advice(backup_dir)} A "
            "smaller `max_batch_size` leaves more room."
        ) from error

    def _compiles(self):
        """Whether XLA compiles what may run out: no strategy lets it."""
        return self._model.jit_compile and not self._is_replicated

    def _why(self):
        if not self._is_alone:
            return "the other workers wait in the middle of an update"
        if self._compiles():
            return (
                "XLA has freed variables, which are too large to be held all "
                "the time; any use of them may end the process"
            )
        if not self._held_always:
            return (
                "an update is half-made, and where TensorFlow has no limit "
                "of its own, the variables are held only until a size has run"
            )
        return (
            "an update is half-made, and the variables are too large to be "
            "held all the time"
        )


def _advice(backup_dir):
    """Says how to start again."""
    if backup_dir is None:
        # The callbacks of a plain `fit` are not known here.
        return (
            "Without a `BackupAndRestore` there is no backup: pass "
            "backup_dir=..., or add one to `callbacks`, next time."
        )
    files = []
    if tf.io.gfile.exists(backup_dir):
        files = tf.io.gfile.listdir(backup_dir)
    # Not "new.latest.weights.h5", which was being written.
    if "latest.weights.h5" not in files:
        return f"Nothing has been saved in backup_dir={backup_dir!r} yet."
    return (
        f"Start again with backup_dir={backup_dir!r}: training goes on from "
        "the last backup."
    )


def held_always(variables):
    """Whether variables are held through every superbatch.

    Args:
        variables: What `changed_by_training` returns.
    """
    may_fail = out_of_memory.raises_when_exhausted()
    return may_fail and out_of_memory.bytes_of(variables) <= _HELD_ALWAYS


def changed_by_training(model):
    """Returns all variables that an update changes, each once.

    Args:
        model: A compiled Keras model.

    Returns:
        List of Keras variables: those of the model, and of the seed generator
        that layers share which have none of their own.
    """
    seeds = keras_private.global_seeds(keras_private.global_state())
    return [*model_state.variables_of(model), *seeds]


def halved(examples, batch_size):
    """Returns how many examples to try in one pass, and says so.

    Args:
        examples: Examples in the pass that ran out of memory.
        batch_size: Examples per update, which stays.

    Returns:
        Integer.

    Raises:
        ValueError: If it was one example.
    """
    if examples <= 1:
        raise ValueError(
            "One example must fit into memory, and a copy of all variables "
            "that is held meanwhile: there is nothing left to halve. "
            f"Received: batch_size={batch_size}, run one by one. Use a "
            "smaller model or a mixed dtype policy."
        )
    half = math.ceil(examples / 2)
    warnings.warn(
        f"Memory ran out with {examples} examples in one pass. Going on with "
        f"{half}; the batch size stays {batch_size}, nothing is lost.",
        RuntimeWarning,
        stacklevel=2,
    )
    return half
