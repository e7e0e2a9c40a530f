"""Sparse Jacobians and Hessians against dense ones by torch.func, and their derivatives."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from operators.coloured import derivative_plan, sparse_hessian, sparse_jacobian
from operators.coloured.colouring import Colouring, ColouringError
from operators.coloured.sparse_hessian import SparseHessian
from operators.coloured.sparse_jacobian import SparseJacobian
from operators.coloured.sparsity import FIVE_POINT, detect, probe, stencil
from operators.space import Space
from operators.sparse.pattern import Pattern

DOUBLE = torch.float64


def draw(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bratu(u, strength=1.0):
    p = F.pad(u, (1, 1, 1, 1))
    around = p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2]
    return 4 * u - around - strength * torch.exp(u)


def p_laplace(u, eps=0.1):
    p = F.pad(u, (1, 1, 1, 1))
    x, y = p[1:, 1:-1] - p[:-1, 1:-1], p[1:-1, 1:] - p[1:-1, :-1]
    fx, fy = (eps + x**2) ** 0.5 * x, (eps + y**2) ** 0.5 * y
    return fx[:-1] - fx[1:] + fy[:, :-1] - fy[:, 1:]


def burgers(w):
    """Two velocities on a closed grid, upwind-free."""

    def d(a, axis):
        return torch.roll(a, -1, axis) - torch.roll(a, 1, axis)

    u, v = w
    return torch.stack([u * d(u, 0) + v * d(u, 1), u * d(v, 0) + v * d(v, 1)])


def reaction(fields):
    a, b = fields["a"], fields["b"]
    spread = torch.roll(a, 1) + torch.roll(a, -1) - 2 * a
    return {"first": spread - a * b**2, "second": (a * b**2 - b).sum()[None]}


def banded(u):
    return u[3:] * u[:-3] + u[1:-2] ** 3


def dense_row(u):
    return torch.cat([u[1:] ** 2 - u[:-1], (u**3).sum()[None]])


def dense_column(u):
    return u**2 + u[0] * 2


def arrow(u):
    return torch.cat([(u**2).sum()[None], u[1:] * u[0]])


CASES = [
    (bratu, draw(6, 7), "column"),
    (p_laplace, draw(5, 6), "column"),
    (burgers, draw(2, 5, 5), None),
    (reaction, {"a": draw(6), "b": draw(6, seed=1)}, "row"),
    (banded, draw(12), "column"),
    (dense_row, draw(15), "row"),
    (dense_column, draw(15), "column"),
    (arrow, draw(9), None),
    (lambda u: u.reshape(2, 6) @ torch.ones(6, dtype=u.dtype), draw(12), "row"),
    (lambda u: u[:1].expand(7) ** 2, draw(3), "column"),
]


def dense(function, u, *args):
    domain = Space.of(u)
    codomain = Space.of(function(u, *args))
    return torch.func.jacfwd(lambda v: codomain.ravel(function(domain.unravel(v), *args)))(
        domain.ravel(u)
    )


@pytest.mark.parametrize(("function", "u", "kind"), CASES)
@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_equals_the_dense_jacobian(function, u, kind, mode, chunk_size):
    A = SparseJacobian(function, u, mode=mode, chunk_size=chunk_size)
    torch.testing.assert_close(A.to_dense(), dense(function, u), rtol=1e-13, atol=1e-13)
    if mode == "auto" and kind is not None:
        assert A.colouring.kind == kind
    if mode != "auto":
        assert A.colouring.kind == {"forward": "column", "reverse": "row"}[mode]


@pytest.mark.parametrize("sparsity", ["detect", "probe", "given", "matrix"])
def test_every_source_of_the_pattern(sparsity):
    u = draw(6, 7)
    known = {"given": stencil((6, 7), FIVE_POINT), "matrix": dense(bratu, u) != 0}
    A = SparseJacobian(bratu, u, sparsity=known.get(sparsity, sparsity))
    torch.testing.assert_close(A.to_dense(), dense(bratu, u))
    source = {"detect": "detected", "probe": "probed"}.get(sparsity, "given")
    assert A.plan.sparsity.source == source
    assert A.colours == 5


def test_products_act_on_nested_structures():
    u = {"a": draw(6), "b": draw(6, seed=1)}
    A = SparseJacobian(reaction, u)
    v = {"a": draw(6, seed=2), "b": draw(6, seed=3)}
    expected = torch.func.jvp(reaction, (u,), (v,))[1]
    torch.testing.assert_close(A @ v, expected)
    torch.testing.assert_close(A.T @ expected, torch.func.vjp(reaction, u)[1](expected)[0])


@pytest.mark.parametrize("kind", ["jacobian", "hessian"])
def test_moving_detects_and_colours_nothing(kind, monkeypatch):
    u, w, strength = draw(5, 5), draw(5, 5, seed=1), torch.tensor(0.3, dtype=DOUBLE)
    if kind == "jacobian":
        A, function = SparseJacobian(bratu, u, strength), bratu
    else:
        A = SparseHessian(lambda u, s: energy(u, s), u, strength)
        function = torch.func.grad(energy)

    def refuse(*args, **kwargs):
        raise AssertionError("worked out anew")

    refused = {
        derivative_plan: ("detect", "probe"),
        sparse_jacobian: ("jacobian_colouring", "jacobian_recovery", "sparsity_of"),
        sparse_hessian: ("symmetric_colouring", "symmetric_recovery", "sparsity_of"),
    }
    for module, names in refused.items():
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    B = A.at(w, strength + 1)
    assert B.plan is A.plan
    assert B.pattern is A.pattern
    torch.testing.assert_close(B.to_dense(), dense(function, w, strength + 1))
    same = type(A)(bratu if kind == "jacobian" else energy, w, strength + 1, plan=A.plan)
    torch.testing.assert_close(same.values, B.values)


def energy(u, strength=1.0):
    p = F.pad(u, (1, 1, 1, 1))
    slopes = ((p[1:] - p[:-1]) ** 2).sum() + ((p[:, 1:] - p[:, :-1]) ** 2).sum()
    return slopes / 2 - strength * torch.exp(u).sum()


def chain(u):
    return (u[1:] * u[:-1] ** 2).sum() + (u**4).sum()


def fields(w):
    return (w["a"] ** 2 * w["b"]).sum() + (w["a"][1:] * w["a"][:-1]).exp().sum()


LOSSES = [
    (energy, draw(6, 7)),
    (chain, draw(40)),
    (fields, {"a": draw(7), "b": draw(7, seed=1)}),
    (lambda u: (u[0] * u[1:]).sum() ** 1 + (u**3).sum(), draw(12)),
    (lambda u: (u[1:] * u[:-1]).sum(), draw(9)),
    (lambda u: F.pad(u[None, None], (1, 1, 1, 1), mode="circular").diff().pow(4).sum(), draw(5, 5)),
    (lambda u: u.sum() ** 2, draw(4)),
    (lambda u: (u[::2] ** 2).sum(), draw(5)),
]


@pytest.mark.parametrize(("loss", "u"), LOSSES)
@pytest.mark.parametrize("colouring", ["star", "acyclic"])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_equals_the_dense_hessian(loss, u, colouring, chunk_size):
    A = SparseHessian(loss, u, colouring=colouring, chunk_size=chunk_size)
    expected = dense(torch.func.grad(loss), u)
    torch.testing.assert_close(A.to_dense(), expected, rtol=1e-11, atol=1e-11)
    assert A.symmetric
    assert torch.equal(A.to_dense(), A.to_dense().T)


@pytest.mark.parametrize("order", ["natural", "largest_first", "smallest_last"])
@pytest.mark.parametrize("colouring", ["star", "acyclic"])
def test_hessians_of_random_graphs(order, colouring):
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        n = 18
        ends = torch.randint(n, (2, 4 * n), generator=generator)
        ends = ends[:, ends[0] != ends[1]]

        def loss(u, ends=ends):
            return (torch.sin(u[ends[0]]) * u[ends[1]]).sum()

        u = draw(n, seed=seed)
        A = SparseHessian(loss, u, colouring=colouring, order=order)
        torch.testing.assert_close(A.to_dense(), dense(torch.func.grad(loss), u))


def test_substitution_along_a_long_path_stays_exact():
    n = 3000
    u = draw(n)
    star = SparseHessian(chain, u)
    acyclic = SparseHessian(chain, u, colouring="acyclic")
    assert (star.colours, acyclic.colours) == (3, 2)
    assert len(acyclic.plan.recovery.rounds) > 5
    torch.testing.assert_close(acyclic.values, star.values, rtol=0, atol=1e-9)


def test_colours_of_the_five_point_energy():
    u = draw(20, 20)
    assert SparseHessian(energy, u).colours == 5
    assert SparseHessian(energy, u, colouring="acyclic").colours == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_the_dtype(dtype):
    u = draw(5, 5, dtype=dtype)
    for A in (
        SparseJacobian(bratu, u),
        SparseJacobian(bratu, u, sparsity="probe", mode="reverse"),
        SparseHessian(energy, u),
        SparseHessian(energy, u, colouring="acyclic"),
    ):
        assert A.values.dtype == dtype
        torch.testing.assert_close(A.to_dense(), dense(bratu, u), rtol=1e-5, atol=1e-5)


def central(function, x, direction, step=1e-6):
    return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


@pytest.mark.parametrize("which", ["forward", "reverse", "star", "acyclic"])
def test_nonzeros_are_differentiable(which):
    u, strength, weights = draw(4, 4), torch.tensor(0.7, dtype=DOUBLE), None
    if which in ("star", "acyclic"):
        A = SparseHessian(energy, u, strength, colouring=which)
    else:
        A = SparseJacobian(bratu, u, strength, mode=which)
    weights = draw(A.nnz, seed=5)

    def value(u, strength):
        return (A.at(u, strength).values.sin() * weights).sum()

    by_u, by_strength = torch.func.grad(value, argnums=(0, 1))(u, strength)
    direction = draw(4, 4, seed=6)
    slope = central(lambda x: value(x, strength), u, direction)
    torch.testing.assert_close((by_u * direction).sum(), slope, rtol=1e-7, atol=1e-8)
    slope = central(lambda s: value(u, s), strength, torch.ones_like(strength))
    torch.testing.assert_close(by_strength, slope, rtol=1e-7, atol=1e-8)
    # Autograd, and forward mode.
    leaf = u.clone().requires_grad_()
    value(leaf, strength).backward()
    torch.testing.assert_close(leaf.grad, by_u)
    tangent = torch.func.jvp(lambda x: value(x, strength), (u,), (direction,))[1]
    torch.testing.assert_close(tangent, (by_u * direction).sum())


def test_inside_transforms():
    u, strength = draw(4, 4), torch.tensor(0.7, dtype=DOUBLE)

    def value(s):
        # Made inside grad: the pattern is found beside it.
        return (SparseJacobian(bratu, u, s).values ** 2).sum()

    slope = central(value, strength, torch.ones_like(strength))
    torch.testing.assert_close(torch.func.grad(value)(strength), slope, rtol=1e-7, atol=1e-8)
    A = SparseJacobian(bratu, u, strength)
    many = draw(3, 4, 4, seed=8)
    values = torch.func.vmap(lambda w: A.at(w, strength).values)(many)
    for w, row in zip(many, values, strict=True):
        torch.testing.assert_close(row, A.at(w, strength).values)
    with pytest.raises(ValueError, match=r"torch\.func\.vmap"):
        torch.func.vmap(lambda w: SparseJacobian(bratu, w).values)(many)


def test_it_is_a_sparse_operator_of_the_algebra():
    u = draw(5, 5)
    A = SparseJacobian(bratu, u)
    J = dense(bratu, u)
    normal = A.T @ A
    assert normal.sparse
    assert normal.positive_semidefinite
    torch.testing.assert_close(normal.to_dense(), J.T @ J)
    torch.testing.assert_close((2.0 * A + A).to_dense(), 3 * J)
    copy = A.with_tensors((2 * A.values,))
    torch.testing.assert_close(copy.to_dense(), 2 * J)
    assert "5 colours (column)" in str(A)


def test_a_pattern_that_misses_entries_is_caught():
    u = draw(6, 6)
    three = stencil((6, 6), [(0, 0), (1, 0), (-1, 0)])
    with pytest.raises(ValueError, match="sparsity misses entries"):
        SparseJacobian(bratu, u, sparsity=three)
    for colouring in ("star", "acyclic"):
        with pytest.raises(ValueError, match="sparsity misses entries"):
            SparseHessian(energy, u, sparsity=three, colouring=colouring)
    full = stencil((6, 6), FIVE_POINT)
    one = torch.ones(full.nnz, dtype=torch.bool)
    one[17] = False
    less = Pattern.of(full.rows[one], full.columns[one], full.shape)[0]
    for mode in ("forward", "reverse"):
        with pytest.raises(ValueError, match="sparsity misses entries"):
            SparseJacobian(bratu, u, sparsity=less, mode=mode)


def limited(u):
    out = u**2
    out[u > 0] = 1.0
    return out


def test_flags_that_change_with_the_point():
    A = SparseJacobian(limited, torch.tensor([1.0, -1.0, 1.0], dtype=DOUBLE))
    u = torch.tensor([-1.0, -2.0, -3.0], dtype=DOUBLE)
    assert torch.equal(A.at(u).to_dense(), torch.diag(2 * u))


class TestMovedPatternsAreTried:
    """A pattern that was given, or that indices among the arguments steer, may miss entries."""

    u = torch.tensor([0.0, 1.0, 2.0], dtype=DOUBLE)

    @staticmethod
    def coupled(u):
        return u**2 + u[0] * u.roll(1)

    def test_given(self):
        # At u_0 = 0 the coupling has no derivative but in the first column.
        given = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]])
        for mode in ("forward", "reverse"):
            A = SparseJacobian(self.coupled, self.u, sparsity=given, mode=mode)
            A.at(2 * self.u)
            with pytest.raises(ValueError, match=r"sparsity misses entries .* residual"):
                A.at(self.u + 1)
            A.at(self.u + 1, verify=False)

    def test_hessian(self):
        def loss(u):
            return (u**2).sum() + u[0] ** 2 * u[1] ** 2

        at = torch.zeros(3, dtype=DOUBLE)
        H = SparseHessian(loss, at, sparsity=torch.eye(3))
        with pytest.raises(ValueError, match=r"sparsity misses entries .* loss"):
            H.at(at + 1)
        H.at(at + 1, verify=False)

    def test_indices_among_the_arguments(self):
        A = SparseJacobian(lambda u, order: u[order] ** 2, self.u + 1, torch.tensor([0, 1, 2]))
        with pytest.raises(ValueError, match="sparsity misses entries"):
            A.at(self.u + 1, torch.tensor([1, 2, 0]))

    def test_inside_transforms(self):
        given = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]])
        A = SparseJacobian(self.coupled, self.u, sparsity=given)
        for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
            transform(lambda u: A.at(u).values.sum())(2 * self.u)
            with pytest.raises(ValueError, match="sparsity misses entries"):
                transform(lambda u: A.at(u).values.sum())(self.u + 1)

    @pytest.mark.parametrize("chunk_size", [1, 2, None])
    def test_a_pattern_without_entries(self, chunk_size):
        none = torch.zeros(3, 3)
        SparseJacobian(lambda u: 0.0 * u, self.u, sparsity=none, chunk_size=chunk_size)
        with pytest.raises(ValueError, match="sparsity misses entries"):
            SparseJacobian(lambda u: u**2, self.u, sparsity=none, chunk_size=chunk_size)


class TestMadeInsideSeveralTransforms:
    u = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=DOUBLE)
    v = torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=DOUBLE)

    @staticmethod
    def function(u):
        return u[1:] ** 3 * u[:-1]

    @staticmethod
    def loss(u):
        return (u[1:] ** 3 * u[:-1] ** 2).sum()

    def pair(self, kind):
        if kind == "jacobian":
            return (
                lambda u: (SparseJacobian(self.function, u) @ self.v).sum(),
                lambda u: torch.func.jvp(self.function, (u,), (self.v,))[1].sum(),
            )
        return (
            lambda u: (SparseHessian(self.loss, u) @ self.v).sum(),
            lambda u: torch.func.jvp(torch.func.grad(self.loss), (u,), (self.v,))[1].sum(),
        )

    @pytest.mark.parametrize("kind", ["jacobian", "hessian"])
    def test_second_derivatives(self, kind):
        ours, theirs = self.pair(kind)
        grad, jacfwd, jacrev = torch.func.grad, torch.func.jacfwd, torch.func.jacrev
        for second in (torch.func.hessian, lambda f: jacrev(grad(f)), lambda f: jacfwd(grad(f))):
            torch.testing.assert_close(second(ours)(self.u), second(theirs)(self.u))

    @pytest.mark.parametrize("kind", ["jacobian", "hessian"])
    def test_an_unrelated_transform_around(self, kind):
        ours, theirs = self.pair(kind)
        x = torch.tensor(1.0, dtype=DOUBLE)

        def nested(f):
            return torch.func.grad(lambda x: x * torch.func.grad(f)(self.u).sum())(x)

        torch.testing.assert_close(nested(ours), nested(theirs))


class NoForwardMode(torch.autograd.Function):
    """The square, with a backward and no jvp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u):
        return u**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *outputs):
        return 2 * ctx.saved_tensors[0] * outputs[0]


