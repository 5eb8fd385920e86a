"""What a `HyperModel` can learn of the trial that it is asked to fit.

KerasTuner hands over callbacks only. From those that it adds itself one can
read the tuner, the objective and the folder of the trial. They are told by the
names of their classes, as KerasTuner tells TensorBoard's: importing them would
reach into its private modules.
"""

import json
import os

import keras
import tensorflow as tf

from keras_batchsize._callbacks_base import train_function_of

_STATE_FILE = "batch_size.json"
_REPORT_FILE = "batch_size_report.json"


class TrialFiles:
    """Tuner, objectives and files of one trial.

    Where a user's own `Tuner` calls `HyperModel.fit` without KerasTuner's
    callbacks, nothing is known and nothing is written.

    Attributes:
        objectives: Dict from names of objectives to "min" or "max".
        objective: KerasTuner's `Objective`, or None.
        tensorboard: The `keras.callbacks.TensorBoard` of the trial, or None.
        checkpoint: KerasTuner's `SaveBestEpoch`, or None.
    """

    def __init__(self, hp, callbacks):
        by_name = {type(one).__name__: one for one in callbacks}
        self.checkpoint = by_name.get("SaveBestEpoch")
        self.tensorboard = by_name.get("TensorBoard")
        self.objective = None
        self._hp = hp
        self._tuner = self._trial_id = None
        with_tuner = by_name.get("TunerCallback")
        if with_tuner is not None:
            self._tuner = with_tuner.tuner
            self._trial_id = with_tuner.trial.trial_id
            self.objective = self._tuner.oracle.objective
        elif self.checkpoint is not None:
            self.objective = self.checkpoint.objective
        self.objectives = _directions(self.objective)

    @property
    def planned_epochs(self):
        """Epochs of the longest trials; None for those given to `fit`."""
        if self._tuner is None:
            return None
        # A worker's oracle, on the other side of gRPC, does not tell.
        return getattr(self._tuner.oracle, "max_epochs", None)

    @property
    def is_shortened(self):
        """Whether this trial may train for fewer epochs than others."""
        return "tuner/epochs" in self._hp.values

    # State from trial to trial.

    def past_state(self):
        """Returns the state of the trial that this one goes on from, or None.

        Hyperband loads the weights of that trial, and nothing else.
        """
        past = self._hp.values.get("tuner/trial_id")
        if past is None or self._tuner is None:
            return None
        path = os.path.join(self._tuner.get_trial_dir(past), _STATE_FILE)
        if not tf.io.gfile.exists(path):
            return None
        with tf.io.gfile.GFile(path) as file:
            return json.loads(file.read())

    def write_state(self, state):
        """Saves the state that goes with the checkpoint of the trial."""
        self._write(_STATE_FILE, json.dumps(state))

    def write_report(self, report):
        """Saves the report, for `kb.Report.load`."""
        if report is not None:
            self._write(_REPORT_FILE, json.dumps(report.to_dict()))

    def _write(self, name, text):
        if self._tuner is None:
            return
        folder = self._tuner.get_trial_dir(self._trial_id)
        with tf.io.gfile.GFile(os.path.join(folder, name), "w") as file:
            file.write(text)


class KeepState(keras.callbacks.Callback):
    """Lets a trial go on from another's state, and saves its own.

    To be called after `SaveBestEpoch`, which keeps the best epoch of all
    executions of a trial: state and weights then belong together.

    Args:
        files: The `TrialFiles`.
        target: The `TimeToTarget` of the trial, or None.
        past: State to go on from, or None.
    """

    def __init__(self, files, target, past):
        super().__init__()
        self._files = files
        self._target = target
        self._past = past
        self._best = getattr(files.checkpoint, "best_value", None)

    def on_epoch_begin(self, epoch, logs=None):
        """Hands the state over, once every callback has begun."""
        if self._past is not None:
            train_function_of(self.model).set_state(self._past["training"])
        self._past = None

    def on_epoch_end(self, epoch, logs=None):
        """Saves, if this epoch's weights were saved."""
        checkpoint = self._files.checkpoint
        if checkpoint is None:
            return
        if checkpoint.objective.has_value(logs):
            best, self._best = self._best, checkpoint.best_value
            if best == self._best:
                return
        self._files.write_state(
            {
                "training": train_function_of(self.model).get_state(),
                "target": self._target and self._target.get_state(),
            }
        )


def _directions(objective):
    """Returns a dict from the names of single objectives to directions."""
    if objective is None:
        return {}
    single = getattr(objective, "objectives", [objective])
    return {
        one.name: one.direction
        for one in single
        # What KerasTuner makes of a `fit` that returns a number.
        if one.name != "default_objective"
    }
