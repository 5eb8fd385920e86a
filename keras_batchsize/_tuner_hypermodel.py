"""`AdaptiveHyperModel`: any hypermodel, trained with an adaptive batch size."""

import contextlib
import os
import warnings

import keras_tuner

from keras_batchsize import _checks
from keras_batchsize import keras_private
from keras_batchsize import requirements
from keras_batchsize._tuner_fit import ran_out
from keras_batchsize._tuner_penalty import Penalties
from keras_batchsize._tuner_probe import CachedProbe
from keras_batchsize._tuner_space import BatchSizeSpace
from keras_batchsize._tuner_space import rate_factor
from keras_batchsize._tuner_target import WALL_CLOCK
from keras_batchsize._tuner_target import Target
from keras_batchsize._tuner_training import TrialTraining
from keras_batchsize.learning_rate import optimizers_inside

_PACKAGE = __name__.partition(".")[0]


class _BuildFunction(keras_tuner.HyperModel):
    """A `HyperModel` made of a model-building function."""

    def __init__(self, build):
        super().__init__()
        self.build = build


class AdaptiveHyperModel(keras_tuner.HyperModel):
    """Searches batch size, policy and learning rate along with a model.

    Wraps any `HyperModel` or model-building function; every tuner of
    KerasTuner, and subclasses of users, take it in place of that.

    ```python
    from keras_batchsize import tuner as kbt

    hypermodel = kbt.AdaptiveHyperModel(
        build_model,
        kbt.BatchSizeSpace(initial=(16, 512), learning_rate=(1e-3, 1.0)),
        target=kbt.Target("val_accuracy", 0.97, budget_seconds=60),
    )
    tuner = keras_tuner.Hyperband(
        hypermodel, keras_tuner.Objective("time_to_target", "min")
    )
    tuner.search(x, y, validation_data=(x_val, y_val))
    ```

    A trial trains with an `AdaptiveTrainer`; the wrapped hypermodel's own
    `fit`, if it has one, is called as ever and its `model.fit` is the
    trainer's. An epoch stays one pass over the data, so that epochs of trials
    with different batch sizes compare. The trial's metrics, each of which may
    be the objective, are those of the model and `batch_size`, `noise_scale`
    (where the policy measures it), `examples_per_second`, `examples_seen`; with
    a target also `time_to_target`, `examples_to_target`, `training_seconds`,
    `tracing_seconds`. The trial's folder holds its report for
    `kb.Report.load`, `batch_size_report.json`.

    A trial that diverges is stopped and gets a finite objective: a modest
    penalty, see `penalty`. A wrong configuration ends the search at once with
    its message. Trials that Hyperband resumes go on with batch size, noise
    statistics, clock and arrival, besides the weights that Hyperband loads.

    Args:
        hypermodel: A `keras_tuner.HyperModel`, or a function from
            hyperparameters to a compiled model.
        space: A `BatchSizeSpace`; None for its defaults.
        target: A `Target`; None to train for all epochs.
        on_oom: What to do where a trial runs out of memory even with smaller
            micro-batches: "penalty" for a finite objective, from which the
            search learns; "fail" to let KerasTuner count it as failed.
        penalty: Objective of a trial without a finite one. None for twice the
            budget of the target, or the value of an untrained model.
        memory_probe: Whether the largest batch that fits is looked for before
            training, once per kind of model (its configuration, how it is
            compiled, the shapes of its data; not names, seeds and rates), and
            caps the sizes. "auto" for on accelerators only; True, False, or a
            function `probe(model, x, y)` that returns the largest batch size
            or a `BatchProfile`.
        name: Name of the hypermodel.
        tunable: As in `keras_tuner.HyperModel`.

    Raises:
        TypeError: If an argument is of another kind than stated.
        ValueError: If `on_oom` is neither "penalty" nor "fail".
    """

    def __init__(
        self,
        hypermodel,
        space=None,
        target=None,
        on_oom="penalty",
        penalty=None,
        memory_probe="auto",
        name=None,
        tunable=True,
    ):
        super().__init__(name=name, tunable=tunable)
        self.hypermodel = _as_hypermodel(hypermodel)
        self.space = BatchSizeSpace() if space is None else space
        _check_kind("space", self.space, BatchSizeSpace, "kbt.BatchSizeSpace()")
        if target is not None:
            example = 'kbt.Target("val_accuracy", 0.97, budget_seconds=60)'
            _check_kind("target", target, Target, example)
        self.target = target
        self.on_oom = _checks.known(
            "on_oom",
            on_oom,
            ("penalty", "fail"),
            "it says what a trial counts that runs out of memory",
        )
        if penalty is not None:
            penalty = _checks.real(
                "penalty",
                penalty,
                -1e30,
                1e30,
                "the search compares it with finite objectives",
                "Use 10.0, say.",
            )
        self.penalties = Penalties(penalty)
        self.memory_probe = CachedProbe(memory_probe)
        self._has_warned = False
        # The optimizer that was given its rate last.
        self._rated = None

    def declare_hyperparameters(self, hp):
        """Declares the space before the first trial."""
        self.space.declare(hp)
        self.hypermodel.declare_hyperparameters(hp)

    def build(self, hp):
        """Builds the wrapped model, with the rate that is searched."""
        self.space.declare(hp)
        with _fatal_if_ours():
            setting = self.space.setting(hp)
            model = self.hypermodel.build(hp)
            # A model that the tuner compiles gets its rate in `fit`.
            if getattr(model, "compiled", False):
                self._set_rate(model, setting)
                if model.built and model.optimizer is not None:
                    # So that what Hyperband loads has a place to go: else the
                    # momentum and the count of updates are left out.
                    model.optimizer.build(model.trainable_variables)
        return model

    def fit(self, hp, model, *args, **kwargs):
        """Trains as the wrapped hypermodel does, with the trial's setting."""
        with _fatal_if_ours():
            requirements.check_model(model)
            setting = self.space.setting(hp)
            if model.optimizer is not self._rated:
                self._set_rate(model, setting)
            training = TrialTraining(self, hp, setting, kwargs)
            self._warn_of_shared_clock(training.files.objectives)
            return training.run(model, args, kwargs)

    def _set_rate(self, model, setting):
        """Carries the rate from the reference to the initial batch size."""
        if setting.reference_rate is None:
            return
        self._rated = model.optimizer
        ratio = setting.initial / self.space.reference_batch_size
        factor = rate_factor(setting.rule, ratio, model.optimizer)
        try:
            model.optimizer.learning_rate = setting.reference_rate * factor
        except (AttributeError, TypeError) as error:
            held = [
                keras_private.held_learning_rate(one)
                for one in optimizers_inside(model.optimizer)
            ]
            raise ValueError(
                "An optimizer whose rate is searched must be compiled with a "
                "number as its `learning_rate`: neither a schedule nor a "
                "function can be replaced by one, and several optimizers have "
                f"no common rate. Received: learning_rate={held} and "
                f"BatchSizeSpace(learning_rate={self.space.learning_rate}). "
                "Use kbt.hp_learning_rate(hp, batch_size) in the building "
                "function, as the schedule's initial rate, say."
            ) from error

    def _warn_of_shared_clock(self, objectives):
        timed = sorted(set(objectives).intersection(WALL_CLOCK))
        if self._has_warned or not timed:
            return
        if "KERASTUNER_ORACLE_IP" not in os.environ:
            return
        self._has_warned = True
        warnings.warn(
            "Objectives that are times compare only if each worker has its "
            "machine for itself: workers on one machine slow each other down. "
            f"Received: objective {timed[0]!r} with several workers "
            "(KERASTUNER_ORACLE_IP is set). Use "
            'keras_tuner.Objective("examples_to_target", "min"), or a machine '
            "for each worker.",
            stacklevel=3,
        )


