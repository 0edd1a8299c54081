"""The exact denoiser of a Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlem_dist.solver.closed_form import AffineDrift
from mlem_dist.solver.condition import LABEL, Condition
from mlem_dist.solver.conversion import combination
from mlem_dist.solver.process import Process

CHUNK_BYTES = 2**28
"""Memory limit, in bytes, for the class bases gathered at a time on a GPU, one basis for each sample."""

FIT_ROWS = 4096
"""Number of samples added to a covariance at a time."""


def _rows(x0: Tensor, index: Tensor, in_range: Callable[[Tensor], Tensor]) -> Tensor:
    return in_range(x0[index]).flatten(1).double()


class GaussianLevel(nn.Module):
    """The exact denoiser of one Gaussian per class, low rank plus isotropic.

    For x0 ~ N(mu, S), S = Q diag(v) Q^T + r (I - Q Q^T), the expected noise given x is
    sigma (alpha^2 S + sigma^2 I)^-1 (x - alpha mu); cf. Wang & Vastola, "The unreasonable effectiveness of Gaussian
    score approximation" (2024). With the expected image as well, the drift A x0 + B epsilon of the process is

        A mu + (A alpha S + B sigma I) (alpha^2 S + sigma^2 I)^-1 (x - alpha mu)

    Buffers: mean (classes, d), basis Q (classes, d, rank), variance v (classes, rank),
    residual r (classes,), all float32, with d the number of values of a sample.
    """

    mean: Tensor
    basis: Tensor
    variance: Tensor
    residual: Tensor

    def __init__(self, classes: int, d: int, rank: int, process: Process) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(classes, d))
        self.register_buffer("basis", torch.zeros(classes, d, rank))
        self.register_buffer("variance", torch.zeros(classes, rank))
        self.register_buffer("residual", torch.zeros(classes))
        self.process = process

    def fit(self, x0: Tensor, label: Tensor, in_range: Callable[[Tensor], Tensor] = Tensor.double) -> None:
        """Fit the mean and covariance of each class to x0 (n, C, H, W) with classes label (n,).

        `in_range` maps a part of x0 to the ladder's value range; memory may not suffice for all of x0 at once.
        """
        d, rank = self.basis.shape[1:]
        for c in range(self.mean.shape[0]):
            members = (label == c).nonzero(as_tuple=True)[0]
            parts = members.split(FIT_ROWS)
            mean = sum((_rows(x0, part, in_range).sum(0) for part in parts), torch.zeros(d).double()) / len(members)
            self.mean[c] = mean
            if len(members) > d:
                covariance = torch.zeros(d, d).double()
                for part in parts:
                    centred = _rows(x0, part, in_range) - mean
                    covariance += centred.T @ centred
                covariance /= len(members) - 1
                total = covariance.trace()
                value, vector = torch.linalg.eigh(covariance)
            else:
                # A smaller matrix has the same non-zero eigenvalues; the directions of the others do not matter.
                centred = (_rows(x0, members, in_range) - mean) / math.sqrt(len(members) - 1)
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

    def forward(self, x: Tensor, t: Tensor, condition: Condition, *_: object) -> Tensor:
        """Drift for x (B, C, H, W) float32 at times t (B,), with the classes of the condition."""
        flat, label = x.flatten(1), self.classes(condition, len(x))
        alpha, sigma = (value[:, None] for value in self.process.marginal(t))
        if x.is_cuda:
            size = max(1, CHUNK_BYTES // self.basis[0].nbytes)
            parts = zip(*(value.split(size) for value in (flat, alpha, sigma, label)), strict=True)
            return torch.cat([self._gathered(*part) for part in parts]).view_as(x)
        out = torch.empty_like(flat)
        # A loop over the classes of the batch, as gathering a basis for each sample would move too much memory.
        for c in label.unique().tolist():
            rows = (label == c).nonzero(as_tuple=True)[0]
            centred = flat[rows] - alpha[rows] * self.mean[c]
            outside = self._gain(self.residual[c], alpha[rows], sigma[rows])
            inside = self._gain(self.variance[c], alpha[rows], sigma[rows])
            thin = ((inside - outside) * (centred @ self.basis[c])) @ self.basis[c].T
            out[rows] = self._offset(self.mean[c], alpha[rows], sigma[rows]) + outside * centred + thin
        return out.view_as(x)

    def _gathered(self, x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """The drift for x (B, d). The kernels do not depend on the values of tensors, as a CUDA graph requires."""
        basis, residual = self.basis[label], self.residual[label][:, None]
        centred = x - alpha * self.mean[label]
        outside = self._gain(residual, alpha, sigma)
        inside = self._gain(self.variance[label], alpha, sigma)
        thin = (inside - outside) * torch.bmm(centred[:, None], basis)[:, 0]
        offset = self._offset(self.mean[label], alpha, sigma)
        return offset + outside * centred + torch.bmm(basis, thin[:, :, None])[:, :, 0]

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
        return AffineDrift(self.mean, self.basis, self._gain(variance[:, None], alpha, sigma), alpha[:, 0], offset)
