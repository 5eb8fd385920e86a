"""Dtype policies side by side: what each buys, and whether it learns alike."""

import dataclasses
import gc
import math
import random

import keras

from keras_batchsize import _batch_profile_text
from keras_batchsize import _keras_private_random
from keras_batchsize import out_of_memory
from keras_batchsize import size_search
from keras_batchsize._batch_profile_text import whole
from keras_batchsize._memory_examples import read_examples
from keras_batchsize._memory_limits import NothingFits
from keras_batchsize._memory_meters import HOST_MEMORY
from keras_batchsize._memory_process import NOT_SUPPORTED
from keras_batchsize._superbatches_arrays import is_arrays
from keras_batchsize.batch_profile import BatchProfile

# First updates whose losses are compared, on so many examples each.
UPDATES, EXAMPLES = 5, 32
# Losses agree up to the rounding of the type that is computed in, times the
# few dozen roundings on the way from an input to the loss.
_ROUNDINGS = 16
# Bits of the mantissa, float32's where a name is in no other's.
_BITS = (("float8", 3), ("bfloat16", 7), ("float16", 10), ("", 23))
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
        profile: The `BatchProfile`; None if the policy does not run, or if
            nothing fits.
        losses: Losses of the first updates, from the same weights and data;
            empty where their examples do not fit.
        agrees: Whether they are those of the first policy that runs, up to
            rounding and up to what other seeds do to them.
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
            print_fn: Function of a string, called once with the whole text,
                as by `keras.Model.summary`; None for the standard output.
        """
        _batch_profile_text.show(str(self), print_fn)


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
        _outcome(result),
    )


def _outcome(result):
    if not result.losses:
        return "not compared"
    return "agree" if result.agrees else "differ"


def compared(build_fn, x, y, policies, find):
    """Probes policies and compares them.

    Args:
        build_fn: Function without arguments that returns a compiled model.
        x: As in `find_max_batch_size`.
        y: As in `Model.fit`.
        policies: Names of dtype policies.
        find: Function from a model to its `BatchProfile`.

    Returns:
        A `DtypeComparison`.
    """
    before = keras.config.dtype_policy()
    first = _First(policies[0])
    results = []
    try:
        with _keras_private_random.states_kept():
            seed = random.randrange(2**31)
            for policy in policies:
                # Models are cycles of references: the last still fill memory.
                gc.collect()
                keras.config.set_dtype_policy(policy)
                keras.utils.set_random_seed(seed)
                results.append(_result(build_fn, policy, (x, y), find, first))
            spread = 0.0
            if first.result is not None:
                # Last, or its models would take the memory that is probed.
                keras.config.set_dtype_policy(first.result.dtype_policy)
                spread = _spread(build_fn, first)
    finally:
        keras.config.set_dtype_policy(before)
    results = [_judged(result, first.result, spread) for result in results]
    return DtypeComparison(results, *_recommendation(results))


class _First:
    """What was found under the first policy that runs.

    Args:
        policy: Name of the very first.

    Attributes:
        result: Its `PolicyResult`, None before.
        weights: Initial weights, from which all policies start.
        examples: On how many examples losses are compared.
        parts: These examples, as `train_on_batch` takes them.
    """

    def __init__(self, policy):
        self.policy = policy
        self.result = self.weights = None
        self.examples, self.parts = EXAMPLES, ()


def _result(build_fn, policy, data, find, first):
    try:
        model = build_fn()
        profile = find(model)
        fitting = profile.max_batch_size if _is_scarce(profile) else math.inf
        if first.result is None:
            first.weights = model.get_weights()
            first.examples = min(EXAMPLES, fitting)
            first.parts = _first_examples(model, data, first.examples)
        losses = ()
        if first.examples <= fitting:
            losses = _first_losses(model, first)
    except NothingFits as error:
        # What follows is of the call.
        text, _, _ = str(error).partition(" Received:")
        return PolicyResult(policy, None, (), False, text)
    except Exception as error:
        name = type(error).__name__
        if out_of_memory.is_out_of_memory(error):
            note = f"does not fit: {name}"
        elif policy != first.policy and isinstance(error, NOT_SUPPORTED):
            # A layer or a device that does not know the type.
            note = f"does not run: {name}"
        else:
            raise
        return PolicyResult(policy, None, (), False, note)
    result = PolicyResult(policy, profile, losses, False)
    first.result = first.result or result
    return result


def _judged(result, reference, spread):
    agrees = bool(result.losses) and _agree(result, reference, spread)
    return dataclasses.replace(result, agrees=agrees)


def _spread(build_fn, first):
    """Returns how far other seeds take a loss, 0 without randomness."""
    spread, losses = 0.0, first.result.losses
    for seed in range(_SEEDS):
        gc.collect()  # What is left of the model before.
        keras.utils.set_random_seed(seed)
        model = build_fn()
        # It may have set the seed itself: other masks come later, too.
        for _ in range(seed + 1):
            model(first.parts[0], training=True)
        others = _first_losses(model, first)
        if others == losses:
            break
        spread = max(
            spread, *(abs(one - other) for one, other in zip(losses, others))
        )
    return spread


def _first_losses(model, first):
    """Trains a few updates from given weights, and returns their losses."""
    if [one.shape for one in first.weights] == [
        one.shape for one in model.get_weights()
    ]:
        model.set_weights(first.weights)
    losses = []
    for _ in range(UPDATES):
        model.reset_metrics()
        logs = model.train_on_batch(*first.parts, return_dict=True)
        losses.append(float(logs["loss"]))
    return tuple(losses)


def _first_examples(model, data, count):
    """Returns x and y, and weights where batches hold them, cut to a few."""
    if is_arrays(data[0]):
        return keras.tree.map_structure(
            lambda one: None if one is None else one[:count], data
        )
    with _keras_private_random.states_kept():
        few = read_examples(model, *data).few(count)
    return keras.utils.unpack_x_y_sample_weight(few)


def _agree(result, reference, spread):
    # Both round: the coarser of the two says how far they may be apart.
    bits = min(map(_bits_of, (result.dtype_policy, reference.dtype_policy)))
    tolerance = min(_ROUNDINGS * 2.0**-bits, 0.25)
    return all(
        math.isfinite(one)
        and abs(one - other) <= tolerance * abs(other) + spread
        for one, other in zip(result.losses, reference.losses)
    )


def _bits_of(policy):
    return next(bits for name, bits in _BITS if name in policy)


def _is_scarce(profile):
    """Whether memory ended a probe, of whatever kind it was."""
    if profile.reason == size_search.TRIALS:
        return not all(row.fits for row in profile.rows)
    return profile.reason in (size_search.MEMORY, HOST_MEMORY)


def _recommendation(results):
    """Returns the name of what pays, or None, and the reason."""
    first, *others = results
    if first.profile is None:
        return None, _without_first(first.dtype_policy, others)
    best, gain = None, _WORTH
    for result in others:
        if result.profile is None or not result.agrees:
            continue
        faster = (
            result.profile.best_examples_per_second
            / first.profile.best_examples_per_second
        )
        larger = result.profile.max_batch_size / first.profile.max_batch_size
        if not _is_scarce(first.profile):
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


def _without_first(policy, others):
    """Says what there is where the first policy does not run."""
    running = [one.dtype_policy for one in others if one.profile is not None]
    if not running:
        return f"Nothing to compare: neither {policy} nor another one runs."
    return (
        f"Nothing to compare with: {policy} does not run. Those that do: "
        f"{', '.join(running)}; whether they learn as it would is not known."
    )
