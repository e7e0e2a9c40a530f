"""The Jacobian of a function as a sparse operator: all its nonzeros from a few sweeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor

from operators.coloured.colouring import Colouring, jacobian_colouring
from operators.coloured.derivative_plan import (
    MAPPED,
    Plan,
    check_chunk,
    direction,
    grid_of,
    sparsity_of,
    to_try,
    verify,
)
from operators.coloured.recovery import jacobian_recovery
from operators.coloured.vertex_order import Order
from operators.space import Space, Tree
from operators.sparse.matrix import Sparse
from operators.tracing import outside, plain_values

Mode = Literal["auto", "forward", "reverse"]


class SparseJacobian(Sparse):
    """``A = d residual(u, *args) / d u`` with all its nonzeros, a `Sparse` operator.

    Parameters
    ----------
    residual
        ``f(u, *args)``, built of torch operations that torch.func can differentiate.
    u
        Point: a tensor or nested structure.
    *args
        Further arguments of the residual.
    sparsity
        ``"detect"``: from the graph of the residual, for every u (see `detect`); ``"probe"``: by
        random products near u, with a bound on what is missed (see `probe`); a function as these
        are, ``partial(probe, seed=1)`` say; or a `Pattern` (see `stencil`), `Sparsity`, torch,
        numpy or scipy matrix.
    mode
        ``"forward"``: one forward sweep (jvp) for each colour of the columns; ``"reverse"``: one
        reverse sweep (vjp) for each colour of the rows, and no forward-mode rule is needed of what
        the residual is made of; ``"auto"``: the fewer.
    colouring
        Order of the greedy colouring, or a `Colouring`. Where the leaves of u are points of one
        grid, periodic colourings of it are tried first
        (`operators.coloured.colouring.column_colouring`).
    chunk_size
        Sweeps at a time. By default as many as hold 2^19 numbers.
    plan
        That of another such operator (`plan`): nothing is detected or coloured.

    Raises
    ------
    ValueError
        The pattern misses entries, seen by one random product; the plan is for other spaces; a
        colouring is not valid (`ColouringError`).
    TypeError
        u, f(u) or the pattern is of another type.

    Notes
    -----
    The tensors of the operator are its nonzeros; they are differentiable functions of u and args.
    Move it to another point by `at`, which repeats the sweeps and nothing else. Inside a transform
    of torch.func what is differentiated must come in by u and args, or the plan from outside.

    Costs as many sweeps as colours, each two to three evaluations of f; memory for a chunk of them.
    The lower bound on colours is the longest row (column). Curtis, Powell and Reid (1974);
    Gebremedhin, Manne and Pothen (2005, doi:10.1137/S0036144504444711).

    Examples
    --------
    >>> import torch
    >>> u = torch.tensor([1.0, 2.0, 3.0, 4.0])
    >>> A = SparseJacobian(lambda u, c: c * u[1:] ** 2 - u[:-1], u, torch.tensor(2.0))
    >>> A.colouring, A.plan.sparsity.source
    (Colouring(2 colours of 4, column; periodic), 'detected')
    >>> A.to_dense()
    tensor([[-1.,  8.,  0.,  0.],
            [ 0., -1., 12.,  0.],
            [ 0.,  0., -1., 16.]])
    >>> A.at(u, torch.tensor(0.0)).values
    tensor([-1.,  0., -1.,  0., -1.,  0.])
    """

    # The values carry the derivatives already.
    _unread = (*Sparse._unread, "residual", "plan")

    def __init__(
        self,
        residual: Callable[..., Tree],
        u: Tree,
        *args: Any,
        sparsity: Any = "detect",
        mode: Mode = "auto",
        colouring: Colouring | Order = "largest_first",
        chunk_size: int | None = None,
        plan: Plan | None = None,
    ) -> None:
        domain = Space.of(u, "u")
        made = plan is None
        if plan is None:
            check_chunk(chunk_size)
            with outside():
                plain: tuple[Tree, tuple[Any, ...]] = plain_values((u, args), MAPPED)
                plan = _jacobian_plan(residual, *plain, sparsity, mode, colouring, chunk_size)
        elif plan.domain != domain or plan.colouring.kind not in ("column", "row"):
            raise ValueError(
                f"plan was made for u in {plan.domain} ({plan.colouring!r}); u has {domain}; "
                "leave the plan out to make a new one"
            )
        self._fill(residual, u, args, plan, verified=made)

    def _fill(
        self,
        residual: Callable[..., Tree],
        u: Tree,
        args: tuple[Any, ...],
        plan: Plan,
        *,
        verified: bool,
    ) -> None:
        flat = _flattened(residual, plan.domain, plan.codomain, args)
        point = plan.domain.ravel(u, "u")
        if plan.colouring.kind == "column":

            def push(v: Tensor) -> Tensor:
                tangent: Tensor = torch.func.jvp(flat, (point,), (v,))[1]
                return tangent

        else:
            pullback = torch.func.vjp(flat, point)[1]

            def push(v: Tensor) -> Tensor:
                cotangent: Tensor = pullback(v)[0]
                return cotangent

        further = direction(plan) if verified else None
        values, image = plan.recovery.values(push, plan.domain.dtype, plan.chunk_size, further)
        Sparse.__init__(
            self, values, plan.sparsity.pattern, domain=plan.domain, codomain=plan.codomain
        )
        self.residual, self.plan = residual, plan
        if image is not None:
            verify(self, plan, image, "residual")

    def at(self, u: Tree, *args: Any, verify: bool | None = None) -> Self:
        """The Jacobian at another point and other arguments; pattern and colouring are kept.

        Parameters
        ----------
        u, *args
            As for the class.
        verify
            Whether one random product is compared, as at the construction: one sweep more, and two
            products. By default where the pattern is not safe for every point: it was given or
            probed, or there are args, which may hold indices. Not inside ``torch.func.vmap``, where
            nothing can be compared.

        Raises
        ------
        ValueError, TypeError
            u is not in the space that the plan was made for; or the pattern misses entries here.
        """
        self.plan.domain.check(u, "u")
        moved = object.__new__(type(self))
        verified = to_try(self.plan, args) if verify is None else verify
        moved._fill(self.residual, u, args, self.plan, verified=verified)
        return moved

    @property
    def colouring(self) -> Colouring:
        """Colours, their number (`Colouring.count`), and how they were found."""
        return self.plan.colouring

    @property
    def colours(self) -> int:
        """Number of colours: of sweeps for all nonzeros."""
        return self.plan.colouring.count

    def _describe(self) -> str:
        return f"{super()._describe()}, {self.colours} colours ({self.plan.colouring.kind})"


def _jacobian_plan(
    residual: Callable[..., Tree],
    u: Tree,
    args: tuple[Any, ...],
    sparsity: Any,
    mode: Mode,
    colouring: Colouring | Order,
    chunk_size: int | None,
) -> Plan:
    domain = Space.of(u, "u")
    with torch.no_grad():
        codomain = Space.of(residual(u, *args), "residual(u)")
    flat = _flattened(residual, domain, codomain, args)
    shape, back = (codomain.size, domain.size), mode == "reverse"
    known = sparsity_of(sparsity, flat, domain.ravel(u), shape, back=back)
    if not isinstance(colouring, Colouring):
        colouring = jacobian_colouring(
            known.pattern,
            mode,
            order=colouring,
            grid=grid_of(domain),
            row_grid=grid_of(codomain),
        )
    elif mode != "auto" and (mode == "forward") != (colouring.kind == "column"):
        raise ValueError(f"mode={mode!r}, but colouring is {colouring!r}")
    recovery = jacobian_recovery(known.pattern, colouring)
    return Plan(domain, codomain, known, colouring, recovery, chunk_size)


def _flattened(
    residual: Callable[..., Tree], domain: Space, codomain: Space, args: tuple[Any, ...]
) -> Callable[[Tensor], Tensor]:
    def flat(v: Tensor) -> Tensor:
        return codomain.ravel(residual(domain.unravel(v), *args), "residual(u)")

    return flat
