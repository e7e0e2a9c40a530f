"""`Broyden` and `LBFGS` against their dense recursions, the secant equation, and known traps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from operators.algebra import Sum
from operators.curvature.lbfgs_inverse import LBFGSInverse
from operators.curvature.quasi_newton import LBFGS, Broyden, BroydenInverse
from operators.elementary import Diagonal, Identity
from operators.low_rank import LowRankPlusDiagonal
from operators.low_rank_update import LowRankUpdate
from operators.space import Space
from solvers import Woodbury

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
FLOAT64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=FLOAT64)


def flat(n: int) -> Space:
    return Space.flat(n, FLOAT64)


def definite(n: int, condition: float, seed: int = 0) -> Tensor:
    basis = torch.linalg.qr(normal(n, n, seed=seed)).Q
    matrix = (basis * torch.logspace(0, math.log10(condition), n, dtype=FLOAT64)) @ basis.T
    return (matrix + matrix.T) / 2


def pairs(n: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Steps and differences of a quadratic with positive curvature."""
    steps = normal(m, n, seed=seed)
    return steps, steps @ definite(n, 10.0, seed + 1)


def solve_by_broyden(matrix: Tensor, b: Tensor, steps: int, scale: float) -> list[float]:
    """Residual norms of ``x <- x - H (A x - b)``."""
    n = len(b)
    estimate = Broyden(flat(n), memory=steps, scale=scale)
    x = torch.zeros_like(b)
    residual = matrix @ x - b
    norms = [float(residual.norm())]
    for _ in range(steps):
        step = -(estimate.inverse() @ residual)
        x = x + step
        fresh = matrix @ x - b
        norms.append(float(fresh.norm()))
        if norms[-1] < 1e-10 * norms[0]:
            break
        estimate.update(step, fresh - residual)
        residual = fresh
    return norms


class TestLowRankUpdate:
    def test_sums_are_of_the_form_again(self):
        A = LowRankUpdate(normal(2, 5), normal(2, 5, seed=1), 1.5)
        B = BroydenInverse(normal(1, 5, seed=2), normal(1, 5, seed=3), 0.5)
        M, N = A.to_dense(), B.to_dense()
        for total, matrix in (
            (A + 0.3 * Identity(5), M + 0.3 * eye(5)),
            (0.3 * Identity(5) + A, M + 0.3 * eye(5)),
            (A + torch.tensor(0.3, dtype=FLOAT64) * Identity(5), M + 0.3 * eye(5)),
            (A + B, M + N),
            (B - A, N - M),
        ):
            assert type(total) is LowRankUpdate
            close(total.to_dense(), matrix)
            close(total.inverse().to_dense(), torch.linalg.inv(matrix))
        assert type(A + Diagonal(normal(5))) is Sum

    @PROPERTY
    @given(n=st.integers(1, 7), count=st.integers(0, 9), seed=st.integers(0, 99))
    def test_is_its_matrix(self, n, count, seed):
        left, right = normal(count, n, seed=seed), normal(count, n, seed=seed + 1)
        A = LowRankUpdate(left, right, 1.5)
        matrix = 1.5 * eye(n) + left.T @ right
        v = normal(n)
        close(A.to_dense(), matrix)
        close(A @ v, matrix @ v)
        close(A.T @ v, matrix.T @ v)
        close((-2.0 * A).to_dense(), -2.0 * matrix)
        close(A._exact_diagonal(), matrix.diagonal())
        close(A._exact_trace(), matrix.trace())
        if torch.linalg.cond(matrix) < 1e6:
            close(A.inverse().to_dense() @ matrix, eye(n), 1e-7)
            close(A._exact_logdet(), torch.linalg.slogdet(matrix).logabsdet, 1e-7)

    def test_differentiable_and_mapped(self):
        A = LowRankUpdate(normal(2, 4), normal(2, 4, seed=1), 0.7)
        v = normal(4)

        def values(*tensors: Tensor) -> tuple[Tensor, ...]:
            B = A.with_tensors(tensors)
            return B @ v, B.T @ v, B.inverse() @ v, B._exact_logdet()

        tensors = tuple(tensor.clone().requires_grad_() for tensor in A.tensors)
        assert torch.autograd.gradcheck(values, tensors)
        assert torch.autograd.gradgradcheck(values, tensors)
        lefts = normal(3, 2, 4, seed=2)
        mapped = torch.func.vmap(lambda u: LowRankUpdate(u, A.right, 0.7).inverse() @ v)(lefts)
        for left, row in zip(lefts, mapped, strict=True):
            close(row, torch.linalg.solve(0.7 * eye(4) + left.T @ A.right, v))

    def test_refusals(self):
        u = normal(1, 3)
        with pytest.raises(ValueError, match=r"expected \(T, n\) twice"):
            LowRankUpdate(u, normal(2, 3), 1.0)
        with pytest.raises(ValueError, match="space size 4"):
            LowRankUpdate(u, u, 1.0, space=flat(4))
        with pytest.raises(ValueError, match=r"scale has shape \(3,\)"):
            LowRankUpdate(u, u, torch.ones(3))
        with pytest.raises(TypeError, match="right has dtype"):
            LowRankUpdate(u, u.float(), 1.0)
        unit = torch.tensor([[1.0, 0.0]], dtype=FLOAT64)
        for singular in (LowRankUpdate(unit, -unit, 1.0), LowRankUpdate(unit, unit, 0.0)):
            with pytest.raises(ValueError, match="singular"):
                singular.inverse()


