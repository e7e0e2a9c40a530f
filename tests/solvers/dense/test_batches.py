"""Batches in the dense solvers: one factorisation for all, the right answer for each."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import operators as ops
import solvers
from operators import Space
from solvers import (
    DenseCholesky,
    DenseLU,
    LinearSolver,
    NotPositiveDefiniteError,
    SingularError,
)
from solvers.dense.ldl import DenseLDL
from solvers.dense.qr import QR
from solvers.dense.svd import SVD
from solvers.structured.triangular import Triangular

pytestmark = pytest.mark.filterwarnings("error::solvers.ConvergenceWarning")
BATCH, N = 5, 6
SOLVERS = [DenseCholesky(), DenseLU(), DenseLDL(), QR(), SVD(), Triangular()]
# What torch is asked for, once for all members.
KERNELS = {
    "DenseCholesky": "cholesky_ex",
    "DenseLU": "lu_factor_ex",
    "DenseLDL": "ldl_factor_ex",
    "QR": "qr",
    "SVD": "svd",
}


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrices(solver: LinearSolver) -> Tensor:
    """``(BATCH, N, N)`` that suit the solver, each of another size and condition."""
    root = sampled(BATCH, N, N)
    suited = {
        "DenseCholesky": root @ root.mT + torch.eye(N).double(),
        "DenseLDL": root + root.mT,
        "Triangular": root.tril() + 3 * torch.eye(N).double(),
    }
    scale = 10.0 ** torch.tensor([0.0, 30.0, -30.0, 3.0, -3.0], dtype=torch.float64)
    return scale[:, None, None] * suited.get(type(solver).__name__, root)


def stacked(solver: LinearSolver, matrices: Tensor) -> ops.Stacked:
    name = type(solver).__name__
    return ops.Stacked(
        [
            ops.Dense(
                M,
                symmetric=name in ("DenseCholesky", "DenseLDL"),
                lower_triangular=name == "Triangular",
            )
            for M in matrices
        ]
    )


def close(x: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Each member relative to its own size."""
    error = (x - expected).flatten(1).norm(dim=1)
    assert (error <= tolerance * expected.flatten(1).norm(dim=1)).all()


@pytest.fixture(params=SOLVERS, ids=lambda solver: type(solver).__name__)
def solver(request) -> LinearSolver:
    return request.param


@pytest.mark.parametrize("transpose", [False, True])
def test_each_member_has_its_own_answer(solver, transpose):
    A = matrices(solver)
    prepared = solver.prepare(stacked(solver, A))
    solve = prepared.solve_transpose if transpose else prepared.solve
    A = A.mT if transpose else A
    b = sampled(BATCH, N, 3, seed=1) * torch.tensor([1.0, 1e-20, 1e20]).double()
    x, info = solve(b[..., 0])
    assert info.converged
    close(x, torch.linalg.solve(A, b[..., 0]))
    # k vectors of the whole space, (BATCH * N, k)
    x, info = solve(b.reshape(BATCH * N, 3))
    assert info.converged
    expected = torch.linalg.solve(A, b)
    for k in range(3):
        close(x.reshape(BATCH, N, 3)[..., k], expected[..., k])


def test_one_factorisation_for_all(solver, monkeypatch):
    name = type(solver).__name__
    if name == "Triangular":  # nothing is factorised: one substitution
        name = KERNELS.get(name, "solve_triangular")
    kernel = KERNELS.get(name, name)
    calls, original = [], getattr(torch.linalg, kernel)

    def counted(matrix: Tensor, *args: object, **options: object) -> object:
        calls.append(matrix.shape)
        return original(matrix, *args, **options)

    monkeypatch.setattr(torch.linalg, kernel, counted)
    solver.prepare(stacked(solver, matrices(solver))).solve(sampled(BATCH, N))
    assert calls == [(BATCH, N, N)]


@pytest.mark.parametrize("kind", [DenseLU, QR, SVD])
def test_vmap_is_a_loop(kind):
    solver = kind()
    A, b = matrices(solver), sampled(BATCH, N, seed=2)
    mapped = torch.func.vmap(lambda M, c: solvers.solve(M, c, solver=solver))(A, b)
    loop = torch.stack([solvers.solve(M, c, solver=solver) for M, c in zip(A, b, strict=True)])
    close(mapped, loop, 1e-12)


