"""`multiply` and `sample` against dense matrices, under every transform and their nests."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils import _pytree as pytree

from operators.sparse import product
from operators.sparse.pattern import Pattern
from operators.sparse.product import multiply, sample

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
BOTH = (0, 1)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def pattern_of(m: int, n: int, density: float, seed: int) -> Pattern:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.rand(m, n, generator=generator) < density).nonzero(as_tuple=True)
    return Pattern.of(rows, columns, (m, n))[0]


def dense(values: Tensor, pattern: Pattern) -> Tensor:
    m, n = pattern.shape
    places = pattern.rows * n + pattern.columns
    return values.new_zeros(m * n).index_add(0, places, values).reshape(m, n)


def close(actual, expected, tolerance: float = 1e-12) -> None:
    leaves, others = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    for a, b in zip(leaves, others, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@PROPERTY
@given(
    m=st.integers(0, 6),
    n=st.integers(0, 6),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    columns=st.sampled_from([None, 0, 1, 3]),
    seed=st.integers(0, 999),
)
def test_values(m, n, density, columns, seed):
    pattern = pattern_of(m, n, density, seed)
    values = normal(seed, pattern.nnz)
    tail = () if columns is None else (columns,)
    V, U = normal(seed + 1, n, *tail), normal(seed + 2, m, *tail)
    close(multiply(values, V, pattern), dense(values, pattern) @ V)
    outer = torch.outer(U, V) if columns is None else U @ V.T
    close(sample(U, V, pattern), outer[pattern.rows, pattern.columns])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    pattern, eps = pattern_of(5, 4, 0.6, 0), torch.finfo(dtype).eps
    values, V, U = (normal(i, k).to(dtype) for i, k in enumerate((pattern.nnz, 4, 5)))
    product, entries = multiply(values, V, pattern), sample(U, V, pattern)
    assert product.dtype == entries.dtype == dtype
    close(product.double(), dense(values.double(), pattern) @ V.double(), 4 * eps)
    outer = torch.outer(U.double(), V.double())
    close(entries.double(), outer[pattern.rows, pattern.columns], 4 * eps)


def test_layouts_of_the_block():
    pattern = pattern_of(5, 4, 0.6, 0)
    values, V = normal(0, pattern.nnz), normal(1, 6, 8)
    for block in (V.T[:4], V[:4, ::2], V[0, :3].expand(4, 3), V[:4, :1]):
        close(multiply(values, block, pattern), dense(values, pattern) @ block)
    close(
        multiply(values[::1].flip(0), V[1, ::2], pattern),
        dense(values.flip(0), pattern) @ V[1, ::2],
    )


def test_chunks(monkeypatch):
    # More nonzeros than are gathered at once.
    monkeypatch.setitem(product.CHUNK, "cpu", 7)
    pattern = pattern_of(9, 8, 0.7, 0)
    for tail in ((), (3,), (20,)):
        U, V = normal(0, 9, *tail), normal(1, 8, *tail)
        outer = U.reshape(9, -1) @ V.reshape(8, -1).T
        close(sample(U, V, pattern), outer[pattern.rows, pattern.columns])


def test_devices_without_a_kernel():
    pattern = pattern_of(5, 4, 0.6, 0)
    values, V = normal(0, pattern.nnz), normal(1, 4, 3)
    for block in (V, V[:, 0]):
        close(
            product._scattered_product(values, block, pattern),
            dense(values, pattern) @ block,
        )


def cube(f):
    return lambda a, b: (f(a, b) ** 3).sum()


# Each takes a function of two arguments that is linear in either.
TRANSFORMS = {
    "jacrev": lambda f: jacrev(f, BOTH),
    "jacfwd": lambda f: jacfwd(f, BOTH),
    "grad": lambda f: grad(cube(f), BOTH),
    "reverse over reverse": lambda f: jacrev(jacrev(cube(f), BOTH), BOTH),
    "forward over reverse": lambda f: hessian(cube(f), BOTH),
    "reverse over forward": lambda f: jacrev(jacfwd(cube(f), BOTH), BOTH),
    # torch loses these inside an autograd.Function.
    "forward over forward": lambda f: jacfwd(jacfwd(cube(f), BOTH), BOTH),
    "forward over forward over reverse": lambda f: jacfwd(jacfwd(grad(cube(f), BOTH), BOTH), BOTH),
    "forward over reverse over forward": lambda f: jacfwd(jacrev(jacfwd(cube(f), 0), BOTH), BOTH),
    "reverse over forward over forward": lambda f: jacrev(jacfwd(jacfwd(cube(f), 0), BOTH), 1),
    "jvp of a vjp": lambda f: lambda a, b: jvp(grad(cube(f), BOTH), (a, b), (a * a, b + 1)),
}

PATTERN = pattern_of(3, 4, 0.6, 5)


def functions(kind: str, tail: tuple[int, ...]):
    """The sparse function, the same made of dense operations, and its arguments."""
    if kind == "multiply":
        arguments = normal(1, PATTERN.nnz), normal(2, 4, *tail)
        return (
            lambda a, v: multiply(a, v, PATTERN),
            lambda a, v: dense(a, PATTERN) @ v,
            arguments,
        )

    def sampled(u, v):
        outer = u.reshape(3, -1) @ v.reshape(4, -1).T
        return outer[PATTERN.rows, PATTERN.columns]

    return lambda u, v: sample(u, v, PATTERN), sampled, (normal(1, 3, *tail), normal(2, 4, *tail))


KINDS = pytest.mark.parametrize("kind", ["multiply", "sample"])
TAILS = pytest.mark.parametrize("tail", [(), (2,)], ids=["vector", "block"])


@KINDS
@TAILS
@pytest.mark.parametrize("name", TRANSFORMS)
def test_derivatives(kind, tail, name):
    f, reference, arguments = functions(kind, tail)
    close(TRANSFORMS[name](f)(*arguments), TRANSFORMS[name](reference)(*arguments))


@KINDS
@TAILS
def test_batches(kind, tail):
    f, reference, (a, b) = functions(kind, tail)
    As, Bs = normal(3, 3, *a.shape), normal(4, 3, *b.shape)
    for in_dims, arguments in (((0, 0), (As, Bs)), ((0, None), (As, b)), ((None, 0), (a, Bs))):
        for transform in (lambda g: g, lambda g: grad(cube(g), BOTH), lambda g: hessian(cube(g))):
            mapped = vmap(transform(f), in_dims)(*arguments)
            close(mapped, vmap(transform(reference), in_dims)(*arguments))

        def total(g, in_dims=in_dims):
            return lambda a, b: (vmap(g, in_dims)(a, b) ** 3).sum()

        close(grad(total(f), BOTH)(*arguments), grad(total(reference), BOTH)(*arguments))
        close(hessian(total(f))(*arguments), hessian(total(reference))(*arguments))
    # Every axis may be the mapped one, and maps nest.
    last = vmap(f, (1, -1), out_dims=-1)(As.movedim(0, 1), Bs.movedim(0, -1))
    close(last, vmap(reference, out_dims=-1)(As, Bs))
    table = vmap(vmap(f, (None, 0)), (0, None))(As, Bs)
    close(table, vmap(vmap(reference, (None, 0)), (0, None))(As, Bs))


@KINDS
@TAILS
def test_autograd(kind, tail):
    f, _, arguments = functions(kind, tail)
    arguments = tuple(argument.requires_grad_() for argument in arguments)
    # check_batched_grad runs torch's older vmap, which knows no rules of Functions.
    forward = {"check_forward_ad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(f, arguments, check_batched_grad=True, **forward)
    second = {"check_fwd_over_rev": True, "check_rev_over_rev": True}
    assert torch.autograd.gradgradcheck(f, arguments, check_batched_grad=True, **second)


def test_only_what_is_asked_for_is_differentiated(monkeypatch):
    calls = []
    sampled = product._sampled
    monkeypatch.setattr(product, "_sampled", lambda *a: calls.append(a) or sampled(*a))
    values, v = normal(1, PATTERN.nnz), normal(2, 4)
    multiply(values, v.requires_grad_(), PATTERN).sum().backward()
    assert not calls
    multiply(values.requires_grad_(), v.detach(), PATTERN).sum().backward()
    assert len(calls) == 1


def test_no_dense_matrix_of_the_size_appears():
    # Of 10^6 by 10^6: a dense one would take 8 TB.
    n = 10**6
    rows = torch.arange(3)
    pattern, _ = Pattern.of(rows, n - 1 - rows, (n, n))
    values = normal(0, 3)
    gradient = grad(lambda a: multiply(a, torch.ones(n, dtype=a.dtype), pattern).square().sum())
    close(gradient(values), 2 * values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: multiply(normal(0, 2), normal(0, 4), PATTERN), r"values of shape \(2,\)"),
        (lambda: multiply(normal(0, PATTERN.nnz), normal(0, 3), PATTERN), r"and \(4,\) or \(4, k"),
        (lambda: sample(normal(0, 4), normal(0, 4), PATTERN), r"left of shape \(4,\).*\(3,\)"),
        (lambda: sample(normal(0, 3, 1), normal(0, 4), PATTERN), r"\(3, k\) and \(4, k\)"),
    ],
)
def test_shapes_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
