"""Linear solvers on torch: frozen settings, ``prepare(A)``, then ``solve(b)`` many times."""

from solvers.cg import CG
from solvers.dense import DenseCholesky, DenseLU
from solvers.diagonal import Diagonal
from solvers.iterative import IterativeSolver
from solvers.linear_solver import LinearSolver, PreparedSolver
from solvers.neumann import Neumann
from solvers.sherman_morrison import InverseRecursion, ShermanMorrison
from solvers.solution import (
    ConvergenceWarning,
    Info,
    NotConvergedError,
    NotPositiveDefiniteError,
    SingularError,
    Solution,
    StructureError,
)
from solvers.woodbury import Woodbury

__all__ = [
    "CG",
    "ConvergenceWarning",
    "DenseCholesky",
    "DenseLU",
    "Diagonal",
    "Info",
    "InverseRecursion",
    "IterativeSolver",
    "LinearSolver",
    "Neumann",
    "NotConvergedError",
    "NotPositiveDefiniteError",
    "PreparedSolver",
    "ShermanMorrison",
    "SingularError",
    "Solution",
    "StructureError",
    "Woodbury",
]
