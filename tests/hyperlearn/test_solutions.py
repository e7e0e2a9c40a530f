"""Solutions: closed forms, nesting, batches, starts, closed-over tensors, failures, constraints."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import operators as ops
import solvers
from hyperlearn.inner import (
    LBFGS,
    Anderson,
    Broyden,
    FixedPointIteration,
    GradientDescent,
    LevenbergMarquardt,
    Newton,
    SciPy,
)
from hyperlearn.projections import Ball, Box, NonNegative, Simplex
from hyperlearn.proximal import L1, ElasticNet, GroupLasso
from hyperlearn.solutions import argmin, fixed_point, least_squares, root
from tests.hyperlearn.problems import FLOAT64, POINT, contraction, differences, sampled, spd

PROPERTY = settings(max_examples=20, deadline=None, derandomize=True)
Function = Callable[[Tensor], Tensor]


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=FLOAT64)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=FLOAT64)


# --- problems of the field ------------------------------------------------------------------------


def heat(y: Tensor, x: Tensor) -> Tensor:
    """-(k(u) u')' = source on (0, 1), k(u) = 1 + x0 u^2, u = x1 and x2 at the ends."""
    u = torch.cat([x[1:2], y, x[2:3]])
    k = 1 + x[0] * ((u[1:] + u[:-1]) / 2) ** 2
    flux = k * (u[1:] - u[:-1]) * (len(y) + 1)
    return (flux[1:] - flux[:-1]) * (len(y) + 1) + 1.0


def midpoint(y: Tensor, x: Tensor) -> Tensor:
    """One implicit midpoint step of a van der Pol oscillator from (x0, x1), stiffness x2."""
    z = (y + x[:2]) / 2
    slope = torch.stack([z[1], x[2] * (1 - z[0] ** 2) * z[1] - z[0]])
    return y - x[:2] - 0.1 * slope


RESIDUALS: dict[str, tuple[Any, Tensor]] = {
    "heat": (heat, zeros(12)),
    "midpoint": (midpoint, zeros(2)),
    "trigonometric": (lambda y, x: y + 0.3 * torch.sin(y.roll(1) * x) - x, zeros(3)),
}


@pytest.mark.parametrize("name", RESIDUALS)
def test_differences_implicit_and_unrolled_agree(name: str) -> None:
    F, y0 = RESIDUALS[name]
    f = partial(root, F, y0)
    expected = differences(f, POINT)
    pure = partial(f, method=Newton(line_search=False), differentiate="unrolled")
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(transform(f)(POINT), expected, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(transform(pure)(POINT), expected, rtol=1e-8, atol=1e-9)
    v = sampled(3, seed=5)
    torch.testing.assert_close(jvp(f, (POINT,), (v,))[1], expected @ v, rtol=1e-8, atol=1e-9)
    second = differences(jacrev(f), POINT)
    torch.testing.assert_close(jacfwd(jacrev(f))(POINT), second, rtol=1e-6, atol=1e-7)


def test_quadratic_bilevel_problem_in_closed_form() -> None:
    """Both levels quadratic with cross terms: value and gradient of the outer function."""
    H, C, G, K = (
        spd(5, 50.0, seed=1),
        sampled(5, 3, seed=2),
        spd(5, 5.0, seed=3),
        sampled(5, 3, seed=4),
    )
    b, d = sampled(5, seed=5), sampled(3, seed=6)

    def outer(x: Tensor) -> Tensor:
        y = argmin(lambda y, x: y @ H @ y / 2 + y @ C @ x + b @ y, zeros(5), x)
        return y @ G @ y / 2 + y @ K @ x + d @ x

    x = sampled(3, seed=7)
    y = -torch.linalg.solve(H, C @ x + b)
    expected = K.T @ y + d - C.T @ torch.linalg.solve(H, G @ y + K @ x)
    torch.testing.assert_close(grad(outer)(x), expected, rtol=1e-11, atol=1e-12)
    J = -torch.linalg.solve(H, C)
    second = J.T @ G @ J + J.T @ K + K.T @ J
    torch.testing.assert_close(hessian(outer)(x), second, rtol=1e-10, atol=1e-11)


@given(
    n=st.integers(1, 6),
    m=st.integers(1, 4),
    condition=st.sampled_from([1.0, 30.0, 1e3]),
    seed=st.integers(0, 1000),
)
@PROPERTY
def test_gradients_of_random_strongly_convex_problems(
    n: int, m: int, condition: float, seed: int
) -> None:
    H, C, b = spd(n, condition, seed), sampled(n, m, seed=seed + 1), sampled(n, seed=seed + 2)
    w, d = sampled(n, seed=seed + 3), sampled(m, seed=seed + 4)

    def inner(y: Tensor, x: Tensor) -> Tensor:
        return y @ H @ y / 2 + torch.logsumexp(torch.stack([y @ C @ x, b @ y]), 0)

    def outer(x: Tensor) -> Tensor:
        return torch.sin(argmin(inner, zeros(n), x) @ w) + d @ x

    x = sampled(m, seed=seed + 5)
    y = argmin(inner, zeros(n), x)
    slope = jacrev(inner)(y, x)
    assert float(slope.norm()) < 1e-8
    A, cross = hessian(inner)(y, x), jacrev(jacrev(inner), 1)(y, x)
    expected = d - cross.T @ torch.linalg.solve(A, torch.cos(y @ w) * w)
    torch.testing.assert_close(grad(outer)(x), expected, rtol=1e-7, atol=1e-9)


@given(n=st.integers(1, 6), factor=st.floats(0.05, 0.95), seed=st.integers(0, 1000))
@PROPERTY
def test_random_contractions(n: int, factor: float, seed: int) -> None:
    T = contraction(n, factor, seed)
    map_ = lambda y, x: torch.tanh(T @ y + x)  # noqa: E731
    x = sampled(n, seed=seed + 1)
    y = fixed_point(map_, zeros(n), x)
    torch.testing.assert_close(y, map_(y, x), rtol=1e-8, atol=1e-9)
    J = torch.diag(1 - y**2)
    expected = torch.linalg.solve(torch.eye(n, dtype=FLOAT64) - J @ T, J)
    got = jacrev(lambda x: fixed_point(map_, zeros(n), x))(x)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)


# --- nesting --------------------------------------------------------------------------------------


def trilevel(x: Tensor) -> Tensor:
    """z minimises a loss of y*(z, x), y minimises another; all quadratic."""

    def middle(z: Tensor, x: Tensor) -> Tensor:
        y = argmin(lambda y, p: ((y - p[0] * p[1]) ** 2).sum() + (y**2).sum(), zeros(3), (z, x))
        return ((y - 1) ** 2).sum() + (z**2).sum() / 2

    return argmin(middle, zeros(3), x)


def trilevel_closed(x: Tensor) -> Tensor:
    # y = z x / 2; (z x / 2 - 1)^2 + z^2 / 2 is least at z = x / (x^2 / 2 + 1).
    return x / (x**2 / 2 + 1)


def test_argmin_inside_argmin() -> None:
    torch.testing.assert_close(trilevel(POINT), trilevel_closed(POINT), rtol=1e-9, atol=1e-10)
    for transform in (
        jacrev,
        jacfwd,
        lambda f: grad(lambda x: (f(x) ** 3).sum()),
        lambda f: vmap(jacrev(f)),
        lambda f: hessian(lambda x: (f(x) ** 3).sum()),
    ):
        at = torch.stack([POINT, 2 * POINT])
        for point in at if "vmap" not in transform.__code__.co_names else [at]:
            got, expected = transform(trilevel)(point), transform(trilevel_closed)(point)
            torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)
    x = POINT.clone().requires_grad_()
    (g,) = torch.autograd.grad((trilevel(x) ** 3).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    expected = hessian(lambda x: (trilevel_closed(x) ** 3).sum())(POINT).sum(0)
    torch.testing.assert_close(h, expected, rtol=1e-7, atol=1e-8)


def test_root_inside_fixed_point() -> None:
    def f(x: Tensor) -> Tensor:
        def map_(y: Tensor, x: Tensor) -> Tensor:
            r = root(lambda r, p: r**3 + r - p[0] - p[1], zeros(3), (y, x))
            return r / 2

        return fixed_point(map_, zeros(3), x)

    # r = 2 y, 8 y^3 + 2 y - y - x = 0.
    y = f(POINT)
    torch.testing.assert_close(8 * y**3 + y, POINT, rtol=1e-8, atol=1e-9)
    expected = torch.diag(1 / (24 * y**2 + 1))
    torch.testing.assert_close(jacrev(f)(POINT), expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(jacfwd(f)(POINT), expected, rtol=1e-8, atol=1e-9)
    second = jacrev(jacrev(f))(POINT).diagonal().diagonal()
    torch.testing.assert_close(second, -48 * y / (24 * y**2 + 1) ** 3, rtol=1e-7, atol=1e-8)


# --- batches --------------------------------------------------------------------------------------

UNEQUAL = torch.tensor([[2.0], [1e-6], [30.0], [1e8]], dtype=FLOAT64)
BATCHES: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "newton": (lambda x, **o: root(lambda y, x: y**3 + y - x, ones(1), x, **o), UNEQUAL),
    "levenberg-marquardt": (
        lambda x, **o: root(
            lambda y, x: y**3 + y - x, ones(1), x, method=LevenbergMarquardt(), **o
        ),
        UNEQUAL[:3],
    ),
    "lbfgs": (
        lambda x, **o: argmin(
            lambda y, x: ((y - 1) ** 2 * x * torch.arange(1, 4)).sum() + (y**4).sum(),
            zeros(3), x, method=LBFGS(), **o,
        ),
        UNEQUAL[:3],
    ),
    "descent": (
        lambda x, **o: argmin(
            lambda y, x: (x * torch.cosh(y - 1)).sum() + (y**2).sum(),
            zeros(2), x, method=GradientDescent(), **o,
        ),
        torch.tensor([[1e-3], [1.0], [10.0]], dtype=FLOAT64),
    ),
    "box": (
        lambda x, **o: argmin(
            lambda y, x: (x * torch.tensor([1.0, 3, 2]) * (y - torch.tensor([0.3, 0.7, 4])) ** 2)
            .sum(),
            zeros(3), x, constraint=Box(0.0, 1.0), **o,
        ),
        torch.tensor([[1.0, 1.0, 1.0], [1e-8, 1e-8, 1e-7], [1e6, 1e4, 1e4]], dtype=FLOAT64),
    ),
    "anderson": (
        lambda x, **o: fixed_point(lambda y, x: x * torch.cos(y), zeros(1), x, **o),
        torch.tensor([[1e-3], [0.5], [0.99]], dtype=FLOAT64),
    ),
    "broyden": (
        lambda x, **o: root(lambda y, x: y**3 + y - x, ones(1), x, method=Broyden(), **o),
        UNEQUAL[:3],
    ),
    "scipy": (
        lambda x, **o: root(lambda y, x: y**3 + y - x, ones(1), x, method=SciPy(), **o),
        UNEQUAL[:3],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BATCHES)
def test_a_member_is_solved_as_if_alone(name: str) -> None:
    f, X = BATCHES[name]
    infos: list[Any] = []

    def g(x: Tensor) -> Tensor:
        answer = f(x, return_info=True)
        infos.append(answer.info)
        return answer.y

    alone = torch.stack([g(x) for x in X])
    counts = [info.iterations for info in infos]
    assert len(set(counts)) > 1, "all alike: a weak test"
    together = vmap(g)(X)
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-14)
    info = infos[-1]
    assert info.converged
    assert info.member_iterations.tolist() == counts
    assert info.iterations == max(counts)
    assert info.member_residuals.shape == (len(X),)
    grads = torch.stack([jacrev(f)(x) for x in X])
    torch.testing.assert_close(vmap(jacrev(f))(X), grads, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("method", [Newton(), LevenbergMarquardt(), Broyden(), SciPy()])
def test_members_that_fail_are_flagged_and_the_others_right(method: Any) -> None:
    X = torch.tensor([4.0, -1.0, 9.0], dtype=FLOAT64)  # y^2 = -1 has no root
    infos: list[Any] = []

    def f(x: Tensor) -> Tensor:
        answer = root(lambda y, x: y**2 - x, ones(), x, method=method, return_info=True)
        infos.append(answer.info)
        return answer.y

    with pytest.warns(solvers.ConvergenceWarning, match=r"1 of 3"):
        y = vmap(f)(X)
    torch.testing.assert_close(y[[0, 2]], torch.tensor([2.0, 3.0]).double(), rtol=1e-9, atol=0)
    info = infos[0]
    assert not info.converged
    good = info.member_residuals < 1e-7
    assert good.tolist() == [True, False, True]


def test_starts_are_batched_too() -> None:
    starts = torch.tensor([[1.0], [-1.0], [3.0]], dtype=FLOAT64)
    x = torch.tensor([4.0], dtype=FLOAT64)
    got = vmap(lambda y0: root(lambda y, x: y**2 - x, y0, x))(starts)
    torch.testing.assert_close(got, torch.tensor([[2.0], [-2.0], [2.0]], dtype=FLOAT64))
    both = vmap(lambda y0, x: root(lambda y, x: y**2 - x, y0, x))(starts, starts**2)
    torch.testing.assert_close(both, starts)


# --- starts and scales ----------------------------------------------------------------------------


def test_the_start_has_no_gradient() -> None:
    def f(y0: Tensor) -> Tensor:
        return root(lambda y, x: y**2 - x, y0, POINT)

    assert torch.equal(jacrev(f)(ones(3)), zeros(3, 3))
    assert torch.equal(jacfwd(f)(ones(3)), zeros(3, 3))
    y0 = ones(3).requires_grad_()
    assert not f(y0).requires_grad
    x = POINT.clone().requires_grad_()
    root(lambda y, x: y**2 - x, y0, x).sum().backward()
    assert y0.grad is None


METHODS: dict[str, Any] = {
    "newton": Newton(),
    "levenberg-marquardt": LevenbergMarquardt(),
    "lbfgs": LBFGS(),
    "descent": GradientDescent(),
    "nesterov": GradientDescent(acceleration="nesterov"),
    "broyden": Broyden(),
    "anderson": Anderson(beta=0.1),
}


def ill(y: Tensor, x: Tensor) -> Tensor:
    return ((y - x) ** 2 * torch.tensor([1.0, 3.0, 8.0])).sum() / 2 + torch.cosh(y).sum()


@pytest.mark.parametrize("name", METHODS)
def test_a_warm_start_is_no_failure(name: str) -> None:
    cold = argmin(ill, zeros(3), POINT, method=METHODS[name], return_info=True)
    warm = argmin(ill, cold.y, POINT, method=METHODS[name], return_info=True)
    assert cold.info.converged
    assert cold.info.iterations > 1
    assert warm.info.converged
    assert warm.info.iterations <= 1
    torch.testing.assert_close(warm.y, cold.y, rtol=1e-9, atol=0)
    far = argmin(ill, 5 * ones(3), POINT, method=METHODS[name])
    torch.testing.assert_close(far, cold.y, rtol=1e-8, atol=0)


@pytest.mark.parametrize("c", [1e-12, 1e12])
@pytest.mark.parametrize(
    "name", ["newton", "levenberg-marquardt", "lbfgs", "descent", "nesterov", "broyden"]
)
def test_the_size_of_the_loss_does_not_matter(name: str, c: float) -> None:
    plain = argmin(ill, zeros(3), POINT, method=METHODS[name])
    scaled = argmin(
        lambda y, x: c * ill(y, x), zeros(3), POINT, method=METHODS[name], return_info=True
    )
    assert scaled.info.converged, scaled.info.reason
    torch.testing.assert_close(scaled.y, plain, rtol=1e-8, atol=0)
    got = jacrev(lambda x: argmin(lambda y, x: c * ill(y, x), zeros(3), x))(POINT)
    expected = jacrev(lambda x: argmin(ill, zeros(3), x))(POINT)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("c", [1e-5, 1e5])
def test_the_units_of_the_unknowns_do_not_matter(c: float) -> None:
    D = torch.tensor([1.0, c, c**0.5], dtype=FLOAT64)
    plain = argmin(ill, zeros(3), POINT)
    for method in (Newton(), LevenbergMarquardt(scale="diagonal")):
        scaled = argmin(lambda y, x: ill(D * y, x), zeros(3), POINT, method=method)
        torch.testing.assert_close(D * scaled, plain, rtol=1e-7, atol=0)
    got = jacrev(lambda x: argmin(lambda y, x: ill(D * y, x), zeros(3), x))(POINT)
    expected = jacrev(lambda x: argmin(ill, zeros(3), x))(POINT)
    torch.testing.assert_close(D[:, None] * got, expected, rtol=1e-7, atol=1e-9)


# --- closed-over tensors --------------------------------------------------------------------------


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value


GLOBAL: Any = None


def with_closure(x: Tensor) -> Tensor:
    return root(lambda y, _: y**2 - x, torch.ones_like(x), None)


def with_default(x: Tensor) -> Tensor:
    return root(lambda y, _, x=x: y**2 - x, torch.ones_like(x), None)


def with_object(x: Tensor) -> Tensor:
    holder = Holder(x)
    return root(lambda y, _: y**2 - holder.value, torch.ones_like(x), None)


def with_list(x: Tensor) -> Tensor:
    held = [{"x": x}]
    return root(lambda y, _: y**2 - held[0]["x"], torch.ones_like(x), None)


def with_partial(x: Tensor) -> Tensor:
    return root(partial(lambda x, y, _: y**2 - x, x), torch.ones_like(x), None)


def with_global(x: Tensor) -> Tensor:
    global GLOBAL
    GLOBAL = x
    try:
        return root(lambda y, _: y**2 - GLOBAL, torch.ones_like(x), None)
    finally:
        GLOBAL = None


def with_both(x: Tensor) -> Tensor:
    return root(lambda y, _: y**2 - x, torch.ones_like(x), x)


def with_loss(x: Tensor) -> Tensor:
    return argmin(lambda y, _: (y**3 / 3 - x * y).sum(), torch.ones_like(x), None)


def with_map(x: Tensor) -> Tensor:
    return fixed_point(lambda y, _: (y + x / y) / 2, torch.ones_like(x), None)


def with_residuals(x: Tensor) -> Tensor:
    return least_squares(lambda y, _: y**2 - x, torch.ones_like(x), None)


def with_derived(x: Tensor) -> Tensor:
    square = x * 1.0
    return root(lambda y, _: y**2 - square, torch.ones_like(x), None)


def right_or_refused(f: Callable[[], Tensor], expected: Tensor) -> None:
    refusal, got = "", expected
    try:
        got = f()
    except ValueError as error:
        refusal = str(error)
    assert not refusal or "closes over" in refusal
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "f",
    [with_closure, with_default, with_object, with_list, with_partial, with_global, with_both,
     with_loss, with_map, with_residuals, with_derived],
)  # fmt: skip
def test_what_is_closed_over_is_never_a_silent_zero(f: Function) -> None:
    exact = torch.diag(0.5 / POINT.sqrt())
    right_or_refused(lambda: jacrev(f)(POINT), exact)
    right_or_refused(lambda: jacfwd(f)(POINT), exact)
    right_or_refused(lambda: vmap(jacrev(f))(POINT[None])[0], exact)
    right_or_refused(lambda: vmap(f)(POINT[None])[0], POINT.sqrt())

    def backward() -> Tensor:
        x = POINT.clone().requires_grad_()
        return torch.autograd.grad(f(x).sum(), x)[0]

    right_or_refused(backward, 0.5 / POINT.sqrt())


def test_a_module_whose_parameters_are_trained_is_refused_unless_frozen() -> None:
    module = torch.nn.Linear(3, 3).double()
    F = lambda z, x: z - torch.tanh(0.1 * module(z) + x)  # noqa: E731
    x = POINT.clone().requires_grad_()
    with pytest.raises(ValueError, match="closes over"):
        root(F, zeros(3), x)
    with torch.no_grad():
        root(F, zeros(3), x)
    module.requires_grad_(False)
    (got,) = torch.autograd.grad(root(F, zeros(3), x).sum(), x)
    expected = differences(lambda x: root(F, zeros(3), x).sum(), POINT)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


def test_a_penalty_that_holds_a_trained_weight_is_refused() -> None:
    weight = torch.tensor(0.1, dtype=FLOAT64, requires_grad=True)
    fit = lambda y, x: ((y - x) ** 2).sum()  # noqa: E731
    with pytest.raises(ValueError, match="closes over"):
        argmin(fit, zeros(3), POINT, penalty=L1(weight))
    with pytest.raises(ValueError, match="closes over"):
        argmin(fit, zeros(3), POINT, constraint=Box(0.0, weight))


def test_constants_are_fine() -> None:
    constant = POINT.clone().requires_grad_().detach()
    got = jacrev(lambda x: root(lambda y, x: y**2 - x * constant, ones(3), x))(POINT)
    torch.testing.assert_close(got, 0.5 * torch.eye(3, dtype=FLOAT64))
    leaf = POINT.clone().requires_grad_()
    with torch.no_grad():
        y = root(lambda y, x: y**2 - leaf, ones(3), None)
    torch.testing.assert_close(y, POINT.sqrt())


# --- failures -------------------------------------------------------------------------------------


def test_a_limit_of_steps_warns_with_numbers_or_raises() -> None:
    F = lambda y, x: y**2 - x  # noqa: E731
    with pytest.warns(
        solvers.ConvergenceWarning, match=r"maxiter after 2 iterations with \|F\| = \d"
    ):
        answer = root(F, ones(3), 1e4 * POINT, method=Newton(maxiter=2), return_info=True)
    assert (answer.info.converged, answer.info.status) == (False, "maxiter")
    assert answer.info.iterations == 2
    with pytest.raises(solvers.NotConvergedError, match=r"after 2 iterations"):
        root(F, ones(3), 1e4 * POINT, method=Newton(maxiter=2, strict=True))


@pytest.mark.parametrize("method", [Newton(), LevenbergMarquardt(), Broyden(), SciPy()])
def test_without_a_root_it_stagnates(method: Any) -> None:
    with pytest.warns(solvers.ConvergenceWarning, match="stagnated"):
        answer = root(lambda y, x: y**2 + x, 3 * ones(1), ones(1), method=method, return_info=True)
    assert answer.info.status == "stagnated"


@pytest.mark.parametrize(
    "method", [Newton(), LevenbergMarquardt(), Broyden(), FixedPointIteration()]
)
def test_numbers_that_are_none_are_a_divergence(method: Any) -> None:
    with pytest.warns(solvers.ConvergenceWarning, match="diverged"):
        root(lambda y, x: (y - 2).log() - x, ones(2), ones(2), method=method)
    with pytest.warns(solvers.ConvergenceWarning):
        fixed_point(lambda y, x: 3 * y + x, ones(2), ones(2), method=FixedPointIteration())


GOOD = lambda y, x: y**2 - x  # noqa: E731
MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "NaN in y0": (lambda: root(GOOD, torch.tensor([1.0, torch.nan]), ones(2)), "y0"),
    "integer y0": (lambda: root(GOOD, torch.ones(2, dtype=torch.long), ones(2)), "y0"),
    "no y0": (lambda: root(GOOD, {}, ones(2)), "y0"),
    "mixed y0": (lambda: root(GOOD, (torch.ones(1), ones(1)), ones(2)), "y0"),
    "number y0": (lambda: root(GOOD, 1.0, ones(2)), "y0"),
    "shape of F": (lambda: root(lambda y, x: y[:1], ones(2), ones(2)), "residual"),
    "structure of F": (lambda: root(lambda y, x: {"a": y}, ones(2), ones(2)), "residual"),
    "F is None": (lambda: root(lambda y, x: None, ones(2), ones(2)), "residual"),
    "dtype of F": (lambda: root(lambda y, x: y.float(), ones(2), ones(2)), "residual"),
    "structure of T": (lambda: fixed_point(lambda y, x: (y,), ones(2), ones(2)), "map"),
    "loss no scalar": (lambda: argmin(GOOD, ones(2), ones(2)), "loss"),
    "loss a number": (lambda: argmin(lambda y, x: 3.0, ones(2), ones(2)), "loss"),
    "loss (1,)": (lambda: argmin(lambda y, x: (y**2).sum(0, True), ones(2), ones(2)), "loss"),
    "residuals None": (lambda: least_squares(lambda y, x: None, ones(2), ones(2)), "residuals"),
    "mode": (lambda: root(GOOD, ones(2), ones(2), differentiate="explicit"), "differentiate"),
    "method class": (lambda: root(GOOD, ones(2), ones(2), method=Newton), "method"),
    "method kind": (lambda: root(GOOD, ones(2), ones(2), method=LBFGS()), "LBFGS"),
    "method kind 2": (
        lambda: fixed_point(GOOD, ones(2), ones(2), method=GradientDescent()),
        "GradientDescent",
    ),
    "linear solver": (lambda: root(GOOD, ones(2), ones(2), linear_solver="cg"), "linear_solver"),
    "no function": (lambda: root(ones(2), ones(2), ones(2)), "residual"),
    "no loss": (lambda: argmin(3, ones(2), ones(2)), "loss"),
    "no map": (lambda: fixed_point(None, ones(2), ones(2)), "map"),
    "no residuals": (lambda: least_squares("r", ones(2), ones(2)), "residuals"),
    "constraint": (lambda: argmin(lambda y, x: y.sum(), ones(2), None, constraint=3), "constraint"),
    "penalty": (lambda: argmin(lambda y, x: y.sum(), ones(2), None, penalty=0.1), "penalty"),
    "both": (
        lambda: argmin(lambda y, x: y.sum(), ones(2), None, penalty=L1(1.0), constraint=Box(0, 1)),
        "constraint and penalty",
    ),
    "operator": (
        lambda: root(GOOD, ones(2), 3 * ones(2), operator=lambda y, x: torch.eye(2)),
        "operator",
    ),
    "operator's shape": (
        lambda: root(GOOD, ones(2), 3 * ones(2), operator=lambda y, x: ops.Identity(3)),
        "operator",
    ),
    "projection's shape": (
        lambda: argmin(lambda y, x: y.square().sum(), ones(2), None, constraint=lambda y: y[:1]),
        "constraint",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_errors_name_the_argument(name: str) -> None:
    call, noun = MISTAKES[name]
    with pytest.raises((TypeError, ValueError), match=noun):
        call()


# --- constraints and penalties --------------------------------------------------------------------

N = 6
H, B = spd(N, 20.0, seed=11), sampled(N, N, seed=12)
C0 = sampled(N, seed=13)


def smooth(y: Tensor, x: Tensor) -> Tensor:
    return y @ H @ y / 2 - y @ (C0 + B @ x) + 0.1 * torch.cosh(y).sum()


X0 = 2.0 * sampled(N, seed=14)
ONE = torch.tensor(1.0, dtype=FLOAT64)

CONSTRAINTS: dict[str, tuple[dict[str, Any], list[Any], Any]] = {
    "box": ({"constraint": Box(-0.5, 0.6)}, [], [(-0.5, 0.6)] * N),
    "nonnegative": ({"constraint": NonNegative()}, [], [(0, None)] * N),
    "ball": (
        {"constraint": Ball(0.7)},
        [{"type": "ineq", "fun": lambda y: 0.49 - y @ y, "jac": lambda y: -2 * y}],
        None,
    ),
    "simplex": (
        {"constraint": Simplex(1.0)},
        [{"type": "eq", "fun": lambda y: y.sum() - 1, "jac": lambda y: np.ones(N)}],
        [(0, None)] * N,
    ),
    "equality": (
        {"equality": lambda y, x: torch.stack([y.sum() - 1, y[0] - 2 * y[1]])},
        [{"type": "eq", "fun": lambda y: np.array([y.sum() - 1, y[0] - 2 * y[1]])}],
        None,
    ),
    "inequality": (
        {"inequality": lambda y, x: {"ball": y @ y - 0.49, "half": y[:2] - 0.1}},
        [
            {"type": "ineq", "fun": lambda y: 0.49 - y @ y},
            {"type": "ineq", "fun": lambda y: 0.1 - y[:2]},
        ],
        None,
    ),
    "both": (
        {"equality": lambda y, x: y.sum() - 1, "inequality": lambda y, x: -y},
        [{"type": "eq", "fun": lambda y: y.sum() - 1}],
        [(0, None)] * N,
    ),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constrained_solutions_against_slsqp_and_gradients_against_differences(name: str) -> None:
    options, constraints, bounds = CONSTRAINTS[name]
    f = partial(argmin, smooth, zeros(N) + 0.1, **options)
    y = f(X0)
    at = lambda y: torch.as_tensor(y, dtype=FLOAT64)  # noqa: E731
    answer = optimize.minimize(
        lambda y: float(smooth(at(y), X0)),
        np.full(N, 0.1),
        jac=lambda y: grad(smooth)(at(y), X0).numpy(),
        method="SLSQP",
        constraints=constraints,
        bounds=bounds,
        options={"ftol": 1e-15, "maxiter": 500},
    )
    torch.testing.assert_close(y, at(answer.x), rtol=1e-5, atol=1e-6)
    J = jacrev(f)(X0)
    torch.testing.assert_close(J, differences(f, X0, 1e-3), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(jacfwd(f)(X0), J, rtol=1e-9, atol=1e-10)
    together = vmap(f)(torch.stack([X0, 0.5 * X0]))
    torch.testing.assert_close(together, torch.stack([y, f(0.5 * X0)]), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["box", "nonnegative", "simplex"])
def test_what_sits_at_a_bound_stays_there(name: str) -> None:
    options, _, bounds = CONSTRAINTS[name]
    f = partial(argmin, smooth, zeros(N) + 0.1, **options)
    y, J = f(X0), jacrev(f)(X0)
    low, high = bounds[0]
    active = (y == low) | (y == high if high is not None else False)
    assert 0 < int(active.sum()) < N
    assert torch.equal(J[active], zeros(int(active.sum()), N))
    assert bool((J[~active].abs().sum(1) > 0).all())


PENALTIES: dict[str, Callable[[Any], Any]] = {
    "l1": lambda w: L1(w),
    "elastic net": lambda w: ElasticNet(w, 0.3),
    "group lasso": lambda w: GroupLasso(lambda x: 2 * w(x), groups=[[0, 1], [2, 3], [4, 5]]),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalised_solutions_are_stationary_and_gradients_are_differences(name: str) -> None:
    penalty = PENALTIES[name](lambda x: x[0])
    small = 0.2 * sampled(N, seed=15)

    def f(x: Tensor) -> Tensor:
        return argmin(lambda y, x: smooth(y, small * x[1]), zeros(N), x, penalty=penalty)

    x = torch.tensor([0.9, 1.3], dtype=FLOAT64)
    y = f(x)
    zero = y == 0
    assert 0 < int(zero.sum()) < N
    # No coordinate, and no direction, lowers the penalised loss.
    total = lambda y: smooth(y, small * x[1]) + penalty.penalty(y, x)  # noqa: E731
    for v in [*torch.eye(N, dtype=FLOAT64), *sampled(40, N, seed=16)]:
        for t in (1e-4, -1e-4):
            assert float(total(y + t * v) - total(y)) > -1e-13
    J = jacrev(f)(x)
    torch.testing.assert_close(J, differences(f, x, 1e-3), rtol=1e-5, atol=1e-7)
    assert torch.equal(J[zero], zeros(int(zero.sum()), 2))
    torch.testing.assert_close(jacfwd(f)(x), J, rtol=1e-9, atol=1e-10)


def test_a_member_of_a_batch_with_constraints_has_a_step_of_its_own() -> None:
    """Curvatures from 1e-6 to 1e6 side by side: each to its own tolerance."""
    target = torch.tensor([0.3, 0.7, 4.0], dtype=FLOAT64)
    weight = torch.tensor([1.0, 3.0, 2.0], dtype=FLOAT64)

    def f(c: Tensor) -> Tensor:
        return argmin(
            lambda y, c: c * (weight * (y - target) ** 2).sum() + c * 0.1 * (y**4).sum(),
            zeros(3),
            c,
            constraint=Box(0.0, 1.0),
        )

    C = torch.tensor([1e6, 1.0, 1e-6], dtype=FLOAT64)
    expected = f(ONE)
    torch.testing.assert_close(vmap(f)(C), expected.expand(3, 3), rtol=1e-9, atol=1e-10)


def test_warnings_point_at_nothing_when_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root(GOOD, ones(3), POINT)
        argmin(ill, zeros(3), POINT)
        least_squares(lambda y, x: y - x, zeros(3), POINT)
        fixed_point(lambda y, x: torch.cos(y) * x / 2, zeros(3), POINT)
        argmin(ill, zeros(3), POINT, constraint=Box(0.0, 1.0))
