"""Prompts that begin alike: what is read, and that nothing else changes."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.config import RopeScalingConfig
from internlm2.generation import Engine, SamplingParams
from internlm2.generation.prefixes import PREFILL_BLOCK, Prompt, plan
from tests.generation.conftest import tiny_model
from tests.generation.test_engine import forced_logprobs, texts

MODEL = tiny_model()
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=5, stop_ids=(7, 8))


def prompts_of(shape: list[tuple[int, int, int]], seed: int) -> list[list[int]]:
    """(parent, kept, new): so many tokens of an earlier prompt, and new ones; parent -1 has none."""
    draw = random.Random(seed)
    prompts: list[list[int]] = []
    for parent, kept, new in shape:
        old = prompts[parent % len(prompts)][:kept] if prompts and parent >= 0 else []
        prompts.append(old + [draw.randrange(300) for _ in range(new)])
    return prompts


TREES = st.lists(st.tuples(st.integers(-1, 5), st.integers(0, 260), st.integers(1, 150)), min_size=2, max_size=9)


def counted(engine: Engine) -> list[int]:
    read: list[int] = []
    prefill = engine.network.prefill
    engine.network.prefill = lambda ids, *rest: (read.append(len(ids)), prefill(ids, *rest))[1]
    return read


@settings(max_examples=25, deadline=None)
@given(shape=TREES, rows=st.integers(1, 9), passes=st.sampled_from([60, 4096]), seed=st.integers(0, 9))
def test_answers_are_those_of_each_prompt_alone_to_the_bit(shape, rows, passes, seed):
    prompts = prompts_of(shape, seed)
    engine = Engine(MODEL, max_rows=rows, prefill_tokens=passes, max_length=4096)
    together = engine.generate(prompts, GREEDY)
    alone = [Engine(MODEL, max_rows=1, max_length=4096).generate([prompt], GREEDY)[0] for prompt in prompts]
    assert texts(together) == texts(alone)
    for prompt, answer, expected in zip(prompts, together, alone):
        assert answer.logprobs == expected.logprobs
        forced = forced_logprobs(MODEL, prompt, answer.tokens)
        torch.testing.assert_close(torch.tensor(answer.logprobs), forced, atol=1e-4, rtol=0)


@settings(max_examples=60, deadline=None)
@given(shape=TREES, held=st.integers(0, 5), seed=st.integers(0, 9))
def test_a_plan_copies_what_is_there_and_as_much_as_there_is(shape, held, seed):
    everything = [Prompt(ids, 1.0) for ids in prompts_of(shape, seed)]
    # Slots 0..held - 1 hold old prompts; new ones go into slots that overlap with these.
    old = dict(enumerate(everything[:held]))
    new = {max(0, held - 2) + number: prompt for number, prompt in enumerate(everything[held:])}
    readings = plan(new, old)
    assert sorted(reading.slot for reading in readings) == sorted(new)
    waves = {reading.slot: reading.wave for reading in readings}
    usable = {slot: prompt for slot, prompt in old.items() if slot not in new}
    for reading in readings:
        prompt = new[reading.slot].ids
        assert 0 <= reading.start < len(prompt)
        if reading.start:
            if reading.wave == 0:
                assert reading.source in usable or reading.source == reading.slot
                there = old[reading.source].ids
            else:
                assert waves[reading.source] == reading.wave - 1
                there = new[reading.source].ids
            assert there[: reading.start] == prompt[: reading.start]
            assert reading.start % PREFILL_BLOCK == 0
    # Each block of tokens at its place is read at most once, and not at all where a usable slot holds it.
    seen: set[tuple[int, ...]] = set()
    for prompt in usable.values():
        seen |= {tuple(prompt.ids[:end]) for end in range(PREFILL_BLOCK, len(prompt.ids) + 1, PREFILL_BLOCK)}
    for reading in sorted(readings, key=lambda reading: reading.wave):
        ids = new[reading.slot].ids
        for end in range(reading.start + PREFILL_BLOCK, len(ids), PREFILL_BLOCK):
            assert tuple(ids[:end]) not in seen, "read although it was there"
            seen.add(tuple(ids[:end]))


def test_examples_before_questions_are_read_once():
    """Also for prompts that enter later, after all before them have left, and in a later call."""
    draw = random.Random(1)
    examples = [draw.randrange(300) for _ in range(4 * PREFILL_BLOCK + 11)]
    prompts = [examples + [draw.randrange(300) for _ in range(20)] for _ in range(8)]
    for rows in (1, 3, 8):
        engine = Engine(MODEL, max_rows=rows)
        read = counted(engine)
        engine.generate(prompts, GREEDY)
        assert sum(read) == len(prompts[0]) + 7 * (11 + 20)
        engine.generate(prompts[:1], GREEDY)
        assert read[-1] <= 11 + 20
    engine.refresh()  # other weights, perhaps: nothing is kept
    engine.generate(prompts[:1], GREEDY)
    assert read[-1] == len(prompts[0])


def test_samples_and_penalties_beside_shared_beginnings():
    prompts = prompts_of([(-1, 0, 120), (0, 100, 9), (0, 96, 30), (1, 60, 50)], 3)
    params = SamplingParams(max_new_tokens=6, n=3, repetition_penalty=1.2, seed=5)
    alone = Engine(MODEL, max_rows=1).generate(prompts, params)
    for rows in (2, 5, 12):
        assert texts(Engine(MODEL, max_rows=rows).generate(prompts, params)) == texts(alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dynamic_ntk_shares_only_between_rows_of_one_rotation(dtype):
    """Rows beyond the trained length have a base of their own, whatever they begin with."""
    model = tiny_model(dtype, rope_scaling=RopeScalingConfig(kind="dynamic", factor=2.0), max_position_embeddings=128)
    prompts = prompts_of([(-1, 0, 100), (0, 96, 10), (0, 96, 70), (2, 150, 20), (0, 96, 70)], 2)
    together = Engine(model, max_rows=5).generate(prompts, GREEDY)
    alone = [Engine(model, max_rows=1).generate([prompt], GREEDY)[0] for prompt in prompts]
    assert texts(together) == texts(alone)
    assert [answer.logprobs for answer in together] == [answer.logprobs for answer in alone]


def test_the_cache_shrinks_and_grows_under_what_it_holds():
    prompts = prompts_of([(-1, 0, 200), (0, 190, 9), (0, 190, 400), (2, 300, 30), (0, 150, 5), (2, 590, 3)], 4)
    engine = Engine(MODEL, max_rows=6, kv_tokens=1400, max_length=2048)
    for order in ((0, 1, 2), (3, 4), (5, 0, 1, 2, 3, 4), (2,), (1, 4, 0)):
        chosen = [prompts[index] for index in order]
        expected = [
            Engine(MODEL, max_rows=1, max_length=2048).generate([prompt], GREEDY, row_ids=[index])[0]
            for index, prompt in zip(order, chosen)
        ]
        assert texts(engine.generate(chosen, GREEDY, row_ids=order)) == texts(expected)
