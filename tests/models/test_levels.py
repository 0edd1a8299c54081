import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from processes import process_of_products
from safetensors.torch import load_file
from torch import nn

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.loader import WIDE
from mlem_dist.models.gaussian import FIT_ROWS, GaussianLevel, embedding
from mlem_dist.models.level import ModelLevel, new_unet_level
from mlem_dist.solver.condition import MASK, TEXT
from mlem_dist.solver.integrate import evaluate, integrate
from mlem_dist.solver.plan import Increment, single_level
from mlem_dist.solver.process import process_of
from mlem_dist.solver.steps import solver_table


def test_padding_does_not_count_in_the_embedding_of_a_prompt():
    text, mask = torch.randn(3, 4, 5), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    expected = torch.stack([text[0, :3].mean(0), text[1, 0], text[2].mean(0)])
    torch.testing.assert_close(embedding({TEXT: text, MASK: mask}), expected)


def test_the_gaussian_level_is_the_exact_posterior_mean():
    """Against the dense formula with the full covariance."""
    rng = torch.Generator().manual_seed(0)
    d, rank, n = 12, 4, 500
    alpha_bar = np.linspace(0.999, 0.01, 20)
    mix = torch.randn(2, d, d, generator=rng, dtype=torch.float64)
    label = torch.arange(n) % 2
    x0 = torch.einsum("nd,ndk->nk", torch.randn(n, d, generator=rng, dtype=torch.float64), mix[label])
    level = GaussianLevel(2, d, rank, process_of_products(alpha_bar))
    level.fit(x0.float().reshape(n, 1, 3, 4), {"label": label})
    x = torch.randn(6, 1, 3, 4, generator=rng)
    which = torch.tensor([0, 1, 1, 0, 1, 0])
    t = torch.tensor([0, 5, 10, 15, 19, 3])
    drift = level(x, t, {"label": which})
    for i in range(6):
        c, a = int(which[i]), alpha_bar[int(t[i])]
        q, v, r = level.basis[c].double(), level.variance[c].double(), level.residual[c].double()
        cov = q @ torch.diag(v) @ q.T + r * (torch.eye(d) - q @ q.T)
        centred = x[i].flatten().double() - a**0.5 * level.mean[c].double()
        exact = (1 - a) ** 0.5 * torch.linalg.solve(a * cov + (1 - a) * torch.eye(d), centred)
        assert (drift[i].flatten() - exact).abs().max() < 1e-4


@pytest.mark.parametrize("n", [6, 40, FIT_ROWS + 500])
@pytest.mark.parametrize("rank", [4, 11])
def test_a_fit_has_the_mean_and_covariance_of_its_class(n, rank):
    """Fewer samples than values, more, and more than are summed up at a time; dropped directions have their mean."""
    rng = torch.Generator().manual_seed(n)
    d = 12
    mix = torch.randn(2, d, d, generator=rng, dtype=torch.float64) / 3
    label = torch.arange(2 * n) % 2
    x0 = (
        torch.einsum("nd,ndk->nk", torch.randn(2 * n, d, generator=rng, dtype=torch.float64), mix[label])
        + label[:, None]
    )
    level = GaussianLevel(2, d, rank, process_of_products(np.linspace(0.999, 0.01, 20)))
    level.fit(x0.reshape(-1, 1, 3, 4), {"label": label})
    for c in (0, 1):
        members = x0[label == c]
        covariance = members.T.cov()
        values = torch.linalg.eigvalsh(covariance)
        q, v, r = level.basis[c].double(), level.variance[c].double(), float(level.residual[c])
        torch.testing.assert_close(level.mean[c].double(), members.mean(0), atol=1e-5, rtol=1e-5)
        assert r == pytest.approx(float(values[: d - rank].mean().clamp(min=0)), rel=1e-4, abs=1e-6)
        kept = q @ torch.diag(v) @ q.T
        projection = q @ q.T
        torch.testing.assert_close(kept, projection @ covariance @ projection, atol=1e-4, rtol=1e-4)
        assert float(kept.trace()) == pytest.approx(float(values[d - rank :].clamp(min=0).sum()), rel=1e-4)


