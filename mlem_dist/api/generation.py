"""Generation of images and datasets from a ladder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mlem_dist.api.arguments import (
    DEFAULT_NFE,
    Device,
    Notify,
    Precision,
    Solver,
    check_guidance,
    check_labels,
    check_new,
    check_precision,
    find_plan,
    find_prompts,
    ignore,
    load_ladder,
    local_device,
)
from mlem_dist.dataset.keep import Condition
from mlem_dist.dataset.manifest import read_manifest
from mlem_dist.dataset.prompts import NEGATIVE_PROMPT, PROMPT, SEEDS, PromptTable
from mlem_dist.dataset.schema import SCALE
from mlem_dist.dataset.shards import WORK, Encoding
from mlem_dist.engine.completion import Engine, complete, open_dataset
from mlem_dist.engine.job import Job
from mlem_dist.engine.progress import GenerationReport, Progress
from mlem_dist.engine.scores import NSFW
from mlem_dist.errors import UsageError
from mlem_dist.files import check_writable
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.schema import OPERATIONS
from mlem_dist.ladder.sizes import default_block, default_shard, memory_note
from mlem_dist.machine import available_cores
from mlem_dist.models.devices import device_memory
from mlem_dist.solver.plan import Draw, Increments, Plan
from mlem_dist.solver.probabilities import Rule
from mlem_dist.solver.steps import Spacing, canonical_solver
from mlem_dist.store import Location, parse_location, remove_folder

if TYPE_CHECKING:
    from mlem_dist.capacity.placement import Placement
    from mlem_dist.capacity.planner import Forecast


PREVIEWED = 4
"""Number of images of a preview."""


def sample(
    ladder: str | Path | Ladder = "fashion",
    *,
    num: int | None = None,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    negative_prompts: str | Sequence[str | None] | None = None,
    guidance: float | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    nfe: float | None = None,
    solver: Solver = "ode",
    steps: int | None = None,
    plan: Plan | str | Path | None = None,
    grid: Spacing = "trailing",
    precision: Precision | None = None,
    device: Device = "auto",
) -> np.ndarray:
    """Generate images in this process.

    Up to rounding, an image depends on its class, its image seed and the plan only. Image i has the image seed
    `seed` + i. A dataset that is generated with the same arguments begins with the same images, up to rounding.

    Args:
        ladder: a bundled name, a folder, or a ladder.
        num: number of images.
        labels: classes to generate, in turn; all by default.
        prompts: a prompt for each image, for a ladder that is conditioned on prompts; `num` is then their number.
        negative_prompts: the negative prompt of all images, or of each; None for none.
        guidance: scale of guidance, for a ladder whose best level is guided; by default the ladder's.
        seed: image seed of the first image, in [0, 2^32).
        seeds: image seeds of all images, instead of `num` and `seed`.
        nfe: budget per image, in evaluations of the best level; 10 by default.
        solver: "ode" for DDIM or Euler's method, "dpm++" for DPM-Solver++(2M), "sde" for DDPM; "ddim" and "ddpm" are
            aliases of "ode" and "sde".
        steps: number of base steps; by default that of the plan, else 250.
        plan: a plan or its file, instead of a budget.
        grid: timesteps: "trailing" for the ends of equal intervals, or "model" for those of the pipeline, by the
            spacing and offset of its scheduler's configuration.
        precision: dtype in which networks compute; by default each in its own, which is float32 in trained ladders.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.

    Returns:
        The images, uint8 (num, H, W, C), C = 1 or 3.

    Raises:
        UsageError: if an argument is out of range, or the ladder cannot be used.
        NonFiniteError: if a block ends with NaN or infinite values.
    """
    from mlem_dist.engine.inline import sample_blocks

    if isinstance(prompts, str):
        raise UsageError(f"`prompts` is {prompts!r}, expected a list with a prompt for each image")
    loaded = load_ladder(ladder)
    if num is None and seeds is None and (prompts is not None or loaded.encoder):
        table, _ = find_prompts(prompts, loaded)
        num = table.rows if table else None
    num, image_seed = _check_seeds(num, seed, seeds)
    request = _prepare(
        loaded,
        out=Path(),
        num=num,
        labels=labels,
        prompts=prompts,
        negative_prompts=negative_prompts,
        guidance=guidance,
        seed=seed,
        solver=solver,
        steps=steps,
        grid=grid,
        precision=precision,
        device=device,
        engine="inline",
        nfe=nfe,
        plan=plan,
    )
    block_size = min(num, request.job.block_size)
    job = replace(request.job, block_size=block_size, shard_size=block_size)
    request.ladder.check_models()
    return np.concatenate(list(sample_blocks(job, request.ladder, image_seed)))[:num]


def _check_seeds(num: int | None, seed: int, seeds: Sequence[int] | None) -> tuple[int, Callable[[int], int] | None]:
    """The number of images and, if `seeds` are given, a function from sample id to image seed.

    Raises:
        UsageError: if the arguments are missing or contradict each other, or a seed is out of range.
    """
    if seeds is None:
        if num is None:
            raise UsageError("`num` is missing: expected `num`, or `seeds` with a seed for each image")
        return num, None
    if num not in (None, len(seeds)) or seed:
        raise UsageError("`seeds` and `num` or `seed` exclude each other: `seeds` has a seed for each image")
    if not len(seeds):
        raise UsageError("`seeds` is empty, expected a seed for each image")
    if bad := [value for value in seeds if not 0 <= value < SEEDS]:
        raise UsageError(f"`seeds`: {bad[0]} is out of range, expected 0 to {SEEDS - 1}")
    return len(seeds), lambda sample_id: int(seeds[sample_id % len(seeds)])


def generate(
    ladder: str | Path | Ladder = "fashion",
    *,
    num: int | None = None,
    out: str | Location,
    labels: Sequence[int] | None = None,
    prompts: str | Location | Sequence[str] | None = None,
    prompt_column: str = PROMPT,
    images_per_prompt: int = 1,
    negative_prompts: str | Sequence[str | None] | None = None,
    guidance: float | None = None,
    seed: int = 0,
    nfe: float | None = None,
    solver: Solver = "ode",
    steps: int | None = None,
    probabilities: Rule | Literal["neyman"] | None = None,
    draw: Draw | None = None,
    increments: Increments | None = None,
    plan: Plan | str | Path | None = None,
    grid: Spacing = "trailing",
    precision: Precision | None = None,
    image_format: str = "png",
    image_quality: int | None = None,
    scores: Sequence[str] = (),
    keep: str | None = None,
    until: int | None = None,
    block_size: int | None = None,
    shard_size: int | None = None,
    placement: str = "auto",
    coalesce: int = 1,
    devices: int | None = None,
    device: Device = "auto",
    address: str | None = None,
    engine: Literal["ray", "inline"] = "ray",
    notify: Notify = ignore,
    progress: Callable[[Progress], None] = ignore,
) -> GenerationReport:
    """Generate a Parquet dataset. The same call again generates missing shards only and rewrites no file.

    Args:
        ladder: a bundled name, a folder, or a ladder.
        num: number of images in the whole dataset; by default `images_per_prompt` for each prompt.
        out: the dataset's folder, or its URL in an object store.
        labels: classes to generate, in turn; all by default.
        prompts: prompts, or a file of them as for `open_prompts`, for a ladder that is conditioned on prompts. Images
            are in their order. A file's columns `negative_prompt`, `seed` and `guidance_scale` are used if there are
            any; all other columns are carried into the dataset.
        prompt_column: name of the file's column of prompts.
        images_per_prompt: number of images of each prompt; those of a row with a seed have that seed, the next, ...
        negative_prompts: the negative prompt of all images, or of each of a list of prompts; None for none.
        guidance: scale of guidance of all images whose row has none; by default the ladder's.
        seed: image seed of sample 0, and seed of drawn plans; sample i has the image seed `seed` + i, below 2^32.
        nfe: budget per image, in evaluations of the best level; 10 by default.
        solver: "ode" for DDIM or Euler's method, "dpm++" for DPM-Solver++(2M), "sde" for DDPM; "ddim" and "ddpm" are
            aliases of "ode" and "sde".
        steps: number of base steps; by default that of the plan, else 250.
        probabilities: distribution of the budget over levels and steps; by default "neyman" for a calibrated ladder,
            else "theory" for the SDE and impulses. The ODE of a ladder that is not calibrated, or has no Gaussian first
            level, calls the best level only, evenly, above the Gaussian if there is one and the best has no guidance.
        draw: choice of the steps at which a plan evaluates each level. "quantiles", the default, is one plan for all
            images; "systematic" and "independent" draw a plan for each block. Increments of type "impulse" need one of
            the latter, by default "systematic".
        increments: how an increment enters the steps; "held" for "sde" and "extrapolated" for others by default.
        plan: a plan or its file, instead of a budget.
        grid: timesteps, as for `sample`.
        precision: dtype in which networks compute; by default each in its own, which is float32 in trained ladders.
        image_format: format of the image files: "png", "jpeg" or "webp".
        image_quality: quality of jpeg or webp, 1 to 100; 95 by default.
        scores: classes that score images, each by MODULE:CLASS, as Ray Data's `map_batches` takes them: made once per
            actor and called with a dict of columns, they return a dict of new ones, which are written beside the image.
        keep: condition on columns, such as "score > 0.5"; other rows are left out. Sample ids stay those of all images.
        until: number of rows to keep: images are made in order until so many are kept, `num` at most.
        block_size: number of samples that advance together; by default that of the dataset that an earlier run has
            begun, else 100 on CPUs and 500 on GPUs, and fewer of large samples or where a device has little memory.
        shard_size: number of samples in a Parquet file, a multiple of the block size; by default as for blocks, else
            2,000, and fewer of large images.
        placement: assignment of levels to pools: "together", "pools", groups such as "1-3,4", or "auto" for the
            placement with the fastest forecast.
        coalesce: number of blocks that a pool other than the first may evaluate together.
        devices: number of CPU cores or GPUs to use; all by default.
        device: "cpu", "cuda", or "auto" for GPUs if there are any.
        address: address of a Ray head. By default, the cluster in which this process runs, else a new local cluster.
        engine: "ray", or "inline" for this process alone.
        notify: receives sentences for the user.
        progress: receives snapshots of the run's progress.

    Returns:
        A report of the generated samples and their rate.

    Raises:
        UsageError: if an argument is out of range, or `out` holds something else. Nothing is written in this case.
        RuntimeError: if Ray does not start, its actors die faster than they work, or another run writes to `out`.
        NonFiniteError: if a block ends with NaN or infinite values.
        ScoreError: if a score class raises, or returns what cannot be written. Finished shards are kept.
    """
    given = {name: value for name, value in locals().items() if name not in ("notify", "progress")}
    started = time.monotonic()
    request = _prepare(**_with_begun_sizes(**given))
    job, loaded, place = request.job, request.ladder, request.out
    dataset = open_dataset(job, loaded, place)
    todo = sum(len(job.shard_rows(shard)) for shard in dataset.missing)
    last: Progress | None = None
    if todo or not dataset.manifest.shards:
        for sentence in (*request.notes, *dataset.notes):
            notify(sentence)
        if todo:
            loaded.check_models()
        if todo and job.prompts:
            # The digest of its rows is that of the job, wherever they are.
            job = replace(job, prompts=job.prompts.published(place.absolute() / WORK))
        if engine == "ray" and todo:
            make = _on_ray(replace(request, job=job), todo, notify)
        else:
            make = _inline(job, loaded, place, devices if engine == "inline" else None, todo)
        names = [level.name for level in loaded.levels]
        for snapshot in complete(dataset, loaded, make):
            last = replace(snapshot, total=todo, levels=names)
            progress(last)
    else:
        # A run that was stopped at its very end has left it.
        remove_folder(place / WORK)
    if engine == "ray":
        _cluster().disconnect()
    shards = read_manifest(place).shards
    kept = sum(shard.rows for shard in shards)
    if job.until and kept < job.until:
        notify(f"Only {kept:,} of the {job.num:,} images are kept, fewer than the {job.until:,} of `until`.")
    report = GenerationReport.of(last, str(place), job.num, seed, len(shards), time.monotonic() - started, job.device)
    return replace(report, kept=kept)


@dataclass(frozen=True, eq=False)
class Preview:
    """A picture of a dataset's first images, and a forecast of its size and time.

    Attributes:
        picture: path of a PNG of the first images, with their prompts.
        num, shards: number of images and of files.
        image_bytes: mean size of an image file.
        devices: number of CPU cores or GPUs.
        device: "cpu" or "cuda".
        images_per_second: forecast rate.
        seconds: forecast time, without loading.
        hours: device hours by level and stage, by name.
    """

    picture: Path
    num: int
    shards: int
    image_bytes: float
    devices: int
    device: str
    images_per_second: float
    seconds: float
    hours: dict[str, float]


def preview(
    ladder: str | Path | Ladder = "fashion",
    *,
    picture: Path = Path("dry-run.png"),
    notify: Notify = ignore,
    **arguments: Any,
) -> Preview:
    """Make the first images of a dataset and forecast what the whole takes, without touching its folder.

    Args:
        ladder: as for `generate`.
        picture: path of a PNG file to write.
        notify: receives sentences for the user.
        arguments: as for `generate`.

    Raises:
        UsageError, NonFiniteError: as for `generate`, or if `picture` cannot be written.
    """
    from mlem_dist.engine.inline import sample_blocks
    from mlem_dist.report.sheet import save_row

    check_writable(picture.parent)
    request = _prepare(ladder, **_with_begun_sizes(**arguments))
    job, loaded = request.job, request.ladder
    open_dataset(job, loaded, request.out)
    for sentence in request.notes:
        notify(sentence)
    if job.until:
        notify(f"Figures are for all {job.num:,} images; a run ends when {job.until:,} of them are kept.")
    loaded.check_models()
    forecast = _forecast(request)
    if request.engine == "ray":
        _cluster().disconnect()
    number = min(PREVIEWED, job.num)
    size = min(number, job.block_size)
    few = replace(job, num=number, until=None, block_size=size, shard_size=size, device=local_device("auto"))
    images = np.concatenate(list(sample_blocks(few, loaded)))[:number]
    texts = few.rows(range(number))
    captions = texts.get(PROMPT) or [loaded.labels[label] for label in texts.get("label", ())]
    save_row(images, captions, picture)
    costs = forecast.layout.kinds[0].costs
    by_level = zip((level.name for level in loaded.levels), forecast.level_seconds.tolist(), strict=True)
    return Preview(
        picture,
        job.num,
        job.shards,
        float(np.mean([*map(len, job.encoding.files(images))])),
        forecast.layout.devices,
        job.device,
        forecast.images_per_second,
        forecast.seconds,
        {name: seconds * job.num / 3600 for name, seconds in (*by_level, *costs.stages.items()) if seconds},
    )


@dataclass(frozen=True, eq=False)
class _Request:
    """The checked arguments of `generate`."""

    job: Job
    ladder: Ladder
    out: Location
    pools: Placement | None
    coalesce: int
    devices: int | None
    address: str | None
    engine: str
    remote: bool
    notes: list[str]


def _cluster() -> Any:
    """The module of the Ray cluster, imported where it is needed."""
    from mlem_dist.runtime import cluster

    return cluster


def _prepare(
    ladder: str | Path | Ladder = "fashion",
    *,
    out: str | Location,
    num: int | None = None,
    labels: Sequence[int] | None = None,
    prompts: str | Location | Sequence[str] | None = None,
    prompt_column: str = PROMPT,
    images_per_prompt: int = 1,
    negative_prompts: str | Sequence[str | None] | None = None,
    guidance: float | None = None,
    seed: int = 0,
    solver: Solver = "ode",
    steps: int | None = None,
    grid: Spacing = "trailing",
    precision: Precision | None = None,
    image_format: str = "png",
    image_quality: int | None = None,
    scores: Sequence[str] = (),
    keep: str | None = None,
    until: int | None = None,
    block_size: int | None = None,
    shard_size: int | None = None,
    placement: str = "auto",
    coalesce: int = 1,
    devices: int | None = None,
    device: Device = "auto",
    address: str | None = None,
    engine: str = "ray",
    **budget: Any,
) -> _Request:
    """The request of arguments as for `generate`; `budget` are those that decide the plan."""
    method = canonical_solver(solver)
    loaded = load_ladder(ladder)
    place = parse_location(out) if isinstance(out, str) else out
    classes = check_labels(labels, loaded)
    table, negative_prompt = find_prompts(prompts, loaded, negative_prompts, prompt_column, images_per_prompt, place)
    if num is None:
        if not table:
            raise UsageError("`num` is missing: expected the number of images")
        num = table.rows * table.images
    pools = _check_engine(loaded, placement, coalesce, devices, address, engine)
    remote = engine == "ray" and _cluster().is_remote(address)
    if remote:
        _cluster().connect(address)
    device_type = _cluster().device_type(device) if remote else local_device(device)
    chosen, note = find_plan(loaded, loaded.costs(device_type), solver=method, steps=steps, grid=grid, **budget)
    notes = [note, _cost_note(loaded, device_type)]
    if block_size is None:
        memory = _memory(device_type, remote)
        block_size = default_block(loaded, device_type, memory)
        notes.append(memory_note(loaded, device_type, memory))
    job = Job(
        ladder=loaded.source,
        digest=loaded.digest,
        num=num,
        labels=classes,
        solver=method,
        steps=chosen.steps,
        plan=chosen,
        seed=seed,
        block_size=block_size,
        shard_size=default_shard(loaded, block_size) if shard_size is None else shard_size,
        device=device_type,
        precision=check_precision(precision, loaded),
        grid=grid,
        prompts=table,
        negative_prompt=negative_prompt,
        guidance=check_guidance(guidance, loaded, table),
        encoding=Encoding(image_format, image_quality),
        scores=_all_scores(scores, loaded, table),
        keep=None if keep is None else Condition(keep),
        until=until,
        scores_folder=str(Path.cwd()),
    )
    if job.keep and not job.scores:
        job.keep.check(job.schema())
    if negative_prompt is not None and not loaded.levels[-1].guidance.directed:
        raise UsageError(f"`negative_prompts`: {_no_direction(loaded)}; leave them out")
    notes += [_guidance_note(job, loaded), _negative_note(job, loaded)]
    given = place, pools, coalesce, devices, address, engine, remote
    return _Request(job, loaded, *given, [sentence for sentence in notes if sentence])


def _all_scores(scores: Sequence[str], ladder: Ladder, table: PromptTable | None) -> tuple[str, ...]:
    """The given scores, and that of the ladder's safety checker."""
    if ladder.checker is None:
        return tuple(scores)
    if table and table.has(NSFW):
        raise UsageError(
            f"`prompts` has a column {NSFW!r}, which is the name of the safety checker's score; give it another name"
        )
    return (*(name for name in scores if name != NSFW), NSFW)


