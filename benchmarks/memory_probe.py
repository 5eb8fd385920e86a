"""The probe against the bars it must keep, and against doubling until failure.

Each line is a model, a dtype policy and a limit that TensorFlow's own
allocator enforces (`TF_CPU_BFC_MEM_LIMIT_IN_MB`), every part of it in a fresh
process:

- the probe finds a batch size;
- another process doubles the size from 2 until it runs out of memory, three
  steps and three of validation each, as Lightning's BatchSizeFinder does;
- as many as `--processes` says train five steps at the size that was found, by
  plain `fit`; the worst of them counts;
- as many do the same at 1.05 times the size, and at still larger ones until
  one of them fails. What the answer is of the largest size that a fresh
  process can run, by what is asked of the answer itself, is printed as a
  range: at least so much of what is just below the size that failed, at most
  so much of what ran. Beyond a size that fails larger ones may run again, as
  they happen to fit the allocator's regions: they do not count, here as in the
  probe itself.

    python benchmarks/memory_probe.py
    python benchmarks/memory_probe.py --models cnn --limits 400
    python benchmarks/memory_probe.py --models cnn --limits 400 --arrays
    python benchmarks/memory_probe.py --models mlp --limits 400 --compare
    python benchmarks/memory_probe.py --models cnn --limits 400 --plot a.png

With `--arrays` the probe and plain `fit` are given arrays, not a pipeline that
reads two batches ahead: `fit` copies them, and Keras keeps more batches ready.
Doubling still reads the pipeline.

Seconds leave out importing and building. What is timed comes first, line by
line: if nothing else runs meanwhile, the times are comparable; the rest of the
table does not depend on that. Where no policy is named, float16, for which a
CPU has no instructions, is measured with the MLP only.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import sys
import time

import fresh_processes
import keras
import memory_models
import numpy as np
import tensorflow as tf

import keras_batchsize as kb

STEPS = 5
# Larger sizes that are tried, as parts of the one that was found.
ABOVE = (1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.4, 1.6, 2.0)
# Examples in memory where policies are compared: more than the largest batch.
COMPARED = {"mlp": 2**14, "cnn": 2**8, "transformer": 2**6}


def run_probe(model, x, y):
    """Probes on a pipeline, and returns what was found."""
    return found_on(model, memory_models.batches(x, y, 32))


def run_probe_of_arrays(model, x, y):
    """Probes on arrays, and returns what was found."""
    return found_on(model, x, y)


def found_on(model, *data):
    """Probes on some data, and returns what was found."""
    started = time.perf_counter()
    profile = kb.find_max_batch_size(model, *data, time_budget=300)
    return {
        "size": profile.max_batch_size,
        "trials": len(profile.rows),
        "failures": sum(row.step_seconds is None for row in profile.rows),
        "reason": profile.reason,
        "seconds": time.perf_counter() - started,
        "summary": str(profile),
    }


def run_fit(model, x, y, size):
    """Trains five steps on a pipeline, and counts those that went well."""
    data = memory_models.batches(x, y, size)
    return steps_done(model, data, steps_per_epoch=STEPS, shuffle=False)


def run_fit_of_arrays(model, x, y, size):
    """Trains on arrays until five steps are made, and counts likewise.

    Whole epochs, with their ragged batches, for as many are in the arrays.
    """
    epochs = math.ceil(STEPS / math.ceil(len(x) / size))
    done = steps_done(model, x, y, batch_size=size, epochs=epochs)
    return min(done, STEPS)


def steps_done(model, *data, **arguments):
    """Trains by plain `fit`, and counts the steps that went well."""
    done = []
    count = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: done.append(batch)
    )
    with contextlib.suppress(tf.errors.ResourceExhaustedError):
        model.fit(*data, verbose=0, callbacks=[count], **arguments)
    return len(done)


def run_doubling(model, x, y):
    """Doubles the size until training runs out of memory."""
    size = 2
    while True:
        try:
            data = memory_models.batches(x, y, size)
            model.fit(data, steps_per_epoch=3, verbose=0, shuffle=False)
            model.evaluate(data, steps=3, verbose=0)
        except tf.errors.ResourceExhaustedError:
            return size // 2
        size *= 2


def run_compare(x, y, name):
    """Compares the dtype policies and returns the table."""
    times = COMPARED[name] // len(x)
    x, y = np.concatenate([x] * times), np.concatenate([y] * times)

    def build():
        return memory_models.make(name, keras.config.dtype_policy().name)[0]

    return str(kb.compare_dtype_policies(build, x, y))


def draw(model, x, y, path):
    """Probes, prints the profile and draws it."""
    profile = kb.find_max_batch_size(
        model, memory_models.batches(x, y, 32), time_budget=300
    )
    profile.summary()
    profile.plot(to_file=path)


def fewest_steps(processes, limit, prepare, fit, size):
    """Returns the fewest steps that a fresh process made at a size.

    Processes run two at a time, and no more once one has failed.
    """
    fewest = STEPS
    for _ in range(math.ceil(processes / 2)):
        ended = fresh_processes.call_all(2, limit, prepare, fit, size)
        fewest = min(fewest, *(0 if one.died else one.said for one in ended))
        if fewest < STEPS:
            break
    return fewest


def share_of_largest(processes, limit, prepare, fit, size):
    """Returns what a size is of the largest that runs, in words."""
    ran = size
    for part in ABOVE:
        larger = math.ceil(part * size)
        if larger == ran:
            # Of few examples, 5 % more and 10 % more are the same.
            continue
        if fewest_steps(processes, limit, prepare, fit, larger) < STEPS:
            # The largest that runs is at least one example smaller.
            least, most = size / (larger - 1), size / ran
            return f"{least:.0%} to {most:.0%}"
        ran = larger
    return f"at most {size / ran:.0%}"


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table, of which all that is timed has run.

    Attributes:
        head: List of its first cells: model, policy and limit.
        limit: Megabytes that the allocator may hand out.
        prepare: Function that makes the model and its examples.
        fit: Function that trains five steps on them.
        probed: `Outcome` of the probe.
        doubled: `Outcome` of doubling.
    """

    head: list
    limit: int
    prepare: object
    fit: object
    probed: fresh_processes.Outcome
    doubled: fresh_processes.Outcome


