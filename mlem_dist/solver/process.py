"""Processes: the mixture x = alpha x0 + sigma epsilon of image and noise, as a function of a network's time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mlem_dist.errors import UsageError
from mlem_dist.solver.conversion import SIGMA_DATA, combination
from mlem_dist.solver.schedulers import (
    EDM_SCHEDULERS,
    FLOW_SCHEDULERS,
    MULTISTEP,
    SCORE_SCHEDULERS,
    alpha_bar,
    is_flow,
    scheduler_class,
)
from mlem_dist.solver.steps import Spacing

Values = TypeVar("Values", np.ndarray, Tensor)

LEADING = {
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "TCDScheduler",
}
"""Scheduler classes whose default spacing is "leading"."""

CONTINUOUS = {
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
}
"""Scheduler classes that do not round timesteps in the spacing "linspace"."""


FLOOR = 0.1
"""Ratio of alpha to sigma below which `Grid.finite_log_snr` hardly changes, on grids that begin at pure noise."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The times of N steps, with alpha and sigma at each step and after the last.

    Attributes:
        t: time inputs of networks, float64 (N,).
        alpha: float64 (N + 1,).
        sigma: float64 (N + 1,), decreasing.
        scale: standard deviation of the initial state.
    """

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    scale: float = 1.0

    def __len__(self) -> int:
        return len(self.t)

    @property
    def log_snr(self) -> np.ndarray:
        """lambda = log(alpha / sigma) at each step, float64 (N,); minus infinity at alpha = 0."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(self.alpha[:-1]) - np.log(self.sigma[:-1]))

    @property
    def finite_log_snr(self) -> np.ndarray:
        """lambda or, on a grid that begins at alpha = 0, log(alpha / sigma + `FLOOR`), float64 (N,), increasing.

        Plans take their lines of extrapolation and the density of their calls in this variable.
        """
        return self.log_snr if self.alpha[0] else np.log(self.alpha[:-1] / self.sigma[:-1] + FLOOR)


class Process(ABC):
    """A noise process, defined by its marginals.

    Attributes:
        drift: the prediction to which the outputs of levels are converted; its step tables are finite on every grid.
        prediction: the prediction of a network trained with the scheduler.
        sigma_data: standard deviation of the data in EDM's preconditioning.
        length: T, the number of training timesteps.
    """

    length: int
    drift: str = "epsilon"
    prediction: str = "epsilon"
    sigma_data: float = SIGMA_DATA

    @abstractmethod
    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at the times t (B,), each float32 (B,) like t."""

    @abstractmethod
    def grid(self, steps: int, spacing: Spacing = "trailing") -> Grid:
        """The grid of `steps` steps.

        Raises:
            UsageError: if `steps` is out of range.
        """

    @abstractmethod
    def times(self, band: int, bands: int, count: int, rng: torch.Generator) -> Tensor:
        """Random times (count,) from band number `band` of `bands` equal bands of noise; band 0 has the least noise."""

    def mixed(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x = alpha x0 + sigma noise at times t (B,), in the shape of x0 (B, C, H, W)."""
        alpha, sigma = (value[:, None, None, None] for value in self.marginal(t))
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The training target of the drift at x = `mixed(x0, noise, t)`, in the shape of x0 (B, C, H, W)."""
        if self.drift == "epsilon":
            return noise
        alpha, sigma = (value[:, None, None, None] for value in self.marginal(t))
        image, share = combination(self.drift, alpha, sigma)
        return image * x0 + share * noise

    def input_scale(self, sigma: Any) -> Any:
        """The factor on x (B, C, H, W) before it enters a network: 1 except in EDM's preconditioning."""
        return 1 / (sigma**2 + self.sigma_data**2) ** 0.5 if self.prediction.startswith("edm") else 1.0


