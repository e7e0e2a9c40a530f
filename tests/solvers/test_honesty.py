"""Ways to a silent error that somebody found, each closed: right, or refused with the remedy."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap

import operators as ops
import solvers
from solvers.threads import one_blas_thread
from tests.solvers.systems import Numbers, gram, near_identity

DOUBLE = torch.float64
N = 8
r = Numbers(3, DOUBLE)
S = gram(r(N, N)) + torch.eye(N, dtype=DOUBLE)
b = r(N)
t0 = r(N).abs()
SPD = ops.Dense(S, positive_definite=True)


class TestLowRank:
    """A least-squares solution has a derivative by A only where the rank is full, and stays so."""

    U, V, right, w = r(12, 2), r(2, 4), r(12), r(4)

    @pytest.mark.parametrize(
        "solver", [solvers.Auto(), solvers.LSMR(rtol=1e-12), solvers.SVD()], ids=lambda s: type(s)
    )
    def test_refused(self, solver):
        def loss(V: Tensor) -> Tensor:
            return solvers.solve(self.U @ V, self.right, solver=solver) @ self.w

        with pytest.raises(solvers.StructureError, match="rank"):
            grad(loss)(self.V)
        M = self.U @ self.V
        by_b = grad(lambda b: solvers.solve(M, b, solver=solver) @ self.w)
        expected = torch.linalg.pinv(M, rtol=1e-10).T @ self.w
        torch.testing.assert_close(by_b(self.right), expected, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("shape", [(12, 4), (4, 12)])
    @pytest.mark.parametrize(
        "solver", [solvers.Auto(rtol=1e-12), solvers.LSMR(rtol=1e-12)], ids=lambda s: type(s)
    )
    def test_full_rank_is_right(self, solver, shape):
        M, right, w = r(*shape), r(shape[0]), r(shape[1])
        found = grad(lambda M: solvers.solve(M, right, solver=solver) @ w)(M)
        expected = grad(lambda M: torch.linalg.pinv(M) @ right @ w)(M)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "solver",
    [solvers.CG(), solvers.DenseLU(), solvers.GMRES(), solvers.Auto(), solvers.LSMR()],
    ids=lambda s: type(s),
)
def test_hidden_tensors_of_a_prepared_solver(solver):
    """b is not differentiated, and A is only by a tensor that a function inside it reaches."""

    def operator(t: Tensor) -> ops.LinearOperator:
        return ops.FunctionOperator(lambda y: t * y + S @ y, torch.zeros(N, dtype=DOUBLE),
                                    rmatvec=lambda y: t * y + S @ y)  # fmt: skip

    if isinstance(solver, solvers.CG):

        def operator(t: Tensor) -> ops.LinearOperator:
            return ops.Hessian(lambda y: (t * y**2).sum() + y @ S @ y / 2, torch.zeros_like(b))

    prepared = lambda t: solver.prepare(operator(t)).solve(b).value.sum()  # noqa: E731
    for transform in (grad(prepared), lambda t: jvp(prepared, (t,), (t,))):
        with pytest.raises(ValueError, match="hand it over as an argument"):
            transform(t0)
    with pytest.raises(ValueError, match="hand it over as an argument"):
        prepared(t0.clone().requires_grad_())
    with torch.no_grad():
        assert torch.isfinite(prepared(t0.clone().requires_grad_()))


def test_hidden_duals():
    with forward_ad.dual_level():
        t = forward_ad.make_dual(t0, t0)
        A = ops.FunctionOperator(lambda y: t * y + S @ y, torch.zeros_like(b), symmetric=True)
        with pytest.raises(ValueError, match="hand it over as an argument"):
            solvers.solve(A, b, solver=solvers.CG())


@pytest.mark.parametrize("prepared", [False, True])
def test_a_reached_tensor_that_changes_before_the_derivative(prepared):
    m, theta = torch.ones(N, dtype=DOUBLE), t0.clone().requires_grad_()
    H = ops.Hessian(lambda y, t: (m * t * y**2).sum() + y @ S @ y / 2, torch.zeros_like(b), theta)
    x = solvers.CG().prepare(H).solve(b).value if prepared else solvers.solve(H, b)
    m.mul_(5.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(x.sum(), theta)


@pytest.mark.parametrize(
    "kind", [solvers.Richardson, solvers.MINRES, solvers.CG, solvers.GMRES, solvers.BiCGStab]
)
def test_a_preconditioner_that_works_in_place(kind):
    d = S.diagonal().clone()
    right = b.clone()
    x, info = kind(preconditioner=lambda v: v.div_(d), rtol=1e-9).prepare(SPD).solve(right)
    assert info.converged
    assert torch.linalg.vector_norm(b - S @ x) <= 1e-8 * torch.linalg.vector_norm(b)
    torch.testing.assert_close(right, b, rtol=0, atol=0)


@pytest.mark.parametrize("prepared", [False, True])
def test_an_absolute_tolerance_is_for_b(prepared):
    """The adjoint of a small loss has a small right-hand side: not one that is zero."""
    solver = solvers.CG(atol=1e-8, rtol=1e-10, strict=True)

    def loss(b: Tensor) -> Tensor:
        x = solver.prepare(SPD).solve(b).value if prepared else solvers.solve(SPD, b, solver=solver)
        return 1e-9 * x.sum()

    expected = 1e-9 * torch.linalg.solve(S, torch.ones_like(b))
    torch.testing.assert_close(grad(loss)(b), expected, rtol=1e-7, atol=0)
    leaf = b.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(jvp(loss, (b,), (1e-9 * b,))[1], 1e-9 * (expected @ b), rtol=1e-7,
                               atol=0)  # fmt: skip
    # For b itself it holds.
    assert solver.prepare(SPD).solve(1e-9 * b).info.iterations == 0


def test_numbers_below_the_normal_ones():
    for dtype, size in ((torch.float32, 1e-40), (DOUBLE, 1e-310)):
        A = ops.Dense(S.to(dtype), positive_definite=True)
        x, info = solvers.CG().prepare(A).solve(torch.full((N,), size, dtype=dtype))
        assert info.converged
        assert bool((x != 0).any())


def test_tiny_matrices():
    for scale, dtype in ((1e-200, DOUBLE), (1e-25, torch.float32)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x, info = solvers.BiCGStab().prepare((S * scale).to(dtype)).solve(b.to(dtype))
        assert not info.converged or torch.isfinite(x).all()


def test_a_permutation_made_inside_a_transform():
    def loss(M: Tensor, b: Tensor) -> Tensor:
        P = ops.Permutation(torch.tensor([2, 0, 1, 3]))
        return solvers.solve(P @ ops.Dense(M), b).sum()

    M, right = near_identity(r(4, 4)), r(4)
    P = torch.eye(4, dtype=DOUBLE)[[2, 0, 1, 3]]
    plain = lambda M, b: torch.linalg.solve(P @ M, b).sum()  # noqa: E731
    torch.testing.assert_close(jacrev(jacrev(loss))(M, right), jacrev(jacrev(plain))(M, right))
    batch = torch.stack([M, 2 * M]), torch.stack([right, right])
    torch.testing.assert_close(vmap(grad(loss))(*batch), vmap(grad(plain))(*batch))


@pytest.mark.parametrize("solver", [solvers.Auto(), solvers.CG(), solvers.DenseLU()], ids=repr)
def test_autocast_does_not_reach_inside(solver):
    single, right = S.float(), b.float()
    plain = lambda S: solvers.solve(ops.Dense(S, symmetric=True), right, solver=solver)  # noqa: E731
    outside = plain(single), grad(lambda S: plain(S).sum())(single)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = plain(single), grad(lambda S: plain(S).sum())(single)
        along = jvp(plain, (single,), (single,))[1]
    torch.testing.assert_close(inside, outside)
    torch.testing.assert_close(along, -outside[0], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("A", "b"),
    [((0, 3, 3), (0, 3)), ((2, 0, 0), (2, 0)), ((2, 3, 3), (2, 3, 0)), ((0, 2, 5, 3), (0, 2, 5))],
)
def test_batches_of_nothing(A, b):
    matrices = torch.ones(A) + 3 * torch.eye(*A[-2:])
    x, info = solvers.solve(matrices, torch.ones(b), return_info=True)
    assert x.shape == (*A[:-2], A[-1], *b[len(A) - 1 :])
    assert info.converged


def test_what_has_no_numbers_or_complex_ones():
    with pytest.raises(TypeError, match="meta device"):
        solvers.solve(torch.eye(3, device="meta"), torch.ones(3, device="meta"))
    with pytest.raises(TypeError, match="complex64; expected a floating dtype"):
        ops.Diagonal(torch.ones(3, dtype=torch.complex64))


def test_a_sparse_batch_is_refused():
    with pytest.raises(TypeError, match="layout"):
        solvers.solve(torch.eye(3).expand(2, 3, 3).to_sparse(), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_by_default(dtype):
    M = (torch.eye(5) + 0.1 * torch.ones(5, 5)).to(dtype)
    x, info = solvers.solve(M, torch.ones(5, dtype=dtype), return_info=True)
    assert info.converged
    torch.testing.assert_close(x, torch.full((5,), 1 / 1.5, dtype=dtype), rtol=0.05, atol=0)


def test_settings_of_another_type():
    for make in (
        lambda: solvers.CG(rtol="1e-3"),
        lambda: solvers.CG(maxiter=10.5),
        lambda: solvers.GMRES(restart=2.5),
        lambda: solvers.Auto(memory="1GB"),
        lambda: solvers.Auto(solves=1.5),
    ):
        with pytest.raises(TypeError, match="expected"):
            make()


def test_preconditioners_take_matrices():
    v = torch.ones(N, dtype=DOUBLE)
    for P in (
        solvers.Jacobi(),
        solvers.BlockJacobi(block_size=2),
        solvers.Nystrom(rank=3, damping=1.0),
    ):
        assert (P.prepare(S) @ v).shape == (N,)
        with pytest.raises(solvers.StructureError, match="square"):
            P.prepare(torch.ones(3, 2))


def test_threads_come_back_whoever_leaves_first():
    def most() -> int:
        return max(p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas")

    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with one_blas_thread():
            entered.set()
            leave.wait(10)

    with threadpool_limits(2, user_api="blas"):
        thread = threading.Thread(target=other)
        with one_blas_thread():
            assert most() == 1
            thread.start()
            entered.wait(10)
        leave.set()
        thread.join()
        assert most() == 2
