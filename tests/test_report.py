"""The laws of the report: nothing is lost, nothing is said twice."""

import copy
import dataclasses
import html.parser
import json
import math
import re
import sys

import numpy as np
import pytest

from keras_batchsize import _report_text
from keras_batchsize.report import Change
from keras_batchsize.report import Report
from keras_batchsize.report import Row
from keras_batchsize.report import thin_rows

NAN = math.nan


def a_row(step, batch_size=32, **fields):
    """The row after `step` superbatches of 96 examples, 10 to an epoch."""
    values = dict(
        examples=96 * (step + 1),
        updates=3 * (step + 1),
        epoch=step // 10,
        seconds=0.1 * (step + 1),
        batch_size=batch_size,
        micro_batch_size=min(batch_size, 64),
        accumulation_steps=max(1, batch_size // 64),
        noise_scale=50.0 + step / 3,
        noise_lower=40.0,
        noise_upper=80.0 + step,
        learning_rate=0.1 * batch_size / 32,
        base_learning_rate=0.1,
        learning_rate_factor=batch_size / 32,
        examples_per_second=960.0,
        loss=1 / (step + 1),
    )
    return Row(**{**values, **fields})


def a_change(step, old, new, reason="noise scale", **fields):
    """A change that takes effect with row `step`."""
    values = dict(
        epoch=step // 10,
        examples=96 * step,
        updates=3 * step,
        old_batch_size=old,
        new_batch_size=new,
        noise_scale=50.0 + step / 3,
        learning_rate=0.1 * new / 32,
        reason=reason,
        predicted_speedup=1.25,
    )
    return Change(**{**values, **fields})


def a_report(sizes=(32,) * 12 + (64,) * 12 + (128,) * 12):
    report = Report(
        dict(policy="goodput", base_batch_size=32, max_batch_size=256)
    )
    for step, size in enumerate(sizes):
        if step and size != sizes[step - 1]:
            report.add_change(a_change(step, sizes[step - 1], size))
        report.add_row(a_row(step, size))
    report.base_updates = 108
    report.base_seconds = 9.0
    report.skipped_measurements = 2
    return report


def summary_of(report, line_length=None):
    printed = []
    report.summary(print_fn=printed.append, line_length=line_length)
    (text,) = printed
    return text


# Records and totals.


def test_records_hold_plain_numbers():
    row = a_row(
        0,
        batch_size=np.int64(64),
        noise_scale=None,
        loss=np.float32(0.5),
        examples=np.array(96),
    )

    kinds = {name: type(value) for name, value in vars(row).items()}

    assert kinds == {f.name: f.type for f in dataclasses.fields(Row)}
    assert math.isnan(row.noise_scale)
    assert row.loss == 0.5


@pytest.mark.parametrize(
    ("field", "value"), [("batch_size", 64.5), ("loss", "low"), ("epoch", None)]
)
def test_a_record_refuses_what_is_no_number(field, value):
    received = re.escape(f"Received: {field}={value!r}")
    with pytest.raises(TypeError, match=received):
        a_row(0, **{field: value})


def test_totals_are_those_of_the_last_row():
    report = a_report()

    assert report.examples == 36 * 96
    assert report.updates == 36 * 3
    assert report.seconds == report.rows[-1].seconds
    assert report.final_batch_size == 128


def test_an_empty_report_has_totals_and_text():
    report = Report()

    totals = (report.examples, report.updates, report.seconds)

    assert totals == (0, 0, 0.0)
    assert report.final_batch_size == 0
    assert "No training recorded yet." in str(report)
    assert "No training recorded yet." in report._repr_html_()
    assert Report.from_dict(report.to_dict()).to_dict() == report.to_dict()


def test_replace_change_keeps_the_other_fields():
    report = a_report()
    before = report.changes

    report.replace_change(1, observed_speedup=1.09)

    assert report.changes[1].observed_speedup == 1.09
    assert report.changes[1].new_batch_size == before[1].new_batch_size
    assert report.changes[0] is before[0]


def test_a_copy_shares_nothing():
    report = a_report()
    twin = copy.deepcopy(report)
    twin.add_row(a_row(99))
    twin.settings["policy"] = "fixed"
    assert report.to_dict() == a_report().to_dict()


# Thinning.


def random_sizes(count, changes, seed=0):
    rng = np.random.default_rng(seed)
    starts = rng.choice(np.arange(1, count), changes, replace=False)
    return 32 << (np.isin(np.arange(count), starts).cumsum() % 2)


@pytest.mark.parametrize("count", [1999, 2000, 2001, 12_345])
def test_thinning_keeps_limit_ends_changes_and_totals(count):
    sizes = random_sizes(count, changes=200)
    rows = [a_row(step, size) for step, size in enumerate(sizes)]
    report = Report()

    for row in rows:
        report.add_row(row)
        assert report.updates == row.updates

    kept = {row.examples for row in report.rows}
    assert len(report.rows) == len(kept) <= 2000
    assert report.rows[0] == rows[0]
    assert report.rows[-1] == rows[-1]
    for before, row in zip(rows[:-1], rows[1:], strict=True):
        if before.batch_size != row.batch_size:
            assert {before.examples, row.examples} <= kept


def test_thinning_many_times_is_thinning_once():
    sizes = random_sizes(9_000, changes=50)
    rows = [a_row(step, size) for step, size in enumerate(sizes)]
    report = Report()
    for row in rows:
        report.add_row(row)

    assert thin_rows(report.rows) == thin_rows(rows)


def test_thinned_rows_are_evenly_spread():
    rows = [a_row(step) for step in range(50_000)]
    gaps = np.diff([row.examples for row in thin_rows(rows)[:-1]])
    # A cell is at most two rows wider than the narrowest, whatever its place:
    # 2^k examples are no multiple of 96.
    assert np.ptp(gaps) <= 2 * 96


def test_the_limit_holds_where_the_size_always_changes():
    report = Report()
    for step in range(5_000):
        report.add_row(a_row(step, 32 << step % 2))
        assert len(report.rows) <= 2000
    assert report.rows[0].examples == 96
    assert report.examples == 5_000 * 96


def test_changes_are_never_thinned():
    report = Report()
    for step in range(3_000):
        report.add_change(a_change(step, 32, 64))
    assert len(report.changes) == 3_000


# Text.


def test_summary_is_plain_and_says_each_change_once(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    report = a_report()

    text = summary_of(report)

    assert "\x1b" not in text
    assert text.count("→") == len(report.changes)
    for change in ("32 → 64", "64 → 128"):
        assert text.count(change) == 1
    assert text == str(report)


@pytest.mark.parametrize("line_length", [None, 80, 100, 140])
def test_summary_stays_within_the_line(line_length):
    report = a_report()
    reason = "noise scale above twice the size for 3 checks, memory cap"
    report.add_change(a_change(36, 1024, 2048, reason=reason))

    text = summary_of(report, line_length)

    assert max(map(len, text.splitlines())) <= (line_length or 80)
    assert "…" not in text


def test_epochs_are_counted_from_one():
    report = Report()
    report.add_row(a_row(0))
    report.add_change(a_change(0, 32, 64))
    assert _report_text.change_cells(report)[0][0] == "1"


def test_summary_compares_with_the_fixed_batch():
    text = summary_of(a_report())

    assert "108 (a fixed batch of 32: 108)" in text
    assert "3.6 s (a fixed batch of 32: 9.0 s, predicted)" in text
    assert "2.50 over a fixed batch of 32" in text
    assert "128 in micro-batches of 64" in text
    assert "2 (gradients not finite)" in text


def test_summary_leaves_out_what_is_unknown():
    report = Report()
    report.add_row(a_row(0, noise_scale=NAN, noise_lower=NAN, noise_upper=NAN))

    text = summary_of(report)

    assert "not resolved" in text
    assert "fixed batch" not in text
    assert "Skipped" not in text
    assert "nan" not in text.lower().split()


@pytest.mark.parametrize("reason", ["noise scale not resolved", None])
def test_summary_without_a_change_says_so_and_why(reason):
    report = a_report(sizes=(32,) * 5)
    because = ""
    if reason:
        report.settings["reason_unchanged"] = reason
        because = f", {reason}"

    sentence = f"None: the batch size stayed at 32{because}."

    assert sentence in summary_of(report)
    assert sentence in report._repr_html_()
    assert sentence in _report_text.markdown(report)


@pytest.mark.parametrize(
    ("predicted", "observed", "text"),
    [
        (1.1234, 1.09, "1.12 (1.09)"),
        (1.1234, NAN, "1.12"),
        (NAN, 1.09, "- (1.09)"),
        (NAN, NAN, "-"),
    ],
)
def test_speedup_shows_what_is_known(predicted, observed, text):
    change = a_change(
        1, 32, 64, predicted_speedup=predicted, observed_speedup=observed
    )
    assert _report_text.speedup(change) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.069642, "0.06964"),
        (67.664, "67.66"),
        (12345.6, "12,346"),
        (-0.0005, "-0.0005"),
        (math.inf, "∞"),
        (NAN, "-"),
    ],
)
def test_numbers_have_four_digits(value, text):
    assert _report_text.number(value) == text


