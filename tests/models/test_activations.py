"""Bytes of activations by shapes alone, against those of tensors."""

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from pipelines import conditional_unet

from mlem_dist.models.activations import activation_bytes
from mlem_dist.models.families import FAMILIES
from mlem_dist.models.level import ModelLevel, level_bytes, placeholder
from mlem_dist.solver.process import process_of

UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
MODELS = {
    "UNet2DModel": lambda size: UNet2DModel(sample_size=size, **UNET),
    "DiTTransformer2DModel": lambda size: DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=size
    ),
    "UNet2DConditionModel": lambda size: conditional_unet(16, 16),
}


def new_level(kind: str, size: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[ModelLevel, tuple]:
    """An untrained level of a class of diffusers, and the shape of its samples."""
    with torch.device(device):
        model = MODELS[kind](size).eval().to(dtype)
    level = ModelLevel(model, 1, "epsilon", process_of({}), None, dtype, family=FAMILIES[kind])
    return level, (model.config.in_channels, size, size)


def evaluate(level: ModelLevel, shape: tuple[int, ...], batch: int) -> None:
    condition = placeholder(level.family.inputs(level.model.config), batch)
    level(torch.randn(batch, *shape), torch.ones(batch), condition)


@pytest.mark.parametrize("kind", MODELS)
def test_the_bytes_by_shapes_alone_are_those_of_tensors_on_a_cpu(kind):
    """Within a tenth; attention, whose kernels differ between devices, is in all three."""
    real, shape = new_level(kind, 16, "cpu")
    true = activation_bytes(lambda batch: evaluate(real, shape, batch))
    assert level_bytes(*new_level(kind, 16, "meta")) == pytest.approx(true, rel=0.1)


@pytest.mark.parametrize("kind", MODELS)
def test_larger_samples_take_more_and_half_precision_takes_less(kind):
    """Four times the pixels take four times the bytes, and not sixteen times, as the scores of attention would."""
    small, large = (level_bytes(*new_level(kind, size, "meta")) for size in (32, 64))
    assert 3.5 * small < large < 4.5 * small
    half = level_bytes(*new_level(kind, 32, "meta", torch.bfloat16))
    assert 0.4 * small < half < 0.7 * small
