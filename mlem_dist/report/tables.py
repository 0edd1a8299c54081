"""Tables and sentences for the terminal."""

import math
from collections.abc import Mapping, Sequence

from mlem_dist.capacity.placement import pools_text
from mlem_dist.capacity.planner import Capacity, Forecast
from mlem_dist.files import listing
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.schema import OPERATIONS
from mlem_dist.solver.schedulers import BANDS
from mlem_dist.tuning.calibrate import Calibration
from mlem_dist.tuning.frontier import Row
from mlem_dist.tuning.gamma import THRESHOLD, Interval, Reading

GIGA = "GFLOP"
"""Unit of counted operations: stored in units of 1e12, they are shown as thousands of these."""

CLASSES = 10
"""Largest number of classes that a table names."""


def ladder_table(ladder: Ladder) -> str:
    """A table of a ladder's levels: parameters, milliseconds or operations per sample, and denoising error."""
    devices = sorted(ladder.levels[0].seconds)
    units = [f"{GIGA}/sample" if device == OPERATIONS else f"ms/sample {device}" for device in devices]
    rows = [["", "level", "kind", "parameters", *units, "denoising error"]]
    for number, level in enumerate(ladder.levels, 1):
        error = sum(level.denoising_error) / len(level.denoising_error) if level.denoising_error else None
        costs = [f"{level.seconds[device] * 1e3:.3f}" for device in devices]
        shown = "-" if error is None else f"{error:.4f}"
        rows.append([str(number), level.name, level.kind, f"{level.parameters:,}", *costs, shown])
    size = "x".join(map(str, ladder.image_shape))
    if ladder.decoder:
        size += f" from latents of {'x'.join(map(str, ladder.sample_shape))}"
    condition = "prompts" if ladder.encoder else listing(ladder.labels, CLASSES) or "unconditional"
    return f"{ladder.name}: {size}, {condition}, digest {ladder.digest[:12]}\n{_aligned(rows)}"


def calibration_table(ladder: Ladder, calibration: Calibration) -> str:
    """The results of a calibration: tables of the levels and the noise bands, gamma, and the predicted speed-up."""
    solvers, batches = calibration.solvers.items(), list(calibration.levels[0].seconds)
    head = f"{ladder.name} on {calibration.device}, torch {calibration.torch}, digest {ladder.digest[:12]}"
    levels = [
        [
            *("", "level", *(f"ms, batch {batch}" for batch in batches), "RMS error"),
            *(f"{quantity} {name}" for quantity in ("increment", "effect") for name, _ in solvers),
        ]
    ]
    for k, level in enumerate(calibration.levels):
        levels.append(
            [
                *(str(k + 1), level.name, *(f"{level.seconds[batch] * 1e3:.3f}" for batch in batches)),
                "-" if level.rms_error is None else f"{level.rms_error:.4f}",
                *(f"{solver.increments[k].mean() ** 0.5:.4f}" for _, solver in solvers),
                *(f"{solver.effect[k].sum() ** 0.5:.4f}" for _, solver in solvers),
            ]
        )
    fast = [["level", *(f"batch {batch}" for batch in batches)]]
    for level in calibration.levels:
        if level.compiled:
            pairs = [(level.compiled[batch], level.seconds[batch]) for batch in batches]
            fast.append([level.name, *(f"{new * 1e3:.3f} ({old / new:.2f})" for new, old in pairs)])
    compiled = ["ms by torch.compile (times as fast):", _aligned(fast), ""] if len(fast) > 1 else []
    train_steps = ladder.process.length
    bands = [["timesteps", *(level.name for level in calibration.levels)]]
    for band in range(BANDS):
        start, stop = band * train_steps // BANDS, (band + 1) * train_steps // BANDS
        errors = (level.denoising_error for level in calibration.levels)
        bands.append([f"{start} ... {stop - 1}", *("-" if error is None else f"{error[band]:.3g}" for error in errors)])
    by_band = [
        f"Mean squared denoising error by band of noise, {calibration.images} held-out images each:",
        _aligned(bands),
        "",
    ]
    readings = [gamma_statement(reading) for reading in calibration.gamma.values()] or [
        "gamma: cannot be read; a line needs at least three UNets in a row."
    ]
    speed_up = [["solver", "EM steps", "error", "ML-EM nfe", "rungs", "speed-up", "95 %"]]
    for name, solver in solvers:
        for row in solver.speed_up:
            numbers = [f"{row.error:.3g}", f"{row.nfe:.1f}", ",".join(map(str, row.rungs))]
            speed_up.append([name, str(row.em_steps), *numbers, f"{row.ratio:.2f}", _between(row.interval)])
    steps = len(calibration.solvers["sde"].t)
    return "\n".join(
        [
            head,
            _aligned(levels),
            "",
            *compiled,
            *(by_band if calibration.images else ()),
            *readings,
            "",
            f"Predicted: ML-EM of {steps} steps with Neyman probabilities, at the error of Euler-Maruyama (EM) with",
            "the best level:",
            _aligned(speed_up),
        ]
    )


def frontier_table(rows: Sequence[Row]) -> str:
    """A table of each row's time and error, and a sentence that says which families are unbiased."""
    table = [["budget", "family", "ms/sample", "MSE"]]
    table += [[row.label, row.family, f"{row.seconds * 1e3:.2f}", f"{row.error:.3g}"] for row in rows]
    unbiased = "Unbiased over plans: the drift of ML-EM. All others err alike on every image that one noise gives."
    return f"{_aligned(table)}\n{unbiased}"


