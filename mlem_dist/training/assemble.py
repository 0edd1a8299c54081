"""Assembly of a ladder folder from trained levels."""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from mlem_dist.errors import UsageError
from mlem_dist.files import read_object, replace_file
from mlem_dist.ladder.create import GAUSSIAN, create_ladder
from mlem_dist.ladder.images import Images
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.measure import measure_costs
from mlem_dist.ladder.save import save_ladder, save_level
from mlem_dist.ladder.schema import LADDER, Level, level_entry
from mlem_dist.models.gaussian import GaussianLevel
from mlem_dist.models.level import ModelLevel
from mlem_dist.training.config import LevelConfig, TrainConfig
from mlem_dist.training.data import conditions_of
from mlem_dist.training.resume import (
    ENTRY,
    FINISHED,
    STORED,
    WORK,
    begin_training,
    check_training,
    ladder_settings,
    settings,
)
from mlem_dist.training.train import denoising_error, fit_gaussian, train_network

logger = logging.getLogger(__name__)

HALF_LOSS = 0.005
"""Largest relative increase in denoising error for which weights are stored in half precision."""

MEASURED = ("calibration.json", "plan-*.json", "frontier-*.json")
"""Measurement files in a ladder's folder, as patterns; each names its ladder by digest."""


def training_order(config: TrainConfig) -> list[LevelConfig]:
    """Levels in an order in which each follows those that it needs: Gaussian levels, then networks, then pupils.

    Among equals, the largest level comes first, so that the longest of parallel trainings does not begin last.
    """
    largest_first = config.levels[::-1]
    return sorted(largest_first, key=lambda level: (level.kind != "gaussian", bool(level.teacher)))


def needs(config: TrainConfig, level: LevelConfig) -> tuple[str | None, str | None]:
    """Names of the Gaussian level that a level corrects and of its teacher; None where there is none."""
    return config.levels[0].name if level.prediction == "residual" else None, level.teacher or None


def train_level(
    config: TrainConfig,
    level: LevelConfig,
    images: Images,
    out: Path,
    gaussian: nn.Module | None,
    teacher: nn.Module | None,
    device: str,
    progress: Callable[[int, float], None],
) -> tuple[nn.Module, Level]:
    """Train one level, or finish its training, and store it in `out`/training/<level>/stored.

    `gaussian` and `teacher` are the levels that `needs` names. `progress` is called with the number of steps done and
    the loss.

    Returns:
        The level as stored, on the CPU, and its entry for `ladder.json`.

    Raises:
        DivergedError: if the loss or the held-out error is NaN or infinite.
        RuntimeError: if there is not enough memory.
    """
    folder = out / WORK / level.name
    reached = 0

    def report(done: int, loss: float) -> None:
        nonlocal reached
        reached = done
        progress(done, loss)

    try:
        module: nn.Module
        if level.kind == "gaussian":
            module = fit_gaussian(config, level, images).to(device)
        else:
            assert gaussian is None or isinstance(gaussian, GaussianLevel)
            module = train_network(config, level, images, folder, gaussian, teacher, device, report)
        entry = _store(folder / STORED, level.name, module, images, config, settings(config, level, images), device)
    except (RuntimeError, MemoryError) as error:
        # Torch's allocator of CPU memory raises a plain RuntimeError.
        if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            size = "sample_shape" if level.kind == "gaussian" else f"batch_size from {level.batch_size}"
            raise RuntimeError(
                f"level {level.name!r}: out of memory on {device} after step {reached}; lower {size} and run the same "
                "command again, which goes on from the last checkpoint if there is one"
            ) from None
        raise
    return module.cpu(), entry


def train_ladder(
    config: TrainConfig,
    images: Images,
    out: Path,
    progress: Callable[[str, int, float], None],
    device: str = "cpu",
) -> Ladder:
    """Train the levels that are not yet trained, one after the other in this process, and write the ladder to `out`.

    Training state stays in `out`/training, so that a call after a kill continues. `progress` is called with the level's
    name, the number of steps done and the loss.

    Raises:
        DivergedError: if the loss or the held-out error of a level is NaN or infinite.
        RuntimeError: if there is not enough memory.
        UsageError: if `check_training` refuses `out`, the images or the configuration.
    """
    check_training(config, images, out)
    begin_training(config, images, out)
    modules: dict[str, nn.Module] = {}
    entries: dict[str, Level] = {}
    for level in training_order(config):
        gaussian, teacher = (modules[name] if name else None for name in needs(config, level))
        modules[level.name], entries[level.name] = train_level(
            config, level, images, out, gaussian, teacher, device, partial(progress, level.name)
        )
    return finish_training(config, images, out, entries)


