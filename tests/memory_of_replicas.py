"""The probe under a strategy: laws that `replica_laws.py` has tried, too."""

from unittest import mock

import comparing
import keras
import numpy as np
import tensorflow as tf

import keras_batchsize as kb
from keras_batchsize import _memory_meters
from keras_batchsize import _superbatches_arrays
from keras_batchsize import keras_private
from keras_batchsize import model_state
from keras_batchsize import out_of_memory
from keras_batchsize._memory_examples import read_examples


def replica_values(model):
    return [
        np.array(component.numpy())
        for variable in model_state.variables_of(model)
        for component in out_of_memory.components(variable)
    ]


def replicas_are_left_as_they_were(strategy):
    """Each component of each variable, and training after."""

    def on_two():
        with strategy.scope():
            model = keras.Sequential(
                [
                    keras.Input((comparing.FEATURES,)),
                    keras.layers.Dense(6),
                    keras.layers.BatchNormalization(),
                    keras.layers.Dropout(0.2),
                    keras.layers.Dense(1),
                ]
            )
            model.compile("adam", "mse", metrics=["mae"])
        return model

    data = comparing.regression(64)
    outcomes = []
    for probes in (False, True):
        model = comparing.seeded(on_two)
        trainer = kb.AdaptiveTrainer(model, policy="fixed", verbose=0)
        trainer.fit(*data, batch_size=8, verbose=0)
        if probes:
            before = replica_values(model)
            profile = kb.find_max_batch_size(model, *data, maximum=40)
            for one, other in zip(before, replica_values(model), strict=True):
                np.testing.assert_array_equal(one, other)
            assert profile.replicas == 2 and profile.max_batch_size == 40
            assert all(row.batch_size % 2 == 0 for row in profile.rows)
            # A dataset is dealt out to the replicas on another way.
            dataset = tf.data.Dataset.from_tensor_slices(data).batch(8)
            profile = kb.find_max_batch_size(model, dataset, maximum=40)
            assert profile.max_batch_size == 40
        history = trainer.fit(*data, batch_size=8, epochs=2, verbose=0)
        outcomes.append(history.history["loss"])
    assert outcomes[0] == outcomes[1], outcomes


def unbuilt_replicas_are_mirrored(strategy):
    """Of a model that is not built before it is probed."""
    with strategy.scope():
        model = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(1)])
        model.compile("adam", "mse")
    data = comparing.regression(64)
    profile = kb.find_max_batch_size(model, *data, maximum=40)
    assert profile.max_batch_size == 40
    for variable in model.weights:
        assert isinstance(variable.value, tf.distribute.DistributedValues)
    kb.AdaptiveTrainer(model, policy="fixed", verbose=0).fit(
        *data, batch_size=8, verbose=0
    )


def a_model_is_measured_on_its_own_device(_):
    for device in ("CPU:1", "CPU:0"):
        with tf.device(device):
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        assert _memory_meters.devices_of(model) == [device]


def arrays_stay_on_the_host(_):
    """The second CPU stands for the GPU on which constants are by default."""
    data = comparing.regression()
    make = comparing.compiled(comparing.dense, optimizer=keras.optimizers.Adam)
    used, from_tensors = [], tf.data.Dataset.from_tensors

    def noted(tensors, name=None):
        if tf.executing_eagerly():  # Not a few row numbers in its graph.
            used.append(tf.constant(0.0).device[-5:])
        return from_tensors(tensors, name)

    with mock.patch.object(tf.data.Dataset, "from_tensors", noted):
        with mock.patch.object(
            _superbatches_arrays, "can_be_at_hand", lambda model: False
        ):
            with tf.device("CPU:1"):
                keras_private.data_adapter_for(*data).get_tf_dataset()
                assert used == ["CPU:1"], used
                used.clear()
                read_examples(make(), *data)
                assert set(used) == {"CPU:0"}, used
                used.clear()
                ours = comparing.adaptive(make, *data, policy="fixed")
                assert set(used) == {"CPU:0"}, used
                # Where data lie changes nothing of what they are.
                theirs = comparing.plain(make, *data)
    comparing.assert_same(ours, theirs)


def values_are_held_where_they_are(strategy):
    """On the first device they would take the room of all replicas."""
    with strategy.scope():
        layer = keras.layers.Dense(1)
        layer.build((None, 4))
    for variable in layer.weights:
        parts = out_of_memory.components(variable)
        devices = [out_of_memory.value_of(part).device for part in parts]
        assert devices == [part.device for part in parts]
        assert len(set(devices)) == 2, devices
