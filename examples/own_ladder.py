"""Train a small ladder on a folder of pictures, one folder per class, and sample from it."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import mlem_dist
from mlem_dist import api

CONFIG = """
name: own
sample_shape: [3, 8, 8]
scheduler: {num_train_timesteps: 1000, beta_schedule: linear, beta_start: 1.0e-4, beta_end: 0.02}
levels:
  - {name: gaussian, kind: gaussian, rank: 4}
  - name: unet
    kind: unet
    prediction: residual
    steps: 20
    batch_size: 8
    model: {block_out_channels: [8], down_block_types: [DownBlock2D], up_block_types: [UpBlock2D], norm_num_groups: 4}
"""

if __name__ == "__main__":
    pictures, folder = map(Path, sys.argv[1:3])
    config = folder / "own.yaml"
    config.write_text(CONFIG, "utf-8")
    ladder, *_ = api.train(data=pictures, config=config, out=folder / "ladder")
    api.measure(ladder)
    images = mlem_dist.sample(folder / "ladder", num=8, nfe=4, steps=50)
    Image.fromarray(np.hstack(images)).save(folder / "own.png")
