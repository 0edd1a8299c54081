"""Affine step tables, with one row per step, of solvers that evaluate the drift once per step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from mlem_dist.errors import UsageError
from mlem_dist.solver.conversion import combination, convert

if TYPE_CHECKING:
    from mlem_dist.solver.process import Grid, Process

SOLVERS = ("ode", "sde", "dpm++")

Spacing = Literal["trailing", "model"]
"""Times of a grid: the ends of equal intervals ("trailing"), or the scheduler's own configuration ("model")."""

SPACINGS = get_args(Spacing)

ALIASES = {"ddim": "ode", "ddpm": "sde"}
"""Aliases of solvers: the methods to which they reduce on variance-preserving processes. Files of version 0.3 contain
these names."""

ETA = {"sde": 1.0, "ode": 0.0}
"""eta of `step_table` for each one-step solver: the share of the SDE's noise that a step takes."""


def canonical_solver(name: str) -> str:
    """The name in `SOLVERS` of a solver that is given by that name or by an alias.

    Raises:
        UsageError: if there is no such solver.
    """
    name = ALIASES.get(name, name)
    if name not in SOLVERS:
        raise UsageError(f"`solver` {name!r}: expected one of {', '.join(SOLVERS)}")
    return name


@dataclass(frozen=True)
class Memory:
    """The memory of a two-step solver: it adds d_i m_{i-1} to step i, with m_i = u_i x_i + v_i f(x_i, t_i).

    d, u and v are float64 (N,), and d_0 = 0.
    """

    d: np.ndarray
    u: np.ndarray
    v: np.ndarray


@dataclass(frozen=True)
class StepTable:
    """Rows of x_{i+1} = a_i x_i + b_i f(x_i, t_i) + c_i z_i with z_i ~ N(0, I), for i = 0 ... N-1.

    Attributes:
        t: time inputs of networks, float64 (N,).
        a: float64 (N,), like b and c.
        scale: standard deviation of the initial state x_0.
        memory: the memory of a two-step solver; None for one-step solvers.
    """

    t: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    scale: float = 1.0
    memory: Memory | None = None

    def __len__(self) -> int:
        return len(self.t)


def step_table(grid: Grid, eta: float, drift: str = "epsilon") -> StepTable:
    """The table of the SDE (eta = 1: DDPM), the ODE (eta = 0: DDIM, Euler's method for flows), or any eta between.

    The step goes from (alpha, sigma) to (alpha', sigma'), with noise of standard deviation c (Song et al.,
    arXiv:2010.02502, eq. 12 and 16):

        c = eta sigma' / sigma sqrt(sigma^2 - (alpha / alpha')^2 sigma'^2)
        x' = alpha' x0 + sqrt(sigma'^2 - c^2) epsilon + c z

    Args:
        grid: the times, with alpha and sigma.
        eta: share of the SDE's noise, from 0 to 1.
        drift: the prediction that f stands for, one of `conversion.PREDICTIONS`.
    """
    alpha, sigma, after, low = grid.alpha[:-1], grid.sigma[:-1], grid.alpha[1:], grid.sigma[1:]
    # `maximum` removes negative values due to rounding.
    c = eta * low / sigma * np.sqrt(np.maximum(sigma**2 - (alpha / after * low) ** 2, 0))
    wanted = after, np.sqrt(np.maximum(low**2 - c**2, 0))
    a, b = convert(combination(drift, alpha, sigma), wanted, alpha, sigma)
    return StepTable(grid.t, np.asarray(a), np.asarray(b), c, grid.scale)


def two_step_table(grid: Grid, drift: str = "epsilon") -> StepTable:
    """The table of DPM-Solver++(2M) (Lu et al., arXiv:2211.01095, algorithm 2).

    With h the growth of lambda in a step, r = h_{i-1} / h_i and m_i the image that f predicts at step i:

        x_{i+1} = sigma' / sigma x_i - alpha' (e^-h - 1) ((1 + 1 / 2r) m_i - 1 / 2r m_{i-1})

    The first step has no memory, and the last step, to sigma' = 0, has an infinite h: both are of first order. A
    second step after alpha = 0, where 1 / r = 0, is of first order too.
    """
    first_order = step_table(grid, 0.0, drift)
    alpha, sigma, after, low = grid.alpha[:-1], grid.sigma[:-1], grid.alpha[1:], grid.sigma[1:]
    share = after - alpha * low / sigma
    h = np.diff(grid.log_snr)
    ahead = np.zeros(len(grid))
    ahead[1:-1] = h[1:] / h[:-1] / 2
    d = -share * ahead
    u, v = convert(combination(drift, alpha, sigma), (1.0, 0.0), alpha, sigma)
    memory = Memory(d, np.asarray(u), np.asarray(v))
    return replace(first_order, a=first_order.a - d * u, b=first_order.b - d * v, memory=memory)


def solver_table(process: Process, steps: int, solver: str, spacing: Spacing = "trailing") -> StepTable:
    """The step table of one of `SOLVERS` for the drift of a process.

    Raises:
        UsageError: if `steps` is out of range.
    """
    grid = process.grid(steps, spacing)
    return two_step_table(grid, process.drift) if solver == "dpm++" else step_table(grid, ETA[solver], process.drift)
