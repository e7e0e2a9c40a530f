"""`LinearOperator`: a matrix known by what it does."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import partial
from numbers import Real
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from operators.claims import refute
from operators.cost import Cost
from operators.space import Space, Tree
from operators.structure import Structure
from operators.tracing import memory, place

Scalar = float | int | Tensor


class LinearOperator(ABC):
    """A linear map ``A: R^n -> R^m`` between (nested) tensor spaces; immutable.

    ``A @ v`` takes a vector ``(n,)``, a block of k columns ``(n, k)``, or a nested structure of
    `domain`, and returns the like: ``(m,)``, ``(m, k)``, or a nested structure of `codomain`.
    Operators combine by ``A + B``, ``A - B``, ``c * A``, ``A @ B``, ``A.T``; facts about structure
    (`structure`) follow the rules of `operators.structure`.

    An operator is a pytree: its tensors (`tensors`) are what torch.func differentiates and maps, as
    in ``torch.func.vmap(lambda A, v: A @ v)(A, V)``. What is known of an operator is known of the
    values that its tensors had then: do not change them in place, but make another operator.

    A subclass implements `_matvec`, and unless it is symmetric `_rmatvec` or `_transpose`; it may
    override `_matmat` where a block is cheaper than its columns. It names in `_parameters` the
    attributes that hold its tensors and operands.

    Parameters
    ----------
    domain, codomain
        Spaces of the argument and of the result.
    structure
        What is known of the operator.

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Dense(torch.tensor([[2.0, 1.0], [1.0, 3.0]])) + 1.0 * ops.Identity(2)
    >>> A @ torch.tensor([1.0, 1.0])
    tensor([4., 5.])
    """

    # numpy must not try to broadcast over an operator in `array @ operator` or `scalar * operator`.
    __array_ufunc__ = None

    # Attributes that hold tensors, nested structures of tensors, or operators. The rest is fixed.
    _parameters: ClassVar[tuple[str, ...]] = ()
    # Caches, with a default on the class; a copy with other tensors starts without them.
    _transient: ClassVar[tuple[str, ...]] = ()
    # Attributes that no product reads, or that hold nothing that a derivative could go through.
    _unread: ClassVar[tuple[str, ...]] = ("domain", "codomain", "structure", "_claims")

    # Facts that the user promised, found true or false at the first use (see `probe`).
    _claims: tuple[str, ...] = ()
    _probed = False
    # The operator that this one was made from by `T`: ``A.T @ A`` is known by it.
    _source: weakref.ref[LinearOperator] | None = None
    # What the pytree that it was put together from said of all but the tensors.
    _fixed: _Fixed | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        pytree.register_pytree_node(cls, _flatten, partial(_unflatten, cls))

    def __init__(self, domain: Space, codomain: Space, structure: Structure | None = None) -> None:
        if domain.dtype != codomain.dtype or domain.device != codomain.device:
            raise TypeError(
                f"domain is {domain.dtype} on {domain.device} but codomain is {codomain.dtype} on "
                f"{codomain.device}; an operator keeps dtype and device"
            )
        if not domain.dtype.is_floating_point:
            raise TypeError(
                f"{type(self).__name__} of dtype {domain.dtype}; expected a floating dtype"
            )
        structure = structure or Structure()
        if structure != Structure() and domain.size != codomain.size:
            raise ValueError(
                f"structure claims {structure}, but the shape is ({codomain.size}, {domain.size})"
            )
        self.domain = domain
        self.codomain = codomain
        self.structure = structure

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a file is made of: everything but caches."""
        dropped = {*self._transient, "_source", "_fixed"}
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    # --- what it is ---------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``: rows, columns."""
        return (self.codomain.size, self.domain.size)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of arguments and results."""
        return self.domain.dtype

    @property
    def device(self) -> torch.device:
        """Device of arguments and results."""
        return self.domain.device

    @property
    def symmetric(self) -> bool:
        """Whether ``A = A^T`` is known."""
        return self.structure.symmetric

    @property
    def positive_semidefinite(self) -> bool:
        """Whether ``<v, A v> >= 0`` is known."""
        return self.structure.positive_semidefinite

    @property
    def positive_definite(self) -> bool:
        """Whether ``<v, A v> > 0`` for v != 0 is known."""
        return self.structure.positive_definite

    @property
    def diagonal(self) -> bool:
        """Whether ``A`` is known to be diagonal."""
        return self.structure.diagonal

    @property
    def lower_triangular(self) -> bool:
        """Whether ``A_ij = 0`` for i < j is known."""
        return self.structure.lower_triangular

    @property
    def upper_triangular(self) -> bool:
        """Whether ``A_ij = 0`` for i > j is known."""
        return self.structure.upper_triangular

    @property
    def low_rank_plus_diagonal(self) -> bool:
        """Whether ``A`` is held as a diagonal plus few outer products."""
        return False

    @property
    def sparse(self) -> bool:
        """Whether ``A`` is held by its nonzeros."""
        return False

    @property
    def kronecker(self) -> bool:
        """Whether ``A`` is held as a Kronecker product."""
        return False

    @property
    def block_diagonal(self) -> bool:
        """Whether ``A`` is held as diagonal blocks."""
        return False

    @property
    def saddle(self) -> bool:
        """Whether ``A`` is held as ``[[B, G^T], [G, -C]]``."""
        return False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The floating tensors that make ``A``: what it is differentiable with respect to."""
        return tuple(pytree.tree_leaves(self))

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> LinearOperator:
        """The same operator of other tensors, in the order of `tensors`.

        Its facts are claims about the new tensors, tried at the first use. Shapes are not compared:
        with a further axis everywhere it is a batch, for ``torch.func.vmap`` or `Stacked.of`.

        Raises
        ------
        ValueError
            Another number of tensors.
        """
        leaves, treespec = pytree.tree_flatten(self)
        if len(tensors) != len(leaves):
            raise ValueError(f"{len(tensors)} tensors for {self!r}, which has {len(leaves)}")
        copy: LinearOperator = pytree.tree_unflatten(list(tensors), treespec)
        return copy

    @property
    def operands(self) -> tuple[LinearOperator, ...]:
        """The operators that this one is made of."""
        held = (getattr(self, name, None) for name in self._parameters)
        return tuple(
            part
            for value in held
            for part in (value if isinstance(value, (list, tuple)) else (value,))
            if isinstance(part, LinearOperator)
        )

    @property
    def cost(self) -> Cost:
        """What one product ``A v`` costs."""
        return self._cost()

    # --- what it does -------------------------------------------------------------------------

    @abstractmethod
    def _matvec(self, v: Tensor) -> Tensor:
        """``A v`` for a checked vector ``(n,)``."""

    def _map(self, v: Tree) -> Tree:
        """``A v`` for a nested structure, not checked yet; by default through the flat vectors."""
        return self.codomain.unravel(self._matvec(self.domain.ravel(v, ArgumentOf(self))))

    def _matmat(self, block: Tensor) -> Tensor:
        """``A V`` for a checked block ``(n, k)``; by default one vmapped `_matvec`."""
        if block.shape[1] == 0:
            return block.new_zeros(self.shape[0], 0)
        # out_dims=1 would not do: torch expands a result that no column enters along axis 0 only.
        return torch.func.vmap(self._matvec, in_dims=1)(block).T

    def _rmatvec(self, v: Tensor) -> Tensor:
        """``A^T v`` for a checked vector ``(m,)``."""
        raise TypeError(f"{self!r} does not define its transposed product")

    def _transpose(self) -> LinearOperator:
        """``A^T`` of an operator that is not symmetric."""
        return algebra.Transpose(self)

    def _cost(self) -> Cost:
        """Cost of one `_matvec`; by default that of one product with each operand."""
        return sum((operand.cost for operand in self.operands), Cost())

    def _exact_diagonal(self) -> Tensor | None:
        """Diagonal ``(n,)`` where it costs about a product; None otherwise."""
        return None

    def _exact_trace(self) -> Tensor | None:
        """Trace where it costs about a product; None otherwise."""
        diagonal = self._exact_diagonal()
        return None if diagonal is None else diagonal.sum()

    def _exact_logdet(self) -> Tensor | None:
        """``log |det A|`` where structure gives it; None otherwise."""
        if self.lower_triangular or self.upper_triangular:
            diagonal = self._exact_diagonal()
            return None if diagonal is None else diagonal.abs().log().sum()
        return None

    def submatrix(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Entries ``A_ij`` for i in `rows` and j in `columns`, without the rest of A.

        Classes that hold or can evaluate single entries define it: `Dense`, `Diagonal`, kernel Gram
        matrices, and sums, multiples and transposes of these. No other falls back on products with
        unit vectors, whose cost would be that of `to_dense`: ``Dense(A.to_dense())`` says so aloud.

        Parameters
        ----------
        rows, columns
            Integer tensors ``(..., k)`` and ``(..., m)`` with the same leading batch axes, on the
            device of A; counted from zero.

        Returns
        -------
        Tensor
            ``(..., k, m)``, differentiable with respect to the tensors of A.

        Raises
        ------
        TypeError
            This class has no cheap entries.
        IndexError
            An index is out of range.

        Examples
        --------
        >>> import torch, operators as ops
        >>> A = ops.Dense(torch.tensor([[1.0, 2.0], [3.0, 4.0]])) + 10.0 * ops.Identity(2)
        >>> A.submatrix(torch.tensor([1]), torch.tensor([0, 1]))
        tensor([[ 3., 14.]])
        """
        raise TypeError(
            f"{self!r} has no entries that cost less than products with it; where it is small, "
            "take ops.Dense(A.to_dense())"
        )

    def check_claims(self) -> bool:
        """Try the promised facts of this operator and its operands; runs by itself at first use.

        A random Krylov space (two products for symmetry, eight for definiteness) refutes a claim
        or lets it stand; passing is no proof. Under ``torch.func.vmap`` values cannot be read,
        and the claims wait.

        Returns
        -------
        bool
            Whether all of them have been tried.

        Raises
        ------
        FalseClaimError
            A claim is false; the message names the operator and the claim.
        """
        if not self._probed:
            waiting = [operand for operand in self.operands if not operand.check_claims()]
            self._probed = self._try_claims() and not waiting
        return self._probed

    def vouched(self) -> Self:
        """The same operator, whose promised facts are taken on trust: for what holds by theory.

        A Gram matrix is positive semidefinite and a product by autograd is linear, whatever a test
        with rounded numbers may say; and the test costs up to eight products.
        """
        self._probed = True
        return self

    def _try_claims(self) -> bool:
        """Raise where a claim of this class itself is false; False where none can tell now."""
        return not self._claims or refute(self, self._claims)

    def _promises(self) -> bool:
        """Whether there is a claim, of this operator or of an operand."""
        return bool(self._claims) or any(operand._promises() for operand in self.operands)

    def _inherit_claims(self, *sources: LinearOperator) -> None:
        """Try the claims of the operators whose facts this one has; where they wait, they pass on.

        For a class that keeps no operands: what was promised of them would be forgotten.
        """
        if not all(source.check_claims() for source in sources):
            self._claims = self._known_facts()

    def _known_facts(self) -> tuple[str, ...]:
        """Names of the facts that are known."""
        names = (field.name for field in fields(self.structure))
        return tuple(name for name in names if getattr(self.structure, name))

    def to_dense(self) -> Tensor:
        """Matrix ``(m, n)``. Costs n products and m n numbers."""
        self.check_claims()
        eye = torch.eye(self.shape[1], dtype=self.dtype, device=self.device)
        return self._matmat(eye)

    def _check_tensor(self, v: Tensor) -> None:
        if v.dtype != self.dtype or v.device != self.device:
            raise TypeError(
                f"{self!r} applied to {v.dtype} on {v.device}; expected {self.dtype} on "
                f"{self.device}"
            )
        if v.ndim not in (1, 2) or v.shape[0] != self.shape[1]:
            raise ValueError(
                f"{self!r} applied to a tensor of shape {tuple(v.shape)}; expected "
                f"({self.shape[1]},), ({self.shape[1]}, k), or the nested structure {self.domain}"
            )

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, LinearOperator):
            return algebra.composed(self, other)
        if not self._probed:
            self.check_claims()
        if isinstance(other, Tensor) and (self.domain.is_flat or not self.domain.holds(other)):
            self._check_tensor(other)
            if other.shape[-1:] == (0,) and other.ndim == 2:
                return other.new_zeros(self.shape[0], 0)
            image = self._matvec(other) if other.ndim == 1 else self._matmat(other)
            borrowed = 0 in image.stride() or memory(image) == memory(other)
            return image.clone() if borrowed else image
        image = self._map(other)
        taken = {memory(leaf): math.inf for leaf in pytree.tree_leaves(other)}
        return pytree.tree_map(lambda leaf: _owned(leaf, taken), image)

    def __rmatmul__(self, other: Any) -> Any:
        raise TypeError(
            f"{type(other).__name__} @ {self!r}; write A.T @ v for the product from the left"
        )

    # --- algebra ------------------------------------------------------------------------------

    @property
    def T(self) -> LinearOperator:
        """Transpose ``A^T``."""
        if self.symmetric:
            return self
        transposed = self._transpose()
        transposed._source = weakref.ref(self)
        return transposed

    # Whether it has a size, but no dtype, device and space of its own.
    _untyped = False

    def _on(self, space: Space) -> LinearOperator:
        """The operator on `space`, where it has no space of its own but a size; else unchanged."""
        return self

    def _add(self, other: LinearOperator) -> LinearOperator | None:
        """``A + B`` where a class knows better than `Sum`; None otherwise."""
        return None

    def _scale(self, factor: Scalar) -> LinearOperator:
        """``c A`` where a class knows better than `Scaled`."""
        return algebra.Scaled(self, factor)

    def _compose(self, other: LinearOperator) -> LinearOperator | None:
        """``A B`` where the class of A knows better than `Product`; None otherwise."""
        return None

    def _rcompose(self, other: LinearOperator) -> LinearOperator | None:
        """``B A`` where the class of A knows better than `Product`; None otherwise."""
        return None

    def __add__(self, other: LinearOperator) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        return algebra.added(self, other)

    def __radd__(self, other: int) -> LinearOperator:
        # sum(operators) starts from the integer 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __mul__(self, factor: Scalar) -> LinearOperator:
        if isinstance(factor, Tensor) and factor.ndim != 0:
            raise ValueError(f"factor has shape {tuple(factor.shape)}; expected a scalar")
        if isinstance(factor, Tensor) and factor.is_complex():
            raise TypeError(f"factor is {factor.dtype}; expected a real number for {self!r}")
        if not isinstance(factor, (Real, Tensor)):
            return NotImplemented
        # numpy's scalars are Real too; torch wants Python's.
        return self._scale(factor if isinstance(factor, (float, int, Tensor)) else float(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Scalar) -> LinearOperator:
        return self * (1 / divisor)

    def __neg__(self) -> LinearOperator:
        return self * -1.0

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return self + (-other)

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.shape}"

    def __str__(self) -> str:
        """The tree of operands: class, shape, structure, cost of one product."""
        return "\n".join(self._tree("", ""))

    def _describe(self) -> str:
        """What the printed tree says of this class beyond shape, structure and cost."""
        return ""

    def _tree(self, first: str, rest: str) -> list[str]:
        dtype = str(self.dtype).removeprefix("torch.")
        facts = [
            f"{type(self).__name__}{self.shape} {dtype}",
            str(self.structure),
            self._describe(),
            str(self.cost),
        ]
        lines = [first + "; ".join(fact for fact in facts if fact)]
        operands = self.operands
        for i, operand in enumerate(operands):
            last = i == len(operands) - 1
            branch, stem = ("`- ", "   ") if last else ("|- ", "|  ")
            lines += operand._tree(rest + branch, rest + stem)
        return lines


class ArgumentOf:
    """What to call the argument of a product in an error message: worded when there is one."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator

    def __str__(self) -> str:
        return f"the argument of {self.operator!r}"


@dataclass(frozen=True, eq=False)
class _Fixed:
    """What an operator is made of besides its tensors; equal where each item is.

    Facts do not count: they may be known of one operator and not of its like.
    """

    names: tuple[str, ...]
    treespec: pytree.TreeSpec  # of the list of their values
    moving: list[bool]  # which leaves are floating tensors
    origin: list[tuple[int, int]]  # where their values were, and which version of them
    held: list[Any]  # the other leaves
    rest: dict[str, Any]  # the other attributes

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, _Fixed)
            and (self.names, self.treespec, self.moving)
            == (other.names, other.treespec, other.moving)
            and _alike(self.held, other.held)
            and _alike(self._made_of(), other._made_of())
        )

    def __hash__(self) -> int:
        return hash(self.names)

    def _made_of(self) -> dict[str, Any]:
        return {k: v for k, v in self.rest.items() if k not in ("structure", "_claims")}


