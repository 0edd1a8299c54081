import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from click.testing import CliRunner

from mlem_dist.capacity.placement import Costs, Devices, level_loads, parse_placement
from mlem_dist.capacity.planner import (
    Kind,
    Layout,
    candidates,
    forecast,
    marginal,
    overheads_of,
    plan_capacity,
    read_kinds,
    seat_loads,
)
from mlem_dist.capacity.policies import trajectory_depth
from mlem_dist.capacity.simulation import CellSimulation, Overheads, Seat, pool_seconds, timed_segments
from mlem_dist.cli import cli
from mlem_dist.engine.job import Workload
from mlem_dist.engine.program import Program, evaluations, levels_of
from mlem_dist.errors import UsageError
from mlem_dist.ladder.sizes import WEIGHT_SHARE
from mlem_dist.solver.plan import Recipe, held, on_levels

NOTHING = Overheads(call=0, trip=0, latency=0, event=0, write=0, poll=0, slowdown=1, sliced=1, shared=False, state=4)
COST = np.array([0.02, 0.2, 1.0, 5.0]) * 1e-3
COSTS = Costs(COST, COST)
FOUR = Recipe(np.repeat(0.5 ** np.arange(4)[:, None], 12, axis=1), "systematic", "held")
POOLS = (range(1, 3), range(3, 5))
GIB = 2.0**30


@pytest.fixture
def make_workload(make_job):
    return lambda *plan, **changes: make_job(*plan, **changes).workload


@pytest.fixture
def workload(make_workload):
    return make_workload(FOUR, num=64_000, block_size=8, shard_size=80)


def kind(count: int, name: str = "gpu", cost: np.ndarray = COST, memory: float = np.inf, **overheads) -> Kind:
    return Kind(name, Devices("cuda", count), Costs(cost, cost), replace(NOTHING, **overheads), memory)


def layout(one: Kind, placement: str = "together") -> Layout:
    pools = parse_placement(placement, 4).pools
    return Layout(pools, (one,) * len(pools))


@pytest.mark.parametrize("collapse", [False, True])
def test_the_segments_of_plans_hold_the_loads_of_the_pools(make_workload, collapse):
    workload = make_workload(replace(FOUR, collapse=collapse), block_size=8, shard_size=80)
    for pools in ((range(1, 5),), POOLS, tuple(range(k, k + 1) for k in range(1, 5))):
        programs = [
            timed_segments(Program(workload.block_plan(block), pools), [COSTS] * len(pools)) for block in range(16)
        ]
        seconds = np.mean([pool_seconds(program, len(pools)) for program in programs], axis=0)
        np.testing.assert_allclose(seconds, level_loads(evaluations(workload), pools, [COSTS] * len(pools)).sum(1))
        # A run in closed form takes the time of a call of level 1, which is at every step otherwise.
        runs = np.mean(
            [[len(plan.runs), sum(bool(run.base) for run in plan.runs)] for plan in workload.first_plans], axis=0
        )
        assert seconds.sum() >= COST[0] * (runs[1] if collapse else 12)


def test_no_forecast_is_better_than_the_levels_own_time(make_workload):
    """Of the first block, which does not call the best level; of the first sixteen some do."""
    rare = Recipe(np.array([[1.0] * 12, [0.1] * 12, [0.02] * 12, [0.01] * 12]), "independent", "held")
    workload = make_workload(rare, num=8, block_size=8, shard_size=8)
    assert not workload.block_plan(0).calls[3].any()
    assert workload.expected_calls()[3] > 0
    assert forecast(workload, layout(kind(1))).efficiency == pytest.approx(1)


@pytest.mark.parametrize("devices", [1, 3, 16])
def test_without_overheads_devices_that_hold_all_levels_are_always_busy(workload, devices):
    found = forecast(workload, layout(kind(devices)))
    assert found.efficiency == pytest.approx(1, abs=0.02)
    assert found.pools[0].busy == pytest.approx(1, abs=0.02)
    assert found.seconds == pytest.approx(workload.num / found.ideal, rel=0.02)
    assert found.level_seconds.sum() == pytest.approx(devices / found.ideal, rel=0.01)


