import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlem_dist.errors import UsageError
from mlem_dist.solver.costs import as_costs
from mlem_dist.solver.integrate import evaluate
from mlem_dist.solver.plan import (
    Plan,
    Recipe,
    extrapolated,
    held,
    impulse,
    nest,
    plan_to_dict,
    read_plan,
    single_level,
    switched,
    systematic,
)
from mlem_dist.solver.probabilities import expected_cost, rule_weights, scale_to_budget

COST = np.array([0.02, 0.3, 1.2, 5.0])
RULES = ("theory", "inverse-cost", "log-snr", "constant")
STEPS = 6


def toy(k: int):
    return lambda x, t, *_: torch.tanh(x * (1 + 1 / k)) + t[:, None] * 0.01 / k


LEVELS = {k: toy(k) for k in range(1, 5)}
X = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]


def drift(plan: Plan, step: int) -> torch.Tensor:
    """The drift that a plan of impulses uses at a step."""
    terms = plan.terms[step]
    values = evaluate(LEVELS, terms, X, 7, {})
    return sum(term.weights[0] * value for term, value in zip(terms, values, strict=True))


BEST = LEVELS[4](X, torch.full((len(X),), 7), None)
# Different at every step.
PROBABILITIES = np.array([1.0, 0.7, 0.3, 0.11])[:, None] ** np.linspace(1, 1.5, STEPS)


@pytest.mark.parametrize("step", range(STEPS))
def test_impulses_of_independent_coins_are_unbiased_over_all_plans(step):
    mean = torch.zeros_like(X)
    for coins in itertools.product([0, 1], repeat=3):
        fire = np.zeros((4, STEPS), dtype=bool)
        fire[0] = True
        fire[1:, step] = coins
        chance = np.prod(np.where(coins, PROBABILITIES[1:, step], 1 - PROBABILITIES[1:, step]))
        mean += chance * drift(impulse(fire, PROBABILITIES), step)
    assert (mean - BEST).abs().max() < 1e-6


@pytest.mark.parametrize("step", range(STEPS))
def test_impulses_of_systematic_coins_are_unbiased_over_all_plans(step):
    # The coins of a level change only where u and some sum of p are whole: all plans are those between these points.
    points = [np.unique(np.append(-np.cumsum(p) % 1, [0, 1])) for p in PROBABILITIES[1:]]
    mean, total = torch.zeros_like(X), 0.0
    for cells in itertools.product(*(list(itertools.pairwise(p)) for p in points)):
        u = np.array([0.5, *(sum(cell) / 2 for cell in cells)])
        chance = float(np.prod([high - low for low, high in cells]))
        mean += chance * drift(impulse(systematic(PROBABILITIES, u), PROBABILITIES), step)
        total += chance
    assert total == pytest.approx(1)
    assert (mean - BEST).abs().max() < 1e-6


@pytest.mark.parametrize("draw", ["independent", "systematic"])
def test_coins_fall_with_their_probability_at_every_step(draw):
    rng = np.random.default_rng(0)
    recipe = Recipe(PROBABILITIES, draw, "impulse")
    count = sum(recipe.plan(rng).fire.astype(int) for _ in range(4000))
    error = np.sqrt(PROBABILITIES * (1 - PROBABILITIES) / 4000)
    assert (np.abs(count / 4000 - PROBABILITIES) <= 4.5 * error).all()


def test_systematic_coins_are_evenly_spread():
    for seed in range(50):
        fire = systematic(np.repeat([[1.0], [0.1]], 250, axis=1), np.random.default_rng(seed).random(2))
        assert fire[0].all()
        assert fire[1].sum() == 25
        assert set(np.diff(np.flatnonzero(fire[1]))) == {10}


def test_quantiles_are_no_matter_of_chance():
    density = np.array([0.0, 1, 1, 2, 2, 2, 1, 1, 0, 0])
    p = np.stack([np.ones(10), 0.4 * density])
    plans = [Recipe(p, "quantiles", "held").plan(np.random.default_rng(seed)) for seed in range(2)]
    # Four calls, where the density's sum passes (j + 1/2) / 4 of its whole.
    found = np.cumsum(density)[np.flatnonzero(plans[0].fire[1])] / density.sum()
    at = (np.arange(4) + 0.5) / 4
    assert (found >= at).all()
    assert (found - at <= 0.2 + 1e-9).all()
    assert np.array_equal(plans[0].fire, plans[1].fire)


