"""Training on R replicas, simulated: no TensorFlow, no clock, no chance.

What the simulation takes for granted:

- **Progress.** A batch of B examples is worth B/(φ + B) of an update without
  noise. With a constant noise scale φ this is (S/Smin - 1)(E/Emin - 1) = 1,
  the law of McCandlish et al. 2018 (arXiv:1812.06162), eqs. 2.11 and 2.12, for
  S updates and E examples to a target. φ is a function of the progress made,
  not of time or of the batch size. The law holds for the best learning rate of
  each size.
- **Time.** Replicas are alike and work on ceil(B/R) examples each, which takes
  the time fitted to one device. Then the gradients are all-reduced, in one
  piece and without overlap, as this library does: see `Network`. Examples never
  run out; reading them, stragglers and faults cost nothing.
- **Decisions** are the library's: `policies.next_batch_size` is told the
  measured noise scale with its interval, and the time of an update as a line
  in B that contains the all-reduce. It is asked again after so many updates.
  What it costs to measure, and to find the line, is left out.

Updates are counted in fractions, so that a run ends exactly at its target.
"""

import dataclasses
import math

from keras_batchsize import policies
from keras_batchsize.noise import UNKNOWN
from keras_batchsize.noise import NoiseScaleEstimate
from keras_batchsize.plan import Ladder
from keras_batchsize.plan import largest_on_ladder
from keras_batchsize.plan import plan_for
from keras_batchsize.policies import Status
from keras_batchsize.throughput import StepTime

ALL_REDUCES = ("ring", "halving")


@dataclasses.dataclass(frozen=True)
class Network:
    """A network on which all replicas are equally far from each other.

    Thakur, Rabenseifner and Gropp 2005 (Int. J. High Perform. Comput. Appl.
    19): both ways send 2(R-1)/R of the bytes from each replica; a ring in
    2(R-1) messages one after the other, recursive halving and doubling in
    2·log2(R). Adding up takes no time.

    Attributes:
        latency: Seconds that a message takes whatever its length.
        bandwidth: Bytes per second out of one replica.
        all_reduce: One of `ALL_REDUCES`.
    """

    latency: float
    bandwidth: float
    all_reduce: str = "halving"

    def seconds(self, replicas, size):
        """Returns the seconds of an all-reduce of `size` bytes."""
        if self.all_reduce == "ring":
            messages = 2 * (replicas - 1)
        else:
            messages = 2 * math.ceil(math.log2(replicas))
        sent = 2 * (replicas - 1) / replicas * size
        return messages * self.latency + sent / self.bandwidth


