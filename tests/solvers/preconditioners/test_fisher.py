"""The empirical Fisher as a preconditioner: the inverse of one operator inside a solve of another.

No class of its own is needed: a prepared solver stands for the inverse of its operator.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import operators as ops
import solvers
from tests.solvers.preconditioners.problems import sampled

pytestmark = pytest.mark.filterwarnings("error::solvers.ConvergenceWarning")

SAMPLES, FEATURES, CLASSES, DECAY = 1000, 50, 3, 1e-3


@cache
def problem() -> tuple[ops.LinearOperator, Tensor]:
    """Hessian of a regularised softmax loss near its optimum, and gradients of single samples."""
    scales = torch.logspace(0, -1, FEATURES, dtype=torch.float64)
    X = sampled(SAMPLES, FEATURES) * scales
    truth = sampled(FEATURES, CLASSES, seed=1) / FEATURES**0.5
    noise = torch.rand(
        SAMPLES, CLASSES, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    labels = (X @ truth - torch.log(-torch.log(noise))).argmax(1)

    def sample_loss(w: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy((x @ w["w"])[None], label[None])

    def loss(w: dict[str, Tensor]) -> Tensor:
        data = torch.nn.functional.cross_entropy(X @ w["w"], labels)
        return data + DECAY / 2 * (w["w"] ** 2).sum()

    w = {"w": torch.zeros(FEATURES, CLASSES, dtype=torch.float64)}
    for _ in range(6):
        A = ops.Hessian(loss, w, positive_definite=True)
        step = solvers.solve(A, torch.func.grad(loss)(w), solver=solvers.DenseCholesky())
        w = {"w": w["w"] - step["w"]}
    rows = torch.func.vmap(torch.func.grad(sample_loss), (None, 0, 0))(w, X, labels)
    return ops.Hessian(loss, w, positive_definite=True), rows["w"].reshape(SAMPLES, -1)


B = sampled(FEATURES * CLASSES, seed=3)


def fisher(count: int = SAMPLES, damping: float = DECAY) -> ops.EmpiricalFisher:
    A, rows = problem()
    return ops.EmpiricalFisher(rows[:count], damping, space=A.domain)


def solved(preconditioner: object) -> solvers.Solution:
    return solvers.CG(rtol=1e-8, preconditioner=preconditioner).prepare(problem()[0]).solve(B)


def test_a_prepared_solver_stands_for_the_inverse():
    plain = solved(None)
    x, info = solved(solvers.Woodbury().prepare(fisher()))
    expected = torch.linalg.solve(problem()[0].to_dense(), B)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)
    # At the optimum of a well-specified model the Fisher is about the Hessian.
    assert info.iterations < 0.3 * plain.info.iterations


def test_all_forms_of_the_inverse_are_one():
    expected = solved(solvers.Woodbury().prepare(fisher())).info.iterations
    inverse = ops.Inverse(fisher(), solvers.Woodbury())
    forms = {
        "prepared, another solver": solvers.DenseCholesky().prepare(fisher()),
        "operator": inverse,
        "function": lambda v: inverse @ v,
    }
    for name, form in forms.items():
        assert abs(solved(form).info.iterations - expected) <= 1, name


def test_few_gradients_with_little_damping_are_worse_than_none():
    """10 of them took twice the iterations of plain CG, all of them a fifth."""
    plain = solved(None).info.iterations
    few = solved(solvers.Woodbury().prepare(fisher(10)))
    some = solved(solvers.Woodbury().prepare(fisher(50, 10 * DECAY)))
    assert few.info.iterations > 1.5 * plain
    assert some.info.iterations < plain


def test_the_adjoint_of_a_preconditioned_solve():
    """Derivatives go by A alone; what preconditions does not enter."""
    A = problem()[0]
    solver = solvers.CG(rtol=1e-12, preconditioner=solvers.Woodbury().prepare(fisher()))

    def loss(scale: Tensor) -> Tensor:
        return (solvers.solve(scale * A, B, solver) ** 2).sum()

    scale = torch.tensor(2.0, dtype=torch.float64)
    x = torch.linalg.solve(A.to_dense(), B)
    expected = -2 * (x @ x) / scale**3
    torch.testing.assert_close(torch.func.grad(loss)(scale), expected, rtol=1e-8, atol=0)
