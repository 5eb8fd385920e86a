"""What is written for TensorBoard, read back by TensorBoard's own readers."""

import copy
import importlib.util
import json
import math
import pathlib
import struct
import textwrap
import types
import warnings

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from comparing import BASE
from comparing import SUPERBATCH
from comparing import dense
from comparing import regression
from google.protobuf import json_format
from tensorboard.backend.event_processing import event_file_loader
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.util import tensor_util

import keras_batchsize as kb
from keras_batchsize.batch_profile import BatchProfile
from keras_batchsize.batch_profile import ProfileRow
from keras_batchsize.tensorboard import hparams
from keras_batchsize.tensorboard import layout
from keras_batchsize.tensorboard import pictures
from keras_batchsize.tensorboard import tags
from keras_batchsize.tensorboard.writer import RunWriter

ROOT = pathlib.Path(__file__).parents[1]

X, Y = regression(230)
EPOCHS = 3
PER_EPOCH = math.ceil(len(X) / SUPERBATCH)

# The names that issue and README promise.
PROMISED = """
batch_size/global batch_size/micro batch_size/accumulation_steps
batch_size/maximum noise_scale/value noise_scale/lower noise_scale/upper
gradient/squared_norm gradient/variance learning_rate/effective
learning_rate/base learning_rate/factor throughput/examples_per_second
throughput/goodput memory/peak_bytes memory/limit_bytes progress/updates
progress/epoch
""".split()

KEEP_ALL = {name: 0 for name in ("scalars", "tensors", "images")}


def regressor():
    model = dense()
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    return model


def growing():
    sizes = [8, 16, 32, 64]
    return kb.policies.BatchSizeSchedule(lambda epoch: sizes[min(epoch, 3)])


def dynamic(**options):
    return kb.DynamicBatchSize(
        growing(),
        initial_batch_size=BASE,
        max_batch_size=2 * SUPERBATCH,
        measure_every=1,
        **options,
    )


def fit(callbacks, model=None, **arguments):
    """Trains by plain `fit` with our callbacks; returns the model."""
    model = model or comparing.seeded(regressor)
    settings = {"epochs": EPOCHS, "shuffle": False, "verbose": 0}
    model.fit(
        X, Y, SUPERBATCH, callbacks=callbacks, **{**settings, **arguments}
    )
    return model


def trainer(folder, model=None, policy=None, **options):
    return kb.AdaptiveTrainer(
        model or comparing.seeded(regressor),
        policy or growing(),
        superbatch_size=SUPERBATCH,
        max_batch_size=2 * SUPERBATCH,
        measure_every=1,
        tensorboard=folder,
        verbose=0,
        **options,
    )


def train(run, **arguments):
    settings = {"batch_size": BASE, "epochs": EPOCHS, "verbose": 0}
    return run.fit(X, Y, **{**settings, **arguments})


class Run:
    """A run as TensorBoard's Python loader reads it, nothing sampled."""

    def __init__(self, folder):
        self._reader = plugin_event_accumulator.EventAccumulator(
            str(folder), size_guidance=KEEP_ALL
        )
        self._reader.Reload()

    @property
    def tags(self):
        return set(self._reader.Tags()["tensors"])

    def scalars(self, tag):
        """Returns (steps, values)."""
        events = self._reader.Tensors(tag)
        values = [
            float(tensor_util.make_ndarray(event.tensor_proto))
            for event in events
        ]
        return [event.step for event in events], values

    def strings(self, tag):
        """Returns the strings of each event of a tag."""
        return [
            [part.decode() for part in event.tensor_proto.string_val]
            for event in self._reader.Tensors(tag)
        ]

    def plugin(self, name):
        """Returns the tags of a plugin."""
        return set(self._reader.PluginTagToContent(name))


def raw_events(folder):
    """Yields the events of all files of a run, as they were written."""
    for path in sorted(folder.iterdir()):
        yield from event_file_loader.LegacyEventFileLoader(str(path)).Load()


def columns(report):
    return {
        name: [getattr(row, name) for row in report.rows]
        for name in vars(report.rows[0])
    }


