"""Plans of the ODE fitted to the path of the best level: weights by least squares, call times by trial.

Between two evaluations x is affine in the values in use, as the Gaussian level carries it in closed form. The weights
of such a segment that bring x nearest to where the best level would be are therefore a linear least-squares problem, of
at most six numbers per rung. It is solved segment by segment, each from where the ones before have brought the choosing
noises, so that a segment also makes up for their error. What is left at the end is a function of the call times alone;
of a few of them the best is taken. What one segment's weights do to the values of the next ones is left out of this,
and taken in by `mlem_dist.tuning.refinement`.

Biased: one plan for all images, whose error at a budget is the same each time. Along the noisy path of the SDE the fit
does not hold on other noises: what a segment makes up for there is chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count, pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from mlem_dist.errors import UsageError
from mlem_dist.models.gaussian import GaussianLevel
from mlem_dist.solver.closed_form import ClosedForm, Projected
from mlem_dist.solver.integrate import Drift, evaluate, integrate
from mlem_dist.solver.plan import Plan, Term, extrapolated, on_levels, single_level
from mlem_dist.solver.steps import half_log_snr
from mlem_dist.tuning.comparison import Judge
from mlem_dist.tuning.tell import Tell

RIDGE = 1e-3
"""On the factors' distance from those of extrapolated increments, relative to the squares of what they weigh."""

TIME_SHARE = 0.4
"""Of the density of calls, so much is uniform in time, the rest in lambda; times the factor below."""

KNOTS = (0.0, 0.3, 0.2, 0.5)
"""Logarithms of the factor, at equally spaced points from the first call to the end, linear between. The mean of what
was found for `fashion` in twelve searches of 1.6 to 10 evaluations."""

BEGINNINGS = (0.0, 0.15, 0.25, 0.33, 0.4, 0.5)
"""From where on levels are called, as a share of the path. What comes before has hardly any signal where a schedule
begins at pure noise, and the Gaussian level is right there; the less error later calls leave, the more what it misses
counts."""

BETWEEN = (3, 2, 5)
"""Calls of the middle rung per call of the best level, in the order in which they are tried."""

LARGEST = 10.0
"""Evaluations of the best level; a larger budget has the middle rung of this one."""

PATH_CALLS = 100
"""Of the best level on the path that is fitted to. For `fashion` and 250 steps it ends within a mean square of .0000008
of that of a call at every step, a quarter of what fitted plans of 40 evaluations leave."""

PATH_BYTES = 4e9
"""Of that path: as many samples are fitted to as it then has states of."""

T = TypeVar("T")


