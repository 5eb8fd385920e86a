"""A profile as a table, and its numbers as text.

Reads the public attributes of a `batch_profile.BatchProfile` only. A column is
an entry of `COLUMNS`.
"""

import math
import sys

UNKNOWN = "-"


def megabytes(count):
    """Bytes in MB of 10⁶ bytes: `83.2`, `1,204`, `-` if not known."""
    if count is None or math.isnan(count):
        return UNKNOWN
    value = count / 1e6
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def milliseconds(seconds):
    """Seconds in ms, `-` if not known."""
    if seconds is None or math.isnan(seconds):
        return UNKNOWN
    return f"{seconds * 1e3:,.2f}"


def whole(value):
    """A number without decimals, thousands set apart."""
    return UNKNOWN if math.isnan(value) else f"{value:,.0f}"


COLUMNS = (
    ("batch size", lambda row: f"{row.batch_size:,}"),
    ("peak MB", lambda row: megabytes(row.peak_bytes)),
    ("predicted MB", lambda row: megabytes(row.predicted_bytes)),
    ("ms per update", lambda row: milliseconds(row.step_seconds)),
    ("examples/s", lambda row: whole(row.examples_per_second)),
    ("fits", lambda row: "yes" if row.fits else row.note or "no"),
)


def cells(profile):
    """Returns the table as a list of rows of strings, the header first."""
    header = [name for name, _ in COLUMNS]
    return [header] + [[text(row) for _, text in COLUMNS]
                       for row in profile.rows]


def totals(profile):
    """Returns the lines below the table as (label, text) pairs."""
    per_replica = ""
    if profile.replicas > 1:
        per_replica = f", {profile.replicas} replicas together"
    lines = [
        (
            "largest batch size",
            f"{profile.max_batch_size:,}{per_replica}, ended by "
            f"{profile.reason}",
        ),
        ("saturation", _saturation(profile)),
        ("time of an update", _step_time(profile)),
        ("memory", _memory(profile)),
        (
            "probed",
            f"{profile.device}, {profile.dtype_policy}"
            f"{', XLA' if profile.jit_compile else ''}, "
            f"{len(profile.rows)} sizes in {profile.seconds:.1f} s",
        ),
    ]
    estimate = profile.estimated_batch_size
    if estimate > 1.06 * profile.max_batch_size:
        lines.insert(
            1, ("memory would end at", f"about {estimate:,.0f}, not run")
        )
    return lines


def _saturation(profile):
    return (
        f"{profile.saturation_batch_size:,}: the smallest with 95 % of the "
        "best throughput"
    )


def _step_time(profile):
    step_time = profile.step_time
    return (
        f"{step_time.fixed * 1e3:.3g} ms + "
        f"{step_time.per_example * 1e6:.3g} µs per example"
    )


def _memory(profile):
    if all(row.peak_bytes is None for row in profile.rows):
        return f"not measured: {profile.measured_by}"
    if profile.memory_limit is None:
        return f"limit not known, measured by {profile.measured_by}"
    holes = profile.fragmentation_per_example * profile.max_batch_size
    fragments = ""
    if holes:
        fragments = f", {megabytes(holes)} MB of them kept for fragments"
    return (
        f"{megabytes(profile.usable_bytes)} MB usable of "
        f"{megabytes(profile.memory_limit)} MB{fragments}, measured by "
        f"{profile.measured_by}"
    )


def lines(profile):
    """Returns the profile as lines of text."""
    table = cells(profile)
    widths = [max(map(len, column)) for column in zip(*table)]
    made = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths))
        for row in table
    ]
    labelled = totals(profile)
    width = max(len(label) for label, _ in labelled)
    return [
        *(line.rstrip() for line in made),
        "",
        *(f"{label.ljust(width)}  {text}" for label, text in labelled),
    ]


def show(text, print_fn=None):
    """Hands a text to `print_fn`, or writes it to the standard output."""
    if print_fn is None:
        sys.stdout.write(text + "\n")
    else:
        print_fn(text)
