"""Methods for inner problems: roots, fixed points and minimisers, each to a tolerance.

A method is a frozen dataclass of settings; it works on a batch of problems side by side, each to
its own convergence, and never differentiates what it does: `hyperlearn.root` and its like do.
"""

from hyperlearn.inner.broyden import Broyden
from hyperlearn.inner.equation import Equation
from hyperlearn.inner.fixed_point_iteration import Anderson, FixedPointIteration
from hyperlearn.inner.gradient_descent import GradientDescent
from hyperlearn.inner.lbfgs import LBFGS
from hyperlearn.inner.levenberg_marquardt import LevenbergMarquardt
from hyperlearn.inner.method import InnerInfo, InnerMethod
from hyperlearn.inner.newton import Newton
from hyperlearn.inner.scipy_method import SciPy
from hyperlearn.inner.torch_optimizer import TorchOptimizer

__all__ = [
    "LBFGS",
    "Anderson",
    "Broyden",
    "Equation",
    "FixedPointIteration",
    "GradientDescent",
    "InnerInfo",
    "InnerMethod",
    "LevenbergMarquardt",
    "Newton",
    "SciPy",
    "TorchOptimizer",
]
