"""The implicit function theorem: every transform of a solution is that of its closed form."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import operators as ops
import solvers
from hyperlearn.inner import LBFGS, Broyden, Newton
from hyperlearn.solutions import argmin, fixed_point, root
from tests.hyperlearn.problems import FLOAT64, KNOWN, POINT, POINTS, M, differences, sampled

Function = Callable[[Tensor], Tensor]
W = torch.tensor([0.3, -1.2, 0.7], dtype=FLOAT64)
V = torch.tensor([1.1, 0.4, -0.8], dtype=FLOAT64)
GRID = torch.stack([POINTS, 1.02 * POINTS])


def scalar(f: Function) -> Function:
    """Not linear in y, and with a direct part."""
    return lambda x: (W * torch.sin(f(x))).sum() + (f(x) ** 2).sum() * x[1] + (x**3).sum()


def by_backward(f: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    scalar(f)(x).backward()
    assert x.grad is not None
    return x.grad


def by_double_backward(f: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(scalar(f)(x), x, create_graph=True)
    return torch.autograd.grad(g @ V, x)[0]


def by_dual_numbers(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, V))).tangent
    assert tangent is not None
    return tangent


functional = torch.autograd.functional

TRANSFORMS: dict[str, Callable[[Function], Any]] = {
    "backward": lambda f: by_backward(f, POINT),
    "double backward": lambda f: by_double_backward(f, POINT),
    "dual numbers": lambda f: by_dual_numbers(f, POINT),
    "grad": lambda f: grad(scalar(f))(POINT),
    "vjp": lambda f: vjp(f, POINT)[1](W)[0],
    "jvp": lambda f: jvp(f, (POINT,), (V,))[1],
    "jacrev": lambda f: jacrev(f)(POINT),
    "jacfwd": lambda f: jacfwd(f)(POINT),
    "hessian": lambda f: hessian(scalar(f))(POINT),
    "jacrev of jacrev": lambda f: jacrev(jacrev(f))(POINT),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f))(POINT),
    "jvp of grad": lambda f: jvp(grad(scalar(f)), (POINT,), (V,))[1],
    "grad of jvp": lambda f: grad(lambda x: W @ jvp(f, (x,), (V,))[1])(POINT),
    "grad of grad": lambda f: grad(lambda x: V @ grad(scalar(f))(x))(POINT),
    "third order": lambda f: grad(lambda x: V @ jvp(grad(scalar(f)), (x,), (W,))[1])(POINT),
    "vmap": lambda f: vmap(f)(POINTS),
    "vmap along columns": lambda f: vmap(f, in_dims=1, out_dims=1)(POINTS.T),
    "vmap of grad": lambda f: vmap(grad(scalar(f)))(POINTS),
    "grad of vmap": lambda f: grad(lambda X: (vmap(f)(X) ** 2 * W).sum())(POINTS),
    "vmap of vmap": lambda f: vmap(vmap(f))(GRID),
    "vmap of vmap across": lambda f: vmap(vmap(f), in_dims=1)(GRID),
    "vmap of jacrev": lambda f: vmap(jacrev(f))(POINTS),
    "vmap of jacfwd": lambda f: vmap(jacfwd(f))(POINTS),
    "vmap of hessian": lambda f: vmap(hessian(scalar(f)))(POINTS),
    "jacfwd of vmap": lambda f: jacfwd(vmap(f))(POINTS[:2]),
    "hessian of vmap": lambda f: hessian(lambda X: (vmap(f)(X) ** 2 * W).sum())(POINTS[:2]),
    "vmap of grad of vmap": lambda f: vmap(grad(lambda X: (vmap(f)(X) ** 2 * W).sum()))(GRID),
    "functional jacobian": lambda f: functional.jacobian(f, POINT),
    "functional hessian": lambda f: functional.hessian(scalar(f), POINT),
    "functional hvp": lambda f: functional.hvp(scalar(f), POINT, V)[1],
}


# The longest are asked of one problem of each kind.
LONG = {"third order", "vmap of hessian", "hessian of vmap", "vmap of grad of vmap", "grad of jvp"}
KINDS = ("nonsymmetric linear", "fixed point", "ridge", "box", "inequality")
ASKED = [(name, t) for name in KNOWN for t in TRANSFORMS if t not in LONG or name in KINDS]


@pytest.mark.parametrize(("name", "transform"), ASKED)
def test_every_transform_is_that_of_the_closed_form(name: str, transform: str) -> None:
    known, applied = KNOWN[name], TRANSFORMS[transform]
    torch.testing.assert_close(applied(known.solve), applied(known.closed), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", KNOWN)
def test_forward_and_reverse_mode_are_adjoint(name: str) -> None:
    f = KNOWN[name].solve
    pushed = jvp(f, (POINT,), (V,))[1]
    pulled = vjp(f, POINT)[1](W)[0]
    torch.testing.assert_close(W @ pushed, pulled @ V, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", KNOWN)
def test_gradcheck(name: str) -> None:
    def f(x: Tensor) -> Tensor:
        return KNOWN[name].solve(x)

    x = POINT.clone().requires_grad_()
    assert torch.autograd.gradcheck(f, (x,), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x,), check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize(
    "twice",
    [
        lambda f: jacfwd(jacfwd(f))(POINT),
        lambda f: jvp(lambda x: jvp(f, (x,), (V,))[1], (POINT,), (V,)),
        lambda f: vmap(jacfwd(jacfwd(f)))(POINTS),
    ],
)
def test_forward_over_forward_is_refused(twice: Callable[[Function], Any]) -> None:
    with pytest.raises(NotImplementedError, match="jvp inside a jvp"):
        twice(KNOWN["square root"].solve)


def test_torchs_older_vmap_is_refused() -> None:
    f = KNOWN["square root"].solve
    with pytest.raises(NotImplementedError, match="jacrev"):
        functional.jacobian(f, POINT, vectorize=True)
    with pytest.raises(NotImplementedError, match="jacfwd"):
        functional.jacobian(f, POINT, vectorize=True, strategy="forward-mode")


# --- nested structures ----------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Data:
    scale: Tensor
    index: Tensor
    label: str


def test_y_and_x_are_nested_and_x_holds_what_is_no_number() -> None:
    index = torch.tensor([2, 0, 1])

    def residual(y: dict[str, Any], x: dict[str, Any]) -> dict[str, Any]:
        assert x["data"].label == "label"
        assert x["exponent"] == 3
        a, (b, c) = y["a"], y["pair"]
        return {
            "a": a ** x["exponent"] - x["data"].scale[x["data"].index],
            "pair": Pair(2 * b - a.sum(), c - x["matrix"] * b),
        }

    def solve(scale: Tensor, matrix: Tensor) -> dict[str, Any]:
        x = {"data": Data(scale, index, "label"), "matrix": matrix, "exponent": 3, "none": None}
        y0 = {
            "a": torch.ones(3, dtype=FLOAT64),
            "pair": Pair(torch.zeros((), dtype=FLOAT64), torch.zeros(2, 2, dtype=FLOAT64)),
        }
        y: dict[str, Any] = root(residual, y0, x)
        return y

    def closed(scale: Tensor, matrix: Tensor) -> dict[str, Any]:
        a = scale[index] ** (1 / 3)
        return {"a": a, "pair": Pair(a.sum() / 2, matrix * a.sum() / 2)}

    scale, matrix = POINT, sampled(2, 2)
    torch.testing.assert_close(solve(scale, matrix), closed(scale, matrix))
    for transform in (jacrev, jacfwd, lambda f, argnums: jacrev(jacrev(f, argnums), argnums)):
        got, expected = (transform(f, (0, 1))(scale, matrix) for f in (solve, closed))
        torch.testing.assert_close(got, expected)
    batch = sampled(4, 2, 2, seed=1)
    got, expected = (vmap(f, (None, 0))(scale, batch) for f in (solve, closed))
    torch.testing.assert_close(got, expected)


def test_only_what_is_differentiated_gets_a_gradient() -> None:
    x = {"a": POINT.clone().requires_grad_(), "b": POINT.clone(), "n": torch.tensor([1, 2, 3]),
         "unused": torch.ones(2, dtype=FLOAT64, requires_grad=True)}  # fmt: skip
    y = root(lambda y, x: y**2 - x["a"] * x["b"] * x["n"], torch.ones_like(POINT), x)
    y.sum().backward()
    torch.testing.assert_close(x["a"].grad, torch.sqrt(x["n"]).double() / 2 * 1.0)
    assert x["b"].grad is None
    torch.testing.assert_close(x["unused"].grad, torch.zeros(2, dtype=FLOAT64))


@pytest.mark.parametrize("x", [None, (), {"n": 3}, 2.5])
def test_x_may_hold_no_tensor(x: Any) -> None:
    y = root(lambda y, x: y**2 - 4, torch.ones(2, dtype=FLOAT64), x)
    torch.testing.assert_close(y, torch.full((2,), 2.0, dtype=FLOAT64))
    assert not y.requires_grad
    starts = torch.tensor([[1.0], [-1.0]], dtype=FLOAT64)
    found = vmap(lambda y0: root(lambda y, x: y**2 - 4, y0, x))(starts)
    torch.testing.assert_close(found, 2 * starts)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 2)])
def test_y_of_any_shape(shape: tuple[int, ...]) -> None:
    x = sampled(*shape).exp()
    solve = lambda x: root(lambda y, x: y**3 - x, torch.ones_like(x), x)  # noqa: E731
    assert solve(x).shape == shape
    torch.testing.assert_close(solve(x), x ** (1 / 3))
    torch.testing.assert_close(
        grad(lambda x: solve(x).sum())(x), x ** (-2 / 3) / 3, rtol=1e-9, atol=0
    )


def test_integer_tensors_pass_through_forward_mode_and_vmap() -> None:
    def f(x: Tensor, n: Tensor) -> Tensor:
        return root(lambda y, x: y ** x["n"] - x["x"], torch.ones_like(x), {"x": x, "n": n})

    n = torch.tensor([2, 3, 4])
    torch.testing.assert_close(jacfwd(f)(POINT, n), jacrev(lambda x: x ** (1 / n))(POINT))
    many = torch.stack([n, n + 1])
    got, expected = (
        vmap(jacrev(f), (None, 0))(POINT, many),
        vmap(jacrev(lambda x, n: x ** (1 / n)), (None, 0))(POINT, many),
    )
    torch.testing.assert_close(got, expected)


def test_deep_equilibrium_gives_module_parameters_their_gradients() -> None:
    torch.manual_seed(0)
    inner, outer = torch.nn.Linear(4, 4).double(), torch.nn.Linear(2, 4, bias=False).double()
    cell = torch.nn.ModuleDict({"inner": inner, "outer": outer})
    with torch.no_grad():
        inner.weight *= 0.8
    u = sampled(5, 2)

    class Cell(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = cell

        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return torch.tanh(self.parts["inner"](z) + self.parts["outer"](u))

    module = Cell()

    def solve(parameters: dict[str, Tensor]) -> Tensor:
        return fixed_point(
            lambda z, x: torch.func.functional_call(module, x[0], (z, x[1])),
            torch.zeros(5, 4, dtype=FLOAT64),
            (parameters, u),
        )

    def iterated(parameters: dict[str, Tensor]) -> Tensor:
        z = torch.zeros(5, 4, dtype=FLOAT64)
        for _ in range(200):
            z = torch.func.functional_call(module, parameters, (z, u))
        return z

    parameters = dict(module.named_parameters())
    names = list(parameters)
    (solve(parameters) ** 2).sum().backward()
    got = [parameters[name].grad for name in names]
    expected = torch.autograd.grad(
        (iterated(parameters) ** 2).sum(), [parameters[n] for n in names]
    )
    torch.testing.assert_close(got, list(expected), rtol=1e-8, atol=1e-10)
    constants = {name: p.detach() for name, p in parameters.items()}
    by_func = grad(lambda p: (solve(p) ** 2).sum())(constants)
    torch.testing.assert_close([by_func[n] for n in names], list(expected), rtol=1e-8, atol=1e-10)


# --- linear solvers -------------------------------------------------------------------------------

LARGE = 300  # beyond what is factorised without being asked


def chain(y: Tensor, x: Tensor) -> Tensor:
    """A tridiagonal, nonsymmetric, monotone system; x of (2,)."""
    left = torch.nn.functional.pad(y[:-1], (1, 0))
    right = torch.nn.functional.pad(y[1:], (0, 1))
    return 3 * y + y**3 - x[0] * left - 0.3 * right - x[1]


def chain_by_hand(x: Tensor) -> Tensor:
    """Newton's method through every step: no theorem."""
    y = torch.zeros(LARGE, dtype=x.dtype)
    for _ in range(12):
        below, above = torch.ones(LARGE - 1).to(x).diag(-1), torch.ones(LARGE - 1).to(x).diag(1)
        slope = torch.diag(3 + 3 * y**2) - x[0] * below - 0.3 * above
        y = y - torch.linalg.solve(slope, chain(y, x))
    return y


