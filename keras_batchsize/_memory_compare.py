"""Dtype policies side by side: what each buys, and whether it learns alike."""

import dataclasses
import gc
import math
import random
import sys

import keras
import numpy as np
import tensorflow as tf

from keras_batchsize import keras_private
from keras_batchsize._batch_profile_text import whole
from keras_batchsize.batch_profile import BatchProfile

# First updates whose losses are compared, on so many examples each.
UPDATES, EXAMPLES = 5, 32
# Losses agree up to the rounding of the type that is computed in, times the
# few dozen roundings on the way from an input to the loss.
_ROUNDINGS = 16
# Under another policy dropout draws other masks. What that does to the losses
# is seen with so many other seeds: the most of all updates, as that of one is
# the spread of a few numbers.
_SEEDS = 3
# A policy must be that much better to be worth the change.
_WORTH = 1.1


@dataclasses.dataclass(frozen=True)
class PolicyResult:
    """What was found under one dtype policy.

    Attributes:
        dtype_policy: Its name.
        profile: The `BatchProfile`; None if the policy does not run.
        losses: Losses of the first updates, from the same weights and data.
        agrees: Whether they are those of the first policy, up to rounding and
            up to what other seeds do to them.
        note: Why it did not run, "" if it did.
    """

    dtype_policy: str
    profile: BatchProfile | None
    losses: tuple
    agrees: bool
    note: str = ""


@dataclasses.dataclass(frozen=True)
class DtypeComparison:
    """Dtype policies side by side.

    Attributes:
        results: List of `PolicyResult`; the first is what others are compared
            with.
        recommended: Name of the policy that pays, or None if none does.
        reason: Why, in a sentence.
    """

    results: list
    recommended: str | None
    reason: str

    def __str__(self):
        rows = [_HEADER] + [_cells(result) for result in self.results]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths))
            for row in rows
        ]
        return "\n".join([*map(str.rstrip, lines), "", self.reason])

    def summary(self, print_fn=None):
        """Prints the comparison as a table.

        Args:
            print_fn: Function of a string, called once per line; None for
                the standard output.
        """
        for line in str(self).splitlines():
            if print_fn is None:
                sys.stdout.write(line + "\n")
            else:
                print_fn(line)


_HEADER = (
    "policy",
    "largest batch",
    "ended by",
    "examples/s",
    "MB per example",
    "first losses",
)


def _cells(result):
    profile = result.profile
    if profile is None:
        return (result.dtype_policy, "-", "-", "-", "-", result.note)
    return (
        result.dtype_policy,
        f"{profile.max_batch_size:,}",
        profile.reason,
        whole(profile.best_examples_per_second),
        f"{profile.bytes_per_example / 1e6:.3g}",
        "agree" if result.agrees else "differ",
    )


def compared(build_fn, x, y, policies, find):
    """Probes policies and compares them.

    Args:
        build_fn: Function without arguments that returns a compiled model.
        x: As in `Model.fit`.
        y: As in `Model.fit`.
        policies: Names of dtype policies.
        find: Function from a model to its `BatchProfile`.

    Returns:
        A `DtypeComparison`.
    """
    before = keras.config.dtype_policy()
    states = random.getstate(), np.random.get_state()
    keras_state = keras_private.global_state()
    seed = random.Random(str(states[0])).randrange(2**31)
    results, weights = [], None
    try:
        for policy in policies:
            # Models are cycles of references: the last ones still fill memory.
            gc.collect()
            keras.config.set_dtype_policy(policy)
            keras.utils.set_random_seed(seed)
            result, weights = _result(build_fn, policy, (x, y), find, weights)
            results.append(result)
        # Last, or its models would take the memory that is probed.
        keras.config.set_dtype_policy(policies[0])
        spread = _spread(build_fn, (x, y), results[0].losses, weights)
    finally:
        keras.config.set_dtype_policy(before)
        random.setstate(states[0])
        np.random.set_state(states[1])
        keras_private.set_global_state(keras_state)
    results = [_judged(result, results[0], spread) for result in results]
    return DtypeComparison(results, *_recommendation(results))


def _result(build_fn, policy, data, find, weights):
    first = weights is None
    try:
        model = build_fn()
        profile = find(model)
        weights = model.get_weights() if first else weights
        losses = _first_losses(model, data, weights)
    except (
        NotImplementedError,
        TypeError,
        tf.errors.InvalidArgumentError,
        tf.errors.UnimplementedError,
    ) as error:
        if first:
            raise
        # A layer or a device that does not know the type.
        note = f"does not run: {type(error).__name__}"
        return PolicyResult(policy, None, (), False, note), weights
    return PolicyResult(policy, profile, losses, False), weights


def _judged(result, reference, spread):
    agrees = result.profile is not None and _agree(
        result.losses, reference.losses, spread, result.dtype_policy
    )
    return dataclasses.replace(result, agrees=agrees)


def _spread(build_fn, data, losses, weights):
    """Returns how far other seeds take a loss, 0 without randomness."""
    spread = 0.0
    for seed in range(_SEEDS):
        keras.utils.set_random_seed(seed)
        model = build_fn()
        # It may have set the seed itself: other masks come later, too.
        for _ in range(seed + 1):
            model(_first_examples(data[0]), training=True)
        others = _first_losses(model, data, weights)
        if others == losses:
            break
        spread = max(
            spread, *(abs(one - other) for one, other in zip(losses, others))
        )
    return spread


def _first_losses(model, data, weights):
    """Trains a few updates from given weights, and returns their losses."""
    parts = _first_examples(data)
    if [one.shape for one in weights] == [
        one.shape for one in model.get_weights()
    ]:
        model.set_weights(weights)
    losses = []
    for _ in range(UPDATES):
        model.reset_metrics()
        logs = model.train_on_batch(*parts, return_dict=True)
        losses.append(float(logs["loss"]))
    return tuple(losses)


def _first_examples(data):
    return keras.tree.map_structure(lambda one: one[:EXAMPLES], data)


def _agree(losses, expected, spread, policy):
    digits = 23
    if "bfloat16" in policy:
        digits = 7
    elif "float16" in policy:
        digits = 10
    elif "float8" in policy:
        digits = 3
    tolerance = min(_ROUNDINGS * 2.0**-digits, 0.25)
    return all(
        math.isfinite(one)
        and abs(one - other) <= tolerance * abs(other) + spread
        for one, other in zip(losses, expected)
    )


def _recommendation(results):
    """Returns the name of what pays, or None, and the reason."""
    first, *others = results
    if first.profile is None:
        return None, f"Nothing to compare with: {first.dtype_policy} fails."
    best, gain = None, _WORTH
    for result in others:
        if result.profile is None or not result.agrees:
            continue
        faster = (
            result.profile.best_examples_per_second
            / first.profile.best_examples_per_second
        )
        larger = result.profile.max_batch_size / first.profile.max_batch_size
        if first.profile.reason != "memory":
            larger = 1.0  # Something else ended it: memory was not scarce.
        # What does not fit at all is worth more than speed, but not if it
        # trains more slowly.
        value = faster if faster >= 1.0 / _WORTH and larger < _WORTH else 0.0
        if faster >= 1.0 / _WORTH and larger >= _WORTH:
            value = max(faster, larger)
        if value >= gain:
            best, gain = result, value
    if best is None:
        return None, (
            f"None pays here: stay with {first.dtype_policy}. The others are "
            f"not {_WORTH - 1:.0%} faster or larger, or do not learn alike."
        )
    return best.dtype_policy, (
        f"{best.dtype_policy} pays: {gain:.2f} times {first.dtype_policy} in "
        "speed or batch size, and it learns alike."
    )