def test_nested_members(solver):
    A = matrices(solver)
    if type(solver) is Triangular:
        return  # a Hessian is symmetric, and so not triangular
    A = (A + A.mT) / 2 if type(solver) is not DenseCholesky else A
    leaf = {"w": torch.zeros(2, 2).double(), "v": torch.zeros(2).double()}
    space = Space.of(leaf)

    def hessian(M: Tensor) -> ops.LinearOperator:
        def loss(y: dict[str, Tensor], M: Tensor) -> Tensor:
            flat = space.ravel(y)
            return flat @ M @ flat / 2

        return ops.Hessian(loss, leaf, M)

    b = sampled(BATCH, N, seed=3)
    nested = {"w": b[:, :4].reshape(BATCH, 2, 2), "v": b[:, 4:]}
    places = torch.arange(6).double()
    order = space.ravel({"w": places[:4].reshape(2, 2), "v": places[4:]}).long()
    prepared = solver.prepare(ops.Stacked.of(torch.func.vmap(hessian)(A)))
    x = prepared.solve(nested).value
    expected = torch.linalg.solve(A, b[:, order])
    close(torch.func.vmap(space.ravel)(x), expected, 1e-9)


@pytest.mark.parametrize(
    ("solver", "error", "message"),
    [
        (DenseCholesky(), NotPositiveDefiniteError, r"member 3 \(from 0\) of 5 of Dense\(6, 6\) is "
         "not positive definite: the leading minor of order 2 "),
        (DenseLU(), SingularError, r"member 3 \(from 0\) of .* is singular: pivot 2 of its LU"),
        (DenseLDL(), SingularError, r"member 3 \(from 0\) of .* is singular: entry \d of the diag"),
        (QR(), SingularError, r"member 3 \(from 0\) of .* full rank 6: column 1 \(from 0\)"),
        (Triangular(), SingularError, r"member 3 \(from 0\) of .*: row 1 \(from 0\) has a zero"),
    ],
)  # fmt: skip
def test_the_singular_member_is_named(solver, error, message):
    A = torch.eye(N).double().repeat(BATCH, 1, 1)
    A[3, 1, 1] = 0.0
    with pytest.raises(error, match=message):
        solver.prepare(stacked(solver, A))


def test_the_member_that_is_not_finite_is_named(solver):
    A = matrices(solver)
    A[2, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"member 2 \(from 0\) of 5 of .* holds NaN or infinite"):
        solver.prepare(stacked(solver, A))


def test_members_of_different_rank():
    A = torch.stack([torch.diag(torch.tensor(d)) for d in ([1.0, 2.0, 3.0], [4.0, 0.0, 0.0])])
    A = A.double()
    prepared = SVD().prepare(ops.Stacked([ops.Dense(M) for M in A]))
    assert prepared.rank == 1
    b = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).double()
    x, info = prepared.solve(b)
    torch.testing.assert_close(x, torch.tensor([[1.0, 1, 1], [1, 0, 0]]).double())
    assert info.converged
    assert info.residual == pytest.approx((61 / 77) ** 0.5)
    assert info.normal_residual < 1e-15


def test_a_bad_member_among_good_ones_is_told(solver):
    """The worst member decides, though the others are solved to the last digit."""
    A = matrices(solver)
    strict = dataclasses.replace(solver, rtol=0.0, strict=True)
    with pytest.raises(solvers.NotConvergedError, match="inaccurate"):
        strict.prepare(stacked(solver, A)).solve(sampled(BATCH, N))


def test_update_factorises_the_new_batch(solver):
    A = matrices(solver)
    prepared = solver.prepare(stacked(solver, A))
    updated = prepared.update(stacked(solver, 4 * A))
    b = sampled(BATCH, N)
    close(updated.solve(b).value, prepared.solve(b).value / 4, 1e-14)


def test_sparse_triangles_stay_sparse():
    values = torch.tensor([[2.0, 1.0, 4.0], [8.0, 1.0, 5.0]]).double()
    pattern = ops.Sparse(torch.tensor([[2.0, 0.0], [1.0, 4.0]]).double()).pattern
    stack = ops.Stacked([ops.Sparse(v, pattern) for v in values])
    prepared = Triangular().prepare(stack)
    assert prepared.factor_nonzeros == 6
    b = sampled(2, 2)
    dense = torch.stack([stack[i].to_dense() for i in range(2)])
    for solve, M in ((prepared.solve, dense), (prepared.solve_transpose, dense.mT)):
        close(solve(b).value, torch.linalg.solve(M, b), 1e-14)
