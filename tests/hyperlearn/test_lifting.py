"""Closures lifted into arguments: right derivatives by what a function closes over, or none."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import hyperlearn as hl
from hyperlearn.lifting import Lifting

THETA = torch.tensor(0.7, dtype=torch.float64)
B = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def solution(theta: Tensor) -> Tensor:
    """``y - b sin(theta) = 0``."""
    return B * torch.sin(theta)


def by_cell(theta: Tensor) -> Tensor:
    return hl.root(lambda y, _: y - B * torch.sin(theta), torch.zeros_like(B), None)


def by_inner_function(theta: Tensor) -> Tensor:
    def right() -> Tensor:
        return B * torch.sin(theta)

    return hl.root(lambda y, _: y - right(), torch.zeros_like(B), None)


def by_default(theta: Tensor) -> Tensor:
    return hl.root(lambda y, _, t=theta: y - B * torch.sin(t), torch.zeros_like(B), None)


def by_partial(theta: Tensor) -> Tensor:
    def F(theta: Tensor, y: Tensor, _: object) -> Tensor:
        return y - B * torch.sin(theta)

    return hl.root(partial(F, theta), torch.zeros_like(B), None)


def by_dict(theta: Tensor) -> Tensor:
    settings = {"angle": [theta]}
    return hl.root(lambda y, _: y - B * torch.sin(settings["angle"][0]), torch.zeros_like(B), None)


def by_product(theta: Tensor) -> Tensor:
    right = B * torch.sin(theta)  # no leaf
    return hl.root(lambda y, _: y - right, torch.zeros_like(B), None)


def given_and_closed_over(theta: Tensor) -> Tensor:
    return hl.root(lambda y, _: y - B * torch.sin(theta), torch.zeros_like(B), theta)


def minimiser(theta: Tensor) -> Tensor:
    return hl.argmin(lambda y, _: ((y - B * torch.sin(theta)) ** 2).sum(), torch.zeros_like(B), ())


def constant_made_inside(theta: Tensor) -> Tensor:
    scale = torch.ones(3, dtype=torch.float64) * 1.0  # wrapped by torch.func, though a constant
    return hl.root(lambda y, t: y - scale * B * torch.sin(t), torch.zeros_like(B), theta)


WAYS = [
    by_cell,
    by_inner_function,
    by_default,
    by_partial,
    by_dict,
    by_product,
    given_and_closed_over,
    minimiser,
    constant_made_inside,
]


@pytest.mark.parametrize("way", WAYS)
class TestRight:
    def test_every_transform(self, way):
        expected = B * torch.cos(THETA)
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(transform(way)(THETA), expected)
        leaf = THETA.clone().requires_grad_()
        way(leaf).sum().backward()
        torch.testing.assert_close(leaf.grad, expected.sum())

    def test_second_order(self, way):
        second = torch.func.hessian(lambda t: way(t).sum())(THETA)
        torch.testing.assert_close(second, -solution(THETA).sum())

    def test_batch(self, way):
        several = torch.stack([THETA, 2 * THETA, -THETA])
        found = torch.func.vmap(torch.func.jacrev(way))(several)
        torch.testing.assert_close(found, torch.cos(several)[:, None] * B)
        torch.testing.assert_close(torch.func.vmap(way)(several), torch.sin(several)[:, None] * B)


class TestRefused:
    """What cannot be lifted from is refused by name, never a silent zero."""

    def attribute(self, theta: Tensor) -> Tensor:
        class Holder:
            pass

        holder = Holder()
        holder.theta = theta
        return hl.root(lambda y, x: y - holder.theta * x, torch.zeros_like(B), B)

    def module(self, theta: Tensor) -> Tensor:
        layer = nn.Linear(3, 3).double()
        layer.weight = nn.Parameter(layer.weight.detach() * theta)
        return hl.root(lambda y, x: y - layer(x), torch.zeros_like(B), B)

    def test_attribute(self):
        with pytest.raises(ValueError, match="residual closes over a tensor of shape"):
            torch.func.grad(lambda t: self.attribute(t).sum())(THETA)
        with pytest.raises(ValueError, match="residual closes over a tensor of shape"):
            self.attribute(THETA.clone().requires_grad_())
        with torch.no_grad():
            self.attribute(THETA.clone().requires_grad_())

    def test_module_and_its_remedies(self):
        with pytest.raises(ValueError, match=r"module\.requires_grad_\(False\)"):
            self.module(THETA)
        layer = nn.Linear(3, 3).double().requires_grad_(False)
        hl.root(lambda y, x: y - layer(x), torch.zeros_like(B), B)
        layer.requires_grad_(True)
        parameters = dict(layer.named_parameters())

        def through(parameters: dict[str, Tensor]) -> Tensor:
            return hl.root(
                lambda y, p: y - torch.func.functional_call(layer, p, (B,)),
                torch.zeros_like(B),
                parameters,
            ).sum()

        found = torch.func.grad(through)(parameters)
        torch.testing.assert_close(found["weight"], B.expand(3, 3))
        through(parameters).backward()
        torch.testing.assert_close(layer.bias.grad, torch.ones(3).double())


def test_functions_without_anything_to_lift_stay_themselves():
    def plain(y: Tensor) -> Tensor:
        return y * B

    assert Lifting(plain, None).bound([]) == (plain, None)


def test_recursive_functions_are_copied():
    theta = THETA.clone().requires_grad_()

    def power(y: Tensor, count: int) -> Tensor:
        return y if count == 0 else theta * power(y, count - 1)

    lifting = Lifting(power)
    (copied,) = lifting.bound([torch.tensor(2.0).double()])
    torch.testing.assert_close(copied(B, 3), 8 * B)
    torch.testing.assert_close(power(B, 3), theta**3 * B)  # the original is as it was