class Velocity(nn.Module):
    """What a diffusers checkpoint of prediction type v_prediction returns, for a known image and noise."""

    config = SimpleNamespace(num_class_embeds=None, time_embedding_type="positional")

    def __init__(self, scheduler: DDPMScheduler, x0: torch.Tensor, noise: torch.Tensor) -> None:
        super().__init__()
        self.scheduler, self.x0, self.noise = scheduler, x0, noise

    def forward(self, x, t, class_labels=None, return_dict=False):
        return (self.scheduler.get_velocity(self.x0, self.noise, t),)


def test_a_v_prediction_is_that_of_diffusers():
    scheduler = DDPMScheduler(beta_schedule="linear")
    rng = torch.Generator().manual_seed(0)
    x0, noise, t = (
        torch.randn(3, 1, 4, 4, generator=rng),
        torch.randn(3, 1, 4, 4, generator=rng),
        torch.tensor([5, 400, 990]),
    )
    process = process_of_products(scheduler.alphas_cumprod.double().numpy())
    level = ModelLevel(Velocity(scheduler, x0, noise), 1, "v_prediction", process, None)
    x = scheduler.add_noise(x0, noise, t)
    drift = level(x, t, {})
    torch.testing.assert_close(drift, noise, atol=1e-5, rtol=1e-5)
    # An error e of v is an error of the noise, whose weighed square is that of v.
    level.model.noise = noise + 0.1
    off = level(x, t, {}) - noise
    of_v = scheduler.get_velocity(x0, noise + 0.1, t) - scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(level.loss_weight(t) * off.square(), of_v.square(), atol=1e-5, rtol=1e-3)


def test_a_conditional_unet_is_told_the_class():
    blocks = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    torch.manual_seed(0)
    level = new_unet_level(
        (1, 8, 8),
        2,
        1,
        "epsilon",
        process_of_products(np.linspace(0.999, 0.01, 20)),
        blocks | {"norm_num_groups": 4},
        None,
    )
    x = torch.randn(1, 1, 8, 8).expand(2, -1, -1, -1)
    zero, one = level(x, torch.tensor([3, 3]), {"label": torch.tensor([0, 1])})
    assert (zero - one).abs().max() > 1e-3


def test_a_residual_of_zero_is_the_clamped_gaussian_level():
    alpha_bar = np.linspace(0.999, 1e-4, 20)
    rng = torch.Generator().manual_seed(0)
    gaussian = GaussianLevel(2, 64, 4, process_of_products(alpha_bar))
    gaussian.fit(torch.randn(100, 1, 8, 8, generator=rng), {"label": torch.arange(100) % 2})
    blocks = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    level = new_unet_level((1, 8, 8), 2, 2, "residual", gaussian.process, blocks | {"norm_num_groups": 4}, gaussian)
    x, t = torch.randn(3, 1, 8, 8, generator=rng), torch.tensor([0, 9, 19])
    condition = {"label": torch.tensor([0, 1, 1])}
    a = torch.tensor(alpha_bar, dtype=torch.float32)[t][:, None, None, None]
    image = (x - (1 - a).sqrt() * gaussian(x, t, condition)) / a.sqrt()
    clamped = (x - a.sqrt() * image.clamp(-1, 1)) / (1 - a).sqrt()
    assert (image.abs() > 1).any()
    assert (level(x, t, condition) - clamped).abs().max() > 1e-3
    torch.nn.init.zeros_(level.model.conv_out.weight)
    torch.nn.init.zeros_(level.model.conv_out.bias)
    assert torch.allclose(level(x, t, condition), clamped, atol=1e-5)