def rate(workload, one: Kind, placement: str = "together", cell_devices: int | None = None) -> float:
    return forecast(workload, layout(one, placement), cell_devices).images_per_second


def test_every_overhead_slows_a_cell_down_by_its_size(workload):
    """One of them at a time, by hand."""
    load = level_loads(evaluations(workload), [range(1, 5)], [COSTS]).sum()
    # Two cores that also write.
    assert rate(workload, kind(2, write=load, shared=True)) == pytest.approx(2 / (2 * load), rel=0.03)
    assert rate(workload, kind(1, slowdown=1.5)) == pytest.approx(1 / load / 1.5, rel=0.02)
    # One call per block of eight, and the device idle only while both blocks in flight are on their way.
    assert rate(workload, kind(1, call=8 * load)) == pytest.approx(1 / load / 2, rel=0.02)
    assert rate(workload, kind(1, latency=1.0)) == pytest.approx(2 * 8 / (1 + 8 * load), rel=0.1)
    # Four cells of one device, each of which is given a shard of ten blocks a round.
    assert rate(workload, kind(4, poll=1.0), "together", 1) == pytest.approx(4 * 80 / (0.5 + 4), rel=0.05)


def test_a_gpu_works_for_other_actors_while_one_makes_its_call(workload):
    """Two actors on one GPU, which takes turns; a core does one thing at a time."""
    cost = np.array([1.0, 1, 2, 4]) * 1e-3
    programs = [
        timed_segments(Program(workload.block_plan(block), POOLS), [Costs(cost, cost)] * 2) for block in range(16)
    ]
    loads = np.mean([pool_seconds(program, 2) for program in programs], axis=0)
    load = loads.sum()
    calls = np.mean([len(program) + sum(len(one.asks) for one in program) for program in programs])
    call = 8 * load / calls / 3
    core = kind(1, cost=cost, call=call, shared=True)
    assert rate(workload, core, "1-2,3-4") == pytest.approx(1 / load / (1 + 1 / 3), rel=0.02)
    assert rate(workload, kind(1, cost=cost, call=call), "1-2,3-4") == pytest.approx(1 / load, rel=0.05)
    slicing = kind(1, cost=cost, sliced=1.5)
    assert rate(workload, slicing, "1-2,3-4") == pytest.approx(1 / load / 1.5, rel=0.02)
    assert rate(workload, slicing) == pytest.approx(1 / load, rel=0.05)


def test_blocks_in_flight_are_bounded_by_memory():
    small = 2**20
    assert trajectory_depth(["cuda"], 1, 2, small) == 8
    assert trajectory_depth(["cpu"] * 4, 2, 2, small) == 6
    assert trajectory_depth(["cuda"], 1, 2, 64 * small) == 4
    # Two hide the way to an actor, and that is all there is to hide where it has every level.
    assert trajectory_depth(["cuda"], 1, 2, 2**40) == trajectory_depth(["cuda"] * 8, 8, 1, small) == 2
    assert trajectory_depth(["cuda", "cpu"], 8, 2, small) == 2


def test_cells_divide_the_devices_as_evenly_as_they_can():
    assert layout(kind(65)).cells(64) == [[33], [32]]
    assert layout(kind(3)).cells(2) == [[2], [1]]
    small, large = kind(9, "small"), kind(2, "large")
    pair = Layout((range(1, 4), range(4, 5)), (small, large))
    assert pair.cells(64) == [[9, 2]]
    # Each needs one of either kind.
    assert pair.cells(2) == [[5, 1], [4, 1]]


def test_an_uneven_cell_stands_for_its_part(workload):
    for devices, cell in ((3, 2), (5, 2), (7, 4)):
        assert forecast(workload, layout(kind(devices)), cell).efficiency == pytest.approx(1, abs=0.03)


