"""Shares of the slot table hold in every prefix, not only at the end."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.data.mixture import PERIOD, SlotTable

shares = st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None)
@given(shares=shares)
def test_every_prefix_is_within_one_turn_of_its_share(shares):
    table = SlotTable(shares)
    pools = np.array([table.locate(position)[0] for position in range(table.period)])
    prefix = np.arange(1, table.period + 1)
    for pool, turns in enumerate(table.turns):
        drawn = np.cumsum(pools == pool)
        assert np.abs(drawn - prefix * turns / table.period).max() < 1.0


@settings(max_examples=25, deadline=None)
@given(shares=shares, start=st.integers(0, 10**15))
def test_each_pool_counts_its_turns_without_gaps(shares, start):
    table = SlotTable(shares)
    expected = table.counts(start).tolist()
    for position in range(start, start + 200):
        pool, turn = table.locate(position)
        assert turn == expected[pool]
        expected[pool] += 1
    assert expected == table.counts(start + 200).tolist()


@given(shares=shares)
@settings(max_examples=25, deadline=None)
def test_shares_are_met_to_the_resolution_of_a_period(shares):
    table = SlotTable(shares)
    wanted = np.array(shares) / sum(shares)
    assert np.abs(table.turns / table.period - wanted).max() <= len(shares) / PERIOD
    assert table.turns.min() >= 1


def test_simple_shares_have_short_periods():
    assert SlotTable([1.0]).period == 1
    table = SlotTable([0.5, 0.25, 0.25])
    assert table.period == 4
    assert sorted(table.locate(position)[0] for position in range(4)) == [0, 0, 1, 2]
