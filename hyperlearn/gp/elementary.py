"""`Elementary`: rows as sparse combinations of values and single derivatives, each of them once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from hyperlearn.gp.backend import Blocks
from operators import Functionals
from operators.kernels.jets import axis_pairs

# A value, d_a, the Laplacian, or d_a d_b, by name and axes.
Kind = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Term:
    """``coefficient_i (D u)(x_i)`` in the rows of a block; D by its kind."""

    kind: Kind
    points: Tensor
    coefficient: Tensor

    def functionals(self) -> Functionals:
        """``(D u)(x_i)``."""
        return elementary(self.kind, self.points)


def elementary(kind: Kind, points: Tensor) -> Functionals:
    """Functionals of one kind at points."""
    name, axes = kind
    if name == "value":
        return Functionals.value_at(points)
    if name == "gradient":
        return Functionals.gradient_at(points, *axes)
    return Functionals.laplacian_at(points) if not axes else Functionals.second_at(points, *axes)


def terms(L: Functionals, *, split: bool) -> list[Term]:
    """What functionals are made of; with `split` Laplacians are sums of second derivatives."""
    found: dict[Kind, Tensor] = {}

    def add(kind: Kind, coefficient: Tensor) -> None:
        found[kind] = found[kind] + coefficient if kind in found else coefficient

    if L.value is not None:
        add(("value", ()), L.value)
    if L.gradient is not None:
        for a in L.slopes:
            add(("gradient", (a,)), L.gradient[:, a])
    if L.laplacian is not None:
        axes = [(a, a) for a in range(L.dimension)] if split else [()]
        for pair in axes:
            add(("second", pair), L.laplacian)
    if L.hessian is not None:
        H = L.hessian
        for a, b in axis_pairs(L.dimension) if L.entries is None else L.entries:
            add(("second", (a, b)), H[:, a, a] if a == b else H[:, a, b] + H[:, b, a])
    return [Term(kind, L.points, coefficient) for kind, coefficient in found.items()]


@dataclass(frozen=True, eq=False)
class Combination:
    """A sparse matrix W, ``(n, N)``, whose coefficients are differentiated."""

    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]

    def apply(self, coefficients: Tensor, z: Tensor) -> Tensor:
        """``W z`` for ``(N,)`` or ``(N, k)``."""
        return self._sum(coefficients, z, self.columns, self.rows, self.shape[0])

    def apply_transposed(self, coefficients: Tensor, v: Tensor) -> Tensor:
        """``W^T v`` for ``(n,)`` or ``(n, k)``."""
        return self._sum(coefficients, v, self.rows, self.columns, self.shape[1])

    def _sum(self, weights: Tensor, v: Tensor, taken: Tensor, put: Tensor, size: int) -> Tensor:
        w = weights if v.ndim == 1 else weights[:, None]
        return v.new_zeros(size, *v.shape[1:]).index_add(0, put, w * v[taken])


class Elementary:
    """The values and derivatives that rows are made of, in a fixed order, each of them once.

    Parameters
    ----------
    blocks
        Functionals by field.

    Notes
    -----
    Independent of the coefficients: those of equations that are linearised at another state are the
    same. Where a field has single second derivatives its Laplacians are sums of them, which
    otherwise would be linearly dependent.
    """

    def __init__(self, blocks: Blocks) -> None:
        self.split = {
            name for block in blocks for name, L in block.items() if L.hessian is not None
        }
        held: dict[tuple[str, Kind], list[Tensor]] = {}
        for block in blocks:
            for name, L in block.items():
                for term in terms(L, split=name in self.split):
                    held.setdefault((name, term.kind), []).append(term.points)
        # Field by field.
        self.keys = sorted(held)
        self.points: dict[tuple[str, Kind], Tensor] = {}
        self.starts: dict[tuple[str, Kind], int] = {}
        self.size = 0
        for key in self.keys:
            stacked = torch.cat(held[key])
            unique = np.unique(stacked.detach().cpu().numpy(), axis=0)
            self.points[key] = torch.from_numpy(unique).to(stacked)
            self.starts[key] = self.size
            self.size += len(unique)
        self._trees: dict[tuple[str, Kind], cKDTree] = {}

    @property
    def fields(self) -> list[str]:
        """Names of the fields, in order."""
        return sorted({name for name, _ in self.keys})

    def of_field(self, field: str) -> tuple[int, list[Functionals]]:
        """Where the functionals of a field begin; and these."""
        keys = [key for key in self.keys if key[0] == field]
        return self.starts[keys[0]], [elementary(key[1], self.points[key]) for key in keys]

    def places(self, field: str, term: Term) -> Tensor:
        """Where the functionals of a term are, ``(n,)``; -1 for those that are not among these."""
        key, x = (field, term.kind), term.points
        if key not in self.points:
            return torch.full((len(x),), -1, device=x.device)
        if key not in self._trees:
            self._trees[key] = cKDTree(self.points[key].detach().cpu().numpy())
        distance, index = self._trees[key].query(x.detach().cpu().numpy())
        place = np.where(distance == 0, index + self.starts[key], -1)
        return torch.from_numpy(place.astype(np.int64)).to(x.device)

    def combination(self, blocks: Blocks) -> tuple[Combination, Tensor]:
        """W and its coefficients, for the blocks that these are of."""
        rows, columns, coefficients = [], [], []
        start = 0
        for block in blocks:
            size = 0
            for name, L in block.items():
                size = len(L)
                for term in terms(L, split=name in self.split):
                    columns.append(self.places(name, term))
                    rows.append(torch.arange(start, start + size, device=L.points.device))
                    coefficients.append(term.coefficient)
            start += size
        W = Combination(torch.cat(rows), torch.cat(columns), (start, self.size))
        return W, torch.cat(coefficients)

    def same(self, other: Elementary) -> bool:
        """Whether both are of the same functionals."""
        return self.keys == other.keys and all(
            torch.equal(self.points[key], other.points[key]) for key in self.keys
        )
