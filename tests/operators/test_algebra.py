"""What sums, multiples, products and Gram operators become, and what they refuse."""

from __future__ import annotations

import gc
import re
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
import solvers
from operators import Dense, Diagonal, Gram, Identity, LinearOperator, LowRankPlusDiagonal, Space

few = settings(deadline=None, max_examples=15, derandomize=True)
seeds = st.integers(0, 10**6)
F64 = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def cube(y: dict[str, Tensor]) -> dict[str, Tensor]:
    """From the space {a: (3,)} to {b: (3,)}."""
    return {"b": y["a"] ** 3}


POINT = {"a": torch.tensor([1.0, -2.0, 0.5], dtype=F64)}


class TestGram:
    frame = sampled(4, 3)
    square = sampled(3, 3, seed=1)

    def test_with_its_transpose_on_the_left(self):
        A = Dense(self.frame)
        G = A.T @ A
        assert isinstance(G, Gram)
        assert G.frame is A
        assert G.weight is None
        assert str(G.structure) == "positive semidefinite"
        close(G.to_dense(), self.frame.T @ self.frame)
        close(G @ sampled(3, seed=2), self.frame.T @ (self.frame @ sampled(3, seed=2)))

    def test_with_its_transpose_on_the_right(self):
        A = Dense(self.frame)
        G = A @ A.T
        assert isinstance(G, Gram)
        assert G.shape == (4, 4)
        close(G.to_dense(), self.frame @ self.frame.T)

    @pytest.mark.parametrize(
        "build",
        [
            lambda: Dense(sampled(4, 3)),
            lambda: ops.Jacobian(cube, POINT),
            lambda: ops.Linearization(cube, POINT),
            lambda: ops.FunctionOperator(lambda v: v[1:] - v[:-1], torch.zeros(5, dtype=F64)),
            lambda: Dense(sampled(4, 3)) @ Dense(sampled(3, 3, seed=1)),
            lambda: Dense(sampled(3, 3)) + Dense(sampled(3, 3, seed=1)),
        ],
        ids=["Dense", "Jacobian", "Linearization", "FunctionOperator", "Product", "Sum"],
    )
    def test_of_every_kind_of_frame(self, build):
        A = build()
        matrix = A.to_dense()
        for G, expected in ((A.T @ A, matrix.T @ matrix), (A @ A.T, matrix @ matrix.T)):
            assert isinstance(G, Gram)
            assert G.positive_semidefinite
            close(G.to_dense(), expected)

    def test_of_the_transpose_of_a_transpose(self):
        A = ops.Jacobian(cube, POINT)
        assert isinstance(A.T.T @ A.T, Gram)
        B = Dense(self.frame).T
        close((B.T @ B).to_dense(), self.frame @ self.frame.T)

    def test_of_another_operator_of_equal_values_is_a_plain_product(self):
        """Equality of values may end with the next change in place; sameness does not."""
        A, B = Dense(self.frame), Dense(self.frame.clone())
        assert isinstance(A.T @ B, ops.Product)

    def test_square_of_a_symmetric_operator(self):
        S = Dense(self.square + self.square.T, symmetric=True)
        assert not S.positive_semidefinite
        assert isinstance(S @ S, Gram)
        assert (S @ S).positive_semidefinite
        close((S @ S).to_dense(), (self.square + self.square.T) @ (self.square + self.square.T))
        A = Dense(self.square)
        assert isinstance(A @ A, ops.Product)
        close((A @ A).to_dense(), self.square @ self.square)

    @pytest.mark.parametrize(
        ("weight", "facts"),
        [
            (Diagonal(torch.tensor([1.0, 2.0, 0.0, 3.0], dtype=F64)), "positive semidefinite"),
            (Diagonal(torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=F64)), "symmetric"),
            (Dense(sampled(4, 4, seed=3)), ""),
        ],
        ids=["semidefinite", "indefinite", "not symmetric"],
    )
    def test_with_a_weight(self, weight, facts):
        A, W = Dense(self.frame), weight.to_dense()
        expected = self.frame.T @ W @ self.frame
        for G in (A.T @ weight @ A, Gram(A, weight)):
            assert isinstance(G, Gram)
            assert G.weight is weight
            assert str(G.structure) == facts
            close(G.to_dense(), expected)
            close(G.T.to_dense(), expected.T)
            assert G.symmetric == (G.T is G)
            v = sampled(3, seed=4)
            close(G.T @ v, expected.T @ v)

    def test_between_two_symmetric_factors(self):
        S = Dense(self.square + self.square.T, symmetric=True)
        G = S @ Diagonal(torch.ones(3, dtype=F64)) @ S
        assert isinstance(G, Gram)
        assert G.positive_semidefinite

    def test_definite_only_where_the_frame_is_known_to_have_full_rank(self):
        D = Diagonal(torch.tensor([1.0, 2.0, 3.0], dtype=F64))
        S = Dense(torch.eye(3, dtype=F64), positive_definite=True)
        assert Gram(S).positive_definite
        assert Gram(S, D).positive_definite
        assert not Gram(Dense(self.frame)).positive_definite
        assert not Gram(S, Diagonal(torch.zeros(3, dtype=F64))).positive_definite

    def test_factors_come_out(self):
        A, W = Dense(self.frame), Diagonal(torch.arange(1.0, 5.0, dtype=F64))
        gram = self.frame.T @ self.frame
        for G, expected in (
            (2.0 * A.T @ A, 2 * gram),
            (A.T @ (2.0 * A), 2 * gram),
            ((2.0 * A).T @ (3.0 * A), 6 * gram),
            ((-A).T @ A, -gram),
            (A.T @ (2.0 * W) @ A, 2 * self.frame.T @ W.to_dense() @ self.frame),
        ):
            inner = G.operator if isinstance(G, ops.Scaled) else G
            assert isinstance(inner, Gram)
            close(G.to_dense(), expected)
        assert ((2.0 * A).T @ (2.0 * A)).positive_semidefinite
        assert not ((-A).T @ A).positive_semidefinite
        assert ((-A).T @ A).symmetric

    def test_a_factor_that_is_a_tensor_comes_out_differentiably(self):
        A, v = Dense(self.frame), sampled(3, seed=5)

        def energy(c):
            B = c * A
            return v @ ((B.T @ B) @ v)

        c = torch.tensor(1.5, dtype=F64)
        slope = torch.func.grad(energy)(c)
        close(slope, 2 * c * (self.frame @ v).square().sum())

    def test_weights_that_do_not_fit(self):
        A = Dense(self.frame)
        message = (
            r"weight is Dense\(3, 3\), but frame is Dense\(4, 3\); "
            r"expected a weight of shape \(4, 4\)"
        )
        with pytest.raises(ValueError, match=message):
            Gram(A, Dense(torch.zeros(3, 3, dtype=F64)))
        with pytest.raises(ValueError, match=r"expected a weight of shape \(4, 4\)"):
            Gram(A, Dense(torch.zeros(4, 5, dtype=F64)))
        with pytest.raises(TypeError, match=r"Dense\(4, 3\) \(torch.float64.*\(torch.float32"):
            Gram(A, Dense(torch.zeros(4, 4)))

    def test_weights_on_another_nested_space(self):
        J = ops.Jacobian(cube, POINT)
        weight = Identity(Space.of({"other": torch.zeros(3, dtype=F64)}))
        with pytest.raises(ValueError, match=r"'b'.*'other'|'other'.*'b'"):
            Gram(J, weight)
        with pytest.raises(ValueError, match="structures differ"):
            J.T @ weight @ J

    def test_weight_of_a_size_alone(self):
        J = ops.Jacobian(cube, POINT)
        G = Gram(J, 0.5 * Identity(3))
        assert G.dtype == F64
        assert G.positive_semidefinite
        close(G.to_dense(), torch.diag(4.5 * POINT["a"] ** 4))

    def test_follows_changes_in_place(self):
        matrix = self.frame.clone()
        A = Dense(matrix)
        G = A.T @ A
        matrix.mul_(2)
        close(G.to_dense(), 4 * self.frame.T @ self.frame)

    def test_leaves_no_cycle_of_references(self):
        """A cycle would hold the operator's tensors until the garbage collector comes by."""
        gc.disable()
        try:
            A = ops.Jacobian(cube, POINT)
            alive = weakref.ref(A)
            G = A @ A.T
            G @ sampled(3)
            A.T.T  # noqa: B018
            del A, G
            assert alive() is None
        finally:
            gc.enable()

    @few
    @given(seeds, st.integers(0, 5), st.integers(0, 5))
    def test_is_its_matrix(self, seed, m, n):
        J, W = sampled(m, n, seed=seed), sampled(m, m, seed=seed + 1)
        close(Gram(Dense(J)).to_dense(), J.T @ J)
        close(Gram(Dense(J), Dense(W)).to_dense(), J.T @ W @ J)
        close(Gram(Dense(J), Dense(W)).T.to_dense(), J.T @ W.T @ J)
        smallest = torch.linalg.eigvalsh(Gram(Dense(J)).to_dense())[:1]
        assert bool((smallest > -1e-12).all())


