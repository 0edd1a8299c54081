"""State that earlier calls have left in a ladder's folder, and the check that training can continue from it.

OUT/training/latents/                         latents of the images, in the ladder of a pipeline
OUT/training/<level>/checkpoint.safetensors   see `train_network`
OUT/training/<level>/log.jsonl                the loss log
OUT/training/<level>/settings.json            settings that the checkpoint was trained with
OUT/training/<level>/stored/                  the trained level, until all levels are trained and it moves to OUT
OUT/training/<level>/stored/level.json        the level's entry for ladder.json, and the settings of its training
OUT/training/finished.json                    settings of all levels of the ladder in OUT
OUT/training/stale-DIGEST/                    measurements of an earlier ladder in OUT
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mlem_dist.errors import UsageError
from mlem_dist.files import check_writable, listing, own_names, remembered_digest, replace_file
from mlem_dist.ladder.checks import check_model_folder, model_files, tensor_shapes
from mlem_dist.ladder.create import check_fit
from mlem_dist.ladder.images import Images
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.schema import LADDER
from mlem_dist.ladder.sources import Source
from mlem_dist.models.gaussian import GaussianLevel
from mlem_dist.models.level import on_meta
from mlem_dist.training.config import LevelConfig, TrainConfig
from mlem_dist.training.train import CHECKPOINT, new_level

WORK = "training"
SETTINGS = "settings.json"
FINISHED = "finished.json"
STORED = "stored"
ENTRY = "level.json"

FREE = ("steps", "batch_size", "learning_rate", "ema", "precision", "compile")
"""Settings that may differ from those of a checkpoint: they affect how training continues, not what the model is."""


TEACHER = "its teacher's "
"""Prefix, in a pupil's settings, of the keys that are settings of its teacher."""


def settings(config: TrainConfig, level: LevelConfig, images: Images) -> dict[str, Any]:
    """All settings that determine a trained level, as a flat dictionary in the form that JSON returns."""
    values: dict[str, Any] = {
        "sample_shape": config.sample_shape,
        "labels": images.labels,
        "data": images.digest[:16],
        "seed": config.seed,
        **{f"scheduler.{key}": value for key, value in config.scheduler.items()},
    }
    if config.around:
        values["pipeline"] = config.pipeline_digest[:16]
    shared = set(values)
    if level.kind == "gaussian":
        values["rank"] = level.rank
    else:
        values |= {key: getattr(level, key) for key in ("patch", "prediction", "teacher", *FREE)}
        if level.condition_dropout:
            values["condition_dropout"] = level.condition_dropout
        if level.noise_levels != "uniform":
            values["noise_levels"] = level.noise_levels
        if config.around:
            values["kind"] = level.kind
        if level.start:
            files = {name: remembered_digest(Path(level.start) / name) for name in model_files(Path(level.start))}
            values["start"] = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
        values |= {f"model.{key}": value for key, value in level.model.items()}
        if level.prediction == "residual":
            values["rank of the Gaussian level"] = config.levels[0].rank
        if level.teacher:
            teacher = next(other for other in config.levels if other.name == level.teacher)
            own = settings(config, teacher, images)
            values |= {TEACHER + key: own[key] for key in own.keys() - {*shared, *FREE} | {"steps"}}
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def check_place(out: Path) -> None:
    """Refuse a folder `out` that cannot hold the ladder. Changes no file.

    Raises:
        UsageError: if `out` is not writable or holds something else.
    """
    check_writable(out)
    names = own_names(path.name for path in out.iterdir()) if out.is_dir() else []
    if names and not (out / WORK).is_dir():
        ladder = LADDER in names
        what = "a finished ladder without its training state" if ladder else f"something else ({listing(names)})"
        raise UsageError(f"`out` {out} holds {what}; choose an empty or new folder")


def check_training(config: TrainConfig, images: Images, out: Path) -> bool:
    """Whether `out` already holds the finished ladder of this configuration. Changes no file.

    Raises:
        UsageError: as for `check_place`, or if a class has too few images, a network cannot be built or does not fit
            its pipeline or the weights that it starts from, or a checkpoint is unreadable or was trained with other
            settings.
    """
    check_place(out)
    if images.captions:
        count = [len(images.train_label)]
    else:
        count = torch.bincount(images.train_label, minlength=max(1, len(images.labels))).tolist()
    if min(count) < 2:
        smallest_class = count.index(min(count))
        name = f"class {images.labels[smallest_class]!r}" if images.labels else "the dataset"
        raise UsageError(
            f"{name} has {count[smallest_class]} training images, expected at least 2; add some or leave it out"
        )
    for level in config.levels:
        if level.condition_dropout and not (images.labels or images.captions):
            raise UsageError(
                f"level {level.name!r}: condition_dropout is {level.condition_dropout}, expected 0: the dataset has no "
                "classes and no captions"
            )
        if level.network:
            network = _on_meta(config, level, len(images.labels))
            if level.start:
                _check_start(level, network)
            _check_checkpoint(out / WORK / level.name, level, settings(config, level, images), network)
    if not (out / LADDER).exists() or not (out / WORK / FINISHED).exists():
        return False
    Ladder.load(out)
    finished: dict[str, Any] = json.loads((out / WORK / FINISHED).read_bytes())
    return finished == ladder_settings(config, images)


