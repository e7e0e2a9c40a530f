"""The inverse of an operator as an operator: `Inverse`, given a solver from outside."""

from __future__ import annotations

from torch import Tensor

from operators.algebra import Compound
from operators.cost import Cost
from operators.linear_operator import LinearOperator
from operators.solve_rule import Factor, Solver, apply_inverse


class Inverse(Compound):
    """``A^-1``, lazily: a product is a solve.

    Parameters
    ----------
    operator
        A, square.
    solver
        Object with ``prepare(A)``, as every solver of the package `solvers`. It is asked at the
        first product; what it prepares (a factorisation) serves every later product, those with
        the transpose and those of derivatives, until a tensor inside A changes in place or a name
        in a function inside A is bound to something else.

    Raises
    ------
    ValueError
        A is not square; or, at a product that is to be differentiated, a function inside A closes
        over a tensor that is being differentiated (or reads it from an object or a global): it
        would get a silent zero gradient, and has to be handed over as an argument
        (``Hessian(loss, y, x)``, not ``Hessian(lambda y: ..., y)``). Parameters of a module for
        which ``torch.func.functional_call`` puts those of A are no such tensors.
    NotImplementedError
        At a product under forward over forward mode, which torch gets wrong; forward over reverse,
        reverse over forward and reverse over reverse are right.

    Notes
    -----
    With ``x = A^-1 b`` the derivatives are solves with the same prepared A, never sweeps through
    the solver:

        x' = A^-1 (b' - A' x) ,     b_bar = A^-T x_bar ,     A_bar = -b_bar x^T ,

    where ``A_bar`` is contracted with the derivative of A by its tensors. They hold to the accuracy
    of the solves. Under vmap over b alone the batch is one block of right-hand sides; over the
    tensors of A the solver gets the batch as one `Stacked` operator, or its members one by one.

    Examples
    --------
    >>> import torch, operators as ops, solvers
    >>> A = ops.Dense(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), positive_definite=True)
    >>> x = ops.Inverse(A, solvers.DenseCholesky()) @ torch.tensor([5.0, 4.0])
    >>> x.round(decimals=5)
    tensor([1., 1.])
    """

    _parameters = ("operator",)
    _transient = ("_factor",)
    # What the solver holds, a preconditioner say, does not enter the solution.
    _unread = (*LinearOperator._unread, "solver")
    _factor: Factor | None = None

    def __init__(self, operator: LinearOperator, solver: Solver) -> None:
        if not isinstance(operator, LinearOperator):
            raise TypeError(
                f"operator is a {type(operator).__name__}; expected an operator, e.g. Dense(matrix)"
            )
        if operator.shape[0] != operator.shape[1]:
            raise ValueError(f"{operator!r} is not square and has no inverse")
        if isinstance(solver, type) or not hasattr(solver, "prepare"):
            raise TypeError(f"solver is {solver!r}; expected a solver object, as solvers.CG() is")
        super().__init__(operator.codomain, operator.domain, operator.structure.inverse())
        self.operator, self.solver = operator, solver

    def _remade(self, *operands: LinearOperator) -> LinearOperator:
        return Inverse(operands[0], self.solver)

    def _apply(self, b: Tensor, transpose: bool) -> Tensor:
        if self._factor is None:
            self._factor = Factor(self.solver)
        return apply_inverse(self.operator, b, self._factor, transpose=transpose)

    def _matvec(self, v: Tensor) -> Tensor:
        return self._apply(v, transpose=False)

    def _matmat(self, block: Tensor) -> Tensor:
        return self._apply(block, transpose=False)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self._apply(v, transpose=True)

    def _cost(self) -> Cost:
        return Cost(solves=1)

    def _exact_logdet(self) -> Tensor | None:
        logdet = self.operator._exact_logdet()
        return None if logdet is None else -logdet

    def _describe(self) -> str:
        return f"by {self.solver}"
