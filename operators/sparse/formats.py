"""Sparse matrices of torch and scipy to nonzeros and `Pattern`, and back."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from operators.sparse import csr
from operators.sparse.pattern import Pattern
from operators.tracing import plainly, readable

Layout = Literal["csr", "coo", "csc"]


def from_torch(tensor: Tensor) -> tuple[Tensor, Pattern]:
    """Nonzeros and pattern of a torch tensor ``(m, n)``: COO (coalesced or not), CSR, CSC, dense.

    Parameters
    ----------
    tensor
        The matrix. Of a dense one, what is nonzero now is kept; of a sparse one, what is stored.

    Returns
    -------
    tuple
        Values ``(nnz,)``, through which gradients reach `tensor`, and the `Pattern`.

    Raises
    ------
    TypeError
        Another layout, a dtype that is not floating, or no tensor.
    ValueError
        Not a matrix.

    Notes
    -----
    Values of CSR, and of COO that is coalesced, are those of `tensor` itself, not copies; so are
    the indices of CSR.

    Examples
    --------
    >>> import torch
    >>> values, pattern = from_torch(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
    >>> values, pattern.columns
    (tensor([2., 3.]), tensor([1, 0]))
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor is a {type(tensor).__name__}; expected a torch tensor (m, n)")
    if tensor.ndim != 2:
        raise ValueError(f"tensor has shape {tuple(tensor.shape)}; expected (m, n)")
    if not tensor.is_floating_point():
        raise TypeError(f"tensor has dtype {tensor.dtype}; expected a floating dtype")
    m, n = tensor.shape
    if tensor.layout == torch.sparse_csr:
        pointers, columns = tensor.crow_indices(), tensor.col_indices()
        if pointers.dtype == torch.int64 and csr.rises(columns, pointers):
            return tensor.values(), Pattern(columns, pointers, (m, n))
        rows = torch.repeat_interleave(pointers.diff())
        return collected(tensor.values(), *Pattern.of(rows, columns, (m, n)))
    if tensor.layout == torch.sparse_csc:
        columns = torch.repeat_interleave(tensor.ccol_indices().diff())
        rows = tensor.row_indices()
        return collected(tensor.values(), *Pattern.of(rows, columns, (m, n)))
    if tensor.layout == torch.sparse_coo:
        if tensor.sparse_dim() != 2:
            raise ValueError(
                f"tensor has {tensor.sparse_dim()} sparse and {tensor.dense_dim()} dense axes; "
                "expected two sparse ones"
            )
        merged = tensor.coalesce()
        rows, columns = merged.indices()
        return collected(merged.values(), *Pattern.of(rows, columns, (m, n)))
    if tensor.layout == torch.strided:
        if not readable(tensor):
            raise ValueError(
                "tensor is dense and mapped over by vmap, so its nonzeros may differ from item to "
                "item; give Sparse(values, pattern)"
            )
        with plainly():
            rows, columns = csr.unwrapped(tensor).nonzero(as_tuple=True)
        pattern, _ = Pattern.of(rows, columns, (m, n))
        return tensor.reshape(-1).index_select(0, pattern.rows * n + pattern.columns), pattern
    raise TypeError(f"tensor is {tensor.layout}; expected COO, CSR, CSC or dense")


def from_scipy(
    matrix: Any, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Tensor, Pattern]:
    """Nonzeros and pattern of a scipy sparse matrix or array of any format.

    Parameters
    ----------
    matrix
        The matrix; duplicates are summed, and stored zeros stay.
    dtype
        Floating dtype of the values; by default that of `matrix`.
    device
        By default the CPU.

    Raises
    ------
    TypeError
        Not a scipy sparse matrix, or one of a dtype that torch has no floating dtype for.
    ValueError
        Not a matrix.

    Notes
    -----
    Values of CSR with sorted indices are those of `matrix` itself, not copies, where dtype and
    device stay.

    Examples
    --------
    >>> import scipy.sparse
    >>> values, pattern = from_scipy(scipy.sparse.eye_array(2, format="csc"))
    >>> values, pattern
    (tensor([1., 1.], dtype=torch.float64), Pattern((2, 2), nnz=2))
    """
    if not scipy.sparse.issparse(matrix):
        raise TypeError(f"matrix is a {type(matrix).__name__}; expected a scipy sparse matrix")
    held: Any = matrix
    if held.ndim != 2:
        raise ValueError(f"matrix has shape {held.shape}; expected (m, n)")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype}; expected a floating dtype")
    if held.dtype.kind == "c" or (dtype is None and held.dtype.kind != "f"):
        raise TypeError(
            f"matrix has dtype {held.dtype}; expected a real floating one"
            + ("" if held.dtype.kind == "c" else ", or say dtype=, such as torch.float64")
        )
    held = held.tocsr()
    if not (held.has_sorted_indices and held.has_canonical_format):
        held = held.copy()  # the caller's stays as it is
        held.sum_duplicates()
    numbers = held.data
    if numbers.dtype not in (np.float16, np.float32, np.float64):
        numbers = numbers.astype(np.float64)
    elif not numbers.flags.writeable:
        numbers = numbers.copy()  # torch has no read-only tensors
    values = torch.from_numpy(numbers).to(device=device or "cpu", dtype=dtype)
    columns, pointers = (
        torch.from_numpy(part.astype(np.int64)) for part in (held.indices, held.indptr)
    )
    m, n = held.shape
    return values, Pattern(columns, pointers, (m, n)).to(values.device)