# What is written.


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A training, and the folder of the run that it has written."""
    folder = tmp_path_factory.mktemp("logs")
    run = trainer(folder)
    train(run)
    return run, folder / "batch_size"


AS_REPORTED = {
    "batch_size/global": "batch_size",
    "batch_size/micro": "micro_batch_size",
    "batch_size/accumulation_steps": "accumulation_steps",
    "noise_scale/value": "noise_scale",
    "noise_scale/lower": "noise_lower",
    "noise_scale/upper": "noise_upper",
    "learning_rate/effective": "learning_rate",
    "learning_rate/base": "base_learning_rate",
    "learning_rate/factor": "learning_rate_factor",
    "throughput/examples_per_second": "examples_per_second",
    "throughput/goodput": "goodput",
    "progress/updates": "updates",
    "progress/seconds": "seconds",
    "progress/loss": "loss",
}


def test_scalars_are_the_rows_of_the_report(written):
    run, folder = written
    rows, read = columns(run.report), Run(folder)

    for tag, name in AS_REPORTED.items():
        steps, values = read.scalars(tag)
        assert steps == rows["examples"], tag
        # TensorBoard keeps float32.
        np.testing.assert_allclose(values, rows[name], rtol=1e-6, err_msg=tag)
    _, sizes = read.scalars("batch_size/global")
    assert sorted(set(sizes)) == [8, 16, 32]
    assert set(read.scalars("batch_size/maximum")[1]) == {2 * SUPERBATCH}


def test_every_promised_tag_is_described_and_none_is_missing(written):
    assert set(PROMISED) <= set(tags.SCALARS)
    _, folder = written
    read = Run(folder)

    written = read.plugin("scalars")
    # Without a probe nothing is known of memory.
    unknown = {tag for tag in tags.SCALARS if tag.startswith("memory/")}
    assert written == set(tags.SCALARS) - unknown
    described = {
        value.tag: value.metadata.summary_description
        for event in raw_events(folder)
        for value in event.summary.value
        if value.metadata.summary_description
    }
    assert described == {tag: tags.SCALARS[tag] for tag in written}


def test_an_event_holds_all_that_a_superbatch_taught(written):
    _, folder = written

    events = [
        {value.tag for value in event.summary.value}
        for event in raw_events(folder)
        if any(v.HasField("simple_value") for v in event.summary.value)
    ]
    assert len(events) == EPOCHS * PER_EPOCH
    assert all(one == events[0] for one in events)


def test_epochs_are_written_with_their_fraction(written):
    _, folder = written

    _, epochs = Run(folder).scalars("progress/epoch")
    expected = (1 + np.arange(EPOCHS * PER_EPOCH)) / PER_EPOCH
    np.testing.assert_allclose(epochs, expected, rtol=1e-6)


def test_changes_are_written_with_their_reasons(written):
    run, folder = written
    read, changes = Run(folder), run.report.changes
    assert [one.new_batch_size for one in changes] == [16, 32]

    lines = [one for [one] in read.strings(tags.TEXT_CHANGE)]
    [table] = read.strings(tags.TEXT_CHANGES)[-1]
    for line, change in zip(lines, changes, strict=True):
        sizes = f"{change.old_batch_size} → {change.new_batch_size}"
        for text in (line, table):
            assert sizes in text
            assert change.reason in text

    for change in changes:
        tag = tags.CHANGE.format(change.examples)
        data = json.loads(read.strings(tag)[-1][0])
        for name, value in vars(change).items():
            if name == "observed_speedup":
                # What is known at the end, give or take 2 %.
                assert data[name] == pytest.approx(value, rel=0.021)
            elif isinstance(value, float) and not math.isfinite(value):
                assert data[name] is None
            else:
                assert data[name] == value


def test_settings_are_written_as_text_and_for_the_page(written):
    run, folder = written
    read = Run(folder)

    [[text]] = read.strings(tags.TEXT_SETTINGS)
    assert "| base batch size | `8` |" in text
    info = json.loads(read.strings(tags.INFO)[-1][0])
    assert info["finished"] is True
    assert info["examples"] == EPOCHS * len(X)
    assert info["base_updates"] == run.report.base_updates
    known = info["settings"]
    assert known["policy"] == run.report.settings["policy"]
    assert known["max_batch_size"] == 2 * SUPERBATCH


def test_the_layout_names_tags_that_exist(written):
    _, folder = written

    tensor = Run(folder)._reader.Tensors(
        "custom_scalars__config__"
    )[-1].tensor_proto
    read = layout_pb2.Layout.FromString(tensor.string_val[0])
    assert read == layout.make()
    named = {
        tag
        for charts in layout.CHARTS.values()
        for listed in charts.values()
        for tag in (listed.values() if isinstance(listed, dict) else listed)
    }
    assert named <= set(tags.SCALARS)


def test_each_scalar_is_in_the_docs():
    page = (ROOT / "docs" / "tensorboard.md").read_text(encoding="utf-8")
    listed = [line for line in page.splitlines() if line.startswith("| `")]
    assert listed == [
        f"| `{tag}` | {meaning} |" for tag, meaning in tags.SCALARS.items()
    ]


def test_the_probe_is_shown_as_table_picture_and_memory(tmp_path):
    rows = [
        ProfileRow(size, 10**6 * size, None, 1e-3 * size, fits)
        for size, fits in ((8, True), (32, True), (64, False))
    ]
    profile = BatchProfile(rows, 32, "memory", 64e6, usable_bytes=32e6)

    class Probed(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            controller = self.model.train_function.controller
            if controller.profile is None:
                controller.expect(profile)

    fit([dynamic(), kb.BatchSizeTensorBoard(tmp_path), Probed()])

    read = Run(tmp_path / "batch_size")
    [[table]] = read.strings(tags.TEXT_PROBE)
    assert "| 32 | 32.0 | – | 32 | 1,000 | yes |" in table
    assert "| 64 | 64.0 | – | 64 | 1,000 | **no** |" in table
    assert "Largest batch size: **32**. Memory limit: 64.0 MB" in table
    peaks = read.scalars("memory/peak_bytes")[1]
    micro = read.scalars("batch_size/micro")[1]
    # 16 was not probed; it lies on the line between 8 and 32.
    assert set(micro) == {8, 16, 32}
    assert peaks == [10**6 * size for size in micro]
    assert set(read.scalars("memory/limit_bytes")[1]) == {64e6}
    if importlib.util.find_spec("matplotlib"):
        assert tags.IMAGE_PROBE in read.plugin("images")


def test_a_picture_that_cannot_be_drawn_ends_no_training(tmp_path):
    class Undrawable(BatchProfile):
        def plot(self, to_file=None):
            raise ValueError("no such colour")

    rows = [ProfileRow(8, 2**20, None, 1e-3, True)]

    class Probed(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            controller = self.model.train_function.controller
            if controller.profile is None:
                controller.expect(Undrawable(rows, 8, "memory"))

    with pytest.warns(RuntimeWarning, match="no such colour.*goes on"):
        fit([dynamic(), kb.BatchSizeTensorBoard(tmp_path), Probed()])

    read = Run(tmp_path / "batch_size")
    assert len(read.strings(tags.TEXT_PROBE)) == 1
    # What comes after it is there, too.
    assert len(read.scalars("memory/peak_bytes")[1]) > 1


def hparams_of(folder):
    """Returns the settings that TensorBoard's own parser reads."""
    starts = [
        hparams_metadata.parse_session_start_info_plugin_data(
            value.metadata.plugin_data.content
        )
        for event in raw_events(folder)
        for value in event.summary.value
        if value.tag == hparams_metadata.SESSION_START_INFO_TAG
    ]
    return [
        {name: json_format.MessageToDict(v) for name, v in one.hparams.items()}
        for one in starts
    ]


