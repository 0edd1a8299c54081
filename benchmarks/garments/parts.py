"""The pipeline around the models of the ladder `garments`: autoencoder, tokenizer and text encoder, trained here.

python benchmarks/garments/parts.py --data DIR --out PIPELINE

DIR is written by composites.py. PIPELINE gets the folders `vae`, `tokenizer`, `text_encoder` and `scheduler`, as those
of a pipeline of diffusers, for `pipeline` in a training configuration. The text encoder learns together with a small
transformer, which is thrown away. The same command again continues from the last checkpoint.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from mlem_dist.models.decoder import Decoder
from mlem_dist.models.pixels import to_range
from mlem_dist.training.train import TrainingState, fast_attention, learning_rate

SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0}
"""Configuration of the scheduler: flow matching."""

TEXT = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 3, "num_heads": 4, "feed_forward_proj": "gated-gelu"}

KL_WEIGHT = 1e-4
"""Weight of the divergence of latents from the standard normal distribution, per value of a latent."""

BATCH = 128
"""Number of captions in a step of the text encoder."""

AUTOENCODER_IMAGES = 30_000
"""Number of images that the autoencoder is trained on; the text encoder is trained on all."""

DROPPED = 0.1
"""Share of samples with the empty caption."""


def read(folder: Path, part: str, rows: int) -> tuple[Tensor, list[str], list[dict[str, Any]]]:
    """The first rows of a part of the dataset: images, uint8 (n, 3, 64, 64), captions, and all other columns."""
    pixels: list[np.ndarray] = []
    others: list[dict[str, Any]] = []
    for file in sorted((folder / "data").glob(f"{part}-*.parquet")):
        if len(pixels) < rows:
            for batch in pq.ParquetFile(file).iter_batches(1000):
                others += batch.to_pylist()
                images = [row.pop("image")["bytes"] for row in others[len(pixels) :]]
                pixels += [np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1) for data in images]
                if len(pixels) >= rows:
                    break
    others = others[:rows]
    return torch.from_numpy(np.stack(pixels[:rows])), [row["prompt"] for row in others], others


def new_tokenizer(captions: list[str]) -> Any:
    """T5's tokenizer with the words of the captions, and single characters for other words."""
    words = Counter(word for caption in captions for word in caption.split())
    mark, total = "\N{LOWER ONE EIGHTH BLOCK}", sum(words.values())
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": -30.0}
    scores |= {f"{mark}{word}": math.log(count / total) for word, count in sorted(words.items())}
    scores |= dict.fromkeys([mark, *"abcdefghijklmnopqrstuvwxyz0123456789-'.,"], -20.0)
    return T5Tokenizer([*scores.items()], extra_ids=0)