CHAIN_AT = torch.tensor([0.7, 1.5], dtype=FLOAT64)


@pytest.fixture(scope="module")
def chain_jacobian() -> Tensor:
    return differences(chain_by_hand, CHAIN_AT)


def tridiagonal() -> ops.Pattern:
    i = torch.arange(LARGE)
    rows, columns = torch.cat([i, i[1:], i[:-1]]), torch.cat([i, i[:-1], i[1:]])
    return ops.Pattern.of(rows, columns, (LARGE, LARGE))[0]


CHAIN_SOLVERS: dict[str, dict[str, Any]] = {
    "auto": {},
    "gmres": {"linear_solver": solvers.GMRES(rtol=1e-11)},
    "bicgstab": {"linear_solver": solvers.BiCGStab(rtol=1e-11)},
    "dense": {"linear_solver": solvers.DenseLU()},
    "sparse": {
        "linear_solver": solvers.SparseLU(),
        "operator": lambda y, x: ops.SparseJacobian(chain, y, x, sparsity=tridiagonal()),
    },
}


@pytest.mark.parametrize("name", CHAIN_SOLVERS)
def test_large_systems_by_any_linear_solver(name: str, chain_jacobian: Tensor) -> None:
    options = CHAIN_SOLVERS[name]
    calls: list[Any] = []

    def solve(x: Tensor) -> Tensor:
        answer = root(chain, torch.zeros(LARGE, dtype=FLOAT64), x, return_info=True, **options)
        calls.append(answer.info)
        return answer.y

    weights = sampled(LARGE)
    expected = weights @ chain_jacobian
    x = CHAIN_AT.clone().requires_grad_()
    (solve(x) @ weights).backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-7, atol=1e-8)
    assert calls[0].adjoint, "the adjoint solve says nothing of itself"
    assert all(info.converged and info.residual < 1e-8 for info in calls[0].adjoint)
    torch.testing.assert_close(jacfwd(solve)(CHAIN_AT), chain_jacobian, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(
        grad(lambda x: solve(x) @ weights)(CHAIN_AT), expected, rtol=1e-7, atol=1e-8
    )


def test_batches_of_large_systems() -> None:
    def solve(x: Tensor) -> Tensor:
        return root(chain, torch.zeros(LARGE, dtype=FLOAT64), x)

    X = torch.stack([CHAIN_AT, CHAIN_AT / 2])
    weights = sampled(LARGE)
    got = vmap(grad(lambda x: solve(x) @ weights))(X)
    expected = torch.stack([grad(lambda x: solve(x) @ weights)(x) for x in X])
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


def test_second_order_through_a_linear_solver() -> None:
    def f(x: Tensor, **options: Any) -> Tensor:
        y0 = torch.zeros(40, dtype=FLOAT64)
        return (root(chain, y0, x, **options) ** 2).sum()

    expected = hessian(f)(CHAIN_AT)
    for solver in (solvers.GMRES(rtol=1e-12), solvers.DenseLU()):
        got = hessian(lambda x, solver=solver: f(x, linear_solver=solver))(CHAIN_AT)
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)


