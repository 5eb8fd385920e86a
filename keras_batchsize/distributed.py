"""`fit`, `evaluate` and `predict` of Keras under a strategy.

Keras 3.15 raises in all of them with several workers, before the first step
and after it. What is in its way is stepped around here while a call lasts.
"""

import contextlib

from keras_batchsize import keras_private
from keras_batchsize import replicas


@contextlib.contextmanager
def prepared(model):
    """Lets a model be fitted or evaluated under its strategy.

    Args:
        model: A compiled Keras model.

    Yields:
        None.
    """
    if replicas.strategy_of(model) is None:
        yield
        return
    with keras_private.built_from_specs(model):
        yield
