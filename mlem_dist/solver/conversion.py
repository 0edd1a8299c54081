"""Conversion between the predictions of networks and the drifts of solvers.

With x = alpha x0 + sigma epsilon, every prediction is a combination A x0 + B epsilon of the image x0 and the noise
epsilon. The state x and one combination determine both, and hence every other combination.
"""

from __future__ import annotations

from typing import Any

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction", "score", "edm", "edm_v")
"""Predictions, by their names in diffusers where these exist: noise, image, v, flow velocity, score, and the raw
output of a network in EDM's preconditioning. "edm_v" is "edm" with c_out negated."""

SIGMA_DATA = 0.5
"""Default standard deviation of the data in EDM's preconditioning."""

Combination = tuple[Any, Any]
"""Coefficients (A, B) of A x0 + B epsilon, each a number, an array or a tensor."""


def combination(prediction: str, alpha: Any, sigma: Any, sigma_data: float = SIGMA_DATA) -> Combination:
    """The combination (A, B) of a prediction, for x = alpha x0 + sigma epsilon.

        epsilon          (0, 1)
        sample           (1, 0)
        v_prediction     (-sigma, alpha)                                 Salimans & Ho, arXiv:2202.00512
        flow_prediction  (-1, 1)                                         Lipman et al., arXiv:2210.02747
        score            (0, -1 / sigma)
        edm              ((1 - c_skip alpha) / c_out, -c_skip sigma / c_out)   Karras et al., arXiv:2206.00364

    Args:
        prediction: one of `PREDICTIONS`.
        alpha: a number, an array or a tensor.
        sigma: like alpha.
        sigma_data: standard deviation of the data; only EDM's preconditioning uses it.
    """
    if prediction == "epsilon":
        return 0.0, 1.0
    if prediction == "sample":
        return 1.0, 0.0
    if prediction == "v_prediction":
        return -sigma, alpha
    if prediction == "flow_prediction":
        return -1.0, 1.0
    if prediction == "score":
        return 0.0, -1 / sigma
    skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    out = sigma * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
    if prediction == "edm_v":
        out = -out
    return (1 - skip * alpha) / out, -skip * sigma / out


def convert(given: Combination, wanted: Combination, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """(r, s) with wanted = r x + s given, for combinations given = (p, q) and wanted = (u, w).

        d = alpha q - sigma p        r = (u q - w p) / d        s = (alpha w - sigma u) / d

    The result is infinite or NaN where d = 0. There, x and the given combination do not determine image and noise: a
    prediction of the noise at alpha = 0 is an example.
    """
    (p, q), (u, w) = given, wanted
    d = alpha * q - sigma * p
    return (u * q - w * p) / d, (alpha * w - sigma * u) / d
