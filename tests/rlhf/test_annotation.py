"""Comparisons of answers and who labels them: a function, people's files, a stronger model, an endpoint."""

import json
import threading
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from internlm2.config import ConfigError
from internlm2.rlhf.annotation import (
    EndpointAnnotator,
    FileAnnotator,
    FunctionAnnotator,
    ScoreAnnotator,
    compare,
)
from internlm2.rlhf.answers import Answer, read_lines, write_lines
from internlm2.sources import toy_language as toy


def answers(count: int = 40) -> list[Answer]:
    found = []
    for index in range(count):
        turns, domain = toy.prompt(0, "validation", index)
        for policy in ("sft", "early", "late"):
            text = toy.answer(turns[-1].content, 0, policy, index)
            found.append(Answer(turns, domain, text, len(text.split()), True, policy))
    return found


def test_comparisons_are_of_one_prompt_and_different_texts():
    comparisons = compare(answers(), 60, 0, "round-1")
    assert len(comparisons) == 60
    assert len({comparison.id for comparison in comparisons}) == 60
    for comparison in comparisons:
        assert comparison.first.prompt == comparison.second.prompt == comparison.prompt
        assert comparison.first.text != comparison.second.text
    prompts = Counter((c.prompt, c.domain) for c in comparisons)
    assert len(prompts) == len({(answer.prompt, answer.domain) for answer in answers()})  # each once before any twice
    assert max(prompts.values()) == 2
    assert comparisons == compare(answers(), 60, 0, "round-1")
    assert comparisons != compare(answers(), 60, 1, "round-1")


def test_an_empty_answer_is_not_compared():
    some = [answer if place % 3 else replace(answer, text=" ") for place, answer in enumerate(answers(20))]
    comparisons = compare(some, 100, 0, "r")
    assert comparisons
    assert all(side.text.strip() for comparison in comparisons for side in (comparison.first, comparison.second))


def test_the_order_tells_nothing_about_the_policy():
    comparisons = compare(answers(300), 900, 0, "r")
    late_first = sum(c.first.policy == "late" for c in comparisons if "late" in (c.first.policy, c.second.policy))
    late = sum("late" in (c.first.policy, c.second.policy) for c in comparisons)
    assert 0.4 < late_first / late < 0.6
    assert not {"policy", "score", "audit"} & comparisons[0].request().keys()


def gold(answer: Answer) -> float:
    return toy.gold(answer.prompt, answer.text, answer.domain)


def test_a_function_without_noise_prefers_the_better_one():
    comparisons = compare(answers(), 100, 0, "r")
    for comparison, label in zip(comparisons, FunctionAnnotator(gold, 0.0, 0)(comparisons)):
        difference = gold(comparison.first) - gold(comparison.second)
        assert label == ("tie" if difference == 0 else "first" if difference > 0 else "second")
        record = comparison.preference(label)
        if record is not None:
            assert toy.gold(comparison.prompt, record["chosen"], record["domain"]) > toy.gold(
                comparison.prompt, record["rejected"], record["domain"]
            )


def test_a_function_with_noise_agrees_as_often_as_bradley_terry_says():
    comparisons = compare(answers(400), 1000, 0, "r")
    labels = FunctionAnnotator(gold, 0.5, 0)(comparisons)
    expected = sum(toy.preference(c.prompt, c.first.text, c.second.text, c.domain, 0.5) for c in comparisons)
    assert sum(label == "first" for label in labels) == pytest.approx(expected, abs=3 * 1000**0.5 / 2)
    assert labels == FunctionAnnotator(gold, 0.5, 0)(comparisons)


def test_files_wait_for_people(tmp_path):
    comparisons = compare(answers(), 10, 0, "round-1")
    annotator = FileAnnotator(tmp_path)
    assert annotator(comparisons) == [None] * 10
    requests = read_lines(tmp_path / "requests.jsonl")
    assert [request["id"] for request in requests] == [comparison.id for comparison in comparisons]
    assert requests[0].keys() == {"id", "prompt", "domain", "first", "second"}
    write_lines(tmp_path / "labels.jsonl", [{"id": comparisons[3].id, "better": "second"}])
    assert annotator(comparisons) == [None, None, None, "second", *[None] * 6]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"id": "elsewhere-1", "better": "first"}, "never asked"),
        ({"id": "r-00000", "better": "left"}, "write first, second or tie"),
    ],
)
def test_labels_that_cannot_be_right(tmp_path, label, message):
    write_lines(tmp_path / "labels.jsonl", [label])
    with pytest.raises(ValueError, match=message):
        FileAnnotator(tmp_path)(compare(answers(), 4, 0, "r"))


def test_a_stronger_model():
    comparisons = compare(answers(), 20, 0, "r")
    labels = ScoreAnnotator(lambda some: [gold(answer) for answer in some])(comparisons)
    assert labels == FunctionAnnotator(gold, 0.0, 0)(comparisons)


@pytest.fixture
def endpoint():
    """An OpenAI-compatible server that prefers the longer answer, and says so at length."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            text = body["messages"][0]["content"]
            first, second = text.split("First answer:\n")[1].split("\n\nSecond answer:\n")
            word = (
                "First." if len(first) > len(second) else "I prefer the second one" if len(first) < len(second) else "?"
            )
            reply = json.dumps({"choices": [{"message": {"content": word}}]}).encode()
            self.send_response(200 if self.path == "/v1/chat/completions" else 404)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", seen
    server.shutdown()
    server.server_close()


def test_an_endpoint(endpoint):
    url, seen = endpoint
    comparisons = compare(answers(), 12, 0, "r")
    labels = EndpointAnnotator(url, "judge", toy.CONDITIONS)(comparisons)
    for comparison, label, body in zip(comparisons, labels, seen):
        lengths = len(comparison.first.text), len(comparison.second.text)
        assert label == (None if lengths[0] == lengths[1] else "first" if lengths[0] > lengths[1] else "second")
        assert body["model"] == "judge"
        assert toy.CONDITIONS[comparison.domain] in body["messages"][0]["content"]


def test_an_endpoint_that_is_not_there(endpoint):
    url, _ = endpoint
    with pytest.raises(ConfigError, match="gave no answer"):
        EndpointAnnotator(f"{url}/elsewhere", "judge", {})(compare(answers(), 1, 0, "r"))
