"""What solvers cost on a common machine: the constants behind `Auto`'s predictions.

All are seconds per unit of work, measured by ``python -m validation.bench costs`` on two cores of a
server (67 Gflop/s and 20 GB/s each at best). Only their ratios matter to the choice: on another
machine they shift together.
"""

from __future__ import annotations

# Seconds per flop of a dense Cholesky (n^3 / 3), LU (2 n^3 / 3), LDL^T (n^3 / 3), QR (2 m n^2), SVD
# (per m n^2), and an eigendecomposition (per n^3).
CHOLESKY = 3e-11
LU = 2.3e-11
LDL = 5e-11
QR = 1.7e-10
SVD = 3.6e-10
EIGEN = 5e-10
# Seconds per entry of one product with a dense matrix in memory.
DENSE_PRODUCT = 3.5e-10
# Seconds per nonzero: of one product with a sparse matrix; of CHOLMOD's analysis; of entries of L,
# to compute and to solve with; of a flop in supernodes.
SPARSE_PRODUCT = 8e-10
ANALYSIS = 1.3e-07
FACTOR_ENTRY = 7e-08
FACTOR_FLOP = 3e-11
FACTOR_SOLVE = 7e-09
# Seconds per nonzero of A: to set up Ruge and Stuben's hierarchy, and of an iteration with one
# cycle.
AMG_SETUP = 2.5e-07
AMG_CYCLE = 2e-08
AMG_ITERATIONS = 7
# SuperLU against CHOLMOD on the same fill, per entry and per flop.
SUPERLU_ENTRY = 6e-8
SUPERLU_FLOP = 4e-10
# Seconds of one iteration of a Krylov method beyond its product: dispatch, and per entry of a
# vector.
ITERATION = 8e-05
VECTOR = 3e-10
# Share of the predicted cost of the next solver that a cheaper one may spend on a try.
TRIAL = 0.3
