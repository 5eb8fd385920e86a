"""The scale of losses in a probe, where gradients are of half precision."""

import keras

from keras_batchsize import model_state
from keras_batchsize import out_of_memory


def lower_loss_scales(model):
    """Lets trials make their updates.

    The scale begins so high that the first gradients may overflow. That skips
    an update and halves the scale, which is put back after each trial: none
    would ever be made, and neither memory nor time be that of one. Both are
    the same whatever the scale.

    Args:
        model: A compiled Keras model whose values are put back.
    """
    for optimizer in model_state.all_optimizers_of(model).values():
        is_scaling = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        if is_scaling and optimizer.built:
            for scale in out_of_memory.components(optimizer.dynamic_scale):
                scale.assign(1.0)
