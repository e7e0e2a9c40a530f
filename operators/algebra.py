"""The algebra of operators: `Sum`, `Scaled`, `Product`, `Transpose`, `Gram`."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from operators.cost import Cost
from operators.linear_operator import LinearOperator, Scalar, sign_of
from operators.space import Space
from operators.structure import Structure


def added(left: LinearOperator, right: LinearOperator) -> LinearOperator:
    """``A + B``, in the class that holds the sum best."""
    if left.shape != right.shape:
        raise ValueError(f"cannot add {left!r} and {right!r}: shapes differ")
    left, right = _on_space_of(right, left), _on_space_of(left, right)
    _check_kind(left, right, "add")
    # Sizes may agree where the coordinates mean different things.
    for ours, theirs in ((left.domain, right.domain), (left.codomain, right.codomain)):
        if not (ours.is_flat or theirs.is_flat or ours == theirs):
            raise ValueError(
                f"cannot add {left!r} on {ours} and {right!r} on {theirs}: structures differ"
            )
    structured = left._add(right)
    if structured is None:
        structured = right._add(left)
    return Sum(left, right) if structured is None else structured


def composed(left: LinearOperator, right: LinearOperator) -> LinearOperator:
    """``A B``, in the class that holds the product best; ``J^T J`` and ``J^T W J`` are `Gram`."""
    if left.shape[1] != right.shape[0]:
        raise ValueError(f"cannot compose {left!r} with {right!r}: inner sizes differ")
    if not right._untyped:
        left = left._on(right.codomain)
    if not left._untyped:
        right = right._on(left.domain)
    _check_kind(left, right, "compose")
    inner, outer = left.domain, right.codomain
    if not (inner.is_flat or outer.is_flat or inner == outer):
        raise ValueError(
            f"cannot compose {left!r} on {inner} with {right!r} into {outer}: structures differ"
        )
    # A factor goes to the front, so that it hides no structure.
    if isinstance(left, Scaled):
        return left.factor * composed(left.operator, right)
    if isinstance(right, Scaled):
        return right.factor * composed(left, right.operator)
    structured = left._compose(right)
    if structured is None:
        structured = right._rcompose(left)
    if structured is not None:
        return structured
    if transposes(left, right):
        return Gram(right)
    if isinstance(left, Product) and transposes(left.left, right):
        return Gram(right, left.right)
    if isinstance(right, Product) and transposes(left, right.right):
        return Gram(right.right, right.left)
    return Product(left, right)


def transposes(a: LinearOperator, b: LinearOperator) -> bool:
    """Whether A is known to be ``B^T``."""
    pairs = ((a, b), (b, a))
    made = any(x._source is not None and x._source() is y for x, y in pairs)
    return made or (a is b and a.symmetric)


def _on_space_of(other: LinearOperator, operator: LinearOperator) -> LinearOperator:
    """A multiple of I of which only the size was said takes the space of the other term.

    Where that one maps between two, it takes plain vectors, which go with both.
    """
    if other._untyped:
        return operator
    space = other.domain
    if space != other.codomain:
        space = Space.flat(space.size, space.dtype, space.device)
    return operator._on(space)


def _check_kind(a: LinearOperator, b: LinearOperator, verb: str) -> None:
    if a.dtype != b.dtype or a.device != b.device:
        raise TypeError(
            f"cannot {verb} {a!r} ({a.dtype} on {a.device}) and {b!r} ({b.dtype} on {b.device})"
        )


class Compound(LinearOperator):
    """An operator made of others, and of sizes alone where these are: it takes the dtype with them.

    For classes whose domain follows from those of the operands.
    """

    @property
    def _untyped(self) -> bool:  # type: ignore[override]
        return all(part._untyped for part in self.operands)

    def _on(self, space: Space) -> LinearOperator:
        if not self._untyped or space.size != self.shape[1]:
            return self
        sizes = (part.shape[1] for part in self.operands)
        spaces = (Space.flat(size, space.dtype, space.device) for size in sizes)
        return self._remade(*(p._on(s) for p, s in zip(self.operands, spaces, strict=True)))

    @abstractmethod
    def _remade(self, *operands: LinearOperator) -> LinearOperator:
        """The same of other operands."""


class Sum(Compound):
    """``A + B``."""

    _parameters = ("left", "right")

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        # A nested space says more than a flat one, so the sum keeps it.
        domain = right.domain if left.domain.is_flat else left.domain
        codomain = right.codomain if left.codomain.is_flat else left.codomain
        super().__init__(domain, codomain, left.structure.plus(right.structure))
        self.left, self.right = left, right

    def _remade(self, *operands: LinearOperator) -> LinearOperator:
        left, right = operands
        return left + right

    def _matvec(self, v: Tensor) -> Tensor:
        return self.left._matvec(v) + self.right._matvec(v)

    def _matmat(self, block: Tensor) -> Tensor:
        return self.left._matmat(block) + self.right._matmat(block)

    def to_dense(self) -> Tensor:
        """Matrix ``(m, n)``: the sum of those of the terms."""
        self.check_claims()
        return self.left.to_dense() + self.right.to_dense()

    def _transpose(self) -> LinearOperator:
        return Sum(self.left.T, self.right.T)

    def _cost(self) -> Cost:
        return self.left.cost + self.right.cost + Cost(flops=self.shape[0])

    def _exact_diagonal(self) -> Tensor | None:
        left, right = self.left._exact_diagonal(), self.right._exact_diagonal()
        return None if left is None or right is None else left + right

    def submatrix(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Entries of both terms, added; see `LinearOperator.submatrix`."""
        return self.left.submatrix(rows, columns) + self.right.submatrix(rows, columns)

    def _exact_trace(self) -> Tensor | None:
        left, right = self.left._exact_trace(), self.right._exact_trace()
        return None if left is None or right is None else left + right

    def __repr__(self) -> str:
        return f"({self.left!r} + {self.right!r})"


