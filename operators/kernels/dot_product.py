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
    def profile(self, t: Tensor, order: int) -> list[Tensor]:
        """``f(t), f'(t), ...`` to the given order."""

    def lift(self, L: Functionals) -> Lift:
        """The functionals with all second-order coefficients in one field."""
        return Functionals(L.points, L.value, L.gradient, None, L.second())

    def pairs(self, left: Lift, right: Lift) -> Tensor:
        """``(..., n, m)``."""
        x, y = left.points, right.points
        f = self.profile(x @ y.mT, 2 * max(left.order, right.order))
        total = torch.zeros_like(f[0])
        w = None if left.value is None else left.value[..., :, None]
        w2 = None if right.value is None else right.value[..., None, :]
        # Of the first argument's functional, contracted with y; of the second's, with x.
        g = None if left.gradient is None else left.gradient @ y.mT
        g2 = None if right.gradient is None else x @ right.gradient.mT
        S, S2 = left.hessian, right.hessian
        q = None if S is None else torch.einsum("...iab,...ja,...jb->...ij", S, y, y)
        q2 = None if S2 is None else torch.einsum("...jab,...ia,...ib->...ij", S2, x, x)
        if w is not None and w2 is not None:
            total = total + w * w2 * f[0]
        if w is not None and g2 is not None:
            total = total + w * g2 * f[1]
        if w is not None and q2 is not None:
            total = total + w * q2 * f[2]
        if g is not None and w2 is not None:
            total = total + g * w2 * f[1]
        if g is not None and g2 is not None:
            total = total + g * g2 * f[2] + (left.gradient @ right.gradient.mT) * f[1]
        if g is not None and q2 is not None:
            bent = torch.einsum("...ia,...jab,...ib->...ij", left.gradient, S2, x)
            total = total + g * q2 * f[3] + 2 * bent * f[2]
        if q is not None and w2 is not None:
            total = total + q * w2 * f[2]
        if q is not None and g2 is not None:
            bent = torch.einsum("...ja,...iab,...jb->...ij", right.gradient, S, y)
            total = total + q * g2 * f[3] + 2 * bent * f[2]
        if q is not None and q2 is not None:
            assert S is not None
            assert S2 is not None
            crossed = torch.einsum("...ia,...jab,...ibc,...jc->...ij", x, S2, S, y)
            trace = torch.einsum("...iab,...jab->...ij", S, S2)
            total = total + q * q2 * f[4] + 4 * crossed * f[3] + 2 * trace * f[2]
        return total


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

    def profile(self, t: Tensor, order: int) -> list[Tensor]:  # noqa: D102
        slope, offset = self.log_slope.exp(), self.log_offset.exp()
        base, factor, found = slope * t + offset, 1.0, []
        for k in range(order + 1):
            power = self.degree - k
            found.append(factor * slope**k * base**power if power >= 0 else torch.zeros_like(t))
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

    def profile(self, t: Tensor, order: int) -> list[Tensor]:  # noqa: D102
        variance = self.log_variance.exp()
        f = [variance * t, variance.expand_as(t)]
        return [*f, *[torch.zeros_like(t)] * max(0, order - 1)]


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
