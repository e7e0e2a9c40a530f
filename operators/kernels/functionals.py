"""`Functionals`: linear functionals of a function, as coefficients of its derivatives at points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from operators.tracing import readable

Coefficient = float | int | Tensor


@dataclass(frozen=True, eq=False)
class Functionals:
    """``L_i u = v_i u(x_i) + g_i . grad u(x_i) + c_i Lap u(x_i) + sum_ab H_i,ab d_a d_b u(x_i)``.

    A differential operator with coefficient fields, at n points. Functionals at the same points
    combine by ``+``, ``-`` and multiplication with a number or a field ``(n,)``; what is absent
    (None) costs nothing in a Gram matrix.

    Parameters
    ----------
    points
        ``(n, d)``; with leading axes a batch of such sets.
    value, laplacian
        ``v`` and ``c``, ``(n,)``, or None for zeros.
    gradient
        ``g``, ``(n, d)``, or None.
    hessian
        ``H``, ``(n, d, d)``, or None; only its symmetric part acts.
    entries
        Pairs ``(a, b)``, a <= b, outside of which H is known to be zero; None for all. What is left
        out costs nothing.
    axes
        Axes outside of which g is known to be zero; None for all.

    Raises
    ------
    ValueError
        A shape does not fit, points are not finite, `entries` holds what is no such pair, or `axes`
        what is no axis.
    TypeError
        Points are no floating tensor, or a coefficient has another dtype or device.

    Examples
    --------
    >>> import torch, operators as ops
    >>> x = torch.rand(5, 2, dtype=torch.float64)
    >>> L = -ops.Functionals.laplacian_at(x) + 3 * ops.Functionals.value_at(x)
    >>> L
    Functionals(5 at points of dimension 2: value, laplacian)
    """

    points: Tensor
    value: Tensor | None = None
    gradient: Tensor | None = None
    laplacian: Tensor | None = None
    hessian: Tensor | None = None
    entries: tuple[tuple[int, int], ...] | None = None
    axes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        x = self.points
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"points is {got}; expected a floating tensor (n, d)")
        if x.ndim < 2 or x.shape[-1] == 0:
            raise ValueError(f"points has shape {tuple(x.shape)}; expected (n, d)")
        if readable(x) and not bool(torch.isfinite(x).all()):
            raise ValueError("points are not finite")
        d = x.shape[-1]
        for a, b in self.entries or ():
            if not 0 <= a <= b < d:
                raise ValueError(
                    f"entries holds ({a}, {b}); expected pairs of axes (a, b) with a <= b, from 0 "
                    f"to {d - 1}"
                )
        for a in self.axes or ():
            if not 0 <= a < d:
                raise ValueError(f"axes holds {a}; expected axes from 0 to {d - 1}")
        for name, tail in _TAILS.items():
            coefficient = getattr(self, name)
            if coefficient is None:
                continue
            expected = (*x.shape[:-1], *(d,) * tail)
            if coefficient.shape != expected:
                raise ValueError(
                    f"{name} has shape {tuple(coefficient.shape)}; expected {expected} for points "
                    f"{tuple(x.shape)}"
                )
            if coefficient.dtype != x.dtype or coefficient.device != x.device:
                raise TypeError(
                    f"{name} is {coefficient.dtype} on {coefficient.device}; points are {x.dtype} "
                    f"on {x.device}"
                )

    # --- the elementary ones ------------------------------------------------------------------

    @classmethod
    def value_at(cls, points: Tensor) -> Functionals:
        """``u(x_i)``."""
        return cls(points, value=_ones(points))

    @classmethod
    def gradient_at(cls, points: Tensor, axis: int) -> Functionals:
        """``d_axis u(x_i)``."""
        axis = _axis(axis, points)
        gradient = torch.zeros_like(points)
        gradient[..., axis] = 1.0
        return cls(points, gradient=gradient, axes=(axis,))

    @classmethod
    def laplacian_at(cls, points: Tensor) -> Functionals:
        """``Lap u(x_i)``, over all coordinates."""
        return cls(points, laplacian=_ones(points))

    @classmethod
    def second_at(cls, points: Tensor, a: int, b: int) -> Functionals:
        """``d_a d_b u(x_i)``."""
        d = points.shape[-1]
        a, b = _axis(a, points), _axis(b, points)
        unit = torch.zeros(d, d, dtype=points.dtype, device=points.device)
        unit[a, b] += 0.5
        unit[b, a] += 0.5
        hessian = unit.expand(*points.shape[:-1], d, d).clone()
        return cls(points, hessian=hessian, entries=((min(a, b), max(a, b)),))

    # --- what they are ------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.points.shape[-2]

    @property
    def dimension(self) -> int:
        """Of the points."""
        return self.points.shape[-1]

    @property
    def order(self) -> int:
        """Highest derivative that may have a coefficient: 0, 1 or 2."""
        if self.laplacian is not None or self.hessian is not None:
            return 2
        return 0 if self.gradient is None else 1

    @property
    def slopes(self) -> tuple[int, ...]:
        """Axes whose first derivative may have a coefficient."""
        if self.gradient is None:
            return ()
        return tuple(range(self.dimension)) if self.axes is None else tuple(sorted(set(self.axes)))

    @property
    def couplings(self) -> tuple[tuple[int, int], ...]:
        """Pairs ``(a, b)``, a <= b, whose second derivative may have a coefficient."""
        d, found = self.dimension, set()
        if self.laplacian is not None:
            found |= {(a, a) for a in range(d)}
        if self.hessian is not None:
            whole = ((a, b) for a in range(d) for b in range(a, d))
            found |= set(whole if self.entries is None else self.entries)
        return tuple(sorted(found))

    def second(self) -> Tensor | None:
        """All second-order coefficients as one field ``(n, d, d)``, symmetric; None for none."""
        parts = []
        if self.hessian is not None:
            parts.append((self.hessian + self.hessian.mT) / 2)
        if self.laplacian is not None:
            eye = torch.eye(self.dimension, dtype=self.points.dtype, device=self.points.device)
            parts.append(self.laplacian[..., None, None] * eye)
        return sum(parts[1:], parts[0]) if parts else None

    def __repr__(self) -> str:
        names = ", ".join(name for name in _TAILS if getattr(self, name) is not None)
        return f"Functionals({len(self)} at points of dimension {self.dimension}: {names or '0'})"

    def __getitem__(self, rows: Any) -> Functionals:
        """Some of them, by a slice, a mask or an index tensor (whose axes come first)."""
        return pytree.tree_map(lambda leaf: leaf[rows], self)

    # --- algebra ------------------------------------------------------------------------------

    def __add__(self, other: Functionals) -> Functionals:
        if not isinstance(other, Functionals):
            return NotImplemented
        if other.points is not self.points and (
            other.points.shape != self.points.shape or not bool((other.points == self.points).all())
        ):
            raise ValueError(
                "a sum of functionals at other points; expected the same points (functionals at "
                "other points are further rows: hand a list of both to gram)"
            )
        parts = {name: _added(getattr(self, name), getattr(other, name)) for name in _TAILS}
        return Functionals(
            self.points, **parts, entries=_union_of_entries(self, other), axes=_union(self, other)
        )

    def __mul__(self, factor: Coefficient) -> Functionals:
        if not isinstance(factor, (int, float, Tensor)):
            return NotImplemented
        if isinstance(factor, Tensor) and factor.shape not in (
            torch.Size([]), self.points.shape[:-1],
        ):  # fmt: skip
            raise ValueError(
                f"factor has shape {tuple(factor.shape)}; expected a number or one for each of "
                f"{len(self)} functionals"
            )

        def scaled(coefficient: Tensor | None, tail: int) -> Tensor | None:
            if coefficient is None:
                return None
            if isinstance(factor, Tensor) and factor.ndim:
                return factor.reshape(*factor.shape, *(1,) * tail) * coefficient
            return factor * coefficient

        parts = {name: scaled(getattr(self, name), tail) for name, tail in _TAILS.items()}
        return Functionals(self.points, **parts, entries=self.entries, axes=self.axes)

    __rmul__ = __mul__

    def __neg__(self) -> Functionals:
        return self * -1.0

    def __sub__(self, other: Functionals) -> Functionals:
        return self + (-other)

    def __truediv__(self, divisor: Coefficient) -> Functionals:
        return self * (1 / divisor)


# Coefficients and how many axes of length d each has.
_TAILS = {"value": 0, "gradient": 1, "laplacian": 0, "hessian": 2}


def _flatten(functionals: Functionals) -> tuple[list[Any], Any]:
    # To torch's trees None is a leaf; what is absent is none here.
    names = tuple(n for n in ("points", *_TAILS) if getattr(functionals, n) is not None)
    known_zero = (functionals.entries, functionals.axes)
    return [getattr(functionals, name) for name in names], (names, known_zero)


def _unflatten(leaves: Any, context: Any) -> Functionals:
    functionals = object.__new__(Functionals)
    names, (entries, axes) = context
    held = dict(zip(names, leaves, strict=True))
    for name in ("points", *_TAILS):
        object.__setattr__(functionals, name, held.get(name))
    object.__setattr__(functionals, "entries", entries)
    object.__setattr__(functionals, "axes", axes)
    return functionals


pytree.register_pytree_node(Functionals, _flatten, _unflatten)


def _ones(points: Tensor) -> Tensor:
    return points.new_ones(points.shape[:-1])


def _axis(axis: int, points: Tensor) -> int:
    d = points.shape[-1]
    if not -d <= axis < d:
        raise ValueError(f"axis {axis} of points of dimension {d}; expected 0 to {d - 1}")
    return axis % d


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _union(L: Functionals, M: Functionals) -> tuple[int, ...] | None:
    """Axes of a sum."""
    if L.gradient is None or M.gradient is None:
        return M.axes if L.gradient is None else L.axes
    return None if L.axes is None or M.axes is None else tuple(sorted({*L.axes, *M.axes}))


def _union_of_entries(L: Functionals, M: Functionals) -> tuple[tuple[int, int], ...] | None:
    """Entries of a sum."""
    if L.hessian is None or M.hessian is None:
        return M.entries if L.hessian is None else L.entries
    if L.entries is None or M.entries is None:
        return None
    return tuple(sorted({*L.entries, *M.entries}))
