"""`Kronecker`: systems with Kronecker products and sums, one factor at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from operators import KFAC, Dense, Identity, KroneckerSum, LinearOperator, Scaled, Sum
from operators import Diagonal as DiagonalOperator
from operators import Kronecker as KroneckerOperator
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.matrix import looked_up
from solvers.solution import SingularError, StructureError
from solvers.structured.parts import Part, PreparedByParts


@dataclass(frozen=True, kw_only=True)
class Kronecker(LinearSolver):
    """Inverse of a Kronecker product or sum of small matrices, or of it plus ``l I``.

    A product is inverted factor by factor, ``(S (x) A)^-1 vec(V) = vec(S^-1 V A^-T)``, each factor
    by a solver of its own. A sum, and a product plus a multiple of I, by the eigenvectors of its
    factors, which are to be symmetric: with ``A_i = U_i diag(a_i) U_i^T`` and
    ``U = U_1 (x) ... (x) U_d``,

        (c A_1 (x) ... (x) A_d + l I)^-1 = U diag(c a_1 ... a_d + l)^-1 U^T ,
        (c A_1 (+) ... (+) A_d + l I)^-1 = U diag(c (a_1 + ... + a_d) + l)^-1 U^T .

    A `operators.KFAC` is solved in the same way, layer by layer.

    Parameters
    ----------
    factor_solver
        Solver of the factors of a product; by default `Auto` for each.
    rtol, atol, strict
        As for `LinearSolver`.

    Notes
    -----
    With ``n = n_1 ... n_d`` and dense factors, a product costs ``O(sum n_i^3)`` once and
    ``2 n sum n_i`` flops a solve; the eigenvectors ``9 sum n_i^3`` once and ``4 n sum n_i`` a
    solve, and n numbers. Diagonal factors have no eigenvectors to hold. Eigenvalues of a factor
    that is known to be semidefinite are not let below zero by rounding, so that no sum is below l.
    The condition number is the product of those of the factors: a residual that misses the
    tolerance is corrected, at most five times (Van Loan, 2000, doi:10.1016/S0377-0427(00)00393-9;
    for sums Lynch, Rice and Thomas, 1964, doi:10.1007/BF01386067).

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), positive_definite=True)
    >>> b = torch.tensor([3.0, 3.0, 6.0, 6.0])
    >>> K = ops.Kronecker(ops.Diagonal(torch.tensor([1.0, 2.0])), A)
    >>> Kronecker().prepare(K).solve(b).value.round(decimals=5)
    tensor([1., 1., 1., 1.])
    >>> Kronecker().prepare(K + 3.0 * ops.Identity(4)).solve(2 * b).value.round(decimals=5)
    tensor([1.0000, 1.0000, 1.3333, 1.3333])
    """

    factor_solver: LinearSolver | None = None

    @staticmethod
    def suits(A: LinearOperator) -> Sequence[LinearOperator]:
        """The factors of A, where it has a form that this solver takes; none where it has not."""
        if isinstance(A, KFAC):
            stacks = (factor for pair in A.factors.values() for factor in pair)
            return [Dense(M) for stack in stacks for M in stack.reshape(-1, *stack.shape[-2:])]
        found = _shifted(A)
        if found is None or any(m != n for m, n in _shapes(found.core)):
            return []
        factors = found.core.factors
        product = isinstance(A, KroneckerOperator)
        return factors if product or all(looked_up(f).symmetric for f in factors) else []

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Factorise, or diagonalise, each factor.

        Raises
        ------
        StructureError
            A has no such form, or a factor of a sum is not known to be symmetric.
        SingularError
            An eigenvalue of A is zero to working precision.
        """
        if isinstance(A, KFAC):
            return _PreparedKFAC(self, A)
        found = _shifted(A)
        if found is None:
            raise StructureError(
                f"Kronecker needs an operators.Kronecker, a KroneckerSum, either of them plus a "
                f"multiple of I, or a KFAC; got {A!r}"
            )
        for i, factor in enumerate(found.core.factors):
            if factor.shape[0] != factor.shape[1]:
                raise StructureError(
                    f"Kronecker needs square factors; factor {i} of {A!r} is {factor!r}"
                )
        if isinstance(A, KroneckerOperator):
            factors = [Part.of(factor, self.factor_solver, self) for factor in A.factors]
            return _PreparedProduct(self, A, factors)
        return _PreparedSum(self, A, found)


class Shifted(NamedTuple):
    """``A = c K + l I``."""

    core: KroneckerOperator | KroneckerSum
    factor: float | Tensor = 1.0
    shift: float | Tensor = 0.0


