"""Every record format: its messages, its labels against hand-written expectations, and what is said of a bad record."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from internlm2.config import ConfigError, SourceConfig
from internlm2.data.rows import IGNORE, build_row
from internlm2.data.shards import shard_of
from internlm2.sources.conversations import detect, messages_of
from internlm2.sources.documents import RecordError
from internlm2.sources.source import open_source
from internlm2.text.chat import Action, Message
from internlm2.text.tokenizer import load_tokenizer
from internlm2.text.tokenizer_training import train_model

CALL = '{"name": "add", "parameters": {"a": 1, "b": 2}}'
TOOL = {"name": "add", "parameters": {"type": "object"}}

# For each record: its format, and its conversation with what is trained in brackets, written by hand.
RECORDS = {
    "openai": (
        "openai",
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Hello<|im_end|>]\n",
    ),
    "a bare list": (
        "openai",
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Hello<|im_end|>]\n",
    ),
    "multi-turn with loss false and true": (
        "openai",
        {
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "a", "loss": True},
                {"role": "assistant", "content": "b", "loss": False},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"},
                {"role": "assistant", "content": "e", "weight": 0},
            ]
        },
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n[a<|im_end|>]\n"
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[d<|im_end|>]\n"
        "<|im_start|>assistant\ne<|im_end|>\n",
    ),
    "tool calls": (
        "openai",
        {
            "tools": [{"type": "function", "function": TOOL}],
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": [{"type": "text", "text": "1+2"}, {"type": "text", "text": "?"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}],
                },
                {"role": "tool", "content": "3"},
                {"role": "assistant", "content": "Three"},
            ],
        },
        f"<|im_start|>system\nS<|im_end|>\n<|im_start|>system name=<|plugin|>\n[{json.dumps(TOOL)}]<|im_end|>\n"
        "<|im_start|>user\n1+2?<|im_end|>\n"
        f"<|im_start|>assistant\n[<|action_start|><|plugin|>\n{CALL}<|action_end|><|im_end|>]\n"
        "<|im_start|>environment name=<|plugin|>\n3<|im_end|>\n<|im_start|>assistant\n[Three<|im_end|>]\n",
    ),
    "a call spelled in the content": (
        "openai",
        {
            "messages": [
                {"role": "user", "content": "1+2 <|action_end|>"},
                {"role": "assistant", "content": f"Look.<|action_start|><|plugin|>\n{CALL}<|action_end|>\n"},
                {"role": "environment", "name": "<|plugin|>", "content": ""},
                {"role": "assistant", "content": "<|im_end|>"},
            ]
        },
        # What spells a marker in content is text: it is shown here with the escape of render_text.
        "<|im_start|>user\n1+2 <\\|action_end|><|im_end|>\n"
        f"<|im_start|>assistant\n[Look.<|action_start|><|plugin|>\n{CALL}<|action_end|><|im_end|>]\n"
        "<|im_start|>environment name=<|plugin|>\n<|im_end|>\n<|im_start|>assistant\n[<\\|im_end|><|im_end|>]\n",
    ),
    "sharegpt": (
        "sharegpt",
        {
            "system": "S",
            "tools": json.dumps([TOOL]),
            "conversations": [
                {"from": "human", "value": "1+2"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "Three"},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "Yes", "loss": False},
            ],
        },
        f"<|im_start|>system\nS<|im_end|>\n<|im_start|>system name=<|plugin|>\n[{json.dumps(TOOL)}]<|im_end|>\n"
        "<|im_start|>user\n1+2<|im_end|>\n"
        f"<|im_start|>assistant\n[<|action_start|><|plugin|>\n{CALL}<|action_end|><|im_end|>]\n"
        "<|im_start|>environment name=<|plugin|>\n3<|im_end|>\n<|im_start|>assistant\n[Three<|im_end|>]\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n",
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": "S", "history": [["a", "b"]]},
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]\n"
        "<|im_start|>user\nAdd.\n1 2<|im_end|>\n<|im_start|>assistant\n[3<|im_end|>]\n",
    ),
    "alpaca without input": (
        "alpaca",
        {"instruction": "Add.", "input": "", "output": "3"},
        "<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n[3<|im_end|>]\n",
    ),
    "xtuner": (
        "xtuner",
        {
            "conversation": [
                {"system": "S", "input": "a", "output": "b", "output_with_loss": False},
                {"input": "c", "output": "d"},
            ]
        },
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[d<|im_end|>]\n",
    ),
    "one xtuner turn": (
        "xtuner",
        {"system": "S", "input": "a", "output": "b"},
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]\n",
    ),
    "a pair": (
        "pairs",
        {"question": "a", "answer": "b"},
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]\n",
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_model(["user assistant system environment name= Hello Three\n" * 40], 330))
    return load_tokenizer(path)


def open_files(path, format="auto"):
    return open_source("chats", SourceConfig(kind="conversations", path=str(path), format=format))


def bracketed(row, tokenizer) -> str:
    """A row as text with its targets in brackets; a spelled marker is escaped."""
    spelled = {token: name for name, token in tokenizer.special_ids.items()}
    parts = []
    targets = [False, *(label != IGNORE for label in row.labels[:-1].tolist())]
    for place, (token, target) in enumerate(zip(row.ids.tolist(), targets)):
        if target and not (place and targets[place - 1]):
            parts.append("[")
        parts.append(spelled.get(token, token))
        if target and not (place + 1 < len(targets) and targets[place + 1]):
            parts.append("]")
    text, run = "", []
    for part in [*parts, ""]:
        if isinstance(part, int):
            run.append(part)
            continue
        text += tokenizer.decode(run).replace("<|", "<\\|") + part
        run = []
    return text


@pytest.mark.parametrize("case", RECORDS)
def test_labels_of_every_format(case, tokenizer, tmp_path):
    format, record, expected = RECORDS[case]
    assert detect(record) == format
    assert messages_of(record, format) == messages_of(record)
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps(record) + "\n")
    shard = shard_of(open_files(file), tokenizer, tmp_path / "cache", progress=False)
    length = int(shard.lengths[0])
    row = build_row(shard, 0, [(0, 0, length)])
    assert row.ids[0] == tokenizer.bos_id
    assert row.labels[-1] == IGNORE
    assert (row.labels[:-1][row.labels[:-1] != IGNORE] == row.ids[1:][row.labels[:-1] != IGNORE]).all()
    assert bracketed(row, tokenizer) == expected


def test_negative_ids_of_internevo_carry_no_loss(tokenizer, tmp_path):
    file = tmp_path / "chats.bin"
    file.write_text(json.dumps({"tokens": [-1, -300, 301, 302, -303, 304]}) + "\n")
    source = open_source("tokens", SourceConfig(kind="internevo", path=str(file)))
    shard = shard_of(source, tokenizer, tmp_path / "cache", progress=False)
    row = build_row(shard, 0, [(0, 0, 6)])
    assert row.ids.tolist() == [1, 300, 301, 302, 303, 304]
    assert row.labels.tolist() == [IGNORE, 301, 302, IGNORE, 304, IGNORE]


def test_an_output_alone_is_a_plain_document(tokenizer, tmp_path):
    record = {"conversation": [{"system": "", "input": "", "output": "Once upon a time"}]}
    assert messages_of(record) == "Once upon a time"
    file = tmp_path / "texts.json"
    file.write_text(json.dumps([record]))
    shard = shard_of(open_files(file), tokenizer, tmp_path / "cache", progress=False)
    assert shard.mask is None
    assert tokenizer.decode(shard.document(0)) == "Once upon a time"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".parquet"])
def test_files_of_every_kind_hold_the_same(suffix, tokenizer, tmp_path):
    records = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}", "loss": n > 0}]}
        for n in range(3)
    ]
    records[0]["messages"].append({"role": "assistant", "content": "more", "loss": True})
    file = tmp_path / f"chats{suffix}"
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    elif suffix == ".json":
        file.write_text(json.dumps(records))
    elif suffix == ".jsonl.gz":
        file.write_bytes(gzip.compress(lines.encode()))
    else:
        file.write_text(lines)
    shard = shard_of(open_files(file), tokenizer, tmp_path / "cache", progress=False)
    texts = [bracketed(build_row(shard, 0, [(n, 0, int(shard.lengths[n]))]), tokenizer) for n in range(3)]
    assert texts[1] == "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n[a1<|im_end|>]\n"
    assert texts[0].endswith("<|im_start|>assistant\na0<|im_end|>\n<|im_start|>assistant\n[more<|im_end|>]\n")
    assert shard.origin(2) == f"chats{suffix}:3"


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
BAD = [
    ({"messages": [{"content": "a"}, ANSWER]}, "turn 1: no role"),
    ({"messages": [{"role": "wizard", "content": "a"}, ANSWER]}, "turn 1: unknown role 'wizard'"),
    ({"messages": [USER, {"role": "assistant", "content": 3}]}, "turn 2: content must be text, not a number"),
    ({"messages": [USER, {"role": "assistant"}]}, "turn 2: no content"),
    ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, r"turn 2 \(assistant\) is empty"),
    ({"messages": [{"role": "user", "content": ""}, ANSWER]}, r"turn 1 \(user\) is empty"),
    ({"messages": [USER]}, "without an assistant turn"),
    ({"messages": []}, "a conversation without turns"),
    ({"messages": "hello"}, "the turns must be a list, not text"),
    ({"messages": [USER, "hello"]}, "turn 2 must be an object, not text"),
    ({"messages": [USER, {**ANSWER, "loss": False}]}, "no turn carries loss"),
    ({"messages": [USER, {**ANSWER, "loss": "no"}]}, "turn 2: loss must be true or false, not 'no'"),
    ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "turn 2: weight must be 0 or 1"),
    ({"messages": [{**USER, "name": "two\nlines"}, ANSWER]}, "turn 1: a turn's name must be one line"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "a part of type image_url"),
    ({"messages": [USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "arguments of f"),
    ({"messages": [USER, {**ANSWER, "content": "\ud800"}]}, "lone surrogate"),
    ({"conversations": [{"from": "martian", "value": "a"}]}, "turn 1: unknown speaker 'martian'"),
    ({"conversations": [{"value": "a"}]}, "turn 1: no from"),
    ({"instruction": "a", "output": ""}, r"output \(assistant\) is empty"),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, "history 1 must hold a question and an answer"),
    ({"conversation": [{"input": "a"}]}, "turn 1: no output"),
    ({"conversation": [{"input": "a", "output": "b"}, {"input": "", "output": "c"}]}, r"turn 2 \(user\) is empty"),
    ({"text": "a"}, "the keys text belong to no known format"),
    ("hello", "must be an object or a list of turns, not text"),
]


@pytest.mark.parametrize(("record", "complaint"), BAD)
def test_bad_records_say_which_turn_and_why(record, complaint):
    with pytest.raises(RecordError, match=complaint):
        messages_of(record)


def test_bad_records_are_named_with_their_line_and_counted(tokenizer, tmp_path, caplog):
    good = json.dumps({"messages": [USER, ANSWER]})
    lines = [
        good,
        '{"messages": [',
        json.dumps({"messages": [USER]}),
        good,
        json.dumps({"messages": [{"content": "a"}]}),
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(lines) + "\n")
    shard = shard_of(open_files(file), tokenizer, tmp_path / "cache", progress=False)
    assert shard.documents == 2
    assert shard.meta["bad"] == 3
    warning = caplog.text
    assert "3 bad records" in warning
    assert "chats.jsonl:2 (broken JSON" in warning
    assert "chats.jsonl:3 (a conversation without an assistant turn)" in warning
    assert "chats.jsonl:5 (turn 1: no role)" in warning
    with pytest.raises(ConfigError, match=r"chats\.jsonl:2"):
        shard_of(open_files(file), tokenizer, tmp_path / "strict", progress=False, strict=True)


def test_a_forced_format_reads_nothing_else():
    record = {"instruction": "a", "output": "b", "messages": [USER, ANSWER]}
    assert detect(record) == "openai"
    assert messages_of(record, "alpaca") == (Message("user", "a"), Message("assistant", "b"))
    with pytest.raises(RecordError, match="no list of turns"):
        messages_of({"instruction": "a", "output": "b"}, "sharegpt")


def test_several_calls_stay_in_their_order():
    spelled = "".join(
        f"<|action_start|><|{tool}|>\n{n}<|action_end|>" for n, tool in enumerate(("plugin", "interpreter"))
    )
    record = [USER, {"role": "assistant", "content": "x" + spelled}]
    assert messages_of(record)[1] == Message(
        "assistant", "x", actions=(Action("plugin", "0"), Action("interpreter", "1"))
    )


def test_answers_to_one_question_are_held_out_together(tokenizer, tmp_path):
    file = tmp_path / "chats.jsonl"
    records = [{"prompt": f"question {n % 20}", "completion": f"answer {n}"} for n in range(200)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    shard = shard_of(open_files(file), tokenizer, tmp_path / "cache", progress=False)
    held = shard.held_out(0.3)
    assert 0 < held.sum() < 200
    assert (held.reshape(10, 20) == held[:20]).all()
    assert np.unique(held).size == 2
