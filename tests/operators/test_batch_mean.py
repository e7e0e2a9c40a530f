"""`BatchMean` over chunks against the same operator over the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.utils import _pytree as pytree

import operators as ops
import solvers
from operators import BatchMean, LinearOperator

F64 = torch.float64
few = settings(deadline=None, max_examples=12, derandomize=True)


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


Batch = dict[str, Tensor]


def tree(v: Tensor) -> dict[str, Tensor]:
    return {"w": v[:2], "b": v[2]}


def outputs(y: dict[str, Tensor], inputs: Tensor) -> Tensor:
    return torch.tanh(inputs @ y["w"] + y["b"])


def loss(y: dict[str, Tensor], x: Tensor, batch: Batch) -> Tensor:
    errors = (outputs(y, batch["inputs"]) - batch["targets"]) ** 2
    return errors.mean() + torch.exp(x) @ torch.stack([(y["w"] ** 2).sum(), y["b"] ** 2])


def hessian(batch: Batch, y: Tensor, x: Tensor) -> LinearOperator:
    return ops.Hessian(loss, tree(y), x, batch)


def forward(batch: Batch, y: Tensor, x: Tensor) -> LinearOperator:
    return ops.Hessian(loss, tree(y), x, batch, mode="forward")


def cross(batch: Batch, y: Tensor, x: Tensor) -> LinearOperator:
    return ops.CrossDerivative(loss, tree(y), x, batch)


def gauss_newton(batch: Batch, y: Tensor, x: Tensor) -> LinearOperator:
    J = ops.Linearization(lambda y, inputs: outputs(y, inputs), tree(y), batch["inputs"])
    return (2 / len(batch["inputs"])) * (J.T @ J)


def jacobian_of_the_mean(batch: Batch, y: Tensor, x: Tensor) -> LinearOperator:
    return ops.Jacobian(lambda y, inputs: outputs(y, inputs).mean()[None], tree(y), batch["inputs"])


def diagonal(batch: Batch, y: Tensor, x: Tensor) -> LinearOperator:
    return ops.Diagonal((batch["inputs"] ** 2).mean(0) + y[:2])


KINDS: dict[str, Callable[[Batch, Tensor, Tensor], LinearOperator]] = {
    "Hessian": hessian,
    "Hessian forward": forward,
    "CrossDerivative": cross,
    "Gauss-Newton": gauss_newton,
    "Jacobian": jacobian_of_the_mean,
    "Diagonal": diagonal,
}
every_kind = pytest.mark.parametrize("name", KINDS)
Y, X = sampled(3, seed=1), sampled(2, seed=2)


def batch(count: int, seed: int = 0) -> Batch:
    return {"inputs": sampled(count, 2, seed=seed), "targets": sampled(count, seed=seed + 1)}


@every_kind
class TestAgainstTheWhole:
    @few
    @given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 999))
    def test_value(self, name, count, chunk_size, seed):
        """Also where the last chunk is smaller, and where one chunk is all."""
        data = batch(count, seed)
        A = BatchMean(KINDS[name], data, Y, X, chunk_size=chunk_size)
        whole = KINDS[name](data, Y, X)
        assert (A.domain, A.codomain) == (whole.domain, whole.codomain)
        close(A.to_dense(), whole.to_dense())
        v, u = sampled(A.shape[1], seed=3), sampled(A.shape[0], seed=4)
        close(A @ v, whole @ v)
        close(A.T @ u, whole.T @ u)
        close(A.T @ sampled(A.shape[0], 2), whole.T @ sampled(A.shape[0], 2))
        close(A @ A.domain.unravel(v), whole @ whole.domain.unravel(v))
        assert (A @ v.new_zeros(A.shape[1], 0)).shape == (A.shape[0], 0)
        diagonal = A._exact_diagonal() if A.shape[0] == A.shape[1] else None
        if diagonal is not None:
            close(diagonal, whole.to_dense().diagonal())

    @pytest.mark.parametrize("chunk_size", [2, 5, 7])
    def test_derivatives(self, name, chunk_size):
        """By the point, the outer variables and the batch itself."""
        data, kind = batch(5), KINDS[name]
        whole = kind(data, Y, X)
        v, u = sampled(whole.shape[1], seed=3), sampled(whole.shape[0], seed=4)

        def ours(y, x, data, v):
            return BatchMean(kind, data, y, x, chunk_size=chunk_size) @ v

        def theirs(y, x, data, v):
            return kind(data, y, x) @ v

        point = (Y, X, data, v)
        close(vjp(ours, *point)[1](u), vjp(theirs, *point)[1](u))
        moved = pytree.tree_map(lambda t: torch.cos(3 * t), point)
        close(jvp(ours, point, moved), jvp(theirs, point, moved))
        curvature = [
            jvp(grad(lambda *p, f=f: (f(*p) * u).sin().sum(), (0, 2)), point, moved)[1]
            for f in (ours, theirs)
        ]
        close(*curvature)

    def test_with_respect_to_the_operator(self, name):
        data, kind = batch(5), KINDS[name]
        A = BatchMean(kind, data, Y, X, chunk_size=2)
        assert len(A.tensors) == 4
        v, u = sampled(A.shape[1], seed=3), sampled(A.shape[0], seed=4)
        gradient = grad(lambda A: u @ (A @ v))(A)
        assert isinstance(gradient, BatchMean)
        expected = grad(lambda data, y, x: u @ (kind(data, y, x) @ v), (0, 1, 2))(data, Y, X)
        close((gradient.batch, *gradient.args), expected)
        close(A.T @ u, kind(data, Y, X).T @ u)

    def test_plain_autograd_twice(self, name):
        y = Y.clone().requires_grad_()
        A = BatchMean(KINDS[name], batch(5), y, X, chunk_size=2)
        v, u = sampled(A.shape[1], seed=3), sampled(A.shape[0], seed=4)
        expected = grad(lambda y: u @ (KINDS[name](batch(5), y, X) @ v))(Y)
        for _ in range(2):
            y.grad = None
            (u @ (A @ v)).backward()
            close(y.grad, expected)

    def test_vmap(self, name):
        data, kind = batch(5), KINDS[name]
        A = BatchMean(kind, data, Y, X, chunk_size=2)
        V = sampled(4, A.shape[1], seed=3)
        close(vmap(lambda v: A @ v)(V), V @ A.to_dense().T)
        points = sampled(4, 3, seed=5)
        products = [
            vmap(f)(points, V)
            for f in (
                lambda y, v: BatchMean(kind, data, y, X, chunk_size=2) @ v,
                lambda y, v: kind(data, y, X) @ v,
            )
        ]
        close(*products)
        batches = {key: torch.stack([leaf, 2 * leaf]) for key, leaf in data.items()}
        products = [
            vmap(f)(batches)
            for f in (
                lambda data: BatchMean(kind, data, Y, X, chunk_size=2) @ V[0],
                lambda data: kind(data, Y, X) @ V[0],
            )
        ]
        close(*products)


class TestChunks:
    def recorded(self, count: int, chunk_size: int) -> list[int]:
        sizes: list[int] = []

        def operator_of(chunk: Tensor) -> LinearOperator:
            sizes.append(len(chunk))
            return ops.Diagonal(chunk.mean(0).exp())

        A = BatchMean(operator_of, sampled(count, 2), chunk_size=chunk_size)
        sizes.clear()
        A @ sampled(2)
        return sizes

    @pytest.mark.parametrize(
        ("count", "chunk_size", "sizes"),
        [(6, 2, [2, 2, 2]), (5, 2, [2, 2, 1]), (5, 5, [5]), (5, 9, [5]), (3, 1, [1, 1, 1])],
    )
    def test_sizes(self, count, chunk_size, sizes):
        assert self.recorded(count, chunk_size) == sizes

    def test_weights_by_their_size(self):
        values = torch.tensor([1.0, 1.0, 10.0])[:, None]
        A = BatchMean(lambda c: ops.Diagonal(c.mean(0)), values, chunk_size=2)
        assert float((A @ torch.ones(1))[0]) == pytest.approx(4.0)  # not (1 + 10) / 2

    def test_a_batch_changed_in_place(self):
        data = batch(5)
        A = BatchMean(hessian, data, Y, X, chunk_size=2)
        A @ sampled(3)
        data["inputs"].mul_(2)
        close(A.to_dense(), hessian(data, Y, X).to_dense())

    def test_batches_of_tensors_lists_and_integers(self):
        labels, inputs = torch.tensor([0, 1, 1, 0, 2]), sampled(5, 2)

        def ce(W, inputs, labels):
            return torch.nn.functional.cross_entropy(inputs @ W, labels)

        def of(chunk, W):
            return ops.Hessian(ce, W, *chunk)

        W = sampled(2, 3)
        for data in ([inputs, labels], (inputs, labels)):
            A = BatchMean(of, data, W, chunk_size=2)
            close(A.to_dense(), ops.Hessian(ce, W, inputs, labels).to_dense())
            gradient = grad(lambda A: A.to_dense().square().sum())(A)
            assert gradient.batch[1] is labels
        leaf = BatchMean(
            lambda c, W: ops.Hessian(lambda W, c: (c @ W).square().mean(), W, c),
            inputs,
            W,
            chunk_size=3,
        )
        close(leaf.to_dense(), ops.Hessian(lambda W: (inputs @ W).square().mean(), W).to_dense())


class TestFacts:
    def test_are_kept(self):
        assert BatchMean(hessian, batch(5), Y, X, chunk_size=2).symmetric
        A = BatchMean(gauss_newton, batch(5), Y, X, chunk_size=2)
        assert A.positive_semidefinite
        assert A.T is A
        assert not BatchMean(cross, batch(5), Y, X, chunk_size=2).symmetric

    def test_of_the_first_chunk_alone_are_no_facts(self):
        """Definiteness that is looked up in the values of one chunk may fail in the next."""
        values = torch.tensor([[1.0, 2.0], [-5.0, -5.0]])
        A = BatchMean(lambda c: ops.Diagonal(c.mean(0)), values, chunk_size=1)
        assert A.diagonal
        assert not A.positive_semidefinite
        assert not A.positive_definite

    def test_claims_of_any_chunk_are_tried(self):
        values = torch.stack([torch.eye(2, dtype=F64), -5 * torch.eye(2, dtype=F64)])
        with pytest.raises(ops.FalseClaimError, match="positive definite"):
            BatchMean(
                lambda c: ops.Dense(c.mean(0), positive_definite=True), values, chunk_size=1
            ) @ sampled(2)

    def test_solves(self):
        A = BatchMean(gauss_newton, batch(7), Y, X, chunk_size=3) + 0.5 * ops.Identity(3)
        assert A.positive_definite
        b = sampled(3, seed=6)
        for solver in (solvers.CG(rtol=1e-12), solvers.DenseCholesky()):
            close(A @ solver.prepare(A).solve(b).value, b)

    def test_inverse_by_the_batch(self):
        data, b = batch(5), sampled(3, seed=6)

        def ours(inputs, y):
            A = BatchMean(hessian, {**data, "inputs": inputs}, y, X + 2, chunk_size=2)
            return (ops.Inverse(A, solvers.DenseLU()) @ b).square().sum()

        def theirs(inputs, y):
            A = hessian({**data, "inputs": inputs}, y, X + 2).to_dense()
            return torch.linalg.solve(A, b).square().sum()

        close(grad(ours, (0, 1))(data["inputs"], Y), grad(theirs, (0, 1))(data["inputs"], Y))


class TestRefusals:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (
                {"a": torch.zeros(3, 1), "b": torch.zeros(2)},
                r"lengths \[2, 3\]; expected one N > 0",
            ),
            (torch.zeros(0, 2), r"lengths \[0\]; expected one N > 0"),
            (torch.zeros(()), "without axes"),
            ([], "holds no tensor"),
            ([1.0, 2.0], "holds no tensor"),
            ({"a": torch.zeros(3), "b": 2.0}, "holds no tensor"),
        ],
    )
    def test_batches(self, data, message):
        with pytest.raises(ValueError, match=message):
            BatchMean(lambda c: ops.Identity(2), data, chunk_size=2)

    @pytest.mark.parametrize("chunk_size", [0, -1])
    def test_chunk_sizes(self, chunk_size):
        with pytest.raises(ValueError, match=rf"chunk_size={chunk_size}; expected at least 1"):
            BatchMean(lambda c: ops.Identity(2), torch.zeros(3), chunk_size=chunk_size)

    def test_what_returns_no_operator(self):
        with pytest.raises(TypeError, match="operator_of"):
            BatchMean(lambda c: c.mean(), torch.zeros(3), chunk_size=2)

    def test_chunks_that_are_no_means(self):
        """The Jacobian of per-sample outputs has as many rows as the chunk has samples."""
        A = partial(
            BatchMean,
            lambda c, y: ops.Jacobian(lambda y, c: outputs(y, c), tree(y), c),
            sampled(5, 2),
            Y,
        )
        with pytest.raises(ValueError, match=r"chunk"):
            A(chunk_size=2) @ sampled(3)
