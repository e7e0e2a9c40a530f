"""Optimality conditions: residuals, values and linearisations against formulas by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jacrev, vmap

import operators as ops
from hyperlearn.conditions import (
    Conditions,
    FixedPoint,
    LeastSquares,
    ProximalGradient,
    Root,
    Stationary,
)
from hyperlearn.projections import Box
from hyperlearn.proximal import L1
from operators import Space
from tests.hyperlearn.problems import FLOAT64, sampled

Y = {"a": sampled(2, 2, seed=1), "b": sampled(3, seed=2)}
SPACE = Space.of(Y)
FLAT = SPACE.ravel(Y)
X = sampled(7, seed=3)
M = sampled(7, 7, seed=4)


def nested(flat: Tensor) -> Any:
    return SPACE.unravel(flat)


def F(y: Any, x: Tensor) -> Any:
    return nested(M @ torch.sin(SPACE.ravel(y)) - x)


def f(y: Any, x: Tensor) -> Tensor:
    flat = SPACE.ravel(y)
    return (torch.cosh(M @ flat) * x.exp()).sum()


def r(y: Any, x: Tensor) -> Any:
    flat = SPACE.ravel(y)
    return {"p": torch.sin(M[:4] @ flat), "q": (flat[:5] ** 2 - x[:5]).reshape(5, 1)}


EXACT = M @ torch.diag(torch.cos(FLAT))
Z = M @ FLAT
R = torch.cat([torch.sin(M[:4] @ FLAT), FLAT[:5] ** 2 - X[:5]])
J = torch.cat([torch.diag(torch.cos(M[:4] @ FLAT)) @ M[:4], torch.diag(2 * FLAT)[:5]])

CASES: dict[str, tuple[Conditions, Tensor, Tensor, Tensor]] = {
    "root": (
        Root(F, SPACE),
        M @ torch.sin(FLAT) - X,
        (M @ torch.sin(FLAT) - X).square().sum() / 2,
        EXACT,
    ),
    "fixed point": (
        FixedPoint(F, SPACE),
        FLAT - M @ torch.sin(FLAT) + X,
        (FLAT - M @ torch.sin(FLAT) + X).square().sum() / 2,
        torch.eye(7, dtype=FLOAT64) - EXACT,
    ),
    "stationary": (
        Stationary(f, SPACE),
        M.T @ (torch.sinh(Z) * X.exp()),
        (torch.cosh(Z) * X.exp()).sum(),
        M.T @ torch.diag(torch.cosh(Z) * X.exp()) @ M,
    ),
    "least squares": (
        LeastSquares(r, SPACE),
        J.T @ R,
        R @ R / 2,
        J.T @ J
        - M[:4].T @ torch.diag(torch.sin(M[:4] @ FLAT) ** 2) @ M[:4]
        + torch.diag(torch.cat([2 * R[4:], torch.zeros(2, dtype=FLOAT64)])),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_residual_value_and_linearisation(name: str) -> None:
    conditions, residual, value, A = CASES[name]
    torch.testing.assert_close(conditions.residual(FLAT, X), residual)
    torch.testing.assert_close(conditions.value(FLAT, X), value)
    torch.testing.assert_close(conditions.dense(FLAT, X), A)
    operator = conditions.operator(FLAT, X)
    torch.testing.assert_close(operator.to_dense(), A)
    torch.testing.assert_close(operator.T @ X, A.T @ X)
    assert conditions.symmetric == (name in ("stationary", "least squares"))
    assert bool(operator.symmetric) == conditions.symmetric
    assert not conditions.given


@pytest.mark.parametrize("step", [0.01, 0.3])
def test_proximal_gradient_is_zero_where_the_sum_is_least(step: float) -> None:
    space = Space.flat(3, FLOAT64)
    b = torch.tensor([2.0, 0.1, -1.0], dtype=FLOAT64)

    def fit(y: Tensor, x: Tensor) -> Tensor:
        return ((y - b) ** 2 * x).sum() / 2

    x = torch.tensor([1.0, 2.0, 4.0], dtype=FLOAT64)
    penalty = L1(0.5)
    lasso = ProximalGradient(fit, space, penalty.prox, penalty.penalty)
    y = torch.tensor([1.5, 0.0, -0.875], dtype=FLOAT64)
    lasso.take_step()
    at = (x, torch.tensor(step, dtype=FLOAT64))
    torch.testing.assert_close(lasso.residual(y, at), torch.zeros(3, dtype=FLOAT64))
    torch.testing.assert_close(lasso.value(y, at), fit(y, x) + 0.5 * y.abs().sum())
    # The entry at zero has the row of the identity; the others s times the Hessian.
    expected = torch.diag(torch.tensor([step * 1.0, 1.0, step * 4.0], dtype=FLOAT64))
    torch.testing.assert_close(lasso.dense(y, at), expected)
    box = ProximalGradient(fit, space, lambda y, step, x: Box(0.0, 1.0)(y))
    inside = torch.tensor([1.0, 0.1, 0.0], dtype=FLOAT64)
    torch.testing.assert_close(box.residual(inside, x), torch.zeros(3, dtype=FLOAT64))
    torch.testing.assert_close(box.value(inside, x), fit(inside, x))


def test_members_of_a_batch_have_their_own_step() -> None:
    space = Space.flat(2, FLOAT64)
    conditions = ProximalGradient(
        lambda y, x: x * (y**2).sum() / 2, space, lambda y, step, x: y.clamp_max(10.0)
    )
    conditions.take_step()
    y, x, s = sampled(3, 2), sampled(3).exp(), sampled(3, seed=1).exp()
    got = vmap(lambda y, x, s: conditions.residual(y, (x, s)))(y, x, s)
    torch.testing.assert_close(got, (s * x)[:, None] * y)


def test_an_operator_in_place_of_the_derived_one() -> None:
    conditions = Root(F, SPACE, lambda y, x: ops.Diagonal(2 + 0 * SPACE.ravel(y)))
    assert conditions.given
    expected = 2 * torch.eye(7, dtype=FLOAT64)
    torch.testing.assert_close(conditions.operator(FLAT, X).to_dense(), expected)
    with pytest.raises(TypeError, match="operator"):
        Root(F, SPACE, lambda y, x: torch.eye(7)).operator(FLAT, X)
    with pytest.raises(ValueError, match=r"\(6, 6\).*7 entries"):
        Root(F, SPACE, lambda y, x: ops.Identity(6)).operator(FLAT, X)


@pytest.mark.parametrize("kind", [Root, FixedPoint])
@pytest.mark.parametrize(
    "value",
    [None, 3.0, torch.zeros(7), {"a": Y["a"]}, {"b": Y["b"], "a": Y["a"], "c": Y["b"]}, [Y]],
)
def test_another_structure_is_refused_in_the_users_terms(kind: Any, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=kind.noun):
        kind(lambda y, x: value, SPACE).residual(FLAT, X)


@pytest.mark.parametrize("value", [3.0, torch.ones(1), torch.ones(2, 2), None])
def test_a_loss_is_a_scalar_tensor(value: Any) -> None:
    with pytest.raises(ValueError, match=r"loss\(y, x\) returned"):
        Stationary(lambda y, x: value, SPACE).value(FLAT, X)


def test_everything_maps() -> None:
    many = sampled(4, 7, seed=9)
    for conditions, *_ in CASES.values():
        got = vmap(conditions.dense, (0, None))(many, X)
        each = torch.stack([jacrev(conditions.residual)(y, X) for y in many])
        torch.testing.assert_close(got, each)
