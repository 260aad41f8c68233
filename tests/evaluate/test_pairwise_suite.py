"""Two models' answers in both orders: verdicts, an endpoint that prefers what comes first, and one that fails."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from internlm2.config import ConfigError
from internlm2.config.compose import compose_evaluation
from internlm2.evaluate import pairwise
from internlm2.evaluate.endpoint import Endpoint
from internlm2.evaluate.pairwise import Contest, read_verdict, verdict


@pytest.fixture
def judge():
    """A server whose answers are set by the test: a list of (status, content)."""
    asked: list[dict] = []
    replies: list[tuple[int, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            asked[-1]["key"] = self.headers.get("Authorization")
            status, text = replies.pop(0) if len(replies) > 1 else replies[0]
            body = json.dumps({"choices": [{"message": {"content": text}}]}) if status == 200 else "no"
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked, replies
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("both", "found"), [((1, 1), 1), ((1, 0), 0.5), ((0, 0), 0), ((1, 0.5), 1), ((0.5, 0.5), 0.5)])
def test_a_win_must_hold_in_both_orders(both, found):
    assert verdict(*both) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Both are fine. Verdict: 1", 1.0), ("Verdict: 1\nwait\n**Verdict: 2**", 0.0), ("verdict: TIE.", 0.5),
        ("Answer 1 is better", 0.5), ("", 0.5), ("Verdict:", 0.5), ('Verdict: "2"', 0.0),
    ],
)  # fmt: skip
def test_reading_a_verdict(text, found):
    assert read_verdict(text) == found


def test_a_judge_that_prefers_the_first_decides_nothing(export, tmp_path, judge):
    url, asked, replies = judge
    replies.append((200, "I like the first. Verdict: 1"))
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "What is it?", "domain": "a"}\n{"prompt": [{"role": "user", "content": "Why?"}]}\n')
    keys = [
        "suite=pairwise", f"suite.against={export}", f"suite.path={path}", "dtype=fp32", "suite.max_new_tokens=4",
        f"suite.judge.url={url}", "suite.judge.model=judge", "suite.judge.key_variable=NO_SUCH_KEY",
    ]  # fmt: skip
    (result,) = pairwise.run(str(export), compose_evaluation(keys))
    assert result.headline[0].value == 0.5
    assert [row["ties"] for row in result.rows] == [1, 1, 2]
    assert "disagreed on 2 of 2" in result.note
    assert len(asked) == 4
    assert asked[0]["model"] == "judge"
    assert asked[0]["key"] is None
    assert "user: What is it?" in asked[0]["messages"][0]["content"]


def test_orders_are_swapped_for_the_judge(judge):
    url, asked, replies = judge
    replies += [(200, "Verdict: 2"), (200, "Verdict: 1")]
    ask = pairwise.endpoint_judge(Endpoint(url, "judge"))
    contest = Contest((), "a", "OURS", "THEIRS")
    assert ask([contest], True) == [0.0]
    assert ask([contest], False) == [0.0]
    first, second = (turn["messages"][0]["content"] for turn in asked)
    assert first.index("OURS") < first.index("THEIRS")
    assert second.index("OURS") > second.index("THEIRS")


def test_an_endpoint_is_tried_again_and_then_given_up(judge, monkeypatch):
    url, asked, replies = judge
    monkeypatch.setenv("SOME_KEY", "secret")
    replies += [(503, ""), (200, "fine")]
    assert Endpoint(url, "judge", "SOME_KEY", pause=0.0).ask("?") == "fine"
    assert [question["key"] for question in asked] == ["Bearer secret"] * 2
    replies[:] = [(401, "")]
    with pytest.raises(ConfigError, match="answers 401"):
        Endpoint(url, "judge", pause=0.0).ask("?")
    replies[:] = [(503, "")]
    with pytest.raises(ConfigError, match="answers 503"):
        Endpoint(url, "judge", pause=0.0).ask("?")
    with pytest.raises(ConfigError, match="cannot be reached"):
        Endpoint("http://127.0.0.1:1/v1", "judge", pause=0.0).ask("?")
    with pytest.raises(ConfigError, match="must begin with http"):
        Endpoint("file:///etc/passwd", "judge").ask("?")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ([], "suite.against is missing"),
        (["suite.against=x"], "suite.path is missing"),
        (["suite.against=x", "suite.path=PATH"], "suite.judge needs one of"),
        (["suite.against=x", "suite.path=PATH", "suite.judge.url=http://x"], "needs suite.judge.model"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_loaded(tmp_path, keys, words):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Why?"}\n')
    config = compose_evaluation(["suite=pairwise", *(key.replace("PATH", str(path)) for key in keys)])
    with pytest.raises(ConfigError, match=words):
        pairwise.run("nowhere", config)
