"""Training configuration: what to train, read from YAML."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from mlem_dist.errors import UsageError
from mlem_dist.ladder.levels import PREDICTIONS


@dataclass(frozen=True)
class LevelConfig:
    """One level: a Gaussian of a rank, or a UNet with its `UNet2DModel` arguments and its training length.

    A UNet with a `teacher`, the name of another UNet level, learns that level's prediction instead of the noise.
    """

    name: str
    kind: Literal["gaussian", "unet"]
    rank: int = 0
    patch: int = 1
    prediction: Literal["epsilon", "v_prediction", "residual"] = "epsilon"
    teacher: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    batch_size: int = 64
    learning_rate: float = 1e-3
    ema: float = 0.999


@dataclass(frozen=True)
class TrainConfig:
    """A ladder to train. `sample_shape` is (C, H, W); `scheduler` is a diffusers scheduler configuration."""

    name: str
    sample_shape: tuple[int, int, int]
    labels: tuple[str, ...]
    scheduler: dict[str, Any]
    levels: tuple[LevelConfig, ...]
    seed: int = 0


def _build(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise UsageError(f"{where}: expected a mapping, got {values!r}")
    known = get_type_hints(kind)
    if unknown := sorted(set(values) - set(known)):
        raise UsageError(f"{where}: unknown keys {', '.join(map(repr, unknown))}, expected some of {', '.join(known)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise UsageError(f"{where}: {str(error).split(') ')[-1]}") from None


def read_config(path: Path) -> TrainConfig:
    """Read a training configuration.

    Raises:
        UsageError: the file is missing, is not YAML, or has unknown, missing or wrong keys.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"training configuration {path} is missing") from None
    except yaml.YAMLError as error:
        raise UsageError(f"training configuration {path} is not YAML: {' '.join(str(error).split())}") from None
    config: TrainConfig = _build(TrainConfig, raw, str(path))
    levels = tuple(_build(LevelConfig, level, f"{path}: level {i + 1}") for i, level in enumerate(config.levels))
    names = [level.name for level in levels]
    if not levels or len(set(names)) != len(names):
        raise UsageError(f"{path}: expected at least one level and no name twice, got {names}")
    for level in levels:
        if level.kind == "gaussian" and level.rank < 1:
            raise UsageError(f"{path}: level {level.name!r}: rank is {level.rank}, expected at least 1")
        if level.kind == "unet" and level.steps < 1:
            raise UsageError(f"{path}: level {level.name!r}: steps is {level.steps}, expected at least 1")
        if level.kind not in ("gaussian", "unet"):
            raise UsageError(f"{path}: level {level.name!r}: kind is {level.kind!r}, expected gaussian or unet")
        if level.prediction not in PREDICTIONS:
            raise UsageError(
                f"{path}: level {level.name!r}: prediction is {level.prediction!r}, "
                f"expected one of {', '.join(PREDICTIONS)}"
            )
        if level.prediction == "residual" and levels[0].kind != "gaussian":
            raise UsageError(f"{path}: level {level.name!r} corrects a Gaussian level, but the first level is none")
        teachers = [other.name for other in levels if other.kind == "unet" and not other.teacher]
        if level.teacher and level.teacher not in teachers:
            raise UsageError(
                f"{path}: level {level.name!r}: teacher is {level.teacher!r}, expected a UNet level without a teacher "
                f"of its own: {', '.join(teachers) or 'there is none'}"
            )
    return TrainConfig(
        name=config.name,
        sample_shape=tuple(config.sample_shape),  # type: ignore[arg-type]  # three numbers, from a YAML list
        labels=tuple(config.labels),
        scheduler=dict(config.scheduler),
        levels=levels,
        seed=config.seed,
    )
