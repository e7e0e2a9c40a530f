"""`Nystrom` against its definition in dense algebra, and against the traps of low-rank inverses."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import operators as ops
from operators.linear_operator import LinearOperator
from operators.low_rank import LowRankPlusDiagonal
from operators.randomized.nystrom import Nystrom
from operators.randomized.sketch import Gaussian
from operators.space import Space
from operators.structure import Structure
from solvers import Woodbury

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
FLOAT64 = torch.float64
SKETCHES = ["gaussian", "coordinate", "rpcholesky"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def semidefinite(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    basis = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed)).Q
    matrix = (basis * eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def kernel(n: int = 300, length: float = 0.5, seed: int = 0) -> Tensor:
    points = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)
    return torch.exp(-torch.cdist(points, points).square() / (2 * length**2))


def dense(matrix: Tensor) -> ops.Dense:
    return ops.Dense(matrix, symmetric=True)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class Counting(LinearOperator):
    """A symmetric matrix that counts its products and hides its entries."""

    _parameters = ("matrix",)

    def __init__(self, matrix: Tensor) -> None:
        space = Space.flat(len(matrix), matrix.dtype, matrix.device)
        super().__init__(space, space, Structure(symmetric=True))
        self.matrix = matrix
        self.products = 0

    def _matvec(self, v: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ v

    def _matmat(self, block: Tensor) -> Tensor:
        self.products += block.shape[1]
        return self.matrix @ block


class TestDefinition:
    @PROPERTY
    @given(n=st.integers(1, 12), data=st.data(), decay=st.floats(0.1, 1.0), seed=st.integers(0, 99))
    def test_gaussian_is_the_formula(self, n, data, decay, seed):
        """``A O (O^T A O)^+ (A O)^T`` for the range of the very same random block."""
        k = data.draw(st.integers(1, n))
        matrix = semidefinite(decay ** torch.arange(n, dtype=FLOAT64), seed)
        generator = torch.Generator().manual_seed(seed)
        sketch = torch.randn(n, k, generator=generator, dtype=FLOAT64)
        image = matrix @ sketch
        expected = image @ torch.linalg.pinv(sketch.T @ image, hermitian=True) @ image.T
        A = Nystrom(dense(matrix), k, generator=torch.Generator().manual_seed(seed))
        close(A.to_dense(), expected, 1e-6)
        close(A.rows @ A.rows.T, torch.eye(k, dtype=FLOAT64))

    @PROPERTY
    @given(
        n=st.integers(1, 10),
        data=st.data(),
        sketch=st.sampled_from(SKETCHES),
        block=st.integers(1, 4),
        seed=st.integers(0, 99),
    )
    def test_never_above_and_exact_at_full_rank(self, n, data, sketch, block, seed):
        r = data.draw(st.integers(1, n))
        factor = normal(r, n, seed=seed)
        matrix = factor.T @ factor
        scale = float(torch.linalg.matrix_norm(matrix, 2))
        k = data.draw(st.integers(1, n))
        A = Nystrom(dense(matrix), k, sketch=sketch, block=block)
        rest = torch.linalg.eigvalsh(matrix - A.to_dense())
        assert rest.min() > -1e-11 * scale
        if k >= r and sketch != "coordinate":
            assert rest.max() < 1e-9 * scale
        assert A.rank <= k
        assert (A.eigenvalues >= 0).all()
        assert (A.eigenvalues.diff() <= 0).all()

    def test_coordinate_sketch_is_the_formula_of_uniform_columns(self):
        matrix = semidefinite(0.7 ** torch.arange(12, dtype=FLOAT64))
        generator = torch.Generator().manual_seed(5)
        index = torch.randperm(12, generator=generator)[:4]
        columns, core = matrix[:, index], matrix[index][:, index]
        expected = columns @ torch.linalg.solve(core, columns.T)
        generator.manual_seed(5)
        A = Nystrom(dense(matrix), 4, sketch="coordinate", generator=generator)
        close(A.to_dense(), expected)

    def test_pivoted_cholesky_is_the_nystrom_approximation_of_its_pivots(self):
        """Partial Cholesky on pivots S is ``A[:, S] A[S, S]^-1 A[S, :]``, whatever their order."""
        matrix = kernel(40)
        for block in (1, 3, 6):
            seen: list[Tensor] = []

            def columns(index: Tensor, seen: list[Tensor] = seen) -> Tensor:
                seen.append(index)
                return matrix[:, index]

            A = Nystrom(dense(matrix), 6, sketch="rpcholesky", block=block, columns=columns)
            pivots = torch.cat(seen)
            assert len(pivots.unique()) == len(pivots) == 6
            part = matrix[:, pivots]
            close(A.to_dense(), part @ torch.linalg.solve(matrix[pivots][:, pivots], part.T), 1e-8)

    def test_pivots_are_drawn_in_proportion_to_the_diagonal(self):
        """One pivot on a diagonal matrix: the kept entry is the pivot."""
        values = torch.tensor([1.0, 2.0, 5.0], dtype=FLOAT64)
        generator = torch.Generator().manual_seed(0)
        counts = torch.zeros(3, dtype=FLOAT64)
        A = dense(torch.diag(values))
        for _ in range(1500):
            kept = Nystrom(A, 1, sketch="rpcholesky", power_iterations=0, generator=generator)
            counts[int(torch.argmin((values - kept.eigenvalues).abs()))] += 1
        expected = 1500 * values / values.sum()
        # Chi-square with two degrees of freedom: beyond 13.8 once in a thousand.
        assert ((counts - expected).square() / expected).sum() < 13.8

    @pytest.mark.parametrize("sketch", SKETCHES)
    def test_zero_operator(self, sketch):
        A = Nystrom(dense(torch.zeros(4, 4, dtype=FLOAT64)), 2, sketch=sketch, damping=0.5)
        close(A.to_dense(), 0.5 * torch.eye(4, dtype=FLOAT64))
        close(A.inverse().to_dense(), 2.0 * torch.eye(4, dtype=FLOAT64))

    def test_oversampling_keeps_the_largest_eigenpairs(self):
        matrix = semidefinite(0.8 ** torch.arange(40, dtype=FLOAT64))
        wide = Nystrom(dense(matrix), 16)
        kept = Nystrom(dense(matrix), 8, oversampling=8)
        close(kept.eigenvalues, wide.eigenvalues[:8])
        close(kept.rows.T @ kept.rows, wide.rows[:8].T @ wide.rows[:8])
        plain = Nystrom(dense(matrix), 8)
        assert kept.error_estimate < plain.error_estimate


class TestQuality:
    def test_gaussian_meets_the_published_bound_in_the_mean(self):
        """``E |A - A_k| <= (1 + 2p/(q-1)) s_{p+1} + 2 e^2 k/(q^2-1) sum_{j>p} s_j``, k = p + q.

        Frangella, Tropp and Udell (2021), Proposition 2.2, at p = k / 2.
        """
        eigenvalues = 0.85 ** torch.arange(80, dtype=FLOAT64)
        matrix = semidefinite(eigenvalues)
        k = 20
        bounds = []
        for p in range(2, k - 3):
            q = k - p
            tail = eigenvalues[p:].sum()
            factor = 2 * torch.e**2 * k / (q**2 - 1)
            bounds.append((1 + 2 * p / (q - 1)) * eigenvalues[p] + factor * tail)
        errors = []
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            A = Nystrom(dense(matrix), k, generator=generator, power_iterations=0)
            errors.append(torch.linalg.matrix_norm(matrix - A.to_dense(), 2))
        mean = torch.stack(errors).mean()
        assert eigenvalues[k] <= mean <= min(bounds)

    @pytest.mark.parametrize("sketch", SKETCHES)
    def test_error_estimate_is_below_the_error_and_close(self, sketch):
        matrix = semidefinite(0.8 ** torch.arange(60, dtype=FLOAT64))
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            A = Nystrom(dense(matrix), 12, sketch=sketch, generator=generator, power_iterations=8)
            error = float(torch.linalg.matrix_norm(matrix - A.to_dense(), 2))
            assert 0.8 * error < A.error_estimate <= error * (1 + 1e-10)

    def test_pivots_beat_uniform_coordinates_where_few_points_are_apart(self):
        """A cluster and five outliers: uniform columns miss them (methods, 4.1)."""
        points = torch.cat([0.1 * normal(195, 2), 10.0 * normal(5, 2, seed=1)])
        matrix = torch.exp(-torch.cdist(points, points).square() / 2)

        def mean_error(sketch: str) -> float:
            errors = []
            for seed in range(5):
                generator = torch.Generator().manual_seed(seed)
                A = Nystrom(dense(matrix), 15, sketch=sketch, generator=generator)
                errors.append(torch.trace(matrix - A.to_dense()))
            return float(torch.stack(errors).mean())

        assert mean_error("rpcholesky") < 0.05
        assert mean_error("coordinate") > 2.0

    def test_tolerance_doubles_the_rank_and_repeats_no_product(self):
        matrix = semidefinite(0.8 ** torch.arange(100, dtype=FLOAT64))
        A = Counting(matrix)
        iterations = 6
        approximation = Nystrom(A, 4, tolerance=1e-3, power_iterations=iterations)
        assert approximation.rank == 64
        assert approximation.error_estimate <= 1e-3
        assert A.products == 64 + iterations * 5  # 4, 8, 16, 32, 64
        half = Nystrom(A, 32)
        assert half.error_estimate > 1e-3

    @pytest.mark.parametrize("sketch", SKETCHES)
    def test_growing_loses_nothing(self, sketch):
        """At max_rank = n the approximation is exact, however it came there."""
        matrix = semidefinite(0.7 ** torch.arange(24, dtype=FLOAT64))
        A = Nystrom(dense(matrix), 3, sketch=sketch, tolerance=1e-10)
        assert A.rank == 24
        close(A.to_dense(), matrix, 1e-12)

    def test_grown_sketch_stays_orthonormal(self):
        sketch = Gaussian(dense(kernel(24)), torch.Generator().manual_seed(0))
        for size in (3, 6, 24):
            sketch.extend(size)
        close(sketch.test.T @ sketch.test, torch.eye(24, dtype=FLOAT64), 1e-12)

    def test_max_rank_is_told_when_it_does_not_do(self):
        matrix = semidefinite(torch.ones(20, dtype=FLOAT64))
        with pytest.warns(RuntimeWarning, match=r"about 1 at max_rank=6; tolerance=0\.1"):
            A = Nystrom(dense(matrix), 4, tolerance=0.1, max_rank=6)
        assert A.rank == 6

    @pytest.mark.parametrize("sketch", SKETCHES)
    def test_products(self, sketch):
        A = Counting(kernel(50))
        diagonal = torch.ones(50, dtype=FLOAT64)
        Nystrom(A, 7, sketch=sketch, oversampling=2, diagonal=diagonal, power_iterations=3)
        assert A.products == 7 + 2 + 3


class TestInverse:
    @PROPERTY
    @given(
        n=st.integers(1, 12),
        data=st.data(),
        damping=st.floats(1e-4, 10.0),
        sketch=st.sampled_from(SKETCHES),
    )
    def test_is_the_inverse_of_the_operator_and_woodbury_agrees(self, n, data, damping, sketch):
        k = data.draw(st.integers(1, n))
        matrix = semidefinite(0.3 ** torch.arange(n, dtype=FLOAT64))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            A = Nystrom(dense(matrix), k, damping=damping, sketch=sketch)
        inverse = A.inverse()
        assert isinstance(inverse, LowRankPlusDiagonal)
        assert inverse.positive_definite
        exact = torch.linalg.inv(A.to_dense())
        close(inverse.to_dense() * damping, exact * damping)
        b = normal(n)
        close(Woodbury().prepare(A).solve(b).value * damping, exact @ b * damping)
        close(A._exact_logdet(), torch.linalg.slogdet(A.to_dense()).logabsdet)

    @pytest.mark.parametrize("sketch", SKETCHES)
    def test_of_the_damped_matrix_at_full_rank_and_known_bias(self, sketch):
        """Exact for ``(A + r I)^-1`` when k = n; it is not ``A^-1``: the bias is r."""
        matrix = semidefinite(torch.logspace(0, -3, 16, dtype=FLOAT64))
        eye = torch.eye(16, dtype=FLOAT64)
        inverse = Nystrom(dense(matrix), 16, damping=1e-2, sketch=sketch).inverse().to_dense()
        close(inverse, torch.linalg.inv(matrix + 1e-2 * eye))
        undamped = torch.linalg.inv(matrix)
        assert torch.linalg.norm(inverse - undamped) > 0.5 * torch.linalg.norm(undamped)

    def test_small_damping_on_a_flat_spectrum_is_warned_of(self):
        """Off the span b is scaled by 1/damping: the error is many times the answer (4.1)."""
        matrix = semidefinite(torch.linspace(0.5, 1.0, 60, dtype=FLOAT64))
        b = normal(60)
        exact = torch.linalg.solve(matrix + 1e-2 * torch.eye(60, dtype=FLOAT64), b)
        with pytest.warns(RuntimeWarning, match="damping=0.01 is below"):
            A = Nystrom(dense(matrix), 10, damping=1e-2)
        assert torch.linalg.norm(A.inverse() @ b - exact) > 20 * torch.linalg.norm(exact)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            enough = Nystrom(dense(matrix), 10, damping=1e-2, tolerance=1e-2)
        assert torch.linalg.norm(enough.inverse() @ b - exact) < 1e-8

    def test_exact_approximation_is_not_warned_of(self):
        """Damping below the smallest kept eigenvalue is right where nothing was missed."""
        factor = normal(5, 40)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            A = Nystrom(dense(factor.T @ factor), 5, damping=1e-3)
        assert A.damping < A.eigenvalues[-1]
        close(
            A.inverse().to_dense() * 1e-3,
            torch.linalg.inv(factor.T @ factor + 1e-3 * torch.eye(40, dtype=FLOAT64)) * 1e-3,
        )

    @pytest.mark.parametrize("sketch", SKETCHES)
    def test_float32_core_is_accumulated_in_float64(self, sketch):
        """A float32 core makes the error 1e-6 instead of the 1e-7 of the entries."""
        matrix = semidefinite(torch.logspace(0, -7, 60, dtype=FLOAT64))
        eye = torch.eye(60, dtype=FLOAT64)
        A = Nystrom(dense(matrix.float()), 60, damping=1e-3, sketch=sketch)
        assert A.dtype == torch.float32
        assert A.inverse().dtype == torch.float32
        error = A.to_dense().double() - matrix - 1e-3 * eye
        assert torch.linalg.matrix_norm(error, 2) < 4e-7
        exact = torch.linalg.inv(matrix + 1e-3 * eye)
        difference = A.inverse().to_dense().double() - exact
        assert torch.linalg.matrix_norm(difference, 2) < 1e-4 * torch.linalg.matrix_norm(exact, 2)


class TestAlgebra:
    def test_sums_and_multiples_stay_low_rank_plus_diagonal(self):
        matrix = kernel(30)
        A = Nystrom(dense(matrix), 8)
        combined = 2.0 * A + 0.5 * ops.Identity(30)
        assert isinstance(combined, LowRankPlusDiagonal)
        assert combined.rank == 8
        close(combined.to_dense(), 2 * A.to_dense() + 0.5 * torch.eye(30, dtype=FLOAT64))

    def test_keeps_the_space(self):
        space = Space.of(
            {"w": torch.zeros(2, 3, dtype=FLOAT64), "b": torch.zeros(2, dtype=FLOAT64)}
        )
        factor = normal(3, 8)
        A = LowRankPlusDiagonal(factor, 0.0, space=space)
        approximation = Nystrom(A, 3, damping=1.0)
        v = space.unravel(normal(8))
        product = approximation.inverse() @ (approximation @ v)
        close(space.ravel(product), space.ravel(v))

    def test_two_runs_agree_and_the_global_generator_is_left_alone(self):
        matrix = kernel(30)
        state = torch.random.get_rng_state()
        for sketch in SKETCHES:
            first, second = (Nystrom(dense(matrix), 5, sketch=sketch) for _ in range(2))
            assert torch.equal(first.rows, second.rows)
        assert torch.equal(state, torch.random.get_rng_state())

    def test_leaves_its_operator_and_diagonal_alone(self):
        matrix, diagonal = kernel(30), torch.ones(30, dtype=FLOAT64)
        kept, kept_diagonal = matrix.clone(), diagonal.clone()
        for sketch in SKETCHES:
            Nystrom(dense(matrix), 5, sketch=sketch, diagonal=diagonal, block=2)
            Nystrom(dense(matrix), 5, sketch=sketch, block=2)
        assert torch.equal(matrix, kept)
        assert torch.equal(diagonal, kept_diagonal)

    def test_differentiable_in_rows_eigenvalues_and_damping_but_constant_in_its_source(self):
        matrix = kernel(8).requires_grad_()
        A = Nystrom(dense(matrix), 3, damping=0.5)
        assert not any(tensor.requires_grad for tensor in A.tensors)
        v = normal(8)

        def product(rows: Tensor, damping: Tensor, weights: Tensor) -> Tensor:
            return A.with_tensors((rows, damping, weights)) @ v

        def inverse_product(rows: Tensor, damping: Tensor, weights: Tensor) -> Tensor:
            return A.with_tensors((rows, damping, weights)).inverse() @ v

        tensors = tuple(tensor.detach().clone().requires_grad_() for tensor in A.tensors)
        assert torch.autograd.gradcheck(product, tensors)
        assert torch.autograd.gradgradcheck(product, tensors)
        assert torch.autograd.gradcheck(inverse_product, tensors)

    def test_damping_carries_its_derivative(self):
        matrix = kernel(8)
        v = normal(8)

        def value(damping: Tensor) -> Tensor:
            return v @ (Nystrom(dense(matrix), 8, damping=damping).inverse() @ v)

        damping = torch.tensor(0.3, dtype=FLOAT64)
        inverse = torch.linalg.inv(matrix + 0.3 * torch.eye(8, dtype=FLOAT64))
        close(torch.func.grad(value)(damping), -v @ inverse @ inverse @ v)

    @pytest.mark.parametrize("sketch", ["gaussian", "coordinate"])
    def test_vmap_over_matrices(self, sketch):
        factors = normal(4, 3, 7)
        matrices = factors.transpose(1, 2) @ factors
        v = normal(4, 7)

        def solve(matrix: Tensor, v: Tensor) -> Tensor:
            return Nystrom(dense(matrix), 3, damping=0.5, sketch=sketch).inverse() @ v

        result = torch.func.vmap(solve, randomness="same")(matrices, v)
        eye = torch.eye(7, dtype=FLOAT64)
        close(result, torch.linalg.solve(matrices + 0.5 * eye, v))

    def test_vmap_over_arguments_of_the_product(self):
        A = Nystrom(dense(kernel(9)), 4, damping=2.0)
        block = normal(5, 9)
        close(torch.func.vmap(lambda v: A @ v)(block), block @ A.to_dense())


class TestRefusals:
    @pytest.mark.parametrize("sketch", SKETCHES)
    def test_indefinite(self, sketch):
        eigenvalues = torch.linspace(1.0, -0.5, 12, dtype=FLOAT64)
        with pytest.raises(ValueError, match=r"Dense\(12, 12\) is not positive semidefinite"):
            Nystrom(dense(semidefinite(eigenvalues)), 12, sketch=sketch)

    def test_rounding_is_not_taken_for_indefinite(self):
        """A rank-one matrix in float32 has eigenvalues of either sign near 1e-8."""
        for seed in range(10):
            factor = normal(1, 50, seed=seed).float()
            matrix = factor.T @ factor
            assert torch.linalg.eigvalsh(matrix).min() < 0
            for sketch in SKETCHES:
                Nystrom(dense(matrix), 20, sketch=sketch)

    @pytest.mark.parametrize("sketch", ["gaussian", "coordinate"])
    def test_negative_eigenvalues_of_the_order_of_rounding_are_shifted_away(self, sketch):
        matrix = torch.diag(torch.tensor([1.0, 0.5, -2e-6]))
        A = Nystrom(dense(matrix), 3, sketch=sketch)
        torch.testing.assert_close(A.to_dense(), matrix, rtol=0, atol=1e-5)
        assert A.positive_semidefinite

    def test_not_known_symmetric(self):
        with pytest.raises(ValueError, match="not known to be symmetric"):
            Nystrom(ops.Dense(torch.eye(3)), 2)
        with pytest.raises(TypeError, match="A is a Tensor"):
            Nystrom(torch.eye(3), 2)

    def test_not_finite(self):
        matrix = torch.eye(4)
        matrix[0, 0] = torch.nan
        for sketch in ("gaussian", "coordinate"):
            with pytest.raises(ValueError, match="not finite"):
                Nystrom(Counting(matrix), 4, sketch=sketch)
        with pytest.raises(ValueError, match="diagonal"):
            Nystrom(Counting(matrix), 4, sketch="rpcholesky", diagonal=matrix.diagonal())

    def test_diagonal(self):
        A = Counting(kernel(6))
        with pytest.raises(ValueError, match="does not know its diagonal"):
            Nystrom(A, 2, sketch="rpcholesky")
        with pytest.raises(ValueError, match="check diagonal= and columns="):
            Nystrom(A, 2, sketch="rpcholesky", diagonal=torch.full((6,), 2.0, dtype=FLOAT64))
        with pytest.raises(ValueError, match=r"diagonal has shape \(5,\)"):
            Nystrom(A, 2, sketch="rpcholesky", diagonal=torch.ones(5, dtype=FLOAT64))
        with pytest.raises(TypeError, match="diagonal is torch"):
            Nystrom(A, 2, sketch="rpcholesky", diagonal=torch.ones(6))

    @pytest.mark.parametrize("sketch", ["coordinate", "rpcholesky"])
    def test_columns(self, sketch):
        matrix = kernel(6)
        with pytest.raises(ValueError, match=r"columns gave shape \([12], 6\)"):
            Nystrom(dense(matrix), 2, sketch=sketch, columns=lambda index: matrix[index])
        with pytest.raises(TypeError, match="columns gave torch"):
            Nystrom(dense(matrix), 2, sketch=sketch, columns=lambda i: matrix[:, i].float())

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rank": 0}, "rank=0"),
            ({"rank": 7}, "rank=7"),
            ({"rank": 2, "max_rank": 4}, "without tolerance"),
            ({"rank": 3, "max_rank": 2, "tolerance": 0.1}, "max_rank=2"),
            ({"rank": 2, "tolerance": 0.0}, "tolerance=0.0"),
            ({"rank": 2, "tolerance": 0.1, "power_iterations": 0}, "power_iterations=0"),
            ({"rank": 2, "power_iterations": -1}, "power_iterations=-1"),
            ({"rank": 2, "oversampling": -1}, "oversampling=-1"),
            ({"rank": 2, "block": 0}, "block=0"),
            ({"rank": 2, "damping": -1.0}, "damping=-1.0"),
            ({"rank": 2, "damping": float("nan")}, "damping=nan"),
            ({"rank": 2, "sketch": "uniform"}, "sketch='uniform'"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            Nystrom(dense(kernel(6)), **settings)

    def test_inverse_without_damping(self):
        with pytest.raises(ValueError, match="needs damping > 0"):
            Nystrom(dense(kernel(6)), 2).inverse()

    def test_what_reads_values_refuses_vmap_by_name(self):
        matrices = torch.stack([kernel(6), kernel(6, seed=1)])

        def build(matrix: Tensor, **options: object) -> Tensor:
            return Nystrom(dense(matrix), 2, **options).to_dense()

        for options, message in (
            ({"sketch": "rpcholesky"}, "rpcholesky"),
            ({"tolerance": 0.1}, "tolerance"),
        ):
            with pytest.raises(ValueError, match=message):
                torch.func.vmap(lambda m, s=options: build(m, **s), randomness="same")(matrices)
