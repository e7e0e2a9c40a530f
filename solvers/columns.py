"""Norms of the columns of a block that neither overflow nor underflow: `lengths`, `units`."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(block: Tensor) -> Tensor:
    """Largest entry of each column, by size; zero for no rows."""
    return block.abs().amax(dim=0) if block.shape[0] else block.new_zeros(block.shape[1:])


def divisors(sizes: Tensor) -> Tensor:
    """The sizes, and one for zero."""
    return torch.where(sizes > 0, sizes, 1.0)


def lengths(block: Tensor) -> Tensor:
    """Norms of the columns, also where squares of their entries leave the range of the dtype."""
    size = largest(block)
    return size * torch.linalg.vector_norm(block / divisors(size), dim=0)


def units(block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of norm one, or zero, and the two factors that they were divided by.

    By the largest entry first, so that the norm of a tiny column does not underflow; the product of
    both factors may be out of range where each is not.

    Examples
    --------
    >>> unit, scale, norm = units(torch.tensor([[3e-40], [4e-40]]))
    >>> unit.T, norm
    (tensor([[0.6000, 0.8000]]), tensor([1.2500]))
    """
    scale = divisors(largest(block))
    unit = block / scale
    norm = divisors(torch.linalg.vector_norm(unit, dim=0))
    return unit / norm, scale, norm
