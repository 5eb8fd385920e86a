"""Which batch size to try next, so that the largest that fits is soon found.

Sizes are tried from below, each as large as what was measured so far allows.
Nothing is provoked to fail: an out-of-memory error costs ten seconds and more
(TensorFlow's allocator waits that long for memory to come free), and one
inside a step that XLA compiled damages the process.

What makes large jumps safe is that memory per example falls with the batch
size. Peaks are maxima over time of sums of a constant and a part in proportion
to the size, so (peak - constant)/size, `constant` what is known not to grow,
hardly ever rises: from one region of memory (three models, three dtype
policies) by 4 % at most, by 13 where a rare peak was met. So the next size is

    size · (usable - constant)/(peak - constant)

or as many more examples as surely fit by what all tensors of a forward pass
take together. Neither can overshoot. Peaks that lie on a straight line already
say more: then the line leads, and those rules only have to keep below what is
there at all. Between a size that fits and one that does not, the straight line
decides.

Where examples are compared with each other memory grows with the square of the
size, or a higher power d. Then (peak - constant)/size^d does not rise, and of
the quotient above the d-th root is taken. The graph tells d; where it does not,
d is 2 if (peak - constant)/size rose from one size to the next. (A workspace
that does not grow may hide that from small sizes.)

No size is returned that was not run, and whose own peak did not stay below.
"""

import dataclasses
import math

# Updates that a trial makes, for what it will take.
_UPDATES_PER_TRIAL = 5
# Trials in all. More would only refine the last few percent.
MOST_TRIALS = 7
# No jump is larger, unless no example can take more than it leaves room for:
# the memory of one example says little about a thousand's.
_LARGEST_JUMP = 32
# Where memory cannot be measured, only failures tell.
_BLIND_JUMP = 4
# Of what is there for batches it aims at so much: peaks of equal steps differ.
_AIM = 0.975
# By so much (peak - constant)/size may rise over a jump of any length: rare
# peaks apart it was less, and for those there is room.
_RISE = 1.08
# A size that takes so much of what is there for batches is large enough.
_ENOUGH = 0.94
# Steps that gain less are not worth a trial.
_SMALLEST_GAIN = 1.05
# While trials are left, one that takes less than so many seconds is worth less.
_CHEAP_SECONDS, _CHEAP_ENOUGH, _CHEAP_GAIN = 1.5, 0.965, 1.02
# Two sizes closer than this tell the noise of peaks, not their slope.
_SLOPE_OVER = 1.5
# Nor is a size that the time left shrinks to less than this.
_SMALLEST_GAIN_IN_TIME = 1.25
# From so many times the least common multiple of 8 and the replicas on, sizes
# are multiples of that, which hardware likes: it costs 6 % at most.
_ROUNDED_FROM = 16

MEMORY, TIME, TRIALS = "memory", "time", "trials"


