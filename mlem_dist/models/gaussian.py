"""The exact denoisers of Gaussians."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlem_dist.solver.closed_form import AffineDrift, ClosedForm
from mlem_dist.solver.condition import LABEL, MASK, POOLED, TEXT, Condition, take
from mlem_dist.solver.conversion import combination
from mlem_dist.solver.process import Process
from mlem_dist.solver.steps import StepTable

CHUNK_BYTES = 2**28
"""Memory limit, in bytes, for the class bases gathered at a time on a GPU, one basis for each sample."""

FIT_ROWS = 4096
"""Number of samples added to a covariance at a time."""


COMPONENTS = 64
"""Largest number of principal components of prompts' embeddings on which a mean depends."""

RIDGES = np.geomspace(1e-4, 1e4, 33)
"""Candidates for the ridge penalty of that dependence, relative to the largest squared singular value / n."""


def _rows(x0: Tensor, index: Tensor, in_range: Callable[[Tensor], Tensor]) -> Tensor:
    return in_range(x0[index]).flatten(1).double()


def embedding(condition: Condition) -> Tensor:
    """One vector for each sample's prompt, float32 (B, features): the pooled embedding, or the mean over its tokens.

    Without a mask, tokens of padding count as well.
    """
    if POOLED in condition:
        return condition[POOLED].float()
    if MASK not in condition:
        return condition[TEXT].mean(1).float()
    mask = condition[MASK].float()[:, :, None]
    # A placeholder has no token that counts.
    return (condition[TEXT].float() * mask).sum(1) / mask.sum(1).clamp(min=1)


