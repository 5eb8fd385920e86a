"""Speed of the loop with the batch size held fixed, as ratios in one run.

Each line is one model and batch size. Ratios are seconds of the other divided
by seconds of the trainer (above 1: the trainer is faster), each the median
over pairs of runs made one after the other. Of a run the fastest epoch counts:
other work on the machine only ever adds time.

- `plain`: `model.fit`;
- `spe`: `model.fit` with the best of several `steps_per_execution`;
- `bare`: a hand-written in-graph loop over the whole epoch that also updates
  loss and accuracy, the least that TensorFlow can do;
- `at most`: `model.fit` against that bare loop, which is what `plain` would be
  if nothing but the operations of the updates took time;
- `measuring`: share of the training time that measuring the noise took, with
  policy="measure" and measure_every="auto", of two fits one after the other, as
  a second spends what the first has left; the first six measurements, which are
  not charged, do not count.

    python benchmarks/speed.py --model mlp
"""

import argparse
import statistics
import time

import keras
import tensorflow as tf
import workloads

import keras_batchsize as kb


class EpochTimes(keras.callbacks.Callback):
    """Seconds of each epoch."""

    def on_train_begin(self, logs=None):
        """Forgets an earlier training."""
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        """Starts the clock."""
        self._started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Stops the clock."""
        self.seconds.append(time.perf_counter() - self._started)


def parsed(parser):
    """The options; refuses what would leave no epoch but the first."""
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error(
            "--epochs must be at least 2: the first one traces, and the "
            f"fastest of the others counts. Received: {options.epochs}. Use "
            "--epochs 2."
        )
    return options


def undisturbed(seconds):
    """The fastest of the epochs after the first, which traces."""
    return min(seconds[1:])


def epoch_of(fit, options, model, data, size, **rest):
    """Seconds of an epoch of `fit`, called with a model and data."""
    times = EpochTimes()
    fit(
        model,
        *data,
        batch_size=size,
        epochs=options.epochs,
        verbose=0,
        callbacks=[times],
        **rest,
    )
    return undisturbed(times.seconds)


def plain(options, data, size, steps=1):
    """Seconds of an epoch of `model.fit`, `steps` steps per execution."""
    model = workloads.make(options.model, steps_per_execution=steps)
    return epoch_of(keras.Model.fit, options, model, data, size)


def trainer(options, data, size):
    """Seconds of an epoch of the trainer, size held fixed."""
    model = workloads.make(options.model)
    return epoch_of(kb.fit, options, model, data, size, policy="fixed")


def bare(options, data, size):
    """Seconds of an epoch of a loop that does nothing but train."""
    model = workloads.make(options.model)
    x, y = (tf.constant(one) for one in data)
    count = x.shape[0]
    model.optimizer.build(model.trainable_variables)
    accuracy = keras.metrics.SparseCategoricalAccuracy()
    mean = keras.metrics.Mean()

    @tf.function
    def epoch(order):
        def body(start):
            rows = order[start : start + size]
            batch, target = tf.gather(x, rows), tf.gather(y, rows)
            with tf.GradientTape() as tape:
                answer = model(batch, training=True)
                loss = model.loss(target, answer)
            gradients = tape.gradient(loss, model.trainable_variables)
            model.optimizer.apply_gradients(
                zip(gradients, model.trainable_variables)
            )
            mean.update_state(loss, sample_weight=tf.shape(rows)[0])
            accuracy.update_state(target, answer)
            return (start + size,)

        tf.while_loop(
            lambda start: start < count,
            body,
            (tf.constant(0),),
            parallel_iterations=1,
        )
        return mean.result(), accuracy.result()

    seconds = []
    for _ in range(options.epochs):
        started = time.perf_counter()
        mean.reset_state()
        accuracy.reset_state()
        result = epoch(tf.random.shuffle(tf.range(count)))
        [float(one) for one in result]
        seconds.append(time.perf_counter() - started)
    return undisturbed(seconds)


def measuring(options, data, size):
    """Share of the time of two fits that measuring took."""
    run = kb.AdaptiveTrainer(
        workloads.make(options.model), "measure", verbose=0
    )
    spent = trained = 0.0
    for _ in range(2):
        run.fit(*data, batch_size=size, epochs=options.epochs, verbose=0)
        rows = run.report.rows
        # Without the first superbatch, in which graphs are traced.
        seconds = rows[-1].seconds - rows[0].seconds
        spent += seconds * run.report.settings["measuring_share"]
        trained += seconds
    return spent / trained


def best_steps_per_execution(options, data, size):
    """The `steps_per_execution` with which `fit` is fastest."""
    return min(
        (4, 16, 64), key=lambda steps: plain(options, data, size, steps)
    )


def main():
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=workloads.MODELS, default="mlp")
    parser.add_argument("--path", help="file that holds MNIST")
    parser.add_argument("--examples", type=int, default=16384)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[2**i for i in range(4, 11)]
    )
    options = parsed(parser)
    train, _ = workloads.load("mnist", options.path)
    data = [one[: options.examples] for one in train]
    print(
        f"{options.model}, {options.examples} examples of MNIST, median of "
        f"{options.pairs} pairs\n\n| batch size | plain | spe (best) "
        "| bare | at most | measuring |\n|---|---|---|---|---|---|"
    )
    for size in options.sizes:
        steps = best_steps_per_execution(options, data, size)
        ratios = [[], [], [], []]
        for _ in range(options.pairs):
            others = (
                lambda: plain(options, data, size),
                lambda: plain(options, data, size, steps),
                lambda: bare(options, data, size),
            )
            theirs, ours = zip(
                *((one(), trainer(options, data, size)) for one in others)
            )
            for ratio, seconds, own in zip(ratios, theirs, ours):
                ratio.append(seconds / own)
            ratios[3].append(theirs[0] / theirs[2])
        a, b, c, most = map(statistics.median, ratios)
        share = measuring(options, data, size)
        print(
            f"| {size} | {a:.2f} | {b:.2f} ({steps}) | {c:.2f} "
            f"| {most:.2f} | {share:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