def _with_begun_sizes(
    *, out: str | Location, block_size: int | None = None, shard_size: int | None = None, **others: Any
) -> dict[str, Any]:
    """The arguments of `generate`, with sizes of blocks and shards of a dataset that an earlier run has begun.

    Sizes that are given remain. Those of a dataset stay the same on machines whose memory would lead to others.
    """
    try:
        config = read_manifest(parse_location(out) if isinstance(out, str) else out).config
    # There is no dataset yet, or `open_dataset` says what is wrong with it.
    except UsageError:
        config = {}
    if block_size in (None, config.get("block_size")):
        block_size = config.get("block_size")
        shard_size = config.get("shard_size") if shard_size is None else shard_size
    return {"out": out, "block_size": block_size, "shard_size": shard_size, **others}


def _memory(device: str, remote: bool) -> float:
    """Bytes of memory of the smallest device of a type, as of `least_memory`, or of one of this machine.

    The latter holds for a Ray that this process starts, and for GPUs of nodes that cannot be asked.
    """
    if remote:
        from mlem_dist.runtime.arrangement import least_memory

        with suppress(UsageError):
            return least_memory(device, remote)
    return device_memory(device)


def _guidance_note(job: Job, ladder: Ladder) -> str:
    """A sentence for the user if a plan was fitted for another guidance; else ""."""
    own = ladder.levels[-1].guidance.scale
    varied = job.prompts is not None and job.prompts.has(SCALE)
    if not isinstance(job.plan, Plan) or job.guidance is None or (job.guidance == own and not varied):
        return ""
    return f"The plan was made for guidance {own:g}; with other scales it errs more."


