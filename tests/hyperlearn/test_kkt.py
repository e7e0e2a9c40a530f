"""The optimality system: zero at known solutions, nonsingular there, and differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from torch import Tensor

import hyperlearn as hl
from operators import Space

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
FLOAT64 = torch.float64


def sampled(*shape: int, seed: int = 0, dtype: torch.dtype = FLOAT64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def positive_definite(size: int, seed: int) -> Tensor:
    root = sampled(size, size, seed=seed)
    return root @ root.T + torch.eye(size, dtype=FLOAT64)


def flattened(
    F: Callable[..., Any], point: hl.KKTPoint, x: Any
) -> tuple[Callable[..., Any], Tensor]:
    """F between vectors, and the vector of `point`."""
    space = Space.of(point)
    return lambda z, x: space.ravel(F(space.unravel(z), x)), space.ravel(point)


def implicit(F: Callable[..., Any], point: hl.KKTPoint, x: Tensor) -> Tensor:
    """``-(d_z F)^{-1} d_x F``, dense, for all of z = (y, nu, lam)."""
    f, z = flattened(F, point, x)
    dz, dx = torch.func.jacrev(f, argnums=(0, 1))(z, x)
    torch.testing.assert_close(torch.func.jacfwd(f)(z, x), dz)
    return -torch.linalg.solve(dz, dx)


def central(f: Callable[[Tensor], Tensor], x: Tensor, step: float) -> Tensor:
    columns = [(f(x + step * e) - f(x - step * e)) / (2 * step) for e in torch.eye(len(x)).to(x)]
    return torch.stack(columns, -1)


def newton(F: Callable[..., Any], point: hl.KKTPoint, x: Any, steps: int = 50) -> hl.KKTPoint:
    """Damped by halving until the residual falls; dense."""
    space = Space.of(point)
    f, z = flattened(F, point, x)
    for _ in range(steps):
        residual = f(z, x)
        if residual.norm() < 1e-14:
            break
        direction = torch.linalg.solve(torch.func.jacrev(f)(z, x), residual)
        trials = (z - 0.5**k * direction for k in range(30))
        z = next((trial for trial in trials if f(trial, x).norm() < residual.norm()), z)
    return space.unravel(z)


def norm(point: hl.KKTPoint) -> float:
    return float(Space.of(point).ravel(point).norm())


class TestEqualityQP:
    """``min y^T Q y / 2 - x^T y`` subject to ``A y = b``: one linear system."""

    @PROPERTY
    @given(seed=st.integers(0, 999))
    def test_closed_form(self, seed):
        Q, A, b = (
            positive_definite(5, seed),
            sampled(2, 5, seed=seed + 1),
            sampled(2, seed=seed + 2),
        )
        x = sampled(5, seed=seed + 3)
        saddle = torch.cat([torch.cat([Q, A.T], 1), torch.cat([A, torch.zeros(2, 2).to(A)], 1)])
        solution = torch.linalg.solve(saddle, torch.cat([x, b]))
        F = hl.kkt_residual(lambda y, x: y @ Q @ y / 2 - x @ y, equality=lambda y, x: A @ y - b)
        point = hl.KKTPoint(solution[:5], equality=solution[5:])
        residual = F(point, x)
        assert norm(residual) < 1e-11
        assert residual.inequality == ()
        f, z = flattened(F, point, x)
        torch.testing.assert_close(torch.func.jacrev(f)(z, x), saddle)
        right = torch.cat([torch.eye(5), torch.zeros(2, 5)]).to(Q)
        torch.testing.assert_close(implicit(F, point, x), torch.linalg.solve(saddle, right))


class TestBoxQP:
    """``min |M y - x|^2 / 2`` subject to ``lower <= y <= upper``."""

    lower, upper = -0.3, 0.4

    def problem(self, seed: int) -> tuple[Tensor, Tensor, Callable[..., Any]]:
        M, x = sampled(8, 5, seed=seed), sampled(8, seed=seed + 1)
        F = hl.kkt_residual(
            lambda y, x: ((M @ y - x) ** 2).sum() / 2,
            inequality=lambda y, x: {"lower": self.lower - y, "upper": y - self.upper},
        )
        return M, x, F

    def solution(self, M: Tensor, x: Tensor) -> tuple[hl.KKTPoint, bool]:
        """By scipy, with the multipliers; and whether complementarity is well strict."""
        found = optimize.lsq_linear(
            M.numpy(), x.numpy(), (self.lower, self.upper), method="bvls", tol=1e-15
        )
        y = torch.from_numpy(found.x)
        gradient = M.T @ (M @ y - x)
        low, high = y - self.lower < 1e-12, self.upper - y < 1e-12
        multipliers = {
            "lower": torch.where(low, gradient, 0.0),
            "upper": torch.where(high, -gradient, 0.0),
        }
        active = low | high
        strict = (gradient[active].abs() > 1e-2).all() and (
            torch.minimum(y - self.lower, self.upper - y)[~active] > 1e-3
        ).all()
        return hl.KKTPoint(y, (), multipliers), bool(strict)

    @PROPERTY
    @given(seed=st.integers(0, 999))
    def test_solution_of_scipy(self, seed):
        M, x, F = self.problem(seed)
        point, strict = self.solution(M, x)
        assert norm(F(point, x)) < 1e-12
        if not strict:
            return
        f, z = flattened(F, point, x)
        assert torch.linalg.cond(torch.func.jacrev(f)(z, x)) < 1e8
        # The free entries solve their own least squares, the bounded ones stay.
        free = (point.y > self.lower + 1e-12) & (point.y < self.upper - 1e-12)
        expected = torch.zeros(5, 8, dtype=FLOAT64)
        expected[free] = torch.linalg.pinv(M[:, free])
        derivative = implicit(F, point, x)[:5]
        torch.testing.assert_close(derivative, expected, rtol=1e-8, atol=1e-9)
        numerical = central(lambda x: self.solution(M, x)[0].y, x, 1e-5)
        torch.testing.assert_close(derivative, numerical, rtol=1e-6, atol=1e-7)

    @PROPERTY
    @given(seed=st.integers(0, 999))
    def test_newton_finds_it_from_the_start(self, seed):
        M, x, F = self.problem(seed)
        start = hl.kkt_start(
            torch.zeros(5, dtype=FLOAT64),
            x,
            inequality=lambda y, x: {"lower": self.lower - y, "upper": y - self.upper},
        )
        found = newton(F, start, x)
        assert norm(F(found, x)) < 1e-10
        expected, _ = self.solution(M, x)
        torch.testing.assert_close(found.y, expected.y, rtol=0, atol=1e-9)


class TestGeneral:
    """Curved constraints of both kinds, all depending on x, against SLSQP."""

    @staticmethod
    def loss(y: Any, x: Tensor) -> Tensor:
        return ((y["a"] - x[:2]) ** 2).sum() + ((y["b"] - x[1:]) ** 4).sum() + y["a"][0] * y["b"][0]

    @staticmethod
    def equality(y: Any, x: Tensor) -> Tensor:
        return y["a"].sum() + y["b"][1] - x[0] * x[2]

    @staticmethod
    def inequality(y: Any, x: Tensor) -> Any:
        ball = (y["a"] ** 2).sum() + (y["b"] ** 2).sum() - 2.1 - 0.1 * x[1] ** 2
        return ball, y["b"] - 5 - x[0]

    x = torch.tensor([1.3, 0.8, 1.9], dtype=FLOAT64)

    def solve(self, x: Tensor) -> Any:
        space = Space.of({"a": torch.zeros(2, dtype=FLOAT64), "b": torch.zeros(2, dtype=FLOAT64)})

        def plain(f: Callable[..., Any], sign: float = 1.0) -> dict[str, Callable[..., Any]]:
            def value(z: Tensor) -> Tensor:
                parts = f(space.unravel(z), x)
                parts = parts if isinstance(parts, tuple) else (parts,)
                return sign * torch.cat([part.reshape(-1) for part in parts])

            return {
                "fun": lambda z: value(torch.from_numpy(z)).numpy(),
                "jac": lambda z: torch.func.jacrev(value)(torch.from_numpy(z)).numpy(),
            }

        loss = plain(self.loss)
        found = optimize.minimize(
            lambda z: float(loss["fun"](z)[0]),
            np.array([0.1, 0.2, 0.3, 0.4]),
            jac=lambda z: loss["jac"](z)[0],
            method="SLSQP",
            constraints=[
                {"type": "eq", **plain(self.equality)},
                {"type": "ineq", **plain(self.inequality, -1.0)},
            ],
            options={"ftol": 1e-12, "maxiter": 500},
        )
        assert found.success
        return space.unravel(torch.from_numpy(found.x))

    def point(self, x: Tensor) -> hl.KKTPoint:
        """SLSQP's minimiser with the multipliers by least squares of the stationarity."""
        y = self.solve(x)
        space = Space.of(y)
        z = space.ravel(y)
        gradients = torch.func.jacrev(
            lambda z: torch.stack(
                [
                    self.loss(space.unravel(z), x),
                    self.equality(space.unravel(z), x),
                    self.inequality(space.unravel(z), x)[0],
                ]
            )
        )(z)
        multipliers = torch.linalg.lstsq(gradients[1:].T, -gradients[0][:, None]).solution[:, 0]
        return hl.KKTPoint(y, multipliers[0], (multipliers[1], torch.zeros(2, dtype=FLOAT64)))

    def test_residual_and_derivative(self):
        F = hl.kkt_residual(self.loss, self.equality, self.inequality)
        point = self.point(self.x)
        assert float(point.inequality[0]) > 0.1  # the ball is active, the bound is not
        residual = F(point, self.x)
        assert Space.of(residual).holds(point)
        assert norm(residual) < 1e-6
        exact = newton(F, point, self.x)
        assert norm(F(exact, self.x)) < 1e-12
        torch.testing.assert_close(exact, point, rtol=0, atol=1e-6)
        derivative = implicit(F, exact, self.x)[:4]
        numerical = central(lambda x: Space.of(exact.y).ravel(self.solve(x)), self.x, 1e-3)
        torch.testing.assert_close(derivative, numerical, rtol=1e-3, atol=1e-4)
        # And to full precision, against the equation solved anew.
        again = central(lambda x: Space.of(exact.y).ravel(newton(F, exact, x).y), self.x, 1e-5)
        torch.testing.assert_close(derivative, again, rtol=1e-7, atol=1e-8)

    def test_newton_from_the_start(self):
        start = hl.kkt_start(
            {"a": torch.tensor([0.1, 0.2]).double(), "b": torch.tensor([0.3, 0.4]).double()},
            self.x,
            self.equality,
            self.inequality,
        )
        assert start.equality == 0
        assert start.inequality[0] == 1
        assert start.inequality[1].tolist() == [1, 1]
        F = hl.kkt_residual(self.loss, self.equality, self.inequality)
        found = newton(F, start, self.x)
        assert norm(F(found, self.x)) < 1e-10
        torch.testing.assert_close(found.y, self.solve(self.x), rtol=0, atol=1e-6)

    def test_vmap_and_second_derivatives(self):
        F = hl.kkt_residual(self.loss, self.equality, self.inequality)
        point = newton(F, self.point(self.x), self.x)
        f, z = flattened(F, point, self.x)
        zs, xs = z + 0.1 * sampled(4, len(z)), self.x + 0.1 * sampled(4, 3, seed=1)
        one_by_one = torch.stack([f(*pair) for pair in zip(zs, xs, strict=True)])
        torch.testing.assert_close(torch.func.vmap(f)(zs, xs), one_by_one)
        second = torch.func.jacfwd(torch.func.jacrev(f))(zs[0], xs[0])
        torch.testing.assert_close(second, torch.func.jacrev(torch.func.jacrev(f))(zs[0], xs[0]))
        numerical = central(lambda z: torch.func.jacrev(f)(z, xs[0]), zs[0], 1e-6)
        torch.testing.assert_close(second, numerical, rtol=1e-6, atol=1e-7)

    def test_plain_autograd_reaches_x(self):
        F = hl.kkt_residual(self.loss, self.equality, self.inequality)
        f, z = flattened(F, self.point(self.x), self.x)
        weight, leaf = sampled(len(z)), self.x.clone().requires_grad_()
        (f(z, leaf) @ weight).backward()
        torch.testing.assert_close(leaf.grad, weight @ torch.func.jacrev(f, argnums=1)(z, self.x))


