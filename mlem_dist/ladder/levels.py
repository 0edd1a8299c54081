"""Levels: approximators of one drift, each a torch module that predicts the noise of a sample."""

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from logging import ERROR
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from mlem_dist.errors import UsageError
from mlem_dist.solver.closed_form import AffineDrift

PREDICTIONS = ("epsilon", "v_prediction", "residual")

CHUNK_BYTES = 2**28
"""Of the bases of several samples, each with that of its class, on a GPU."""

FIT_ROWS = 4096
"""Samples that a covariance is summed up from at a time."""

_quiet = threading.Lock()


def _rows(x0: Tensor, index: Tensor, in_range: Callable[[Tensor], Tensor]) -> Tensor:
    return in_range(x0[index]).flatten(1).double()


class GaussianLevel(nn.Module):
    """The exact denoiser of one Gaussian per class, low rank plus isotropic.

    For x0 ~ N(mu, S), S = Q diag(v) Q^T + r (I - Q Q^T), the expected noise given x is
    sqrt(1 - a) (a S + (1 - a) I)^-1 (x - sqrt(a) mu) with a = alpha_bar[t]; cf. Wang & Vastola,
    "The unreasonable effectiveness of Gaussian score approximation" (2024).

    Buffers: mean (classes, d), basis Q (classes, d, rank), variance v (classes, rank),
    residual r (classes,), all float32, with d the number of values of a sample.
    """

    mean: Tensor
    basis: Tensor
    variance: Tensor
    residual: Tensor
    alpha_bar: Tensor

    def __init__(self, classes: int, d: int, rank: int, alpha_bar: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(classes, d))
        self.register_buffer("basis", torch.zeros(classes, d, rank))
        self.register_buffer("variance", torch.zeros(classes, rank))
        self.register_buffer("residual", torch.zeros(classes))
        self.register_buffer("alpha_bar", torch.tensor(alpha_bar, dtype=torch.float32), persistent=False)

    def fit(self, x0: Tensor, label: Tensor, in_range: Callable[[Tensor], Tensor] = Tensor.double) -> None:
        """Take mean and covariance per class from x0 (n, C, H, W) and label (n,).

        `in_range` takes some of x0 to the ladder's value range; there may not be memory for all of it at once.
        """
        d, rank = self.basis.shape[1:]
        for c in range(self.mean.shape[0]):
            members = (label == c).nonzero(as_tuple=True)[0]
            parts = members.split(FIT_ROWS)
            mean = sum((_rows(x0, part, in_range).sum(0) for part in parts), torch.zeros(d).double()) / len(members)
            self.mean[c] = mean
            if len(members) > d:
                covariance = torch.zeros(d, d).double()
                for part in parts:
                    centred = _rows(x0, part, in_range) - mean
                    covariance += centred.T @ centred
                covariance /= len(members) - 1
                total = covariance.trace()
                value, vector = torch.linalg.eigh(covariance)
            else:
                # The same eigenvalues from a smaller matrix; all others are 0, and their directions do not matter.
                centred = (_rows(x0, members, in_range) - mean) / math.sqrt(len(members) - 1)
                total = centred.square().sum()
                value, left = torch.linalg.eigh(centred @ centred.T)
                value, left = value[1:], left[:, 1:]
                vector = centred.T @ left / value.clamp(min=1e-12).sqrt()
            top = min(rank, len(value))
            self.variance[c, rank - top :] = value[-top:].clamp(min=0)
            self.basis[c, :, rank - top :] = vector[:, -top:]
            self.residual[c] = (total - value[-top:].sum()).clamp(min=0) / (d - rank)

    def orthonormalise(self) -> None:
        """Make the columns of Q orthonormal but for float32, which those that are stored in half precision are not.

        By one step of Newton and Schulz, Q <- Q (3 I - Q^T Q) / 2, which squares how far they are off; a factorisation
        would take several times as long, and round by the number of threads.
        """
        for basis in self.basis:
            # Others are no directions of the fit.
            unit = (basis.norm(dim=0) - 1).abs() < 0.01
            q = basis[:, unit].double()
            basis[:, unit] = (1.5 * q - 0.5 * q @ (q.T @ q)).float()

    def forward(self, x: Tensor, t: Tensor, label: Tensor, *_: Tensor) -> Tensor:
        """Predicted noise for x (B, C, H, W) float32 at timesteps t (B,) int64 with classes label (B,) int64."""
        flat = x.flatten(1)
        a = self.alpha_bar[t][:, None]
        if x.is_cuda:
            size = max(1, CHUNK_BYTES // self.basis[0].nbytes)
            parts = zip(flat.split(size), a.split(size), label.split(size), strict=True)
            return torch.cat([self._gathered(*part) for part in parts]).view_as(x)
        out = torch.empty_like(flat)
        # A loop over the classes present: gathering one basis per sample would move far more memory than it computes.
        for c in label.unique().tolist():
            rows = (label == c).nonzero(as_tuple=True)[0]
            ac = a[rows]
            centred = flat[rows] - ac.sqrt() * self.mean[c]
            outside = 1 / (ac * self.residual[c] + 1 - ac)
            inside = 1 / (ac * self.variance[c] + 1 - ac)
            thin = ((inside - outside) * (centred @ self.basis[c])) @ self.basis[c].T
            out[rows] = (1 - ac).sqrt() * (outside * centred + thin)
        return out.view_as(x)

    def _gathered(self, x: Tensor, a: Tensor, label: Tensor) -> Tensor:
        """The same for x (B, d) and a (B, 1) by kernels that do not depend on values, as a CUDA graph needs them."""
        basis, residual = self.basis[label], self.residual[label][:, None]
        centred = x - a.sqrt() * self.mean[label]
        outside = 1 / (a * residual + 1 - a)
        inside = 1 / (a * self.variance[label] + 1 - a)
        thin = (inside - outside) * torch.bmm(centred[:, None], basis)[:, 0]
        return (1 - a).sqrt() * (outside * centred + torch.bmm(basis, thin[:, :, None])[:, :, 0])

    def affine(self, t: np.ndarray) -> AffineDrift:
        """The same drift at timesteps t (N,), as numbers by eigenmode."""
        a = self.alpha_bar.double().cpu().numpy()[t][:, None]
        variance = torch.cat([self.variance, self.residual[:, None]], 1).double().cpu().numpy()
        gain = np.sqrt(1 - a) / (a * variance[:, None] + 1 - a)
        return AffineDrift(self.mean, self.basis, gain, np.sqrt(a[:, 0]))


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


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Silence progress bars and warnings of diffusers in this process, not its errors; one thread at a time."""
    from diffusers.utils import logging

    with _quiet:
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity(max(verbosity, ERROR))
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


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
