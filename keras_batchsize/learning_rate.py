"""Applies the learning-rate factor and the examples clock to any optimizer.

The user's rate stays the base rate: `optimizer.learning_rate`, as callbacks
and user code see it, is never changed. While an update is traced (or run
eagerly) the optimizer is shown `base rate x factor` in its place.

A quirk of another optimizer belongs into `slots_holding_the_rate` or
`decoupled_weight_decays`.
"""

import contextlib
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_batchsize import keras_private


class RateInForce(NamedTuple):
    """What one call of the train function needs to know about the rate.

    Attributes:
        factor: Multiplies the base rate; scalar float32 tensor.
        weight_decay_factor: Multiplies decoupled weight decay; likewise.
        base_step: The step that a `LearningRateSchedule` is asked for, on
            the clock of base batches; scalar int64 tensor.
        examples: Examples seen since that step; scalar int64 tensor.
    """

    factor: tf.Tensor
    weight_decay_factor: tf.Tensor
    base_step: tf.Tensor
    examples: tf.Tensor

    def at(self, position, base_batch_size):
        """Returns the rate at an example.

        Args:
            position: Scalar integer tensor, counted from where `examples` is
                now; negative for an update that began earlier.
            base_batch_size: Examples per step of the clock.

        Returns:
            A `RateInForce` with `base_step` moved on.
        """
        seen = self.examples + tf.cast(position, tf.int64)
        return self._replace(
            base_step=self.base_step + seen // base_batch_size
        )


def rate_in_force(factor, ratio, base_step, examples):
    """Returns the `RateInForce` for a factor.

    Keras applies decoupled weight decay as `w -= w·rate·decay`, once per
    update, so that what is left of a weight after B examples is
    1 - rate·decay. With a rate of `factor` and updates of `ratio` times as
    many examples, decay per example is kept if decay is multiplied by
    ratio/factor: 1 under the linear rule, √ratio under the square-root rule
    (Wang & Aitchison 2024, arXiv:2405.13698, in these symbols).

    Args:
        factor: What the rate is multiplied by.
        ratio: B/B₀ if the rate follows the batch size, else `factor`.
        base_step: Step of the schedule at the start of the epoch.
        examples: Examples seen in the epoch.

    Returns:
        A `RateInForce`.
    """
    return RateInForce(
        factor=tf.constant(factor, tf.float32),
        weight_decay_factor=tf.constant(ratio / factor, tf.float32),
        base_step=tf.constant(base_step, tf.int64),
        examples=tf.constant(examples, tf.int64),
    )