class BetaProcess(Process):
    """A variance-preserving process, alpha^2 + sigma^2 = 1, with alpha^2 = alpha_bar at the timesteps of its betas.

    Between timesteps, sigma / alpha is linear, as in diffusers; for Karras' noise levels, its logarithm is linear.

    Args:
        config: a scheduler's configuration.

    Raises:
        UsageError: as for `schedulers.alpha_bar`, or if alpha reaches 0 and the prediction is the noise.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.name = scheduler_class(config)
        self.alpha_bar = alpha_bar(config)
        self.prediction = _prediction(config, ("epsilon", "sample", "v_prediction"))
        if not self.alpha_bar[-1]:
            if self.prediction == "epsilon":
                raise UsageError(
                    "noise schedule: rescale_betas_zero_snr is true, and prediction_type is 'epsilon', expected "
                    "'v_prediction' or 'sample': at pure noise a prediction of the noise says nothing of the image"
                )
            self.drift = "v_prediction"
        self.length = len(self.alpha_bar)
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def times(self, band: int, bands: int, count: int, rng: torch.Generator) -> Tensor:
        """As `Process.times`: timesteps from band T / bands up to but not including (band + 1) T / bands, int64."""
        return torch.randint(band * self.length // bands, (band + 1) * self.length // bands, (count,), generator=rng)

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """As `Process.marginal`, for timesteps from 0 to T - 1."""
        key = t.device, t.dtype if t.is_floating_point() else torch.float32
        if key not in self._tables:
            # Derivatives cannot use tensors that were made in inference mode.
            with torch.inference_mode(False):
                self._tables[key] = torch.tensor(self.alpha_bar, dtype=key[1], device=t.device)
        table = self._tables[key]
        below = t.long()
        a = table[below]
        if t.is_floating_point():
            low, high = (((1 - table[i]) / table[i]).sqrt() for i in (below, (below + 1).clamp(max=len(table) - 1)))
            share = t - below
            if self.config.get("use_karras_sigmas"):
                ratio = torch.lerp(low.log(), high.log(), share).exp()
            else:
                ratio = torch.lerp(low, high, share)
            a = torch.where(share == 0, a, 1 / (1 + ratio.square()))
        return a.sqrt(), (1 - a).sqrt()

    def grid(self, steps: int, spacing: Spacing = "trailing") -> Grid:
        """As `Process.grid`: timesteps at the ends of equal intervals, or by the configuration's own spacing.

        Raises:
            UsageError: if `steps` is out of range, or the configuration's own spacing is not understood.
        """
        count = self.length
        if not 1 <= steps <= count:
            raise UsageError(f"steps is {steps}, expected 1 to {count}, the length of the ladder's noise schedule")
        last = 1.0
        if spacing == "trailing":
            t = _trailing(count, steps)
        else:
            t = self._configured(steps)
            ends_at_one = self.config.get("set_alpha_to_one", self.name != "PNDMScheduler")
            if not ends_at_one or self.config.get("final_sigmas_type") == "sigma_min":
                last = float(self.alpha_bar[0])
        a = np.append(self._alpha_bar_at(t), last)
        return Grid(t, np.sqrt(a), np.sqrt(1 - a))

    def _alpha_bar_at(self, t: np.ndarray) -> np.ndarray:
        alpha, _ = self.marginal(torch.from_numpy(t))
        return alpha.square().numpy() if (t % 1).any() else self.alpha_bar[t.astype(np.int64)]

    def _configured(self, steps: int) -> np.ndarray:
        """The timesteps of diffusers for this configuration, float64 (steps,).

        Raises:
            UsageError: if a key asks for another kind of noise levels, or `steps` for timesteps out of range.
        """
        count, name = self.length, self.name
        for key in ("use_beta_sigmas", "use_exponential_sigmas", "use_lu_lambdas"):
            if self.config.get(key):
                raise UsageError(f"noise schedule: {key} is true, which `grid` model does not know; use trailing")
        if self.config.get("interpolation_type") not in (None, "linear"):
            raise UsageError("noise schedule: interpolation_type is not linear, which `grid` model does not know")
        offset = self.config.get("steps_offset") or 0
        extra = int(name in MULTISTEP)
        kind = self.config.get("timestep_spacing") or ("leading" if name in LEADING else "linspace")
        if kind == "leading":
            t = np.arange(steps + extra)[::-1] * (count // (steps + extra)) + float(offset)
        elif kind == "linspace":
            t = np.linspace(0, count - 1, steps + extra)[::-1].copy()
            t = t if name in CONTINUOUS else t.round()
        else:
            t = _trailing(count, steps)
        t = t[:steps]
        if self.config.get("use_karras_sigmas"):
            alpha, sigma = self.marginal(torch.from_numpy(t))
            ratio = _karras(float(sigma[0] / alpha[0]), float(sigma[-1] / alpha[-1]), steps)
            known = np.log(np.sqrt((1 - self.alpha_bar) / self.alpha_bar))
            t = np.interp(np.log(ratio), known, np.arange(count))
        if not 0 <= t.min() <= t.max() <= count - 1:
            raise UsageError(f"steps is {steps}, and steps_offset {offset}: beyond the {count} timesteps; lower either")
        return np.ascontiguousarray(t, dtype=np.float64)


class FlowProcess(Process):
    """Flow matching: alpha = 1 - sigma, and the time input of networks is T sigma.

    Args:
        config: a scheduler's configuration.
        tokens: the length of a sample's sequence of patches, which determines a dynamic shift.
        even: whether pipelines give the noise levels 1, 1 - 1/N ... 1/N to the scheduler, which has others of its own.

    Raises:
        UsageError: as for `schedulers.scheduler_class`, or if the configuration asks for other noise levels, or if the
            shift is dynamic and `tokens` is None.
    """

    drift = prediction = "flow_prediction"

    def __init__(self, config: Mapping[str, Any], tokens: int | None = None, even: bool = False) -> None:
        self.config = config
        self.name = scheduler_class(config)
        self.even = even and self.name in FLOW_SCHEDULERS
        _prediction(config, ("flow_prediction",))
        self.length = config.get("num_train_timesteps") or 1000
        self.shift = float(config.get("flow_shift" if self.name not in FLOW_SCHEDULERS else "shift") or 1.0)
        for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"):
            if config.get(key):
                raise UsageError(f"noise schedule: {key} is true, which is not understood for flows")
        if config.get("use_dynamic_shifting"):
            if tokens is None:
                raise UsageError("noise schedule: use_dynamic_shifting is true, and the number of tokens is not known")
            mu = _dynamic_shift(config, tokens)
            self.shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """As `Process.marginal`, for times from 0 to T."""
        sigma = t / self.length
        return 1 - sigma, sigma

    def times(self, band: int, bands: int, count: int, rng: torch.Generator) -> Tensor:
        """As `Process.times`, in equal bands of sigma."""
        return (band + torch.rand(count, generator=rng)) / bands * self.length

    def grid(self, steps: int, spacing: Spacing = "trailing") -> Grid:
        """As `Process.grid`: noise levels 1, 1 - 1/N ... 1/N, or those of the pipeline, after the shift."""
        if not 1 <= steps <= self.length:
            raise UsageError(f"steps is {steps}, expected 1 to {self.length}, the length of the noise schedule")
        sigma = np.arange(steps, 0, -1) / steps
        if spacing == "model" and not self.even:
            if self.name in FLOW_SCHEDULERS:
                # A static shift applies twice: diffusers takes the ends from the shifted schedule.
                ends = np.array([1.0, 1 / self.length])
                first, last = ends if self.config.get("use_dynamic_shifting") else self.shifted(ends)
                sigma = np.linspace(first, last, steps)
            elif self.name == "UniPCMultistepScheduler":
                sigma = np.linspace(1, 1 / self.length, steps + 1)[:-1]
            else:
                sigma = (1 - np.linspace(1, 1 / self.length, steps + 1))[::-1][:-1]
        sigma = self.shifted(sigma)
        if terminal := self.config.get("shift_terminal"):
            sigma = 1 - (1 - sigma) * (1 - terminal) / (1 - sigma[-1]) if steps > 1 else sigma
        t = sigma * self.length
        if spacing == "model" and self.name not in FLOW_SCHEDULERS:
            # These classes give networks whole timesteps.
            t = np.trunc(t)
        sigma = np.append(sigma, 0.0)
        return Grid(t, 1 - sigma, sigma)

    def shifted(self, sigma: Values) -> Values:
        """Noise levels s sigma / (1 + (s - 1) sigma), shifted by s (Esser et al., arXiv:2403.03206, eq. 23)."""
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)


class ExplodingProcess(Process):
    """A variance-exploding process: alpha = 1, with noise levels sigma between two bounds.

    Args:
        config: a scheduler's configuration.
        high: default of the greatest noise level.
        low: default of the least noise level.

    Raises:
        UsageError: as for `schedulers.scheduler_class`, or unless 0 < low < high.
    """

    def __init__(self, config: Mapping[str, Any], high: float, low: float) -> None:
        self.config = config
        self.name = scheduler_class(config)
        self.length = config.get("num_train_timesteps") or 1000
        self.high, self.low = float(config.get("sigma_max") or high), float(config.get("sigma_min") or low)
        if not 0 < self.low < self.high < math.inf:
            raise UsageError(
                f"noise schedule: sigma_min is {self.low:g} and sigma_max {self.high:g}, expected 0 < sigma_min < "
                "sigma_max"
            )

    @abstractmethod
    def time(self, sigma: Any) -> Any:
        """The time input of networks at the noise level sigma, a tensor or an array."""

    def times(self, band: int, bands: int, count: int, rng: torch.Generator) -> Tensor:
        """As `Process.times`, in equal bands of log(sigma)."""
        share = (band + torch.rand(count, generator=rng)) / bands
        return torch.as_tensor(self.time(self.low * (self.high / self.low) ** share))

    def _exponential(self, steps: int) -> np.ndarray:
        """Noise levels that fall by equal factors, float64 (steps,)."""
        if steps < 1:
            raise UsageError(f"steps is {steps}, expected at least 1")
        return np.exp(np.linspace(math.log(self.high), math.log(self.low), steps))


class EDMProcess(ExplodingProcess):
    """EDM: networks take the time log(sigma) / 4, with scaled input and output (Karras et al., arXiv:2206.00364).

    Args:
        config: a scheduler's configuration.

    Raises:
        UsageError: as for `ExplodingProcess`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config, 80.0, 0.002)
        self.prediction = "edm" if _prediction(config, ("epsilon", "v_prediction")) == "epsilon" else "edm_v"
        self.sigma_data = float(config.get("sigma_data") or SIGMA_DATA)

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """As `Process.marginal`, for times log(sigma) / 4."""
        return torch.ones_like(t), (4 * t).exp()

    def time(self, sigma: Any) -> Any:
        """As `ExplodingProcess.time`."""
        return (sigma.log() if isinstance(sigma, Tensor) else np.log(sigma)) / 4

    def grid(self, steps: int, spacing: Spacing = "trailing") -> Grid:
        """As `Process.grid`, in either spacing: the noise levels of `sigma_schedule`, and 0 after the last step."""
        sigma = self._exponential(steps)
        if self.config.get("sigma_schedule") != "exponential":
            sigma = _karras(self.high, self.low, steps, self.config.get("rho") or 7.0)
        # Diffusers' standard deviation of the initial state.
        return Grid(self.time(sigma), np.ones(steps + 1), np.append(sigma, 0.0), math.hypot(self.high, 1))


