"""`Sparse`: a matrix held by its nonzeros."""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from operators.algebra import transposes
from operators.claims import FalseClaimError, rounding
from operators.cost import Cost
from operators.elementary import Diagonal
from operators.linear_operator import LinearOperator, Scalar, sign_of
from operators.permutation import Permutation
from operators.space import Space
from operators.sparse.formats import Layout, collected, from_scipy, from_torch, to_scipy, to_torch
from operators.sparse.pattern import Pattern
from operators.sparse.product import multiply
from operators.structure import Structure
from operators.tracing import plainly, readable, tracked


class Claims(TypedDict, total=False):
    """What may be promised of a matrix; see `Sparse`."""

    symmetric: bool
    positive_definite: bool
    positive_semidefinite: bool


class Sparse(LinearOperator):
    """A matrix ``(m, n)`` held by its nonzeros: dense `values`, and a `Pattern` that stays fixed.

    Sums, products and multiples with Sparse and Diagonal operators, and products with Permutations,
    are Sparse again, with values that are differentiable functions of theirs; ``A.T @ A`` is known
    to be positive semidefinite. That the matrix is diagonal or triangular is read off the pattern.

    Parameters
    ----------
    values
        Nonzeros ``(nnz,)`` in the order of `pattern`. Without a pattern: the matrix itself, a torch
        tensor (COO, CSR, CSC, dense) or a scipy sparse matrix of any format.
    pattern
        Where they are; see `Pattern.of`.
    domain, codomain
        Spaces that it acts between; by default plain vectors ``(n,)`` and ``(m,)``.
    symmetric, positive_definite, positive_semidefinite
        Claims. Symmetry is compared here, up to rounding; definiteness is probed at the first use.

    Raises
    ------
    ValueError
        Shapes do not fit.
    TypeError
        Dtypes or devices do not fit.
    FalseClaimError
        A claim is false; the pattern of a symmetric matrix is symmetric too.

    Notes
    -----
    A product costs ``2 nnz`` flops and is bound by memory: it reads 12 bytes for each nonzero in
    double precision, 8 in single. It runs on the CSR kernel of torch; see
    `operators.sparse.product` for what happens under torch.func. The derivative with respect to the
    values is taken at the nonzeros alone. Of a symmetric operator the two mirror nonzeros are
    independent variables.

    Memory: `values`, ``24 nnz`` bytes of indices, and what the pattern keeps: its transpose (``24
    nnz`` bytes more unless it is symmetric, and 8 for the order), and the pairs of each product
    ``A B`` (`Pattern.product`).

    Examples
    --------
    >>> import torch
    >>> A = Sparse(torch.tensor([[2.0, 0.0], [1.0, 3.0]]))
    >>> A @ torch.tensor([1.0, 1.0])
    tensor([2., 4.])
    >>> print(A)
    Sparse(2, 2) float32; lower triangular; 3 nonzeros; 6 flop
    >>> (A.T @ A).to_dense()
    tensor([[5., 3.],
            [3., 9.]])
    """

    _parameters = ("values",)
    _transient = ("_reordered", "_factors")
    _unread = (*LinearOperator._unread, "pattern")

    # Version of the values, and their copy in the order of the transpose.
    _reordered: tuple[int, Tensor] | None = None
    # (A, B) of a product A B, by which ``J.T @ W @ J`` is known.
    _factors: tuple[LinearOperator, LinearOperator] | None = None

    def __init__(
        self,
        values: Any,
        pattern: Pattern | None = None,
        *,
        domain: Space | None = None,
        codomain: Space | None = None,
        symmetric: bool = False,
        positive_definite: bool = False,
        positive_semidefinite: bool = False,
    ) -> None:
        if pattern is None:
            if isinstance(values, Tensor) and values.layout == torch.strided and values.ndim == 1:
                raise ValueError(
                    f"values has shape {tuple(values.shape)}, but there is no pattern; give "
                    "Sparse(values, pattern), or a matrix"
                )
            values, pattern = (from_torch if isinstance(values, Tensor) else from_scipy)(values)
        if not isinstance(pattern, Pattern):
            raise TypeError(f"pattern is a {type(pattern).__name__}; expected a Pattern")
        if not isinstance(values, Tensor) or values.layout != torch.strided:
            kind = values.layout if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"values is {kind}; with a pattern, expected a dense tensor (nnz,)")
        if values.shape != (pattern.nnz,):
            raise ValueError(
                f"values has shape {tuple(values.shape)}; expected ({pattern.nnz},) for {pattern}"
            )
        if values.device != pattern.device:
            raise TypeError(
                f"values is on {values.device}, but pattern on {pattern.device}; use pattern.to()"
            )
        m, n = pattern.shape
        domain = domain or Space.flat(n, values.dtype, values.device)
        codomain = codomain or Space.flat(m, values.dtype, values.device)
        for name, space, size in (("domain", domain, n), ("codomain", codomain, m)):
            if space.size != size:
                raise ValueError(f"{name} has size {space.size}; expected {size} for {pattern}")
            if space.dtype != values.dtype:
                raise TypeError(f"{name} has dtype {space.dtype}, but values {values.dtype}")
        claims = {
            "symmetric": symmetric,
            "positive_definite": positive_definite,
            "positive_semidefinite": positive_semidefinite,
        }
        claimed = Structure(**claims)
        super().__init__(domain, codomain, _seen(claimed, pattern))
        self.values, self.pattern = values, pattern
        if claimed.symmetric:
            self._compare_mirrors()
        if readable(values):
            claims.pop("symmetric")
        self._claims = tuple(claim for claim, made in claims.items() if made)

    @classmethod
    def from_torch(cls, tensor: Tensor, **claims: Unpack[Claims]) -> Sparse:
        """Operator of a torch tensor; see `operators.sparse.formats.from_torch`."""
        return Sparse(*from_torch(tensor), **claims)

    @classmethod
    def from_scipy(
        cls,
        matrix: Any,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **claims: Unpack[Claims],
    ) -> Sparse:
        """Operator of a scipy sparse matrix; see `operators.sparse.formats.from_scipy`."""
        return Sparse(*from_scipy(matrix, dtype, device), **claims)

    @classmethod
    def from_coo(
        cls,
        rows: Tensor,
        columns: Tensor,
        values: Tensor,
        shape: tuple[int, int],
        **claims: Unpack[Claims],
    ) -> Sparse:
        """Operator of entries in any order; those of one place are summed, differentiably.

        Parameters
        ----------
        rows, columns
            Integer tensors ``(k,)``.
        values
            ``(k,)``.
        shape
            ``(m, n)``.

        Raises
        ------
        ValueError, TypeError
            As `Pattern.of` does; or `values` has another shape.

        Examples
        --------
        >>> import torch
        >>> zero = torch.zeros(2, dtype=torch.int64)
        >>> Sparse.from_coo(zero, zero, torch.tensor([1.0, 2.0]), (1, 2)).to_dense()
        tensor([[3., 0.]])
        """
        if values.shape != rows.shape:
            raise ValueError(
                f"values has shape {tuple(values.shape)}; expected that of rows, "
                f"{tuple(rows.shape)}"
            )
        return Sparse(*collected(values, *Pattern.of(rows, columns, shape)), **claims)

    def to_torch(self, layout: Layout = "csr") -> Tensor:
        """Torch tensor of layout ``"csr"``, ``"csc"`` or ``"coo"``; gradients reach the values."""
        return to_torch(self.values, self.pattern, layout)

    def to_scipy(self, format: Layout = "csr") -> Any:
        """Scipy sparse array; see `operators.sparse.formats.to_scipy`."""
        return to_scipy(self.values, self.pattern, format, symmetric=self.symmetric)

    def _compare_mirrors(self) -> None:
        """A symmetric matrix has a symmetric pattern, and equal numbers in mirror places."""
        transposed, order = self.pattern.transpose()
        if transposed is not self.pattern:
            raise FalseClaimError(
                f"{self!r} is claimed symmetric, but its pattern is not; drop the claim, or store "
                "zeros where only the mirror place is stored"
            )
        if not readable(self.values) or not self.pattern.nnz:
            return
        values = self.values.detach()
        largest = (values - values.index_select(0, order)).abs().max()
        scale = values.abs().max()
        # NaN passes: a solver that meets it says what it is.
        if bool(largest > rounding(values.dtype) * scale):
            raise FalseClaimError(
                f"{self!r} is claimed symmetric, but max |A - A^T| = {float(largest):.3g} with "
                f"max |A| = {float(scale):.3g}; drop the claim or repair the matrix"
            )

    @property
    def sparse(self) -> bool:
        """True."""
        return True

    @property
    def nnz(self) -> int:
        """Number of nonzeros."""
        return self.pattern.nnz

    def _cost(self) -> Cost:
        return Cost(flops=2 * self.nnz)

    def _describe(self) -> str:
        return f"{self.nnz} nonzeros"

    # --- products -----------------------------------------------------------------------------

    def _matvec(self, v: Tensor) -> Tensor:
        return multiply(self.values, v, self.pattern)

    def _matmat(self, block: Tensor) -> Tensor:
        return multiply(self.values, block, self.pattern)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return multiply(self._transposed_values(), v, self.pattern.transpose()[0])

    def _transpose(self) -> LinearOperator:
        transposed, _ = self.pattern.transpose()
        values, structure = self._transposed_values(), self.structure.transpose()
        return self._derived(values, transposed, structure, self.codomain, self.domain)

    def _transposed_values(self) -> Tensor:
        """Values in the order of the transpose; kept where they are numbers and nothing else."""
        _, order = self.pattern.transpose()
        values = self.values
        if tracked(values):
            return values.index_select(0, order)
        # The values may have been written into since (an optimiser's step).
        version = 0 if values.is_inference() else values._version
        if self._reordered is None or self._reordered[0] != version:
            with plainly():
                self._reordered = version, values.index_select(0, order)
        return self._reordered[1]

    def to_dense(self) -> Tensor:
        """Matrix ``(m, n)``; no product is needed."""
        self.check_claims()
        m, n = self.shape
        places = self.pattern.rows * n + self.pattern.columns
        return self.values.new_zeros(m * n).index_add(0, places, self.values).reshape(m, n)

    def _exact_diagonal(self) -> Tensor | None:
        if self.shape[0] != self.shape[1]:
            return None
        positions = self.pattern.diagonal_positions
        entries = self.values.index_select(0, positions)
        rows = self.pattern.rows.index_select(0, positions)
        return self.values.new_zeros(self.shape[0]).index_add(0, rows, entries)

    # --- algebra ------------------------------------------------------------------------------

    def _derived(
        self,
        values: Tensor,
        pattern: Pattern,
        structure: Structure,
        domain: Space,
        codomain: Space,
        *operands: LinearOperator,
    ) -> Sparse:
        """Matrix whose facts follow from those of others, or are seen in the pattern."""
        derived = object.__new__(Sparse)
        # A factor of a wider dtype would widen the values.
        derived.values, derived.pattern = values.to(domain.dtype), pattern
        LinearOperator.__init__(derived, domain, codomain, _seen(structure, pattern))
        derived._inherit_claims(self, *operands)
        return derived

    def _scale(self, factor: Scalar) -> LinearOperator:
        structure = self.structure.times(sign_of(factor, self.dtype))
        values = factor * self.values
        return self._derived(values, self.pattern, structure, self.domain, self.codomain)

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        if isinstance(other, Sparse):
            union, ours, theirs = self.pattern.union(other.pattern)
            added = other.values
        elif isinstance(other, Diagonal):
            union, ours, theirs = self.pattern.with_diagonal()
            added = other.values.expand(self.shape[0])
        else:
            return None
        values = self.values
        if union is not self.pattern:
            values = values.new_zeros(union.nnz).index_add(0, ours, values)
        nested = other if self.domain.is_flat else self
        return self._derived(
            values.index_add(0, theirs, added),
            union,
            self.structure.plus(other.structure),
            nested.domain,
            nested.codomain,
            other,
        )

    def _compose(self, other: LinearOperator) -> LinearOperator | None:
        if isinstance(other, (Sparse, Permutation)):
            return self._multiplied(self, other)
        if isinstance(other, Diagonal):
            kept = other._rcompose(self)
            if kept is not None:
                return kept
            d = other.values.expand(self.shape[1])
            values = self.values * d.index_select(0, self.pattern.columns)
            return self._product(values, self.pattern, self, other)
        return None

    def _rcompose(self, other: LinearOperator) -> LinearOperator | None:
        if isinstance(other, Permutation):
            return self._multiplied(other, self)
        if not isinstance(other, Diagonal):
            return None
        d = other.values.expand(self.shape[0])
        values = d.index_select(0, self.pattern.rows) * self.values
        return self._product(values, self.pattern, other, self)

    def _multiplied(self, left: Sparse | Permutation, right: Sparse | Permutation) -> Sparse:
        (a, of_a), (b, of_b) = _entries(left), _entries(right)
        product = of_a.product(of_b)
        pairs = a.index_select(0, product.left) * b.index_select(0, product.right)
        values = pairs.new_zeros(product.pattern.nnz).index_add(0, product.where, pairs)
        return self._product(values, product.pattern, left, right)

    def _product(
        self, values: Tensor, pattern: Pattern, left: LinearOperator, right: LinearOperator
    ) -> Sparse:
        structure = left.structure.compose(right.structure)
        if transposes(left, right):
            structure = _congruence(Structure(positive_semidefinite=True), structure)
        elif isinstance(left, Sparse) and left._factors is not None:
            frame, weight = left._factors
            if transposes(frame, right) or _undoes(frame, right):
                facts = weight.structure.congruence(right.structure)
                if isinstance(right, Permutation):
                    facts = facts.join(Structure(positive_definite=weight.positive_definite))
                structure = _congruence(facts, structure)
        other = left if right is self else right
        derived = self._derived(values, pattern, structure, right.domain, left.codomain, other)
        derived._factors = left, right
        return derived


