"""`Kronecker` and `KroneckerSum` against `torch.kron`."""

from __future__ import annotations

import itertools
import math
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from operators.kronecker import Kronecker, KroneckerSum
from operators.permutation import Permutation

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
SIZES = st.integers(1, 4)
SHAPES = st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=3)
DTYPES = [torch.float32, torch.float64]
FACTS = (
    "symmetric",
    "positive_semidefinite",
    "positive_definite",
    "diagonal",
    "lower_triangular",
    "upper_triangular",
)


def sampled(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = 1e-11 if expected.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def spd(n: int, seed: int = 0) -> Tensor:
    root = sampled(n, n, seed=seed)
    return root @ root.T + torch.eye(n, dtype=torch.float64)


def matrices(shapes, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [sampled(m, n, seed=seed + i, dtype=dtype) for i, (m, n) in enumerate(shapes)]


def kron(factors: list[Tensor]) -> Tensor:
    # torch.kron fails for some strides.
    return reduce(torch.kron, [factor.contiguous() for factor in factors])


def kron_sum(factors: list[Tensor]) -> Tensor:
    """``sum_i I (x) A_i (x) I`` written out."""
    eyes = [torch.eye(len(factor), dtype=factor.dtype) for factor in factors]
    terms = [kron([*eyes[:i], factor, *eyes[i + 1 :]]) for i, factor in enumerate(factors)]
    return reduce(torch.add, terms)


def by_products(A: ops.LinearOperator) -> Tensor:
    """Matrix of the products that the operator computes, whatever `to_dense` does."""
    return A._matmat(torch.eye(A.shape[1], dtype=A.dtype))


def facts(A: ops.LinearOperator) -> set[str]:
    return {fact for fact in FACTS if getattr(A, fact)}


def true_facts(M: Tensor) -> set[str]:
    symmetric = torch.allclose(M, M.T)
    smallest = float(torch.linalg.eigvalsh((M + M.T) / 2)[0])
    lower, upper = torch.equal(M, M.tril()), torch.equal(M, M.triu())
    values = (symmetric, symmetric and smallest > -1e-12, symmetric and smallest > 1e-12)
    return {f for f, v in zip(FACTS, (*values, lower and upper, lower, upper), strict=True) if v}


def pool(n: int = 3, seed: int = 0) -> dict[str, ops.LinearOperator]:
    S = sampled(n, n, seed=seed)
    semidefinite = torch.ones(n, dtype=torch.float64)
    semidefinite[0] = 0.0
    return {
        "general": ops.Dense(S),
        "symmetric": ops.Dense(S + S.T, symmetric=True),
        "semidefinite": ops.Dense(S[:1].T @ S[:1], positive_semidefinite=True),
        "definite": ops.Dense(spd(n, seed), positive_definite=True),
        "lower": ops.Dense(S.tril(), lower_triangular=True),
        "upper": ops.Dense(S.triu(), upper_triangular=True),
        "diagonal": ops.Diagonal(S[0]),
        "diagonal semidefinite": ops.Diagonal(semidefinite),
    }


PAIRS = list(itertools.product(pool(), pool()))


class TestKronecker:
    @PROPERTY
    @given(SHAPES, st.integers(0, 3))
    def test_is_its_matrix(self, shapes, k):
        factors = matrices(shapes)
        A, M = Kronecker(*map(ops.Dense, factors)), kron(factors)
        m, n = M.shape
        assert A.kronecker
        assert A.shape == (m, n)
        close(A.to_dense(), M)
        close(by_products(A), M)
        close(A @ sampled(n), M @ sampled(n))
        close(A @ sampled(n, k), M @ sampled(n, k))
        assert A.T.kronecker
        close(by_products(A.T), M.T)
        close(A.T.to_dense(), M.T)
        if all(p == q for p, q in shapes):
            close(A._exact_diagonal(), M.diagonal())
            close(A._exact_trace(), M.trace())
            close(A._exact_logdet(), torch.linalg.slogdet(M).logabsdet)
        else:
            assert A._exact_diagonal() is A._exact_trace() is A._exact_logdet() is None

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_rows_of_a_matrix_are_stacked(self, dtype):
        S, A = sampled(2, 4, dtype=dtype), sampled(5, 3, seed=1, dtype=dtype)
        V = sampled(4, 3, seed=2, dtype=dtype)
        result = Kronecker(ops.Dense(S), ops.Dense(A)) @ V.reshape(-1)
        assert result.dtype == dtype
        close(result.reshape(2, 5), S @ V @ A.T)

    @pytest.mark.parametrize("numbers", [1, 13, 30, 10**6])
    def test_blocks_are_taken_a_few_columns_at_a_time(self, monkeypatch, numbers):
        monkeypatch.setattr("operators.kronecker.IN_CACHE", numbers)
        factors = matrices([(2, 3), (3, 2)])
        counted = [Counted(ops.Dense(factor)) for factor in factors]
        block = sampled(6, 7)
        close(Kronecker(*counted) @ block, kron(factors) @ block)
        # 1: column by column; 13: two at a time; 30: five.
        assert counted[0].calls == {1: 7, 13: 4, 30: 2, 10**6: 1}[numbers]

    def test_sizes_of_zero(self):
        A = Kronecker(ops.Dense(sampled(0, 2)), ops.Dense(sampled(3, 3)))
        assert (A @ sampled(6)).shape == (0,)
        assert torch.equal(A.T @ sampled(0), torch.zeros(6, dtype=torch.float64))

    def test_factors_of_every_kind(self):
        y = sampled(3)
        jacobian = ops.Jacobian(lambda y: torch.stack([y.prod(), (y**2).sum()]), y)
        permutation = Permutation(torch.tensor([1, 2, 0]), dtype=torch.float64)
        low_rank = ops.LowRankPlusDiagonal(sampled(1, 2), 2.0)
        factors = [jacobian, permutation, low_rank, ops.Identity(2)]
        for order in itertools.permutations(factors, 3):
            A = Kronecker(*order)
            M = kron([factor.to_dense().double() for factor in order])
            close(by_products(A), M)
            close(by_products(A.T), M.T)
            close(A @ sampled(A.shape[1]), M @ sampled(A.shape[1]))

    @PROPERTY
    @given(st.lists(st.tuples(SIZES, SIZES, SIZES), min_size=1, max_size=3))
    def test_mixed_products(self, sizes):
        left = matrices([(m, n) for m, n, _ in sizes])
        right = matrices([(n, k) for _, n, k in sizes], seed=5)
        product = Kronecker(*map(ops.Dense, left)) @ Kronecker(*map(ops.Dense, right))
        assert product.kronecker
        assert len(product.factors) == len(sizes)
        close(by_products(product), kron(left) @ kron(right))
        A = Kronecker(*map(ops.Dense, left))
        gram = A.T @ A
        assert gram.kronecker
        assert gram.positive_semidefinite
        close(gram.to_dense(), kron(left).T @ kron(left))

    def test_products_of_other_partitions_are_ordinary(self):
        A = Kronecker(*map(ops.Dense, matrices([(2, 3), (3, 2)])))
        B = Kronecker(*map(ops.Dense, matrices([(2, 2), (3, 3)])))
        C = Kronecker(*map(ops.Dense, matrices([(2, 2), (3, 1), (1, 2)])))
        for other in (B, C):
            assert not (A @ other).kronecker
            close((A @ other).to_dense(), A.to_dense() @ other.to_dense())
        with pytest.raises(ValueError, match=r"Kronecker\(6, 6\) with Dense\(5, 6\): inner"):
            A @ ops.Dense(sampled(5, 6))

    @pytest.mark.parametrize("factor", [-2.0, 0.0, 3, torch.tensor(0.5, dtype=torch.float64)])
    def test_a_factor_goes_into_one_factor(self, factor):
        tensors = matrices([(2, 2), (3, 2), (1, 4)])
        A = factor * (2.0 * Kronecker(*map(ops.Dense, tensors)))
        assert A.kronecker
        assert len(A.factors) == 3
        close(by_products(A), 2.0 * factor * kron(tensors))
        definite = factor * Kronecker(ops.Identity(2), ops.Dense(spd(2), positive_definite=True))
        assert definite.positive_definite == (isinstance(factor, int) and factor > 0)
        assert definite.symmetric
        # The scalar of a multiple of I is an entry of it.
        assert {type(part) for part in definite.factors} == {ops.Diagonal, ops.Dense}

    @pytest.mark.parametrize(("first", "second"), PAIRS)
    def test_facts(self, first, second):
        a, b = pool()[first], pool(seed=1)[second]
        A = Kronecker(a, b)
        assert facts(A) == facts(a) & facts(b)
        assert facts(A) <= true_facts(A.to_dense())
        assert (A.T is A) == A.symmetric

    def test_a_factor_that_is_a_product_is_taken_apart(self):
        A, B, C = (ops.Dense(matrix) for matrix in matrices([(2, 3), (1, 2), (3, 1)]))
        nested = Kronecker(A, Kronecker(B, C))
        assert nested.factors == Kronecker(Kronecker(A, B), C).factors == (A, B, C)
        close(by_products(nested), kron([A.matrix, B.matrix, C.matrix]))

    def test_logdet_of_a_singular_factor(self):
        A = Kronecker(ops.Diagonal(torch.tensor([0.0, 1.0])), ops.Identity(3))
        assert A._exact_logdet() == -math.inf

    def test_refusals(self):
        with pytest.raises(ValueError, match="no factor; expected at least one"):
            Kronecker()
        with pytest.raises(TypeError, match="factor 0 is a Tensor; expected a LinearOperator"):
            Kronecker(torch.eye(2))
        message = r"factor 1 is Dense\(2, 3\) \(torch.float64 on cpu\), but Dense\(1, 1\) is"
        with pytest.raises(TypeError, match=message):
            Kronecker(ops.Dense(torch.ones(1, 1)), ops.Dense(sampled(2, 3)))
        A = Kronecker(ops.Dense(sampled(2, 3)), ops.Dense(sampled(2, 2)))
        with pytest.raises(ValueError, match=r"Kronecker\(4, 6\) applied to a tensor of shape"):
            A @ sampled(3, 2)
        with pytest.raises(ValueError, match=r"add Kronecker\(4, 6\) and Dense\(4, 4\): shapes"):
            A + ops.Dense(sampled(4, 4))


class Counted(ops.LinearOperator):
    """A matrix that counts its products and their flops."""

    _parameters = ("operator",)

    def __init__(self, operator: ops.Dense) -> None:
        super().__init__(operator.domain, operator.codomain)
        self.operator, self.flops, self.calls = operator, 0.0, 0

    def _matvec(self, v: Tensor) -> Tensor:
        raise AssertionError("a factor is applied to blocks")

    def _matmat(self, block: Tensor) -> Tensor:
        self.calls += 1
        self.flops += self.operator.cost.flops * block.shape[1]
        return self.operator._matmat(block)


class TestOrderOfApplication:
    @staticmethod
    def cost_in_order(shapes, order) -> float:
        held, flops = math.prod(n for _, n in shapes), 0.0
        for i in order:
            m, n = shapes[i]
            flops, held = flops + 2 * m * held, held // n * m
        return flops

    @PROPERTY
    @given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4))
    def test_no_other_is_cheaper(self, shapes):
        counted = [Counted(ops.Dense(matrix)) for matrix in matrices(shapes)]
        A = Kronecker(*counted)
        A @ sampled(A.shape[1])
        spent = sum(factor.flops for factor in counted)
        orders = itertools.permutations(range(len(shapes)))
        assert spent == min(self.cost_in_order(shapes, order) for order in orders)
        assert spent == pytest.approx(A.cost.flops)

    def test_it_matters(self):
        # 1000 numbers to 10, then to 100; the other way round 1000 to 10000, then to 100.
        shapes = [(100, 10), (1, 100)]
        A = Kronecker(*map(ops.Dense, matrices(shapes)))
        assert A.cost.flops == 10 * 2 * 100 + 1 * 2 * 1000
        assert self.cost_in_order(shapes, (0, 1)) == 100 * 2 * 1000 + 100 * 2 * 100

    def test_evaluations_are_counted(self):
        jacobian = ops.Jacobian(lambda y: y.sum().reshape(1), sampled(4))
        once = jacobian.cost.evaluations
        assert Kronecker(jacobian, ops.Dense(sampled(3, 3))).cost.evaluations == 3 * once


