"""`Cost` adds up, and operators print as trees of their operands."""

from __future__ import annotations

import pytest
import torch

import operators as ops
import solvers
from operators import Cost, Dense, Diagonal, Identity, LowRankPlusDiagonal, Space


class TestCost:
    def test_arithmetic(self):
        a, b = Cost(flops=3, evaluations=1), Cost(flops=2, solves=4)
        assert a + b == Cost(flops=5, evaluations=1, solves=4)
        assert 3 * a == a * 3 == a + a + a
        assert sum((a, b), Cost()) == a + b
        assert Cost() + a == a
        assert 0 * a == Cost()

    @pytest.mark.parametrize(
        ("cost", "printed"),
        [
            (Cost(), "0 flop"),
            (Cost(flops=1), "1 flop"),
            (Cost(flops=999), "999 flop"),
            (Cost(flops=1000), "1 kflop"),
            (Cost(flops=1234), "1.23 kflop"),
            (Cost(flops=2.5e6), "2.5 Mflop"),
            (Cost(flops=3e9), "3 Gflop"),
            (Cost(flops=7e12), "7 Tflop"),
            (Cost(evaluations=1), "1 evaluation"),
            (Cost(evaluations=2.5), "2.5 evaluations"),
            (Cost(solves=1), "1 solve"),
            (Cost(flops=10, evaluations=2, solves=3), "10 flop + 2 evaluations + 3 solves"),
        ],
    )
    def test_printed(self, cost, printed):
        assert str(cost) == printed

    def test_rounding_up_to_the_next_prefix(self):
        assert str(Cost(flops=999_999)) in ("1 Mflop", "1e+03 kflop", "1000 kflop")


def test_of_the_elementary_operators():
    assert Dense(torch.zeros(3, 5)).cost == Cost(flops=30)
    assert Diagonal(torch.zeros(4)).cost == Cost(flops=4)
    assert LowRankPlusDiagonal(torch.zeros(2, 10), 1.0).cost.flops >= 80
    assert ops.Jacobian(torch.sin, torch.zeros(2)).cost.evaluations > 0


def test_of_compounds_is_the_sum_of_the_parts():
    A, B, D = Dense(torch.zeros(3, 5)), Dense(torch.zeros(5, 3)), Diagonal(torch.ones(3))
    assert (A @ B).cost == A.cost + B.cost
    assert (D + A @ B).cost == D.cost + A.cost + B.cost + Cost(flops=3)
    assert A.T.cost == A.cost
    assert (2.0 * A).cost == A.cost + Cost(flops=3)
    assert ops.Gram(A).cost == 2 * A.cost
    assert ops.Gram(A, D).cost == 2 * A.cost + D.cost
    J = ops.Jacobian(torch.sin, torch.zeros(2))
    assert J.T.cost == J.cost
    inverse = ops.Inverse(D + A @ B, solvers.DenseLU())
    assert inverse.cost == inverse.T.cost == Cost(solves=1)
    assert (inverse @ D).cost == Cost(flops=3, solves=1)


def test_of_batches():
    D = Diagonal(torch.ones(3))
    assert ops.Stacked([D, D]).cost == Cost(flops=6)
    mean = ops.BatchMean(
        lambda x: ops.Hessian(lambda y: (x @ y).mean(), torch.zeros(2)),
        torch.ones(5, 2),
        chunk_size=2,
    )
    assert mean.cost == ops.Hessian(torch.sum, torch.zeros(2)).cost


class TestPrintedTrees:
    def test_leaf(self):
        assert str(Dense(torch.zeros(2, 3))) == "Dense(2, 3) float32; 12 flop"
        assert (
            str(Dense(torch.eye(2, dtype=torch.float64), positive_definite=True))
            == "Dense(2, 2) float64; positive definite; 8 flop"
        )
        assert str(Identity(3)) == "Identity(3, 3) float32; positive definite, diagonal; 3 flop"
        triangular = Dense(torch.eye(2).tril(), lower_triangular=True)
        assert str(triangular) == "Dense(2, 2) float32; lower triangular; 8 flop"
        assert str(triangular.T) == "Dense(2, 2) float32; upper triangular; 8 flop"

    def test_low_rank(self):
        A = LowRankPlusDiagonal(torch.zeros(2, 5), 1.0)
        assert (
            str(A)
            == f"LowRankPlusDiagonal(5, 5) float32; positive definite; rank 2 + diagonal; {A.cost}"
        )

    def test_compound(self):
        J = ops.Jacobian(torch.sin, torch.zeros(2))
        A = J.T @ Diagonal(torch.ones(2)) @ J + 0.5 * Identity(2)
        assert str(A).splitlines() == [
            "Sum(2, 2) float32; positive definite; 6 flop + 6 evaluations",
            "|- Gram(2, 2) float32; positive semidefinite; 2 flop + 6 evaluations",
            "|  |- Jacobian(2, 2) float32; 3 evaluations",
            "|  `- Diagonal(2, 2) float32; positive definite, diagonal; 2 flop",
            "`- Diagonal(2, 2) float32; positive definite, diagonal; 2 flop",
        ]

    def test_deep(self):
        A = Dense(torch.zeros(2, 2))
        B = 2.0 * (A + A @ (A + A))
        assert str(B).splitlines() == [
            "Scaled(2, 2) float32; 38 flop",
            "`- Sum(2, 2) float32; 36 flop",
            "   |- Dense(2, 2) float32; 8 flop",
            "   `- Product(2, 2) float32; 26 flop",
            "      |- Dense(2, 2) float32; 8 flop",
            "      `- Sum(2, 2) float32; 18 flop",
            "         |- Dense(2, 2) float32; 8 flop",
            "         `- Dense(2, 2) float32; 8 flop",
        ]

    def test_transpose(self):
        J = ops.Jacobian(lambda y: y[1:], torch.zeros(3, dtype=torch.float64))
        assert str(J.T).splitlines() == [
            "Transpose(3, 2) float64; 3 evaluations",
            "`- Jacobian(2, 3) float64; 3 evaluations",
        ]

    def test_inverse(self):
        inverse = ops.Inverse(Dense(torch.eye(2), positive_definite=True), solvers.DenseCholesky())
        first, second = str(inverse).splitlines()
        assert first == (
            f"Inverse(2, 2) float32; positive definite; by {solvers.DenseCholesky()}; 1 solve"
        )
        assert second == "`- Dense(2, 2) float32; positive definite; 8 flop"

    def test_batches(self):
        stacked = ops.Stacked([Dense(torch.zeros(2, 3)), Dense(torch.ones(2, 3))])
        assert str(stacked) == "Stacked(4, 6) float32; 2 of Dense(2, 3); 24 flop"
        mean = ops.BatchMean(
            lambda x, y: ops.Hessian(lambda y, x: (x @ y).square().mean(), y, x),
            torch.ones(5, 2),
            torch.zeros(2),
            chunk_size=2,
        )
        assert str(mean) == (
            f"BatchMean(2, 2) float32; symmetric; mean over 5 samples in chunks of 2; {mean.cost}"
        )

    def test_nested_spaces_print_by_size(self):
        A = Diagonal(torch.zeros(3), Space.of({"a": torch.zeros(2), "b": torch.zeros(1)}))
        assert str(A) == "Diagonal(3, 3) float32; positive semidefinite, diagonal; 3 flop"
