"""Radial kernels against closed forms in exact arithmetic, at a distance, near and at zero."""

from __future__ import annotations

import functools

import pytest
import sympy
import torch
from sympy import Rational, exp, sqrt

import operators as ops
from operators import Functionals
from tests.operators.kernels.families import (
    blocks,
    by_nested_autodiff,
    close,
    float64,
    matern,
    normal,
    random,
)

R, A = sympy.symbols("r a", positive=True)
T = {nu: sqrt(sympy.nsimplify(2 * nu)) * R / A for nu in (0.5, 1.5, 2.5, 3.5, 4.5)}
PROFILES = {
    "rbf": exp(-(R**2) / (2 * A**2)),
    0.5: exp(-T[0.5]),
    1.5: (1 + T[1.5]) * exp(-T[1.5]),
    2.5: (1 + T[2.5] + T[2.5] ** 2 / 3) * exp(-T[2.5]),
    3.5: (1 + T[3.5] + 2 * T[3.5] ** 2 / 5 + T[3.5] ** 3 / 15) * exp(-T[3.5]),
    4.5: (
        1 + T[4.5] + 3 * T[4.5] ** 2 / 7 + 2 * T[4.5] ** 3 / 21 + T[4.5] ** 4 / 105
    ) * exp(-T[4.5]),
}  # fmt: skip
SMOOTH = ["rbf", 2.5, 3.5, 4.5]
# Matern 9/2 at a = 0.3, r = 0.2: values of an independent computation in high precision.
ANCHORS = {1: -219.11427, 2: 309.33779, 3: 1172.9058, 5: 3905.3896}


def kernel_of(kind, length):
    return ops.RBF(length) if kind == "rbf" else ops.Matern(length, kind)


def laplacian(F, d):
    return sympy.diff(F, R, 2) + (d - 1) * sympy.diff(F, R) / R


@functools.cache
def operators(kind, d):
    """``F, F'/r, (F'' - F'/r)/r^2, Lap F, (Lap F)'/r, Lap Lap F``."""
    F = PROFILES[kind]
    slope = sympy.diff(F, R) / R
    lap = laplacian(F, d)
    bend = (sympy.diff(F, R, 2) - slope) / R**2
    return [F, slope, bend, lap, sympy.diff(lap, R) / R, laplacian(lap, d)]


def exactly(kind, d, a, r):
    """Their values in 60 digits, rounded; at 0 from within 1e-30 of it."""
    at = {A: sympy.Float(str(a), 150), R: sympy.Float(str(r or "1e-30"), 150)}
    return [float(f.subs(at).evalf(60)) for f in operators(kind, d)]


def at(r, d):
    """A point and one at distance r of it, in a direction that is exact."""
    x = torch.zeros(1, d, dtype=float64)
    y = x.clone()
    y[0, -1] = r
    return x, y


