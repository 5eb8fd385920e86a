"""What takes a process of its own: real allocators, XLA, replicas."""

import os
import pathlib

import pytest

SCRIPT = pathlib.Path(__file__).with_name("memory_in_process.py")
LIMIT = {
    "TF_CPU_ALLOCATOR_USE_BFC": "true",
    "TF_CPU_BFC_MEM_LIMIT_IN_MB": "150",
}


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("a_limit_is_kept", LIMIT),
        ("xla_fails_three_times", LIMIT),
        ("training_goes_on", LIMIT),
        ("replicas_are_left_as_they_were", {}),
    ],
)
def test_in_a_process(name, environment, run_python, monkeypatch):
    path = [str(SCRIPT.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    process = run_python(str(SCRIPT), name, timeout=280)
    assert process.returncode == 0, process.stderr[-4000:]
    assert process.stdout.endswith("KEPT\n")
