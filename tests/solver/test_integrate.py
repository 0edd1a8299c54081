import itertools

import numpy as np
import torch
from diffusers import DDPMScheduler
from processes import process_of_betas

from mlem_dist.solver.integrate import integrate
from mlem_dist.solver.noise import coarse_noise, image_noise
from mlem_dist.solver.plan import Recipe, block_rng, single_level
from mlem_dist.solver.steps import StepTable, solver_table


def test_independent_impulses_have_the_exact_mean_over_trajectories():
    """For a linear drift the mean of x_N is a product; x_N over plans must scatter around it."""
    slopes = {1: 0.4, 2: 0.8, 3: 1.0}
    levels = {k: (lambda x, t, condition, known, slope=slope: slope * x) for k, slope in slopes.items()}
    n = 8
    table = StepTable(np.arange(n)[::-1], np.full(n, 0.95), np.full(n, -0.2), np.zeros(n))
    recipe = Recipe(np.repeat([[1.0], [0.5], [0.3]], n, axis=1), "independent", "impulse")
    condition = {}
    rng = np.random.default_rng(0)
    ends = np.array(
        [
            float(integrate(levels, table, recipe.plan(rng), lambda step: torch.ones(1, 1, 1, 1), condition))
            for _ in range(6000)
        ]
    )
    exact = (0.95 - 0.2 * slopes[3]) ** n
    error = ends.std() / np.sqrt(len(ends))
    assert abs(ends.mean() - exact) < 3.5 * error
    # The error bar is narrow enough to tell the best level from the one below.
    assert abs((0.95 - 0.2 * slopes[2]) ** n - exact) > 10 * error


def test_the_best_level_alone_is_the_diffusers_loop(fashion):
    """The whole loop of diffusers' scheduler with a real level and the same noise."""
    number = len(fashion.levels)
    level = fashion.load_level(number, "cpu")
    scheduler = DDPMScheduler.from_pretrained(fashion.folder / "scheduler", timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    noise = image_noise(range(10, 10 + 4), fashion.sample_shape, "cpu")
    condition = {"label": torch.tensor([0, 3, 7, 9])}
    x = noise(-1)
    table = solver_table(fashion.process, 20, "sde")
    with torch.inference_mode():
        for i, t in enumerate(scheduler.timesteps):
            predicted = level(x, torch.full((4,), int(t)), condition)
            # The scheduler draws its own noise: take its mean and add ours.
            mean = scheduler.step(predicted, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
            theirs = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
            x = mean - float(table.c[i]) * theirs + float(table.c[i]) * noise(i)
    ours = integrate({number: level}, table, single_level(number, number, 20), noise, condition)
    assert (ours - x).abs().max() < 1e-3
    assert x.abs().max() > 0.5


def test_coins_depend_on_seed_and_block_alone():
    coins = {key: block_rng(*key).random(4).tolist() for key in itertools.product(range(3), range(3))}
    assert coins[1, 2] == block_rng(1, 2).random(4).tolist()
    assert all(a != b for a, b in itertools.combinations(coins.values(), 2))


def test_the_noise_of_a_coarse_step_is_what_its_fine_steps_carry_to_its_end():
    fine = solver_table(process_of_betas(np.linspace(1e-4, 0.2, 40)), 12, "sde")
    x, steps = torch.zeros(12, 1), range(4, 8)
    # The end of the fine steps 4 to 7 from 0, without a drift, by the noise of each; a row for each.
    for i in steps:
        x = float(fine.a[i]) * x + float(fine.c[i]) * torch.eye(12)[:, i : i + 1]
    found = coarse_noise(lambda i: torch.eye(12)[:, i : i + 1], fine, 4)(1)
    torch.testing.assert_close(found, x / x.norm())