def timed(name, policy, limit, arrays=False):
    """Probes and doubles, and returns the `Line`."""
    few = functools.partial(memory_models.make, name, policy)
    prepare, probe, fit = few, run_probe, run_fit
    if arrays:
        prepare = functools.partial(memory_models.many, name, policy)
        probe, fit = run_probe_of_arrays, run_fit_of_arrays
    return Line(
        [name, policy, f"{limit}"],
        limit,
        prepare,
        fit,
        fresh_processes.call(limit, prepare, probe),
        fresh_processes.call(limit, few, run_doubling),
    )


def cells(line, arguments):
    """Tries the answer of a line, and returns its cells."""
    if line.probed.died:
        return [*line.head, "died", *["-"] * (len(HEADER) - 4)]
    found, doubled = line.probed.said, line.doubled
    if arguments.verbose:
        print(found["summary"], flush=True)
    size = found["size"]
    tried = arguments.processes, line.limit, line.prepare, line.fit, size
    steps, share = fewest_steps(*tried), "-"
    if steps == STEPS:
        share = share_of_largest(*tried)
    end = "died" if doubled.died else f"{doubled.said:,}"
    return [
        *line.head,
        f"{size:,}",
        found["reason"],
        f"{found['trials']}",
        f"{found['failures']}",
        f"{steps} of {STEPS}",
        share,
        f"{found['seconds']:.1f}",
        f"{doubled.seconds:.1f} ({end})",
        f"{found['seconds'] / doubled.seconds:.2f}",
    ]


HEADER = (
    "model", "policy", "limit MB", "batch size", "ended by", "trials",
    "out of memory", "steps of the worst", "of the largest", "seconds",
    "doubling: seconds (size)", "ratio",
)


def parse():
    """Returns the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--models",
        nargs="+",
        choices=memory_models.MODELS,
        default=list(memory_models.MODELS),
    )
    parser.add_argument(
        "--limits", nargs="+", type=int, default=[200, 400, 800]
    )
    parser.add_argument(
        "--policies", nargs="+",
        help="float32, mixed_bfloat16, and mixed_float16 for the MLP",
    )
    parser.add_argument(
        "--processes", type=int, default=8,
        help="fresh processes in which a size must run",
    )
    parser.add_argument(
        "--arrays", action="store_true",
        help="probe and train on arrays in memory, not on a pipeline",
    )
    parser.add_argument(
        "--compare", action="store_true",
        help="only what kb.compare_dtype_policies says, at the first limit",
    )
    parser.add_argument(
        "--plot",
        help="only probe the first model, at the first limit, and draw it",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="print the profiles, too"
    )
    return parser.parse_args()


def said(limit, prepare, run, *arguments):
    """Returns what a fresh process said; ends the program where it died."""
    outcome = fresh_processes.call(limit, prepare, run, *arguments)
    if outcome.died:
        sys.exit(
            "The process died before it was done: what it raised stands "
            "above, or it was killed, or the limit was too small. Received: "
            f"--limits {limit}. Use --limits {2 * limit}."
        )
    return outcome.said


def main():
    """Runs the parts that are asked for."""
    arguments = parse()
    limit = arguments.limits[0]
    if arguments.plot:
        policy = (arguments.policies or ["float32"])[0]
        prepare = functools.partial(
            memory_models.make, arguments.models[0], policy
        )
        said(limit, prepare, draw, arguments.plot)
    elif arguments.compare:
        for name in arguments.models:
            prepare = functools.partial(memory_models.examples, name)
            table = said(limit, prepare, run_compare, name)
            print(f"{name}\n\n{table}\n", flush=True)
    else:
        print_table(arguments)


def print_table(arguments):
    """Prints a line for each model, policy and limit as it comes."""
    lines = []
    for name in arguments.models:
        for policy in arguments.policies or memory_models.POLICIES[name]:
            for limit in arguments.limits:
                lines.append(timed(name, policy, limit, arguments.arrays))
                print(" ".join(lines[-1].head), "is timed", file=sys.stderr)
    print("| " + " | ".join(HEADER) + " |")
    print("|" + "---|" * len(HEADER), flush=True)
    for line in lines:
        print("| " + " | ".join(cells(line, arguments)) + " |", flush=True)


if __name__ == "__main__":
    main()
