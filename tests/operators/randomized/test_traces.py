"""`trace` and `diagonal` against the matrix written out, and their errors against each other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import operators as ops
from operators import Space
from operators.randomized.diagonals import diagonal
from operators.randomized.monte_carlo import random_vectors
from operators.randomized.traces import leave_one_out, trace
from tests.operators.opaque import Opaque, symmetric, with_spectrum

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
F64 = torch.float64
TRACES = [
    ("hutchinson", "rademacher"),
    ("hutchinson", "gaussian"),
    ("hutchinson", "sphere"),
    ("hutch++", "rademacher"),
    ("hutch++", "gaussian"),
    ("hutch++", "sphere"),
    ("xtrace", "rademacher"),
    ("xtrace", "gaussian"),
    ("xtrace", "sphere"),
]
DIAGONALS = ["hutchinson", "xdiag"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


# --- exact answers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "A",
    [
        ops.Dense(normal(5, 5)),
        ops.Diagonal(normal(5)),
        2.0 * ops.Dense(normal(5, 5)) + ops.Identity(5),
        ops.Dense(normal(5, 5)).T,
        ops.LowRankPlusDiagonal(normal(2, 5), 0.5, normal(2, seed=1)),
    ],
    ids=lambda A: type(A).__name__,
)
def test_structure_answers_without_a_product(A):
    matrix = A.to_dense()
    t, d = trace(A, 1), diagonal(A, 1)
    for estimate, expected in ((t, matrix.trace()), (d, matrix.diagonal())):
        torch.testing.assert_close(estimate.value, expected, rtol=1e-13, atol=1e-13)
        assert (estimate.exact, estimate.method, estimate.products) == (True, "structure", 0)
        assert not estimate.error.any()
        assert estimate.error.shape == expected.shape


@pytest.mark.parametrize("n", [0, 1, 7, 300])  # 300: more than one block of coordinate vectors
@pytest.mark.parametrize("method", ["exact", None])
def test_n_products_are_exact(n, method):
    A = Opaque(normal(n, n))
    t = trace(A, max(n, 1), method=method)
    d = diagonal(A, max(n, 1), method=method)
    torch.testing.assert_close(t.value, A.matrix.trace())
    torch.testing.assert_close(d.value, A.matrix.diagonal())
    assert A.count == [2 * n]
    assert (t.products, d.products) == (n, n)
    assert t.exact
    assert d.exact


# --- estimates ---------------------------------------------------------------------------------


@PROPERTY
@given(st.integers(20, 60), st.integers(0, 4), st.integers(0, 999), st.sampled_from(TRACES[3:]))
def test_low_rank_is_found_exactly(n, rank, seed, how):
    left, right = normal(n, rank, seed=seed), normal(rank, n, seed=seed + 1)
    A = Opaque(left @ right)
    t = trace(A, 18, method=how[0], probes=how[1], generator=seeded(seed))
    scale = float(left.norm() * right.norm())
    assert abs(float(t.value - A.matrix.trace())) <= 1e-11 * scale
    assert float(t.error) <= 1e-11 * scale
    d = diagonal(A, 18, generator=seeded(seed))
    assert float((d.value - A.matrix.diagonal()).abs().max()) <= 1e-11 * scale
    assert float(d.error.max()) <= 1e-11 * scale


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_spends_and_reports_the_products(method):
    A = Opaque(normal(60, 60))
    assert trace(A, 20, method=method).products == A.count[0] == 20


@pytest.mark.parametrize("method", DIAGONALS)
def test_diagonal_spends_and_reports_the_products(method):
    A = symmetric(with_spectrum(normal(60)))
    assert diagonal(A, 21, method=method).products == A.count[0] == 21 - (method == "xdiag")


@PROPERTY
@given(st.integers(3, 12), st.integers(2, 6), st.integers(0, 999))
def test_leave_one_out_projects_on_the_others(n, m, seed):
    m = min(m, n)
    Y = normal(n, m, seed=seed) * torch.logspace(0, -8, m, dtype=F64)  # lengths do not matter
    Q, S = leave_one_out(Y)
    for i in range(m):
        others = torch.linalg.qr(Y[:, [j for j in range(m) if j != i]]).Q
        projector = Q @ (torch.eye(m, dtype=F64) - torch.outer(S[:, i], S[:, i])) @ Q.T
        torch.testing.assert_close(projector, others @ others.T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("probes", ["rademacher", "sphere"])
def test_xtrace_is_the_mean_of_its_definition(probes):
    # Each basis made anew from the other vectors: the quadratic-cost definition of the paper.
    n, m = 30, 6
    A = Opaque(normal(n, n))
    V = random_vectors(A, m, probes, seeded(3))
    samples = []
    for i in range(m):
        others = [j for j in range(m) if j != i]
        Q = torch.linalg.qr(A.matrix @ V[:, others]).Q
        u = V[:, i] - Q @ (Q.T @ V[:, i])
        if probes == "sphere":
            u = math.sqrt(n - m + 1) * u / u.norm()
        samples.append((Q.T @ A.matrix @ Q).trace() + u @ A.matrix @ u)
    expected = torch.stack(samples)
    t = trace(A, 2 * m, method="xtrace", probes=probes, generator=seeded(3))
    torch.testing.assert_close(t.value, expected.mean(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(t.error, expected.std() / math.sqrt(m), rtol=1e-10, atol=1e-10)


def test_xdiag_is_the_mean_of_its_definition():
    n, m = 30, 6
    A = Opaque(normal(n, n))
    V = random_vectors(A, m, "rademacher", seeded(3))
    samples = []
    for i in range(m):
        Q = torch.linalg.qr(A.matrix @ V[:, [j for j in range(m) if j != i]]).Q
        P = Q @ Q.T
        rest = A.matrix @ V[:, i] - P @ (A.matrix @ V[:, i])
        samples.append((P @ A.matrix).diagonal() + V[:, i] * rest)
    expected = torch.stack(samples)
    d = diagonal(A, 2 * m, method="xdiag", generator=seeded(3))
    torch.testing.assert_close(d.value, expected.mean(0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(d.error, expected.std(0) / math.sqrt(m), rtol=1e-9, atol=1e-9)


def spectra(n: int) -> dict[str, torch.Tensor]:
    k = torch.arange(1, n + 1, dtype=F64)
    return {"flat": 3 - 2 * (k - 1) / n, "algebraic": k**-2, "exponential": 0.7**k}


@pytest.mark.parametrize("spectrum", ["flat", "algebraic", "exponential"])
@pytest.mark.parametrize(("method", "probes"), TRACES)
def test_errors_are_calibrated_and_estimates_unbiased(method, probes, spectrum):
    matrix = with_spectrum(spectra(80)[spectrum])
    A, generator = symmetric(matrix), seeded(5)
    runs = [trace(A, 36, method=method, probes=probes, generator=generator) for _ in range(200)]
    deviation = torch.stack([run.value for run in runs]) - matrix.trace()
    error = torch.stack([run.error for run in runs])
    within = float((deviation.abs() <= 3 * error).double().mean())
    # Where each sample serves all the others, their spread does not show what they have in common.
    low, least = (0.6, 0.9) if method == "xtrace" else (0.85, 0.94)
    assert within >= least
    spread = float(deviation.square().mean().sqrt())
    assert low <= float(error.square().mean().sqrt()) / spread <= 1.2
    assert abs(float(deviation.mean())) <= 4 * spread / math.sqrt(len(runs))


@pytest.mark.parametrize("method", DIAGONALS)
@pytest.mark.parametrize("spectrum", ["flat", "algebraic"])
def test_errors_of_a_diagonal_are_calibrated(method, spectrum):
    matrix = with_spectrum(spectra(60)[spectrum])
    A, generator = symmetric(matrix), seeded(6)
    runs = [diagonal(A, 32, method=method, generator=generator) for _ in range(200)]
    deviation = torch.stack([run.value for run in runs]) - matrix.diagonal()
    error = torch.stack([run.error for run in runs])
    low, least = (0.6, 0.92) if method == "xdiag" else (0.9, 0.98)
    assert float((deviation.abs() <= 3 * error).double().mean()) >= least
    spread = deviation.square().mean().sqrt()
    assert low <= float(error.square().mean().sqrt() / spread) <= 1.1
    each = deviation.square().mean(0).sqrt() / math.sqrt(len(runs))
    assert bool((deviation.mean(0).abs() <= 5 * each).all())


def root_mean_square(matrix: torch.Tensor, method: str, products: int, runs: int = 40) -> float:
    generator, exact = seeded(7), matrix.trace()
    errors = [
        trace(symmetric(matrix), products, method=method, generator=generator).value - exact
        for _ in range(runs)
    ]
    return float(torch.stack(errors).square().mean().sqrt())


def test_rates_of_decay():
    # Four times the products: Hutchinson halves its error on any spectrum; the others divide
    # it by more than four on k^-2, and follow an exponential decay.
    algebraic, exponential = (with_spectrum(spectra(200)[s]) for s in ("algebraic", "exponential"))
    hutchinson = [root_mean_square(algebraic, "hutchinson", s) for s in (24, 96)]
    assert 1.4 <= hutchinson[0] / hutchinson[1] <= 2.9
    for method in ("hutch++", "xtrace"):
        better = [root_mean_square(algebraic, method, s) for s in (24, 96)]
        assert better[0] / better[1] >= 4
        assert better[1] <= hutchinson[1] / 10
        sharp = [root_mean_square(exponential, method, s) for s in (24, 72)]
        assert sharp[0] / sharp[1] >= 100
    # XTrace gets more out of each product than Hutch++: that is its point.
    assert root_mean_square(algebraic, "xtrace", 60) < root_mean_square(algebraic, "hutch++", 60)


def test_two_runs_agree_and_seeds_differ():
    A = Opaque(normal(80, 80))
    for estimate in (trace, diagonal):
        assert torch.equal(estimate(A, 20).value, estimate(A, 20).value)
        again = [estimate(A, 20, generator=seeded(9)).value for _ in range(2)]
        assert torch.equal(*again)
        assert not torch.equal(again[0], estimate(A, 20).value)


def test_global_random_numbers_stay_untouched():
    state = torch.get_rng_state()
    trace(Opaque(normal(80, 80)), 20)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("probes", ["rademacher", "sphere", "gaussian"])
def test_random_vectors_are_isotropic(probes):
    V = random_vectors(Opaque(normal(4, 4)), 40000, probes, seeded(0))
    torch.testing.assert_close(V @ V.T / 40000, torch.eye(4, dtype=F64), rtol=0, atol=0.03)
    if probes != "gaussian":
        torch.testing.assert_close(V.norm(dim=0), torch.full((40000,), 2.0, dtype=F64))


@pytest.mark.parametrize("estimate", [trace, diagonal])
def test_float32_stays_float32(estimate):
    A = Opaque(normal(50, 50, dtype=torch.float32))
    for method in ("hutchinson", "exact", None):
        result = estimate(A, 20, method=method)
        assert result.value.dtype == result.error.dtype == torch.float32


def test_nested_parameters():
    space = Space.of({"w": torch.zeros(10, 6, dtype=F64), "b": torch.zeros(5, dtype=F64)})
    A = Opaque(with_spectrum(spectra(65)["exponential"]), space=space)
    d = diagonal(A, 40)
    torch.testing.assert_close(d.value, A.matrix.diagonal(), rtol=0, atol=1e-2)
    assert space.unravel(d.value)["w"].shape == (10, 6)


# --- a tolerance -------------------------------------------------------------------------------


@pytest.mark.parametrize("estimate", [trace, diagonal])
def test_rtol_is_met_or_the_answer_exact(estimate):
    matrix = with_spectrum(spectra(200)["algebraic"])
    exact = {trace: matrix.trace(), diagonal: matrix.diagonal()}[estimate]
    for rtol, products in ((0.02, 8), (1e-13, 50)):
        A = symmetric(matrix)
        result = estimate(A, products, rtol=rtol)
        assert result.products == A.count[0]
        assert float(result.error.norm()) <= rtol * float(exact.norm())
        assert float((result.value - exact).norm()) <= 4 * rtol * float(exact.norm())
        assert result.exact == (rtol == 1e-13)


def test_rtol_that_is_not_met_is_told():
    A = symmetric(with_spectrum(spectra(200)["flat"]))
    with pytest.warns(RuntimeWarning, match=r"rtol=1e-12 in 30 products; max_products=50"):
        result = trace(A, 10, method="hutchinson", rtol=1e-12, max_products=50)
    assert not result.exact
    assert result.products == A.count[0] == 30  # 10 and 20; 40 more would be too many
    assert float(result.error) > 0


# --- derivatives -------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "probes"), TRACES)
def test_gradient_of_a_trace_is_unbiased(method, probes):
    n = 24
    matrix, direction = with_spectrum(spectra(n)["algebraic"]), normal(n, n, seed=2)
    generator, slopes = seeded(0), []
    for _ in range(400):
        leaf = matrix.clone().requires_grad_()
        result = trace(Opaque(leaf), 12, method=method, probes=probes, generator=generator)
        (gradient,) = torch.autograd.grad(result.value, leaf)
        slopes.append((gradient * direction).sum())
    samples = torch.stack(slopes)
    standard = float(samples.std()) / math.sqrt(len(samples))
    assert abs(float(samples.mean() - direction.trace())) <= 4 * standard
    assert standard < 1


FRAME = normal(30, 2)


def low_rank_family(theta: torch.Tensor) -> torch.Tensor:
    return FRAME @ torch.diag(theta**3) @ FRAME.T


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_derivatives_are_exact_where_the_estimate_is(method):
    # The range does not move with theta, so that the estimate is exact for dA and d^2 A too.
    theta = torch.tensor([0.7, 1.3], dtype=F64)

    def value(theta: torch.Tensor) -> torch.Tensor:
        return trace(Opaque(low_rank_family(theta)), 12, method=method).value

    def exact(theta: torch.Tensor) -> torch.Tensor:
        return low_rank_family(theta).trace()

    for derivative in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        torch.testing.assert_close(derivative(value)(theta), derivative(exact)(theta))


def test_derivatives_of_a_diagonal():
    theta = torch.tensor([0.7, 1.3], dtype=F64)

    def value(theta: torch.Tensor) -> torch.Tensor:
        return diagonal(Opaque(low_rank_family(theta)), 12).value

    def exact(theta: torch.Tensor) -> torch.Tensor:
        return low_rank_family(theta).diagonal()

    for derivative in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(derivative(value)(theta), derivative(exact)(theta))


@pytest.mark.parametrize("estimate", [trace, diagonal])
@pytest.mark.parametrize("method", ["exact", "hutchinson"])
def test_derivative_is_that_of_the_estimate(estimate, method):
    def value(matrix: torch.Tensor) -> torch.Tensor:
        return estimate(Opaque(matrix), 4, method=method).value.sin().sum()

    matrix = normal(6, 6).requires_grad_()
    assert torch.autograd.gradcheck(value, matrix)


def test_vmap_over_operators():
    matrices = normal(3, 40, 40)
    batch = torch.func.vmap(lambda M: trace(Opaque(M), 12).value)(matrices)
    one_by_one = torch.stack([trace(Opaque(M), 12).value for M in matrices])
    torch.testing.assert_close(batch, one_by_one)
    with pytest.raises(ValueError, match="rtol reads the estimates"):
        torch.func.vmap(lambda M: trace(Opaque(M), 12, rtol=0.1).value)(matrices)


# --- what it refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize("estimate", [trace, diagonal])
@pytest.mark.parametrize(
    ("A", "arguments", "error", "message"),
    [
        (normal(3, 3), {}, TypeError, "A is a Tensor; expected a LinearOperator"),
        (Opaque(normal(3, 4)), {}, ValueError, r"Opaque\(3, 4\) is not square"),
        (Opaque(normal(9, 9)), {"method": "hutch"}, ValueError, "method='hutch'; expected one of"),
        (Opaque(normal(9, 9)), {"products": 0}, ValueError, "products=0; expected at least 1"),
        (Opaque(normal(9, 9)), {"products": 2.0}, TypeError, "products is a float"),
        (Opaque(normal(9, 9)), {"products": True}, TypeError, "products is a bool"),
        (Opaque(normal(9, 9)), {"products": 3}, ValueError, "products=3; expected at least 4"),
        (
            Opaque(normal(9, 9)),
            {"products": 1, "method": "hutchinson"},
            ValueError,
            "products=1; expected at least 2",
        ),
        (Opaque(normal(9, 9)), {"rtol": 0.0}, ValueError, "rtol=0.0; expected a number > 0"),
        (Opaque(normal(9, 9)), {"rtol": math.nan}, ValueError, "rtol=nan"),
        (Opaque(normal(9, 9)), {"max_products": 5}, ValueError, "max_products=5 limits"),
        (Opaque(normal(9, 9) * math.nan), {"products": 4}, ValueError, "is not finite"),
        (Opaque(normal(9, 9) * math.nan), {"method": "exact"}, ValueError, "is not finite"),
        (
            Opaque(normal(9, 9) * math.nan),
            {"products": 4, "method": "hutchinson"},
            ValueError,
            "is not finite",
        ),
    ],
)
def test_refuses(estimate, A, arguments, error, message):
    with pytest.raises(error, match=message):
        estimate(A, **arguments)


def test_refuses_for_one_of_them():
    A = Opaque(normal(9, 9))
    with pytest.raises(ValueError, match="probes='uniform'; expected one of"):
        trace(A, 4, probes="uniform")
    with pytest.raises(ValueError, match="products=5; expected at least 6"):
        trace(A, 5, method="hutch++")
    for call in (lambda: trace(A, 18, method="xtrace"), lambda: diagonal(A, 18, method="xdiag")):
        with pytest.raises(ValueError, match="method='exact' costs 9 products"):
            call()

    class OneWay(Opaque):
        _rmatvec = ops.LinearOperator._rmatvec

    with pytest.raises(TypeError, match="does not define its transposed product"):
        diagonal(OneWay(normal(9, 9)), 4)


def test_a_false_claim_is_found_before_the_estimate():
    A = ops.FunctionOperator(lambda v: v.roll(1), torch.zeros(90), symmetric=True)
    with pytest.raises(ops.FalseClaimError):
        trace(A, 10)
