"""What `AdaptiveTrainer` chooses where nothing is said, and what it recalls."""

import pytest
import tensorflow as tf
from comparing import BASE
from comparing import SUPERBATCH
from comparing import dense
from comparing import regression

import keras_batchsize as kb
from keras_batchsize.controller import Controller

# Keras says so of any data that do not tell their length.
OUT_OF_DATA = "ignore:Your input ran out of data:UserWarning"


def regressor():
    model = dense()
    model.compile("sgd", "mse")
    return model


def unknown(examples):
    """Returns a dataset that does not tell its length."""
    data = tf.data.Dataset.from_tensor_slices(regression(examples))
    return data.filter(lambda x, y: True).batch(BASE)


# The largest size.


@pytest.mark.parametrize(
    ("examples", "largest"),
    # A sixteenth of the examples, on the ladder of 8.
    [(70, 8), (255, 8), (256, 16), (1023, 32), (1024, 64)],
)
def test_the_largest_batch_is_a_sixteenth_of_the_data(examples, largest):
    trainer = kb.AdaptiveTrainer(regressor(), "fixed", verbose=0)
    trainer.fit(*regression(examples), batch_size=BASE, verbose=0)
    assert trainer.report.settings["max_batch_size"] == largest


@pytest.mark.filterwarnings(OUT_OF_DATA)
def test_the_largest_batch_is_64_of_the_stated_where_the_length_is_unknown():
    trainer = kb.AdaptiveTrainer(regressor(), "fixed", verbose=0)
    trainer.fit(unknown(70), verbose=0)
    assert trainer.report.settings["max_batch_size"] == 64 * BASE


# The budget of measuring.


@pytest.fixture()
def ahead(monkeypatch):
    """Examples whose budget may be spent in advance, at each superbatch."""
    seen = []

    def asked(controller, examples, examples_ahead):
        seen.append(examples_ahead)
        return False

    monkeypatch.setattr(Controller, "wants_measurement", asked)
    return seen


def test_the_budget_of_what_is_left_is_spent_and_of_an_epoch_at_most(ahead):
    trainer = kb.AdaptiveTrainer(
        regressor(), "measure", superbatch_size=SUPERBATCH, verbose=0
    )
    data = regression()  # Superbatches of 32, 32 and 6.

    trainer.fit(*data, batch_size=BASE, epochs=3, verbose=0)

    # An epoch is taken for three whole superbatches until one has ended.
    assert ahead[:3] == [96, 96, 96]
    assert ahead[3:6] == [70, 70, 70]
    assert ahead[6:] == [70, 38, 6]


def test_a_second_fit_has_a_budget_of_its_own(ahead):
    trainer = kb.AdaptiveTrainer(
        regressor(), "measure", superbatch_size=SUPERBATCH, verbose=0
    )
    data = regression(64)

    trainer.fit(*data, batch_size=BASE, epochs=2, verbose=0)
    first = list(ahead)
    trainer.fit(*data, batch_size=BASE, epochs=2, verbose=0)
    assert ahead[len(first) :] == first == [64, 64, 64, 32]


def test_a_budget_is_that_of_the_epochs_left_after_the_initial_one(ahead):
    trainer = kb.AdaptiveTrainer(
        regressor(), "measure", superbatch_size=SUPERBATCH, verbose=0
    )
    trainer.fit(
        *regression(64), batch_size=BASE, epochs=5, initial_epoch=4, verbose=0
    )
    assert ahead == [64, 32]


@pytest.mark.filterwarnings(OUT_OF_DATA)
def test_nothing_is_spent_in_advance_where_no_end_is_known(ahead):
    trainer = kb.AdaptiveTrainer(
        regressor(), "measure", superbatch_size=SUPERBATCH, verbose=0
    )
    trainer.fit(unknown(64), epochs=2, verbose=0)
    assert set(ahead[:2]) == {0}
