"""Derivatives of weighted sums of entries, without the entries, for every kernel."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

import operators as ops
from operators import Functionals
from tests.operators.kernels.families import blocks, close, float64, kernels, normal, random

FAMILIES = sorted(kernels(2))


@pytest.mark.parametrize("name", [*FAMILIES, "matern", "periodic matern"])
def test_weighted_pairs_have_the_derivative_of_a_weighted_sum(name: str) -> None:
    if "matern" in name:
        kernel: ops.Kernel = ops.Matern(torch.tensor([0.4, 0.6], dtype=float64), nu=4.5)
        if name == "periodic matern":
            kernel = ops.PeriodicKernel(ops.Matern(0.5, nu=4.5), {1: 2.0}, 0.7)
    else:
        kernel, _ = kernels(2)[name]
    lefts, rights = blocks(random(18, 2, seed=1), 3), blocks(random(18, 2, seed=2), 4)
    for L, M in zip(lefts, reversed(rights), strict=True):
        W = normal(len(L), len(M), seed=5)
        tree = (kernel, kernel.lift(L), kernel.lift(M))
        leaves, spec = pytree.tree_flatten(tree)
        moved = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        one, left, right = pytree.tree_unflatten(moved, spec)
        by_weights = torch.autograd.grad(
            one.weighted_pairs(left, right, W), moved, allow_unused=True
        )
        by_entries = torch.autograd.grad(
            (W * one.pairs(left, right)).sum(), moved, allow_unused=True
        )
        for a, b in zip(by_weights, by_entries, strict=True):
            assert (a is None) == (b is None)
            if a is not None and bool(b.any()):
                close(a, b, 1e-12)


def test_a_number_that_was_not_computed_is_nan() -> None:
    x = random(4, 2)
    kernel = ops.RBF(torch.tensor(0.5, dtype=float64, requires_grad=True))
    lift = kernel.lift(Functionals.laplacian_at(x))
    assert kernel.weighted_pairs(lift, lift, normal(4, 4)).isnan()
    # Under a transform each step is taken as it is written.
    value = torch.func.vmap(lambda W: kernel.weighted_pairs(lift, lift, W))(normal(2, 4, 4))
    torch.testing.assert_close(value, (normal(2, 4, 4) * kernel.pairs(lift, lift)).sum((1, 2)))
