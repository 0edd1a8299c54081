"""Error against evaluations of a guided model: fitted plans on it and a Gaussian, beside fast solvers on it.

python benchmarks/frontier/guided.py --ladder DIR --data /usr/share/datasets/fashion-mnist \
    --out benchmarks/results/frontier-guided

DIR holds the ladder of guided.yaml. Of its largest UNet alone, and of both UNets, `Ladder.create` makes ladders with a
Gaussian fitted to the images, or to samples of the guided level, and with levels without and with guidance. A rerun
goes on where the last one stopped.
"""

from pathlib import Path

from race import race, race_command

from mlem_dist.ladder.ladder import Ladder

SCALE, BUDGETS, FAST_NFE = 3.0, (3, 5, 10, 20), (5, 7, 10, 15, 20, 30)
SAMPLES = 6000
"""Number of guided samples for a Gaussian: 500 and more of each class, so that each has a covariance of its own."""

LADDERS = {
    "single": (("large",), None),
    "samples": (("large",), SAMPLES),
    "two": (("small", "large"), None),
}
"""Models of each ladder, and the samples of the best level that its Gaussian is fitted to; None for the data."""


@race_command
def main(folder: Path, data: Path, threads: int, out: Path) -> None:
    """Write OUT/LADDER/frontier-ode.json and the plans of each ladder."""
    for name, (models, samples) in LADDERS.items():
        place = folder.parent / f"{folder.name}-{name}"
        if place.exists():
            ladder = Ladder.load(place)
        else:
            gaussian = data if samples is None else samples
            ladder = Ladder.create(place, [folder / model for model in models], guidance=SCALE, gaussian=gaussian)
        race(name, ladder, BUDGETS, FAST_NFE, out / name, threads)


if __name__ == "__main__":
    main()
