"""A ladder: the ordered levels of one drift, as a folder on disk.

LADDER/ladder.json                       see schema.py
LADDER/scheduler/scheduler_config.json   noise schedule, diffusers format
LADDER/<gaussian>.safetensors            a Gaussian level
LADDER/<unet>/config.json, *.safetensors a UNet level, an ordinary diffusers `UNet2DModel` folder
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mlem_dist.errors import UsageError
from mlem_dist.files import check_text, read_object
from mlem_dist.ladder.checks import check_digest, check_model_folder, check_present, read_process, tensor_shape
from mlem_dist.ladder.schema import (
    LADDER,
    SCHEDULER,
    SCHEMA_VERSION,
    Level,
    parse_level,
    parse_sample_shape,
    parse_value_range,
)
from mlem_dist.models.gaussian import GaussianLevel
from mlem_dist.models.imports import quiet_diffusers
from mlem_dist.models.unet import UNetLevel, check_condition, check_prediction, on_meta
from mlem_dist.solver.condition import LABEL, Condition
from mlem_dist.solver.process import Process

PACKAGE = Path(str(files("mlem_dist.ladder")))

WIDE = 64
"""Smallest number of channels in a UNet's widest block for which CPUs use the channels-last format. It makes such UNets
1.0 to 1.3 times as fast (layout.py in benchmarks/runtime), but some narrower UNets slower."""


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
    """

    folder: Path
    name: str
    sample_shape: tuple[int, int, int]
    labels: tuple[str, ...]
    value_range: tuple[float, float]
    levels: tuple[Level, ...]
    scheduler_sha256: str

    @classmethod
    def load(cls, source: str | Path) -> Ladder:
        """Read and validate a ladder, by bundled name or folder, without loading weights. Pickle files are never read.

        Raises:
            UsageError: if there is no ladder of that name, a file is missing or changed, the schema version is unknown,
                or entries contradict each other.
        """
        ladder = cls.read(source)
        for level in ladder.levels:
            ladder._check_files(level)
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
        if raw.get("schema_version") != SCHEMA_VERSION:
            raise UsageError(f"{path}: schema_version is {raw.get('schema_version')!r}, expected {SCHEMA_VERSION}")
        try:
            ladder = cls(
                folder=folder,
                name=str(raw["name"]),
                sample_shape=parse_sample_shape(raw["sample_shape"]),
                labels=tuple(map(str, raw["labels"])),
                value_range=parse_value_range(raw["value_range"]),
                levels=tuple(map(parse_level, raw["levels"])),
                scheduler_sha256=str(raw["scheduler_sha256"]),
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

    def _validate(self) -> None:
        names = [level.name for level in self.levels]
        if not names or len(set(names)) != len(names):
            raise UsageError(f"{self.folder}: expected at least one level and no name twice, got {names}")
        check_text((self.name, *names, *self.labels), str(self.folder))
        if len(set(self.labels)) != len(self.labels):
            raise UsageError(f"{self.folder}: labels has a name twice: {', '.join(self.labels)}")
        check_digest(self.folder, SCHEDULER, self.scheduler_sha256)
        _ = self.process
        for level in self.levels:
            if level.kind == "unet":
                check_model_folder(level, self.folder / level.path)
            for name in level.sha256:
                check_present(self.folder, name)
            for name in self._files(level):
                if name not in level.sha256:
                    raise UsageError(
                        f"{self.folder / LADDER}: sha256 of level {level.name!r} lacks {name}, by which a change of it "
                        "would be noticed; add it"
                    )
            self._check_level(level)
        for device in {device for level in self.levels for device in level.seconds}:
            if any(level.seconds.get(device, 0) <= 0 for level in self.levels):
                raise UsageError(f"{self.folder}: not every level has a positive cost in seconds for device {device!r}")

    def _files(self, level: Level) -> list[str]:
        """The paths of a level's files, relative to the folder."""
        path = self.folder / level.path
        if level.kind == "gaussian":
            return [level.path]
        files = {path / "config.json", *path.glob("*.safetensors"), *path.glob("*.index.json")}
        return sorted(file.relative_to(self.folder).as_posix() for file in files)

    def _check_files(self, level: Level) -> None:
        for name, digest in level.sha256.items():
            check_digest(self.folder, name, digest)

    def _check_level(self, level: Level) -> None:
        """Refuse a level that does not fit the ladder's sample shape and labels."""
        if level.kind == "gaussian":
            shape = [max(1, len(self.labels)), math.prod(self.sample_shape)]
            self._check_fit(level, {"mean": tensor_shape(self.folder / level.path, "mean")}, {"mean": shape})
        elif level.kind == "unet":
            self._check_unet(level)
        else:
            raise UsageError(f"level {level.name!r}: kind is {level.kind!r}, expected gaussian or unet")

    def _check_unet(self, level: Level) -> None:
        channels, height, width = self.sample_shape
        check_prediction(level.name, level.prediction, self.process)
        if level.prediction == "residual":
            self._check_residual(level)
        if height % level.patch or width % level.patch:
            raise UsageError(f"level {level.name!r}: {height}x{width} is not divisible by patch {level.patch}")
        config = self._config(level)
        if config.get("_class_name") != "UNet2DModel":
            raise UsageError(f"level {level.name!r}: its model is a {config.get('_class_name')}, expected UNet2DModel")
        size = config.get("sample_size")
        inner = channels * level.patch**2
        expected = {
            "in_channels": 2 * inner if level.prediction == "residual" else inner,
            "out_channels": inner,
            "sample_size": [height // level.patch, width // level.patch],
            "num_class_embeds": len(self.labels) or None,
        }
        self._check_fit(level, config | {"sample_size": size if isinstance(size, list) else [size, size]}, expected)
        check_condition(level.name, config, self.process)

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
        """The configuration of a UNet level's model."""
        return read_object(self.folder / level.path / "config.json", "model configuration")

    def check_models(self) -> None:
        """Refuse a UNet level that cannot be built or fails on samples of the ladder's shape.

        This check comes before a run writes anything. It imports diffusers, which takes seconds. Bundled ladders are
        known to pass and are skipped.

        Raises:
            UsageError: if the check fails, with the level's name and diffusers' reason.
        """
        for level in self.levels:
            if level.kind == "unet" and self.folder.parent != PACKAGE:
                on_meta(level.name, self.sample_shape, level.patch, partial(self._untrained, level))

    def _untrained(self, level: Level) -> UNetLevel:
        """A UNet level with initial weights, from its configuration alone."""
        from diffusers import UNet2DModel

        gaussian = GaussianLevel(1, 1, 1, self.process) if level.prediction == "residual" else None
        model = UNet2DModel.from_config(self._config(level))
        return UNetLevel(model, level.patch, level.prediction, self.process, gaussian)

    def condition(self, samples: Tensor) -> Condition:
        """The condition of samples, by their numbers, int64 (B,): they take the classes in turn."""
        return {LABEL: samples % len(self.labels)} if self.labels else {}

    @property
    def source(self) -> str:
        """The argument of `load` for this ladder: the name, valid on any machine, if it is bundled, else the folder."""
        return self.folder.name if self.folder.parent == PACKAGE else str(self.folder)

    @cached_property
    def process(self) -> Process:
        """The process of the scheduler's configuration."""
        return read_process(self.folder)

    @property
    def scheduler(self) -> dict[str, Any]:
        """The diffusers scheduler configuration."""
        return read_object(self.folder / SCHEDULER, "noise schedule")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of every entry that affects the samples: all but names, measured costs and errors."""
        identity = {
            "schema_version": SCHEMA_VERSION,
            "sample_shape": self.sample_shape,
            "labels": self.labels,
            "value_range": self.value_range,
            "scheduler": self.scheduler_sha256,
            "levels": [
                [level.kind, level.path, level.patch, level.prediction, level.sha256]
                + [level.corrects] * (level.corrects not in ("", self.levels[0].name))
                for level in self.levels
            ],
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def cost(self, device: str) -> np.ndarray:
        """Costs T_k on a device type, float64 (K,), in seconds per sample; those of `measured_on(device)`.

        Raises:
            UsageError: if no costs have been measured.
        """
        key = self.measured_on(device)
        return np.array([level.seconds[key] for level in self.levels])

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

    def cost_beside(self, cost: np.ndarray) -> np.ndarray:
        """Costs of the levels at a state at which level 1 is evaluated too, float64 (K,), in the unit of `cost` (K,).

        A level that corrects level 1 then takes its value, whose evaluation is otherwise a part of that level's cost.
        """
        residual = [self.corrected(number) == 1 for number in range(1, len(self.levels) + 1)]
        return np.asarray(np.where(residual, np.maximum(cost - cost[0], 0.0), cost))

    @property
    def weight_bytes(self) -> np.ndarray:
        """Bytes of each level's weights in float32, float64 (K,)."""
        return np.array([4.0 * level.parameters for level in self.levels])

    # A level may be loaded in inference mode first, and used with derivatives later.
    @torch.inference_mode(False)
    def load_level(self, number: int, device: torch.device | str, precision: str = "float32") -> nn.Module:
        """Level `number` (from 1) as a module in evaluation mode on `device`.

        A UNet computes in the torch dtype named `precision`; its input and output are float32. A Gaussian level is
        always float32. There is one of each on a device, which the residual UNets there share.

        Raises:
            UsageError: if the weights are unreadable or do not match the configuration.
        """
        level, key = self.levels[number - 1], str(device)
        if gaussian := self._gaussians.get((number, key)):
            return gaussian
        self._check_files(level)
        try:
            if level.kind == "gaussian":
                module: nn.Module = self._load_gaussian(level)
            else:
                module = self._load_unet(number, device, precision)
        except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
            raise UsageError(f"level {level.name!r} cannot be loaded: {' '.join(str(error).split())}") from None
        module = module.eval().requires_grad_(False).to(device)
        if isinstance(module, GaussianLevel):
            self._gaussians[number, key] = module
        return module

    @cached_property
    def _gaussians(self) -> dict[tuple[int, str], GaussianLevel]:
        """The Gaussian levels that have been loaded, by number and device."""
        return {}

    def _load_gaussian(self, level: Level) -> GaussianLevel:
        state = {key: value.float() for key, value in load_file(self.folder / level.path).items()}
        classes, d, rank = state["basis"].shape
        module = GaussianLevel(classes, d, rank, self.process)
        module.load_state_dict(state)
        module.orthonormalise()
        return module

    def _load_unet(self, number: int, device: torch.device | str, precision: str) -> nn.Module:
        from diffusers import UNet2DModel

        level, corrects = self.levels[number - 1], self.corrected(number)
        with quiet_diffusers():
            model, info = UNet2DModel.from_pretrained(
                self.folder / level.path,
                torch_dtype=getattr(torch, precision),
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        # Diffusers only warns, and leaves missing weights at random values.
        for what, names in (("lack", info["missing_keys"]), ("hold what it does not know,", info["unexpected_keys"])):
            if names:
                raise ValueError(f"its weights {what} {sorted(names)[0]}; restore them, or its config.json")
        if torch.device(device).type == "cpu" and max(model.config["block_out_channels"]) >= WIDE:
            model.to(memory_format=torch.channels_last)
        gaussian = self.load_level(corrects, device) if corrects else None
        assert gaussian is None or isinstance(gaussian, GaussianLevel)
        dtype = getattr(torch, precision)
        return UNetLevel(model, level.patch, level.prediction, self.process, gaussian, dtype, corrects)


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
