"""Keyed permutations are bijections, differ by key, and never change."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm2.permutation import derive_key, permute, shuffled

keys = st.integers(0, 2**64 - 1)


@given(size=st.integers(1, 600), key=keys)
def test_permute_is_a_bijection(size, key):
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


@given(size=st.integers(2, 2**60), key=keys, data=st.data())
def test_permute_stays_in_range_at_any_size(size, key, data):
    index = data.draw(st.integers(0, size - 1))
    assert 0 <= permute(index, size, key) < size


def test_permute_refuses_an_index_outside():
    with pytest.raises(IndexError):
        permute(5, 5, 0)


def test_permute_mixes():
    """Positions of neighbours are spread: the mean distance of a random permutation is a third of the size."""
    size = 10_000
    places = [permute(index, size, derive_key(1, "test")) for index in range(size)]
    distance = np.abs(np.diff(places)).mean() / size
    assert 0.31 < distance < 0.36
    assert sum(place == index for index, place in enumerate(places)) < 8


def test_keys_give_different_orders():
    orders = {tuple(permute(index, 50, derive_key(7, "epoch", epoch)) for index in range(50)) for epoch in range(20)}
    assert len(orders) == 20


@given(count=st.integers(0, 500), key=keys)
def test_shuffled_is_a_permutation(count, key):
    assert sorted(shuffled(count, key).tolist()) == list(range(count))


def test_values_are_fixed_forever():
    """A change here would silently change the data order of every run that is resumed."""
    assert derive_key(0, "pool", "code", 0, None) == 870112978198929151
    assert derive_key("1") != derive_key(1)
    assert [permute(index, 10, 42) for index in range(10)] == [7, 6, 8, 1, 4, 0, 3, 2, 5, 9]
    assert shuffled(8, 42).tolist() == [4, 1, 6, 2, 3, 0, 7, 5]
