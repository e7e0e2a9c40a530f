"""A function near a point: its values, random directions, and what differences say along them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperlearn.checks.differences import Sweep, sweep, value_noise
from hyperlearn.checks.report import CheckRow
from operators import Space

Tree = Any
Function = Callable[[Tree], Tensor]


@dataclass(frozen=True)
class Settings:
    """What to ask of a check: number and seed of the directions, and the relative tolerance."""

    directions: int
    seed: int
    rtol: float


class Point:
    """A function near a point: its values, directions, and what differences say along them.

    Parameters
    ----------
    function
        Of a tree.
    x
        The point, in the dtype in which to compute.
    settings
        Of the check.
    """

    def __init__(self, function: Function, x: Tree, settings: Settings) -> None:
        self.function, self.space = function, Space.of(x, "x")
        self.flat = self.space.ravel(x)
        self.scale = entry_scales(self.space.unravel(self.flat))
        value = self._first_value()
        self.epsilon = max(torch.finfo(dtype).eps for dtype in (self.space.dtype, value.dtype))
        self.rtol = max(settings.rtol, 100 * self.epsilon ** (2 / 3))
        self.value = float(value)
        self.change = abs(float(self._at(self.flat)) - self.value)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.directions = [self.random_direction() for _ in range(settings.directions)]
        self.noise = max(self.change, value_noise(self.along(self.directions[0]), self.epsilon))
        self.sweeps = [sweep(self.along(v), self.noise, self.epsilon) for v in self.directions]
        # |s * gradient|, once a gradient is known
        self.slope_size = 0.0

    @property
    def x(self) -> Tree:
        """The point, as a fresh tree: in-place changes of one use do not reach the next."""
        return self.space.unravel(self.flat.clone())

    def random_direction(self) -> Tensor:
        """``v_i = +-[0.5, 1.5] s_i``: no entry is left out, and equal entries do not cancel."""
        draws = torch.rand((2, self.space.size), generator=self.generator, dtype=torch.float64)
        signs = torch.where(draws[0] < 0.5, -1.0, 1.0)
        return self.scale * (signs * (0.5 + draws[1])).to(self.scale)

    def along(self, v: Tensor) -> Callable[[float], float]:
        """``t -> f(x + t v)``; NaN where f has no value."""

        def phi(t: float) -> float:
            try:
                return float(self._at(self.flat + t * v))
            except (RuntimeError, ValueError, ArithmeticError):
                return math.nan  # outside the domain of f, or of its inner solver

        return phi

    def slopes(self, gradient: Tensor) -> list[float]:
        """``<gradient, v>`` along each direction."""
        return [float(gradient @ v) for v in self.directions]

    def learn_gradient(self, gradient: Tensor) -> None:
        """Let errors be relative to the size of a gradient."""
        size = float((self.scale * gradient).norm())
        if math.isfinite(size):
            self.slope_size = max(self.slope_size, size)

    def compare(
        self, check: str, slopes: Iterable[float], slack: float = 0.0
    ) -> Iterator[CheckRow]:
        """A row a direction: a slope against the differences.

        `slack` is an error per unit of ``|v|`` that is allowed on top.
        """
        for i, (slope, found) in enumerate(zip(slopes, self.sweeps, strict=True)):
            allowed = slack * float(self.directions[i].norm())
            yield self._judge(CheckRow(check, i, None, None, "noisy"), slope, found, allowed)

    def identity(
        self, check: str, first: Iterable[float], second: Iterable[float]
    ) -> Iterator[CheckRow]:
        """A row a direction: two slopes that have to be the same number.

        Noise in the values is in the derivatives as well, and is allowed for.
        """
        pairs = zip(first, second, self.sweeps, strict=True)
        for i, (left, right, found) in enumerate(pairs):
            size, error = self._size(left, found), abs(left - right)
            blur = found.best.uncertainty if found.best else 0.0
            yield CheckRow(
                check,
                i,
                ratio(error, size),
                ratio(self.rtol * size + blur, size),
                # NaN is no agreement
                "passed" if error <= self.rtol * size + blur else "failed",
                f"{left:.6g} against {right:.6g}",
            )

    @property
    def size(self) -> float:
        """Of a directional derivative, over all directions."""
        return max(self._size(0.0, found) for found in self.sweeps)

    @property
    def resolution(self) -> float:
        """Worst relative uncertainty of the differences over the directions."""
        return max(
            ratio(found.best.uncertainty, self._size(0.0, found)) if found.best else math.inf
            for found in self.sweeps
        )

    def notes(self) -> Iterator[str]:
        """What the values themselves show."""
        if all(found.flat for found in self.sweeps):
            yield "the value does not change with x anywhere near it; is x used at all?"
        if self.change > 0:
            yield (
                f"two calls at the same x differ by {self.change:.1e}: it draws random numbers, or "
                "starts from where it stopped before"
            )
        yield f"the value is {self.value:.6g}, with noise of {self.noise:.1e}"

    def _judge(self, row: CheckRow, slope: float, found: Sweep, allowed: float) -> CheckRow:
        best, size = found.best, self._size(slope, found)
        if not math.isfinite(slope):
            return dataclasses.replace(row, verdict="failed", detail=f"the derivative is {slope}")
        if best is None:
            text = "there are no values at x + h v for any h, or they are not finite"
            return dataclasses.replace(row, detail=text)
        error = abs(slope - best.slope)
        tolerance = self.rtol * size + best.uncertainty + allowed
        row = dataclasses.replace(row, error=ratio(error, size), tolerance=ratio(tolerance, size))
        seen = f"{slope:.8g}, differences {best.slope:.8g} +- {best.uncertainty:.1e}"
        seen += f" at steps around {best.step:.0e}"
        if found.flat and slope == 0:
            text = "zero, and the value does not change"
            return dataclasses.replace(row, tolerance=None, verdict="passed", detail=text)
        if best.kinked and best.bend > self.rtol * size:
            text = f"kink at x: the one-sided slopes differ by {best.bend:.3g}, at every step size"
            return dataclasses.replace(row, detail=text)
        if error <= tolerance:
            if best.uncertainty <= self.rtol * size:
                return dataclasses.replace(row, verdict="passed", detail=seen)
            text = f"{seen}: too wide to test a relative error of {self.rtol:.1e}"
            return dataclasses.replace(row, detail=text)
        if rival := found.rival(slope):
            text = (
                f"{seen}, but {rival.slope:.8g} +- {rival.uncertainty:.1e} around {rival.step:.0e}"
            )
            return dataclasses.replace(row, detail=f"{text}: the values jump in between")
        return dataclasses.replace(row, verdict="failed", detail=seen)

    def _size(self, slope: float, found: Sweep) -> float:
        """What an error along one direction is relative to."""
        sizes = [self.slope_size]
        if math.isfinite(slope):
            sizes.append(abs(slope))
        if found.best is not None:
            sizes.append(abs(found.best.slope))
            if not found.best.kinked:
                sizes.append(found.best.bend)
            # A slope this small is below the rounding of the values: zero is all that can be said.
            if max(sizes) <= found.best.uncertainty <= math.sqrt(self.epsilon) * abs(self.value):
                return abs(self.value)
        return max(sizes)

    def _first_value(self) -> Tensor:
        """``f(x)``, with everything that can be wrong about it told by name."""
        x = self.x
        value = self.function(x)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the function returned a {type(value).__name__}; expected a scalar tensor, "
                "computed by torch from x"
            )
        if value.ndim != 0:
            raise ValueError(
                f"the function returned a tensor of shape {tuple(value.shape)}; expected a scalar: "
                "sum it, or take its product with fixed weights"
            )
        if not value.is_floating_point():
            raise TypeError(f"the function returned {value.dtype}; expected a floating dtype")
        value = value.detach()
        if not torch.equal(self.space.ravel(x), self.flat):
            raise ValueError(
                "the function changed its argument x in place; expected x untouched: clone it "
                "before you write into it"
            )
        if not math.isfinite(float(value)):
            raise ValueError(f"the function is {float(value)} at x; expected a finite number there")
        return value

    def _at(self, flat: Tensor) -> Tensor:
        return self.function(self.space.unravel(flat)).detach()


def in_double(function: Function, x: Tree, settings: Settings) -> tuple[Point, CheckRow | None]:
    """The function near x in float64; or, where it refuses that, in x's own dtype, and a row."""
    if Space.of(x).dtype == torch.float64:
        return Point(function, x, settings), None
    try:
        return Point(function, cast(x, torch.float64), settings), None
    except (RuntimeError, TypeError, ValueError) as error:
        # What is wrong in every dtype is raised by this:
        point = Point(function, x, settings)
        return point, refused("float64", error)