def test_a_new_column_is_one_entry(monkeypatch):
    column = _report_text.Column("examples/3", lambda c: f"<{c.updates}>")
    columns = (*_report_text.CHANGE_COLUMNS[:-1], column)
    monkeypatch.setattr(_report_text, "CHANGE_COLUMNS", columns)
    report = a_report()

    texts = (
        summary_of(report, 120),
        _report_text.markdown(report),
        report._repr_html_(),
    )

    for text in texts:
        assert "examples/3" in text
        assert "36" in text


def test_console_shows_the_same_words(capsys):
    report = a_report()
    report.summary(line_length=80)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert printed.split() == str(report).split()


def test_rich_reads_no_markup_in_a_reason():
    report = a_report()
    report.replace_change(0, reason="[red]x[/nothing]")
    assert "[red]x[/nothing]" in summary_of(report, 120)


def test_html_is_escaped_and_closed():
    report = a_report(sizes=(32,) * 3)
    report.add_change(a_change(3, 32, 64, reason="<script>a & b</script>"))
    opened = []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag != "script"
            opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Parser().feed(report._repr_html_())

    assert not opened
    assert "&lt;script&gt;a &amp; b&lt;/script&gt;" in report._repr_html_()


def test_html_of_a_reason_unchanged_is_escaped():
    report = a_report(sizes=(32,) * 3)
    report.settings["reason_unchanged"] = "<b>"
    report.settings["base_batch_size"] = "<i>"
    assert "<b>." not in report._repr_html_()
    assert "<i>" not in report._repr_html_()


