from dataclasses import replace

import pytest
import torch

from mlem_dist.engine.blocks import Blocks, NonFiniteError


def test_the_samples_of_a_block_have_the_classes_of_their_rows(fashion, make_job):
    job = make_job(num=60, labels=(2, 7, 5), block_size=8, shard_size=24)
    blocks = Blocks(job, fashion)
    for shard in range(job.shards):
        rows = job.shard_rows(shard)
        made = torch.cat([blocks.condition(block)["label"] for block in job.shard_blocks(shard)])
        assert made.tolist()[: len(rows)] == [(2, 7, 5)[i % 3] for i in rows]


def test_states_become_images_pixel_by_pixel(fashion, make_job):
    """A ramp over channels, rows and columns that goes beyond both ends of the range."""
    ladder = replace(fashion, sample_shape=(3, 2, 5), value_range=(0.0, 1.0))
    blocks = Blocks(make_job(digest=ladder.digest), ladder)
    x = torch.linspace(-0.5, 1.5, 2 * 3 * 2 * 5).reshape(2, 3, 2, 5)
    images = blocks.images(0, x)
    assert images.shape == (2, 2, 5, 3)
    for n, c, h, w in ((0, 0, 0, 0), (0, 2, 1, 3), (1, 0, 1, 0), (1, 1, 0, 4), (1, 2, 1, 4)):
        assert images[n, h, w, c] == round(255 * min(max(float(x[n, c, h, w]), 0), 1))
    x[1, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"block 3: 1 of 2 samples are not finite \(sample ids 25 to 25\)"):
        blocks.images(3, x)
