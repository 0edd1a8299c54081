"""Noise schedules in the diffusers format."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from mlem_dist.errors import UsageError

BANDS = 10
"""Number of bands of timesteps in which errors are measured."""

DEFAULTS: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "trained_betas": None,
}
"""Keys that give the noise schedule, with what most schedulers of diffusers take where they are left out."""

LINEAR: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
SCALED: Mapping[str, Any] = {**LINEAR, "beta_schedule": "scaled_linear"}
"""Betas of Stable Diffusion, by default those of some classes, linear or with a linear square root."""

SCHEDULERS: Mapping[str, Mapping[str, Any]] = {
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
"""Scheduler classes of diffusers whose noise schedule is that of their betas, with defaults other than `DEFAULTS`."""

PREDICTION = "what a model predicts is said by its level's prediction"
OTHER_SCHEDULE = "only models that were trained on the noise schedule of the betas can be used"

NEUTRAL: Mapping[str, tuple[Any, str]] = {
    "prediction_type": ("epsilon", PREDICTION),
    "predict_epsilon": (True, PREDICTION),
    "rescale_betas_zero_snr": (False, "where alpha_bar is 0 a prediction of the noise says nothing of the image"),
    "snr_shift_scale": (1, OTHER_SCHEDULE),
    "use_flow_sigmas": (False, OTHER_SCHEDULE),
    "flow_shift": (1, OTHER_SCHEDULE),
    "use_dynamic_shifting": (False, OTHER_SCHEDULE),
    "shift_terminal": (None, OTHER_SCHEDULE),
    "sigma_min": (None, OTHER_SCHEDULE),
    "sigma_max": (None, OTHER_SCHEDULE),
    "timestep_type": ("discrete", OTHER_SCHEDULE),
}
"""Keys that change the noise schedule or what a prediction means: the value that does not, and why no other may be."""

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
"""Keys that only choose the timesteps at which a scheduler of diffusers samples, or how it steps between them."""


def alpha_bar(config: Mapping[str, Any]) -> np.ndarray:
    """The cumulative product of 1 - beta of a diffusers scheduler configuration.

    Args:
        config: as in `scheduler_config.json`: the keys `num_train_timesteps`, `beta_schedule` ("linear",
            "scaled_linear" or "squaredcos_cap_v2"), `beta_start` and `beta_end`, or `trained_betas`. Those left out
            have the defaults of the class in `_class_name`, if it is there.

    Returns:
        float64 array of shape (num_train_timesteps,), strictly decreasing, in (0, 1).

    Raises:
        UsageError: if the schedule is unknown, not that of its betas, or its values are not a valid noise schedule.
    """
    name = config.get("_class_name") or "DDPMScheduler"
    _check_betas_decide(name, config)
    given = {**DEFAULTS, **SCHEDULERS[name], **config}
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
    # As levels have it.
    low = product.astype(np.float32)
    if not ((low > 0) & (low < 1)).all() or (np.diff(product) >= 0).any():
        raise UsageError(
            f"noise schedule: alpha_bar goes from {product[0]:.3g} to {product[-1]:.3g}, expected it to fall at each "
            "step and to be between 0 and 1 in float32; take other betas"
        )
    return product


def _check_betas_decide(name: str, config: Mapping[str, Any]) -> None:
    """Refuse the configuration of a class `name` whose noise schedule is not, or may not be, that of its betas.

    Raises:
        UsageError: the class is none of `SCHEDULERS`, a key is not known, or its value is not neutral.
    """
    if name not in SCHEDULERS:
        raise UsageError(
            f"noise schedule: _class_name is {name!r}, expected a scheduler of diffusers whose noise schedule is that "
            "of its betas, such as DDPMScheduler, DDIMScheduler or EulerDiscreteScheduler; use models trained for one"
        )
    for key, (neutral, why) in NEUTRAL.items():
        if config.get(key) not in (None, neutral):
            value = json.dumps(config[key], default=str)
            raise UsageError(f"noise schedule: {key} is {value}, expected {json.dumps(neutral)}: {why}")
    for key in sorted(map(str, config.keys() - {*DEFAULTS, *NEUTRAL, *SAMPLING})):
        if not key.startswith("_"):
            raise UsageError(
                f"noise schedule: the key {key!r} is unknown, expected those of diffusers' schedulers; remove it if "
                "the schedule is that of its betas without it"
            )


def add_noise(x0: Tensor, noise: Tensor, t: Tensor, a: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise, at timesteps t (B,) of the schedule a (T,)."""
    at = a[t][:, None, None, None]
    return at.sqrt() * x0 + (1 - at).sqrt() * noise
