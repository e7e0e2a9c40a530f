"""What a certificate claims: estimates and bounds against true errors, doubt, strict, refine."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hyperlearn as hl
from hyperlearn import operators as ops
from hyperlearn import solvers
from hyperlearn.certificate import Certificate

Loss = Callable[..., Tensor]


def log_cosh(u: Tensor) -> Tensor:
    """``log cosh u``, also where cosh overflows."""
    return u + torch.nn.functional.softplus(-2 * u) - math.log(2)


def problem(seed: int, d: int = 6, p: int = 4, condition: float = 10.0) -> tuple[Loss, Loss]:
    """A log-cosh inner loss and an outer one with a direct gradient, both with cross terms."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    Q = torch.linalg.qr(drawn(d, d))[0]
    H = Q @ torch.diag(torch.logspace(0, -math.log10(condition), d, dtype=torch.float64)) @ Q.T
    A, B, c = drawn(2 * d, d) / d**0.5, drawn(d, p), drawn(d)

    def inner(y: Tensor, x: Tensor) -> Tensor:
        return y @ H @ y / 2 - y @ B @ x + log_cosh(A @ y).mean() * condition**-0.5

    def outer(y: Tensor, x: Tensor) -> Tensor:
        return (y - c).square().sum() / 2 + torch.sin(x).sum() + (x.sum() * y[0]) / 2

    return outer, inner


def exact(outer: Loss, inner: Loss, x: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """The solution and the hypergradient, by dense algebra at a point polished by Newton."""
    y = hl.argmin(inner, torch.zeros(d).to(x), x, method=hl.inner.Newton(rtol=1e-14))
    H = torch.func.hessian(inner)(y, x)
    C = torch.func.jacfwd(torch.func.grad(inner), argnums=1)(y, x).T
    b, a = torch.func.grad(outer, argnums=(0, 1))(y, x)
    return y, a - C @ torch.linalg.solve(H, b)


def relative(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


X = torch.tensor([0.3, -0.8, 0.5, 1.0], dtype=torch.float64)


class TestEstimate:
    @settings(max_examples=30, deadline=None)
    @given(
        seed=st.integers(0, 10_000),
        condition=st.sampled_from([2.0, 1e2, 1e4, 1e6]),
        off=st.sampled_from([0.0, 1e-12, 1e-9, 1e-6, 1e-4, 1e-3, 1e-2]),
        solver=st.sampled_from([solvers.CG(rtol=1e-10), solvers.DenseCholesky(), solvers.Auto()]),
    )
    @pytest.mark.filterwarnings("ignore::solvers.ConvergenceWarning")
    def test_is_never_ten_times_too_small(self, seed, condition, off, solver):
        outer, inner = problem(seed, condition=condition)
        y, reference = exact(outer, inner, X, 6)
        away = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found, certificate = hl.hypergradient(outer, inner, y + off * away, X, solver=solver)
        error = float((found - reference).norm())
        # The reference has rounding errors of its own, of the condition's size.
        rounding = 1e-15 * condition * float(reference.norm())
        assert certificate.bound_is_estimate
        assert error <= 10 * certificate.error_bound + rounding

    @pytest.mark.parametrize("off", [1e-6, 1e-4, 1e-3])
    def test_is_near_the_error(self, off):
        outer, inner = problem(1)
        y, reference = exact(outer, inner, X, 6)
        found, certificate = hl.hypergradient(outer, inner, y + off, X)
        error = relative(found, reference)
        assert error <= certificate.relative_error <= 5 * error
        distance = off * 6**0.5
        assert certificate.distance == pytest.approx(distance, rel=0.2)

    def test_of_surrogates_is_in_the_exact_hessian(self):
        outer, inner = problem(2)
        y, reference = exact(outer, inner, X, 6)
        for settings_ in (
            {"operator": ops.Identity(6, dtype=torch.float64)},
            {"damping": 0.5},
            {"solver": solvers.Neumann(step_size=0.5, maxiter=3)},
        ):
            found, certificate = hl.hypergradient(outer, inner, y, X, estimate=True, **settings_)
            error = float((found - reference).norm())
            assert error > 1e-2 * float(reference.norm())
            assert error <= certificate.error_bound <= 4 * error
            assert relative(found, reference) <= certificate.relative_error
            assert not certificate.trustworthy()

    def test_is_left_out_on_request(self):
        outer, inner = problem(3)
        y, _ = exact(outer, inner, X, 6)
        _, certificate = hl.hypergradient(outer, inner, y, X, estimate=False)
        assert certificate.error_bound is None
        assert "no error bound" in certificate.doubt()
        _, surrogate = hl.hypergradient(outer, inner, y, X, damping=0.1)
        assert surrogate.error_bound is None  # a cheap stand-in is not made dear unasked

    def test_far_from_a_solution_there_is_none(self):
        outer, _ = problem(4)

        def steep(y: Tensor, x: Tensor) -> Tensor:
            return log_cosh(3 * (y - x.sum())).sum() + 1e-3 * (y**2).sum()

        _, certificate = hl.hypergradient(outer, steep, torch.full((6,), 4.0).double(), X)
        assert certificate.error_bound == math.inf
        assert "too far from a solution" in certificate.reason
        assert not certificate.trustworthy(0.5)

    def test_where_newtons_step_overflows_there_is_none(self):
        outer, _ = problem(4)

        def steep(y: Tensor, x: Tensor) -> Tensor:
            return torch.log(torch.cosh(50 * (y - x.sum()))).sum() + 1e-6 * (y**2).sum()

        _, certificate = hl.hypergradient(outer, steep, torch.full((6,), 3.0).double(), X)
        assert certificate.error_bound == math.inf
        assert "no estimate of the error" in certificate.reason
        assert not certificate.trustworthy(0.5)

    def test_saddle_is_no_minimum(self):
        def saddle(y: Tensor, x: Tensor) -> Tensor:
            return y[0] ** 2 - y[1] ** 2 + (y**2)[2:].sum() - x.sum() * y.sum()

        outer, _ = problem(5)
        y = X.sum() / 2 * torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0, 1.0]).double()
        _, certificate = hl.hypergradient(outer, saddle, y, X, solver=solvers.MINRES())
        assert certificate.indefinite
        assert certificate.curvature == pytest.approx(-2)
        assert "y is no minimum" in certificate.doubt()

    def test_beyond_256_unknowns(self):
        d = 400
        scale = torch.linspace(1, 10, d, dtype=torch.float64)

        def inner(y: Tensor, x: Tensor) -> Tensor:
            return (scale * y**2).sum() / 2 + (y**4).sum() / 4 - x.sum() * y.sum()

        def outer(y: Tensor, x: Tensor) -> Tensor:
            return ((y - 1) ** 2).sum() + x.square().sum()

        y = hl.argmin(inner, torch.zeros(d).double(), X)
        reference = torch.func.grad(
            lambda x: outer(hl.argmin(inner, torch.zeros(d).double(), x), x)
        )(X)
        found, certificate = hl.hypergradient(outer, inner, y + 1e-5, X)
        error = relative(found, reference)
        assert error <= certificate.relative_error <= 5 * error
        smallest = float((scale + 3 * y**2).min())
        assert smallest <= certificate.curvature <= 1.2 * smallest