def optimise(
    module: nn.Module, loss: Callable[[int], Tensor], steps: int, rate: float, checkpoint: Path, decay: float = 0.999
) -> nn.Module:
    """Train a module by Adam on `loss`, a function of the step, and return the moving average of its weights."""
    average = deepcopy(module).eval()
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=1e-4)
    state = TrainingState(module, average, optimizer)
    start = state.load(checkpoint) if checkpoint.exists() else 0
    saved_at, losses = time.monotonic(), []
    for step in range(start, steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        with fast_attention("cpu"):
            value = loss(step)
            value.backward()
        losses.append(value.item())
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(rate, steps, step)
        optimizer.step()
        state.follow(min(decay, (1 + step) / (10 + step)))
        if (step + 1) % 100 == 0:
            click.echo(f"{checkpoint.stem}: step {step + 1:,} of {steps:,}, loss {np.mean(losses):.4f}")
            losses = []
        if time.monotonic() - saved_at > 45 or step + 1 == steps:
            state.save(checkpoint, step + 1)
            saved_at = time.monotonic()
    return average


def train_autoencoder(images: Tensor, steps: int, work: Path) -> AutoencoderKL:
    """An autoencoder of 64x64 pixels to 4x16x16, with its scaling factor."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
    )

    def loss(step: int) -> Tensor:
        x = to_range(images[torch.randint(len(images), (16,))])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(x).latent_dist
            y = model.decode(posterior.sample()).sample
        error = (y.float() - x).abs().mean()
        for factor in (2, 4):
            error = error + functional.avg_pool2d(y.float() - x, factor).abs().mean()
        return error + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()

    average: Any = optimise(model, loss, steps, 1.5e-3, work / "autoencoder.safetensors")
    with torch.inference_mode():
        latents = torch.cat([average.encode(to_range(part)).latent_dist.mode() for part in images[:2000].split(50)])
    average.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return average


def train_text(latents: Tensor, captions: list[str], tokenizer: Any, steps: int, work: Path) -> T5EncoderModel:
    """A text encoder, trained together with a small transformer that tells latents (n, 4, 16, 16) from captions alone.

    That is what a model of a flow does at pure noise. Where a noisy image is seen too, the words of a caption are
    enough for most of it, so that the encoder does not learn which colour is that of which garment.
    """
    torch.manual_seed(0)
    text = T5EncoderModel(T5Config(vocab_size=len(tokenizer), dropout_rate=0.0, **TEXT))
    model = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=4,
        patch_size=4,
        cross_attention_dim=128,
        caption_channels=TEXT["d_model"],
        in_channels=4,
        out_channels=4,
        sample_size=16,
        use_additional_conditions=False,
    )

    def loss(step: int) -> Tensor:
        index = torch.randint(len(latents), (BATCH,))
        chosen = ["" if torch.rand(()) < DROPPED else captions[i] for i in index.tolist()]
        tokens = tokenizer(chosen, padding=True, return_tensors="pt")
        x0 = latents[index]
        with torch.autocast("cpu", torch.bfloat16):
            states = text(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
            mean = model(
                torch.zeros_like(x0),
                encoder_hidden_states=states,
                encoder_attention_mask=tokens.attention_mask,
                timestep=torch.full((BATCH,), 1000),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample
        return (mean.float() - x0).square().mean()

    # The embedding of the encoder is also one of the model around it.
    trained = nn.ModuleDict({"text": text.encoder, "model": model})
    average: Any = optimise(trained, loss, steps, 1e-3, work / "text.safetensors")
    text.encoder.load_state_dict(average["text"].state_dict())
    return text


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--images", "rows", default=140_000, show_default=True, help="Images to train on.")
@click.option("--autoencoder-steps", default=5_000, show_default=True)
@click.option("--text-steps", default=4_000, show_default=True)
@click.option(
    "--sheet", type=click.Path(path_type=Path), help="A picture of held-out images above their decoded latents."
)
def main(data: Path, out: Path, rows: int, autoencoder_steps: int, text_steps: int, sheet: Path | None) -> None:
    """Train the parts and write them."""
    work = out / "training"
    work.mkdir(parents=True, exist_ok=True)
    images, captions, _ = read(data, "train", rows)
    model: Any = train_autoencoder(images[:AUTOENCODER_IMAGES], autoencoder_steps, work)
    # The file has half precision; what follows uses the weights of the file.
    model.half().save_pretrained(out / "vae")
    decoder = Decoder(model.float())
    held_out, *_ = read(data, "validation", 500)
    with torch.inference_mode():
        decoded = torch.cat([decoder(decoder.latents(to_range(part))) for part in held_out.split(50)])
        error = (decoded.clamp(-1, 1) - to_range(held_out)).square().mean()
        click.echo(f"held-out images: signal to noise {10 * math.log10(4 / error):.1f} dB")
        kept = work / "latents.safetensors"
        if not kept.exists():
            latents = torch.cat([decoder.latents(to_range(part)) for part in images.split(100)])
            save_file({"latents": latents.contiguous()}, kept)
        latents = load_file(kept)["latents"]
    if sheet:
        pairs = torch.cat([torch.cat([to_range(held_out[:16])[i], decoded[i]], 1) for i in range(16)], 2)
        pixels = ((pairs.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).resize((2 * pixels.shape[1], 2 * pixels.shape[0])).save(sheet)
    tokenizer = new_tokenizer(captions)
    text = train_text(latents, captions, tokenizer, text_steps, work)
    scheduler = DPMSolverMultistepScheduler(**SCHEDULER)
    PixArtAlphaPipeline(tokenizer, text.half(), model.half(), None, scheduler).save_pretrained(out)
    index = json.loads((out / "model_index.json").read_bytes())
    click.echo(f"{out}: {', '.join(name for name, value in index.items() if isinstance(value, list))}")


if __name__ == "__main__":
    main()