@pytest.mark.parametrize("d", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", SMOOTH)
def test_operators_are_exact(kind, d):
    """All pairs of value, Laplacian, and derivatives along w and v, against 60 digits."""
    a = 0.3
    kernel = kernel_of(kind, a)
    for r in (0.2, 1e-3, 1e-7):
        x, y = at(r, d)
        D = (x - y)[0]
        w, v = normal(d, seed=1), normal(d, seed=2)
        value, lap = Functionals.value_at, Functionals.laplacian_at
        slope_w, slope_v = Functionals(x, gradient=w[None]), Functionals(y, gradient=v[None])
        F, F1, F2, L, L1, LL = exactly(kind, d, a, r)
        wD, vD, wv = float(w @ D), float(v @ D), float(w @ v)
        for left, right, expected in (
            (value(x), value(y), F),
            (value(x), lap(y), L),
            (lap(x), value(y), L),
            (lap(x), lap(y), LL),
            (slope_w, value(y), wD * F1),
            (value(x), slope_v, -vD * F1),
            (slope_w, lap(y), wD * L1),
            (lap(x), slope_v, -vD * L1),
            (slope_w, slope_v, -wv * F1 - wD * vD * F2),
        ):
            found = float(ops.gram(kernel, left, right).to_dense())
            # In units of what both vary by: entries pass through zero.
            unit = (kernel.variances(left) * kernel.variances(right)).sqrt().item()
            assert abs(found - expected) <= 4e-15 * unit + 2e-13 * abs(expected) * (r >= 0.05)


@pytest.mark.parametrize("d", list(ANCHORS))
def test_bilaplacian_of_matern_nine_halves(d):
    """KoLesky.jl lacks a factor t^2 here and is right for d = 2 only."""
    x, y = at(0.2, d)
    lap = Functionals.laplacian_at
    found = float(ops.gram(ops.Matern(0.3, 4.5), lap(x), lap(y)).to_dense())
    assert found == pytest.approx(ANCHORS[d], rel=1e-7)
    assert found == pytest.approx(exactly(4.5, d, 0.3, 0.2)[-1], rel=1e-13)


@pytest.mark.parametrize("d", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", SMOOTH)
def test_coincident_points(kind, d):
    a = 0.3
    kernel = kernel_of(kind, a)
    x = random(4, d)
    lap = Functionals.laplacian_at(x)
    nu = None if kind == "rbf" else Rational(kind)
    # (Lap Lap F)(0) = d (d + 2) F''(0), F'' by s: for Matern nu^2 / ((nu - 1) (nu - 2)) over a^4.
    factor = 1.0 if nu is None else float(nu**2 / ((nu - 1) * (nu - 2)))
    slope = 1.0 if nu is None else float(nu / (nu - 1))
    K = ops.gram(kernel, lap).to_dense()
    expected = torch.full((4,), factor * d * (d + 2) / a**4, dtype=float64)
    close(K.diagonal(), expected, 4e-15)
    close(kernel.variances(lap), expected, 4e-15)
    assert expected[0].item() == pytest.approx(exactly(kind, d, a, 0)[-1], rel=1e-13)
    both = ops.gram(kernel, Functionals.value_at(x), lap).to_dense().diagonal()
    close(both, torch.full((4,), -slope * d / a**2, dtype=float64), 4e-15)
    gradient = kernel.variances(Functionals.gradient_at(x, 0))
    close(gradient, torch.full((4,), slope / a**2, dtype=float64), 4e-15)
    close(kernel(x).diagonal(), torch.ones(4, dtype=float64), 1e-15)


@pytest.mark.parametrize("kind", SMOOTH)
def test_single_precision_near_coincidence(kind):
    """``|x|^2 + |y|^2 - 2 x.y`` would be off by 7e-3 here; differences are not."""
    x = random(40, 2).float() + 0.5
    y = x + 1e-4 * torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    y[:20] = x[:20]
    for a in (0.3, 0.05):
        lengths = torch.tensor(a), torch.tensor(a).double()
        single, double = kernel_of(kind, lengths[0]), kernel_of(kind, lengths[1])
        L, M = Functionals.laplacian_at(x), Functionals.laplacian_at(y)
        L2, M2 = Functionals.laplacian_at(x.double()), Functionals.laplacian_at(y.double())
        found = ops.gram(single, L, M).to_dense()
        assert found.dtype == torch.float32
        close(found.double(), ops.gram(double, L2, M2).to_dense(), 1e-5)


@pytest.mark.parametrize("nu", [2.5, 3.5, 4.5])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_matern_is_nested_autodiff_of_its_formula(nu, d):
    left, right = blocks(random(18, d, seed=1), 3), blocks(random(18, d, seed=2), 4)
    for length in (0.5, torch.linspace(0.4, 0.7, d, dtype=float64)):
        found = ops.gram(ops.Matern(length, nu), left, right).to_dense()
        close(found, by_nested_autodiff(matern(length, nu), left, right), 1e-9)


def test_rough_materns():
    x, y = random(5, 2, seed=1), random(4, 2, seed=2)
    value = [Functionals.value_at(x)], [Functionals.value_at(y)]
    slope = [
        [Functionals(z, normal(len(z)), normal(len(z), 2, seed=1)), Functionals.gradient_at(z, 1)]
        for z in (x, y)
    ]
    for nu, (left, right) in ((0.5, value), (1.5, value), (1.5, slope)):
        found = ops.gram(ops.Matern(0.5, nu), left, right).to_dense()
        close(found, by_nested_autodiff(matern(0.5, nu), left, right), 1e-12)
    K = ops.gram(ops.Matern(0.5, 1.5), [Functionals.gradient_at(x, a) for a in range(2)])
    close(K.to_dense().diagonal(), torch.full((10,), 3 / 0.5**2, dtype=float64), 1e-15)
    assert float(torch.linalg.eigvalsh(K.to_dense())[0]) > 0


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5, 3.5, 4.5])
def test_far_points_are_independent(nu):
    x, y = at(1e3, 2)
    L = Functionals.value_at if nu < 2 else Functionals.laplacian_at
    assert float(ops.gram(ops.Matern(0.01, nu), L(x), L(y)).to_dense()) == 0.0


