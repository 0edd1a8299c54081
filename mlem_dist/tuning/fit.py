"""Plans of the ODE fitted to the path of the best level: weights by least squares, call times by evolution.

Between two evaluations x is affine in the values in use, as the Gaussian level carries it in closed form. The weights
of such a segment that bring x nearest to where the best level would be are therefore a linear least-squares problem, of
at most six numbers per rung. It is solved segment by segment, each from where the ones before have brought the choosing
noises, so that a segment also makes up for their error. What is left at the end is a function of the call times alone,
and a search over a few numbers improves them.

Biased: one plan for all images, whose error at a budget is the same each time. Along the noisy path of the SDE the fit
does not hold on other noises: what a segment makes up for there is chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mlem_dist.errors import UsageError
from mlem_dist.ladder.levels import GaussianLevel
from mlem_dist.solver.closed_form import ClosedForm, Held
from mlem_dist.solver.integrate import evaluate
from mlem_dist.solver.plan import Plan, Term, on_levels
from mlem_dist.solver.steps import half_log_snr
from mlem_dist.tuning.judge import Judge

RIDGE = 1e-3
"""On the weights' distance from those of extrapolated increments, relative to the squares of what they weigh."""

TIME_SHARE = 0.4
"""Of the density of calls, so much is uniform in time, the rest in lambda; times the factor below."""

START = (-0.9, 0.1, 0.3, 0.4)
"""Logarithms of the factor at equally spaced knots, linear between: few calls in the first third of the path. From the
searches for the bundled ladder, which end near it at 5 and at 10 evaluations, at a third to a half of the error without
a factor."""

BETWEEN = (1, 2, 3)
"""Calls of the middle rung per call of the best level."""

SCALE, POPULATION, GENERATIONS = 0.3, 6, 3

