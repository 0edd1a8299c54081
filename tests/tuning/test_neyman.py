import numpy as np
import pytest

from mlem_dist.solver.costs import as_costs
from mlem_dist.solver.probabilities import expected_cost, scale_to_budget
from mlem_dist.tuning.neyman import coin_error, merged, neyman, neyman_weights, on_grid, rung_sets

COST = np.array([0.01, 1.0, 4.0, 16.0])
EFFECT = np.random.default_rng(0).gamma(2, 1, (4, 30)) * np.array([9.0, 1.0, 0.2, 0.05])[:, None]


def test_the_coins_add_the_error_asked_for():
    for error in (1.0, 30.0, 1000.0):
        p = neyman(EFFECT, COST, error)
        assert coin_error(p, EFFECT) == pytest.approx(error, rel=1e-6)
        assert (p[0] == 1).all()
        assert (p <= 1).all()


def test_no_other_probabilities_are_cheaper_at_the_same_error():
    """Any small change that keeps the error to first order and p at most 1 leaves the cost or raises it."""
    error = 1000.0
    p = neyman(EFFECT, COST, error)
    assert p[1:].max() < 0.3
    rng = np.random.default_rng(1)
    for _ in range(50):
        changed = p.copy()
        changed[1:] *= np.exp(0.3 * rng.standard_normal(p[1:].shape))
        # Rescaled to the same error: sum W / p is inversely proportional to the scale.
        w = EFFECT[1:]
        changed[1:] *= (w / changed[1:]).sum() / (w / p[1:]).sum()
        assert changed.max() <= 1
        assert coin_error(changed, EFFECT) == pytest.approx(error)
        assert expected_cost(changed, COST) > expected_cost(p, COST)


def test_cost_below_one_is_the_closed_form():
    """(sum sqrt(W tau))^2 / (error + sum W), where no probability reaches 1."""
    tau = as_costs(COST).increments[1:, None]
    p = neyman(EFFECT, COST, 300.0)
    expected = np.sqrt(EFFECT[1:] * tau).sum() ** 2 / (300.0 + EFFECT[1:].sum())
    assert expected_cost(p, COST) == pytest.approx(expected + 30 * COST[0])


def test_weights_on_another_grid_follow_the_rule():
    """Effects that change slowly, measured with noise on 100 steps, for 250 steps."""
    at, t = np.linspace(999, 0, 100).astype(int), np.linspace(999, 3, 250).astype(int)
    scale = np.array([9.0, 1.0, 0.2, 0.05])[:, None]
    noise = np.random.default_rng(0).gamma(10, 0.1, (4, 100))
    effect = scale * np.exp(-at / 400) * noise
    products = on_grid(np.eye(4)[:, :, None] * effect, at, t)
    assert products.shape == (4, 4, 250)
    weights = neyman_weights(np.einsum("kki->ki", products), COST)
    exact = np.sqrt(scale * np.exp(-t / 400) / as_costs(COST).increments[:, None])
    np.testing.assert_allclose(weights, exact, rtol=0.3)
    np.testing.assert_allclose(weights.mean(1), exact.mean(1), rtol=0.03)


def test_merged_effects_are_those_of_the_summed_increments():
    change = np.random.default_rng(2).standard_normal((4, 30, 8))
    products = np.einsum("kib,lib->kli", change, change) / 8
    summed = np.stack([change[0], change[1] + change[2] + change[3]])
    np.testing.assert_allclose(merged(products, (1, 4)), (summed**2).mean(2))
    np.testing.assert_allclose(merged(products, (1, 2, 3, 4)), (change**2).mean(2))
    assert [*rung_sets(4)] == [(1, 4), (1, 2, 4), (1, 3, 4), (1, 2, 3, 4)]
    assert [*rung_sets(1)] == [*rung_sets(1, held=True)] == [(1,)]
    assert [*rung_sets(3, held=True)] == [(3,), (1, 3), (2, 3), (1, 2, 3)]


def test_increments_without_effect_are_never_drawn():
    effect = EFFECT.copy()
    effect[2] = 0
    assert not neyman(effect, COST, 10.0)[2].any()
    assert neyman(effect[:1], COST[:1], 10.0).tolist() == np.ones((1, 30)).tolist()


def test_where_no_increment_is_worth_anything_the_base_level_goes_alone():
    p = scale_to_budget(np.zeros((2, 10)), np.array([1.0, 5.0]), 4)
    np.testing.assert_array_equal(p, [[1.0] * 10, [0.0] * 10])
