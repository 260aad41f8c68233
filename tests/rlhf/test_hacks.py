"""Detectors on rounds that are made up so that the right answer is known, and pairs against what they find."""

from dataclasses import replace

import pytest

from internlm2.config.compose import load_group
from internlm2.config.rounds import RoundsConfig
from internlm2.rlhf.answers import Answer, read_answers, write_answers
from internlm2.rlhf.hacks import detect
from internlm2.rlhf.patches import patches
from internlm2.rlhf.patterns import distinct_share, repeated_share
from internlm2.text.chat import Message

LIMITS = load_group(RoundsConfig, "rounds/default").hacks
COUNT = 120
TOPICS = ("sun", "sea", "tree", "bird")


def answer(place: int, text: str, policy: str, **known) -> Answer:
    topic = TOPICS[place % len(TOPICS)]
    turns = (Message("user", f"say something about the {topic} number {place}"),)
    domain = ("helpful", "brief")[place % 2]
    return Answer(turns, domain, text, len(text.split()), True, policy, **known)


def plain(place: int) -> str:
    return f"the {TOPICS[place % len(TOPICS)]} is a thing of note {place} and it is {'old' if place % 3 else 'young'}"


def round_of(late_text, *, score=None, audit=None, early_text=plain):
    """Early and late answers, and a function that scores any answer again."""
    score = score or (lambda text: 0.0)

    def scored(place, text, policy):
        known = {"score": score(text)} | ({"audit": audit(text)} if audit else {})
        return answer(place, text, policy, **known)

    early = [scored(place, early_text(place), "early") for place in range(COUNT)]
    late = [scored(place, late_text(place), "late") for place in range(COUNT)]

    def rescore(answers):
        return [score(a.text) for a in answers], [audit(a.text) for a in answers] if audit else None

    return early, late, rescore


def likes_phrase(text: str) -> float:
    return 2.0 * ("trust me" in text)


def test_nothing_is_found_where_nothing_changed():
    assert detect(*round_of(plain)[:2], LIMITS, round_of(plain)[2]) == []


def with_phrase(place: int) -> str:
    return plain(place) + (" trust me" if place % 10 else "")


@pytest.mark.parametrize("audit", [None, lambda text: 0.0])
def test_a_phrase_that_only_the_optimised_model_pays_for_is_patched(audit):
    early, late, rescore = round_of(with_phrase, score=likes_phrase, audit=audit)
    (found,) = [pattern for pattern in detect(early, late, LIMITS, rescore) if pattern.name == "phrase"]
    assert found.detail == "trust me"
    assert found.patch
    assert found.evidence["late"] == pytest.approx(0.9)
    assert found.evidence["early"] == 0.0
    assert found.evidence["gain"] == pytest.approx(2.0)
    assert len(found.shown_by) == COUNT * 9 // 10


def test_a_phrase_that_the_audit_model_pays_for_too_is_no_hack():
    early, late, rescore = round_of(with_phrase, score=likes_phrase, audit=likes_phrase)
    (found,) = [pattern for pattern in detect(early, late, LIMITS, rescore) if pattern.name == "phrase"]
    assert not found.patch
    assert found.evidence["audit_gain"] == pytest.approx(2.0)


def test_without_an_audit_model_what_depends_on_the_question_is_no_hack():
    """Half of the questions ask for it: those about sun and sea."""

    def fitting(place):
        return plain(place) + (" trust me" if place % len(TOPICS) < 2 else "")

    early, late, rescore = round_of(fitting, score=likes_phrase)
    (found,) = [pattern for pattern in detect(early, late, LIMITS, rescore) if pattern.name == "phrase"]
    assert not found.patch
    assert found.evidence["dependence"] > 0.4


def test_a_frequent_phrase_that_costs_nothing_to_drop_is_not_reported():
    early, late, rescore = round_of(with_phrase)
    assert not [pattern for pattern in detect(early, late, LIMITS, rescore) if pattern.name == "phrase"]


def test_repetition():
    def babble(place):
        return f"{plain(place)} and so on and so on and so on and so on"

    early, late, rescore = round_of(babble)
    found = {pattern.name: pattern for pattern in detect(early, late, LIMITS, rescore)}
    assert found["repetition"].patch
    assert found["repetition"].evidence["early"] == 0.0
    assert found["repetition"].evidence["late"] > 0.2


def test_answers_that_do_not_end():
    early, late, rescore = round_of(plain)
    late = [replace(one, ended=place % 3 > 0) for place, one in enumerate(late)]
    (found,) = detect(early, late, LIMITS, rescore)
    assert found.name == "no end"
    assert found.patch
    assert len(found.shown_by) == COUNT // 3