def _alike(a: Any, b: Any) -> bool:
    # Tensors compare entry by entry, so here they are the same only if they are one.
    leaves, treespec = pytree.tree_flatten(a)
    others, other_treespec = pytree.tree_flatten(b)
    return treespec == other_treespec and all(
        x is y or (not (isinstance(x, Tensor) or isinstance(y, Tensor)) and bool(x == y))
        for x, y in zip(leaves, others, strict=True)
    )


def _flatten(operator: LinearOperator) -> tuple[list[Any], _Fixed]:
    names = [name for name in operator._parameters if name in operator.__dict__]
    values = [operator.__dict__[name] for name in names]
    fixed = operator._fixed
    if fixed is not None:
        # A leaf may be a tree of its own by now, as in the Hessian with respect to an operator.
        leaves = fixed.treespec.flatten_up_to(values)
    else:
        leaves, treespec = pytree.tree_flatten(values)
        moving = [isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves]
        held = [None if moves else leaf for leaf, moves in zip(leaves, moving, strict=True)]
        left_out = {*names, *operator._transient, "_probed", "_source", "_fixed"}
        rest = {name: value for name, value in operator.__dict__.items() if name not in left_out}
        tensors = [leaf for leaf, moves in zip(leaves, moving, strict=True) if moves]
        fixed = _Fixed(tuple(names), treespec, moving, [place(t) for t in tensors], held, rest)
    return [leaf for leaf, moves in zip(leaves, fixed.moving, strict=True) if moves], fixed


