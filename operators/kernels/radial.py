"""Radial kernels, of the distance in scaled coordinates: all their derivatives in closed form."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from operators.kernels.differences import differences, half_squares
from operators.kernels.functionals import Functionals
from operators.kernels.gaussian import gaussian_pairs
from operators.kernels.isotropic import Terms, isotropic_pairs
from operators.kernels.kernel import Kernel, Lift, Positive, check_lengths, log_lengths, log_of
from operators.kernels.pullback import weighted
from operators.kernels.series import derivatives
from operators.kernels.warp import scaled
from operators.tracing import readable, tracked

# Coefficients of f, f', ..., f'''' in a block; None for zero.
Combination = list[Tensor | None]
# Dimension up to which a block of RBF is cheaper coordinate by coordinate. Forward and backward it
# takes 0.5 to 0.9 of the time in one, 0.7 to 0.8 in two (1.2 without second derivatives), 1.0 to
# 1.5 in three dimensions.
_FLAT = 2


class RadialKernel(Kernel):
    """``k(x, y) = f(s)`` with ``s = |z_x - z_y|^2 / 2`` and ``z = x / lengthscale``.

    A functional is a polynomial in the derivative by z, and ``f`` depends on z through s alone, so
    that ``d_a f = f' p_a`` with ``p = z_x - z_y``, ``d_a d_b f = f'' p_a p_b + f' I_ab``, and so on
    to the fourth order: a block is a combination of ``f, f', ..., f''''`` whose coefficients are
    polynomials in p. Differences, never ``|x|^2 + |y|^2 - 2 x.y``: exact at coincident points.

    Parameters
    ----------
    lengthscale
        Positive: a number, or a tensor ``(d,)`` with one length for each coordinate (ARD).

    Notes
    -----
    A block of n x m pairs costs about 10 elementwise passes for values, 20 with Laplacians, and 10
    d more with gradients or mixed derivatives.
    """

    _parameters: ClassVar[tuple[str, ...]] = ("log_lengthscale",)
    # Whether the profile is a function of s alone, without tensors of its own.
    _fixed: ClassVar[bool] = False

    def __init__(self, lengthscale: Positive = 1.0) -> None:
        self.log_lengthscale = log_lengths(lengthscale)

    @property
    def lengthscale(self) -> Tensor:
        """One, or one for each coordinate; in the units of the points."""
        return self.log_lengthscale.exp()

    @abstractmethod
    def profile(self, s: Tensor, order: int) -> list[Tensor]:
        """``f(s), f'(s), ...`` to the given order; where a derivative is infinite at 0, 0 there."""

    def combine(self, coefficients: Combination, s: Tensor) -> Tensor:
        """``sum_k c_k f^(k)(s)``."""
        if all(c is None for c in coefficients):
            return torch.zeros_like(s)
        order = max(k for k, c in enumerate(coefficients) if c is not None)
        total = None
        for c, f in zip(coefficients, self.profile(s, order), strict=False):
            if c is not None:
                total = c * f if total is None else torch.addcmul(total, c, f)
        assert total is not None
        return total

    def reduced(self, terms: Terms) -> Terms:
        """The same sum of ``s^j f^(k)`` with fewer k, where these are multiples of each other."""
        return terms

    def lift(self, L: Functionals) -> Lift:
        """The functionals in scaled coordinates."""
        self.check_smooth(L)
        lengths = self.log_lengthscale.exp()
        check_lengths(self, lengths, L.dimension)
        return scaled(L, lengths)

    def pairs(self, left: Lift, right: Lift) -> Tensor:
        """``(..., n, m)``: see the class."""
        return self._block(left, right)

    def weighted_pairs(self, left: Lift, right: Lift, W: Tensor) -> Tensor:  # noqa: D102
        return self._block(left, right, W)

    def _block(self, left: Lift, right: Lift, W: Tensor | None = None) -> Tensor:
        if all(L.gradient is None and L.hessian is None for L in (left, right)):
            fixed = self._fixed and set(self._parameters) <= {"log_lengthscale"}
            return isotropic_pairs(self, left, right, fixed, W)
        p = differences(left.points, right.points)
        s = half_squares(p)
        coefficients = _coefficients(_Side(left, p, s, -1), _Side(right, p, s, -2))
        return weighted(self.combine(coefficients, s), W)


class _Side:
    """One argument's functional as a polynomial in the derivative by p, at all pairs.

    ``value + g . d + S : d d``. By y the derivative is minus that by p, so g changes its sign.

    `axis` says where the rows go: -1 for those of the first argument, -2 for the second's.
    """

    def __init__(self, L: Functionals, p: list[Tensor], s: Tensor, axis: int) -> None:
        self.d, self.axis, self.p, self.s = len(p), axis, p, s
        self.value = None if L.value is None else self._at(L.value)
        self.c = None if L.laplacian is None else self._at(L.laplacian)
        sign = 1.0 if axis == -1 else -1.0
        self.g: dict[int, Tensor] | None = None
        if L.gradient is not None:
            self.g = {a: self._at(sign * L.gradient[..., a]) for a in L.slopes}
        # H by rows, without what is known to be zero.
        self.H: list[dict[int, Tensor]] | None = None
        if L.hessian is not None:
            symmetric = (L.hessian + L.hessian.mT) / 2
            self.H = [{} for _ in range(self.d)]
            for a, b in L.couplings:
                self.H[a][b] = self.H[b][a] = self._at(symmetric[..., a, b])
        # g . p
        self.slope = None
        for a, component in (self.g or {}).items():
            self.slope = _plus(self.slope, component * p[a])
        # S p, p S p and tr S, with S = c I + H; for a Laplacian alone S p is not needed as such.
        self.Hp = None if self.H is None else [self._row_product(row) for row in self.H]
        self.q = None if self.c is None else 2 * self.c * s
        self.t = None if self.c is None else self.d * self.c
        if self.H is not None and self.Hp is not None:
            for a, product in enumerate(self.Hp):
                if product is not None:
                    self.q = _plus(self.q, product * p[a])
                if a in self.H[a]:
                    self.t = _plus(self.t, self.H[a][a])

    def _at(self, coefficient: Tensor) -> Tensor:
        return coefficient.contiguous().unsqueeze(self.axis)

    def _row_product(self, row: dict[int, Tensor]) -> Tensor | None:
        total = None
        for b, entry in row.items():
            total = _plus(total, entry * self.p[b])
        return total

    def bent(self, g: dict[int, Tensor], slope: Tensor) -> Tensor | None:
        """``g . S p``; None for zero."""
        total = None
        if self.c is not None:
            total = self.c * slope
        for a, component in g.items():
            product = self.Hp[a] if self.Hp is not None else None
            if product is not None:
                total = _plus(total, component * product)
        return total


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term


def _coefficients(L: _Side, M: _Side) -> Combination:
    """Of ``f, ..., f''''`` in ``(v + g.d + S:dd)(v' + g'.d + S':dd) f(s)``.

    With ``d_abc f = f''' ppp + f'' (p_a I_bc + ...)`` and ``d_abcd f = f'''' pppp + f''' (six terms
    p p I) + f'' (three terms I I)``, contracted.
    """
    A: Combination = [None] * 5

    def add(k: int, term: Tensor) -> None:
        A[k] = _plus(A[k], term)

    if L.value is not None and M.value is not None:
        add(0, L.value * M.value)
    for one, other in ((L, M), (M, L)):
        if one.value is not None and other.slope is not None:
            add(1, one.value * other.slope)
        if one.value is not None and other.q is not None:
            add(2, one.value * other.q)
            if other.t is not None:
                add(1, one.value * other.t)
        if one.g and other.q is not None:
            assert one.slope is not None
            if (bent := other.bent(one.g, one.slope)) is not None:
                add(2, 2 * bent)
            add(3, one.slope * other.q)
            if other.t is not None:
                add(2, one.slope * other.t)
    if L.g and M.g:
        assert L.slope is not None
        assert M.slope is not None
        for a in L.g.keys() & M.g.keys():
            add(1, L.g[a] * M.g[a])
        add(2, L.slope * M.slope)
    if L.q is not None and M.q is not None:
        add(3, 4 * _sandwich(L, M))
        add(4, L.q * M.q)
        if (trace := _trace(L, M)) is not None:
            add(2, 2 * trace)
        if L.t is not None and M.t is not None:
            add(2, L.t * M.t)
        for one, other in ((L, M), (M, L)):
            if other.t is not None:
                assert one.q is not None
                add(3, one.q * other.t)
    return A


def _trace(L: _Side, M: _Side) -> Tensor | None:
    """``tr(S S')``; None for zero."""
    total = None
    if L.c is not None and M.c is not None:
        total = L.d * (L.c * M.c)
    for one, other in ((L, M), (M, L)):
        for a, row in enumerate(other.H or ()):
            if one.c is not None and a in row:
                total = _plus(total, one.c * row[a])
    for row, column in zip(L.H or (), M.H or (), strict=False):
        for b in row.keys() & column.keys():
            total = _plus(total, row[b] * column[b])
    return total


def _sandwich(L: _Side, M: _Side) -> Tensor:
    """``p S S' p``."""
    total = None
    if L.c is not None and M.c is not None:
        total = 2 * (L.c * M.c) * L.s
    for one, other in ((L, M), (M, L)):
        for product, component in zip(other.Hp or (), other.p, strict=False):
            if one.c is not None and product is not None:
                total = _plus(total, one.c * (product * component))
    for left, right in zip(L.Hp or (), M.Hp or (), strict=False):
        if left is not None and right is not None:
            total = _plus(total, left * right)
    return torch.zeros_like(L.s) if total is None else total


class RBF(RadialKernel):
    """``exp(-|x - y|^2 / (2 l^2))``: squared exponential.

    Examples
    --------
    >>> import torch, operators as ops
    >>> x = torch.zeros(1, 3, dtype=torch.float64)
    >>> L = ops.Functionals.laplacian_at(x)
    >>> ops.gram(ops.RBF(0.5), L).to_dense()  # d (d + 2) / l^4 at distance 0
    tensor([[240.]], dtype=torch.float64)
    """

    _fixed = True

    def profile(self, s: Tensor, order: int) -> list[Tensor]:  # noqa: D102
        f = (-s).exp()
        return [f if k % 2 == 0 else -f for k in range(order + 1)]

    def reduced(self, terms: Terms) -> Terms:
        """All derivatives differ in sign only."""
        found = Terms()
        for (k, j), thin in terms.items():
            for column, row in thin:
                found.add((0, j), -column if k % 2 else column, row)
        return found

    def _block(self, left: Lift, right: Lift, W: Tensor | None = None) -> Tensor:
        """A product over coordinates, where these are few."""
        d = left.dimension
        isotropic = left.gradient is right.gradient is left.hessian is right.hessian is None
        if isotropic or d > _FLAT:
            return super()._block(left, right, W)
        return weighted(gaussian_pairs(left, right, left.points.new_ones(d), [False] * d), W)

    def combine(self, coefficients: Combination, s: Tensor) -> Tensor:
        """``(c_0 - c_1 + c_2 - ...) exp(-s)``: one product for all of them."""
        total = torch.zeros_like(s)
        for k, c in enumerate(coefficients):
            if c is not None:
                total = total + c if k % 2 == 0 else total - c
        return total * (-s).exp()


class Matern(RadialKernel):
    """Matern kernel of half-integer order nu: 1/2, 3/2, 5/2, 7/2 or 9/2.

    With ``t = sqrt(2 nu) r``: ``f = exp(-t) (1 + t + ...)``, and ``(1 / t) d/dt`` of the one of
    order nu is minus that of order ``nu - 1``, divided by ``2 nu - 2``; so all derivatives by s are
    known. The process has derivatives of order below nu: Laplacians need 5/2, and are rough there;
    take 7/2 where they matter.

    Parameters
    ----------
    lengthscale
        Positive number, or one for each coordinate.
    nu
        Half-integer from 0.5 to 4.5.
    """

    _fixed = True

    def __init__(self, lengthscale: Positive = 1.0, nu: float = 2.5) -> None:
        super().__init__(lengthscale)
        if nu not in (0.5, 1.5, 2.5, 3.5, 4.5):
            raise ValueError(f"nu={nu}; expected one of 0.5, 1.5, 2.5, 3.5, 4.5")
        self.nu = float(nu)

    @property
    def smoothness(self) -> float:
        """``nu``."""
        return self.nu

    def profile(self, s: Tensor, order: int) -> list[Tensor]:  # noqa: D102
        p, weight = int(self.nu - 0.5), 2 * self.nu
        apart = s > 0
        # The square root has no derivative at 0; what f has there is put back below.
        t = torch.where(apart, (2 * weight * torch.where(apart, s, 1.0)).sqrt(), 0.0)
        e = (-t).exp()
        found: list[Tensor] = []
        # f^(k)(0): f^(k+1) is -(2 nu) / (2 q - 1) times the next one; below q = 1 the divisor is 1.
        factors = [1.0]
        for q in range(p, p - max(order, p), -1):
            factors.append(factors[-1] * -weight / max(2 * q - 1, 1))
        # Where t is constant, s has derivatives still: those of the Taylor polynomial, of value 0.
        met = tracked(s) and not (readable(apart) and bool(apart.all()))
        inside = torch.where(apart, 0.0, s) if met else None
        for k in range(order + 1):
            q, factor = p - k, factors[k]
            if q >= 0:
                regular = factor * _horner(_polynomial(q), t) * e
                if inside is not None and q:
                    taylor = [factors[k + j] / math.factorial(j) for j in range(1, q + 1)]
                    regular = regular + inside * _horner(taylor, inside)
                found.append(regular)
            else:
                # exp(-t) / t and what follows: infinite at 0, where its coefficient vanishes.
                safe = torch.where(apart, t, 1.0)
                singular = _horner(_reversed_bessel(-q), safe) * e / safe ** (1 - 2 * q - 2)
                found.append(factor * torch.where(apart, singular, 0.0))
        return found

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, nu={self.nu})"


