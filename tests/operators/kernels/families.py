"""Functionals of all kinds, and every kernel beside the formula of its value."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import operators as ops
from operators import Functionals

float64 = torch.float64
Pair = Callable[[Tensor, Tensor], Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=float64)


def blocks(x: Tensor, seed: int = 0) -> list[Functionals]:
    """One block of each kind, two points each of the 18 of x, with random coefficients."""
    d = x.shape[-1]
    g = generator(seed)

    def r(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=x.dtype)

    along = torch.zeros(2, d, dtype=x.dtype)
    along[:, d - 1] = r(2)
    few = torch.zeros(2, d, d, dtype=x.dtype)
    few[:, 0, 0], few[:, 0, d - 1] = r(2), r(2)
    made = [
        lambda z: Functionals(z, value=r(2)),
        lambda z: Functionals(z, gradient=r(2, d)),
        lambda z: Functionals(z, laplacian=r(2)),
        lambda z: Functionals(z, value=r(2), laplacian=r(2)),
        lambda z: Functionals(z, gradient=along, laplacian=r(2), axes=(d - 1,)),
        lambda z: Functionals(z, hessian=r(2, d, d)),
        lambda z: Functionals(z, hessian=few, entries=tuple(sorted({(0, 0), (0, d - 1)}))),
        lambda z: Functionals(
            z, gradient=r(2, d), laplacian=r(2), hessian=few, entries=((0, 0), (0, d - 1))
        ),
        lambda z: Functionals(z, r(2), r(2, d), r(2), r(2, d, d)),
    ]
    return [make(x[2 * k : 2 * k + 2]) for k, make in enumerate(made)]


def whole(parts: list[Functionals]) -> Functionals:
    """The same rows as one block whose coefficients are all there, zeros among them."""
    x = torch.cat([L.points for L in parts])
    d = x.shape[-1]

    def filled(name: str, *tail: int) -> Tensor:
        found = []
        for L in parts:
            held = L.second() if name == "hessian" else getattr(L, name)
            found.append(x.new_zeros(len(L), *tail) if held is None else held)
        return torch.cat(found)

    return Functionals(x, filled("value"), filled("gradient", d), None, filled("hessian", d, d))


def by_nested_autodiff(pair: Pair, left: list[Functionals], right: list[Functionals]) -> Tensor:
    return ops.gram(ops.FunctionKernel(pair), whole(left), whole(right)).to_dense()


def net(*sizes: int, last: nn.Module | None = None, act: type[nn.Module] = nn.Tanh) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), act()]
    layers[-1:] = [] if last is None else [last]
    module = nn.Sequential(*layers).double()
    g = generator(sum(sizes))
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.6 * torch.randn(p.shape, generator=g, dtype=float64))
    return module


def gibbs(length: Callable[[Tensor], Tensor]) -> Pair:
    def pair(x: Tensor, y: Tensor) -> Tensor:
        a, b = length(x[None])[0].expand(x.shape), length(y[None])[0].expand(x.shape)
        c = a**2 + b**2
        return ((2 * a * b / c).sqrt() * torch.exp(-((x - y) ** 2) / c)).prod()

    return pair


def matern(length: Tensor | float, nu: float) -> Pair:
    polynomials = {
        0.5: lambda t: 1,
        1.5: lambda t: 1 + t,
        2.5: lambda t: 1 + t + t**2 / 3,
        3.5: lambda t: 1 + t + 2 * t**2 / 5 + t**3 / 15,
        4.5: lambda t: 1 + t + 3 * t**2 / 7 + 2 * t**3 / 21 + t**4 / 105,
    }

    def pair(x: Tensor, y: Tensor) -> Tensor:
        t = (2 * nu * (((x - y) / length) ** 2).sum()).sqrt()
        return polynomials[nu](t) * torch.exp(-t)

    return pair


def square(x: Tensor, y: Tensor, length: Tensor | float) -> Tensor:
    return (((x - y) / length) ** 2).sum()


def kernels(d: int) -> dict[str, tuple[ops.Kernel, Pair]]:
    """Smooth ones, by name: the kernel and its value as a function of two points."""
    one = net(d, 6, 1, last=nn.Softplus())
    each = net(d, 6, d, last=nn.Softplus())
    warp = net(d, 6, 2, act=nn.SiLU)
    lengths = torch.linspace(0.3, 0.6, d, dtype=float64)
    exp, pi = torch.exp, torch.pi

    def own(s: Tensor) -> Tensor:
        return s.cos() * (1 + s).sqrt() + (s.square() + 1).log() * s.tanh() - s.sin() ** 3

    def periodic(x: Tensor, y: Tensor) -> Tensor:
        sines = torch.sin(pi * (x[0] - y[0]) / 2.0) ** 2
        return exp(-2 * sines / 0.8**2 - 0.5 * square(x[1:], y[1:], 0.8))

    return {
        "rbf": (ops.RBF(0.4), lambda x, y: exp(-0.5 * square(x, y, 0.4))),
        "ard": (ops.RBF(lengths), lambda x, y: exp(-0.5 * square(x, y, lengths))),
        "rational quadratic": (
            ops.RationalQuadratic(0.5, 0.7),
            lambda x, y: (1 + square(x, y, 0.5) / 1.4) ** -0.7,
        ),
        "inverse quadratic": (ops.InverseQuadratic(0.5), lambda x, y: 1 / (1 + square(x, y, 0.5))),
        "inverse multiquadric": (
            ops.InverseMultiquadric(0.5),
            lambda x, y: (1 + square(x, y, 0.5)) ** -0.5,
        ),
        "radial": (ops.Radial(own, lengths), lambda x, y: own(0.5 * square(x, y, lengths))),
        "polynomial": (ops.Polynomial(3, 0.5, 1.2), lambda x, y: (0.5 * x @ y + 1.2) ** 3),
        "linear": (ops.Linear(2.0), lambda x, y: 2 * x @ y),
        "gibbs": (ops.Gibbs(one), gibbs(one)),
        "product gibbs": (ops.Gibbs(each), gibbs(each)),
        "warped": (
            ops.WarpedKernel(ops.RBF(0.7), warp),
            lambda x, y: exp(-0.5 * square(warp(x[None]), warp(y[None]), 0.7)),
        ),
        "periodic": (ops.PeriodicKernel(ops.RBF(1.0), {0: 2.0}, 0.8), periodic),
        "sum": (
            1.7 * ops.RBF(0.4) + ops.Polynomial(2),
            lambda x, y: 1.7 * exp(-0.5 * square(x, y, 0.4)) + (x @ y + 1) ** 2,
        ),
        "product": (
            ops.RBF(0.5) * ops.RationalQuadratic(0.7),
            lambda x, y: exp(-0.5 * square(x, y, 0.5)) / (1 + 0.5 * square(x, y, 0.7)),
        ),
        "coordinates": (
            ops.CoordinatesKernel(ops.RBF(0.5), [d - 1])
            * ops.CoordinatesKernel(ops.Gibbs(lambda x: 0.3 + 0.1 * x**2), [0]),
            lambda x, y: (
                exp(-0.5 * square(x[-1], y[-1], 0.5))
                * gibbs(lambda z: 0.3 + 0.1 * z**2)(x[:1], y[:1])
            ),
        ),
    }


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-11) -> None:
    """In units of the largest entry."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert bool(torch.isfinite(expected).all())
    actual, expected = actual.detach(), expected.detach()
    difference, largest = float((actual - expected).abs().max()), float(expected.abs().max())
    assert difference <= rtol * largest, (difference, largest)
