"""The plugin's routes, through TensorBoard's own application."""

import ast
import gzip
import json
import math
import pathlib
import re
import sys
import types

import comparing
import keras
import numpy as np
import pytest
from comparing import BASE
from comparing import SUPERBATCH
from comparing import dense
from comparing import regression
from tensorboard.backend import application
from tensorboard.backend.event_processing import data_provider
from tensorboard.backend.event_processing import plugin_event_multiplexer
from tensorboard.data import provider
from tensorboard.plugins import base_plugin
from tensorboard.summary.writer import event_file_writer
from werkzeug import test as werkzeug_test
from werkzeug import wrappers

import keras_batchsize as kb
from keras_batchsize.tensorboard import events
from keras_batchsize.tensorboard import plugin
from keras_batchsize.tensorboard import series
from keras_batchsize.tensorboard import tags

X, Y = regression(230)
EPOCHS = 3
PREFIX = "/data/plugin/batch_size"
STATIC = plugin._STATIC


def train(folder, epochs=EPOCHS, callbacks=()):
    """Trains; returns the report and Keras's history."""

    def regressor():
        model = dense()
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
        return model

    board = keras.callbacks.TensorBoard(folder)
    run = kb.AdaptiveTrainer(
        comparing.seeded(regressor),
        kb.policies.BatchSizeSchedule(lambda epoch: [8, 16, 32][epoch % 3]),
        superbatch_size=SUPERBATCH,
        max_batch_size=SUPERBATCH,
        measure_every=1,
        tensorboard=board,
        verbose=0,
    )
    history = run.fit(
        X,
        Y,
        batch_size=BASE,
        epochs=epochs,
        validation_data=(X[:50], Y[:50]),
        callbacks=[board, *callbacks],
        verbose=0,
    )
    return run.report, history.history


def client_for(folder):
    """Returns a client of TensorBoard with our plugin and Python's loader."""
    multiplexer = plugin_event_multiplexer.EventMultiplexer(
        tensor_size_guidance={"scalars": 1000}
    )
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    context = base_plugin.TBContext(
        data_provider=data_provider.MultiplexerDataProvider(
            multiplexer, str(folder)
        )
    )
    app = application.TensorBoardWSGI([plugin.BatchSizePlugin(context)])
    return werkzeug_test.Client(app, wrappers.Response)


def ask(client, route, **query):
    answer = client.get(f"{PREFIX}/{route}", query_string=query)
    assert answer.status_code == 200, answer.get_data(as_text=True)
    assert answer.mimetype == "application/json"
    return json.loads(answer.get_data())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    report, history = train(folder / "first")
    return client_for(folder), report, history


# What it tells.


def test_runs_are_listed_with_their_settings(trained):
    client, report, _ = trained

    [run] = ask(client, "runs")

    assert run["run"] == "first/batch_size"
    info = run["info"]
    assert info["finished"] is True
    assert info["examples"] == report.examples
    assert info["settings"]["base_batch_size"] == BASE


def test_a_run_is_the_report(trained):
    client, report, _ = trained

    run = ask(client, "run", name="first/batch_size")

    assert run["steps"] == [row.examples for row in report.rows]
    assert len(run["times"]) == len(run["steps"])
    for tag, name in (
        ("batch_size/global", "batch_size"),
        ("noise_scale/value", "noise_scale"),
        ("learning_rate/effective", "learning_rate"),
        ("progress/updates", "updates"),
    ):
        read = [math.nan if v is None else v for v in run["series"][tag]]
        rows = [getattr(row, name) for row in report.rows]
        np.testing.assert_allclose(read, rows, rtol=1e-6, err_msg=tag)
    shown = [
        (one["examples"], one["old_batch_size"], one["new_batch_size"])
        for one in run["changes"]
    ]
    assert shown == [
        (one.examples, one.old_batch_size, one.new_batch_size)
        for one in report.changes
    ]
    assert [one["reason"] for one in run["changes"]] == [
        one.reason for one in report.changes
    ]


def test_losses_stand_at_the_ends_of_the_epochs(trained):
    client, _, history = trained

    run = ask(client, "run", name="first/batch_size")

    ends = [(epoch + 1) * len(X) for epoch in range(EPOCHS)]
    for key, name in (("loss", "loss"), ("validation_loss", "val_loss")):
        steps, values = run[key]
        assert steps == ends
        np.testing.assert_allclose(values, history[name], rtol=1e-6)


