"""Trials make updates, however high the scale of the loss begins."""

import comparing
import keras
import pytest
from fake_memory import FakeMeter

from keras_batchsize._memory_examples import read_examples
from keras_batchsize._memory_workload import Workload


def of_half_precision():
    """Returns a model whose first gradients overflow."""
    model = comparing.of_dtype(comparing.dense, "mixed_float16")()
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(), initial_scale=2.0**60
    )
    model.compile(optimizer, "mse")
    return model


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("what", ["train", "superbatch", "repeat"])
def test_a_trial_makes_updates_whatever_the_scale(what, eager):
    model = of_half_precision()
    model.run_eagerly = eager
    examples = read_examples(model, *comparing.regression(16))
    inner = model.optimizer.inner_optimizer
    with Workload(model, examples, FakeMeter(None), True) as workload:
        for _ in range(2):
            getattr(workload, what)(8)
            assert int(inner.iterations) >= 2
            workload.restore_values()
            assert int(inner.iterations) == 0
    assert float(model.optimizer.dynamic_scale) == 2.0**60
    # It is no other model: its own first update is skipped.
    model.train_on_batch(*comparing.regression(8))
    assert int(inner.iterations) == 0