def test_a_certain_plan_is_euler_maruyama_with_the_best_level():
    ones = np.ones((4, STEPS), dtype=bool)
    for plan in (impulse(ones, np.ones((4, STEPS))), held(ones), single_level(4, 4, STEPS)):
        assert plan.calls.sum(1).tolist() == [0, 0, 0, STEPS]
        assert [len(terms) for terms in plan.terms] == [1] * STEPS
        assert torch.equal(drift(plan, 2), BEST)


def test_single_level_calls_that_level_only():
    plan = single_level(2, 4, STEPS)
    assert plan.calls.sum(1).tolist() == [0, STEPS, 0, 0]
    assert torch.equal(drift(plan, 0), LEVELS[2](X, torch.full((len(X),), 7), None))


def test_a_held_increment_lasts_until_the_next():
    fire = np.array([[1] * 5, [0, 1, 0, 1, 0]], dtype=bool)
    plan = held(fire)
    assert plan.weight.tolist() == [[1] * 5, [0, 1, 1, 1, 1]]
    spans = [
        (term.level, term.below, term.start, term.stop) for terms in plan.terms for term in terms if term.level == 2
    ]
    assert spans == [(2, 1, 1, 3), (2, 1, 3, 5)]


def test_extrapolated_increments_follow_a_line_in_lambda_no_further_than_one_gap():
    log_snr = np.array([0.0, 1, 3, 4, 6, 7, 9, 20])
    fire = np.array([[1, 0, 1, 0, 0, 1, 0, 0]], dtype=bool)
    plan = extrapolated(fire, log_snr)
    line = 2 - 3 * log_snr
    drift = np.zeros(8)
    for term in (term for terms in plan.terms for term in terms):
        drift[term.start : term.stop] += line[term.start] * np.array(term.weights)
    # From step 2 the line is known, from 7 the last step is more than one gap, 7 - 3, beyond the last evaluation.
    np.testing.assert_allclose(drift, [2, 2, *line[2:7], 2 - 3 * 11])
    for k in range(8):
        steps = plan.weight[:, k] + plan.previous[:, k]
        assert steps == pytest.approx(1), "a constant increment stays what it is"


def test_increments_are_extrapolated_as_far_as_they_reach():
    log_snr = np.array([0.0, 1, 3, 4, 6, 7, 9, 20])
    fire = np.array([[1] * 8, [0, 1, 0, 1, 0, 1, 0, 0]], dtype=bool)
    line, none = extrapolated(fire, log_snr), held(fire)
    for reach in (0.0, 0.5, 1.5):
        found = extrapolated(fire, log_snr, [1.0, reach])
        for name in ("weight", "previous"):
            of_line, of_none = getattr(line, name)[1], getattr(none, name)[1]
            np.testing.assert_allclose(getattr(found, name)[1], of_none + reach * (of_line - of_none))
        assert np.array_equal(found.weight[0], line.weight[0])


def test_a_switched_plan_is_the_small_level_and_then_the_large_one():
    plan = switched(2, 4, 4, STEPS, 2)
    assert plan.calls.sum(1).tolist() == [0, 2, 0, STEPS - 2]
    small = LEVELS[2](X, torch.full((len(X),), 7), None)
    for step in range(STEPS):
        assert torch.equal(drift(plan, step), small if step < 2 else BEST)


def test_rules_are_in_the_proportions_that_they_say():
    log_snr = np.linspace(0, 2, 30) ** 2
    theory, inverse, snr, constant = (rule_weights(rule, COST, log_snr) for rule in RULES)
    np.testing.assert_allclose(inverse * COST[:, None], np.ones((4, 30)))
    np.testing.assert_allclose(theory, np.repeat(COST[:, None] ** -0.9, 30, axis=1))
    np.testing.assert_allclose(snr, theory * np.gradient(log_snr))
    np.testing.assert_allclose(constant, np.ones((4, 30)))


