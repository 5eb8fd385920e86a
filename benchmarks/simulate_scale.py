"""Time to target and efficiency on 1 to 4096 replicas, simulated.

Measured here, on one device: a model is trained to a test accuracy with
policy="measure", which tells the noise scale along the way; then at larger
fixed sizes, which tells the time of an update, and how many updates they need
in fact. Or all of this is read from the report of an earlier training
(`--report`, a file of `Report.save`). Simulated on top of it: R replicas and a
network, as the options state it; `simulation.py` says what is assumed.

For each R: the base batch size shared by all replicas (strong scaling), the
base batch size for each of them (weak scaling), the best fixed size, found
afterwards, and the adaptive size, started from the base and decided by
`policies.Goodput`. Efficiency is the speed-up over the same method at R = 1,
divided by R.

    python benchmarks/simulate_scale.py --plot scaling.png
"""

import argparse
import math

import simulation

from keras_batchsize import scaling
from keras_batchsize import throughput
from keras_batchsize.report import Report

BYTES_OF_FLOAT32 = 4
# Okabe and Ito, apart for the colour-blind.
COLOURS = {
    "base": "#D55E00",
    "base per replica": "#E69F00",
    "best fixed": "0.5",
    "adaptive": "#0072B2",
}


def measure(options):
    """Trains at several sizes; returns the `Report` of the base size.

    Its settings tell beside it `timings`, `updates_to_target`, by batch size,
    `gradient_bytes` and `target`.
    """
    import workloads

    data = workloads.load(options.data, options.path)
    base, timings, updates = options.sizes[0], {}, {}
    report, seen = _train(options, data, base, options.learning_rate)
    timings.update(seen["timings"])
    updates[base] = seen["updates"]
    if not seen["reached"]:
        raise SystemExit(
            f"The base size did not reach {options.target:.1%} in "
            f"{options.epochs} epochs. Use a lower --target or more --epochs."
        )
    # The rate that the law of progress assumes: its eq. 2.6 says how the best
    # rate grows with the batch, and that is the rule named AdaScale.
    scale = report.rows[-1].noise_scale / base
    for size in options.sizes[1:]:
        factor = scaling.adascale(size / base, scale)
        rate = options.learning_rate * factor
        _, seen = _train(options, data, size, rate)
        timings.update(seen["timings"])
        updates[size] = seen["updates"] if seen["reached"] else None
    report.settings.update(
        timings=timings,
        updates_to_target=updates,
        gradient_bytes=seen["parameters"] * BYTES_OF_FLOAT32,
        target=f"{options.target:.1%} test accuracy, {options.model} on "
        f"{options.data}, rate {options.learning_rate} at {base}",
    )
    return report


def _train(options, data, size, rate):
    import time_to_target
    import workloads

    import keras_batchsize as kb

    train, test = data
    model = workloads.make(
        options.model, train[0].shape[1], options.seed, learning_rate=rate
    )
    clock = time_to_target.Clock(
        test, options.target, options.interval, size
    )
    is_base = size == options.sizes[0]
    trainer = kb.AdaptiveTrainer(
        model, "measure" if is_base else "fixed", verbose=0
    )
    trainer.fit(
        *train,
        batch_size=size,
        epochs=options.epochs,
        verbose=0,
        callbacks=[clock],
    )
    seen = {
        "timings": trainer.get_state()["timings"],
        "reached": clock.reached,
        "updates": clock.updates,
        "parameters": sum(
            math.prod(one.shape) for one in model.trainable_variables
        ),
    }
    return trainer.report, seen


def step_time_of(report):
    """Returns the `StepTime` of one device, and the largest size timed."""
    timings = report.settings.get("timings")
    if timings is None:
        pairs = [
            (row.batch_size, row.batch_size / row.examples_per_second)
            for row in report.rows
        ]
    else:
        pairs = [
            (int(size), seconds)
            for size, several in timings.items()
            for seconds in several
        ]
    sizes, seconds = zip(*pairs)
    return throughput.fit_step_time(sizes, seconds), max(sizes)


def simulate(report, options):
    """Returns dict from numbers of replicas to dict from methods to `Run`."""
    step_time, largest = step_time_of(report)
    pieces = simulation.course(report.rows, options.noise_factor)
    network = simulation.Network(
        options.latency, options.bandwidth, options.all_reduce
    )
    size, base = gradient_bytes(report, options), base_of(report)
    runs = {}
    for replicas in sorted({1, *options.replicas}):
        cluster = simulation.Cluster(
            replicas, step_time, network.seconds(replicas, size)
        )
        runs[replicas] = simulation.simulate(pieces, cluster, base, largest)
    return runs


def base_of(report):
    """Returns the base batch size, in examples."""
    return report.settings["base_batch_size"]


def gradient_bytes(report, options):
    """Returns the bytes that an update sends: stated, or the model's."""
    size = options.gradient_bytes or report.settings.get("gradient_bytes")
    if size is None:
        raise SystemExit(
            "The report does not tell the size of the model. Use "
            "--gradient-bytes, four times its number of parameters."
        )
    return size


