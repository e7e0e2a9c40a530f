"""What every inner method promises, whatever it does."""

from __future__ import annotations

import dataclasses
import math
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

import hyperlearn.inner as inner
import solvers
from hyperlearn.conditions import FixedPoint, Root, Stationary
from hyperlearn.inner import (
    LBFGS,
    Anderson,
    Broyden,
    FixedPointIteration,
    GradientDescent,
    InnerMethod,
    LevenbergMarquardt,
    Newton,
    SciPy,
    TorchOptimizer,
)
from hyperlearn.solutions import argmin, fixed_point, root
from tests.hyperlearn.inner.systems import equation
from tests.hyperlearn.problems import FLOAT64, contraction, sampled, spd

PROPERTY = settings(max_examples=8, deadline=None, derandomize=True)

# Stops at tolerances of its own unless told not to.
TORCH = partial(
    torch.optim.LBFGS, line_search_fn="strong_wolfe", tolerance_change=0, tolerance_grad=0
)

# Largest condition number that each is to cope with within its own limit of steps.
MINIMISERS: dict[str, tuple[InnerMethod, float]] = {
    "newton": (Newton(), 1e4),
    "levenberg-marquardt": (LevenbergMarquardt(), 1e4),
    "lbfgs": (LBFGS(), 1e4),
    "descent": (GradientDescent(), 10.0),
    "nesterov": (GradientDescent(acceleration="nesterov"), 100.0),
    "broyden": (Broyden(), 1e3),
    "scipy": (SciPy(rtol=1e-7), 100.0),
    "scipy trust region": (SciPy(method="trust-exact"), 1e4),
    "torch": (TorchOptimizer(optimizer=TORCH, rtol=1e-6, maxiter=200), 10.0),
}
ROOTS: dict[str, InnerMethod] = {
    "newton": Newton(),
    "pure newton": Newton(line_search=False),
    "levenberg-marquardt": LevenbergMarquardt(),
    "broyden": Broyden(),
    "bad broyden": Broyden(update="bad"),
    "anderson": Anderson(),
    "iteration": FixedPointIteration(),
    "scipy": SciPy(),
    "scipy lm": SciPy(method="lm"),
}


@pytest.mark.parametrize("name", MINIMISERS)
def test_strongly_convex_quadratics(name: str) -> None:
    method, most = MINIMISERS[name]

    @given(
        n=st.integers(1, 8),
        condition=st.sampled_from([c for c in (1.0, 10.0, 100.0, 1e3, 1e4) if c <= most]),
        seed=st.integers(0, 100),
    )
    @PROPERTY
    def check(n: int, condition: float, seed: int) -> None:
        H, b = spd(n, condition, seed), sampled(n, seed=seed + 1)
        answer = argmin(
            lambda y, x: y @ H @ y / 2 - x @ y, torch.zeros_like(b), b, method=method,
            return_info=True,
        )  # fmt: skip
        assert answer.info.converged, answer.info.reason
        exact = torch.linalg.solve(H, b)
        error = float((answer.y - exact).norm() / exact.norm())
        rtol = method.tolerance(FLOAT64)
        assert error <= 1.1 * condition * max(rtol, 1e-14), (error, condition)

    check()


FEATURES = sampled(30, 4, seed=21)
LABELS = (FEATURES @ sampled(4, seed=22) + sampled(30, seed=23) > 0).double()


def logistic(y: Tensor, x: Tensor) -> Tensor:
    scores = FEATURES @ y
    return torch.nn.functional.binary_cross_entropy_with_logits(scores, LABELS) + x * y @ y / 2


