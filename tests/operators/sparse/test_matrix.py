"""`Sparse` against dense matrices and scipy: doors, products, algebra, derivatives, facts."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from operators import FalseClaimError, Space
from operators.sparse import csr
from operators.sparse.matrix import Sparse
from operators.sparse.pattern import Pattern

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
FORMATS = ["coo", "csr", "csc", "bsr", "dia", "lil", "dok"]


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def matrix_of(m: int, n: int, density: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normal(seed, m, n) * (torch.rand(m, n, generator=generator) < density)


@st.composite
def matrices(draw, shape=None):
    """Dense matrices with zeros: empty, wide, tall, with empty rows, without any zero."""
    m, n = shape or (draw(st.integers(0, 6)), draw(st.integers(0, 6)))
    return matrix_of(m, n, draw(st.sampled_from([0.0, 0.2, 0.5, 1.0])), draw(st.integers(0, 999)))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def laplacian(n: int) -> Sparse:
    grid = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(n, n))
    return Sparse(grid, symmetric=True, positive_definite=True)


# --- doors ------------------------------------------------------------------------------------


@PROPERTY
@given(matrices())
def test_is_its_matrix(matrix):
    A = Sparse(matrix)
    m, n = matrix.shape
    assert A.nnz == int((matrix != 0).sum())
    assert A.sparse
    close(A.to_dense(), matrix)
    for v in (normal(0, n), normal(1, n, 3), normal(2, n, 0)):
        close(A @ v, matrix @ v)
    for u in (normal(0, m), normal(1, m, 3)):
        close(A.T @ u, matrix.T @ u)
        if u.ndim == 1:
            close(A._rmatvec(u), matrix.T @ u)
    close(A.T.T.to_dense(), matrix)
    assert A.T.sparse
    assert A.T.T.pattern is A.pattern


@PROPERTY
@given(matrices())
def test_every_torch_layout_and_back(matrix):
    with_index = [torch.int32, torch.int64]
    forms = [matrix, matrix.to_sparse_coo(), matrix.to_sparse_csr(), matrix.to_sparse_csc()]
    for dtype in with_index:
        by_rows, by_columns = forms[2], forms[3]
        indices = by_rows.crow_indices().to(dtype), by_rows.col_indices().to(dtype)
        made = torch.sparse_csr_tensor(
            *indices, by_rows.values(), size=matrix.shape, check_invariants=True
        )
        forms.append(made)
        indices = by_columns.ccol_indices().to(dtype), by_columns.row_indices().to(dtype)
        made = torch.sparse_csc_tensor(
            *indices, by_columns.values(), size=matrix.shape, check_invariants=True
        )
        forms.append(made)
    for form in forms:
        for A in (Sparse(form), Sparse.from_torch(form)):
            close(A.to_dense(), matrix)
            assert A.pattern.columns.dtype == torch.int64
    for layout in ("csr", "csc", "coo"):
        tensor = Sparse(matrix).to_torch(layout)
        assert str(tensor.layout) == f"torch.sparse_{layout}"
        close(tensor.to_dense(), matrix)


@PROPERTY
@given(matrices(), st.sampled_from(FORMATS), st.sampled_from([np.int32, np.int64]))
def test_every_scipy_format_and_back(matrix, form, index):
    given_array = scipy.sparse.csr_array(matrix.numpy()).asformat(form)
    if form in ("csr", "csc"):
        given_array.indices = given_array.indices.astype(index)
        given_array.indptr = given_array.indptr.astype(index)
    before = given_array.toarray()
    for A in (Sparse(given_array), Sparse.from_scipy(given_array)):
        close(A.to_dense(), matrix)
    assert (given_array.toarray() == before).all()
    A = Sparse(matrix)
    for back in ("csr", "csc", "coo"):
        array = A.to_scipy(back)
        assert array.format == back
        assert (array.toarray() == matrix.numpy()).all()
        held = [array.row, array.col] if back == "coo" else [array.indices, array.indptr]
        assert {indices.dtype for indices in held} == {np.dtype(np.int32)}
        V = normal(0, matrix.shape[1], 2)
        close(torch.from_numpy(array @ V.numpy()), A @ V)


def test_dtypes_and_spmatrix():
    old = scipy.sparse.csr_matrix(np.array([[1, 0], [2, 3]]))
    A = Sparse.from_scipy(old, dtype=torch.float32)
    assert A.dtype == torch.float32
    close(A.to_dense(), torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
    half = Sparse.from_scipy(old.astype(np.float64), dtype=torch.bfloat16)
    assert (half @ torch.ones(2, dtype=torch.bfloat16)).tolist() == [1.0, 5.0]
    longest = Sparse.from_scipy(old.astype(np.longdouble))
    assert longest.dtype == torch.float64


def test_duplicates_are_summed():
    rows, columns = torch.tensor([1, 0, 1, 1]), torch.tensor([0, 1, 0, 2])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    expected = torch.tensor([[0.0, 2.0, 0.0], [4.0, 0.0, 4.0]], dtype=torch.float64)
    coo = torch.sparse_coo_tensor(
        torch.stack([rows, columns]), values, size=(2, 3), check_invariants=True
    )
    held = scipy.sparse.coo_array((values.numpy(), (rows.numpy(), columns.numpy())), shape=(2, 3))
    unmerged = scipy.sparse.csr_array(([4.0, 1.0, 3.0, 2.0], [2, 0, 0, 1], [0, 0, 4]), shape=(2, 3))
    for A in (
        Sparse.from_coo(rows, columns, values, (2, 3)),
        Sparse.from_coo(rows.int(), columns.int(), values, (2, 3)),
        Sparse(coo),
        Sparse(held),
    ):
        assert A.nnz == 3
        close(A.to_dense(), expected)
    close(Sparse(unmerged).to_dense(), torch.from_numpy(unmerged.toarray()))
    assert unmerged.nnz == 4  # the caller's matrix is left as it was
    # Unsorted columns within a row, which torch does not refuse unless it is asked to look.
    pointers = torch.tensor([0, 3])
    unsorted = torch.sparse_csr_tensor(
        pointers, torch.tensor([2, 0, 1]), values[:3], size=(1, 3), check_invariants=False
    )
    assert Sparse(unsorted).to_dense().tolist() == [[2.0, 3.0, 1.0]]


def test_doors_share_memory_where_layouts_allow():
    matrix = matrix_of(5, 4, 0.5, 0)
    rows, coo = matrix.to_sparse_csr(), matrix.to_sparse_coo()
    array = scipy.sparse.csr_array(matrix.numpy())
    A = Sparse(rows)
    assert A.values.data_ptr() == rows.values().data_ptr()
    assert A.pattern.columns.data_ptr() == rows.col_indices().data_ptr()
    assert Sparse(coo).values.data_ptr() == coo.values().data_ptr()
    assert np.shares_memory(Sparse(array).values.numpy(), array.data)
    assert A.to_torch("csr").values().data_ptr() == A.values.data_ptr()
    assert np.shares_memory(A.to_scipy("csr").data, A.values.numpy())
    symmetric = laplacian(5)
    assert np.shares_memory(symmetric.to_scipy("csc").data, symmetric.values.numpy())
    assert not np.shares_memory(A.to_scipy("csc").data, A.values.numpy())


def test_gradients_pass_the_doors():
    values = normal(0, 3).requires_grad_()
    rows, columns = torch.tensor([1, 0, 1]), torch.tensor([0, 1, 0])
    v = normal(1, 2)

    def product(values):
        coo = torch.sparse_coo_tensor(
            torch.stack([rows, columns]), values, size=(2, 2), check_invariants=True
        )
        return Sparse(coo) @ v

    assert torch.autograd.gradcheck(product, (values,))
    assert torch.autograd.gradcheck(
        lambda values: Sparse.from_coo(rows, columns, values, (2, 2)) @ v, (values,)
    )
    matrix = torch.tensor([[1.0, 0.0], [2.0, 3.0]], requires_grad=True)
    gradient = torch.func.grad(lambda M: (Sparse(M) @ torch.ones(2)).square().sum())(matrix)
    assert gradient.tolist() == [[2.0, 0.0], [10.0, 10.0]]  # at the nonzeros alone
    for layout in ("csr", "csc", "coo"):
        A = Sparse(matrix.detach().double())
        held = A.values.clone().requires_grad_()
        (A.with_tensors((held,)).to_torch(layout).values() * 2).sum().backward()
        assert held.grad.tolist() == [2.0, 2.0, 2.0]


# --- algebra ----------------------------------------------------------------------------------


@PROPERTY
@given(st.data(), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.floats(-3, 3))
def test_algebra_stays_sparse(data, m, n, k, factor):
    a, b = data.draw(matrices((m, n))), data.draw(matrices((m, n)))
    c, square = data.draw(matrices((n, k))), data.draw(matrices((n, n)))
    A, B, C, S = Sparse(a), Sparse(b), Sparse(c), Sparse(square)
    d = normal(0, n)
    D, E = ops.Diagonal(d), ops.Diagonal(normal(1, m))
    eye = torch.eye(n, dtype=torch.float64)
    for result, expected in (
        (A + B, a + b),
        (A - factor * B, a - factor * b),
        (A / 2, a / 2),
        (A @ C, a @ c),
        (A @ S @ C, a @ square @ c),
        (A.T @ B, a.T @ b),
        (A @ D, a * d),
        (E @ A, E.values[:, None] * a),
        (S + D, square + torch.diag(d)),
        (D + S, square + torch.diag(d)),
        (D - S, torch.diag(d) - square),
        (S + factor * ops.Identity(n), square + factor * eye),
        (ops.Identity(n) @ C, c),
        (A @ ops.Identity(n), a),
        (A @ (2.0 * ops.Identity(n)), 2 * a),
        (A.T @ A, a.T @ a),
        (A @ A.T, a @ a.T),
        (A @ D @ A.T, a @ torch.diag(d) @ a.T),
        (A.T @ E @ A, a.T @ torch.diag(E.values) @ a),
    ):
        assert isinstance(result, Sparse)
        assert result.sparse
        close(result.to_dense(), expected)
        v = normal(2, result.shape[1])
        close(result @ v, expected @ v)
        if result.symmetric:
            close(result.to_dense(), result.to_dense().T, 1e-13)
    for result in (A.T @ A, A @ A.T, (A.T.T).T @ A):
        close(result.to_dense(), result.to_dense().T, 0.0)
    assert (A.T @ A).positive_semidefinite
    assert (A @ A.T).positive_semidefinite
    squares = ops.Diagonal(d.square())
    assert (A @ squares @ A.T).positive_semidefinite
    assert (A @ D @ A.T).symmetric
    assert (A @ D @ A.T).positive_semidefinite == D.positive_semidefinite
    assert not (A.T @ B).symmetric or (A.T @ B).diagonal
    assert (A.T @ A + ops.Identity(n)).positive_definite


def test_weights_of_a_congruence_need_not_be_diagonal():
    J, W = Sparse(matrix_of(6, 4, 0.5, 0)), laplacian(6)
    A = J.T @ W @ J
    assert A.positive_semidefinite
    close(A.to_dense(), J.to_dense().T @ W.to_dense() @ J.to_dense())
    assert not (J.T @ Sparse(matrix_of(6, 6, 0.5, 1)) @ J).symmetric
    other = Sparse(matrix_of(6, 4, 0.5, 2))
    assert not (J.T @ W @ other).symmetric


def test_a_symmetric_square_is_semidefinite():
    A = laplacian(5) - 2.5 * ops.Identity(5)
    assert A.symmetric
    assert not A.positive_semidefinite
    assert (A @ A).positive_semidefinite
    close((A @ A).to_dense(), A.to_dense() @ A.to_dense())


def test_products_and_sums_are_worked_out_once_for_a_pattern(monkeypatch):
    sorts = []
    original = csr.counted
    monkeypatch.setattr(csr, "counted", lambda *a, **k: sorts.append(a) or original(*a, **k))
    A, B = Sparse(matrix_of(6, 6, 0.5, 0)), Sparse(matrix_of(6, 6, 0.5, 1))
    first = [A @ B, A + B, A.T @ A, A + ops.Identity(6)]
    assert sorts
    sorts.clear()
    C = Sparse(normal(2, A.nnz), A.pattern)
    second = [C @ B, C + B, C.T @ C, C + ops.Identity(6)]
    assert not sorts
    for one, other in zip(first, second, strict=True):
        assert other.pattern is one.pattern
    c, b = C.to_dense(), B.to_dense()
    expected = [c @ b, c + b, c.T @ c, c + torch.eye(6, dtype=c.dtype)]
    for operator, matrix in zip(second, expected, strict=True):
        close(operator.to_dense(), matrix)


def test_nested_spaces_are_kept():
    space = Space.of({"w": torch.zeros(2, 2), "b": torch.zeros(1)})
    matrix = matrix_of(5, 5, 0.5, 0).float()
    values, pattern = Sparse(matrix).values, Sparse(matrix).pattern
    A = Sparse(values, pattern, domain=space, codomain=space)
    flat = Sparse(matrix)
    for result in (
        2.0 * A,
        A + ops.Identity(5),
        A + flat,
        flat + A,
        A @ A,
        A.T,
        A @ ops.Identity(5),
    ):
        assert isinstance(result, Sparse)
        assert result.domain == space
        assert result.codomain == space
    image = A @ {"w": torch.ones(2, 2), "b": torch.ones(1)}
    close(space.ravel(image), matrix @ torch.ones(5), 1e-6)


def test_other_operators_fall_back():
    A, D = Sparse(matrix_of(4, 4, 0.5, 0)), ops.Dense(normal(1, 4, 4))
    close((A + D).to_dense(), A.to_dense() + D.matrix)
    close((A @ D).to_dense(), A.to_dense() @ D.matrix)
    close((D @ A).to_dense(), D.matrix @ A.to_dense())


def test_wider_scalars_do_not_widen():
    A = Sparse(torch.tensor([[1.0, 2.0]]))
    assert (torch.tensor(2.0, dtype=torch.float64) * A).values.dtype == torch.float32


# --- facts ------------------------------------------------------------------------------------


def test_the_pattern_shows_triangles():
    lower = Sparse(matrix_of(5, 5, 1.0, 0).tril())
    assert lower.lower_triangular
    assert not lower.upper_triangular
    assert lower.T.upper_triangular
    assert (lower @ lower).lower_triangular
    assert (lower + ops.Identity(5)).lower_triangular
    assert Sparse(torch.diag(normal(0, 4))).diagonal
    # Nobody knew that before the product was made.
    shift = torch.zeros(3, 3)
    shift[0, 1] = shift[1, 2] = 1.0
    assert (Sparse(shift).T @ Sparse(shift)).diagonal
    wide = Sparse(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]))
    assert not wide.lower_triangular  # a fact about square operators


def test_exact_answers():
    matrix = matrix_of(6, 6, 0.5, 0)
    A = Sparse(matrix)
    close(A._exact_diagonal(), matrix.diagonal())
    close(A._exact_trace(), matrix.trace())
    assert A._exact_logdet() is None
    assert Sparse(matrix[:4])._exact_diagonal() is None
    assert Sparse(matrix[:4])._exact_trace() is None
    triangle = matrix_of(6, 6, 0.8, 1).tril(-1) + torch.diag(normal(2, 6))
    logdet = torch.linalg.slogdet(triangle).logabsdet
    close(Sparse(triangle)._exact_logdet(), logdet)
    close(Sparse(triangle.T)._exact_logdet(), logdet)
    L = Sparse(triangle)
    values = L.values.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: Sparse(a, L.pattern)._exact_logdet(), (values,))
    assert torch.autograd.gradcheck(lambda a: Sparse(a, L.pattern)._exact_trace(), (values,))


def test_symmetry_is_compared_at_once():
    matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    assert Sparse(matrix, symmetric=True).T.symmetric
    with pytest.raises(FalseClaimError, match=r"max \|A - A\^T\| = 0.5"):
        Sparse(matrix + torch.tensor([[0.0, 0.5], [0.0, 0.0]]), symmetric=True)
    with pytest.raises(FalseClaimError, match="its pattern is not"):
        Sparse(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), positive_definite=True)
    # Rounding passes, and what differs between the items of a vmap cannot be read.
    Sparse(matrix + torch.tensor([[0.0, 1e-7], [0.0, 0.0]]), symmetric=True)
    pattern = Sparse(matrix).pattern

    def product(values):
        return Sparse(values, pattern, symmetric=True) @ torch.ones(2)

    batch = torch.ones(3, 4)
    close(torch.func.vmap(product)(batch), torch.full((3, 2), 2.0))


def test_definiteness_is_probed_at_the_first_use():
    A = Sparse(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), positive_definite=True)
    for use in (lambda A: A @ torch.ones(2), lambda A: (2.0 * A) @ torch.ones(2), Sparse.to_dense):
        with pytest.raises(FalseClaimError, match="claimed positive definite"):
            use(A)
    laplacian(30) @ normal(0, 30)


@pytest.mark.parametrize(
    "combine",
    [
        lambda A, S, D: -A,
        lambda A, S, D: A.T @ A,
        lambda A, S, D: A @ D,
        lambda A, S, D: D @ A,
        lambda A, S, D: A + S,
        lambda A, S, D: A @ S,
        lambda A, S, D: S.T @ A @ S,
        lambda A, S, D: A + 4.0 * ops.Identity(2),
    ],
)
def test_a_false_claim_is_found_out_whatever_is_made_of_it(combine):
    """Also where what is made of it does not have the fact; that of ``S^T A S`` would survive."""
    A = Sparse(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), positive_definite=True)
    S, D = Sparse(torch.tensor([[1.0, 1.0], [0.0, 1.0]])), ops.Diagonal(torch.tensor([1.0, 2.0]))
    with pytest.raises(FalseClaimError, match=r"Sparse\(2, 2\) is claimed positive definite"):
        combine(A, S, D) @ torch.ones(2)
    E = ops.Diagonal(torch.tensor([1.0, -1.0]), positive_definite=True)
    for combine_diagonal in (lambda: E + S, lambda: E @ S, lambda: S @ E):
        with pytest.raises(FalseClaimError, match=r"Diagonal\(2, 2\) is claimed"):
            combine_diagonal() @ torch.ones(2)


class TestPermutations:
    P = ops.Permutation(torch.tensor([2, 0, 3, 1]))
    M = torch.tensor(
        [[4.0, 1, 0, 0], [1, 4, 2, 0], [0, 2, 4, 0], [0, 0, 0, 1]], dtype=torch.float64
    )
    A = Sparse(M, positive_definite=True)

    def test_products_are_sparse(self):
        M, Q = self.A.to_dense(), self.P.to_dense().double()
        for product, matrix in (
            (self.P @ self.A, Q @ M),
            (self.A @ self.P, M @ Q),
            (self.P @ self.A @ self.P.T, Q @ M @ Q.T),
            (self.P.T @ (self.A @ self.P), Q.T @ M @ Q),
        ):
            assert type(product) is Sparse
            assert product.nnz == self.A.nnz
            assert torch.equal(product.to_dense(), matrix)

    def test_a_renumbering_keeps_the_facts(self):
        renumbered = self.P @ self.A @ self.P.T
        assert renumbered.positive_definite
        assert renumbered.pattern.symmetric
        assert not (self.P @ self.A).symmetric

    def test_derivatives(self):
        v = torch.arange(4.0, dtype=torch.float64)

        def total(values):
            A = Sparse(values, self.A.pattern)
            return ((self.P @ A @ self.P.T) @ v).square().sum()

        check_gradients(total, self.A.values)


def test_cost_and_printing():
    A = laplacian(4)
    assert A.cost == ops.Cost(flops=20)
    assert str(A) == "Sparse(4, 4) float64; positive definite; 10 nonzeros; 20 flop"


# --- derivatives ------------------------------------------------------------------------------


def check_gradients(function, *arguments: Tensor) -> None:
    arguments = tuple(argument.clone().requires_grad_() for argument in arguments)
    assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, arguments, check_fwd_over_rev=True)


def test_gradients_of_every_operation():
    A, B = Sparse(matrix_of(4, 4, 0.5, 0)), Sparse(matrix_of(4, 4, 0.5, 1))
    P, Q, v, d = A.pattern, B.pattern, normal(2, 4), normal(3, 4)
    block, c = normal(4, 4, 2), normal(5)
    check_gradients(lambda a, v: Sparse(a, P) @ v, A.values, v)
    check_gradients(lambda a, v: Sparse(a, P) @ v, A.values, block)
    check_gradients(lambda a, v: Sparse(a, P).T @ v, A.values, v)
    check_gradients(lambda a, b: (Sparse(a, P) @ Sparse(b, Q)).values, A.values, B.values)
    check_gradients(lambda a, b: (Sparse(a, P) + Sparse(b, Q)).values, A.values, B.values)
    check_gradients(lambda a, d: (Sparse(a, P) + ops.Diagonal(d)) @ v, A.values, d)
    check_gradients(lambda a, d: (ops.Diagonal(d) @ Sparse(a, P)) @ v, A.values, d)
    check_gradients(lambda a, d: (Sparse(a, P) @ ops.Diagonal(d)) @ v, A.values, d)
    check_gradients(lambda a: (Sparse(a, P).T @ Sparse(a, P)) @ v, A.values)

    def gram(a):
        J = Sparse(a, P)
        return (J.T @ J + 0.1 * ops.Identity(4)).values

    check_gradients(gram, A.values)
    check_gradients(lambda c, a: (c * Sparse(a, P)) @ v, c, A.values)
    check_gradients(lambda a: Sparse(a, P).to_dense(), A.values)


def test_gradient_by_central_differences():
    A, v = Sparse(matrix_of(5, 6, 0.5, 0)), normal(1, 6)

    def loss(values):
        J = A.with_tensors((values,))
        return ((J.T @ J) @ v).square().sum() + (J @ v).sin().sum()

    gradient, step = torch.func.grad(loss)(A.values), 1e-5
    for k, unit in enumerate(torch.eye(A.nnz, dtype=torch.float64)):
        difference = (loss(A.values + step * unit) - loss(A.values - step * unit)) / (2 * step)
        close(gradient[k], difference, 1e-7)


def test_vmap_over_values_operators_and_vectors():
    A = Sparse(matrix_of(4, 5, 0.5, 0))
    batch, V = normal(1, 3, A.nnz), normal(2, 3, 5)
    expected = torch.stack([Sparse(a, A.pattern) @ v for a, v in zip(batch, V, strict=True)])
    mapped = torch.func.vmap(lambda a, v: Sparse(a, A.pattern) @ v)(batch, V)
    close(mapped, expected)
    operators = A.with_tensors((batch,))
    close(torch.func.vmap(lambda A, v: A @ v)(operators, V), expected)
    close(torch.func.vmap(lambda v: A @ v)(V), V @ A.to_dense().T)

    def solved(a, d):
        J = Sparse(a, A.pattern)
        M = J.T @ J + ops.Diagonal(d, positive_definite=True)
        return M @ d, M._exact_trace(), M.T.to_dense(), J.T @ (J @ d)

    D = normal(3, 3, 5).square()
    for mapped, rows in zip(
        torch.func.vmap(solved)(batch, D),
        zip(*(solved(a, d) for a, d in zip(batch, D, strict=True)), strict=True),
        strict=True,
    ):
        close(mapped, torch.stack(rows))
    gradient = torch.func.vmap(torch.func.grad(lambda a, d: solved(a, d)[0].sum()))
    one = torch.func.grad(lambda a, d: solved(a, d)[0].sum())
    each = torch.stack([one(a, d) for a, d in zip(batch, D, strict=True)])
    close(gradient(batch, D), each)


def test_jvp_of_vjp_with_respect_to_an_operator():
    A, v = Sparse(matrix_of(4, 4, 0.5, 0)), normal(1, 4)
    B = A.with_tensors((normal(2, A.nnz),))

    def loss(A):
        return (A.T @ (A @ v)).square().sum()

    _, sparse = torch.func.jvp(torch.func.grad(loss), (A,), (B,))

    def dense_loss(matrix):
        return (matrix.T @ (matrix @ v)).square().sum()

    _, dense = torch.func.jvp(torch.func.grad(dense_loss), (A.to_dense(),), (B.to_dense(),))
    close(sparse.values, dense[A.pattern.rows, A.pattern.columns])


def test_the_kept_transpose_follows_the_values():
    values = normal(0, 4)
    pattern, _ = Pattern.of(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 1, 2]), (2, 3))
    A, u = Sparse(values, pattern), normal(1, 2)
    A.T @ u
    held = A._reordered
    assert held is not None
    A.T @ u
    assert A._reordered is held
    values.mul_(3.0)  # an optimiser's step
    close(A.T @ u, A.to_dense().T @ u)
    # What is kept has no graph: with one, a second backward would find it freed.
    values.requires_grad_()
    with torch.no_grad():
        A.T @ u
    for _ in range(2):
        values.grad = None
        (A.T @ u).square().sum().backward()
        close(values.grad, 2 * (A.T @ u)[pattern.columns].detach() * u[pattern.rows])
    tangent = normal(2, 4)
    _, forward = torch.func.jvp(
        lambda a: A.with_tensors((a,)).T @ u, (values.detach(),), (tangent,)
    )
    close(forward, Sparse(tangent, pattern).to_dense().T @ u)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(values.detach(), tangent)
        image = Sparse(dual, pattern).T @ u
        close(torch.autograd.forward_ad.unpack_dual(image).tangent, forward)
    with torch.inference_mode():
        B = Sparse(values.detach().clone(), pattern)
        close(B.T @ u, B.to_dense().T @ u)


# --- errors -----------------------------------------------------------------------------------

EYE = Pattern.eye(2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Sparse(torch.ones(2)), ValueError, "there is no pattern; give"),
        (lambda: Sparse(torch.ones(2, 2, 2)), ValueError, r"shape \(2, 2, 2\); expected \(m, n\)"),
        (lambda: Sparse(torch.ones(2, 2).int()), TypeError, "torch.int32; expected a floating"),
        (lambda: Sparse([1.0]), TypeError, "matrix is a list; expected a scipy"),
        (lambda: Sparse(np.eye(2)), TypeError, "matrix is a ndarray; expected a scipy"),
        (lambda: Sparse(torch.ones(3), EYE), ValueError, r"shape \(3,\); expected \(2,\) for Pat"),
        (lambda: Sparse(torch.ones(2), "eye"), TypeError, "pattern is a str; expected a Pattern"),
        (lambda: Sparse([1.0, 2.0], EYE), TypeError, "values is list; with a pattern"),
        (lambda: Sparse(torch.ones(2).int(), EYE), TypeError, "dtype torch.int32"),
        (
            lambda: Sparse(torch.ones(2), EYE, domain=Space.flat(3, torch.float32)),
            ValueError,
            "domain has size 3; expected 2",
        ),
        (
            lambda: Sparse(torch.ones(2), EYE, codomain=Space.flat(2, torch.float64)),
            TypeError,
            "codomain has dtype torch.float64",
        ),
        (
            lambda: Sparse(torch.ones(2, device="meta"), EYE),
            TypeError,
            r"values is on meta, but pattern on cpu; use pattern.to",
        ),
        (
            lambda: Sparse(torch.ones(2, 2).to_sparse_bsr((1, 1))),
            TypeError,
            "tensor is torch.sparse_bsr; expected COO",
        ),
        (
            lambda: Sparse(
                torch.sparse_coo_tensor(
                    torch.zeros(1, 1).long(), torch.ones(1, 2), check_invariants=True
                )
            ),
            ValueError,
            "1 sparse and 1 dense axes",
        ),
        (lambda: Sparse(scipy.sparse.eye_array(2, dtype=int)), TypeError, "or say dtype="),
        (lambda: Sparse(scipy.sparse.eye_array(2, dtype=complex)), TypeError, "complex128; expect"),
        (lambda: Sparse(scipy.sparse.coo_array(np.ones(3))), ValueError, r"shape \(3,\)"),
        (
            lambda: Sparse.from_scipy(scipy.sparse.eye_array(2), dtype=torch.int64),
            TypeError,
            "dtype=torch.int64; expected a floating",
        ),
        (lambda: Sparse.from_torch(np.eye(2)), TypeError, "tensor is a ndarray"),
        (
            lambda: Sparse.from_coo(
                torch.zeros(2).long(), torch.zeros(2).long(), torch.ones(3), (1, 1)
            ),
            ValueError,
            r"values has shape \(3,\); expected that of rows, \(2,\)",
        ),
        (lambda: Sparse(torch.ones(2), EYE).to_torch("bsr"), ValueError, "layout='bsr'; expected"),
        (lambda: Sparse(torch.ones(2), EYE).to_scipy("lil"), ValueError, "format='lil'; expected"),
        (lambda: Sparse(torch.ones(2, 3), symmetric=True), ValueError, "but the shape is"),
        (
            lambda: torch.func.vmap(lambda M: Sparse(M) @ torch.ones(2))(torch.ones(3, 2, 2)),
            ValueError,
            "dense and mapped over by vmap",
        ),
        (lambda: Sparse(torch.ones(2), EYE) @ torch.ones(3), ValueError, r"of shape \(3,\)"),
        (lambda: Sparse(torch.ones(2), EYE) @ torch.ones(2).double(), TypeError, "float64"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_inside_a_function_whose_pattern_is_looked_for():
    """The kernel of the product is no operation that a recorded graph could tell apart."""
    pattern = ops.stencil((4, 4), ops.FIVE_POINT)
    values = torch.arange(1.0, pattern.nnz + 1, dtype=torch.float64)
    S, u = Sparse(values, pattern), torch.linspace(-1, 1, 16, dtype=torch.float64)

    def residual(u):
        return S @ u + ops.Permutation(torch.arange(16), dtype=u.dtype) @ u**3

    def energy(u):
        return (u * (S @ u)).sum() + (u**4).sum()

    A, H = ops.SparseJacobian(residual, u), ops.SparseHessian(energy, u)
    assert (A.pattern.nnz, H.pattern.nnz) == (pattern.nnz, pattern.nnz)
    torch.testing.assert_close(A.to_dense(), torch.func.jacfwd(residual)(u))
    torch.testing.assert_close(H.to_dense(), torch.func.hessian(energy)(u))
