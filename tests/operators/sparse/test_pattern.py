"""`Pattern` against sets of places written out, and what it keeps against what is made anew."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.sparse import csr
from operators.sparse.pattern import Pattern

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def places(draw, shape=None):
    """Rows and columns in any order with duplicates, and the shape; empty rows, wide, tall."""
    m, n = shape or (draw(st.integers(0, 6)), draw(st.integers(0, 6)))
    count = draw(st.integers(0, 15)) if m and n else 0
    rows = draw(st.lists(st.integers(0, m - 1), min_size=count, max_size=count)) if count else []
    columns = draw(st.lists(st.integers(0, n - 1), min_size=count, max_size=count)) if count else []
    dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.uint8]))
    return torch.tensor(rows, dtype=dtype), torch.tensor(columns, dtype=dtype), (m, n)


def mask(pattern: Pattern) -> np.ndarray:
    dense = np.zeros(pattern.shape, dtype=bool)
    for i in range(pattern.shape[0]):
        for position in range(int(pattern.row_pointers[i]), int(pattern.row_pointers[i + 1])):
            assert int(pattern.rows[position]) == i
            dense[i, int(pattern.columns[position])] = True
    assert dense.sum() == pattern.nnz  # none twice
    return dense


def check_order(pattern: Pattern) -> None:
    pairs = list(zip(pattern.rows.tolist(), pattern.columns.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    for indices in (pattern.rows, pattern.columns, pattern.row_pointers):
        assert indices.dtype == torch.int64


@PROPERTY
@given(places())
def test_of_sorts_and_merges(drawn):
    rows, columns, shape = drawn
    pattern, where = Pattern.of(rows, columns, shape)
    check_order(pattern)
    expected = np.zeros(shape, dtype=bool)
    expected[rows.numpy(), columns.numpy()] = True
    assert (mask(pattern) == expected).all()
    assert torch.equal(pattern.rows[where], rows.long())
    assert torch.equal(pattern.columns[where], columns.long())
    again = Pattern(pattern.columns, pattern.row_pointers, shape)
    assert again == pattern
    assert hash(again) == hash(pattern)
    assert torch.equal(again.rows, pattern.rows)


@PROPERTY
@given(places())
def test_facts_and_transpose(drawn):
    pattern, _ = Pattern.of(*drawn)
    dense = mask(pattern)
    square = dense.shape[0] == dense.shape[1]
    assert pattern.symmetric == (square and bool((dense == dense.T).all()))
    assert pattern.lower_triangular == (not np.triu(dense, 1).any())
    assert pattern.upper_triangular == (not np.tril(dense, -1).any())
    on_diagonal = pattern.rows[pattern.diagonal_positions].tolist()
    assert on_diagonal == np.flatnonzero(dense.diagonal()).tolist()
    transposed, order = pattern.transpose()
    check_order(transposed)
    assert (mask(transposed) == dense.T).all()
    assert torch.equal(pattern.rows[order], transposed.columns)
    assert torch.equal(pattern.columns[order], transposed.rows)
    back, back_order = transposed.transpose()
    assert back is pattern
    assert torch.equal(order[back_order], torch.arange(pattern.nnz))


@PROPERTY
@given(st.lists(st.integers(0, 9), max_size=20))
def test_counting_and_comparison_sorts_agree(keys):
    # The device decides which one runs; both must give the same.
    keys = torch.tensor(keys, dtype=torch.int64)
    assert torch.equal(csr.counted(keys, 10), torch.argsort(keys, stable=True))


@PROPERTY
@given(st.data(), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.sampled_from([3, 99]))
def test_union_and_product(data, m, n, k, group):
    A, _ = Pattern.of(*data.draw(places((m, n))))
    B, _ = Pattern.of(*data.draw(places((m, n))))
    C, _ = Pattern.of(*data.draw(places((n, k))))
    union, ours, theirs = A.union(B)
    check_order(union)
    assert (mask(union) == (mask(A) | mask(B))).all()
    for part, positions in ((A, ours), (B, theirs)):
        assert torch.equal(union.rows[positions], part.rows)
        assert torch.equal(union.columns[positions], part.columns)
    # All pairs at once, or few rows at a time.
    with mock.patch.object(csr, "GROUP", group):
        product = A.product(C)
    check_order(product.pattern)
    count = mask(A).astype(int) @ mask(C).astype(int)
    pairs = np.zeros((m, k), dtype=int)
    for left, right, where in zip(product.left, product.right, product.where, strict=True):
        assert A.columns[left] == C.rows[right]
        place = (int(product.pattern.rows[where]), int(product.pattern.columns[where]))
        assert place == (int(A.rows[left]), int(C.columns[right]))
        pairs[place] += 1
    assert (pairs == count).all()
    assert (mask(product.pattern) == (count > 0)).all()


def test_a_union_that_adds_nothing_is_the_pattern():
    A, _ = Pattern.of(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), (2, 2))
    union, _, theirs = A.with_diagonal()
    assert union is A
    assert theirs.tolist() == [0, 2]
    lacking, _ = Pattern.of(torch.tensor([0, 1]), torch.tensor([0, 0]), (2, 2))
    assert lacking.with_diagonal()[0] == A


def test_block_diagonal_is_kron_with_the_identity():
    A, _ = Pattern.of(torch.tensor([0, 2, 2]), torch.tensor([1, 0, 3]), (3, 4))
    copies = A.block_diagonal(3)
    check_order(copies)
    assert (mask(copies) == np.kron(np.eye(3, dtype=bool), mask(A))).all()
    assert A.block_diagonal(3) is copies


def test_what_follows_is_made_once():
    A, _ = Pattern.of(torch.tensor([0, 1]), torch.tensor([1, 2]), (2, 3))
    B, _ = Pattern.of(torch.tensor([0, 2]), torch.tensor([1, 0]), (3, 2))
    assert A.transpose()[0] is A.transpose()[0]
    assert A.product(B) is A.product(B)
    equal, _ = Pattern.of(B.rows, B.columns, B.shape)
    assert equal is not B
    assert A.product(equal) is A.product(B)
    assert A.union(A)[0] is A
    assert A.narrow()[0] is A.narrow()[0]
    assert A.narrow()[1].dtype == torch.int32


def test_patterns_are_freed_without_the_garbage_collector():
    A, _ = Pattern.of(torch.tensor([0, 1, 1]), torch.tensor([1, 2, 0]), (2, 3))
    square, _ = Pattern.of(torch.tensor([0, 1]), torch.tensor([1, 0]), (2, 2))
    gc.disable()
    try:
        transposed, _ = A.transpose()
        A.product(transposed)
        transposed.product(A)
        A.union(A)
        square.transpose()
        square.product(square)
        square.with_diagonal()
        alive = weakref.ref(A), weakref.ref(square)
        del A, square
        assert [reference() for reference in alive] == [None, None]
        # A transpose that has lost its origin makes it anew.
        back, order = transposed.transpose()
        assert back.shape == (2, 3)
        assert torch.equal(transposed.rows[order], back.columns)
        assert transposed.transpose()[0] is back
    finally:
        gc.enable()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, "jvp", "inference"])
def test_what_is_made_inside_a_transform_holds_outside(transform):
    rows = torch.tensor([1, 0, 1])
    made = []

    def function(x):
        # Indices that a transform has made too: torch.func wraps them.
        pattern, where = Pattern.of(rows, torch.arange(3), (2, 3))
        pattern.narrow()
        pattern.product(pattern.transpose()[0])
        pattern.block_diagonal(2)
        pattern.narrow()
        made.append((pattern, where))
        return (x**2).sum()

    x = torch.ones(2, 2)
    if transform == "jvp":
        torch.func.jvp(function, (x,), (x,))
    elif transform == "inference":
        with torch.inference_mode():
            function(x)
    else:
        transform(function)(x)
    pattern, where = made[0]
    transposed, order = pattern.transpose()
    product = pattern.product(transposed)
    held = [where, order, *pattern.narrow(), *product[1:], pattern.rows, transposed.rows]
    held += [pattern.block_diagonal(2).columns, product.pattern.row_pointers]
    for tensor in held:
        assert not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        assert not tensor.is_inference()


def test_copies_and_pickles_are_equal_and_hold_no_caches():
    A, _ = Pattern.of(torch.tensor([0, 1]), torch.tensor([1, 2]), (2, 3))
    A.transpose()
    A.union(A)
    for other in (copy.deepcopy(A), pickle.loads(pickle.dumps(A)), A.to("cpu")):
        assert other == A
    assert A.to("cpu") is A
    assert pickle.loads(pickle.dumps(A))._order is None


def test_inequality():
    A, _ = Pattern.of(torch.tensor([0, 1]), torch.tensor([1, 2]), (2, 3))
    B, _ = Pattern.of(torch.tensor([0, 1]), torch.tensor([1, 1]), (2, 3))
    wider, _ = Pattern.of(torch.tensor([0, 1]), torch.tensor([1, 2]), (2, 4))
    assert A != B
    assert wider != A
    assert A != "pattern"


INDEX = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Pattern.of(INDEX, INDEX.double(), (2, 2)), TypeError, "columns is torch.float64"),
        (lambda: Pattern.of([0], INDEX, (2, 2)), TypeError, "rows is a list; expected an integer"),
        (lambda: Pattern.of(INDEX, INDEX[:1], (2, 2)), ValueError, r"rows has shape \(2,\) and"),
        (lambda: Pattern.of(INDEX, INDEX, (1, 2)), ValueError, "rows reaches from 0 to 1; expect"),
        (lambda: Pattern.of(INDEX, INDEX - 1, (2, 2)), ValueError, "columns reaches from -1 to 0"),
        (lambda: Pattern.of(INDEX, INDEX, (2,)), ValueError, r"shape=\(2,\); expected two"),
        (lambda: Pattern.of(INDEX, INDEX, (-1, 2)), ValueError, "sizes >= 0"),
        (lambda: Pattern.of(INDEX, INDEX, (2**32, 2**32)), ValueError, "an int64 counts"),
        (lambda: Pattern(INDEX.int(), INDEX, (1, 2)), TypeError, "columns is torch.int32 of shape"),
        (lambda: Pattern(INDEX, INDEX, (2, 2)), ValueError, r"length 2; expected m \+ 1 = 3"),
        (lambda: Pattern(INDEX, INDEX, (1, 2)), ValueError, "does not rise from 0 to nnz = 2"),
        (lambda: Pattern(INDEX.flip(0), torch.tensor([0, 2]), (1, 2)), ValueError, "each row"),
        (lambda: Pattern.eye(2).union(Pattern.eye(3)), ValueError, "cannot unite Pattern"),
        (lambda: Pattern.eye(2).product(Pattern.eye(3)), ValueError, "cannot multiply Pattern"),
        (
            lambda: torch.func.vmap(lambda i: Pattern.of(i, i, (2, 2))[1])(INDEX[None]),
            ValueError,
            "a pattern is one for all",
        ),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
