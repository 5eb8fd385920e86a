"""What a probe refuses because of a strategy, before it touches anything."""

import comparing
import keras
import pytest
import tensorflow as tf
from comparing import compiled
from comparing import dense

import keras_batchsize as kb
from keras_batchsize import replicas

make = compiled(dense, optimizer=keras.optimizers.SGD)


def test_each_replica_takes_an_example(monkeypatch):
    model = make()
    monkeypatch.setattr(replicas, "count", lambda _: 4)
    with pytest.raises(ValueError, match="Received: maximum=3, with 4 repl"):
        kb.find_max_batch_size(model, *comparing.regression(), maximum=3)
    assert not model.optimizer.built


def test_data_that_are_dealt_out_already_are_refused():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model = make()
    dataset = tf.data.Dataset.from_tensor_slices(comparing.regression(16))
    dealt = strategy.experimental_distribute_dataset(dataset.batch(8))
    with pytest.raises(TypeError, match="(?s)Received: x of .*Distributed"):
        kb.find_max_batch_size(model, dealt)
    assert not model.optimizer.built
