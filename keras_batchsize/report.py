"""What a run did with its batch size: data, totals, and where they go.

Separation of concerns:

- Here: the records (`Row`, `Change`), their thinning, the totals, the file.
- `_report_text.py`: the same as console table, plain text, Markdown and HTML.
- `_report_plot.py`: the same as a figure; imported only when plotting, since
  matplotlib is optional.

Nothing here decides or measures: rows and changes are handed in.
"""

import dataclasses
import json
import math
import operator
import pathlib

from keras_batchsize import _checks
from keras_batchsize import _report_text
from keras_batchsize._report_text import json_value

__all__ = ["Change", "Report", "Row"]

MAX_ROWS = 2000
FORMAT = "keras_batchsize.report"
VERSION = 1
NAN = math.nan


def _make_plain(record):
    """Turns each field into a Python int, float or str; None becomes NaN.

    NumPy and TensorFlow scalars are welcome, but JSON takes neither.
    """
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        try:
            if field.type is int:
                value = operator.index(value)
            elif field.type is float:
                value = NAN if value is None else float(value)
        except (TypeError, ValueError) as error:
            kind = "an integer" if field.type is int else "a number"
            raise TypeError(
                f"`{field.name}` must be {kind}: a report adds up, plots and "
                f"writes it. Received: {field.name}={value!r}. Pass "
                f"{field.type.__name__}({field.name})."
            ) from error
        object.__setattr__(record, field.name, value)


@dataclasses.dataclass(frozen=True)
class Row:
    """What held during one superbatch, which is one Keras step.

    Attributes:
        examples: Integer, examples seen in this `fit`, this superbatch
            included.
        updates: Integer, optimizer updates made in this `fit` so far.
        epoch: Integer, the epoch, counted from zero.
        seconds: Float, seconds of this `fit` so far, validation excluded.
        batch_size: Integer, examples per update.
        micro_batch_size: Integer, examples per forward and backward pass.
        accumulation_steps: Integer, micro-batches per replica and update.
        noise_scale: Float, gradient noise scale in examples. NaN where it is
            not resolved.
        noise_lower: Float, lower end of its interval, in examples, or NaN.
        noise_upper: Float, upper end, in examples; may be infinite, or NaN.
        learning_rate: Float, the effective rate: base rate times factor.
        base_learning_rate: Float, the rate as the user's optimizer shows it.
        learning_rate_factor: Float, the factor for the batch size.
        examples_per_second: Float, training speed.
        goodput: Float, useful examples per second, or NaN.
        loss: Float, or NaN.
    """

    examples: int
    updates: int
    epoch: int
    seconds: float
    batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    noise_scale: float
    noise_lower: float
    noise_upper: float
    learning_rate: float
    base_learning_rate: float
    learning_rate_factor: float
    examples_per_second: float
    goodput: float = NAN
    loss: float = NAN

    def __post_init__(self):
        _make_plain(self)


@dataclasses.dataclass(frozen=True)
class Change:
    """One change of the batch size.

    Attributes:
        epoch: Integer, the epoch, counted from zero.
        examples: Integer, examples seen when the new size took effect.
        updates: Integer, optimizer updates made by then.
        old_batch_size: Integer, examples per update until then.
        new_batch_size: Integer, examples per update from then on.
        noise_scale: Float, in examples, or NaN.
        learning_rate: Float, the effective rate just after the change.
        reason: String, why, for example `"noise scale 1,024"`.
        predicted_speedup: Float, progress per second, new size over old:
            1.12 is 12 % faster. NaN if unknown.
        observed_speedup: Float, the same as measured later. NaN until known.
    """

    epoch: int
    examples: int
    updates: int
    old_batch_size: int
    new_batch_size: int
    noise_scale: float
    learning_rate: float
    reason: str
    predicted_speedup: float = NAN
    observed_speedup: float = NAN

    def __post_init__(self):
        _make_plain(self)


