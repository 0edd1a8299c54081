import itertools

import numpy as np
import pytest
import torch
from learn import (
    Logistic,
    cost_gradient,
    end_and_slope,
    error_gradient,
    fit_logistic,
    learn,
    try_coins,
    with_budget,
)
from processes import process_of_betas

from mlem_dist.solver.integrate import integrate
from mlem_dist.solver.noise import image_noise
from mlem_dist.solver.plan import impulse
from mlem_dist.solver.steps import solver_table

STEPS = 3
COST = np.array([0.1, 1.0, 4.0])
TAU = np.array([-1.2, 0.1, 1.1])
TABLE = solver_table(process_of_betas(np.linspace(0.05, 0.4, 12)), STEPS, "sde")
LABEL = torch.zeros(5, dtype=torch.int64)
NOISE = image_noise(range(5), (1, 2, 2), "cpu")
LEVELS = {k: (lambda x, t, *_, k=k: torch.tanh(x * (0.5 + 0.3 * k)) + 0.1 * k) for k in (1, 2, 3)}
TARGET = torch.full((5, 1, 2, 2), 0.3)
LOGISTIC = Logistic(np.array([[0.7, -0.4], [-0.3, -1.0]]), TAU)


def all_coins():
    for coins in itertools.product([False, True], repeat=2 * STEPS):
        yield np.concatenate([np.ones((1, STEPS), dtype=bool), np.array(coins).reshape(2, STEPS)])


def chance(fire, logistic):
    p = logistic.probabilities
    return float(np.where(fire, p, 1 - p).prod())


def expected_error(logistic):
    """By integrating every plan: nothing of the code under test but the probabilities."""
    p = logistic.probabilities
    total = 0.0
    for fire in all_coins():
        end = integrate(LEVELS, TABLE, impulse(fire, p), NOISE, LABEL)
        total += chance(fire, logistic) * float((end - TARGET).double().square().mean())
    return total


def differences(function, logistic, h):
    out = np.zeros((2, 2))
    for index in np.ndindex(2, 2):
        unit = np.zeros((2, 2))
        unit[index] = h
        out[index] = (function(logistic.moved(unit)) - function(logistic.moved(-unit))) / (2 * h)
    return out


def test_score_and_slope_make_the_derivative_of_the_expected_error():
    """Both parts, summed over all plans with their probabilities, against differences of the exact expectation."""
    found = np.zeros((2, 2))
    for fire in all_coins():
        for index in np.ndindex(2, 2):
            unit = np.zeros((2, 2))
            unit[index] = 1
            draw = try_coins(LEVELS, TABLE, LOGISTIC, fire, unit, NOISE, LABEL, TARGET)
            found[index] += chance(fire, LOGISTIC) * (draw.error * draw.score[index] + draw.slope)
    expected = differences(expected_error, LOGISTIC, 1e-2)
    assert np.abs(expected).min() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=5e-3, atol=2e-4)


def test_the_estimate_is_unbiased():
    rng = np.random.default_rng(0)
    estimates = []
    for _ in range(300):
        directions = [rng.standard_normal((2, 2)) for _ in range(3)]
        draws = [
            try_coins(LEVELS, TABLE, LOGISTIC, rng.random((3, STEPS)) < LOGISTIC.probabilities, u, NOISE, LABEL, TARGET)
            for u in directions
        ]
        estimates.append(error_gradient(draws, directions))
    error = np.std(estimates, axis=0) / np.sqrt(len(estimates))
    expected = differences(expected_error, LOGISTIC, 1e-2)
    assert (np.abs(np.mean(estimates, axis=0) - expected) < 4 * error + 2e-4).all()
    assert error.max() < 0.5 * np.abs(expected).max()


def test_the_slope_is_that_of_the_trajectory():
    rng = np.random.default_rng(1)
    weight, slope = rng.uniform(0.5, 2, (3, STEPS)), rng.standard_normal((3, STEPS))
    weight[1, 1] = slope[1, 1] = 0
    levels = {k: (lambda x, t, *_, k=k: LEVELS[k](x.double(), t)) for k in LEVELS}

    def noise(step):
        return NOISE(step).double()

    _, change = end_and_slope(levels, TABLE, weight, slope, noise, LABEL)
    h = 1e-5
    ends = [end_and_slope(levels, TABLE, weight + s * h * slope, slope, noise, LABEL)[0] for s in (1, -1)]
    assert ((ends[0] - ends[1]) / (2 * h) - change).abs().max() < 1e-8
    assert change.abs().max() > 0.1


def test_a_real_ladder_can_be_differentiated(fashion):
    levels = {k: fashion.load_level(k, "cpu") for k in (1, 2, 3)}
    table = solver_table(fashion.process, 6, "sde")
    noise = image_noise(range(2), fashion.sample_shape, "cpu")
    condition = {"label": torch.tensor([0, 8])}
    weight = np.array([[1.0] * 6, [0, 2, 0, 2, 2, 0], [0, 0, 0, 3, 0, 0]])
    slope = np.array([[0.0] * 6, [0, 1, 0, -1, 0.5, 0], [0, 0, 0, 1, 0, 0]])
    _, change = end_and_slope(levels, table, weight, slope, noise, condition)
    h = 1e-2
    ends = [end_and_slope(levels, table, weight + s * h * slope, slope, noise, condition)[0] for s in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * h)
    assert (expected - change).norm() < 0.02 * change.norm()


def test_learning_lowers_error_and_cost_together():
    """From probabilities that spend most on a level that adds nothing."""
    useless = LEVELS | {3: LEVELS[2]}
    start = Logistic(np.array([[0.0, 0.0], [-1.5, 1.0]]), TAU)
    noise = image_noise(range(16), (1, 2, 2), "cpu")
    target = integrate(useless, TABLE, impulse(np.ones((3, STEPS), dtype=bool), np.ones((3, STEPS))), noise, {})
    steps = list(itertools.islice(learn(useless, TABLE, start, COST, noise, {}, target, seed=0), 100))
    first, last = steps[0].logistic.probabilities, steps[-1].logistic.probabilities
    assert (last[2] < 0.5 * first[2]).all()
    assert steps[-1].cost < steps[0].cost
    assert np.mean([step.error for step in steps[-20:]]) < np.mean([step.error for step in steps[:5]])


def test_the_costs_derivative():
    def cost(logistic):
        p = logistic.probabilities
        return float((p[1:] * (COST[1:] + COST[:-1])[:, None]).sum())

    np.testing.assert_allclose(cost_gradient(LOGISTIC, COST), differences(cost, LOGISTIC, 1e-5), rtol=1e-6)


def test_probabilities_are_fitted_and_brought_to_a_budget():
    fitted = fit_logistic(LOGISTIC.probabilities, TAU)
    np.testing.assert_allclose(fitted.coefficients, LOGISTIC.coefficients, atol=1e-9)
    moved = with_budget(fitted, lambda p: float(p.sum()), 5.0)
    assert moved.probabilities.sum() == pytest.approx(5.0)
    np.testing.assert_allclose(np.ptp(moved.coefficients - fitted.coefficients, axis=1), 0, atol=1e-9)
