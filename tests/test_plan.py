"""Laws of the ladder of sizes and of how an update is carried out."""

import itertools
import json
import math
import re

import numpy as np
import pytest

from keras_batchsize.plan import Ladder
from keras_batchsize.plan import checked_superbatch_size
from keras_batchsize.plan import largest_on_ladder
from keras_batchsize.plan import plan_for

LADDERS = [
    Ladder(32, 32, 4096),
    Ladder(32, 1, 100),
    Ladder(48, 10, 400),
    Ladder(25, 5, 1000),
    Ladder(7, 7, 7),
    Ladder(1, 1, 1000),
]
SHARED = [
    Ladder(base, 1, 4096, replicas=replicas)
    for base in (1, 10, 24, 32, 48)
    for replicas in (1, 2, 3, 4, 6, 7, 8, 64)
]


@pytest.mark.parametrize("ladder", LADDERS)
def test_sizes_are_the_doublings_of_the_base_between_the_bounds(ladder):
    powers = [ladder.base * 2.0**k for k in range(-20, 21)]
    wanted = [
        size
        for size in powers
        if size.is_integer() and ladder.minimum <= size <= ladder.maximum
    ]
    assert ladder.sizes == tuple(wanted)
    assert all(isinstance(size, int) for size in ladder.sizes)


@pytest.mark.parametrize("ladder", LADDERS + SHARED)
def test_every_size_divides_every_larger_one(ladder):
    for small, large in itertools.combinations(ladder.sizes, 2):
        assert large % small == 0


def test_an_odd_base_is_the_smallest_size():
    assert Ladder(25, 1, 100).sizes == (25, 50, 100)
    assert Ladder(12, 1, 24).sizes == (3, 6, 12, 24)


@pytest.mark.parametrize("ladder", LADDERS)
def test_nearest_is_nearest_in_ratio(ladder):
    for wanted in (0.3, 1, 3, 31, 45.3, 46, 90, 300, 1e5):
        ratios = [max(size / wanted, wanted / size) for size in ladder.sizes]
        chosen = ladder.sizes.index(ladder.nearest(wanted))
        assert ratios[chosen] == pytest.approx(min(ratios), rel=1e-12)


@pytest.mark.parametrize("ladder", LADDERS)
def test_nearest_to_anything_is_on_the_ladder(ladder):
    assert ladder.nearest(float("inf")) == ladder.sizes[-1]
    for wanted in (0, -5, float("-inf")):
        assert ladder.nearest(wanted) == ladder.sizes[0]
    for size in ladder.sizes:
        assert ladder.nearest(size) == size


@pytest.mark.parametrize("ladder", LADDERS)
def test_neighbours_are_the_sizes_beside_or_itself_at_an_end(ladder):
    sizes = ladder.sizes
    assert ladder.neighbours(sizes[0])[0] == sizes[0]
    assert ladder.neighbours(sizes[-1])[1] == sizes[-1]
    for small, large in itertools.pairwise(sizes):
        assert ladder.neighbours(small)[1] == large
        assert ladder.neighbours(large)[0] == small


def test_integers_of_numpy_become_plain_ones():
    # They would go into the state, which is JSON.
    ladder = Ladder(np.int64(32), np.int32(16), np.int64(64))
    assert json.loads(json.dumps(ladder.sizes)) == [16, 32, 64]
    assert json.dumps([ladder.base, ladder.minimum, ladder.maximum])


