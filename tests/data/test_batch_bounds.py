"""Cutting an epoch into batches: nothing lost, nothing too large, no remainder; against every cut of short lists."""

from itertools import combinations, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from internlm2.data.batch_bounds import SHARING, batch_bounds

LIMIT = 20


def cut(sizes, limit=LIMIT):
    bounds = batch_bounds(np.array(sizes), limit)
    assert (bounds[0], bounds[-1]) == (0, len(sizes))
    assert (np.diff(bounds) > 0).all()
    return [sum(sizes[a:b]) for a, b in pairwise(bounds)]


def filled(sizes):
    batches = [0]
    for size in sizes:
        if batches[-1] and batches[-1] + size > LIMIT:
            batches.append(0)
        batches[-1] += size
    return batches


def distance(batches, target):
    return sum((batch - target) ** 2 for batch in batches)


@given(st.lists(st.integers(1, LIMIT), min_size=1, max_size=9))
def test_no_other_cut_is_more_even(sizes):
    target = sum(sizes) / len(filled(sizes))
    ways = [
        [sum(sizes[a:b]) for a, b in pairwise((0, *places, len(sizes)))]
        for count in range(len(sizes))
        for places in combinations(range(1, len(sizes)), count)
    ]
    best = min(distance(way, target) for way in ways if max(way) <= LIMIT)
    found = cut(sizes)
    assert max(found) <= LIMIT
    assert abs(distance(found, target) - best) < 1e-6


@given(st.lists(st.integers(1, LIMIT), min_size=1, max_size=3000))
def test_only_the_last_batches_give_something_up(sizes):
    greedy, found = filled(sizes), cut(sizes)
    assert max(found) <= LIMIT
    assert len(found) >= len(greedy)
    whole = max(0, len(greedy) - SHARING)
    assert found[:whole] == greedy[:whole]
    target = sum(greedy[whole:]) / len(greedy[whole:])
    assert distance(found[whole:], target) <= distance(greedy[whole:], target) + 1e-6


@given(st.integers(1, 400), st.integers(1, 9))
def test_pairs_of_one_size_are_spread_to_within_one(count, size):
    last = [batch // size for batch in cut([size] * count)][-SHARING:]
    assert max(last) - min(last) <= 1
