"""Operators held entry by entry: `Identity`, `Diagonal`, `Dense`."""

from __future__ import annotations

from operator import index
from typing import ClassVar

import torch
from torch import Tensor

from operators.claims import FalseClaimError, rounding
from operators.cost import Cost
from operators.linear_operator import LinearOperator, Scalar, sign_of
from operators.precision import in_single
from operators.space import Space, check_tensor
from operators.structure import Structure
from operators.tracing import readable


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

    _parameters: ClassVar[tuple[str, ...]] = ("_values",)

    def __init__(
        self,
        values: Tensor,
        space: Space | None = None,
        *,
        positive_definite: bool | None = None,
        positive_semidefinite: bool = False,
    ) -> None:
        check_tensor(values, "values", "(n,)")
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
        if not values.is_floating_point():
            raise TypeError(f"Diagonal of dtype {values.dtype}; expected a floating dtype")
        claims = {
            "positive_definite": bool(positive_definite),
            "positive_semidefinite": positive_semidefinite,
        }
        structure = Structure(diagonal=True, **claims)
        if positive_definite is None and not positive_semidefinite and readable(values):
            structure = Structure(
                diagonal=True,
                positive_definite=bool((values > 0).all()),
                positive_semidefinite=bool((values >= 0).all()),
            )
        super().__init__(space, space, structure)
        self._claims = tuple(claim for claim, made in claims.items() if made)
        self._values = values

    @property
    def values(self) -> Tensor:
        """``d``: ``(n,)``, or a scalar for ``d I``."""
        # Those of an untyped multiple of I are held in double precision.
        return self._values.to(self.dtype)

    @property
    def low_rank_plus_diagonal(self) -> bool:
        """True: the low-rank part is empty."""
        return True

    @property
    def sparse(self) -> bool:
        """True."""
        return True

    def _cost(self) -> Cost:
        return Cost(flops=self.shape[0])

    def _exact_diagonal(self) -> Tensor:
        return self.values.expand(self.shape[0])

    def submatrix(self, rows: Tensor, columns: Tensor) -> Tensor:
        """``d_i`` where ``i = j``, else zero; see `LinearOperator.submatrix`."""
        met = rows[..., :, None] == columns[..., None, :]
        return self._exact_diagonal()[rows][..., :, None] * met

    def _try_claims(self) -> bool:
        claim = next((c for c in self._claims if c.startswith("positive")), None)
        if claim is None or not readable(self.values):
            return claim is None
        definite = "positive_definite" in self._claims
        claim = "positive_definite" if definite else claim
        wrong = self.values <= 0 if definite else self.values < 0
        if bool(wrong.any()):
            raise FalseClaimError(
                f"{self!r} is claimed {claim.replace('_', ' ')} "
                f"({claim}=True), but its smallest entry is "
                f"{float(self.values.min()):.3g}; drop the claim"
            )
        return True

    def _on(self, space: Space) -> LinearOperator:
        if not self._untyped or self.shape[0] != space.size:
            return self
        if isinstance(self, Identity):
            return Identity(space)
        values, structure = self._values, self.structure
        # What is small in double precision may vanish; see `sign_of`.
        vanishes = readable(values) and bool((values < torch.finfo(space.dtype).tiny).any())
        if structure.positive_definite and vanishes:
            structure = Structure(diagonal=True, positive_semidefinite=True)
        return self._derived(values.to(dtype=space.dtype, device=space.device), space, structure)

    def _matvec(self, v: Tensor) -> Tensor:
        return self.values * v

    def _matmat(self, block: Tensor) -> Tensor:
        return (self.values if self.values.ndim == 0 else self.values[:, None]) * block

    def _derived(
        self, values: Tensor, space: Space, structure: Structure, *others: Diagonal
    ) -> Diagonal:
        """Diagonal whose facts follow from those of this one and others."""
        derived = object.__new__(Diagonal)
        LinearOperator.__init__(derived, space, space, structure)
        derived._values = values
        derived._inherit_claims(self, *others)
        return derived

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        if not isinstance(other, Diagonal):
            return None
        space = other.domain if self.domain.is_flat else self.domain
        structure = self.structure.plus(other.structure)
        total = self._derived(self._values + other._values, space, structure, other)
        total._untyped = self._untyped and other._untyped
        return total

    def _scale(self, factor: Scalar) -> LinearOperator:
        structure = self.structure.times(sign_of(factor, self._values.dtype))
        # A factor of a wider dtype would widen values that are a scalar tensor too.
        values = (factor * self._values).to(self._values.dtype)
        scaled = self._derived(values, self.domain, structure)
        scaled._untyped = self._untyped
        return scaled

    def _compose(self, other: LinearOperator) -> LinearOperator | None:
        if isinstance(other, Diagonal):
            space = other.domain if self.domain.is_flat else self.domain
            structure = self.structure.compose(other.structure)
            product = self._derived(self._values * other._values, space, structure, other)
            product._untyped = self._untyped and other._untyped
            return product
        return None