@pytest.mark.parametrize("base", [1, 25, 32])
def test_largest_on_ladder_is_the_last_that_fits(base):
    for limit in (base, 2 * base - 1, 2 * base, 1000.5, 2**31 - 1, 10**15):
        largest = largest_on_ladder(base, limit)
        assert (largest // base).bit_count() == 1
        assert largest <= limit < 2 * largest


def test_largest_on_ladder_is_never_below_the_base():
    assert largest_on_ladder(32, 10) == 32
    assert largest_on_ladder(32, 0) == 32


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("micro", [1, 5, 32, 600, 1024])
@pytest.mark.parametrize("batch_size", [1, 2, 31, 64, 96, 1000, 1024])
def test_a_plan_covers_the_batch_with_few_pieces_that_fit(
    batch_size, micro, replicas
):
    plan = plan_for(batch_size, micro, replicas)

    piece = plan.replicas * plan.micro_batch_size
    assert plan.batch_size == batch_size
    assert plan.micro_batch_size <= micro
    assert batch_size <= plan.accumulation_steps * piece < batch_size + piece
    # By counting: the fewest rounds, and the fewest of equal pieces.
    share = math.ceil(batch_size / replicas)
    fewest = next(n for n in itertools.count(1) if n * micro >= share)
    equal = next(n for n in range(fewest, share + 1) if share % n == 0)
    chosen = equal if equal < 2 * fewest else fewest
    assert math.ceil(share / plan.micro_batch_size) == chosen
    if chosen == equal:
        assert share == chosen * plan.micro_batch_size


@pytest.mark.parametrize("base", [1, 32, 48])
@pytest.mark.parametrize("largest", [1, 3, 5, 24, 100, 600])
def test_pieces_leave_no_rest_of_a_superbatch(base, largest):
    # As XLA asks. Of a base that is odd there may be too few divisors.
    for batch_size, at_hand in itertools.product(
        Ladder(base, 1, 4096).sizes, repeat=2
    ):
        plan = plan_for(batch_size, largest, superbatch_size=at_hand)
        micro, cut = plan.micro_batch_size, min(batch_size, at_hand)
        assert micro <= min(largest, cut)
        assert batch_size % micro == at_hand % micro == 0
        assert cut / micro < 2 * math.ceil(cut / largest)


BASE = {"batch_size": 32, "min_batch_size": 8, "max_batch_size": 128}


def ladder_of(arguments):
    return Ladder(
        arguments["batch_size"],
        arguments["min_batch_size"],
        arguments["max_batch_size"],
    )


def edited(arguments, text):
    """Applies the edits that an error text proposes: "Use name=number"."""
    remedy = text[text.rindex("Use ") :]
    edits = re.findall(r"(\w+)=(\d+)", remedy)
    assert edits, text
    return {**arguments, **{name: int(number) for name, number in edits}}


@pytest.mark.parametrize("name", BASE)
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-8, ValueError),
        (32.0, TypeError),
        (True, TypeError),
        ("32", TypeError),
        (None, TypeError),
    ],
)
def test_a_size_that_is_no_positive_integer_is_told_one(name, value, error):
    arguments = {**BASE, name: value}
    with pytest.raises(error) as caught:
        ladder_of(arguments)
    text = str(caught.value)
    assert text.startswith(f"`{name}` must be ")
    assert f"Received: {name}={value!r}." in text
    assert ladder_of(edited(arguments, text)).sizes


@pytest.mark.parametrize(
    "bounds",
    [
        # Smallest above largest: with the base below, between and above them.
        (16, 64, 32),
        (32, 32, 16),
        (32, 64, 16),
        (64, 64, 16),
        (128, 64, 16),
        # The base outside.
        (8, 16, 64),
        (128, 16, 64),
        (96, 16, 64),
    ],
)
def test_bounds_that_leave_no_size_are_told_ones_that_do(bounds):
    arguments = dict(zip(BASE, bounds))
    with pytest.raises(ValueError) as caught:
        ladder_of(arguments)
    text = str(caught.value)
    for name in ("min_batch_size", "max_batch_size"):
        # One that is the base was not given, as a rule.
        shown = arguments[name] != arguments["batch_size"]
        assert (f" {name}={arguments[name]}" in text) == shown
    assert ladder_of(edited(arguments, text)).sizes


@pytest.mark.parametrize("ladder", SHARED)
def test_every_size_but_the_base_is_a_multiple_of_the_replicas(ladder):
    base, replicas, sizes = ladder.base, ladder.replicas, ladder.sizes
    shared = [
        size
        for size in range(1, ladder.maximum + 1)
        if size % replicas == 0 and (size % base == 0 or base % size == 0)
    ]
    assert base in sizes
    assert set(sizes) <= {base, *shared}
    # The neighbours of the base are the nearest there can be.
    above = min(size for size in shared if size > base and size % base == 0)
    assert ladder.neighbours(base)[1] == above
    assert set(shared) & {base // 2} <= set(sizes)
    for small, large in itertools.pairwise(sizes):
        assert large == 2 * small or small == base


@pytest.mark.parametrize("ladder", SHARED)
def test_largest_on_ladder_is_the_last_of_the_ladder(ladder):
    for limit in (*ladder.sizes, 100.5, 1000, 4096):
        bounded = Ladder(
            ladder.base,
            ladder.base,
            max(int(limit), ladder.base),
            replicas=ladder.replicas,
        )
        largest = largest_on_ladder(ladder.base, limit, ladder.replicas)
        assert largest == bounded.sizes[-1]


@pytest.mark.parametrize("ladder", SHARED)
def test_a_superbatch_lies_on_the_ladder(ladder):
    base, replicas = ladder.base, ladder.replicas
    above = [size for size in ladder.sizes if size >= base]
    for size in above:
        assert checked_superbatch_size(size, base, replicas) == size
    for size in {*range(base, 200)} - {*above}:
        with pytest.raises(ValueError) as caught:
            checked_superbatch_size(size, base, replicas)
        text = str(caught.value)
        mended = int(re.search(r"Use superbatch_size=(\d+)", text)[1])
        assert mended in above
        [factor] = re.findall(r"times (\d+) and a power", text) or ["1"]
        assert above[1] in (2 * base, int(factor) * base)
