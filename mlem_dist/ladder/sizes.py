"""Default sizes of blocks and shards, by what a ladder's samples take."""

from __future__ import annotations

import math

from mlem_dist.ladder.ladder import Ladder

BLOCK_SIZE = {"cpu": 100, "cuda": 500}
"""Largest default number of samples in a block, by device type: on a large GPU, blocks of 100 small images take more
than twice as long per sample (gpu.py in benchmarks/runtime)."""

PIXEL_VALUES = {"cpu": 2**19, "cuda": 2**21}
LATENT_VALUES = {"cpu": 2**16, "cuda": 2**18}
"""Largest number of values in the states of a default block, by device type, for samples that are images and for those
that are latents: 4 samples of 4x64x64 on a CPU core, and 16 on a GPU. Activations of a network take hundreds to
thousands of times the memory of its input, and large images keep a device busy few at a time."""

SHARD_SIZE, SHARD_BYTES = 2000, 5e8
"""Largest default number of samples in a shard, and of bytes of its images before encoding."""


def default_block(ladder: Ladder, device: str) -> int:
    """The default number of samples in a block on a device type."""
    values = LATENT_VALUES if ladder.decoder else PIXEL_VALUES
    return max(1, min(BLOCK_SIZE[device], values[device] // math.prod(ladder.sample_shape)))


def sizes(ladder: Ladder, device: str, block_size: int | None, shard_size: int | None) -> tuple[int, int]:
    """The number of samples in a block and in a shard: those given, or defaults for the ladder on a device type."""
    block = default_block(ladder, device) if block_size is None else block_size
    if shard_size is None:
        most = min(SHARD_SIZE, int(SHARD_BYTES / math.prod(ladder.image_shape)))
        shard_size = max(1, most // max(1, block)) * block
    return block, shard_size
