"""What the machine allows: a copy of as many bytes, a matrix product of as many flops.

They are timed in turn with the rivals: a busy machine slows both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def copy(traffic: float) -> Callable[[], Tensor]:
    """A copy that reads and writes `traffic` bytes, half of them each."""
    source = torch.ones(round(traffic / 2), dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def matrix_product(flops: float, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """A product of two square matrices that takes `flops`, about the best that a BLAS does."""
    n = round((flops / 2) ** (1 / 3))
    matrix = torch.ones(n, n, dtype=dtype)
    return lambda: matrix @ matrix
