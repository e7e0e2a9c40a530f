"""`ModelCurvature`: curvature at the outputs of a model, pulled back to its parameters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from operators.cost import Cost
from operators.curvature.batch import batch_size, check_chunk_size, chunks
from operators.curvature.module import as_function
from operators.kept import Kept
from operators.layout import by_columns
from operators.linear_operator import LinearOperator, Scalar
from operators.space import Space, Tree
from operators.structure import Structure
from operators.tracing import readable

# Columns of a block that go through a model at once: enough to make its products wide, few enough
# that their activations fit.
COLUMNS = 64


class ModelCurvature(LinearOperator):
    """``A = sum_n J_n^T H_n J_n + damping I`` with ``J_n = d model(y, inputs_n) / d y``.

    The base class of `GaussNewton` and `Fisher`, which say what H is.

    Parameters
    ----------
    model
        ``model(y, inputs)``, or a `torch.nn.Module`.
    y
        Point; None for the parameters of a module that require gradients.
    inputs
        What the model takes, with a leading axis of length N where there are chunks.
    damping
        ``>= 0``: the multiple of the identity inside the operator.
    chunk_size
        Samples that go through the model at once; None for all of them.
    positive_semidefinite
        Whether all ``H_n`` are known to be so.
    claims
        Facts that the user promises.

    Notes
    -----
    Without chunks the model is run once, at the first product, and the sweeps through it are kept
    as those of `Linearization` are: a product is one sweep forward and one back, about the cost of
    a gradient. They are recorded anew where `Hessian` does so. With chunks nothing is kept: memory
    is that of one chunk, a product costs about two gradients. The columns of a block go through the
    model together, up to 64.
    """

    _parameters: ClassVar[tuple[str, ...]] = ("y", "inputs", "damping")
    _transient = ("_kept",)
    _kept: Kept | None = None

    def __init__(
        self,
        model: nn.Module | Callable[[Tree, Tree], Tree],
        y: Tree | None,
        inputs: Tree,
        *,
        damping: Scalar,
        chunk_size: int | None,
        positive_semidefinite: bool,
        claims: tuple[str, ...] = (),
    ) -> None:
        self.model, self.y = as_function(model, y)
        space = Space.of(self.y, "y")
        self.damping = checked_damping(damping, space)
        check_chunk_size(chunk_size)
        self.inputs, self.chunk_size = inputs, chunk_size
        damped = _positive(self.damping)
        structure = Structure(
            symmetric=True,
            positive_semidefinite=positive_semidefinite,
            positive_definite=positive_semidefinite and damped,
        )
        super().__init__(space, space, structure)
        self._claims = claims

    @abstractmethod
    def _shares(self) -> Tree:
        """What each sample brings to H: tensors with a leading axis N."""

    @abstractmethod
    def _curve(self, outputs: Tree, tangent: Tree, share: Tree, fraction: float) -> Tree:
        """``H u`` at the outputs of a chunk with this fraction of the samples."""

    def _chunks(self) -> Iterator[tuple[Tree, Tree, float]]:
        """Inputs, shares and fraction of the samples of each chunk."""
        batch = (self.inputs, self._shares())
        count = batch_size(self.inputs, "inputs")
        for inputs, share in chunks(batch, self.chunk_size):
            yield inputs, share, batch_size(inputs, "inputs") / count

    def _sweeps(self) -> tuple[Tree, Callable[[Tree], Tree], Callable[[Tree], Tree]]:
        """Outputs, ``v -> J v`` and ``u -> J^T u`` for the whole batch."""

        def record() -> tuple[Tree, Any]:
            point = by_columns(self.y)
            outputs, pull = torch.func.vjp(lambda y: self.model(y, self.inputs), point)[:2]
            # u -> J^T u is linear, and J its transpose: a sweep back through the sweep back.
            zero = pytree.tree_map(torch.zeros_like, outputs)
            push = torch.func.vjp(lambda u: pull(u)[0], zero)[1]
            return outputs, (outputs, lambda v: push(v)[0], lambda u: pull(u)[0])

        self._kept = self._kept or Kept()
        leaves = pytree.tree_leaves((self.y, self.inputs))
        sweeps: tuple[Tree, Any, Any] = self._kept.get(leaves, record, self.model)
        return sweeps

    def _products(self) -> Iterator[Callable[[Tree], Tree]]:
        """``v -> J^T H J v`` for each chunk."""
        if self.chunk_size is None:
            outputs, push, pull = self._sweeps()
            share = self._shares()

            def product(v: Tree) -> Tree:
                return pull(self._curve(outputs, push(v), share, 1.0))

            yield product
            return
        for inputs, share, fraction in self._chunks():

            def chunked(
                v: Tree, inputs: Tree = inputs, share: Tree = share, fraction: float = fraction
            ) -> Tree:
                def at(y: Tree) -> Tree:
                    return self.model(y, inputs)

                # What is used once is cheaper by forward mode than by two sweeps back.
                image = torch.func.jvp(at, (self.y,), (v,))[1]
                outputs, pull = torch.func.vjp(at, self.y)[:2]
                return pull(self._curve(outputs, image, share, fraction))[0]

            yield chunked

    def _matvec(self, v: Tensor) -> Tensor:
        direction = self.domain.unravel(v)
        image = reduce(_added, (product(direction) for product in self._products()))
        return self._damped(self.domain.ravel(image), v)

    def _matmat(self, block: Tensor) -> Tensor:
        if block.shape[1] == 0:
            return torch.zeros_like(block)
        # A column of a block in memory is a strided vector, and slow to take apart.
        columns = block.T.contiguous()
        directions = torch.func.vmap(self.domain.unravel)(columns)
        products = (torch.func.vmap(p, chunk_size=COLUMNS) for p in self._products())
        images = reduce(_added, (product(directions) for product in products))
        return self._damped(torch.func.vmap(self.domain.ravel)(images), columns).T

    def _damped(self, image: Tensor, v: Tensor) -> Tensor:
        """``image + damping v``, in one pass over memory where the damping is a plain number."""
        if isinstance(self.damping, Tensor):
            return image + self.damping * v
        return image if self.damping == 0 else torch.add(image, v, alpha=self.damping)

    def _cost(self) -> Cost:
        return Cost(evaluations=4 if self.chunk_size is None else 6)

    def _describe(self) -> str:
        damping = f"damping {float(self.damping):.3g}" if _positive(self.damping) else ""
        pieces = f"chunks of {self.chunk_size} samples" if self.chunk_size else ""
        return ", ".join(part for part in (damping, pieces) if part)


def checked_damping(damping: Scalar, space: Space) -> Scalar:
    """The damping: a number as it is, a tensor as a scalar of the space's dtype and device.

    Raises
    ------
    ValueError
        Negative, NaN, or not one number.
    """
    value = torch.as_tensor(damping, dtype=space.dtype, device=space.device)
    if value.ndim != 0 or (readable(value) and not bool(value >= 0)):
        raise ValueError(f"damping={damping}; expected one number >= 0")
    return value if isinstance(damping, Tensor) else float(damping)


def _positive(damping: Scalar) -> bool:
    """Whether the damping is known to be positive."""
    return bool(damping > 0) if not isinstance(damping, Tensor) or readable(damping) else False


def _added(left: Tree, right: Tree) -> Tree:
    return pytree.tree_map(torch.add, left, right)
