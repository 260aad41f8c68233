"""Which function runs which suite."""

from collections.abc import Callable
from typing import Any

import torch

from internlm2.config.evaluate import EvaluateConfig
from internlm2.evaluate import (
    answers,
    choices,
    code,
    contamination,
    held_out_suite,
    needle_suite,
    pairwise,
    preferences,
)
from internlm2.evaluate.results import Result
from internlm2.evaluate.subject import Subject, load_subject

# Of one language model.
SUITES: dict[str, Callable[[Subject, Any, int], list[Result]]] = {
    "held_out": held_out_suite.run,
    "needle": needle_suite.run,
    "choices": choices.run,
    "answers": answers.run,
    "code": code.run,
    "contamination": contamination.run,
}
# Of a reward model, or of two models: these load what they need.
OTHERS: dict[str, Callable[[str, EvaluateConfig], list[Result]]] = {
    "preferences": preferences.run,
    "pairwise": pairwise.run,
}


def run_suite(source: str, config: EvaluateConfig) -> list[Result]:
    """Everything that the configured suite finds out about the model at `source`."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.suite.kind in OTHERS:
        return OTHERS[config.suite.kind](source, config)
    return SUITES[config.suite.kind](load_subject(source, config), config.suite, config.seed)
