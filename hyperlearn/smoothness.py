"""Constants of a bilevel problem, estimated from derivatives at points around y."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hyperlearn.certificate import Smoothness
from hyperlearn.oracles import Loss, Oracles
from operators import CrossDerivative, Hessian, LinearOperator, Space
from solvers.stationary.spectrum import spectrum

Tree = Any


@torch.no_grad()
def estimated_smoothness(
    outer_loss: Loss,
    inner_loss: Loss,
    y: Tree,
    x: Tree,
    *,
    radius: float,
    inner_batch: Tree = None,
    outer_batch: Tree = None,
    samples: int = 8,
    margin: float = 0.1,
    seed: int = 0,
) -> Smoothness:
    """`Smoothness` for the error bound of a hypergradient, from points within `radius` of y.

    The smallest and largest eigenvalues and norms that are seen at y and at random points on the
    sphere of that radius, and the largest quotients of differences between neighbours, widened by
    `margin`. Estimates all: the extremes between the points are not seen, so certificates that
    rest on them call their bound an estimate.

    Parameters
    ----------
    outer_loss, inner_loss, y, x, inner_batch, outer_batch
        As for `hypergradient`.
    radius
        Distance from y within which the solution is thought to be; positive.
    samples
        Points besides y.
    margin
        Share by which the lower bound is lowered and the upper bounds are raised.
    seed
        Of the random points.

    Raises
    ------
    ValueError
        A bad radius or number of samples; or curvature that is not positive at one of the points,
        so that no bound exists.

    Notes
    -----
    Costs about 20 to 40 products of each kind a point. Source of the constants' use: Ehrhardt &
    Roberts (2024), arXiv:2301.04764; Salehi et al. (2025), arXiv:2308.10098, theorem 2.1.

    Examples
    --------
    >>> import torch, hyperlearn as hl
    >>> y = x = torch.ones(2, dtype=torch.float64)
    >>> constants = hl.estimated_smoothness(
    ...     lambda y, x: (y**2).sum() / 2, lambda y, x: (2 * y**2 - x * y).sum(), y, x, radius=0.1
    ... )
    >>> round(constants.strong_convexity, 3), round(constants.cross_norm, 3)
    (3.6, 1.1)
    """
    if not radius > 0:
        raise ValueError(f"radius={radius}; expected a positive distance")
    if samples < 1:
        raise ValueError(f"samples={samples}; expected at least 1")
    y_space, x_space = Space.of(y, "y"), Space.of(x, "x")
    oracles = Oracles(inner_loss, outer_loss, y_space, x_space)
    centre, u = y_space.ravel(y).detach(), x_space.ravel(x).detach()
    generator = torch.Generator().manual_seed(seed)
    points = [centre]
    for _ in range(samples):
        away = torch.randn(len(centre), generator=generator, dtype=torch.float64).to(centre)
        points.append(centre + radius * away / away.norm())

    def hessian(v: Tensor) -> LinearOperator:
        return Hessian(lambda v: oracles.inner(v, u, inner_batch), v)

    def cross(v: Tensor) -> LinearOperator:
        return CrossDerivative(lambda v, u: oracles.inner(v, u, inner_batch), v, u)

    def outer_hessian(v: Tensor) -> LinearOperator:
        return Hessian(lambda v: oracles.outer(v, u, outer_batch), v)

    def direct(v: Tensor) -> LinearOperator:
        return CrossDerivative(lambda v, u: oracles.outer(v, u, outer_batch), v, u)

    smallest = min(float(spectrum(hessian(point), 30).smallest) for point in points)
    if not smallest > 0:
        raise ValueError(
            f"the inner Hessian has curvature {smallest:.3g} within {radius:.3g} of y: no constant "
            "of strong convexity exists there; take a smaller radius, or a regularised inner loss"
        )

    def largest(operator_of: Any) -> float:
        return (1 + margin) * max(operator_norm(operator_of(point)) for point in points)

    def slope(operator_of: Any) -> float:
        quotients = [
            operator_norm(operator_of(a) - operator_of(b)) / float((a - b).norm())
            for a, b in pairwise(points)
        ]
        # Differences at the level of rounding belong to a constant.
        noise = 64 * torch.finfo(centre.dtype).eps * largest(operator_of) / radius
        found = max(quotients)
        return 0.0 if found <= noise else (1 + margin) * found

    return Smoothness(
        strong_convexity=(1 - margin) * smallest,
        cross_norm=largest(cross),
        outer_smoothness=largest(outer_hessian),
        direct_smoothness=largest(direct),
        hessian_lipschitz=slope(hessian),
        cross_lipschitz=slope(cross),
        estimated=True,
    )


def operator_norm(A: LinearOperator, steps: int = 20) -> float:
    """``|A|``, 2-norm, from so many Lanczos steps for ``A^T A``: two products each."""
    return max(float(spectrum(A.T @ A, steps).largest), 0.0) ** 0.5
