"""KerasTuner: real searches with all its tuners, and what may go wrong."""

import json
import math
import pathlib
import types
import warnings

import keras
import keras_tuner
import numpy as np
import pytest
import tensorflow as tf

import keras_batchsize as kb
from keras_batchsize import tuner as kbt
from keras_batchsize._train_function_tally import Tally
from keras_batchsize._tuner_penalty import Penalties

RNG = np.random.default_rng(0)
X = RNG.normal(size=(1024, 8)).astype("float32")
Y = (X[:, 0] * X[:, 1] > 0).astype("int32")
VALIDATION = (X[:256], Y[:256])
# Seconds that no trial takes. Until a second step is booked the first one
# counts with its tracing.
BUDGET = 1e6
TARGET = kbt.Target("val_accuracy", 0.85, BUDGET)
METRICS = {
    "batch_size",
    "examples_per_second",
    "examples_seen",
    "examples_to_target",
    "time_to_target",
    "training_seconds",
    "tracing_seconds",
    "val_accuracy",
    "val_loss",
}

# A name is looked up in a thread's old way (oracle.py), and the all-NaN mean
# of a metric is no matter.
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*(currentThread|getName).*:DeprecationWarning",
    ),
    pytest.mark.minutes(5),
]


def build(hp, rate=0.05):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(hp.Choice("units", [16, 32]), "relu"),
            keras.layers.Dense(2),
        ]
    )
    model.compile(
        keras.optimizers.SGD(rate, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def space(**arguments):
    settings = {"initial": (8, 32), "max_batch_size": 64, **arguments}
    return kbt.BatchSizeSpace(**settings)


def search(
    tmp_path,
    hypermodel,
    kind="RandomSearch",
    objective=("time_to_target", "min"),
    fit=(),
    **arguments,
):
    """Searches, one trial if not told otherwise; returns the tuner."""
    lengths = {"max_epochs": 2, "factor": 2}
    if kind != "Hyperband":
        lengths = {"max_trials": 1}
        fit = {"epochs": 2, **dict(fit)}
    tuner = getattr(keras_tuner, kind)(
        hypermodel,
        objective=keras_tuner.Objective(*objective),
        directory=tmp_path,
        seed=1,
        **{**lengths, **arguments},
    )
    fit = {"x": X, "y": Y, "validation_data": VALIDATION, **dict(fit)}
    tuner.search(verbose=0, **fit)
    return tuner


def trials_of(tuner):
    return list(tuner.oracle.trials.values())


def metrics_of(trial):
    return {
        name: one.get_best_value()
        for name, one in trial.metrics.metrics.items()
    }


# Searches.


# Hyperband's search is below.
@pytest.mark.parametrize(
    "kind", ["RandomSearch", "BayesianOptimization", "GridSearch"]
)
def test_every_tuner_searches_with_it(kind, tmp_path):
    tuner = search(
        tmp_path,
        kbt.AdaptiveHyperModel(build, space(), TARGET),
        kind,
        max_trials=2,
    )
    assert len(trials_of(tuner)) == 2
    assert_searched(tuner, TARGET)


def assert_searched(tuner, target):
    """All trials are complete, with all metrics, and the best can be had."""
    for trial in trials_of(tuner):
        assert trial.status == "COMPLETED", trial.message
        values, metrics = trial.hyperparameters.values, metrics_of(trial)
        assert METRICS <= set(metrics)
        assert all(map(math.isfinite, metrics.values())), metrics
        assert 0.0 < trial.score <= 2.0 * target.budget_seconds
        size = metrics["batch_size"]
        if values["batch_size/policy"] == "fixed":
            assert size == values["batch_size/initial"]
            assert "noise_scale" not in metrics
        assert 8 <= size <= 64
    assert len(tuner.get_best_models(1)) == 1


def test_a_fixed_size_trains_as_plain_fit_does(tmp_path):
    # Law 1 of docs/design.md, through KerasTuner.
    tuner = search(
        tmp_path,
        kbt.AdaptiveHyperModel(build, space(policies=["fixed"])),
        objective=("val_loss", "min"),
    )
    (trial,) = trials_of(tuner)
    model = build(trial.hyperparameters)
    history = model.fit(
        X,
        Y,
        batch_size=trial.hyperparameters.get("batch_size/initial"),
        epochs=2,
        validation_data=VALIDATION,
        verbose=0,
    )
    assert trial.score == min(history.history["val_loss"])


class Recorded(keras_tuner.HyperModel):
    """A hypermodel with a `fit` of its own."""

    def __init__(self):
        super().__init__()
        self.histories = []

    def build(self, hp):
        return build(hp)

    def declare_hyperparameters(self, hp):
        hp.Int("epochs", 1, 2)

    def fit(self, hp, model, *args, **kwargs):
        kwargs["epochs"] = hp.get("epochs")
        history = model.fit(*args, **kwargs)
        self.histories.append(history.history)
        return history


def test_executions_start_anew_and_are_averaged(tmp_path):
    inner = Recorded()
    tuner = search(
        tmp_path,
        kbt.AdaptiveHyperModel(inner, space(), TARGET),
        max_trials=2,
        executions_per_trial=2,
    )
    assert len(inner.histories) == 4
    for index, trial in enumerate(trials_of(tuner)):
        pair = inner.histories[2 * index : 2 * index + 2]
        epochs = trial.hyperparameters.get("epochs")
        for history in pair:
            assert len(history["loss"]) <= epochs
            # A clock that went on would have seen the first execution, too.
            assert history["examples_seen"][0] == 1024.0
        expected = np.mean([min(one["time_to_target"]) for one in pair])
        assert trial.score == pytest.approx(expected)


def test_a_fit_of_several_parts_is_one_training(tmp_path):
    class InParts(Recorded):
        def fit(self, hp, model, *args, **kwargs):
            for part in (
                {"epochs": 1},
                {"epochs": 2, "initial_epoch": 1},
                {"epochs": 1},
            ):
                history = model.fit(*args, **{**kwargs, **part})
                self.histories.append(history.history)
            return history

    inner = InParts()
    target = kbt.Target("val_accuracy", 2.0, BUDGET)
    search(
        tmp_path, kbt.AdaptiveHyperModel(inner, space(), target), max_trials=1
    )
    first, second, _ = inner.histories
    assert second["examples_seen"][0] == first["examples_seen"][-1] + 1024
    assert second["training_seconds"][-1] > first["training_seconds"][-1]
    # Both are over their budgets by the gap. That of examples is never less
    # than what all parts so far have: who arrives is better than who does not.
    for epochs, history in enumerate(inner.histories, 1):
        ratio = history["examples_to_target"][-1] / 1024
        over = history["time_to_target"][-1] / BUDGET
        assert ratio / over == pytest.approx(epochs)


def test_several_objectives_are_each_finite(tmp_path):
    tuner = keras_tuner.RandomSearch(
        kbt.AdaptiveHyperModel(
            too_large, space(initial=(2, 2), policies=["fixed"]), TARGET
        ),
        objective=[
            keras_tuner.Objective("time_to_target", "min"),
            keras_tuner.Objective("examples_per_second", "max"),
        ],
        max_trials=1,
        directory=tmp_path,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Memory ran out")
        tuner.search(X, Y, validation_data=VALIDATION, verbose=0)
    (trial,) = trials_of(tuner)
    # The sum of what is to be small less the sum of what is to be large.
    assert trial.score == 2.0 * BUDGET - 0.0


def test_a_fit_may_return_the_objective_itself(tmp_path):
    returned = []

    class Number(Recorded):
        def fit(self, hp, model, *args, **kwargs):
            history = super().fit(hp, model, *args, **kwargs)
            returned.append(history.history["val_loss"][-1])
            return returned[-1]

    tuner = keras_tuner.RandomSearch(
        kbt.AdaptiveHyperModel(Number(), space()),
        max_trials=1,
        directory=tmp_path,
    )
    tuner.search(X, Y, validation_data=VALIDATION, verbose=0)
    (trial,) = trials_of(tuner)
    assert [trial.score] == returned


@pytest.mark.parametrize("size", [8, 32])
def test_datasets_are_searched_with_sizes_of_the_space(size, tmp_path):
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)
    fixed = space(initial=(size, size), policies=["fixed"])
    tuner = search(
        tmp_path,
        kbt.AdaptiveHyperModel(build, fixed, TARGET),
        fit={"x": data, "y": None, "epochs": 1},
    )
    (trial,) = trials_of(tuner)
    assert metrics_of(trial)["batch_size"] == size
    # One epoch at most, and ended by the target at its end at the earliest.
    assert metrics_of(trial)["examples_seen"] == len(X)


class OwnTuner(keras_tuner.RandomSearch):
    """A tuner that calls the hypermodel itself, without callbacks."""

    def run_trial(self, trial, *args, **kwargs):
        hp = trial.hyperparameters
        model = self.hypermodel.build(hp)
        history = self.hypermodel.fit(hp, model, *args, **kwargs).history
        return {"time_to_target": history["time_to_target"][-1]}


def test_tuners_of_users_search_with_it(tmp_path):
    tuner = OwnTuner(
        kbt.AdaptiveHyperModel(build, space(), TARGET),
        objective=keras_tuner.Objective("time_to_target", "min"),
        max_trials=2,
        directory=tmp_path,
    )
    tuner.search(X, Y, validation_data=VALIDATION, epochs=1, verbose=0)
    assert [one.status for one in trials_of(tuner)] == ["COMPLETED"] * 2


class Batches(keras.utils.PyDataset):
    """The data in batches of 32."""

    def __init__(self, number=32):
        super().__init__()
        self._number = number

    @property
    def num_batches(self):
        return self._number

    def __len__(self):
        return self._number

    def __getitem__(self, index):
        part = slice(32 * index, 32 * (index + 1))
        return X[part], Y[part]


def generated():
    yield X[:32], Y[:32]


DATASET = tf.data.Dataset.from_tensor_slices((X, Y))


@pytest.mark.parametrize(
    ("fit", "examples"),
    [
        ({"x": X, "y": Y}, 1024),
        ({"x": {"a": X, "b": X}, "y": Y}, 1024),
        ({"x": X, "y": Y, "validation_split": 0.25}, 768),
        ({"x": X, "y": Y, "steps_per_epoch": 2}, 0),
        ({"x": DATASET.batch(16)}, 1024),
        ({"x": DATASET}, 1024),
        ({"x": tf.data.Dataset.range(1024)}, 1024),
        ({"x": DATASET.batch(16).repeat()}, 0),
        ({"x": Batches()}, 1024),
        ({"x": Batches(None)}, 0),
        ({"x": generated()}, 0),
        ({}, 0),
    ],
)
def test_examples_of_an_epoch_are_told_by_the_data(fit, examples):
    from keras_batchsize._tuner_fit import examples_of_epoch

    model = build(keras_tuner.HyperParameters())
    assert examples_of_epoch(fit, model) == examples


def test_examples_of_a_data_loader_are_those_of_its_batches():
    from keras_batchsize._tuner_fit import examples_of_epoch

    data = pytest.importorskip("torch.utils.data")
    model = build(keras_tuner.HyperParameters())
    loader = data.DataLoader(list(range(1024)), batch_size=32)
    assert examples_of_epoch({"x": loader}, model) == 1024


def test_each_trial_leaves_its_report(tmp_path):
    tuner = search(
        tmp_path,
        kbt.AdaptiveHyperModel(build, space(policies=["measure"]), TARGET),
        max_trials=1,
    )
    (trial,) = trials_of(tuner)
    folder = pathlib.Path(tuner.get_trial_dir(trial.trial_id))
    report = kb.Report.load(folder / "batch_size_report.json")
    assert report.examples == metrics_of(trial)["examples_seen"]
    assert "noise_scale" in trial.metrics.metrics


# Hyperband goes on.


class Starts(keras_tuner.HyperModel):
    """Notes what the optimizer has when training starts."""

    def __init__(self):
        super().__init__()
        self.slots = []

    def build(self, hp):
        return build(hp)

    def fit(self, hp, model, *args, **kwargs):
        updates, _, *momentum = model.optimizer.variables
        moves = max(float(np.abs(one).max()) for one in momentum)
        self.slots.append((int(updates), moves))
        return model.fit(*args, **kwargs)


def test_hyperband_goes_on_from_clock_statistics_and_momentum(tmp_path):
    target = kbt.Target("val_accuracy", 2.0, BUDGET)
    inner = Starts()
    tuner = search(
        tmp_path,
        kbt.AdaptiveHyperModel(inner, space(policies=["measure"]), target),
        "Hyperband",
    )
    assert_searched(tuner, target)
    by_id = {one.trial_id: one for one in trials_of(tuner)}
    resumed = 0
    for trial, slots in zip(by_id.values(), inner.slots, strict=True):
        values = trial.hyperparameters.values
        if "tuner/trial_id" not in values:
            assert slots == (0, 0.0)
            continue
        assert slots[0] % (1024 // values["batch_size/initial"]) == 0
        assert min(slots) > 0.0
        resumed += 1
        past = metrics_of(by_id[values["tuner/trial_id"]])
        metrics = metrics_of(trial)
        if metrics["time_to_target"] < past["time_to_target"]:
            # At the best epoch of both: whole epochs after what went before.
            more = metrics["examples_seen"] - past["examples_seen"]
            assert more > 0 and more % 1024 == 0
        assert metrics["time_to_target"] <= past["time_to_target"]
        assert metrics["training_seconds"] > past["training_seconds"]
    assert resumed


def resume(tmp_path, state, **values):
    """Fits a trial that goes on from a trial with a given state.

    Returns:
        The history. The report is in the folder `new`.
    """

    class TunerCallback(keras.callbacks.Callback):
        """What KerasTuner hands over under this name, as far as it is used."""

        class tuner:
            class oracle:
                objective = keras_tuner.Objective("time_to_target", "min")
                max_epochs = 4

            @staticmethod
            def get_trial_dir(trial_id):
                folder = tmp_path / trial_id
                folder.mkdir(exist_ok=True)
                return str(folder)

        class trial:
            trial_id = "new"

    path = pathlib.Path(TunerCallback.tuner.get_trial_dir("old"))
    (path / "batch_size.json").write_text(json.dumps(state))
    hypermodel = kbt.AdaptiveHyperModel(
        build, space(policies=["measure"]), TARGET
    )
    hp = keras_tuner.HyperParameters()
    hp.values = {
        "batch_size/initial": 8,
        "tuner/trial_id": "old",
        "tuner/epochs": 2,
        **values,
    }
    return hypermodel.fit(
        hp,
        hypermodel.build(hp),
        X,
        Y,
        epochs=2,
        initial_epoch=1,
        verbose=0,
        validation_data=VALIDATION,
        callbacks=[TunerCallback()],
    ).history


def training_state():
    """Returns the state after an epoch at 32, from a base of 8."""
    policy = kb.policies.BatchSizeSchedule({0: 32})
    trainer = kb.AdaptiveTrainer(
        build(keras_tuner.HyperParameters()),
        policy,
        max_batch_size=64,
        verbose=0,
    )
    trainer.fit(X, Y, batch_size=8, verbose=0)
    controller = {**trainer.get_state(), "policy": {}}
    tally = Tally().get_state() | {"seconds": 1.0}
    return tally | {"controller": controller, "factor": 4.0, "identity": None}


def target_state(**changed):
    state = TARGET.make_callback().get_state()
    return {**state, **changed}


def test_a_resumed_trial_starts_from_the_size_it_had(tmp_path):
    state = {"training": training_state(), "target": target_state()}
    history = resume(tmp_path, state)
    # "measure" holds the size of the state, 32; its own initial size is 8.
    assert history["batch_size"] == [32.0]
    assert history["examples_seen"] == [2048.0]


def test_a_resumed_trial_that_has_arrived_reports_the_same_again(tmp_path):
    reached = {"seconds": 1.25, "examples": 512.0}
    state = {
        "training": training_state(),
        "target": target_state(reached=reached, best=0.9),
    }
    history = resume(tmp_path, state)
    assert history["time_to_target"] == [1.25]
    assert history["examples_to_target"] == [512.0]
    # One superbatch was enough to be told.
    assert history["examples_seen"][0] - 1024 < 512


def test_state_of_another_base_size_gives_the_clock_only(tmp_path):
    clock = {"examples": 1024, "steady": [5.0, 1024], "traced": [0.0, 0]}
    state = {
        "training": training_state(),
        "target": target_state(best=0.84, clock=clock),
    }
    history = resume(tmp_path, state, **{"batch_size/initial": 16})
    assert history["batch_size"] == [16.0]
    assert history["training_seconds"][0] > 5.0
    assert history["time_to_target"][0] <= BUDGET * (1.0 + 0.01 / 0.85)


@pytest.mark.parametrize("initial", [8, 16])
def test_the_rate_of_a_past_trial_is_that_of_its_base_size(initial, tmp_path):
    state = {"training": training_state(), "target": target_state()}
    resume(tmp_path, state, **{"batch_size/initial": initial})
    report = kb.Report.load(tmp_path / "new" / "batch_size_report.json")
    # Hyperband loads the rate with the weights, here 0.05 for a base of 8.
    rate = 0.05 * initial / 8
    assert report.rows[0].base_learning_rate == pytest.approx(rate)


# What goes wrong in a trial.


def untrained(trial, make=build):
    """Returns the validation loss of a trial's model before training."""
    model = make(trial.hyperparameters)
    value = model.evaluate(*VALIDATION, verbose=0)[0]
    # The same weights on the same examples, in batches of another size.
    return pytest.approx(value, rel=1e-6)


@pytest.mark.filterwarnings("ignore:The loss became nan:RuntimeWarning")
@pytest.mark.parametrize(
    "objective", [("val_loss", "min"), ("time_to_target", "min")]
)
def test_diverging_trials_are_completed_with_a_finite_objective(
    objective, tmp_path
):
    def diverging(hp):
        # The first superbatch already ends with a loss of NaN.
        return build(hp, rate=1e30)

    tuner = search(
        tmp_path,
        kbt.AdaptiveHyperModel(diverging, space(), TARGET),
        "BayesianOptimization",
        objective,
        max_trials=2,
    )
    first, second = trials_of(tuner)
    for trial in (first, second):
        assert trial.status == "COMPLETED", trial.message
        assert math.isfinite(trial.score)
        if objective[0] == "val_loss":
            # As good as an untrained model: that of the first one, for all.
            assert trial.score == untrained(first)
        else:
            assert BUDGET < trial.score <= 2.0 * BUDGET
        # It was ended at once.
        assert metrics_of(trial)["examples_seen"] < 1024


def ended_at_once(folder, data):
    """Returns a trial, by examples, that its first superbatch ends."""
    tuner = search(
        folder,
        kbt.AdaptiveHyperModel(
            lambda hp: build(hp, rate=1e30), space(), TARGET
        ),
        objective=("examples_to_target", "min"),
        max_trials=1,
        fit={"x": data, "y": None},
    )
    (trial,) = trials_of(tuner)
    return trial


@pytest.mark.filterwarnings("ignore:The loss became nan:RuntimeWarning")
def test_who_never_arrives_has_seen_more_than_the_data_in_batches(tmp_path):
    # The length of an epoch is not seen.
    trial = ended_at_once(tmp_path, Batches())
    assert 2 * 1024 < trial.score <= 4 * 1024


@pytest.mark.filterwarnings("ignore:The loss became nan:RuntimeWarning")
def test_who_sees_no_end_of_the_data_has_an_objective_all_the_same(tmp_path):
    known = tf.data.Dataset.from_tensor_slices((X, Y))
    trial = ended_at_once(
        tmp_path, known.filter(lambda x, y: True).batch(32)
    )
    assert trial.status == "COMPLETED", trial.message
    assert trial.score > metrics_of(trial)["examples_seen"]


@pytest.mark.parametrize("name", ["val_loss", "val_accuracy"])
def test_metrics_of_a_trial_are_of_one_epoch(name, tmp_path):
    direction, best_of = ("min", min) if name == "val_loss" else ("max", max)
    fit = {"epochs": 5, "validation_freq": 2}
    tuner = search(
        tmp_path,
        kbt.AdaptiveHyperModel(build, space(policies=["fixed"])),
        objective=(name, direction),
        max_trials=1,
        fit=fit,
    )
    (trial,) = trials_of(tuner)
    assert trial.status == "COMPLETED", trial.message
    history = build(trial.hyperparameters).fit(
        X,
        Y,
        batch_size=trial.hyperparameters.get("batch_size/initial"),
        validation_data=VALIDATION,
        verbose=0,
        **fit,
    ).history
    values = history[name]
    assert len(values) == 2 < len(history["loss"])
    assert trial.score == best_of(values)
    # Validated after the second and the fourth epoch.
    epoch = 2 * values.index(trial.score) + 1
    loss = metrics_of(trial)["loss"]
    assert loss == pytest.approx(history["loss"][epoch], rel=1e-5)


@pytest.mark.filterwarnings("ignore:The loss became nan:RuntimeWarning")
@pytest.mark.parametrize("objective", ["val_loss", "time_to_target"])
def test_a_trial_may_end_before_its_first_validation(objective, tmp_path):
    tuner = search(
        tmp_path,
        kbt.AdaptiveHyperModel(
            lambda hp: build(hp, rate=1e30), space(), TARGET
        ),
        objective=(objective, "min"),
        max_trials=1,
        fit={"epochs": 4, "validation_freq": 2},
    )
    (trial,) = trials_of(tuner)
    assert trial.status == "COMPLETED", trial.message
    if objective == "val_loss":
        assert trial.score == untrained(trial)
    else:
        assert trial.score == 2.0 * BUDGET


def run_out(inputs):
    # TensorFlow makes a `ResourceExhaustedError` of it. A real allocator would
    # first wait ten seconds for memory.
    raise MemoryError("more than there is")


def test_a_noise_scale_that_is_not_measured_is_a_finite_objective(tmp_path):
    tuner = search(
        tmp_path,
        kbt.AdaptiveHyperModel(build, space(policies=["fixed"])),
        objective=("noise_scale", "min"),
    )
    (trial,) = trials_of(tuner)
    assert trial.status == "COMPLETED", trial.message
    assert trial.score == 4096.0


class TooLarge(keras.layers.Layer):
    """Cannot be trained on more than so many examples at once."""

    def __init__(self, fitting):
        super().__init__()
        self.fitting = fitting

    def call(self, inputs, training=False):
        if not training:
            return inputs
        wanted = tf.cond(
            tf.shape(inputs)[0] > self.fitting,
            lambda: tf.py_function(run_out, [inputs], tf.float32),
            lambda: 0.0,
        )
        return inputs + tf.reduce_sum(wanted)


def too_large(hp, fitting=0):
    model = build(hp)
    large = keras.Sequential(
        [keras.Input((8,)), TooLarge(fitting), *model.layers]
    )
    large.compile(
        keras.optimizers.SGD(0.05), model.loss, metrics=["accuracy"]
    )
    return large


def out_of_memory(tmp_path, *arguments, **options):
    """Returns the trials of a search of which none has enough memory."""
    hypermodel = kbt.AdaptiveHyperModel(
        too_large, space(initial=(2, 4), policies=["fixed"]), TARGET
    )
    found = trials_of(search(tmp_path, hypermodel, *arguments, **options))
    for trial in found:
        assert trial.status == "COMPLETED", trial.message
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Memory ran out:RuntimeWarning")
def test_hyperband_goes_on_from_trials_out_of_memory(tmp_path):
    objective = "examples_to_target", "min"
    found = out_of_memory(tmp_path, "Hyperband", objective)
    assert [one.score for one in found] == [4096.0] * len(found)
    assert any("tuner/trial_id" in one.hyperparameters.values for one in found)


@pytest.mark.filterwarnings("ignore:Memory ran out:RuntimeWarning")
def test_a_metric_without_memory_is_that_of_one_untrained_model(tmp_path):
    first, second = out_of_memory(
        tmp_path, objective=("val_loss", "min"), max_trials=2
    )
    assert first.score == untrained(first, too_large)
    assert second.score == first.score


@pytest.mark.parametrize(
    ("name", "direction", "penalty"),
    [
        # Twice the budget, in seconds and in examples.
        ("time_to_target", "min", 40.0),
        ("training_seconds", "min", 40.0),
        ("tracing_seconds", "min", 40.0),
        ("examples_to_target", "min", 4096.0),
        # Twice the examples of the training.
        ("noise_scale", "min", 2000.0),
        ("examples_seen", "min", 2000.0),
        ("batch_size", "min", 2000.0),
        ("noise_scale", "max", 0.0),
        ("examples_per_second", "max", 0.0),
        ("training_seconds", "max", 0.0),
        ("val_loss", "min", 0.7),
        ("val_accuracy", "max", 0.7),
    ],
)
def test_penalties_are_finite_and_bad(name, direction, penalty):
    target = types.SimpleNamespace(budget=20.0, examples_limit=2048)
    found = Penalties().of(name, direction, target, 1000, lambda name: 0.7)
    assert found == penalty
    assert Penalties(3.0).of(name, direction, target, 1000, None) == 3.0


@pytest.mark.filterwarnings("ignore:Memory ran out:RuntimeWarning")
def test_trials_that_fit_in_smaller_pieces_are_trained_in_those(tmp_path):
    tuner = search(
        tmp_path,
        kbt.AdaptiveHyperModel(
            lambda hp: too_large(hp, fitting=16),
            space(initial=(32, 32), policies=["fixed"]),
            TARGET,
        ),
        objective=("val_loss", "min"),
        max_trials=1,
    )
    (trial,) = trials_of(tuner)
    model = too_large(trial.hyperparameters, fitting=1024)
    plain = model.fit(
        X,
        Y,
        batch_size=32,
        epochs=2,
        validation_data=VALIDATION,
        verbose=0,
    ).history
    # Law 2: two halves of a batch are the batch.
    assert trial.score == pytest.approx(min(plain["val_loss"]), rel=1e-4)
    assert metrics_of(trial)["batch_size"] == 32


@pytest.mark.filterwarnings("ignore:Memory ran out:RuntimeWarning")
def test_running_out_of_memory_can_fail_the_trial(tmp_path):
    with pytest.raises(RuntimeError, match="consecutive failures"):
        search(
            tmp_path,
            kbt.AdaptiveHyperModel(
                too_large,
                space(initial=(2, 4), policies=["fixed"]),
                TARGET,
                on_oom="fail",
            ),
            max_consecutive_failed_trials=1,
        )


# The memory probe.


class Probe:
    """A probe that finds that a given size fits."""

    def __init__(self, largest):
        self.largest = largest
        self.calls = []

    def __call__(self, model, x, y):
        self.calls.append((model.count_params(), len(x), len(y)))
        return self.largest


def test_the_probe_caps_sizes_and_runs_once_per_kind_of_model(tmp_path):
    probe = Probe(20)
    tuner = search(
        tmp_path,
        kbt.AdaptiveHyperModel(
            build, space(policies=["fixed"]), TARGET, memory_probe=probe
        ),
        "GridSearch",
        fit={"epochs": 1},
        max_trials=6,
    )
    assert len(trials_of(tuner)) == 6
    for trial in trials_of(tuner):
        initial = trial.hyperparameters.get("batch_size/initial")
        assert metrics_of(trial)["batch_size"] == min(initial, 16)
    # Three sizes of two models, which have 16 and 32 units.
    assert sorted(probe.calls) == [
        (16 * 9 + 2 * 17, 1024, 1024),
        (32 * 9 + 2 * 33, 1024, 1024),
    ]


@pytest.mark.parametrize("scheduled", [False, True])
def test_the_rate_follows_a_capped_initial_size(scheduled, tmp_path):
    rate = 0.05
    if scheduled:
        rate = keras.optimizers.schedules.ExponentialDecay(0.05, 1000, 0.5)

    hypermodel = kbt.AdaptiveHyperModel(
        lambda hp: build(hp, rate),
        space(
            initial=(32, 32), policies=["fixed"], learning_rate_rules=["linear"]
        ),
        memory_probe=Probe(16),
    )
    hp = keras_tuner.HyperParameters()
    hp.values = {"units": 16}
    capped = hypermodel.build(hp)
    hypermodel.fit(hp, capped, X, Y, epochs=1, verbose=0, shuffle=False)

    if scheduled:
        # At 16 a step of the schedule is two: half the rate, twice as long.
        rate = keras.optimizers.schedules.ExponentialDecay(0.025, 2000, 0.5)
    else:
        rate = 0.025
    plain = build(hp, rate)
    plain.fit(X, Y, batch_size=16, epochs=1, verbose=0, shuffle=False)
    for ours, theirs in zip(capped.weights, plain.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_nothing_is_probed_on_a_processor():
    from keras_batchsize._tuner_probe import CachedProbe

    model = build(keras_tuner.HyperParameters())
    if not tf.config.list_physical_devices("GPU"):
        assert CachedProbe("auto").limit(model, X, Y, 64) is None
    assert CachedProbe(False).limit(model, X, Y, 64) is None
    assert CachedProbe(0).limit(model, X, Y, 64) is None


def images_model(strides=1, optimizer="sgd", side=8, rate=0.1):
    model = keras.Sequential(
        [
            keras.Input((side, side, 1)),
            keras.layers.Conv2D(2, 3, strides=strides),
            keras.layers.Dropout(rate),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(1),
        ]
    )
    model.compile(optimizer, "mse")
    return model


def test_a_probe_serves_only_models_that_take_the_same_memory():
    from keras_batchsize._tuner_probe import CachedProbe

    probe = Probe(8)
    cached = CachedProbe(probe)

    def calls(x=np.zeros((32, 8, 8, 1)), maximum=64, **settings):
        """Returns how often the probe was run for a model, made twice."""
        before = len(probe.calls)
        for _ in range(2):
            model = images_model(**settings)
            assert cached.limit(model, x, np.zeros(len(x)), maximum) == 8
        return len(probe.calls) - before

    assert calls() == 1
    # Neither name, seed nor rate takes memory.
    assert calls(rate=0.4) == 0
    assert calls(optimizer=keras.optimizers.SGD(0.5)) == 0
    # Their weights have the same shapes.
    assert calls(strides=2) == 1
    assert calls(optimizer="adam") == 1
    assert calls(side=16, x=np.zeros((32, 16, 16, 1))) == 1
    assert calls(side=None, x=np.zeros((32, 16, 16, 1))) == 1
    assert calls(side=None) == 1
    assert calls(x=np.zeros((16, 8, 8, 1))) == 1
    assert calls(maximum=32) == 1


@pytest.mark.parametrize(
    ("reason", "maximum", "base", "expected"),
    [
        ("memory", 64, 32, 16),
        ("memory", None, 32, 16),
        # What time has ended is no limit for what is asked for.
        ("time", 64, 32, 64),
        ("time", None, 32, 32),
        ("time", None, 8, 16),
    ],
)
def test_a_probe_that_ended_early_caps_nothing(
    reason, maximum, base, expected, monkeypatch
):
    from keras_batchsize import memory
    from keras_batchsize._tuner_probe import CachedProbe
    from keras_batchsize.batch_profile import BatchProfile
    from keras_batchsize.batch_profile import ProfileRow

    started = []

    def find(*_, start, **__):
        started.append(start)
        rows = [ProfileRow(16, 16_000, None, 0.01, True)]
        return BatchProfile(rows, 16, reason)

    monkeypatch.setattr(memory, "find_max_batch_size", find)
    cached, model = CachedProbe(True), build(keras_tuner.HyperParameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            limit = cached.limit(model, X, Y, maximum, base)
            assert limit == expected
    assert started == [base]
    said = [one for one in caught if one.category is RuntimeWarning]
    assert len(said) == (reason == "time")


def test_the_real_probe_is_asked_on_demand(tmp_path):
    tuner = search(
        tmp_path,
        kbt.AdaptiveHyperModel(
            build, space(policies=["fixed"]), TARGET, memory_probe=True
        ),
        max_trials=1,
    )
    (trial,) = trials_of(tuner)
    # All of 64 fits: nothing is capped.
    initial = trial.hyperparameters.get("batch_size/initial")
    assert metrics_of(trial)["batch_size"] == initial


def test_a_model_that_does_not_fit_at_all_is_a_matter_of_the_trial(tmp_path):
    def probe(model, x, y):
        return kb.find_max_batch_size(model, x, y, memory_limit=1000)

    tuner = search(
        tmp_path,
        kbt.AdaptiveHyperModel(build, space(), TARGET, memory_probe=probe),
        objective=("examples_to_target", "min"),
    )
    (trial,) = trials_of(tuner)
    assert trial.status == "COMPLETED", trial.message
    # Two epochs of 1,024 examples, twice, for what never trains.
    assert trial.score == 4096.0


def test_the_value_of_an_untrained_model_is_looked_for_until_there_is_one():
    values = [None, 0.7]
    penalties = Penalties()

    def penalty():
        return penalties.of(
            "val_loss", "min", None, 0, lambda name: values.pop(0)
        )

    assert penalty() is None
    assert penalty() == penalty() == 0.7


# Configurations that cannot work.


def uncompiled(hp):
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)])


class OwnStep(keras.Sequential):
    def train_step(self, data):
        return super().train_step(data)


def own_step(hp):
    model = OwnStep(build(hp).layers)
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


@pytest.mark.parametrize(
    ("builder", "options", "objective", "fit", "text"),
    [
        (build, {"target": None}, "time_to_target", {}, "target=kbt.Target"),
        (build, {}, "val_f1", {}, "Received: objective='val_f1'"),
        (
            build,
            {"target": kbt.Target("accuracy_score", 0.9, 10, mode="max")},
            "val_loss",
            {},
            "monitor='accuracy_score'",
        ),
        (
            build,
            {},
            "time_to_target",
            {"validation_data": None},
            "monitor='val_accuracy'",
        ),
        (build, {}, "val_loss", {"batch_size": 8}, "Received: batch_size=8"),
        (build, {}, "val_loss", {"workers": 2}, "'workers'"),
        (uncompiled, {}, "val_loss", {}, "must be compiled"),
        (own_step, {}, "val_loss", {}, "train_step"),
    ],
)
def test_a_wrong_configuration_ends_the_search_with_its_message(
    builder, options, objective, fit, text, tmp_path
):
    settings = {"target": TARGET, **options}
    hypermodel = kbt.AdaptiveHyperModel(
        builder, space(policies=["goodput"]), **settings
    )
    with pytest.raises(keras_tuner.errors.FatalError) as caught:
        search(
            tmp_path,
            hypermodel,
            objective=(objective, "min"),
            fit=fit,
            max_trials=2,
        )
    assert text in str(caught.value)
    # No second trial was started.
    assert len(list(tmp_path.glob("*/trial_*"))) == 1


def test_errors_of_users_are_left_to_keras_tuner(tmp_path):
    def failing(hp):
        raise ValueError("only for these hyperparameters")

    hypermodel = kbt.AdaptiveHyperModel(failing, space(), TARGET)
    with pytest.raises(ValueError, match="only for these") as caught:
        hypermodel.build(keras_tuner.HyperParameters())
    # One of these would end the search.
    assert not isinstance(caught.value, keras_tuner.errors.FatalError)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (("model",), TypeError, "Received: hypermodel='model'"),
        ((build, (16, 512)), TypeError, "Received: space=(16, 512)"),
        ((build, None, 0.9), TypeError, "Received: target=0.9"),
        ((build, None, None, "stop"), ValueError, "on_oom='stop'"),
        ((build, None, None, "fail", math.inf), ValueError, "penalty=inf"),
        ((build, None, None, "fail", 1.0, 3), TypeError, "memory_probe=3"),
    ],
)
def test_errors_name_argument_and_remedy(arguments, kind, text):
    with pytest.raises(kind) as caught:
        kbt.AdaptiveHyperModel(*arguments)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (("val_loss", "low", 10), TypeError, "Received: value='low'"),
        (("val_loss", 0.1, 0), ValueError, "Received: budget_seconds=0"),
        (("val_loss", 0.1, 10, 0), ValueError, "budget_examples=0"),
        (("val_loss", 0.1, 10, None, "up"), ValueError, "mode='up'"),
    ],
)
def test_errors_of_a_target_name_its_fields(arguments, kind, text):
    with pytest.raises(kind, match="Use ") as caught:
        kbt.Target(*arguments)
    assert text in str(caught.value)


