"""`Auto` and `explain`: what is chosen, why, and what happens where it fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import scipy.sparse
import torch
from torch import Tensor

import operators as ops
import solvers
from operators import LinearOperator
from solvers.auto import costs
from solvers.auto.automatic import PreparedAuto
from solvers.auto.plan import Candidate, Plan, Request, ordered
from tests.solvers.systems import Numbers, gram, known_by_products, near_identity, poisson

DOUBLE = torch.float64
r = Numbers(0, DOUBLE)


def spd(n: int) -> LinearOperator:
    return ops.Dense(gram(r(n, n)), positive_definite=True)


def grid(*sizes: int) -> LinearOperator:
    return ops.Sparse.from_scipy(poisson(*sizes), symmetric=True)


FIRST: dict[str, tuple[Callable[[], LinearOperator], str]] = {
    "diagonal": (lambda: ops.Diagonal(1 + r(50) ** 2), "Diagonal"),
    "permutation": (lambda: ops.Permutation(torch.arange(9).flip(0), dtype=DOUBLE), "Permutation"),
    "triangular": (lambda: ops.Dense(near_identity(r(9, 9)).tril()), "Triangular"),
    "circulant": (lambda: ops.Circulant(3 * torch.eye(9, dtype=DOUBLE)[0] + 0.1), "Circulant"),
    "toeplitz": (lambda: ops.Toeplitz(0.5 ** torch.arange(3000, dtype=DOUBLE)), "Toeplitz"),
    "kronecker": (lambda: ops.Kronecker(spd(20), spd(30)), "Kronecker"),
    "kronecker sum": (lambda: ops.KroneckerSum(spd(20), spd(30)), "Kronecker"),
    "shifted kronecker": (
        lambda: ops.Kronecker(spd(20), spd(30)) + 0.1 * ops.Identity(600),
        "Kronecker",
    ),
    "blocks": (lambda: ops.BlockDiagonal(*(spd(40) for _ in range(20))), "BlockDiagonal"),
    "low rank": (lambda: ops.LowRankPlusDiagonal(r(5, 4000), 1.0), "Woodbury"),
    "dense, definite": (lambda: spd(60), "DenseCholesky"),
    "dense": (lambda: ops.Dense(near_identity(r(60, 60))), "DenseLU"),
    "sparse, plane": (lambda: grid(60, 60), "SparseCholesky"),
    "sparse, not symmetric": (
        lambda: grid(40, 40) @ ops.Diagonal(1 + torch.rand(1600, dtype=DOUBLE)),
        "SparseLU",
    ),
    "hessian, small": (
        lambda: ops.Hessian(lambda y: y.square().sum() + y.cosh().sum(), r(30)),
        "DenseCholesky",
    ),
    "tall": (lambda: ops.Dense(r(300, 20)), "QR"),
    "sparse, tall": (lambda: _tall(), "LSMR"),
}


def _tall() -> LinearOperator:
    import scipy.sparse

    matrix = scipy.sparse.random(3000, 500, density=0.01, random_state=0)
    return ops.Sparse.from_scipy(matrix + scipy.sparse.eye(3000, 500))


@pytest.mark.parametrize("kind", FIRST)
def test_what_goes_first(kind):
    build, name = FIRST[kind]
    A = build()
    plan = solvers.explain(A)
    known = [c for c in plan.candidates if c.trial is None]
    assert type(known[0].solver).__name__ == name
    b = A @ r(A.shape[1])
    x, info = solvers.solve(A, b, return_info=True)
    assert info.converged
    assert torch.linalg.vector_norm(A @ x - b) <= 1e-7 * torch.linalg.vector_norm(b)


def test_the_plan_prints_its_reasons():
    text = str(solvers.explain(grid(60, 60)))
    first, *chain = text.splitlines()
    assert first.startswith("Sparse(3600, 3600) float64; symmetric; 17760 nonzeros")
    assert [line[:3] for line in chain] == [f"{i}. " for i in range(1, len(chain) + 1)]
    assert any("SparseCholesky (about " in line and "nonzeros in L" in line for line in chain)
    assert any("AMG" in line and "multigrid" in line for line in chain)
    assert all(": " in line for line in chain)


def test_the_answer_says_who_gave_it_and_why():
    info = solvers.solve(spd(20), r(20), return_info=True).info
    assert info.solver.startswith("Auto: DenseCholesky(")
    assert "chosen by Auto: dense, positive definite" in info.reason


def test_a_raw_matrix_is_looked_at():
    symmetric = gram(r(30, 30))
    assert solvers.explain(symmetric).candidates[0].name == "DenseCholesky"
    assert solvers.explain(near_identity(r(30, 30))).candidates[0].name == "DenseLU"


class TestFallBack:
    def test_an_indefinite_matrix_goes_on_from_cholesky(self):
        M = torch.diag(torch.tensor([3.0, -1.0, 2.0, -4.0], dtype=DOUBLE)) + 0.1
        b = r(4)
        x, info = solvers.solve(M, b, return_info=True)
        torch.testing.assert_close(x, torch.linalg.solve(M, b))
        assert info.converged
        assert "before it failed" in info.reason
        assert "not positive definite" in info.reason

    def test_what_failed_is_not_tried_again(self):
        prepared = solvers.Auto().prepare(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=DOUBLE))
        first = prepared._current
        assert first > 0
        prepared.solve(r(2))
        assert prepared._current >= first

    def test_a_singular_but_consistent_system_is_solved(self):
        M = near_identity(r(12, 12))
        M[:, 3] = M[:, 7]
        b = M @ r(12)
        x, info = solvers.solve(M, b, return_info=True)
        assert info.converged
        assert torch.linalg.vector_norm(M @ x - b) <= 1e-7 * torch.linalg.vector_norm(b)

    def test_an_inconsistent_one_is_not_called_solved(self):
        M = torch.zeros(5, 5, dtype=DOUBLE)
        M[0, 0] = 1.0
        with pytest.warns(solvers.ConvergenceWarning):
            info = solvers.solve(M, torch.ones(5, dtype=DOUBLE), return_info=True).info
        assert not info.converged
        with pytest.raises(solvers.NotConvergedError):
            solvers.solve(M, torch.ones(5, dtype=DOUBLE), solver=solvers.Auto(strict=True))

    def test_without_cholmod(self, monkeypatch):
        from solvers.sparse import cholmod

        monkeypatch.setattr(cholmod, "available", lambda: False)
        names = [c.name for c in solvers.explain(grid(40, 40)).candidates]
        assert {"SparseCholesky", "SparseLU"} <= {*names}
        b = torch.ones(1600, dtype=DOUBLE)
        windy = grid(40, 40) @ ops.Diagonal(1 + torch.rand(1600, dtype=DOUBLE))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", solvers.FallbackWarning)
            x, info = solvers.solve(grid(40, 40), b, return_info=True)
            assert "SparseLU" in [c.name for c in solvers.explain(windy).candidates]
        assert info.converged
        assert x.shape == (1600,)

    def test_where_cholmod_does_not_tell_its_fill(self, monkeypatch):
        from solvers.auto import choice

        def silent(A):
            raise solvers.MissingLibraryError("no counts")

        monkeypatch.setattr(choice, "analyse", silent)
        A, b = grid(40, 40), torch.ones(1600, dtype=DOUBLE)
        x, info = solvers.solve(A, b, return_info=True)
        assert info.converged
        assert torch.linalg.vector_norm(A @ x - b) <= 1e-7 * torch.linalg.vector_norm(b)

    def test_rank_deficient_least_squares_end_at_the_shortest_minimiser(self):
        M = r(20, 6)
        M[:, 5] = M[:, 0] - M[:, 1]
        b = r(20)
        x, info = solvers.solve(M, b, return_info=True)
        torch.testing.assert_close(x, torch.linalg.pinv(M) @ b)
        assert info.converged


class TestTrials:
    """An iteration that may be short is tried for a share of the cost of the next solver."""

    def operator(self, values: Tensor) -> LinearOperator:
        n = len(values)
        basis, _ = torch.linalg.qr(r(n, n))
        M = basis @ torch.diag(values) @ basis.T
        return ops.FunctionOperator(
            lambda v, M: M @ v, torch.zeros(n, dtype=DOUBLE), (M + M.T) / 2, positive_definite=True
        )

    def plan_of(self, iteration: float, direct: float) -> list[Candidate]:
        found = [
            Candidate(solvers.CG(), "open", iteration=iteration),
            Candidate(solvers.DenseLU(), "known", setup=direct),
        ]
        return list(ordered("A", found, Request({}, 1e-8, 2, 1e9)).candidates)

    def test_the_trial_is_a_share_of_the_next_ones_cost(self):
        open_ended, known = self.plan_of(1e-3, 1.0)
        assert open_ended.trial == int(costs.TRIAL * 1.0 / 1e-3)
        assert known.trial is None

    def test_no_trial_where_it_would_be_too_short_to_tell(self):
        first, second = self.plan_of(1e-1, 1.0)
        assert first.name == "DenseLU"
        assert second.trial is None

    def test_few_eigenvalues_are_found_by_the_trial(self):
        A = self.operator(torch.tensor([1.0, 2.0, 5.0], dtype=DOUBLE).repeat(100))
        prepared = solvers.Auto().prepare(A)
        info = prepared.solve(r(300)).info
        assert info.converged

    def test_a_long_iteration_gives_way(self):
        A = self.operator(torch.logspace(0, 9, 300, dtype=DOUBLE))
        info = solvers.Auto().prepare(A).solve(r(300)).info
        assert info.converged
        assert "Dense" in info.solver

    def test_a_transposed_solve_is_carried_on_too(self):
        n = 300
        A = known_by_products(torch.linspace(1, 60, n, dtype=DOUBLE))
        chain = (
            Candidate(solvers.GMRES(rtol=1e-8), "open", iteration=1e-6, trial=10),
            Candidate(solvers.DenseLU(rtol=1e-8), "known", setup=1.0),
        )
        prepared = PreparedAuto(solvers.Auto(rtol=1e-8), A, Plan("A", chain, solves=2))
        for solve in (prepared.solve_transpose, prepared.solve):
            info = solve(torch.ones(n, dtype=DOUBLE)).info
            assert "GMRES" in info.solver
            assert info.iterations > 10

    def test_a_stale_preconditioner_is_renewed(self):
        n = 3000

        first = torch.logspace(0, 4, n, dtype=DOUBLE)
        A, C = (
            ops.Sparse.from_scipy(scipy.sparse.diags_array(d.numpy(), format="csr"), symmetric=True)
            for d in (first, first.flip(0))
        )
        solver = solvers.CG(rtol=1e-8, preconditioner=solvers.Jacobi(), maxiter=30_000)
        chain = (
            Candidate(solver, "open", iteration=1e-7, trial=10),
            Candidate(solvers.SparseLU(rtol=1e-8), "known", setup=1.0),
        )
        prepared = PreparedAuto(solvers.Auto(rtol=1e-8), A, Plan("A", chain, solves=2))
        b = r(n)
        quick = prepared.solve(b).info.iterations
        updated = prepared.update(C)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", solvers.ConvergenceWarning)
            updated.solve(b)
        again = updated.solve(b).info
        assert again.iterations <= 2 * quick
        assert updated.update(A).plan is prepared.plan


class TestMemory:
    def test_where_nothing_fits_that_is_said(self):
        for A in (spd(50), ops.BlockDiagonal(spd(40), spd(40))):
            with pytest.raises(solvers.StructureError, match="is left out: it would take"):
                solvers.Auto(memory=1.0).prepare(A)

    def test_what_does_not_fit_is_left_out_and_named(self):
        plan = solvers.explain(grid(60, 60), solvers.Auto(memory=5e5))
        assert not any("SparseCholesky" in c.name for c in plan.candidates)
        assert any("SparseCholesky is left out" in line for line in plan.refused)
        assert "budget is 500 kB" in str(plan)

    def test_it_is_solved_all_the_same(self):
        A, b = grid(40, 40), torch.ones(1600, dtype=DOUBLE)
        x, info = solvers.solve(A, b, solver=solvers.Auto(memory=4e5), return_info=True)
        assert info.converged
        assert torch.linalg.vector_norm(A @ x - b) <= 1e-7 * torch.linalg.vector_norm(b)


def test_a_batch_of_dense_matrices_is_factorised_as_one():
    matrices = gram(r(8, 5, 5))
    stack = ops.Stacked([ops.Dense(M, symmetric=True) for M in matrices])
    b = r(8, 5)
    prepared = solvers.Auto().prepare(stack)
    x, info = prepared.solve(b)
    torch.testing.assert_close(x, torch.linalg.solve(matrices, b))
    assert info.converged
    assert type(prepared).__name__ == "PreparedAuto"


def test_update_keeps_the_choice():
    first, second = grid(30, 30), 2.0 * grid(30, 30)
    prepared = solvers.Auto().prepare(first)
    updated = prepared.update(second)
    b = torch.ones(900, dtype=DOUBLE)
    torch.testing.assert_close(2 * updated.solve(b).value, prepared.solve(b).value)
    assert updated.plan is prepared.plan


def test_transposed_and_blocks():
    A, B = ops.Dense(near_identity(r(9, 9))), r(9, 3)
    prepared = solvers.Auto().prepare(A)
    torch.testing.assert_close(
        prepared.solve_transpose(B).value, torch.linalg.solve(A.to_dense().T, B)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"solves": 0}, "solves=0; expected at least 1"), ({"memory": 0.0}, "memory=0.0; expected")],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        solvers.Auto(**settings)


def test_nothing_but_operators_and_matrices():
    with pytest.raises(TypeError, match="A is a list; expected an operator"):
        solvers.explain([[1.0]])
    with pytest.raises(ValueError, match="NaN or infinite"):
        solvers.solve(torch.full((3, 3), float("nan")), torch.ones(3))


def test_a_guess_is_taken():
    """By an iteration; to a factorisation it does no harm."""
    n = 2000
    values = torch.linspace(1, 3, n, dtype=DOUBLE)
    A = known_by_products(values, positive_definite=True)
    b = r(n)
    prepared = solvers.Auto(rtol=1e-6, memory=1e6).prepare(A)
    near = b / values * (1 + 1e-4 * r(n))
    info = prepared.solve(b, guess=near).info
    assert "CG" in info.solver
    assert info.iterations < prepared.solve(b).info.iterations
    M = spd(20)
    x = solvers.Auto().prepare(M).solve(b[:20], guess=r(20)).value
    torch.testing.assert_close(M @ x, b[:20])
