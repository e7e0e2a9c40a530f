"""The hypergradient by implicit differentiation, and its certificate.

grad = d_x g - C q,   A q = d_y g,   A = d_yy G,   C = d_x d_y G   (rows: outer).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperlearn.certificate import Certificate, Estimate, Smoothness, UntrustworthyError
from hyperlearn.correction import correction
from hyperlearn.oracles import Loss, Oracles, batch_length
from hyperlearn.problem import check_data
from hyperlearn.solutions import argmin
from operators import EmpiricalFisher, LinearOperator, Space
from operators.closures import Closure
from operators.tracing import memory, readable
from solvers import CG, Auto, ConvergenceWarning, Info, LinearSolver

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
    chunk_size: int | None = None,
    estimate: bool | None = None,
    rtol: float = 1e-3,
    strict: bool = False,
    refine: bool = False,
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
    chunk_size
        Work through the batches so many samples at a time: memory is that of a chunk.
    estimate
        Whether to estimate the error where there are no constants to bound it: by one more step of
        Newton and one refinement of the adjoint in the exact Hessian (`hyperlearn.correction`).
        None: where `operator` is the exact Hessian, or `strict` or `refine` ask for it.
    rtol
        Relative error that `strict` and `refine` ask for.
    strict
        Raise unless the certificate carries the result (`Certificate.doubt`).
    refine
        Improve y, by Newton's method, and the adjoint until the claimed error is at most `rtol`; y
        is then another than the one that was given. Where rounding forbids it, the certificate's
        reason says which of the two does not improve.

    Returns
    -------
    grad
        Like x.
    certificate
        Inner stationarity, residuals, what was used and why; ``certificate.trustworthy(rtol)``.

    Raises
    ------
    TypeError, ValueError
        A bad tree, a loss that is not a scalar, an operator of another shape or dtype, or
        derivatives that are not finite (`NotFiniteError`).
    solvers.NotConvergedError
        With a solver that is ``strict``.
    UntrustworthyError
        With ``strict``: the error's claim is above `rtol`, or there is none. It holds both results.

    Notes
    -----
    Numbers come back, and no history: to differentiate a hypergradient, or to map it, take the
    gradient of `argmin`. Tensors that a loss closes over are constants.

    Costs the outer gradient, the solver's products, and one cross product; the certificate takes
    its inner gradient from that, and one more sweep back where the operator is not the exact
    Hessian. The estimate costs three more solves with the exact Hessian: with a factorisation next
    to nothing; by CG, whose products are then exact Hessian products, 3 and 7 times the time of the
    hypergradient on two regressions (``python -m validation.bench peers``). With ``estimate=False``
    they are left out, and the certificate claims nothing of the error.

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
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size >= 1):
        raise ValueError(f"chunk_size={chunk_size!r}; expected at least 1, or None")
    _refuse_itself({"outer_loss": outer_loss, "inner_loss": inner_loss}, y, x)
    if not readable(*pytree.tree_leaves((y, x))):
        raise NotImplementedError(
            "hypergradient under torch.func.vmap: it returns numbers and a certificate of them; "
            "map the gradient of hyperlearn.argmin instead"
        )
    y_flat, x_flat = y_space.ravel(y).detach(), x_space.ravel(x).detach()
    oracles = Oracles(inner_loss, outer_loss, y_space, x_space, chunk_size=chunk_size)
    if chunk_size is not None:
        _check_means(oracles, y_flat, x_flat, inner_batch, outer_batch)
    if estimate is None:
        estimate = smoothness is None and ((operator is None and damping == 0) or strict or refine)
    parts: dict[str, Any] = {
        "inner_batch": inner_batch,
        "outer_batch": outer_batch,
        "operator": operator,
        "solver": solver or CG(),
        "damping": damping,
        "smoothness": smoothness,
    }
    if refine:
        gradient, certificate = refined_hypergradient(oracles, y_flat, x_flat, rtol=rtol, **parts)
    else:
        found = implicit_hypergradient(
            oracles, y_flat, x_flat, certified=True, estimated=estimate, **parts
        )
        gradient, certificate = found.gradient, found.certify()
    result = x_space.unravel(gradient)
    doubt = certificate.doubt(rtol)
    if strict and doubt:
        raise UntrustworthyError(certificate, result, doubt)
    return result, certificate


def _refuse_itself(losses: dict[str, Loss], y: Tree, x: Tree) -> None:
    """Raise where a loss reaches y or x by itself: what it does with them would be left out."""
    own = {memory(leaf): name for name, tree in (("y", y), ("x", x)) for leaf in tensors_of(tree)}
    for name, loss in losses.items():
        for tensor in Closure(loss).by_name():
            if memory(tensor) in own and tensor.numel():
                variable = own[memory(tensor)]
                raise ValueError(
                    f"{name} closes over {variable} itself, a tensor of shape "
                    f"{tuple(tensor.shape)}; the derivative by it would be a silent zero: use the "
                    f"argument, as in {name}(y, x), or close over a copy, {variable}.clone(), "
                    "where a constant is meant"
                )


def tensors_of(tree: Tree) -> list[Tensor]:
    """The leaves that are tensors."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _check_means(
    oracles: Oracles, y: Tensor, x: Tensor, inner_batch: Tree, outer_batch: Tree
) -> None:
    """Raise where a loss is no mean over its batch, by its first two chunks."""
    for name, loss, batch in (
        ("inner_loss", oracles.inner, inner_batch),
        ("outer_loss", oracles.outer, outer_batch),
    ):
        size = oracles.chunk_size
        if batch is None or size is None or batch_length(batch) <= size:
            continue
        first, second, both = (
            pytree.tree_map(lambda leaf, part=part: leaf[part], batch)
            for part in (slice(0, size), slice(size, 2 * size), slice(0, 2 * size))
        )
        shares = [batch_length(part) / batch_length(both) for part in (first, second)]
        values = [float(loss(y, x, part)) for part in (first, second, both)]
        mean = shares[0] * values[0] + shares[1] * values[1]
        terms = abs(shares[0] * values[0]) + abs(shares[1] * values[1]) + abs(values[2])
        if abs(mean - values[2]) > 1e2 * torch.finfo(y.dtype).eps ** 0.5 * terms:
            raise ValueError(
                f"chunk_size={size}: {name} is no mean over its batch: {values[0]:.6g} and "
                f"{values[1]:.6g} of two chunks, {values[2]:.6g} of both; expected a mean over the "
                "samples"
            )


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
    estimated: bool = False,
    adjoint: Tensor | None = None,
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
    estimated
        Whether the certificate estimates the error where it cannot bound it.
    adjoint
        A solution of the adjoint system that is at hand, to be measured and used.
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
    if adjoint is None:
        q, info = solver.prepare(operator).solve(b)
    else:
        q, info = adjoint, _measured(operator, adjoint, b, solver)
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
        bound = distant = curvature = None
        reason = info.reason
        if not exact:
            reason += "; the operator is not the exact Hessian"
        if smoothness is not None and not constraint_active:
            absolute = hessian_residual * float(b.norm())
            bound = smoothness.error_bound(distance, absolute, float(q.norm()))
            distant = distance / smoothness.strong_convexity
        elif estimated and not constraint_active:
            better = correction(
                oracles,
                y,
                x,
                q,
                gradient,
                inner_batch=inner_batch,
                outer_batch=outer_batch,
                solver=solver if exact else Auto(),
            )
            bound, distant, curvature = better.error, better.distance, better.smallest
            if curvature < 0:
                # A stationary point that is no minimum: no error to a hypergradient is defined.
                bound = math.inf
                reason += f"; y is no minimum: the Hessian has curvature {curvature:.3g}"
            elif better.detail:
                reason += f"; no estimate of the error: {better.detail}"
        return Certificate(
            inner_stationarity=distance,
            adjoint_residual=info.residual,
            hessian_residual=hessian_residual,
            converged=info.converged,
            exact=exact,
            iterations=info.iterations,
            operator=_named(repr(operator)),
            solver=_named(info.solver),
            reason=_named(reason),
            damping=damping,
            effective_rank=(
                operator.effective_rank() if isinstance(operator, EmpiricalFisher) else None
            ),
            error_bound=bound,
            constraint_active=constraint_active,
            bound_is_estimate=bound is not None and (smoothness is None or smoothness.estimated),
            distance=distant,
            curvature=curvature,
            gradient_norm=float(gradient.norm()),
        )

    return Estimate(gradient, info, certify, q)


