"""The final answer inside a worked solution: for evaluation suites and for rules that serve as a reward.

Pure text: what a solution's last word on a question is, and whether two such words name the same number.
"""

import re
from fractions import Fraction

# GSM8K ends a solution with "#### 1,234" (Cobbe et al. 2021); MATH and InternLM2's prompts with \boxed{...}.
_MARK = "####"
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?|-?\.\d+")
_SENTENCE = re.compile(r"(?:final answer|answer)\s*(?:is|:|=)\s*", re.IGNORECASE)


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} of `text`, braces inside it balanced; None where there is none."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len(r"\boxed{")
    for at in range(begin - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[begin:at].strip()
    return None


def numbers(text: str) -> list[str]:
    """Every number of `text` as it is written: 1,234 | -0.5 | 3/4. A sign counts where no digit stands before it."""
    found = []
    for match in _NUMBER.finditer(text):
        written = match[0]
        if written[0] == "-" and match.start() and text[match.start() - 1].isalnum():
            written = written[1:]  # 16-3: a difference, not a negative number
        found.append(written)
    return found


def final_number(text: str) -> str | None:
    r"""The number that a solution ends with: after the last ####, in the last \boxed{}, after the last "answer is",
    else the last number of all; None where there is no number.
    """
    if _MARK in text:
        after = numbers(text.rsplit(_MARK, 1)[1])
        return after[0] if after else None
    inside = boxed(text)
    if inside is not None and (found := numbers(inside)):
        return found[-1]
    said = list(_SENTENCE.finditer(text))
    if said and (found := numbers(text[said[-1].end() :])):
        return found[0]
    found = numbers(text)
    return found[-1] if found else None


def same_number(left: str | None, right: str | None) -> bool:
    """Do two written numbers have the same value? 1,234.0 and 1234 do; what is no number equals nothing."""
    values = [_value(text) for text in (left, right)]
    return None not in values and values[0] == values[1]


def _value(text: str | None) -> Fraction | None:
    if text is None:
        return None
    try:
        return Fraction(re.sub(r"[,\s$%]", "", text).rstrip("."))
    except (ValueError, ZeroDivisionError):
        return None