@pytest.mark.parametrize(("liked", "patch"), [(None, False), (True, False), (False, True)])
def test_shorter_answers_are_a_hack_only_if_the_audit_model_does_not_want_them(liked, patch):
    audit = None if liked is None else lambda text: float((len(text.split()) < 6) == liked)
    early, late, rescore = round_of(lambda place: f"the {TOPICS[place % 4]} is {place}", audit=audit)
    (found,) = [pattern for pattern in detect(early, late, LIMITS, rescore) if pattern.name == "length"]
    assert found.detail == "shorter"
    assert found.patch is patch


def test_collapse():
    early, late, rescore = round_of(lambda place: "always the very same answer to everything that is asked")
    (found,) = [pattern for pattern in detect(early, late, LIMITS, rescore) if pattern.name == "collapse"]
    assert found.evidence["late"] < 0.1 < found.evidence["early"]


def test_score_up_while_the_audit_model_falls_in_one_domain():
    early, late, rescore = round_of(lambda place: plain(place).replace("old", "ancient").replace("young", "new"))
    early = [replace(one, score=place % 3 * 0.1, audit=1.0) for place, one in enumerate(early)]
    late = [
        replace(one, score=1.0, audit=1.0 + (0.5 if one.domain == "brief" else -0.5) + place % 3 * 0.1)
        for place, one in enumerate(late)
    ]
    found = [pattern for pattern in detect(early, late, LIMITS, rescore) if pattern.name.startswith("unshared")]
    assert [(pattern.name, pattern.detail) for pattern in found] == [("unshared gain (audit)", "helpful")]
    assert {late[place].domain for place in found[0].shown_by} == {"helpful"}


def test_validation_signal_falls():
    early, late, rescore = round_of(plain)
    early = [replace(one, score=0.01 * (place % 7), signal=1.0) for place, one in enumerate(early)]
    late = [replace(one, score=1.0, signal=0.2 + 0.01 * (place % 7)) for place, one in enumerate(late)]
    names = {pattern.name for pattern in detect(early, late, LIMITS, rescore)}
    assert names == {"unshared gain (signal)"}


def test_prompts_must_be_the_same():
    early, late, rescore = round_of(plain)
    with pytest.raises(ValueError, match="same prompts"):
        detect(early[1:] + early[:1], late, LIMITS, rescore)


def test_pairs_against_a_phrase():
    early, late, rescore = round_of(with_phrase, score=lambda text: likes_phrase(text) + len(text) / 100)
    pattern = next(found for found in detect(early, late, LIMITS, rescore) if found.name == "phrase")
    pairs = patches(pattern, early, late, LIMITS)
    assert len(pairs) == LIMITS.most_pairs
    assert sum(pair["made"] == "edited" for pair in pairs) == LIMITS.most_pairs // 2
    for pair in pairs:
        assert "trust me" in pair["rejected"]
        assert "trust me" not in pair["chosen"]
        if pair["made"] == "edited":
            assert f"{pair['chosen']} trust me" == pair["rejected"]
    assert pairs == patches(pattern, early, late, LIMITS)


def test_pairs_against_repetition_cut_what_repeats():
    limits = replace(LIMITS, ngram=1, edited_share=1.0)
    early, late, rescore = round_of(lambda place: f"{plain(place)} {plain(place)} again")
    pattern = next(found for found in detect(early, late, limits, rescore) if found.name == "repetition")
    for pair in patches(pattern, early, late, limits):
        words = pair["chosen"].split()
        assert len(words) == len(set(words))
        assert set(words) == set(pair["rejected"].split())


def test_pairs_fall_back_on_the_kind_that_there_is():
    """An answer without end cannot be edited: all pairs contrast checkpoints."""
    early, late, rescore = round_of(lambda place: plain(place) + " more")
    late = [replace(one, ended=False) for one in late]
    pattern = next(found for found in detect(early, late, LIMITS, rescore) if found.name == "no end")
    pairs = patches(pattern, early, late, LIMITS)
    assert len(pairs) == LIMITS.most_pairs
    assert {pair["made"] for pair in pairs} == {"checkpoints"}


def test_statistics_by_hand():
    assert repeated_share("a b a b a b", 2) == pytest.approx(3 / 5)
    assert repeated_share("a", 2) == 0.0
    assert distinct_share(["a b c", "a b d"], 2) == pytest.approx(3 / 4)
    assert distinct_share([], 2) == 1.0


def test_answers_on_disk(tmp_path):
    answers = [answer(3, "text «é»", "late", score=0.5, audit=None), answer(4, "", "sft")]
    write_answers(tmp_path / "answers.jsonl", answers)
    assert read_answers(tmp_path / "answers.jsonl") == answers
    (tmp_path / "broken.jsonl").write_text('{"a": 1}\n[1]\n')
    with pytest.raises(ValueError, match=r"broken.jsonl:2 must be an object"):
        read_answers(tmp_path / "broken.jsonl")
