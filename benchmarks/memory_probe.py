"""The probe against the bars it must keep, and against doubling until failure.

Each line is a model, a dtype policy and a limit that TensorFlow's own
allocator enforces (`TF_CPU_BFC_MEM_LIMIT_IN_MB`), every part of it in a process
of its own:

- the probe finds a batch size;
- another doubles the size from 2 until it runs out of memory, three steps and
  three of validation each, as Lightning's BatchSizeFinder does;
- fresh ones train five steps at the size that was found, by plain `fit`; the
  worst of them counts;
- fresh ones do so at sizes up to 1.25 times as large (and more, while those
  run): the size found is a share of the largest that ran and, at least, of the
  smallest above that did not.

    python benchmarks/memory_probe.py
    python benchmarks/memory_probe.py --models cnn --limits 400
    python benchmarks/memory_probe.py --models mlp --limits 400 --compare
    python benchmarks/memory_probe.py --models cnn --limits 400 --plot a.png

Seconds leave out importing and building. Run with nothing else on the machine,
they are comparable; the rest of the table does not depend on that. Where no
policy is named, float16, for which a CPU has no instructions, is measured with
the MLP only. About 25 minutes in all on two cores.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve()
POOL, EXAMPLES, STEPS = 64, 2**17, 5
# Fresh processes that train at the size that was found.
FRESH = 2
# Sizes above it that are tried, as parts of it: while the last runs, the next.
ABOVE = ((1.0625, 1.125, 1.1875, 1.25), (1.35, 1.5), (1.75, 2.0))
# Examples in memory where policies are compared: more than the largest batch.
COMPARED = {"mlp": 2**14, "cnn": 2**8, "transformer": 2**6}


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
POLICIES = {
    "mlp": ("float32", "mixed_bfloat16", "mixed_float16"),
    "cnn": ("float32", "mixed_bfloat16"),
    "transformer": ("float32", "mixed_bfloat16"),
}


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


def run_compare(_, x, y, name):
    """Compares the dtype policies and returns the table."""
    import keras
    import numpy as np

    import keras_batchsize as kb

    times = COMPARED[name] // POOL
    x, y = np.concatenate([x] * times), np.concatenate([y] * times)
    compared = kb.compare_dtype_policies(
        lambda: make(name, keras.config.dtype_policy().name)[0], x, y
    )
    return {"table": str(compared)}


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
    """Doubles the size until training runs out of memory, or dies of it."""
    import tensorflow as tf

    started, size, trials = time.perf_counter(), 2, 0
    while True:
        trials += 1
        # What is last said counts if the process dies.
        seconds = time.perf_counter() - started
        say({"size": size // 2, "seconds": seconds, "died": True})
        try:
            data = batches(x, y, size)
            model.fit(data, steps_per_epoch=3, verbose=0)
            model.evaluate(data, steps=3, verbose=0)
        except tf.errors.ResourceExhaustedError:
            break
        size *= 2
    return {
        "size": size // 2,
        "seconds": time.perf_counter() - started,
        "died": False,
    }


RUNS = {
    "probe": run_probe,
    "fit": run_fit,
    "doubling": run_doubling,
    "compare": run_compare,
}


def say(found):
    """Tells the parent process what was found so far."""
    sys.stdout.write("RESULT " + json.dumps(found) + "\n")
    sys.stdout.flush()


def child(arguments):
    """One part of a line, in this process."""
    model, x, y = make(arguments.models[0], arguments.policies[0])
    given = arguments.size
    if arguments.run == "compare":
        given = arguments.models[0]
    say(RUNS[arguments.run](model, x, y, given))


def in_process(run, name, policy, limit, size=0, timeout=600):
    """Runs a part in a process of its own.

    Returns:
        Dict of what it said last, None if it said nothing.
    """
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
        sys.stderr.write(f"{command} took more than {timeout} s\n")
        return None
    said = [
        json.loads(line.removeprefix("RESULT "))
        for line in process.stdout.splitlines()
        if line.startswith("RESULT ")
    ]
    if not said:
        sys.stderr.write(
            f"{command} ended with {process.returncode}: "
            f"{process.stderr[-500:]}\n"
        )
    return said[-1] if said else None


def steps_at(name, policy, limit, sizes):
    """Returns the steps that fresh processes made at sizes, two at a time."""

    def run(size):
        found = in_process("fit", name, policy, limit, size)
        return found["steps"] if found else 0

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, sizes))


def share_of_largest(name, policy, limit, size):
    """Returns the least and the most that `size` is of the largest size.

    Args:
        name: Name of the model.
        policy: Name of the dtype policy.
        limit: Limit in MB.
        size: The size that was found, and runs.
    """
    ran, failed = [size], []
    for parts in ABOVE:
        tried = sorted({max(round(size * part), size + 1) for part in parts})
        for one, steps in zip(tried, steps_at(name, policy, limit, tried)):
            (ran if steps == STEPS else failed).append(one)
        if max(failed, default=0) > max(ran):
            break
    largest = max(ran)
    above = min((one for one in failed if one > largest), default=None)
    return size / (above - 1) if above else 0.0, size / largest


def line(name, policy, limit):
    """Returns the cells of a line."""
    head = [name, policy, f"{limit}"]
    found = in_process("probe", name, policy, limit)
    if found is None:
        return [*head, "failed", *["-"] * 8]
    size = found["size"]
    doubling = in_process("doubling", name, policy, limit)
    steps = min(steps_at(name, policy, limit, [size] * FRESH))
    least, most = share_of_largest(name, policy, limit, size)
    share = f"{least:.0%}"
    if f"{most:.0%}" != share:
        share = f"{share} to {most:.0%}"
    died = ", died" if doubling["died"] else ""
    return [
        *head,
        f"{size:,}",
        found["reason"],
        f"{found['trials']}",
        f"{found['failures']}",
        f"{steps} of {STEPS}",
        share,
        f"{found['seconds']:.1f}",
        f"{doubling['seconds']:.1f} ({doubling['size']:,}{died})",
        f"{found['seconds'] / doubling['seconds']:.2f}",
    ]


HEADER = (
    "model", "policy", "limit MB", "batch size", "ended by", "trials",
    "out of memory", "fresh process", "of the largest", "seconds",
    "doubling: seconds (size)", "ratio",
)


def main():
    """Runs the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--limits", nargs="+", type=int,
                        default=[200, 400, 800])
    parser.add_argument(
        "--policies", nargs="+",
        help="float32, mixed_bfloat16, and mixed_float16 for the MLP",
    )
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--compare", action="store_true",
        help="only what kb.compare_dtype_policies says, at the first limit",
    )
    parser.add_argument(
        "--plot",
        help="only probe the first model, at the first limit, and draw it",
    )
    arguments = parser.parse_args()
    if arguments.run:
        child(arguments)
    elif arguments.plot:
        os.environ["TF_CPU_ALLOCATOR_USE_BFC"] = "true"
        os.environ["TF_CPU_BFC_MEM_LIMIT_IN_MB"] = str(arguments.limits[0])
        policy = (arguments.policies or ["float32"])[0]
        draw(*make(arguments.models[0], policy), arguments.plot)
    elif arguments.compare:
        for name in arguments.models:
            found = in_process("compare", name, "float32", arguments.limits[0])
            print(f"{name}\n\n{found['table']}\n", flush=True)
    else:
        print_table(arguments)


def print_table(arguments):
    """Prints a line for each model, policy and limit as it comes."""
    print("| " + " | ".join(HEADER) + " |")
    print("|" + "---|" * len(HEADER), flush=True)
    for name in arguments.models:
        for policy in arguments.policies or POLICIES[name]:
            for limit in arguments.limits:
                cells = line(name, policy, limit)
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
