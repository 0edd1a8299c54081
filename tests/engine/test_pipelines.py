"""Images of ladders of any process are those of a loop with diffusers' scheduler, as its pipelines write it."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

import mlem_dist
from mlem_dist.ladder.save import save_ladder, save_level
from mlem_dist.models.gaussian import GaussianLevel
from mlem_dist.models.level import new_unet_level
from mlem_dist.solver.plan import held, single_level
from mlem_dist.solver.process import process_of

SHAPE, STEPS, SEEDS = (3, 8, 8), 10, [3, 2**32 - 1, 8]
MODEL = {
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
TRAILING = {"timestep_spacing": "trailing"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIGURATIONS = [
    {"_class_name": "DDIMScheduler", **TRAILING, "clip_sample": False},
    {"_class_name": "DDIMScheduler", **BETAS, **TRAILING, "clip_sample": False, "prediction_type": "sample"},
    # As Stable Diffusion comes.
    {"_class_name": "DDIMScheduler", **BETAS, **LEADING, "clip_sample": False, "prediction_type": "epsilon"},
    {
        "_class_name": "DDIMScheduler",
        **BETAS,
        **TRAILING,
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    },
    {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    {"_class_name": "EDMEulerScheduler", "sigma_data": 0.7},
]


@pytest.fixture(params=CONFIGURATIONS, ids=lambda config: f"{config['_class_name']} {config.get('prediction_type')}")
def ladder(request, tmp_path):
    """A Gaussian level and an untrained UNet with attention and two classes."""
    config = request.param
    process = process_of(config)
    torch.manual_seed(0)
    gaussian = GaussianLevel(2, 3 * 8 * 8, 4, process)
    gaussian.fit(torch.randn(500, *SHAPE).clamp(-1, 1), {"label": torch.arange(500) % 2})
    unet = new_unet_level(SHAPE, 2, 1, process.prediction, process, MODEL, None)
    for parameter in unet.parameters():
        # Of untrained UNets the last layer is near zero, and little depends on anything.
        parameter.data *= 1.5
    levels = [
        replace(save_level(tmp_path, name, level, torch.float32), seconds={"cpu": seconds}, denoising_error=[0.1])
        for name, level, seconds in (("gaussian", gaussian, 1e-5), ("unet", unet, 1e-3))
    ]
    return save_ladder(tmp_path, "tiny", SHAPE, ["a", "b"], config, levels)


def test_the_best_level_alone_is_the_loop_of_diffusers(ladder):
    config = ladder.scheduler
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    if "Flow" in config["_class_name"]:
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS))
    else:
        scheduler.set_timesteps(STEPS)
    unet = diffusers.UNet2DModel.from_pretrained(ladder.folder / "unet")
    rows = [torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    x = torch.cat(rows) * (scheduler.init_noise_sigma if "EDM" in config["_class_name"] else 1)
    label = torch.tensor([0, 1, 0])
    with torch.no_grad():
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(unet(scaled, t, label).sample, t, x).prev_sample
    expected = ((x.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert expected.std() > 10
    grid = "model" if config.get("timestep_spacing") == "leading" else "trailing"
    images = mlem_dist.sample(ladder, seeds=SEEDS, steps=STEPS, plan=single_level(2, 2, STEPS), grid=grid)
    assert np.abs(images - expected).max() <= 1
    assert (images != expected).mean() < 0.01


@pytest.mark.parametrize("collapse", [False, True])
def test_held_increments_over_a_gaussian_are_near_the_best_level(ladder, collapse):
    """Called at every second step, with the Gaussian level between them singly or in closed form."""
    fire = np.ones((2, 40), dtype=bool)
    best = mlem_dist.sample(ladder, seeds=SEEDS, steps=40, plan=single_level(2, 2, 40)).astype(float)
    fire[1, 1::2] = False
    ours = mlem_dist.sample(ladder, seeds=SEEDS, steps=40, plan=replace(held(fire), collapse=collapse))
    gaussian = mlem_dist.sample(ladder, seeds=SEEDS, steps=40, plan=single_level(1, 2, 40))
    assert np.square(ours - best).mean() < 0.3 * np.square(gaussian - best).mean()
