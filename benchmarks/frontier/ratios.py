"""What a frontier says: time at equal error and error at equal time, of each family over the best baseline.

python benchmarks/frontier/ratios.py benchmarks/results/frontier/frontier-ddpm.json

Writes ratios-SOLVER.json beside the frontier, and prints it as Markdown tables. A family's curve is the lower envelope
of its points, in logarithmic axes a line from point to point; it is not continued beyond them.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from mlem_dist.tuning.judge import BLOCK

ERRORS = (1e-2, 3e-3, 1e-3, 3e-4)
BASELINES = {"EM": ("EM",), "fast solvers": ("DPM-Solver++", "UniPC")}
RESAMPLES = 1000

Curve = tuple[np.ndarray, np.ndarray]


def curve(seconds: np.ndarray, errors: np.ndarray) -> Curve:
    """Logarithms of time and error, along the points that no other one beats in both."""
    order = np.argsort(seconds)
    lowest = np.minimum.accumulate(errors[order])
    kept = order[errors[order] <= lowest]
    return np.log(seconds[kept]), np.log(errors[kept])


def time_at(line: Curve, error: float) -> float:
    """Log of the time at which the error is reached; NaN outside of the curve."""
    return float(np.interp(np.log(error), line[1][::-1], line[0][::-1], left=np.nan, right=np.nan))


def error_at(line: Curve, log_seconds: float) -> float:
    """Log of the error at a time; NaN outside of the curve."""
    return float(np.interp(log_seconds, *line, left=np.nan, right=np.nan))


def ratios(rows: Sequence[dict], family: str, baseline: Sequence[dict], error: float, index: np.ndarray) -> list[float]:
    """How much less time the family takes at this error, and how much less error at the baseline's time for it."""
    lines = []
    for chosen in ([row for row in rows if row["family"] == family], baseline):
        seconds = np.array([row["seconds"] for row in chosen])
        lines.append(curve(seconds, np.array([np.array(row["errors"])[index].mean() for row in chosen])))
    base = time_at(lines[1], error)
    time, less = time_at(lines[0], error), error_at(lines[0], base)
    return np.exp([base - time, np.log(error) - less]).tolist()


def resampled(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Sample numbers: blocks drawn with replacement, as the samples of one share a plan, and samples within them."""
    blocks = rng.integers(samples // BLOCK, size=samples // BLOCK)
    return (blocks[:, None] * BLOCK + rng.integers(BLOCK, size=(len(blocks), BLOCK))).ravel()


@click.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True))
def main(path: Path) -> None:
    """Compare the families of the frontier in PATH."""
    raw = json.loads(path.read_text())
    # Draws on the choosing noises are no result.
    rows = [row for row in raw["rows"] if len(row["errors"]) == raw["samples"]]
    rng = np.random.default_rng(0)
    indices = [resampled(raw["samples"], rng) for _ in range(RESAMPLES)]
    everyone = np.arange(raw["samples"])
    found = []
    for name, starts in BASELINES.items():
        baseline = [row for row in rows if row["family"].startswith(starts)]
        if not baseline:
            continue
        print(f"\n{raw['solver'].upper()} against the best of {name}: time ratio, error ratio (95 %)\n")
        print("| family |" + "".join(f" MSE {error:g} |" for error in ERRORS) + "\n|---|" + "---|" * len(ERRORS))
        for family in dict.fromkeys(row["family"] for row in rows):
            cells = []
            for error in ERRORS:
                here = ratios(rows, family, baseline, error, everyone)
                again = np.array([ratios(rows, family, baseline, error, index) for index in indices])
                intervals = [_interval(column) for column in again.T]
                keys = ("time_ratio", "error_ratio")
                found.append(
                    {"baseline": name, "family": family, "error": error}
                    | {key: value if np.isfinite(value) else None for key, value in zip(keys, here, strict=True)}
                    | {f"{key}_interval": interval for key, interval in zip(keys, intervals, strict=True)}
                )
                cells.append(", ".join(_cell(value, interval) for value, interval in zip(here, intervals, strict=True)))
            print(f"| {family} | " + " | ".join(cells) + " |", flush=True)
    about = {key: value for key, value in raw.items() if key != "rows"} | {"resamples": RESAMPLES}
    out = path.with_name(path.name.replace("frontier", "ratios"))
    out.write_text(json.dumps(about | {"ratios": found}, indent=1) + "\n")


def _interval(values: np.ndarray) -> list[float] | None:
    """95 % of the resampled ratios, if nearly all of them exist."""
    finite = values[np.isfinite(values)]
    if len(finite) < 0.9 * len(values):
        return None
    return [float(f"{value:.4g}") for value in np.quantile(finite, [0.025, 0.975])]


def _cell(value: float, interval: list[float] | None) -> str:
    if not np.isfinite(value):
        return "-"
    return f"{value:.2f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")


if __name__ == "__main__":
    main()