def _negative_note(job: Job, ladder: Ladder) -> str:
    """A sentence for the user if a column of negative prompts decides nothing; else ""."""
    if ladder.levels[-1].guidance.directed or not job.prompts or not job.prompts.has(NEGATIVE_PROMPT):
        return ""
    return f"Negative prompts decide nothing: {_no_direction(ladder)}."


def _no_direction(ladder: Ladder) -> str:
    """Why negative prompts do not change the images of a ladder, for a message."""
    takes = "takes the scale of guidance as an input" if ladder.levels[-1].guidance.embedded else "has no guidance"
    return f"the best level of ladder {ladder.name!r} {takes}"


def _forecast(request: _Request) -> Forecast:
    """The forecast of a request on its devices."""
    from mlem_dist.capacity.placement import Devices
    from mlem_dist.capacity.planner import forecast, with_stages

    job, ladder = request.job, request.ladder
    if request.engine == "ray":
        from mlem_dist.runtime.arrangement import arrange

        if not request.remote:
            _cluster().connect(request.address)
        arranged = arrange(job, ladder, request.pools, request.devices, request.remote)
        return arranged.forecasts[0] if arranged.forecasts else forecast(job.workload, arranged.layout)
    from mlem_dist.capacity.planner import cluster_kind
    from mlem_dist.engine.scores import time_scores

    count = _inline_devices(job, request.devices)
    score = time_scores(job, ladder.image_shape)[0] if job.scores else 0.0
    kind = cluster_kind(Devices(job.device, count), ladder, ladder.cost(job.device), score=score)
    return forecast(job.workload, with_stages([range(1, len(ladder.levels) + 1)], [kind]))


