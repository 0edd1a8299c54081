"""Forecasts of the generation of a dataset on a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mlem_dist.api.arguments import Solver, check_new, find_plan, load_ladder
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.sizes import default_block, default_shard
from mlem_dist.solver.plan import Draw, Increments
from mlem_dist.solver.probabilities import Rule
from mlem_dist.solver.steps import Spacing, canonical_solver

if TYPE_CHECKING:
    from mlem_dist.capacity.planner import Capacity


def capacity(
    ladder: str | Path | Ladder,
    *,
    num: int,
    pool_devices: str,
    cost: Sequence[str] = (),
    nfe: float | None = None,
    solver: Solver = "ode",
    steps: int | None = None,
    probabilities: Rule | Literal["neyman"] | None = None,
    draw: Draw | None = None,
    increments: Increments | None = None,
    grid: Spacing = "trailing",
    block_size: int | None = None,
    shard_size: int | None = None,
    out: Path | None = None,
) -> tuple[list[Capacity], dict[str, float]]:
    """Forecast the generation of a dataset on a cluster by simulation: rate, hours, bottleneck, best placement.

    Args:
        ladder: a bundled name, a folder, or a ladder.
        num: number of images.
        pool_devices: numbers of devices by kind, with memory in GiB if known: KIND:COUNT or KIND:COUNT:GIB, such as
            "h100:64:80,l4:256:24".
        cost: costs of the levels on a kind, in ms per sample, such as "h100=0.01,0.2,1"; measured costs by default.
        out: path of a PNG file for a timeline of the actors of a cell.

    The other arguments are as for `generate`.

    Returns:
        Forecasts, fastest first, and the gain in images per second from one more device of each kind.

    Raises:
        UsageError: if an argument is out of range, or the ladder does not fit on the devices.
    """
    from mlem_dist.capacity.planner import marginal, plan_capacity, read_kinds
    from mlem_dist.engine.job import Workload, check_shards
    from mlem_dist.extras import require

    loaded = load_ladder(ladder)
    if out is not None:
        require("matplotlib", "figures")
        check_new(out)
    kinds = read_kinds(loaded, pool_devices, cost)
    chosen, _ = find_plan(
        loaded,
        loaded.shared_costs(kinds[0].costs.alone),
        solver=canonical_solver(solver),
        steps=steps,
        nfe=nfe,
        grid=grid,
        probabilities=probabilities,
        draw=draw,
        increments=increments,
    )
    if block_size is None:
        block_size = default_block(loaded, kinds[0].devices.type, kinds[0].memory)
    if shard_size is None:
        shard_size = default_shard(loaded, block_size)
    workload = Workload(num, chosen, 0, block_size, shard_size)
    check_shards(workload)
    forecasts = plan_capacity(workload, loaded.weight_bytes, kinds)
    gains = marginal(workload, forecasts[0])
    if out is not None:
        from mlem_dist.report.figures import save_timeline

        save_timeline(forecasts[0], out)
    return forecasts, gains
