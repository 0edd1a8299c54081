"""Default sizes of blocks and shards, by what a ladder's samples take."""

from __future__ import annotations

import math

from mlem_dist.ladder.ladder import Ladder

BLOCK_SIZE = {"cpu": 100, "cuda": 500}
"""Largest default number of samples in a block, by device type: on a large GPU, blocks of 100 small images take more
than twice as long per sample (gpu.py in benchmarks/runtime)."""

BLOCK_VALUES = {"cpu": 2**19, "cuda": 2**21}
"""Largest number of values in the states of a default block, by device type. Activations of a network take hundreds of
times the memory of its input, and large images keep a device busy one by one."""

SHARD_SIZE, SHARD_BYTES = 2000, 5e8
"""Largest default number of samples in a shard, and of bytes of its images before encoding."""


def sizes(ladder: Ladder, device: str, block_size: int | None, shard_size: int | None) -> tuple[int, int]:
    """The number of samples in a block and in a shard: those given, or defaults for the ladder on a device type."""
    block = block_size
    if block is None:
        block = max(1, min(BLOCK_SIZE[device], BLOCK_VALUES[device] // math.prod(ladder.sample_shape)))
    if shard_size is None:
        most = min(SHARD_SIZE, int(SHARD_BYTES / math.prod(ladder.image_shape)))
        shard_size = max(1, most // max(1, block)) * block
    return block, shard_size
