"""Validation in a probe: by the model's own `test_step`, where it has one."""

import functools

import keras
import tensorflow as tf

from keras_batchsize import out_of_memory
from keras_batchsize import replicas
from keras_batchsize import slicing
from keras_batchsize._memory_forward import can_be_called


def validation_step(model, smallest, compiles):
    """Returns what `fit` validates by.

    A model with a `train_step` of its own may have nothing to validate by: the
    `test_step` of Keras needs a `call`, and a loss that was compiled.

    Args:
        model: A compiled Keras model whose variables exist. If it runs
            eagerly, their values may have changed afterwards.
        smallest: A batch of an example for each replica, dealt out to them.
        compiles: Whether XLA compiles the step.

    Returns:
        Function of a batch; one that does nothing if there is no validating.
    """
    if not can_be_called(model):
        return _nothing
    step, strategy = model.test_step, replicas.strategy_of(model)
    if strategy is not None:
        step = functools.partial(_everywhere, strategy, step)
    if model.run_eagerly:
        return step if _runs(step, smallest) else _nothing
    step = tf.function(
        step,
        jit_compile=compiles,
        reduce_retracing=not compiles,
        autograph=False,
    )
    if strategy is None and not compiles:
        # One graph for this and for all sizes that follow.
        smallest = keras.tree.map_structure(slicing.batch_spec, smallest)
    return step if _runs(step.get_concrete_function, smallest) else _nothing


def _everywhere(strategy, step, data):
    return replicas.local_values(strategy, strategy.run(step, (data,)))


def _nothing(data):
    return {}


def _runs(function, data):
    """Whether a function can be called with a batch, or with its types."""
    try:
        function(data)
    except Exception as error:  # Whatever a step of one's own raises.
        # Memory is no matter of the model: the trials tell what fits.
        return out_of_memory.is_out_of_memory(error)
    return True
