"""Gaussian-process solvers for PDEs, and the learning of their kernels."""

from hyperlearn.gp.backend import Backend, Dense
from hyperlearn.gp.gauss_newton import GaussNewton, PDESolution, solve_pde
from hyperlearn.gp.learning import (
    KernelLearning,
    KernelProblem,
    derivative_ratio,
    kernel_problem,
    learnt_solution,
)
from hyperlearn.gp.objectives import (
    KernelFlow,
    LeaveOneOut,
    MarginalLikelihood,
    Objective,
    ValidationResidual,
)
from hyperlearn.gp.pde import PDE, Equation
from hyperlearn.gp.posterior import Posterior
from hyperlearn.gp.scan import Scan, scan_lengthscale

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
    "MarginalLikelihood",
    "Objective",
    "PDESolution",
    "Posterior",
    "Scan",
    "ValidationResidual",
    "derivative_ratio",
    "kernel_problem",
    "learnt_solution",
    "scan_lengthscale",
    "solve_pde",
]
