"""The cost exponent gamma: the error of a level of cost T is proportional to T^(-1/gamma).

Jacot (arXiv:2603.24594) shows that ML-EM pays in the Harder-than-Monte-Carlo (HTMC) regime, gamma > 2. A ladder gives
two readings of gamma:

    error        RMS denoising error = floor + A T^(-1/gamma), with a fitted floor (Figure 2 of the paper)
    increments   sqrt(E|f^k - f^(k-1)|^2) = A T_k^(-1/gamma), which has no floor

Above the floor, both laws are straight lines in the logarithms, fitted by least squares over levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

THRESHOLD = 2.0
"""Lower limit of gamma in the HTMC regime."""

RESAMPLES = 1000
# Excess of the least value over a candidate floor, relative to that value; an excess of 1 is no floor.
EXCESS = np.geomspace(1e-4, 1, 500)

Interval = tuple[float, float]


@dataclass(frozen=True)
class Reading:
    """One reading of gamma.

    Attributes:
        quantity: the quantity fitted against time.
        levels: names of the levels on the line.
        seconds: T, seconds per sample, float64 (n,).
        values: the quantity, including its floor, float64 (n,).
        slope: 1 / gamma, the decrease of log(values - floor) with log(seconds).
        slope_interval: 95 % interval, by bootstrap over samples. It does not show how well the levels follow a line.
        slope_range: least and greatest slope if any one level is left out; None if too few levels would remain.
        floor, floor_interval: the floor and its 95 % interval; 0 for increments.
        factor: A.
    """

    quantity: Literal["error", "increments"]
    levels: tuple[str, ...]
    seconds: np.ndarray
    values: np.ndarray
    slope: float
    slope_interval: Interval
    slope_range: Interval | None
    floor: float
    floor_interval: Interval
    factor: float

    @property
    def gamma(self) -> float:
        """1 / slope; infinite if the quantity does not fall with time."""
        return _inverse(self.slope)

    @property
    def gamma_interval(self) -> Interval:
        """95 % interval of gamma, by bootstrap over samples."""
        return _inverse(self.slope_interval[1]), _inverse(self.slope_interval[0])

    @property
    def gamma_range(self) -> Interval | None:
        """Least and greatest gamma if any one level is left out; None if too few levels would remain."""
        return self.slope_range and (_inverse(self.slope_range[1]), _inverse(self.slope_range[0]))

    @property
    def htmc(self) -> Literal["yes", "no", "undecided"]:
        """Whether gamma > 2, decided only if `gamma_interval` and `gamma_range` agree.

        Undecided if `gamma_range` is None: a law fits any levels that are only as many as its parameters. Undecided,
        too, if the quantity does not fall with time, because the theory does not describe such levels.
        """
        if self.gamma_range is None or math.isinf(self.gamma):
            return "undecided"
        ends = [*self.gamma_interval, *self.gamma_range]
        return "yes" if min(ends) > THRESHOLD else "no" if max(ends) <= THRESHOLD else "undecided"


def read_error(levels: tuple[str, ...], seconds: np.ndarray, errors: np.ndarray, rng: np.random.Generator) -> Reading:
    """Reading of gamma from squared denoising errors.

    Args:
        levels: names of the n levels, at least three.
        seconds: seconds per sample, float64 (n,).
        errors: float64 (n, bands, per_band), of the same images and noises for each level; resampled within bands.
        rng: generator of the resamples.
    """
    bands, per_band = errors.shape[1:]
    resampled = np.empty((RESAMPLES, len(levels)))
    for row in resampled:
        index = rng.integers(per_band, size=(1, bands, per_band))
        row[:] = np.take_along_axis(errors, index, axis=2).mean((1, 2))
    return _read("error", levels, seconds, np.sqrt(errors.mean((1, 2))), np.sqrt(resampled), fit_above_floor, 3)


def read_increments(
    levels: tuple[str, ...], seconds: np.ndarray, increments: np.ndarray, rng: np.random.Generator
) -> Reading:
    """Reading of gamma from squared increments.

    Args:
        levels: names of the n levels, at least two.
        seconds: seconds per sample of each increment's upper level, float64 (n,).
        increments: float64 (n, samples), on the same trajectories for each level; trajectories are resampled.
        rng: generator of the resamples.
    """
    samples = increments.shape[1]
    index = rng.integers(samples, size=(RESAMPLES, samples))
    resampled = increments[:, index].mean(2).T
    return _read("increments", levels, seconds, np.sqrt(increments.mean(1)), np.sqrt(resampled), fit_power, 2)


Fit = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


def fit_power(seconds: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slope s, factor A and floor 0, each (...), of values (..., n) = A seconds^-s; least squares of the logarithms."""
    x = np.log(seconds) - np.log(seconds).mean()
    y = np.log(values)
    slope = -(y @ x) / (x @ x)
    factor = np.exp(y.mean(-1) + slope * np.log(seconds).mean())
    return slope, factor, np.zeros_like(slope)


def fit_above_floor(seconds: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slope s, factor A and floor F, each (...), of values (..., n) = F + A seconds^-s.

    Candidate floors range from 0 to just below the least value. F is the candidate for which the logarithms of
    values - F lie closest to a line.
    """
    least = values.min(-1, keepdims=True)
    floors = (least * (1 - EXCESS))[..., None]
    slope, factor, _ = fit_power(seconds, values[..., None, :] - floors)
    line = np.log(factor)[..., None] - slope[..., None] * np.log(seconds)
    misfit = ((np.log(values[..., None, :] - floors) - line) ** 2).sum(-1)
    best = misfit.argmin(-1)[..., None]
    return tuple(np.take_along_axis(fitted, best, -1)[..., 0] for fitted in (slope, factor, floors[..., 0]))  # type: ignore[return-value]  # three of them


def _read(
    quantity: Literal["error", "increments"],
    levels: tuple[str, ...],
    seconds: np.ndarray,
    values: np.ndarray,
    resampled: np.ndarray,
    fit: Fit,
    parameters: int,
) -> Reading:
    slope, factor, floor = fit(seconds, values)
    slopes, _, floors = fit(seconds, resampled)
    n = len(levels)
    slopes_without_one = (
        [float(fit(np.delete(seconds, k), np.delete(values, k))[0]) for k in range(n)] if n > parameters else None
    )
    return Reading(
        quantity=quantity,
        levels=levels,
        seconds=seconds,
        values=values,
        slope=float(slope),
        slope_interval=_interval(slopes),
        slope_range=(min(slopes_without_one), max(slopes_without_one)) if slopes_without_one else None,
        floor=float(floor),
        floor_interval=_interval(floors),
        factor=float(factor),
    )


def _interval(values: np.ndarray) -> Interval:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _inverse(slope: float) -> float:
    return 1 / slope if slope > 0 else float("inf")
