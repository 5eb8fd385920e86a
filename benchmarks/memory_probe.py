"""The probe against the bars it must keep, and against doubling until failure.

Each line is a model, a dtype policy and a limit that TensorFlow's own
allocator enforces (`TF_CPU_BFC_MEM_LIMIT_IN_MB`), every part of it in a process
of its own:

- the probe finds a batch size;
- a fresh process trains five steps at that size, by plain `fit`;
- another one tries a size 1.25 times as large (and so on until one fails):
  if that fails, the answer is at least 80 % of the largest that can be run;
- a third one doubles the size from 2 until it runs out of memory, three steps
  and three of validation each, as Lightning's BatchSizeFinder does.

    python benchmarks/memory_probe.py
    python benchmarks/memory_probe.py --models cnn --limits 400
    python benchmarks/memory_probe.py --models cnn --limits 400 --plot a.png

Seconds leave out importing and building. Run with nothing else on the machine,
they are comparable; the rest of the table does not depend on that.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve()
POOL, EXAMPLES, STEPS = 64, 2**17, 5


def mlp(keras):
    """3 x Dense(1024) with dropout on 784 features, 2.9 M weights."""
    layers = [keras.Input((784,))]
    for _ in range(3):
        layers.append(keras.layers.Dense(1024, activation="relu"))
        layers.append(keras.layers.Dropout(0.5))
    return keras.Sequential(
        [*layers, keras.layers.Dense(10, dtype="float32")]
    )


def cnn(keras):
    """6 x convolution, BatchNorm and ReLU on 64 x 64 x 3, 0.3 M weights."""
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


def transformer(keras):
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


def make(name, policy):
    """Returns a compiled model, and an `x` and a `y` of a few examples."""
    import keras
    import numpy as np

    rng = np.random.default_rng(0)
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    model = MODELS[name](keras)
    if name == "transformer":
        x = rng.integers(0, 5000, (POOL, 128))
        y = rng.integers(0, 5000, (POOL, 128))
    else:
        x = rng.normal(size=(POOL, *model.inputs[0].shape[1:]))
        x, y = x.astype("float32"), rng.integers(0, 10, POOL)
    model.compile(
        "adam",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model, x, y


def batches(x, y, size):
    """Returns a dataset that reads two batches ahead."""
    import tensorflow as tf

    examples = tf.data.Dataset.from_tensor_slices((x, y))
    return examples.repeat(EXAMPLES // POOL).batch(size).prefetch(2)


def run_probe(model, x, y, _):
    """Probes, and returns what was found."""
    import keras_batchsize as kb

    started = time.perf_counter()
    profile = kb.find_max_batch_size(model, batches(x, y, 32), time_budget=300)
    return {
        "size": profile.max_batch_size,
        "trials": len(profile.rows),
        "failures": sum(row.step_seconds is None for row in profile.rows),
        "reason": profile.reason,
        "saturation": profile.saturation_batch_size,
        "seconds": time.perf_counter() - started,
    }


def draw(model, x, y, path):
    """Probes, prints the profile and draws it."""
    import keras_batchsize as kb

    profile = kb.find_max_batch_size(model, batches(x, y, 32), time_budget=300)
    profile.summary()
    profile.plot(to_file=path)


def run_fit(model, x, y, size):
    """Trains five steps by plain `fit`, and counts those that went well."""
    import keras
    import tensorflow as tf

    done = []
    count = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: done.append(batch)
    )
    try:
        model.fit(
            batches(x, y, size),
            steps_per_epoch=STEPS,
            verbose=0,
            callbacks=[count],
        )
    except tf.errors.ResourceExhaustedError:
        pass
    return {"steps": len(done)}


def run_doubling(model, x, y, _):
    """Doubles the size until training runs out of memory."""
    import tensorflow as tf

    started, size, trials = time.perf_counter(), 2, 0
    while True:
        trials += 1
        try:
            data = batches(x, y, size)
            model.fit(data, steps_per_epoch=3, verbose=0)
            model.evaluate(data, steps=3, verbose=0)
        except tf.errors.ResourceExhaustedError:
            break
        size *= 2
    return {
        "size": size // 2,
        "trials": trials,
        "seconds": time.perf_counter() - started,
    }


RUNS = {"probe": run_probe, "fit": run_fit, "doubling": run_doubling}


def child(arguments):
    """One part of a line, in this process."""
    model, x, y = make(arguments.models[0], arguments.policies[0])
    found = RUNS[arguments.run](model, x, y, arguments.size)
    print("RESULT " + json.dumps(found), flush=True)


def in_process(run, name, policy, limit, size=0, timeout=900):
    """Runs a part in a process of its own; None if it did not come back."""
    python = os.environ.get("PYTHON", sys.executable)
    command = [python, str(HERE), "--run", run, "--size", str(size)]
    command += ["--models", name, "--policies", policy]
    environment = {
        **os.environ,
        "TF_CPU_ALLOCATOR_USE_BFC": "true",
        "TF_CPU_BFC_MEM_LIMIT_IN_MB": str(limit),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    try:
        process = subprocess.run(
            command, env=environment, capture_output=True, text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return None
    for line in process.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    return None


def largest_part(name, policy, limit, size):
    """Returns the least share that `size` is of the largest runnable size."""
    tried = size
    for _ in range(4):
        tried = int(tried * 1.25) + 1
        found = in_process("fit", name, policy, limit, tried)
        if found is None or found["steps"] < STEPS:
            return size / (tried - 1)
    return 0.0


def line(name, policy, limit):
    """Returns the cells of a line."""
    head = [name, policy, f"{limit}"]
    found = in_process("probe", name, policy, limit)
    if found is None:
        return [*head, "failed", *["-"] * 8]
    fresh = in_process("fit", name, policy, limit, found["size"])
    share = largest_part(name, policy, limit, found["size"])
    doubling = in_process("doubling", name, policy, limit)
    cells = [
        *head,
        f"{found['size']:,}",
        found["reason"],
        f"{found['trials']}",
        f"{found['failures']}",
        f"{fresh['steps'] if fresh else 0} of {STEPS}",
        f"{share:.0%}" if share else "less than 41%",
        f"{found['seconds']:.1f}",
    ]
    if doubling is None:
        return [*cells, "died", "-"]
    ratio = found["seconds"] / doubling["seconds"]
    return [
        *cells,
        f"{doubling['seconds']:.1f} ({doubling['size']:,})",
        f"{ratio:.2f}",
    ]


HEADER = (
    "model", "policy", "limit MB", "batch size", "ended by", "trials",
    "out of memory", "fresh process", "of the largest, at least", "seconds",
    "doubling: seconds (size)", "ratio",
)


def main():
    """Prints a line for each model, policy and limit as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--limits", nargs="+", type=int,
                        default=[200, 400, 800])
    parser.add_argument("--policies", nargs="+", default=["float32"])
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--plot",
        help="only probe the first model, at the first limit, and draw it",
    )
    arguments = parser.parse_args()
    if arguments.plot:
        os.environ["TF_CPU_ALLOCATOR_USE_BFC"] = "true"
        os.environ["TF_CPU_BFC_MEM_LIMIT_IN_MB"] = str(arguments.limits[0])
        parts = make(arguments.models[0], arguments.policies[0])
        draw(*parts, arguments.plot)
        return
    if arguments.run:
        child(arguments)
        return
    print("| " + " | ".join(HEADER) + " |")
    print("|" + "---|" * len(HEADER), flush=True)
    for name in arguments.models:
        for policy in arguments.policies:
            for limit in arguments.limits:
                cells = line(name, policy, limit)
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
