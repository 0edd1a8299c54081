"""Conditional and unconditional evaluations one after the other, and in one batch of twice the size, on one CPU thread.

python benchmarks/runtime/guided_batch.py --out benchmarks/results/guided_batch.json

UNets of Stable Diffusion's class with random weights, 77 tokens of text. CPU time of the thread, median of five.
"""

import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import click
import torch
from diffusers import UNet2DConditionModel

CHANNELS = {"small, 16x16": (32, 64), "medium, 32x32": (64, 128, 256), "large, 32x32": (160, 320, 640)}
BATCHES = (1, 4, 16)


def seconds(run: Callable[[], object]) -> float:
    """Median CPU seconds of five runs after one."""
    times = []
    for _ in range(6):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return median(times[1:])


def evaluate(unet: UNet2DConditionModel, *inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Evaluate a UNet on each pair of samples and texts."""
    for x, text in inputs:
        unet(x, 9, text)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@torch.inference_mode()
def main(out: Path) -> None:
    """Write OUT, with the time of two evaluations over that of one batch."""
    torch.set_num_threads(1)
    ratios: dict[str, dict[int, float]] = {}
    for name, channels in CHANNELS.items():
        torch.manual_seed(0)
        size = int(name.split("x")[-1])
        attending = len(channels) - 1
        unet = UNet2DConditionModel(
            sample_size=size,
            block_out_channels=channels,
            down_block_types=("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",),
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * attending),
            layers_per_block=1,
            cross_attention_dim=64,
            norm_num_groups=16,
        ).eval()
        ratios[name] = {}
        for batch in BATCHES:
            x, text, negative = torch.randn(batch, 4, size, size), *torch.randn(2, batch, 77, 64)
            both = torch.cat([x, x]), torch.cat([text, negative])
            apart = seconds(partial(evaluate, unet, (x, text), (x, negative)))
            ratios[name][batch] = apart / seconds(partial(evaluate, unet, both))
            print(name, batch, f"{ratios[name][batch]:.2f}", flush=True)
    out.write_text(json.dumps({"machine": platform.machine(), "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
