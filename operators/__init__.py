"""Linear operators on torch: matrices known by what they do, with their structure as facts."""

from operators.algebra import Gram, Product, Scaled, Sum, Transpose
from operators.batch_mean import BatchMean
from operators.cost import Cost
from operators.derivatives import CrossDerivative, Hessian, Jacobian, Linearization
from operators.elementary import Dense, Diagonal, Identity
from operators.fisher import EmpiricalFisher, FisherStream
from operators.function import FunctionOperator
from operators.inverse import Inverse
from operators.linear_operator import LinearOperator
from operators.low_rank import LowRankPlusDiagonal
from operators.probe import FalseClaimError
from operators.space import Space
from operators.stacked import Stacked
from operators.structure import Structure

__all__ = [
    "BatchMean",
    "Cost",
    "CrossDerivative",
    "Dense",
    "Diagonal",
    "EmpiricalFisher",
    "FalseClaimError",
    "FisherStream",
    "FunctionOperator",
    "Gram",
    "Hessian",
    "Identity",
    "Inverse",
    "Jacobian",
    "LinearOperator",
    "Linearization",
    "LowRankPlusDiagonal",
    "Product",
    "Scaled",
    "Space",
    "Stacked",
    "Structure",
    "Sum",
    "Transpose",
]
