"""Models whose memory the probe is judged by, and what they train on."""

import keras
import numpy as np
import tensorflow as tf

POOL, EXAMPLES = 64, 2**17
# Examples in arrays: several of the largest batches that fit a few hundred MB.
ARRAYS = {"mlp": 2**15, "cnn": 2**10, "transformer": 2**8}


def mlp():
    """3 x Dense(1024) with dropout on 784 features, 2.9 M weights."""
    layers = [keras.Input((784,))]
    for _ in range(3):
        layers.append(keras.layers.Dense(1024, activation="relu"))
        layers.append(keras.layers.Dropout(0.5))
    return keras.Sequential(
        [*layers, keras.layers.Dense(10, dtype="float32")]
    )


def cnn():
    """5 x convolution, BatchNorm and ReLU on 64 x 64 x 3, 0.3 M weights."""
    layers = [keras.Input((64, 64, 3))]
    for filters, strides in ((32, 1), (32, 2), (64, 1), (64, 2), (128, 1)):
        layers += [
            keras.layers.Conv2D(filters, 3, strides, "same", use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
        ]
    return keras.Sequential(
        [
            *layers,
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10, dtype="float32"),
        ]
    )


def transformer():
    """2 pre-norm blocks, 128 tokens of 128, 5000 words to predict, 1.7 M."""
    words, length, width = 5000, 128, 128
    inputs = keras.Input((length,), dtype="int32")
    x = keras.layers.Embedding(words, width)(inputs)
    for _ in range(2):
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.MultiHeadAttention(4, width // 4)(y, y)
        x = keras.layers.Add()([x, y])
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.Dense(4 * width, activation="gelu")(y)
        x = keras.layers.Add()([x, keras.layers.Dense(width)(y)])
    outputs = keras.layers.Dense(words, dtype="float32")(x)
    return keras.Model(inputs, outputs)


MODELS = {"mlp": mlp, "cnn": cnn, "transformer": transformer}
POLICIES = {
    "mlp": ("float32", "mixed_bfloat16", "mixed_float16"),
    "cnn": ("float32", "mixed_bfloat16"),
    "transformer": ("float32", "mixed_bfloat16"),
}


def examples(name):
    """Returns an `x` and a `y` of a few examples."""
    rng = np.random.default_rng(0)
    if name == "transformer":
        return rng.integers(0, 5000, (2, POOL, 128))
    shape = {"mlp": (784,), "cnn": (64, 64, 3)}[name]
    x = rng.normal(size=(POOL, *shape)).astype("float32")
    return x, rng.integers(0, 10, POOL)


def make(name, policy):
    """Returns a compiled model, and an `x` and a `y` of a few examples."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    model = MODELS[name]()
    model.compile(
        "adam",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model, *examples(name)


def many(name, policy):
    """Returns what `make` does, of so many examples as `ARRAYS` says."""
    model, x, y = make(name, policy)
    times = ARRAYS[name] // POOL
    return model, np.concatenate([x] * times), np.concatenate([y] * times)


def batches(x, y, size):
    """Returns a dataset that reads two batches ahead."""
    pool = tf.data.Dataset.from_tensor_slices((x, y))
    return pool.repeat(EXAMPLES // POOL).batch(size).prefetch(2)
