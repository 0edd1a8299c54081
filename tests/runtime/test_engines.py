import io
import os
import signal
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image
from ray.util.placement_group import placement_group, remove_placement_group

import mlem_dist
from mlem_dist.capacity import policies, timing
from mlem_dist.capacity.placement import Devices, parse_placement
from mlem_dist.capacity.planner import Layout, seat_loads
from mlem_dist.engine import completion
from mlem_dist.engine.blocks import Blocks, NonFiniteError
from mlem_dist.engine.completion import complete, open_dataset
from mlem_dist.engine.inline import run_inline
from mlem_dist.errors import UsageError
from mlem_dist.runtime import arrangement, batching, cells, cluster, run
from mlem_dist.runtime.coordinator import Coordinator
from mlem_dist.runtime.run import run_ray
from mlem_dist.solver.integrate import integrate
from mlem_dist.solver.plan import Recipe, held, on_levels, single_level


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    """What changes where a file is written anew; its time alone would not, by a coarse clock."""
    found = {path: path.stat() for path in folder.rglob("*")}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}


def make_inline(job, ladder, out, devices=1):
    list(complete(open_dataset(job, ladder, out), ladder, lambda shards: run_inline(job, ladder, out, shards, devices)))
    return files(out)


def arranged(ladder, pools, there, cost=None, **about):
    """By the ladder's costs, or others."""
    kinds = {
        one: arrangement.cluster_kind(one, ladder, ladder.cost(one.type) if cost is None else cost) for one in there
    }
    return arrangement.Arrangement(Layout(tuple(pools), tuple(kinds[one] for one in there)), **about)


def make_ray(job, ladder, out, devices, placement="pools", watch=lambda progress: None, coalesce=1, **about):
    parsed = parse_placement(placement, len(ladder.levels))
    if any(parsed.kinds):
        there = cluster.find_devices(parsed.kinds, "cpu")
    else:
        there = [Devices("cpu", devices)] * len(parsed.pools)
    last = None
    dataset = open_dataset(job, ladder, out)

    def engine(shards):
        return run_ray(job, ladder, out, shards, arranged(ladder, parsed.pools, there, **about), coalesce)

    for last in complete(dataset, ladder, engine):
        watch(last)
    return files(out), last


@pytest.fixture
def small_job(make_job, three):
    """Small jobs of three levels."""
    return partial(make_job, of=three)


@pytest.fixture
def long_job(small_job):
    """One of several shards, to kill something between them."""
    return small_job(num=96, steps=20, shard_size=16)


@pytest.fixture
def ahead(monkeypatch):
    """A function that sets how many blocks per device coordinators are given; none before it is called."""

    def set_to(blocks: int) -> None:
        monkeypatch.setattr(cells, "QUEUED_BLOCKS_PER_DEVICE", blocks)

    set_to(0)
    return set_to


@pytest.fixture(scope="module")
def reference_cache(tmp_path_factory):
    """Files of the in-process engine, by job."""
    found = {}

    def get(job, ladder):
        key = repr(job.config)
        if key not in found:
            found[key] = make_inline(job, ladder, tmp_path_factory.mktemp("reference"))
        return found[key]

    return get


def plans(levels: int) -> dict[str, object]:
    p = np.repeat(0.6 ** np.arange(levels)[:, None], 12, axis=1)
    return {
        "held": Recipe(p, "systematic", "held"),
        "extrapolated in closed form": Recipe(p, "systematic", "extrapolated", True, np.arange(12.0)),
        "impulse": Recipe(p, "independent", "impulse"),
        "best level alone": single_level(levels, levels, 12),
    }


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("devices", "placement", "plan"),
    [
        (1, "pools", "held"),
        (3, "1,2-3", "impulse"),
        (2, "pools", "extrapolated in closed form"),
        # Held increments in one pool are those of test_family_ladders.py.
        (2, "together", "best level alone"),
    ],
)
def test_ray_writes_the_bytes_of_the_reference(three, small_job, reference_cache, tmp_path, devices, placement, plan):
    job = small_job(plans(len(three.levels))[plan])
    written, _ = make_ray(job, three, tmp_path / "out", devices, placement)
    assert written == reference_cache(job, three)
    assert sum(name.endswith(".parquet") for name in written) == job.shards == 3


