import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from mlem_dist import api
from mlem_dist.cli import cli
from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.integrate import integrate
from mlem_dist.solver.noise import image_noise
from mlem_dist.solver.plan import Plan, held, plan_to_dict, read_plan, single_level
from mlem_dist.solver.steps import solver_table
from mlem_dist.tuning.comparison import BLOCK, PlanComparison, set_seed
from mlem_dist.tuning.frontier import Row, lower_envelope
from mlem_dist.tuning.recipes import make_recipe
from mlem_dist.tuning.tune import TEST_SAMPLES, TEST_SEED, best_plan, open_frontier
from mlem_dist.tuning.tuned_plans import tuned_budgets, tuned_plan

FRONTIER, PLAN = "frontier-sde.json", "plan-sde-9.json"


def run(command: str, *arguments: str) -> Result:
    return CliRunner().invoke(cli, [command, *arguments], standalone_mode=False, catch_exceptions=False)


def rows(folder) -> dict[tuple[str, str], list[float]]:
    return {(row["family"], row["label"]): row["errors"] for row in json.loads((folder / FRONTIER).read_text())["rows"]}


def test_a_ladder_is_tuned_judged_and_used(small):
    arguments = [str(small), "--nfe", "9", "--steps", "50", "--solver", "sde", "--device", "cpu", "--out", str(small)]
    printed = run("tune", *arguments).stdout
    found = rows(small)
    assert {family for family, _ in found} == {"held", "extrapolated", "ML-EM", "Euler-Maruyama", "memorised"}
    assert all(family in printed for family, _ in found)
    assert (small / "frontier-sde.png").read_bytes().startswith(b"\x89PNG")

    # The memorised plan's errors, from the plan's file and the judging noises, step by step.
    ladder = Ladder.load(small)
    plan = read_plan(small / PLAN, ladder.digest, 2, "sde", 50)
    assert plan.collapse
    levels = {k: ladder.load_level(k, "cpu") for k in (1, 2)}
    table = solver_table(ladder.process, 50, "sde")
    condition = {"label": torch.arange(BLOCK["cpu"]) % 10}
    errors = []
    for block in range(TEST_SAMPLES // BLOCK["cpu"]):
        first = set_seed(TEST_SEED) + block * BLOCK["cpu"]
        noise = image_noise(range(first, first + BLOCK["cpu"]), ladder.sample_shape, "cpu")
        best = integrate(levels, table, single_level(2, 2, 50), noise, condition)
        single_steps = Plan(plan.fire, plan.weight, plan.previous)
        end = integrate(levels, table, single_steps, noise, condition)
        errors += (end - best).square().mean((1, 2, 3)).tolist()
    np.testing.assert_allclose(found["memorised", "9 NFE"], errors, rtol=2e-2)
    assert np.mean(errors) < np.mean(found["Euler-Maruyama", "9 NFE"])

    # Again: nothing is done twice; what was lost is found again, the same.
    before = {path: path.read_bytes() for path in (small / FRONTIER, small / PLAN)}
    run("tune", *arguments)
    assert {path: path.read_bytes() for path in before} == before
    raw = json.loads((small / FRONTIER).read_text())
    (small / FRONTIER).write_text(json.dumps(raw | {"rows": raw["rows"][:2]}))
    (small / PLAN).unlink()
    run("tune", *arguments)
    assert rows(small) == found
    assert (small / PLAN).read_bytes() == before[small / PLAN]

    generate = ["--ladder", str(small), "--solver", "sde", "--engine", "inline"]
    generate += ["--num", "4", "--block-size", "4", "--shard-size", "4"]
    (small / "plan-sde-mine.json").write_text("")
    ways = (("50", [], "Using the plan tuned"), ("50", ["--increments", "held"], ""), ("25", [], "for --nfe 9, at"))
    for steps, options, said in ways:
        out = small.parent / f"out-{steps}-{len(options)}"
        done = run("generate", *generate, "--out", str(out), "--nfe", "9", "--steps", steps, *options)
        assert said in done.stderr
        assert ("tuned" in done.stderr) == bool(said)
        used = "fire" in json.loads((out / "mlem.json").read_text())["config"]["plan"]
        assert used == said.startswith("Using")


@pytest.mark.parametrize(("solver", "searched"), [("ode", {"fitted"}), ("sde", {"memorised", "optimised"})])
def test_the_best_one_of_the_plans_that_are_searched_for_is_kept(calibrated, solver, searched):
    arguments = [str(calibrated), "--nfe", "6", "--steps", "40", "--solver", solver, "--device", "cpu"]
    printed = run("tune", *arguments, "--out", str(calibrated)).stdout
    raw = json.loads((calibrated / f"frontier-{solver}.json").read_text())
    errors = {row["family"]: row["errors"] for row in raw["rows"]}
    assert {*errors} == {"held", "extrapolated", "ML-EM", "Euler-Maruyama", *searched}
    assert all(family in printed for family in errors)
    assert solver == "sde" or np.mean(errors["fitted"]) < np.mean(errors["extrapolated"])
    ladder = Ladder.load(calibrated)
    plan = read_plan(calibrated / f"plan-{solver}-6.json", ladder.digest, 2, solver, 40)
    plan_errors = PlanComparison(ladder, solver, "cpu", 40, TEST_SAMPLES, TEST_SEED).measure(plan).errors
    assert any(np.allclose(plan_errors, errors[family], rtol=1e-2) for family in searched)


def test_a_fitted_plan_that_is_worse_than_the_default_is_not_written(small, tmp_path, monkeypatch):
    ladder = Ladder.load(small)
    default = make_recipe(ladder, ladder.costs("cpu"), "ode", 20, 4).plan(np.random.default_rng(0))
    first = held(np.arange(20)[None] == [[0], [0]])
    monkeypatch.setattr("mlem_dist.tuning.tune.fitted_plan", lambda *arguments: first)
    api.tune(small, out=tmp_path / "out", nfe=(4,), steps=20, device="cpu")
    written = read_plan(tmp_path / "out/plan-ode-4.json", ladder.digest, 2, "ode", 20)
    assert plan_to_dict(written, "", "") == plan_to_dict(default, "", "")


def test_the_bundled_plans_err_the_less_the_more_they_may_spend(fashion):
    budgets = tuned_budgets(fashion.folder, "ode")
    plans = [tuned_plan(fashion, "ode", 250, nfe) for nfe in budgets]
    assert budgets == [2, 3, 5, 10, 20, 40]
    assert all(plan.nfe(fashion.cost("cpu")) <= nfe for plan, nfe in zip(plans, budgets, strict=True))
    # A few samples of the judging noises: the best level at 250 steps takes most of the time.
    levels = {k: fashion.load_level(k, "cpu") for k in range(1, len(fashion.levels) + 1)}
    table = solver_table(fashion.process, 250, "ode")
    first, condition = set_seed(TEST_SEED), {"label": torch.arange(4)}
    noise = image_noise(range(first, first + 4), fashion.sample_shape, "cpu")
    form = levels[1].closed_form(levels[1].affine(table.t), table, condition, len(condition["label"]))
    ends = [integrate(levels, table, plan, noise, condition, form) for plan in plans]
    best = integrate(levels, table, single_level(len(levels), len(levels), 250), noise, condition)
    errors = np.array([(end - best).square().mean() for end in ends])
    assert (errors[1:] < errors[:-1]).all()
    assert errors[0] < 0.01


def test_the_reference_has_no_error(small, tmp_path, monkeypatch):
    ladder = Ladder.load(small)
    judge = PlanComparison(ladder, "ode", "cpu", 40, 2 * BLOCK["cpu"], 3, tmp_path / "cache", threads=2)
    measurement = judge.measure(single_level(2, 2, 40))
    assert measurement.errors.max() == 0
    assert measurement.seconds > 0
    kept = PlanComparison(ladder, "ode", "cpu", 40, 2 * BLOCK["cpu"], 3, tmp_path / "cache")
    assert torch.equal(kept.reference, judge.reference)
    assert torch.equal(PlanComparison(ladder, "ode", "cpu", 40, 2 * BLOCK["cpu"], 3).reference, judge.reference)
    # As a version with other noise would have kept it.
    monkeypatch.setattr("mlem_dist.tuning.comparison.set_seed", lambda number: number)
    other = PlanComparison(ladder, "ode", "cpu", 40, 2 * BLOCK["cpu"], 3, tmp_path / "cache")
    assert other.measure(single_level(2, 2, 40)).errors.max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--steps", "1001"], "expected 1 to 1000"),
        (["--nfe", "5,x"], "positive numbers such as"),
        (["--nfe", "0.01"], "below the cost of the base level"),
        (["--nfe", "9,1"], "`nfe` 1 is below the cost of one call of the best level"),
    ],
)
def test_bad_input_is_refused_before_anything_is_judged(small, tmp_path, change, message):
    out = tmp_path / "out"
    with pytest.raises(Exception, match=message):
        run("tune", str(small), "--out", str(out), *change)
    assert not out.exists()


