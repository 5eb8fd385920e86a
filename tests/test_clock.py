"""Laws of the clock that learning-rate schedules run on."""

import json
import math

import pytest

from keras_batchsize.clock import ExamplesClock


@pytest.mark.parametrize("batch_size", [1, 7, 32])
@pytest.mark.parametrize("superbatches", [[100], [64, 64, 5], [3] * 20])
def test_every_epoch_begins_where_plain_fit_begins_it(batch_size, superbatches):
    clock = ExamplesClock(batch_size)
    steps_of_fit = 0
    for _ in range(3):
        clock.start_epoch()
        assert clock.step == clock.steps == steps_of_fit
        for examples in superbatches:
            clock.advance(examples)
        steps_of_fit += math.ceil(sum(superbatches) / batch_size)


def test_step_is_that_of_the_next_example():
    clock = ExamplesClock(32)
    clock.advance(31)
    assert clock.step == 0
    clock.advance(1)
    assert clock.step == 1


def test_resumed_clock_goes_on():
    clock, resumed = ExamplesClock(32), ExamplesClock(32)
    clock.advance(100)
    resumed.set_state(json.loads(json.dumps(clock.get_state())))
    for one in (clock, resumed):
        one.start_epoch()
        one.advance(40)
    assert (clock.steps, clock.step) == (resumed.steps, resumed.step) == (4, 5)


def test_an_epoch_is_as_long_as_the_last_where_that_can_be():
    clock = ExamplesClock(32)
    assert clock.length_of_epoch(None, 64) == math.inf
    assert clock.length_of_epoch(3, 64) == 192
    for superbatch in (64, 64, 10):
        clock.advance(superbatch)
    clock.end_epoch()
    clock.start_epoch()
    # As long as no other has ended, however much there is of it.
    clock.advance(64)
    clock.start_epoch()
    resumed = ExamplesClock(32)
    resumed.set_state(json.loads(json.dumps(clock.get_state())))
    for one in (clock, resumed):
        assert one.length_of_epoch(None, 64) == 138
        assert one.length_of_epoch(3, 64) == 138
        # Of other data, or cut short.
        assert one.length_of_epoch(2, 64) == 128
        assert one.length_of_epoch(4, 64) == 256
