"""`cholesky_factor`: one Cholesky factorisation for solves, the determinant and the inverse."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from solvers.solution import NotPositiveDefiniteError


class CholeskyFactor:
    """``A = L L^T`` of a dense matrix, made once; what it gives is differentiable in A.

    ``solve``, ``logdet`` and ``inverse`` use one factor, and so do their derivatives: ``A_bar = -q
    x^T`` with ``A q = x_bar`` for a solve, ``A_bar = g A^-1`` for the determinant. Costs ``n^3 /
    3`` flops once, ``2 n^2`` a right-hand side and its adjoint, ``2 n^3 / 3`` for the inverse,
    which `logdet` needs for its derivative alone.

    Parameters
    ----------
    matrix
        Symmetric positive definite ``(n, n)``; its lower half is read.

    Raises
    ------
    solvers.NotPositiveDefiniteError
        A leading minor is not positive; its order is named.
    ValueError
        The matrix is not square, or holds NaN or infinity.

    Examples
    --------
    >>> import torch
    >>> factor = CholeskyFactor(torch.tensor([[4.0, 1.0], [1.0, 3.0]]))
    >>> factor.solve(torch.tensor([5.0, 4.0])).round(decimals=5)
    tensor([1., 1.])
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}; expected (n, n)")
        self.matrix = matrix
        with torch.no_grad():
            plain = matrix.detach()
            self.lower, code = torch.linalg.cholesky_ex(plain)
            if int(code):
                if not bool(torch.isfinite(plain).all()):
                    count = int((~torch.isfinite(plain)).sum())
                    raise ValueError(f"matrix holds {count} NaN or infinite entries")
                raise NotPositiveDefiniteError(
                    f"a matrix of order {len(matrix)} is not positive definite: its leading minor "
                    f"of order {int(code)} is not positive in {matrix.dtype}; enlarge the nugget "
                    f"or "
                    "damping, or remove what is nearly the same twice"
                )

    def solve(self, b: Tensor) -> Tensor:
        """``A^-1 b`` for ``(n,)`` or ``(n, k)``."""
        x: Tensor = _Solve.apply(self, self.matrix, b)
        return x

    def logdet(self) -> Tensor:
        """``log det A``."""
        value: Tensor = _LogDet.apply(self, self.matrix)
        return value

    def inverse(self) -> Tensor:
        """``A^-1``, ``(n, n)``."""
        value: Tensor = _Inverse.apply(self, self.matrix)
        return value

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """``L z`` with normal z, ``(n, count)``: draws of covariance A; not differentiable."""
        z = torch.randn(len(self.lower), count, generator=generator, dtype=self.lower.dtype)
        return self.lower @ z.to(self.lower.device)

    @cached_property
    def plain_inverse(self) -> Tensor:
        """The inverse as numbers; kept."""
        return torch.cholesky_inverse(self.lower.detach())

    def plain_solve(self, b: Tensor) -> Tensor:
        """The solution as numbers."""
        block = b[:, None] if b.ndim == 1 else b
        # Not cholesky_solve, which copies the factor each time.
        y = torch.linalg.solve_triangular(self.lower, block, upper=False)
        x = torch.linalg.solve_triangular(self.lower.mT, y, upper=True)
        return x[:, 0] if b.ndim == 1 else x


# Each rule is written with the differentiable functions, so that it can be differentiated again.
class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(factor: CholeskyFactor, matrix: Tensor, b: Tensor) -> Tensor:
        return factor.plain_solve(b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor, matrix, _ = inputs
        ctx.save_for_backward(matrix, output)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        (x_bar,) = outputs
        matrix, x = ctx.saved_tensors
        q = _Solve.apply(ctx.factor, matrix, x_bar)
        matrix_bar = None
        if ctx.needs_input_grad[1]:
            matrix_bar = torch.outer(-q, x) if x.ndim == 1 else -q @ x.T
        return None, matrix_bar, q


class _LogDet(torch.autograd.Function):
    @staticmethod
    def forward(factor: CholeskyFactor, matrix: Tensor) -> Tensor:
        return 2 * factor.lower.diagonal().log().sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor, matrix = inputs
        ctx.save_for_backward(matrix)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        (matrix,) = ctx.saved_tensors
        return None, outputs[0] * _Inverse.apply(ctx.factor, matrix)


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(factor: CholeskyFactor, matrix: Tensor) -> Tensor:
        return factor.plain_inverse.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor, matrix = inputs
        ctx.save_for_backward(matrix)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        (matrix,) = ctx.saved_tensors
        inverse = _Inverse.apply(ctx.factor, matrix)
        return None, -(inverse @ outputs[0] @ inverse)
