"""Samples whose activations fit beside a model's weights on GPUs, by the configurations of published models alone.

python benchmarks/runtime/what_fits.py

Models are built on torch's meta device: no weights are downloaded or stored. Prints a table in Markdown: values of the
model in thousand millions, GB of weights in bfloat16 and of activations of a sample, the samples that fit into GPUs
beside that model alone (- where the weights take more than half of the memory), and the default block on a large GPU.
Then what the decoder takes, and the resident memory of this process by which small models evaluate a batch on a CPU,
over the activations by shapes.
"""

import ctypes
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch

from mlem_dist.ladder.sizes import LATENT_VALUES, WEIGHT_SHARE, samples_beside
from mlem_dist.models.activations import activation_bytes

GPUS = (24, 40, 80)
"""Memory of GPUs in GB."""

SD = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3 = {"sample_size": 128, "qk_norm": "rms_norm", "pooled_projection_dim": 2048}
MEDIUM = SD3 | {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
}
LARGE = SD3 | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
SANA = {"sample_size": 32}
SANA_LARGE = SANA | {"num_layers": 60, "qk_norm": "rms_norm_across_heads"}
DECODER = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
"""Configurations of the published models, where they differ from the defaults of their classes."""

Inputs = Callable[[int], Mapping[str, Any]]
"""A function from a number of samples to the inputs of a model."""


def text(batch: int, tokens: int, width: int) -> dict[str, Any]:
    """Embeddings of prompts and times."""
    return {"encoder_hidden_states": torch.empty(batch, tokens, width), "timestep": torch.ones(batch)}


def sd(batch: int) -> dict[str, Any]:
    """Inputs of Stable Diffusion 1."""
    return {"sample": torch.empty(batch, 4, 64, 64), **text(batch, 77, 768)}


def sdxl(batch: int) -> dict[str, Any]:
    """Inputs of Stable Diffusion XL."""
    added = {"text_embeds": torch.empty(batch, 1280), "time_ids": torch.ones(batch, 6)}
    return {"sample": torch.empty(batch, 4, 128, 128), "added_cond_kwargs": added, **text(batch, 77, 2048)}


def sd3(batch: int) -> dict[str, Any]:
    """Inputs of Stable Diffusion 3.5."""
    hidden, pooled = torch.empty(batch, 16, 128, 128), torch.empty(batch, 2048)
    return {"hidden_states": hidden, "pooled_projections": pooled, **text(batch, 333, 4096)}


def sana(batch: int) -> dict[str, Any]:
    """Inputs of SANA."""
    return {"hidden_states": torch.empty(batch, 32, 32, 32), **text(batch, 300, 2304)}


def flux(batch: int) -> dict[str, Any]:
    """Inputs of FLUX.1, whose latents of 16x128x128 are 64x64 tokens."""
    ids = {"img_ids": torch.zeros(64 * 64, 3), "txt_ids": torch.zeros(512, 3)}
    return {
        "hidden_states": torch.empty(batch, 64 * 64, 64),
        "pooled_projections": torch.empty(batch, 768),
        "guidance": torch.ones(batch),
        **ids,
        **text(batch, 512, 4096),
    }


MODELS: list[tuple[str, int, tuple[int, int, int], str, Mapping[str, Any], Inputs]] = [
    ("Stable Diffusion 1.5", 512, (4, 64, 64), "UNet2DConditionModel", SD, sd),
    ("Stable Diffusion XL", 1024, (4, 128, 128), "UNet2DConditionModel", SDXL, sdxl),
    ("Stable Diffusion 3.5 medium", 1024, (16, 128, 128), "SD3Transformer2DModel", MEDIUM, sd3),
    ("Stable Diffusion 3.5 large", 1024, (16, 128, 128), "SD3Transformer2DModel", LARGE, sd3),
    ("FLUX.1 dev", 1024, (16, 128, 128), "FluxTransformer2DModel", {"guidance_embeds": True}, flux),
    ("SANA 1.6B", 1024, (32, 32, 32), "SanaTransformer2DModel", SANA, sana),
    ("SANA 1.5 4.8B", 1024, (32, 32, 32), "SanaTransformer2DModel", SANA_LARGE, sana),
]
"""Name, pixels of a side, shape of a sample, class and configuration of each model, and its inputs."""

