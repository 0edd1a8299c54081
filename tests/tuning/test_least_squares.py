from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from pipelines import make_pipeline

from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.plan import Plan, single_level
from mlem_dist.solver.process import process_of
from mlem_dist.tuning.comparison import BLOCK, PlanComparison
from mlem_dist.tuning.least_squares import (
    BEGINNINGS,
    BETWEEN,
    KNOT_STEP,
    KNOTS,
    LARGEST,
    PATH_CALLS,
    TIME_SHARE,
    Fitter,
    Times,
    fitting_samples,
)
from mlem_dist.tuning.recipes import make_recipe

STEPS = 40


def judge(ladder: Ladder, seed: int) -> PlanComparison:
    return PlanComparison(ladder, "ode", "cpu", STEPS, 3 * BLOCK["cpu"], seed, threads=2)


def distance(fitter: Fitter, plan: Plan) -> float:
    """The mean distance of a plan on the fitting samples, by the integrator that generates."""
    return float(np.sqrt(fitter.comparison.errors([plan])).mean())


@pytest.fixture(scope="module")
def fitter(lowest):
    return Fitter(judge(lowest, 0))


@pytest.mark.parametrize("times", [Times(0, 4, 1), Times(2, 3, 2, 0.5)])
def test_the_error_of_a_fit_is_that_of_its_plan(fitter, times):
    """The plan that is written does what the fit has seen, by the integrator that generates."""
    fit = fitter.fit(times.rungs(3), times.fire(fitter.log_snr))
    plan = fit.plan()
    assert fit.distance == pytest.approx(distance(fitter, plan), rel=1e-3)
    assert plan.calls[2].sum() == times.calls
    assert plan.calls[1].sum() == (times.calls * times.between if times.middle == 2 else 0)


def test_a_fit_is_to_the_classes_of_each_block(many):
    """Of 40 classes a block holds 32."""
    fitter = Fitter(judge(many, 0))
    fit = fitter.fit((1, 2), Times(0, 4, 1).fire(fitter.log_snr))
    assert fit.distance == pytest.approx(distance(fitter, fit.plan()), rel=1e-3)


@pytest.mark.parametrize(("steps", "apart"), [(40, 0.0), (150, 2e-6)])
def test_what_is_fitted_to_is_the_path_of_the_best_level(small, steps, apart):
    """Of many steps it is extrapolated between calls."""
    comparison = PlanComparison(Ladder.load(small), "ode", "cpu", steps, BLOCK["cpu"], 0)
    states, table, condition = [comparison.noise(0, steps)(-1)], comparison.fine, comparison.condition(0)
    for t, a, b in zip(table.t, table.a, table.b, strict=True):
        with torch.inference_mode():
            drift = comparison.levels[2](states[-1], torch.full((BLOCK["cpu"],), int(t)), condition)
        states.append(float(a) * states[-1] + float(b) * drift)
    off = (Fitter(comparison).path - torch.stack(states)).square().mean((1, 2, 3, 4))
    assert off.max() <= apart + 1e-12


def test_a_fit_with_an_evaluation_at_every_step_is_the_best_level(fitter):
    for rungs in ((1, 3), (1, 2, 3)):
        assert fitter.fit(rungs, np.ones((len(rungs), STEPS), dtype=bool)).distance < 1e-3


def test_a_fitted_plan_is_better_on_noises_that_it_has_not_seen(lowest, fitter):
    judging = judge(lowest, 1)
    told = []
    plan = fitter.search(6, lambda done, total: told.append((done, total))).plan()
    cost = lowest.cost("cpu")
    default = make_recipe(lowest, cost, "ode", STEPS, 6, "theory", "quantiles").plan(np.random.default_rng(0))
    assert 4 < plan.nfe(cost) <= 6
    found, of_default = judging.errors([plan, default]).mean(1)
    assert found < 0.7 * of_default
    # On the noises that it was fitted to it is no better than chance allows.
    assert found < 1.7 * fitter.comparison.errors([plan]).mean()
    assert [done for done, _ in told[:-1]] == list(range(1, len(told)))
    assert told[-1][0] == told[-1][1] >= len(told)


