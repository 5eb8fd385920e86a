"""Which batch size training should use next.

A policy answers one question, `wish(status)`: how many examples should an
update have, given what is known. It is small, usually stateless, and knows
nothing of ladders, bounds or waiting; `next_batch_size` applies those to all
policies alike. To add a policy, subclass `BatchSizePolicy` and list it in
`POLICIES`.
"""

import dataclasses
import math

from keras_batchsize import _checks
from keras_batchsize import throughput
from keras_batchsize.throughput import StepTime


@dataclasses.dataclass(frozen=True)
class Status:
    """What a policy may look at.

    Attributes:
        batch_size: Examples per update now.
        base_batch_size: B₀, the size the user's learning rate was meant for.
        smaller: The next smaller size that may be used, or `batch_size`.
        larger: The next larger size that may be used, or `batch_size`.
        noise_scale: φ in examples. NaN while it is not resolved.
        squared_norm: ‖G‖² in (loss / parameter)².
        trace: tr(Σ), same unit.
        step_time: The `StepTime` of this run, or None before the first timed
            update.
        learning_rate: The rate in force, with the factor for `batch_size`.
        loss: Mean training loss of the epoch so far. NaN if there is none.
        epoch: Zero-based integer.
    """

    batch_size: int
    base_batch_size: int
    smaller: int
    larger: int
    noise_scale: float = math.nan
    squared_norm: float = math.nan
    trace: float = math.nan
    step_time: StepTime | None = None
    learning_rate: float = math.nan
    loss: float = math.nan
    epoch: int = 0


class BatchSizePolicy:
    """Base class of all policies.

    Attributes:
        needs_noise: Whether `wish` looks at gradient statistics. If so, it is
            asked only while the noise scale is resolved.
        gradual: Whether its wishes are followed by at most a factor of two per
            change, with a waiting time in between. False for policies that
            state a size outright.
    """

    needs_noise = True
    gradual = True

    def wish(self, status):
        """Returns the batch size this policy wants, in examples.

        Args:
            status: A `Status`.

        Returns:
            Float; `status.batch_size` for no change.
        """
        raise NotImplementedError(
            "A policy must implement `wish(status)`: it is asked for the next "
            f"batch size. Received: {type(self).__name__} without it. Return "
            "a number of examples."
        )

    def reason(self, status):
        """Returns a few words that explain the wish, for logs and report."""
        return f"noise scale {status.noise_scale:,.0f}"

    def on_epoch_end(self, status, logs):
        """Is told the `Status` and the metrics at the end of each epoch."""

    def get_state(self):
        """Returns what evolves during training, as plain JSON types."""
        return {}

    def set_state(self, state):
        """Takes over what `get_state` returned."""

    def __repr__(self):
        arguments = ", ".join(
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if not name.startswith("_")
        )
        return f"{type(self).__name__}({arguments})"


class Goodput(BatchSizePolicy):
    """The size that trains fastest: throughput x statistical efficiency.

    Goodput is examples per second times (φ + B₀)/(φ + B) (Qiao et al. 2021,
    Pollux, OSDI, eqs. 1 and 7). With a time per update of a + c·B seconds it
    is largest at √(φ·a/c). The size changes only if the speed-up predicted
    for the change reaches `min_speedup`.

    Args:
        min_speedup: Smallest speed-up worth a change; 1.05 is 5 %.
    """

    def __init__(self, min_speedup=1.05):
        self.min_speedup = _checks.real(
            "min_speedup",
            min_speedup,
            1.0,
            10.0,
            "below 1 a change would slow training down",
            "Use 1.05.",
        )

    def wish(self, status):
        """Returns the neighbouring size with the largest goodput."""
        if status.step_time is None:
            return status.batch_size
        gains = {
            size: throughput.speedup(
                status.batch_size, size, status.step_time, status.noise_scale
            )
            for size in (status.smaller, status.larger)
        }
        best = max(gains, key=gains.get)
        return best if gains[best] >= self.min_speedup else status.batch_size


class NoiseScale(BatchSizePolicy):
    """A fixed multiple of the noise scale, B = factor·φ.

    McCandlish et al. 2018 (arXiv:1812.06162), Sec. 2.2: at B = φ training
    needs twice the examples and twice the updates of the respective minimum.
    On image classifiers φ was 2 to 8 times the measured critical batch size
    (their Table 1), which speaks for a factor below one there.

    Args:
        factor: Batch size in units of the noise scale.
    """

    def __init__(self, factor=1.0):
        self.factor = _checks.real(
            "factor",
            factor,
            1e-6,
            1e6,
            "the batch size is this multiple of the noise scale",
            "Use 1.0, or 0.25 for fewer examples in all.",
        )

    def wish(self, status):
        """Returns factor·φ."""
        return self.factor * status.noise_scale