@pytest.mark.usefixtures("local_ray")
def test_pools_on_named_devices_write_the_same_bytes(three, small_job, reference_cache, tmp_path):
    levels = len(three.levels)
    job = small_job(plans(levels)["held"])
    written, last = make_ray(job, three, tmp_path / "out", None, f"1@site=here,2-{levels}@site=here")
    assert written == reference_cache(job, three)
    assert last.devices == 3
    with pytest.raises(UsageError, match=r"of kind 'L4'; .* of which there are .*site=here"):
        cluster.find_devices(["site=here", "L4"], "cpu")
    with pytest.raises(UsageError, match="two of its kinds are on one node"):
        cluster.find_devices(["cpu", "site=here"], "cpu")


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("remote", [False, True])
def test_the_levels_of_the_plan_are_timed_on_a_device(three, small_job, remote):
    """The ladder's own costs are said to be absurd: what is called is timed, and what is not keeps them."""
    absurd = replace(three, levels=tuple(replace(level, seconds={"cpu": 1e6}) for level in three.levels))
    two = on_levels(held(np.ones((2, 12), dtype=bool)), (1, len(three.levels)))
    job, devices = small_job(two), Devices("cpu", 3, (("site", "here"),))
    cost = arrangement.measured_cost(job, absurd, devices, [1, len(three.levels)], remote)
    assert (cost[[0, -1]] > 0).all()
    assert (cost[[0, -1]] < 1e6).all()
    assert (cost[1:-1] == 1e6).all()


def test_each_level_has_its_own_time(three, small_job, monkeypatch):
    """By a clock that says the number of the level that is timed."""
    monkeypatch.setattr(timing, "Levels", lambda *about: {k: k for k in range(1, 4)})
    monkeypatch.setattr(timing, "seconds_per_sample", lambda level, *about, **counts: level)
    cost = arrangement.measured_cost(small_job(), three, Devices("cpu", 3), [3, 1], remote=False)
    assert cost.tolist() == [1, three.cost("cpu")[1], 3]


def test_levels_on_cpu_cores_are_timed_there_in_a_job_of_gpus(three, small_job):
    cost = arrangement.measured_cost(small_job(device="cuda"), three, Devices("cpu", 3), [1], remote=False)
    assert 0 < cost[0] < 1


@pytest.mark.usefixtures("local_ray")
def test_nothing_is_timed_where_no_device_is_free(three, small_job, monkeypatch):
    monkeypatch.setattr(arrangement, "DEVICE_SECONDS", 0.1)
    holder = placement_group([{"CPU": 3}])
    ray.get(holder.ready())
    try:
        cost = arrangement.measured_cost(small_job(), three, Devices("cpu", 3), [1], remote=True)
    finally:
        remove_placement_group(holder)
    assert cost is None


def test_timing_takes_a_small_part_of_a_run(three, small_job):
    few, many, large = small_job(num=1000), small_job(num=10**6), small_job(num=10**6, block_size=2000, shard_size=2000)
    assert [arrangement.is_long(job, three, [Devices("cpu", 2)]) for job in (few, many, large)] == [False, True, True]
    assert not arrangement.is_long(large, three, [Devices("cpu", 2000)])


def test_a_node_with_another_version_is_bad_input(three, small_job):
    other = small_job(versions=small_job().versions | {"torch": "1.0.0+cpu"})
    with pytest.raises(UsageError, match=r"torch on .* where the run was started; install the same versions"):
        Blocks(other, three)
    Blocks(small_job(versions=small_job().versions | {"torch": f"{torch.__version__.partition('+')[0]}+cu1"}), three)