@dataclass(frozen=True)
class Times:
    """When levels are called: the best one `calls` times, a middle one `between` times as often.

    Attributes:
        middle: the middle rung's level; 1 for none, with `between` = 1.
        calls, between: at least 1.
        begin: as `BEGINNINGS`.
    """

    middle: int
    calls: int
    between: int
    begin: float = 0.4

    def rungs(self, best: int) -> tuple[int, ...]:
        """The levels in use, by number."""
        return (1, best) if self.middle == 1 else (1, self.middle, best)

    def fire(self, log_snr: np.ndarray) -> np.ndarray:
        """bool (R, N) at steps of lambda `log_snr` (N,), increasing."""
        steps = len(log_snr)
        in_lambda = (log_snr - log_snr[0]) / (log_snr[-1] - log_snr[0])
        passed = TIME_SHARE * np.linspace(0, 1, steps) + (1 - TIME_SHARE) * in_lambda
        path = np.linspace(self.begin, 1, 1001)
        density = np.exp(np.interp(path, np.linspace(self.begin, 1, len(KNOTS)), KNOTS))
        below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
        quantiles = np.arange(self.calls * self.between) / (self.calls * self.between)
        at = np.searchsorted(passed, np.interp(quantiles, below / below[-1], path))
        # Quantiles that fall on one step are one call: to move some was worse (docs/frontier.md).
        fire = np.zeros((2 if self.middle == 1 else 3, steps), dtype=bool)
        fire[0] = True
        fire[1, at] = True
        fire[-1, at[(self.between - 1) // 2 :: self.between]] = True
        return fire


@dataclass(frozen=True, eq=False)
class Choice:
    """A shape of weights, float64 (steps,), for the latest value of a rung (age 0) or the one before it (age 1)."""

    rung: int
    age: int
    shape: np.ndarray
    prior: float


@dataclass(frozen=True, eq=False)
class Segment:
    """The steps start ... stop - 1, between two evaluations.

    Attributes:
        fresh: the rungs that fire at `start`.
        choices: what its weights are combined from.
        factors: of each choice, float64 (C,).
        squares: float64 (C, C): the mean square per value of what the choices add at the end of the trajectory, as the
            Gaussian level carries it there.
    """

    start: int
    stop: int
    fresh: list[int]
    choices: tuple[Choice, ...]
    factors: np.ndarray
    squares: np.ndarray


@dataclass(frozen=True, eq=False)
class Fit:
    """Fitted weights, with the levels in use `rungs`, the steps `fire` (R, N), and the mean squared error per value.

    The error is infinite where it is no number.
    """

    rungs: tuple[int, ...]
    fire: np.ndarray
    segments: tuple[Segment, ...]
    error: float

    def plan(self) -> Plan:
        """The plan of these weights."""
        weight, previous = np.zeros(self.fire.shape), np.zeros(self.fire.shape)
        weight[0] = 1
        for segment in self.segments:
            for choice, factor in zip(segment.choices, segment.factors, strict=True):
                of_age = previous if choice.age else weight
                of_age[choice.rung, segment.start : segment.stop] += factor * choice.shape
        return on_levels(Plan(self.fire, weight, previous, collapse=True), self.rungs)


def fitting_samples(shape: Sequence[int], steps: int, most: int, block: int) -> int:
    """How many samples of a shape to fit to, in whole blocks: `most`, or those whose path fits into `PATH_BYTES`."""
    states = int(PATH_BYTES / (4 * math.prod(shape) * (steps + 1)))
    return max(block, min(most, states // block * block))


class Fitter:
    """Fits plans on the noises of a judge of the ODE, for a ladder whose first level is a Gaussian.

    Times are tried on half of the blocks, several at a time; the weights of the best are fitted to all.
    """

    def __init__(self, judge: Judge) -> None:
        base = judge.levels[1]
        assert isinstance(base, GaussianLevel)
        assert not judge.fine.c.any()
        self.judge = judge
        self.table = judge.fine
        self.log_snr = half_log_snr(judge.ladder.alpha_bar, self.table.t)
        self.cost = judge.ladder.cost(judge.device)
        self.blocks = range(judge.samples // judge.block)
        drift = base.affine(self.table.t)
        self.forms = [ClosedForm(drift, self.table, judge.label(block)) for block in self.blocks]
        self.pool = ThreadPoolExecutor(judge.threads)
        self._errors: dict[Times, float] = {}

    @cached_property
    def path(self) -> Tensor:
        """float32 (N + 1, samples, C, H, W): the best level's states before each step and, last, after all of them.

        Of more steps than `PATH_CALLS`, it is called at so many, and extrapolated between.
        """
        best, steps = len(self.cost), len(self.table)
        plan = single_level(best, best, steps)
        if steps > PATH_CALLS:
            fire = Times(1, PATH_CALLS, 1, 0.0).fire(self.log_snr)
            plan = on_levels(extrapolated(fire, self.log_snr), (1, best))

        positions = torch.empty(
            steps + 1, self.judge.samples, *self.judge.ladder.sample_shape, device=self.judge.device
        )

        def follow(block: int) -> None:
            states: list[Tensor] = []

            def seen(level: Drift, x: Tensor, *about: Tensor) -> Tensor:
                # Several levels may be evaluated at one state.
                if not states or states[-1] is not x:
                    states.append(x)
                return level(x, *about)

            levels = {k: partial(seen, level) for k, level in self.judge.levels.items()}
            noise = self.judge.noise(block, steps)
            end = integrate(levels, self.table, plan, noise, self.judge.label(block))
            positions[:, self.rows(block)] = torch.stack([*states, end])

        list(self.pool.map(follow, self.blocks))
        return positions

    def rows(self, block: int) -> slice:
        """The samples of a block."""
        return slice(block * self.judge.block, (block + 1) * self.judge.block)

    def search(self, nfe: float, progress: Tell = lambda done, total: None) -> Fit:
        """The fit of at most `nfe` evaluations of the best level whose error on the noises is least, of those tried.

        First the middle rung is chosen, then how often it is called, then where calls begin. `progress` is told how
        many plans have been fitted, of how many at most.

        Raises:
            UsageError: the budget is below the cost of one call of the best level, or no fit ends in finite numbers.
        """
        starts = self.starts(min(nfe, LARGEST))
        total, done = len(starts) + len(BETWEEN) + (1 + (nfe > LARGEST)) * len(BEGINNINGS), count(1)

        def report() -> None:
            progress(next(done), total)

        best = self._best([times[0] for times in starts.values()], report)
        best = self._beginning(self._best(starts[best.middle], report), report)
        if nfe > LARGEST:
            best = self._beginning(replace(best, calls=self._calls(nfe, best.middle, best.between)), report)
        fit = self._fit_times(best, self.blocks)
        progress(total, total)
        if fit.error == math.inf:
            raise UsageError(f"`nfe` {nfe:g}: no fitted plan ends in finite numbers on this ladder; raise `nfe`")
        return fit

    def _beginning(self, times: Times, report: Callable[[], None]) -> Times:
        """The times with a beginning that is better than the one before it and the one after it."""
        at = BEGINNINGS.index(times.begin)
        best = self._best([replace(times, begin=begin) for begin in BEGINNINGS[max(0, at - 1) : at + 2]], report)
        return best if best == times else self._beginning(best, report)

    def _best(self, candidates: Sequence[Times], report: Callable[[], None]) -> Times:
        """The times whose fit to half of the blocks has the least error."""
        # Made before the fits that run side by side would each make it: from Python 3.12 on no lock keeps them from it.
        _ = self.path
        half = self.blocks[: -(-len(self.blocks) // 2)]

        def error(times: Times) -> float:
            return self._fit_times(times, half).error

        # Larger budgets begin with the same times.
        new = [times for times in candidates if times not in self._errors]
        with ThreadPoolExecutor(max(1, len(new))) as pool:
            for times, mean_error in zip(new, pool.map(error, new), strict=True):
                self._errors[times] = mean_error
                report()
        return min(candidates, key=self._errors.__getitem__)

    def _fit_times(self, times: Times, blocks: range) -> Fit:
        return self.fit(times.rungs(len(self.cost)), times.fire(self.log_snr), blocks)

    def starts(self, nfe: float) -> dict[int, list[Times]]:
        """The middle rungs that a budget pays for, by level, each with how often it may be called.

        Raises:
            UsageError: the budget is below the cost of one call of the best level.
        """
        by_number: dict[int, list[Times]] = {}
        for middle in range(1, len(self.cost)):
            for between in BETWEEN if middle > 1 else (1,):
                if calls := self._calls(nfe, middle, between):
                    by_number.setdefault(middle, []).append(Times(middle, calls, between))
        if not by_number:
            raise UsageError(f"`nfe` {nfe:g} is below the cost of one call of the best level; raise `nfe`")
        return by_number

    def _calls(self, nfe: float, middle: int, between: int) -> int:
        """How often a budget pays for the best level: each with a run in closed form and a call of level 1."""
        below = self.cost[middle - 1] if middle > 1 else 0.0
        each = self.cost[-1] + between * (below + 2 * self.cost[0])
        return max(0, int((nfe * self.cost[-1] - self.cost[0]) / each))

    def fit(self, rungs: tuple[int, ...], fire: np.ndarray, blocks: range | None = None) -> Fit:
        """The fit that evaluates the increments of `rungs` at `fire`, bool (R, N).

        Up to the first of them the Gaussian goes alone. `blocks` are those that it is fitted to, all of the judge's by
        default.
        """
        samples = [Block(self, rungs, block) for block in blocks or self.blocks]
        segments = []
        fires = np.flatnonzero(fire[1:].any(0)).tolist()
        self._each(samples, partial(Block.begin, at=fires[0]))
        for start, stop in pairwise([*fires, fire.shape[1]]):
            fresh = [r for r in range(1, len(rungs)) if fire[r, start]]
            self._each(samples, partial(Block.evaluate, at=start, fresh=fresh))
            choices = tuple(self._choices(fire, start, stop))
            normal = self._each(samples, partial(Block.normal, stop=stop, choices=choices))
            squares, products = (np.mean([sums[i] for sums in normal], 0) / samples[0].x.numel() for i in (0, 1))
            segments.append(Segment(start, stop, fresh, choices, _solve(squares, products, choices), squares))
            self._each(samples, partial(Block.advance, segment=segments[-1]))
        error = float(np.mean([float((block.x - block.path[-1]).square().mean()) for block in samples]))
        return Fit(rungs, fire, tuple(segments), error if math.isfinite(error) else math.inf)

    def _each(self, samples: Sequence[Block], run: Callable[[Block], T]) -> list[T]:
        return list(self.pool.map(torch.inference_mode()(run), samples))

    def _choices(self, fire: np.ndarray, start: int, stop: int) -> Iterator[Choice]:
        """What the weights of steps start ... stop - 1 are combined from.

        For both values of a rung: a constant, the line of extrapolation and, where the rung fires at `start`, one step
        of the size of the gap before it, which corrects what it has added there.
        """
        for rung in range(1, len(fire)):
            *_, before, last = [-1, -1, *np.flatnonzero(fire[rung, : start + 1]).tolist()]
            if last < 0:
                continue
            steps = np.ones(stop - start)
            yield Choice(rung, 0, steps, 1.0)
            if before < 0:
                continue
            yield Choice(rung, 1, steps, 0.0)
            ahead = (self.log_snr[start:stop] - self.log_snr[last]) / (self.log_snr[last] - self.log_snr[before])
            line = np.minimum(1.0, ahead)
            yield Choice(rung, 0, line, 1.0)
            yield Choice(rung, 1, line, -1.0)
            if last == start:
                once = np.zeros(stop - start)
                once[0] = np.abs(self.table.b[before:start]).sum() / abs(self.table.b[start])
                yield Choice(rung, 0, once, 0.0)
                yield Choice(rung, 1, once, 0.0)


def _solve(squares: np.ndarray, products: np.ndarray, choices: Sequence[Choice]) -> np.ndarray:
    """The factors of least squared error, drawn to their priors by the ridge."""
    prior = np.array([choice.prior for choice in choices])
    drawn = ridge(squares)
    return np.asarray(np.linalg.solve(squares + drawn, products + drawn @ prior))


def ridge(squares: np.ndarray) -> np.ndarray:
    """What is added to the squares (C, C) of choices so that each has a factor, even where two are one."""
    return np.diag(RIDGE * np.diag(squares) + 1e-12 * squares.max() + 1e-300)


class Block:
    """A block on its way: x (B, C, H, W) before step `at`, and the last two values of each rung above the first."""

    def __init__(self, fitter: Fitter, rungs: tuple[int, ...], block: int) -> None:
        judge = fitter.judge
        self.levels: Mapping[int, Drift] = judge.levels
        self.table, self.label, self.form, self.rungs = judge.fine, judge.label(block), fitter.forms[block], rungs
        self.path = fitter.path[:, fitter.rows(block)]
        self.x: Tensor = self.path[0]
        self.at = 0
        self.values: dict[int, list[Projected]] = {r: [] for r in range(1, len(rungs))}

    def begin(self, at: int) -> None:
        """Go to the first evaluation, at step `at`, by the Gaussian level alone."""
        self.x = self.run(at, []) if at else self.path[0].clone()

    def evaluate(self, at: int, fresh: Sequence[int]) -> None:
        """The increments of the rungs `fresh`, at x."""
        self.at = at
        terms = [Term(self.rungs[r], self.rungs[r - 1], at, ()) for r in fresh]
        values = evaluate(self.levels, terms, self.x, int(self.table.t[at]), self.label)
        for r, value in zip(fresh, values, strict=True):
            self.values[r] = [Projected(value), *self.values[r][:1]]

    def normal(self, stop: int, choices: Sequence[Choice]) -> tuple[np.ndarray, np.ndarray]:
        """The normal equations of the choices' factors: what they add up to step `stop`, carried on to the end."""
        flow = self.form.flow(stop)
        design = torch.stack([self.column(choice, flow).flatten() for choice in choices]).double()
        missing = self.form.scaled(Projected(self.path[stop] - self.run(stop, [])), flow)
        return (design @ design.T).cpu().numpy(), (design @ missing.flatten().double()).cpu().numpy()

    def column(self, choice: Choice, flow: np.ndarray | float = 1.0) -> Tensor:
        """What a choice adds to x up to the end of its steps, times `flow`, (B, d)."""
        return self.form.scaled(self.values[choice.rung][choice.age], flow * self.form.response(self.at, choice.shape))

    def advance(self, segment: Segment) -> None:
        """Go on to the end of a segment with its factors."""
        weights: dict[tuple[int, int], np.ndarray] = {}
        for choice, factor in zip(segment.choices, segment.factors, strict=True):
            value = choice.rung, choice.age
            weights[value] = weights.get(value, 0.0) + factor * choice.shape
        self.x = self.run(segment.stop, [(self.values[r][age], of_it.tolist()) for (r, age), of_it in weights.items()])

    def run(self, stop: int, held: Sequence[tuple[Projected, Sequence[float]]]) -> Tensor:
        """x at step `stop` by the Gaussian level and `held`, each value with its weight in each step."""
        end = self.form.advance(self.at, Projected(self.x), [1.0] * (stop - self.at), held, lambda _: self.x)
        return end.value.view_as(self.x)