class Scaled(Compound):
    """``c A``."""

    _parameters = ("factor", "operator")

    def __init__(self, operator: LinearOperator, factor: Scalar) -> None:
        structure = operator.structure.times(sign_of(factor, operator.dtype))
        super().__init__(operator.domain, operator.codomain, structure)
        self.operator, self.factor = operator, factor

    def _remade(self, *operands: LinearOperator) -> LinearOperator:
        return self.factor * operands[0]

    def _matvec(self, v: Tensor) -> Tensor:
        return self.factor * self.operator._matvec(v)

    def _matmat(self, block: Tensor) -> Tensor:
        return self.factor * self.operator._matmat(block)

    def _transpose(self) -> LinearOperator:
        return Scaled(self.operator.T, self.factor)

    def _scale(self, factor: Scalar) -> LinearOperator:
        return Scaled(self.operator, factor * self.factor)

    def _cost(self) -> Cost:
        return self.operator.cost + Cost(flops=self.shape[0])

    def _exact_diagonal(self) -> Tensor | None:
        diagonal = self.operator._exact_diagonal()
        return None if diagonal is None else self.factor * diagonal

    def submatrix(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Entries of the operator, times the factor; see `LinearOperator.submatrix`."""
        # A factor of a wider dtype must not widen them.
        return (self.factor * self.operator.submatrix(rows, columns)).to(self.dtype)

    def _exact_trace(self) -> Tensor | None:
        trace = self.operator._exact_trace()
        # Of two scalars the wider dtype would win.
        return None if trace is None else (self.factor * trace).to(self.dtype)

    def _exact_logdet(self) -> Tensor | None:
        logdet = self.operator._exact_logdet()
        if logdet is None or self.shape[0] == 0:
            return logdet
        factor = torch.as_tensor(self.factor, dtype=self.dtype, device=self.device)
        return logdet + self.shape[0] * factor.abs().log()

    def __repr__(self) -> str:
        factor = self.factor if isinstance(self.factor, (int, float)) else "c"
        return f"{factor} * {self.operator!r}"


class Product(Compound):
    """``A B``: first B, then A."""

    _parameters = ("left", "right")

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        structure = left.structure.compose(right.structure)
        super().__init__(right.domain, left.codomain, structure)
        self.left, self.right = left, right

    def _remade(self, *operands: LinearOperator) -> LinearOperator:
        return composed(*operands)

    def _matvec(self, v: Tensor) -> Tensor:
        return self.left._matvec(self.right._matvec(v))

    def _matmat(self, block: Tensor) -> Tensor:
        return self.left._matmat(self.right._matmat(block))

    def _transpose(self) -> LinearOperator:
        return Product(self.right.T, self.left.T)

    def _exact_logdet(self) -> Tensor | None:
        if self.left.shape[0] != self.left.shape[1]:
            return None
        left, right = self.left._exact_logdet(), self.right._exact_logdet()
        return None if left is None or right is None else left + right

    def __repr__(self) -> str:
        return f"({self.left!r} @ {self.right!r})"


class Transpose(Compound):
    """``A^T`` of an operator that knows its transposed product; ``Transpose(A).T`` is ``A``."""

    _parameters = ("operator",)

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator.codomain, operator.domain, operator.structure.transpose())
        self.operator = operator

    def _remade(self, *operands: LinearOperator) -> LinearOperator:
        return operands[0].T

    def _matvec(self, v: Tensor) -> Tensor:
        return self.operator._rmatvec(v)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.operator._matvec(v)

    def _transpose(self) -> LinearOperator:
        return self.operator

    def _exact_diagonal(self) -> Tensor | None:
        return self.operator._exact_diagonal()

    def submatrix(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Entries of the operator with rows and columns exchanged; see `LinearOperator`."""
        return self.operator.submatrix(columns, rows).mT

    def _exact_logdet(self) -> Tensor | None:
        return self.operator._exact_logdet()

    def __repr__(self) -> str:
        return f"{self.operator!r}.T"


class Gram(Compound):
    """``J^T J`` or ``J^T W J``; symmetric and positive semidefinite where W is.

    Parameters
    ----------
    frame
        ``J: R^n -> R^m``.
    weight
        ``W: R^m -> R^m``; by default the identity. It need not be symmetric.

    Raises
    ------
    ValueError
        `weight` is not square of size m.
    TypeError
        `weight` has another dtype or device.

    Notes
    -----
    ``A.T @ A`` and ``A.T @ W @ A`` are made Gram operators by themselves. A product costs one with
    each of J, W, J^T; the diagonal and the matrix are never formed, so the condition number is the
    square of that of J.

    Examples
    --------
    >>> import torch, operators as ops
    >>> J = ops.Dense(torch.tensor([[1.0, 2.0], [0.0, 1.0], [1.0, 0.0]]))
    >>> A = ops.Gram(J)
    >>> A.to_dense()
    tensor([[2., 2.],
            [2., 5.]])
    >>> A.positive_semidefinite
    True
    """

    _parameters = ("frame", "weight")

    def __init__(self, frame: LinearOperator, weight: LinearOperator | None = None) -> None:
        for name, part in (("frame", frame), ("weight", weight)):
            if not isinstance(part, LinearOperator) and (name == "frame" or part is not None):
                raise TypeError(
                    f"{name} is a {type(part).__name__}; expected an operator, e.g. Dense(matrix)"
                )
        identity = Structure(positive_definite=True, diagonal=True)
        if weight is not None:
            if not weight._untyped:
                frame = frame._on(weight.domain)
            elif not frame._untyped:
                weight = weight._on(frame.codomain)
            if weight.shape != (frame.shape[0], frame.shape[0]):
                raise ValueError(
                    f"weight is {weight!r}, but frame is {frame!r}; "
                    f"expected a weight of shape {(frame.shape[0],) * 2}"
                )
            _check_kind(frame, weight, "combine")
            frames = {weight.domain, weight.codomain, frame.codomain}
            if len({space for space in frames if not space.is_flat}) > 1:
                raise ValueError(
                    f"weight {weight!r} maps {weight.domain} to {weight.codomain}, but frame "
                    f"{frame!r} maps into {frame.codomain}: structures differ"
                )
        inner = identity if weight is None else weight.structure
        super().__init__(frame.domain, frame.domain, inner.congruence(frame.structure))
        self.frame, self.weight = frame, weight

    def _remade(self, *operands: LinearOperator) -> LinearOperator:
        return Gram(*operands)

    def _matvec(self, v: Tensor) -> Tensor:
        image = self.frame._matvec(v)
        return self.frame.T._matvec(image if self.weight is None else self.weight._matvec(image))

    def _matmat(self, block: Tensor) -> Tensor:
        image = self.frame._matmat(block)
        return self.frame.T._matmat(image if self.weight is None else self.weight._matmat(image))

    def _transpose(self) -> LinearOperator:
        return Gram(self.frame, None if self.weight is None else self.weight.T)

    def _cost(self) -> Cost:
        outer = 2 * self.frame.cost
        return outer if self.weight is None else outer + self.weight.cost

    def _exact_logdet(self) -> Tensor | None:
        if self.frame.shape[0] != self.frame.shape[1]:
            return None
        frame = self.frame._exact_logdet()
        weight = None if self.weight is None else self.weight._exact_logdet()
        if frame is None or (self.weight is not None and weight is None):
            return None
        return 2 * frame if weight is None else 2 * frame + weight
