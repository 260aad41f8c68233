"""The token stream: a pure function of (seed, position) that keeps shares, loses no token and never joins documents."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.config import ConfigError, LengthBucketConfig
from internlm2.data.corpus import Corpus
from internlm2.data.shards import Shard
from internlm2.data.stream import TokenStream
from internlm2.data.usage import usage_table


def documents(seed, count, low, high):
    """Random documents, `<s>` first and `</s>` last."""
    generator = np.random.default_rng(seed)
    return [[1, *generator.integers(3, 290, size=generator.integers(low, high)).tolist(), 2] for _ in range(count)]


@pytest.fixture
def corpus(build_corpus):
    return build_corpus(
        {"code": documents(1, 80, 1, 60), "prose": documents(2, 30, 1, 200), "rare": documents(3, 3, 5, 9)}
    )


WEIGHTS = {"code": 0.6, "prose": 0.3, "rare": 0.1}
BUCKETS = [LengthBucketConfig(weight=0.5, max_tokens=40), LengthBucketConfig(weight=0.5, min_tokens=40)]


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("buckets", [[], BUCKETS])
def test_every_pool_shows_every_token_once_an_epoch(corpus, packing, buckets):
    stream = TokenStream(corpus, WEIGHTS, 32, packing, buckets, seed=5)
    seen = {pool.name: {} for pool in stream.pools}
    epochs = {pool.name: 0 for pool in stream.pools}
    for position in itertools.count():
        number, turn = stream._slots.locate(position)
        pool = stream.pools[number]
        epochs[pool.name] = turn // pool.plan.rows
        if turn // pool.plan.rows in (0, 1):
            row = stream[position]
            places = row.cu_seqlens.tolist()
            for document, start, end in zip(row.documents.tolist(), places, places[1:]):
                key = (turn // pool.plan.rows, document)
                seen[pool.name].setdefault(key, []).extend(row.ids[start:end].tolist())
        if min(epochs.values()) >= 2:
            break
    covered = {}
    for pool in stream.pools:
        shard = corpus.shards[pool.source]
        for (epoch, document), tokens in seen[pool.name].items():
            assert sorted(tokens) == sorted(shard.document(document).tolist())
            covered.setdefault((pool.source, epoch), set()).add(document)
    for source in WEIGHTS:
        for epoch in (0, 1):
            assert covered[source, epoch] == set(range(corpus.shards[source].documents))


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_labels_are_the_next_token_of_the_same_document(corpus, packing):
    stream = TokenStream(corpus, WEIGHTS, 16, packing, seed=1)
    cuts = ends = 0
    for position in range(200):
        row = stream[position]
        assert row.tokens <= 16
        shard = corpus.shards[stream.source_names[row.sources[0]]]
        for number, document in enumerate(row.documents):
            start, end = row.cu_seqlens[number : number + 2]
            whole = shard.document(document).tolist()
            ids, labels = row.ids[start:end].tolist(), row.labels[start:end].tolist()
            places = [at for at in range(len(whole)) if whole[at : at + len(ids)] == ids]
            follows = {(*ids[1:], whole[at + len(ids)] if at + len(ids) < len(whole) else -100) for at in places}
            assert tuple(labels) in follows
            cuts += labels[-1] != -100
            ends += labels[-1] == -100
    assert cuts > 0
    assert ends > 0


def test_masked_tokens_are_read_but_are_no_targets(build_corpus):
    corpus = build_corpus({"chat": [[1, -50, -51, 60, 61, 2]] * 2})
    row = TokenStream(corpus, {"chat": 1.0}, 12, "best_fit")[0]
    assert row.ids.tolist() == [1, 50, 51, 60, 61, 2] * 2
    assert row.labels.tolist() == [-100, -100, 60, 61, 2, -100] * 2
    assert row.cu_seqlens.tolist() == [0, 6, 12]
    cut = TokenStream(corpus, {"chat": 1.0}, 4, "concatenate")
    labels = {tuple(cut[position].ids.tolist()): cut[position].labels.tolist() for position in range(3)}
    assert labels[1, 50, 51, 60] == [-100, -100, 60, 61]


def test_seeking_equals_reading_in_order(corpus):
    stream = TokenStream(corpus, WEIGHTS, 24, seed=3)
    in_order = [stream[position].ids.tolist() for position in range(150)]
    fresh = TokenStream(corpus, WEIGHTS, 24, seed=3)
    for position in np.random.default_rng(0).permutation(150):
        assert fresh[int(position)].ids.tolist() == in_order[position]


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 39), max_size=8, unique=True))
def test_any_split_into_batches_gives_the_same_rows(split_stream, cuts):
    bounds = [0, *sorted(cuts), 40]
    batches = [split_stream.batch(range(low, high)) for low, high in itertools.pairwise(bounds)]
    whole = split_stream.batch(range(40))
    for name in ("ids", "labels", "sources", "documents"):
        assert torch.equal(torch.cat([getattr(batch, name) for batch in batches]), getattr(whole, name))
    lengths = torch.cat([batch.cu_seqlens.diff() for batch in batches])
    assert torch.equal(lengths, whole.cu_seqlens.diff())
    assert sum(batch.loss_tokens for batch in batches) == whole.loss_tokens


@pytest.fixture(scope="module")
def split_stream(build_corpus):
    corpus = build_corpus({"code": documents(1, 80, 1, 60), "prose": documents(2, 30, 1, 200)})
    return TokenStream(corpus, {"code": 0.7, "prose": 0.3}, 24, seed=3)


def test_batch_types(corpus):
    batch = TokenStream(corpus, WEIGHTS, 24, seed=3).batch([0, 5, 9])
    assert (batch.ids.dtype, batch.labels.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int64, torch.int32)
    assert batch.cu_seqlens[0] == 0
    assert batch.cu_seqlens[-1] == len(batch.ids) == len(batch.labels)
    assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())
    assert len(batch.sources) == len(batch.documents) == len(batch.cu_seqlens) - 1
    assert batch.loss_tokens == int((batch.labels != -100).sum())
    assert torch.equal(batch.to("cpu").ids, batch.ids)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_shares_count_tokens(build_corpus, packing):
    """Rows of `wide` are two-thirds full under best fit; its share of the tokens must not suffer from that."""
    corpus = build_corpus({"narrow": documents(1, 300, 6, 9), "wide": [[1, *range(3, 21), 2]] * 200})
    stream = TokenStream(corpus, {"narrow": 0.5, "wide": 0.5}, 30, packing, seed=2)
    tokens = np.zeros(2)
    for position in range(2000):
        row = stream[position]
        tokens[row.sources[0]] += row.tokens
    assert abs(tokens[0] / tokens.sum() - 0.5) < 0.005


def test_length_buckets_hold_their_share(corpus):
    stream = TokenStream(corpus, WEIGHTS, 64, "best_fit", BUCKETS, seed=2)
    short = total = 0
    lengths = {name: shard.lengths for name, shard in corpus.shards.items()}
    for position in range(4000):
        row = stream[position]
        source = stream.source_names[row.sources[0]]
        total += row.tokens
        short += row.tokens * bool(lengths[source][row.documents[0]] < 40)
        assert len({bool(lengths[source][document] < 40) for document in row.documents}) == 1
    assert abs(short / total - 0.5) < 0.02
    assert [pool.name for pool in stream.pools] == [
        "code [0..40)",
        "prose [0..40)",
        "rare [0..40)",
        "code [40..)",
        "prose [40..)",
    ]


def test_the_order_depends_on_the_seed_and_differs_between_epochs(corpus):
    streams = [TokenStream(corpus, {"code": 1.0}, 24, seed=seed) for seed in (1, 1, 2)]
    rows = streams[0].pools[0].plan.rows
    orders = [[stream[position].ids.tolist() for position in range(rows)] for stream in streams]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    second_epoch = [streams[0][position].ids.tolist() for position in range(rows, 2 * rows)]
    assert second_epoch != orders[0]
    assert sorted(second_epoch) == sorted(orders[0])


def test_held_out_documents_never_appear(build_corpus):
    corpus = build_corpus({"code": documents(1, 200, 3, 30)}, validation_fraction=0.2)
    held = set(corpus.held_out_documents("code").tolist())
    assert 20 <= len(held) <= 60
    stream = TokenStream(corpus, {"code": 1.0}, 32)
    seen = {
        document for position in range(stream.pools[0].plan.rows) for document in stream[position].documents.tolist()
    }
    assert seen == set(range(200)) - held


def test_describe_counts_what_the_stream_yields(corpus):
    stream = TokenStream(corpus, WEIGHTS, 32, "concatenate", BUCKETS, seed=2)
    uses = stream.describe(500)
    rows = dict.fromkeys((pool.name for pool in stream.pools), 0)
    for position in range(500):
        rows[stream.pools[stream._slots.locate(position)[0]].name] += 1
    assert {use.name: use.rows for use in uses} == rows
    assert sum(use.share for use in uses) == pytest.approx(1)
    code = [use for use in uses if use.source == "code"]
    assert sum(use.tokens_per_epoch for use in code) == corpus.shards["code"].total_tokens
    assert all(use.epochs == pytest.approx(use.tokens / use.tokens_per_epoch) for use in uses)
    table = usage_table(uses).splitlines()
    assert len(table) == len(uses) + 2
    assert table[0].split() == ["pool", "documents", "tokens", "planned", "tokens", "share", "epochs"]


def test_fingerprint_changes_with_everything_that_changes_rows(build_corpus):
    sources = {"code": documents(1, 50, 3, 30), "prose": documents(2, 20, 3, 30)}
    corpus = build_corpus(sources)
    base = TokenStream(corpus, {"code": 0.5, "prose": 0.5}, 32, "best_fit", [], 1)
    assert (
        TokenStream(build_corpus(sources), {"prose": 5, "code": 5}, 32, "best_fit", [], 1).fingerprint
        == base.fingerprint
    )
    changed = [*sources["code"][:-1], [1, 99, 2]]
    others = {
        "source code": TokenStream(build_corpus({**sources, "code": changed}), {"code": 1, "prose": 1}, 32, seed=1),
        "mixture": TokenStream(corpus, {"code": 0.6, "prose": 0.4}, 32, seed=1),
        "seq_len": TokenStream(corpus, {"code": 1, "prose": 1}, 31, seed=1),
        "packing": TokenStream(corpus, {"code": 1, "prose": 1}, 32, "concatenate", seed=1),
        "seed": TokenStream(corpus, {"code": 1, "prose": 1}, 32, seed=2),
        "validation_fraction": TokenStream(build_corpus(sources, 0.1), {"code": 1, "prose": 1}, 32, seed=1),
    }
    for part, other in others.items():
        assert other.fingerprint != base.fingerprint
        assert part in other.check_fingerprint(base.state(7), "accept")
        with pytest.raises(ConfigError, match=rf"data changed.*{part}.*position 7.*data\.on_change=accept"):
            other.check_fingerprint(base.state(7), "refuse")
    assert base.check_fingerprint(base.state(7)) == []


def test_clear_errors(corpus):
    def make(weights=WEIGHTS, seq_len=32, packing="best_fit", buckets=()):
        return TokenStream(corpus, weights, seq_len, packing, buckets)

    with pytest.raises(ConfigError, match=r"data\.weights\.web: there is no such source.*code, prose, rare"):
        make({"web": 1.0})
    with pytest.raises(ConfigError, match="all weights are zero"):
        make({"code": 0.0, "prose": 0.0})
    with pytest.raises(ConfigError, match="cannot be negative"):
        make({"code": -1.0})
    with pytest.raises(ConfigError, match="concatenate or best_fit"):
        make(packing="first_fit")
    with pytest.raises(ConfigError, match=r"seq_len=1000000 is longer than all training text"):
        make(seq_len=1_000_000)
    with pytest.raises(ConfigError, match=r"no training document of code.*1,000 <= tokens; the longest has"):
        make({"code": 1.0}, buckets=[SimpleNamespace(weight=1.0, min_tokens=1000, max_tokens=None)])
    with pytest.raises(ConfigError, match="overlap at 10 tokens"):
        make(buckets=[LengthBucketConfig(weight=1, max_tokens=20), LengthBucketConfig(weight=1, min_tokens=10)])
    with pytest.raises(ConfigError, match="must exceed"):
        make(buckets=[LengthBucketConfig(weight=1, min_tokens=20, max_tokens=20)])
    with pytest.raises(ConfigError, match=r"length_buckets: all weights are zero"):
        make(buckets=[LengthBucketConfig(weight=0)])
    with pytest.raises(IndexError):
        make()[-1]


def test_sources_that_contribute_nothing_are_named(build_corpus, caplog):
    sources = {"code": documents(1, 40, 3, 30), "one": [[1, 5, 2]]}
    corpus = build_corpus(sources)
    with caplog.at_level("WARNING"):
        TokenStream(corpus, {"code": 1, "one": 1}, 8, length_buckets=[LengthBucketConfig(weight=1.0, min_tokens=5)])
    assert "one has a weight, but none of its documents falls into data.length_buckets" in caplog.text
    held = build_corpus(sources, 0.5)
    assert len(held.training_documents("one")) == 0
    with pytest.raises(ConfigError, match=r"data\.sources\.one has no document to train on.*validation_fraction=0\.5"):
        TokenStream(held, {"code": 1, "one": 1}, 8)


def test_seeking_far_is_as_exact_as_near(corpus):
    stream = TokenStream(corpus, WEIGHTS, 24, seed=3)
    far = 10**15
    assert stream[far].ids.tolist() == stream[far].ids.tolist()
    counts = stream._slots.counts(far)
    pool, turn = stream._slots.locate(far)
    assert counts[pool] == turn


@pytest.mark.slow
def test_an_index_of_a_thousand_million_tokens(tmp_path):
    """200,000 documents of 5,000 tokens; the token file is sparse. Any position is reached without reading the
    others.
    """
    count, length = 200_000, 5_000
    for name, values in {
        "offsets": np.arange(count + 1) * length,
        "split_hashes": np.full(count, 2**63, np.uint64),
        "text_bytes": np.zeros(count, np.int64),
        "file_index": np.zeros(count, np.int64),
        "lines": np.arange(count),
    }.items():
        (tmp_path / f"{name}.bin").write_bytes(values.tobytes())
    with open(tmp_path / "tokens.bin", "wb") as stream:
        stream.truncate(2 * count * length)
    meta = {"format": 1, "documents": count, "tokens": count * length, "masked_tokens": 0, "text_bytes": 0}
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"content": "synthetic", "vocab_size": 300}))
    corpus = Corpus({"synthetic": Shard("synthetic", tmp_path)}, "none", 0.0, tmp_path / "cache")
    stream = TokenStream(corpus, {"synthetic": 1.0}, 4096, "concatenate")
    assert stream.pools[0].plan.tokens == 10**9
    for position in (0, 244_140, 123_456, 10**12):
        row = stream[position]
        assert row.tokens in (4096, 10**9 % 4096)
        assert (row.labels == -100).sum() in (0, 1)
