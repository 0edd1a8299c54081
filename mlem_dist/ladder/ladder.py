"""A ladder: the ordered levels of one drift, as a folder on disk.

LADDER/ladder.json                       see schema.py
LADDER/scheduler/scheduler_config.json   noise schedule, diffusers format
LADDER/<gaussian>.safetensors            a Gaussian level
LADDER/<model>/config.json, *.safetensors a model, as diffusers saves it; models may also be elsewhere
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlem_dist.errors import UsageError
from mlem_dist.files import check_text, read_object
from mlem_dist.ladder.checks import (
    check_digest,
    check_model_folder,
    check_present,
    model_files,
    read_process,
    tensor_shapes,
)
from mlem_dist.ladder.loader import Loader
from mlem_dist.ladder.remote import forget_others, is_remote, local_path
from mlem_dist.ladder.schema import (
    LADDER,
    MODELS_VERSION,
    OWN,
    SCHEDULER,
    SCHEMA_VERSION,
    Level,
    Part,
    joined,
    parse_levels,
    parse_sample_shape,
    parse_value_range,
)
from mlem_dist.models.decoder import Decoder, upscaling
from mlem_dist.models.encoder import Encoder
from mlem_dist.models.families import FAMILIES, config_kind, family_of
from mlem_dist.models.families.family import Family
from mlem_dist.models.gaussian import GaussianLevel
from mlem_dist.models.level import ModelLevel, check_prediction, level_bytes, on_meta, placeholder
from mlem_dist.models.safety import SafetyChecker
from mlem_dist.solver.condition import LABEL, NEGATIVE, Condition, join
from mlem_dist.solver.costs import LevelCosts, as_costs
from mlem_dist.solver.process import Process, process_of

PACKAGE = Path(str(files("mlem_dist.ladder")))

LEAST_SECONDS = 1e-6
"""Smallest time of a stage, in seconds per sample: a stage without a time would get no actor."""


@dataclass(frozen=True)
class Ladder:
    """A validated ladder folder.

    Attributes:
        folder: path of the folder.
        name: name of the ladder.
        sample_shape: (C, H, W).
        labels: class names; empty for an unconditional ladder.
        value_range: interval to which the values of a finished sample are clipped before they are mapped to 0 ... 255.
        levels: entries of the levels, cheapest first.
        scheduler_sha256: hex digest of the scheduler's configuration file.
        decoder: the decoder of samples that are latents; None if samples are images.
        encoder: the pipeline whose text encoders encode prompts; None if samples are not conditioned on prompts.
        checker: the pipeline whose safety checker looks at images; None if it has none.
        schema_version: version of the schema of `ladder.json`.
        prompts: prompts that samples take in turn where no job gives them prompts, as in tuning; not in `ladder.json`.
    """

    folder: Path
    name: str
    sample_shape: tuple[int, int, int]
    labels: tuple[str, ...]
    value_range: tuple[float, float]
    levels: tuple[Level, ...]
    scheduler_sha256: str
    decoder: Part | None = None
    encoder: Part | None = None
    checker: Part | None = None
    schema_version: int = SCHEMA_VERSION
    prompts: tuple[str, ...] = ()

    @classmethod
    def load(cls, source: str | Path) -> Ladder:
        """Read and validate a ladder, by bundled name or folder, without loading weights. Pickle files are never read.

        Raises:
            UsageError: if there is no ladder of that name, a file is missing or changed, the schema version is unknown,
                or entries contradict each other.
        """
        ladder = cls.read(source)
        for level in ladder.levels:
            ladder.check_files(level)
        for part in filter(None, (ladder.decoder, ladder.encoder, ladder.checker)):
            ladder.check_part(part)
        return ladder

    @classmethod
    def read(cls, source: str | Path) -> Ladder:
        """Read and validate a ladder as `load` does, but compare the digests of a level only when the level is loaded.

        This spares processes that use some of the levels from reading the files of all levels.

        Raises:
            UsageError: as for `load`.
        """
        folder = _find(source)
        path = folder / LADDER
        check_text([str(folder)], "ladder folder")
        raw = read_object(path, "ladder")
        if raw.get("schema_version") not in (SCHEMA_VERSION, MODELS_VERSION):
            raise UsageError(
                f"{path}: schema_version is {raw.get('schema_version')!r}, expected {SCHEMA_VERSION} or "
                f"{MODELS_VERSION}; use a newer version of mlem-dist"
            )
        try:
            ladder = cls(
                folder=folder,
                name=str(raw["name"]),
                sample_shape=parse_sample_shape(raw["sample_shape"], bool(raw.get("decoder"))),
                labels=tuple(map(str, raw["labels"])),
                value_range=parse_value_range(raw["value_range"]),
                levels=parse_levels(raw),
                scheduler_sha256=str(raw["scheduler_sha256"]),
                decoder=Part(**raw["decoder"]) if raw.get("decoder") else None,
                encoder=Part(**raw["encoder"]) if raw.get("encoder") else None,
                checker=Part(**raw["checker"]) if raw.get("checker") else None,
                schema_version=int(raw["schema_version"]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UsageError(f"{path} has a missing, unknown or malformed entry: {error}") from None
        ladder._validate()
        if raw.get("parametrisation") != ladder.process.drift:
            raise UsageError(
                f"{path}: parametrisation is {raw.get('parametrisation')!r}, expected {ladder.process.drift!r}, the "
                "drift of its noise schedule"
            )
        return ladder

    @staticmethod
    def create(out: str | Path, models: Sequence[str | Path], **options: Any) -> Ladder:
        """Write a ladder folder that refers to models of diffusers; see `create_ladder` for the options."""
        from mlem_dist.ladder.create import create_ladder

        return create_ladder(Path(out), models, **options)

    def _validate(self) -> None:
        names = [level.name for level in self.levels]
        if not names or len(set(names)) != len(names):
            raise UsageError(f"{self.folder}: expected at least one level and no name twice, got {names}")
        check_text((self.name, *names, *self.labels), str(self.folder))
        if len(set(self.labels)) != len(self.labels):
            raise UsageError(f"{self.folder}: labels has a name twice: {', '.join(self.labels)}")
        check_digest(self.folder / SCHEDULER, self.scheduler_sha256)
        _ = self.process
        for level in self.levels:
            if level.kind != "gaussian":
                kind = family_of(level.kind, f"level {level.name!r}").names[0]
                if not is_remote(level.path):
                    check_model_folder(f"level {level.name!r}", kind, self.folder / level.path)
            for name in level.sha256 if not is_remote(level.path) else ():
                check_present(self.folder / name)
            for name in self._files(level):
                if name not in level.sha256:
                    raise UsageError(
                        f"{self.folder / LADDER}: sha256 of level {level.name!r} lacks {name}, by which a change of it "
                        "would be noticed; add it"
                    )
            self._check_level(level)
            if level.guidance.by not in ("", *(other.model for other in self.levels)):
                raise UsageError(
                    f"level {level.name!r}: its guidance is by {level.guidance.by!r}, expected the model of a level"
                )
        for device in {device for level in self.levels for device in level.seconds}:
            if any(level.seconds.get(device, 0) <= 0 for level in self.levels):
                raise UsageError(f"{self.folder}: not every level has a positive cost in seconds for device {device!r}")

    def _files(self, level: Level) -> list[str]:
        """The paths of a level's files, relative to the folder; absolute for files elsewhere."""
        if level.kind == "gaussian":
            return [level.path]
        # Files elsewhere may not be here yet.
        if is_remote(level.path):
            return []
        path = self.folder / level.path
        return [str(PurePath(level.path) / name) for name in model_files(path)]

    def check_files(self, level: Level) -> None:
        """Compare a level's files with their digests.

        Raises:
            UsageError: if a file is missing or changed.
        """
        self._check_digests(level.sha256)

    def check_part(self, part: Part) -> None:
        """Compare the files of a part with their digests.

        Raises:
            UsageError: if a file is missing or changed.
        """
        self._check_digests({f"{part.path}/{name}": digest for name, digest in part.sha256.items()})

    def _check_digests(self, files: Mapping[str, str]) -> None:
        for name, digest in files.items():
            check_digest(self.place(name, digest), digest)
        forget_others(files)

    def place(self, path: str, digest: str = "") -> Path:
        """The place of a file or folder of the ladder on this machine.

        Files on the hub or in an object store are downloaded if they are not here, or not with this SHA-256.

        Raises:
            UsageError: if the file cannot be downloaded, or is another one.
        """
        return local_path(path, digest) if is_remote(path) else self.folder / path

    def _check_level(self, level: Level) -> None:
        """Refuse a level that does not fit the ladder's sample shape and labels."""
        if level.kind == "gaussian":
            shape = [max(1, len(self.labels)), math.prod(self.sample_shape)]
            self._check_fit(level, {"mean": tensor_shapes(self.folder / level.path).get("mean")}, {"mean": shape})
        else:
            self._check_model(level, family_of(level.kind, f"level {level.name!r}"))

    def _check_model(self, level: Level, family: Family) -> None:
        channels, height, width = self.sample_shape
        # Models of schema 2 have predictions of their own pipelines, which may differ from the scheduler's.
        if self.schema_version == SCHEMA_VERSION:
            check_prediction(level.name, level.prediction, self.process)
        if level.prediction == "residual":
            self._check_residual(level)
        if height % level.patch or width % level.patch:
            raise UsageError(f"level {level.name!r}: {height}x{width} is not divisible by patch {level.patch}")
        config = self._config(level)
        if config_kind(config) not in family.names:
            raise UsageError(f"level {level.name!r}: its model is a {config_kind(config)}, expected {family.names[0]}")
        inner = channels * level.patch**2
        expected: dict[str, Any] = {"in_channels": 2 * inner if level.prediction == "residual" else inner}
        if level.kind == "unet":
            expected |= {"out_channels": inner, "sample_size": (height // level.patch, width // level.patch)}
        given = dict(config) | {"sample_size": family.size(config), "in_channels": family.channels(config)}
        self._check_fit(level, given, expected)
        if not family.fits(config, len(self.labels)):
            raise UsageError(
                f"level {level.name!r} does not fit the ladder: its model has {family.classes(config) or 'no'} "
                f"classes, expected {len(self.labels) or 'none'}"
            )
        if reason := family.refusal(config, self.process):
            raise UsageError(f"level {level.name!r}: {reason}")
        if level.guidance.embedded != (takes := family.scale(config) is not None):
            raise UsageError(
                f"level {level.name!r}: embedded of its guidance is {json.dumps(not takes)}, expected "
                f"{json.dumps(takes)}, as its model takes {'the' if takes else 'no'} scale as an input"
            )

    def _check_residual(self, level: Level) -> None:
        number = self.levels.index(level)
        below = {other.name: other for other in self.levels[:number]}
        if level.corrects and level.corrects not in below:
            raise UsageError(
                f"level {level.name!r}: corrects is {level.corrects!r}, expected the name of a Gaussian level below it"
            )
        corrected = below[level.corrects] if level.corrects else self.levels[0]
        if corrected.kind != "gaussian" or self.value_range != (-1.0, 1.0):
            raise UsageError(
                f"level {level.name!r}: prediction residual needs a Gaussian level to correct, by default the first "
                f"one, and the value range [-1, 1], got {corrected.name!r} of kind {corrected.kind} and "
                f"{list(self.value_range)}"
            )

    def corrected(self, number: int) -> int:
        """Number of the level whose value level `number` corrects, from 1; 0 if it is not a residual."""
        level = self.levels[number - 1]
        if level.prediction != "residual":
            return 0
        return [other.name for other in self.levels].index(level.corrects or self.levels[0].name) + 1

    def _check_fit(self, level: Level, given: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        for key, value in expected.items():
            if given.get(key) != value:
                raise UsageError(
                    f"level {level.name!r} does not fit the ladder's sample shape {self.sample_shape} and "
                    f"{len(self.labels)} labels: its {key} is {given.get(key)}, expected {value}"
                )

    def _config(self, level: Level) -> dict[str, Any]:
        """The configuration of a level's model."""
        path = joined(level.path, "config.json")
        return read_object(self.place(path, level.sha256.get(path, "")), "model configuration")

    def check_models(self) -> None:
        """Refuse a model that cannot be built or fails on samples of the ladder's shape.

        This check comes before a run writes anything. It imports diffusers, which takes seconds. Bundled ladders are
        known to pass and are skipped.

        Raises:
            UsageError: if the check fails, with the level's name and diffusers' reason.
        """
        models = {level.path: level for level in reversed(self.levels) if level.kind != "gaussian"}
        for level in reversed(models.values()) if self.folder.parent != PACKAGE else ():
            self._on_meta(level)

    def _on_meta(self, level: Level) -> ModelLevel:
        """A level on torch's meta device, without its guidance; see `on_meta`."""
        return on_meta(level.name, self.sample_shape, level.patch, partial(self._untrained, level))

    def _untrained(self, level: Level) -> ModelLevel:
        """A level with initial weights, from its model's configuration alone."""
        gaussian = GaussianLevel(1, 1, 1, self.process) if level.prediction == "residual" else None
        family, dtype = FAMILIES[level.kind], getattr(torch, level.precision)
        model = family.model_class().from_config(self._config(level)).eval().to(dtype)
        return ModelLevel(model, level.patch, level.prediction, self.process, gaussian, dtype, family=family)

    @cached_property
    def activation_bytes(self) -> tuple[int, ...]:
        """Bytes per sample of the activations of each level's evaluations, which are made one after the other.

        Those that `ladder.json` does not tell are measured, as by `level_bytes`. That imports diffusers.

        Raises:
            UsageError: as for `check_models`.
        """
        models = {level.model or level.name: level for level in reversed(self.levels)}
        known: dict[str, int] = {}

        def of_model(name: str) -> int:
            if name not in known:
                gaussian = models[name].kind == "gaussian"
                known[name] = 0 if gaussian else level_bytes(self._on_meta(models[name]), self.sample_shape)
            return known[name]

        return tuple(
            level.activation_bytes or max(of_model(name) for name, _ in self._evaluations(level))
            for level in self.levels
        )

    def condition(self, samples: Tensor) -> Condition:
        """A condition of samples, by their numbers, int64 (B,): they take the classes or the prompts in turn.

        Without prompts, tensors of texts are zeros.
        """
        if self.prompts:
            rows = [self.prompts[number % len(self.prompts)] for number in samples.tolist()]
            return join([self._loader.encoded(text, samples.device) for text in rows])
        if self.encoder:
            inputs = self._family.inputs(self._config(self.levels[-1]))
            zeros = {name: value.to(samples.device) for name, value in placeholder(inputs, len(samples)).items()}
            return {**zeros, **{NEGATIVE + name: value for name, value in zeros.items()}}
        return self.completed({LABEL: samples % len(self.labels)} if self.labels else {})

    @property
    def conditions(self) -> int:
        """Number of different conditions that `condition` gives samples."""
        return max(1, len(self.labels), len(self.prompts))

    def completed(self, condition: Condition) -> Condition:
        """The condition of samples with the class for unconditional evaluations, if a level makes them."""
        if LABEL not in condition or not self.guided:
            return condition
        return {**condition, NEGATIVE + LABEL: torch.full_like(condition[LABEL], len(self.labels))}

    @property
    def guided(self) -> bool:
        """Whether a level is guided by evaluations with and without the condition."""
        return any(level.guidance.directed for level in self.levels)

    @property
    def _family(self) -> Family:
        """The family of the best level's model."""
        return FAMILIES[self.levels[-1].kind]

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image in pixels."""
        if self.decoder is None:
            return self.sample_shape
        digest = self.decoder.sha256.get("config.json", "")
        config = read_object(self.place(f"{self.decoder.path}/config.json", digest), "decoder's configuration")
        factor = upscaling(config)
        # Autoencoders without this key take and make the same channels.
        channels = int(config.get("out_channels") or config["in_channels"])
        return channels, self.sample_shape[1] * factor, self.sample_shape[2] * factor

    @property
    def source(self) -> str:
        """The argument of `load` for this ladder: the name, valid on any machine, if it is bundled, else the folder."""
        return self.folder.name if self.folder.parent == PACKAGE else str(self.folder)

    @cached_property
    def process(self) -> Process:
        """The process of the scheduler's configuration, for the family of the best level's model."""
        family = FAMILIES.get(self.levels[-1].kind)
        build = partial(family.process, shape=self.sample_shape) if family else process_of
        return read_process(self.folder, build)

    @property
    def scheduler(self) -> dict[str, Any]:
        """The diffusers scheduler configuration."""
        return read_object(self.folder / SCHEDULER, "noise schedule")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of every entry that affects the samples: all but names, measured costs and errors."""
        identity: dict[str, Any] = {
            "schema_version": self.schema_version,
            "sample_shape": self.sample_shape,
            "labels": self.labels,
            "value_range": self.value_range,
            "scheduler": self.scheduler_sha256,
            "levels": [self._identity(level) for level in self.levels],
        }
        if self.schema_version == MODELS_VERSION:
            parts = (self.decoder, self.encoder, *filter(None, [self.checker]))
            identity["parts"] = [part and [part.kind, part.sha256] for part in parts]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def _identity(self, level: Level) -> list[Any]:
        """What of a level's entry affects the samples."""
        corrects = [level.corrects] * (level.corrects not in ("", self.levels[0].name))
        if self.schema_version == SCHEMA_VERSION:
            return [level.kind, level.path, level.patch, level.prediction, level.sha256, *corrects]
        # Models are the same wherever they are.
        files = {PurePath(name).name: digest for name, digest in level.sha256.items()}
        by = next((other.sha256 for other in self.levels if other.model == level.guidance.by), None)
        guides = sorted(by.values()) if by else []
        guidance = [level.guidance.scale, level.guidance.start, level.guidance.stop, guides]
        guidance += [level.guidance.weight] * (level.guidance.weight != 1)
        return [level.kind, level.patch, level.prediction, level.precision, files, guidance, *corrects]

    def cost(self, device: str) -> np.ndarray:
        """Costs T_k on a device type, float64 (K,), in seconds per sample; those of `measured_on(device)`.

        Raises:
            UsageError: if no costs have been measured.
        """
        key = self.measured_on(device)
        return np.array([level.seconds[key] for level in self.levels])

    def costs(self, device: str) -> LevelCosts:
        """Costs of the levels on a device type, with what they share.

        Raises:
            UsageError: as for `cost`.
        """
        return self.shared_costs(self.cost(device))

    def shared_costs(self, alone: np.ndarray) -> LevelCosts:
        """Costs of the levels with the evaluations of models that they share, from T_k, float64 (K,), of each alone."""
        if not self.guided:
            return as_costs(alone)
        needed = [self._evaluations(level) for level in self.levels]
        keys = list(dict.fromkeys(key for level in needed for key in level))
        parts = np.array([[key in level for key in keys] for level in needed])
        known: dict[str, float] = {}
        # Of each model, the level with the fewest evaluations tells the time of one; those of guides come first.
        for number in np.argsort(parts.sum(1), kind="stable"):
            (model, _), *others = needed[number]
            rest = [known.get(name) for name, _ in others if name != model]
            own = len(others) - len(rest) + 1
            known.setdefault(model, max(float(alone[number]) - sum(t or 0.0 for t in rest), LEAST_SECONDS) / own)
        return LevelCosts(np.array([known[model] for model, _ in keys]), parts)

    def _evaluations(self, level: Level) -> list[tuple[str, bool]]:
        """The evaluations that a level needs: model, and whether it is unconditional."""
        own = (level.model or level.name, False)
        if not level.guidance.directed:
            return [own]
        by = level.guidance.by or level.model
        return list(dict.fromkeys([own, (by, False), (by, True)]))

    def measured_on(self, device: str) -> str:
        """The device type whose costs stand for `device`: `device` itself if it has been measured, else another.

        Raises:
            UsageError: if no costs have been measured.
        """
        known = self.levels[0].seconds
        if not known:
            raise UsageError(
                f"ladder {self.name!r} has no measured costs; run `mlem-dist ladder measure {self.folder}`"
            )
        return device if device in known else min(known)

    def stage_seconds(self, device: str) -> dict[str, float]:
        """Seconds per sample of the stages around the levels on a device type: "encode" and "decode", if there are any.

        Values measured on another device stand for those that are not known, as for `measured_on`.
        """
        parts = {"encode": self.encoder, "decode": self.decoder}
        known = {stage: part.seconds for stage, part in parts.items() if part}
        return {
            stage: max(seconds.get(device, min(seconds.values(), default=0.0)), LEAST_SECONDS)
            for stage, seconds in known.items()
        }

    @property
    def stage_bytes(self) -> dict[str, float]:
        """Bytes of the weights of each stage in the best level's precision, by the names of `stage_seconds`."""
        each = 4.0 if self.levels[-1].precision == "float32" else 2.0
        parts = {"encode": self.encoder, "decode": self.decoder}
        return {stage: each * part.parameters for stage, part in parts.items() if part}

    def cost_beside(self, cost: np.ndarray) -> np.ndarray:
        """Costs of the levels at a state at which level 1 is evaluated too, float64 (K,), in the unit of `cost` (K,).

        A level that corrects level 1 then takes its value, whose evaluation is otherwise a part of that level's cost.
        """
        residual = [self.corrected(number) == 1 for number in range(1, len(self.levels) + 1)]
        return np.asarray(np.where(residual, np.maximum(cost - cost[0], 0.0), cost))

    @property
    def weight_bytes(self) -> LevelCosts:
        """Bytes of the levels' weights, each model in its own precision; levels may share models."""
        sizes = {
            level.model or level.name: level.quantised_bytes
            or (4.0 if level.precision == "float32" else 2.0) * level.parameters
            for level in self.levels
        }
        parts = [[model in {name for name, _ in self._evaluations(level)} for model in sizes] for level in self.levels]
        return LevelCosts(np.array([*sizes.values()]), np.array(parts))

    @cached_property
    def _loader(self) -> Loader:
        return Loader(self)

    def load_level(self, number: int, device: torch.device | str, precision: str = OWN) -> nn.Module:
        """Level `number` (from 1) as a module in evaluation mode on `device`.

        A model computes in the torch dtype named `precision`, by default its own; its input and output are float32. A
        Gaussian level is always float32. Levels share what they have in common: the models, and the Gaussian levels
        that residuals correct.

        Raises:
            UsageError: if the weights are changed or unreadable, or do not match the configuration.
        """
        return self._loader.level(number, device, precision)

    def load_decoder(self, device: torch.device | str, precision: str = OWN) -> Decoder | None:
        """The decoder in evaluation mode on `device`, with weights of dtype `precision`; None if there is none.

        A decoder whose configuration says `force_upcast` is always float32, as half precision overflows in it.

        Raises:
            UsageError: as for `load_level`.
        """
        return self._loader.decoder(device, precision)

    def load_encoder(self, device: torch.device | str, precision: str = OWN) -> Encoder | None:
        """The encoder of prompts on `device`, with weights of dtype `precision`; None if there is none.

        Raises:
            UsageError: as for `load_level`, or if the package transformers is missing.
        """
        return self._loader.encoder(device, precision)

    def load_checker(self, device: str) -> SafetyChecker:
        """The safety checker on `device`, in float32.

        Raises:
            UsageError: as for `load_encoder`, or if the ladder has none.
        """
        return self._loader.checker(device)


def bundled() -> Iterator[str]:
    """The names of the ladders in the package."""
    for folder in PACKAGE.iterdir():
        if (folder / LADDER).is_file():
            yield folder.name


def _find(source: str | Path) -> Path:
    # A ladder's file is required, as a folder of another kind, such as a dataset, may have a bundled ladder's name.
    try:
        if (Path(source) / LADDER).is_file():
            return Path(source).resolve()
    except OSError as error:
        raise UsageError(f"ladder {source} cannot be read: {error.strerror}") from None
    if str(source) in bundled():
        return PACKAGE / str(source)
    if Path(source).is_dir():
        raise UsageError(
            f"{source} is not a ladder: it has no {LADDER}; give the folder that `mlem-dist train` has finished"
        )
    raise UsageError(
        f"no ladder {str(source)!r}: expected a ladder folder or one of {', '.join(sorted(bundled())) or 'none'}"
    )
