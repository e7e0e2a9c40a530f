"""Guesses for the next solution made of the last ones: `WarmStart`."""

from __future__ import annotations

from collections import deque
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from operators import LinearOperator
from operators.space import Space
from solvers.matrix import values

Kind = Literal["previous", "linear"]

# A guess that leaves more of b than this is not worth the products that it costs.
WORTHWHILE = 0.9


class WarmStart:
    """The last solutions of a sequence, and the guess that they make.

    The guess is ``c x`` with x the last solution, or ``2 x_{t-1} - x_{t-2}`` where the kind is
    ``"linear"`` and there are two, and with the c that makes ``|b - c A x|`` least. So a
    right-hand side that merely grew or shrank is met at once.

    Parameters
    ----------
    kind
        ``"previous"``, ``"linear"``, or None for no guesses.

    Raises
    ------
    ValueError
        The kind is none of these.
    """

    def __init__(self, kind: Kind | None) -> None:
        if kind is not None and kind not in get_args(Kind):
            raise ValueError(f"warm_start={kind!r}; expected one of {get_args(Kind)}, or None")
        self.kind = kind
        self.solutions: deque[Tensor] = deque(maxlen=2)

    @torch.no_grad()
    def guess(self, A: LinearOperator, b: Any) -> tuple[Tensor | None, float]:
        """The guess for ``A x = b`` and its relative residual, of the worst column.

        None, and 1, where there is none that leaves less than nine tenths of b. It costs a product.
        """
        target = _flat(A.codomain, b)
        if self.kind is None or not self.solutions or target is None:
            return None, 1.0
        x = self.solutions[-1]
        pair = len(self.solutions) == 2 and _alike(*self.solutions)
        if self.kind == "linear" and pair:
            x = 2 * x - self.solutions[0]
        alike = (x.dtype, x.device) == (target.dtype, target.device) == (A.dtype, A.device)
        if not alike or (x.shape, target.shape) != _shapes(A, target) or not target.numel():
            return None, 1.0
        scale, left = least_residual(A @ x, target)
        residual = float(left.max())
        return (scale * x, residual) if residual < WORTHWHILE else (None, 1.0)

    def remember(self, x: Any, space: Space) -> None:
        """Take in the last solution; one of another kind than those before replaces them."""
        flat = _flat(space, x)
        if flat is None or (self.solutions and not _alike(flat, self.solutions[-1])):
            self.solutions.clear()
        if flat is not None and bool(torch.isfinite(flat).all()):
            self.solutions.append(flat)


def least_residual(image: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``c`` of each column that makes ``|b - c image|`` least, and that over ``|b|``."""
    # Divided by the largest entries, so that no square of a tiny column underflows.
    tiny = torch.finfo(b.dtype).tiny
    of_image, of_b = (block.abs().amax(0).clamp_min(tiny) for block in (image, b))
    u, v = image / of_image, b / of_b
    square = (u * u).sum(0)
    factor = (u * v).sum(0) / torch.where(square > 0, square, 1.0)
    norm = torch.linalg.vector_norm(v, dim=0)
    left = torch.linalg.vector_norm(v - factor * u, dim=0) / torch.where(norm > 0, norm, 1.0)
    return factor * (of_b / of_image), left


def _flat(space: Space, tree: Any) -> Tensor | None:
    """The values of a vector, block or nested structure; None of what the solver will refuse."""
    plain = values(tree)
    if plain is not None and not space.is_flat and space.holds(plain):
        return space.ravel(plain)
    return plain if isinstance(plain, Tensor) else None


def _shapes(A: LinearOperator, b: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes that belong together: of x, and of b with its number of columns."""
    columns = tuple(b.shape[1:2])
    return (A.shape[1], *columns), (A.shape[0], *columns)


def _alike(x: Tensor, y: Tensor) -> bool:
    return (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
