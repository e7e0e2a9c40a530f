"""Gibbs kernels: a length-scale that is a function of the point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from operators.kernels.functionals import Functionals
from operators.kernels.heat import heat_pairs
from operators.kernels.jets import Field, jets
from operators.kernels.kernel import Kernel, Lift
from operators.kernels.separable import Powers
from operators.kernels.warp import multiplied


class Gibbs(Kernel):
    """``prod_a sqrt(2 l_a l'_a / c_a) exp(-(x_a - y_a)^2 / c_a)`` with ``c_a = l_a^2 + l'_a^2``.

    With one length for all coordinates, ``(2 l l' / c)^(d/2) exp(-|x - y|^2 / c)``. The kernel of
    Gibbs (1997); positive definite for any positive ``l(x)``, equal to the RBF kernel ``exp(-|x -
    y|^2 / (2 l^2))`` for a constant one.

    Parameters
    ----------
    lengthscale
        Positive function of points ``(n, d) -> (n, 1)`` or ``(n,)`` for one length, ``(n, d)`` for
        one a coordinate (the product Gibbs kernel); a function or an `nn.Module`, whose parameters
        are parameters of the kernel. It is evaluated once a point, with its derivatives, never once
        a pair.

    Raises
    ------
    ValueError
        Lengths are not positive, or of another shape.

    Notes
    -----
    Without the factors ``sqrt(l)``, which functionals absorb by the product rule, the kernel is
    ``E = prod_a c_a^(-1/2) exp(-(x_a - y_a)^2 / c_a)``, the heat kernel: ``d E / d c_a = (1/4)
    d_a^2 E``. So the chain rule through ``l_a(x)^2`` leaves polynomials in the derivatives by x -
    y, of degree 4 a side for second-order functionals, whose coefficients are known point by point;
    a block is a sum of products of Hermite functions with matrices of low rank.

    Examples
    --------
    >>> import torch, operators as ops
    >>> k = ops.Gibbs(lambda x: 0.1 + x[:, :1] ** 2)
    >>> k(torch.rand(3, 2)).diagonal().round(decimals=5)
    tensor([1., 1., 1.])
    """

    _parameters = ("lengthscale",)

    def __init__(self, lengthscale: Any) -> None:
        self.lengthscale = Field.of(lengthscale, "lengthscale")

    def lift(self, L: Functionals) -> Lift:
        """Points, squared lengths, and coefficients of each product of derivatives."""
        x, d = L.points, L.dimension
        length, slope, bend = jets(self._lengths, x, L.order)
        k = length.shape[-1]
        if k not in (1, d):
            raise ValueError(
                f"the length-scale of points of dimension {d} has {k} components; expected 1, or "
                f"{d}: one for each coordinate"
            )
        _check_positive(length)
        return {
            "points": x,
            "squares": length**2,
            "terms": _terms(_without_amplitude(L, length, slope, bend), length, slope, bend),
        }

    def scale_lift(self, lift: Lift, factors: Tensor) -> Lift:  # noqa: D102
        terms = {powers: factors * coefficient for powers, coefficient in lift["terms"].items()}
        return {**lift, "terms": terms}

    def _lengths(self, x: Any) -> Any:
        values = self.lengthscale(x)
        return values.unsqueeze(-1) if values.ndim == x.ndim - 1 else values

    def pairs(self, left: Lift, right: Lift) -> Tensor:
        """``(..., n, m)``: see the class."""
        return self._block(left, right)

    def weighted_pairs(self, left: Lift, right: Lift, W: Tensor) -> Tensor:  # noqa: D102
        return self._block(left, right, W)

    def _block(self, left: Lift, right: Lift, W: Tensor | None = None) -> Tensor:
        return heat_pairs(
            left["points"], right["points"], left["squares"], right["squares"],
            left["terms"], right["terms"], W,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"Gibbs({self.lengthscale!r})"


def _check_positive(length: Tensor) -> None:
    known = length.detach()
    if torch._C._functorch.is_functorch_wrapped_tensor(known):
        return
    if not bool((known > 0).all()):
        raise ValueError(
            f"the length-scale is {float(known.min()):.3g} at a point; expected positive numbers: "
            "end the function with softplus or exp"
        )


def _without_amplitude(
    L: Functionals, length: Tensor, slope: Tensor | None, bend: Tensor | None
) -> Functionals:
    """``M u = L (a u)`` with ``a = prod_a (sqrt(2) l_a)^(1/2)``."""
    d, k = L.dimension, length.shape[-1]
    power = 0.5 if k == d else d / 2
    a = 2 ** (d / 4) * (power * length.log().sum(-1)).exp()
    first = second = None
    if slope is not None:
        rate = slope / length[..., None]
        log_slope = power * rate.sum(-2)
        first = a[..., None] * log_slope
        if bend is not None:
            curvature = bend / length[..., None, None] - rate[..., :, None] * rate[..., None, :]
            outer = log_slope[..., :, None] * log_slope[..., None, :]
            second = a[..., None, None] * (outer + power * curvature.sum(-3))
    return multiplied(L, (a, first, second))


def _terms(
    L: Functionals, length: Tensor, slope: Tensor | None, bend: Tensor | None
) -> dict[Powers, Tensor]:
    """L on ``E(x - y, l(x)^2 + l(y)^2)``: a polynomial in derivatives by x, as d_c = d_x^2 / 4."""
    d, k = L.dimension, length.shape[-1]
    terms: dict[Powers, Tensor] = {}

    def add(axes: tuple[int, ...], coefficient: Tensor) -> None:
        powers = tuple(axes.count(i) for i in range(d))
        terms[powers] = terms[powers] + coefficient if powers in terms else coefficient

    # Of which coordinates the heat equation takes the second derivative for component b of l.
    heat = [(b,) for b in range(d)] if k == d else [tuple(range(d))]
    if L.value is not None:
        add((), L.value)
    drift = [torch.zeros_like(length[..., 0])] * k
    if L.gradient is not None:
        assert slope is not None
        for a in L.slopes:
            add((a,), L.gradient[..., a])
        # grad l^2 = 2 l grad l
        rates = 2 * length[..., None] * slope
        drift = [(L.gradient * rates[..., b, :]).sum(-1) for b in range(k)]
    second = L.second()
    if second is not None:
        assert slope is not None
        assert bend is not None
        rates = 2 * length[..., None] * slope
        curved = 2 * (length[..., None, None] * bend + slope[..., :, None] * slope[..., None, :])
        for a, b in L.couplings:
            add((a, b), second[..., a, b] * (1 if a == b else 2))
        mixed = (second[..., None, :, :] @ rates[..., None])[..., 0]  # (n, k, d): S grad l_b^2
        reached = sorted({axis for pair in L.couplings for axis in pair})
        for b in range(k):
            drift[b] = drift[b] + (second * curved[..., b, :, :]).sum((-2, -1))
            for i in heat[b]:
                for a in reached:
                    add((a, i, i), 0.5 * mixed[..., b, a])
            for b2 in range(k):
                product = (rates[..., b2, :] * mixed[..., b, :]).sum(-1) / 16
                for i in heat[b]:
                    for j in heat[b2]:
                        add((i, i, j, j), product)
    if L.order:
        for b in range(k):
            for i in heat[b]:
                add((i, i), 0.25 * drift[b])
    if not terms:
        add((), torch.zeros_like(length[..., 0]))
    return terms
