"""What `BatchSizeTensorBoard` writes, and when."""

import dataclasses
import math
import time
import types
import uuid
import warnings

import numpy as np
import tensorflow as tf

from keras_batchsize._callbacks_base import settings_of
from keras_batchsize._version import __version__
from keras_batchsize.records import finite_or_none
from keras_batchsize.tensorboard import events
from keras_batchsize.tensorboard import hparams
from keras_batchsize.tensorboard import pictures
from keras_batchsize.tensorboard import tables
from keras_batchsize.tensorboard import tags
from keras_batchsize.tensorboard.writer import RunWriter

# Readers see a training live; what is not written is lost in a crash.
_SECONDS_UNWRITTEN = 10.0

# Share of the training time that drawing pictures may take; the last ones
# are drawn when training is over.
_DRAWING_BUDGET = 0.003


class Recorder:
    """Writes down one training.

    Args:
        function: The `AdaptiveTrainFunction`.
        log_dir: Folder that TensorBoard is given.
        steps: Superbatches per epoch, or None.
        last: `end` of the training before it, which may go on, or None.
        has_hparams: Whether to write for the tab "HParams".
    """

    def __init__(self, function, log_dir, steps, last, has_hparams=False):
        self._function = function
        self._log_dir = log_dir
        self._steps = steps
        self._last = last
        self._has_hparams = has_hparams
        self._epoch = None
        self._done = 0
        self._rows = []
        self._written = time.time()
        self._examples_before = 0
        self._writer = None
        self._began, self._first_step = 0.0, 0
        self._changes = {}
        self._shown = None
        self._profile = None
        self._drawing_seconds = 0.0
        # A guess until one has been drawn.
        self._drawing_cost = 0.5

    # Called by the train function.

    def add_row(self, row):
        """Notes what held during a superbatch, to be written later.

        Between two superbatches everything is cold, and making an event takes
        five times as long as among other events.
        """
        controller = self._function.controller
        row = _in_total(row, controller)
        if self._epoch is None:
            self._examples_before = row.examples - controller.last.examples
            # Before anything is written: a backup may come first.
            self._settle_identity(self._examples_before)
        if row.epoch != self._epoch:
            self._epoch, self._done = row.epoch, 0
        self._done += 1
        now = time.time()
        self._rows.append(
            (now, row, self._done, controller.noise_scale, self._maximum())
        )
        if now > self._written + _SECONDS_UNWRITTEN:
            self._write_rows()

    def add_change(self, change):
        """Writes a change of the size."""
        self._write_rows()
        change = _in_total(change, self._function.controller)
        step, values = change.examples, dict(vars(change))
        self._changes[step] = values
        if self._writer is None:
            self._settle_identity(step)
            self._begin(step)
        self._writer.write(
            step,
            [
                events.text(tags.TEXT_CHANGE, tables.change(values)),
                self._change_for_page(step),
            ],
        )

    # Called by the callback.

    def end_epoch(self):
        """Writes what an epoch has taught, and makes it visible."""
        self._write_rows()
        if self._writer is None:
            return
        self._write_changes()
        seconds = self._function.tally.seconds
        budget = _DRAWING_BUDGET * seconds - self._drawing_seconds
        if self._drawing_cost <= budget:
            self._draw_goodput()
        self._write_info()
        self._writer.flush()

    def close(self, finished):
        """Writes how it ended.

        Args:
            finished: Whether it was not broken off by an exception.
        """
        self._write_rows()
        if self._writer is None:
            return
        self._write_changes()
        self._draw_goodput()
        self._write_info(closed=True, finished=finished)
        # Of several ends TensorBoard keeps the first, and it may be resumed.
        if finished and self._has_hparams:
            values = hparams.end(time.time())
            self._writer.write(self._function.controller.examples, values)
        self._writer.close()

    @property
    def end(self):
        """Identity, examples and seconds of the training, to go on from."""
        if self._writer is None:
            return self._last
        examples = self._function.controller.examples
        seconds = self._seconds_before() + self._function.tally.seconds
        return self._function.identity, examples, seconds

    def _settle_identity(self, examples_before):
        """Tells a training that goes on from another one."""
        function = self._function
        if function.identity is None and self._last is not None:
            identity, examples, seconds = self._last
            if 0 < examples == examples_before:
                function.identity = identity
                function.tally.seconds_before = seconds
        function.identity = function.identity or uuid.uuid4().hex[:12]

    def _begin(self, examples_before):
        """Opens the file: that of this training, if it is one that goes on."""
        function = self._function
        self._writer = RunWriter(
            self._log_dir, tf.io, function.identity, examples_before + 1
        )
        self._began, self._first_step = time.time(), examples_before + 1
        settings = settings_of(function)
        values = [events.text(tags.TEXT_SETTINGS, tables.settings(settings))]
        if self._has_hparams:
            # How long it measured is a result, and not known yet.
            del settings["measuring_share"]
            values += hparams.start(settings, self._began)
        self._writer.write(self._first_step, values)
        self._write_info()

    def _seconds_before(self):
        return self._function.tally.seconds_before

    def _maximum(self):
        return self._function.controller.ladder.sizes[-1]

    def _write_rows(self):
        """Writes the rows noted so far, one event for each."""
        rows, self._rows = self._rows, []
        self._written = time.time()
        if not rows:
            return
        if self._writer is None:
            self._begin(self._examples_before)
        profile = self._function.controller.profile
        if profile is not self._profile:
            self._write_profile(rows[0][1].examples, profile)
        for now, row, done, estimate, maximum in rows:
            values = self._values(row, done, estimate, maximum)
            self._writer.scalars(row.examples, values, now)
        self._writer.flush()

    def _values(self, row, done, estimate, maximum):
        """Returns the scalars of a row; the tags are those of `tags.py`."""
        controller = self._function.controller
        part = min(done / self._steps, 1.0) if self._steps else 0.0
        values = {
            "batch_size/global": row.batch_size,
            "batch_size/micro": row.micro_batch_size,
            "batch_size/accumulation_steps": row.accumulation_steps,
            "batch_size/maximum": maximum,
            "learning_rate/effective": row.learning_rate,
            "learning_rate/base": row.base_learning_rate,
            "learning_rate/factor": row.learning_rate_factor,
            "throughput/examples_per_second": row.examples_per_second,
            "progress/updates": row.updates,
            "progress/epoch": row.epoch + part,
            "progress/loss": row.loss,
            "progress/seconds": self._seconds_before() + row.seconds,
        }
        if controller.measures:
            values |= {
                "noise_scale/value": row.noise_scale,
                "noise_scale/lower": row.noise_lower,
                "noise_scale/upper": row.noise_upper,
                "gradient/squared_norm": estimate.squared_norm,
                "gradient/variance": estimate.trace,
                "throughput/goodput": row.goodput,
            }
        if self._profile is not None:
            values |= _memory(self._profile, row, controller.replicas)
        return values

    def _write_profile(self, step, profile):
        """Writes what the memory probe found, once it is known."""
        self._profile = profile
        values = [events.text(tags.TEXT_PROBE, tables.profile(profile))]
        picture = _drawn(profile.plot)
        if picture is not None:
            values.append(events.image(tags.IMAGE_PROBE, *picture))
        self._writer.write(step, values)

    def _change_for_page(self, step):
        change = {
            name: finite_or_none(value)
            for name, value in self._changes[step].items()
        }
        return events.data(tags.CHANGE.format(step), change)

    def _write_changes(self):
        """Writes changes whose observed speed-up has become known."""
        controller = self._function.controller
        values = []
        for step, change in self._changes.items():
            before = change["observed_speedup"]
            now = controller.observed_speedup(types.SimpleNamespace(**change))
            if not math.isclose(before, now, rel_tol=0.02) and now == now:
                change["observed_speedup"] = now
                values.append(self._change_for_page(step))
        table = tables.changes(list(self._changes.values()))
        if self._changes and table != self._shown:
            self._shown = table
            values.append(events.text(tags.TEXT_CHANGES, table))
        if values:
            self._writer.write(controller.examples, values)

    def _write_info(self, closed=False, finished=False):
        """Writes settings and totals for our own page."""
        function = self._function
        controller = function.controller
        info = {
            "version": __version__,
            "identity": function.identity,
            "began": self._began,
            "first_step": self._first_step,
            "settings": settings_of(function),
            "examples": controller.examples,
            "updates": controller.updates,
            "base_updates": controller.base_steps,
            "seconds": self._seconds_before() + function.tally.seconds,
            "closed": closed,
            "finished": finished,
        }
        self._writer.write(
            max(controller.examples, self._first_step),
            [events.data(tags.INFO, info)],
        )

    def _draw_goodput(self):
        """Draws goodput against the batch size, where matplotlib is there."""
        controller = self._function.controller
        estimate, step_time = controller.noise_scale, controller.step_time
        if not estimate.resolved or step_time is None or step_time.guessed:
            return
        started = time.perf_counter()
        picture = _drawn(
            pictures.goodput,
            controller.ladder.sizes,
            controller.batch_size,
            step_time,
            estimate.value,
            controller.clock.batch_size,
            controller.efficiency,
        )
        if picture is None:
            return
        value = events.image(tags.IMAGE_GOODPUT, *picture)
        self._writer.write(controller.examples, [value])
        self._drawing_cost = time.perf_counter() - started
        self._drawing_seconds += self._drawing_cost


