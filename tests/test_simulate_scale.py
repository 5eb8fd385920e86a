"""Laws of the simulation of many replicas, `benchmarks/simulation.py`."""

import importlib
import math
import pathlib
import random
import sys

import pytest

from keras_batchsize import policies
from keras_batchsize import throughput
from keras_batchsize.noise import UNKNOWN
from keras_batchsize.plan import Ladder
from keras_batchsize.report import Report
from keras_batchsize.report import Row
from keras_batchsize.throughput import StepTime

sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))
simulation = importlib.import_module("simulation")
simulate_scale = importlib.import_module("simulate_scale")

BASE = 32
FIXED, PER_EXAMPLE = 1e-3, 4e-6
STEP_TIME = StepTime(FIXED, PER_EXAMPLE)
REPLICAS = [2**k for k in range(13)]
DEAD_BAND = policies.Goodput().min_speedup
NETWORKS = [
    simulation.Network(0.0, math.inf),
    simulation.Network(1e-5, 1e9),
    simulation.Network(1e-5, 1e9, "ring"),
]


def cluster_of(replicas, network=NETWORKS[0], step_time=STEP_TIME):
    return simulation.Cluster(
        replicas, step_time, network.seconds(replicas, 4e6)
    )


def constant(noise_scale, steps=500.0):
    return [
        simulation.Piece(steps, noise_scale, simulation.known(noise_scale))
    ]


def random_course(seed, is_rising):
    """Noise scales between 1 and 1e5, known within a factor of up to two."""
    chance = random.Random(seed)
    scales = [10.0 ** chance.uniform(0.0, 5.0) for _ in range(40)]
    pieces = []
    for scale in sorted(scales) if is_rising else scales:
        low, high = scale / chance.uniform(1, 2), scale * chance.uniform(1, 2)
        estimate = chance.choice(
            [UNKNOWN, simulation.known(scale, low, high)]
        )
        pieces.append(
            simulation.Piece(chance.uniform(0.0, 40.0), scale, estimate)
        )
    return pieces


def row(examples, updates, batch_size, noise_scale):
    return Row(
        examples=examples,
        updates=updates,
        epoch=0,
        seconds=1.0,
        batch_size=batch_size,
        micro_batch_size=batch_size,
        accumulation_steps=1,
        noise_scale=noise_scale,
        noise_lower=noise_scale / 2.0,
        noise_upper=noise_scale * 2.0,
        learning_rate=0.1,
        base_learning_rate=0.1,
        learning_rate_factor=1.0,
        examples_per_second=batch_size / (FIXED + PER_EXAMPLE * batch_size),
    )


# The network.


def test_all_reduce_takes_what_its_messages_take():
    # Four replicas, 800 bytes: each sends 2·3/4·800 = 1200 bytes; a ring in
    # 2·3 messages, halving and doubling in 2·2.
    ring = simulation.Network(10.0, 100.0, "ring")
    halving = simulation.Network(10.0, 100.0, "halving")
    assert ring.seconds(4, 800) == 6 * 10.0 + 12.0
    assert halving.seconds(4, 800) == 4 * 10.0 + 12.0


@pytest.mark.parametrize("network", NETWORKS)
def test_one_replica_needs_no_network(network):
    assert network.seconds(1, 1e9) == 0.0


# Fixed sizes.


@pytest.mark.parametrize("batch_size", [1, 32, 1000, 65536])
@pytest.mark.parametrize("noise_scale", [3.0, 1000.0])
def test_constant_noise_gives_the_law_of_mccandlish(batch_size, noise_scale):
    steps = 500.0
    run = simulation.fixed(
        constant(noise_scale, steps), cluster_of(1), batch_size
    )
    examples = run.updates * batch_size
    # Emin = φ·Smin: eqs. 2.11 and 2.12 with φ = Emin/Smin, eq. 2.12.
    left = (run.updates / steps - 1.0) * (
        examples / (steps * noise_scale) - 1.0
    )
    assert left == pytest.approx(1.0, rel=1e-9)


