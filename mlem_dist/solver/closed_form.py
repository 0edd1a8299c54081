"""Closed form of a run of steps whose drift is affine in x: in each eigenmode, steps are factors that compose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlem_dist.solver.steps import StepTable

_ONE = ((0, 0), (1, 0), (0, 0))
"""Padding of an array (classes, steps, modes): one entry before the steps."""

BASIS_BYTES = 2**27
"""Memory limit, in bytes, for the bases that a block gathers if it lacks some of the classes; above it, they are
gathered in parts."""

KNOWN_BYTES = 2**26
"""Memory limit, in bytes, for the cached coefficients of runs. Blocks that share a plan share the cache."""


@dataclass(frozen=True)
class AffineDrift:
    """f(x, t_i) = G_i (x - m_i mu) + o_i mu, with matrices G_i that share their eigenvectors, and mu of the sample.

    Attributes:
        basis: Q by class, float32 (classes, d, r), with d the number of values of a sample: orthonormal columns, or
            zero ones.
        gain: float64 (classes, N, r + 1): the eigenvalues of G_i in the columns of Q and, last, outside them.
        centre: m, float64 (N,).
        offset: o, float64 (N,).
    """

    basis: Tensor
    gain: np.ndarray
    centre: np.ndarray
    offset: np.ndarray


def no_drift(steps: int, size: int, device: torch.device | str) -> AffineDrift:
    """f = 0 at `steps` steps for samples of `size` values: runs carry x by the factors a_i alone."""
    zeros = torch.zeros(1, size, 1, device=device)
    return AffineDrift(zeros, np.zeros((1, steps, 2)), np.zeros(steps), np.zeros(steps))


class Projected:
    """A value v (B, d) that runs of steps combine, and its projection once that has been computed.

    Args:
        value: v, (B, ...).
        thin: Q^T v, (B, r), in the basis of each sample's class; None if it has not been computed yet.
    """

    def __init__(self, value: Tensor, thin: Tensor | None = None) -> None:
        self.value = value.flatten(1)
        self.thin = thin


class ClosedForm:
    """Runs of the steps of a table for a block of classes `label` (B,) and means mu (B, d), with f^1 an `AffineDrift`.

    With f = w_i f^1(x, t_i) + h_i, where h_i does not depend on x, step i is x <- (a_i + b_i w_i g_i) x + ... in an
    eigenmode of gain g_i. A run therefore multiplies x by the product of its factors. It multiplies the addend of each
    step by the product of the factors of later steps. The result equals that of single steps but for rounding.

    Args:
        path: whether to take the noise of every single step, which a comparison of plans on one Brownian path needs.
            Otherwise a run scales the noise of its first step to the sum of its noises: the same distribution.
    """

    def __init__(self, drift: AffineDrift, table: StepTable, label: Tensor, mean: Tensor, path: bool = False) -> None:
        self.drift, self.table, self.path = drift, table, path
        self._known: dict[Any, Tensor] = {}
        # The classes of the block's samples only: a ladder may have many more.
        present, self.label, count = label.unique(return_inverse=True, return_counts=True)
        self.gain = drift.gain[present.tolist()]
        everyone = len(present) == len(drift.basis)
        self.parts = [present] if everyone else present.split(max(1, BASIS_BYTES // drift.basis[0].nbytes))
        self.basis = drift.basis if everyone else drift.basis[present] if len(self.parts) == 1 else None
        # `members` (classes, most): the samples of each class, padded with sample 0. `place` (B,): the index of each
        # sample in the flattened `members`.
        order = self.label.argsort(stable=True)
        rank = torch.arange(len(label), device=label.device) - (count.cumsum(0) - count)[self.label[order]]
        self.members = order.new_zeros(len(present), int(count.max()))
        self.members[self.label[order], rank] = order
        self.place = torch.empty_like(order)
        self.place[order] = self.label[order] * self.members.shape[1] + rank
        self.mean = Projected(mean)
        self._project([self.mean])

    def advance(
        self,
        start: int,
        x: Projected,
        base: Sequence[float],
        held: Sequence[tuple[Projected, Sequence[float]]],
        noise: Callable[[int], Tensor],
    ) -> Projected:
        """The state x after the steps start, start + 1, ..., one for each weight in `base`.

        Args:
            x: the state before them.
            base: w_i, the weight of f^1 in each step.
            held: the values that h sums, each with its weight in each step.
            noise: z_i by step.
        """
        noisy = np.flatnonzero(self.table.c[start : start + len(base)]).tolist()
        if not self.path:
            noisy = noisy and [0]
        values = [x, self.mean, *(value for value, _ in held), *(Projected(noise(start + i)) for i in noisy)]
        key = start, tuple(base), tuple(tuple(weights) for _, weights in held), x.value.dtype
        # Several threads may read and write this cache at once, each for its own block.
        coefficients = self._known.get(key)
        if coefficients is None:
            factors = self._coefficients(start, np.array(base), [np.array(weights) for _, weights in held])
            coefficients = torch.tensor(np.stack(factors), dtype=x.value.dtype).to(x.value.device)
            if (1 + len(self._known)) * coefficients.nbytes > KNOWN_BYTES:
                self._known.clear()
            self._known[key] = coefficients
        return self._sum(values, coefficients)

    def _coefficients(self, start: int, base: np.ndarray, held: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Coefficients in `advance`, each (classes, r + 1), of x, the mean, the held values and the noises."""
        steps = slice(start, start + len(base))
        b, c = self.table.b[steps], self.table.c[steps]
        gain, factor, after = self._factors(start, base)

        def carried(factors: np.ndarray) -> np.ndarray:
            return np.asarray((after * factors).sum(1))

        centred = base * self.drift.offset[steps]
        mean = carried(b[:, None] * (centred[:, None] - self.drift.centre[steps, None] * gain))
        coefficients = [after[:, 0] * factor[:, 0], mean]
        coefficients += [carried((b * weights)[:, None]) for weights in held]
        if self.path:
            return coefficients + [after[:, i] * c[i] for i in np.flatnonzero(c).tolist()]
        return coefficients + ([np.sqrt(((after * c[:, None]) ** 2).sum(1))] if c.any() else [])

    def response(self, start: int, weights: np.ndarray) -> np.ndarray:
        """The contribution to x of a value with `weights` in the drift of the steps start, start + 1, ...

        It is a factor on the value in each mode, float64 (classes, r + 1), for the classes of the block. f^1 has weight
        1 in each of these steps.
        """
        _, _, after = self._factors(start, np.ones(len(weights)))
        return np.asarray((after * (self.table.b[start : start + len(weights)] * weights)[:, None]).sum(1))

    def flow(self, start: int) -> np.ndarray:
        """The factor by which f^1 alone carries a change of x from `start` to the end, float64 (classes, r + 1)."""
        if start == len(self.table):
            return np.ones_like(self.gain[:, 0])
        _, factor, after = self._factors(start, np.ones(len(self.table) - start))
        return after[:, 0] * factor[:, 0]

    def scaled(self, value: Projected, coefficients: np.ndarray) -> Tensor:
        """The value (B, d) multiplied in each mode by its coefficient, float64 (classes, r + 1)."""
        only = torch.tensor(coefficients[None], dtype=value.value.dtype, device=value.value.device)
        return self._sum([value], only).value

    def _factors(self, start: int, base: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gains of w f^1, factors of the steps, and products of later factors: each (classes, steps, r + 1)."""
        steps = slice(start, start + len(base))
        gain = self.gain[:, steps] * base[:, None]
        factor = self.table.a[steps, None] + self.table.b[steps, None] * gain
        return gain, factor, np.cumprod(np.pad(factor[:, :0:-1], _ONE, constant_values=1.0), axis=1)[:, ::-1]

    def _sum(self, values: Sequence[Projected], coefficients: Tensor) -> Projected:
        """The sum over q of (o_q I + Q diag(i_q - o_q) Q^T) v_q.

        Of the coefficients (values, classes, r + 1), i_q are the first r, for the columns of Q, and o_q is the last,
        for the modes outside them.
        """
        self._project([value for value in values if value.thin is None])
        coefficients = coefficients[:, self.label]
        inside, outside = coefficients[:, :, :-1], coefficients[:, :, -1:]
        out = torch.zeros_like(values[0].value)
        thin, moved = torch.zeros_like(inside[0]), torch.zeros_like(inside[0])
        for q, value in enumerate(values):
            out.addcmul_(outside[q], value.value)
            thin.addcmul_(inside[q], _thin(value))
            moved.addcmul_(outside[q], _thin(value))
        (change,) = self._by_class((thin - moved)[None], transposed=True)
        return Projected(out.add_(change), thin)

    def _project(self, values: Sequence[Projected]) -> None:
        """Compute Q^T v of several values in one pass, as reading Q takes most of the time."""
        if not values:
            return
        thin = self._by_class(torch.stack([value.value for value in values]))
        for value, projection in zip(values, thin, strict=True):
            value.thin = projection

    def _by_class(self, values: Tensor, transposed: bool = False) -> Tensor:
        """Q^T v (n, B, r) of v (n, B, d), with Q of each sample's class; if `transposed`, Q v of v (n, B, r)."""
        rows = values[:, self.members].transpose(0, 1).flatten(1, 2)
        parts = []
        for part, of_part in zip(self.parts, rows.split([len(part) for part in self.parts]), strict=True):
            basis = (self.drift.basis[part] if self.basis is None else self.basis).to(values.dtype)
            parts.append(torch.bmm(of_part, basis.mT if transposed else basis))
        product = parts[0] if len(parts) == 1 else torch.cat(parts)
        return product.unflatten(1, (len(values), -1)).transpose(0, 1).flatten(1, 2)[:, self.place]


def _thin(value: Projected) -> Tensor:
    assert value.thin is not None
    return value.thin
