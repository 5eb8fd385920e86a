"""`fit`, `evaluate` and `predict` of Keras under a strategy.

Keras 3.15 raises in all of them with several workers, before the first step
and after it. What is in its way is stepped around here while a call lasts.
"""

import contextlib

import tensorflow as tf

from keras_batchsize import keras_private
from keras_batchsize import replicas
from keras_batchsize import slicing


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
    with contextlib.ExitStack() as stack:
        stack.enter_context(keras_private.built_from_specs(model))
        if replicas.workers(model) > 1:
            stack.enter_context(_evaluating_together(model))
        yield


@contextlib.contextmanager
def _evaluating_together(model):
    """Exchanges the test function for one that several workers can run.

    Keras's own takes the mean of each worker's logs over an axis that numbers
    do not have. Metrics are summed over all replicas where they are read, so
    that there is nothing to take the mean of.
    """
    held = model.test_function
    model.test_function = _test_function(model)
    try:
        yield
    finally:
        model.test_function = held


def _test_function(model):
    strategy = model.distribute_strategy

    def test_on(data):
        strategy.run(
            lambda share: model.test_step(slicing.without_optionals(share)),
            (data,),
        )
        return model.get_metrics_result()

    if not model.run_eagerly:
        test_on = tf.function(test_on, reduce_retracing=True, autograph=False)
    return lambda iterator: test_on(next(iterator))
