"""`lanczos`, and `trace_function` and `logdet` by its quadrature, against dense eigenvalues."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import operators as ops
from operators import Structure
from operators.randomized.krylov import lanczos
from operators.randomized.monte_carlo import random_vectors
from operators.randomized.spectral_traces import logdet, trace_function
from tests.operators.opaque import Opaque, symmetric, with_spectrum

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
F64 = torch.float64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def definite(n: int, condition: float = 100.0, seed: int = 0) -> torch.Tensor:
    return with_spectrum(torch.logspace(0, math.log10(condition), n, dtype=F64), seed)


def of_matrix(matrix: torch.Tensor, f) -> torch.Tensor:
    return f(torch.linalg.eigvalsh(matrix)).sum()


# --- the process -------------------------------------------------------------------------------


@PROPERTY
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 14), st.integers(0, 999))
def test_decomposition_and_orthogonality(n, p, steps, seed):
    A = symmetric(with_spectrum(normal(n, seed=seed) * 10.0 ** (seed % 7 - 3)))
    z = normal(n, p, seed=seed + 1)
    T = lanczos(A, z, steps)
    k, scale = min(steps, n), float(A.matrix.norm())
    tolerance = 1e-12 * scale
    assert T.diagonal.shape == (p, k)
    assert T.off_diagonal.shape == (p, k - 1)
    assert T.basis.shape == (p, k, n)
    torch.testing.assert_close(T.norms, z.norm(dim=0))
    for i in range(p):
        Q = T.basis[i].T
        assert T.steps[i] == k
        torch.testing.assert_close(Q.T @ Q, torch.eye(k, dtype=F64), rtol=0, atol=1e-12)
        torch.testing.assert_close(Q[:, 0] * T.norms[i], z[:, i])
        rest = A.matrix @ Q - Q @ T.to_dense()[i]
        assert float(rest[:, : k - 1].abs().sum()) <= tolerance  # no rest but in the last column
        assert abs(float(rest[:, -1].norm() - T.remainder[i])) <= tolerance
        assert float((Q.T @ rest).norm()) <= tolerance


@PROPERTY
@given(st.integers(1, 5), st.integers(0, 999))
def test_invariant_space_ends_each_column_by_itself(distinct, seed):
    # Column i is a combination of i + 1 eigenvectors: its Krylov space has dimension i + 1.
    n = 9
    values = torch.arange(1, n + 1, dtype=F64)
    A = ops.Diagonal(values)
    z = torch.zeros(n, distinct, dtype=F64)
    for i in range(distinct):
        chosen = torch.randperm(n, generator=seeded(seed + i))[: i + 1]
        z[chosen, i] = 1 + torch.rand(i + 1, generator=seeded(seed), dtype=F64)
    T = lanczos(A, z, n)
    assert T.steps.tolist() == list(range(1, distinct + 1))
    assert not T.remainder.any()
    for i in range(distinct):
        found = torch.linalg.eigvalsh(T.to_dense()[i, : i + 1, : i + 1])
        torch.testing.assert_close(found, values[z[:, i] != 0], rtol=1e-10, atol=1e-10)
        assert not T.basis[i, i + 1 :].any()
        # The padding does not touch the quadrature.
        nodes, vectors = torch.linalg.eigh(T.to_dense()[i])
        rule = T.norms[i] ** 2 * (vectors[0].square() * nodes.log()).sum()
        torch.testing.assert_close(rule, (z[:, i].square() * values.log()).sum())


def test_orthogonal_where_the_bare_recurrence_is_not():
    # A dominant eigenvalue converges at once; without reorthogonalisation copies of it appear.
    values = torch.cat([torch.linspace(0, 1, 199, dtype=F64), torch.tensor([1e4], dtype=F64)])
    A = ops.Diagonal(values)
    z = torch.ones(200, 1, dtype=F64)
    T = lanczos(A, z, 40)
    torch.testing.assert_close(
        T.basis[0] @ T.basis[0].T, torch.eye(40, dtype=F64), rtol=0, atol=1e-13
    )
    assert int((torch.linalg.eigvalsh(T.to_dense()[0]) > 10).sum()) == 1
    bare = [torch.zeros(200, dtype=F64), z[:, 0] / z.norm()]
    beta = torch.zeros((), dtype=F64)
    for _ in range(39):
        w = values * bare[-1] - beta * bare[-2]
        w = w - (w @ bare[-1]) * bare[-1]
        beta = w.norm()
        bare.append(w / beta)
    Q = torch.stack(bare[1:])
    assert float((Q @ Q.T - torch.eye(40, dtype=F64)).abs().max()) > 0.5


def test_first_product_is_not_repeated():
    A = symmetric(definite(30))
    z = normal(30, 2)
    plain = lanczos(A, z, 7)
    assert A.count == [14]
    again = lanczos(A, z, 7, image=A.matrix @ z)
    assert A.count == [14 + 12]
    torch.testing.assert_close(plain.to_dense(), again.to_dense())


def test_a_zero_operator():
    T = lanczos(ops.Diagonal(torch.zeros(4)), torch.ones(4, 2), 3)
    assert T.steps.tolist() == [1, 1]
    assert not T.to_dense().any()


def test_lanczos_returns_constants():
    matrix = definite(6).requires_grad_()
    T = lanczos(symmetric(matrix), normal(6, 1).requires_grad_(), 3)
    assert not any(part.requires_grad for part in vars(T).values())
    _, tangent = torch.func.jvp(
        lambda M: lanczos(symmetric(M), normal(6, 1), 3).basis, (matrix,), (matrix,)
    )
    assert not tangent.any()


def test_lanczos_under_vmap():
    matrices = torch.stack([definite(12, seed=s) for s in range(3)])
    z = normal(12, 2)
    batch = torch.func.vmap(lambda M: lanczos(symmetric(M), z, 5).diagonal)(matrices)
    torch.testing.assert_close(
        batch, torch.stack([lanczos(symmetric(M), z, 5).diagonal for M in matrices])
    )


@pytest.mark.parametrize(
    ("A", "block", "steps", "image", "error", "message"),
    [
        (Opaque(normal(4, 4)), normal(4, 1), 2, None, ValueError, "not known to be symmetric"),
        (normal(4, 4), normal(4, 1), 2, None, TypeError, "A is a Tensor"),
        (symmetric(definite(4)), normal(4, 1), 0, None, ValueError, "steps=0"),
        (symmetric(definite(4)), normal(4), 2, None, ValueError, r"block has shape \(4,\)"),
        (symmetric(definite(4)), normal(5, 1), 2, None, ValueError, r"block has shape \(5, 1\)"),
        (symmetric(definite(4)), normal(4, 0), 2, None, ValueError, r"block has shape \(4, 0\)"),
        (symmetric(definite(4)), normal(4, 1).float(), 2, None, TypeError, "block is torch.float3"),
        (symmetric(definite(4)), normal(4, 1), 2, normal(4, 2), ValueError, "image has shape"),
        (symmetric(definite(4)), torch.zeros(4, 1, dtype=F64), 2, None, ValueError, "is zero"),
        (symmetric(definite(4)), normal(4, 1) * math.nan, 2, None, ValueError, "not finite"),
        (symmetric(definite(4) * math.nan), normal(4, 1), 2, None, ValueError, "not finite"),
        (symmetric(definite(4) * math.inf), normal(4, 1), 2, None, ValueError, "not finite"),
    ],
)
def test_lanczos_refuses(A, block, steps, image, error, message):
    with pytest.raises(error, match=message):
        lanczos(A, block, steps, image=image)


# --- exact answers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "A",
    [
        ops.Dense(normal(5, 5)),
        ops.Diagonal(normal(5)),
        3.0 * ops.Dense(normal(5, 5)),
        ops.Dense(normal(5, 5)) @ ops.Dense(normal(5, 5, seed=1)),
        ops.LowRankPlusDiagonal(normal(2, 5), 0.5, normal(2, seed=1)),
    ],
    ids=lambda A: type(A).__name__,
)
def test_logdet_of_a_structure(A):
    result = logdet(A)
    torch.testing.assert_close(result.value, torch.linalg.slogdet(A.to_dense()).logabsdet)
    assert (result.exact, result.method, result.products) == (True, "structure", 0)
    assert not result.error.any()


def test_logdet_of_any_matrix_by_n_products():
    A = Opaque(normal(9, 9))
    for method in ("exact", None):  # 9 products are fewer than 16 samples of 32 steps
        result = logdet(A, method=method)
        torch.testing.assert_close(result.value, torch.linalg.slogdet(A.matrix).logabsdet)
        assert (result.exact, result.method, result.products) == (True, "exact", 9)
    assert A.count == [18]


def test_trace_function_without_an_estimate():
    d = torch.tensor([1.0, 2.0, 4.0], dtype=F64)
    known = trace_function(ops.Diagonal(d), torch.log2)
    assert (float(known.value), known.method, known.products) == (3.0, "structure", 0)
    A = symmetric(with_spectrum(d))
    result = trace_function(A, torch.log2)
    torch.testing.assert_close(result.value, torch.tensor(3.0, dtype=F64))
    assert (result.method, result.products) == ("exact", A.count[0]) == ("exact", 3)


# --- the quadrature ----------------------------------------------------------------------------


@PROPERTY
@given(st.integers(4, 12), st.integers(3, 5), st.integers(0, 999))
def test_exact_for_polynomials(n, steps, seed):
    # z^T p(A) z of degree 2 k - 1 is integrated exactly by k steps; only the samples differ.
    A = symmetric(with_spectrum(normal(n, seed=seed)))
    degree = 2 * min(steps, n) - 1
    result = trace_function(
        A, lambda x: x**degree, 4, steps, method="slq", generator=seeded(seed), probes="gaussian"
    )
    Z = random_vectors(A, 4, "gaussian", seeded(seed))
    samples = (Z * (torch.linalg.matrix_power(A.matrix, degree) @ Z)).sum(0)
    scale = float(torch.linalg.eigvalsh(A.matrix).abs().max()) ** degree * float(Z.square().sum())
    assert abs(float(result.value - samples.mean())) <= 1e-11 * scale
    assert abs(float(result.error - result.bias - samples.std() / 2)) <= 1e-11 * scale


@PROPERTY
@given(st.integers(1, 3), st.integers(0, 999))
def test_breakdown_is_exact(distinct, seed):
    # A matrix of few distinct eigenvalues: fewer steps than asked for, and no error but sampling's.
    values = torch.tensor([1.0, 3.0, 7.0], dtype=F64)[:distinct].repeat_interleave(10)
    A = symmetric(with_spectrum(values, seed), definite=True)
    Z = random_vectors(A, 5, "rademacher", seeded(seed))
    dense = torch.linalg.eigh(A.matrix)
    log = (dense.eigenvectors * dense.eigenvalues.log()) @ dense.eigenvectors.T
    expected = (Z * (log @ Z)).sum(0).mean()
    result = logdet(A, 5, 6, method="slq", generator=seeded(seed))
    torch.testing.assert_close(result.value, expected, rtol=1e-11, atol=1e-11)
    assert result.bias is not None
    assert float(result.bias) <= 1e-11 * 30


def test_in_all_steps_only_sampling_is_left():
    A = symmetric(definite(8), definite=True)
    result = logdet(A, 4, 30, method="slq")
    assert float(result.bias) == 0
    assert result.products == A.count[0] == 4 * 8  # never more steps than n


@pytest.mark.parametrize("probes", ["rademacher", "sphere", "gaussian"])
def test_standard_error_is_calibrated(probes):
    matrix = definite(60)
    A, generator, exact = symmetric(matrix), seeded(1), of_matrix(matrix, torch.log)
    runs = [logdet(A, 8, 25, method="slq", probes=probes, generator=generator) for _ in range(200)]
    deviation = torch.stack([run.value for run in runs]) - exact
    error = torch.stack([run.error for run in runs])
    assert float((deviation.abs() <= 3 * error).double().mean()) >= 0.94
    spread = float(deviation.square().mean().sqrt())
    assert 0.85 <= float(error.square().mean().sqrt()) / spread <= 1.2
    assert abs(float(deviation.mean())) <= 4 * spread / math.sqrt(len(runs))


def poisson(m: int) -> torch.Tensor:
    second = 2 * torch.eye(m, dtype=F64)
    second = second - torch.diag(torch.ones(m - 1, dtype=F64), 1)
    second = second - torch.diag(torch.ones(m - 1, dtype=F64), -1)
    eye = torch.eye(m, dtype=F64)
    return torch.kron(second, eye) + torch.kron(eye, second)


@pytest.mark.parametrize("steps", [4, 6, 8, 12, 16])
@pytest.mark.parametrize(
    ("name", "f"), [("log", torch.log), ("inverse", torch.reciprocal), ("root", torch.sqrt)]
)
@pytest.mark.parametrize("matrix", [definite(100, 1e3), poisson(10)], ids=["log-spaced", "grid"])
def test_bias_is_that_of_the_quadrature(matrix, name, f, steps):
    # Against the same samples without quadrature: within a factor, on both sides.
    A = symmetric(matrix)
    result = trace_function(A, f, 10, steps, method="slq", generator=seeded(2))
    Z = random_vectors(A, 10, "rademacher", seeded(2))
    dense = torch.linalg.eigh(matrix)
    exact = ((dense.eigenvectors.T @ Z).square() * f(dense.eigenvalues)[:, None]).sum(0).mean()
    true = abs(float(result.value - exact))
    rounding = 1e-12 * abs(float(exact))
    assert true <= 2 * float(result.bias) + rounding
    assert float(result.bias) <= 5 * true + rounding


def test_blocks_of_vectors_change_nothing():
    A = symmetric(definite(60), definite=True)
    whole = logdet(A, 7, 10, method="slq")
    parts = logdet(A, 7, 10, method="slq", block=3)
    for name in ("value", "error", "bias"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-9, atol=1e-9)
    assert A.count == [140]


def test_rtol_spends_on_what_the_error_is_made_of():
    matrix = definite(600)
    exact = of_matrix(matrix, torch.log)
    # Hardly any steps: the quadrature is what has to improve.
    A = symmetric(matrix, definite=True)
    result = logdet(A, 8, 3, method="slq", rtol=0.02)
    assert not result.exact
    assert result.products == A.count[0]
    assert float(result.error) <= 0.02 * float(exact)
    assert abs(float(result.value - exact)) <= 3 * 0.02 * float(exact)
    # Plenty of steps: only samples can help, and more steps would end in the exact value.
    A = symmetric(definite(600, 5), definite=True)
    result = logdet(A, 4, 12, method="slq", rtol=0.009)
    assert not result.exact
    assert 48 < result.products == A.count[0]
    assert float(result.error) <= 0.009 * float(result.value)
    # Out of reach of samples: the exact value in the end.
    A = symmetric(matrix, definite=True)
    result = logdet(A, 8, 20, rtol=1e-10)
    assert result.exact
    assert result.products == A.count[0] == 160 + 320 + 600
    torch.testing.assert_close(result.value, exact)
    with pytest.warns(RuntimeWarning, match=r"slq reached .* max_products=300"):
        result = logdet(A, 8, 20, rtol=1e-10, max_products=300)
    assert not result.exact
    assert result.products == 160


def test_two_runs_agree():
    A = symmetric(definite(600), definite=True)
    assert torch.equal(logdet(A, 4, 5).value, logdet(A, 4, 5).value)
    assert not torch.equal(logdet(A, 4, 5).value, logdet(A, 4, 5, generator=seeded(1)).value)


def test_float32_stays_float32_and_is_as_good():
    matrix = definite(100, 1e4)
    A = symmetric(matrix.float(), definite=True)
    result = logdet(A, 4, 25, method="slq")
    wide = logdet(symmetric(matrix), 4, 25, method="slq")
    for value in (result.value, result.error, result.bias):
        assert value.dtype == torch.float32
    torch.testing.assert_close(result.value.double(), wide.value, rtol=1e-4, atol=0)


# --- derivatives -------------------------------------------------------------------------------


def family(theta: torch.Tensor) -> torch.Tensor:
    rotated = torch.diag(theta[0] * torch.linspace(1, 4, 20, dtype=F64)) + theta[1] * OFF
    return rotated + theta[2] ** 2 * torch.eye(20, dtype=F64)


OFF = with_spectrum(torch.linspace(0, 2, 20, dtype=F64))
THETA = torch.tensor([1.2, 0.5, 0.8], dtype=F64)


@pytest.mark.parametrize("f", [torch.log, torch.exp, torch.sqrt, lambda x: x**3])
def test_gradient_is_that_of_the_samples(f):
    # All steps: the estimate is the mean of z^T f(A) z; its gradient tr(f'(A) dA) for these z.
    def estimate(theta: torch.Tensor) -> torch.Tensor:
        return trace_function(
            symmetric(family(theta)), f, 6, 20, method="slq", generator=seeded(4)
        ).value

    dense = torch.linalg.eigh(family(THETA))
    slopes = torch.func.vmap(torch.func.grad(f))(dense.eigenvalues)
    derivative = (dense.eigenvectors * slopes) @ dense.eigenvectors.T
    Z = random_vectors(symmetric(family(THETA)), 6, "rademacher", seeded(4))
    directions = torch.func.jacfwd(family)(THETA)
    expected = torch.einsum("np,nm,mqt,qp->t", Z, derivative, directions, Z) / 6
    torch.testing.assert_close(torch.func.grad(estimate)(THETA), expected)
    torch.testing.assert_close(torch.func.jacfwd(estimate)(THETA), expected)
    leaf = THETA.clone().requires_grad_()
    estimate(leaf).backward()
    torch.testing.assert_close(leaf.grad, expected)


def test_gradient_of_logdet_is_unbiased_against_the_inverse():
    generator, slopes = seeded(0), []
    for _ in range(150):
        leaf = THETA.clone().requires_grad_()
        value = logdet(symmetric(family(leaf)), 4, 20, method="slq", generator=generator).value
        slopes.append(torch.autograd.grad(value, leaf)[0])
    samples = torch.stack(slopes)
    expected = torch.func.grad(lambda theta: torch.logdet(family(theta)))(THETA)
    standard = samples.std(0) / math.sqrt(len(samples))
    assert bool(((samples.mean(0) - expected).abs() <= 4 * standard).all())
    assert bool((standard <= 0.02 * expected.abs()).all())


def test_gradient_converges_with_the_steps():
    matrix = definite(200, 1e3)
    Z = random_vectors(symmetric(matrix), 4, "rademacher", seeded(0))
    expected = torch.linalg.solve(matrix, Z) @ Z.T / 4
    errors = []
    for steps in (10, 40, 120):
        leaf = matrix.clone().requires_grad_()
        logdet(symmetric(leaf), 4, steps, method="slq", generator=seeded(0)).value.backward()
        errors.append(float((leaf.grad - expected).norm() / expected.norm()))
    assert errors[1] <= errors[0] / 3
    assert errors[2] <= 1e-4


def test_gradient_by_what_f_depends_on():
    def by_shift(shift: torch.Tensor, method: str) -> torch.Tensor:
        A = symmetric(family(THETA))
        return trace_function(
            A, lambda x: (x + shift).log(), 200, 20, method=method, generator=seeded(0)
        ).value

    shift = torch.tensor(0.3, dtype=F64)
    exact = torch.func.grad(by_shift)(shift, "exact")
    torch.testing.assert_close(torch.func.grad(by_shift)(shift, "slq"), exact, rtol=0.02, atol=0)
    leaf = shift.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(by_shift(leaf, "exact"), leaf)[0], exact)
    (gradient,) = torch.autograd.grad(by_shift(leaf, "slq"), leaf)
    torch.testing.assert_close(gradient, exact, rtol=0.02, atol=0)


def test_second_derivatives_raise_unless_exact():
    def value(theta: torch.Tensor, method: str) -> torch.Tensor:
        return logdet(symmetric(family(theta)), 4, 20, method=method).value

    expected = torch.func.hessian(lambda theta: torch.logdet(family(theta)))(THETA)
    torch.testing.assert_close(torch.func.hessian(value)(THETA, "exact"), expected)
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        for inner in (torch.func.jacfwd, torch.func.jacrev):
            with pytest.raises(NotImplementedError, match="method='exact'"):
                outer(inner(value))(THETA, "slq")
    leaf = THETA.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf, "slq"), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


def test_mixed_derivatives_by_f_and_the_operator_raise():
    shift = torch.tensor(0.3, dtype=F64, requires_grad=True)
    theta = THETA.clone().requires_grad_()
    value = trace_function(
        symmetric(family(theta)), lambda x: (x + shift).log(), 4, 20, method="slq"
    ).value
    (gradient,) = torch.autograd.grad(value, theta, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(gradient.sum(), shift)


def test_vmap_over_operators():
    thetas = torch.stack([THETA, 2 * THETA, THETA + 0.3])

    def value(theta: torch.Tensor) -> torch.Tensor:
        return logdet(symmetric(family(theta)), 4, 10, method="slq").value

    torch.testing.assert_close(torch.func.vmap(value)(thetas), torch.stack([*map(value, thetas)]))
    each = torch.stack([torch.func.grad(value)(theta) for theta in thetas])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(value))(thetas), each)


def test_hessian_operator_of_a_model():
    # A Hessian's products are themselves derivatives; the log-determinant is differentiated by x.
    data = normal(40, 30)

    def loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softplus(data @ y).mean() + 0.5 * x.exp() * y @ y

    y, x = 0.1 * normal(30, seed=1), torch.tensor(-2.0, dtype=F64)

    def value(x: torch.Tensor) -> torch.Tensor:
        A = ops.Hessian(loss, y, x)
        return logdet(A, 200, 25, method="slq", generator=seeded(0)).value

    def exact(x: torch.Tensor) -> torch.Tensor:
        return torch.logdet(torch.func.hessian(loss)(y, x))

    torch.testing.assert_close(value(x), exact(x), rtol=0.01, atol=0)
    slope = torch.func.grad(exact)(x)
    torch.testing.assert_close(torch.func.grad(value)(x), slope, rtol=0.01, atol=0)


# --- what it refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize("smallest", [-1.0, 0.0, 2e-16])
def test_not_positive_definite(smallest):
    # A Ritz value at rounding level may come out with either sign; it is refused with both.
    spectrum = torch.tensor([smallest, 1.0, 2.0], dtype=F64).repeat_interleave(5)
    for seed in range(20):
        A = symmetric(with_spectrum(spectrum, seed))
        with pytest.raises(ValueError, match=r"Opaque\(15, 15\) is not positive definite: .* Ritz"):
            logdet(A, 2, 8, method="slq")


@pytest.mark.parametrize(
    ("A", "arguments", "error", "message"),
    [
        (normal(9, 9), {}, TypeError, "A is a Tensor"),
        (Opaque(normal(9, 8)), {}, ValueError, "is not square"),
        (Opaque(normal(90, 90)), {"samples": 4, "steps": 5}, ValueError, "known to be symmetric"),
        (Opaque(definite(9)), {"method": "lanczos"}, ValueError, "method='lanczos'; expected"),
        (symmetric(definite(9)), {"samples": 1}, ValueError, "samples=1; expected at least 2"),
        (symmetric(definite(9)), {"steps": 2}, ValueError, "steps=2; expected at least 3"),
        (symmetric(definite(9)), {"steps": 8.0}, TypeError, "steps is a float"),
        (symmetric(definite(9)), {"block": 0}, ValueError, "block=0; expected at least 1"),
        (symmetric(definite(9)), {"rtol": -1.0}, ValueError, "rtol=-1.0"),
        (symmetric(definite(9)), {"max_products": 9}, ValueError, "give rtol too"),
        (
            symmetric(definite(9)),
            {"probes": "unit", "method": "slq"},
            ValueError,
            "probes='unit'; expected",
        ),
        (symmetric(definite(9) * math.nan), {}, ValueError, "not finite"),
        (symmetric(definite(9) * math.nan), {"method": "slq"}, ValueError, "not finite"),
    ],
)
def test_logdet_refuses(A, arguments, error, message):
    with pytest.raises(error, match=message):
        logdet(A, **arguments)


def test_trace_function_refuses():
    A = symmetric(with_spectrum(torch.linspace(-1, 1, 9, dtype=F64)))
    for method in ("exact", "slq"):
        with pytest.raises(ValueError, match=r"f is not finite at -\d"):
            trace_function(A, torch.sqrt, method=method)
        with pytest.raises(ValueError, match=r"f of shape .* expected the same shape"):
            trace_function(A, torch.sum, method=method)
        with pytest.raises(ValueError, match="not known to be symmetric, which tr f"):
            trace_function(Opaque(A.matrix), torch.exp, method=method)


def test_a_false_claim_is_found_before_the_estimate():
    A = Opaque(normal(900, 900), Structure(symmetric=True))
    A._claims = ("symmetric",)
    with pytest.raises(ops.FalseClaimError):
        logdet(A)
