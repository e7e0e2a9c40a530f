"""Kernels of the inner product: the functions they are spanned by, and noise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import operators as ops
from operators import Functionals
from tests.operators.kernels.families import (
    blocks,
    by_nested_autodiff,
    close,
    float64,
    normal,
    random,
    whole,
)


def of_features(features, L):
    """``L_i`` of each of a list of functions of a point, ``(n, m)``."""
    columns = []
    for f in features:
        value = torch.func.vmap(f)(L.points)
        gradient = torch.func.vmap(torch.func.grad(f))(L.points)
        hessian = torch.func.vmap(torch.func.hessian(f))(L.points)
        columns.append(
            L.value * value
            + (L.gradient * gradient).sum(-1)
            + (L.hessian * hessian).sum((-2, -1))
        )  # fmt: skip
    return torch.stack(columns, -1)


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_polynomial_is_the_product_of_its_features(degree, d):
    """The multinomial theorem."""
    slope, offset = 0.7, 1.3
    features = []
    for powers in itertools.product(range(degree + 1), repeat=d):
        rest = degree - sum(powers)
        if rest < 0:
            continue
        count = math.factorial(degree) / math.factorial(rest)
        for p in powers:
            count /= math.factorial(p)
        weight = math.sqrt(count * slope ** sum(powers) * offset**rest)

        def feature(x, powers=powers, weight=weight):
            total = weight + 0 * x.sum()
            for a, p in enumerate(powers):
                for _ in range(p):
                    total = total * x[a]
            return total

        features.append(feature)
    left, right = blocks(random(18, d, seed=1), 3), blocks(random(18, d, seed=2), 4)
    found = ops.gram(ops.Polynomial(degree, slope, offset), left, right).to_dense()
    close(found, of_features(features, whole(left)) @ of_features(features, whole(right)).T, 1e-12)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_linear_is_the_product_of_coordinates(d):
    features = [lambda x, a=a: math.sqrt(2.5) * x[a] for a in range(d)]
    left, right = blocks(random(18, d, seed=1), 3), blocks(random(18, d, seed=2), 4)
    found = ops.gram(ops.Linear(2.5), left, right).to_dense()
    close(found, of_features(features, whole(left)) @ of_features(features, whole(right)).T, 1e-12)


def test_at_the_origin():
    x = torch.zeros(2, 2, dtype=float64)
    left = blocks(torch.cat([x] * 9), 3)

    def pair(x, y):
        t = 0.5 * x @ y + 1
        return t * t * t

    found = ops.gram(ops.Polynomial(3, 0.5, 1.0), left).to_dense()
    close(found, by_nested_autodiff(pair, left, left), 1e-13)


def test_derivatives_by_the_parameters():
    left, right = blocks(random(18, 2, seed=1), 3), blocks(random(18, 2, seed=2), 4)
    W = normal(18, 18)
    makes = {
        2: lambda p: ops.Polynomial(3, p[0].exp(), p[1].exp()),
        1: lambda p: ops.Linear(p[0].exp()),
    }
    for count, make in makes.items():

        def f(p, make=make):
            return (W * ops.gram(make(p), left, right).to_dense()).sum()

        p = normal(count, seed=7)
        steps = 1e-5 * torch.eye(count, dtype=float64)
        slopes = torch.stack([(f(p + h) - f(p - h)) / 2e-5 for h in steps])
        close(torch.func.grad(f)(p), slopes, 1e-8)


def test_white_is_the_identity_of_different_points():
    x = torch.tensor([[0.1, 0.2], [0.3, 0.2], [0.1, 0.2], [0.1, 0.3]], dtype=float64)
    same = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]], dtype=float64)
    close(ops.White(0.3)(x), 0.3 * same, 1e-15)
    close(ops.White(0.3)(x[:1], x), 0.3 * same[:1], 1e-15)
    c = normal(4)
    L = c * Functionals.value_at(x)
    K = ops.gram(ops.RBF(0.5) + ops.White(0.3), L)
    close(K.to_dense(), c[:, None] * (ops.RBF(0.5)(x) + 0.3 * same) * c, 1e-14)
    close(K.left.variances(), 1.3 * c**2, 1e-14)
    # It has the points of the other in the derivative, and none of its own.
    v = normal(4, seed=1)
    log_variance = torch.tensor(-1.0, dtype=float64)
    gradient = torch.func.grad(lambda t: v @ (ops.gram(ops.White(t.exp()), L) @ v))(log_variance)
    expected = log_variance.exp() * ((c * v) @ same @ (c * v))
    close(gradient, expected, 1e-14)


def test_white_has_nothing_of_nothing():
    x = random(3, 2)
    K = ops.gram(ops.White(), [Functionals(x), Functionals.value_at(x)]).to_dense()
    close(K, torch.block_diag(torch.zeros(3, 3, dtype=float64), torch.eye(3, dtype=float64)))


@pytest.mark.parametrize("degree", [0, -1, 1.5, "2"])
def test_degree_is_a_whole_number(degree):
    with pytest.raises(ValueError, match=r"degree=.*; expected a whole number, at least 1"):
        ops.Polynomial(degree)


def test_parameters_are_positive():
    for make in (
        lambda: ops.Polynomial(2, -1.0),
        lambda: ops.Polynomial(2, 1.0, 0.0),
        lambda: ops.Linear(-1.0),
        lambda: ops.White(0.0),
    ):
        with pytest.raises(ValueError, match="expected positive finite numbers"):
            make()


def test_shown():
    assert repr(ops.Polynomial(3, 0.5, 2.0)) == "Polynomial(slope=0.5, offset=2, degree=3)"
    assert repr(ops.White(0.5)) == "White(variance=0.5)"
