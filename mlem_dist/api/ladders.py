"""Functions that train, measure, calibrate and tune ladders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from mlem_dist.api.arguments import Device, Notify, find_prompts, ignore, load_ladder, local_device
from mlem_dist.dataset.prompts import PROMPT
from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.machine import available_cores
from mlem_dist.solver.steps import canonical_solver

if TYPE_CHECKING:
    from mlem_dist.runtime.device_task import Report
    from mlem_dist.training.tasks import TrainingProgress
    from mlem_dist.tuning.calibrate import Calibration
    from mlem_dist.tuning.frontier import Row


T = TypeVar("T")


def measure(ladder: str | Path | Ladder) -> Ladder:
    """Measure the cost of each level on this machine, store it in the ladder's ladder.json, and return the new ladder.

    Raises:
        UsageError: if the ladder cannot be used.
        OSError: if the ladder's folder is not writable.
    """
    from mlem_dist.ladder.measure import measure_costs

    loaded = load_ladder(ladder)
    loaded.check_models()
    return measure_costs(loaded)


def train(
    *,
    data: Path,
    config: Path,
    out: Path,
    device: Device = "auto",
    address: str | None = None,
    notify: Notify = ignore,
    progress: Callable[[TrainingProgress, int], None] = lambda levels, steps: None,
) -> tuple[Ladder, Path, bool]:
    """Train the levels of a ladder in parallel on Ray. The same call again resumes a killed training.

    Args:
        data: folder of an image dataset.
        config: path of the YAML configuration, which the documentation describes.
        out: the ladder's folder.
        device: "cpu", "cuda", or "auto" for GPUs if there are any.
        address: address of a Ray head, as for `generate`.
        notify: receives sentences for the user.
        progress: receives the finished steps and the loss of each level that has begun, and the total number of steps
            of all levels.

    Returns:
        The ladder, the path of a figure of the losses, and whether the ladder was already finished before this call.

    Raises:
        UsageError: if the data, the configuration or `out` cannot be used. Nothing is written in this case, but for
            latents of images before one that cannot be used.
        DivergedError: if a loss becomes NaN or infinite.
        RuntimeError: if memory does not suffice, or the process of a level dies.
    """
    from mlem_dist.extras import require
    from mlem_dist.report.figures import save_loss_curves
    from mlem_dist.runtime import cluster
    from mlem_dist.training.config import read_config
    from mlem_dist.training.data import training_images
    from mlem_dist.training.resume import WORK, check_place, check_training
    from mlem_dist.training.tasks import train_on_ray
    from mlem_dist.training.train import LOG, read_log

    require("matplotlib", "figures")
    settings = read_config(config)
    remote = cluster.is_remote(address)
    if not remote:
        device_type = local_device(device)
    check_place(out)
    images = training_images(settings, data, out / WORK)
    for sentence in images.notes():
        notify(sentence)
    finished = check_training(settings, images, out)
    if not finished:
        cluster.connect(address)
        device_type = cluster.device_type(device) if remote else device_type
        cluster.count_devices(device_type, None)
        total = sum(level.steps for level in settings.levels)
        for levels in train_on_ray(settings, images, out, device_type):
            progress(levels, total)
    logs = {level.name: read_log(out / WORK / level.name / LOG) for level in settings.levels if level.network}
    return Ladder.load(out), save_loss_curves(out / WORK, logs), finished


def calibrate(
    ladder: str | Path | Ladder,
    *,
    data: Path | None = None,
    prompts: str | Path | Sequence[str] | None = None,
    prompt_column: str = PROMPT,
    device: Device = "auto",
    address: str | None = None,
    out: Path | None = None,
    compiled: bool = False,
    notify: Notify = ignore,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> tuple[Calibration, list[Path], bool]:
    """Measure a ladder on a device: times, errors, increments and their effects, gamma, and predicted speed-up.

    Args:
        ladder: a bundled name, a folder, or a ladder.
        data: folder of an image dataset; without it, denoising errors and gamma by them are left out. For a ladder that
            is conditioned on prompts, it has captions in a column `prompt`.
        prompts: prompts like those of the images to be generated, some dozens, or a file of them as for `generate`;
            for a ladder that is conditioned on prompts.
        prompt_column: name of the file's column of prompts.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        address: address of a Ray head, as for `generate`; the work is then done on one device of that cluster, which
            must share the folders of the ladder and of `out`. By default it is done in this process.
        out: folder for calibration.json and figures; the ladder's folder by default.
        compiled: whether to time UNets with torch.compile as well.
        notify: receives sentences for the user.
        progress: receives the name of a stage, its finished units of work, and their total.

    Returns:
        The measurements, the paths of written files, and whether they replaced an existing entry of this device.

    Raises:
        UsageError: if the ladder or the data cannot be used.
    """
    from mlem_dist.extras import require
    from mlem_dist.ladder.calibration import stored
    from mlem_dist.ladder.images import CAPTIONS, has_captions, load_images
    from mlem_dist.report.figures import save_figures
    from mlem_dist.tuning.calibrate import HeldOut, calibrate, store

    require("matplotlib", "figures")
    loaded = _with_prompts(load_ladder(ladder), prompts, prompt_column)
    captions = CAPTIONS if loaded.encoder else ""
    if data is not None and captions and not has_captions(data, captions):
        raise UsageError(
            f"`data` {data}: expected Parquet files with a column {captions!r}, because this ladder is conditioned on "
            "prompts; leave it out to measure without images"
        )
    folder = (loaded.folder if out is None else out).absolute()
    known = stored(folder, loaded)
    loaded.check_models()
    with _Place(address, device) as place:
        images = None if data is None else load_images(data, loaded.image_shape, loaded.labels, captions)
        for sentence in images.notes() if images else ():
            notify(sentence)
        measured = place.run(
            lambda report: calibrate(
                loaded,
                place.device,
                report,
                held_out=None if images is None else HeldOut.of(images, loaded),
                compiled=compiled,
            ),
            progress,
        )
    written = [store(folder, loaded, measured), *save_figures(folder, loaded, measured)]
    return measured, written, measured.device in known


def tune(
    ladder: str | Path | Ladder,
    *,
    out: Path,
    nfe: Sequence[float] = (5, 10, 20, 40),
    solver: Literal["ode", "sde", "ddim", "ddpm"] = "ode",
    steps: int | None = None,
    prompts: str | Path | Sequence[str] | None = None,
    prompt_column: str = PROMPT,
    minutes: float | None = None,
    device: Device = "auto",
    address: str | None = None,
    notify: Notify = ignore,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> tuple[list[Row], list[Path]]:
    """Find the best plan of a ladder for each budget: try candidates, and judge them on other noises.

    The same call again resumes an interrupted search.

    Args:
        ladder: a bundled name, a folder, or a ladder.
        out: folder for the plans, the frontier and its figure; `generate` uses plans in the ladder's folder.
        nfe: budgets, in evaluations of the best level per image.
        solver: "ode" or "sde", or their aliases "ddim" and "ddpm".
        steps: number of base steps, and of the steps of the best level that plans are judged by; by default the least
            number of which twice as many hardly change the images, by measurement.
        prompts: prompts like those of the images to be generated, a few hundred, or a file of them as for `generate`;
            for a ladder that is conditioned on prompts.
        prompt_column: name of the file's column of prompts.
        minutes: about the largest time to take: fewer samples are fitted to, if it is short.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        address: address of a Ray head, as for `calibrate`.
        notify: receives sentences for the user.
        progress: receives the name of a stage, its finished units of work, and their total.

    Returns:
        A row of the frontier for each candidate, and the paths of the written files.

    Raises:
        UsageError: if the ladder or `out` cannot be used, or a budget or `minutes` cannot be met.
    """
    from mlem_dist.extras import require
    from mlem_dist.report.figures import save_frontier
    from mlem_dist.report.tables import tuning_price
    from mlem_dist.tuning.frontier import stored_steps
    from mlem_dist.tuning.price import STEPS, reference_steps
    from mlem_dist.tuning.tune import affordable_samples, check_budgets, frontier_path, open_frontier
    from mlem_dist.tuning.tune import tune as search
    from mlem_dist.tuning.tuned_plans import plan_path

    require("matplotlib", "figures")
    method = canonical_solver(solver)
    if method == "dpm++":
        raise UsageError("`solver` dpm++: `tune` finds plans for ode and sde; choose one of them")
    if minutes is not None and not minutes > 0:
        raise UsageError(f"`minutes` {minutes:g}: expected a positive number")
    loaded, folder, budgets = _with_prompts(load_ladder(ladder), prompts, prompt_column), out.absolute(), tuple(nfe)
    loaded.check_models()
    with _Place(address, device) as place:
        check_budgets(loaded, method, place.device, budgets)
        if steps is None:
            # Refused before the steps are measured, if it is too little for the fewest.
            affordable_samples(loaded, method, place.device, STEPS[0], budgets, minutes, place.threads)
            steps = stored_steps(frontier_path(folder, method)) or place.run(
                lambda report: reference_steps(loaded, method, place.device, report), progress
            )
            notify(f"Plans have {steps} `steps`, and are judged by {loaded.levels[-1].name} at each of them.")
        samples, seconds = affordable_samples(loaded, method, place.device, steps, budgets, minutes, place.threads)
        notify(tuning_price(seconds, float(loaded.cost(place.device)[-1]) / place.threads, max(budgets)))
        frontier = open_frontier(loaded, method, steps, place.device, folder)
        rows, frontier = place.run(
            lambda report: (
                list(search(loaded, place.device, budgets, frontier, place.threads, report, samples)),
                frontier,
            ),
            progress,
        )
    figure = save_frontier(frontier, frontier.path.with_suffix(".png"))
    return rows, [*(plan_path(out, method, budget) for budget in nfe), frontier.path, figure]


def _with_prompts(ladder: Ladder, prompts: str | Path | Sequence[str] | None, column: str) -> Ladder:
    """The ladder with prompts from a list or a file, if it is conditioned on prompts."""
    table, _ = find_prompts(prompts, ladder, column=column)
    return replace(ladder, prompts=table.first_texts()) if table else ladder


class _Place:
    """Where a ladder is measured: in this process, or on one device of a cluster if `address` names one.

    Attributes:
        device: the device type, "cpu" or "cuda".
        threads: number of threads, 1 on a GPU.
    """

    def __init__(self, address: str | None, device: Device) -> None:
        from mlem_dist.runtime import cluster

        self.remote = cluster.is_named(address)
        if self.remote:
            cluster.connect(address)
        self.device = cluster.device_type(device) if self.remote else local_device(device)
        cores = cluster.largest_node() if self.remote else available_cores()
        self.threads = cores if self.device == "cpu" else 1

    def __enter__(self) -> _Place:
        return self

    def __exit__(self, *error: object) -> None:
        from mlem_dist.runtime import cluster

        cluster.disconnect()

    def run(self, work: Callable[[Report], T], progress: Report) -> T:
        """The result of `work` there."""
        from mlem_dist.runtime.device_task import run_on_device

        return run_on_device(work, self.device, self.threads, progress) if self.remote else work(progress)
