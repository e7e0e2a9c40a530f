"""A linear map that the user wrote as a function: `FunctionOperator`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from operators.claims import refute
from operators.cost import Cost
from operators.linear_operator import LinearOperator
from operators.space import Space, Tree
from operators.structure import Structure


class FunctionOperator(LinearOperator):
    """``A v = matvec(v, *args)``: a user's own product.

    Parameters
    ----------
    matvec
        ``matvec(v, *args)``, linear in v, of torch operations; takes and returns nested structures
        as v has them. That it is linear is probed at the first use, like every claim below.
    domain
        Space of v: a `Space`, or an example of v (its values do not matter).
    *args
        What else it depends on. Tensors handed over here are parameters of the operator: torch.func
        sees them. So does plain autograd, which also sees tensors that matvec closes over.
    rmatvec
        ``rmatvec(u, *args) = A^T u``. By default one reverse-mode sweep through matvec.
    symmetric, positive_semidefinite, positive_definite, lower_triangular, upper_triangular
        Claims about A.
    cost
        Cost of one product, for printing.

    Raises
    ------
    TypeError, ValueError
        ``matvec`` does not return a (nested) floating tensor, or a claim needs a square shape.
    FalseClaimError
        At the first use: a claim is false, matvec is not linear, or rmatvec not its transpose.

    Examples
    --------
    >>> import torch
    >>> A = FunctionOperator(lambda v: v.flip(0) + v, torch.zeros(3), symmetric=True)
    >>> A @ torch.tensor([1.0, 2.0, 3.0])
    tensor([4., 4., 4.])
    >>> B = FunctionOperator(lambda v: v[1:] - v[:-1], torch.zeros(3))
    >>> B.T @ torch.tensor([1.0, 1.0])
    tensor([-1.,  0.,  1.])
    """

    _parameters = ("args",)
    _transient = ("_transposable",)
    # Whether the transposed product by autograd has been tried.
    _transposable = False

    def __init__(
        self,
        matvec: Callable[..., Tree],
        domain: Space | Tree,
        *args: Any,
        rmatvec: Callable[..., Tree] | None = None,
        symmetric: bool = False,
        positive_semidefinite: bool = False,
        positive_definite: bool = False,
        lower_triangular: bool = False,
        upper_triangular: bool = False,
        cost: Cost | None = None,
    ) -> None:
        space = domain if isinstance(domain, Space) else Space.of(domain, "domain")
        zero = torch.zeros(space.size, dtype=space.dtype, device=space.device)
        with torch.no_grad():
            codomain = Space.of(matvec(space.unravel(zero), *args), "matvec(v)")
        claims = {
            "symmetric": symmetric,
            "positive_semidefinite": positive_semidefinite,
            "positive_definite": positive_definite,
            "lower_triangular": lower_triangular,
            "upper_triangular": upper_triangular,
        }
        structure = Structure(**claims)
        if structure.symmetric and codomain != space:
            raise ValueError(
                f"matvec maps {space} to {codomain}, so it is not {structure}; "
                "a symmetric operator returns the structure that it takes"
            )
        super().__init__(space, codomain, structure)
        made = tuple(claim for claim, holds in claims.items() if holds)
        self._claims = ("linear", *made, *(("adjoint",) if rmatvec is not None else ()))
        self.matvec, self.rmatvec, self.args = matvec, rmatvec, args
        self._stated_cost = Cost(evaluations=1) if cost is None else cost

    def _matvec(self, v: Tensor) -> Tensor:
        return self.codomain.ravel(self.matvec(self.domain.unravel(v), *self.args), "matvec(v)")

    def _rmatvec(self, v: Tensor) -> Tensor:
        if self.rmatvec is not None:
            image = self.rmatvec(self.codomain.unravel(v), *self.args)
            return self.domain.ravel(image, "rmatvec(u)")
        if not self._transposable:
            # Autograd may not see through matvec, and would give zeros without a word.
            self._transposable = True
            self._transposable = refute(self, ("adjoint",))
        zero = self.domain.unravel(v.new_zeros(self.shape[1]))
        pullback = torch.func.vjp(lambda u: self.matvec(u, *self.args), zero)[1]
        return self.domain.ravel(pullback(self.codomain.unravel(v))[0])

    def _cost(self) -> Cost:
        return self._stated_cost