def _as_hypermodel(hypermodel):
    if isinstance(hypermodel, keras_tuner.HyperModel):
        return hypermodel
    if not callable(hypermodel):
        raise TypeError(
            "`hypermodel` must be a `keras_tuner.HyperModel` or a function "
            "from hyperparameters to a compiled model: it builds the model of "
            f"each trial. Received: hypermodel={hypermodel!r} of type "
            f"{type(hypermodel).__name__}. Pass the function itself, without "
            "calling it."
        )
    return _BuildFunction(hypermodel)


def _check_kind(name, value, kind, example):
    if not isinstance(value, kind):
        raise TypeError(
            f"`{name}` must be a `kbt.{kind.__name__}`: it says what is "
            f"searched for. Received: {name}={value!r} of type "
            f"{type(value).__name__}. Use {example}."
        )


@contextlib.contextmanager
def _fatal_if_ours():
    """Lets an error of this library end the search.

    KerasTuner takes any exception for a trial that did not work out, and goes
    on; a wrong configuration would be tried again and again. Errors of Keras
    and of the user's code are left to it: they may depend on the trial.
    """
    try:
        yield
    except keras_tuner.errors.FatalError:
        raise
    except ValueError as error:
        if _is_ours(error) and not ran_out(error):
            raise keras_tuner.errors.FatalValueError(str(error)) from error
        raise
    except TypeError as error:
        if _is_ours(error):
            raise keras_tuner.errors.FatalTypeError(str(error)) from error
        raise


def _is_ours(error):
    """Whether an exception was raised by code of this package."""
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = traceback.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] == _PACKAGE