def _shifted(A: LinearOperator) -> Shifted | None:
    """What A is as a multiple of a Kronecker product or sum plus one of I; None where it is not."""
    if isinstance(A, (KroneckerOperator, KroneckerSum)):
        return Shifted(A)
    if isinstance(A, Scaled):
        inner = _shifted(A.operator)
        return inner and Shifted(inner.core, A.factor * inner.factor, A.factor * inner.shift)
    if isinstance(A, Sum):
        for term, other in ((A.left, A.right), (A.right, A.left)):
            if isinstance(other, DiagonalOperator) and other.values.ndim == 0:
                inner = _shifted(term)
                return inner and inner._replace(shift=inner.shift + other.values)
    return None


class _PreparedProduct(PreparedByParts):
    A: KroneckerOperator

    def _apply(
        self, block: Tensor, targets: Tensor, progress: Progress, *, transpose: bool
    ) -> Tensor:
        sizes = [factor.shape[0] for factor in self.A.factors]
        x = block.reshape(*sizes, block.shape[1])
        # Every fibre along an axis is a column for its factor, held to the worst of the targets.
        worst = targets.min() if targets.numel() else targets.new_zeros(())
        for axis, part in enumerate(self.parts):
            moved = x.movedim(axis, 0)
            fibres = moved.reshape(sizes[axis], moved.shape[1:].numel())
            allowed = worst.expand(fibres.shape[1])
            fibres = part.solve(fibres, allowed, progress, transpose=transpose)
            x = fibres.reshape(moved.shape).movedim(0, axis)
        return x.reshape(block.shape)

    def _update(self, A: LinearOperator) -> PreparedSolver:
        if not isinstance(A, KroneckerOperator) or _shapes(A) != _shapes(self.A):
            return super()._update(A)
        pairs = zip(self.parts, A.factors, strict=True)
        return _PreparedProduct(self.solver, A, [part.update(factor) for part, factor in pairs])


def _shapes(A: KroneckerOperator | KroneckerSum) -> Sequence[tuple[int, int]]:
    return [factor.shape for factor in A.factors]


class _PreparedSum(PreparedByParts):
    def __init__(self, solver: Kronecker, A: LinearOperator, found: Shifted) -> None:
        super().__init__(solver, A, [])
        pairs = [_diagonalised(factor, A) for factor in found.core.factors]
        combine = torch.add if isinstance(found.core, KroneckerSum) else torch.mul
        spectrum = pairs[0][0]
        for values, _ in pairs[1:]:
            spectrum = combine(spectrum[:, None], values).reshape(-1)
        spectrum = found.factor * spectrum
        self.eigenvalues = (spectrum + found.shift).to(A.dtype)[:, None]
        if self.eigenvalues.numel():
            size = spectrum.abs().max() + torch.as_tensor(found.shift).abs()
            smallest = self.eigenvalues.abs().min()
            if not bool(smallest > torch.finfo(A.dtype).eps * size):
                raise SingularError(
                    f"{A!r} is singular to working precision: an eigenvalue is "
                    f"{float(smallest):.3g}, where its terms reach {float(size):.3g}; add damping, "
                    "e.g. A + 1e-3 * Identity"
                )
        self.basis = KroneckerOperator(*(vectors for _, vectors in pairs))
        self.basis_transposed = self.basis.T

    def _apply(
        self, block: Tensor, targets: Tensor, progress: Progress, *, transpose: bool
    ) -> Tensor:
        # A is symmetric.
        return self.basis._matmat(self.basis_transposed._matmat(block) / self.eigenvalues)


def _diagonalised(factor: LinearOperator, A: LinearOperator) -> tuple[Tensor, LinearOperator]:
    """Eigenvalues, and the matrix of eigenvectors."""
    if isinstance(factor, DiagonalOperator):
        size = factor.shape[0]
        return factor.values.expand(size), Identity(size, factor.dtype, factor.device)
    if not looked_up(factor).symmetric:
        raise StructureError(
            f"Kronecker diagonalises the factors of {A!r}, but {factor!r} is not known to be "
            "symmetric: claim it, or use GMRES or DenseLU"
        )
    matrix = factor.to_dense()
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values.clamp_min(0) if factor.positive_semidefinite else values, Dense(vectors)


class _PreparedKFAC(PreparedByParts):
    def __init__(self, solver: Kronecker, A: KFAC) -> None:
        super().__init__(solver, A, [])
        try:
            self.inverse = A.inverse()
        except ValueError as error:
            raise SingularError(f"{error}; give it more damping") from error

    def _apply(
        self, block: Tensor, targets: Tensor, progress: Progress, *, transpose: bool
    ) -> Tensor:
        # A is symmetric.
        return self.inverse._matmat(block)
