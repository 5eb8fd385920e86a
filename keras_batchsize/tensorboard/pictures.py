"""Pictures for TensorBoard's tab "Images", where matplotlib is installed."""

import io
import math

from keras_batchsize import throughput

_DPI = 130


def png(figure):
    """Returns a matplotlib figure as (bytes of a PNG file, width, height)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    width, height = figure.get_size_inches() * _DPI
    return buffer.getvalue(), round(width), round(height)


def goodput(
    sizes, present, step_time, noise_scale, base_batch_size, efficiency
):
    """Draws speed and goodput over the batch sizes that may be used.

    Args:
        sizes: Increasing integers, the sizes of the ladder.
        present: Integer, the size in force.
        step_time: A `StepTime`.
        noise_scale: Float φ, in examples.
        base_batch_size: Integer B₀, the size that the rate was meant for.
        efficiency: `throughput.efficiency` or `linear_efficiency`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter
    from matplotlib.ticker import FuncFormatter
    from matplotlib.ticker import NullLocator

    from keras_batchsize._figures import BLUE
    from keras_batchsize._figures import ORANGE
    from keras_batchsize._figures import RED

    known = (step_time, noise_scale, base_batch_size, efficiency)
    fine = _between(sizes)
    useful = [throughput.goodput(size, *known) for size in fine]
    speed = [size / step_time(size) for size in fine]
    now = throughput.goodput(present, *known)
    figure = Figure(figsize=(6.2, 3.7), layout="constrained")
    axes = figure.subplots()
    axes.plot(fine, speed, color="0.55", linestyle="--", label="examples/s")
    axes.plot(fine, useful, color=BLUE, linewidth=2.2, label="goodput")
    axes.plot(present, now, "o", color=RED, label=f"now: {present}")
    axes.axvline(
        noise_scale, color=ORANGE, linestyle=":", label="noise scale"
    )
    axes.set_xscale("log", base=2)
    axes.set_xlim(sizes[0] / 1.2, sizes[-1] * 1.2)
    axes.set_ylim(bottom=0)
    axes.set_xticks(sizes)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("batch size, in examples")
    axes.set_title("goodput: useful examples per second", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    return figure


def _between(sizes):
    """Returns 65 sizes from the first to the last, evenly in the logarithm."""
    low, high = math.log(sizes[0]), math.log(sizes[-1])
    return [math.exp(low + (high - low) * i / 64) for i in range(65)]
