"""Operators held entry by entry: `Identity`, `Diagonal`, `Dense`."""

from __future__ import annotations

import torch
from torch import Tensor

from operators.linear_operator import LinearOperator, Scalar, sign_of
from operators.space import Space
from operators.structure import Structure


class Diagonal(LinearOperator):
    """``A = diag(d)``.

    Parameters
    ----------
    values
        ``d``, of shape ``(n,)``; or a scalar tensor together with `space`, for ``d I``.
    space
        Space that it acts on; by default plain vectors ``(n,)``.
    positive_definite
        Claim that all of ``d`` is positive. By default it is looked up, which reads the values.
    positive_semidefinite
        Claim that none of ``d`` is negative; looked up where `positive_definite` is.

    Raises
    ------
    ValueError
        `values` is neither ``(n,)`` nor a scalar with a space, or does not fit the space.
    TypeError
        `values` is not of a floating dtype, or not of that of the space.

    Examples
    --------
    >>> import torch
    >>> Diagonal(torch.tensor([1.0, 2.0])) @ torch.tensor([3.0, 4.0])
    tensor([3., 8.])
    """

    def __init__(
        self,
        values: Tensor,
        space: Space | None = None,
        *,
        positive_definite: bool | None = None,
        positive_semidefinite: bool = False,
    ) -> None:
        if space is None:
            if values.ndim != 1:
                raise ValueError(
                    f"values has shape {tuple(values.shape)}; "
                    "expected (n,), or a scalar and a space"
                )
            space = Space.flat(values.shape[0], values.dtype, values.device)
        elif values.shape not in (torch.Size([]), torch.Size([space.size])):
            raise ValueError(
                f"values has shape {tuple(values.shape)}; expected () or ({space.size},)"
            )
        if values.dtype != space.dtype:
            raise TypeError(f"values has dtype {values.dtype}, but the space has {space.dtype}")
        if positive_definite is None:
            positive_definite = bool((values > 0).all())
            positive_semidefinite = bool((values >= 0).all())
        structure = Structure(
            diagonal=True,
            positive_definite=positive_definite,
            positive_semidefinite=positive_semidefinite,
        )
        super().__init__(space, space, structure)
        self.values = values
        # c, for c times an Identity of which only the size was said; see `_like`.
        self._untyped_multiple: Scalar | None = None

    @property
    def low_rank_plus_diagonal(self) -> bool:
        """True: the low-rank part is empty."""
        return True

    def _like(self, other: LinearOperator) -> LinearOperator:
        """``c I`` on the space of `other`, where only its size was said; else unchanged."""
        c = self._untyped_multiple
        if c is None or self.shape != other.shape or other.domain != other.codomain:
            return self
        return Identity(other.domain) * c

    def _matvec(self, v: Tensor) -> Tensor:
        return self.values * v

    def _matmat(self, block: Tensor) -> Tensor:
        return (self.values if self.values.ndim == 0 else self.values[:, None]) * block

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        if not isinstance(other, Diagonal):
            return None
        structure = self.structure.plus(other.structure)
        space = other.domain if self.domain.is_flat else self.domain
        return Diagonal(
            self.values + other.values,
            space,
            positive_definite=structure.positive_definite,
            positive_semidefinite=structure.positive_semidefinite,
        )

    def _scale(self, factor: Scalar) -> LinearOperator:
        structure = self.structure.times(sign_of(factor))
        scaled = Diagonal(
            # A scalar tensor of a wider dtype would widen values that are a scalar tensor too.
            (factor * self.values).to(self.dtype),
            self.domain,
            positive_definite=structure.positive_definite,
            positive_semidefinite=structure.positive_semidefinite,
        )
        if self._untyped_multiple is not None:
            scaled._untyped_multiple = factor * self._untyped_multiple
        return scaled


class Identity(Diagonal):
    """``I`` on R^n, or on the space of a nested structure.

    Parameters
    ----------
    space
        Size n, or a `Space`.
    dtype, device
        For a size; by default torch's default dtype on the CPU. In a sum, a multiple of an Identity
        that was made from a size alone takes the dtype, device and space of the other term.

    Examples
    --------
    >>> import torch
    >>> (0.5 * Identity(2)) @ torch.tensor([3.0, 4.0])
    tensor([1.5000, 2.0000])
    >>> (Dense(torch.eye(2, dtype=torch.float64)) + 0.1 * Identity(2)).to_dense()[0]
    tensor([1.1000, 0.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        space: int | Space,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        untyped = isinstance(space, int) and dtype is None and device is None
        if isinstance(space, int):
            space = Space.flat(space, dtype or torch.get_default_dtype(), device or "cpu")
        one = torch.ones((), dtype=space.dtype, device=space.device)
        super().__init__(one, space, positive_definite=True)
        self._untyped_multiple = 1.0 if untyped else None


class Dense(LinearOperator):
    """A matrix ``(m, n)``.

    Parameters
    ----------
    matrix
        Tensor of shape ``(m, n)``.
    symmetric, positive_definite
        Claims about it. ``symmetric`` is checked here (an exact comparison up to rounding, one
        pass); ``positive_definite`` is taken as promised and found out by a Cholesky factorisation.

    Raises
    ------
    ValueError
        Not a matrix, or claimed symmetric and not so.

    Examples
    --------
    >>> import torch
    >>> A = Dense(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    >>> A.T @ torch.tensor([1.0, 2.0])
    tensor([0., 1.])
    """

    def __init__(
        self, matrix: Tensor, *, symmetric: bool = False, positive_definite: bool = False
    ) -> None:
        if matrix.ndim != 2:
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}; expected (m, n)")
        structure = Structure(symmetric=symmetric, positive_definite=positive_definite)
        m, n = matrix.shape
        dtype, device = matrix.dtype, matrix.device
        super().__init__(Space.flat(n, dtype, device), Space.flat(m, dtype, device), structure)
        if self.symmetric:
            asymmetry = (matrix - matrix.T).abs().max() if matrix.numel() else matrix.new_zeros(())
            scale = matrix.abs().max() if matrix.numel() else matrix.new_ones(())
            if asymmetry > 100 * torch.finfo(dtype).eps * scale:
                raise ValueError(
                    f"matrix is claimed symmetric, but max |A - A^T| = {float(asymmetry):.3g} "
                    f"with max |A| = {float(scale):.3g}; drop the claim or symmetrise it"
                )
        self.matrix = matrix

    def _matvec(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def _matmat(self, block: Tensor) -> Tensor:
        return self.matrix @ block

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.matrix.T @ v

    def _transpose(self) -> LinearOperator:
        return Dense(self.matrix.T)

    def to_dense(self) -> Tensor:
        """The matrix itself; no copy."""
        return self.matrix
