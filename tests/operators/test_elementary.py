"""`Dense`, `Diagonal`, `Identity`: what they look up, what they check, what they let through."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import operators as ops
from operators import Space

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)


def sampled(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestDiagonal:
    @pytest.mark.parametrize(
        ("values", "definite", "semidefinite"),
        [
            ([1.0, 2.0], True, True),
            ([1.0, 0.0], False, True),
            ([1.0, -1e-300], False, False),
            ([1.0, float("nan")], False, False),
        ],
    )
    def test_definiteness_is_looked_up(self, values, definite, semidefinite):
        A = ops.Diagonal(torch.tensor(values, dtype=torch.float64))
        assert A.diagonal
        assert A.symmetric
        assert A.positive_definite == definite
        assert A.positive_semidefinite == semidefinite

    def test_a_claim_replaces_the_look_up_and_so_passes_through_vmap(self):
        def apply(values, v):
            return ops.Diagonal(values, positive_definite=True) @ v

        values, v = sampled(3, 4).exp(), sampled(3, 4, seed=1)
        assert torch.equal(torch.func.vmap(apply)(values, v), values * v)

    def test_structured_sum_and_multiple_are_diagonals(self):
        a, b = sampled(4), sampled(4, seed=1)
        total = ops.Diagonal(a) + 2.0 * ops.Diagonal(b)
        assert isinstance(total, ops.Diagonal)
        assert torch.equal(total.values, a + 2.0 * b)

    def test_scalar_on_a_space(self):
        space = Space.of({"a": torch.zeros(2, 2), "b": torch.zeros(1)})
        A = ops.Diagonal(torch.tensor(3.0), space)
        assert torch.equal(A.to_dense(), 3.0 * torch.eye(5))
        result = A @ {"a": torch.ones(2, 2), "b": torch.ones(1)}
        assert torch.equal(result["a"], 3.0 * torch.ones(2, 2))

    @pytest.mark.parametrize(
        ("values", "space", "error", "message"),
        [
            (torch.ones(2, 2), None, ValueError, r"shape \(2, 2\); expected \(n,\), or a scalar"),
            (torch.tensor(1.0), None, ValueError, r"shape \(\); expected \(n,\)"),
            (torch.ones(2), 3, ValueError, r"shape \(2,\); expected \(\) or \(3,\)"),
            (torch.ones(3).double(), 3, TypeError, r"float64, but the space has torch.float32"),
        ],
    )
    def test_values_that_do_not_fit(self, values, space, error, message):
        space = space and Space.flat(space, torch.float32)
        with pytest.raises(error, match=message):
            ops.Diagonal(values, space)

    def test_gradient_with_respect_to_the_values(self):
        values, v = sampled(4), sampled(4, seed=1)
        gradient = torch.func.grad(lambda d: (ops.Diagonal(d) @ v).square().sum())(values)
        torch.testing.assert_close(gradient, 2 * values * v**2)


class TestIdentity:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_the_identity(self, dtype):
        A = ops.Identity(3, dtype)
        v = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
        assert torch.equal(A @ v, v)
        assert torch.equal(A.to_dense(), torch.eye(3, dtype=dtype))
        assert A.positive_definite
        assert A.diagonal
        assert A.T is A

    def test_default_dtype_is_that_of_torch(self):
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float64)
            assert ops.Identity(2).dtype == torch.float64
        finally:
            torch.set_default_dtype(before)

    def test_of_size_zero(self):
        A = ops.Identity(0)
        assert A.shape == (0, 0)
        assert (A @ torch.zeros(0)).shape == (0,)
        assert A.to_dense().shape == (0, 0)


class TestDense:
    def test_to_dense_copies_nothing(self):
        matrix = sampled(3, 2)
        assert ops.Dense(matrix).to_dense() is matrix

    def test_not_a_matrix(self):
        with pytest.raises(ValueError, match=r"matrix has shape \(3,\); expected \(m, n\)"):
            ops.Dense(torch.zeros(3))

    @PROPERTY
    @given(st.integers(1, 5), st.integers(0, 99), st.floats(-200, 200))
    def test_symmetry_is_checked_relative_to_the_largest_entry(self, n, seed, exponent):
        scale = 10.0**exponent
        root = sampled(n + 1, n + 1, seed=seed)
        matrix = scale * (root + root.T)
        assert ops.Dense(matrix, symmetric=True).symmetric
        size = float(matrix.abs().max())
        rounded = matrix.clone()
        rounded[0, 1] += 10 * torch.finfo(torch.float64).eps * size
        assert ops.Dense(rounded, positive_definite=True).symmetric
        wrong = matrix.clone()
        wrong[0, 1] += 1e-10 * size
        with pytest.raises(ValueError, match=r"claimed symmetric, but max \|A - A\^T\| ="):
            ops.Dense(wrong, symmetric=True)

    def test_nothing_is_claimed_by_default(self):
        A = ops.Dense(torch.eye(2))
        assert A.structure == ops.Structure()

    def test_empty(self):
        assert ops.Dense(torch.zeros(0, 0), positive_definite=True).positive_definite
        assert (ops.Dense(torch.zeros(2, 0)) @ torch.zeros(0)).tolist() == [0.0, 0.0]

    def test_gradient_with_respect_to_the_matrix(self):
        matrix, u, v = sampled(3, 4), sampled(3, seed=1), sampled(4, seed=2)
        gradient = torch.func.grad(lambda m: u @ (ops.Dense(m) @ v))(matrix)
        torch.testing.assert_close(gradient, torch.outer(u, v))
        gradient = torch.func.grad(lambda m: v @ (ops.Dense(m).T @ u))(matrix)
        torch.testing.assert_close(gradient, torch.outer(u, v))


@pytest.mark.parametrize("build", [lambda A, i: A + 0.1 * i, lambda A, i: 0.1 * i + A])
def test_identity_of_a_size_alone_takes_the_other_terms_space(build):
    matrix = torch.diag(torch.arange(1.0, 4.0, dtype=torch.float64))
    total = build(ops.Dense(matrix, positive_definite=True), ops.Identity(3))
    assert total.dtype == torch.float64
    assert total.positive_definite
    # 0.1 in float64, not the float32 number nearest to it.
    assert torch.equal(total.to_dense(), matrix + 0.1 * torch.eye(3, dtype=torch.float64))
    with pytest.raises(TypeError, match="cannot add"):
        build(ops.Dense(matrix), ops.Identity(3, torch.float32))  # here the dtype was said
    with pytest.raises(ValueError, match="shapes differ"):
        build(ops.Dense(matrix), ops.Identity(4))
