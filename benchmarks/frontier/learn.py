"""Learned probabilities: p_k(i) = sigmoid(alpha_k tau_i + beta_k) by stochastic gradient (Jacot, arXiv:2603.24594).

Minimised is E|x_N - x*_N|^2 / d + price E[cost] over independent coins with impulses B / p, where x*_N is the best
level's end on the same initial noise and Brownian path. The expectation depends on the parameters in two ways: by how
often the coins fall, whose derivative is the score function's, (B - p) / (p (1 - p)) dp, and through B / p in each
trajectory, whose derivative is carried along the trajectory forwards, in one random direction of the parameters, so
that memory does not grow with the number of steps. The cost's derivative is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from mlem_dist.solver.bisection import last_below
from mlem_dist.solver.condition import Condition, take
from mlem_dist.solver.costs import as_costs
from mlem_dist.solver.integrate import Drift, Noise
from mlem_dist.solver.probabilities import expected_cost
from mlem_dist.solver.steps import StepTable

CEILING = 1 - 1e-6


@dataclass(frozen=True, eq=False)
class Logistic:
    """Probabilities of the levels above the first, which is always drawn.

    Attributes:
        coefficients: rows alpha and beta, float64 (2, K - 1).
        tau: float64 (N,): lambda, half the log of the signal-to-noise ratio, scaled to mean 0 and variance 1. It
            increases along the trajectory, and an increment's effect is close to a power of that ratio, so that log p
            is nearly a line in it.
    """

    coefficients: np.ndarray
    tau: np.ndarray

    @property
    def features(self) -> np.ndarray:
        """(tau_i, 1), float64 (2, N): the derivative of the logit by alpha and beta."""
        return np.stack([self.tau, np.ones_like(self.tau)])

    @property
    def probabilities(self) -> np.ndarray:
        """p, float64 (K, N)."""
        p = 1 / (1 + np.exp(-(self.coefficients.T @ self.features)))
        return np.concatenate([np.ones((1, len(self.tau))), p])

    def moved(self, step: np.ndarray) -> Logistic:
        """With `step`, (2, K - 1) or (2, 1), added to the coefficients."""
        return Logistic(self.coefficients + step, self.tau)


def scaled(log_snr: np.ndarray) -> np.ndarray:
    """tau of `Logistic` from lambda (N,)."""
    return np.asarray((log_snr - log_snr.mean()) / log_snr.std())


def fit_logistic(p: np.ndarray, tau: np.ndarray) -> Logistic:
    """The logistic probabilities whose logits are closest to those of p (K, N): where learning starts."""
    inner = p[1:].clip(1e-6, CEILING)
    logit = np.log(inner / (1 - inner))
    features = np.stack([tau, np.ones_like(tau)], 1)
    return Logistic(np.linalg.lstsq(features, logit.T, rcond=None)[0], tau)


def with_budget(logistic: Logistic, cost: Callable[[np.ndarray], float], budget: float) -> Logistic:
    """The same with one number added to every beta, so that cost(p) is the budget."""

    def moved(delta: float) -> Logistic:
        return logistic.moved(np.array([[0.0], [delta]]))

    return moved(last_below(lambda delta: cost(moved(delta).probabilities) < budget, -40.0, 40.0))


@torch.no_grad()
def end_and_slope(
    levels: Mapping[int, Drift],
    table: StepTable,
    weight: np.ndarray,
    slope: np.ndarray,
    noise: Noise,
    condition: Condition,
) -> tuple[Tensor, Tensor]:
    """x_N of x_{i+1} = a_i x_i + b_i sum_k weight_k(i) (f^k - f^{k-1})(x_i, t_i) + c_i z_i, and its derivative.

    Args:
        levels: by number, 1 ... K.
        weight: float64 (K, N).
        slope: float64 (K, N), the weights' derivative in one direction.
        noise: z_i by step, and the initial state.
        condition: the condition of the samples.

    Returns:
        x_N and its derivative in that direction, in the shape of x.
    """
    # By level instead of by increment; a level is called where its own increment or the one above is drawn.
    above = np.pad(weight, ((0, 1), (0, 0)))[1:], np.pad(slope, ((0, 1), (0, 0)))[1:]
    level_weight, level_slope = weight - above[0], slope - above[1]
    needed = (weight != 0) | (above[0] != 0)
    x = noise(-1)
    dx = torch.zeros_like(x)
    for i in range(len(table)):
        t = torch.full((len(x),), float(table.t[i]), device=x.device)
        f, df = torch.zeros_like(x), torch.zeros_like(x)
        for k in np.flatnonzero(needed[:, i]).tolist():
            level = levels[k + 1]
            value, change = _with_derivative(level, x, dx, t, condition)
            f.add_(value, alpha=level_weight[k, i])
            df.add_(change, alpha=level_weight[k, i]).add_(value, alpha=level_slope[k, i])
        x = float(table.a[i]) * x + float(table.b[i]) * f
        dx = float(table.a[i]) * dx + float(table.b[i]) * df
        if table.c[i]:
            x.add_(noise(i), alpha=float(table.c[i]))
    return x, dx


class _Contiguous(TorchFunctionMode):
    """Group normalisation's forward derivative needs contiguous values and derivatives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.group_norm:
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        return func(*args, **(kwargs or {}))