@dataclasses.dataclass(frozen=True)
class Cluster:
    """R replicas that share each update.

    Attributes:
        replicas: R.
        step_time: The `StepTime` of one of them, of its own examples.
        all_reduce_seconds: Seconds per update for the gradients' way.
    """

    replicas: int
    step_time: StepTime
    all_reduce_seconds: float

    def seconds(self, batch_size):
        """Returns the seconds of an update of `batch_size` examples in all.

        With fewer examples than replicas, some have nothing to do.
        """
        share = math.ceil(batch_size / self.replicas)
        plan = plan_for(share, self.step_time.largest)
        pieces = plan.accumulation_steps
        return (
            pieces * self.step_time.fixed
            + share * self.step_time.per_example
            + self.all_reduce_seconds
        )

    @property
    def line(self):
        """The `StepTime` of the global batch size, as a fit would find it."""
        one = self.step_time
        return StepTime(
            one.fixed + self.all_reduce_seconds,
            one.per_example / self.replicas,
            one.largest * self.replicas,
        )


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of the way to the target, with one noise scale.

    Attributes:
        steps: Its length, in updates without noise.
        noise_scale: φ in examples.
        estimate: What is known about it, a `NoiseScaleEstimate`.
    """

    steps: float
    noise_scale: float
    estimate: NoiseScaleEstimate

    def updates(self, batch_size, steps=None):
        """Returns the updates it takes, or that `steps` of it take."""
        steps = self.steps if steps is None else steps
        return steps * (1.0 + self.noise_scale / batch_size)


def known(noise_scale, lower=None, upper=None):
    """Returns an estimate of φ, exact unless ends of its interval are given."""
    return NoiseScaleEstimate(
        value=noise_scale,
        standard_error=0.0,
        lower=noise_scale if lower is None else lower,
        upper=noise_scale if upper is None else upper,
        resolved=True,
        squared_norm=1.0,
        trace=noise_scale,
    )


def course(rows, noise_factor=1.0):
    """Returns the way to the target as a run went it, a list of `Piece`.

    Where the run did not know its noise scale, the policy is told so, and the
    next known value counts, at the end the last.

    Args:
        rows: Rows of a `Report`, up to the target.
        noise_factor: What all noise scales are multiplied by.

    Raises:
        ValueError: If no row knows a noise scale.
    """
    scales = [row.noise_scale * noise_factor for row in rows]
    if not any(map(math.isfinite, scales)):
        raise ValueError(
            "The run must have measured its noise scale: progress is counted "
            f"by it. Received: {len(scales)} rows without one. Train longer, "
            'or with policy="measure".'
        )
    for order in (range(len(scales) - 2, -1, -1), range(1, len(scales))):
        step = -order.step
        for i in order:
            if not math.isfinite(scales[i]):
                scales[i] = scales[i + step]
    pieces, before = [], 0
    for row, scale in zip(rows, scales):
        updates, before = row.updates - before, row.updates
        estimate = UNKNOWN
        if math.isfinite(row.noise_scale):
            ends = row.noise_lower, row.noise_upper
            estimate = known(scale, *(end * noise_factor for end in ends))
        steps = updates * row.batch_size / (scale + row.batch_size)
        pieces.append(Piece(steps, scale, estimate))
    return pieces


@dataclasses.dataclass(frozen=True)
class Run:
    """What a simulated training took.

    Attributes:
        first: Batch size at the start, in examples.
        last: Batch size at the end.
        seconds: Time to the target.
        updates: Updates to the target.
    """

    first: int
    last: int
    seconds: float
    updates: float


def fixed(pieces, cluster, batch_size):
    """Trains with one batch size.

    Args:
        pieces: List of `Piece`.
        cluster: A `Cluster`.
        batch_size: Examples per update, over all replicas.

    Returns:
        A `Run`.
    """
    updates = sum(piece.updates(batch_size) for piece in pieces)
    seconds = updates * cluster.seconds(batch_size)
    return Run(batch_size, batch_size, seconds, updates)


def best_fixed(pieces, cluster, ladder):
    """Returns the fastest `Run` of a fixed size, found by trying them all."""
    runs = [fixed(pieces, cluster, size) for size in ladder.sizes]
    return min(runs, key=lambda run: run.seconds)


def adaptive(pieces, cluster, ladder, policy, dwell_updates=8):
    """Trains with the size that a policy of the library wants.

    Args:
        pieces: List of `Piece`.
        cluster: A `Cluster`.
        ladder: The `Ladder` of sizes, whose base is the first one.
        policy: A `BatchSizePolicy`.
        dwell_updates: Updates for which a new size is held.

    Returns:
        A `Run`.
    """
    size, line, held = ladder.base, cluster.line, dwell_updates
    seconds = updates = 0.0
    for piece in pieces:
        left = piece.steps
        while left > 0.0:
            new = size
            if held <= 0.0:
                new = _asked(policy, size, line, ladder, piece.estimate)
            if new != size:
                size, held = new, dwell_updates
            # Where the size stays, so does the answer until the next piece.
            whole = piece.updates(size, left)
            now = min(whole, held) if held > 0.0 else whole
            held, updates = held - now, updates + now
            seconds += now * cluster.seconds(size)
            left = left * (1.0 - now / whole) if now < whole else 0.0
    return Run(ladder.base, size, seconds, updates)


def _asked(policy, size, line, ladder, estimate):
    smaller, larger = ladder.neighbours(size)
    status = Status(
        batch_size=size,
        base_batch_size=ladder.base,
        smaller=smaller,
        larger=larger,
        step_time=line,
    )
    return policies.next_batch_size(policy, status, estimate, ladder)


METHODS = ("base", "base per replica", "best fixed", "adaptive")


def simulate(pieces, cluster, base, largest_share):
    """Trains on a cluster in each of the `METHODS`.

    Args:
        pieces: List of `Piece`.
        cluster: A `Cluster`.
        base: Base batch size in examples, over all replicas.
        largest_share: Most examples that one replica is given.

    Returns:
        Dict from methods to `Run`.
    """
    replicas = cluster.replicas
    limit = largest_on_ladder(base, replicas * largest_share)
    ladder = Ladder(base, base, limit)
    return {
        "base": fixed(pieces, cluster, base),
        "base per replica": fixed(pieces, cluster, base * replicas),
        "best fixed": best_fixed(pieces, cluster, ladder),
        "adaptive": adaptive(pieces, cluster, ladder, policies.Goodput()),
    }


def efficiencies(runs):
    """Returns how well each method uses its replicas.

    Args:
        runs: Dict from numbers of replicas, 1 among them, to what `simulate`
            returned.

    Returns:
        Dict of dicts alike: speed-up over the same method on one replica,
        divided by the number of replicas.
    """
    return {
        replicas: {
            method: runs[1][method].seconds / (run.seconds * replicas)
            for method, run in here.items()
        }
        for replicas, here in runs.items()
    }
