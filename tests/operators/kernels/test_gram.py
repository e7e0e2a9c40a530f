"""`KernelGram`: tiles, products, entries and all derivatives, against dense arithmetic."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import operators as ops
import solvers
from operators import Functionals
from operators.kernels import gram as module
from tests.operators.kernels.families import (
    blocks,
    close,
    float64,
    kernels,
    net,
    normal,
    random,
)

func = torch.func


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 2 x 2: many, also within a block."""
    monkeypatch.setattr(module, "_TILE", {"cpu": 4, "cuda": 4})


def rows(n=5, d=2, seed=0):
    """Three blocks of n, values among derivatives."""
    x = random(3 * n, d, seed=seed)
    a, b, c = x.split(n)
    return [
        Functionals(a, normal(n, seed=seed), laplacian=0.03 * normal(n, seed=seed + 1)),
        Functionals(b, gradient=0.2 * normal(n, d, seed=seed + 2)),
        Functionals.value_at(c),
    ]


# --- tiles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ard", "polynomial", "gibbs", "warped", "sum"])
def test_tiles_do_not_matter(name, monkeypatch):
    kernel, _ = kernels(2)[name]
    left, right = rows(3), rows(3, seed=9)[:2]
    V = normal(9, 3, seed=1)
    results = []
    for area in (10**6, 4):
        monkeypatch.setattr(module, "_TILE", {"cpu": area, "cuda": area})
        K, M = ops.gram(kernel, left), ops.gram(kernel, left, right)

        def f(parameters, V, left=left, right=right):
            k = kernel.with_parameters(parameters)
            a = (V * (ops.gram(k, left) @ V)).sum()
            b = (ops.gram(k, left, right).T @ V).sin().sum()
            return a + b + (V[:, :1] * ops.gram(k, left).to_dense()).cos().sum()

        gradient = func.grad(f, argnums=(0, 1))(kernel.parameters, V)
        leaves = torch.cat([g.reshape(-1) for g in gradient[0].values()])
        results.append([K.to_dense(), M.to_dense(), K @ V, M @ V[:6], M.T @ V, leaves, gradient[1]])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            close(a, b, 1e-11)


@pytest.mark.parametrize("sizes", [[1], [1, 1], [2, 3], [4, 0, 5], [0, 7, 0], [0], [0, 0]])
def test_products_are_those_of_the_matrix(sizes, small_tiles):
    x = random(sum(sizes), 2)
    parts = [Functionals.laplacian_at(z) for z in x.split(sizes)]
    K, M = ops.gram(ops.RBF(0.5), parts), ops.gram(ops.RBF(0.5), parts, rows(2))
    dense, other = K.to_dense(), M.to_dense()
    assert bool((dense == dense.mT).all())
    V, W = normal(len(x), 3), normal(6, 2)
    assert bool(torch.isfinite(func.grad(lambda V: (K @ V).sum())(V)).all())
    if not len(x):
        assert (K @ V).shape == (0, 3)
        assert (M @ W).shape == (0, 2)
        assert float((M.T @ V).abs().max()) == 0.0
        return
    close(K @ V, dense @ V, 1e-13)
    close(K.T @ V[:, 0], dense @ V[:, 0], 1e-13)
    close(M @ W, other @ W, 1e-13)
    close(M.T @ V, other.T @ V, 1e-13)
    close(M.T.to_dense(), other.T, 1e-14)
    close(ops.diagonal(K, method="exact").value, dense.diagonal(), 1e-13)
    close(M.T.T @ W, other @ W, 1e-13)


