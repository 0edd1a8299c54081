"""Processes and step tables against the schedulers of diffusers, over whole loops."""

import itertools
import json

import diffusers
import numpy as np
import pytest
import torch

from mlem_dist.errors import UsageError
from mlem_dist.solver.conversion import PREDICTIONS, combination, convert
from mlem_dist.solver.integrate import integrate
from mlem_dist.solver.plan import single_level
from mlem_dist.solver.process import process_of
from mlem_dist.solver.steps import solver_table

STEPS = (1, 2, 5, 20, 50)
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
TRAINED = {"trained_betas": np.linspace(1e-4, 0.03, 1000).tolist()}
V = {"prediction_type": "v_prediction"}
X0 = {"prediction_type": "sample"}
ZERO = {"rescale_betas_zero_snr": True}
TRAILING = {"timestep_spacing": "trailing"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def network(x, t):
    """A prediction that depends on everything, in the precision of x."""
    time = torch.as_tensor(t, dtype=x.dtype)
    return torch.tanh(0.7 * x + 0.1) * (0.5 + 0.3 * torch.sin(time / 300 + x.mean()))


class Drift:
    """The network as a level of a process: its output converted to the drift."""

    def __init__(self, process):
        self.process = process

    def __call__(self, x, t, condition, known):
        alpha, sigma = (value.double().view(-1, 1, 1, 1) for value in self.process.marginal(t.double()))
        scaled = x * self.process.input_scale(sigma)
        out = torch.stack([network(part, time) for part, time in zip(scaled, t, strict=True)])
        given = combination(self.process.prediction, alpha, sigma, self.process.sigma_data)
        r, s = convert(given, combination(self.process.drift, alpha, sigma), alpha, sigma)
        return r * x + s * out


def ours(process, steps, solver, start, spacing="trailing", noise=None):
    table = solver_table(process, steps, solver, spacing)
    plan = single_level(1, 1, steps)
    return integrate({1: Drift(process)}, table, plan, lambda i: start if i < 0 else noise(i), {})


def theirs(scheduler, steps, start, seeds=False, mu=None, grid=None):
    """diffusers' loop, as its pipelines write it, in float64; on its own grid by default."""
    scheduler.set_timesteps(steps, **({} if mu is None else {"mu": mu}))
    if grid:
        scheduler.timesteps, scheduler.sigmas = torch.from_numpy(grid.t), torch.from_numpy(grid.sigma)
    x = start.clone()
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        out = torch.stack([network(part, t) for part in scaled])
        more = {"generator": torch.Generator().manual_seed(i)} if seeds else {}
        x = scheduler.step(out, t, x, return_dict=False, **more)[0]
    return x


@pytest.fixture
def start():
    return torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def exact(scheduler, config):
    """The scheduler with the betas' products in float64, as ours are; it computes them in float32."""
    scheduler.alphas_cumprod = torch.tensor(process_of(config).alpha_bar)
    return scheduler


def saved(kind, tmp_path, **config):
    """A scheduler of diffusers and the configuration that it saves."""
    scheduler = getattr(diffusers, kind)(**config)
    scheduler.save_config(tmp_path)
    return scheduler, json.loads((tmp_path / "scheduler_config.json").read_text())


def assert_same(a, b, within=1e-5):
    assert (a - b).abs().max() < within * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    "config", [{}, SCALED, TRAINED, COSINE, V, X0, SCALED | V | ZERO, SCALED | X0 | ZERO, COSINE | V], ids=str
)
@pytest.mark.parametrize("spacing", ["trailing", "model"])
def test_the_ode_is_ddim(tmp_path, start, config, steps, spacing):
    config = config | (TRAILING if spacing == "trailing" else LEADING) | {"clip_sample": False}
    scheduler, config = saved("DDIMScheduler", tmp_path, **config)
    loop = theirs(exact(scheduler, config), steps, start)
    assert_same(ours(process_of(config), steps, "ode", start, spacing), loop)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("config", [{}, COSINE, SCALED | V, SCALED | V | ZERO], ids=str)
def test_the_sde_is_ddpm(tmp_path, start, config, steps):
    def noise(i):
        return torch.randn(start.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)

    scheduler, config = saved("DDPMScheduler", tmp_path, **config, **TRAILING, clip_sample=False)
    loop = theirs(exact(scheduler, config), steps, start, seeds=True)
    assert_same(ours(process_of(config), steps, "sde", start, noise=noise), loop)


@pytest.mark.filterwarnings("ignore:__array")
@pytest.mark.parametrize("steps", [*STEPS, 7])
@pytest.mark.parametrize("config", [{}, SCALED | V, X0, {"use_karras_sigmas": True}, COSINE | LEADING], ids=str)
def test_a_spacing_of_the_model_is_that_of_euler(tmp_path, start, config, steps):
    """In diffusers' Euler x is divided by alpha, and begins at the greatest sigma / alpha."""
    scheduler, config = saved("EulerDiscreteScheduler", tmp_path, **config)
    process = process_of(config)
    grid = process.grid(steps, "model")
    scheduler.alphas_cumprod = torch.tensor(process.alpha_bar)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(grid.t, scheduler.timesteps, rtol=1e-4, atol=2e-3)
    np.testing.assert_allclose(grid.sigma[:-1] / grid.alpha[:-1], scheduler.sigmas[:-1], rtol=2e-5)
    loop = theirs(scheduler, steps, start / grid.alpha[0])
    # It keeps its noise levels in float32.
    assert_same(ours(process, steps, "ode", start, "model"), loop, 3e-5)


