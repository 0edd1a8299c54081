"""Arguments that several functions of the API share: their defaults, types and checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlem_dist.errors import UsageError
from mlem_dist.files import check_writable
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.plan import Plan, Recipe, read_plan
from mlem_dist.tuning.tuned_plans import choose_plan

DEFAULT_NFE = 10.0
"""Budget per sample, in evaluations of the best level."""

Solver = Literal["ode", "sde", "dpm++", "ddim", "ddpm"]
Precision = Literal["float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]

Notify = Callable[[str], None]
"""A function that receives a sentence for the user."""


def ignore(value: object) -> None:
    """Discard a notification or a snapshot of progress."""


def load_ladder(ladder: str | Path | Ladder) -> Ladder:
    """A ladder by its bundled name or folder; a loaded one as it is.

    Raises:
        UsageError: as `Ladder.load`.
    """
    return ladder if isinstance(ladder, Ladder) else Ladder.load(ladder)


def local_device(device: str) -> str:
    """ "cpu" or "cuda" on this machine; "auto" is a GPU if there is one.

    Raises:
        UsageError: there is no such device.
    """
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"`device` {device!r}: expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("`device` cuda: torch finds no CUDA device on this machine; use `device` cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def find_plan(
    ladder: Ladder,
    cost: np.ndarray,
    *,
    solver: str,
    steps: int,
    nfe: float | None = None,
    plan: Plan | str | Path | None = None,
    **choices: Any,
) -> tuple[Plan | Recipe, str]:
    """The given plan, or that of a budget by the levels' `cost` (K,); and a note for the user, or "".

    Raises:
        UsageError: the plan is for another ladder, solver or number of steps; a budget is given beside it; or as
            `choose_plan`.
    """
    if plan is None:
        return choose_plan(ladder, cost, solver, steps, DEFAULT_NFE if nfe is None else nfe, **choices)
    if given := [name for name, value in {"nfe": nfe, **choices}.items() if value is not None]:
        raise UsageError(f"`{given[0]}` and `plan` exclude each other: a plan has its own; leave one out")
    if isinstance(plan, Plan):
        if plan.fire.shape != (len(ladder.levels), steps):
            raise UsageError(
                f"`plan` is of {plan.fire.shape[0]} levels and {plan.fire.shape[1]} steps, expected "
                f"{len(ladder.levels)} and {steps}"
            )
        return plan, ""
    return read_plan(Path(plan), ladder.digest, len(ladder.levels), solver, steps), ""


def check_labels(labels: Sequence[int] | None, ladder: Ladder) -> tuple[int, ...]:
    """The classes to generate; all of the ladder's if none are given, (0,) where it has none.

    Raises:
        UsageError: the ladder has no such class, or one is given twice.
    """
    classes = len(ladder.labels)
    if labels is None:
        return tuple(range(max(1, classes)))
    text = ",".join(map(str, labels))
    if not classes:
        raise UsageError(f"`labels` {text}: the ladder has no classes; leave it out")
    if not labels:
        raise UsageError("`labels` is empty, expected at least one class")
    if bad := [label for label in labels if not 0 <= label < classes]:
        raise UsageError(f"`labels`: {bad[0]} is out of range, the ladder has classes 0 to {classes - 1}")
    if len(set(labels)) != len(labels):
        raise UsageError(f"`labels` {text}: a class stands there twice")
    return tuple(labels)


def check_new(out: Path) -> None:
    """Refuse a file to write that is there, or in a folder that cannot be written.

    Raises:
        UsageError: it is, with the way out.
    """
    check_writable(out.parent)
    try:
        exists = out.exists() or out.is_symlink()
    except OSError as error:
        raise UsageError(f"`out` {out} cannot be written: {error.strerror}; choose another name") from None
    if exists:
        raise UsageError(f"`out` {out} exists; choose another name")
