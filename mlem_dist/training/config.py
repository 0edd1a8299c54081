"""Training configuration of a ladder, read from YAML."""

import hashlib
import json
import math
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from mlem_dist.errors import UsageError
from mlem_dist.files import check_text
from mlem_dist.ladder.create import Surroundings
from mlem_dist.ladder.images import CAPTIONS
from mlem_dist.ladder.sources import find_folder, find_source
from mlem_dist.models.families import FAMILIES
from mlem_dist.models.level import check_prediction
from mlem_dist.solver.process import FlowProcess, Process, process_of

RESERVED = ("training", "scheduler")
"""Names of the folders in a ladder that belong to no level."""

KINDS = {int: "a whole number", str: "text", bool: "true or false", dict: "a mapping", list: "a list"}


@dataclass(frozen=True)
class LevelConfig:
    """One level: a Gaussian of a rank, or a network with its arguments and its training length.

    The kind is "gaussian", "unet" for a `UNet2DModel` or, in the ladder of a pipeline, the class of a model of
    diffusers. A network with a `teacher`, the name of another one, learns the teacher's prediction instead of the
    noise. It trains in `precision` ("auto": bfloat16 on a GPU, float32 on a CPU), with torch.compile if `compile` is
    set, without its condition for a share `condition_dropout` of the samples, and at noise levels of a flow that are
    "uniform" or "logit-normal" (Esser et al., arXiv:2403.03206) before the scheduler's shift. Its weights begin as
    those of the model in the folder `start`, "" for random ones.
    """

    name: str
    kind: str
    rank: int = 0
    patch: int = 1
    prediction: str = ""
    teacher: str = ""
    start: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    batch_size: int = 64
    learning_rate: float = 1e-3
    ema: float = 0.999
    condition_dropout: float = 0.0
    noise_levels: Literal["uniform", "logit-normal"] = "uniform"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False

    @property
    def network(self) -> bool:
        """Whether the level is a network, which has steps of training."""
        return self.kind != "gaussian"


@dataclass(frozen=True)
class TrainConfig:
    """A ladder to train.

    Attributes:
        name: the ladder's name.
        sample_shape: (C, H, W) of images or, in the ladder of a pipeline, of latents.
        levels: the levels, in order of cost.
        scheduler: configuration of a scheduler of diffusers; with a pipeline, that of the pipeline.
        pipeline: folder of the pipeline whose autoencoder and text encoders the ladder takes; "" for pixels.
        captions: name of the column of captions, for a pipeline with text encoders.
        guidance: guidance scale of a further level of each model of the ladder of a pipeline; 1 for none.
        labels: class names: empty for an unconditional ladder, None to take those of the data.
        seed: seed of weights, noises and the order of the images.
    """

    name: str
    sample_shape: tuple[int, int, int]
    levels: tuple[LevelConfig, ...]
    scheduler: dict[str, Any] = field(default_factory=dict)
    pipeline: str = ""
    captions: str = CAPTIONS
    guidance: float = 1.0
    labels: tuple[str, ...] | None = None
    seed: int = 0

    @cached_property
    def around(self) -> Surroundings | None:
        """The parts of the pipeline; None for a ladder of pixels."""
        return Surroundings(Path(self.pipeline)) if self.pipeline else None

    @cached_property
    def pipeline_digest(self) -> str:
        """SHA-256 of the files of the pipeline that training uses; "" for a ladder of pixels."""
        if self.around is None:
            return ""
        parts = (self.around.decoder_entry(), self.around.encoder_entry())
        digests = json.dumps([part["sha256"] for part in parts if part], sort_keys=True)
        return hashlib.sha256(digests.encode()).hexdigest()

    @cached_property
    def process(self) -> Process:
        """The process of the scheduler."""
        # A dynamic shift decides grids, of which training has none.
        return process_of(self.scheduler, tokens=1 if self.pipeline else None)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of images."""
        if self.around is None:
            return self.sample_shape
        factor = self.around.upscaling
        return 3, factor * self.sample_shape[1], factor * self.sample_shape[2]


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
    config = replace(
        config,
        levels=tuple(_build(LevelConfig, level, f"{path}: level {i + 1}") for i, level in enumerate(config.levels)),
        labels=None if config.labels is None else tuple(map(str, config.labels)),
    )
    config = _with_pipeline(config, str(path)) if config.pipeline else config
    config = replace(config, sample_shape=_sample_shape(config.sample_shape, config.around, str(path)))
    if not config.pipeline and "scheduler" not in raw:
        raise UsageError(f"{path}: scheduler is missing, expected the configuration of a scheduler of diffusers")
    try:
        process = config.process
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: scheduler: {error}; YAML needs the point in numbers such as 1.0e-4") from None
    default = process.prediction if config.pipeline else "epsilon"
    levels = (
        replace(_started(level, config, str(path)), prediction=level.prediction or default) for level in config.levels
    )
    config = replace(config, levels=tuple(levels))
    names = [level.name for level in config.levels]
    if not names or len(set(names)) != len(names):
        raise UsageError(f"{path}: expected at least one level and no name twice, got {names}")
    if config.pipeline and sum(not level.network for level in config.levels) > 1:
        raise UsageError(f"{path}: levels has several Gaussians, expected at most one with a pipeline")
    check_text((config.name, *names, *(config.labels or ())), str(path))
    if config.seed < 0:
        raise UsageError(f"{path}: seed is {config.seed}, expected 0 or more")
    if config.labels is not None and len(set(config.labels)) != len(config.labels):
        raise UsageError(f"{path}: labels has a name twice: {', '.join(config.labels)}")
    for level in config.levels:
        if wrong := _wrong(level, config):
            raise UsageError(f"{path}: level {level.name!r}: {wrong}")
        if level.network:
            check_prediction(level.name, level.prediction, process)
    return config


def _with_pipeline(config: TrainConfig, where: str) -> TrainConfig:
    """The configuration with the folder of its pipeline, and with the pipeline's scheduler."""
    folder, _ = find_folder(config.pipeline, f"{where}: pipeline")
    if not (folder / "model_index.json").is_file():
        raise UsageError(f"{where}: pipeline {config.pipeline!r} has no model_index.json, expected a pipeline's folder")
    if config.scheduler:
        raise UsageError(f"{where}: scheduler is given beside a pipeline, which has its own; leave it out")
    if not (config.guidance == 1 or 1 < config.guidance < math.inf):
        raise UsageError(f"{where}: guidance is {config.guidance:g}, expected a scale above 1, or 1 for none")
    around = Surroundings(folder)
    if around.decoder is None:
        raise UsageError(
            f"{where}: pipeline {config.pipeline!r} has no autoencoder in a folder vae, which makes latents"
        )
    return replace(config, pipeline=str(folder), scheduler=around.scheduler)


