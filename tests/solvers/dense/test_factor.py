"""`solvers.CholeskyFactor` against dense linear algebra and differences, to second order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import solvers


def spd(n: int = 5) -> Tensor:
    root = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    return root @ root.T + n * torch.eye(n, dtype=torch.float64)


def symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def results(matrix: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    factor = solvers.CholeskyFactor(symmetric(matrix))
    return factor.solve(b), factor.logdet(), factor.inverse()


@pytest.mark.parametrize("columns", [(), (3,)])
def test_it_is_dense_algebra(columns: tuple[int, ...]) -> None:
    A, b = spd(), torch.randn(5, *columns, dtype=torch.float64)
    x, logdet, inverse = results(A, b)
    torch.testing.assert_close(x, torch.linalg.solve(A, b))
    torch.testing.assert_close(logdet, torch.linalg.slogdet(A).logabsdet)
    torch.testing.assert_close(inverse, torch.linalg.inv(A))


@pytest.mark.parametrize("columns", [(), (2,)])
def test_derivatives_to_second_order(columns: tuple[int, ...]) -> None:
    A = spd(4).requires_grad_()
    b = torch.randn(4, *columns, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(results, (A, b))
    assert torch.autograd.gradgradcheck(results, (A, b))


def test_what_cannot_be_factorised_is_told() -> None:
    with pytest.raises(solvers.NotPositiveDefiniteError, match="leading minor of order 2"):
        solvers.CholeskyFactor(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        solvers.CholeskyFactor(torch.tensor([[float("nan"), 0.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"expected \(n, n\)"):
        solvers.CholeskyFactor(torch.zeros(2, 3))
