"""Derivatives through the steps: against loops written by hand, and against the theory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import solvers
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
from hyperlearn.projections import Box
from hyperlearn.solutions import argmin, fixed_point, root
from hyperlearn.unrolling import Unroll, mode_of
from tests.hyperlearn.problems import FLOAT64, KNOWN, POINT, POINTS, M, differences

Function = Callable[[Tensor], Tensor]
STEPS = 11
S = 0.2
W = torch.tensor([0.3, -1.2, 0.7], dtype=FLOAT64)
V = torch.tensor([1.1, 0.4, -0.8], dtype=FLOAT64)


@pytest.fixture(autouse=True)
def _few_steps_do_not_converge() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", solvers.ConvergenceWarning)
        yield


# --- loops by hand --------------------------------------------------------------------------------

Q = torch.tensor([[1.0, 0.3, 0.0], [0.3, 2.0, -0.4], [0.0, -0.4, 0.8]], dtype=FLOAT64)


def loss(y: Tensor, x: Tensor) -> Tensor:
    return y @ Q @ y / 2 + torch.log(torch.cosh(y * x)).sum() - (x**2 * y).sum()


def slope(y: Tensor, x: Tensor) -> Tensor:
    return Q @ y + x * torch.tanh(y * x) - x**2


def curvature(y: Tensor, x: Tensor) -> Tensor:
    return Q + torch.diag(x**2 * (1 - torch.tanh(y * x) ** 2))


def origin(x: Tensor) -> Tensor:
    return torch.full((3,), 0.5, dtype=x.dtype)


def descent(x: Tensor) -> Tensor:
    y = origin(x)
    for _ in range(STEPS):
        y = y - S * slope(y, x)
    return y


def momentum(x: Tensor) -> Tensor:
    """Nesterov's for a strongly convex loss with mu = 0.5."""
    q = (S * 0.5) ** 0.5
    y = before = origin(x)
    for _ in range(STEPS):
        z = y + (1 - q) / (1 + q) * (y - before)
        before, y = y, z - S * slope(z, x)
    return y


def fista(x: Tensor) -> Tensor:
    y = before = origin(x)
    t = 1.0
    for _ in range(STEPS):
        t_next = (1 + (1 + 4 * t * t) ** 0.5) / 2
        z = y + (t - 1) / t_next * (y - before)
        new = z - S * slope(z, x)
        if float(((z - new) * (new - y)).sum()) > 0:
            t_next, before = 1.0, new
        else:
            before = y
        y, t = new, t_next
    return y


def newton(x: Tensor) -> Tensor:
    y = origin(x)
    for _ in range(STEPS):
        y = y - torch.linalg.inv(curvature(y, x)) @ slope(y, x)
    return y


def picard(x: Tensor) -> Tensor:
    y = origin(x)
    for _ in range(STEPS):
        y = y - 0.3 * slope(y, x)
    return y


def anderson(x: Tensor) -> Tensor:
    """Memory 2, from the text of Walker & Ni, on the normal equations."""
    y, G = origin(x), -slope(origin(x), x)
    dy: list[Tensor] = []
    dG: list[Tensor] = []
    for _ in range(STEPS):
        step = 0.3 * G
        if dy:
            D = torch.stack(dG)
            gram = D @ D.T
            gram = gram + 1e-12 * gram.diagonal().max() * torch.eye(len(dG), dtype=x.dtype)
            gamma = (torch.linalg.inv(gram) @ (D @ G)).detach()  # a constant of the derivative
            step = step - gamma @ (torch.stack(dy) + 0.3 * D)
        new = y + step
        G_new = -slope(new, x)
        dy, dG = [new - y, *dy][:2], [G_new - G, *dG][:2]
        y, G = new, G_new
    return y


GD = {"rtol": 0.0, "maxiter": STEPS}
LOOPS: dict[str, tuple[InnerMethod, Function]] = {
    "descent": (GradientDescent(step_size=S, **GD), descent),
    "nesterov": (GradientDescent(step_size=S, acceleration="nesterov", **GD), fista),
    "strongly-convex": (
        GradientDescent(step_size=S, acceleration="strongly-convex", strong_convexity=0.5, **GD),
        momentum,
    ),
    "picard": (FixedPointIteration(step_size=0.3, **GD), picard),
    "anderson": (Anderson(memory=2, beta=0.3, rtol=0.0, maxiter=5), anderson),
    "newton": (Newton(line_search=False, rtol=0.0, maxiter=4), newton),
}


def through(method: InnerMethod, mode: Any = "unrolled") -> Function:
    return lambda x: argmin(loss, origin(x), x, method=method, differentiate=mode)


