"""The viscous Burgers equation whose solution steepens to a shock at x = 0.

    u_t + u u_x = nu u_xx   for (t, x) in (0, 1) x (-1, 1),

    u(0, x) = -sin(pi x),     u(t, -1) = u(t, 1) = 0.

Source of the closed form: Cole (1951), Hopf (1950); of the task: Chen et al. (2021),
arXiv:2103.12959, with nu = 0.02.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hyperlearn.experiments.references.points import Box, coordinates, in_slabs

BOX: Box = ((0.0, 1.0), (-1.0, 1.0))
_ENTRIES = 2**19  # numbers in a table of nodes by points: 4 MiB in float64


def solution(x: Tensor, *, nu: float = 0.02, step: float = 0.15) -> Tensor:
    """``u = -E[sin(pi s) e(s)] / E[e(s)]``, s normal about x with variance ``2 nu t``.

    Here ``e(s) = exp(-cos(pi s) / (2 pi nu))`` is the Cole-Hopf transform of the initial values.

    Parameters
    ----------
    x
        Points ``(..., 2)`` as (t, x), ``0 <= t <= 1``. Derivatives in t need t > 0.
    nu
        Viscosity; positive.
    step
        Of the quadrature; for nu > 0.1 it is shortened by ``sqrt(0.1 / nu)``.

    Returns
    -------
    Tensor
        ``(...)``.

    Raises
    ------
    ValueError
        `nu` or `step` is not positive.

    Notes
    -----
    With ``s = x - sqrt(4 nu t) g`` both means are integrals over g with the weight
    ``exp(-g^2)``. Gauss-Hermite nodes follow the weight; but e(s) varies by ``exp(1 / (pi nu))``,
    and for small nu the mass of the integrand lies where the weight is ``1e-100``. So the
    trapezoidal rule is used, over all g that can matter, ``g^2 <= 1 / (pi nu) + 40``. It converges
    geometrically for an entire integrand: along ``g + i a`` this one grows at most like
    ``exp(a^2 + (cosh(pi a sqrt(4 nu t)) - 1) / (2 pi nu))``, about ``exp((1 + pi t) a^2)``, against
    the factor ``exp(-2 pi a / step)``; for ``step = 0.15`` and t <= 1 the error is below rounding.
    The weights are a softmax of exponents, which no size of ``1 / nu`` can overflow. Rounding of
    the exponents leaves about ``1e-16 / nu``.

    Costs ``2 sqrt(1 / (pi nu) + 40) / step`` nodes a point: 101 for nu = 0.02, 253 for 0.001.

    Examples
    --------
    >>> x = torch.tensor([[0.0, 0.5], [1.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    >>> solution(x)[0], bool(solution(x)[1].abs() < 1e-13)
    (tensor(-1., dtype=torch.float64), True)
    """
    if not nu > 0:
        raise ValueError(f"nu={nu}; expected a positive number")
    if not step > 0:
        raise ValueError(f"step={step}; expected a positive number")
    step *= min(1.0, math.sqrt(0.1 / nu))
    half = math.ceil(math.sqrt(1 / (math.pi * nu) + 40) / step)
    nodes = step * torch.arange(-half, half + 1, dtype=x.dtype, device=x.device)

    def mean(time: Tensor, space: Tensor) -> Tensor:
        s = math.pi * (space[:, None] - torch.sqrt(4 * nu * time[:, None]) * nodes)
        weights = torch.softmax(-(nodes**2) - torch.cos(s) / (2 * math.pi * nu), dim=-1)
        return -(weights * torch.sin(s)).sum(-1)

    return in_slabs(mean, x, max(1, _ENTRIES // len(nodes)))


def initial(x: Tensor) -> Tensor:
    """``u(0, x) = -sin(pi x)`` at points ``(..., 2)`` as (t, x); t is ignored."""
    return -torch.sin(math.pi * coordinates(x)[1])
