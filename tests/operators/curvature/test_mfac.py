"""`MFAC` against the recursions of its paper, dense inverses, and a stream rebuilt from nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from operators import FisherStream
from operators.curvature.mfac import MFAC, MFACInverse
from operators.space import Space
from solvers import Woodbury

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
FLOAT64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def window_of(gradients: Tensor, window: int | None = None, **settings) -> MFAC:
    space = Space.flat(gradients.shape[1], gradients.dtype)
    settings = {"damping": 0.1, **settings}
    estimate = MFAC(space, window=window or len(gradients), **settings)
    for gradient in gradients:
        estimate.push(gradient)
    return estimate


def explicit(gradients: Tensor, damping: float, divisor: float | None = None) -> Tensor:
    total = sum(torch.outer(g, g) for g in gradients)
    return damping * torch.eye(gradients.shape[1], dtype=FLOAT64) + total / (
        divisor or len(gradients)
    )


def static_vectors(gradients: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``v_i = F_{i-1}^-1 g_i`` and ``q_i = m + g_i^T v_i``, by the recursion for pruning."""
    m = len(gradients)
    vectors, scales = [], []
    for g in gradients:
        v = g / damping
        for earlier, q in zip(vectors, scales, strict=True):
            v = v - earlier * (earlier @ g) / q
        vectors.append(v)
        scales.append(m + g @ v)
    return torch.stack(vectors), torch.stack(scales)


def static_product(gradients: Tensor, damping: float, x: Tensor) -> Tensor:
    vectors, scales = static_vectors(gradients, damping)
    return x / damping - vectors.T @ ((vectors @ x) / scales)


def static_diagonal(gradients: Tensor, damping: float) -> Tensor:
    vectors, scales = static_vectors(gradients, damping)
    return 1 / damping - (vectors.square() / scales[:, None]).sum(0)


