"""A device for tests whose memory and time are formulas of the batch size.

The training step runs for real; only what it took, and when it would have
failed, is made up.
"""

import tensorflow as tf

from keras_batchsize._memory_meters import Meter
from keras_batchsize._memory_workload import Workload


class FakeMeter(Meter):
    """Says that a step of B examples took `constant + slope·B` bytes.

    Args:
        limit: Bytes of the device, None for not known.
        constant: Bytes.
        slope: Bytes per example.
        fails_at: Size from which a step runs out of memory; None for where
            the limit is.
        measures: Whether it tells peaks.
        seconds: Seconds of an update, without its examples.
    """

    device = "FAKE:0"
    name = "a formula"

    def __init__(
        self,
        limit,
        constant=0,
        slope=1,
        fails_at=None,
        measures=True,
        seconds=0.001,
    ):
        self.size = 0
        self.sizes = []
        self._limit = limit
        self._constant = constant
        self._slope = slope
        self._fails_at = fails_at
        self._measures = measures
        self._seconds = seconds

    def limit(self):
        return self._limit, "memory"

    def peak(self):
        if not self._measures:
            return None
        return self._constant + self._slope * self.size

    def current(self):
        return 0

    def step_seconds(self, size):
        """Returns how many seconds an update takes."""
        return self._seconds + 1e-6 * size

    def allocate(self, size):
        """Notes the size of a step, or fails as a device would."""
        self.size = size
        self.sizes.append(size)
        too_large = self._fails_at is not None and size >= self._fails_at
        peak = self._constant + self._slope * size
        if too_large or (self._limit is not None and peak > self._limit):
            raise tf.errors.ResourceExhaustedError(None, None, "OOM (fake)")


class FakeWorkload(Workload):
    """Tells a `FakeMeter` for which size it makes batches, and asks it how
    long they took: how much a probe runs depends on that.
    """

    def _timed(self, function, data, size, updates):
        super()._timed(function, data, size, updates)
        return updates * self._meter.step_seconds(size)

    def _waiting(self, size):
        self._meter.allocate(size)
        return super()._waiting(size)
