"""Written solutions whose final answer counts, with GSM8K's rules: the last number of the answer, before the model goes
on to a next question.
"""

from typing import Any

from internlm2.config import ConfigError
from internlm2.config.evaluate import AnswersSuite
from internlm2.evaluate.intervals import bootstrap
from internlm2.evaluate.item_files import fill, read_items
from internlm2.evaluate.results import Headline, Result
from internlm2.evaluate.subject import Subject
from internlm2.evaluate.writing import Written, write
from internlm2.generation import SamplingParams
from internlm2.sources.answers import final_number, same_number
from internlm2.text.chat import Message, render


def run(subject: Subject, suite: AnswersSuite, seed: int) -> list[Result]:
    """Accuracy over a file of problems, greedily."""
    keys = (suite.question, suite.answer)
    items = read_items("suite.path", suite.path, keys, suite.limit)
    shots = read_items("suite.shots_path", suite.shots_path, keys, suite.shots) if suite.shots else []
    if len(shots) < suite.shots:
        raise ConfigError(f"suite.shots={suite.shots}, but {suite.shots_path} holds {len(shots)} lines.")
    prompts = [prompt_ids(subject, item, shots, suite) for item in items]
    params = SamplingParams(temperature=0.0, max_new_tokens=suite.max_new_tokens, stop_ids=subject.stop_ids)
    written = write(subject.engine, subject.tokenizer, prompts, params, () if suite.chat else suite.stop)
    right = [
        float(is_right(text.text, str(item[suite.answer]), suite.extract))
        for item, text in zip(items, written, strict=True)
    ]
    accuracy = sum(right) / len(right)
    return [
        Result(
            name=suite.name,
            title=f"{suite.name}: answers that are right",
            rows=[
                {
                    "problems": len(items),
                    "right": int(sum(right)),
                    "accuracy": accuracy,
                    "tokens an answer": sum(text.tokens for text in written) / len(written),
                    "cut at the length": sum(text.finish == "length" for text in written),
                }
            ],
            headline=[Headline(f"{suite.name} accuracy", accuracy, bootstrap(right, seed))],
            note=protocol(suite),
            records=[
                _record(item, text, value, suite) for item, text, value in zip(items, written, right, strict=True)
            ],
        )
    ]


def prompt_ids(subject: Subject, item: dict[str, Any], shots: list[dict[str, Any]], suite: AnswersSuite) -> list[int]:
    """Examples and the question, as plain text or as turns of a chat."""
    tokenizer = subject.tokenizer
    if suite.chat:
        turns = []
        for shot in shots:
            turns += [Message("user", str(shot[suite.question])), Message("assistant", str(shot[suite.answer]))]
        ids = render([*turns, Message("user", str(item[suite.question]))], tokenizer, generation_prompt=True).ids
        return ids[1:] if not subject.first_ids() else ids
    parts = [_filled(suite, shot[suite.question], shot[suite.answer]) for shot in shots]
    parts.append(_filled(suite, item[suite.question], "").rstrip())
    return [*subject.first_ids(), *tokenizer.encode("\n\n".join(parts))]


def is_right(text: str, reference: str, extract: str) -> bool:
    """Does the answer end where the reference does?"""
    if extract == "text":
        return text.strip().split("\n")[0].strip() == reference.strip()
    return same_number(final_number(text), final_number(reference))


def protocol(suite: AnswersSuite) -> str:
    """How the figure was made, in one sentence."""
    form = "as a chat" if suite.chat else "as plain text"
    rule = "the last number of the answer counts" if suite.extract == "number" else "the first line counts"
    return f"{suite.shots} examples {form}, greedy, at most {suite.max_new_tokens} new tokens; {rule}."


def _filled(suite: AnswersSuite, question: object, answer: object) -> str:
    return fill(suite.template, {"question": question, "answer": answer}, "suite.template")


def _record(item: dict[str, Any], text: Written, right: float, suite: AnswersSuite) -> dict[str, Any]:
    return {
        "question": item[suite.question],
        "reference": item[suite.answer],
        "written": text.text,
        "extracted": final_number(text.text) if suite.extract == "number" else text.text.strip().split("\n")[0],
        "right": bool(right),
        "finish": text.finish,
    }
