"""Two searches over batch size and learning rate, with as many trials each.

- `plain`: KerasTuner as it is, both as hyperparameters: `batch_size` goes to
  `model.fit`, the rate to the optimizer.
- `wrapper`: `kbt.AdaptiveHyperModel` over the same two axes, the size held
  fixed in a trial (with another `--policy` it is where that starts from), the
  rate searched at a reference batch size and carried to the trial's size by the
  linear rule.

Both have the same sizes, seeds and knowledge of the rate: a range at batch size
256. The wrapper searches that; plain KerasTuner the smallest range that holds
the rates which that means for any of the sizes. They take turns, trial by
trial, which is why Hyperband, who decides how many there are, is no choice. The
best setting of each is then trained anew with other seeds and looked at on the
test set: the value of the best of many trials is partly luck.

    python benchmarks/tuner_search.py --trials 20 --seeds 0 1 2
"""

import argparse
import math
import statistics
import tempfile
import time

import keras
import keras_tuner
import workloads

import keras_batchsize as kb
from keras_batchsize import tuner as kbt

SIZES = (16, 512)
REFERENCE = 256
# At the reference batch size, and at any.
RATES = (0.03, 1.0)
ALL_RATES = tuple(
    rate * size / REFERENCE for rate, size in zip(RATES, SIZES, strict=True)
)
# Those that are told a number of trials, and need no grid.
TUNERS = ("RandomSearch", "BayesianOptimization")
# Seeds of the trainings anew, of which the mean is printed.
ANEW = (101, 102, 103)


class Plain(keras_tuner.HyperModel):
    """Batch size and rate as KerasTuner's guide has it.

    Args:
        options: Parsed options.
        side: Pixels of a side of an image.
    """

    def __init__(self, options, side):
        super().__init__()
        self._options, self._side = options, side

    def declare_hyperparameters(self, hp):
        """Before the first trial, else that has the default of both."""
        kbt.hp_batch_size(hp, *SIZES, name="batch_size")
        hp.Float("learning_rate", *ALL_RATES, sampling="log")

    def build(self, hp):
        """Makes the model with the rate of the trial."""
        rate = hp.Float("learning_rate", *ALL_RATES, sampling="log")
        return make(self._options, self._side, 0, rate)

    def fit(self, hp, model, *args, **kwargs):
        """Trains with the batch size of the trial."""
        size = kbt.hp_batch_size(hp, *SIZES, name="batch_size")
        return model.fit(*args, batch_size=size, **kwargs)

    def setting(self, hp):
        """Returns the rate, and arguments of `kb.fit` that train as a trial."""
        size = hp.get("batch_size")
        return hp.get("learning_rate"), {"batch_size": size, "policy": "fixed"}


def make(options, side, seed, rate):
    """Returns a compiled model of known initial weights."""
    return workloads.make(options.model, side, seed, learning_rate=rate)


class Wrapper(kbt.AdaptiveHyperModel):
    """The same by `AdaptiveHyperModel`.

    Args:
        options: Parsed options.
        side: Pixels of a side of an image.
    """

    def __init__(self, options, side):
        space = kbt.BatchSizeSpace(
            initial=SIZES,
            policies=[options.policy],
            learning_rate_rules=["linear"],
            learning_rate=RATES,
            reference_batch_size=REFERENCE,
        )
        super().__init__(lambda hp: make(options, side, 0, RATES[0]), space)

    def setting(self, hp):
        """The same, the rate carried to the batch size."""
        setting = self.space.setting(hp)
        return float(self.build(hp).optimizer.learning_rate), {
            "batch_size": setting.initial,
            "policy": setting.policy,
            "learning_rate_scaling": setting.rule,
            "max_batch_size": self.space.max_batch_size,
        }


