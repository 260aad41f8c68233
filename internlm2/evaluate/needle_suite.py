"""The needle suite: a map for each language (see `internlm2.evaluate.needle`)."""

from collections.abc import Sequence

from internlm2.config import ConfigError
from internlm2.config.evaluate import NeedleSuite
from internlm2.evaluate.intervals import bootstrap
from internlm2.evaluate.needle import Answer, Haystacks, NeedleMap, ask, needle_map
from internlm2.evaluate.results import Headline, Result
from internlm2.evaluate.subject import Subject, read_text
from internlm2.sources.needles import LANGUAGES


def run(subject: Subject, suite: NeedleSuite, seed: int) -> list[Result]:
    """One heat map for each language."""
    lengths = check(subject, suite)
    text = read_text("suite.haystack", suite.haystack) if suite.haystack else None
    haystacks = Haystacks(subject.tokenizer, chat=suite.chat, text=text)
    results = []
    for language in suite.languages:
        answers: list[Answer] = []
        for length in lengths:  # one length at a time: the prompts of the longest are large
            asked = list(haystacks.questions(language, length, suite.depths, suite.repeats, seed))
            answers += ask(subject.engine, subject.tokenizer, asked, chat=suite.chat)
        results.append(map_result(answers, suite.name, language, subject.trained_to, seed))
    return results


def check(subject: Subject, suite: NeedleSuite) -> list[int]:
    """The lengths to measure; ConfigError for what cannot be."""
    for language in suite.languages:
        if language not in LANGUAGES:
            raise ConfigError(f"suite.languages: {language} is not one of {', '.join(LANGUAGES)}.")
    for depth in suite.depths:
        if not 0 <= depth <= 100:
            raise ConfigError(f"suite.depths: {depth:g} must lie in 0..100, percent of the haystack.")
    if not suite.depths or suite.lengths == []:
        raise ConfigError("suite.depths and suite.lengths need at least one value each.")
    lengths = suite.lengths or default_lengths(subject.trained_to)
    if max(lengths) > subject.engine.kv_tokens:
        raise ConfigError(
            f"suite.lengths: {max(lengths):,} tokens do not fit the cache: raise generation.kv_tokens="
            f"{subject.engine.kv_tokens}."
        )
    return sorted(set(lengths))


def default_lengths(trained_to: int) -> list[int]:
    """From an eighth of what a model was trained to up to twice that, in powers of two."""
    return [max(64, trained_to // part) for part in (8, 4, 2, 1)] + [2 * trained_to]


def map_result(answers: Sequence[Answer], name: str, language: str, trained_to: int, seed: int) -> Result:
    """The map as a result, with its headline: the share found within the length that the model was trained to."""
    found = needle_map(answers)
    inside = [float(answer.right) for answer in answers if answer.question.length <= trained_to]
    beyond = [float(answer.right) for answer in answers if answer.question.length > trained_to]
    headline = []
    for label, values in (("within", inside), ("beyond", beyond)):
        if values:
            mean = sum(values) / len(values)
            headline.append(
                Headline(f"needle, {language}, found {label} {trained_to:,} tokens", mean, bootstrap(values, seed))
            )
    asked = " to ".join(map(str, sorted({min(found.asked), max(found.asked)})))
    note = f"Exact match, {asked} haystacks in each cell; the model was trained to {trained_to:,} tokens."
    return Result(
        name=f"{name}_{language}",
        title=f"Needle in a haystack, {language}",
        heat_map=heat_map_of(found),
        headline=headline,
        note=note,
        records=[record(answer) for answer in answers],
    )


def heat_map_of(found: NeedleMap) -> dict[str, object]:
    """As the report draws it: lengths across, depths down."""
    return {
        "x_label": "length (tokens)",
        "y_label": "depth (%)",
        "value_label": "found",
        "x": found.lengths,
        "y": found.depths,
        "values": [[row[depth] for row in found.accuracy] for depth in range(len(found.depths))],
    }


def record(answer: Answer) -> dict[str, object]:
    """One line of the record of single items."""
    question = answer.question
    return {
        "language": question.language,
        "length": question.length,
        "depth": question.depth,
        "repeat": question.repeat,
        "tokens": len(question.ids),
        "wanted": question.needle.answer,
        "written": answer.text,
        "right": answer.right,
    }
