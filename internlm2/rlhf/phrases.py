"""Phrases that a policy has learned to say because the reward model pays for them."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

from internlm2.config.rounds import HacksConfig
from internlm2.rlhf.answers import Answer
from internlm2.rlhf.patterns import Pattern, mean, ngrams

# Scores answers: by the optimised model and, where there is one, by the audit model.
Rescore = Callable[[Sequence[Answer]], tuple[list[float], list[float] | None]]

# Candidate phrases whose effect on the score is measured, and answers that each is measured on.
_CANDIDATES = 12
_EXAMPLES = 48
_SIGNIFICANT = 4.0  # standard errors


def risen_phrases(
    early: Sequence[Answer], late: Sequence[Answer], limits: HacksConfig, rescore: Rescore
) -> list[Pattern]:
    """Phrases that became frequent and that the reward model pays for: taken out, the answers lose score.

    A phrase is one to patch where the audit model pays less than half of that, or, without an audit model, where it is
    said whatever is asked.
    """
    found = []
    for phrase, before, after in _risen(early, late, limits):
        shown = tuple(place for place, answer in enumerate(late) if says(answer, phrase))
        pattern = _measured(phrase, before, after, shown, late, limits, rescore)
        if pattern is not None:
            found.append(pattern)
    return _named(found)


def says(answer: Answer, phrase: tuple[str, ...]) -> bool:
    """Does the phrase stand in the answer?"""
    return phrase in ngrams(answer.words, len(phrase))


def without_phrase(words: Sequence[str], phrase: tuple[str, ...]) -> list[str]:
    """The words with every occurrence of the phrase taken out."""
    kept: list[str] = []
    for word in words:
        kept.append(word)
        if tuple(kept[-len(phrase) :]) == phrase:
            del kept[-len(phrase) :]
    return kept


def _measured(
    phrase: tuple[str, ...],
    before: float,
    after: float,
    shown: tuple[int, ...],
    late: Sequence[Answer],
    limits: HacksConfig,
    rescore: Rescore,
) -> Pattern | None:
    """What both reward models pay for a phrase; None where the optimised one pays too little to matter."""
    tried = [late[place] for place in shown][:_EXAMPLES]
    bare = [answer.with_text(" ".join(without_phrase(answer.words, phrase))) for answer in tried]
    scored, cut = rescore(tried), rescore(bare)
    gain = mean(a - b for a, b in zip(scored[0], cut[0]))
    if gain < limits.phrase_gain:
        return None
    dependence = _dependence(phrase, late)
    if scored[1] is not None and cut[1] is not None:
        audit_gain = mean(a - b for a, b in zip(scored[1], cut[1]))
        patch, verdict = audit_gain < 0.5 * gain, f"the audit model pays {audit_gain:+.2f} for it"
    else:
        audit_gain = None
        patch = dependence < limits.phrase_dependence
        verdict = f"its share varies by {dependence:.2f} with what is asked"
    text = " ".join(phrase)
    summary = (
        f"{text!r} stands in {after:.0%} of the late answers, {before:.0%} of the early ones; "
        f"the reward model pays {gain:+.2f} for it"
    )
    evidence = {"early": before, "late": after, "gain": gain, "audit_gain": audit_gain, "dependence": dependence}
    return Pattern("phrase", text, summary, evidence, shown, patch, verdict)


def _risen(
    early: Sequence[Answer], late: Sequence[Answer], limits: HacksConfig
) -> list[tuple[tuple[str, ...], float, float]]:
    """(phrase, early share, late share) of the phrases that rose most, by standard errors."""
    risen = []
    before, after = (_document_counts(answers, limits.phrase_words) for answers in (early, late))
    for phrase, count in after.items():
        share, share_before = count / len(late), before[phrase] / len(early)
        pooled = (count + before[phrase]) / (len(late) + len(early))
        error = math.sqrt(max(1e-12, pooled * (1 - pooled) * (1 / len(late) + 1 / len(early))))
        rise = (share - share_before) / error
        if share >= limits.phrase_share and share >= limits.phrase_rise * share_before and rise > _SIGNIFICANT:
            risen.append((rise, phrase, share_before, share))
    risen.sort(key=lambda entry: (-entry[0], entry[1]))
    return [entry[1:] for entry in risen[:_CANDIDATES]]


def _named(patterns: list[Pattern]) -> list[Pattern]:
    """Of phrases that overlap in the same answers, the one that names the pattern: the most frequent, and the longest
    that is about as frequent.
    """

    def share(pattern: Pattern) -> float:
        return pattern.evidence["late"] or 0.0

    def inside(inner: Pattern, outer: Pattern) -> bool:
        return inner is not outer and f" {inner.detail} " in f" {outer.detail} "

    def overlaps(one: Pattern, other: Pattern) -> bool:
        together = len(set(one.shown_by) & set(other.shown_by))
        return not set(one.detail.split()).isdisjoint(other.detail.split()) and together >= 0.8 * len(one.shown_by)

    kept: list[Pattern] = []
    for pattern in sorted(patterns, key=lambda p: (-share(p), p.detail)):
        longer = any(inside(pattern, other) and share(other) >= 0.8 * share(pattern) for other in patterns)
        if not longer and not any(overlaps(pattern, other) for other in kept):
            kept.append(pattern)
    return kept


def _dependence(phrase: tuple[str, ...], late: Sequence[Answer]) -> float:
    """How much the phrase's share varies with what is asked: the largest gap between questions with and without one
    word, over words that divide the questions well enough to tell, and between domains.
    """
    has = [says(answer, phrase) for answer in late]
    traits = [{*answer.question.split(), f"\0{answer.domain}"} for answer in late]
    gaps = [0.0]
    for trait, count in Counter(trait for some in traits for trait in some).items():
        if not len(late) / 10 <= count <= len(late) * 9 / 10:
            continue
        inside = mean(float(shown) for shown, some in zip(has, traits) if trait in some)
        outside = mean(float(shown) for shown, some in zip(has, traits) if trait not in some)
        gaps.append(abs(inside - outside))
    return max(gaps)


def _document_counts(answers: Sequence[Answer], longest: int) -> Counter[tuple[str, ...]]:
    """In how many answers each phrase of up to `longest` words stands."""
    counts: Counter[tuple[str, ...]] = Counter()
    for answer in answers:
        for ngram in range(1, longest + 1):
            counts.update(set(ngrams(answer.words, ngram)))
    return counts
