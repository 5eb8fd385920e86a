"""What several workers settle before a probe, which they run together.

All must try the same sizes: one that tried another, or none, would be waited
for without end.
"""

import hashlib
import json
import math

import keras

from keras_batchsize import distributed
from keras_batchsize import replicas
from keras_batchsize._memory_key import spec_of
from keras_batchsize._memory_meters import meter_for
from keras_batchsize.workers import Workers


def check_alike(model, examples, limits, **facts):
    """Raises on every worker if they are about to probe differently.

    Memory may differ, and `memory_limit` with it: the least of all decides.
    How it is measured may not: of what a worker cannot tell it asks nobody.

    Args:
        model: A compiled Keras model.
        examples: Its `Examples`.
        limits: The `Limits`.
        **facts: What else has to be the same, of any type with a `repr`.

    Raises:
        ValueError: If workers differ.
        RuntimeError: If a worker does not come.
    """
    if replicas.workers(model) == 1:
        return
    meter = meter_for(model)
    facts = {
        "measured_by": meter.name,
        "room_beside": [meter.reserve, meter.lost_bytes, meter.holes],
        "is_memory_of_the_host": meter.is_shared,
        "examples": examples.count,
        "or_fewer_by": examples.fewer,
        "example": keras.tree.map_structure(spec_of, examples.one),
        "bytes_of_data": examples.data_bytes,
        **vars(limits),
        **facts,
    }
    del facts["memory_limit"]
    workers = Workers(model.distribute_strategy)
    workers.check_alike(distributed.described(model, facts))


def least_limit(model, limits):
    """Returns the smallest `memory_limit` of all workers, None if none has one.

    Args:
        model: A compiled Keras model.
        limits: The `Limits` of this worker.
    """
    if replicas.workers(model) == 1:
        return limits.memory_limit
    workers = Workers(model.distribute_strategy)
    (inverse,) = workers.largest([1.0 / (limits.memory_limit or math.inf)])
    return round(1.0 / inverse) if inverse else None


def shared_by_all(model, profile):
    """Returns a kept profile if all workers have kept the same one.

    Of the same size is not enough: batch sizes are decided by its times, too.

    Args:
        model: A compiled Keras model.
        profile: The `BatchProfile` that this worker has, or None.

    Returns:
        The profile; None if they are to probe.
    """
    if replicas.workers(model) == 1:
        return profile
    workers = Workers(model.distribute_strategy)
    most, inverse, missing = workers.largest(numbers_of(profile))
    return None if missing or inverse != 1.0 / most else profile


def numbers_of(profile):
    """Returns what tells a profile from others, as positive numbers.

    Args:
        profile: A `BatchProfile` or None.

    Returns:
        Tuple of a number, its inverse, which is larger where the number is
        smaller, and whether there is no profile.
    """
    if profile is None:
        return 0.0, 0.0, 1.0
    text = json.dumps([profile.max_batch_size, profile.to_dict()["rows"]])
    # Of 48 bits: a float holds it, and inverses are different floats, too.
    digits = hashlib.sha256(text.encode()).hexdigest()[:12]
    number = 1.0 + int(digits, 16)
    return number, 1.0 / number, 0.0
