"""Noise schedules in the diffusers format."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlem_dist.errors import UsageError

BANDS = 10
"""Of timesteps, in which errors are measured."""


def alpha_bar(config: Mapping[str, Any]) -> np.ndarray:
    """The cumulative product of 1 - beta of a diffusers scheduler configuration.

    Args:
        config: the keys `num_train_timesteps`, `beta_schedule` ("linear", "scaled_linear" or
            "squaredcos_cap_v2"), `beta_start`, `beta_end`, or `trained_betas`, as in
            `scheduler_config.json`; `prediction_type` is "epsilon", if it is there.

    Returns:
        float64 array of shape (num_train_timesteps,), strictly decreasing, in (0, 1).

    Raises:
        UsageError: if the schedule is unknown or its values are not a valid noise schedule.
    """
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise UsageError(f"noise schedule: prediction_type is {config['prediction_type']!r}, expected 'epsilon'")
    if config.get("rescale_betas_zero_snr"):
        raise UsageError(
            "noise schedule: rescale_betas_zero_snr is true, expected false: where alpha_bar is 0 a prediction of the "
            "noise says nothing of the image"
        )
    n = config.get("num_train_timesteps", 1000)
    if not isinstance(n, int) or n < BANDS:
        raise UsageError(f"noise schedule: num_train_timesteps is {n!r}, expected an integer of {BANDS} or more")
    kind = config.get("beta_schedule", "linear")
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if config.get("trained_betas") is not None:
        beta = np.asarray(config["trained_betas"], dtype=np.float64)
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
    found = np.cumprod(1 - beta)
    # As levels have it.
    low = found.astype(np.float32)
    if not ((low > 0) & (low < 1)).all() or (np.diff(found) >= 0).any():
        raise UsageError(
            f"noise schedule: alpha_bar goes from {found[0]:.3g} to {found[-1]:.3g}, expected it to fall at each step "
            "and to be between 0 and 1 in float32; take other betas"
        )
    return found
