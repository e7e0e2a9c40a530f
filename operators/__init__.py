"""Linear operators on torch: matrices known by what they do, with their structure as facts."""

from operators.algebra import Gram, Product, Scaled, Sum, Transpose
from operators.batch_mean import BatchMean
from operators.block import Block, BlockDiagonal
from operators.circulant import Circulant
from operators.claims import FalseClaimError
from operators.coloured.colouring import (
    Colouring,
    ColouringError,
    column_colouring,
    jacobian_colouring,
    row_colouring,
)
from operators.coloured.sparse_hessian import SparseHessian
from operators.coloured.sparse_jacobian import SparseJacobian
from operators.coloured.sparsity import (
    FIVE_POINT,
    NINE_POINT,
    SEVEN_POINT,
    Sparsity,
    detect,
    probe,
    stencil,
)
from operators.coloured.symmetric_colouring import symmetric_colouring
from operators.cost import Cost
from operators.curvature.diagonal_fisher import DiagonalFisher
from operators.curvature.diagonal_fisher_stream import DiagonalFisherStream
from operators.curvature.empirical_fisher import EmpiricalFisher, FisherStream
from operators.curvature.fisher import Fisher, SampledFisher
from operators.curvature.gauss_newton import GaussNewton
from operators.curvature.kfac import KFAC
from operators.curvature.kfac_stream import KFACStream
from operators.curvature.lbfgs_inverse import LBFGSInverse
from operators.curvature.likelihood import Bernoulli, Categorical, Gaussian
from operators.curvature.mfac import MFAC, MFACInverse
from operators.curvature.module import functional
from operators.curvature.quasi_newton import LBFGS, Broyden, BroydenInverse
from operators.derivatives import CrossDerivative, Hessian, Jacobian, Linearization
from operators.elementary import Dense, Diagonal, Identity
from operators.function import FunctionOperator
from operators.inverse import Inverse
from operators.kernels.dot_product import Linear, Polynomial, White
from operators.kernels.function_kernel import FunctionKernel
from operators.kernels.functionals import Functionals
from operators.kernels.gibbs import Gibbs
from operators.kernels.gram import KernelGram, gram
from operators.kernels.kernel import Kernel
from operators.kernels.periodic import PeriodicKernel
from operators.kernels.radial import (
    RBF,
    InverseMultiquadric,
    InverseQuadratic,
    Matern,
    Radial,
    RationalQuadratic,
)
from operators.kernels.representers import Representers
from operators.kernels.warp import CoordinatesKernel, WarpedKernel
from operators.kronecker import Kronecker, KroneckerSum
from operators.linear_operator import LinearOperator
from operators.low_rank import LowRankPlusDiagonal
from operators.low_rank_update import LowRankUpdate
from operators.permutation import Permutation
from operators.randomized.diagonals import diagonal
from operators.randomized.krylov import Tridiagonals, lanczos
from operators.randomized.monte_carlo import TraceEstimate
from operators.randomized.nystrom import Nystrom
from operators.randomized.spectral_traces import logdet, trace_function
from operators.randomized.traces import trace
from operators.saddle import Saddle
from operators.space import Space
from operators.sparse.matrix import Sparse
from operators.sparse.pattern import Pattern
from operators.stacked import Stacked
from operators.structure import Structure
from operators.toeplitz import Toeplitz

__all__ = [
    "FIVE_POINT",
    "KFAC",
    "LBFGS",
    "MFAC",
    "NINE_POINT",
    "RBF",
    "SEVEN_POINT",
    "BatchMean",
    "Bernoulli",
    "Block",
    "BlockDiagonal",
    "Broyden",
    "BroydenInverse",
    "Categorical",
    "Circulant",
    "Colouring",
    "ColouringError",
    "CoordinatesKernel",
    "Cost",
    "CrossDerivative",
    "Dense",
    "Diagonal",
    "DiagonalFisher",
    "DiagonalFisherStream",
    "EmpiricalFisher",
    "FalseClaimError",
    "Fisher",
    "FisherStream",
    "FunctionKernel",
    "FunctionOperator",
    "Functionals",
    "GaussNewton",
    "Gaussian",
    "Gibbs",
    "Gram",
    "Hessian",
    "Identity",
    "Inverse",
    "InverseMultiquadric",
    "InverseQuadratic",
    "Jacobian",
    "KFACStream",
    "Kernel",
    "KernelGram",
    "Kronecker",
    "KroneckerSum",
    "LBFGSInverse",
    "Linear",
    "LinearOperator",
    "Linearization",
    "LowRankPlusDiagonal",
    "LowRankUpdate",
    "MFACInverse",
    "Matern",
    "Nystrom",
    "Pattern",
    "PeriodicKernel",
    "Permutation",
    "Polynomial",
    "Product",
    "Radial",
    "RationalQuadratic",
    "Representers",
    "Saddle",
    "SampledFisher",
    "Scaled",
    "Space",
    "Sparse",
    "SparseHessian",
    "SparseJacobian",
    "Sparsity",
    "Stacked",
    "Structure",
    "Sum",
    "Toeplitz",
    "TraceEstimate",
    "Transpose",
    "Tridiagonals",
    "WarpedKernel",
    "White",
    "column_colouring",
    "detect",
    "diagonal",
    "functional",
    "gram",
    "jacobian_colouring",
    "lanczos",
    "logdet",
    "probe",
    "row_colouring",
    "stencil",
    "symmetric_colouring",
    "trace",
    "trace_function",
]
