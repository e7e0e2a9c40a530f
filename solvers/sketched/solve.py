"""`SketchAndSolve`: the least-squares problem of a few random combinations of the equations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from operators import LinearOperator
from solvers.linear_solver import LinearSolver, PreparedSolver, Progress
from solvers.sketched.sketch import KINDS, Kind, Whitening, sketch, sketched


@dataclass(frozen=True, kw_only=True)
class SketchAndSolve(LinearSolver):
    """``x`` that minimises ``|S (b - A x)|`` for a random S with few rows; A tall.

    One approximation, as good as its sketch: with Gaussian S of s rows, A of rank r,

        E |b - A x|^2 = (1 + r / (s - r - 1)) min |b - A x|^2 .

    Where ``A x = b`` has a solution it is found. For a wide A, whose transpose is sketched,
    ``x = A^T (A S^T S A^T)^-1 b``, whose residual is of the order ``sqrt(r / s) |b|``.

    That it stops at the sketch is the method, and is not warned about; ``info.converged`` says
    whether the tolerance is met all the same. `SketchAndPrecondition` goes on to any tolerance.

    Parameters
    ----------
    sketch
        ``"gaussian"``, ``"srht"`` or ``"sparse-sign"``; see `solvers.sketched.sketch.sketch`.
    size
        Rows of S, at least as many as A has columns; by default four times these. Where there are
        no more equations than that, nothing is sketched.
    seed
        Of S.
    rtol, atol, strict
        As for `LinearSolver`.

    Notes
    -----
    With s rows of S and A ``(m, n)``, m >= n, it costs ``S A`` and ``O(s n^2)`` flops once, and
    ``S b`` and ``2 s n`` flops a solve; holds ``s m`` numbers of a Gaussian S, ``8 m`` of a sparse
    one. (Sarlos, 2006, doi:10.1109/FOCS.2006.37; for the expectation Bartan and Pilanci, 2022,
    arXiv:2203.09755.) Singular values of ``S A`` below rounding count as zero, and x
    is then the shortest.

    Examples
    --------
    >>> import torch
    >>> A = torch.stack([torch.ones(100), torch.linspace(0, 1, 100)], 1).double()
    >>> line = SketchAndSolve().prepare(A)
    >>> line.solve(A @ torch.tensor([1.0, 2.0], dtype=torch.float64)).value
    tensor([1.0000, 2.0000], dtype=torch.float64)
    """

    sketch: Kind = "sparse-sign"
    size: int | None = None
    seed: int = 0

    least_squares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sketch(self, self.sketch, self.size)

    @property
    def truncated(self) -> bool:
        """True: one sketch is the method."""
        return True

    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        """Sketch A, and decompose the sketch.

        Raises
        ------
        TypeError
            torch does not factorise the dtype of A.
        ValueError
            The size is below the smaller side of A; or A holds NaN or infinity.
        """
        return _PreparedSketch(self, A)


def check_sketch(solver: LinearSolver, kind: str, size: int | None) -> None:
    """Raise where the settings of a sketch are none."""
    name = type(solver).__name__
    if kind not in KINDS:
        raise ValueError(f"{name}: sketch={kind!r}; expected one of {KINDS}")
    if size is not None and size < 1:
        raise ValueError(f"{name}: size={size}; expected at least 1, or None")


class PreparedSketch(PreparedSolver):
    """What is known of A by a sketch of its longer side: a map N that makes A N well conditioned.

    Parameters
    ----------
    solver, A
        Settings, and the operator.
    kind, size, seed
        Of the sketch.
    """

    def __init__(
        self, solver: LinearSolver, A: LinearOperator, kind: Kind, size: int | None, seed: int
    ) -> None:
        super().__init__(solver, A)
        name = type(solver).__name__
        if A.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{name}: {A!r} is {A.dtype}, which torch does not factorise; expected float32 or "
                "float64"
            )
        self.tall = A.shape[0] >= A.shape[1]
        self.F = A if self.tall else A.T
        n = self.F.shape[1]
        if size is not None and size < n:
            raise ValueError(
                f"{name}: size={size} for {A!r}; expected at least its smaller side, {n}"
            )
        self.S = sketch(kind, max(4 * n, 1) if size is None else size, self.F, seed)
        image = sketched(self.S, self.F)
        if not bool(torch.isfinite(image).all()):
            raise ValueError(f"{name}: {A!r} holds NaN or infinite entries")
        self.basis, self.map = Whitening.of(image)
        self.rank = self.map.shape[1]

    def _fitted(self, block: Tensor) -> Tensor:
        """``argmin |S (B - F X)|``."""
        return self.map @ (self.basis.mT @ self.S._matmat(block))


class _PreparedSketch(PreparedSketch):
    def __init__(self, solver: SketchAndSolve, A: LinearOperator) -> None:
        super().__init__(solver, A, solver.sketch, solver.size, solver.seed)

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._sketched(block, fit=self.tall)

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return self._sketched(block, fit=not self.tall)

    def _sketched(self, block: Tensor, fit: bool) -> tuple[Tensor, Progress]:
        progress = Progress(
            products=0 if fit else block.shape[1],
            status="truncated",
            detail="one sketch; SketchAndPrecondition goes on to the tolerance",
        )
        if fit:
            return self._fitted(block), progress
        return self.F._matmat(self.map @ (self.map.mT @ block)), progress
