"""Levels: approximators of one drift, each a torch module."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from mlem_dist.errors import UsageError
from mlem_dist.models.activations import activation_bytes
from mlem_dist.models.families import FAMILIES
from mlem_dist.models.families.family import Family
from mlem_dist.models.gaussian import GaussianLevel
from mlem_dist.models.imports import quiet_diffusers
from mlem_dist.solver.condition import LABEL, Condition
from mlem_dist.solver.conversion import PREDICTIONS, combination, convert
from mlem_dist.solver.integrate import Known
from mlem_dist.solver.process import Process

TOKENS = 77
"""Number of tokens of a placeholder for a text: that of CLIP."""


class ModelLevel(nn.Module):
    """A model of diffusers behind a pixel-unshuffle by `patch` (1 for none), as a drift of its process.

    The model's output is one of `conversion.PREDICTIONS`, which the level converts to the drift, or the "residual" u in

        epsilon = (x - alpha x0) / sigma + alpha u(x, x0)

    where x0 is the expected image of the Gaussian level that it corrects, clamped to [-1, 1]. The model takes x0 as
    additional channels. A small model then does not spend its capacity on the linear part of the drift. The clamp alone
    reduces the error considerably where images are black or white.

    The model computes in the dtype `precision` of its weights; all other computation is float32.

    Attributes:
        takes: number of the Gaussian level whose value a residual takes, in a tuple; empty for other predictions.
    """

    def __init__(
        self,
        model: nn.Module,
        patch: int,
        prediction: str,
        process: Process,
        gaussian: GaussianLevel | None,
        precision: torch.dtype = torch.float32,
        corrects: int = 1,
        family: Family = FAMILIES["UNet2DModel"],
    ) -> None:
        super().__init__()
        self.model = model
        self.patch = patch
        self.prediction = prediction
        self.process = process
        self.gaussian = gaussian
        self.precision = precision
        self.takes: tuple[int, ...] = () if gaussian is None else (corrects,)
        self.family = family

    def forward(self, x: Tensor, t: Tensor, condition: Condition, known: Known | None = None) -> Tensor:
        """Drift for x (B, C, H, W) float32 at times t (B,), with the tensors of the condition that the model takes.

        `known` has values of other levels at x and t, by number. A residual evaluates the Gaussian if it is not there.
        """
        alpha, sigma = (value[:, None, None, None] for value in self.process.marginal(t))
        if self.gaussian is None:
            scale = self.process.input_scale(sigma)
            out = self._model(x if isinstance(scale, float) else x * scale, t, condition)
            if self.prediction == self.process.drift:
                return out
            r, s = self._conversion(alpha, sigma)
            return s * out + r * x
        base = known[self.takes[0]] if known and self.takes[0] in known else self.gaussian(x, t, condition)
        x0 = ((x - sigma * base) / alpha).clamp(-1, 1)
        return (x - alpha * x0) / sigma + alpha * self._model(torch.cat([x, x0], 1), t, condition)

    def _model(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        small = pixel_unshuffle(x, self.patch).to(self.precision)
        out = self.family.predict(self.model, small, t, condition)
        # Levels return contiguous tensors, whatever the memory format of the model.
        return pixel_shuffle(out, self.patch).to(x.dtype).contiguous()

    def loss_weight(self, t: Tensor) -> Tensor:
        """The ratio of the squared error of the model's output to that of the drift, (B, 1, 1, 1)."""
        alpha, sigma = (value[:, None, None, None] for value in self.process.marginal(t))
        if self.prediction == "residual":
            return 1 / alpha.square()
        _, s = self._conversion(alpha, sigma)
        return torch.ones_like(alpha) / s**2

    def _conversion(self, alpha: Tensor, sigma: Tensor) -> tuple[Any, Any]:
        """Coefficients (r, s) in drift = r x + s output."""
        given = combination(self.prediction, alpha, sigma, self.process.sigma_data)
        return convert(given, combination(self.process.drift, alpha, sigma), alpha, sigma)


