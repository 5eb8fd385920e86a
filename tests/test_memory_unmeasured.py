"""What bounds a probe whose trials tell no peak: what tensors take."""

import math
import warnings

import comparing
import keras
import pytest
import tensorflow as tf
from comparing import compiled
from comparing import dense
from fake_memory import MB
from fake_memory import FakeMeter
from fake_memory import make_dense
from fake_memory import probe

from keras_batchsize import memory
from keras_batchsize import size_search
from keras_batchsize._memory_examples import Examples
from keras_batchsize._memory_meters import Unmeasured
from keras_batchsize._memory_workload import Workload

# More examples than any limit here leaves room for.
MANY = 10**7


def unmeasured(limit=None, **arguments):
    return FakeMeter(limit, slope=0, measures=False, **arguments)


def by_the_graph(make=make_dense):
    """Returns the bytes of the variables, and what an example may take."""
    examples = Examples(tuple(map(tf.constant, comparing.regression(16))))
    with Workload(make(), examples, unmeasured(), True) as workload:
        return workload.resident_bytes, workload.growth


def test_what_an_example_takes_is_a_little_more_than_its_tensors():
    """The oracle of the tests below, by hand: 5 numbers in, 6 hidden, 1 out."""
    _, (each,) = by_the_graph()
    example, hidden, out, loss = comparing.FEATURES + 1, 6, 1, 2
    # A dense layer multiplies and adds; one has an activation. The loss is of a
    # difference and its square.
    forward = example + 3 * hidden + 2 * out + loss
    # The largest twice for the way back; three batches wait, one is trained on.
    least = 4 * (forward + 2 * hidden + 4 * example)
    # Graphs also take the mean over the one output, and name it once more.
    assert least <= each <= least + 4 * 2 * out


@pytest.mark.parametrize(
    ("own", "given", "used", "reason"),
    [
        (None, 1 * MB, 1 * MB, "memory"),
        (1 * MB, None, 1 * MB, "memory"),
        (2 * MB, 1 * MB, 1 * MB, "memory"),
        (1 * MB, 2 * MB, 1 * MB, "memory"),
    ],
)
def test_a_limit_holds_where_nothing_is_measured(own, given, used, reason):
    resident, (each,) = by_the_graph()
    profile = probe(
        unmeasured(own), count=MANY, memory_limit=given, safety_margin=0.1
    )
    most = (0.9 * used - resident) / each
    assert math.floor(most) - 1 <= profile.max_batch_size <= most
    assert profile.reason == reason
    assert profile.memory_limit == pytest.approx(used, abs=1)
    assert profile.usable_bytes is None
    assert "not measured" in str(profile)
    assert not profile.ended_early


def test_the_memory_of_the_host_holds_where_nothing_is_measured(monkeypatch):
    meter = Unmeasured("CPU:0")
    monkeypatch.setattr(
        "keras_batchsize._memory_host.available_bytes", lambda: 2 * MB
    )
    resident, (each,) = by_the_graph()
    examples = Examples(tuple(map(tf.constant, comparing.regression(16))))
    limits = memory.Limits(safety_margin=0.1, time_budget=math.inf)
    profile = memory.probe(make_dense(), examples, limits, True, meter)
    most = (0.9 * (1 * MB + resident) - resident) / each
    assert math.floor(most) - 1 <= profile.max_batch_size <= most
    assert profile.reason == "host memory"


@pytest.mark.parametrize(
    ("limits", "reason", "size"),
    [({"maximum": 40}, "maximum", 40), ({"count": 50}, "dataset", 50)],
)
def test_what_ends_a_probe_before_memory_is_said(limits, reason, size):
    profile = probe(unmeasured(), memory_limit=1 * MB, **limits)
    assert (profile.reason, profile.max_batch_size) == (reason, size)


def test_data_and_variables_count():
    meter = unmeasured(1 * MB)
    meter.is_shared = True
    resident, (each,) = by_the_graph()
    profile = probe(meter, count=MANY, data_bytes=300_000, safety_margin=0.1)
    most = (0.9 * MB - 300_000 - resident) / each
    assert math.floor(most) - 1 <= profile.max_batch_size <= most
    with pytest.raises(ValueError, match="(?s)weights.* alone take"):
        probe(meter, data_bytes=950_000)


def test_where_no_example_fits_nothing_is_run():
    resident, (each,) = by_the_graph()
    meter = unmeasured((resident + 0.9 * each) / 0.9)
    with pytest.raises(ValueError, match="(?s)by their sizes.*Received: memo"):
        probe(meter, safety_margin=0.1)
    assert not meter.ran


def eager():
    model = compiled(dense)()
    model.run_eagerly = True
    return model


def test_a_limit_that_cannot_be_enforced_is_said():
    with pytest.warns(RuntimeWarning, match="cannot be enforced.*1000000"):
        probe(unmeasured(), eager(), count=20, memory_limit=1 * MB)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        # Nobody asked for the limit of the host.
        assert probe(unmeasured(1 * MB), eager(), count=20).reason == "dataset"
        # Measured, it is.
        meter = FakeMeter(None, slope=1000)
        profile = probe(meter, eager(), memory_limit=1 * MB)
    assert profile.reason == "memory"


def test_pairs_of_examples_count():
    """The loss compares all examples: the memory of pairs ends first."""

    def comparison():
        model = keras.Sequential(
            [keras.Input((comparing.FEATURES,)), keras.layers.Dense(8)]
        )

        def loss(y_true, y_pred):
            return tf.reduce_mean(tf.matmul(y_pred, y_pred, transpose_b=True))

        model.compile("sgd", loss)
        return model

    resident, growth = by_the_graph(comparison)
    assert len(growth) == 2
    profile = probe(
        unmeasured(1 * MB), comparison(), count=MANY, accumulates=False
    )
    size = profile.max_batch_size
    assert growth[1] * size**2 < 0.95 * MB - resident
    assert size < math.sqrt(MB / growth[1])
    assert profile.reason == "memory"


@pytest.mark.parametrize("growth", [(10.0,), (10.0, 3.0), (0.0, 7.0)])
@pytest.mark.parametrize("room", [1.0, 1e3, 1e9])
def test_the_largest_size_solves_the_equation(growth, room):
    first, second = (*growth, 0.0)[:2]
    exact = room / first if not second else (
        (math.sqrt(first**2 + 4 * second * room) - first) / (2 * second)
    )
    found = size_search.largest_by_growth(room, growth)
    # Found by halving an interval, to a millionth.
    assert exact * (1 - 2e-6) - 1 <= found <= exact
    assert size_search.largest_by_growth(-room, growth) == 0