class TestKroneckerSum:
    @PROPERTY
    @given(st.lists(SIZES, min_size=1, max_size=3), st.integers(0, 3))
    def test_is_its_matrix(self, sizes, k):
        factors = matrices([(n, n) for n in sizes])
        A, M = KroneckerSum(*map(ops.Dense, factors)), kron_sum(factors)
        n = len(M)
        assert A.shape == (n, n)
        close(A.to_dense(), M)
        close(A @ sampled(n), M @ sampled(n))
        close(A @ sampled(n, k), M @ sampled(n, k))
        close(A.T.to_dense(), M.T)
        assert isinstance(A.T, KroneckerSum)
        close(A._exact_diagonal(), M.diagonal())
        close(A._exact_trace(), M.trace())
        assert A._exact_logdet() is None
        assert A.cost.flops == 2 * n * sum(sizes) + n * (len(sizes) - 1)

    def test_is_the_operator_of_a_sylvester_equation(self):
        A, B, V = sampled(2, 2), sampled(3, 3), sampled(2, 3)
        result = KroneckerSum(ops.Dense(A), ops.Dense(B)) @ V.reshape(-1)
        close(result.reshape(2, 3), A @ V + V @ B.T)

    @PROPERTY
    @given(st.lists(SIZES, min_size=1, max_size=3), st.floats(0.1, 3))
    def test_logdet_of_symmetric_and_triangular_factors(self, sizes, factor):
        symmetric = [spd(n, seed=i) for i, n in enumerate(sizes)]
        triangular = [matrix.tril() for matrix in symmetric]
        for M, A in (
            (symmetric, KroneckerSum(*(ops.Dense(m, symmetric=True) for m in symmetric))),
            (triangular, KroneckerSum(*(ops.Dense(m, lower_triangular=True) for m in triangular))),
        ):
            expected = torch.linalg.slogdet(factor * kron_sum(M)).logabsdet
            close((factor * A)._exact_logdet(), expected)
        D = ops.Diagonal(sampled(3))
        A = KroneckerSum(D, *(ops.Dense(m, symmetric=True) for m in symmetric))
        expected = torch.linalg.slogdet(kron_sum([D.to_dense(), *symmetric])).logabsdet
        close(A._exact_logdet(), expected)

    @pytest.mark.parametrize(("first", "second"), PAIRS)
    def test_facts(self, first, second):
        a, b = pool()[first], pool(seed=1)[second]
        A = KroneckerSum(a, b)
        assert facts(A) <= true_facts(A.to_dense())
        assert facts(A) == facts(a + b)
        if a.positive_semidefinite and b.positive_semidefinite:
            assert A.positive_definite == (a.positive_definite or b.positive_definite)

    def test_sums_and_multiples_keep_the_factors(self):
        left, right = matrices([(2, 2), (3, 3)]), matrices([(2, 2), (3, 3)], seed=4)
        A, B = KroneckerSum(*map(ops.Dense, left)), KroneckerSum(*map(ops.Dense, right))
        total = A - 2.0 * B
        assert isinstance(total, KroneckerSum)
        close(total.to_dense(), kron_sum(left) - 2.0 * kron_sum(right))
        other = KroneckerSum(*map(ops.Dense, matrices([(3, 3), (2, 2)])))
        assert not isinstance(A + other, KroneckerSum)
        close((A + other).to_dense(), kron_sum(left) + other.to_dense())
        nested = KroneckerSum(A, ops.Dense(sampled(2, 2)))
        assert len(nested.factors) == 3
        close(nested.to_dense(), kron_sum([*left, sampled(2, 2)]))

    @pytest.mark.parametrize("c", [0.5, torch.tensor(0.5, dtype=torch.float64)], ids=repr)
    def test_a_shift_goes_into_a_factor(self, c):
        roots = matrices([(3, 3), (2, 2)])
        factors = [ops.Dense(R @ R.T, positive_semidefinite=True) for R in roots]
        A = KroneckerSum(*factors)
        eye = torch.eye(6, dtype=torch.float64)
        for total in (A + c * ops.Identity(6), c * ops.Identity(6) + A):
            assert isinstance(total, KroneckerSum)
            close(total.to_dense(), A.to_dense() + 0.5 * eye)
            assert total.positive_definite == isinstance(c, float)
            close(total._exact_logdet(), torch.linalg.slogdet(A.to_dense() + 0.5 * eye).logabsdet)

        def logdet(c):
            return (A + c * ops.Identity(6))._exact_logdet()

        def explicit(c):
            return torch.linalg.slogdet(A.to_dense() + c * eye).logabsdet

        at = torch.tensor(0.5, dtype=torch.float64)
        close(torch.func.grad(logdet)(at), torch.func.grad(explicit)(at))

    def test_spectrum_of_the_laplacian(self):
        # Second differences: eigenvalues 2 - 2 cos(k pi / (n + 1)).
        def differences(n: int) -> Tensor:
            off = torch.ones(n - 1, dtype=torch.float64)
            return 2 * torch.eye(n).double() - torch.diag(off, 1) - torch.diag(off, -1)

        sizes = (5, 7)
        A = KroneckerSum(*(ops.Dense(differences(n), positive_definite=True) for n in sizes))
        first, second = (
            2 - 2 * torch.cos(torch.arange(1, n + 1).double() * math.pi / (n + 1)) for n in sizes
        )
        close(A._exact_logdet(), (first[:, None] + second).log().sum())
        mode = torch.sin(torch.arange(1, 6).double() * math.pi / 6)[:, None] * torch.sin(
            torch.arange(1, 8).double() * math.pi / 8
        )
        close(A @ mode.reshape(-1), (first[0] + second[0]) * mode.reshape(-1))

    def test_refusals(self):
        with pytest.raises(ValueError, match=r"factor 1 is Dense\(2, 3\); expected a square"):
            KroneckerSum(ops.Identity(2), ops.Dense(sampled(2, 3)))
        with pytest.raises(ValueError, match="no factor"):
            KroneckerSum()


