import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from mlem_dist.api.arguments import find_plan
from mlem_dist.errors import UsageError
from mlem_dist.ladder.calibration import read_effect, store_entry
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.schema import Guidance
from mlem_dist.solver.plan import extrapolated
from mlem_dist.solver.probabilities import expected_cost
from mlem_dist.solver.steps import canonical_solver
from mlem_dist.tuning.recipes import NeymanRule, make_recipe
from mlem_dist.tuning.tuned_plans import tuned_budgets, tuned_plan


@pytest.mark.parametrize(
    ("solver", "increments", "base"),
    [("sde", "held", "closed"), ("ode", "extrapolated", "closed"), ("dpm++", "extrapolated", "every")],
)
@pytest.mark.parametrize("probabilities", ["neyman", "theory"])
def test_what_is_not_chosen_is_the_default_of_the_solver(fashion, solver, increments, base, probabilities):
    cost = fashion.cost("cpu")
    recipe = make_recipe(fashion, cost, solver, 50, 5, probabilities)
    assert (recipe.draw, recipe.increments, recipe.collapse) == ("quantiles", increments, base == "closed")
    assert not recipe.nested
    rungs = np.array(recipe.rungs or range(1, len(cost) + 1))
    assert expected_cost(recipe.probabilities, cost[rungs - 1], base) / cost[-1] == pytest.approx(5)


@pytest.mark.parametrize(
    ("solver", "increments"), [("ode", "extrapolated"), ("sde", "held"), ("dpm++", "extrapolated")]
)
@pytest.mark.parametrize("probabilities", ["neyman", "theory"])
@pytest.mark.parametrize("nfe", [1.5, 3, 10, 40])
def test_without_a_gaussian_the_base_is_held_like_any_other_level(two_unets, solver, increments, probabilities, nfe):
    cost = two_unets.cost("cpu")
    recipe = make_recipe(two_unets, cost, solver, 100, nfe, probabilities)
    assert (recipe.draw, recipe.increments, recipe.collapse) == ("quantiles", increments, False)
    plan = recipe.plan(np.random.default_rng(0))
    assert plan.nfe(cost) == pytest.approx(nfe, rel=0.2, abs=0.5)
    assert plan.calls[:, 0].any()
    assert plan.calls.sum(1).max() < 100


@pytest.mark.parametrize("nfe", [1, 5, 40, 100])
def test_without_a_gaussian_an_untuned_budget_of_the_ode_is_the_best_levels(two_unets, nfe):
    recipe = make_recipe(two_unets, two_unets.costs("cpu"), "ode", 100, nfe)
    plan = recipe.plan(np.random.default_rng(0))
    assert plan.calls.sum(1).tolist() == [0, nfe]
    assert plan.calls[1, 0]


@pytest.mark.parametrize("solver", ["ode", "dpm++"])
def test_an_uncalibrated_budget_of_the_ode_is_the_best_levels_above_the_gaussian(
    fashion, part_of, tmp_path, solver, monkeypatch
):
    ladder = Ladder.load(part_of(fashion, (1, 2, 6), tmp_path / "ladder"))
    plan = make_recipe(ladder, ladder.costs("cpu"), solver, 100, 10).plan(np.random.default_rng(0))
    base, middle, best = plan.calls.sum(1)
    assert base >= best
    assert middle == 0
    assert best == pytest.approx(10, abs=1)
    # Of a ladder whose best level is guided, it is the best level's alone, even if the ladder is calibrated.
    guided = replace(ladder.levels[-1], guidance=Guidance(3.0))
    ladder = replace(ladder, levels=(*ladder.levels[:-1], guided))
    for known in (True, False):
        monkeypatch.setattr("mlem_dist.tuning.recipes.calibrated", lambda ladder, known=known: known)
        plan = make_recipe(ladder, ladder.cost("cpu"), solver, 100, 10).plan(np.random.default_rng(0))
        assert plan.calls.sum(1).tolist() == [0, 0, 10]
    # Increments that are unbiased over plans are those of all levels.
    impulses = make_recipe(ladder, ladder.cost("cpu"), solver, 100, 10, increments="impulse")
    assert impulses.probabilities.shape == (3, 100)


