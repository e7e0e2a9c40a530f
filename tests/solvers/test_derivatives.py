"""`solvers.solve` by every solver on every system that suits it: values, derivatives, batches.

The oracle is `torch.linalg.solve` (for least squares `torch.linalg.lstsq` by the pseudo-inverse) of
the dense matrix, differentiated by torch.func; and finite differences of it, by gradcheck.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree

import solvers
from solvers import LinearSolver
from tests.solvers.solver_table import SOLVERS
from tests.solvers.systems import SYSTEMS, Numbers, Parameters, System

pytestmark = [
    pytest.mark.filterwarnings("error::solvers.ConvergenceWarning"),
    # torch's own: how a LeafSpec is asked for
    pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning"),
]
TRIPLES = [(name, system) for name, (_, systems) in SOLVERS.items() for system in systems]
DOUBLE = torch.float64
TIGHT = 1e-12


class Pair:
    """A solver and a system: ``f(p, b)`` by the solver, ``g(p, b)`` by dense linear algebra."""

    def __init__(self, solver: LinearSolver, system: System) -> None:
        self.solver, self.system = solver, system

    def f(self, p: Parameters, b: Tensor) -> Tensor:
        return solvers.solve(self.system.build(p), b, solver=self.solver)

    def g(self, p: Parameters, b: Tensor) -> Tensor:
        M = self.system.matrix(p)
        if M.shape[0] == M.shape[1]:
            return torch.linalg.solve(M, b)
        # Of full rank: by the normal equations, which torch differentiates twice.
        if M.shape[0] > M.shape[1]:
            return torch.linalg.solve(M.mT @ M, M.mT @ b)
        return M.mT @ torch.linalg.solve(M @ M.mT, b)


def draw(system: System, seed: int, dtype: torch.dtype = DOUBLE) -> tuple[Parameters, Tensor]:
    numbers = Numbers(seed, dtype)
    p = system.draw(numbers)
    return p, numbers(system.matrix(p).shape[0])


def close(actual: object, expected: object, tolerance: float = 1e-8) -> None:
    actual, expected = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    for a, e in zip(actual, expected, strict=True):
        scale = max(1.0, float(e.detach().abs().max())) if e.numel() else 1.0
        torch.testing.assert_close(a, e, rtol=0, atol=tolerance * scale)


def batch(system: System, count: int, start: int = 50) -> tuple[Parameters, Tensor]:
    drawn = [draw(system, start + i) for i in range(count)]
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *drawn)


@pytest.fixture(params=TRIPLES, ids=" on ".join)
def pair(request) -> Pair:
    name, system = request.param
    return Pair(SOLVERS[name][0](TIGHT), SYSTEMS[system])


def loss(function):  # a scalar with curvature in x, and a direct part in b
    return lambda p, b: function(p, b).sin().sum() + b.square().sum()


def test_value(pair):
    p, b = draw(pair.system, 0)
    x, info = solvers.solve(pair.system.build(p), b, solver=pair.solver, return_info=True)
    close(x, pair.g(p, b))
    assert info.converged
    block = torch.stack([b, 1e-30 * b, 0 * b, 1e20 * b], 1)
    columns = pair.f(p, block)
    for scale, column in zip((1, 1e-30, 0, 1e20), columns.unbind(1), strict=True):
        close(column, scale * pair.g(p, b), 1e-8 * max(scale, 1e-300))
    assert pair.f(p, block[:, :0]).shape == (len(x), 0)


def test_single_precision(pair, request):
    name, _ = request.node.callspec.params["pair"]
    solver = SOLVERS[name][0](2e-6)
    p, b = draw(pair.system, 1, torch.float32)
    x = solvers.solve(pair.system.build(p), b, solver=solver)
    assert x.dtype == torch.float32
    close(x, pair.g(p, b), 2e-4)
    single = grad(lambda b: (solvers.solve(pair.system.build(p), b, solver=solver) ** 2).sum())(b)
    close(single, grad(lambda b: (pair.g(p, b) ** 2).sum())(b), 2e-3)


def test_gradient(pair):
    p, b = draw(pair.system, 2)
    ours, theirs = (grad(loss(function), (0, 1))(p, b) for function in (pair.f, pair.g))
    close(ours, theirs)


def test_backward(pair):
    p, b = draw(pair.system, 3)
    results = []
    for function in (pair.f, pair.g):
        leaves = pytree.tree_map(lambda t: t.clone().requires_grad_(), (p, b))
        loss(function)(*leaves).backward()
        results.append(pytree.tree_map(lambda t: t.grad, leaves))
    close(*results)


def test_prepared_once_is_differentiable(pair):
    p, b = draw(pair.system, 4)
    results = []
    for prepared in (True, False):
        leaves, right = pytree.tree_map(lambda t: t.clone().requires_grad_(), (p, b))
        if prepared:
            x = pair.solver.prepare(pair.system.build(leaves)).solve(right).value
        else:
            x = pair.g(leaves, right)
        x.sin().sum().backward()
        results.append(pytree.tree_map(lambda t: t.grad, (leaves, right)))
    close(*results)


def test_forward_mode(pair):
    p, b = draw(pair.system, 5)
    directions = draw(pair.system, 6)
    ours, theirs = (jvp(function, (p, b), directions) for function in (pair.f, pair.g))
    close(ours, theirs)


def test_forward_is_the_transpose_of_reverse(pair):
    """``<w, J v> = <J^T w, v>``."""
    p, b = draw(pair.system, 7)
    v = draw(pair.system, 8)
    x, pushed = jvp(pair.f, (p, b), v)
    w = Numbers(9, DOUBLE)(*x.shape)
    pulled = vjp(pair.f, p, b)[1](w)
    products = pytree.tree_map(lambda a, c: (a * c).sum(), pulled, v)
    close((w * pushed).sum(), sum(pytree.tree_leaves(products)))


def test_vmap_over_b(pair):
    p, _ = draw(pair.system, 10)
    bs = torch.stack([draw(pair.system, 11 + i)[1] for i in range(3)])
    close(vmap(pair.f, (None, 0))(p, bs), vmap(pair.g, (None, 0))(p, bs))


def test_vmap_over_the_operator(pair):
    p, bs = batch(pair.system, 3)
    close(vmap(pair.f, (0, None))(p, bs[0]), vmap(pair.g, (0, None))(p, bs[0]))


def test_vmap_over_both(pair):
    p, bs = batch(pair.system, 3)
    close(vmap(pair.f)(p, bs), vmap(pair.g)(p, bs))


def test_vmap_of_the_gradient(pair):
    p, bs = batch(pair.system, 3)
    ours, theirs = (vmap(grad(loss(h), (0, 1)))(p, bs) for h in (pair.f, pair.g))
    close(ours, theirs)


def test_gradient_of_the_vmap(pair):
    p, bs = batch(pair.system, 3)
    ours, theirs = (
        grad(lambda p, b, h=h: vmap(loss(h))(p, b).sum(), (0, 1))(p, bs) for h in (pair.f, pair.g)
    )
    close(ours, theirs)


def test_batch_of_batches(pair):
    drawn = [batch(pair.system, 2, 60 + 10 * i) for i in range(2)]
    p, bs = pytree.tree_map(lambda *leaves: torch.stack(leaves), *drawn)
    close(vmap(vmap(pair.f))(p, bs), vmap(vmap(pair.g))(p, bs))


def test_second_order_in_b(pair):
    p, b = draw(pair.system, 12)
    ours, theirs = (hessian(loss(h), 1)(p, b) for h in (pair.f, pair.g))
    close(ours, theirs)
    reverse = jacrev(jacrev(loss(pair.f), 1), 1)(p, b)
    close(reverse, theirs)


def test_second_order_in_the_operator(pair):
    """Along one direction, forward over reverse and reverse over reverse."""
    p, b = draw(pair.system, 13)
    direction, _ = draw(pair.system, 14)

    def product(function):
        return jvp(lambda p: grad(loss(function))(p, b), (p,), (direction,))[1]

    def swept(function):
        inner = grad(loss(function))
        return grad(
            lambda p: sum(
                pytree.tree_leaves(
                    pytree.tree_map(lambda a, c: (a * c).sum(), inner(p, b), direction)
                )
            )
        )(p)

    close(product(pair.f), product(pair.g), 1e-7)
    close(swept(pair.f), swept(pair.g), 1e-7)


def test_finite_differences(pair):
    """The oracle above is differentiated too; this is not."""
    p, b = draw(pair.system, 15)
    names, leaves = list(p), [t.clone().requires_grad_() for t in (*p.values(), b)]

    def function(*tensors: Tensor) -> Tensor:
        return pair.f(dict(zip(names, tensors[:-1], strict=True)), tensors[-1])

    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-5, fast_mode=True)


def test_jacobians_agree(pair):
    p, b = draw(pair.system, 16)
    close(jacfwd(pair.f, 1)(p, b), jacrev(pair.f, 1)(p, b))
    close(jacfwd(pair.f, 1)(p, b), jacrev(pair.g, 1)(p, b))


@pytest.mark.parametrize("size", [1e-30, 1e-13, 1e30])
def test_tiny_and_huge_cotangents(pair, size):
    """jax #40254: inner products of a tiny right-hand side underflow."""
    p, b = draw(pair.system, 17)
    w = Numbers(18, DOUBLE)(*pair.f(p, b).shape)
    ours = vjp(pair.f, p, b)[1](size * w)
    theirs = vjp(pair.g, p, b)[1](w)
    close(pytree.tree_map(lambda t: t / size, ours), theirs)


def test_zero_cotangent(pair):
    p, b = draw(pair.system, 19)
    pulled = vjp(pair.f, p, b)[1](torch.zeros_like(pair.f(p, b)))
    assert not any(bool(t.any()) for t in pytree.tree_leaves(pulled))
