"""The ways to invert low rank plus diagonal agree with the dense inverse and with each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from operators import EmpiricalFisher, FisherStream, LowRankPlusDiagonal, Space
from solvers import (
    CG,
    DenseCholesky,
    DenseLU,
    InverseRecursion,
    ShermanMorrison,
    SingularError,
    StructureError,
    Woodbury,
)

PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)
FLOAT64 = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    """Equal relative to the size of the whole, not of each entry."""
    assert actual.shape == expected.shape
    assert torch.linalg.vector_norm(actual - expected) <= rtol * torch.linalg.vector_norm(expected)


@st.composite
def low_rank(draw, signed: bool):
    """Operator and matrix, well enough conditioned for ten digits at each of its T updates."""
    n, count = draw(st.integers(1, 8)), draw(st.integers(0, 12))
    seed = draw(st.integers(0, 999))
    rows, weights = sampled(count, n, seed=seed), sampled(count, seed=seed + 1).abs() + 0.05
    d = sampled(n, seed=seed + 2).abs() + draw(st.floats(1e-2, 2.0))
    if draw(st.booleans()):
        d = d[0]
    if signed:
        weights = weights * torch.sign(sampled(count, seed=seed + 3))
        d = -d if draw(st.booleans()) else d
    A = LowRankPlusDiagonal(rows, d, weights)
    # Updates of either sign may pass near a singular matrix: no formula is accurate there.
    partial = torch.diag(d.expand(n))
    for weight, row in zip(weights, rows, strict=True):
        partial = partial + weight * torch.outer(row, row)
        assume(float(torch.linalg.cond(partial)) < 1e4)
    return A, partial


@PROPERTY
@given(low_rank(signed=False), st.integers(1, 3))
def test_woodbury_sherman_morrison_and_dense_agree(pair, k):
    A, matrix = pair
    block = sampled(len(matrix), k, seed=k)
    expected = torch.linalg.solve(matrix, block)
    close(Woodbury(strict=True).prepare(A).solve(block).value, expected)
    close(ShermanMorrison(strict=True).prepare(A).solve(block).value, expected)


@PROPERTY
@given(low_rank(signed=True))
def test_weights_and_diagonals_of_either_sign(pair):
    A, matrix = pair
    b = sampled(len(matrix))
    expected = torch.linalg.solve(matrix, b)
    close(Woodbury(strict=True).prepare(A).solve(b).value, expected)
    close(ShermanMorrison(strict=True).prepare(A).solve(b).value, expected)
    close(Woodbury(strict=True).prepare(A).solve_transpose(b).value, expected)


@pytest.mark.parametrize("count", [0, 1, 5, 6, 30])
@pytest.mark.parametrize("solver", [Woodbury(), ShermanMorrison()])
def test_fewer_and_more_outer_products_than_dimensions(solver, count):
    fisher = EmpiricalFisher(sampled(count, 5), damping=0.1)
    b = sampled(5, seed=1)
    close(solver.prepare(fisher).solve(b).value, torch.linalg.solve(fisher.to_dense(), b))


@pytest.mark.parametrize("solver", [Woodbury(), ShermanMorrison()])
@pytest.mark.parametrize(("dtype", "damping"), [(torch.float32, 1e-2), (FLOAT64, 1e-6)])
def test_residual_with_small_damping(solver, dtype, damping):
    fisher = EmpiricalFisher(sampled(4, 10).to(dtype), damping)
    b = sampled(10, seed=1).to(dtype)
    x, info = solver.prepare(fisher).solve(b)
    matrix, x, b = fisher.to_dense().double(), x.double(), b.double()
    true = torch.linalg.vector_norm(b - matrix @ x) / torch.linalg.vector_norm(b)
    # b - A x is known up to eps |A| |x|: what measuring it twice may differ by.
    rounding = torch.linalg.matrix_norm(matrix) * torch.linalg.vector_norm(x)
    rounding = torch.finfo(dtype).eps * float(rounding / torch.linalg.vector_norm(b))
    assert info.residual == pytest.approx(float(true), rel=1e-6, abs=5 * rounding)
    assert info.converged
    condition = float(torch.linalg.cond(matrix))
    close(x, torch.linalg.solve(matrix, b), rtol=10 * torch.finfo(dtype).eps * condition)


def test_refinement_where_the_low_rank_part_dominates():
    """In the span of the gradients the formula cancels: 3e-10 here without the refinement step."""
    fisher = EmpiricalFisher(30.0 * sampled(4, 10), damping=1e-3)
    b = fisher.rows.sum(0)
    assert Woodbury(rtol=1e-14).prepare(fisher).solve(b).info.converged
    assert ShermanMorrison().prepare(fisher).solve(b).info.residual > 1e-12


class TestMFAC:
    """M-FAC's static recursion (Frantar, Kurtic and Alistarh, 2021) is the same inverse."""

    damping, gradients = 0.05, sampled(6, 9)

    def test_static_recursion(self):
        """``v_i = g_i/l - sum_{j<i} v_j (v_j^T g_i) / q_j`` with ``q_i = m + g_i^T v_i``."""
        m, b = len(self.gradients), sampled(9, seed=1)
        vectors, q = [], []
        for g in self.gradients:
            v = g / self.damping
            for earlier, q_earlier in zip(vectors, q, strict=True):
                v = v - earlier * (earlier @ g) / q_earlier
            vectors.append(v)
            q.append(m + g @ v)
        x = b / self.damping - sum(v * (v @ b) / q_i for v, q_i in zip(vectors, q, strict=True))
        fisher = EmpiricalFisher(self.gradients, self.damping)
        close(ShermanMorrison().prepare(fisher).solve(b).value, x)
        close(Woodbury().prepare(fisher).solve(b).value, x)
        close(torch.linalg.solve(fisher.to_dense(), b), x)

    def test_gram_form(self):
        """``(x - G^T (m l I + G G^T)^-1 G x) / l``."""
        m, b, G = len(self.gradients), sampled(9, seed=1), self.gradients
        gram = m * self.damping * torch.eye(m, dtype=FLOAT64) + G @ G.T
        x = (b - G.T @ torch.linalg.solve(gram, G @ b)) / self.damping
        fisher = EmpiricalFisher(G, self.damping)
        close(Woodbury().prepare(fisher).solve(b).value, x)

    def test_order_of_the_gradients_does_not_matter(self):
        b, permutation = sampled(9, seed=1), torch.tensor([3, 0, 5, 1, 4, 2])
        for solver in (Woodbury(), ShermanMorrison()):
            x, shuffled = (
                solver.prepare(EmpiricalFisher(G, self.damping)).solve(b).value
                for G in (self.gradients, self.gradients[permutation])
            )
            close(shuffled, x, rtol=1e-12)


