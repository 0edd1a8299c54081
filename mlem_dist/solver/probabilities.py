"""Probabilities of each level's increment at each step: p, float64 (K, N), scaled to a budget."""

from typing import Literal

import numpy as np

from mlem_dist.errors import UsageError
from mlem_dist.solver.bisection import last_below
from mlem_dist.solver.costs import LevelCosts, as_costs

Rule = Literal["constant", "inverse-cost", "theory", "log-snr"]

Base = Literal["closed", "every", "held"]
"""The steps at which plans evaluate level 1: one of each run in closed form; every step; or, as its value is held or
extrapolated between evaluations, the first step and others by probabilities."""

GAMMA = 2.5
"""Cost exponent gamma in T ~ error^-gamma, as Jacot (arXiv:2603.24594) measures it for UNets on CelebA."""


def rule_weights(rule: Rule, cost: np.ndarray, log_snr: np.ndarray) -> np.ndarray:
    """Relative probabilities of a rule, float64 (K, N), for levels that cost `cost` (K,) seconds per sample.

    "theory" is p_k ~ 2^-(1 + gamma/2)k of Jacot, arXiv:2603.24594, where T_k = 2^(gamma k). In measured costs, it is
    p_k ~ T_k^-(1/gamma + 1/2). "constant", "inverse-cost" and "theory" are constant over the steps. "log-snr" is
    "theory" times the growth per step of lambda, `log_snr` (N,), finite and increasing.
    """
    power = {"constant": 0.0, "inverse-cost": 1.0}.get(rule, 1 / GAMMA + 0.5)
    density = np.gradient(log_snr) if rule == "log-snr" and len(log_snr) > 1 else np.ones(len(log_snr))
    return np.asarray(cost[:, None] ** -power * density)


def expected_cost(p: np.ndarray, cost: np.ndarray | LevelCosts, base: Base = "every") -> float:
    """Expected seconds per sample of plans with probabilities p (K, N): sum_ik p_k(i) (T_k + T_{k-1}).

    T_k + T_{k-1} is less what both levels share. `cost` is float64 (K,) for levels that share nothing.

    With a base in closed form, level 1 costs T_1 for each run of steps that evaluate it alone, not for each step. With
    a held base, coins are nested, so that level k - 1 is evaluated for its own increment too: sum_ik p_k(i) T_k, where
    T_k is without what lower levels share.
    """
    costs = as_costs(cost)
    if base == "held":
        return float(p.sum(1) @ costs.above)
    seconds = float((p * costs.increments[:, None]).sum())
    if base == "every":
        return seconds
    begins = 1 - (1 - p[1:]).prod(0)
    begins[:1] = 1
    return seconds - float(costs.alone[0] * (p[0] - begins).sum())


def scale_to_budget(weights: np.ndarray, cost: np.ndarray | LevelCosts, nfe: float, base: Base = "every") -> np.ndarray:
    """Probabilities p_k(i) = min(1, C weights_k(i)), with C such that the expected cost is the budget.

    Level 1 has p_1 = 1 at every step. With a held base, all levels have p = 1 at the first step only, because a value
    that has not been evaluated yet is missing; and no level has more than the level below. A budget that pays for the
    best level at every step gives p = 1 everywhere: Euler-Maruyama with that level.

    Args:
        weights: float64 (K, N), not negative.
        cost: seconds per sample; float64 (K,) for levels that share nothing.
        nfe: the budget, in evaluations of the best level per sample.
        base: the steps at which plans evaluate level 1.

    Raises:
        UsageError: if the budget is below the cost of level 1 alone or, with a held base, of one evaluation of each
            level.
    """
    steps, costs = weights.shape[1], as_costs(cost)
    first, best = costs.alone[[0, -1]]
    certain = np.zeros(weights.shape, dtype=bool)
    if base == "held":
        certain[:, 0] = True
    else:
        certain[0] = True
    if nfe >= steps:
        return np.ones_like(weights)

    def probabilities(scale: float) -> np.ndarray:
        p = np.where(certain, 1.0, np.minimum(1.0, scale * weights))
        return np.minimum.accumulate(p, axis=0) if base == "held" else p

    def spent(scale: float) -> float:
        return expected_cost(probabilities(scale), costs, base) / float(best)

    # The tolerance allows for rounding.
    if nfe < spent(0) * (1 - 1e-9):
        if base == "held":
            raise UsageError(
                f"`nfe` {nfe:g} is below the cost of one evaluation of each level, {spent(0):.3g}; raise `nfe`"
            )
        payable = int(nfe / float(first / best)) if base == "every" else 0
        raise UsageError(
            f"`nfe` {nfe:g} is below the cost of the base level alone, {spent(0):.3g} for {steps} steps; "
            "raise `nfe`" + (f" or lower `steps` to {payable}" if payable else "")
        )
    worth = weights[~certain & (weights > 0)]
    if not worth.size:
        return probabilities(0)
    return probabilities(last_below(lambda scale: spent(scale) < nfe, 0.0, 1 / worth.min()))