def make_tuner(options, hypermodel, seed, directory):
    """Returns a tuner that has not begun."""
    return getattr(keras_tuner, options.tuner)(
        hypermodel,
        objective="val_accuracy",
        max_trials=options.trials,
        # Oracles count their seed up with each draw: the sequences of
        # neighbouring seeds are the same but for a shift.
        seed=1000 * (seed + 1),
        directory=directory,
        project_name=type(hypermodel).__name__,
    )


def search(options, tuners, train, validation):
    """Searches with both by turns; returns the seconds of each."""
    seconds = [0.0] * len(tuners)
    for trial in range(options.trials):
        for index, tuner in enumerate(tuners):
            tuner.oracle.max_trials = trial + 1
            started = time.perf_counter()
            tuner.search(
                *train,
                validation_data=validation,
                epochs=options.epochs,
                verbose=0,
            )
            seconds[index] += time.perf_counter() - started
    return seconds


def anew(options, setting, train, test):
    """Returns the mean test accuracy of a setting, trained anew."""
    rate, arguments = setting
    accuracies = []
    for seed in ANEW:
        model = make(options, train[0].shape[1], seed, rate)
        kb.fit(
            model,
            *train,
            epochs=options.epochs,
            verbose=0,
            **arguments,
        )
        accuracies.append(model.evaluate(*test, verbose=0)[1])
    return statistics.mean(accuracies)


def measure(options):
    """Runs both searches with each seed, prints a line each."""
    (x, y), test = workloads.load("mnist", options.path)
    count = options.examples
    train = x[:count], y[:count]
    validation = x[-10000:], y[-10000:]
    print(
        f"{options.model} on {count:,} examples of MNIST, {options.tuner}, "
        f"{options.trials} trials of {options.epochs} epochs, sizes "
        f"{SIZES[0]} to {SIZES[1]}, rates {RATES[0]:g} to {RATES[1]:g} at "
        f"{REFERENCE}, that is {ALL_RATES[0]:.2g} to {ALL_RATES[1]:g}\n\n"
        "| seed | search | seconds | best val. accuracy | batch size | rate "
        "| test accuracy, anew |\n|---|---|---|---|---|---|---|"
    )
    rows = {Plain: [], Wrapper: []}
    for seed in options.seeds:
        keras.utils.set_random_seed(seed)
        models = [kind(options, x.shape[1]) for kind in rows]
        with tempfile.TemporaryDirectory() as directory:
            tuners = [make_tuner(options, m, seed, directory) for m in models]
            seconds = search(options, tuners, train, validation)
        for model, tuner, spent in zip(models, tuners, seconds):
            best = tuner.oracle.get_best_trials(1)[0]
            setting = model.setting(best.hyperparameters)
            accuracy = anew(options, setting, train, test)
            rate, size = setting[0], setting[1]["batch_size"]
            rows[type(model)].append((spent, best.score, accuracy))
            print(
                f"| {seed} | {type(model).__name__.lower()} | {spent:.1f} | "
                f"{best.score:.4f} | {size} | {rate:.4f} | {accuracy:.4f} |",
                flush=True,
            )
    summarise(rows)


def summarise(rows):
    """Prints what the wrapper is to plain KerasTuner."""
    pairs = list(zip(rows[Wrapper], rows[Plain], strict=True))
    ratio = math.exp(statistics.mean(math.log(a[0] / b[0]) for a, b in pairs))
    found = statistics.mean(a[1] - b[1] for a, b in pairs)
    better = statistics.mean(a[2] - b[2] for a, b in pairs)
    print(
        f"\nWrapper against plain: {ratio:.2f} times the seconds (geometric "
        f"mean), {found:+.4f} validation accuracy of the best trial, "
        f"{better:+.4f} test accuracy anew (means)"
    )


def main():
    """Reads the options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=workloads.MODELS, default="mlp")
    parser.add_argument("--path", help="file that holds MNIST")
    parser.add_argument("--tuner", choices=TUNERS, default=TUNERS[0])
    parser.add_argument(
        "--policy", choices=sorted(kb.policies.POLICIES), default="fixed"
    )
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--examples", type=int, default=10000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
