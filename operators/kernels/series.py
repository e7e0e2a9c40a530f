"""Truncated power series: derivatives of a function of one variable, in one sweep."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def derivatives(f: Callable[[Any], Any], s: Tensor, order: int) -> list[Tensor]:
    """``f(s), f'(s), ..., f^(order)(s)``, elementwise.

    By Taylor arithmetic, ``order^2 / 2`` products for each operation, where f consists of functions
    that are known to `Series`; otherwise by reverse mode, nested, which takes ``2^order``.

    Raises
    ------
    ValueError
        f does not act elementwise: the shape of the result is another.
    """
    try:
        image = f(Series([s, torch.ones_like(s)] + [torch.zeros_like(s)] * (order - 1), order))
    except (NotImplementedError, TypeError, AttributeError):
        # What `Series` cannot do (comparisons, indices), tensors may; or they say what is wrong.
        return _nested(f, s, order)
    if isinstance(image, (int, float, Tensor)):
        image = Series([torch.as_tensor(image, dtype=s.dtype, device=s.device)], order)
    if not isinstance(image, Series) or not all(_fits(c, s) for c in image.terms):
        got = tuple(image.terms[0].shape) if isinstance(image, Series) else type(image).__name__
        raise ValueError(f"a profile of s {tuple(s.shape)} returned {got}; expected the same shape")
    found = [c.expand_as(s) * math.factorial(k) for k, c in enumerate(image.terms)]
    return found + [torch.zeros_like(s)] * (order + 1 - len(found))


def _fits(c: Tensor, s: Tensor) -> bool:
    """Whether c expands to the shape of s."""
    tail = s.shape[s.ndim - c.ndim :]
    return c.ndim <= s.ndim and all(a in (1, b) for a, b in zip(c.shape, tail, strict=True))


def _nested(f: Callable[[Any], Any], s: Tensor, order: int) -> list[Tensor]:
    def slope(g: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return torch.func.grad(lambda t: g(t).sum())

    found = [f(s)]
    if not isinstance(found[0], Tensor) or found[0].shape != s.shape:
        got = tuple(found[0].shape) if isinstance(found[0], Tensor) else type(found[0]).__name__
        raise ValueError(f"a profile of s {tuple(s.shape)} returned {got}; expected the same shape")
    for _ in range(order):
        f = slope(f)
        found.append(f(s))
    return found


class Series:
    """``sum_k c_k h^k`` to a given order, elementwise; functions of torch act on it.

    Those without a rule raise `NotImplementedError`.
    """

    def __init__(self, terms: list[Tensor], order: int) -> None:
        self.terms, self.order = terms[: order + 1], order

    def _of(self, other: Any) -> Series:
        if isinstance(other, Series):
            return other
        return Series([torch.as_tensor(other, dtype=self.terms[0].dtype)], self.order)

    def __add__(self, other: Any) -> Series:
        a, b = self.terms, self._of(other).terms
        longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
        terms = [x + y for x, y in zip(longer, shorter, strict=False)] + longer[len(shorter) :]
        return Series(terms, self.order)

    __radd__ = __add__

    def __neg__(self) -> Series:
        return Series([-c for c in self.terms], self.order)

    def __sub__(self, other: Any) -> Series:
        return self + (-self._of(other))

    def __rsub__(self, other: Any) -> Series:
        return -self + other

    def __mul__(self, other: Any) -> Series:
        a, b = self.terms, self._of(other).terms
        count = min(len(a) + len(b) - 1, self.order + 1)
        return Series([_convolved(a, b, k) for k in range(count)], self.order)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Series:
        return self * self._of(other) ** -1.0

    def __rtruediv__(self, other: Any) -> Series:
        return self**-1.0 * other

    def __pow__(self, exponent: Any) -> Series:
        """``y = u^p``, from ``u y' = p u' y``.

        ``k u_0 y_k = sum_{j>=1} (j p - (k - j)) u_j y_{k-j}``.
        """
        if isinstance(exponent, Series):
            return (exponent * self.log()).exp()
        if isinstance(exponent, (int, float)) and exponent >= 0 and exponent == int(exponent):
            return self._whole_power(int(exponent))
        u, y = self.terms, [self.terms[0] ** exponent]
        for k in range(1, self.order + 1):
            total = sum(
                (
                    (j * exponent - (k - j)) * (u[j] * y[k - j])
                    for j in range(1, min(k, len(u) - 1) + 1)
                ),
                torch.zeros_like(y[0]),
            )
            y.append(total / (k * u[0]))
        return Series(y, self.order)

    def __rpow__(self, base: Any) -> Series:
        return (self * torch.as_tensor(base, dtype=self.terms[0].dtype).log()).exp()

    def _whole_power(self, exponent: int) -> Series:
        """By products: nothing is divided by the value, which may be zero."""
        if exponent == 0:
            return self._of(1.0)
        half = self._whole_power(exponent // 2)
        return half * half * self if exponent % 2 else half * half

    # Else Python would answer from the identity of the objects.
    def __eq__(self, other: object) -> bool:
        raise NotImplementedError("no rule for comparisons")

    def __bool__(self) -> bool:
        raise NotImplementedError("no rule for truth")

    __hash__ = object.__hash__

    def exp(self) -> Series:
        """``k y_k = sum_j j u_j y_{k-j}``."""
        u, y = self.terms, [self.terms[0].exp()]
        for k in range(1, self.order + 1):
            y.append(_weighted(u, y, k) / k)
        return Series(y, self.order)

    def log(self) -> Series:
        """``u y' = u'``."""
        u = self.terms + [torch.zeros_like(self.terms[0])] * (self.order + 1 - len(self.terms))
        y = [u[0].log()]
        for k in range(1, self.order + 1):
            rest = sum((j * y[j] * u[k - j] for j in range(1, k)), torch.zeros_like(u[0]))
            y.append((u[k] - rest / k) / u[0])
        return Series(y, self.order)

    def sqrt(self) -> Series:
        """``u^(1/2)``."""
        return self**0.5

    def sincos(self) -> tuple[Series, Series]:
        """Both at once: each is the other's derivative."""
        u, sin, cos = self.terms, [self.terms[0].sin()], [self.terms[0].cos()]
        for k in range(1, self.order + 1):
            sin.append(_weighted(u, cos, k) / k)
            cos.append(-_weighted(u, sin, k) / k)
        return Series(sin, self.order), Series(cos, self.order)

    def sin(self) -> Series:
        """Sine."""
        return self.sincos()[0]

    def cos(self) -> Series:
        """Cosine."""
        return self.sincos()[1]

    def tanh(self) -> Series:
        """``y' = (1 - y^2) u'``."""
        return self._solved(self.terms[0].tanh(), lambda y: 1.0 - y * y)

    def sigmoid(self) -> Series:
        """``y' = y (1 - y) u'``."""
        return self._solved(self.terms[0].sigmoid(), lambda y: y * (1.0 - y))

    def _solved(self, start: Tensor, slope: Callable[[Series], Series]) -> Series:
        """``y' = slope(y) u'``, term by term: nothing overflows that the value does not."""
        y = [start]
        for k in range(1, self.order + 1):
            y.append(_weighted(self.terms, slope(Series(y, k - 1)).terms, k) / k)
        return Series(y, self.order)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        rule = _RULES.get(function)
        if rule is None or kwargs:
            raise NotImplementedError(f"no rule for {getattr(function, '__name__', function)}")
        return rule(*args)

    def __getattr__(self, name: str) -> Any:
        function = getattr(Tensor, name, None)
        if function is None or function not in _RULES:
            raise NotImplementedError(f"no rule for the method {name}")
        return partial(_RULES[function], self)


