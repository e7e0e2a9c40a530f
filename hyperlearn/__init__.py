"""Differentiating through solutions, and bilevel optimisation, with swappable linear algebra.

hypergradient = d_x g - (d_x F)^T A^{-T} d_y g,   F(y, x) = 0,   A = d_y F
"""

from __future__ import annotations

import logging
import sys

import operators
import solvers
from hyperlearn import inner
from hyperlearn.budget import Budget, Checkpoints
from hyperlearn.certificate import Certificate, Smoothness, UntrustworthyError
from hyperlearn.checker import check
from hyperlearn.checks import CheckFailedError, CheckReport
from hyperlearn.decorator import implicit
from hyperlearn.gp import (
    PDE,
    Backend,
    Dense,
    Equation,
    GaussNewton,
    KernelFlow,
    KernelLearning,
    KernelProblem,
    LeaveOneOut,
    LowRank,
    MarginalLikelihood,
    Objective,
    PDESolution,
    Posterior,
    Scan,
    Sparse,
    ValidationResidual,
    WeightedSum,
    choose_backend,
    derivative_ratio,
    explain_backend,
    kernel_problem,
    learnt_solution,
    scan_lengthscale,
    solve_pde,
)
from hyperlearn.hypergradients import hypergradient
from hyperlearn.kkt import KKTPoint, kkt_residual, kkt_start
from hyperlearn.layer import ImplicitLayer
from hyperlearn.loop import DivergedError
from hyperlearn.methods import (
    NHGD,
    FixedOuter,
    IdentityHessian,
    ImplicitDifferentiation,
    Method,
    Unrolled,
)
from hyperlearn.outer import minimize, resume
from hyperlearn.problem import BilevelProblem, WeightedLikelihood
from hyperlearn.projections import AffineSet, Ball, Box, L1Ball, NonNegative, Simplex
from hyperlearn.proximal import L1, ElasticNet, GroupLasso, Indicator
from hyperlearn.regularizer import L2
from hyperlearn.runs import (
    DamagedError,
    Field,
    RecordError,
    Run,
    RunFileError,
    RunInUseError,
    load_run,
    recover,
)
from hyperlearn.smoothness import estimated_smoothness
from hyperlearn.solutions import argmin, fixed_point, least_squares, root
from hyperlearn.unrolling import Unroll

# One import is enough for users: `hyperlearn.operators` is the package `operators` itself, and its
# modules too, so that no class exists twice.
for _name, _module in list(sys.modules.items()):
    if _name.split(".")[0] in ("operators", "solvers"):
        sys.modules[f"hyperlearn.{_name}"] = _module
del _name, _module

# Silent unless the user says where to.
logging.getLogger("hyperlearn").addHandler(logging.NullHandler())

__version__ = "0.1.0.dev0"

__all__ = [
    "L1",
    "L2",
    "NHGD",
    "PDE",
    "AffineSet",
    "Backend",
    "Ball",
    "BilevelProblem",
    "Box",
    "Budget",
    "Certificate",
    "CheckFailedError",
    "CheckReport",
    "Checkpoints",
    "DamagedError",
    "Dense",
    "DivergedError",
    "ElasticNet",
    "Equation",
    "Field",
    "FixedOuter",
    "GaussNewton",
    "GroupLasso",
    "IdentityHessian",
    "ImplicitDifferentiation",
    "ImplicitLayer",
    "Indicator",
    "KKTPoint",
    "KernelFlow",
    "KernelLearning",
    "KernelProblem",
    "L1Ball",
    "LeaveOneOut",
    "LowRank",
    "MarginalLikelihood",
    "Method",
    "NonNegative",
    "Objective",
    "PDESolution",
    "Posterior",
    "RecordError",
    "Run",
    "RunFileError",
    "RunInUseError",
    "Scan",
    "Simplex",
    "Smoothness",
    "Sparse",
    "Unroll",
    "Unrolled",
    "UntrustworthyError",
    "ValidationResidual",
    "WeightedLikelihood",
    "WeightedSum",
    "argmin",
    "check",
    "choose_backend",
    "derivative_ratio",
    "estimated_smoothness",
    "explain_backend",
    "fixed_point",
    "hypergradient",
    "implicit",
    "inner",
    "kernel_problem",
    "kkt_residual",
    "kkt_start",
    "learnt_solution",
    "least_squares",
    "load_run",
    "minimize",
    "operators",
    "recover",
    "resume",
    "root",
    "scan_lengthscale",
    "solve_pde",
    "solvers",
]
