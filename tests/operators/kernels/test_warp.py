"""Changes of variable: linear warps, circles, coordinates; and the rules that functionals obey."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import operators as ops
from operators import Functionals
from operators.kernels.jets import jets
from operators.kernels.warp import multiplied, pulled_back, scaled
from tests.operators.kernels.families import (
    blocks,
    by_nested_autodiff,
    close,
    float64,
    matern,
    net,
    normal,
    random,
    square,
    whole,
)


def applied(L, u):
    """``L_i u`` of a function of a point."""
    L = whole([L])
    value = torch.func.vmap(u)(L.points)
    gradient = torch.func.vmap(torch.func.grad(u))(L.points)
    hessian = torch.func.vmap(torch.func.hessian(u))(L.points)
    return L.value * value + (L.gradient * gradient).sum(-1) + (L.hessian * hessian).sum((-2, -1))


def u(x):
    return torch.exp(0.5 * x.sum()) + (x**3).prod() + x.sin().sum()


@pytest.mark.parametrize("d", [1, 2, 3])
def test_chain_rule(d):
    warp = net(d, 5, 2)
    for L in blocks(random(18, d)):
        M = pulled_back(L, jets(warp, L.points, L.order))
        close(applied(M, u), applied(L, lambda x: u(warp(x[None])[0])), 1e-12)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_product_rule(d):
    def a(x):
        return torch.cos(x).sum() + 2

    for L in blocks(random(18, d)):
        x = L.points
        factor = (
            torch.func.vmap(a)(x),
            torch.func.vmap(torch.func.grad(a))(x),
            torch.func.vmap(torch.func.hessian(a))(x),
        )
        M = multiplied(L, factor)
        assert M.order <= L.order
        close(applied(M, u), applied(L, lambda x: a(x) * u(x)), 1e-12)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_scaling(d):
    for length in (torch.tensor(0.3, dtype=float64), torch.linspace(0.3, 0.6, d, dtype=float64)):
        for L in blocks(random(18, d)):
            M = scaled(L, length)
            assert M.couplings == L.couplings
            close(applied(M, u), applied(L, lambda x, length=length: u(x / length)), 1e-12)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_diagonal_warp_is_one_length_a_coordinate(d):
    lengths = torch.linspace(0.3, 0.6, d, dtype=float64)
    warp = nn.Linear(d, d, bias=True).double()
    with torch.no_grad():
        warp.weight.copy_(torch.diag(1 / lengths))
    left, right = blocks(random(18, d, seed=1), 3), blocks(random(18, d, seed=2), 4)
    for plain, ard in (
        (ops.RBF(1.0), ops.RBF(lengths)),
        (ops.Matern(1.0, 3.5), ops.Matern(lengths, 3.5)),
    ):
        found = ops.gram(ops.WarpedKernel(plain, warp), left, right).to_dense()
        close(found, ops.gram(ard, left, right).to_dense(), 1e-12)
        found = ops.gram(ops.WarpedKernel(plain, lambda x: x / lengths), left, right).to_dense()
        close(found, ops.gram(ard, left, right).to_dense(), 1e-12)


def test_warps_compose():
    f, g = net(2, 4, 3), net(3, 4, 2)
    left, right = blocks(random(18, 2, seed=1), 3), blocks(random(18, 2, seed=2), 4)
    twice = ops.WarpedKernel(ops.WarpedKernel(ops.RBF(0.5), g), f)
    once = ops.WarpedKernel(ops.RBF(0.5), nn.Sequential(f, g))
    close(
        ops.gram(twice, left, right).to_dense(), ops.gram(once, left, right).to_dense(), 1e-12
    )  # fmt: skip


@pytest.mark.parametrize("d", [1, 2, 3])
def test_warped_gibbs(d):
    """Functionals that lose their structure on the way, through a kernel that needs jets itself."""
    warp, length = net(d, 4, 2), net(2, 4, 1, last=nn.Softplus())

    def pair(x, y):
        x, y = warp(x[None]), warp(y[None])
        a, b = length(x), length(y)
        c = a**2 + b**2
        return (2 * a * b / c * torch.exp(-((x - y) ** 2).sum(-1, keepdim=True) / c))[0, 0]

    left, right = blocks(random(18, d, seed=1), 3), blocks(random(18, d, seed=2), 4)
    kernel = ops.WarpedKernel(ops.Gibbs(length), warp)
    close(ops.gram(kernel, left, right).to_dense(), by_nested_autodiff(pair, left, right), 1e-10)


# --- circles -----------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 3])
def test_periodic_kernel_is_mackays(d):
    p, length = 1.7, 0.6

    def pair(x, y):
        first = torch.exp(-2 * torch.sin(torch.pi * (x[0] - y[0]) / p) ** 2 / length**2)
        return first * torch.exp(-0.5 * square(x[1:], y[1:], length))

    left, right = blocks(random(18, d, seed=1), 3), blocks(random(18, d, seed=2), 4)
    for kernel in (
        ops.PeriodicKernel(ops.RBF(1.0), {0: p}, length),
        ops.PeriodicKernel(ops.RBF(length), {0: p}),
    ):
        found = ops.gram(kernel, left, right).to_dense()
        close(found, by_nested_autodiff(pair, left, right), 1e-11)


def test_every_coordinate_periodic_with_its_length():
    periods, lengths = {0: 1.0, 1: 2.5}, torch.tensor([0.5, 0.9], dtype=float64)

    def pair(x, y):
        p = torch.tensor([1.0, 2.5], dtype=float64)
        return torch.exp(-2 * (torch.sin(torch.pi * (x - y) / p) ** 2 / lengths**2).sum())

    left, right = blocks(random(18, 2, seed=1), 3), blocks(random(18, 2, seed=2), 4)
    kernel = ops.PeriodicKernel(ops.RBF(1.0), periods, lengths)
    found = ops.gram(kernel, left, right).to_dense()
    close(found, by_nested_autodiff(pair, left, right), 1e-11)
    # Moved by its period the process is the same, derivatives and all.
    moved = [
        Functionals(L.points + torch.tensor([2.0, -2.5], dtype=float64), *_rest(L)) for L in left
    ]
    close(ops.gram(kernel, moved, right).to_dense(), found, 1e-11)


def _rest(L):
    return L.value, L.gradient, L.laplacian, L.hessian, L.entries, L.axes


def test_periodic_matern():
    def pair(x, y):
        w = 2 * torch.pi / 1.3
        x, y = (torch.stack([(w * z[0]).cos(), (w * z[0]).sin(), z[1]]) for z in (x, y))
        return matern(0.8, 3.5)(x, y)

    left, right = blocks(random(18, 2, seed=1), 3), blocks(random(18, 2, seed=2), 4)
    kernel = ops.PeriodicKernel(ops.Matern(0.8, 3.5), {0: 1.3})
    close(ops.gram(kernel, left, right).to_dense(), by_nested_autodiff(pair, left, right), 1e-9)


# --- coordinates -------------------------------------------------------------------------------


def test_coordinates_in_another_order():
    left, right = blocks(random(18, 3, seed=1), 3), blocks(random(18, 3, seed=2), 4)
    lengths = torch.tensor([0.3, 0.5], dtype=float64)

    def pair(x, y):
        return torch.exp(-0.5 * square(x[[2, 0]], y[[2, 0]], lengths))

    kernel = ops.CoordinatesKernel(ops.RBF(lengths), [2, 0])
    close(ops.gram(kernel, left, right).to_dense(), by_nested_autodiff(pair, left, right), 1e-11)


def test_additive():
    left, right = blocks(random(18, 3, seed=1), 3), blocks(random(18, 3, seed=2), 4)
    parts = [ops.CoordinatesKernel(ops.RBF(0.3 + a / 10), [a]) for a in range(3)]

    def pair(x, y):
        return sum(torch.exp(-0.5 * square(x[a], y[a], 0.3 + a / 10)) for a in range(3))

    found = ops.gram(parts[0] + parts[1] + parts[2], left, right).to_dense()
    close(found, by_nested_autodiff(pair, left, right), 1e-11)


# --- parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel",
    [
        ops.WarpedKernel(ops.RBF(0.7), net(2, 4, 3)),
        ops.WarpedKernel(ops.Matern(0.7, 3.5), net(2, 4, 3, act=nn.SiLU)),
        ops.PeriodicKernel(ops.RBF(0.7), {1: 2.0}, torch.tensor([0.4, 0.9], dtype=float64)),
        ops.CoordinatesKernel(ops.RationalQuadratic(0.7, 0.6), [1]),
    ],
)
def test_parameters_are_differentiated(kernel):
    left, right = blocks(random(18, 2, seed=1), 3), blocks(random(18, 2, seed=2), 4)
    a, b = normal(18, seed=1), normal(18, seed=2)

    def f(parameters):
        return a @ (ops.gram(kernel.with_parameters(parameters), left, right) @ b)

    gradient = torch.func.grad(f)(kernel.parameters)
    largest = max(float(part.abs().max()) for part in gradient.values())
    for name, tensor in kernel.parameters.items():
        direction = normal(*tensor.shape)
        moved = [
            f({**kernel.parameters, name: tensor + h * direction}).item() for h in (1e-5, -1e-5)
        ]
        slope = float((gradient[name] * direction).sum())
        assert slope == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-6, abs=1e-6 * largest)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [[], [0, 0], [-1], ()])
def test_axes_are_different_coordinates(axes):
    with pytest.raises(ValueError, match=r"axes=.*; expected different coordinates"):
        ops.CoordinatesKernel(ops.RBF(), axes)


def test_axes_are_those_of_the_points():
    with pytest.raises(
        ValueError, match=r"axes \(0, 2\) of points of dimension 2; expected .* 0 to 1"
    ):
        ops.CoordinatesKernel(ops.RBF(), [0, 2])(random(3, 2))


@pytest.mark.parametrize("periods", [{}, {0: 0.0}, {0: -1.0}, {-1: 1.0}, {0: float("nan")}])
def test_periods_are_positive_and_of_coordinates(periods):
    with pytest.raises(ValueError, match=r"periods=.*; expected axis -> positive period"):
        ops.PeriodicKernel(ops.RBF(), periods)


def test_periods_are_of_the_points():
    with pytest.raises(ValueError, match=r"periods of axes \[2\], but points of dimension 2"):
        ops.PeriodicKernel(ops.RBF(), {2: 1.0})(random(3, 2))
    kernel = ops.PeriodicKernel(ops.RBF(), {0: 1.0}, torch.ones(3, dtype=float64))
    with pytest.raises(ValueError, match=r"3 lengths for points of dimension 2"):
        kernel(random(3, 2))
    with pytest.raises(
        ValueError, match=r"lengthscale has shape \(2, 2\); expected a number or one"
    ):
        ops.PeriodicKernel(ops.RBF(), {0: 1.0}, torch.ones(2, 2))


def test_warps_are_functions_of_points():
    with pytest.raises(TypeError, match=r"warp is a float; expected a function"):
        ops.WarpedKernel(ops.RBF(), 1.0)
    with pytest.raises(ValueError, match=r"a function of points \(3, 2\) returned \(2, 2\)"):
        ops.WarpedKernel(ops.RBF(), lambda x: x[:2])(random(3, 2))


@pytest.mark.parametrize(
    "make",
    [
        lambda k: ops.WarpedKernel(k, lambda x: x),
        lambda k: ops.CoordinatesKernel(k, [0]),
        lambda k: ops.PeriodicKernel(k, {0: 1.0}),
    ],
)
def test_kernels_are_of_kernels(make):
    with pytest.raises(TypeError, match="kernel is a float; expected a Kernel"):
        make(0.5)


def test_shown():
    warped = ops.WarpedKernel(ops.RBF(0.5), torch.tanh)
    assert repr(warped) == "WarpedKernel(RBF(lengthscale=0.5), tanh)"
    periodic = ops.PeriodicKernel(ops.RBF(0.5), {1: 2.0}, 0.3)
    assert repr(periodic) == (
        "PeriodicKernel(RBF(lengthscale=0.5), lengthscale=0.3, periods={1: 2.0})"
    )
