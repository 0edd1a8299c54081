from dataclasses import replace

import numpy as np
import pytest
import torch
from processes import process_of_betas

from mlem_dist.solver.closed_form import AffineDrift, ClosedForm, Projected
from mlem_dist.solver.integrate import integrate
from mlem_dist.solver.noise import image_noise
from mlem_dist.solver.plan import Recipe, held, single_level
from mlem_dist.solver.steps import StepTable, solver_table

STEPS = 60


@pytest.fixture(scope="module")
def levels(fashion):
    return {k: fashion.load_level(k, "cpu") for k in (1, 2, 3)}


def recipe(fashion, table: StepTable, increments: str, collapse: bool) -> Recipe:
    p = np.repeat([[1.0], [0.2], [0.06]], len(table), axis=1)
    return Recipe(p, "systematic", increments, collapse, fashion.process.grid(len(table)).log_snr)


@pytest.mark.parametrize("solver", ["sde", "ode"])
@pytest.mark.parametrize("increments", ["held", "extrapolated", "impulse"])
def test_runs_in_closed_form_are_the_single_steps(fashion, levels, solver, increments):
    """On one Brownian path, with a real Gaussian level and real UNets on top: equal but for rounding."""
    table = solver_table(fashion.process, STEPS, solver)
    label = torch.tensor([0, 7, 7, 3])
    noise = image_noise(range(40, 40 + 4), fashion.sample_shape, "cpu")
    single, runs = (
        recipe(fashion, table, increments, collapse).plan(np.random.default_rng(0)) for collapse in (False, True)
    )
    assert len(runs.runs) < STEPS / 3
    expected = integrate(levels, table, single, noise, {"label": label})
    closed_form = levels[1].closed_form(levels[1].affine(table.t), table, {"label": label}, len(label), path=True)
    end = integrate(levels, table, runs, noise, {"label": label}, closed_form)
    assert (end - expected).abs().max() < 3e-5
    assert expected.std() > 0.3


def test_a_single_step_between_two_runs_is_none_of_theirs(fashion, levels):
    """Where a level is called at steps in turn, its values are differences that level 1 has no part in."""
    table = solver_table(fashion.process, STEPS, "ode")
    label = torch.tensor([0, 7])
    noise = image_noise(range(40, 40 + 2), fashion.sample_shape, "cpu")
    fire = np.zeros((2, STEPS), dtype=bool)
    fire[0] = True
    fire[1, [20, 21, 22, 40]] = True
    single, runs = held(fire), replace(held(fire), collapse=True)
    assert {bool(run.base) for run in runs.runs[1:4]} == {True, False}
    closed_form = levels[1].closed_form(levels[1].affine(table.t), table, {"label": label}, len(label))
    end = integrate(levels, table, runs, noise, {"label": label}, closed_form)
    assert (end - integrate(levels, table, single, noise, {"label": label})).abs().max() < 3e-5


def test_a_thousand_steps_of_the_gaussian_level_are_one(fashion, levels):
    table = solver_table(fashion.process, 1000, "ode")
    label = torch.tensor([1, 9])
    noise = image_noise(range(40, 40 + 2), fashion.sample_shape, "cpu")
    expected = integrate(levels, table, single_level(1, 3, 1000), noise, {"label": label})
    closed_form = levels[1].closed_form(levels[1].affine(table.t), table, {"label": label}, len(label))
    plan = replace(single_level(1, 3, 1000), collapse=True)
    assert len(plan.runs) == 1
    end = integrate({}, table, plan, noise, {"label": label}, closed_form)
    assert (end - expected).abs().max() < 3e-5


def small(classes: int = 2, d: int = 4, rank: int = 2) -> tuple[AffineDrift, StepTable]:
    rng = np.random.default_rng(0)
    basis = np.stack([np.linalg.qr(rng.standard_normal((d, rank)))[0] for _ in range(classes)])
    table = solver_table(process_of_betas(np.linspace(0.01, 0.3, 20)), 10, "sde")
    drift = AffineDrift(
        torch.tensor(basis),
        rng.uniform(0.2, 1.2, (classes, 10, rank + 1)),
        rng.uniform(0.2, 1, 10),
        rng.uniform(-1, 1, 10),
    )
    return drift, table