def test_facts():
    L, M = rows(), rows(seed=9)
    K, N = ops.gram(ops.RBF(0.5), L), ops.gram(ops.RBF(0.5), L, M)
    assert K.symmetric
    assert K.positive_semidefinite
    assert not N.symmetric
    assert K.T is K
    assert N.shape == (15, 15)
    assert K.dtype == float64
    assert bool((K.points == torch.cat([part.points for part in L])).all())
    assert K.orders.tolist() == [2] * 5 + [1] * 5 + [0] * 5
    assert K.check_claims()
    assert repr(K) == "KernelGram(15, 15)"
    assert "RBF(lengthscale=0.5)" in str(K)
    eta = 0.1 * ops.Identity(15, dtype=float64)
    assert (K + eta).positive_definite
    close((K + eta) @ torch.ones(15, dtype=float64), (K + eta).to_dense().sum(1), 1e-13)


def test_refuses():
    L = rows()
    R = ops.Representers(ops.RBF(0.5), L)
    with pytest.raises(TypeError, match=r"left is a list; expected Representers"):
        ops.KernelGram(L)
    with pytest.raises(TypeError, match=r"right is a RBF; expected Representers"):
        ops.KernelGram(R, ops.RBF())
    with pytest.raises(ValueError, match=r"expected the same kernels"):
        ops.KernelGram(R, ops.Representers({"u": ops.RBF(0.5)}, L))
    for other in (ops.Matern(0.5), ops.RBF(torch.ones(2, dtype=float64)), ops.RBF(0.6)):
        with pytest.raises(ValueError, match=r"expected the same kernels"):
            ops.KernelGram(R, ops.Representers(other, L))
    single = ops.Representers(ops.RBF(0.5), Functionals.value_at(random(3, 2).float()))
    with pytest.raises(TypeError, match=r"rows are torch.float64 on cpu, columns torch.float32"):
        ops.KernelGram(R, single)
    solid = ops.Representers(ops.RBF(0.5), Functionals.value_at(random(3, 3)))
    with pytest.raises(ValueError, match=r"points of dimension 2, columns .* dimension 3"):
        ops.KernelGram(R, solid)


def test_equal_kernels_may_be_different_objects():
    L = rows()
    R, S = ops.Representers(ops.RBF(0.5), L), ops.Representers(ops.RBF(0.5), L[:1])
    close(ops.KernelGram(R, S).to_dense(), ops.gram(ops.RBF(0.5), L, L[:1]).to_dense(), 1e-15)


# --- entries -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(kernels(2)))
def test_submatrix(name):
    kernel, _ = kernels(2)[name]
    L = blocks(random(18, 2), 1)
    K = ops.gram(kernel, L)
    dense = K.to_dense()
    for i, j in (
        (torch.tensor([0, 17, 5]), torch.tensor([3])),
        (torch.tensor([[0, 17, 5], [2, 2, 9]]), torch.tensor([[1], [17]])),
        (torch.randint(18, (2, 3, 4)), torch.randint(18, (2, 3, 5))),
        (torch.arange(18), torch.arange(18)),
        (torch.zeros(0, dtype=torch.long), torch.arange(3)),
        (torch.arange(18).reshape(6, 3), torch.arange(18).reshape(6, 3)),
    ):
        close_or_empty(K.submatrix(i, j), dense[i[..., :, None], j[..., None, :]])
    # Blocks that share no field.
    fields = {"u": kernel, "v": ops.RBF(0.3)}
    x = random(4, 2)
    K = ops.gram(fields, [{"u": Functionals.laplacian_at(x)}, {"v": Functionals.value_at(x)}])
    dense = K.to_dense()
    i, j = torch.tensor([0, 5, 3]), torch.tensor([6, 2])
    close(K.submatrix(i, j), dense[i[:, None], j], 1e-13)
    close(K.submatrix(i[:1], j[:1]), torch.zeros(1, 1, dtype=float64))


def close_or_empty(a, b):
    assert a.shape == b.shape
    if a.numel():
        close(a, b, 1e-12)