def new_unet_level(
    sample_shape: tuple[int, int, int],
    classes: int,
    patch: int,
    prediction: str,
    process: Process,
    model: Mapping[str, Any],
    gaussian: GaussianLevel | None,
) -> ModelLevel:
    """An untrained `ModelLevel` for samples of `sample_shape`, unconditional for 0 classes.

    `model` holds the other arguments of `UNet2DModel`; `gaussian` is the level that a "residual" corrects.
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
    return ModelLevel(unet, patch, prediction, process, gaussian)


def on_meta(name: str, sample_shape: tuple[int, int, int], patch: int, build: Callable[[], ModelLevel]) -> ModelLevel:
    """The level `name` from `build`, tested by a batch on torch's meta device, which stores no weights.

    Raises:
        UsageError: if the level cannot be built, fails on samples of this shape, or needs another condition than a
            ladder gives.
    """
    try:
        with quiet_diffusers(), torch.device("meta"), torch.no_grad():
            level = build()
            config: Any = level.model.config
            if reason := level.family.refusal(config, level.process):
                raise UsageError(f"level {name!r}: {reason}")
            # Two samples, as a condition of a wrong shape would broadcast to a single sample.
            _evaluate(level, sample_shape, 2)
    except UsageError:
        raise
    # Diffusers raises many types of errors for wrong arguments, often only in the forward pass.
    except Exception as error:
        size = "x".join(map(str, sample_shape))
        raise UsageError(
            f"level {name!r}: its model cannot be used for samples of {size} with patch {patch}: "
            f"{' '.join(str(error).split())}"
        ) from None
    return level


def level_bytes(level: ModelLevel, sample_shape: tuple[int, int, int]) -> int:
    """Bytes of activations per sample of an evaluation of a level of `on_meta`; see `activation_bytes`."""
    with torch.device("meta"):
        return activation_bytes(lambda batch: _evaluate(level, sample_shape, batch))


def _evaluate(level: ModelLevel, sample_shape: tuple[int, int, int], batch: int) -> Tensor:
    """A level's drift for samples and a condition without meaning."""
    config: Any = level.model.config
    x, condition = torch.empty(batch, *sample_shape), placeholder(level.family.inputs(config), batch)
    drift: Tensor = level(x, torch.ones(batch), condition, dict.fromkeys(level.takes, x))
    return drift


def placeholder(inputs: Mapping[str, tuple[int | None, ...]], batch: int) -> Condition:
    """Zeros for a condition of `Family.inputs`, with `TOKENS` for any length."""
    shapes = {name: [TOKENS if length is None else length for length in shape] for name, shape in inputs.items()}
    return {
        name: torch.zeros(batch, *shape, dtype=torch.int64 if name == LABEL else torch.float32)
        for name, shape in shapes.items()
    }


def check_prediction(name: str, prediction: str, process: Process) -> None:
    """Refuse a prediction that a UNet of the process cannot make.

    Raises:
        UsageError: if the prediction of level `name` is unknown, contradicts the scheduler's `prediction_type`, or is a
            residual while the drift is not the noise.
    """
    if prediction not in (*PREDICTIONS, "residual"):
        raise UsageError(
            f"level {name!r}: prediction is {prediction!r}, expected residual or one of {', '.join(PREDICTIONS)}"
        )
    if prediction == "residual" and process.drift != "epsilon":
        raise UsageError(
            f"level {name!r}: prediction is residual, expected {process.drift}: a residual corrects a prediction of "
            "the noise, which says nothing at the beginning of this noise schedule"
        )
    if process.prediction not in ("epsilon", prediction) and prediction != "residual":
        raise UsageError(
            f"level {name!r}: prediction is {prediction!r}, expected {process.prediction!r} by the prediction_type of "
            "the noise schedule; set either"
        )
    if process.prediction == "epsilon" and prediction in ("flow_prediction", "score", "edm", "edm_v"):
        raise UsageError(
            f"level {name!r}: prediction is {prediction!r}, which models of this noise schedule do not make; take the "
            "scheduler configuration that the model was trained with"
        )
