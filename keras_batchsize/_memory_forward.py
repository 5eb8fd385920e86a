"""What a forward pass says of the memory that training takes.

Traced, not run: shapes and operations are those of the graph.
"""

import dataclasses

import keras
import tensorflow as tf

from keras_batchsize import keras_private
from keras_batchsize import slicing

# Batch sizes that hardly divide the number of elements of anything else.
_PRIMES = 61, 67
# Where these hide what they compute, nothing can be added up.
_HIDING = {"While", "StatelessWhile", "If", "StatelessIf", "Case", "XlaLaunch"}


@dataclasses.dataclass(frozen=True)
class Forward:
    """The tensors of a forward pass and of the loss.

    Attributes:
        typical: Bytes per example of the tensor that a byte belongs to, on
            average: the mean size of the model's tensors, weighted by their
            sizes. None if sizes depend on the data, as with ragged examples,
            or grow faster than the batch.
        totals: Bytes of all together, per example, per pair of examples, and
            so on, where a loss compares each with each other one. Empty if
            sizes depend on the data, or there are loops or conditions.
        back: Bytes of the largest of them twice, likewise: more than the way
            back adds.
        degree: Highest power of the batch size with which one of them grows.
    """

    typical: float | None
    totals: tuple
    back: tuple
    degree: int = 1


def can_be_called(model):
    """Whether a model has a `call`: some have their own `train_step` only.

    Args:
        model: A Keras model.
    """
    return type(model).call is not keras.Model.call


def is_called_once(model):
    """Whether a step calls the model once, as that of Keras does.

    Args:
        model: A Keras model.
    """
    return can_be_called(model) and all(
        getattr(type(model), name) is getattr(keras.Model, name)
        for name in ("train_step", "compute_loss")
    )


def forward_of(model, example, training=True):
    """Returns the `Forward` of a model.

    Args:
        model: A compiled Keras model whose variables exist.
        example: A batch of one example, to take shapes from.
        training: Whether to look at training rather than inference.

    Returns:
        A `Forward`; None if the loss cannot be traced.
    """
    first, second = _PRIMES
    found = _traced(model, example, training, first)
    if found is None or found.degree == 1:
        return found
    # Unless a dimension of the model happens to be the same.
    other = _traced(model, example, training, second)
    return other if other and other.degree < found.degree else found


def _traced(model, example, training, size):
    """Returns the `Forward` by a graph for batches of a size, or None."""
    of_model = []

    def call(x, y, sample_weight):
        graph = tf.compat.v1.get_default_graph()
        given = len(graph.get_operations())  # Targets and weights, too.
        y_pred = model(x, training=training)
        of_model[:] = tf.nest.flatten(x, expand_composites=True)
        for operation in graph.get_operations()[given:]:
            of_model.extend(operation.outputs)
        loss = keras_private.compute_loss(
            model, x, y, y_pred, sample_weight, training
        )
        return y_pred, loss

    batch = keras.tree.map_structure(
        lambda leaf: _of_size(size, leaf),
        keras.utils.unpack_x_y_sample_weight(example),
    )
    function = tf.function(call, autograph=False)
    try:
        concrete = function.get_concrete_function(*batch)
    except Exception:  # Whatever a loss of one's own raises.
        return None
    return _read(concrete, of_model, size)


def _read(concrete, of_model, size):
    """Adds up the tensors of a graph.

    Args:
        concrete: The traced function.
        of_model: List of its tensors that the model takes and makes.
        size: Integer, examples in the batch that it was traced for.
    """
    operations = concrete.graph.get_operations()
    outputs = [one for each in operations for one in each.outputs]
    degree = max(1, *(_power(one, size) for one in outputs))
    sizes = [
        [one / size**power for one in _bytes_of(outputs, size, power)]
        for power in range(1, degree + 1)
    ]
    hides = any(
        one.type in _HIDING or "PartitionedCall" in one.type
        for one in operations
    )
    typical = None
    if degree == 1 and not _depend_on_data(of_model):
        # What comes out of the model is named once more.
        named = [*of_model, *concrete.outputs]
        typical = _weighted_mean(_bytes_of(named, size)) / size
    known = not hides and not _depend_on_data(outputs)
    return Forward(
        typical=typical,
        totals=tuple(map(sum, sizes)) if known else (),
        back=tuple(2.0 * max(one, default=0.0) for one in sizes),
        degree=degree,
    )


def _bytes_of(tensors, size, power=1):
    """Returns the bytes of each tensor that grows with a power of the batch."""
    return [
        one.shape.num_elements() * one.dtype.size
        for one in tensors
        if _power(one, size) == power
    ]


def _power(tensor, size):
    """Returns with which power of the batch a tensor grows, 0 if unknown."""
    elements, power = tensor.shape.num_elements() or 1, 0
    while elements % size == 0:
        elements, power = elements // size, power + 1
    return power


def _depend_on_data(tensors):
    """Whether a tensor of numbers has a shape that no graph tells."""
    return any(
        one.shape.num_elements() is None
        for one in tensors
        if one.dtype.is_floating or one.dtype.is_integer
    )


def _weighted_mean(sizes):
    return sum(size * size for size in sizes) / max(sum(sizes), 1)


def _of_size(size, leaf):
    """The type of a batch of so many examples, without any data."""
    spec = slicing.batch_spec(leaf)
    if isinstance(spec, tf.TensorSpec):
        return tf.TensorSpec([size] + spec.shape[1:], spec.dtype)
    return spec
