"""`Inverse`: values and derivatives against ``torch.linalg.inv``; one factor; nothing hidden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import operators as ops
import solvers
from operators import Dense, Diagonal, Hessian, Identity, Inverse, LinearOperator

F64 = torch.float64
N = 4
LU, CHOLESKY = solvers.DenseLU(), solvers.DenseCholesky()
CG, WOODBURY = solvers.CG(rtol=1e-13), solvers.Woodbury()


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@dataclass(frozen=True)
class Counted:
    """A solver that counts what it is asked for."""

    solver: Any = LU
    prepared: list[int] = field(default_factory=list)
    solves: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    def prepare(self, A: LinearOperator) -> Any:
        self.prepared.append(1)
        inner, solves = self.solver.prepare(A), self.solves

        class Prepared:
            def solve(self, b: Tensor) -> Any:
                solves.append(("solve", tuple(b.shape)))
                return inner.solve(b)

            def solve_transpose(self, b: Tensor) -> Any:
                solves.append(("transpose", tuple(b.shape)))
                return inner.solve_transpose(b)

        return Prepared()


@dataclass(frozen=True)
class Family:
    """``operator(p)`` and ``matrix(p)``, as functions of one tensor p."""

    p: Tensor
    operator: Callable[[Tensor], LinearOperator]
    matrix: Callable[[Tensor], Tensor]
    solver: Any


SQUARE = sampled(N, N) / 3 + 2 * torch.eye(N, dtype=F64)
POINT, OTHER = sampled(N, seed=1).exp(), sampled(N, seed=2).exp()
ROWS = sampled(2, N, seed=3)


def spd(M: Tensor) -> Tensor:
    return M @ M.T / N + torch.eye(N, dtype=M.dtype)


def loss(y: dict[str, Tensor], x: Tensor) -> Tensor:
    """``sum_i x_i^2 y_i^4 / 12 + |y|^2 / 2 + (sum y)^2 / 2``"""
    v = torch.cat([y["a"][0], y["b"][None]])
    return (x**2 * v**4).sum() / 12 + (v @ v) / 2 + v.sum() ** 2 / 2


def tree(v: Tensor) -> dict[str, Tensor]:
    return {"a": v[None, :-1], "b": v[-1]}


def loss_matrix(y: Tensor, x: Tensor) -> Tensor:
    ones = torch.ones(N, dtype=y.dtype)
    return torch.diag(x**2 * y**2 + 1) + torch.outer(ones, ones)


INPUTS, LABELS = sampled(5, 2, seed=4), torch.tensor([0, 1, 1, 0, 1])


def linear_model(y: Tensor, x: Tensor) -> Tensor:
    return x @ y.reshape(2, 2)


def of_outputs(H: Tensor) -> Tensor:
    """``sum_n J_n^T H_n J_n`` of `linear_model`."""
    eye = torch.eye(2, dtype=F64)
    return sum(
        torch.kron(torch.outer(x, x), eye @ h) for x, h in zip(INPUTS, H, strict=True)
    ) + torch.eye(N, dtype=F64)


def weighted_entropy_matrix(w: Tensor) -> Tensor:
    p = torch.softmax(linear_model(POINT, INPUTS), 1)
    c = w[LABELS] / w[LABELS].sum()
    return of_outputs(c[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None]))


FAMILIES = {
    "Dense": Family(SQUARE, Dense, lambda M: M, LU),
    "Dense definite, Cholesky": Family(
        SQUARE, lambda M: Dense(spd(M), positive_definite=True), spd, CHOLESKY
    ),
    "Dense definite, CG": Family(SQUARE, lambda M: Dense(spd(M), positive_definite=True), spd, CG),
    "Diagonal": Family(POINT, Diagonal, torch.diag, LU),
    "Woodbury": Family(
        POINT,
        lambda d: ops.LowRankPlusDiagonal(ROWS * d, d),
        lambda d: torch.diag(d) + (ROWS * d).T @ (ROWS * d),
        WOODBURY,
    ),
    "Hessian by its argument": Family(
        OTHER, lambda x: Hessian(loss, tree(POINT), x), lambda x: loss_matrix(POINT, x), CG
    ),
    "Hessian by its point": Family(
        POINT, lambda y: Hessian(loss, tree(y), OTHER), lambda y: loss_matrix(y, OTHER), CHOLESKY
    ),
    "sum": Family(
        SQUARE,
        lambda M: Dense(M) + Hessian(loss, tree(POINT), OTHER) + 0.5 * Identity(N),
        lambda M: M + loss_matrix(POINT, OTHER) + 0.5 * torch.eye(N, dtype=F64),
        LU,
    ),
    "multiple": Family(
        torch.tensor(1.7, dtype=F64), lambda c: c * Dense(SQUARE), lambda c: c * SQUARE, LU
    ),
    "product": Family(
        SQUARE, lambda M: Dense(M).T @ Dense(2 * M + 1), lambda M: M.T @ (2 * M + 1), LU
    ),
    "Gram": Family(
        SQUARE,
        lambda M: (lambda A: A.T @ A + Identity(N))(Dense(M)),
        lambda M: M.T @ M + torch.eye(N, dtype=F64),
        CG,
    ),
    "FunctionOperator": Family(
        POINT,
        lambda d: ops.FunctionOperator(lambda v, d: d * v + v.roll(1) / 5, torch.zeros_like(d), d),
        lambda d: torch.diag(d) + torch.eye(N, dtype=F64).roll(1, 0) / 5,
        LU,
    ),
    "GaussNewton by the weights of the loss": Family(
        torch.tensor([1.0, 3.0], dtype=F64),
        lambda w: ops.GaussNewton(
            linear_model,
            torch.nn.CrossEntropyLoss(weight=w),
            POINT,
            INPUTS,
            LABELS,
            damping=1.0,
        ),
        weighted_entropy_matrix,
        LU,
    ),
    "Fisher by the variance": Family(
        torch.tensor(0.7, dtype=F64),
        lambda s: ops.Fisher(linear_model, ops.Gaussian(variance=s), POINT, INPUTS, damping=1.0),
        lambda s: of_outputs((torch.eye(2, dtype=F64) / (5 * s)).expand(5, 2, 2)),
        CHOLESKY,
    ),
    "Linearization": Family(
        OTHER,
        lambda c: ops.Linearization(lambda u, c: c * u**2 + u.sum(), POINT, c),
        lambda c: torch.diag(2 * c * POINT) + 1,
        LU,
    ),
    "Inverse": Family(
        SQUARE,
        lambda M: Inverse(Dense(M), LU) + Identity(N),
        lambda M: torch.linalg.inv(M) + torch.eye(N, dtype=F64),
        LU,
    ),
    "Stacked": Family(
        SQUARE,
        lambda M: ops.Stacked([Dense(M[:2, :2]), Dense(M[2:, 2:])]),
        lambda M: torch.block_diag(M[:2, :2], M[2:, 2:]),
        LU,
    ),
}
everywhere = pytest.mark.parametrize("name", FAMILIES)
either_side = pytest.mark.parametrize("transpose", [False, True], ids=["A", "A.T"])


def maps(name: str, transpose: bool) -> tuple[Callable, Callable, Tensor]:
    """``(p, b) -> A(p)^-1 b`` by `Inverse`, and by a dense inverse."""
    family = FAMILIES[name]

    def ours(p, b):
        inverse = Inverse(family.operator(p), family.solver)
        return (inverse.T if transpose else inverse) @ b

    def theirs(p, b):
        matrix = torch.linalg.inv(family.matrix(p))
        return (matrix.T if transpose else matrix) @ b

    return ours, theirs, family.p


@everywhere
@either_side
class TestAgainstTheDenseInverse:
    b = sampled(N, seed=7)

    def test_value(self, name, transpose):
        ours, theirs, p = maps(name, transpose)
        for b in (self.b, sampled(N, 3), sampled(N, 0), sampled(3, N).T, sampled(2 * N)[::2]):
            close(ours(p, b), theirs(p, b))

    def test_grad(self, name, transpose):
        ours, theirs, p = maps(name, transpose)
        u = sampled(N, seed=8)
        close(vjp(ours, p, self.b)[1](u), vjp(theirs, p, self.b)[1](u))
        block, U = sampled(N, 2, seed=9), sampled(N, 2, seed=10)
        close(vjp(ours, p, block)[1](U), vjp(theirs, p, block)[1](U))

    def test_jvp(self, name, transpose):
        ours, theirs, p = maps(name, transpose)
        dp, db = sampled(*p.shape, seed=8), sampled(N, seed=9)
        close(jvp(ours, (p, self.b), (dp, db)), jvp(theirs, (p, self.b), (dp, db)))
        only_b = jvp(partial(ours, p), (self.b,), (db,))
        close(only_b, jvp(partial(theirs, p), (self.b,), (db,)))
        only_p = jvp(lambda p: ours(p, self.b), (p,), (dp,))
        close(only_p, jvp(lambda p: theirs(p, self.b), (p,), (dp,)))

    def test_second_order(self, name, transpose):
        ours, theirs, p = maps(name, transpose)
        dp, db, u = sampled(*p.shape, seed=8), sampled(N, seed=9), sampled(N, seed=10)

        def gradient(f):
            return grad(lambda p, b: (u * f(p, b)).sin().sum(), (0, 1))

        for f, g in ((ours, theirs),):
            # forward over reverse
            close(
                jvp(gradient(f), (p, self.b), (dp, db))[1],
                jvp(gradient(g), (p, self.b), (dp, db))[1],
                1e-7,
            )
            # reverse over reverse
            moved = [vjp(gradient(h), p, self.b)[1]((dp, db)) for h in (f, g)]
            close(*moved, 1e-7)

    def test_plain_autograd_twice(self, name, transpose):
        ours, theirs, p = maps(name, transpose)
        results = []
        for f in (ours, theirs):
            leaf, b = p.clone().requires_grad_(), self.b.clone().requires_grad_()
            first = torch.autograd.grad(f(leaf, b).sin().sum(), (leaf, b), create_graph=True)
            total = sum((g**2).sum() for g in first)
            results.append((*first, *torch.autograd.grad(total, (leaf, b))))
        close(*results, 1e-7)

    def test_vmap(self, name, transpose):
        ours, theirs, p = maps(name, transpose)
        P = torch.stack([p, 1.1 * p, 0.9 * p])
        B = sampled(3, N, seed=8)
        close(vmap(partial(ours, p))(B), vmap(partial(theirs, p))(B))
        close(vmap(partial(ours, p), 1, 1)(B.T), vmap(partial(theirs, p), 1, 1)(B.T))
        close(vmap(ours)(P, B), vmap(theirs)(P, B))
        close(vmap(ours, (0, None))(P, self.b), vmap(theirs, (0, None))(P, self.b))
        blocks = sampled(3, N, 2, seed=9)
        close(vmap(partial(ours, p))(blocks), vmap(partial(theirs, p))(blocks))
        close(vmap(ours)(P, blocks), vmap(theirs)(P, blocks))

    def test_vmap_of_grad_and_grad_of_vmap(self, name, transpose):
        ours, theirs, p = maps(name, transpose)
        P, B = torch.stack([p, 1.1 * p]), sampled(2, N, seed=8)
        each = [
            vmap(grad(lambda p, b, f=f: f(p, b).sin().sum(), (0, 1)))(P, B) for f in (ours, theirs)
        ]
        close(*each)
        whole = [
            grad(lambda P, B, f=f: vmap(f)(P, B).sin().sum(), (0, 1))(P, B) for f in (ours, theirs)
        ]
        close(*whole)
        whole = [
            grad(lambda p, B, f=f: vmap(f, (None, 0))(p, B).sin().sum(), (0, 1))(p, B)
            for f in (ours, theirs)
        ]
        close(*whole)


@pytest.mark.parametrize("name", ["Dense", "Hessian by its argument", "Woodbury", "Gram"])
class TestWholeDerivatives:
    def test_jacobians_and_hessian(self, name):
        ours, theirs, p = maps(name, transpose=False)
        b = sampled(N, seed=7)
        for jacobian in (jacrev, jacfwd):
            close(jacobian(ours)(p, b), jacobian(theirs)(p, b))
        curvatures = [hessian(lambda p, f=f: f(p, b).square().sum())(p) for f in (ours, theirs)]
        close(*curvatures, 1e-7)

    def test_central_differences(self, name):
        ours, _, p = maps(name, transpose=False)
        b, dp, h = sampled(N, seed=7), sampled(*p.shape, seed=8), 1e-5
        difference = (ours(p + h * dp, b) - ours(p - h * dp, b)) / (2 * h)
        close(jvp(lambda p: ours(p, b), (p,), (dp,))[1], difference, 1e-6)

    def test_with_respect_to_the_operator_that_is_inverted(self, name):
        family = FAMILIES[name]
        inverse, b = Inverse(family.operator(family.p), family.solver), sampled(N, seed=7)
        inverse @ b
        gradient = grad(lambda inverse: (inverse @ b).square().sum())(inverse)
        assert isinstance(gradient, Inverse)
        A = inverse.operator
        x = inverse @ b
        adjoint = -(inverse.T @ (2 * x))
        expected = grad(lambda A: adjoint @ (A @ x))(A)
        close(gradient.tensors, expected.tensors)


class TestSpaces:
    def test_nested(self):
        A = Hessian(loss, tree(POINT), OTHER)
        inverse, b = Inverse(A, CHOLESKY), sampled(N)
        assert inverse.domain == A.codomain
        x = inverse @ tree(b)
        assert A.domain.holds(x)
        close(A @ x, tree(b))
        close(A.domain.ravel(x), inverse @ b)
        close(inverse.T @ tree(b), x)

    def test_between_two_structures(self):
        J = ops.Jacobian(lambda y: {"r": y["a"][0] ** 3, "s": y["b"] ** 3}, tree(POINT))
        inverse = Inverse(J, LU)
        assert inverse.domain == J.codomain
        assert inverse.codomain == J.domain
        r = {"r": sampled(N - 1), "s": sampled()}
        close(J @ (inverse @ r), r)
        y = tree(sampled(N))
        close(J.T @ (inverse.T @ y), y)
        close((inverse @ J).to_dense(), torch.eye(N, dtype=F64))

    @pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
    def test_dtype(self, dtype):
        M = SQUARE.to(dtype)
        inverse, b = Inverse(Dense(M), LU), sampled(N).to(dtype)
        assert (inverse @ b).dtype == dtype
        gradient = grad(lambda M: (Inverse(Dense(M), LU) @ b).sum())(M)
        assert gradient.dtype == dtype
        close(gradient, grad(lambda M: (torch.linalg.inv(M) @ b).sum())(M), 1e-4)

    @pytest.mark.parametrize("solver", [LU, CHOLESKY, CG])
    @pytest.mark.parametrize("n", [0, 1])
    def test_trivial_sizes(self, solver, n):
        A = Dense(2 * torch.eye(n, dtype=F64), positive_definite=True)
        inverse = Inverse(A, solver)
        close(inverse @ torch.ones(n, dtype=F64), torch.ones(n, dtype=F64) / 2)
        close(inverse @ torch.ones(n, 2, dtype=F64), torch.ones(n, 2, dtype=F64) / 2)
        close(inverse.to_dense(), torch.eye(n, dtype=F64) / 2)
        gradient = grad(lambda b: (inverse @ b).sum())(torch.ones(n, dtype=F64))
        close(gradient, torch.ones(n, dtype=F64) / 2)

    def test_rectangles(self):
        with pytest.raises(ValueError, match=r"Dense\(2, 3\) is not square and has no inverse"):
            Inverse(Dense(torch.zeros(2, 3)), LU)


class TestStructure:
    def test_facts(self):
        definite = Inverse(Dense(spd(SQUARE), positive_definite=True), CHOLESKY)
        assert definite.positive_definite
        assert definite.T is definite
        general = Inverse(Dense(SQUARE), LU)
        assert general.structure == ops.Structure()
        assert general.T.T is general
        lower = Inverse(Dense(SQUARE.tril(), lower_triangular=True), LU)
        assert lower.lower_triangular
        assert lower.T.upper_triangular

    def test_in_the_algebra(self):
        A, b = Dense(SQUARE), sampled(N)
        inverse = Inverse(A, LU)
        M = torch.linalg.inv(SQUARE)
        close((2.0 * inverse + Identity(N)) @ b, 2 * M @ b + b)
        close((inverse.T @ inverse) @ b, M.T @ M @ b)
        assert isinstance(inverse.T @ inverse, ops.Gram)
        close((A @ inverse).to_dense(), torch.eye(N, dtype=F64))

    @pytest.mark.parametrize("name", ["Dense", "Diagonal", "Woodbury", "product", "multiple"])
    def test_logdet(self, name):
        family = FAMILIES[name]

        def logdet(p):
            return Inverse(family.operator(p), family.solver)._exact_logdet()

        expected = -torch.linalg.slogdet(family.matrix(family.p)).logabsdet
        close(logdet(family.p), expected)
        close(
            grad(logdet)(family.p),
            grad(lambda p: -torch.linalg.slogdet(family.matrix(p)).logabsdet)(family.p),
        )


class TestOneFactor:
    b = sampled(N, seed=7)

    def test_serves_every_product(self):
        solver = Counted()
        inverse = Inverse(Dense(SQUARE), solver)
        assert not solver.prepared  # lazily
        inverse @ self.b
        inverse @ sampled(N, 3)
        inverse.T @ self.b
        inverse.T @ sampled(N, 3)
        inverse.to_dense()
        (2.0 * inverse + Identity(N)) @ self.b
        vmap(lambda b: inverse @ b)(sampled(3, N))
        assert len(solver.prepared) == 1

    def test_serves_derivatives_by_b(self):
        solver = Counted()
        inverse = Inverse(Dense(SQUARE), solver)
        grad(lambda b: (inverse @ b).square().sum())(self.b)
        jvp(lambda b: inverse @ b, (self.b,), (self.b,))
        hessian(lambda b: (inverse @ b).square().sum())(self.b)
        assert len(solver.prepared) == 1

    def test_serves_forward_and_backward_of_plain_autograd(self):
        solver = Counted()
        M, b = SQUARE.clone().requires_grad_(), self.b.clone().requires_grad_()
        inverse = Inverse(Dense(M), solver)
        for _ in range(3):
            x = inverse @ b
            first = torch.autograd.grad(x.square().sum(), (M, b), create_graph=True)
            torch.autograd.grad(first[0].square().sum() + first[1].sum(), (M, b))
        assert len(solver.prepared) == 1

    def test_serves_forward_and_backward_of_torch_func(self):
        solver = Counted()
        grad(lambda M: (Inverse(Dense(M), solver) @ self.b).square().sum())(SQUARE)
        assert len(solver.prepared) == 1
        solver = Counted()
        jvp(lambda M: Inverse(Dense(M), solver) @ self.b, (SQUARE,), (SQUARE,))
        assert len(solver.prepared) == 1

    def test_gradient_is_one_solve_with_the_transpose(self):
        solver = Counted()
        M = SQUARE.clone().requires_grad_()
        x = Inverse(Dense(M), solver) @ self.b
        x.square().sum().backward()
        assert solver.solves == [("solve", (N,)), ("transpose", (N,))]

    def test_a_mapped_right_hand_side_is_one_block(self):
        solver = Counted()
        inverse = Inverse(Dense(SQUARE), solver)
        vmap(lambda b: inverse @ b)(sampled(5, N))
        assert solver.solves == [("solve", (N, 5))]
        vmap(vmap(lambda b: inverse.T @ b))(sampled(2, 3, N))
        assert solver.solves[1:] == [("transpose", (N, 6))]

    def test_mapped_tensors_have_a_factor_each(self):
        solver = Counted()
        vmap(lambda M: Inverse(Dense(M), solver) @ self.b)(torch.stack([SQUARE, 2 * SQUARE]))
        assert len(solver.prepared) == 2

    def test_without_grad(self):
        solver = Counted()
        inverse = Inverse(Dense(SQUARE), solver)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                close(inverse @ self.b, torch.linalg.solve(SQUARE, self.b))
        close(grad(lambda b: (inverse @ b).sum())(self.b), torch.linalg.inv(SQUARE).sum(0))
        assert len(solver.prepared) == 1

    def test_a_factor_made_under_a_transform_serves_outside(self):
        for transform in (
            lambda f: grad(lambda b: f(b).sum())(self.b),
            lambda f: jvp(f, (self.b,), (self.b,)),
            lambda f: vmap(f)(sampled(3, N)),
            lambda f: vmap(grad(lambda b: f(b).sum()))(sampled(3, N)),
        ):
            for A in (Dense(SQUARE), Hessian(loss, tree(POINT), OTHER)):
                inverse = Inverse(A, LU)
                transform(lambda b, inverse=inverse: inverse @ b)
                close(inverse @ self.b, torch.linalg.solve(A.to_dense(), self.b))
                close(
                    grad(lambda b, inverse=inverse: (inverse @ b).sum())(self.b),
                    torch.linalg.inv(A.to_dense()).sum(0),
                )


class TestChangesInPlace:
    b = sampled(N, seed=7)

    def test_of_the_tensors(self):
        solver, M = Counted(), SQUARE.clone()
        inverse = Inverse(Dense(M), solver)
        inverse @ self.b
        M.mul_(2)
        close(inverse @ self.b, torch.linalg.solve(2 * SQUARE, self.b))
        close(inverse.T @ self.b, torch.linalg.solve(2 * SQUARE.T, self.b))
        assert len(solver.prepared) == 2

    def test_by_an_optimiser(self):
        x = OTHER.clone().requires_grad_()
        inverse = Inverse(Hessian(loss, tree(POINT), x), CHOLESKY)
        optimiser = torch.optim.SGD([x], lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            (inverse @ self.b).square().sum().backward()
            here = x.detach().clone()
            expected = grad(
                lambda x: torch.linalg.solve(loss_matrix(POINT, x), self.b).square().sum()
            )(here)
            close(x.grad, expected)
            optimiser.step()
            assert not torch.equal(x.detach(), here)

    def test_between_forward_and_backward(self):
        """What backward would need is gone: torch says so."""
        M = SQUARE.clone().requires_grad_()
        value = (Inverse(Dense(M), LU) @ self.b).sum()
        with torch.no_grad():
            M.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()

    def test_in_inference_mode(self):
        """Such tensors do not count their versions."""
        with torch.inference_mode():
            M = SQUARE.clone()
            inverse = Inverse(Dense(M), LU)
            inverse @ self.b
            M.mul_(2)
            close(inverse @ self.b, torch.linalg.solve(2 * SQUARE, self.b))

    def test_of_a_tensor_that_is_closed_over(self):
        """No derivative is asked for, but the factor is of old values."""
        d = POINT.clone()
        A = ops.FunctionOperator(lambda v: d * v, torch.zeros(N, dtype=F64))
        inverse = Inverse(A, LU)
        inverse @ self.b
        d.mul_(2)
        close(inverse @ self.b, self.b / d)


def hidden(y: Tensor, c: Tensor) -> Tensor:
    return (c * y**3).sum()


class Penalty:
    def __init__(self, c: Tensor) -> None:
        self.c = c

    def __call__(self, y: Tensor) -> Tensor:
        return hidden(y, self.c)

    def method(self, y: Tensor) -> Tensor:
        return hidden(y, self.c)


class Module(torch.nn.Module):
    def __init__(self, c: Tensor) -> None:
        super().__init__()
        self.c = c if isinstance(c, torch.nn.Parameter) else None
        if self.c is None:
            self.register_buffer("held", c)

    def forward(self, y: Tensor) -> Tensor:
        return hidden(y, self.held if self.c is None else self.c)


def with_default(c: Tensor) -> Callable[[Tensor], Tensor]:
    def default(y, c=c):
        return hidden(y, c)

    return default


def with_keyword(c: Tensor) -> Callable[[Tensor], Tensor]:
    def default(y, *, c=c):
        return hidden(y, c)

    return default


def two_deep(c: Tensor) -> Callable[[Tensor], Tensor]:
    inner = lambda y: hidden(y, c)  # noqa: E731
    return lambda y: 2 * inner(y) / 2


class Slotted:
    __slots__ = ("c",)

    def __init__(self, c: Tensor) -> None:
        self.c = c

    def __call__(self, y: Tensor) -> Tensor:
        return hidden(y, self.c)


def scripted(source: str, **scope: Any) -> Callable[..., Tensor]:
    """The function ``loss`` of a script, whose globals are `scope` and what it defines."""
    scope = {"__name__": "__main__", "torch": torch, **scope}
    exec(source, scope)
    return scope["loss"]


WAYS_TO_HIDE: dict[str, Callable[[Tensor], LinearOperator]] = {
    "closure": lambda c: Hessian(lambda y: hidden(y, c), POINT),
    "closure over a closure": lambda c: Hessian(two_deep(c), POINT),
    "closure over a list": lambda c: Hessian(
        (lambda held: lambda y: hidden(y, held[0]["c"]))([{"c": c}]), POINT
    ),
    "partial": lambda c: Hessian(partial(hidden, c=c), POINT),
    "default": lambda c: Hessian(with_default(c), POINT),
    "keyword default": lambda c: Hessian(with_keyword(c), POINT),
    "bound method": lambda c: Hessian(Penalty(c).method, POINT),
    "callable object": lambda c: Hessian(Penalty(c), POINT),
    "closure over an object": lambda c: (
        lambda held: Hessian(lambda y: held.method(y), POINT)
    )(Penalty(c)),
    "module": lambda c: Hessian(Module(c), POINT),
    "closure over a module": lambda c: (
        lambda held: Hessian(lambda y: held(y), POINT)
    )(Module(c)),
    "forward mode": lambda c: Hessian(lambda y: hidden(y, c), POINT, mode="forward"),
    "function in args": lambda c: Hessian(lambda y, f: f(y), POINT, lambda y: hidden(y, c)),
    "module in args": lambda c: Hessian(lambda y, f: f(y), POINT, Module(c)),
    "FunctionOperator": lambda c: ops.FunctionOperator(
        lambda v: 6 * c * POINT * v, torch.zeros(N, dtype=F64)
    ),
    "operator": lambda c: (lambda D: ops.FunctionOperator(
        lambda v: D._matvec(v), torch.zeros(N, dtype=F64)
    ))(Diagonal(6 * c * POINT)),
    "closure of an operator": lambda c: (lambda H: ops.FunctionOperator(
        lambda v: H._matvec(v), torch.zeros(N, dtype=F64)
    ))(Hessian(lambda y: hidden(y, c), POINT)),
    "Jacobian": lambda c: ops.Jacobian(lambda y: 3 * c * y**2, POINT),
    "Linearization": lambda c: ops.Linearization(lambda y: 3 * c * y**2, POINT),
    "CrossDerivative": lambda c: ops.CrossDerivative(
        lambda y, x: (c * x**3 * y).sum() * 2, POINT, POINT.sqrt()
    ),
    "BatchMean": lambda c: ops.BatchMean(
        lambda chunk, y: Hessian(lambda y, chunk: chunk.mean() * hidden(y, c), y, chunk),
        torch.ones(3, dtype=F64), POINT, chunk_size=2,
    ),
    "global": lambda c: Hessian(scripted("def loss(y): return (c * y**3).sum()", c=c), POINT),
    "global of a helper": lambda c: Hessian(
        scripted("def loss(y): return f(y)\ndef f(y): return (c * y**3).sum()", c=c), POINT
    ),
    "slots": lambda c: Hessian(Slotted(c), POINT),
    "loss of GaussNewton": lambda c: ops.GaussNewton(
        lambda y, x: x * y, lambda o, t: (c * (o - t) ** 2).mean(), POINT,
        torch.ones(3, N, dtype=F64), torch.zeros(3, N, dtype=F64),
    ),
    "model of Fisher": lambda c: ops.Fisher(
        lambda y, x: c * x * y, "gaussian", POINT, torch.ones(3, N, dtype=F64)
    ),
    "inside a sum": lambda c: Hessian(lambda y: hidden(y, c), POINT) + 0.0 * Identity(N),
    "inside an Inverse": lambda c: Inverse(
        Inverse(Hessian(lambda y: hidden(y, c), POINT), LU), LU
    ),
    "inside a batch": lambda c: ops.Stacked.of(
        vmap(lambda y: Hessian(lambda y: hidden(y, c[0]), y))(POINT[:, None])
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS_TO_HIDE)
class TestHiddenTensors:
    """A tensor that is differentiated, but reached by a closure: a gradient of zero, silently."""

    b = sampled(N, seed=7)
    message = r"closes over a tensor of shape \(4,\) .* hand it over as an argument"

    def product(self, way: str, c: Tensor) -> Tensor:
        inverse = Inverse(WAYS_TO_HIDE[way](c), LU)
        return (
            inverse @ inverse.domain.unravel(self.b)
            if way == "inside a batch"
            else inverse @ self.b
        )

    def test_refused_under_plain_autograd(self, way):
        leaf = POINT.clone().requires_grad_()
        c = torch.nn.Parameter(POINT.clone()) if "module" in way else leaf
        with pytest.raises(ValueError, match=self.message):
            self.product(way, c)
        with pytest.raises(ValueError, match=self.message):
            self.product(way, c if "module" in way else 2 * leaf)

    @pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "jacfwd"])
    def test_refused_under_torch_func(self, way, transform):
        def total(c):
            return self.product(way, c).sum()

        run = {
            "grad": lambda: grad(total)(POINT),
            "jvp": lambda: jvp(total, (POINT,), (POINT,)),
            "vmap": lambda: vmap(total)(torch.stack([POINT, POINT])),
            "jacfwd": lambda: jacfwd(total)(POINT),
        }
        with pytest.raises(ValueError, match=self.message):
            run[transform]()

    def test_not_refused_where_nothing_is_differentiated(self, way):
        leaf = torch.nn.Parameter(POINT.clone())
        plain = self.product(way, POINT.clone())
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                x = self.product(way, leaf)
                torch.testing.assert_close(x, plain)

    def test_not_refused_where_only_b_is_differentiated(self, way):
        inverse = Inverse(WAYS_TO_HIDE[way](POINT.clone()), LU)

        def total(b):
            return inverse._matvec(b).square().sum()

        M = inverse.to_dense()
        close(grad(total)(self.b), 2 * M.T @ M @ self.b)
        close(vmap(grad(total))(self.b[None])[0], 2 * M.T @ M @ self.b)


class TestModulesByFunctionalCall:
    """The usual way to a module's curvature: the closure holds the module, whose own parameters
    `functional_call` replaces by y."""

    data = sampled(6, 2)

    def setup_method(self):
        self.module = torch.nn.Linear(2, 1, bias=False, dtype=F64)
        with torch.no_grad():
            self.module.weight.copy_(torch.tensor([[1.0, -1.0]]))

    def loss(self, module):
        def loss(y, penalty):
            output = torch.func.functional_call(module, y, (self.data,))
            return output.square().mean() + penalty * sum(v.square().sum() for v in y.values())

        return loss

    @pytest.mark.parametrize("detached", [False, True])
    def test_hessian_and_its_inverse(self, detached):
        y = dict(self.module.named_parameters())
        y = {k: v.detach() for k, v in y.items()} if detached else y
        b = {"weight": sampled(1, 2)}
        penalty = torch.tensor(0.5, dtype=F64)
        x = Inverse(Hessian(self.loss(self.module), y, penalty), CHOLESKY) @ b
        matrix = 2 * self.data.T @ self.data / 6 + torch.eye(2, dtype=F64)
        close(x["weight"].detach()[0], torch.linalg.solve(matrix, b["weight"][0]))

    def test_gradient_by_an_argument(self):
        y = {k: v.detach() for k, v in self.module.named_parameters()}
        b = sampled(2)

        def ours(penalty):
            A = Hessian(self.loss(self.module), y, penalty)
            return (Inverse(A, CHOLESKY) @ b).sum()

        def theirs(penalty):
            matrix = 2 * self.data.T @ self.data / 6 + 2 * penalty * torch.eye(2, dtype=F64)
            return torch.linalg.solve(matrix, b).sum()

        penalty = torch.tensor(0.5, dtype=F64)
        close(grad(ours)(penalty), grad(theirs)(penalty))

    def test_frozen_modules(self):
        self.module.requires_grad_(False)
        y = dict(self.module.named_parameters())
        A = Hessian(self.loss(self.module), y, torch.tensor(0.5, dtype=F64))
        close(A @ (Inverse(A, CHOLESKY) @ sampled(2)), sampled(2))

    @pytest.mark.parametrize("where", ["closure", "global"])
    def test_parameters_that_were_moved_on(self, where):
        """What the module holds requires gradients, but is not what the loss is evaluated at."""
        y = {"weight": self.module.weight.detach() + 1.0}
        loss = self.loss(self.module)
        if where == "global":
            source = """def loss(y, penalty):
            output = torch.func.functional_call(module, y, (data,))
            return output.square().mean() + penalty * y["weight"].square().sum()"""
            loss = scripted(source, module=self.module, data=self.data)
        x = Inverse(Hessian(loss, y, torch.tensor(0.5, dtype=F64)), CHOLESKY) @ sampled(2)
        matrix = 2 * self.data.T @ self.data / 6 + torch.eye(2, dtype=F64)
        close(x, torch.linalg.solve(matrix, sampled(2)))

    def test_a_second_module_that_fits_may_be_called_as_it_is(self):
        teacher = torch.nn.Linear(2, 1, bias=False, dtype=F64)

        def loss(y):
            output = torch.func.functional_call(self.module, y, (self.data,))
            return ((output - teacher(self.data)) ** 4).mean()

        y = {"weight": self.module.weight.detach() + 1.0}
        with pytest.raises(ValueError, match=r"closes over a tensor of shape \(1, 2\)"):
            Inverse(Hessian(loss, y), LU) @ sampled(2)
        teacher.requires_grad_(False)
        self.module.requires_grad_(False)
        A = Hessian(loss, y)
        close(A @ (Inverse(A, LU) @ sampled(2)), sampled(2))


class TestWhatIsNoVariable:
    """Nothing is refused that could not have a derivative."""

    def test_a_global_that_the_loss_does_not_name(self):
        source = "def loss(y): return (y**4).sum()"
        x = POINT.clone().requires_grad_()
        inverse = Inverse(Hessian(scripted(source, x=x), POINT), LU)
        close(inverse @ POINT, POINT / (12 * POINT**2))

    def test_what_a_transform_left_behind(self):
        held = []

        def loss(y):
            held.append(2 * y)
            return (y**4).sum()

        grad(loss)(POINT)
        inverse = Inverse(Hessian(loss, POINT), LU)
        close(inverse @ POINT.clone().requires_grad_(), POINT / (12 * POINT**2))

    def test_what_the_solver_holds(self):
        class Holding(Counted):
            held = POINT.clone().requires_grad_()

        inverse = Inverse(Hessian(lambda y: (y**4).sum(), POINT), Holding())
        close(inverse @ POINT.clone().requires_grad_(), POINT / (12 * POINT**2))

    def test_values_that_carry_the_derivative(self):
        """Of a sparse derivative: the function is not evaluated again."""
        u, b = POINT, sampled(N, seed=7)

        def ours(x):
            return (Inverse(ops.SparseJacobian(lambda u: x * u**3 + u, u), LU) @ b).sum()

        x = OTHER.clone().requires_grad_()
        ours(x).backward()
        expected = grad(lambda x: (b / (3 * x * u**2 + 1)).sum())(OTHER)
        close(x.grad, expected)


class TestBoundAnew:
    """The factor is of what the names in the function were bound to."""

    def check(self, loss: Any, rebind: Callable[[], None]) -> None:
        inverse = Inverse(Hessian(loss, POINT), LU)
        close(inverse @ POINT, POINT / (12 * POINT**2))
        rebind()
        close(inverse @ POINT, POINT / (60 * POINT**2))
        close(
            grad(lambda b: (inverse @ b).sum())(POINT),
            1 / (60 * POINT**2),
        )

    def test_a_number_in_a_closure(self):
        x = 1.0

        def rebind():
            nonlocal x
            x = 5.0

        self.check(lambda y: (x * y**4).sum(), rebind)

    @pytest.mark.parametrize("value", [1.0, torch.tensor(1.0, dtype=F64)], ids=["number", "tensor"])
    def test_a_global(self, value):
        loss = scripted("def loss(y): return (x * y**4).sum()", x=value)
        self.check(loss, lambda: loss.__globals__.update(x=5 * value))

    def test_an_attribute(self):
        penalty = Penalty(torch.tensor(1.0, dtype=F64))
        penalty.loss = lambda y: (penalty.c * y**4).sum()
        self.check(penalty.loss, lambda: setattr(penalty, "c", torch.tensor(5.0, dtype=F64)))

    def test_a_function_that_counts_keeps_its_factor(self):
        solver, calls, count = Counted(), [], 0

        def residual(u):
            nonlocal count
            count += 1
            calls.append(count)
            return u**3

        inverse = Inverse(ops.Jacobian(residual, POINT), solver)
        for _ in range(3):
            close(inverse @ POINT, 1 / (3 * POINT))
        assert len(solver.prepared) == 1


def test_implicit_differentiation_by_hand():
    """``dy*/dx = -H^-1 C^T`` of ``y*(x) = argmin |y|^2 / 2 + sum y^4 / 12 - <x, y>``."""
    x = sampled(3)

    def inner(y, x):
        return (y @ y) / 2 + (y**4).sum() / 12 - x @ y

    y = torch.zeros(3, dtype=F64)
    for _ in range(30):
        y = y - torch.linalg.solve(torch.func.hessian(inner)(y, x), grad(inner)(y, x))
    H, C = Hessian(inner, y, x, positive_definite=True), ops.CrossDerivative(inner, y, x)
    sensitivity = -1.0 * C @ Inverse(H, CG)
    close(sensitivity.T.to_dense(), torch.diag(1 / (1 + y**2)))


def test_errors_of_the_solver_come_through():
    singular = Inverse(Dense(torch.zeros(2, 2)), LU)
    with pytest.raises(solvers.SingularError, match="singular"):
        singular @ torch.ones(2)
    with pytest.raises(solvers.StructureError, match="CG needs a symmetric operator"):
        Inverse(Dense(SQUARE), CG) @ sampled(N)
    with pytest.raises(ValueError, match="NaN or infinite"):
        Inverse(Dense(SQUARE), LU) @ torch.full((N,), float("nan"), dtype=F64)
    with pytest.raises(ValueError, match=r"shape \(3,\); expected"):
        Inverse(Dense(SQUARE), LU) @ sampled(3)