class TestFactorsGoToTheFront:
    A, B = Dense(sampled(2, 3)), Dense(sampled(3, 4, seed=1))

    @pytest.mark.parametrize(
        "build",
        [
            lambda A, B: (2.0 * A) @ B,
            lambda A, B: A @ (2.0 * B),
            lambda A, B: (0.5 * A) @ (4.0 * B),
            lambda A, B: -(-2.0 * (A @ B)),
            lambda A, B: 4.0 * A @ B / 2,
        ],
    )
    def test_of_products(self, build):
        result = build(self.A, self.B)
        assert isinstance(result, ops.Scaled)
        assert isinstance(result.operator, ops.Product)
        assert result.factor == 2.0
        close(result.to_dense(), 2 * self.A.matrix @ self.B.matrix)

    def test_and_of_transposes(self):
        result = (2.0 * self.A).T
        assert isinstance(result, ops.Scaled)
        close(result.to_dense(), 2 * self.A.matrix.T)

    def test_structure_of_what_is_inside_is_seen(self):
        D = Diagonal(torch.tensor([1.0, 2.0], dtype=F64))
        assert isinstance(2.0 * D, Diagonal)
        low_rank = ops.LowRankPlusDiagonal(sampled(1, 3), 1.0)
        assert isinstance(2.0 * low_rank, ops.LowRankPlusDiagonal)
        product = (2.0 * Identity(2, F64)) @ self.A
        close(product.to_dense(), 2 * self.A.matrix)


