"""Sweeps of an iteration, each from the true residual: `RestartedIteration`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from solvers.iterative import PreparedIteration, applied
from solvers.krylov.products import block_product, vector_product
from solvers.linear_solver import Progress
from solvers.members import Members

# Bytes of a block from which on it is worked on in slabs, and columns that a slab has at least.
SLAB = 1 << 24
NARROW = 16
# Status and detail of a column that met NaN or infinity.
BROKEN = ("breakdown", "a product with A or P, or its size, is not finite")


class RestartedIteration(PreparedIteration):
    """An iteration that runs on a recurrence for its residual, and is not believed.

    When the recurrence says that the columns have converged, ``b - A x`` is measured by a product.
    Where rounding has parted the two, the iteration starts again from the truth, as long as a sweep
    makes the true residual smaller by the factor `worthwhile`.
    """

    worthwhile: ClassVar[float] = 0.5
    stagnation: ClassVar[str] = (
        "rounding keeps the true residual from falling further: loosen rtol, or use a "
        "preconditioner or float64"
    )

    def _growth(self, dtype: torch.dtype) -> float:
        """A sweep that raises the true residual by more than this is taken back."""
        return 1.0

    @cached_property
    def _vector_product(self) -> Callable[[Tensor], Tensor]:
        return vector_product(self.A)

    @cached_property
    def _block_product(self) -> Callable[[Tensor], Tensor]:
        return block_product(self.A)

    def _product(self, block: Tensor) -> Tensor:
        if block.shape[1] == 1 and not isinstance(self.A, Members):
            return self._vector_product(block[:, 0])[:, None]
        return self._block_product(block)

    @abstractmethod
    def _sweep(
        self, x: Tensor, residual: Tensor, active: Tensor, targets: Tensor, progress: Progress
    ) -> Tensor:
        """Improve the active columns of x in place; returns which columns may go on.

        Parameters
        ----------
        x, residual
            Blocks ``(n, k)``; the residual is that of x, and not to be changed.
        active, targets
            Which columns have not converged, and the norm at which each of them does.
        progress
            Counts on; where the limit is reached `_spent` says whether that ends the sweep.
        """

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        width = slab(block)
        if width == block.shape[1] or isinstance(self.A, Members):
            return self._swept(block, targets)
        pairs = zip(block.split(width, 1), targets.split(width), strict=True)
        parts = [self._swept(columns.contiguous(), goals) for columns, goals in pairs]
        total = Progress()
        for _, progress in parts:
            total.include(progress)
        residuals = [progress.residual for _, progress in parts if progress.residual is not None]
        total.residual = torch.cat(residuals, 1)
        return torch.cat([x for x, _ in parts], 1), total

    def _swept(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        progress = self._begun(len(block))
        x, residual = torch.zeros_like(block), block
        size = norms(block)
        active = size > targets
        while bool(active.any()):
            start = x.clone()
            sound = self._sweep(x, residual, active, targets, progress)
            measured = block - applied(self.A, x)
            progress.products += block.shape[1]
            found = norms(measured)
            worse = ~(found <= size * self._growth(block.dtype))  # NaN lands here too
            if bool(worse.any()):
                if not bool(torch.isfinite(found).all()):
                    progress.stopped(*BROKEN)
                x, measured = torch.where(worse, start, x), torch.where(worse, residual, measured)
                found = torch.where(worse, size, found)
            previous, size, residual = size, found, measured
            active = active & sound & ~(size <= targets)
            if progress.status == "maxiter":
                break
            lost = active & ~(size < self.worthwhile * previous)
            if bool(lost.any()):
                progress.stopped("stagnated", self.stagnation)
                active = active & ~lost
        progress.residual = residual
        return x, progress


def slab(block: Tensor) -> int:
    """Columns of a block that are worked on together.

    Arrays of 32 MiB and more are mapped anew by every operation on a CPU, which takes longer than
    the operation, so `SLAB` is half of that; and a few columns at once are slower than one by one.
    """
    n, k = block.shape
    if block.device.type != "cpu" or n * k * block.itemsize <= SLAB:
        return k
    width = SLAB // (n * block.itemsize)
    return width if width >= NARROW else 1


def dots(U: Tensor, V: Tensor) -> Tensor:
    """``<u_j, v_j>`` of the columns of two blocks."""
    if U.shape[1] == 1:
        return torch.dot(U[:, 0], V[:, 0]).reshape(1)
    return (U * V).sum(0)


def norms(block: Tensor) -> Tensor:
    """``|v_j|`` of the columns of a block of moderate size (the norm of torch is slow on a CPU)."""
    return dots(block, block).sqrt()


def norm(v: Tensor) -> float:
    """``|v|`` of one vector."""
    return math.sqrt(float(torch.dot(v, v)))
