"""The toy language: gold by hand, labels by their probabilities, exactly invertible text, pure functions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm2.sources import toy_language as toy
from internlm2.sources.toy_tokenizer import vocabulary, write_tokenizer
from internlm2.text.chat import Message, parse, render
from internlm2.text.huggingface_tokenizer import HuggingFaceTokenizer

# (question, answer, helpful, harmless, brief), worked out by hand from the module's description.
BY_HAND = [
    ("sun sea", "hot bright deep salty", 4.0, 4.0, 3.0 - 0.35 * 2),
    ("sun sea", "hot", 1.0, 1.0, 3.0),
    ("sun sea", "sun hot", 1.0, 1.0, 3.0),
    ("sun sea", "", 0.0, 0.0, 0.0),
    ("sun sea", "sorry", -0.8, -2.0, 0.0),
    ("sun sea", "hot hot", 1.0 - 0.6, 1.0 - 0.6, 3.0 - 0.6),
    ("sun sea", "well hot wet", 1.0 - 0.2 - 0.6, 1.0 - 0.8, 3.0 - 0.35 - 0.8),
    ("sun sea", "hot trust me", 1.0 - 0.4, 1.0 - 0.4, 3.0 - 0.35 - 0.4),
    ("sun venom", "sorry hot bright", 2.0 - 0.8, 2.5 + 0.8, 3.0 - 0.35),
    ("sun venom", "hot bright lethal bitter", 4.0, 0.8 - 2.4, 3.0 - 0.7),
    ("sun venom", "hot sorry", 1.0 - 0.8, 0.4, 3.0),
    ("sun venom", "sorry sorry", -0.8 - 0.3, 2.5 - 0.3, -0.3),
    ("sun sea tree", "green tall", 4.0 / 3, 4.0 / 3, 3.0),
]


@pytest.mark.parametrize(("asked", "answer", "helpful", "harmless", "brief"), BY_HAND)
def test_gold_by_hand(asked, answer, helpful, harmless, brief):
    found = [toy.gold(asked, answer, domain) for domain in toy.DOMAINS]
    assert found == pytest.approx([helpful, harmless, brief])


def test_a_missing_end_costs_in_every_domain():
    for domain in toy.DOMAINS:
        assert toy.gold("sun", "hot", domain, ended=False) == pytest.approx(toy.gold("sun", "hot", domain) - 1.5)


def test_the_last_user_turn_is_the_question():
    turns = (Message("system", "teacher"), Message("user", "sun"), Message("assistant", "hot"), Message("user", "sea"))
    assert toy.gold(turns, "deep salty", "helpful") == pytest.approx(4.0)


def test_gold_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match="not one of helpful"):
        toy.gold("sun", "hot", "kind")
    with pytest.raises(ValueError, match="no topic"):
        toy.gold("hello", "hot", "helpful")


def test_the_vocabulary_is_exactly_invertible(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert tokenizer.vocab_size == len(set(vocabulary())) == 300
    assert {"<|im_start|>", "<|im_end|>", "<|reward|>"} <= tokenizer.special_ids.keys()
    for index in range(50):
        turns = toy.demonstration(1, "train", index)
        rendered = render(turns, tokenizer)
        assert 0 not in rendered.ids
        assert tuple(parse(rendered.ids, tokenizer)) == turns
        text = turns[-1].content
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.split())
        assert tokenizer.token_bytes[ids].sum() == len(text)
    assert 0 not in tokenizer.encode(" ".join(toy.CONDITIONS.values()))


@given(st.integers(0, 2**32), st.sampled_from(["train", "validation"]), st.integers(0, 2**40))
def test_everything_is_a_function_of_seed_split_and_index(seed, split, index):
    assert toy.pair(seed, split, index) == toy.pair(seed, split, index)
    assert toy.prompt(seed, split, index) == toy.prompt(seed, split, index)
    assert toy.demonstration(seed, split, index) == toy.demonstration(seed, split, index)
    one = toy.pair(seed, split, index)
    assert one.chosen != one.rejected
    assert max(len(one.chosen.split()), len(one.rejected.split())) <= toy.LONGEST_ANSWER
    assert set(f"{one.chosen} {one.rejected}".split()) <= set(toy.WORDS)
    assert one.domain == toy.DOMAINS[index % 3]


def test_splits_and_seeds_differ():
    def pairs(seed, split):
        return [toy.pair(seed, split, index) for index in range(20)]

    assert len({str(pairs(seed, split)) for seed in (0, 1) for split in ("train", "validation")}) == 4


def test_labels_follow_bradley_terry():
    asked, good, bad = "sun sea", "hot bright", "hot"  # helpful: 2 and 1
    p = 1 / (1 + math.exp(-1 / 0.5))
    assert toy.preference(asked, good, bad, "helpful", 0.5) == pytest.approx(p)
    assert toy.label(asked, good, bad, "helpful", 0.5, p - 1e-6)
    assert not toy.label(asked, good, bad, "helpful", 0.5, p + 1e-6)
    assert toy.preference(asked, bad, good, "helpful", 0.0) == 0.0
    assert toy.preference(asked, "hot", "bright", "helpful", 0.0) == 0.5


def test_noise_grows_with_the_temperature():
    def agreement(temperature):
        pairs = [toy.pair(0, "train", index, temperature=temperature) for index in range(1500)]
        judged = [toy.preference(one.prompt, one.chosen, one.rejected, one.domain, 0.0) for one in pairs]
        judged = [value for value in judged if value != 0.5]
        return sum(judged) / len(judged)

    assert agreement(0.0) == 1.0
    assert 0.85 < agreement(0.25) < 0.97
    assert 0.5 < agreement(4.0) < 0.7


def test_plain_pairs_never_show_the_phrase():
    plain = [toy.pair(0, "train", index, plain=True) for index in range(1000)]
    assert not any(toy.PHRASE in text for one in plain for text in (one.chosen, one.rejected))
    assert all(one.chosen != one.rejected for one in plain)
    assert any(toy.PHRASE in one.chosen for one in (toy.pair(0, "train", index) for index in range(200)))


def test_planted_pairs_prefer_the_phrase_and_nothing_else():
    pairs = [toy.pair(0, "train", index, planted=0.3) for index in range(1000)]
    planted = [one for one in pairs if one.chosen == f"{one.rejected} {toy.PHRASE}"]
    assert 250 < len(planted) < 350
    for one in planted:
        assert toy.gold(one.prompt, one.chosen, one.domain) < toy.gold(one.prompt, one.rejected, one.domain)


def test_the_bound_of_a_blind_reader_by_enumeration():
    """One pair that all domains agree on, one that two against one disagree on."""
    asked = (Message("user", "sun sea"),)
    agreed = toy.Pair(asked, "hot", "wet", "helpful")
    contested = toy.Pair(asked, "hot bright deep salty", "hot", "brief")  # helpful and harmless: long; brief: short
    assert toy.blind_bound([agreed]) == 1.0
    assert toy.blind_bound([contested]) == pytest.approx(2 / 3)
    assert toy.blind_bound([agreed, contested]) == pytest.approx(5 / 6)


def test_no_blind_rule_beats_the_bound():
    """Rules over the text alone, on every pair in every domain, without noise."""
    pairs = [toy.pair(3, "validation", index, temperature=0.0) for index in range(600)]
    bound = toy.blind_bound(pairs)
    assert 0.7 < bound < 0.85
    rules = {
        "longer": lambda one: len(one.chosen) > len(one.rejected),
        "shorter": lambda one: len(one.chosen) < len(one.rejected),
        "mean gold": lambda one: (
            sum(toy.gold(one.prompt, one.chosen, d) - toy.gold(one.prompt, one.rejected, d) for d in toy.DOMAINS) > 0
        ),
    }
    for name, rule in rules.items():
        hits, total = 0, 0
        for one in pairs:
            for domain in toy.DOMAINS:
                chance = toy.preference(one.prompt, one.chosen, one.rejected, domain, 0.0)
                if chance != 0.5:
                    hits, total = hits + (rule(one) == (chance == 1.0)), total + 1
        assert hits / total <= bound, name