class TestIdentity:
    A = Dense(sampled(3, 3))

    @pytest.mark.parametrize("identity", [Identity(3, F64), Identity(3)], ids=["typed", "size"])
    def test_falls_out_of_products(self, identity):
        assert (identity @ self.A) is self.A
        assert (self.A @ identity) is self.A

    def test_multiple_in_a_product(self):
        for product in (self.A @ (2.0 * Identity(3)), (2.0 * Identity(3)) @ self.A):
            assert product.dtype == F64
            close(product.to_dense(), 2 * self.A.matrix)

    def test_rectangular_neighbours(self):
        wide = Dense(sampled(2, 3))
        close((Identity(2) @ wide @ Identity(3)).to_dense(), wide.matrix)
        with pytest.raises(ValueError, match="inner sizes differ"):
            wide @ Identity(2)

    def test_takes_the_nested_space_of_the_other_factor(self):
        J = ops.Jacobian(cube, POINT)
        for product in (Identity(3) @ J, J @ Identity(3), 2.0 * Identity(3) @ J @ Identity(3)):
            assert product.domain == J.domain
            assert product.codomain == J.codomain

    def test_its_nested_space_is_kept(self):
        """On the side of the product where the other factor is flat."""
        space = Space.of({"z": torch.zeros(3, dtype=F64)})
        half = ops.Jacobian(lambda y: y["a"] ** 3, POINT)  # from {a} to plain vectors
        assert (Identity(space) @ half).codomain == space
        assert (half.T @ Identity(space)).domain == space
        assert (Identity(space) @ self.A).codomain == space
        assert (self.A @ Identity(space)).domain == space

    def test_sums_of_sizes_alone(self):
        """c I + c' I is a multiple of I still, and takes dtype and space of a later term."""
        total = self.A + (Identity(3) + 2.0 * Identity(3))
        close(total.to_dense(), self.A.matrix + 3 * torch.eye(3, dtype=F64))

    def test_factor_that_is_a_tensor(self):
        c = torch.tensor(0.3, dtype=F64)
        total = self.A + c * Identity(3)
        close(total.to_dense(), self.A.matrix + c * torch.eye(3, dtype=F64))
        v = sampled(3, seed=1)
        slope = torch.func.grad(lambda c: ((self.A + c * Identity(3)) @ v).sum())(c)
        close(slope, v.sum())

    def test_gradient_with_respect_to_a_multiple_that_was_made_before(self):
        v, c = sampled(3, seed=1), torch.tensor(0.3, dtype=F64)
        damping = c * Identity(3)  # of a size alone: it takes its space in the sum below
        gradient = torch.func.grad(lambda D: ((self.A + D) @ v).sum())(damping)
        total = sum(float(t.sum()) for t in gradient.tensors)
        assert total == pytest.approx(float(v.sum()), rel=1e-6)

    def test_multiples_out_of_vmap(self):
        factors, v = torch.tensor([1.0, 2.0], dtype=F64), sampled(3, seed=1)
        dampings = torch.func.vmap(lambda c: c * Identity(3))(factors)
        results = torch.func.vmap(lambda D: (self.A + D) @ v)(dampings)
        close(results, self.A.matrix @ v + factors[:, None] * v)
        second = torch.utils._pytree.tree_map(lambda t: t[1], dampings)
        close((self.A + second).to_dense(), self.A.matrix + 2 * torch.eye(3, dtype=F64))

    def test_other_tensors_for_a_multiple_of_a_size_alone(self):
        other = (2.0 * Identity(3)).with_tensors((torch.tensor(5.0),))
        close((self.A + other).to_dense(), self.A.matrix + 5 * torch.eye(3, dtype=F64))

    def test_other_tensors_are_seen_by_products(self):
        """Operators are differentiated by moving their tensors: I + e D must not stay I."""
        eye = Identity(3, F64)
        moved = torch.utils._pytree.tree_map(lambda t: 2 * t, eye)
        close((moved @ self.A).to_dense(), moved.to_dense() @ self.A.matrix)
        assert torch.equal(moved.to_dense(), torch.diag(moved._exact_diagonal()))

    def test_trace_and_logdet(self):
        assert float(Identity(3)._exact_trace()) == 3.0
        assert float(Identity(3)._exact_logdet()) == 0.0
        assert float((2.0 * Identity(3, F64))._exact_logdet()) == pytest.approx(3 * np.log(2))


