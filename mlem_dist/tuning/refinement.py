"""Fitted weights refined end to end, by Gauss-Newton on the error where trajectories end.

The fit of one segment after the other leaves out that its weights also change the states at which later values are
evaluated. Here all factors theta of a fit move together. With e(theta) = x_N(theta) - x*_N, where x*_N is the best
level's end, and J its derivative, a step is

    (J^T J + DAMPING S) step = -J^T e ,

S the squares that the fit has found for each segment on its own. One pass forward over a sample and two back give
J^T e and J^T v for a vector v of random signs, and E[(J^T v) (J^T v)^T] = J^T J.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mlem_dist.solver.plan import Plan
from mlem_dist.tuning.least_squares import LARGEST, Block, Fit, Fitter, ridge
from mlem_dist.tuning.tell import Tell

PASSES = 2
"""Number of steps, each from derivatives on all samples; a third one gains two per cent on other samples."""

DAMPING = 0.1
MEMORY = 0.7
"""J^T J is a mean over the passes, in which each counts by so much less than the next one."""


def fitted_plan(fitter: Fitter, nfe: float, progress: Tell, refining: Tell) -> Plan:
    """The plan of at most `nfe` evaluations of the best level; of small budgets, the fit is refined.

    Args:
        progress: of the search.
        refining: of the refinement.

    Raises:
        UsageError: the budget is below the cost of one call of the best level.
    """
    fit = fitter.search(nfe, progress)
    return (refine(fitter, fit, refining) if nfe <= LARGEST else fit).plan()


def refine(fitter: Fitter, fit: Fit, progress: Tell = lambda done, total: None) -> Fit:
    """The fit with its factors moved to least error on all of the fitter's samples; never a worse one.

    Holds what derivatives need of one evaluation, and the states between, for as many blocks as the judge has threads.
    `progress` is told how many passes are done, of how many.
    """
    metric = torch.block_diag(*(torch.from_numpy(segment.squares) for segment in fit.segments)).numpy()
    metric += ridge(metric)
    best = moved = np.concatenate([segment.factors for segment in fit.segments])
    least, curvature, weight, step = np.inf, np.zeros_like(metric), 0.0, np.zeros_like(best)
    for done in range(PASSES):
        progress(done, PASSES)
        parts = list(fitter.pool.map(partial(derivatives, fitter, fit, moved, done), fitter.blocks))
        error, gradient, squares = (np.mean(of_blocks, 0) for of_blocks in zip(*parts, strict=True))
        if error < least:
            best, least = moved, float(error)
            curvature, weight = MEMORY * curvature + squares, MEMORY * weight + 1
            step = -np.linalg.solve(curvature / weight + DAMPING * metric, gradient)
        else:
            step = step / 2
        moved = best + step
    error = float(np.mean(list(fitter.pool.map(partial(_error, fitter, fit, moved), fitter.blocks))))
    progress(PASSES, PASSES)
    return with_factors(fit, *((moved, error) if error < least else (best, least)))


def with_factors(fit: Fit, factors: np.ndarray, error: float) -> Fit:
    """A fit with other factors, float64 (P,), of all segments one after the other, and their error."""
    parts = np.split(factors, np.cumsum(_sizes(fit))[:-1])
    segments = [replace(segment, factors=part) for segment, part in zip(fit.segments, parts, strict=True)]
    return replace(fit, segments=tuple(segments), error=error)


def _sizes(fit: Fit) -> list[int]:
    return [len(segment.choices) for segment in fit.segments]


def derivatives(
    fitter: Fitter, fit: Fit, factors: np.ndarray, seed: int, block: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """Of a block at float64 (P,) factors: error, J^T e (P,) and an estimate of J^T J (P, P), as means per value."""
    state = Block(fitter, fit.rungs, block)
    # Every sample has factors of its own, so that one pass back gives a row for each.
    own = torch.tensor(factors, dtype=torch.float32, device=state.x.device).expand(len(state.x), -1).clone()
    end = _end(state, fit, own.requires_grad_())
    off = (end - state.path[-1]).detach()
    generator = torch.Generator().manual_seed(seed * len(fitter.blocks) + block)
    probe = (torch.randint(2, off.shape, generator=generator) * 2.0 - 1).to(off.device)
    (of_error,) = torch.autograd.grad(end, own, off, retain_graph=True)
    (of_probe,) = torch.autograd.grad(end, own, probe)
    rows = of_probe.double()
    gradient, squares = of_error.double().sum(0) / off.numel(), rows.T @ rows / off.numel()
    return float(off.square().mean()), gradient.cpu().numpy(), squares.cpu().numpy()


@torch.inference_mode()
def _error(fitter: Fitter, fit: Fit, factors: np.ndarray, block: int) -> float:
    state = Block(fitter, fit.rungs, block)
    own = torch.tensor(factors, dtype=torch.float32, device=state.x.device).expand(len(state.x), -1)
    return float((_end(state, fit, own) - state.path[-1]).square().mean())


def _end(state: Block, fit: Fit, factors: Tensor) -> Tensor:
    """x_N (B, C, H, W) of a block whose samples have the factors (B, P)."""
    # Of an evaluation only the state is kept, and the rest computed again on the way back.
    state.levels = {k: partial(checkpoint, level, use_reentrant=False) for k, level in state.levels.items()}
    state.begin(fit.segments[0].start)
    for segment, own in zip(fit.segments, factors.split(_sizes(fit), dim=1), strict=True):
        state.evaluate(segment.start, segment.fresh)
        columns = torch.stack([state.column(choice) for choice in segment.choices])
        state.x = state.run(segment.stop, []) + torch.einsum("bc,cbd->bd", own, columns).view_as(state.x)
    return state.x