class TestBroyden:
    @PROPERTY
    @given(
        n=st.integers(2, 8), m=st.integers(1, 8), scale=st.floats(0.1, 3.0), seed=st.integers(0, 99)
    )
    def test_is_the_dense_recursion_for_operator_and_inverse(self, n, m, scale, seed):
        """B by ``B + (y - B s) s^T / s^T s`` (Broyden 1965), H by Sherman and Morrison."""
        jacobian = definite(n, 5.0, seed) + 0.2 * normal(n, n, seed=seed)
        estimate = Broyden(flat(n), memory=m, scale=scale)
        B = eye(n) / scale
        for s in normal(m, n, seed=seed + 1):
            y = jacobian @ s
            if estimate.update(s, y):
                B = B + torch.outer(y - B @ s, s) / (s @ s)
                if torch.linalg.cond(B) > 1e5:
                    return
                close(estimate.inverse() @ y, s, 1e-7)
        close(estimate.operator().to_dense(), B, 1e-6)
        close(estimate.inverse().to_dense() @ B, eye(n), 1e-6)

    @PROPERTY
    @given(memory=st.integers(1, 4), updates=st.integers(1, 12), seed=st.integers(0, 99))
    def test_newest_secant_equation_is_exact_in_limited_memory(self, memory, updates, seed):
        """The oldest term is dropped before the newest is computed, not after."""
        steps, differences = pairs(6, updates, seed)
        estimate = Broyden(flat(6), memory=memory)
        for s, y in zip(steps, differences, strict=True):
            if estimate.update(s, y):
                close(estimate.inverse() @ y, s, 1e-7)
                close(estimate.operator() @ s, y, 1e-6)
            assert len(estimate) <= memory

    def test_the_oldest_is_what_is_dropped(self):
        """Two terms: the newest is computed from the one before it alone."""
        steps, differences = pairs(6, 3)
        estimate = Broyden(flat(6), memory=2)
        H = eye(6)
        terms: list[Tensor] = []
        for s, y in zip(steps, differences, strict=True):
            H = eye(6) + sum(terms[-1:], torch.zeros(6, 6, dtype=FLOAT64))
            terms.append(torch.outer(s - H @ y, H.T @ s) / (s @ H @ y))
            assert estimate.update(s, y)
        close(estimate.inverse().to_dense(), eye(6) + terms[-2] + terms[-1])

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_ends_within_twice_the_dimension_on_linear_systems(self, symmetric):
        for n in range(1, 7):
            for seed in range(4):
                matrix = definite(n, 10.0, seed)
                if not symmetric:
                    matrix = matrix + 0.3 * normal(n, n, seed=seed)
                norms = solve_by_broyden(matrix, normal(n, seed=seed + 9), 2 * n, scale=0.2)
                assert norms[-1] < 1e-8 * norms[0]

    def test_indefinite_systems_are_solved_too(self):
        matrix = torch.diag(torch.tensor([2.0, 1.0, -1.0, -3.0], dtype=FLOAT64))
        norms = solve_by_broyden(matrix, torch.ones(4, dtype=FLOAT64), 8, scale=1.0)
        assert norms[-1] < 1e-8 * norms[0]

    def test_initial_sign(self):
        """The sign of root-finding codes makes the first residual grow on a definite matrix."""
        matrix, b = definite(40, 3.0), normal(40)
        right = solve_by_broyden(matrix, b, 32, scale=0.5)
        wrong = solve_by_broyden(matrix, b, 32, scale=-0.5)
        assert right[1] < right[0] < wrong[1]
        assert right[-1] < wrong[-1]

    def test_first_update_is_not_lost(self):
        s, y = pairs(4, 1)
        for memory in (1, 2):
            estimate = Broyden(flat(4), memory=memory)
            assert estimate.update(s[0], y[0])
            assert len(estimate) == 1
            close(estimate.inverse() @ y[0], s[0])

    def test_breakdown_is_refused_and_counted(self):
        estimate = Broyden(flat(3), memory=3)
        s = torch.tensor([1.0, 0.0, 0.0], dtype=FLOAT64)
        for y in ([0.0, 1.0, 0.0], [1e-9, 1.0, 0.0], [0.0, 0.0, 0.0]):
            assert not estimate.update(s, torch.tensor(y, dtype=FLOAT64))
        assert not estimate.update(torch.zeros_like(s), s)
        assert (estimate.skipped, len(estimate)) == (4, 0)
        close(estimate.inverse().to_dense(), eye(3))

    def test_refused_pair_drops_nothing_from_a_full_memory(self):
        steps, differences = pairs(4, 2)
        estimate = Broyden(flat(4), memory=2)
        for s, y in zip(steps, differences, strict=True):
            estimate.update(s, y)
        before = estimate.inverse().to_dense()
        assert not estimate.update(steps[0], torch.zeros(4, dtype=FLOAT64))
        assert torch.equal(estimate.inverse().to_dense(), before)

    def test_reset(self):
        steps, differences = pairs(4, 2)
        estimate = Broyden(flat(4), memory=2, scale=2.0)
        estimate.update(steps[0], differences[0])
        estimate.reset()
        close(estimate.inverse().to_dense(), 2.0 * eye(4))


