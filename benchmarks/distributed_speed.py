"""Speed under `MirroredStrategy` with the batch size held fixed.

Each line is a batch size; ratios are seconds of an epoch of the other divided
by seconds of the trainer (above 1: the trainer is faster), the median over
pairs of runs made one after the other, in one process with logical CPUs:

- `plain`: `model.fit` under the same strategy, on arrays;
- `tf.data`: the same two on a `tf.data.Dataset` that shuffles and batches;
- `noise free`: the trainer without the norms that measure the noise at every
  update, divided by the trainer with them;
- `one device`: the trainer without a strategy. Logical CPUs share the cores,
  so this is no speed-up but what sharing an update costs.

    python benchmarks/distributed_speed.py --replicas 2
"""

import argparse
import statistics

import keras
import speed
import tensorflow as tf
import workloads

import keras_batchsize as kb


def under(strategy, options):
    """A model made and compiled under a strategy."""
    with strategy.scope():
        return workloads.make(options.model)


def seconds_of(fit, model, options, data, size, **arguments):
    """Seconds of the fastest epoch after the first."""
    times = speed.EpochTimes()
    fit(
        model,
        *data,
        batch_size=size,
        epochs=options.epochs,
        verbose=0,
        callbacks=[times],
        **arguments,
    )
    return speed.undisturbed(times.seconds)


def compare(options, strategy, data, size):
    """Returns the ratios of one round."""

    def ours(model, policy):
        arguments = {"policy": policy, "max_batch_size": size}
        return seconds_of(kb.fit, model, options, data, size, **arguments)

    model = under(strategy, options)
    plain = seconds_of(keras.Model.fit, model, options, data, size)
    dataset = of_dataset(options, strategy, data, size)
    measured = ours(under(strategy, options), "measure")
    fixed = ours(under(strategy, options), "fixed")
    alone = ours(workloads.make(options.model), "fixed")
    return plain / fixed, dataset, fixed / measured, alone / fixed


def of_dataset(options, strategy, data, size):
    """Returns the ratio of plain `fit` and trainer on a dataset."""
    dataset = tf.data.Dataset.from_tensor_slices(tuple(data))
    dataset = dataset.shuffle(len(data[0])).batch(size)
    dataset = [dataset.prefetch(tf.data.AUTOTUNE)]
    model = under(strategy, options)
    plain = seconds_of(keras.Model.fit, model, options, dataset, None)
    arguments = {"policy": "fixed", "max_batch_size": size}
    model = under(strategy, options)
    return plain / seconds_of(
        kb.fit, model, options, dataset, None, **arguments
    )


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=workloads.MODELS, default="mlp")
    parser.add_argument("--path", help="file that holds MNIST")
    parser.add_argument("--examples", type=int, default=16384)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = speed.parsed(parser)
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * options.replicas
    )
    strategy = tf.distribute.MirroredStrategy(
        [f"CPU:{index}" for index in range(options.replicas)]
    )
    train, _ = workloads.load("mnist", options.path)
    data = [one[: options.examples] for one in train]
    keras.utils.set_random_seed(0)
    print("| batch size | plain | tf.data | noise free | one device |")
    print("|---|---|---|---|---|")
    for size in options.sizes:
        rounds = [
            compare(options, strategy, data, size)
            for _ in range(options.rounds)
        ]
        ratios = map(statistics.median, zip(*rounds))
        cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {size} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
