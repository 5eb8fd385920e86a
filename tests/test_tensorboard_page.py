"""The tab in TensorBoard itself: its server, both loaders, a real browser.

The browser is Debian's Chromium (packages chromium, chromium-driver), driven
by selenium; where one of them is missing these tests are skipped.
"""

import configparser
import contextlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

import pytest
import tensorboard_data_server
import tensorflow as tf
from test_tensorboard_plugin import train

from keras_batchsize.tensorboard import events
from keras_batchsize.tensorboard import tags
from keras_batchsize.tensorboard.writer import RunWriter

ROOT = pathlib.Path(__file__).parents[1]
PATIENCE = 60.0  # Seconds; what is waited for takes a few.

NO_BROWSER = [
    name
    for name in ("chromium", "chromedriver")
    if shutil.which(name) is None
]
if importlib.util.find_spec("selenium") is None:
    NO_BROWSER.append("selenium")

# No request of its own leaves the machine, nor does it need a screen.
FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync
    --window-size=1400,1300
""".split()


def wait_for(condition, what):
    """Returns the condition's value as soon as it is true."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    pytest.fail(f"Waited for {PATIENCE:.0f} s in vain: {what}")


def installed(folder):
    """Makes a folder in which Python finds our entry points, as installed."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    points = config["options.entry_points"]["tensorboard_plugins"]
    package = folder / "keras_batchsize-0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Name: keras-batchsize\nVersion: 0\n")
    (package / "entry_points.txt").write_text(f"[tensorboard_plugins]{points}")
    return folder


@contextlib.contextmanager
def tensorboard(logs, site, *flags):
    """Runs TensorBoard on a folder; yields its address."""
    path = [str(ROOT), str(site), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tensorboard.main"),
            *("--logdir", str(logs), "--host", "127.0.0.1", "--port", "0"),
            *("--reload_interval", "1", *flags),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    # It may go on to write, and must not be held up by a full pipe.
    reader = threading.Thread(target=lambda: lines.extend(process.stderr))
    reader.start()
    try:
        found = wait_for(
            lambda: re.search(r"http://127[\d.:]+", "".join(lines)),
            "TensorBoard's address",
        )
        yield found.group()
    finally:
        process.terminate()
        process.wait(PATIENCE)
        reader.join()
        process.stderr.close()


def ask(address, route):
    url = f"{address}/data/plugin/batch_size/{route}"
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        return json.loads(answer.read())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return installed(tmp_path_factory.mktemp("site") / "packages")


LOADERS = {"rust": "--load_fast=true", "python": "--load_fast=false"}


def write(folder, first_step, steps, changes=(60, 70), finished=True):
    """Writes a part of a training that began after `first_step` - 1."""
    writer = RunWriter(folder, tf.io, "the same training", first_step)
    info = {"began": time.time(), "first_step": first_step}
    info |= {"closed": True, "finished": finished}
    writer.write(first_step, [events.data(tags.INFO, info)])
    for step in steps:
        values = {"batch_size/global": 8 + first_step, "progress/updates": step}
        writer.scalars(step, values, time.time())
        if step in changes:
            change = events.data(tags.CHANGE.format(step), {"examples": step})
            writer.write(step, [change])
    writer.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns a folder with three trainings, and the report of the first."""
    logs = tmp_path_factory.mktemp("logs")
    report, _ = train(logs / "adaptive")
    train(logs / "other", epochs=1)
    write(logs / "resumed", first_step=1, steps=[*range(10, 100, 10)])
    write(logs / "resumed", first_step=51, steps=[60, 70, 80], changes=[60])
    return logs, report


@pytest.fixture(scope="module", params=LOADERS)
def served(request, trained, site, tmp_path_factory):
    """Returns TensorBoard's address, a report and the folder of its logs."""
    server = tensorboard_data_server.server_binary()
    if request.param == "rust" and server is None:
        pytest.skip("tensorboard-data-server has no binary for this system.")
    logs = tmp_path_factory.mktemp("served") / "logs"
    shutil.copytree(trained[0], logs)
    with tensorboard(logs, site, LOADERS[request.param]) as address:
        wait_for(
            lambda: [one["info"].get("finished") for one in runs(address)]
            == [True, True, True],
            "all runs to be loaded",
        )
        yield address, trained[1], logs


