"""How a point lies in memory: `by_columns`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

from operators.space import Tree

Result = TypeVar("Result")

# Matrices (n, k) with at most so many columns, and so many times as many rows.
COLUMNS, ROWS = 64, 4


def by_columns(point: Tree) -> Tree:
    """The same values; a tall matrix with few columns is laid out column by column.

    Of ``A y`` autograd then forms the gradient in y as ``(U^T A)^T``, and by rows as ``A^T U``,
    which takes 1.4 to 8 times as long for 3 to 32 columns (MKL on an AMD processor). It is for
    points at which a function is linearised, and swept through again and again.

    Examples
    --------
    >>> import torch
    >>> by_columns(torch.zeros(100, 3)).stride()
    (1, 100)
    """
    return pytree.tree_map(_laid_out, point)


def called_by_columns(function: Callable[[Tree], Result], point: Tree) -> Result:
    """``function(by_columns(point))``, or of the point as it is where the function minds that.

    That is one that takes a ``view`` of the point, which another layout has not.
    """
    laid_out = by_columns(point)
    try:
        return function(laid_out)
    except RuntimeError as error:
        if "view size is not compatible" not in str(error):
            raise
        return function(point)


def _laid_out(leaf: Tensor) -> Tensor:
    if leaf.ndim != 2 or not 1 < leaf.shape[1] <= COLUMNS or leaf.shape[0] < ROWS * leaf.shape[1]:
        return leaf
    return leaf.mT.contiguous().mT
