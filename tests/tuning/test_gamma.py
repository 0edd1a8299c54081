import numpy as np
import pytest

from mlem_dist.tuning.gamma import read_error, read_increments

SECONDS = 1e-3 * 4.0 ** np.arange(5)
NAMES = tuple("abcde")


def noisy(values: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Positive samples of mean `values` (K,), alike in all levels as those of one image are."""
    common = rng.gamma(4, 1 / 4, size=shape)
    own = rng.gamma(400, 1 / 400, size=(len(values), *shape))
    return values.reshape(-1, *[1] * len(shape)) * common * own


@pytest.mark.parametrize("gamma", [1.5, 2.5, 4.0])
@pytest.mark.parametrize("floor", [0.0, 0.15])
def test_gamma_above_a_floor_is_recovered(gamma, floor):
    rms = floor + 0.3 * (SECONDS / SECONDS[0]) ** (-1 / gamma)
    exact = read_error(NAMES, SECONDS, np.ones((1, 10, 8)) * rms[:, None, None] ** 2, np.random.default_rng(0))
    assert exact.gamma == pytest.approx(gamma, rel=0.02)
    assert exact.floor == pytest.approx(floor, abs=0.003)
    rng = np.random.default_rng(1)
    reading = read_error(NAMES, SECONDS, noisy(rms**2, (10, 500), rng), rng)
    assert reading.gamma_interval[0] < gamma < reading.gamma_interval[1]
    assert reading.floor_interval[0] - 1e-9 <= floor <= reading.floor_interval[1]


@pytest.mark.parametrize(("gamma", "htmc"), [(1.5, "no"), (2.5, "yes")])
def test_gamma_of_increments_is_recovered(gamma, htmc):
    increments = 0.2**2 * SECONDS ** (-2 / gamma)
    rng = np.random.default_rng(0)
    reading = read_increments(NAMES, SECONDS, noisy(increments, (32,), rng), rng)
    assert reading.gamma == pytest.approx(gamma, rel=0.05)
    assert reading.gamma_interval[0] < gamma < reading.gamma_interval[1]
    assert reading.gamma_range[0] < reading.gamma_range[1]
    assert reading.htmc == htmc


def test_the_interval_holds_what_it_promises():
    """95 % of repeated measurements have the truth in their interval, give or take the chance of 100 of them."""
    truth = SECONDS ** (-2 / 2.5)
    inside = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        low, high = read_increments(NAMES, SECONDS, truth[:, None] * rng.gamma(4, 1 / 4, (5, 64)), rng).gamma_interval
        inside += low < 2.5 < high
    assert 86 <= inside <= 99


def test_the_regime_is_undecided_where_the_evidence_is():
    rng = np.random.default_rng(0)
    around = read_increments(NAMES, SECONDS, SECONDS[:, None] ** (-2 / 2.02) * rng.gamma(2, 1 / 2, (5, 16)), rng)
    assert around.gamma_interval[0] < 2 < around.gamma_interval[1]
    assert around.htmc == "undecided"
    # Two levels lie on a line whatever the law.
    two = read_increments(("a", "b"), SECONDS[:2], SECONDS[:2, None] ** (-2 / 3) * np.ones((2, 16)), rng)
    assert two.gamma == pytest.approx(3)
    assert two.htmc == "undecided"
    # One level off the line can decide the slope.
    bent = SECONDS ** (-2 / 2.2) * np.array([1, 1, 1, 1, 0.3])
    assert read_increments(NAMES, SECONDS, bent[:, None] * np.ones((5, 16)), rng).htmc == "undecided"


def test_levels_that_do_not_improve_have_no_finite_gamma():
    rising = read_increments(NAMES, SECONDS, SECONDS[:, None] ** 0.1 * np.ones((5, 16)), np.random.default_rng(0))
    assert rising.gamma == np.inf
    assert rising.htmc == "undecided"