def _in_total(record, controller):
    """Returns a row or change with the counts of all fits of its trainer.

    A run goes on from one `fit` to the next, along the axis of examples.
    """
    return dataclasses.replace(
        record, examples=controller.examples, updates=controller.updates
    )


def _drawn(draw, *arguments):
    """Returns a picture, None without matplotlib or where it fails."""
    try:
        return pictures.png(draw(*arguments))
    except ImportError:
        return None
    except Exception as error:
        # Hours of training are worth more than a picture.
        warnings.warn(
            "TensorBoard will not show a picture of this training: drawing "
            f"failed ({type(error).__name__}: {error}). Training goes on.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _memory(profile, row, replicas):
    """Returns the memory that a plan takes, NaN where it is not known.

    Between two sizes that were probed the peak lies on a line, since
    activations grow with the examples; beyond them nothing is claimed.
    """
    held = row.micro_batch_size * replicas
    known = [one for one in profile.rows if one.peak_bytes is not None]
    peak = math.nan
    if known:
        sizes = [one.batch_size for one in known]
        peaks = [float(one.peak_bytes) for one in known]
        peak = np.interp(held, sizes, peaks, left=math.nan, right=math.nan)
    limit = profile.memory_limit
    return {
        "memory/peak_bytes": float(peak),
        "memory/limit_bytes": math.nan if limit is None else limit,
    }
