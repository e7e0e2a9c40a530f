"""Operators on grids, made of one factor for each axis: `Kronecker` and `KroneckerSum`.

A flat vector stands for a tensor ``(n_1, ..., n_d)`` in row-major order: the index of the last
factor runs fastest. Nothing of size ``(prod n_i)^2`` is ever formed.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from operators.algebra import Compound, Scaled, Sum
from operators.block import of_one_kind
from operators.cost import Cost
from operators.elementary import Dense, Diagonal
from operators.linear_operator import LinearOperator, Scalar
from operators.precision import in_single
from operators.space import Space
from operators.structure import Structure

# Of a block with more numbers, a CPU takes a few columns at a time: the next factor then finds in
# the cache what the last one left.
IN_CACHE = 2**18


class Kronecker(Compound):
    """``A = A_1 (x) ... (x) A_d``; with two factors, ``(S (x) A) vec(V) = vec(S V A^T)``.

    Here ``vec(V)`` stacks the rows of V, as ``V.reshape(-1)`` does: A acts along axis i of a tensor
    ``(n_1, ..., n_d)`` by ``A_i``.

    Parameters
    ----------
    factors
        Operators of shapes ``(m_i, n_i)``, not necessarily square. Domain and codomain are plain
        vectors of length ``prod n_i`` and ``prod m_i``. A factor that is a Kronecker product itself
        is replaced by its factors.

    Raises
    ------
    ValueError
        There is no factor.
    TypeError
        A factor is not an operator, or they differ in dtype or device.

    Notes
    -----
    Each factor is applied once to a block (Van Loan, 2000, doi:10.1016/S0377-0427(00)00393-9).
    With N numbers held, factor i costs ``c_i N / n_i`` and leaves ``N m_i / n_i`` of them, where
    ``c_i`` is the cost of ``A_i v``. Exchanging neighbours in an order of application shows that
    the cheapest is by decreasing ``(n_i - m_i) / c_i``. With dense square factors a product costs
    ``2 n (n_1 + ... + n_d)`` flops, ``n = prod n_i``. Memory is that of the two largest successive
    intermediate tensors.

    ``(A (x) B) (C (x) D)`` is ``(A C) (x) (B D)`` wherever the sizes of the factors match. Diagonal
    and trace are exact where every factor is square and knows its own, and
    ``log |det A| = sum_i (n / n_i) log |det A_i|``.

    Examples
    --------
    >>> import torch, operators as ops
    >>> S, A = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    >>> K, V = Kronecker(ops.Dense(S), ops.Dense(A)), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> K @ V.reshape(-1)
    tensor([10., 17.])
    >>> S @ V @ A.T
    tensor([[10., 17.]])
    """

    _parameters = ("factors",)

    def __init__(self, *factors: LinearOperator) -> None:
        factors = tuple(
            part
            for factor in of_one_kind(factors, "factor")
            for part in (factor.factors if type(factor) is Kronecker else (factor,))
        )
        dtype, device = factors[0].dtype, factors[0].device
        rows, columns = ([factor.shape[axis] for factor in factors] for axis in (0, 1))
        structure = reduce(Structure.kronecker, (factor.structure for factor in factors))
        domain = Space.flat(math.prod(columns), dtype, device)
        super().__init__(domain, Space.flat(math.prod(rows), dtype, device), structure)
        self.factors: tuple[LinearOperator, ...] = factors
        self._rows, self._columns = rows, columns
        # Among equals the last axis first; see `_along_axes`.
        self._order = sorted(range(len(factors)), key=lambda i: (-_shrinkage(factors[i]), -i))

    @property
    def kronecker(self) -> bool:
        """True."""
        return True

    def _remade(self, *operands: LinearOperator) -> LinearOperator:
        return Kronecker(*operands)

    def _matvec(self, v: Tensor) -> Tensor:
        return self._along_axes(v, 1).reshape(self.shape[0])

    def _matmat(self, block: Tensor) -> Tensor:
        # Contiguous here, where torch transposes by tiles; behind a reshape it does not.
        x, width = block.T.contiguous(), block.shape[1]
        if x.device.type == "cpu":
            width = min(width, IN_CACHE // max(1, *self.shape))
        parts = [
            self._along_axes(part, part.shape[0]).reshape(self.shape[0], part.shape[0])
            for part in x.split(max(1, width))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _along_axes(self, x: Tensor, count: int) -> Tensor:
        """Every factor along its axis of a tensor ``(count, n_1, ..., n_d)``; count comes last."""
        # The axes in the order that they have in memory; d is that of the columns. A factor takes
        # its axis from the end and puts its result in front. Where the axes are taken as d - 1,
        # ..., 0, each one is at the end when its turn comes: all of the views below are free.
        d, sizes = len(self.factors), [*self._columns, count]
        axes = [d, *range(d)]
        for i in self._order:
            if axes[-1] != i:
                place = axes.index(i)
                x = x.reshape([sizes[axis] for axis in axes]).movedim(place, -1)
                axes.append(axes.pop(place))
            rest = math.prod(sizes[axis] for axis in axes[:-1])
            x = self.factors[i]._matmat(x.reshape(rest, sizes[i]).T)
            sizes[i] = self._rows[i]
            axes.insert(0, axes.pop())
        if axes != sorted(axes):
            x = x.reshape([sizes[axis] for axis in axes])
            x = x.permute([axes.index(axis) for axis in range(d + 1)])
        return x

    def _transpose(self) -> LinearOperator:
        return Kronecker(*(factor.T for factor in self.factors))

    def _scale(self, factor: Scalar) -> LinearOperator:
        # The smallest: it costs least where it takes the scalar into its own entries.
        smallest = min(self.factors, key=lambda part: math.prod(part.shape))
        i = next(i for i, part in enumerate(self.factors) if part is smallest)
        return Kronecker(*self.factors[:i], factor * smallest, *self.factors[i + 1 :])

    def _compose(self, other: LinearOperator) -> LinearOperator | None:
        if not isinstance(other, Kronecker) or len(self.factors) != len(other.factors):
            return None
        pairs = list(zip(self.factors, other.factors, strict=True))
        if any(a.shape[1] != b.shape[0] for a, b in pairs):
            return None
        return Kronecker(*(a @ b for a, b in pairs))

    def _cost(self) -> Cost:
        cost, held = Cost(), self.shape[1]
        for i in self._order:
            m, n = self._rows[i], self._columns[i]
            # Of a size that is zero nothing is held.
            cost, held = cost + self.factors[i].cost * (held / max(n, 1)), held // max(n, 1) * m
        return cost

    def _exact_diagonal(self) -> Tensor | None:
        diagonals = _known([factor._exact_diagonal() for factor in self.factors])
        return None if diagonals is None else reduce(_outer_product, diagonals)

    def _exact_trace(self) -> Tensor | None:
        traces = _known([factor._exact_trace() for factor in self.factors])
        return None if traces is None else reduce(torch.mul, traces)

    def _exact_logdet(self) -> Tensor | None:
        logdets = _known([factor._exact_logdet() for factor in self.factors])
        if logdets is None:
            return None
        return _weighted_sum(logdets, self._columns)

    def to_dense(self) -> Tensor:
        """Matrix ``(m, n)``, from that of each factor."""
        self.check_claims()
        return reduce(_kron, (factor.to_dense() for factor in self.factors))


class KroneckerSum(Compound):
    """``A = A_1 (+) ... (+) A_d = sum_i I (x) ... (x) A_i (x) ... (x) I``.

    With two factors, ``(A (+) B) vec(V) = vec(A V + V B^T)``, the operator of a Sylvester equation;
    with second differences ``A_i``, the Laplacian of a d-dimensional grid. ``vec`` stacks rows, as
    for `Kronecker`.

    Parameters
    ----------
    factors
        Square operators of sizes ``n_i``. Domain and codomain are plain vectors of length
        ``prod n_i``. A factor that is a Kronecker sum itself is replaced by its factors.

    Raises
    ------
    ValueError
        There is no factor, or one is not square.
    TypeError
        A factor is not an operator, or they differ in dtype or device.

    Notes
    -----
    A product costs ``n / n_i`` products with each factor, of dense ones ``2 n (n_1 + ... + n_d)``
    flops. The eigenvalues are the sums of one eigenvalue of each factor; so A is definite where all
    factors are semidefinite and one is definite. ``log |det A|`` is exact for triangular factors,
    whose eigenvalues are on the diagonal, and for symmetric ones that are `Dense` or `Diagonal`, at
    the cost of their eigenvalues, ``O(sum n_i^3)``. Its second derivative is undefined where a
    dense factor has an eigenvalue twice.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = KroneckerSum(ops.Diagonal(torch.tensor([1.0, 2.0])), ops.Dense(torch.ones(2, 2)))
    >>> A @ torch.tensor([1.0, 2.0, 3.0, 4.0])
    tensor([ 4.,  5., 13., 15.])
    """

    _parameters = ("factors",)

    def __init__(self, *factors: LinearOperator) -> None:
        factors = tuple(
            part
            for factor in of_one_kind(factors, "factor")
            for part in (factor.factors if type(factor) is KroneckerSum else (factor,))
        )
        for i, factor in enumerate(factors):
            if factor.shape[0] != factor.shape[1]:
                raise ValueError(f"factor {i} is {factor!r}; expected a square operator")
        size = math.prod(factor.shape[1] for factor in factors)
        space = Space.flat(size, factors[0].dtype, factors[0].device)
        # A factor shares its facts with its product with identities.
        structure = reduce(Structure.plus, (factor.structure for factor in factors))
        super().__init__(space, space, structure)
        self.factors: tuple[LinearOperator, ...] = factors

    def _remade(self, *operands: LinearOperator) -> LinearOperator:
        return KroneckerSum(*operands)

    def _matvec(self, v: Tensor) -> Tensor:
        return self._matmat(v[:, None])[:, 0]

    def _matmat(self, block: Tensor) -> Tensor:
        x = block.reshape(*(factor.shape[1] for factor in self.factors), block.shape[1])
        terms = (_along(factor, x, axis) for axis, factor in enumerate(self.factors))
        return reduce(torch.add, terms).reshape(block.shape)

    def _transpose(self) -> LinearOperator:
        return KroneckerSum(*(factor.T for factor in self.factors))

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        if isinstance(other, Diagonal) and other.values.ndim == 0 and other.domain.is_flat:
            # ``A (+) (B + c I)``; in the smallest factor it costs least.
            smallest = min(self.factors, key=lambda part: part.shape[0])
            i = next(i for i, part in enumerate(self.factors) if part is smallest)
            space = Space.flat(smallest.shape[0], self.dtype, self.device)
            shifted = smallest + other._derived(other.values, space, other.structure)
            return KroneckerSum(*self.factors[:i], shifted, *self.factors[i + 1 :])
        if not isinstance(other, KroneckerSum) or len(self.factors) != len(other.factors):
            return None
        pairs = list(zip(self.factors, other.factors, strict=True))
        if any(a.shape != b.shape for a, b in pairs):
            return None
        return KroneckerSum(*(a + b for a, b in pairs))

    def _scale(self, factor: Scalar) -> LinearOperator:
        return KroneckerSum(*(factor * part for part in self.factors))

    def _cost(self) -> Cost:
        n = self.shape[1]
        products = (factor.cost * (n / max(factor.shape[1], 1)) for factor in self.factors)
        return sum(products, Cost(flops=n * (len(self.factors) - 1)))

    def _exact_diagonal(self) -> Tensor | None:
        diagonals = _known([factor._exact_diagonal() for factor in self.factors])
        return None if diagonals is None else reduce(_outer_sum, diagonals)

    def _exact_trace(self) -> Tensor | None:
        traces = _known([factor._exact_trace() for factor in self.factors])
        if traces is None:
            return None
        return _weighted_sum(traces, [factor.shape[1] for factor in self.factors])

    def _exact_logdet(self) -> Tensor | None:
        triangular = super()._exact_logdet()
        if triangular is not None:
            return triangular
        spectra = _known([_spectrum(factor) for factor in self.factors])
        return None if spectra is None else reduce(_outer_sum, spectra).abs().log().sum()


def _shrinkage(factor: LinearOperator) -> float:
    """``(n - m) / c``: by how much a product shortens a vector for its cost c."""
    m, n = factor.shape
    cost = factor.cost
    # Of a function's evaluations the flops are not known; a matrix stands in.
    flops = cost.flops if cost == Cost(flops=cost.flops) else 2 * m * n
    return (n - m) / max(flops, 1)


def _along(factor: LinearOperator, x: Tensor, axis: int) -> Tensor:
    """A square factor applied along one axis of a tensor."""
    x = x.movedim(axis, 0)
    return (
        factor._matmat(x.reshape(x.shape[0], x.shape[1:].numel())).reshape(x.shape).movedim(0, axis)
    )


def _known(values: list[Tensor | None]) -> list[Tensor] | None:
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def _kron(a: Tensor, b: Tensor) -> Tensor:
    # torch.kron (2.13) refuses matrices of some strides, such as a transpose.
    rows, columns = a.shape[0] * b.shape[0], a.shape[1] * b.shape[1]
    return (a[:, None, :, None] * b[None, :, None, :]).reshape(rows, columns)


def _outer_product(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None] * b).reshape(-1)


def _outer_sum(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None] + b).reshape(-1)


def _weighted_sum(values: list[Tensor], sizes: list[int]) -> Tensor:
    """``sum_i (n / n_i) value_i`` with ``n = prod n_i``."""
    weights = (math.prod(sizes[:i] + sizes[i + 1 :]) for i in range(len(sizes)))
    return reduce(torch.add, (w * value for w, value in zip(weights, values, strict=True)))


def _spectrum(A: LinearOperator) -> Tensor | None:
    """Eigenvalues where they are cheap: of diagonals, symmetric matrices, multiples and shifts."""
    if isinstance(A, Scaled):
        inner = _spectrum(A.operator)
        return None if inner is None else A.factor * inner
    if isinstance(A, Sum):
        for part, shift in ((A.left, A.right), (A.right, A.left)):
            if isinstance(shift, Diagonal) and shift.values.ndim == 0:
                inner = _spectrum(part)
                return None if inner is None else inner + shift.values
    if isinstance(A, Diagonal):
        return A._exact_diagonal()
    if not (isinstance(A, Dense) and A.symmetric):
        return None
    spectrum: Tensor = in_single(torch.linalg.eigvalsh, A.matrix)
    return spectrum
