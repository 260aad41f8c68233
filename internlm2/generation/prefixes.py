"""Prompts that begin alike are read once: which row copies how much from where before it reads the rest.

Tokens are shared in whole blocks, so that a row's bits do not depend on whether it copied or computed them (see
`internlm2.ops.prefill`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from internlm2.ops import PREFILL_BLOCK


@dataclass(frozen=True)
class Prompt:
    """Tokens, and the RoPE base that their keys are rotated with: under dynamic NTK long rows have one of their own."""

    ids: Sequence[int]
    base: float


@dataclass
class Reading:
    """How a prompt gets into its slot: the first `start` tokens are copied from slot `source`, the rest is read.

    wave  0: the source holds them already; w: it does once the prompts of wave w - 1 are read
    """

    slot: int
    source: int
    start: int
    wave: int


def common(left: Prompt, right: Prompt) -> int:
    """Tokens that two prompts begin with alike, in whole blocks."""
    if left.base != right.base:
        return 0
    a, b, length = left.ids, right.ids, 0
    most = min(len(a), len(b)) // PREFILL_BLOCK * PREFILL_BLOCK
    while length < most and a[length : length + PREFILL_BLOCK] == b[length : length + PREFILL_BLOCK]:
        length += PREFILL_BLOCK
    return length


def plan(prompts: Mapping[int, Prompt], held: Mapping[int, Prompt]) -> list[Reading]:
    """How to read `prompts` into their slots, where other slots hold prompts `held` that were read before.

    A slot that is about to be written is a source for nobody but itself. A prompt's last token is always read: its
    hidden state is what the first new token is drawn from.
    """
    # In this order the prompts that share most with one stand beside it: what it shares with an earlier one is the
    # least that neighbours between the two share.
    order = sorted(prompts, key=lambda slot: (prompts[slot].base, prompts[slot].ids))
    sources = {slot: prompt for slot, prompt in held.items() if slot not in prompts}
    readings: list[Reading] = []
    alike: list[int] = []  # with the one before
    for place, slot in enumerate(order):
        prompt = prompts[slot]
        most = (len(prompt.ids) - 1) // PREFILL_BLOCK * PREFILL_BLOCK
        best = Reading(slot, slot, min(most, common(held[slot], prompt)) if slot in held else 0, 0)
        for source, other in sources.items():
            if best.start < most and (shared := min(most, common(other, prompt))) > best.start:
                best = Reading(slot, source, shared, 0)
        alike.append(common(prompts[order[place - 1]], prompt) if place else 0)
        shared = most
        for earlier in range(place - 1, -1, -1):
            shared = min(shared, alike[earlier + 1])
            wave = readings[earlier].wave + 1
            if shared <= 0 or shared < best.start:
                break
            if shared > best.start or wave < best.wave:
                best = Reading(slot, order[earlier], shared, wave)
        readings.append(best)
    return readings