def test_constant_noise_takes_the_seconds_of_its_closed_form():
    network = simulation.Network(1e-5, 1e9, "ring")
    run = simulation.fixed(constant(900.0), cluster_of(8, network), 300)
    all_reduce = 14 * 1e-5 + 2 * 7 / 8 * 4e6 / 1e9
    # 300 examples on 8 replicas: 38 on the one that has most.
    update = FIXED + 38 * PER_EXAMPLE + all_reduce
    assert run.seconds == pytest.approx(500.0 * (1.0 + 3.0) * update, rel=1e-12)


def test_a_free_network_leaves_the_time_of_computing():
    size, pieces = 256, random_course(0, is_rising=True)
    runs = [simulation.fixed(pieces, cluster_of(r), size) for r in REPLICAS]
    times = [run.seconds / run.updates for run in runs]
    for replicas, seconds in zip(REPLICAS, times):
        share = max(size / replicas, 1.0)
        assert seconds == pytest.approx(FIXED + PER_EXAMPLE * share)
    assert times == sorted(times, reverse=True)
    assert times[-1] == pytest.approx(FIXED + PER_EXAMPLE)
    assert len({run.updates for run in runs}) == 1


@pytest.mark.parametrize("replicas", REPLICAS)
def test_weak_scaling_loses_on_a_free_network_what_its_examples_lose(replicas):
    runs = {
        one: simulation.simulate(constant(900.0), cluster_of(one), BASE, 512)
        for one in {1, replicas}
    }
    here = simulation.efficiencies(runs)[replicas]["base per replica"]
    assert here == pytest.approx((900.0 + BASE) / (900.0 + BASE * replicas))


# The adaptive size.


def test_adaptive_takes_the_seconds_of_its_closed_form():
    noise_scale, steps, dwell = 2700.0, 500.0, 8

    def seconds(size):
        return FIXED + PER_EXAMPLE * size / 4

    def gain(size):
        faster = 2.0 * seconds(size) / seconds(2 * size)
        return faster * (noise_scale + size) / (noise_scale + 2 * size)

    # Each size is held for eight updates, as long as doubling pays.
    size, total, left = BASE, 0.0, steps
    while gain(size) >= DEAD_BAND:
        total += dwell * seconds(size)
        left -= dwell / (1.0 + noise_scale / size)
        size *= 2
    total += left * (1.0 + noise_scale / size) * seconds(size)

    pieces = constant(noise_scale, steps)
    runs = simulation.simulate(pieces, cluster_of(4), BASE, 2**18)
    run = runs["adaptive"]
    # The next doubling would pay, but less than the dead band asks.
    assert 1.0 < gain(size) and size == 1024 == run.last
    assert run.seconds == pytest.approx(total, rel=1e-12)


def test_cutting_a_piece_in_two_changes_nothing():
    # Into pieces of about three updates, shorter than a size is held.
    one = constant(2000.0, 50.0)
    many = [piece for n in range(1000) for piece in constant(2000.0, 0.05)]
    ladder = Ladder(BASE, BASE, 2**20)
    runs = [
        simulation.adaptive(pieces, cluster_of(4), ladder, policies.Goodput())
        for pieces in (one, many)
    ]
    assert runs[0].last == runs[1].last
    # To rounding: one adds up a thousand terms, the other a few.
    assert runs[0].seconds == pytest.approx(runs[1].seconds, rel=1e-9)


def test_nothing_changes_while_the_noise_is_not_known():
    pieces = [simulation.Piece(500.0, 2000.0, UNKNOWN)]
    ladder = Ladder(BASE, BASE, 2**20)
    run = simulation.adaptive(
        pieces, cluster_of(4), ladder, policies.Goodput()
    )
    assert run == simulation.fixed(pieces, cluster_of(4), BASE)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("network", NETWORKS)