def _convolved(a: list[Tensor], b: list[Tensor], k: int) -> Tensor:
    """Term k of a product; one of those there is."""
    total: Tensor | None = None
    for i in range(max(0, k - len(b) + 1), min(k, len(a) - 1) + 1):
        term = a[i] * b[k - i]
        total = term if total is None else total + term
    assert total is not None
    return total


def _weighted(u: list[Tensor], y: list[Tensor], k: int) -> Tensor:
    """``sum_{j=1..k} j u_j y_{k-j}``."""
    return sum(
        (j * u[j] * y[k - j] for j in range(1, min(k, len(u) - 1) + 1)), torch.zeros_like(y[0])
    )


_RULES: dict[Any, Any] = {}
for _name, _rule in {
    "exp": Series.exp,
    "log": Series.log,
    "sqrt": Series.sqrt,
    "sin": Series.sin,
    "cos": Series.cos,
    "tanh": Series.tanh,
    "sigmoid": Series.sigmoid,
    "neg": lambda x: -x,
    "square": lambda x: x * x,
    "reciprocal": lambda x: 1 / x,
    "rsqrt": lambda x: x**-0.5,
    "add": lambda a, b: a + b if isinstance(a, Series) else b + a,
    "sub": lambda a, b: a - b if isinstance(a, Series) else -(b - a),
    "mul": lambda a, b: a * b if isinstance(a, Series) else b * a,
    "div": lambda a, b: a / b if isinstance(a, Series) else b**-1.0 * a,
    "pow": lambda a, b: a**b if isinstance(a, Series) else b.__rpow__(a),
}.items():
    _RULES[getattr(torch, _name)] = _RULES[getattr(Tensor, _name)] = _rule
for _name, _same in {
    "__add__": "add", "__radd__": "add", "__sub__": "sub", "__mul__": "mul", "__rmul__": "mul",
    "__truediv__": "div", "__pow__": "pow",
}.items():  # fmt: skip
    _RULES[getattr(Tensor, _name)] = _RULES[getattr(torch, _same)]
_RULES[Tensor.__rsub__] = lambda a, b: b - a if isinstance(b, Series) else -(a - b)
_RULES[Tensor.__rtruediv__] = lambda a, b: b / a if isinstance(b, Series) else a**-1.0 * b
_RULES[Tensor.__rpow__] = lambda a, b: b**a if isinstance(b, Series) else a.__rpow__(b)
