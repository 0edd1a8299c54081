"""What it brings on a CPU that wide UNets compute with channels last in memory.

python benchmarks/runtime/layout.py --out benchmarks/results/layout.json

ms of one thread per batch, in either layout in turn: UNets of new weights by the channels of their blocks, in images of
16 and 32 pixels, and those of the bundled ladder. Then, for its tuned plans, ms per sample with all levels channels
first and as they are loaded, in turn, in blocks of 32, and what the order of sums makes of the images.
"""

import copy
import json
import platform
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.loader import WIDE
from mlem_dist.models.level import ModelLevel
from mlem_dist.models.memory import keep_memory
from mlem_dist.tuning.comparison import BLOCK, PlanComparison
from mlem_dist.tuning.tuned_plans import tuned_budgets, tuned_plan

LADDER, SOLVER, STEPS, SEED = "fashion", "ode", 250, 1
BLOCKS = [(16, 24, 32), (32, 32, 32), (32, 48, 64), (64, 64, 64), (48, 64, 96), (64, 128, 128), (128, 256, 256)]
SIZES = [(16, 100), (32, 25), (16, 8)]
"""Pixels of a side, and samples of a batch."""

LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}
WARM, REPEATS, PLAN_REPEATS = 1, 7, 3


def new_unet(blocks: tuple[int, ...], size: int) -> Any:
    """A UNet of three channels and ten classes, without attention."""
    count = len(blocks)
    return UNet2DModel(
        sample_size=(size, size),
        block_out_channels=blocks,
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * count,
        up_block_types=("UpBlock2D",) * count,
        num_class_embeds=10,
    )


@torch.inference_mode()
def both(model: Any, batch: int) -> dict[str, float]:
    """Median ms of a batch by layout."""
    x = torch.randn(batch, model.config.in_channels, *model.config.sample_size)
    t, label = torch.full((batch,), 500), torch.arange(batch) % 10
    models = {name: copy.deepcopy(model).eval().to(memory_format=layout) for name, layout in LAYOUTS.items()}
    times: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for _ in range(WARM + REPEATS):
        for name, one in models.items():
            start = time.thread_time()
            one(x, t, class_labels=label)
            times[name].append(1e3 * (time.thread_time() - start))
    return {name: round(median(found[WARM:]), 2) for name, found in times.items()}


def rows(ladder: Ladder) -> Iterator[dict[str, Any]]:
    """A row for each new UNet, and for each of the ladder's."""
    for size, batch in SIZES:
        for blocks in BLOCKS:
            yield {"blocks": blocks, "pixels": size, "batch": batch} | both(new_unet(blocks, size), batch)
    for number, level in enumerate(ladder.levels, 1):
        if level.kind == "unet":
            model: Any = ladder.load_level(number, "cpu").model
            about = {"level": level.name, "blocks": tuple(model.config.block_out_channels)}
            yield about | {"pixels": model.config.sample_size[0], "batch": 100} | both(model, 100)


def plans(ladder: Ladder) -> Iterator[dict[str, Any]]:
    """A row for each budget that has a tuned plan."""
    judge = PlanComparison(ladder, SOLVER, "cpu", STEPS, BLOCK["cpu"], SEED)
    ways = {"first": {k: channels_first(level) for k, level in judge.levels.items()}, "loaded": judge.levels}
    for nfe in tuned_budgets(ladder.folder, SOLVER):
        plan = tuned_plan(ladder, SOLVER, STEPS, nfe)
        assert plan, "the bundled plans have 250 steps"
        run = partial(judge.end, plan, 0)
        times: dict[str, list[float]] = {name: [] for name in ways}
        ends: dict[str, Tensor] = {}
        for repeat in range(PLAN_REPEATS):
            for name, levels in ways.items():
                judge.use(levels)
                if not repeat:
                    ends[name] = run()
                times[name].append(1e3 * judge.timed(run))
        difference = float((ends["first"] - ends["loaded"]).abs().max())
        yield {"nfe": nfe} | {name: round(median(found), 2) for name, found in times.items()} | {"apart": difference}


def channels_first(level: nn.Module) -> nn.Module:
    """A level whose UNet, if it is one, computes with channels first."""
    if isinstance(level, ModelLevel):
        level = copy.deepcopy(level)
        level.model.to(memory_format=torch.contiguous_format)
    return level


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(out: Path) -> None:
    """UNets, then plans."""
    keep_memory()
    torch.set_num_threads(1)
    ladder = Ladder.load(LADDER)
    result: dict[str, Any] = {"machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"}
    result["wide"] = WIDE
    for what, found in (("unets", rows(ladder)), ("plans", plans(ladder))):
        result[what] = []
        for row in found:
            result[what].append(row)
            print(row, flush=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
