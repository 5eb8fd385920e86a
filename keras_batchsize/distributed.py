"""`fit`, `evaluate` and `predict` of Keras under a strategy.

Keras 3.15 raises in all of them with several workers, before the first step
and after it. What is in its way is stepped around here while a call lasts.
"""

import contextlib
import hashlib
import json
import re

import keras
import tensorflow as tf

from keras_batchsize import keras_private
from keras_batchsize import replicas
from keras_batchsize import slicing
from keras_batchsize.workers import ORDERED_BY_PYTHON
from keras_batchsize.workers import Workers
from keras_batchsize.workers import check_tf_config
from keras_batchsize.workers import explained

# Of functions and other objects; each process has its own.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class Preparation:
    """Lets a model be fitted or evaluated under its strategy.

    Keras keeps the test function that it has traced until `compile` is called
    again; so does this the one that takes its place.
    """

    def __init__(self):
        self._compiled = None
        self._test_function = None

    @contextlib.contextmanager
    def __call__(self, model, specs=None):
        """Prepares a model for a call.

        Args:
            model: A compiled Keras model.
            specs: Types of a batch, where the data do not show them.

        Yields:
            None.
        """
        if replicas.strategy_of(model) is None:
            yield
            return
        if specs is not None:
            keras_private.build_symbolically(model, specs)
        with contextlib.ExitStack() as stack:
            stack.enter_context(keras_private.built_from_specs(model))
            if replicas.workers(model) > 1:
                stack.enter_context(explained(model.distribute_strategy))
                stack.enter_context(self._evaluating_together(model))
            yield

    @contextlib.contextmanager
    def _evaluating_together(self, model):
        """Exchanges the test function for one that several workers can run.

        Keras's own takes the mean of each worker's logs over an axis that
        numbers do not have. Metrics are summed over all replicas where they
        are read, so that there is nothing to take the mean of.
        """
        held, compiled = model.test_function, keras_private.compiled(model)
        if compiled is not self._compiled:
            self._compiled = compiled
            self._test_function = _test_function(model)
        model.test_function = self._test_function
        try:
            yield
        finally:
            model.test_function = held


def check_alike(model, facts_of_data, **facts):
    """Raises on every worker if they are about to train differently.

    They are also made to shuffle alike.

    Args:
        model: A compiled Keras model.
        facts_of_data: Function that returns a dict of what has to be the same
            of the data.
        **facts: What else has to be the same, of any type with a `repr`.

    Raises:
        ValueError: If workers differ, or TF_CONFIG is missing.
        RuntimeError: If a worker does not come.
    """
    strategy = model.distribute_strategy
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return
    if replicas.workers(model) == 1:
        # Other resolvers than TF_CONFIG may tell of a cluster of one.
        if not strategy.cluster_resolver.cluster_spec().as_dict():
            check_tf_config()
        return
    workers, facts = Workers(strategy), {**facts_of_data(), **facts}
    workers.check_alike(described(model, facts))
    workers.shuffle_alike(by_python=ORDERED_BY_PYTHON in facts)


def check_restored(model, states):
    """Raises on every worker if they are about to go on from different states.

    Args:
        model: A compiled Keras model of several workers, its backup loaded.
        states: What else has been restored, of JSON types.

    Raises:
        ValueError: If workers differ.
        RuntimeError: If a worker does not come.
    """
    updates = keras.ops.convert_to_numpy(model.optimizer.iterations)
    state = json.dumps(states, sort_keys=True).encode()
    found = {
        "epoch to go on at": keras_private.resumes_at(model),
        "updates made": int(updates),
        "sha256 of the batch size's state": hashlib.sha256(state).hexdigest(),
    }
    if found["epoch to go on at"] is not None:
        # Trained weights may differ in their last bits, on unlike machines;
        # those of one file do not.
        weights = hashlib.sha256()
        for one in model.trainable_variables:
            weights.update(keras.ops.convert_to_numpy(one).tobytes())
        found["sha256 of the weights"] = weights.hexdigest()
    Workers(model.distribute_strategy).check_alike(
        {name: str(value) for name, value in found.items()},
        "Let all of them see one folder of backups, into which the first "
        "writes: a disk of its own holds what one worker has written, if "
        "anything.",
    )


def described(model, facts):
    """Returns what has to be the same on all workers, a dict of texts.

    Args:
        model: A compiled Keras model.
        facts: Dict of what else has to be, of any type with a `repr`.
    """
    description = {
        name: _ADDRESS.sub("", repr(value)) for name, value in facts.items()
    }
    description["model"] = _described(model)
    description["weights"] = str(
        [(tuple(one.shape), one.dtype) for one in model.weights]
    )
    description["optimizer"] = _described(model.optimizer)
    description["loss"] = _described(model.loss)
    return description


def _described(what):
    """The configuration of a part of Keras, or at least its type."""
    try:
        return json.dumps(what.get_config(), sort_keys=True, default=_named)
    except (AttributeError, NotImplementedError, TypeError):
        return _named(what)


def _named(what):
    """Texts of objects contain addresses, which differ."""
    if isinstance(what, (str, int, float, list, tuple, dict)):
        return str(what)
    return getattr(what, "__name__", type(what).__name__)


def _test_function(model):
    strategy = model.distribute_strategy
    shares = replicas.Shares(strategy)

    def test_on(data):
        strategy.run(
            lambda share: model.test_step(slicing.without_optionals(share)),
            (data,),
        )
        return model.get_metrics_result()

    if model.run_eagerly:
        return _on_several(model, test_on)
    traced = tf.function(test_on, reduce_retracing=True, autograph=False)

    def test_on_traced(data):
        if not traced.experimental_get_tracing_count():
            # For any number of examples: the last batch has fewer.
            traced.get_concrete_function(shares.specs(data))
        return traced(data)

    return _on_several(model, test_on_traced)


def _on_several(model, test_on):
    """Tests on as many batches as Keras expects of a call, its "execution".

    Args:
        model: A compiled Keras model.
        test_on: Function from a batch to the logs.

    Returns:
        Function from an iterator to the last logs, which count all batches.
    """

    def test_on_next(iterator):
        logs = test_on(next(iterator))
        for _ in range(1, model.steps_per_execution):
            try:
                data = next(iterator)
            except (StopIteration, tf.errors.OutOfRangeError):
                break
            logs = test_on(data)
        return logs

    return test_on_next
