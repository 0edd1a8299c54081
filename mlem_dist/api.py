"""The public functions: what the command line does, by the same names."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mlem_dist.dataset.store import Location, parse_location
from mlem_dist.engine.completion import Engine, complete, open_dataset
from mlem_dist.engine.job import BLOCK_SIZE, Job
from mlem_dist.engine.progress import GenerationReport, Progress
from mlem_dist.errors import UsageError
from mlem_dist.files import check_writable
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.machine import available_cores
from mlem_dist.solver.plan import Draw, Increments, Plan, Recipe, read_plan
from mlem_dist.solver.probabilities import Rule
from mlem_dist.tuning.tuned_plans import choose_plan

if TYPE_CHECKING:
    import ray.data

    from mlem_dist.capacity.placement import Placement
    from mlem_dist.capacity.planner import Capacity
    from mlem_dist.dataset.shards import Shard
    from mlem_dist.training.data import Images
    from mlem_dist.training.tasks import TrainingProgress
    from mlem_dist.tuning.calibrate import Calibration
    from mlem_dist.tuning.frontier import Row

DEFAULT_NFE = 10.0
"""Budget per sample, in evaluations of the best level."""

Solver = Literal["ddim", "ddpm", "dpm++"]
Precision = Literal["float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]

Notify = Callable[[str], None]
"""A function that is given a sentence for the user."""


def _ignore(what: object) -> None:
    """Take what nobody wants to see."""


def load_ladder(ladder: str | Path | Ladder) -> Ladder:
    """A ladder by its bundled name or folder; a loaded one as it is.

    Raises:
        UsageError: as `Ladder.load`.
    """
    return ladder if isinstance(ladder, Ladder) else Ladder.load(ladder)


def local_device(device: str) -> str:
    """ "cpu" or "cuda" on this machine; "auto" is a GPU if there is one.

    Raises:
        UsageError: there is no such device.
    """
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"`device` {device!r}: expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("`device` cuda: torch finds no CUDA device on this machine; use `device` cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def find_plan(
    ladder: Ladder,
    cost: np.ndarray,
    *,
    solver: str,
    steps: int,
    nfe: float | None = None,
    plan: Plan | str | Path | None = None,
    **choices: Any,
) -> tuple[Plan | Recipe, str]:
    """The given plan, or that of a budget by the levels' `cost` (K,); and a note for the user, or "".

    Raises:
        UsageError: the plan is for another ladder, solver or number of steps; a budget is given beside it; or as
            `choose_plan`.
    """
    if plan is None:
        return choose_plan(ladder, cost, solver, steps, DEFAULT_NFE if nfe is None else nfe, **choices)
    if given := [name for name, value in {"nfe": nfe, **choices}.items() if value is not None]:
        raise UsageError(f"`{given[0]}` and `plan` exclude each other: a plan has its own; leave one out")
    if isinstance(plan, Plan):
        if plan.fire.shape != (len(ladder.levels), steps):
            raise UsageError(
                f"`plan` is of {plan.fire.shape[0]} levels and {plan.fire.shape[1]} steps, expected "
                f"{len(ladder.levels)} and {steps}"
            )
        return plan, ""
    return read_plan(Path(plan), ladder.digest, len(ladder.levels), solver, steps), ""


def check_labels(labels: Sequence[int] | None, ladder: Ladder) -> tuple[int, ...]:
    """The classes to generate; all of the ladder's if none are given, (0,) where it has none.

    Raises:
        UsageError: the ladder has no such class, or one is given twice.
    """
    classes = len(ladder.labels)
    if labels is None:
        return tuple(range(max(1, classes)))
    text = ",".join(map(str, labels))
    if not classes:
        raise UsageError(f"`labels` {text}: the ladder has no classes; leave it out")
    if not labels:
        raise UsageError("`labels` is empty, expected at least one class")
    if bad := [label for label in labels if not 0 <= label < classes]:
        raise UsageError(f"`labels`: {bad[0]} is out of range, the ladder has classes 0 to {classes - 1}")
    if len(set(labels)) != len(labels):
        raise UsageError(f"`labels` {text}: a class stands there twice")
    return tuple(labels)


def sample(
    ladder: str | Path | Ladder = "fashion",
    *,
    num: int,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    nfe: float | None = None,
    solver: Solver = "ddim",
    steps: int = 250,
    plan: Plan | str | Path | None = None,
    precision: Precision = "float32",
    device: Device = "auto",
) -> np.ndarray:
    """Images made in this process; a dataset of the same arguments begins with them, but for rounding.

    Args:
        ladder: a bundled name, a folder, or a ladder.
        num: how many images.
        labels: classes to generate, in turn; all by default.
        seed: decides every noise and every draw of a plan.
        nfe: compute per image, in evaluations of the best level; 10 by default.
        solver: "ddim" or "dpm++" for the ODE, "ddpm" for the SDE.
        steps: base steps.
        plan: a plan or its file, instead of a budget.
        precision: type that networks compute in.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.

    Returns:
        uint8 (num, H, W, C), C = 1 or 3.

    Raises:
        UsageError: an argument is out of range, or the ladder cannot be used.
        NonFiniteError: a block ended with NaN or infinite values.
    """
    from mlem_dist.engine.inline import sample_blocks

    loaded = load_ladder(ladder)
    device_type = local_device(device)
    chosen, _ = find_plan(loaded, loaded.cost(device_type), solver=solver, steps=steps, nfe=nfe, plan=plan)
    block_size = min(num, BLOCK_SIZE[device_type])
    job = Job(
        ladder=loaded.source,
        digest=loaded.digest,
        num=num,
        labels=check_labels(labels, loaded),
        solver=solver,
        steps=steps,
        plan=chosen,
        seed=seed,
        block_size=block_size,
        shard_size=block_size,
        device=device_type,
        precision=precision,
    )
    loaded.check_models()
    return np.concatenate(list(sample_blocks(job, loaded)))[:num]


def generate(
    ladder: str | Path | Ladder = "fashion",
    *,
    num: int,
    out: str | Location,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    nfe: float | None = None,
    solver: Solver = "ddim",
    steps: int = 250,
    probabilities: Rule | Literal["neyman"] | None = None,
    draw: Draw | None = None,
    increments: Increments | None = None,
    plan: Plan | str | Path | None = None,
    precision: Precision = "float32",
    block_size: int | None = None,
    shard_size: int = 2000,
    placement: str = "auto",
    coalesce: int = 1,
    devices: int | None = None,
    device: Device = "auto",
    address: str | None = None,
    engine: Literal["ray", "inline"] = "ray",
    notify: Notify = _ignore,
    progress: Callable[[Progress], None] = _ignore,
) -> GenerationReport:
    """Generate a Parquet dataset; the same call again makes what is missing and rewrites nothing.

    Args:
        ladder: a bundled name, a folder, or a ladder.
        num: images of the whole dataset.
        out: a folder, or the URL of one in an object store.
        labels: classes to generate, in turn; all by default.
        seed: decides every noise and every draw of a plan.
        nfe: compute per image, in evaluations of the best level; 10 by default.
        solver: "ddim" or "dpm++" for the ODE, "ddpm" for the SDE.
        steps: base steps.
        probabilities: how the budget is spread over levels and steps; Neyman's for a calibrated ladder by default.
        draw: how the evaluations of a plan are drawn; "systematic" by default.
        increments: how an increment enters the steps; "held" for ddpm and "extrapolated" for others by default.
        plan: a plan or its file, instead of a budget.
        precision: type that networks compute in.
        block_size: samples that advance together; 100 on CPUs and 500 on GPUs by default.
        shard_size: samples of one Parquet file, a multiple of the block size.
        placement: which levels share a pool, as "together", "pools" or "1-3,4"; the fastest by forecast for "auto".
        coalesce: blocks that another pool than the first may evaluate together.
        devices: CPU cores or GPUs to use; all by default.
        device: "cpu", "cuda", or "auto" for GPUs if there are any.
        address: of a Ray head; by default the cluster that this runs in, else a Ray that is started here.
        engine: "ray", or "inline" for this process alone.
        notify: takes sentences for the user.
        progress: takes snapshots of the run.

    Returns:
        What was made, and how fast.

    Raises:
        UsageError: an argument is out of range, or `out` holds something else; nothing has been written then.
        RuntimeError: Ray does not start, its actors die faster than they work, or another run writes to `out`.
        NonFiniteError: a block ended with NaN or infinite values.
    """
    started = time.monotonic()
    loaded = load_ladder(ladder)
    place = parse_location(out) if isinstance(out, str) else out
    classes = check_labels(labels, loaded)
    pools = _check_engine(loaded, placement, coalesce, devices, address, engine)
    remote = False
    if engine == "ray":
        from mlem_dist.runtime import cluster

        remote = cluster.is_remote(address)
        if remote:
            cluster.connect(address)
    device_type = cluster.device_type(device) if remote else local_device(device)
    chosen, note = find_plan(
        loaded,
        loaded.cost(device_type),
        solver=solver,
        steps=steps,
        nfe=nfe,
        plan=plan,
        probabilities=probabilities,
        draw=draw,
        increments=increments,
    )
    job = Job(
        ladder=loaded.source,
        digest=loaded.digest,
        num=num,
        labels=classes,
        solver=solver,
        steps=steps,
        plan=chosen,
        seed=seed,
        block_size=BLOCK_SIZE[device_type] if block_size is None else block_size,
        shard_size=shard_size,
        device=device_type,
        precision=precision,
    )
    dataset = open_dataset(job, loaded, place)
    todo = sum(len(job.shard_rows(shard)) for shard in dataset.missing)
    last: Progress | None = None
    if todo or not dataset.manifest.shards:
        for sentence in filter(None, (note, _cost_note(loaded, device_type), *dataset.notes)):
            notify(sentence)
        if todo:
            loaded.check_models()
        if engine == "ray" and todo:
            make = _on_ray(job, loaded, place, todo, pools, coalesce, devices, address, remote, notify)
        else:
            make = _inline(job, loaded, place, devices if engine == "inline" else None)
        names = [level.name for level in loaded.levels]
        for told in complete(dataset, loaded, make):
            last = replace(told, total=todo, levels=names)
            progress(last)
    if engine == "ray":
        cluster.disconnect()
    return GenerationReport.of(last, str(place), num, job.shards, time.monotonic() - started, device_type)


def read(out: str | Location) -> ray.data.Dataset:
    """The finished shards of a dataset as a Ray Dataset, with its columns as they are stored.

    Args:
        out: the dataset's folder, or its URL in an object store.

    Raises:
        UsageError: there is no dataset, or no finished shard of it.
    """
    import ray.data

    from mlem_dist.dataset.manifest import finished_shards, read_manifest

    place = parse_location(out) if isinstance(out, str) else out
    paths = sorted(finished_shards(place, read_manifest(place)))
    if not paths:
        raise UsageError(f"{place} has no finished shard yet; generate it to the end")
    filesystem = None if isinstance(place, Path) else place.fs
    root = str(place.absolute()) if isinstance(place, Path) else place.path
    return ray.data.read_parquet([f"{root}/{path}" for path in paths], filesystem=filesystem)


def _check_engine(
    ladder: Ladder, placement: str, coalesce: int, devices: int | None, address: str | None, engine: str
) -> Placement | None:
    """The placement that is asked for, None for the fastest, after a look at whether these arguments go together."""
    from mlem_dist.capacity.placement import parse_placement

    if engine not in ("ray", "inline"):
        raise UsageError(f"`engine` {engine!r}: expected ray or inline")
    pools = None if placement == "auto" else parse_placement(placement, len(ladder.levels))
    if pools and any(pools.kinds) and devices:
        raise UsageError(f"`placement` {placement} names its devices; leave out `devices`")
    if coalesce > 1 and pools and len(pools.pools) == 1:
        raise UsageError(f"`coalesce` {coalesce}: one pool for all levels asks no other; leave it out")
    if engine == "inline" and (pools or coalesce > 1 or (address or "local") != "local"):
        raise UsageError("`engine` inline has no pools; leave out `placement`, `coalesce` and `address`")
    return pools


def _cost_note(ladder: Ladder, device: str) -> str:
    """A sentence for the user of a ladder whose levels were measured on another device; else ""."""
    if (measured := ladder.measured_on(device)) == device:
        return ""
    return (
        f"Evaluations are counted by the levels' costs on {measured}, as they were not measured on {device}; run "
        f"`mlem-dist ladder measure {ladder.source}` on such a machine, before the first dataset."
    )


def _on_ray(
    job: Job,
    ladder: Ladder,
    out: Location,
    todo: int,
    pools: Placement | None,
    coalesce: int,
    devices: int | None,
    address: str | None,
    remote: bool,
    notify: Notify,
) -> Engine:
    """The Ray engine, connected, with a placement for so many samples `todo`."""
    from mlem_dist.report.tables import placement_reason
    from mlem_dist.runtime import cluster
    from mlem_dist.runtime.arrangement import arrange
    from mlem_dist.runtime.run import run_ray

    if not remote:
        cluster.connect(address)
    arranged = arrange(replace(job, num=todo), ladder, pools, devices, remote)
    if arranged.forecasts:
        notify(placement_reason(arranged.forecasts, arranged.timed))
    if coalesce > 1 and len(arranged.layout.pools) == 1:
        notify(f"`coalesce` {coalesce} changes nothing here: one pool asks no other.")
    return lambda shards: run_ray(job, ladder, out, shards, arranged, coalesce)


def _inline(job: Job, ladder: Ladder, out: Location, devices: int | None) -> Engine:
    """The in-process engine, with a thread for each core, or for one GPU, which does one block after another."""
    from mlem_dist.engine.inline import run_inline

    most = 1 if job.device == "cuda" else available_cores()
    if devices and devices > most:
        raise UsageError(f"`devices` {devices}: `engine` inline has {most} here; lower it or leave it out")
    return lambda shards: run_inline(job, ladder, out, shards, devices or most)


def draw(
    ladder: str | Path | Ladder = "fashion",
    *,
    out: Path,
    seed: int = 0,
    nfe: float | None = None,
    solver: Solver = "ddim",
    steps: int = 250,
    probabilities: Rule | Literal["neyman"] | None = None,
    draw: Draw | None = None,
    increments: Increments | None = None,
    device: Device = "auto",
) -> tuple[Plan, float]:
    """Draw one plan and write it to a JSON file, for `plan` of `generate`.

    Returns:
        The plan, and its evaluations of the best level per image by the levels' costs on the device.

    Raises:
        UsageError: as `generate`, or the file is there already.
    """
    from mlem_dist.solver.plan import block_rng, write_plan
    from mlem_dist.tuning.recipes import make_recipe

    loaded = load_ladder(ladder)
    check_new(out)
    cost = loaded.cost(local_device(device))
    recipe = make_recipe(
        loaded, cost, solver, steps, DEFAULT_NFE if nfe is None else nfe, probabilities, draw, increments
    )
    plan = recipe.plan(block_rng(seed, 0))
    write_plan(out, plan, loaded.digest, solver)
    return plan, plan.nfe(cost)


def show(dataset: str | Location, *, out: Path | None = None) -> Location:
    """Write the contact sheet of a dataset, `preview.png` in its folder by default, and return its path.

    Raises:
        UsageError: there is no dataset or no finished shard of it, or the sheet cannot be written there.
    """
    from mlem_dist.report.sheet import save_contact_sheet

    if out is not None:
        if out.suffix.lower() != ".png":
            raise UsageError(f"`out` {out}: expected a name that ends in .png")
        check_new(out)
    return save_contact_sheet(parse_location(dataset) if isinstance(dataset, str) else dataset, out)


def verify(dataset: str | Location) -> tuple[list[Shard], list[str], bool]:
    """Compare every file of a dataset with the digest recorded when it was written.

    Returns:
        The shards that are recorded, a sentence for each problem, and whether the dataset is finished.

    Raises:
        UsageError: there is no dataset.
    """
    from mlem_dist.dataset.manifest import read_manifest, recorded_shards
    from mlem_dist.dataset.shards import damage, foreign

    place = parse_location(dataset) if isinstance(dataset, str) else dataset
    manifest = read_manifest(place)
    shards = recorded_shards(place, manifest)
    problems = damage(place, shards)
    if manifest.shards:
        problems += [
            f"{path} is no shard, and readers of {place}/data take it for rows" for path in foreign(place, shards)
        ]
    return shards, problems, bool(manifest.shards)


def measure(ladder: str | Path | Ladder) -> Ladder:
    """Measure the cost of each level on this machine, store it in the folder's ladder.json, and load the result.

    Raises:
        UsageError: the ladder cannot be used.
        OSError: its folder cannot be written.
    """
    from mlem_dist.ladder.measure import measure_costs

    loaded = load_ladder(ladder)
    loaded.check_models()
    return measure_costs(loaded)


def load_data(data: Path, ladder: Any, notify: Notify = _ignore) -> Images:
    """The image dataset in a folder for a ladder or the configuration of one; a note for what is not as it lies."""
    from mlem_dist.training.data import load_images

    images = load_images(data, ladder.sample_shape, ladder.labels)
    if images.resized:
        notify(f"{images.resized:,} images are larger than the samples: cropped and scaled down.")
    if images.skipped:
        notify(f"{images.skipped:,} files are no pictures: passed over.")
    return images


def train(
    *,
    data: Path,
    config: Path,
    out: Path,
    device: Device = "auto",
    address: str | None = None,
    notify: Notify = _ignore,
    progress: Callable[[TrainingProgress, int], None] = lambda levels, steps: None,
) -> tuple[Ladder, Path, bool]:
    """Train a ladder, its levels side by side on Ray; the same call again continues after a kill.

    Args:
        data: folder of an image dataset.
        config: YAML file, see the docs.
        out: the ladder's folder.
        device: "cpu", "cuda", or "auto" for GPUs if there are any.
        address: of a Ray head, as for `generate`.
        notify: takes sentences for the user.
        progress: takes the steps done and the loss of each level that has begun, and the steps of all levels.

    Returns:
        The ladder, a figure of the losses, and whether the ladder was finished already.

    Raises:
        UsageError: the data, the configuration or `out` cannot be used; nothing has been written then.
        DivergedError: a loss became NaN or infinite.
        RuntimeError: there is not enough memory, or the process of a level died.
    """
    from mlem_dist.extras import require
    from mlem_dist.report.figures import save_loss_curves
    from mlem_dist.runtime import cluster
    from mlem_dist.training.config import read_config
    from mlem_dist.training.resume import WORK, check_training
    from mlem_dist.training.tasks import train_on_ray
    from mlem_dist.training.train import LOG, read_log

    require("matplotlib", "figures")
    settings = read_config(config)
    remote = cluster.is_remote(address)
    if not remote:
        device_type = local_device(device)
    images = load_data(data, settings, notify)
    finished = check_training(settings, images, out)
    if not finished:
        cluster.connect(address)
        device_type = cluster.device_type(device) if remote else device_type
        cluster.count_devices(device_type, None)
        total = sum(level.steps for level in settings.levels)
        for levels in train_on_ray(settings, images, out, device_type):
            progress(levels, total)
    logs = {level.name: read_log(out / WORK / level.name / LOG) for level in settings.levels if level.kind == "unet"}
    return Ladder.load(out), save_loss_curves(out / WORK, logs), finished


def calibrate(
    ladder: str | Path | Ladder,
    *,
    data: Path,
    device: Device = "auto",
    out: Path | None = None,
    compiled: bool = False,
    notify: Notify = _ignore,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> tuple[Calibration, list[Path], bool]:
    """Measure a ladder on this device: time, error, increments and their effect, gamma, predicted speed-up.

    Args:
        ladder: a bundled name, a folder, or a ladder.
        data: folder of an image dataset.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        out: folder for calibration.json and figures; the ladder's by default.
        compiled: whether to time UNets by torch.compile as well.
        notify: takes sentences for the user.
        progress: takes a stage, how much of it is done, and how much there is.

    Returns:
        What was measured, the files written, and whether an earlier entry of this device was replaced.

    Raises:
        UsageError: the ladder or the data cannot be used.
    """
    from mlem_dist.extras import require
    from mlem_dist.ladder.calibration import device_key, stored
    from mlem_dist.report.figures import save_figures
    from mlem_dist.tuning.calibrate import calibrate, store

    require("matplotlib", "figures")
    loaded = load_ladder(ladder)
    device_type = local_device(device)
    folder = loaded.folder if out is None else out
    replaced = device_key(device_type) in stored(folder, loaded)
    loaded.check_models()
    images = load_data(data, loaded, notify)
    calibration = calibrate(loaded, images.test, images.test_label, device_type, progress, compiled=compiled)
    return calibration, [store(folder, loaded, calibration), *save_figures(folder, loaded, calibration)], replaced


def tune(
    ladder: str | Path | Ladder,
    *,
    out: Path,
    nfe: Sequence[float] = (5, 10, 20, 40),
    solver: Literal["ddim", "ddpm"] = "ddim",
    steps: int = 250,
    device: Device = "auto",
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> tuple[list[Row], list[Path]]:
    """Find plans for a ladder: try ways to spend each budget, and judge them on other noises; a rerun goes on.

    Args:
        ladder: a bundled name, a folder, or a ladder.
        out: folder for the plans, the frontier and its figure; `generate` uses the plans in a ladder's folder.
        nfe: budgets, in evaluations of the best level per image.
        solver: "ddim" or "ddpm".
        steps: base steps.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        progress: takes a stage, how much of it is done, and how much there is.

    Returns:
        What each way to spend a budget is worth, and the files written.

    Raises:
        UsageError: the ladder or `out` cannot be used, or a budget cannot be met.
    """
    from mlem_dist.extras import require
    from mlem_dist.report.figures import save_frontier
    from mlem_dist.tuning.tune import open_frontier
    from mlem_dist.tuning.tune import tune as search
    from mlem_dist.tuning.tuned_plans import plan_path

    require("matplotlib", "figures")
    loaded = load_ladder(ladder)
    loaded.check_models()
    device_type = local_device(device)
    frontier = open_frontier(loaded, solver, steps, device_type, out)
    threads = available_cores() if device_type == "cpu" else 1
    rows = list(search(loaded, device_type, tuple(nfe), frontier, threads, progress))
    figure = save_frontier(frontier, frontier.path.with_suffix(".png"))
    return rows, [*(plan_path(out, solver, budget) for budget in nfe), frontier.path, figure]


def capacity(
    ladder: str | Path | Ladder,
    *,
    num: int,
    pool_devices: str,
    cost: Sequence[str] = (),
    nfe: float | None = None,
    solver: Solver = "ddim",
    steps: int = 250,
    probabilities: Rule | Literal["neyman"] | None = None,
    draw: Draw | None = None,
    increments: Increments | None = None,
    block_size: int | None = None,
    shard_size: int = 2000,
    out: Path | None = None,
) -> tuple[list[Capacity], dict[str, float]]:
    """Simulate a cluster that makes a dataset: rate, hours, bottleneck, best placement.

    Args:
        ladder: a bundled name, a folder, or a ladder.
        num: images.
        pool_devices: devices by kind, KIND:COUNT or KIND:COUNT:GIB, such as "h100:64:80,l4:256:24".
        cost: a kind's ms per sample of each level, such as "h100=0.01,0.2,1"; measured costs by default.
        out: a PNG file for a figure of when each actor of a cell is at work.

    The other arguments are as for `generate`.

    Returns:
        Forecasts, the fastest first, and the images per second that one more device of each kind would bring.

    Raises:
        UsageError: an argument is out of range, or the ladder does not fit on the devices.
    """
    from mlem_dist.capacity.planner import marginal, plan_capacity, read_kinds
    from mlem_dist.engine.job import Workload, check_shards
    from mlem_dist.extras import require

    loaded = load_ladder(ladder)
    if out is not None:
        require("matplotlib", "figures")
        check_new(out)
    kinds = read_kinds(loaded, pool_devices, cost)
    chosen, _ = find_plan(
        loaded,
        kinds[0].costs.alone,
        solver=solver,
        steps=steps,
        nfe=nfe,
        probabilities=probabilities,
        draw=draw,
        increments=increments,
    )
    size = BLOCK_SIZE[kinds[0].devices.type] if block_size is None else block_size
    workload = Workload(num, chosen, 0, size, shard_size)
    check_shards(workload)
    forecasts = plan_capacity(workload, loaded.weight_bytes, kinds)
    gains = marginal(workload, forecasts[0])
    if out is not None:
        from mlem_dist.report.figures import save_timeline

        save_timeline(forecasts[0], out)
    return forecasts, gains


def check_new(out: Path) -> None:
    """Refuse a file to write that is there, or in a folder that cannot be written.

    Raises:
        UsageError: it is, with the way out.
    """
    check_writable(out.parent)
    try:
        exists = out.exists() or out.is_symlink()
    except OSError as error:
        raise UsageError(f"`out` {out} cannot be written: {error.strerror}; choose another name") from None
    if exists:
        raise UsageError(f"`out` {out} exists; choose another name")
