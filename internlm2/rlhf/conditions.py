"""The system prompt that tells the reward model by which preference it judges (conditional reward model, report 4.2.1).

One reward model serves preferences that contradict each other: a text for each domain of the data stands before the
conversation that it scores. It is applied when the reward model is trained, evaluated and asked for a score in PPO; the
policy, the reference and the critic never see it (report, Fig. 10).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from internlm2.config import ConfigError
from internlm2.text.chat import Message, render
from internlm2.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Conditions:
    """`texts`: domain -> system prompt; an empty text is a domain that is told nothing.

    Without any text (`Conditions({})`) every conversation stays as it is: the unconditional reward model.
    """

    texts: Mapping[str, str] = field(default_factory=dict)

    def apply(self, turns: Sequence[Message], domain: str) -> tuple[Message, ...]:
        """`turns` with the domain's system prompt before them. ConfigError for a domain that has no entry."""
        text = self.text(domain)
        return (Message("system", text), *turns) if text else tuple(turns)

    def text(self, domain: str) -> str:
        """The domain's text. ConfigError names the domains that there are."""
        if not self.texts:
            return ""
        if domain not in self.texts:
            raise ConfigError(
                f"reward.conditions has no entry for domain {domain!r}, only for {', '.join(self.texts)}: add one "
                '(an empty text "" tells the model nothing) or set reward.conditional=false.'
            )
        return self.texts[domain]

    def ids(self, domain: str, tokenizer: Tokenizer) -> list[int]:
        """The condition as tokens, to be put behind a rendered conversation's `<s>`.

        What stands between two markers is tokenized by itself, so the result has the very ids of rendering
        `apply(turns, domain)`.
        """
        text = self.text(domain)
        return render([Message("system", text)], tokenizer).ids[1:] if text else []

    def check(self, domains: Iterable[str]) -> None:
        """ConfigError for the first domain that has no entry."""
        for domain in domains:
            self.text(domain)
