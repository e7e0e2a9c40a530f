"""`hypergradient` against the value function itself, and its certificate against what is true.

The reference is ``Phi(x) = g(y*(x), x)`` with y* found by Newton's method to a gradient of 1e-13,
differentiated by central differences: nothing of it is shared with the library.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hyperlearn as hl
from operators import Dense, Diagonal, Identity, Space
from solvers import (
    CG,
    ConvergenceWarning,
    DenseCholesky,
    DenseLU,
    Neumann,
    NotConvergedError,
)
from solvers import Diagonal as DiagonalSolver

PROPERTY = settings(max_examples=15, deadline=None, derandomize=True)
FLOAT64 = torch.float64
Tree = Any


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def spd(size: int, low: float, high: float, seed: int = 0) -> Tensor:
    """Symmetric with eigenvalues spread evenly over [low, high]."""
    basis = torch.linalg.qr(sampled(size, size, seed=seed))[0]
    matrix = basis @ torch.diag(torch.linspace(low, high, size, dtype=FLOAT64)) @ basis.T
    return (matrix + matrix.T) / 2


@dataclass
class Case:
    """Two losses and a point x; y0 is where Newton starts."""

    inner: Callable[..., Tensor]
    outer: Callable[..., Tensor]
    x: Tree
    y0: Tree

    def __post_init__(self) -> None:
        self.x_space, self.y_space = Space.of(self.x), Space.of(self.y0)

    def flat_losses(self) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        def inner(y: Tensor, x: Tensor) -> Tensor:
            return self.inner(self.y_space.unravel(y), self.x_space.unravel(x))

        def outer(y: Tensor, x: Tensor) -> Tensor:
            return self.outer(self.y_space.unravel(y), self.x_space.unravel(x))

        return inner, outer

    def solve(self, x: Tensor | None = None) -> Tensor:
        """``y*(x)``, flat, by Newton's method with backtracking."""
        inner, _ = self.flat_losses()
        x = self.x_space.ravel(self.x) if x is None else x
        y = self.y_space.ravel(self.y0)
        for _ in range(60):
            gradient = torch.func.grad(inner)(y, x)
            if gradient.norm() <= 1e-13:
                break
            step = torch.linalg.solve(torch.func.hessian(inner)(y, x), gradient)
            size = 1.0
            while size > 1e-3 and inner(y - size * step, x) > inner(y, x) + 1e-12:
                size /= 2
            y = y - size * step
        assert gradient.norm() <= 3e-13, "the reference itself is not solved"
        return y

    def solution(self) -> Tree:
        return self.y_space.unravel(self.solve())

    def parts(self, y: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``a = d_x g, b = d_y g, H = d_yy G, C = d_x d_y G`` as dense arrays at y (or y*)."""
        inner, outer = self.flat_losses()
        x = self.x_space.ravel(self.x)
        y = self.solve() if y is None else y
        b, a = torch.func.grad(outer, argnums=(0, 1))(y, x)
        hessian = torch.func.hessian(inner)(y, x)
        cross = torch.func.jacrev(torch.func.grad(inner), argnums=1)(y, x).T
        return a, b, hessian, cross

    def central_differences(self, step: float = 1e-5) -> Tensor:
        _, outer = self.flat_losses()
        x = self.x_space.ravel(self.x)
        slopes = []
        for direction in torch.eye(x.numel(), dtype=FLOAT64):
            ahead, behind = x + step * direction, x - step * direction
            slopes.append(outer(self.solve(ahead), ahead) - outer(self.solve(behind), behind))
        return torch.stack(slopes) / (2 * step)

    def hypergradient(self, y: Tree | None = None, **options: Any) -> tuple[Tensor, hl.Certificate]:
        y = self.solution() if y is None else y
        grad, certificate = hl.hypergradient(self.outer, self.inner, y, self.x, **options)
        return self.x_space.ravel(grad), certificate


def quadratic(p: int = 4, d: int = 5, seed: int = 0) -> Case:
    A, B, D = spd(d, 0.5, 5.0, seed), sampled(d, p, seed=seed + 1), sampled(p, d, seed=seed + 2)
    E, c, t = spd(p, 0.5, 2.0, seed + 3), sampled(d, seed=seed + 4), sampled(d, seed=seed + 5)

    def inner(y: Tensor, x: Tensor) -> Tensor:
        return 0.5 * y @ A @ y - y @ B @ x + c @ y

    def outer(y: Tensor, x: Tensor) -> Tensor:
        return 0.5 * ((y - t) ** 2).sum() + x @ D @ y + 0.5 * x @ E @ x

    return Case(inner, outer, sampled(p, seed=seed + 6), torch.zeros(d, dtype=FLOAT64))


def ridge() -> Case:
    n, d = 30, 4
    Z, t, V, u = (sampled(n, d), sampled(n, seed=1), sampled(n, d, seed=2), sampled(n, seed=3))

    def inner(y: Tensor, x: Tensor) -> Tensor:
        return ((Z @ y - t) ** 2).mean() + (x.exp() * y**2).sum()

    def outer(y: Tensor, x: Tensor) -> Tensor:
        return ((V @ y - u) ** 2).mean() + 0.1 * (x**2).sum() + (x * y).sum()

    return Case(inner, outer, 0.5 * sampled(d, seed=4), torch.zeros(d, dtype=FLOAT64))


def logistic() -> Case:
    n, d = 40, 5
    Z, V = sampled(n, d), sampled(n, d, seed=1)
    truth = sampled(d, seed=2)
    t, u = torch.sign(Z @ truth + sampled(n, seed=3)), torch.sign(V @ truth + sampled(n, seed=4))

    def inner(y: Tensor, x: Tensor) -> Tensor:
        return F.softplus(-t * (Z @ y)).mean() + 0.5 * (x.exp() * y**2).sum()

    def outer(y: Tensor, x: Tensor) -> Tensor:
        return F.softplus(-u * (V @ y)).mean() + 0.1 * torch.sin(x).sum()

    return Case(inner, outer, 0.3 * sampled(d, seed=5) - 1.0, torch.zeros(d, dtype=FLOAT64))


def weighted_softmax() -> Case:
    """Data cleaning in small, plus a term in x."""
    n, features, classes = 12, 3, 3
    generator = torch.Generator().manual_seed(5)
    Z, V = sampled(n, features), sampled(n, features, seed=1)
    t = torch.randint(classes, (n,), generator=generator)
    u = torch.randint(classes, (n,), generator=generator)

    def inner(y: Tensor, x: Tensor) -> Tensor:
        losses = F.cross_entropy(Z @ y, t, reduction="none")
        return (torch.sigmoid(x) * losses).mean() + 0.05 * (y**2).sum()

    def outer(y: Tensor, x: Tensor) -> Tensor:
        return F.cross_entropy(V @ y, u) + 0.01 * (torch.sigmoid(x) ** 2).sum()

    return Case(inner, outer, sampled(n, seed=2), torch.zeros(features, classes, dtype=FLOAT64))


def nested() -> Case:
    """Dictionaries, tuples, a scalar leaf; losses that are no quadratics."""
    Z, t = sampled(20, 3), sampled(20, seed=1)

    def inner(y: Tree, x: Tree) -> Tensor:
        shift, penalties = x
        residual = Z @ y["weight"] + y["bias"] - t - Z @ shift
        penalty = penalties["bias"].exp() * y["bias"] ** 2
        penalty = penalty + (penalties["weight"].exp() * y["weight"] ** 2).sum()
        return torch.log(torch.cosh(residual)).mean() + 0.5 * penalty

    def outer(y: Tree, x: Tree) -> Tensor:
        fit = ((y["weight"] - 0.3) ** 2).sum() + torch.cos(y["bias"])
        return fit + (x[0] * y["weight"]).sum() + 0.1 * x[1]["weight"].exp().sum()

    x = (0.3 * sampled(3, seed=2), {"weight": sampled(3, seed=3) - 1, "bias": sampled(seed=4)})
    y0 = {"weight": torch.zeros(3, dtype=FLOAT64), "bias": torch.zeros((), dtype=FLOAT64)}
    return Case(inner, outer, x, y0)


CASES = {
    "quadratic": quadratic,
    "ridge": ridge,
    "logistic": logistic,
    "softmax": weighted_softmax,
    "nested": nested,
}
CONVERGED = {
    "cholesky": DenseCholesky(),
    "lu": DenseLU(),
    "cg": CG(rtol=1e-12),
    "neumann": Neumann(rtol=1e-9, maxiter=20_000),
}


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


class TestExact:
    @pytest.mark.parametrize("case", CASES)
    def test_central_differences(self, case):
        problem = CASES[case]()
        direct = problem.parts()[0]
        assert direct.norm() > 1e-3  # or a lost direct term would go unnoticed
        expected = problem.central_differences()
        assert relative(direct, expected) > 1e-2  # and so would a lost implicit one
        for name, solver in CONVERGED.items():
            grad, certificate = problem.hypergradient(solver=solver)
            assert relative(grad, expected) < 1e-6, name
            assert certificate.converged, name
            assert certificate.exact
            assert certificate.inner_stationarity < 1e-12
            assert certificate.adjoint_residual == certificate.hessian_residual < 1e-8

    def test_result_has_the_structure_of_x(self):
        problem = nested()
        grad, _ = hl.hypergradient(problem.outer, problem.inner, problem.solution(), problem.x)
        assert problem.x_space.holds(grad)

    def test_batches_reach_their_own_loss(self):
        """The same numbers, with the data handed over as batches instead of closed over."""
        Z, t, V, u = (sampled(9, 3), sampled(9, seed=1), sampled(7, 3, seed=2), sampled(7, seed=3))
        x = 0.2 * sampled(3, seed=4)

        def inner(y: Tensor, x: Tensor, batch: Tree) -> Tensor:
            return ((batch["Z"] @ y - batch["t"]) ** 2).mean() + (x.exp() * y**2).sum()

        def outer(y: Tensor, x: Tensor, batch: Tree) -> Tensor:
            return ((batch[0] @ y - batch[1]) ** 2).mean() + (x * y).sum()

        closed = Case(
            lambda y, x: inner(y, x, {"Z": Z, "t": t}), lambda y, x: outer(y, x, (V, u)), x, x
        )
        expected = closed.central_differences()
        grad, _ = hl.hypergradient(
            outer,
            inner,
            closed.solution(),
            x,
            inner_batch={"Z": Z, "t": t},
            outer_batch=(V, u),
            solver=CG(rtol=1e-12),
        )
        assert relative(grad, expected) < 1e-6

    def test_history_of_y_is_not_followed(self):
        problem = quadratic()
        y = problem.solution()
        expected, _ = problem.hypergradient(y)
        x = problem.x.clone().requires_grad_(True)
        with_history = y + 3 * (x - x.detach()).sum()  # the same numbers, a wrong derivative
        grad, _ = hl.hypergradient(problem.outer, problem.inner, with_history, x)
        assert torch.equal(grad, expected)
        assert not grad.requires_grad

    def test_no_grad_outside_does_not_matter(self):
        problem = quadratic()
        expected, _ = problem.hypergradient()
        with torch.no_grad():
            grad, _ = problem.hypergradient()
        assert torch.equal(grad, expected)

    def test_outer_loss_without_y(self):
        problem = quadratic()
        grad, certificate = hl.hypergradient(
            lambda y, x: (x**2).sum() + 0.0 * y.sum(), problem.inner, problem.solution(), problem.x
        )
        assert torch.equal(grad, 2 * problem.x)
        assert certificate.converged
        assert certificate.adjoint_residual == 0

    def test_float32_is_kept(self):
        problem = quadratic()
        A, B = spd(5, 0.5, 5.0).float(), sampled(5, 4, seed=1).float()
        x = problem.x.float()
        grad, certificate = hl.hypergradient(
            lambda y, x: 0.5 * (y**2).sum() + x.sum(),
            lambda y, x: 0.5 * y @ A @ y - y @ B @ x,
            torch.linalg.solve(A, B @ x),
            x,
        )
        inverse = torch.linalg.inv(A.double())
        expected = 1 + B.double().T @ inverse @ inverse @ B.double() @ x.double()
        assert grad.dtype == torch.float32
        assert certificate.converged
        assert relative(grad.double(), expected) < 1e-3  # rtol is 3.5e-4 in float32


class TestInvariance:
    @PROPERTY
    @given(st.floats(-6, 6), st.integers(0, 20))
    def test_scaling_of_the_inner_loss_changes_nothing(self, exponent, seed):
        problem = quadratic(seed=seed)
        factor = 10.0**exponent
        scaled = Case(
            lambda y, x: factor * problem.inner(y, x), problem.outer, problem.x, problem.y0
        )
        y, solver = problem.solution(), CG(rtol=1e-12)
        expected, _ = problem.hypergradient(y, solver=solver)
        actual, _ = scaled.hypergradient(y, solver=solver)
        assert relative(actual, expected) < 1e-9

    @pytest.mark.parametrize("factor", [1e-30, 1e30])
    def test_scaling_of_the_outer_loss_scales_the_result(self, factor):
        problem = logistic()
        scaled = Case(
            problem.inner, lambda y, x: factor * problem.outer(y, x), problem.x, problem.y0
        )
        expected, _ = problem.hypergradient()
        actual, certificate = scaled.hypergradient()
        assert certificate.converged
        assert relative(actual / factor, expected) < 1e-12

    def test_reparametrisation_of_y(self):
        """``y = S y'`` leaves Phi and its gradient alone, but not the identity's estimate."""
        problem = logistic()
        S = spd(5, 0.5, 3.0, seed=9)
        moved = Case(
            lambda y, x: problem.inner(S @ y, x),
            lambda y, x: problem.outer(S @ y, x),
            problem.x,
            problem.y0,
        )
        y, solver = problem.solution(), CG(rtol=1e-12)
        moved_y = torch.linalg.solve(S, y)
        exact, _ = problem.hypergradient(y, solver=solver)
        assert relative(moved.hypergradient(moved_y, solver=solver)[0], exact) < 1e-9
        identity = {"operator": Identity(5, FLOAT64), "solver": DiagonalSolver()}
        biased, _ = problem.hypergradient(y, **identity)
        assert relative(moved.hypergradient(moved_y, **identity)[0], biased) > 1e-2

    def test_scaling_of_the_inner_loss_moves_the_identity(self):
        problem = quadratic()
        a, b, _, cross = problem.parts()
        scaled = Case(lambda y, x: 7 * problem.inner(y, x), problem.outer, problem.x, problem.y0)
        grad, _ = scaled.hypergradient(operator=Identity(5, FLOAT64), solver=DiagonalSolver())
        assert relative(grad, a - 7 * cross @ b) < 1e-12


class TestKnownBias:
    @pytest.mark.parametrize("case", CASES)
    def test_identity_hessian(self, case):
        problem = CASES[case]()
        a, b, hessian, cross = problem.parts()
        grad, certificate = problem.hypergradient(
            operator=Identity(problem.y_space), solver=DiagonalSolver()
        )
        assert relative(grad, a - cross @ b) < 1e-10
        assert relative(grad, problem.hypergradient(solver=DenseCholesky())[0]) > 1e-2
        assert not certificate.exact
        assert certificate.adjoint_residual < 1e-15  # the surrogate's own system is solved
        expected = float((b - hessian @ b).norm() / b.norm())  # and this shows that it is another
        assert certificate.hessian_residual == pytest.approx(expected, rel=1e-10)
        assert "not the exact Hessian" in certificate.reason

    @pytest.mark.parametrize("terms", [1, 3, 10, 40])
    def test_truncated_neumann(self, terms):
        problem = logistic()
        a, b, hessian, cross = problem.parts()
        eigenvalues = torch.linalg.eigvalsh(hessian)
        mu, alpha = float(eigenvalues[0]), 0.9 / float(eigenvalues[-1])
        solver = Neumann(step_size=alpha, maxiter=terms, stop_at_maxiter=True, rtol=0.0)
        grad, certificate = problem.hypergradient(solver=solver)
        contraction = torch.eye(len(b), dtype=FLOAT64) - alpha * hessian
        q = alpha * sum(torch.linalg.matrix_power(contraction, j) @ b for j in range(terms + 1))
        assert relative(grad, a - cross @ q) < 1e-12
        exact = torch.linalg.solve(hessian, b)
        bound = (1 - alpha * mu) ** (terms + 1)
        assert 0 < (q - exact).norm() <= bound * exact.norm()
        error = float((grad - (a - cross @ exact)).norm())
        assert error <= bound * float(torch.linalg.matrix_norm(cross, 2) * exact.norm())
        assert not certificate.converged
        assert certificate.adjoint_residual == pytest.approx(
            float((b - hessian @ q).norm() / b.norm()), rel=1e-10
        )

    @pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
    def test_damping(self, damping):
        problem = ridge()
        a, b, hessian, cross = problem.parts()
        q = torch.linalg.solve(hessian + damping * torch.eye(len(b), dtype=FLOAT64), b)
        grad, certificate = problem.hypergradient(damping=damping, solver=DenseCholesky())
        assert relative(grad, a - cross @ q) < 1e-12
        assert certificate.damping == damping
        assert not certificate.exact
        assert certificate.adjoint_residual < 1e-14
        # H q = b - damping q, so that the exact Hessian's residual is the bias itself.
        assert certificate.hessian_residual == pytest.approx(
            damping * float(q.norm() / b.norm()), rel=1e-9
        )

    def test_any_operator(self):
        problem = ridge()
        a, b, hessian, cross = problem.parts()
        jacobi = Diagonal(hessian.diagonal())
        grad, certificate = problem.hypergradient(operator=jacobi, solver=CG(rtol=1e-13))
        assert relative(grad, a - cross @ (b / hessian.diagonal())) < 1e-12
        assert "Diagonal" in certificate.operator

    def test_exact_hessian_passed_as_an_operator(self):
        problem = ridge()
        _, _, hessian, _ = problem.parts()
        grad, certificate = problem.hypergradient(
            operator=Dense(hessian, symmetric=True), solver=DenseCholesky()
        )
        assert relative(grad, problem.hypergradient(solver=DenseCholesky())[0]) < 1e-12
        assert certificate.hessian_residual < 1e-12  # measured, not assumed


class TestCertificate:
    @pytest.mark.parametrize("case", CASES)
    def test_perturbed_inner_solution(self, case):
        problem = CASES[case]()
        y_star, solver = problem.solve(), DenseCholesky()
        hessian = problem.parts()[2]
        exact, _ = problem.hypergradient(solver=solver)
        direction = sampled(y_star.numel(), seed=11)
        direction = direction / direction.norm()
        errors = []
        for eps in (1e-3, 1e-4, 1e-5):
            y = problem.y_space.unravel(y_star + eps * direction)
            grad, certificate = problem.hypergradient(y, solver=solver)
            errors.append(float((grad - exact).norm()))
            expected = eps * float((hessian @ direction).norm())
            assert certificate.inner_stationarity == pytest.approx(expected, rel=0.02)
        assert errors[0] > 1e-5 * float(exact.norm())
        # First order in eps: tenfold each time, up to the second order.
        assert errors[0] / errors[1] == pytest.approx(10, rel=0.05)
        assert errors[1] / errors[2] == pytest.approx(10, rel=0.05)

    @pytest.mark.parametrize("damping", [0.0, 0.3])
    @pytest.mark.parametrize("iterations", [1, 2, 4])
    def test_residuals_are_those_of_the_adjoint_that_was_used(self, iterations, damping):
        """C is square and regular here, so that q can be read off the result."""
        problem = quadratic(p=6, d=6, seed=3)
        a, b, hessian, cross = problem.parts()
        grad, certificate = problem.hypergradient(
            solver=CG(maxiter=iterations, stop_at_maxiter=True), damping=damping
        )
        q = torch.linalg.solve(cross, a - grad)
        residual = b - hessian @ q
        assert certificate.hessian_residual == pytest.approx(
            float(residual.norm() / b.norm()), rel=1e-8
        )
        assert certificate.adjoint_residual == pytest.approx(
            float((residual - damping * q).norm() / b.norm()), rel=1e-8
        )
        assert certificate.iterations == iterations
        assert not certificate.converged

    def test_missed_tolerance_warns_with_the_numbers(self):
        problem = quadratic()
        with pytest.warns(
            ConvergenceWarning, match="maxiter after 1 iterations with true relative"
        ):
            _, certificate = problem.hypergradient(solver=CG(maxiter=1))
        assert not certificate.converged
        assert certificate.adjoint_residual > 1e-3

    def test_strict_raises(self):
        problem = quadratic()
        with pytest.raises(NotConvergedError) as error:
            problem.hypergradient(solver=CG(maxiter=1, strict=True))
        assert error.value.info.residual > 1e-3

    def test_truncation_on_purpose_is_flagged_but_not_warned_about(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, certificate = quadratic().hypergradient(solver=CG(maxiter=1, stop_at_maxiter=True))
        assert not certificate.converged

    def test_indefinite_hessian_is_flagged(self):
        saddle = torch.tensor([1.0, -1.0, 2.0], dtype=FLOAT64)
        x = torch.ones(3, dtype=FLOAT64)
        with pytest.warns(ConvergenceWarning, match="not positive definite"):
            _, certificate = hl.hypergradient(
                lambda y, x: y.sum(),
                lambda y, x: 0.5 * (saddle * y**2).sum() - x @ y,
                x / saddle,
                x,
            )
        assert not certificate.converged

    def test_as_text(self):
        _, certificate = quadratic().hypergradient(damping=0.25)
        text = str(certificate)
        assert "damping: 0.25" in text
        assert "error_bound" not in text  # it was not worked out


def exact_hypergradient(problem: Case) -> Tensor:
    a, b, hessian, cross = problem.parts()
    return a - cross @ torch.linalg.solve(hessian, b)


def norm2(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def random_quadratic(seed: int) -> tuple[Case, hl.Smoothness]:
    p, d = 3, 4
    A, B, D = spd(d, 0.2, 4.0, seed), sampled(d, p, seed=seed + 1), sampled(p, d, seed=seed + 2)
    M, t = sampled(d, d, seed=seed + 3), sampled(d, seed=seed + 4)
    case = Case(
        lambda y, x: 0.5 * y @ A @ y - y @ B @ x,
        lambda y, x: 0.5 * ((M @ y - t) ** 2).sum() + x @ D @ y + x.sum(),
        sampled(p, seed=seed + 5),
        torch.zeros(d, dtype=FLOAT64),
    )
    return case, hl.Smoothness(
        strong_convexity=0.2,
        cross_norm=norm2(B),
        outer_smoothness=norm2(M) ** 2,
        direct_smoothness=norm2(D),
    )


def random_log_cosh(seed: int) -> tuple[Case, hl.Smoothness]:
    """``log cosh`` has second derivative <= 1 and third <= 4 / (3 sqrt 3)."""
    n, p, d, mu = 8, 3, 4, 0.3
    Z, B, D = sampled(n, d, seed=seed), sampled(n, p, seed=seed + 1), sampled(p, d, seed=seed + 2)
    V = sampled(n, d, seed=seed + 3)

    def inner(y: Tensor, x: Tensor) -> Tensor:
        return torch.log(torch.cosh(Z @ y - B @ x)).mean() + 0.5 * mu * (y**2).sum()

    def outer(y: Tensor, x: Tensor) -> Tensor:
        return F.softplus(V @ y).mean() + x @ D @ y + (x**2).sum()

    third = 4 / (3 * math.sqrt(3)) / n
    rows, columns = Z.norm(dim=1), B.norm(dim=1)
    return Case(inner, outer, sampled(p, seed=seed + 4), torch.zeros(d, dtype=FLOAT64)), (
        hl.Smoothness(
            strong_convexity=mu,
            cross_norm=norm2(B) * norm2(Z) / n,
            outer_smoothness=norm2(V) ** 2 / (4 * n),
            direct_smoothness=norm2(D),
            hessian_lipschitz=third * float((rows**3).sum()),
            cross_lipschitz=third * float((columns * rows**2).sum()),
        )
    )


def random_logistic(seed: int, radius: float) -> tuple[Case, hl.Smoothness]:
    """Penalty ``exp(x_j) y_j^2 / 2``; third derivative of softplus <= 1 / (6 sqrt 3)."""
    n, d = 10, 4
    Z, V = sampled(n, d, seed=seed), sampled(n, d, seed=seed + 1)
    t = torch.sign(sampled(n, seed=seed + 2))
    x = 0.5 * sampled(d, seed=seed + 3) - 1.0

    def inner(y: Tensor, x: Tensor) -> Tensor:
        return F.softplus(-t * (Z @ y)).mean() + 0.5 * (x.exp() * y**2).sum()

    def outer(y: Tensor, x: Tensor) -> Tensor:
        return F.softplus(V @ y).mean() + (x**2).sum() + 0.3 * x @ y

    case = Case(inner, outer, x, torch.zeros(d, dtype=FLOAT64))
    largest = float(x.exp().max())
    reach = float(case.solve().abs().max()) + radius  # of |y_j| on the segment
    return case, hl.Smoothness(
        strong_convexity=float(x.exp().min()),
        cross_norm=largest * reach,  # C = diag(exp(x) y)
        outer_smoothness=norm2(V) ** 2 / (4 * n),
        direct_smoothness=0.3,
        hessian_lipschitz=float((Z.norm(dim=1) ** 3).sum()) / (6 * math.sqrt(3) * n),
        cross_lipschitz=largest,
    )


class TestErrorBound:
    @pytest.mark.parametrize("family", ["quadratic", "log-cosh", "logistic"])
    def test_never_below_the_true_error(self, family):
        trials, ratios = 40, []
        for seed in range(0, 10 * trials, 10):
            distance = 10.0 ** -(seed // 10 % 5)
            if family == "quadratic":
                problem, smoothness = random_quadratic(seed)
            elif family == "log-cosh":
                problem, smoothness = random_log_cosh(seed)
            else:
                problem, smoothness = random_logistic(seed, distance)
            exact = exact_hypergradient(problem)
            offset = sampled(problem.y_space.size, seed=seed + 9)
            y = problem.solve() + distance * offset / offset.norm()
            for solver in (DenseCholesky(), CG(maxiter=2, stop_at_maxiter=True)):
                grad, certificate = problem.hypergradient(y, solver=solver, smoothness=smoothness)
                error = float((grad - exact).norm())
                assert error > 0
                assert error <= certificate.error_bound, (family, seed, solver)
                ratios.append(certificate.error_bound / error)
        assert sorted(ratios)[len(ratios) // 2] < 1e3  # a bound, and not just a large number

    def test_holds_for_a_damped_system_and_a_surrogate(self):
        for seed in range(0, 200, 10):
            problem, smoothness = random_quadratic(seed)
            exact = exact_hypergradient(problem)
            identity = {"operator": Identity(4, FLOAT64), "solver": DiagonalSolver()}
            for options in ({"damping": 0.5}, identity):
                grad, certificate = problem.hypergradient(smoothness=smoothness, **options)
                assert (grad - exact).norm() <= certificate.error_bound

    def test_is_attained_in_one_dimension(self):
        """``G = mu y^2 / 2 - c x y``, ``g = L y^2 / 2 + D x y``: all bounds are equalities."""
        mu, c, slope, direct, off = 0.5, 3.0, 2.0, 1.5, 0.1
        x = torch.tensor([1.0], dtype=FLOAT64)
        grad, certificate = hl.hypergradient(
            lambda y, x: (0.5 * slope * y**2 + direct * x * y).sum(),
            lambda y, x: (0.5 * mu * y**2 - c * x * y).sum(),
            c * x / mu + off,
            x,
            smoothness=hl.Smoothness(
                strong_convexity=mu, cross_norm=c, outer_smoothness=slope, direct_smoothness=direct
            ),
        )
        y_star = c / mu
        exact = direct * y_star + c / mu * (slope * y_star + direct)
        assert certificate.error_bound == pytest.approx(abs(float(grad) - exact), rel=1e-9)
        assert certificate.error_bound == pytest.approx(off * (direct + c / mu * slope), rel=1e-9)

    def test_each_constant_enters(self):
        base = {"strong_convexity": 2.0, "cross_norm": 3.0}
        known = {  # stationarity 4, so e = 2; residual 5; |q| = 7
            "outer_smoothness": 3 / 2 * 2,
            "direct_smoothness": 2,
            "hessian_lipschitz": 3 / 2 * 2 * 7,
            "cross_lipschitz": 2 * 7,
        }
        assert hl.Smoothness(**base).error_bound(4, 5, 7) == 3 / 2 * 5
        for name, expected in known.items():
            bound = hl.Smoothness(**base, **{name: 1.0}).error_bound(4, 5, 7)
            assert bound == pytest.approx(3 / 2 * 5 + expected)

    @pytest.mark.parametrize(
        "constants",
        [
            {"strong_convexity": 0.0},
            {"strong_convexity": -1.0},
            {"strong_convexity": math.nan},
            {"cross_norm": math.inf},
            {"hessian_lipschitz": -1.0},
        ],
    )
    def test_refuses_constants_that_are_none(self, constants):
        with pytest.raises(ValueError, match=next(iter(constants))):
            hl.Smoothness(**{"strong_convexity": 1.0, "cross_norm": 1.0, **constants})


class TestBadInput:
    x = torch.ones(3, dtype=FLOAT64)

    def call(self, **changes: Any) -> Any:
        arguments = {
            "outer_loss": lambda y, x: (y * x).sum(),
            "inner_loss": lambda y, x: 0.5 * ((y - x) ** 2).sum(),
            "y": self.x,
            "x": self.x,
            **changes,
        }
        return hl.hypergradient(**arguments)

    def test_the_good_case(self):
        torch.testing.assert_close(self.call()[0], 2 * self.x)

    def test_dtypes_differ(self):
        with pytest.raises(TypeError, match=r"float32.*float64.*one dtype"):
            self.call(y=self.x.float())

    def test_integers(self):
        with pytest.raises(TypeError, match=r"x has a leaf of dtype torch.int64"):
            self.call(x=torch.ones(3, dtype=torch.long))

    def test_module(self):
        with pytest.raises(TypeError, match=r"y is a Linear module.*named_parameters"):
            self.call(y=torch.nn.Linear(3, 1))

    def test_empty_tree(self):
        with pytest.raises(ValueError, match="y holds no tensor"):
            self.call(y={})

    @pytest.mark.parametrize("name", ["outer_loss", "inner_loss"])
    @pytest.mark.parametrize("value", [lambda y, x: y * x, lambda y, x: (y * x).sum()[None]])
    def test_loss_is_not_a_scalar(self, name, value):
        with pytest.raises(ValueError, match=f"{name} returned .*expected a scalar"):
            self.call(**{name: value})

    @pytest.mark.parametrize("name", ["outer_loss", "inner_loss"])
    def test_loss_is_not_a_tensor(self, name):
        with pytest.raises(ValueError, match=f"{name} returned float; expected a scalar"):
            self.call(**{name: lambda y, x: 1.0})

    @pytest.mark.parametrize("name", ["y", "x"])
    def test_nan(self, name):
        with pytest.raises(ValueError, match=r"NaN or infinite"):
            self.call(**{name: torch.tensor([1.0, math.nan, 1.0], dtype=FLOAT64)})

    @pytest.mark.filterwarnings("ignore::solvers.ConvergenceWarning")
    def test_nan_in_the_inner_loss_alone(self):
        with pytest.raises(ValueError, match=r"NaN or infinite"):
            self.call(inner_loss=lambda y, x: math.nan * ((y - x) ** 2).sum())

    def test_operator_of_another_shape(self):
        with pytest.raises(ValueError, match=r"operator has shape \(4, 4\); y has 3 entries"):
            self.call(operator=Identity(4, FLOAT64))

    def test_operator_of_another_dtype(self):
        with pytest.raises(TypeError, match="float32"):
            self.call(operator=Identity(3, torch.float32))

    def test_operator_and_damping(self):
        with pytest.raises(ValueError, match="add it to your operator"):
            self.call(operator=Identity(3, FLOAT64), damping=0.1)


@pytest.mark.parametrize("name", ["inner_batch", "outer_batch"])
@pytest.mark.parametrize("batch", [torch.zeros(0, 2), {}, torch.tensor([math.nan])])
def test_batches_that_are_none(name, batch):
    """An empty batch has a mean of NaN and, in cross-entropy, a gradient of exactly zero."""
    x = torch.ones(2)
    batches = {"inner_batch": torch.zeros(1), "outer_batch": torch.zeros(1), name: batch}
    with pytest.raises(ValueError, match=name):
        hl.hypergradient(
            lambda y, x, batch: (y**2).sum(),
            lambda y, x, batch: ((y - x) ** 2).sum(),
            x,
            x,
            **batches,
        )
