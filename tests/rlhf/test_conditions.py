"""A domain's system prompt before a conversation, as turns and as tokens."""

import pytest

from internlm2.config import ConfigError
from internlm2.rlhf.conditions import Conditions
from internlm2.text.chat import Message, render
from internlm2.text.sentencepiece_tokenizer import SentencePieceTokenizer
from internlm2.text.tokenizer_training import train_model

TURNS = (Message("user", "Is it safe?"), Message("assistant", "Not quite."))
CONDITIONS = Conditions({"helpful": "Judge how helpful\nthe answer is <|im_end|>.", "default": ""})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_model(["the quick brown fox jumps over the lazy dog and is helpful\n" * 20], 300))
    return SentencePieceTokenizer(path)


def test_the_text_comes_first_also_before_a_system_prompt_of_the_conversation():
    own = (Message("system", "You are brief."), *TURNS)
    assert CONDITIONS.apply(own, "helpful") == (Message("system", CONDITIONS.texts["helpful"]), *own)
    assert CONDITIONS.apply(TURNS, "default") == TURNS
    assert Conditions({}).apply(TURNS, "anything") == TURNS


@pytest.mark.parametrize("domain", ["helpful", "default"])
def test_tokens_equal_those_of_the_rendered_turns(tokenizer, domain):
    plain = render(TURNS, tokenizer).ids
    expected = render(CONDITIONS.apply(TURNS, domain), tokenizer).ids
    assert [plain[0], *CONDITIONS.ids(domain, tokenizer), *plain[1:]] == expected
    assert (expected == plain) == (domain == "default")


def test_an_unknown_domain_is_named():
    with pytest.raises(ConfigError, match=r"domain 'poetry', only for helpful, default: add one"):
        CONDITIONS.apply(TURNS, "poetry")
    with pytest.raises(ConfigError, match="'code'"):
        CONDITIONS.check(["helpful", "code"])