def test_no_neighbour_of_what_the_search_finds_is_better(fitter):
    """On the half of the blocks that it goes by: no other beginning, number of calls between, or density."""
    fit = fitter.search(6)
    (starts,) = fitter.starts(6)

    def distance_of(times: Times) -> float:
        return fitter.fit(times.rungs(3), times.fire(fitter.log_snr), fitter.blocks[:2]).distance

    begun = [replace(times, begin=begin) for several in starts.values() for times in several for begin in BEGINNINGS]
    moves = list(product(*((0.0, KNOT_STEP, -KNOT_STEP) if knot else (0.0,) for knot in range(len(KNOTS)))))
    chosen = next(
        moved
        for times in begun
        for move in moves
        if (moved := moved_by(times, move)).rungs(3) == fit.rungs
        and np.array_equal(moved.fire(fitter.log_snr), fit.fire)
    )
    before = replace(chosen, knots=KNOTS)
    at = BEGINNINGS.index(chosen.begin)
    for begin in {*BEGINNINGS[max(0, at - 1) : at + 2]} - {chosen.begin}:
        assert distance_of(before) < distance_of(replace(before, begin=begin))
    of_starts = {
        times: distance_of(times) for times in (*(several[0] for several in starts.values()), *starts[chosen.middle])
    }
    first = next(times for times in starts[chosen.middle] if times.between == chosen.between)
    assert of_starts[first] == min(of_starts.values())
    assert distance_of(chosen) <= distance_of(before)
    for change in (0.0, KNOT_STEP, -KNOT_STEP):
        assert distance_of(chosen) <= distance_of(replace(chosen, knots=(*chosen.knots[:-1], KNOTS[-1] + change)))


def moved_by(times: Times, move: tuple[float, ...]) -> Times:
    """Times whose knots are moved."""
    return replace(times, knots=tuple(np.add(times.knots, move).tolist()))


@pytest.mark.parametrize("gaussian", [64, None])
def test_the_direction_of_guidance_gets_weights_of_its_own_at_no_cost(gaussian, tmp_path):
    make_pipeline("dit", tmp_path / "dit")
    ladder = Ladder.create(tmp_path / "ladder", [tmp_path / "dit"], guidance=3, measure=False, gaussian=gaussian)
    fitter = Fitter(judge(ladder, 0))
    starts, unguided = fitter.starts(4)[-1], len(ladder.levels) - 1
    (joint,), apart = starts[0], starts[unguided][0]
    assert (apart.between, apart.calls) == (1, joint.calls)
    plans, errors = zip(
        *((fit.plan(), fit.distance) for fit in map(partial(fitter._fit_times, blocks=fitter.blocks), (joint, apart))),
        strict=True,
    )
    nfe = [plan.nfe(ladder.costs("cpu")) for plan in plans]
    assert nfe[1] == pytest.approx(nfe[0], rel=0.01)
    assert nfe[1] <= 4
    assert errors[1] < errors[0]
    assert fitter.search(4).distance <= errors[0]


def test_plans_of_guided_ladders_may_leave_the_gaussian_out(tmp_path):
    make_pipeline("dit", tmp_path / "dit")
    ladder = Ladder.create(tmp_path / "ladder", [tmp_path / "dit"], guidance=3, measure=False, gaussian=64)
    fitter = Fitter(judge(ladder, 0))
    above, without = fitter.starts(4)
    assert [times[0].rungs(3) for times in above.values()] == [(1, 3), (1, 2, 3)]
    assert [times[0].rungs(3) for times in without.values()] == [(3,), (2, 3)]
    alone = [fitter._fit_times(starts[0][0], fitter.blocks) for starts in (above, without)]
    for fit, times in zip(alone, (above, without), strict=True):
        assert fit.distance == pytest.approx(distance(fitter, fit.plan()), rel=1e-3)
        assert fit.plan().calls[0].any() == times[0][0].closed
    # The base is that of the less distance.
    assert fitter.search(4).closed == (alone[0].distance < alone[1].distance)


def test_times_are_nested_and_no_call_is_spent_on_pure_noise():
    log_snr = np.sort(np.linspace(-5, 4, 200) + np.sin(np.arange(200) / 8))
    for between in (1, *BETWEEN):
        for begin in BEGINNINGS:
            fire = Times(2 * (between > 1), 5, between, begin).fire(log_snr)
            assert fire[0].all()
            assert (np.diff(fire.astype(int), axis=0) <= 0).all()
            assert [row.sum() for row in fire[1:]] == ([5 * between, 5] if between > 1 else [5])
            first = np.flatnonzero(fire[1])[0]
            passed = TIME_SHARE * first / 199 + (1 - TIME_SHARE) * (log_snr[first] - log_snr[0]) / np.ptp(log_snr)
            assert passed == pytest.approx(begin, abs=0.02)


