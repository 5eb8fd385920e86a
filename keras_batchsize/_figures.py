"""What our figures share. Needs matplotlib, see `_checks.module_that_draws`.

A figure belongs to nobody: no pyplot, no global state, hence no window and
nothing to close. Colours are those of Okabe and Ito, apart for the
colour-blind; everything else follows the user's matplotlib style.
"""

import io

from matplotlib.figure import Figure

BLUE = "#0072B2"
ORANGE = "#E69F00"
RED = "#D55E00"
GREEN = "#009E73"
GREY = "0.5"


class NotebookFigure(Figure):
    """A figure that a notebook shows although pyplot never heard of it."""

    def _repr_png_(self):
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def frame(axes):
    """Gives a panel, and its legend if it has one, the frame of all.

    Args:
        axes: The `matplotlib.axes.Axes`.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)
    legend = axes.get_legend()
    if legend:
        legend.get_frame().set(edgecolor="none", alpha=0.7)
