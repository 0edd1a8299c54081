"""The noise of images: a function of each image's seed and of the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mlem_dist.solver.steps import StepTable

Noise = Callable[[int], Tensor]
"""Function from step i to the noise z_i, in the shape of x; step -1 gives the initial state."""


def image_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str) -> Noise:
    """The noise of a block of images: float32 (B, *shape) for each step, drawn on the CPU and copied to the device.

    The initial noise of seed s is that of `torch.randn(shape, generator=torch.Generator().manual_seed(s))`, as in
    pipelines of diffusers. The noise of step i is that of the counter-based generator Philox with the key (s, i)
    (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

    Args:
        seeds: the image seeds, B integers in [0, 2^32).
        shape: the shape of one sample.
        device: device of the returned noise.
    """
    philox = np.random.Philox(key=0)
    generator = np.random.Generator(philox)
    # The state before any draw, reused for each key: a new generator for each key would take twice as long.
    state = philox.state

    def noise(step: int) -> Tensor:
        if step < 0:
            rows = [torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            return torch.stack(rows).to(device)
        values = np.empty((len(seeds), *shape), dtype=np.float32)
        for seed, row in zip(seeds, values, strict=True):
            state["state"]["key"][:] = seed, step
            philox.state = state
            generator.standard_normal(out=row, dtype=np.float32)
        return torch.from_numpy(values).to(device)

    return noise


def coarse_noise(noise: Noise, fine: StepTable, ratio: int) -> Noise:
    """The noise for a table of every `ratio`-th time of `fine`, on the Brownian path of `noise` for `fine`.

    The noise of a coarse step is a sum over the fine steps that it spans, scaled to unit variance. Each fine noise is
    multiplied by the factors a of the later fine steps. The sum is zero where no fine step takes noise, as in the ODE.
    """

    def coarse(step: int) -> Tensor:
        if step < 0:
            return noise(step)
        spanned = range(step * ratio, (step + 1) * ratio)
        weight = [fine.c[i] * fine.a[i + 1 : spanned.stop].prod() for i in spanned]
        scale = float(np.linalg.norm(weight))
        if not scale:
            return torch.zeros_like(noise(-1))
        return torch.stack([noise(i) * float(w / scale) for i, w in zip(spanned, weight, strict=True)]).sum(0)

    return coarse
