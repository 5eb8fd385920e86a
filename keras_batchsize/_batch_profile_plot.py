"""A profile as a figure. Needs matplotlib; `batch_profile` imports it."""

import numpy as np
from matplotlib.ticker import FuncFormatter

from keras_batchsize import _figures
from keras_batchsize._figures import BLUE
from keras_batchsize._figures import GREEN
from keras_batchsize._figures import GREY
from keras_batchsize._figures import ORANGE
from keras_batchsize._figures import RED


def draw(profile):
    """Draws a profile.

    Args:
        profile: A `batch_profile.BatchProfile`.

    Returns:
        A `matplotlib.figure.Figure` of two axes: memory and throughput
        against the batch size.
    """
    figure = _figures.NotebookFigure(figsize=(11, 4.4), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    sizes = np.array([row.batch_size for row in profile.rows], dtype=float)
    line = np.geomspace(sizes.min(), sizes.max() * 1.15, 200)
    _draw_memory(memory, profile, line)
    _draw_speed(speed, profile, line)
    for axes in (memory, speed):
        axes.axvline(
            profile.max_batch_size,
            color=GREEN,
            linewidth=1.2,
            label=f"largest: {profile.max_batch_size:,}",
        )
        axes.axvline(
            profile.saturation_batch_size,
            color=ORANGE,
            linewidth=1.2,
            linestyle="--",
            label=f"saturation: {profile.saturation_batch_size:,}",
        )
        _finish(axes)
    return figure


def _draw_memory(axes, profile, line):
    known = [row for row in profile.rows if row.peak_bytes is not None]
    for fits, colour, label in (
        (True, BLUE, "peak, fits"),
        (False, RED, "peak, does not fit"),
    ):
        chosen = [row for row in known if row.fits is fits]
        if chosen:
            axes.plot(
                [row.batch_size for row in chosen],
                [row.peak_bytes / 1e6 for row in chosen],
                "o",
                color=colour,
                label=label,
            )
    constant, slope = profile.memory_line()
    if np.isfinite(slope):
        fitted = (constant + slope * line) / 1e6
        axes.plot(line[fitted > 0], fitted[fitted > 0], color=BLUE,
                  linewidth=1, label="fit to the largest two")
    if profile.memory_limit is not None:
        _draw_limit(axes, profile, line)
    failed = [row for row in profile.rows if row.step_seconds is None]
    if failed:
        # A failure has no peak of its own: it is shown at the limit.
        top = (profile.memory_limit or _largest(known)) / 1e6
        axes.plot(
            [row.batch_size for row in failed],
            [top] * len(failed),
            "x",
            color=RED,
            markersize=9,
            label="ran out of memory",
        )
    axes.set_ylim(bottom=0)
    axes.set_title("peak memory, MB", loc="left")


def _draw_limit(axes, profile, line):
    limit, usable = profile.memory_limit, profile.usable_bytes
    axes.axhline(limit / 1e6, color=GREY, label="limit")
    if usable is None:
        return  # Where peaks are not measured, nothing is kept free.
    axes.axhspan(usable / 1e6, limit / 1e6, color=GREY, alpha=0.15,
                 linewidth=0, label="margin")
    if profile.fragmentation_per_example:
        kept_free = profile.fragmentation_per_example * line
        left = np.maximum(usable - kept_free, 0.0)
        axes.fill_between(line, left / 1e6, usable / 1e6, color=ORANGE,
                          alpha=0.15, linewidth=0, label="kept for fragments")


def _largest(rows):
    return max((row.peak_bytes for row in rows), default=0)


def _draw_speed(axes, profile, line):
    timed = [row for row in profile.rows if row.step_seconds]
    axes.plot(
        [row.batch_size for row in timed],
        [row.examples_per_second for row in timed],
        "o",
        color=BLUE,
        label="measured",
    )
    step_time = profile.step_time
    modelled = [size / step_time(size) for size in line]
    axes.plot(line, modelled, color=BLUE, linewidth=1, label="B/(a + c·B)")
    axes.set_ylim(bottom=0)
    axes.set_title("examples per second", loc="left")


def _finish(axes):
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.set_xlabel("batch size, in examples")
    axes.legend(loc="best")
    _figures.frame(axes)
