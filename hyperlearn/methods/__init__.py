"""Bilevel algorithms: one idea a file, all of the same shape."""

from hyperlearn.methods.fixed import FixedOuter
from hyperlearn.methods.implicit import IdentityHessian, ImplicitDifferentiation
from hyperlearn.methods.method import Estimator, ImplicitMethod, Method
from hyperlearn.methods.nhgd import NHGD
from hyperlearn.methods.unrolled import Unrolled

__all__ = [
    "NHGD",
    "Estimator",
    "FixedOuter",
    "IdentityHessian",
    "ImplicitDifferentiation",
    "ImplicitMethod",
    "Method",
    "Unrolled",
]
