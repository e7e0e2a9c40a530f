"""What a preconditioner makes of an operator: `ApproximateInverse`, by products with blocks."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from operators import Cost, LinearOperator, Structure
from solvers.preconditioner import Preconditioner


class ApproximateInverse(LinearOperator):
    """``P``, which stands for ``A^-1``.

    A subclass implements `_apply`. A pickle or a copy holds the settings and the operator: it
    prepares anew.

    Parameters
    ----------
    settings
        What made it.
    A
        The operator.
    structure
        What is known of P; by default that it is symmetric where A is.
    """

    # What does the work, and nonzeros on all levels over those of A, for `Info`.
    backend = "torch"
    operator_complexity: float | None = None

    def __init__(
        self, settings: Preconditioner, A: LinearOperator, structure: Structure | None = None
    ) -> None:
        structure = Structure(symmetric=A.symmetric) if structure is None else structure
        super().__init__(A.codomain, A.domain, structure)
        self.settings, self.A = settings, A

    def __reduce__(self) -> tuple[Any, ...]:
        return self.settings.prepare, (self.A,)

    @abstractmethod
    def _cost(self) -> Cost:
        """Cost of a product."""

    @abstractmethod
    def _apply(self, block: Tensor, transpose: bool) -> Tensor:
        """``P V`` or ``P^T V`` for a block ``(n, k)`` with k > 0."""

    def _matmat(self, block: Tensor) -> Tensor:
        return self._apply(block, False) if block.numel() else block.clone()

    def _matvec(self, v: Tensor) -> Tensor:
        return self._matmat(v[:, None])[:, 0]

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.T._matmat(v[:, None])[:, 0]

    def _transpose(self) -> LinearOperator:
        return _Transposed(self)

    def _describe(self) -> str:
        return f"by {self.settings}"

    def __repr__(self) -> str:
        return f"{type(self.settings).__name__} of {self.A!r}"


class _Transposed(LinearOperator):
    """``P^T``."""

    def __init__(self, P: ApproximateInverse) -> None:
        super().__init__(P.codomain, P.domain, P.structure.transpose())
        self.P, self.backend, self.operator_complexity = P, P.backend, P.operator_complexity

    def _matmat(self, block: Tensor) -> Tensor:
        return self.P._apply(block, True) if block.numel() else block.clone()

    def _matvec(self, v: Tensor) -> Tensor:
        return self._matmat(v[:, None])[:, 0]

    def _transpose(self) -> LinearOperator:
        return self.P

    def _cost(self) -> Cost:
        return self.P.cost

    def __repr__(self) -> str:
        return f"{self.P!r}.T"
