"""When gradient noise is measured, and what the updates' times were.

Measuring a superbatch means computing its gradient once more than training
does. What that buys grows with the square of the examples in one measurement:
the estimate of ‖G‖² spreads as φ/examples. Hence rarely, and then on a whole
superbatch, rather than often on single batches.
"""

import math
import statistics

from keras_batchsize import _checks

# Share of the training time that measuring may take, and of that the part that
# is planned with. A hiccup in the last measurement cannot be paid back: there
# must be room for it to take so many times as long as is expected, too, which
# matters where a training is too short for many measurements.
BUDGET = 0.02
_PLANNED = 0.8
_HICCUP = 2.0

# Parts that a superbatch, or a replica's share, is cut into to measure it. With
# n parts the spread of the estimated squared norm is √(2n/(n - 1)) in units of
# φ/(examples·√r), r the effective rank of the noise: 2.0 for two, 1.51 for
# eight, never below 1.41.
PARTS = 8

# Timings remembered per batch size. Decisions and speed-ups go by their lower
# quartile, the time of the base size in reports is their median, the lower of
# two where none is in the middle: a hiccup only ever adds time.
_REMEMBERED = 15

# So many measurements are taken at the start, on every other superbatch and
# whatever they cost: like tracing, a price paid once, without which a short
# training would never learn its noise scale.
_FIRST = 6
_FIRST_EVERY = 2

# The next measurement is taken for as dear as the dearest of so many.
_COSTS = 5


def checked_every(every):
    """Returns how often to measure, as the user stated it, or raises.

    Args:
        every: Integer k >= 1, or "auto".

    Raises:
        TypeError: If it is neither "auto" nor an integer.
        ValueError: If it is smaller than 1.
    """
    if every == "auto":
        return every
    return _checks.positive_int(
        "measure_every",
        every,
        "the noise is measured after so many updates",
        'Use measure_every="auto".',
    )


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
        return statistics.median_low(latest) if latest else None

    def of(self, batch_size):
        """Returns the list of the times of a size, empty if never timed."""
        return list(self._seconds.get(int(batch_size), ()))

    def least(self, batch_size):
        """Returns the fewest seconds of an update, or None if never timed."""
        latest = self._seconds.get(int(batch_size))
        return min(latest) if latest else None

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
    """Says whether the gradient noise of the next superbatch is measured.

    With a number k, when k updates have passed since the last measurement; a
    superbatch of more is measured once. With "auto", after a first few,
    when the training time has paid for it: 2 % of it, a fifth of which is
    kept for hiccups, and in a short training as much as one measurement
    costs. One epoch's budget may be spent in advance, since the first
    estimates are worth most; it is paid back later, so that the share
    holds for the planned training as a whole.

    Args:
        every: Integer k >= 1, "auto", or None to measure nothing.
    """

    def __init__(self, every="auto"):
        self.every = None if every is None else checked_every(every)
        self._elapsed = 0.0
        self._spent = 0.0
        self._costs, self._counts = [], []
        self._taken = 0
        self._updates = 0
        self._superbatches = 0

    def is_due(self, updates, seconds_ahead, examples, most=math.inf):
        """Returns whether to measure the next superbatch.

        Args:
            updates: Updates made so far.
            seconds_ahead: Training time whose budget may be spent in advance.
                Better too little than too much: what is spent is spent.
            examples: How many examples would be measured.
            most: Seconds that measuring them takes at most, if that is known.
        """
        if self.every is None:
            return False
        if self.every != "auto":
            return updates >= self._updates + self.every
        if self._taken < _FIRST:
            return self._superbatches % _FIRST_EVERY == 1
        budget = BUDGET * (self._elapsed + seconds_ahead)
        expected = self._expected(examples, most)
        if budget - self._spent < _HICCUP * expected:
            return False
        return _PLANNED * budget - self._spent >= expected

    def _expected(self, examples, most):
        """What measuring so many examples will cost, rather too much.

        As much as it cost of as many or more. Where there was no such, in
        proportion to less, though time per example falls with their number.
        """
        pairs = list(zip(self._costs, self._counts))
        known = [cost for cost, count in pairs if count >= examples]
        if known:
            return max(known)
        scaled = (cost * examples / count for cost, count in pairs)
        return min(max(scaled, default=math.inf), most)

    def book(self, updates, seconds, cost, examples=0):
        """Books a superbatch.

        Args:
            updates: Updates made before it.
            seconds: Seconds it took in all.
            cost: Seconds of it that measuring took, 0 if that is not known;
                None if it was not measured. The first few measurements are
                not charged.
            examples: How many examples were measured.
        """
        self._superbatches += 1
        self._elapsed += seconds
        if cost is None:
            return
        self._taken += 1
        self._updates = updates
        if cost > 0.0 and examples:
            self._costs = [*self._costs, cost][-_COSTS:]
            self._counts = [*self._counts, examples][-_COSTS:]
        if self._taken > _FIRST:
            self._spent += cost

    @property
    def elapsed(self):
        """Seconds of training so far."""
        return self._elapsed

    @property
    def spent(self):
        """Seconds of them that measuring took, the first few apart."""
        return self._spent

    def get_state(self):
        """Returns the account as plain JSON types."""
        return {
            name: value
            for name, value in vars(self).items()
            if name.startswith("_")
        }

    def set_state(self, state):
        """Takes over what `get_state` returned."""
        vars(self).update(state)
