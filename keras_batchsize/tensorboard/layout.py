"""The layout of TensorBoard's tab "Custom Scalars".

It tells the story without our own tab. Every run writes the same layout, as
TensorBoard merges those of all runs by their titles.
"""

import re

from tensorboard.plugins.custom_scalar import layout_pb2

# Title of a category: title of a chart: its tags. A chart of value, lower and
# upper is drawn with a band.
CHARTS = {
    "Batch size (examples seen →)": {
        "Batch size and its maximum": (
            "batch_size/global",
            "batch_size/maximum",
        ),
        "Batch size and noise scale": (
            "batch_size/global",
            "noise_scale/value",
        ),
    },
    "Gradient noise": {
        "Noise scale with its 95 % interval": {
            "value": "noise_scale/value",
            "lower": "noise_scale/lower",
            "upper": "noise_scale/upper",
        },
        "Signal: squared norm of the gradient": ("gradient/squared_norm",),
        "Noise: variance of one example's gradient": ("gradient/variance",),
    },
    "Learning rate": {
        "With and without the factor": (
            "learning_rate/effective",
            "learning_rate/base",
        ),
        "Factor for the batch size": ("learning_rate/factor",),
    },
    "Speed": {
        "Examples and useful examples per second": (
            "throughput/examples_per_second",
            "throughput/goodput",
        ),
        "Updates made": ("progress/updates",),
    },
    "Memory": {
        "Peak and limit, in bytes": (
            "memory/peak_bytes",
            "memory/limit_bytes",
        ),
    },
}


def make():
    """Returns the `Layout` message."""
    return layout_pb2.Layout(
        category=[
            layout_pb2.Category(
                title=title,
                chart=[_chart(name, tags) for name, tags in charts.items()],
            )
            for title, charts in CHARTS.items()
        ]
    )


def _chart(title, tags):
    if isinstance(tags, dict):
        series = layout_pb2.MarginChartContent.Series(**tags)
        content = layout_pb2.MarginChartContent(series=[series])
        return layout_pb2.Chart(title=title, margin=content)
    # TensorBoard takes them as regular expressions for the beginning of a tag.
    patterns = [f"^{re.escape(tag)}$" for tag in tags]
    content = layout_pb2.MultilineChartContent(tag=patterns)
    return layout_pb2.Chart(title=title, multiline=content)
