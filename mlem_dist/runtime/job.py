"""A job: everything that decides the samples of a dataset, and the block computation that every engine shares."""

from __future__ import annotations

import json
import platform
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow
import torch
from torch import Tensor

from mlem_dist import __version__
from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.levels import PRECISIONS, GaussianLevel
from mlem_dist.solver.closed_form import AffineDrift, ClosedForm
from mlem_dist.solver.integrate import Noise, Request, block_noise, block_rng, trajectory
from mlem_dist.solver.plan import Plan, Recipe, plan_to_dict
from mlem_dist.solver.steps import SOLVERS, StepTable, solver_table

MOST_SHARDS = 10**6

BLOCK_SIZE = {"cpu": 100, "cuda": 500}
"""By default, by device type: on a large GPU blocks of 100 take more than twice as long per sample (gpu.py in
benchmarks/runtime)."""

SAMPLED_BLOCKS = 16
"""Of a recipe, so many draws tell what all will take."""


class NonFiniteError(RuntimeError):
    """A block ended with NaN or infinite values."""


def versions() -> dict[str, str]:
    """The versions that decide bytes."""
    return {
        "mlem_dist": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pyarrow": pyarrow.__version__,
    }


@dataclass(frozen=True)
class Job:
    """What to generate.

    Attributes:
        ladder: name or folder, as every node of the cluster finds it.
        digest: the ladder's digest.
        num: number of samples.
        labels: the classes to generate, in turn by sample id; (0,) for an unconditional ladder.
        solver: one of `SOLVERS`.
        steps: N.
        plan: a memorised plan for all blocks, or the recipe by which each block draws its own.
        seed: decides every noise and coin.
        block_size: samples that advance together.
        shard_size: samples of one file, a multiple of the block size.
        device: "cpu" or "cuda".
        precision: of the UNets, one of `PRECISIONS`.
        versions: of what decides bytes, where the job was made; no part of `config`.

    Raises:
        UsageError: a value is out of range.
    """

    ladder: str
    digest: str
    num: int
    labels: tuple[int, ...]
    solver: str
    steps: int
    plan: Plan | Recipe
    seed: int
    block_size: int
    shard_size: int
    device: str
    precision: str = "float32"
    versions: dict[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        for name in ("num", "steps", "block_size", "shard_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}, expected 0 or more")
        if self.solver not in SOLVERS:
            raise UsageError(f"solver is {self.solver!r}, expected one of {', '.join(SOLVERS)}")
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision is {self.precision!r}, expected one of {', '.join(PRECISIONS)}")
        if self.plan.collapse and self.solver == "dpm++":
            raise UsageError(
                "the plan takes runs of base steps in closed form, which --solver dpm++ cannot; draw another"
            )
        if self.shards > MOST_SHARDS:
            raise UsageError(
                f"{self.num:,} samples in shards of {self.shard_size} are {self.shards:,} files; raise the shard size"
            )
        if self.shard_size % self.block_size:
            lower = max(1, self.shard_size // self.block_size) * self.block_size
            raise UsageError(
                f"the shard size {self.shard_size} is not a multiple of the block size {self.block_size}; take {lower}"
            )

    @property
    def config(self) -> dict[str, Any]:
        """The job as JSON-ready values; its fingerprint decides whether a dataset can be resumed."""
        config = {key: getattr(self, key) for key in self.__dataclass_fields__ if key != "versions"}
        if isinstance(self.plan, Plan):
            config["plan"] = plan_to_dict(self.plan, self.digest, self.solver)
        else:
            config["plan"] = asdict(self.plan)
        # As it comes back from the manifest: tuples and arrays are lists there.
        found: dict[str, Any] = json.loads(json.dumps(config, default=np.ndarray.tolist))
        return found

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.num // self.shard_size)

    def shard_rows(self, shard: int) -> range:
        """The sample ids of a shard."""
        return range(shard * self.shard_size, min(self.num, (shard + 1) * self.shard_size))

    def shard_samples(self, shard: int) -> tuple[int, list[int]]:
        """The first sample id of a shard, and the classes of its samples."""
        rows = self.shard_rows(shard)
        return rows.start, [self.label(i) for i in rows]

    def shard_blocks(self, shard: int) -> range:
        """The blocks that hold a shard's samples; the last may reach beyond it."""
        rows = self.shard_rows(shard)
        return range(rows.start // self.block_size, -(-rows.stop // self.block_size))

    def rows_of(self, shard: int, block: int) -> int:
        """How many of a shard's samples a block holds."""
        first = block * self.block_size
        return min(self.shard_rows(shard).stop, first + self.block_size) - first

    def label(self, sample_id: int) -> int:
        """The class of a sample."""
        return self.labels[sample_id % len(self.labels)]

    def block_plan(self, block: int) -> Plan:
        """The plan of a block: the memorised one, or its own draw."""
        if isinstance(self.plan, Plan):
            return self.plan
        return self.plan.plan(block_rng(self.seed, block))

    @property
    def first_plans(self) -> tuple[Plan, ...]:
        """Those of the first blocks, by which loads are reckoned; the one that all blocks have."""
        return _first_plans(self.plan, self.seed)

    def expected_calls(self) -> np.ndarray:
        """Evaluations of each level per sample, float64 (K,), averaged over the first plans."""
        return np.mean([plan.calls.sum(1) for plan in self.first_plans], axis=0)


@lru_cache(maxsize=4)
def _first_plans(plan: Plan | Recipe, seed: int) -> tuple[Plan, ...]:
    if isinstance(plan, Plan):
        return (plan,)
    return tuple(plan.plan(block_rng(seed, block)) for block in range(SAMPLED_BLOCKS))


class Blocks:
    """The computation of a job's blocks, apart from who evaluates the levels."""

    def __init__(self, job: Job, ladder: Ladder) -> None:
        if ladder.digest != job.digest:
            raise UsageError(
                f"the ladder {job.ladder!r} on {platform.node()} is not the one that the job was made for; every node "
                "must find the same one there"
            )
        for name, version in versions().items():
            # What follows a plus says for which devices it was built.
            if version.partition("+")[0] != job.versions[name].partition("+")[0]:
                raise UsageError(
                    f"{name} on {platform.node()} is {version}, and {job.versions[name]} where the run was started; "
                    "install the same versions on every node"
                )
        self.job = job
        self.ladder = ladder
        self._latest: tuple[int, Tensor, ClosedForm | None] | None = None

    @cached_property
    def table(self) -> StepTable:
        """The solver's steps."""
        return solver_table(self.ladder.alpha_bar, self.job.steps, self.job.solver)

    def label(self, block: int) -> Tensor:
        """int64 (B,): the classes of a block's samples, on the job's device."""
        return self._labelled(block)[1]

    def noise(self, block: int) -> Noise:
        """The block's noise; of whole blocks always, so that a sample does not depend on `num`."""
        shape = (self.job.block_size, *self.ladder.sample_shape)
        return block_noise(self.job.seed, block, shape, self.job.device)

    @cached_property
    def _affine(self) -> AffineDrift:
        level = self.ladder.load_level(1, self.job.device)
        assert isinstance(level, GaussianLevel)
        return level.affine(self.table.t)

    def closed_form(self, block: int) -> ClosedForm | None:
        """How a block takes runs of steps with level 1, if its plan collapses them."""
        return self._labelled(block)[2]

    def _labelled(self, block: int) -> tuple[int, Tensor, ClosedForm | None]:
        """What depends on a block's classes alone, after its first one's place; the last block had mostly the same."""
        place, size = block * self.job.block_size % len(self.job.labels), self.job.block_size
        latest = self._latest
        if latest is None or latest[0] != place:
            label = torch.tensor([self.job.label(place + i) for i in range(size)], device=self.job.device)
            form = ClosedForm(self._affine, self.table, label) if self.job.plan.collapse else None
            latest = self._latest = place, label, form
        return latest

    def trajectory(self, block: int) -> Generator[Request, list[Tensor], Tensor]:
        """The block's trajectory, to be driven by who evaluates the levels."""
        return trajectory(self.table, self.job.block_plan(block), self.noise(block), self.closed_form(block))

    def images(self, block: int, x: Tensor) -> np.ndarray:
        """uint8 (B, H, W, C) of a finished block x (B, C, H, W), clipped to the ladder's value range.

        Raises:
            NonFiniteError: x holds NaN or infinite values.
        """
        bad = (~x.isfinite()).flatten(1).any(1)
        if bad.any():
            first = block * self.job.block_size
            ids = [first + int(i) for i in bad.nonzero()[:, 0]]
            raise NonFiniteError(
                f"block {block}: {len(ids)} of {len(x)} samples are not finite (sample ids {ids[0]} to {ids[-1]}); "
                "the plan is too coarse for this ladder: raise --nfe or use held increments"
            )
        low, high = self.ladder.value_range
        scaled = (x.clamp(low, high) - low) * (255 / (high - low))
        images: np.ndarray = scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return images
