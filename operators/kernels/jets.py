"""Values, first and second derivatives of a function at many points at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from operators.curvature.module import FunctionalModule, functional


class Field:
    """A function of points, row by row, with its parameters: a pytree of these.

    Parameters
    ----------
    function
        ``f(parameters, x)`` with x ``(..., n, d)``.
    parameters
        A dictionary of tensors.
    """

    def __init__(self, function: Callable[..., Tensor], parameters: dict[str, Tensor]) -> None:
        self.function, self.parameters = function, parameters

    @classmethod
    def of(cls, given: Any, name: str) -> Field:
        """A module with its parameters, or a plain function ``f(x)`` without any.

        Raises
        ------
        TypeError
            It is neither.
        """
        if isinstance(given, Field):
            return given
        if isinstance(given, nn.Module):
            return cls(*functional(given))
        if callable(given):
            return cls(_Plain(given), {})
        raise TypeError(f"{name} is a {type(given).__name__}; expected a function or nn.Module")

    def __call__(self, x: Any) -> Any:
        """Values at points."""
        return self.function(self.parameters, x)

    def __repr__(self) -> str:
        inside = getattr(self.function, "given", self.function)
        inside = inside.module if isinstance(inside, FunctionalModule) else inside
        name = getattr(inside, "__name__", None) or type(inside).__name__
        count = sum(tensor.numel() for tensor in self.parameters.values())
        return f"{name} of {count} parameters" if count else str(name)


class _Plain:
    """``f(x)`` as ``f(parameters, x)``."""

    def __init__(self, given: Callable[[Tensor], Tensor]) -> None:
        self.given = given

    def __call__(self, parameters: dict[str, Tensor], x: Any) -> Any:
        return self.given(x)


pytree.register_pytree_node(
    Field,
    lambda field: ([field.parameters], field.function),
    lambda leaves, function: Field(function, next(iter(leaves))),
)

Jets = tuple[Tensor, Tensor | None, Tensor | None]


def jets(field: Callable[[Any], Any], x: Tensor, order: int) -> Jets:
    """``f``, its Jacobian and its Hessian at each point.

    By Taylor arithmetic (`Jet`) where the function consists of the usual layers: ``1 + d + d (d +
    1) / 2`` evaluations' worth of linear algebra, once, in one sweep. By nested forward mode of
    torch.func otherwise.

    Parameters
    ----------
    field
        Function of points ``(..., n, d)``, row by row, to ``(..., n, m)``.
    x
        Points.
    order
        0, 1 or 2: what is asked for; the rest is None.

    Returns
    -------
    tuple
        ``(..., n, m)``, ``(..., n, m, d)``, ``(..., n, m, d, d)``.

    Raises
    ------
    ValueError
        The values have another number of rows than the points.
    """
    if order == 0:
        return _values(field(x), x), None, None
    try:
        image = field(Jet.at(x, order))
    except (NotImplementedError, TypeError, AttributeError):
        # What `Jet` cannot do (comparisons, in-place), tensors may; or they say what is wrong.
        return _nested(field, x, order)
    if not isinstance(image, Jet):
        return _nested(field, x, order)
    _values(image.value, x)
    d = x.shape[-1]
    first = image.parts[1 : 1 + d].movedim(0, -1)
    if order == 1:
        return image.value, first, None
    second = image.parts[1 + d :].movedim(0, -1)
    return image.value, first, second[..., square_of_pairs(d).to(x.device)]


def _values(values: Any, x: Tensor) -> Tensor:
    if not isinstance(values, Tensor) or values.shape[:-1] != x.shape[:-1]:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"a function of points {tuple(x.shape)} returned {got}; expected "
            f"({', '.join(map(str, x.shape[:-1]))}, m): one row for each point"
        )
    return values


def _nested(field: Callable[[Any], Any], x: Tensor, order: int) -> Jets:
    """By forward mode along unit vectors, twice for second derivatives."""
    d = x.shape[-1]
    units = [torch.eye(d, dtype=x.dtype, device=x.device)[a].expand_as(x) for a in range(d)]

    def along(f: Callable[[Tensor], Tensor], unit: Tensor, z: Tensor) -> Tensor:
        return torch.func.jvp(f, (z,), (unit,))[1]

    value = _values(field(x), x)
    slopes = [partial(along, field, unit) for unit in units]
    first = torch.stack([slope(x) for slope in slopes], -1)
    if order == 1:
        return value, first, None
    rows = [[along(slopes[a], units[b], x) for b in range(a + 1)] for a in range(d)]
    full = [[rows[max(a, b)][min(a, b)] for b in range(d)] for a in range(d)]
    return value, first, torch.stack([torch.stack(row, -1) for row in full], -2)


def square_of_pairs(d: int) -> Tensor:
    """Where ``d_a d_b f`` stands among the pairs a <= b."""
    index = torch.zeros(d, d, dtype=torch.long)
    for k, (a, b) in enumerate(axis_pairs(d)):
        index[a, b] = index[b, a] = k
    return index


def axis_pairs(d: int) -> list[tuple[int, int]]:
    """``(a, b)`` with a <= b."""
    return [(a, b) for a in range(d) for b in range(a, d)]


class Jet:
    """A function's value and its derivatives up to the first or second order, at many points.

    `parts`, ``(p, ...)``: value, d first derivatives, then ``d_a d_b`` for a <= b. Functions of
    torch act on it by the chain rule; those that are not known raise `NotImplementedError`.
    """

    def __init__(self, parts: Tensor, d: int) -> None:
        self.parts, self.d = parts, d

    @classmethod
    def at(cls, x: Tensor, order: int) -> Jet:
        """The coordinates themselves."""
        d = x.shape[-1]
        eye = torch.eye(d, dtype=x.dtype, device=x.device)
        first = eye.reshape(d, *(1,) * (x.ndim - 1), d).expand(d, *x.shape)
        parts = [x[None], first]
        if order == 2:
            parts.append(torch.zeros(len(axis_pairs(d)), *x.shape, dtype=x.dtype, device=x.device))
        return cls(torch.cat(parts), d)

    @property
    def value(self) -> Tensor:
        """Without derivatives."""
        return self.parts[0]

    @property
    def shape(self) -> torch.Size:
        """Of the value."""
        return self.parts.shape[1:]

    @property
    def ndim(self) -> int:
        """Of the value."""
        return self.parts.ndim - 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the value."""
        return self.parts.dtype

    @property
    def device(self) -> torch.device:
        """Of the value."""
        return self.parts.device

    def through(self, h: Tensor, h1: Tensor, h2: Tensor) -> Jet:
        """``h(f)``, from ``h``, ``h'`` and ``h''`` at the value: ``h' f_ab + h'' f_a f_b``."""
        d, rest = self.d, h1 * self.parts[1:]
        if len(self.parts) > 1 + d:
            first = self.parts[1 : 1 + d]
            a, b = zip(*axis_pairs(d), strict=True)
            rest = torch.cat([rest[:d], rest[d:] + h2 * first[list(a)] * first[list(b)]])
        return Jet(torch.cat([h[None], rest]), d)

    def times(self, other: Jet) -> Jet:
        """``f g``, by Leibniz' rule."""
        d, ndim = self.d, max(self.ndim, other.ndim)
        f, g = _aligned(self.parts, ndim), _aligned(other.parts, ndim)
        parts = f * g[:1] + f[:1] * g
        rest = [f[:1] * g[:1], parts[1:]]
        if len(f) > 1 + d:
            a, b = (list(index) for index in zip(*axis_pairs(d), strict=True))
            f1, g1 = f[1 : 1 + d], g[1 : 1 + d]
            rest = [rest[0], parts[1 : 1 + d], parts[1 + d :] + f1[a] * g1[b] + f1[b] * g1[a]]
        return Jet(torch.cat(rest), d)

    def reciprocal(self) -> Jet:
        """``1 / f``."""
        y = 1 / self.value
        return self.through(y, -(y**2), 2 * y**3)

    def linear(self, function: Callable[[Tensor], Tensor]) -> Jet:
        """A linear function that leaves the axis of the parts alone."""
        return Jet(function(self.parts), self.d)

    def shifted(self, constant: Any) -> Jet:
        """``f + c``."""
        value = (self.value + constant)[None]
        rest = _aligned(self.parts[1:], value.ndim - 1).expand(-1, *value.shape[1:])
        return Jet(torch.cat([value, rest]), self.d)

    # --- as torch sees it ---------------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        rule = _RULES.get(function)
        if rule is None:
            raise NotImplementedError(f"no rule for {getattr(function, '__name__', function)}")
        return rule(*args, **(kwargs or {}))

    def __add__(self, other: Any) -> Jet:
        return _add(self, other)

    __radd__ = __add__

    def __neg__(self) -> Jet:
        return Jet(-self.parts, self.d)

    def __sub__(self, other: Any) -> Jet:
        return _add(self, -other)

    def __rsub__(self, other: Any) -> Jet:
        return _add(-self, other)

    def __mul__(self, other: Any) -> Jet:
        return _mul(self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Jet:
        return _mul(self, other.reciprocal() if isinstance(other, Jet) else 1 / other)

    def __rtruediv__(self, other: Any) -> Jet:
        return _mul(self.reciprocal(), other)

    def __pow__(self, exponent: Any) -> Jet:
        return _pow(self, exponent)

    # Else Python would answer from the identity of the objects.
    def __eq__(self, other: object) -> bool:
        raise NotImplementedError("no rule for comparisons")

    def __bool__(self) -> bool:
        raise NotImplementedError("no rule for truth")

    __hash__ = object.__hash__

    def __matmul__(self, matrix: Tensor) -> Jet:
        return self.linear(lambda parts: parts @ matrix)

    def __getitem__(self, index: Any) -> Jet:
        index = index if isinstance(index, tuple) else (index,)
        return self.linear(lambda parts: parts[(slice(None), *index)])

    def __getattr__(self, name: str) -> Any:
        # Methods of tensors: x.exp(), x.sum(-1), x.square(), ...
        function = getattr(Tensor, name, None)
        if function is None or function not in _RULES:
            raise NotImplementedError(f"no rule for the method {name}")
        return partial(_RULES[function], self)


def _aligned(parts: Tensor, ndim: int) -> Tensor:
    """With new axes before those of the value, as broadcasting with `ndim` axes adds them."""
    count, *shape = parts.shape
    return parts.reshape(count, *(1,) * (ndim - len(shape)), *shape)


def _axis(dim: int) -> int:
    """An axis of the value as one of the parts."""
    return dim if dim < 0 else dim + 1


def _add(a: Any, b: Any, *, alpha: float = 1.0) -> Jet:
    b = b * alpha if alpha != 1 else b
    if isinstance(a, Jet) and isinstance(b, Jet):
        ndim = max(a.ndim, b.ndim)
        return Jet(_aligned(a.parts, ndim) + _aligned(b.parts, ndim), a.d)
    return a.shifted(b) if isinstance(a, Jet) else b.shifted(a)


def _mul(a: Any, b: Any) -> Jet:
    if isinstance(a, Jet) and isinstance(b, Jet):
        return a.times(b)
    jet, factor = (a, b) if isinstance(a, Jet) else (b, a)
    ndim = max(jet.ndim, factor.ndim if isinstance(factor, Tensor) else 0)
    return Jet(_aligned(jet.parts, ndim) * factor, jet.d)


def _div(a: Any, b: Any) -> Jet:
    return _mul(a, b.reciprocal() if isinstance(b, Jet) else 1 / b)


def _pow(x: Any, p: Any) -> Jet:
    if not isinstance(x, Jet) or not isinstance(p, (int, float)):
        raise NotImplementedError("powers of jets have constant exponents")
    v = x.value
    if p in (0, 1):  # where the formula has a negative power
        return x.linear(torch.clone) if p == 1 else x.through(v**0, 0 * v, 0 * v)
    if p == 2:
        return x.times(x)
    return x.through(v**p, p * v ** (p - 1), p * (p - 1) * v ** (p - 2))


def _linear(x: Any, weight: Any, bias: Any = None) -> Jet:
    if not isinstance(x, Jet) or isinstance(weight, Jet):
        raise NotImplementedError("a layer whose weights are jets")
    image = x.linear(lambda parts: parts @ weight.mT)
    return image if bias is None else image.shifted(bias)


def _tanh(x: Jet) -> Jet:
    y = x.value.tanh()
    slope = 1 - y**2
    return x.through(y, slope, -2 * y * slope)


def _sigmoid(x: Jet) -> Jet:
    y = x.value.sigmoid()
    slope = y * (1 - y)
    return x.through(y, slope, slope * (1 - 2 * y))


def _softplus(x: Jet, beta: float = 1.0, threshold: float = 20.0) -> Jet:
    v = x.value
    y = (beta * v).sigmoid()
    return x.through(F.softplus(v, beta, threshold), y, beta * y * (1 - y))


def _silu(x: Jet, inplace: bool = False) -> Jet:
    return x.times(_sigmoid(x))


def _exp(x: Jet) -> Jet:
    y = x.value.exp()
    return x.through(y, y, y)


def _log(x: Jet) -> Jet:
    y = 1 / x.value
    return x.through(x.value.log(), y, -(y**2))


def _sin(x: Jet) -> Jet:
    sin, cos = x.value.sin(), x.value.cos()
    return x.through(sin, cos, -sin)


def _cos(x: Jet) -> Jet:
    sin, cos = x.value.sin(), x.value.cos()
    return x.through(cos, -sin, -cos)


def _sqrt(x: Jet) -> Jet:
    return _pow(x, 0.5)


def _square_of(x: Jet) -> Jet:
    return x.times(x)


def _sum(x: Jet, dim: Any = None, keepdim: bool = False) -> Jet:
    if not isinstance(dim, int):
        raise NotImplementedError("a sum over one axis")
    return x.linear(lambda parts: parts.sum(_axis(dim), keepdim))


def _like(x: Any, template: Jet) -> Jet:
    """A plain tensor as a jet: its derivatives are zero."""
    if isinstance(x, Jet):
        return x
    zeros = torch.zeros(len(template.parts) - 1, *x.shape, dtype=x.dtype, device=x.device)
    return Jet(torch.cat([x[None], zeros]), template.d)


def _joined(join: Any, pieces: Any, dim: int = 0) -> Jet:
    template = next(piece for piece in pieces if isinstance(piece, Jet))
    return Jet(join([_like(piece, template).parts for piece in pieces], _axis(dim)), template.d)


def _unsqueeze(x: Jet, dim: int) -> Jet:
    return x.linear(lambda parts: parts.unsqueeze(_axis(dim)))


def _squeeze(x: Jet, dim: int) -> Jet:
    return x.linear(lambda parts: parts.squeeze(_axis(dim)))


_RULES: dict[Any, Any] = {
    F.linear: _linear,
    F.softplus: _softplus,
    F.silu: _silu,
    F.tanh: _tanh,
    F.sigmoid: _sigmoid,
    torch.cat: partial(_joined, torch.cat),
    torch.stack: partial(_joined, torch.stack),
    torch.matmul: lambda x, matrix: x @ matrix,
    Tensor.matmul: lambda x, matrix: x @ matrix,
    Tensor.__add__: _add,
    Tensor.__radd__: _add,
    Tensor.__mul__: _mul,
    Tensor.__rmul__: _mul,
    Tensor.__sub__: lambda a, b: _add(a, -b),
    Tensor.__rsub__: lambda a, b: _add(-a, b),
    Tensor.__truediv__: _div,
    Tensor.__rtruediv__: lambda a, b: _div(b, a),
}
for _name, _rule in {
    "add": _add,
    "sub": lambda a, b: _add(a, -b),
    "mul": _mul,
    "div": _div,
    "neg": lambda x: -x,
    "pow": _pow,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "exp": _exp,
    "log": _log,
    "sin": _sin,
    "cos": _cos,
    "sqrt": _sqrt,
    "square": _square_of,
    "reciprocal": lambda x: x.reciprocal(),
    "sum": _sum,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
}.items():
    _RULES[getattr(torch, _name)] = _RULES[getattr(Tensor, _name)] = _rule
