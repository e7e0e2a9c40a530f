"""Colourings against their definitions, tried pair by pair and path by path."""

from itertools import combinations, permutations
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.coloured.colouring import (
    Colouring,
    ColouringError,
    check_colouring,
    column_colouring,
    jacobian_colouring,
    row_colouring,
)
from operators.coloured.lattice import cosets, sublattices
from operators.coloured.sparsity import FIVE_POINT, NINE_POINT, SEVEN_POINT, stencil
from operators.coloured.symmetric_colouring import check_symmetric, symmetric_colouring
from operators.coloured.vertex_order import (
    Graph,
    Order,
    boolean_matrix,
    graph_of,
    in_rounds,
    priorities,
)
from operators.sparse.pattern import Pattern

ORDERS = get_args(Order)


@st.composite
def patterns(draw, square=False):
    m = draw(st.integers(1, 14))
    n = m if square else draw(st.integers(1, 14))
    seed, density = draw(st.integers(0, 10**6)), draw(st.sampled_from([0.05, 0.15, 0.3, 0.6]))
    held = np.random.default_rng(seed).random((m, n)) < density
    held = held | held.T if square else held
    rows, columns = (torch.from_numpy(x) for x in held.nonzero())
    return Pattern.of(rows, columns, (m, n))[0]


def dense(pattern):
    return boolean_matrix(pattern).toarray()


def neighbours(pattern):
    A = dense(pattern)
    return [set(np.flatnonzero(A[i])) - {i} for i in range(len(A))]


def proper(near, colours):
    return all(colours[u] != colours[v] for u, others in enumerate(near) for v in others)


def is_star(near, colours):
    """No path of four vertices has two colours."""
    paths = (
        (a, b, c, d)
        for b, others in enumerate(near)
        for c in others
        for a in near[b] - {c}
        for d in near[c] - {b, a}
    )
    return proper(near, colours) and all(len({colours[x] for x in p}) > 2 for p in paths)


def is_acyclic(near, colours):
    """Taking off vertices with one neighbour or none empties the graph of each two colours."""
    for pair in combinations(set(colours), 2):
        left = {v for v in range(len(near)) if colours[v] in pair}
        while leaves := {v for v in left if len(near[v] & left) < 2}:
            left -= leaves
        if left:
            return False
    return proper(near, colours)


@pytest.mark.parametrize("order", ORDERS)
@given(pattern=patterns())
@settings(deadline=None, max_examples=20)
def test_columns_of_one_colour_meet_in_no_row(order, pattern):
    A = dense(pattern)
    for method in ("auto", "greedy"):
        c = column_colouring(pattern, order=order, method=method).colours.numpy()
        for i, j in combinations(range(A.shape[1]), 2):
            assert c[i] != c[j] or not (A[:, i] & A[:, j]).any()
    r = row_colouring(pattern, order=order).colours.numpy()
    for i, j in combinations(range(A.shape[0]), 2):
        assert r[i] != r[j] or not (A[i] & A[j]).any()


@given(pattern=patterns(), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=20)
def test_greedy_rounds_equal_the_sequential_greedy(pattern, seed):
    matrix = boolean_matrix(pattern)
    graph = graph_of((matrix.T.tocsr() @ matrix).tocsr())
    near = [
        set(graph.indices[graph.pointers[v] : graph.pointers[v + 1]]) for v in range(graph.size)
    ]
    for order in ORDERS:
        sequence = np.argsort(-priorities(graph, order))
        expected = {}
        for v in sequence:
            taken = {expected[w] for w in near[v] if w in expected}
            expected[v] = next(c for c in range(graph.size) if c not in taken)
        found = column_colouring(pattern, order=order, method="greedy").colours.numpy()
        if pattern.nnz and matrix.sum(axis=1).max() < graph.size:
            assert [expected[v] for v in range(graph.size)] == found.tolist()