def test_hparams_are_written_where_asked_for(tmp_path):
    fit([dynamic(), kb.BatchSizeTensorBoard(tmp_path / "not")], epochs=1)
    asked = kb.BatchSizeTensorBoard(tmp_path / "asked", hparams=True)
    fit([dynamic(), asked], epochs=1)

    assert hparams_of(tmp_path / "not" / "batch_size") == []
    [settings] = hparams_of(tmp_path / "asked" / "batch_size")
    assert settings["base_batch_size"] == BASE
    assert settings["policy"].startswith("BatchSizeSchedule")
    assert set(hparams.METRICS) <= set(tags.SCALARS)


def test_hparams_are_left_to_kerastuner_where_it_writes_them(tmp_path):
    board = keras.callbacks.TensorBoard(tmp_path)
    ours = kb.BatchSizeTensorBoard(tensorboard=board, hparams=True)
    # As KerasTuner names the folder of an execution.
    board.log_dir = str(tmp_path / "0" / "execution0")

    fit([dynamic(), board, ours], epochs=1)

    assert hparams_of(tmp_path / "0" / "execution0" / "batch_size") == []


def test_goodput_is_drawn_once_it_is_known(written):
    pytest.importorskip("matplotlib")
    run, folder = written
    assert run.noise_scale.resolved

    read = Run(folder)
    assert read.plugin("images") == {tags.IMAGE_GOODPUT}
    tensor = read._reader.Tensors(tags.IMAGE_GOODPUT)[-1].tensor_proto
    width, height, png = tensor.string_val
    # A PNG file tells its size at bytes 16 to 24.
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", png[16:24]) == (int(width), int(height))


