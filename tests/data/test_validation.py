"""Validation rows: held-out text only, the same every time, whole documents where they fit."""

import numpy as np
import pytest

from internlm2.config import ConfigError
from internlm2.data.validation import long_validation_rows, validation_rows


@pytest.fixture(scope="module")
def corpus(build_corpus):
    generator = np.random.default_rng(0)

    def documents(count, low, high):
        return [[1, *generator.integers(3, 290, size=generator.integers(low, high)).tolist(), 2] for _ in range(count)]

    return build_corpus(
        {"code": documents(200, 5, 90), "long": documents(40, 200, 400), "one": documents(1, 5, 6)}, 0.2
    )


def test_rows_hold_held_out_documents_only_and_never_change(corpus):
    first, second = (validation_rows(corpus, 64, 10_000) for _ in range(2))
    for source, rows in first.items():
        held = set(corpus.held_out_documents(source).tolist())
        assert {document for row in rows for document in row.documents.tolist()} == held
        assert all(row.tokens <= 64 for row in rows)
        assert sum(row.tokens for row in rows) == corpus.shards[source].lengths[sorted(held)].sum()
        assert [row.ids.tolist() for row in rows] == [row.ids.tolist() for row in second[source]]


def test_sources_without_held_out_documents_are_left_out(corpus):
    assert "one" not in validation_rows(corpus, 64, 4)
    assert list(validation_rows(corpus, 64, 4, ["long"])) == ["long"]
    with pytest.raises(ConfigError, match="no source 'web'"):
        validation_rows(corpus, 64, 4, ["web"])


def test_the_number_of_rows_is_bounded(corpus):
    assert {source: len(rows) for source, rows in validation_rows(corpus, 64, 3).items()} == {"code": 3, "long": 3}


def test_short_documents_stay_whole(corpus):
    lengths = corpus.shards["code"].lengths
    for row in validation_rows(corpus, 128, 10_000)["code"]:
        assert np.diff(row.cu_seqlens).tolist() == lengths[row.documents].tolist()


def test_long_rows_begin_at_the_beginning_of_one_document(corpus):
    found = long_validation_rows(corpus, 300, 5, 250)
    assert list(found) == ["long"]
    for row in found["long"]:
        whole = corpus.shards["long"].document(int(row.documents[0]))
        assert len(row.documents) == 1
        assert len(whole) >= 250
        assert row.ids.tolist() == whole[:300].tolist()
        assert row.labels[:-1].tolist() == row.ids[1:].tolist()
        assert row.labels[-1] == (whole[300] if len(whole) > 300 else -100)


def test_no_document_is_long_enough(corpus):
    with pytest.raises(
        ConfigError, match=r"no held-out document has 5,000 tokens \(the longest has .*validation_fraction"
    ):
        long_validation_rows(corpus, 8192, 4, 5000)
