"""Packing loses nothing, repeats nothing, and keeps rows within their length."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.data import packing
from internlm2.data.packing import best_fit_decreasing, plan_of, plan_rows

lengths = st.lists(st.integers(1, 70), min_size=1, max_size=60)
ways = st.sampled_from(["concatenate", "best_fit"])


@settings(max_examples=300, deadline=None)
@given(lengths=lengths, seq_len=st.integers(1, 40), way=ways, key=st.integers(0, 2**64 - 1))
def test_every_token_stands_in_exactly_one_row(lengths, seq_len, way, key):
    documents = np.arange(len(lengths)) * 3 + 1
    row_starts, segments = plan_rows(documents, np.array(lengths), seq_len, way, key)
    seen = {int(document): np.zeros(length, int) for document, length in zip(documents, lengths)}
    for document, first, length in segments.tolist():
        assert length >= 1
        assert first + length <= len(seen[document])
        seen[document][first : first + length] += 1
    assert all((count == 1).all() for count in seen.values())
    assert row_starts[0] == 0
    assert row_starts[-1] == len(segments)
    assert (np.diff(row_starts) >= 1).all()
    fills = np.add.reduceat(segments[:, 2], row_starts[:-1])
    assert fills.max() <= seq_len


@given(lengths=lengths, seq_len=st.integers(1, 40))
def test_concatenate_fills_every_row_but_the_last(lengths, seq_len):
    row_starts, segments = plan_rows(np.arange(len(lengths)), np.array(lengths), seq_len, "concatenate", 5)
    fills = np.add.reduceat(segments[:, 2], row_starts[:-1])
    assert (fills[:-1] == seq_len).all()
    assert len(fills) == -(-sum(lengths) // seq_len)


@given(lengths=lengths, seq_len=st.integers(1, 40))
def test_best_fit_cuts_only_documents_that_are_too_long(lengths, seq_len):
    _, segments = plan_rows(np.arange(len(lengths)), np.array(lengths), seq_len, "best_fit", 5)
    pieces = np.bincount(segments[:, 0], minlength=len(lengths))
    assert (pieces == -(-np.array(lengths) // seq_len)).all()


@given(items=st.lists(st.integers(1, 30), min_size=1, max_size=80))
def test_best_fit_decreasing_equals_the_plain_algorithm(items):
    capacity = 30
    room: list[int] = []
    for length in sorted(items, reverse=True):
        fitting = [free for free in room if free >= length]
        if fitting:
            room[room.index(min(fitting))] -= length
        else:
            room.append(capacity - length)
    rows = best_fit_decreasing(np.array(items), capacity)
    fills = np.bincount(rows, weights=items)
    assert sorted(capacity - fills) == sorted(room)


def test_best_fit_wastes_little_where_concatenate_cuts():
    """Web-like lengths (log-normal, median 400 tokens) at 4k: more than 99 % of the room is used and no short
    document is cut.
    """
    generator = np.random.default_rng(0)
    lengths = np.minimum(np.exp(generator.normal(6.0, 1.0, 20_000)).astype(int) + 1, 4096)
    row_starts, segments = plan_rows(np.arange(len(lengths)), lengths, 4096, "best_fit", 1)
    assert lengths.sum() / ((len(row_starts) - 1) * 4096) > 0.99
    assert len(segments) == len(lengths)


def test_windows_hold_every_item(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 7)
    lengths = np.arange(1, 40)
    row_starts, segments = plan_rows(np.arange(39), lengths, 25, "best_fit", 3)
    assert segments[:, 2].sum() == lengths.sum()
    assert np.add.reduceat(segments[:, 2], row_starts[:-1]).max() <= 25


def test_plan_is_cached_and_rebuilt_when_damaged(tmp_path):
    arguments = (tmp_path / "plan", np.arange(50), np.arange(1, 51), 16, "best_fit", 9)
    plan = plan_of(*arguments)
    rows = [plan.row(number).tolist() for number in range(plan.rows)]
    before = (tmp_path / "plan" / "meta.json").stat().st_mtime_ns
    assert plan_of(*arguments).content == plan.content
    assert (tmp_path / "plan" / "meta.json").stat().st_mtime_ns == before
    with open(tmp_path / "plan" / "segments.bin", "r+b") as stream:
        stream.truncate(24)
    again = plan_of(*arguments)
    assert [again.row(number).tolist() for number in range(again.rows)] == rows
    assert json.loads((tmp_path / "plan" / "meta.json").read_text())["tokens"] == sum(range(1, 51))


@pytest.mark.parametrize("way", ["concatenate", "best_fit"])
def test_keys_shuffle_documents(way):
    plans = [plan_rows(np.arange(100), np.full(100, 5), 20, way, key)[1][:, 0].tolist() for key in (1, 2)]
    assert plans[0] != plans[1]
