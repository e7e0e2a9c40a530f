"""What a sparse derivative needs besides values: pattern, colouring, recovery; made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils import _pytree as pytree

from operators.claims import rounding
from operators.coloured.colouring import Colouring
from operators.coloured.recovery import Recovery
from operators.coloured.sparsity import Sparsity, detect, pattern_of, probe
from operators.space import Space, Tree
from operators.sparse.matrix import Sparse
from operators.tracing import readable


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
    sparsity: Any, flat: Callable[[Tensor], Tensor], at: Tensor, shape: tuple[int, int]
) -> Sparsity:
    """The pattern that the argument `sparsity` of a sparse derivative asks for."""
    if isinstance(sparsity, str):
        if sparsity not in ("detect", "probe"):
            raise ValueError(
                f"sparsity={sparsity!r}; expected 'detect', 'probe', a Pattern or a matrix"
            )
        return (detect if sparsity == "detect" else probe)(flat, at)
    pattern = pattern_of(sparsity, shape, at.device)
    if isinstance(sparsity, Sparsity):
        return replace(sparsity, pattern=pattern)
    return Sparsity(pattern, "given")


def grid_of(space: Space) -> tuple[int, ...] | None:
    """The grid that the leaves share, those of several leaves along an axis of their own."""
    if len(set(space.shapes)) != 1 or not space.size:
        return None
    return (len(space.shapes), *space.shapes[0])


def plain_values(tree: Tree, name: str) -> Any:
    """Values without history or transforms: the pattern depends on neither."""

    def stripped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not readable(leaf):
            raise ValueError(
                f"{name} cannot be read inside torch.func.vmap, so that no pattern can be found; "
                "make the operator outside and use at(), or give its plan"
            )
        while _functorch.is_functorch_wrapped_tensor(leaf):
            leaf = _functorch.get_unwrapped(leaf)
        return leaf.detach()

    return pytree.tree_map(stripped, tree)


def check_chunk(chunk_size: int | None) -> None:
    """Raise unless it is a number of products."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}; expected at least 1, or None")


def verify(
    operator: Sparse,
    plan: Plan,
    function: Callable[[Tensor], Tensor],
    at: Tensor,
    what: str,
) -> None:
    """One random product with what was put together, against the same by a forward sweep."""
    if not readable(operator.values) or not plan.domain.size or not plan.codomain.size:
        return
    values = plain_values(operator.values, "values")
    with temporarily_clear_interpreter_stack(), torch.no_grad():
        A = Sparse(values, operator.pattern)
        generator = torch.Generator(values.device).manual_seed(0)
        v = torch.rand(A.shape[1], generator=generator, dtype=A.dtype, device=A.device) + 0.5
        expected, got = torch.func.jvp(function, (at,), (v,))[1], A @ v
        size = Sparse(values.abs(), operator.pattern) @ v + expected.abs()
    allowed = torch.finfo(A.dtype).eps ** 0.5 * size
    allowed += rounding(A.dtype) * size.nan_to_num(0.0, 0.0, 0.0).max()
    wrong = (got - expected).abs() > allowed
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"sparsity misses entries of the derivative of {what}: its product with a random "
            f"vector differs in {int(wrong.sum())} rows, the first of them {row} "
            f"({float(got[row]):.6g}, expected {float(expected[row]):.6g}); "
            + (
                "give a pattern that has all of them, or sparsity='detect'"
                if plan.sparsity.source == "given"
                else "give a pattern"
            )
        )