def to_torch(values: Tensor, pattern: Pattern, layout: Layout = "csr") -> Tensor:
    """Torch tensor of the given sparse layout; CSR and COO share the values, CSR the indices too.

    Raises
    ------
    ValueError
        `layout` is none of the three.
    """
    if layout == "csr":
        return torch.sparse_csr_tensor(
            pattern.row_pointers,
            pattern.columns,
            values,
            size=pattern.shape,
            check_invariants=False,
        )
    if layout == "csc":
        transposed, order = pattern.transpose()
        return torch.sparse_csc_tensor(
            transposed.row_pointers,
            transposed.columns,
            values.index_select(0, order),
            size=pattern.shape,
            check_invariants=False,
        )
    if layout == "coo":
        indices = torch.stack([pattern.rows, pattern.columns])
        return torch.sparse_coo_tensor(
            indices, values, size=pattern.shape, is_coalesced=True, check_invariants=False
        )
    raise ValueError(f"layout={layout!r}; expected 'csr', 'csc' or 'coo'")


def to_scipy(
    values: Tensor, pattern: Pattern, format: Layout = "csr", *, symmetric: bool = False
) -> Any:
    """Scipy sparse array with indices of one type: int32 where it fits, else int64.

    Both index arrays are of that type, as CHOLMOD and SuperLU want them. Values leave the graph of
    autograd. Without copies for CSR on the CPU, and for CSC of a matrix that is symmetric; the
    index arrays belong to the pattern, so they must not be written into.

    Raises
    ------
    ValueError
        `format` is none of the three.
    """
    if format not in ("csr", "csc", "coo"):
        raise ValueError(f"format={format!r}; expected 'csr', 'csc' or 'coo'")
    if format == "csc" and not symmetric:
        transposed, order = pattern.transpose()
        numbers = values.detach().index_select(0, order)
        pointers, indices = transposed.narrow()
    else:
        numbers = values.detach()
        pointers, indices = pattern.narrow()
    parts: Any = tuple(part.cpu().numpy() for part in (numbers, indices, pointers))
    kind = scipy.sparse.csc_array if format == "csc" else scipy.sparse.csr_array
    array = kind(parts, shape=pattern.shape)
    array.has_canonical_format = True
    return array.tocoo() if format == "coo" else array


def collected(values: Tensor, pattern: Pattern, where: Tensor) -> tuple[Tensor, Pattern]:
    """Values in the order of the pattern, those of one place summed; no copy if it is theirs."""
    if len(where) == pattern.nnz and bool((where.diff() > 0).all()):
        return values, pattern
    return values.new_zeros(pattern.nnz).index_add(0, where, values), pattern