@torch.inference_mode()
def test_levels_at_one_state_share_the_gaussian(fashion):
    levels = {k: fashion.load_level(k, "cpu") for k in (1, 2, 4)}
    rng = torch.Generator().manual_seed(0)
    x, condition = torch.randn(20, *fashion.sample_shape, generator=rng), {"label": torch.arange(20) % 10}
    alone = {k: level(x, torch.full((20,), 600), condition) for k, level in levels.items()}
    times = []
    hook = levels[1].register_forward_hook(lambda *_: times.append(1))
    for terms in ([Increment(4, 2), Increment(2, 1)], [Increment(1, 0), Increment(4, 0)]):
        values = evaluate(levels, terms, x, 600, condition)
        for term, value in zip(terms, values, strict=True):
            assert torch.equal(value, alone[term.level] - alone[term.below] if term.below else alone[term.level])
    hook.remove()
    assert len(times) == 2


def test_levels_cost_more_and_err_less_from_one_to_the_next(fashion):
    errors = [sum(level.denoising_error) for level in fashion.levels]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == len(errors) == 6
    assert (np.diff(fashion.cost("cpu")) > 0).all()
    assert fashion.cost("cpu")[-1] > 25 * fashion.cost("cpu")[1]
    assert fashion.levels[0].kind == "gaussian"
    assert [level.kind for level in fashion.levels[1:]] == ["unet"] * (len(errors) - 1)


def test_a_basis_stored_in_half_precision_is_orthonormal_again(fashion):
    """Its columns are, by whatever number of threads, and those that are zero stay so."""
    threads, found = torch.get_num_threads(), []
    stored = load_file(fashion.folder / fashion.levels[0].path)["basis"]
    classes, d, rank = stored.shape
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            level = GaussianLevel(classes, d, rank + 1, fashion.process)
            level.basis[:, :, 1:] = stored
            level.orthonormalise()
            found.append(level.basis)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    assert not found[0][:, :, 0].any()
    basis = found[0][:, :, 1:].double()
    assert (basis - stored).abs().max() < 1e-3
    off = [(columns.mT @ columns - torch.eye(rank)).abs().max() for columns in (basis, stored.double())]
    assert off[0] < 1e-6 < 1e-5 < off[1]


def test_the_gaussian_level_by_the_kernels_of_a_gpu_is_the_same(fashion):
    level = fashion.load_level(1, "cpu")
    rng = torch.Generator().manual_seed(0)
    x, t = torch.randn(20, *fashion.sample_shape, generator=rng), torch.randint(1000, (20,), generator=rng)
    label = torch.arange(20) % 10
    marginal = (value[:, None] for value in fashion.process.marginal(t))
    drift = level._gathered(label, x.flatten(1), *marginal, level.mean[label]).view_as(x)
    torch.testing.assert_close(drift, level(x, t, {"label": label}), rtol=1e-4, atol=1e-4)


def test_every_level_predicts_the_noise(fashion):
    """Of a class's mean image, better where that class is asked for; a level that returned v or x0 would be far off."""
    rng = torch.Generator().manual_seed(0)
    label = torch.tensor([0, 1, 5, 8])
    images = fashion.load_level(1, "cpu").mean[label].view(4, *fashion.sample_shape)
    noise = torch.randn(images.shape, generator=rng)
    for number in range(1, len(fashion.levels) + 1):
        level = fashion.load_level(number, "cpu")
        for step, most in ((990, 1e-3), (400, 0.02)):
            t = torch.full((4,), step)
            x = fashion.process.mixed(images, noise, t)
            right, wrong = ((level(x, t, {"label": label.roll(by)}) - noise).square().mean() for by in (0, 1))
            assert right < most
            assert right < wrong


def test_in_bfloat16_only_unets_lose_digits(fashion):
    rng = torch.Generator().manual_seed(0)
    x, t = torch.randn(4, *fashion.sample_shape, generator=rng), torch.full((4,), 300)
    condition = {"label": torch.arange(4)}
    for number in range(1, len(fashion.levels) + 1):
        full, low = (fashion.load_level(number, "cpu", precision) for precision in ("float32", "bfloat16"))
        error = (low(x, t, condition) - full(x, t, condition)).abs()
        assert low(x, t, condition).dtype == torch.float32
        if number == 1:
            assert error.max() == 0
        else:
            assert {parameter.dtype for parameter in low.model.parameters()} == {torch.bfloat16}
            assert 0 < error.max() < 0.1


