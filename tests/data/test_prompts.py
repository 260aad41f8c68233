"""Prompts: what is read, what a position means, and what is held out."""

import json
from collections import Counter

import pytest

from internlm2.config import ConfigError
from internlm2.config.ppo import PromptsConfig, PromptSourceConfig
from internlm2.data.prompts import PromptStream, parse_prompt
from internlm2.sources.answers import final_number, same_number
from internlm2.sources.arithmetic import prompt_record
from internlm2.sources.documents import RecordError
from internlm2.text.chat import Message


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def config(tmp_path):
    questions = [{"prompt": f"question {i}", "domain": "helpful", "answer": i} for i in range(60)]
    dangers = [{"prompt": [{"role": "user", "content": f"danger {i}"}]} for i in range(20)]
    return PromptsConfig(
        name="test",
        sources={
            "talk": PromptSourceConfig("jsonl", 3.0, write(tmp_path / "talk.jsonl", questions)),
            "safety": PromptSourceConfig("jsonl", 1.0, write(tmp_path / "safety.jsonl", dangers), "harmless"),
        },
        validation_fraction=0.2,
    )


def test_weights_count_prompts_and_an_epoch_shows_each_once(config):
    stream = PromptStream(config, seed=5)
    taken = [stream[position] for position in range(400)]
    assert Counter(prompt.source for prompt in taken) == {"talk": 300, "safety": 100}
    assert {prompt.domain for prompt in taken if prompt.source == "safety"} == {"harmless"}
    size = stream.sources[0].size
    texts = [prompt.turns[0].content for prompt in taken if prompt.source == "talk"]
    first, second = texts[:size], texts[size : 2 * size]
    assert len(set(first)) == size
    assert set(first) == set(second)
    assert first != second  # an order of its own


def test_a_position_means_the_same_prompt_in_any_order_and_another_one_with_another_seed(config):
    stream, again = PromptStream(config, seed=5), PromptStream(config, seed=5)
    backwards = [stream[position] for position in reversed(range(50))][::-1]
    assert backwards == [again[position] for position in range(50)]
    assert backwards != [PromptStream(config, seed=6)[position] for position in range(50)]


def test_held_out_prompts_are_never_trained_on(config):
    stream = PromptStream(config, seed=5)
    held = {prompt.turns[0].content for prompt in stream.held_out(100)}
    trained = {stream[position].turns[0].content for position in range(400)}
    assert held
    assert not held & trained
    assert len(held | trained) == 80
    assert [p.source for p in stream.held_out(2)] == ["talk", "talk", "safety", "safety"]
    assert PromptStream(config, seed=9).held_out(3) == stream.held_out(3)  # the same whatever the seed


def test_what_a_judge_needs_is_kept_apart_from_the_turns(config):
    prompt = next(p for p in (PromptStream(config, 0)[i] for i in range(9)) if p.source == "talk")
    assert prompt.reference == {"answer": int(prompt.turns[0].content.split()[1])}
    assert prompt.turns == (Message("user", prompt.turns[0].content),)
    assert parse_prompt(prompt.record(), "other").reference == prompt.reference


def test_other_prompts_are_noticed(config, tmp_path):
    before = PromptStream(config, 0).fingerprint
    PromptStream(config, 0).check_fingerprint(before)
    with open(tmp_path / "talk.jsonl", "a", encoding="utf-8") as file:
        file.write('{"prompt": "one more"}\n')
    with pytest.raises(ConfigError, match="prompts changed"):
        PromptStream(config, 0).check_fingerprint(before)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ([], "JSON object"),
        ({"text": "x"}, "no key prompt"),
        ({"prompt": "  "}, "empty"),
        ({"prompt": "x", "domain": 3}, "domain"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "to be answered"),
        ({"prompt": []}, "to be answered"),
        ({"prompt": [{"role": "nobody", "content": "x"}]}, "nobody"),
    ],
)
def test_bad_records(record, words):
    with pytest.raises((RecordError, ValueError), match=words):
        parse_prompt(record, "helpful")


def test_a_bad_line_is_named(tmp_path, config):
    (tmp_path / "talk.jsonl").write_text('{"prompt": "a"}\n{broken\n')
    with pytest.raises(ConfigError, match=r"talk\.jsonl:2 is not JSON"):
        PromptStream(config, 0)
    (tmp_path / "talk.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": ""}\n')
    with pytest.raises(ConfigError, match=r"talk\.jsonl:3: its prompt is empty"):
        PromptStream(config, 0)


@pytest.mark.parametrize("kind", ["arithmetic", "toy"])
def test_kinds_without_a_file(kind):
    config = PromptsConfig("made", {"it": PromptSourceConfig(kind, count=50)}, 0.1)
    stream = PromptStream(config, 1)
    texts = {stream[position].turns[-1].content for position in range(50)}
    assert len(texts) > 20
    assert stream[50] in [stream[position] for position in range(50)]  # the second epoch
    assert len(stream.held_out(5)) == 5


def test_arithmetic_answers_are_right():
    for index in range(200):
        record = prompt_record(3, "train", index)
        question = record["prompt"].removesuffix(" Answer with the number alone.")
        if "has" in question:
            numbers = [int(word) for word in question.split() if word.isdigit()]
            wanted = sum(numbers)
        else:
            expression = next(question[question.index(c) :] for c in question if c.isdigit()).rstrip(" ?.")
            left, sign, right = expression.split()[:3]
            wanted = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign]
        assert same_number(record["answer"], str(wanted)), record
        assert final_number(f"The answer is {record['answer']}.") == record["answer"]


def test_gsm8k_reads_as_prompts(shared_data):
    path = str(shared_data / "gsm8k" / "train.jsonl")
    config = PromptsConfig("gsm8k", {"gsm8k": PromptSourceConfig("jsonl", 1.0, path, "math")}, 0.02)
    stream = PromptStream(config, 1)
    assert stream.sources[0].size + stream.sources[0].held_out == 7473
    assert final_number(stream[17].reference["answer"]) is not None
