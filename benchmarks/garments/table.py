"""The table and the figure of the race: every row beside 50 guided steps of Euler's method.

python benchmarks/garments/table.py --data DATA --work WORK --results benchmarks/results/garments.json --figure FILE

WORK is that of race.py. All rows have the same captions and seeds. So the interval of a difference to 50 steps is much
narrower than those of the two: both are resampled together. Differences go into the results; the table is printed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import matplotlib
import numpy as np
from parts import read
from race import BLOCK, RECOGNISER, seen_path
from recogniser import frechet, load, look, matches

matplotlib.use("Agg")

import matplotlib.pyplot as plt

STANDARD = "euler 50"

RESAMPLES = 100
"""Number of samples with replacement that give the standard error of a difference."""

FAMILIES = {
    "euler": "Euler, guided",
    "dpm++": "DPM-Solver++(2M)",
    "unipc": "UniPC",
    "heun": "Heun",
    "cache": "caches",
    "interval": "guidance in an interval",
    "stitch": "T-Stitch",
    "unguided": "no guidance, or by the small network",
    "untuned": "untuned plans",
    "plan": "tuned plans",
    "plan in an interval": "tuned plans, guidance in an interval",
}
"""Labels of the figure."""

KINDS = {
    **dict.fromkeys(["first-block", "taylorseer", "pyramid", "faster-cache", "cache-dit"], "cache"),
    "small-guides": "unguided",
    **dict.fromkeys(["held", "extrapolated", "ml-em"], "untuned"),
}
"""Families of the first word of a row; by default, that word."""

JOINED = ("euler", "dpm++", "unipc", "heun", "plan")
"""Families that differ in the number of evaluations only."""

PANELS = {
    "frechet": ("Fréchet distance", (35, 60)),
    "adherence": ("adherence", (0.86, 0.945)),
    "median_mse": ("median error to the guided ODE", (5e-5, 2e-2)),
}
"""Label and limits of each panel; rows beyond them are in the table only."""

TICKS = (0.04, 0.06, 0.1, 0.2, 0.3, 0.5)


def compare(lines: list[dict[str, Any]], captions: list[str], real: np.ndarray, work: Path) -> None:
    """Add its differences to `STANDARD` to each line of as many images, with standard errors."""

    num = next(line["num"] for line in lines if (line["row"], line["batch"]) == (STANDARD, BLOCK))

    def judged(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        with np.load(seen_path(work, name, num, BLOCK)) as kept:
            return kept["features"], *matches(captions[: len(kept["seen"])], kept["seen"])

    features, rights, counts = judged(STANDARD)
    rng = np.random.default_rng(0)
    samples = [np.arange(len(counts)), *rng.integers(len(counts), size=(RESAMPLES, len(counts)))]
    distances = np.array([frechet(features[rows], real) for rows in samples])
    for line in lines:
        line.pop("against_standard", None)
        if (line["num"], line["batch"]) != (num, BLOCK):
            continue
        features, right, _ = judged(line["row"])
        ratios = np.array([frechet(features[rows], real) for rows in samples]) / distances
        points = [100 * (right[rows].sum() - rights[rows].sum()) / counts[rows].sum() for rows in samples]
        line["against_standard"] = {
            "frechet_percent": 100 * (ratios[0] - 1),
            "frechet_percent_error": 100 * float(np.std(ratios[1:])),
            "adherence_points": float(points[0]),
            "adherence_points_error": float(np.std(points[1:])),
        }


def table(lines: list[dict[str, Any]]) -> str:
    """The rows in Markdown, by time."""
    standard = {line["batch"]: line["seconds"] for line in lines if line["row"] == STANDARD}
    text = [
        "| row | s per image | speed-up | adherence | points | Fréchet distance | percent | recall | error | median |",
        "|---" * 10 + "|",
    ]
    for line in sorted(lines, key=lambda line: (-line["batch"], -line["seconds"])):
        against = line.get("against_standard")
        name = line["row"] if line["batch"] == BLOCK else f"{line['row']}, batch {line['batch']}"
        cells = [
            f"`{name}`",
            f"{line['seconds']:.3f}",
            f"{standard[line['batch']] / line['seconds']:.1f}" if line["batch"] in standard else "",
            f"{100 * line['adherence']:.1f}",
            f"{against['adherence_points']:+.1f} ± {against['adherence_points_error']:.1f}" if against else "",
            f"{line['frechet']:.1f}" if against else "",
            f"{against['frechet_percent']:+.1f} ± {against['frechet_percent_error']:.1f}" if against else "",
            f"{line['recall']:.2f}" if against else "",
            f"{line['mse']:.4f}",
            f"{line['median_mse']:.5f}",
        ]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def at_equal_error(lines: list[dict[str, Any]]) -> str:
    """For each tuned plan, how many times as fast it is as the faster of DPM-Solver++ and UniPC at the same error.

    Logarithms of times are interpolated in those of errors, mean and median, between the rows of a solver.
    """
    text = []
    lines = [line for line in lines if line["batch"] == BLOCK]
    for plan in [line for line in lines if family(line["row"]) == "plan"]:
        ratios = {}
        for column in ("mse", "median_mse"):
            times = [np.inf]
            for solver in ("dpm++", "unipc"):
                rows = sorted((line for line in lines if family(line["row"]) == solver), key=lambda line: line[column])
                error, seconds = (np.log([line[name] for line in rows]) for name in (column, "seconds"))
                times.append(np.exp(np.interp(np.log(plan[column]), error, seconds, left=np.inf, right=np.inf)))
            ratios[column] = min(times) / plan["seconds"]
        text.append(
            f"{plan['row']}: {ratios['mse']:.2f} times as fast by the mean, {ratios['median_mse']:.2f} by the median"
        )
    return "\n".join(text)


def family(row: str) -> str:
    """The family of a row."""
    kind, *numbers = row.split()
    return "plan in an interval" if kind == "plan" and numbers[1:] else KINDS.get(kind, kind)


def draw(lines: list[dict[str, Any]], out: Path) -> None:
    """Draw time against distance, adherence and error."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 5.2), layout="constrained")
    for axis, (column, (label, limits)) in zip(axes, PANELS.items(), strict=True):
        for number, (name, title) in enumerate(FAMILIES.items()):
            rows = [line for line in lines if line["batch"] == BLOCK and family(line["row"]) == name]
            rows.sort(key=lambda line: line["seconds"])
            x, y = ([line[key] for line in rows] for key in ("seconds", column))
            style = {"marker": "*" if "plan" in name else "o", "linestyle": "-" if name in JOINED else "none"}
            axis.plot(x, y, color=f"C{number}", label=title, markersize=9 if "plan" in name else 5, **style)
        axis.set_xscale("log")
        axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axis.minorticks_off()
        axis.set_ylim(*limits)
        axis.set_xlabel("seconds per image")
        axis.set_ylabel(label)
        if column == "median_mse":
            axis.set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(out, dpi=130)
    click.echo(out)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Dataset of composites.py; compares all rows anew.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder of race.py, for --data.")
@click.option("--results", type=click.Path(path_type=Path), required=True)
@click.option("--figure", type=click.Path(path_type=Path), required=True)
def main(data: Path | None, work: Path | None, results: Path, figure: Path) -> None:
    content = json.loads(results.read_text())
    if data and work:
        images, captions, _ = read(data, "validation", 10_000)
        real, _ = look(load(RECOGNISER), images)
        compare(content["rows"], captions, real, work)
        results.write_text(json.dumps(content, indent=1) + "\n")
    click.echo(table(content["rows"]))
    click.echo(at_equal_error(content["rows"]))
    draw(content["rows"], figure)


if __name__ == "__main__":
    main()
