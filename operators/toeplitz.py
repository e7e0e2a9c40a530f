"""`Toeplitz`: a matrix that is constant along its diagonals."""

from __future__ import annotations

import torch
from scipy.fft import next_fast_len
from torch import Tensor

from operators.circulant import check_line, convolution, transforms, unit
from operators.cost import Cost
from operators.elementary import Diagonal
from operators.linear_operator import LinearOperator, Scalar, sign_of
from operators.space import Space
from operators.structure import Structure


class Toeplitz(LinearOperator):
    """``A_ij = t_(i-j)``: the matrix of a convolution, as of a stationary kernel on a grid.

    Parameters
    ----------
    column
        First column ``(t_0, ..., t_(m-1))``.
    row
        First row ``(t_0, t_(-1), ..., t_(1-n))``; its first entry is not looked at, that of the
        column counts. By default the column: A is then square and symmetric.
    positive_definite, positive_semidefinite
        Claims, probed at the first use; of a symmetric A, which has no `row`.

    Raises
    ------
    ValueError
        A line is no vector, or empty; or a claim is made of an A that has a row.
    TypeError
        A line is no floating tensor, or they differ in dtype or device.
    FalseClaimError
        A claim is false.

    Notes
    -----
    A is a corner of a circulant matrix of size ``L >= m + n - 1``, for which a length is taken that
    the fast Fourier transform likes: a product is three real transforms of that length, of a block
    one and two for each column. Its error is of the order of ``eps log(L) |t| |v|`` in each entry.
    Sums and multiples, those with ``I`` too, are Toeplitz; inverses are not, see `solvers.Toeplitz`
    (Chan and Ng, 1996, doi:10.1137/S0036144594276474).

    Examples
    --------
    >>> import torch
    >>> A = Toeplitz(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0, 6.0]))
    >>> A.to_dense().round()
    tensor([[1., 5., 6.],
            [2., 1., 5.]])
    >>> Toeplitz(torch.tensor([2.0, 1.0, 0.0])).symmetric
    True
    """

    _parameters = ("column", "row")

    def __init__(
        self,
        column: Tensor,
        row: Tensor | None = None,
        *,
        positive_definite: bool = False,
        positive_semidefinite: bool = False,
    ) -> None:
        claims = {
            "positive_definite": positive_definite,
            "positive_semidefinite": positive_semidefinite,
        }
        check_line(column, "column")
        if row is not None:
            check_line(row, "row")
            if (row.dtype, row.device) != (column.dtype, column.device):
                raise TypeError(
                    f"row is {row.dtype} on {row.device}, but column {column.dtype} on "
                    f"{column.device}; expected one dtype and device"
                )
            if any(claims.values()):
                raise ValueError(
                    "a definite matrix is symmetric here, and a symmetric Toeplitz operator is "
                    "given by its column: leave row out, or drop the claim"
                )
        self._hold(column, row, Structure(symmetric=row is None, **claims))
        self._claims = tuple(claim for claim, made in claims.items() if made)

    def _hold(self, column: Tensor, row: Tensor | None, structure: Structure) -> None:
        sizes = (column.shape[0] if row is None else row.shape[0], column.shape[0])
        domain, codomain = (Space.flat(size, column.dtype, column.device) for size in sizes)
        LinearOperator.__init__(self, domain, codomain, structure)
        self.column, self.row = column, row
        self._length = next_fast_len(sum(sizes) - 1, real=True)

    def _derived(
        self, column: Tensor, row: Tensor | None, structure: Structure, *others: LinearOperator
    ) -> Toeplitz:
        """One whose facts follow from those of this one and others."""
        derived = object.__new__(Toeplitz)
        # A factor of a wider dtype would widen a line of one entry.
        row = None if row is None else row.to(self.dtype)
        derived._hold(column.to(self.dtype), row, structure)
        derived._inherit_claims(self, *others)
        return derived

    @property
    def first_row(self) -> Tensor:
        """``(t_0, t_(-1), ..., t_(1-n))``."""
        return self.column if self.row is None else torch.cat([self.column[:1], self.row[1:]])

    def _matvec(self, v: Tensor) -> Tensor:
        return self._matmat(v[:, None])[:, 0]

    def _matmat(self, block: Tensor) -> Tensor:
        m, n = self.shape
        gap = self.column.new_zeros(self._length - m - n + 1)
        cycle = torch.cat([self.column, gap, self.first_row[1:].flip(0)])
        return convolution(cycle, block)[:m]

    def _transpose(self) -> LinearOperator:
        return self._derived(self.first_row, self.column, self.structure.transpose())

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        structure = self.structure.plus(other.structure)
        both = None if self.row is None else self.first_row
        if isinstance(other, Toeplitz):
            column = self.column + other.column
            if both is not None or other.row is not None:
                both = self.first_row + other.first_row
        elif isinstance(other, Diagonal) and other.values.ndim == 0 and other.domain.is_flat:
            column = self.column + other.values * unit(self.column)
        else:
            return None
        return self._derived(column, both, structure, other)

    def _scale(self, factor: Scalar) -> LinearOperator:
        row = None if self.row is None else factor * self.row
        structure = self.structure.times(sign_of(factor))
        return self._derived(factor * self.column, row, structure)

    def _cost(self) -> Cost:
        return transforms(self._length)

    def _exact_diagonal(self) -> Tensor | None:
        square = self.shape[0] == self.shape[1]
        return self.column[0].expand(self.shape[0]) if square else None
