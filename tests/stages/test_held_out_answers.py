"""Held-out questions are found in the shard's mask, and the form of their answers is counted."""

import json

import pytest

from internlm2.config import GenerationConfig
from internlm2.data.corpus import Corpus
from internlm2.data.encoding import encode_units
from internlm2.data.shards import Shard, write_shard
from internlm2.generation.engine import Completion
from internlm2.run.directory import RunDirectory
from internlm2.sources.documents import Document, MemoryUnit
from internlm2.stages import held_out_answers
from internlm2.stages.held_out_answers import TABLE, HeldOutAnswers, held_out_questions
from internlm2.text.chat import Message, render


@pytest.fixture(scope="module")
def corpus(tokenizer, tmp_path_factory) -> Corpus:
    """Ten conversations, all held out, of which one has a long answer and one a second turn; and plain text."""
    talk = [
        (f"what does the fox {i} do?", "jumps over the dog" + (" and more" * 40 if i == 4 else "")) for i in range(10)
    ]
    items = []
    for line, (question, answer) in enumerate(talk, start=1):
        turns = [Message("user", question), Message("assistant", answer)]
        turns += [Message("user", "why?"), Message("assistant", "it is quick")] if line == 3 else []
        items.append(Document("talk.jsonl", line, messages=tuple(turns)))
    texts = [Document("text.jsonl", 1, tokens=[1, 5, 6, 7, 2])]
    folder, shards = tmp_path_factory.mktemp("corpus"), {}
    for name, documents in (("talk", items), ("text", texts)):
        (folder / name).mkdir()
        write_shard(folder / name, name, encode_units([MemoryUnit(documents, 1)], tokenizer, 1), tokenizer)
        shards[name] = Shard(name, folder / name)
    return Corpus(shards, tokenizer.fingerprint, 1.0, folder)


def test_questions_end_where_the_assistant_begins(corpus, tokenizer):
    found = held_out_questions(corpus, ["talk", "text"], 20, 32)
    assert len(found) == 9  # without the long answer, and nothing of plain text
    assert len(held_out_questions(corpus, ["talk"], 4, 32)) == 4
    answer = [*tokenizer.encode("jumps over the dog"), tokenizer.special_id("<|im_end|>")]
    prompts = [
        render([Message("user", f"what does the fox {i} do?")], tokenizer, generation_prompt=True).ids
        for i in range(10)
        if i != 4
    ]
    assert sorted(question.prompt for question in found) == sorted(prompts)
    assert all(question.reference == answer for question in found)


def test_the_form_of_the_answers_is_counted(corpus, tokenizer, tmp_path, monkeypatch):
    questions = held_out_questions(corpus, ["talk"], 4, 32)
    end = tokenizer.special_id("<|im_end|>")
    texts = ["jumps not", "jumps", "the fox jumps", "jumps and on and on"]
    given = [
        Completion(i, 0, tokenizer.encode(text) + ([end] if i < 3 else []), finish="stop" if i < 3 else "length")
        for i, text in enumerate(texts)
    ]
    monkeypatch.setattr(held_out_answers, "complete", lambda *_: given)
    run = RunDirectory(tmp_path)
    measure = HeldOutAnswers(questions, tokenizer, 32).measure
    generation = GenerationConfig(quantize="none", max_rows=4, kv_tokens=1024)
    for step in (0, 8, 8):  # a resumed run may measure a step twice
        measure(None, generation, step, run)
    rows = json.loads((tmp_path / TABLE).read_text())["rows"]
    assert [row["step"] for row in rows] == [0, 8]
    assert rows[0]["ended"] == "3 of 4"
    assert rows[0]["begin as the reference"] == "3 of 4"
    assert rows[0]["tokens"] == pytest.approx(sum(len(text.tokens) for text in given) / 4, abs=0.06)
    assert rows[0]["tokens of the reference"] == len(questions[0].reference)
