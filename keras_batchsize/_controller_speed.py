"""What the controller knows of the time of updates."""

import dataclasses
import math

from keras_batchsize import throughput
from keras_batchsize.measuring import PARTS
from keras_batchsize.measuring import Timings


class Speed:
    """Fits the step-time model to the run, and starts from a probe's.

    A probe tells what sizes cost that were never trained with. Training pays
    for more than a step (reading data, callbacks), so as soon as one size is
    timed, the probe's model is scaled to go through it; from the second size
    on its own timings are better.

    Args:
        largest: Largest batch size that is computed in one piece.

    Attributes:
        timings: The `Timings` of the run.
        largest: Likewise.
        communication: Seconds of an all-reduce over the replicas.
    """

    def __init__(self, largest):
        self.timings = Timings()
        self.largest = largest
        self.communication = 0.0
        self._expected = None
        self._step_time = None

    @property
    def step_time(self):
        """The `StepTime`, None before anything is known."""
        return self._step_time

    def expect(self, step_time):
        """Takes over what a probe found.

        Args:
            step_time: A `StepTime`.
        """
        self._expected = step_time
        self.fit()

    def know_communication(self, seconds):
        """Takes over what an all-reduce was timed to take.

        Args:
            seconds: Per update; 0 for one replica.
        """
        self.communication = seconds
        self.fit()

    def add(self, batch_size, seconds):
        """Takes in the time of an update at a size."""
        self.timings.add(batch_size, seconds)
        self.fit()

    def most_to_measure(self, batch_size, examples):
        """Returns what measuring takes at most, by updates of a size.

        A part makes no update, and takes no longer for being smaller.

        Args:
            batch_size: Examples per update.
            examples: Integer, how many are measured.

        Returns:
            Seconds, infinity if no update of the size was timed.
        """
        seconds = self.timings.median(batch_size)
        if seconds is None:
            return math.inf
        return max(PARTS, examples / batch_size) * seconds

    def fit(self):
        """Fits anew, after the timings or `largest` have changed."""
        sizes, seconds = self.timings.samples()
        own = None
        if sizes:
            own = throughput.fit_step_time(
                sizes, seconds, self.largest, self.communication
            )
        if self._expected is not None and (own is None or own.guessed):
            own = self._scaled(sizes, seconds)
        self._step_time = own

    def _scaled(self, sizes, seconds):
        expected = dataclasses.replace(self._expected, largest=self.largest)
        ratios = [one / expected(size) for size, one in zip(sizes, seconds)]
        ratio = throughput.lower_quartile(ratios) if ratios else 1.0
        return dataclasses.replace(
            expected,
            fixed=expected.fixed * ratio,
            per_example=expected.per_example * ratio,
        )

    def goodput(self, status):
        """Returns useful examples per second, NaN if not known.

        Args:
            status: A `Status`.
        """
        if self._step_time is None or math.isnan(status.noise_scale):
            return math.nan
        return throughput.goodput(
            status.batch_size,
            self._step_time,
            status.noise_scale,
            status.reference_batch_size,
            status.efficiency,
        )

    def predicted_speedup(self, status, new):
        """Returns by how much a change should speed up, NaN if not known.

        Args:
            status: A `Status` before the change.
            new: Examples per update after it.
        """
        known = self._step_time
        if known is None or known.guessed or math.isnan(status.noise_scale):
            return math.nan
        return throughput.speedup(
            status.batch_size,
            new,
            known,
            status.noise_scale,
            status.reference_batch_size,
            status.efficiency,
        )

    def observed_speedup(self, old, new, status):
        """Returns the speed-up of a change with the times of both sizes.

        Args:
            old: Examples per update before.
            new: Examples per update after it.
            status: A `Status` with the noise scale to reckon with.

        Returns:
            Float; NaN while one of the sizes has not been timed.
        """
        times = [self.timings.of(size) for size in (old, new)]
        if not all(times):
            return math.nan
        old_seconds, new_seconds = map(throughput.lower_quartile, times)
        ratio = (new / new_seconds) / (old / old_seconds)
        return ratio * throughput.progress_ratio(
            old,
            new,
            status.noise_scale,
            status.reference_batch_size,
            status.efficiency,
        )

    def knows(self, batch_size):
        """Returns whether a size was timed, by the run or by a probe."""
        return self._expected is not None or bool(self.timings.of(batch_size))

    def get_state(self):
        """Returns what was expected as plain JSON types, or None."""
        if self._expected is None:
            return None
        expected = self._expected
        return [
            expected.fixed,
            expected.per_example,
            # A number, as all of them.
            int(expected.guessed),
        ]

    def set_state(self, timings, expected, share=1.0):
        """Takes over the states of the timings, and of `get_state`.

        Args:
            timings: As `Timings.get_state` gives them.
            expected: As `get_state` gives it.
            share: Number of replicas that the timings are of, divided by the
                present one.
        """
        self.timings.set_state(timings)
        if expected is not None:
            fixed, per_example, guessed = expected
            self._expected = throughput.StepTime(
                fixed, per_example, guessed=guessed == 1
            )
        self.fit()
        if share != 1.0 and self._step_time is not None:
            self.timings.set_state(_shared(timings, self._step_time, share))
            self.fit()


def _shared(timings, step_time, share):
    """Converts timings to another number of replicas.

    An example costs a replica as much as before, but of each update it has
    another share. The fixed cost stays.
    """
    expected = dataclasses.replace(
        step_time, per_example=step_time.per_example * share
    )
    return {
        size: [
            one * expected(int(size)) / step_time(int(size)) for one in seconds
        ]
        for size, seconds in timings.items()
    }
