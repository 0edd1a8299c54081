"""Measure a ladder on a device: time, denoising error, increments, their effect on the samples, gamma, speed-up.

The results are stored by device in `calibration.json`, in the ladder's folder or in another folder. They are not part
of the ladder's digest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlem_dist.errors import UsageError
from mlem_dist.ladder.calibration import device_key, store_entry
from mlem_dist.ladder.images import Images
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.latents import samples_of_images
from mlem_dist.ladder.measure import BATCH, denoising_errors, seconds_per_sample
from mlem_dist.ladder.schema import Level
from mlem_dist.models.graphs import as_run
from mlem_dist.models.pixels import to_range
from mlem_dist.solver.condition import Condition, move
from mlem_dist.solver.integrate import Drift, evaluate, integrate, trajectory
from mlem_dist.solver.noise import Noise, coarse_noise, image_noise
from mlem_dist.solver.plan import single_level
from mlem_dist.solver.probabilities import Base
from mlem_dist.solver.schedulers import BANDS
from mlem_dist.solver.steps import ETA, StepTable, solver_table
from mlem_dist.tuning.gamma import Interval, Reading, read_error, read_increments
from mlem_dist.tuning.neyman import nfe_at_error, rung_sets
from mlem_dist.tuning.recipes import base_of
from mlem_dist.tuning.reporting import ReportStage

BATCHES = {"cpu": (1, 8, BATCH["cpu"]), "cuda": (1, 64, BATCH["cuda"])}
"""Batch sizes at which levels are timed, by device type. The last one gives the costs by which levels are compared."""
EM_STEPS = (5, 10, 20, 50)
RESAMPLES = 200

CAPTIONED = 1_000
"""Largest number of held-out images with captions, which are encoded together."""


@dataclass(frozen=True)
class LevelCalibration:
    """Measurements of one level.

    Attributes:
        seconds: seconds per sample, by batch size.
        compiled: `seconds` with torch.compile; empty if not measured, and for Gaussian levels.
        denoising_error: mean squared error per value of the drift, by band of timesteps, float64 (bands,); None without
            images.
    """

    name: str
    kind: str
    seconds: dict[int, float]
    compiled: dict[int, float]
    denoising_error: np.ndarray | None

    @property
    def rms_error(self) -> float | None:
        """Root of the mean squared denoising error over all bands; None without images."""
        return None if self.denoising_error is None else math.sqrt(self.denoising_error.mean())


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Images on which no level was trained.

    Attributes:
        images: the images, uint8 or as latents (n, C, H, W).
        condition: their condition.
        in_range: map from a part of them to a finished sample's values.
    """

    images: Tensor
    condition: Condition
    in_range: Callable[[Tensor], Tensor] = to_range

    @classmethod
    def of(cls, images: Images, ladder: Ladder) -> HeldOut:
        """The held-out part of a dataset, as samples of a ladder; at most `CAPTIONED` images with captions."""
        part = slice(CAPTIONED if images.captions else None)
        x0, label, in_range = samples_of_images(ladder, images.test[part], images.test_label[part])
        if not images.captions:
            return cls(x0, images.condition(label), in_range)
        captions = tuple(images.captions[number] for number in label.tolist())
        return cls(x0, replace(ladder, prompts=captions).condition(torch.arange(len(captions))), in_range)

    def errors(self, module: nn.Module, ladder: Ladder, device: str, per_band: int) -> np.ndarray:
        """Squared errors of a level's drift, float64 (bands, per_band), as in `denoising_errors`."""
        images, condition = self.images.to(device), move(self.condition, device)
        return denoising_errors(module, images, condition, ladder.process, BANDS, per_band, self.in_range)


@dataclass(frozen=True)
class SpeedUp:
    """Predicted speed-up of ML-EM over Euler-Maruyama with `em_steps` steps of the best level, at equal error.

    Attributes:
        em_steps: m, the number of Euler-Maruyama steps; their cost is m T_K.
        error: mean squared error per value of Euler-Maruyama against the N-step trajectory with the same noise.
        nfe: expected cost of ML-EM on the N steps with the best choice of rungs, in evaluations of the best level.
            Its independent coins of Neyman's probabilities add `error` to first order.
        rungs: the best choice of rungs, levels by number from 1.
        ratio: m / nfe, the predicted speed-up.
        interval: 95 % interval of `ratio`, by bootstrap over samples.
    """

    em_steps: int
    error: float
    nfe: float
    rungs: tuple[int, ...]
    ratio: float
    interval: Interval


