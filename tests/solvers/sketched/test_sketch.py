"""Random matrices S: what they are made of, and that they keep lengths in a subspace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import operators as ops
from solvers.sketched.sketch import KINDS, Whitening, sketch, sketched

DOUBLE = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def dense(m: int, n: int, seed: int = 0) -> ops.Dense:
    return ops.Dense(sampled(m, n, seed=seed))


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    @pytest.mark.parametrize(("m", "size"), [(50, 12), (64, 20), (65, 3), (200, 64)])
    def test_shape_seed_and_transpose(self, kind, m, size):
        A = dense(m, 1)
        S = sketch(kind, size, A, 3)
        assert S.shape == (size, m)
        assert torch.equal(S.to_dense(), sketch(kind, size, A, 3).to_dense())
        assert not torch.equal(S.to_dense(), sketch(kind, size, A, 4).to_dense())
        torch.testing.assert_close(S.T.to_dense(), S.to_dense().T)

    def test_the_mean_of_its_gram_matrix_is_the_identity(self, kind):
        m, size, count = 9, 4, 250
        A = dense(m, 1)
        draws = torch.stack([sketch(kind, size, A, seed).to_dense() for seed in range(count)])
        mean = (draws.mT @ draws).mean(0)
        # An entry has variance at most 2 / size.
        noise = (2 / size / count) ** 0.5
        torch.testing.assert_close(mean, torch.eye(m, dtype=DOUBLE), rtol=0, atol=5 * noise)

    def test_a_subspace_is_embedded(self, kind):
        """Also one that is aligned with coordinates, which uniform sampling of rows would miss."""
        m, n, size = 1000, 20, 320
        spread = torch.linalg.qr(sampled(m, n)).Q
        aligned = torch.eye(m, n, dtype=DOUBLE)
        for basis in (spread, aligned):
            values = torch.linalg.svdvals(sketch(kind, size, ops.Dense(basis), 0)._matmat(basis))
            # 1 +- sqrt(n / size) = 1 +- 0.25, with room.
            assert values.max() < 1.4
            assert values.min() > 0.6

    def test_every_way_to_multiply(self, kind):
        M = sampled(150, 7) * (sampled(150, 7, seed=1) > 0)
        S = sketch(kind, 70, ops.Dense(M), 5)
        expected = S.to_dense() @ M
        products = ops.FunctionOperator(lambda v, M: M @ v, torch.zeros(7, dtype=DOUBLE), M)
        for A in (ops.Dense(M), ops.Sparse(M.to_sparse()), products, 2.0 * ops.Dense(M / 2)):
            torch.testing.assert_close(sketched(S, A), expected)
        # Of a wide operator the transpose is sketched.
        for A in (ops.Dense(M.T).T, ops.Sparse(M.T.to_sparse()).T):
            torch.testing.assert_close(sketched(S, A), expected)

    def test_it_does_not_depend_on_data_of_the_same_seed(self, kind):
        """Gaussian data from ``torch.manual_seed(0)`` were rows of S once."""
        A = ops.Dense(sampled(5, 1000).T)
        values = torch.linalg.svdvals(sketched(sketch(kind, 400, A, 0), A) / 1000**0.5)
        assert values.max() < 1.3
        assert values.min() > 0.7

    def test_nothing_to_gain(self, kind):
        A = dense(10, 3)
        assert isinstance(sketch(kind, 10, A, 0), ops.Identity)
        torch.testing.assert_close(sketched(sketch(kind, 11, A, 0), A), A.matrix)

    def test_keeps_the_dtype(self, kind):
        A = ops.Dense(sampled(50, 3).float())
        assert sketched(sketch(kind, 12, A, 0), A).dtype == torch.float32


def test_entries_of_a_sparse_sign_matrix():
    S = sketch("sparse-sign", 30, dense(100, 1), 0).to_dense()
    assert ((S != 0).sum(0) == 8).all()
    torch.testing.assert_close(S[S != 0].abs(), torch.full((800,), 8**-0.5, dtype=DOUBLE))
    few = sketch("sparse-sign", 5, dense(100, 1), 0).to_dense()
    assert ((few != 0).sum(0) == 5).all()


@pytest.mark.parametrize("m", [64, 128, 512])
def test_rows_of_a_hadamard_matrix(m):
    S = sketch("srht", 10, dense(m, 1), 0).to_dense()
    torch.testing.assert_close(S.abs(), torch.full((10, m), 10**-0.5, dtype=DOUBLE))
    torch.testing.assert_close(S @ S.T, m / 10 * torch.eye(10, dtype=DOUBLE))


class TestWhitening:
    def test_of_full_rank(self):
        M = sampled(20, 5) * torch.logspace(0, -8, 5, dtype=DOUBLE)
        W, N = Whitening.of(M)
        torch.testing.assert_close(W.T @ W, torch.eye(5, dtype=DOUBLE))
        torch.testing.assert_close(M @ N, W, rtol=0, atol=1e-7)

    def test_of_low_rank(self):
        M = sampled(20, 2) @ sampled(2, 5, seed=1)
        W, N = Whitening.of(M)
        assert W.shape == (20, 2)
        torch.testing.assert_close(N @ W.T, torch.linalg.pinv(M))

    def test_of_zeros_and_of_nothing(self):
        assert Whitening.of(torch.zeros(4, 3)).map.shape == (3, 0)
        assert Whitening.of(torch.zeros(4, 0)).map.shape == (0, 0)
