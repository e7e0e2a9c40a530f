"""`Sparse`: Gaussian processes in near-linear time, for kernels of finite smoothness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperlearn.gp.backend import Backend, Blocks, Factor, System
from hyperlearn.gp.elementary import Combination, Elementary
from hyperlearn.gp.gram_cg import GramCG
from hyperlearn.gp.local import Local
from operators import Diagonal, Kernel, KernelGram, LinearOperator, Representers
from operators.space import Space
from operators.structure import Structure
from solvers import KLCholesky, KLFactor, PreparedSolver, StructureError, kl_factor
from solvers.kernel.kl_pattern import Ordering, check_settings, pattern_tensor
from solvers.kernel.triangle import applied

# Rows up to which an inverse is formed.
INVERTED = 8_000


@dataclass(frozen=True)
class Sparse(Backend):
    """KL-minimising sparse Cholesky: for Matern kernels, up to some 1e5 points.

    The rows are ``L = W E``: sparse combinations of values and single derivatives E, of which each
    occurs once. ``Theta = k(E, E)`` has a sparse approximate inverse factor, ``Theta^-1 ~ U U^T``,
    which is made once for each kernel; ``(U U^T)^-1`` is the covariance of a Gaussian process near
    the given one, and for that one everything here is exact: ``A = W (U U^T)^-1 W^T + D`` is solved
    by conjugate gradients, a product being two sparse triangular systems. They are preconditioned
    by a smaller factor of the same kind, of the rows themselves, which all iterations of
    Gauss-Newton share.

    Parameters
    ----------
    rho
        Of the factor of Theta: accuracy. 3 is enough for some 1e4 points; with more of them 4 is
        not only more accurate, but faster as well: it takes a quarter of the iterations.
    rows_rho
        Of the preconditioner.
    ordering
        Of both; see `solvers.KLPattern.of`.
    supernodes
        Likewise.
    nugget
        What the variances in Theta are multiplied by, less one: neighbours are so alike that Theta,
        without it, is not positive definite in this precision. By default the smallest entry of D,
        at most 1e-10 in float64 and 1e-5 in float32.
    neighbours
        Of a functional that is not in E: by so many functionals of E near it, given which it is
        independent of all others, it is predicted.
    rtol, maxiter
        Of conjugate gradients.

    Raises
    ------
    ValueError
        A setting is out of range.

    Notes
    -----
    Time ``O(N rho^(2 d))``, memory ``O(N rho^d)``. A hypergradient differentiates the products with
    U, and U in the kernel's parameters, at three times the cost of making it, and solves one more
    system, with the same preconditioner.

    Values and derivatives at the equations' own points come with the solution, as ``(U U^T)^-1 W^T
    alpha``. Elsewhere they are predicted from these, locally: alpha of an approximate covariance,
    multiplied by exact ones, would not do, for its entries are of 1e3 to 1e6.

    The determinant is that of a KL factor of the rows, of width `rho`. Source: Chen, Owhadi and
    Schaefer (2023, arXiv:2304.01294, sections 3 to 5).
    """

    rho: float = 4.0
    rows_rho: float = 3.0
    ordering: Ordering = "derivatives-last"
    supernodes: float = 1.5
    nugget: float | None = None
    neighbours: int = 64
    rtol: float = 1e-8
    maxiter: int | None = 2000

    def __post_init__(self) -> None:
        for rho in (self.rho, self.rows_rho):
            check_settings("Sparse", rho, self.supernodes, 3, self.ordering)
        if self.nugget is not None and not 0 <= self.nugget < 1:
            raise ValueError(f"Sparse: nugget={self.nugget}; expected 0 <= nugget < 1, or None")
        if self.neighbours < 1:
            raise ValueError(f"Sparse: neighbours={self.neighbours}; expected at least 1")
        if not 0 < self.rtol < 1:
            raise ValueError(f"Sparse: rtol={self.rtol}; expected between 0 and 1")

    def settings(self, rho: float, nugget: float = 0.0) -> KLCholesky:
        """Of a factor."""
        return KLCholesky(
            rho=rho, supernodes=self.supernodes, ordering=self.ordering, nugget=nugget
        )

    def factor(self, system: System, previous: Factor | None = None) -> Factor:
        """For one system.

        Raises
        ------
        StructureError
            A kernel is infinitely smooth: take `LowRank`.
        NotPositiveDefiniteError
            The nugget is too small for neighbours that are so alike.
        """
        for name, kernel in system.kernels.items():
            if kernel.smoothness == float("inf"):
                raise StructureError(
                    f"Sparse: the kernel of {name}, {kernel!r}, is infinitely smooth: distant "
                    "points do not screen each other; take LowRank, or a Matern kernel"
                )
        known = previous if isinstance(previous, SparseFactor) else None
        return SparseFactor(self, system, known)


@dataclass(frozen=True, eq=False)
class Prior:
    """``E u ~ N(0, (U U^T)^-1)``: values and derivatives, field by field, under the kernels."""

    elementary: Elementary
    kernels: Mapping[str, Kernel]
    factors: list[KLFactor]
    nugget: float

    @classmethod
    def of(
        cls, elementary: Elementary, kernels: Mapping[str, Kernel], settings: KLCholesky
    ) -> Prior:
        """By a KL factor for each field."""
        factors = []
        for name in elementary.fields:
            rows = Representers(kernels[name], elementary.of_field(name)[1])
            factors.append(kl_factor(KernelGram(rows), settings))
        return cls(elementary, kernels, factors, settings.nugget)

    @property
    def values(self) -> list[Tensor]:
        """Entries of U."""
        return [factor.values for factor in self.factors]

    def product(self, z: Tensor, values: Sequence[Tensor] | None = None) -> Tensor:
        """``(U U^T)^-1 z`` for ``(N,)`` or ``(N, k)``; of U with these values, which it has."""
        values = self.values if values is None else values
        parts = z.split([factor.pattern.size for factor in self.factors])
        images = []
        for factor, part, entries in zip(self.factors, parts, values, strict=True):
            pattern, numbers = factor.pattern, factor.numbers
            y = part[pattern_tensor(pattern.order, z.device)]
            y = applied(numbers, entries, applied(numbers, entries, y, "U^-1"), "U^-T")
            images.append(y[pattern_tensor(pattern.inverse_order, z.device)])
        return torch.cat(images)

    def serves(self, elementary: Elementary, kernels: Mapping[str, Kernel]) -> bool:
        """Whether it is that of these, in numbers, and none of them is differentiated."""
        mine, theirs = pytree.tree_leaves(dict(self.kernels)), pytree.tree_leaves(dict(kernels))
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in mine + theirs):
            return False
        return (
            len(mine) == len(theirs)
            and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
            and self.elementary.same(elementary)
        )


class CombinedGram(LinearOperator):
    """``W (U U^T)^-1 W^T + D`` as an operator of the entries of U, of W and of D.

    Its `submatrix` has the kernels' own entries, which its products approximate: they are what a
    preconditioner is made of.
    """

    _parameters = ("values", "coefficients", "diagonal_values")
    _unread = (*LinearOperator._unread, "prior", "W", "entries")

    def __init__(
        self,
        prior: Prior,
        W: Combination,
        coefficients: Tensor,
        diagonal: Tensor,
        rows: Representers,
    ) -> None:
        space = Space.flat(len(diagonal), diagonal.dtype, diagonal.device)
        super().__init__(space, space, Structure(symmetric=True, positive_definite=True))
        self.prior, self.W = prior, W
        self.values, self.coefficients, self.diagonal_values = prior.values, coefficients, diagonal
        plain = pytree.tree_map(torch.detach, rows)
        self.entries = KernelGram(plain) + Diagonal(diagonal.detach())
        self.points, self.orders = torch.cat(plain.points), plain.orders

    def _matvec(self, v: Tensor) -> Tensor:
        return self._matmat(v)

    def _matmat(self, block: Tensor) -> Tensor:
        z = self.W.apply_transposed(self.coefficients, block)
        image = self.W.apply(self.coefficients, self.prior.product(z, self.values))
        d = self.diagonal_values
        return image + (d if block.ndim == 1 else d[:, None]) * block

    def submatrix(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Entries under the kernels themselves; not differentiated."""
        return self.entries.submatrix(rows, columns)

    def _describe(self) -> str:
        nnz = sum(factor.factor_nonzeros for factor in self.prior.factors)
        return f"{self.W.shape[1]} values and derivatives, {nnz} nonzeros"