LARGEST = 10.0
"""Evaluations of the best level; a larger budget has this one's times, at more quantiles."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Times:
    """When levels are called: the best one `calls` times, a middle one `between` times as often.

    Attributes:
        middle: the middle rung's level; 1 for none, with `between` = 1.
        calls, between: at least 1.
        factors: logarithms of the factor on the density of calls, as `START`.
    """

    middle: int
    calls: int
    between: int
    factors: tuple[float, ...] = START

    def rungs(self, best: int) -> tuple[int, ...]:
        """The levels in use, by number."""
        return (1, best) if self.middle == 1 else (1, self.middle, best)

    def fire(self, log_snr: np.ndarray) -> np.ndarray:
        """bool (R, N) at steps of lambda `log_snr` (N,), increasing."""
        steps = len(log_snr)
        in_lambda = (log_snr - log_snr[0]) / (log_snr[-1] - log_snr[0])
        passed = TIME_SHARE * np.linspace(0, 1, steps) + (1 - TIME_SHARE) * in_lambda
        fine = np.linspace(0, 1, 1001)
        speed = np.exp(-np.interp(fine, np.linspace(0, 1, len(self.factors)), self.factors))
        warped = np.concatenate([[0.0], np.cumsum((speed[1:] + speed[:-1]) / 2)])
        quantiles = np.arange(self.calls * self.between) / (self.calls * self.between)
        at = np.searchsorted(passed, np.interp(quantiles, fine, warped / warped[-1]))
        fire = np.zeros((2 if self.middle == 1 else 3, steps), dtype=bool)
        fire[0] = True
        fire[1, at] = True
        fire[-1, at[:: self.between]] = True
        return fire


class Fitter:
    """Fits plans on the noises of a judge of the ODE, for a ladder whose first level is a Gaussian.

    Times are searched for on half of the blocks, several at a time; the weights of the found ones are fitted to all.

    Args:
        judge: its path of the best level is what is fitted to.
    """

    def __init__(self, judge: Judge) -> None:
        base = judge.levels[1]
        assert isinstance(base, GaussianLevel)
        assert not judge.fine.c.any()
        self.judge = judge
        self.table = judge.fine
        self.log_snr = half_log_snr(judge.ladder.alpha_bar, self.table.t)
        self.cost = judge.ladder.cost(judge.device)
        self.form = ClosedForm(base.affine(self.table.t), self.table, judge.label)
        self.blocks = range(judge.samples // len(judge.label))
        self.pool = ThreadPoolExecutor(judge.threads)
        self._found: dict[float, Times] = {}

    def plan(self, nfe: float, progress: Progress = lambda done, total: None) -> Plan:
        """The plan of at most `nfe` evaluations of the best level whose error on the noises is least.

        The search is the covariance matrix adaptation evolution strategy (Hansen, arXiv:1604.00772). `progress` is told
        how many plans have been fitted, of how many.

        Raises:
            UsageError: the budget is below the cost of one call of the best level.
        """
        best = self._times(min(nfe, LARGEST), progress)
        return self._fit_times(replace(best, calls=self._calls(nfe, best.middle, best.between)))[0]

    def _fit_times(self, times: Times, blocks: range | None = None) -> tuple[Plan, float]:
        return self.fit(times.rungs(len(self.cost)), times.fire(self.log_snr), blocks)

    def _times(self, nfe: float, progress: Progress) -> Times:
        """The best call times for a budget; searched for once."""
        if nfe in self._found:
            return self._found[nfe]
        import cma

        starts = list(self._starts(nfe))
        if not starts:
            raise UsageError(f"--nfe {nfe:g} is below the cost of one call of the best level; raise --nfe")
        # The path is made here, before the fits that run side by side would each make it.
        half = self.blocks[: -(-self.judge.path.shape[1] // (2 * len(self.judge.label)))]
        total = len(starts) + POPULATION * GENERATIONS
        tried: list[tuple[float, Times]] = []

        def errors(several: Sequence[Times]) -> list[float]:
            found = []
            with ThreadPoolExecutor(len(several)) as pool:
                for fitted in pool.map(lambda one: self._fit_times(one, half), several):
                    found.append(fitted[1])
                    progress(len(tried) + len(found), total)
            tried.extend(zip(found, several, strict=True))
            return found

        errors(starts)
        start = min(tried, key=lambda one: one[0])[1]
        search = cma.CMAEvolutionStrategy(
            np.array(START), SCALE, {"seed": 1, "popsize": POPULATION, "maxiter": GENERATIONS, "verbose": -9}
        )
        while not search.stop():
            asked = search.ask()
            search.tell(asked, errors([replace(start, factors=tuple(one.tolist())) for one in asked]))
        self._found[nfe] = min(tried, key=lambda one: one[0])[1]
        return self._found[nfe]

    def _starts(self, nfe: float) -> Iterator[Times]:
        for middle in range(1, len(self.cost)):
            for between in BETWEEN[:1] if middle == 1 else BETWEEN[1:]:
                calls = self._calls(nfe, middle, between)
                if calls:
                    yield Times(middle, calls, between)

    def _calls(self, nfe: float, middle: int, between: int) -> int:
        """How often a budget pays for the best level: each with a run in closed form and a call of level 1."""
        below = self.cost[middle - 1] if middle > 1 else 0.0
        return int(nfe * self.cost[-1] / (self.cost[-1] + between * (below + 2 * self.cost[0])))

    def fit(self, rungs: tuple[int, ...], fire: np.ndarray, blocks: range | None = None) -> tuple[Plan, float]:
        """The plan of fitted weights that evaluates the increments of `rungs` at `fire`, bool (R, N).

        All fire at step 0, and each only where those below it fire too. `blocks` are those that it is fitted to, all of
        the judge's by default.

        Returns:
            The plan, and its mean squared error per value on these blocks.
        """
        weight, previous = np.zeros(fire.shape), np.zeros(fire.shape)
        weight[0] = 1
        segments = [_Segments(self, rungs, block) for block in blocks or self.blocks]
        edges = [*np.flatnonzero(fire[1:].any(0)).tolist(), fire.shape[1]]
        for start, stop in pairwise(edges):
            fresh = [r for r in range(1, len(rungs)) if fire[r, start]]
            list(self.pool.map(lambda one, at=start, fresh=fresh: one.evaluate(at, fresh), segments))
            choices = list(self._choices(fire, start, stop))
            normal = list(self.pool.map(lambda one, to=stop, ways=choices: one.normal(to, ways), segments))
            found = _solve(np.sum([one[0] for one in normal], 0), np.sum([one[1] for one in normal], 0), choices)
            for choice, factor in zip(choices, found, strict=True):
                (previous if choice.age else weight)[choice.rung, start:stop] += factor * choice.shape
            list(self.pool.map(lambda one, to=stop: one.advance(to, weight, previous), segments))
        error = np.mean([float((one.x - one.path[-1]).square().mean()) for one in segments])
        return on_levels(Plan(fire, weight, previous, collapse=True), rungs), float(error)

    def _choices(self, fire: np.ndarray, start: int, stop: int) -> Iterator[_Choice]:
        """What the weights of steps start ... stop - 1 are combined from.

        For both values of a rung: a constant, the line of extrapolation and, where the rung fires at `start`, one step
        of the size of the gap before it, which corrects what it has added there.
        """
        for rung in range(1, len(fire)):
            *_, before, last = [-1, *np.flatnonzero(fire[rung, : start + 1]).tolist()]
            steps = np.ones(stop - start)
            yield _Choice(rung, 0, steps, 1.0)
            if before < 0:
                continue
            yield _Choice(rung, 1, steps, 0.0)
            ahead = (self.log_snr[start:stop] - self.log_snr[last]) / (self.log_snr[last] - self.log_snr[before])
            line = np.minimum(1.0, ahead)
            yield _Choice(rung, 0, line, 1.0)
            yield _Choice(rung, 1, line, -1.0)
            if last == start:
                once = np.zeros(stop - start)
                once[0] = np.abs(self.table.b[before:start]).sum() / abs(self.table.b[start])
                yield _Choice(rung, 0, once, 0.0)
                yield _Choice(rung, 1, once, 0.0)


@dataclass(frozen=True, eq=False)
class _Choice:
    """A shape of weights, float64 (steps,), for the latest value of a rung (age 0) or the one before it (age 1)."""

    rung: int
    age: int
    shape: np.ndarray
    prior: float


def _solve(squares: np.ndarray, products: np.ndarray, choices: list[_Choice]) -> np.ndarray:
    """The factors of least squared error, drawn to their priors by the ridge."""
    prior = np.array([choice.prior for choice in choices])
    ridge = RIDGE * np.diag(squares) + 1e-12 * squares.max()
    return np.asarray(np.linalg.solve(squares + np.diag(ridge), products + ridge * prior))


class _Segments:
    """A block on its way: x (B, C, H, W) before step `at`, and the last two values of each rung above the first."""

    def __init__(self, fitter: Fitter, rungs: tuple[int, ...], block: int) -> None:
        judge = fitter.judge
        self.judge, self.form, self.rungs = judge, fitter.form, rungs
        rows = slice(block * len(judge.label), (block + 1) * len(judge.label))
        self.path = judge.path[:, rows]
        self.x: Tensor = self.path[0]
        self.at = 0
        self.values: dict[int, list[Held]] = {r: [] for r in range(1, len(rungs))}

    @torch.inference_mode()
    def evaluate(self, at: int, fresh: list[int]) -> None:
        """The increments of the rungs `fresh`, at x."""
        self.at = at
        terms = [Term(self.rungs[r], self.rungs[r - 1], at, ()) for r in fresh]
        found = evaluate(self.judge.levels, terms, self.x, int(self.judge.fine.t[at]), self.judge.label)
        for r, value in zip(fresh, found, strict=True):
            self.values[r] = [Held(value), *self.values[r][:1]]

    @torch.inference_mode()
    def normal(self, stop: int, choices: list[_Choice]) -> tuple[np.ndarray, np.ndarray]:
        """The normal equations of the choices' factors: what they add up to step `stop`, carried on to the end."""
        flow = self.form.flow(stop)
        left = self._run(stop, [])
        columns = [
            self.form.scaled(self.values[c.rung][c.age], flow * self.form.response(self.at, c.shape)) for c in choices
        ]
        missing = self.form.scaled(Held(self.path[stop] - left), flow)
        design = torch.stack([column.flatten() for column in columns]).double()
        return (design @ design.T).cpu().numpy(), (design @ missing.flatten().double()).cpu().numpy()

    @torch.inference_mode()
    def advance(self, stop: int, weight: np.ndarray, previous: np.ndarray) -> None:
        """Go on to step `stop` with the weights (R, N) of the latest values and of those before them."""
        held = [
            (value, of_age[r, self.at : stop].tolist())
            for r, values in self.values.items()
            for value, of_age in zip(values, (weight, previous), strict=False)
        ]
        self.x = self._run(stop, held)

    def _run(self, stop: int, held: list[tuple[Held, list[float]]]) -> Tensor:
        end = self.form.advance(self.at, Held(self.x), [1.0] * (stop - self.at), held, lambda _: self.x)
        return end.value.view_as(self.x)
