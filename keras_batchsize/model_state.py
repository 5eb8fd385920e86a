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


def all_optimizers_of(model):
    """Returns all optimizers of a model and of the models that it holds.

    Args:
        model: A Keras model.

    Returns:
        Dict from names, such as `optimizer` or `critic.optimizer`, to
        optimizers.
    """
    found = optimizers_of(model)
    for inside, one in models_inside(model):
        for name, optimizer in optimizers_of(one).items():
            found[f"{inside}.{name}"] = optimizer
    return found


def models_inside(model):
    """Returns the models that a model holds as layers, by what it calls them.

    Each may be compiled by itself, as the discriminator of a GAN is.

    Args:
        model: A Keras model.

    Returns:
        List of pairs of a name and a model.
    """
    names = {
        id(value): name
        for name, value in keras_private.attributes_of(model).items()
    }
    return [
        (names.get(id(layer), layer.name), layer)
        for layer in keras_private.flatten_layers(model)
        if isinstance(layer, keras.Model)
    ]


def metrics_of(model):
    """Returns all metrics that training may change, each once.

    Not only what the model shows as its metrics: an override may leave out
    those that Keras's own step updates, and Keras those of models inside.

    Args:
        model: A Keras model.
    """
    everything = [*model.metrics, *keras_private.own_metrics(model)]
    for layer in keras_private.flatten_layers(model):
        everything += keras_private.own_metrics(layer)
    return list({id(one): one for one in everything}.values())


def variables_of(model):
    """Returns all variables that training changes, each once.

    Args:
        model: A compiled Keras model.

    Returns:
        List of Keras variables: weights, statistics, seeds, metrics, slots, of
        optimizers of its own and of models inside of it, too.
    """
    everything = [*model.variables]
    for metric in metrics_of(model):
        everything += metric.variables
    for optimizer in all_optimizers_of(model).values():
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
