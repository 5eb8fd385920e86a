"""`TimeToTarget`: how long training takes to get somewhere."""

import math
import time
import warnings

import keras

from keras_batchsize import _checks
from keras_batchsize import replicas
from keras_batchsize._callbacks_base import train_function_of
from keras_batchsize._policies_stated import direction_of


def checked_value(name, value):
    """Returns the value to reach as float, or raises.

    Args:
        name: Argument name as the caller wrote it.
        value: What was received.
    """
    return _checks.real(
        name, value, -1e30, 1e30, "it is the value to reach", "Use 0.95, say."
    )


def checked_seconds(name, seconds):
    """Returns the budget as float, or raises.

    Args:
        name: Argument name as the caller wrote it.
        seconds: What was received.
    """
    return _checks.real(
        name,
        seconds,
        1e-3,
        1e9,
        "it is the number of seconds after which training stops",
        "Use 60.",
    )


class TrainingClock:
    """Adds up the seconds of training steps, those of tracing apart.

    A step in which a graph was traced counts as long as its examples took on
    average in the other steps; the rest of it is tracing. Without other steps
    it counts in full.

    Attributes:
        examples: Examples of all steps.
    """

    def __init__(self):
        self.examples = 0
        self._steady = [0.0, 0]
        self._traced = [0.0, 0]

    def book(self, seconds, examples, traced):
        """Adds one step.

        Args:
            seconds: Wall time of the step.
            examples: Examples in it.
            traced: Whether a graph was traced in it.
        """
        self.examples += examples
        booked = self._traced if traced else self._steady
        booked[0] += seconds
        booked[1] += examples

    @property
    def seconds(self):
        """Seconds of training, without tracing."""
        seconds, examples = self._steady
        traced_seconds, traced_examples = self._traced
        if not examples:
            return traced_seconds
        pace = seconds / examples
        return seconds + min(pace * traced_examples, traced_seconds)

    @property
    def tracing_seconds(self):
        """Seconds that went into tracing and compiling."""
        return self._steady[0] + self._traced[0] - self.seconds

    def get_state(self):
        """Returns everything that evolves, as plain JSON types."""
        return {
            "examples": self.examples,
            "steady": list(self._steady),
            "traced": list(self._traced),
        }

    def set_state(self, state):
        """Takes over what `get_state` returned."""
        self.examples = state["examples"]
        self._steady = list(state["steady"])
        self._traced = list(state["traced"])


