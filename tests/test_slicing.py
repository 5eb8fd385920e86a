"""Which examples are cut out, against NumPy's own slicing."""

import numpy as np
import pytest
import tensorflow as tf

from keras_batchsize import slicing

NUMBERS = np.array([[3, 0], [0, 1], [0, 0], [5, 7], [0, 2], [9, 0], [4, 4]])
ROWS = [[0], [1, 1], [], [3], [4, 4, 4], [5], [6]]


@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("first", "stop"), [(0, 7), (1, 7), (3, 5), (2, 2), (6, 7), (7, 7), (9, 7)]
)
def test_every_nth_of_any_kind_is_that_of_numpy(first, stop, step):
    dense, ragged, sparse, nothing = slicing.every_nth(
        (
            tf.constant(NUMBERS),
            tf.ragged.constant(ROWS),
            tf.sparse.from_dense(NUMBERS),
            None,
        ),
        tf.constant(first),
        tf.constant(stop),
        step,
    )
    expected = NUMBERS[first:stop:step]
    np.testing.assert_array_equal(dense, expected)
    np.testing.assert_array_equal(tf.sparse.to_dense(sparse), expected)
    assert ragged.to_list() == ROWS[first:stop:step]
    assert nothing is None


def test_data_are_the_same_where_they_are_used():
    data = (
        tf.constant(NUMBERS),
        tf.ragged.constant(ROWS),
        tf.sparse.from_dense(NUMBERS),
        None,
    )
    dense, ragged, sparse, nothing = slicing.where_used(data)
    np.testing.assert_array_equal(dense, NUMBERS)
    np.testing.assert_array_equal(tf.sparse.to_dense(sparse), NUMBERS)
    assert ragged.to_list() == ROWS
    assert nothing is None
