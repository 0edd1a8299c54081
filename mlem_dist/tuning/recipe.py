"""The recipe that a budget, a solver and a few choices give for a ladder."""

from typing import Literal

import numpy as np

from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.plan import Draw, Increments, Recipe
from mlem_dist.solver.probabilities import Rule, rule_weights, scale_to_budget
from mlem_dist.solver.steps import half_log_snr, timesteps
from mlem_dist.tuning.allocate import coin_error, merged, neyman_weights, on_grid, rung_sets
from mlem_dist.tuning.calibrate import read_effect

DEFAULT_INCREMENTS: dict[str, Increments] = {"ddpm": "held", "ddim": "extrapolated", "dpm++": "extrapolated"}
"""By solver: along the noisy path of the SDE a line through two increments is hardly better than the last of them."""


def make_recipe(
    ladder: Ladder,
    device: str,
    solver: str,
    steps: int,
    nfe: float,
    probabilities: Rule | Literal["neyman"] | None = None,
    draw: Draw | None = None,
    increments: Increments | None = None,
) -> Recipe:
    """The recipe of `steps` base steps and `nfe` evaluations of the best level per sample, by the costs on `device`.

    What is None is chosen: Neyman's probabilities for a calibrated ladder and the theory's for others, systematic
    coins, held increments for DDPM and extrapolated ones for the ODE. Neyman's come with the rungs, of all choices of
    levels, whose coins add the least error at this budget; other probabilities take every level.

    Raises:
        UsageError: `steps` or `nfe` is out of range, the ladder has no measured costs, or it is not calibrated and
            Neyman's probabilities are asked for.
    """
    t = timesteps(len(ladder.alpha_bar), steps, "trailing")
    cost = ladder.cost(device)
    if not nfe > 0:
        raise UsageError(f"--nfe {nfe:g}: expected a positive number of evaluations of the best level")
    # A closed form keeps no memory of single steps.
    collapse = ladder.levels[0].kind == "gaussian" and solver != "dpm++"
    log_snr = half_log_snr(ladder.alpha_bar, t)
    rungs = None
    measured = (
        read_effect(ladder, "ddpm" if solver == "ddpm" else "ddim") if probabilities in (None, "neyman") else None
    )
    if measured is not None:
        products = on_grid(measured[1], measured[0], t)
        found = []
        for choice in rung_sets(len(cost)):
            effect, costs = merged(products, choice), cost[np.array(choice) - 1]
            p = scale_to_budget(neyman_weights(effect, costs), costs, nfe, collapse)
            found.append((coin_error(p, effect), choice, p))
        _, rungs, p = min(found, key=lambda one: one[0])
    elif probabilities == "neyman":
        raise UsageError(
            f"--probabilities neyman needs a calibrated ladder; run `mlem-dist calibrate {ladder.source} --data DATA` "
            "or choose theory"
        )
    else:
        p = scale_to_budget(rule_weights(probabilities or "theory", cost, log_snr), cost, nfe, collapse)
    return Recipe(
        p,
        draw or "systematic",
        increments or DEFAULT_INCREMENTS[solver],
        collapse,
        log_snr,
        rungs,
    )
