"""Operators as pytrees: what torch.func differentiates, maps and hands back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree

import operators as ops
import solvers
from operators import Dense, Diagonal, Identity, LinearOperator, LowRankPlusDiagonal
from tests.operators.cases import CASES, Numbers

F64 = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def drawn(name: str, seed: int = 0) -> LinearOperator:
    case = CASES[name]
    return case.build(case.draw(4, Numbers(seed, F64)))


def cubic(y: Tensor, x: Tensor) -> Tensor:
    return (x * y**3).sum()


@pytest.mark.parametrize("name", CASES)
class TestRoundTrip:
    def test_every_operator(self, name):
        A = drawn(name)
        leaves, treespec = pytree.tree_flatten(A)
        assert all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)
        B = pytree.tree_unflatten(leaves, treespec)
        assert type(B) is type(A)
        assert B is not A
        assert (B.domain, B.codomain, B.structure) == (A.domain, A.codomain, A.structure)
        assert B.tensors == A.tensors or all(
            b is a for b, a in zip(B.tensors, A.tensors, strict=True)
        )
        assert repr(B) == repr(A)
        assert str(B) == str(A)
        v = sampled(A.shape[1])
        assert torch.equal(B @ v, A @ v)
        close(B.T @ sampled(A.shape[0]), A.T @ sampled(A.shape[0]))
        assert pytree.tree_structure(B) == pytree.tree_structure(A)

    def test_with_tensors(self, name):
        A, other = drawn(name), drawn(name, seed=1)
        v = sampled(A.shape[1])
        B = A.with_tensors(tuple(t.clone() for t in A.tensors))
        assert torch.equal(B @ v, A @ v)
        before = A @ v
        if [t.shape for t in A.tensors] == [t.shape for t in other.tensors]:
            C = A.with_tensors(other.tensors)
            close(C @ v, other @ v)
            close(C.T @ sampled(A.shape[0]), other.T @ sampled(A.shape[0]))
        assert torch.equal(A @ v, before)
        with pytest.raises(ValueError, match=rf"{len(A.tensors) + 1} tensors for .*has"):
            A.with_tensors((*A.tensors, torch.zeros(2)))

    def test_after_use(self, name):
        """What was kept for one set of tensors does not go into a copy with others."""
        A, other = drawn(name), drawn(name, seed=1)
        v = sampled(A.shape[1])
        A @ v
        A.T @ sampled(A.shape[0])
        if [t.shape for t in A.tensors] == [t.shape for t in other.tensors]:
            close(A.with_tensors(other.tensors) @ v, other @ v)

    def test_copies(self, name):
        A = drawn(name)
        v = sampled(A.shape[1])
        for B in (copy.copy(A), copy.deepcopy(A)):
            close(B @ v, A @ v)
            assert B.shape == A.shape


class TestWhatIsATensorOfIt:
    def test_in_the_order_of_the_class(self):
        rows, d, w = sampled(2, 3), sampled(3, seed=1), sampled(2, seed=2)
        A = LowRankPlusDiagonal(rows, d, w)
        assert [t.shape for t in A.tensors] == [(2, 3), (3,), (2,)]
        assert A.tensors[0] is rows

    def test_operands_are_taken_apart(self):
        c = torch.tensor(2.0, dtype=F64)
        A = c * (Dense(sampled(3, 3)) @ Diagonal(sampled(3))) + Dense(sampled(3, 3, seed=1))
        assert sorted(t.ndim for t in A.tensors) == [0, 1, 2, 2]

    def test_floats_and_integers_are_fixed(self):
        index = torch.tensor([1, 0, 2])

        def matvec(v: Tensor, index: Tensor, scale: Tensor, power: int) -> Tensor:
            return scale**power * v[index]

        scale = torch.tensor(2.0, dtype=F64)
        A = ops.FunctionOperator(matvec, torch.zeros(3, dtype=F64), index, scale, 2)
        assert len(A.tensors) == 1
        assert A.tensors[0] is scale
        v = sampled(3)
        close(
            vmap(lambda A: A @ v)(A.with_tensors((sampled(4),))),
            sampled(4)[:, None] ** 2 * v[index],
        )
        gradient = grad(lambda A: (A @ v).sum())(A)
        close(gradient.tensors[0], 4 * v.sum())
        assert torch.equal(gradient.args[0], index)
        assert len((2.0 * Dense(sampled(2, 2))).tensors) == 1

    def test_closed_over_tensors_are_fixed(self):
        c = sampled(3)
        A = ops.FunctionOperator(lambda v: c * v, torch.zeros(3, dtype=F64))
        assert A.tensors == ()
        B = ops.Hessian(lambda y: (c * y**3).sum(), sampled(3))
        assert len(B.tensors) == 1

    def test_nested_points(self):
        y = {"a": sampled(2), "b": [sampled(1, seed=1), sampled(seed=2)]}
        A = ops.Hessian(lambda y: (y["a"] ** 3).sum() + (y["b"][0] * y["b"][1] ** 3).sum(), y)
        assert [t.shape for t in A.tensors] == [(2,), (1,), ()]
        gradient = grad(lambda A: A.to_dense().sum())(A)
        assert set(gradient.y) == {"a", "b"}
        close(gradient.y["a"], torch.full((2,), 6.0, dtype=F64))


class TestDerivatives:
    """With respect to an operator; the result is an operator of its class, tensor by tensor."""

    u, v = sampled(3, seed=10), sampled(3, seed=11)

    def test_grad(self):
        gradient = grad(lambda A: self.u @ (A @ self.v))(Dense(sampled(3, 3)))
        assert isinstance(gradient, Dense)
        close(gradient.matrix, torch.outer(self.u, self.v))

    def test_grad_of_a_compound(self):
        M, d = sampled(3, 3), sampled(3, seed=1)
        J = Dense(M)
        A = J.T @ Diagonal(d) @ J + 0.5 * Identity(3)
        gradient = grad(lambda A: self.u @ (A @ self.v))(A)
        expected = grad(lambda M, d: self.u @ (M.T @ (d * (M @ self.v))), (0, 1))(M, d)
        close(gradient.left.frame.matrix, expected[0])
        close(gradient.left.weight.values, expected[1])

    def test_grad_through_gram_moves_both_factors(self):
        M = sampled(4, 3)
        A = Dense(M)
        gradient = grad(lambda A: self.u @ ((A.T @ A) @ self.v))(A)
        close(gradient.matrix, grad(lambda M: self.u @ (M.T @ M @ self.v))(M))

    def test_one_operator_twice_in_an_expression(self):
        A = Dense(sampled(3, 3))
        gradient = grad(lambda A: self.u @ ((A @ A + 2.0 * A) @ self.v))(A)
        expected = grad(lambda M: self.u @ (M @ M @ self.v + 2 * M @ self.v))(A.matrix)
        close(gradient.matrix, expected)

    def test_jvp(self):
        A, dA = Dense(sampled(3, 3)), Dense(sampled(3, 3, seed=1))
        value, tangent = jvp(lambda A: A @ self.v, (A,), (dA,))
        close(value, A.matrix @ self.v)
        close(tangent, dA.matrix @ self.v)

    def test_jvp_of_the_transpose_and_the_inverse(self):
        A, dA = Dense(sampled(3, 3) + 3 * torch.eye(3)), Dense(sampled(3, 3, seed=1))
        close(jvp(lambda A: A.T @ self.v, (A,), (dA,))[1], dA.matrix.T @ self.v)
        tangent = jvp(lambda A: ops.Inverse(A, solvers.DenseLU()) @ self.v, (A,), (dA,))[1]
        inverse = torch.linalg.inv(A.matrix)
        close(tangent, -inverse @ dA.matrix @ inverse @ self.v)

    def test_vjp(self):
        A = LowRankPlusDiagonal(sampled(2, 3), sampled(3, seed=1), sampled(2, seed=2))
        (gradient,) = vjp(lambda A: A @ self.v, A)[1](self.u)
        assert isinstance(gradient, LowRankPlusDiagonal)
        close(gradient.diagonal_values, self.u * self.v)
        close(gradient.weights, (A.rows @ self.u) * (A.rows @ self.v))

    @pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
    def test_jacobians(self, jacobian):
        A = Dense(sampled(2, 3))
        J = jacobian(lambda A: A @ self.v)(A)
        expected = jacobian(lambda M: M @ self.v)(A.matrix)
        close(J.tensors[0], expected)

    def test_hessian_by_one_tensor(self):
        A = Dense(sampled(2, 3))
        H = hessian(lambda A: ((A @ self.v) ** 3).sum())(A)
        expected = hessian(lambda M: ((M @ self.v) ** 3).sum())(A.matrix)
        close(pytree.tree_leaves(H)[0], expected)

    def test_hessian_by_several_tensors(self):
        """An operator of operators, as torch.func nests a dict in a dict."""
        d, rows = sampled(3), sampled(1, 3, seed=1)
        A = LowRankPlusDiagonal(rows, d)
        H = hessian(lambda A: ((A @ self.v) ** 3).sum())(A)
        expected = hessian(
            lambda p: ((LowRankPlusDiagonal(p["rows"], p["d"]) @ self.v) ** 3).sum()
        )({"rows": rows, "d": d})
        close(H.rows.rows, expected["rows"]["rows"])
        close(H.rows.diagonal_values, expected["rows"]["d"])
        close(H.diagonal_values.diagonal_values, expected["d"]["d"])
        assert len(pytree.tree_leaves(H)) == 9

    def test_grad_of_grad(self):
        A = Dense(sampled(3, 3))

        def curvature(A):
            slope = grad(lambda A: ((A @ self.v) ** 3).sum())(A)
            return (slope @ self.u).sum()

        def by_matrix(M):
            slope = grad(lambda M: ((M @ self.v) ** 3).sum())(M)
            return (slope @ self.u).sum()

        close(grad(curvature)(A).matrix, grad(by_matrix)(A.matrix))

    def test_plain_autograd(self):
        M = sampled(3, 3).requires_grad_()
        A = Dense(M) + 2.0 * Dense(M).T
        loss = self.u @ (A @ self.v)
        gradients = torch.autograd.grad(loss, A.tensors, retain_graph=True, allow_unused=True)
        assert gradients[0] is not None
        (slope,) = torch.autograd.grad(loss, M)
        close(slope, torch.outer(self.u, self.v) + 2 * torch.outer(self.v, self.u))

    def test_a_step_of_gradient_descent(self):
        A = Dense(sampled(3, 3)) + Diagonal(sampled(3, seed=1))

        def loss(A):
            return ((A @ self.v - self.u) ** 2).sum()

        before = loss(A)
        for _ in range(200):
            A = pytree.tree_map(lambda t, g: t - 0.02 * g, A, grad(loss)(A))
        assert isinstance(A, ops.Sum)
        assert float(loss(A)) < 1e-3 * float(before)

    def test_where_a_tensor_does_not_matter(self):
        A = Dense(sampled(3, 3)) + Diagonal(sampled(3, seed=1))
        gradient = grad(lambda A: A.left @ self.v @ self.u)(A)
        assert all(bool(torch.isfinite(g).all()) for g in gradient.tensors)
        close(gradient.right.values, torch.zeros(3, dtype=F64))


class TestVmap:
    matrices, V = sampled(4, 2, 3), sampled(4, 3, seed=1)

    def test_over_operators_and_vectors(self):
        batch = vmap(Dense)(self.matrices)
        assert isinstance(batch, Dense)
        assert batch.shape == (2, 3)
        assert batch.matrix.shape == (4, 2, 3)
        expected = torch.einsum("bij,bj->bi", self.matrices, self.V)
        close(vmap(lambda A, v: A @ v)(batch, self.V), expected)
        close(vmap(lambda A, v: A @ v, in_dims=(0, 1))(batch, self.V.T.contiguous()), expected)

    def test_operator_not_mapped(self):
        A = Dense(self.matrices[0])
        close(vmap(lambda A, v: A @ v, in_dims=(None, 0))(A, self.V), self.V @ A.matrix.T)

    def test_vector_not_mapped(self):
        batch = vmap(Dense)(self.matrices)
        close(
            vmap(lambda A, v: A @ v, in_dims=(0, None))(batch, self.V[0]), self.matrices @ self.V[0]
        )

    def test_other_axes(self):
        batch = Dense(self.matrices[0]).with_tensors((self.matrices.movedim(0, -1),))
        close(
            vmap(lambda A, v: A @ v, in_dims=(-1, 0))(batch, self.V),
            torch.einsum("bij,bj->bi", self.matrices, self.V),
        )

    def test_in_dims_by_an_operator_of_dims(self):
        """As torch takes a dict of dims for a dict: here only the diagonal is mapped."""
        A = Dense(sampled(3, 3)) + Diagonal(sampled(3, seed=1))
        values, v = sampled(4, 3, seed=2), sampled(3, seed=3)
        batch = A.with_tensors((A.tensors[0], values))
        dims = pytree.tree_unflatten([None, 0], pytree.tree_structure(A))
        products = vmap(lambda A: A @ v, in_dims=(dims,))(batch)
        close(products, A.tensors[0] @ v + values * v)

    def test_out_dims(self):
        batch = vmap(Dense, out_dims=2)(self.matrices)
        assert batch.matrix.shape == (2, 3, 4)
        products = vmap(lambda A, v: A @ v, in_dims=(2, 0), out_dims=1)(batch, self.V)
        close(products, torch.einsum("bij,bj->ib", self.matrices, self.V))

    def test_returning_compounds(self):
        d = sampled(4, 3, seed=2)
        square = sampled(4, 3, 3, seed=3)
        batch = vmap(lambda M, d: (Dense(M) + Diagonal(d)).T @ Dense(M))(square, d)
        expected = (square.mT + torch.diag_embed(d)) @ square
        close(vmap(lambda A: A.to_dense())(batch), expected)
        close(vmap(lambda A, v: A @ v)(batch, self.V), torch.einsum("bij,bj->bi", expected, self.V))

    def test_returning_what_is_not_mapped(self):
        A = Dense(self.matrices[0])
        batch = vmap(lambda v: A)(self.V)
        assert batch.matrix.shape == (4, 2, 3)

    def test_returning_an_operator_beside_a_tensor(self):
        batch, products = vmap(lambda M, v: (Dense(M), Dense(M) @ v))(self.matrices, self.V)
        close(products, torch.einsum("bij,bj->bi", batch.matrix, self.V))

    def test_twice(self):
        batch = vmap(vmap(Dense))(sampled(5, 4, 2, 3))
        products = vmap(vmap(lambda A, v: A @ v), in_dims=(0, None))(batch, self.V)
        close(products, torch.einsum("abij,bj->abi", sampled(5, 4, 2, 3), self.V))

    def test_gradients_for_each_operator(self):
        batch = vmap(Dense)(self.matrices)
        slopes = vmap(grad(lambda A, v: (A @ v).square().sum()))(batch, self.V)
        assert isinstance(slopes, Dense)
        expected = vmap(grad(lambda M, v: (M @ v).square().sum()))(self.matrices, self.V)
        close(slopes.matrix, expected)

    def test_grad_over_vmap(self):
        batch = vmap(Dense)(self.matrices)

        def total(batch):
            return vmap(lambda A, v: A @ v)(batch, self.V).square().sum()

        expected = grad(lambda M: torch.einsum("bij,bj->bi", M, self.V).square().sum())(
            self.matrices
        )
        close(grad(total)(batch).matrix, expected)

    def test_derivative_operators_over_points(self):
        y, x, v = sampled(4, 3), sampled(4, 3, seed=1), sampled(3, seed=2)
        batch = vmap(lambda y, x: ops.Hessian(cubic, y, x))(y, x)
        close(vmap(lambda A: A @ v)(batch), 6 * x * y * v)
        cross = vmap(lambda y, x: ops.CrossDerivative(cubic, y, x))(y, x)
        close(vmap(lambda C: C.T @ v)(cross), 3 * y**2 * v)

    def test_empty_batches_are_torchs_affair(self):
        with pytest.raises((ValueError, RuntimeError)):
            vmap(lambda A, v: A @ v, in_dims=(0, 0))(vmap(Dense)(self.matrices), self.V[:3])


class TestCaches:
    def test_are_dropped(self):
        y, x, v = sampled(3), sampled(3, seed=1), sampled(3, seed=2)
        A = ops.Hessian(cubic, y, x)
        A @ v
        assert A._kept is not None
        B = A.with_tensors((2 * y, x))
        assert B._kept is None
        close(B @ v, 12 * x * y * v)
        L = ops.Linearization(lambda y, x: x * y**2, y, x)
        L @ v, L.T @ v
        M = L.with_tensors((2 * y, x))
        assert M._forward is None
        assert M._backward is None
        close(M @ v, 4 * x * y * v)
        close(M.T @ v, 4 * x * y * v)
        close(M.value, 4 * x * y**2)

    def test_of_the_inverse(self):
        A = Dense(sampled(3, 3) + 3 * torch.eye(3))
        inverse, v = ops.Inverse(A, solvers.DenseLU()), sampled(3, seed=1)
        inverse @ v
        other = inverse.with_tensors((2 * A.matrix,))
        close(2 * (other @ v), inverse @ v)

    def test_claims_are_tried_again_for_other_tensors(self):
        A = Dense(torch.eye(3, dtype=F64), positive_definite=True)
        A @ sampled(3)
        with pytest.raises(ops.FalseClaimError, match="positive definite"):
            A.with_tensors((-torch.eye(3, dtype=F64),)) @ sampled(3)

    def test_a_transpose_of_a_copy_is_not_that_of_the_original(self):
        A = Dense(sampled(3, 3))
        other = A.T.with_tensors((sampled(3, 3, seed=1),))
        assert isinstance(other @ A, ops.Product)
        close((other @ A).to_dense(), sampled(3, 3, seed=1) @ A.matrix)


class TestStaticParts:
    """Trees of two operators go together where all but the tensors is equal."""

    def added(self, A: LinearOperator, B: LinearOperator) -> Any:
        return pytree.tree_map(lambda a, b: a + b, A, B)

    @pytest.mark.parametrize(
        "build",
        [
            lambda s: Dense(sampled(3, 3, seed=s)),
            lambda s: Diagonal(sampled(3, seed=s)),
            lambda s: Diagonal(sampled(3, seed=s).abs()),
            lambda s: LowRankPlusDiagonal(sampled(2, 3, seed=s), 1.0 + s),
            lambda s: Dense(sampled(3, 3, seed=s)) + 2.0 * Dense(sampled(3, 3, seed=s + 5)),
            lambda s: ops.Jacobian(torch.sin, sampled(3, seed=s)),
            lambda s: ops.Linearization(torch.sin, sampled(3, seed=s)),
            lambda s: ops.Hessian(cubic, sampled(3, seed=s), sampled(3, seed=s + 5)),
            lambda s: ops.Hessian(
                cubic, sampled(3, seed=s), sampled(3, seed=s + 5), mode="forward"
            ),
            lambda s: ops.CrossDerivative(cubic, sampled(3, seed=s), sampled(3, seed=s + 5)),
            lambda s: ops.FunctionOperator(torch.mul, sampled(3), sampled(3, seed=s)),
            lambda s: ops.Inverse(Dense(sampled(3, 3, seed=s)), solvers.DenseLU()),
            lambda s: (1.0 + s) * Identity(3, F64),
            lambda s: (1.0 + s) * Identity(3),
        ],
        ids=[
            "Dense", "Diagonal", "Diagonal definite", "LowRankPlusDiagonal", "Sum", "Jacobian",
            "Linearization", "Hessian", "Hessian forward", "CrossDerivative", "FunctionOperator",
            "Inverse", "Identity", "Identity of a size",
        ],
    )  # fmt: skip
    def test_likes_go_together(self, build):
        A, B = build(0), build(1)
        total = self.added(A, B)
        assert type(total) is type(A)
        for t, a, b in zip(total.tensors, A.tensors, B.tensors, strict=True):
            close(t, a + b)
        assert pytree.tree_structure(A) == pytree.tree_structure(B)
        assert hash(A._fixed) == hash(B._fixed)

    @pytest.mark.parametrize(
        ("left", "right"),
        [
            (lambda: Dense(sampled(3, 3)), lambda: Diagonal(sampled(3))),
            (lambda: 2.0 * Dense(sampled(3, 3)), lambda: 3.0 * Dense(sampled(3, 3))),
            (lambda: Dense(sampled(3, 3)), lambda: Dense(sampled(2, 3))),
            (lambda: Dense(sampled(3, 3)), lambda: Dense(sampled(3, 3).float())),
            (
                lambda: ops.Jacobian(torch.sin, sampled(3)),
                lambda: ops.Jacobian(torch.cos, sampled(3)),
            ),
            (
                lambda: ops.Hessian(cubic, sampled(3), sampled(3)),
                lambda: ops.Hessian(cubic, sampled(3), sampled(3), mode="forward"),
            ),
            (
                lambda: ops.Inverse(Dense(sampled(3, 3)), solvers.DenseLU()),
                lambda: ops.Inverse(Dense(sampled(3, 3)), solvers.DenseLU(rtol=0.1)),
            ),
            (
                lambda: ops.FunctionOperator(torch.mul, sampled(3), torch.tensor(2)),
                lambda: ops.FunctionOperator(torch.mul, sampled(3), torch.tensor(3)),
            ),
        ],
        ids=["class", "factor", "shape", "dtype", "function", "mode", "solver", "held integers"],
    )
    def test_others_do_not(self, left, right):
        with pytest.raises(ValueError, match=r"mismatch|Mismatch"):
            self.added(left(), right())
        assert pytree.tree_structure(left()) != pytree.tree_structure(right())

    def test_gradients_go_with_their_operator_before_and_after_use(self):
        A = ops.Hessian(cubic, sampled(3), sampled(3, seed=1))
        A @ sampled(3)
        gradient = grad(lambda A: (A @ sampled(3)).sum())(A)
        assert isinstance(self.added(A, gradient), ops.Hessian)

    def test_a_tree_of_operators(self):
        tree = {"A": Dense(sampled(2, 2)), "rest": [Diagonal(sampled(2)), sampled(2)]}
        doubled = pytree.tree_map(lambda t: 2 * t, tree)
        close(doubled["A"].to_dense(), 2 * sampled(2, 2))
        gradient = grad(lambda tree: (tree["A"] @ (tree["rest"][0] @ tree["rest"][1])).sum())(tree)
        assert isinstance(gradient["A"], Dense)

    def test_none_for_tensors(self):
        """torch.func takes trees apart that it has filled with what is no tensor."""
        A = Dense(sampled(3, 3)) + Diagonal(sampled(3))
        treespec = pytree.tree_structure(A)
        for filling in ([None, 0], [0, 1], ["a", object()], [True, False]):
            filled = pytree.tree_unflatten(filling, treespec)
            assert pytree.tree_leaves(filled) == filling


def test_subclasses_outside_the_package_are_pytrees_too():
    class Shift(LinearOperator):
        """``A v = s * roll(v, k)``."""

        _parameters = ("s",)
        _transient = ("_cache",)
        _cache = None

        def __init__(self, s: Tensor, k: int) -> None:
            space = ops.Space.flat(3, s.dtype)
            super().__init__(space, space)
            self.s, self.k = s, k

        def _matvec(self, v: Tensor) -> Tensor:
            self._cache = self.s.shape
            return self.s * v.roll(self.k)

        def _rmatvec(self, v: Tensor) -> Tensor:
            return (self.s * v).roll(-self.k)

    A, v = Shift(sampled(3), 1), sampled(3, seed=1)
    A @ v
    close(grad(lambda A: (A @ v).sum())(A).s, v.roll(1))
    batch = A.with_tensors((sampled(4, 3),))
    assert batch._cache is None
    close(vmap(lambda A: A @ v)(batch), sampled(4, 3) * v.roll(1))
    assert pytree.tree_structure(A) != pytree.tree_structure(Shift(sampled(3), 2))
    close(ops.Inverse(A, solvers.DenseLU()) @ (A @ v), v)