def test_the_given_solver_is_the_one_that_solves() -> None:
    prepared: list[str] = []

    class Watched(solvers.DenseLU):
        def prepare(self, A: ops.LinearOperator) -> Any:
            prepared.append("prepare")
            return super().prepare(A)

    # Without a by-product of the solve, the adjoint system goes to the solver.
    x = POINT.clone().requires_grad_()
    y = root(
        lambda y, x: M @ y + 2 * x * y - torch.sin(x),
        torch.ones_like(POINT),
        x,
        method=Broyden(),
        linear_solver=Watched(),
    )
    assert not prepared
    (y @ W).backward()
    assert prepared
    expected = W @ jacrev(KNOWN["nonsymmetric linear"].closed)(POINT)
    torch.testing.assert_close(x.grad, expected, rtol=1e-8, atol=1e-9)


def test_a_surrogate_operator_stands_for_the_hessian() -> None:
    def f(x: Tensor) -> Tensor:
        return argmin(
            lambda y, x: (y.exp() - x * y).sum(),
            torch.zeros_like(x),
            x,
            method=LBFGS(),
            operator=lambda y, x: ops.Diagonal(2 * y.exp()),
        )

    # The exact derivative is 1 / x; half of it with twice the Hessian.
    torch.testing.assert_close(jacrev(f)(POINT), torch.diag(0.5 / POINT), rtol=1e-8, atol=0)


