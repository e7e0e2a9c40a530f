"""Kernels on circles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from operators.kernels.functionals import Functionals
from operators.kernels.gaussian import gaussian_pairs
from operators.kernels.kernel import Kernel, Lift, Positive, check_lengths, checked, log_lengths
from operators.kernels.radial import RBF
from operators.kernels.warp import pulled_back, scaled


class PeriodicKernel(Kernel):
    """``k`` on the circle: coordinate a of period p goes to ``(cos, sin)(2 pi x_a / p)``.

    With ``RBF(l)`` it is the periodic kernel ``exp(-2 sin^2(pi (x - y) / p) / l^2)`` (MacKay,
    1998). Coordinates without a period stay as they are.

    Parameters
    ----------
    kernel
        Of the image, whose coordinates stand in the order of the old ones, two for a period.
    periods
        ``axis -> p``.
    lengthscale
        Positive number, or one for each coordinate of x; it divides both parts of a circle.
    """

    _parameters = ("kernel", "log_lengthscale")

    def __init__(
        self, kernel: Kernel, periods: dict[int, float], lengthscale: Positive = 1.0
    ) -> None:
        if not periods or not all(
            axis >= 0 and 0 < period < math.inf for axis, period in periods.items()
        ):
            raise ValueError(f"periods={periods!r}; expected axis -> positive period, one at least")
        self.kernel, self.periods = checked(kernel), dict(periods)
        # One length for each coordinate of x, so that both parts of a circle share theirs.
        self.log_lengthscale = log_lengths(lengthscale)

    @property
    def smoothness(self) -> float:
        """Of the kernel."""
        return self.kernel.smoothness

    def lift(self, L: Functionals) -> Lift:
        """The functionals on the circles; those of an RBF kernel in the angles themselves."""
        x, d = L.points, L.dimension
        if max(self.periods) >= d:
            raise ValueError(f"periods of axes {list(self.periods)}, but points of dimension {d}")
        lengths = self.log_lengthscale.exp()
        check_lengths(self, lengths, d)
        if self._gaussian() is not None:
            turns = [self.periods.get(axis, 2 * math.pi) / (2 * math.pi) for axis in range(d)]
            return scaled(L, torch.tensor(turns, dtype=x.dtype, device=x.device))
        lengths = lengths.expand(d)
        values, slopes, bends = [], [], []
        zero = torch.zeros_like(x[..., 0])
        for axis in range(d):
            coordinate = x[..., axis]
            if axis in self.periods:
                w = 2 * torch.pi / self.periods[axis]
                cos, sin = (w * coordinate).cos(), (w * coordinate).sin()
                triples = [(cos, -w * sin, -w * w * cos), (sin, w * cos, -w * w * sin)]
            else:
                triples = [(coordinate, zero + 1, zero)]
            for value, slope, bend in triples:
                length = lengths[axis]
                values.append(value / length)
                slopes.append(_placed(slope / length, axis, d))
                bends.append(torch.diag_embed(_placed(bend / length, axis, d)))
        image = torch.stack(values, -1), torch.stack(slopes, -2), torch.stack(bends, -3)
        return self.kernel.lift(pulled_back(L, image))

    def scale_lift(self, lift: Lift, factors: Tensor) -> Lift:  # noqa: D102
        return self.kernel.scale_lift(lift, factors)

    def pairs(self, left: Lift, right: Lift) -> Tensor:
        """Of an RBF kernel a product over the coordinates of x, lines and circles."""
        length = self._gaussian()
        if length is None:
            return self.kernel.pairs(left, right)
        d = left.dimension
        rates = (length * self.log_lengthscale.exp()).expand(d) ** -2
        circles = [axis in self.periods for axis in range(d)]
        return gaussian_pairs(left, right, rates.to(left.points.dtype), circles)

    def weighted_pairs(self, left: Lift, right: Lift, W: Tensor) -> Tensor:  # noqa: D102
        if self._gaussian() is None:
            return self.kernel.weighted_pairs(left, right, W)
        return super().weighted_pairs(left, right, W)

    def _gaussian(self) -> Tensor | None:
        """Its length, if the kernel is an RBF with one for all coordinates of the image."""
        if not isinstance(self.kernel, RBF):
            return None
        length = self.kernel.lengthscale
        return None if length.ndim else length

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, periods={self.periods})"


def _placed(value: Tensor, axis: int, d: int) -> Tensor:
    """``(..., d)`` with a value at one axis and zeros elsewhere."""
    zeros = torch.zeros_like(value)
    return torch.stack([value if a == axis else zeros for a in range(d)], -1)
