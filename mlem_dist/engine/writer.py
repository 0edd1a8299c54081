"""The writer of shards, apart from the levels. It does not import torch, so that it starts at once and stays small."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mlem_dist.dataset.manifest import NAME, changed, read_manifest
from mlem_dist.dataset.schema import SCALE
from mlem_dist.dataset.shards import Shard, typed, write_shard
from mlem_dist.engine.job import Job
from mlem_dist.engine.progress import Work
from mlem_dist.errors import ScoreError, UsageError
from mlem_dist.store import Location, listed


class Writer:
    """Writes shards of a job's dataset, with class names `labels`, to `out`."""

    def __init__(self, job: Job, out: Location, labels: Sequence[str]) -> None:
        self.job, self.out, self.labels = job, out, labels

    def prepare(self) -> None:
        """Check that the dataset is there.

        Raises:
            UsageError: if the dataset that the driver has begun is not visible from here, or another one is there.
        """
        why = ""
        try:
            manifest = read_manifest(self.out) if NAME in listed(self.out) else None
        except OSError as error:
            manifest, why = None, f" ({error})"
        if manifest is None:
            raise UsageError(
                f"`out` {self.out} is not seen on node {platform.node()}{why}; choose a folder on a file system that "
                "all nodes share, or give every node the credentials of the object store"
            )
        if changed(manifest, self.job.config):
            raise UsageError(
                f"`out` {self.out} holds another dataset on node {platform.node()}; choose a folder on a file system "
                "that all nodes share, and to which no other run writes"
            )
        self.run = manifest.fingerprint

    def write(self, shard: int, *parts: Any) -> tuple[Work, Shard]:
        """Write one shard.

        Args:
            shard: the shard's number.
            parts: images of its blocks, uint8 (B, H, W, C), then the columns of scores of each block, if images are
                scored. The last block may hold more images than the shard.
        """
        start = time.process_time()
        rows, blocks = len(self.job.shard_rows(shard)), len(self.job.shard_blocks(shard))
        images = np.concatenate(parts[:blocks])[:rows]
        scores = score_columns(parts[blocks:], rows, self.job.score_types)
        columns = self._columns(shard, images) | {name: pa.chunked_array([array]) for name, array in scores.items()}
        fields = fields_of({name: array.type for name, array in scores.items()})
        if self.job.keep:
            stored = [field for field in self.job.schema(fields) if field.name != "image"]
            table = pa.table([typed(columns[field.name], field) for field in stored], pa.schema(stored))
            kept = np.array(self.job.keep.rows(table), dtype=np.int64)
            images, columns = images[kept], {name: table[name].take(kept) for name in table.column_names}
        described = columns, self.labels, self.run, self.job.table_schema, self.job.encoding, fields
        written = write_shard(self.out, self.job.shard_path(shard), images, *described)
        return Work(time.process_time() - start, {}, rows, images.nbytes), written

    def _columns(self, shard: int, images: np.ndarray) -> dict[str, Any]:
        """The values of all columns but the image."""
        ids, prompts = self.job.shard_rows(shard), self.job.prompts
        own: dict[str, Any] = {"sample_id": ids, "seed": self.job.seeds(ids)}
        if prompts is None:
            return own | self.job.rows(ids)
        _, height, width, _ = images.shape
        size = {"width": [width] * len(ids), "height": [height] * len(ids)}
        scales = {SCALE: scale} if (scale := self.job.scales(ids)) and prompts.has(SCALE) else {}
        return own | size | scales | prompts.stored(ids, self.job.negative_prompt)


def fields_of(types: Mapping[str, pa.DataType]) -> list[pa.Field]:
    """The fields of columns of scores."""
    return [pa.field(name, kind) for name, kind in types.items()]


def score_columns(
    blocks: Sequence[Mapping[str, np.ndarray]], rows: int, types: Mapping[str, pa.DataType]
) -> dict[str, pa.Array]:
    """The first rows of blocks' columns of scores: texts, numbers in 64 bits, or lists of them.

    All blocks have the columns of `types`, by which all shards have the same; without any, those of the first block.

    Raises:
        ScoreError: if a block has other columns or types, or a column is of none of these types.
    """
    names = types or (blocks[0] if blocks else {})
    joined = {}
    for block in blocks:
        if different := sorted({*block} ^ {*names}):
            raise ScoreError(f"the column {different[0]!r} of scores is not there for all images", "")
    for name in names:
        try:
            parts = [_typed_score(block[name]) for block in blocks]
            kind = types.get(name, parts[0].type)
            for part in parts:
                if part.type != kind and not pa.types.is_null(part.type) and not _widens(part.type, kind):
                    raise ScoreError(f"the column {name!r} of scores is of {part.type}, expected {kind}", "")
            joined[name] = pa.concat_arrays([part.cast(kind) for part in parts])[:rows]
        except (ValueError, OverflowError, pa.ArrowException) as error:
            raise ScoreError(f"the column {name!r} of scores cannot be written: {error}", "") from None
    return joined


def _typed_score(values: np.ndarray) -> pa.Array:
    """A block's column of scores, numbers in 64 bits."""
    if values.dtype.kind == "f":
        values = values.astype(np.float64)
    array = pa.array(values if values.ndim == 1 and values.dtype != object else values.tolist())
    # Not by numpy, which would wrap large numbers round.
    return array.cast(pa.int64()) if pa.types.is_integer(array.type) else array


def _widens(kind: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether values of a type may stand in a column of another: integers among floats, also in lists."""
    if pa.types.is_list(kind) and pa.types.is_list(wanted):
        inner = kind.value_type
        return bool(pa.types.is_null(inner) or inner == wanted.value_type or _widens(inner, wanted.value_type))
    return bool(pa.types.is_integer(kind) and pa.types.is_floating(wanted))
