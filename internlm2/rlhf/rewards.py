"""Who judges an answer: the conditional reward model, or a rule that checks it."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from internlm2.config import ConfigError
from internlm2.rlhf.rollout import Sample
from internlm2.sources import toy_language
from internlm2.sources.answers import final_number, same_number
from internlm2.text.chat import Message


class RewardFunction(Protocol):
    """Scores for finished answers, one each, higher is better."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]: ...


class ConversationScorer(Protocol):
    """A reward model: scores of conversations, each by the standards of a domain."""

    def score(self, conversations: Sequence[Sequence[Message]], domains: Sequence[str]) -> list[float]: ...


class ModelReward:
    """The conditional reward model (report 4.2.1). The domain's condition is put before the conversation by the scorer,
    in the reward model's copy alone: policy, reference and critic never see it (report, Fig. 10).
    """

    def __init__(self, scorer: ConversationScorer, system_turn: str = "keep") -> None:
        self.scorer, self.system_turn = scorer, system_turn

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        conversations = [(*shown_turns(sample.prompt.turns, self.system_turn), sample.reply) for sample in samples]
        return self.scorer.score(conversations, [sample.prompt.domain for sample in samples])


def shown_turns(turns: Sequence[Message], system_turn: str) -> tuple[Message, ...]:
    """A prompt as the reward model sees it: `system_turn` keep, or drop, so that its condition stands alone."""
    return tuple(turn for turn in turns if system_turn == "keep" or turn.role != "system")


class RuleReward:
    """A function of one answer."""

    def __init__(self, name: str) -> None:
        if name not in RULES:
            raise ConfigError(f"ppo.reward.rule={name} does not exist: use {', '.join(sorted(RULES))}.")
        self.rule = RULES[name]

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [self.rule(sample) for sample in samples]


def final_number_matches(sample: Sample) -> float:
    """1 where the answer's final number is that of `answer` in the prompt's record (GSM8K's "#### 18" or a bare
    number), else 0.
    """
    if "answer" not in sample.prompt.reference:
        raise ConfigError(
            f"ppo.reward.rule=final_number: a prompt of source {sample.prompt.source} has no field `answer` to compare "
            "with."
        )
    wanted = final_number(str(sample.prompt.reference["answer"]))
    return float(same_number(final_number(sample.text), wanted))


def toy_gold(sample: Sample) -> float:
    """The toy language's exact quality of an answer in its prompt's domain: a measure, or a perfect teacher."""
    prompt = sample.prompt
    return toy_language.gold(prompt.turns, sample.text, prompt.domain, ended=sample.finish == "stop")


def word_overlap(sample: Sample) -> float:
    """F1 of the answer's words against those of `answer` in the prompt's record, each as often as it occurs (as SQuAD
    measures it, Rajpurkar et al. 1606.05250), without case and punctuation; 0 to 1.
    """
    if "answer" not in sample.prompt.reference:
        raise ConfigError(
            f"the rule word_overlap: a prompt of source {sample.prompt.source} has no field `answer` to compare with."
        )
    said, wanted = (
        Counter(re.findall(r"\w+", text.lower())) for text in (sample.text, sample.prompt.reference["answer"])
    )
    shared = (said & wanted).total()
    return 2.0 * shared / max(1, said.total() + wanted.total())


# By the name that ppo.reward.rule and ppo.validation.gold give.
RULES: dict[str, Callable[[Sample], float]] = {
    "final_number": final_number_matches,
    "toy_gold": toy_gold,
    "word_overlap": word_overlap,
}
