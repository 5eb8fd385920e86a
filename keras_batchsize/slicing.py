"""Cutting nested batches of examples along their first axis."""

import keras
import numpy as np
import tensorflow as tf


def has_optionals(dataset):
    """Whether elements of a dataset hold `Optional`s, for None."""
    return any(
        isinstance(spec, tf.OptionalSpec)
        for spec in keras.tree.flatten(dataset.element_spec)
    )


def without_nones(*data):
    """Drops the `Optional`s by which Keras's adapters pass None."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(
        without_optionals(data)
    )
    return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)


def without_optionals(data):
    """Replaces the `Optional`s by which generators pass None."""
    return keras.tree.map_structure(
        lambda leaf: (
            None if isinstance(leaf, tf.experimental.Optional) else leaf
        ),
        data,
    )


def count_examples(data):
    """Returns the number of examples as a tensor.

    Args:
        data: Nested structure of tensors with a common first axis.

    Returns:
        Scalar int32 tensor; as Keras, read off the first leaf.
    """
    leaf = next(
        leaf for leaf in keras.tree.flatten(data) if leaf is not None
    )
    if isinstance(leaf, tf.RaggedTensor):
        return tf.cast(leaf.nrows(), tf.int32)
    if isinstance(leaf, tf.SparseTensor):
        return tf.cast(leaf.dense_shape[0], tf.int32)
    return tf.shape(leaf)[0]


def number_of_examples(data):
    """Returns the number of examples in eager data, as a Python integer."""
    leaf = next(
        leaf for leaf in keras.tree.flatten(data) if leaf is not None
    )
    size = leaf.shape[0]
    return int(count_examples(data)) if size is None else int(size)


def examples(data, start, size):
    """Returns `size` examples from `start` on.

    Args:
        data: Nested structure of dense, ragged or sparse tensors.
        start: Integer or scalar int32 tensor.
        size: Likewise. A Python integer gives a static shape, as XLA needs.

    Returns:
        The same structure with `size` examples.
    """

    def cut(leaf):
        if leaf is None:
            return None
        if isinstance(leaf, tf.RaggedTensor):
            return leaf[start : start + size]
        rank = len(leaf.shape)
        begin = [start] + [0] * (rank - 1)
        if isinstance(leaf, tf.SparseTensor):
            shape = leaf.dense_shape
            ends = tf.concat([[tf.cast(size, shape.dtype)], shape[1:]], 0)
            begin = tf.cast(tf.stack(begin), shape.dtype)
            return _shaped(tf.sparse.slice(leaf, begin, ends), size, leaf)
        part = tf.slice(leaf, begin, [size] + [-1] * (rank - 1))
        return _shaped(part, size, leaf)

    return keras.tree.map_structure(cut, data)


def where_used(data):
    """Returns data on the device that operations on them run on.

    What a loop is handed stays, in each of its rounds, on the device that it
    came from. Data come from the host: there each round would send all of them
    to an accelerator, to cut one batch out of them.

    Args:
        data: Nested structure of dense, ragged or sparse tensors.

    Returns:
        The same structure. Nothing is copied if it is there already.
    """
    return keras.tree.map_structure(
        lambda leaf: None if leaf is None else tf.identity(leaf), data
    )


def _shaped(part, size, whole):
    """Lets a part know its shape, of which slicing leaves only the rank.

    Keras looks at shapes while a step is traced: it takes a dimension of 1 off
    labels and weights, and convolves another way where channels are not known.
    """
    number = size if isinstance(size, int) else None
    part.set_shape([number, *whole.shape[1:]])
    return part


def gathered(arrays, rows, start, size):
    """Returns the examples of `size` rows, from the row at `start` on.

    Args:
        arrays: Nested structure of dense tensors with a common first axis.
        rows: Integer tensor of shape (rows,), indices into that axis.
        start: Integer or scalar int32 tensor.
        size: Likewise.

    Returns:
        The structure of `arrays` with `size` examples.
    """
    rows = examples(rows, start, size)
    return keras.tree.map_structure(
        lambda leaf: None if leaf is None else tf.gather(leaf, rows), arrays
    )


def every_nth(data, first, stop, step):
    """Returns the examples first, first + step, ..., below stop.

    Args:
        data: Nested structure of dense, ragged or sparse tensors.
        first: Scalar integer tensor.
        stop: Likewise, at most the number of examples.
        step: Integer.

    Returns:
        The same structure.
    """
    first, stop = (tf.cast(one, tf.int64) for one in (first, stop))
    rows = tf.range(tf.minimum(first, stop), stop, step)

    def take(leaf):
        if leaf is None:
            return None
        if isinstance(leaf, tf.SparseTensor):
            return _every_nth_sparse(leaf, first, stop, step)
        return tf.gather(leaf, rows)

    return keras.tree.map_structure(take, data)


def _every_nth_sparse(leaf, first, stop, step):
    places = leaf.indices[:, 0] - first
    kept = tf.sparse.retain(
        leaf,
        (places >= 0) & (places < stop - first) & (places % step == 0),
    )
    rows = (kept.indices[:, :1] - first) // step
    number = tf.maximum(stop - first + step - 1, 0) // step
    return tf.SparseTensor(
        tf.concat([rows, kept.indices[:, 1:]], axis=1),
        kept.values,
        tf.concat([number[None], leaf.dense_shape[1:]], axis=0),
    )


def padded(data, size):
    """Repeats the first examples until there are `size`.

    The copies only give XLA one shape for all superbatches; nothing trains
    on them.

    Args:
        data: Nested structure of dense tensors with at most `size` examples.
        size: Integer.

    Returns:
        The same structure with `size` examples.
    """

    def pad(leaf):
        if leaf is None:
            return None
        rows = tf.range(size) % tf.shape(leaf)[0]
        return tf.gather(leaf, rows)

    return keras.tree.map_structure(pad, data)


def bytes_of(data):
    """Returns the bytes of arrays or tensors, as far as they are told.

    Args:
        data: Nested structure of them, or of None.
    """
    return sum(map(_bytes_of_leaf, keras.tree.flatten(data)))


def _bytes_of_leaf(leaf):
    usage = getattr(leaf, "memory_usage", None)
    if callable(usage):
        # Of pandas. A column of a frame may have any name, "nbytes" too.
        return int(np.sum(usage(index=False)))
    told = getattr(leaf, "nbytes", 0)
    return 0 if callable(told) else int(told)


def batch_spec(leaf):
    """Returns the type of a batch of any number of examples.

    Args:
        leaf: Tensor of examples, or None.
    """
    if leaf is None:
        return None
    spec = tf.type_spec_from_value(leaf)
    if isinstance(spec, tf.TensorSpec):
        return tf.TensorSpec([None] + spec.shape[1:], spec.dtype)
    if isinstance(spec, tf.SparseTensorSpec):
        return tf.SparseTensorSpec([None] + spec.shape[1:], spec.dtype)
    if isinstance(spec, tf.RaggedTensorSpec):
        return tf.RaggedTensorSpec(
            [None] + spec.shape[1:],
            spec.dtype,
            spec.ragged_rank,
            spec.row_splits_dtype,
        )
    return spec
