"""Defaults, types and checks of arguments that several functions of the API share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlem_dist.dataset.prompts import NEGATIVE_PROMPT, PROMPT, PromptTable, open_prompts, prompts_file, table_of_texts
from mlem_dist.dataset.schema import SCALE
from mlem_dist.dataset.shards import WORK
from mlem_dist.errors import UsageError
from mlem_dist.extras import require
from mlem_dist.files import check_writable
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.schema import OWN, SCHEMA_VERSION, UNGUIDED
from mlem_dist.solver.costs import LevelCosts
from mlem_dist.solver.plan import Plan, Recipe, read_plan
from mlem_dist.solver.steps import Spacing
from mlem_dist.store import HubFile, Location
from mlem_dist.tuning.tuned_plans import choose_plan

DEFAULT_NFE = 10.0
"""Default budget per sample, in evaluations of the best level."""

Solver = Literal["ode", "sde", "dpm++", "ddim", "ddpm"]
Precision = Literal["float32", "bfloat16", "float16", "own"]
Device = Literal["auto", "cpu", "cuda"]

Notify = Callable[[str], None]
"""Function that receives a sentence for the user."""


def ignore(value: object) -> None:
    """Discard a notification or a snapshot of progress."""


def load_ladder(ladder: str | Path | Ladder) -> Ladder:
    """The ladder of a bundled name or a folder; a loaded ladder is returned unchanged.

    Raises:
        UsageError: as for `Ladder.load`.
    """
    return ladder if isinstance(ladder, Ladder) else Ladder.load(ladder)


def check_precision(precision: Precision | None, ladder: Ladder) -> str:
    """The precision of a job, by default float32 for a trained ladder, and for others each model's own."""
    return precision or ("float32" if ladder.schema_version == SCHEMA_VERSION else OWN)


def local_device(device: str) -> str:
    """The device type on this machine, "cpu" or "cuda"; "auto" selects a GPU if there is one.

    Raises:
        UsageError: if `device` is unknown, or this machine has no such device.
    """
    import torch

    from mlem_dist.models.devices import default_device

    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"`device` {device!r}: expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("`device` cuda: torch finds no CUDA device on this machine; use `device` cpu")
    return default_device() if device == "auto" else device


def find_plan(
    ladder: Ladder,
    cost: np.ndarray | LevelCosts,
    *,
    solver: str,
    steps: int | None,
    nfe: float | None = None,
    plan: Plan | str | Path | None = None,
    grid: Spacing = "trailing",
    **choices: Any,
) -> tuple[Plan | Recipe, str]:
    """The given plan, or the plan or recipe of a budget for level costs `cost`, and a note for the user or "".

    Without `steps`, plans have the steps that they were made with.

    Raises:
        UsageError: if the plan is for another ladder, solver or number of steps, or a budget is given as well; or as
            for `choose_plan`.
    """
    if plan is None:
        return choose_plan(ladder, cost, solver, steps, DEFAULT_NFE if nfe is None else nfe, grid, **choices)
    if given := [name for name, value in {"nfe": nfe, **choices}.items() if value is not None]:
        raise UsageError(f"`{given[0]}` and `plan` exclude each other: a plan has its own; leave one out")
    if isinstance(plan, Plan):
        if len(plan.fire) != len(ladder.levels) or steps not in (None, plan.steps):
            raise UsageError(
                f"`plan` is of {len(plan.fire)} levels and {plan.steps} steps, expected {len(ladder.levels)} and "
                f"{steps or plan.steps}"
            )
        return plan, ""
    return read_plan(Path(plan), ladder.digest, len(ladder.levels), solver, steps), ""


def check_labels(labels: Sequence[int] | None, ladder: Ladder) -> tuple[int, ...]:
    """The classes to generate: `labels`, or by default all classes of the ladder; none if it is unconditional.

    Raises:
        UsageError: if `labels` is empty, the ladder lacks one of the classes, or a class is given twice.
    """
    classes = len(ladder.labels)
    if labels is None:
        return tuple(range(classes))
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


