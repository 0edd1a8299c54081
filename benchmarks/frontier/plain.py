"""Error against evaluations on ladders of ordinary UNets, without a Gaussian, beside fast solvers on the best level.

python benchmarks/frontier/plain.py --ladder DIR --data /usr/share/datasets/fashion-mnist \
    --out benchmarks/results/frontier-plain

DIR holds the ladder of plain.yaml. Its two largest levels and all three are calibrated and tuned as ladders of their
own, and their plans are compared with fast solvers of diffusers on the noises that `tune` tests with. A rerun goes on
where the last one stopped.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from race import race, race_command

from mlem_dist.ladder.images import load_images
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.tuning.calibrate import HeldOut, calibrate, store
from mlem_dist.tuning.recipes import calibrated

BUDGETS = (3, 5, 10, 20, 40)
LADDERS = {"two": (2, 3), "three": (1, 2, 3)}


def part_of(ladder: Ladder, numbers: Sequence[int], folder: Path) -> Ladder:
    """A ladder of some of the levels, by number."""
    if not folder.exists():
        shutil.copytree(ladder.folder, folder, ignore=shutil.ignore_patterns("training", "calibration.json", "*.png"))
        raw = json.loads((folder / "ladder.json").read_text())
        raw["levels"] = [raw["levels"][number - 1] for number in numbers]
        (folder / "ladder.json").write_text(json.dumps(raw))
    return Ladder.load(folder)


@race_command
def main(folder: Path, data: Path, threads: int, out: Path) -> None:
    """Write OUT/LADDER/frontier-ode.json and the plans of each ladder."""
    for name, numbers in LADDERS.items():
        ladder = part_of(Ladder.load(folder), numbers, folder.parent / f"{folder.name}-{name}")
        if not calibrated(ladder):
            images = load_images(data, ladder.sample_shape, ladder.labels)
            store(ladder.folder, ladder, calibrate(ladder, "cpu", held_out=HeldOut.of(images, ladder)))
        race(name, ladder, BUDGETS, BUDGETS, out / name, threads)


if __name__ == "__main__":
    main()