def scalar(f: Function) -> Function:
    return lambda x: (W * torch.sin(f(x))).sum() + (f(x) ** 2).sum() * x[1]


def by_backward(f: Function) -> Tensor:
    x = POINT.clone().requires_grad_()
    (g,) = torch.autograd.grad(scalar(f)(x), x, create_graph=True)
    (h,) = torch.autograd.grad(g @ V, x)
    return torch.stack([g.detach(), h])


def by_dual_numbers(f: Function) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(POINT, V))).tangent
    assert tangent is not None
    return tangent


TRANSFORMS: dict[str, Callable[[Function], Any]] = {
    "value": lambda f: f(POINT),
    "backward, twice": by_backward,
    "dual numbers": by_dual_numbers,
    "jacrev": lambda f: jacrev(f)(POINT),
    "jacfwd": lambda f: jacfwd(f)(POINT),
    "vjp": lambda f: vjp(f, POINT)[1](W)[0],
    "hessian": lambda f: hessian(scalar(f))(POINT),
    "jacrev of jacrev": lambda f: jacrev(jacrev(f))(POINT),
    "grad of jvp": lambda f: grad(lambda x: W @ jvp(f, (x,), (V,))[1])(POINT),
    "vmap": lambda f: vmap(f)(POINTS),
    "vmap of grad": lambda f: vmap(grad(scalar(f)))(POINTS),
    "vmap of jacfwd": lambda f: vmap(jacfwd(f))(POINTS),
    "grad of vmap": lambda f: grad(lambda X: (vmap(f)(X) ** 2 * W).sum())(POINTS),
    "vmap of hessian": lambda f: vmap(hessian(scalar(f)))(POINTS[:2]),
}
# What the loop by hand cannot do: it branches on values.
BRANCHES = {"nesterov": [name for name in TRANSFORMS if "vmap" in name]}


def by_hand(name: str, transform: Callable[[Function], Any]) -> Any:
    method, loop = LOOPS[name]
    global STEPS
    before, STEPS = STEPS, method.maxiter
    try:
        return transform(loop)
    finally:
        STEPS = before


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("name", "checkpoint"),
    [*((name, True) for name in LOOPS), ("descent", False), ("newton", False)],
)
def test_unrolled_is_the_derivative_of_the_loop(
    name: str, transform: str, checkpoint: bool
) -> None:
    if transform in BRANCHES.get(name, []):
        pytest.skip("the loop by hand branches on values")
    applied = TRANSFORMS[transform]
    got = applied(through(LOOPS[name][0], Unroll(checkpoint=checkpoint)))
    # Anderson solves nearly singular least squares, whose rounding differs.
    rtol = 1e-7 if name == "anderson" else 1e-11
    torch.testing.assert_close(got, by_hand(name, applied), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["nesterov", "anderson"])
def test_checkpoints_change_nothing(name: str, transform: str) -> None:
    method, applied = LOOPS[name][0], TRANSFORMS[transform]
    kept, computed = (applied(through(method, Unroll(checkpoint=c))) for c in (False, True))
    torch.testing.assert_close(computed, kept, rtol=1e-12, atol=1e-12)


def test_projected_descent_through_its_steps() -> None:
    def f(x: Tensor) -> Tensor:
        return argmin(
            loss,
            origin(x),
            x,
            constraint=Box(0.0, lambda x: 0.8 * x[0]),
            method=GradientDescent(step_size=S, rtol=0.0, maxiter=STEPS),
            differentiate="unrolled",
        )

    def loop(x: Tensor) -> Tensor:
        y = origin(x)
        for _ in range(STEPS):
            y = torch.minimum(torch.relu(y - S * slope(y, x)), 0.8 * x[0])
        return y

    for transform in ("value", "jacrev", "jacfwd", "hessian", "vmap of grad"):
        applied = TRANSFORMS[transform]
        torch.testing.assert_close(applied(f), applied(loop), rtol=1e-12, atol=1e-12)


# --- truncation -----------------------------------------------------------------------------------


def at_solution(x: Tensor, method: InnerMethod, mode: Any) -> Tensor:
    """From the solution of another x on: a few steps, all of them near the solution."""
    return argmin(loss, STATIONARY, x, method=method, differentiate=mode)


def solved(x: Tensor) -> Tensor:
    y = origin(x)
    for _ in range(60):
        y = y - torch.linalg.inv(curvature(y, x)) @ slope(y, x)
    return y


STATIONARY = solved(POINT)


