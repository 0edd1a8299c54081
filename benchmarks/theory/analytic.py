"""An analytic ladder, ML-EM on it for many replicas at a time, and what the theory predicts of its cost."""

import numpy as np

from mlem_dist.solver.plan import draw_coins, impulse

CHUNK = 128
"""Steps whose coins are drawn together: enough to keep numpy busy, little enough for memory."""


class Replicas:
    """Independent replicas, each with its own Brownian path, ladder and solution.

    The equation is dx = f(x) dt + dW on [0, 1] in the plane, with f(x) = sin(x) by component and x_0 ~ N(0, I). Level k
    is f^k = f + 2^-k g_k, with g_k(x) = (cos, sin)(phase_k + wave_k . x): a field of unit length everywhere, of
    Lipschitz constant 1, and of its own random direction for each level and replica. So |f^k - f| = 2^-k exactly, and
    E|f^k - f^(k-1)|^2 = 4^-k + 4^-(k-1).
    """

    def __init__(self, count: int, levels: int, finest: int, rng: np.random.Generator) -> None:
        self.x0 = rng.standard_normal((2, count))
        self.phase = rng.uniform(0, 2 * np.pi, (levels, count))
        angle = rng.uniform(0, 2 * np.pi, (levels, count))
        self.wave = np.stack([np.cos(angle), np.sin(angle)])
        self.increments = {finest: rng.standard_normal((finest, 2, count)) / np.sqrt(finest)}
        steps = finest
        while steps % 2 == 0:
            fine = self.increments[steps]
            steps //= 2
            self.increments[steps] = fine[0::2] + fine[1::2]
        self.solution = self.solve(finest, rng)

    def solve(self, steps: int, rng: np.random.Generator) -> np.ndarray:
        """x(1) on the Brownian path by the Taylor scheme of strong order 1.5 (Kloeden & Platen, 1992, eq. 10.4.10)."""
        eta = 1 / steps
        x = self.x0
        for dw in self.increments[steps]:
            # The integral of W - W_t over the step, jointly Gaussian with dw.
            dz = eta / 2 * dw + np.sqrt(eta**3 / 12) * rng.standard_normal(dw.shape)
            sin, cos = np.sin(x), np.cos(x)
            x = x + eta * sin + dw + cos * dz + eta**2 / 2 * (cos * sin - sin / 2)
        return x


def sample(replicas: Replicas, p: np.ndarray, steps: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """ML-EM with levels 1 ... K and probabilities p (K,), each replica with its own coins.

    p starts at 1 and does not rise. With all p = 1 only level K is called: Euler-Maruyama.

    Returns:
        |x_N - x(1)|^2, float64 (M,), and how often each level is called, int64 (K, M).
    """
    count = replicas.x0.shape[1]
    # Of the levels whose coins are sure to fire, the sum of increments is the last one.
    lowest = np.count_nonzero(p == 1) - 1
    open_ = np.repeat(p[lowest:], count)[:, None]
    calls = np.zeros((len(p), count), dtype=np.int64)
    x = replicas.x0.copy()
    path = replicas.increments[steps]
    for first in range(0, steps, CHUNK):
        width = min(CHUNK, steps - first)
        each = np.broadcast_to(open_, (len(open_), width))
        weight = impulse(draw_coins(each, "independent", rng), each).weight.reshape(-1, count, width)
        coefficient = weight - np.append(weight[1:], np.zeros((1, count, width)), axis=0)
        step, row, replica = np.nonzero(coefficient.transpose(2, 0, 1))
        level = row + lowest
        np.add.at(calls, (level, replica), 1)
        size = coefficient[row, replica, step] * 0.5 ** (level + 1)
        phase, across, along = (field[level, replica] for field in (replicas.phase, *replicas.wave))
        bounds = np.searchsorted(step, np.arange(width + 1))
        for i in range(width):
            here = slice(bounds[i], bounds[i + 1])
            who = replica[here]
            angle = phase[here] + across[here] * x[0].take(who) + along[here] * x[1].take(who)
            # The coefficients of a step add up to p_1 = 1, so that sum_k C_k f^k = f + sum_k C_k 2^-k g_k.
            drift = np.sin(x)
            drift[0] += np.bincount(who, size[here] * np.cos(angle), count)
            drift[1] += np.bincount(who, size[here] * np.sin(angle), count)
            x += drift / steps + path[first + i]
    return ((x - replicas.solution) ** 2).sum(0), calls


def theory_probabilities(gamma: float, levels: int, steps: int, variance: float) -> np.ndarray:
    """p_k = min(1, C 2^-(1 + gamma/2)k), p_1 = 1, with C such that the coins add `variance` to the final sample.

    Independent coins add eta sum_k E|f^k - f^(k-1)|^2 (1/p_k - 1), but for what the drift does to it afterwards.
    """
    k = np.arange(1, levels + 1)
    increment = 5 * 0.25**k
    rule = 0.5 ** ((1 + gamma / 2) * k)
    for certain in range(1, levels):
        open_ = slice(certain, None)
        scale = (increment / rule)[open_].sum() / (variance * steps + increment[open_].sum())
        if scale * rule[certain] < 1:
            break
    else:
        return np.ones(levels)
    return np.where(k <= certain, 1.0, scale * rule)


def expected_cost(gamma: float, p: np.ndarray, steps: int) -> float:
    """The mean nominal cost of a sample, where a call of level k costs 2^(gamma k)."""
    above = np.append(p[1:], 0.0)
    # Level k is called unless its coefficient B_k/p_k - B_(k+1)/p_(k+1) is zero.
    called = np.where(p < 1, p + above - p * above, np.where(above < 1, 1.0, 0.0))
    return steps * float(called @ level_cost(gamma, len(p)))


def level_cost(gamma: float, levels: int) -> np.ndarray:
    """T_k = 2^(gamma k), float64 (K,)."""
    return 2.0 ** (gamma * np.arange(1, levels + 1))
