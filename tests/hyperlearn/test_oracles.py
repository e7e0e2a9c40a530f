"""`Oracles`: values against plain autograd, and one count for one call."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperlearn.oracles import OracleCount, Oracles, batch_length
from hyperlearn.regularizer import L2
from operators import Space

FLOAT64 = torch.float64
BATCH = {
    "Z": torch.linspace(-1, 1, 12, dtype=FLOAT64).reshape(4, 3),
    "t": torch.arange(4.0).double(),
}


def inner_loss(y: Any, x: Tensor, batch: Any) -> Tensor:
    fit = torch.log(torch.cosh(batch["Z"] @ y["w"] + y["b"] - batch["t"]))
    return fit.mean() + (x.exp() * y["w"] ** 2).sum() + x.sum() ** 2 * y["b"].sum()


def outer_loss(y: Any, x: Tensor, batch: Any) -> Tensor:
    return ((batch @ y["w"] - y["b"]) ** 2).mean() + torch.sin(x @ y["w"])


Y0 = {"w": torch.tensor([0.3, -0.2, 0.5], dtype=FLOAT64), "b": torch.tensor([0.1], dtype=FLOAT64)}
SPACE = Space.of(Y0)
Y, X = SPACE.ravel(Y0), torch.tensor([0.2, -0.4, 0.1], dtype=FLOAT64)
OUTER = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, -1.0]], dtype=FLOAT64)
PENALTY = 0.3


def oracles(penalty: float = PENALTY) -> Oracles:
    return Oracles(inner_loss, outer_loss, SPACE, Space.of(X), L2(penalty))


def objective(y: Tensor, x: Tensor) -> Tensor:
    return inner_loss(SPACE.unravel(y), x, BATCH) + PENALTY * (y**2).sum()


def gradient(function: Any, *at: Tensor) -> tuple[Tensor, ...]:
    points = [point.clone().requires_grad_(True) for point in at]
    return torch.autograd.grad(function(*points), points)


class TestValues:
    def test_losses(self):
        assert float(oracles().inner(Y, X, BATCH)) == float(objective(Y, X))
        assert float(oracles().outer(Y, X, OUTER)) == float(outer_loss(Y0, X, OUTER))

    def test_gradients(self):
        (plain,) = gradient(lambda y: inner_loss(SPACE.unravel(y), X, BATCH), Y)
        (whole,) = gradient(lambda y: objective(y, X), Y)
        torch.testing.assert_close(oracles().score(Y, X, BATCH), plain)
        torch.testing.assert_close(oracles().inner_gradient(Y, X, BATCH), whole)
        assert (whole - plain).norm() > 0.1  # the penalty is in one of them only

    def test_score_of_another_loss(self):
        def other(y: Any, x: Tensor, batch: Any) -> Tensor:
            return (y["w"] ** 3).sum()

        expected = torch.cat([3 * Y0["w"] ** 2, torch.zeros(1, dtype=FLOAT64)])  # "w" comes first
        torch.testing.assert_close(oracles().score(Y, X, BATCH, other), expected)

    def test_outer_gradients(self):
        expected = gradient(lambda y, x: outer_loss(SPACE.unravel(y), x, OUTER), Y, X)
        for found, reference in zip(oracles().outer_gradients(Y, X, OUTER), expected, strict=True):
            torch.testing.assert_close(found, reference)

    @pytest.mark.parametrize("damping", [0.0, 0.7])
    def test_hessian(self, damping):
        dense = torch.autograd.functional.hessian(lambda y: objective(y, X), Y)
        expected = dense + damping * torch.eye(4, dtype=FLOAT64)
        operator = oracles().hessian(Y, X, BATCH, damping)
        assert operator.symmetric
        torch.testing.assert_close(operator.to_dense(), expected)
        torch.testing.assert_close(operator @ Y, expected @ Y)
        torch.testing.assert_close(operator.T @ Y, expected @ Y)

    def test_cross_derivative_has_the_outer_variable_in_its_rows(self):
        dense = torch.autograd.functional.hessian(objective, (Y, X))[1][0]
        operator = oracles().cross(Y, X, BATCH)
        assert operator.shape == (3, 4)
        torch.testing.assert_close(operator.to_dense(), dense)
        torch.testing.assert_close(operator.T.to_dense(), dense.T)

    def test_pullback_of_a_step(self):
        def step(y: Tensor, x: Tensor) -> Tensor:
            return y - 0.1 * torch.func.grad(objective)(y, x)

        jacobians = torch.autograd.functional.jacobian(step, (Y, X))
        u = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=FLOAT64)
        through_y, through_x = oracles().step_pullback(step, Y, X, u, BATCH)
        torch.testing.assert_close(through_y, jacobians[0].T @ u)
        torch.testing.assert_close(through_x, jacobians[1].T @ u)

    def test_the_products_of_an_adjoint(self):
        found = oracles()
        q = torch.linspace(-1, 1, len(Y), dtype=FLOAT64)
        for hessian in (False, True):
            gradient, crossed, curved = found.adjoint_products(Y, X, q, BATCH, hessian=hessian)
            torch.testing.assert_close(gradient, found.inner_gradient(Y, X, BATCH))
            torch.testing.assert_close(crossed, found.cross(Y, X, BATCH) @ q)
            assert (curved is None) != hessian
        torch.testing.assert_close(curved, found.hessian(Y, X, BATCH) @ q)

    def test_no_graph_is_left(self):
        y, x = Y.clone().requires_grad_(True), X.clone().requires_grad_(True)
        found = oracles()
        with torch.no_grad():
            results = [
                found.score(y, x, BATCH),
                *found.outer_gradients(y, x, OUTER),
                found.hessian(y, x, BATCH)._matvec(Y),
                found.cross(y, x, BATCH)._matvec(Y),
            ]
        assert not any(result.requires_grad for result in results)

    def test_without_data(self):
        bare = Oracles(
            lambda y, x: (y**2).sum() * x.sum(),
            lambda y, x: (y * x).sum(),
            Space.of(X),
            Space.of(X),
        )
        torch.testing.assert_close(bare.inner_gradient(X, X, None), 2 * X * X.sum())
        assert bare.count.samples == 1

    @pytest.mark.parametrize("value", [torch.zeros(1), torch.zeros(2, 2), 3.0, None])
    def test_losses_that_are_no_scalars(self, value):
        bad = Oracles(lambda y, x: value, lambda y, x: value, Space.of(X), Space.of(X))
        for name, call in (
            ("inner_loss", bad.score),
            ("inner_loss", bad.inner),
            ("outer_loss", bad.outer_gradients),
            ("outer_loss", bad.outer),
        ):
            with pytest.raises(ValueError, match=f"{name} returned .*expected a scalar"):
                call(X, X, None)


class TestCounts:
    """(gradients, Hessian products, cross products, samples) of each call."""

    def count(self, work: Any) -> tuple[int, ...]:
        found = oracles()
        work(found)
        return astuple(found.count)

    def test_each_kind(self):
        block = torch.ones(4, 5, dtype=FLOAT64)
        cases = [
            (lambda o: o.score(Y, X, BATCH), (1, 0, 0, 4)),
            (lambda o: o.inner_gradient(Y, X, BATCH), (1, 0, 0, 4)),
            (lambda o: o.outer_gradients(Y, X, OUTER), (1, 0, 0, 2)),
            (lambda o: o.hessian(Y, X, BATCH), (0, 0, 0, 0)),  # forming it costs nothing
            (lambda o: o.hessian(Y, X, BATCH) @ Y, (0, 1, 0, 4)),
            (lambda o: o.hessian(Y, X, BATCH).T @ Y, (0, 1, 0, 4)),
            (lambda o: o.hessian(Y, X, BATCH, 0.5) @ Y, (0, 1, 0, 4)),
            (lambda o: o.hessian(Y, X, BATCH) @ block, (0, 5, 0, 20)),
            (lambda o: o.hessian(Y, X, BATCH).to_dense(), (0, 4, 0, 16)),
            (lambda o: o.cross(Y, X, BATCH) @ Y, (0, 0, 1, 4)),
            (lambda o: o.cross(Y, X, BATCH).T @ X, (0, 0, 1, 4)),
            (lambda o: o.step_pullback(lambda y, x: y, Y, X, Y, BATCH), (0, 1, 1, 8)),
            (lambda o: o.adjoint_products(Y, X, Y, BATCH, hessian=False), (0, 0, 1, 4)),
            (lambda o: o.adjoint_products(Y, X, Y, BATCH, hessian=True), (0, 1, 1, 8)),
            (lambda o: o.inner(Y, X, BATCH), (0, 0, 0, 0)),
            (lambda o: o.outer(Y, X, OUTER), (0, 0, 0, 0)),
        ]
        for number, (work, expected) in enumerate(cases):
            assert self.count(work) == expected, number

    def test_total(self):
        assert (
            OracleCount(gradients=1, hessian_products=10, cross_products=100, samples=7).calls
            == 111
        )

    def test_uncounted(self):
        found = oracles()
        operator = found.hessian(Y, X, BATCH)
        with found.uncounted():
            found.score(Y, X, BATCH)
            operator @ Y
            with found.uncounted():
                found.cross(Y, X, BATCH) @ Y
            found.outer_gradients(Y, X, OUTER)
        assert found.count == OracleCount()
        operator @ Y
        assert found.count == OracleCount(hessian_products=1, samples=4)

    def test_uncounted_ends_with_an_error(self):
        found = oracles()
        with pytest.raises(RuntimeError, match="mine"), found.uncounted():
            raise RuntimeError("mine")
        found.score(Y, X, BATCH)
        assert found.count.gradients == 1

    def test_batch_length(self):
        assert batch_length(BATCH) == 4
        assert batch_length((torch.zeros(7, 2), torch.zeros(7))) == 7
        assert batch_length(None) == 1
