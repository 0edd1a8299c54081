"""Refinement of fitted weights from end to end, by Gauss-Newton on the distance of the final samples.

The fit solves one segment after the other. It ignores that a segment's weights also change the states at which later
values are evaluated. The refinement moves all factors theta of a fit together. Let e(theta) = x_N(theta) - x*_N be the
error of a sample, where x*_N is its final state by the best level, rho the root mean square of e, and J the derivative
of e. A step towards the least mean of rho solves, with means over samples and values,

    (mean J^T J / rho + DAMPING S / mean rho) step = -mean J^T e / rho ,

where S holds the squares of each segment of the fit (iteratively reweighted least squares). One forward and two
backward passes over a sample give J^T e and J^T v for a vector v of random signs, and E[(J^T v) (J^T v)^T] = J^T J.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mlem_dist.solver.condition import Condition
from mlem_dist.solver.integrate import Drift, Known
from mlem_dist.solver.plan import Plan
from mlem_dist.tuning.least_squares import LARGEST, Block, Fit, Fitter, distances, ridge
from mlem_dist.tuning.reporting import ReportProgress

PASSES = 2
"""Number of Gauss-Newton steps, each with derivatives on all samples. A third gains two per cent on other samples."""

DAMPING = 0.1
MEMORY = 0.7
"""Weight of a pass relative to the next one, in the mean of J^T J over the passes."""


def fitted_plan(fitter: Fitter, nfe: float, progress: ReportProgress, refining: ReportProgress) -> Plan:
    """Fitted plan of at most `nfe` evaluations of the best level; up to a budget of `LARGEST`, the fit is refined.

    Args:
        progress: callback of the search.
        refining: callback of the refinement.

    Raises:
        UsageError: if the budget is below the cost of one call of the best level.
    """
    fit = fitter.search(nfe, progress)
    return (refine(fitter, fit, refining) if nfe <= LARGEST else fit).plan()


def refine(fitter: Fitter, fit: Fit, progress: ReportProgress = lambda done, total: None) -> Fit:
    """Fit with its factors moved to less distance on all of the fitter's samples; never a worse fit.

    For one block per thread of the comparison, holds the states of the block and the activations of one evaluation.
    `progress` is called with the number of passes done and their total number.
    """
    metric = torch.block_diag(*(torch.from_numpy(segment.squares) for segment in fit.segments)).numpy()
    metric += ridge(metric)
    best = candidate = np.concatenate([segment.factors for segment in fit.segments])
    least, curvature, weight, step = np.inf, np.zeros_like(metric), 0.0, np.zeros_like(best)
    for done in range(PASSES):
        progress(done, PASSES)
        parts = list(fitter.pool.map(partial(derivatives, fitter, fit, candidate, done), fitter.blocks))
        distance, gradient, squares = (np.mean(of_blocks, 0) for of_blocks in zip(*parts, strict=True))
        if distance < least:
            best, least = candidate, float(distance)
            curvature, weight = MEMORY * curvature + squares, MEMORY * weight + 1
            step = -np.linalg.solve(curvature / weight + DAMPING * metric / distance, gradient)
        else:
            step = step / 2
        candidate = best + step
    distance = float(np.mean(list(fitter.pool.map(partial(_distance, fitter, fit, candidate), fitter.blocks))))
    progress(PASSES, PASSES)
    return with_factors(fit, *((candidate, distance) if distance < least else (best, least)))


def with_factors(fit: Fit, factors: np.ndarray, distance: float) -> Fit:
    """Fit with other factors and their distance; the factors, float64 (P,), are those of all segments in order."""
    parts = np.split(factors, np.cumsum(_sizes(fit))[:-1])
    segments = [replace(segment, factors=part) for segment, part in zip(fit.segments, parts, strict=True)]
    return replace(fit, segments=tuple(segments), distance=distance)


def _sizes(fit: Fit) -> list[int]:
    return [len(segment.choices) for segment in fit.segments]


def derivatives(
    fitter: Fitter, fit: Fit, factors: np.ndarray, seed: int, block: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """Distance, J^T e / rho (P,) and an estimate of J^T J / rho (P, P) of a block at float64 (P,) factors, as means."""
    state = Block(fitter, fit.rungs, fit.closed, block)
    # Each sample has its own copy of the factors, so that one backward pass gives one row per sample.
    sample_factors = torch.tensor(factors, dtype=torch.float32, device=state.x.device).expand(len(state.x), -1).clone()
    end = _end(state, fit, sample_factors.requires_grad_())
    error = (end - state.path[-1]).detach()
    distance = distances(error)
    # A sample without error has no direction.
    weight = 1 / distance.clamp(min=torch.finfo(distance.dtype).eps).view(-1, *[1] * (error.ndim - 1))
    generator = torch.Generator().manual_seed(seed * len(fitter.blocks) + block)
    probe = (torch.randint(2, error.shape, generator=generator) * 2.0 - 1).to(error.device)
    (error_gradient,) = torch.autograd.grad(end, sample_factors, weight * error, retain_graph=True)
    (probe_gradient,) = torch.autograd.grad(end, sample_factors, weight.sqrt() * probe)
    rows = probe_gradient.double()
    gradient, squares = error_gradient.double().sum(0) / error.numel(), rows.T @ rows / error.numel()
    return float(distance.mean()), gradient.cpu().numpy(), squares.cpu().numpy()


@torch.inference_mode()
def _distance(fitter: Fitter, fit: Fit, factors: np.ndarray, block: int) -> float:
    state = Block(fitter, fit.rungs, fit.closed, block)
    sample_factors = torch.tensor(factors, dtype=torch.float32, device=state.x.device).expand(len(state.x), -1)
    return float(distances(_end(state, fit, sample_factors) - state.path[-1]).mean())


def _end(state: Block, fit: Fit, factors: Tensor) -> Tensor:
    """Final samples x_N (B, C, H, W) of a block, each sample with its own factors (B, P)."""
    # Checkpoints keep only the state of an evaluation, and compute the rest again in the backward pass.
    state.levels = {k: recomputed(level) for k, level in state.levels.items()}
    state.begin(fit.segments[0].start)
    for segment, sample_factors in zip(fit.segments, factors.split(_sizes(fit), dim=1), strict=True):
        state.evaluate(segment.start, segment.firing)
        columns = torch.stack([state.column(choice) for choice in segment.choices])
        state.x = state.run(segment.stop, []) + torch.einsum("bc,cbd->bd", sample_factors, columns).view_as(state.x)
    return state.x


def recomputed(level: Drift) -> Drift:
    """A level whose intermediate values are computed again for derivatives instead of kept."""

    def call(x: Tensor, t: Tensor, condition: Condition, known: Known) -> Tensor:
        # Each computation must find the same values known: a level may note further ones.
        before = dict(known)
        return checkpoint(lambda state: level(state, t, condition, dict(before)), x, use_reentrant=False)

    return call
