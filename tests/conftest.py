"""Every test starts from a quiet TensorFlow, known seeds and no leftovers."""

import collections
import os
import pathlib
import subprocess
import sys

import pytest

# Read once, when TensorFlow, Keras and matplotlib are imported, which the test
# modules do after this file.
os.environ.update(
    KERAS_BACKEND="tensorflow",
    MPLBACKEND="Agg",
    # TF32 rounds to 10 bits on a GPU; the tolerances are those of float32.
    NVIDIA_TF32_OVERRIDE="0",
    TF_CPP_MIN_LOG_LEVEL="2",
)

ROOT = pathlib.Path(__file__).parents[1]


def pytest_configure(config):
    """Registers what `pytest_collection_modifyitems` looks for."""
    config.addinivalue_line(
        "markers",
        "minutes(number): what a file takes on a slow core, if more than a "
        "few; only the order of the files depends on it",
    )


def pytest_collection_modifyitems(items):
    """Puts the files that take longest first, as far as that is known.

    With `--dist loadfile` each core takes the next file of this order when it
    has done one. A long one that came last would leave the other core idle, and
    the order of pytest-xdist, by the number of tests, puts those last that have
    few tests and long ones: hence `--no-loadscope-reorder`. Behind the files
    that say what they take come those with the most slow tests, then those with
    the most.
    """
    minutes, slow = {}, collections.Counter()
    all_of = collections.Counter(item.path for item in items)
    for item in items:
        stated = item.get_closest_marker("minutes")
        minutes[item.path] = stated.args[0] if stated else 0
        slow[item.path] += item.get_closest_marker("slow") is not None
    items.sort(
        key=lambda item: (
            -minutes[item.path],
            -slow[item.path],
            -all_of[item.path],
        )
    )


@pytest.fixture(autouse=True)
def no_trial_is_cheap(monkeypatch):
    """Which sizes a probe tries must not depend on how fast the machine is."""
    from keras_batchsize import size_search

    monkeypatch.setattr(size_search, "_CHEAP_SECONDS", 0.0)


@pytest.fixture(autouse=True)
def keras_session():
    """Seeds every test alike and takes away the global state it leaves.

    The tests of the pure rooms must not pay for importing TensorFlow, so
    nothing happens until another test has imported it. The garbage collection
    that `clear_session` offers takes longer than most tests.
    """
    if "keras" in sys.modules:
        sys.modules["keras"].utils.set_random_seed(0)
    yield
    if "keras" in sys.modules:
        sys.modules["keras"].utils.clear_session(free_memory=False)


@pytest.fixture(scope="session")
def run_python():
    """Runs a fresh interpreter, for tests about a whole process.

    It sees the package that stands beside the tests, wherever it runs. One that
    takes longer than `timeout` seconds is killed, and what it printed is
    returned: an exception would let each test that shares it wait again.
    """

    def run(*arguments, cwd=None, environment=(), timeout=300):
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            return subprocess.run(
                [sys.executable, *arguments],
                cwd=cwd,
                env={
                    **os.environ,
                    **dict(environment),
                    "PYTHONPATH": os.pathsep.join(path),
                },
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as late:
            # These are bytes, whatever was asked for.
            out, err = (
                (one or b"").decode(errors="replace")
                for one in (late.stdout, late.stderr)
            )
            return subprocess.CompletedProcess(
                late.cmd, None, out, f"{err}\nKilled after {timeout} seconds."
            )

    return run


@pytest.fixture
def graphs(monkeypatch):
    """The `UpdateGraphs` made during a test."""
    from keras_batchsize import _train_function_team as team

    made = []

    class Remembered(team.UpdateGraphs):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(team, "UpdateGraphs", Remembered)
    return made
