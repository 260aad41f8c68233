"""Which function runs which suite."""

from collections.abc import Callable
from typing import Any

from internlm2.config.evaluate import EvaluateConfig
from internlm2.evaluate import answers, choices, code, contamination, held_out_suite, needle_suite
from internlm2.evaluate.results import Result
from internlm2.evaluate.subject import Subject

SUITES: dict[str, Callable[[Subject, Any, int], list[Result]]] = {
    "held_out": held_out_suite.run,
    "needle": needle_suite.run,
    "choices": choices.run,
    "answers": answers.run,
    "code": code.run,
    "contamination": contamination.run,
}


def run_suite(subject: Subject, config: EvaluateConfig) -> list[Result]:
    """Everything that the configured suite finds out about the model."""
    return SUITES[config.suite.kind](subject, config.suite, config.seed)