class NormTest(BatchSizePolicy):
    """The norm test: the error of the gradient at most `eta` of its norm.

    Byrd et al. 2012 (Math. Program. 134), eq. 3.1: tr(Σ)/B <= η²‖G‖², that
    is B >= φ/η². The test in its usual form divides by the squared norm of
    the batch gradient, which contains the noise it is compared with, so that
    no η >= 1 could ever grow the batch; here ‖G‖² is the unbiased estimate.
    As in the paper, the size never shrinks.

    Args:
        eta: Largest relative error of a batch gradient.
    """

    def __init__(self, eta=1.0):
        self.eta = _checks.real(
            "eta",
            eta,
            1e-3,
            1e3,
            "it is the relative error allowed in a gradient",
            "Use 1.0.",
        )

    def wish(self, status):
        """Returns φ/η², or the present size if that is larger."""
        return max(status.batch_size, status.noise_scale / self.eta**2)


class CosineSimilarity(BatchSizePolicy):
    """Two halves of a batch point the same way up to a cosine of `target`.

    Qin et al. 2021 (SimiGrad, NeurIPS), Sec. 3. The cosine between the
    gradients of two halves is 1/(1 + 2φ/B) on average, hence
    B = 2φ·target/(1 - target). Using the moments instead of the cosine of
    each step avoids its bias where the noise is large.

    Args:
        target: Wanted cosine, between 0 and 1.
    """

    def __init__(self, target=0.5):
        self.target = _checks.real(
            "target",
            target,
            0.01,
            0.99,
            "it is a cosine between the gradients of two half batches",
            "Use 0.5, which is B = 2 x noise scale.",
        )

    def wish(self, status):
        """Returns 2φ·target/(1 - target)."""
        odds = self.target / (1.0 - self.target)
        return 2.0 * status.noise_scale * odds


class CABS(BatchSizePolicy):
    """Coupled adaptive batch size: B = c·(learning rate)·tr(Σ)/loss.

    Balles et al. 2017 (UAI; arXiv:1612.05086), eq. 22. Derived for plain SGD
    on a loss whose minimum is near zero.

    Args:
        constant: c, dimensionless.
    """

    def __init__(self, constant=1.0):
        self.constant = _checks.real(
            "constant",
            constant,
            1e-6,
            1e6,
            "the batch size is proportional to it",
            "Use 1.0.",
        )

    def wish(self, status):
        """Returns c·lr·tr(Σ)/loss, or the present size without a loss."""
        if not status.loss > 0.0:
            return status.batch_size
        noise = status.learning_rate * max(status.trace, 0.0)
        return self.constant * noise / status.loss

    def reason(self, status):
        """Names the two quantities of the formula."""
        return f"gradient variance {status.trace:.3g}, loss {status.loss:.3g}"


class GradientDiversity(BatchSizePolicy):
    """A multiple of the gradient diversity, B = delta·(1 + φ).

    Yin et al. 2018 (AISTATS; arXiv:1706.05699), Def. 2 and Thm. 3: mini-batch
    SGD converges as single-example SGD does while B is below n·Δ, where
    n·Δ = n·Σ‖gᵢ‖²/‖Σgᵢ‖² is 1 + φ for the data as a whole. DiveBatch
    re-estimates it during training.

    Args:
        delta: Fraction of the diversity bound to use.
    """

    def __init__(self, delta=0.1):
        self.delta = _checks.real(
            "delta",
            delta,
            1e-6,
            1e6,
            "the batch size is this fraction of the diversity bound",
            "Use 0.1.",
        )

    def wish(self, status):
        """Returns delta·(1 + φ)."""
        return self.delta * (1.0 + status.noise_scale)


