"""Searches batch size, policy and learning rate for the shortest training.

    python examples/tune.py                    # digits, from scikit-learn
    python examples/tune.py --data mnist       # from Keras's cache or net

Hyperband looks for the setting that reaches an accuracy in the least time, on
a fifth of the training data that is kept apart. It ends with the best trial,
and with how long that setting takes, trained anew, on the test set, which it
has not seen, against plain `fit` with a batch size of 32.
"""

import argparse
import pathlib
import statistics
import tempfile

import keras
import keras_tuner
import numpy as np

import keras_batchsize as kb
from keras_batchsize import tuner as kbt

# Part of the training data by which settings are judged.
VALIDATION = 0.2
# Accuracy to reach, seconds that a trial may take, epochs of the longest
# trials, initial batch sizes.
SETTINGS = {
    "digits": (0.97, 20.0, 16, (16, 128)),
    "mnist": (0.97, 60.0, 8, (16, 512)),
}
SEEDS = 3


def load(name):
    """Returns ((x_train, y_train), (x_test, y_test)), pixels in [0, 1]."""
    if name == "mnist":
        train, test = keras.datasets.mnist.load_data()
        return (train[0] / 255.0, train[1]), (test[0] / 255.0, test[1])
    from sklearn.datasets import load_digits

    digits = load_digits()
    # The last ones are of other hands, and harder: shuffled here.
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = digits.images[order] / 16.0, digits.target[order]
    return (x[:1400], y[:1400]), (x[1400:], y[1400:])


def make_build(input_shape):
    """Returns a function that builds a model; it knows of no batch size."""

    def build(hp):
        model = keras.Sequential(
            [
                keras.Input(input_shape),
                keras.layers.Flatten(),
                keras.layers.Dense(
                    hp.Choice("units", [64, 128]), activation="relu"
                ),
                keras.layers.Dense(10),
            ]
        )
        model.compile(
            optimizer=keras.optimizers.SGD(momentum=0.9),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        return model

    return build


def search(data, settings, directory):
    """Runs Hyperband; returns the tuner."""
    (x, y), _ = data
    target, budget, epochs, sizes = settings
    keras.utils.set_random_seed(0)
    hypermodel = kbt.AdaptiveHyperModel(
        make_build(x.shape[1:]),
        kbt.BatchSizeSpace(
            initial=sizes,
            max_batch_size=1024,
            learning_rate_rules=("linear",),
            # At a batch size of 256, carried to others by the rule.
            learning_rate=(0.02, 2.0),
        ),
        target=kbt.Target("val_accuracy", target, budget_seconds=budget),
    )
    tuner = keras_tuner.Hyperband(
        hypermodel,
        objective=keras_tuner.Objective("time_to_target", "min"),
        max_epochs=epochs,
        seed=0,
        directory=directory,
    )
    tuner.search(x, y, validation_split=VALIDATION, verbose=0)
    return tuner


def number_of_arrivals(trials, budget):
    """Returns how many trials reached the target within the budget."""
    # Who arrives when the budget is spent counts as much as that.
    return sum(bool(one.score and one.score < budget) for one in trials)


def show(tuner, trial):
    """Prints the best trial: its setting, metrics and course."""
    trials = tuner.oracle.trials.values()
    budget = tuner.hypermodel.target.budget_seconds
    arrived = number_of_arrivals(trials, budget)
    print(f"\n{len(trials)} trials, {arrived} reached the target\n")
    for name, value in trial.hyperparameters.values.items():
        if not name.startswith("tuner/"):
            text = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{name:32}{text}")
    print()
    for name, metric in trial.metrics.metrics.items():
        print(f"{name:32}{metric.get_best_value():,.4g}")
    folder = pathlib.Path(tuner.get_trial_dir(trial.trial_id))
    kb.Report.load(folder / "batch_size_report.json").summary()


def compare(tuner, trial, data, settings):
    """Trains the best setting, and plain `fit` at 32, anew, and compares."""
    (x, y), test = data
    target, budget, epochs, _ = settings
    hypermodel, hp = tuner.hypermodel, trial.hyperparameters
    setting = hypermodel.space.setting(hp)
    arguments = {
        "x": x,
        "y": y,
        "validation_data": test,
        "epochs": 4 * epochs,
        "verbose": 0,
    }

    def adaptive(model):
        return hypermodel.fit(hp, model, **arguments)

    def plain(rate):
        def fit(model):
            model.optimizer.learning_rate = rate
            clock = kb.TimeToTarget("val_accuracy", target, budget)
            return model.fit(**arguments, callbacks=[clock])

        return fit

    found = float(hypermodel.build(hp).optimizer.learning_rate)
    carried = found * 32 / setting.initial
    usual = float(keras.optimizers.SGD().learning_rate)
    ways = {
        "best setting": adaptive,
        f"fit, batch size 32, rate {carried:.3g} of the search": plain(carried),
        f"fit, batch size 32, rate {usual:.3g}, Keras's default": plain(usual),
    }
    seconds = {way: [] for way in ways}
    for seed in range(SEEDS):
        for way, train in ways.items():
            keras.utils.set_random_seed(seed)
            history = train(hypermodel.build(hp)).history
            seconds[way].append(history["time_to_target"][-1])
    print(
        f"\nSeconds of training to {target:.0%}, trained anew, median of "
        f"{SEEDS} seeds, without tracing\n"
    )
    best = statistics.median(seconds["best setting"])
    for way, times in seconds.items():
        middle = statistics.median(times)
        print(f"{way:48}{middle:7.2f}{middle / best:7.1f} times")
    if max(map(max, seconds.values())) >= budget:
        print("A training that did not arrive counts more than the budget.")


def main():
    """Searches, shows the best trial, and compares it with the default."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=SETTINGS, default="digits")
    parser.add_argument("--directory", help="where KerasTuner keeps its files")
    options = parser.parse_args()

    data, settings = load(options.data), SETTINGS[options.data]
    with tempfile.TemporaryDirectory() as folder:
        tuner = search(data, settings, options.directory or folder)
        trial = tuner.oracle.get_best_trials(1)[0]
        show(tuner, trial)
    compare(tuner, trial, data, settings)


if __name__ == "__main__":
    main()
