"""Single rows of a dataset."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mlem_dist.dataset.manifest import Manifest, finished_shards
from mlem_dist.dataset.shards import shard_index
from mlem_dist.errors import UsageError
from mlem_dist.store import Location, reached


def row_of(out: Location, manifest: Manifest, sample_id: int) -> dict[str, Any]:
    """The row of a sample in its finished shard, by column.

    Raises:
        UsageError: if no finished shard has the sample, or its shard cannot be read.
    """
    config = manifest.config
    if not 0 <= sample_id < config["num"]:
        raise UsageError(f"`id` {sample_id}: expected 0 to {config['num'] - 1}, the ids of {out}")
    shard = sample_id // config["shard_size"]
    if manifest.shards and shard >= len(manifest.shards):
        raise UsageError(f"`id` {sample_id}: {out} ends before it, with {config['until']} rows")
    path = next((path for path in finished_shards(out, manifest) if shard_index(path) == shard), None)
    if path is None:
        raise UsageError(f"`id` {sample_id}: its shard is not made yet; run `mlem-dist generate` again to finish it")
    try:
        with reached(out), (out / path).open("rb") as opened:
            file = pq.ParquetFile(opened, pre_buffer=False)
            for group in range(file.num_row_groups):
                ids = file.read_row_group(group, ["sample_id"], use_threads=False)["sample_id"]
                if (index := pc.index(ids, sample_id).as_py()) >= 0:
                    row: dict[str, Any] = file.read_row_group(group, use_threads=False).slice(index, 1).to_pylist()[0]
                    return row
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{out / path} cannot be read ({error}); `mlem-dist verify {out}` says more") from None
    raise UsageError(f"`id` {sample_id}: {out / path} does not have it")
