"""`Local`: functionals predicted from values and derivatives of their neighbourhood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from scipy.spatial import cKDTree
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hyperlearn.gp.backend import Blocks
from hyperlearn.gp.elementary import Elementary, Term, elementary, terms
from operators import Functionals, Kernel, KernelGram, Representers
from solvers import NotPositiveDefiniteError

# Entries of Gram matrices that are worked on at once.
ENTRIES = 2**19


class _Part(NamedTuple):
    """``coefficient_i sum_j weights_ij z[places_ij]``, in rows of the result; what that leaves."""

    rows: Tensor
    places: Tensor
    weights: Tensor
    variances: Tensor


class Local:
    """``M u = B E u + e`` with sparse B and independent e: M predicted from neighbours in E.

    What is in E is taken from it. Else ``B_i = k(M_i, N) k(N, N)^-1`` and ``var e_i = k(M_i, M_i) -
    B_i k(N, M_i)``, N the functionals nearest to the point of M_i: the column that a KL factor
    would have if M_i were the last in its order. Differentiable with respect to the kernels.

    Parameters
    ----------
    elementary, kernels
        E, and the kernels by field.
    blocks
        M.
    neighbours
        How many functionals each N has; as many of each kind.
    nugget
        Relative to the variances of N.

    Raises
    ------
    NotPositiveDefiniteError
        ``k(N, N)`` is not, to working precision.

    Notes
    -----
    Costs ``s^2`` evaluations and ``s^3 / 3`` flops a functional that is not in E, of s neighbours.
    Gram matrices are computed again for a derivative, some thousand functionals at a time.
    """

    def __init__(
        self,
        elementary: Elementary,
        kernels: Mapping[str, Kernel],
        blocks: Blocks,
        neighbours: int,
        nugget: float,
    ) -> None:
        self.elementary, self.kernels = elementary, kernels
        self.neighbours, self.nugget = neighbours, nugget
        self.parts: list[_Part] = []
        # What is to be predicted at the same points has the same neighbours.
        asked: dict[Any, list[tuple[Tensor, Term]]] = {}
        start = 0
        for block in blocks:
            size = 0
            for name, L in block.items():
                size = len(L)
                rows = start + torch.arange(size, device=L.points.device)
                for term in terms(L, split=name in elementary.split):
                    place = elementary.places(name, term)
                    own = place >= 0
                    if bool(own.any()):
                        weights = term.coefficient[own][:, None]
                        none = torch.zeros_like(weights[:, 0])
                        self.parts.append(_Part(rows[own], place[own][:, None], weights, none))
                    if not bool(own.all()):
                        key = (name, id(L.points), own.cpu().numpy().tobytes())
                        left = Term(term.kind, L.points[~own], term.coefficient[~own])
                        asked.setdefault(key, []).append((rows[~own], left))
            start += size
        self.size = start
        for (name, *_), those in asked.items():
            self._predict(name, those)

    def apply(self, z: Tensor) -> Tensor:
        """``B z``, ``(m,)``."""
        total = z.new_zeros(self.size)
        for part in self.parts:
            total = total.index_add(0, part.rows, (part.weights * z[part.places]).sum(1))
        return total

    def transposed(self) -> Tensor:
        """``B^T``, dense ``(N, m)``."""
        total = torch.zeros(
            self.elementary.size * self.size,
            dtype=self.parts[0].weights.dtype,
            device=self.parts[0].weights.device,
        )
        for part in self.parts:
            place = part.places * self.size + part.rows[:, None]
            total = total.index_add(0, place.flatten(), part.weights.flatten())
        return total.reshape(self.elementary.size, self.size)

    @property
    def variances(self) -> Tensor:
        """Of e, ``(m,)``."""
        total = self.parts[0].variances.new_zeros(self.size)
        for part in self.parts:
            total = total.index_add(0, part.rows, part.variances)
        return total

    def _predict(self, name: str, asked: list[tuple[Tensor, Term]]) -> None:
        """Of functionals of several kinds at the same points."""
        start, functionals = self.elementary.of_field(name)
        points = asked[0][1].points
        near, pieces = self._neighbours(functionals, points)
        kinds = list(dict.fromkeys(term.kind for _, term in asked))
        joint = Representers(
            self.kernels[name], [*functionals, *(elementary(kind, points) for kind in kinds)]
        )
        gram, m, first = KernelGram(joint), len(points), sum(map(len, functionals))
        own = first + torch.arange(m, device=near.device)[:, None]
        own = own + m * torch.arange(len(kinds), device=near.device)
        size = max(1, ENTRIES // near.shape[1] ** 2)
        found = [
            checkpoint(_conditional, gram, some, itself, pieces, self.nugget, use_reentrant=False)
            for some, itself in zip(near.split(size), own.split(size), strict=True)
        ]
        weights = torch.cat([weights for weights, _ in found])
        left = torch.cat([left for _, left in found])
        for rows, term in asked:
            c, k = term.coefficient, kinds.index(term.kind)
            part = _Part(rows, start + near, c[:, None] * weights[..., k], c.square() * left[:, k])
            self.parts.append(part)

    def _neighbours(
        self, functionals: list[Functionals], points: Tensor
    ) -> tuple[Tensor, list[int]]:
        """The nearest of each kind, as many of each, ``(m, s)``; and how many."""
        each = -(-self.neighbours // len(functionals))
        found, pieces, start = [], [], 0
        for L in functionals:
            count = min(each, len(L))
            tree = cKDTree(L.points.detach().cpu().numpy())
            near = tree.query(points.detach().cpu().numpy(), k=range(1, count + 1))[1]
            found.append(torch.from_numpy(near.astype("int64")) + start)
            pieces.append(count)
            start += len(L)
        return torch.cat(found, 1).to(points.device), pieces


def _conditional(
    gram: KernelGram, near: Tensor, own: Tensor, pieces: list[int], nugget: float
) -> tuple[Tensor, Tensor]:
    """``k(N, N)^-1 k(N, i)``, ``(B, s, c)``, and the variances that are left, ``(B, c)``."""
    parts = near.split(pieces, 1)
    # Kind by kind: one formula for each piece, and of mirrored ones one is evaluated.
    blocks: list[list[Tensor]] = []
    for i, left in enumerate(parts):
        mirrored = [blocks[j][i].mT for j in range(i)]
        blocks.append([*mirrored, *(gram.submatrix(left, right) for right in parts[i:])])
    inside = torch.cat([torch.cat(block, -1) for block in blocks], -2)
    mine = own.split(1, 1)
    across = torch.cat(
        [torch.cat([gram.submatrix(part, one) for one in mine], -1) for part in parts], -2
    )
    itself = torch.cat([gram.submatrix(one, one)[:, 0] for one in mine], -1)
    # To unit variance: values and derivatives differ by orders of magnitude.
    scale = inside.diagonal(0, 1, 2).rsqrt()[:, :, None]
    eye = torch.eye(near.shape[1], dtype=inside.dtype, device=inside.device)
    factor, failed = torch.linalg.cholesky_ex(inside * scale * scale.mT + nugget * eye)
    if bool(failed.any()):
        raise NotPositiveDefiniteError(
            f"the Gram matrix of {near.shape[1]} neighbours is not positive definite with the "
            f"nugget {nugget:g}: raise it, or take fewer neighbours"
        )
    across = across * scale
    solved = torch.cholesky_solve(across, factor)
    left = itself - (solved * across).sum(1)
    return solved * scale, left.clamp_min(0)