@torch.inference_mode()
def test_wide_unets_compute_with_channels_last_on_a_cpu(fashion):
    """It is the same drift to rounding, and lies as it did."""
    rng = torch.Generator().manual_seed(0)
    x, t = torch.randn(4, *fashion.sample_shape, generator=rng), torch.full((4,), 300)
    condition = {"label": torch.arange(4)}
    wide = []
    for number in range(2, len(fashion.levels) + 1):
        level = fashion.load_level(number, "cpu")
        first = copy.deepcopy(level)
        first.model.to(memory_format=torch.contiguous_format)
        layouts = {one.model.conv_in.weight.is_contiguous() for one in (level, first)}
        wide.append(max(level.model.config.block_out_channels) >= WIDE)
        assert layouts == ({True, False} if wide[-1] else {True})
        output = level(x, t, condition)
        assert output.is_contiguous()
        torch.testing.assert_close(output, first(x, t, condition), atol=1e-5, rtol=1e-5)
    assert set(wide) == {True, False}


@torch.inference_mode()
def test_what_leaves_a_unet_with_channels_last_has_them_first():
    process = process_of_products(np.linspace(0.999, 0.01, 20))
    level = new_unet_level((3, 8, 8), 0, 1, "epsilon", process, {"block_out_channels": (WIDE,) * 4}, None)
    level.model.to(memory_format=torch.channels_last)
    assert level(torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), {}).is_contiguous()


def test_the_bundled_ladder_is_small(fashion):
    size = sum(path.stat().st_size for path in fashion.folder.rglob("*") if path.is_file())
    assert size < 25 * 2**20


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        {"_class_name": "EDMEulerScheduler"},
        {"_class_name": "ScoreSdeVeScheduler"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ],
    ids=lambda config: config.get("_class_name", "zero terminal SNR"),
)
@pytest.mark.parametrize("solver", ["ode", "sde"])
def test_the_gaussian_level_brings_noise_of_any_process_to_its_gaussian(config, solver):
    """From pure noise to the mean and covariance, in closed form as in single steps."""
    process = process_of(config)
    rng = torch.Generator().manual_seed(0)
    steps, d, n = 400, 6, 20_000
    level = GaussianLevel(1, d, 3, process)
    mix = torch.randn(d, d, generator=rng) / 3
    x0 = (torch.randn(5_000, d, generator=rng) @ mix + torch.linspace(-1, 1, d)).reshape(-1, 1, 2, 3)
    level.fit(x0, {})
    table = solver_table(process, steps, solver)
    noises = {step: torch.randn(n, 1, 2, 3, generator=rng) for step in range(-1, steps)}
    plan = single_level(1, 1, steps)
    singly = integrate({1: level}, table, plan, noises.__getitem__, {})
    closed_form = level.closed_form(level.affine(table.t), table, {}, n, path=True)
    at_once = integrate({}, table, replace(plan, collapse=True), noises.__getitem__, {}, closed_form)
    assert (singly - at_once).abs().max() < 1e-3
    flat = at_once.flatten(1).double()
    q, v, r = level.basis[0].double(), level.variance[0].double(), level.residual[0].double()
    covariance = q @ torch.diag(v) @ q.T + r * (torch.eye(d) - q @ q.T)
    assert (flat.mean(0) - level.mean[0]).abs().max() < 0.03
    assert (flat.T.cov() - covariance).abs().max() < 0.03


@pytest.mark.parametrize("number", [1, 2])
def test_a_level_that_is_loaded_in_inference_mode_has_derivatives(number):
    ladder = Ladder.load("fashion")
    with torch.inference_mode():
        level = ladder.load_level(number, "cpu")
    x = torch.zeros(1, *ladder.sample_shape, requires_grad=True)
    level(x, torch.tensor([500.0]), {"label": torch.tensor([3])}).sum().backward()
    assert x.grad.abs().max() > 0


