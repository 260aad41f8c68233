"""A few preference pairs against each pattern, from the answers of a round's early and late checkpoints
(report 4.2.2: 20 to 100 pairs are enough to stop one).
"""

from collections.abc import Callable, Sequence
from typing import Any

from internlm2.config.rounds import HacksConfig
from internlm2.rlhf.answers import Answer, messages_record
from internlm2.rlhf.patterns import Pattern, ngrams, repeated_share
from internlm2.rlhf.phrases import says, without_phrase


def patches(
    pattern: Pattern, early: Sequence[Answer], late: Sequence[Answer], limits: HacksConfig
) -> list[dict[str, Any]]:
    """At most `most_pairs` preference records against a pattern, from the late answers that score highest with it.

    Two kinds: `checkpoints` prefers the early answer to the same prompt, if that does not show the pattern; `edited`
    prefers the late answer with the pattern taken out, so that nothing else differs.
    """
    wanted = limits.most_pairs
    places = sorted(pattern.shown_by, key=lambda place: (-(late[place].score or 0.0), place))
    edited, contrasted = [], []
    for place in places:
        text = _edit(late[place].text, pattern, limits)
        if text.strip() and text != late[place].text:
            edited.append(_record(pattern, late[place], text, "edited"))
        if _better(pattern, early[place], late[place], limits):
            contrasted.append(_record(pattern, late[place], early[place].text, "checkpoints"))
    first = min(len(edited), max(round(limits.edited_share * wanted), wanted - len(contrasted)))
    return [*edited[:first], *contrasted[: wanted - first]]


def _better(pattern: Pattern, early: Answer, late: Answer, limits: HacksConfig) -> bool:
    """Can the early answer stand as the better one: is it another text, not empty, and free of the pattern?"""
    if early.text == late.text or not early.text.strip():
        return False
    if pattern.name == "phrase":
        return not says(early, tuple(pattern.detail.split()))
    if pattern.name == "repetition":
        return repeated_share(early.text, limits.ngram) < repeated_share(late.text, limits.ngram)
    return early.ended or pattern.name != "no end"


def _edit(text: str, pattern: Pattern, limits: HacksConfig) -> str:
    """The text without the pattern; unchanged where a pattern cannot be taken out of a text."""
    edit = _EDITS.get(pattern.name)
    return text if edit is None else " ".join(edit(text.split(), pattern, limits))


def _cut_phrase(words: list[str], pattern: Pattern, limits: HacksConfig) -> list[str]:
    return without_phrase(words, tuple(pattern.detail.split()))


def _cut_repetitions(words: list[str], pattern: Pattern, limits: HacksConfig) -> list[str]:
    """Every word of an n-gram that was said before is left out."""
    seen: set[tuple[str, ...]] = set()
    repeated: set[int] = set()
    for start, gram in enumerate(ngrams(words, limits.ngram)):
        if gram in seen:
            repeated.update(range(start, start + limits.ngram))
        seen.add(gram)
    return [word for place, word in enumerate(words) if place not in repeated]


_EDITS: dict[str, Callable[[list[str], Pattern, HacksConfig], list[str]]] = {
    "phrase": _cut_phrase,
    "repetition": _cut_repetitions,
}


def _record(pattern: Pattern, late: Answer, chosen: str, made: str) -> dict[str, Any]:
    return {
        "prompt": messages_record(late.prompt),
        "chosen": chosen,
        "rejected": late.text,
        "domain": late.domain,
        "pattern": " ".join(filter(None, (pattern.name, pattern.detail))),
        "made": made,
    }
