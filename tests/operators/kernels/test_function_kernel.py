"""`FunctionKernel` against derivatives written out."""

from __future__ import annotations

import pytest
import torch

import operators as ops
from operators import Functionals
from tests.operators.kernels.families import blocks, close, float64, random


def polynomial(x, y, a):
    """``(x^3 + a x_0)(y^3 + a y_0)`` summed over coordinates first."""
    return ((x**3).sum() + a * x[0]) * ((y**3).sum() + a * y[0])


def applied(L, a):
    """Functionals of the factor above, by hand."""
    x, d = L.points, L.dimension
    total = x.new_zeros(len(L))
    if L.value is not None:
        total = total + L.value * ((x**3).sum(-1) + a * x[:, 0])
    if L.gradient is not None:
        unit = torch.zeros(d, dtype=x.dtype)
        unit[0] = 1
        total = total + (L.gradient * (3 * x**2 + a * unit)).sum(-1)
    second = L.second()
    if second is not None:
        total = total + (second * torch.diag_embed(6 * x)).sum((-2, -1))
    return total


@pytest.mark.parametrize("d", [1, 2, 3])
def test_is_what_is_written_out(d):
    a = torch.tensor(0.7, dtype=float64)
    kernel = ops.FunctionKernel(polynomial, a=a)
    left, right = blocks(random(18, d, seed=1), 3), blocks(random(18, d, seed=2), 4)
    of_left = torch.cat([applied(L, a) for L in left])
    of_right = torch.cat([applied(M, a) for M in right])
    K = ops.gram(kernel, left, right)
    close(K.to_dense(), of_left[:, None] * of_right, 1e-13)
    close(ops.gram(kernel, left).left.variances(), of_left**2, 1e-13)
    rows, columns = torch.tensor([[0, 17], [5, 5], [3, 8]]), torch.tensor([[4], [0], [9]])
    entries = K.submatrix(rows, columns)
    close(entries, of_left[rows][:, :, None] * of_right[columns][:, None, :], 1e-13)


def test_parameters_are_differentiated():
    x = random(3, 2)
    L = Functionals.laplacian_at(x) + Functionals.value_at(x)

    def f(a):
        return ops.gram(ops.FunctionKernel(polynomial, a=a), L).to_dense().sum()

    a = torch.tensor(0.7, dtype=float64)

    def by_hand(a):
        return applied(L, a).sum() ** 2

    close(f(a), by_hand(a), 1e-13)
    close(torch.func.grad(f)(a), torch.func.grad(by_hand)(a), 1e-12)
    held = a.clone().requires_grad_()
    one = torch.ones(3, dtype=float64)
    K = ops.gram(ops.FunctionKernel(polynomial, a=held), L)
    (gradient,) = torch.autograd.grad(one @ (K @ one), held)
    close(gradient, torch.func.grad(by_hand)(a), 1e-12)


def test_names_and_errors():
    kernel = ops.FunctionKernel(polynomial, a=torch.tensor(0.7))
    assert list(kernel.parameters) == ["shape.a"]
    with pytest.raises(TypeError, match=r"function is a float; expected f\(x, y\)"):
        ops.FunctionKernel(0.5)
