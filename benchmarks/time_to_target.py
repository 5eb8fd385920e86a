"""Seconds, examples and updates to a test accuracy, method by method.

Four sweeps on the same data, models and seeds:

- `plain`: `model.fit` at fixed sizes, the rate scaled linearly from 32;
- `spe`: the same with `steps_per_execution`, as many steps as fit between two
  looks at the test set, at most 64;
- `loop`: the same sizes through the trainer with policy="fixed", which shows
  what the loop alone gains;
- policies, started from 32 with one rate, untuned. `plateau` is
  `GrowOnPlateau("loss", patience=1)`, `schedule` doubles the size with each
  epoch, up to 1024, `measure` changes nothing and shows what measuring costs.

The test set is looked at every `--interval` examples, off the clock. Tracing
is off the clock, too, and printed beside it: the step in which a graph was
traced counts as long as the others of its size.

    python benchmarks/time_to_target.py --model mlp --seeds 3
"""

import argparse
import contextlib
import gc
import statistics
import time

import keras
import numpy as np
import tensorflow as tf
import workloads

import keras_batchsize as kb
from keras_batchsize.train_function import AdaptiveTrainFunction

SIZES = (16, 32, 64, 128, 256, 512, 1024)
BASE = 32
MOST_STEPS = 64
METHODS = (
    ("goodput", "auto"),
    ("goodput", "adascale"),
    ("goodput", "sqrt"),
    ("goodput", "none"),
    ("noise_scale", "linear"),
    ("norm_test", "linear"),
    ("cosine", "linear"),
    ("cabs", "linear"),
    ("diversity", "linear"),
    ("plateau", "none"),
    ("schedule", "linear"),
    ("measure", "none"),
)
# What these names stand for; the others are names of the library.
STATED = {
    "plateau": lambda: kb.policies.GrowOnPlateau(monitor="loss", patience=1),
    "schedule": lambda: kb.policies.BatchSizeSchedule(
        lambda epoch: min(BASE * 2**epoch, SIZES[-1])
    ),
}


class Clock(keras.callbacks.Callback):
    """Times training steps and stops at the target.

    Args:
        data: Test set.
        target: Accuracy to reach.
        interval: Examples between two looks at the test set.
        batch_size: Examples per Keras step under plain `fit`.
    """

    def __init__(self, data, target, interval, batch_size):
        super().__init__()
        self._data, self._target = data, target
        self._interval, self._batch_size = interval, batch_size
        self.examples = self.updates = 0
        self.reached = False
        self.tracing = 0.0
        self._steps, self._next = [], interval
        self._batches = 0

    def on_train_begin(self, logs=None):
        """Makes the function that looks at the test set."""
        model, (x, y) = self.model, self._data

        @tf.function
        def accuracy():
            answers = tf.argmax(model(x, training=False), axis=1)
            right = tf.cast(answers, y.dtype) == y
            return tf.reduce_mean(tf.cast(right, tf.float32))

        self._accuracy = accuracy
        accuracy()
        self._started = time.perf_counter()

    def on_epoch_begin(self, epoch, logs=None):
        """Starts the clock."""
        self._batches = 0
        self._started = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        """Books the step; looks at the test set off the clock.

        Under plain `fit` a ragged last batch counts as a whole one.
        """
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        examples, size, traced = self._step(batch)
        self._steps.append((seconds, examples, size, traced))
        self.examples += examples
        if self.examples >= self._next:
            self._next += self._interval
            self.reached = float(self._accuracy()) >= self._target
            self.model.stop_training = self.reached
        self._started = time.perf_counter()

    def _step(self, batch):
        function, size = self.model.train_function, self._batch_size
        if not isinstance(function, AdaptiveTrainFunction):
            # Keras counts a last call of fewer steps in full.
            done = min(batch + 1, self.params["steps"])
            steps, self._batches = done - self._batches, done
            self.updates += steps
            return steps * size, size, not self._steps
        controller = function.controller
        self.updates = controller.updates
        last = controller.last
        return last.examples, controller.batch_size, last.traced

    def seconds(self):
        """Seconds of training, without tracing."""
        rates = {}
        for seconds, examples, size, traced in self._steps:
            if not traced:
                rates.setdefault(size, []).append(seconds / examples)
        total = 0.0
        for seconds, examples, size, traced in self._steps:
            if traced:
                rate = statistics.median(rates.get(size, [0.0]))
                self.tracing += seconds - rate * examples
                seconds = rate * examples
            total += seconds
        return total


