"""Functions that train, measure, calibrate and tune ladders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlem_dist.api.arguments import Device, Notify, check_prompts, ignore, load_ladder, local_device
from mlem_dist.engine.prompts import read_prompts
from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.machine import available_cores
from mlem_dist.solver.steps import canonical_solver

if TYPE_CHECKING:
    from mlem_dist.ladder.images import Images
    from mlem_dist.training.tasks import TrainingProgress
    from mlem_dist.tuning.calibrate import Calibration
    from mlem_dist.tuning.frontier import Row


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


def load_data(data: Path, ladder: Any, notify: Notify = ignore) -> Images:
    """The images in a folder, for a ladder or a training configuration, with notes on resized and skipped files."""
    from mlem_dist.ladder.images import load_images

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
        UsageError: if the data, the configuration or `out` cannot be used. Nothing is written in this case.
        DivergedError: if a loss becomes NaN or infinite.
        RuntimeError: if memory does not suffice, or the process of a level dies.
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
    notify: Notify = ignore,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> tuple[Calibration, list[Path], bool]:
    """Measure a ladder on this device: times, errors, increments and their effects, gamma, and predicted speed-up.

    Args:
        ladder: a bundled name, a folder, or a ladder.
        data: folder of an image dataset.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
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
    calibration = calibrate(
        loaded, images.test, images.condition(images.test_label), device_type, progress, compiled=compiled
    )
    return calibration, [store(folder, loaded, calibration), *save_figures(folder, loaded, calibration)], replaced


def tune(
    ladder: str | Path | Ladder,
    *,
    out: Path,
    nfe: Sequence[float] = (5, 10, 20, 40),
    solver: Literal["ode", "sde", "ddim", "ddpm"] = "ode",
    steps: int = 250,
    prompts: str | Path | Sequence[str] | None = None,
    device: Device = "auto",
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> tuple[list[Row], list[Path]]:
    """Find the best plan of a ladder for each budget: try candidates, and judge them on other noises.

    The same call again resumes an interrupted search.

    Args:
        ladder: a bundled name, a folder, or a ladder.
        out: folder for the plans, the frontier and its figure; `generate` uses plans in the ladder's folder.
        nfe: budgets, in evaluations of the best level per image.
        solver: "ode" or "sde", or their aliases "ddim" and "ddpm".
        steps: number of base steps.
        prompts: prompts like those of the images to be generated, a few hundred, or a file of them as for `generate`;
            for a ladder that is conditioned on prompts.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        progress: receives the name of a stage, its finished units of work, and their total.

    Returns:
        A row of the frontier for each candidate, and the paths of the written files.

    Raises:
        UsageError: if the ladder or `out` cannot be used, or a budget cannot be met.
    """
    from mlem_dist.extras import require
    from mlem_dist.report.figures import save_frontier
    from mlem_dist.tuning.tune import open_frontier
    from mlem_dist.tuning.tune import tune as search
    from mlem_dist.tuning.tuned_plans import plan_path

    require("matplotlib", "figures")
    method = canonical_solver(solver)
    if method == "dpm++":
        raise UsageError("`solver` dpm++: `tune` finds plans for ode and sde; choose one of them")
    loaded = load_ladder(ladder)
    if isinstance(prompts, str | Path):
        prompts, _ = read_prompts(Path(prompts), None)
    texts, _ = check_prompts(prompts, None, loaded)
    loaded = replace(loaded, prompts=texts)
    loaded.check_models()
    device_type = local_device(device)
    frontier = open_frontier(loaded, method, steps, device_type, out)
    threads = available_cores() if device_type == "cpu" else 1
    rows = list(search(loaded, device_type, tuple(nfe), frontier, threads, progress))
    figure = save_frontier(frontier, frontier.path.with_suffix(".png"))
    return rows, [*(plan_path(out, method, budget) for budget in nfe), frontier.path, figure]