@given(pattern=patterns(square=True))
@settings(deadline=None, max_examples=20)
def test_smallest_last_keeps_its_bound(pattern):
    graph = graph_of(boolean_matrix(pattern))
    near = neighbours(pattern)
    rank = priorities(graph, "smallest_last")
    before = max(sum(rank[w] > rank[v] for w in near[v]) for v in range(graph.size))
    left, degeneracy = set(range(graph.size)), 0
    while left:
        v = min(left, key=lambda v: len(near[v] & left))
        degeneracy = max(degeneracy, len(near[v] & left))
        left.remove(v)
    assert before <= degeneracy


def test_a_long_chain_leaves_its_order_after_some_rounds():
    n = 200_000
    pointers = np.concatenate([[0], np.cumsum(np.r_[1, np.full(n - 2, 2), 1])])
    i = np.arange(n)
    indices = np.stack([i - 1, i + 1], 1).reshape(-1)[1:-1].astype(np.int32)
    calls, colours = 0, np.full(n, -1)

    def colour(front):
        nonlocal calls
        calls += 1
        colours[front] = 0
        return np.ones(len(front), bool)

    in_rounds(Graph(pointers, indices), priorities(Graph(pointers, indices), "natural"), colour)
    assert (colours == 0).all()
    assert calls < 5000


@pytest.mark.parametrize(
    ("shape", "offsets", "colours", "greedy"),
    [
        ((40, 40), FIVE_POINT, 5, 8),
        ((40, 41), NINE_POINT, 9, 12),
        ((11, 12, 13), SEVEN_POINT, 7, 15),
        ((500,), [(-1,), (0,), (1,)], 3, 5),
    ],
)
def test_stencils_get_the_least_number_of_colours(shape, offsets, colours, greedy):
    pattern = stencil(shape, offsets)
    assert column_colouring(pattern, grid=shape).count == colours == len(offsets)
    for order in ORDERS:
        assert column_colouring(pattern, order=order, method="greedy").count <= greedy


def test_five_points_at_full_size():
    shape = (1000, 1000)
    found = column_colouring(stencil(shape, FIVE_POINT), grid=shape)
    assert found.count == 5


def test_a_closed_grid_and_coupled_fields():
    closed = stencil((10, 15), FIVE_POINT, periodic=True)
    assert column_colouring(closed, grid=(10, 15)).count == 5
    awkward = stencil((11, 13), FIVE_POINT, periodic=True)
    assert column_colouring(awkward, grid=(11, 13)).count <= 8
    coupled = stencil((12, 12), FIVE_POINT, fields=2)
    assert column_colouring(coupled, grid=(2, 12, 12)).count == 10


def test_every_sublattice_is_listed_once_and_its_cosets_are_a_group():
    # Their number in the plane is the sum of the divisors of the index.
    for index in (1, 2, 6, 12):
        bases = list(sublattices(index, 2))
        assert len(bases) == sum(d for d in range(1, index + 1) if index % d == 0)
        points = np.indices((24, 24)).reshape(2, -1).T - 12
        tables = {tuple(cosets(points, basis) == 0) for basis in bases}
        assert len(tables) == len(bases)
        for basis in bases:
            number = cosets(points, basis)
            assert set(number) == set(range(index))
            shifted = cosets(points + basis[-1] - 3 * basis[0], basis)
            assert (number == shifted).all()


def test_the_cheaper_side_is_chosen():
    i = torch.arange(30)
    full_row = Pattern.of(torch.cat([i, 0 * i]), torch.cat([i, i]), (30, 30))[0]
    found = jacobian_colouring(full_row)
    assert (found.kind, found.count) == ("row", 2)
    full_column = full_row.transpose()[0]
    found = jacobian_colouring(full_column)
    assert (found.kind, found.count) == ("column", 2)
    assert jacobian_colouring(full_row, "forward").count == 30


def test_huge_rows_are_refused_or_avoided():
    n = 40_000
    i = torch.arange(n)
    half = Pattern.of(torch.cat([i, 0 * i[:-1]]), torch.cat([i, i[:-1]]), (n, n))[0]
    assert jacobian_colouring(half).count == 2
    with pytest.raises(ValueError, match="reverse"):
        column_colouring(half)


