"""GSM8K's rules on honest and on hostile answers, and the suite from file to accuracy."""

import json

import pytest

from internlm2.config import ConfigError
from internlm2.config.compose import compose_evaluation
from internlm2.evaluate import answers
from internlm2.evaluate.answers import is_right
from internlm2.evaluate.writing import Written


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("She sells 9 eggs a day.\n#### 18", True),
        ("so it is $18.00 a day", True),
        ("#### 18\nand then 19 more", True),
        ("The answer is 18.", True),
        ("1,8", False),
        ("18 and no, 19", False),
        ("", False),
        ("#### ", False),
        ("eighteen", False),
        ("#### 18" + "0" * 4000, False),
        ("9" * 100_000, False),
        ("١٨", True),
        ("-18", False),
        ("1" + ",0" * 50_000, False),
        ("\\boxed{" * 2000 + "18", True),
        ("18/0", False),
        ("$" * 10_000, False),
    ],
)
def test_extraction_with_hostile_answers(text, right):
    assert is_right(text, "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs. 9 * 2 = 18\n#### 18", "number") is right


def test_text_answers_compare_the_first_line():
    assert is_right(" Paris \nand more", "Paris", "text")
    assert not is_right("paris", "Paris", "text")


def test_the_suite_counts_what_the_model_writes(subject, tmp_path, monkeypatch):
    lines = [{"question": f"How much is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(6)]
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    prompts = []

    def write(engine, tokenizer, ids, params, stops):
        prompts.extend(tokenizer.decode(prompt) for prompt in ids)
        assert params.greedy
        assert stops == ["Question:", "\n\n\n"]
        return [Written(i, 0, f"#### {i + 1 if i % 2 else 0}", 5, "stop") for i in range(len(ids))]

    monkeypatch.setattr(answers, "write", write)
    config = compose_evaluation(
        ["suite=gsm8k", f"suite.path={path}", f"suite.shots_path={path}", "suite.shots=2", "suite.limit=4"]
    )
    (result,) = answers.run(subject, config.suite, 1)
    assert result.headline[0].value == 0.5
    assert result.rows[0]["problems"] == 4
    assert "2 examples as plain text, greedy" in result.note
    assert [record["extracted"] for record in result.records] == ["0", "2", "0", "4"]
    assert prompts[3] == (
        "Question: How much is 0 + 1?\nAnswer: It is 1.\n#### 1\n\n"
        "Question: How much is 1 + 1?\nAnswer: It is 2.\n#### 2\n\nQuestion: How much is 3 + 1?\nAnswer:"
    )


def test_a_chat_takes_the_examples_as_turns(subject, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"question": "2 + 2?", "answer": "4"}\n')
    config = compose_evaluation(
        ["suite=gsm8k", f"suite.path={path}", f"suite.shots_path={path}", "suite.shots=1", "suite.chat=true",
         "suite.max_new_tokens=4"]
    )  # fmt: skip
    item = {"question": "2 + 2?", "answer": "4"}
    text = subject.tokenizer.decode(answers.prompt_ids(subject, item, [item], config.suite))
    assert text == (
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    (result,) = answers.run(subject, config.suite, 1)
    assert result.rows[0]["problems"] == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", r"bad.jsonl:1 is no JSON"),
        ("[1]", r"bad.jsonl:1 is no JSON object"),
        ('{"question": "x"}', r"bad.jsonl:1 has no 'answer'"),
        ("", "holds no line"),
    ],
)
def test_a_bad_file_is_named(subject, tmp_path, line, words):
    path = tmp_path / "bad.jsonl"
    path.write_text(line)
    config = compose_evaluation(["suite=gsm8k", f"suite.path={path}", "suite.shots=0"])
    with pytest.raises(ConfigError, match=words):
        answers.run(subject, config.suite, 1)
    with pytest.raises(ConfigError, match=r"suite.path is missing"):
        answers.run(subject, compose_evaluation(["suite=gsm8k", "suite.shots=0"]).suite, 1)
