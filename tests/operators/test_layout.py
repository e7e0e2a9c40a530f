"""The values stay, the strides change, and only where that pays."""

from __future__ import annotations

import torch

import operators as ops
from operators.layout import by_columns


def test_tall_matrices_alone_are_turned():
    tall, wide, square = torch.randn(40, 3), torch.randn(3, 40), torch.randn(8, 8)
    vector, one = torch.randn(40), torch.randn(40, 1)
    point = {"tall": tall, "others": (wide, square, vector, one)}
    turned = by_columns(point)
    assert turned["tall"].stride() == (1, 40)
    assert torch.equal(turned["tall"], tall)
    for mine, given in zip(turned["others"], point["others"], strict=True):
        assert mine is given


def test_derivatives_do_not_notice():
    generator = torch.Generator().manual_seed(0)
    data, y, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((30, 20), (20, 3), (20, 3))
    )
    t = torch.randint(3, (30,), generator=generator)

    def loss(y):
        return torch.nn.functional.cross_entropy(data @ y, t)

    expected = torch.func.jvp(torch.func.grad(loss), (y,), (v,))[1]
    torch.testing.assert_close(ops.Hessian(loss, y) @ v, expected)
    A = ops.GaussNewton(lambda y, x: x @ y, "cross-entropy", y, data, t)
    torch.testing.assert_close(A @ v, expected)
    leaf = y.clone().requires_grad_()
    (found,) = torch.autograd.grad((ops.Hessian(loss, leaf) @ v).sum(), leaf)
    product = lambda y: (torch.func.jvp(torch.func.grad(loss), (y,), (v,))[1]).sum()  # noqa: E731
    torch.testing.assert_close(found, torch.func.grad(product)(y))
