"""Each method's hypergradient against the formula that it stands for, formed densely."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hyperlearn as hl
from hyperlearn.batches import Minibatches
from hyperlearn.certificate import Estimate
from hyperlearn.methods.trajectory import Trajectory
from hyperlearn.oracles import Oracles
from hyperlearn.runs.state import as_stored
from operators import EmpiricalFisher
from solvers import CG, InverseRecursion, Neumann, ShermanMorrison, Woodbury

FLOAT64 = torch.float64
Tree = Any


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def quadratic_problem(**options: Any) -> hl.BilevelProblem:
    p, d = 3, 4
    basis = torch.linalg.qr(sampled(d, d))[0]
    A = basis @ torch.diag(torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=FLOAT64)) @ basis.T
    A, B, D = (A + A.T) / 2, sampled(d, p, seed=1), sampled(p, d, seed=2)
    return hl.BilevelProblem(
        lambda y, x: 0.5 * y @ A @ y - y @ B @ x,
        lambda y, x: 0.5 * ((y - 1) ** 2).sum() + x @ D @ y + 0.5 * (x**2).sum(),
        x0=sampled(p, seed=3),
        y0=sampled(d, seed=4),
        **options,
    )


CLASSES, FEATURES, SAMPLES = 3, 4, 24


def softmax_problem(samples: int = SAMPLES, **options: Any) -> hl.BilevelProblem:
    """Softmax regression with weights sigmoid(x_i); y is nested, the outer loss depends on x."""
    Z = sampled(samples, FEATURES)
    t = torch.randint(CLASSES, (samples,), generator=torch.Generator().manual_seed(1))
    V = sampled(9, FEATURES, seed=2)
    u = torch.randint(CLASSES, (9,), generator=torch.Generator().manual_seed(3))

    def sample_loss(y: Tree, batch: Tree) -> Tensor:
        logits = batch["Z"] @ y["weight"] + y["bias"]
        return F.cross_entropy(logits, batch["t"], reduction="none")

    def sample_weight(x: Tensor, batch: Tree) -> Tensor:
        return torch.sigmoid(x[batch["index"]])

    def outer(y: Tree, x: Tensor, batch: Tree) -> Tensor:
        return F.cross_entropy(batch[0] @ y["weight"] + y["bias"], batch[1]) + 0.01 * (x**2).sum()

    settings = {
        "regularizer": hl.L2(0.02),
        "likelihood": hl.WeightedLikelihood(sample_loss=sample_loss, sample_weight=sample_weight),
    }
    return hl.BilevelProblem(
        lambda y, x, batch: (sample_weight(x, batch) * sample_loss(y, batch)).mean(),
        outer,
        x0=sampled(samples, seed=4),
        y0={
            "weight": 0.3 * sampled(FEATURES, CLASSES, seed=5),
            "bias": torch.zeros(CLASSES, dtype=FLOAT64),
        },
        inner_data={"Z": Z, "t": t, "index": torch.arange(samples)},
        outer_data=(V, u),
        **settings | options,
    )


def start(method: hl.Method, problem: hl.BilevelProblem, seed: int = 0) -> Any:
    return method.start(problem, problem.oracles(), torch.Generator().manual_seed(seed))


def outer_step(
    method: hl.Method, problem: hl.BilevelProblem, seed: int = 0, y: Tensor | None = None
) -> tuple[Any, Trajectory, Estimate, Tensor]:
    """One inner solve and the hypergradient at its end, from x0."""
    estimator = start(method, problem, seed)
    x = problem.x_space.ravel(problem.x0)
    y = problem.y_space.ravel(problem.y0) if y is None else y
    trajectory = estimator.solve_inner(y, x)
    return estimator, trajectory, estimator.estimate(x, trajectory), x


def replayed_batches(
    problem: hl.BilevelProblem, method: hl.Method, seed: int = 0
) -> tuple[list[Tree], Tree]:
    """The inner batches and the one of C that a method with a full outer batch draws."""
    stream = Minibatches(
        problem.inner_data, method.inner_batch_size, torch.Generator().manual_seed(seed)
    )
    inner = [stream.draw() for _ in range(method.inner_steps)]
    return inner, stream.draw(method.cross_batches)


def gradient_of(problem: hl.BilevelProblem, y: Tensor, x: Tensor, batch: Tree) -> Tensor:
    """``d_y inner_loss`` by plain autograd, without the regulariser."""
    y = y.clone().requires_grad_(True)
    trees = problem.y_space.unravel(y), problem.x_space.unravel(x)
    return torch.autograd.grad(problem.inner_loss(*trees, batch), y)[0]


def parts(
    problem: hl.BilevelProblem, y: Tensor, x: Tensor, batch: Tree = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``a, b, H, C`` as dense arrays, the first two on all outer data, the last two on `batch`."""
    ys, xs = problem.y_space, problem.x_space
    inner_batch = () if batch is None else (batch,)
    outer_batch = () if problem.outer_data is None else (problem.outer_data,)
    weight = 0.0 if problem.regularizer is None else problem.regularizer.weight

    def inner(y: Tensor, x: Tensor) -> Tensor:
        loss = problem.inner_loss(ys.unravel(y), xs.unravel(x), *inner_batch)
        return loss + weight * (y @ y)

    def outer(y: Tensor, x: Tensor) -> Tensor:
        return problem.outer_loss(ys.unravel(y), xs.unravel(x), *outer_batch)

    b, a = torch.func.grad(outer, argnums=(0, 1))(y, x)
    hessian = torch.func.hessian(inner)(y, x)
    return a, b, hessian, torch.func.jacrev(torch.func.grad(inner), argnums=1)(y, x).T