@pytest.mark.parametrize("broken_off", [False, True])
def test_losses_of_another_training_in_the_folder_are_left_out(
    tmp_path, broken_off
):
    def interrupt(epoch, logs):
        if epoch == 2:
            raise KeyboardInterrupt

    if broken_off:
        ctrl_c = keras.callbacks.LambdaCallback(on_epoch_begin=interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, epochs=4, callbacks=[ctrl_c])
    else:
        train(tmp_path, epochs=2)
    train(tmp_path, epochs=3)
    client = client_for(tmp_path)

    assert [one["run"] for one in ask(client, "runs")] == [
        "batch_size",
        "batch_size_2",
    ]
    first = ask(client, "run", name="batch_size")
    second = ask(client, "run", name="batch_size_2")
    assert first["loss"][0] == [len(X), 2 * len(X)]
    # Keras began to count anew, in the same run: what it wrote first is
    # superseded, or older than the first of our points.
    assert second["loss"][0] == [len(X), 2 * len(X), 3 * len(X)]


def write_events(folder, *timed):
    writer = event_file_writer.EventFileWriter(str(folder))
    for step, wall_time, value in timed:
        writer.add_event(events.event(step, wall_time, [value]))
    writer.close()


@pytest.mark.parametrize("siblings", [0, 2])
def test_losses_after_a_training_that_was_killed_are_left_out(
    siblings, tmp_path
):
    # Begun at 10, 110 and 210 seconds; none of them said that it has ended.
    for index in range(1 + siblings):
        began = 10.0 + 100 * index
        name = f"batch_size_{index + 1}" if index else "batch_size"
        info = events.data(tags.INFO, {"began": began, "first_step": 1})
        size = events.scalar("batch_size/global", 8.0)
        point = 70, began + 1.0, size
        write_events(tmp_path / name, (1, began, info), point)
    # An epoch of each, with losses that tell which.
    losses = [
        (step, 12.0 + 100 * step, events.scalar("epoch_loss", float(step)))
        for step in range(3)
    ]
    write_events(tmp_path / "train", *losses)

    client = client_for(tmp_path)

    runs = [one["run"] for one in ask(client, "runs")]
    shown = [ask(client, "run", name=one)["loss"] for one in runs]
    if siblings:
        assert shown == [[[70], [0.0]], [[70], [1.0]], [[70], [2.0]]]
    else:
        assert shown == [[[70], [2.0]]]


def test_a_run_that_is_not_ours_is_not_found(trained):
    client, *_ = trained

    for query in ({}, {"name": "first/train"}, {"name": "../../etc"}):
        answer = client.get(f"{PREFIX}/run", query_string=query)
        assert answer.status_code == 404
        assert "Received: name=" in json.loads(answer.get_data())["error"]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    writer = event_file_writer.EventFileWriter(str(tmp_path / "batch_size"))
    values = {"noise_scale/value": math.nan, "noise_scale/upper": math.inf}
    for tag, value in {"batch_size/global": 8.0, **values}.items():
        writer.add_event(events.event(1, 1.0, [events.scalar(tag, value)]))
    writer.add_event(events.event(1, 1.0, [events.data(tags.INFO, {})]))
    writer.close()

    run = ask(client_for(tmp_path), "run", name="batch_size")

    assert run["series"]["noise_scale/value"] == [None]
    assert run["series"]["noise_scale/upper"] == [None]


# Folders that are empty, foreign or broken.


def test_an_empty_folder_has_no_runs(tmp_path):
    assert ask(client_for(tmp_path), "runs") == []


def test_runs_of_others_are_not_shown(tmp_path):
    writer = event_file_writer.EventFileWriter(str(tmp_path / "batch_size"))
    scalar = events.scalar("batch_size/global", 8.0)
    writer.add_event(events.event(1, 1.0, [scalar]))
    writer.close()

    client = client_for(tmp_path)

    assert ask(client, "runs") == []
    assert client.get(f"{PREFIX}/run?name=batch_size").status_code == 404


@pytest.mark.parametrize(
    "content",
    ["no JSON", "[1]", '"text"', '{"began": [], "first_step": "1"}', "{}"],
)
def test_data_of_an_unknown_form_are_left_out(tmp_path, content):
    writer = event_file_writer.EventFileWriter(str(tmp_path / "batch_size"))
    for tag in (tags.INFO, tags.CHANGE.format(5)):
        value = events.data(tag, {})
        value.tensor.string_val[0] = content.encode()
        writer.add_event(events.event(5, 1.0, [value]))
    writer.close()
    (tmp_path / "batch_size" / "events.out.tfevents.9").write_bytes(b"broken")

    client = client_for(tmp_path)

    [run] = ask(client, "runs")
    assert run["run"] == "batch_size"
    shown = ask(client, "run", name="batch_size")
    assert shown["changes"] == shown["steps"] == []