def optimizers_inside(optimizer):
    """Returns the optimizers that hold a learning rate of their own.

    Args:
        optimizer: Any Keras optimizer, also `LossScaleOptimizer` and
            `MultiOptimizer`, which hold others.

    Returns:
        List of optimizers.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizers_inside(optimizer.inner_optimizer)
    inner = getattr(optimizer, "optimizers", None)
    if inner is None:
        return [optimizer]
    return [leaf for one in inner for leaf in optimizers_inside(one)]


def rule_for(optimizer):
    """Returns what "auto" stands for: "linear" for SGD, else "sqrt".

    Adaptive optimizers divide by the size of the gradient noise, of which the
    square root remains (see `scaling.sqrt`). An optimizer that is not known
    gets the more careful of the two rules.

    Args:
        optimizer: Any Keras optimizer.

    Returns:
        Name of a rule.
    """
    inside = optimizers_inside(optimizer)
    # A `MultiOptimizer` may know none before it is built.
    if inside and all(isinstance(one, keras.optimizers.SGD) for one in inside):
        return "linear"
    return "sqrt"


def base_rate(held, base_step):
    """Evaluates what an optimizer holds as its learning rate.

    Args:
        held: A variable, a `LearningRateSchedule` or a callable.
        base_step: Step that a schedule is asked for.

    Returns:
        Scalar tensor of a floating type, float64 under such a `floatx`.
    """
    if isinstance(held, keras.optimizers.schedules.LearningRateSchedule):
        rate = held(base_step)
    elif isinstance(held, keras.Variable):
        rate = held.value
    else:
        rate = held() if callable(held) else held
    rate = tf.convert_to_tensor(rate)
    return rate if rate.dtype.is_floating else tf.cast(rate, tf.float32)


@contextlib.contextmanager
def applied(optimizer, rate):
    """Shows an optimizer the rate in force while an update is traced.

    Args:
        optimizer: Any Keras optimizer, or None.
        rate: A `RateInForce`.

    Yields:
        None.
    """

    def replacement(held):
        base = base_rate(held, rate.base_step)
        return base * tf.cast(rate.factor, base.dtype)

    with contextlib.ExitStack() as stack:
        for one in optimizers_inside(optimizer) if optimizer else ():
            stack.enter_context(
                keras_private.learning_rate_replaced(
                    one,
                    replacement,
                    {
                        name: decay * rate.weight_decay_factor
                        for name, decay in decoupled_weight_decays(one).items()
                    },
                )
            )
        yield


def effective_rate(optimizer, rate):
    """Returns the rate of the (first) optimizer, factor included.

    Args:
        optimizer: Any Keras optimizer, or None.
        rate: A `RateInForce`.

    Returns:
        Scalar float32 tensor; NaN without an optimizer, or where none is
        known yet.
    """
    inside = [] if optimizer is None else optimizers_inside(optimizer)
    if not inside:
        return tf.constant(float("nan"))
    held = keras_private.held_learning_rate(inside[0])
    base = base_rate(held, rate.base_step)
    return tf.cast(base, tf.float32) * rate.factor


def decoupled_weight_decays(optimizer):
    """Returns the weight decays that Keras multiplies by the rate.

    Args:
        optimizer: A Keras optimizer without optimizers inside.

    Returns:
        Dict from names of attributes to numbers.
    """
    names = ["weight_decay"]
    if isinstance(optimizer, keras.optimizers.Muon):
        # For the weights that it leaves to Adam (muon.py).
        names.append("adam_weight_decay")
    decays = {name: getattr(optimizer, name) for name in names}
    return {name: one for name, one in decays.items() if one is not None}


def slots_holding_the_rate(optimizer):
    """Returns the momentum slots that contain the learning rate.

    Keras SGD keeps v = momentum·v - rate·g (sgd.py), RMSprop likewise
    (rmsprop.py). Adam and its relatives average gradients only.

    Args:
        optimizer: A Keras optimizer without optimizers inside.

    Returns:
        List of variables.
    """
    if not optimizer.built:
        return []
    if isinstance(optimizer, keras.optimizers.SGD):
        slots = optimizer.momentums
    elif isinstance(optimizer, keras.optimizers.RMSprop):
        slots = keras_private.velocities(optimizer)
    else:
        slots = []
    return [slot for slot in slots if slot is not None]


def slots_holding_its_inverse(optimizer):
    """Returns the slots that are divided by the learning rate.

    Keras's Ftrl keeps z, from which it makes weights anew at each step: without
    regularisation w = -z·rate/√n (ftrl.py). Another rate would multiply them.

    Args:
        optimizer: A Keras optimizer without optimizers inside.

    Returns:
        List of variables.
    """
    if optimizer.built and isinstance(optimizer, keras.optimizers.Ftrl):
        return keras_private.linears(optimizer)
    return []


def correct_momentum(optimizer, ratio):
    """Rescales momentum after the factor was multiplied by `ratio`.

    Without it the old rate lives on in the velocity, and the change takes
    effect only after 1/(1 - momentum) updates (Goyal et al. 2017, Sec. 3,
    "momentum correction").

    Args:
        optimizer: Any Keras optimizer.
        ratio: New factor divided by old factor.
    """
    for one in optimizers_inside(optimizer):
        for slot in slots_holding_the_rate(one):
            slot.assign(slot * tf.cast(ratio, slot.dtype))
        for slot in slots_holding_its_inverse(one):
            slot.assign(slot / tf.cast(ratio, slot.dtype))
