"""A job: everything that decides the samples of a dataset. This module does not need torch."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mlem_dist import __version__
from mlem_dist.dataset.keep import Condition
from mlem_dist.dataset.prompts import SEEDS, PromptTable
from mlem_dist.dataset.schema import SEED, schema
from mlem_dist.dataset.shards import PNG, Encoding, shard_path, waiting_path
from mlem_dist.errors import UsageError
from mlem_dist.ladder.schema import OWN
from mlem_dist.ladder.schema import PRECISIONS as MODEL_PRECISIONS
from mlem_dist.solver.plan import Plan, Recipe, block_rng, plan_to_dict
from mlem_dist.solver.steps import SOLVERS, SPACINGS, Spacing

MAX_SHARDS = 10**6

NOISE_VERSION = 2
"""Version of the noise: 1 was a function of the block, until 0.3; 2 is a function of the image seed."""

PRECISIONS = (*MODEL_PRECISIONS, OWN)
"""Data types of models' weights and activations, by torch's names, or "own" for that of each model."""

SAMPLED_BLOCKS = 16
"""Number of a recipe's draws from which loads are estimated."""


def versions() -> dict[str, str]:
    """The versions of the software that decides the bytes of a dataset."""
    libraries = {name: version(name) for name in ("torch", "numpy", "pyarrow")}
    own = {"mlem_dist": __version__, "mlem_dist's source": _source_digest()}
    return own | {"python": platform.python_version()} | libraries


@lru_cache(maxsize=1)
def _source_digest() -> str:
    """SHA-256 of this package's source, shortened: a checkout may have changed since the version that it names."""
    digest = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Workload:
    """The part of a job that decides how long it takes, not which samples it makes.

    Attributes:
        num: number of samples.
        plan: a memorised plan for all blocks, or the recipe by which each block draws its own.
        seed: seed of every draw of a plan.
        block_size: number of samples that advance together.
        shard_size: number of samples per file.
        precision: data type of the models, one of `PRECISIONS`.
    """

    num: int
    plan: Plan | Recipe
    seed: int
    block_size: int
    shard_size: int
    precision: str = "float32"

    def block_plan(self, block: int) -> Plan:
        """The plan of a block: the memorised one, or its own draw."""
        if isinstance(self.plan, Plan):
            return self.plan
        if self.plan.draw == "quantiles":
            return self.first_plans[0]
        return self.plan.plan(block_rng(self.seed, block))

    @property
    def first_plans(self) -> tuple[Plan, ...]:
        """The plans of the first blocks, from which loads are estimated; a single plan if all blocks share it."""
        return _first_plans(self.plan, self.seed)

    def expected_calls(self) -> np.ndarray:
        """Mean number of evaluations of each level per sample over the first plans, float64 (K,)."""
        return np.mean([plan.calls.sum(1) for plan in self.first_plans], axis=0)


