"""`KLCholesky` and `kl_factor`: the sparse inverse factor, as preconditioner and by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from operators import Cost, LinearOperator, Structure
from solvers.kernel.kl_factor import KLFactor
from solvers.kernel.kl_pattern import KLPattern, Ordering, check_settings
from solvers.matrix import as_operator
from solvers.preconditioner import Preconditioner
from solvers.preconditioners.approximate_inverse import ApproximateInverse
from solvers.preconditioners.entries import on_arrays
from solvers.solution import StructureError


@dataclass(frozen=True, kw_only=True)
class KLCholesky(Preconditioner):
    """``P = U U^T`` with sparse triangular U: for kernels of finite smoothness, as Matern's.

    Symmetric positive definite. Among all U with its pattern this one minimises the divergence of
    Kullback and Leibler between the centred Gaussians with covariances A and ``(U U^T)^-1``.

    Parameters
    ----------
    rho, supernodes, neighbours, ordering
        Of the pattern: see `KLPattern.of`.
    nugget
        U is that of ``A + nugget diag(A)``.
    pattern
        One made before, for these functionals; the settings above are not looked at then. By
        default it is made from ``A.points`` and ``A.orders``, or those of an operand.

    Notes
    -----
    The error falls exponentially with rho for Green's functions of elliptic operators, which
    Matern kernels are, where values come before derivatives (Schaefer, Katzfuss and Owhadi, 2021,
    arXiv:2004.14455, section 3; Chen, Owhadi and Schaefer, 2023, arXiv:2304.01294, section 4). The
    smoother the kernel, the larger rho must be; for Gaussian kernels take `PivotedCholesky`.
    Costs: see `KLFactor`.

    What `prepare` returns has `update` (for another matrix of the same functionals), `factor` and
    `pattern`.

    Examples
    --------
    >>> import torch, operators as ops
    >>> line = torch.linspace(0, 1, 40, dtype=torch.float64)[:, None]
    >>> A = ops.Dense(torch.exp(-torch.cdist(line, line)), positive_definite=True)
    >>> P = KLCholesky(pattern=KLPattern.of(line, rho=3.0)).prepare(A)
    >>> b = torch.ones(40, dtype=torch.float64)
    >>> torch.allclose(P @ b, torch.linalg.solve(A.matrix, b))  # screening is exact on a line
    True
    """

    rho: float = 3.0
    supernodes: float = 1.5
    neighbours: int = 3
    ordering: Ordering = "derivatives-last"
    nugget: float = 0.0
    pattern: KLPattern | None = None

    def __post_init__(self) -> None:
        check_settings("KLCholesky", self.rho, self.supernodes, self.neighbours, self.ordering)
        if not 0 <= self.nugget < float("inf"):
            raise ValueError(f"KLCholesky: nugget={self.nugget}; expected a number >= 0")

    def pattern_of(self, A: LinearOperator) -> KLPattern:
        """The pattern that was handed over, or a new one from where the functionals of A sit.

        Raises
        ------
        StructureError
            A does not say where.
        """
        if self.pattern is not None:
            return self.pattern
        return KLPattern.of_operator(
            A,
            rho=self.rho,
            supernodes=self.supernodes,
            neighbours=self.neighbours,
            ordering=self.ordering,
        )

    def _prepare(self, A: LinearOperator) -> LinearOperator:
        """Order, and factorise.

        Raises
        ------
        StructureError
            A is not known to be symmetric, or does not say where its functionals sit.
        TypeError
            A has no cheap entries.
        NotPositiveDefiniteError
            A small Gram matrix is not positive definite to working precision.
        """
        return KLInverse(self, A, self.pattern_of(A))


class KLInverse(ApproximateInverse):
    """``U U^T``, as `KLCholesky.prepare` returns it."""

    backend = "scipy"

    def __init__(self, settings: KLCholesky, A: LinearOperator, pattern: KLPattern) -> None:
        super().__init__(settings, A, Structure(symmetric=True, positive_definite=True))
        with torch.no_grad():
            self.factor = KLFactor(A, pattern, settings.nugget)
        self.pattern, self.factor_nonzeros = pattern, pattern.nnz
        self.kl_settings = settings

    def update(self, A: Any) -> KLInverse:
        """The same for another operator of these functionals: order and pattern are kept."""
        return KLInverse(self.kl_settings, as_operator(A), self.pattern)

    def _apply(self, block: Tensor, transpose: bool) -> Tensor:
        pattern = self.pattern
        return on_arrays(
            lambda v: self.factor.numbers.gram(v[pattern.order])[pattern.inverse_order], block
        )

    def _cost(self) -> Cost:
        return Cost(flops=4 * self.factor_nonzeros)

    def _describe(self) -> str:
        return f"{self.factor_nonzeros} nonzeros, rho={self.pattern.rho:g}"


def kl_factor(
    A: Any, settings: KLCholesky | KLPattern = KLCholesky(), *, nugget: float | None = None
) -> KLFactor:
    """U with ``A^-1 ~ U U^T``: solves, products, determinant and samples in near-linear time.

    Parameters
    ----------
    A
        Symmetric positive definite operator with `operators.LinearOperator.submatrix`; with
        settings alone it, or an operand, has `points` (and `orders`) too.
    settings
        How to order and what to keep; or a pattern.
    nugget
        U is that of ``A + nugget diag(A)``; by default as the settings say.

    Returns
    -------
    KLFactor
        Differentiable with respect to the tensors of A.

    Raises
    ------
    TypeError
        `settings` is neither; or A has no cheap entries.
    StructureError, ValueError, NotPositiveDefiniteError
        As for `KLFactor`.

    Examples
    --------
    >>> import torch, operators as ops
    >>> line = torch.linspace(0, 1, 40, dtype=torch.float64)[:, None]
    >>> A = ops.Dense(torch.exp(-torch.cdist(line, line)), positive_definite=True)
    >>> factor = kl_factor(A, KLPattern.of(line, rho=3.0))
    >>> torch.allclose(factor.logdet(), torch.logdet(A.matrix))
    True
    """
    operator = A if isinstance(A, LinearOperator) else as_operator(A)
    if operator.shape[0] != operator.shape[1]:
        raise StructureError(f"kl_factor needs a square operator; got {operator!r}")
    if isinstance(settings, KLPattern):
        return KLFactor(operator, settings, nugget or 0.0)
    if not isinstance(settings, KLCholesky):
        raise TypeError(f"settings is {settings!r:.80}; expected KLCholesky(...) or a KLPattern")
    amount = settings.nugget if nugget is None else nugget
    return KLFactor(operator, settings.pattern_of(operator), amount)
