"""The hypergradient by implicit differentiation, and its certificate.

grad = d_x g - C q,   A q = d_y g,   A = d_yy G,   C = d_x d_y G   (rows: outer).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyperlearn.certificate import Certificate, Estimate, Smoothness
from hyperlearn.oracles import Loss, Oracles
from hyperlearn.problem import check_data
from operators import EmpiricalFisher, LinearOperator, Space
from solvers import CG, LinearSolver

Tree = Any


class NotFiniteError(FloatingPointError, ValueError):
    """A derivative is NaN or infinite: a bad argument in one call, divergence in a loop."""


@torch.no_grad()  # a loss may close over tensors that require grad: no graph of theirs is kept
def hypergradient(
    outer_loss: Loss,
    inner_loss: Loss,
    y: Tree,
    x: Tree,
    *,
    inner_batch: Tree = None,
    outer_batch: Tree = None,
    operator: LinearOperator | None = None,
    solver: LinearSolver | None = None,
    damping: float = 0.0,
    smoothness: Smoothness | None = None,
) -> tuple[Tree, Certificate]:
    """Gradient in x of ``outer_loss(y*(x), x)`` at a given y near ``y*(x) = argmin inner_loss``.

    Parameters
    ----------
    outer_loss, inner_loss
        ``f(y, x)``, or ``f(y, x, batch)`` where its batch is given; scalar tensors, means over the
        batch.
    y, x
        Tensors or nested structures of tensors, of one floating dtype and device.
    inner_batch, outer_batch
        Data of the two losses.
    operator
        Stands for the inner Hessian; by default the exact one.
    solver
        Applies the inverse; by default `solvers.CG()`.
    damping
        Added to the exact Hessian; biases the result, and is reported.
    smoothness
        Constants for an error bound.

    Returns
    -------
    grad
        Like x.
    certificate
        Inner stationarity, residuals, what was used and why.

    Raises
    ------
    TypeError, ValueError
        A bad tree, a loss that is not a scalar, an operator of another shape or dtype, or
        derivatives that are not finite (`NotFiniteError`).
    solvers.NotConvergedError
        With a solver that is ``strict``.

    Notes
    -----
    Costs the outer gradient, the solver's products, and one cross product; the certificate takes
    its inner gradient from that, and one more sweep back where the operator is not the exact
    Hessian.

    Examples
    --------
    Ridge: ``y* = x / 2``, so that ``d/dx (y* - 1)^2 + x = (x/2 - 1) + 1``.

    >>> import torch, hyperlearn as hl
    >>> x = torch.tensor([3.0], dtype=torch.float64)
    >>> grad, certificate = hl.hypergradient(
    ...     lambda y, x: ((y - 1) ** 2 + x).sum(), lambda y, x: (y**2 - x * y).sum(), x / 2, x
    ... )
    >>> grad, certificate.converged
    (tensor([1.5000], dtype=torch.float64), True)
    """
    y_space, x_space = Space.of(y, "y"), Space.of(x, "x")
    if y_space.dtype != x_space.dtype or y_space.device != x_space.device:
        raise TypeError(
            f"y is {y_space.dtype} on {y_space.device} and x is {x_space.dtype} on "
            f"{x_space.device}; expected one dtype and device"
        )
    check_data(inner_batch, "inner_batch")
    check_data(outer_batch, "outer_batch")
    if operator is not None and damping != 0.0:
        raise ValueError("damping is for the exact Hessian; add it to your operator instead")
    y_flat, x_flat = y_space.ravel(y).detach(), x_space.ravel(x).detach()
    oracles = Oracles(inner_loss, outer_loss, y_space, x_space)
    estimate = implicit_hypergradient(
        oracles,
        y_flat,
        x_flat,
        inner_batch=inner_batch,
        outer_batch=outer_batch,
        operator=operator,
        solver=solver or CG(),
        damping=damping,
        smoothness=smoothness,
        certified=True,
    )
    return x_space.unravel(estimate.gradient), estimate.certify()


def implicit_hypergradient(
    oracles: Oracles,
    y: Tensor,
    x: Tensor,
    *,
    inner_batch: Tree,
    outer_batch: Tree,
    operator: LinearOperator | None,
    solver: LinearSolver,
    damping: float = 0.0,
    cross: Callable[[Tensor], Tensor] | None = None,
    constraint_active: bool = False,
    stationarity: Callable[[], float] | None = None,
    smoothness: Smoothness | None = None,
    certified: bool = False,
) -> Estimate:
    """The same on flat vectors: what every implicit method calls.

    Parameters
    ----------
    operator
        Stands for the Hessian on `inner_batch`; None for the exact one plus `damping`.
    cross
        ``q -> C q``; None for the cross derivative on `inner_batch`.
    constraint_active
        Whether the inner projection was active (goes into the certificate).
    stationarity
        Measures the inner problem's; None for ``|d_y G|`` on `inner_batch`.
    certified
        Whether the certificate will be asked for: what it needs is then found on the way.
    oracles, y, x, inner_batch, outer_batch, solver, damping, smoothness
        As for `hypergradient`, flat.
    """
    exact = operator is None and damping == 0.0
    if operator is None:
        operator = oracles.hessian(y, x, inner_batch, damping)
    if operator.shape != (y.numel(), y.numel()):
        raise ValueError(
            f"operator has shape {operator.shape}; y has {y.numel()} entries, so expected "
            f"({y.numel()}, {y.numel()})"
        )
    b, direct = oracles.outer_gradients(y, x, outer_batch)
    _check_finite(b, "d_y outer_loss")
    _check_finite(direct, "d_x outer_loss")
    q, info = solver.prepare(operator).solve(b)
    score = curved = None
    if cross is None:
        wanted = certified and not exact
        score, implicit, curved = oracles.adjoint_products(y, x, q, inner_batch, hessian=wanted)
    else:
        implicit = cross(q)
    gradient = direct - implicit
    _check_finite(gradient, "the hypergradient")

    def certify() -> Certificate:
        if stationarity is not None:
            distance = stationarity()
        else:
            found = oracles.inner_gradient(y, x, inner_batch) if score is None else score
            distance = float(found.norm())
        if exact:
            hessian_residual = info.residual
        else:
            residual = b - (oracles.hessian(y, x, inner_batch) @ q if curved is None else curved)
            hessian_residual = float(residual.norm()) / (float(b.norm()) or 1.0)
        bound = None
        if smoothness is not None and not constraint_active:
            absolute = hessian_residual * float(b.norm())
            bound = smoothness.error_bound(distance, absolute, float(q.norm()))
        return Certificate(
            inner_stationarity=distance,
            adjoint_residual=info.residual,
            hessian_residual=hessian_residual,
            converged=info.converged,
            exact=exact,
            iterations=info.iterations,
            operator=repr(operator),
            solver=info.solver,
            reason=info.reason
            if exact
            else f"{info.reason}; the operator is not the exact Hessian",
            damping=damping,
            effective_rank=(
                operator.effective_rank() if isinstance(operator, EmpiricalFisher) else None
            ),
            error_bound=bound,
            constraint_active=constraint_active,
        )

    return Estimate(gradient, info, certify)


def _check_finite(vector: Tensor, name: str) -> None:
    if not bool(torch.isfinite(vector).all()):
        raise NotFiniteError(f"{name} holds NaN or infinite entries at this y and x")
