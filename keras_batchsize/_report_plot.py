"""A report as a figure. Needs matplotlib; `report` imports it when asked."""

import numpy as np
from matplotlib.ticker import EngFormatter
from matplotlib.ticker import FuncFormatter
from matplotlib.ticker import LogLocator
from matplotlib.ticker import MaxNLocator
from matplotlib.ticker import NullLocator

from keras_batchsize import _checks
from keras_batchsize import _figures
from keras_batchsize._figures import BLUE
from keras_batchsize._figures import GREY
from keras_batchsize._figures import ORANGE

X_LABELS = {
    "examples": "examples",
    "updates": "updates",
    "seconds": "seconds of training",
    "epoch": "epochs done",
}


def draw(report, x="examples"):
    """Draws a report.

    Args:
        report: A `report.Report` with at least one row.
        x: String, the horizontal axis, a key of `X_LABELS`.

    Returns:
        A `matplotlib.figure.Figure` of 2 x 2 axes: sizes, learning rates,
        examples per second, loss.

    Raises:
        ValueError: If `x` is unknown or the report holds no row.
    """
    _checks.known("x", x, X_LABELS, "rows are ordered by these alone")
    if not report.rows:
        raise ValueError(
            "The report must hold a row: a figure without one shows nothing. "
            f"Received: report={report!r}. Train for at least one step first."
        )
    rows = {
        name: np.array([getattr(row, name) for row in report.rows])
        for name in vars(report.rows[0])
    }
    at = epochs_done(rows) if x == "epoch" else rows[x].astype(float)
    figure = _figures.NotebookFigure(figsize=(11, 6.6), layout="constrained")
    figure.get_layout_engine().set(hspace=0.06, wspace=0.04)
    panels = figure.subplots(2, 2, sharex=True).ravel()
    start = 0.0 if rows["epoch"][0] == 0 else at[0]
    hold = _holder(at, start, rows["batch_size"])
    _draw_sizes(panels[0], hold, rows, report.settings)
    _draw_rates(panels[1], hold, rows)
    _draw_speed(panels[2], hold, rows)
    _draw_loss(panels[3], at, rows)
    changes = np.interp(
        [change.examples for change in report.changes], rows["examples"], at
    )
    for axes in panels:
        _finish(axes, changes)
    for axes in panels[2:]:
        axes.set_xlabel(X_LABELS[x])
        _shorten(axes.xaxis, at[-1])
    panels[0].set_xlim(start, at[-1] if at[-1] > start else None)
    return figure


def epochs_done(rows):
    """Returns for each row how many epochs were done, with the fraction.

    Rows know their epoch, not how far into it they are. All epochs but the
    last are complete, so the last row of each one marks its end; the last one
    is taken to be as long as they are.

    Args:
        rows: Dict of arrays, with `epoch` and `examples`, as in `report.Row`.

    Returns:
        Float array, in epochs.
    """
    epoch, examples = rows["epoch"], rows["examples"]
    last = np.flatnonzero(np.diff(epoch, append=epoch[-1] + 1))
    begin = 0 if epoch[0] == 0 else examples[0]
    ends = np.concatenate([[begin], examples[last]])
    done = np.concatenate([[epoch[0]], epoch[last] + 1.0])
    if len(last) > 1:
        length = np.median(np.diff(ends[:-1]) / np.diff(done[:-1]))
        seen = (ends[-1] - ends[-2]) / max(length, 1)
        # Within 1 %: a complete epoch of which thinning took a row or two.
        done[-1] = epoch[-1] + (1.0 if seen > 0.99 else seen)
    return np.interp(examples, ends, done)


def _holder(at, start, sizes):
    """Returns a function that turns a column of rows into a line's points.

    A row tells of the superbatch that ends at it. So a line starts where
    training did, and where the batch size changes it jumps at the row before,
    where the change took effect, rather than slope from row to row. It jumps
    to `entry`, which defaults to the value of the row after.
    """
    jumps = np.flatnonzero(np.diff(sizes)) + 1
    points = np.insert(at, [0, *jumps], [start, *at[jumps - 1]])

    def hold(values, entry=None):
        entry = values if entry is None else entry
        return points, np.insert(values, [0, *jumps], entry[[0, *jumps]])

    return hold


