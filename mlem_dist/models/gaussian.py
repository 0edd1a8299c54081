"""The exact denoiser of a Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from mlem_dist.solver.closed_form import AffineDrift

CHUNK_BYTES = 2**28
"""Memory limit for the bases of samples that are evaluated at a time on a GPU, each with its class's basis."""

FIT_ROWS = 4096
"""Samples that a covariance is summed up from at a time."""


def _rows(x0: Tensor, index: Tensor, in_range: Callable[[Tensor], Tensor]) -> Tensor:
    return in_range(x0[index]).flatten(1).double()


class GaussianLevel(nn.Module):
    """The exact denoiser of one Gaussian per class, low rank plus isotropic.

    For x0 ~ N(mu, S), S = Q diag(v) Q^T + r (I - Q Q^T), the expected noise given x is
    sqrt(1 - a) (a S + (1 - a) I)^-1 (x - sqrt(a) mu) with a = alpha_bar[t]; cf. Wang & Vastola,
    "The unreasonable effectiveness of Gaussian score approximation" (2024).

    Buffers: mean (classes, d), basis Q (classes, d, rank), variance v (classes, rank),
    residual r (classes,), all float32, with d the number of values of a sample.
    """

    mean: Tensor
    basis: Tensor
    variance: Tensor
    residual: Tensor
    alpha_bar: Tensor

    def __init__(self, classes: int, d: int, rank: int, alpha_bar: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(classes, d))
        self.register_buffer("basis", torch.zeros(classes, d, rank))
        self.register_buffer("variance", torch.zeros(classes, rank))
        self.register_buffer("residual", torch.zeros(classes))
        self.register_buffer("alpha_bar", torch.tensor(alpha_bar, dtype=torch.float32), persistent=False)

    def fit(self, x0: Tensor, label: Tensor, in_range: Callable[[Tensor], Tensor] = Tensor.double) -> None:
        """Take mean and covariance per class from x0 (n, C, H, W) and label (n,).

        `in_range` takes some of x0 to the ladder's value range; there may not be memory for all of it at once.
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
                # The same eigenvalues from a smaller matrix; all others are 0, and their directions do not matter.
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
        """Make the columns of Q orthonormal but for float32, which those that are stored in half precision are not.

        By one step of Newton and Schulz, Q <- Q (3 I - Q^T Q) / 2, which squares how far they are off; a factorisation
        would take several times as long, and round by the number of threads.
        """
        for basis in self.basis:
            # Others are no directions of the fit.
            unit = (basis.norm(dim=0) - 1).abs() < 0.01
            q = basis[:, unit].double()
            basis[:, unit] = (1.5 * q - 0.5 * q @ (q.T @ q)).float()

    def forward(self, x: Tensor, t: Tensor, label: Tensor, *_: Tensor) -> Tensor:
        """Predicted noise for x (B, C, H, W) float32 at timesteps t (B,) int64 with classes label (B,) int64."""
        flat = x.flatten(1)
        a = self.alpha_bar[t][:, None]
        if x.is_cuda:
            size = max(1, CHUNK_BYTES // self.basis[0].nbytes)
            parts = zip(flat.split(size), a.split(size), label.split(size), strict=True)
            return torch.cat([self._gathered(*part) for part in parts]).view_as(x)
        out = torch.empty_like(flat)
        # A loop over the classes present: gathering one basis per sample would move far more memory than it computes.
        for c in label.unique().tolist():
            rows = (label == c).nonzero(as_tuple=True)[0]
            ac = a[rows]
            centred = flat[rows] - ac.sqrt() * self.mean[c]
            outside = 1 / (ac * self.residual[c] + 1 - ac)
            inside = 1 / (ac * self.variance[c] + 1 - ac)
            thin = ((inside - outside) * (centred @ self.basis[c])) @ self.basis[c].T
            out[rows] = (1 - ac).sqrt() * (outside * centred + thin)
        return out.view_as(x)

    def _gathered(self, x: Tensor, a: Tensor, label: Tensor) -> Tensor:
        """The same for x (B, d) and a (B, 1) by kernels that do not depend on values, as a CUDA graph needs them."""
        basis, residual = self.basis[label], self.residual[label][:, None]
        centred = x - a.sqrt() * self.mean[label]
        outside = 1 / (a * residual + 1 - a)
        inside = 1 / (a * self.variance[label] + 1 - a)
        thin = (inside - outside) * torch.bmm(centred[:, None], basis)[:, 0]
        return (1 - a).sqrt() * (outside * centred + torch.bmm(basis, thin[:, :, None])[:, :, 0])

    def affine(self, t: np.ndarray) -> AffineDrift:
        """The same drift at timesteps t (N,), as numbers by eigenmode."""
        a = self.alpha_bar.double().cpu().numpy()[t][:, None]
        variance = torch.cat([self.variance, self.residual[:, None]], 1).double().cpu().numpy()
        gain = np.sqrt(1 - a) / (a * variance[:, None] + 1 - a)
        return AffineDrift(self.mean, self.basis, gain, np.sqrt(a[:, 0]))
