"""Linear operators on torch: matrices known by what they do, with their structure as facts."""

from operators.algebra import Gram, Product, Scaled, Sum, Transpose
from operators.cost import Cost
from operators.derivatives import CrossDerivative, Hessian, Jacobian
from operators.elementary import Dense, Diagonal, Identity
from operators.fisher import EmpiricalFisher, FisherStream
from operators.linear_operator import LinearOperator
from operators.low_rank import LowRankPlusDiagonal
from operators.probe import FalseClaimError
from operators.space import Space
from operators.structure import Structure

__all__ = [
    "Cost",
    "CrossDerivative",
    "Dense",
    "Diagonal",
    "EmpiricalFisher",
    "FalseClaimError",
    "FisherStream",
    "Gram",
    "Hessian",
    "Identity",
    "Jacobian",
    "LinearOperator",
    "LowRankPlusDiagonal",
    "Product",
    "Scaled",
    "Space",
    "Structure",
    "Sum",
    "Transpose",
]