SMALL: dict[str, tuple[str, Mapping[str, Any], Inputs]] = {
    "UNet of pixels": (
        "UNet2DModel",
        {
            "block_out_channels": (32, 64),
            "norm_num_groups": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        lambda batch: {"sample": torch.randn(batch, 3, 32, 32), "timestep": torch.ones(batch)},
    ),
    "DiT": (
        "DiTTransformer2DModel",
        {"num_attention_heads": 4, "num_layers": 3, "attention_head_dim": 16, "in_channels": 4, "sample_size": 16},
        lambda batch: {
            "hidden_states": torch.randn(batch, 4, 16, 16),
            "timestep": torch.ones(batch),
            "class_labels": torch.zeros(batch, dtype=torch.int64),
        },
    ),
    "UNet of Stable Diffusion": (
        "UNet2DConditionModel",
        {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 32, "norm_num_groups": 8},
        lambda batch: {"sample": torch.randn(batch, 4, 16, 16), **text(batch, 77, 32)},
    ),
}
"""Class, configuration and inputs of small models."""


def main() -> None:
    """Print the table, then the rest."""
    fits = " | ".join(f"{size} GB" for size in GPUS)
    print(f"| model | pixels | values, 10⁹ | weights, GB | activations of a sample, GB | {fits} | default |")
    print("|---" * (6 + len(GPUS)) + "|")
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    for name, pixels, shape, kind, config, inputs in MODELS:
        model = getattr(diffusers, kind)(**config).eval()
        values = sum(parameter.numel() for parameter in model.parameters())
        each = activation_bytes(partial(evaluate, model, inputs))
        weights = 2.0 * values
        memory = [size * 1e9 for size in GPUS]
        samples = [str(samples_beside(weights, each, m)) if weights <= WEIGHT_SHARE * m else "-" for m in memory]
        busy = max(1, LATENT_VALUES["cuda"] // math.prod(shape))
        numbers = f"{values / 1e9:.2f} | {weights / 1e9:.1f} | {each / 1e9:.2f} | {' | '.join(samples)} | {busy}"
        print(f"| {name} | {pixels} | {numbers} |", flush=True)
    torch.set_default_dtype(torch.float32)
    decoder = diffusers.AutoencoderKL(**DECODER).eval()
    taken = activation_bytes(lambda batch: decoder.decode(torch.empty(batch, 4, 128, 128)))
    print(f"\nDecoder of Stable Diffusion in float32: {taken / 1e9:.2f} GB for an image of 1024 pixels")
    torch.set_default_device("cpu")
    torch.set_num_threads(1)
    for name, (kind, config, inputs) in SMALL.items():
        ratio = resident(getattr(diffusers, kind)(**config).eval(), inputs)
        print(f"{name}: a process on a CPU takes {ratio:.2f} times the bytes of activations")


def resident(model: Any, inputs: Inputs) -> float:
    """Resident memory that a batch of about 400 MB takes beyond that of a batch of two, over its activations."""
    each = activation_bytes(partial(evaluate, model, inputs))
    batch = 2 + int(4e8 / each)
    with torch.inference_mode():
        evaluate(model, inputs, 2)
        # Give memory that is free back to Linux, and begin the peak anew.
        ctypes.CDLL(None).malloc_trim(0)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        evaluate(model, inputs, batch)
    return (status("VmHWM") - before) / (batch * each)


def status(name: str) -> int:
    """Bytes of an entry of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def evaluate(model: Any, inputs: Inputs, batch: int) -> None:
    """Evaluate a model on a batch."""
    model(**inputs(batch), return_dict=False)


if __name__ == "__main__":
    main()
