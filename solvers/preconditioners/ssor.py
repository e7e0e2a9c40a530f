"""`SSOR`: a sweep through the unknowns and one back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from operators import Cost, LinearOperator, Structure
from solvers.preconditioner import Preconditioner
from solvers.preconditioners.approximate_inverse import ApproximateInverse
from solvers.stationary.splitting import Splitting


@dataclass(frozen=True, kw_only=True)
class SSOR(Preconditioner):
    """Symmetric successive over-relaxation: a sweep over the unknowns and one back.

    With what of A is below, on and above the diagonal, ``A = L + D + U``,

        P = (2 - omega) / omega (D / omega + U)^-1 D (D / omega + L)^-1 .

    Symmetric where A is, and positive definite where D is, too.

    Parameters
    ----------
    omega
        Relaxation factor, between 0 and 2; 1 is symmetric Gauss-Seidel.

    Notes
    -----
    A product costs two sweeps, about as much as a product with A; see `Splitting`. For the
    five-point Laplacian of spacing h the condition number of ``P A`` is ``O(1 / h)`` at
    ``omega = 2 / (1 + c h)``, where that of A is ``O(1 / h^2)``, and it depends little on omega
    near the best (Axelsson, 1972, doi:10.1007/BF01932955; Young, 1971).

    Examples
    --------
    >>> import torch, operators as ops
    >>> A = ops.Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), symmetric=True)
    >>> SSOR().prepare(A) @ torch.tensor([4.0, 8.0])
    tensor([0.5000, 3.0000])
    """

    omega: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.omega < 2:
            raise ValueError(f"SSOR: omega={self.omega}; expected a number between 0 and 2")

    def _prepare(self, A: LinearOperator) -> LinearOperator:
        """Take A apart.

        Raises
        ------
        SingularError
            There is a zero on the diagonal.
        StructureError
            A is not square.
        """
        return _Sweeps(self, A)


class _Sweeps(ApproximateInverse):
    settings: SSOR

    def __init__(self, settings: SSOR, A: LinearOperator) -> None:
        self.splitting = Splitting(A, settings.omega)
        definite = A.symmetric and bool((self.splitting.diagonal > 0).all())
        structure = Structure(symmetric=A.symmetric, positive_definite=definite)
        super().__init__(settings, A, structure)
        self.backend = self.splitting.backend
        omega = settings.omega
        self.middle = ((2 - omega) / omega * self.splitting.diagonal)[:, None]

    def _apply(self, block: Tensor, transpose: bool) -> Tensor:
        below, above = self.splitting, self.splitting.upper
        if transpose:
            return below.backward(self.middle * above.forward(block))
        return above.backward(self.middle * below.forward(block))

    def _cost(self) -> Cost:
        return 2 * self.A.cost
