"""The modules of a ladder: levels, decoder and encoder, each loaded once and kept for all that need it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import nn

from mlem_dist.errors import UsageError
from mlem_dist.ladder.schema import MODELS_VERSION, OWN, SCHEMA_VERSION, Level
from mlem_dist.models.decoder import Decoder, load_decoder
from mlem_dist.models.encoder import Encoder, load_encoder
from mlem_dist.models.families import FAMILIES
from mlem_dist.models.gaussian import GaussianLevel
from mlem_dist.models.guidance import Evaluation, GuidedLevel, ScaledLevel
from mlem_dist.models.level import ModelLevel
from mlem_dist.models.safety import SafetyChecker
from mlem_dist.models.weights import load_model, loading
from mlem_dist.solver.condition import Condition

if TYPE_CHECKING:
    from mlem_dist.ladder.ladder import Ladder

WIDE = 64
"""Smallest number of channels in a UNet's widest block for which CPUs use the channels-last format. It makes such UNets
1.0 to 1.3 times as fast (layout.py in benchmarks/runtime), but some narrower UNets slower."""


class Loader:
    """Loads the modules of a ladder. Modules may be loaded in inference mode first, and used with derivatives later."""

    def __init__(self, ladder: Ladder) -> None:
        self.ladder = ladder
        self._gaussians: dict[tuple[int, str], GaussianLevel] = {}
        self._models: dict[tuple[str, str, str], ModelLevel] = {}
        self._decoders: dict[tuple[str, str], Decoder] = {}
        self._encoders: dict[tuple[str, str], Encoder] = {}
        self._texts: dict[tuple[str, str], Condition] = {}

    @torch.inference_mode(False)
    def level(self, number: int, device: torch.device | str, precision: str) -> nn.Module:
        """As `Ladder.load_level`."""
        level, key = self.ladder.levels[number - 1], (number, str(device))
        if gaussian := self._gaussians.get(key):
            return gaussian
        self.ladder.check_files(level)
        with loading(f"level {level.name!r}"):
            if level.kind == "gaussian":
                module: nn.Module = self._gaussian(level)
            else:
                module = self._evaluations(number, device, precision)
        module = module.eval().requires_grad_(False).to(device)
        if isinstance(module, GaussianLevel):
            self._gaussians[key] = module
        return module

    def _gaussian(self, level: Level) -> GaussianLevel:
        return GaussianLevel.of_state(load_file(self.ladder.folder / level.path), self.ladder.process)

    def _evaluations(self, number: int, device: torch.device | str, precision: str) -> nn.Module:
        """A level of a model: its evaluation, alone or with guidance."""
        level, model = self.ladder.levels[number - 1], self._model(number, device, precision)
        if self.ladder.schema_version == SCHEMA_VERSION:
            return model
        guidance = level.guidance
        drift = ScaledLevel(model, guidance.scale) if guidance.embedded else model
        value = Evaluation(drift, level.model, False)
        if not guidance.directed:
            return value
        if guidance.embedded:
            unconditional = Evaluation(drift, level.model, True)
            return GuidedLevel(value, value, unconditional, guidance.weight, (0.0, 1.0), self.ladder.process, False)
        by = guidance.by or level.model
        guide = self._model([other.model for other in self.ladder.levels].index(by) + 1, device, precision)
        evaluations = value, Evaluation(guide, by, False), Evaluation(guide, by, True)
        return GuidedLevel(*evaluations, guidance.scale, (guidance.start, guidance.stop), self.ladder.process)

    def _model(self, number: int, device: torch.device | str, precision: str) -> ModelLevel:
        """The drift of a level's model without guidance. Of each model of schema 2, there is one on a device."""
        ladder, level, corrects = self.ladder, self.ladder.levels[number - 1], self.ladder.corrected(number)
        precision = self._precision(number, precision)
        key = level.path, str(device), precision
        if loaded := self._models.get(key):
            return loaded
        family, dtype = FAMILIES[level.kind], getattr(torch, precision)
        model = load_model(family.model_class(), ladder.place(level.path), precision)
        widths = model.config.get("block_out_channels") or [0]
        if torch.device(device).type == "cpu" and max(widths) >= WIDE:
            model.to(memory_format=torch.channels_last)
        gaussian = self.level(corrects, device, precision) if corrects else None
        assert gaussian is None or isinstance(gaussian, GaussianLevel)
        module = ModelLevel(model, level.patch, level.prediction, ladder.process, gaussian, dtype, corrects, family)
        module = module.eval().requires_grad_(False).to(device)
        if ladder.schema_version == MODELS_VERSION:
            self._models[key] = module
        return module

    def _precision(self, number: int, precision: str) -> str:
        """The precision of a level's model in a job of the given precision."""
        return self.ladder.levels[number - 1].precision if precision == OWN else precision

    @torch.inference_mode(False)
    def decoder(self, device: torch.device | str, precision: str) -> Decoder | None:
        """As `Ladder.load_decoder`."""
        part = self.ladder.decoder
        if part is None:
            return None
        precision = self._precision(len(self.ladder.levels), precision)
        key = str(device), precision
        if key not in self._decoders:
            self.ladder.check_part(part)
            path = self.ladder.place(part.path)
            with loading(f"decoder {path}"):
                self._decoders[key] = load_decoder(part.kind, path, precision).to(device)
        return self._decoders[key]

    @torch.inference_mode(False)
    def encoder(self, device: torch.device | str, precision: str) -> Encoder | None:
        """As `Ladder.load_encoder`."""
        part = self.ladder.encoder
        if part is None:
            return None
        ladder, precision = self.ladder, self._precision(len(self.ladder.levels), precision)
        key = str(device), precision
        if key not in self._encoders:
            ladder.check_part(part)
            path = ladder.place(part.path)
            with loading(f"text encoders of {path}"):
                encoder = load_encoder(path, part.kind, ladder.image_shape[1:], ladder.guided, device, precision)
            self._encoders[key] = encoder
        return self._encoders[key]

    @torch.inference_mode(False)
    def checker(self, device: str) -> SafetyChecker:
        """As `Ladder.load_checker`."""
        part = self.ladder.checker
        if part is None:
            raise UsageError(f"ladder {self.ladder.name!r} has no safety checker, as its pipeline has none")
        self.ladder.check_part(part)
        path = self.ladder.place(part.path)
        with loading(f"safety checker of {path}"):
            return SafetyChecker(path, device)

    @torch.inference_mode(False)
    def encoded(self, text: str, device: torch.device) -> Condition:
        """The condition of a prompt without a negative prompt, for a batch of one; it is kept."""
        key = str(device)
        if (text, key) not in self._texts:
            encoder = self.encoder(device, OWN)
            assert encoder
            self._texts[text, key] = encoder([text], [None])
        return self._texts[text, key]
