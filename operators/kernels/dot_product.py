"""Kernels of the inner product of two points."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from operators.kernels.functionals import Functionals
from operators.kernels.kernel import Kernel, Lift, Positive, log_of


class DotProductKernel(Kernel):
    """``k(x, y) = f(t)`` with ``t = x . y``: ``d_x f = f' y``, ``d_y f = f' x``, and so on."""

    @abstractmethod
    def profile(self, t: Tensor, order: int) -> list[Tensor | None]:
        """``f(t), f'(t), ...`` to the given order; None for zero."""

    def lift(self, L: Functionals) -> Lift:
        """The functionals with all second-order coefficients in one field."""
        return Functionals(L.points, L.value, L.gradient, None, L.second())

    def pairs(self, left: Lift, right: Lift) -> Tensor:
        """``(..., n, m)``; every contraction is one product of matrices of point-wise features."""
        x, y = left.points, right.points
        w, g, S = left.value, left.gradient, left.hessian
        w2, g2, S2 = right.value, right.gradient, right.hessian
        # Of each derivative of f the terms of its coefficient, as rows and columns to multiply.
        terms: dict[int, list[tuple[Tensor, Tensor]]] = {}

        def add(k: int, rows: Tensor, columns: Tensor, factor: float = 1.0) -> None:
            terms.setdefault(k, []).append((factor * rows, columns))

        # What a functional contracts with the other point: g.y, y S y; and g'.x, x S' x.
        yy, xx = _outer(y, y), _outer(x, x)
        if w is not None and w2 is not None:
            add(0, w[..., None], w2[..., None])
        if w is not None and g2 is not None:
            add(1, w[..., None] * x, g2)
        if g is not None and w2 is not None:
            add(1, g, w2[..., None] * y)
        if w is not None and S2 is not None:
            add(2, w[..., None] * xx, S2.flatten(-2))
        if S is not None and w2 is not None:
            add(2, S.flatten(-2), w2[..., None] * yy)
        if g is not None and g2 is not None:
            add(1, g, g2)
            add(2, _outer(g, x), _outer(y, g2))  # (g.y) (g'.x)
        if g is not None and S2 is not None:
            add(2, _outer(g, x), S2.flatten(-2), 2.0)  # g S' x
            add(3, _outer(g, xx), _outer(y, S2.flatten(-2)))  # (g.y) (x S' x)
        if S is not None and g2 is not None:
            add(2, S.flatten(-2), _outer(g2, y), 2.0)
            add(3, _outer(S.flatten(-2), x), _outer(yy, g2))
        if S is not None and S2 is not None:
            add(2, S.flatten(-2), S2.flatten(-2), 2.0)  # tr S S'
            # x S' S y = sum x_a S'_ab S_bc y_c
            rows = x[..., :, None, None] * S[..., None, :, :]
            columns = S2[..., :, :, None] * y[..., None, None, :]
            add(3, rows.flatten(-3), columns.flatten(-3), 4.0)
            add(4, _outer(S.flatten(-2), xx), _outer(yy, S2.flatten(-2)))  # (y S y) (x S' x)
        total = None
        for k, f in enumerate(self.profile(x @ y.mT, max(terms, default=0))):
            if f is None or k not in terms:
                continue
            rows, columns = zip(*terms[k], strict=True)
            term = torch.cat(rows, -1) @ torch.cat(columns, -1).mT * f
            total = term if total is None else total + term
        return (x @ y.mT) * 0 if total is None else total


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """All products of components, ``(n, d e)``."""
    return (a[..., :, None] * b[..., None, :]).flatten(-2)


class Polynomial(DotProductKernel):
    """``(slope x . y + offset)^degree``: polynomials of that degree.

    Parameters
    ----------
    degree
        Whole number, at least 1.
    slope, offset
        Positive. The seed of this kernel in arXiv 2510.05568 (case B) is ``(alpha x . y + c)^2``.
    """

    _parameters = ("log_slope", "log_offset")

    def __init__(self, degree: int = 2, slope: Positive = 1.0, offset: Positive = 1.0) -> None:
        if not isinstance(degree, int) or degree < 1:
            raise ValueError(f"degree={degree!r}; expected a whole number, at least 1")
        self.degree = degree
        self.log_slope = log_of(slope, "slope", single=True)
        self.log_offset = log_of(offset, "offset", single=True)

    def profile(self, t: Tensor, order: int) -> list[Tensor | None]:  # noqa: D102
        slope, offset = self.log_slope.exp(), self.log_offset.exp()
        base, factor = slope * t + offset, 1.0
        found: list[Tensor | None] = []
        for k in range(order + 1):
            power = self.degree - k
            found.append(factor * slope**k * base**power if power >= 0 else None)
            factor = factor * power
        return found

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, degree={self.degree})"


class Linear(DotProductKernel):
    """``variance x . y``: linear functions through the origin.

    Parameters
    ----------
    variance
        Positive.
    """

    _parameters = ("log_variance",)

    def __init__(self, variance: Positive = 1.0) -> None:
        self.log_variance = log_of(variance, "variance", single=True)

    def profile(self, t: Tensor, order: int) -> list[Tensor | None]:  # noqa: D102
        variance = self.log_variance.exp()
        return [variance * t, variance.expand_as(t), *[None] * max(0, order - 1)]


class White(Kernel):
    """``variance`` where x and y are the same point, 0 elsewhere: noise, which has no derivatives.

    Parameters
    ----------
    variance
        Positive.
    """

    _parameters = ("log_variance",)

    def __init__(self, variance: Positive = 1.0) -> None:
        self.log_variance = log_of(variance, "variance", single=True)

    @property
    def smoothness(self) -> float:
        """It has values only."""
        return 0.5

    def lift(self, L: Functionals) -> Lift:
        """Values as they are.

        Raises
        ------
        ValueError
            L takes derivatives.
        """
        self.check_smooth(L)
        return L

    def pairs(self, left: Lift, right: Lift) -> Tensor:  # noqa: D102
        if left.value is None or right.value is None:
            shape = torch.broadcast_shapes(left.points.shape[:-2], right.points.shape[:-2])
            return left.points.new_zeros(*shape, len(left), len(right)) * self.log_variance.exp()
        same = (left.points[..., :, None, :] == right.points[..., None, :, :]).all(-1)
        both = left.value[..., :, None] * right.value[..., None, :]
        return self.log_variance.exp() * both * same