@pytest.mark.usefixtures("local_ray")
def test_a_ladder_that_a_device_does_not_find_is_bad_input(three, small_job):
    with pytest.raises(UsageError, match="nowhere"):
        arrangement.measured_cost(small_job(ladder="nowhere"), three, Devices("cpu", 3), [1], remote=True)


def coordinator_with(module, name, value):
    """A coordinator in whose process a constant of a module is another."""
    assert hasattr(module, name)

    # Within a function: Ray's workers cannot import this file.
    class Changed(Coordinator):
        def __init__(self, *about) -> None:
            super().__init__(*about)
            setattr(module, name, value)

    return Changed


@pytest.mark.usefixtures("local_ray")
def test_coalesced_blocks_are_equal_to_rounding(three, small_job, reference_cache, tmp_path, monkeypatch):
    # A call is made when it is full, or no more asks can come.
    monkeypatch.setattr(run, "Coordinator", coordinator_with(batching, "WAIT_SECONDS", 1e6))
    levels = len(three.levels)
    # Several asks are under way at a time only if an actor has several blocks.
    job = small_job(Recipe(np.repeat([[1.0]] + [[0.5]] * (levels - 1), 12, axis=1), "quantiles", "held"))
    written, last = make_ray(job, three, tmp_path / "out", 1, f"1,2-{levels}", coalesce=3)
    reference = reference_cache(job, three)
    assert written.keys() == reference.keys()
    for name in (name for name in written if name.endswith(".parquet")):
        images, expected = (decoded(files[name]) for files in (written, reference))
        assert np.abs(images - expected).max() <= 1
        assert (images != expected).mean() < 0.01
    calls = last.pools[1].calls
    terms = sum(len(run.terms) > 1 for block in range(6) for run in job.block_plan(block).runs)
    assert calls < terms
    assert last.calls[levels] == sum(job.block_plan(block).calls[levels - 1].sum() for block in range(6))


@pytest.mark.usefixtures("local_ray")
def test_ray_writes_the_bytes_of_the_reference_in_bfloat16(three, small_job, reference_cache, tmp_path):
    job = small_job(num=16, precision="bfloat16")
    written, _ = make_ray(job, three, tmp_path / "out", 1, "1,2-3")
    low = reference_cache(job, three)
    assert written == low
    full = reference_cache(small_job(num=16), three)
    for name in (name for name in full if name.endswith(".parquet")):
        images, expected = decoded(low[name]), decoded(full[name])
        assert (images != expected).any()
        assert np.abs(images - expected).mean() < 1


def decoded(parquet: bytes) -> np.ndarray:
    images = pq.read_table(io.BytesIO(parquet))["image"].to_pylist()
    return np.stack([np.array(Image.open(io.BytesIO(image["bytes"]))) for image in images]).astype(int)


@pytest.mark.usefixtures("local_ray")
def test_ray_keeps_the_memory_of_a_two_step_solver(three, small_job, tmp_path):
    job = small_job(plans(len(three.levels))["held"], solver="dpm++")
    written, _ = make_ray(job, three, tmp_path / "out", 1, "1,2-3")
    assert written == make_inline(job, three, tmp_path / "reference")
    other = small_job(plans(len(three.levels))["held"], solver="ode")
    assert written != make_inline(other, three, tmp_path / "other")