class TestStrictAndRefine:
    def test_strict(self):
        outer, inner = problem(6)
        y, _ = exact(outer, inner, X, 6)
        hl.hypergradient(outer, inner, y, X, strict=True, rtol=1e-8)
        with pytest.raises(hl.UntrustworthyError, match="asked for 1e-08") as caught:
            hl.hypergradient(outer, inner, y + 1e-3, X, strict=True, rtol=1e-8)
        assert caught.value.certificate.relative_error > 1e-8
        assert caught.value.gradient.shape == X.shape

    @pytest.mark.parametrize("off", [1e-6, 1e-2, 1.0, 30.0])
    @pytest.mark.parametrize("rtol", [1e-3, 1e-10])
    def test_refine_meets_what_is_asked_for(self, off, rtol):
        outer, inner = problem(7)
        y, reference = exact(outer, inner, X, 6)
        found, certificate = hl.hypergradient(
            outer, inner, y + off, X, refine=True, rtol=rtol, strict=True
        )
        assert relative(found, reference) <= rtol
        assert certificate.trustworthy(rtol)

    def test_refine_says_what_rounding_forbids(self):
        outer, inner = problem(8, condition=1e8)
        y, _ = exact(outer, inner, X, 6)
        _, certificate = hl.hypergradient(outer, inner, y, X, refine=True, rtol=1e-16)
        assert not certificate.trustworthy(1e-16)
        assert "cannot be improved further in float64" in certificate.reason

    def test_refine_from_a_surrogate(self):
        outer, inner = problem(9)
        y, reference = exact(outer, inner, X, 6)
        identity = ops.Identity(6, dtype=torch.float64)
        found, certificate = hl.hypergradient(
            outer, inner, y, X, operator=identity, refine=True, rtol=1e-9
        )
        assert relative(found, reference) <= 1e-9
        assert certificate.exact
        assert certificate.refinements >= 1