@pytest.mark.filterwarnings("ignore:__array")
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    "config", [TRAILING, SCALED | V | TRAILING, SCALED, LEADING, {"use_flow_sigmas": True, "flow_shift": 3.0}], ids=str
)
def test_dpm_is_that_of_diffusers(tmp_path, start, config, steps):
    config = config | (FLOW if "flow_shift" in config else {})
    scheduler, config = saved("DPMSolverMultistepScheduler", tmp_path, **config, euler_at_final=True)
    process = process_of(config)
    if hasattr(process, "alpha_bar"):
        exact(scheduler, config)
    spacing = "trailing" if config["timestep_spacing"] == "trailing" else "model"
    assert_same(ours(process, steps, "dpm++", start, spacing), theirs(scheduler, steps, start), 3e-5)


@pytest.mark.parametrize("steps", STEPS)
def test_dpm_from_pure_noise_is_that_of_diffusers(tmp_path, start, steps):
    """On the grid of a flow that begins at alpha = 0, unlike that of diffusers."""
    scheduler, config = saved("DPMSolverMultistepScheduler", tmp_path, **FLOW, flow_shift=3.0, euler_at_final=True)
    process = process_of(config)
    grid = process.grid(steps)
    assert grid.alpha[0] == 0
    assert_same(ours(process, steps, "dpm++", start), theirs(scheduler, steps, start, grid=grid))


@pytest.mark.parametrize("steps", [1, 2, 5, 28])
@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscreteScheduler"])
@pytest.mark.parametrize(
    "config", [{}, {"shift": 3.0}, {"shift": 3.0, "shift_terminal": 0.02}, {"use_dynamic_shifting": True}], ids=str
)
def test_flows_are_those_of_diffusers(tmp_path, start, kind, config, steps):
    """From pure noise, at alpha = 0."""
    scheduler, config = saved(kind, tmp_path, **config)
    process = process_of(config, tokens=1024)
    mu = 0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256) if config["use_dynamic_shifting"] else None
    if not (steps == 1 and config["shift_terminal"]):
        assert_same(ours(process, steps, "ode", start, "model"), theirs(scheduler, steps, start, mu=mu))
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    if not config["shift_terminal"]:
        np.testing.assert_allclose(process.grid(steps).t, scheduler.timesteps, rtol=1e-6)


@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize("config", [{}, V, {"sigma_schedule": "exponential", "sigma_data": 1.0}], ids=str)
def test_edm_is_that_of_diffusers(tmp_path, start, config, steps):
    """From the state of diffusers' beginning, sqrt(sigma_max^2 + 1) times the noise."""
    scheduler, config = saved("EDMEulerScheduler", tmp_path, **config)
    loop = theirs(scheduler, steps, start * scheduler.init_noise_sigma)
    assert_same(ours(process_of(config), steps, "ode", start), loop, 2e-5)


def test_variance_exploding_is_an_euler_loop(tmp_path, start):
    """dx / dsigma = -sigma score; the last step ends at 0."""
    scheduler, config = saved("ScoreSdeVeScheduler", tmp_path, num_train_timesteps=2000, sigma_max=50.0)
    process = process_of(config)
    for steps in STEPS[1:]:
        scheduler.set_sigmas(steps)
        sigma = process.grid(steps).sigma.tolist()
        np.testing.assert_allclose(sigma[:-1], scheduler.discrete_sigmas.flip(0), rtol=1e-5)
        x = start * sigma[0]
        for high, low in itertools.pairwise(sigma):
            given = float(np.float32(high))
            x = x + (low - high) * -given * torch.stack([network(part, given) for part in x])
        assert_same(ours(process, steps, "ode", start), x)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conversions_are_exact(prediction):
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 50))
    for alpha, sigma in ((0.3, 0.954), (1.0, 7.0), (0.6, 0.4)):
        x = alpha * x0 + sigma * noise
        p, q = combination(prediction, alpha, sigma)
        for wanted in PREDICTIONS:
            u, w = combination(wanted, alpha, sigma)
            r, s = convert((p, q), (u, w), alpha, sigma)
            np.testing.assert_allclose(r * x + s * (p * x0 + q * noise), u * x0 + w * noise, rtol=1e-9, atol=1e-9)


def test_a_prediction_of_noise_at_zero_terminal_snr_is_refused():
    with pytest.raises(UsageError, match="rescale_betas_zero_snr is true, and prediction_type is 'epsilon'"):
        process_of(SCALED | ZERO)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range_are_refused(steps):
    for config in ({}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}):
        with pytest.raises(UsageError, match=f"steps is {steps}, expected 1 to 1000"):
            process_of(config).grid(steps)


def test_a_process_serves_inference_and_derivatives():
    """In this order, and by the same tensors."""
    process = process_of(SCALED | {"prediction_type": "v_prediction"})
    t = torch.tensor([0.0, 500.0, 999.0])
    with torch.inference_mode():
        expected, _ = process.marginal(t)
    x = torch.ones(3, requires_grad=True)
    alpha, _ = process.marginal(t)
    (alpha * x).sum().backward()
    assert torch.equal(x.grad, expected.clone())