def dynamic_coefficients(gradients: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """D and B of the sliding-window form, from ``S = G G^T / damping`` alone.

    ``D_ij = g_i^T F_{i-1}^-1 g_j`` for i <= j, by eliminating row after row of S (the unpivoted LU
    factorisation of ``S + m I``); B holds ``F_{i-1}^-1 g_i`` in the basis of the rows of G.
    """
    m = len(gradients)
    remaining = gradients @ gradients.T / damping
    D = torch.zeros(m, m, dtype=FLOAT64)
    for i in range(m):
        D[i, i:] = remaining[i, i:]
        update = torch.outer(remaining[:, i], remaining[i]) / (m + remaining[i, i])
        remaining = remaining - update
    B = torch.eye(m, dtype=FLOAT64) / damping
    for i in range(m):
        for j in range(i):
            B[i] = B[i] - D[j, i] / (m + D[j, j]) * torch.where(torch.arange(m) <= j, B[j], 0.0)
    return D, B


def dynamic_product(gradients: Tensor, damping: float, x: Tensor) -> Tensor:
    m = len(gradients)
    D, B = dynamic_coefficients(gradients, damping)
    p = gradients @ x / damping
    q = p.clone()
    for i in range(m):
        for k in range(i):
            q[i] = q[i] - q[k] * D[k, i] / (m + D[k, k])
    return x / damping - gradients.T @ (B.T @ (q / (m + D.diagonal())))


class TestForms:
    @PROPERTY
    @given(
        m=st.integers(1, 12),
        d=st.integers(1, 15),
        damping=st.floats(1e-3, 10.0),
        seed=st.integers(0, 99),
    )
    def test_static_dynamic_gram_and_dense_agree(self, m, d, damping, seed):
        gradients = normal(m, d, seed=seed)
        x = normal(d, seed=seed + 1)
        expected = damping * torch.linalg.solve(explicit(gradients, damping), x)
        close(damping * static_product(gradients, damping, x), expected)
        close(damping * dynamic_product(gradients, damping, x), expected)
        estimate = window_of(gradients, damping=damping)
        close(damping * estimate.solve(x), expected)
        close(damping * (estimate.inverse() @ x), expected)
        close(damping * (MFACInverse(gradients, damping) @ x), expected)

    @PROPERTY
    @given(m=st.integers(1, 8), d=st.integers(1, 10), seed=st.integers(0, 99))
    def test_diagonal_trace_and_determinant(self, m, d, seed):
        gradients = normal(m, d, seed=seed)
        inverse = window_of(gradients, window=m + 2, damping=0.3, mean_over="window").inverse()
        dense = torch.linalg.inv(explicit(gradients, 0.3, m + 2))
        close(inverse.to_dense(), dense)
        close(inverse._exact_diagonal(), dense.diagonal())
        close(inverse._exact_trace(), dense.trace())
        close(inverse._exact_logdet(), torch.linalg.slogdet(dense).logabsdet)

    def test_diagonal_is_that_of_the_static_form(self):
        gradients = normal(7, 20)
        close(MFACInverse(gradients, 0.2)._exact_diagonal(), static_diagonal(gradients, 0.2))

    def test_operator_is_the_inverse_of_the_inverse(self):
        estimate = window_of(normal(5, 9))
        operator, inverse = estimate.operator(), estimate.inverse()
        close(operator.to_dense() @ inverse.to_dense(), torch.eye(9, dtype=FLOAT64))
        close(operator.damping, torch.tensor(0.1, dtype=FLOAT64))
        b = normal(9)
        close(Woodbury().prepare(operator).solve(b).value, estimate.solve(b))
        assert operator.positive_definite
        assert inverse.positive_definite

    @PROPERTY
    @given(st.permutations(range(6)))
    def test_order_of_the_rows_does_not_matter(self, order):
        gradients = normal(6, 9)
        x = normal(9)
        close(window_of(gradients[list(order)]).solve(x), window_of(gradients).solve(x))


class TestWindow:
    @PROPERTY
    @given(
        window=st.integers(1, 5),
        pushes=st.integers(1, 14),
        mean_over=st.sampled_from(["rows", "window"]),
        seed=st.integers(0, 99),
    )
    def test_replacing_the_oldest_is_rebuilding(self, window, pushes, mean_over, seed):
        gradients = normal(pushes, 7, seed=seed)
        estimate = window_of(gradients, window=window, mean_over=mean_over)
        last = gradients[-window:]
        assert len(estimate) == len(last)
        divisor = window if mean_over == "window" else len(last)
        matrix = explicit(last, 0.1, divisor)
        close(estimate.operator().to_dense(), matrix)
        x = normal(7, seed=seed + 1)
        close(estimate.solve(x), torch.linalg.solve(matrix, x))
        if mean_over == "rows":
            close(estimate.solve(x), window_of(last).solve(x))

    def test_solving_between_pushes_uses_what_is_there_then(self):
        gradients = normal(9, 6)
        x = normal(6)
        estimate = MFAC(Space.flat(6, FLOAT64), window=3, damping=0.1)
        for t, gradient in enumerate(gradients, start=1):
            estimate.push(gradient)
            expected = torch.linalg.solve(explicit(gradients[max(0, t - 3) : t], 0.1), x)
            close(estimate.solve(x), expected)
            close(estimate.solve(x), expected)

    def test_is_the_stream_with_a_window(self):
        gradients = normal(8, 5)
        stream = FisherStream(Space.flat(5, FLOAT64), damping=0.1, window=3)
        for gradient in gradients:
            stream.push(gradient)
        ours = window_of(gradients, window=3).operator()
        close(ours.to_dense(), stream.operator().to_dense())

    def test_cold_start(self):
        """Dividing by the window before it is full makes F too small, F^-1 too large."""
        gradients = normal(2, 6)
        honest = window_of(gradients, window=64).operator().to_dense()
        published = window_of(gradients, window=64, mean_over="window").operator().to_dense()
        eye = torch.eye(6, dtype=FLOAT64)
        close(published - 0.1 * eye, (honest - 0.1 * eye) / 32)

    def test_batch_factor(self):
        """``E[gbar gbar^T] = F / B`` for a mean of B scores; the row makes up for it."""
        batch, d, window = 16, 4, 1000
        root = normal(d, d)
        fisher = root @ root.T
        scores = normal(window, batch, d, seed=1) @ root.T
        means = scores.mean(1)
        ratio = {}
        for size in (1, batch):
            estimate = MFAC(Space.flat(d, FLOAT64), window=window, damping=1e-9)
            for mean in means:
                estimate.push(mean, batch_size=size)
            ratio[size] = float(estimate.operator().to_dense().trace() / fisher.trace())
        assert abs(ratio[1] * batch - 1) < 0.1
        assert abs(ratio[batch] - 1) < 0.1

    def test_a_gradient_shrinks_itself(self):
        """Pushed before it is solved with, g is scaled by ``1 / (1 + g^T F^-1 g / m)``."""
        gradients = normal(5, 8)
        g = gradients[-1]
        before = torch.linalg.solve(explicit(gradients[:-1], 0.1, 5), g)
        after = window_of(gradients).solve(g)
        close(after, before / (1 + g @ before / 5))

    def test_operators_stay_what_they_were(self):
        gradients = normal(4, 5)
        estimate = window_of(gradients[:3])
        operator, inverse = estimate.operator(), estimate.inverse()
        matrices = operator.to_dense().clone(), inverse.to_dense().clone()
        estimate.push(gradients[3])
        assert torch.equal(operator.to_dense(), matrices[0])
        assert torch.equal(inverse.to_dense(), matrices[1])

    def test_keeps_a_copy_without_a_graph(self):
        estimate = MFAC(Space.flat(2, FLOAT64), window=2, damping=1.0)
        gradient = torch.tensor([3.0, 0.0], dtype=FLOAT64, requires_grad=True)
        estimate.push(gradient)
        with torch.no_grad():
            gradient.zero_()
        x = torch.tensor([10.0, 1.0], dtype=FLOAT64)
        close(estimate.solve(x), torch.tensor([1.0, 1.0], dtype=FLOAT64))
        assert not estimate.operator().rows.requires_grad

    def test_nested_gradients(self):
        tree = {"w": torch.ones(2, 2, dtype=FLOAT64), "b": torch.zeros(2, dtype=FLOAT64)}
        space = Space.of(tree)
        estimate = MFAC(space, window=3, damping=1.0)
        estimate.push(tree)
        estimate.push(torch.arange(6.0, dtype=FLOAT64))
        solution = estimate.solve(tree)
        close(space.ravel(estimate.operator() @ solution), space.ravel(tree))

    def test_reset(self):
        estimate = window_of(normal(4, 5))
        estimate.reset()
        assert len(estimate) == 0
        gradients = normal(2, 5, seed=1)
        for gradient in gradients:
            estimate.push(gradient)
        close(estimate.operator().to_dense(), explicit(gradients, 0.1))


class TestInverse:
    def test_float32_at_the_published_damping(self):
        """1e-5 in float32: relative to ``|x| / l`` the error is of the order of rounding."""
        gradients, x = normal(64, 500), normal(500, seed=1)
        expected = static_product(gradients, 1e-5, x)
        inverse = MFACInverse(gradients.float(), 1e-5)
        assert inverse.dtype == torch.float32
        error = (inverse @ x.float()).double() - expected
        assert error.norm() < 1e-5 * x.norm() / 1e-5
        assert error.norm() < 1e-4 * expected.norm()

    def test_differentiable_in_rows_and_damping(self):
        inverse = MFACInverse(normal(3, 4), 0.5)
        v = normal(4)

        def product(rows: Tensor, damping: Tensor) -> Tensor:
            return inverse.with_tensors((rows, damping)) @ v

        def facts(rows: Tensor, damping: Tensor) -> tuple[Tensor, ...]:
            A = inverse.with_tensors((rows, damping))
            return A._exact_diagonal(), A._exact_trace(), A._exact_logdet()

        tensors = tuple(tensor.clone().requires_grad_() for tensor in inverse.tensors)
        assert torch.autograd.gradcheck(product, tensors)
        assert torch.autograd.gradgradcheck(product, tensors)
        assert torch.autograd.gradcheck(facts, tensors)

    def test_graph_through_the_constructor_serves_every_backward_pass(self):
        rows = normal(3, 4).requires_grad_()
        v = normal(4)
        inverse = MFACInverse(rows, 0.5)
        gradients = []
        for _ in range(2):
            (gradient,) = torch.autograd.grad((inverse @ v).sum(), rows)
            gradients.append(gradient)

        def value(rows: Tensor) -> Tensor:
            matrix = 0.5 * torch.eye(4, dtype=FLOAT64) + rows.T @ rows / 3
            return torch.linalg.solve(matrix, v).sum()

        expected = torch.func.grad(value)(rows.detach())
        close(gradients[0], expected)
        close(gradients[1], expected)

    @pytest.mark.parametrize("when", ["without grad", "before they require grad", "in a transform"])
    def test_what_was_built_without_a_graph_is_differentiated_all_the_same(self, when):
        G, x = normal(3, 5), normal(5, seed=1)
        rows, damping = G.clone(), torch.tensor(0.5, dtype=FLOAT64)
        leaves = (rows, damping)
        if when == "without grad":
            for leaf in leaves:
                leaf.requires_grad_()
        if when == "in a transform":
            held = []

            def build(x):
                held.append(MFACInverse(rows, damping))
                return (held[0] @ x).sum()

            torch.func.grad(build)(x)
            inverse = held[0]
        else:
            with torch.no_grad():
                inverse = MFACInverse(rows, damping)
        for leaf in leaves:
            leaf.requires_grad_()
        gradients = torch.autograd.grad((inverse @ x).sum(), leaves)
        expected = torch.func.grad(
            lambda G, c: torch.linalg.solve(c * torch.eye(5, dtype=FLOAT64) + G.T @ G / 3, x).sum(),
            (0, 1),
        )(G, torch.tensor(0.5, dtype=FLOAT64))
        for actual, wanted in zip(gradients, expected, strict=True):
            close(actual, wanted)

    def test_changed_in_place(self):
        rows, x = normal(3, 5), normal(5, seed=1)
        inverse = MFACInverse(rows, 0.5)
        rows.mul_(2)
        close(inverse @ x, torch.linalg.solve(explicit(rows, 0.5), x))

    def test_vmap_over_windows_and_vectors(self):
        rows, v = normal(5, 3, 4), normal(5, 4, seed=1)
        damping = torch.linspace(0.1, 1.0, 5, dtype=FLOAT64)
        solved = torch.func.vmap(lambda g, c, x: MFACInverse(g, c) @ x)(rows, damping, v)
        for index in range(5):
            matrix = explicit(rows[index], float(damping[index]))
            close(solved[index], torch.linalg.solve(matrix, v[index]))
        inverse = MFACInverse(rows[0], 0.1)
        close(torch.func.vmap(lambda x: inverse @ x)(v), v @ inverse.to_dense())

    def test_jvp_is_the_derivative_of_the_inverse(self):
        rows, direction, v = normal(3, 4), normal(3, 4, seed=1), normal(4, seed=2)
        _, tangent = torch.func.jvp(lambda g: MFACInverse(g, 0.5) @ v, (rows,), (direction,))
        change = (rows.T @ direction + direction.T @ rows) / 3
        inverse = torch.linalg.inv(explicit(rows, 0.5))
        close(tangent, -inverse @ change @ inverse @ v)


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"window": 0, "damping": 1.0}, "window=0"),
            ({"window": 2, "damping": 0.0}, "damping=0.0"),
            ({"window": 2, "damping": float("nan")}, "damping=nan"),
            ({"window": 2, "damping": 1.0, "mean_over": "all"}, "mean_over='all'"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            MFAC(Space.flat(3, FLOAT64), **settings)

    def test_empty(self):
        estimate = MFAC(Space.flat(3, FLOAT64), window=2, damping=1.0)
        for use in (estimate.operator, estimate.inverse, lambda: estimate.solve(normal(3))):
            with pytest.raises(RuntimeError, match="no gradient was pushed"):
                use()

    def test_gradients(self):
        estimate = window_of(normal(2, 3), window=2)
        before = estimate.operator().to_dense()
        with pytest.raises(ValueError, match="gradient has structure"):
            estimate.push(normal(4))
        with pytest.raises(TypeError, match="gradient has dtype"):
            estimate.push(normal(3).float())
        with pytest.raises(ValueError, match="batch_size=0"):
            estimate.push(normal(3), batch_size=0)
        for bad in (torch.nan, torch.inf, 1e200):
            with pytest.raises(ValueError, match="not finite"):
                estimate.push(torch.tensor([bad, 0.0, 0.0], dtype=FLOAT64))
        assert len(estimate) == 2
        assert torch.equal(estimate.operator().to_dense(), before)

    def test_inverse(self):
        rows = normal(2, 3)
        with pytest.raises(ValueError, match=r"rows has shape \(0, 3\)"):
            MFACInverse(rows[:0], 1.0)
        with pytest.raises(ValueError, match="damping=0"):
            MFACInverse(rows, 0.0)
        with pytest.raises(ValueError, match="divisor"):
            MFACInverse(rows, 1.0, 0.0)
        with pytest.raises(ValueError, match="gram has shape"):
            MFACInverse(rows, 1.0, gram=torch.eye(3))
        with pytest.raises(ValueError, match="space has size 4"):
            MFACInverse(rows, 1.0, space=Space.flat(4, FLOAT64))
        with pytest.raises(TypeError, match="space has dtype"):
            MFACInverse(rows, 1.0, space=Space.flat(3, torch.float32))

    def test_damping_too_small_for_the_dtype(self):
        """Four equal rows: rounding of G G^T outweighs 4e-9 in float32."""
        rows = (1e3 * normal(1, 50)).float().repeat(4, 1) + 1e-3 * normal(4, 50, seed=1).float()
        with pytest.raises(ValueError, match="too small for them in torch"):
            MFACInverse(rows, 1e-9)
