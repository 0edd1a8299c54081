"""The decoder: from latents to images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlem_dist.files import read_object
from mlem_dist.models.weights import load_model

PIXELS = 1024**2
"""Pixels that are decoded together; one image at least. Activations of a decoder take some kilobytes per pixel."""

DECODERS = ("AutoencoderDC", "AutoencoderKL")
"""Classes of diffusers whose models decode latents."""


class Decoder(nn.Module):
    """An autoencoder of diffusers, from latents of unit scale to images in [-1, 1].

    Pipelines scale latents by the autoencoder's `scaling_factor`, after they subtract its `shift_factor`, or by the
    mean and standard deviation of each channel.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config

    def forward(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) float32, of latents z (B, c, h, w) float32."""
        scale, shift = self._units(z)
        z = (z * scale + shift).to(next(self.model.parameters()).dtype)
        factor = upscaling(self.config)
        batch = max(1, PIXELS // (z.shape[2] * z.shape[3] * factor**2))
        model: Any = self.model
        return torch.cat([model.decode(part, return_dict=False)[0].float() for part in z.split(batch)])

    def latents(self, images: Tensor) -> Tensor:
        """The most likely latents (B, c, h, w) float32, of images (B, C, H, W) float32 in [-1, 1]."""
        model: Any = self.model
        made = model.encode(images.to(next(model.parameters()).dtype))
        # Autoencoders without a distribution of latents give the latents.
        encoded = (made.latent_dist.mode() if "latent_dist" in made else made.latent).float()
        scale, shift = self._units(encoded)
        latents: Tensor = (encoded - shift) / scale
        return latents

    def _units(self, z: Tensor) -> tuple[Any, Any]:
        """The scale and the shift by which latents z differ from the autoencoder's: those are z scale + shift."""
        scale, shift = 1 / self.config.scaling_factor, getattr(self.config, "shift_factor", None) or 0.0
        mean, deviation = (getattr(self.config, f"latents_{name}", None) for name in ("mean", "std"))
        if mean is not None and deviation is not None:
            shift = torch.tensor(mean, device=z.device)[:, None, None]
            scale = torch.tensor(deviation, device=z.device)[:, None, None] * scale
        return scale, shift


def load_decoder(kind: str, folder: Path, precision: str) -> Decoder:
    """The decoder of class `kind` in a folder, in a precision unless its configuration wants float32."""
    import diffusers

    upcast = read_object(folder / "config.json", "decoder's configuration").get("force_upcast")
    model = load_model(getattr(diffusers, kind), folder, "float32" if upcast else precision)
    return Decoder(model).eval().requires_grad_(False)


def upscaling(config: Any) -> int:
    """The ratio of the height of an image to that of its latents, for an autoencoder's configuration."""
    widths = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return int(2 ** (len(widths) - 1))
