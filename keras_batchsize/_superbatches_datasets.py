"""Of what a `tf.data.Dataset` consists: part of `superbatches.py`."""

import keras
import tensorflow as tf

from keras_batchsize import keras_private


def is_batched(dataset, model, batch_size):
    """Whether the elements of a dataset are batches, by their shapes.

    The shape of the model's input decides. Where the model has none yet, a
    first axis of one known length is that of a batch, unless it contradicts
    the batch size asked for and nothing has made batches.
    """
    element = dataset.element_spec
    leaves = [
        spec.shape
        for spec in keras.tree.flatten(element)
        if getattr(spec, "shape", None) is not None
    ]
    if any(shape.rank == 0 for shape in leaves):
        return False
    sizes = {shape[0] for shape in leaves if shape.rank} - {None}
    if len(sizes) > 1:
        return False
    for leaf, example in _leaves_and_examples(element, model):
        if leaf.rank != example.rank:
            return True
        if not leaf.is_compatible_with(example):
            return True  # Keras adds the last axis, of length one.
        if example[-1] == 1 and leaf[-1] is None:
            return keras_private.makes_batches(dataset)
        return False
    if not sizes or batch_size is None or batch_size in sizes:
        return True
    return keras_private.makes_batches(dataset)


def shapes_vary(dataset):
    """Whether batches may differ in more than their number of examples.

    Args:
        dataset: A `tf.data.Dataset` of batches.

    Returns:
        Bool. True also where shapes are all the same but nothing says so, as
        after a `tf.py_function` without `set_shape`.
    """
    return any(
        spec.shape.rank is None or None in spec.shape[1:].as_list()
        for spec in keras.tree.flatten(dataset.element_spec)
        if isinstance(spec, tf.TensorSpec)
    )


def bytes_of_example(dataset):
    """Returns the bytes of an example, as far as the shapes tell them.

    Args:
        dataset: A `tf.data.Dataset` of batches.
    """
    return sum(
        (spec.shape[1:].num_elements() or 0) * spec.dtype.size
        for spec in keras.tree.flatten(dataset.element_spec)
        if isinstance(spec, tf.TensorSpec) and spec.shape.rank
    )


def _leaves_and_examples(element, model):
    """Returns pairs of shapes: part of an element, example of its input."""
    inputs = keras.tree.flatten(getattr(model, "inputs", None) or [])
    x = element[0] if isinstance(element, tuple) else element
    if isinstance(x, dict):
        pairs = [(x[one.name], one) for one in inputs if one.name in x]
    else:
        pairs = zip(keras.tree.flatten(x), inputs)
    return [
        (leaf.shape, tf.TensorShape(one.shape[1:]))
        for leaf, one in pairs
        if getattr(leaf, "shape", None) is not None
        and leaf.shape.rank is not None
    ]


def starting_over(dataset, steps):
    """Lets a dataset start over where it ends together with an epoch.

    Keras makes a new iterator after a known number of steps. Where that is not
    known, an epoch that begins where the data have ended would be empty. Where
    they end within an epoch it ends, too, and Keras warns.

    Args:
        dataset: A `tf.data.Dataset`.
        steps: Elements in an epoch.

    Returns:
        A `tf.data.Dataset`.
    """

    def goes_on(position, one):
        index, _ = one
        return tf.logical_or(index > 0, position % steps == 0)

    again = dataset.enumerate().repeat().enumerate().take_while(goes_on)
    options = tf.data.Options()
    # Data are not to be read again before an epoch asks for them: what they
    # are may change in between, by a callback, say.
    options.experimental_optimization.inject_prefetch = False
    return again.map(lambda position, one: one[1]).with_options(options)
