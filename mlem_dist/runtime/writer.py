"""What writes shards: apart from the levels, and without importing torch, so that it starts at once and stays small."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence

import numpy as np

from mlem_dist.dataset.manifest import NAME
from mlem_dist.dataset.shards import Shard, write_shard
from mlem_dist.dataset.store import Location, listed
from mlem_dist.errors import UsageError
from mlem_dist.runtime.progress import Work


class Writer:
    """Writes shards of one dataset, of `shards` shards with class names `labels`, to `out`."""

    def __init__(self, out: Location, shards: int, labels: Sequence[str]) -> None:
        self.out, self.shards, self.labels = out, shards, labels

    def prepare(self) -> None:
        """Answers when the process is up.

        Raises:
            UsageError: the dataset that the driver has begun is not seen from here.
        """
        try:
            seen, why = NAME in listed(self.out), ""
        except OSError as error:
            seen, why = False, f" ({error})"
        if not seen:
            raise UsageError(
                f"--out {self.out} is not seen on node {platform.node()}{why}; choose a folder on a file system that "
                "all nodes share, or give every node the credentials of the object store"
            )

    def write(self, shard: int, first_id: int, label: Sequence[int], *blocks: np.ndarray) -> tuple[Work, Shard]:
        """Write one shard.

        Args:
            shard: its number.
            first_id: of its samples.
            label: of each of its samples.
            blocks: images uint8 (B, H, W, C) of its blocks; the last may hold more than belong to it.
        """
        start = time.process_time()
        images = np.concatenate(blocks)[: len(label)]
        found = write_shard(self.out, shard, self.shards, first_id, images, label, self.labels)
        return Work(time.process_time() - start, {}, len(images), images.nbytes), found
