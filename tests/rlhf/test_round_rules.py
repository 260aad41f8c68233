"""Rules that measure answers, and what of a prompt the reward model sees."""

import pytest

from internlm2.config import ConfigError
from internlm2.data.prompts import Prompt
from internlm2.rlhf.rewards import ModelReward, RuleReward
from internlm2.rlhf.rollout import Sample
from internlm2.text.chat import Message

TURNS = (Message("system", "teacher"), Message("user", "sun sea"))


def sample(text: str, **reference) -> Sample:
    prompt = Prompt(TURNS, "helpful", reference)
    return Sample(prompt, text, [0], "stop", Message("assistant", text))


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("Return the sum.", "return THE sum", 1.0),
        ("sum", "Return the sum", 2 * 1 / (1 + 3)),
        ("sum sum sum", "Return the sum", 2 * 1 / (3 + 3)),  # a word counts as often as the docstring has it
        ("", "Return the sum", 0.0),
        ("nothing of it", "Return the sum", 0.0),
    ],
)
def test_word_overlap_by_hand(text, answer, expected):
    assert RuleReward("word_overlap")([sample(text, answer=answer)]) == [pytest.approx(expected)]


def test_word_overlap_needs_something_to_compare_with():
    with pytest.raises(ConfigError, match="no field `answer`"):
        RuleReward("word_overlap")([sample("sum")])


class Recorder:
    """A reward model that remembers what it was shown."""

    def __init__(self):
        self.seen = []

    def score(self, conversations, domains):
        self.seen += conversations
        return [0.0] * len(conversations)


@pytest.mark.parametrize(("system_turn", "roles"), [("keep", ["system", "user"]), ("drop", ["user"])])
def test_the_policys_system_turn_is_shown_or_dropped(system_turn, roles):
    model = Recorder()
    ModelReward(model, system_turn)([sample("hot")])
    assert [turn.role for turn in model.seen[0]] == [*roles, "assistant"]