def test_repr_is_one_short_line():
    assert repr(a_report()) == (
        "<Report: 3,456 examples, 108 updates, 2 changes, batch size 128>"
    )


# Files.


def test_json_round_trip_is_exact(tmp_path):
    report = a_report()
    report.add_row(a_row(36, noise_scale=NAN, noise_upper=math.inf, loss=0.1))
    report.add_row(a_row(37, loss=1e-310, noise_lower=-math.inf))
    report.base_seconds = NAN
    report.settings["widths"] = [1, 2.5, None, True, {"deep": "é"}]
    path = tmp_path / "new" / "run.json"

    report.save(path)
    loaded = Report.load(path)

    assert loaded.to_dict() == report.to_dict()
    assert loaded.settings == report.settings
    # NaN differs from itself, so records are compared by their repr, which
    # for a float is exact.
    assert repr(loaded.rows) == repr(report.rows)
    assert repr(loaded.changes) == repr(report.changes)
    assert str(loaded) == str(report)
    assert math.isnan(loaded.base_seconds)


def test_json_is_strict(tmp_path):
    report = a_report()
    report.add_row(a_row(36, noise_scale=NAN, noise_upper=math.inf))
    path = tmp_path / "run.json"
    report.save(path)

    def refuse(constant):
        pytest.fail(f"{constant} is no JSON")

    data = json.loads(path.read_text("utf-8"), parse_constant=refuse)

    assert data["rows"]["noise_scale"][-1] is None


def test_any_setting_can_be_saved():
    report = Report(
        dict(size=np.int64(3), rate=np.float32(0.5), bounds=(1, 2), kind=Row)
    )
    settings = Report.from_dict(report.to_dict()).settings
    assert settings == dict(size=3, rate=0.5, bounds=[1, 2], kind=str(Row))


def test_a_loaded_report_goes_on_as_if_never_saved():
    report, twin = Report(), Report()
    for step in range(4_500):
        report.add_row(a_row(step))
        twin.add_row(a_row(step))
        if step == 2_345:
            twin = Report.from_dict(twin.to_dict())
    assert twin.to_dict() == report.to_dict()


def test_markdown_has_a_row_per_change_and_escapes(tmp_path):
    report = a_report()
    report.replace_change(0, reason="a | b\n<i>*c*")
    path = tmp_path / "run.md"

    report.save(path)
    lines = path.read_text("utf-8").splitlines()

    # Header, rule and a line per change, all with the same bars.
    table = lines[2 : 4 + len(report.changes)]
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
    assert bars == {len(_report_text.CHANGE_COLUMNS) + 1}
    assert table[2].endswith(r"| a \| b \<i>\*c\* |")
    assert lines[4 + len(report.changes)] == ""


@pytest.mark.parametrize("name", ["run.csv", "run"])
def test_save_refuses_other_endings(tmp_path, name):
    with pytest.raises(ValueError, match=r"\.json or \.md.*Received: path="):
        Report().save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "data", [{}, {"format": "keras_batchsize.report", "version": 99}]
)
def test_from_dict_refuses_what_is_no_report(data):
    with pytest.raises(ValueError, match="Received: format="):
        Report.from_dict(data)


# Plot.


@pytest.fixture
def pyplot_stays_away():
    pytest.importorskip("matplotlib")
    yield
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


