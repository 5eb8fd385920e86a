"""Makes the variables of a model, before anything of it is noted.

Initializers draw seeds while they are made, and `fit`, which then finds the
layers built, draws none: this is not put back.
"""

import contextlib
import functools
import pickle
import random

import keras
import numpy as np
import tensorflow as tf

from keras_batchsize import keras_private
from keras_batchsize import model_state
from keras_batchsize import out_of_memory
from keras_batchsize import replicas
from keras_batchsize import slicing
from keras_batchsize._memory_forward import can_be_called


def build_layers(model, example):
    """Builds what `fit` would build in its first step.

    Args:
        model: A compiled Keras model.
        example: A batch of one example.

    Raises:
        ValueError: If it runs eagerly, is not built, and cannot be built
            without running it.
    """
    is_replicated = replicas.strategy_of(model) is not None
    if model.run_eagerly and not is_replicated:
        _build_eager(model, example)
        return
    if all(layer.built for layer in keras_private.flatten_layers(model)):
        return
    if not can_be_called(model):
        return  # Its own step builds what it calls.
    if is_replicated:
        # Mirrored variables cannot be made inside a graph.
        keras_private.build_symbolically(model, example)
        return
    x, _, _ = keras.utils.unpack_x_y_sample_weight(example)
    call = functools.partial(model, training=False)
    spec = keras.tree.map_structure(slicing.batch_spec, x)
    tf.function(call, autograph=False).get_concrete_function(spec)


def _build_eager(model, example):
    """Makes all variables of a model that runs eagerly, without running it.

    Those of optimizers and metrics, too, as no trace of the step comes later.
    """
    optimizer = model.optimizer
    if optimizer.built and keras.ops.convert_to_numpy(optimizer.iterations):
        return  # It has trained: the step does not use what is not built.
    if not _not_built(model):
        return
    with _no_tensors_left(model):
        failure = _once_drawn(
            functools.partial(_failure_of_trace, model.train_step, example)
        )
    left = _not_built(model)
    if failure is None or not left:
        return  # What is left, if anything, the step does not use.
    if left != ["optimizer"]:
        raise ValueError(
            "A model that runs eagerly must be built, or have a `train_step` "
            "that can be traced: a probe makes all variables before it runs "
            "anything, so that it can put them back. Received: a "
            f"{type(model).__name__} that has yet to build "
            f"{_some_of(left)}, and a step that fails in a graph: "
            f"{str(failure)[:300]!r}. Train for a step before, by "
            "`model.train_on_batch`, or build what is named; or compile the "
            "model without `run_eagerly`, or train without a probe: give "
            "max_batch_size."
        ) from failure
    if model.trainable_variables:
        with keras.name_scope(optimizer.name, caller=optimizer):
            optimizer.build(model.trainable_variables)


def _not_built(model):
    """Returns the names of layers and optimizers that are not built."""
    layers = keras_private.flatten_layers(model)
    if can_be_called(model):
        layers = [*layers, model]
    names = [layer.name for layer in layers if not layer.built]
    optimizers = model_state.all_optimizers_of(model).items()
    return names + [name for name, one in optimizers if not one.built]


def _some_of(names):
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more} more" if more > 0 else "")


def _failure_of_trace(step, example):
    """Traces a step that is to run eagerly; returns what it raised, or None.

    Variables are made outside of the graph, as they are where the step runs:
    alike, and whole also if the trace fails.
    """

    def make(next_creator, **how):
        how["experimental_enable_variable_lifting"] = False
        with tf.init_scope():
            return next_creator(**how)

    def traced(data):
        with tf.variable_creator_scope(make):
            step(data)

    try:
        tf.function(traced, autograph=False).get_concrete_function(example)
    except Exception as error:  # Whatever a step of one's own raises.
        if out_of_memory.is_out_of_memory(error):
            raise
        return error
    return None


@contextlib.contextmanager
def _no_tensors_left(model):
    """Puts attributes back that hold tensors of a trace, of no use outside."""
    parts = [model, *keras_private.flatten_layers(model)]
    before = [dict(vars(one)) for one in parts]
    yield
    for one, held in zip(parts, before):
        for name, value in [*vars(one).items()]:
            if not _holds_tensor_of_graph(value):
                continue
            if name in held:
                setattr(one, name, held[name])
            else:
                delattr(one, name)


def _holds_tensor_of_graph(value):
    if isinstance(value, dict):
        return any(map(_holds_tensor_of_graph, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensor_of_graph, value))
    return tf.is_tensor(value) and getattr(value, "graph", None) is not None


def _once_drawn(run):
    """Calls a function, and puts random states of Python and NumPy back.

    But for what only a first call draws: the seeds of initializers.
    """
    before = _random_states()
    result = run()
    first = _random_states()
    if first != before:
        run()
        pairs = zip(before, first, _random_states())
        of_python, of_numpy = [
            pickle.loads(one if again != then else then)
            for one, then, again in pairs
        ]
        random.setstate(of_python)
        np.random.set_state(of_numpy)
    return result


def _random_states():
    states = random.getstate(), np.random.get_state()
    return [pickle.dumps(one) for one in states]
