"""Checkpoints in single files: the tensors of a pipeline of Stable Diffusion by the names of its authors."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def replaced(name: str, names: dict[str, str]) -> str:
    """A name with its first part that is in `names` replaced, up to the last part."""
    before, _, last = name.rpartition(".")
    return f"{names.get(before, before)}.{last}"


def unet_name(name: str, layers: int, attends: set[int]) -> str:
    """The name of a UNet's tensor; `layers` is its layers per block, and `attends` its up blocks with attention."""
    match = re.fullmatch(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", name)
    if match is None:
        return replaced(name, OUTSIDE)
    side, block, what, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    rest = replaced(rest, RESNET) if what == "resnets" else rest
    if side == "mid":
        return f"middle_block.{2 * number + (what == 'attentions')}.{rest}"
    if side == "down":
        first = 1 + block * (layers + 1)
        place = {"resnets": f"{first + number}.0", "attentions": f"{first + number}.1"}.get(what, f"{first + layers}.0")
        return f"input_blocks.{place}.{rest.replace('conv.', 'op.', what == 'downsamplers')}"
    first = block * (layers + 1)
    last = f"{first + layers}.{1 + (block in attends)}"
    place = {"resnets": f"{first + number}.0", "attentions": f"{first + number}.1"}.get(what, last)
    return f"output_blocks.{place}.{rest}"


def unet_tensors(folder: Path) -> dict[str, Tensor]:
    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    attends = {number for number, kind in enumerate(config["up_block_types"]) if "Attn" in kind}
    return {
        f"model.diffusion_model.{unet_name(name, config['layers_per_block'], attends)}": tensor
        for name, tensor in state.items()
    }


def vae_tensors(folder: Path) -> dict[str, Tensor]:
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    blocks = len(json.loads((folder / "config.json").read_text())["block_out_channels"])
    tensors = {}
    for old, tensor in state.items():
        name = old.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{blocks - 1 - int(match[1])}", name)
        name = name.replace(".resnets.", ".block.").replace("upsamplers.0", "upsample")
        if match := re.fullmatch(r"(.+)mid_block\.attentions\.0\.(.+)", name):
            name = f"{match[1]}mid.attn_1.{replaced(match[2], ATTENTION)}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        tensors[f"first_stage_model.{name}"] = tensor
    return tensors


def clip_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    state = load_file(folder / "model.safetensors")
    return {f"{prefix}.transformer.text_model.{name.removeprefix('text_model.')}": state[name] for name in state}


def open_clip_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """As OpenCLIP names them, with the three projections of an attention in one tensor."""
    state = {
        name.removeprefix("text_model."): tensor for name, tensor in load_file(folder / "model.safetensors").items()
    }
    tensors = {}
    for old, tensor in state.items():
        name = old.replace("encoder.layers", "transformer.resblocks").replace("layer_norm", "ln_")
        name = name.replace("fc1", "c_fc").replace("fc2", "c_proj").replace("self_attn", "attn")
        name = name.replace("final_ln_.", "ln_final.").replace("embeddings.token_embedding", "token_embedding")
        name = name.replace("embeddings.position_embedding.weight", "positional_embedding")
        if match := re.fullmatch(r"(.+attn)\.q_proj\.(weight|bias)", name):
            name = f"{match[1]}.in_proj_{match[2]}"
            tensor = torch.cat([state[old.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
        elif re.search(r"attn\.[kv]_proj", name):
            continue
        elif name == "text_projection.weight":
            name, tensor = "text_projection", tensor.T
        tensors[f"{prefix}.model.{name}"] = tensor
    return tensors


def single_file(pipeline: Path, file: Path, *parts: str) -> Path:
    """Save some parts of a pipeline, by default all with weights, in one file."""
    index = json.loads((pipeline / "model_index.json").read_text())
    tensors: dict[str, Tensor] = {}
    for part in parts or [name for name in ("unet", "vae", "text_encoder", "text_encoder_2") if name in index]:
        folder = pipeline / part
        if part == "unet":
            tensors |= unet_tensors(folder)
        elif part == "vae":
            tensors |= vae_tensors(folder)
        elif part == "text_encoder_2":
            tensors |= open_clip_tensors(folder, "conditioner.embedders.1")
            # By its tenth layer, diffusers knows this encoder.
            tensors["conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"] = torch.zeros(1)
        else:
            xl = "text_encoder_2" in index
            tensors |= clip_tensors(folder, "conditioner.embedders.0" if xl else "cond_stage_model")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file
