"""Half precision: what torch has no factorisation for is factorised in single and rounded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import operators as ops
from operators.precision import in_single

N = 6
HALF = [torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


ROOT, ROWS, INPUTS = normal(N, N) / 3, normal(2, N, seed=1), normal(5, 3, seed=2)
SPD = ROOT @ ROOT.T + torch.eye(N)


def spd(dtype: torch.dtype) -> ops.Dense:
    return ops.Dense(SPD.to(dtype), positive_definite=True)


def function(dtype: torch.dtype) -> ops.FunctionOperator:
    M = SPD.to(dtype)
    return ops.FunctionOperator(
        lambda v: M @ v, torch.zeros(N, dtype=dtype), positive_definite=True
    )


def kfac(dtype: torch.dtype, style: str) -> ops.KFAC:
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.weight.copy_(normal(2, 3, seed=3))
    x = INPUTS.to(dtype)
    return ops.KFAC.from_module(net.to(dtype), "gaussian", x, damping=0.1, damping_style=style)


CASES: dict[str, Callable[[torch.dtype], Tensor]] = {
    "logdet of Dense": lambda t: ops.logdet(spd(t)).value,
    "logdet by products": lambda t: ops.logdet(function(t)).value,
    "logdet by quadrature": lambda t: ops.logdet(function(t), 4, N, method="slq").value,
    "logdet of LowRankPlusDiagonal": lambda t: (
        ops.logdet(ops.LowRankPlusDiagonal(ROWS.to(t), 1.0)).value
    ),
    "logdet of LowRankUpdate": lambda t: (
        ops.logdet(ops.LowRankUpdate(ROWS.to(t), ROWS.to(t), 1.0)).value
    ),
    "logdet of KroneckerSum": lambda t: ops.logdet(ops.KroneckerSum(spd(t), spd(t))).value,
    "logdet of KFAC": lambda t: ops.logdet(kfac(t, "factored")).value,
    "logdet of KFAC, Tikhonov": lambda t: ops.logdet(kfac(t, "tikhonov")).value,
    "trace of a function": lambda t: ops.trace_function(function(t), torch.sqrt).value,
    "Nystrom of full rank": lambda t: ops.Nystrom(spd(t), N).to_dense(),
    "inverse of LowRankUpdate": lambda t: (
        ops.LowRankUpdate(ROWS.to(t), ROWS.to(t), 1.0).inverse().to_dense()
    ),
    "inverse of KFAC": lambda t: kfac(t, "factored").inverse().to_dense(),
    "inverse of KFAC, Tikhonov": lambda t: kfac(t, "tikhonov").inverse().to_dense(),
    "diagonal of MFACInverse": lambda t: ops.diagonal(ops.MFACInverse(ROWS.to(t), 0.5)).value,
    "effective rank": lambda t: torch.tensor(
        ops.EmpiricalFisher(ROWS.to(t), 0.5).effective_rank(), dtype=t
    ),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_is_that_of_single_precision_up_to_rounding(name, dtype):
    single, half = CASES[name](torch.float32), CASES[name](dtype)
    assert half.dtype == dtype
    error = (half.float() - single).abs().max() / single.abs().max()
    assert float(error) < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("method", ["xtrace", "hutch++", "xdiag"])
def test_estimates_of_an_operator_of_rank_two(dtype, method):
    """Exact up to rounding, as two directions hold all of it."""
    M = (ROWS.T @ ROWS).to(dtype)
    A = ops.FunctionOperator(lambda v: M @ v, torch.zeros(N, dtype=dtype), symmetric=True)
    if method == "xdiag":
        value, expected = ops.diagonal(A, 8, method=method).value, M.diagonal()
    else:
        value, expected = ops.trace(A, 9, method=method).value, M.trace()
    assert value.dtype == dtype
    error = (value.float() - expected.float()).abs().max() / M.float().abs().max()
    assert float(error) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_derivatives_pass_through(dtype):
    M = SPD.to(dtype)
    gradient = torch.func.grad(lambda M: ops.logdet(ops.Dense(M)).value)(M)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.float(), torch.linalg.inv(M.float()), rtol=0.1, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_precisions_are_left_alone(dtype):
    seen = []
    in_single(lambda M: seen.append(M.dtype), torch.eye(2, dtype=dtype))
    assert seen == [dtype]


def test_what_is_no_number_of_the_matrix_keeps_its_dtype():
    inverse, info = in_single(torch.linalg.inv_ex, 2 * torch.eye(2, dtype=torch.bfloat16))
    assert (inverse.dtype, info.dtype) == (torch.bfloat16, torch.int32)
