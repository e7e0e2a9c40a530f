"""Products with a sparse triangular matrix and its inverse, differentiable in its values."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
from torch import Tensor

from solvers.kernel.kl_pattern import KLPattern
from solvers.preconditioners.entries import array_of, on_arrays
from solvers.sparse.substitution import Substitution

Array = npt.NDArray[Any]
Kind = Literal["U", "U^T", "U^-1", "U^-T"]
TRANSPOSED: dict[Kind, Kind] = {"U": "U^T", "U^T": "U", "U^-1": "U^-T", "U^-T": "U^-1"}


class Triangle:
    """Upper triangular U on a pattern, for products on the CPU; vectors are in order of places.

    Parameters
    ----------
    pattern, values
        ``(nnz,)``, in the order of the pattern.

    Notes
    -----
    Held column by column, in the order of the supernodes, which products do not mind. The inverses
    want the columns in their order and, for one of them, U by rows: both copies are made when they
    are first asked for. Each costs ``2 nnz`` flops a column, at the speed of memory, on one core.
    """

    def __init__(self, pattern: KLPattern, values: Tensor) -> None:
        self.pattern, n = pattern, pattern.size
        data = (array_of(values), pattern.indices, pattern.pointers)
        # U with its columns in the order of the supernodes, and the transpose of that.
        self.matrix = scipy.sparse.csc_array(data, shape=(n, n))
        self.transpose = scipy.sparse.csr_array(data, shape=(n, n))

    def apply(self, kind: Kind, block: Array) -> Array:
        """``U V``, ``U^T V``, ``U^-1 V`` or ``U^-T V`` for ``(n,)`` or ``(n, k)``."""
        product: dict[Kind, Callable[[Array], Array]] = {
            "U": self._forward,
            "U^T": self._backward,
            "U^-1": lambda v: self._upper(v),
            "U^-T": lambda v: self._lower(v),
        }
        return product[kind](block)

    def gram(self, block: Array) -> Array:
        """``U U^T V``."""
        image: Array = self.matrix @ (self.transpose @ block)
        return image

    def _forward(self, v: Array) -> Array:
        image: Array = self.matrix @ v[self.pattern.columns]
        return image

    def _backward(self, v: Array) -> Array:
        image = np.empty_like(v)
        image[self.pattern.columns] = self.transpose @ v
        return image

    @cached_property
    def sorted(self) -> Any:
        """U as a scipy CSC array."""
        inverse = np.empty_like(self.pattern.columns)
        inverse[self.pattern.columns] = np.arange(len(inverse), dtype=inverse.dtype)
        return self.matrix[:, inverse]

    @cached_property
    def _lower(self) -> Substitution:
        return Substitution(self.sorted.T.tocsr(), lower=True)

    @cached_property
    def _upper(self) -> Substitution:
        return Substitution(self.sorted.tocsr(), lower=False)


def applied(triangle: Triangle, values: Tensor, block: Tensor, kind: Kind) -> Tensor:
    """`Triangle.apply` for tensors ``(n,)`` or ``(n, k)``; reverse mode, any number of times.

    Parameters
    ----------
    triangle
        Holds the numbers.
    values
        The same as a tensor, for derivatives.
    block, kind
        As for `Triangle.apply`.
    """
    image: Tensor = _Applied.apply(triangle, kind, values, block)
    return image


class _Applied(torch.autograd.Function):
    @staticmethod
    def forward(triangle: Triangle, kind: Kind, values: Tensor, block: Tensor) -> Tensor:
        columns = block[:, None] if block.ndim == 1 else block
        image = on_arrays(lambda array: triangle.apply(kind, array), columns)
        return image[:, 0] if block.ndim == 1 else image

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.triangle, ctx.kind, values, block = inputs
        ctx.save_for_backward(values, block, output)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        (image_bar,) = outputs
        values, block, image = ctx.saved_tensors
        kind: Kind = ctx.kind
        block_bar = applied(ctx.triangle, values, image_bar, TRANSPOSED[kind])
        values_bar = None
        if ctx.needs_input_grad[2]:
            # <y_bar, dU v>, <y_bar, dU^T v>; with y = U^-1 v, -<U^-T y_bar, dU y>; and so on.
            left, right, sign = {
                "U": (image_bar, block, 1),
                "U^T": (block, image_bar, 1),
                "U^-1": (block_bar, image, -1),
                "U^-T": (image, block_bar, -1),
            }[kind]
            values_bar = sign * _outer(ctx.triangle.pattern, left, right)
        return None, None, values_bar, block_bar


def _outer(pattern: KLPattern, left: Tensor, right: Tensor) -> Tensor:
    """``sum_k left_ik right_jk`` for the places (i, j) of the pattern."""
    i = torch.from_numpy(pattern.indices).to(left.device)
    j = torch.from_numpy(np.repeat(pattern.columns, pattern.last + 1)).to(left.device)
    if left.ndim == 1:
        return left.index_select(0, i) * right.index_select(0, j)
    # Column by column: one array of the size of the values at a time.
    total = left.new_zeros(len(i))
    for a, b in zip(left.unbind(1), right.unbind(1), strict=True):
        total = total + a.index_select(0, i) * b.index_select(0, j)
    return total
