"""`SparseCholesky` by CHOLMOD: answers, refusals, what is kept, low-rank changes, derivatives."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import operators as ops
import solvers
from solvers import NotPositiveDefiniteError, StructureError
from solvers.sparse import analysis, cholmod
from solvers.sparse.cholesky import SparseCholesky
from solvers.sparse.column_counts import column_counts
from solvers.sparse.matrix import csc_of
from tests.solvers.sparse.matrices import FLOAT64, close, poisson, random_spd, sampled

PROPERTY = settings(max_examples=20, deadline=None, derandomize=True)
ORDERINGS = ["default", "amd", "metis", "nesdis", "natural", "best"]
MODES = ["auto", "supernodal", "simplicial"]


@pytest.fixture
def count(monkeypatch) -> list[tuple[str, str]]:
    """The settings of every analysis that CHOLMOD is asked for."""
    made: list[tuple[str, str]] = []
    analyse = cholmod.analyse

    def counted(matrix: Any, ordering: Any, mode: Any) -> Any:
        made.append((ordering, mode))
        return analyse(matrix, ordering, mode)

    monkeypatch.setattr(cholmod, "analyse", counted)
    analysis.analyses.clear()
    return made


# --- answers -------------------------------------------------------------------------------------


@PROPERTY
@given(n=st.integers(1, 12), k=st.integers(1, 4), seed=st.integers(0, 999))
def test_solution_and_determinant_are_those_of_the_dense_matrix(n, k, seed):
    A = random_spd(n, seed)
    factor = SparseCholesky(strict=True).prepare(A)
    B = sampled(n, k, seed=seed + 1)
    close(factor.solve(B).value, torch.linalg.solve(A.to_dense(), B), 1e-12)
    close(factor.logdet(), torch.logdet(A.to_dense()), 1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ordering", ORDERINGS)
def test_every_ordering_and_mode(ordering, mode):
    A = poisson(7, 6)
    factor = SparseCholesky(ordering=ordering, mode=mode).prepare(A)
    B = sampled(42, 3)
    x, info = factor.solve(B)
    close(x, torch.linalg.solve(A.to_dense(), B), 1e-12)
    assert info.backend == "CHOLMOD"
    assert info.iterations == 0
    # Eliminating the graph, in the same order, fills as much.
    permutation = factor.symbolic.permutation
    assert info.factor_nonzeros == filled(A, permutation)
    close(factor.logdet(), torch.logdet(A.to_dense()), 1e-12)


def filled(A: ops.Sparse, permutation: Any) -> int:
    """Nonzeros of L by elimination of a graph, one vertex after the other."""
    graph = (A.to_dense().numpy() != 0)[np.ix_(permutation, permutation)]
    count = 0
    for k in range(len(graph)):
        below = np.flatnonzero(graph[k + 1 :, k]) + k + 1
        graph[np.ix_(below, below)] = True
        count += 1 + len(below)
    return count


@pytest.mark.parametrize("sizes", [(30, 30), (9, 9, 9)])
def test_grids_in_the_plane_and_in_space(sizes):
    A = poisson(*sizes)
    x = sampled(A.shape[0], 2)
    result, info = SparseCholesky(rtol=1e-13).prepare(A).solve(A @ x)
    close(result, x, 1e-12)
    assert info.converged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_factorised_in_double_precision(dtype):
    # Weights and solution are exact in the dtype; a factorisation in it would lose digits.
    line = torch.ones(200, dtype=FLOAT64)
    A = poisson(200, dtype=dtype)
    b = (poisson(200) @ line).to(dtype)
    x, info = SparseCholesky().prepare(A).solve(b)
    assert x.dtype == dtype
    assert (x.double() - line).abs().max() <= 4 * torch.finfo(dtype).eps
    assert info.converged


def test_vectors_blocks_and_layouts():
    A = poisson(5, 5)
    factor = SparseCholesky().prepare(A)
    B = sampled(4, 50)[:, ::2].T
    x = factor.solve(B).value
    assert x.is_contiguous()
    close(x, torch.linalg.solve(A.to_dense(), B), 1e-12)
    close(factor.solve(B[:, 2]).value, x[:, 2], 1e-12)
    close(factor.solve_transpose(B).value, x, 1e-14)
    assert factor.solve(torch.zeros(25, 0, dtype=FLOAT64)).value.shape == (25, 0)


@pytest.mark.parametrize("n", [0, 1])
def test_small_systems(n):
    A = ops.Sparse(4.0 * torch.eye(n, dtype=FLOAT64), symmetric=True)
    factor = SparseCholesky().prepare(A)
    close(factor.solve(torch.ones(n, 2, dtype=FLOAT64)).value, torch.full((n, 2), 0.25).double())
    assert float(factor.logdet().exp()) == pytest.approx(4.0**n)


def test_operators_that_hold_their_nonzeros():
    line, b = poisson(4), sampled(12)
    damped = ops.KroneckerSum(line, poisson(3)) + 0.5 * ops.Identity(12)
    blocks = ops.BlockDiagonal(line, 2.0 * ops.Identity(3, FLOAT64), poisson(5))
    for A in (damped, blocks, ops.Kronecker(line, poisson(3)), 3.0 * damped):
        x, info = SparseCholesky(strict=True).prepare(A).solve(b)
        close(x, torch.linalg.solve(A.to_dense(), b), 1e-12)
        assert info.backend == "CHOLMOD"


def test_indices_of_64_bits_as_scipy_makes_them():
    rows = np.array([0, 1, 2, 0, 1], dtype=np.int64)
    columns = np.array([0, 1, 2, 1, 0], dtype=np.int64)
    matrix = scipy.sparse.csc_array((np.array([2.0, 3, 4, 1, 1]), (rows, columns)), shape=(3, 3))
    b = sampled(3)
    x = SparseCholesky().prepare(matrix).solve(b).value
    close(x, torch.linalg.solve(torch.from_numpy(matrix.toarray()), b), 1e-14)


def test_large_factors_get_indices_of_64_bits(monkeypatch, count):
    monkeypatch.setattr(cholmod, "WIDE", 20)
    A = poisson(5, 5)
    factor = SparseCholesky().prepare(A)
    assert factor.symbolic.index == np.int64
    b, C = sampled(25), torch.eye(25, 2, dtype=FLOAT64)
    close(factor.solve(b).value, torch.linalg.solve(A.to_dense(), b), 1e-12)
    assert factor.factor_nonzeros == filled(A, factor.symbolic.permutation)
    updated = factor.rank_update(C)
    close(updated.solve(b).value, torch.linalg.solve(A.to_dense() + C @ C.T, b), 1e-12)


def test_nothing_is_copied_where_the_layout_allows():
    A = poisson(6, 6)
    matrix = csc_of(A, "test", FLOAT64, symmetric=True)
    pointers, columns = A.pattern.narrow()
    for array, tensor in (
        (matrix.data, A.values),
        (matrix.indices, columns),
        (matrix.indptr, pointers),
    ):
        assert np.shares_memory(array, tensor.numpy())
        assert array.dtype in (np.float64, np.int32)
    before = A.values.clone()
    SparseCholesky().prepare(A).rank_update(torch.eye(36, 1, dtype=FLOAT64))
    assert torch.equal(A.values, before)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ordering", ["amd", "metis", "natural"])
@pytest.mark.parametrize("column", [0, 13, 29])
def test_the_failing_column_is_named(ordering, mode, column):
    # Whatever the order, elimination fails where this column comes: its diagonal is negative, and
    # without it the matrix is definite. L D L^T, column by column, would not stop there.
    damaged = poisson(6, 5).to_dense()
    damaged[column, column] = -1.0
    A = ops.Sparse(damaged, symmetric=True)
    with pytest.raises(NotPositiveDefiniteError, match=rf"pivot of column {column} \(from 0\), w"):
        SparseCholesky(ordering=ordering, mode=mode).prepare(A)


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_elimination_is_named_too(mode):
    damaged = poisson(6, 5).to_dense()
    damaged[13, 13] = -1.0
    solver = SparseCholesky(ordering="amd", mode=mode)
    intact = solver.prepare(poisson(6, 5))
    place = int(np.flatnonzero(intact.symbolic.permutation == 13)[0])
    with pytest.raises(NotPositiveDefiniteError, match=rf"eliminated as number {place},.*damping"):
        solver.prepare(ops.Sparse(damaged, symmetric=True))


@pytest.mark.parametrize("mode", MODES)
def test_singular_and_empty_matrices(mode):
    solver = SparseCholesky(mode=mode, ordering="natural")
    path = poisson(5).to_dense()
    path[0, 0] = path[4, 4] = 1.0  # pivots 1, 1, 1, 1, 0 exactly
    with pytest.raises(NotPositiveDefiniteError, match="column 4"):
        solver.prepare(ops.Sparse(path, symmetric=True))
    with pytest.raises(NotPositiveDefiniteError, match="column 0"):
        solver.prepare(scipy.sparse.csr_array((3, 3), dtype=float))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value):
    A = poisson(4)
    values = A.values.clone()
    values[[2, 4]] = value
    with pytest.raises(ValueError, match=r"SparseCholesky: Sparse.* holds 2 NaN or infinite"):
        SparseCholesky().prepare(ops.Sparse(values, A.pattern, symmetric=True))


def test_operators_that_do_not_suit():
    with pytest.raises(StructureError, match=r"Dense\(2, 2\) does not hold: give ops\.Sparse"):
        SparseCholesky().prepare(ops.Dense(torch.eye(2), symmetric=True))
    with pytest.raises(StructureError, match=r"needs a symmetric operator; .* or use SparseLU"):
        SparseCholesky().prepare(ops.Sparse(torch.eye(2) + torch.ones(2, 2).triu(1)))
    with pytest.raises(StructureError, match="square"):
        SparseCholesky().prepare(ops.Sparse(torch.ones(2, 3)))


@pytest.mark.parametrize("setting", [{"ordering": "colamd"}, {"mode": "dense"}])
def test_settings_out_of_range(setting):
    (name, value), *_ = setting.items()
    with pytest.raises(ValueError, match=rf"SparseCholesky: {name}='{value}'; expected one of"):
        SparseCholesky(**setting)


def test_claims_are_proved_by_the_factorisation_not_by_products(monkeypatch):
    A = poisson(30)
    damaged = A.to_dense()
    damaged[7, 7] = -1.0
    spoilt = ops.Sparse(damaged).values
    products = []
    matvec = ops.Sparse._matvec
    monkeypatch.setattr(ops.Sparse, "_matvec", lambda A, v: products.append(1) or matvec(A, v))
    claimed = ops.Sparse(A.values, A.pattern, positive_definite=True)
    factor = SparseCholesky().prepare(claimed)
    assert not products
    with pytest.raises(NotPositiveDefiniteError, match="column 7"):
        SparseCholesky().prepare(ops.Sparse(spoilt, A.pattern, positive_definite=True))
    # Claims that came along with other values.
    with pytest.raises(NotPositiveDefiniteError, match="column 7"):
        factor.update(claimed.with_tensors((spoilt,)))
    with pytest.raises(ops.FalseClaimError, match="is claimed symmetric, but"):
        factor.update(claimed.with_tensors((A.values + torch.arange(A.nnz),)))


# --- what is kept --------------------------------------------------------------------------------


def test_a_pattern_is_analysed_once(count):
    A = poisson(8, 8)
    other = ops.Sparse(3.0 * A.values, A.pattern, symmetric=True)
    SparseCholesky().prepare(A)
    factor = SparseCholesky().prepare(other)
    # Equal by content, though another object, as when a matrix is assembled anew.
    again = poisson(8, 8)
    assert again.pattern is not A.pattern
    SparseCholesky(rtol=1e-3).prepare(again)
    assert count == [("default", "auto")]
    b = sampled(64)
    close(factor.solve(b).value, torch.linalg.solve(other.to_dense(), b), 1e-12)
    # Its settings are part of an analysis.
    SparseCholesky(ordering="natural").prepare(A)
    SparseCholesky(mode="simplicial").prepare(A)
    assert len(count) == 3


def test_another_pattern_of_the_same_size_is_analysed_anew(count):
    first, second = random_spd(10, 3), random_spd(10, 4)
    n = min(first.nnz, second.nnz)
    ring = ops.Sparse(poisson(10).to_dense(), symmetric=True)
    moved = ring.to_dense()[[1, 0, *range(2, 10)]][:, [1, 0, *range(2, 10)]]
    same_size = ops.Sparse(moved, symmetric=True)
    assert same_size.nnz == ring.nnz
    b = sampled(10)
    assert n > 10
    for A in (first, second, ring, same_size):
        factor = SparseCholesky().prepare(A)
        close(factor.solve(b).value, torch.linalg.solve(A.to_dense(), b), 1e-12)
    assert len(count) == 4


def test_an_update_keeps_the_analysis(count):
    A = poisson(6, 6)
    factor = SparseCholesky().prepare(A)
    analysis.analyses.clear()
    doubled = factor.update(ops.Sparse(2.0 * A.values, A.pattern, symmetric=True))
    equal = doubled.update(poisson(6, 6))
    assert len(count) == 1
    b = sampled(36)
    close(doubled.solve(b).value, factor.solve(b).value / 2, 1e-13)
    close(equal.solve(b).value, factor.solve(b).value, 1e-13)
    assert doubled.A.values[0] == 2 * factor.A.values[0]
    # Another pattern is another analysis, not a wrong answer.
    wider = poisson(6, 6) + ops.Sparse(torch.eye(36).roll(7, 1).double(), symmetric=False)
    wider = wider + ops.Sparse(torch.eye(36).roll(-7, 1).double()) + 4.0 * ops.Identity(36)
    wider = ops.Sparse(wider.to_dense(), symmetric=True)
    close(factor.update(wider).solve(b).value, torch.linalg.solve(wider.to_dense(), b), 1e-12)
    assert len(count) == 2


def test_analyses_are_bounded_and_die_with_their_patterns(count):
    kept = [poisson(n) for n in range(3, 15)]
    for A in kept:
        SparseCholesky().prepare(A)
    entries = analysis.analyses._entries
    assert len(entries) == analysis.KEPT
    SparseCholesky().prepare(kept[-1])
    assert len(count) == len(kept)
    SparseCholesky().prepare(kept[0])  # had to make room
    assert len(count) == len(kept) + 1
    del kept, A, entries
    gc.collect()
    assert analysis.analyses._entries == []


def test_a_factor_is_freed_with_its_object():
    factor = SparseCholesky().prepare(poisson(6, 6))
    x = factor.solve(sampled(36)).value
    updated = factor.rank_update(torch.eye(36, 1, dtype=FLOAT64))
    handles = [weakref.ref(one.factor) for one in (factor, updated)]
    assert all(handle() is not None for handle in handles)
    del factor
    gc.collect()
    assert handles[0]() is None
    assert handles[1]() is not None
    del updated
    gc.collect()
    assert handles[1]() is None
    assert x.isfinite().all()


def test_copies_and_pickles_prepare_anew():
    A, b = poisson(5, 5), sampled(25)
    factor = SparseCholesky(ordering="amd").prepare(A)
    changed = factor.rank_update(sampled(25, 2)).rank_downdate(0.1 * sampled(25, 1, seed=3))
    for one in (factor, changed):
        text = pickle.dumps(one)
        assert b"sksparse" not in text
        for other in (pickle.loads(text), copy.copy(one), copy.deepcopy(one)):
            assert other.solver == one.solver
            assert other.factor is not one.factor
            close(other.solve(b).value, one.solve(b).value, 1e-12)


# --- low-rank changes ----------------------------------------------------------------------------


@PROPERTY
@given(n=st.integers(2, 12), k=st.integers(1, 10), seed=st.integers(0, 999))
def test_rank_updates_and_downdates_are_fresh_factorisations(n, k, seed):
    A = random_spd(n, seed)
    C = sampled(n, k, seed=seed + 1) * (sampled(n, k, seed=seed + 2) > 0.5)
    matrix, B = A.to_dense(), sampled(n, 2, seed=seed)
    factor = SparseCholesky(strict=True).prepare(A)
    updated = factor.rank_update(C)
    larger = matrix + C @ C.T
    close(updated.solve(B).value, torch.linalg.solve(larger, B), 1e-10)
    close(updated.logdet(), torch.logdet(larger), 1e-10)
    back = updated.rank_downdate(C)
    close(back.solve(B).value, torch.linalg.solve(matrix, B), 1e-9)
    # The first one is what it was.
    close(factor.solve(B).value, torch.linalg.solve(matrix, B), 1e-12)
    close(factor.logdet(), torch.logdet(matrix), 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_sparse_changes(mode):
    A, b = poisson(6, 6), sampled(36)
    # Indices as scipy >= 1.17 makes them: 64 bits, where the factor has 32.
    C = scipy.sparse.csc_array(
        (np.array([1.0, 0.5, -2.0]), (np.array([3, 17, 20]), np.array([0, 0, 1]))), shape=(36, 2)
    )
    dense = torch.from_numpy(C.toarray())
    factor = SparseCholesky(mode=mode).prepare(A)
    for given_C in (ops.Sparse.from_scipy(C), dense):
        updated = factor.rank_update(given_C)
        close(updated.solve(b).value, torch.linalg.solve(A.to_dense() + dense @ dense.T, b), 1e-12)
        assert updated.solve(b).info.backend == "CHOLMOD"


def test_a_downdate_that_leaves_no_definite_matrix():
    A = poisson(6, 5)
    c = torch.zeros(30, 1, dtype=FLOAT64)
    c[[3, 17]] = torch.tensor([[1.0], [0.5]], dtype=FLOAT64)
    # A - s c c^T is singular at s = 1 / <c, A^-1 c>.
    limit = float(c.T @ torch.linalg.solve(A.to_dense(), c)) ** -0.5
    factor = SparseCholesky().prepare(A)
    below = factor.rank_downdate(0.999 * limit * c)
    close(
        below.solve(c).value,
        torch.linalg.solve(A.to_dense() - (0.999 * limit) ** 2 * c @ c.T, c),
        1e-8,
    )
    for scale in (1.001, 30.0):
        with pytest.raises(NotPositiveDefiniteError, match="pivot of column"):
            factor.rank_downdate(scale * limit * c)
    assert factor.solve(c).info.converged


def test_changes_that_do_not_fit():
    factor = SparseCholesky().prepare(poisson(4))
    with pytest.raises(ValueError, match=r"rank_update: C has shape \(3, 1\); expected \(4, k\)"):
        factor.rank_update(torch.zeros(3, 1, dtype=FLOAT64))
    with pytest.raises(ValueError, match=r"C has shape \(4,\); expected"):
        factor.rank_downdate(torch.zeros(4, dtype=FLOAT64))
    with pytest.raises(TypeError, match=r"rank_update: C is torch.float32 on cpu; expected torch."):
        factor.rank_update(torch.zeros(4, 1))
    with pytest.raises(TypeError, match="C is ndarray; expected a dense tensor"):
        factor.rank_update(np.zeros((4, 1)))
    with pytest.raises(ValueError, match="holds NaN or infinite entries"):
        factor.rank_update(torch.full((4, 1), torch.nan, dtype=FLOAT64))


def test_solutions_are_differentiable_by_the_change_and_the_matrix():
    A, b, C = poisson(5), sampled(5), 0.3 * sampled(5, 2)

    def solution(values, C):
        operator = ops.Sparse(values, A.pattern, symmetric=True)
        return SparseCholesky().prepare(operator).rank_downdate(C).solve(b).value

    moving = (A.values.clone().requires_grad_(), C.clone().requires_grad_())
    got = torch.autograd.grad(solution(*moving).square().sum(), moving)

    def dense(values, C):
        matrix = ops.Sparse(values, A.pattern).to_dense() - C @ C.T
        return torch.linalg.solve(matrix, b)

    expected = torch.autograd.grad(dense(*moving).square().sum(), moving)
    for one, other in zip(got, expected, strict=True):
        close(one, other, 1e-10)


def test_the_value_of_a_determinant_has_no_silent_gradient():
    A = poisson(4)
    values = A.values.clone().requires_grad_()
    factor = SparseCholesky().prepare(ops.Sparse(values, A.pattern, symmetric=True))
    with pytest.raises(NotImplementedError, match=r"silent zero; use operators\.logdet"):
        factor.logdet()
    with torch.no_grad():
        assert float(factor.logdet()) == pytest.approx(np.log(5.0))


# --- derivatives ---------------------------------------------------------------------------------


def solution(values, A, b):
    operator = ops.Sparse(values, A.pattern, symmetric=True)
    return solvers.solve(operator, b, solver=SparseCholesky())


def test_the_gradient_at_the_nonzeros():
    A, b, g = random_spd(6, 5), sampled(6), sampled(6, seed=1)
    values = A.values.clone().requires_grad_()
    (got,) = torch.autograd.grad(solution(values, A, b) @ g, values)
    inverse = torch.linalg.inv(A.to_dense())
    everywhere = -torch.outer(inverse @ g, inverse @ b)
    close(got, everywhere[A.pattern.rows, A.pattern.columns], 1e-12)
    # Second order, along symmetric directions: there is no A^-1 of CHOLMOD beyond them.
    pairs = torch.stack([A.pattern.rows, A.pattern.columns]).sort(dim=0).values
    edges, where = pairs.unique(dim=1, return_inverse=True)
    weights = A.values.new_zeros(edges.shape[1]).index_copy(0, where, A.values)
    hessian = torch.func.hessian(lambda w: solution(w[where], A, b) @ g)(weights)
    expected = torch.func.hessian(
        lambda w: torch.linalg.solve(ops.Sparse(w[where], A.pattern).to_dense(), b) @ g
    )(weights)
    close(hessian, expected, 1e-10)
    moving = (weights.requires_grad_(), b.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(lambda w, b: solution(w[where], A, b), moving)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that torch makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                self.numbers = max(self.numbers, leaf.numel())
        return result


def test_a_long_chain_costs_memory_for_its_nonzeros_alone(count):
    n = 200_000
    A, b = poisson(n) + 0.1 * ops.Identity(n), sampled(n)
    values = A.values.clone().requires_grad_()
    with Largest() as largest:
        x = solution(values, A, b)
        (gradient,) = torch.autograd.grad(x.square().sum(), values)
    assert largest.numbers <= 2 * A.nnz
    assert len(count) == 1
    with torch.no_grad():
        adjoint = SparseCholesky().prepare(A).solve(2 * x).value
        expected = -adjoint[A.pattern.rows] * x[A.pattern.columns]
    close(gradient, expected, 1e-12)


def test_a_batch_of_values_is_analysed_once(count):
    A, b = poisson(4, 3), sampled(12)
    batch = A.values * torch.linspace(1, 2, 5, dtype=FLOAT64)[:, None]
    x = torch.func.vmap(lambda v: solution(v, A, b))(batch)
    expected = torch.linalg.solve(A.to_dense(), b) / torch.linspace(1, 2, 5).double()[:, None]
    close(x, expected, 1e-12)
    gradient = torch.func.vmap(torch.func.grad(lambda v: solution(v, A, b).sum()))(batch)
    one = torch.func.grad(lambda v: solution(v, A, b).sum())(batch[3])
    close(gradient[3], one, 1e-12)
    assert len(count) == 1


# --- analyse -------------------------------------------------------------------------------------


@PROPERTY
@given(n=st.integers(1, 14), seed=st.integers(0, 999))
def test_the_predicted_fill_is_that_of_elimination(n, seed):
    A = random_spd(n, seed)
    matrix = csc_of(A, "test", FLOAT64, symmetric=True)
    symbolic = cholmod.analyse(matrix, "amd", "auto")
    ahead = analysis.analyse(A, "amd")
    assert ahead.factor_nonzeros == filled(A, symbolic.permutation)
    assert ahead.factor_nonzeros == SparseCholesky(ordering="amd").prepare(A).factor_nonzeros
    assert ahead.flops == float((symbolic.counts.astype(float) ** 2).sum())
    assert sorted(symbolic.permutation) == list(range(n))


def test_a_full_matrix_costs_n_cubed_over_three():
    n = 60
    A = ops.Sparse(torch.eye(n, dtype=FLOAT64) * n + 1.0, symmetric=True)
    ahead = analysis.analyse(A)
    assert ahead.factor_nonzeros == n * (n + 1) // 2
    assert ahead.flops == n * (n + 1) * (2 * n + 1) / 6


def test_what_was_analysed_is_taken_up(count):
    A = poisson(12, 12)
    ahead = analysis.analyse(A)
    assert 0 < ahead.seconds < 60
    SparseCholesky().prepare(A)
    assert len(count) == 1


def test_where_the_fill_cannot_be_read(monkeypatch, count):
    class Factor:
        """Not laid out as that of scikit-sparse 0.4."""

    assert column_counts(Factor()) is None
    assert column_counts(object()) is None
    monkeypatch.setattr(cholmod, "column_counts", lambda factor: None)
    A, b = poisson(6, 5), sampled(30)
    with pytest.raises(solvers.MissingLibraryError, match="does not pass on the fill"):
        analysis.analyse(A)
    for mode in MODES:
        factor = SparseCholesky(mode=mode).prepare(A)
        assert factor.factor_nonzeros is None
        close(factor.solve(b).value, torch.linalg.solve(A.to_dense(), b), 1e-12)
        damaged = A.to_dense()
        damaged[4, 4] = -1.0
        with pytest.raises(NotPositiveDefiniteError, match="column 4"):
            SparseCholesky(mode=mode).prepare(ops.Sparse(damaged, symmetric=True))


def test_nothing_to_analyse():
    ahead = analysis.analyse(ops.Sparse(torch.zeros(0, 0), symmetric=True))
    assert (ahead.factor_nonzeros, ahead.flops) == (0, 0.0)


def test_what_cannot_be_analysed():
    with pytest.raises(StructureError, match="analyse needs a symmetric operator"):
        analysis.analyse(ops.Sparse(torch.ones(2, 2).triu()))
    with pytest.raises(StructureError, match=re.escape("give ops.Sparse(matrix)")):
        analysis.analyse(ops.Dense(torch.eye(2), symmetric=True))
