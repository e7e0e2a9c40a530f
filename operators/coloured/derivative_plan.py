"""What a sparse derivative needs besides values: pattern, colouring, recovery; made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from operators.claims import rounding
from operators.coloured.colouring import Colouring
from operators.coloured.recovery import Recovery
from operators.coloured.sparsity import Sparsity, detect, pattern_of, probe
from operators.space import Space
from operators.sparse.matrix import Sparse
from operators.tracing import outside, plain_values, plainly, readable


@dataclass(frozen=True, eq=False)
class Plan:
    """All that does not depend on values: made once, used at every point.

    Parameters
    ----------
    domain, codomain
        Spaces of the argument and of the result.
    sparsity
        The pattern, and how it is known.
    colouring
        Colours of the columns, rows, or unknowns.
    recovery
        How the nonzeros follow from the products.
    chunk_size
        Products at a time.
    """

    domain: Space
    codomain: Space
    sparsity: Sparsity
    colouring: Colouring
    recovery: Recovery
    chunk_size: int | None


def sparsity_of(
    sparsity: Any,
    flat: Callable[[Tensor], Tensor],
    at: Tensor,
    shape: tuple[int, int],
    *,
    back: bool = False,
) -> Sparsity:
    """The pattern that the argument `sparsity` of a sparse derivative asks for."""
    if isinstance(sparsity, str):
        if sparsity not in ("detect", "probe"):
            raise ValueError(
                f"sparsity={sparsity!r}; expected 'detect', 'probe', a Pattern or a matrix"
            )
        return detect(flat, at) if sparsity == "detect" else probe(flat, at, back=back)
    if callable(sparsity):
        sparsity = sparsity(flat, at)
    pattern = pattern_of(sparsity, shape, at.device)
    if isinstance(sparsity, Sparsity):
        return replace(sparsity, pattern=pattern)
    return Sparsity(pattern, "given")


def grid_of(space: Space) -> tuple[int, ...] | None:
    """The grid that the leaves share, those of several leaves along an axis of their own."""
    if len(set(space.shapes)) != 1 or not space.size:
        return None
    return (len(space.shapes), *space.shapes[0])


MAPPED = (
    "u and args cannot be read inside torch.func.vmap, so that no pattern can be found; make the "
    "operator outside and use at(), or give its plan"
)


def check_chunk(chunk_size: int | None) -> None:
    """Raise unless it is a number of products."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}; expected at least 1, or None")


def to_try(plan: Plan, args: tuple[Any, ...]) -> bool:
    """Whether the pattern may miss entries at another point.

    One that was detected does not, for any u; but indices among the arguments may steer it.
    """
    return plan.sparsity.source != "detected" or bool(args)


def direction(plan: Plan) -> Tensor:
    """Vector of a random product that tries the pattern: of the codomain for sweeps back."""
    space = plan.codomain if plan.colouring.kind == "row" else plan.domain
    with plainly():
        generator = torch.Generator(space.device).manual_seed(0)
        drawn = torch.rand(space.size, generator=generator, dtype=space.dtype, device=space.device)
        return drawn + 0.5


def verify(operator: Sparse, plan: Plan, image: Tensor, what: str) -> None:
    """The product with `direction` by what was put together, against the same by a sweep."""
    if not readable(operator.values, image) or not image.numel():
        return
    back = plan.colouring.kind == "row"
    values, expected = plain_values((operator.values, image), MAPPED)
    v = direction(plan)
    with outside(), torch.no_grad():
        A, size_of = (Sparse(x, operator.pattern) for x in (values, values.abs()))
        got = A._rmatvec(v) if back else A._matvec(v)
        size = (size_of._rmatvec(v) if back else size_of._matvec(v)) + expected.abs()
        allowed = torch.finfo(A.dtype).eps ** 0.5 * size
        allowed += rounding(A.dtype) * size.nan_to_num(0.0, 0.0, 0.0).max()
        wrong = (got - expected).abs() > allowed
        if not bool(wrong.any()):
            return
    line = int(wrong.nonzero()[0, 0])
    raise ValueError(
        f"sparsity misses entries of the derivative of {what}: its product with a random vector "
        f"differs in {int(wrong.sum())} {'columns' if back else 'rows'}, the first of them {line} "
        f"({float(got[line]):.6g}, expected {float(expected[line]):.6g}); "
        + (
            "give a pattern that has all of them, or sparsity='detect'"
            if plan.sparsity.source == "given"
            else "give a pattern"
        )
    )
