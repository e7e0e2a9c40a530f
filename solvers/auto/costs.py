"""What solvers cost on a common machine: the constants behind `Auto`'s predictions.

Those in seconds, per unit of work, were measured by ``python -m validation.bench costs`` on two
cores of a server (67 Gflop/s and 20 GB/s each at best). Only their ratios matter to the choice: on
another machine they shift together. `AMG_ITERATIONS`, `TRIAL` and `HOPELESS` are counts and shares,
chosen by ``python -m validation.bench auto``.
"""

from __future__ import annotations

# Seconds per flop of a dense Cholesky (n^3 / 3), LU (2 n^3 / 3), LDL^T (n^3 / 3), QR (2 m n^2), SVD
# (per m n^2), and an eigendecomposition (per n^3).
CHOLESKY = 2.4e-11
LU = 1.9e-11
LDL = 4.5e-11
QR = 1.45e-10
SVD = 2.9e-10
EIGEN = 2.4e-10
# Seconds per entry of large arrays (more than 2^25 bytes), whose pages are mapped anew each time.
MEMORY = 4e-9
# Seconds per entry of one product with a dense matrix in memory.
DENSE_PRODUCT = 4.5e-10
# Seconds per nonzero: of one product with a sparse matrix; of entries of L, to compute (where its
# flops, in supernodes at the rate of a dense factorisation, do not take longer) and to solve with.
SPARSE_PRODUCT = 8e-10
FACTOR_ENTRY = 8e-8
FACTOR_SOLVE = 6e-9
# Seconds per nonzero of A: to set up a hierarchy of Ruge and Stuben, and of an iteration with one
# cycle.
AMG_SETUP = 3.3e-7
AMG_CYCLE = 1.9e-8
AMG_ITERATIONS = 6
# SuperLU against CHOLMOD on the same fill, per entry and per flop.
SUPERLU_ENTRY = 6.5e-8
SUPERLU_FLOP = 2.5e-10
# Seconds of one iteration of a Krylov method beyond its product: dispatch, and per entry of a
# vector.
ITERATION = 6e-5
VECTOR = 1.3e-10
# Share of the predicted cost of the next solver that a cheaper one may spend on a try. After a
# third of the try it ends if its rate, which may rise yet, promises so many times that cost.
TRIAL = 0.12
HOPELESS = 2.0
