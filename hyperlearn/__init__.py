"""Differentiating through solutions, and bilevel optimisation, with swappable linear algebra.

hypergradient = d_x g - (d_x F)^T A^{-T} d_y g,   F(y, x) = 0,   A = d_y F
"""

from __future__ import annotations

import sys

import operators
import solvers
from hyperlearn.certificate import Certificate, Smoothness
from hyperlearn.hypergradients import hypergradient
from hyperlearn.methods import (
    NHGD,
    FixedOuter,
    IdentityHessian,
    ImplicitDifferentiation,
    Method,
    Unrolled,
)
from hyperlearn.outer import Budget, DivergedError, minimize
from hyperlearn.problem import Ball, BilevelProblem, Box, WeightedLikelihood
from hyperlearn.regularizer import L2
from hyperlearn.run import Run, RunFileError, load_run

# One import is enough for users: `hyperlearn.operators` is the package `operators` itself, and its
# modules too, so that no class exists twice.
for _name, _module in list(sys.modules.items()):
    if _name.split(".")[0] in ("operators", "solvers"):
        sys.modules[f"hyperlearn.{_name}"] = _module
del _name, _module

__version__ = "0.1.0.dev0"

__all__ = [
    "L2",
    "NHGD",
    "Ball",
    "BilevelProblem",
    "Box",
    "Budget",
    "Certificate",
    "DivergedError",
    "FixedOuter",
    "IdentityHessian",
    "ImplicitDifferentiation",
    "Method",
    "Run",
    "RunFileError",
    "Smoothness",
    "Unrolled",
    "WeightedLikelihood",
    "hypergradient",
    "load_run",
    "minimize",
    "operators",
    "solvers",
]
