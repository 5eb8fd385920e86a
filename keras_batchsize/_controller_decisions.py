"""Which size comes next: what the policy wishes, and tries of larger sizes.

The line T(B) = a + c·B says what a size costs that was never timed, but only a
guess: an example of a convolutional network got cheaper with every doubling on
a CPU, by as much as a line through any two sizes says of the first one only. So
a larger size is tried once where that may well pay. It is kept if the times of
both sizes say that it is faster.
"""

import math

from keras_batchsize import policies
from keras_batchsize.records import Decision

# Going back must bring 5 %, too, as any change of `Goodput` by default.
_SLOWER = 1.0 / 1.05


class Decisions:
    """Asks the policy, tries sizes, and goes back where they do not pay.

    Args:
        policy: A `BatchSizePolicy`.
        ladder: The `Ladder` of sizes that may be used.
        speed: The `Speed` of the run.
    """

    def __init__(self, policy, ladder, speed):
        self._policy = policy
        self._ladder = ladder
        self._speed = speed
        # The size to go back to, while a larger one is in use on trial.
        self._before = None

    def next(self, status, estimate):
        """Returns the `Decision` to change the size, None if it stays.

        Args:
            status: A `Status`, its noise scale NaN while not resolved.
            estimate: The `NoiseScaleEstimate` that its noise fields are from.
        """
        return (
            self._end_of_try(status)
            or self._wish(status, estimate)
            or self._try(status, estimate)
        )

    def _end_of_try(self, status):
        before, self._before = self._before, None
        if before is None:
            return None
        size = status.batch_size
        gain = self._speed.observed_speedup(before, size, status)
        # Not known, it says nothing against the size.
        if math.isnan(gain) or gain > _SLOWER:
            return None
        predicted = 1.0 / gain if gain else math.inf
        reason = f"{size} turned out {gain:.2f} times as fast"
        return self._change(status, before, predicted, reason)

    def _wish(self, status, estimate):
        new = policies.next_batch_size(
            self._policy, status, estimate, self._ladder
        )
        if new == status.batch_size:
            return None
        predicted = self._speed.predicted_speedup(status, new)
        return self._change(
            status, new, predicted, self._policy.reason(status)
        )

    def _try(self, status, estimate):
        new = status.larger
        if not (estimate.resolved and self._is_new(status.batch_size, new)):
            return None
        at_least = policies.at_noise(status, estimate, estimate.lower)
        if not self._policy.is_worth_a_try(at_least):
            return None
        reason = f"a try: {new} was never timed"
        return self._change(status, new, math.nan, reason)

    def _change(self, status, new, predicted, reason):
        """Returns the `Decision`, and remembers the way back from a try."""
        old = status.batch_size
        if self._is_new(old, new):
            self._before = old
        return Decision(
            old_batch_size=old,
            new_batch_size=new,
            noise_scale=status.noise_scale,
            predicted_speedup=predicted,
            reason=reason,
        )

    def _is_new(self, old, new):
        """Whether a size is larger, for speed, and nothing is known of it."""
        larger = self._policy.for_speed and new > old
        return larger and not self._speed.knows(new)

    def get_state(self):
        """Returns the size to go back to, None if there is none."""
        return self._before

    def set_state(self, before):
        """Takes over what `get_state` returned."""
        self._before = before and self._ladder.nearest(before)
