"""Remembers what was measured, asks the policy, gives the next plan.

The controller is the one owner of state. It sees a `Measurement` after each
superbatch and holds the batch size, the learning-rate factor and the clocks;
it knows nothing of TensorFlow, and its state is plain JSON.
"""

import dataclasses
import math

from keras_batchsize import noise
from keras_batchsize import policies
from keras_batchsize import scaling
from keras_batchsize._controller_decisions import Decisions
from keras_batchsize._controller_speed import Speed
from keras_batchsize._controller_state import check_state
from keras_batchsize.clock import ExamplesClock
from keras_batchsize.measuring import PARTS
from keras_batchsize.measuring import MeasuringSchedule
from keras_batchsize.plan import largest_on_ladder
from keras_batchsize.plan import plan_for
from keras_batchsize.records import Measurement
from keras_batchsize.records import finite_or_none
from keras_batchsize.records import nan_if_none

# Horizons of the noise scale, in superbatches (an epoch has about 8 to 32),
# and the fewest measurements that each must hold.
_HORIZONS = (4, 16, 64)
_MEASUREMENTS = (1, 4, 16)

# The noise scale is never measured on fewer examples of a superbatch.
_FEWEST_MEASURED = 64

# After a change the size is held for so many superbatches and updates, in
# which its speed is timed and the estimate gets used to the new weights.
_DWELL_SUPERBATCHES = 4
_DWELL_UPDATES = 8


