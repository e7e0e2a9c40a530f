"""Entries of operators without the rest: `LinearOperator.submatrix`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import operators as ops
from tests.operators.opaque import Opaque
from tests.solvers.kernel.grams import PointGram, cloud, matern52


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


N = 7
GRAM = PointGram(matern52, cloud(N), torch.zeros(N, dtype=torch.long), 0.3)
OPERATORS = {
    "dense": ops.Dense(random(N, N)),
    "transpose": ops.Transpose(ops.Dense(random(N, N))),
    "diagonal": ops.Diagonal(random(N)),
    "identity": ops.Identity(N, torch.float64),
    "scaled identity": 0.3 * ops.Identity(N, torch.float64),
    "sum": ops.Sum(ops.Dense(random(N, N)), ops.Diagonal(random(N, seed=1))),
    "scaled": ops.Scaled(ops.Dense(random(N, N)), torch.tensor(2.0, dtype=torch.float64)),
    "gram": GRAM + 0.1 * ops.Identity(N),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_entries_are_those_of_the_matrix(name):
    A = OPERATORS[name]
    matrix = A.to_dense()
    rows, columns = torch.tensor([[4, 0, 2], [6, 6, 1]]), torch.tensor([[2, 3], [1, 0]])
    found = A.submatrix(rows, columns)
    assert found.shape == (2, 3, 2)
    for i in range(2):
        torch.testing.assert_close(found[i], matrix[rows[i]][:, columns[i]])
    torch.testing.assert_close(A.submatrix(rows[0], columns[0]), matrix[rows[0]][:, columns[0]])


def test_a_scalar_of_a_wider_dtype_does_not_widen():
    A = ops.Scaled(ops.Dense(torch.eye(3)), torch.tensor(2.0, dtype=torch.float64))
    assert A.submatrix(torch.arange(3), torch.arange(3)).dtype == torch.float32


def test_entries_are_differentiable():
    rows, columns = torch.tensor([[0, 3], [5, 2]]), torch.tensor([[1, 3], [5, 6]])

    def entries(matrix: Tensor, diagonal: Tensor, factor: Tensor) -> Tensor:
        A = factor * ops.Dense(matrix) + ops.Diagonal(diagonal)
        return A.submatrix(rows, columns)

    inputs = [random(N, N), random(N), random(1)[0]]
    assert torch.autograd.gradcheck(entries, [t.requires_grad_() for t in inputs])


def test_others_say_what_to_do():
    with pytest.raises(TypeError, match=r"Dense\(A.to_dense\(\)\)"):
        Opaque(random(N, N)).submatrix(torch.arange(2), torch.arange(2))
