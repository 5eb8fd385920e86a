"""What a caller allows a probe, checked."""

import contextlib
import math
import warnings

from keras_batchsize import _checks


class NothingFits(ValueError):
    """Raised where not even the smallest batch fits memory."""


@contextlib.contextmanager
def errors_of_fit():
    """Lets what does not fit be told by what `fit` can be told, no limits.

    Yields:
        None.

    Raises:
        NothingFits: In place of one that names arguments of a probe.
    """
    try:
        yield
    except NothingFits as error:
        found = str(error).partition(" Received: ")[0]
        raise NothingFits(
            f"{found} Received: max_batch_size=None, for which a probe looks "
            "for the largest size. Use a smaller model, an optimizer with "
            "fewer slots, shorter examples, or a mixed dtype policy; or "
            "max_batch_size=32, say: then nothing is probed, and what does "
            "not fit is run in smaller parts."
        ) from error


class Limits:
    """What a caller allows, checked.

    Args:
        start: Smallest size to try, in examples.
        maximum: Largest size to try, or None.
        memory_limit: Bytes of the device, or None for all there are.
        safety_margin: Share of the limit that stays free.
        time_budget: Seconds.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If an argument has an impossible value.
    """

    def __init__(
        self,
        start=1,
        maximum=None,
        memory_limit=None,
        safety_margin=0.05,
        time_budget=60.0,
    ):
        why = "it counts examples"
        self.start = _checks.positive_int("start", start, why, "Use start=1.")
        self.maximum = math.inf
        if maximum is not None:
            self.maximum = _checks.positive_int(
                "maximum", maximum, why, "Use maximum=None for no bound."
            )
        if self.start > self.maximum:
            raise ValueError(
                "`start` must not be larger than `maximum`: sizes are tried "
                f"from below. Received: start={start}, maximum={maximum}. Use "
                f"start={min(start, maximum)}."
            )
        self.memory_limit = memory_limit
        if memory_limit is not None:
            self.memory_limit = _checks.positive_int(
                "memory_limit",
                memory_limit,
                "it is the memory of the device in bytes",
                "Use memory_limit=4 * 2**30 for 4 GiB, or None for all.",
            )
        self.safety_margin = _open_share(safety_margin)
        self.time_budget = _checks.real(
            "time_budget",
            time_budget,
            0.0,
            math.inf,
            "it is the time for trials in seconds",
            "Use time_budget=60.",
        )

    def warn_of_unmeasured(self):
        """Warns that nothing keeps a probe below the limit, if one is given.

        Where memory cannot be measured, and no graph tells what an example
        may take.
        """
        if self.memory_limit is not None:
            warnings.warn(
                "`memory_limit` cannot be enforced: memory cannot be measured "
                "here, and no graph of the model and its loss tells what an "
                f"example may take. Received: memory_limit="
                f"{self.memory_limit}. State `maximum`, or use isolation=True, "
                "where TensorFlow's own allocator holds to the limit.",
                RuntimeWarning,
                stacklevel=3,
            )

    def check_replicas(self, count):
        """Raises if the largest size leaves a replica without an example.

        Args:
            count: Integer, number of replicas.

        Raises:
            ValueError: If `maximum` is smaller.
        """
        if self.maximum < count:
            raise ValueError(
                "`maximum` must be at least the number of replicas: each "
                f"takes an example. Received: maximum={self.maximum}, with "
                f"{count} replicas. Use maximum={count}."
            )


def _open_share(safety_margin):
    remedy = "Use safety_margin=0.05."
    why = "it is the share of the memory that stays free"
    share = _checks.real("safety_margin", safety_margin, 0.0, 1.0, why, remedy)
    if share in (0.0, 1.0):
        raise ValueError(
            "`safety_margin` must lie between 0 and 1, both excluded: "
            f"{why}, and peaks of equal steps differ. Received: "
            f"safety_margin={safety_margin}. {remedy}"
        )
    return share