@pytest.mark.parametrize("x", ["examples", "updates", "seconds", "epoch"])
@pytest.mark.usefixtures("pyplot_stays_away")
def test_plot_draws_four_panels_and_marks_changes(tmp_path, x):
    report = a_report()
    path = tmp_path / "run.png"

    figure = report.plot(path, x=x)

    assert path.read_bytes().startswith(b"\x89PNG")
    # Lines of each panel: maximum, noise scale, batch size; effective and
    # base rate; speed; loss; and in each a mark per change.
    drawn = [len(axes.lines) for axes in figure.axes]
    assert drawn == [3 + 2, 2 + 2, 1 + 2, 1 + 2]
    expected = {
        "examples": [12 * 96, 24 * 96],
        "updates": [36, 72],
        "seconds": [1.2, 2.4],
        "epoch": [1.2, 2.4],
    }
    for axes in figure.axes:
        marks = [line.get_xdata()[0] for line in axes.lines[-2:]]
        # Sums and ratios of a few floats: rounding only.
        np.testing.assert_allclose(marks, expected[x], rtol=1e-12)


@pytest.mark.usefixtures("pyplot_stays_away")
def test_lines_jump_where_the_change_took_effect():
    sizes = a_report().plot().axes[0].lines[2]
    start, *jumps = np.flatnonzero(np.diff(sizes.get_ydata()))
    jumps = [start, *jumps]
    assert list(sizes.get_xdata()[jumps]) == [12 * 96, 24 * 96]
    assert list(sizes.get_xdata()[np.add(jumps, 1)]) == [12 * 96, 24 * 96]
    assert sizes.get_xdata()[0] == 0


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.usefixtures("pyplot_stays_away")
def test_plot_takes_a_short_run_where_nothing_is_known(tmp_path, count):
    report = Report()
    for step in range(count):
        unknown = dict.fromkeys(("noise_scale", "noise_lower", "noise_upper"))
        speed = dict(examples_per_second=NAN, loss=NAN)
        report.add_row(a_row(step, **unknown, **speed))
    for x in ("examples", "updates", "seconds", "epoch"):
        file = tmp_path / f"{x}.png"
        figure = report.plot(file, x=x)
        assert file.read_bytes().startswith(b"\x89PNG")
        sizes = figure.axes[0].lines[-1]
        assert set(sizes.get_ydata()) == {32}
        limits = [
            [*axes.get_xlim(), *axes.get_ylim()] for axes in figure.axes
        ]
        assert len(limits) == 4 and np.isfinite(limits).all()


@pytest.mark.usefixtures("pyplot_stays_away")
def test_an_infinite_interval_leaves_the_axes_finite(tmp_path):
    report = a_report()
    report.add_row(a_row(36, 128, noise_lower=0.0, noise_upper=math.inf))

    axes = report.plot(tmp_path / "run.png").axes[0]

    bottom, top = axes.get_ylim()
    assert 16 < bottom < 32
    assert 256 < top < 512
    # The band runs out of the picture; at infinity it would not be drawn.
    (band,) = axes.collections[0].get_paths()
    heights = band.vertices[:, 1]
    assert 0 < heights.min() < bottom
    assert top < heights.max() < math.inf


@pytest.mark.usefixtures("pyplot_stays_away")
def test_a_notebook_shows_the_figure():
    assert a_report().plot()._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("first", "count", "done"), [(0, 25, 2.5), (0, 30, 3.0), (20, 15, 3.5)]
)
def test_epochs_done_counts_the_fraction(first, count, done):
    drawing = pytest.importorskip("keras_batchsize._report_plot")
    rows = [a_row(step) for step in range(first, first + count)]
    columns = {
        name: np.array([getattr(row, name) for row in rows])
        for name in ("epoch", "examples")
    }
    # The tenth of an epoch that the first row stands for is not seen where
    # the record starts within the run.
    assert drawing.epochs_done(columns)[-1] == pytest.approx(done, abs=0.1)


@pytest.mark.usefixtures("pyplot_stays_away")
def test_plot_refuses_an_unknown_axis():
    with pytest.raises(ValueError, match="Received: x='time'"):
        a_report().plot(x="time")


@pytest.mark.usefixtures("pyplot_stays_away")
def test_plot_refuses_an_empty_report():
    with pytest.raises(ValueError, match="Train for at least one step"):
        Report().plot()


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch):
    for name in [*sys.modules]:
        if name.split(".")[0] == "matplotlib":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(
        sys.modules, "keras_batchsize._report_plot", raising=False
    )
    with pytest.raises(
        ImportError, match=r'pip install "keras-batchsize\[plot\]"'
    ):
        a_report().plot()
