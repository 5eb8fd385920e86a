"""What a probe found: memory and speed over the batch sizes that it ran.

- Here: the records, what follows from them, the file.
- `_batch_profile_text.py`: the same as a table.
- `_batch_profile_plot.py`: the same as a figure; imported only when plotting.

Nothing here measures: `memory.py` hands in what it saw.
"""

import dataclasses
import json
import math
import pathlib

from keras_batchsize import _batch_profile_text
from keras_batchsize import _checks
from keras_batchsize import throughput

__all__ = ["BatchProfile", "ProfileRow"]

FORMAT = "keras_batchsize.batch_profile"
VERSION = 1
# Share of the best throughput at which a larger batch stops paying.
SATURATION = 0.95
# Reasons that say nothing of larger sizes: the probe did not come so far.
_EARLY = "time", "trials"


@dataclasses.dataclass(frozen=True)
class ProfileRow:
    """One batch size that was run.

    Attributes:
        batch_size: Examples per update, over all replicas.
        peak_bytes: Largest memory in use on one device, None if it could not
            be measured.
        predicted_bytes: What the trials before it let expect; None for the
            first ones.
        step_seconds: Seconds of an update; None if it ran out of memory.
        fits: Whether it ran and stayed within the margin.
        note: Why it does not fit, "" if it does.
    """

    batch_size: int
    peak_bytes: int | None
    predicted_bytes: int | None
    step_seconds: float | None
    fits: bool
    note: str = ""

    @property
    def examples_per_second(self):
        """Throughput; NaN if no update was completed."""
        if not self.step_seconds:
            return math.nan
        return self.batch_size / self.step_seconds


