"""Whether a stationary point is a minimum: `ends`, `minimum_or_not`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hyperlearn.conditions import Stationary
from hyperlearn.inner.equation import DENSE, Equation
from hyperlearn.inner.method import InnerInfo, wide


def ends(A: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest eigenvalue and largest absolute one of symmetric ``(..., n, n)``, by ``O(n^3)``.

    A smallest one below rounding, ``16 n eps`` of the largest, is zero.
    """
    values = torch.linalg.eigvalsh(wide(A))
    largest = values.abs().amax(-1)
    rounding = 16 * A.shape[-1] * torch.finfo(values.dtype).eps * largest
    smallest = values[..., 0]
    return torch.where(smallest.abs() <= rounding, 0.0, smallest), largest


def minimum_or_not(
    equation: Equation, Y: Tensor, info: InnerInfo, A: Tensor | None = None
) -> InnerInfo:
    """The same, but not converged where a loss has negative curvature at its stationary point.

    Looked for up to 256 unknowns, where the Hessian can be formed, in those that are converged. A
    saddle point or a maximum can be had as a `root` of the gradient.
    """
    conditions = equation.conditions
    small = conditions.space.size <= DENSE and not conditions.given
    if not (isinstance(conditions, Stationary) and small and info.converged and Y.numel()):
        return info
    smallest, _ = ends(equation.matrix(Y) if A is None else A)
    saddles = smallest < 0
    if not bool(saddles.any()):
        return info
    found = f"the Hessian has curvature {float(smallest.min()):.3g} there: no minimum"
    if len(Y) > 1:
        found += f" ({int(saddles.sum())} of {len(Y)} members)"
    return replace(info, converged=False, status="saddle", reason=f"{info.reason}; but {found}")
