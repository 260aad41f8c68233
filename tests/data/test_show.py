"""What `python -m internlm2.data.show` prints."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from internlm2.data import show
from internlm2.data.rows import IGNORE, Row
from internlm2.text.tokenizer import load_tokenizer
from internlm2.text.tokenizer_training import train_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("show")
    (folder / "tokenizer.model").write_bytes(train_model(["user assistant question answer 0123456789\n" * 40], 330))
    records = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(40)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "plain.txt").write_text("a plain document " * 20)
    return folder


def command(place, share, *more):
    """Overrides for a stage `sft` on the two files, in the places of two of the data set's own sources."""
    return [
        "stage=enhance", "stage.name=sft", "data=docstrings", "train.seq_len=128", "train.batch_tokens=128",
        f"root={place}", "data.tokenizer.kind=sentencepiece", f"data.tokenizer.path={place}/tokenizer.model",
        "data.sources.questions.kind=conversations", f"data.sources.questions.path={place}/chats.jsonl",
        "data.sources.topics.kind=text", f"data.sources.topics.path={place}/plain.txt",
        "data.sources.questions.part=null", "data.sources.topics.part=null", "data.validation_fraction=0",
        f"data.weights.sft.questions={share}", f"data.weights.sft.topics={1 - share}", "data.weights.sft.functions=0",
        *more,
    ]  # fmt: skip


def test_rows_and_statistics(place, capsys):
    assert show.main(command(place, 0.8, "rows=1")) == 0
    out = capsys.readouterr().out
    assert "row 0: " in out
    assert "row 1: " not in out
    assert "[questions] chats.jsonl:" in out
    assert "<s><|im_start|>user\nquestion " in out
    assert "statistics of 200 rows" in out
    assert "targets" in out


def test_pre_training_data_is_shown_too(place, capsys):
    assert show.main(command(place, 0, "rows=1")) == 0
    out = capsys.readouterr().out
    assert "[topics] plain.txt" in out
    assert "a plain document" in out


def test_targets_stand_out(place):
    tokenizer = load_tokenizer(place / "tokenizer.model")
    end = tokenizer.special_ids["<|im_end|>"]
    question, answer = tokenizer.encode("question"), tokenizer.encode("answer")
    ids = [tokenizer.bos_id, *question, *answer, end]
    trained = [False] * (1 + len(question)) + [True] * (len(answer) + 1)
    text = show.colored(ids, trained, tokenizer)
    assert text.plain == "<s>questionanswer<|im_end|>"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert show.TRAINED in styles["answer"]
    assert show.TRAINED in styles["<|im_end|>"]
    assert styles["question"] == show.PLAIN
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(text)
    assert "\x1b[1;32manswer" in console.file.getvalue()


def test_statistics_by_hand():
    labels = np.array([IGNORE, 5, 6, IGNORE, IGNORE, IGNORE, 7, IGNORE])
    row = Row(np.arange(8), labels, np.array([0, 4, 6, 8], np.int32), np.zeros(3, np.int32), np.arange(3))
    stats = show.statistics([row, row], 10)
    assert (stats.rows, stats.capacity, stats.tokens, stats.targets) == (2, 20, 16, 6)
    assert (stats.documents, stats.without_target) == (6, 2)
    assert stats.lengths.tolist() == [4, 2, 2, 4, 2, 2]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [(["rows=many"], "rows=many: must be a whole number"), (["data.pakcing=best_fit"], "Did you mean data.packing")],
)
def test_a_wrong_wish_is_one_sentence(place, capsys, more, complaint):
    assert show.main(command(place, 1, *more)) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