def test_goodput_is_drawn_as_decisions_see_it(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures, png = [], pictures.png
    monkeypatch.setattr(
        pictures, "png", lambda figure: figures.append(figure) or png(figure)
    )
    # The rate is meant for another size than the first.
    scaling = kb.LearningRateScaling("linear", 2 * BASE)
    fit([dynamic(), scaling, kb.BatchSizeTensorBoard(tmp_path)])

    read = Run(tmp_path / "batch_size")
    expected = read.scalars("throughput/goodput")[1][-1]
    _, curve, now = figures[-1].axes[0].lines[:3]
    [size], [value] = now.get_data()
    assert size == read.scalars("batch_size/global")[1][-1]
    assert value == pytest.approx(expected, rel=1e-6)
    # Straight lines between its points leave it by less than that.
    assert np.interp(size, *curve.get_data()) == pytest.approx(value, rel=1e-2)


# Beside Keras's own callback.


def keras_events(folder):
    """Returns {tag: steps} of what Keras has written."""
    read = Run(folder / "train")
    return {tag: read.scalars(tag)[0] for tag in read.plugin("scalars")}


@pytest.mark.parametrize("update_freq", ["epoch", 3])
def test_it_stands_beside_keras_in_any_order(tmp_path, update_freq):
    def board(folder):
        return keras.callbacks.TensorBoard(folder, update_freq=update_freq)

    fit([dynamic(), board(tmp_path / "alone")])
    expected = keras_events(tmp_path / "alone")

    for order in ((0, 1, 2), (2, 1, 0)):
        folder = tmp_path / "".join(map(str, order))
        theirs = board(folder)
        three = [kb.BatchSizeTensorBoard(tensorboard=theirs), theirs, dynamic()]
        fit([three[index] for index in order])

        steps, _ = Run(folder / "batch_size").scalars("batch_size/global")
        assert len(steps) == EPOCHS * PER_EPOCH
        # DynamicBatchSize first: its epoch logs reach Keras's callback.
        ours = {"epoch_batch_size", "epoch_noise_scale"}
        ours.add("epoch_examples_per_second")
        found = keras_events(folder)
        assert {t: found[t] for t in found if t not in ours} == {
            t: expected[t] for t in expected if t not in ours
        }


def test_the_static_rule_is_shown_too(tmp_path):
    scaling = kb.LearningRateScaling(
        "linear", base_batch_size=BASE, batch_size=SUPERBATCH
    )
    fit([kb.BatchSizeTensorBoard(tmp_path), scaling])

    read = Run(tmp_path / "batch_size")
    assert set(read.scalars("batch_size/global")[1]) == {SUPERBATCH}
    assert set(read.scalars("learning_rate/factor")[1]) == {4.0}
    # Nothing is measured, so nothing is said about noise.
    assert "noise_scale/value" not in read.tags


# Whose run it is.


def test_a_second_fit_of_a_trainer_goes_on_in_its_run(tmp_path):
    run = trainer(tmp_path)
    train(run)
    train(run, epochs=1)

    assert [one.name for one in tmp_path.iterdir()] == ["batch_size"]
    read = Run(tmp_path / "batch_size")
    steps, _ = read.scalars("batch_size/global")
    assert len(steps) == (EPOCHS + 1) * PER_EPOCH
    assert steps == sorted(set(steps))
    _, seconds = read.scalars("progress/seconds")
    assert seconds == sorted(seconds)


def test_another_training_in_the_same_folder_stays_apart(tmp_path):
    fit([dynamic(), kb.BatchSizeTensorBoard(tmp_path)], epochs=1)
    before = Run(tmp_path / "batch_size").scalars("batch_size/global")
    train(trainer(tmp_path))
    # The same callbacks again: the clock starts anew, so it is another one.
    again = [dynamic(), kb.BatchSizeTensorBoard(tmp_path)]
    fit(again, epochs=1)
    fit(again, epochs=1)

    names = {one.name for one in tmp_path.iterdir()}
    assert names == {"batch_size", *(f"batch_size_{i}" for i in (2, 3, 4))}
    assert Run(tmp_path / "batch_size").scalars("batch_size/global") == before
    for name in names:
        steps, _ = Run(tmp_path / name).scalars("progress/updates")
        assert steps == sorted(set(steps))


def test_of_two_that_begin_at_once_each_gets_a_run(tmp_path):
    # The other one makes the folder between our look and our attempt.
    class Late:
        def __getattr__(self, name):
            return getattr(tf.io.gfile, name)

        def exists(self, path):
            found = tf.io.gfile.exists(path)
            if path.endswith("batch_size") and not found:
                tf.io.gfile.mkdir(path)
            return found

    io = types.SimpleNamespace(
        gfile=Late(), TFRecordWriter=tf.io.TFRecordWriter
    )
    writer = RunWriter(tmp_path, io, "ours")
    writer.scalars(1, {"batch_size/global": 8.0}, 1.0)
    writer.close()

    assert writer.folder == str(tmp_path / "batch_size_2")
    assert not list((tmp_path / "batch_size").iterdir())


class Interrupts(keras.callbacks.Callback):
    """Presses Ctrl-C in an epoch."""

    def __init__(self, epoch, batch):
        super().__init__()
        self.at = epoch, batch
        self._epoch = None

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self._epoch, batch) == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("by_trainer", [True, False])
def test_a_resumed_training_runs_on_without_a_zigzag(tmp_path, by_trainer):
    logs, backup = tmp_path / "logs", tmp_path / "backup"

    def run(*callbacks):
        if by_trainer:
            one = trainer(logs, backup_dir=backup)
            train(one, epochs=4, callbacks=[*callbacks])
            return
        ours = [kb.BatchSizeTensorBoard(logs), kb.BackupAndRestore(backup)]
        fit([*ours, dynamic(), *callbacks], epochs=4)

    with pytest.raises(KeyboardInterrupt):
        run(Interrupts(2, 4))
    run()

    assert [one.name for one in logs.iterdir()] == ["batch_size"]
    assert len(list((logs / "batch_size").iterdir())) == 2
    read = Run(logs / "batch_size")
    steps, updates = read.scalars("progress/updates")
    assert len(steps) == 4 * PER_EPOCH
    assert steps == sorted(set(steps))
    assert updates == sorted(updates)
    _, seconds = read.scalars("progress/seconds")
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("first", ["board", "backup"])
def test_the_first_backup_knows_the_run_in_any_order(tmp_path, first):
    logs = tmp_path / "logs"

    def run(*callbacks):
        ours = {
            "board": kb.BatchSizeTensorBoard(logs),
            "backup": kb.BackupAndRestore(tmp_path / "backup"),
        }
        order = sorted(ours, key=lambda name: name != first)
        fit([*(ours[name] for name in order), dynamic(), *callbacks])

    with pytest.raises(KeyboardInterrupt):
        run(Interrupts(1, 4))
    run()

    assert [one.name for one in logs.iterdir()] == ["batch_size"]
    steps, _ = Run(logs / "batch_size").scalars("progress/updates")
    assert len(steps) == EPOCHS * PER_EPOCH