class TestDiagonalTimesDiagonal:
    a, b = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([3.0, 0.5], dtype=F64)

    def test_is_diagonal(self):
        product = Diagonal(self.a) @ Diagonal(self.b)
        assert isinstance(product, Diagonal)
        assert product.positive_definite
        close(product.values, self.a * self.b)
        close(product.to_dense(), torch.diag(self.a * self.b))

    def test_with_a_multiple_of_identity(self):
        for product in (
            Diagonal(self.a) @ (2.0 * Identity(2)),
            (2.0 * Identity(2)) @ Diagonal(self.a),
        ):
            assert isinstance(product, Diagonal)
            close(product.to_dense(), torch.diag(2 * self.a))

    def test_keeps_the_nested_space(self):
        space = Space.of({"z": torch.zeros(2, dtype=F64)})
        for product in (
            Diagonal(self.a, space) @ Diagonal(self.b),
            Diagonal(self.a) @ Diagonal(self.b, space),
        ):
            assert isinstance(product, Diagonal)
            assert product.domain == space

    def test_signs_that_cancel_are_not_assumed(self):
        minus = Diagonal(-self.a) @ Diagonal(-self.b)
        assert minus.symmetric
        assert not minus.positive_semidefinite or bool((minus.values >= 0).all())


class TestErrorsNameBothOperators:
    @pytest.mark.parametrize(
        ("combine", "verb"), [(lambda a, b: a + b, "add"), (lambda a, b: a @ b, "compose")]
    )
    def test_dtypes(self, combine, verb):
        single, double = Dense(torch.zeros(2, 2)), Diagonal(torch.zeros(2, dtype=F64))
        message = (
            f"cannot {verb} Dense(2, 2) (torch.float32 on cpu) and "
            "Diagonal(2, 2) (torch.float64 on cpu)"
        )
        with pytest.raises(TypeError, match=re.escape(message)):
            combine(single, double)

    def test_devices(self):
        here = Dense(torch.zeros(2, 2))
        away = Diagonal(torch.zeros(2, device="meta"), positive_definite=True)
        with pytest.raises(TypeError, match=r"Dense\(2, 2\) \(.* on cpu\).*Diagonal.* on meta\)"):
            here + away

    def test_shapes(self):
        square, wide = Dense(torch.zeros(3, 3)), Dense(torch.zeros(2, 3))
        with pytest.raises(ValueError, match=r"cannot add Dense\(3, 3\) and Dense\(2, 3\): shapes"):
            square + wide
        with pytest.raises(ValueError, match=r"compose Dense\(3, 3\) with Dense\(2, 3\): inner"):
            square @ wide

    def test_spaces(self):
        J = ops.Jacobian(cube, POINT)
        for combine in (lambda: J @ J, lambda: J + J.T):
            with pytest.raises(ValueError, match=r"Jacobian.*'a'.*Jacobian.*'b'.*differ"):
                combine()

    def test_composition_of_spaces_that_agree(self):
        J = ops.Jacobian(cube, POINT)
        K = ops.Jacobian(lambda y: y["b"].sum()[None], {"b": torch.zeros(3, dtype=F64)})
        close((K @ J).to_dense(), (3 * POINT["a"] ** 2)[None])