def test_without_cma_nothing_is_begun_that_needs_it(calibrated, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(UsageError, match=r"install the extra `train`"):
        run("tune", str(calibrated), "--solver", "sde", "--steps", "40", "--nfe", "6", "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("solver", ["ode", "sde"])
def test_a_budget_for_every_step_is_spent_on_the_best_level(small, tmp_path, solver):
    out = tmp_path / "out"
    run("tune", str(small), "--solver", solver, "--steps", "8", "--nfe", "8", "--device", "cpu", "--out", str(out))
    ladder = Ladder.load(small)
    plan = read_plan(out / f"plan-{solver}-8.json", ladder.digest, 2, solver, 8)
    assert PlanComparison(ladder, solver, "cpu", 8, BLOCK["cpu"], TEST_SEED).errors([plan]).max() == 0


def test_a_plan_that_does_not_stay_finite_never_wins(small):
    ladder = Ladder.load(small)
    selection = PlanComparison(ladder, "ode", "cpu", 8, BLOCK["cpu"], 0)
    good = single_level(2, 2, 8)
    bad = Plan(good.fire, 1e38 * good.weight, good.previous)
    assert not np.isfinite(selection.errors([bad])).all()
    for plans in ([bad, good], [good, bad]):
        assert best_plan(selection, plans, ladder.cost("cpu")) is good
    with pytest.raises(UsageError, match="no plan that was tried ends in finite numbers"):
        best_plan(selection, [bad, bad], ladder.cost("cpu"))


def test_the_plan_of_least_error_wins(small):
    ladder = Ladder.load(small)
    selection = PlanComparison(ladder, "ode", "cpu", 8, BLOCK["cpu"], 0)
    # Of equal cost, as both call level 2 at every step.
    best, worse = single_level(2, 2, 8), replace(single_level(2, 2, 8), weight=1.1 * single_level(2, 2, 8).weight)
    for plans in ([best, worse], [worse, best]):
        assert best_plan(selection, plans, ladder.cost("cpu")) is best


def test_every_class_has_its_turn(many, fashion):
    for ladder, blocks in ((many, 5), (fashion, 2)):
        judge = PlanComparison(ladder, "ode", "cpu", 10, blocks * BLOCK["cpu"], 0)
        label = torch.cat([judge.condition(block)["label"] for block in range(blocks)])
        assert {*label.tolist()} == {*range(len(ladder.labels))}
        assert label.bincount().min() > 0.6 * label.bincount().max()
        # What is judged is what each block's own classes end in.
        best, end = single_level(2, 2, 10), judge.reference.split(BLOCK["cpu"])[1]
        levels = judge.levels if ladder is many else {2: judge.levels[len(ladder.levels)]}
        own = integrate(levels, judge.fine, best, judge.noise(1, 10), judge.condition(1))
        assert torch.equal(own, end)
    assert torch.equal(*(judge.condition(block)["label"] for block in (0, 1)))


def test_a_frontier_of_another_ladder_is_refused(small, tmp_path):
    settings = open_frontier(Ladder.load(small), "sde", 250, "cpu", tmp_path).settings
    for key, other in (("ladder", "another"), ("costs", [1.0, 2.0]), ("calibration", "another")):
        (tmp_path / FRONTIER).write_text(json.dumps(settings | {key: other, "rows": []}))
        with pytest.raises(UsageError, match=f"of another {key}: .*; move it away, or"):
            run("tune", str(small), "--out", str(tmp_path), "--nfe", "9", "--solver", "sde", "--device", "cpu")


def test_the_lower_envelope_holds_what_nothing_beats():
    points = [(1.0, 5.0), (2.0, 6.0), (2.0, 4.0), (3.0, 4.0), (4.0, 1.0), (0.5, np.nan), (0.6, np.inf)]
    found = lower_envelope([Row("a", str(i), s, np.array([e])) for i, (s, e) in enumerate(points)])
    assert [row.label for row in found] == ["0", "2", "4"]


def test_tune_refuses_a_solver_that_it_finds_no_plans_for(fashion, tmp_path):
    with pytest.raises(UsageError, match=r"`solver` dpm\+\+: `tune` finds plans for ode and sde"):
        api.tune(fashion, out=tmp_path, solver="dpm++")
    assert not list(tmp_path.iterdir())
