"""What a model holds that training changes."""

import keras

from keras_batchsize import keras_private


def optimizers_of(model):
    """Returns all optimizers that a model holds, by what it calls them.

    A model with its own `train_step` may hold several besides the one that it
    was compiled with, as attributes or in lists and dicts.

    Args:
        model: A Keras model.

    Returns:
        Dict from names, such as `optimizer` or `critics[0]`, to optimizers,
        each once.
    """
    found, seen = {}, set()
    parts = list(keras_private.attributes_of(model).items())
    for name, value in parts:  # Which grow: containers are followed by theirs.
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, keras.optimizers.Optimizer):
            found[name] = value
        elif isinstance(value, dict):
            parts += [(f"{name}[{key!r}]", one) for key, one in value.items()]
        elif isinstance(value, (list, tuple, set)):
            parts += [(f"{name}[{i}]", one) for i, one in enumerate(value)]
    return found


def variables_of(model):
    """Returns all variables that training changes, each once.

    Args:
        model: A compiled Keras model.

    Returns:
        List of Keras variables: weights, statistics, seeds, metrics, slots, of
        optimizers of its own, too.
    """
    everything = [*model.variables, *model.metrics_variables]
    for optimizer in optimizers_of(model).values():
        everything += optimizer.variables
    return list({id(one): one for one in everything}.values())


def overrides(model, name):
    """Returns whether a model has a method of its own.

    Args:
        model: A Keras model; its class, or itself, may have been given one.
        name: A method of `keras.Model`.
    """
    method = getattr(getattr(model, name), "__func__", None)
    return method is not getattr(keras.Model, name)
