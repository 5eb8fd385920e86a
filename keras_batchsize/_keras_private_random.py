"""All random states there are around a model, put back as one."""

import contextlib
import random
import sys

import numpy as np
from keras.src.backend.common import global_state as keras_globals
from tensorflow.python.eager import context

from keras_batchsize import keras_private

_SEED = "global_random_seed"


@contextlib.contextmanager
def states_kept():
    """Puts the random states of Python, NumPy, Keras and TensorFlow back.

    Also seeds that are set in between, and whether there was one before; and
    that of torch where it is in use: its `DataLoader` draws when it is read.

    Yields:
        None.
    """
    eager = context.context()
    states = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")
    tell = getattr(torch, "get_rng_state", None)
    of_torch = None if tell is None else tell()
    seed = keras_globals.get_global_attribute(_SEED)
    eager_seed, eager_seeds = eager._seed, getattr(eager, "_rng", None)
    state = keras_private.global_state()
    values = [
        (one, one.numpy()) for one in keras_private.global_seeds(state)
    ]
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        if of_torch is not None:
            torch.set_rng_state(of_torch)
        keras_globals.set_global_attribute(_SEED, seed)
        eager._seed, eager._rng = eager_seed, eager_seeds
        keras_private.set_global_state(state)
        for variable, value in values:
            variable.assign(value)