def test_adaptive_is_never_slower_than_the_base(seed, network):
    chance = random.Random(seed)
    for replicas in REPLICAS:
        # From devices that gain nothing by larger batches to such that live
        # on them; base sizes from far too small to far too large.
        per_example = FIXED * 10.0 ** chance.uniform(-4.0, 2.0)
        cluster = cluster_of(replicas, network, StepTime(FIXED, per_example))
        base = 2 ** chance.randrange(12)
        rising, any_way = [
            simulation.simulate(
                random_course(seed, rises), cluster, base, 4096
            )
            for rises in (True, False)
        ]
        # Where φ only rises, what once paid pays for ever.
        assert rising["adaptive"].seconds <= rising["base"].seconds * (1 + 1e-9)
        # Where it falls, a size too large is kept within the dead band, and
        # for the time that it must be held.
        slower = any_way["adaptive"].seconds / any_way["base"].seconds
        assert slower <= DEAD_BAND


@pytest.mark.parametrize("seed", range(20))
def test_nobody_is_faster_than_the_best_size_at_every_moment(seed):
    pieces = random_course(seed, is_rising=False)
    for replicas in REPLICAS:
        cluster = cluster_of(replicas, NETWORKS[1])
        line, bound = cluster.line, 0.0
        for piece in pieces:
            best = throughput.time_optimal_batch_size(line, piece.noise_scale)
            bound += piece.updates(best) * line(best)
        runs = simulation.simulate(pieces, cluster, BASE, 512)
        fastest = min(run.seconds for run in runs.values())
        assert fastest >= bound * (1 - 1e-9)
        for size in [BASE * 2**k for k in range(5)]:
            run = simulation.fixed(pieces, cluster, size)
            assert runs["best fixed"].seconds <= run.seconds


@pytest.mark.parametrize("replicas", REPLICAS)
def test_the_policy_is_told_the_time_that_the_cluster_takes(replicas):
    cluster = cluster_of(replicas, NETWORKS[2], StepTime(1e-3, 4e-6, 64))
    for share in (1, 7, 64):
        size = share * replicas
        assert cluster.line(size) == pytest.approx(cluster.seconds(size))


# From a run to a table.


def test_a_course_repeats_the_run_it_was_taken_from():
    rows = [
        row(320, 10, 32, math.nan),
        row(960, 30, 32, 400.0),
        row(1920, 45, 64, 800.0),
        row(2880, 60, 64, math.nan),
    ]
    pieces = simulation.course(rows)
    assert [piece.noise_scale for piece in pieces] == [400, 400, 800, 800]
    known = [piece.estimate.resolved for piece in pieces]
    assert known == [False, True, True, False]
    assert (pieces[1].estimate.lower, pieces[1].estimate.upper) == (200, 800)
    sizes = [one.batch_size for one in rows]
    updates = [p.updates(size) for p, size in zip(pieces, sizes)]
    assert updates == pytest.approx([10, 20, 15, 15])


def test_a_run_without_a_noise_scale_is_refused():
    with pytest.raises(ValueError, match="must have measured its noise scale"):
        simulation.course([row(320, 10, 32, math.nan)])


@pytest.fixture
def report_file(tmp_path):
    report = Report({"base_batch_size": BASE})
    updates = 0
    for step in range(1, 41):
        size = 32 if step < 20 else 128
        updates += 2048 // size
        report.add_row(row(step * 2048, updates, size, 50.0 * step))
    report.save(tmp_path / "run.json")
    return tmp_path / "run.json"


def test_any_report_will_do(report_file, capsys, monkeypatch):
    picture = report_file.with_suffix(".png")
    arguments = ["--report", report_file, "--plot", picture]
    arguments += ["--gradient-bytes", 4e6, "--replicas", 2, 4096]
    monkeypatch.setattr(sys, "argv", ["simulate", *map(str, arguments)])
    simulate_scale.main()
    printed = capsys.readouterr().out
    assert "1.000 ms + 4.00 µs per example" in printed
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + 3 * len(simulation.METHODS)
    for line, method in zip(lines[1:], simulation.METHODS):
        assert line.startswith(f"| 1 | {method} |")
        assert line.endswith("| 1 |")
    assert picture.read_bytes().startswith(b"\x89PNG")
    simulate_scale.main()
    assert capsys.readouterr().out == printed


def test_the_size_of_the_model_must_be_known(report_file):
    options = simulate_scale.parser().parse_args([])
    with pytest.raises(SystemExit, match="--gradient-bytes"):
        simulate_scale.simulate(Report.load(report_file), options)