def test_submatrix_of_a_rectangle():
    L, M = rows(), rows(seed=9)[:2]
    K = ops.gram(ops.Matern(0.4, 3.5), L, M)
    i, j = torch.tensor([[0, 14], [7, 7]]), torch.tensor([[9, 0], [3, 4]])
    close(K.submatrix(i, j), K.to_dense()[i[..., None], j[..., None, :]], 1e-13)
    close(K.T.submatrix(j, i), K.to_dense()[i[..., None], j[..., None, :]].mT, 1e-13)


def test_submatrix_is_differentiable():
    L = rows()
    i, j = torch.tensor([[0, 14], [7, 7]]), torch.tensor([[9, 0], [3, 4]])

    def f(t):
        return ops.gram(ops.Matern(t.exp(), 3.5), L).submatrix(i, j)

    t = torch.tensor(-0.7, dtype=float64, requires_grad=True)
    assert gradcheck(f, t)
    assert gradgradcheck(f, t)
    full = func.jacrev(lambda t: ops.gram(ops.Matern(t.exp(), 3.5), L).to_dense())(t)
    close(func.jacrev(f)(t), full[i[..., None], j[..., None, :]], 1e-12)


@pytest.mark.parametrize("bad", [[-1], [15], [0, 99]])
def test_submatrix_refuses_what_is_out_of_range(bad):
    K, good = ops.gram(ops.RBF(0.5), rows()), torch.tensor([0])
    for i, j in ((torch.tensor(bad), good), (good, torch.tensor(bad))):
        with pytest.raises(IndexError, match="expected 0 to 14"):
            K.submatrix(i, j)


# --- derivatives -------------------------------------------------------------------------------

LENGTH, WEIGHT = net(2, 3, 1, last=nn.Softplus()), normal(3, 2)
FAMILIES = {
    "rbf": lambda p: ops.RBF(p[0].exp()) * p[1].exp(),
    "ard": lambda p: ops.RBF(p.exp()),
    "matern": lambda p: ops.Matern(p[0].exp(), 3.5) * p[1].exp(),
    "gibbs": lambda p: ops.Gibbs(LENGTH).with_parameters(
        {"lengthscale.2.bias": p[:1], "lengthscale.0.weight": WEIGHT * p[1]}
    ),
    "product": lambda p: ops.RBF(p[0].exp()) * ops.Polynomial(2, p[1].exp()),
    "own": lambda p: ops.Radial(lambda s, a: torch.exp(-s) / (1 + a * s), p[0].exp(), a=p[1].exp()),
    "no rule": lambda p: ops.Radial(lambda s, a: torch.erfc(a * s), p[0].exp(), a=p[1].exp()),
}
P = torch.tensor([-0.7, 0.3], dtype=float64)
U, V = normal(15, seed=1), normal(15, 2, seed=2)
SCALARS = {
    "dense": lambda K, u, v: (K.to_dense() * u[:, None]).sin().sum(),
    "product": lambda K, u, v: (K @ v[:, 0] * u).sum(),
    "block": lambda K, u, v: (K @ v).sin().sum(),
    "variances": lambda K, u, v: (K.left.variances() * u).sum(),
}


def difference(f, p, h=1e-5):
    """Central, along each axis; f may return a tensor."""
    units = torch.eye(p.numel(), dtype=p.dtype).reshape(-1, *p.shape)
    return torch.stack([(f(p + h * e) - f(p - h * e)) / (2 * h) for e in units], -1)


