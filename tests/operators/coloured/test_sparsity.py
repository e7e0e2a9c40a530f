"""Patterns found, probed and given, against dense Jacobians at random points."""

import numpy as np
import pytest
import scipy.sparse
import torch
from torch.nn import functional as F

from operators.coloured.sparsity import (
    FIVE_POINT,
    NINE_POINT,
    SEVEN_POINT,
    detect,
    pattern_of,
    probe,
    stencil,
)
from operators.sparse.pattern import Pattern

SIDE = 4
KERNEL = torch.arange(1.0, 10.0, dtype=torch.float64).reshape(1, 1, 3, 3)
PAIR = torch.cat([KERNEL, -KERNEL], dim=1)


def padded(u):
    p = F.pad(u, (1, 1, 1, 1))
    return p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2] - 4 * u + torch.exp(u)


def rolled(u):
    return sum(torch.roll(u, s, d) for s in (1, -1) for d in (0, 1)) * u


def written(u):
    out = u.clone()
    out[1:-1] = u[2:] * u[:-2]
    out[:, 0] += u[:, 1] ** 2
    return out


def reductions(u):
    parts = [u.sum(0), u.mean(1), u.amax((0, 1), keepdim=True)[0], u.std(0), u.logsumexp(1)]
    return torch.cat(parts)


def scattered(u):
    index = torch.tensor([[0, 2, 1, 0], [1, 1, 1, 1], [3, 3, 0, 0], [0, 1, 2, 3]])
    return torch.zeros_like(u).scatter_add(0, index, u)


def placed(u):
    z = torch.zeros_like(u[0])
    z[torch.tensor([1, 2])] = u[0, :2] ** 2
    return z.index_add(0, torch.tensor([0, 1, 1, 3]), u[1])


def put(u):
    at = (torch.tensor([0, 0, 2, 3]),)
    return torch.zeros_like(u[0]).index_put(at, u[2] * u[1], accumulate=True)


def unbound(u):
    a, b, c, d = u.unbind(0)
    return torch.stack([a * b, c.flip(0), d])


# Function, and whether what is found is exactly the pattern.
FUNCTIONS = [
    (padded, True),
    (rolled, True),
    (written, True),
    (lambda u: F.conv2d(u[None, None], KERNEL, padding=1, stride=2), True),
    (lambda u: F.conv_transpose2d(u[None, None], PAIR, stride=2), True),
    (lambda u: F.conv2d(u.reshape(1, 2, 2, 4), PAIR, padding=1), True),
    (
        lambda u: F.conv2d(u.reshape(1, 2, 2, 4), KERNEL.expand(2, 1, 3, 3), groups=2, padding=1),
        True,
    ),
    (lambda u: F.conv2d(KERNEL, u[None, None, :2, :2]), True),
    (lambda u: torch.einsum("ij,jk->ik", u, u), True),
    (lambda u: u @ u[0], True),
    (lambda u: torch.addmv(u[0], u, u[1]), True),
    (lambda u: u[0] @ u[1], True),
    (reductions, False),
    (lambda u: torch.softmax(u, 1), True),
    (lambda u: torch.cumsum(u, 0), False),
    (lambda u: u[torch.tensor([2, 0, 0])][:, torch.tensor([1, 3])] * u[3, 0], True),
    (scattered, True),
    (placed, True),
    (put, True),
    (lambda u: torch.where(u > 0, u**2, u.T), False),
    (unbound, True),
    (lambda u: torch.maximum(u[1:], u[:-1]), False),
    (lambda u: u.diff(dim=0) ** 2, True),
    (lambda u: torch.linalg.norm(u, dim=1), True),
    (lambda u: u.tril() + u.diagonal().diag(), True),
    (lambda u: u.unfold(0, 2, 1) * 2, True),
    (lambda u: F.pad(u[None, None], (1, 1, 1, 1), mode="circular"), True),
    (lambda u: F.pad(u[None, None], (1, 1, 1, 1), mode="reflect"), True),
    (lambda u: torch.sign(u) + torch.round(u) + 1, True),
    (lambda u: u.detach() * u.T, False),
    (lambda u: torch.stack([u, u.T]).permute(2, 0, 1).flatten(1).sum(1), True),
]


def banded(u):
    return torch.nn.functional.pad(u, (1, 1))[2:] * u + u**2


def flat(function):
    return lambda v: function(v.reshape(SIDE, SIDE)).reshape(-1)


