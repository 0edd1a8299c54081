"""The recipe that a budget, a solver and a few choices give for a ladder."""

from typing import Literal

from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.plan import Draw, Increments, Recipe
from mlem_dist.solver.probabilities import Rule, rule_weights, scale_to_budget
from mlem_dist.solver.steps import half_log_snr, timesteps
from mlem_dist.tuning.allocate import neyman_weights
from mlem_dist.tuning.calibrate import read_effect

DEFAULT_INCREMENTS: dict[str, Increments] = {"ddpm": "held", "ddim": "extrapolated"}
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
    coins, held increments for DDPM and extrapolated ones for DDIM.

    Raises:
        UsageError: `steps` or `nfe` is out of range, the ladder has no measured costs, or it is not calibrated and
            Neyman's probabilities are asked for.
    """
    t = timesteps(len(ladder.alpha_bar), steps, "trailing")
    cost = ladder.cost(device)
    if not nfe > 0:
        raise UsageError(f"--nfe {nfe:g}: expected a positive number of evaluations of the best level")
    effect = read_effect(ladder, solver) if probabilities in (None, "neyman") else None
    if effect is not None:
        weights = neyman_weights(effect[1], effect[0], t, cost)
    elif probabilities == "neyman":
        raise UsageError(
            f"--probabilities neyman needs a calibrated ladder; run `mlem-dist calibrate {ladder.source} --data DATA` "
            "or choose theory"
        )
    else:
        weights = rule_weights(probabilities or "theory", cost, steps)
    collapse = ladder.levels[0].kind == "gaussian"
    return Recipe(
        scale_to_budget(weights, cost, nfe, collapse),
        draw or "systematic",
        increments or DEFAULT_INCREMENTS[solver],
        collapse,
        half_log_snr(ladder.alpha_bar, t),
    )