def _with_derivative(level: Drift, x: Tensor, dx: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    # The fused kernels of attention have no forward derivative.
    with sdpa_kernel(SDPBackend.MATH), _Contiguous():
        value, change = torch.func.jvp(lambda y: level(y, t, condition, {}), (x,), (dx,))
    return value, change


@dataclass(frozen=True)
class Draw:
    """What one draw of the coins says about the expected error.

    Attributes:
        error: mean squared error per value.
        score: the derivative of the draw's log probability by the coefficients, float64 (2, K - 1).
        slope: the error's derivative, with the coins fixed, in the direction that was asked for.
    """

    error: float
    score: np.ndarray
    slope: float


def try_coins(
    levels: Mapping[int, Drift],
    table: StepTable,
    logistic: Logistic,
    fire: np.ndarray,
    direction: np.ndarray,
    noise: Noise,
    condition: Condition,
    target: Tensor,
) -> Draw:
    """The error of coins `fire`, bool (K, N), and its derivatives; `direction` is float64 (2, K - 1)."""
    p, features = logistic.probabilities, logistic.features
    weight = np.where(fire, 1 / p, 0.0)
    # d(1/p) = -(1 - p) / p d(logit), and the logit's derivative in the direction is linear in the features.
    slope = np.zeros_like(weight)
    slope[1:] = -weight[1:] * (1 - p[1:]) * (direction.T @ features)
    end, change = end_and_slope(levels, table, weight, slope, noise, condition)
    off = (end - target).double()
    return Draw(
        error=float(off.square().mean()),
        score=features @ (fire[1:] - p[1:]).T,
        slope=float((2 * off * change).mean()),
    )


def error_gradient(draws: list[Draw], directions: list[np.ndarray]) -> np.ndarray:
    """The derivative of the expected error by the coefficients, float64 (2, K - 1), estimated from two draws or more.

    Unbiased for draws that are independent of each other and directions of independent standard normal numbers: the
    baseline of each draw's score is the mean error of the others.
    """
    errors = np.array([draw.error for draw in draws])
    others = (errors.sum() - errors) / (len(errors) - 1)
    return np.asarray(
        np.mean(
            [
                (draw.error - base) * draw.score + draw.slope * direction
                for draw, base, direction in zip(draws, others, directions, strict=True)
            ],
            axis=0,
        )
    )


@dataclass(frozen=True)
class Step:
    """One step of learning: what was reached before it, the error by the mean of its draws."""

    logistic: Logistic
    error: float
    cost: float


def learn(
    levels: Mapping[int, Drift],
    table: StepTable,
    start: Logistic,
    cost: np.ndarray,
    noise: Noise,
    condition: Condition,
    target: Tensor,
    seed: int,
    batch: int = 8,
    draws: int = 8,
    rate: float = 0.1,
) -> Iterator[Step]:
    """Steps of Adam (Kingma & Ba, arXiv:1412.6980) without end, the first one telling of `start`.

    The price of cost is the first step's error over its cost: where an error falls as 1 / cost, as that of coins does,
    error + price cost is then least at that cost, so that learning spends the budget otherwise but keeps it.

    Args:
        levels: by number, 1 ... K.
        table: N steps.
        start: where to begin.
        cost: T, float64 (K,), seconds per sample.
        noise: z_i by step, and the initial state, for all samples.
        condition: the condition of the samples.
        target: x*_N, (n, C, H, W).
        seed: of coins and directions.
        batch: samples per step, in turn; all of a step's draws take the same ones, so that errors differ by the coins.
        draws: of the coins per step.
        rate: of Adam, in units of the logit.
    """
    rng = np.random.default_rng(seed)
    logistic, price = start, None
    mean, square = np.zeros_like(start.coefficients), np.zeros_like(start.coefficients)
    parts = torch.arange(len(target)).split(batch)
    step = 0
    while True:
        p = logistic.probabilities
        directions = [rng.standard_normal(mean.shape) for _ in range(draws)]
        rows = parts[step % len(parts)]
        shared = _rows(noise, rows)
        found = [
            try_coins(levels, table, logistic, rng.random(p.shape) < p, u, shared, take(condition, rows), target[rows])
            for u in directions
        ]
        error, spent = float(np.mean([draw.error for draw in found])), expected_cost(p, cost)
        yield Step(logistic, error, spent)
        price = error / spent if price is None else price
        gradient = error_gradient(found, directions) + price * cost_gradient(logistic, cost)
        step += 1
        mean, square = 0.9 * mean + 0.1 * gradient, 0.99 * square + 0.01 * gradient**2
        scale = np.sqrt(square / (1 - 0.99**step)) + 1e-12
        logistic = logistic.moved(-rate * mean / (1 - 0.9**step) / scale)


def _rows(noise: Noise, rows: Tensor) -> Noise:
    return lambda step: noise(step)[rows]


def cost_gradient(logistic: Logistic, cost: np.ndarray) -> np.ndarray:
    """The derivative of sum_ik p_k(i) (T_k + T_{k-1}) by the coefficients, float64 (2, K - 1)."""
    p = logistic.probabilities[1:]
    return np.asarray(logistic.features @ (p * (1 - p) * as_costs(cost).increments[1:, None]).T)
