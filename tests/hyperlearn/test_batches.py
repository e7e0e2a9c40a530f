"""`Minibatches`: epochs are permutations, and the generator is the only source of chance."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hyperlearn.batches import Minibatches
from hyperlearn.oracles import batch_length

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def stream(n: int, size: int | None, seed: int = 0) -> Minibatches:
    return Minibatches(torch.arange(n), size, torch.Generator().manual_seed(seed), "inner_data")


def drawn(batches: Minibatches, count: int) -> list[list[int]]:
    return [batches.draw().tolist() for _ in range(count)]


@PROPERTY
@given(st.integers(1, 30), st.data(), st.integers(0, 99))
def test_an_epoch_is_a_permutation_less_the_rest(n, data, seed):
    size = data.draw(st.integers(1, n))
    batches, whole = stream(n, size, seed), n // size
    epochs = [drawn(batches, whole) for _ in range(3)]
    for epoch in epochs:
        assert all(len(batch) == size for batch in epoch)
        indices = list(chain(*epoch))
        assert len(set(indices)) == len(indices) == whole * size
        assert set(indices) <= set(range(n))


def test_epochs_differ_and_drop_different_samples():
    batches = stream(10, 4)
    epochs = [list(chain(*drawn(batches, 2))) for _ in range(20)]
    assert len({tuple(epoch) for epoch in epochs}) == 20
    assert set(chain(*epochs)) == set(range(10))  # nobody is left out for good


def test_seeds():
    assert drawn(stream(20, 3, seed=1), 30) == drawn(stream(20, 3, seed=1), 30)
    assert drawn(stream(20, 3, seed=1), 30) != drawn(stream(20, 3, seed=2), 30)


def test_two_streams_share_a_generator():
    generator = torch.Generator().manual_seed(0)
    one = Minibatches(torch.arange(9), 3, generator)
    other = Minibatches(torch.arange(9), 3, generator)
    assert drawn(one, 3) != drawn(other, 3)


def test_joined_draws_are_the_draws():
    joined, single = stream(12, 4, seed=3), stream(12, 4, seed=3)
    batch: Tensor = joined.draw(5)
    assert batch.tolist() == list(chain(*drawn(single, 5)))
    assert joined.draw().tolist() == single.draw().tolist()


def test_nested_data_stay_aligned():
    data = {"a": torch.arange(10.0)[:, None].expand(10, 3), "b": (torch.arange(10),)}
    batches = Minibatches(data, 4, torch.Generator().manual_seed(0))
    for _ in range(5):
        batch = batches.draw(2)
        assert batch["a"].shape == (8, 3)
        assert torch.equal(batch["a"][:, 0], batch["b"][0].float())


def test_whole_data():
    batches = stream(7, None)
    assert batches.draw() is batches.data
    assert batches.draw(3) is batches.data  # M copies of everything would be the same mean
    before = batches.generator.get_state()
    batches.draw()
    assert torch.equal(batches.generator.get_state(), before)


@pytest.mark.parametrize("size", [None, 5])
def test_no_data(size):
    batches = Minibatches(None, size, torch.Generator())
    assert batches.draw() is None
    assert batch_length(None) == 1


@pytest.mark.parametrize("size", [0, -1, 8])
def test_size_that_does_not_fit(size):
    with pytest.raises(ValueError, match=f"batch size {size} for inner_data of 7 samples"):
        stream(7, size)


def test_size_that_just_fits():
    assert sorted(stream(7, 7).draw().tolist()) == list(range(7))
