"""A device for tests whose memory and time are formulas of the batch size.

The training step runs for real; only what it took, and when it would have
failed, is made up.
"""

from unittest import mock

import comparing
import keras
import tensorflow as tf

from keras_batchsize import _memory_probing
from keras_batchsize import memory
from keras_batchsize._memory_examples import Examples
from keras_batchsize._memory_meters import Meter
from keras_batchsize._memory_workload import Workload

MB = 10**6

make_dense = comparing.compiled(
    comparing.dense, optimizer=keras.optimizers.Adam, metrics=["mae"]
)


def probe(
    meter, model=None, count=10_000, data_bytes=0, accumulates=True, **limits
):
    """Probes a tiny model on a device of the fake."""
    model = make_dense() if model is None else model
    x, y = comparing.regression(16)
    examples = Examples((tf.constant(x), tf.constant(y)), count, data_bytes)
    with mock.patch.object(memory, "Workload", FakeWorkload):
        return memory.probe(
            model, examples, memory.Limits(**limits), accumulates, meter
        )


class FakeMeter(Meter):
    """Says that a step of B examples took `constant + slope·B` bytes.

    Attributes:
        size: Examples in the batches that wait.
        sizes: List of the sizes of which batches were made.
        ran: List of pairs, what was run and of how many examples: "update",
            "tail", "validation", "sums" (an update of micro-batches).
        spent: Seconds that all timed updates took.

    Args:
        limit: Bytes of the device, None for not known.
        constant: Bytes.
        slope: Bytes per example.
        fails_at: Size from which a step runs out of memory; None for where
            the limit is.
        measures: Whether it tells peaks.
        seconds: Seconds of an update, without its examples.
        slopes: Dict from what is run to bytes per example, where they are not
            those of an update.
        squares: Bytes per pair of examples.
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
        slopes=(),
        squares=0,
    ):
        self.size = 0
        self.sizes, self.ran = [], []
        self.spent = 0.0
        self._limit = limit
        self._constant = constant
        self._slope = slope
        self._fails_at = fails_at
        self._measures = measures
        self._seconds = seconds
        self._slopes = dict(slopes)
        self._squares = squares
        self._peak = 0

    def limit(self):
        return self._limit, "memory"

    def reset(self, resident_bytes):
        self._peak = 0

    def peak(self):
        return self._peak if self._measures else None

    def current(self):
        return 0

    def step_seconds(self, size):
        """Returns how many seconds an update takes."""
        return self._seconds + 1e-6 * size

    def perf_counter(self):
        """Stands for that of the module `time`: nothing but updates counts."""
        return self.spent

    def wait(self, size):
        """Notes the size of the batches that are made."""
        self.size = size
        self.sizes.append(size)

    def bytes_of(self, what, size):
        """Returns the peak of what is run."""
        slope = self._slopes.get(what, self._slope)
        return self._constant + slope * size + self._squares * size**2

    def run(self, what, size):
        """Takes what a step takes, or fails as a device would."""
        self.ran.append((what, size))
        peak = self.bytes_of(what, size)
        too_large = self._fails_at is not None and size >= self._fails_at
        if too_large or (self._limit is not None and peak > self._limit):
            raise tf.errors.ResourceExhaustedError(None, None, "OOM (fake)")
        self._peak = max(self._peak, peak)


class FakeWorkload(Workload):
    """Tells a `FakeMeter` what it runs, and asks it how long that took: how
    much a probe runs depends on both. Its budget of time is spent by the same
    clock.
    """

    def __enter__(self):
        super().__enter__()
        self._clock = mock.patch.object(_memory_probing, "time", self._meter)
        self._clock.start()
        return self

    def __exit__(self, *error):
        self._clock.stop()
        super().__exit__(*error)

    def _timed(self, data, size, updates):
        super()._timed(data, size, updates)
        seconds = updates * self._meter.step_seconds(size)
        self._meter.spent += seconds
        return seconds

    def _waiting(self, size):
        self._meter.wait(size)
        return super()._waiting(size)

    def _plain(self, data, stop, size):
        super()._plain(data, stop, size)
        what = "update" if stop >= size else "tail"
        self._meter.run(what, min(stop, size))

    def _summed(self, data, stop, size, micro):
        logs = super()._summed(data, stop, size, micro)
        if micro < size:
            self._meter.run("sums", micro)
        return logs

    def _validation_step(self):
        validate = super()._validation_step()

        def validates(data):
            logs = validate(data)
            self._meter.run("validation", self._meter.size)
            return logs

        return validates
