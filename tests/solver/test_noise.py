"""The noise of an image: a function of its seed and of the step."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from mlem_dist.dataset.prompts import SEEDS
from mlem_dist.solver.noise import image_noise

seeds = st.lists(st.integers(0, SEEDS - 1), min_size=1, max_size=5)


@given(seeds, st.sampled_from([(1, 32, 32), (4, 8, 8), (3, 2, 2)]))
@settings(deadline=None)
def test_the_initial_noise_is_that_of_pipelines_of_diffusers(given, shape):
    generators = [torch.Generator().manual_seed(seed) for seed in given]
    expected = randn_tensor((len(given), *shape), generator=generators)
    noise = image_noise(given, shape, "cpu")
    assert torch.equal(noise(-1), expected)
    assert noise(-1).dtype == torch.float32


@given(seeds, st.integers(0, 10**6), st.randoms())
@settings(deadline=None)
def test_a_step_is_read_at_any_time_and_in_any_company(given, step, random):
    """Before or after other steps, alone or beside other images, in any order."""
    shape = (3, 5)
    together = image_noise(given, shape, "cpu")
    first = together(step)
    together(step + 1)
    assert torch.equal(together(step), first)
    place = random.randrange(len(given))
    alone = image_noise(given[place : place + 1], shape, "cpu")
    assert torch.equal(alone(step)[0], first[place])
    assert torch.equal(alone(-1)[0], together(-1)[place])
    # What a fresh generator with this key draws.
    key = np.array([given[place], step], dtype=np.uint64)
    fresh = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
    assert np.array_equal(first[place].numpy(), fresh)


def test_no_two_noises_are_equal():
    """Where 32-bit hashes of seed and step would collide: 100,000 pairs, of close and of far seeds."""
    numbers = [*range(25_000), *range(0, SEEDS, SEEDS // 25_000)][:50_000]
    noise = image_noise(numbers, (4,), "cpu")
    rows = itertools.chain(noise(-1).numpy(), noise(0).numpy(), noise(249).numpy())
    hashes = [hashlib.sha256(row.tobytes()).digest() for row in rows]
    # The first seed stands in both ranges.
    assert len(set(hashes)) == len(hashes) - 3


@pytest.mark.parametrize("step", [-1, 0, 7])
def test_noise_is_standard_normal_and_independent_between_images(step):
    """To four standard deviations, over neighbouring seeds."""
    drawn = image_noise(range(20_000), (4,), "cpu")(step).numpy()
    most = 4 / np.sqrt(len(drawn))
    assert np.abs(drawn.mean(0)).max() < most
    assert np.abs(drawn.var(0) - 1).max() < np.sqrt(2) * most
    assert np.abs(np.corrcoef(np.hstack([drawn[1:], drawn[:-1]]).T) - np.eye(8)).max() < most