def byproduct_after(method: Any, by: Any) -> tuple[Tensor, Tensor, int]:
    """Gradient by the by-product of the solve, and by a fresh start from the solution."""

    def f(x: Tensor, y0: Tensor, method: Any) -> Any:
        return root(chain, y0, x, method=method, linear_solver=by, return_info=True)

    weights = sampled(40)
    x = CHAIN_AT.clone().requires_grad_()
    answer = f(x, torch.zeros(40, dtype=FLOAT64), method)
    (got,) = torch.autograd.grad(answer.y @ weights, x)
    fresh = root(chain, answer.y.detach(), x, method=Broyden())
    (expected,) = torch.autograd.grad(fresh @ weights, x)
    return got, expected, len(answer.info.adjoint)


@pytest.mark.parametrize("by", [solvers.DenseLU(), solvers.GMRES(rtol=1e-11)])
def test_the_byproduct_of_the_solve_gives_the_same_gradient(by: Any) -> None:
    got, expected, _ = byproduct_after(Newton(), by)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


def test_a_byproduct_from_far_away_is_not_trusted() -> None:
    # One step of Newton from afar: A was factorised where it has nothing to do with that at y.
    def F(y: Tensor, x: Tensor) -> Tensor:
        return y**3 + 100 * (M8 @ y) - x.sum() * torch.ones_like(y)

    M8 = sampled(60, 60, seed=4)
    M8 = M8 - M8.T  # skew: monotone with y^3
    x = CHAIN_AT.clone().requires_grad_()
    y0 = 50 * torch.ones(60, dtype=FLOAT64)
    with pytest.warns(solvers.ConvergenceWarning):
        answer = root(
            F, y0, x, method=Newton(maxiter=1), linear_solver=solvers.DenseLU(), return_info=True
        )
    (got,) = torch.autograd.grad(answer.y.sum(), x)
    y = answer.y.detach()
    A_at, C = jacrev(F)(y, x.detach()), jacrev(F, 1)(y, x.detach())
    expected = -torch.linalg.solve(A_at.T, torch.ones_like(y)) @ C
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=0)


