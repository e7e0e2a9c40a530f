"""What every preconditioner promises: a linear map with its transpose, symmetric where A is."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

import operators as ops
import solvers
from operators import LinearOperator
from solvers.preconditioner import Preconditioner
from solvers.preconditioners.amg import AMG
from solvers.preconditioners.block_jacobi import BlockJacobi
from solvers.preconditioners.incomplete_cholesky import IncompleteCholesky
from solvers.preconditioners.incomplete_lu import IncompleteLU
from solvers.preconditioners.jacobi import Jacobi
from solvers.preconditioners.nystrom import Nystrom
from solvers.preconditioners.ssor import SSOR
from tests.solvers.preconditioners.problems import convection, poisson, sampled

pytestmark = pytest.mark.filterwarnings("error::solvers.ConvergenceWarning")
DTYPES = [torch.float32, torch.float64]
CLOSE = {torch.float64: 1e-11, torch.float32: 2e-4}


def shifted_kernel(dtype: torch.dtype) -> LinearOperator:
    points = torch.linspace(0, 1, 132, dtype=torch.float64)[:, None]
    K = torch.exp(-(torch.cdist(points, points) ** 2) / 0.02).to(dtype)
    return ops.Dense((K + K.T) / 2, positive_semidefinite=True) + 0.01 * ops.Identity(132)


# Systems of one size; the first two are symmetric positive definite.
OPERATORS: dict[str, Callable[[torch.dtype], LinearOperator]] = {
    "poisson": lambda dtype: poisson(12, 11, dtype=dtype),
    "kernel": shifted_kernel,
    "convection": lambda dtype: convection(12, 11, dtype=dtype),
}
N = 132
PRECONDITIONERS: dict[str, tuple[Preconditioner, list[str]]] = {
    "Jacobi": (Jacobi(), ["poisson", "kernel", "convection"]),
    "BlockJacobi": (BlockJacobi(block_size=7), ["poisson", "kernel", "convection"]),
    "blocks of several sizes": (
        BlockJacobi(blocks=(30, 1, 50, 30, 21)),
        ["poisson", "kernel", "convection"],
    ),
    "SSOR": (SSOR(omega=1.3), ["poisson", "kernel", "convection"]),
    "IncompleteLU": (IncompleteLU(drop_tol=0.05), ["poisson", "convection"]),
    "IncompleteCholesky": (IncompleteCholesky(), ["poisson"]),
    "MIC": (IncompleteCholesky(modified=0.9, shift=0.01), ["poisson"]),
    "Nystrom": (Nystrom(rank=8), ["kernel"]),
    "pivoted Nystrom": (Nystrom(rank=8, sketch="rpcholesky"), ["kernel"]),
    "AMG": (AMG(max_coarse=5), ["poisson", "convection"]),
    "W": (AMG(max_coarse=5, cycle="W", sweeps=2), ["poisson", "convection"]),
    "F": (AMG(max_coarse=3, cycle="F"), ["poisson", "convection"]),
    "Ruge-Stuben": (AMG(kind="ruge-stuben", max_coarse=5), ["poisson", "convection"]),
    "root-node": (AMG(kind="root-node", max_coarse=5), ["poisson", "convection"]),
    "AMG, Jacobi": (AMG(smoother="jacobi", max_coarse=5), ["poisson", "convection"]),
    "AMG, Chebyshev": (AMG(smoother="chebyshev", max_coarse=5), ["poisson", "convection"]),
}
# Those that are not symmetric even where A is.
ONE_SIDED = ("IncompleteLU", "F")
PAIRS = [(name, operator) for name, (_, suited) in PRECONDITIONERS.items() for operator in suited]


@pytest.fixture(params=PAIRS, ids=" for ".join)
def pair(request) -> tuple[str, str]:
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request) -> torch.dtype:
    return request.param


@cache
def operator_of(name: str, dtype: torch.dtype) -> LinearOperator:
    return OPERATORS[name](dtype)


@cache
def prepared(name: str, operator: str, dtype: torch.dtype) -> LinearOperator:
    return PRECONDITIONERS[name][0].prepare(operator_of(operator, dtype))


@pytest.fixture
def A(pair, dtype) -> LinearOperator:
    return operator_of(pair[1], dtype)


@pytest.fixture
def P(pair, dtype) -> LinearOperator:
    return prepared(*pair, dtype)


def close(left: Tensor, right: Tensor) -> None:
    error = torch.linalg.vector_norm(left - right)
    assert error <= CLOSE[right.dtype] * torch.linalg.vector_norm(right)


def test_it_maps_like_the_inverse(P, A, dtype):
    assert (P.domain, P.codomain) == (A.codomain, A.domain)
    assert (P.dtype, P.device) == (dtype, A.device)
    v = sampled(N).to(dtype)
    assert P._matvec(v).dtype == dtype
    assert P._matmat(v[:, None]).shape == (N, 1)


def test_linear(P, dtype):
    u, v = sampled(N, seed=1).to(dtype), sampled(N, seed=2).to(dtype)
    close(P._matvec(3 * u - v), 3 * P._matvec(u) - P._matvec(v))
    assert not P._matvec(torch.zeros(N, dtype=dtype)).any()


def test_a_block_is_its_columns(P, dtype):
    block = sampled(N, 5, seed=3).to(dtype)
    single = torch.stack([P._matvec(column) for column in block.unbind(1)], 1)
    for k in (0, 1, 2, 5):
        image = P._matmat(block[:, :k])
        assert image.shape == (N, k)
        close(image, single[:, :k])


def test_the_argument_is_left_alone(P, dtype):
    block = sampled(2 * N, 4, seed=4).to(dtype)[::2]
    assert not block.is_contiguous()
    before = block.clone()
    image = P._matmat(block)
    assert torch.equal(block, before)
    close(P._matmat(block.T.contiguous().T), image)
    assert torch.equal(P._matmat(block), image)


def test_transposed(P, pair):
    dense = P.to_dense()
    if P.symmetric:
        close(dense.T, dense)
        return
    assert pair[1] == "convection" or pair[0] in ONE_SIDED
    transposed = P.T
    block = sampled(N, 5, seed=5).to(dense.dtype)
    close(transposed._matmat(block), dense.T @ block)
    close(transposed._matvec(block[:, 0]), dense.T @ block[:, 0])
    close(P._rmatvec(block[:, 0]), dense.T @ block[:, 0])
    close(transposed.T._matmat(block), dense @ block)


def test_positive_definite_where_A_is(P, pair):
    if pair[1] == "convection" or pair[0] in ONE_SIDED:
        assert pair[0] == "Jacobi" or not P.positive_definite
        return
    assert P.positive_definite
    assert P.check_claims()
    assert torch.linalg.eigvalsh(P.to_dense().double())[0] > 0


def test_prepared_twice_is_one(P, A, pair):
    block, before = sampled(N, 4, seed=6).to(A.dtype), A.to_dense().clone()
    again = PRECONDITIONERS[pair[0]][0].prepare(A)
    assert torch.equal(A.to_dense(), before)
    assert torch.equal(again._matmat(block), P._matmat(block))
    assert torch.equal(again.T._matmat(block), P.T._matmat(block))


def test_pickled(P):
    copy = pickle.loads(pickle.dumps(P))
    block = sampled(N, 4, seed=7).to(P.dtype)
    assert torch.equal(copy._matmat(block), P._matmat(block))


def test_described(P):
    assert str(P).startswith(f"{type(P).__name__}(132, 132)")
    assert P.cost.flops > 0


# Those that are to take off at least so much of the iterations.
FEWER = {
    "blocks of several sizes": 0.9,
    "SSOR": 0.7,
    "IncompleteCholesky": 0.7,
    "MIC": 0.6,
    "Nystrom": 0.2,
    "pivoted Nystrom": 0.2,
    "AMG": 0.3,
    "W": 0.25,
    "Ruge-Stuben": 0.25,
    "root-node": 0.3,
    "AMG, Jacobi": 0.45,
    "AMG, Chebyshev": 0.45,
}


@pytest.mark.parametrize("name", list(FEWER))
def test_conjugate_gradients_need_fewer_iterations(name):
    settings, (operator, *_) = PRECONDITIONERS[name]
    A, b = operator_of(operator, torch.float64), sampled(N, 2, seed=8)
    plain = solvers.CG(rtol=1e-10).prepare(A).solve(b).info.iterations
    x, info = solvers.CG(rtol=1e-10, preconditioner=settings).prepare(A).solve(b)
    torch.testing.assert_close(x, torch.linalg.solve(A.to_dense(), b), rtol=1e-7, atol=1e-7)
    assert info.iterations <= FEWER[name] * plain, (info.iterations, plain)


@pytest.mark.parametrize("name", ["SSOR", "IncompleteCholesky", "AMG", "AMG, Chebyshev"])
def test_derivatives_of_a_preconditioned_solve(name):
    small, b = poisson(4, 3), sampled(12, seed=9)
    solver = solvers.CG(rtol=1e-13, preconditioner=PRECONDITIONERS[name][0])

    def loss(values: Tensor, b: Tensor) -> Tensor:
        A = ops.Sparse(values, small.pattern, symmetric=True)
        return (solvers.solve(A, b, solver) ** 2).sum()

    def expected(values: Tensor, b: Tensor) -> Tensor:
        places = small.pattern.rows * 12 + small.pattern.columns
        matrix = values.new_zeros(144).index_add(0, places, values).reshape(12, 12)
        return (torch.linalg.solve(matrix, b) ** 2).sum()

    ours, theirs = (torch.func.grad(f, (0, 1))(small.values, b) for f in (loss, expected))
    for left, right in zip(ours, theirs, strict=True):
        close(left, right)


@pytest.mark.parametrize("name", list(PRECONDITIONERS))
def test_settings_are_frozen_values(name):
    settings = PRECONDITIONERS[name][0]
    assert settings == dataclasses.replace(settings)
    assert hash(settings) == hash(dataclasses.replace(settings))
    assert settings != Jacobi(absolute=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.anything = 1


@pytest.mark.parametrize(
    "settings",
    [Jacobi(), BlockJacobi(block_size=3), SSOR(), IncompleteLU(), IncompleteCholesky(), AMG()],
    ids=lambda settings: type(settings).__name__,
)
def test_size_one_and_a_diagonal(settings):
    one = ops.Sparse(torch.tensor([[4.0]], dtype=torch.float64), symmetric=True)
    assert settings.prepare(one)._matvec(torch.tensor([2.0]).double()) == 0.5
    d = 1 + sampled(9, seed=3) ** 2
    diagonal = ops.Sparse(torch.diag(d), symmetric=True)
    close(settings.prepare(diagonal)._matvec(d), torch.ones(9, dtype=torch.float64))