class Identity(Diagonal):
    """``I`` on R^n, or on the space of a nested structure.

    Parameters
    ----------
    space
        Size n, or a `Space`.
    dtype, device
        For a size; by default torch's default dtype on the CPU. In a sum or a product, a multiple
        of an Identity that was made from a size alone takes the dtype, device and space of the
        other operand.

    Raises
    ------
    TypeError
        `space` is neither an integer nor a `Space`.

    Examples
    --------
    >>> import torch
    >>> (0.5 * Identity(2)) @ torch.tensor([3.0, 4.0])
    tensor([1.5000, 2.0000])
    >>> (Dense(torch.eye(2, dtype=torch.float64)) + 0.1 * Identity(2)).to_dense()[0]
    tensor([1.1000, 0.0000], dtype=torch.float64)
    """

    _parameters = ()

    def __init__(
        self,
        space: int | Space,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        untyped = not isinstance(space, Space) and dtype is None and device is None
        if not isinstance(space, Space):
            try:
                size = index(space)
            except TypeError:
                raise TypeError(
                    f"space is a {type(space).__name__}; expected a size or a Space"
                ) from None
            if size < 0:
                raise ValueError(f"space={size}; expected a size n >= 0")
            space = Space.flat(size, dtype or torch.get_default_dtype(), device or "cpu")
        structure = Structure(diagonal=True, positive_definite=True)
        LinearOperator.__init__(self, space, space, structure)
        self._untyped = untyped

    # The one value is no variable, so it is no attribute either; in float64 until the dtype is
    # known, so that 0.1 I is as exact as it may be.
    @property
    def _values(self) -> Tensor:  # type: ignore[override]
        dtype = torch.float64 if self._untyped else self.dtype
        return torch.ones((), dtype=dtype, device=self.device)

    def _compose(self, other: LinearOperator) -> LinearOperator | None:
        # It falls out where it brings no space that the other operand lacks.
        if self.domain.is_flat or self.domain == other.codomain:
            return other
        return super()._compose(other)

    def _rcompose(self, other: LinearOperator) -> LinearOperator | None:
        return other if self.domain.is_flat or self.domain == other.domain else None


class Dense(LinearOperator):
    """A matrix ``(m, n)``.

    Parameters
    ----------
    matrix
        Tensor of shape ``(m, n)``.
    symmetric, positive_definite, positive_semidefinite, lower_triangular, upper_triangular
        Claims about it. What they say of single entries is compared here, up to rounding, in one
        pass; definiteness is probed at the first use (`check_claims`).

    Raises
    ------
    ValueError
        Not a matrix.
    TypeError
        Not a dense floating tensor.
    FalseClaimError
        A claim is false.

    Examples
    --------
    >>> import torch
    >>> A = Dense(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    >>> A.T @ torch.tensor([1.0, 2.0])
    tensor([0., 1.])
    """

    _parameters = ("matrix",)

    def __init__(
        self,
        matrix: Tensor,
        *,
        symmetric: bool = False,
        positive_definite: bool = False,
        positive_semidefinite: bool = False,
        lower_triangular: bool = False,
        upper_triangular: bool = False,
    ) -> None:
        check_tensor(matrix, "matrix", "(m, n)")
        if matrix.ndim != 2:
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}; expected (m, n)")
        if matrix.layout != torch.strided:
            raise TypeError(f"matrix is {matrix.layout}; a sparse matrix goes into Sparse")
        claims = {
            "symmetric": symmetric,
            "positive_definite": positive_definite,
            "positive_semidefinite": positive_semidefinite,
            "lower_triangular": lower_triangular,
            "upper_triangular": upper_triangular,
        }
        m, n = matrix.shape
        dtype, device = matrix.dtype, matrix.device
        domain, codomain = Space.flat(n, dtype, device), Space.flat(m, dtype, device)
        super().__init__(domain, codomain, Structure(**claims))
        self.matrix = matrix
        if readable(matrix):
            self._compare_triangles()
            claims = {c: made for c, made in claims.items() if c.startswith("positive")}
        self._claims = tuple(claim for claim, made in claims.items() if made)

    def _compare_triangles(self) -> None:
        """What a claim says of single entries is looked up, in one pass."""
        A = self.matrix.detach()
        if not A.numel():
            return
        entrywise = (
            ("symmetric", self.symmetric, lambda: asymmetry(A), "|A - A^T|"),
            ("lower_triangular", self.lower_triangular, lambda: A.triu(1), "|A_ij| for i < j"),
            ("upper_triangular", self.upper_triangular, lambda: A.tril(-1), "|A_ij| for i > j"),
        )
        for claim, made, excess, what in entrywise:
            if not made:
                continue
            largest, scale = largest_entry(excess()), largest_entry(A)
            # NaN passes: a solver that meets it says what it is.
            if bool(largest > rounding(A.dtype) * scale):
                raise FalseClaimError(
                    f"matrix is claimed {claim.replace('_', ' ')}, but max {what} = "
                    f"{float(largest):.3g} with max |A| = {float(scale):.3g}; "
                    "drop the claim or repair the matrix"
                )

    def _matvec(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def _matmat(self, block: Tensor) -> Tensor:
        return self.matrix @ block

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.matrix.T @ v

    def _transpose(self) -> LinearOperator:
        return self._derived(self.matrix.T, self.structure.transpose())

    def _derived(self, matrix: Tensor, structure: Structure) -> Dense:
        """Matrix whose facts follow from those of others: neither looked up nor claimed."""
        derived = object.__new__(Dense)
        m, n = matrix.shape
        domain, codomain = (Space.flat(k, matrix.dtype, matrix.device) for k in (n, m))
        LinearOperator.__init__(derived, domain, codomain, structure)
        derived.matrix = matrix
        derived._inherit_claims(self)
        return derived

    def _cost(self) -> Cost:
        return Cost(flops=2 * self.shape[0] * self.shape[1])

    def _exact_diagonal(self) -> Tensor | None:
        return self.matrix.diagonal() if self.shape[0] == self.shape[1] else None

    def submatrix(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Entries, looked up; see `LinearOperator.submatrix`."""
        return self.matrix[rows[..., :, None], columns[..., None, :]]

    def _exact_logdet(self) -> Tensor | None:
        if self.shape[0] != self.shape[1]:
            return None
        logabsdet: Tensor = in_single(torch.linalg.slogdet, self.matrix).logabsdet
        return logabsdet

    def to_dense(self) -> Tensor:
        """The matrix itself; no copy."""
        self.check_claims()
        return self.matrix


def largest_entry(A: Tensor) -> Tensor:
    """``max |A_ij|`` in one pass, without a copy."""
    least, most = torch.aminmax(A)
    return torch.maximum(most, -least)


def asymmetry(A: Tensor) -> Tensor:
    """``max |A_ij - A_ji|`` of a square matrix, by tiles that stay in the cache."""
    tile, gaps = 128, [A.new_zeros(())]
    for i in range(0, A.shape[0], tile):
        for j in range(i, A.shape[0], tile):
            upper, lower = A[i : i + tile, j : j + tile], A[j : j + tile, i : i + tile]
            gaps.append(largest_entry(upper - lower.T))
    return torch.stack(gaps).amax()
