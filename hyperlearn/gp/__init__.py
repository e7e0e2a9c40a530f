"""Gaussian-process solvers for PDEs, and the learning of their kernels."""

from hyperlearn.gp.backend import Backend, Dense
from hyperlearn.gp.choice import choose_backend, explain_backend
from hyperlearn.gp.gauss_newton import GaussNewton, PDESolution, solve_pde
from hyperlearn.gp.learning import KernelLearning, derivative_ratio, learnt_solution
from hyperlearn.gp.low_rank import LowRank
from hyperlearn.gp.objectives import (
    KernelFlow,
    LeaveOneOut,
    MarginalLikelihood,
    Objective,
    ValidationResidual,
    WeightedSum,
)
from hyperlearn.gp.pde import PDE, Equation
from hyperlearn.gp.posterior import Posterior
from hyperlearn.gp.problem import KernelProblem, kernel_problem
from hyperlearn.gp.scan import Scan, scan_lengthscale
from hyperlearn.gp.sparse import Sparse

__all__ = [
    "PDE",
    "Backend",
    "Dense",
    "Equation",
    "GaussNewton",
    "KernelFlow",
    "KernelLearning",
    "KernelProblem",
    "LeaveOneOut",
    "LowRank",
    "MarginalLikelihood",
    "Objective",
    "PDESolution",
    "Posterior",
    "Scan",
    "Sparse",
    "ValidationResidual",
    "WeightedSum",
    "choose_backend",
    "derivative_ratio",
    "explain_backend",
    "kernel_problem",
    "learnt_solution",
    "scan_lengthscale",
    "solve_pde",
]