def test_a_singular_linearisation_has_no_derivative() -> None:
    x = torch.zeros(2, dtype=FLOAT64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", solvers.ConvergenceWarning)
        y = root(lambda y, x: y**2 - x, torch.zeros(2, dtype=FLOAT64), x)
        with pytest.raises(solvers.SingularError, match="singular"):
            y.sum().backward()
        with pytest.raises(solvers.SingularError):
            grad(lambda x: root(lambda y, x: y**2 - x, torch.zeros_like(x), x).sum())(x.detach())


def test_a_linear_solver_that_fails_says_so() -> None:
    x = CHAIN_AT.clone().requires_grad_()
    y = root(
        chain,
        torch.zeros(40, dtype=FLOAT64),
        x,
        method=Broyden(),
        linear_solver=solvers.GMRES(maxiter=1),
    )
    with pytest.warns(solvers.ConvergenceWarning):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_derivatives_in_other_precisions(dtype: torch.dtype) -> None:
    def f(x: Tensor) -> Tensor:
        return root(lambda y, x: y**2 - x, torch.ones_like(x), x)

    x = POINT.to(dtype)
    y = f(x)
    assert y.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    exact = x.double().sqrt()
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=0)
    x.requires_grad_()
    f(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), 0.5 / exact.detach(), rtol=tolerance, atol=0)