class Controller:
    """State and decisions of one training.

    Args:
        policy: A `BatchSizePolicy`.
        ladder: The `Ladder` of sizes that may be used.
        superbatch_size: Examples that Keras hands over at once.
        measure_every: Integer, "auto", or None for never.
        rule: Learning-rate rule, `factor(ratio, noise_scale) -> float`.
        replicas: Number of replicas that share an update.
    """

    def __init__(
        self,
        policy,
        ladder,
        superbatch_size,
        measure_every="auto",
        rule=scaling.none,
        replicas=1,
    ):
        self.policy = policy
        policy.reset()
        self.ladder = ladder
        self.superbatch_size = superbatch_size
        self.rule = rule
        self.replicas = replicas
        self.clock = ExamplesClock(ladder.base)
        self.batch_size = ladder.base
        self.examples = 0
        self.updates = 0
        self.base_steps = 0
        self.epoch = 0
        self.speed = Speed(superbatch_size)
        self._decisions = Decisions(policy, ladder, self.speed)
        self.measuring = MeasuringSchedule(measure_every)
        self._estimator = noise.NoiseScaleEstimator(
            [superbatch_size * horizon for horizon in _HORIZONS],
            _MEASUREMENTS,
        )
        self.largest_micro_batch_size = math.inf
        self._known_noise_scale = math.nan
        self._changed_at = (0, 0)
        self._healthy = True
        self.profile = None
        self.last = Measurement(0, 0)

    # What holds now.

    @property
    def plan(self):
        """The `BatchPlan` in force."""
        largest, at_hand = self.largest_micro_batch_size, self.superbatch_size
        if self.measures and self.batch_size > at_hand:
            # From two micro-batches noise can be measured, but not how well.
            largest = min(largest, max(self.batch_size // 4, 1))
        return plan_for(self.batch_size, largest, self.replicas, at_hand)

    @property
    def measures(self):
        """Whether gradient noise is measured at all."""
        return self.measuring.every is not None

    @property
    def noise_scale(self):
        """The `NoiseScaleEstimate` of all measurements so far."""
        return self._estimator.estimate()

    @property
    def skipped_measurements(self):
        """Measurements that were not finite and left out."""
        return self._estimator.skipped

    @property
    def learning_rate_factor(self):
        """What the base learning rate is multiplied by, without warm-up."""
        base = self.clock.batch_size
        noise_scale = self._known_noise_scale / base
        factor = float(self.rule(self.batch_size / base, noise_scale))
        if not 0.0 < factor < math.inf:
            raise ValueError(
                "A learning-rate rule must return a positive number: the rate "
                f"is multiplied by it. Received: {factor} from "
                f"{self.rule!r} for ratio={self.batch_size / base} and "
                f"noise_scale={noise_scale}. Let it return ratio**0.5, say; "
                "noise_scale is NaN until it is known."
            )
        return factor

    @property
    def step_time(self):
        """The fitted `StepTime`, or None before the first timed update."""
        return self.speed.step_time

    @property
    def timings(self):
        """The `Timings` of the run."""
        return self.speed.timings

    @property
    def goodput(self):
        """Useful examples per second at the present size; NaN if unknown."""
        return self.speed.goodput(self._status_at_estimate())

    @property
    def efficiency(self):
        """Function for the progress per example, see `Status`."""
        return policies.efficiency_under(self.rule)

    def wants_measurement(self, examples, examples_ahead):
        """Returns whether to measure the next superbatch.

        Args:
            examples: Examples in it. Only whole superbatches are measured,
                of two examples or more.
            examples_ahead: Examples whose measuring budget may be spent in
                advance: those left to train on, at most an epoch.
        """
        size, count = self.batch_size, self.examples_to_measure
        whole = examples == self.superbatch_size and count > 1
        if not whole or self.measures_for_free:
            return False
        ahead = examples_ahead * (self.timings.least(size) or 0.0) / size
        most = self.speed.most_to_measure(size, count)
        return self.measuring.is_due(self.updates, ahead, count, most)

    @property
    def examples_to_measure(self):
        """Examples of a superbatch on which its noise is measured.

        The spread of ‖G‖² falls with the examples of one measurement, but
        only with the square root of their number: few large measurements
        beat many small ones, up to some 2φ, where signal dominates.
        """
        upper = self.noise_scale.upper
        most = min(
            self.superbatch_size, PARTS * self.largest_micro_batch_size
        )
        if math.isinf(upper):
            return most
        return min(largest_on_ladder(_FEWEST_MEASURED, 2.0 * upper), most)

    @property
    def measures_for_free(self):
        """Whether updates have parts, micro-batches or those of replicas."""
        return self.replicas > 1 or self.plan.accumulation_steps > 1

    # What happens.

    def observe(self, measurement):
        """Takes in what one superbatch measured.

        Args:
            measurement: A `Measurement`.
        """
        size = self.batch_size
        self.examples += measurement.examples
        self.clock.advance(measurement.examples)
        self.updates += measurement.updates
        self.base_steps += math.ceil(measurement.examples / self.ladder.base)
        self._estimator.add(measurement.norms, measurement.examples)
        estimate = self._estimator.estimate()
        if estimate.resolved:
            self._known_noise_scale = estimate.value
        if measurement.timing.updates > 0:
            timing = measurement.timing
            self.speed.add(size, timing.seconds / timing.updates)
        self._book(measurement)
        # A loss of NaN is a diverged model; one without any loss is not.
        self._healthy = (
            measurement.loss is None or math.isfinite(measurement.loss)
        ) and all(norms.is_finite for norms in measurement.norms)
        self.last = measurement

    def _book(self, measurement):
        """Books what measuring cost; tracing is no cost of measuring."""
        before = self.updates - measurement.updates
        cost, total = measurement.measuring_seconds or None, measurement.seconds
        if measurement.traced:
            cost, total = cost and 0.0, 0.0
        count = sum(norms.examples for norms in measurement.norms[:1])
        self.measuring.book(before, total, cost, count)

    def observe_update(self, norms):
        """Takes in an update made outside of a superbatch, at an epoch's end.

        Args:
            norms: Its `MicroBatchNorms`.
        """
        self.updates += 1
        if norms.count >= 2:
            self._estimator.add([norms], 0)

    def limit_micro_batch_size(self, size, may_rise=False):
        """Lets no replica hold more in one pass, nor than an earlier limit."""
        if not may_rise:
            size = min(size, self.largest_micro_batch_size)
        self.largest_micro_batch_size = size
        self.speed.largest = min(self.superbatch_size, size * self.replicas)
        self.speed.fit()

    def expect(self, profile, is_new=False):
        """Takes over what a probe found out about memory and speed.

        Args:
            profile: A `BatchProfile`.
            is_new: Whether it may raise a limit that was set before.
        """
        self.limit_micro_batch_size(profile.largest_micro_batch_size, is_new)
        self.speed.expect(profile.step_time)
        self.profile = profile

    def start_epoch(self, epoch):
        """Is told that an epoch begins.

        Args:
            epoch: Zero-based integer.
        """
        self.epoch = epoch
        self.clock.start_epoch()

    def measure_for_rule(self):
        """Measures even if the policy needs no noise: the rate's rule does."""
        if not self.measures:
            self.measuring = MeasuringSchedule("auto")

    def on_epoch_end(self, epoch, logs):
        """Is told that an epoch ends, and tells the policy its metrics.

        Args:
            epoch: Zero-based integer.
            logs: Dict of floats.
        """
        self.epoch = epoch
        self.clock.end_epoch()
        self.policy.on_epoch_end(self._status(), logs)

    def decide(self):
        """Asks the policy and takes over the new size, if there is one.

        To be called between updates, not while one is being accumulated.

        Returns:
            A `Decision`, or None if the size stays.
        """
        if not self._healthy or (self.policy.gradual and self._dwells()):
            return None
        decision = self._decisions.next(
            self._status_at_estimate(), self.noise_scale
        )
        if decision is not None:
            self.batch_size = decision.new_batch_size
            self._changed_at = (self.examples, self.updates)
        return decision

    def _dwells(self):
        examples, updates = self._changed_at
        held = _DWELL_SUPERBATCHES * self.superbatch_size
        return (
            self.examples - examples < held
            or self.updates - updates < _DWELL_UPDATES
        )

    def _status(self):
        smaller, larger = self.ladder.neighbours(self.batch_size)
        return policies.Status(
            batch_size=self.batch_size,
            base_batch_size=self.ladder.base,
            smaller=smaller,
            larger=larger,
            step_time=self.step_time,
            learning_rate=self.last.learning_rate / self.last.factor,
            loss=math.nan if self.last.loss is None else self.last.loss,
            epoch=self.epoch,
            efficiency=self.efficiency,
            reference_batch_size=self.clock.batch_size,
        )

    def _status_at_estimate(self):
        estimate = self.noise_scale
        known = estimate.value if estimate.resolved else math.nan
        return policies.at_noise(self._status(), estimate, known)

    def observed_speedup(self, decision):
        """Returns the speed-up by the times of both sizes, NaN if not timed.

        Args:
            decision: A `Decision` or anything with its first three fields.
        """
        status = dataclasses.replace(
            self._status(), noise_scale=decision.noise_scale
        )
        sizes = decision.old_batch_size, decision.new_batch_size
        return self.speed.observed_speedup(*sizes, status)

    # State.

    def get_state(self):
        """Returns everything that evolves, as plain JSON types."""
        return {
            "base_batch_size": self.ladder.base,
            "superbatch_size": self.superbatch_size,
            "batch_size": self.batch_size,
            "largest_micro_batch_size": finite_or_none(
                self.largest_micro_batch_size
            ),
            "examples": self.examples,
            "updates": self.updates,
            "base_steps": self.base_steps,
            "clock": self.clock.get_state(),
            "epoch": self.epoch,
            "changed_at": list(self._changed_at),
            "known_noise_scale": finite_or_none(self._known_noise_scale),
            "healthy": self._healthy,
            "loss": finite_or_none(self.last.loss),
            "learning_rate": finite_or_none(self._status().learning_rate),
            "replicas": self.replicas,
            "timings": self.timings.get_state(),
            "expected": self.speed.get_state(),
            "measuring": self.measuring.get_state(),
            "noise": self._estimator.get_state(),
            "policy": self.policy.get_state(),
            "before_try": self._decisions.get_state(),
        }

    def set_state(self, state):
        """Takes over what `get_state` returned.

        Args:
            state: Dict of plain JSON types.

        Raises:
            ValueError: If it is of another base batch size, or no state.
        """
        check_state(state)
        if state["base_batch_size"] != self.ladder.base:
            raise ValueError(
                "A state can only be resumed with the base batch size it was "
                "saved with: its clock counts in base batches. Received: "
                f"batch_size={self.ladder.base}, saved with "
                f"{state['base_batch_size']}. Use batch_size="
                f"{state['base_batch_size']}."
            )
        self.batch_size = self.ladder.nearest(state["batch_size"])
        known = state["largest_micro_batch_size"]
        self.limit_micro_batch_size(math.inf if known is None else known)
        for name in ("examples", "updates", "base_steps"):
            setattr(self, name, state[name])
        self.epoch = state["epoch"]
        self.clock.set_state(state["clock"])
        self._changed_at = tuple(state["changed_at"])
        self._known_noise_scale = nan_if_none(state["known_noise_scale"])
        self._healthy = state["healthy"]
        rate = nan_if_none(state["learning_rate"])
        self.last = Measurement(0, 0, loss=state["loss"], learning_rate=rate)
        share = state["replicas"] / self.replicas
        self.speed.set_state(state["timings"], state["expected"], share)
        self.measuring.set_state(state["measuring"])
        self._estimator.set_state(state["noise"])
        self.policy.set_state(state["policy"])
        self._decisions.set_state(state["before_try"])