class TestBounds:
    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 10_000), off=st.sampled_from([1e-6, 1e-3, 1e-2]))
    def test_of_estimated_constants(self, seed, off):
        outer, inner = problem(seed)
        y, reference = exact(outer, inner, X, 6)
        near = y + off / 6**0.5
        constants = hl.estimated_smoothness(outer, inner, near, X, radius=2 * off)
        found, certificate = hl.hypergradient(outer, inner, near, X, smoothness=constants)
        assert certificate.bound_is_estimate
        assert float((found - reference).norm()) <= certificate.error_bound
        assert float((near - y).norm()) <= certificate.distance

    def test_of_known_constants_is_a_bound(self):
        outer, inner = problem(10)
        y, _ = exact(outer, inner, X, 6)
        constants = hl.Smoothness(strong_convexity=0.1, cross_norm=10.0)
        _, certificate = hl.hypergradient(outer, inner, y, X, smoothness=constants)
        assert not certificate.bound_is_estimate
        assert certificate.distance == pytest.approx(certificate.inner_stationarity / 0.1)

    def test_estimated_constants_of_a_quadratic_are_exact(self):
        H = torch.diag(torch.tensor([1.0, 2.0, 5.0]).double())

        def inner(y: Tensor, x: Tensor) -> Tensor:
            return y @ H @ y / 2 - 3 * y @ x

        def outer(y: Tensor, x: Tensor) -> Tensor:
            return 2 * (y**2).sum() + y @ x

        y = torch.ones(3).double()
        found = hl.estimated_smoothness(outer, inner, y, y, radius=0.5, margin=0.0)
        assert found.strong_convexity == pytest.approx(1, rel=1e-8)
        assert found.cross_norm == pytest.approx(3, rel=0.02)
        assert found.outer_smoothness == pytest.approx(4, rel=0.02)
        assert found.direct_smoothness == pytest.approx(1, rel=0.02)
        assert found.hessian_lipschitz == found.cross_lipschitz == 0

    def test_bad_requests(self):
        outer, inner = problem(11)
        y = torch.zeros(6).double()
        with pytest.raises(ValueError, match="radius=0"):
            hl.estimated_smoothness(outer, inner, y, X, radius=0)
        with pytest.raises(ValueError, match="samples=0"):
            hl.estimated_smoothness(outer, inner, y, X, radius=1, samples=0)
        with pytest.raises(ValueError, match="no constant of strong convexity"):
            hl.estimated_smoothness(outer, lambda y, x: -(y**2).sum() * x[0], y, X, radius=1)


class TestChunks:
    @pytest.mark.parametrize("chunk_size", [1, 7, 20, 50])
    def test_give_what_one_piece_gives(self, chunk_size):
        generator = torch.Generator().manual_seed(0)
        A = torch.randn(20, 3, generator=generator, dtype=torch.float64)
        t, lengths = torch.sign(A.sum(1) + 0.1), torch.arange(20)

        def inner(y: Tensor, x: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            A, t, index = batch
            fit = torch.nn.functional.softplus(-t * (A @ y)) * (1 + index / 20)
            return fit.mean() + (x.exp() * y**2).sum() / 2

        def outer(y: Tensor, x: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
            A, t = batch
            return ((A @ y - t) ** 2).mean() + x.square().sum()

        x, y = torch.zeros(3).double(), torch.ones(3).double() / 5
        data = {"inner_batch": (A, t, lengths), "outer_batch": (A, t)}
        whole, certificate = hl.hypergradient(outer, inner, y, x, **data)
        parts, chunked = hl.hypergradient(outer, inner, y, x, chunk_size=chunk_size, **data)
        torch.testing.assert_close(parts, whole, rtol=1e-8, atol=1e-12)
        assert chunked.inner_stationarity == pytest.approx(certificate.inner_stationarity)
        assert chunked.error_bound == pytest.approx(certificate.error_bound, rel=1e-5)

    def test_of_a_bad_size(self):
        outer, inner = problem(0)
        with pytest.raises(ValueError, match="chunk_size=0"):
            hl.hypergradient(outer, inner, torch.zeros(6).double(), X, chunk_size=0)


def test_claims_relative_to_a_zero_gradient():
    base = {
        "inner_stationarity": 0.0, "adjoint_residual": 0.0, "hessian_residual": 0.0,
        "converged": True, "exact": True, "iterations": 0, "operator": "", "solver": "",
        "reason": "",
    }  # fmt: skip
    assert Certificate(**base, error_bound=0.0, gradient_norm=0.0).relative_error == 0
    assert Certificate(**base, error_bound=1.0, gradient_norm=1.0).relative_error == math.inf
    assert Certificate(**base, error_bound=1.0, gradient_norm=3.0).relative_error == 0.5
    assert Certificate(**base, constraint_active=True, error_bound=0.0, gradient_norm=1.0).doubt()
