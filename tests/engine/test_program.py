"""Programs: what a block does over pools is what the integrator does in one process."""

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlem_dist.engine.blocks import Blocks
from mlem_dist.engine.job import Job
from mlem_dist.engine.program import Program
from mlem_dist.engine.worker import LevelWorker, TrajectoryWorker
from mlem_dist.solver.integrate import integrate
from mlem_dist.solver.plan import Plan, extrapolated, held, impulse

STEPS = 6


@st.composite
def plans(draw, levels: int) -> Plan:
    """Plans of all kinds, of which every step has a value of level 1."""
    row = st.lists(st.booleans(), min_size=STEPS, max_size=STEPS)
    fire = np.array(draw(st.lists(row, min_size=levels, max_size=levels)))
    fire[0] = True
    kind = draw(st.sampled_from(["impulse", "held", "extrapolated"]))
    if kind == "impulse":
        return impulse(fire, np.where(fire, 0.5, 1.0))
    plan = held(fire) if kind == "held" else extrapolated(fire, np.arange(float(STEPS)))
    return Plan(plan.fire, plan.weight, plan.previous, collapse=draw(st.booleans()))


@st.composite
def placements(draw, levels: int) -> tuple[range, ...]:
    cuts = sorted(draw(st.sets(st.integers(2, levels))))
    return tuple(map(range, [1, *cuts], [*cuts, levels + 1]))


def by_pools(job: Job, pools: tuple[range, ...]) -> np.ndarray:
    """The first block's images, as the workers of pools make them, driven here as a coordinator would."""
    home, *others = ((TrajectoryWorker if not pool else LevelWorker)(job, pools, pool) for pool in range(len(pools)))
    for worker in (home, *others):
        worker.prepare()
    program = iter(Program(job.block_plan(0), pools).segments)
    end, payload = home.start(0)
    for segment in program:
        assert end.asks == segment.asks
        if not segment.asks:
            return payload
        answers = [others[ask.pool - 1].evaluate([(0, ask)], payload)[1] for ask in end.asks]
        end, payload = home.resume(0, *answers)
    raise AssertionError("the program has ended before the block")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_workers_of_any_placement_do_what_the_integrator_does(three, make_job, data):
    levels = len(three.levels)
    plan, pools = data.draw(plans(levels)), data.draw(placements(levels))
    job = make_job(plan, three, steps=STEPS, num=4, block_size=4, shard_size=4)
    blocks = Blocks(job, three)
    with torch.inference_mode():
        modules = {k: three.load_level(k, "cpu") for k in range(1, levels + 1)}
        condition = blocks.condition(0)
        closed_form = blocks.closed_form(0, condition)
        x = integrate(modules, blocks.table, plan, blocks.noise(0), condition, closed_form)
    np.testing.assert_array_equal(by_pools(job, pools), blocks.images(0, x))
