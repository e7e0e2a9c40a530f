"""A claim is tried at the first use: a true one passes, a false one is refuted by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp, vmap

import operators as ops
import solvers
from operators import (
    Dense,
    Diagonal,
    FalseClaimError,
    FunctionOperator,
    Hessian,
    LinearOperator,
    LowRankPlusDiagonal,
)
from operators.claims import refute

F64 = torch.float64
few = settings(deadline=None, max_examples=25, derandomize=True)
seeds = st.integers(0, 10**6)


def sampled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def with_eigenvalues(values: Tensor, seed: int) -> Tensor:
    """Symmetric matrix with these eigenvalues, and random eigenvectors."""
    n = values.shape[0]
    q = torch.linalg.qr(sampled(n, n, seed=seed)).Q
    matrix = q @ torch.diag(values) @ q.T
    return (matrix + matrix.T) / 2


def function_of(matrix: Tensor, **claims: bool) -> FunctionOperator:
    example = torch.zeros(matrix.shape[1], dtype=matrix.dtype)
    return FunctionOperator(lambda v, M: M @ v, example, matrix, **claims)


def hessian_of(matrix: Tensor, **claims: bool) -> Hessian:
    example = torch.zeros(matrix.shape[1], dtype=matrix.dtype)
    return Hessian(lambda y, M: y @ M @ y / 2, example, matrix, **claims)


N = 5
ROOT = sampled(N, N)
MATRICES = {
    "definite": ROOT @ ROOT.T + torch.eye(N, dtype=F64),
    "semidefinite": ROOT[:, :2] @ ROOT[:, :2].T,
    "indefinite": with_eigenvalues(torch.tensor([-0.1, 1.0, 2.0, 3.0, 4.0], dtype=F64), 1),
    "negative": -torch.eye(N, dtype=F64),
    "zero": torch.zeros(N, N, dtype=F64),
    "general": ROOT,
    "lower": ROOT.tril(),
    "upper": ROOT.triu(),
    "diagonal": torch.diag(ROOT.diagonal()),
    "almost lower": ROOT.tril() + torch.eye(N, dtype=F64).roll(1, 1).tril(1).triu(1) / 100,
}
TRUE = {
    "symmetric": {"definite", "semidefinite", "indefinite", "negative", "zero", "diagonal"},
    "positive_semidefinite": {"definite", "semidefinite", "zero"},
    "positive_definite": {"definite"},
    "lower_triangular": {"lower", "diagonal", "negative", "zero"},
    "upper_triangular": {"upper", "diagonal", "negative", "zero"},
}
PAIRS = [(claim, kind) for claim in TRUE for kind in MATRICES]
# A singular matrix is not told from a definite one: no random vector lies in its kernel.
PAIRS.remove(("positive_definite", "semidefinite"))


@pytest.mark.parametrize(("claim", "kind"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("build", [Dense, function_of], ids=["Dense", "FunctionOperator"])
def test_every_claim_about_every_matrix(build, claim, kind, dtype):
    matrix = MATRICES[kind].to(dtype)
    if kind in TRUE[claim]:
        A = build(matrix, **{claim: True})
        assert getattr(A, claim)
        torch.testing.assert_close(A @ matrix[0], matrix @ matrix[0])
        assert A.check_claims()
        return
    name = claim.replace("_", " ")
    with pytest.raises(FalseClaimError, match=rf"claimed ({name}|symmetric)"):
        build(matrix, **{claim: True}) @ matrix[0]


@pytest.mark.parametrize("kind", ["diagonal", "lower", "upper", "general", "definite"])
@pytest.mark.parametrize("build", [Dense, function_of], ids=["Dense", "FunctionOperator"])
def test_diagonal_is_claimed_as_both_triangles(build, kind):
    matrix = MATRICES[kind]
    claims = {"lower_triangular": True, "upper_triangular": True}
    if kind == "diagonal":
        A = build(matrix, **claims)
        assert A.diagonal
        assert A.check_claims()
    else:
        with pytest.raises(FalseClaimError, match=r"claimed (lower|upper) triangular|symmetric"):
            build(matrix, **claims).check_claims()


@pytest.mark.parametrize("size", [1, 2, 3, 20])
@pytest.mark.parametrize("claim", ["lower_triangular", "upper_triangular"])
def test_triangles_of_functions(size, claim):
    matrix = sampled(size, size)
    right = matrix.tril() if claim == "lower_triangular" else matrix.triu()
    assert function_of(right, **{claim: True}).check_claims()
    if size > 1:
        with pytest.raises(FalseClaimError, match=claim):
            function_of(right.T, **{claim: True}).check_claims()
        dot = right.clone()  # a single entry where there is none, on the wrong side
        dot[(0, size - 1) if claim == "lower_triangular" else (size - 1, 0)] += 1e-3
        with pytest.raises(FalseClaimError, match=claim):
            function_of(dot, **{claim: True}).check_claims()


def test_what_is_vouched_for_is_not_tried():
    asked = []

    def matvec(v: Tensor) -> Tensor:
        asked.append(v)
        return MATRICES["general"] @ v

    n = len(MATRICES["general"])
    A = FunctionOperator(matvec, torch.zeros(n, dtype=F64), symmetric=True)
    assert A.vouched() is A
    asked.clear()
    A @ torch.ones(n, dtype=F64)
    assert len(asked) == 1
    again = FunctionOperator(matvec, torch.zeros(n, dtype=F64), symmetric=True)
    with pytest.raises(FalseClaimError):
        again @ torch.ones(n, dtype=F64)


class TestLinear:
    """Every FunctionOperator claims that."""

    @pytest.mark.parametrize(
        "matvec",
        [
            lambda v: v + 1,
            lambda v: v**2,
            lambda v: v.abs(),
            lambda v: v / v.norm(),
            lambda v: torch.relu(v),
            lambda v: v * (1 + 1e-4 * torch.tanh(v)),
        ],
    )
    def test_functions_that_are_not(self, matvec):
        A = FunctionOperator(matvec, torch.zeros(4, dtype=F64))
        with pytest.raises(FalseClaimError, match=r"FunctionOperator\(4, 4\).*not linear"):
            A @ torch.ones(4, dtype=F64)

    @pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
    @pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
    @pytest.mark.parametrize("size", [1, 3, 400])
    def test_functions_that_are(self, dtype, scale, size):
        A = FunctionOperator(lambda v: scale * v.cumsum(0), torch.zeros(size, dtype=dtype))
        assert A.check_claims()

    def test_the_zero_map(self):
        A = FunctionOperator(lambda v: 0 * v, torch.zeros(3), positive_semidefinite=True)
        assert A.check_claims()
        assert torch.equal(A @ torch.ones(3), torch.zeros(3))

    @pytest.mark.parametrize("scale", [1e-30, 1e25])
    def test_out_of_the_range_of_squares(self, scale):
        """Norms of float32 vectors of such entries underflow or overflow; the claim is false."""
        A = FunctionOperator(lambda v: scale * v.abs(), torch.zeros(4))
        with pytest.raises(FalseClaimError, match="not linear"):
            A.check_claims()


class TestAdjoint:
    D = staticmethod(lambda v: v[1:] - v[:-1])

    def test_true(self):
        def rmatvec(u):
            zero = u.new_zeros(1)
            return torch.cat([zero, u]) - torch.cat([u, zero])

        A = FunctionOperator(self.D, torch.zeros(5, dtype=F64), rmatvec=rmatvec)
        u = sampled(4)
        torch.testing.assert_close(A.T @ u, A.to_dense().T @ u)

    @pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
    @pytest.mark.parametrize("scale", [1e-25, 1e-15, 1e15, 1e25])
    def test_true_at_every_scale(self, dtype, scale):
        matrix = (scale * sampled(3, 5)).to(dtype)
        A = FunctionOperator(
            lambda v: matrix @ v, torch.zeros(5, dtype=dtype), rmatvec=lambda u: matrix.T @ u
        )
        assert A.check_claims()

    @pytest.mark.parametrize("factor", [-1.0, 1.01, 0.0])
    def test_false(self, factor):
        def rmatvec(u):
            zero = u.new_zeros(1)
            return factor * (torch.cat([zero, u]) - torch.cat([u, zero]))

        A = FunctionOperator(self.D, torch.zeros(5, dtype=F64), rmatvec=rmatvec)
        for use in (lambda: A @ sampled(5), lambda: A.T @ sampled(4)):
            with pytest.raises(FalseClaimError, match=r"is not the transpose: <u"):
                use()

    def test_of_a_shape_that_does_not_fit(self):
        A = FunctionOperator(self.D, torch.zeros(5, dtype=F64), rmatvec=lambda u: u)
        with pytest.raises(ValueError, match=r"rmatvec\(u\)"):
            A.T @ sampled(4)


CLAIMANTS: dict[str, Callable[[], LinearOperator]] = {
    "Dense": lambda: Dense(MATRICES["indefinite"], positive_definite=True),
    "Dense semidefinite": lambda: Dense(MATRICES["indefinite"], positive_semidefinite=True),
    "Diagonal": lambda: Diagonal(
        torch.tensor([1.0, 2.0, -1.0, 1.0, 1.0], dtype=F64), positive_definite=True
    ),
    "Diagonal semidefinite": lambda: Diagonal(
        torch.tensor([1.0, 2.0, -1.0, 1.0, 1.0], dtype=F64),
        positive_definite=False,
        positive_semidefinite=True,
    ),
    "LowRankPlusDiagonal": lambda: LowRankPlusDiagonal(ROOT[:1], -2.0, positive_definite=True),
    "LowRankPlusDiagonal semidefinite": lambda: LowRankPlusDiagonal(
        ROOT[:1], -2.0, positive_definite=False, positive_semidefinite=True
    ),
    "Hessian": lambda: hessian_of(MATRICES["indefinite"], positive_definite=True),
    "FunctionOperator": lambda: function_of(MATRICES["indefinite"], positive_definite=True),
    "FunctionOperator lower": lambda: function_of(ROOT, lower_triangular=True),
}
FIRST_USES = {
    "vector": lambda A: A @ sampled(A.shape[1], seed=9),
    "block": lambda A: A @ sampled(A.shape[1], 2, seed=9),
    "empty block": lambda A: A @ sampled(A.shape[1], 0),
    "nested": lambda A: A @ A.domain.unravel(sampled(A.shape[1], seed=9)),
    "to_dense": lambda A: A.to_dense(),
    "prepare": lambda A: solvers.DenseLU().prepare(A),
    "check_claims": lambda A: A.check_claims(),
    "grad": lambda A: grad(lambda v: v @ (A @ v))(sampled(A.shape[1], seed=9)),
    "jvp": lambda A: jvp(lambda v: A @ v, (sampled(A.shape[1]),), (sampled(A.shape[1], seed=9),)),
    "vmap": lambda A: vmap(lambda v: A @ v)(sampled(3, A.shape[1], seed=9)),
    "no_grad": lambda A: torch.no_grad()(lambda: A @ sampled(A.shape[1], seed=9))(),
    "inference_mode": lambda A: torch.inference_mode()(lambda: A @ sampled(A.shape[1], seed=9))(),
}


@pytest.mark.parametrize("use", FIRST_USES)
@pytest.mark.parametrize("name", CLAIMANTS)
def test_first_use_of_every_class_that_takes_claims(name, use):
    A = CLAIMANTS[name]()
    claimed = "lower triangular" if "lower" in name else "positive"
    with pytest.raises(FalseClaimError, match=rf"^{type(A).__name__}\(5, 5\) is claimed {claimed}"):
        FIRST_USES[use](A)


COMPOUNDS: dict[str, Callable[[LinearOperator], LinearOperator]] = {
    "transposed": lambda A: A.T,
    "sum with Dense": lambda A: A + Dense(ROOT),
    "sum with Identity": lambda A: A + 0.1 * ops.Identity(N),
    "sum with LowRankPlusDiagonal": lambda A: LowRankPlusDiagonal(ROOT[:2], 1.0) + A,
    "multiple": lambda A: 2.0 * A,
    "multiple by a tensor": lambda A: torch.tensor(2.0, dtype=F64) * A,
    "left factor": lambda A: A @ Dense(ROOT),
    "right factor": lambda A: Dense(ROOT) @ A,
    "diagonal factor": lambda A: A @ Diagonal(torch.arange(1.0, 6.0, dtype=F64)),
    "frame": lambda A: ops.Gram(A),
    "weight": lambda A: ops.Gram(Dense(ROOT), A),
    "deep": lambda A: (3.0 * (Dense(ROOT) @ (A + Dense(ROOT))).T - Dense(ROOT)) @ Dense(ROOT),
    "Inverse": lambda A: ops.Inverse(A, solvers.DenseLU()),
    "Inverse of a sum, transposed": lambda A: (
        ops.Inverse(A + 9.0 * Dense(ROOT), solvers.DenseLU()).T
    ),
}


@pytest.mark.parametrize("compound", COMPOUNDS)
@pytest.mark.parametrize("name", CLAIMANTS)
def test_inside_compounds(name, compound):
    """The claim is about the operand: it is tried there, whatever it has gone into."""
    A = CLAIMANTS[name]()
    # Where the operand is kept, at the first product; where only its facts are, before.
    with pytest.raises(FalseClaimError, match="is claimed"):
        COMPOUNDS[compound](A) @ sampled(N, seed=9)


@pytest.mark.parametrize("name", CLAIMANTS)
def test_inside_batches(name):
    with pytest.raises(FalseClaimError, match="is claimed"):
        ops.Stacked([CLAIMANTS[name]()])
    with pytest.raises(FalseClaimError, match="is claimed"):
        ops.BatchMean(
            lambda chunk: CLAIMANTS[name](), torch.zeros(3, dtype=F64), chunk_size=2
        ) @ sampled(N)


class TestExactForSmallSizes:
    @few
    @given(seeds, st.integers(1, 8), st.sampled_from([torch.float32, F64]), st.floats(-8, 8))
    def test_smallest_eigenvalue_around_zero(self, seed, n, dtype, exponent):
        """Refuted when it is below -sqrt(eps) of the largest entry, and only then."""
        values = sampled(n, seed=seed).abs() + 0.1
        tolerance = torch.finfo(dtype).eps ** 0.5
        largest = float(values.max())
        for smallest, refuted in (
            (-20 * n * tolerance * largest, True),
            (-1e-1 * largest, True),
            (0.0, False),
            (20 * tolerance * largest, False),
        ):
            values[0] = smallest
            matrix = (10.0**exponent * with_eigenvalues(values, seed)).to(dtype)
            matrix = (matrix + matrix.T) / 2
            if n == 1 and smallest == 0.0:
                continue  # the zero matrix: below
            for claim in ("positive_definite", "positive_semidefinite"):
                A = function_of(matrix, **{claim: True})
                if refuted:
                    with pytest.raises(FalseClaimError, match=claim):
                        A.check_claims()
                else:
                    assert A.check_claims()

    @few
    @given(seeds, st.integers(2, 8))
    def test_one_pair_of_entries_that_differ(self, seed, n):
        matrix = sampled(n, n, seed=seed)
        matrix = matrix + matrix.T
        assert function_of(matrix, positive_definite=False, symmetric=True).check_claims()
        matrix[0, 1] += 1e-2 * float(matrix.abs().max())
        with pytest.raises(FalseClaimError, match="symmetric"):
            function_of(matrix, symmetric=True).check_claims()

    @pytest.mark.parametrize("n", range(1, 9))
    def test_claim_definite_of_the_zero_matrix(self, n):
        zero = torch.zeros(n, n, dtype=F64)
        assert Dense(zero, positive_semidefinite=True).check_claims()
        with pytest.raises(FalseClaimError, match=r"positive definite.*every vector"):
            Dense(zero, positive_definite=True).check_claims()

    @few
    @given(seeds, st.integers(2, 8), st.data())
    def test_invariant_subspaces(self, seed, n, data):
        """Few distinct eigenvalues: the Krylov space ends early, and goes on from elsewhere."""
        rank = data.draw(st.integers(1, n - 1))
        values = torch.ones(n, dtype=F64)
        values[:rank] = 0.0
        assert function_of(with_eigenvalues(values, seed), positive_definite=True).check_claims()
        values[:rank] = -0.01
        with pytest.raises(FalseClaimError, match="positive semidefinite"):
            function_of(with_eigenvalues(values, seed), positive_semidefinite=True).check_claims()
        diagonal = torch.ones(n, dtype=F64)
        diagonal[rank] = -1e-3
        with pytest.raises(FalseClaimError, match="positive definite"):
            Diagonal(diagonal, positive_definite=True).check_claims()

    @pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
    @pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 50])
    def test_identities(self, n, dtype):
        eye = torch.eye(n, dtype=dtype)
        assert Dense(eye, positive_definite=True).check_claims()
        assert function_of(1e-30 * eye, positive_definite=True).check_claims()
        assert function_of(1e30 * eye, positive_definite=True).check_claims()
        with pytest.raises(FalseClaimError, match="positive definite"):
            Dense(-eye, positive_definite=True).check_claims()

    def test_larger_sizes_are_refuted_where_the_negative_part_is_not_tiny(self):
        values = torch.linspace(0.1, 1, 200, dtype=F64)
        values[0] = -0.5
        with pytest.raises(FalseClaimError, match="positive definite"):
            Dense(with_eigenvalues(values, 3), positive_definite=True).check_claims()

    @pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e18])
    def test_scale_does_not_matter_in_float32(self, scale):
        good = (scale * MATRICES["definite"]).float()
        bad = (scale * MATRICES["indefinite"]).float()
        for build in (function_of, Dense, hessian_of):
            assert build(good, positive_definite=True).check_claims()
            with pytest.raises(FalseClaimError, match="positive definite"):
                build(bad, positive_definite=True).check_claims()


@pytest.mark.parametrize(
    "claims",
    [
        {"symmetric": True},
        {"positive_definite": True},
        {"lower_triangular": True},
        {"lower_triangular": True, "upper_triangular": True},
    ],
)
@pytest.mark.parametrize("n", [0, 1])
def test_trivial_sizes(n, claims):
    matrix = torch.full((n, n), 2.0)
    for build in (Dense, function_of):
        A = build(matrix, **claims)
        assert A.check_claims()
        assert torch.equal(A @ torch.ones(n), 2 * torch.ones(n))
    assert hessian_of(matrix, positive_definite=True).check_claims()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "claims",
    [{"positive_definite": True}, {"symmetric": True}, {"lower_triangular": True}],
    ids=lambda c: next(iter(c)),
)
def test_products_that_are_not_finite_pass_through(bad, claims):
    """They are no lack of structure; a solver that meets them says so."""
    matrix = torch.eye(4, dtype=F64)
    matrix[1, 1] = bad
    A = function_of(matrix, **claims)
    assert not bool(torch.isfinite(A @ torch.ones(4, dtype=F64)).all())
    with pytest.raises(ValueError, match="NaN or infinite"):
        solvers.DenseLU().prepare(Dense(matrix, **claims))


class TestRandomNumbers:
    def test_none_are_taken_from_the_global_generators(self):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        for claim in TRUE:
            for kind in TRUE[claim]:
                function_of(MATRICES[kind], **{claim: True}).check_claims()
        ops.Inverse(Dense(MATRICES["definite"], positive_definite=True), solvers.CG()) @ ROOT[0]
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002

    def test_the_verdict_is_the_same_each_time(self):
        messages = set()
        for _ in range(3):
            with pytest.raises(FalseClaimError) as error:
                CLAIMANTS["FunctionOperator"]().check_claims()
            messages.add(str(error.value))
        assert len(messages) == 1


class TestProbedOnce:
    def counted(self, **claims: bool) -> tuple[FunctionOperator, list[int]]:
        calls: list[int] = []

        def matvec(v: Tensor, M: Tensor) -> Tensor:
            calls.append(1)
            return M @ v

        A = FunctionOperator(matvec, torch.zeros(N, dtype=F64), MATRICES["definite"], **claims)
        calls.clear()  # the codomain was found by one call
        return A, calls

    @pytest.mark.parametrize(
        ("claims", "products"),
        [({}, 3), ({"symmetric": True}, 3 + 2), ({"positive_definite": True}, 3 + N)],
    )
    def test_number_of_products(self, claims, products):
        A, calls = self.counted(**claims)
        v = sampled(N)
        A @ v
        assert len(calls) == products + 1
        for _ in range(3):
            A @ v
        assert len(calls) == products + 4

    def test_at_most_eight_products_for_definiteness(self):
        calls = []

        def matvec(v):
            calls.append(1)
            return 2 * v

        A = FunctionOperator(matvec, torch.zeros(100), positive_definite=True)
        calls.clear()
        A.check_claims()
        assert len(calls) == 3 + 8

    def test_through_compounds_and_solvers(self):
        A, calls = self.counted(positive_definite=True)
        total = A + Diagonal(torch.ones(N, dtype=F64))
        total @ sampled(N)
        (2.0 * A) @ sampled(N)
        A.T @ sampled(N)
        assert len(calls) == 3 + N + 3
        solvers.CG().prepare(A)
        solvers.CG().prepare(total)
        assert len(calls) == 3 + N + 3

    def test_after_a_product_under_vmap_or_grad(self):
        A, calls = self.counted(positive_definite=True)
        vmap(lambda v: A @ v)(sampled(3, N))
        assert A.check_claims()
        count = len(calls)
        grad(lambda v: v @ (A @ v))(sampled(N))
        assert len(calls) == count + 1

    def test_a_refuted_claim_stays_refuted(self):
        A = CLAIMANTS["FunctionOperator"]()
        for _ in range(2):
            with pytest.raises(FalseClaimError):
                A @ sampled(N)


class TestUnderTransforms:
    bad = torch.stack([MATRICES["definite"], MATRICES["indefinite"]])
    good = torch.stack([MATRICES["definite"], 2 * MATRICES["definite"]])

    @pytest.mark.parametrize("build", [Dense, function_of, hessian_of])
    def test_mapped_tensors_wait(self, build):
        v = sampled(N)
        results = vmap(lambda M: build(M, positive_definite=True) @ v)(self.good)
        torch.testing.assert_close(results, self.good @ v)

    @pytest.mark.parametrize("build", [Dense, function_of, hessian_of])
    def test_claims_that_waited_are_tried_outside(self, build):
        tried = []

        def product(M):
            A = build(M, positive_definite=True)
            tried.append(A.check_claims())
            return A

        operators = vmap(product)(self.bad)
        assert tried == [False]
        members = [torch.utils._pytree.tree_map(lambda t, i=i: t[i], operators) for i in (0, 1)]
        torch.testing.assert_close(members[0].to_dense(), self.bad[0])
        with pytest.raises(FalseClaimError, match="positive definite"):
            members[1] @ sampled(N)

    @pytest.mark.parametrize("build", [Dense, function_of, hessian_of])
    def test_in_a_stack_of_operators_out_of_vmap(self, build):
        operators = vmap(lambda M: build(M, positive_definite=True))(self.bad)
        with pytest.raises(FalseClaimError, match="positive definite"):
            ops.Stacked.of(operators) @ sampled(2, N)
        operators = vmap(lambda M: build(M, positive_definite=True))(self.good)
        S = ops.Stacked.of(operators)
        torch.testing.assert_close(
            S @ sampled(2, N), torch.einsum("bij,bj->bi", self.good, sampled(2, N))
        )

    def test_triangles_that_waited(self):
        operators = vmap(lambda M: Dense(M, lower_triangular=True))(self.good)
        member = torch.utils._pytree.tree_map(lambda t: t[0], operators)
        with pytest.raises(FalseClaimError, match="lower triangular"):
            member @ sampled(N)

    @pytest.mark.parametrize("build", [Dense, function_of, hessian_of])
    @pytest.mark.parametrize("transform", ["grad", "jvp", "jacrev", "jacfwd"])
    def test_differentiated_tensors_are_read(self, build, transform):
        v, C = sampled(N), sampled(N, N, seed=3)
        C = C + C.T

        def energy(M):
            return v @ (build(M, positive_definite=True) @ v)

        def run(M):
            if transform == "jvp":
                return jvp(energy, (M,), (C,))[1]
            slopes = getattr(torch.func, transform)(energy)(M)
            return (slopes * C).sum()

        torch.testing.assert_close(run(MATRICES["definite"]), v @ C @ v)
        with pytest.raises(FalseClaimError, match="positive definite"):
            run(MATRICES["indefinite"])

    def test_vmap_of_grad(self):
        v = sampled(N)
        slopes = vmap(grad(lambda M: v @ (Dense(M, positive_definite=True) @ v)))(self.good)
        torch.testing.assert_close(slopes, torch.outer(v, v).expand(2, N, N))

    def test_the_probe_leaves_no_trace_in_the_graph(self):
        M = MATRICES["definite"].clone().requires_grad_()
        A = function_of(M, positive_definite=True)
        v = sampled(N)
        for _ in range(2):  # probed at the first, not at the second
            (slope,) = torch.autograd.grad(v @ (A @ v), M)
            torch.testing.assert_close(slope, torch.outer(v, v))
        y = sampled(N).requires_grad_()
        H = Hessian(lambda y: (y**4).sum() + (y**2).sum(), y, positive_definite=True)
        for _ in range(2):
            (slope,) = torch.autograd.grad(v @ (H @ v), y)
            torch.testing.assert_close(slope, 24 * y.detach() * v**2)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_first_use_without_grad(self, mode):
        A = hessian_of(MATRICES["definite"], positive_definite=True)
        with mode():
            A @ sampled(N)
        v = sampled(N)
        slope = grad(lambda v: v @ (A @ v))(v)
        torch.testing.assert_close(slope, 2 * MATRICES["definite"] @ v)


@few
@given(seeds, st.integers(1, 12), st.sampled_from([torch.float32, F64]))
def test_true_claims_always_pass(seed, n, dtype):
    root = sampled(n, n, seed=seed).to(dtype)
    assume(float(root.abs().max()) > 0)
    claims = {
        "symmetric": root + root.T,
        "positive_semidefinite": root @ root.T,
        "positive_definite": root @ root.T + torch.eye(n, dtype=dtype),
        "lower_triangular": root.tril(),
        "upper_triangular": root.triu(),
    }
    for claim, matrix in claims.items():
        assert function_of(matrix, **{claim: True}).check_claims()
        assert refute(Dense(matrix), (claim,))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Diagonal(torch.tensor([1.0, -1.0]), positive_semidefinite=True),
        lambda: LowRankPlusDiagonal(torch.ones(1, 2), -3.0, positive_semidefinite=True),
    ],
    ids=["Diagonal", "LowRankPlusDiagonal"],
)
def test_semidefinite_alone_is_a_claim_too(build):
    """Nothing was said of definiteness; what was said is false."""
    with pytest.raises(FalseClaimError, match="positive semidefinite"):
        build() @ torch.ones(2)


def test_the_error_says_which_where_and_what_to_do():
    with pytest.raises(
        FalseClaimError,
        match=r"^Diagonal\(5, 5\) is claimed positive definite \(positive_definite=True\), but "
        r"its smallest entry is -1; drop the claim$",
    ):
        CLAIMANTS["Diagonal"]().check_claims()
    with pytest.raises(
        FalseClaimError,
        match=r"^Dense\(2, 2\) is claimed positive definite \(positive_definite=True\), but "
        r"<v, A v> = -1 for a unit vector v; drop the claim$",
    ):
        Dense(-torch.eye(2), positive_definite=True).check_claims()
    assert issubclass(FalseClaimError, ValueError)


class TestOtherTensors:
    """Facts are known of the tensors that they were learnt of; of others they are claims."""

    def test_a_gradient_step_leaves_the_symmetric_matrices(self):
        A = Dense(torch.tensor([[2.0, 1.0], [1.0, 3.0]]), symmetric=True)
        v = torch.tensor([1.0, 2.0])
        gradient = torch.func.grad(lambda A: (A @ v)[0] ** 2)(A)
        moved = torch.utils._pytree.tree_map(lambda p, g: p - 0.1 * g, A, gradient)
        with pytest.raises(FalseClaimError, match="symmetric=True"):
            moved.T @ v
        with pytest.raises(FalseClaimError, match="symmetric=True"):
            gradient @ v

    @pytest.mark.parametrize(
        "A",
        [
            Diagonal(torch.ones(3)),
            LowRankPlusDiagonal(torch.ones(1, 3), 1.0),
            Dense(torch.eye(3), lower_triangular=True),
        ],
        ids=repr,
    )
    def test_looked_up_facts_are_tried_again(self, A):
        assert torch.equal(A.with_tensors(A.tensors).to_dense(), A.to_dense())
        other = A.with_tensors(tuple(torch.randn_like(t) - 3 for t in A.tensors))
        with pytest.raises(FalseClaimError):
            other @ torch.ones(3)
        assert A @ torch.ones(3) is not None

    def test_the_same_tensors_cost_nothing(self):
        count = 0

        def matvec(v, d):
            nonlocal count
            count += 1
            return d * v

        A = ops.FunctionOperator(matvec, torch.zeros(3), torch.ones(3), symmetric=True)
        A @ torch.ones(3)
        before = count
        torch.func.grad(lambda A: (A._matvec(torch.ones(3))).sum())(A)
        assert count == before + 1


def test_the_transpose_by_autograd_is_tried_before_it_is_used():
    hidden = ops.FunctionOperator(torch.no_grad()(lambda v: v.roll(1)), torch.zeros(3))
    assert torch.equal(hidden @ torch.arange(3.0), torch.tensor([2.0, 0.0, 1.0]))
    with pytest.raises(FalseClaimError, match="what autograd makes of matvec"):
        hidden.T @ torch.ones(3)


@pytest.mark.parametrize("row", range(19))
def test_triangular_claims_beyond_the_small(row):
    """One entry beside the diagonal is found where a cut parts it; a band is found anywhere."""
    band = torch.diag(torch.ones(19), 1)
    with pytest.raises(FalseClaimError, match="lower_triangular=True"):
        ops.FunctionOperator(lambda v: band @ v, torch.zeros(20), lower_triangular=True) @ (
            torch.ones(20)
        )
    far = torch.zeros(20, 20)
    far[row, 19] = 1.0
    with pytest.raises(FalseClaimError, match="lower_triangular=True"):
        ops.FunctionOperator(lambda v: far @ v, torch.zeros(20), lower_triangular=True) @ (
            torch.ones(20)
        )


class TestLowPrecision:
    """A hundred eps of bfloat16 is 0.78: no half of the digits may pass as rounding."""

    dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

    @dtypes
    @pytest.mark.parametrize("claim", ["symmetric", "lower_triangular", "upper_triangular"])
    def test_false(self, dtype, claim):
        matrix = torch.tensor([[1.0, 0.7], [0.0, 1.0]], dtype=dtype)
        matrix = matrix.T if claim == "upper_triangular" else matrix
        with pytest.raises(FalseClaimError, match=f"matrix is claimed {claim.split('_')[0]}"):
            Dense(matrix, **{claim: True})
        if claim == "symmetric":
            full = torch.tensor([[1.0, 0.7], [0.3, 1.0]], dtype=dtype)
            with pytest.raises(FalseClaimError, match=r"\|A - A\^T\| = 0\.[34]"):
                ops.Sparse(full, symmetric=True)
            space = ops.Space.of({"weight": torch.zeros(2, 2, dtype=dtype)})
            with pytest.raises(ValueError, match="S of layer '' is not symmetric"):
                ops.KFAC({"": (full, torch.eye(2, dtype=dtype))}, space)

    @dtypes
    @pytest.mark.parametrize("seed", range(3))
    def test_true_up_to_rounding(self, dtype, seed):
        """``Q D Q^T`` multiplied from the left is symmetric up to roundings of the dtype."""
        Q = torch.linalg.qr(sampled(40, 40, seed=seed)).Q.to(dtype)
        d = torch.arange(1.0, 41.0).to(dtype)
        Dense((Q * d) @ Q.T, symmetric=True)
        Dense((Q @ Q.T).tril(), lower_triangular=True)