@dataclasses.dataclass(frozen=True)
class Trial:
    """What happened at one batch size.

    Attributes:
        batch_size: Examples per update, over all replicas.
        peak_bytes: Largest memory in use, None if it could not be measured.
        step_seconds: Seconds of an update, None if none was completed.
        failed: Whether it ran out of memory.
        trial_seconds: Wall time of the whole trial.
        constant_bytes: Bytes of the peak that are known not to depend on the
            size: weights, slots, sums of gradients.
    """

    batch_size: int
    peak_bytes: float | None = None
    step_seconds: float | None = None
    failed: bool = False
    trial_seconds: float = 0.0
    constant_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What limits the search.

    Attributes:
        start: First size to try.
        cap: Largest size that makes sense, may be infinite.
        cap_reason: What the result says if `cap` is reached.
        usable_bytes: Largest peak allowed; None if not known.
        hard_bytes: Peak that must not even be risked, the whole of what there
            is. None for `usable_bytes`.
        growth_bytes: Bytes by which an example can raise the peak at most, a
            pair of examples, and so on; empty if not known.
        degree: Highest power of the size with which memory grows, as far as
            is known.
        multiple_of: Every size is a multiple of it: the number of replicas.
        memory_reason: What the result says if `usable_bytes` is reached.
    """

    start: int = 1
    cap: float = math.inf
    cap_reason: str = "maximum"
    usable_bytes: float | None = None
    hard_bytes: float | None = None
    growth_bytes: tuple = ()
    degree: int = 1
    multiple_of: int = 1
    memory_reason: str = MEMORY


def fits(trial, usable_bytes):
    """Whether a trial ran and stayed within what may be used.

    Args:
        trial: A `Trial`.
        usable_bytes: Largest peak allowed, None if not known.
    """
    if trial.failed:
        return False
    if usable_bytes is None or trial.peak_bytes is None:
        return True
    return trial.peak_bytes <= usable_bytes


def is_near(trial, usable_bytes):
    """Whether a trial is so near to the margin that noise may decide.

    Args:
        trial: A `Trial` that ran.
        usable_bytes: Largest peak allowed, None if not known.
    """
    part = _part_taken(trial, usable_bytes)
    return _ENOUGH <= part <= 2.0 - _ENOUGH


def largest_that_fits(trials, usable_bytes):
    """Returns the `Trial` of the largest size that fits, or None.

    A size above one that did not fit does not count: memory need not grow
    evenly (cuDNN chooses other algorithms at other sizes), but a size that
    depends on luck is no answer.
    """
    bad = [t.batch_size for t in trials if not fits(t, usable_bytes)]
    ceiling = min(bad, default=math.inf)
    good = [
        t
        for t in trials
        if fits(t, usable_bytes) and t.batch_size < ceiling
    ]
    return max(good, key=lambda t: t.batch_size, default=None)


def next_size(trials, bounds, seconds_left=math.inf):
    """Says which size to try next, or why to stop.

    Args:
        trials: Sequence of `Trial`, those made so far.
        bounds: The `Bounds`.
        seconds_left: Time left for trials.

    Returns:
        Pair of the size and None, or None and the reason, one of
        `bounds.cap_reason`, `bounds.memory_reason`, "time", "trials". It is
        also None if nothing fits, which the caller sees from
        `largest_that_fits`.
    """
    if not trials:
        return min(bounds.start, bounds.cap), None
    best = largest_that_fits(trials, bounds.usable_bytes)
    above = _smallest_that_does_not_fit(trials, bounds.usable_bytes)
    if best is None:
        return _smaller(above, bounds, len(trials))
    if best.batch_size >= bounds.cap:
        return None, bounds.cap_reason
    enough, gain = _worth_a_trial(trials, best)
    if _part_taken(best, bounds.usable_bytes) >= enough:
        return None, bounds.memory_reason
    if len(trials) >= MOST_TRIALS:
        return None, TRIALS
    if above is None:
        wanted = _extrapolated(trials, best, bounds)
    else:
        wanted = _interpolated(trials, best, above, bounds)
    size = _rounded(min(wanted, bounds.cap), bounds)
    if size < best.batch_size * gain and size < bounds.cap:
        return None, bounds.memory_reason
    return _in_time(size, best, bounds, seconds_left)


def _worth_a_trial(trials, best):
    """Returns which part of the memory is enough, and which gain is not."""
    left = MOST_TRIALS - len(trials)
    if left > 1 and best.trial_seconds < _CHEAP_SECONDS:
        return _CHEAP_ENOUGH, _CHEAP_GAIN
    return _ENOUGH, _SMALLEST_GAIN


def _smallest_that_does_not_fit(trials, usable_bytes):
    bad = [t for t in trials if not fits(t, usable_bytes)]
    return min(bad, key=lambda t: t.batch_size, default=None)


def _part_taken(trial, usable_bytes):
    """What a trial took of what is there for batches, 0 if not known."""
    if usable_bytes is None or trial.peak_bytes is None:
        return 0.0
    constant = min(trial.constant_bytes, trial.peak_bytes)
    return (trial.peak_bytes - constant) / max(usable_bytes - constant, 1.0)


def _smaller(above, bounds, count):
    """Goes down from a first size that was too large.

    After a failure to the very bottom, to come up again by what is measured
    there: another failure would cost as much as all of that. Where nothing is
    measured, only failures tell.
    """
    least, blind = bounds.multiple_of, bounds.usable_bytes is None
    if above.batch_size <= least or count >= MOST_TRIALS:
        return None, bounds.memory_reason
    if (above.failed and not blind) or count >= MOST_TRIALS - 1:
        return least, None
    wanted = above.batch_size / _BLIND_JUMP
    if not above.failed:
        constant = above.constant_bytes
        room = max(bounds.usable_bytes - constant, 0.0)
        wanted = above.batch_size * room / (above.peak_bytes - constant)
    size = min(wanted * _AIM, above.batch_size / 2)
    return _rounded(max(size, least), bounds), None


def _extrapolated(trials, best, bounds):
    """A size above all that were tried."""
    usable, peak = bounds.usable_bytes, best.peak_bytes
    if usable is None or peak is None:
        return best.batch_size * _BLIND_JUMP
    size, most = best.batch_size, best.batch_size * _LARGEST_JUMP
    if peak <= best.constant_bytes:
        return most
    goal, below = _goal(best, usable), _last_below(trials, best)
    if bounds.growth_bytes:
        most = max(most, _grown(size, goal - peak, bounds.growth_bytes))
    bounds = _by_what_rose(bounds, below, best)
    sure = _cannot_exceed(goal, best, bounds)
    if below is None or bounds.degree > 1:
        # Time is not known either: the first step costs what it costs.
        return min(sure, most)
    hard = usable if bounds.hard_bytes is None else bounds.hard_bytes
    safe = _cannot_exceed(hard, best, bounds)
    straight, slope = math.inf, _slope(below, best)
    if slope > 0.0:
        straight = size + (goal - peak) / slope
    wanted = max(sure, min(straight, safe, most))
    return wanted if bounds.growth_bytes else min(wanted, most)


def _by_what_rose(bounds, below, best):
    """Returns the bounds for memory that grows as two trials say it does.

    Args:
        bounds: The `Bounds`.
        below: `Trial` of a smaller size, or None.
        best: `Trial` of the largest that fits.
    """
    if below is None or bounds.degree > 1:
        return bounds
    if bounds.growth_bytes and _slope(below, best) <= bounds.growth_bytes[0]:
        # No more than tensors explain that grow with the size.
        return bounds
    size, smaller = best.batch_size, below.batch_size
    before = (below.peak_bytes - below.constant_bytes) / smaller
    now = (best.peak_bytes - best.constant_bytes) / size
    if not 0.0 < before < now:
        return bounds
    growth = ()
    if now <= before * _RISE:
        # Perhaps noise: by no more of a square than was seen.
        square = (now - before) / (size - smaller)
        growth = before - square * smaller, square
    return dataclasses.replace(bounds, growth_bytes=growth, degree=2)


def _cannot_exceed(goal, best, bounds):
    """The largest size whose peak cannot be above `goal`."""
    constant, peak = best.constant_bytes, best.peak_bytes
    ratio = (goal - constant) / (peak - constant)
    if ratio > 2.0:
        ratio = max(ratio / _RISE, 2.0)
    size = best.batch_size * ratio ** (1.0 / bounds.degree)
    if bounds.growth_bytes:
        grown = _grown(best.batch_size, goal - peak, bounds.growth_bytes)
        size = max(size, grown)
    return size


def _grown(size, room, growth):
    """The size up to which tensors take no more than there is room for.

    Args:
        size: Examples in what has run, 0 if nothing has.
        room: Bytes above its peak.
        growth: Bytes per example, per pair of examples, and so on.
    """

    def fits_in(larger):
        powers = enumerate(growth, 1)
        return sum(g * (larger**k - size**k) for k, g in powers) <= room

    low, high = size, max(2.0 * size, 1.0)
    while fits_in(high) and high < max(size, 1.0) * 2.0**64:
        low, high = high, 2.0 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if fits_in(middle) else (low, middle)
    return low


def largest_by_growth(room, growth):
    """Returns the largest size whose tensors surely fit, where none has run.

    Args:
        room: Bytes that there are for batches.
        growth: Bytes per example, per pair of examples, and so on.
    """
    return int(_grown(0, room, growth))


def _goal(trial, usable_bytes):
    constant = min(trial.constant_bytes, trial.peak_bytes)
    return constant + _AIM * (usable_bytes - constant)


def _last_below(trials, best):
    """The largest `Trial` well below another one, None if that is the first."""
    below = [t for t in trials if t.batch_size < best.batch_size]
    apart = [
        t for t in below if t.batch_size * _SLOPE_OVER <= best.batch_size
    ]
    return max(apart or below, key=lambda t: t.batch_size, default=None)


def _slope(below, best):
    """Bytes per example between two trials."""
    return (best.peak_bytes - below.peak_bytes) / (
        best.batch_size - below.batch_size
    )


def _interpolated(trials, best, above, bounds):
    """A size between one that fits and one that does not."""
    low, high = best.batch_size, above.batch_size
    if above.failed or best.peak_bytes is None:
        # A failure tells no peak: what ran does, or else the middle. Where
        # that failed, too, closer to the size that is known to run.
        share = 0.5 if len(trials) < MOST_TRIALS - 2 else 0.3
        middle = low + share * (high - low)
        if best.peak_bytes is None or bounds.usable_bytes is None:
            return middle
        return min(middle, _extrapolated(trials, best, bounds))
    goal = _goal(best, bounds.usable_bytes)
    slope = (above.peak_bytes - best.peak_bytes) / (high - low)
    if slope <= 0.0:
        return (low + high) / 2
    return min(low + (goal - best.peak_bytes) / slope, high - 1)


def _rounded(size, bounds):
    """Rounds down to a multiple that hardware and replicas can share."""
    multiple = bounds.multiple_of
    shared = math.lcm(multiple, 8)
    if size >= _ROUNDED_FROM * shared and size < bounds.cap:
        multiple = shared
    return max(int(size // multiple) * multiple, bounds.multiple_of)


def _in_time(size, best, bounds, seconds_left):
    """Shrinks a size to what the time left can pay for."""
    # Time per example falls with the size, so this is the upper end. Tracing
    # and compiling come again, at most.
    step = (best.step_seconds or 0.0) * _UPDATES_PER_TRIAL
    again = max(best.trial_seconds - step, 0.0)
    expected = step * size / best.batch_size
    seconds_left = seconds_left - again
    if expected <= seconds_left:
        return size, None
    shrunk = _rounded(size * max(seconds_left, 0.0) / expected, bounds)
    if shrunk < best.batch_size * _SMALLEST_GAIN_IN_TIME:
        return None, TIME
    return shrunk, None