def bfgs_inverse(steps: Tensor, differences: Tensor, scale: float | Tensor) -> Tensor:
    """Dense recursion of the BFGS inverse."""
    n = steps.shape[1]
    H = scale * eye(n)
    for s, y in zip(steps, differences, strict=True):
        V = eye(n) - torch.outer(s, y) / (s @ y)
        H = V @ H @ V.T + torch.outer(s, s) / (s @ y)
    return H


def compact_inverse(steps: Tensor, differences: Tensor, scale: float) -> Tensor:
    """Compact representation (Byrd, Nocedal and Schnabel, 1994, theorem 2.2)."""
    S, Y = steps.T, differences.T
    products = S.T @ Y
    R, D = products.triu(), torch.diag(products.diagonal())
    inverse = torch.linalg.inv(R)
    corner = inverse.T @ (D + scale * Y.T @ Y) @ inverse
    middle = torch.cat(
        [torch.cat([corner, -inverse.T], 1), torch.cat([-inverse, torch.zeros_like(D)], 1)]
    )
    outer = torch.cat([S, scale * Y], 1)
    return scale * eye(len(S)) + outer @ middle @ outer.T


class TestLBFGSInverse:
    @PROPERTY
    @given(
        n=st.integers(1, 8), m=st.integers(0, 6), scale=st.floats(0.1, 5.0), seed=st.integers(0, 99)
    )
    def test_two_loops_are_the_dense_recursion_and_the_compact_form(self, n, m, scale, seed):
        steps, differences = pairs(n, m, seed)
        H = LBFGSInverse(steps, differences, scale)
        matrix = bfgs_inverse(steps, differences, scale)
        tolerance = 1e-9 * float(torch.linalg.matrix_norm(matrix, 2))
        torch.testing.assert_close(H.to_dense(), matrix, rtol=0, atol=tolerance)
        v = normal(n)
        torch.testing.assert_close(H @ v, matrix @ v, rtol=0, atol=10 * tolerance)
        if 0 < m <= n:
            compact = compact_inverse(steps, differences, scale)
            torch.testing.assert_close(compact, matrix, rtol=0, atol=1e3 * tolerance)
        assert H.positive_definite
        assert torch.linalg.eigvalsh(matrix).min() > 0

    def test_differentiable_and_mapped(self):
        steps, differences = pairs(4, 3)
        H = LBFGSInverse(steps, differences, 0.8)
        v = normal(4)
        tensors = tuple(tensor.clone().requires_grad_() for tensor in H.tensors)

        def product(*tensors: Tensor) -> Tensor:
            return H.with_tensors(tensors) @ v

        assert torch.autograd.gradcheck(product, tensors)
        assert torch.autograd.gradgradcheck(product, tensors)
        batch = [pairs(4, 3, seed) for seed in range(3)]
        S, Y = (torch.stack(parts) for parts in zip(*batch, strict=True))
        mapped = torch.func.vmap(lambda s, y: LBFGSInverse(s, y, 0.8) @ v)(S, Y)
        for (s, y), row in zip(batch, mapped, strict=True):
            close(row, bfgs_inverse(s, y, 0.8) @ v)
        block = normal(5, 4)
        close(torch.func.vmap(lambda x: H @ x)(block), block @ H.to_dense())

    def test_refusals(self):
        steps, differences = pairs(3, 2)
        with pytest.raises(ValueError, match="expected all > 0"):
            LBFGSInverse(steps, -differences, 1.0)
        with pytest.raises(ValueError, match=r"scale=0\.0"):
            LBFGSInverse(steps, differences, 0.0)
        with pytest.raises(ValueError, match=r"expected \(m, n\) twice"):
            LBFGSInverse(steps, differences[:1], 1.0)
        with pytest.raises(ValueError, match="space size 4"):
            LBFGSInverse(steps, differences, 1.0, space=flat(4))
        with pytest.raises(TypeError, match="differences has dtype"):
            LBFGSInverse(steps, differences.float(), 1.0)