def runs(address):
    return ask(address, "runs")


@pytest.mark.slow
def test_both_loaders_tell_what_the_report_does(served):
    address, report, _ = served

    name = urllib.parse.quote("adaptive/batch_size")
    run = ask(address, f"run?name={name}")

    assert run["steps"] == [row.examples for row in report.rows]
    sizes = run["series"]["batch_size/global"]
    assert sizes == [row.batch_size for row in report.rows]
    told = [(one["examples"], one["reason"]) for one in run["changes"]]
    assert told == [(one.examples, one.reason) for one in report.changes]
    ends = sorted({row.epoch: row.examples for row in report.rows}.values())
    assert run["loss"][0] == run["validation_loss"][0] == ends


def test_both_loaders_forget_what_a_resumed_training_repeats(served):
    # Broken off after 90 examples, resumed from those after 50: no zigzag,
    # and the change that did not happen again is forgotten.
    address, *_ = served

    run = ask(address, f"run?name={urllib.parse.quote('resumed/batch_size')}")

    assert run["steps"] == [10, 20, 30, 40, 50, 60, 70, 80]
    assert run["series"]["batch_size/global"] == [9.0] * 5 + [59.0] * 3
    assert [one["examples"] for one in run["changes"]] == [60]


# In the browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if NO_BROWSER:
        pytest.skip(f"Not installed: {', '.join(NO_BROWSER)}.")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    # Given by path: selenium would otherwise look for them in the net.
    options.binary_location = shutil.which("chromium")
    for flag in FLAGS:
        options.add_argument(flag)
    profile = tmp_path_factory.mktemp("profile")
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability(
        "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
    )
    driver = webdriver.Chrome(
        options=options, service=Service(shutil.which("chromedriver"))
    )
    driver.set_page_load_timeout(PATIENCE)
    yield driver
    driver.quit()


def open_tab(browser, address):
    """Opens our tab and goes into its frame."""
    browser.switch_to.default_content()
    browser.get("about:blank")  # Or only the part after # would change.
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(f"{address}/#batch_size")
    frame = wait_for(
        lambda: browser.find_elements("css selector", "iframe"), "the frame"
    )
    browser.switch_to.frame(frame[0])


def cells(browser, table):
    """Returns the texts of a table's body."""
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0] + ' tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.textContent))",
        table,
    )


# How many pixels of a chart have the colour of a run, give or take a little.
COUNT_PIXELS = """
const [card, run] = arguments;
const style = document.querySelectorAll("#overview .name i")[run].style;
const wanted = style.background.match(/\\d+/g).map(Number);
const canvas = document.querySelector(`#card-${card} canvas`);
const { width, height } = canvas;
const data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
let count = 0;
for (let i = 0; i < data.length; i += 4) {
  const near = wanted.every((one, k) => Math.abs(one - data[i + k]) < 24);
  count += near && data[i + 3] > 128;
}
return count;
"""


def coloured(browser, card, run):
    return browser.execute_script(COUNT_PIXELS, card, run)


def test_the_tab_shows_charts_and_the_changes_of_the_report(served, browser):
    address, report, _ = served

    open_tab(browser, address)
    wait_for(lambda: cells(browser, "#changes"), "the table of changes")

    shown = [row for row in cells(browser, "#changes") if row[0] == "adaptive"]
    assert [(row[2], row[3], row[-1]) for row in shown] == [
        (
            f"{one.examples:,}",
            f"{one.old_batch_size} → {one.new_batch_size}",
            one.reason,
        )
        for one in report.changes
    ]
    names = [row[0] for row in cells(browser, "#overview")]
    assert names == ["adaptive", "other", "resumed"]
    # Both runs are there, and drawn in their own colours. The second, of
    # one epoch, covers a third of the axis.
    for card in ("size", "rate", "speed", "loss"):
        first, second = (
            wait_for(
                lambda: coloured(browser, card, run),
                f"run {run} in the chart of {card}",
            )
            for run in (0, 1)
        )
        assert first > 50 and second > 5, card
    # Nothing was probed, so there is no chart of memory.
    memory = browser.find_element("id", "card-memory")
    assert not memory.is_displayed()


