"""Derivatives of least squares: the pseudo-inverse differentiated by torch is the oracle.

Golub and Pereyra (1973) for tall, wide and square A of full rank; and finite differences.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import operators as ops
import solvers
from solvers import ConvergenceWarning, LinearSolver, PreparedSolver, StructureError
from solvers.dense.qr import QR
from solvers.dense.svd import SVD
from solvers.linear_solver import Progress

pytestmark = pytest.mark.filterwarnings("error::solvers.ConvergenceWarning")
SHAPES = [(6, 3), (3, 6), (4, 4)]
Function = Callable[[Tensor, Tensor], Tensor]


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(A: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.pinv(A) @ b


def by(solver: LinearSolver) -> Function:
    return lambda A, b: solvers.solve(A, b, solver=solver)


def loss(function: Function) -> Function:
    """A scalar with curvature in x, and a direct part in b."""
    return lambda A, b: function(A, b).sin().sum() + b.square().sum()


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.fixture(params=[QR(), SVD()], ids=lambda solver: type(solver).__name__)
def solver(request) -> LinearSolver:
    return request.param


@pytest.fixture(params=SHAPES, ids=str)
def shape(request) -> tuple[int, int]:
    return request.param


@pytest.fixture
def data(shape) -> tuple[Tensor, Tensor]:
    return sampled(*shape), sampled(shape[0], seed=1)


def test_gradient(solver, data):
    close(grad(loss(by(solver)), (0, 1))(*data), grad(loss(oracle), (0, 1))(*data))


def test_jacobians_both_ways(solver, data):
    expected = jacrev(oracle, (0, 1))(*data)
    close(jacrev(by(solver), (0, 1))(*data), expected)
    close(jacfwd(by(solver), (0, 1))(*data), expected)


def test_forward_mode(solver, data, shape):
    directions = sampled(*shape, seed=2), sampled(shape[0], seed=3)
    close(jvp(by(solver), data, directions), jvp(oracle, data, directions))
    A, b = data
    for one, index in ((A, 0), (b, 1)):
        ours, theirs = (
            jvp(lambda t, f=f, i=index: f(*((t, b) if i == 0 else (A, t))), (one,),
                (directions[index],))
            for f in (by(solver), oracle)
        )  # fmt: skip
        close(ours, theirs)


def test_second_order(solver, data):
    expected = hessian(loss(oracle), (0, 1))(*data)
    close(hessian(loss(by(solver)), (0, 1))(*data), expected)
    close(jacrev(jacrev(loss(by(solver)), (0, 1)), (0, 1))(*data), expected)


@pytest.mark.parametrize("small", [(3, 2), (2, 3)], ids=str)
def test_finite_differences(solver, small):
    leaves = [sampled(*small).requires_grad_(), sampled(small[0], seed=1).requires_grad_()]
    assert torch.autograd.gradcheck(by(solver), leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(by(solver), leaves)


def test_backward(solver, data):
    results = []
    for function in (by(solver), oracle):
        leaves = [t.clone().requires_grad_() for t in data]
        loss(function)(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    close(*results)


def test_blocks(solver, shape):
    A, B = sampled(*shape), sampled(shape[0], 3, seed=1)
    close(by(solver)(A, B), oracle(A, B))
    close(grad(loss(by(solver)), (0, 1))(A, B), grad(loss(oracle), (0, 1))(A, B))


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap(solver, shape, in_dims):
    A = sampled(*((4, *shape) if in_dims[0] == 0 else shape))
    b = sampled(*((4, shape[0]) if in_dims[1] == 0 else shape[:1]), seed=1)
    close(vmap(by(solver), in_dims)(A, b), vmap(oracle, in_dims)(A, b))
    for derivative in (grad, hessian):
        ours = vmap(derivative(loss(by(solver)), (0, 1)), in_dims)(A, b)
        close(ours, vmap(derivative(loss(oracle), (0, 1)), in_dims)(A, b))

    def total(function: Function) -> Function:
        return lambda A, b: vmap(function, in_dims)(A, b).sin().sum()

    close(grad(total(by(solver)), (0, 1))(A, b), grad(total(oracle), (0, 1))(A, b))


def test_vmap_inside_vmap(solver, shape):
    A, b = sampled(2, 3, *shape), sampled(2, shape[0], seed=1)
    nested = [vmap(vmap(function, (0, None)))(A, b) for function in (by(solver), oracle)]
    close(*nested)


def test_a_batch_is_factorised_as_one(monkeypatch):
    calls, original = [], torch.linalg.qr

    def counted(matrix: Tensor, *args: object) -> object:
        calls.append(matrix.shape)
        return original(matrix, *args)

    monkeypatch.setattr(torch.linalg, "qr", counted)
    A, b = sampled(5, 6, 3), sampled(5, 6)
    vmap(grad(loss(by(QR())), (0, 1)))(A, b)
    assert set(calls) == {(5, 6, 3)}


@pytest.mark.parametrize("transpose", [False, True])
def test_prepared_once(solver, shape, transpose):
    """Derivatives of a prepared solver, within torch.func and by backward."""
    A, b = sampled(*shape), sampled(shape[1] if transpose else shape[0], seed=1)

    def ours(A: Tensor, b: Tensor) -> Tensor:
        prepared = solver.prepare(A)
        return (prepared.solve_transpose if transpose else prepared.solve)(b).value

    def theirs(A: Tensor, b: Tensor) -> Tensor:
        return oracle(A.T if transpose else A, b)

    close(grad(loss(ours), (0, 1))(A, b), grad(loss(theirs), (0, 1))(A, b))
    close(jvp(ours, (A, b), (A.sin(), b.sin())), jvp(theirs, (A, b), (A.sin(), b.sin())))
    results = []
    for function in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in (A, b)]
        first = torch.autograd.grad(loss(function)(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append([*first, *second])
    close(*results)


@pytest.mark.parametrize("transpose", [False, True])
def test_a_prepared_batch(solver, shape, transpose):
    A, b = sampled(3, *shape), sampled(3, shape[1] if transpose else shape[0], seed=1)
    results = []
    for stacked in (True, False):
        leaves = [t.clone().requires_grad_() for t in (A, b)]
        if stacked:
            stack = ops.Stacked.of(vmap(ops.Dense)(leaves[0]))
            prepared = solver.prepare(stack)
            x = (prepared.solve_transpose if transpose else prepared.solve)(leaves[1]).value
        else:
            x = vmap(oracle)(leaves[0].mT if transpose else leaves[0], leaves[1])
        x.sin().sum().backward()
        results.append([x.detach(), *(leaf.grad for leaf in leaves)])
    close(*results)


@pytest.mark.parametrize("tall", [True, False])
def test_at_the_nonzeros_of_a_sparse_matrix(solver, tall):
    dense = torch.where(sampled(8, 4, seed=3) > 0, sampled(8, 4), 0.0)
    dense = dense + torch.eye(8, 4).double() * 2
    dense = dense if tall else dense.T.contiguous()
    A, b = ops.Sparse(dense), sampled(len(dense), seed=1)

    def ours(values: Tensor) -> Tensor:
        return solvers.solve(ops.Sparse(values, A.pattern), b, solver=solver).sin().sum()

    def theirs(values: Tensor) -> Tensor:
        places = A.pattern.rows, A.pattern.columns
        return oracle(torch.zeros_like(dense).index_put(places, values), b).sin().sum()

    close(grad(ours)(A.values), grad(theirs)(A.values))


def test_of_a_jacobian(solver):
    """A Gauss-Newton step, differentiated with respect to what the residual depends on."""
    y, t, weights = sampled(3), sampled(7, seed=1), sampled(7, 3, seed=2)

    def residual(y: Tensor, t: Tensor) -> Tensor:
        return (weights @ y).sin() - t * y.sum()

    def ours(t: Tensor) -> Tensor:
        return solvers.solve(ops.Jacobian(residual, y, t), residual(y, t), solver=solver)

    def theirs(t: Tensor) -> Tensor:
        return oracle(jacrev(residual)(y, t), residual(y, t))

    close(jacrev(ours)(t), jacrev(theirs)(t))


# --- where A does not have full rank ----------------------------------------------------------

LOW = torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize("matrix", [LOW, LOW.T.contiguous(), LOW[:2]], ids=["tall", "wide", "sq"])
def test_by_b_alone_any_rank_will_do(matrix):
    b = sampled(len(matrix))
    close(jacrev(lambda b: solvers.solve(matrix, b, solver=SVD()))(b), torch.linalg.pinv(matrix))
    close(jacfwd(lambda b: solvers.solve(matrix, b, solver=SVD()))(b), torch.linalg.pinv(matrix))


@pytest.mark.parametrize("matrix", [LOW, LOW.T.contiguous(), LOW[:2]], ids=["tall", "wide", "sq"])
def test_by_A_full_rank_is_needed(matrix):
    b = sampled(len(matrix))
    close(solvers.solve(matrix, b, solver=SVD()), torch.linalg.pinv(matrix) @ b)
    with pytest.raises(StructureError, match=r"SVD solves Dense\(.*\) at rank 1: .* full rank 2"):
        grad(lambda A: solvers.solve(A, b, solver=SVD()).sum())(matrix)
    with pytest.raises(StructureError, match="at rank 1"):
        jvp(lambda A: solvers.solve(A, b, solver=SVD()), (matrix,), (torch.ones_like(matrix),))


@pytest.mark.parametrize("shape", [(6, 3), (3, 6)], ids=str)
def test_a_rank_that_is_cut_off(shape):
    """By b it is the truncated pseudo-inverse; by A the rule would be that of another matrix."""
    A, b, solver = sampled(*shape), sampled(shape[0], seed=1), SVD(rank=2)
    U, s, Vt = torch.linalg.svd(A, full_matrices=False)
    cut = (Vt[:2].T / s[:2]) @ U[:, :2].T
    close(solvers.solve(A, b, solver=solver), cut @ b)
    close(jacrev(lambda b: solvers.solve(A, b, solver=solver))(b), cut)
    with pytest.raises(StructureError, match=r"at rank 2: .* full rank 3, kept in full"):
        grad(lambda A: solvers.solve(A, b, solver=solver).sum())(A)


# --- who is asked, and what it says ---------------------------------------------------------------


class _Counted(PreparedSolver):
    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        self.solver.asked.append("A+")
        return self.solver.gain * torch.linalg.pinv(self.A.to_dense()) @ block, Progress()

    def _solve_transpose(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        self.solver.asked.append("A+T")
        return torch.linalg.pinv(self.A.to_dense()).T @ block, Progress()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Counted(LinearSolver):
    """Notes which of the two it is asked for; a gain other than one makes its solutions wrong."""

    least_squares = True
    gain: float = 1.0
    asked: list[str] = dataclasses.field(default_factory=list)

    def _prepare(self, A: ops.LinearOperator) -> PreparedSolver:
        return _Counted(self, A)


def test_without_derivatives_the_solver_runs_alone(shape, data):
    solver = Counted()
    solvers.solve(*data, solver=solver)
    assert solver.asked == ["A+"]
    with torch.no_grad():
        solvers.solve(*(t.clone().requires_grad_() for t in data), solver=solver)
    assert solver.asked == ["A+", "A+"]


def test_a_gradient_by_b_takes_one_solve_more(shape, data):
    A, b = data
    solver = Counted()
    grad(lambda b: solvers.solve(A, b, solver=solver).sum())(b)
    # Tall: x, then z and A^+ z, whose image is z again. Wide: x; then y.
    assert solver.asked.count("A+T") == 1
    assert len(solver.asked) <= 3


def test_the_worst_solve_is_what_info_is_of(shape, data):
    A, b = data
    if shape[0] > shape[1]:
        return  # only of a wide A does the value itself take two solves where A moves
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        x, info = solvers.solve(A.requires_grad_(), b, solver=Counted(gain=1.01), return_info=True)
    assert not info.converged
    close(x.detach(), 1.01 * oracle(A.detach(), b))


def test_a_derivative_that_was_not_solved_is_a_warning(shape, data):
    A, b = data
    solver = Counted(gain=1.5)
    with pytest.warns(ConvergenceWarning, match=r"Counted on Dense.*inaccurate"):
        grad(lambda b: solvers.solve(A, b, solver=solver).sum())(b)
    strict = dataclasses.replace(solver, strict=True)
    with pytest.raises(solvers.NotConvergedError):
        solvers.solve(A, b, solver=strict)


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_wrong_minimum_is_found_out_at_any_scale(dtype, size):
    """``|A^T r| / (|A| |r|)`` neither vanishes nor overflows where squares do."""
    if not torch.finfo(dtype).tiny < 1e-2 * size < 1e2 * size < torch.finfo(dtype).max:
        return
    A, b = (size * sampled(6, 3)).to(dtype), sampled(6, seed=1).to(dtype)
    right = Counted().prepare(A).solve(b).info
    assert right.converged
    assert right.normal_residual < 10 * torch.finfo(dtype).eps
    with pytest.warns(ConvergenceWarning, match="inaccurate"):
        wrong = Counted(gain=1.2).prepare(A).solve(b).info
    assert 1e-3 < wrong.normal_residual < 1


def test_a_tensor_that_is_closed_over_is_refused(solver):
    c = sampled(6).requires_grad_()
    A = ops.Jacobian(lambda y: torch.stack([c @ c * y[0], y[1], y[0] * y[1]]), sampled(2))
    with pytest.raises(ValueError, match="closes over a tensor"):
        solvers.solve(A, sampled(3), solver=solver)


def test_integrated_in_a_larger_program():
    """A ridge path through rows ``sqrt(l) I``: the hypergradient of the validation loss."""
    X, y, held = sampled(20, 5), sampled(20, seed=1), sampled(8, 5, seed=2)
    target = sampled(8, seed=3)

    def validation(log_l: Tensor, solve: Function) -> Tensor:
        rows = torch.cat([X, (log_l / 2).exp() * torch.eye(5).double()])
        x = solve(rows, torch.cat([y, torch.zeros(5).double()]))
        return (held @ x - target).square().mean()

    def closed(rows: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.solve(rows.T @ rows, rows.T @ b)

    at = torch.tensor(0.3, dtype=torch.float64)
    for derivative in (grad, lambda f: grad(grad(f))):
        ours = derivative(lambda s: validation(s, by(QR())))(at)
        close(ours, derivative(lambda s: validation(s, closed))(at))
