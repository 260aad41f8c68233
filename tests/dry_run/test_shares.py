"""Rows and pieces of every rank: no gap, no overlap, at any number of ranks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.config import ConfigError
from internlm2.dry_run.shares import Piece, check_cover, check_rows, flat_pieces, rows_of, sharded_pieces

sizes = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(1, 400), min_size=1, max_size=6)


@given(sizes, st.integers(1, 40), st.sampled_from([1, 2, 4]))
@settings(max_examples=60, deadline=None)
def test_flat_partitions_cover_everything_once(parameters, ranks, alignment):
    owned = flat_pieces([parameters], ranks, alignment)
    check_cover(owned, {name: (size,) for name, size in parameters.items()})
    assert len(owned) == ranks
    partition = max(sum(piece.length for piece in pieces) for pieces in owned)
    assert partition * ranks >= sum(parameters.values())


@given(sizes, st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_shards_of_each_parameter_cover_it_once(parameters, ranks):
    shapes = {name: (size,) for name, size in parameters.items()}
    check_cover(sharded_pieces(shapes, ranks), shapes)


@given(st.integers(0, 10_000), st.integers(1, 300), st.integers(1, 64))
@settings(max_examples=40, deadline=None)
def test_rows_belong_to_one_rank_each(position, rows, ranks):
    check_rows(position, rows, ranks)
    assert sum(len(rows_of(position, rows, rank, ranks)) for rank in range(ranks)) == rows


def test_holes_and_overlaps_are_found():
    shapes = {"w": (10,)}
    with pytest.raises(ConfigError, match="own 9 of its 10"):
        check_cover([[Piece("w", 0, 9)]], shapes)
    with pytest.raises(ConfigError, match="belong to no rank"):
        check_cover([[Piece("w", 0, 4)], [Piece("w", 5, 5)]], shapes)
    with pytest.raises(ConfigError, match="or to two"):
        check_cover([[Piece("w", 0, 6)], [Piece("w", 5, 5)]], shapes)
