"""`Saddle`: saddle-point systems through the Schur complement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from operators import LinearOperator
from operators import Saddle as SaddleOperator
from solvers.dense.cholesky import DenseCholesky
from solvers.dense.lu import DenseLU
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.preconditioner import SolveOperator
from solvers.solution import NotPositiveDefiniteError, SingularError, StructureError
from solvers.structured.parts import Part, PreparedByParts


@dataclass(frozen=True, kw_only=True)
class Saddle(LinearSolver):
    """Inverse of ``A = [[B, G^T], [G, -C]]`` through ``S = C + G B^-1 G^T``.

    For right-hand sides (f, g) and solutions (u, p)

        S p = G B^-1 f - g ,     B u = f - G^T p .

    Parameters
    ----------
    primal_solver
        Solver of B, which is to be invertible; by default `Auto`.
    schur_solver
        Solver of S. By default it is formed, by one solve with B for each dual coordinate, and
        factorised: by Cholesky where B is known to be definite and C semidefinite, else by LU. An
        iterative solver, as ``CG()``, multiplies by S only, at a solve with B a product; that of B
        is then to be the more accurate one.
    rtol, atol, strict
        As for `LinearSolver`.

    Notes
    -----
    With m dual coordinates, beyond the work for B, m solves with B and ``m^3 / 3`` flops once; two
    solves with B, two products with G and ``2 m^2`` flops a solve. Where the residual misses the
    tolerance it is corrected, at most five times. S is singular where rows of G are dependent and C
    is zero there. Where B is singular, though A is not, and C = 0, the system with ``B + c G^T G``
    and ``f + c G^T g`` has the same solution (Benzi, Golub and Liesen, 2005, section 5,
    doi:10.1017/S0962492904000212).

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Saddle(2.0 * ops.Identity(2), ops.Dense(torch.tensor([[1.0, 1.0]])))
    >>> x = Saddle().prepare(A).solve(torch.tensor([3.0, 5.0, 2.0])).value
    >>> x.round(decimals=5)  # minimises |u|^2 - 3 u_1 - 5 u_2 on u_1 + u_2 = 2; the multiplier
    tensor([0.5000, 1.5000, 2.0000])
    """

    primal_solver: LinearSolver | None = None
    schur_solver: LinearSolver | None = None

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Prepare the solvers of B and S.

        Raises
        ------
        StructureError
            A is not an `operators.Saddle`.
        SingularError
            S, or B, is singular.
        """
        if not isinstance(A, SaddleOperator):
            raise StructureError(f"Saddle needs an operators.Saddle; got {A!r}")
        # A dense S takes as many solves with B as G has rows.
        solves = max(2, A.G.shape[0]) if self.schur_solver is None else 2
        return _PreparedSaddle(self, A, Part.of(A.B, self.primal_solver, self, solves))


class _PreparedSaddle(PreparedByParts):
    solver: Saddle
    A: SaddleOperator

    def __init__(self, solver: Saddle, A: SaddleOperator, primal: Part) -> None:
        S = A.schur_complement(SolveOperator(primal.prepared))
        definite = A.B.positive_definite and (A.C is None or A.C.positive_semidefinite)
        dense: LinearSolver = DenseCholesky() if definite else DenseLU()
        try:
            dual = Part((solver.schur_solver or dense)._prepared(S))
        except (NotPositiveDefiniteError, SingularError) as error:
            raise SingularError(
                f"the Schur complement C + G B^-1 G^T of {A!r} is singular, or no more definite: "
                "rows of G are dependent; leave them out, or give a C, e.g. 1e-8 * Identity "
                f"({error})"
            ) from error
        super().__init__(solver, A, [primal, dual])

    def _apply(
        self, block: Tensor, targets: Tensor, progress: Progress, *, transpose: bool
    ) -> Tensor:
        primal, dual = self.parts
        G = self.A.G
        f, g = block.split([G.shape[1], G.shape[0]])
        u = primal.solve(f, targets, progress, transpose=transpose)
        p = dual.solve(G._matmat(u) - g, targets, progress, transpose=transpose)
        u = primal.solve(f - G.T._matmat(p), targets, progress, transpose=transpose)
        return torch.cat([u, p])

    def _update(self, A: LinearOperator) -> PreparedSolver:
        if not isinstance(A, SaddleOperator) or A.G.shape != self.A.G.shape:
            return super()._update(A)
        return _PreparedSaddle(self.solver, A, self.parts[0].update(A.B))
