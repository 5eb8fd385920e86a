"""What writing for TensorBoard costs a training.

Every moment that training spends in our callback is timed: the listeners that
the train function calls and the hooks that Keras calls. So the share is
measured within one training, not as a difference of two noisy ones.

- `ms at once`: median time after a superbatch, in which its values are noted;
- `ms in all`: all of it while training, divided by the number of superbatches:
  events, files, changes, flushing and pictures included;
- `share`: the same, divided by the training's seconds (as the report counts
  them, without validation);
- `at the end`: milliseconds after the last update, with the last picture;
- `with / without`: seconds of training with it by those without, the median
  of pairs made one after the other: what is left is the machine's noise.

    python benchmarks/tensorboard_cost.py --model mlp
"""

import argparse
import statistics
import tempfile
import time

import keras
import workloads

import keras_batchsize as kb


class Timed:
    """Wraps functions and adds up the seconds spent in them."""

    def __init__(self):
        self.seconds = []

    def wrap(self, function):
        """Returns a function that does the same, timed."""

        def timed(*arguments, **options):
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds.append(time.perf_counter() - started)

        return timed


class TimedBoard(kb.BatchSizeTensorBoard):
    """The callback, with everything in it timed."""

    def on_train_begin(self, logs=None):
        """Starts with empty clocks."""
        self.rows, self.hooks, self.end = Timed(), Timed(), Timed()
        super().on_train_begin(logs)

    def on_train_batch_begin(self, batch, logs=None):
        """Times the listeners as soon as there are any."""
        before = self._recorder
        self.hooks.wrap(super().on_train_batch_begin)(batch, logs)
        if before is None:
            function = self.model.train_function
            for listeners, clock in (
                (function.on_superbatch, self.rows),
                (function.on_decision, self.hooks),
            ):
                ours = listeners.pop()
                listeners.append(clock.wrap(ours))

    def on_epoch_end(self, epoch, logs=None):
        """Times what an epoch's end costs."""
        self.hooks.wrap(super().on_epoch_end)(epoch, logs)

    def on_train_end(self, logs=None):
        """Times what comes after training."""
        self.end.wrap(super().on_train_end)(logs)


def train(options, data, board=None):
    """Trains; returns the report."""
    trainer = kb.AdaptiveTrainer(workloads.make(options.model), verbose=0)
    trainer.tensorboard = board
    trainer.fit(
        *data,
        batch_size=options.batch_size,
        epochs=options.epochs,
        verbose=0,
    )
    return trainer.report


def main():
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=workloads.MODELS, default="mlp")
    parser.add_argument("--path", help="file that holds MNIST")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    data, _ = workloads.load("mnist", options.path)
    ratios, shares, medians, means, ends = [], [], [], [], []
    for _ in range(options.pairs):
        keras.utils.clear_session()
        without = train(options, data).seconds
        with tempfile.TemporaryDirectory() as folder:
            board = TimedBoard(folder)
            report = train(options, data, board)
        inside = sum(board.rows.seconds) + sum(board.hooks.seconds)
        ratios.append((report.seconds + inside) / without)
        shares.append(inside / report.seconds)
        means.append(1e3 * inside / len(board.rows.seconds))
        medians.append(1e3 * statistics.median(board.rows.seconds))
        ends.append(1e3 * sum(board.end.seconds))
    print(
        f"{options.model}, MNIST, {options.epochs} epochs from "
        f"{options.batch_size}, median of {options.pairs} pairs\n\n"
        "| superbatches | ms at once | ms in all | share | at the end, ms "
        "| with / without |\n|---|---|---|---|---|---|\n"
        f"| {len(board.rows.seconds)} | {statistics.median(medians):.3f} "
        f"| {statistics.median(means):.3f} "
        f"| {statistics.median(shares):.2%} | {statistics.median(ends):.0f} "
        f"| {statistics.median(ratios):.2f} |"
    )


if __name__ == "__main__":
    main()
