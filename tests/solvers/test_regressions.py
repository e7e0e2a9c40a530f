"""Each defect that was once found in a library of this kind, asked of every solver here.

Hypergradients have theirs in tests/hyperlearn/test_hypergradients.py (inner stationarity, implicit
against unrolled against finite differences) and test_data_cleaning.py (corruption happens once).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.func import grad, vjp

import operators as ops
import solvers
from solvers.iterative import IterativeSolver, PreconditionedSolver
from tests.solvers.solver_table import SOLVERS
from tests.solvers.systems import SYSTEMS, N, Numbers, near_identity

pytestmark = pytest.mark.filterwarnings("error::solvers.ConvergenceWarning")
DOUBLE = torch.float64
NAMES = list(SOLVERS)
TRIPLES = [(name, system) for name, (_, systems) in SOLVERS.items() for system in systems]
ITERATIVE = [n for n in NAMES if isinstance(SOLVERS[n][0](1e-8), IterativeSolver)]
# What makes these short is exact on systems as small as those here: one iteration is enough.
LONG = [n for n in ITERATIVE if not n.endswith(("AMG", "IncompleteLU", "SketchAndPrecondition"))]


def drawn(system: str, seed: int = 0) -> tuple[ops.LinearOperator, Tensor, Tensor]:
    numbers = Numbers(seed, DOUBLE)
    p = SYSTEMS[system].draw(numbers)
    M = SYSTEMS[system].matrix(p)
    return SYSTEMS[system].build(p), M, numbers(M.shape[0])


def test_every_solver_is_in_the_table():
    exported = {
        name
        for name, kind in vars(solvers).items()
        if isinstance(kind, type)
        and issubclass(kind, solvers.LinearSolver)
        and kind not in (solvers.LinearSolver, IterativeSolver, PreconditionedSolver)
    }
    in_the_table = {type(factory(1e-8)).__name__ for factory, _ in SOLVERS.values()}
    # Approximations by design, and what needs another package: each has tests of its own.
    apart = {"RandomNeumann", "SketchAndSolve", "SparseQR", "Permutation"}
    assert exported == in_the_table | apart


@pytest.mark.parametrize("rtol", [0.5, 1e-2, 1e-8])
@pytest.mark.parametrize("name", [n for n in NAMES if "diagonal" in SOLVERS[n][1]])
def test_a_multiple_of_the_identity_at_any_tolerance(name, rtol):
    """hypertorch's CG returned the iterate before the converged one: zero for 2 I."""
    b = Numbers(0, DOUBLE)(N)
    x, info = SOLVERS[name][0](rtol).prepare(2.0 * ops.Identity(N, DOUBLE)).solve(b)
    assert info.converged
    assert torch.linalg.vector_norm(x - b / 2) <= rtol * torch.linalg.vector_norm(b / 2)


@pytest.mark.parametrize("rtol", [1e-1, 1e-3, 1e-5, 1e-9])
@pytest.mark.parametrize("name", [n for n in NAMES if "dense spd" in SOLVERS[n][1]])
def test_the_iterate_returned_is_the_one_that_met_the_tolerance(name, rtol):
    """Few distinct eigenvalues: hypertorch was 19 % off on the spectrum 1, 2, 5."""
    basis, _ = torch.linalg.qr(Numbers(1, DOUBLE)(N, N))
    M = basis @ torch.diag(torch.tensor([1.0, 1, 2, 2, 5, 5], dtype=DOUBLE)) @ basis.T
    A, b = ops.Dense((M + M.T) / 2, positive_definite=True), Numbers(2, DOUBLE)(N)
    x, info = SOLVERS[name][0](rtol).prepare(A).solve(b)
    true = torch.linalg.vector_norm(b - M @ x) / torch.linalg.vector_norm(b)
    assert info.converged
    assert float(true) <= rtol * (1 + 1e-6)
    assert info.residual == pytest.approx(float(true), rel=1e-3, abs=1e-14)


@pytest.mark.parametrize(("name", "system"), TRIPLES)
def test_scale_equivariance(name, system):
    A, M, b = drawn(system)
    prepared = SOLVERS[name][0](1e-10).prepare(A)
    x = prepared.solve(b).value
    for exponent in (-100, 100):
        scaled = prepared.solve(2.0**exponent * b).value
        torch.testing.assert_close(scaled / 2.0**exponent, x, rtol=1e-8, atol=1e-8)
    zero, info = prepared.solve(0 * b)
    assert info.converged
    assert not zero.any()
    assert zero.shape == (M.shape[1],)


