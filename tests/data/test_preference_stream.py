"""Pairs into batches: what is dropped and cut, what a batch holds, and that nothing depends on ranks or restarts."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.config import ConfigError, SourceConfig, TrainConfig
from internlm2.data.corpus import Corpus
from internlm2.data.preference_pairs import PreferencePairs
from internlm2.data.preference_stream import PreferenceStream
from internlm2.data.reward_sequence import RewardSequences
from internlm2.data.shards import shard_of
from internlm2.sources.source import open_source
from internlm2.text.chat import Message, render


def train(micro_batch=1):
    return TrainConfig(seq_len=64, batch_tokens=1, micro_batch=micro_batch, steps=1, tokens=None, epochs=None)


@pytest.fixture(scope="module")
def build(tmp_path_factory, tokenizer):
    """`build({source: records}, passes, conditions, ...)`: a stream over those records."""

    def make(sources, passes=None, conditions=None, seq_len=64, batch_tokens=256, seed=0, held_out=0.0, **more):
        shards, tmp_path = {}, tmp_path_factory.mktemp("preferences")
        for name, records in sources.items():
            file = tmp_path / f"{name}.jsonl"
            file.write_text("\n".join(json.dumps(record) for record in records))
            source = open_source(name, SourceConfig(kind="preferences", path=str(file)))
            shards[name] = shard_of(source, tokenizer, tmp_path / "cache", workers=1, progress=False)
        corpus = Corpus(shards, tokenizer.fingerprint, held_out, tmp_path / "cache")
        told = {
            domain: render([Message("system", text)], tokenizer).ids[1:] for domain, text in (conditions or {}).items()
        }
        pairs = PreferencePairs(corpus, list(shards), RewardSequences(tokenizer, told, seq_len), **more)
        return PreferenceStream(pairs, passes or dict.fromkeys(shards, 1.0), batch_tokens, seed)

    return make


def records(count, **more):
    return [{"prompt": f"q{i}", "chosen": f"a{i}" + " x" * (i % 5), "rejected": f"b{i}", **more} for i in range(count)]


def sequences(batch):
    return [part.tolist() for part in batch.ids.split(batch.cu_seqlens.diff().tolist())]


def spoken(tokenizer, question, answer, condition=None):
    turns = [Message("user", question), Message("assistant", answer)]
    if condition:
        turns.insert(0, Message("system", condition))
    return [*render(turns, tokenizer).ids, tokenizer.special_id("<|reward|>")]


def test_a_batch_holds_both_sides_behind_their_condition(build, tokenizer):
    stream = build({"s": records(1, domain="brief")}, conditions={"brief": "be brief", "other": "x"})
    (batch,) = stream.micro_batches(0, train(), 0, 1)
    found = sequences(batch)
    assert found[int(batch.chosen[0])] == spoken(tokenizer, "q0", "a0", "be brief")
    assert found[int(batch.rejected[0])] == spoken(tokenizer, "q0", "b0", "be brief")
    assert batch.loss_tokens == 1
    assert batch.cu_seqlens[-1] == len(batch.ids) == sum(map(len, found))
    swapped = stream.collate(stream.pairs.training, [0], "other")
    assert sequences(swapped)[int(swapped.chosen[0])] == spoken(tokenizer, "q0", "a0", "x")


def test_pairs_with_too_long_an_answer_are_left_out_where_asked(build, tokenizer):
    data = records(4)
    data[1]["chosen"], data[2]["rejected"] = "long " * 60, "long " * 60
    stream = build({"s": data}, drop_long=True)
    (counts,) = stream.pairs.counts
    assert (counts.pairs, counts.too_long, counts.cut_answers) == (2, 2, 0)
    (batch,) = stream.micro_batches(0, train(4), 0, 1)
    assert sorted(sequences(batch)) == sorted(
        spoken(tokenizer, f"q{i}", data[i][s]) for i in (0, 3) for s in ("chosen", "rejected")
    )
    assert build({"s": data}).fingerprint != stream.fingerprint


def test_equal_and_repeated_pairs_are_dropped_and_counted(build):
    data = records(3)
    data += [dict(data[0]), {"prompt": "q", "chosen": "same", "rejected": "same"}, {**data[1], "domain": "other"}]
    flipped = {"prompt": "q0", "chosen": data[0]["rejected"], "rejected": data[0]["chosen"]}
    stream = build({"s": [*data, flipped], "t": data[2:3]})
    first, second = stream.pairs.counts
    assert (first.equal, first.repeated, first.pairs) == (1, 1, 5)  # another domain and the other order are other pairs
    assert (second.equal, second.repeated, second.pairs) == (0, 1, 0)
    assert first.domains == "default, other"


def test_too_long_an_answer_keeps_its_end_and_the_reward_token(build, tokenizer):
    long = {"prompt": "q", "chosen": "z" * 500, "rejected": "y" * 500}
    same_beginning = {"prompt": "q", "chosen": "z" * 500, "rejected": "z" * 499}
    stream = build({"s": [long, same_beginning]}, conditions={"default": "be good"})
    assert stream.pairs.counts[0].cut_answers == 4
    assert (stream.pairs.counts[0].pairs, stream.pairs.counts[0].equal) == (1, 1)
    (batch,) = stream.micro_batches(0, train(), 0, 1)
    end, reward = tokenizer.special_id("<|im_end|>"), tokenizer.special_id("<|reward|>")
    tail = [end, *tokenizer.encode("\n"), reward]
    whole = spoken(tokenizer, "q", "z" * 500, "be good")
    for found in sequences(batch):
        assert len(found) == 64
        assert found[-len(tail) :] == tail
    assert sequences(batch)[int(batch.chosen[0])] == whole[: 64 - len(tail)] + tail


def test_answers_of_one_prompt_are_encoded_once(build):
    stream = build({"s": [{"prompt": "q", "ranked": ["a", "b", "c", "d"]}]}, batch_tokens=512)
    (batch,) = stream.micro_batches(0, train(4), 0, 1)
    assert len(batch.cu_seqlens) - 1 == 4
    assert batch.loss_tokens == 6
    assert set(zip(batch.chosen.tolist(), batch.rejected.tolist())) == {
        (i, j) for i in range(4) for j in range(i + 1, 4)
    }
    assert batch.gaps.tolist() == [float(j - i) for i, j in zip(batch.chosen.tolist(), batch.rejected.tolist())]
    # Too large for a batch: pair by pair.
    small = build({"s": [{"prompt": "q", "ranked": ["a " * 20, "b " * 20, "c " * 20]}]}, batch_tokens=128)
    assert [sum(b.loss_tokens for b in small.micro_batches(i, train(), 0, 1)) for i in range(small.steps(1))] == [
        1,
        1,
        1,
    ]


def pairs_of(stream, position, rank=0, world=1, micro_batch=1):
    return [pair for batch in stream.micro_batches(position, train(micro_batch), rank, world) for pair in batch.pairs]


def test_an_epoch_holds_every_pair_once_within_the_budget(build):
    stream = build({"s": records(40), "t": records(40, domain="x")})
    steps = stream.steps(1)
    batches = [stream.micro_batches(position, train(), 0, 1) for position in range(steps)]
    seen = [pair for parts in batches for batch in parts for pair in batch.pairs]
    assert sorted(seen) == list(range(80))
    sizes = [sum(len(batch.ids) for batch in parts) for parts in batches]
    assert max(sizes) <= 256
    assert max(sizes) - min(sizes) <= 64  # no remainder: a record has fewer tokens than that
    again = [pair for position in range(steps, steps + stream.steps(2) - steps) for pair in pairs_of(stream, position)]
    assert sorted(again) == sorted(seen)
    assert again != seen
    assert stream.steps(1.5) == steps + round((stream.steps(2) - steps) / 2)


def test_passes_repeat_a_source_or_take_a_part_of_it(build):
    stream = build({"s": records(30), "t": records(30, domain="x")}, passes={"s": 2.0, "t": 0.5})
    counts = [np.zeros(60, int) for _ in range(2)]
    first, both = stream.steps(1), stream.steps(2)
    for position in range(both):
        for pair in pairs_of(stream, position):
            counts[position >= first][pair] += 1
    assert (counts[0][:30] == 2).all()
    assert counts[0][30:].sum() == 15
    assert counts[0][30:].max() == 1
    assert (counts[0][30:] != counts[1][30:]).any()


@pytest.fixture(scope="module")
def streams(build):
    return [build({"s": records(25)}, seed=seed) for seed in range(4)]


@settings(deadline=None, max_examples=15)
@given(world=st.integers(1, 5), micro_batch=st.integers(1, 3), seed=st.integers(0, 3))
def test_ranks_and_micro_batches_share_the_same_pairs(streams, world, micro_batch, seed):
    stream = streams[seed]
    for position in range(stream.steps(1)):
        parts = [stream.micro_batches(position, train(micro_batch), rank, world) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1  # collectives meet
        shared = [pair for part in parts for batch in part for pair in batch.pairs]
        assert sorted(shared) == sorted(pairs_of(stream, position))
        for batch in (batch for part in parts for batch in part):
            assert len(batch.ids) <= 128 * micro_batch
            assert len(batch.ids) > 0


def test_a_position_means_the_same_pairs_in_every_process_and_another_seed_others(build):
    streams = [build({"s": records(30)}, seed=seed) for seed in (1, 1, 2)]
    third = [pairs_of(stream, 3) for stream in streams]
    assert third[0] == third[1] != third[2]
    assert streams[0].fingerprint == streams[1].fingerprint != streams[2].fingerprint


def test_changed_data_or_conditions_are_refused(build):
    before = build({"s": records(20)}, conditions={"default": "one"})
    state = before.state(4)
    assert before.check_fingerprint(state) == []
    for other in (
        build({"s": records(21)}, conditions={"default": "one"}),
        build({"s": records(20)}, conditions={"default": "two"}),
    ):
        with pytest.raises(ConfigError, match=r"data\.on_change=accept"):
            other.check_fingerprint(state)
        assert other.check_fingerprint(state, "accept")


def test_what_cannot_be_trained_on_is_refused(build, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="batch_tokens=100 must hold a pair"):
        build({"s": records(3)}, batch_tokens=100)
    with pytest.raises(ConfigError, match="no pair to train on"):
        build({"s": [{"prompt": "q", "chosen": "a", "rejected": "a"}]})
    with pytest.raises(ConfigError, match="leaves no room"):
        build({"s": records(3)}, conditions={"default": "word " * 50})
    (tmp_path / "text.jsonl").write_text('{"text": "no preference"}')
    shard = shard_of(
        open_source("text", SourceConfig(kind="jsonl", path=str(tmp_path / "text.jsonl"))),
        tokenizer, tmp_path / "cache", workers=1, progress=False,
    )  # fmt: skip
    corpus = Corpus({"text": shard}, tokenizer.fingerprint, 0.0, tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"data\.sources\.text holds no preferences: use kind=preferences"):
        PreferencePairs(corpus, ["text"], RewardSequences(tokenizer, {}, 64))