@pytest.mark.parametrize(
    ("family", "scalar", "tiles"),
    [
        *((family, "product", "whole") for family in FAMILIES),
        *(("rbf", scalar, "small") for scalar in SCALARS),
        *((family, "dense", "whole") for family in ("matern", "gibbs", "own")),
        ("matern", "block", "whole"),
        ("gibbs", "variances", "whole"),
    ],
)
def test_transforms_are_finite_differences(family, scalar, tiles, monkeypatch):
    if tiles == "small":
        monkeypatch.setattr(module, "_TILE", {"cpu": 9, "cuda": 9})
    L = rows(2)
    u, v = U[: 3 * len(L[0])], V[: 3 * len(L[0])]

    def f(p):
        return SCALARS[scalar](ops.gram(FAMILIES[family](p), L), u, v)

    slopes = difference(f, P)
    gradient = func.grad(f)(P)
    close(gradient, slopes, 1e-7)
    held = P.clone().requires_grad_()
    close(torch.autograd.grad(f(held), held)[0], gradient, 1e-11)
    close(func.jacrev(f)(P), gradient, 1e-11)
    close(func.jacfwd(f)(P), gradient, 1e-11)
    along = torch.tensor([0.4, -1.1], dtype=float64)
    close(func.jvp(f, (P,), (along,))[1], gradient @ along, 1e-11)
    bend = difference(func.grad(f), P)
    for hessian in (func.hessian(f), func.jacrev(func.jacrev(f))):
        close(hessian(P), bend, 1e-6)
    many = torch.stack([P, P + 0.1, P - 0.2])
    values = torch.stack([f(p) for p in many])
    close(func.vmap(f)(many), values, 1e-12)
    gradients = torch.stack([func.grad(f)(p) for p in many])
    close(func.vmap(func.grad(f))(many), gradients, 1e-11)


def test_forward_over_forward_is_right_or_refused():
    """torch drops such derivatives without a word (pytorch#197867)."""
    L = rows(2)
    u = U[:6]
    for scalar in (lambda K: u @ (K @ u), lambda K: (K.to_dense() * u).sin().sum()):

        def f(p, scalar=scalar):
            return scalar(ops.gram(ops.RBF(p[0].exp()) * p[1].exp(), L))

        expected = func.jacrev(func.grad(f))(P)
        try:
            found = func.jacfwd(func.jacfwd(f))(P)
        except (RuntimeError, NotImplementedError):
            continue
        close(found, expected, 1e-10)


