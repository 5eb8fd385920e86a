"""Which batch sizes are possible, and how one of them is carried out."""

import dataclasses
import math

from keras_batchsize import _checks


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How one update is made: replicas x accumulation_steps x micro-batch.

    Attributes:
        batch_size: Examples per update, over all replicas.
        micro_batch_size: Examples that one replica holds in memory in one
            forward and backward pass.
        replicas: Number of replicas that share an update.
    """

    batch_size: int
    micro_batch_size: int
    replicas: int = 1

    @property
    def accumulation_steps(self):
        """Micro-batches that one replica sums up for one update."""
        return math.ceil(
            self.batch_size / (self.micro_batch_size * self.replicas)
        )


def plan_for(
    batch_size, largest_micro_batch_size, replicas=1, superbatch_size=None
):
    """Returns the plan with as few micro-batches as memory allows.

    Equal ones, wherever less than twice as many are enough for that: XLA only
    takes those, and without it gradients of equal parts tell more of the noise.
    On a ladder of powers of two they always are. Where they are not (an odd
    base, say), the last one is smaller, and XLA does not compile them.

    Args:
        batch_size: Examples per update, over all replicas.
        largest_micro_batch_size: Examples that fit one replica at once.
        replicas: Number of replicas.
        superbatch_size: Examples at hand at a time, of which a batch that is
            larger is made; None for all of the batch.

    Returns:
        A `BatchPlan`.
    """
    at_hand = min(batch_size, superbatch_size or batch_size)
    share, largest = math.ceil(at_hand / replicas), largest_micro_batch_size
    if share <= largest:
        return BatchPlan(batch_size, share, replicas)
    fewest = math.ceil(share / largest)
    micro = next(
        (
            share // count
            for count in range(fewest, min(2 * fewest, share + 1))
            if share % count == 0
        ),
        largest,
    )
    return BatchPlan(batch_size, micro, replicas)


@dataclasses.dataclass(frozen=True)
class Ladder:
    """The batch sizes base·2ᵏ between two bounds.

    On this ladder every size divides every larger one, so that a superbatch,
    itself on the ladder, is cut into whole batches, or a batch is made of
    whole superbatches.

    Every size is a multiple of the number of replicas R, or the replicas with
    larger shares would make the others wait. Only the base is kept as it was
    given; where it is no multiple of R, the next size is their least common
    multiple. It could lie closer to the base, but would not be cut from the
    same superbatch any more.

    Attributes:
        base: The base batch size B₀, in examples.
        minimum: Smallest size that may be used.
        maximum: Largest size that may be used.
        base_name: What the caller calls the base size.
        replicas: Number R of replicas that share an update.
    """

    base: int
    minimum: int
    maximum: int
    base_name: str = "batch_size"
    replicas: int = 1

    def __post_init__(self):
        why = "it counts the examples of an update"
        for name, label, remedy in (
            ("base", self.base_name, 32),
            ("minimum", "min_batch_size", self.base),
            ("maximum", "max_batch_size", self.base),
        ):
            value = _checks.positive_int(
                label, getattr(self, name), why, f"Use {label}={remedy}."
            )
            # Frozen; but an integer of NumPy must not get into the JSON state.
            object.__setattr__(self, name, value)
        self._check_bounds()

    def _check_bounds(self):
        """Raises if the bounds leave no size, or not the base."""
        # A bound that is the base was not given, as a rule.
        given = {
            name: value
            for name, value in (
                ("min_batch_size", self.minimum),
                ("max_batch_size", self.maximum),
            )
            if value != self.base
        }
        if self.minimum > self.maximum and len(given) == 2:
            raise ValueError(
                "`min_batch_size` must not be larger than `max_batch_size`: "
                "no size would be left between them. Received: "
                f"min_batch_size={self.minimum}, "
                f"max_batch_size={self.maximum}. {self._ordered()}"
            )
        if not self.minimum <= self.base <= self.maximum:
            received = {self.base_name: self.base, **given}
            raise ValueError(
                "The base batch size must lie between `min_batch_size` and "
                "`max_batch_size`: training starts from it. Received: "
                f"{_in_words(received)}. {self._moved(given)}"
            )

    def _moved(self, given):
        """Says what to change so that the base lies between the bounds."""
        if len(given) == 1:
            return f"Use {next(iter(given))}={self.base}."
        nearest = self.minimum
        if self.base > self.maximum:
            nearest = self.maximum
        return f"Use {self.base_name}={nearest}, or widen the bounds."

    def _ordered(self):
        """Says which bound to change so that the base lies between them."""
        if self.base <= self.maximum:
            return f"Use min_batch_size={self.base}."
        if self.base >= self.minimum:
            return f"Use max_batch_size={self.base}."
        return (
            f"Use min_batch_size={self.maximum}, max_batch_size={self.minimum}."
        )

    @property
    def sizes(self):
        """All sizes, in increasing order."""
        smaller, size = [], self.base
        while size % (2 * self.replicas) == 0 and size // 2 >= self.minimum:
            size //= 2
            smaller.append(size)
        larger, size = [self.base], math.lcm(self.base, self.replicas)
        if size == self.base:
            size *= 2
        while size <= self.maximum:
            larger.append(size)
            size *= 2
        return tuple(reversed(smaller)) + tuple(larger)

    def nearest(self, batch_size):
        """Returns the size on the ladder whose logarithm is closest."""
        if batch_size >= self.sizes[-1]:
            return self.sizes[-1]
        if batch_size <= self.sizes[0]:
            return self.sizes[0]
        wanted = math.log(batch_size)
        return min(self.sizes, key=lambda size: abs(math.log(size) - wanted))

    def neighbours(self, batch_size):
        """Returns (next smaller or same, next larger or same) size."""
        sizes = self.sizes
        index = sizes.index(batch_size)
        return sizes[max(index - 1, 0)], sizes[min(index + 1, len(sizes) - 1)]


def _in_words(arguments):
    return ", ".join(f"{name}={value}" for name, value in arguments.items())


def largest_on_ladder(base_batch_size, limit, replicas=1):
    """Returns the largest size of a `Ladder` that is at most `limit`.

    Args:
        base_batch_size: B₀, in examples.
        limit: Largest size wanted, in examples.
        replicas: Number of replicas that share an update.

    Returns:
        Integer, B₀·2ᵏ for one replica; `base_batch_size` if the limit is
        smaller than the next size.
    """
    common = math.lcm(base_batch_size, replicas)
    ratio = int(limit // common)
    if ratio < 1:
        return base_batch_size
    return common * 2 ** (ratio.bit_length() - 1)


def multiples_in_words(base_batch_size, replicas=1):
    """Says how larger sizes on a `Ladder` follow from its base.

    Args:
        base_batch_size: B₀, in examples.
        replicas: Number of replicas that share an update.

    Returns:
        Text that follows the name of the base.
    """
    share = math.lcm(base_batch_size, replicas) // base_batch_size
    if share == 1:
        return "times a power of two"
    return f"times {share} and a power of two, for {replicas} replicas"


def checked_superbatch_size(given, base_batch_size, replicas=1):
    """Returns a superbatch size that lies on the ladder of a base.

    Args:
        given: Examples per superbatch, as the user stated it.
        base_batch_size: B₀, in examples.
        replicas: Number of replicas that share an update.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is not on the ladder.
    """
    given = _checks.positive_int(
        "superbatch_size",
        given,
        "it counts the examples of a Keras step",
        f"Use superbatch_size={16 * math.lcm(base_batch_size, replicas)}.",
    )
    fitting = largest_on_ladder(base_batch_size, given, replicas)
    if given != fitting:
        raise ValueError(
            "`superbatch_size` must be the base batch size "
            f"{multiples_in_words(base_batch_size, replicas)}, so that every "
            f"size divides it. Received: superbatch_size={given}, "
            f"batch_size={base_batch_size}. Use superbatch_size={fitting}."
        )
    return given
