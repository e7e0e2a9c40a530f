"""`Space` is an isomorphism: ravel and unravel are inverse, linear, differentiable, and refuse."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from operators import Space

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


class Layer(NamedTuple):
    weight: Any
    bias: Any


shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
skeletons = st.recursive(
    shapes.map(lambda shape: ("leaf", shape)),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3),
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1),
        st.tuples(inner, inner).map(lambda pair: Layer(*pair)),
    ),
    max_leaves=5,
)


def grow(skeleton: Any, generator: torch.Generator, dtype: torch.dtype) -> Any:
    """Tree of random tensors; a leaf of the skeleton is the pair ("leaf", shape)."""
    if type(skeleton) is tuple and skeleton[0] == "leaf":
        return torch.randn(skeleton[1], generator=generator, dtype=dtype)
    if isinstance(skeleton, Layer):
        return Layer(*(grow(part, generator, dtype) for part in skeleton))
    if isinstance(skeleton, dict):
        return {name: grow(part, generator, dtype) for name, part in skeleton.items()}
    return [grow(part, generator, dtype) for part in skeleton]


@PROPERTY
@given(skeletons, st.sampled_from([torch.float32, torch.float64]), st.integers(0, 9))
def test_ravel_and_unravel_are_inverse_and_linear(skeleton, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    tree, other = (grow(skeleton, generator, dtype) for _ in range(2))
    space = Space.of(tree)
    vector = space.ravel(tree)

    assert vector.shape == (space.size,)
    assert vector.dtype == dtype
    assert space.size == sum(leaf.numel() for leaf in pytree.tree_leaves(tree))
    back = space.unravel(vector)
    assert type(back) is type(tree)
    assert pytree.tree_structure(back) == pytree.tree_structure(tree)
    for leaf, original in zip(pytree.tree_leaves(back), pytree.tree_leaves(tree), strict=True):
        assert torch.equal(leaf, original)
    assert torch.equal(space.ravel(back), vector)

    combined = pytree.tree_map(lambda a, b: 2.0 * a - b, tree, other)
    assert torch.equal(space.ravel(combined), 2.0 * vector - space.ravel(other))


def test_leaves_are_stacked_in_row_major_order():
    tree = {"w": torch.arange(6.0).reshape(2, 3), "s": torch.tensor(6.0), "b": torch.tensor([7.0])}
    assert Space.of(tree).ravel(tree).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    # A transposed leaf is not contiguous: its order is that of its indices, not of its memory.
    turned = {**tree, "w": torch.tensor([[0.0, 10.0], [1.0, 11.0], [2.0, 12.0]]).T}
    assert Space.of(tree).ravel(turned).tolist() == [0, 1, 2, 10, 11, 12, 6, 7]


def test_ravel_passes_gradients_and_vmap():
    tree = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor(3.0)}
    space = Space.of(tree)
    weight = torch.tensor([5.0, 6.0, 7.0])
    gradient = torch.func.grad(lambda tree: space.ravel(tree) @ weight)(tree)
    assert torch.equal(gradient["a"], torch.tensor([[5.0, 6.0]]))
    assert torch.equal(gradient["b"], torch.tensor(7.0))

    rows = torch.arange(6.0).reshape(2, 3)
    unravelled = torch.func.vmap(space.unravel)(rows)
    assert unravelled["a"].shape == (2, 1, 2)
    assert torch.equal(torch.func.vmap(space.ravel)(unravelled), rows)


def test_flat_space_is_the_space_of_plain_vectors():
    space = Space.flat(4, torch.float64)
    assert space == Space.of(torch.zeros(4, dtype=torch.float64))
    assert space.is_flat
    assert space.size == 4
    assert not Space.of(torch.zeros(2, 2)).is_flat
    assert not Space.of(torch.tensor(1.0)).is_flat
    assert not Space.of([torch.zeros(4)]).is_flat


def test_parameters_of_a_module():
    module = torch.nn.Linear(3, 2)
    space = Space.of(dict(module.named_parameters()))
    assert space.size == 8


def test_a_module_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"inner is a Linear module.*named_parameters.*functional_"):
        Space.of(torch.nn.Linear(1, 1), "inner")


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({}, ValueError, r"y holds no tensor"),
        ([torch.ones(2), 3.0], TypeError, r"y has a leaf of type float; expected tensors"),
        ({"a": None}, TypeError, r"leaf of type NoneType"),
        (torch.ones(2, dtype=torch.int64), TypeError, r"dtype torch.int64; expected a floating"),
        (torch.ones(2, dtype=torch.complex64), TypeError, r"complex64; expected a floating"),
        (
            [torch.ones(1), torch.ones(1, dtype=torch.float64)],
            TypeError,
            r"mixes dtypes \['torch.float32', 'torch.float64'\]",
        ),
        (
            [torch.ones(1), torch.ones(1, device="meta")],
            TypeError,
            r"mixes devices \['cpu', 'meta'",
        ),
    ],
)
def test_what_has_no_coordinates_is_refused(tree, error, message):
    with pytest.raises(error, match=message):
        Space.of(tree, "y")


@pytest.mark.parametrize(
    ("tree", "error", "came"),
    [
        ({"a": torch.ones(3), "b": torch.ones(())}, ValueError, r"v has structure .*'a': \(3,\)"),
        ({"a": torch.ones(2)}, ValueError, r"v has structure \{'a': \(2,\)\}"),
        ([torch.ones(2), torch.ones(())], ValueError, r"v has structure \[\(2,\), \(\)\]"),
        ({"a": torch.ones(2), "b": 1.0}, ValueError, r"'b': 'float'"),
        (torch.ones(3), ValueError, r"v has structure \(3,\)"),
        (
            {"a": torch.ones(2).double(), "b": torch.ones(()).double()},
            TypeError,
            r"v has dtype torch.float64 on cpu",
        ),
    ],
)
def test_ravel_names_what_came_and_what_was_expected(tree, error, came):
    space = Space.of({"a": torch.ones(2), "b": torch.ones(())})
    expected = r"\{'a': \(2,\), 'b': \(\)\} of float32 on cpu"
    if error is TypeError:
        expected = r"expected torch.float32 on cpu"
    with pytest.raises(error, match=came + ".*" + expected):
        space.ravel(tree, "v")
