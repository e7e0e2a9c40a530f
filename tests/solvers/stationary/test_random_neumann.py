"""The randomly truncated Neumann series: every draw enumerated, its mean and its variance exact."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor

import operators as ops
import solvers
from solvers import ConvergenceWarning, Neumann
from solvers.stationary.random_neumann import RandomNeumann

FLOAT64 = torch.float64
pytestmark = pytest.mark.filterwarnings("error::solvers.ConvergenceWarning")


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def spd(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    basis, _ = torch.linalg.qr(sampled(len(eigenvalues), len(eigenvalues), seed=seed))
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def general(n: int, seed: int = 0) -> Tensor:
    noise = sampled(n, n, seed=seed)
    return torch.eye(n, dtype=FLOAT64) + 0.5 * noise / torch.linalg.matrix_norm(noise, 2)


def series(matrix: Tensor, b: Tensor, alpha: float, terms: int) -> Tensor:
    step = torch.eye(len(matrix), dtype=FLOAT64) - alpha * matrix
    return sum(alpha * torch.linalg.matrix_power(step, j) @ b for j in range(terms))


def estimate(solver: RandomNeumann, matrix: Tensor, b: Tensor, *lengths: int, transpose=False):
    """What the draws of these lengths would give."""
    prepared = solver.prepare(ops.Dense(matrix))
    return prepared._estimate(b, list(lengths), transpose=transpose)[0]


MATRIX, ALPHA, Q = general(6), 0.8, 7
B = sampled(6, 2, seed=1)


class TestUniform:
    solver = RandomNeumann(step_size=ALPHA, terms=Q)

    @pytest.mark.parametrize("transpose", [False, True])
    def test_one_draw_is_the_formula_of_ghadimi_and_wang(self, transpose):
        A = MATRIX.T if transpose else MATRIX
        step = torch.eye(6, dtype=FLOAT64) - ALPHA * A
        for p in range(Q):
            expected = Q * ALPHA * torch.linalg.matrix_power(step, p) @ B
            x = estimate(self.solver, MATRIX, B, p, transpose=transpose)
            torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("transpose", [False, True])
    def test_the_mean_over_all_draws_is_the_truncated_series(self, transpose):
        A = MATRIX.T if transpose else MATRIX
        draws = [estimate(self.solver, MATRIX, B, p, transpose=transpose) for p in range(Q)]
        mean = torch.stack(draws).mean(0)
        torch.testing.assert_close(mean, series(A, B, ALPHA, Q), rtol=0, atol=1e-14)
        neumann = Neumann(step_size=ALPHA, maxiter=Q - 1, stop_at_maxiter=True, rtol=0.0)
        torch.testing.assert_close(
            mean, neumann.prepare(ops.Dense(A)).solve(B).value, rtol=0, atol=1e-14
        )

    def test_so_its_bias_is_that_of_the_truncation(self):
        """It is not an estimate of A^-1 b."""
        values = torch.tensor([0.05, 1.0], dtype=FLOAT64)
        draws = [estimate(self.solver, torch.diag(values), torch.eye(2).double(), p)
                 for p in range(Q)]  # fmt: skip
        mean = torch.stack(draws).mean(0).diag()
        torch.testing.assert_close(1 - values * mean, (1 - ALPHA * values) ** Q)
        assert float(1 - values[0] * mean[0]) > 0.7

    def test_the_variance_is_the_one_stated(self):
        b = B[:, 0]
        draws = torch.stack([estimate(self.solver, MATRIX, b[:, None], p)[:, 0] for p in range(Q)])
        step = torch.eye(6, dtype=FLOAT64) - ALPHA * MATRIX
        terms = [ALPHA * torch.linalg.matrix_power(step, j) @ b for j in range(Q)]
        stated = Q * sum(t @ t for t in terms) - sum(terms) @ sum(terms)
        true = (draws - draws.mean(0)).square().sum(1).mean()
        torch.testing.assert_close(true, stated, rtol=1e-11, atol=0)

    def test_lengths_are_uniform_below_q(self):
        prepared = RandomNeumann(step_size=ALPHA, terms=4, samples=4000).prepare(ops.Dense(MATRIX))
        counts = torch.bincount(torch.tensor(prepared._lengths()), minlength=4)
        assert len(counts) == 4
        assert (counts - 1000).abs().max() < 5 * math.sqrt(1000 * 0.75)


class TestGeometric:
    solver = RandomNeumann(step_size=ALPHA, terms=4, distribution="geometric")
    c = 1 - 1 / 4

    @pytest.mark.parametrize("transpose", [False, True])
    def test_the_mean_over_all_draws_is_the_inverse(self, transpose):
        """Enumerated until P(p) is below rounding; c = 1/2."""
        A = MATRIX.T if transpose else MATRIX
        solver = RandomNeumann(step_size=ALPHA, terms=2, distribution="geometric")
        mean = sum(
            0.5 ** (p + 1) * estimate(solver, MATRIX, B, p, transpose=transpose) for p in range(70)
        )
        torch.testing.assert_close(mean, torch.linalg.solve(A, B), rtol=0, atol=1e-13)

    def test_the_second_moment_is_finite_exactly_where_it_is_said_to_be(self):
        """sum_{i,j} t_i t_j c^-min(i,j) for eigenvalue 1 - rho: a matter of rho^2 < c."""
        for rho, finite in ((0.84, True), (0.89, False)):
            assert (rho**2 < self.c) == finite
            matrix = torch.full((1, 1), (1 - rho) / ALPHA, dtype=FLOAT64)
            b = torch.ones(1, 1, dtype=FLOAT64)
            moments, total = [], 0.0
            for p in range(121):
                x = float(estimate(self.solver, matrix, b, p))
                total += (1 - self.c) * self.c**p * x * x
                moments.append(total)
            growth = (moments[-1] - moments[-31]) / (moments[-31] - moments[-61])
            assert (growth < 1) == finite
            assert growth == pytest.approx((rho**2 / self.c) ** 30, rel=0.1)

    def test_lengths_are_geometric(self):
        prepared = RandomNeumann(
            step_size=ALPHA, terms=4, samples=8000, distribution="geometric"
        ).prepare(ops.Dense(MATRIX))
        lengths = torch.tensor(prepared._lengths(), dtype=FLOAT64)
        # Q - 1 products on average.
        assert float(lengths.mean()) == pytest.approx(3, abs=5 * math.sqrt(12 / 8000))
        for j in range(6):
            assert float((lengths >= j).double().mean()) == pytest.approx(self.c**j, abs=0.03)


class TestSampledOperators:
    """H_i is one of two matrices with equal chances; all sequences are enumerated."""

    parts = (MATRIX + 0.3 * general(6, 5), MATRIX - 0.3 * general(6, 5))

    def sequences(self, p: int, transpose: bool, **settings) -> Tensor:
        """Mean over the sequences of p operators."""
        total = []
        for choice in itertools.product(self.parts, repeat=p):
            supply = iter(choice)
            solver = RandomNeumann(
                step_size=ALPHA, operators=lambda g, s=supply: ops.Dense(next(s)), **settings
            )
            total.append(estimate(solver, MATRIX, B, p, transpose=transpose))
            assert next(supply, None) is None  # each was used once
        return torch.stack(total).mean(0)

    @pytest.mark.parametrize("transpose", [False, True])
    def test_the_mean_is_that_of_the_mean_operator(self, transpose):
        A = MATRIX.T if transpose else MATRIX
        uniform = [self.sequences(p, transpose, terms=5) for p in range(5)]
        torch.testing.assert_close(
            torch.stack(uniform).mean(0), series(A, B, ALPHA, 5), rtol=0, atol=1e-14
        )
        single = RandomNeumann(step_size=ALPHA, terms=3, distribution="geometric")
        for p in range(5):
            torch.testing.assert_close(
                self.sequences(p, transpose, terms=3, distribution="geometric"),
                estimate(single, MATRIX, B, p, transpose=transpose),
                rtol=0,
                atol=1e-14,
            )

    def test_one_operator_for_all_steps_would_be_biased(self):
        """E T^2 is not (E T)^2: the samples of a product must be independent."""
        step = [torch.eye(6, dtype=FLOAT64) - ALPHA * part for part in self.parts]
        squared = sum(s @ s for s in step) / 2
        assert (squared - (sum(step) / 2) @ (sum(step) / 2)).norm() > 1e-2

    def test_samples_have_operators_of_their_own(self):
        drawn = []

        def draw(generator: torch.Generator) -> ops.LinearOperator:
            drawn.append(int(torch.randint(1000, (), generator=generator)))
            return ops.Dense(MATRIX)

        solver = RandomNeumann(step_size=ALPHA, terms=6, samples=5, operators=draw)
        info = solver.prepare(ops.Dense(MATRIX)).solve(B).info
        assert info.products == 2 * len(drawn) + 2  # two columns, and the residual
        assert len(set(drawn)) > len(drawn) / 2

    def test_minibatch_hessians_of_a_mean_loss(self):
        """As BSA draws them: the mean of many estimates is near the truncated series."""
        X, y = sampled(40, 4, seed=2), sampled(4, seed=3)

        def loss(y: Tensor, X: Tensor) -> Tensor:
            return ((X @ y) ** 2).mean() / 2 + 0.25 * y @ y

        def draw(generator: torch.Generator) -> ops.LinearOperator:
            return ops.Hessian(loss, y, X[torch.randint(40, (8,), generator=generator)])

        A = ops.Hessian(loss, y, X)
        solver = RandomNeumann(step_size=0.2, terms=6, samples=150, operators=draw)
        b = sampled(4, seed=4)
        x = solver.prepare(A).solve(b).value
        expected = series(A.to_dense(), b, 0.2, 6)
        assert (x - expected).norm() <= 0.25 * expected.norm()

    def test_what_is_drawn_is_checked(self):
        def prepared(drawn):
            solver = RandomNeumann(step_size=1.0, terms=9, samples=9, operators=lambda g: drawn)
            return solver.prepare(ops.Dense(MATRIX))

        with pytest.raises(TypeError, match="returned a Tensor; expected an operator"):
            prepared(MATRIX).solve(B)
        with pytest.raises(ValueError, match=r"expected shape \(6, 6\)"):
            prepared(ops.Identity(5, FLOAT64)).solve(B)
        with pytest.raises(TypeError, match=r"torch.float32 on cpu; expected torch.float64"):
            prepared(ops.Identity(6, torch.float32)).solve(B)


class TestSamples:
    def test_the_estimate_is_the_mean_of_single_ones(self):
        for distribution in ("uniform", "geometric"):
            solver = RandomNeumann(step_size=ALPHA, terms=5, distribution=distribution)
            lengths = (0, 3, 3, 1, 4)
            singles = [estimate(solver, MATRIX, B, p) for p in lengths]
            together = estimate(solver, MATRIX, B, *lengths)
            torch.testing.assert_close(together, torch.stack(singles).mean(0), rtol=0, atol=1e-13)

    def test_without_sampled_operators_they_share_their_products(self):
        solver = RandomNeumann(step_size=ALPHA, terms=5, samples=200)
        info = solver.prepare(ops.Dense(MATRIX)).solve(B[:, 0]).info
        assert info.iterations == 4  # the longest of 200
        assert info.products == 4 + 1

    def test_the_error_falls_with_the_root_of_their_number(self):
        expected = series(MATRIX, B, ALPHA, 6)
        errors = []
        for samples in (10, 1000):
            prepared = RandomNeumann(step_size=ALPHA, terms=6, samples=samples).prepare(
                ops.Dense(MATRIX)
            )
            squares = [(prepared.solve(B).value - expected).square().sum() for _ in range(40)]
            errors.append(float(torch.stack(squares).mean().sqrt()))
        assert errors[0] / errors[1] == pytest.approx(10, rel=0.35)


class TestStream:
    def draws(self, prepared, count: int) -> Tensor:
        return torch.stack([prepared.solve(B).value for _ in range(count)])

    def test_each_solve_draws_anew_and_each_prepare_begins_again(self):
        solver = RandomNeumann(step_size=ALPHA, terms=50, seed=3)
        first, again = (self.draws(solver.prepare(ops.Dense(MATRIX)), 4) for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.equal(first[0], first[1])
        other = RandomNeumann(step_size=ALPHA, terms=50, seed=4)
        assert not torch.equal(self.draws(other.prepare(ops.Dense(MATRIX)), 4), first)

    def test_transposed_solves_take_from_the_same_stream(self):
        solver = RandomNeumann(step_size=ALPHA, terms=1000)
        prepared, plain = solver.prepare(ops.Dense(MATRIX)), solver.prepare(ops.Dense(MATRIX))
        lengths = [plain._lengths() for _ in range(3)]
        for i, solve in enumerate((prepared.solve, prepared.solve_transpose, prepared.solve)):
            assert [solve(B).info.iterations] == lengths[i]

    def test_an_update_goes_on_where_the_old_one_was(self):
        solver = RandomNeumann(step_size=ALPHA, terms=1000)
        prepared, plain = solver.prepare(ops.Dense(MATRIX)), solver.prepare(ops.Dense(MATRIX))
        lengths = [plain._lengths()[0] for _ in range(2)]
        assert prepared.solve(B).info.iterations == lengths[0]
        updated = prepared.update(ops.Dense(1.1 * MATRIX))
        assert updated.solve(B).info.iterations == lengths[1]

    def test_a_generator_goes_on_across_prepare(self):
        generator = torch.Generator().manual_seed(3)
        handed = RandomNeumann(step_size=ALPHA, terms=1000, seed=generator)
        counts = [handed.prepare(ops.Dense(MATRIX)).solve(B).info.iterations for _ in range(3)]
        kept = RandomNeumann(step_size=ALPHA, terms=1000, seed=3).prepare(ops.Dense(MATRIX))
        assert counts == [kept.solve(B).info.iterations for _ in range(3)]
        assert len(set(counts)) == 3

    def test_columns_share_their_draw_and_zero_is_solved_by_zero(self):
        """An estimate is one linear operator."""
        solver = RandomNeumann(step_size=ALPHA, terms=20)
        block = torch.cat([B, B[:, :1] + 2 * B[:, 1:], 0 * B], 1)
        x = solver.prepare(ops.Dense(MATRIX)).solve(block).value
        torch.testing.assert_close(x[:, 2], x[:, 0] + 2 * x[:, 1], rtol=1e-12, atol=1e-12)
        assert not x[:, 3:].any()
        zero = solver.prepare(ops.Dense(MATRIX)).solve(0 * B)
        assert zero.info.converged
        assert zero.info.products == 2

    def test_members_of_a_batch(self):
        stack = ops.Stacked([ops.Dense(MATRIX), ops.Dense(2 * MATRIX)])
        solver = RandomNeumann(step_size=ALPHA / 2, terms=8, samples=3)
        x = solver.prepare(stack).solve(torch.cat([B, B])).value
        for i, c in enumerate((1, 2)):
            single = solver.prepare(ops.Dense(c * MATRIX)).solve(B).value
            torch.testing.assert_close(x[6 * i : 6 * i + 6], single, rtol=1e-12, atol=1e-13)


class TestWhatIsSaid:
    def test_the_residual_is_true_and_nothing_is_warned_about(self):
        x, info = RandomNeumann(step_size=ALPHA, terms=30).prepare(ops.Dense(MATRIX)).solve(B[:, 0])
        true = float((B[:, 0] - MATRIX @ x).norm() / B[:, 0].norm())
        assert info.residual == pytest.approx(true, rel=1e-12)
        assert info.residual > 0.5
        assert not info.converged
        assert info.status == "maxiter"
        assert "unbiased but not accurate" in info.reason

    def test_converged_where_it_happens_to_be(self):
        A = ops.Identity(3, FLOAT64)
        info = RandomNeumann(step_size=1.0, terms=1).prepare(A).solve(torch.ones(3).double()).info
        assert info.converged
        assert info.status == "converged"

    def test_terms_that_grow_are_warned_about(self):
        A = ops.Diagonal(torch.tensor([1.0, 8.0], dtype=FLOAT64))
        solver = RandomNeumann(step_size=1.0, terms=9, samples=20)
        with pytest.warns(ConvergenceWarning, match=r"diverged.*exceeds 2 / L"):
            solver.prepare(A).solve(torch.ones(2, dtype=FLOAT64))

    def test_an_estimated_step_is_that_of_neumann(self):
        A = ops.Diagonal(torch.linspace(1, 9, 30, dtype=FLOAT64))
        info = RandomNeumann(terms=5).prepare(A).solve(torch.ones(30, dtype=FLOAT64)).info
        assert "= 1 / L by 10 Krylov steps" in info.reason

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"terms": 0}, r"terms=0; expected at least 1"),
            ({"terms": 1, "distribution": "geometric"}, r"terms=1; expected at least 2"),
            ({"samples": 0}, r"samples=0; expected at least 1"),
            ({"distribution": "poisson"}, r"distribution='poisson'; expected"),
            ({"strict": True}, r"strict=True; an estimate meets no tolerance"),
            ({"step_size": -1.0}, r"step_size=-1.0; expected a positive number"),
        ],
    )
    def test_settings_out_of_range(self, settings, message):
        with pytest.raises(ValueError, match=message):
            RandomNeumann(**settings)


def test_gradients_are_products_of_independent_draws():
    """A_bar = -b_bar x^T; with one draw for both it would be biased, as E[s s] is not E[s]^2.

    For the scalar 1/a truncated to Q terms, the mean over all pairs of draws is exact.
    """
    a, alpha, terms = torch.tensor([[0.7]], dtype=FLOAT64, requires_grad=True), 1.0, 3
    solver = RandomNeumann(step_size=alpha, terms=terms, seed=torch.Generator().manual_seed(0))
    total, count = 0.0, 500
    for _ in range(count):
        x = solvers.solve(a, torch.ones(1, dtype=FLOAT64), solver=solver)
        total += float(torch.autograd.grad(x.sum(), a)[0])
    q = 0.3
    truncated = sum(q**j for j in range(terms))
    draws = [terms * q**p for p in range(terms)]
    spread = math.sqrt(sum((x * y - truncated**2) ** 2 for x in draws for y in draws)) / terms
    assert total / count == pytest.approx(-(truncated**2), abs=5 * spread / math.sqrt(count))
    same = sum(x * x for x in draws) / terms
    assert abs(same - truncated**2) > 9 * spread / math.sqrt(count)


def test_float32():
    A, b = ops.Dense(MATRIX.float()), B.float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = RandomNeumann(step_size=ALPHA, terms=9, samples=4).prepare(A).solve(b).value
    expected = RandomNeumann(step_size=ALPHA, terms=9, samples=4).prepare(MATRIX).solve(B).value
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), expected, rtol=1e-4, atol=1e-5)