class TestFactors:
    A = Dense(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))

    @pytest.mark.parametrize(
        "factor",
        [2, 2.0, True + 1, Fraction(2), np.float32(2), np.float64(2), np.int64(2), np.uint8(2)],
        ids=lambda f: type(f).__name__,
    )
    def test_of_every_real_type(self, factor):
        for multiple in (factor * self.A, self.A * factor):
            assert multiple.dtype == torch.float32
            v = torch.tensor([1.0, 3.0])
            assert torch.equal(multiple @ v, 2 * self.A.matrix @ v)
        assert torch.equal((self.A / factor).to_dense(), self.A.matrix / 2)
        assert (factor * Identity(2)).positive_definite

    @pytest.mark.parametrize(
        "factor", [np.array(2.0), np.ones(2), np.ones((2, 2)), "2", None, [2.0], 2j, 1 + 0j]
    )
    def test_what_is_no_real_scalar(self, factor):
        with pytest.raises(TypeError):
            factor * self.A
        with pytest.raises(TypeError):
            self.A * factor

    def test_complex_tensors(self):
        """The operator keeps its dtype, so a complex multiple is none of its kind."""
        with pytest.raises(TypeError, match="complex"):
            torch.tensor(2 + 1j) * self.A

    def test_zero_divisor(self):
        with pytest.raises(ZeroDivisionError):
            self.A / 0

    def test_nan_grants_nothing(self):
        multiple = float("nan") * Dense(torch.eye(2), positive_definite=True)
        assert not multiple.positive_semidefinite
        assert multiple.symmetric

    def test_negative_zero_and_zero(self):
        definite = Dense(torch.eye(2), positive_definite=True)
        for zero in (0, 0.0, -0.0):
            assert (zero * definite).positive_semidefinite
            assert not (zero * definite).positive_definite


class TestProductsFromTheLeft:
    A = Dense(torch.eye(2))

    @pytest.mark.parametrize(
        "v", [torch.ones(2), torch.ones(2, 2), np.ones(2), np.ones((2, 2)), [1.0, 1.0]]
    )
    def test_are_refused_with_advice(self, v):
        message = rf"{type(v).__name__} @ Dense\(2, 2\); write A\.T @ v"
        with pytest.raises(TypeError, match=message):
            v @ self.A

    def test_numpy_arrays_on_the_right_are_refused(self):
        with pytest.raises((TypeError, ValueError), match="ndarray"):
            self.A @ np.ones(2)
        with pytest.raises((TypeError, ValueError), match="ndarray"):
            self.A @ np.ones((2, 2), dtype=np.float32)

    def test_the_sum_of_a_list(self):
        assert sum([self.A, self.A]).to_dense().tolist() == [[2.0, 0.0], [0.0, 2.0]]
        with pytest.raises(TypeError):
            1 + self.A

    @pytest.mark.parametrize("other", [1.0, np.ones(2), torch.eye(2), None])
    def test_sums_with_what_is_no_operator(self, other):
        for combine in (
            lambda: self.A + other,
            lambda: other + self.A,
            lambda: self.A - other if other is not None else self.A + other,
        ):
            with pytest.raises(TypeError):
                combine()