def test_the_noise_of_a_run_has_the_mean_and_covariance_of_its_steps():
    """The run is affine in x and z: read off both matrices by unit vectors, for the SDE's one draw and its many."""
    drift, table = small()
    label, mean = torch.tensor([1, 0]), torch.randn(2, 4, dtype=torch.float64)
    unit = torch.eye(4, dtype=torch.float64)
    zero = torch.zeros(2, 4, dtype=torch.float64)
    run, start = [1.0, 0.5, 1.0, 2.0], 3

    def response(path: bool, step: int) -> torch.Tensor:
        """(2, 4, 4): how each sample's end depends on the noise of a step."""
        closed_form = ClosedForm(drift, table, label, mean, path)

        def end(noise: torch.Tensor) -> torch.Tensor:
            return closed_form.advance(start, Projected(zero), run, [], lambda i: noise if i == step else zero).value

        return torch.stack([end(u.expand(2, 4)) - end(zero) for u in unit], -1)

    single = sum(m @ m.mT for m in (response(True, start + i) for i in range(len(run))))
    at_once = response(False, start)
    assert (at_once @ at_once.mT - single).abs().max() < 1e-12
    assert single.diagonal(dim1=1, dim2=2).min() > 0.01
    # Means: both forms without noise, against the steps written out.
    forms = [ClosedForm(drift, table, label, mean, path) for path in (False, True)]
    ends = [form.advance(start, Projected(zero), run, [], lambda i: zero).value for form in forms]
    assert torch.equal(*ends)
    for sample, c in enumerate(label.tolist()):
        q, mu, x = drift.basis[c].numpy(), mean[sample].numpy(), np.zeros(4)
        for i, w in enumerate(run, start):
            inside, outside = drift.gain[c, i, :-1], drift.gain[c, i, -1]
            gain = q @ np.diag(inside - outside) @ q.T + outside * np.eye(4)
            drifted = gain @ (x - drift.centre[i] * mu) + drift.offset[i] * mu
            x = table.a[i] * x + table.b[i] * w * drifted
        np.testing.assert_allclose(ends[0][sample].numpy(), x, atol=1e-12)


def test_affine_drift_of_a_gaussian_level_is_its_forward_pass(levels, fashion):
    t = np.array([900, 300, 2])
    drift = levels[1].affine(t)
    x = torch.randn(3, *fashion.sample_shape, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([2, 2, 5])
    for i, time in enumerate(t):
        expected = levels[1](x, torch.full((3,), int(time)), {"label": label}).flatten(1)
        for row, c in enumerate(label.tolist()):
            centred = x[row].flatten() - float(drift.centre[i]) * levels[1].mean[c]
            inside, outside = (torch.tensor(drift.gain[c, i], dtype=torch.float32)[s] for s in (slice(-1), -1))
            found = outside * centred + drift.basis[c] @ ((inside - outside) * (drift.basis[c].T @ centred))
            assert (found - expected[row]).abs().max() < 1e-4


def test_response_and_flow_are_what_a_run_does():
    """A run is affine: what a held value adds, and what a change of x becomes, do not depend on the rest."""
    drift, table = small()
    label = torch.tensor([0, 1, 1])
    form = ClosedForm(drift, table, label, torch.randn(3, 4, dtype=torch.float64))
    rng = np.random.default_rng(3)
    x, change, value = (torch.tensor(rng.standard_normal((3, 4))) for _ in range(3))
    weights = rng.standard_normal(5)

    def run(x: torch.Tensor, start: int, stop: int, held: list) -> torch.Tensor:
        return form.advance(start, Projected(x), [1.0] * (stop - start), held, lambda _: torch.zeros_like(x)).value

    added = run(x, 2, 7, [(Projected(value), weights.tolist())]) - run(x, 2, 7, [])
    torch.testing.assert_close(form.scaled(Projected(value), form.response(2, weights)), added)
    carried = run(x + change, 4, len(table), []) - run(x, 4, len(table), [])
    torch.testing.assert_close(form.scaled(Projected(change), form.flow(4)), carried)
    torch.testing.assert_close(form.scaled(Projected(change), form.flow(len(table))), change)


@pytest.mark.parametrize("classes", [[0], [0, 1], [1, 0, 1], [1, 1], [2, 0, 0, 1, 2, 2]])
def test_a_state_that_is_carried_from_run_to_run_is_its_own_projection(monkeypatch, classes):
    """A run knows the projection of its end without a look at it, as the next run takes it for granted."""
    drift, table = small(3)
    label, mean = torch.tensor(classes), torch.randn(len(classes), 4, dtype=torch.float64)
    form = ClosedForm(drift, table, label, mean)
    rng = np.random.default_rng(5)
    x, value, noise = (torch.tensor(rng.standard_normal((len(label), 4))) for _ in range(3))
    base, weights = [1.0, 0.7, 1.3], [0.5, 1.0, -1.0]
    end = form.advance(1, Projected(x), base, [(Projected(value), weights)], lambda _: noise)
    assert end.thin is not None
    for sample, c in enumerate(label.tolist()):
        torch.testing.assert_close(end.thin[sample], drift.basis[c].T @ end.value[sample])
    # Each sample as in a block of its own; and again, from what is kept.
    for i, c in enumerate(classes):
        alone = ClosedForm(drift, table, torch.tensor([c]), mean[i : i + 1])
        for _ in range(2):
            held = [(Projected(value[i : i + 1]), weights)]
            found = alone.advance(1, Projected(x[i : i + 1]), base, held, lambda _, i=i: noise[i : i + 1])
            torch.testing.assert_close(found.value[0], end.value[i])
    # The same where there is room for the basis of one class only.
    monkeypatch.setattr("mlem_dist.solver.closed_form.BASIS_BYTES", drift.basis[0].nbytes)
    narrow = ClosedForm(drift, table, label, mean)
    assert (narrow.basis is None) == (len({*classes}) == 2)
    found = narrow.advance(1, Projected(x), base, [(Projected(value), weights)], lambda _: noise)
    torch.testing.assert_close(found.value, end.value)