class TestRefusals:
    @pytest.mark.parametrize("solver", [Woodbury(), ShermanMorrison()])
    def test_other_operators(self, solver):
        name = type(solver).__name__
        with pytest.raises(StructureError, match=rf"{name} needs a LowRankPlusDiagonal.*got Dense"):
            solver.prepare(ops.Dense(torch.eye(2), symmetric=True))

    @pytest.mark.parametrize("solver", [Woodbury(), ShermanMorrison()])
    @pytest.mark.parametrize("d", [0.0, torch.tensor([1.0, 0.0])])
    def test_no_damping(self, solver, d):
        A = LowRankPlusDiagonal(torch.ones(1, 2), d)
        with pytest.raises(SingularError, match=r"has zeros; add damping"):
            solver.prepare(A)

    def test_singular_in_sum(self):
        A = LowRankPlusDiagonal(torch.tensor([[1.0, 0.0]]), 1.0, torch.tensor([-1.0]))
        assert torch.linalg.det(A.to_dense()) == 0
        with pytest.raises(SingularError, match=r"1 x 1 system .* broke down at pivot 1"):
            Woodbury().prepare(A)
        with pytest.raises(SingularError, match=r"update 1 makes .* singular"):
            ShermanMorrison().prepare(A)


class TestInverseRecursion:
    @PROPERTY
    @given(
        d=st.integers(1, 6),
        count=st.integers(0, 20),
        initial=st.floats(0.1, 3.0),
        seed=st.integers(0, 99),
    )
    def test_mean(self, d, count, initial, seed):
        recursion = InverseRecursion(d, initial=initial, dtype=FLOAT64)
        explicit = initial * torch.eye(d, dtype=FLOAT64)
        for t, g in enumerate(sampled(count, d, seed=seed), start=1):
            recursion.update(g)
            explicit = (t * explicit + torch.outer(g, g)) / (t + 1)
            close(recursion.inverse, torch.linalg.inv(explicit))
        b = sampled(d, seed=seed + 1)
        close(recursion.solve(b), torch.linalg.solve(explicit, b))

    @PROPERTY
    @given(
        d=st.integers(1, 6),
        count=st.integers(0, 20),
        rho=st.floats(0.01, 0.2),
        initial=st.floats(0.1, 3.0),
        seed=st.integers(0, 99),
    )
    def test_smoothing(self, d, count, rho, initial, seed):
        recursion = InverseRecursion(d, initial=initial, rho=rho, dtype=FLOAT64)
        explicit = initial * torch.eye(d, dtype=FLOAT64)
        for g in sampled(count, d, seed=seed):
            recursion.update(g)
            explicit = (1 - rho) * explicit + rho * torch.outer(g, g)
            close(recursion.inverse, torch.linalg.inv(explicit))

    @PROPERTY
    @given(
        d=st.integers(1, 8),
        count=st.integers(0, 25),
        rho=st.none() | st.floats(0.01, 0.2),
        initial=st.floats(0.1, 3.0),
        seed=st.integers(0, 99),
    )
    def test_is_the_factored_stream_solved_by_woodbury(self, d, count, rho, initial, seed):
        recursion = InverseRecursion(d, initial=initial, rho=rho, dtype=FLOAT64)
        stream = FisherStream(Space.flat(d, FLOAT64), damping=0.0, initial=initial, rho=rho)
        for g in sampled(count, d, seed=seed):
            recursion.update(g)
            stream.push(g)
        block = sampled(d, 3, seed=seed + 1)
        close(Woodbury().prepare(stream.operator()).solve(block).value, recursion.solve(block))

    @PROPERTY
    @given(
        d=st.integers(1, 8),
        count=st.integers(0, 25),
        rho=st.none() | st.floats(0.01, 0.5),
        damping=st.floats(1e-2, 1.0),
        seed=st.integers(0, 99),
    )
    def test_stream_with_damping_is_the_inverse_of_the_damped_mean(
        self, d, count, rho, damping, seed
    ):
        stream = FisherStream(Space.flat(d, FLOAT64), damping=damping, initial=1.0, rho=rho)
        explicit = torch.eye(d, dtype=FLOAT64)
        for t, g in enumerate(sampled(count, d, seed=seed), start=1):
            stream.push(g)
            share = 1 / (t + 1) if rho is None else rho
            explicit = (1 - share) * explicit + share * torch.outer(g, g)
        damped = explicit + damping * torch.eye(d, dtype=FLOAT64)
        b = sampled(d, seed=seed + 1)
        expected = torch.linalg.solve(damped, b)
        for solver in (Woodbury(), ShermanMorrison()):
            close(solver.prepare(stream.operator()).solve(b).value, expected)

    def run(self, gradients: Tensor, rho: float | None) -> Tensor:
        recursion = InverseRecursion(gradients.shape[1], initial=0.5, rho=rho, dtype=FLOAT64)
        for g in gradients:
            recursion.update(g)
        return recursion.inverse

    def test_order_matters_to_smoothing_only(self):
        gradients, permutation = sampled(6, 4), torch.tensor([3, 0, 5, 1, 4, 2])
        close(self.run(gradients[permutation], None), self.run(gradients, None), rtol=1e-12)
        before, after = self.run(gradients, 0.3), self.run(gradients[permutation], 0.3)
        assert torch.linalg.matrix_norm(after - before) > 0.1 * torch.linalg.matrix_norm(before)

    @pytest.mark.parametrize("rho", [None, 0.02])
    @pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
    def test_symmetric_to_the_last_bit_and_positive_definite(self, rho, dtype):
        recursion = InverseRecursion(33, initial=0.5, rho=rho, dtype=dtype)
        for g in sampled(60, 33).to(dtype):
            recursion.update(g)
            assert torch.equal(recursion.inverse, recursion.inverse.T)
        assert recursion.inverse.dtype == dtype
        assert torch.linalg.eigvalsh(recursion.inverse).min() > 0

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"initial": 0.0}, r"initial=0.0; expected a positive number"),
            ({"initial": float("nan")}, r"initial=nan"),
            ({"initial": 1.0, "rho": 0.0}, r"rho=0.0; expected 0 < rho < 1, or None"),
            ({"initial": 1.0, "rho": 1.0}, r"rho=1.0"),
        ],
    )
    def test_settings_out_of_range(self, settings, message):
        with pytest.raises(ValueError, match=message):
            InverseRecursion(2, **settings)


