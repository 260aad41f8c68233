"""The final answer of a solution, against GSM8K's own reference answers and by hand."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm2.sources.answers import boxed, final_number, numbers, same_number


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
        ("#### 1,234.50 dollars, not 7", "1,234.50"),
        (r"so \boxed{42} apples, out of 100", "42"),
        (r"\boxed{x^{2} + 3}", "3"),
        ("The answer is 12. There were 5 of them.", "12"),
        ("Answer: -3", "-3"),
        ("16-3", "3"),
        ("5 + 7 = 12", "12"),
        ("it is 3/4 of a cake", "3/4"),
        ("nothing here", None),
        ("#### none, but 5 before? no", "5"),
        ("12 #### no number", None),
        ("", None),
    ],
)
def test_final_number(text, wanted):
    assert final_number(text) == wanted


def test_boxed_needs_its_closing_brace():
    assert boxed(r"\boxed{1 + \frac{1}{2}}") == r"1 + \frac{1}{2}"
    assert boxed(r"\boxed{12") is None


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("1,234.0", "1234", True),
        ("0.50", ".5", True),
        ("3/4", "0.75", True),
        ("18", "-18", False),
        (None, None, False),
        ("1/0", "1/0", False),
        ("seven", "seven", False),
    ],
)
def test_same_number(left, right, same):
    assert same_number(left, right) is same


@given(st.integers(-(10**12), 10**12))
def test_any_integer_is_found_however_it_is_written(value):
    for written in (str(value), f"{value:,}", f"{value}.00"):
        assert same_number(final_number(f"We get 3 and 4.\n#### {written}"), str(value))
        assert same_number(numbers(f"the sum is {written} now")[-1], str(value))


def test_every_reference_of_gsm8k_has_its_answer(shared_data):
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1319
    for line in lines:
        answer = json.loads(line)["answer"]
        found = final_number(answer)
        assert found is not None
        assert same_number(found, answer.rsplit("#### ", 1)[1])


def test_published_verdicts_on_model_solutions(shared_data):
    # OpenAI's released solutions carry a verdict; they end in "A: n".
    lines = (shared_data / "gsm8k" / "example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines()
    agreed = total = 0
    for line in map(json.loads, lines):
        target = line["ground_truth"].rsplit("A: ", 1)[1]
        for key in ("6b_finetuning", "175b_verification"):
            total += 1
            agreed += same_number(final_number(line[key]["solution"]), target) == line[key]["is_correct"]
    assert agreed / total > 0.995