def hit(function, points=6):
    """Which entries of the Jacobian are nonzero at some of a few random points."""
    generator = torch.Generator().manual_seed(1)
    size = SIDE**2
    draws = [torch.randn(size, dtype=torch.float64, generator=generator) for _ in range(points)]
    return sum(torch.func.jacrev(function)(v).abs() for v in draws) != 0


def dense(pattern):
    A = torch.zeros(pattern.shape, dtype=torch.bool)
    A[pattern.rows, pattern.columns] = True
    return A


@pytest.mark.parametrize(("function", "exact"), FUNCTIONS)
def test_detected_against_the_dense_jacobian(function, exact):
    function = flat(function)
    # At zero many derivatives are zero: values must not count.
    found = detect(function, torch.zeros(SIDE**2, dtype=torch.float64))
    true, pattern = hit(function), dense(found.pattern)
    assert not (true & ~pattern).any()
    assert not exact or torch.equal(true, pattern)
    assert found.unknown == ()


@pytest.mark.parametrize("function", [function for function, _ in FUNCTIONS])
def test_detected_of_gradients(function):
    def loss(v):
        return (flat(function)(v) ** 3).sum()

    found = detect(torch.func.grad(loss), torch.zeros(SIDE**2, dtype=torch.float64))
    assert not (hit(torch.func.grad(loss)) & ~dense(found.pattern)).any()


def test_an_unknown_operation_joins_all_and_is_named():
    def function(v):
        u = v.reshape(SIDE, SIDE)
        return torch.cat([torch.linalg.solve(u[:2, :2] + 3, u[0, :2]), v[-1:]])

    with pytest.warns(UserWarning, match="solve"):
        found = detect(function, torch.ones(16, dtype=torch.float64).cumsum(0))
    assert "solve" in found.unknown[0]
    pattern = dense(found.pattern)
    assert pattern[:2, [0, 1, 4, 5]].all()
    assert pattern[2].nonzero().tolist() == [[15]]


def limited(u):
    out = u**2
    out[u > 0] = 1.0
    return out


def departed(u):
    points = torch.arange(len(u), dtype=u.dtype)
    return u[(points - u).floor().long().clamp(0, len(u) - 1)] * u


# Where entries go to or come from depends on values of u.
STEERED = {
    "sorted indices": lambda u: u[u.argsort()],
    "gather": lambda u: u.gather(0, u.argsort()),
    "take_along_dim": lambda u: u.take_along_dim(u.argsort(), 0),
    "take": lambda u: u.take(u.argsort()),
    "index_select": lambda u: u.index_select(0, u.argsort()),
    "scatter": lambda u: torch.zeros_like(u).scatter(0, u.argsort(), u),
    "scatter_add": lambda u: torch.zeros_like(u).scatter_add(0, (u > 0).long(), u),
    "index_add": lambda u: torch.zeros_like(u).index_add(0, (u > 0).long(), u),
    "index_put, added": lambda u: torch.zeros_like(u).index_put(
        ((u > 0).long(),), u, accumulate=True
    ),
    "index_copy": lambda u: torch.zeros_like(u).index_copy(0, u.argsort(), u),
    "masked_scatter": lambda u: torch.zeros_like(u).masked_scatter(u > 0, u),
    "a departure point": departed,
    "a maximum's gradient": torch.func.grad(lambda u: u.max(0).values ** 2 + (u**2).sum()),
    "a sort's gradient": torch.func.grad(
        lambda u: (u.sort().values * torch.arange(len(u))).square().sum()
    ),
    "a rounded index in a matrix": lambda u: u.reshape(2, 3)[:, u[:3].round().long().clamp(0, 2)],
}


@pytest.mark.filterwarnings("ignore:the dependences of", "ignore:There is a performance drop")
@pytest.mark.parametrize("which", STEERED)
def test_indices_that_are_computed_from_the_argument(which):
    """What is found at one point holds at every other."""

    def function(u):
        return STEERED[which](u).reshape(-1)

    at = torch.tensor([0.3, -0.5, 1.2, -2.0, 0.9, 2.0], dtype=torch.float64)
    found = dense(detect(function, at).pattern)
    for seed in range(8):
        u = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert not ((torch.func.jacrev(function)(2 * u) != 0) & ~found).any()


