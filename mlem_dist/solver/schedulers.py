"""Scheduler configurations of diffusers: the classes and keys that are understood, and their beta schedules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlem_dist.errors import UsageError

BANDS = 10
"""Number of bands of timesteps for which errors are measured separately."""

DEFAULTS: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "trained_betas": None,
}
"""Keys that define the noise schedule, with their defaults in most schedulers of diffusers."""

LINEAR: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
SCALED: Mapping[str, Any] = {**LINEAR, "beta_schedule": "scaled_linear"}
"""Betas of Stable Diffusion, which are the defaults of some classes: linear, or with a linear square root."""

BETA_SCHEDULERS: Mapping[str, Mapping[str, Any]] = {
    "DDIMInverseScheduler": {},
    "DDIMParallelScheduler": {},
    "DDIMScheduler": {},
    "DDPMParallelScheduler": {},
    "DDPMScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepInverseScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSDEScheduler": LINEAR,
    "DPMSolverSinglestepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": LINEAR,
    "KDPM2AncestralDiscreteScheduler": LINEAR,
    "KDPM2DiscreteScheduler": LINEAR,
    "LCMScheduler": SCALED,
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {},
    "RePaintScheduler": {},
    "SASolverScheduler": {},
    "TCDScheduler": SCALED,
    "UnCLIPScheduler": {"beta_schedule": "squaredcos_cap_v2"},
    "UniPCMultistepScheduler": {},
}
"""Scheduler classes whose noise schedule is given by betas, with their defaults where these differ from `DEFAULTS`."""

MULTISTEP = {
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
}
"""Classes of `BETA_SCHEDULERS` with solvers of several steps. They are flows if `use_flow_sigmas` is true. For N steps,
they lay out N + 1 timesteps and take the first N."""

FLOW_SCHEDULERS = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}
"""Scheduler classes of flow matching."""

EDM_SCHEDULERS = {"EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"}
"""Scheduler classes of EDM's preconditioning (Karras et al., arXiv:2206.00364)."""

SCORE_SCHEDULERS = {"ScoreSdeVeScheduler"}
"""Scheduler classes of variance-exploding processes whose networks predict the score (Song et al.,
arXiv:2011.13456)."""

OTHER_SCHEDULE = "the noise schedule of models that need it is not understood"

NEUTRAL: Mapping[str, tuple[Any, str]] = {
    "predict_epsilon": (True, "`prediction_type` says what a model predicts"),
    "snr_shift_scale": (1, OTHER_SCHEDULE),
    "sigma_min": (None, OTHER_SCHEDULE),
    "sigma_max": (None, OTHER_SCHEDULE),
    "timestep_type": ("discrete", OTHER_SCHEDULE),
    "invert_sigmas": (False, OTHER_SCHEDULE),
    "stochastic_sampling": (False, OTHER_SCHEDULE),
}
"""Keys that change the noise schedule, with the only value that is understood and the reason in the error message."""

FLOW_KEYS = {
    "base_image_seq_len",
    "base_shift",
    "flow_shift",
    "max_image_seq_len",
    "max_shift",
    "shift",
    "shift_terminal",
    "time_shift_type",
    "use_dynamic_shifting",
    "use_flow_sigmas",
}
"""Keys of flow matching."""

EDM_KEYS = {"rho", "sigma_data", "sigma_max", "sigma_min", "sigma_schedule"}
"""Keys of EDM's preconditioning and noise levels."""

SCORE_KEYS = {"correct_steps", "sampling_eps", "sigma_max", "sigma_min", "snr"}
"""Keys of variance-exploding processes; `correct_steps` and `snr` affect diffusers' sampler only."""

SAMPLING = {
    "algorithm_type",
    "clip_sample",
    "clip_sample_range",
    "corrector_order",
    "disable_corrector",
    "dynamic_thresholding_ratio",
    "eta",
    "euler_at_final",
    "final_sigmas_type",
    "interpolation_type",
    "lambda_min_clipped",
    "lower_order_final",
    "noise_sampler_seed",
    "original_inference_steps",
    "predict_x0",
    "predictor_order",
    "sample_max_value",
    "set_alpha_to_one",
    "skip_prk_steps",
    "solver_order",
    "solver_p",
    "solver_type",
    "steps_offset",
    "tau_func",
    "tensor_format",
    "thresholding",
    "time_shift_type",
    "timestep_scaling",
    "timestep_spacing",
    "timestep_values",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
    "variance_type",
}
"""Keys that affect only the times at which a scheduler samples, or its steps between them."""


NEUTRAL_FLOW: Mapping[str, tuple[Any, str]] = {
    "use_flow_sigmas": (False, "this class is known with the noise schedule of its betas only"),
    "flow_shift": (1, OTHER_SCHEDULE),
    "use_dynamic_shifting": (False, OTHER_SCHEDULE),
    "shift_terminal": (None, OTHER_SCHEDULE),
}
"""As `NEUTRAL`: the keys of flow matching in configurations whose noise schedule is given by betas."""


