"""`Representers`: blocks, fields, multiples and variances, against dense Gram matrices."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

import operators as ops
from operators import Functionals, Representers
from tests.operators.kernels.families import blocks, close, float64, kernels, normal, random

NAMES = list(kernels(2))


def fields():
    """Rows on two fields: of one, of the other, and of both."""
    x, y, z = random(2, 2, seed=1), random(3, 2, seed=2), random(4, 2, seed=3)
    u = ops.RBF(0.5)
    v = ops.Matern(0.4, 3.5)
    rows = [
        {"u": Functionals.laplacian_at(x)},
        {"v": Functionals.gradient_at(y, 1)},
        {
            "u": Functionals.value_at(z) * normal(4),
            "v": normal(4, seed=1) * Functionals.laplacian_at(z),
        },
    ]
    return {"u": u, "v": v}, rows


def test_fields_are_independent():
    kernels, (a, b, c) = fields()
    K = ops.gram(kernels, [a, b, c]).to_dense()

    def by(name, left, right):
        return ops.gram(kernels[name], left[name], right[name]).to_dense()

    zero = torch.zeros(2, 3, dtype=float64)
    expected = torch.cat(
        [
            torch.cat([by("u", a, a), zero, by("u", a, c)], 1),
            torch.cat([zero.T, by("v", b, b), by("v", b, c)], 1),
            torch.cat([by("u", c, a), by("v", c, b), by("u", c, c) + by("v", c, c)], 1),
        ]
    )
    close(K, expected, 1e-14)
    close(Representers(kernels, [a, b, c]).variances(), expected.diagonal(), 1e-14)
    close(ops.gram(kernels, [a, b], [c]).to_dense(), expected[:5, 5:], 1e-14)
    v = normal(9, 2)
    close(ops.gram(kernels, [a, b, c]) @ v, expected @ v, 1e-13)
    assert float(torch.linalg.eigvalsh(expected)[0]) > 0


def test_blocks_are_stacked():
    x = random(18, 2)
    rows = blocks(x)
    R = Representers(ops.RBF(0.4), rows)
    assert len(R) == 18
    assert R.sizes == [2] * 9
    assert R.orders.tolist() == [0, 0, 1, 1, *[2] * 14]
    assert R.dtype == float64
    assert R.device == x.device
    assert bool((torch.cat(R.points) == x).all())
    assert repr(R) == "Representers(18 rows of RBF(lengthscale=0.4))"
    K = ops.gram(ops.RBF(0.4), rows).to_dense()
    for i, L in enumerate(rows):
        for j, M in enumerate(rows):
            part = ops.gram(ops.RBF(0.4), L, M).to_dense()
            close(K[2 * i : 2 * i + 2, 2 * j : 2 * j + 2], part, 1e-13)


def test_orders_of_several_fields():
    kernels, rows = fields()
    assert Representers(kernels, rows).orders.tolist() == [2, 2, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("name", NAMES)
def test_scaled_and_variances(name):
    kernel, _ = kernels(2)[name]
    R = Representers(kernel, blocks(random(18, 2)))
    factors = normal(18, seed=5)
    K = ops.KernelGram(R).to_dense()
    close(R.variances(), K.diagonal(), 1e-13)
    scaled = R.scaled(factors)
    close(ops.KernelGram(scaled).to_dense(), factors[:, None] * K * factors, 1e-13)
    close(scaled.variances(), factors**2 * K.diagonal(), 1e-13)
    # The rest is as it was, and the other is not changed.
    assert scaled.sizes == R.sizes
    close(ops.KernelGram(R).to_dense(), K, 1e-15)


def test_scaled_of_several_fields():
    R = Representers(*fields())
    factors = normal(9, seed=5)
    K = ops.KernelGram(R).to_dense()
    close(ops.KernelGram(R.scaled(factors)).to_dense(), factors[:, None] * K * factors, 1e-13)


def test_unit_diagonal():
    R = Representers(*fields())
    K = ops.KernelGram(R.scaled(R.variances().rsqrt())).to_dense()
    close(K.diagonal(), torch.ones(9, dtype=float64), 1e-13)


def test_is_a_tree():
    R = Representers(*fields())
    leaves, spec = pytree.tree_flatten(R)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = pytree.tree_unflatten(leaves, spec)
    assert again.sizes == R.sizes
    assert again.orders.tolist() == R.orders.tolist()
    close(ops.KernelGram(again).to_dense(), ops.KernelGram(R).to_dense(), 1e-15)


def test_iterables_of_blocks():
    x = random(3, 2)
    L = Functionals.value_at(x)
    assert len(Representers(ops.RBF(), (L, L))) == 6
    assert len(Representers({"u": ops.RBF()}, L)) == 3


@pytest.mark.parametrize(
    ("kernel", "rows", "error", "message"),
    [
        (lambda x, y: 0, Functionals.value_at(random(2, 2)), TypeError, "the kernel of the field"),
        ({"u": None}, Functionals.value_at(random(2, 2)), TypeError, "the kernel of u is a NoneTy"),
        (ops.RBF(), [], ValueError, "rows is an empty list"),
        (ops.RBF(), [random(2, 2)], TypeError, "a block of rows is a Tensor"),
        (ops.RBF(), [{"": random(2, 2)}], TypeError, "a block of rows is a dict"),
        (ops.RBF(), [{}], ValueError, "a block of rows is an empty dictionary"),
        (
            {"u": ops.RBF()},
            {"w": Functionals.value_at(random(2, 2))},
            ValueError,
            "no kernel for the field 'w'; there are u",
        ),
        (
            {"u": ops.RBF(), "v": ops.RBF()},
            Functionals.value_at(random(2, 2)),
            ValueError,
            "there are kernels for u, v; expected rows by field, as {'u': ...}",
        ),
        (
            {"u": ops.RBF(), "v": ops.RBF()},
            {
                "u": Functionals.value_at(random(2, 2)),
                "v": Functionals.value_at(random(2, 2, seed=1)),
            },
            ValueError,
            "the fields of one block of rows are taken at different points",
        ),
        (ops.RBF(), 3.0, TypeError, "rows is a float"),
        (
            ops.RBF(),
            [
                Functionals.value_at(random(2, 2)),
                Functionals.value_at(random(2, 2).float()),
            ],
            TypeError,
            "block 1 of rows is torch.float32",
        ),
        (
            ops.RBF(),
            [Functionals.value_at(random(2, 2)), Functionals.value_at(random(2, 3))],
            ValueError,
            "block 1 of rows is at points of dimension 3",
        ),
    ],
)
def test_refuses(kernel, rows, error, message):
    with pytest.raises(error, match=message):
        Representers(kernel, rows)


def test_scaled_refuses_other_sizes():
    R = Representers(ops.RBF(), Functionals.value_at(random(2, 2)))
    with pytest.raises(ValueError, match=r"factors has shape \(3,\); expected \(2,\)"):
        R.scaled(torch.ones(3))
