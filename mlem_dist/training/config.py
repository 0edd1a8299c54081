"""Training configuration of a ladder, read from YAML."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from mlem_dist.errors import UsageError
from mlem_dist.files import check_text
from mlem_dist.models.level import check_prediction
from mlem_dist.solver.process import process_of

RESERVED = ("training", "scheduler")
"""Names of the folders in a ladder that belong to no level."""

KINDS = {int: "a whole number", str: "text", bool: "true or false", dict: "a mapping", list: "a list"}


@dataclass(frozen=True)
class LevelConfig:
    """One level: a Gaussian of a rank, or a UNet with its `UNet2DModel` arguments and its training length.

    A UNet with a `teacher`, the name of another UNet level, learns the teacher's prediction instead of the noise. A
    UNet trains in `precision` ("auto": bfloat16 on a GPU, float32 on a CPU), with torch.compile if `compile` is set.
    """

    name: str
    kind: Literal["gaussian", "unet"]
    rank: int = 0
    patch: int = 1
    prediction: str = "epsilon"
    teacher: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    batch_size: int = 64
    learning_rate: float = 1e-3
    ema: float = 0.999
    label_dropout: float = 0.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """A ladder to train. `sample_shape` is (C, H, W); `scheduler` is a diffusers scheduler configuration.

    `labels` are the class names: empty for an unconditional ladder, None to take those of the data.
    """

    name: str
    sample_shape: tuple[int, int, int]
    scheduler: dict[str, Any]
    levels: tuple[LevelConfig, ...]
    labels: tuple[str, ...] | None = None
    seed: int = 0


def _build(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise UsageError(f"{where}: expected a mapping, got {values!r}")
    known = get_type_hints(kind)
    if unknown := sorted(set(map(str, values)) - set(known)):
        raise UsageError(f"{where}: unknown keys {', '.join(map(repr, unknown))}, expected some of {', '.join(known)}")
    try:
        return kind(**{key: _typed(value, known[key], f"{where}: {key}") for key, value in values.items()})
    except TypeError as error:
        raise UsageError(f"{where}: {str(error).split(') ')[-1]}") from None


def _typed(value: Any, kind: Any, where: str) -> Any:
    """The value, if it has the type of its field; YAML has lists in place of tuples."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UsageError(f"{where} is {value!r}, expected one of {', '.join(get_args(kind))}")
    elif kind is float:
        try:
            # YAML reads 1e-3, without a point, as text.
            return float(value)
        except (TypeError, ValueError):
            raise UsageError(f"{where} is {value!r}, expected a number") from None
    else:
        plain = {int: int, str: str, bool: bool, dict: dict}.get(get_origin(kind) or kind, list)
        # In Python, a bool is an int.
        if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
            raise UsageError(f"{where} is {value!r}, expected {KINDS[plain]}")
    return value


def read_config(path: Path) -> TrainConfig:
    """Read a training configuration.

    Raises:
        UsageError: if the file is missing, is not YAML, or has unknown, missing or wrong keys.
    """
    try:
        raw = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UsageError(f"training configuration {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"training configuration {path} is not YAML: {' '.join(str(error).split())}") from None
    config: TrainConfig = _build(TrainConfig, raw, str(path))
    config = TrainConfig(
        name=config.name,
        sample_shape=_sample_shape(config.sample_shape, str(path)),
        scheduler=config.scheduler,
        levels=tuple(_build(LevelConfig, level, f"{path}: level {i + 1}") for i, level in enumerate(config.levels)),
        labels=None if config.labels is None else tuple(map(str, config.labels)),
        seed=config.seed,
    )
    try:
        process = process_of(config.scheduler)
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: scheduler: {error}; YAML needs the point in numbers such as 1.0e-4") from None
    names = [level.name for level in config.levels]
    if not names or len(set(names)) != len(names):
        raise UsageError(f"{path}: expected at least one level and no name twice, got {names}")
    check_text((config.name, *names, *(config.labels or ())), str(path))
    if config.seed < 0:
        raise UsageError(f"{path}: seed is {config.seed}, expected 0 or more")
    if config.labels is not None and len(set(config.labels)) != len(config.labels):
        raise UsageError(f"{path}: labels has a name twice: {', '.join(config.labels)}")
    for level in config.levels:
        if wrong := _wrong(level, config):
            raise UsageError(f"{path}: level {level.name!r}: {wrong}")
        if level.kind == "unet":
            check_prediction(level.name, level.prediction, process)
    return config


def _sample_shape(values: Any, where: str) -> tuple[int, int, int]:
    if (
        len(values) != 3
        or not all(isinstance(value, int) and value >= 1 for value in values)
        or values[0] not in (1, 3)
    ):
        raise UsageError(f"{where}: sample_shape is {values}, expected [1 or 3, height, width]")
    return values[0], values[1], values[2]


def _wrong(level: LevelConfig, config: TrainConfig) -> str | None:
    """First error in the configuration of a level, or None."""
    channels, height, width = config.sample_shape
    if not re.fullmatch(r"\w[\w.+-]*", level.name) or level.name in RESERVED:
        return f"expected a name that can be a folder's, other than {' and '.join(RESERVED)}"
    if level.kind == "gaussian":
        values = channels * height * width
        # The residual variance needs at least one direction outside the basis.
        return None if 1 <= level.rank < values else f"rank is {level.rank}, expected 1 to {values - 1}"
    for key in ("steps", "batch_size", "patch"):
        if getattr(level, key) < 1:
            return f"{key} is {getattr(level, key)}, expected at least 1"
    if height % level.patch or width % level.patch:
        return f"patch is {level.patch}, expected a divisor of {height} and {width}"
    if not level.learning_rate > 0:
        return f"learning_rate is {level.learning_rate}, expected a positive number"
    if not 0 <= level.ema < 1:
        return f"ema is {level.ema}, expected 0 or more and less than 1"
    if not 0 <= level.label_dropout < 1:
        return f"label_dropout is {level.label_dropout}, expected 0 or more and less than 1"
    if level.label_dropout and level.prediction == "residual":
        return f"label_dropout is {level.label_dropout}, expected 0 for a residual: its Gaussian level knows the class"
    if level.prediction == "residual" and config.levels[0].kind != "gaussian":
        return "a residual corrects a Gaussian level, but the first level is none"
    teachers = [other.name for other in config.levels if other.kind == "unet" and not other.teacher]
    if level.teacher and level.teacher not in teachers:
        return (
            f"teacher is {level.teacher!r}, expected a UNet level without a teacher of its own: "
            f"{', '.join(teachers) or 'there is none'}"
        )
    return None