@pytest.mark.parametrize("by_trainer", [True, False])
def test_only_a_training_that_was_not_broken_off_has_finished(
    tmp_path, by_trainer
):
    logs, backup = tmp_path / "logs", tmp_path / "backup"
    board = kb.BatchSizeTensorBoard(logs, hparams=True)

    def run(*callbacks):
        if by_trainer:
            one = trainer(logs, backup_dir=backup)
            one.tensorboard = board
            train(one, callbacks=[*callbacks])
            return
        fit([board, kb.BackupAndRestore(backup), dynamic(), *callbacks])

    def ends():
        """Whether it was closed, has finished, and is so in "HParams"."""
        read = Run(logs / "batch_size")
        info = json.loads(read.strings(tags.INFO)[-1][0])
        has_end = hparams_metadata.SESSION_END_INFO_TAG in read.tags
        return info.get("closed"), info["finished"], has_end

    with pytest.raises(KeyboardInterrupt):
        run(Interrupts(1, 4))
    board.close()
    assert ends() == (True, False, False)
    run()
    assert ends() == (True, True, True)


def test_a_second_fit_that_is_resumed_goes_on_in_the_run(tmp_path):
    logs, backup = tmp_path / "logs", tmp_path / "backup"
    first = trainer(logs)
    train(first, epochs=1)
    first.backup_dir = backup
    with pytest.raises(KeyboardInterrupt):
        train(first, epochs=2, callbacks=[Interrupts(1, 4)])

    train(trainer(logs, backup_dir=backup), epochs=2)

    read = Run(logs / "batch_size")
    for tag in ("progress/updates", "progress/seconds"):
        steps, values = read.scalars(tag)
        assert len(steps) == 3 * PER_EPOCH
        assert steps == sorted(set(steps))
        assert values == sorted(values), tag