def _check_finite(vector: Tensor, name: str) -> None:
    if not bool(torch.isfinite(vector).all()):
        raise NotFiniteError(f"{name} holds NaN or infinite entries at this y and x")


def _measured(operator: LinearOperator, q: Tensor, b: Tensor, solver: LinearSolver) -> Info:
    """What can be said of a solution that is at hand."""
    residual = float((b - operator @ q).norm()) / (float(b.norm()) or 1.0)
    asked = solver.tolerance(b.dtype)
    converged = residual <= asked
    reason = f"a refined adjoint with true relative residual {residual:.3g}; asked for {asked:.3g}"
    status = "converged" if converged else "inaccurate"
    return Info(converged, 0, residual, repr(solver), status, reason, 1)


def refined_hypergradient(
    oracles: Oracles,
    y: Tensor,
    x: Tensor,
    *,
    rtol: float,
    inner_batch: Tree,
    outer_batch: Tree,
    operator: LinearOperator | None,
    solver: LinearSolver,
    damping: float,
    smoothness: Smoothness | None,
    rounds: int = 10,
) -> tuple[Tensor, Certificate]:
    """The hypergradient, with y and the adjoint improved until the claimed error meets `rtol`.

    Each round takes the better point and adjoint that the estimate of the error has found; where
    Newton's steps do not shrink yet, it takes those with a line search first.

    Parameters
    ----------
    rounds
        At most.
    oracles, y, x, inner_batch, outer_batch, operator, solver, damping, smoothness
        As for `implicit_hypergradient`. A surrogate serves for the first adjoint.
    """
    data: dict[str, Any] = {"inner_batch": inner_batch, "outer_batch": outer_batch}
    found = implicit_hypergradient(
        oracles, y, x, operator=operator, solver=solver, damping=damping, smoothness=smoothness,
        certified=True, estimated=True, **data,
    )  # fmt: skip
    certificate, q, done = found.certify(), found.adjoint, 0
    exact = solver if operator is None and damping == 0 and not solver.truncated else Auto()
    while certificate.doubt(rtol) and done < rounds:
        assert q is not None  # an implicit estimate has one
        better = correction(oracles, y, x, q, found.gradient, solver=exact, **data)
        if better.contraction < 0.5:
            following, adjoint = better.y, better.q
        else:
            following, adjoint = _minimised(oracles, y, x, inner_batch), None
        done += 1
        before = certificate
        tried = implicit_hypergradient(
            oracles, following, x, operator=None, solver=exact, smoothness=smoothness,
            certified=True, estimated=True, adjoint=adjoint, **data,
        )  # fmt: skip
        claimed = tried.certify()
        if _claim(claimed) >= _claim(before) and better.contraction < 0.5:
            stalled = [
                name
                for name, old, new in (
                    ("y", before.inner_stationarity, claimed.inner_stationarity),
                    ("the adjoint", before.hessian_residual, claimed.hessian_residual),
                )
                if old is None or new is None or not new < old / 2
            ]
            reason = (
                f"{before.reason}; {' and '.join(stalled) or 'neither y nor the adjoint'} "
                f"cannot be improved further in {str(y.dtype).removeprefix('torch.')}"
            )
            return found.gradient, replace(before, reason=reason, refinements=done - 1)
        found, certificate, y, q = tried, claimed, following, tried.adjoint
    return found.gradient, replace(certificate, refinements=done)


def _claim(certificate: Certificate) -> float:
    claimed = certificate.relative_error
    return math.inf if claimed is None or math.isnan(claimed) else claimed


def _minimised(oracles: Oracles, y: Tensor, x: Tensor, batch: Tree) -> Tensor:
    """A minimum of the inner loss near y, as exactly as rounding allows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the certificate measures y
        found: Tensor = argmin(lambda y, x: oracles.inner(y, x, batch), y, x)
    return found


def _named(text: str) -> str:
    """A repr without addresses in memory, which no two runs have in common."""
    return re.sub(r" (object )?at 0x[0-9a-fA-F]+", "", text)
