"""What every solver promises, over one table of solvers and operators that suit them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import operators as ops
import solvers
from operators import LinearOperator, Space
from solvers import LinearSolver, PreparedSolver, StructureError
from solvers.linear_solver import Progress

N = 7
DTYPES = [torch.float32, torch.float64]
# A warning that a solve did not converge fails every test here that does not ask for it.
pytestmark = pytest.mark.filterwarnings("error::solvers.ConvergenceWarning")


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd_matrix() -> Tensor:
    """Eigenvalues 1, ..., 4."""
    basis, _ = torch.linalg.qr(sampled(N, N, seed=1))
    matrix = basis @ torch.diag(torch.linspace(1, 4, N, dtype=torch.float64)) @ basis.T
    return (matrix + matrix.T) / 2


def general_matrix() -> Tensor:
    """Far from symmetric, with eigenvalues within 0.6 of 1."""
    root = sampled(N, N, seed=2)
    return torch.eye(N, dtype=torch.float64) + 0.6 * root / torch.linalg.matrix_norm(root, 2)


def nested(values: Tensor) -> dict[str, Tensor]:
    return {"w": values[:4].reshape(2, 2), "b": values[4:]}


SPD, GENERAL = spd_matrix(), general_matrix()


def hessian(dtype: torch.dtype) -> LinearOperator:
    """``<y, P y> / 2`` over nested parameters."""
    matrix = SPD.to(dtype)

    def loss(y: dict[str, Tensor]) -> Tensor:
        flat = torch.cat([y["w"].reshape(-1), y["b"]])
        return flat @ matrix @ flat / 2

    return ops.Hessian(loss, nested(sampled(N, seed=9).to(dtype)))


OPERATORS: dict[str, Callable[[torch.dtype], LinearOperator]] = {
    "spd": lambda dtype: ops.Dense(SPD.to(dtype), positive_definite=True),
    "general": lambda dtype: ops.Dense(GENERAL.to(dtype)),
    "hessian": hessian,
    "damped sum": lambda dtype: (
        ops.Dense(SPD.to(dtype), symmetric=True) + 0.5 * ops.Identity(N, dtype)
    ),
    "fisher": lambda dtype: ops.EmpiricalFisher(
        sampled(3, N, seed=3).to(dtype),
        0.7,
        space=Space.of(nested(torch.zeros(N, dtype=dtype))),
    ),
    "mixed signs": lambda dtype: ops.LowRankPlusDiagonal(
        0.4 * sampled(3, N, seed=4).to(dtype),
        torch.linspace(2, 3, N, dtype=dtype),
        torch.tensor([1.0, -1.0, 0.5], dtype=dtype),
    ),
    "diagonal": lambda dtype: ops.Diagonal(torch.linspace(1, 3, N, dtype=dtype)),
    "scaled identity": lambda dtype: 2.5 * ops.Identity(N, dtype),
}
# name: solver for a relative tolerance, and the operators that suit it
SOLVERS: dict[str, tuple[Callable[[float], LinearSolver], list[str]]] = {
    "CG": (
        lambda rtol: solvers.CG(rtol=rtol),
        ["spd", "hessian", "damped sum", "fisher", "mixed signs", "diagonal", "scaled identity"],
    ),
    "Neumann": (
        lambda rtol: solvers.Neumann(rtol=rtol, maxiter=2000),
        ["spd", "general", "hessian", "fisher", "diagonal", "scaled identity"],
    ),
    "DenseCholesky": (
        lambda rtol: solvers.DenseCholesky(rtol=rtol),
        ["spd", "hessian", "damped sum", "fisher", "mixed signs", "diagonal"],
    ),
    "DenseLU": (
        lambda rtol: solvers.DenseLU(rtol=rtol),
        ["spd", "general", "hessian", "mixed signs", "scaled identity"],
    ),
    "Woodbury": (
        lambda rtol: solvers.Woodbury(rtol=rtol),
        ["fisher", "mixed signs", "diagonal", "scaled identity"],
    ),
    "ShermanMorrison": (
        lambda rtol: solvers.ShermanMorrison(rtol=rtol),
        ["fisher", "mixed signs", "diagonal", "scaled identity"],
    ),
    "Diagonal": (lambda rtol: solvers.Diagonal(rtol=rtol), ["diagonal", "scaled identity"]),
    "Auto": (lambda rtol: solvers.Auto(rtol=rtol), ["spd", "general", "hessian", "fisher"]),
    "DenseLDL": (lambda rtol: solvers.DenseLDL(rtol=rtol), ["spd", "damped sum", "diagonal"]),
    "SVD": (lambda rtol: solvers.SVD(rtol=rtol), ["spd", "general"]),
    "QR": (lambda rtol: solvers.QR(rtol=rtol), ["spd", "general"]),
    "MINRES": (lambda rtol: solvers.MINRES(rtol=rtol), ["spd", "hessian", "mixed signs"]),
    "GMRES": (lambda rtol: solvers.GMRES(rtol=rtol), ["spd", "general", "hessian"]),
    "BiCGStab": (lambda rtol: solvers.BiCGStab(rtol=rtol), ["spd", "general"]),
    "LSMR": (lambda rtol: solvers.LSMR(rtol=rtol), ["spd", "general"]),
    "Richardson": (
        lambda rtol: solvers.Richardson(rtol=rtol, maxiter=2000),
        ["spd", "general", "hessian"],
    ),
    "SOR": (lambda rtol: solvers.SOR(rtol=rtol, maxiter=2000), ["spd", "general"]),
    "SymmetricSOR": (lambda rtol: solvers.SymmetricSOR(rtol=rtol, maxiter=2000), ["spd"]),
    "Broyden": (lambda rtol: solvers.Broyden(rtol=rtol), ["spd", "general"]),
    "QuadraticSGD": (lambda rtol: solvers.QuadraticSGD(rtol=rtol, maxiter=2000), ["spd"]),
    "SketchAndProject": (
        lambda rtol: solvers.SketchAndProject(rtol=rtol, block_size=3),
        ["spd", "general"],
    ),
    "CG with Jacobi": (
        lambda rtol: solvers.CG(rtol=rtol, preconditioner=solvers.Jacobi()),
        ["spd", "diagonal"],
    ),
}
PAIRS = [(solver, operator) for solver, (_, suited) in SOLVERS.items() for operator in suited]
RTOL = {torch.float64: 1e-11, torch.float32: 2e-6}
# Tolerance on x: the residual's times the largest condition number in the table, with room.
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}


@pytest.fixture(params=PAIRS, ids=" on ".join)
def pair(request) -> tuple[str, str]:
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def operator(pair, dtype) -> LinearOperator:
    return OPERATORS[pair[1]](dtype)


@pytest.fixture
def prepared(pair, operator, dtype) -> PreparedSolver:
    return SOLVERS[pair[0]][0](RTOL[dtype]).prepare(operator)


def right_hand_side(*shape: int, dtype: torch.dtype, seed: int = 20) -> Tensor:
    return sampled(*shape, seed=seed).to(dtype)


def assert_solves(x: Tensor, matrix: Tensor, b: Tensor) -> None:
    """x is `torch.linalg.solve` of the matrix in float64, columnwise relative to its norm."""
    assert x.shape == b.shape
    assert x.dtype == b.dtype
    expected = torch.linalg.solve(matrix.double(), b.double())
    error = torch.linalg.vector_norm(x.double() - expected, dim=0)
    assert (error <= CLOSE[b.dtype] * torch.linalg.vector_norm(expected, dim=0)).all()


def test_agrees_with_the_dense_solve(prepared, operator, dtype):
    b = right_hand_side(N, dtype=dtype)
    x, info = prepared.solve(b)
    assert_solves(x, operator.to_dense(), b)
    assert info.converged
    assert info.status == "converged"
    assert type(prepared.solver).__name__ in info.solver


def test_transpose(prepared, operator, dtype):
    b = right_hand_side(N, 2, dtype=dtype)
    x, info = prepared.solve_transpose(b)
    assert_solves(x, operator.to_dense().T, b)
    assert info.converged


def test_the_adjoint_identity(prepared, operator, dtype):
    """``<u, A^-1 b> = <A^-T u, b>``."""
    b, u = (right_hand_side(N, dtype=dtype, seed=seed) for seed in (21, 22))
    left, right = u @ prepared.solve(b).value, prepared.solve_transpose(u).value @ b
    torch.testing.assert_close(left, right, rtol=CLOSE[dtype], atol=10 * CLOSE[dtype])


def test_a_block_is_its_columns(prepared, dtype):
    block = right_hand_side(N, 4, dtype=dtype) * torch.tensor([1.0, 1e-6, 0.0, 1e6], dtype=dtype)
    x, info = prepared.solve(block)
    assert x.shape == block.shape
    residuals = []
    for k in range(4):
        single = prepared.solve(block[:, k])
        error = torch.linalg.vector_norm(x[:, k] - single.value)
        assert error <= CLOSE[dtype] * torch.linalg.vector_norm(single.value)
        residuals.append(single.info.iterations)
    assert not x[:, 2].any()
    # The coefficients of one column are Python's numbers: a recurrence in float32 rounds others.
    assert abs(info.iterations - max(residuals)) <= (dtype == torch.float32)


def test_vector_column_and_nested_are_one_answer(prepared, operator, dtype):
    b = right_hand_side(N, dtype=dtype)
    vector = prepared.solve(b)
    column = prepared.solve(b[:, None])
    assert column.value.shape == (N, 1)
    torch.testing.assert_close(column.value[:, 0], vector.value, rtol=0, atol=0)
    if not operator.domain.is_flat:
        result = prepared.solve(nested(b))
        assert operator.domain.holds(result.value)
        assert torch.equal(operator.domain.ravel(result.value), vector.value)
        assert result.info == vector.info
        transposed = prepared.solve_transpose(nested(b)).value
        flat = prepared.solve_transpose(b).value
        assert torch.equal(operator.domain.ravel(transposed), flat)


def test_zero(prepared, dtype):
    for b in (torch.zeros(N, dtype=dtype), torch.zeros(N, 3, dtype=dtype)):
        x, info = prepared.solve(b)
        assert torch.equal(x, b)
        assert info.converged
        assert info.residual == 0.0
        assert info.iterations == 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_right_hand_sides(prepared, operator, dtype, scale):
    b = scale * right_hand_side(N, dtype=dtype)
    x, info = prepared.solve(b)
    assert info.converged
    assert_solves(x, operator.to_dense(), b)


@pytest.mark.parametrize("exponent", [-100, -1, 100])
def test_scaling_by_a_power_of_two_is_exact(prepared, dtype, exponent):
    b, scale = right_hand_side(N, dtype=dtype), 2.0**exponent
    x, info = prepared.solve(b)
    scaled, scaled_info = prepared.solve(scale * b)
    assert torch.equal(scaled, scale * x)
    assert scaled_info == info


def test_the_residual_is_the_true_one(prepared, operator, dtype):
    block = right_hand_side(N, 3, dtype=dtype)
    x, info = prepared.solve(block)
    matrix = operator.to_dense().double()
    true = torch.linalg.vector_norm(block.double() - matrix @ x.double(), dim=0)
    true = float((true / torch.linalg.vector_norm(block.double(), dim=0)).max())
    # Equal up to the rounding of the product that measures it.
    assert info.residual == pytest.approx(true, rel=1e-3, abs=20 * torch.finfo(dtype).eps)
    assert info.residual <= RTOL[dtype]


def test_no_columns(prepared, dtype):
    for solve in (prepared.solve, prepared.solve_transpose):
        x, info = solve(torch.zeros(N, 0, dtype=dtype))
        assert x.shape == (N, 0)
        assert x.dtype == dtype
        assert info.converged
        assert info.residual == 0.0


def test_right_hand_side_that_is_not_contiguous(prepared, operator, dtype):
    block = right_hand_side(3, 2 * N, dtype=dtype)[:, ::2].T
    assert not block.is_contiguous()
    before = block.clone()
    assert_solves(prepared.solve(block).value, operator.to_dense(), block)
    assert_solves(prepared.solve(block[:, 1]).value, operator.to_dense(), block[:, 1])
    assert torch.equal(block, before)


def test_prepared_once_and_used_often(prepared, dtype):
    first, second = (right_hand_side(N, dtype=dtype, seed=seed) for seed in (30, 31))
    before = prepared.solve(first)
    prepared.solve(second)
    prepared.solve_transpose(right_hand_side(N, 3, dtype=dtype))
    after = prepared.solve(first)
    assert torch.equal(before.value, after.value)
    assert before.info == after.info


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite(prepared, operator, dtype, value):
    b = right_hand_side(N, dtype=dtype)
    b[2] = value
    cases = [b, b[:, None]] + ([] if operator.domain.is_flat else [nested(b)])
    for case in cases:
        with pytest.raises(ValueError, match=r"b holds 1 NaN or infinite entries"):
            prepared.solve(case)


def test_right_hand_sides_that_do_not_fit(prepared, dtype):
    for shape in ((N + 1,), (N - 1, 2), (N, 1, 1), ()):
        came = str(tuple(shape)).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(ValueError, match=rf"b has shape {came}; expected \({N},\), \({N}, k\)"):
            prepared.solve(torch.zeros(shape, dtype=dtype))
    other = torch.float32 if dtype == torch.float64 else torch.float64
    with pytest.raises(TypeError, match=f"b is {other} on cpu; expected {dtype} on cpu"):
        prepared.solve(torch.zeros(N, dtype=other))
    with pytest.raises(ValueError, match=r"b has structure \{'z': \(7,\)\}; expected"):
        prepared.solve({"z": torch.zeros(N, dtype=dtype)})
    with pytest.raises(ValueError, match=r"b has structure float; expected"):
        prepared.solve(1.0)


@pytest.mark.parametrize("name", list(SOLVERS))
class TestEverySolver:
    def solver(self, name: str) -> LinearSolver:
        return SOLVERS[name][0](1e-10)

    def structured(self, name: str, n: int, value: float = 4.0) -> LinearOperator:
        """``value I`` of size n in a form that suits the solver."""
        if name == "Diagonal":
            return ops.Diagonal(torch.full((n,), value, dtype=torch.float64))
        rows = torch.zeros(1, n, dtype=torch.float64)
        return ops.LowRankPlusDiagonal(rows, value)

    def test_size_one(self, name):
        prepared = self.solver(name).prepare(self.structured(name, 1))
        for b in (torch.tensor([2.0]).double(), torch.tensor([[2.0, -4.0]]).double()):
            x, info = prepared.solve(b)
            torch.testing.assert_close(x, b / 4, rtol=1e-10, atol=0)
            assert info.converged

    @pytest.mark.parametrize("shape", [(0,), (0, 3), (0, 0)])
    def test_size_zero(self, name, shape):
        prepared = self.solver(name).prepare(self.structured(name, 0))
        for solve in (prepared.solve, prepared.solve_transpose):
            x, info = solve(torch.zeros(shape, dtype=torch.float64))
            assert x.shape == shape
            assert info.converged

    def test_settings_are_frozen_values(self, name):
        solver = self.solver(name)
        assert solver == self.solver(name)
        assert hash(solver) == hash(self.solver(name))
        assert solver != dataclasses.replace(solver, rtol=1e-3)
        with pytest.raises(dataclasses.FrozenInstanceError):
            solver.rtol = 1.0

    @pytest.mark.parametrize("setting", ["rtol", "atol"])
    @pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
    def test_tolerances_out_of_range(self, name, setting, value):
        kind = name.split()[0]
        with pytest.raises(ValueError, match=rf"{kind}: {setting}=.*expected a number >= 0"):
            dataclasses.replace(self.solver(name), **{setting: value})

    def test_default_tolerance_is_the_root_of_epsilon(self, name):
        solver = dataclasses.replace(self.solver(name), rtol=None)
        assert solver.tolerance(torch.float64) == 2.0**-26
        assert solver.tolerance(torch.float32) == 2.0**-11.5

    def test_rectangles_are_for_least_squares(self, name):
        rectangle, solver = ops.Dense(torch.eye(2, 3)), self.solver(name)
        if solver.minimises(rectangle):
            solver.prepare(rectangle)
            return
        with pytest.raises(StructureError):
            solver.prepare(rectangle)

    def test_a_scalar_of_another_dtype_does_not_change_the_answers(self, name):
        A = torch.tensor(2.0, dtype=torch.float64) * ops.Identity(3, torch.float32)
        x, info = (
            dataclasses.replace(self.solver(name), rtol=1e-6)
            .prepare(A if name != "DenseCholesky" else ops.Dense(A.to_dense(), symmetric=True))
            .solve(torch.ones(3))
        )
        torch.testing.assert_close(x, torch.full((3,), 0.5))
        assert info.converged


@pytest.mark.parametrize("name", ["CG", "Neumann"])
def test_atol_is_met_and_is_absolute(name):
    A = OPERATORS["spd"](torch.float64)
    solver = dataclasses.replace(SOLVERS[name][0](1e-15), atol=1e-3)
    b = 1e-2 * torch.nn.functional.normalize(sampled(N), dim=0)
    x, info = solver.prepare(A).solve(b)
    assert info.converged
    assert torch.linalg.vector_norm(b - A @ x) <= 1e-3
    # It stops the iteration too, as the same tolerance in relative terms does; per column.
    relative = dataclasses.replace(SOLVERS[name][0](1e-15), rtol=0.1).prepare(A).solve(b).info
    assert info.iterations == relative.iterations
    both = solver.prepare(A).solve(torch.stack([b, 1e-2 * b], dim=1))
    assert both.info.converged
    torch.testing.assert_close(both.value[:, 0], x)


class _Wrong(PreparedSolver):
    """Returns 1.5 times the solution of ``2 I x = b`` and claims to have converged."""

    def _solve(self, block: Tensor, targets: Tensor) -> tuple[Tensor, Progress]:
        return 1.5 * block / 2.0, Progress(iterations=3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrongSolver(LinearSolver):
    def _prepare(self, A: LinearOperator) -> PreparedSolver:
        return _Wrong(self, A)


class TestWhatIsReported:
    """The judge is not the solver: what a solver says of itself is measured."""

    A = 2.0 * ops.Identity(3, torch.float64)
    b = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)

    def test_a_wrong_answer_is_found_out(self):
        with pytest.warns(solvers.ConvergenceWarning, match=r"inaccurate.*residual 0.5;") as record:
            x, info = WrongSolver().prepare(self.A).solve(self.b)
        assert record[0].filename == __file__  # the warning points at the caller
        assert not info.converged
        assert info.status == "inaccurate"
        assert info.residual == pytest.approx(0.5, rel=1e-15)
        assert info.products == 1
        torch.testing.assert_close(x, 0.75 * self.b)

    def test_the_worst_column_counts(self):
        block = torch.stack([torch.zeros(3).double(), self.b], dim=1)
        with pytest.warns(solvers.ConvergenceWarning):
            _, info = WrongSolver().prepare(self.A).solve(block)
        assert info.residual == pytest.approx(0.5, rel=1e-15)

    def test_strict_raises_with_the_numbers(self):
        with pytest.raises(solvers.NotConvergedError, match=r"inaccurate after 3 iter") as error:
            WrongSolver(strict=True).prepare(self.A).solve(self.b)
        assert error.value.info.residual == pytest.approx(0.5, rel=1e-15)

    @pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
    def test_atol_is_compared_with_the_unscaled_residual(self, size):
        # |b| = 5 size and |b - A x| = 2.5 size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", solvers.ConvergenceWarning)
            loose = WrongSolver(rtol=0.0, atol=2.6 * size).prepare(self.A).solve(size * self.b)
            tight = WrongSolver(rtol=0.0, atol=2.4 * size).prepare(self.A).solve(size * self.b)
        assert loose.info.converged
        assert not tight.info.converged

    def test_a_solution_that_overflows_is_not_converged(self):
        A = 1e-20 * ops.Identity(3, torch.float32)
        b = torch.tensor([1e30, 1.0, 0.0])
        with pytest.warns(solvers.ConvergenceWarning):
            x, info = solvers.Diagonal().prepare(A).solve(b)
        assert torch.isinf(x[0])
        assert not info.converged

    def test_the_result_unpacks(self):
        solution = solvers.Diagonal().prepare(self.A).solve(self.b)
        value, info = solution
        assert value is solution.value
        assert info is solution.info