def test_operations_that_are_steered_are_named():
    with pytest.warns(UserWarning, match="gather by indices that vary"):
        found = detect(STEERED["gather"], torch.zeros(3))
    assert found.unknown == ("gather by indices that vary",)


def test_flags_that_fill_entries_join_nothing():
    """Each entry is kept or filled, whatever the flags are."""
    x = torch.tensor(2.0, dtype=torch.float64)
    at = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    diagonal = torch.eye(3, dtype=torch.bool)
    fill = lambda u: torch.where(u > 0, u**2, 0.0)  # noqa: E731
    for function in (limited, fill, lambda u: (u**2).masked_fill(u > 0, 1.0)):
        assert torch.equal(dense(detect(function, at).pattern), diagonal)

    def filled_by_the_first(u):
        out = u**2 * x
        out[u > 0] = u[0]
        return out

    diagonal[:, 0] = True
    assert torch.equal(dense(detect(filled_by_the_first, at).pattern), diagonal)


@pytest.mark.parametrize(
    "function",
    [
        lambda u: u[u > 0].sum() * u,
        lambda u: u[torch.where(u > 0)[0]].sum() * u,
        lambda u: u.masked_select(u > 0).sum() * u,
        lambda u: u.repeat_interleave((u > 0).long() + 1)[:2],
    ],
)
def test_sizes_that_depend_on_values_are_refused(function):
    with pytest.raises(ValueError, match=r"size that depends on values .* torch\.where"):
        detect(function, torch.tensor([1.0, -1.0, 1.0]))


def test_indices_that_do_not_depend_on_the_argument_stay_sharp():
    order, flags = torch.tensor([2, 0, 1]), torch.tensor([True, False, True])
    c = torch.tensor([0.5, -0.5, 1.0])
    function = lambda u: torch.cat([u[order], u[flags], u[c.argsort()]])  # noqa: E731
    assert dense(detect(function, torch.zeros(3)).pattern).sum() == 8
    blank = lambda u: u[torch.zeros_like(u).long()]  # noqa: E731
    assert dense(detect(blank, torch.zeros(3)).pattern).sum() == 3


@pytest.mark.parametrize("function", [banded, lambda u: u[1:] * u[:-1], torch.sin])
def test_probing_by_sweeps_back_finds_the_same(function):
    u = torch.zeros(9, dtype=torch.float64)
    forward, back = (probe(function, u, back=sweeps_back).pattern for sweeps_back in (False, True))
    assert torch.equal(dense(forward), dense(back))


@pytest.mark.filterwarnings("ignore:the dependences of")
def test_complex_numbers_on_the_way_lose_nothing():
    def spectral(v):
        return torch.fft.irfft(torch.fft.rfft(v) * torch.arange(4), n=7)

    def rotated(v):
        return torch.view_as_real(torch.complex(v[:4], v[4:]) ** 2).flatten()

    for function, n in ((spectral, 7), (rotated, 8)):
        v = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = dense(detect(function, v).pattern)
        assert not ((torch.func.jacrev(function)(v) != 0) & ~found).any()


def test_what_reads_values_or_is_random_is_refused():
    u = torch.zeros(3)
    with pytest.raises(ValueError, match="sparsity='probe'"):
        detect(lambda u: u if float(u.sum()) > 1 else 2 * u, u)
    with pytest.raises(ValueError, match="random"):
        detect(lambda u: u + torch.rand(3), u)


def test_detection_of_a_large_stencil_equals_the_stencil():
    side = 300
    u = torch.zeros(side**2)
    found = detect(lambda v: rolled(v.reshape(side, side)).reshape(-1), u)
    assert found.pattern == stencil((side, side), FIVE_POINT, periodic=True)
    found = detect(lambda v: padded(v.reshape(side, side)).reshape(-1), u)
    assert found.pattern == stencil((side, side), FIVE_POINT)


def test_nothing_depends():
    found = detect(lambda v: torch.ones(2), torch.zeros(3))
    assert (found.pattern.shape, found.pattern.nnz) == ((2, 3), 0)