def hooked(seed: int, n: int) -> list[LinearOperator]:
    """Square operators for which some of the exact hooks answer, alone and combined."""
    matrix, other = sampled(n, n, seed=seed), sampled(n, n, seed=seed + 1)
    values, rows = sampled(n, seed=seed + 2), sampled(2, n, seed=seed + 3)
    dense = Dense(matrix)
    diagonal = Diagonal(values)
    low_rank = ops.LowRankPlusDiagonal(rows, values, sampled(2, seed=seed + 4))
    return [
        dense,
        dense.T,
        diagonal,
        Diagonal(values[0], Space.flat(n, F64)),
        Identity(n, F64),
        low_rank,
        dense + Dense(other),
        dense + diagonal,
        -2.5 * dense,
        torch.tensor(-2.5, dtype=F64) * dense,
        2.0 * (dense + 0.5 * Identity(n)),
        dense @ Dense(other),
        dense @ diagonal @ low_rank,
        (dense @ diagonal).T,
        Gram(dense),
        Gram(dense, low_rank),
        Gram(dense, Dense(other)),
        Dense(matrix.tril(), lower_triangular=True),
        Dense(matrix.tril(), lower_triangular=True).T,
        ops.Inverse(dense, solvers.DenseLU()),
    ]


@few
@given(seeds, st.integers(1, 5))
def test_exact_hooks_against_the_matrix(seed, n):
    answered = 0
    for A in hooked(seed, n):
        if isinstance(A, ops.Inverse):
            matrix = torch.linalg.inv(A.operator.to_dense())
        else:
            matrix = A.to_dense()
        diagonal, trace, logdet = A._exact_diagonal(), A._exact_trace(), A._exact_logdet()
        if diagonal is not None:
            close(diagonal, matrix.diagonal())
            assert diagonal.shape == (n,)
        if trace is not None:
            close(trace, matrix.trace())
        if logdet is not None:
            expected = torch.linalg.slogdet(matrix).logabsdet
            torch.testing.assert_close(logdet, expected, rtol=1e-8, atol=1e-8)
        answered += sum(x is not None for x in (diagonal, trace, logdet))
    assert answered >= 40  # of 20 operators


def test_hooks_of_rectangles_answer_nothing():
    wide, tall = Dense(sampled(2, 3)), Dense(sampled(3, 2, seed=1))
    assert wide._exact_diagonal() is None
    assert wide._exact_trace() is None
    assert wide._exact_logdet() is None
    assert wide.T._exact_logdet() is None
    # Square products of rectangles: det(AB) is no product of determinants.
    assert (wide @ tall)._exact_logdet() is None
    assert Gram(tall)._exact_logdet() is None


@pytest.mark.parametrize(
    "d", [torch.tensor(0.0, dtype=F64), torch.tensor([0.0, 1.0, 2.0], dtype=F64)]
)
def test_logdet_of_low_rank_over_zeros_in_the_diagonal(d):
    """The determinant lemma divides by d; the determinant itself does not."""
    A = ops.LowRankPlusDiagonal(torch.eye(3, dtype=F64) + sampled(3, 3) / 10, d)
    logdet = A._exact_logdet()
    expected = torch.linalg.slogdet(A.to_dense()).logabsdet
    assert logdet is None or bool((logdet - expected).abs() < 1e-10)


def test_logdet_of_singular_operators_is_minus_infinity():
    singular = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=F64)
    for A in (Dense(singular), Diagonal(torch.tensor([0.0, 1.0])), 0.0 * Dense(singular + 1)):
        assert float(A._exact_logdet()) < -30


