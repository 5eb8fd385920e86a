"""What the example and the benchmark of the search report."""

import importlib
import pathlib
import sys
import types

import keras_tuner
import numpy as np
import pytest

import keras_batchsize as kb

ROOT = pathlib.Path(__file__).parents[1]
sys.path.extend([str(ROOT / "benchmarks"), str(ROOT / "examples")])
tune = importlib.import_module("tune")
tuner_search = importlib.import_module("tuner_search")


def test_who_arrives_over_the_budget_has_not_arrived():
    scores = [None, 3.0, 19.9, 20.0, 20.1, 40.0]
    trials = [types.SimpleNamespace(score=one) for one in scores]
    assert tune.number_of_arrivals(trials, budget=20.0) == 2


def options(**values):
    known = {"model": "mlp", "policy": "fixed", "epochs": 1, "trials": 1}
    return types.SimpleNamespace(**{**known, **values})


def test_tuners_are_those_that_take_a_number_of_trials(monkeypatch, tmp_path):
    hypermodel = tuner_search.Plain(options(), 8)
    for name in tuner_search.TUNERS:
        tuner_search.make_tuner(options(tuner=name), hypermodel, 0, tmp_path)
    # Nothing to run: the options are looked at first.
    monkeypatch.setattr(tuner_search, "measure", lambda options: None)
    for wrong in (["--tuner", "Hyperband"], ["--policy", "largest"]):
        monkeypatch.setattr(sys, "argv", ["tuner_search.py", *wrong])
        with pytest.raises(SystemExit):
            tuner_search.main()


@pytest.mark.parametrize("policy", ["fixed", "measure", "noise_scale"])
def test_what_was_searched_is_trained_anew(policy, monkeypatch):
    given = options(policy=policy)
    wrapper = tuner_search.Wrapper(given, 8)
    hp = keras_tuner.HyperParameters()
    wrapper.space.declare(hp)
    trainings = []
    monkeypatch.setattr(
        tuner_search.kb,
        "fit",
        lambda model, *data, **arguments: trainings.append(arguments),
    )
    data = np.zeros((4, 8, 8), "float32"), np.zeros(4, "int32")
    tuner_search.anew(given, wrapper.setting(hp), data, data)
    assert len(trainings) == len(tuner_search.ANEW)
    for one in trainings:
        assert type(one["policy"]) is kb.policies.POLICIES[policy]
        assert one["batch_size"] == hp.get("batch_size/initial")
