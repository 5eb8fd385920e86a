"""The largest batch that fits memory, looked for once per kind of model."""

import math

import keras
import tensorflow as tf

from keras_batchsize import _memory_key
from keras_batchsize import memory
from keras_batchsize.batch_profile import BatchProfile


class CachedProbe:
    """Caps batch sizes by the memory probe.

    To be called in a trial, never where a space is declared or a model built:
    the chief of a distributed search does that, too, on a machine of its own.

    Args:
        probe: "auto" for probing on accelerators only; True, False, or a
            function `probe(model, x, y)` that returns the largest batch size
            or a `BatchProfile`.
    """

    def __init__(self, probe):
        if probe not in ("auto", True, False) and not callable(probe):
            raise TypeError(
                '`memory_probe` must be "auto", True, False or a function '
                "probe(model, x, y): it finds the largest batch that fits. "
                f"Received: memory_probe={probe!r}. Use "
                'memory_probe="auto".'
            )
        self._probe = probe
        self._known = {}

    def limit(self, model, x, y, maximum, base=1):
        """Returns the largest batch size that fits, or None without a probe.

        Args:
            model: The compiled model of a trial.
            x: Training data.
            y: Targets.
            maximum: Largest size of interest, or None.
            base: The initial size, which is tried first.
        """
        if not self._probe:  # 0 is as good as False.
            return None
        if self._probe == "auto" and not (
            memory.on_accelerator() and memory.may_be_read_ahead(x)
        ):
            return None
        key = _key_of(model, x, y, maximum)
        found = self._known.get(key)
        if found is None:
            found = self._find(model, x, y, maximum, base)
        if key is not None:
            self._known[key] = found
        return _largest(found, maximum, base)

    def _find(self, model, x, y, maximum, base):
        if callable(self._probe):
            found = self._probe(model, x, y)
        else:
            start = min(base, maximum or base)
            limits = {"start": start, "maximum": maximum}
            found = memory.find_max_batch_size(
                model, x, y, accumulates=True, **limits
            )
        if isinstance(found, BatchProfile):
            memory.warn_of_early_end(found)
        return found


def _largest(found, maximum, base):
    """Returns the largest size by what a probe has found.

    One that ended early is no limit for sizes that are asked for.
    """
    if not isinstance(found, BatchProfile):
        return int(getattr(found, "max_batch_size", found))
    largest = found.largest_micro_batch_size * found.replicas
    if math.isinf(largest):
        largest = max(found.max_batch_size, maximum or 1, base)
    return largest


def _key_of(model, x, y, maximum):
    """Returns what tells a probe from others, None where that is not sure."""
    if not memory.can_be_read_twice(x):
        return None
    try:
        return _memory_key.digest_of(
            [_memory_key.described(model), _data_of(x, y), maximum]
        )
    except _memory_key.NotDescribed:
        return None


def _data_of(x, y):
    """Describes the examples of data, and how many there are."""
    if isinstance(x, tf.data.Dataset):
        return [repr(x.element_spec), int(x.cardinality())]
    count = None
    if isinstance(x, keras.utils.PyDataset):
        count, x = x.num_batches, x[0]
    leaves = [one for one in keras.tree.flatten((x, y)) if one is not None]
    try:
        shapes = [tuple(one.shape) for one in leaves]
        return [count, *map(str, shapes), *(str(one.dtype) for one in leaves)]
    except (AttributeError, TypeError, ValueError) as error:
        raise _memory_key.NotDescribed(f"data have no shape: {error}")