def _started(level: LevelConfig, config: TrainConfig, where: str) -> LevelConfig:
    """The level with the folder of the model that it starts from, and with its arguments if it has none of its own."""
    if not level.start:
        return level
    if not config.pipeline:
        raise UsageError(f"{where}: level {level.name!r}: start is {level.start!r}, expected none without a pipeline")
    source = find_source(level.start)
    if level.kind != source.family.names[0]:
        raise UsageError(
            f"{where}: level {level.name!r}: its kind is {level.kind!r}, and start {level.start!r} is a "
            f"{source.family.names[0]}; take that kind"
        )
    arguments = {key: value for key, value in source.config.items() if not key.startswith("_")}
    return replace(level, start=str(source.folder), model=level.model or arguments)


def _sample_shape(values: Any, around: Surroundings | None, where: str) -> tuple[int, int, int]:
    channels = (1, 3) if around is None else (around.decoder_config["latent_channels"],)
    if (
        len(values) != 3
        or not all(isinstance(value, int) and value >= 1 for value in values)
        or values[0] not in channels
    ):
        expected = " or ".join(map(str, channels))
        raise UsageError(f"{where}: sample_shape is {values}, expected [{expected}, height, width]")
    return values[0], values[1], values[2]


def _wrong(level: LevelConfig, config: TrainConfig) -> str | None:
    """First error in the configuration of a level, or None."""
    channels, height, width = config.sample_shape
    if not re.fullmatch(r"\w[\w.+-]*", level.name) or level.name in RESERVED:
        return f"expected a name that can be a folder's, other than {' and '.join(RESERVED)}"
    kinds = sorted({"gaussian", *(FAMILIES.keys() - {"unet"} if config.pipeline else ["unet"])})
    if level.kind not in kinds:
        where = "with" if config.pipeline else "without"
        return f"kind is {level.kind!r}, expected one of {', '.join(kinds)} {where} a pipeline"
    if not level.network:
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
    dropout = level.condition_dropout
    if not 0 <= dropout < 1:
        return f"condition_dropout is {dropout}, expected 0 or more and less than 1"
    if dropout and level.prediction == "residual":
        return f"condition_dropout is {dropout}, expected 0 for a residual: its Gaussian level knows the class"
    if config.pipeline and level.patch != 1:
        return f"patch is {level.patch}, expected 1 with a pipeline; models have patches of their own"
    if config.pipeline and level.prediction == "residual":
        return "prediction is residual, expected another one with a pipeline"
    if level.noise_levels == "logit-normal" and not isinstance(config.process, FlowProcess):
        return "noise_levels is 'logit-normal', expected 'uniform': the scheduler is not that of a flow"
    if level.prediction == "residual" and config.levels[0].kind != "gaussian":
        return "a residual corrects a Gaussian level, but the first level is none"
    teachers = [other.name for other in config.levels if other.network and not other.teacher]
    if level.teacher and level.teacher not in teachers:
        return (
            f"teacher is {level.teacher!r}, expected a network without a teacher of its own: "
            f"{', '.join(teachers) or 'there is none'}"
        )
    return None