class BatchSizeSchedule(BatchSizePolicy):
    """A size for each epoch, stated beforehand.

    Smith et al. 2018 (ICLR; arXiv:1711.00489): where a learning rate would be
    cut by k, grow the batch by k and leave the rate alone. For that use
    combine it with `learning_rate_scaling="none"`.

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
        self.schedule = schedule

    def wish(self, status):
        """Returns the size stated for the epoch."""
        if callable(self.schedule):
            return self.schedule(status.epoch)
        past = [epoch for epoch in self.schedule if epoch <= status.epoch]
        return self.schedule[max(past)] if past else status.batch_size

    def reason(self, status):
        """Names the epoch."""
        return f"scheduled for epoch {status.epoch + 1}"


class GrowOnPlateau(BatchSizePolicy):
    """Grows the batch when a metric has stopped improving.

    The twin of `keras.callbacks.ReduceLROnPlateau`, with the same arguments;
    a larger batch lowers the noise of SGD as a smaller rate does (Smith et al.
    2018, ICLR; arXiv:1711.00489). Combine it with
    `learning_rate_scaling="none"` for that effect.

    Args:
        monitor: Key of the epoch logs to watch.
        factor: By how much to grow.
        patience: Epochs without improvement before growing.
        min_delta: Smallest change that counts as an improvement.
        cooldown: Epochs to wait after growing.
        mode: "min" or "max".
    """

    needs_noise = False
    gradual = False

    def __init__(
        self,
        monitor="val_loss",
        factor=2,
        patience=5,
        min_delta=1e-4,
        cooldown=0,
        mode="min",
    ):
        why = "the batch grows by it"
        self.monitor = monitor
        self.factor = _checks.real("factor", factor, 1.0, 1e6, why, "Use 2.")
        self.patience = patience
        self.min_delta = min_delta
        self.cooldown = cooldown
        self.mode = _checks.known(
            "mode", mode, ("min", "max"), "it says which way is better"
        )
        self._state = {"best": None, "wait": 0, "cooling": 0, "wished": None}

    def on_epoch_end(self, status, logs):
        """Counts the epochs without improvement."""
        if self.monitor not in logs:
            raise ValueError(
                f"`monitor` must be a key of the logs of an epoch: the size "
                f"follows it. Received: monitor={self.monitor!r}; the logs "
                f"have {sorted(logs)}. Use one of these."
            )
        sign = 1.0 if self.mode == "min" else -1.0
        value, state = sign * logs[self.monitor], self._state
        if state["cooling"] > 0:
            state["cooling"] -= 1
            state["wait"] = 0
        if state["best"] is None or value < state["best"] - self.min_delta:
            state["best"], state["wait"] = value, 0
        elif state["cooling"] <= 0:
            state["wait"] += 1
        if state["wait"] >= self.patience:
            state["wished"] = status.batch_size * self.factor
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
        """Takes over what `get_state` returned."""
        self._state = dict(state)


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


class Measure(BatchSizePolicy):
    """Changes nothing and measures: for looking before adapting."""

    def wish(self, status):
        """Returns the present size."""
        return status.batch_size


POLICIES = {
    "goodput": Goodput,
    "noise_scale": NoiseScale,
    "norm_test": NormTest,
    "cosine": CosineSimilarity,
    "cabs": CABS,
    "diversity": GradientDiversity,
    "plateau": GrowOnPlateau,
    "fixed": Fixed,
    "measure": Measure,
}


def get(policy):
    """Resolves a policy given by name or as an object.

    Args:
        policy: A name in `POLICIES` or a `BatchSizePolicy`.

    Returns:
        A `BatchSizePolicy`.

    Raises:
        ValueError: If the name is not known.
        TypeError: If it is neither a name nor a policy.
    """
    if isinstance(policy, BatchSizePolicy):
        return policy
    if not isinstance(policy, str):
        raise TypeError(
            "`policy` must be a name or a `BatchSizePolicy`: it decides the "
            f"batch size. Received: policy={policy!r} of type "
            f'{type(policy).__name__}. Use policy="goodput".'
        )
    _checks.known(
        "policy", policy, POLICIES, "it names who decides the batch size"
    )
    return POLICIES[policy]()


# A wish must pass the middle between two sizes by this factor: without it a
# noise scale near the middle would move the size to and fro.
_HYSTERESIS = 1.1


def next_batch_size(policy, status, estimate, ladder):
    """Turns a policy's wish into a size on the ladder.

    A gradual policy is asked twice, at both ends of the confidence interval
    of the noise scale: the size grows only if growing is right even for the
    smallest noise scale the data allow, and shrinks only if shrinking is right
    for the largest. In between it is held; so it is while not resolved.

    Args:
        policy: A `BatchSizePolicy`.
        status: A `Status`; its noise fields are filled in here.
        estimate: The `NoiseScaleEstimate`.
        ladder: The `Ladder` of sizes that may be used.

    Returns:
        Integer on the ladder; `status.batch_size` for no change.
    """
    if policy.needs_noise and not estimate.resolved:
        return status.batch_size
    if not policy.gradual:
        return ladder.nearest(policy.wish(status))
    wish_if_low = policy.wish(at_noise(status, estimate, estimate.lower))
    wish_if_high = policy.wish(at_noise(status, estimate, estimate.upper))
    up = math.sqrt(status.batch_size * status.larger) * _HYSTERESIS
    down = math.sqrt(status.batch_size * status.smaller) / _HYSTERESIS
    if status.larger > status.batch_size and wish_if_low >= up:
        return status.larger
    if status.smaller < status.batch_size and wish_if_high <= down:
        return status.smaller
    return status.batch_size


def at_noise(status, estimate, noise_scale):
    """Returns the status under the assumption of a noise scale.

    The trace keeps its estimate: it is known far better than ‖G‖².

    Args:
        status: A `Status`.
        estimate: The `NoiseScaleEstimate`.
        noise_scale: φ in examples.

    Returns:
        A `Status`.
    """
    return dataclasses.replace(
        status,
        noise_scale=noise_scale,
        squared_norm=estimate.squared_norm,
        trace=estimate.trace,
    )
