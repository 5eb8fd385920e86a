"""A call of `model.fit`: taking its place, and what its arguments tell."""

import contextlib
import inspect
import math

import keras
import tensorflow as tf

from keras_batchsize import _superbatches_arrays as _arrays
from keras_batchsize import keras_private
from keras_batchsize import slicing
from keras_batchsize._superbatches_datasets import is_batched
from keras_batchsize.memory import NothingFits
from keras_batchsize.out_of_memory import is_out_of_memory
from keras_batchsize.trainer import AdaptiveTrainer

# The error of halving micro-batches, an ordinary one of a configuration
# elsewhere; in a search it is a matter of a trial, as that of the probe is.
_NOTHING_LEFT = "One example must fit into memory"


@contextlib.contextmanager
def replaced_fit(model, fit):
    """Lets `model.fit` be another function, while in scope.

    That function is called with the model, whose `fit` is then its own again.
    Put among the attributes directly: Keras would track what is assigned.
    """

    def fit_instead(*args, **kwargs):
        with _own_fit(model):
            return fit(model, *args, **kwargs)

    vars(model)["fit"] = fit_instead
    try:
        yield
    finally:
        vars(model).pop("fit", None)


@contextlib.contextmanager
def _own_fit(model):
    replaced = vars(model).pop("fit")
    try:
        yield
    finally:
        vars(model)["fit"] = replaced


def bound(args, kwargs):
    """Returns the arguments of a call of `fit` by name."""
    try:
        signature = inspect.signature(AdaptiveTrainer.fit)
        bound = signature.bind(None, *args, **kwargs)
    except TypeError as error:
        raise TypeError(
            "`search` must be given arguments of `Model.fit`: each trial is "
            f"trained with them. Received: {error}. Leave that out."
        ) from error
    arguments = dict(bound.arguments)
    del arguments["self"]
    return arguments


def examples_of_epoch(arguments, model):
    """Returns the number of examples of an epoch, at most, by a batch.

    Args:
        arguments: Dict of the arguments of `fit`.
        model: The Keras model, whose inputs tell whether a dataset is batched.

    Returns:
        Integer; 0 if the data do not tell.
    """
    x, steps = arguments.get("x"), arguments.get("steps_per_epoch")
    if x is None or steps is not None:
        return 0
    if isinstance(x, tf.data.Dataset):
        size = 1
        if is_batched(x, model, None):
            size = keras_private.batch_size_of(x) or 0
        return max(int(x.cardinality()), 0) * size
    if not _arrays.is_arrays(x):
        return _examples_in_batches(x)
    examples = _arrays.count(x, None, None)
    if arguments.get("validation_data") is not None:
        return examples
    return math.floor(examples * (1.0 - arguments.get("validation_split", 0)))


def _examples_in_batches(x):
    """Those of what is read batch by batch, and whose length is in batches."""
    if isinstance(x, keras.utils.PyDataset):
        batches = x.num_batches or 0
        return batches and batches * int(slicing.count_examples(x[0]))
    size = getattr(x, "batch_size", None)  # Of a `DataLoader` of torch, say.
    try:
        return size * len(x) if size else 0
    except TypeError:
        return 0  # It reads from a stream.


def ran_out(error):
    """Whether an exception comes of memory that ran out.

    Args:
        error: What a trial raised: the error of a device, or what was made of
            it when nothing was left to try.
    """
    if isinstance(error, NothingFits) or str(error).startswith(_NOTHING_LEFT):
        return True
    while error is not None and not is_out_of_memory(error):
        error = error.__cause__ or error.__context__
    return error is not None
