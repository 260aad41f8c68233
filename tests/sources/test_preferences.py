"""Preference records of every format -> prompt and answers with scores; what cannot be used is named."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from internlm2.config import ConfigError, SourceConfig
from internlm2.data.shards import shard_of
from internlm2.sources.documents import BadRecord, RecordError
from internlm2.sources.preferences import PreferenceReader
from internlm2.sources.source import open_source
from internlm2.text.chat import Message, render

ASKED = (Message("user", "2 + 2?"),)


def read(record, domain="default"):
    """(prompt, [(text of the last turn, score)], domain)."""
    found = PreferenceReader(domain).document("f.jsonl", 3, record)
    return found.messages, [(answer.turns[-1].content, answer.score) for answer in found.answers], found.domain


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"question": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": turns("2 + 2?"), "chosen": turns("x", "4")[1:], "rejected": {"role": "assistant", "content": "5"}},
        {"prompt": "2 + 2?", "chosen": turns("2 + 2?", "4"), "rejected": turns("2 + 2?", "5")},
        {"chosen": turns("2 + 2?", "4"), "rejected": turns("2 + 2?", "5")},
        {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"},
        {
            "conversations": [{"from": "human", "value": "2 + 2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
    ],
)
def test_pairs(record):
    assert read(record) == (ASKED, [("4", 1.0), ("5", 0.0)], "default")
    assert read({**record, "domain": "math", "margin": 2.5}) == (ASKED, [("4", 2.5), ("5", 0.0)], "math")
    assert read(record, "helpful")[2] == "helpful"


def test_several_on_a_side_and_longer_dialogs():
    _, answers, _ = read({"prompt": "2 + 2?", "chosen": ["4", "four"], "rejected": ["5"]})
    assert answers == [("4", 1.0), ("four", 1.0), ("5", 0.0)]
    prompt, answers, _ = read({"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "b", "c", "e")})
    assert [turn.content for turn in prompt] == ["a", "b", "c"]
    assert answers == [("d", 1.0), ("e", 0.0)]
    # They part at an assistant's turn in the middle: the rest of each dialog is its answer.
    found = PreferenceReader("d").document("f", 1, {"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "x")})
    assert [len(answer.turns) for answer in found.answers] == [3, 1]


@pytest.mark.parametrize(
    ("record", "scores"),
    [
        ({"ranked": ["4", "5", "6"]}, [0.0, -1.0, -2.0]),
        ({"answers": ["4", "5", "6"], "ranks": [1, 3, 3]}, [-1.0, -3.0, -3.0]),
        ({"answers": ["4", "5", "6"], "ratings": [9, 2.5, 1]}, [9.0, 2.5, 1.0]),
        ({"answers": [{"text": t, "rating": r} for t, r in (("4", 3), ("5", 1), ("6", 1))]}, [3.0, 1.0, 1.0]),
        ({n: {"solution": n, "is_correct": n == "4"} for n in ("4", "5", "6")}, [1.0, 0.0, 0.0]),
    ],
)
def test_rankings_ratings_and_grades(record, scores):
    assert read({"prompt": "2 + 2?", **record}) == (ASKED, list(zip(["4", "5", "6"], scores)), "default")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "must be an object"),
        ({"prompt": "a", "chosen": "b"}, "no answers"),
        ({"chosen": "b", "rejected": "c"}, "no prompt"),
        ({"prompt": " ", "chosen": "b", "rejected": "c"}, "prompt is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "  "}, "rejected is empty"),
        ({"prompt": "a", "chosen": [], "rejected": "b"}, "turns"),
        ({"prompt": "a", "chosen": "b", "rejected": 7}, "rejected|turns"),
        ({"prompt": "a", "chosen": "b", "rejected": turns("a")}, "must end with a turn of the assistant"),
        ({"prompt": turns("a", "b"), "chosen": "b", "rejected": "c"}, "not with the assistant"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0}, "margin must be above 0"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "domain": 3}, "domain must be a name"),
        ({"prompt": "a", "answers": ["b", "c"], "ratings": [1, 1]}, "no answer is better"),
        ({"prompt": "a", "answers": ["b", "c"], "ratings": [1]}, "a list of 2 numbers"),
        ({"prompt": "a", "answers": ["b", "c"], "ratings": [1, "x"]}, "'x' is no number"),
        ({"prompt": "a", "ranked": ["b"]}, "at least two answers"),
        ({"prompt": "a", "chosen": "b", "rejected": "\ud800"}, "surrogate"),
    ],
)
def test_what_cannot_be_used_is_named(record, reason):
    with pytest.raises(RecordError, match=reason):
        PreferenceReader("default").document("f.jsonl", 1, record)


def test_files_become_shards_of_answers_and_bad_lines_are_named(tmp_path, tokenizer, caplog):
    records = [
        {"prompt": "q1", "chosen": "good", "rejected": "bad", "domain": "helpful"},
        {"prompt": "q2", "ranked": ["a", "b", "c"]},
    ]
    lines = [json.dumps(record) for record in records]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "p.jsonl").write_text("\n".join([lines[0], "{broken", lines[1]]) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records[:1]), folder / "p.parquet")
    config = SourceConfig(kind="preferences", path=str(folder), domain="code")
    shard = shard_of(open_source("mine", config), tokenizer, tmp_path / "cache", workers=1, progress=False)
    assert "p.jsonl:2 (broken JSON" in caplog.text
    assert shard.documents == 7
    assert [shard.domains[i] for i in shard.domain_index] == ["helpful"] * 2 + ["code"] * 3 + ["helpful"] * 2
    assert shard.records.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert shard.scores.tolist() == [1, 0, 0, -1, -2, 1, 0]
    assert [shard.origin(i) for i in (0, 2, 6)] == ["p.jsonl:1", "p.jsonl:3", "p.parquet:1"]
    expected = render((Message("user", "q2"), Message("assistant", "b")), tokenizer).ids
    assert shard.document(3).tolist() == expected
    sides = shard.held_out(0.5)
    assert sides[0] == sides[1] == sides[5] == sides[6]  # what was asked decides
    assert sides[2] == sides[3] == sides[4]
    with pytest.raises(ConfigError, match=r"p\.jsonl:2"):
        shard_of(open_source("mine", config), tokenizer, tmp_path / "other", workers=1, strict=True, progress=False)


def test_the_content_of_a_shard_depends_on_scores_and_domains(tmp_path, tokenizer):
    contents = set()
    for number, change in enumerate([{}, {"margin": 2.0}, {"domain": "x"}]):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"} | change))
        source = open_source("s", SourceConfig(kind="preferences", path=str(tmp_path / f"{number}.jsonl")))
        contents.add(shard_of(source, tokenizer, tmp_path / "cache", workers=1, progress=False).content)
    assert len(contents) == 3


def test_docstring_preferences():
    source = open_source("d", SourceConfig(kind="stdlib", part="docstring_preferences"))
    found = {d.messages[0].content: d for unit in source.units() for d in unit.documents()}
    assert len(found) > 3000
    questions = open_source("q", SourceConfig(kind="stdlib", part="questions"))
    asked = {d.messages[0].content: d for unit in questions.units() for d in unit.documents()}
    docstrings = {}
    for document in asked.values():
        docstrings.setdefault(document.file, set()).add(document.messages[1].content)
    for question, document in list(found.items())[::50]:
        right, beginning, *sibling = document.answers
        assert right.turns == (asked[question].messages[1],)
        assert right.turns[0].content.startswith(beginning.turns[0].content)
        assert len(beginning.turns[0].content) < len(right.turns[0].content)
        assert [answer.score for answer in document.answers] == [1.0, 0.0, 0.0][: len(document.answers)]
        assert document.split_key == asked[question].split_key  # held out with its module
        for other in sibling:
            assert other.turns[0].content != right.turns[0].content
            assert other.turns[0].content in docstrings[document.file]


def test_answers_of_champ_are_judged_by_their_last_number(tmp_path, monkeypatch):
    def said(text):
        return {"messages": [{"role": "User", "text": "?"}, {"role": "Model.X", "text": text}]}

    problem = {"identifier": "P", "_text": "1+1?", "_answer": "2", "conversations": {
        "a": said("so 2"), "b": said("it is 3"), "c": said("1 and 2.0"), "d": said("none"), "e": said("3, I say"),
    }}  # fmt: skip
    text_problem = {**problem, "identifier": "Q", "_answer": "x + 1"}
    (tmp_path / "champ_dataset-9.dist-info").mkdir()
    (tmp_path / "champ_dataset-9.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: champ-dataset\nVersion: 9\n"
    )
    (tmp_path / "champ_dataset/dataset_files").mkdir(parents=True)
    content = json.dumps({"problems": {"P": problem, "Q": text_problem}})
    (tmp_path / "champ_dataset/dataset_files/v0.json").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    source = open_source("m", SourceConfig(kind="package", part="champ_answers"))
    documents = [d for unit in source.units() for d in unit.documents()]
    assert not any(isinstance(document, BadRecord) for document in documents)
    assert [[a.turns[0].content for a in d.answers] for d in documents] == [
        ["so 2", "it is 3"],
        ["1 and 2.0", "3, I say"],
    ]
    assert {document.domain for document in documents} == {"math"}