class ScoreProcess(ExplodingProcess):
    """The process of score networks, whose time input is sigma (Song et al., arXiv:2011.13456).

    Args:
        config: a scheduler's configuration.

    Raises:
        UsageError: as for `ExplodingProcess`.
    """

    prediction = "score"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config, 1348.0, 0.01)

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """As `Process.marginal`, for times sigma."""
        return torch.ones_like(t), t

    def time(self, sigma: Any) -> Any:
        """As `ExplodingProcess.time`."""
        return sigma

    def grid(self, steps: int, spacing: Spacing = "trailing") -> Grid:
        """As `Process.grid`, in either spacing: noise levels that fall by equal factors, and 0 after the last step."""
        sigma = self._exponential(steps)
        return Grid(sigma, np.ones(steps + 1), np.append(sigma, 0.0), self.high)


def process_of(config: Mapping[str, Any], tokens: int | None = None, even: bool = False) -> Process:
    """The process of a diffusers scheduler's configuration, as in `scheduler_config.json`.

    Args:
        config: the configuration; without `_class_name` that of a DDPMScheduler.
        tokens, even: as for `FlowProcess`.

    Raises:
        UsageError: if the class, a key or a value is not understood.
    """
    name = scheduler_class(config)
    if is_flow(config):
        return FlowProcess(config, tokens, even)
    if name in EDM_SCHEDULERS:
        return EDMProcess(config)
    if name in SCORE_SCHEDULERS:
        return ScoreProcess(config)
    return BetaProcess(config)


