"""Factorisations of matrices in half precision, which LAPACK does not have: `in_single`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def in_single(function: Callable[..., Any], *matrices: Tensor, **settings: Any) -> Any:
    """``function(*matrices)``, of half precision in single and rounded back.

    The floating tensors of the result have the dtype of the first matrix. Of other precisions it is
    the function itself.

    Examples
    --------
    >>> import torch
    >>> in_single(torch.linalg.slogdet, 2 * torch.eye(2, dtype=torch.bfloat16)).logabsdet
    tensor(1.3828, dtype=torch.bfloat16)
    """
    dtype = matrices[0].dtype
    if torch.finfo(dtype).bits >= 32:
        return function(*matrices, **settings)
    results = function(*(matrix.float() for matrix in matrices), **settings)
    return pytree.tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, results)
