"""The typed, closed schema of conf/evaluate.yaml and conf/suite/. Values and comments stand in the YAML files."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from internlm2.config.generation import GenerationConfig
from internlm2.config.keys import key as _key
from internlm2.config.precision import DTYPES


@dataclass
class RopeChoiceConfig:
    """RopeScalingConfig, or that of the model."""

    kind: str = _key(choices=("as_trained", "none", "linear", "dynamic"))
    factor: float = _key(minimum=1.0)


@dataclass
class SuiteConfig:
    """What all suites have in common: `kind` says which one it is, `name` how its files are called."""

    kind: str = MISSING
    name: str = MISSING


@dataclass
class HeldOutSuite(SuiteConfig):
    """Loss on held-out text, by source and by position."""

    seq_len: int | None = _key(minimum=2)
    rows: int = _key(minimum=1)
    bins: int = _key(minimum=1)
    texts: dict[str, str] = MISSING
    field: str = MISSING


@dataclass
class NeedleSuite(SuiteConfig):
    """Needle in a haystack over lengths and depths."""

    lengths: list[int] | None = MISSING
    depths: list[float] = MISSING
    repeats: int = _key(minimum=1)
    languages: list[str] = MISSING
    haystack: str | None = MISSING
    chat: bool = MISSING


@dataclass
class ChoicesSuite(SuiteConfig):
    """Multiple choice by likelihood."""

    path: str | None = MISSING
    shots_path: str | None = MISSING
    shots: int = _key(minimum=0)
    template: str = MISSING
    score: str = _key(choices=("sum", "per_byte", "per_token"))
    limit: int | None = _key(minimum=1)


@dataclass
class AnswersSuite(SuiteConfig):
    """Written solutions whose final answer is compared."""

    path: str | None = MISSING
    shots_path: str | None = MISSING
    shots: int = _key(minimum=0)
    question: str = MISSING
    answer: str = MISSING
    template: str = MISSING
    chat: bool = MISSING
    stop: list[str] = MISSING
    max_new_tokens: int = _key(minimum=1)
    extract: str = _key(choices=("number", "text"))
    limit: int | None = _key(minimum=1)


@dataclass
class CodeSuite(SuiteConfig):
    """Programs that must pass tests."""

    path: str | None = MISSING
    chat: bool = MISSING
    stop: list[str] = MISSING
    max_new_tokens: int = _key(minimum=1)
    samples: int = _key(minimum=1)
    k: list[int] = MISSING
    temperature: float = _key(minimum=0.0)
    top_p: float = _key(minimum=0.0, maximum=1.0)
    seconds: float = _key(minimum=0.1)
    megabytes: int = _key(minimum=64)
    workers: int = _key(minimum=1)
    limit: int | None = _key(minimum=1)


@dataclass
class PreferencesSuite(SuiteConfig):
    """Accuracy of a reward model on preference pairs, by domain."""

    path: str | None = MISSING
    conditions: bool = MISSING
    limit: int | None = _key(minimum=1)


@dataclass
class JudgeConfig:
    """Who compares two answers: a reward model's run or export, or a chat endpoint of the OpenAI kind."""

    reward_model: str | None = MISSING
    url: str | None = MISSING
    model: str | None = MISSING
    key_variable: str = MISSING


@dataclass
class PairwiseSuite(SuiteConfig):
    """This model's answers against another's, judged in both orders."""

    against: str | None = MISSING
    path: str | None = MISSING
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    tie: float = _key(minimum=0.0)
    max_new_tokens: int = _key(minimum=1)
    temperature: float = _key(minimum=0.0)
    limit: int | None = _key(minimum=1)


@dataclass
class ContaminationSuite(SuiteConfig):
    """Loss on a training set, its test set and a fresh reference of the same kind (report 5.4)."""

    train: str | None = MISSING
    test: str | None = MISSING
    reference: str | None = MISSING
    question: str = MISSING
    answer: str = MISSING
    template: str = MISSING
    limit: int | None = _key(minimum=1)


SUITES: dict[str, type[SuiteConfig]] = {
    "held_out": HeldOutSuite,
    "needle": NeedleSuite,
    "choices": ChoicesSuite,
    "answers": AnswersSuite,
    "code": CodeSuite,
    "preferences": PreferencesSuite,
    "pairwise": PairwiseSuite,
    "contamination": ContaminationSuite,
}


@dataclass
class EvaluateConfig:
    """One command of `python -m internlm2.evaluate`."""

    suite: Any = MISSING
    output: str | None = MISSING
    tokenizer: str | None = MISSING
    device: str = _key(choices=("auto", "cpu", "cuda"))
    dtype: str = _key(choices=DTYPES)
    attention: str = _key(choices=("auto", "native", "flash_attn", "torch_varlen", "sdpa", "reference"))
    threads: int | None = _key(minimum=1)
    batch_tokens: int = _key(minimum=1)
    seed: int = _key(minimum=0)
    rope_scaling: RopeChoiceConfig = field(default_factory=RopeChoiceConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