@pytest.mark.parametrize("sparsity", ["detect", "probe", torch.eye(4)], ids=["d", "p", "given"])
def test_reverse_mode_needs_no_forward_mode(sparsity):
    u = draw(4)
    A = SparseJacobian(NoForwardMode.apply, u, sparsity=sparsity, mode="reverse")
    assert torch.equal(A.to_dense(), torch.diag(2 * u))
    assert torch.equal(A.at(u + 1).to_dense(), torch.diag(2 * (u + 1)))


def test_settings_of_the_probe():
    u = draw(12)
    find = partial(probe, failure_probability=1e-3, seed=3)
    A = SparseJacobian(banded, u, sparsity=find)
    assert A.plan.sparsity.source == "probed"
    assert A.plan.sparsity.failure_probability == 1e-3
    torch.testing.assert_close(A.to_dense(), dense(banded, u))


def test_errors_name_the_argument():
    u = draw(4, 4)
    A, H = SparseJacobian(bratu, u), SparseHessian(energy, u)
    with pytest.raises(ValueError, match="plan was made for u"):
        SparseJacobian(bratu, draw(5, 4), plan=A.plan)
    with pytest.raises(ValueError, match="plan was made for u"):
        SparseJacobian(bratu, u, plan=H.plan)
    with pytest.raises(ValueError, match="plan was made for u"):
        SparseHessian(energy, u, plan=A.plan)
    with pytest.raises(ValueError, match="u has structure"):
        A.at(draw(4, 5))
    with pytest.raises(TypeError, match="u has dtype"):
        H.at(u.float())
    with pytest.raises(ValueError, match="sparsity='guess'"):
        SparseJacobian(bratu, u, sparsity="guess")
    with pytest.raises(ValueError, match="mode='both'"):
        SparseJacobian(bratu, u, mode="both")
    with pytest.raises(ValueError, match="chunk_size=0"):
        SparseJacobian(bratu, u, chunk_size=0)
    with pytest.raises(ValueError, match="kind='tree'"):
        SparseHessian(energy, u, colouring="tree")
    with pytest.raises(ValueError, match="expected a scalar"):
        SparseHessian(bratu, u)
    with pytest.raises(ValueError, match="not symmetric"):
        SparseHessian(energy, u, sparsity=torch.ones(16, 16).triu())
    one = Colouring(torch.zeros(16, dtype=torch.int64), "column")
    with pytest.raises(ColouringError, match="share a row"):
        SparseJacobian(bratu, u, colouring=one)
    with pytest.raises(ValueError, match="mode='reverse'"):
        SparseJacobian(bratu, u, colouring=one, mode="reverse")


def test_a_given_colouring_is_used():
    u = draw(3)
    own = Colouring(torch.arange(3), "column")
    A = SparseJacobian(lambda u: u**2, u, colouring=own)
    assert A.colouring is own
    torch.testing.assert_close(A.to_dense(), (2 * u).diag())
    assert A.colours == 3


def test_a_found_pattern_keeps_its_source():
    u = draw(12)
    for find, source in ((detect, "detected"), (probe, "probed")):
        A = SparseJacobian(banded, u, sparsity=find(banded, u))
        assert A.plan.sparsity.source == source
