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


def plan_for(batch_size, largest_micro_batch_size, replicas=1):
    """Returns the plan with as few micro-batches as memory allows.

    Args:
        batch_size: Examples per update, over all replicas.
        largest_micro_batch_size: Examples that fit one replica at once.
        replicas: Number of replicas.

    Returns:
        A `BatchPlan`.
    """
    share = math.ceil(batch_size / replicas)
    return BatchPlan(
        batch_size, min(share, largest_micro_batch_size), replicas
    )


@dataclasses.dataclass(frozen=True)
class Ladder:
    """The batch sizes base·2ᵏ between two bounds.

    On this ladder every size divides every larger one, so that a superbatch,
    itself on the ladder, is cut into whole batches, or a batch is made of
    whole superbatches.

    Attributes:
        base: The base batch size B₀, in examples.
        minimum: Smallest size that may be used.
        maximum: Largest size that may be used.
        base_name: What the caller calls the base size.
        replicas: Number of replicas that share an update. Sizes stay
            multiples of it as far as the base is one: replicas with larger
            shares would make the others wait.
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
        if self.minimum > self.maximum:
            raise ValueError(
                "`min_batch_size` must not be larger than `max_batch_size`: "
                "no size would be left between them. Received: "
                f"min_batch_size={self.minimum}, "
                f"max_batch_size={self.maximum}. {self._ordered()}"
            )
        if not self.minimum <= self.base <= self.maximum:
            raise ValueError(
                "The base batch size must lie between `min_batch_size` and "
                "`max_batch_size`: training starts from it. Received: "
                f"{self.base_name}={self.base}, "
                f"min_batch_size={self.minimum}, "
                f"max_batch_size={self.maximum}. Use {self.base_name}="
                f"{min(max(self.base, self.minimum), self.maximum)}, or "
                "widen the bounds."
            )

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
        step = 2 * math.gcd(self.base, self.replicas)
        while size % step == 0 and size // 2 >= self.minimum:
            size //= 2
            smaller.append(size)
        larger, size = [self.base], self.base
        while size * 2 <= self.maximum:
            size *= 2
            larger.append(size)
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


def largest_on_ladder(base_batch_size, limit):
    """Returns the largest base·2ᵏ, k >= 0, that is at most `limit`.

    Args:
        base_batch_size: B₀, in examples.
        limit: Largest size wanted, in examples.

    Returns:
        Integer; `base_batch_size` if the limit is smaller.
    """
    ratio = max(int(limit // base_batch_size), 1)
    return base_batch_size * 2 ** (ratio.bit_length() - 1)
