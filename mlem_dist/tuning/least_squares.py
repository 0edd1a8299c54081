"""Plans of the ODE fitted to the path of the best level: weights by least squares, call times by trial.

Between two evaluations, the Gaussian level carries x in closed form, and x is affine in the values in use. The weights
of such a segment that bring x nearest to the best level's state therefore solve a linear least-squares problem of at
most six numbers per rung. Segments are solved in order. Each starts from the states to which the segments before have
brought the fitting samples, so that it also corrects their error. The distance left at the end is a function of the
call times alone, and the best of a few candidate times is taken. The distance of a sample is the root of its mean
squared error: where guidance lets a few samples end as another image, their squares would be most of the mean. The fit
ignores how a segment's weights change the values of later segments; `mlem_dist.tuning.refinement` takes this into
account.

A first level that is no Gaussian is held like the others: its values have fitted weights, too, and between two
evaluations x is carried by the factors of the steps alone. It is called over the whole path. Where the best level has
guidance, a Gaussian level is left out if plans without it are better: a Gaussian of the data is far from guided images.

Fitted plans are biased: one plan serves all images, and its error at a budget is the same each time. Along the noisy
path of the SDE, the fit does not generalise to other noises, because the error that a segment corrects there is random.
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
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.closed_form import ClosedForm, Projected, no_drift
from mlem_dist.solver.costs import LevelCosts
from mlem_dist.solver.integrate import Drift, evaluate, integrate
from mlem_dist.solver.plan import Plan, Term, extrapolated, nest, on_levels, single_level
from mlem_dist.tuning.comparison import PlanComparison
from mlem_dist.tuning.recipes import base_of
from mlem_dist.tuning.reporting import ReportProgress

RIDGE = 1e-3
"""Weight of the ridge penalty on the squared distance of the factors from those of extrapolated increments, relative to
the mean squares of the contributions that the factors multiply."""

TIME_SHARE = 0.4
"""Share of the density of calls that is uniform in time; the rest is uniform in lambda, as `Grid.finite_log_snr` has
it. `KNOTS` multiplies both."""

KNOTS = (0.0, 0.3, 0.2, 0.5)
"""Logarithms of a factor on the density of calls, at equally spaced points from the first call to the end, and linear
between them, where the search begins. They are the mean of twelve searches for `fashion`, at budgets of 1.6 to 10
evaluations."""

GUIDED_KNOTS = (0.0, 0.0, -0.5, -1.0)
"""`KNOTS` where the best level has guidance: what a guided image shows is decided early. They are the best of nine for
`garments` at 10 evaluations, and nearly so at 5."""

KNOT_STEP = 0.5
"""Change of a knot that the search tries, up and down."""

BEGINNINGS = (0.0, 0.15, 0.25, 0.33, 0.4, 0.5)
"""Candidates for the first call of the levels above the first, as a share of the path. Where a schedule begins at pure
noise, earlier states have hardly any signal, and the Gaussian level is accurate. The less error the later calls leave,
the more its remaining error counts."""

GUIDED_BEGIN = 0.15
"""`begin` where the search begins if the best level has guidance. For `garments`, it is better than 0 and .4 with every
middle rung."""

BETWEEN = (3, 2, 5)
"""Candidates for the number of calls of the middle rung per call of the best level, in the order of trial. For a level
whose evaluations the best level makes, too, 1 comes first: the increments of both then have weights of their own, at no
cost, such as the conditional value and the direction of guidance."""

LARGEST = 10.0
"""Largest budget for which the middle rung is searched, in evaluations of the best level. Larger budgets take the
middle rung and the ratio of calls of this one."""

PATH_CALLS = 100
"""Largest number of calls of the best level on the path that plans are fitted to. For `fashion` and 250 steps, the path
ends within a mean square of .0000008 of the path with a call at every step. That is a quarter of the error of fitted
plans of 40 evaluations."""

PATH_BYTES = 4e9
"""Memory limit for that path, in bytes. It limits the number of fitting samples."""

T = TypeVar("T")


@dataclass(frozen=True)
class Times:
    """Call times: the best level is called `calls` times, and a middle rung `between` times as often.

    Attributes:
        middle: level of the middle rung; 0 for none, with `between` = 1.
        calls, between: at least 1.
        begin: first call of the levels above the first rung, as a share of the path, see `BEGINNINGS`.
        closed: whether there is a first rung below them, level 1 in closed form. Without it, the middle rung is the
            first one, or the best level, and is called from the beginning.
        knots: logarithms of a factor on the density of calls, see `KNOTS`.
    """

    middle: int
    calls: int
    between: int
    begin: float = 0.4
    closed: bool = True
    knots: tuple[float, ...] = KNOTS

    def rungs(self, best: int) -> tuple[int, ...]:
        """Levels in use, by number."""
        return tuple(level for level in (int(self.closed), self.middle, best) if level)

    def fire(self, log_snr: np.ndarray) -> np.ndarray:
        """Whether each rung fires at each step, bool (R, N), for steps at finite lambda `log_snr` (N,), increasing."""
        number = self.calls * self.between
        fire = np.zeros((self.closed + bool(self.middle) + 1, len(log_snr)), dtype=bool)
        if self.closed:
            fire[0] = True
            at = self._quantiles(log_snr, number, self.begin)
            fire[1, at] = True
            fire[-1, at[(self.between - 1) // 2 :: self.between]] = True
            return fire
        fire[0, self._quantiles(log_snr, number, 0.0)] = True
        if self.middle:
            fire[1, self._quantiles(log_snr, self.calls, self.begin)] = True
        return nest(fire)

    def _quantiles(self, log_snr: np.ndarray, number: int, begin: float) -> np.ndarray:
        """The steps of `number` calls from `begin` on, int64, increasing."""
        steps = len(log_snr)
        in_lambda = (log_snr - log_snr[0]) / (log_snr[-1] - log_snr[0])
        path_position = TIME_SHARE * np.linspace(0, 1, steps) + (1 - TIME_SHARE) * in_lambda
        path = np.linspace(begin, 1, 1001)
        density = np.exp(np.interp(path, np.linspace(begin, 1, len(self.knots)), self.knots))
        below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
        # Quantiles that fall on one step are one call: moving some to other steps is worse (docs/frontier.md).
        return np.searchsorted(path_position, np.interp(np.arange(number) / number, below / below[-1], path))


@dataclass(frozen=True, eq=False)
class Choice:
    """Shape of weights, float64 (steps,), for the latest value of a rung (age 0) or the value before it (age 1).

    `prior` is the factor of this shape for extrapolated increments.
    """

    rung: int
    age: int
    shape: np.ndarray
    prior: float


@dataclass(frozen=True, eq=False)
class Segment:
    """Steps start ... stop - 1, between two evaluations.

    Attributes:
        fresh: rungs that fire at `start`.
        choices: shapes whose linear combination is the weights.
        factors: factor of each choice, float64 (C,).
        squares: mean products per value of the choices' contributions to the final sample, float64 (C, C). The Gaussian
            level carries the contributions to the end of the trajectory.
    """

    start: int
    stop: int
    firing: list[int]
    choices: tuple[Choice, ...]
    factors: np.ndarray
    squares: np.ndarray


@dataclass(frozen=True, eq=False)
class Fit:
    """Fitted weights of the levels `rungs`, which fire where `fire`, bool (R, N), is set.

    `distance` is the mean over the fitting samples of the root mean square error per value; infinite if it is NaN.
    `closed` says whether the first rung is taken in closed form, with weight 1.
    """

    rungs: tuple[int, ...]
    fire: np.ndarray
    segments: tuple[Segment, ...]
    distance: float
    closed: bool

    def plan(self) -> Plan:
        """Plan with these weights."""
        weight, previous = np.zeros(self.fire.shape), np.zeros(self.fire.shape)
        if self.closed:
            weight[0] = 1
        for segment in self.segments:
            for choice, factor in zip(segment.choices, segment.factors, strict=True):
                of_age = previous if choice.age else weight
                of_age[choice.rung, segment.start : segment.stop] += factor * choice.shape
        return on_levels(Plan(self.fire, weight, previous, collapse=self.closed), self.rungs)


def fitting_samples(shape: Sequence[int], steps: int, most: int, block: int) -> int:
    """Number of samples of a shape to fit to: `most`, or as many blocks as fit into `PATH_BYTES`, at least one."""
    states = int(PATH_BYTES / (4 * math.prod(shape) * (steps + 1)))
    return max(block, min(most, states // block * block))


def bases(ladder: Ladder) -> tuple[bool, ...]:
    """Whether level 1 is taken in closed form, for each kind of plan that is tried."""
    if base_of(ladder, "ode", "extrapolated") != "closed":
        return (False,)
    return (True, False) if ladder.levels[-1].guidance.directed else (True,)


def starts(ladder: Ladder, cost: LevelCosts, closed: bool, nfe: float) -> dict[int, list[Times]]:
    """Candidate times that a budget pays for, by the level of the middle rung; one for each value of `between`.

    `cost` is that of the levels in seconds per sample; `closed` says whether level 1 is taken in closed form.

    Raises:
        UsageError: if the budget is below the cost of one call of the best level.
    """
    by_number: dict[int, list[Times]] = {}
    best = len(cost)
    directed = ladder.levels[-1].guidance.directed
    for middle in (0, *range(1 + (ladder.levels[0].kind == "gaussian"), best)):
        free = middle and cost.of({middle, best}) <= (1 + 1e-9) * cost.alone[-1]
        for between in (1, *BETWEEN) if free else BETWEEN if middle else (1,):
            if calls := affordable_calls(cost, closed, nfe, middle, between):
                begin = GUIDED_BEGIN if directed else Times.begin
                if not closed and between == 1:
                    # The first rung is called as often as the best level: both are called at the same steps.
                    begin = 0.0
                knots = GUIDED_KNOTS if directed else KNOTS
                by_number.setdefault(middle, []).append(Times(middle, calls, between, begin, closed, knots))
    if not by_number:
        raise UsageError(f"`nfe` {nfe:g} is below the cost of one call of the best level; raise `nfe`")
    return by_number


def affordable_calls(cost: LevelCosts, closed: bool, nfe: float, middle: int, between: int) -> int:
    """Number of calls of the best level that a budget pays for, with their calls of the middle rung.

    With level 1 in closed form, each step that evaluates increments also costs a call of it and a run.
    """
    alone, best = cost.alone, len(cost)
    below = alone[middle - 1] if middle else 0.0
    first = alone[0] if closed else 0.0
    shared = alone[-1] + below - cost.of({middle, best} - {0})
    each = alone[-1] - shared + between * (below + 2 * first)
    # A quotient such as 3 / 0.3 may be rounded down to just below a whole number.
    return max(0, int((nfe * alone[-1] - first) / each + 1e-9))


class Fitter:
    """Fits plans on the noises of a comparison of the ODE.

    Candidate times are tried on half of the blocks, several at a time. The weights of the best times are fitted to all
    blocks.

    Attributes:
        bases: whether level 1 is taken in closed form, for each kind of plan that is tried.
    """

    def __init__(self, comparison: PlanComparison) -> None:
        assert not comparison.fine.c.any()
        self.comparison = comparison
        self.table = comparison.fine
        self.log_snr = comparison.ladder.process.grid(len(self.table)).finite_log_snr
        self.cost = comparison.ladder.costs(comparison.device)
        self.blocks = range(comparison.samples // comparison.block)
        self.bases = bases(comparison.ladder)
        self.forms = {closed: self._forms(closed) for closed in self.bases}
        self.pool = ThreadPoolExecutor(comparison.threads)
        self._distances: dict[Times, float] = {}

    def _forms(self, closed: bool) -> list[ClosedForm]:
        """The closed form of level 1, or that of no drift at all, for each block."""
        if closed:
            return [self.comparison.closed_form(block, self.table) for block in self.blocks]
        size, device = math.prod(self.comparison.ladder.sample_shape), self.comparison.device
        classes = torch.zeros(self.comparison.block, dtype=torch.int64, device=device)
        mean = torch.zeros(self.comparison.block, size, device=device)
        return [ClosedForm(no_drift(len(self.table), size, device), self.table, classes, mean)] * len(self.blocks)

    @cached_property
    def path(self) -> Tensor:
        """States of the best level before each step and after the last one, float32 (N + 1, samples, C, H, W).

        If there are more than `PATH_CALLS` steps, the best level is called at most `PATH_CALLS` times and extrapolated
        between calls.
        """
        best, steps = len(self.cost), len(self.table)
        plan = single_level(best, best, steps)
        if steps > PATH_CALLS:
            times = Times(0, PATH_CALLS, 1, 0.0, self.bases[-1])
            plan = on_levels(extrapolated(times.fire(self.log_snr), self.log_snr), times.rungs(best))

        positions = torch.empty(
            steps + 1, self.comparison.samples, *self.comparison.ladder.sample_shape, device=self.comparison.device
        )

        def follow(block: int) -> None:
            states: list[Tensor] = []
            noise, condition = self.comparison.noise(block, steps), self.comparison.condition(block)
            end = integrate(self.comparison.levels, self.table, plan, noise, condition, observe=states.append)
            positions[:, self.rows(block)] = torch.stack([*states, end])

        list(self.pool.map(follow, self.blocks))
        return positions

    def rows(self, block: int) -> slice:
        """Slice of a block's samples."""
        return slice(block * self.comparison.block, (block + 1) * self.comparison.block)

    def search(self, nfe: float, progress: ReportProgress = lambda done, total: None) -> Fit:
        """Fit of least distance among the candidate times, for a budget of `nfe` evaluations of the best level.

        The search chooses the middle rung first, then the number of its calls, then the first call, then the density
        of calls after it. `progress` is called with the number of fitted plans and the largest number that the search
        can fit.

        Raises:
            UsageError: if the budget is below the cost of one call of the best level, or no fit ends in finite numbers.
        """
        by_base, total, done = self.starts(min(nfe, LARGEST)), self.most_fits(nfe), count(1)

        def report() -> None:
            progress(next(done), total)

        # With the best level alone, the first entry of each.
        base = self._best([starts[0][0] for starts in by_base], report)
        starts = next(starts for starts in by_base if starts[0][0] == base)
        best = self._best([times[0] for times in starts.values()], report)
        best = self._beginning(self._best(starts[best.middle], report), report)
        if nfe > LARGEST:
            calls = affordable_calls(self.cost, best.closed, nfe, best.middle, best.between)
            best = self._beginning(replace(best, calls=calls), report)
        fit = self._fit_times(self._density(best, report), self.blocks)
        progress(total, total)
        if fit.distance == math.inf:
            raise UsageError(f"`nfe` {nfe:g}: no fitted plan ends in finite numbers on this ladder; raise `nfe`")
        return fit

    def most_fits(self, nfe: float) -> int:
        """Largest number of fits to half of the blocks that `search` makes."""
        by_base = self.starts(min(nfe, LARGEST))
        starts = max(map(len, by_base)) + len(by_base) + len(BETWEEN)
        return starts + (1 + (nfe > LARGEST)) * len(BEGINNINGS) + 2 * (len(KNOTS) - 1)

    def _density(self, times: Times, report: Callable[[], None]) -> Times:
        """Times, from `times`, with each knot but the first moved to less distance, one after the other."""
        for knot in range(1, len(KNOTS)):
            steps = ([change * (k == knot) for k in range(len(KNOTS))] for change in (0.0, KNOT_STEP, -KNOT_STEP))
            moved = [tuple(np.add(times.knots, step).tolist()) for step in steps]
            times = self._best([replace(times, knots=knots) for knots in moved], report)
        return times

    def _beginning(self, times: Times, report: Callable[[], None]) -> Times:
        """Times, searched from `times`, whose distance is less than with both neighbours of `begin` in `BEGINNINGS`."""
        if len(times.rungs(len(self.cost))) == 1:
            return times
        at = BEGINNINGS.index(times.begin)
        best = self._best([replace(times, begin=begin) for begin in BEGINNINGS[max(0, at - 1) : at + 2]], report)
        return best if best == times else self._beginning(best, report)

    def _best(self, candidates: Sequence[Times], report: Callable[[], None]) -> Times:
        """Times whose fit to half of the blocks has the least distance."""
        # Compute the path once, before the parallel fits: since Python 3.12, cached_property takes no lock.
        _ = self.path
        half = self.blocks[: -(-len(self.blocks) // 2)]

        def distance(times: Times) -> float:
            return self._fit_times(times, half).distance

        # Fit only new times: the searches for all budgets above `LARGEST` begin with the same ones.
        new = [times for times in candidates if times not in self._distances]
        with ThreadPoolExecutor(max(1, len(new))) as pool:
            for times, of_fit in zip(new, pool.map(distance, new), strict=True):
                self._distances[times] = of_fit
                report()
        return min(candidates, key=self._distances.__getitem__)

    def _fit_times(self, times: Times, blocks: range) -> Fit:
        return self.fit(times.rungs(len(self.cost)), times.fire(self.log_snr), blocks)

    def starts(self, nfe: float) -> list[dict[int, list[Times]]]:
        """Candidate times that a budget pays for, as in `starts`, for each kind of plan in `bases`."""
        return [starts(self.comparison.ladder, self.cost, closed, nfe) for closed in self.bases]

    def fit(self, rungs: tuple[int, ...], fire: np.ndarray, blocks: range | None = None) -> Fit:
        """Fit of a plan that evaluates the increments of `rungs` where `fire`, bool (R, N), is set.

        Before the first evaluation, a Gaussian level acts alone. The plan is fitted to `blocks`, by default all
        blocks of the comparison.
        """
        closed = any(self.bases) and rungs[0] == 1
        samples = [Block(self, rungs, closed, block) for block in blocks or self.blocks]
        segments = []
        first = int(closed)
        fires = np.flatnonzero(fire[first:].any(0)).tolist()
        self._each(samples, partial(Block.begin, at=fires[0]))
        for start, stop in pairwise([*fires, fire.shape[1]]):
            firing = [r for r in range(first, len(rungs)) if fire[r, start]]
            self._each(samples, partial(Block.evaluate, at=start, firing=firing))
            choices = tuple(self._choices(fire, first, start, stop))
            normal = self._each(samples, partial(Block.normal, stop=stop, choices=choices))
            squares, products = (np.mean([sums[i] for sums in normal], 0) / samples[0].x.numel() for i in (0, 1))
            segments.append(Segment(start, stop, firing, choices, _solve(squares, products, choices), squares))
            self._each(samples, partial(Block.advance, segment=segments[-1]))
        distance = float(torch.cat([distances(block.x - block.path[-1]) for block in samples]).double().mean())
        return Fit(rungs, fire, tuple(segments), distance if math.isfinite(distance) else math.inf, closed)

    def _each(self, samples: Sequence[Block], run: Callable[[Block], T]) -> list[T]:
        return list(self.pool.map(torch.inference_mode()(run), samples))

    def _choices(self, fire: np.ndarray, first: int, start: int, stop: int) -> Iterator[Choice]:
        """Shapes whose linear combination is the weights of the rungs from `first` on, in steps start ... stop - 1.

        Each of the two values of a rung has a constant and the line of extrapolation. If the rung fires at `start`, it
        also has a single step as long as the gap before `start`, which corrects the rung's contribution over that gap.
        """
        for rung in range(first, len(fire)):
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
                single_step = np.zeros(stop - start)
                single_step[0] = np.abs(self.table.b[before:start]).sum() / abs(self.table.b[start])
                yield Choice(rung, 0, single_step, 0.0)
                yield Choice(rung, 1, single_step, 0.0)


def distances(error: Tensor) -> Tensor:
    """Root mean square per value of each sample's error (B, ...), float32 (B,)."""
    return error.flatten(1).square().mean(1).sqrt()


def _solve(squares: np.ndarray, products: np.ndarray, choices: Sequence[Choice]) -> np.ndarray:
    """Factors of least squared error, with a ridge penalty on their distance from the priors."""
    prior = np.array([choice.prior for choice in choices])
    penalty = ridge(squares)
    return np.asarray(np.linalg.solve(squares + penalty, products + penalty @ prior))


def ridge(squares: np.ndarray) -> np.ndarray:
    """Ridge (C, C) to add to the squares (C, C) of choices: the factors are unique even if two choices are equal."""
    return np.diag(RIDGE * np.diag(squares) + 1e-12 * squares.max() + 1e-300)


class Block:
    """State of a block: x (B, C, H, W) before step `at`, and the last two values of each rung not in closed form."""

    def __init__(self, fitter: Fitter, rungs: tuple[int, ...], closed: bool, block: int) -> None:
        comparison = fitter.comparison
        self.levels: Mapping[int, Drift] = comparison.levels
        self.table, self.condition = comparison.fine, comparison.condition(block)
        self.form, self.rungs = fitter.forms[closed][block], rungs
        self.path = fitter.path[:, fitter.rows(block)]
        self.x: Tensor = self.path[0]
        self.at = 0
        self.values: dict[int, list[Projected]] = {r: [] for r in range(int(closed), len(rungs))}

    def begin(self, at: int) -> None:
        """Advance to the first evaluation, at step `at`, by a Gaussian level alone."""
        self.x = self.run(at, []) if at else self.path[0].clone()

    def evaluate(self, at: int, firing: Sequence[int]) -> None:
        """Evaluate the increments of the rungs `fresh` at x, before step `at`."""
        self.at = at
        terms = [Term(self.rungs[r], self.rungs[r - 1] if r else 0, at, ()) for r in firing]
        values = evaluate(self.levels, terms, self.x, float(self.table.t[at]), self.condition)
        for r, value in zip(firing, values, strict=True):
            self.values[r] = [Projected(value), *self.values[r][:1]]

    def normal(self, stop: int, choices: Sequence[Choice]) -> tuple[np.ndarray, np.ndarray]:
        """Normal equations of the choices' factors, (C, C) and (C,): products summed over the block's values.

        The regressors are the choices' contributions to x at step `stop`, carried on to the end of the trajectory. The
        target is the difference from the best level's state at `stop`, carried on likewise.
        """
        flow = self.form.flow(stop)
        design = torch.stack([self.column(choice, flow).flatten() for choice in choices]).double()
        missing = self.form.scaled(Projected(self.path[stop] - self.run(stop, [])), flow)
        return (design @ design.T).cpu().numpy(), (design @ missing.flatten().double()).cpu().numpy()

    def column(self, choice: Choice, flow: np.ndarray | float = 1.0) -> Tensor:
        """Contribution of a choice to x at the end of its steps, times `flow`, (B, d)."""
        return self.form.scaled(self.values[choice.rung][choice.age], flow * self.form.response(self.at, choice.shape))

    def advance(self, segment: Segment) -> None:
        """Advance to the end of a segment with its factors."""
        weights: dict[tuple[int, int], np.ndarray] = {}
        for choice, factor in zip(segment.choices, segment.factors, strict=True):
            value = choice.rung, choice.age
            weights[value] = weights.get(value, 0.0) + factor * choice.shape
        self.x = self.run(segment.stop, [(self.values[r][age], of_it.tolist()) for (r, age), of_it in weights.items()])

    def run(self, stop: int, held: Sequence[tuple[Projected, Sequence[float]]]) -> Tensor:
        """x at step `stop`, by a Gaussian level and the values `held`, each with its weight in each step."""
        end = self.form.advance(self.at, Projected(self.x), [1.0] * (stop - self.at), held, lambda _: self.x)
        return end.value.view_as(self.x)
