"""Make a few images in this process, and save them side by side."""

import sys

import numpy as np
from PIL import Image

import mlem_dist

images = mlem_dist.sample("fashion", num=8, labels=[0, 1], nfe=3, seed=1)
Image.fromarray(np.hstack(images[..., 0])).save(sys.argv[1] if len(sys.argv) > 1 else "sample.png")