@pytest.mark.parametrize("name", [n for n in NAMES if "diagonal" in SOLVERS[n][1]])
def test_scalar_and_empty_systems(name):
    """torchopt #222: size zero gave maxiter zero, and a silent zero gradient."""
    solver = SOLVERS[name][0](1e-10)

    def f(a: Tensor, b: Tensor) -> Tensor:
        return solvers.solve(ops.Diagonal(a.reshape(1)), b, solver=solver)

    a, b = torch.tensor(4.0, dtype=DOUBLE), torch.tensor(2.0, dtype=DOUBLE)
    assert f(a, b).shape == ()
    torch.testing.assert_close(f(a, b), torch.tensor(0.5, dtype=DOUBLE))
    torch.testing.assert_close(grad(f, (0, 1))(a, b), (-b / a**2, 1 / a))
    empty = ops.Diagonal(torch.zeros(0, dtype=DOUBLE))
    for shape in ((0,), (0, 2)):
        b = torch.zeros(shape, dtype=DOUBLE, requires_grad=True)
        x = solvers.solve(empty, b, solver=solver)
        x.sum().backward()
        assert x.shape == shape
        assert b.grad is not None
        assert b.grad.shape == shape


@pytest.mark.parametrize(("name", "system"), TRIPLES)
def test_vector_column_and_batch_are_one_answer(name, system):
    """torchsparsegradutils #51: a vector broke the backward pass."""
    A, _, b = drawn(system)
    solver = SOLVERS[name][0](1e-12)
    vector = solvers.solve(A, b, solver=solver)
    column = solvers.solve(A, b[:, None], solver=solver)
    batch = torch.func.vmap(lambda b: solvers.solve(A, b, solver=solver))(b[None])
    torch.testing.assert_close(column[:, 0], vector, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(batch[0], vector, rtol=1e-9, atol=1e-9)
    gradients = [
        grad(lambda b, s=shape: solvers.solve(A, b.reshape(s), solver=solver).square().sum())(b)
        for shape in ((-1,), (-1, 1))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in NAMES if "dense" in SOLVERS[n][1]])
def test_the_adjoint_of_a_nonsymmetric_system_uses_the_transpose(name):
    A, M, b = drawn("dense")
    w = Numbers(3, DOUBLE)(N)
    solver = SOLVERS[name][0](1e-12)
    (pulled,) = vjp(lambda b: solvers.solve(A, b, solver=solver), b)[1](w)
    torch.testing.assert_close(pulled, torch.linalg.solve(M.T, w), rtol=1e-8, atol=1e-8)
    assert float((pulled - torch.linalg.solve(M, w)).norm()) > 1e-2  # the two do differ


@pytest.mark.parametrize("name", LONG)
def test_the_iteration_limit_is_never_silent(name):
    """jaxopt #466: the gradient was zero, and nobody was told."""
    system = SOLVERS[name][1][0]
    A, _, b = drawn(system)
    solver = dataclasses.replace(SOLVERS[name][0](1e-14), maxiter=1, stop_at_maxiter=False)
    with pytest.warns(solvers.ConvergenceWarning):
        info = solver.prepare(A).solve(b).info
    assert not info.converged
    assert info.status != "converged"
    assert info.residual > 1e-14
    strict = dataclasses.replace(solver, strict=True)
    with pytest.raises(solvers.NotConvergedError):
        solvers.solve(A, b, solver=strict)


@pytest.mark.parametrize("name", LONG)
def test_a_derivative_that_does_not_converge_says_so(name):
    """lineax #243: failures of the backward solve."""
    system = SOLVERS[name][1][0]
    A, M, b = drawn(system)
    exact = dataclasses.replace(SOLVERS[name][0](1e-14), maxiter=1, stop_at_maxiter=False)

    def f(b: Tensor) -> Tensor:
        return solvers.solve(A, b, solver=exact).sum()

    with pytest.warns(solvers.ConvergenceWarning) as record:
        grad(f)(b)
    assert len(record) >= 2  # the solve, and that of its derivative
    assert M.shape[0] > 1