@dataclass(frozen=True)
class SolverCalibration:
    """Measurements along trajectories of the best level, with one solver and N steps.

    Attributes:
        t: timestep of each step, int64 (N,).
        increments: E|f^k - f^(k-1)|^2 per value at the states of the trajectories, float64 (K, N), with f^0 = 0.
        products: W_kl = E[d_k d_l] per value, float64 (K, K, N). At step i, d_k is the first-order change of the final
            sample if level k's increment is added to the drift once more.
        speed_up: predicted speed-ups, by number of Euler-Maruyama steps.
    """

    t: np.ndarray
    increments: np.ndarray
    products: np.ndarray
    speed_up: tuple[SpeedUp, ...]

    @property
    def effect(self) -> np.ndarray:
        """W_k = W_kk, float64 (K, N): expected squared change of the final sample by each increment."""
        return np.einsum("kki->ki", self.products)


@dataclass(frozen=True)
class Calibration:
    """All measurements of a ladder on one device.

    Attributes:
        device: "cpu" or "cuda", a slash, and the name of the processor or GPU.
        samples: number of trajectories per solver.
        images: number of held-out images per band of timesteps; 0 without images.
        levels: measurements of each level, cheapest first.
        solvers: measurements by solver, "sde" and "ode".
        gamma: readings of gamma: "error" from the denoising errors of the UNets, "increments" from the increments
            between UNets on the DDPM trajectories. Empty for fewer than three UNets, too few to fit a line to; without
            "error" if there are no images.
    """

    device: str
    torch: str
    samples: int
    images: int
    levels: tuple[LevelCalibration, ...]
    solvers: dict[str, SolverCalibration]
    gamma: dict[str, Reading]


def calibrate(
    ladder: Ladder,
    device: str,
    progress: ReportStage = lambda stage, done, total: None,
    *,
    held_out: HeldOut | None = None,
    per_band: int = 500,
    steps: int = 100,
    samples: int = 32,
    compiled: bool = False,
) -> Calibration:
    """Measure `ladder` on `device`, "cpu" or "cuda".

    The cost is about 10 `per_band` + 2 `samples` `steps` evaluations of every level. For the best level, the second
    term is 10 `samples` `steps`.

    Args:
        progress: callback with the current stage.
        held_out: images on which no level was trained; None to leave out denoising errors.
        per_band: number of images per band of timesteps for the denoising error.
        steps: N, the number of steps of the trajectories; capped at the length of the noise schedule.
        samples: number of trajectories per solver.
        compiled: whether to time UNets with torch.compile too, which takes about a minute per UNet and batch size.

    Raises:
        UsageError: if the ladder has only one level, or a level's weights are unreadable.
        ArithmeticError: if a level is not finite along a trajectory.
    """
    if len(ladder.levels) < 2:
        raise UsageError(f"ladder {ladder.name!r} has one level, and calibration compares levels; expected two or more")
    numbers = range(1, len(ladder.levels) + 1)
    modules = {k: ladder.load_level(k, device) for k in numbers}
    levels, errors = [], []
    for k, level in zip(numbers, ladder.levels, strict=True):
        progress("time and denoising error" if held_out else "time", k, len(modules))
        seconds = _seconds(ladder, modules[k], device)
        compiled_seconds = {}
        if compiled and level.kind == "unet":
            # Compile another copy: all other measurements run the level as `generate` does.
            module: Any = ladder.load_level(k, device)
            module.model.compile(dynamic=False)
            compiled_seconds = _seconds(ladder, module, device)
        if held_out:
            errors.append(held_out.errors(modules[k], ladder, device, per_band))
        error = errors[-1].mean(1) if errors else None
        levels.append(LevelCalibration(level.name, level.kind, seconds, compiled_seconds, error))
    cost = np.array([level.seconds[BATCH[device]] for level in levels])

    steps = min(steps, ladder.process.length)
    number, classes = torch.arange(samples, device=device), ladder.conditions
    chosen = number * classes // samples if classes > samples else number
    solvers, increments = {}, {}
    for name in ETA:
        solvers[name], increments[name] = _along_trajectories(ladder, modules, name, steps, chosen, cost, progress)
    return Calibration(
        device=device_key(device),
        torch=torch.__version__,
        samples=samples,
        images=per_band if held_out else 0,
        levels=tuple(levels),
        solvers=solvers,
        gamma=_gamma(levels, cost, errors, increments["sde"].mean(1)),
    )