@pytest.mark.parametrize("K", [1, 3, 7])
def test_truncation_at_the_solution_is_the_neumann_series(K: int) -> None:
    method = GradientDescent(step_size=S, rtol=0.0, maxiter=9)
    A, C = curvature(STATIONARY, POINT), jacrev(slope, 1)(STATIONARY, POINT)
    E = torch.eye(3, dtype=FLOAT64)
    series = sum((torch.linalg.matrix_power(E - S * A, j) for j in range(K)), torch.zeros(3, 3))
    expected = -S * series @ C
    for transform in (jacrev, jacfwd):
        for checkpoint in (False, True):
            mode = Unroll(steps=K, checkpoint=checkpoint)
            got = transform(lambda x, mode=mode: at_solution(x, method, mode))(POINT)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    got = jacrev(lambda x: at_solution(x, method, f"truncated({K})"))(POINT)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_truncation_holds_the_point_before_fixed() -> None:
    K = 4
    method = GradientDescent(step_size=S, rtol=0.0, maxiter=STEPS)

    def loop(x: Tensor) -> Tensor:
        y = origin(x)
        for _ in range(STEPS - K):
            y = y - S * slope(y, POINT)
        for _ in range(K):
            y = y - S * slope(y, x)
        return y

    got = jacrev(through(method, f"truncated({K})"))(POINT)
    torch.testing.assert_close(got, jacrev(loop)(POINT), rtol=1e-12, atol=1e-12)
    x = POINT.clone().requires_grad_()
    (backward,) = torch.autograd.grad(through(method, f"truncated({K})")(x) @ W, x)
    torch.testing.assert_close(backward, W @ jacrev(loop)(POINT), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["unrolled", "truncated(5)", Unroll(steps=5, checkpoint=False)])
def test_members_of_unequal_step_counts_are_as_alone(mode: Any) -> None:
    def f(x: Tensor) -> Tensor:
        # The curvature, and with it the number of steps, depends on x.
        return argmin(
            lambda y, x: (x * torch.cosh(y) - torch.sin(x) * y).sum(),
            torch.zeros_like(x),
            x,
            method=GradientDescent(step_size=0.5, rtol=1e-4),
            differentiate=mode,
        )

    X = torch.tensor([[1.9], [0.3], [0.6]], dtype=FLOAT64)
    for transform in (jacrev, jacfwd, lambda f: hessian(lambda z: f(z).sum())):
        alone = torch.stack([transform(f)(x) for x in X])
        torch.testing.assert_close(vmap(transform(f))(X), alone, rtol=1e-12, atol=1e-13)
    alone = torch.stack([grad(lambda x: f(x).sum())(x) for x in X])
    together = grad(lambda X: vmap(f)(X).sum())(X)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-13)


# --- one step, and none ---------------------------------------------------------------------------


def test_one_step_of_newton_is_the_implicit_derivative() -> None:
    for name in ("square root", "nonsymmetric linear", "fixed point", "ridge", "logarithm"):
        known = KNOWN[name]
        method = Newton(line_search=False)
        one = lambda x, k=known, m=method: k.solve(x, method=m, differentiate="one_step")  # noqa: E731
        torch.testing.assert_close(one(POINT), known.closed(POINT))
        for transform in (jacrev, jacfwd, lambda f: vmap(jacrev(f)), lambda f: vmap(jacfwd(f))):
            at = POINTS if "vmap" in transform.__code__.co_names else POINT
            torch.testing.assert_close(
                transform(one)(at), transform(known.closed)(at), rtol=1e-8, atol=1e-9
            )


def test_one_step_of_an_iteration_is_the_jacobian_free_derivative() -> None:
    known = KNOWN["fixed point"]
    T = lambda y, x: y - equilibrium(y, x)  # noqa: E731
    expected = jacrev(T, 1)(known.closed(POINT), POINT)
    for method in (FixedPointIteration(), Anderson()):
        one = lambda x, m=method: known.solve(x, method=m, differentiate="one_step")  # noqa: E731
        torch.testing.assert_close(jacrev(one)(POINT), expected, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(jacfwd(one)(POINT), expected, rtol=1e-8, atol=1e-9)


def equilibrium(y: Tensor, x: Tensor) -> Tensor:
    return y - torch.cos(x) * (M @ y) - x**2


def test_identity_is_minus_the_cross_derivative() -> None:
    expected = -jacrev(slope, 1)(STATIONARY, POINT)
    f = through(Newton(), "identity")
    torch.testing.assert_close(f(POINT), STATIONARY)
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(transform(f)(POINT), expected, rtol=1e-9, atol=1e-10)
    got = vmap(jacrev(f))(POINTS)
    each = torch.stack([-jacrev(slope, 1)(solved(x), x) for x in POINTS])
    torch.testing.assert_close(got, each, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mode", ["one_step", "identity", "truncated(3)", "unrolled"])
def test_second_order_does_not_depend_on_who_differentiates(mode: str) -> None:
    """Of what is held fixed too: torch.func and autograd detach alike."""
    f = scalar(through(GradientDescent(step_size=S, rtol=1e-4), mode))
    x = POINT.clone().requires_grad_()
    by_autograd = torch.autograd.functional.hessian(f, POINT)
    for transform in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f))):
        torch.testing.assert_close(transform(f)(POINT), by_autograd, rtol=1e-9, atol=1e-10)
    assert x.grad is None