@pytest.mark.parametrize("probabilities", ["theory", "log-snr"])
def test_lines_from_pure_noise_rise_and_are_written_as_numbers(flow, probabilities):
    """There lambda is minus infinity, which JSON lacks."""
    assert flow.process.grid(20).log_snr[0] == -np.inf
    recipe = make_recipe(flow, flow.cost("cpu"), "ode", 20, 4, probabilities)
    json.dumps(recipe.log_snr.tolist(), allow_nan=False)
    line = extrapolated(np.arange(20)[None] % 5 == 0, recipe.log_snr).previous[0]
    assert (np.diff(line[5:10]) < 0).all()
    assert recipe.plan(np.random.default_rng(0)).calls[1].sum() == pytest.approx(4, abs=1)


def test_impulses_without_a_gaussian_still_pay_for_the_base_at_every_step(two_unets):
    with pytest.raises(UsageError, match=r"below the cost of the base level alone, 20 for 100 steps; raise `nfe` or"):
        make_recipe(two_unets, two_unets.cost("cpu"), "ode", 100, 10, increments="impulse")


@pytest.fixture
def ladder(tmp_path, fashion, part_of):
    """The three lowest levels of the bundled ladder, to store effects in."""
    return Ladder.load(part_of(fashion, (1, 2, 3), tmp_path / "ladder"))


def store(ladder, **effects):
    """Products of increments that are independent of each other, from the effects (K, N) of each solver."""
    t = np.linspace(999, 9, 20).astype(int).tolist()
    solvers = {
        solver: {"t": t, "products": (np.eye(3)[:, :, None] * np.array(effect)).tolist()}
        for solver, effect in effects.items()
    }
    store_entry(ladder.folder, ladder, "cpu/any", {"solvers": solvers})


def test_the_rungs_are_those_that_are_worth_their_cost(ladder):
    flat = np.ones(20)
    # What the second level adds over the first is nothing, and the third's increment over it everything; or the other
    # way round.
    for effects, rungs in (((1.0, 1e-6, 1.0), (1, 3)), ((1.0, 1.0, 1e-3), (1, 2, 3))):
        store(ladder, sde=[e * flat for e in effects], ode=[e * flat for e in effects])
        assert make_recipe(ladder, ladder.cost("cpu"), "sde", 50, 5).rungs == rungs


def test_each_solver_goes_by_its_own_effects(ladder):
    """Along the SDE increments matter at the end, along the ODE at the beginning."""
    rise = np.linspace(0.01, 1, 20)
    store(ladder, sde=[rise] * 3, ode=[rise[::-1]] * 3)
    for solver, late in (("sde", True), ("ode", False), ("dpm++", False)):
        p = make_recipe(ladder, ladder.cost("cpu"), solver, 50, 5).probabilities[-1]
        assert (p[25:].sum() > p[:25].sum()) == late


def test_probabilities_are_the_rules_times_a_density(ladder):
    store(ladder, sde=[np.ones(20)] * 3, ode=[np.ones(20)] * 3)
    rule = NeymanRule(ladder, ladder.cost("cpu"), "ode", 50, "extrapolated")
    density = np.stack([np.ones(50), np.linspace(1, 3, 50)])
    p = rule.probabilities(2, (1, 3), density)[1]
    assert p.max() < 1
    np.testing.assert_allclose(p / p[0], density[1], rtol=1e-6)


def test_files_of_0_3_that_name_solvers_otherwise_are_read(fashion, tmp_path):
    """Plans and a calibration, whose solvers were ddim and ddpm."""
    folder = tmp_path / "fashion"
    shutil.copytree(fashion.folder, folder)
    for path in folder.glob("plan-ode-*.json"):
        path.rename(folder / path.name.replace("ode", "ddim"))
    for path in (*folder.glob("plan-*.json"), folder / "calibration.json"):
        path.write_text(path.read_text().replace('"ode"', '"ddim"').replace('"sde"', '"ddpm"'))
    ladder = Ladder.load(folder)
    assert tuned_budgets(folder, "ode") == tuned_budgets(fashion.folder, "ode") != []
    for solver in ("ode", "ddim"):
        plan, _ = find_plan(ladder, ladder.cost("cpu"), solver=canonical_solver(solver), steps=250, nfe=10)
        assert np.array_equal(plan.weight, tuned_plan(fashion, "ode", 250, 10).weight)
    for solver in ("ode", "sde"):
        assert np.array_equal(read_effect(ladder, solver)[1], read_effect(fashion, solver)[1])
    with pytest.raises(UsageError, match="`solver` 'euler': expected one of ode, sde, dpm\\+\\+"):
        canonical_solver("euler")
