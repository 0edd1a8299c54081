import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from mlem_dist.errors import UsageError
from mlem_dist.solver.integrate import integrate
from mlem_dist.solver.plan import single_level
from mlem_dist.solver.schedule import alpha_bar
from mlem_dist.solver.steps import step_table, two_step_table

SCHEDULES = [
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
]


@pytest.mark.parametrize("config", SCHEDULES)
def test_alpha_bar_is_that_of_diffusers(config):
    ours = alpha_bar(config | {"num_train_timesteps": 1000})
    theirs = DDPMScheduler(num_train_timesteps=1000, **config).alphas_cumprod.double().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=2e-4)


def schedulers():
    """(eta, steps, diffusers scheduler), where diffusers' own grid is consistent with its update."""
    for config in SCHEDULES[:2]:
        for steps in (1000, 250, 50, 10, 7):
            yield config, 1.0, steps, DDPMScheduler
        # DDIM's update assumes that steps are T // N apart, which holds for these.
        for eta in (0.0, 0.5, 1.0):
            for steps in (1000, 250, 50, 10):
                yield config, eta, steps, DDIMScheduler


@pytest.mark.parametrize(("config", "eta", "steps", "kind"), list(schedulers()))
def test_table_reproduces_diffusers(config, eta, steps, kind):
    scheduler = kind(num_train_timesteps=1000, clip_sample=False, timestep_spacing="trailing", **config)
    # The same schedule on both sides: diffusers keeps it in float32.
    scheduler.alphas_cumprod = torch.tensor(alpha_bar(config | {"num_train_timesteps": 1000}))
    scheduler.set_timesteps(steps)
    table = step_table(scheduler.alphas_cumprod.numpy(), steps, eta)
    assert table.t.tolist() == scheduler.timesteps.tolist()

    rng = torch.Generator().manual_seed(0)
    x = start = torch.randn(1, 1, 4, 4, generator=rng, dtype=torch.float64)

    def drift(x: torch.Tensor, t: int) -> torch.Tensor:
        return torch.tanh(x) * (0.3 + t / 1000)

    # Over the whole loop with the same noise, and step by step from diffusers' own state.
    ours = start
    for i, t in enumerate(scheduler.timesteps):
        seed = 1000 + i
        if kind is DDPMScheduler:
            options = {"generator": torch.Generator().manual_seed(seed)}
            z = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
        else:
            z = torch.randn(x.shape, generator=rng, dtype=x.dtype)
            options = {"eta": eta, "variance_noise": z}
        theirs = scheduler.step(drift(x, int(t)), t, x, **options).prev_sample
        one = table.a[i] * x + table.b[i] * drift(x, int(t)) + table.c[i] * z
        # DDPM's variance is floored at 1e-20, so that its last step adds 1e-10 z or nothing.
        assert (one - theirs).abs().max() < 1e-5
        ours = table.a[i] * ours + table.b[i] * drift(ours, int(t)) + table.c[i] * z
        x = theirs
    assert (ours - x).abs().max() < 1e-5 * max(1.0, float(x.abs().max()))


@pytest.mark.parametrize("config", SCHEDULES[:2])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20, 50])
def test_the_two_step_table_is_dpm_solver(config, steps):
    scheduler = DPMSolverMultistepScheduler(num_train_timesteps=1000, timestep_spacing="trailing", **config)
    scheduler.alphas_cumprod = torch.tensor(alpha_bar(config | {"num_train_timesteps": 1000}))
    scheduler.set_timesteps(steps)
    table = two_step_table(scheduler.alphas_cumprod.numpy(), steps)
    assert table.t.tolist() == scheduler.timesteps.tolist()
    start = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def drift(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * (0.3 + t.view(-1, 1, 1, 1) / 1000)

    label = torch.zeros(3, dtype=torch.int64)
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(drift(x, t.expand(3), label), t, x).prev_sample
    ours = integrate({1: drift}, table, single_level(1, 1, steps), lambda step: start, label)
    assert (ours - x).abs().max() < 1e-4 * x.abs().max()


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(UsageError, match=str(steps)):
        step_table(alpha_bar(SCHEDULES[0]), steps, 1.0)
