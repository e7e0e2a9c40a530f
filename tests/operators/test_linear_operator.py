"""Every operator and every composition of operators against its matrix, written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

import operators as ops
from operators import LinearOperator, Space

N = 5
DTYPES = [torch.float32, torch.float64]


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def spd(dtype: torch.dtype, seed: int = 0) -> Tensor:
    root = numbers(N, N, dtype=torch.float64, seed=seed)
    matrix = root @ root.T + torch.eye(N, dtype=torch.float64)
    return matrix.to(dtype)


def nested(dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Tree with N = 5 coordinates; in the order of the keys' insertion: a, then b."""
    values = numbers(N, dtype=dtype, seed=seed)
    return {"a": values[:4].reshape(2, 2), "b": values[4]}


def stacked(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat([tree["a"].reshape(-1), tree["b"].reshape(-1)])


def build(name: str, dtype: torch.dtype) -> tuple[LinearOperator, Tensor]:
    """Operator of this name, and its matrix computed without it."""
    square, wide = numbers(N, N, dtype=dtype, seed=1), numbers(3, N, dtype=dtype, seed=2)
    positive, values = spd(dtype), numbers(N, dtype=dtype, seed=3)
    rows, weights = numbers(2, N, dtype=dtype, seed=4), torch.tensor([2.0, -0.5], dtype=dtype)
    eye, tree = torch.eye(N, dtype=dtype), nested(dtype, seed=5)
    y = stacked(tree)
    if name == "Dense":
        return ops.Dense(square), square
    if name == "Dense wide":
        return ops.Dense(wide), wide
    if name == "Dense symmetric":
        return ops.Dense(square + square.T, symmetric=True), square + square.T
    if name == "Dense definite":
        return ops.Dense(positive, positive_definite=True), positive
    if name == "Diagonal":
        return ops.Diagonal(values), torch.diag(values)
    if name == "Diagonal definite":
        return ops.Diagonal(values.exp()), torch.diag(values.exp())
    if name == "Diagonal nested":
        return ops.Diagonal(values, Space.of(tree)), torch.diag(values)
    if name == "Identity":
        return ops.Identity(N, dtype), eye
    if name == "Identity nested":
        return ops.Identity(Space.of(tree)), eye
    if name == "LowRankPlusDiagonal":
        matrix = torch.diag(values) + rows.T @ torch.diag(weights) @ rows
        return ops.LowRankPlusDiagonal(rows, values, weights), matrix
    if name == "LowRankPlusDiagonal of rank 0":
        return ops.LowRankPlusDiagonal(rows[:0], 3.0), 3.0 * eye
    if name == "EmpiricalFisher":
        return ops.EmpiricalFisher(rows, 0.25), rows.T @ rows / 2 + 0.25 * eye
    if name == "EmpiricalFisher nested":
        fisher = ops.EmpiricalFisher(rows, 0.25, space=Space.of(tree))
        return fisher, rows.T @ rows / 2 + 0.25 * eye
    if name == "Hessian":
        # f = <y, P y> / 2 + sum y^4 / 12
        def loss(tree):
            y = stacked(tree)
            return y @ positive @ y / 2 + (y**4).sum() / 12

        return ops.Hessian(loss, tree), positive + torch.diag(y**2)
    if name == "Jacobian":
        # f = (W sin y, sum y^3): from the nested space to another one
        def function(tree):
            y = stacked(tree)
            return [wide @ torch.sin(y), (y**3).sum()]

        matrix = torch.cat([wide * torch.cos(y), 3 * (y**2)[None]])
        return ops.Jacobian(function, tree), matrix
    if name == "CrossDerivative":
        # f = sum_i x_i^2 (W y)_i: the rows are those of x
        x = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
        cross = ops.CrossDerivative(
            lambda y, x: (x["x"] ** 2 * (wide @ stacked(y))).sum(), tree, {"x": x}
        )
        return cross, 2 * x[:, None] * wide
    if name == "Sum":
        return ops.Dense(square) + ops.Dense(positive), square + positive
    if name == "Sum nested and flat":
        left, matrix = build("Hessian", dtype)
        return ops.Dense(square) + left, square + matrix
    if name == "Scaled":
        return 2.5 * ops.Dense(wide), 2.5 * wide
    if name == "Scaled by a tensor":
        return ops.Dense(square) * torch.tensor(-1.5, dtype=dtype), -1.5 * square
    if name == "Scaled twice":
        return -2 * (-3.0 * ops.Dense(positive, positive_definite=True)), 6 * positive
    if name == "Product":
        return ops.Dense(wide) @ ops.Dense(square), wide @ square
    if name == "Product nested":
        hessian, matrix = build("Hessian", dtype)
        return hessian @ hessian, matrix @ matrix
    if name == "Transpose":
        jacobian, matrix = build("Jacobian", dtype)
        return jacobian.T, matrix.T
    if name == "Gauss-Newton by hand":
        jacobian, matrix = build("Jacobian", dtype)
        return jacobian.T @ jacobian + 0.5 * ops.Identity(N, dtype), matrix.T @ matrix + 0.5 * eye
    if name == "deep":
        cross, c = build("CrossDerivative", dtype)
        hessian, h = build("Hessian", dtype)
        chained = -(cross @ (hessian - ops.Diagonal(values))).T / 4
        return chained @ ops.Dense(wide), -(c @ (h - torch.diag(values))).T / 4 @ wide
    raise AssertionError(name)


NAMES = [
    "Dense",
    "Dense wide",
    "Dense symmetric",
    "Dense definite",
    "Diagonal",
    "Diagonal definite",
    "Diagonal nested",
    "Identity",
    "Identity nested",
    "LowRankPlusDiagonal",
    "LowRankPlusDiagonal of rank 0",
    "EmpiricalFisher",
    "EmpiricalFisher nested",
    "Hessian",
    "Jacobian",
    "CrossDerivative",
    "Sum",
    "Sum nested and flat",
    "Scaled",
    "Scaled by a tensor",
    "Scaled twice",
    "Product",
    "Product nested",
    "Transpose",
    "Gauss-Newton by hand",
    "deep",
]
SQUARE = [
    "Dense",
    "Dense symmetric",
    "Dense definite",
    "Diagonal",
    "Diagonal definite",
    "Diagonal nested",
    "Identity",
    "LowRankPlusDiagonal",
    "EmpiricalFisher nested",
    "Hessian",
    "Scaled by a tensor",
    "Gauss-Newton by hand",
]


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Equal to rounding (the entries that go in are of order 1), of the same shape and dtype."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    atol = 50 * torch.finfo(expected.dtype).eps * scale
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def assert_facts_hold(operator: LinearOperator, matrix: Tensor) -> None:
    """Whatever the operator claims is true of its matrix."""
    matrix = matrix.double()
    size = max(1.0, float(matrix.abs().max()))
    if operator.symmetric:
        torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-5 * size)
        smallest = float(torch.linalg.eigvalsh((matrix + matrix.T) / 2).min())
        if operator.positive_semidefinite:
            assert smallest >= -1e-6 * size
        if operator.positive_definite:
            assert smallest > 0
    if operator.diagonal:
        assert torch.equal(matrix, torch.diag(matrix.diag()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
class TestAgainstTheMatrix:
    def test_shape_dtype_and_dense_form(self, name, dtype):
        operator, matrix = build(name, dtype)
        assert operator.shape == tuple(matrix.shape)
        assert operator.dtype == dtype
        assert operator.device == torch.device("cpu")
        assert_equal(operator.to_dense(), matrix)

    def test_facts_are_true(self, name, dtype):
        assert_facts_hold(*build(name, dtype))

    def test_vector(self, name, dtype):
        operator, matrix = build(name, dtype)
        v = numbers(matrix.shape[1], dtype=dtype, seed=7)
        assert_equal(operator @ v, matrix @ v)

    @pytest.mark.parametrize("columns", [0, 1, 3])
    def test_block(self, name, dtype, columns):
        operator, matrix = build(name, dtype)
        block = numbers(matrix.shape[1], columns, dtype=dtype, seed=8)
        assert_equal(operator @ block, matrix @ block)

    def test_block_that_is_not_contiguous(self, name, dtype):
        operator, matrix = build(name, dtype)
        block = numbers(3, 2 * matrix.shape[1], dtype=dtype, seed=9)[:, ::2].T
        assert not block.is_contiguous()
        assert_equal(operator @ block, matrix @ block)

    def test_transpose_on_vector_block_and_empty_block(self, name, dtype):
        operator, matrix = build(name, dtype)
        u = numbers(matrix.shape[0], dtype=dtype, seed=10)
        block = numbers(matrix.shape[0], 2, dtype=dtype, seed=11)
        assert operator.T.shape == tuple(matrix.T.shape)
        assert_equal(operator.T @ u, matrix.T @ u)
        assert_equal(operator.T @ block, matrix.T @ block)
        assert_equal(operator.T @ block[:, :0], matrix.T @ block[:, :0])
        assert_equal(operator.T.T.to_dense(), matrix)
        assert_facts_hold(operator.T, matrix.T)

    def test_nested_argument_is_the_flat_one_unravelled(self, name, dtype):
        operator, matrix = build(name, dtype)
        v = numbers(matrix.shape[1], dtype=dtype, seed=12)
        if not operator.domain.is_flat:
            result = operator @ operator.domain.unravel(v)
            assert operator.codomain.holds(result)
            assert_equal(operator.codomain.ravel(result), matrix @ v)
        # A plain vector gives a plain vector, whatever the codomain.
        assert (operator @ v).shape == matrix.shape[:1]

    def test_under_vmap(self, name, dtype):
        operator, matrix = build(name, dtype)
        batch = numbers(4, matrix.shape[1], dtype=dtype, seed=13)
        assert_equal(torch.func.vmap(lambda v: operator @ v)(batch), batch @ matrix.T)

    def test_derivative_of_the_product_is_the_transpose(self, name, dtype):
        operator, matrix = build(name, dtype)
        v, u = (numbers(size, dtype=dtype, seed=14) for size in reversed(matrix.shape))
        _, pullback = torch.func.vjp(lambda v: operator @ v, v)
        assert_equal(pullback(u)[0], matrix.T @ u)

    def test_wrong_arguments(self, name, dtype):
        operator, _ = build(name, dtype)
        n = operator.shape[1]
        with pytest.raises(
            ValueError, match=rf"shape \({n + 1},\); expected.*\({n},\), \({n}, k\)"
        ):
            operator @ torch.zeros(n + 1, dtype=dtype)
        with pytest.raises(ValueError, match=rf"shape \({n + 1}, 2\); expected"):
            operator @ torch.zeros(n + 1, 2, dtype=dtype)
        with pytest.raises(ValueError, match=rf"shape \({n}, 1, 1\); expected"):
            operator @ torch.zeros(n, 1, 1, dtype=dtype)
        other = torch.float32 if dtype == torch.float64 else torch.float64
        with pytest.raises(TypeError, match=f"applied to {other} on cpu; expected {dtype} on cpu"):
            operator @ torch.zeros(n, dtype=other)
        with pytest.raises(
            ValueError, match=r"the argument of .* has structure \{'z': \(2,\)\}; expected"
        ):
            operator @ {"z": torch.zeros(2, dtype=dtype)}
        with pytest.raises(ValueError, match=r"the argument of .* has structure ndarray; expected"):
            operator @ np.zeros(n)


@pytest.mark.parametrize(("left", "right"), list(itertools.product(SQUARE, SQUARE)))
def test_compositions_of_two(left, right):
    """Sum, difference and product of every pair; whatever is claimed of the result is true."""
    (A, a), (B, b) = build(left, torch.float64), build(right, torch.float64)
    for operator, matrix in ((A + B, a + b), (A - B, a - b), (A @ B, a @ b)):
        assert_equal(operator.to_dense(), matrix)
        assert_equal(operator.T.to_dense(), matrix.T)
        assert_facts_hold(operator, matrix)


@pytest.mark.parametrize("name", SQUARE)
@pytest.mark.parametrize("factor", [-2.0, 0.0, 0.5, 3])
def test_multiples_keep_at_least_what_the_rules_grant(name, factor):
    operator, matrix = build(name, torch.float64)
    multiple = factor * operator
    assert_equal(multiple.to_dense(), factor * matrix)
    assert_facts_hold(multiple, factor * matrix)
    granted = operator.structure.times(factor)
    for fact in ("symmetric", "positive_semidefinite", "positive_definite", "diagonal"):
        assert getattr(multiple, fact) >= getattr(granted, fact), fact


@pytest.mark.parametrize(("left", "right"), list(itertools.product(SQUARE, SQUARE)))
def test_sums_keep_at_least_what_the_rules_grant(left, right):
    A, B = build(left, torch.float64)[0], build(right, torch.float64)[0]
    granted = A.structure.plus(B.structure)
    for fact in ("symmetric", "positive_semidefinite", "positive_definite", "diagonal"):
        assert getattr(A + B, fact) >= getattr(granted, fact), fact


@pytest.mark.parametrize("name", ["Dense definite", "LowRankPlusDiagonal of rank 0", "Identity"])
def test_damping_of_zero_keeps_definiteness(name):
    operator, matrix = build(name, torch.float64)
    damped = operator + 0.0 * ops.Identity(N, torch.float64)
    assert damped.positive_definite
    assert_equal(damped.to_dense(), matrix)


def test_low_rank_structure_survives_what_it_should():
    A = build("EmpiricalFisher", torch.float64)[0]
    eye = ops.Identity(N, torch.float64)
    for operator in (A, A + 0.1 * eye, 0.1 * eye + A, 2.0 * A, A - eye, A + A, eye, 3.0 * eye):
        assert operator.low_rank_plus_diagonal
    dense = build("Dense", torch.float64)[0]
    for operator in (dense, A + dense, A @ A):
        assert not operator.low_rank_plus_diagonal


def test_a_sum_keeps_the_nested_space_on_either_side():
    nested_operator, flat = build("Hessian", torch.float64)[0], ops.Identity(N, torch.float64)
    for total in (nested_operator + flat, flat + nested_operator, flat + 1e-3 * nested_operator):
        assert total.domain == nested_operator.domain
        assert total.codomain == nested_operator.codomain


def test_transpose_of_transpose_is_the_operator_itself():
    jacobian = build("Jacobian", torch.float64)[0]
    assert jacobian.T.T is jacobian
    symmetric = build("Hessian", torch.float64)[0]
    assert symmetric.T is symmetric


def test_matrix_valued_parameter_is_a_tree_not_a_block():
    """A tensor of exactly the parameter's shape is the parameter, whatever its rank."""
    W = numbers(3, 2, dtype=torch.float64)
    hessian = ops.Hessian(lambda W: (W**3).sum(), W)
    assert hessian.shape == (6, 6)
    assert_equal(hessian @ W, 6 * W * W)
    block = numbers(6, 2, dtype=torch.float64)
    assert_equal(hessian @ block, 6 * W.reshape(-1, 1) * block)


@pytest.mark.parametrize("factor", [2, 2.0, np.float64(2.0), torch.tensor(2.0)])
def test_factors_from_either_side(factor):
    matrix = numbers(N, N, dtype=torch.float32)
    A = ops.Dense(matrix)
    assert_equal((factor * A).to_dense(), 2 * matrix)
    assert_equal((A * factor).to_dense(), 2 * matrix)
    assert_equal((A / factor).to_dense(), matrix / 2)


@pytest.mark.parametrize("name", SQUARE)
def test_a_scalar_tensor_of_another_dtype_does_not_change_the_operators(name):
    operator, matrix = build(name, torch.float32)
    scaled = torch.tensor(2.0, dtype=torch.float64) * operator
    assert scaled.dtype == torch.float32
    assert_equal(scaled @ torch.ones(N), 2 * matrix @ torch.ones(N))
    if isinstance(scaled, ops.Diagonal):
        assert scaled.values.dtype == torch.float32


def test_a_factor_can_be_differentiated():
    matrix, v = numbers(N, N, dtype=torch.float64), numbers(N, dtype=torch.float64)
    for A in (ops.Dense(matrix), ops.EmpiricalFisher(matrix, 0.5), ops.Identity(N, torch.float64)):
        slope = torch.func.grad(lambda c, A=A: ((c * A) @ v).sum())(torch.tensor(1.5).double())
        torch.testing.assert_close(slope, (A @ v).sum())


class TestResultsAreOnesOwn:
    """A result can be written into; that changes neither the argument nor another leaf of it."""

    tree = staticmethod(lambda: {"a": torch.ones(2), "b": torch.ones(3)})

    def test_what_a_function_hands_through(self):
        J = ops.Jacobian(lambda y: {"a": y["a"], "s": 2 * y["b"]}, self.tree())
        q = self.tree()
        for A in (J, J.T, J.T @ J):
            argument = q if A.domain.holds(q) else {"a": torch.ones(2), "s": torch.ones(3)}
            for leaf in (A @ argument).values():
                leaf.mul_(-1)
            assert all(bool((leaf == 1).all()) for leaf in argument.values())

    @pytest.mark.parametrize(
        "A",
        [
            ops.Jacobian(lambda y: y, torch.zeros(3)),
            ops.Linearization(lambda y: y, torch.zeros(3)),
            ops.FunctionOperator(lambda v: v, torch.zeros(3)),
            ops.FunctionOperator(lambda v: v, torch.zeros(3), rmatvec=lambda u: u).T,
            ops.GaussNewton.from_residual(lambda u: u, torch.zeros(3)),
        ],
        ids=str,
    )
    def test_vectors_and_blocks(self, A):
        for argument in (torch.ones(3), torch.ones(3, 2), torch.ones(3, 1)):
            (A @ argument).mul_(-1)
            assert bool((argument == 1).all())

    def test_one_number_in_many_places(self):
        H = ops.Hessian(lambda y: y.sum() ** 2, torch.zeros(3))
        for argument in (torch.ones(3), torch.ones(3, 2)):
            image = H @ argument
            image[0].zero_()
            assert bool((image[1:] == 6).all())
        image = ops.Hessian(lambda y: y["a"].sum() ** 2, self.tree()) @ self.tree()
        image["a"][0] = 0.0
        assert image["a"].tolist() == [0.0, 4.0]

    def test_leaves_that_overlap(self):
        def function(y):
            twice = 2 * y
            return {"first": twice[:2], "last": twice[1:], "whole": twice}

        image = ops.Jacobian(function, torch.ones(3).reshape(1, 3)[0]) @ torch.ones(3)
        assert image.tolist() == [2.0] * 7
        nested = ops.Jacobian(lambda y: function(y["a"]), {"a": torch.ones(3)})
        image = nested @ {"a": torch.ones(3)}
        image["first"].zero_()
        image["last"].zero_()
        assert image["whole"].tolist() == [2.0] * 3

    def test_inside_a_transform(self):
        J = ops.Jacobian(lambda y: {"a": y["a"], "s": 2 * y["b"]}, self.tree())

        def total(x):
            image = J @ {"a": x[:2], "b": x[2:]}
            image["a"].mul_(-1)
            return image["a"].sum() + x.sum()

        assert torch.func.grad(total)(torch.ones(5)).tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]
        assert torch.func.vmap(total)(torch.ones(2, 5)).tolist() == [3.0, 3.0]


class TestRefusals:
    def test_shapes_that_do_not_match(self):
        square, wide = ops.Dense(torch.zeros(5, 5)), ops.Dense(torch.zeros(3, 5))
        with pytest.raises(ValueError, match=r"cannot add Dense\(5, 5\) and Dense\(3, 5\)"):
            square + wide
        with pytest.raises(ValueError, match=r"cannot compose Dense\(3, 5\) with Dense\(3, 5\)"):
            wide @ wide

    def test_dtypes_that_do_not_match(self):
        single, double = ops.Identity(2, torch.float32), ops.Identity(2, torch.float64)
        with pytest.raises(TypeError, match=r"cannot add .*torch.float32.*torch.float64"):
            single + double
        with pytest.raises(TypeError, match=r"cannot compose .*torch.float32.*torch.float64"):
            single @ double

    def test_spaces_that_do_not_match(self):
        left = ops.Identity(Space.of({"a": torch.zeros(2), "b": torch.zeros(3)}))
        right = ops.Identity(Space.of({"b": torch.zeros(3), "a": torch.zeros(2)}))
        same = ops.Identity(Space.of({"a": torch.zeros(2), "b": torch.zeros(3)}))
        assert (left + same).domain == left.domain
        other = ops.Identity(Space.of([torch.zeros(5)]))
        for operator in (other, right):
            with pytest.raises(ValueError, match=r"cannot add .*\{'a': \(2,\), 'b': \(3,\)\}"):
                left + operator

    def test_integers_are_not_an_operators_field(self):
        with pytest.raises(TypeError, match=r"torch.int64.*floating"):
            ops.Dense(torch.eye(2, dtype=torch.int64))
        with pytest.raises(TypeError, match=r"torch.int64.*floating"):
            ops.Diagonal(torch.tensor([1, 2]))

    def test_a_factor_that_is_not_a_scalar(self):
        with pytest.raises(ValueError, match=r"factor has shape \(2,\); expected a scalar"):
            ops.Identity(2) * torch.ones(2)
        with pytest.raises(TypeError):
            ops.Identity(2) * "2"

    def test_other_operands(self):
        A = ops.Identity(2)
        with pytest.raises(TypeError):
            A + 1.0
        with pytest.raises(TypeError):
            A + torch.eye(2)
        with pytest.raises(TypeError):
            np.ones(2, dtype=np.float32) @ A
        with pytest.raises(TypeError):
            torch.ones(2) @ A

    def test_symmetric_claim_on_a_rectangle(self):
        with pytest.raises(
            ValueError, match=r"claims positive definite, but the shape is \(3, 5\)"
        ):
            ops.Dense(torch.zeros(3, 5), positive_definite=True)

    def test_an_operator_without_transposed_product_says_so(self):
        class OneWay(LinearOperator):
            def _matvec(self, v: Tensor) -> Tensor:
                return v.flip(0)

        space = Space.flat(2, torch.float32)
        with pytest.raises(
            TypeError, match=r"OneWay\(2, 2\) does not define its transposed product"
        ):
            OneWay(space, space).T @ torch.ones(2)

    def test_an_operator_keeps_the_dtype(self):
        class Widening(LinearOperator):
            def _matvec(self, v: Tensor) -> Tensor:
                return v

        with pytest.raises(TypeError, match=r"domain is torch.float32.*codomain is torch.float64"):
            Widening(Space.flat(2, torch.float32), Space.flat(2, torch.float64))


def test_repr_names_the_parts():
    A = ops.Dense(torch.zeros(2, 3))
    assert repr(A) == "Dense(2, 3)"
    assert repr(2.0 * A) == "2.0 * Dense(2, 3)"
    jacobian = ops.Jacobian(torch.sin, torch.zeros(2))
    dense = ops.Dense(torch.zeros(2, 2))
    assert repr(jacobian.T @ dense + dense) == ("((Jacobian(2, 2).T @ Dense(2, 2)) + Dense(2, 2))")
    assert repr(jacobian.T @ jacobian) == "Gram(2, 2)"
