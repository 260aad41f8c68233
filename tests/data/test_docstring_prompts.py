"""Prompts about the running Python: functions of seed, split and index, held out by module."""

from internlm2.data.docstring_prompts import prompt_record


def records(seed: int, split: str, count: int = 200) -> list[dict]:
    return [prompt_record(seed, split, index) for index in range(count)]


def test_an_order_of_the_seed_without_repetition():
    assert records(0, "train") == records(0, "train")
    assert records(0, "train") != records(1, "train")
    assert len({record["prompt"] for record in records(0, "train")}) > 190  # some overloads share a question


def test_held_out_questions_are_never_trained_on():
    training = {record["prompt"] for record in records(0, "train", 4000)}
    assert training.isdisjoint(record["prompt"] for record in records(0, "validation", 250))


def test_the_answer_is_the_docstring():
    found = {record["prompt"]: record for record in records(0, "train", 4600)}
    record = found["What does the Python function `platform.python_compiler` do?"]
    assert record["answer"].startswith("Returns a string identifying the compiler used for compiling")
    assert record["domain"] == "code"