@pytest.mark.parametrize("name", MINIMISERS)
def test_logistic_regression(name: str) -> None:
    method = MINIMISERS[name][0]
    x = torch.tensor(0.05, dtype=FLOAT64)
    y = argmin(logistic, torch.zeros(4, dtype=FLOAT64), x, method=method)
    by_hand = torch.zeros(4, dtype=FLOAT64)
    for _ in range(20):
        p = torch.sigmoid(FEATURES @ by_hand)
        slope = FEATURES.T @ (p - LABELS) / 30 + x * by_hand
        curve = FEATURES.T @ torch.diag(p * (1 - p)) @ FEATURES / 30 + x * torch.eye(4)
        by_hand = by_hand - torch.linalg.solve(curve, slope)
    rtol = 1e-5 if name in ("scipy", "scipy trust region", "torch") else 1e-8
    torch.testing.assert_close(y, by_hand, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", ROOTS)
def test_a_contraction_and_its_batch(name: str) -> None:
    T = contraction(5, 0.6, seed=31)
    map_ = lambda y, x: T @ torch.tanh(y) + x  # noqa: E731
    X = sampled(3, 5, seed=32)
    zero = torch.zeros(5, dtype=FLOAT64)
    solve = lambda x: fixed_point(map_, zero, x, method=ROOTS[name])  # noqa: E731
    exact = zero.expand(3, 5)
    for _ in range(100):
        exact = torch.tanh(exact) @ T.T + X
    rtol = 1e-7 if "scipy" in name else 1e-9
    alone = torch.stack([solve(x) for x in X])
    torch.testing.assert_close(alone, exact, rtol=rtol, atol=rtol)
    torch.testing.assert_close(vmap(solve)(X), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["newton", "levenberg-marquardt", "broyden", "anderson", "iteration"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    T = contraction(4, 0.4, seed=41)
    x = sampled(4, seed=42)
    small = fixed_point(
        lambda y, x: T.to(dtype) @ y + x, torch.zeros(4, dtype=dtype), x.to(dtype),
        method=ROOTS[name], return_info=True,
    )  # fmt: skip
    assert small.y.dtype == dtype
    assert small.info.converged, small.info.reason
    exact = torch.linalg.solve(torch.eye(4, dtype=FLOAT64) - T, x)
    rtol = 30 * torch.finfo(dtype).eps ** (2 / 3)
    torch.testing.assert_close(small.y.double(), exact, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", ["newton", "levenberg-marquardt", "lbfgs", "descent", "nesterov"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_minimisers_in_other_precisions(name: str, dtype: torch.dtype) -> None:
    H, b = spd(3, 4.0, seed=43), sampled(3, seed=44)
    small = argmin(
        lambda y, x: y @ H.to(dtype) @ y / 2 - x @ y, torch.zeros(3, dtype=dtype), b.to(dtype),
        method=MINIMISERS[name][0], return_info=True,
    )  # fmt: skip
    assert small.y.dtype == dtype
    assert small.info.converged, small.info.reason
    rtol = 30 * torch.finfo(dtype).eps ** (2 / 3)
    torch.testing.assert_close(small.y.double(), torch.linalg.solve(H, b), rtol=rtol, atol=rtol)


ALL: list[InnerMethod] = [
    Newton(), LevenbergMarquardt(), LBFGS(), GradientDescent(), Broyden(), Anderson(),
    FixedPointIteration(), SciPy(), TorchOptimizer(optimizer=torch.optim.Adam),
]  # fmt: skip


@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
def test_settings_are_frozen_compared_and_checked(method: InnerMethod) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.maxiter = 3  # type: ignore[misc]
    assert dataclasses.replace(method) == method
    assert dataclasses.replace(method, maxiter=7) != method
    for bad in (
        {"rtol": -1.0}, {"atol": math.nan}, {"rtol": math.inf}, {"rtol": "x"}, {"atol": None},
        {"maxiter": -1}, {"maxiter": 2.5}, {"maxiter": True}, {"rtol": True},
    ):  # fmt: skip
        (name,) = bad
        with pytest.raises(ValueError, match=f"{type(method).__name__}: {name}="):
            dataclasses.replace(method, **bad)
    assert method.tolerance(torch.float32) > method.tolerance(FLOAT64)
    assert dataclasses.replace(method, rtol=0.25).tolerance(FLOAT64) == 0.25
    assert type(method).__name__ in inner.__all__


@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
def test_no_steps_return_the_start_and_say_so(method: InnerMethod) -> None:
    method = dataclasses.replace(method, maxiter=0)
    y0 = torch.full((2,), 3.0, dtype=FLOAT64)
    with pytest.warns(solvers.ConvergenceWarning, match="after 0 iterations"):
        answer = argmin(
            lambda y, x: ((y - x) ** 2).sum(), y0, torch.ones(2), method=method, return_info=True
        )
    assert torch.equal(answer.y, y0)
    assert answer.info.iterations == 0
    # At the solution there is nothing to do, and nothing to warn of.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        argmin(lambda y, x: ((y - x) ** 2).sum(), y0, y0, method=method)


@pytest.mark.parametrize("name", ROOTS)
def test_what_the_info_says_is_measured(name: str) -> None:
    F = lambda y, x: torch.exp(y) * y - x  # noqa: E731
    y0, x = 0.5 * torch.ones(3, dtype=FLOAT64), torch.tensor([0.5, 1.0, 1.1], dtype=FLOAT64)
    method = ROOTS[name]
    if name in ("anderson", "iteration"):
        method = dataclasses.replace(method, **{"beta" if name == "anderson" else "step_size": 0.2})
    answer = root(F, y0, x, method=method, return_info=True)
    info = answer.info
    residual = F(answer.y, x)
    A = torch.diag(torch.exp(answer.y) * (1 + answer.y))
    scale = float((A @ answer.y - residual).norm())
    assert info.converged
    assert info.residual <= method.tolerance(FLOAT64)
    assert abs(info.residual - float(residual.norm()) / scale) <= 1e-12 + 0.5 * info.residual
    assert info.status == "converged"
    assert repr(method) == info.method
    assert info.evaluations > 0
    assert info.seconds > 0
    assert info.history[-1] <= info.history[0]
    if "scipy" not in name:
        assert len(info.history) == info.iterations + 1
    assert info.member_iterations.tolist() == [info.iterations]


def test_an_absolute_tolerance_is_one() -> None:
    F = lambda y, x: y**3 - x  # noqa: E731
    x = torch.tensor([8.0], dtype=FLOAT64)
    loose = root(F, torch.ones(1, dtype=FLOAT64), x, method=Newton(atol=0.5), return_info=True)
    assert float(F(loose.y, x).abs()) <= 0.5
    tight = root(F, torch.ones(1, dtype=FLOAT64), x, return_info=True)
    assert loose.info.iterations < tight.info.iterations


def test_a_method_refuses_what_it_is_not_for() -> None:
    space_y = torch.ones(2, dtype=FLOAT64)
    for method in (LBFGS(), GradientDescent(), TorchOptimizer(optimizer=torch.optim.SGD)):
        for kind in (Root, FixedPoint):
            conditions = equation(kind, lambda y, x: y, space_y, None).conditions
            with pytest.raises(TypeError, match=f"{type(method).__name__} is for"):
                method.check(conditions)
        method.check(equation(Stationary, lambda y, x: y.sum(), space_y, None).conditions)


def test_the_equation_of_a_batch_is_that_of_its_members() -> None:
    """Residuals, products, matrices and members, of batches of batches with axes of their own."""
    from hyperlearn.implicit_function import Outer
    from hyperlearn.inner import Equation
    from operators import Space

    F = lambda y, x: x["a"] @ y**2 + x["b"] - x["n"]  # noqa: E731
    outer, tensors = Outer.of({"a": sampled(2, 3, 3), "b": sampled(4, 3, seed=1), "n": 2})
    conditions = Root(F, Space.flat(3, FLOAT64))
    batch = Equation(conditions, outer, tensors, (2, 4), ((0, None), (None, 0)))
    Y, V = sampled(8, 3, seed=2), sampled(8, 3, seed=3)
    a, b = tensors
    for i in range(8):
        m, (j, k) = batch.member(i), divmod(i, 4)
        y, v = Y[i : i + 1], V[i : i + 1]
        A = 2 * a[j] * Y[i]
        torch.testing.assert_close(batch.residual(Y)[i], a[j] @ Y[i] ** 2 + b[k] - 2)
        torch.testing.assert_close(m.residual(y)[0], batch.residual(Y)[i])
        torch.testing.assert_close(batch.matrix(Y)[i], A)
        torch.testing.assert_close(batch.product(Y, V)[i], A @ V[i])
        torch.testing.assert_close(batch.transposed_product(Y, V)[i], A.T @ V[i])
        torch.testing.assert_close(m.product(y, v)[0], A @ V[i])
        torch.testing.assert_close(batch.solve(Y, V)[i], torch.linalg.solve(A, V[i]))


def test_info_of_any_method_is_plain() -> None:
    def f(x: Tensor) -> Any:
        answer = root(lambda y, x: y**2 - x, torch.ones_like(x), x, return_info=True)
        seen.append(answer.info)
        return answer.y

    seen: list[Any] = []
    torch.func.grad(lambda X: vmap(f)(X).sum())(torch.rand(4, 2, dtype=FLOAT64) + 1)
    assert seen[0].member_iterations.shape == (4,)
    assert isinstance(seen[0].residual, float)
    assert all(isinstance(value, float) for value in seen[0].history)
