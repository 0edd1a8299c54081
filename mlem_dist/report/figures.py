"""Figures of trainings, calibrations, frontiers and simulated cells, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlem_dist.capacity.planner import Capacity
from mlem_dist.files import replace_file
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.tuning.calibrate import Calibration
from mlem_dist.tuning.frontier import Frontier, lower_envelope
from mlem_dist.tuning.gamma import Reading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 25
"""Number of groups in which steps are shown: the effect of one step is measured with only a few dozen samples."""


def save_figures(folder: Path, ladder: Ladder, calibration: Calibration) -> list[Path]:
    """Write both figures of a calibration into `folder`, named by the device type, and return their paths."""
    device = calibration.device.partition("/")[0]
    return [
        _save(error_against_time(ladder, calibration), folder / f"error-against-time-{device}.png"),
        _save(increments_by_noise(ladder, calibration), folder / f"increments-{device}.png"),
    ]


def error_against_time(ladder: Ladder, calibration: Calibration) -> Figure:
    """Both readings of gamma as lines in logarithmic axes; the left one is Figure 2 of Jacot, arXiv:2603.24594.

    Without denoising errors, there is the right one alone.
    """
    rms = [level.rms_error for level in calibration.levels if level.rms_error is not None]
    figure = _figure(f"{ladder.name} on {calibration.device}", 1, 1 + bool(rms), 4.4, sharex=True)
    *left, right = figure.axes
    batch = max(calibration.levels[0].seconds)
    ms = [level.seconds[batch] * 1e3 for level in calibration.levels]
    names = [level.name for level in calibration.levels]
    error, increments = calibration.gamma.get("error"), calibration.gamma.get("increments")
    floor = error.floor if error else 0.0
    for axes in left:
        _points(axes, ms, rms, names, "with the floor", "C0", hollow=True)
        if error:
            above = [
                (time, value - floor, name) for time, value, name in zip(ms, rms, names, strict=True) if value > floor
            ]
            times, values, shown = zip(*above, strict=True)
            _points(axes, times, values, shown, f"above the floor, {floor:.4f}", "C0")
            _line(axes, error)
    mean = np.sqrt(calibration.solvers["sde"].increments.mean(1))
    _points(right, ms[1:], mean[1:], names[1:], "DDPM trajectories", "C1")
    if increments:
        _line(right, increments)
    titles = ["RMS denoising error"] * len(left) + ["RMS increment over the next lower level"]
    for axes, title in zip(figure.axes, titles, strict=True):
        axes.set(xscale="log", yscale="log", xlabel=f"ms per sample, batch {batch}", ylabel="per value", title=title)
        axes.margins(x=0.15, y=0.12)
        axes.legend()
    return figure


def increments_by_noise(ladder: Ladder, calibration: Calibration) -> Figure:
    """Increments and their effect on the sample by timestep, from noise to image; one column per solver."""
    figure = _figure(f"{ladder.name} on {calibration.device}", 2, len(calibration.solvers), 7.5, sharey="row")
    grid = np.array(figure.axes).reshape(2, -1)
    for column, (name, solver) in zip(grid.T, calibration.solvers.items(), strict=True):
        groups = np.array_split(np.arange(len(solver.t)), min(BINS, len(solver.t)))
        t = [solver.t[group].mean() for group in groups]
        for axes, values, label in (
            (column[0], solver.increments, "mean squared increment per value"),
            (column[1], solver.effect, "squared effect W on the sample, one step"),
        ):
            for k, level in enumerate(calibration.levels[1:], 1):
                axes.plot(t, [values[k, group].mean() for group in groups], color=f"C{k}", label=level.name)
            axes.set(yscale="log", xlabel="timestep (noise on the left, image on the right)", ylabel=label)
            axes.invert_xaxis()
        column[0].set_title(f"{name.upper()}, {len(solver.t)} steps")
    grid[0, 0].legend(title="level, over the one below")
    return figure


def save_frontier(frontier: Frontier, path: Path) -> Path:
    """Write a figure of error against time, with a curve through each family's best points, and return the path.

    Rows that are not measured on the common noises are dots outside the curves.
    """
    settings = frontier.settings
    figure = _figure(f"{settings['solver'].upper()}, {settings['samples']} samples, {settings['machine']}", 1, 1, 7.5)
    axes = figure.axes[0]
    families = list(dict.fromkeys(row.family for row in frontier.rows))
    for index, family in enumerate(families):
        rows = [row for row in frontier.rows if row.family == family]
        best = lower_envelope([row for row in rows if len(row.errors) == settings["samples"]])
        for shown, label, line, alpha in ((rows, None if best else family, "", 0.3), (best, family, "-", 1.0)):
            axes.plot(
                [row.seconds * 1e3 for row in shown],
                [row.error for row in shown],
                ls=line and ("-", "--", ":")[index // 10 % 3],
                alpha=alpha,
                label=label if shown else None,
                color=f"C{index % 10}",
                marker="os^vD"[index // 10 % 5],
            )
    axes.set(xscale="log", xlabel="ms per sample", ylabel=f"mean squared error to {settings['reference']}")
    # If the best level is called at every step, all errors may be zero.
    if any(row.error > 0 for row in frontier.rows):
        axes.set_yscale("log")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, path)


def save_timeline(capacity: Capacity, path: Path) -> Path:
    """Write a figure of the times at which the actors of one cell of each part work, and return the path."""
    figure = _figure("one cell's actors at work, after loading", len(capacity.parts), 1, 3 + 3 * len(capacity.parts))
    for axes, part in zip(figure.axes, capacity.parts, strict=True):
        actors = sorted({(busy.pool, busy.actor) for busy in part.timeline})
        for pool, name in enumerate(part.layout.names):
            of_pool = [busy for busy in part.timeline if busy.pool == pool]
            axes.barh(
                [actors.index((busy.pool, busy.actor)) for busy in of_pool],
                [busy.stop - busy.start for busy in of_pool],
                left=[busy.start for busy in of_pool],
                color=f"C{pool % 10}",
                edgecolor="white",
                linewidth=0.2,
                label=name,
            )
        axes.set(xlabel="seconds", ylabel="actor", title=str(part.layout), xlim=(0, None))
        axes.invert_yaxis()
        axes.legend(loc="upper right", fontsize=8)
    return _save(figure, path)


def save_loss_curves(folder: Path, logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Write `folder`/loss.png from the entries of each level's training log, and return its path."""
    figure = _figure("training", 1, 2, 4.4, sharex=True)
    left, right = figure.axes
    for name, log in logs.items():
        held_out = [line for line in log if "denoising_error" in line]
        left.plot([line["step"] for line in log], [line["loss"] for line in log], label=name)
        right.plot(
            [line["step"] for line in held_out], [np.mean(line["denoising_error"]) for line in held_out], label=name
        )
    for axes, title in ((left, "training loss"), (right, "held-out denoising error of the average")):
        axes.set(yscale="log", xlabel="step", ylabel="mean squared error per value", title=title)
        axes.legend()
    return _save(figure, folder / "loss.png")


def _save(figure: Figure, path: Path) -> Path:
    """Write a PNG that appears complete or not at all."""
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    return path


def _figure(title: str, rows: int, columns: int, height: float, **shared: Any) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, height), layout="constrained")
    figure.subplots(rows, columns, **shared)
    figure.suptitle(title)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    return figure


def _points(
    axes: Axes,
    ms: Sequence[float],
    values: Sequence[float] | np.ndarray,
    names: Sequence[str],
    label: str,
    color: str,
    hollow: bool = False,
) -> None:
    axes.plot(ms, values, "o", color=color, mfc="white" if hollow else color, label=label)
    for x, y, name in zip(ms, values, names, strict=True):
        axes.annotate(name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)


def _line(axes: Axes, reading: Reading) -> None:
    ends = reading.seconds[[0, -1]]
    low, high = reading.gamma_interval
    axes.plot(
        ends * 1e3,
        reading.factor * ends**-reading.slope,
        "k--",
        lw=1,
        label=f"slope -{reading.slope:.2f}: gamma {reading.gamma:.2f} ({low:.2f} to {high:.2f})",
    )
