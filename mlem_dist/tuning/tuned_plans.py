"""Choice of a job's plan: the plan tuned for its budget, or a recipe for its settings."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.costs import LevelCosts
from mlem_dist.solver.plan import Plan, Recipe, read_plan
from mlem_dist.solver.steps import ALIASES, Spacing
from mlem_dist.tuning.recipes import make_recipe

DEFAULT_STEPS = 250
"""Default number of base steps of plans that are not tuned."""


def plan_path(folder: Path, solver: str, nfe: float) -> Path:
    """Path of the tuned plan of a solver and budget."""
    return folder / f"plan-{solver}-{nfe:g}.json"


def _stored_path(folder: Path, solver: str, nfe: float) -> Path:
    """Path of the tuned plan that is there, perhaps under the solver's alias, as 0.3 has named it."""
    names = (solver, *(alias for alias, name in ALIASES.items() if name == solver))
    return next(
        (path for name in names if (path := plan_path(folder, name, nfe)).exists()), plan_path(folder, solver, nfe)
    )


def tuned_plan(ladder: Ladder, solver: str, steps: int | None, nfe: float) -> Plan | None:
    """Plan tuned for a budget, or None if the ladder's folder has none, or none with `steps` steps if they are given.

    Raises:
        UsageError: as in `read_plan`.
    """
    path = _stored_path(ladder.folder, solver, nfe)
    if not path.exists():
        return None
    plan = read_plan(path, ladder.digest, len(ladder.levels), solver, None)
    return plan if steps in (None, plan.steps) else None


def tuned_budgets(folder: Path, solver: str) -> list[float]:
    """Budgets for which a folder has tuned plans of a solver, increasing."""
    budgets = set()
    for path in folder.glob("plan-*-*.json"):
        name, _, budget = path.stem.removeprefix("plan-").partition("-")
        # A user's own file may have another name.
        with suppress(ValueError):
            if ALIASES.get(name, name) == solver:
                budgets.add(float(budget))
    return sorted(budgets)


def choose_plan(
    ladder: Ladder,
    cost: np.ndarray | LevelCosts,
    solver: str,
    steps: int | None,
    nfe: float,
    grid: Spacing = "trailing",
    **choices: Any,
) -> tuple[Plan | Recipe, str]:
    """Tuned plan if there is one and only the budget is given, or else the recipe of `make_recipe`; and a user note.

    Plans are tuned on the grid "trailing". `choices` are the other arguments of `make_recipe`. Without `steps`, a tuned
    plan has its own, and a recipe `DEFAULT_STEPS`.

    Raises:
        UsageError: as in `read_plan` and `make_recipe`.
    """
    note = ""
    if grid == "trailing" and all(choice is None for choice in choices.values()):
        if tuned := tuned_plan(ladder, solver, steps, nfe):
            note = f"Using the plan tuned for this budget, of {ladder.source}."
            if (spent := tuned.nfe(cost)) > 1.1 * nfe:
                note += f" By the costs on this device it takes {spent:.3g} evaluations: tune one here."
            return tuned, note
        if budgets := tuned_budgets(ladder.folder, solver):
            note = (
                f"No plan is tuned for `nfe` {nfe:g}{f' `steps` {steps}' if steps else ''}. {ladder.source} has plans "
                f"for `nfe` {', '.join(f'{budget:g}' for budget in budgets)}, at the `steps` they were tuned with; "
                "`mlem-dist tune` finds more."
            )
    return make_recipe(ladder, cost, solver, steps or DEFAULT_STEPS, nfe, **choices, grid=grid), note
