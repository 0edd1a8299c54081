import numpy as np
import pytest
import torch

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.tuning.comparison import BLOCK, PlanComparison
from mlem_dist.tuning.least_squares import Fit, Fitter, Times
from mlem_dist.tuning.refinement import derivatives, fitted_plan, refine, with_factors

STEPS = 40


def fitter_of(ladder: Ladder, seed: int, blocks: int) -> Fitter:
    return Fitter(PlanComparison(ladder, "ode", "cpu", STEPS, blocks * BLOCK["cpu"], seed, threads=2))


@pytest.fixture(scope="module")
def fitter(lowest):
    return fitter_of(lowest, 0, 1)


def factors_of(fit: Fit) -> np.ndarray:
    return np.concatenate([segment.factors for segment in fit.segments])


def test_derivatives_are_those_of_the_plans_end(fitter):
    """Against differences of the ends that the integrator comes to."""
    fit = fitter.fit((1, 3), Times(0, 2, 1).fire(fitter.log_snr))
    factors = factors_of(fit)

    def end(moved: np.ndarray) -> torch.Tensor:
        return fitter.comparison.end(with_factors(fit, moved, 0.0).plan(), 0).double()

    width = 1e-2
    jacobian = torch.stack(
        [
            (end(factors + width * one) - end(factors - width * one)).flatten() / (2 * width)
            for one in np.eye(len(factors))
        ]
    ).numpy()
    off = (end(factors) - fitter.path[-1]).flatten().numpy()
    distances = np.sqrt(np.square(off.reshape(BLOCK["cpu"], -1)).mean(1))
    weight = np.repeat(1 / distances, off.size // len(distances))
    found = [derivatives(fitter, fit, factors, seed, 0) for seed in range(40)]
    assert found[0][0] == pytest.approx(distances.mean(), rel=1e-3)
    gradient, squares = jacobian @ (weight * off) / off.size, (jacobian * weight) @ jacobian.T / off.size
    scale = np.sqrt(np.diag(squares))
    np.testing.assert_allclose(found[0][1] / scale, gradient / scale, atol=2e-2 * np.abs(gradient / scale).max())
    mean = np.mean([one[2] for one in found], 0)
    assert np.linalg.norm((mean - squares) / np.outer(scale, scale)) < 0.1 * len(factors)


def test_a_refined_plan_is_better_on_noises_that_it_has_not_seen(lowest):
    fitter, judging = (
        fitter_of(lowest, 0, 6),
        PlanComparison(lowest, "ode", "cpu", STEPS, 6 * BLOCK["cpu"], 1, threads=2),
    )
    fit = fitter.fit((1, 2, 3), Times(2, 4, 2).fire(fitter.log_snr))
    told = []
    refined = refine(fitter, fit, lambda done, total: told.append((done, total)))
    assert refined.distance < 0.975 * fit.distance
    assert refined.distance == pytest.approx(np.sqrt(fitter.comparison.errors([refined.plan()])).mean(), rel=1e-2)
    before, after = np.sqrt(judging.errors([fit.plan(), refined.plan()])).mean(1)
    assert after < 0.985 * before
    assert (refined.plan().fire == fit.plan().fire).all()
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1]


def test_steps_that_make_it_worse_are_not_kept(fitter, monkeypatch):
    def uphill(*arguments):
        error, gradient, squares = derivatives(*arguments)
        return error, -gradient, squares

    fit = fitter.fit((1, 3), Times(0, 2, 1).fire(fitter.log_snr))
    assert (factors_of(refine(fitter, fit)) != factors_of(fit)).any()
    monkeypatch.setattr("mlem_dist.tuning.refinement.derivatives", uphill)
    refined = refine(fitter, fit)
    np.testing.assert_array_equal(factors_of(refined), factors_of(fit))
    assert refined.distance == pytest.approx(fit.distance, rel=1e-3)


def test_small_budgets_are_refined(lowest, fitter):
    told = []
    few, many = (
        fitted_plan(fitter, nfe, lambda *_: None, lambda *done, nfe=nfe: told.append((nfe, *done))) for nfe in (4, 12)
    )
    assert {nfe for nfe, *_ in told} == {4}
    cost = lowest.cost("cpu")
    assert few.nfe(cost) <= 4 < many.nfe(cost) <= 12
    assert np.sqrt(fitter.comparison.errors([few])).mean() < fitter.search(4).distance
