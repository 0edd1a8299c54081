"""The integrator: one loop, which this module drives in one process and the runtime drives across actors."""

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mlem_dist.solver.closed_form import ClosedForm, Projected
from mlem_dist.solver.condition import Condition
from mlem_dist.solver.noise import Noise
from mlem_dist.solver.plan import Increment, Plan, Term
from mlem_dist.solver.steps import StepTable

Known = dict[Hashable, Tensor]
"""Values that are known at a state, time and condition: those of levels by number, and others that levels share."""


class Drift(Protocol):
    """The drift f^k of a level as a function."""

    def __call__(self, x: Tensor, t: Tensor, condition: Condition, known: Known, /) -> Tensor:
        """The drift in the shape of x (B, C, H, W) float32, for t (B,) float32 and the condition of B samples.

        `known` has the values of other levels at the same arguments, by number. A level that takes the value of another
        one evaluates that level only if its value is not known. Levels may note further values there for each other.
        """
        ...


@dataclass(frozen=True)
class Request:
    """The values of `terms` at state x and time t, which the trajectory needs before it can take step `step`."""

    step: int
    t: float
    x: Tensor
    terms: tuple[Term, ...]


def trajectory(
    table: StepTable,
    plan: Plan,
    noise: Noise,
    closed_form: ClosedForm | None = None,
    observe: Callable[[Tensor], None] = lambda x: None,
) -> Generator[Request, list[Tensor], Tensor]:
    """x_{i+1} = a_i x_i + b_i sum_j w_j(i) v_j + c_i z_i, over the terms v_j of the plan that are live at step i.

    This generator yields a `Request` where a step evaluates terms, receives their values, and returns x_N. A plan that
    collapses needs `closed_form`. A table with a memory adds d_i m_{i-1}, m_i = u_i x_i + v_i sum_j w_j(i) v_j.
    `observe` receives the state before each run, which is a single step unless the plan collapses.
    """
    x = noise(-1)
    if table.scale != 1:
        x = table.scale * x
    memory = torch.zeros_like(x)
    live: list[tuple[Term, Tensor]] = []
    held: dict[Term, Projected] = {}
    # The state between two consecutive runs in closed form.
    carried: Projected | None = None
    for run in plan.runs:
        i = run.start
        observe(x)
        if run.terms:
            live += zip(run.terms, (yield Request(i, float(table.t[i]), x, run.terms)), strict=True)
        live = [(term, value) for term, value in live if i < term.stop]
        if run.base:
            assert closed_form is not None
            assert table.memory is None
            held = {term: held.get(term) or Projected(value) for term, value in live}
            weights = [(held[term], term.weights_at(i, run.stop)) for term, _ in live]
            carried = closed_form.advance(i, carried or Projected(x), run.base, weights, noise)
            x = carried.value.view_as(x)
            continue
        carried = None
        step = float(table.a[i]) * x
        for term, value in live:
            step.add_(value, alpha=float(table.b[i]) * term.weights[i - term.start])
        if table.c[i]:
            step.add_(noise(i), alpha=float(table.c[i]))
        if table.memory:
            step.add_(memory, alpha=float(table.memory.d[i]))
            memory = float(table.memory.u[i]) * x
            for term, value in live:
                memory.add_(value, alpha=float(table.memory.v[i]) * term.weights[i - term.start])
        x = step
    return x


def evaluate(
    levels: Mapping[int, Drift],
    terms: Sequence[Term] | Sequence[Increment],
    x: Tensor,
    t: float | Tensor,
    condition: Condition,
) -> list[Tensor]:
    """f^level - f^below of each term at x (B, C, H, W); a level that several terms share is called once.

    Levels are called in order, and receive the values of the levels below that are called too. The time t is a number
    for all samples, or float32 (B,).
    """
    times = t if isinstance(t, Tensor) else torch.full((len(x),), t, dtype=torch.float32, device=x.device)
    called: Known = {}
    for k in sorted({k for term in terms for k in term.calls}):
        called[k] = levels[k](x, times, condition, called)
    return [called[term.level] - called[term.below] if term.below else called[term.level] for term in terms]


@torch.inference_mode()
def integrate(
    levels: Mapping[int, Drift],
    table: StepTable,
    plan: Plan,
    noise: Noise,
    condition: Condition,
    closed_form: ClosedForm | None = None,
    observe: Callable[[Tensor], None] = lambda x: None,
) -> Tensor:
    """The final state x_N, float32 (B, C, H, W), of a block with a condition: the one-process reference.

    `levels` maps each level's number, from 1, to its drift. The other arguments are as for `trajectory`.
    """
    run = trajectory(table, plan, noise, closed_form, observe)
    values = None
    while True:
        try:
            request = run.send(values)  # type: ignore[arg-type]  # None starts it
        except StopIteration as end:
            x: Tensor = end.value
            return x
        values = evaluate(levels, request.terms, request.x, request.t, condition)
