"""`BlockDiagonal` and `Block` against their matrices, put together by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from operators import Space
from operators.block import Block, BlockDiagonal, direct_sum

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
SIZES = st.integers(1, 4)
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
    tolerance = 1e-12 if expected.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def spd(n: int, seed: int = 0) -> Tensor:
    root = sampled(n, n, seed=seed)
    return root @ root.T + torch.eye(n, dtype=torch.float64)


def facts(A: ops.LinearOperator) -> set[str]:
    return {fact for fact in FACTS if getattr(A, fact)}


def holds(fact: str, M: Tensor) -> bool:
    """Whether a fact is true of a matrix."""
    symmetric = torch.allclose(M, M.T)
    smallest = float(torch.linalg.eigvalsh((M + M.T) / 2)[0])
    lower, upper = torch.equal(M, M.tril()), torch.equal(M, M.triu())
    return {
        "symmetric": symmetric,
        "positive_semidefinite": symmetric and smallest > -1e-12,
        "positive_definite": symmetric and smallest > 1e-12,
        "diagonal": lower and upper,
        "lower_triangular": lower,
        "upper_triangular": upper,
    }[fact]


def dense_blocks(shapes, seed=0):
    return [ops.Dense(sampled(m, n, seed=seed + i)) for i, (m, n) in enumerate(shapes)]


class TestBlockDiagonal:
    @PROPERTY
    @given(st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=4))
    def test_is_its_matrix(self, shapes):
        blocks = dense_blocks(shapes)
        A, M = BlockDiagonal(*blocks), torch.block_diag(*(block.matrix for block in blocks))
        assert A.block_diagonal
        assert A.T.block_diagonal
        assert A.shape == M.shape
        assert torch.equal(A.to_dense(), M)
        m, n = M.shape
        close(A._matmat(torch.eye(n, dtype=M.dtype)), M)
        close(A @ sampled(n), M @ sampled(n))
        close(A.T @ sampled(m, 2), M.T @ sampled(m, 2))
        close(A.T.to_dense(), M.T)
        assert (A @ sampled(n, 0)).shape == (m, 0)
        if all(p == q for p, q in shapes):
            close(A._exact_diagonal(), M.diagonal())
            close(A._exact_trace(), M.trace())
            close(A._exact_logdet(), torch.linalg.slogdet(M).logabsdet)
        else:
            assert A._exact_diagonal() is A._exact_trace() is A._exact_logdet() is None

    def test_square_of_blocks_that_are_not_has_no_facts_and_no_diagonal(self):
        A = BlockDiagonal(*dense_blocks([(1, 2), (2, 1)]))
        assert A.shape == (3, 3)
        assert not facts(A)
        assert A._exact_diagonal() is None

    @pytest.mark.parametrize(
        ("first", "second", "expected"),
        [
            ("definite", "definite", {"symmetric", "positive_semidefinite", "positive_definite"}),
            ("definite", "singular", {"symmetric", "positive_semidefinite"}),
            ("definite", "symmetric", {"symmetric"}),
            ("definite", "lower", set()),
            ("lower", "lower", {"lower_triangular"}),
            ("lower", "upper", set()),
            ("diagonal", "upper", {"upper_triangular"}),
            ("diagonal", "diagonal", {"symmetric", "diagonal", "lower_triangular"}),
        ],
    )
    def test_facts(self, first, second, expected):
        S = sampled(3, 3)
        pool = {
            "definite": ops.Dense(spd(3), positive_definite=True),
            "singular": ops.Diagonal(torch.tensor([1.0, 0.0]).double()),
            "symmetric": ops.Dense(S + S.T, symmetric=True),
            "lower": ops.Dense(S.tril(), lower_triangular=True),
            "upper": ops.Dense(S.triu(), upper_triangular=True),
            "diagonal": ops.Diagonal(torch.tensor([1.0, -2.0]).double()),
        }
        A = BlockDiagonal(pool[first], pool[second])
        assert expected <= facts(A)
        M = A.to_dense()
        for fact in FACTS:
            assert holds(fact, M) or fact not in facts(A)
        if not expected:
            assert not facts(A)
        if A.symmetric:
            assert A.T is A

    @PROPERTY
    @given(st.lists(st.tuples(SIZES, SIZES, SIZES), min_size=1, max_size=3), st.floats(-2, 2))
    def test_the_algebra_keeps_the_blocks(self, shapes, factor):
        A = BlockDiagonal(*dense_blocks([(m, n) for m, n, _ in shapes]))
        B = BlockDiagonal(*dense_blocks([(m, n) for m, n, _ in shapes], seed=5))
        C = BlockDiagonal(*dense_blocks([(n, k) for _, n, k in shapes], seed=9))
        a, b, c = A.to_dense(), B.to_dense(), C.to_dense()
        left = ops.Diagonal(sampled(A.shape[0]))
        right = ops.Diagonal(sampled(A.shape[1], seed=1))
        for product, expected in (
            (A + B, a + b),
            (A @ C, a @ c),
            (factor * A, factor * a),
            (A - B, a - b),
            (left @ A, left.to_dense() @ a),
            (A @ right, a @ right.to_dense()),
            (2.0 * ops.Identity(A.shape[0]) @ A, 2.0 * a),
        ):
            assert product.block_diagonal
            close(product._matmat(torch.eye(product.shape[1], dtype=torch.float64)), expected)

    @PROPERTY
    @given(st.lists(SIZES, min_size=1, max_size=3))
    def test_damping_keeps_the_blocks_and_makes_them_definite(self, sizes):
        grams = [(J.T @ J) for J in dense_blocks([(1, n) for n in sizes])]
        A = BlockDiagonal(*grams)
        assert A.positive_semidefinite
        assert not A.positive_definite
        damped = A + 0.1 * ops.Identity(A.shape[0])
        assert damped.block_diagonal
        assert damped.positive_definite
        assert all(block.positive_definite for block in damped.blocks)
        M = torch.block_diag(*(gram.to_dense() for gram in grams))
        close(damped.to_dense(), M + 0.1 * torch.eye(len(M), dtype=M.dtype))
        values = ops.Diagonal(sampled(A.shape[0]))
        assert (values + A).block_diagonal
        close((values + A).to_dense(), M + torch.diag(values.values))

    def test_other_partitions_are_ordinary_sums_and_products(self):
        A = BlockDiagonal(*dense_blocks([(2, 2), (3, 3)]))
        B = BlockDiagonal(*dense_blocks([(3, 3), (2, 2)]))
        # Spaces of different partitions are different; on plain vectors they may be combined.
        with pytest.raises(ValueError, match="structures differ"):
            A + B
        D = ops.Dense(sampled(5, 5))
        assert not (A + D).block_diagonal
        assert not (A @ D).block_diagonal
        close((A @ D).to_dense(), A.to_dense() @ D.matrix)
        close((D + A).to_dense(), A.to_dense() + D.matrix)
        J = BlockDiagonal(*dense_blocks([(1, 2), (2, 1)]))
        assert not (J + ops.Identity(3, torch.float64)).block_diagonal

    def test_the_gram_of_blocks_is_blocks_of_grams(self):
        A = BlockDiagonal(*dense_blocks([(3, 2), (1, 2)]))
        gram = A.T @ A
        assert gram.block_diagonal
        assert gram.positive_semidefinite
        close(gram.to_dense(), A.to_dense().T @ A.to_dense())

    def test_nested_domains(self):
        space = Space.of({"a": torch.zeros(2, 2), "b": torch.zeros(1)})
        D = ops.Diagonal(torch.arange(1.0, 6.0), space)
        A = BlockDiagonal(D, ops.Dense(torch.ones(1, 2)))
        x = ({"a": torch.ones(2, 2), "b": torch.ones(1)}, torch.tensor([1.0, 2.0]))
        first, second = A @ x
        assert torch.equal(first["a"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        assert torch.equal(first["b"], torch.tensor([5.0]))
        assert torch.equal(second, torch.tensor([3.0]))
        assert torch.equal(A @ A.domain.ravel(x), torch.tensor([1.0, 2, 3, 4, 5, 3]))
        assert A.T.domain == A.codomain == direct_sum([space, Space.flat(1, torch.float32)])

    def test_damping_on_a_nested_space(self):
        space = Space.of({"a": torch.zeros(2), "b": torch.zeros(1)})
        D = ops.LowRankPlusDiagonal(torch.ones(1, 3), 1.0, space=space)
        A = BlockDiagonal(D, D) + 0.5 * ops.Identity(6)
        assert A.domain == direct_sum([space, space])
        assert all(block.low_rank_plus_diagonal for block in A.blocks)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_an_identity_of_a_size_takes_the_dtype_of_the_rest(self, dtype):
        A = BlockDiagonal(ops.Identity(1), ops.Dense(sampled(2, 2, dtype=dtype)))
        assert A.dtype == A.to_dense().dtype == A._exact_logdet().dtype == dtype

    def test_cost_is_that_of_the_blocks(self):
        assert BlockDiagonal(*dense_blocks([(2, 3), (4, 5)])).cost.flops == 2 * (6 + 20)

    def test_refusals(self):
        with pytest.raises(ValueError, match="no block; expected at least one"):
            BlockDiagonal()
        with pytest.raises(TypeError, match="block 1 is a Tensor; expected a LinearOperator"):
            BlockDiagonal(ops.Identity(2), torch.eye(2))
        message = r"block 1 is Dense\(2, 2\) \(torch.float64 on cpu\), but Dense\(1, 1\) is torch.f"
        with pytest.raises(TypeError, match=message):
            BlockDiagonal(ops.Dense(torch.ones(1, 1)), ops.Dense(sampled(2, 2)))
        with pytest.raises(ValueError, match="no space"):
            direct_sum([])
        flat = Space.flat
        with pytest.raises(TypeError, match=r"float32 on cpu and torch\.float64 on cpu"):
            direct_sum([flat(1, torch.float32), flat(1, torch.float64)])


class TestBlock:
    @PROPERTY
    @given(
        st.lists(SIZES, min_size=1, max_size=3), st.lists(SIZES, min_size=1, max_size=3), st.data()
    )
    def test_is_its_matrix(self, heights, widths, data):
        rows, matrices = [], []
        for i, m in enumerate(heights):
            rows.append([])
            matrices.append([])
            for j, n in enumerate(widths):
                # Each row and column has something in it.
                empty = i != j % len(heights) and j != i % len(widths) and data.draw(st.booleans())
                matrix = sampled(m, n, seed=10 * i + j)
                rows[-1].append(None if empty else ops.Dense(matrix))
                matrices[-1].append(torch.zeros(m, n, dtype=torch.float64) if empty else matrix)
        A, M = Block(rows), torch.cat([torch.cat(row, 1) for row in matrices])
        m, n = M.shape
        close(A.to_dense(), M)
        close(A @ sampled(n), M @ sampled(n))
        close(A.T @ sampled(m), M.T @ sampled(m))
        close((-2.0 * A).to_dense(), -2.0 * M)
        assert isinstance(A.T, Block)
        assert isinstance(-2.0 * A, Block)
        assert not facts(A)
        if heights == widths:
            close(A._exact_diagonal(), M.diagonal())
        filled = [block for row in rows for block in row if block is not None]
        assert A.operands == tuple(filled)
        assert A.cost.flops == sum(2 * block.matrix.numel() for block in filled)

    def test_nested_domain_wins_over_plain_vectors(self):
        space = Space.of({"a": torch.zeros(2), "b": torch.zeros(1)})
        D = ops.Diagonal(torch.arange(1.0, 4.0), space)
        A = Block([[ops.Dense(torch.ones(1, 3))], [D]])
        (result,) = [A @ ({"a": torch.ones(2), "b": torch.ones(1)},)]
        assert torch.equal(result[0], torch.tensor([3.0]))
        assert torch.equal(result[1]["a"], torch.tensor([1.0, 2.0]))
        assert A.domain == direct_sum([space])

    def test_refusals(self):
        A, B = ops.Dense(torch.ones(2, 3)), ops.Dense(torch.ones(2, 2))
        with pytest.raises(ValueError, match=r"rows have \[1, 2\] blocks"):
            Block([[A], [A, A]])
        with pytest.raises(ValueError, match=r"rows have \[\] blocks"):
            Block([])
        with pytest.raises(ValueError, match="column 1 of blocks holds only None"):
            Block([[A, None]])
        with pytest.raises(ValueError, match="row 1 of blocks holds only None"):
            Block([[A], [None]])
        message = r"Dense\(2, 3\) and Dense\(2, 2\) in column 0 of blocks do not fit: their domains"
        with pytest.raises(ValueError, match=message):
            Block([[A], [B]])
        message = r"Dense\(2, 3\) and Dense\(3, 2\) in row 0 of blocks do not fit: their codomains"
        with pytest.raises(ValueError, match=message):
            Block([[A, A.T]])
        first = Space.of({"a": torch.zeros(2)})
        second = Space.of({"b": torch.zeros(2)})
        one = torch.tensor(1.0)
        with pytest.raises(ValueError, match="in column 0 of blocks do not fit"):
            Block([[ops.Diagonal(one, first)], [ops.Diagonal(one, second)]])


def make(kind: str, tensors: tuple[Tensor, ...]) -> ops.LinearOperator:
    P, Q = (ops.Dense(tensor) for tensor in tensors)
    return BlockDiagonal(P, Q) if kind == "BlockDiagonal" else Block([[P, None], [Q, P]])


@pytest.mark.parametrize("kind", ["BlockDiagonal", "Block"])
class TestDerivatives:
    def test_with_respect_to_vectors_and_parameters(self, kind):
        P, Q = sampled(2, 2).requires_grad_(), sampled(2, 2, seed=1).requires_grad_()
        v = sampled(4).requires_grad_()

        def product(P, Q, v):
            return make(kind, (P, Q)) @ v

        assert torch.autograd.gradcheck(product, (P, Q, v), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(product, (P, Q, v))

    def test_as_a_pytree(self, kind):
        A, v = make(kind, (sampled(2, 2), sampled(2, 2, seed=1))), sampled(4)
        gradient = torch.func.grad(lambda A: ((A @ v) ** 2).sum())(A)
        step, direction = 1e-6, tuple(sampled(*t.shape, seed=3) for t in A.tensors)
        moved = [
            A.with_tensors(tuple(t + s * d for t, d in zip(A.tensors, direction, strict=True)))
            for s in (step, -step)
        ]
        difference = (((moved[0] @ v) ** 2).sum() - ((moved[1] @ v) ** 2).sum()) / (2 * step)
        slope = sum((g * d).sum() for g, d in zip(gradient.tensors, direction, strict=True))
        torch.testing.assert_close(slope, difference, rtol=1e-7, atol=1e-7)

    def test_vmap_over_operators_and_vectors(self, kind):
        P, Q, V = sampled(3, 2, 2), sampled(3, 2, 2, seed=1), sampled(3, 4)
        mapped = torch.func.vmap(lambda P, Q, v: make(kind, (P, Q)) @ v)(P, Q, V)
        for i in range(3):
            close(mapped[i], make(kind, (P[i], Q[i])) @ V[i])


def test_derivative_of_diagonal_trace_and_logdet():
    P, Q = spd(2).requires_grad_(), sampled(3, 3).requires_grad_()
    for value in ("_exact_diagonal", "_exact_trace", "_exact_logdet"):
        assert torch.autograd.gradcheck(
            lambda P, Q, value=value: getattr(make("BlockDiagonal", (P, Q)), value)(), (P, Q)
        )
