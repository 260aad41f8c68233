"""Haystacks: exact lengths, needles where they belong, the same every time; answers counted exactly."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.config import ConfigError
from internlm2.evaluate.needle import Answer, Haystacks, Question, ask, needle_map, says, writes
from internlm2.evaluate.subject import Subject
from internlm2.generation import Engine
from internlm2.sources.needles import CHINESE, ENGLISH, LANGUAGES, PARTS, conversation, documents

DEPTHS = [0.0, 10.0, 50.0, 90.0, 100.0]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("language", PARTS)
def test_prompts_have_the_length_that_was_asked_for(tokenizer, language, chat):
    haystacks = Haystacks(tokenizer, chat=chat)
    for length in (160, 301, 1024):
        questions = list(haystacks.questions(language, length, DEPTHS, 2, seed=5))
        assert len(questions) == 2 * len(DEPTHS)
        for question in questions:
            answer = tokenizer.encode(question.needle.sentence) if chat else tokenizer.encode(question.needle.answer)
            assert len(question.ids) + len(answer) + chat == length
            text = tokenizer.decode(question.ids)
            assert text.count(question.needle.sentence) == 1
            assert text.count(question.needle.answer) == 1
            ending = question.needle.question if chat else question.needle.prompt
            assert ending in text[-120:]


def test_the_needle_stands_at_its_depth(tokenizer):
    haystacks = Haystacks(tokenizer)
    for question in haystacks.questions("english", 4000, [0, 25, 50, 75, 100], 1, seed=5):
        text = tokenizer.decode(question.ids)
        before = text.index(question.needle.sentence) / len(text)
        assert before == pytest.approx(question.depth / 100, abs=0.03)
        if question.depth:
            start = text.index(question.needle.sentence)
            assert text[start - 2] == "."  # after a whole sentence


def test_depths_share_haystack_and_needle_and_seeds_differ(tokenizer):
    haystacks = Haystacks(tokenizer)
    first, second = haystacks.questions("english", 400, [0, 100], 1, seed=5)
    assert first.needle == second.needle
    assert sorted(first.ids) == sorted(second.ids)
    assert list(haystacks.questions("english", 400, [0, 100], 1, seed=5)) == [first, second]
    assert next(haystacks.questions("english", 400, [0], 1, seed=6)).ids != first.ids
    with pytest.raises(ConfigError, match=r"suite.lengths: 10 tokens hold no haystack"):
        list(haystacks.questions("english", 10, [0], 1, seed=5))


def test_a_text_of_one_s_own_is_the_haystack(tokenizer):
    haystacks = Haystacks(tokenizer, text="The cat sat. Did the dog sleep? 猫在睡觉。狗在跑。")
    text = tokenizer.decode(next(haystacks.questions("english", 300, [50], 1, seed=1)).ids)
    assert "The cat sat." in text
    assert "狗在跑。" in text
    with pytest.raises(ConfigError, match="no sentence"):
        Haystacks(tokenizer, text=" \n ")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("lantern", True), (' lantern".', True), ("lantern\nWhat", True), ("lanterns", False), ("Lantern", False),
        ("", False), ("the lantern", False), ("anchor lantern", False),
    ],
)  # fmt: skip
def test_a_completion_is_right_only_if_it_begins_with_the_word(text, found):
    assert writes(text, "lantern") is found


def test_a_chat_s_answer_may_be_a_sentence():
    assert says('The secret word of Oslo is "lantern".', "lantern")
    assert says("Lantern", "lantern")
    assert not says("lanterns", "lantern")
    assert not says("I do not know.", "lantern")
    assert says("北京的秘密词是“灯笼”。", "灯笼")


class Copier(Engine):
    """Stands in for a model that finds the needle in the second half of the prompt and guesses otherwise."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def generate(self, prompts, params, *, row_ids=None):
        from internlm2.generation import Completion

        answers = []
        for prompt in prompts:
            text = self.tokenizer.decode(prompt[len(prompt) // 2 :])
            secret = next((word for word in ENGLISH.secrets if f'is "{word}".' in text), "nothing")
            answers.append(Completion(0, 0, self.tokenizer.encode(secret)))
        return answers


def test_the_map_counts_by_length_and_depth(tokenizer):
    haystacks = Haystacks(tokenizer)
    questions = [q for length in (300, 500) for q in haystacks.questions("english", length, [0, 25, 90], 3, seed=5)]
    found = needle_map(ask(Copier(tokenizer), tokenizer, questions))
    assert found.lengths == [300, 500]
    assert found.accuracy == [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    assert found.asked == [3, 3]
    assert found.at(300) == pytest.approx(1 / 3)


def test_a_model_without_a_clue_finds_nothing(subject: Subject):
    haystacks = Haystacks(subject.tokenizer)
    answers = ask(subject.engine, subject.tokenizer, list(haystacks.questions("english", 128, [0, 100], 2, seed=1)))
    assert [answer.right for answer in answers] == [False] * 4
    assert all(isinstance(answer, Answer) and isinstance(answer.question, Question) for answer in answers)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 60), st.sampled_from(PARTS))
def test_training_documents_ask_for_every_needle_once(key, part):
    language = LANGUAGES[part]
    messages = conversation(language, key)
    asked, told = messages[0::2], messages[1::2]
    assert {message.role for message in asked} == {"user"}
    assert {message.role for message in told} == {"assistant"}
    for answer in told:
        assert messages[0].content.count(answer.content) == 1
    assert len({answer.content for answer in told}) == len(told)
    assert conversation(language, key) == messages


def test_prose_never_holds_a_secret():
    for language in (ENGLISH, CHINESE):
        words = [phrase for part in language.parts for phrase in part]
        assert not [secret for secret in language.secrets if any(secret in phrase for phrase in words)]
    assert len({document.plain_text for document, _ in zip(documents("english"), range(200))}) > 190
