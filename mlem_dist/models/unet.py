"""Levels: approximators of one drift, each a torch module that predicts the noise of a sample."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from mlem_dist.errors import UsageError
from mlem_dist.models.gaussian import GaussianLevel
from mlem_dist.models.imports import quiet_diffusers

PREDICTIONS = ("epsilon", "v_prediction", "residual")


class UNetLevel(nn.Module):
    """A diffusers `UNet2DModel` behind a pixel-unshuffle by `patch` (1 for none), as a prediction of the noise.

    What the model's output u means, with a = alpha_bar[t]:

        "epsilon"       noise = u(x)
        "v_prediction"  noise = sqrt(1 - a) x + sqrt(a) u(x)       (Salimans & Ho, arXiv:2202.00512)
        "residual"      noise = (x - sqrt(a) x0) / sqrt(1 - a) + sqrt(a) u(x, x0)

    where x0 is the image that the ladder's Gaussian level expects, clamped to [-1, 1]; the model sees it as further
    channels. A small model need not spend its capacity on what a linear one knows, and clamping alone is worth much
    where images are black or white.

    The model's weights are of dtype `precision`, and so is what it computes; all else is float32.
    """

    alpha_bar: Tensor

    def __init__(
        self,
        model: nn.Module,
        patch: int,
        prediction: str,
        alpha_bar: np.ndarray,
        gaussian: GaussianLevel | None,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.model = model
        self.patch = patch
        self.prediction = prediction
        self.gaussian = gaussian
        self.precision = precision
        config: Any = model.config
        self.conditional: bool = config.num_class_embeds is not None
        self.register_buffer("alpha_bar", torch.tensor(alpha_bar, dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, base: Tensor | None = None) -> Tensor:
        """Predicted noise for x (B, C, H, W) float32 at timesteps t (B,) int64 with classes label (B,) int64.

        The base is what the Gaussian level predicts there; a residual evaluates it if it is not given.
        """
        a = self.alpha_bar[t][:, None, None, None]
        if self.gaussian is None:
            out = self._model(x, t, label)
            return out if self.prediction == "epsilon" else (1 - a).sqrt() * x + a.sqrt() * out
        base = self.gaussian(x, t, label) if base is None else base
        x0 = ((x - (1 - a).sqrt() * base) / a.sqrt()).clamp(-1, 1)
        return (x - a.sqrt() * x0) / (1 - a).sqrt() + a.sqrt() * self._model(torch.cat([x, x0], 1), t, label)

    def _model(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        small = pixel_unshuffle(x, self.patch).to(self.precision)
        out = self.model(small, t, class_labels=label if self.conditional else None, return_dict=False)[0]
        # However the model lays out its channels, what leaves it lies as what came.
        return pixel_shuffle(out, self.patch).to(x.dtype).contiguous()

    def loss_weight(self, t: Tensor) -> Tensor:
        """(B, 1, 1, 1): the weight that turns the squared error of the noise into that of the model's output."""
        a = self.alpha_bar[t][:, None, None, None]
        return torch.ones_like(a) if self.prediction == "epsilon" else 1 / a


def new_unet_level(
    sample_shape: tuple[int, int, int],
    classes: int,
    patch: int,
    prediction: str,
    alpha_bar: np.ndarray,
    model: Mapping[str, Any],
    gaussian: GaussianLevel | None,
) -> UNetLevel:
    """An untrained `UNetLevel` for samples of `sample_shape`, unconditional for 0 classes.

    `model` holds further arguments of `UNet2DModel`; `gaussian` is the level that a "residual" corrects.
    """
    from diffusers import UNet2DModel

    channels, height, width = sample_shape
    unet: Any = UNet2DModel(
        sample_size=(height // patch, width // patch),
        in_channels=channels * patch**2 * (1 if gaussian is None else 2),
        out_channels=channels * patch**2,
        num_class_embeds=classes or None,
        **model,
    )
    return UNetLevel(unet, patch, prediction, alpha_bar, gaussian)


def on_meta(name: str, sample_shape: tuple[int, int, int], patch: int, build: Callable[[], UNetLevel]) -> UNetLevel:
    """The level `name` as `build` makes it, without memory for its weights, after samples have passed through it.

    Raises:
        UsageError: it cannot be built, not for samples of this shape, or wants another condition than a ladder's.
    """
    try:
        with quiet_diffusers(), torch.device("meta"), torch.no_grad():
            level = build()
            config: Any = level.model.config
            check_condition(name, config, len(level.alpha_bar))
            # More than one sample, to which alone a condition of a wrong shape would be broadcast.
            x, t = torch.empty(2, *sample_shape), torch.zeros(2, dtype=torch.int64)
            level(x, t, t, x)
    except UsageError:
        raise
    # Diffusers refuses wrong arguments with all kinds of errors, many of them only when a sample passes.
    except Exception as error:
        size = "x".join(map(str, sample_shape))
        raise UsageError(
            f"level {name!r}: its model cannot be used for samples of {size} with patch {patch}: "
            f"{' '.join(str(error).split())}"
        ) from None
    return level


def check_condition(name: str, config: Mapping[str, Any], timesteps: int) -> None:
    """Refuse a `UNet2DModel` that wants to be told something else than one of `timesteps` and a class, if any.

    Raises:
        UsageError: by the level's name and the key of its model's `config`.
    """
    classes = config.get("num_class_embeds")
    if (kind := config.get("class_embed_type")) not in (None, "timestep" if classes else None):
        raise UsageError(
            f"level {name!r}: class_embed_type of its model is {kind!r}, expected null: a ladder gives a model the "
            f"timestep and {'the number of a class' if classes else 'no class'}; take a model that needs nothing else"
        )
    if (kind := config.get("time_embedding_type")) == "fourier":
        raise UsageError(
            f"level {name!r}: time_embedding_type of its model is {kind!r}, expected positional: a ladder gives a "
            "model timesteps, not levels of noise; take a model that was trained on timesteps"
        )
    known = config.get("num_train_timesteps")
    if kind == "learned" and not (isinstance(known, int) and known >= timesteps):
        raise UsageError(
            f"level {name!r}: num_train_timesteps of its model is {known}, expected at least the {timesteps} of the "
            "noise schedule; take that with which the model was trained"
        )
