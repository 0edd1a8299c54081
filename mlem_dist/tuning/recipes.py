"""Recipes for a ladder, from a budget, a solver and a few choices."""

from typing import Literal

import numpy as np

from mlem_dist.errors import UsageError
from mlem_dist.ladder.calibration import read_effect
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.costs import LevelCosts, as_costs
from mlem_dist.solver.plan import Draw, Increments, Recipe
from mlem_dist.solver.probabilities import Base, Rule, rule_weights, scale_to_budget
from mlem_dist.solver.steps import Spacing
from mlem_dist.tuning.neyman import coin_error, gap_error, gap_weights, merged, neyman_weights, on_grid, rung_sets

DIGITS = 12

GAP_POWER: dict[Increments, int] = {"impulse": 1, "held": 2, "extrapolated": 4}
"""The power q of the length of a gap in the squared error that a value makes in it, by the kind of increments."""

DEFAULT_INCREMENTS: dict[str, Increments] = {"sde": "held", "ode": "extrapolated", "dpm++": "extrapolated"}
"""Default increments by solver. On the SDE's noisy path, extrapolated increments are hardly better than held ones."""


def make_recipe(
    ladder: Ladder,
    cost: np.ndarray | LevelCosts,
    solver: str,
    steps: int,
    nfe: float,
    probabilities: Rule | Literal["neyman"] | None = None,
    draw: Draw | None = None,
    increments: Increments | None = None,
    grid: Spacing = "trailing",
) -> Recipe:
    """Recipe for `steps` base steps and a budget of `nfe` evaluations of the best level per sample.

    `cost` is that of the levels in seconds per sample, (K,) if they share nothing.

    None selects a default. Increments are held for the SDE and extrapolated for the ODE, and all blocks have one plan,
    unless increments are impulses. Probabilities are Neyman's if the ladder is calibrated, with the choice of rungs
    whose coins add the least error at this budget. If it is not, if its first level is held, or if its best level has
    guidance, the ODE spends the budget on the best level, evenly, above the Gaussian if there is one and the best level
    has no guidance, which is better from 5 evaluations on (docs/frontier.md). Else probabilities are the theory's.
    Those that are asked for, except Neyman's, take every level.

    Raises:
        UsageError: if `steps` or `nfe` is out of range, or Neyman's probabilities are requested for a ladder that is
            not calibrated.
    """
    if increments == "impulse" and draw == "quantiles":
        raise UsageError(
            "`draw` quantiles and `increments` impulse exclude each other: impulses are unbiased over drawn plans "
            "only; choose systematic or independent"
        )
    if not nfe > 0:
        raise UsageError(f"`nfe` {nfe:g}: expected a positive number of evaluations of the best level")
    log_snr = ladder.process.grid(steps, grid).finite_log_snr
    kind = increments or DEFAULT_INCREMENTS[solver]
    base = base_of(ladder, solver, kind)
    rungs: tuple[int, ...] | None
    smooth = solver != "sde" and kind != "impulse"
    directed = ladder.levels[-1].guidance.directed
    if probabilities is None and smooth and (base == "held" or directed or not calibrated(ladder)):
        if directed:
            # A Gaussian of the data is far from guided images.
            base = "held"
        best = len(ladder.levels)
        rungs = (best,) if base == "held" else (1, best)[-best:]
        p = scale_to_budget(np.ones((len(rungs), steps)), as_costs(cost).on(rungs), nfe, base)
    elif probabilities in (None, "neyman") and calibrated(ladder):
        rule = NeymanRule(ladder, cost, solver, steps, kind, grid)
        rungs = rule.choices(nfe)[0]
        p = rule.probabilities(nfe, rungs)
    elif probabilities == "neyman":
        raise _uncalibrated(ladder)
    else:
        rungs = None
        weights = rule_weights(probabilities or "theory", as_costs(cost).alone, log_snr)
        p = scale_to_budget(weights, cost, nfe, base)
    # Rounded, because processors differ in the last digits of a logarithm: a dataset continued on another machine keeps
    # its plan.
    return Recipe(
        p.round(DIGITS),
        draw or ("systematic" if increments == "impulse" else "quantiles"),
        kind,
        base == "closed",
        log_snr.round(DIGITS),
        rungs,
        nested=base == "held",
    )


def calibrated(ladder: Ladder) -> bool:
    """Whether the effects of the ladder's increments have been measured."""
    return read_effect(ladder, "sde") is not None


class NeymanRule:
    """Neyman's probabilities for a calibrated ladder, on `steps` base steps of a solver.

    `cost` is that of the levels in seconds per sample, (K,) if they share nothing.

    Attributes:
        base: the steps at which plans evaluate level 1. Where it is held, probabilities are those of `gap_weights`.

    Raises:
        UsageError: if the ladder is not calibrated.
    """

    def __init__(
        self,
        ladder: Ladder,
        cost: np.ndarray | LevelCosts,
        solver: str,
        steps: int,
        increments: Increments,
        spacing: Spacing = "trailing",
    ) -> None:
        measured = read_effect(ladder, _measured(solver))
        if measured is None:
            raise _uncalibrated(ladder)
        self.cost = as_costs(cost)
        self.base = base_of(ladder, solver, increments)
        self._power = GAP_POWER[increments]
        grid = ladder.process.grid(steps, spacing)
        self.log_snr = grid.finite_log_snr
        self._products = on_grid(measured[1], measured[0], grid.t)

    def choices(self, nfe: float) -> list[tuple[int, ...]]:
        """Every choice of rungs, in order of the error that it adds at the budget, least first.

        Raises:
            UsageError: if the budget is below the cost of the base level.
        """
        choices = [*rung_sets(len(self.cost), self.base == "held")]
        if self.base == "held":
            # All rungs are evaluated at the first step. The best level alone is refused below, if it costs too much.
            choices = [
                rungs for rungs in choices if len(rungs) == 1 or self.cost.of(rungs) <= nfe * self.cost.alone[-1]
            ]
        ranked = [
            (self._error(self.probabilities(nfe, rungs), merged(self._products, rungs)), rungs) for rungs in choices
        ]
        return [rungs for _, rungs in sorted(ranked)]

    def _error(self, p: np.ndarray, effect: np.ndarray) -> float:
        return gap_error(p, effect, self._power) if self.base == "held" else coin_error(p, effect)

    def probabilities(self, nfe: float, rungs: tuple[int, ...], density: np.ndarray | float = 1.0) -> np.ndarray:
        """Probabilities p, float64 (R, N), in proportion to those of the rule times `density` (R, N).

        Raises:
            UsageError: if the budget is below the cost of the base level.
        """
        cost = self.cost.on(rungs)
        effect = merged(self._products, rungs)
        held = self.base == "held"
        weights = gap_weights(effect, cost, self._power) if held else neyman_weights(effect, cost)
        return scale_to_budget(weights * density, cost, nfe, self.base)


def _measured(solver: str) -> str:
    return "sde" if solver == "sde" else "ode"


def base_of(ladder: Ladder, solver: str, increments: Increments) -> Base:
    """The steps at which plans evaluate level 1.

    Runs of steps of a Gaussian are taken in closed form, but for DPM++, which needs a memory that the closed form does
    not keep. Another level is held or extrapolated as increments are; impulses of it would be far too large.
    """
    if ladder.levels[0].kind == "gaussian":
        return "every" if solver == "dpm++" else "closed"
    return "every" if increments == "impulse" else "held"


def _uncalibrated(ladder: Ladder) -> UsageError:
    return UsageError(
        f"`probabilities` neyman needs a calibrated ladder; run `mlem-dist calibrate {ladder.source}`, or choose theory"
    )
