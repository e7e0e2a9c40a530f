"""`Circulant`: cyclic convolution, diagonal in the Fourier basis."""

from __future__ import annotations

from math import log2

import torch
from torch import Tensor

from operators.claims import FalseClaimError
from operators.cost import Cost
from operators.elementary import Diagonal
from operators.linear_operator import LinearOperator, Scalar, sign_of
from operators.space import Space
from operators.structure import Structure
from operators.tracing import readable


def convolution(column: Tensor, block: Tensor) -> Tensor:
    """Cyclic convolution of ``(L,)`` with each column of ``(n, k)``, n <= L: ``(L, k)``."""
    size = column.shape[0]
    if block.shape[1] == 0:
        return block.new_zeros(size, 0)
    # Rows are what the transform is fast along.
    rows = torch.fft.rfft(_wide(block).T.contiguous(), n=size)
    return torch.fft.irfft(torch.fft.rfft(_wide(column)) * rows, n=size).T.to(block.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """In a precision that the transform knows."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def check_line(line: Tensor, name: str) -> None:
    """Raise unless `line` is a floating vector with an entry at least."""
    if not isinstance(line, Tensor):
        raise TypeError(f"{name} is a {type(line).__name__}; expected a tensor (n,)")
    if line.ndim != 1 or line.shape[0] == 0:
        raise ValueError(f"{name} has shape {tuple(line.shape)}; expected (n,) with n >= 1")


class Circulant(LinearOperator):
    """``A_ij = c_(i-j mod n)``: the cyclic convolution ``A v = c * v``.

    Parameters
    ----------
    column
        ``c``, the first column, ``(n,)``.
    symmetric, positive_definite, positive_semidefinite
        Claims. Symmetry, ``c_i = c_(n-i)``, is compared here, up to rounding; definiteness is
        probed at the first use.

    Raises
    ------
    ValueError
        `column` is no vector, or empty.
    TypeError
        `column` is no floating tensor.
    FalseClaimError
        A claim is false.

    Notes
    -----
    With the discrete Fourier transform F, ``A = F^-1 diag(F c) F``: a product is three real
    transforms, ``O(n log n)``, of a block one of c and two of the block; n numbers are held.
    Lengths n with large prime factors are slower. Sums and multiples, those with ``I`` too, are
    circulant; the diagonal, the trace and ``log |det A| = sum log |F c|`` are exact (Davis, 1979,
    *Circulant Matrices*, chapter 3). The entries of a symmetric column are independent variables.

    Examples
    --------
    >>> import torch
    >>> A = Circulant(torch.tensor([1.0, 2.0, 3.0]))
    >>> A.to_dense().round()
    tensor([[1., 3., 2.],
            [2., 1., 3.],
            [3., 2., 1.]])
    """

    _parameters = ("column",)

    def __init__(
        self,
        column: Tensor,
        *,
        symmetric: bool = False,
        positive_definite: bool = False,
        positive_semidefinite: bool = False,
    ) -> None:
        check_line(column, "column")
        claims = {
            "symmetric": symmetric,
            "positive_definite": positive_definite,
            "positive_semidefinite": positive_semidefinite,
        }
        space = Space.flat(column.shape[0], column.dtype, column.device)
        super().__init__(space, space, Structure(**claims))
        self.column = column
        if self.symmetric and readable(column):
            self._compare_mirrors()
            claims.pop("symmetric")
        self._claims = tuple(claim for claim, made in claims.items() if made)

    def _compare_mirrors(self) -> None:
        c = self.column.detach()
        gap, scale = (c - reversed_column(c)).abs().max(), c.abs().max()
        if bool(gap > 100 * torch.finfo(c.dtype).eps * scale):
            raise FalseClaimError(
                f"column is claimed to be that of a symmetric matrix, but max |c_i - c_(n-i)| = "
                f"{float(gap):.3g} with max |c| = {float(scale):.3g}; drop the claim"
            )

    def eigenvalues(self) -> Tensor:
        """The first ``n // 2 + 1`` entries of ``F c``, complex; the others are their conjugates."""
        return torch.fft.rfft(_wide(self.column))

    def inverse(self) -> Circulant:
        """``A^-1``, the circulant of ``F^-1 (1 / F c)``.

        Raises
        ------
        ValueError
            An eigenvalue is zero to working precision.
        """
        eigenvalues = self.eigenvalues()
        if readable(self.column) and vanishing(eigenvalues):
            raise ValueError(f"{self!r} is singular; it has no inverse")
        column = torch.fft.irfft(1 / eigenvalues, n=self.shape[0])
        return self._derived(column, self.structure.inverse())

    def _derived(self, column: Tensor, structure: Structure, *others: LinearOperator) -> Circulant:
        """One whose facts follow from those of this one and others."""
        derived = object.__new__(Circulant)
        LinearOperator.__init__(derived, self.domain, self.domain, structure)
        # A factor of a wider dtype would widen a column that is a scalar tensor.
        derived.column = column.to(self.dtype)
        derived._inherit_claims(self, *others)
        return derived

    def _matvec(self, v: Tensor) -> Tensor:
        return convolution(self.column, v[:, None])[:, 0]

    def _matmat(self, block: Tensor) -> Tensor:
        return convolution(self.column, block)

    def _transpose(self) -> LinearOperator:
        return self._derived(reversed_column(self.column), self.structure.transpose())

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        if isinstance(other, Circulant):
            column = self.column + other.column
        elif isinstance(other, Diagonal) and other.values.ndim == 0 and other.domain.is_flat:
            column = self.column + other.values * unit(self.column)
        else:
            return None
        return self._derived(column, self.structure.plus(other.structure), other)

    def _scale(self, factor: Scalar) -> LinearOperator:
        return self._derived(factor * self.column, self.structure.times(sign_of(factor)))

    def _cost(self) -> Cost:
        return transforms(self.shape[0])

    def _exact_diagonal(self) -> Tensor:
        return self.column[0].expand(self.shape[0])

    def _exact_logdet(self) -> Tensor:
        return torch.fft.fft(_wide(self.column)).abs().log().sum().to(self.dtype)


def reversed_column(column: Tensor) -> Tensor:
    """Column ``c_(-i mod n)`` of the transpose."""
    return column.flip(0).roll(1)


def unit(line: Tensor) -> Tensor:
    """First unit vector like `line`."""
    first = torch.arange(line.shape[0], device=line.device) == 0
    return first.to(line.dtype)


def vanishing(eigenvalues: Tensor) -> bool:
    """Whether one is zero up to the rounding of the transform."""
    size = eigenvalues.detach().abs()
    return not bool(size.min() > 10 * torch.finfo(size.dtype).eps * size.max())


def transforms(size: int) -> Cost:
    """Cost of three real transforms, ``5/2 L log2 L`` flops each, and the product between."""
    return Cost(flops=round(7.5 * size * log2(max(size, 2))) + 3 * size)
