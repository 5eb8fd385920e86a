"""Several workers probe alike, or say at once that they do not.

Here there is one, which is told what another would tell it; two that probe
together are in `memory_in_workers.py`.
"""

import dataclasses
import json

import comparing
import pytest

import keras_batchsize as kb
from keras_batchsize import _memory_workers
from keras_batchsize import memory
from keras_batchsize import replicas
from keras_batchsize._memory_meters import AllocatorMeter
from keras_batchsize._memory_meters import Unmeasured
from keras_batchsize.batch_profile import BatchProfile
from keras_batchsize.batch_profile import ProfileRow
from keras_batchsize.workers import Workers

make = comparing.compiled(comparing.dense)

FOUND = BatchProfile([ProfileRow(4, 10, None, 0.1, True)], 4, "maximum")
SLOWER = BatchProfile([ProfileRow(4, 10, None, 0.2, True)], 4, "maximum")
LARGER = dataclasses.replace(FOUND, max_batch_size=8)


@pytest.fixture
def with_another(monkeypatch):
    """Returns a function that says what another worker is about to do."""

    def say(profile=None, **differences):
        class TwoWorkers(Workers):
            def __init__(self, strategy):
                self.number = 2

            def _told(self, text):
                own = json.loads(text)
                other = {name: differences.get(name, own[name]) for name in own}
                return [text, json.dumps(other)]

            def largest(self, values):
                others = _memory_workers.numbers_of(profile)
                return list(map(max, values, others))

        monkeypatch.setattr(replicas, "workers", lambda model: 2)
        monkeypatch.setattr(_memory_workers, "Workers", TwoWorkers)

    return say


@pytest.fixture
def probed(monkeypatch):
    """Returns the list of the probes that were made."""
    made = []
    monkeypatch.setattr(
        memory, "probe", lambda model, *_: made.append(model) or FOUND
    )
    return made


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("examples", "70", "48"),
        ("maximum", "32", "16"),
        ("start", "1", "2"),
        ("safety_margin", "0.05", "0.1"),
        ("time_budget", "60.0", "30.0"),
        ("accumulates", "False", "True"),
        ("cache", "False", "True"),
    ],
)
def test_what_differs_is_named_before_anything_is_probed(
    name, ours, theirs, with_another, probed
):
    with_another(**{name: theirs})
    model = make()
    told = f"Received: {name}={ours} on worker 0, {name}={theirs} on worker 1"
    with pytest.raises(ValueError, match=told):
        kb.find_max_batch_size(model, *comparing.regression(), maximum=32)
    assert not probed and not model.optimizer.built


def test_workers_must_measure_memory_in_one_way(
    with_another, probed, monkeypatch
):
    model = make()
    meter = AllocatorMeter(["CPU:0"])
    monkeypatch.setattr(_memory_workers, "meter_for", lambda _: meter)
    # A worker that cannot measure exchanges fewer numbers than the others.
    with_another(measured_by=repr(Unmeasured("CPU:0").name))
    told = "Received: measured_by='allocator statistics' on worker 0, measured"
    with pytest.raises(ValueError, match=told):
        kb.find_max_batch_size(model, *comparing.regression())
    # One measures a GPU, whose allocator has other holes.
    with_another(is_memory_of_the_host="False")
    told = "Received: is_memory_of_the_host=True on worker 0, is_m"
    with pytest.raises(ValueError, match=told):
        kb.find_max_batch_size(model, *comparing.regression())
    assert not probed


def test_workers_may_have_other_limits_of_memory(with_another, probed):
    with_another(memory_limit="1")
    profile = kb.find_max_batch_size(make(), *comparing.regression())
    assert profile == FOUND and len(probed) == 1


@pytest.mark.parametrize(
    ("theirs", "probes"),
    [(FOUND, False), (None, True), (LARGER, True), (SLOWER, True)],
)
def test_a_kept_profile_is_used_if_all_workers_have_it(
    theirs, probes, with_another, probed, tmp_path
):
    def find():
        data = comparing.regression()
        return kb.find_max_batch_size(model, *data, cache=tmp_path)

    model = make()
    find()
    with_another(theirs)
    find()
    assert len(probed) == 1 + probes


def test_a_worker_that_keeps_none_probes_with_the_others(
    with_another, probed, tmp_path
):
    with_another(FOUND)
    kb.find_max_batch_size(make(), *comparing.regression(), cache=tmp_path)
    assert len(probed) == 1


def test_callback_checks_that_workers_are_alike(with_another, probed):
    with_another(safety_margin="0.1")
    sizes = kb.DynamicBatchSize("fixed", initial_batch_size=8)
    with pytest.raises(ValueError, match="safety_margin=0.1 on worker 1"):
        make().fit(
            *comparing.regression(64),
            batch_size=32,
            verbose=0,
            callbacks=[sizes, kb.MemoryProbe()],
        )
    assert not probed