def finish_training(config: TrainConfig, images: Images, out: Path, entries: Mapping[str, Level]) -> Ladder:
    """Move the stored levels to their places in `out`, write the ladder and measure its costs.

    Measurements of an earlier ladder in `out`, by `calibrate` and `tune`, are set aside.
    """
    # From here to the end there is no ladder.json, rather than a ladder that mixes the levels of two trainings.
    (out / LADDER).unlink(missing_ok=True)
    if config.around:
        ladder = _finish_models(config, out, entries)
    else:
        for level in config.levels:
            path = entries[level.name].path
            _move(out / WORK / level.name / STORED / path, out / path)
        levels = [entries[level.name] for level in config.levels]
        ladder = save_ladder(out, config.name, config.sample_shape, images.labels, config.scheduler, levels)
        ladder = measure_costs(ladder)
    set_stale_aside(ladder)
    replace_file(out / WORK / FINISHED, json.dumps(ladder_settings(config, images)))
    return ladder


def _finish_models(config: TrainConfig, out: Path, entries: Mapping[str, Level]) -> Ladder:
    """The ladder of models, with the parts of the pipeline, that `create_ladder` writes from stored levels."""
    work = out / WORK / "ladder"
    shutil.rmtree(work, ignore_errors=True)
    gaussians = [entries[level.name] for level in config.levels if not level.network]
    made = create_ladder(
        work / config.name,
        [out / WORK / level.name / STORED / level.name for level in config.levels if level.network],
        pipeline=config.pipeline,
        guidance=None if config.guidance == 1 else config.guidance,
        gaussian=_stored_gaussian(config, out, gaussians[0]) if gaussians else None,
        copy=True,
    )
    raw = read_object(made.folder / LADDER, "ladder")
    errors = {name: entry.denoising_error for name, entry in entries.items() if entry not in gaussians}
    for entry in gaussians:
        errors[GAUSSIAN] = entry.denoising_error
    for level in raw["levels"]:
        level["denoising_error"] = errors.get(level["name"], [])
    replace_file(made.folder / LADDER, json.dumps(raw, indent=2) + "\n")
    # The ladder is there with its last file.
    for path in sorted(made.folder.iterdir(), key=lambda path: path.name == LADDER):
        _move(path, out / path.name)
    return Ladder.load(out)


def _stored_gaussian(config: TrainConfig, out: Path, entry: Level) -> GaussianLevel:
    return GaussianLevel.of_state(load_file(out / WORK / entry.name / STORED / entry.path), config.process)


def _move(path: Path, target: Path) -> None:
    """Move a file or a folder to the place of another one."""
    if target.is_dir():
        shutil.rmtree(target)
    path.replace(target)


def set_stale_aside(ladder: Ladder) -> None:
    """Move measurements of another ladder in this ladder's folder to training/stale-DIGEST, and log each move."""
    for path in sorted(path for pattern in MEASURED for path in ladder.folder.glob(pattern)):
        try:
            digest = str(read_object(path, "measurement").get("ladder"))
        except UsageError:
            continue
        if digest == ladder.digest or not re.fullmatch("[0-9a-f]{64}", digest):
            continue
        folder = ladder.folder / WORK / f"stale-{digest[:8]}"
        folder.mkdir(parents=True, exist_ok=True)
        names = chain([path.name], (f"{number}-{path.name}" for number in count(2)))
        target = next(folder / name for name in names if not (folder / name).exists())
        path.replace(target)
        logger.warning("%s belongs to the ladder as it was before this training: moved to %s", path, target)


def _store(
    folder: Path,
    name: str,
    module: nn.Module,
    images: Images,
    config: TrainConfig,
    wanted: dict[str, Any],
    device: str,
) -> Level:
    """Save a level with its denoising error, in half precision if this increases the error by at most `HALF_LOSS`.

    The measurements take minutes for a large level. A level of the `wanted` settings that an earlier call has saved is
    therefore kept. `module` gets the stored weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The Gaussian level inside a UNet level already has its stored weights.
    weights = module.model if isinstance(module, ModelLevel) else module
    state = {key: value.clone() for key, value in weights.state_dict().items()}
    rounded = {key: value.half().float() for key, value in state.items()}
    if saved := _saved(folder, wanted):
        weights.load_state_dict(rounded if saved["half"] else state)
        if isinstance(module, GaussianLevel):
            module.orthonormalise()
        return Level(**saved["level"])
    process, conditions = config.process, conditions_of(config, images, device)
    # A few samples suffice, because both errors are measured on the same ones.
    full = denoising_error(module, images, process, conditions, device, per_band=100)
    weights.load_state_dict(rounded)
    rough = denoising_error(module, images, process, conditions, device, per_band=100)
    half = sum(rough) <= (1 + HALF_LOSS) * sum(full)
    if not half:
        weights.load_state_dict(state)
    level = save_level(folder, name, module, torch.float16 if half else torch.float32)
    if isinstance(module, GaussianLevel):
        # As `Ladder.load_level` does.
        module.orthonormalise()
    level = replace(level, denoising_error=denoising_error(module, images, process, conditions, device))
    replace_file(folder / ENTRY, json.dumps({"settings": wanted, "half": half, "level": level_entry(level)}))
    return level


def _saved(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Record that `_store` wrote of a level of the `wanted` settings, or None unless all its files are in `folder`."""
    if not (folder / ENTRY).exists():
        return None
    saved: dict[str, Any] = json.loads((folder / ENTRY).read_bytes())
    complete = all((folder / file).exists() for file in saved["level"]["sha256"])
    return saved if complete and saved["settings"] == wanted else None