def _prediction(config: Mapping[str, Any], known: tuple[str, ...]) -> str:
    """The `prediction_type` of a configuration, by default the first of `known`.

    Raises:
        UsageError: if it is not in `known`.
    """
    kind = config.get("prediction_type") or known[0]
    if kind not in known:
        raise UsageError(f"noise schedule: prediction_type is {kind!r}, expected {' or '.join(map(repr, known))}")
    return str(kind)


def _trailing(count: int, steps: int) -> np.ndarray:
    """The timesteps count, count - count / steps ..., less 1, rounded: diffusers' spacing "trailing"."""
    # The slice drops the extra element that `arange` returns for some `steps`.
    return np.asarray(np.arange(count, 0, -count / steps)[:steps].round() - 1)


def _karras(high: float, low: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """Noise levels from high to low, equally spaced in their rho-th root (Karras et al., arXiv:2206.00364, eq. 5)."""
    return np.asarray(np.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho)


def _dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    """The logarithm mu of a dynamic shift, linear in the number of tokens, as in FLUX and SD3.5."""
    few, many = config.get("base_image_seq_len") or 256, config.get("max_image_seq_len") or 4096
    low, high = (config.get(key) or value for key, value in (("base_shift", 0.5), ("max_shift", 1.15)))
    return float(low + (high - low) * (tokens - few) / (many - few))
