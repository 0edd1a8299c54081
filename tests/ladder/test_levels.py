import numpy as np
import pytest
import torch

from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.levels import GaussianLevel, new_unet_level
from mlem_dist.ladder.measure import add_noise


def test_the_gaussian_level_is_the_exact_posterior_mean():
    """Against the dense formula with the full covariance."""
    rng = torch.Generator().manual_seed(0)
    d, rank, n = 12, 4, 500
    alpha_bar = np.linspace(0.999, 0.01, 20)
    mix = torch.randn(2, d, d, generator=rng, dtype=torch.float64)
    label = torch.arange(n) % 2
    x0 = torch.einsum("nd,ndk->nk", torch.randn(n, d, generator=rng, dtype=torch.float64), mix[label])
    level = GaussianLevel(2, d, rank, alpha_bar)
    level.fit(x0.float().reshape(n, 1, 3, 4), label)
    x = torch.randn(6, 1, 3, 4, generator=rng)
    which = torch.tensor([0, 1, 1, 0, 1, 0])
    t = torch.tensor([0, 5, 10, 15, 19, 3])
    found = level(x, t, which)
    for i in range(6):
        c, a = int(which[i]), alpha_bar[int(t[i])]
        q, v, r = level.basis[c].double(), level.variance[c].double(), level.residual[c].double()
        cov = q @ torch.diag(v) @ q.T + r * (torch.eye(d) - q @ q.T)
        centred = x[i].flatten().double() - a**0.5 * level.mean[c].double()
        exact = (1 - a) ** 0.5 * torch.linalg.solve(a * cov + (1 - a) * torch.eye(d), centred)
        assert (found[i].flatten() - exact).abs().max() < 1e-4


def test_a_residual_of_zero_is_the_clamped_gaussian_level():
    alpha_bar = np.linspace(0.999, 1e-4, 20)
    rng = torch.Generator().manual_seed(0)
    gaussian = GaussianLevel(2, 64, 4, alpha_bar)
    gaussian.fit(torch.randn(100, 1, 8, 8, generator=rng), torch.arange(100) % 2)
    blocks = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    level = new_unet_level((1, 8, 8), 2, 2, "residual", alpha_bar, blocks | {"norm_num_groups": 4}, gaussian)
    x, t, label = torch.randn(3, 1, 8, 8, generator=rng), torch.tensor([0, 9, 19]), torch.tensor([0, 1, 1])
    a = torch.tensor(alpha_bar, dtype=torch.float32)[t][:, None, None, None]
    image = (x - (1 - a).sqrt() * gaussian(x, t, label)) / a.sqrt()
    clamped = (x - a.sqrt() * image.clamp(-1, 1)) / (1 - a).sqrt()
    assert (image.abs() > 1).any()
    assert (level(x, t, label) - clamped).abs().max() > 1e-3
    torch.nn.init.zeros_(level.model.conv_out.weight)
    torch.nn.init.zeros_(level.model.conv_out.bias)
    assert torch.allclose(level(x, t, label), clamped, atol=1e-5)


def test_levels_cost_more_and_err_less_from_one_to_the_next(fashion):
    errors = [sum(level.denoising_error) for level in fashion.levels]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == len(errors) == 6
    assert (np.diff(fashion.cost("cpu")) > 0).all()
    assert fashion.cost("cpu")[-1] > 25 * fashion.cost("cpu")[1]
    assert fashion.levels[0].kind == "gaussian"
    assert [level.kind for level in fashion.levels[1:]] == ["unet"] * (len(errors) - 1)


def test_every_level_predicts_the_noise(fashion):
    """At the noisiest time a sample is nearly all noise; a level that returned v or x0 would be far off."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(4, *fashion.sample_shape, generator=rng)
    t = torch.full((4,), 990)
    a = torch.tensor(fashion.alpha_bar, dtype=torch.float32)
    x = add_noise(torch.zeros_like(noise), noise, t, a)
    for number in range(1, len(fashion.levels) + 1):
        predicted = fashion.load_level(number, "cpu")(x, t, torch.tensor([0, 1, 5, 9]))
        assert (predicted - noise).square().mean() < 1e-2


def test_in_bfloat16_only_unets_lose_digits(fashion):
    rng = torch.Generator().manual_seed(0)
    x, t, label = torch.randn(4, *fashion.sample_shape, generator=rng), torch.full((4,), 300), torch.arange(4)
    for number in range(1, len(fashion.levels) + 1):
        full, low = (fashion.load_level(number, "cpu", precision) for precision in ("float32", "bfloat16"))
        error = (low(x, t, label) - full(x, t, label)).abs()
        assert low(x, t, label).dtype == torch.float32
        if number == 1:
            assert error.max() == 0
        else:
            assert {parameter.dtype for parameter in low.model.parameters()} == {torch.bfloat16}
            assert 0 < error.max() < 0.1


def test_the_bundled_ladder_is_small(fashion):
    size = sum(path.stat().st_size for path in fashion.folder.rglob("*") if path.is_file())
    assert size < 25 * 2**20


def test_loading_names_what_it_knows():
    with pytest.raises(UsageError, match="fashion"):
        Ladder.load("nonesuch")