def test_logdet_of_size_zero():
    empty = torch.zeros(0, 0)
    for A in (Dense(empty), Identity(0), 2.0 * Dense(empty), 0.0 * Dense(empty)):
        assert float(A._exact_logdet()) == 0.0
        assert float(A._exact_trace()) == 0.0


def test_hooks_can_be_differentiated():
    matrix = sampled(3, 3) + 3 * torch.eye(3, dtype=F64)
    values, c = sampled(3, seed=1).exp(), torch.tensor(1.5, dtype=F64)

    def logdet(matrix, values, c):
        return (c * (Dense(matrix) @ Diagonal(values)))._exact_logdet()

    gradients = torch.func.grad(logdet, argnums=(0, 1, 2))(matrix, values, c)
    close(gradients[0], torch.linalg.inv(matrix).T)
    close(gradients[1], 1 / values)
    close(gradients[2], 3 / c)

    def trace(matrix, values, c):
        return (c * (Dense(matrix) + Diagonal(values)))._exact_trace()

    gradients = torch.func.grad(trace, argnums=(0, 1, 2))(matrix, values, c)
    close(gradients[0], c * torch.eye(3, dtype=F64))
    close(gradients[1], c.expand(3))
    close(gradients[2], matrix.trace() + values.sum())


class TestWhatSumsKeep:
    def test_low_rank_keeps_a_fact_that_the_rules_grant(self):
        rows = 0.1 * sampled(1, 3)
        A = ops.LowRankPlusDiagonal(
            rows,
            1.0,
            torch.tensor([-0.01], dtype=F64),
            positive_definite=False,
            positive_semidefinite=True,
        )
        assert A.positive_semidefinite
        assert (A + 0.0 * Identity(3)).positive_semidefinite
        assert (A + Identity(3)).positive_definite

    def test_a_claim_of_semidefiniteness_alone(self):
        A = ops.LowRankPlusDiagonal(
            0.1 * sampled(1, 3), 1.0, torch.tensor([-0.01], dtype=F64), positive_semidefinite=True
        )
        assert A.positive_semidefinite

    def test_flat_codomain_beside_a_nested_one(self):
        flat_domain = ops.Jacobian(lambda y: {"b": y**3}, POINT["a"])
        flat_codomain = ops.Jacobian(lambda y: y["a"] ** 3, POINT)
        for total in (flat_domain + flat_codomain, flat_codomain + flat_domain):
            assert total.domain == flat_codomain.domain
            assert total.codomain == flat_domain.codomain


class TestSizesAlone:
    """What has a size only takes dtype and space of the other operand, whatever it went through."""

    A = Dense(sampled(3, 3))

    @pytest.mark.parametrize(
        "of",
        [
            lambda eye, P: -P,
            lambda eye, P: 2 * P,
            lambda eye, P: eye @ eye,
            lambda eye, P: (0.1 * eye) @ (0.1 * eye),
            lambda eye, P: P + eye,
            lambda eye, P: 0.5 * (P + eye) @ P,
            lambda eye, P: Gram(P),
            lambda eye, P: Gram(P, 2.0 * eye),
            lambda eye, P: ops.Inverse(P + 2.0 * eye, solvers.DenseLU()),
            lambda eye, P: ops.Inverse(P + 2.0 * eye, solvers.DenseLU()).T,
            lambda eye, P: ops.Kronecker(P),
            lambda eye, P: ops.KroneckerSum(P),
            lambda eye, P: ops.BlockDiagonal(P),
        ],
    )
    def test_compounds(self, of):
        eye, P = Identity(3), ops.Permutation(torch.tensor([1, 2, 0]))
        typed = of(Identity(3, F64), ops.Permutation(P.order, dtype=F64)).to_dense()
        close((self.A + of(eye, P)).to_dense(), self.A.matrix + typed)
        close((of(eye, P) @ self.A).to_dense(), typed @ self.A.matrix)
        close((self.A @ of(eye, P)).to_dense(), self.A.matrix @ typed)

    def test_between_two_spaces(self):
        """A sum of operators from one space to another of its size has neither for its own."""
        y = {"a": sampled(3), "b": sampled(1)}
        J = ops.Jacobian(lambda y: torch.cat([y["a"] ** 2, y["b"]]), y)
        blocks = ops.BlockDiagonal(Dense(sampled(2, 2)), Dense(sampled(2, 2, seed=1)))
        P = ops.Permutation(torch.tensor([1, 0, 3, 2]))
        for A in (J, blocks @ Dense(sampled(4, 4))):
            matrix = A.to_dense()
            for term, added in (
                (0.1 * Identity(4), 0.1 * torch.eye(4, dtype=F64)),
                (P, P.to_dense()),
            ):
                for total in (A + term, term + A):
                    assert total.domain == A.domain
                    close(total.to_dense(), matrix + added.to(F64))

    def test_kronecker_of_sizes(self):
        eye, P = Identity(2), ops.Permutation(torch.tensor([1, 0]))
        A = Dense(sampled(4, 4))
        for made in (
            ops.Kronecker(eye, P),
            ops.KroneckerSum(2.0 * eye, P),
            ops.BlockDiagonal(eye, P),
        ):
            close((A + made).to_dense(), A.matrix + made.to_dense())
            close((A @ made).to_dense(), A.matrix @ made.to_dense().to(F64))

    def test_a_weight_of_a_frame_of_a_size(self):
        P = ops.Permutation(torch.tensor([1, 2, 0]))
        Q = P.to_dense().to(F64)
        close(Gram(P, self.A).to_dense(), Q.T @ self.A.matrix @ Q)


