"""A report as text: console table, plain text, Markdown, HTML, JSON values.

All of them show the same two things, each defined once: `CHANGE_COLUMNS`, the
table of the changes, and `TOTALS`, the block below it. To add a column or a
total, add one entry there.

The functions take a `report.Report` and read its public attributes only.
"""

import dataclasses
import html as html_module
import io
import math
import re
import textwrap
from collections.abc import Callable

import numpy as np

PLAIN_LINE_LENGTH = 80
TITLE = "Batch size changes"
UNKNOWN = "-"


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the table of changes.

    Attributes:
        header: String.
        text: Function of a `report.Change`, returns the text of its cell.
        prose: Boolean, words that may wrap, flush left. Numbers may not.
    """

    header: str
    text: Callable
    prose: bool = False


@dataclasses.dataclass(frozen=True)
class Total:
    """A line of the block of totals.

    Attributes:
        label: String.
        text: Function of a `report.Report`, returns the text of the line, or
            "" to leave the line out.
    """

    label: str
    text: Callable


def number(value):
    """Four digits, thousands set apart: `0.06964`, `67.66`, `12,345`."""
    if math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds, scale):
    """A time in the largest unit that leaves at least two of it in `scale`.

    Args:
        seconds: Float.
        scale: Float, seconds. Times to be compared share it.
    """
    for unit, length in (("h", 3600), ("min", 60)):
        if scale >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def speedup(change):
    """`1.12 (1.09)`: predicted, and in brackets observed where known."""
    text = number(change.predicted_speedup)
    if not math.isnan(change.predicted_speedup):
        text = f"{change.predicted_speedup:.2f}"
    if not math.isnan(change.observed_speedup):
        text += f" ({change.observed_speedup:.2f})"
    return text


CHANGE_COLUMNS = (
    Column("epoch", lambda change: str(change.epoch + 1)),
    Column("examples", lambda change: f"{change.examples:,}"),
    Column(
        "batch size",
        lambda change: f"{change.old_batch_size} → {change.new_batch_size}",
    ),
    Column("noise scale", lambda change: number(change.noise_scale)),
    Column("learning rate", lambda change: number(change.learning_rate)),
    Column("speed-up (observed)", speedup),
    Column("why", lambda change: change.reason, prose=True),
)


def _fixed_batch(report):
    size = report.settings.get("base_batch_size")
    return "a fixed batch" if size is None else f"a fixed batch of {size}"


def _examples(report):
    if not report.rows:
        return ""
    # A training that was resumed has only the rows since then.
    first = report.settings.get("first_epoch", report.rows[0].epoch)
    epochs = report.rows[-1].epoch - first + 1
    return f"{report.examples:,} in {epochs} epoch{'s' * (epochs > 1)}"


def _updates(report):
    text = f"{report.updates:,}"
    if report.base_updates:
        text += f" ({_fixed_batch(report)}: {report.base_updates:,})"
    return text if report.rows else ""


def _seconds(report):
    taken, base = report.seconds, report.base_seconds
    text = duration(taken, taken)
    if not math.isnan(base):
        base_text = duration(base, taken)
        text += f" ({_fixed_batch(report)}: {base_text}, predicted)"
    return text if report.rows else ""


def _speedup_in_total(report):
    ratio = report.base_seconds / report.seconds if report.seconds else math.nan
    if math.isnan(ratio):
        return ""
    return f"{ratio:.2f} over {_fixed_batch(report)}"


def _examples_per_second(report):
    if not report.seconds > 0:
        return ""
    return number(report.examples / report.seconds)


def _final_batch_size(report):
    if not report.rows:
        return ""
    size, micro = report.final_batch_size, report.rows[-1].micro_batch_size
    return f"{size}" if micro == size else f"{size} in micro-batches of {micro}"


def _noise_scale(report):
    if not report.rows:
        return ""
    for row in reversed(report.rows):
        if not math.isnan(row.noise_scale):
            interval = f"{number(row.noise_lower)} to {number(row.noise_upper)}"
            return f"{number(row.noise_scale)} ({interval})"
    return "not resolved"


def _skipped(report):
    count = report.skipped_measurements
    return f"{count:,} (gradients not finite)" if count else ""


def _recommended(report):
    size = report.settings.get("recommended_batch_size")
    return f"{size:,}" if size else ""


TOTALS = (
    Total("Examples", _examples),
    Total("Updates", _updates),
    Total("Training time", _seconds),
    Total("Speed-up", _speedup_in_total),
    Total("Examples/s", _examples_per_second),
    Total("Final batch size", _final_batch_size),
    Total("Final noise scale", _noise_scale),
    Total("Recommended size", _recommended),
    Total("Skipped measurements", _skipped),
)


def change_cells(report):
    """Returns the table of changes as lists of strings, without a header."""
    return [
        [column.text(change) for column in CHANGE_COLUMNS]
        for change in report.changes
    ]


def total_cells(report):
    """Returns the totals as (label, text) pairs of strings."""
    pairs = [(total.label, total.text(report)) for total in TOTALS]
    return [(label, text) for label, text in pairs if text]


def unchanged(report):
    """Returns the sentence that stands in for a table without rows."""
    if not report.rows:
        return "No training recorded yet."
    text = f"None: the batch size stayed at {report.final_batch_size}"
    reason = report.settings.get("reason_unchanged")
    return f"{text}, {reason}." if reason else f"{text}."


def _rich_table(report):
    """Builds the table of changes: only headers and prose may wrap."""
    import rich.table
    import rich.text

    table = rich.table.Table(show_edge=False)
    rows = change_cells(report)
    for column, *cells in zip(CHANGE_COLUMNS, *rows, strict=True):
        words = column.header.split()
        width = max(map(len, (*words, *cells)))
        header = textwrap.fill(column.header, width, break_on_hyphens=False)
        table.add_column(
            rich.text.Text(header),
            justify="left" if column.prose else "right",
            no_wrap=not column.prose,
            min_width=max(map(len, words)),
        )
    for cells in rows:
        table.add_row(*map(rich.text.Text, cells))
    return table


def _print_rich(report, console):
    """Prints title, table and totals. Text objects, so no markup is read."""
    import rich.table
    import rich.text

    console.print(rich.text.Text(TITLE, style="bold"))
    if report.changes:
        console.print(_rich_table(report))
    else:
        console.print(rich.text.Text(unchanged(report)))
    console.print()
    totals = rich.table.Table.grid(padding=(0, 1))
    for label, text in total_cells(report):
        totals.add_row(
            rich.text.Text(label, style="bold"), rich.text.Text(text)
        )
    console.print(totals)


def print_console(report, line_length=None):
    """Prints a report to the console, in a notebook to the cell.

    Args:
        report: A `report.Report`.
        line_length: Optional integer, characters per line. Defaults to the
            width of the console.
    """
    import rich.console

    _print_rich(report, rich.console.Console(width=line_length))


def plain_text(report, line_length=None):
    """Returns a report as text without colours.

    Args:
        report: A `report.Report`.
        line_length: Optional integer, characters per line. Defaults to 80.

    Returns:
        A string of several lines, without a newline at the end.
    """
    import rich.console

    console = rich.console.Console(
        file=io.StringIO(),
        width=line_length or PLAIN_LINE_LENGTH,
        color_system=None,  # also when FORCE_COLOR is set
        force_jupyter=False,
        legacy_windows=False,
    )
    _print_rich(report, console)
    lines = console.file.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines).rstrip()


def markdown(report):
    """Returns a report as Markdown, without a newline at the end."""

    def line(cells):
        # A bar or a newline would end the cell, a bracket open a tag.
        cells = [re.sub(r"([\\|<*_`\[\]])", r"\\\1", cell) for cell in cells]
        return f"| {' | '.join(' '.join(cell.split()) for cell in cells)} |"

    lines = [f"## {TITLE}", ""]
    if report.changes:
        lines.append(line(column.header for column in CHANGE_COLUMNS))
        rules = [":--" if column.prose else "--:" for column in CHANGE_COLUMNS]
        lines.append(f"| {' | '.join(rules)} |")
        lines += map(line, change_cells(report))
    else:
        lines.append(unchanged(report))
    totals = total_cells(report)
    if totals:
        lines += ["", "| total | |", "| :-- | :-- |", *map(line, totals)]
    return "\n".join(lines)


def html(report):
    """Returns a report as a piece of HTML that refers to nothing outside."""

    def row(cells, tag="td", prose=()):
        parts = []
        for cell, flush_left in zip(cells, prose, strict=True):
            align = "left" if flush_left else "right"
            parts.append(
                f'<{tag} style="text-align: {align}; padding: 2px 8px">'
                f"{html_module.escape(cell)}</{tag}>"
            )
        return f"<tr>{''.join(parts)}</tr>"

    parts = [f"<p><b>{TITLE}</b></p>"]
    if report.changes:
        prose = [column.prose for column in CHANGE_COLUMNS]
        headers = [column.header for column in CHANGE_COLUMNS]
        rows = change_cells(report)
        body = "".join(row(cells, "td", prose) for cells in rows)
        parts.append(
            f"<table><thead>{row(headers, 'th', prose)}</thead>"
            f"<tbody>{body}</tbody></table>"
        )
    else:
        parts.append(f"<p>{html_module.escape(unchanged(report))}</p>")
    totals = "".join(
        row(pair, "td", (True, True)) for pair in total_cells(report)
    )
    parts.append(f"<table><tbody>{totals}</tbody></table>" if totals else "")
    return f"<div>{''.join(parts)}</div>"


def json_value(value):
    """Returns a value as JSON types; what has no such type as its text.

    NaN becomes None and an infinity a string that `float` reads, since JSON
    has neither.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return value
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)