def tuning_price(seconds: float, evaluation_seconds: float, nfe: float) -> str:
    """A sentence on the time of a search, and on the number of images after which it is repaid.

    Args:
        seconds: time of the search.
        evaluation_seconds: time of an evaluation of the best level for one image.
        nfe: the largest budget, in such evaluations.
    """
    images = seconds / (nfe * evaluation_seconds)
    return (
        f"The search takes about {duration(seconds)} on this device, as long as {images:,.3g} images of {nfe:g} "
        "evaluations. A plan that halves the evaluations repays it after as many images."
    )


def preview_text(num: int, shards: int, image_bytes: float, rate: float, seconds: float, devices: str) -> str:
    """Sentences on the size and the time of a dataset that is not made yet."""
    return (
        f"{num:,} images in {shards:,} shards, about {size(num * image_bytes)}: {rate:,.3g} images/s on {devices}, "
        f"{duration(seconds)} by forecast, without loading."
    )


def size(number: float) -> str:
    """A number of bytes in the unit that suits it."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def hours_table(hours: Mapping[str, float]) -> str:
    """A table of device hours by level and stage."""
    rows = [["", "device-hours"], *([name, f"{value:,.3g}"] for name, value in hours.items())]
    return _aligned(rows)


def duration(seconds: float) -> str:
    """A duration in the unit that suits it."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.0f} seconds"


def gamma_statement(reading: Reading) -> str:
    """Sentences on one reading of gamma: its intervals, and whether it puts the ladder in the HTMC regime."""
    measure = {
        "error": f"RMS denoising error above a floor of {reading.floor:.4f} ({_between(reading.floor_interval, 4)})",
        "increments": "RMS increment",
    }[reading.quantity]
    spread = reading.gamma_range
    if spread is None:
        reason = f"{len(reading.levels)} levels are too few to tell whether they lie on a line"
        without = ""
    elif math.isinf(reading.gamma):
        reason = "it does not fall from level to level"
        without = f", {_between(spread)} without any one level"
    else:
        reason = f"the intervals reach to both sides of {THRESHOLD:g}"
        without = f", {_between(spread)} without any one level"
    regime = f"undecided, {reason}" if reading.htmc == "undecided" else reading.htmc
    return (
        f"gamma by {reading.quantity}: {reading.gamma:.2f} (95 %: {_between(reading.gamma_interval)}{without}); "
        f"{measure} ~ time^{-reading.slope:.2f}.\n"
        f"  In the HTMC regime (gamma > {THRESHOLD:g}): {regime}."
    )


def _between(ends: Interval, digits: int = 2) -> str:
    return " to ".join(f"{end:.{digits}f}" for end in ends)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)).rstrip() for row in rows)


def placement_reason(forecasts: Sequence[Forecast], timed: bool) -> str:
    """The reason for the first placement: its simulated rate beside that of the most divided placement.

    `timed` says whether the levels were timed for the forecasts; otherwise their costs are the ladder's.
    """
    best, divided = forecasts[0], max(forecasts, key=lambda forecast: len(forecast.layout.pools))
    by = "the levels' time here" if timed else "the ladder's costs"
    text = f"Placement {pools_text(best.layout.level_pools)}, by {by}: simulated {_simulated(best)}"
    if best is divided:
        return text
    return f"{text}; {pools_text(divided.layout.level_pools)} would make {_simulated(divided)}."


def capacity_table(ladder: Ladder, num: int, capacities: Sequence[Capacity], gains: Mapping[str, float]) -> str:
    """The forecasts of a job: a comparison of the placements, then the pools and levels of the best placement."""
    best = capacities[0]
    rows = [["placement", "cells", "images/s", "hours", "efficiency", "bottleneck"]]
    for capacity in capacities:
        for part in capacity.parts:
            numbers = [f"{part.images_per_second:,.4g}", "", f"{part.efficiency:.1%}", part.bottleneck]
            rows.append([str(part.layout), str(part.cells), *numbers])
        if len(capacity.parts) > 1:
            rows.append(["", "", "", "", "", ""])
            rows[-1][0] = "together"
            rows[-1][2] = f"{capacity.images_per_second:,.4g}"
        rows[-1][3] = f"{capacity.seconds / 3600:,.3g}"
    pools = [["pool", "actors", "busy"]]
    pools += [[pool.name, str(pool.actors), f"{pool.busy:.0%}"] for part in best.parts for pool in part.pools]
    levels = [["level", "device-hours"]]
    for level, hours in zip(ladder.levels, best.level_hours(num), strict=True):
        levels.append([level.name, f"{hours:,.3g}"])
    more = [f"{name}: {gain:+,.3g} images/s" for name, gain in gains.items()]
    return "\n".join(
        [
            f"{num:,} images, simulated, without loading; the fastest placement first:",
            _aligned(rows),
            "",
            _aligned(pools),
            "",
            _aligned(levels),
            "",
            "One more device of " + "; ".join(more),
        ]
    )


def _simulated(forecast: Forecast) -> str:
    return (
        f"{forecast.images_per_second:.1f} images/s, {forecast.efficiency:.0%} of what the levels' own time would allow"
    )
