"""Linear operators on torch: matrices known by what they do, with their structure as facts."""

from operators.algebra import Gram, Product, Scaled, Sum, Transpose
from operators.batch_mean import BatchMean
from operators.block import Block, BlockDiagonal
from operators.cost import Cost
from operators.derivatives import CrossDerivative, Hessian, Jacobian, Linearization
from operators.diagonal_fisher import DiagonalFisher
from operators.elementary import Dense, Diagonal, Identity
from operators.empirical_fisher import EmpiricalFisher, FisherStream
from operators.fisher import Fisher, SampledFisher
from operators.function import FunctionOperator
from operators.gauss_newton import GaussNewton
from operators.inverse import Inverse
from operators.kfac import KFAC
from operators.kfac_stream import KFACStream
from operators.kronecker import Kronecker, KroneckerSum
from operators.lbfgs_inverse import LBFGSInverse
from operators.likelihood import Bernoulli, Categorical, Gaussian
from operators.linear_operator import LinearOperator
from operators.low_rank import LowRankPlusDiagonal
from operators.low_rank_update import LowRankUpdate
from operators.mfac import MFAC, MFACInverse
from operators.module import functional
from operators.nystrom import Nystrom
from operators.pattern import Pattern
from operators.permutation import Permutation
from operators.probe import FalseClaimError
from operators.quasi_newton import LBFGS, Broyden
from operators.saddle import Saddle
from operators.space import Space
from operators.sparse import Sparse
from operators.stacked import Stacked
from operators.structure import Structure

__all__ = [
    "BatchMean",
    "Bernoulli",
    "Block",
    "BlockDiagonal",
    "Broyden",
    "Categorical",
    "Cost",
    "CrossDerivative",
    "Dense",
    "Diagonal",
    "DiagonalFisher",
    "EmpiricalFisher",
    "FalseClaimError",
    "Fisher",
    "FisherStream",
    "FunctionOperator",
    "GaussNewton",
    "Gaussian",
    "Gram",
    "Hessian",
    "Identity",
    "Inverse",
    "Jacobian",
    "KFAC",
    "KFACStream",
    "Kronecker",
    "KroneckerSum",
    "LBFGS",
    "LBFGSInverse",
    "LinearOperator",
    "Linearization",
    "LowRankPlusDiagonal",
    "LowRankUpdate",
    "MFAC",
    "MFACInverse",
    "Nystrom",
    "Pattern",
    "Permutation",
    "Product",
    "Saddle",
    "SampledFisher",
    "Scaled",
    "Space",
    "Sparse",
    "Stacked",
    "Structure",
    "Sum",
    "Transpose",
    "functional",
]
