"""Between torch and the CPU libraries: the entries of an operator, and blocks as arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from operators import Dense, LinearOperator, Sparse
from operators.sparse.formats import to_scipy
from solvers.solution import SingularError
from solvers.sparse.matrix import sparse_of

# float32 or float64, as scipy and pyamg calculate in.
Array = npt.NDArray[Any]


def csr_of(A: LinearOperator, name: str) -> Any:
    """Scipy CSR array of an operator that is held by its nonzeros, or dense; indices are sorted.

    Narrow dtypes become float32. The arrays may be those of A: they must not be written into.

    Raises
    ------
    StructureError
        A does not know its entries.
    ValueError
        An entry is NaN or infinite.
    """
    A.check_claims()
    held = Sparse(A.matrix.detach()) if isinstance(A, Dense) else sparse_of(A, name)
    values = held.values.detach().cpu()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name}: {A!r} holds NaN or infinite entries; expected finite numbers")
    return to_scipy(values if _native(values.dtype) else values.float(), held.pattern.to("cpu"))


def _native(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.float64)


def array_of(tensor: Tensor) -> Array:
    """Array of float32 or float64; shares the memory of a tensor of these on the CPU."""
    tensor = tensor.detach()
    wide = tensor if _native(tensor.dtype) else tensor.float()
    return wide.contiguous().cpu().numpy()


def on_arrays(function: Callable[[Array], Array], block: Tensor) -> Tensor:
    """A function of arrays for a block ``(n, k)``; a single column goes in and out as ``(n,)``."""
    k = block.shape[1]
    array = array_of(block)
    image = function(array[:, 0] if k == 1 else array)
    if min(image.strides) < 0:  # torch counts upwards
        image = image.copy()
    return torch.from_numpy(image).reshape(len(image), k).to(device=block.device, dtype=block.dtype)


def nonzero_diagonal(A: LinearOperator, diagonal: Tensor, name: str) -> Tensor:
    """The diagonal, if it has no zeros.

    Raises
    ------
    SingularError
        It has; the first row is named.
    """
    zeros = (diagonal == 0).nonzero()
    if len(zeros):
        raise SingularError(
            f"{name}: the diagonal of {A!r} is zero in row {int(zeros[0])} (and {len(zeros) - 1} "
            "others); add damping, as A + 1e-3 * Identity, or take a preconditioner that pivots, "
            "as IncompleteLU"
        )
    return diagonal
