"""Markdown for TensorBoard's tab "Text"."""

import math

_ROWS = 200  # A table is written anew whenever it has grown.


def settings(values):
    """Returns the settings of a run as a table.

    Args:
        values: Dict of JSON values.
    """
    rows = [
        (name.replace("_", " "), f"`{_number(value)}`")
        for name, value in values.items()
    ]
    return _table(("setting", "value"), rows)


def change(one):
    """Returns one change, with its reason, as a sentence.

    Args:
        one: Dict of the attributes of a `report.Change`.
    """
    sentence = (
        f"**{one['old_batch_size']} → {one['new_batch_size']}** after "
        f"{one['examples']:,} examples, in epoch {one['epoch'] + 1}: "
        f"{one['reason']}. Learning rate {_number(one['learning_rate'])}"
    )
    if math.isfinite(one["predicted_speedup"]):
        sentence += f", predicted speed-up {one['predicted_speedup']:.2f}"
    return f"{sentence}."


def changes(many):
    """Returns the latest 200 changes as a table.

    Args:
        many: List of dicts of the attributes of a `report.Change`.
    """
    rows = [
        (
            one["epoch"] + 1,
            f"{one['examples']:,}",
            f"{one['old_batch_size']} → {one['new_batch_size']}",
            _number(one["noise_scale"]),
            _number(one["learning_rate"]),
            _number(one["predicted_speedup"]),
            _number(one["observed_speedup"]),
            one["reason"],
        )
        for one in many[-_ROWS:]
    ]
    header = (
        "epoch",
        "examples",
        "batch size",
        "noise scale",
        "learning rate",
        "predicted speed-up",
        "observed",
        "why",
    )
    return _table(header, rows)


def profile(probe):
    """Returns what the memory probe found as a table.

    Args:
        probe: A `BatchProfile` or anything with its attributes.
    """
    rows = [
        (
            f"{row.batch_size:,}",
            _megabytes(row.peak_bytes),
            _megabytes(row.predicted_bytes),
            _number(row.step_seconds and 1e3 * row.step_seconds),
            _number(row.step_seconds and row.batch_size / row.step_seconds),
            "yes" if row.fits else "**no**",
        )
        for row in probe.rows
    ]
    header = (
        "batch size",
        "peak MB",
        "predicted MB",
        "ms per update",
        "examples/s",
        "fits",
    )
    limit = _megabytes(probe.memory_limit)
    return (
        f"{_table(header, rows)}\n\nLargest batch size: "
        f"**{probe.max_batch_size:,}**. Memory limit: {limit} MB. 95 % of "
        f"the best speed from {probe.saturation_batch_size:,} on."
    )


def _table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines
    )


def _cell(value):
    return str(value).replace("|", "\\|").replace("\n", " ")


def _megabytes(count):
    return "–" if count is None else f"{count / 1e6:,.1f}"


def _number(value):
    """Returns a number in a few digits; a dash where it is not known."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
