"""How large a superbatch is, and which superbatches make an epoch.

Part of `superbatches.py`.
"""

import math

from keras_batchsize import out_of_memory
from keras_batchsize.plan import checked_superbatch_size
from keras_batchsize.plan import largest_on_ladder

# An epoch should have so many superbatches, to change the size within it, ...
_SUPERBATCHES_PER_EPOCH = 16
# ... but a superbatch so many batches, or the way through Python takes over.
# There are at least so many per epoch, or reading them does not run beside
# training on them.
_BATCHES_PER_SUPERBATCH = 64
_FEWEST_PER_EPOCH = 8
# Small data are handed over in fewer pieces, down to this size.
_SMALLEST_SUPERBATCH = 256
# Batches per superbatch where the length of the data is not known.
_BATCHES_OF_UNKNOWN = 64
# Superbatches that are copied hold at most so many bytes, unless a batch does:
# several wait at a time, on an accelerator one lies in its memory, and to train
# on so much takes long enough for a call not to matter.
MOST_BYTES = 2**28
# On a CPU whose allocator has a limit they lie in it, beside the steps: of that
# limit one takes at most this part.
_LEAST_PART = 32


def superbatch_size(given, base, epoch, replicas, data):
    """Returns the examples in a superbatch.

    Args:
        given: What the user asked for, or None to choose.
        base: B₀, in examples.
        epoch: Examples in an epoch; infinite if that is not known.
        replicas: Number of replicas.
        data: The `Batched`, which tells whether batches must stay as they are,
            and how many bytes are copied.

    Raises:
        ValueError: If what is given is no size of the ladder, or not that of
            batches that cannot be joined.
    """
    if data.as_it_is is not None:
        return _own_size(data.as_it_is, given, base, replicas)
    if given is not None:
        return checked_superbatch_size(given, base, replicas)
    limit = base * _BATCHES_OF_UNKNOWN
    if epoch < math.inf:
        limit = max(
            epoch / _SUPERBATCHES_PER_EPOCH,
            min(base * _BATCHES_PER_SUPERBATCH, epoch / _FEWEST_PER_EPOCH),
            min(_SMALLEST_SUPERBATCH, epoch),
        )
    if data.bytes_each:
        limit = min(limit, _most_bytes() / data.bytes_each)
    return largest_on_ladder(base, limit, replicas)


def _most_bytes():
    """Bytes that a superbatch which is copied may hold."""
    stated = out_of_memory.stated_limit_on_cpu() or math.inf
    return min(MOST_BYTES, stated / _LEAST_PART)


def _own_size(own, given, base, replicas):
    fits = largest_on_ladder(base, own, replicas) == own
    if given not in (None, own) or not fits:
        raise ValueError(
            "`batch_size` and `superbatch_size` must fit the batches of the "
            "data where shapes vary from batch to batch: these cannot be "
            f"joined, so each is a superbatch. Received: batches of {own} "
            f"examples, batch_size={base}, superbatch_size={given}. Use "
            f"batch_size={own} and superbatch_size=None, or give all batches "
            "one shape, by `padded_shapes` or `set_shape`."
        )
    return own


def of_epoch(size, epoch):
    """Returns the sizes of the superbatches of an epoch, the last smaller.

    Args:
        size: Examples in a superbatch.
        epoch: Examples in an epoch.

    Returns:
        List of integers.
    """
    whole, rest = divmod(epoch, size)
    return [size] * whole + [rest] * (rest > 0)
