"""Complete a dataset: make its missing shards by either engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mlem_dist.dataset.manifest import NAME, Manifest, changed, check_out, finish, finished_shards, read_manifest
from mlem_dist.dataset.shards import shard_path
from mlem_dist.engine.job import Job
from mlem_dist.engine.progress import Progress
from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.store import Location, check_location, listed

BLOCK_BYTES, SHARD_BYTES = 4_000_000_000, 2_000_000_000
"""Largest bytes of a block's state, and of a shard's images before encoding: a Parquet column chunk holds no more."""

Engine = Callable[[Sequence[int]], Iterator[Progress]]
"""A function that makes the shards with the given indices and yields its progress."""


@dataclass(frozen=True)
class Dataset:
    """A dataset folder and its state: the job, the manifest, and the indices of the missing shards."""

    out: Location
    job: Job
    manifest: Manifest
    missing: tuple[int, ...]

    @property
    def notes(self) -> list[str]:
        """Sentences for a user who resumes a dataset: the number of shards there, and changes of library versions."""
        if len(self.missing) == self.job.shards:
            return []
        kept = self.job.shards - len(self.missing)
        changed = [
            f"It was begun with {name} {was}; with {now} the rest may be rounded otherwise."
            for name, was in self.manifest.versions.items()
            if (now := self.job.versions.get(name)) != was
        ]
        return [f"{self.out}: {kept} of {self.job.shards} shards are there; going on.", *changed]


def open_dataset(job: Job, ladder: Ladder, out: Location) -> Dataset:
    """The dataset of `job` in `out`, fresh or begun by an earlier run. Writes nothing.

    Raises:
        UsageError: if `out` cannot be used for this job (see `check_out`), or if a block or shard is too large.
    """
    _check_sizes(job, ladder)
    config = job.config
    manifest = check_out(out, config) or Manifest(config, ladder.labels, job.versions, {}, ())
    done = finished_shards(out, manifest)
    missing = tuple(i for i in range(job.shards) if shard_path(i, job.shards) not in done)
    if manifest.shards and missing:
        check_location(out)
    return Dataset(out, job, manifest, missing)


def _check_sizes(job: Job, ladder: Ladder) -> None:
    """Refuse blocks and shards that are too large."""
    for name, samples, shape, bytes_each, limit in (
        ("block", job.block_size, ladder.sample_shape, 4 * math.prod(ladder.sample_shape), BLOCK_BYTES),
        ("shard", job.shard_size, ladder.image_shape, math.prod(ladder.image_shape), SHARD_BYTES),
    ):
        if samples * bytes_each > limit:
            fits = limit // bytes_each // job.block_size * job.block_size or limit // bytes_each
            raise UsageError(
                f"`{name}_size` {samples}: a {name} of samples of {'x'.join(map(str, shape))} would take "
                f"{samples * bytes_each / 1e9:.3g} GB; take {fits} or less"
            )


def _check_alone(dataset: Dataset) -> None:
    """Refuse to go on if another run has begun at the same time and its manifest is in the folder."""
    if changed(read_manifest(dataset.out), dataset.job.config):
        raise RuntimeError(
            f"a run of another configuration has begun in {dataset.out} at the same time, and has its manifest there; "
            "choose another folder for this one, and when both have ended give the command of the other again"
        )


def complete(dataset: Dataset, ladder: Ladder, engine: Engine) -> Iterator[Progress]:
    """Make the missing shards and finish the dataset; yields the engine's progress.

    Raises:
        RuntimeError: if written shards are missing, or if another run has begun in the same place.
    """
    # Another run of the same command may have begun or finished the dataset meanwhile.
    dataset = open_dataset(dataset.job, ladder, dataset.out)
    if dataset.manifest.shards and not dataset.missing:
        return
    # An existing manifest may just have become that of a finished dataset.
    if NAME not in listed(dataset.out):
        dataset.manifest.write(dataset.out)
    _check_alone(dataset)
    if dataset.missing:
        yield from engine(dataset.missing)
    _check_alone(dataset)
    done = finished_shards(dataset.out, dataset.manifest)
    if len(done) < dataset.job.shards:
        if read_manifest(dataset.out).shards:
            return
        raise RuntimeError(
            f"{dataset.job.shards - len(done)} shards that were written to {dataset.out} are not there; the same "
            "command makes them again"
        )
    shards = tuple(done[shard_path(i, dataset.job.shards)] for i in range(dataset.job.shards))
    names = [level.name for level in ladder.levels]
    calls = dict(zip(names, dataset.job.workload.expected_calls().tolist(), strict=True))
    finish(
        dataset.out,
        Manifest(dataset.manifest.config, dataset.manifest.labels, dataset.manifest.versions, calls, shards),
    )
