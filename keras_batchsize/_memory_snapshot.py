"""Everything that a probe changes, to be put back bit for bit.

Not only weights: statistics, seeds, metrics, slots, Keras's global seeds and
name counters, and the random states of Python, NumPy and TensorFlow, from which
Keras draws seeds. What cannot be put back is what lies outside: counters in a
custom `train_step`, tables, the position of iterators, and TensorFlow's own
random operations where they run eagerly (each seed has a kernel that counts).
"""

import random

import numpy as np

from keras_batchsize import _memory_host
from keras_batchsize import keras_private
from keras_batchsize import model_state
from keras_batchsize import out_of_memory
from keras_batchsize._batch_profile_text import megabytes


class Snapshot:
    """The state of a model and of the random generators around it.

    To be taken before the training step is traced; `add_variables` after, as
    tracing makes the optimizer's variables.

    Args:
        model: A compiled Keras model whose layers are built.
    """

    def __init__(self, model):
        self._model = model
        self._random = random.getstate()
        self._numpy = np.random.get_state()
        self._keras = keras_private.global_state()
        self._values = []
        self._known = set()

    def add_variables(self):
        """Copies the values of all variables that there are, to the host.

        Raises:
            ValueError: If the host has no room for the copies. Linux would
                grant it all the same, and end the process later.
        """
        variables = model_state.variables_of(self._model)
        variables += keras_private.global_seeds(self._keras)
        new = [one for one in variables if id(one) not in self._known]
        parts = [part for one in new for part in out_of_memory.components(one)]
        _check_room(out_of_memory.bytes_of(parts))
        self._known.update(map(id, new))
        self._values += [
            (part, np.array(out_of_memory.value_of(part), copy=True))
            for part in parts
        ]

    @property
    def variables(self):
        """The variables of the model, as they are now."""
        return model_state.variables_of(self._model)

    def restore_values(self):
        """Puts the values of the variables back.

        Before `add_variables` nothing has run, and all are what they were.
        """
        if self._known:
            for metric in model_state.metrics_of(self._model):
                if any(id(one) not in self._known for one in metric.variables):
                    # Made by an eager step: new ones start from zero.
                    metric.reset_state()
        for component, value in self._values:
            component.assign(value)

    def restore(self):
        """Puts everything back."""
        self.restore_values()
        random.setstate(self._random)
        np.random.set_state(self._numpy)
        keras_private.set_global_state(self._keras)


def _check_room(needed):
    free = _memory_host.available_bytes()
    if free is not None and needed > free:
        raise ValueError(
            "The host must have room for a copy of all weights and optimizer "
            "slots: a probe puts them back. Received: a model of "
            f"{megabytes(needed)} MB, {megabytes(free)} MB free. End other "
            "processes, or train without a probe: give max_batch_size."
        )