class TestFactorsOfAnotherDtype:
    def test_traces_keep_the_dtype_of_the_operator(self):
        A = torch.tensor(2.0, dtype=F64) * Dense(torch.eye(3))
        assert ops.trace(A).value.dtype == torch.float32
        assert ops.trace(A).value == 6.0

    @pytest.mark.parametrize("A", [
        Identity(3, torch.float32),
        Diagonal(torch.ones(3)),
        Dense(torch.eye(3), positive_definite=True),
        LowRankPlusDiagonal(torch.ones(1, 3), 1.0),
        ops.Sparse(torch.eye(3), positive_definite=True),
    ], ids=repr)  # fmt: skip
    def test_what_vanishes_is_not_definite(self, A):
        vanishing = 1e-60 * A
        assert not vanishing.to_dense().any()
        assert vanishing.positive_semidefinite
        assert not vanishing.positive_definite
        assert (1e-30 * A).positive_definite
        assert not (-1e-60 * A).positive_semidefinite

    def test_what_vanishes_beside_another_operator(self):
        A = Dense(torch.zeros(3, 3), positive_semidefinite=True)
        assert (A + 1e-30 * Identity(3)).positive_definite
        vanishing = A + 1e-60 * Identity(3)
        assert vanishing.positive_semidefinite
        assert not vanishing.positive_definite


def test_gram_from_the_right():
    J, W = Dense(sampled(3, 2)), Diagonal(sampled(3, seed=1) ** 2)
    A = J.T @ (W @ J)
    assert isinstance(A, Gram)
    assert A.positive_semidefinite
    close(A.to_dense(), J.matrix.T @ torch.diag(W.values) @ J.matrix)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Diagonal([1.0, 2.0]),
        lambda: LowRankPlusDiagonal([[1.0]], 1.0),
        lambda: LowRankPlusDiagonal(torch.ones(1, 1), 1.0, [1.0]),
        lambda: ops.LowRankUpdate([[1.0]], [[1.0]], 1.0),
        lambda: ops.EmpiricalFisher([[1.0]]),
        lambda: ops.MFACInverse([[1.0]], 1.0),
        lambda: ops.LBFGSInverse([[1.0]], [[1.0]], 1.0),
        lambda: ops.DiagonalFisher([1.0]),
        lambda: Gram(torch.eye(2)),
        lambda: ops.Inverse(torch.eye(2), solvers.CG()),
        lambda: ops.Inverse(Dense(torch.eye(2)), solvers.CG),
    ],
)
def test_what_is_no_operator_or_tensor_is_named(make):
    with pytest.raises(TypeError, match=r"is (a|<class)"):
        make()
