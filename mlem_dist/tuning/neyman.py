"""Neyman's rule: the probabilities of independent coins that spend evaluations best.

Let W_k(i) be the squared effect on the final sample of adding b_i times level k's increment at step i. To first order,
coins of probability p_k(i) add the error sum_ik W_k(i) (1 / p_k(i) - 1). An increment costs T_k + T_{k-1}. The least
expected cost at a given error has p_k(i) = min(1, C sqrt(W_k(i) / (T_k + T_{k-1}))) (Neyman, 1934; for multilevel
estimators Giles, doi:10.1287/opre.1070.0496). The first level's increment is always drawn, p_1 = 1.

A value that is held, or extrapolated, from one evaluation to the next has instead an error in proportion to the length,
or the square of the length, of the gap between them. Its square is sum_ik W_k(i) p_k(i)^-q with q = 2 or 4. The least
cost at a given error then has p_k(i) = min(1, C (W_k(i) / T)^(1 / (1 + q))). Ladders whose first level is held use
this; W_k(i) stands for the change of the increment along the path, which is taken to be in proportion to it.

Not every level needs to be a rung. The increment from rung l to rung k is the sum of the increments between them. Its
effect follows from the products W_kl(i) of the effects of increments k and l, with W_kk(i) = W_k(i).
"""

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np

from mlem_dist.solver.costs import LevelCosts, as_costs
from mlem_dist.solver.probabilities import Base, expected_cost

SMOOTHING = 6
"""Window over which a measured effect is averaged, in percent of the trajectory."""


def neyman(effect: np.ndarray, cost: np.ndarray | LevelCosts, error: float) -> np.ndarray:
    """Probabilities p, float64 (K, N), of least expected cost whose coins add at most `error`.

    Args:
        effect: W, float64 (K, N).
        cost: T, seconds per sample; float64 (K,) for levels that share nothing.
        error: largest added error, positive, in the unit of `effect`.
    """
    weights = neyman_weights(effect, cost)
    weights[0] = np.inf
    if not effect[1:].any():
        return (weights > 0).astype(np.float64)
    # Without the limit p <= 1, the error would be sum W / (C weights) - sum W, which gives C = low. The limit requires
    # a larger C. At C = high, all p are 1 except those of increments without effect.
    matter = effect[1:] > 0
    low = (effect[1:][matter] / weights[1:][matter]).sum() / (error + effect[1:].sum())
    high = max(low, 1 / weights[1:][matter].min())
    for _ in range(60):
        middle = np.sqrt(low * high)
        if coin_error(np.minimum(1, middle * weights), effect) > error:
            low = middle
        else:
            high = middle
    return np.minimum(1, high * weights)


def nfe_at_error(
    products: np.ndarray, rungs: Sequence[int], cost: np.ndarray | LevelCosts, error: float, base: Base
) -> float:
    """Least expected cost of ML-EM on these rungs at a given error, in evaluations of the best level.

    Args:
        products: W_kl(i), float64 (K, K, N).
        rungs: levels in use, by number from 1.
        cost: T, seconds per sample; float64 (K,) for levels that share nothing.
        error: as in `neyman`.
        base: as in `expected_cost`.
    """
    costs = as_costs(cost).on(rungs)
    p = neyman(merged(products, rungs), costs, error)
    return expected_cost(p, costs, base) / float(costs.alone[-1])


def rung_sets(levels: int, held: bool = False) -> Iterator[tuple[int, ...]]:
    """Every choice of rungs of a ladder of `levels` levels: the first level, the last, and any levels between them.

    With a held base, the first level may be left out, as it is not free.
    """
    for count in range(levels):
        for below in combinations(range(1, levels), count):
            if held or levels == 1 or below[:1] == (1,):
                yield (*below, levels)


def merged(products: np.ndarray, rungs: Sequence[int]) -> np.ndarray:
    """Effects of the increments between neighbouring rungs, float64 (R, N), from W_kl(i), (K, K, N)."""
    groups = [slice(below, level) for below, level in pairwise((0, *rungs))]
    return np.stack([products[group, group].sum((0, 1)) for group in groups])


def on_grid(products: np.ndarray, at: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Products W_kl on another grid of steps, float64 (K, K, N), up to one common factor.

    The factor remains because an effect grows with the square of its step's length.

    Args:
        products: W_kl, float64 (K, K, M), measured on few samples and therefore averaged over neighbouring steps here.
        at: timesteps of the measured steps, int64 (M,), decreasing.
        t: timesteps of the new grid, int64 (N,).
    """
    half = products.shape[2] * SMOOTHING // 200
    padded = np.pad(products, ((0, 0), (0, 0), (half, half)), mode="edge")
    smooth = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1, axis=2).mean(3)
    return np.apply_along_axis(lambda row: np.interp(t, at[::-1], row[::-1]), 2, smooth)


def neyman_weights(effect: np.ndarray, cost: np.ndarray | LevelCosts) -> np.ndarray:
    """Relative probabilities sqrt(W_k(i) / (T_k + T_{k-1})) of Neyman's rule, float64 (K, N).

    Args:
        effect: W, float64 (K, N).
        cost: T, seconds per sample; float64 (K,) for levels that share nothing.
    """
    return np.sqrt(effect / as_costs(cost).increments[:, None])


def gap_weights(effect: np.ndarray, cost: np.ndarray | LevelCosts, power: int) -> np.ndarray:
    """Relative probabilities (W_k(i) / T_k)^(1 / (1 + q)) of held values, float64 (K, N), for q = `power`.

    Args:
        effect: W, float64 (K, N).
        cost: T, seconds per sample; float64 (K,) for levels that share nothing.
    """
    return np.asarray((effect / as_costs(cost).above[:, None]) ** (1 / (1 + power)))


def gap_error(p: np.ndarray, effect: np.ndarray, power: int) -> float:
    """Relative squared error of values held between evaluations of probabilities p (K, N), for q = `power`."""
    drawn = p > 0
    return float((effect[drawn] * (p[drawn] ** -float(power) - 1)).sum() + effect[~drawn].sum() * p.shape[1] ** power)


def coin_error(p: np.ndarray, effect: np.ndarray) -> float:
    """Expected squared error that independent coins of probabilities p (K, N) add, to first order."""
    drawn = p > 0
    return float((effect[drawn] * (1 / p[drawn] - 1)).sum())
