"""What a model must be to be trained here, checked before anything happens."""

import warnings

import keras

from keras_batchsize import exactness
from keras_batchsize import keras_private
from keras_batchsize import learning_rate
from keras_batchsize import model_state
from keras_batchsize import replicas
from keras_batchsize import slicing


def check_model(model):
    """Raises if a model cannot be trained with a varying batch size.

    Args:
        model: What the user passed as the model.

    Raises:
        TypeError: If it is not a Keras model.
        ValueError: If it is not compiled, or compiled in a way that cannot be
            trained here.
    """
    if keras.config.backend() != "tensorflow":
        raise ValueError(
            "Keras must run on TensorFlow: updates are cut inside a "
            "`tf.function`. Received: "
            f"keras.config.backend()={keras.config.backend()!r}. Set the "
            "environment variable KERAS_BACKEND=tensorflow before importing "
            "keras."
        )
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a `keras.Model`: its training step is used. "
            f"Received: model={model!r} of type {type(model).__name__}. Pass "
            "a `keras.Sequential`, functional or subclassed model."
        )
    if not model.compiled:
        raise ValueError(
            "`model` must be compiled: the optimizer and the loss decide what "
            f"an update is. Received: model={model.name!r}, not compiled. "
            'Call model.compile(optimizer="adam", loss=...) first.'
        )
    if model_state.overrides(model, "make_train_function"):
        raise ValueError(
            "`make_train_function` must be that of Keras: here another train "
            "function takes its place, which calls `train_step`. Received: "
            f"{type(model).__name__} with one of its own. Override "
            "`train_step` instead."
        )
    _check_optimizer(model.optimizer)
    _check_strategy(model)


def check_parts(model):
    """Raises if a model cannot be given the parts of a batch.

    Args:
        model: A compiled Keras model.

    Raises:
        ValueError: If it was made for one batch size.
    """
    size = keras_private.fixed_batch_size(model)
    if size is not None:
        _refuse_size(
            size, "cut into parts, to measure gradient noise or to accumulate"
        )
    layer = _stateful_layer(model)
    if layer is not None:
        raise ValueError(
            "A stateful model must not be given parts of batches: its states "
            "are of the examples of a whole one. Received: layer "
            f"{layer.name!r} with stateful=True. Use stateful=False, or "
            'policy="fixed" with max_batch_size=None.'
        )


def check_any_size(model):
    """Raises if a model cannot be run at any batch size.

    Args:
        model: A compiled Keras model.

    Raises:
        ValueError: If it was made for one batch size, or keeps states.
    """
    fixed = keras_private.fixed_batch_size(model)
    if fixed is not None:
        raise ValueError(
            "The model must take any batch size: others are tried. Received: "
            f"an input with batch_size={fixed}. Use keras.Input(shape) "
            "without `batch_size`."
        )
    layer = _stateful_layer(model)
    if layer is not None:
        raise ValueError(
            "The model must not be stateful: its states are of one batch "
            f"size. Received: layer {layer.name!r} with stateful=True. Use "
            "stateful=False."
        )


def _stateful_layer(model):
    return next(
        (
            layer
            for layer in keras_private.flatten_layers(model)
            if getattr(layer, "stateful", False)
        ),
        None,
    )


def check_sizes(model, sizes):
    """Raises if a model that was made for one batch size is to get another.

    Args:
        model: A compiled Keras model.
        sizes: Sizes that updates may have, in examples.

    Raises:
        ValueError: If one of them is not the one of the model.
    """
    size = keras_private.fixed_batch_size(model)
    others = sorted({*sizes} - {size})
    if size is not None and others:
        _refuse_size(size, f"of {' or '.join(map(str, others))} examples")


def check_growth(model, sizes, reference_batch_size):
    """Raises if a loss is a sum over a batch that does not keep its size.

    Its gradient grows with the batch, and so does the rate by its rule: an
    update of k base batches would move the weights k times as far as k updates.

    Args:
        model: A compiled Keras model.
        sizes: Sizes that updates may have, in examples.
        reference_batch_size: Size that the learning rate was meant for.

    Raises:
        ValueError: If a loss is a sum, and a size is another than that.
    """
    others = sorted({*sizes} - {reference_batch_size})
    sums = exactness.reductions_of(model) & exactness.SUMS
    if others and sums:
        raise ValueError(
            "A loss must be a mean over examples where the batch size may "
            "change: the gradient of a sum grows with the size, on top of what "
            "the learning rate does. Received: "
            f"reduction={sorted(map(str, sums))}, and updates of "
            f"{' or '.join(map(str, others))} examples with the rate for "
            f"{reference_batch_size}. Use "
            'reduction="sum_over_batch_size" and a learning rate multiplied by '
            f'{reference_batch_size}. Or use policy="fixed", which keeps the '
            "size."
        )