def test_model_is_its_own_again_after_a_trial(tmp_path):
    hypermodel = kbt.AdaptiveHyperModel(build, space(), TARGET)
    hp = keras_tuner.HyperParameters()
    model = hypermodel.build(hp)
    with pytest.raises(keras_tuner.errors.FatalValueError):
        hypermodel.fit(hp, model, X, Y, batch_size=8, verbose=0)
    assert "fit" not in vars(model)
    assert model.fit.__self__ is model


# Where KerasTuner is missing, and where workers share a machine.


def test_where_it_is_missing_the_error_says_what_to_install(run_python):
    process = run_python(
        "-c",
        "import sys; sys.modules['keras_tuner'] = None; "
        "from keras_batchsize import tuner",
    )
    assert 'pip install "keras-tuner>=1.4.8"' in process.stderr
    assert process.returncode == 1


def test_times_of_workers_on_one_machine_are_warned_of(monkeypatch):
    monkeypatch.setenv("KERASTUNER_ORACLE_IP", "127.0.0.1")
    hypermodel = kbt.AdaptiveHyperModel(build, space(), TARGET)
    with pytest.warns(UserWarning, match="examples_to_target"):
        hypermodel._warn_of_shared_clock({"time_to_target": "min"})
    # Once, and not for what does not depend on the machine.
    hypermodel._warn_of_shared_clock({"time_to_target": "min"})
    kbt.AdaptiveHyperModel(build)._warn_of_shared_clock({"val_loss": "min"})