def _unflatten(cls: type[LinearOperator], tensors: list[Any], fixed: _Fixed) -> LinearOperator:
    operator = object.__new__(cls)
    supply = iter(tensors)
    leaves = [
        next(supply) if moves else leaf
        for leaf, moves in zip(fixed.held, fixed.moving, strict=True)
    ]
    values = pytree.tree_unflatten(leaves, fixed.treespec)
    operator.__dict__.update(fixed.rest, **dict(zip(fixed.names, values, strict=True)))
    # torch also fills trees with what is no tensor (in_dims, say), and takes them apart again.
    operator._fixed = fixed
    # Facts were learnt of the tensors that it was taken apart from: of others they are but claims.
    # What follows from the facts of operands alone is tried there.
    if all(isinstance(tensor, Tensor) for tensor in tensors):
        own = len(tensors) > sum(len(operand.tensors) for operand in operator.operands)
        if own and [place(tensor) for tensor in tensors] != fixed.origin:
            operator._claims = (*operator._claims, *operator._known_facts())
    return operator


def _owned(image: Tensor, taken: dict[int, float]) -> Tensor:
    """A leaf of a product that can be written into: with memory of its own.

    What a function returns may be its argument itself, one number in many places, or the same
    numbers twice. `taken` says up to where each piece of memory belongs to the argument or to the
    leaves before.
    """
    place, start = memory(image), image.storage_offset()
    if 0 in image.stride() or start < taken.get(place, 0):
        return image.clone()
    pairs = zip(image.shape, image.stride(), strict=True)
    taken[place] = float(start + 1) + sum((size - 1) * stride for size, stride in pairs)
    return image


def sign_of(factor: Scalar, dtype: torch.dtype | None = None) -> float | None:
    """Value of a factor where it is known before tracing; None for tensors (see `Structure`).

    Zero where it is below the normal numbers of `dtype`: a multiple by it need not be definite.
    """
    if isinstance(factor, Tensor):
        return None
    value = float(factor)
    vanishes = dtype is not None and 0 < value < torch.finfo(dtype).tiny
    return 0.0 if vanishes else value


# Sums and products are operators too: the module that defines them needs the class above.
from operators import algebra  # noqa: E402
