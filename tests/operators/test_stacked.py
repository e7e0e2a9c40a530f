"""`Stacked` against the block-diagonal matrix of its members."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils import _pytree as pytree

import operators as ops
import solvers
from operators import Dense, Diagonal, Hessian, LinearOperator, LowRankPlusDiagonal, Stacked

F64 = torch.float64


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def loss(y: dict[str, Tensor], x: Tensor) -> Tensor:
    v = torch.cat([y["a"], y["b"][None]])
    return (x * v**4).sum() + v.prod()


def residual(y: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    return {"r": x[:2] * y["a"] ** 2, "s": y["b"] * y["a"]}


def tree(v: Tensor) -> dict[str, Tensor]:
    return {"a": v[:2], "b": v[2]}


def spd(n: int, seed: int) -> Tensor:
    M = sampled(n, n, seed=seed)
    return M @ M.T + torch.eye(n, dtype=F64)


def linear_model(w: Tensor, x: Tensor) -> Tensor:
    return x @ w


MEMBERS: dict[str, Callable[[int], LinearOperator]] = {
    "Dense": lambda s: Dense(sampled(3, 3, seed=s)),
    "Dense wide": lambda s: Dense(sampled(2, 3, seed=s)),
    "Dense symmetric": lambda s: Dense(
        sampled(3, 3, seed=s) + sampled(3, 3, seed=s).T, symmetric=True
    ),
    "Diagonal": lambda s: Diagonal(sampled(3, seed=s)),
    "LowRankPlusDiagonal": lambda s: LowRankPlusDiagonal(
        sampled(2, 3, seed=s), sampled(3, seed=s + 50)
    ),
    "compound": lambda s: (
        Dense(sampled(3, 3, seed=s)).T @ Diagonal(sampled(3, seed=s + 50))
        + 2.0 * Dense(sampled(3, 3, seed=s + 60))
    ),
    "Hessian": lambda s: Hessian(loss, tree(sampled(3, seed=s)), sampled(3, seed=s + 50)),
    "Jacobian": lambda s: ops.Jacobian(residual, tree(sampled(3, seed=s)), sampled(3, seed=s + 50)),
    "Linearization": lambda s: ops.Linearization(
        residual, tree(sampled(3, seed=s)), sampled(3, seed=s + 50)
    ),
    "FunctionOperator": lambda s: ops.FunctionOperator(
        torch.mul, torch.zeros(3, dtype=F64), sampled(3, seed=s)
    ),
    "MFACInverse": lambda s: ops.MFACInverse(sampled(2, 3, seed=s), 0.5),
    "LowRankUpdate": lambda s: ops.LowRankUpdate(
        sampled(2, 3, seed=s), sampled(2, 3, seed=s + 50), 2.0
    ),
    "LBFGSInverse": lambda s: ops.LBFGSInverse(sampled(2, 3, seed=s), sampled(2, 3, seed=s), 2.0),
    "KFAC": lambda s: ops.KFAC(
        {"": (spd(1, s), spd(3, s + 50))}, ops.Space.of({"weight": sampled(1, 3)}), 0.5
    ),
    "Saddle": lambda s: ops.Saddle(Dense(spd(2, s), symmetric=True), Dense(sampled(1, 2, seed=s))),
    "EmpiricalFisher": lambda s: ops.EmpiricalFisher(sampled(2, 3, seed=s), 0.5),
    "Nystrom": lambda s: ops.Nystrom(
        Dense(spd(3, s), symmetric=True), 2, damping=0.5, power_iterations=0
    ),
    "Inverse": lambda s: ops.Inverse(
        Dense(sampled(3, 3, seed=s) + 4 * torch.eye(3)), solvers.DenseLU()
    ),
    "Stacked": lambda s: Stacked([Dense(sampled(2, 3, seed=s + i)) for i in (0, 70)]),
}
every_kind = pytest.mark.parametrize("name", MEMBERS)


@every_kind
@pytest.mark.parametrize("count", [1, 3])
class TestAgainstTheBlockDiagonal:
    def build(self, name: str, count: int) -> tuple[list[LinearOperator], Stacked, Tensor]:
        members = [MEMBERS[name](seed) for seed in range(count)]
        # Row b of a batch goes to A_b; leaf by leaf, the coordinates interleave.
        S = Stacked(members)
        return members, S, torch.block_diag(*[A.to_dense() for A in members])

    def batch(self, members: list[LinearOperator], seed: int) -> tuple[Tensor, object]:
        rows = [sampled(A.shape[1], seed=seed + i) for i, A in enumerate(members)]
        trees = [A.domain.unravel(row) for A, row in zip(members, rows, strict=True)]
        return torch.stack(rows), pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)

    def test_rows_go_to_their_operators(self, name, count):
        members, S, _ = self.build(name, count)
        rows, batch = self.batch(members, 20)
        result = S @ batch
        assert S.codomain.holds(result)
        for b, (A, row) in enumerate(zip(members, rows, strict=True)):
            one = pytree.tree_map(lambda leaf, b=b: leaf[b], result)
            close(A.codomain.ravel(one), A @ row)

    def test_matrix(self, name, count):
        members, S, blocks = self.build(name, count)
        assert S.shape == tuple(blocks.shape)
        matrix = S.to_dense()
        if members[0].domain.is_flat and members[0].codomain.is_flat:
            close(matrix, blocks)
        v, V = sampled(S.shape[1], seed=30), sampled(S.shape[1], 2, seed=31)
        close(S @ v, matrix @ v)
        close(S @ V, matrix @ V)
        assert (S @ V[:, :0]).shape == (S.shape[0], 0)
        if blocks.shape[0] == blocks.shape[1]:
            # the two layouts of coordinates differ by a permutation
            close(matrix.square().sum(), blocks.square().sum())

    def test_transpose(self, name, count):
        _, S, _ = self.build(name, count)
        matrix = S.to_dense()
        u, U = sampled(S.shape[0], seed=32), sampled(S.shape[0], 2, seed=33)
        close(S.T @ u, matrix.T @ u)
        close(S.T @ U, matrix.T @ U)
        close(S.T.T.to_dense(), matrix)
        assert S.T.domain == S.codomain

    def test_members(self, name, count):
        members, S, _ = self.build(name, count)
        assert len(S) == count
        for b, A in enumerate(members):
            close(S[b].to_dense(), A.to_dense())
            close(S[b - count].to_dense(), A.to_dense())
        assert len(list(S)) == count
        for index in (count, -count - 1):
            with pytest.raises(IndexError, match=f"index {index} for a stack of {count}"):
                S[index]

    def test_cost(self, name, count):
        members = [MEMBERS[name](s) for s in range(count)]
        S = Stacked(members)
        assert S.cost == count * members[0].cost
        assert str(S.cost) in str(S)
        assert ops.Kronecker(S, Dense(sampled(2, 2))).shape == (2 * S.shape[0], 2 * S.shape[1])

    def test_facts_of_members(self, name, count):
        members, S, _ = self.build(name, count)
        for fact in ("symmetric", "positive_semidefinite", "positive_definite", "diagonal"):
            shared = all(getattr(A, fact) for A in members)
            assert getattr(S, fact) <= shared
            for b, A in enumerate(members):
                assert getattr(S[b], fact) <= getattr(A, fact)

    def test_of_vmap(self, name, count):
        members, S, _ = self.build(name, count)
        stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), *members)
        T = Stacked.of(vmap(lambda A: A)(stacked))
        v = sampled(S.shape[1], seed=34)
        close(T @ v, S @ v)
        close(T.T @ sampled(S.shape[0]), S.T @ sampled(S.shape[0]))

    def test_hooks(self, name, count):
        _, S, _ = self.build(name, count)
        if S.shape[0] != S.shape[1]:
            return
        matrix = S.to_dense()
        diagonal, trace, logdet = S._exact_diagonal(), S._exact_trace(), S._exact_logdet()
        if diagonal is not None:
            close(diagonal, matrix.diagonal())
        if trace is not None:
            close(trace, matrix.trace())
        if logdet is not None:
            close(logdet, torch.linalg.slogdet(matrix).logabsdet)
        if name in ("Dense", "Diagonal", "LowRankPlusDiagonal"):
            assert diagonal is not None
            assert trace is not None
            assert logdet is not None

    def test_derivatives(self, name, count):
        _, S, _ = self.build(name, count)
        u, v, w = (sampled(S.shape[i], seed=35 + i) for i in (0, 1, 1))
        gradient = grad(lambda S: u @ (S @ v))(S)
        assert isinstance(gradient, Stacked)
        direction = pytree.tree_map(lambda t: torch.cos(t), S)
        h = 1e-6
        ahead, behind = (
            pytree.tree_map(lambda t, d, s=s: t + s * h * d, S, direction) for s in (1, -1)
        )
        difference = u @ (ahead @ v - behind @ v) / (2 * h)
        slope = sum((g * d).sum() for g, d in zip(gradient.tensors, direction.tensors, strict=True))
        torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-6)
        close(jvp(lambda v: S @ v, (v,), (w,))[1], S @ w)


class TestDerivativesByTheTensorsOfTheMembers:
    def test_plain_autograd(self):
        matrices = [sampled(2, 2, seed=i).requires_grad_() for i in range(3)]
        S, V = Stacked([Dense(M) for M in matrices]), sampled(3, 2)
        for _ in range(2):
            gradients = torch.autograd.grad((S @ V).sum(), matrices, retain_graph=True)
            for b, g in enumerate(gradients):
                close(g, torch.outer(torch.ones(2, dtype=F64), V[b]))

    def test_torch_func(self):
        M, V = sampled(3, 2, 2), sampled(3, 2)

        def energy(M):
            return (Stacked([Dense(m) for m in M]) @ V).square().sum()

        expected = grad(lambda M: torch.einsum("bij,bj->bi", M, V).square().sum())(M)
        close(grad(energy)(M), expected)
        batches = torch.stack([M, 2 * M])
        close(vmap(grad(energy))(batches)[0], expected)


class TestFacts:
    def test_those_that_all_share(self):
        definite, semidefinite, indefinite = (
            Diagonal(torch.tensor(values)) for values in ([1.0, 2.0], [1.0, 0.0], [1.0, -1.0])
        )
        assert Stacked([definite, definite]).positive_definite
        mixed = Stacked([definite, semidefinite])
        assert mixed.positive_semidefinite
        assert not mixed.positive_definite
        assert not Stacked([definite, indefinite]).positive_semidefinite
        assert Stacked([definite, indefinite]).diagonal
        assert Stacked([definite]).block_diagonal

    def test_of_a_member_are_not_those_of_the_first(self):
        S = Stacked([Diagonal(torch.tensor([1.0, 2.0])), Diagonal(torch.tensor([-1.0, -2.0]))])
        assert not S[1].positive_semidefinite
        with pytest.raises(ValueError, match="positive"):
            solvers.DenseCholesky().prepare(S[1])

    def test_triangles(self):
        lower = [Dense(sampled(3, 3, seed=s).tril(), lower_triangular=True) for s in (0, 1)]
        S = Stacked(lower)
        assert S.lower_triangular
        assert S.T.upper_triangular
        assert not S.T.lower_triangular
        assert not Stacked([lower[0], Dense(sampled(3, 3))]).lower_triangular

    def test_triangles_over_nested_structures(self):
        """Leaf by leaf the coordinates interleave: is what is triangular still triangular?"""

        def lower(v: dict[str, Tensor], c: Tensor) -> dict[str, Tensor]:
            return {"p": c * v["p"], "q": v["q"] + v["p"].sum()}

        example = {"p": torch.zeros(2, dtype=F64), "q": torch.zeros(2, dtype=F64)}
        members = [
            ops.FunctionOperator(lower, example, torch.tensor(c, dtype=F64), lower_triangular=True)
            for c in (1.0, 2.0)
        ]
        S = Stacked(members)
        matrix = S.to_dense()
        assert not S.lower_triangular or torch.equal(matrix, matrix.tril())

    def test_a_diagonal_stays_diagonal_over_nested_structures(self):
        space = ops.Space.of(tree(torch.zeros(3, dtype=F64)))
        S = Stacked([Diagonal(sampled(3, seed=s), space) for s in range(2)])
        assert torch.equal(S.to_dense(), torch.diag(S._exact_diagonal()))


class TestClaims:
    def test_are_tried_for_each(self):
        good, bad = torch.eye(2, dtype=F64), -torch.eye(2, dtype=F64)
        with pytest.raises(ops.FalseClaimError, match="positive definite"):
            Stacked([Dense(good, positive_definite=True), Dense(bad, positive_definite=True)])
        S = Stacked([Dense(good, positive_definite=True)] * 2)
        assert S.positive_definite
        close(
            solvers.CG().prepare(S).solve(torch.ones(4, dtype=F64)).value, torch.ones(4, dtype=F64)
        )


class TestSolves:
    def test_inverse(self):
        members = [Dense(sampled(3, 3, seed=s) + 4 * torch.eye(3)) for s in range(3)]
        inverse = ops.Inverse(Stacked(members), solvers.DenseLU())
        B = sampled(3, 3, seed=9)
        expected = torch.linalg.solve(torch.stack([A.matrix for A in members]), B)
        close(inverse @ B, expected)


class TestModelsAndTheirLosses:
    """Members are alike where model and loss are the same, however often these were wrapped."""

    x, t = sampled(5, 3), sampled(5, 2, seed=1)
    labels = torch.tensor([0, 1, 1, 0, 1])

    @pytest.mark.parametrize("loss", ["mse", "cross-entropy", "own"])
    def test_gauss_newton(self, loss):
        own = lambda o, t: ((o - t) ** 4).mean()  # noqa: E731
        targets = self.labels if loss == "cross-entropy" else self.t
        members = [
            ops.GaussNewton(
                linear_model,
                own if loss == "own" else loss,
                sampled(3, 2, seed=seed),
                self.x,
                targets,
            )
            for seed in (2, 3)
        ]
        close(ops.Stacked(members).to_dense(), torch.block_diag(*(A.to_dense() for A in members)))

    def test_weights_of_the_loss(self):
        members = [
            ops.GaussNewton(
                linear_model,
                torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, c], dtype=torch.float64)),
                sampled(3, 2, seed=2),
                self.x,
                self.labels,
            )
            for c in (1.0, 5.0)
        ]
        close(ops.Stacked(members).to_dense(), torch.block_diag(*(A.to_dense() for A in members)))

    def test_modules_and_likelihoods(self):
        net = torch.nn.Linear(3, 2).double()
        for make in (
            lambda c: ops.GaussNewton(net, "mse", None, self.x, self.t, damping=c),
            lambda c: ops.Fisher(net, "categorical", None, self.x, damping=c),
            lambda c: ops.Fisher(net, ops.Gaussian(variance=2.0), None, self.x, damping=c),
        ):
            members = [make(torch.tensor(c, dtype=torch.float64)) for c in (0.1, 0.2)]
            S = ops.Stacked(members)
            v = sampled(2, 8, seed=4)
            image = S @ {"weight": v[:, :6].reshape(2, 2, 3), "bias": v[:, 6:]}
            rows = torch.cat([image["weight"].reshape(2, 6), image["bias"]], 1)
            close(rows, torch.stack([A @ v_b for A, v_b in zip(members, v, strict=True)]))

    def test_residuals(self):
        members = [ops.GaussNewton.from_residual(torch.sin, u) for u in sampled(2, 3)]
        close(ops.Stacked(members).to_dense(), torch.block_diag(*(A.to_dense() for A in members)))

    def test_other_settings_are_no_batch(self):
        def member(loss):
            return ops.GaussNewton(linear_model, loss, sampled(3, 2), self.x, self.labels)

        losses = (torch.nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss(label_smoothing=0.1))
        with pytest.raises(ValueError, match="differ in more than the values"):
            ops.Stacked([member(loss) for loss in losses])
        one, other = torch.nn.Linear(3, 2).double(), torch.nn.Linear(3, 2).double()
        with pytest.raises(ValueError, match="differ in more than the values"):
            ops.Stacked([ops.GaussNewton(net, "mse", None, self.x, self.t) for net in (one, other)])


class TestRefusals:
    @pytest.mark.parametrize(
        ("operators", "message"),
        [
            ([], "operators is empty"),
            ([Dense(sampled(2, 2)), Diagonal(sampled(2))], r"operators\[1\] is Diagonal.*unlike"),
            ([Dense(sampled(2, 2)), Dense(sampled(2, 3))], r"operators\[1\] is Dense\(2, 3\)"),
            ([2.0 * Dense(sampled(2, 2)), 3.0 * Dense(sampled(2, 2))], r"operators\[1\] is 3.0"),
            (
                [Dense(torch.eye(2), symmetric=True), Dense(torch.ones(2, 2))],
                r"operators\[1\] is Dense",
            ),
            (
                [ops.Jacobian(torch.sin, sampled(2)), ops.Jacobian(torch.cos, sampled(2))],
                r"operators\[1\] is Jacobian",
            ),
            (
                [LowRankPlusDiagonal(sampled(1, 3), 1.0), LowRankPlusDiagonal(sampled(2, 3), 1.0)],
                r"operators\[1\] is LowRank",
            ),
        ],
    )
    def test_unlike_operators(self, operators, message):
        with pytest.raises(ValueError, match=message):
            Stacked(operators)

    def test_what_is_no_operator(self):
        with pytest.raises(TypeError, match=r"operators\[1\] is a Tensor; expected an operator"):
            Stacked([Dense(sampled(2, 2)), sampled(2, 2)])

    def test_no_common_axis(self):
        A = LowRankPlusDiagonal(sampled(2, 3), sampled(3))
        with pytest.raises(ValueError, match=r"leading axes .*expected one common axis"):
            Stacked.of(A)
        with pytest.raises(ValueError, match=r"leading axes"):
            Stacked.of(ops.Identity(3))

    def test_arguments(self):
        S = Stacked([Dense(sampled(2, 3, seed=s)) for s in range(4)])
        with pytest.raises(ValueError, match=r"shape \(5, 3\)"):
            S @ sampled(5, 3)
        with pytest.raises(TypeError, match=r"float32"):
            S @ sampled(4, 3).float()


@pytest.mark.parametrize(("m", "n"), [(0, 0), (0, 3), (3, 0)])
def test_empty_members(m, n):
    S = Stacked([Dense(sampled(m, n)) for _ in range(2)])
    assert S.shape == (2 * m, 2 * n)
    assert torch.equal(S @ torch.zeros(2, n, dtype=F64), torch.zeros(2, m, dtype=F64))
    assert (S @ torch.zeros(2 * n, 3, dtype=F64)).shape == (2 * m, 3)
    assert S.to_dense().shape == (2 * m, 2 * n)
    assert S.T.to_dense().shape == (2 * n, 2 * m)


def test_identities_alone():
    """An operator may have no tensor that moves."""
    S = Stacked([ops.Identity(3, F64) for _ in range(2)])
    V = sampled(2, 3)
    close(S @ V, V)
    close(S.T @ V, V)


def test_the_stack_is_a_copy():
    matrices = [sampled(2, 2, seed=s) for s in range(2)]
    S, V = Stacked([Dense(M) for M in matrices]), sampled(2, 2, seed=5)
    before = S @ V
    matrices[0].mul_(2)
    close(S @ V, before)