def ladder_settings(config: TrainConfig, images: Images) -> dict[str, Any]:
    """Name of the ladder, and settings of all levels in their order."""
    return {
        "name": config.name,
        "levels": [[level.name, level.kind, settings(config, level, images)] for level in config.levels],
    }


def begin_training(config: TrainConfig, images: Images, out: Path) -> None:
    """Write the settings of the checkpoints of this call, and remove files that a kill has left half written."""
    for level in config.levels:
        folder = out / WORK / level.name
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.rglob("*.tmp"):
            left.unlink()
        replace_file(folder / SETTINGS, json.dumps(settings(config, level, images), indent=1) + "\n")


def _on_meta(config: TrainConfig, level: LevelConfig, classes: int) -> nn.Module:
    """The network of the level, built without memory for its weights and checked by a forward pass.

    Raises:
        UsageError: if the network cannot be built, or not for samples of this shape, or does not fit its pipeline.
    """
    gaussian = GaussianLevel(1, 1, 1, config.process) if level.prediction == "residual" else None
    built = on_meta(level.name, config.sample_shape, level.patch, lambda: new_level(config, level, classes, gaussian))
    if config.around:
        model: Any = built.model
        source = Source(f"level {level.name!r}", level.name, config.around.folder, None, built.family, model.config)
        check_fit(source, config.around, config.sample_shape, classes, source)
        if level.condition_dropout and classes and not built.family.has_null(model.config, classes):
            raise UsageError(
                f"level {level.name!r}: condition_dropout is {level.condition_dropout}, expected 0: its model has no "
                "class that stands for none"
            )
    return built.model


def _check_start(level: LevelConfig, network: nn.Module) -> None:
    """Refuse weights to start from that are those of another model."""
    folder = Path(level.start)
    check_model_folder(f"level {level.name!r}", level.kind, folder)
    names = [name for name in model_files(folder) if name.endswith(".safetensors")]
    stored = {key: shape for name in names for key, shape in tensor_shapes(folder / name).items()}
    wanted = {key: list(value.shape) for key, value in network.state_dict().items()}
    if other := sorted(key for key in {*stored, *wanted} if stored.get(key) != wanted.get(key)):
        raise UsageError(
            f"level {level.name!r}: {other[0]} is {stored.get(other[0])} in start {folder}, and {wanted.get(other[0])} "
            "by the model's arguments; leave `model` out to take those of start"
        )


def _check_checkpoint(folder: Path, level: LevelConfig, wanted: dict[str, Any], network: nn.Module) -> None:
    path = folder / CHECKPOINT
    if not path.exists():
        return
    away = f"or remove {folder} to train the level from the start"
    try:
        with safe_open(path, "pt") as file:
            step = int(file.metadata()["step"])
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118  # not a mapping
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise UsageError(f"checkpoint {path} cannot be read ({error}); restore it, {away}") from None
    if (folder / SETTINGS).exists():
        stored_settings = json.loads((folder / SETTINGS).read_bytes())
        skipped = set(FREE)
        if TEACHER + "patch" not in stored_settings:
            # Versions before 0.3 stored fewer settings of a teacher.
            skipped |= {key for key in wanted.keys() - stored_settings.keys() if key.startswith(TEACHER)}
        for key in sorted({*stored_settings, *wanted} - skipped):
            if stored_settings.get(key) != wanted.get(key):
                raise UsageError(
                    f"level {level.name!r}: its checkpoint was trained with {key} {stored_settings.get(key)}, not "
                    f"{wanted.get(key)}; take that back, {away}"
                )
    if {name: list(value.shape) for name, value in network.state_dict().items()} != {
        key.removeprefix("model/"): shape for key, shape in shapes.items() if key.startswith("model/")
    }:
        raise UsageError(f"level {level.name!r}: checkpoint {path} is one of another model; take that back, {away}")
    if step > level.steps:
        raise UsageError(
            f"level {level.name!r}: its checkpoint is at step {step}, beyond the {level.steps} steps of the "
            f"configuration; raise steps, {away}"
        )
