"""`Functionals`: what they say of functions whose derivatives are known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from operators import Functionals
from tests.operators.kernels.families import blocks, close, float64, normal, random

PROPERTY = settings(max_examples=12, deadline=None, derandomize=True)


def u(x):
    """A function of points ``(d,)`` with all derivatives."""
    return (
        torch.exp(x @ torch.arange(1.0, len(x) + 1, dtype=x.dtype)) + (x**3).prod() + x.sin().sum()
    )


def applied(L):
    """``L_i u`` from the derivatives of u."""
    value = torch.func.vmap(u)(L.points)
    gradient = torch.func.vmap(torch.func.grad(u))(L.points)
    hessian = torch.func.vmap(torch.func.hessian(u))(L.points)
    total = torch.zeros_like(value)
    if L.value is not None:
        total = total + L.value * value
    if L.gradient is not None:
        total = total + (L.gradient * gradient).sum(-1)
    if L.laplacian is not None:
        total = total + L.laplacian * hessian.diagonal(dim1=-2, dim2=-1).sum(-1)
    if L.hessian is not None:
        total = total + (L.hessian * hessian).sum((-2, -1))
    return total


@pytest.mark.parametrize("d", [1, 2, 3])
def test_elementary_ones(d):
    x = random(4, d)
    gradient = torch.func.vmap(torch.func.grad(u))(x)
    hessian = torch.func.vmap(torch.func.hessian(u))(x)
    close(applied(Functionals.value_at(x)), torch.func.vmap(u)(x))
    laplacian = hessian.diagonal(dim1=-2, dim2=-1).sum(-1)
    close(applied(Functionals.laplacian_at(x)), laplacian)
    for a in range(-d, d):
        close(applied(Functionals.gradient_at(x, a)), gradient[:, a])
        for b in range(d):
            L = Functionals.second_at(x, a, b)
            close(applied(L), hessian[:, a, b])
            assert L.couplings == ((min(a % d, b), max(a % d, b)),)


@PROPERTY
@given(
    st.integers(1, 3), st.integers(0, 8), st.integers(0, 8), st.floats(-3, 3), st.integers(0, 99)
)
def test_algebra_is_linear(d, i, j, factor, seed):
    x, field = random(18, d, seed=seed), normal(2, seed=seed)
    L, M = blocks(x, seed)[i], blocks(x, seed + 1)[j]
    M = Functionals(L.points, M.value, M.gradient, M.laplacian, M.hessian, M.entries, M.axes)
    scale = applied(L).abs().max() + applied(M).abs().max()
    for combination, expected in (
        (L + M, applied(L) + applied(M)),
        (L - M, applied(L) - applied(M)),
        (-L, -applied(L)),
        (factor * L, factor * applied(L)),
        (L * field, field * applied(L)),
        (field * L - M * factor, field * applied(L) - factor * applied(M)),
        (L / 2.0, applied(L) / 2),
        (L / (1 + field**2), applied(L) / (1 + field**2)),
        (torch.tensor(factor, dtype=float64) * L, factor * applied(L)),
    ):
        assert float((applied(combination) - expected).abs().max()) <= 1e-12 * float(scale)
        # What is said to be zero is.
        H = combination.hessian
        if H is not None and combination.entries is not None:
            outside = [
                (a, b)
                for a in range(d)
                for b in range(d)
                if (min(a, b), max(a, b)) not in combination.entries
            ]
            assert all(bool((H[:, a, b] + H[:, b, a] == 0).all()) for a, b in outside)


def test_sums_keep_what_is_known_of_entries():
    x = random(3, 3)
    a, b = Functionals.second_at(x, 0, 1), Functionals.second_at(x, 2, 2)
    assert (a + b).entries == ((0, 1), (2, 2))
    assert (a + Functionals.value_at(x)).entries == ((0, 1),)
    assert (Functionals.value_at(x) + a).entries == ((0, 1),)
    assert (a + Functionals(x, hessian=normal(3, 3, 3))).entries is None
    assert (a + Functionals.laplacian_at(x)).couplings == ((0, 0), (0, 1), (1, 1), (2, 2))


def test_sums_keep_what_is_known_of_axes():
    x = random(3, 3)
    a, b = Functionals.gradient_at(x, 2), Functionals.gradient_at(x, -3)
    assert a.axes == a.slopes == (2,)
    assert (2 * (a + b)).axes == (0, 2)
    assert (a + Functionals.value_at(x)).axes == (2,)
    assert (Functionals.value_at(x) - a).axes == (2,)
    assert (a + Functionals(x, gradient=normal(3, 3))).axes is None
    assert Functionals(x, gradient=normal(3, 3)).slopes == (0, 1, 2)
    assert Functionals.value_at(x).slopes == ()


def test_second_order_part_is_symmetric_and_whole():
    x, H, c = random(3, 2), normal(3, 2, 2), normal(3, seed=1)
    L = Functionals(x, laplacian=c, hessian=H)
    close(L.second(), (H + H.mT) / 2 + c[:, None, None] * torch.eye(2, dtype=float64), 1e-15)
    assert Functionals.value_at(x).second() is None


def test_order_and_length():
    x = random(5, 2)
    assert Functionals(x).order == 0
    assert Functionals.value_at(x).order == 0
    assert Functionals.gradient_at(x, 1).order == 1
    assert Functionals.laplacian_at(x).order == 2
    assert Functionals.second_at(x, 0, 1).order == 2
    assert len(Functionals(x)) == 5
    assert Functionals(x).dimension == 2


def test_rows_are_selected():
    x = random(18, 2)
    L = blocks(x)[-1]
    for rows in (slice(0, 1), torch.tensor([1, 0]), torch.tensor([True, False])):
        close(applied(L[rows]), applied(L)[rows], 1e-15)
    batched = L[torch.tensor([[0, 1], [1, 1], [0, 0]])]
    assert batched.points.shape == (3, 2, 2)
    assert batched.hessian.shape == (3, 2, 2, 2)
    assert len(batched) == 2


def test_is_a_tree_of_what_is_there():
    x = random(18, 2)
    for L in blocks(x):
        leaves, spec = pytree.tree_flatten(L)
        assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        again = pytree.tree_unflatten(leaves, spec)
        assert repr(again) == repr(L)
        assert again.entries == L.entries
        assert again.axes == L.axes
        assert bool((applied(again) == applied(L)).all())


def test_reprs():
    x = random(5, 2)
    assert repr(Functionals(x)) == "Functionals(5 at points of dimension 2: 0)"
    L = Functionals.second_at(x, 0, 1) + Functionals.gradient_at(x, 0)
    assert repr(L) == "Functionals(5 at points of dimension 2: gradient, hessian)"


def test_coefficients_keep_their_graph():
    x, c = random(3, 2), normal(3).requires_grad_()
    L = c * Functionals.laplacian_at(x)
    (gradient,) = torch.autograd.grad(L.laplacian.sum(), c)
    assert gradient.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("points", [[[0.0]], torch.zeros(2, 2, dtype=torch.long), None])
def test_points_must_be_floating(points):
    with pytest.raises(TypeError, match=r"points is .*; expected a floating tensor \(n, d\)"):
        Functionals(points)


@pytest.mark.parametrize("shape", [(3,), (), (3, 0)])
def test_points_must_be_rows(shape):
    with pytest.raises(ValueError, match=r"points has shape .*; expected \(n, d\)"):
        Functionals(torch.zeros(shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_points_must_be_finite(bad):
    x = random(3, 2)
    x[1, 1] = bad
    with pytest.raises(ValueError, match="points are not finite"):
        Functionals(x)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("value", (2,)), ("gradient", (3,)), ("laplacian", (3, 1)), ("hessian", (3, 2, 3))],
)
def test_coefficients_must_fit(name, shape):
    with pytest.raises(ValueError, match=rf"{name} has shape .*; expected .* for points \(3, 2\)"):
        Functionals(random(3, 2), **{name: torch.zeros(shape, dtype=float64)})


def test_coefficients_must_be_of_the_points_dtype():
    with pytest.raises(TypeError, match=r"value is torch.float32 on cpu; points are torch.float64"):
        Functionals(random(3, 2), torch.zeros(3))


@pytest.mark.parametrize("axes", [(2,), (0, -1)])
def test_axes_must_be_axes(axes):
    with pytest.raises(ValueError, match="axes holds"):
        Functionals(random(3, 2), gradient=normal(3, 2), axes=axes)


@pytest.mark.parametrize("entries", [((1, 0),), ((0, 2),), ((-1, 0),)])
def test_entries_must_be_ordered_pairs_of_axes(entries):
    with pytest.raises(ValueError, match="entries"):
        Functionals(random(3, 2), hessian=normal(3, 2, 2), entries=entries)


def test_axes_must_be_there():
    x = random(3, 2)
    for make in (
        lambda: Functionals.gradient_at(x, 2),
        lambda: Functionals.second_at(x, 0, 2),
        lambda: Functionals.second_at(x, -3, 0),
    ):
        with pytest.raises(ValueError, match=r"axis .* of points of dimension 2; expected 0 to 1"):
            make()


def test_sums_are_of_functionals_at_the_same_points():
    x = random(3, 2)
    L = Functionals.value_at(x)
    close((L + Functionals.value_at(x.clone())).value, 2 * torch.ones(3, dtype=float64))
    for other in (random(3, 2, seed=1), random(4, 2), random(3, 3)):
        with pytest.raises(ValueError, match="a sum of functionals at other points"):
            L + Functionals.value_at(other)


def test_factors_are_numbers_or_fields():
    L = Functionals.value_at(random(3, 2))
    with pytest.raises(ValueError, match=r"factor has shape \(2,\); expected a number or one for"):
        L * torch.ones(2, dtype=float64)
    for wrong in (lambda: L * "a", lambda: L + 1, lambda: L - 1, lambda: L * L):
        with pytest.raises(TypeError):
            wrong()
