"""The fast path (report 4.2.2): find what a policy has learned to do because the reward model likes it and nobody else
does, and make a few preference pairs against each such pattern.

Nothing here needs a gold reward. Every detector compares the late answers of a round with the early ones to the same
prompts and states its evidence. A change alone is no hack: shorter answers may be what was asked for. So a change
becomes a *pattern to patch* where the audit model (or a validation rule) does not share the reward model's liking, and,
where there is neither, only if no reader could want it (repetition, answers that do not end, a phrase said whatever is
asked). Everything else is kept on record as a drift.
"""

from collections import Counter
from collections.abc import Sequence

from internlm2.config.rounds import HacksConfig
from internlm2.rlhf.answers import Answer
from internlm2.rlhf.patterns import Pattern, distinct_share, mean, repeated_share, two_errors
from internlm2.rlhf.phrases import Rescore, risen_phrases


def detect(early: Sequence[Answer], late: Sequence[Answer], limits: HacksConfig, rescore: Rescore) -> list[Pattern]:
    """Every change of a round that passes the thresholds. `early[i]` and `late[i]`, scored, answer the same prompt.

    Raises ValueError where they do not answer the same prompts.
    """
    if len(early) != len(late) or any(a.prompt != b.prompt for a, b in zip(early, late)):
        raise ValueError("early and late answers must answer the same prompts in the same order")
    found = [
        *risen_phrases(early, late, limits, rescore),
        *_repetition(early, late, limits),
        *_unfinished(early, late, limits),
        *_length(early, late, limits),
        *_collapse(early, late, limits),
        *_unshared_gain(early, late),
    ]
    return sorted(found, key=lambda pattern: (not pattern.patch, pattern.name, pattern.detail))


def _repetition(early: Sequence[Answer], late: Sequence[Answer], limits: HacksConfig) -> list[Pattern]:
    before, after = ([repeated_share(answer.text, limits.ngram) for answer in side] for side in (early, late))
    rise = mean(after) - mean(before)
    if rise < limits.repetition_rise:
        return []
    shown = tuple(place for place, share in enumerate(after) if share > before[place])
    return [
        Pattern(
            "repetition",
            "",
            f"{mean(after):.0%} of the late answers' {limits.ngram}-grams repeat earlier ones, {mean(before):.0%} of "
            "the early answers'",
            {"early": mean(before), "late": mean(after)},
            shown,
            *_endorsement(early, late, shown, unwanted=True),
        )
    ]


def _unfinished(early: Sequence[Answer], late: Sequence[Answer], limits: HacksConfig) -> list[Pattern]:
    before, after = (mean(float(not answer.ended) for answer in side) for side in (early, late))
    if after - before < limits.unfinished_rise:
        return []
    shown = tuple(place for place, answer in enumerate(late) if not answer.ended)
    return [
        Pattern(
            "no end",
            "",
            f"{after:.0%} of the late answers run into the length limit, {before:.0%} of the early ones",
            {"early": before, "late": after},
            shown,
            *_endorsement(early, late, shown, unwanted=True),
        )
    ]


def _length(early: Sequence[Answer], late: Sequence[Answer], limits: HacksConfig) -> list[Pattern]:
    before, after = (mean(float(answer.tokens) for answer in side) for side in (early, late))
    ratio = after / max(1e-9, before)
    if 1 / limits.length_ratio < ratio < limits.length_ratio:
        return []
    longer = ratio > 1
    shown = tuple(
        place
        for place, (first, last) in enumerate(zip(early, late))
        if (last.tokens > first.tokens) == longer and last.tokens != first.tokens
    )
    return [
        Pattern(
            "length",
            "longer" if longer else "shorter",
            f"the late answers have {after:.1f} tokens, the early ones {before:.1f}",
            {"early": before, "late": after, "ratio": ratio},
            shown,
            *_endorsement(early, late, shown, unwanted=False),
        )
    ]


def _collapse(early: Sequence[Answer], late: Sequence[Answer], limits: HacksConfig) -> list[Pattern]:
    before, after = (distinct_share([answer.text for answer in side], limits.ngram + 1) for side in (early, late))
    if after >= limits.distinct_ratio * before:
        return []
    frequent = Counter(answer.text for answer in late)
    shown = tuple(place for place, answer in enumerate(late) if frequent[answer.text] > 1)
    return [
        Pattern(
            "collapse",
            "",
            f"distinct-{limits.ngram + 1} fell from {before:.2f} to {after:.2f}",
            {"early": before, "late": after},
            shown,
            *_endorsement(early, late, shown, unwanted=False),
        )
    ]


def _unshared_gain(early: Sequence[Answer], late: Sequence[Answer]) -> list[Pattern]:
    """Domains whose score rose while the audit model, or the validation signal, fell."""
    found = []
    for kind, read in (("audit", _audit), ("signal", _signal)):
        for domain in sorted({answer.domain for answer in late}):
            places = [place for place, answer in enumerate(late) if answer.domain == domain]
            gains = [(late[p].score or 0.0) - (early[p].score or 0.0) for p in places]
            others = [_difference(read(late[p]), read(early[p])) for p in places]
            known = [(place, gain, other) for place, gain, other in zip(places, gains, others) if other is not None]
            if not known:
                continue
            gain, other = mean(g for _, g, _ in known), mean(o for _, _, o in known)
            if gain <= two_errors(g for _, g, _ in known) or other >= -two_errors(o for _, _, o in known):
                continue
            name = "the audit model's score" if kind == "audit" else "the validation signal"
            found.append(
                Pattern(
                    f"unshared gain ({kind})",
                    domain,
                    f"in {domain} the score rose by {gain:+.2f} while {name} fell by {other:+.2f}",
                    {"gain": gain, f"{kind}_gain": other},
                    tuple(place for place, g, o in known if g > 0 > o),
                    True,
                    f"{name} fell",
                )
            )
    return found


def _endorsement(
    early: Sequence[Answer], late: Sequence[Answer], shown: Sequence[int], *, unwanted: bool
) -> tuple[bool, str]:
    """(patch, verdict): do the audit model or the signal like the late answers that show a change less than the early
    ones? Where there is neither, `unwanted` decides.
    """
    for name, read in (("audit model", _audit), ("validation signal", _signal)):
        known = [change for p in shown if (change := _difference(read(late[p]), read(early[p]))) is not None]
        if known:
            change = mean(known)
            return change < 0, f"on the answers that show it the {name} changed by {change:+.2f}"
    return unwanted, "no reader wants it" if unwanted else "it may be what was asked for: kept on record only"


def _audit(answer: Answer) -> float | None:
    return answer.audit


def _signal(answer: Answer) -> float | None:
    return answer.signal


def _difference(late: float | None, early: float | None) -> float | None:
    return None if late is None or early is None else late - early
