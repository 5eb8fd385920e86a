"""What a forward pass says of the memory that training takes.

Traced, not run: shapes and operations are those of the graph.
"""

import dataclasses

import keras
import tensorflow as tf

from keras_batchsize import slicing

# A batch size that hardly divides the number of elements of anything else.
_PRIME = 61
# Where these hide what they compute, nothing can be added up.
_HIDING = {"While", "StatelessWhile", "If", "StatelessIf", "Case", "XlaLaunch"}


@dataclasses.dataclass(frozen=True)
class Forward:
    """The tensors of a forward pass.

    Attributes:
        largest: Bytes per example of the largest one that is known.
        typical: Bytes per example of the tensor that a byte belongs to, on
            average: the mean size of tensors, weighted by their sizes. None
            if sizes depend on the data, as with ragged examples.
        total: Bytes per example of all together. None for such models, and
            for models with loops or conditions.
    """

    largest: float
    typical: float | None
    total: float | None


def forward_of(model, example, training=True):
    """Returns the `Forward` of a model.

    Args:
        model: A built Keras model.
        example: A batch of one example, to take shapes from.
        training: Whether to look at training rather than inference.
    """
    x, _, _ = keras.utils.unpack_x_y_sample_weight(example)
    x = keras.tree.map_structure(_of_prime_size, x)

    def call(x):
        return model(x, training=training)

    concrete = tf.function(call, autograph=False).get_concrete_function(x)
    operations = concrete.graph.get_operations()
    outputs = [one for each in operations for one in each.outputs]
    sizes = [
        one.shape.num_elements() * one.dtype.size
        for one in outputs
        if (one.shape.num_elements() or 1) % _PRIME == 0
    ]
    depends = any(_size_depends_on_data(one) for one in outputs)
    hides = any(
        one.type in _HIDING or "PartitionedCall" in one.type
        for one in operations
    )
    return Forward(
        largest=max(sizes, default=0) / _PRIME,
        typical=None if depends else _weighted_mean(sizes) / _PRIME,
        total=None if hides or depends else sum(sizes) / _PRIME,
    )


def _size_depends_on_data(tensor):
    """Whether a tensor of numbers has a shape that no graph tells."""
    is_number = tensor.dtype.is_floating or tensor.dtype.is_integer
    return is_number and tensor.shape.num_elements() is None


def _weighted_mean(sizes):
    return sum(size * size for size in sizes) / max(sum(sizes), 1)


def _of_prime_size(leaf):
    """The type of a batch of 61 examples, without any data."""
    spec = slicing.batch_spec(leaf)
    if isinstance(spec, tf.TensorSpec):
        return tf.TensorSpec([_PRIME] + spec.shape[1:], spec.dtype)
    return spec
