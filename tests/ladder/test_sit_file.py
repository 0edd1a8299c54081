"""Checkpoints of SiT: converted files compute what the paper's transformer computes."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from pipelines import make_pipeline
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

import mlem_dist
from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.condition import LABEL

WIDTH, HEADS, PATCH, SIDE, CLASSES = 384, 6, 2, 4, 10
"""The narrowest of the published models, with fewer blocks and classes, for latents of 8x8."""

SCALE, STEPS = 3.0, 5


def sit_tensors(depth: int) -> dict[str, Tensor]:
    """Random weights in the published layout."""
    torch.manual_seed(depth)
    shapes = {"x_embedder.proj": (WIDTH, 4, PATCH, PATCH), "t_embedder.mlp.0": (WIDTH, 256)}
    shapes |= {"t_embedder.mlp.2": (WIDTH, WIDTH), "final_layer.linear": (PATCH**2 * 8, WIDTH)}
    shapes |= {"final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH)}
    for block in range(depth):
        parts = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        parts["adaLN_modulation.1"] = (6, 1)
        shapes |= {f"blocks.{block}.{name}": (WIDTH * out, WIDTH * width) for name, (out, width) in parts.items()}
    tensors = {"y_embedder.embedding_table.weight": torch.randn(CLASSES + 1, WIDTH)}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = 1.5 * torch.randn(shape) / math.prod(shape[1:]) ** 0.5
        tensors[f"{name}.bias"] = 0.3 * torch.randn(shape[0])
    waves = 10000 ** (-torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH // 4))
    angles = torch.arange(SIDE)[:, None] * waves
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    # Half of the channels tell the column, the others the row.
    both = torch.cat([axis.repeat(SIDE, 1), axis.repeat_interleave(SIDE, 0)], 1)
    return tensors | {"pos_embed": both.float()[None]}


def sit(tensors: dict[str, Tensor], x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """The velocity from noise to images of the transformer of arXiv:2401.08740, at times from 0 (noise) to 1."""

    def linear(name: str, value: Tensor) -> Tensor:
        return functional.linear(value, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(value: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return functional.layer_norm(value, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    batch = len(x)
    patches = functional.conv2d(x, tensors["x_embedder.proj.weight"], tensors["x_embedder.proj.bias"], stride=PATCH)
    h = patches.reshape(batch, WIDTH, -1).mT + tensors["pos_embed"]
    angles = t[:, None] * 10000 ** (-torch.arange(128) / 128)
    time = linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))
    time = linear("t_embedder.mlp.2", functional.silu(time))
    c = functional.silu(time + tensors["y_embedder.embedding_table.weight"][label])
    for number in range(sum(".attn.qkv.weight" in name for name in tensors)):
        block = f"blocks.{number}"
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = linear(f"{block}.adaLN_modulation.1", c).chunk(6, 1)
        qkv = linear(f"{block}.attn.qkv", norm(h, scale, shift)).reshape(batch, -1, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = ((q @ k.mT) / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v
        h = h + gate[:, None] * linear(f"{block}.attn.proj", attended.transpose(1, 2).reshape(h.shape))
        inner = functional.gelu(linear(f"{block}.mlp.fc1", norm(h, scale_mlp, shift_mlp)), approximate="tanh")
        h = h + gate_mlp[:, None] * linear(f"{block}.mlp.fc2", inner)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, 1)
    out = linear("final_layer.linear", norm(h, scale, shift)).reshape(batch, SIDE, SIDE, PATCH, PATCH, 8)
    # The last channels are a learned variance.
    return out.permute(0, 5, 1, 3, 2, 4).reshape(batch, 8, SIDE * PATCH, SIDE * PATCH)[:, :4]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Weights of two sizes, and the folder of their files, of a pipeline of DiT and of a guided ladder."""
    root = tmp_path_factory.mktemp("sit")
    tensors = [sit_tensors(1), sit_tensors(3)]
    for name, weights in zip(("small", "large"), tensors, strict=True):
        save_file(weights, root / f"{name}.safetensors")
    dit = make_pipeline("dit", root / "dit")
    index = json.loads((dit / "model_index.json").read_text())
    (dit / "model_index.json").write_text(json.dumps(index | {"id2label": {"3": "newt"}}))
    files = [root / "small.safetensors", root / "large.safetensors"]
    Ladder.create(root / "ladder", files, pipeline=dit, guidance=SCALE, measure=False)
    return tensors, root