def _row_before(values):
    """Returns a column moved down by a row; the first value is repeated."""
    return np.append(values[:1], values[:-1])


def _draw_sizes(axes, hold, rows, settings):
    """Batch size and noise scale in examples, on an axis of octaves."""
    noise = np.where(rows["noise_scale"] > 0, rows["noise_scale"], np.nan)
    finite = noise[np.isfinite(noise)]
    limits = [rows["batch_size"].min(), rows["batch_size"].max()]
    if finite.size:
        # Not the extremes: the first estimates may be off by any factor.
        limits += list(np.percentile(finite, (1, 99)))
    handles = {}
    maximum = settings.get("max_batch_size")
    if maximum:
        limits.append(maximum)
        handles["maximum"] = axes.axhline(maximum, color=GREY, linestyle=":")
    bottom, top = min(limits) / 1.5, max(limits) * 1.5
    at, lower = hold(rows["noise_lower"], _row_before(rows["noise_lower"]))
    _, upper = hold(rows["noise_upper"], _row_before(rows["noise_upper"]))
    band = axes.fill_between(
        at,
        np.clip(lower, bottom / 2, top * 2),  # 0 and infinity leave the axes
        np.clip(upper, bottom / 2, top * 2),
        color=ORANGE,
        alpha=0.25,
        linewidth=0,
    )
    noise_line = hold(noise, _row_before(noise))
    (line,) = axes.plot(*noise_line, color=ORANGE, linewidth=1.2)
    handles["noise scale"] = (band, line)
    (handles["batch size"],) = axes.plot(
        *hold(rows["batch_size"]), color=BLUE, linewidth=2.2
    )
    axes.set_yscale("log", base=2)
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_locator(LogLocator(base=2, numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.set_title("batch size and noise scale, in examples", loc="left")
    names = list(handles)[::-1]
    axes.legend([handles[name] for name in names], names)


def _draw_rates(axes, hold, rows):
    """Learning rate, effective and as the user set it."""
    base = _row_before(rows["base_learning_rate"])
    effective = hold(
        rows["learning_rate"], base * rows["learning_rate_factor"]
    )
    axes.plot(*effective, color=BLUE, linewidth=1.8)
    base_line = hold(rows["base_learning_rate"], base)
    axes.plot(*base_line, color=GREY, linestyle="--", linewidth=1.4)
    axes.set_ylim(bottom=0)
    axes.set_title("learning rate", loc="left")
    axes.legend(axes.lines[:2], ["effective", "base"])


def _draw_speed(axes, hold, rows):
    """Examples per second, from zero, so that ratios show."""
    speed = rows["examples_per_second"]
    axes.plot(*hold(speed), color=BLUE, linewidth=1.4)
    axes.set_ylim(bottom=0)
    _shorten(axes.yaxis, np.max(speed, where=np.isfinite(speed), initial=0))
    axes.set_title("examples per second", loc="left")


def _draw_loss(axes, at, rows):
    """Loss, as the train loop gave it."""
    axes.plot(at, rows["loss"], color=BLUE, linewidth=1.8)
    axes.set_title("loss", loc="left")


def _shorten(axis, largest):
    """Writes 600000 as 600k. Small values stay, or 0.5 would become 500m."""
    axis.set_major_locator(MaxNLocator(nbins=7))
    if largest >= 10_000:
        axis.set_major_formatter(EngFormatter(sep=""))


def _finish(axes, changes):
    """Gives each panel the marks of the changes and the same frame."""
    for position in changes:
        axes.axvline(
            position, color=GREY, linestyle="--", linewidth=0.6, zorder=1
        )
    _figures.frame(axes)