def test_one_more_of_many_brings_its_share(workload):
    best = plan_capacity(workload, np.full(4, 1.0), [kind(64)])[0]
    assert marginal(workload, best)["gpu"] == pytest.approx(best.images_per_second / 64, rel=0.2)


def test_memory_is_given_in_gib(fashion):
    (one,) = read_kinds(fashion, "cpu:2:80", [])
    assert (one.count, one.memory) == (2, 80 * GIB)
    assert one.devices == Devices("cpu", 2)
    np.testing.assert_array_equal(one.costs.alone, fashion.cost("cpu"))
    # The residuals among the levels take in the Gaussian.
    np.testing.assert_allclose(
        one.costs.alone - one.costs.beside, fashion.cost("cpu")[0] * np.array([0, 1, 1, 1, 1, 1])
    )


def test_seats_are_shared_out_by_what_pools_are_simulated_to_take(workload):
    overheads = replace(NOTHING, call=2e-3, trip=5e-3, slowdown=1.1)
    one = Kind("gpu", Devices("cuda", 2), COSTS, overheads)
    seated = seat_loads(workload, Layout(POOLS, (one, one)))
    assert (seated > level_loads(evaluations(workload), POOLS, [COSTS, COSTS]).sum(1) * 1.1).all()
    programs = [timed_segments(Program(workload.block_plan(block), POOLS), [COSTS, COSTS]) for block in range(16)]
    trace = CellSimulation(programs, [[Seat(0, 1.0)], [Seat(1, 1.0)]], [(one.devices, overheads)], 8, 10).run(16)
    # The call that begins a block is not in the loads.
    begins = np.array([overheads.call * 16, 0])
    np.testing.assert_allclose([trace.busy[0], trace.busy[1]], seated * 8 * 16 + begins, rtol=1e-6)


def test_all_work_is_done_and_in_turn(workload):
    programs = [timed_segments(Program(workload.block_plan(block), POOLS), [COSTS, COSTS]) for block in range(4)]
    cell = CellSimulation(programs, [[Seat(0, 1.0)], [Seat(1, 1.0)]], [(Devices("cuda", 2), NOTHING)], 8, 10)
    trace = cell.run(8)
    assert len(trace.blocks) == 8
    local = 2 * 8 * sum(segment.local for program in programs for segment in program)
    asked = 2 * 8 * sum(seconds for program in programs for segment in program for _, seconds in segment.asks)
    assert trace.busy == pytest.approx({0: local, 1: asked})
    assert max(local, asked) <= trace.seconds <= local + asked
    for pool in (0, 1):
        mine = sorted((busy.start, busy.stop) for busy in trace.work if busy.pool == pool)
        assert all(before[1] <= after[0] + 1e-12 for before, after in pairwise(mine))


def test_a_slow_coordinator_is_the_bottleneck_and_smaller_cells_help(workload):
    one = layout(kind(64, event=0.01))
    large, small, chosen = forecast(workload, one, 64), forecast(workload, one, 8), forecast(workload, one)
    assert large.bottleneck == "coordinator"
    # All levels together are one call per block.
    assert large.images_per_second == pytest.approx(8 / 0.01, rel=0.02)
    assert small.cells == 8
    assert small.images_per_second > 5 * large.images_per_second
    assert chosen.cell_devices < 64
    assert chosen.coordinator < 0.5


def test_cells_are_made_smaller_only_where_the_levels_fit_into_fewer_devices(workload):
    """Two of three pools may meet on a device of a larger cell, and in a cell of one device all of them do."""
    one, pools = kind(8, memory=10 / WEIGHT_SHARE, event=0.1), (range(1, 3), range(3, 4), range(4, 5))
    for of_actor in (3.0, 4.0):
        layout = Layout(pools, (one,) * 3, (of_actor,) * 3)
        chosen = forecast(workload, layout)
        assert chosen.coordinator > 0.5
        load = seat_loads(workload, layout)
        assert layout.fits(load, chosen.cell_devices)
        assert (chosen.cell_devices == 1) == layout.fits(load, 1) == (of_actor == 3)