def definite(n: int, seed: int = 0) -> Tensor:
    root = sampled(n, n, seed=seed)
    return root @ root.T / n + torch.eye(n, dtype=FLOAT64)


class TestUpdatesOfOtherOperators:
    """`Woodbury` of ``B + L^T R``."""

    def check(self, solver: Woodbury, A: ops.LinearOperator, rtol: float = 1e-10) -> None:
        prepared, matrix, block = solver.prepare(A), A.to_dense(), sampled(A.shape[0], 3, seed=9)
        x, info = prepared.solve(block)
        close(x, torch.linalg.solve(matrix, block), rtol)
        assert info.converged
        close(prepared.solve_transpose(block).value, torch.linalg.solve(matrix.T, block), rtol)

    @PROPERTY
    @given(st.integers(1, 8), st.integers(0, 6), st.floats(0.5, 3.0), st.integers(0, 99))
    def test_low_rank_update(self, n, count, scale, seed):
        left, right = sampled(count, n, seed=seed), sampled(count, n, seed=seed + 1)
        A = ops.LowRankUpdate(left, right, scale)
        assume(float(torch.linalg.cond(A.to_dense())) < 1e4)
        self.check(Woodbury(), A)
        self.check(Woodbury(), -2.0 * A)

    def test_broyden(self):
        """A quasi-Newton matrix, which is not symmetric."""
        A = ops.LowRankUpdate(0.3 * sampled(4, 50), 0.3 * sampled(4, 50, seed=1), 1.5)
        self.check(Woodbury(), A)

    @pytest.mark.parametrize("swapped", [False, True])
    @pytest.mark.parametrize("d", [0.0, 0.7, torch.linspace(1, 2, 6, dtype=FLOAT64)])
    def test_a_definite_base(self, d, swapped):
        B = ops.Dense(definite(6), positive_definite=True)
        low = LowRankPlusDiagonal(sampled(2, 6), d)
        A = low + B if swapped else B + low
        self.check(Woodbury(), A)
        assert Woodbury().prepare(A).definite

    def test_any_base_and_any_weights(self):
        weights = torch.tensor([1.0, -0.5], dtype=FLOAT64)
        low = LowRankPlusDiagonal(0.5 * sampled(2, 6), 0.0, weights)
        general = ops.Dense(2 * torch.eye(6, dtype=FLOAT64) + 0.3 * sampled(6, 6, seed=1))
        self.check(Woodbury(), general + low)
        self.check(Woodbury(), general + ops.LowRankUpdate(0.3 * sampled(2, 6), sampled(2, 6), 1.0))
        # A multiple of I further out belongs to the base, too.
        nested = (general + low) + 0.5 * ops.Identity(6)
        self.check(Woodbury(), nested)

    def test_the_solver_of_the_base(self):
        d = torch.linspace(1, 2, 40, dtype=FLOAT64)
        B = ops.Kronecker(ops.Dense(definite(5), positive_definite=True), ops.Diagonal(d[:8]))
        A = B + LowRankPlusDiagonal(sampled(3, 40), 0.0)
        prepared = Woodbury(base_solver=DenseCholesky()).prepare(A)
        assert prepared.part.prepared.solver == DenseCholesky()
        self.check(Woodbury(base_solver=DenseCholesky()), A)
        # An iteration for the base: refined to more than its own tolerance.
        info = Woodbury(rtol=1e-9, base_solver=CG()).prepare(A).solve(sampled(40)).info
        assert info.converged
        assert info.iterations > 0

    def test_refusals(self):
        singular = ops.Dense(torch.zeros(2, 2, dtype=FLOAT64), symmetric=True)
        low = LowRankPlusDiagonal(torch.ones(1, 2, dtype=FLOAT64), 0.0)
        with pytest.raises(SingularError):
            Woodbury(base_solver=DenseLU()).prepare(singular + low)
        with pytest.raises(SingularError, match="has zeros; add damping"):
            Woodbury().prepare(ops.LowRankUpdate(torch.ones(1, 2), torch.ones(1, 2), 0.0))
        with pytest.raises(StructureError, match="or a sum with one; got"):
            Woodbury().prepare(singular + singular)
        with pytest.raises(SingularError, match="1 x 1 system"):
            Woodbury().prepare(
                ops.Dense(torch.eye(2))
                + LowRankPlusDiagonal(torch.tensor([[1.0, 0.0]]), 0.0, torch.tensor([-1.0]))
            )
