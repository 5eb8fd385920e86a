"""The course of a probe: which trials are made, and what they say."""

import dataclasses
import gc
import math
import time

from keras_batchsize import keras_private
from keras_batchsize import out_of_memory
from keras_batchsize import replicas
from keras_batchsize import size_search
from keras_batchsize._batch_profile_text import megabytes
from keras_batchsize._memory_limits import NothingFits
from keras_batchsize._memory_peaks import Peaks
from keras_batchsize.batch_profile import BatchProfile
from keras_batchsize.batch_profile import ProfileRow
from keras_batchsize.size_search import Bounds
from keras_batchsize.size_search import Trial
from keras_batchsize.workers import Workers

OUT_OF_MEMORY = "out of memory"
# What fragmentation may take where the sizes of tensors are not known, as a
# share of what the batch takes.
_SHARE_OF_HOLES = 0.25


class Probing:
    """The course of one probe.

    Args:
        workload: A `Workload`, entered.
        examples: Its `Examples`.
        limits: The `Limits`.
        meter: The `Meter`.
        model: The Keras model.
        data_bytes: Bytes that data take beside the steps.
    """

    def __init__(self, workload, examples, limits, meter, model, data_bytes):
        self._workload = workload
        self._examples = examples
        self._meter = meter
        self._model = model
        self._limits = limits
        self._started = time.perf_counter()
        self._trials = []
        self._seen, self._most, self._predicted = {}, {}, {}
        self._finished = set()
        strategy, count = replicas.strategy_of(model), replicas.count(model)
        self._workers = None if strategy is None else Workers(strategy)
        # Replicas that take their parts of a batch from the same memory.
        self._sharing = 1
        if meter.is_shared and self._workers is not None:
            self._sharing = count // self._workers.number
        # Others may hold memory on the device, too.
        (self._resident,) = self._agreed(
            max(
                float(workload.resident_bytes * self._sharing),
                float(meter.current() or 0),
            )
        )
        (self._data,) = self._agreed(float(data_bytes))
        self._limit, self._room, self._reason = self._budget()
        # What cannot be measured cannot be compared, either.
        self._usable = None if meter.peak() is None else self._room
        self._hard = self._usable
        if self._usable is not None:
            # A little into the margin: a size that overshoots is no failure.
            self._hard += (self._limit - self._data - self._usable) / 4.0
        self._hole = meter.hole(workload.forward)
        if self._hole is not None:
            self._hole *= self._sharing / count
        self._check_room()
        self._bounds = self._make_bounds(count)

    def _budget(self):
        """Returns the limit, what of it may be used, and what it is."""
        meter, given = self._meter, self._limits.memory_limit
        meter.reset(self._resident)
        own, reason = meter.limit()
        if given is not None and (own is None or given <= own):
            own, reason = given, size_search.MEMORY
        (inverse,) = self._agreed(1.0 / own if own else 0.0)
        own = 1.0 / inverse if inverse else None
        if own is None:
            return None, None, size_search.MEMORY
        usable = own * (1.0 - self._limits.safety_margin)
        usable = usable * (1.0 - meter.reserve) - meter.lost_bytes
        return own, usable - self._data, reason

    def _growth(self, count):
        of, shared = enumerate(self._workload.growth, 1), self._sharing
        if self._hole is None:
            shared *= 1.0 + _SHARE_OF_HOLES
        first, *others = [one * shared / count**k for k, one in of] or [None]
        return () if first is None else (first + (self._hole or 0), *others)

    def _cap(self, growth, count):
        """Returns the largest size that makes sense, and what it is."""
        cap, reason = self._limits.maximum, "maximum"
        if self._examples.count < cap:
            cap, reason = self._examples.count, "dataset"
        if self._usable is not None or self._room is None:
            return cap, reason
        if not growth:
            self._limits.warn_of_unmeasured()
            return cap, reason
        room = self._room - self._resident
        most = size_search.largest_by_growth(room, growth)
        if most < count:
            self._raise_does_not_fit(
                f"by their sizes, the tensors of {count} of the examples may "
                f"take more than {megabytes(room)} MB"
            )
        return (most, self._reason) if most < cap else (cap, reason)

    def _make_bounds(self, count):
        growth = self._growth(count)
        cap, reason = self._cap(growth, count)
        if math.isfinite(cap):
            cap = max(cap // count * count, count)
        start = math.ceil(self._limits.start / count) * count
        return Bounds(
            start=start,
            cap=cap,
            cap_reason=reason,
            usable_bytes=self._usable,
            hard_bytes=self._hard,
            multiple_of=count,
            memory_reason=self._reason,
            growth_bytes=growth,
            degree=self._workload.degree,
        )

    def run(self):
        """Tries sizes until one of the bounds is reached."""
        while True:
            size, reason = size_search.next_size(
                self._trials, self._bounds, self._seconds_left()
            )
            if size is not None:
                self._predict(size)
                self._trials.append(self._try(size))
                continue
            best = size_search.largest_that_fits(self._trials, self._usable)
            if best is None:
                self._raise_nothing_fits()
            if best.batch_size not in self._finished:
                # A trial far from the margin has made updates only. Where all
                # else does not fit, the search goes on.
                trial = self._finish_epoch(best)
                self._trials[self._trials.index(best)] = best = trial
            if size_search.fits(best, self._usable):
                return self._profile(best, reason)

    def _check_room(self):
        if self._room is not None and self._resident >= self._room:
            self._raise_does_not_fit(
                "weights, optimizer slots and metrics alone take "
                f"{megabytes(self._resident)} MB"
            )

    def _raise_nothing_fits(self):
        least = min(self._trials, key=lambda trial: trial.batch_size)
        peak = "ran out of memory"
        if not least.failed:
            peak = f"took {megabytes(least.peak_bytes)} MB"
        self._raise_does_not_fit(f"a batch of {least.batch_size} {peak}")

    def _raise_does_not_fit(self, what):
        given, room = self._limits.memory_limit, ""
        raised = "" if given is None else ", or raise `memory_limit`"
        if self._room is not None:
            room = (
                f", of {megabytes(self._limit)} MB "
                f"{megabytes(max(self._room, 0))} MB may be used"
            )
            if self._data:
                data = megabytes(self._data)
                room += f" ({data} MB are for the copy of data `fit` holds)"
        raise NothingFits(
            f"No batch size fits: {what}{room}. Received: "
            f"memory_limit={given}, "
            f"safety_margin={self._limits.safety_margin}. Use a smaller "
            "model, an optimizer with fewer slots, shorter examples, or a "
            f"mixed dtype policy{raised}."
        )

    def _seconds_left(self):
        (spent,) = self._agreed(time.perf_counter() - self._started)
        return self._limits.time_budget - spent

    def _agreed(self, *values):
        """Returns the largest of each value on all workers.

        All of them must try the same sizes, or they wait for each other for
        ever; the fullest and the slowest counts.

        Args:
            *values: Positive numbers; one that is not known counts as 0.
        """
        if self._workers is None or self._workers.number == 1:
            return list(values)
        return self._workers.largest(values)

    def _predict(self, size):
        """Remembers what the line through the two largest lets expect."""
        known = sorted(self._most)
        if len(known) < 2:
            return
        low, high = known[-2:]
        lower, higher = self._most[low], self._most[high]
        slope = (higher - lower) / (high - low)
        self._predicted[size] = int(higher + slope * (size - high))

    def _try(self, size):
        """Runs one size; an out-of-memory error is an answer, too."""
        began = time.perf_counter()
        workload, constant = self._workload, self._resident

        def run():
            peaks, seconds = workload.train(size)
            summed = None
            if workload.has_superbatches and not workload.compiles:
                summed = workload.superbatch(size)
            return peaks, summed, seconds

        ran = self._or_none(run)
        elapsed = time.perf_counter() - began
        if ran is None:
            return Trial(size, failed=True, trial_seconds=elapsed)
        peaks, summed, seconds = ran
        seconds, elapsed = self._agreed(seconds, elapsed)
        if not peaks:
            return Trial(size, None, seconds, False, elapsed, constant)
        needed, added = self._needed(size, peaks, summed)
        if summed is not None:
            # It adds copies of values and sums, whatever the size.
            constant += added
        trial = Trial(size, needed, seconds, False, elapsed, constant)
        if not size_search.is_near(trial, self._usable):
            return trial
        if size_search.fits(trial, self._usable):
            return self._finish_epoch(trial)
        # Most likely it stays too large, and the rest is not needed.
        return self._run_more(trial, lambda: workload.repeat(size))

    def _needed(self, size, peaks, other, rare=()):
        """Returns how many bytes must be there for a size.

        Equal updates differ, by the order in which their operations happen to
        run, and by pieces of memory that are larger than what they are used
        for. What they need is the mean of what was seen, and the room that
        other orders and pieces may take; or the largest peak, if that is more.

        Args:
            size: Integer, examples per update.
            peaks: List of the peaks of equal updates.
            other: Peak of whatever else runs at the size, or None.
            rare: Peaks that need no more room than they took.

        Returns:
            Pair of the bytes, and by how much `other` is above the mean.
        """
        seen = self._seen.setdefault(size, Peaks())
        seen.add(peaks, other, rare)
        usual, other, most = self._agreed(seen.usual, seen.other, seen.most)
        self._most[size] = most
        needed = max(usual, other) + self._holes(size, usual)
        return max(needed, most), max(other - usual, 0.0)

    def _holes(self, size, usual):
        """What fragmentation may take at a size, in bytes."""
        if self._hole is not None:
            return self._hole * size
        return _SHARE_OF_HOLES * max(usual - self._resident, 0.0)

    def _or_none(self, run):
        """Calls a function and puts values back; None if it ran out."""
        result, failed = None, False
        try:
            result = run()
        except Exception as error:
            if not out_of_memory.is_out_of_memory(error):
                raise
            self._check_alone(error)
            failed = True
        if failed:
            # Only now has the error let go of the tensors of its step.
            gc.collect()
        self._workload.restore_values()
        return None if failed else result

    def _check_alone(self, error):
        if self._workers is not None and self._workers.number > 1:
            raise RuntimeError(
                "Memory must not run out on one of several workers: the others "
                "wait for its part of the step. Received: "
                f"{self._workers.number} workers. Probe with a smaller "
                "`maximum`, a larger `safety_margin`, or give max_batch_size."
            ) from error

    def _finish_epoch(self, trial):
        """Runs all else that happens at a size; returns what its trial says."""
        size, workload = trial.batch_size, self._workload
        tail = self._examples.tail(size)
        self._finished.add(size)

        def run():
            peaks, rare, other, seconds = workload.finish_epoch(size, tail)
            if peaks and workload.has_superbatches:
                other.append(workload.superbatch(size))
            return peaks, rare, other, seconds

        return self._run_more(trial, run)

    def _run_more(self, trial, run):
        """Runs more at a size, and returns what its trial says then."""
        began = time.perf_counter()
        ran = self._or_none(run)
        if ran is None:
            return dataclasses.replace(trial, failed=True, step_seconds=None)
        peaks, rare, other, seconds = ran
        seconds, elapsed = self._agreed(seconds, time.perf_counter() - began)
        needed = None
        if peaks:
            other = max(other, default=None)
            needed, _ = self._needed(trial.batch_size, peaks, other, rare)
        return dataclasses.replace(
            trial,
            peak_bytes=needed,
            step_seconds=min(seconds, trial.step_seconds),
            trial_seconds=trial.trial_seconds + elapsed,
        )

    def _profile(self, best, reason):
        trials = sorted(self._trials, key=lambda trial: trial.batch_size)
        size, hole = best.batch_size, self._hole
        if hole is None:
            seen = self._seen.get(size, Peaks())
            hole = self._holes(size, seen.usual) / size
        return BatchProfile(
            rows=[self._row(trial) for trial in trials],
            max_batch_size=size,
            reason=reason,
            memory_limit=None if self._limit is None else int(self._limit),
            usable_bytes=None if self._usable is None else int(self._usable),
            resident_bytes=int(self._resident),
            fragmentation_per_example=hole,
            dtype_policy=dtype_policies_of(self._model),
            device=self._meter.device,
            measured_by=self._meter.name,
            replicas=self._bounds.multiple_of,
            jit_compile=self._workload.compiles,
            seconds=time.perf_counter() - self._started,
        )

    def _row(self, trial):
        fits, note = size_search.fits(trial, self._usable), ""
        peak = self._most.get(trial.batch_size)
        if trial.failed:
            note = OUT_OF_MEMORY
        elif not fits:
            note = "over the margin"
        return ProfileRow(
            batch_size=trial.batch_size,
            peak_bytes=None if peak is None else int(peak),
            predicted_bytes=self._predicted.get(trial.batch_size),
            step_seconds=trial.step_seconds,
            fits=fits,
            note=note,
        )


def dtype_policies_of(model):
    """Returns the names of the dtype policies of a model's layers, joined.

    Args:
        model: A Keras model.
    """
    layers = keras_private.flatten_layers(model)
    names = {
        layer.dtype_policy.name for layer in layers if layer.variables
    }
    return ", ".join(sorted(names)) or model.dtype_policy.name