def check_optimizers(model, sizes, reference_batch_size):
    """Raises if a model has optimizers whose learning rate would stay.

    A model with its own `train_step` may hold several, as a GAN does. Only the
    rate of the one it was compiled with can be scaled.

    Args:
        model: A compiled Keras model.
        sizes: Sizes that updates may have, in examples, at rates of their own.
        reference_batch_size: Size that the learning rate was meant for.

    Raises:
        ValueError: If there are others, and a size is another than that.
    """
    compiled = learning_rate.optimizers_inside(model.optimizer)
    compiled.append(model.optimizer)
    names = sorted(
        name
        for name, value in _optimizers_in_use(model)
        if not any(value is one for one in compiled)
    )
    others = sorted({*sizes} - {reference_batch_size})
    if names and others:
        raise ValueError(
            "A model must have one optimizer where the learning rate follows "
            "the batch size: that of others would stay. Received: "
            f"{' and '.join(names)} beside the compiled optimizer, and "
            f"updates of {' or '.join(map(str, others))} examples with the "
            f"rate for {reference_batch_size}. Use "
            'learning_rate_scaling="none" and set their rates yourself, in '
            "`on_epoch_begin` of a callback, say."
        )


def _optimizers_in_use(model):
    """Yields (name, optimizer) of all that the model's step may use.

    Keras's own step leaves alone what models inside are compiled with, as one
    that was loaded from a file may be; and who freezes one trains it no more.
    """
    yield from model_state.optimizers_of(model).items()
    if not model_state.overrides(model, "train_step"):
        return
    for inside, one in model_state.models_inside(model):
        if one.trainable:
            for name, value in model_state.optimizers_of(one).items():
                yield f"{inside}.{name}", value


def check_short(model, make_batch):
    """Raises if a model takes no other batch size than its own.

    Keras lets shorter batches through, and many a model does not mind. So it
    is tried.

    Args:
        model: A compiled Keras model.
        make_batch: Function that returns a last batch, as `train_step`
            receives it.

    Raises:
        ValueError: If the model was made for another size and fails.
    """
    size = keras_private.fixed_batch_size(model)
    if size is None:
        return
    batch = make_batch()
    x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
    try:
        with exactness.put_back(model):
            model(x, training=False)
    except Exception as error:
        rest = int(slicing.count_examples(batch))
        _refuse_size(size, f"of the {rest} examples that are left", error)


def warn_of_steps_per_execution(model, stacklevel):
    """Warns that superbatches do what `steps_per_execution` is for.

    Args:
        model: A compiled Keras model.
        stacklevel: Functions from here to the one that called `fit`.
    """
    steps = model.steps_per_execution
    if steps == 1:
        return
    warnings.warn(
        "`steps_per_execution` is superseded: a superbatch makes many updates "
        "in one call anyway, and the batch size can change only between "
        f"calls. Received: steps_per_execution={steps}. Compile with "
        "steps_per_execution=1.",
        stacklevel=stacklevel + 1,
    )


def warn_of_lost_executions(model):
    """Warns that `steps_per_execution` has no effect where no batch is cut.

    Args:
        model: A compiled Keras model.
    """
    steps = model.steps_per_execution
    if steps > 1:
        warnings.warn(
            "`steps_per_execution` has no effect with a static "
            "`LearningRateScaling`: the rate is set before each call. "
            f"Received: steps_per_execution={steps}. Compile with "
            "steps_per_execution=1, or use AdaptiveTrainer(model, "
            '"fixed"), which makes many updates in one call.',
            # From here through three functions of ours and three of Keras.
            stacklevel=8,
        )


def _refuse_size(size, batches, cause=None):
    raise ValueError(
        "A model made for one batch size must get no other: here batches "
        f"would be {batches}. Received: an input with batch_size={size}. Use "
        'keras.Input(shape) without `batch_size`. Or policy="fixed", with '
        f"batch_size={size}, and as many examples as make whole batches."
    ) from cause


def _check_strategy(model):
    strategy = replicas.strategy_of(model)
    if strategy is None:
        return
    for one in learning_rate.optimizers_inside(model.optimizer):
        if one.ema_overwrite_frequency:
            raise ValueError(
                "`ema_overwrite_frequency` must not be set under a strategy: "
                "Keras cannot overwrite weights on several replicas within a "
                "condition. Received: ema_overwrite_frequency="
                f"{one.ema_overwrite_frequency}. Use None: the averages are "
                "taken over at the end of `fit`."
            )
    if isinstance(strategy, replicas.SUPPORTED):
        return
    kinds = ", ".join(one.__name__ for one in replicas.SUPPORTED)
    raise ValueError(
        "The model must be made under a strategy whose replicas make each "
        "update together, on devices that hold all weights. Received: "
        f"{type(strategy).__name__}. Use one of {kinds}."
    )


def _check_optimizer(optimizer):
    if optimizer is None:
        raise ValueError(
            "`model` must be compiled with an optimizer: it makes the "
            "updates. Received: optimizer=None. Compile with "
            'optimizer="adam".'
        )
    for one in learning_rate.optimizers_inside(optimizer):
        steps = one.gradient_accumulation_steps
        if steps:
            raise ValueError(
                "`gradient_accumulation_steps` must not be set on the "
                "optimizer: it delays updates behind the back of whoever "
                "decides the batch size, and gives a ragged micro-batch full "
                f"weight. Received: gradient_accumulation_steps={steps}. "
                "Remove it and pass batch_size multiplied by it instead; "
                "gradients are accumulated here where memory asks for it."
            )