class TestLBFGS:
    @PROPERTY
    @given(
        n=st.integers(1, 8),
        memory=st.integers(1, 5),
        updates=st.integers(1, 9),
        scale=st.none() | st.floats(0.1, 3.0),
        seed=st.integers(0, 99),
    )
    def test_keeps_the_last_pairs_and_both_secant_equations(self, n, memory, updates, scale, seed):
        steps, differences = pairs(n, updates, seed)
        estimate = LBFGS(flat(n), memory=memory, scale=scale)
        for s, y in zip(steps, differences, strict=True):
            assert estimate.update(s, y)
        s, y = steps[-1], differences[-1]
        H, B = estimate.inverse(), estimate.operator()
        initial = (s @ y) / (y @ y) if scale is None else scale
        expected = bfgs_inverse(steps[-memory:], differences[-memory:], initial)
        norm = float(torch.linalg.matrix_norm(expected, 2))
        torch.testing.assert_close(H.to_dense(), expected, rtol=0, atol=1e-9 * norm)
        torch.testing.assert_close(H @ y, s, rtol=0, atol=1e-8 * norm)
        close(B.to_dense() @ expected, eye(n), 1e-6 * max(1.0, norm))
        close(B @ s, y, 1e-7)
        assert isinstance(B, LowRankPlusDiagonal)
        assert H.positive_definite
        assert B.positive_definite

    def test_woodbury_solves_with_the_direct_operator(self):
        steps, differences = pairs(12, 4)
        estimate = LBFGS(flat(12), memory=4)
        for s, y in zip(steps, differences, strict=True):
            estimate.update(s, y)
        b = normal(12)
        close(Woodbury().prepare(estimate.operator()).solve(b).value, estimate.inverse() @ b)

    def test_exact_line_search_on_a_quadratic_ends_after_n_steps(self):
        """Then BFGS is conjugate gradients, and H the inverse Hessian (full memory)."""
        n = 6
        matrix, b = definite(n, 50.0), normal(n)
        estimate = LBFGS(flat(n), memory=n, scale=1.0)
        x = torch.zeros(n, dtype=FLOAT64)
        gradient = matrix @ x - b
        for _ in range(n):
            direction = -(estimate.inverse() @ gradient)
            step = -(gradient @ direction) / (direction @ matrix @ direction) * direction
            x = x + step
            fresh = matrix @ x - b
            assert estimate.update(step, fresh - gradient)
            gradient = fresh
        close(x, torch.linalg.solve(matrix, b), 1e-8)
        close(estimate.inverse().to_dense(), torch.linalg.inv(matrix), 1e-6)

    def test_skipping_is_counted_and_changes_nothing(self):
        steps, differences = pairs(4, 2)
        estimate = LBFGS(flat(4))
        assert estimate.update(steps[0], differences[0])
        before = estimate.inverse().to_dense()
        perpendicular = normal(4) - (normal(4) @ steps[1]) / (steps[1] @ steps[1]) * steps[1]
        for y in (-differences[1], perpendicular, torch.zeros(4, dtype=FLOAT64)):
            assert not estimate.update(steps[1], y)
        assert (estimate.skipped, estimate.damped, len(estimate)) == (3, 0, 1)
        assert torch.equal(estimate.inverse().to_dense(), before)

    @PROPERTY
    @given(n=st.integers(2, 7), updates=st.integers(1, 10), seed=st.integers(0, 99))
    def test_damping_takes_every_pair_and_stays_definite(self, n, updates, seed):
        """The pair taken in has ``s^T y' >= 0.2 s^T B s``, and equality where it was damped."""
        hessian = normal(n, n, seed=seed)
        hessian = hessian + hessian.T  # indefinite
        estimate = LBFGS(flat(n), memory=4, scale=1.0, curvature="damp")
        damped = 0
        for s in normal(updates, n, seed=seed + 1):
            y, B = hessian @ s, estimate.operator().to_dense()
            assert estimate.update(s, y)
            curvature = s @ (estimate.operator().to_dense() @ s)
            least = 0.2 * (s @ B @ s)
            if s @ y < least:
                damped += 1
                theta = 0.8 * (s @ B @ s) / (s @ B @ s - s @ y)
                torch.testing.assert_close(curvature, least, rtol=1e-5, atol=0)
                moved = theta * y + (1 - theta) * (B @ s)
                scale = 1e-6 * float(moved.norm())
                image = estimate.operator().to_dense() @ s
                torch.testing.assert_close(image, moved, rtol=0, atol=scale)
            else:
                torch.testing.assert_close(curvature, s @ y, rtol=1e-5, atol=0)
        assert (estimate.damped, estimate.skipped) == (damped, 0)
        assert torch.linalg.eigvalsh(estimate.inverse().to_dense()).min() > 0

    def test_nested_pairs_and_copies(self):
        tree = {"w": torch.ones(2, 2, dtype=FLOAT64), "b": torch.ones(1, dtype=FLOAT64)}
        space = Space.of(tree)
        for estimate in (LBFGS(space), Broyden(space, memory=3)):
            y = {name: 2.0 * leaf for name, leaf in tree.items()}
            assert estimate.update(tree, y)
            assert estimate.update(torch.arange(5.0, dtype=FLOAT64), normal(5).abs())
            product = estimate.inverse() @ y
            assert product.keys() == tree.keys()
            operator = estimate.operator()
            close(space.ravel(operator @ product), space.ravel(y))
            before = operator.to_dense().clone()
            estimate.update(normal(5, seed=3), normal(5, seed=3))
            assert torch.equal(operator.to_dense(), before)

    def test_keeps_copies_without_a_graph(self):
        steps, differences = pairs(3, 1)
        expected = bfgs_inverse(steps, differences, 1.0)
        estimate = LBFGS(flat(3), scale=1.0)
        s, y = steps[0].clone().requires_grad_(), differences[0].clone()
        estimate.update(s, y)
        y.zero_()
        close(estimate.inverse().to_dense(), expected)
        assert not estimate.inverse().steps.requires_grad

    def test_no_pair_yet(self):
        close(LBFGS(flat(3)).inverse().to_dense(), eye(3))
        close(LBFGS(flat(3), scale=0.5).operator().to_dense(), 2.0 * eye(3))

    def test_float32(self):
        steps, differences = (part.float() for part in pairs(8, 4))
        for estimate in (
            LBFGS(Space.flat(8, torch.float32)),
            Broyden(Space.flat(8, torch.float32), memory=4),
        ):
            for s, y in zip(steps, differences, strict=True):
                assert estimate.update(s, y)
            image = estimate.inverse() @ differences[-1]
            assert image.dtype == torch.float32
            assert (image - steps[-1]).norm() < 1e-4 * steps[-1].norm()

    def test_reset(self):
        steps, differences = pairs(3, 1)
        estimate = LBFGS(flat(3))
        estimate.update(steps[0], differences[0])
        estimate.update(steps[0], -differences[0])
        estimate.reset()
        assert (len(estimate), estimate.skipped) == (0, 0)


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Broyden(flat(3), memory=0), "memory=0"),
            (lambda: Broyden(flat(3), memory=2, scale=0.0), "scale=0.0"),
            (lambda: Broyden(flat(3), memory=2, scale=float("nan")), "scale=nan"),
            (lambda: Broyden(flat(3), memory=2, threshold=-1.0), "threshold=-1.0"),
            (lambda: LBFGS(flat(3), memory=0), "memory=0"),
            (lambda: LBFGS(flat(3), scale=-1.0), "scale=-1.0"),
            (lambda: LBFGS(flat(3), threshold=1.0), "threshold=1.0"),
            (lambda: LBFGS(flat(3), curvature="ignore"), "curvature='ignore'"),
        ],
    )
    def test_settings(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    @pytest.mark.parametrize("estimate", [LBFGS(flat(3)), Broyden(flat(3), memory=2)])
    def test_pairs(self, estimate):
        v = normal(3)
        with pytest.raises(ValueError, match="step has structure"):
            estimate.update(normal(4), v)
        with pytest.raises(ValueError, match="difference has structure"):
            estimate.update(v, normal(4))
        with pytest.raises(TypeError, match="step has dtype"):
            estimate.update(v.float(), v)
        for bad in (torch.nan, torch.inf):
            with pytest.raises(ValueError, match="difference is not finite"):
                estimate.update(v, v * bad)
        assert (len(estimate), estimate.skipped) == (0, 0)
