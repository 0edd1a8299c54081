"""Complete a dataset: make its missing shards by either engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from mlem_dist.dataset.manifest import (
    NAME,
    Manifest,
    changed,
    check_out,
    finish,
    finished_shards,
    read_manifest,
    written_shards,
)
from mlem_dist.dataset.shards import Shard, place_shard, shard_index, shard_path
from mlem_dist.engine.job import Job
from mlem_dist.engine.progress import Progress
from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.store import Location, check_location, listed

BLOCK_BYTES, SHARD_BYTES = 4_000_000_000, 2_000_000_000
"""Largest bytes of a block's state, and of a shard's images before encoding: a Parquet column chunk holds no more."""

Engine = Callable[[Sequence[int]], Generator[Progress]]
"""A function that makes the shards with the given indices in their order and yields its progress. When its result is
closed, it ends the shards that are being written, and makes no others."""


@dataclass(frozen=True)
class Dataset:
    """A dataset folder and its state: the job, the manifest, the finished shards by index, and the others' indices."""

    out: Location
    job: Job
    manifest: Manifest
    done: Mapping[int, Shard]
    missing: tuple[int, ...]

    @property
    def notes(self) -> list[str]:
        """Sentences for a user who resumes a dataset: the number of shards there, and changes of library versions."""
        if not self.done:
            return []
        changed = [
            f"It was begun with {name} {was}; with {now} the rest may be rounded otherwise."
            for name, was in self.manifest.versions.items()
            if (now := self.job.versions.get(name)) != was
        ]
        shards = len(self.done) + len(self.missing)
        return [f"{self.out}: {len(self.done)} of {shards} shards are there; going on.", *changed]


def open_dataset(job: Job, ladder: Ladder, out: Location) -> Dataset:
    """The dataset of `job` in `out`, fresh or begun by an earlier run. Writes nothing.

    Raises:
        UsageError: if `out` cannot be used for this job (see `check_out`), or if a block or shard is too large.
    """
    _check_sizes(job, ladder)
    config = job.config
    manifest = check_out(out, config) or Manifest(config, ladder.labels, job.versions, {}, ())
    done = _by_index(finished_shards(out, manifest))
    # Of a finished dataset of `until` rows, shards beyond the last one are not missing.
    shards = len(manifest.shards) or job.shards
    enough = _first_shards(_rows(done), job.until)
    missing = () if enough else tuple(i for i in range(shards) if i not in done)
    if manifest.shards and missing:
        check_location(out)
    return Dataset(out, job, manifest, done, missing)


def _by_index(shards: Mapping[str, Shard]) -> dict[int, Shard]:
    """Shards by index, of those by path."""
    return {index: shard for path, shard in shards.items() if (index := shard_index(path)) is not None}


def _first_shards(rows: Mapping[int, int], until: int | None) -> int | None:
    """The number of first shards that hold `until` rows, by the rows of finished shards; None if it is not known."""
    number = total = 0
    while until and number in rows:
        total, number = total + rows[number], number + 1
        if total >= until:
            return number
    return None


def _rows(shards: Mapping[int, Shard]) -> dict[int, int]:
    return {index: shard.rows for index, shard in shards.items()}


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
        yield from _make(dataset, engine)
    _check_alone(dataset)
    try:
        shards = _placed(dataset, _by_index(written_shards(dataset.out, dataset.manifest)))
    except (RuntimeError, OSError):
        # Another run of the same command may have finished the dataset.
        if read_manifest(dataset.out).shards:
            return
        raise
    names = [level.name for level in ladder.levels]
    calls = dict(zip(names, dataset.job.workload.expected_calls().tolist(), strict=True))
    finish(
        dataset.out,
        Manifest(dataset.manifest.config, dataset.manifest.labels, dataset.manifest.versions, calls, shards),
    )


def _make(dataset: Dataset, engine: Engine) -> Iterator[Progress]:
    """Make the missing shards, until enough rows are kept."""
    rows = _rows(dataset.done)
    with closing(engine(dataset.missing)) as snapshots:
        for progress in snapshots:
            yield progress
            rows.update(progress.written)
            if _first_shards(rows, dataset.job.until):
                return


def _placed(dataset: Dataset, done: Mapping[int, Shard]) -> tuple[Shard, ...]:
    """The dataset's shards in order, after those that wait have been given their places.

    Raises:
        RuntimeError: if written shards are missing.
        OSError: if a shard cannot be moved.
    """
    job, out = dataset.job, dataset.out
    number = _first_shards(_rows(done), job.until) or len(dataset.manifest.shards) or job.shards
    if missing := number - sum(index in done for index in range(number)):
        raise RuntimeError(
            f"{missing} shards that were written to {out} are not there; the same command makes them again"
        )
    shards, left = [], job.until or job.num
    for index in range(number):
        shard = done[index]
        if job.until:
            shard = place_shard(out, shard, shard_path(index, number), min(left, shard.rows))
        left -= shard.rows
        shards.append(shard)
    return tuple(shards)
