"""Estimates of spectra against the spectra of the matrices, and the step that contracts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from solvers.members import Members
from solvers.stationary.spectrum import safe_step, spectrum

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
FLOAT64 = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def spd(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    basis, _ = torch.linalg.qr(sampled(len(eigenvalues), len(eigenvalues), seed=seed))
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


SPECTRA = {
    "laplacian": 4 * torch.sin(torch.arange(1, 401, dtype=FLOAT64) * math.pi / 802) ** 2,
    "uniform": torch.linspace(0.01, 1, 400, dtype=FLOAT64),
    "fast decay": torch.logspace(0, -8, 400, dtype=FLOAT64),
    "clusters": torch.cat([torch.full((200,), 0.1), torch.linspace(0.99, 1, 200)]).double(),
    "outlier": torch.cat([torch.linspace(0.01, 1, 399), torch.tensor([3.0])]).double(),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("steps", [10, 20])
def test_ten_steps_bound_the_largest_eigenvalue_from_above_and_tightly(name, steps):
    values = SPECTRA[name]
    for seed in range(5):
        found = spectrum(ops.Diagonal(values), steps, seed=seed)
        # The power method of as many products misses 10 % of the first two at times.
        assert values.max() <= float(found.largest) <= 1.06 * values.max()
        assert float(found.smallest) >= values.min() * (1 - 1e-10)
        assert found.definite


def test_the_power_method_is_far_behind():
    values = SPECTRA["uniform"]
    v, steps = sampled(400), 10
    for _ in range(steps):
        v = values * (v / v.norm())
    assert float(v.norm()) < 0.97
    without_margin = float(spectrum(ops.Diagonal(values), steps).largest) / 1.01
    assert without_margin == pytest.approx(1, abs=0.01)


@PROPERTY
@given(n=st.integers(1, 9), seed=st.integers(0, 99))
def test_n_steps_find_the_ends_exactly(n, seed):
    values = torch.exp(sampled(n, seed=seed))
    found = spectrum(ops.Dense(spd(values, seed), symmetric=True), steps=20)
    assert float(found.largest) == pytest.approx(float(values.max()), rel=1e-10)
    assert float(found.smallest) == pytest.approx(float(values.min()), rel=1e-8)
    assert float(found.slack) <= 1e-8 * float(values.max())


@pytest.mark.parametrize("steps", [5, 30])
def test_a_preconditioned_operator_has_the_spectrum_of_the_product(steps):
    """P A is not symmetric, but it is in the inner product <u, A v>."""
    A, P = spd(torch.logspace(0, 3, 30, dtype=FLOAT64)), spd(torch.linspace(1, 5, 30).double(), 1)
    found = spectrum(
        ops.Dense(A, positive_definite=True), steps, ops.Dense(P, positive_definite=True)
    )
    true = torch.linalg.eigvals(P @ A).real
    assert true.max() * (1 - 1e-9) <= float(found.largest) <= 1.1 * true.max()
    assert float(found.smallest) >= true.min() * (1 - 1e-6)
    if steps == 30:
        assert float(found.smallest) == pytest.approx(float(true.min()), rel=1e-5)


def test_the_exact_inverse_gives_one_everywhere():
    matrix = spd(torch.logspace(0, 4, 20, dtype=FLOAT64))
    P = ops.Dense(torch.linalg.inv(matrix), positive_definite=True)
    found = spectrum(ops.Dense(matrix, positive_definite=True), 10, P)
    assert float(found.largest) == pytest.approx(1, abs=1e-7)
    assert float(found.smallest) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("P", [None, ops.Identity(3, FLOAT64)])
def test_indefinite_operators_are_seen_to_be_that(P):
    A = ops.Diagonal(torch.tensor([1.0, -2.0, 0.5], dtype=FLOAT64))
    found = spectrum(A, 10, P, seed=2)  # of this seed <v, A v> < 0 for the first v
    assert not found.definite
    if P is None:
        assert float(found.smallest) == pytest.approx(-2)


def test_members_are_estimated_one_by_one():
    ends = (1.0, 7.0, 100.0)
    parts = [ops.Dense(spd(torch.linspace(1, c, 12).double(), i)) for i, c in enumerate(ends)]
    stack = ops.Stacked([ops.Dense(A.matrix, symmetric=True) for A in parts])
    found = spectrum(Members(stack), 12)
    torch.testing.assert_close(found.largest, torch.tensor(ends).double(), rtol=1e-8, atol=0)
    torch.testing.assert_close(found.smallest, torch.ones(3).double(), rtol=1e-6, atol=0)
    steps, _ = safe_step(Members(ops.Stacked(parts)), 12)
    torch.testing.assert_close(steps, 0.9 / torch.tensor(ends).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_whatever_the_units(dtype, scale):
    A = ops.Diagonal(scale * torch.linspace(1, 5, 40, dtype=dtype))
    found, (step, _) = spectrum(A, 10), safe_step(A, 10)
    assert float(found.largest) == pytest.approx(5 * scale, rel=0.03)
    assert float(step) == pytest.approx(0.18 / scale, rel=0.03)


class TestSafeStep:
    @PROPERTY
    @given(n=st.integers(2, 30), size=st.floats(0.1, 0.9), seed=st.integers(0, 999))
    def test_contracts_where_the_field_of_values_is_on_the_right(self, n, size, seed):
        noise = sampled(n, n, seed=seed)
        matrix = torch.eye(n, dtype=FLOAT64) + size * noise / torch.linalg.matrix_norm(noise, 2)
        step, real = safe_step(ops.Dense(matrix), 10)
        assert float(real) > 0
        # More than half as fast as the best step for the worst vector.
        contraction = torch.eye(n, dtype=FLOAT64) - float(step) * matrix
        assert torch.linalg.matrix_norm(contraction, 2) < 1

    @pytest.mark.parametrize("angle", [0.5, 5.0, 50.0])
    def test_of_a_normal_matrix_is_real_part_over_square(self, angle):
        """For z = 1 + 5i, 1 / |z| is beyond the limit 2 Re z / |z|^2."""
        matrix = torch.tensor([[1.0, -angle], [angle, 1.0]], dtype=FLOAT64)
        step, _ = safe_step(ops.Dense(matrix), 10)
        assert float(step) == pytest.approx(0.9 / (1 + angle**2), rel=1e-9)
        radius = torch.linalg.eigvals(torch.eye(2, dtype=FLOAT64) - float(step) * matrix).abs()
        assert radius.max() < 1

    def test_where_the_field_of_values_straddles_zero_the_eigenvalues_decide(self):
        matrix = torch.tensor([[1.0, 10.0], [0.0, 1.0]], dtype=FLOAT64)
        step, real = safe_step(ops.Dense(matrix), 10)
        contraction = torch.eye(2, dtype=FLOAT64) - float(step) * matrix
        assert float(real) == pytest.approx(1, abs=1e-6)
        assert torch.linalg.matrix_norm(contraction, 2) > 1
        assert torch.linalg.eigvals(contraction).abs().max() < 0.2

    def test_says_where_there_is_none(self):
        matrix = torch.tensor([[1.0, 3.0], [3.0, 1.0]], dtype=FLOAT64)  # eigenvalues 4 and -2
        step, real = safe_step(ops.Dense(matrix), 10)
        assert float(real) == pytest.approx(-2)
        assert float(step) == pytest.approx(0.9 / 4)

    def test_symmetric_operators_get_the_inverse_of_the_largest_eigenvalue(self):
        values = SPECTRA["uniform"]
        step, _ = safe_step(ops.Diagonal(values), 10)
        assert 0.9 <= float(step) <= 0.93


def test_zero_operators_and_none_at_all():
    assert float(spectrum(ops.Dense(torch.zeros(2, 2), symmetric=True), 3).largest) == 0.0
    step, real = safe_step(ops.Dense(torch.zeros(2, 2)), 3)
    assert torch.isfinite(step).all()
    assert float(real) == 0.0
    assert torch.isfinite(safe_step(ops.Dense(torch.zeros(0, 0)), 3)[0]).all()
    assert spectrum(ops.Dense(torch.zeros(0, 0), symmetric=True), 3).definite


def test_products_that_are_not_finite_are_refused():
    A = ops.Dense(torch.tensor([[1.0, math.nan], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"products with .* are not finite"):
        safe_step(A, 3)


def test_is_reproducible():
    A = ops.Diagonal(SPECTRA["laplacian"])
    assert torch.equal(spectrum(A, 5).largest, spectrum(A, 5).largest)
    assert not torch.equal(spectrum(A, 5).largest, spectrum(A, 5, seed=1).largest)
