"""One `fit` of a trial: the trainer in place of `model.fit`."""

import math

import keras

from keras_batchsize import keras_private
from keras_batchsize._callbacks_base import train_function_of
from keras_batchsize._tuner_fit import bound
from keras_batchsize._tuner_fit import examples_of_epoch
from keras_batchsize._tuner_fit import ran_out
from keras_batchsize._tuner_fit import replaced_fit
from keras_batchsize._tuner_history import LoggedNames
from keras_batchsize._tuner_history import compared
from keras_batchsize._tuner_history import is_unknown
from keras_batchsize._tuner_penalty import untrained_value
from keras_batchsize._tuner_space import rate_factor
from keras_batchsize._tuner_target import EXAMPLES
from keras_batchsize._tuner_target import TIME
from keras_batchsize._tuner_trial import KeepState
from keras_batchsize._tuner_trial import TrialFiles
from keras_batchsize.callbacks import BatchSizeTensorBoard
from keras_batchsize.trainer import AdaptiveTrainer


class TrialTraining:
    """Trains the model of one execution of a trial.

    Everything that holds state is made here, per execution: KerasTuner copies
    the callbacks given to `search`, which would part a controller from what
    it controls.

    Args:
        hypermodel: The `AdaptiveHyperModel`.
        hp: Hyperparameters of the trial.
        setting: The `Setting` that they stand for.
        fit_arguments: Arguments of `HyperModel.fit`.
    """

    def __init__(self, hypermodel, hp, setting, fit_arguments):
        self._hypermodel = hypermodel
        self._hp = hp
        self._setting = setting
        self.files = TrialFiles(hp, fit_arguments.get("callbacks") or [])
        self._target = None
        if hypermodel.target is not None:
            self._target = hypermodel.target.make_callback()
        self._check_objectives()
        self._past = self.files.past_state()
        if self._past is not None and self._target is not None:
            self._target.set_state(self._past["target"])
        self._trainer = None
        self._arguments = {}
        self._epochs = self._epoch_examples = 0
        self._names = LoggedNames()
        self._base = setting.initial

    def _check_objectives(self):
        wanted = self.files.objectives
        targets = sorted({TIME, EXAMPLES}.intersection(wanted))
        if targets and self._target is None:
            raise ValueError(
                "An objective that is a way to a target needs the target. "
                f"Received: objective={targets[0]!r} and target=None. Use "
                'kbt.AdaptiveHyperModel(..., target=kbt.Target("val_accuracy", '
                "0.97, budget_seconds=60))."
            )
        if (
            EXAMPLES in wanted
            and self._target.budget_examples is None
            and self.files.is_shortened
            and self.files.planned_epochs is None
        ):
            raise ValueError(
                "`budget_examples` must be given where trials are of different "
                "length and the tuner's own process does not run them: what "
                "does not arrive counts as more than that. Received: "
                "budget_examples=None in a worker of a search with Hyperband. "
                f"Use kbt.Target({self._target.monitor!r}, "
                f"{self._target.target}, {self._target.budget}, "
                "budget_examples=max_epochs * examples)."
            )

    def run(self, model, args, kwargs):
        """Calls the wrapped hypermodel's `fit`.

        Args:
            model: The compiled model.
            args: Tuple of its positional arguments.
            kwargs: Dict of its named arguments.

        Returns:
            What that returns; a dict of penalties where memory ran out.
        """
        try:
            with replaced_fit(model, self._fit):
                results = self._hypermodel.hypermodel.fit(
                    self._hp, model, *args, **kwargs
                )
        except Exception as error:
            if self._hypermodel.on_oom == "fail" or not ran_out(error):
                raise
            results = self._penalised()
            if results is None:
                raise
        if isinstance(results, keras.callbacks.History):
            results = self._completed(results)
        return results

    # In place of `model.fit`.

    def _fit(self, model, *args, **kwargs):
        arguments = bound(args, kwargs)
        self._arguments = arguments
        if arguments.get("batch_size") is not None:
            raise ValueError(
                "`batch_size` must not be given to a search whose space holds "
                "it. Received: batch_size="
                f"{arguments['batch_size']!r}. Leave it out, or use "
                "kbt.BatchSizeSpace(initial=(32, 32)) for 32 in every trial."
            )
        self._epoch_examples = examples_of_epoch(arguments, model)
        if self._target is not None:
            self._target.epoch_examples = self._epoch_examples
            # Known here also where training does not even begin.
            self._epochs += self.files.planned_epochs or self._epochs_of(
                arguments
            )
            self._target.budget_epochs = self._epochs
        trainer, base = self._trainer_for(model, arguments)
        callbacks = keras.tree.flatten(arguments.pop("callbacks", None) or [])
        ours = [one for one in (self._target,) if one is not None]
        self._names = LoggedNames()
        last = [
            KeepState(self.files, self._target, self._past),
            self._names,
        ]
        self._past = None
        arguments["callbacks"] = [
            *ours,
            _TrialLogs(self._finite),
            *callbacks,
            *last,
        ]
        try:
            return trainer.fit(**{**arguments, "batch_size": base})
        finally:
            if self._target is not None:
                # Where the wrapped `fit` trains in several parts.
                self._target.set_state(self._target.get_state())
            self.files.write_report(trainer.report)

    def _epochs_of(self, arguments):
        """Epochs that a part adds; the first may go on from a past trial."""
        begun = arguments.get("initial_epoch", 0) if self._epochs else 0
        return max(arguments.get("epochs", 1) - begun, 0)

    def _trainer_for(self, model, arguments):
        """Returns the trainer of a model, and its base batch size."""
        setting, space = self._setting, self._hypermodel.space
        if self._trainer is not None and self._trainer.model is model:
            return self._trainer, self._base
        base, maximum = setting.initial, space.max_batch_size
        limit = self._hypermodel.memory_probe.limit(
            model, arguments.get("x"), arguments.get("y"), maximum, base
        )
        if limit is not None:
            while base > limit and base % 2 == 0:
                base //= 2
            maximum = max(base, min(maximum or limit, limit))
        self._carry_rate(model.optimizer, base)
        self._base = base
        if self._past is not None and base != _base_of(self._past):
            # On a worker with less memory. The clock goes on all the same.
            self._past = None
        self._trainer = AdaptiveTrainer(
            model,
            policy=setting.policy,
            learning_rate_scaling=setting.rule,
            max_batch_size=maximum,
            tensorboard=self._board(arguments),
            verbose=0,
        )
        return self._trainer, base

    def _board(self, arguments):
        """Returns the TensorBoard callback to write beside, or None."""
        given = keras.tree.flatten(arguments.get("callbacks") or [])
        if any(isinstance(one, BatchSizeTensorBoard) for one in given):
            return None
        board = self.files.tensorboard
        is_keras = isinstance(board, keras.callbacks.TensorBoard)
        return board if is_keras else None

    def _carry_rate(self, optimizer, base):
        """Carries the rate to an initial size that fits.

        Args:
            optimizer: The optimizer of the trial.
            base: That size.
        """
        meant_for = self._setting.initial
        held = keras_private.held_learning_rate(optimizer)
        if self._past is not None and optimizer.built and not callable(held):
            # It is the rate of the past trial, that was loaded.
            meant_for = _base_of(self._past)
        if base == meant_for:
            return
        ratio = base / meant_for
        factor = rate_factor(self._setting.rule, ratio, optimizer)
        if isinstance(held, keras.optimizers.schedules.LearningRateSchedule):
            optimizer.learning_rate = _ScaledSchedule(held, factor, ratio)
        elif callable(held):
            optimizer.learning_rate = lambda: factor * held()
        else:
            rate = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
            optimizer.learning_rate = rate * factor

    # Objectives.

    def _penalty(self, name):
        hypermodel = self._hypermodel
        return hypermodel.penalties.of(
            name,
            self.files.objectives[name],
            self._target,
            self._epoch_examples * self._arguments.get("epochs", 1),
            lambda name: untrained_value(
                name,
                lambda: hypermodel.build(self._hp.copy()),
                self._arguments,
            ),
        )

    def _finite(self, logs):
        """Puts the penalty in place of objectives that are not finite."""
        for name in self.files.objectives:
            if name in logs and not math.isfinite(logs[name]):
                penalty = self._penalty(name)
                logs[name] = logs[name] if penalty is None else penalty

    def _penalised(self):
        """Returns the metrics of a trial without memory; None for none."""
        names = self.files.objectives
        logs = {name: self._penalty(name) for name in names}
        if not logs or None in logs.values():
            return None
        objective = self.files.objective
        logs[objective.name] = objective.get_value(logs)
        self._save_untrained(logs)
        return {**logs, "batch_size": float(self._base)}

    def _save_untrained(self, logs):
        """Leaves weights for Hyperband, which may resume the best of the bad.

        Those of a new model: after XLA has run out of memory, reading the
        old ones may end the process.
        """
        checkpoint = self.files.checkpoint
        if checkpoint is None:
            return
        try:
            model = self._hypermodel.build(self._hp.copy())
            if model.built:
                checkpoint.set_model(model)
                checkpoint.on_epoch_end(0, logs)
        except Exception as error:
            if not ran_out(error):
                raise

    def _completed(self, history):
        """Checks that the objective is there, and leaves out what is not.

        Returns:
            The history; a dict of penalties where training ended before there
            was an objective.
        """
        self._check_logged(history)
        logs, best = history.history, -1
        if not self.files.objectives.keys() <= logs.keys():
            return self._penalised() or history
        if self.files.objectives:
            logs, best = compared(
                self._names.epochs(logs),
                self.files.objectives,
                self.files.objective,
            )
        history.history = {
            name: values
            for name, values in logs.items()
            # No metric of a trial: a noise scale that was not measured, or
            # the loss of a model that has diverged.
            if math.isfinite(values[best])
        }
        return history

    def _check_logged(self, history):
        """Raises where the objective, or the target, is of no metric."""
        logs = history.history
        for name in self.files.objectives:
            if is_unknown(name, history, self._arguments):
                raise ValueError(
                    "The objective must be among the metrics of a trial: the "
                    f"search compares it. Received: objective={name!r}; the "
                    f"trial has {sorted(logs)}. Use one of these, or pass "
                    "`validation_data` to `search`."
                )
        monitor = self._target and self._target.monitor
        if monitor and is_unknown(monitor, history, self._arguments):
            raise ValueError(
                "The target's metric must be among those of a trial: it says "
                f"when the target is reached. Received: monitor={monitor!r}; "
                f"the trial has {sorted(logs)}. Use one of these, or pass "
                "`validation_data` to `search`."
            )


class _TrialLogs(keras.callbacks.Callback):
    """Completes the logs of a trial, and ends one that has diverged.

    Args:
        make_finite: Function that puts finite numbers in place of objectives
            that are not.
    """

    def __init__(self, make_finite):
        super().__init__()
        self._make_finite = make_finite

    def on_train_batch_end(self, batch, logs=None):
        """Ends training with a loss that will not become a number again."""
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        """Comes before KerasTuner's callbacks, which compare objectives."""
        function = train_function_of(self.model)
        logs["examples_seen"] = float(function.controller.examples)
        self._make_finite(logs)


class _ScaledSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule for another base batch size.

    Args:
        schedule: The schedule that it was.
        factor: What its rates are multiplied by.
        ratio: New base batch size divided by the old one: steps are shorter.
    """

    def __init__(self, schedule, factor, ratio):
        self.schedule = schedule
        self.factor = factor
        self.ratio = ratio

    def __call__(self, step):
        step = keras.ops.cast(step, "float32") * self.ratio
        return self.factor * self.schedule(step)

    def get_config(self):
        return {
            "schedule": self.schedule,
            "factor": self.factor,
            "ratio": self.ratio,
        }


def _base_of(state):
    return state["training"]["controller"]["base_batch_size"]