def test_levels_are_the_velocities_of_the_published_models_turned_round(made):
    tensors, root = made
    ladder = Ladder.load(root / "ladder")
    x, label = torch.randn(4, 4, 8, 8), torch.tensor([0, 3, 9, CLASSES])
    t = torch.tensor([1000.0, 731.5, 250.0, 1.0])
    numbers = [1 + [level.name for level in ladder.levels].index(name) for name in ("small", "large")]
    for weights, number in zip(tensors, numbers, strict=True):
        expected = -sit(weights, x, 1 - t / 1000, label)
        assert expected.std() > 0.5
        assert (sit(weights, x, t / 1000, label) + expected).abs().max() > 0.1
        drift = ladder.load_level(number, "cpu")(x, t, {LABEL: label})
        torch.testing.assert_close(drift, expected, rtol=1e-5, atol=1e-5)


def test_samples_are_those_of_euler_steps_of_the_published_model(made):
    (_, weights), root = made
    ladder, labels, seeds = Ladder.load(root / "ladder"), [3, 9], [5, 6]
    assert ladder.labels[3:5] == ("newt", "4")
    x = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    null = torch.full((2,), CLASSES)
    for step in range(STEPS):
        t = torch.full((2,), step / STEPS)
        free = sit(weights, x, t, null)
        x = x + (free + SCALE * (sit(weights, x, t, torch.tensor(labels)) - free)) / STEPS
    vae = AutoencoderKL.from_pretrained(root / "dit" / "vae")
    with torch.no_grad():
        decoded = vae.decode(x / vae.config.scaling_factor).sample
    expected = 255 * (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    images = mlem_dist.sample(ladder, labels=labels, seeds=seeds, steps=STEPS, nfe=STEPS)
    assert expected.std() > 20
    assert np.abs(images - expected).max() < 0.6


def test_a_converted_model_is_the_pipeline_of_further_files(made, tmp_path):
    """The folder is that of a pipeline, with scheduler, decoder and classes."""
    _, root = made
    converted = root / "ladder" / "models" / "large"
    half = {name: tensor.bfloat16() for name, tensor in sit_tensors(1).items()}
    save_file(half, tmp_path / "half.safetensors")
    ladder = Ladder.create(tmp_path / "more", [tmp_path / "half.safetensors", converted], measure=False)
    assert [level.name for level in ladder.levels] == ["half", "large"]
    assert ladder.decoder.path == str(converted / "vae")
    assert {path.name for path in (tmp_path / "more" / "models" / "half").iterdir()} == {"transformer"}
    stored = tmp_path / "more" / "models" / "half" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert stored.stat().st_size < 1.1 * sum(2 * tensor.numel() for tensor in half.values())


def test_what_is_not_sit_is_one_sentence(made, tmp_path):
    _, root = made
    whole = sit_tensors(1)
    changed = {
        "it lacks blocks.0.mlp.fc2.bias": {
            key: value for key, value in whole.items() if key != "blocks.0.mlp.fc2.bias"
        },
        # REPA's files have projectors, and another direction of time.
        "it has projectors.0.0.weight, which SiT has not": whole | {"projectors.0.0.weight": torch.ones(3)},
        "final_layer.linear.weight has the shape": whole | {"final_layer.linear.weight": torch.ones(32, 3)},
        "its width is 48, expected 384": whole | {"x_embedder.proj.weight": torch.ones(48, 4, 2, 2)},
        "its pos_embed is not that of": whole | {"pos_embed": torch.randn(1, 16, WIDTH)},
    }
    for number, (reason, tensors) in enumerate(changed.items()):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        refuse(f"cannot be converted: {reason}", tmp_path, tmp_path / f"{number}.safetensors", pipeline=root / "dit")
    file = root / "small.safetensors"
    refuse("is of SiT, and a transformer alone: give as `pipeline`", tmp_path, file)
    pixels = make_pipeline("pixels", root / "pixels")
    refuse("is of SiT, and the pipeline .* is a DDPMPipeline", tmp_path, file, pipeline=pixels)
    refuse(
        "dit: the noise schedule of its pipeline is not that of", tmp_path, root / "dit", file, pipeline=root / "dit"
    )


def refuse(message, folder, *models, **options):
    before = {*folder.iterdir()}
    with pytest.raises(UsageError, match=message) as refused:
        Ladder.create(folder / "out", models, measure=False, **options)
    assert "\n" not in str(refused.value)
    assert {*folder.iterdir()} == before