@dataclasses.dataclass
class BatchProfile:
    """Memory and speed of a model's training step at the sizes tried.

    Attributes:
        rows: List of `ProfileRow`, one for each size that was tried and no
            other, in increasing order of the batch size.
        max_batch_size: Largest size that was run and stayed within the
            margin, in examples.
        reason: What kept it from being larger: "memory", "dataset",
            "maximum", "time", "host memory" or "trials".
        memory_limit: Bytes of the device that count as all of it; None if
            not known.
        usable_bytes: Bytes that a peak may reach: the limit without the
            margins. None if not known.
        resident_bytes: Bytes in use between steps; None if not known.
        fragmentation_per_example: Bytes per example that stay free above the
            peak, for the fragmentation of the allocator.
        dtype_policy: Name of the model's dtype policy, or several, joined.
        device: What was measured, say "GPU:0".
        measured_by: How memory was measured.
        replicas: Number of replicas that share a batch.
        jit_compile: Whether XLA compiled the step.
        seconds: Seconds that the probe took.
    """

    rows: list
    max_batch_size: int
    reason: str
    memory_limit: int | None = None
    usable_bytes: int | None = None
    resident_bytes: int | None = None
    fragmentation_per_example: float = 0.0
    dtype_policy: str = ""
    device: str = ""
    measured_by: str = ""
    replicas: int = 1
    jit_compile: bool = False
    seconds: float = 0.0

    @property
    def step_time(self):
        """The fitted `StepTime` T(B) = fixed + per_example·B, in seconds."""
        timed = [row for row in self.rows if row.step_seconds and row.fits]
        return throughput.fit_step_time(
            [row.batch_size for row in timed],
            [row.step_seconds for row in timed],
            largest=self.max_batch_size,
        )

    @property
    def largest_micro_batch_size(self):
        """Examples that training may take through a replica at once.

        Its share of `max_batch_size`, unless time or trials ended the probe.
        Then nothing is known of larger sizes, and they are no reason to cut
        batches: it is infinity; or, if a size did not fit, half of the
        smallest such one, as when memory runs out in training.
        """
        size = self.max_batch_size
        if self.reason in _EARLY:
            too_large = [row.batch_size for row in self.rows if not row.fits]
            size = max(size, min(too_large, default=math.inf) / 2)
        return size if math.isinf(size) else int(size // self.replicas)

    @property
    def ended_early(self):
        """Whether training may try more at once than was run."""
        largest = self.largest_micro_batch_size * self.replicas
        return largest > self.max_batch_size

    @property
    def saturation_batch_size(self):
        """Smallest size with 95 % of the best throughput, in examples.

        By the fitted step-time model, among the sizes that fit; the rest of a
        batch beyond it costs memory and buys next to no speed. Where a size
        was measured to be slower, it is larger than that one.
        """
        size = throughput.saturation_batch_size(self.step_time, SATURATION)
        size = max(size, self._saturation_measured())
        smallest = min(self.rows[0].batch_size, self.max_batch_size)
        if not math.isfinite(size):
            return self.max_batch_size
        # `max_batch_size` is a multiple of the number of replicas, too.
        size = math.ceil(size / self.replicas) * self.replicas
        return min(max(size, smallest), self.max_batch_size)

    def _saturation_measured(self):
        """Returns where 95 % lie between a size that is slower and the next.

        Zero if the smallest size is not slower.
        """
        wanted = SATURATION * self.best_examples_per_second
        slow = None
        for row in self.rows:
            if not (row.fits and row.step_seconds):
                continue
            if row.examples_per_second >= wanted:
                return _size_at(wanted, slow, row) if slow else 0
            slow = row
        return 0

    @property
    def best_examples_per_second(self):
        """Largest throughput that was measured, NaN if none was."""
        speeds = [row.examples_per_second for row in self.rows if row.fits]
        return max(speeds, default=math.nan)

    @property
    def bytes_per_example(self):
        """Bytes by which the peak grows with each example, NaN if unknown."""
        return self.memory_line()[1]

    def memory_line(self):
        """Fits peak bytes = a + b·B to two of the largest sizes that ran.

        The largest, and the next that is smaller by a sixth or more: of
        sizes closer by, noise would tell. Small sizes are left out:
        workspaces of a fixed size hide what an example takes.

        Returns:
            Pair (a, b) of floats, NaN if fewer than two sizes were measured.
        """
        known = [row for row in self.rows if row.peak_bytes]
        if len(known) < 2:
            return math.nan, math.nan
        high = known[-1]
        low = next(
            (r for r in known[-2::-1] if r.batch_size < high.batch_size / 1.2),
            known[0],
        )
        slope = (high.peak_bytes - low.peak_bytes) / (
            high.batch_size - low.batch_size
        )
        return high.peak_bytes - slope * high.batch_size, slope

    @property
    def estimated_batch_size(self):
        """Where memory would end by the straight line; never run.

        Differs from `max_batch_size` when the data, the time or the argument
        `maximum` ended the search. NaN where it cannot be told.
        """
        constant, slope = self.memory_line()
        if self.usable_bytes is None or not slope > 0.0:
            return math.nan
        slope += self.fragmentation_per_example
        return max(
            (self.usable_bytes - constant) // slope, self.max_batch_size
        )

    def summary(self, print_fn=None):
        """Prints the profile as a table.

        Args:
            print_fn: Function of a string, called once with the whole text,
                as by `keras.Model.summary`; None for the standard output.
        """
        _batch_profile_text.show(str(self), print_fn)

    def __str__(self):
        return "\n".join(_batch_profile_text.lines(self))

    def plot(self, to_file=None):
        """Draws memory and throughput against the batch size.

        Args:
            to_file: Path of a picture to write, or None.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        drawing = _checks.module_that_draws(
            "keras_batchsize._batch_profile_plot", "BatchProfile.plot"
        )
        figure = drawing.draw(self)
        if to_file is not None:
            figure.savefig(to_file)
        return figure

    def to_dict(self):
        """Returns the profile as plain JSON types."""
        return {"format": FORMAT, "version": VERSION} | {
            "rows": [dataclasses.asdict(row) for row in self.rows],
            **{
                field.name: getattr(self, field.name)
                for field in dataclasses.fields(self)
                if field.name != "rows"
            },
        }

    @classmethod
    def from_dict(cls, data):
        """Makes a profile of what `to_dict` returned.

        Args:
            data: Dict.

        Raises:
            ValueError: If it is not that of a profile.
        """
        if data.get("format") != FORMAT or data.get("version") != VERSION:
            raise ValueError(
                "`data` must be the dict of a profile of this version. "
                f"Received: format={data.get('format')!r}, "
                f"version={data.get('version')!r}. Pass what "
                "BatchProfile.to_dict returned, or probe anew."
            )
        fields = {
            key: value
            for key, value in data.items()
            if key not in ("format", "version", "rows")
        }
        return cls(rows=[ProfileRow(**row) for row in data["rows"]], **fields)

    def save(self, path):
        """Writes the profile as JSON.

        Args:
            path: Path of the file; folders are made.
        """
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path):
        """Reads what `save` wrote."""
        text = pathlib.Path(path).read_text(encoding="utf-8")
        return cls.from_dict(json.loads(text))


def _size_at(speed, slow, fast):
    """Returns the size of a throughput, by the line through two times.

    Args:
        speed: Examples per second, between those of the two.
        slow: `ProfileRow` of a smaller size.
        fast: `ProfileRow` of a larger one.
    """
    per_example = (fast.step_seconds - slow.step_seconds) / (
        fast.batch_size - slow.batch_size
    )
    fixed = slow.step_seconds - per_example * slow.batch_size
    return speed * fixed / (1.0 - speed * per_example)
