"""`scan_lengthscale`: where to start, by a look at a few scales."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from hyperlearn.gp.backend import Backend
from hyperlearn.gp.gauss_newton import GaussNewton, by_field, solve_pde
from hyperlearn.gp.objectives import Held, Objective
from hyperlearn.gp.pde import PDE
from operators import Kernel
from solvers import ConvergenceWarning, NotPositiveDefiniteError


@dataclass(frozen=True)
class Scan:
    """Losses of a kernel at several scales.

    Parameters
    ----------
    scales
        What was tried, ascending.
    losses
        Of each; infinite where there was no solution.
    reasons
        Of each, in a sentence.
    best
        The scale of the smallest loss.
    """

    scales: tuple[float, ...]
    losses: tuple[float, ...]
    reasons: tuple[str, ...]
    best: float

    def __str__(self) -> str:
        rows = zip(self.scales, self.losses, self.reasons, strict=True)
        return "\n".join(
            f"{scale:10.4g} {loss:12.4g}{' <' if scale == self.best else '  '} {reason}"
            for scale, loss, reason in rows
        )


def scan_lengthscale(
    pde: PDE,
    make_kernel: Callable[[float], Kernel],
    objective: Objective,
    *,
    scales: Sequence[float] | None = None,
    nugget: float = 1e-10,
    method: GaussNewton | None = None,
    backend: Backend | None = None,
) -> Scan:
    """Solve the PDE at a few scales and take an objective of each: 8 solves for a start.

    A loss of lengths is flat where they are below the spacing of the points, and far above the
    optimum; a descent from there goes nowhere.

    Parameters
    ----------
    pde, objective, nugget, method, backend
        As for `kernel_problem` and `solve_pde`.
    make_kernel
        The kernel, or kernels by field, of a scale.
    scales
        By default `default_scales` of the PDE's points.

    Raises
    ------
    ValueError
        No scale gives a finite loss.

    Examples
    --------
    >>> import torch, hyperlearn as hl, operators as ops
    >>> x = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)[:, None]
    >>> ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    >>> interior = hl.Equation(lambda x, u, lap_u: -lap_u - torch.sin(9 * x[0]), x)
    >>> pde = hl.PDE([interior, hl.Equation(lambda u: u, ends)])
    >>> found = hl.scan_lengthscale(
    ...     pde, ops.RBF, hl.ValidationResidual([interior.at(x[1:] - 0.02)])
    ... )
    >>> 0.1 < found.best < 1.0
    True
    """
    scales = sorted(default_scales(pde) if scales is None else scales)
    losses, reasons = [], []
    for scale in scales:
        loss, reason = math.inf, ""
        try:
            kernels = by_field(make_kernel(scale), pde)
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore", ConvergenceWarning)
                found = solve_pde(pde, kernels, nugget=nugget, method=method, backend=backend)
                posterior = found.posterior
                states = [posterior.state(equation) for equation in objective.validation]
                generator = torch.Generator().manual_seed(0)
                held = Held(objective.validation, states)
                loss = float(objective.loss(posterior, held, pde.params, generator))
            reason = found.reason
        except (NotPositiveDefiniteError, FloatingPointError) as error:
            reason = str(error)
        losses.append(loss if math.isfinite(loss) else math.inf)
        reasons.append(reason)
    best = int(np.argmin(losses))
    if not math.isfinite(losses[best]):
        raise ValueError("no scale gives a finite loss: " + "; ".join(sorted(set(reasons))))
    return Scan(tuple(scales), tuple(losses), tuple(reasons), scales[best])


def default_scales(pde: PDE, count: int = 8) -> list[float]:
    """From three times the median distance of neighbours to half the diagonal, in equal ratios."""
    points = _distinct(torch.cat([equation.points for equation in pde.equations]))
    if len(points) < 2:
        raise ValueError("the PDE has one point; expected two at least, or scales=...")
    distances, _ = cKDTree(points).query(points, k=2)
    least = 3 * float(np.median(np.asarray(distances)[:, 1]))
    most = 0.5 * float(np.linalg.norm(points.max(0) - points.min(0)))
    return [float(scale) for scale in np.geomspace(least, max(most, 2 * least), count)]


def _distinct(points: Tensor) -> np.ndarray:
    return np.unique(points.detach().cpu().numpy(), axis=0)