@pytest.mark.usefixtures("local_ray")
def test_the_api_uses_the_ray_that_is_there_and_leaves_it(three, tmp_path):
    """Twice, with what a notebook does in between; and what is sampled in process is what the dataset begins with."""
    for seed in (1, 2):
        out = str(tmp_path / f"out-{seed}")
        sizes = {"block_size": 8, "shard_size": 16}
        report = mlem_dist.generate(three, num=24, out=out, seed=seed, nfe=4, steps=20, devices=1, **sizes)
        assert (report.made, report.shards, report.devices) == (24, 2, 1)
        if seed == 1:
            rows = sorted(mlem_dist.read(out).take_all(), key=lambda row: row["sample_id"])
        else:
            rows = pq.read_table(f"{out}/data").to_pylist()
        assert ray.is_initialized()
        images = np.stack([np.array(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows])
        sampled = mlem_dist.sample(three, num=8, seed=seed, nfe=4, steps=20)[..., 0]
        np.testing.assert_array_equal(sampled, images[:8])


def test_the_inline_engine_does_not_depend_on_its_threads(three, small_job, reference_cache, tmp_path):
    job = small_job()
    assert make_inline(job, three, tmp_path / "out", devices=3) == reference_cache(job, three)


def processes(kind: str) -> list[int]:
    """Process ids of the Ray actors of a class, of this process's Ray alone."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "".join(process.cmdline()).startswith(f"ray::{kind}"):
                found.append(process.pid)
    return found


def send(number: signal.Signals, *pids: int) -> None:
    for pid in pids:
        os.kill(pid, number)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("kind", ["LevelActor", "TrajectoryActor"])
def test_a_killed_actor_costs_no_sample(three, long_job, reference_cache, tmp_path, ahead, kind):
    """Both actors of the second pool stand still until each has its calls, of blocks that the first pool's holds."""
    still, killed = [], []

    def kill(progress):
        if progress.state == "sampling" and not still:
            still.extend(processes("LevelActor"))
            send(signal.SIGSTOP, *still)
            ahead(6)
        elif still and not killed and progress.pools[0].calls >= 2 * len(still):
            killed.append(processes(kind)[0])
            send(signal.SIGKILL, *killed)
            send(signal.SIGCONT, *({*still} - {*killed}))

    written, last = make_ray(long_job, three, tmp_path / "out", 2, "1,2-3", watch=kill)
    assert len(still) == 2
    assert killed
    assert sum(pool.deaths for pool in last.pools) == 1
    # Its blocks are begun again, or its calls alone are made again.
    assert [pool.retries > 0 for pool in last.pools] == [kind == "TrajectoryActor", kind == "LevelActor"]
    assert last.samples == 96
    assert written == reference_cache(long_job, three)


@pytest.mark.usefixtures("local_ray")
def test_an_answer_that_finds_another_actor_costs_no_sample(three, small_job, reference_cache, tmp_path, ahead):
    """The best level's actor stands still while the one that holds the blocks dies and is replaced.

    Two blocks wait for that level then. It is a third one, begun after the death, by which the death is noticed.
    """
    job, levels = small_job(num=48, steps=40), len(three.levels)
    steps = iter(("ready", "begun", "waiting", "replaced"))
    step, level = next(steps), []

    def replace_holder(progress):
        nonlocal step
        if step == "ready" and progress.state == "sampling":
            level.extend(processes("LevelActor"))
            send(signal.SIGSTOP, *level)
            ahead(1)
            step = next(steps)
        elif step == "begun":
            # A shard of two blocks has been given, and no more is.
            ahead(0)
            step = next(steps)
        elif step == "waiting" and progress.pools[0].calls == 2:
            send(signal.SIGKILL, *processes("TrajectoryActor"))
            ahead(6)
            step = next(steps)
        elif step == "replaced" and progress.pools[0].deaths and progress.pools[0].actors:
            send(signal.SIGCONT, *level)
            step = "over"

    written, last = make_ray(job, three, tmp_path / "out", 1, f"1-{levels - 1},{levels}", watch=replace_holder)
    assert step == "over"
    assert sum(pool.deaths for pool in last.pools) == 1
    # The three blocks were begun again.
    assert last.pools[0].retries == 3
    assert written == reference_cache(job, three)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("changes", "begun", "message"), [({"ladder": "nowhere"}, True, "nowhere"), ({}, False, "not seen")]
)
def test_what_a_node_does_not_find_is_bad_input(three, small_job, tmp_path, changes, begun, message):
    job, out = small_job(**changes), tmp_path / "out"
    if begun:
        open_dataset(job, three, out).manifest.write(out)
    pools = parse_placement("together", len(three.levels)).pools
    where = arranged(three, pools, [Devices("cpu", 1)])
    with pytest.raises(UsageError, match=message):
        list(run_ray(job, three, out, range(job.shards), where))