class TimeToTarget(keras.callbacks.Callback):
    """Measures the time to a target, and stops training there.

    The clock runs while training steps run: validation, and tracing of graphs,
    are off it. Training stops at the end of the epoch in which the target is
    reached, or when a budget is spent.

    At the end of each epoch it adds to the logs, and so to `History`:

    - `time_to_target`: seconds of training to the target. While that is not
      reached, budget·(1 + g) with the gap g = d/(1 + d) of the best value so
      far, where d is its relative distance from the target. So the number is
      always finite, anything that arrives beats anything that does not, and
      the closer the better: an objective for `kt.Objective("time_to_target",
      "min")`.
    - `examples_to_target`: the same in examples, with `budget_examples`. Only
      where the batch size is decided by an `AdaptiveTrainer` or a
      `DynamicBatchSize`, which count them; so for `examples_seen`. Not where
      data that do not tell their length are left within the first epoch.
    - `training_seconds` and `tracing_seconds`, both so far.

    ```python
    model.fit(x, y, validation_data=(x_val, y_val), epochs=50, callbacks=[
        kb.TimeToTarget("val_accuracy", target=0.97, budget=120)])
    ```

    Where examples are counted, a training that a `kb.BackupAndRestore` later
    in the list resumes goes on with what it had of time, examples and best
    value; after a plain `fit` the clock starts anew.

    Args:
        monitor: Key of the epoch logs to watch.
        target: Value to reach.
        budget: Seconds of training after which to stop.
        mode: "min" if smaller values are better, "max" if larger ones are,
            "auto" to tell from the name of a loss, an accuracy or an AUC.
        budget_examples: Examples after which to stop, refused where they are
            not counted. None for `budget_epochs` times those of an epoch.

    Attributes:
        budget_epochs: Epochs that `budget_examples` stands for; None for the
            number given to `fit`.
        epoch_examples: Examples of an epoch; 0 to learn it from the first.
    """

    def __init__(
        self, monitor, target, budget, mode="auto", budget_examples=None
    ):
        super().__init__()
        self.monitor = monitor
        self.target = checked_value("target", target)
        self.budget = checked_seconds("budget", budget)
        _checks.known(
            "mode", mode, ("auto", "min", "max"), "it says which way is better"
        )
        self.mode = direction_of(monitor, mode)
        if budget_examples is not None:
            budget_examples = _checks.positive_int(
                "budget_examples",
                budget_examples,
                "it is the number of examples after which training stops",
                "Use 1_000_000, say.",
            )
        self.budget_examples = budget_examples
        self.budget_epochs = None
        self.epoch_examples = 0
        self._state = None
        self._name = None
        self._restart()

    def _restart(self):
        self._clock = TrainingClock()
        self._best = None
        self._reached = None
        self._epoch_examples = self.epoch_examples
        self._steps = 0
        self._is_logged, self._logged = False, []

    @property
    def reached(self):
        """Whether the target was reached within the budgets."""
        return self._reached is not None

    def get_state(self):
        """Returns clock, best value and arrival, as plain JSON types."""
        return {
            "clock": self._clock.get_state(),
            "best": self._best,
            "reached": self._reached,
            "epoch_examples": self._epoch_examples,
        }

    def set_state(self, state):
        """Lets the next training go on from what `get_state` returned.

        Args:
            state: Dict of plain JSON types.
        """
        self._state = state

    def on_train_begin(self, logs=None):
        """Starts anew, or from the state given."""
        self._restart()
        self._go_on_from(self._state)
        self._state = None

    def _go_on_from(self, state):
        if state is not None:
            self._clock.set_state(state["clock"])
            self._best = state["best"]
            self._reached = state["reached"]
            self._epoch_examples = max(
                self._epoch_examples, state["epoch_examples"]
            )

    def on_epoch_begin(self, epoch, logs=None):
        """Starts the clock."""
        self._started = time.perf_counter()

    def on_train_batch_begin(self, batch, logs=None):
        """Attaches itself, once the train function is in place."""
        function = train_function_of(self.model)
        if function is None:
            self._check_counted()
        elif self._book_superbatch not in function.on_superbatch:
            # Keras calls back once for several with `steps_per_execution`.
            function.on_superbatch.append(self._book_superbatch)
            self._name = self._name_beside(function.tally.state_getters)
            function.tally.state_getters[self._name] = self.get_state

    def _name_beside(self, others):
        """Returns under which name a backup has its state.

        Its place tells it from those alike, not its budget: a training may be
        resumed with more of that.
        """
        name = f"TimeToTarget {self.monitor} {self.mode} {self.target} "
        return name + str(sum(one.startswith(name) for one in others))

    def on_train_batch_end(self, batch, logs=None):
        """Ends training where the budget is spent."""
        if train_function_of(self.model) is None:
            # Of steps of equal length: only the ratio of two counts matters.
            self._clock.book(self._lap(), 1, traced=self._steps == 0)
            self._steps += 1
        if self.reached or not self._within_budget():
            self.model.stop_training = True

    def _book_superbatch(self, row):
        """Books a superbatch when it has been trained on."""
        function = train_function_of(self.model)
        self._go_on_from(function.tally.restored.pop(self._name, None))
        last, seconds = function.controller.last, self._lap()
        if replicas.count(self.model) > 1:
            # Several workers have agreed on it, and must stop alike.
            seconds = last.seconds
        self._clock.book(seconds, last.examples, last.traced)

    def _lap(self):
        """Returns the seconds since the last step, or the epoch's begin."""
        # After validation `on_epoch_begin` starts the clock again.
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        return seconds

    def _check_counted(self):
        if self.budget_examples is not None:
            raise ValueError(
                "`budget_examples` needs a fit whose batch size is decided: "
                "Keras does not tell how many examples a step has. Received: "
                f"budget_examples={self.budget_examples} with a plain `fit`. "
                "Use budget_examples=None, or add kb.DynamicBatchSize() to "
                "`callbacks`."
            )

    def on_epoch_end(self, epoch, logs=None):
        """Adds the numbers to the logs; ends training at the target."""
        self._look(logs)
        function = train_function_of(self.model)
        arrival = self._reached or {}
        logs["time_to_target"] = arrival.get(
            "seconds", self.budget * (1.0 + self._gap())
        )
        if function is not None:
            self._note_epoch(function)
            limit = self.examples_limit
            if arrival or limit:
                logs["examples_to_target"] = arrival.get(
                    "examples", limit * (1.0 + self._gap())
                )
            logs["examples_seen"] = float(self._clock.examples)
        logs["training_seconds"] = self._clock.seconds
        logs["tracing_seconds"] = self._clock.tracing_seconds
        if self.reached:
            self.model.stop_training = True

    def on_train_end(self, logs=None):
        """Warns where there was nothing to watch."""
        # Before a resumption it may have been there.
        was_there = self._is_logged or self._best is not None
        if self._logged and not was_there:
            warnings.warn(
                f"`TimeToTarget` conditioned on metric `{self.monitor}` which "
                "was not available in any epoch, so that the target was not "
                f"reached. Available metrics are: {', '.join(self._logged)}. "
                "Pass `validation_data` to `fit`, or watch one of these.",
                stacklevel=2,
            )

    def _look(self, logs):
        """Takes in the value of this epoch."""
        self._logged = sorted(logs)
        if self.monitor not in logs:
            self._check_monitor(logs)
            return
        self._is_logged = True
        value = float(logs[self.monitor])
        if math.isfinite(value) and (
            self._best is None or self._is_as_good(value, self._best)
        ):
            self._best = value
        if (
            self._reached is None
            and self._is_as_good(value, self.target)
            and self._within_budget()
        ):
            self._reached = {
                "seconds": self._clock.seconds,
                "examples": float(self._clock.examples),
            }

    def _check_monitor(self, logs):
        # With `validation_freq=2` it is there every other epoch.
        validated = any(name.startswith("val_") for name in logs)
        if self.monitor.startswith("val_") and not validated:
            return
        raise ValueError(
            "`monitor` must be among the logs of an epoch: it says when the "
            f"target is reached. Received: monitor={self.monitor!r}; the logs "
            f"have {sorted(logs)}. Use one of these."
        )

    def _is_as_good(self, value, other):
        return value <= other if self.mode == "min" else value >= other

    def _gap(self):
        """How far the best value is from the target, from 0 to 1."""
        if self._best is None:
            return 1.0
        if self._is_as_good(self._best, self.target):
            return 0.0  # Reached, but over the budget.
        distance = abs(self.target - self._best) / (abs(self.target) or 1.0)
        return 1.0 - 1.0 / (1.0 + distance)

    def _within_budget(self):
        limit = self.budget_examples or math.inf
        return self._clock.seconds <= self.budget and (
            self._clock.examples <= limit
        )

    def _note_epoch(self, function):
        """Learns the length of an epoch from one that was not cut short."""
        steps = self.params.get("steps")
        length = function.epoch_examples
        if self.model.stop_training and steps is None:
            return
        if self.model.stop_training:
            length = steps * function.controller.superbatch_size
            if self._epoch_examples:
                length = self._epoch_examples
        self._epoch_examples = max(self._epoch_examples, length)

    @property
    def examples_limit(self):
        """Examples after which to stop; 0 while that is not known."""
        if self.budget_examples is not None:
            return self.budget_examples
        # Keras sets `params` when training begins.
        epochs = self.budget_epochs or (self.params or {}).get("epochs", 1)
        known = self._epoch_examples or self.epoch_examples
        return epochs * (known or self._unknown_length(self._clock.examples))

    def _unknown_length(self, seen):
        """What to take for the examples of an epoch of which some were seen."""
        return 0