def validated(x: Tree) -> Tree:
    """The same values without a graph; raises what is wrong with them."""
    space = Space.of(x, "x")
    if space.size == 0:
        raise ValueError("x has no entries; expected at least one")
    flat = space.ravel(x).detach()
    if not bool(torch.isfinite(flat).all()):
        count = int((~torch.isfinite(flat)).sum())
        raise ValueError(f"x holds {count} NaN or infinite entries; expected finite numbers")
    return space.unravel(flat)


def entry_scales(x: Tree) -> Tensor:
    """``|x_i|``, flat; for zeros the geometric mean over their tensor of what is not zero, or 1."""
    scales = []
    for leaf in pytree.tree_leaves(x):
        size = leaf.detach().abs().reshape(-1)
        nonzero = size[size > 0]
        typical = nonzero.log().mean().exp() if len(nonzero) else size.new_ones(())
        scales.append(torch.where(size > 0, size, typical))
    return torch.cat(scales)


def cast(tree: Tree, dtype: torch.dtype) -> Tree:
    """Floating tensors in another dtype; labels and indices as they are."""
    return pytree.tree_map(
        lambda leaf: (
            leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        ),
        tree,
    )


def ratio(part: float, whole: float) -> float:
    """``part / whole``, where nothing of nothing is nothing."""
    return part / whole if whole > 0 else 0.0 if part == 0 else math.inf


def refused(check: str, error: Exception) -> CheckRow:
    """The row of a check that raised."""
    message = str(error).strip().split("\n")[0]
    return CheckRow(check, None, None, None, "refused", f"{type(error).__name__}: {message[:300]}")
