import numpy as np
import pytest
import torch
from processes import process_of_betas

from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.integrate import integrate
from mlem_dist.solver.noise import image_noise
from mlem_dist.solver.plan import Plan, draw_coins, extrapolated, held, single_level
from mlem_dist.solver.steps import solver_table
from mlem_dist.tuning.comparison import PlanComparison
from mlem_dist.tuning.evolution import FirstOrder, evaluations_in_use, pair_effects
from mlem_dist.tuning.recipes import make_recipe
from mlem_dist.tuning.tune import Optimiser

STEPS, SAMPLES = 24, 16
PROCESS = process_of_betas(np.linspace(1e-4, 0.02, 1000))


def scalar_levels(size: float):
    """Drifts of numbers, the upper two a small way off the one below, in curves."""

    def first(x, t, *_):
        return 0.6 * x

    def second(x, t, *_):
        return first(x, t) + size * torch.sin(2 * x + t.view(-1, 1, 1, 1) / 300)

    def third(x, t, *_):
        return second(x, t) + size * torch.cos(x - t.view(-1, 1, 1, 1) / 200)

    return {1: first, 2: second, 3: third}


@pytest.mark.parametrize("solver", ["sde", "ode"])
@pytest.mark.parametrize("kind", ["held", "extrapolated"])
def test_the_model_is_the_error_to_first_order(solver, kind):
    table = solver_table(PROCESS, STEPS, solver)
    noise = image_noise(range(SAMPLES), (1, 1, 1), "cpu")
    fire = draw_coins(np.repeat([[1.0], [0.4], [0.2]], STEPS, axis=1), "systematic", np.random.default_rng(1))
    plan = held(fire) if kind == "held" else extrapolated(fire, np.arange(STEPS) ** 1.5, reach=[1.0, 1.4, 0.5])
    ratios = []
    for size in (1e-2, 1e-3):
        levels = scalar_levels(size)
        # Of one number, a sign is a probe without noise.
        model = FirstOrder(pair_effects(levels, table, noise, {}, torch.ones(SAMPLES, 1, 1, 1)))
        best = integrate(levels, table, single_level(3, 3, STEPS), noise, {})
        end = integrate(levels, table, plan, noise, {})
        ratios.append(model.error(plan) / float((end - best).square().mean()))
        assert model.error(single_level(3, 3, STEPS)) == 0
    assert ratios[0] == pytest.approx(1, abs=0.1)
    assert ratios[1] == pytest.approx(1, abs=0.02)


def test_evaluations_in_use_are_those_of_the_plan():
    rng = np.random.default_rng(0)
    for _ in range(20):
        fire = rng.random((1, 30)) < 0.2
        latest, before = evaluations_in_use(fire[0])
        weights = rng.random((2, 1, 30))
        plan = Plan(fire, weights[0], weights[1])
        found = np.zeros((30, 30))
        for term in (term for terms in plan.terms for term in terms):
            found[term.start : term.stop, term.start] = term.weights
        expected = np.zeros((30, 30))
        for j in range(30):
            if latest[j] >= 0:
                expected[j, latest[j]] = weights[0, 0, j]
            if before[j] >= 0:
                expected[j, before[j]] = weights[1, 0, j]
        np.testing.assert_array_equal(found, expected)


def test_the_optimiser_finds_a_better_plan_for_noises_that_it_has_not_seen(calibrated):
    ladder = Ladder.load(calibrated)
    selection, judging = (PlanComparison(ladder, "ode", "cpu", 40, 64, seed, threads=2) for seed in (0, 1))
    plan = Optimiser(selection, 2, lambda stage, done, total: None, samples=64).plan(6)
    default = make_recipe(ladder, ladder.cost("cpu"), "ode", 40, 6, draw="quantiles").plan(np.random.default_rng(0))
    cost = ladder.cost("cpu")
    assert plan.nfe(cost) == pytest.approx(6, rel=0.1)
    assert judging.measure(plan).errors.mean() < 0.8 * judging.measure(default).errors.mean()


@pytest.mark.parametrize(("steps", "nfe"), [(40, 10.0), (110, 26.0)])
def test_the_evaluations_of_a_base_level_that_is_not_free_are_optimised_too(two_unets, steps, nfe):
    """Also where the model has fewer steps than the plan, or the budget is larger than those searched for."""
    cost = two_unets.cost("cpu")
    selection = PlanComparison(two_unets, "ode", "cpu", steps, 4, 0)
    optimiser = Optimiser(selection, 1, lambda stage, done, total: None, samples=4)
    plan = optimiser.plan(nfe)
    assert plan.nfe(cost) == pytest.approx(nfe, rel=0.1)
    assert plan.calls[:, 0].any()
    assert 0 < plan.calls[1].sum() < steps
    with pytest.raises(UsageError, match=r"`nfe` 0.1 is below the cost of one evaluation of each level, 1; raise"):
        optimiser.plan(0.1)