@pytest.mark.parametrize("kind", [Kronecker, KroneckerSum])
class TestDerivatives:
    shapes = ((2, 2), (3, 3), (2, 2))

    def test_with_respect_to_vectors_and_parameters(self, kind):
        tensors = [matrix.requires_grad_() for matrix in matrices(self.shapes)]
        v = sampled(12).requires_grad_()

        def product(v, *tensors):
            return kind(*map(ops.Dense, tensors)) @ v

        assert torch.autograd.gradcheck(product, (v, *tensors), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(product, (v, *tensors))

    def test_as_a_pytree(self, kind):
        A, v = kind(*map(ops.Dense, matrices(self.shapes))), sampled(12)

        def loss(A):
            return ((A @ v) ** 3).sum()

        direction = tuple(sampled(*t.shape, seed=9) for t in A.tensors)
        tangent = A.with_tensors(direction)
        step = 1e-5
        moved = [
            A.with_tensors(tuple(t + s * d for t, d in zip(A.tensors, direction, strict=True)))
            for s in (step, -step)
        ]
        slope = torch.func.jvp(loss, (A,), (tangent,))[1]
        difference = (loss(moved[0]) - loss(moved[1])) / (2 * step)
        torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-6)
        gradient = torch.func.grad(loss)
        pairs = zip(gradient(A).tensors, direction, strict=True)
        close(sum((g * d).sum() for g, d in pairs), slope)
        # Second order: forward over reverse against differences of gradients.
        curvature = torch.func.jvp(gradient, (A,), (tangent,))[1]
        ends = [gradient(end).tensors for end in moved]
        for hvp, up, down in zip(curvature.tensors, *ends, strict=True):
            torch.testing.assert_close(hvp, (up - down) / (2 * step), rtol=1e-5, atol=1e-5)

    def test_vmap_over_factors_and_vectors(self, kind):
        P, Q, V = sampled(4, 2, 2), sampled(4, 3, 3, seed=1), sampled(4, 6)
        mapped = torch.func.vmap(lambda P, Q, v: kind(ops.Dense(P), ops.Dense(Q)) @ v)(P, Q, V)
        for i in range(4):
            close(mapped[i], kind(ops.Dense(P[i]), ops.Dense(Q[i])) @ V[i])

    def test_of_diagonal_trace_and_logdet(self, kind):
        tensors = [spd(2).requires_grad_(), spd(3, seed=1).requires_grad_()]
        for value in ("_exact_diagonal", "_exact_trace", "_exact_logdet"):

            def known(P, Q, value=value):
                # Symmetric, whichever way an entry is moved.
                factors = (ops.Dense((M + M.T) / 2, symmetric=True) for M in (P, Q))
                return getattr(kind(*factors), value)()

            assert torch.autograd.gradcheck(known, tensors, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(known, tensors)