def test_a_change_that_a_resumed_training_did_not_repeat_is_dropped():
    # The Rust loader forgets points only where their tag is written again.
    def tensor(wall_time, **content):
        value = np.array([json.dumps(content).encode()], object)
        return provider.TensorDatum(content["examples"], wall_time, value)

    info = {"examples": 0, "settings": {}}
    tensors = {
        tags.INFO: [
            tensor(1.0, began=1.0, first_step=1, **info),
            tensor(9.0, began=5.0, first_step=101, **info),
        ],
        tags.CHANGE.format(50): [tensor(2.0, examples=50)],
        tags.CHANGE.format(150): [tensor(3.0, examples=150)],
        tags.CHANGE.format(170): [tensor(6.0, examples=170)],
    }
    stub = types.SimpleNamespace(
        list_tensors=lambda *_, **__: {"batch_size": {}},
        read_tensors=lambda *_, **__: {"batch_size": tensors},
        read_scalars=lambda *_, **__: {},
    )

    run = series.Reader(stub, None, "", 10).run("batch_size")

    assert [one["examples"] for one in run["changes"]] == [50, 170]


# The page.


@pytest.mark.parametrize("name", plugin._FILES)
@pytest.mark.parametrize("accepted", ["gzip, deflate", ""])
def test_files_are_served_as_they_are(trained, name, accepted):
    client, *_ = trained

    answer = client.get(
        f"{PREFIX}/{name}", headers={"Accept-Encoding": accepted}
    )

    assert answer.status_code == 200
    kind = "css" if name.endswith(".css") else "javascript"
    assert answer.mimetype == f"text/{kind}"
    content = answer.get_data()
    if "gzip" in accepted:
        assert answer.headers["Content-Encoding"] == "gzip"
        content = gzip.decompress(content)
    assert content == (STATIC / name).read_bytes()
    head = client.head(f"{PREFIX}/{name}")
    assert head.status_code == 200 and not head.get_data()


def test_every_file_that_the_page_asks_for_is_served():
    ours = [one for one in plugin._FILES if "uPlot" not in one]
    asked = {"index.js"}
    for name in ours:
        text = (STATIC / name).read_text(encoding="utf-8")
        asked |= set(re.findall(r'from "\./([\w.]+)"', text))
        asked |= set(re.findall(r'load(?:Style|Script)\("([\w.]+)"\)', text))
    assert asked == set(plugin._FILES)


def test_the_page_names_no_other_host():
    for name in plugin._FILES:
        text = (STATIC / name).read_text(encoding="utf-8")
        hosts = set(re.findall(r"https?://[\w.]+", text))
        # A namespace and a comment; nothing is fetched from there.
        assert hosts <= {"http://www.w3.org", "https://github.com"}, name


def test_tags_that_the_page_reads_are_written():
    for name in ("charts.js", "data.js", "tables.js"):
        text = (STATIC / name).read_text(encoding="utf-8")
        groups = {tag.split("/")[0] for tag in tags.SCALARS}
        named = re.findall(rf'"((?:{"|".join(groups)})/\w+)"', text)
        assert named, name
        assert set(named) <= set(tags.SCALARS), name


def test_the_chart_library_comes_with_its_licence():
    text = (STATIC / "uPlot.iife.min.js").read_text(encoding="utf-8")
    assert text.startswith("/*! https://github.com/leeoniya/uPlot (v1.6.32)")
    assert "MIT License" in (STATIC / "uPlot.LICENSE").read_text()


# The rule that keeps TensorBoard alive.


def test_the_plugin_imports_tensorboard_and_the_standard_library_only():
    allowed = {"tensorboard", *sys.stdlib_module_names}
    for module in (plugin, series, tags):
        source = pathlib.Path(module.__file__).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{a.name}" for a in node.names]
            for name in names:
                ours = name.startswith("keras_batchsize.tensorboard.")
                assert ours or name.split(".")[0] in allowed, name


def test_the_plugin_loads_where_there_is_nothing_else(run_python):
    # As TensorBoard loads it, in an environment without TensorFlow.
    script = """
import sys

blocked = ("tensorflow", "keras", "keras_tuner", "matplotlib", "pandas")
sys.modules.update(dict.fromkeys(blocked))

from keras_batchsize.tensorboard import plugin

metadata = plugin.BatchSizePlugin.frontend_metadata(None)
assert metadata.tab_name == "Batch size"
"""
    process = run_python("-c", script)
    assert process.returncode == 0, process.stderr
