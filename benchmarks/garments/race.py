"""Time per image against quality, for the ladder `garments`: its plans beside what else is known.

python benchmarks/garments/race.py "ROW" --data DATA --work WORK --out benchmarks/results/garments.json
python benchmarks/garments/race.py --list

Each ROW is a way to make images of the validation captions, each with a seed of its own, in bfloat16 on one thread. Its
line in OUT has adherence, Fréchet distance and recall as `recogniser.py` defines them, and the time per image
(encoding, sampling and decoding). The error of an image in [-1, 1] is the mean square of the difference to that of the
guided ODE of the largest model, 100 steps of DPM-Solver++(2M) in float32. Without ROW, all rows that OUT does not have
are made. With `--time`, the times of all lines of OUT are measured anew, one after the other on a machine that does
nothing else, and only those times compare. WORK keeps the images of the guided ODE, further ladders of the same models,
and what the recogniser sees in the images of each row. Rows of cache-dit need that package (1.5).
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import diffusers
import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
    hooks,
)
from diffusers.models.cache_utils import CacheMixin
from parts import read
from recogniser import adherence, frechet, load, look, recall

import mlem_dist
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.schema import LADDER
from mlem_dist.models.imports import quiet_diffusers
from mlem_dist.solver.noise import image_noise
from mlem_dist.solver.plan import block_rng, single_level, switched
from mlem_dist.tuning.recipes import make_recipe
from mlem_dist.tuning.tuned_plans import DEFAULT_STEPS, tuned_plan

RECOGNISER = Path(__file__).with_name("recogniser.safetensors")

BLOCK = 64
"""Number of images in a block of `sample`; only pipelines take other batches."""

COMPARED = 256
"""Number of images whose error is measured."""

REFERENCE_STEPS = 100
"""Number of steps of the guided ODE, to whose images others are compared."""

TIMED = 128
"""Number of images whose time `--time` measures, after a batch that warms up."""

RESAMPLES = 20
"""Number of samples with replacement that give the standard error of a Fréchet distance."""

Make = Callable[[Sequence[str], Sequence[int]], np.ndarray]
"""Function from captions and image seeds to images, uint8 (n, H, W, 3)."""


class Heun(FlowMatchHeunDiscreteScheduler):
    """Heun's method for a flow, with what PixArt's pipeline asks for and the scheduler of diffusers lacks."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        return sample


SOLVERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    # Of first order, DPM-Solver++ is Euler's method for a flow.
    "euler": lambda config: DPMSolverMultistepScheduler.from_config(config, solver_order=1),
    "dpm++": lambda config: DPMSolverMultistepScheduler.from_config(config, solver_order=2),
    "unipc": lambda config: UniPCMultistepScheduler.from_config(config, solver_order=2),
    # N steps are 2 N - 1 evaluations.
    "heun": lambda config: Heun(config["num_train_timesteps"], config["flow_shift"]),
}
"""Schedulers of diffusers, from the configuration of the ladder's scheduler."""

LEVELS = {"unguided": "large", "small-guides": "large guided by small"}
"""Levels that DPM-Solver++(2M) evaluates alone, by the kind of the row."""

RECIPES: dict[str, dict[str, Any]] = {
    "held": {"increments": "held"},
    "extrapolated": {"increments": "extrapolated"},
    "ml-em": {"increments": "impulse", "draw": "independent"},
}
"""Choices of untuned plans, by the kind of the row."""


def rows() -> list[str]:
    """The names of all rows."""
    names = ["euler 50", "euler 28"]
    names += [f"{solver} {steps}" for solver in ("dpm++", "unipc") for steps in (5, 7, 8, 10, 15)]
    names += ["heun 3", "heun 5"]
    names += [f"{kind} 10" for kind in LEVELS]
    names += [f"interval {steps}" for steps in ("10 0 0.7", "10 0.1 0.8", "7 0.1 0.8")]
    names += [f"stitch 10 {share}" for share in (0.2, 0.4)]
    names += [f"first-block 20 {threshold}" for threshold in (0.1, 0.2)]
    names += [f"taylorseer 20 {interval}" for interval in (2, 3)]
    names += ["pyramid 20 2", "faster-cache 20 2"]
    names += [f"cache-dit 20 {threshold}" for threshold in (0.1, 0.2)]
    names += [f"{kind} 10" for kind in RECIPES]
    return names + [f"plan {budget}" for budget in ("3", "5", "6", "10", "5 0.1 0.8", "6 0.1 0.8")]


