"""Policies that state a size without looking at gradient noise."""

import math
import warnings

from keras_batchsize import _checks
from keras_batchsize._policies_base import BatchSizePolicy

# More than any machine can hold, so that infinity is told from a size.
_MOST = 1e12


class BatchSizeSchedule(BatchSizePolicy):
    """A size for each epoch, stated beforehand.

    Smith et al. 2018 (ICLR; arXiv:1711.00489): where a learning rate would be
    cut by k, grow the batch by k and leave the rate alone. What they keep is
    the noise of SGD, g ≈ ε·N/B for a rate ε and N examples (Smith and Le
    2018, arXiv:1710.06451). For that use combine it with
    `learning_rate_scaling="none"`.

    Args:
        schedule: A function from the zero-based epoch to a batch size, or a
            dict from epochs to the size that holds from then on.
    """

    needs_noise = False
    gradual = False

    def __init__(self, schedule):
        if not callable(schedule) and not isinstance(schedule, dict):
            raise TypeError(
                "`schedule` must be a function of the epoch or a dict from "
                "epochs to batch sizes: it states the size of each epoch. "
                f"Received: schedule={schedule!r}. Use {{0: 32, 10: 128}}."
            )
        if isinstance(schedule, dict):
            for epoch, size in schedule.items():
                _checks.real(
                    "schedule",
                    epoch,
                    0,
                    _MOST,
                    "its keys are zero-based epochs",
                    "Use {0: 32, 10: 128}.",
                )
                _size_at(epoch, size)
        self.schedule = schedule

    def wish(self, status):
        """Returns the size stated for the epoch."""
        if callable(self.schedule):
            return _size_at(status.epoch, self.schedule(status.epoch))
        past = [epoch for epoch in self.schedule if epoch <= status.epoch]
        return self.schedule[max(past)] if past else status.batch_size

    def reason(self, status):
        """Names the epoch."""
        return f"scheduled for epoch {status.epoch + 1}"


def _size_at(epoch, size):
    """Returns what a schedule states for an epoch, or raises."""
    return _checks.real(
        f"schedule at epoch {epoch}",
        size,
        1,
        _MOST,
        "it states how many examples an update of that epoch has",
        "Use {0: 32, 10: 128}, or a function that returns such sizes.",
    )


class GrowOnPlateau(BatchSizePolicy):
    """Grows the batch when a metric has stopped improving.

    The twin of `keras.callbacks.ReduceLROnPlateau`, with the same waiting
    and arguments of the same names; a larger batch lowers the noise of SGD,
    g ≈ ε·N/B for a rate ε and N examples, as a smaller rate does (Smith and
    Le 2018, arXiv:1710.06451; Smith et al. 2018, ICLR; arXiv:1711.00489).
    Combine it with `learning_rate_scaling="none"` for that effect.

    Args:
        monitor: Key of the epoch logs to watch.
        factor: By how much to grow, at least 2.
        patience: Epochs without improvement before growing.
        min_delta: Smallest change that counts as an improvement.
        cooldown: Epochs to wait after growing.
        mode: "min", "max", or "auto" to tell from the name of a loss, an
            accuracy or an AUC.
    """

    needs_noise = False
    gradual = False

    def __init__(
        self,
        monitor="val_loss",
        factor=2,
        patience=10,
        min_delta=1e-4,
        cooldown=0,
        mode="auto",
    ):
        why = "the sizes that may be used are doublings of the base size"
        self.monitor = monitor
        self.factor = _checks.real("factor", factor, 2.0, 1e6, why, "Use 2.")
        for name, value, low, why, remedy in (
            ("patience", patience, 0, "it counts epochs", 10),
            ("cooldown", cooldown, 0, "it counts epochs", 0),
            ("min_delta", min_delta, -_MOST, "less is no improvement", 1e-4),
        ):
            edit = f"Use {name}={remedy}."
            _checks.real(name, value, low, _MOST, why, edit)
        self.patience = patience
        self.min_delta = abs(min_delta)
        self.cooldown = cooldown
        self.mode = _checks.known(
            "mode", mode, ("auto", "min", "max"), "it says which way is better"
        )
        self._sign = 1.0 if direction_of(monitor, mode) == "min" else -1.0
        self.reset()

    def reset(self):
        """Forgets the best value, waiting times and the size grown to."""
        self._state = {"best": None, "wait": 0, "cooling": 0, "wished": None}

    def on_epoch_end(self, status, logs):
        """Counts the epochs without improvement."""
        if self.monitor not in logs:
            # Not an error: with `validation_freq=2` it is there every other
            # epoch. Keras warns as well.
            warnings.warn(
                f"`monitor` is not among the logs of this epoch, so the batch "
                f"size cannot follow it. Received: monitor={self.monitor!r}; "
                f"the logs have {sorted(logs)}. Use one of these, or pass "
                "`validation_data` to `fit`.",
                stacklevel=2,
            )
            return
        # As plain JSON: a user's callback may have put float32 into the logs.
        value, state = self._sign * float(logs[self.monitor]), self._state
        if state["cooling"] > 0:
            state["cooling"] -= 1
        best = math.inf if state["best"] is None else state["best"]
        # NaN is no improvement, and nothing would improve on it.
        if value + self.min_delta < best:
            state["best"], state["wait"] = value, 0
        elif state["cooling"] <= 0:
            state["wait"] += 1
            if state["wait"] >= self.patience:
                grown = status.batch_size * self.factor
                # Replicas may leave a wider gap than a factor of two.
                state["wished"] = max(grown, status.larger)
                state["cooling"], state["wait"] = self.cooldown, 0

    def wish(self, status):
        """Returns the size grown to at the last plateau."""
        return self._state["wished"] or status.batch_size

    def reason(self, status):
        """Names the metric."""
        return f"no improvement of {self.monitor}"

    def get_state(self):
        """Returns best value, waiting times and the size grown to."""
        return dict(self._state)

    def set_state(self, state):
        """Takes over what `get_state` returned, here or in another policy."""
        self.reset()
        if isinstance(state, dict) and state.keys() >= self._state.keys():
            self._state = {key: state[key] for key in self._state}


def direction_of(monitor, mode="auto"):
    """Says whether a metric is to be minimised or maximised.

    Args:
        monitor: Key of the epoch logs.
        mode: "min", "max", or "auto" to tell from the name.

    Returns:
        "min" or "max".

    Raises:
        ValueError: If the name does not tell.
    """
    if mode != "auto":
        return mode
    if monitor.endswith("loss"):
        return "min"
    if monitor.endswith(("acc", "accuracy", "auc")):
        return "max"
    raise ValueError(
        "`mode` must be given for a metric whose name does not say which way "
        "is better: taken the wrong way it would never improve. Received: "
        f"monitor={monitor!r}, mode='auto'. Use mode=\"min\" or mode=\"max\"."
    )


class Fixed(BatchSizePolicy):
    """Always the same size.

    Args:
        batch_size: The size, or None for the base batch size.
    """

    needs_noise = False
    gradual = False

    def __init__(self, batch_size=None):
        if batch_size is not None:
            batch_size = _checks.positive_int(
                "batch_size",
                batch_size,
                "it counts the examples of an update",
                "Use 32.",
            )
        self.batch_size = batch_size

    def wish(self, status):
        """Returns the size it was given."""
        return self.batch_size or status.base_batch_size

    def reason(self, status):
        """Says that it is fixed."""
        return "fixed"
