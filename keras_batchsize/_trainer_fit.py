"""`fit`: the trainer in one line."""

from keras_batchsize.trainer import AdaptiveTrainer


def fit(
    model,
    x=None,
    y=None,
    batch_size=None,
    policy="goodput",
    learning_rate_scaling="auto",
    min_batch_size=None,
    max_batch_size=None,
    superbatch_size=None,
    measure_every="auto",
    tensorboard=None,
    backup_dir=None,
    **fit_arguments,
):
    """Trains a model in one line, by an `AdaptiveTrainer`.

    Args:
        model: A compiled Keras model.
        x: As in `Model.fit`.
        y: As in `Model.fit`.
        batch_size: The base batch size B₀.
        policy: See `AdaptiveTrainer`.
        learning_rate_scaling: See `AdaptiveTrainer`.
        min_batch_size: See `AdaptiveTrainer`.
        max_batch_size: See `AdaptiveTrainer`.
        superbatch_size: See `AdaptiveTrainer`.
        measure_every: See `AdaptiveTrainer`.
        tensorboard: See `AdaptiveTrainer`.
        backup_dir: See `AdaptiveTrainer`.
        **fit_arguments: All other arguments of `Model.fit`.

    Returns:
        The Keras `History`.
    """
    trainer = AdaptiveTrainer(
        model,
        policy=policy,
        learning_rate_scaling=learning_rate_scaling,
        min_batch_size=min_batch_size,
        max_batch_size=max_batch_size,
        superbatch_size=superbatch_size,
        measure_every=measure_every,
        tensorboard=tensorboard,
        backup_dir=backup_dir,
    )
    return trainer.fit(x, y, batch_size=batch_size, **fit_arguments)