@pytest.mark.parametrize("family", ["rbf", "matern", "gibbs"])
def test_gradcheck(family, monkeypatch):
    monkeypatch.setattr(module, "_TILE", {"cpu": 1, "cuda": 1})
    L, M = rows(1), rows(1, seed=9)[:2]
    p = P.clone().requires_grad_()
    v, w = normal(3, 1).requires_grad_(), normal(2, seed=1).requires_grad_()

    def product(p, v):
        return ops.gram(FAMILIES[family](p), L) @ v

    def rectangle(p, w):
        return ops.gram(FAMILIES[family](p), L, M) @ w

    def dense(p):
        return ops.gram(FAMILIES[family](p), L).to_dense()

    def rectangular(p):
        return ops.gram(FAMILIES[family](p), L, M).to_dense()

    for f, at in ((product, (p, v)), (rectangle, (p, w)), (dense, (p,)), (rectangular, (p,))):
        assert gradcheck(f, at, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(f, at, fast_mode=True)


@pytest.mark.parametrize("kernel", ["rbf", "gibbs", "warped", "polynomial"])
def test_derivative_by_the_points_and_coefficients(kernel, small_tiles):
    k, _ = kernels(2)[kernel]
    v = normal(3, seed=5)

    def f(x, c, g):
        L = [Functionals(x, gradient=g, laplacian=c), Functionals.value_at(x)]
        K = ops.gram(k, L)
        w = torch.cat([v, v.flip(0)])
        return w @ (K @ w) + K.to_dense().sin().sum()

    at = [random(3, 2), 0.03 * normal(3, seed=1), 0.2 * normal(3, 2, seed=2)]
    at = [t.requires_grad_() for t in at]
    assert gradcheck(f, at, fast_mode=True)
    assert gradgradcheck(f, at, fast_mode=True)


def test_derivatives_of_several_fields(small_tiles):
    x, y = random(3, 2), random(4, 2, seed=1)
    v = normal(10, seed=2)

    def f(p):
        fields = {"u": ops.RBF(p[0].exp()), "v": ops.Matern(p[1].exp(), 3.5)}
        L = [
            {"u": 0.03 * Functionals.laplacian_at(x)},
            {"v": 0.2 * Functionals.gradient_at(x, 0)},
            {"u": Functionals.value_at(y), "v": 0.03 * Functionals.laplacian_at(y)},
        ]
        K = ops.gram(fields, L)
        return v @ (K @ v) + K.to_dense().sin().sum()

    close(func.grad(f)(P), difference(f, P), 1e-7)
    close(func.hessian(f)(P), difference(func.grad(f), P), 1e-7)


def test_rows_of_zeros_are_differentiated():
    x = random(3, 2)
    v = normal(6)
    for family in ("rbf", "matern", "own", "product"):

        def f(p, family=family):
            K = ops.gram(FAMILIES[family](p), [Functionals(x), Functionals.laplacian_at(x)])
            return v @ (K @ v)

        close(func.grad(f)(P), difference(f, P), 1e-7)
        held = P.clone().requires_grad_()
        close(torch.autograd.grad(f(held), held)[0], func.grad(f)(P), 1e-12)


def test_one_block_is_differentiated_by_a_block_of_vectors():
    K = ops.gram(ops.RBF(0.5), rows())
    v = V.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((U[:, None] * (K @ v)).sum(), v)
    close(gradient, K.to_dense() @ U[:, None].expand(15, 2), 1e-12)
    jacobian = func.jacrev(lambda v: K @ v)(V[:, 0])
    close(jacobian, K.to_dense(), 1e-13)
    close(func.vmap(lambda v: K @ v, in_dims=1, out_dims=1)(V), K.to_dense() @ V, 1e-13)


# --- under a solver ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver", [solvers.DenseCholesky(), solvers.CG(rtol=1e-13, maxiter=500)], ids=["dense", "cg"]
)
def test_solves_are_differentiated(solver):
    """``b . (K + eta I)^{-1} b`` and its derivative by log l, against dense torch."""
    x = random(12, 2)
    L = [Functionals.value_at(x), Functionals.laplacian_at(x) * 0.02]
    b, eta = normal(24), 0.05

    def by_solver(t):
        K = ops.gram(ops.Matern(t.exp(), 3.5), L)
        A = K + eta * ops.Identity(24, dtype=float64)
        return b @ solvers.solve(A, b, solver=solver)

    def by_torch(t):
        K = ops.gram(ops.Matern(t.exp(), 3.5), L).to_dense()
        return b @ torch.linalg.solve(K + eta * torch.eye(24, dtype=float64), b)

    t = torch.tensor(-0.9, dtype=float64)
    close(by_solver(t), by_torch(t), 1e-10)
    slope = (by_torch(t + 1e-5) - by_torch(t - 1e-5)) / 2e-5
    close(func.grad(by_torch)(t), slope, 1e-7)
    close(func.grad(by_solver)(t), func.grad(by_torch)(t), 1e-9)
    held = t.clone().requires_grad_()
    close(torch.autograd.grad(by_solver(held), held)[0], func.grad(by_torch)(t), 1e-9)
    close(func.jacfwd(by_solver)(t), func.grad(by_torch)(t), 1e-9)
    close(func.grad(func.grad(by_solver))(t), func.grad(func.grad(by_torch))(t), 1e-7)


# --- memory ------------------------------------------------------------------------------------

MEMORY = """
import resource, torch, operators as ops
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def product(n):
    x = torch.rand(n, 2, generator=g)
    K = ops.gram(ops.RBF(torch.tensor(0.3)), ops.Functionals.value_at(x))
    return K @ torch.ones(n, 1)
product(2000)
before = peak()
y = product(20_000)
print(peak() - before, float(y.min()) > 0)
"""


def test_products_take_little_memory():
    """Rows by the 20,000: the matrix alone would take 1.5 GiB."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120, check=True
    )
    megabytes, positive = done.stdout.split()
    assert positive == "True"
    assert float(megabytes) < 100