def _polynomial(p: int) -> list[float]:
    """Of ``phi_p = exp(-t) sum_i c_i t^i``, with ``phi_p(0) = 1``."""
    return [
        math.factorial(p) * math.factorial(2 * p - i) * 2**i
        / (math.factorial(2 * p) * math.factorial(p - i) * math.factorial(i))
        for i in range(p + 1)
    ]  # fmt: skip


def _reversed_bessel(k: int) -> list[float]:
    """Of theta in ``((1/t) d/dt)^k exp(-t) = (-1)^k exp(-t) theta_{k-1}(t) / t^(2k-1)``."""
    n = k - 1
    return [
        math.factorial(2 * n - i) / (math.factorial(n - i) * math.factorial(i) * 2.0 ** (n - i))
        for i in range(n + 1)
    ]


def _horner(coefficients: list[float], t: Tensor) -> Tensor:
    total = torch.full_like(t, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total * t + c
    return total


class RationalQuadratic(RadialKernel):
    """``(1 + r^2 / (2 alpha l^2))^(-alpha)``: a mixture of RBF kernels over lengths.

    Parameters
    ----------
    lengthscale
        Positive number, or one for each coordinate.
    alpha
        Positive.
    """

    _parameters = ("log_lengthscale", "log_alpha")

    def __init__(self, lengthscale: Positive = 1.0, alpha: Positive = 1.0) -> None:
        super().__init__(lengthscale)
        self.log_alpha = log_of(alpha, "alpha", single=True)

    def profile(self, s: Tensor, order: int) -> list[Tensor]:  # noqa: D102
        alpha = self.log_alpha.exp()
        base = 1 + s / alpha
        f = base ** (-alpha)
        found = [f]
        for k in range(order):
            found.append(-found[-1] * (alpha + k) / (alpha * base))
        return found


class InverseQuadratic(RadialKernel):
    """``1 / (1 + r^2 / l^2)``."""

    _fixed = True

    def profile(self, s: Tensor, order: int) -> list[Tensor]:  # noqa: D102
        base = 1 / (1 + 2 * s)
        found = [base]
        for k in range(order):
            found.append(-2 * (k + 1) * found[-1] * base)
        return found


class InverseMultiquadric(RadialKernel):
    """``(1 + r^2 / l^2)^(-1/2)``."""

    _fixed = True

    def profile(self, s: Tensor, order: int) -> list[Tensor]:  # noqa: D102
        base = 1 / (1 + 2 * s)
        found = [base.sqrt()]
        for k in range(order):
            found.append(-(2 * k + 1) * found[-1] * base)
        return found


class Radial(RadialKernel):
    """A radial kernel of one's own: ``f(s)``, whose derivatives are found by Taylor arithmetic.

    Parameters
    ----------
    function
        ``f(s, **parameters)`` with ``s = r^2 / (2 l^2)``, elementwise, of torch functions; smooth
        at 0, that is to say smooth in the square of the distance.
    lengthscale
        Positive number, or one for each coordinate.
    parameters
        Tensors that the function takes by name: parameters of the kernel.

    Examples
    --------
    >>> import torch, operators as ops
    >>> k = ops.Radial(lambda s, a: torch.exp(-s) / (1 + a * s), 0.5, a=torch.tensor(0.3))
    >>> list(k.parameters)
    ['log_lengthscale', 'shape.a']
    """

    _parameters = ("log_lengthscale", "shape")

    def __init__(
        self, function: Callable[..., Tensor], lengthscale: Positive = 1.0, **parameters: Tensor
    ) -> None:
        super().__init__(lengthscale)
        if not callable(function):
            raise TypeError(f"function is a {type(function).__name__}; expected f(s, **parameters)")
        self.function = function
        self.shape: dict[str, Any] = parameters

    def profile(self, s: Tensor, order: int) -> list[Tensor]:  # noqa: D102
        return derivatives(lambda t: self.function(t, **self.shape), s, order)
