"""How a trainer finds its model when `fit` begins."""

import warnings

import keras
import tensorflow as tf

from keras_batchsize import _controller_state
from keras_batchsize import requirements


class LastOptimizer:
    """Remembers the optimizer of a model from one `fit` to the next."""

    def __init__(self):
        self._optimizer = None
        self._steps = 0

    def note(self, model):
        """Remembers the optimizer that a model has now.

        Args:
            model: A compiled Keras model.
        """
        self._optimizer = model.optimizer
        self._steps = _steps_of(model)

    def is_of(self, model):
        """Whether the model has not been compiled anew."""
        return self._optimizer is None or self._optimizer is model.optimizer

    def steps_since(self, model):
        """Updates that were made since, by a plain `fit`, say.

        Args:
            model: A compiled Keras model.

        Returns:
            Integer; 0 if another optimizer, or none, was noted.
        """
        if self._optimizer is not model.optimizer:
            return 0
        return _steps_of(model) - self._steps


def _steps_of(model):
    return keras.ops.convert_to_numpy(model.optimizer.iterations).item()


def check_state(state):
    """Raises if a state is none that `AdaptiveTrainer.get_state` returns.

    Args:
        state: What the caller passed.

    Raises:
        TypeError: If it, or a value in it, is of another kind.
        ValueError: If keys are missing, or are not known.
    """
    if state != {}:  # That of a trainer before its first `fit`.
        _controller_state.check_state(state)


def warn_of_steps_per_execution(model):
    """Warns that superbatches do what `steps_per_execution` is for.

    Args:
        model: A compiled Keras model.
    """
    steps = model.steps_per_execution
    if steps == 1:
        return
    warnings.warn(
        "`steps_per_execution` is superseded: a superbatch makes many updates "
        "in one call anyway, and the batch size can change only between "
        f"calls. Received: steps_per_execution={steps}. Compile with "
        "steps_per_execution=1.",
        stacklevel=4,
    )


def check_last_batch(model, superbatches):
    """Raises before training if the last batch of arrays does not fit.

    What other inputs hold shows when they end.

    Args:
        model: A compiled Keras model.
        superbatches: The `Superbatches`.

    Raises:
        ValueError: If the model takes one batch size only, and the last one
            is shorter.
    """
    if superbatches.specs is None or not model.built:
        return
    rest = superbatches.examples_per_epoch % superbatches.base_batch_size
    if rest == 0:
        return

    def some():
        return keras.tree.map_structure(
            lambda spec: (
                None
                if spec is None
                else tf.zeros([rest, *spec.shape[1:]], spec.dtype)
            ),
            superbatches.specs,
        )

    requirements.check_short(model, some)
