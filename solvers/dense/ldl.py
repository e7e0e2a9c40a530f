"""`DenseLDL`, and the `Inertia` that its factorisation shows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.dense.matrix import finite_dense, first_failure, lower_half
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.members import Members, batch_of, block_of
from solvers.solution import SingularError, StructureError


class Inertia(NamedTuple):
    """Numbers of positive, negative and zero eigenvalues of a symmetric matrix."""

    positive: int
    negative: int
    zero: int


@dataclass(frozen=True, kw_only=True)
class DenseLDL(LinearSolver):
    """``P A P^T = L D L^T`` of a symmetric, perhaps indefinite operator, formed as a dense matrix.

    D has blocks of size one and two on its diagonal, and L is unit lower triangular (Bunch and
    Kaufman, 1977, doi:10.1090/S0025-5718-1977-0428694-0). Costs n products with A, ``n^3 / 3``
    flops, half of `DenseLU`, and ``n^2`` numbers once; ``2 n^2`` flops a solve. For the saddle
    points of constrained problems, and for Hessians away from a minimum. A batch is factorised in
    one call.

    What it prepares has an attribute ``inertia``, an `Inertia`, or a tuple with that of each member
    of a batch: by Sylvester's law A has the signs of D.

    Notes
    -----
    The signs are those of a matrix within rounding of A. An eigenvalue of D counts as zero up to
    ``n eps |A|_1``; as L may enlarge rounding, an eigenvalue of A that is zero can still come out
    with a sign (for three in a hundred random singular matrices one did): `zero` is at most the
    dimension of the null space, which `SVD` tells. In optimisation a KKT matrix ``[[H, J^T],
    [J, 0]]`` of n variables and m constraints has inertia ``(n, m, 0)`` where J has full rank and
    H is positive definite on its null space (Gould, 1985, doi:10.1007/BF01585660).

    torch has this factorisation on the CPU, and on CUDA where it was built with cuSOLVER, which
    takes the members of a batch in turn; torch calls it experimental.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Dense(torch.tensor([[0.0, 2.0], [2.0, 3.0]]), symmetric=True)
    >>> factor = DenseLDL().prepare(A)
    >>> factor.solve(torch.tensor([2.0, 5.0])).value.round(decimals=5)
    tensor([1., 1.])
    >>> factor.inertia
    Inertia(positive=1, negative=1, zero=0)
    """

    @property
    def columnwise(self) -> bool:
        """True."""
        return True

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Factorise.

        Raises
        ------
        StructureError
            A is not known to be symmetric.
        SingularError
            A block of D is exactly zero; it is named, and the member of a batch.
        TypeError
            A is on a device that torch has no such factorisation for.
        """
        if not A.symmetric:
            raise StructureError(
                f"DenseLDL needs a symmetric operator; {A!r} does not claim to be: claim it, or "
                "use DenseLU"
            )
        if A.device.type not in ("cpu", "cuda"):
            raise TypeError(
                f"DenseLDL: {A!r} is on {A.device}, where torch has no LDL^T; expected the CPU or "
                "CUDA, or use DenseLU"
            )
        return _PreparedLDL(self, A)


class _PreparedLDL(PreparedSolver):
    def __init__(self, solver: DenseLDL, A: LinearOperator) -> None:
        super().__init__(solver, A)
        matrix = finite_dense(A, "DenseLDL")
        self.factor, self.pivots, codes = torch.linalg.ldl_factor_ex(lower_half(matrix))
        if failure := first_failure(A, codes):
            name, block = failure
            raise SingularError(
                f"{name} is singular: entry {block} of the diagonal of its D is exactly zero; add "
                "damping, or use SVD for the shortest least-squares solution"
            )
        self._size = matrix.abs().sum(-2).amax(-1) if matrix.numel() else matrix.new_zeros(())

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        x = torch.linalg.ldl_solve(self.factor, self.pivots, batch_of(self.A, block))
        return block_of(self.A, x), Progress()

    @cached_property
    def inertia(self) -> Inertia | tuple[Inertia, ...]:
        """Numbers of positive, negative and zero eigenvalues of A; of each member of a batch."""
        values = _eigenvalues_of_blocks(self.factor, self.pivots)
        zero = self.A.shape[0] * torch.finfo(values.dtype).eps * self._size[..., None]
        signs = [values > zero, values < -zero, values.abs() <= zero]
        counts = torch.stack([sign.sum(-1) for sign in signs], -1).tolist()
        if isinstance(self.A, Members):
            return tuple(Inertia(*count) for count in counts)
        return Inertia(*counts)


def _eigenvalues_of_blocks(factor: Tensor, pivots: Tensor) -> Tensor:
    """Eigenvalues ``(..., n)`` of the blocks of D, as LAPACK's sytrf leaves them in the factor.

    Two rows with negative pivots are one block ``[[a, b], [b, c]]``.
    """
    a = factor.diagonal(dim1=-2, dim2=-1)
    if not a.shape[-1]:
        return a
    paired = pivots < 0
    first = paired & (paired.cumsum(-1) % 2 == 1)
    c = a.roll(-1, -1)
    b = torch.nn.functional.pad(factor.diagonal(-1, -2, -1), (0, 1))
    mean, radius = (a + c) / 2, torch.hypot((a - c) / 2, b)
    lower = torch.where(paired, (mean - radius).roll(1, -1), a)
    return torch.where(first, mean + radius, lower)