def print_assumptions(report, options):
    """Prints what was measured, what is stated and what is assumed."""
    step_time, largest = step_time_of(report)
    pieces = simulation.course(report.rows, options.noise_factor)
    scales = [piece.noise_scale for piece in pieces]
    target = report.settings.get("target", "the end of the report")
    factor, guess = options.noise_factor, ""
    times = "" if factor == 1.0 else f", times {factor:g} as stated"
    if step_time.guessed:
        guess = ", guessed from one size"
    print(
        f"Measured: {target}.\nBase batch size {base_of(report)}, "
        f"{report.updates:,} updates. Noise scale {scales[0]:,.0f} at the "
        f"start,\n{max(scales):,.0f} at most, {scales[-1]:,.0f} at the "
        f"end{times}. An update takes\n{step_time.fixed * 1e3:.3f} ms + "
        f"{step_time.per_example * 1e6:.2f} µs per example{guess}; no "
        f"replica is given more than {largest}.\n"
        f"Stated: {options.all_reduce} all-reduce of "
        f"{gradient_bytes(report, options):,.0f} bytes, latency "
        f"{options.latency * 1e6:g} µs, {options.bandwidth / 1e9:g} GB/s.\n"
        "Assumed: (S/Smin - 1)(E/Emin - 1) = 1 at the best rate of each size;\n"
        "equal replicas; no overlap of all-reduce and computation; examples\n"
        "never run out; reading and measuring cost nothing."
    )
    needed = report.settings.get("updates_to_target", {})
    for size, updates in list(needed.items())[1:]:
        law = sum(piece.updates(int(size)) for piece in pieces)
        fact = "target not reached" if updates is None else f"{updates:,}"
        print(f"Updates at {size}: {law:,.0f} by that law, in fact {fact}.")


def print_table(runs):
    """Prints a line for each number of replicas and method."""
    efficiencies = simulation.efficiencies(runs)
    print(
        "\n| R | method | batch size | updates | seconds | efficiency |\n"
        "|---|---|---|---|---|---|"
    )
    for replicas, here in runs.items():
        for method, run in here.items():
            sizes = (
                f"{run.first:,}"
                if run.first == run.last
                else f"{run.first:,} to {run.last:,}"
            )
            print(
                f"| {replicas} | {method} | {sizes} | {run.updates:,.0f} | "
                f"{run.seconds:.3g} | {efficiencies[replicas][method]:.3g} |"
            )


def draw(runs, path):
    """Draws seconds, efficiency and last batch size over the replicas."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator
    from matplotlib.ticker import StrMethodFormatter

    efficiencies = simulation.efficiencies(runs)
    quantities = {
        "seconds to the target": lambda r, m: runs[r][m].seconds,
        "efficiency (speed-up / R)": lambda r, m: efficiencies[r][m],
        "batch size at the end": lambda r, m: runs[r][m].last,
    }
    replicas = list(runs)
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True)
    for axes, (title, quantity) in zip(panels, quantities.items()):
        for method in simulation.METHODS:
            axes.plot(
                replicas,
                [quantity(one, method) for one in replicas],
                label=method,
                color=COLOURS[method],
                linestyle=":" if method == "best fixed" else "-",
                marker="o",
                markersize=3.5,
            )
        axes.set_title(title, loc="left")
        axes.set_xlabel("replicas R")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(replicas)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    panels[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panels[0].yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    panels[2].set_yscale("log", base=2)
    panels[2].yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def parser():
    """Returns the options."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = options.add_argument
    add("--latency", type=float, default=10e-6, help="seconds per message")
    add("--bandwidth", type=float, default=1.25e9, help="bytes per second")
    add("--all-reduce", choices=simulation.ALL_REDUCES, default="halving")
    add("--gradient-bytes", type=float, help="default: those of the model")
    add(
        "--replicas",
        type=int,
        nargs="*",
        default=[1, 4, 16, 64, 256, 1024, 4096],
    )
    add(
        "--noise-factor",
        type=float,
        default=1.0,
        help="what the measured noise scale is multiplied by",
    )
    add("--plot", help="picture to draw")
    add("--report", help="report of a training, in place of measuring")
    add("--save", help="where to save what was measured, a .json for --report")
    add("--model", choices=("mlp", "cnn"), default="mlp")
    add("--data", choices=("mnist", "digits"), default="mnist")
    add("--path", help="file that holds MNIST")
    add("--target", type=float, default=0.97)
    add("--learning-rate", type=float, default=0.01)
    add("--interval", type=int, default=6000, help="examples between looks")
    add("--epochs", type=int, default=30, help="at most")
    add("--seed", type=int, default=0)
    add(
        "--sizes",
        type=int,
        nargs="*",
        default=[32, 128, 512, 2048],
        help="batch sizes to measure, the base size first",
    )
    return options


def main():
    """Measures or reads, simulates, prints and draws."""
    options = parser().parse_args()
    if options.report:
        report = Report.load(options.report)
    else:
        report = measure(options)
    if options.save:
        report.save(options.save)
    runs = simulate(report, options)
    print_assumptions(report, options)
    print_table(runs)
    if options.plot:
        draw(runs, options.plot)


if __name__ == "__main__":
    main()