@pytest.mark.parametrize(
    "name", [n for n in NAMES if isinstance(SOLVERS[n][0](1e-8), PreconditionedSolver)]
)
def test_the_gradient_does_not_depend_on_the_preconditioner(name):
    """LinearSolve PR 1212, lineax 181: the adjoint dropped the preconditioner."""
    factory, systems = SOLVERS[name]
    system = "dense spd" if "dense spd" in systems else systems[0]
    numbers = Numbers(5, DOUBLE)
    p = SYSTEMS[system].draw(numbers)
    symmetric = SYSTEMS[system].build(p).symmetric
    b = numbers(SYSTEMS[system].matrix(p).shape[0])
    n = SYSTEMS[system].matrix(p).shape[1]
    root = near_identity(numbers(n, n))
    P = ops.Dense(root @ root.T, positive_definite=True) if symmetric else ops.Dense(root)

    def gradient(preconditioner: ops.LinearOperator | None) -> dict[str, Tensor]:
        solver = dataclasses.replace(factory(1e-13), preconditioner=preconditioner)
        return grad(
            lambda p: solvers.solve(SYSTEMS[system].build(p), b, solver=solver).sin().sum()
        )(p)

    for ours, plain in zip(gradient(P).values(), gradient(None).values(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("name", "system"), TRIPLES)
def test_memory_layout_does_not_matter(name, system):
    A, _, b = drawn(system)
    prepared = SOLVERS[name][0](1e-12).prepare(A)
    wide = torch.stack([b, -b, 2 * b, b], 1)
    strided = torch.stack([b, b + 1, -b, b], 1)[:, ::2]
    torch.testing.assert_close(
        prepared.solve(strided).value, prepared.solve(wide[:, :2]).value, rtol=1e-9, atol=1e-9
    )


SYMMETRIC_ONLY = ["DenseCholesky", "DenseLDL", "CG", "CG, flexible", "CG, Jacobi", "MINRES"]


@pytest.mark.parametrize("name", SYMMETRIC_ONLY)
def test_a_symmetric_claim_on_a_nonsymmetric_operator_is_refuted(name):
    M = near_identity(Numbers(6, DOUBLE)(N, N))
    A = ops.FunctionOperator(lambda v, M: M @ v, torch.zeros(N, dtype=DOUBLE), M, symmetric=True)
    with pytest.raises(ops.FalseClaimError, match="claimed symmetric"):
        SOLVERS[name][0](1e-8).prepare(A)


@pytest.mark.parametrize("name", SYMMETRIC_ONLY)
def test_no_claim_no_solve(name):
    """A solver for symmetric systems does not take a matrix that nobody calls symmetric."""
    with pytest.raises(solvers.StructureError, match="symmetric"):
        SOLVERS[name][0](1e-8).prepare(ops.Dense(near_identity(Numbers(7, DOUBLE)(N, N))))


class TestClosedOverTensors:
    """In torch 2.13 a plain autograd.Function gives zeros here under torch.func.grad."""

    y = Numbers(8, DOUBLE)(N)
    b = Numbers(9, DOUBLE)(N)

    def loss(self, y: Tensor, x: Tensor) -> Tensor:
        return (x.exp() * y.square()).sum() / 2 + y.square().square().sum() / 8

    @pytest.mark.parametrize("name", [n for n in NAMES if "hessian" in SOLVERS[n][1]])
    def test_refused_with_the_remedy_or_right(self, name):
        solver = SOLVERS[name][0](1e-12)

        def hidden(x: Tensor) -> Tensor:
            A = ops.Hessian(lambda y: self.loss(y, x), self.y, positive_definite=True)
            return solvers.solve(A, self.b, solver=solver).sum()

        def handed(x: Tensor) -> Tensor:
            A = ops.Hessian(self.loss, self.y, x, positive_definite=True)
            return solvers.solve(A, self.b, solver=solver).sum()

        x = torch.linspace(-1, 1, N, dtype=DOUBLE)
        d = x.exp() + 1.5 * self.y.square()
        expected = -x.exp() * self.b / d**2
        torch.testing.assert_close(grad(handed)(x), expected, rtol=1e-9, atol=1e-9)
        with pytest.raises(ValueError, match="hand it over as an argument"):
            grad(hidden)(x)
        leaf = x.clone().requires_grad_()
        with pytest.raises(ValueError, match="hand it over as an argument"):
            hidden(leaf)
        with pytest.raises(ValueError, match="hand it over as an argument"):
            solver.prepare(
                ops.Hessian(lambda y: self.loss(y, leaf), self.y, positive_definite=True)
            ).solve(self.b.clone().requires_grad_())


class TestOneFactorOfABatch:
    """Members of a batch are factorised once, whatever is differentiated and in which order."""

    M = torch.randn(5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    M = M + 5 * torch.eye(4, dtype=torch.float64)
    b = torch.ones(5, 4, dtype=torch.float64)

    @pytest.fixture
    def made(self, monkeypatch) -> list[int]:
        made: list[int] = []
        prepare = solvers.DenseLU._prepare
        monkeypatch.setattr(
            solvers.DenseLU, "_prepare", lambda self, A: made.append(1) or prepare(self, A)
        )
        return made

    @staticmethod
    def loss(M: Tensor, b: Tensor) -> Tensor:
        return solvers.solve(M, b, solver=solvers.DenseLU()).square().sum()

    def test_gradients_of_the_members(self, made):
        gradients = torch.func.vmap(torch.func.grad(self.loss, (0, 1)))(self.M, self.b)
        assert made == [1]
        for i in range(5):
            one = torch.func.grad(self.loss, (0, 1))(self.M[i], self.b[i])
            for mine, alone in zip(gradients, one, strict=True):
                torch.testing.assert_close(mine[i], alone)

    def test_second_derivatives(self, made):
        torch.func.vmap(torch.func.hessian(self.loss, 1))(self.M, self.b)
        assert made == [1]

    def test_a_change_in_place_is_noticed(self, made):
        factor = solvers.DenseLU()
        M = self.M.clone()

        def solved(b: Tensor) -> Tensor:
            return torch.func.vmap(lambda M, b: solvers.solve(M, b, solver=factor))(M, b)

        before = solved(self.b)
        M *= 2
        torch.testing.assert_close(solved(self.b), before / 2)
        assert made == [1, 1]
