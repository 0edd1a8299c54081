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
from torch import nn

from mlem_dist.errors import UsageError
from mlem_dist.files import check_text, read_object
from mlem_dist.ladder.checks import check_digest, check_model_folder, check_present, tensor_shape
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
from mlem_dist.solver.process import Process, process_of

PACKAGE = Path(str(files("mlem_dist.ladder")))

WIDE = 64
"""Channels of a UNet's widest block from which CPUs compute it 1.0 to 1.3 times as fast with channels last (layout.py
in benchmarks/runtime); of the narrower ones they compute some slower."""


@dataclass(frozen=True)
class Ladder:
    """A validated ladder folder.

    Attributes:
        folder: where it lies.
        sample_shape: (C, H, W).
        labels: class names; empty for an unconditional ladder.
        value_range: what the values of a finished sample are clipped to and then mapped to 0 ... 255.
        levels: cheapest first.
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
        """Read and validate a ladder, by bundled name or folder. No weights are read into memory, no pickle ever.

        Raises:
            UsageError: nothing of that name, a missing or changed file, an unknown schema version, or entries that
                contradict each other.
        """
        ladder = cls.read(source)
        for level in ladder.levels:
            ladder._check_files(level)
        return ladder

    @classmethod
    def read(cls, source: str | Path) -> Ladder:
        """As `load`, but for the digests of levels: each is compared when the level is loaded.

        For processes that use some of the levels, and would read the files of all.

        Raises:
            UsageError: as `load`.
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
        try:
            _ = self.process
        except (TypeError, ValueError) as error:
            raise UsageError(f"{self.folder / SCHEDULER}: {error}") from None
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
        """The files that the level is read from, relative to the folder."""
        path = self.folder / level.path
        if level.kind == "gaussian":
            return [level.path]
        files = {path / "config.json", *path.glob("*.safetensors"), *path.glob("*.index.json")}
        return sorted(file.relative_to(self.folder).as_posix() for file in files)

    def _check_files(self, level: Level) -> None:
        for name, digest in level.sha256.items():
            check_digest(self.folder, name, digest)

    def _check_level(self, level: Level) -> None:
        """Refuse a level that is not made for this ladder's sample shape and labels."""
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
        if level.prediction == "residual" and (self.levels[0].kind != "gaussian" or self.value_range != (-1.0, 1.0)):
            raise UsageError(
                f"level {level.name!r}: prediction residual needs a Gaussian as first level and the value range "
                f"[-1, 1], got {self.levels[0].kind} and {list(self.value_range)}"
            )
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
        """Refuse a UNet that cannot be built, or not for samples of this shape, before anything is written of a run.

        Imports diffusers, which takes seconds. Those of the bundled ladders are known to be well.

        Raises:
            UsageError: by the level's name, with diffusers' reason.
        """
        for level in self.levels:
            if level.kind == "unet" and self.folder.parent != PACKAGE:
                on_meta(level.name, self.sample_shape, level.patch, partial(self._untrained, level))

    def _untrained(self, level: Level) -> UNetLevel:
        """A UNet level by its configuration alone."""
        from diffusers import UNet2DModel

        gaussian = GaussianLevel(1, 1, 1, self.process) if level.prediction == "residual" else None
        model = UNet2DModel.from_config(self._config(level))
        return UNetLevel(model, level.patch, level.prediction, self.process, gaussian)

    @property
    def source(self) -> str:
        """What `load` takes to find this ladder: its name if it is bundled, so on any machine, else its folder."""
        return self.folder.name if self.folder.parent == PACKAGE else str(self.folder)

    @cached_property
    def process(self) -> Process:
        """The process of the scheduler's configuration."""
        return process_of(self.scheduler)

    @property
    def scheduler(self) -> dict[str, Any]:
        """The diffusers scheduler configuration."""
        return read_object(self.folder / SCHEDULER, "noise schedule")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides the samples: everything but names, measured costs and errors."""
        identity = {
            "schema_version": SCHEMA_VERSION,
            "sample_shape": self.sample_shape,
            "labels": self.labels,
            "value_range": self.value_range,
            "scheduler": self.scheduler_sha256,
            "levels": [[level.kind, level.path, level.patch, level.prediction, level.sha256] for level in self.levels],
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def cost(self, device: str) -> np.ndarray:
        """T_k on a device type, float64 (K,), seconds per sample; of another device if this one was not measured.

        Raises:
            UsageError: no costs at all were measured.
        """
        key = self.measured_on(device)
        return np.array([level.seconds[key] for level in self.levels])

    def measured_on(self, device: str) -> str:
        """The device type whose costs are taken for `device`: its own, if they were measured.

        Raises:
            UsageError: no costs at all were measured.
        """
        known = self.levels[0].seconds
        if not known:
            raise UsageError(
                f"ladder {self.name!r} has no measured costs; run `mlem-dist ladder measure {self.folder}`"
            )
        return device if device in known else min(known)

    def cost_beside(self, cost: np.ndarray) -> np.ndarray:
        """Costs of levels where level 1 is evaluated at the same state, from their `cost` (K,) alone.

        Float64 (K,): a residual takes the value of level 1, which is otherwise a part of its own cost.
        """
        residual = [level.prediction == "residual" for level in self.levels]
        return np.asarray(np.where(residual, np.maximum(cost - cost[0], 0.0), cost))

    @property
    def weight_bytes(self) -> np.ndarray:
        """Bytes of each level's weights in float32, float64 (K,)."""
        return np.array([4.0 * level.parameters for level in self.levels])

    def load_level(self, number: int, device: torch.device | str, precision: str = "float32") -> nn.Module:
        """Level `number` (from 1) as a module in evaluation mode on `device`.

        A UNet computes in the torch type named `precision`, and takes and returns float32 in any; a Gaussian level is
        always float32. The Gaussian that residual UNets take is one for all on a device, and the first level there.

        Raises:
            UsageError: its weights are unreadable, or not those of its configuration.
        """
        level, key = self.levels[number - 1], str(device)
        if number == 1 and key in self._gaussians:
            return self._gaussians[key]
        self._check_files(level)
        try:
            if level.kind == "gaussian":
                module: nn.Module = self._load_gaussian(level)
            else:
                module = self._load_unet(level, device, precision)
        except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
            raise UsageError(f"level {level.name!r} cannot be loaded: {' '.join(str(error).split())}") from None
        module = module.eval().requires_grad_(False).to(device)
        if number == 1 and isinstance(module, GaussianLevel):
            self._gaussians[key] = module
        return module

    @cached_property
    def _gaussians(self) -> dict[str, GaussianLevel]:
        """The first level by device, where it is a Gaussian and has been loaded."""
        return {}

    def _load_gaussian(self, level: Level) -> GaussianLevel:
        state = {key: value.float() for key, value in load_file(self.folder / level.path).items()}
        classes, d, rank = state["basis"].shape
        module = GaussianLevel(classes, d, rank, self.process)
        module.load_state_dict(state)
        module.orthonormalise()
        return module

    def _load_unet(self, level: Level, device: torch.device | str, precision: str) -> nn.Module:
        from diffusers import UNet2DModel

        with quiet_diffusers():
            model, info = UNet2DModel.from_pretrained(
                self.folder / level.path,
                torch_dtype=getattr(torch, precision),
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        # Diffusers only warns, and leaves at random what it has not found.
        for what, names in (("lack", info["missing_keys"]), ("hold what it does not know,", info["unexpected_keys"])):
            if names:
                raise ValueError(f"its weights {what} {sorted(names)[0]}; restore them, or its config.json")
        if torch.device(device).type == "cpu" and max(model.config["block_out_channels"]) >= WIDE:
            model.to(memory_format=torch.channels_last)
        gaussian = self.load_level(1, device) if level.prediction == "residual" else None
        assert gaussian is None or isinstance(gaussian, GaussianLevel)
        return UNetLevel(model, level.patch, level.prediction, self.process, gaussian, getattr(torch, precision))


def bundled() -> Iterator[str]:
    """The names of the ladders in the package."""
    for folder in PACKAGE.iterdir():
        if (folder / LADDER).is_file():
            yield folder.name


def _find(source: str | Path) -> Path:
    # A dataset may be named like a bundled ladder.
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
