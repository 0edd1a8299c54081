"""Error against evaluations of a flow: plans and solvers of this package, beside those of diffusers.

python benchmarks/frontier/flow.py --ladder DIR --data /usr/share/datasets/fashion-mnist \
    --out benchmarks/results/frontier-flow

DIR holds the ladder of flow.yaml. Plans are fitted on its largest UNet alone, with the shift of its training and with
none, on the largest above a Gaussian of the images, and on both UNets. The reference is the largest UNet at every
timestep. A rerun goes on where the last one stopped.
"""

import json
from functools import partial
from pathlib import Path

from frontier import FAST_FLOWS, fast
from race import Solver, race, race_command

from mlem_dist.files import file_digest
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.schema import LADDER, SCHEDULER
from mlem_dist.solver.plan import single_level
from mlem_dist.tuning.comparison import Measurement, PlanComparison

BUDGETS, STEPS, SAMPLES = (3, 5, 10, 20), 1000, 128
LADDERS = {
    "single": (("large",), False, 3.0),
    "single-shift-1": (("large",), False, 1.0),
    "gaussian": (("large",), True, 3.0),
    "two": (("small", "large"), False, 3.0),
}
"""Models of each ladder, whether a Gaussian of the images is below them, and the shift of its flow."""


def dpm(nfe: int, judge: PlanComparison) -> Measurement:
    """DPM-Solver++(2M) of this package, on its own grid."""
    levels, steps = len(judge.ladder.levels), len(judge.fine)
    solver = PlanComparison(judge.ladder, "dpm++", "cpu", steps, judge.samples, judge.seed, threads=judge.threads)
    plan = single_level(levels, levels, nfe)
    return judge.measurement(solver.timed(lambda: solver.end(plan, 0)), partial(solver.end, plan))


SOLVERS: dict[str, Solver] = {"dpm++": dpm} | {name: partial(fast, name) for name in FAST_FLOWS}


def with_shift(ladder: Ladder, shift: float) -> Ladder:
    """The ladder with another shift of its flow, which changes its files."""
    if ladder.scheduler["shift"] == shift:
        return ladder
    file = ladder.folder / SCHEDULER
    file.write_text(json.dumps(ladder.scheduler | {"shift": shift}))
    raw = json.loads((ladder.folder / LADDER).read_text()) | {"scheduler_sha256": file_digest(file)}
    (ladder.folder / LADDER).write_text(json.dumps(raw))
    return Ladder.load(ladder.folder)


@race_command
def main(folder: Path, data: Path, threads: int, out: Path) -> None:
    """Write OUT/LADDER/frontier-ode.json and the plans of each ladder."""
    for name, (models, gaussian, shift) in LADDERS.items():
        place = folder.parent / f"{folder.name}-{name}"
        if place.exists():
            ladder = Ladder.load(place)
        else:
            options = {"gaussian": data} if gaussian else {}
            ladder = with_shift(Ladder.create(place, [folder / model for model in models], **options), shift)
        # The fast solvers on the largest UNet are the same for ladders with other levels.
        solvers = {} if gaussian or len(models) > 1 else SOLVERS
        race(name, ladder, BUDGETS, BUDGETS, out / name, threads, STEPS, solvers, SAMPLES)


if __name__ == "__main__":
    main()