@pytest.mark.parametrize("kind", ["star", "acyclic"])
@pytest.mark.parametrize("order", ORDERS)
@given(pattern=patterns(square=True))
@settings(deadline=None, max_examples=20)
def test_symmetric_colourings_meet_their_definition(kind, order, pattern):
    near = neighbours(pattern)
    meets = is_star if kind == "star" else is_acyclic
    for method in ("auto", "greedy"):
        found = symmetric_colouring(pattern, kind, order=order, method=method)
        assert meets(near, found.colours.tolist())


@given(pattern=patterns(square=True), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=25)
def test_the_checks_agree_with_the_definitions(pattern, seed):
    n = pattern.shape[0]
    generator = np.random.default_rng(seed)
    near = neighbours(pattern)
    A = dense(pattern)
    for count in (1, 2, 3, n):
        colours = torch.from_numpy(generator.integers(0, count, n))
        c = colours.tolist()
        for kind, meets in (("star", is_star), ("acyclic", is_acyclic)):
            assert _passes(check_symmetric, pattern, Colouring(colours, kind)) == meets(near, c)
        columns = all(
            c[i] != c[j] or not (A[:, i] & A[:, j]).any() for i, j in combinations(range(n), 2)
        )
        assert _passes(check_colouring, pattern, Colouring(colours, "column")) == columns


def _passes(check, pattern, colouring):
    try:
        check(pattern, colouring)
    except ColouringError:
        return False
    return True


def test_small_graphs_get_the_least_number_of_colours_in_some_order():
    # A cycle of five: star 4 (Fertin, Raspaud and Reed, 2004), acyclic 3.
    i = torch.arange(5)
    j = (i + 1) % 5
    cycle = Pattern.of(torch.cat([i, j]), torch.cat([j, i]), (5, 5))[0]
    assert symmetric_colouring(cycle, "star", method="greedy").count == 4
    assert symmetric_colouring(cycle, "acyclic", method="greedy").count == 3
    near = neighbours(cycle)
    three = {c for p in permutations([0, 1, 2, 0, 1]) for c in [p] if is_star(near, list(p))}
    assert not three


def test_symmetric_stencils():
    pattern = stencil((30, 30), FIVE_POINT)
    assert symmetric_colouring(pattern, "acyclic", grid=(30, 30)).count == 3
    assert symmetric_colouring(pattern, "star", grid=(30, 30)).count == 5
    for order in ORDERS:
        assert symmetric_colouring(pattern, "acyclic", method="greedy", order=order).count <= 6
        assert symmetric_colouring(pattern, "star", method="greedy", order=order).count <= 8


def test_errors_name_the_argument():
    pattern = stencil((4, 4), FIVE_POINT)
    with pytest.raises(ValueError, match="grid="):
        column_colouring(pattern, grid=(4, 5))
    with pytest.raises(ValueError, match="order="):
        column_colouring(pattern, order="random", method="greedy")
    with pytest.raises(ValueError, match="method="):
        column_colouring(pattern, method="magic")
    with pytest.raises(ValueError, match="kind="):
        symmetric_colouring(pattern, "chordal")
    with pytest.raises(ValueError, match="not symmetric"):
        symmetric_colouring(Pattern.of(torch.tensor([0]), torch.tensor([1]), (2, 2))[0])
    with pytest.raises(TypeError, match="int64"):
        Colouring(torch.zeros(3), "column")
    one = torch.zeros(16, dtype=torch.int64)
    with pytest.raises(ColouringError, match="share a row"):
        check_colouring(pattern, Colouring(one, "column"))
    with pytest.raises(ColouringError, match="neighbours share a colour"):
        check_symmetric(pattern, Colouring(one, "star"))
    with pytest.raises(ColouringError, match="16"):
        check_colouring(pattern, Colouring(one[:3], "column"))
