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
        largest: Bytes per example of the largest one; 0 if that cannot be
            told.
        typical: Bytes per example of the tensor that a byte belongs to, on
            average: the mean size of tensors, weighted by their sizes.
        total: Bytes per example of all together, None for models with loops
            or conditions.
    """

    largest: float
    typical: float
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
    sizes = [
        output.shape.num_elements() * output.dtype.size
        for operation in operations
        for output in operation.outputs
        if (output.shape.num_elements() or 1) % _PRIME == 0
    ]
    hides = any(
        one.type in _HIDING or "PartitionedCall" in one.type
        for one in operations
    )
    return Forward(
        largest=max(sizes, default=0) / _PRIME,
        typical=_weighted_mean(sizes) / _PRIME,
        total=None if hides else sum(sizes) / _PRIME,
    )


def _weighted_mean(sizes):
    return sum(size * size for size in sizes) / max(sum(sizes), 1)


def _of_prime_size(leaf):
    """The type of a batch of 61 examples, without any data."""
    spec = slicing.batch_spec(leaf)
    if isinstance(spec, tf.TensorSpec):
        return tf.TensorSpec([_PRIME] + spec.shape[1:], spec.dtype)
    return spec