@dataclass(frozen=True)
class Job:
    """The dataset to generate.

    Attributes:
        ladder: name or folder, as every node of the cluster finds it.
        digest: the ladder's digest.
        num: number of samples.
        labels: the classes to generate, in turn by sample id; empty for an unconditional ladder.
        solver: one of `SOLVERS`.
        steps: N, the number of base steps.
        plan: a memorised plan for all blocks, or the recipe by which each block draws its own.
        seed: the image seed of sample 0, and the seed of drawn plans; sample i has the image seed `seed` + i.
        block_size: number of samples that advance together.
        shard_size: number of samples per file, a multiple of the block size.
        device: "cpu" or "cuda".
        precision: data type of the models, one of `PRECISIONS`.
        grid: spacing of the steps, as for `Process.grid`.
        prompts: the table of prompts; None for a ladder without prompts.
        negative_prompt: the negative prompt of all samples, for a table without a column of them; None for none.
        guidance: scale of guidance of samples whose row has none; None for that of the ladder, if no row has one.
        encoding: format of the image files.
        scores: classes that score images, by MODULE:CLASS.
        keep: condition on the columns of rows that are written; None for all.
        until: number of rows to keep, the first by id; None for all that `keep` holds for.
        scores_folder, score_types: the folder in which their modules may lie, and the types of their columns by name;
            not a part of `config`.
        versions: versions of the software that decides bytes, where the job was made; not a part of `config`.

    Raises:
        UsageError: if a value is out of range.
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
    grid: Spacing = "trailing"
    prompts: PromptTable | None = None
    negative_prompt: str | None = None
    guidance: float | None = None
    encoding: Encoding = PNG
    scores: tuple[str, ...] = ()
    keep: Condition | None = None
    until: int | None = None
    scores_folder: str = ""
    score_types: dict[str, pa.DataType] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        for name in ("num", "steps", "block_size", "shard_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.solver not in SOLVERS:
            raise UsageError(f"solver is {self.solver!r}, expected one of {', '.join(SOLVERS)}")
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision is {self.precision!r}, expected one of {', '.join(PRECISIONS)}")
        if self.grid not in SPACINGS:
            raise UsageError(f"`grid` {self.grid!r}: expected one of {', '.join(SPACINGS)}")
        if self.plan.collapse and self.solver == "dpm++":
            raise UsageError(
                "the plan takes runs of base steps in closed form, which `solver` dpm++ cannot; draw another"
            )
        if self.prompts and self.num > (most := self.prompts.rows * self.prompts.images):
            raise UsageError(
                f"`num` {self.num:,}: expected at most {most:,}, the number of prompts"
                + (f" times {self.prompts.images}" if self.prompts.images > 1 else "")
            )
        if self.until is not None:
            _check_until(self.until, self.keep, self.num)
        check_shards(self.workload)
        if self.num > SEEDS:
            raise UsageError(f"`num` {self.num:,}: expected at most {SEEDS:,}, the number of image seeds")
        if not 0 <= self.seed <= SEEDS - self.num:
            raise UsageError(
                f"`seed` {self.seed}: expected 0 to {SEEDS - self.num}, as sample i has the image seed `seed` + i, and "
                f"image seeds lie below {SEEDS}"
            )

    @property
    def config(self) -> dict[str, Any]:
        """The job as JSON-ready values; their fingerprint says which shards of a folder are the job's own."""
        # Versions are beside the configuration; the others are in it only if there are any.
        given = "prompts", "negative_prompt", "guidance", "encoding", "scores", "scores_folder", "score_types"
        left_out = ("versions", *given, "keep", "until")
        config = {key: getattr(self, key) for key in self.__dataclass_fields__ if key not in left_out}
        if isinstance(self.plan, Plan):
            config["plan"] = plan_to_dict(self.plan, self.digest, self.solver)
        else:
            config["plan"] = asdict(self.plan)
        config["noise_version"] = NOISE_VERSION
        if self.prompts:
            table = self.prompts
            config["prompts_sha256"], config["prompt_column"] = table.digest, table.prompt
            config["images_per_prompt"], config["negative_prompt"] = table.images, self.negative_prompt
            stored = self.table_schema
            config["columns"] = {field.name: str(field.type) for field in stored or () if field.name != SEED}
        if self.guidance is not None:
            config["guidance"] = self.guidance
        if self.scores:
            config["scores"] = self.scores
        if self.keep:
            config["keep"] = self.keep.text
        if self.until:
            config["until"] = self.until
        if self.encoding != PNG:
            config["image_format"], config["image_quality"] = self.encoding.format, self.encoding.quality
        # As read back from the manifest, where tuples and arrays are lists.
        plain: dict[str, Any] = json.loads(json.dumps(config, default=np.ndarray.tolist))
        return plain

    def schema(self, scores: Sequence[pa.Field] = ()) -> pa.Schema:
        """The dataset's columns; `scores` are those of scores."""
        return schema(("",) if self.labels else (), self.table_schema, scores)

    @property
    def table_schema(self) -> pa.Schema | None:
        """The columns of the dataset that are those of the table of prompts; None without one."""
        return self.prompts.stored_schema(self.negative_prompt) if self.prompts else None

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.num // self.shard_size)

    def shard_path(self, shard: int) -> str:
        """The path of a shard when it is made, relative to the dataset folder."""
        return waiting_path(shard) if self.until else shard_path(shard, self.shards)

    def shard_rows(self, shard: int) -> range:
        """The sample ids of a shard."""
        return range(shard * self.shard_size, min(self.num, (shard + 1) * self.shard_size))

    def shard_blocks(self, shard: int) -> range:
        """The blocks that hold a shard's samples; the last may reach beyond it."""
        rows = self.shard_rows(shard)
        return range(rows.start // self.block_size, -(-rows.stop // self.block_size))

    def rows_of(self, shard: int, block: int) -> int:
        """Number of a shard's samples that a block holds."""
        first = block * self.block_size
        return min(self.shard_rows(shard).stop, first + self.block_size) - first

    def rows(self, samples: Sequence[int]) -> dict[str, list[Any]]:
        """What samples with consecutive ids are conditioned on, by name: classes, prompts, or nothing.

        Samples beyond the last row of the table, which complete a block, have that row.
        """
        if self.labels:
            return {"label": [self.labels[i % len(self.labels)] for i in samples]}
        return self.prompts.texts(samples, self.negative_prompt) if self.prompts else {}

    def seeds(self, samples: Sequence[int]) -> list[int]:
        """The image seeds of samples with consecutive ids, those of samples that complete a block included."""
        default = [(self.seed + i) % SEEDS for i in samples]
        return self.prompts.seeds(samples, default) if self.prompts else default

    def scales(self, samples: Sequence[int]) -> list[float] | None:
        """The guidance scales of samples with consecutive ids; None if all have that of the ladder."""
        if self.guidance is None:
            return None
        default = [self.guidance] * len(samples)
        return self.prompts.scales(samples, default) if self.prompts else default

    def block_plan(self, block: int) -> Plan:
        """The plan of a block: the memorised one, or its own draw."""
        return self.workload.block_plan(block)

    @property
    def workload(self) -> Workload:
        """The part of the job that decides how long it takes."""
        return Workload(self.num, self.plan, self.seed, self.block_size, self.shard_size, self.precision)


def _check_until(until: int, keep: Condition | None, num: int) -> None:
    """Refuse a number of rows to keep that cannot be met, or that nothing decides."""
    if not keep:
        raise UsageError(f"`until` {until}: expected `keep` beside it, by which rows are kept; or take `num` {until}")
    if not 1 <= until <= num:
        raise UsageError(f"`until` {until:,}: expected 1 to {num:,}, the number of images to choose from")


def check_shards(workload: Workload) -> None:
    """Refuse a workload of too many shards, or of shards that are not whole blocks.

    Raises:
        UsageError: if the workload is refused; the message says how to change the shard size.
    """
    num, shard_size, block_size = workload.num, workload.shard_size, workload.block_size
    if (shards := -(-num // shard_size)) > MAX_SHARDS:
        raise UsageError(f"{num:,} samples in shards of {shard_size} are {shards:,} files; raise the shard size")
    if shard_size % block_size:
        lower = max(1, shard_size // block_size) * block_size
        raise UsageError(f"the shard size {shard_size} is not a multiple of the block size {block_size}; take {lower}")


@lru_cache(maxsize=4)
def _first_plans(plan: Plan | Recipe, seed: int) -> tuple[Plan, ...]:
    if isinstance(plan, Plan):
        return (plan,)
    if plan.draw == "quantiles":
        return (plan.plan(block_rng(seed, 0)),)
    return tuple(plan.plan(block_rng(seed, block)) for block in range(SAMPLED_BLOCKS))
