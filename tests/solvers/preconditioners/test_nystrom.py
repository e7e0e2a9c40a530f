"""Sketched inverses against dense eigendecompositions, and the theory of the condition number."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

import operators as ops
import solvers
from solvers.preconditioners.nystrom import Nystrom, split_shift
from tests.solvers.preconditioners.problems import condition, convection, kernel, sampled

pytestmark = pytest.mark.filterwarnings("error")


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    basis, _ = torch.linalg.qr(sampled(len(values), len(values), seed=seed))
    K = (basis * values) @ basis.T
    return (K + K.T) / 2


def damped(K: Tensor, mu: float) -> ops.LinearOperator:
    return ops.Dense(K, positive_semidefinite=True) + mu * ops.Identity(len(K))


def test_the_formula():
    K, mu, rank = with_spectrum(0.7 ** torch.arange(40.0).double()), 1e-3, 12
    P = Nystrom(rank=rank, tolerance=None, seed=3).prepare(damped(K, mu))
    generator = torch.Generator().manual_seed(3)
    sketch = ops.Nystrom(ops.Dense(K, symmetric=True), rank, generator=generator)
    U, values = sketch.rows, sketch.eigenvalues
    middle = U.T @ torch.diag(1 / (values + mu)) @ U
    expected = middle + (torch.eye(40) - U.T @ U) / (values[-1] + mu)
    torch.testing.assert_close(P.to_dense(), expected, rtol=1e-9, atol=1e-9)
    assert P.rank == rank
    assert P.positive_definite


@pytest.mark.parametrize("sketch", ["gaussian", "rpcholesky"])
@pytest.mark.parametrize("mu", [1e-4, 0.1, 10.0])
def test_exact_from_the_rank_of_the_matrix_on(sketch, mu):
    """The inverse itself beyond it; at it, P A has two eigenvalues, and CG takes two iterations."""
    M, b = sampled(30, 6), sampled(30, seed=1)
    A = damped(M @ M.T, mu)
    inverse = torch.linalg.inv(A.to_dense())
    P = Nystrom(rank=8, sketch=sketch, tolerance=None).prepare(A)
    torch.testing.assert_close(mu * P.to_dense(), mu * inverse, rtol=1e-6, atol=1e-7)
    for rank, count in ((6, 2), (8, 1)):
        settings = Nystrom(rank=rank, sketch=sketch, tolerance=None)
        x, info = solvers.CG(rtol=1e-8, preconditioner=settings).prepare(A).solve(b)
        assert info.iterations <= count + 1  # one for rounding
        torch.testing.assert_close(x, inverse @ b, rtol=1e-6, atol=1e-6 / mu)


def test_what_is_a_bad_inverse_at_low_rank_is_a_good_preconditioner():
    """The sketch as the inverse divides what it missed by the damping: an error of many times x."""
    K, mu = with_spectrum(torch.linspace(1, 10, 10).double()), 0.1
    b = sampled(10, seed=4)
    x = torch.linalg.solve(K + mu * torch.eye(10), b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        sketch = ops.Nystrom(ops.Dense(K, symmetric=True), 5, sketch="coordinate", damping=mu)
    assert torch.linalg.vector_norm(sketch.inverse() @ b - x) > 5 * torch.linalg.vector_norm(x)
    settings = Nystrom(rank=5, tolerance=None)
    solution = solvers.CG(rtol=1e-12, preconditioner=settings).prepare(damped(K, mu)).solve(b)
    assert solution.info.converged
    torch.testing.assert_close(solution.value, x, rtol=1e-9, atol=1e-9)


def test_below_28_from_twice_the_effective_dimension_on():
    """Theorem 5.1 in the mean over sketches, and the bound of Proposition 5.3 for each."""
    mu = 1e-3
    for values in (0.8 ** torch.arange(150.0), 1.0 / (1 + torch.arange(150.0)) ** 3):
        values = values.double()
        K = with_spectrum(values)
        A = damped(K, mu)
        effective = float((values / (values + mu)).sum())
        rank = 2 * math.ceil(1.5 * effective) + 1
        assert rank < 120
        conditions = []
        for seed in range(5):
            P = Nystrom(rank=rank, tolerance=None, seed=seed).prepare(A)
            conditions.append(condition(P.to_dense(), A.to_dense()))
            sketch = ops.Nystrom(
                ops.Dense(K, symmetric=True), rank, generator=torch.Generator().manual_seed(seed)
            )
            missed = torch.linalg.matrix_norm(K - sketch.to_dense(), 2)
            assert conditions[-1] <= float(sketch.eigenvalues[-1] + mu + missed) / mu * 1.0001
        assert sum(conditions) / 5 < 28
        assert condition(torch.eye(150).double(), A.to_dense()) > 500


def test_the_rank_grows_with_the_effective_dimension_and_iterations_stay():
    K, b = kernel(400, 1.0), sampled(400, seed=5)
    ranks, counts, plain = [], [], []
    for mu in (1.0, 1e-2, 1e-4):
        A = damped(K, mu)
        P = Nystrom(rank=4).prepare(A)
        ranks.append(P.rank)
        assert condition(P.to_dense(), A.to_dense()) < 25
        counts.append(solvers.CG(rtol=1e-8, preconditioner=P).prepare(A).solve(b).info.iterations)
        plain.append(solvers.CG(rtol=1e-8).prepare(A).solve(b).info.iterations)
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1]
    assert plain[-1] > 4 * plain[0]
    assert max(counts) <= 20


def test_pivoted_cholesky_reads_columns_alone():
    K, mu = kernel(200, 1.0), 1e-3
    seen = []

    class Counted(ops.Dense):
        def _matmat(self, block: Tensor) -> Tensor:
            seen.append(block.shape[1])
            return super()._matmat(block)

    A = Counted(K, symmetric=True) + mu * ops.Identity(200)
    P = Nystrom(rank=60, sketch="rpcholesky", tolerance=None).prepare(A)
    assert sum(seen) <= 10  # trying the claim
    assert condition(P.to_dense(), A.to_dense()) < 30


def test_where_the_shift_is_found():
    K, v = ops.Dense(kernel(20, 1.0), symmetric=True), sampled(20)
    eye = ops.Identity(20)
    low = ops.LowRankPlusDiagonal(sampled(3, 20), 0.5)
    cases = {
        "sum": (K + 0.5 * eye, 0.5),
        "reversed": (0.5 * eye + K, 0.5),
        "nested": ((K + 0.25 * eye) + low + 1.0 * eye, 1.75),
        "multiple": (2.0 * (K + 0.5 * eye), 1.0),
        "tensor": (K + torch.tensor(0.5, dtype=torch.float64) * eye, 0.5),
        "low rank": (low, 0.5),
        "none": (K, 0.0),
    }
    for name, (A, mu) in cases.items():
        rest, found = split_shift(A)
        assert found == pytest.approx(mu, rel=1e-15), name
        torch.testing.assert_close(rest @ v + found * v, A @ v)
    assert split_shift(0.5 * eye + 0.25 * eye) == (None, 0.75)


def test_the_damping_can_be_said():
    """One preconditioner, whether the sum shows the shift or it is inside a matrix."""
    K, mu = kernel(60, 1.0), 0.01
    inside = ops.Dense(K + mu * torch.eye(60), symmetric=True)
    for sketch in ("gaussian", "rpcholesky"):
        said = Nystrom(rank=30, damping=mu, sketch=sketch).prepare(inside).to_dense()
        shown = Nystrom(rank=30, sketch=sketch).prepare(damped(K, mu)).to_dense()
        torch.testing.assert_close(said, shown, rtol=1e-4, atol=1e-4)


def test_a_gram_matrix_by_products():
    X = ops.Dense(sampled(200, 40) * torch.logspace(0, -3, 40, dtype=torch.float64))
    A, b = X.T @ X + 1e-2 * ops.Identity(40), sampled(40, seed=6)
    assert A._exact_diagonal() is None
    x, info = solvers.CG(rtol=1e-9, preconditioner=Nystrom(rank=20)).prepare(A).solve(b)
    plain = solvers.CG(rtol=1e-9).prepare(A).solve(b).info.iterations
    assert info.iterations < 0.5 * plain
    torch.testing.assert_close(x, torch.linalg.solve(A.to_dense(), b), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="does not know its diagonal"):
        Nystrom(sketch="rpcholesky").prepare(A)


def test_two_sketches_of_one_seed_agree_bit_for_bit():
    A = damped(kernel(50, 1.0), 0.1)
    first, second, other = (Nystrom(rank=5, seed=s).prepare(A).to_dense() for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_rank_that_does_not_reach_is_warned_about_and_helps_all_the_same():
    A, b = damped(kernel(300, 0.3), 1e-4), sampled(300)
    settings = Nystrom(rank=8, max_rank=64)
    with pytest.warns(RuntimeWarning, match="max_rank=64; tolerance=0.001"):
        prepared = solvers.CG(rtol=1e-6, preconditioner=settings).prepare(A)
    plain = solvers.CG(rtol=1e-6).prepare(A).solve(b).info.iterations
    assert prepared.solve(b).info.iterations < plain


def test_what_it_refuses():
    K = ops.Dense(kernel(9, 1.0), symmetric=True)
    with pytest.raises(solvers.StructureError, match="shows no multiple of the identity"):
        Nystrom().prepare(K)
    with pytest.raises(solvers.StructureError, match="does not claim to be symmetric"):
        Nystrom().prepare(convection(3, 3))
    indefinite = ops.Dense(torch.diag(torch.tensor([1.0, -1.0])), symmetric=True)
    with pytest.raises(ValueError, match="is not positive semidefinite"):
        Nystrom(rank=2).prepare(indefinite + 0.5 * ops.Identity(2))
    for settings, message in (
        ({"rank": 0}, "rank=0; expected at least 1"),
        ({"rank": 9, "max_rank": 8}, "max_rank=8; expected at least rank=9"),
        ({"sketch": "srht"}, "sketch='srht'; expected 'gaussian', 'rpcholesky'"),
        ({"damping": 0.0}, "damping=0.0; expected a number > 0"),
        ({"tolerance": "best"}, "tolerance='best'; expected 'auto' or a number"),
        ({"tolerance": -1.0}, "tolerance=-1.0; expected a number > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Nystrom(**settings)