def test_levels_that_fit_into_the_largest_cell_may_not_fit_into_another():
    """In the cell of two of five devices pools meet on one of them, and in the cell of three they do not."""
    one = kind(5, memory=10 / WEIGHT_SHARE)
    found, load = Layout((range(1, 2), range(2, 3)), (one, one), held=(5.0, 9.0)), np.array([1.0, 2.0])
    cells = found.cells(3)
    assert cells == [[3], [2]]
    of_pools = [[{seat.device for seat in one} for one in found.seats(load, cell)] for cell in cells]
    assert [bool(first & second) for first, second in of_pools] == [False, True]
    assert not found.fits(load, 3)
    assert replace(found, kinds=(kind(3, memory=10 / WEIGHT_SHARE),) * 2).fits(load, 3)


def test_a_small_simulation_foretells_a_large_job(workload):
    short, long = (forecast(replace(workload, num=num), layout(kind(4), "1-2,3-4")) for num in (64_000, 6_400_000))
    assert long.images_per_second == pytest.approx(short.images_per_second, rel=0.02)
    assert long.seconds == pytest.approx(100 * short.seconds, rel=0.02)


def test_kinds_share_the_images_by_their_speed(workload):
    slow, fast = kind(8, "slow", COST * 4, trip=1e-4), kind(4, "fast", trip=1e-4)
    best = plan_capacity(workload, np.full(4, 1.0), [slow, fast])[0]
    assert [str(part.layout) for part in best.parts] == ["1-4@slow", "1-4@fast"]
    assert best.parts[1].images_per_second == pytest.approx(2 * best.parts[0].images_per_second, rel=0.05)
    gains = marginal(workload, best)
    assert gains["fast"] == pytest.approx(4 * gains["slow"], rel=0.2)
    assert best.level_hours(workload.num).sum() * 3600 == pytest.approx(12 * best.seconds, rel=0.05)


def test_a_level_that_fits_on_one_kind_only_is_called_there(workload):
    weights = np.array([1.0, 1, 1, 30])
    small, large = kind(8, "small", memory=10 / WEIGHT_SHARE), kind(2, "large", memory=34 / WEIGHT_SHARE)
    ways = plan_capacity(workload, weights, [small, large])
    assert {str(part.layout) for part in ways[0].parts} == {"1-3@small,4@large"}
    alone = next(way for way in ways if "small" not in str(way))
    assert ways[0].images_per_second > 1.1 * alone.images_per_second
    with pytest.raises(UsageError, match="no placement of its levels fits"):
        plan_capacity(workload, weights, [small])


def test_kinds_with_the_same_overheads_are_still_two(workload):
    """The nine small devices have little to do, and the large one, on which the best level is, is the bottleneck."""
    small, large = (
        Kind(name, Devices("cpu", n), COSTS, replace(NOTHING, shared=True)) for name, n in (("a", 9), ("b", 1))
    )
    found = forecast(workload, Layout((range(1, 4), range(4, 5)), (small, large)))
    assert found.pools[1].busy > 0.9
    assert found.pools[0].busy < 0.1
    assert found.bottleneck == "b"
    assert found.efficiency == pytest.approx(1, abs=0.1)


def test_larger_images_take_longer_to_write(fashion):
    small, large = (overheads_of("cpu", replace(fashion, sample_shape=(3, side, side))) for side in (32, 256))
    assert large.write == pytest.approx(64 * small.write)
    assert large.state == 64 * small.state
    assert replace(large, write=small.write, state=small.state) == small


def test_levels_stay_together_where_they_fit(workload):
    found = candidates(workload, np.full(4, GIB), kind(2, memory=100 * GIB, call=1e-3, trip=1e-3))
    assert [str(found[i]) for i in (0, -1)] == ["1-4@gpu", "1@gpu,2@gpu,3@gpu,4@gpu"]
    assert len(found) == 8


