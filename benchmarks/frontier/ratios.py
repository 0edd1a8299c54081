"""What a frontier says: time at equal error and error at equal time, of each family over the best baseline.

python benchmarks/frontier/ratios.py benchmarks/results/frontier/frontier-sde.json

Writes ratios-SOLVER.json beside the frontier, and prints it as Markdown tables. A family's curve is the lower envelope
of its points, in logarithmic axes a line from point to point; it is not continued beyond them.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from mlem_dist.tuning.frontier import Frontier, Row, lower_envelope

ERRORS = (1e-2, 3e-3, 1e-3, 3e-4)
BASELINES = {"EM": ("EM",), "fast solvers": ("DPM-Solver++", "UniPC")}
RESAMPLES = 1000

Curve = tuple[np.ndarray, np.ndarray]


def curve(rows: Sequence[Row], index: np.ndarray) -> Curve:
    """Logarithms of time and of the mean error of the samples `index`, along the points that no other one beats."""
    best = lower_envelope([replace(row, errors=row.errors[index]) for row in rows])
    return np.log([row.seconds for row in best]), np.log([row.error for row in best])


def time_at(line: Curve, error: float) -> float:
    """Log of the time at which the error is reached; NaN outside of the curve."""
    return float(np.interp(np.log(error), line[1][::-1], line[0][::-1], left=np.nan, right=np.nan))


def error_at(line: Curve, log_seconds: float) -> float:
    """Log of the error at a time; NaN outside of the curve."""
    return float(np.interp(log_seconds, *line, left=np.nan, right=np.nan))


def ratios(family: Curve, baseline: Curve) -> np.ndarray:
    """For each of ERRORS how much less time the family takes, and how much less error at the baseline's time for it."""
    found = []
    for error in ERRORS:
        base = time_at(baseline, error)
        found.append([base - time_at(family, error), np.log(error) - error_at(family, base)])
    return np.exp(found)


def resampled(samples: int, block: int, rng: np.random.Generator) -> np.ndarray:
    """Sample numbers: blocks drawn with replacement, as the samples of one share a plan, and samples within them."""
    blocks = rng.integers(samples // block, size=samples // block)
    return (blocks[:, None] * block + rng.integers(block, size=(len(blocks), block))).ravel()


@click.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True))
def main(path: Path) -> None:
    """Compare the families of the frontier in PATH."""
    about = {key: value for key, value in json.loads(path.read_text()).items() if key != "rows"}
    # Draws on the choosing noises are no result.
    rows = [row for row in Frontier(path, about).rows if len(row.errors) == about["samples"]]
    families = {
        family: [row for row in rows if row.family == family] for family in dict.fromkeys(row.family for row in rows)
    }
    rng = np.random.default_rng(0)
    # The first one is the result, the others make its interval.
    indices = [
        np.arange(about["samples"]),
        *(resampled(about["samples"], about["block_size"], rng) for _ in range(RESAMPLES)),
    ]
    curves = {family: [curve(chosen, index) for index in indices] for family, chosen in families.items()}
    found = []
    for name, starts in BASELINES.items():
        baseline = [row for row in rows if row.family.startswith(starts)]
        if not baseline:
            continue
        base = [curve(baseline, index) for index in indices]
        print(f"\n{about['solver'].upper()} against the best of {name}: time ratio, error ratio (95 %)\n")
        print("| family |" + "".join(f" MSE {error:g} |" for error in ERRORS) + "\n|---|" + "---|" * len(ERRORS))
        for family, mine in curves.items():
            every = np.stack([ratios(one, other) for one, other in zip(mine, base, strict=True)])
            cells = []
            for error, here, again in zip(ERRORS, every[0], every[1:].swapaxes(0, 1), strict=True):
                intervals = [_interval(column) for column in again.T]
                keys = ("time_ratio", "error_ratio")
                found.append(
                    {"baseline": name, "family": family, "error": error}
                    | {key: value if np.isfinite(value) else None for key, value in zip(keys, here, strict=True)}
                    | {f"{key}_interval": interval for key, interval in zip(keys, intervals, strict=True)}
                )
                cells.append(", ".join(_cell(value, interval) for value, interval in zip(here, intervals, strict=True)))
            print(f"| {family} | " + " | ".join(cells) + " |", flush=True)
    out = path.with_name(path.name.replace("frontier", "ratios"))
    out.write_text(json.dumps(about | {"resamples": RESAMPLES, "ratios": found}, indent=1) + "\n")


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