def test_a_plan_in_closed_form_calls_the_first_level_only_for_increments():
    fire = np.array([[1] * 6, [0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 1, 0]], dtype=bool)
    plan = replace(held(fire), collapse=True)
    assert [(run.start, run.stop, len(run.terms), len(run.base)) for run in plan.runs] == [
        (0, 2, 0, 2),
        (2, 4, 1, 2),
        (4, 6, 1, 2),
    ]
    # At step 4 both increments fire and are held equally long: one call of level 3, one of level 1.
    assert plan.calls.sum(1).tolist() == [2, 1, 1]
    cost = np.array([1.0, 10.0, 100.0])
    assert plan.nfe(cost) == pytest.approx((2 + 10 + 100 + 3) / 100)
    assert held(fire).calls.sum(1).tolist() == [6, 1, 1]
    # With the best level at every step nothing is left of the first one.
    assert all(not run.base for run in replace(single_level(3, 3, 6), collapse=True).runs)
    assert len(replace(single_level(1, 3, 6), collapse=True).runs) == 1


@pytest.mark.parametrize("draw", ["independent", "systematic"])
@pytest.mark.parametrize("increments", ["impulse", "held"])
def test_levels_that_are_no_rungs_are_never_called(draw, increments):
    """A recipe on rungs 1, 3, 4 of four levels draws what one for a ladder of these three levels does."""
    p = PROBABILITIES[[0, 2, 3]]
    whole = Recipe(p, draw, increments, rungs=(1, 3, 4)).plan(np.random.default_rng(3))
    rungs = Recipe(p, draw, increments).plan(np.random.default_rng(3))
    assert whole.calls[1].sum() == 0
    assert np.array_equal(whole.calls[[0, 2, 3]], rungs.calls)
    number = {0: 0, 1: 1, 2: 3, 3: 4}
    for mine, theirs in zip(whole.terms, rungs.terms, strict=True):
        assert [(term.level, term.below, term.weights) for term in mine] == [
            (number[term.level], number[term.below], term.weights) for term in theirs
        ]


def test_a_value_of_no_weight_is_not_evaluated():
    fire = np.ones((2, 3), dtype=bool)
    plan = Plan(fire, np.array([[1.0, 1, 1], [0, 2, 0]]), np.zeros((2, 3)))
    assert plan.calls.sum(1).tolist() == [3, 1]


@pytest.mark.parametrize("rule", ["constant", "inverse-cost", "theory", "log-snr"])
@pytest.mark.parametrize("nfe", [2.0, 5.0, 20.0, 100.0])
@pytest.mark.parametrize("slope", [0.0, 3.0])
def test_probabilities_meet_the_budget(rule, nfe, slope):
    weights = rule_weights(rule, COST, np.arange(250.0)) * np.linspace(1, 0, 250) ** slope
    p = scale_to_budget(weights, COST, nfe)
    assert (p[0] == 1).all()
    assert ((p >= 0) & (p <= 1)).all()
    assert (np.diff(p, axis=0) <= 0).all()
    assert (np.diff(p, axis=1) <= 0).all()
    assert p.sum(1) @ as_costs(COST).increments / COST[-1] == pytest.approx(nfe, rel=1e-6)
    rng = np.random.default_rng(1)
    drawn = np.mean([Recipe(p, "systematic", "impulse").plan(rng).nfe(COST) for _ in range(20)])
    # A plan shares evaluations at a step, so it costs at most what was budgeted, but for the luck of the draw.
    assert 0.6 * nfe < drawn < nfe + 1


@pytest.mark.parametrize("nfe", [0.5, 3.0, 20.0])
def test_probabilities_meet_the_budget_in_closed_form(nfe):
    p = scale_to_budget(rule_weights("theory", COST, np.arange(250.0)), COST, nfe, "closed")
    rng = np.random.default_rng(1)
    recipe = Recipe(p, "independent", "held", True)
    drawn = np.mean([recipe.plan(rng).nfe(COST) for _ in range(400)])
    # As above; independent coins share only by chance.
    assert 0.8 * nfe < drawn < 1.1 * nfe
    steps = scale_to_budget(rule_weights("theory", COST, np.arange(250.0)), COST, 3.0)
    assert expected_cost(
        scale_to_budget(rule_weights("theory", COST, np.arange(250.0)), COST, 3.0, "closed"), COST
    ) > expected_cost(steps, COST)


