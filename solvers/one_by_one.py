"""LU factorisations of batches, which torch's own loop over a batch gets wrong: `one_by_one`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# Below, LAPACK factorises on one thread, and a batch at once is faster.
SIDE_BY_SIDE = 64


def one_by_one(function: Callable[..., Any], *matrices: Tensor, **settings: Any) -> Any:
    """``function(*matrices)``, of larger matrices on a CPU member by member of their batch.

    For whatever factorises by LU: `torch.linalg.lu_factor_ex`, ``inv_ex``, ``solve_ex``,
    ``slogdet``. After a call of `torch.set_num_threads` with more than one thread, torch (2.13, and
    before) runs LAPACK's threaded LU on several members at the same time, which it is not made for:
    it returns wrong numbers, or never (pytorch issue 141358). A batch that `torch.func.vmap` hides
    is not seen here.

    Parameters
    ----------
    function
        Of matrices ``(..., n, n)`` and blocks ``(..., n, k)``; returns tensors or tuples of such.
    *matrices
        With the same leading axes.
    **settings
        Handed on.

    Examples
    --------
    >>> import torch
    >>> pair = torch.stack([2 * torch.eye(100), 4 * torch.eye(100)])
    >>> one_by_one(torch.linalg.inv_ex, pair).inverse[:, 0, 0]
    tensor([0.5000, 0.2500])
    """
    first = matrices[0]
    batch = first.shape[:-2]
    small = first.shape[-1] <= SIDE_BY_SIDE
    if small or batch.numel() <= 1 or first.device.type != "cpu":
        return function(*matrices, **settings)
    members = zip(*(matrix.flatten(0, -3) for matrix in matrices), strict=True)
    results = [function(*member, **settings) for member in members]
    return pytree.tree_map(lambda *parts: torch.stack(parts).unflatten(0, batch), *results)