class GaussianLevel(nn.Module):
    """The exact denoiser of a Gaussian for each condition, low rank plus isotropic.

    For x0 ~ N(mu, S), S = Q diag(v) Q^T + r (I - Q Q^T), the expected noise given x is
    sigma (alpha^2 S + sigma^2 I)^-1 (x - alpha mu); cf. Wang & Vastola, "The unreasonable effectiveness of Gaussian
    score approximation" (2024). With the expected image as well, the drift A x0 + B epsilon of the process is

        A mu + (A alpha S + B sigma I) (alpha^2 S + sigma^2 I)^-1 (x - alpha mu)

    S is that of the sample's class, or the same for all conditions. mu is that of its class; for prompts it is
    mean + e U V, with e the `embedding`.

    Buffers: mean (classes, d), basis Q (bases, d, rank), variance v (bases, rank), residual r (bases,), all float32,
    with d the number of values of a sample; bases is `classes` or 1. For prompts also directions U (features,
    components) and responses V (components, d), else None.
    """

    mean: Tensor
    basis: Tensor
    variance: Tensor
    residual: Tensor
    directions: Tensor | None
    responses: Tensor | None

    def __init__(self, classes: int, d: int, rank: int, process: Process, bases: int | None = None) -> None:
        super().__init__()
        bases = bases or classes
        self.register_buffer("mean", torch.zeros(classes, d))
        self.register_buffer("basis", torch.zeros(bases, d, rank))
        self.register_buffer("variance", torch.zeros(bases, rank))
        self.register_buffer("residual", torch.zeros(bases))
        self.register_buffer("directions", None)
        self.register_buffer("responses", None)
        self.process = process

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], process: Process) -> GaussianLevel:
        """The level with the buffers of a file, of any floating-point dtype."""
        bases, d, rank = state["basis"].shape
        level = cls(len(state["mean"]), d, rank, process, bases)
        for name, value in state.items():
            level.register_buffer(name, value.float())
        level.orthonormalise()
        return level

    def fit(self, x0: Tensor, condition: Condition, in_range: Callable[[Tensor], Tensor] = Tensor.double) -> None:
        """Fit means and covariances to x0 (n, C, H, W) with a condition of n samples.

        With a covariance for each class, means are those of the classes. With one for all, means of classes are drawn
        to the common one by as much as their samples are few; those of prompts are a ridge regression on the embedding.
        `in_range` maps a part of x0 to the ladder's value range; memory may not suffice for all of x0 at once.
        """
        everyone = torch.arange(len(x0))
        number = self.classes(condition, len(x0))
        self._fit_means(x0, number, in_range)
        if TEXT in condition:
            self._fit_responses(x0, embedding(condition).double(), in_range)

        def centred(part: Tensor) -> Tensor:
            return _rows(x0, part, in_range) - self.means(take(condition, part), len(part)).double()

        for c in range(len(self.basis)):
            members = everyone if len(self.basis) == 1 else (number == c).nonzero(as_tuple=True)[0]
            self._fit_covariance(c, [partial(centred, part) for part in members.split(FIT_ROWS)], len(members))

    def _fit_means(self, x0: Tensor, number: Tensor, in_range: Callable[[Tensor], Tensor]) -> None:
        classes, d = self.mean.shape
        counts = number.bincount(minlength=classes).double()
        sums, squares = torch.zeros(classes, d).double(), 0.0
        for part in torch.arange(len(x0)).split(FIT_ROWS):
            rows = _rows(x0, part, in_range)
            sums.index_add_(0, number[part], rows)
            squares += float(rows.square().sum())
        mean = sums / counts.clamp(min=1)[:, None]
        if len(self.basis) < classes:
            # Between classes, the variance of the means less what chance makes of it. Cf. James & Stein (1961).
            common, present = sums.sum(0) / len(x0), int((counts > 0).sum())
            freedom = len(x0) - present
            within = max(0.0, squares - float((counts * mean.square().sum(1)).sum())) / max(1, freedom)
            spread = float((counts * (mean - common).square().sum(1)).sum()) - (present - 1) * within
            # One sample of each class says nothing of the variance within classes: all take the common mean.
            effective = max(1e-30, len(x0) - float(counts.square().sum()) / len(x0))
            between = max(0.0, spread) / effective if freedom else 0.0
            share = counts * between / (counts * between + within).clamp(min=1e-30)
            mean = common + share[:, None] * (mean - common)
        self.mean.copy_(mean)

    def _fit_responses(self, x0: Tensor, embedded: Tensor, in_range: Callable[[Tensor], Tensor]) -> None:
        """Ridge regression on principal components, with the penalty of least generalised cross-validation.

        Cf. Golub, Heath & Wahba, "Generalized cross-validation as a method for choosing a good ridge parameter" (1979).
        """
        n, centre = len(x0), embedded.mean(0)
        left, singular, right = torch.linalg.svd(embedded - centre, full_matrices=False)
        kept = int((singular > 1e-6 * singular[0].clamp(min=1e-12)).sum())
        left, singular, right = (value[..., : min(kept, COMPONENTS)] for value in (left, singular, right.T))
        projected, total = torch.zeros(len(singular), self.mean.shape[1]).double(), 0.0
        for part in torch.arange(n).split(FIT_ROWS):
            rows = _rows(x0, part, in_range) - self.mean.double()
            projected += left[part].T @ rows
            total += float(rows.square().sum())
        explained = projected.square().sum(1)

        def score(ridge: float) -> float:
            share = singular.square() / (singular.square() + ridge)
            missing = total - float(((2 * share - share**2) * explained).sum())
            return missing / (1 - (1 + float(share.sum())) / n) ** 2

        largest = float(singular.square().max()) if len(singular) else 1.0
        ridge = min((float(value) * largest for value in RIDGES), key=score)
        responses = (singular / (singular.square() + ridge))[:, None] * projected
        self.directions, self.responses = right.float(), responses.float()
        self.mean.sub_((centre @ right @ responses).float())

    def _fit_covariance(self, c: int, parts: Sequence[Callable[[], Tensor]], n: int) -> None:
        """Fit basis c to n samples less their means, each part a function that returns float64 (rows, d)."""
        d, rank = self.basis.shape[1:]
        if n > d:
            covariance = torch.zeros(d, d).double()
            for part in parts:
                centred = part()
                covariance += centred.T @ centred
            covariance /= n - 1
            total = covariance.trace()
            value, vector = torch.linalg.eigh(covariance)
        else:
            # A smaller matrix has the same non-zero eigenvalues; the directions of the others do not matter.
            centred = torch.cat([part() for part in parts]) / math.sqrt(n - 1)
            total = centred.square().sum()
            value, left = torch.linalg.eigh(centred @ centred.T)
            value, left = value[1:], left[:, 1:]
            vector = centred.T @ left / value.clamp(min=1e-12).sqrt()
        top = min(rank, len(value))
        self.variance[c, rank - top :] = value[-top:].clamp(min=0)
        self.basis[c, :, rank - top :] = vector[:, -top:]
        self.residual[c] = (total - value[-top:].sum()).clamp(min=0) / (d - rank)

    def orthonormalise(self) -> None:
        """Make the columns of Q orthonormal to float32 precision; columns stored in half precision are less accurate.

        One Newton-Schulz step, Q <- Q (3 I - Q^T Q) / 2, squares the deviation from orthonormality. A factorisation
        would take several times as long, and its rounding would depend on the number of threads.
        """
        for basis in self.basis:
            # Columns of other norms, such as zero columns, are not directions of the fit.
            unit = (basis.norm(dim=0) - 1).abs() < 0.01
            q = basis[:, unit].double()
            basis[:, unit] = (1.5 * q - 0.5 * q @ (q.T @ q)).float()

    def classes(self, condition: Condition, batch: int) -> Tensor:
        """The class of each of `batch` samples, int64 (B,); 0 where the condition has no classes."""
        if LABEL in condition:
            return condition[LABEL]
        return torch.zeros(batch, dtype=torch.int64, device=self.mean.device)

    def bases(self, condition: Condition, batch: int) -> Tensor:
        """The number of the basis of each of `batch` samples, int64 (B,)."""
        return self.classes(condition if len(self.basis) > 1 else {}, batch)

    def means(self, condition: Condition, batch: int) -> Tensor:
        """mu of each of `batch` samples, float32 (B, d)."""
        mean = self.mean[self.classes(condition, batch)]
        if self.directions is None or self.responses is None:
            return mean
        return torch.addmm(mean, embedding(condition) @ self.directions, self.responses)

    def forward(self, x: Tensor, t: Tensor, condition: Condition, *_: object) -> Tensor:
        """Drift for x (B, C, H, W) float32 at times t (B,), with the classes or the prompts of the condition."""
        alpha, sigma = (value[:, None] for value in self.process.marginal(t))
        label, mean = self.bases(condition, len(x)), self.means(condition, len(x))
        values = x.flatten(1), alpha, sigma, mean
        if len(self.basis) == 1:
            return self._drift(0, *values).view_as(x)
        if x.is_cuda:
            size = max(1, CHUNK_BYTES // self.basis[0].nbytes)
            parts = zip(*(value.split(size) for value in (label, *values)), strict=True)
            return torch.cat([self._gathered(*part) for part in parts]).view_as(x)
        out = torch.empty_like(values[0])
        # A loop over the classes of the batch, as gathering a basis for each sample would move too much memory.
        for c in label.unique().tolist():
            rows = (label == c).nonzero(as_tuple=True)[0]
            out[rows] = self._drift(c, *(value[rows] for value in values))
        return out.view_as(x)

    def _drift(self, c: int, x: Tensor, alpha: Tensor, sigma: Tensor, mean: Tensor) -> Tensor:
        """The drift for x (B, d) of samples that share basis c."""
        centred = x - alpha * mean
        outside = self._gain(self.residual[c], alpha, sigma)
        inside = self._gain(self.variance[c], alpha, sigma)
        thin = ((inside - outside) * (centred @ self.basis[c])) @ self.basis[c].T
        return self._offset(mean, alpha, sigma) + outside * centred + thin

    def _gathered(self, label: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, mean: Tensor) -> Tensor:
        """The drift for x (B, d). The kernels do not depend on the values of tensors, as a CUDA graph requires."""
        basis, residual = self.basis[label], self.residual[label][:, None]
        centred = x - alpha * mean
        outside = self._gain(residual, alpha, sigma)
        inside = self._gain(self.variance[label], alpha, sigma)
        thin = (inside - outside) * torch.bmm(centred[:, None], basis)[:, 0]
        return self._offset(mean, alpha, sigma) + outside * centred + torch.bmm(basis, thin[:, :, None])[:, :, 0]

    def _gain(self, variance: Any, alpha: Any, sigma: Any) -> Any:
        """The eigenvalue of the drift for the eigenvalue `variance` of S."""
        image, noise = combination(self.process.drift, alpha, sigma)
        return (image * alpha * variance + noise * sigma) / (alpha**2 * variance + sigma**2)

    def _offset(self, mean: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor | float:
        """The term A mu of the drift; zero if the drift is the noise."""
        image, _ = combination(self.process.drift, alpha, sigma)
        return image * mean if isinstance(image, Tensor) or image else 0.0

    def affine(self, t: np.ndarray) -> AffineDrift:
        """The drift at times t (N,) as eigenvalues, for steps in closed form."""
        alpha, sigma = (value.numpy()[:, None] for value in self.process.marginal(torch.from_numpy(t)))
        variance = torch.cat([self.variance, self.residual[:, None]], 1).double().cpu().numpy()
        image, _ = combination(self.process.drift, alpha, sigma)
        offset = np.broadcast_to(image, alpha.shape)[:, 0]
        return AffineDrift(self.basis, self._gain(variance[:, None], alpha, sigma), alpha[:, 0], offset)

    def closed_form(
        self, affine: AffineDrift, table: StepTable, condition: Condition, batch: int, path: bool = False
    ) -> ClosedForm:
        """The closed form of runs of a table's steps for a block; `affine` is the drift at the table's times."""
        return ClosedForm(affine, table, self.bases(condition, batch), self.means(condition, batch), path)
