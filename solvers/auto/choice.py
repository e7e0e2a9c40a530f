"""Which solvers suit an operator, and what they would cost: `plan_for`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

import operators as ops
from operators import LinearOperator
from solvers.auto import costs
from solvers.auto.plan import Candidate, Plan, Request, ordered
from solvers.dense.cholesky import DenseCholesky
from solvers.dense.ldl import DenseLDL
from solvers.dense.lu import DenseLU
from solvers.dense.qr import QR
from solvers.dense.svd import SVD
from solvers.krylov.bicgstab import BiCGStab
from solvers.krylov.cg import CG
from solvers.krylov.gmres import GMRES
from solvers.krylov.lsmr import LSMR
from solvers.krylov.minres import MINRES
from solvers.krylov.products import LARGE
from solvers.matrix import looked_up
from solvers.preconditioners.amg import AMG
from solvers.preconditioners.incomplete_lu import IncompleteLU
from solvers.preconditioners.jacobi import Jacobi
from solvers.sketched.precondition import SketchAndPrecondition
from solvers.solution import MissingLibraryError
from solvers.sparse import cholmod
from solvers.sparse.analysis import Analysis, analyse
from solvers.sparse.cholesky import SparseCholesky
from solvers.sparse.lu import SparseLU
from solvers.sparse.matrix import nonzeros_of
from solvers.sparse.qr import SparseQR
from solvers.sparse.suitesparse_lu import installed
from solvers.structured.block import BlockDiagonal, BlockTriangular
from solvers.structured.circulant import Circulant
from solvers.structured.diagonal import Diagonal
from solvers.structured.kronecker import Kronecker
from solvers.structured.permutation import Permutation
from solvers.structured.saddle import Saddle
from solvers.structured.toeplitz import Toeplitz
from solvers.structured.triangular import Triangular
from solvers.structured.woodbury import Woodbury, update_of

# What torch factorises as dense matrices.
FACTORED = (torch.float32, torch.float64)


def plan_for(A: LinearOperator, request: Request) -> Plan:
    """The chain of solvers for A; see `solvers.auto.automatic.Auto`."""
    A = looked_up(A)
    m, n = A.shape
    if m != n:
        found = list(_least_squares(A, request))
    else:
        found = list(_structured(A, request))
        certain = any(candidate.iteration is None for candidate in found)
        # What is put together of sparse parts is looked at as one matrix.
        held = nonzeros_of(A)
        sparse = None if held is None else looked_up(held)
        if isinstance(sparse, ops.Sparse) and not _better_dense(sparse):
            found += _sparse(sparse, request)
        elif not certain or n <= 1000:
            found += _dense(A, request)
        if not certain or isinstance(A, ops.Saddle):
            found += _iterative(A, request)
        found += _resorts(A, request)
    return ordered(in_a_line(A), found, request)


def in_a_line(A: LinearOperator) -> str:
    """Class, shape, dtype, facts."""
    dtype = str(A.dtype).removeprefix("torch.")
    return "; ".join(part for part in (f"{A!r} {dtype}", str(A.structure), A._describe()) if part)


# --- structures that have a solver of their own ---------------------------------------------------


def _structured(A: LinearOperator, request: Request) -> Iterator[Candidate]:
    n, t = A.shape[0], request.tolerances
    vector = costs.VECTOR * n
    if isinstance(A, ops.Diagonal):
        yield Candidate(Diagonal(**t), "a diagonal is divided by", solve=vector)
    if isinstance(A, ops.Permutation):
        yield Candidate(Permutation(**t), "the inverse of a permutation is its transpose",
                        solve=vector)  # fmt: skip
    if (A.lower_triangular or A.upper_triangular) and isinstance(A, (ops.Dense, ops.Sparse)):
        entries = A.nnz if isinstance(A, ops.Sparse) else n * n / 2
        yield Candidate(Triangular(**t), "a triangle is solved by substitution",
                        solve=costs.FACTOR_SOLVE * entries)  # fmt: skip
    if isinstance(A, ops.Circulant):
        yield Candidate(Circulant(**t), "Fourier vectors are its eigenvectors",
                        solve=20 * vector)  # fmt: skip
    elif isinstance(A, ops.Toeplitz):
        yield Candidate(Toeplitz(**t), "Levinson's recursion for one Toeplitz matrix",
                        setup=4e-9 * n * n, solve=60 * vector)  # fmt: skip
    shifted = Kronecker.suits(A)
    if shifted:
        sizes = [factor.shape[0] for factor in shifted]
        yield Candidate(Kronecker(**t), "each factor of a Kronecker product is solved with",
                        setup=sum(costs.EIGEN * size**3 for size in sizes),
                        solve=4e-11 * n * sum(sizes) + 10 * costs.ITERATION)  # fmt: skip
    if isinstance(A, ops.BlockDiagonal):
        plans = [plan_for(block, request) for block in A.blocks]
        firsts = [plan.predictable for plan in plans]
        yield Candidate(BlockDiagonal(**t), "each block is solved with by itself",
                        setup=sum(first.setup for first in firsts),
                        solve=sum(first.solve + (100 * (first.iteration or 0)) for first in firsts),
                        memory=sum(first.memory for first in firsts))  # fmt: skip
    if isinstance(A, ops.Block) and not isinstance(A, ops.Saddle):
        yield from _block_triangular(A, request)
    yield from _woodbury(A, request)
    if isinstance(A, ops.Saddle):
        yield from _saddle(A, request)


def _block_triangular(A: ops.Block, request: Request) -> Iterator[Candidate]:
    rows = A.rows
    filled = {(i, j) for i, row in enumerate(rows) for j, block in enumerate(row) if block}
    diagonal = [row[i] for i, row in enumerate(rows) if i < len(row)]
    square = len(rows) == len(rows[0]) and A._row_sizes == A._column_sizes
    one_sided = all(i >= j for i, j in filled) or all(i <= j for i, j in filled)
    if not (square and one_sided and all(block is not None for block in diagonal)):
        return
    firsts = [plan_for(block, request).predictable for block in diagonal if block is not None]
    yield Candidate(
        BlockTriangular(**request.tolerances),
        "a triangle of blocks: each diagonal block is solved with, one after the other",
        setup=sum(first.setup for first in firsts),
        solve=sum(first.solve + 100 * (first.iteration or 0.0) for first in firsts),
        memory=sum(first.memory for first in firsts),
    )


def _woodbury(A: LinearOperator, request: Request) -> Iterator[Candidate]:
    found = None if isinstance(A, ops.Diagonal) else update_of(A)
    if found is None:
        return
    n, rank = A.shape[0], found.left.shape[0]
    setup, solve, memory = 0.0, costs.VECTOR * n, 0.0
    if isinstance(found.base, ops.Diagonal):
        if bool((found.base.values == 0).any()):
            return
    else:
        first = plan_for(found.base, replace(request, solves=max(2, rank))).predictable
        solve = first.solve + 100 * (first.iteration or 0.0)
        setup, memory = first.setup + 0.3 * rank * solve, first.memory
    yield Candidate(
        Woodbury(**request.tolerances),
        f"rank {rank} plus what is easy to invert: a system of size {rank}",
        setup=setup + costs.CHOLESKY * (2 * rank * rank * n + rank**3 / 3) + 10 * costs.ITERATION,
        solve=4 * solve + 6 * costs.DENSE_PRODUCT * rank * n + 10 * costs.ITERATION,
        memory=memory + 8.0 * rank * (2 * n + rank),
    )


def _saddle(A: ops.Saddle, request: Request) -> Iterator[Candidate]:
    m = A.G.shape[0]
    first = plan_for(A.B, replace(request, solves=max(2, m))).predictable
    one = first.solve + 100 * (first.iteration or 0.0)
    yield Candidate(
        Saddle(**request.tolerances),
        f"its Schur complement of size {m} is formed by {m} solves with the upper block",
        setup=first.setup + 0.25 * m * one + costs.CHOLESKY * m**3 / 3,
        solve=2 * one + costs.DENSE_PRODUCT * m * m,
        memory=first.memory + 8.0 * m * (A.G.shape[1] + m),
    )


# --- dense ----------------------------------------------------------------------------------------


def _dense(A: LinearOperator, request: Request) -> Iterator[Candidate]:
    n, t = A.shape[0], request.tolerances
    if A.dtype not in FACTORED:
        return
    formed, memory = _forming(A), 8.0 * n * n
    what = "dense" if isinstance(A, ops.Dense) else "small enough to be formed"
    solve = 2 * costs.DENSE_PRODUCT * n * n + costs.ITERATION
    copy = costs.MEMORY * n * n if memory > 2**25 else 0.0  # of the triangle that is read
    # Pivots are looked for in every column.
    pivoting = costs.DENSE_PRODUCT * n * n
    if A.symmetric:
        claim = "positive definite" if A.positive_definite else "symmetric: definite if it factors"
        yield Candidate(DenseCholesky(**t), f"{what}, {claim}",
                        formed + costs.CHOLESKY * n**3 / 3 + copy, solve, 2 * memory)  # fmt: skip
    if A.symmetric and not A.positive_definite:
        yield Candidate(DenseLDL(**t), f"{what}, symmetric: for an indefinite one",
                        formed + pivoting + copy + costs.LDL * n**3 / 3, solve,
                        2 * memory)  # fmt: skip
    yield Candidate(DenseLU(**t), f"{what}, any square matrix",
                    formed + costs.LU * 2 * n**3 / 3 + pivoting, solve, 2 * memory)  # fmt: skip


def _forming(A: LinearOperator) -> float:
    """Seconds of `to_dense`."""
    if isinstance(A, (ops.Dense, ops.Sparse, ops.Diagonal)):
        return 0.0
    # Products with a block are cheaper than as many single ones.
    return 0.3 * A.shape[1] * product_seconds(A)


# --- sparse ---------------------------------------------------------------------------------------


def _better_dense(A: ops.Sparse) -> bool:
    """Small, or hardly sparse."""
    n = A.shape[0]
    return n <= 150 or A.nnz > 0.25 * n * n


def _sparse(A: ops.Sparse, request: Request) -> Iterator[Candidate]:
    n, t = A.shape[0], request.tolerances
    analysis = _analysis(A) or _guessed(A)
    positive = A.symmetric and _positive_diagonal(A)
    if positive:
        fill, flops = analysis.factor_nonzeros, analysis.flops
        by = "CHOLMOD" if cholmod.available() else "SuperLU, CHOLMOD is not installed"
        yield Candidate(
            SparseCholesky(**t),
            f"symmetric with a positive diagonal; analysed: {fill:,} nonzeros in L "
            f"({fill / max(n, 1):.1f} a row), {flops:.2g} flop ({by})",
            setup=max(costs.FACTOR_ENTRY * fill, costs.CHOLESKY * flops),
            solve=costs.FACTOR_SOLVE * fill,
            memory=16.0 * fill,
        )
    if positive:
        grid = _m_matrix(A)
        if grid:
            yield Candidate(
                CG(preconditioner=AMG(kind="ruge-stuben"), **t),
                "symmetric, hardly a positive entry beside its diagonal: multigrid",
                setup=costs.AMG_SETUP * A.nnz,
                solve=costs.AMG_ITERATIONS * costs.AMG_CYCLE * A.nnz,
                memory=40.0 * A.nnz,
            )
    # The fill is guessed from that of the symmetric pattern; pivots beside the diagonal undo the
    # ordering, at the cost of about four times the fill.
    more = 4 if _pivots_beside(A) else 1
    fill, flops = 2 * more * analysis.factor_nonzeros, 2 * more**2 * analysis.flops
    yield Candidate(
        SparseLU(**t),
        f"sparse, any square matrix; about {fill:,} nonzeros in L and U",
        setup=costs.SUPERLU_ENTRY * fill + costs.SUPERLU_FLOP * flops,
        solve=costs.FACTOR_SOLVE * fill,
        memory=16.0 * fill,
    )


def _analysis(A: ops.Sparse) -> Analysis | None:
    """Fill of a Cholesky factorisation of the pattern of ``A + A^T``; None where nobody tells."""
    if not cholmod.available():
        return None
    pattern = A.pattern
    if not A.symmetric:
        ones = ops.Sparse(torch.ones(pattern.nnz, dtype=A.dtype, device=A.device), pattern)
        both = ones + ones.T
        assert isinstance(both, ops.Sparse)
        A = ops.Sparse(both.values, both.pattern, symmetric=True)
    try:
        return analyse(A)
    except MissingLibraryError:  # this build of scikit-sparse does not tell
        return None


def _guessed(A: ops.Sparse) -> Analysis:
    """Fill where nobody analyses: ``1.6 n log2 n``, as CHOLMOD finds it on grids in the plane.

    There it is 20.6, 32.9 and 41.7 entries a row for 1e4, 1e5 and 4.9e5 unknowns.
    """
    n = max(A.shape[0], 2)
    fill = int(A.nnz / 5 * 1.6 * math.log2(n)) + n
    return Analysis(fill, 3.0 * fill**2 / n, 0.0)


def _positive_diagonal(A: LinearOperator) -> bool:
    d = A._exact_diagonal()
    return d is not None and bool((d > 0).all())


def _pivots_beside(A: LinearOperator) -> bool:
    d = A._exact_diagonal()
    return d is None or bool((d == 0).any())


def _m_matrix(A: ops.Sparse) -> bool:
    """Whether the entries beside the diagonal are few and not positive, as of a Laplacian."""
    diagonal = A._exact_diagonal()
    if diagonal is None or A.nnz > 60 * A.shape[0]:
        return False
    values, diagonal = A.values.detach(), diagonal.detach()
    negative = diagonal.clamp_max(0).sum() - values.clamp_max(0).sum()
    positive = values.clamp_min(0).sum() - diagonal.clamp_min(0).sum()
    return bool((negative > 0) & (positive <= 1e-2 * negative))


# --- iterations -----------------------------------------------------------------------------------


def _iterative(A: LinearOperator, request: Request) -> Iterator[Candidate]:
    n, t = A.shape[0], request.tolerances
    step = product_seconds(A) + costs.ITERATION + 10 * costs.VECTOR * n
    vectors = 8.0 * n
    diagonal = A._exact_diagonal()
    scaled = diagonal is not None and bool((diagonal != 0).all()) and _uneven(diagonal)
    preconditioner = Jacobi() if scaled else None
    if A.symmetric and (diagonal is None or bool((diagonal > 0).all())):
        yield Candidate(CG(preconditioner=preconditioner, **t),
                        "symmetric: short if its eigenvalues are clustered",
                        memory=5 * vectors, iteration=step)  # fmt: skip
    elif A.symmetric:
        yield Candidate(MINRES(**t), "symmetric, indefinite", memory=8 * vectors,
                        iteration=step)  # fmt: skip
    else:
        if isinstance(A, ops.Sparse) and diagonal is not None:
            yield Candidate(BiCGStab(preconditioner=IncompleteLU(), **t),
                            "sparse, not symmetric: incomplete factors",
                            setup=1e-6 * A.nnz, memory=200.0 * A.nnz,
                            iteration=2 * step + 1e-7 * A.nnz)  # fmt: skip
        yield Candidate(GMRES(preconditioner=preconditioner, **t),
                        "not symmetric: the smallest residual of a Krylov space",
                        memory=35 * vectors, iteration=step + 200 * costs.VECTOR * n)  # fmt: skip


def _uneven(diagonal: torch.Tensor) -> bool:
    size = diagonal.detach().abs()
    return bool(size.numel()) and bool(size.max() > 4 * size.min())


def product_seconds(A: LinearOperator) -> float:
    """Seconds of one product: known of matrices, measured of others."""
    if isinstance(A, ops.Dense):
        entries = A.shape[0] * A.shape[1]
        # Of a large symmetric matrix one triangle is read.
        halved = A.symmetric and entries * A.dtype.itemsize >= LARGE
        return costs.DENSE_PRODUCT * entries / (2.5 if halved else 1)
    if isinstance(A, ops.Sparse):
        return costs.SPARSE_PRODUCT * A.nnz
    v = torch.ones(A.shape[1], dtype=A.dtype, device=A.device)
    with torch.no_grad():
        A._matvec(v)
        taken = []
        for _ in range(2):
            start = time.perf_counter()
            A._matvec(v)
            taken.append(time.perf_counter() - start)
    return min(taken)


def _resorts(A: LinearOperator, request: Request) -> Iterator[Candidate]:
    """For what the others fail to solve: indefinite, singular but consistent, hard."""
    n, t = A.shape[0], request.tolerances
    if A.positive_definite:
        yield Candidate(CG(**t), "symmetric, positive definite", memory=40.0 * n, resort=True)
    if A.symmetric:
        yield Candidate(MINRES(**t), "symmetric, also indefinite or singular", memory=64.0 * n,
                        resort=True)  # fmt: skip
    else:
        yield Candidate(GMRES(restart=min(n, 200) or 1, **t), "any square matrix, long restarts",
                        memory=1600.0 * n, resort=True)  # fmt: skip
    if A.dtype not in FACTORED:
        return
    if n <= 20_000:
        yield Candidate(DenseLU(**t), "any regular matrix", memory=16.0 * n * n, resort=True)
    if n <= 3000:
        yield Candidate(SVD(**t), "also a singular one, with the shortest of its solutions",
                        memory=40.0 * n * n, resort=True)  # fmt: skip


# --- least squares --------------------------------------------------------------------------------


def _least_squares(A: LinearOperator, request: Request) -> Iterator[Candidate]:
    (m, n), t = A.shape, request.tolerances
    long, short = max(m, n), min(m, n)
    memory = 8.0 * m * n
    sparse = nonzeros_of(A)
    step = 2 * product_seconds(A) + 2 * costs.ITERATION + 10 * costs.VECTOR * long
    if sparse is None or sparse.nnz > 0.05 * m * n:
        formed = _forming(A)
        solve = 4 * costs.DENSE_PRODUCT * m * n
        yield Candidate(QR(**t), f"dense, {'tall' if m > n else 'wide'}, of full rank",
                        formed + costs.QR * long * short**2, solve, 2 * memory)  # fmt: skip
        if m >= 20 * n and n >= 50:
            yield Candidate(SketchAndPrecondition(**t), "very tall: few iterations after a sketch",
                            formed + 2 * costs.DENSE_PRODUCT * m * n + costs.QR * 4 * n**3,
                            25 * (step + costs.DENSE_PRODUCT * n * n), memory)  # fmt: skip
        yield Candidate(SVD(**t), "of any rank, the shortest minimiser",
                        formed + costs.SVD * long * short**2, solve, 3 * memory)  # fmt: skip
        yield Candidate(LSMR(**t), "least squares by products alone", memory=40.0 * long,
                        iteration=step)  # fmt: skip
        return
    yield Candidate(LSMR(**t), "sparse least squares by products alone", memory=40.0 * long,
                    iteration=step)  # fmt: skip
    if installed("sksparse.spqr", "sparseqr") is not None:
        yield Candidate(SparseQR(**t), "sparse, of any rank", memory=200.0 * sparse.nnz,
                        resort=True)  # fmt: skip
    if short <= 5000:
        yield Candidate(QR(**t), "formed densely", memory=3 * memory, resort=True)
        yield Candidate(SVD(**t), "formed densely, of any rank", memory=5 * memory, resort=True)