def test_a_ladder_that_is_too_large_for_a_device_is_divided(make_workload):
    weights = np.array([0.0, 1, 2, 30]) * GIB
    # One increment at a time, each over the next lower level.
    fire = np.array([np.ones(12)] + [np.arange(12) % 3 == k for k in range(3)], dtype=bool)
    workload = make_workload(held(fire))
    single = [range(k, k + 1) for k in range(1, 5)]
    # The first pool, which takes part in every step, evaluates its levels for the others.
    assert levels_of(evaluations(workload), single) == [[1], [2], [2, 3], [3, 4]]
    assert levels_of(evaluations(workload), [range(1, 4), range(4, 5)]) == [[1, 2, 3], [4]]

    def of(gib: float, one: Workload = workload) -> list[tuple[range, ...]]:
        return [found.pools for found in candidates(one, weights, kind(3, memory=gib * GIB / WEIGHT_SHARE))]

    # Three devices: the lower levels' share of the time is one of them.
    assert (range(1, 5),) in of(34)
    assert of(31) == [(range(1, 4), range(4, 5))]
    with pytest.raises(UsageError, match="33 GiB"):
        of(16)
    # Where increments meet at a step, one may be over a lower level than the next.
    assert levels_of(evaluations(make_workload(FOUR)), single)[3] == [2, 3, 4]
    assert of(30.5, make_workload(on_levels(held(fire[:2]), (1, 4))))
    # Half the bytes.
    assert (range(1, 5),) in of(17, replace(workload, precision="bfloat16"))


def run(*arguments: str) -> str:
    return CliRunner().invoke(cli, ["plan", *arguments], standalone_mode=False, catch_exceptions=False).stdout


def test_plan_prints_a_forecast_and_draws_it(tmp_path):
    cost = "h100=0.001,0.01,0.02,0.04,0.08,0.16"
    arguments = ["fashion", "--num", "1e7", "--pool-devices", "cpu:8,h100:2:80", "--cost", cost]
    text = run(*arguments, "--out", str(tmp_path / "timeline.png"))
    assert "1-6@h100" in text
    assert "One more device of" in text
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    raw = json.loads(run(*arguments, "--json"))
    best = raw["placements"][0]
    assert best["hours"] == pytest.approx(1e7 / best["images_per_second"] / 3600, rel=0.05)
    assert set(raw["images_per_second_of_one_more"]) == {"cpu", "h100"}
    assert {pool["pool"] for part in best["parts"] for pool in part["pools"]} == {"1-6@cpu", "1-6@h100"}


@pytest.mark.parametrize(("kind", "size"), [("cpu", "100"), ("h200", "500")])
def test_blocks_are_larger_on_gpus_by_default(kind, size):
    """Both kinds are known: a CPU core to the ladder, an H200 to its calibration."""
    arguments = ["fashion", "--num", "1e5", "--pool-devices", f"{kind}:2", "--json"]
    other = {"100": "500", "500": "100"}[size]
    assert run(*arguments) == run(*arguments, "--block-size", size) != run(*arguments, "--block-size", other)


@pytest.mark.parametrize(
    ("devices", "costs", "message"),
    [
        ("cpu", [], "expected KIND:COUNT"),
        ("cpu:0", [], "expected KIND:COUNT"),
        ("cpu:2:x", [], "expected KIND:COUNT"),
        ("cpu:2,cpu:3", [], "stands there twice"),
        ("l4:2", [], "no costs of 'l4' are known"),
        ("l4:2", ["l4=1,2"], "6 positive numbers"),
        ("cpu:2", ["l4=1,2,3,4,5,6"], "not one of the `pool_devices`"),
    ],
)
def test_bad_devices_are_refused(fashion, devices, costs, message):
    with pytest.raises(UsageError, match=message):
        read_kinds(fashion, devices, costs)
