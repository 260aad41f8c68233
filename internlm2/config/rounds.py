"""The `rounds` group: what happens around and between the rounds of PPO (report 4.2.2). Values stand in
conf/rounds/default.yaml.
"""

from dataclasses import dataclass, field

from omegaconf import MISSING

from internlm2.config.errors import ConfigError
from internlm2.config.keys import key


@dataclass
class HacksConfig:
    """When a change from the early to the late answers of a round counts as a pattern, and how it is patched."""

    fewest_pairs: int = key(minimum=1)
    most_pairs: int = key(minimum=1)
    edited_share: float = key(minimum=0.0, maximum=1.0)
    ngram: int = key(minimum=1)
    repetition_rise: float = key(minimum=0.0, maximum=1.0)
    length_ratio: float = key(minimum=1.0)
    unfinished_rise: float = key(minimum=0.0, maximum=1.0)
    distinct_ratio: float = key(minimum=0.0, maximum=1.0)
    phrase_words: int = key(minimum=1, maximum=8)
    phrase_share: float = key(minimum=0.0, maximum=1.0)
    phrase_rise: float = key(minimum=1.0)
    phrase_gain: float = key(minimum=0.0)
    phrase_dependence: float = key(minimum=0.0)


@dataclass
class AuditConfig:
    """The second reward model, which is never optimised against, and when it raises the alarm."""

    enabled: bool | None = MISSING
    share: float = key(minimum=0.0, maximum=0.9)
    gain_ratio: float = key(minimum=0.0)
    correlation: float = key(minimum=-1.0, maximum=1.0)
    smallest_gain: float = key(minimum=0.0)


@dataclass
class AnnotationConfig:
    """Who compares the answers of the SFT, early and late policies."""

    kind: str = key(choices=("none", "files", "function", "reward_model", "endpoint"))
    comparisons: int = key(minimum=1)
    lag: int = key(minimum=0)
    when_missing: str = key(choices=("go_on", "stop"))
    function: str | None = MISSING
    temperature: float = key(minimum=0.0)
    reward_model: str | None = MISSING
    endpoint: str | None = MISSING
    endpoint_model: str | None = MISSING


@dataclass
class BestOfConfig:
    """The reference without training: the best of n answers of the SFT policy, as each round's reward model chooses."""

    samples: int = key(minimum=1)
    prompts: int = key(minimum=1)


@dataclass
class RoundsConfig:
    """How many rounds, where each starts, and what is collected after it."""

    count: int = key(minimum=1)
    start: str = key(choices=("sft", "previous"))
    prompts: int = key(minimum=1)
    early: float = key(minimum=0.0, maximum=1.0)
    signal: str | None = MISSING
    hacks: HacksConfig = field(default_factory=HacksConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    annotation: AnnotationConfig = field(default_factory=AnnotationConfig)
    best_of: BestOfConfig = field(default_factory=BestOfConfig)


def check_rounds(rounds: RoundsConfig | None) -> None:
    """Raise ConfigError for keys of the group that do not go together."""
    if rounds is None:
        raise ConfigError("stage.kind=ppo needs the group rounds: use rounds=default.")
    hacks, annotation = rounds.hacks, rounds.annotation
    if hacks.fewest_pairs > hacks.most_pairs:
        raise ConfigError(
            f"rounds.hacks.fewest_pairs={hacks.fewest_pairs} exceeds rounds.hacks.most_pairs={hacks.most_pairs}."
        )
    for kind in ("function", "reward_model", "endpoint"):
        if annotation.kind == kind and not getattr(annotation, kind):
            raise ConfigError(f"rounds.annotation.kind={kind} needs rounds.annotation.{kind}.")
