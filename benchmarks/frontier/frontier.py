"""Error against time for every way to spend it: Figure 1 of Jacot, arXiv:2603.24594, on a ladder.

python benchmarks/frontier/frontier.py --solver ddpm --out benchmarks/results/frontier
python benchmarks/frontier/frontier.py --solver ddim --out benchmarks/results/frontier

Every run starts from the same noises and follows the same Brownian path; the reference is the best level at every
timestep of the noise schedule. A rerun goes on where the last one stopped.
"""

import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.report.figures import save_frontier
from mlem_dist.solver.plan import Recipe, single_level, switched
from mlem_dist.tuning.frontier import Frontier
from mlem_dist.tuning.judge import BLOCK, Judge, Verdict
from mlem_dist.tuning.recipe import make_recipe

SEED = 1
BASE_STEPS = 1000
BEST_EM_STEPS = (5, 8, 10, 20, 25, 40, 50, 100, 125, 200)
EM_STEPS = (10, 25, 50, 100, 250)
BUDGETS = (5, 10, 20, 40, 80)
FAST_STEPS = (5, 8, 10, 15, 20, 30, 40)
STITCH_STEPS = (10, 20, 50)
STITCHES = (0.25, 0.5, 0.75)

Case = tuple[str, str, Callable[[Judge], Verdict]]


def cases(ladder: Ladder, solver: str) -> Iterator[Case]:
    """Family, label, and how to run it; the most interesting first."""
    levels = len(ladder.levels)

    def recipe(nfe: float, **choices: str) -> Recipe:
        return make_recipe(ladder, "cpu", solver, BASE_STEPS, nfe, **choices)  # type: ignore[arg-type]

    families = {
        "held": {"increments": "held"},
        "extrapolated": {"increments": "extrapolated"},
        "ML-EM, Neyman": {"increments": "impulse", "draw": "independent"},
        "ML-EM, theory": {"increments": "impulse", "draw": "independent", "probabilities": "theory"},
    }
    for name, choices in families.items():
        for nfe in BUDGETS:
            yield name, f"{nfe} NFE", lambda judge, nfe=nfe, choices=choices: judge.judge(recipe(nfe, **choices))
    for k in range(levels, 0, -1):
        for steps in BEST_EM_STEPS if k == levels else EM_STEPS:
            name = f"EM, {ladder.levels[k - 1].name}"
            yield name, f"{steps} steps", lambda judge, k=k, n=steps: judge.judge(single_level(k, levels, n))
    if solver == "ddim":
        for name in FAST:
            for steps in FAST_STEPS:
                yield name, f"{steps} steps", partial(fast, name, steps)
    for small in range(2, levels):
        for steps in STITCH_STEPS:
            for part in STITCHES:
                at = round(part * steps)
                plan = switched(small, levels, levels, steps, at)
                label = f"{ladder.levels[small - 1].name} for {at} of {steps} steps"
                yield "T-Stitch", label, lambda judge, plan=plan: judge.judge(plan)


FAST = {
    "DPM-Solver++(2M), trailing": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    "DPM-Solver++(2M), lu-lambdas": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    "UniPC, linspace": ("UniPCMultistepScheduler", {"timestep_spacing": "linspace"}),
}


def fast(name: str, steps: int, judge: Judge) -> Verdict:
    """A fast solver of diffusers with the best level alone."""
    import diffusers

    kind, options = FAST[name]
    best = judge.levels[len(judge.levels)]

    @torch.inference_mode()
    def end(block: int) -> Tensor:
        scheduler = getattr(diffusers, kind).from_config(dict(judge.ladder.scheduler), **options)
        scheduler.set_timesteps(steps)
        x = judge.noise(block, steps=len(judge.fine))(-1)
        for t in scheduler.timesteps:
            times = torch.full((BLOCK,), int(t), dtype=torch.int64, device=x.device)
            x = scheduler.step(best(x, times, judge.label), t, x).prev_sample
        return x

    return judge.verdict(judge.timed(lambda: end(0))[0], end)


@click.command()
@click.option("--ladder", "name", default="fashion")
@click.option("--solver", type=click.Choice(["ddpm", "ddim"]), required=True)
@click.option("--samples", default=256)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(name: str, solver: str, samples: int, device: str, out: Path) -> None:
    """Write OUT/frontier-SOLVER.json and .png."""
    torch.set_num_threads(1)
    ladder = Ladder.load(name)
    judge = Judge(ladder, solver, device, samples, SEED, out / "cache")
    about = {
        "ladder": ladder.digest,
        "solver": solver,
        "machine": f"{platform.machine()}, one thread" if device == "cpu" else torch.cuda.get_device_name(),
        "samples": samples,
        "block_size": BLOCK,
        "reference": f"{ladder.levels[-1].name}, {len(ladder.alpha_bar)} steps",
        "best_level_seconds": float(ladder.cost(device)[-1]),
    }
    frontier = Frontier(out / f"frontier-{solver}.json", about)
    for family, label, run in cases(ladder, solver):
        if not frontier.find(family, label):
            row = frontier.add(family, label, run(judge))
            nfe = row.seconds / float(ladder.cost(device)[-1])
            print(
                f"{solver} {family}, {label}: {row.seconds * 1e3:.1f} ms ({nfe:.1f} NFE), MSE {row.error:.5f}",
                flush=True,
            )
            save_frontier(frontier, out / f"frontier-{solver}.png")


if __name__ == "__main__":
    main()