@pytest.mark.parametrize("steps", [100, 1000])
def test_calls_of_a_flow_do_not_gather_at_pure_noise(steps):
    process = process_of({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    first, second, *_ = np.flatnonzero(Times(0, 5, 1, 0.0, closed=False).fire(process.grid(steps).finite_log_snr))
    assert first == 0
    assert second > 0.2 * steps


@pytest.mark.parametrize("name", ["late", "flow"])
def test_where_a_process_begins_elsewhere_fitted_plans_are_better_too(name, request):
    """At a state with signal, or at pure noise, where lambda is minus infinity."""
    ladder = request.getfixturevalue(name)
    plan, cost = Fitter(judge(ladder, 0)).search(20).plan(), ladder.cost("cpu")
    default = make_recipe(ladder, cost, "ode", STEPS, 20, "theory", "quantiles").plan(np.random.default_rng(0))
    error, default_error = judge(ladder, 1).errors([plan, default]).mean(1)
    assert error < default_error


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("two_unets", Times(0, 4, 1, closed=False)),
        ("two_unets", Times(1, 3, 2, 0.0, closed=False)),
        ("two_unets", Times(1, 2, 5, 0.4, closed=False)),
        ("two_flows", Times(1, 3, 2, 0.0, closed=False)),
    ],
)
def test_without_a_gaussian_the_first_level_is_fitted_too(name, times, request):
    ladder = request.getfixturevalue(name)
    held = Fitter(judge(ladder, 0))
    rungs, fire = times.rungs(2), times.fire(held.log_snr)
    assert fire[0, 0]
    assert fire[0].sum() == times.calls * times.between
    assert (fire[-1] <= fire[0]).all()
    fit = held.fit(rungs, fire)
    plan = fit.plan()
    assert fit.distance == pytest.approx(distance(held, plan), rel=1e-3)
    assert plan.calls.sum(1).tolist() == ([0, 4] if not times.middle else [fire[0].sum(), times.calls])
    assert held.fit(rungs, np.ones_like(fire)).distance < 1e-3


def test_without_a_gaussian_the_path_has_a_state_for_each_step_too(two_unets):
    """Of more steps than the path calls the best level at."""
    steps = PATH_CALLS + 50
    comparison = PlanComparison(two_unets, "ode", "cpu", steps, BLOCK["cpu"], 0)
    path = Fitter(comparison).path
    assert len(path) == steps + 1
    end = comparison.end(single_level(2, 2, steps), 0)
    assert (path[-1] - end).square().mean() < 1e-4 * end.square().mean()
    assert (path[1:] - path[:-1]).flatten(1).any(1).all()


def test_a_fitted_plan_that_holds_its_first_level_is_better_on_noises_that_it_has_not_seen(lowest, monkeypatch):
    """On trained levels: untrained ones carry small differences of noise very far."""
    monkeypatch.setattr("mlem_dist.tuning.least_squares.base_of", lambda *_: "held")
    plan, cost = Fitter(judge(lowest, 0)).search(8).plan(), lowest.cost("cpu")
    assert not plan.collapse
    assert 5 < plan.nfe(cost) <= 8
    error, euler_error = judge(lowest, 1).errors([plan, single_level(3, 3, 8)]).mean(1)
    assert error < 0.5 * euler_error


def test_a_path_is_of_as_many_samples_as_there_is_memory_for():
    assert fitting_samples((1, 32, 32), 250, 256, 32) == 256
    assert fitting_samples((3, 128, 128), 250, 256, 32) == 64
    assert fitting_samples((3, 512, 512), 1000, 256, 32) == 32


def test_a_larger_budget_than_was_searched_for_is_spent_and_errs_less(lowest, fitter):
    small, large = fitter.search(LARGEST), fitter.search(1.6 * LARGEST)
    cost = lowest.cost("cpu")
    assert LARGEST < large.plan().nfe(cost) <= 1.6 * LARGEST
    assert large.distance < 0.84 * small.distance


def test_a_budget_below_one_call_of_the_best_level_is_refused(fitter):
    with pytest.raises(UsageError, match="below the cost of one call"):
        fitter.search(0.5)


def test_fits_that_do_not_end_in_finite_numbers_are_refused(many):
    fitter = Fitter(judge(many, 0))
    fitter.path[-1] = torch.nan
    with pytest.raises(UsageError, match="no fitted plan ends in finite numbers"):
        fitter.search(4)
