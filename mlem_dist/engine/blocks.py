"""The computation of blocks, which all engines share."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Generator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mlem_dist.dataset.prompts import NEGATIVE_PROMPT, PROMPT
from mlem_dist.engine.job import Job, versions
from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.models.decoder import Decoder
from mlem_dist.models.encoder import Encoder
from mlem_dist.models.gaussian import GaussianLevel
from mlem_dist.models.guidance import GUIDANCE
from mlem_dist.solver.closed_form import AffineDrift, ClosedForm
from mlem_dist.solver.condition import Condition, move
from mlem_dist.solver.integrate import Request, trajectory
from mlem_dist.solver.noise import Noise, image_noise
from mlem_dist.solver.plan import Plan
from mlem_dist.solver.steps import StepTable, solver_table

CONDITIONS, TEXT_CONDITIONS = 64, 8
"""Largest number of conditions that a process keeps, of classes and of prompts, whose embeddings are large."""


class NonFiniteError(RuntimeError):
    """A block ended with NaN or infinite values."""


class Blocks:
    """The computation of a job's blocks, except for the evaluation of the levels.

    Args:
        job: the job.
        ladder: its ladder.
        image_seed: the image seed of each sample id, by default the job's.

    Raises:
        UsageError: if the ladder, or the version of a library, is not that of the job.
    """

    def __init__(self, job: Job, ladder: Ladder, image_seed: Callable[[int], int] | None = None) -> None:
        if ladder.digest != job.digest:
            raise UsageError(
                f"the ladder {job.ladder!r} on {platform.node()} is not the one that the job was made for; every node "
                "must find the same one there"
            )
        for name, version in versions().items():
            # The part after a plus names the devices that the library was built for.
            if version.partition("+")[0] != job.versions[name].partition("+")[0]:
                raise UsageError(
                    f"{name} on {platform.node()} is {version}, and {job.versions[name]} where the run was started; "
                    "install the same versions on every node"
                )
        self.job = job
        self.ladder = ladder
        self.image_seed = image_seed
        self._conditions: dict[int, Condition] = {}
        self._lock = threading.Lock()
        self._latest: tuple[int, ClosedForm] | None = None

    @cached_property
    def table(self) -> StepTable:
        """The solver's step table."""
        return solver_table(self.ladder.process, self.job.steps, self.job.solver, self.job.grid)

    def condition(self, block: int) -> Condition:
        """The condition of a block's samples, on the job's device."""
        place = self._place(block)
        with self._lock:
            if place not in self._conditions:
                # Blocks have few conditions of classes in all, but each has prompts of its own.
                if len(self._conditions) >= (TEXT_CONDITIONS if self.job.prompts else CONDITIONS):
                    del self._conditions[next(iter(self._conditions))]
                self._conditions[place] = self._new_condition(place)
            return self._conditions[place]

    def _new_condition(self, place: int) -> Condition:
        samples = range(place, place + self.job.block_size)
        rows = self.job.rows(samples)
        if self.encoder:
            condition = move(self.encoder(rows[PROMPT], rows[NEGATIVE_PROMPT]), self.job.device)
        else:
            labels = {name: torch.tensor(row, device=self.job.device) for name, row in rows.items()}
            condition = self.ladder.completed(labels)
        scales = self.job.scales(samples)
        if scales is None:
            return condition
        return {**condition, GUIDANCE: torch.tensor(scales, dtype=torch.float32, device=self.job.device)}

    @cached_property
    def encoder(self) -> Encoder | None:
        """The encoder of prompts, on the job's device."""
        return self.ladder.load_encoder(self.job.device, self.job.precision)

    @cached_property
    def decoder(self) -> Decoder | None:
        """The decoder of latents, on the job's device."""
        return self.ladder.load_decoder(self.job.device, self.job.precision)

    def _place(self, block: int) -> int:
        """Position of a block's first sample in the job's cycle of classes, which decides the block's condition."""
        first = block * self.job.block_size
        return first if self.job.prompts else first % max(1, len(self.job.labels))

    def noise(self, block: int) -> Noise:
        """The block's noise, always for a whole block, so that a sample does not depend on `num`."""
        return image_noise(self.seeds(block), self.ladder.sample_shape, self.job.device)

    def seeds(self, block: int) -> list[int]:
        """The image seeds of a block's samples."""
        first = block * self.job.block_size
        samples = range(first, first + self.job.block_size)
        return [self.image_seed(i) for i in samples] if self.image_seed else self.job.seeds(samples)

    @cached_property
    def _base(self) -> tuple[GaussianLevel, AffineDrift]:
        """Level 1, which is a Gaussian, and its drift at the table's steps."""
        level = self.ladder.load_level(1, self.job.device)
        assert isinstance(level, GaussianLevel)
        return level, level.affine(self.table.t)

    def closed_form(self, block: int, condition: Condition) -> ClosedForm | None:
        """The closed form of a block's runs of steps with level 1; None if its plan does not collapse them."""
        if not self.job.plan.collapse:
            return None
        # The block before mostly had the same classes.
        place, latest = self._place(block), self._latest
        if latest is None or latest[0] != place:
            level, affine = self._base
            closed_form = level.closed_form(affine, self.table, condition, self.job.block_size)
            latest = self._latest = place, closed_form
        return latest[1]

    def trajectory(self, block: int, plan: Plan, condition: Condition) -> Generator[Request, list[Tensor], Tensor]:
        """The block's trajectory by its plan; the caller drives it and evaluates the levels."""
        return trajectory(self.table, plan, self.noise(block), self.closed_form(block, condition))

    def images(self, block: int, x: Tensor) -> np.ndarray:
        """The images of a finished block x (B, C, H, W), uint8 (B, H, W, C), clipped to the ladder's value range.

        Raises:
            NonFiniteError: if x, or the images that it is decoded to, hold NaN or infinite values.
        """
        if self.decoder and x.isfinite().all():
            x = self.decoder(x)
        bad = (~x.isfinite()).flatten(1).any(1)
        if bad.any():
            first = block * self.job.block_size
            ids = [first + int(i) for i in bad.nonzero()[:, 0]]
            raise NonFiniteError(
                f"block {block}: {len(ids)} of {len(x)} samples are not finite (sample ids {ids[0]} to {ids[-1]}); "
                "the plan is too coarse for this ladder: raise `nfe` or use held increments"
            )
        low, high = self.ladder.value_range
        scaled = (x.clamp(low, high) - low) * (255 / (high - low))
        images: np.ndarray = scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return images
