"""Prompts for online RLHF that every machine has: what does this function do? The docstring is kept as `answer`, for
rules that compare with it.
"""

from functools import lru_cache
from typing import Any

from internlm2.data.encoding import split_hash
from internlm2.permutation import derive_key, permute
from internlm2.sources.docstring_questions import documents

# Share of the modules whose questions are for validation; those of `data.validation_fraction` in the data of the stages
# before are among them.
HELD_OUT = 0.04
DOMAIN = "code"


def prompt_record(seed: int, split: str, index: int) -> dict[str, Any]:
    """{prompt, domain, answer}: question `index` of a split, in an order of the seed that begins again at its end."""
    questions = _questions(split == "validation")
    epoch, place = divmod(index, len(questions))
    asked, answer = questions[permute(place, len(questions), derive_key(seed, "docstring prompts", epoch))]
    return {"prompt": asked, "domain": DOMAIN, "answer": answer}


@lru_cache(maxsize=2)
def _questions(held_out: bool) -> tuple[tuple[str, str], ...]:
    """(question, docstring) on one side of the hold-out, by module."""
    limit = int(HELD_OUT * 2.0**64)
    return tuple(
        (document.messages[0].content, document.messages[1].content)
        for document in documents("questions")
        if document.messages is not None and (split_hash((document.split_key or "").encode()) < limit) == held_out
    )