def _check_engine(
    ladder: Ladder, placement: str, coalesce: int, devices: int | None, address: str | None, engine: str
) -> Placement | None:
    """The requested placement, None for the fastest, after a check of the combination of arguments.

    Raises:
        UsageError: if the arguments contradict each other.
    """
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
    """A sentence for the user if the costs of levels come from another device; else ""."""
    if (measured := ladder.measured_on(device)) == device:
        return ""
    if measured == OPERATIONS:
        return (
            "Evaluations are counted by the levels' operations, as costs were not measured; run `mlem-dist ladder "
            f"measure {ladder.source}` on a machine like those of the cluster, before the first dataset."
        )
    return (
        f"Evaluations are counted by the levels' costs on {measured}, as they were not measured on {device}; run "
        f"`mlem-dist ladder measure {ladder.source}` on such a machine, before the first dataset."
    )


def _on_ray(request: _Request, todo: int, notify: Notify) -> Engine:
    """The Ray engine, connected to a cluster, with a placement for `todo` samples."""
    from mlem_dist.report.tables import placement_reason
    from mlem_dist.runtime.arrangement import arrange
    from mlem_dist.runtime.run import run_ray

    job, ladder, coalesce = request.job, request.ladder, request.coalesce
    if not request.remote:
        _cluster().connect(request.address)
    arranged = arrange(replace(job, num=todo, until=None), ladder, request.pools, request.devices, request.remote)
    if arranged.forecasts:
        notify(placement_reason(arranged.forecasts, arranged.timed))
    if coalesce > 1 and len(arranged.layout.level_pools) == 1:
        notify(f"`coalesce` {coalesce} changes nothing here: one pool asks no other.")
    job = replace(job, score_types=arranged.score_types)
    return lambda shards: run_ray(job, ladder, request.out, shards, arranged, coalesce)