def is_pipeline(row: str) -> bool:
    """Whether a row is a pipeline of diffusers, and not a ladder."""
    return row.split()[0] in SOLVERS | CACHES


def first_block(pipeline: Any, threshold: float) -> None:
    """Skip all blocks but the first where that changes little, by a batch's mean."""
    hooks.apply_first_block_cache(pipeline.transformer, hooks.FirstBlockCacheConfig(threshold=threshold))


def taylorseer(pipeline: Any, interval: float) -> None:
    """Extrapolate what blocks give, which are evaluated at every so many steps (Liu et al., arXiv:2503.06923)."""
    config = hooks.TaylorSeerCacheConfig(
        cache_interval=int(interval),
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|attn2|ff)"],
    )
    hooks.apply_taylorseer_cache(pipeline.transformer, config)


def pyramid(pipeline: Any, interval: float) -> None:
    """Hold what attention gives for so many steps, and of the prompt twice as many (Zhao et al., arXiv:2408.12588)."""
    config = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=int(interval),
        cross_attention_block_skip_range=2 * int(interval),
        spatial_attention_timestep_skip_range=(100, 900),
        cross_attention_timestep_skip_range=(100, 900),
        current_timestep_callback=timestep(pipeline),
    )
    hooks.apply_pyramid_attention_broadcast(pipeline.transformer, config)


def faster_cache(pipeline: Any, interval: float) -> None:
    """Hold attention and the difference to the unconditional evaluation (Lv et al., arXiv:2410.19355)."""
    config = hooks.FasterCacheConfig(
        tensor_format="BCHW",
        spatial_attention_block_skip_range=int(interval),
        attention_weight_callback=lambda module: 0.5,
        current_timestep_callback=timestep(pipeline),
    )
    hooks.apply_faster_cache(pipeline.transformer, config)


def cache_dit(pipeline: Any, threshold: float) -> None:
    """The package cache-dit, without a warm-up of eight steps, which is made for more steps."""
    import cache_dit as package

    config = package.DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=3, residual_diff_threshold=threshold)
    package.enable_cache(pipeline, cache_config=config)


