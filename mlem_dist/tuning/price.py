"""Cost of a search for plans, counted beforehand, and number of steps of its reference, by measurement."""

from __future__ import annotations

from collections.abc import Sequence

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.plan import single_level
from mlem_dist.tuning.comparison import PlanComparison
from mlem_dist.tuning.least_squares import BEGINNINGS, BETWEEN, KNOTS, LARGEST, PATH_CALLS
from mlem_dist.tuning.refinement import PASSES
from mlem_dist.tuning.reporting import ReportStage

STEPS = (50, 100, 250, 500)
"""Candidates for the number of steps of the reference."""

STEPS_SAMPLES, STEPS_SEED = 8, 3
"""Number of samples on which the candidates are compared, and the number of their set of noises."""

UNSEEN = 1e-4
"""Largest squared error of the reference, relative to the variance of its samples: 40 dB below the image."""

DERIVATIVE = 3.0
"""Cost of a backward pass with its recomputation, in evaluations."""


def reference_steps(ladder: Ladder, solver: str, device: str, progress: ReportStage) -> int:
    """The least number of steps from `STEPS` of the best level whose samples twice as many steps hardly change.

    Of the candidates that the noise schedule allows, the last one is taken where all change samples by more.
    """
    best = len(ladder.levels)
    candidates = [steps for steps in STEPS if 2 * steps <= ladder.process.length] or [ladder.process.length]
    for done, steps in enumerate(candidates[:-1], 1):
        progress("steps of the reference", done, len(candidates))
        finer = PlanComparison(ladder, solver, device, 2 * steps, STEPS_SAMPLES, STEPS_SEED)
        if finer.errors([single_level(best, best, steps)]).mean() <= UNSEEN * float(finer.reference.var()):
            return steps
    return candidates[-1]


def fit_evaluations(levels: int, steps: int, budgets: Sequence[float], samples: int) -> float:
    """Evaluations of the best level that fits for some budgets take, at most.

    Args:
        levels: number of levels of the ladder.
        steps: number of base steps.
        budgets: evaluations of the best level per image.
        samples: number of fitting samples.
    """
    total = float(samples * min(steps, PATH_CALLS))
    for nfe in budgets:
        # Candidates are fitted to half of the samples. Above `LARGEST`, those for the rungs have that budget.
        first = levels + 1 + len(BETWEEN) + len(BEGINNINGS)
        second = (len(BEGINNINGS) if nfe > LARGEST else 0) + 2 * (len(KNOTS) - 1)
        total += samples / 2 * (first * min(nfe, LARGEST) + second * nfe) + samples * nfe
        if nfe <= LARGEST:
            # A pass has one evaluation forwards and two derivatives; the error is evaluated once more at the end.
            total += samples * nfe * (PASSES * (1 + 2 * DERIVATIVE) + 1)
    return total