def _inline(job: Job, ladder: Ladder, out: Location, devices: int | None, todo: int) -> Engine:
    """The in-process engine for `todo` samples, with a thread for each CPU core, or one thread for a GPU.

    Raises:
        UsageError: if there are fewer than `devices`.
        UsageError, ScoreError: if images cannot be scored.
    """
    from mlem_dist.engine.inline import run_inline
    from mlem_dist.engine.scores import Scorer, time_scores

    count, scorer = _inline_devices(job, devices), None
    if job.scores and todo:
        # By another instance, as some remember what they have seen.
        job = replace(job, score_types=time_scores(job, ladder.image_shape)[1])
        scorer = Scorer(job)
    return lambda shards: run_inline(job, ladder, out, shards, count, scorer)


def _inline_devices(job: Job, devices: int | None) -> int:
    """Number of CPU cores, or of GPUs, that the in-process engine uses.

    Raises:
        UsageError: if there are fewer than `devices`.
    """
    limit = 1 if job.device == "cuda" else available_cores()
    if devices and devices > limit:
        raise UsageError(f"`devices` {devices}: `engine` inline has {limit} here; lower it or leave it out")
    return devices or limit


def draw(
    ladder: str | Path | Ladder = "fashion",
    *,
    out: Path,
    seed: int = 0,
    nfe: float | None = None,
    solver: Solver = "ode",
    steps: int | None = None,
    probabilities: Rule | Literal["neyman"] | None = None,
    draw: Draw | None = None,
    increments: Increments | None = None,
    grid: Spacing = "trailing",
    device: Device = "auto",
) -> tuple[Plan, float]:
    """Draw one plan and write it to a JSON file, for the argument `plan` of `generate`.

    Args:
        out: path of the JSON file.
        device: device type whose level costs the budget counts.

    The other arguments are as for `generate`.

    Returns:
        The plan, and its cost per image in evaluations of the best level, by the levels' costs on the device.

    Raises:
        UsageError: as for `generate`, or if the file exists.
    """
    from mlem_dist.solver.plan import block_rng, write_plan
    from mlem_dist.tuning.recipes import make_recipe
    from mlem_dist.tuning.tuned_plans import DEFAULT_STEPS

    method = canonical_solver(solver)
    loaded = load_ladder(ladder)
    check_new(out)
    cost = loaded.costs(local_device(device))
    budget = DEFAULT_NFE if nfe is None else nfe
    recipe = make_recipe(loaded, cost, method, steps or DEFAULT_STEPS, budget, probabilities, draw, increments, grid)
    plan = recipe.plan(block_rng(seed, 0))
    write_plan(out, plan, loaded.digest, method)
    return plan, plan.nfe(cost)
