"""What benchmarks and examples refuse, and what they tell."""

import importlib
import pathlib
import sys

import pytest
from comparing import compiled
from comparing import dense
from comparing import regression

ROOT = pathlib.Path(__file__).parents[1]
sys.path += [str(ROOT / folder) for folder in ("benchmarks", "examples")]
distributed_speed = importlib.import_module("distributed_speed")
fresh_processes = importlib.import_module("fresh_processes")
in_tensorboard = importlib.import_module("in_tensorboard")
memory_models = importlib.import_module("memory_models")
memory_probe = importlib.import_module("memory_probe")
speed = importlib.import_module("speed")


def run(program, monkeypatch, *arguments):
    """Runs a program in this process, as from the command line."""
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *arguments])
    program.main()


@pytest.mark.parametrize(
    ("program", "arguments", "constraint", "remedy"),
    [
        (speed, ["--epochs", "1"], "must be at least 2", "--epochs 2"),
        (
            *(distributed_speed, ["--epochs", "1"]),
            *("must be at least 2", "--epochs 2"),
        ),
        (
            *(in_tensorboard, ["--path", "mnist.npz"]),
            *("must come with --data mnist", "Add --data mnist"),
        ),
        (memory_probe, ["--models", "foo"], "invalid choice: 'foo'", "'mlp'"),
    ],
    ids=["speed", "distributed_speed", "in_tensorboard", "memory_probe"],
)
def test_impossible_arguments_are_refused(
    program, arguments, constraint, remedy, monkeypatch, capsys
):
    with pytest.raises(SystemExit) as caught:
        run(program, monkeypatch, *arguments)
    assert caught.value.code == 2
    text = " ".join(capsys.readouterr().err.split())
    assert constraint in text and remedy in text


@pytest.mark.parametrize(
    "arguments", [["--plot", "a.png"], ["--compare"]], ids=["plot", "compare"]
)
def test_a_process_that_dies_is_an_error(arguments, monkeypatch):
    died = fresh_processes.Outcome(None, 1.0, True)
    monkeypatch.setattr(fresh_processes, "call", lambda *_: died)
    with pytest.raises(SystemExit) as caught:
        run(memory_probe, monkeypatch, *arguments, "--limits", "50")
    # A text, which Python prints, and ends with 1.
    assert "died" in caught.value.code
    assert "Use --limits 100" in caught.value.code


@pytest.mark.parametrize("arrays", [False, True])
def test_probe_and_fit_are_given_the_same_data(arrays, monkeypatch):
    called = []
    monkeypatch.setattr(
        fresh_processes, "call", lambda *given: called.append(given)
    )
    line = memory_probe.timed("mlp", "float32", 50, arrays)
    (_, prepare, probe), (_, few, doubling) = called
    assert line.prepare is prepare and doubling is memory_probe.run_doubling
    assert (probe, line.fit, prepare.func) == (
        (
            memory_probe.run_probe_of_arrays,
            memory_probe.run_fit_of_arrays,
            memory_models.many,
        )
        if arrays
        else (
            memory_probe.run_probe,
            memory_probe.run_fit,
            memory_models.make,
        )
    )
    assert few.func is memory_models.make


# Of 70 examples: 1, 2, 5 and 9 steps in an epoch.
@pytest.mark.parametrize("size", [70, 40, 16, 8])
def test_five_steps_are_made_on_arrays(size):
    model = compiled(dense)()
    steps = memory_probe.run_fit_of_arrays(model, *regression(), size)
    assert steps == memory_probe.STEPS <= model.optimizer.iterations