def neumann_sum(hessian: Tensor, b: Tensor, alpha: float, terms: int) -> Tensor:
    """``alpha sum_{j < terms} (I - alpha H)^j b``."""
    contraction = torch.eye(len(b), dtype=b.dtype) - alpha * hessian
    return alpha * sum(torch.linalg.matrix_power(contraction, j) @ b for j in range(terms))


def explicit_fisher(
    rows: list[Tensor], *, damping: float, initial: float = 0.0, rho: float | None = None
) -> Tensor:
    """The published recursions, term by term, plus damping."""
    d = len(rows[0])
    eye = torch.eye(d, dtype=rows[0].dtype)
    if rho is None and initial == 0:
        return damping * eye + sum(torch.outer(g, g) for g in rows) / len(rows)
    H = initial * eye
    for t, g in enumerate(rows, start=1):
        if rho is None:
            H = (t * H + torch.outer(g, g)) / (t + 1)
        else:
            H = (1 - rho) * H + rho * torch.outer(g, g)
    return damping * eye + H


class TestInnerSolve:
    def test_projected_sgd(self):
        """Warm-started steps of decaying size, on the batches of the seed, as in a plain loop."""
        problem = softmax_problem(project_inner=hl.Ball(0.9))
        method = hl.IdentityHessian(
            inner_steps=7, inner_step_size=0.5, inner_decay=0.3, inner_batch_size=5
        )
        _, trajectory, _, x = outer_step(method, problem, seed=3)
        y = problem.y_space.ravel(problem.y0)
        batches, _ = replayed_batches(problem, method, seed=3)
        active = []
        for t, (batch, step) in enumerate(zip(batches, trajectory.steps, strict=True)):
            torch.testing.assert_close(step.y, y, rtol=1e-13, atol=1e-15)
            assert torch.equal(step.batch["index"], batch["index"])
            score = gradient_of(problem, y, x, batch)
            torch.testing.assert_close(step.score, score, rtol=1e-12, atol=1e-14)
            following = y - 0.5 / (1 + 0.3 * t) * (score + 0.04 * y)
            norm = following.norm()
            active.append(bool(norm > 0.9))
            y = following * (0.9 / norm) if norm > 0.9 else following
            assert step.projected == active[-1]
            expected = (step.y - y) / step.step_size if active[-1] else score + 0.04 * step.y
            torch.testing.assert_close(step.gradient, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(trajectory.y, y, rtol=1e-13, atol=1e-15)
        assert any(active)
        assert not all(active)


class TestImplicitDifferentiation:
    def test_hessian_and_cross_on_the_same_fresh_batches(self):
        problem = softmax_problem()
        method = hl.ImplicitDifferentiation(
            solver=CG(rtol=1e-13), inner_steps=3, inner_batch_size=5, cross_batches=2
        )
        _, trajectory, estimate, x = outer_step(method, problem)
        _, batch = replayed_batches(problem, method)
        assert len(batch["index"]) == 10
        a, b, hessian, cross = parts(problem, trajectory.y, x, batch)
        expected = a - cross @ torch.linalg.solve(hessian, b)
        assert relative(estimate.gradient, expected) < 1e-10
        assert estimate.certify().exact

    def test_outer_batch(self):
        problem = softmax_problem()
        method = hl.IdentityHessian(inner_steps=1, outer_batch_size=4)
        estimator = start(method, problem, seed=2)
        x, y = problem.x0, problem.y_space.ravel(problem.y0)
        estimate = estimator.estimate(x, Trajectory(y))
        index = torch.randperm(9, generator=torch.Generator().manual_seed(2))[:4]
        V, u = problem.outer_data
        seen = hl.BilevelProblem(
            problem.inner_loss,
            problem.outer_loss,
            x0=x,
            y0=problem.y0,
            inner_data=problem.inner_data,
            outer_data=(V[index], u[index]),
            regularizer=problem.regularizer,
        )
        a, b, _, cross = parts(seen, y, x, problem.inner_data)
        assert relative(estimate.gradient, a - cross @ b) < 1e-12

    @pytest.mark.parametrize("curvature", [1.0, 4.0])
    def test_identity(self, curvature):
        problem = quadratic_problem()
        method = hl.IdentityHessian(curvature=curvature)
        _, trajectory, estimate, x = outer_step(method, problem)
        a, b, _, cross = parts(problem, trajectory.y, x)
        assert relative(estimate.gradient, a - cross @ b / curvature) < 1e-13

    def test_damping(self):
        problem = quadratic_problem()
        method = hl.ImplicitDifferentiation(damping=0.7, solver=CG(rtol=1e-13))
        _, trajectory, estimate, x = outer_step(method, problem)
        a, b, hessian, cross = parts(problem, trajectory.y, x)
        q = torch.linalg.solve(hessian + 0.7 * torch.eye(4, dtype=FLOAT64), b)
        assert relative(estimate.gradient, a - cross @ q) < 1e-12
        assert estimate.certify().damping == 0.7
        assert not estimate.certify().exact

    def test_active_projection_is_reported(self):
        for radius, active in ((0.1, True), (100.0, False)):
            problem = quadratic_problem(project_inner=hl.Ball(radius))
            for method in (hl.ImplicitDifferentiation(), hl.Unrolled(), hl.FixedOuter()):
                certificate = outer_step(method, problem)[2].certify()
                assert certificate.constraint_active is active


class TestTrajectoryCross:
    METHOD = hl.NHGD(
        cross="trajectory", inner_steps=5, inner_batch_size=6, inner_step_size=0.3, damping=0.2
    )

    def test_mean_over_the_steps_at_fixed_points(self):
        """Each y_s is a point: the mean of C at (y_s, batch s), and no derivative through y_s."""
        problem = softmax_problem()
        estimator, trajectory, estimate, x = outer_step(self.METHOD, problem)
        a, b, _, _ = parts(problem, trajectory.y, x, problem.inner_data)
        crosses = [parts(problem, s.y, x, s.batch)[3] for s in trajectory.steps]
        q = torch.linalg.solve(estimator.stream.operator().to_dense(), b)
        expected = a - sum(crosses) / len(crosses) @ q
        assert relative(estimate.gradient, expected) < 1e-11
        # The y_s do depend on x, so that following them would have been another number.
        moved = start(self.METHOD, problem).solve_inner(trajectory.steps[0].y, x + 1.0)
        assert relative(moved.y, trajectory.y) > 1e-2

    def test_one_tiny_step_is_the_end_estimator_on_the_same_sample(self):
        problem = softmax_problem()
        settings = {
            "inner_steps": 1,
            "inner_batch_size": 6,
            "inner_step_size": 1e-13,
            "cross_batches": 1,
        }
        _, trajectory, along, _ = outer_step(hl.NHGD(cross="trajectory", **settings), problem)
        end = start(hl.NHGD(cross="end", **settings), problem)
        x, y = problem.x0, problem.y_space.ravel(problem.y0)
        same = end.solve_inner(y, x)
        assert torch.equal(same.steps[0].batch["index"], trajectory.steps[0].batch["index"])
        end.inner_batches.draw = lambda count=1: same.steps[0].batch  # instead of a fresh one
        assert relative(end.estimate(x, same).gradient, along.gradient) < 1e-10

    def test_differs_from_the_end_estimator_otherwise(self):
        problem = softmax_problem()
        end = outer_step(hl.NHGD(**self.METHOD.__dict__ | {"cross": "end"}), problem)[2]
        assert relative(end.gradient, outer_step(self.METHOD, problem)[2].gradient) > 1e-4


def unrolled_loop(
    problem: hl.BilevelProblem,
    method: hl.Unrolled,
    trajectory: Trajectory,
    x: Tensor,
    project: Any = None,
) -> Tensor:
    """Autograd through the inner loop itself, started from y_{T-K}."""
    x = x.clone().requires_grad_(True)
    steps = trajectory.steps[-(method.unroll_steps or len(trajectory.steps)) :]
    first = len(trajectory.steps) - len(steps)
    y, weight = steps[0].y, 0.0 if problem.regularizer is None else problem.regularizer.weight
    for t, step in enumerate(steps, start=first):
        batch = () if problem.inner_data is None else (step.batch,)
        y = y.requires_grad_(True) if y.is_leaf else y
        loss = problem.inner_loss(problem.y_space.unravel(y), x, *batch) + weight * (y @ y)
        (gradient,) = torch.autograd.grad(loss, y, create_graph=True)
        y = y - method.inner_step_size / (1 + method.inner_decay * t) * gradient
        if project is not None:
            y = project(y)
    batch = () if problem.outer_data is None else (problem.outer_data,)
    return torch.autograd.grad(problem.outer_loss(problem.y_space.unravel(y), x, *batch), x)[0]


def onto_ball(radius: float) -> Any:
    return lambda y: y * (radius / y.norm()) if y.norm() > radius else y


class TestUnrolled:
    @pytest.mark.parametrize("terms", [1, 2, 7])
    def test_stationary_point_gives_the_neumann_series(self, terms):
        """``a - C alpha sum_{j<K} (I - alpha H)^j b``: K terms, one fewer than K products give."""
        problem, alpha = quadratic_problem(), 0.2
        x = problem.x0
        _, _, hessian, cross = parts(problem, problem.y0, x)
        stationary = torch.linalg.solve(hessian, -cross.T @ x)
        method = hl.Unrolled(inner_steps=7, inner_step_size=alpha, unroll_steps=terms)
        _, trajectory, estimate, _ = outer_step(method, problem, y=stationary)
        assert relative(trajectory.y, stationary) < 1e-14
        a, b, hessian, cross = parts(problem, trajectory.y, x)
        expected = a - cross @ neumann_sum(hessian, b, alpha, terms)
        assert relative(estimate.gradient, expected) < 1e-12
        if terms > 1:
            neumann = hl.ImplicitDifferentiation(
                solver=Neumann(step_size=alpha, maxiter=terms - 1, stop_at_maxiter=True, rtol=0.0),
                inner_step_size=alpha,
            )
            _, _, other, _ = outer_step(neumann, problem, y=stationary)
            assert relative(estimate.gradient, other.gradient) < 1e-12

    @pytest.mark.parametrize("terms", [1, 4, None])
    @pytest.mark.parametrize("project", ["none", "ball", "box"])
    @pytest.mark.parametrize("decay", [0.0, 0.5])
    def test_autograd_through_the_loop(self, terms, project, decay):
        projections = {
            "none": (None, None),
            "ball": (hl.Ball(0.8), onto_ball(0.8)),
            "box": (hl.Box(-0.35, 0.3), lambda y: y.clamp(-0.35, 0.3)),
        }
        ours, plain = projections[project]
        problem = softmax_problem(project_inner=ours)
        method = hl.Unrolled(
            inner_steps=6,
            inner_step_size=0.9,
            inner_decay=decay,
            inner_batch_size=5,
            unroll_steps=terms,
        )
        _, trajectory, estimate, x = outer_step(method, problem)
        if ours is not None:
            assert any(step.projected for step in trajectory.steps)
        expected = unrolled_loop(problem, method, trajectory, x, plain)
        assert relative(estimate.gradient, expected) < 1e-12
        assert relative(expected, 0.02 * x) > 1e-3  # more than the direct term

    def test_truncation_matters(self):
        problem = softmax_problem()
        gradients = [
            outer_step(hl.Unrolled(inner_steps=6, inner_step_size=0.5, unroll_steps=k), problem)[2]
            for k in (1, 3, 6)
        ]
        for one, other in itertools.combinations(gradients, 2):
            assert relative(one.gradient, other.gradient) > 1e-3

    @pytest.mark.parametrize("terms", [1, 3, 10])
    def test_left_over_share(self, terms):
        problem, alpha = quadratic_problem(), 0.2
        method = hl.Unrolled(inner_steps=10, inner_step_size=alpha, unroll_steps=terms)
        _, trajectory, estimate, x = outer_step(method, problem)
        _, b, hessian, _ = parts(problem, trajectory.y, x)
        contraction = torch.eye(4, dtype=FLOAT64) - alpha * hessian
        expected = float((torch.linalg.matrix_power(contraction, terms) @ b).norm() / b.norm())
        certificate = estimate.certify()
        assert certificate.adjoint_residual == pytest.approx(expected, rel=1e-12)
        assert certificate.iterations == terms
        assert not certificate.converged

    def test_many_steps_are_exact(self):
        problem = quadratic_problem()
        method = hl.Unrolled(inner_steps=300, inner_step_size=0.4)
        _, trajectory, estimate, x = outer_step(method, problem)
        a, b, hessian, cross = parts(problem, trajectory.y, x)
        assert relative(estimate.gradient, a - cross @ torch.linalg.solve(hessian, b)) < 1e-12
        assert estimate.certify().converged

    def test_start_at_the_centre_of_the_ball(self):
        """The norm has no derivative at 0; the projection has."""
        problem = quadratic_problem(project_inner=hl.Ball(100.0))
        free = quadratic_problem()
        zero, method = torch.zeros(4, dtype=FLOAT64), hl.Unrolled(inner_steps=3)
        inside = outer_step(method, problem, y=zero)[2].gradient
        assert torch.equal(inside, outer_step(method, free, y=zero)[2].gradient)

    @pytest.mark.parametrize("unroll_steps", [0, -1, 11])
    def test_bad_depth(self, unroll_steps):
        with pytest.raises(ValueError, match=r"unroll_steps=.*expected 1 to inner_steps=10"):
            hl.Unrolled(unroll_steps=unroll_steps)


class TestNHGDOperator:
    """The operator after a trajectory against the dense recursion over independent gradients."""

    def rows(
        self, problem: hl.BilevelProblem, trajectory: Trajectory, x: Tensor, factor: float
    ) -> list[Tensor]:
        return [factor * gradient_of(problem, s.y, x, s.batch) for s in trajectory.steps]

    @pytest.mark.parametrize("batch_scale", [True, False])
    @pytest.mark.parametrize("initial", [0.0, 0.6])
    @pytest.mark.parametrize("rho", [None, 0.3])
    def test_mean_and_smoothing(self, rho, initial, batch_scale):
        problem = softmax_problem()
        method = hl.NHGD(
            damping=0.05,
            initial=initial,
            rho=rho,
            batch_scale=batch_scale,
            inner_steps=6,
            inner_batch_size=5,
        )
        estimator, trajectory, estimate, x = outer_step(method, problem)
        rows = self.rows(problem, trajectory, x, math.sqrt(5) if batch_scale else 1.0)
        # 2 * 0.02 is the curvature of the penalty; its gradient is in no row.
        expected = explicit_fisher(rows, damping=0.05 + 0.04, initial=initial, rho=rho)
        dense = estimator.stream.operator().to_dense()
        torch.testing.assert_close(dense, expected, rtol=1e-12, atol=1e-13)
        diluted = 0.0 if initial == 0 else initial / 7 if rho is None else initial * (1 - rho) ** 6
        assert estimate.certify().damping == pytest.approx(0.05 + diluted, rel=1e-12)

    def test_effective_rank(self):
        problem = softmax_problem()
        method = hl.NHGD(damping=0.05, inner_steps=4, inner_batch_size=5)
        _, trajectory, estimate, x = outer_step(method, problem)
        rows = torch.stack(self.rows(problem, trajectory, x, math.sqrt(5 / 4)))
        eigenvalues = torch.linalg.eigvalsh(rows @ rows.T)
        expected = float((eigenvalues / (eigenvalues + 0.09)).sum())
        assert estimate.certify().effective_rank == pytest.approx(expected, rel=1e-10)

    def test_reset_with_each_inner_solve(self):
        problem = softmax_problem()
        method = hl.NHGD(inner_steps=3, inner_batch_size=5, rho=0.2, initial=1.0)
        estimator = start(method, problem)
        y, x = problem.y_space.ravel(problem.y0), problem.x0
        for _ in range(3):
            trajectory = estimator.solve_inner(y, x)
            y = trajectory.y
        rows = self.rows(problem, trajectory, x, math.sqrt(5))
        expected = explicit_fisher(rows, damping=0.14, initial=1.0, rho=0.2)
        dense = estimator.stream.operator().to_dense()
        torch.testing.assert_close(dense, expected, rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("window", [2, 5, 9, 50])
    @pytest.mark.parametrize("rho", [None, 0.2])
    def test_window_carried_over_outer_steps(self, window, rho):
        problem = softmax_problem()
        method = hl.NHGD(
            inner_steps=3, inner_batch_size=5, reset="never", window=window, rho=rho, damping=0.1
        )
        estimator = start(method, problem)
        y, x, rows = problem.y_space.ravel(problem.y0), problem.x0, []
        for _ in range(4):
            trajectory = estimator.solve_inner(y, x)
            rows += self.rows(problem, trajectory, x, math.sqrt(5))
            y, x = trajectory.y, x + 0.1
        expected = explicit_fisher(rows[-window:], damping=0.14, rho=rho)
        dense = estimator.stream.operator().to_dense()
        torch.testing.assert_close(dense, expected, rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("rho", [None, 0.3])
    def test_hypergradient_of_the_published_recursion(self, rho):
        """No damping, no penalty: the dense inverse that the paper updates, step by step."""
        problem = softmax_problem(regularizer=None)
        method = hl.NHGD(
            damping=0.0, initial=0.5, rho=rho, inner_steps=6, inner_batch_size=5, cross_batches=2
        )
        _, trajectory, estimate, x = outer_step(method, problem)
        _, batch = replayed_batches(problem, method)
        a, b, _, cross = parts(problem, trajectory.y, x, batch)
        recursion = InverseRecursion(len(b), initial=0.5, rho=rho, dtype=FLOAT64)
        for row in self.rows(problem, trajectory, x, math.sqrt(5)):
            recursion.update(row)
        assert relative(estimate.gradient, a - cross @ recursion.solve(b)) < 1e-10

    @pytest.mark.parametrize("solver", [Woodbury(), ShermanMorrison()])
    def test_hypergradient_of_the_dense_inverse(self, solver):
        problem = softmax_problem()
        method = hl.NHGD(damping=1e-3, solver=solver, inner_steps=6, inner_batch_size=5)
        _, trajectory, estimate, x = outer_step(method, problem)
        _, batch = replayed_batches(problem, method)
        a, b, hessian, cross = parts(problem, trajectory.y, x, batch)
        rows = self.rows(problem, trajectory, x, math.sqrt(5))
        q = torch.linalg.solve(explicit_fisher(rows, damping=0.041), b)
        assert relative(estimate.gradient, a - cross @ q) < 1e-10
        certificate = estimate.certify()
        assert certificate.converged
        assert not certificate.exact
        assert certificate.hessian_residual == pytest.approx(
            float((b - hessian @ q).norm() / b.norm()), rel=1e-9
        )

    def test_projected_step_pushes_what_was_really_taken(self):
        problem = softmax_problem(project_inner=hl.Ball(0.8))
        method = hl.NHGD(damping=0.1, inner_steps=6, inner_batch_size=5, inner_step_size=0.9)
        estimator, trajectory, _, x = outer_step(method, problem)
        points = [s.y for s in trajectory.steps] + [trajectory.y]
        rows, active = [], 0
        for step, following in zip(trajectory.steps, points[1:], strict=True):
            score = gradient_of(problem, step.y, x, step.batch)
            free = step.y - 0.9 * (score + 0.04 * step.y)
            active += bool(free.norm() > 0.8)
            taken = (step.y - following) / 0.9
            rows.append(math.sqrt(5) * (taken if free.norm() > 0.8 else score))
        assert active > 0
        dense = estimator.stream.operator().to_dense()
        expected = explicit_fisher(rows, damping=0.14)
        torch.testing.assert_close(dense, expected, rtol=1e-11, atol=1e-12)

    @pytest.mark.parametrize("radius", [3.0, 3.67578125, 7.3, 11.1])
    def test_wide_ball_changes_nothing(self, radius):
        """Not even by rounding: a row would then be the step, the penalty's share included."""
        method = hl.NHGD(damping=0.1, inner_steps=6, inner_batch_size=5)
        free = outer_step(method, softmax_problem())
        wide = outer_step(method, softmax_problem(project_inner=hl.Ball(radius)))
        assert torch.equal(wide[2].gradient, free[2].gradient)
        assert wide[2].certify() == free[2].certify()

    def test_large_damping_is_the_identity(self):
        problem = softmax_problem()
        identity = outer_step(hl.IdentityHessian(inner_batch_size=5), problem)[2].gradient
        direct = 0.02 * problem.x0
        errors = []
        for damping in (1e4, 1e6):
            method = hl.NHGD(damping=damping, inner_batch_size=5)
            implicit = outer_step(method, problem)[2].gradient - direct
            errors.append(relative(damping * implicit, identity - direct))
        assert errors[0] < 1e-3
        assert errors[1] < 1e-5


class TestNHGDSamples:
    def sample_scores(
        self, problem: hl.BilevelProblem, y: Tensor, x: Tensor, batch: Tree
    ) -> tuple[Tensor, Tensor]:
        """Unweighted single-sample gradients by a loop, and the weights."""
        rows = []
        for i in range(len(batch["index"])):
            one = {name: leaf[i : i + 1] for name, leaf in batch.items()}
            y_i = y.clone().requires_grad_(True)
            loss = problem.likelihood.sample_loss(problem.y_space.unravel(y_i), one).sum()
            rows.append(torch.autograd.grad(loss, y_i)[0])
        return torch.stack(rows), torch.sigmoid(x[batch["index"]])

    @pytest.mark.parametrize("power", [1, 2])
    def test_sample_rows(self, power):
        """All samples of each batch: ``E[s^power grad l grad l^T]``, 1 with the correction."""
        problem = softmax_problem()
        method = hl.NHGD(
            damping=0.1,
            rows="sample",
            samples_per_step=100,
            weight_correction=power == 1,
            inner_steps=3,
            inner_batch_size=6,
        )
        estimator, trajectory, _, x = outer_step(method, problem)
        expected = 0.14 * torch.eye(problem.y_space.size, dtype=FLOAT64)
        for step in trajectory.steps:
            scores, weights = self.sample_scores(problem, step.y, x, step.batch)
            expected += scores.T @ (weights[:, None] ** power * scores) / (3 * 6)
        operator = estimator.stream.operator()
        assert operator.rank == 18
        torch.testing.assert_close(operator.to_dense(), expected, rtol=1e-12, atol=1e-13)

    def test_subsample_comes_from_the_batch(self):
        problem = softmax_problem()
        method = hl.NHGD(
            damping=0.1, rows="sample", samples_per_step=2, inner_steps=3, inner_batch_size=6
        )
        estimator, trajectory, _, x = outer_step(method, problem)
        rows = estimator.stream.operator().rows
        assert len(rows) == 6
        for t, step in enumerate(trajectory.steps):
            scores, weights = self.sample_scores(problem, step.y, x, step.batch)
            distance = torch.cdist(rows[2 * t : 2 * t + 2], weights[:, None] * scores)
            assert bool((distance.min(dim=1).values < 1e-12).all())
            assert len(set(distance.argmin(dim=1).tolist())) == 2  # two different samples

    def test_weight_correction_of_batch_rows(self):
        problem = softmax_problem()
        method = hl.NHGD(damping=0.1, weight_correction=True, inner_steps=4, inner_batch_size=6)
        estimator, trajectory, _, x = outer_step(method, problem)
        rows = []
        for step in trajectory.steps:
            scores, weights = self.sample_scores(problem, step.y, x, step.batch)
            rows.append(math.sqrt(6) * (weights.sqrt()[:, None] * scores).mean(0))
        dense = estimator.stream.operator().to_dense()
        torch.testing.assert_close(
            dense, explicit_fisher(rows, damping=0.14), rtol=1e-12, atol=1e-13
        )

    @pytest.mark.parametrize("settings", [{"rows": "sample"}, {"weight_correction": True}])
    def test_likelihood_and_data_are_needed(self, settings):
        with pytest.raises(ValueError, match=r"likelihood=WeightedLikelihood\("):
            start(hl.NHGD(**settings), softmax_problem(likelihood=None))
        without_data = dataclasses.replace(
            softmax_problem(), inner_data=None, inner_loss=lambda y, x: (x**2).sum()
        )
        with pytest.raises(ValueError, match=r"BilevelProblem\(inner_data="):
            start(hl.NHGD(**settings), without_data)

    def model_problem(self, n: int, weights: Tensor) -> hl.BilevelProblem:
        """Labels drawn from the model at y0, which is then well specified there."""
        Z = sampled(n, FEATURES, seed=8)
        y = 0.7 * sampled(FEATURES, CLASSES, seed=9)
        probabilities = torch.softmax(Z @ y, dim=1)
        t = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(1))[:, 0]

        def sample_loss(y: Tensor, batch: Tree) -> Tensor:
            return F.cross_entropy(batch["Z"] @ y, batch["t"], reduction="none")

        def sample_weight(x: Tensor, batch: Tree) -> Tensor:
            return x[batch["index"]]

        return hl.BilevelProblem(
            lambda y, x, batch: (sample_weight(x, batch) * sample_loss(y, batch)).mean(),
            lambda y, x: (y**2).sum(),
            x0=weights,
            y0=y,
            inner_data={"Z": Z, "t": t, "index": torch.arange(n)},
            likelihood=hl.WeightedLikelihood(sample_loss=sample_loss, sample_weight=sample_weight),
        )

    def fisher(self, problem: hl.BilevelProblem, **settings: Any) -> tuple[EmpiricalFisher, Tensor]:
        """The operator, all but undamped, of steps that do not move; and the exact Hessian."""
        method = hl.NHGD(damping=1e-9, inner_step_size=1e-12, **settings)
        estimator = start(method, problem)
        y, x = problem.y_space.ravel(problem.y0), problem.x0
        estimator.solve_inner(y, x)
        hessian = parts(problem, y, x, problem.inner_data)[2]
        return estimator.stream.operator(), hessian

    def standard_error(self, fisher: EmpiricalFisher, hessian: Tensor) -> float:
        """Root mean square of ``|F - H| / |H|`` for a mean of n independent ``r r^T`` of mean H."""
        variance = (fisher.rows**2).sum(1).square().mean() - hessian.norm() ** 2
        return math.sqrt(float(variance) / fisher.rank) / float(hessian.norm())

    def test_well_specified_fisher_is_the_hessian(self):
        n = 20_000
        problem = self.model_problem(n, torch.ones(n, dtype=FLOAT64))
        settings = {"rows": "sample", "samples_per_step": 100, "inner_batch_size": 100}
        fisher, hessian = self.fisher(problem, inner_steps=n // 100, **settings)
        error = self.standard_error(fisher, hessian)
        assert error < 0.04
        assert relative(fisher.to_dense(), hessian) < 2 * error

    def test_sample_weights_need_the_correction(self):
        """``E[s^2 ...]`` is far from the weighted Hessian, ``E[s ...]`` is not."""
        n = 20_000
        weights = torch.rand(n, generator=torch.Generator().manual_seed(4), dtype=FLOAT64)
        problem = self.model_problem(n, weights)
        settings = {"rows": "sample", "samples_per_step": 100, "inner_batch_size": 100}
        plain, hessian = self.fisher(problem, inner_steps=n // 100, **settings)
        corrected, _ = self.fisher(
            problem, inner_steps=n // 100, weight_correction=True, **settings
        )
        error = self.standard_error(corrected, hessian)
        assert error < 0.04
        assert relative(corrected.to_dense(), hessian) < 2 * error
        assert relative(plain.to_dense(), hessian) > 0.25

    @pytest.mark.parametrize("batch", [4, 20])
    def test_batch_factor(self, batch):
        """A mean over B samples has ``E[g g^T] = F / B``: the factor B restores the size."""
        n = 10_000
        problem = self.model_problem(n, torch.ones(n, dtype=FLOAT64))
        settings = {"inner_batch_size": batch, "inner_steps": 500}
        scaled, hessian = self.fisher(problem, **settings)
        unscaled, _ = self.fisher(problem, batch_scale=False, **settings)
        sizes = (scaled.rows**2).sum(1)  # of mean trace H
        error = float(sizes.std() / len(sizes) ** 0.5 / hessian.trace())
        assert error < 0.04
        assert abs(float(scaled.to_dense().trace() / hessian.trace()) - 1) < 3 * error
        torch.testing.assert_close(unscaled.rows, scaled.rows / batch**0.5)


class TestSettings:
    @pytest.mark.parametrize(
        ("method", "settings"),
        [
            (hl.NHGD, {"damping": -1.0}),
            (hl.NHGD, {"initial": -1.0}),
            (hl.NHGD, {"rho": 0.0}),
            (hl.NHGD, {"rho": 1.0}),
            (hl.NHGD, {"window": 0}),
            (hl.NHGD, {"reset": "sometimes"}),
            (hl.NHGD, {"rows": "column"}),
            (hl.NHGD, {"samples_per_step": 0}),
            (hl.NHGD, {"cross": "start"}),
            (hl.NHGD, {"cross_batches": 0}),
            (hl.ImplicitDifferentiation, {"damping": -0.1}),
            (hl.IdentityHessian, {"curvature": 0.0}),
            (hl.Unrolled, {"step_size": -1.0}),
            (hl.Unrolled, {"momentum": 1.0}),
            (hl.FixedOuter, {"inner_steps": 0}),
            (hl.FixedOuter, {"inner_step_size": 0.0}),
            (hl.FixedOuter, {"inner_decay": -1.0}),
            (hl.FixedOuter, {"inner_batch_size": 0}),
            (hl.FixedOuter, {"outer_batch_size": 0}),
            (hl.FixedOuter, {"step_size": math.nan}),
        ],
    )
    def test_out_of_range(self, method, settings):
        (name, value), *_ = settings.items()
        with pytest.raises(ValueError, match=f"{method.__name__}: {name}={value}; expected"):
            method(**settings)

    def test_carrying_without_a_window(self):
        with pytest.raises(ValueError, match="set window"):
            hl.NHGD(reset="never")

    def test_nothing_to_invert(self):
        with pytest.raises(ValueError, match="singular"):
            start(hl.NHGD(damping=0.0), softmax_problem(regularizer=None))

    def test_batch_above_the_data(self):
        with pytest.raises(ValueError, match="batch size 25 for inner_data of 24 samples"):
            start(hl.NHGD(inner_batch_size=25), softmax_problem())

    def test_settings_as_recorded(self):
        method = hl.NHGD(rho=0.1, solver=ShermanMorrison(rtol=1e-4))
        run = hl.Run(config=as_stored({"method": method}))
        settings = run.config["method"]
        assert settings["rho"] == 0.1
        assert settings["window"] is None
        assert settings["solver"]["class"] == "ShermanMorrison"
        assert settings["solver"]["rtol"] == 1e-4
        assert run.setting("method") == method


def test_fixed_outer_has_no_hypergradient():
    problem = softmax_problem()
    _, _, estimate, _ = outer_step(hl.FixedOuter(inner_steps=2, inner_batch_size=4), problem)
    assert torch.equal(estimate.gradient, torch.zeros(SAMPLES, dtype=FLOAT64))
    assert "held fixed" in estimate.certify().reason


@pytest.mark.parametrize(
    "method",
    [
        hl.NHGD(inner_batch_size=5),
        hl.NHGD(inner_batch_size=5, cross="trajectory"),
        hl.ImplicitDifferentiation(inner_batch_size=5),
        hl.IdentityHessian(inner_batch_size=5),
        hl.Unrolled(inner_batch_size=5),
    ],
)
def test_certificate_costs_nothing_that_is_counted_and_moves_nothing(method):
    problem = softmax_problem()
    estimator = start(method, problem)
    oracles: Oracles = estimator.oracles
    x = problem.x0
    estimate = estimator.estimate(x, estimator.solve_inner(problem.y_space.ravel(problem.y0), x))
    calls, gradient = oracles.count.calls, estimate.gradient.clone()
    with oracles.uncounted():
        first, second = estimate.certify(), estimate.certify()
    assert first == second
    assert oracles.count.calls == calls
    assert torch.equal(estimate.gradient, gradient)