def find_prompts(
    prompts: str | Location | HubFile | Sequence[str] | None,
    ladder: Ladder,
    negative_prompts: str | Sequence[str | None] | None = None,
    column: str = PROMPT,
    images: int = 1,
    out: Location | None = None,
) -> tuple[PromptTable | None, str | None]:
    """The table of prompts, and the negative prompt of all of its rows; None for a ladder that takes none.

    Args:
        prompts: texts, or a file as for `open_prompts`.
        negative_prompts: the negative prompt of all rows or, of texts, of each.
        column: name of the column of prompts.
        images: number of images per prompt.
        out: the dataset that an earlier run may have begun.

    Raises:
        UsageError: if prompts are missing or empty, are no texts, the ladder takes none, or transformers is missing; or
            as in `open_prompts`.
    """
    if images < 1:
        raise UsageError(f"`images_per_prompt` {images}: expected at least 1")
    given = (prompts, negative_prompts, column, images) != (None, None, PROMPT, 1)
    if not given and not ladder.encoder:
        return None, None
    if not ladder.encoder:
        raise UsageError(
            f"`prompts`: ladder {ladder.name!r} is not conditioned on prompts; leave them out, or take a ladder that is"
        )
    require("transformers", "prompts", "text")
    every = negative_prompts if isinstance(negative_prompts, str) else None
    if isinstance(prompts, str):
        prompts = prompts_file(prompts)
    if prompts is not None and not isinstance(prompts, Sequence):
        work = out.absolute() / WORK if out is not None else None
        table = open_prompts(prompts, column, images, work, carried=out is not None)
        if negative_prompts is not None and every is None:
            raise UsageError("`negative_prompts` is a list, expected one text for all rows of a file of prompts")
        if every is not None and table.has(NEGATIVE_PROMPT):
            raise UsageError(f"`negative_prompts`: {prompts} has negative prompts of its own; leave out either")
        return table, every
    if column != PROMPT:
        raise UsageError(f"`prompt_column` {column}: expected a file of prompts, whose column it names")
    if prompts is None:
        raise UsageError(f"`prompts` is missing: ladder {ladder.name!r} takes them; give a list or a file")
    if not len(prompts):
        raise UsageError(f"`prompts` is {prompts!r}, expected a list with a prompt for each image")
    if bad := [i for i, text in enumerate(prompts) if not isinstance(text, str)]:
        raise UsageError(f"`prompts`: number {bad[0]} is {prompts[bad[0]]!r}, expected a text")
    each = None if every is not None else negative_prompts
    if each is not None and len(each) != len(prompts):
        raise UsageError(f"`negative_prompts`: {len(each)} for {len(prompts)} prompts, expected as many")
    if bad := [i for i, text in enumerate(each or ()) if not isinstance(text, str | None)]:
        raise UsageError(f"`negative_prompts`: number {bad[0]} is {(each or ())[bad[0]]!r}, expected a text or None")
    return replace(table_of_texts(prompts, each), images=images), every


def check_guidance(guidance: float | None, ladder: Ladder, prompts: PromptTable | None) -> float | None:
    """The scale of guidance of samples whose row has none; None if the ladder's holds for all.

    Raises:
        UsageError: if it is out of range, or the ladder's best level has no guidance.
    """
    by_row = prompts is not None and prompts.has(SCALE)
    if guidance is None and not by_row:
        return None
    own = ladder.levels[-1].guidance
    if own == UNGUIDED:
        what = f"`guidance` {guidance:g}" if guidance is not None else f"`prompts`: the column {SCALE!r}"
        raise UsageError(
            f"{what}: the best level of ladder {ladder.name!r} has no guidance; leave it out, or create the ladder "
            "with guidance"
        )
    if guidance is not None and not 0 <= guidance < math.inf:
        raise UsageError(f"`guidance` {guidance}: expected a number from 0 on")
    return own.scale if guidance is None else float(guidance)


def check_new(out: Path) -> None:
    """Refuse an output file that exists or whose folder is not writable.

    Raises:
        UsageError: if the file exists, or its folder is not writable.
    """
    check_writable(out.parent)
    try:
        exists = out.exists() or out.is_symlink()
    except OSError as error:
        raise UsageError(f"`out` {out} cannot be written: {error.strerror}; choose another name") from None
    if exists:
        raise UsageError(f"`out` {out} exists; choose another name")
