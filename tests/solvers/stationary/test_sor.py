"""SOR and symmetric SOR against their iteration matrices, Young's theory and published counts."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from solvers import ConvergenceWarning, NotConvergedError, SingularError
from solvers.stationary.sor import SOR, SymmetricSOR, optimal_omega

PROPERTY = settings(max_examples=20, deadline=None, derandomize=True)
FLOAT64 = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def laplacian(m: int) -> scipy.sparse.csr_array:
    line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(m, m))
    eye = scipy.sparse.eye_array(m)
    return scipy.sparse.csr_array(scipy.sparse.kron(line, eye) + scipy.sparse.kron(eye, line))


def spd(n: int, seed: int = 0) -> Tensor:
    root = sampled(n, n + 3, seed=seed)
    return root @ root.T / n


def dominant(n: int, seed: int = 0) -> Tensor:
    """Strictly diagonally dominant by rows, and not symmetric."""
    matrix = sampled(n, n, seed=seed)
    return matrix - torch.diag(matrix.diag()) + torch.diag(1.2 * matrix.abs().sum(1))


def radius(matrix: Tensor) -> float:
    return float(torch.linalg.eigvals(matrix).abs().max())


def forms(matrix: Tensor) -> list[ops.LinearOperator]:
    symmetric = bool((matrix == matrix.T).all())
    return [ops.Sparse(matrix, symmetric=symmetric), ops.Dense(matrix, symmetric=symmetric)]


class TestLaplacianOfTenByTenPoints:
    """Stopped at 1e-8; the counts are those of an implementation in numpy and scipy alone."""

    matrix = laplacian(10)
    b = torch.from_numpy(np.random.default_rng(0).standard_normal(100))
    counts = ((1, 201), (1.2, 132), (1.4, 80), (1.56, 39), (1.6, 41), (1.8, 86), (1.95, 361))

    @pytest.mark.parametrize(("omega", "count"), counts)
    def test_iteration_counts(self, omega, count):
        solver = SOR(omega=omega, rtol=1e-8, maxiter=1000, strict=True)
        dense = ops.Dense(torch.from_numpy(self.matrix.toarray()), symmetric=True)
        for A in (ops.Sparse(self.matrix, symmetric=True), dense):
            x, info = solver.prepare(A).solve(self.b)
            assert info.iterations == info.products == count
            assert info.residual < 1e-8
        assert torch.linalg.vector_norm(self.b - dense @ x) <= 1e-8 * self.b.norm()

    def test_optimal_omega_is_optimal(self):
        """Young: the Jacobi radius is cos(pi / 11), and that of SOR at the optimum omega - 1."""
        matrix = torch.from_numpy(self.matrix.toarray())
        d = torch.diag(matrix.diag())
        jacobi = radius(torch.eye(100, dtype=FLOAT64) - torch.linalg.solve(d, matrix))
        assert jacobi == pytest.approx(math.cos(math.pi / 11), rel=1e-10)
        best = optimal_omega(jacobi)
        assert best == pytest.approx(1.5604, abs=1e-4)

        def rate(omega: float) -> float:
            M = matrix.tril(-1) + d / omega
            return radius(torch.eye(100, dtype=FLOAT64) - torch.linalg.solve(M, matrix))

        # The optimum is a double eigenvalue, seen to the root of machine precision alone.
        assert rate(best) == pytest.approx(best - 1, abs=1e-2)
        assert rate(1.0) == pytest.approx(jacobi**2, rel=1e-6)
        assert rate(best) < min(rate(best - 0.05), rate(best + 0.05))

    def test_symmetric_sweeps_are_less_sensitive_and_slower_at_their_best(self):
        A = ops.Sparse(self.matrix, symmetric=True)
        omegas = (1.0, 1.2, 1.4, 1.56, 1.6, 1.8)
        one, two = (
            [cls(omega=w, rtol=1e-8, maxiter=500).prepare(A).solve(self.b).info for w in omegas]
            for cls in (SOR, SymmetricSOR)
        )
        assert [info.products for info in two] == [2 * info.iterations for info in two]
        spread = [max(i.products for i in x) / min(i.products for i in x) for x in (one, two)]
        assert spread[1] < 3 < 5 < spread[0]
        assert min(i.products for i in two) > min(i.products for i in one)


@PROPERTY
@given(n=st.integers(1, 8), omega=st.floats(0.3, 1.8), K=st.integers(1, 6), seed=st.integers(0, 99))
def test_iterates_are_those_of_the_iteration_matrix(n, omega, K, seed):
    """x_K = (I - G^K) A^-1 b with G = I - M^-1 A, or the product of two of them."""
    matrix, b, eye = dominant(n, seed), sampled(n, 2, seed=seed + 1), torch.eye(n, dtype=FLOAT64)
    solution, adjoint = torch.linalg.solve(matrix, b), torch.linalg.solve(matrix.T, b)
    lower, upper = (
        t + torch.diag(matrix.diag() / omega) for t in (matrix.tril(-1), matrix.triu(1))
    )
    G, H = (eye - torch.linalg.solve(M, matrix) for M in (lower, upper))
    G_, H_ = (eye - torch.linalg.solve(M.T, matrix.T) for M in (lower, upper))
    kept = {"omega": omega, "maxiter": K, "stop_at_maxiter": True, "rtol": 0.0}
    for A in forms(matrix):
        for solver, forth, back in (
            (SOR(**kept), G, G_),
            (SOR(sweep="backward", **kept), H, H_),
            (SymmetricSOR(**kept), H @ G, G_ @ H_),
        ):
            prepared = solver.prepare(A)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # omega > 1 may diverge
                x, info = prepared.solve(b)
                y, info_ = prepared.solve_transpose(b)
            k, k_ = info.iterations, info_.iterations
            power = torch.linalg.matrix_power
            for value, made, expected in (
                (x, power(forth, k), solution),
                (y, power(back, k_), adjoint),
            ):
                assert (value - (expected - made @ expected)).norm() <= 1e-9 * (
                    expected.norm() + value.norm()
                )
        assert radius(G_ if K % 2 else H_) == pytest.approx(radius(G if K % 2 else H), rel=1e-3)


@PROPERTY
@given(n=st.integers(2, 8), omega=st.floats(0.05, 1.95), seed=st.integers(0, 99))
def test_every_omega_lowers_the_energy_of_a_definite_operator(n, omega, seed):
    """Ostrowski and Reich, and for symmetric sweeps too: the error falls in the A-norm."""
    matrix, b = spd(n, seed), sampled(n, seed=seed + 1)
    solution = torch.linalg.solve(matrix, b)
    for cls in (SOR, SymmetricSOR):
        energy = float(solution @ matrix @ solution)
        for K in (1, 2, 3):
            solver = cls(omega=omega, maxiter=K, stop_at_maxiter=True, rtol=0.0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # the residual may grow
                error = solver.prepare(ops.Dense(matrix, symmetric=True)).solve(b).value - solution
            lower = float(error @ matrix @ error)
            assert lower <= energy * (1 + 1e-10)
            energy = lower


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize("cls", [SOR, SymmetricSOR])
@pytest.mark.parametrize("form", [0, 1])
def test_solves_blocks_in_each_precision(dtype, cls, form):
    matrix = dominant(9).to(dtype)
    A, b = forms(matrix)[form], sampled(9, 3, seed=1).to(dtype) * torch.tensor([1.0, 1e-20, 1e6])
    b = b.to(dtype)
    rtol = 1e-11 if dtype == FLOAT64 else 2e-6
    prepared = cls(rtol=rtol, maxiter=300, strict=True).prepare(A)
    for x, M in ((prepared.solve(b).value, matrix), (prepared.solve_transpose(b).value, matrix.T)):
        assert x.dtype == dtype
        expected = torch.linalg.solve(M.double(), b.double())
        assert ((x - expected).norm(dim=0) <= 20 * rtol * expected.norm(dim=0)).all()
    assert prepared.solve(b).info.backend == ("torch" if form else "SciPy")


@pytest.mark.parametrize("cls", [SOR, SymmetricSOR])
def test_divergence_is_flagged(cls):
    """Symmetric with a positive diagonal, but not definite: sweeps diverge at any omega."""
    matrix = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=FLOAT64)
    for A in forms(matrix):
        with pytest.warns(ConvergenceWarning, match=r"diverged.*the residual grows"):
            x, info = (
                cls(omega=1.0, maxiter=500).prepare(A).solve(torch.tensor([1.0, 0.0]).double())
            )
        assert info.status == "diverged"
        assert info.residual > 10
        assert torch.isfinite(x).all()
        with pytest.raises(NotConvergedError, match="diverged"):
            cls(strict=True, maxiter=500).prepare(A).solve(torch.tensor([1.0, 0.0]).double())


def test_the_limit_is_flagged():
    A = ops.Sparse(laplacian(10), symmetric=True)
    with pytest.warns(ConvergenceWarning, match="maxiter after 5 iterations"):
        _, info = SOR(maxiter=5, rtol=1e-8).prepare(A).solve(torch.ones(100, dtype=FLOAT64))
    assert not info.converged
    assert 1e-3 < info.residual < 1


def test_zeros_on_the_diagonal_are_refused():
    with pytest.raises(SingularError, match="entry 0 on the diagonal"):
        SOR().prepare(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


@pytest.mark.parametrize("beta", [-0.1, 1.0, math.nan])
def test_jacobi_radii_out_of_range(beta):
    with pytest.raises(ValueError, match="jacobi_radius="):
        optimal_omega(beta)


def test_optimal_omega_at_its_ends():
    assert optimal_omega(0.0) == 1.0
    assert 1.99 < optimal_omega(1 - 1e-6) < 2


@pytest.mark.parametrize("omega", [0.0, 2.0, -1.0, math.nan])
@pytest.mark.parametrize("cls", [SOR, SymmetricSOR])
def test_omega_out_of_range(cls, omega):
    with pytest.raises(ValueError, match=rf"{cls.__name__}: omega=.*expected 0 < omega < 2"):
        cls(omega=omega)


def test_sweeps_that_there_are_not():
    with pytest.raises(ValueError, match=r"SOR: sweep='symmetric'; .*SymmetricSOR"):
        SOR(sweep="symmetric")