class SparseFactor(Factor):
    """As `Sparse.factor` returns it."""

    def __init__(self, settings: Sparse, system: System, previous: SparseFactor | None) -> None:
        self.settings, self.system = settings, system
        self.prior: Prior
        self.prepared: PreparedSolver
        elementary = Elementary(system.blocks)
        nugget = settings.nugget
        if nugget is None:
            most = 1e-10 if system.diagonal.dtype == torch.float64 else 1e-5
            nugget = min(most, float(system.diagonal.detach().min()))
        shared = (
            previous is not None
            and previous.settings == settings
            and previous.prior.nugget == nugget
            and previous.prior.serves(elementary, system.kernels)
        )
        if shared:
            assert previous is not None
            self.prior = previous.prior
        else:
            kl = settings.settings(settings.rho, nugget)
            self.prior = Prior.of(elementary, system.kernels, kl)
        self.W, raw = self.prior.elementary.combination(system.blocks)
        self.coefficients = raw * system.scale[self.W.rows]
        self.matrix = CombinedGram(
            self.prior, self.W, self.coefficients, system.diagonal, system.rows
        )
        if shared:
            assert previous is not None
            self.prepared = previous.prepared.update(self.matrix)
        else:
            P = settings.settings(settings.rows_rho)
            solver = GramCG(rtol=settings.rtol, maxiter=settings.maxiter, preconditioner=P)
            self.prepared = solver.prepare(self.matrix)
        self.info: Any = None
        self._seen: tuple[Tensor, Tensor, bool] | None = None

    def solve(self, b: Tensor) -> Tensor:
        """``A^-1 b``; `info` says how that went."""
        value, self.info = self.prepared.solve(b)
        x: Tensor = value
        return x

    def product(self, v: Tensor) -> Tensor:
        """``A v``."""
        return self.matrix._matmat(v)

    def logdet(self) -> Tensor:
        """That of a KL factor of the rows."""
        A = KernelGram(self.system.rows) + Diagonal(self.system.diagonal)
        return kl_factor(A, self.settings.settings(self.settings.rho)).logdet()

    def inverse(self) -> Tensor:
        """``A^-1`` by n solves.

        Raises
        ------
        ValueError
            There are more than 8,000 rows.
        """
        n = self.matrix.shape[0]
        if n > INVERTED:
            raise ValueError(f"Sparse: the inverse of a matrix of order {n} does not fit")
        return self.solve(torch.eye(n, dtype=self.matrix.dtype, device=self.matrix.device))

    # --- the process ------------------------------------------------------------------------------

    def evaluate(self, blocks: Blocks, alpha: Tensor) -> Tensor:
        """Mean of functionals: that of E, or predicted from it by neighbours."""
        return self._local(blocks).apply(self._mean(alpha))

    def cross(self, blocks: Blocks) -> Tensor:
        """Covariance with the rows, ``(m, n)``: m products."""
        z = self._local(blocks).transposed()
        return self.W.apply(self.coefficients, self.prior.product(z)).T

    def variances(self, blocks: Blocks) -> Tensor:
        """Prior variances of functionals; of the process that U stands for."""
        local = self._local(blocks)
        z = local.transposed()
        return (z * self.prior.product(z)).sum(0) + local.variances

    def covariances(self, blocks: Blocks) -> Tensor:
        """Prior covariance ``(m, m)``; given E, functionals are independent of each other."""
        local = self._local(blocks)
        z = local.transposed()
        return z.T @ self.prior.product(z) + torch.diag(local.variances)

    def _mean(self, alpha: Tensor) -> Tensor:
        """``(U U^T)^-1 W^T alpha``: one product, kept for the functionals to come."""
        # One that was made without a graph is no good where there is to be one.
        recorded = torch.is_grad_enabled()
        if self._seen is None or self._seen[0] is not alpha or self._seen[2] != recorded:
            z = self.W.apply_transposed(self.coefficients, alpha)
            self._seen = alpha, self.prior.product(z), recorded
        return self._seen[1]

    def _local(self, blocks: Blocks) -> Local:
        return Local(
            self.prior.elementary, self.prior.kernels, blocks, self.settings.neighbours,
            self.prior.nugget,
        )  # fmt: skip
