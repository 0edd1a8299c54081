"""How likely each level's increment is drawn, scaled to a budget.

Probabilities are constant over the steps here: one p_k per level, float64 (K,), with p_1 = 1.
"""

from typing import Literal

import numpy as np

from mlem_dist.errors import UsageError

Rule = Literal["constant", "inverse-cost", "theory"]

GAMMA = 2.5
"""The cost exponent that Jacot (arXiv:2603.24594) measures for UNets on CelebA: T ~ error^-gamma."""


def rule_weights(rule: Rule, cost: np.ndarray) -> np.ndarray:
    """Relative probabilities of a rule, float64 (K,), for levels that cost `cost` seconds per sample.

    "theory" is p_k ~ 2^-(1 + gamma/2)k of Jacot, arXiv:2603.24594, where T_k = 2^(gamma k); written in the measured
    costs, p_k ~ T_k^-(1/gamma + 1/2).
    """
    if rule == "constant":
        return np.ones_like(cost)
    if rule == "inverse-cost":
        return 1 / cost
    return cost ** -(1 / GAMMA + 0.5)


def increment_cost(cost: np.ndarray) -> np.ndarray:
    """T_k + T_{k-1}, what one increment of each level costs; the first level's is T_1."""
    return cost + np.concatenate([[0.0], cost[:-1]])


def scale_to_budget(weights: np.ndarray, cost: np.ndarray, steps: int, nfe: float) -> np.ndarray:
    """p_k = min(1, C weights_k), p_1 = 1, with C such that the expected cost is `nfe` evaluations of the best level.

    The expected cost of a sample is N T_1 + N sum_{k>1} p_k (T_k + T_{k-1}), in units of T_K. A budget that pays for
    the best level at every step gives p = 1 throughout, which is Euler-Maruyama with that level.

    Raises:
        UsageError: the budget is below the cost of the base level at every step.
    """
    unit = increment_cost(cost) / cost[-1] * steps
    if nfe >= steps or len(cost) == 1:
        return np.ones_like(cost)
    if nfe < unit[0]:
        raise UsageError(
            f"--nfe {nfe:g} is below the cost of the base level alone, {unit[0]:.3g} for {steps} steps; "
            "raise --nfe or lower --steps"
        )
    budget = nfe - unit[0]

    def probabilities(scale: float) -> np.ndarray:
        return np.concatenate([[1.0], np.minimum(1.0, scale * weights[1:])])

    low, high = 0.0, 1 / weights[1:].min()
    for _ in range(200):
        middle = (low + high) / 2
        if (probabilities(middle)[1:] * unit[1:]).sum() < budget:
            low = middle
        else:
            high = middle
    return probabilities(low)
