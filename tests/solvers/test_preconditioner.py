"""Everything that a preconditioner may be; and that no derivative depends on it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import operators as ops
import solvers
from operators import LinearOperator
from solvers import CG, ConvergenceWarning, DenseCholesky, DenseLU, StructureError
from solvers.krylov.bicgstab import BiCGStab
from solvers.krylov.gmres import GMRES
from solvers.krylov.minres import MINRES
from solvers.preconditioner import Preconditioner, as_preconditioner

FLOAT64 = torch.float64
N = 12


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def spd() -> Tensor:
    root = sampled(N, N, seed=1)
    return root @ root.T + torch.eye(N, dtype=FLOAT64)


def general() -> Tensor:
    return 3 * torch.eye(N, dtype=FLOAT64) + 0.5 * sampled(N, N, seed=2)


class Log:
    """Columns that went through ``P v`` and ``P^T v``, and operators that P was made of."""

    def __init__(self) -> None:
        self.forward = self.transposed = self.made = 0


class Rough(LinearOperator):
    """``(A + E)^-1`` with a small E, not symmetric; counts what it is used for."""

    def __init__(self, matrix: Tensor, log: Log, *, transpose: bool = False) -> None:
        super().__init__(*(ops.Space.flat(N, FLOAT64),) * 2)
        self.matrix, self.log, self.transpose = matrix, log, transpose

    def _matvec(self, v: Tensor) -> Tensor:
        return self._matmat(v[:, None])[:, 0]

    def _matmat(self, block: Tensor) -> Tensor:
        if self.transpose:
            self.log.transposed += block.shape[1]
        else:
            self.log.forward += block.shape[1]
        return (self.matrix.T if self.transpose else self.matrix) @ block

    def _transpose(self) -> LinearOperator:
        return Rough(self.matrix, self.log, transpose=not self.transpose)


@dataclass(frozen=True, kw_only=True)
class RoughInverse(Preconditioner):
    log: Log
    error: float = 0.05

    def _prepare(self, A: LinearOperator) -> LinearOperator:
        self.log.made += 1
        E = self.error * sampled(N, N, seed=9)
        return Rough(torch.linalg.inv(A.to_dense() + E), self.log)


class TestKinds:
    A = ops.Dense(spd(), positive_definite=True)
    b = sampled(N, 3, seed=3)

    @pytest.mark.parametrize("columns", [1, 3])
    @pytest.mark.parametrize(
        "choice",
        [
            DenseCholesky(),
            DenseCholesky().prepare(A),
            ops.Dense(torch.linalg.inv(A.matrix), symmetric=True),
            ops.Inverse(A, DenseCholesky()),
            lambda v: torch.linalg.solve(spd(), v),
        ],
        ids=["solver", "prepared", "operator", "inverse", "function"],
    )
    def test_the_inverse_in_any_form_makes_one_iteration(self, choice, columns):
        solver = CG(rtol=1e-9, strict=True, preconditioner=choice)
        x, info = solver.prepare(self.A).solve(self.b[:, :columns])
        assert info.iterations == 1
        torch.testing.assert_close(self.A @ x, self.b[:, :columns], rtol=0, atol=1e-8)

    def test_settings(self):
        log = Log()
        solver = GMRES(rtol=1e-9, strict=True, preconditioner=RoughInverse(log=log))
        prepared = solver.prepare(self.A)
        assert log.made == 1
        prepared.solve(self.b)
        prepared.solve(self.b)
        assert log.made == 1

    def test_none_is_none(self):
        assert as_preconditioner(None, self.A) is None

    def test_a_function_of_nested_structures(self):
        def loss(y: dict[str, Tensor]) -> Tensor:
            return (y["w"] ** 2).sum() + 2 * (y["b"] ** 2).sum()

        y = {"w": torch.zeros(2, 2, dtype=FLOAT64), "b": torch.zeros(3, dtype=FLOAT64)}
        A = ops.Hessian(loss, y)
        solver = CG(
            rtol=1e-10, strict=True, preconditioner=lambda v: {"w": v["w"] / 2, "b": v["b"] / 4}
        )
        b = {"w": torch.ones(2, 2, dtype=FLOAT64), "b": torch.ones(3, dtype=FLOAT64)}
        x, info = solver.prepare(A).solve(b)
        assert info.iterations == 1
        torch.testing.assert_close(x["b"], torch.full((3,), 0.25, dtype=FLOAT64))

    def test_a_function_on_no_columns(self):
        solver = GMRES(preconditioner=lambda v: v)
        assert solver.prepare(self.A).solve(self.b[:, :0]).value.shape == (N, 0)

    def test_info_tells_of_the_preconditioner(self):
        P = as_preconditioner(DenseLU(), self.A)
        P.operator_complexity, P.factor_nonzeros, P.backend = 1.5, 42, "elsewhere"
        info = GMRES(preconditioner=P).prepare(self.A).solve(self.b).info
        assert (info.operator_complexity, info.factor_nonzeros) == (1.5, 42)
        assert info.backend == "elsewhere"


class TestErrors:
    A = ops.Dense(general())

    @pytest.mark.parametrize("choice", [3.0, "jacobi", torch.eye(N), Preconditioner, DenseLU])
    def test_no_such_thing(self, choice):
        with pytest.raises(TypeError, match=r"(?s)preconditioner is .*; expected settings"):
            GMRES(preconditioner=choice).prepare(self.A)

    def test_another_shape(self):
        with pytest.raises(ValueError, match=r"expected shape \(12, 12\); it stands for the inv"):
            GMRES(preconditioner=ops.Identity(3, FLOAT64)).prepare(self.A)

    def test_another_dtype(self):
        with pytest.raises(TypeError, match=r"is torch.float32 on cpu; expected torch.float64"):
            GMRES(preconditioner=ops.Dense(torch.eye(N))).prepare(self.A)

    def test_a_false_claim(self):
        P = ops.FunctionOperator(lambda v: v.flip(0) * torch.arange(N), sampled(N), symmetric=True)
        with pytest.raises(ops.FalseClaimError):
            MINRES(preconditioner=P).prepare(ops.Dense(spd(), symmetric=True))

    def test_a_function_that_returns_something_else(self):
        with pytest.raises((TypeError, ValueError), match=r"preconditioner\(v\)"):
            GMRES(preconditioner=lambda v: v[:3]).prepare(self.A).solve(sampled(N))

    def test_a_function_has_no_transpose(self):
        """Of a symmetric operator none is needed; of another the remedy is named."""
        with pytest.raises(StructureError, match=r"FunctionOperator\(f, y, rmatvec=f_t\)"):
            torch.func.grad(
                lambda b: solvers.solve(
                    general(), b, solver=GMRES(preconditioner=lambda v: v / 3)
                ).sum()
            )(sampled(N))
        torch.func.grad(
            lambda b: solvers.solve(spd(), b, solver=CG(preconditioner=lambda v: v / 3)).sum()
        )(sampled(N))


class TestDerivatives:
    """The gradient is that of the solution: P changes the way there and nothing else."""

    M, b = general(), sampled(N, seed=5)

    def solver(self, kind: type, log: Log) -> solvers.LinearSolver:
        return kind(rtol=1e-12, strict=True, preconditioner=RoughInverse(log=log))

    @pytest.mark.parametrize("kind", [GMRES, BiCGStab])
    def test_reverse_mode_keeps_the_preconditioner_and_transposes_it(self, kind):
        """Lost on the way back in lineax 160 and LinearSolve.jl 1212; counted here."""
        log = Log()
        M, b = self.M.clone().requires_grad_(), self.b.clone().requires_grad_()
        x = solvers.solve(M, b, solver=self.solver(kind, log))
        assert (log.made, log.transposed) == (1, 0)
        forward = log.forward
        assert forward > 0
        x.square().sum().backward()
        assert (log.made, log.forward) == (1, forward)
        # A good P makes the way back as short as the way there.
        assert 0 < log.transposed <= 2 * forward
        expected = torch.func.grad(lambda M, b: torch.linalg.solve(M, b).square().sum(), (0, 1))(
            self.M, self.b
        )
        torch.testing.assert_close(M.grad, expected[0], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(b.grad, expected[1], rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("kind", [GMRES, BiCGStab])
    def test_forward_mode(self, kind):
        log = Log()
        tangents = (sampled(N, N, seed=6), sampled(N, seed=7))
        _, one = torch.func.jvp(
            lambda M, b: solvers.solve(M, b, solver=self.solver(kind, log)),
            (self.M, self.b),
            tangents,
        )
        _, other = torch.func.jvp(torch.linalg.solve, (self.M, self.b), tangents)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
        assert log.transposed == 0

    def test_vmap_over_right_hand_sides_prepares_once(self):
        log = Log()
        B = sampled(4, N, seed=8)
        solver = self.solver(GMRES, log)
        x = torch.func.vmap(lambda b: solvers.solve(self.M, b, solver=solver))(B)
        assert log.made == 1
        torch.testing.assert_close(x @ self.M.T, B, rtol=0, atol=1e-10)
        J = torch.func.jacrev(lambda b: solvers.solve(self.M, b, solver=solver))(self.b)
        torch.testing.assert_close(J, torch.linalg.inv(self.M), rtol=1e-9, atol=1e-10)

    def test_vmap_over_matrices_prepares_each(self):
        log = Log()
        Ms, B = torch.stack([self.M, self.M.T]), sampled(2, N, seed=8)
        solver = self.solver(GMRES, log)
        x = torch.func.vmap(lambda M, b: solvers.solve(M, b, solver=solver))(Ms, B)
        assert log.made == 2
        torch.testing.assert_close(x, torch.linalg.solve(Ms, B), rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("kind", [CG, MINRES, GMRES, BiCGStab])
    def test_no_preconditioner_moves_the_gradient(self, kind):
        gradients = []
        choices = [
            None,
            ops.Diagonal(torch.linspace(0.5, 2, N, dtype=FLOAT64)),
            DenseCholesky(),
            ops.Dense(torch.linalg.inv(spd() + 0.1 * torch.eye(N)), positive_definite=True),
        ]
        for P in choices:
            solver = kind(rtol=1e-13, maxiter=1000, preconditioner=P)

            def loss(M: Tensor, solver: solvers.LinearSolver = solver) -> Tensor:
                A = ops.Dense((M + M.T) / 2, symmetric=True)
                return solvers.solve(A, self.b, solver=solver).square().sum()

            gradients.append(torch.func.grad(loss)(spd()))
        for gradient in gradients[1:]:
            torch.testing.assert_close(gradient, gradients[0], rtol=1e-8, atol=1e-8)

    def test_no_gradient_flows_through_the_preconditioner(self):
        """It is a means: what it is made of has no part in the solution."""
        d = torch.linspace(0.5, 2, N, dtype=FLOAT64)

        def loss(d: Tensor) -> Tensor:
            P = ops.Diagonal(d, positive_definite=True)
            solver = CG(rtol=1e-12, preconditioner=P)
            A = ops.Dense(spd(), symmetric=True) + ops.Diagonal(d)
            return solvers.solve(A, self.b, solver=solver).sum()

        plain = torch.func.grad(lambda d: torch.linalg.solve(spd() + torch.diag(d), self.b).sum())(
            d
        )
        torch.testing.assert_close(torch.func.grad(loss)(d), plain, rtol=1e-9, atol=1e-10)
        held = d.clone().requires_grad_()
        loss(held).backward()
        torch.testing.assert_close(held.grad, plain, rtol=1e-9, atol=1e-10)

    def test_second_order(self):
        log = Log()

        def loss(t: Tensor, solver: solvers.LinearSolver | None) -> Tensor:
            M = self.M + t * torch.eye(N, dtype=FLOAT64)
            x = (
                torch.linalg.solve(M, self.b)
                if solver is None
                else solvers.solve(M, self.b, solver=solver)
            )
            return x.square().sum()

        t = torch.tensor(0.3, dtype=FLOAT64)
        second = torch.func.grad(torch.func.grad(loss))
        one = second(t, self.solver(GMRES, log))
        torch.testing.assert_close(one, second(t, None), rtol=1e-8, atol=1e-9)

    def test_an_iteration_limit_on_the_way_back_is_not_silent(self):
        solver = GMRES(rtol=1e-12, maxiter=2)
        b = self.b.clone().requires_grad_()
        with pytest.warns(ConvergenceWarning, match="maxiter"):
            x = solvers.solve(self.M, b, solver=solver)
        with pytest.warns(ConvergenceWarning, match="maxiter"):
            x.sum().backward()