def test_means_of_classes_with_few_samples_are_drawn_to_the_common_one():
    """With one covariance for all, the means are nearer to the true ones than those of the classes' samples."""
    rng = torch.Generator().manual_seed(0)
    classes, d = 200, 12
    true = 0.3 * torch.randn(classes, d, generator=rng)
    label = torch.arange(600) % classes
    x0 = (true[label] + torch.randn(600, d, generator=rng) @ torch.diag(torch.linspace(0.1, 1, d))).reshape(-1, 1, 3, 4)
    level = GaussianLevel(classes, d, 6, process_of_products(np.linspace(0.999, 0.01, 20)), bases=1)
    level.fit(x0, {"label": label})
    own = torch.stack([x0[label == c].flatten(1).mean(0) for c in range(classes)])
    drawn, plain, common = ((mean - true).square().mean() for mean in (level.mean, own, own.mean(0)))
    assert drawn < 0.7 * min(plain, common)
    # With many samples they are the means of the classes.
    many = torch.arange(40_000) % classes
    x0 = (true[many] + torch.randn(40_000, d, generator=rng)).reshape(-1, 1, 3, 4)
    level.fit(x0, {"label": many})
    assert (level.mean - true).square().mean() < 1.1 / 200
    assert (level.variance[0].mean() - 1).abs() < 0.05


@pytest.mark.parametrize("label", [torch.arange(64), torch.zeros(64, dtype=torch.int64), torch.arange(64) % 60])
def test_classes_with_hardly_any_samples_share_the_common_mean(label):
    """One sample does not become its class's mean, with no variance left, and no class is without a mean."""
    x0 = torch.randn(64, 1, 3, 4, generator=torch.Generator().manual_seed(0)) + 3
    level = GaussianLevel(200, 12, 6, process_of_products(np.linspace(0.999, 0.01, 20)), bases=1)
    level.fit(x0, {"label": label})
    torch.testing.assert_close(level.mean[199], x0.flatten(1).mean(0))
    assert (level.mean - level.mean[199]).square().mean() < 0.3
    assert level.residual[0] > 0.3


@pytest.mark.parametrize("depends", [True, False])
def test_a_mean_that_is_linear_in_the_embedding_is_found(depends):
    rng = torch.Generator().manual_seed(0)
    n, features, d = 800, 24, 12
    text = torch.randn(2 * n, 5, features, generator=rng) * torch.logspace(0, -1, features)
    response = 2 * torch.randn(features, d, generator=rng) * depends
    mean = 3 + text.mean(1) @ response
    x0 = (mean + 0.5 * torch.randn(2 * n, d, generator=rng)).reshape(-1, 1, 3, 4)
    level = GaussianLevel(1, d, 6, process_of_products(np.linspace(0.999, 0.01, 20)))
    level.fit(x0[:n], {"text": text[:n]})
    error = (level.means({"text": text[n:]}, n) - mean[n:]).square().mean()
    # Of an unbiased fit, the error is the noise times the number of coefficients per sample.
    assert error < 1.2 * (1 + features * depends) * 0.25 / n + 1e-4
    covariance = 0.25 * torch.eye(d)
    low_rank = level.basis[0] @ torch.diag(level.variance[0] - level.residual[0]) @ level.basis[0].T
    assert (low_rank + level.residual[0] * torch.eye(d) - covariance).abs().max() < 0.06
    # It survives a file, and its closed form is that of single steps.
    again = GaussianLevel.of_state(level.state_dict(), level.process)
    table = solver_table(level.process, 10, "ode")
    condition, noise = {"text": text[n : n + 4]}, torch.randn(4, 1, 3, 4, generator=rng)
    plan = single_level(1, 1, 10)
    singly = integrate({1: again}, table, plan, lambda _: noise, condition)
    closed_form = again.closed_form(again.affine(table.t), table, condition, 4)
    at_once = integrate({}, table, replace(plan, collapse=True), lambda _: noise, condition, closed_form)
    assert (singly - at_once).abs().max() < 1e-4
