"""Conversations longer than a row: where they are cut, and that what is left out is counted."""

import json
import logging

import numpy as np
import pytest

from internlm2.config import ConfigError, SourceConfig
from internlm2.data.corpus import Corpus
from internlm2.data.long_conversations import Shortened, last_answer_end, shorten
from internlm2.data.rows import IGNORE
from internlm2.data.shards import shard_of
from internlm2.data.stream import TokenStream
from internlm2.data.validation import validation_rows
from internlm2.sources.source import open_source
from internlm2.text.tokenizer import load_tokenizer
from internlm2.text.tokenizer_training import train_model


def mask_of(text: str) -> np.ndarray:
    """'.' is a token without loss, '#' one with loss."""
    return np.array([mark == "." for mark in text], np.uint8)


@pytest.mark.parametrize(
    ("conversation", "seq_len", "kept"),
    [
        ("..##.", 4, 4),  # the answer ends where the row does
        ("..##...##.", 9, 9),
        ("..##...##.", 8, 4),  # the second answer would be cut: it goes with its question
        ("..##...##.", 5, 4),
        ("..####", 4, 4),  # not even the first answer fits: its beginning
        ("....##", 4, 0),  # nothing would be trained
        ("..##", 4, 4),  # the answer ends the document
    ],
)
def test_where_a_conversation_is_cut(conversation, seq_len, kept):
    assert last_answer_end(mask_of(conversation), seq_len) == kept


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Ten short chats, one with a long second answer, one with a long first answer, one with a long question."""
    folder = tmp_path_factory.mktemp("long")
    path = folder / "tokenizer.model"
    path.write_bytes(train_model(["user assistant system name= Hello\n" * 40], 330))
    tokenizer = load_tokenizer(path)

    def chat(*texts):
        return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]

    long = "0123456789" * 10
    chats = [chat(f"q{n}", f"a{n}") for n in range(10)]
    chats += [chat("q", "a", "r", long), chat("q", long), chat(long, "a")]
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": record}) + "\n" for record in chats))
    source = open_source("chats", SourceConfig(kind="conversations", path=str(file)))
    shard = shard_of(source, tokenizer, folder, progress=False)
    return Corpus({"chats": shard}, tokenizer.fingerprint, 0.0, folder), tokenizer


def test_what_is_left_out_is_counted(made):
    corpus, _ = made
    shard = corpus.shard("chats")
    documents = np.arange(13)
    kept, lengths, done = shorten(shard, documents, np.asarray(shard.lengths), 64, "cut")
    assert kept.tolist() == [*range(10), 10, 11]
    before = np.asarray(shard.lengths)
    assert lengths[:10].tolist() == before[:10].tolist()
    assert lengths[11] == 64
    targets = [int((np.asarray(shard.mask[shard.offsets[n] : shard.offsets[n + 1]]) == 0).sum()) for n in range(13)]
    used = [int((np.asarray(shard.mask[shard.offsets[n] :][:length]) == 0).sum()) for n, length in zip(kept, lengths)]
    assert done == Shortened(
        conversations=3,
        dropped=1,
        cut_answers=1,
        tokens=int(before.sum() - lengths.sum()),
        targets=sum(targets) - sum(used),
    )
    kept, _, done = shorten(shard, documents, before, 64, "drop")
    assert kept.tolist() == list(range(10))
    assert (done.dropped, done.cut_answers, done.targets) == (3, 0, sum(targets[10:]))
    assert shorten(shard, documents, before, 64, "split")[2] == Shortened()


def test_no_row_of_a_stream_begins_inside_a_conversation(made, caplog):
    corpus, tokenizer = made
    with caplog.at_level(logging.WARNING):
        stream = TokenStream(corpus, {"chats": 1.0}, 64, long_conversations="cut")
    assert "3 conversations exceed train.seq_len=64" in caplog.text
    assert "1 left out, 1 end inside an answer" in caplog.text
    assert stream.shortened["chats"].conversations == 3
    rows = [stream[position] for position in range(stream.pools[0].plan.rows)]
    seen = np.concatenate([row.documents for row in rows])
    assert sorted(seen.tolist()) == list(range(12))
    for row in rows:
        assert len(row.ids) <= 64
        assert (row.ids[row.cu_seqlens[:-1]] == tokenizer.bos_id).all()
        assert all((row.labels[a:b] != IGNORE).any() for a, b in zip(row.cu_seqlens, row.cu_seqlens[1:]))
    split = TokenStream(corpus, {"chats": 1.0}, 64)
    assert split.fingerprint != stream.fingerprint


def test_held_out_conversations_are_cut_as_well(made):
    corpus, tokenizer = made
    held_out = Corpus(corpus.shards, tokenizer.fingerprint, 0.5, corpus.cache_dir)
    for row in validation_rows(held_out, 64, 100)["chats"]:
        assert (row.ids[row.cu_seqlens[:-1]] == tokenizer.bos_id).all()


def test_impossible_wishes_are_one_sentence(made):
    corpus, _ = made
    with pytest.raises(ConfigError, match="concatenate cuts the conversations of chats"):
        TokenStream(corpus, {"chats": 1.0}, 64, "concatenate", long_conversations="cut")
    with pytest.raises(ConfigError, match="every conversation of chats is longer than"):
        TokenStream(corpus, {"chats": 1.0}, 4, long_conversations="drop")