def _entries(A: Sparse | Permutation) -> tuple[Tensor, Pattern]:
    """Nonzeros and where they are."""
    if isinstance(A, Sparse):
        return A.values, A.pattern
    n = A.shape[0]
    with plainly():
        pattern = Pattern(A.order, torch.arange(n + 1, device=A.device), (n, n))
        return torch.ones(n, dtype=A.dtype, device=A.device), pattern


def _undoes(P: LinearOperator, Q: LinearOperator) -> bool:
    """Whether these are permutations with ``P Q = I``."""
    if not (isinstance(P, Permutation) and isinstance(Q, Permutation)):
        return False
    both = P._compose(Q)
    return isinstance(both, Permutation) and both.diagonal


def _congruence(known: Structure, composed: Structure) -> Structure:
    """Facts of ``J^T W J`` together with those of a product."""
    return Structure(
        symmetric=known.symmetric,
        positive_semidefinite=known.positive_semidefinite,
        positive_definite=known.positive_definite or composed.positive_definite,
        lower_triangular=composed.lower_triangular,
        upper_triangular=composed.upper_triangular,
    )


def _seen(structure: Structure, pattern: Pattern) -> Structure:
    """Facts together with those that the pattern shows."""
    if pattern.shape[0] != pattern.shape[1]:
        return structure
    return structure.join(
        Structure(
            lower_triangular=pattern.lower_triangular, upper_triangular=pattern.upper_triangular
        )
    )