@pytest.mark.parametrize("nfe", [1.5, 3.0, 20.0, 100.0])
@pytest.mark.parametrize("draw", ["quantiles", "systematic", "independent"])
def test_probabilities_meet_the_budget_with_a_held_base(nfe, draw):
    p = scale_to_budget(rule_weights("theory", COST, np.arange(250.0)), COST, nfe, "held")
    assert (p[:, 0] == 1).all()
    assert (np.diff(p, axis=0) <= 0).all()
    recipe, rng = Recipe(p, draw, "held", nested=True), np.random.default_rng(1)
    plans = [recipe.plan(rng) for _ in range(1 if draw == "quantiles" else 100)]
    # Independent coins that are moved to the same step are one evaluation.
    assert 0.8 * nfe - 0.2 < np.mean([plan.nfe(COST) for plan in plans]) < 1.1 * nfe + 0.3
    for plan in plans:
        assert plan.fire[:, 0].all()
        # Every evaluation of an increment finds the value of the level below.
        assert (plan.calls <= plan.fire).all()


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 40))
def test_nested_coins_lie_where_the_level_below_fires_and_move_no_farther_than_they_must(seed, levels, steps):
    fire = np.random.default_rng(seed).random((levels, steps)) < 0.4
    nested = nest(fire)
    assert (nested[0] == fire[0]).all()
    for k in range(1, levels):
        below, at = np.flatnonzero(nested[k - 1]), np.flatnonzero(fire[k])
        assert set(np.flatnonzero(nested[k])) <= set(below)
        assert nested[k].sum() <= fire[k].sum()
        if below.size:
            nearest = [np.abs(below - step).min() for step in at]
            moved = [np.abs(np.flatnonzero(nested[k]) - step).min() for step in at]
            assert moved == nearest
    assert (nest(nested) == nested).all()


def test_theory_is_the_rule_of_the_paper_for_its_own_costs():
    gamma, k = 2.5, np.arange(1, 6)
    weights = rule_weights("theory", 2.0 ** (gamma * k), np.zeros(1))[:, 0]
    np.testing.assert_allclose(weights / weights[0], 2.0 ** (-(1 + gamma / 2) * (k - 1)))


def test_a_budget_below_the_base_level_is_refused():
    with pytest.raises(UsageError, match="below the cost of the base level"):
        scale_to_budget(rule_weights("theory", COST, np.arange(250.0)), COST, 0.9)


def test_one_level_takes_every_step_or_is_refused_with_the_number_it_can_take():
    cost, weights = np.array([3e-3]), np.ones((1, 250))
    for nfe, base in ((250, "every"), (1e6, "every"), (1, "closed"), (10, "closed"), (250, "held")):
        assert (scale_to_budget(weights, cost, nfe, base) == 1).all()
    message = r"`nfe` 10 is below .*, 250 for 250 steps; raise `nfe` or lower `steps` to 10$"
    with pytest.raises(UsageError, match=message):
        scale_to_budget(weights, cost, 10)
    assert (scale_to_budget(weights[:, :10], cost, 10) == 1).all()
    for base in ("every", "closed", "held"):
        with pytest.raises(UsageError, match=r"raise `nfe`$"):
            scale_to_budget(weights, cost, 0.5, base)


def test_as_many_steps_as_a_refusal_names_can_be_paid():
    cost = np.array([0.3, 1.0, 2.0])
    with pytest.raises(UsageError, match=r"lower `steps` to 26$"):
        scale_to_budget(np.ones((3, 250)), cost, 4)
    scale_to_budget(np.ones((3, 26)), cost, 4)
    with pytest.raises(UsageError, match="below the cost"):
        scale_to_budget(np.ones((3, 27)), cost, 4)


def test_a_budget_for_everything_is_euler_maruyama():
    assert (scale_to_budget(rule_weights("theory", COST, np.arange(250.0)), COST, 250) == np.ones((4, 250))).all()


@pytest.mark.parametrize("increments", ["impulse", "held", "extrapolated"])
def test_json_round_trip(tmp_path, increments):
    p = np.repeat([[1.0], [0.37], [0.1]], 40, axis=1)
    plan = Recipe(p, "independent", increments, True, np.linspace(-5, 4, 40) ** 3).plan(np.random.default_rng(5))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_to_dict(plan, "digest", "sde")))
    plan_read = read_plan(path, "digest", 3, "sde", 40)
    assert np.array_equal(plan_read.fire, plan.fire)
    assert np.array_equal(plan_read.weight, plan.weight)
    assert plan_read.terms == plan.terms
    assert plan_read.runs == plan.runs
    for changed in (("other", "sde", 40), ("digest", "ode", 40), ("digest", "sde", 50)):
        with pytest.raises(UsageError, match="made for another"):
            read_plan(path, changed[0], 3, *changed[1:])