# --- all modes ------------------------------------------------------------------------------------

MODES = ["implicit", "unrolled", "truncated(120)", "one_step"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_against_differences(mode: str) -> None:
    method = Newton(line_search=False) if mode == "one_step" else GradientDescent(step_size=S)
    f = through(method, mode)
    expected = differences(lambda x: argmin(loss, origin(x), x), POINT)
    torch.testing.assert_close(jacrev(f)(POINT), expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(jacfwd(f)(POINT), expected, rtol=1e-7, atol=1e-8)


def test_unrolling_through_a_linear_solver() -> None:
    def f(x: Tensor, mode: str) -> Tensor:
        return root(
            slope,
            origin(x),
            x,
            method=Newton(line_search=False, rtol=1e-8),
            linear_solver=solvers.DenseLU(),
            differentiate=mode,
        )

    expected = jacrev(solved)(POINT)
    for mode in ("unrolled", "one_step"):
        got = vjp(lambda x, mode=mode: f(x, mode), POINT)[1](W)[0]
        torch.testing.assert_close(got, W @ expected, rtol=1e-7, atol=1e-8)
    # Forward mode does not care for no_grad.
    with torch.no_grad():
        got = jvp(lambda x: f(x, "unrolled"), (POINT,), (V,))[1]
    torch.testing.assert_close(got, expected @ V, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("mode", ["unrolled", "truncated(2)", "one_step"])
@pytest.mark.parametrize(
    "method",
    [Newton(), LBFGS(), LevenbergMarquardt(), Broyden(), GradientDescent(), SciPy(),
     TorchOptimizer(optimizer=torch.optim.SGD)],
)  # fmt: skip
def test_what_cannot_be_unrolled_is_refused_with_a_remedy(method: InnerMethod, mode: str) -> None:
    with pytest.raises(ValueError, match=f"differentiate='{mode[:5]}.*{type(method).__name__}"):
        argmin(loss, origin(POINT), POINT, method=method, differentiate=mode)


@pytest.mark.parametrize(
    "value", ["implicitly", "truncated(0)", "truncated(-1)", "truncated", 3, None, "Unrolled"]
)
def test_unknown_modes_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"differentiate=.*expected 'implicit'"):
        root(lambda y, x: y - x, POINT, POINT, differentiate=value)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "3"])
def test_steps_that_are_no_number_of_steps(steps: Any) -> None:
    with pytest.raises(ValueError, match="steps="):
        Unroll(steps=steps)


def test_names_of_modes() -> None:
    assert mode_of("unrolled") == Unroll()
    assert mode_of("truncated(12)") == Unroll(steps=12)
    assert mode_of("identity") == "identity"


def test_without_steps_the_solution_is_the_start() -> None:
    for mode in ("unrolled", "truncated(3)"):
        f = through(GradientDescent(step_size=S, maxiter=0), mode)
        torch.testing.assert_close(f(POINT), origin(POINT))
        torch.testing.assert_close(jacrev(f)(POINT), torch.zeros(3, 3, dtype=FLOAT64))


# --- memory ---------------------------------------------------------------------------------------


def kept(steps: int, checkpoint: bool) -> int:
    """Tensors of y's size that the graph through so many steps keeps."""
    size = 517
    x = torch.full((size,), 0.7, dtype=FLOAT64, requires_grad=True)
    y = fixed_point(
        lambda y, x: torch.cos(x * y),
        torch.zeros(size, dtype=FLOAT64),
        x,
        method=FixedPointIteration(rtol=0.0, maxiter=steps),
        differentiate=Unroll(checkpoint=checkpoint),
    )
    places: set[int] = set()
    seen: set[Any] = set()
    waiting = [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [after for after, _ in node.next_functions]
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        saved += getattr(node, "saved_tensors", ())
        places |= {t.data_ptr() for t in saved if isinstance(t, Tensor) and t.numel() == size}
    return len(places)


def test_checkpoints_keep_the_square_root_of_the_states() -> None:
    few, many = kept(25, True), kept(400, True)
    assert few >= 5
    assert many <= 4.5 * few, (few, many)  # sqrt(16) = 4
    assert kept(400, False) > 10 * many
