"""What several workers compare, told without any."""

import random

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_batchsize import _superbatches_alike as alike
from keras_batchsize import _train_function_team as teams
from keras_batchsize import distributed
from keras_batchsize import keras_private
from keras_batchsize import slicing
from keras_batchsize import workers

X, Y = comparing.regression(100)


class Sequence(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self._batches = batches

    def __len__(self):
        return self._batches

    def __getitem__(self, index):
        return X[:4], Y[:4]


def batches(number):
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(10)
    return data.take(number)


def unknown(number):
    return batches(number).filter(lambda x, y: True)


def generated(number):
    return ((X[:4], Y[:4]) for _ in range(number))


# What validation may be made of: a function of its length.
KINDS = {
    "arrays": lambda number: (X[:number], Y[:number]),
    "list of arrays": lambda number: ([X[:number]], Y[:number]),
    "dict of arrays": lambda number: ({"a": tf.constant(X[:number])}, Y),
    "tf.data": batches,
    "PyDataset": Sequence,
}
OF_NO_LENGTH = {"filtered": unknown, "generator": generated}


def facts(validation_data, **changed):
    arguments = {
        "validation_steps": None,
        "validation_batch_size": None,
        "validation_freq": 1,
        "batch_size": 8,
        "epochs": 3,
    }
    arguments.update(changed)
    return alike.facts_of_validation(validation_data, **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_validation_is_alike_if_it_is_as_long(kind):
    make = KINDS[kind]
    assert facts(make(5)) == facts(make(5)) != facts(make(4))
    # With steps that end it, the data may go on.
    of_two = {"validation_steps": 2}
    assert facts(make(5), **of_two) == facts(make(4), **of_two)
    assert facts(make(5), **of_two) != facts(None, **of_two)


@pytest.mark.parametrize("kind", OF_NO_LENGTH)
def test_validation_of_unknown_length_is_alike(kind):
    make = OF_NO_LENGTH[kind]
    assert facts(make(5)) == facts(make(4)) != facts(KINDS["arrays"](4))


def test_validation_is_alike_if_it_is_cut_alike():
    data = X, Y
    assert facts(data) == facts(data, validation_batch_size=8)
    for name, value in (
        ("validation_batch_size", 4),
        ("validation_steps", 3),
        ("validation_freq", 2),
        ("batch_size", 16),
    ):
        assert facts(data) != facts(data, **{name: value}), name


@pytest.mark.parametrize("others", [[3], [4], [9, 1]])
def test_a_trial_takes_what_all_workers_have(others, monkeypatch):
    strategy = tf.distribute.MirroredStrategy(["/cpu:0"])
    team = teams.Team(strategy, slicing.examples)
    monkeypatch.setattr(
        team._workers, "gathered", lambda values: [*values, *others]
    )
    x, _ = team.sample((X[:4], Y[:4]))
    np.testing.assert_array_equal(x, X[: min(4, *others)])


def test_what_was_restored_is_told_as_one_text_for_each_state(monkeypatch):
    told = []
    monkeypatch.setattr(
        workers.Workers,
        "check_alike",
        lambda self, description, remedy: told.append(description),
    )
    strategy = tf.distribute.MirroredStrategy(["/cpu:0"])

    def make():
        with strategy.scope():
            return comparing.compiled(comparing.dense)()

    model = comparing.seeded(make)
    # Where nothing was restored weights of unlike machines may differ.
    distributed.check_restored(model, [None])
    assert not any("weights" in name for name in told.pop())
    keras_private.resume_at(model, 2)
    for state, change in (
        ([], lambda: None),
        ([], lambda: None),
        ([{"batch_size": 8}], lambda: None),
        ([], lambda: model.optimizer.iterations.assign(1)),
        ([], lambda: model.layers[-1].bias.assign([1.0])),
    ):
        change()
        distributed.check_restored(model, state)
    assert told[0] == told[1]
    texts = [tuple(one.values()) for one in told[1:]]
    assert len(set(texts)) == len(texts)
    assert all(isinstance(one, str) for text in texts for one in text)
    assert told[0]["updates made"] == "0"


def test_python_is_seeded_only_where_keras_shuffles_by_it(monkeypatch):
    """A generator of the user's may have to differ from worker to worker."""
    team = workers.Workers(tf.distribute.MirroredStrategy(["/cpu:0"]))
    team.number = 2
    monkeypatch.setattr(team, "_told", lambda text: ["5 one", "5 other"])
    before = random.getstate()
    team.shuffle_alike()
    assert random.getstate() == before
    team.shuffle_alike(by_python=True)
    assert random.getstate() == random.Random(5).getstate()
    for shuffle in (True, False):
        adapter = keras_private.data_adapter_for(Sequence(3), shuffle=shuffle)
        facts_of_it = alike.facts_of(adapter, None)
        assert (workers.ORDERED_BY_PYTHON in facts_of_it) == shuffle