def _seconds(ladder: Ladder, module: nn.Module, device: str) -> dict[int, float]:
    """Seconds per sample by batch size."""
    return {batch: seconds_per_sample(as_run(module, device), ladder, device, batch) for batch in BATCHES[device]}


def _along_trajectories(
    ladder: Ladder,
    levels: Mapping[int, nn.Module],
    solver: str,
    steps: int,
    samples: Tensor,
    cost: np.ndarray,
    progress: ReportStage,
) -> tuple[SolverCalibration, np.ndarray]:
    """Measurements with one solver, and increments, float64 (K, N, B); `samples` (B,) number their conditions."""

    def report(stage: str, done: int, total: int) -> None:
        progress(f"{solver}: {stage}", done, total)

    table, condition = solver_table(ladder.process, steps, solver), ladder.condition(samples)
    noise = image_noise(range(len(samples)), ladder.sample_shape, samples.device)
    states = best_trajectory(levels, table, noise, condition, report)
    if not states[-1].isfinite().all():
        raise _not_finite(ladder.levels[-1], "does not end")
    probe = torch.randint(2, states[0].shape, generator=torch.Generator().manual_seed(0)).to(samples.device) * 2.0 - 1
    increments, change = propagate(levels, table, states, condition, probe, report)
    for level, changes in zip(ladder.levels, change, strict=True):
        if not np.isfinite(changes).all():
            raise _not_finite(level, "is not, along trajectories of the best one,")
    counts = [m for m in EM_STEPS if m < steps and steps % m == 0]
    rng = np.random.default_rng(0)
    rows = []
    for done, m in enumerate(counts, 1):
        report("Euler-Maruyama with fewer steps", done, len(counts))
        coarse = solver_table(ladder.process, m, solver)
        plan = single_level(len(levels), len(levels), m)
        end = integrate(levels, coarse, plan, coarse_noise(noise, table, steps // m), condition)
        em = _per_sample((end - states[-1]).square())
        rows.append(_speed_up(m, em, change, cost, base_of(ladder, solver, "impulse"), rng))
    return SolverCalibration(table.t, increments.mean(2), products_of(change), tuple(rows)), increments


def _not_finite(level: Level, does: str) -> ArithmeticError:
    return ArithmeticError(
        f"level {level.name!r} {does} in finite numbers; train it on, or leave it out of ladder.json"
    )


def _gamma(
    levels: Sequence[LevelCalibration], cost: np.ndarray, errors: Sequence[np.ndarray], increments: np.ndarray
) -> dict[str, Reading]:
    """Readings of gamma from K errors (bands, per_band), if there are any, and increments (K, samples).

    There are none for too few UNets.
    """
    unets = [k for k, level in enumerate(levels) if level.kind != "gaussian"]
    upper_unets = [k for k in unets if k - 1 in unets]
    if len(upper_unets) < 2:
        return {}
    rng = np.random.default_rng(0)
    readings = {}
    if errors:
        names = tuple(levels[k].name for k in unets)
        readings["error"] = read_error(names, cost[unets], np.stack([errors[k] for k in unets]), rng)
    names = tuple(levels[k].name for k in upper_unets)
    return readings | {"increments": read_increments(names, cost[upper_unets], increments[upper_unets], rng)}


@torch.inference_mode()
def best_trajectory(
    levels: Mapping[int, Drift],
    table: StepTable,
    noise: Noise,
    condition: Condition,
    progress: ReportStage = lambda stage, done, total: None,
) -> list[Tensor]:
    """States x_0 ... x_N of Euler-Maruyama with the best of the levels 1 ... K, each float32 (B, C, H, W)."""
    run = trajectory(table, single_level(len(levels), len(levels), len(table)), noise)
    states = []
    request = next(run)
    while True:
        progress("trajectories", request.step + 1, len(table))
        states.append(request.x)
        try:
            request = run.send(evaluate(levels, request.terms, request.x, request.t, condition))
        except StopIteration as end:
            return [*states, end.value]


def propagate(
    levels: Mapping[int, Drift],
    table: StepTable,
    states: Sequence[Tensor],
    condition: Condition,
    probe: Tensor,
    progress: ReportStage = lambda stage, done, total: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Increments along a trajectory of the best level, and their first-order effects on the final sample.

    Let J_i be the derivative of x_N with respect to x_{i+1} along the trajectory. To first order, level k's increment D
    at step i moves the final sample by J_i b_i D. For a probe v of independent random signs,
    |J_i b_i D|^2 = E<v, J_i b_i D>^2. One backward pass over the trajectory, by `adjoint`, therefore serves every level
    and step.

    Args:
        levels: the levels, by number 1 ... K.
        states: x_0 ... x_N.
        condition: the condition of the samples.
        probe: v, signs +-1 in the shape of x.

    Returns:
        Two arrays, float64 (K, N, B): the mean square of the increments' values, and <v, J_i b_i D> divided by the
        square root of the number of values.
    """
    increments, change = np.empty((2, len(levels), len(table), len(probe)))
    for i, g, values in adjoint(levels, table, states, condition, probe):
        progress("increments and their effect", len(table) - i, len(table))
        increments[:, i] = [_per_sample(increment.square()) for increment in values]
        moved = np.array([_per_sample(g * increment) for increment in values])
        change[:, i] = float(table.b[i]) * moved * g[0].numel() ** 0.5
    return increments, change


def adjoint(
    levels: Mapping[int, Drift], table: StepTable, states: Sequence[Tensor], condition: Condition, probe: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield i, g_i = J_i^T v in the shape of x, and the increments at x_i, (K, B, C, H, W), from the last step back.

    J_i is the derivative of x_N with respect to x_{i+1} along the trajectory x_0 ... x_N of the best level:

        g_{N-1} = v ,    g_{i-1} = a_i g_i + b_i (df^K/dx (x_i, t_i))^T g_i
    """
    best, g = len(levels), probe
    for i in reversed(range(len(table))):
        t = torch.full((len(probe),), float(table.t[i]), device=probe.device)
        # A copy, because the states may be inference tensors, which record no gradient.
        x = states[i].clone().requires_grad_()
        top = levels[best](x, t, condition, {})
        with torch.no_grad():
            drifts = torch.stack([*(levels[k](x, t, condition, {}) for k in range(1, best)), top])
        yield i, g, torch.diff(drifts, dim=0, prepend=torch.zeros_like(drifts[:1]))
        (pull,) = torch.autograd.grad(top, x, g)
        g = float(table.a[i]) * g + float(table.b[i]) * pull


def products_of(change: np.ndarray) -> np.ndarray:
    """W_kl, float64 (K, K, N), from the changes (K, N, B) that `propagate` returns."""
    return np.einsum("kib,lib->kli", change, change) / change.shape[2]


def _per_sample(values: Tensor) -> np.ndarray:
    """Mean over all but the first dimension, float64 (B,)."""
    return values.detach().flatten(1).double().mean(1).cpu().numpy()


def _speed_up(
    em_steps: int, em: np.ndarray, change: np.ndarray, cost: np.ndarray, base: Base, rng: np.random.Generator
) -> SpeedUp:
    """Speed-up over `em_steps` Euler-Maruyama steps, from errors em (B,) and changes (K, N, B) of the same samples."""

    def nfe(rungs: tuple[int, ...], index: np.ndarray) -> float:
        return nfe_at_error(products_of(change[:, :, index]), rungs, cost, float(em[index].mean()), base)

    all_samples = np.arange(len(em))
    least, rungs = min((nfe(rungs, all_samples), rungs) for rungs in rung_sets(len(cost)))
    resampled = [em_steps / nfe(rungs, rng.integers(len(em), size=len(em))) for _ in range(RESAMPLES)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return SpeedUp(em_steps, float(em.mean()), least, rungs, em_steps / least, (float(low), float(high)))


def store(folder: Path, ladder: Ladder, calibration: Calibration) -> Path:
    """Write the calibration into `folder`/calibration.json by `store_entry`, and return that path."""
    entry = _plain(asdict(calibration)) | {
        "gamma": {
            quantity: _plain(asdict(reading))
            | {name: _plain(getattr(reading, name)) for name in ("gamma", "gamma_interval", "gamma_range", "htmc")}
            for quantity, reading in calibration.gamma.items()
        }
    }
    return store_entry(folder, ladder, calibration.device, entry)


def _plain(value: Any) -> Any:
    """JSON-ready value: arrays as lists, numbers with six significant digits, infinities and NaN as None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