class TestSmoothing:
    @PROPERTY
    @given(seed=st.integers(0, 999), exponent=st.floats(-6, -1))
    def test_point_of_the_barrier(self, seed, exponent):
        """``grad (f - eps sum log(-g)) = 0``, and each product ``lam (-g)`` is eps."""
        eps, target = 10.0**exponent, sampled(4, seed=seed)
        F = hl.kkt_residual(
            lambda y, x: ((y - x) ** 2).sum() / 2, inequality=lambda y, x: -y, smoothing=eps
        )
        # y - x - eps / y = 0 with y > 0
        root = (target**2 + 4 * eps).sqrt()
        y = torch.where(target > 0, (target + root) / 2, 2 * eps / (root - target))
        point = hl.KKTPoint(y, (), eps / y)
        assert norm(F(point, target)) < 1e-12
        assert float((y - target.relu()).abs().max()) <= eps**0.5
        torch.testing.assert_close(
            implicit(F, point, target)[:4], torch.diag(y / root), rtol=1e-9, atol=1e-10
        )


class TestFischerBurmeister:
    """Seen through ``f = 0, g = -y``, whose complementarity is ``phi(lam, y)``."""

    @staticmethod
    def phi(a: Tensor, b: Tensor, smoothing: float = 0.0) -> Tensor:
        F = hl.kkt_residual(
            lambda y, x: 0 * y.sum(), inequality=lambda y, x: -y, smoothing=smoothing
        )
        return F(hl.KKTPoint(b, (), a), None).inequality

    @PROPERTY
    @given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.sampled_from([0.0, 1e-4, 1.0]))
    def test_values(self, a, b, eps):
        found = float(self.phi(torch.tensor([a]).double(), torch.tensor([b]).double(), eps))
        a, b = (float(torch.tensor(value).double()) for value in (a, b))
        expected = math.sqrt(a * a + b * b + 2 * eps) - (a + b)
        assert found == pytest.approx(expected, abs=1e-12 * (1 + abs(a) + abs(b)), rel=1e-12)

    def test_zeros(self):
        a, b = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0], [1e-30, 0.0]]).T
        assert not self.phi(a, b).any()
        a, b = torch.tensor([[-1.0, 0.0], [0.0, -1.0], [1.0, 1.0], [-1.0, 2.0]]).T
        assert (self.phi(a, b).abs() > 0.1).all()

    def test_digits_do_not_cancel(self):
        """A large multiplier of a constraint that is off by 1e-12: -b, and not rounding of a."""
        a, b = torch.tensor([1e8]).double(), torch.tensor([1e-12]).double()
        torch.testing.assert_close(self.phi(a, b), -b, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
    def test_derivatives_on_the_axes(self, transform):
        a = torch.tensor([2.0, 0.0, 0.0], dtype=FLOAT64)
        b = torch.tensor([0.0, 3.0, 0.0], dtype=FLOAT64)
        in_a, in_b = transform(self.phi, argnums=0)(a, b), transform(self.phi, argnums=1)(a, b)
        expected_a = torch.diag(torch.tensor([0.0, -1.0, -1.0], dtype=FLOAT64))
        expected_b = torch.diag(torch.tensor([-1.0, 0.0, -1.0], dtype=FLOAT64))
        torch.testing.assert_close(in_a, expected_a)
        torch.testing.assert_close(in_b, expected_b)
        for second in (torch.func.jacrev, torch.func.jacfwd):
            assert torch.isfinite(second(transform(self.phi))(a, b)).all()

    @pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
    def test_dtype(self, dtype):
        assert self.phi(torch.ones(2, dtype=dtype), torch.ones(2, dtype=dtype)).dtype == dtype


class TestArguments:
    def test_without_constraints_it_is_the_gradient(self):
        F, y = hl.kkt_residual(lambda y, x: (y**3).sum()), sampled(3)
        found = F(hl.KKTPoint(y), None)
        torch.testing.assert_close(found.y, 3 * y**2)
        assert (found.equality, found.inequality) == ((), ())
        assert hl.kkt_start(y, None) == hl.KKTPoint(y, (), ())

    def test_what_is_not_callable(self):
        with pytest.raises(TypeError, match=r"loss is a int; expected f\(y, x\)"):
            hl.kkt_residual(1)
        for name in ("equality", "inequality"):
            with pytest.raises(TypeError, match=f"{name} is a Tensor; expected a function of y, x"):
                hl.kkt_residual(lambda y, x: y.sum(), **{name: torch.ones(2)})

    @pytest.mark.parametrize("smoothing", [-1e-3, math.nan, math.inf])
    def test_smoothing(self, smoothing):
        with pytest.raises(ValueError, match=r"expected a finite number >= 0"):
            hl.kkt_residual(lambda y, x: y.sum(), smoothing=smoothing)

    def test_loss_that_is_no_scalar(self):
        with pytest.raises(ValueError, match=r"loss\(y, x\) is \(3,\); expected a tensor \(\)"):
            hl.kkt_residual(lambda y, x: y)(hl.KKTPoint(torch.ones(3)), None)

    @pytest.mark.parametrize("name", ["equality", "inequality"])
    def test_multipliers_that_do_not_fit(self, name):
        F = hl.kkt_residual(lambda y, x: y.sum(), **{name: lambda y, x: y})
        for wrong in (torch.ones(2), (torch.ones(3),), (), None):
            with pytest.raises(ValueError, match=rf"the multipliers point\.{name} are .*expected"):
                F(hl.KKTPoint(torch.ones(3), **{name: wrong}), None)
        F = hl.kkt_residual(lambda y, x: y.sum())
        for wrong in (torch.ones(2), None):
            with pytest.raises(ValueError, match=r"\(\) where there is no such constraint"):
                F(hl.KKTPoint(torch.ones(3), **{name: wrong}), None)