def thin_rows(rows, limit=MAX_ROWS):
    """Returns about half of `limit` rows, spread evenly over the examples.

    The law: the examples axis is cut into cells of 2ᵏ examples, k the
    smallest for which there are no more than limit / 2 cells (and one, where
    they do not align). The first row of each cell stays; so do the very first
    and last row, and the two rows at each change of size, the last with the
    old and the first with the new one.

    Dropping every second row each time the limit is reached would thin the
    past again and again and never the present. Cells of 2ᵏ nest instead:
    thinning a growing list many times leaves the rows that thinning the full
    list once would leave.

    Fewer than limit / 5 changes always stay. More of them may give way, since
    the limit bounds memory and the size of the file.

    Args:
        rows: List of `Row`, in the order of training.
        limit: Integer, rows that may be kept, at least 10.

    Returns:
        A list of `Row`, no longer than 9/10 of `limit`.
    """
    span = rows[-1].examples - rows[0].examples
    cell = 1 << (span // (limit // 2)).bit_length()
    on_grid = {0, len(rows) - 1}
    at_change = set()
    for index in range(1, len(rows)):
        before, row = rows[index - 1], rows[index]
        if row.examples // cell != before.examples // cell:
            on_grid.add(index)
        if row.batch_size != before.batch_size:
            at_change.update((index - 1, index))
    kept = on_grid | at_change
    if len(kept) > limit * 9 // 10:
        kept = on_grid
    return [rows[index] for index in sorted(kept)]


class Report:
    """What was decided, when, why, and what it bought.

    Example:

    ```python
    trainer.report.summary()
    trainer.report.plot("run.png")
    trainer.report.save("run.json")
    report = kb.report.Report.load("run.json")
    ```

    Args:
        settings: Optional dict of JSON values, the settings of the run.
            Read here: `base_batch_size` and `max_batch_size`, in examples;
            `first_epoch`, counted from zero, if not that of the first row;
            and `reason_unchanged`, a string for a run without any change.

    Attributes:
        settings: Dict, as given; may be added to.
        base_updates: Integer, updates that a fixed batch of
            `base_batch_size` would have needed so far. 0 if not counted.
        base_seconds: Float, seconds of training that it would have taken,
            predicted from the time of an update at that size, with the tracing
            that it would have had. NaN if unknown.
        skipped_measurements: Integer, steps whose gradients were not finite.
    """

    def __init__(self, settings=None):
        self.settings = dict(settings or {})
        self.base_updates = 0
        self.base_seconds = NAN
        self.skipped_measurements = 0
        self._rows = []
        self._changes = []

    @property
    def rows(self):
        """Tuple of `Row`, at most 2000, thinned as `thin_rows` says."""
        return tuple(self._rows)

    @property
    def changes(self):
        """Tuple of `Change`, all of them, never thinned."""
        return tuple(self._changes)

    @property
    def examples(self):
        """Integer, examples seen in total."""
        return self._rows[-1].examples if self._rows else 0

    def complete(self, updates):
        """Sets the total of updates: the last may come after the last row.

        Args:
            updates: Integer, optimizer updates in total.
        """
        if self._rows:
            last = dataclasses.replace(self._rows[-1], updates=updates)
            self._rows[-1] = last

    @property
    def updates(self):
        """Integer, optimizer updates in total."""
        return self._rows[-1].updates if self._rows else 0

    @property
    def seconds(self):
        """Float, seconds of training in total, validation excluded."""
        return self._rows[-1].seconds if self._rows else 0.0

    @property
    def final_batch_size(self):
        """Integer, examples per update at the end. 0 before any training."""
        return self._rows[-1].batch_size if self._rows else 0

    def add_row(self, row):
        """Adds a `Row`. Its counts are totals, not increments."""
        self._rows.append(row)
        if len(self._rows) > MAX_ROWS:
            self._rows = thin_rows(self._rows, MAX_ROWS)

    def add_change(self, change):
        """Adds a `Change`."""
        self._changes.append(change)

    def replace_change(self, index, **fields):
        """Sets what became known about a change only later.

        Args:
            index: Integer, its place in `changes`.
            **fields: New values of `Change` attributes, for example
                `observed_speedup=1.09`.
        """
        change = dataclasses.replace(self._changes[index], **fields)
        self._changes[index] = change

    def summary(self, print_fn=None, line_length=None):
        """Prints the changes as a table, and the totals below it.

        Args:
            print_fn: Optional function of one string, called once with the
                whole text, plain, as by `keras.Model.summary`. Defaults to
                a formatted table on the console.
            line_length: Optional integer, characters per line. Defaults to
                the width of the console, or 80 with `print_fn`.
        """
        if print_fn is None:
            _report_text.print_console(self, line_length)
        else:
            print_fn(_report_text.plain_text(self, line_length))

    def __str__(self):
        return _report_text.plain_text(self)

    def __repr__(self):
        count = len(self._changes)
        return (
            f"<Report: {self.examples:,} examples, {self.updates:,} updates, "
            f"{count} change{'' if count == 1 else 's'}, "
            f"batch size {self.final_batch_size}>"
        )

    def _repr_html_(self):
        return _report_text.html(self)

    def plot(self, to_file=None, x="examples"):
        """Plots batch size, learning rate, speed and loss.

        Args:
            to_file: Optional path of a picture to write. The ending tells
                the format: .png, .svg, .pdf.
            x: String, the horizontal axis: "examples", "updates", "seconds"
                or "epoch".

        Returns:
            A `matplotlib.figure.Figure` with four axes. It is unknown to
            pyplot, so there is nothing to close.
        """
        drawing = _checks.module_that_draws(
            "keras_batchsize._report_plot", "Report.plot"
        )
        figure = drawing.draw(self, x)
        if to_file is not None:
            figure.savefig(to_file)
        return figure

    def save(self, path):
        """Writes the report to a file.

        Args:
            path: Path; folders are made. A .json file holds everything and
                is read by `load`; a .md file holds the tables of `summary` as
                Markdown.
        """
        path = pathlib.Path(path)
        if path.suffix == ".json":
            text = json.dumps(self.to_dict(), allow_nan=False)
        elif path.suffix == ".md":
            text = _report_text.markdown(self)
        else:
            raise ValueError(
                "`path` must end in .json or .md: the ending tells the "
                f"format. Received: path={str(path)!r}. Use "
                f"{str(path.with_suffix('.json'))!r} for a file that "
                "`Report.load` reads, or .md for one that people read."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path):
        """Reads a .json file of `save`; returns a `Report` equal to it."""
        text = pathlib.Path(path).read_text(encoding="utf-8")
        return cls.from_dict(json.loads(text))

    def to_dict(self):
        """Returns the report as JSON types.

        NaN becomes None and an infinity the string "Infinity", since JSON has
        neither. Rows are stored by column: a third of the size, and
        `pandas.DataFrame(report.to_dict()["rows"])` reads them.
        """
        return {
            "format": FORMAT,
            "version": VERSION,
            "settings": json_value(self.settings),
            "base_updates": json_value(self.base_updates),
            "base_seconds": json_value(self.base_seconds),
            "skipped_measurements": json_value(self.skipped_measurements),
            "rows": {
                field.name: json_value(
                    [getattr(row, field.name) for row in self._rows]
                )
                for field in dataclasses.fields(Row)
            },
            "changes": json_value([vars(change) for change in self._changes]),
        }

    @classmethod
    def from_dict(cls, data):
        """Builds a `Report` from what `to_dict` returned."""
        received = (data.get("format"), data.get("version"))
        if received != (FORMAT, VERSION):
            raise ValueError(
                f"`data` must be a report of format {FORMAT!r}, version "
                f"{VERSION}, as other fields cannot be read. Received: "
                f"format={received[0]!r}, version={received[1]!r}. Pass what "
                "`Report.to_dict` returned, or a file from `Report.save`."
            )
        report = cls(data["settings"])
        report.base_updates = data["base_updates"]
        seconds = data["base_seconds"]
        report.base_seconds = NAN if seconds is None else float(seconds)
        report.skipped_measurements = data["skipped_measurements"]
        columns = data["rows"]
        for values in zip(*columns.values(), strict=True):
            report._rows.append(Row(**dict(zip(columns, values, strict=True))))
        report._changes = [Change(**change) for change in data["changes"]]
        return report