def test_two_runs_of_one_command_end_with_one_dataset(three, small_job, tmp_path):
    job, out = small_job(), tmp_path / "out"
    first, second = (open_dataset(job, three, out) for _ in range(2))
    list(complete(first, three, lambda shards: run_inline(job, three, out, shards, 1)))
    made = stamps(out)
    list(complete(second, three, lambda shards: run_inline(job, three, out, shards, 1)))
    assert stamps(out) == made


def test_a_run_that_begins_as_another_ends_leaves_a_finished_dataset(three, small_job, tmp_path, monkeypatch):
    job, out = small_job(), tmp_path / "out"
    real = completion.open_dataset
    late = real(job, three, out)

    def overtaken(*arguments):
        """What the second run has seen is old when it goes on."""
        found = real(*arguments)
        if not finished:
            finished.append(True)
            make_inline(job, three, out)
        return found

    finished = []
    monkeypatch.setattr(completion, "open_dataset", overtaken)
    list(complete(late, three, lambda shards: run_inline(job, three, out, shards, 1)))
    assert real(job, three, out).missing == ()
    assert len(real(job, three, out).manifest.shards) == job.shards


@pytest.mark.usefixtures("local_ray")
def test_a_node_tells_the_memory_of_its_cores():
    """And a cluster without GPUs nothing of theirs."""
    (node,) = cluster.live_nodes()
    share = node["Resources"]["memory"] / 3
    assert arrangement.least_memory("cpu", remote=True) == pytest.approx(share)
    assert arrangement.least_memory("cuda", remote=True) == np.inf


