"""Affine step tables: one row per step of a solver that evaluates the drift once a step."""

from dataclasses import dataclass

import numpy as np

from mlem_dist.errors import UsageError

SOLVERS = ("ddpm", "ddim", "dpm++")
ETA = {"ddpm": 1.0, "ddim": 0.0}


@dataclass(frozen=True)
class Memory:
    """The memory of a two-step solver: it adds d_i m_{i-1} to step i, with m_i = u_i x_i + v_i f(x_i, t_i).

    Each is float64 (N,).

    d_0 = 0.
    """

    d: np.ndarray
    u: np.ndarray
    v: np.ndarray


@dataclass(frozen=True)
class StepTable:
    """Rows of x_{i+1} = a_i x_i + b_i f(x_i, t_i) + c_i z_i with z_i ~ N(0, I), for i = 0 ... N-1.

    t is int64 (N,), a timestep of the noise schedule; a, b, c are float64 (N,). Two-step solvers have a `memory`.
    """

    t: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    memory: Memory | None = None

    def __len__(self) -> int:
        return len(self.t)


def timesteps(train_steps: int, steps: int) -> np.ndarray:
    """The N = `steps` timesteps of a schedule of `train_steps`, int64, decreasing: diffusers' spacing "trailing".

    Raises:
        UsageError: unless 1 <= steps <= train_steps.
    """
    if not 1 <= steps <= train_steps:
        raise UsageError(f"steps is {steps}, expected 1 to {train_steps}, the length of the ladder's noise schedule")
    # Same rounding as diffusers' arange(T, 0, -T/N), which can return one element too many.
    return (np.arange(train_steps, 0, -train_steps / steps)[:steps].round() - 1).astype(np.int64)


def half_log_snr(alpha_bar: np.ndarray, t: np.ndarray) -> np.ndarray:
    """lambda = log(alpha_bar / (1 - alpha_bar)) / 2 at the timesteps t, float64 (N,)."""
    ab = alpha_bar[t]
    return np.asarray(np.log(ab / (1 - ab)) / 2)


def step_table(alpha_bar: np.ndarray, steps: int, eta: float) -> StepTable:
    """The table of DDPM (eta = 1, the SDE), DDIM (eta = 0, the ODE) or any eta between, for a noise prediction f.

    With s the time after t, and alpha_bar_s = 1 after the last step (Song et al., arXiv:2010.02502, eq. 12 and 16):

        c = eta sqrt((1 - ab_s) / (1 - ab_t) (1 - ab_t / ab_s))
        a = sqrt(ab_s / ab_t)
        b = sqrt(1 - ab_s - c^2) - a sqrt(1 - ab_t)

    Args:
        alpha_bar: float64 (T,), the noise schedule.
        steps: N, from 1 to T.

    Raises:
        UsageError: if `steps` is out of range.
    """
    t = timesteps(len(alpha_bar), steps)
    ab_t = alpha_bar[t]
    ab_s = np.append(alpha_bar[t[1:]], 1.0)
    c = eta * np.sqrt((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s))
    a = np.sqrt(ab_s / ab_t)
    # 1 - ab_s - c^2 is zero but for rounding after the last step.
    b = np.sqrt(np.maximum(1 - ab_s - c**2, 0)) - a * np.sqrt(1 - ab_t)
    return StepTable(t, a, b, c)


def two_step_table(alpha_bar: np.ndarray, steps: int) -> StepTable:
    """The table of DPM-Solver++(2M) on the trailing grid, for a noise prediction f (Lu et al., arXiv:2211.01095).

    With s the time after t, alpha = sqrt(ab), sigma = sqrt(1 - ab), h = lambda_s - lambda_t, r = h_{i-1} / h_i and the
    predicted image m_i = (x_i - sigma_t f) / alpha_t (algorithm 2):

        x_{i+1} = sigma_s / sigma_t x_i - alpha_s (e^-h - 1) ((1 + 1 / 2r) m_i - 1 / 2r m_{i-1})

    The first step has nothing to remember and the last one, to alpha_bar = 1, has an infinite h: both are of first
    order, which is DDIM.

    Raises:
        UsageError: if `steps` is out of range.
    """
    first_order = step_table(alpha_bar, steps, 0.0)
    t = first_order.t
    ab = alpha_bar[t]
    alpha, sigma = np.sqrt(ab), np.sqrt(1 - ab)
    # of the image predicted at each step, by a first-order step
    share = alpha * first_order.a - alpha / sigma * np.append(sigma[1:], 0.0)
    h = np.diff(half_log_snr(alpha_bar, t))
    ahead = np.zeros(steps)
    ahead[1:-1] = h[1:] / h[:-1] / 2
    d = -share * ahead
    u, v = 1 / alpha, -sigma / alpha
    return StepTable(t, first_order.a - d * u, first_order.b - d * v, first_order.c, Memory(d, u, v))


def solver_table(alpha_bar: np.ndarray, steps: int, solver: str) -> StepTable:
    """The table of one of `SOLVERS` on the trailing grid.

    Raises:
        UsageError: if `steps` is out of range.
    """
    return two_step_table(alpha_bar, steps) if solver == "dpm++" else step_table(alpha_bar, steps, ETA[solver])