def run(options, data, seed, method, size):
    """Trains once; returns (seconds, examples, updates, tracing seconds)."""
    train, test = data
    # Collecting what the graphs of earlier models leave behind takes half a
    # second and more, and would fall into the tracing of one method or another.
    gc.collect()
    rate = options.learning_rate * size / BASE
    model = workloads.make(
        options.model, train[0].shape[1], seed, learning_rate=rate
    )
    clock = Clock(test, options.target, options.interval, size)
    arguments = dict(
        epochs=options.epochs, batch_size=size, verbose=0, callbacks=[clock]
    )
    if method == "spe":
        model.steps_per_execution = min(MOST_STEPS, options.interval // size)
    if method in ("plain", "spe"):
        model.fit(*train, **arguments)
    elif method == "loop":
        kb.fit(model, *train, policy="fixed", **arguments)
    else:
        name, rule = method.split("/")
        policy = STATED[name]() if name in STATED else name
        trainer = kb.AdaptiveTrainer(model, policy, rule, verbose=0)
        trainer.fit(*train, **arguments)
        if options.verbose:
            trainer.report.summary(print_fn=print)
    seconds = clock.seconds()
    if not clock.reached:
        return np.inf, np.inf, np.inf, clock.tracing
    return seconds, clock.examples, clock.updates, clock.tracing


def measure(options):
    """Runs all methods and prints a line each, medians over the seeds.

    Every seed goes through all methods before the next one starts, so that a
    slow time of the machine does not meet one method only.
    """
    data = workloads.load(options.data, options.path)
    wanted = [("plain", size) for size in SIZES]
    wanted += [("spe", size) for size in SIZES]
    wanted += [("loop", size) for size in SIZES]
    wanted += [(f"{policy}/{rule}", BASE) for policy, rule in METHODS]
    if options.only:
        wanted = [
            one for one in wanted if f"{one[0]}-{one[1]}" in options.only
        ]
    seeds = []
    # Half an hour and more: Ctrl-C ends with what there is.
    with contextlib.suppress(KeyboardInterrupt):
        for seed in range(options.seeds):
            seeds.append([run(options, data, seed, *one) for one in wanted])
    print(
        f"{options.model} on {options.data}, {options.target:.1%} test "
        f"accuracy, rate {options.learning_rate} at {BASE}, median of "
        f"{len(seeds)} seeds\n\n"
        "| method | from | seconds | (min to max) | examples | updates "
        "| tracing s |\n|---|---|---|---|---|---|---|"
    )
    middle = len(seeds) // 2
    for (method, size), results in zip(wanted, zip(*seeds)):
        seconds, examples, updates, tracing = map(sorted, zip(*results))
        print(
            f"| {method} | {size} | {seconds[middle]:.2f} | "
            f"{seconds[0]:.2f} to {seconds[-1]:.2f} | "
            f"{examples[middle]:,.0f} | {updates[middle]:,.0f} | "
            f"{tracing[middle]:.1f} |"
        )


def main():
    """Reads the options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=workloads.MODELS, default="mlp")
    parser.add_argument("--data", choices=("mnist", "digits"), default="mnist")
    parser.add_argument("--path", help="file that holds MNIST")
    parser.add_argument("--target", type=float, default=0.975)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--interval", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="such as loop-32")
    parser.add_argument("--verbose", action="store_true")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