def test_nothing_is_amiss_and_nothing_leaves_the_machine(served, browser):
    address, *_ = served

    open_tab(browser, address)
    wait_for(lambda: cells(browser, "#changes"), "the table of changes")

    severe = [
        entry["message"]
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE"
    ]
    assert severe == []
    asked = set()
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = urllib.parse.urlsplit(message["params"]["request"]["url"])
            asked.add((url.scheme, url.netloc))
    # Chromium's own pages and inlined pictures are no requests.
    outside = {
        (scheme, host)
        for scheme, host in asked
        if scheme not in ("chrome", "data", "about", "blob")
    }
    assert outside == {("http", urllib.parse.urlsplit(address).netloc)}


def press(browser, card, *keys):
    browser.execute_script(
        "const plot = document.querySelector(`#card-${arguments[0]} .plot`);"
        "plot.focus();"
        "for (const key of arguments[1])"
        "  plot.dispatchEvent(new KeyboardEvent('keydown', {key}));",
        card,
        keys,
    )


def text_of(browser, selector):
    return browser.execute_script(
        "return document.querySelector(arguments[0])?.textContent", selector
    )


def test_axes_runs_theme_and_keyboard(served, browser):
    address, report, _ = served
    open_tab(browser, address)
    wait_for(lambda: cells(browser, "#changes"), "the table of changes")

    def axis_label():
        return browser.execute_script(
            "return document.querySelector('#card-size .plot')"
            ".getAttribute('aria-label')"
        )

    # A reader who sees nothing hears the values.
    wait_for(lambda: "examples." in axis_label(), "the description")
    press(browser, "size", "End")
    said = text_of(browser, "[aria-live]")
    assert f"adaptive: batch size {report.final_batch_size}" in said

    for axis in ("updates", "minutes", "examples"):
        browser.find_element("css selector", f"[value={axis}]").click()
        wait_for(lambda: f" {axis}." in axis_label(), f"the axis {axis}")

    # Zoomed in, there is a way back.
    button = browser.find_element("xpath", "//button[contains(., 'whole')]")
    assert not button.is_displayed()
    press(browser, "size", "Home", "+")
    wait_for(button.is_displayed, "the button that ends zooming")
    button.click()
    wait_for(lambda: not button.is_displayed(), "the whole training")

    box = browser.find_element(
        "css selector", "input[value='other/batch_size']"
    )
    box.click()
    wait_for(
        lambda: [row[0] for row in cells(browser, "#overview")]
        == ["adaptive", "resumed"],
        "one run less",
    )
    box.click()

    light = coloured(browser, "size", 0)
    browser.execute_script(
        "parent.document.body.classList.toggle('dark-mode')"
    )
    wait_for(
        lambda: browser.execute_script(
            "return getComputedStyle(document.body).backgroundColor"
        )
        == "rgb(30, 31, 34)",
        "the dark theme",
    )
    wait_for(lambda: coloured(browser, "size", 0) > light / 4, "dark lines")


def test_a_training_that_goes_on_is_followed(served, browser):
    address, _, logs = served
    open_tab(browser, address)
    wait_for(lambda: cells(browser, "#overview"), "the table of runs")
    before = len(cells(browser, "#overview"))

    # Another run appears by itself.
    train(logs / f"later{before}", epochs=2)

    wait_for(
        lambda: len(cells(browser, "#overview")) == before + 1, "the new run"
    )


def test_a_training_that_was_broken_off_has_stopped(site, browser, tmp_path):
    for name, finished in (("a", True), ("b", False)):
        write(tmp_path / name, 1, [10, 20], finished=finished)

    with tensorboard(tmp_path, site, "--load_fast=false") as address:
        open_tab(browser, address)
        wait_for(
            lambda: len(cells(browser, "#overview")) == 2, "the table of runs"
        )
        badges = browser.execute_script(
            "return [...document.querySelectorAll('#overview .badge')]"
            ".map(badge => badge.textContent)"
        )

    assert badges == ["finished", "stopped"]


def test_a_folder_without_runs_says_what_to_do(site, browser, tmp_path):
    (tmp_path / "events.out.tfevents.1.broken").write_bytes(b"no records")

    with tensorboard(tmp_path, site, "--load_fast=false") as address:
        open_tab(browser, address)
        text = wait_for(lambda: text_of(browser, ".empty"), "the advice")

    assert "No batch sizes here yet" in text
    assert 'tensorboard="logs"' in text
