"""How a trainer finds its model when `fit` begins."""

import math

import keras
import tensorflow as tf

from keras_batchsize import _controller_state
from keras_batchsize import keras_private
from keras_batchsize import memory
from keras_batchsize import replicas
from keras_batchsize import requirements
from keras_batchsize.plan import largest_on_ladder

# Without a limit a batch is at most this part of the data, so that an epoch
# has updates enough to follow.
_LARGEST_PART = 16
# Where the length of the data is not known, at most so many base batches.
_LARGEST_OF_UNKNOWN = 64


class KeptProfile:
    """A profile, as long as model and data are what they were when probed."""

    def __init__(self):
        self._profile = None
        self._compiled = ()
        self._data = None
        # Whether the next controller knows nothing of it, or was told of one
        # that does not hold any more.
        self._is_new = self._is_dropped = False

    def keep(self, profile, model, data):
        """Keeps a profile.

        Args:
            profile: A `BatchProfile`.
            model: The Keras model that was probed.
            data: The (x, y, sample_weight) that it was probed on.
        """
        self._profile, self._compiled = profile, _compiled(model)
        self._data = memory.kind_of_data(model, *data)
        self._is_new, self._is_dropped = True, False

    def check(self, model, data):
        """Drops the profile if it does not tell of other data.

        Args:
            model: A compiled Keras model.
            data: Its (x, y, sample_weight), which can be read twice.
        """
        profile = self.of(model)
        if profile is None:
            return
        kind, count = memory.kind_of_data(model, *data)
        has_more = profile.reason == "dataset" and count > self._data[1]
        if has_more or kind != self._data[0]:
            self._profile, self._is_dropped = None, True

    def tell(self, controller, model):
        """Tells a controller of the profile, if there is one of the model.

        What it found is a limit for all fits. A new one may raise that; later
        they only lower it, and do not undo what an out-of-memory error did.

        Args:
            controller: A `Controller`.
            model: A compiled Keras model.
        """
        profile = self.of(model)
        if self._is_dropped:
            controller.limit_micro_batch_size(math.inf, may_rise=True)
        if profile is not None:
            controller.expect(profile, self._is_new)
        self._is_new = self._is_dropped = False

    def of(self, model):
        """Returns the profile of a model, or None if there is none.

        Args:
            model: A compiled Keras model.
        """
        now = _compiled(model)
        is_same = len(now) == len(self._compiled) and all(
            one is other for one, other in zip(now, self._compiled)
        )
        return self._profile if is_same else None


def _compiled(model):
    """What `compile` sets, and what memory and time depend on."""
    return (
        keras_private.compiled(model),
        model.optimizer,
        bool(model.jit_compile),
        bool(model.run_eagerly),
    )


def largest_by_default(model, base, examples, profile):
    """Returns the largest batch size where the user has set none.

    Args:
        model: A compiled Keras model.
        base: Integer, the base batch size.
        examples: Integer, those of an epoch; None if not known.
        profile: The `BatchProfile` of the model, or None.
    """
    limit = base * _LARGEST_OF_UNKNOWN
    if examples is not None:
        limit = examples / _LARGEST_PART
    if profile is not None and memory.on_accelerator():
        most = profile.largest_micro_batch_size * profile.replicas
        if math.isinf(most):
            most = profile.max_batch_size
            if replicas.workers(model) == 1:
                # Running out is survived; the others of several would wait.
                most = max(limit, most)
        limit = most
    return largest_on_ladder(base, limit, replicas.count(model))


def check_state(state):
    """Raises if a state is none that `AdaptiveTrainer.get_state` returns.

    Args:
        state: What the caller passed.

    Raises:
        TypeError: If it, or a value in it, is of another kind.
        ValueError: If keys are missing, or are not known.
    """
    if state != {}:  # That of a trainer before its first `fit`.
        _controller_state.check_state(state)


def check_last_batch(model, superbatches):
    """Raises before training if the last batch of arrays does not fit.

    What other inputs hold shows when they end.

    Args:
        model: A compiled Keras model.
        superbatches: The `Superbatches`.

    Raises:
        ValueError: If the model takes one batch size only, and the last one
            is shorter.
    """
    if superbatches.specs is None or not model.built:
        return
    rest = superbatches.examples_per_epoch % superbatches.base_batch_size
    if rest == 0:
        return

    def some():
        return keras.tree.map_structure(
            lambda spec: (
                None
                if spec is None
                else tf.zeros([rest, *spec.shape[1:]], spec.dtype)
            ),
            superbatches.specs,
        )

    requirements.check_short(model, some)


def note_own_fit(model, error):
    """Adds to an error that a model's own `fit` may be the reason.

    Some prepare their input in it, KerasHub's for instance, and cannot do
    that with superbatches; those that only call that of Keras work.

    Args:
        model: The Keras model.
        error: The exception that its `fit` raised.
    """
    if type(model).fit is keras.Model.fit:
        return
    error.add_note(
        f"{type(model).__name__} has a `fit` of its own, to which superbatches "
        "were handed. If it prepares its input, train by callbacks: "
        "model.fit(..., callbacks=[kb.DynamicBatchSize(...)]). Or prepare the "
        "input before (in KerasHub, with preprocessor=None)."
    )