KERNELS = {
    "rbf": ops.RBF,
    "matern 5/2": lambda length: ops.Matern(length, 2.5),
    "matern 7/2": lambda length: ops.Matern(length, 3.5),
    "matern 9/2": lambda length: ops.Matern(length, 4.5),
    "rational quadratic": lambda length: ops.RationalQuadratic(length, 0.7),
    "inverse quadratic": ops.InverseQuadratic,
    "inverse multiquadric": ops.InverseMultiquadric,
}


@pytest.mark.parametrize("name", list(KERNELS))
def test_derivative_by_the_lengths(name):
    """Finite differences; coincident points among the pairs."""
    x = random(18, 2, seed=1)
    left, right = blocks(x, 3), blocks(torch.cat([x[:9], random(9, 2, seed=2)]), 4)
    W = normal(18, 18)

    def f(log_lengths):
        K = ops.gram(KERNELS[name](log_lengths.exp()), left, right)
        return (W * K.to_dense()).sum()

    for at in (torch.tensor(-0.7, dtype=float64), torch.tensor([-0.7, -0.4], dtype=float64)):
        gradient = torch.func.grad(f)(at)
        steps = 1e-5 * torch.eye(at.numel(), dtype=float64).reshape(-1, *at.shape)
        slopes = torch.stack([(f(at + h) - f(at - h)) / 2e-5 for h in steps])
        close(gradient.reshape(-1), slopes, 1e-8)


@pytest.mark.parametrize("name", list(KERNELS))
def test_derivatives_by_the_points_where_they_coincide(name):
    """``d_x k`` is 0 there and ``d_x d_x k = -d_x d_y k``: what functionals say in closed form."""
    kernel = KERNELS[name](0.4)
    y = torch.tensor([[0.3, 0.6]], dtype=float64)

    def value(x):
        return kernel(x[None], y)[0, 0]

    def slope(x):
        L = Functionals.gradient_at(x[None], 0)
        return ops.gram(kernel, L, Functionals.value_at(y)).to_dense()[0, 0]

    x = y[0].clone()
    second = ops.gram(
        kernel,
        [Functionals.second_at(y, 0, 0), Functionals.second_at(y, 0, 1)],
        Functionals.value_at(y),
    ).to_dense()[:, 0]
    assert torch.func.grad(value)(x).abs().max() == 0
    close(torch.func.grad(slope)(x), second, 1e-14)
    close(torch.func.hessian(value)(x)[0], second, 1e-14)
    nested = torch.func.grad(lambda x: torch.func.grad(value)(x)[0])(x)
    close(nested, second, 1e-14)