def test_copies_write_runs_of_their_own(tmp_path):
    first = [dynamic(), kb.BatchSizeTensorBoard(tmp_path)]
    before = copy.deepcopy(first)
    fit(first)
    after = copy.deepcopy(first)
    fit(before)
    fit(after)

    assert len(list(tmp_path.iterdir())) == 3


def test_a_copy_follows_the_folder_of_the_callback_copied_with_it(tmp_path):
    # What KerasTuner does for each trial.
    board = keras.callbacks.TensorBoard(tmp_path / "given")
    callbacks = [board, dynamic(), kb.BatchSizeTensorBoard(tensorboard=board)]
    copies = copy.deepcopy(callbacks)
    copies[0].log_dir = str(tmp_path / "trial")

    fit(copies)

    assert {one.name for one in tmp_path.iterdir()} == {"trial"}
    names = {one.name for one in (tmp_path / "trial").iterdir()}
    assert {"batch_size", "train"} <= names


def test_only_the_chief_writes(tmp_path, monkeypatch):
    model = comparing.seeded(regressor)
    extended = type(model.distribute_strategy.extended)
    monkeypatch.setattr(extended, "should_save_summary", False)

    fit([dynamic(), kb.BatchSizeTensorBoard(tmp_path)], model)

    assert not list(tmp_path.iterdir())


# Bad input, bad places.


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, ValueError, "Received: log_dir=None"),
        ({"log_dir": 3}, TypeError, "Received: log_dir=3"),
        ({"tensorboard": "logs"}, TypeError, "Received: tensorboard='logs'"),
    ],
)
def test_arguments_are_checked(arguments, error, text):
    with pytest.raises(error, match=text):
        kb.BatchSizeTensorBoard(**arguments)


def test_the_trainer_checks_its_folder():
    with pytest.raises(TypeError, match="Received: log_dir=True"):
        trainer(True)


@pytest.mark.parametrize("of_keras", [True, False])
def test_the_empty_path_is_the_present_folder(tmp_path, monkeypatch, of_keras):
    monkeypatch.chdir(tmp_path)
    board = kb.BatchSizeTensorBoard("")
    if of_keras:
        theirs = keras.callbacks.TensorBoard("")
        board = kb.BatchSizeTensorBoard(tensorboard=theirs)

    fit([dynamic(), board], epochs=1)

    assert [one.name for one in tmp_path.iterdir()] == ["batch_size"]


def test_a_fit_that_nobody_decides_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Add kb.DynamicBatchSize"):
        fit([kb.BatchSizeTensorBoard(tmp_path)])


def test_a_folder_that_cannot_be_made_costs_one_warning(tmp_path):
    (tmp_path / "file").write_text("no folder")
    expected = fit([dynamic()])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        board = kb.BatchSizeTensorBoard(tmp_path / "file" / "logs")
        model = fit([board, dynamic()])

    [warning] = [w for w in caught if "TensorBoard" in str(w.message)]
    assert "Training goes on" in str(warning.message)
    ours = comparing.variables_of(model).values()
    theirs = comparing.variables_of(expected).values()
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_full_disk_costs_one_warning(tmp_path, run_python):
    # The operating system refuses to let any file grow beyond 20 kB.
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import resource
        import sys
        import warnings

        sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
        import test_tensorboard as tests

        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = tests.trainer({str(tmp_path / "logs")!r})
            history = tests.train(run, epochs=12)
        texts = [str(w.message) for w in caught]
        ours = [text for text in texts if "TensorBoard will not" in text]
        assert len(ours) == 1, texts
        assert len(history.epoch) == 12
        """)
    )
    process = run_python(str(script))
    assert process.returncode == 0, process.stderr
    # What was written before is not lost.
    steps, _ = Run(tmp_path / "logs" / "batch_size").scalars("progress/epoch")
    assert len(steps) > 8