def scheduler_class(config: Mapping[str, Any]) -> str:
    """The name of a configuration's scheduler class; "DDPMScheduler" if it has none.

    Raises:
        UsageError: if the class is unknown, a key is unknown, or a key that changes the schedule has a value that is
            not understood.
    """
    name = str(config.get("_class_name") or "DDPMScheduler")
    if is_flow(config):
        own, neutral = FLOW_KEYS, NEUTRAL
    elif name in EDM_SCHEDULERS:
        own, neutral = EDM_KEYS, NEUTRAL
    elif name in SCORE_SCHEDULERS:
        own, neutral = SCORE_KEYS, NEUTRAL
    elif name in BETA_SCHEDULERS:
        own, neutral = set(), {**NEUTRAL, **NEUTRAL_FLOW}
    else:
        raise UsageError(
            f"noise schedule: _class_name is {name!r}, expected a scheduler of diffusers whose noise schedule is "
            "known: DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, EDMEulerScheduler ...; "
            "use models trained for one"
        )
    for key, (value, why) in neutral.items():
        if key not in own and config.get(key) not in (None, value):
            given = json.dumps(config[key], default=str)
            raise UsageError(f"noise schedule: {key} is {given}, expected {json.dumps(value)}: {why}")
    known = {*DEFAULTS, *neutral, *SAMPLING, *own, "prediction_type", "rescale_betas_zero_snr"}
    for key in sorted(map(str, config.keys() - known)):
        if not key.startswith("_"):
            raise UsageError(
                f"noise schedule: the key {key!r} is unknown, expected those of diffusers' {name}; remove it if the "
                "schedule is the same without it"
            )
    return name


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's configuration is that of flow matching."""
    name = config.get("_class_name")
    return name in FLOW_SCHEDULERS or (name in MULTISTEP and bool(config.get("use_flow_sigmas")))


def alpha_bar(config: Mapping[str, Any]) -> np.ndarray:
    """The cumulative product of 1 - beta of a diffusers scheduler configuration.

    Args:
        config: as in `scheduler_config.json`: the keys `num_train_timesteps`, `beta_schedule` ("linear",
            "scaled_linear" or "squaredcos_cap_v2"), `beta_start` and `beta_end`, or `trained_betas`, and
            `rescale_betas_zero_snr`. Missing keys have the defaults of the class in `_class_name`.

    Returns:
        float64 array of shape (num_train_timesteps,), strictly decreasing, in (0, 1). The last value is 0 if
        `rescale_betas_zero_snr` is true.

    Raises:
        UsageError: if the schedule is unknown, or its values are not a valid noise schedule.
    """
    name = scheduler_class(config)
    given = {**DEFAULTS, **BETA_SCHEDULERS[name], **config}
    n, kind, start, end = (given[key] for key in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end"))
    if not isinstance(n, int) or n < BANDS:
        raise UsageError(f"noise schedule: num_train_timesteps is {n!r}, expected an integer of {BANDS} or more")
    if given["trained_betas"] is not None:
        beta = np.asarray(given["trained_betas"], dtype=np.float64)
    elif kind == "linear":
        beta = np.linspace(start, end, n, dtype=np.float64)
    elif kind == "scaled_linear":
        beta = np.linspace(max(start, 0) ** 0.5, max(end, 0) ** 0.5, n, dtype=np.float64) ** 2
    elif kind == "squaredcos_cap_v2":
        edge = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1 - edge[1:] / edge[:-1], 0.999)
    else:
        raise UsageError(
            f"noise schedule: beta_schedule {kind!r} is unknown, expected linear, scaled_linear or squaredcos_cap_v2"
        )
    if beta.shape != (n,) or not ((beta > 0) & (beta < 1)).all():
        raise UsageError(f"noise schedule: expected {n} betas strictly between 0 and 1")
    product = np.cumprod(1 - beta)
    if given.get("rescale_betas_zero_snr"):
        product = _zero_terminal_snr(product)
    # Levels hold alpha_bar in float32.
    low = product.astype(np.float32)[: -1 if given.get("rescale_betas_zero_snr") else None]
    if not ((low > 0) & (low < 1)).all() or (np.diff(product) >= 0).any():
        raise UsageError(
            f"noise schedule: alpha_bar goes from {product[0]:.3g} to {product[-1]:.3g}, expected it to fall at each "
            "step and to be between 0 and 1 in float32; take other betas"
        )
    return product


def _zero_terminal_snr(product: np.ndarray) -> np.ndarray:
    """alpha_bar shifted and scaled so that it ends at 0 and keeps its first value (Lin et al., arXiv:2305.08891)."""
    root = np.sqrt(product)
    return np.asarray(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)