def test_radial_of_ones_own():
    s2 = torch.tensor(0.3, dtype=float64)
    for function, pair in (
        # Known to Taylor arithmetic, unknown to it, and constant.
        (lambda s, a: torch.exp(-s) / (1 + a * s), lambda s: torch.exp(-s) / (1 + 0.3 * s)),
        (lambda s, a: torch.erfc(s * a), lambda s: torch.erfc(0.3 * s)),
        (lambda s, a: a, lambda s: 0.3 + 0 * s),
        (
            lambda s, a: 1 / (1 + s**4 + s**5.0 + a * s**1.0),
            lambda s: 1 / (1 + s**4 + s**5 + 0.3 * s),
        ),
        (lambda s, a: torch.where(s > -1, torch.exp(-a * s), s), lambda s: torch.exp(-0.3 * s)),
        (lambda s, a: a * abs(s + 1) ** -1 * 2**-s, lambda s: 0.3 / (1 + s) * 2 ** (-s)),
    ):
        kernel = ops.Radial(function, 0.5, a=s2)
        x = random(18, 2, seed=1)
        left, right = blocks(x, 3), blocks(torch.cat([x[:4], random(14, 2, seed=2)]), 4)

        def formula(x, y, pair=pair):
            return pair(((x - y) ** 2).sum() / (2 * 0.5**2))

        found = ops.gram(kernel, left, right)
        close(found.to_dense(), by_nested_autodiff(formula, left, right), 1e-12)


def test_parameters_of_a_radial_of_ones_own_are_differentiated():
    x = random(6, 2)
    L = Functionals.laplacian_at(x)

    def f(a, function):
        return ops.gram(ops.Radial(function, 0.5, a=a), L).to_dense().sum()

    a = torch.tensor(0.3, dtype=float64)
    for function in (lambda s, a: torch.exp(-a * s), lambda s, a: torch.erfc(a * s)):
        gradient = torch.func.grad(f)(a, function)
        difference = (f(a + 1e-5, function) - f(a - 1e-5, function)) / 2e-5
        assert float(gradient) == pytest.approx(float(difference), rel=1e-7)
        held = a.clone().requires_grad_()
        K = ops.gram(ops.Radial(function, 0.5, a=held), L)
        one = torch.ones(6, dtype=float64)
        (by_product,) = torch.autograd.grad(one @ (K @ one), held)
        assert float(by_product) == pytest.approx(float(gradient), rel=1e-12)


def test_refuses():
    with pytest.raises(ValueError, match=r"lengthscale has shape \(2, 2\); expected a number or"):
        ops.RBF(torch.ones(2, 2))
    with pytest.raises(ValueError, match="expected positive finite numbers"):
        ops.RBF(0.0)
    with pytest.raises(ValueError, match=r"nu=2; expected one of 0.5, 1.5, 2.5, 3.5, 4.5"):
        ops.Matern(1.0, 2)
    with pytest.raises(TypeError, match=r"function is a float; expected f\(s, \*\*parameters\)"):
        ops.Radial(0.5)
    with pytest.raises(ValueError, match="has 3 lengths for points of dimension 2"):
        ops.RBF(torch.ones(3, dtype=float64))(random(4, 2))
    for wrong in (lambda s: torch.erf(s).sum(), lambda s: s * torch.ones(2, 1, 1)):
        with pytest.raises(ValueError, match=r"expected the same shape"):
            ops.Radial(wrong)(random(4, 2))


def test_lengths_are_those_given():
    assert float(ops.RBF(0.3).lengthscale) == pytest.approx(0.3, rel=1e-15)
    close(ops.Matern(torch.tensor([0.3, 2.0])).lengthscale, torch.tensor([0.3, 2.0]), 1e-6)
    assert ops.Matern().smoothness == 2.5
    assert ops.RBF().smoothness == float("inf")