def timestep(pipeline: Any) -> Callable[[], float]:
    """Function that returns the timestep of the evaluation that goes on."""
    current = [1000.0]

    def note(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        current[0] = float(kwargs["timestep"].flatten()[0])

    pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    return lambda: current[0]


CACHES: dict[str, Callable[[Any, float], None]] = {
    "first-block": first_block,
    "taylorseer": taylorseer,
    "pyramid": pyramid,
    "faster-cache": faster_cache,
    "cache-dit": cache_dit,
}
"""Caches of evaluations, each with its one number, by the kind of the row."""


class Competitors:
    """The ways to make images of a ladder, by the names of `rows`; `work` is a folder for further ladders."""

    def __init__(self, ladder: Ladder, work: Path) -> None:
        self.ladder, self.work = ladder, work
        self.scale = ladder.levels[-1].guidance.scale

    def way(self, name: str) -> Make:
        """The function that makes the images of a row."""
        kind, *numbers = name.split()
        steps, best = int(numbers[0]), len(self.ladder.levels)
        if kind in SOLVERS:
            return self._pipeline(kind, steps)
        if kind in CACHES:
            return self._pipeline("dpm++", steps, lambda pipeline: CACHES[kind](pipeline, float(numbers[1])))
        if kind == "plan":
            plan = tuned_plan(self.ladder, "ode", None, steps)
            if plan is None:
                raise click.UsageError(f"{name}: the ladder has no tuned plan for {steps} evaluations")
            ladder = self._interval(*map(float, numbers[1:])) if numbers[1:] else self.ladder
            return self._sample(ladder, plan=plan)
        if kind in RECIPES:
            return self._draw(nfe=steps, **RECIPES[kind])
        if kind == "interval":
            ladder = self._interval(*map(float, numbers[1:]))
            return self._sample(ladder, plan=single_level(best, best, steps), solver="dpm++")
        if kind == "stitch":
            plan = switched(self._number("small guided"), best, best, steps, round(float(numbers[1]) * steps))
        else:
            plan = single_level(self._number(LEVELS[kind]), best, steps)
        return self._sample(self.ladder, plan=plan, solver="dpm++")

    def reference(self) -> Make:
        """The guided ODE."""
        return self._pipeline("dpm++", REFERENCE_STEPS, dtype=torch.float32)

    def _pipeline(
        self,
        solver: str,
        steps: int,
        cache: Callable[[Any], None] = lambda pipeline: None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Make:
        """The pipeline of the largest model, as diffusers runs it, from the noise that ladders begin with."""
        from transformers import T5EncoderModel, T5Tokenizer

        folder = self.ladder.folder
        with quiet_diffusers():
            pipeline = diffusers.PixArtAlphaPipeline(
                T5Tokenizer.from_pretrained(folder / "encoder/tokenizer"),
                T5EncoderModel.from_pretrained(folder / "encoder/text_encoder", dtype=dtype),
                diffusers.AutoencoderKL.from_pretrained(folder / "decoder", torch_dtype=dtype),
                diffusers.PixArtTransformer2DModel.from_pretrained(folder / "models/large", torch_dtype=dtype),
                SOLVERS[solver](self.ladder.scheduler),
            )
        pipeline.set_progress_bar_config(disable=True)
        cache(pipeline)

        def make(captions: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
            # Of a class that diffusers has not prepared for it, too.
            with CacheMixin.cache_context(pipeline.transformer, "sampling"):
                images = pipeline(
                    prompt=[*captions],
                    latents=image_noise(seeds, self.ladder.sample_shape, "cpu")(-1).to(dtype),
                    num_inference_steps=steps,
                    guidance_scale=self.scale,
                    use_resolution_binning=False,
                    output_type="np",
                ).images
            registry = hooks.HookRegistry.check_if_exists_or_initialize(pipeline.transformer)
            registry.reset_stateful_hooks(recurse=True)
            return (images * 255).round().astype(np.uint8)

        return make

    def _interval(self, start: float, stop: float) -> Ladder:
        """The largest model with guidance from `start` to `stop` of the noise schedule only."""

        def change(raw: dict[str, Any]) -> None:
            raw["levels"][-1]["guidance"] |= {"start": start, "stop": stop}

        return self._further(f"interval-{start:g}-{stop:g}", change)

    def part(self, name: str, levels: Sequence[str]) -> Ladder:
        """The ladder `name` of some levels and their models, without plans."""

        def change(raw: dict[str, Any]) -> None:
            for part in ("models", "levels"):
                raw[part] = [entry for entry in raw[part] if entry["name"] in levels]

        return self._further(name, change)

    def _further(self, name: str, change: Callable[[dict[str, Any]], None]) -> Ladder:
        """A ladder of the same models without plans, whose description `change` has changed."""
        place = self.work / name
        if not place.exists():
            shutil.copytree(self.ladder.folder, place, ignore=shutil.ignore_patterns("training", "plan-*"))
            raw = json.loads((place / LADDER).read_text())
            change(raw)
            (place / LADDER).write_text(json.dumps(raw))
        return Ladder.load(place)

    def _number(self, name: str) -> int:
        return 1 + [level.name for level in self.ladder.levels].index(name)

    def _draw(self, **choices: Any) -> Make:
        """Images of an untuned plan, which every batch draws anew."""
        costs = self.ladder.costs("cpu")
        recipe = make_recipe(self.ladder, costs, "ode", DEFAULT_STEPS, **choices)

        def make(captions: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
            return self._sample(self.ladder, plan=recipe.plan(block_rng(0, seeds[0])))(captions, seeds)

        return make

    def _sample(self, ladder: Ladder, **arguments: Any) -> Make:
        return lambda captions, seeds: mlem_dist.sample(
            ladder, prompts=[*captions], seeds=[*seeds], precision="bfloat16", **arguments
        )


def made(make: Make, captions: Sequence[str], batch: int) -> tuple[np.ndarray, float]:
    """The images of captions, uint8 (n, H, W, 3), made in batches, and the time per image in seconds.

    The time is the median over batches, without the first of several.
    """
    images, times = [], []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        began = time.perf_counter()
        images.append(make(part, range(start, start + len(part))))
        times.append((time.perf_counter() - began) / len(part))
    return np.concatenate(images), float(np.median(times[1:] or times))


def seconds_alone(make: Make, captions: Sequence[str], batch: int, calls: int) -> float:
    """The time per image in seconds, where each call makes `calls` images."""
    make(captions[:batch], range(batch))
    began = time.perf_counter()
    made(make, captions[:TIMED], calls)
    return (time.perf_counter() - began) / TIMED


def seen_path(work: Path, row: str, num: int, batch: int) -> Path:
    """File of what the recogniser sees in the images of a row: its features and what it tells."""
    return work / f"{row}, {num} in batches of {batch}.npz"


def line(competitors: Competitors, captions: Sequence[str], batch: int, real: np.ndarray, name: str) -> dict[str, Any]:
    """Make the images of a row, and judge them; `real` are features of real images."""
    make, kept = competitors.way(name), competitors.work / f"reference-{competitors.ladder.digest[:8]}.npy"
    images, seconds = made(make, captions, batch)
    if not kept.exists():
        np.save(kept, made(competitors.reference(), captions[:COMPARED], 64)[0])
    difference = (images[:COMPARED].astype(float) - np.load(kept)) / 127.5
    errors = np.square(difference).mean((1, 2, 3))
    features, seen = look(load(RECOGNISER), torch.from_numpy(images).permute(0, 3, 1, 2))
    np.savez(seen_path(competitors.work, name, len(captions), batch), features=features, seen=seen)
    share, error = adherence(captions, seen)
    rng = np.random.default_rng(0)
    resampled = [frechet(features[rng.integers(len(features), size=len(features))], real) for _ in range(RESAMPLES)]
    return {
        "row": name,
        "seconds": seconds,
        "adherence": share,
        "adherence_error": error,
        "frechet": frechet(features, real),
        "frechet_error": float(np.std(resampled)),
        "recall": recall(real[: len(features)], features),
        "mse": float(errors.mean()),
        "median_mse": float(np.median(errors)),
        "num": len(captions),
        "batch": batch,
    }


@click.command()
@click.argument("row", required=False)
@click.option("--list", "listed", is_flag=True, help="Print the names of the rows.")
@click.option("--ladder", "name", default="garments", show_default=True)
@click.option("--data", type=click.Path(path_type=Path))
@click.option("--num", type=click.IntRange(COMPARED), default=2_000, show_default=True, help="Images.")
@click.option("--batch", default=BLOCK, show_default=True)
@click.option("--work", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path))
@click.option("--time", "timed", is_flag=True, help="Measure the times of all lines anew.")
def main(
    row: str | None,
    listed: bool,
    timed: bool,
    name: str,
    data: Path | None,
    num: int,
    batch: int,
    work: Path | None,
    out: Path | None,
) -> None:
    """Make the images of ROW, and write its line."""
    if listed:
        click.echo("\n".join(rows()))
        return
    if data is None or work is None or out is None:
        raise click.UsageError("--data, --work and --out are needed")
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    ladder = Ladder.load(name)
    settings = {"machine": platform.machine(), "ladder": ladder.digest}
    kept = json.loads(out.read_text()) if out.exists() else settings | {"rows": []}
    lines = kept.pop("rows")
    if kept != settings:
        raise click.UsageError(f"{out} is of another ladder or machine; choose another --out")
    images, captions, _ = read(data, "validation", 10_000)
    competitors = Competitors(ladder, work)
    if timed:
        for entry in lines:
            batch = entry["batch"]
            # `sample` makes blocks itself.
            calls = batch if is_pipeline(entry["row"]) else TIMED
            entry["seconds"] = seconds_alone(competitors.way(entry["row"]), captions, batch, calls)
            click.echo(f"{entry['row']}, batch {entry['batch']}: {entry['seconds']:.4f} s")
            out.write_text(json.dumps(settings | {"rows": lines}, indent=1) + "\n")
        return
    real, seen = look(load(RECOGNISER), images)
    click.echo(f"real images: adherence {adherence(captions, seen)[0]:.4f}")
    for wanted in [row] if row else rows():
        if batch != BLOCK and not is_pipeline(wanted):
            raise click.UsageError(f"--batch {batch}: {wanted} is no pipeline, and makes blocks of {BLOCK}")
        if any((line["row"], line["num"], line["batch"]) == (wanted, num, batch) for line in lines):
            continue
        measured = line(competitors, captions[:num], batch, real, wanted)
        click.echo(json.dumps(measured))
        # Other rows may have been made meanwhile.
        lines = [*(json.loads(out.read_text())["rows"] if out.exists() else []), measured]
        out.write_text(json.dumps(settings | {"rows": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
