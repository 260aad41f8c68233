"""Contexts that begin alike, as those of few-shot tasks do: which are scored together after one common trunk."""

from collections.abc import Sequence
from dataclasses import dataclass

# A trunk shorter than this is not worth the masked attention that members then need instead of the packed kernel.
LEAST_TRUNK = 64
# A member whose own tokens are more than this keeps the packed kernel: its mask would be larger than what it saves.
MOST_OWN = 2048


@dataclass(frozen=True)
class Family:
    """Indices of groups, and how many tokens the contexts of all of them have in common."""

    trunk: int
    members: list[int]


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens that two contexts begin with alike."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while high - low > 1:  # equal up to low, not up to high
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low


def families(contexts: Sequence[Sequence[int]], own: Sequence[int]) -> list[Family]:
    """Contexts by common beginnings; one that shares too little stands alone, its whole context its trunk.

    own  tokens of each one's continuations
    """
    found: list[Family] = []
    order = sorted(range(len(contexts)), key=lambda index: list(contexts[index]))
    for before, index in zip([None, *order], order):
        if before is not None:
            last, alike = found[-1], common(contexts[before], contexts[index])
            size, shared = len(last.members), min(last.trunk, alike)
            # What each way to go on saves: a family's trunk, once for each member but one.
            apart = last.trunk * (size - 1)
            joined = shared * size if shared >= LEAST_TRUNK else 0
            pair = last.trunk * (size - 2) + alike if size > 1 and alike >= LEAST_TRUNK else 0
            if joined and joined >= max(apart, pair) and _fits(shared, [*last.members, index], contexts, own):
                found[-1] = Family(shared, [*last.members, index])
                continue
            if pair > apart and _fits(alike, [before, index], contexts, own):
                rest = last.members[:-1]
                found[-1] = Family(last.trunk if len(rest) > 1 else len(contexts[rest[0]]), rest)
                found.append(Family(alike, [before, index]))
                continue
        found.append(Family(len(contexts[index]), [index]))
    return found


def _fits(trunk: int, members: Sequence[int], contexts: Sequence[Sequence[int]], own: Sequence[int]) -> bool:
    return all(len(contexts[member]) + own[member] - trunk <= MOST_OWN for member in members)


def passes(found: Sequence[Family], tokens: Sequence[int], most_tokens: int) -> list[list[Family]]:
    """Families in passes of at most `most_tokens` tokens (a longer single member stands alone); a large family is cut.

    tokens  of each member, its context and continuations together
    """
    batches: list[list[Family]] = []
    total = most_tokens + 1
    for family in found:
        fresh = True  # this family's trunk is not in the pass yet
        for member in family.members:
            more = tokens[member] - (0 if fresh else family.trunk)
            if total + more > most_tokens:
                batches.append([])
                total, fresh, more = 0, True, tokens[member]
            if fresh:
                batches[-1].append(Family(family.trunk, []))
            batches[-1][-1].members.append(member)
            total, fresh = total + more, False
    return batches
