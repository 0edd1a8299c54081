"""Checkpoints of SiT in single files, converted to folders of diffusers."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlem_dist.errors import UsageError
from mlem_dist.files import read_object, replace_file
from mlem_dist.ladder.schema import SCHEDULER
from mlem_dist.models.families.sit import LENGTH, SiT
from mlem_dist.models.imports import quiet_diffusers
from mlem_dist.models.weights import WEIGHTS, save_tensors

LABELS = "y_embedder.embedding_table.weight"
"""The name of the tensor by which a file with a transformer of SiT is known."""

POSITIONS = "pos_embed"
"""The name of the tensor of embedded positions, which diffusers computes."""

HEADS: Mapping[int, int] = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Numbers of attention heads by the width of the model, which the weights do not say: SiT-S, B, L and XL."""

RENAMED = (
    (r"transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"transformer_blocks\.\d+\.norm1\.emb\.class_embedder\.", "y_embedder."),
    (r"transformer_blocks\.", "blocks."),
    (r"norm1\.linear\.", "adaLN_modulation.1."),
    (r"attn1\.to_[qkv]\.", "attn.qkv."),
    (r"attn1\.to_out\.0\.", "attn.proj."),
    (r"ff\.net\.0\.proj\.", "mlp.fc1."),
    (r"ff\.net\.2\.", "mlp.fc2."),
    (r"pos_embed\.proj\.", "x_embedder.proj."),
    (r"proj_out_1\.", "final_layer.adaLN_modulation.1."),
    (r"proj_out_2\.", "final_layer.linear."),
)
"""Parts of the names of diffusers' tensors, and those of the file. Each block of diffusers has its own embedders."""

PIPELINE, DIT_PIPELINE = "SiTPipeline", "DiTPipeline"
"""Classes of pipelines: that of converted files, which diffusers does not have, and that of DiT."""

FLOW: Mapping[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": LENGTH}
"""Configuration of the scheduler of SiT's linear path."""


def convert_sit(
    text: str, tensors: Mapping[str, Tensor], dtype: torch.dtype, folder: Path, around: Path | None
) -> Path:
    """Write the transformer in a file to a new folder, and return the folder of the model or of its pipeline.

    Args:
        text: the file's path, as the user gave it.
        tensors: its tensors.
        dtype: the data type of the weights in the new folder.
        folder: the new folder.
        around: folder of the pipeline around the model. If it is one of DiT, the new folder is that of a pipeline with
            copies of its decoder and its classes, and with the scheduler of SiT. If it is such a pipeline, the model
            alone is written.

    Raises:
        UsageError: if the pipeline cannot be used, or the file is not that of a SiT.
    """
    index = read_object(around / "model_index.json", "pipeline") if around else {}
    if around is None or (kind := index.get("_class_name")) not in (PIPELINE, DIT_PIPELINE):
        given = f"the pipeline {around} is a {kind}" if around else "a transformer alone"
        raise UsageError(
            f"model {text!r} is of SiT, and {given}: give as `pipeline` the folder, URL or id of a DiTPipeline, from "
            "which the ladder takes the decoder and the names of classes, or the folder of a converted SiT"
        )
    _write_model(text, tensors, dtype, folder / "transformer")
    if kind == PIPELINE:
        return folder / "transformer"
    model_class = SiT().model_class()
    parts = {
        "transformer": [model_class.__module__, model_class.__name__],
        "scheduler": ["diffusers", FLOW["_class_name"]],
    }
    _write(folder / "model_index.json", index | parts | {"_class_name": PIPELINE})
    _write(folder / SCHEDULER, FLOW)
    shutil.copytree(around / "vae", folder / "vae")
    return folder


def _write(file: Path, content: Mapping[str, Any]) -> None:
    replace_file(file, json.dumps(content, indent=2) + "\n")


def _write_model(text: str, tensors: Mapping[str, Tensor], dtype: torch.dtype, folder: Path) -> None:
    config = _configuration(text, tensors)
    with quiet_diffusers(), torch.device("meta"):
        model = SiT().model_class().from_config(config)
    state, used = {}, {POSITIONS}
    for name, expected in model.state_dict().items():
        published = name
        for pattern, replacement in RENAMED:
            published = re.sub(pattern, replacement, published)
        tensor = _tensor(text, tensors, published)
        used.add(published)
        if projection := re.search(r"to_([qkv])\.", name):
            tensor = tensor.chunk(3)["qkv".index(projection[1])]
        if tensor.shape != expected.shape:
            raise _misfit(text, f"{published} has the shape {list(tensor.shape)}, expected {list(expected.shape)}")
        # Safetensors takes no tensors that share memory.
        state[name] = tensor.to(dtype, copy=True)
    if others := sorted(tensors.keys() - used):
        raise _misfit(text, f"it has {others[0]}, which SiT has not")
    model.save_config(folder)
    save_tensors(folder / WEIGHTS, state, {"format": "pt"})


def _configuration(text: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of the model with these weights."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    first, positions = _tensor(text, tensors, "x_embedder.proj.weight"), _tensor(text, tensors, POSITIONS)
    if first.ndim != 4 or positions.ndim != 3:
        raise _misfit(text, "the shapes of x_embedder.proj.weight and pos_embed are not those of SiT")
    width, channels, patch, _ = first.shape
    if width not in HEADS:
        raise _misfit(text, f"its width is {width}, expected {', '.join(map(str, HEADS))}, those of SiT-S, B, L and XL")
    side = math.isqrt(positions.shape[1])
    computed = get_2d_sincos_pos_embed(width, side, base_size=side)
    if positions.shape[1:] != computed.shape or not torch.allclose(positions[0].double(), computed, atol=0.01):
        raise _misfit(text, "its pos_embed is not that of sines and cosines of the positions of a square")
    return {
        "num_attention_heads": HEADS[width],
        "attention_head_dim": width // HEADS[width],
        "in_channels": channels,
        "out_channels": len(_tensor(text, tensors, "final_layer.linear.bias")) // patch**2,
        "num_layers": sum(name.endswith(".attn.qkv.weight") for name in tensors),
        "sample_size": side * patch,
        "patch_size": patch,
        # The last class stands for none.
        "num_embeds_ada_norm": len(_tensor(text, tensors, LABELS)) - 1,
        "norm_eps": 1e-6,
    }


def _tensor(text: str, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise _misfit(text, f"it lacks {name}")
    return tensors[name]


def _misfit(text: str, reason: str) -> UsageError:
    return UsageError(
        f"model {text!r} cannot be converted: {reason}; take a file of SiT's published weights, under their own names"
    )