def test_blocks_and_shards_fit_into_memory(three, small_job, tmp_path):
    for size, message in ((10**7, "`block_size` 10000000.* take 976562 or less"), (10**8, "`shard_size` 100000000")):
        blocks = {"block_size": size if "block" in message else 100}
        with pytest.raises(UsageError, match=message):
            open_dataset(small_job(num=10**9, shard_size=size, **blocks), three, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("local_ray")
def test_a_killed_coordinator_costs_no_sample(three, long_job, reference_cache, tmp_path, monkeypatch, ahead):
    """Two cells of one device each; one of them loses its coordinator, and its actors with it."""
    # Every round takes up what it asks for, so that a snapshot is of after the one before.
    monkeypatch.setattr(cells, "ANSWER_SECONDS", 1e6)
    monkeypatch.setattr(run, "POLL_SECONDS", 0.02)
    killed, waiting, sampling = [], [], []

    def kill(progress):
        if killed:
            return
        (sampling if progress.blocks else waiting).append(progress.seconds)
        if progress.blocks:
            killed.extend([*processes("Coordinator"), progress.seconds])
            send(signal.SIGKILL, killed[0])
        elif progress.state == "sampling":
            # Both cells, of which one may be ready long before the other.
            ahead(1)

    written, last = make_ray(long_job, three, tmp_path / "out", 2, "together", watch=kill, cell_devices=1)
    # What is told of the time is by the driver's clock, and of the first coordinators.
    assert waiting[-2] < last.first_block < sampling[0]
    assert len(killed) == 3
    assert 0 < last.ready < killed[2]
    assert last.devices == 2
    assert last.samples == 96
    assert written == reference_cache(long_job, three)


@pytest.mark.usefixtures("local_ray")
def test_a_pool_that_holds_up_the_others_takes_an_actor(three, small_job, tmp_path, monkeypatch):
    """The large levels are said to cost nothing, so that they get one actor, and the trajectories all devices."""
    # The busiest pool is full, however little of the machine other programs leave to it.
    monkeypatch.setattr(run, "Coordinator", coordinator_with(policies, "FULL_SHARE", 0.02))
    levels = len(three.levels)
    # More than any machine makes meanwhile.
    job = small_job(num=10**6, steps=40, shard_size=32)
    wrong = np.array([1.0, 1.0] + [1e-6] * (levels - 2))
    out, pools = tmp_path / "out", parse_placement(f"1-2,{levels}", levels).pools
    dataset = open_dataset(job, three, out)
    dataset.manifest.write(out)
    where = arranged(three, pools, [Devices("cpu", 3)] * 2, wrong)
    assert [len(seats) for seats in where.layout.seats(seat_loads(job.workload, where.layout), [3])] == [3, 1]

    def written() -> set[Path]:
        return {*(out / "data").glob("*.parquet")}

    before = None
    for progress in run_ray(job, three, out, dataset.missing, where):
        if before is None and tuple(pool.actors for pool in progress.pools) in {(2, 2), (1, 3)}:
            before = written()
        elif before is not None and len(written() - before) >= 2:
            break
        # It takes some windows of two seconds, however fast or slow a machine is.
        assert progress.seconds < 1800
    assert progress.samples < job.num
    assert not any(pool.deaths for pool in progress.pools)
    since = sorted(written() - before)[-2:]
    shards = [int(path.name.split("-")[1]) for path in since]
    dataset.manifest.write(tmp_path / "reference")
    list(run_inline(job, three, tmp_path / "reference", shards, 1))
    assert [path.read_bytes() for path in since] == [
        (tmp_path / "reference" / "data" / path.name).read_bytes() for path in since
    ]


def test_a_sample_does_not_depend_on_num(three, small_job):
    job = small_job(num=3)
    blocks = Blocks(job, three)
    levels = {k: three.load_level(k, "cpu") for k in range(1, len(three.levels) + 1)}
    x = integrate(
        levels,
        blocks.table,
        job.block_plan(0),
        blocks.noise(0),
        blocks.condition(0),
        blocks.closed_form(0, blocks.condition(0)),
    )
    assert len(x) == job.block_size
    longer = Blocks(small_job(num=44), three)
    y = integrate(
        levels,
        longer.table,
        longer.job.block_plan(0),
        longer.noise(0),
        longer.condition(0),
        longer.closed_form(0, longer.condition(0)),
    )
    assert (blocks.images(0, x) == longer.images(0, y)).all()


def test_a_non_finite_block_fails_loudly(three, small_job):
    blocks = Blocks(small_job(), three)
    x = blocks.noise(0)(-1)
    x[5, 0, 3, 3] = np.nan
    with pytest.raises(NonFiniteError, match="1 of 8 samples are not finite"):
        blocks.images(0, x)


def test_a_resumed_run_makes_only_what_is_missing(three, small_job, reference_cache, tmp_path):
    job, out = small_job(), tmp_path / "out"
    dataset = open_dataset(job, three, out)
    for progress in complete(dataset, three, lambda shards: run_inline(job, three, out, shards, 1)):
        if progress.samples > 20:
            break
    kept = stamps(out / "data")
    assert 0 < len(kept) < job.shards
    missing = open_dataset(job, three, out).missing
    assert len(missing) == job.shards - len(kept)
    assert make_inline(job, three, out) == reference_cache(job, three)
    assert kept.items() <= stamps(out / "data").items()
    again = open_dataset(job, three, out)
    assert not again.missing
    (out / "data" / "train-00001-of-00003.parquet").unlink()
    assert open_dataset(job, three, out).missing == (1,)
    assert make_inline(job, three, out) == reference_cache(job, three)


def test_another_configuration_is_refused_with_the_keys_that_differ(three, small_job, tmp_path):
    make_inline(small_job(num=8), three, tmp_path)
    before = files(tmp_path)
    with pytest.raises(UsageError, match=r"num was 8, now 16; seed was 3, now 4"):
        open_dataset(small_job(num=16, seed=4), three, tmp_path)
    assert files(tmp_path) == before


@pytest.mark.usefixtures("local_ray")
def test_more_devices_than_ray_has_are_refused():
    assert cluster.count_devices("cpu", None) == 3
    with pytest.raises(UsageError, match="4 CPUs are needed and Ray has 3"):
        cluster.count_devices("cpu", 4)
    with pytest.raises(UsageError, match="1 GPUs are needed and Ray has 0"):
        cluster.count_devices("cuda", None)
