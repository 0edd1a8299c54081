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
that are latents: 4 samples of 4x64x64 on a CPU core, and 16 on a GPU. Large images keep a device busy few at a time,
so that larger blocks bring nothing even where memory has room for them."""

WEIGHT_SHARE = 0.5
"""Largest share of a device's memory that weights may take in placements that the planner chooses."""

ACTIVATION_SHARE = 0.5
"""Largest share of the memory beside the weights that activations of a default block take. The rest is for states,
images, workspaces of libraries, and allocators: a process on a CPU takes up to twice the estimated activations
(what_fits.py in benchmarks/runtime)."""

SHARD_SIZE, SHARD_BYTES = 2000, 5e8
"""Largest default number of samples in a shard, and of bytes of its images before encoding."""


def default_block(ladder: Ladder, device: str, memory: float = math.inf) -> int:
    """The default number of samples in a block on a device type; at least one.

    It is the least of `BLOCK_SIZE`, of what keeps a device busy by the number of a sample's values, and of the samples
    that `samples_beside` lets into memory. Memory thus makes blocks smaller, and never larger. Not counted are the
    decoder, which splits blocks by itself, pools that share a device, and blocks that a pool evaluates together.

    Args:
        ladder: the ladder.
        device: "cpu" or "cuda".
        memory: bytes of memory of a device: of a GPU, or for each CPU core; infinite if it is not known.
    """
    values = LATENT_VALUES if ladder.decoder else PIXEL_VALUES
    block = min(BLOCK_SIZE[device], values[device] // math.prod(ladder.sample_shape))
    # Otherwise activations need not be known.
    if memory < math.inf:
        block = min(block, samples_beside(_weights(ladder), max(ladder.activation_bytes), memory))
    return max(1, block)


def samples_beside(weights: float, activations: float, memory: float) -> int:
    """Number of samples whose `activations`, in bytes for each, fit into a device's memory beside the weights.

    They take at most `ACTIVATION_SHARE` of `room_beside`.
    """
    return int(ACTIVATION_SHARE * room_beside(weights, memory) / max(1, activations))


def room_beside(weights: float, memory: float) -> float:
    """Bytes of a device's memory beside weights of so many bytes.

    Weights that take more than `WEIGHT_SHARE` are in several pools, and those of one pool leave the rest.
    """
    return max(memory - weights, (1 - WEIGHT_SHARE) * memory)


def memory_note(ladder: Ladder, device: str, memory: float) -> str:
    """A sentence for the user if a device's memory may not suffice for a single sample; else ""."""
    room = room_beside(_weights(ladder), memory)
    if memory == math.inf or (each := max(ladder.activation_bytes)) <= room:
        return ""
    where = "a GPU" if device == "cuda" else "each CPU core"
    return (
        f"A sample of ladder {ladder.name!r} takes about {each / 1e9:.2g} GB beside the weights, which leave "
        f"{room / 1e9:.2g} of the {memory / 1e9:.2g} GB of {where}: memory may run out; half precision needs less."
    )


def _weights(ladder: Ladder) -> float:
    """Bytes of the weights of all levels and stages, in the precision of the ladder."""
    return float(ladder.weight_bytes.seconds.sum()) + sum(ladder.stage_bytes.values())


def default_shard(ladder: Ladder, block_size: int) -> int:
    """The default number of samples in a shard of whole blocks: as many as `SHARD_SIZE` and `SHARD_BYTES` allow."""
    most = min(SHARD_SIZE, int(SHARD_BYTES / math.prod(ladder.image_shape)))
    return max(1, most // max(1, block_size)) * block_size
