"""Linear solvers on torch: frozen settings, ``prepare(A)``, then ``solve(b)`` many times."""

from solvers.auto import Auto
from solvers.dense.cholesky import DenseCholesky
from solvers.dense.lu import DenseLU
from solvers.differentiable import solve
from solvers.iterative import IterativeSolver, PreconditionedSolver
from solvers.krylov.cg import CG
from solvers.linear_solver import LinearSolver, PreparedSolver
from solvers.preconditioner import Preconditioner
from solvers.solution import (
    ConvergenceWarning,
    Info,
    MissingLibraryError,
    NotConvergedError,
    NotPositiveDefiniteError,
    SingularError,
    Solution,
    StructureError,
)
from solvers.stationary.neumann import Neumann
from solvers.structured.diagonal import Diagonal
from solvers.structured.sherman_morrison import InverseRecursion, ShermanMorrison
from solvers.structured.woodbury import Woodbury

__all__ = [
    "CG",
    "Auto",
    "ConvergenceWarning",
    "DenseCholesky",
    "DenseLU",
    "Diagonal",
    "Info",
    "InverseRecursion",
    "IterativeSolver",
    "LinearSolver",
    "MissingLibraryError",
    "Neumann",
    "NotConvergedError",
    "NotPositiveDefiniteError",
    "PreconditionedSolver",
    "Preconditioner",
    "PreparedSolver",
    "ShermanMorrison",
    "SingularError",
    "Solution",
    "StructureError",
    "Woodbury",
    "solve",
]
