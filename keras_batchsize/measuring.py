"""How many updates of a superbatch are spent on measuring gradient noise.

Cutting a batch in two halves costs a second pass through the fixed cost of a
step. On a small model that is half an update, so measuring always would cost
half of the speed, while a few measurements per thousand updates are enough.
"""

import math
import statistics

from keras_batchsize import _checks

# Share of the training time that measuring may take.
BUDGET = 0.02

# Timings remembered per batch size; their median is used.
_REMEMBERED = 15

# So many measurements are taken at once, one update in `_FIRST_EVERY`, whatever
# they cost: like tracing, a price paid once, without which a short training
# would never learn its noise scale.
_FIRST = 64
_FIRST_EVERY = 4


class Timings:
    """Seconds per update at each batch size, the latest few of each."""

    def __init__(self):
        self._seconds = {}

    def add(self, batch_size, seconds):
        """Remembers the time of an update.

        Args:
            batch_size: Examples in the update.
            seconds: Its time, averaged over the updates of a call.
        """
        latest = self._seconds.setdefault(int(batch_size), [])
        latest.append(float(seconds))
        del latest[:-_REMEMBERED]

    def median(self, batch_size):
        """Returns the median seconds per update, or None if never timed."""
        latest = self._seconds.get(int(batch_size))
        return statistics.median(latest) if latest else None

    def count(self, batch_size):
        """Returns how many timings of a size are remembered."""
        return len(self._seconds.get(int(batch_size), ()))

    def samples(self):
        """Returns (batch sizes, seconds): two lists of the same length."""
        pairs = [
            (size, one)
            for size, latest in self._seconds.items()
            for one in latest
        ]
        return [size for size, _ in pairs], [one for _, one in pairs]

    def get_state(self):
        """Returns the timings as plain JSON types."""
        return {str(size): list(one) for size, one in self._seconds.items()}

    def set_state(self, state):
        """Takes over what `get_state` returned."""
        self._seconds = {int(size): list(one) for size, one in state.items()}


class MeasuringSchedule:
    """Says how many updates of the next superbatch are measured.

    With a number k, one update in k. With "auto", after a first few dozen, as
    many as 2 % of the training time pay for. One epoch's budget may be spent
    in advance, since the first estimates are worth most; it is paid back
    later, so that the share holds for the planned training as a whole.

    Args:
        every: Integer k >= 1, "auto", or None to measure nothing.
    """

    def __init__(self, every="auto"):
        if every not in ("auto", None):
            every = _checks.positive_int(
                "measure_every",
                every,
                "one update in so many is measured",
                'Use measure_every="auto".',
            )
        self.every = every
        self._elapsed = 0.0
        self._spent = 0.0
        self._due = 0.0
        self._taken = 0

    def updates_to_measure(self, updates, seconds_ahead, plain, measured):
        """Returns how many updates of a superbatch to measure.

        Args:
            updates: Updates in the superbatch.
            seconds_ahead: Training time whose budget may be spent in advance.
            plain: Seconds of an update that is not measured, or None.
            measured: Seconds of a measured update, or None.

        Returns:
            Integer from 0 to `updates`.
        """
        if self.every is None:
            return 0
        if self.every != "auto":
            self._due += updates / self.every
            whole = math.floor(self._due + 1e-9)
            self._due -= whole
            return min(whole, updates)
        if self._taken < _FIRST or plain is None or measured is None:
            return min(max(updates // _FIRST_EVERY, 1), updates)
        credit = BUDGET * (self._elapsed + seconds_ahead) - self._spent
        cost = max(measured - plain, 1e-9)
        return int(min(max(credit / cost, 0.0), updates))

    def spend(self, elapsed, extra, taken):
        """Books a superbatch.

        Args:
            elapsed: Seconds it took in all.
            extra: Seconds of it that measuring cost.
            taken: Updates measured in it.
        """
        self._elapsed += elapsed
        if self._taken >= _FIRST:
            self._spent += extra
        self._taken += taken

    @property
    def share(self):
        """Share of the training time spent on measuring so far."""
        return self._spent / self._elapsed if self._elapsed else 0.0

    def get_state(self):
        """Returns the account as plain JSON types."""
        return {
            "elapsed": self._elapsed,
            "spent": self._spent,
            "due": self._due,
            "taken": self._taken,
        }

    def set_state(self, state):
        """Takes over what `get_state` returned."""
        self._elapsed = state["elapsed"]
        self._spent = state["spent"]
        self._due = state["due"]
        self._taken = state["taken"]
