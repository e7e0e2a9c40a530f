"""Linear solvers on torch: frozen settings, ``prepare(A)``, then ``solve(b)`` many times."""

from solvers.auto.automatic import Auto, explain
from solvers.auto.plan import Candidate, Plan
from solvers.condition import condition_estimate
from solvers.dense.cholesky import DenseCholesky
from solvers.dense.factor import CholeskyFactor
from solvers.dense.ldl import DenseLDL
from solvers.dense.lu import DenseLU
from solvers.dense.qr import QR
from solvers.dense.svd import SVD
from solvers.differentiable import solve
from solvers.iterative import IterativeSolver, PreconditionedSolver
from solvers.kernel.kl_cholesky import KLCholesky, kl_factor
from solvers.kernel.kl_factor import KLFactor
from solvers.kernel.kl_pattern import KLPattern
from solvers.kernel.pivoted_cholesky import PivotedCholesky
from solvers.kernel.pivoting import PivotedFactor, pivoted_cholesky
from solvers.krylov.bicgstab import BiCGStab
from solvers.krylov.cg import CG
from solvers.krylov.gmres import GMRES
from solvers.krylov.lsmr import LSMR
from solvers.krylov.minres import MINRES
from solvers.linear_solver import LinearSolver, PreparedSolver
from solvers.preconditioner import Preconditioner
from solvers.preconditioners.amg import AMG
from solvers.preconditioners.block_jacobi import BlockJacobi
from solvers.preconditioners.incomplete_cholesky import IncompleteCholesky
from solvers.preconditioners.incomplete_lu import IncompleteLU
from solvers.preconditioners.jacobi import Jacobi
from solvers.preconditioners.nystrom import Nystrom
from solvers.preconditioners.ssor import SSOR
from solvers.sequences.bandit import TsallisINF
from solvers.sequences.contextual import BinnedBandit, ChebyshevBandit
from solvers.sequences.sequence import LinearSystemSequence
from solvers.sketched.precondition import SketchAndPrecondition
from solvers.sketched.project import SketchAndProject
from solvers.sketched.solve import SketchAndSolve
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
from solvers.sparse.analysis import analyse
from solvers.sparse.cholesky import FallbackWarning, SparseCholesky
from solvers.sparse.lu import SparseLU
from solvers.sparse.qr import SparseQR
from solvers.stationary.broyden import Broyden
from solvers.stationary.neumann import Neumann
from solvers.stationary.quadratic_sgd import QuadraticSGD
from solvers.stationary.random_neumann import RandomNeumann
from solvers.stationary.richardson import Richardson
from solvers.stationary.sor import SOR, SymmetricSOR, optimal_omega
from solvers.structured.block import BlockDiagonal, BlockTriangular
from solvers.structured.circulant import Circulant, CirculantPreconditioner
from solvers.structured.diagonal import Diagonal
from solvers.structured.kronecker import Kronecker
from solvers.structured.permutation import Permutation
from solvers.structured.saddle import Saddle
from solvers.structured.sherman_morrison import InverseRecursion, ShermanMorrison
from solvers.structured.toeplitz import Toeplitz
from solvers.structured.triangular import Triangular
from solvers.structured.woodbury import Woodbury

__all__ = [
    "AMG",
    "CG",
    "GMRES",
    "LSMR",
    "MINRES",
    "QR",
    "SOR",
    "SSOR",
    "SVD",
    "Auto",
    "BiCGStab",
    "BinnedBandit",
    "BlockDiagonal",
    "BlockJacobi",
    "BlockTriangular",
    "Broyden",
    "Candidate",
    "ChebyshevBandit",
    "CholeskyFactor",
    "Circulant",
    "CirculantPreconditioner",
    "ConvergenceWarning",
    "DenseCholesky",
    "DenseLDL",
    "DenseLU",
    "Diagonal",
    "FallbackWarning",
    "IncompleteCholesky",
    "IncompleteLU",
    "Info",
    "InverseRecursion",
    "IterativeSolver",
    "Jacobi",
    "KLCholesky",
    "KLFactor",
    "KLPattern",
    "Kronecker",
    "LinearSolver",
    "LinearSystemSequence",
    "MissingLibraryError",
    "Neumann",
    "NotConvergedError",
    "NotPositiveDefiniteError",
    "Nystrom",
    "Permutation",
    "PivotedCholesky",
    "PivotedFactor",
    "Plan",
    "PreconditionedSolver",
    "Preconditioner",
    "PreparedSolver",
    "QuadraticSGD",
    "RandomNeumann",
    "Richardson",
    "Saddle",
    "ShermanMorrison",
    "SingularError",
    "SketchAndPrecondition",
    "SketchAndProject",
    "SketchAndSolve",
    "Solution",
    "SparseCholesky",
    "SparseLU",
    "SparseQR",
    "StructureError",
    "SymmetricSOR",
    "Toeplitz",
    "Triangular",
    "TsallisINF",
    "Woodbury",
    "analyse",
    "condition_estimate",
    "explain",
    "kl_factor",
    "optimal_omega",
    "pivoted_cholesky",
    "solve",
]