@pytest.mark.parametrize(
    "function", [padded, rolled, written, scattered, placed, lambda u: torch.cumsum(u, 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probed_is_exact(function, dtype):
    found = probe(flat(function), torch.zeros(SIDE**2, dtype=dtype), failure_probability=1e-9)
    assert torch.equal(dense(found.pattern), hit(flat(function)))
    assert found.failure_probability == 1e-9


def test_probing_random_matrices_of_wild_scales():
    generator = torch.Generator().manual_seed(3)
    for m, n in [(1, 1), (7, 33), (40, 9), (25, 64)]:
        held = torch.rand(m, n, generator=generator) < 0.15
        size = 10.0 ** (16 * torch.rand(m, n, generator=generator, dtype=torch.float64) - 8)
        A = torch.where(held, size, 0)
        found = probe(lambda v, A=A: A @ v, torch.zeros(n, dtype=torch.float64))
        assert torch.equal(dense(found.pattern), held)


def test_cancellation_is_as_rare_as_the_bound_says(monkeypatch):
    # With K = 4 values and one repetition per level the bound is far from zero and can be counted.
    monkeypatch.setattr("operators.coloured.sparsity.LEVELS", 4)
    u = torch.zeros(2, dtype=torch.float64)
    row = torch.tensor([1.0, -1.0], dtype=torch.float64)
    runs, missed = 400, 0
    for seed in range(runs):
        found = probe(lambda v: (row * v).sum()[None], u, failure_probability=0.5, seed=seed)
        missed += found.pattern.nnz < 2
    # ceil(log(2 / 0.5) / log 4) = 1 repetition: two equal values of four come with 1/4, up to two
    # levels; the bound is 0.5.
    assert 0 < missed / runs <= 0.5
    assert missed / runs == pytest.approx(0.25, abs=0.08)


def test_probing_refuses_what_it_cannot_do():
    u = torch.zeros(64, dtype=torch.float64)
    with pytest.raises(ValueError, match="most_products"):
        probe(lambda v: torch.cumsum(v, 0), u, most_products=20)
    with pytest.raises(ValueError, match="failure_probability"):
        probe(lambda v: v, u, failure_probability=0.0)
    with pytest.raises(ValueError, match="not finite"):
        probe(lambda v: v / 0.0, u)


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_stencils_against_a_loop(periodic, layout):
    shape, coupling = (4, 5), torch.tensor([[1, 0], [1, 1]], dtype=torch.bool)
    pattern = stencil(
        shape, FIVE_POINT, fields=2, coupling=coupling, layout=layout, periodic=periodic
    )
    whole = (2, *shape) if layout == "first" else (*shape, 2)
    expected = torch.zeros(40, 40, dtype=torch.bool)
    for i, j, di, dj, a, b in (
        (i, j, di, dj, a, b)
        for i in range(4)
        for j in range(5)
        for di, dj in FIVE_POINT
        for a, b in coupling.nonzero().tolist()
    ):
        k, m = i + di, j + dj
        if periodic:
            k, m = k % 4, m % 5
        if 0 <= k < 4 and 0 <= m < 5:
            here, there = ((a, i, j), (b, k, m)) if layout == "first" else ((i, j, a), (k, m, b))
            expected[np.ravel_multi_index(here, whole), np.ravel_multi_index(there, whole)] = True
    assert torch.equal(dense(pattern), expected)


def test_counts_of_well_known_stencils():
    assert stencil((6, 6), NINE_POINT).nnz == 16**2
    assert stencil((5, 5, 5), SEVEN_POINT).nnz == 125 + 6 * 100


def test_stencil_errors():
    with pytest.raises(ValueError, match="offsets"):
        stencil((3, 3), [(1,)])
    with pytest.raises(ValueError, match="coupling"):
        stencil((3,), [(0,)], fields=2, coupling=torch.ones(3, 3))
    with pytest.raises(ValueError, match="layout"):
        stencil((3,), [(0,)], layout="middle")
    with pytest.raises(ValueError, match="shape"):
        stencil((0,), [(0,)])


def test_all_doors_give_the_same_pattern():
    matrix = torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.bool)
    expected = Pattern.of(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1]), (2, 3))[0]
    doors = [
        expected,
        matrix,
        matrix.double(),
        matrix.double().to_sparse(),
        matrix.double().to_sparse_csr(),
        matrix.numpy(),
        scipy.sparse.csr_array(matrix.numpy()),
        scipy.sparse.coo_matrix(matrix.numpy()),
    ]
    for door in doors:
        assert pattern_of(door, (2, 3), torch.device("cpu")) == expected
    with pytest.raises(ValueError, match="shape"):
        pattern_of(matrix, (3, 3), torch.device("cpu"))
    with pytest.raises(TypeError, match="sparsity is a list"):
        pattern_of([[1]], (1, 1), torch.device("cpu"))
