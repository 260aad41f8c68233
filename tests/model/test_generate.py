"""Decoding with the cache against full forwards, and sampling."""

from dataclasses import replace

import pytest
import torch

from internlm2.config import RopeScalingConfig
from internlm2.model import CausalLM, generate, stream
from internlm2.model.generate import sample


@pytest.fixture
def model(tiny):
    return CausalLM.from_config(replace(tiny, initializer_range=0.2), dtype=torch.float64, seed=2)


PROMPTS = [[1, 5, 9], [1], [1, 7, 7, 30, 21, 4, 88], [1, 2]]


def by_full_forwards(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32))
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_full_forwards(model):
    outputs = generate(model, PROMPTS, max_new_tokens=12)
    assert outputs == [by_full_forwards(model, prompt, 12) for prompt in PROMPTS]
    assert len({token for output in outputs for token in output}) > 10


def test_cached_hidden_states_equal_full_forwards(model):
    ids = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
    full = model.model(ids, torch.tensor([0, 11], dtype=torch.int32))
    cache = model.model.new_cache([11])
    steps = [model.model.prefill(ids[:4], torch.tensor([0, 4], dtype=torch.int32), cache)]
    steps += [model.model.decode(ids[t : t + 1], cache) for t in range(4, 11)]
    torch.testing.assert_close(torch.cat(steps), full, rtol=1e-9, atol=1e-9)
    assert cache.lengths.tolist() == [11]


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_beyond_the_trained_length(tiny, kind):
    config = replace(tiny, max_position_embeddings=8, rope_scaling=RopeScalingConfig(kind, 2.0), initializer_range=0.2)
    model = CausalLM.from_config(config, dtype=torch.float64, seed=2)
    ids = torch.randint(131, (20,), generator=torch.Generator().manual_seed(0))
    full = model.model(ids, torch.tensor([0, 20], dtype=torch.int32))
    # A second, shorter row: under dynamic NTK the two rotate with different bases inside one batch.
    cache = model.model.new_cache([20, 7])
    model.model.prefill(torch.cat([ids[:5], ids[:3]]), torch.tensor([0, 5, 8], dtype=torch.int32), cache)
    for t in range(5, 9):
        hidden = model.model.decode(torch.stack([ids[t], ids[t - 2]]), cache)
    torch.testing.assert_close(hidden[0], full[8], rtol=1e-8, atol=1e-8)
    short = model.model(ids[:7], torch.tensor([0, 7], dtype=torch.int32))
    torch.testing.assert_close(hidden[1], short[6], rtol=1e-8, atol=1e-8)


def test_rows_stop_alone_and_neighbours_do_not_notice(model):
    alone = [generate(model, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    stop = alone[2][4]
    outputs = generate(model, PROMPTS, max_new_tokens=12, stop_ids={stop})
    for output, full in zip(outputs, alone):
        expected = full[: full.index(stop) + 1] if stop in full else full
        assert output == expected
    assert len(outputs[2]) <= 5


def test_a_row_draws_the_same_in_any_company(model):
    def generators(rows):
        return [torch.Generator().manual_seed(100 + row) for row in rows]

    together = generate(model, PROMPTS, max_new_tokens=8, temperature=1.0, top_p=0.9, generators=generators(range(4)))
    for row in range(4):
        alone = generate(
            model, [PROMPTS[row]], max_new_tokens=8, temperature=1.0, top_p=0.9, generators=generators([row])
        )
        assert alone == [together[row]]
    other = generate(model, PROMPTS, max_new_tokens=8, temperature=1.0, generators=generators(range(50, 54)))
    assert other != together


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(20000, 1)
    generator = torch.Generator().manual_seed(0)
    counts = sample(logits, 1.0, 1.0, [generator] * 20000).bincount(minlength=4) / 20000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.15, 0.05]), rtol=0, atol=0.012)
    # top_p 0.7 keeps {0.5, 0.3}: the smallest set that reaches it.
    counts = sample(logits, 1.0, 0.7, [generator] * 20000).bincount(minlength=4) / 20000
    torch.testing.assert_close(counts, torch.tensor([0.625, 0.375, 0.0, 0.0]), rtol=0, atol=0.012)
    counts = sample(logits, 0.5, 1.0, [generator] * 20000).bincount(minlength=4) / 20000
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(counts, squares / squares.sum(), rtol=0, atol=0.012)


def test_stream_yields_each_step(model):
    steps = list(stream(model, PROMPTS[:2], max_new_tokens=3))
    assert [[row for row, _ in step] for step in steps] == [[0, 1]] * 3
    assert [[step[row][1] for step in steps] for row in (0, 1)] == generate(model, PROMPTS[:2], max_new_tokens=3)


def test_sampling_leaves_training_as_it_was(model):
    generate(model, PROMPTS, max_new_tokens=2)
    loss, _ = model.loss(torch.tensor([1, 2]), torch.tensor([2, 3]), torch.tensor([0, 2], dtype=torch.int32))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bad_requests_are_refused(model):
    with pytest.raises(ValueError, match="empty"):
        generate(model, [[1], []], max_new_tokens=2)
    with pytest.raises(ValueError, match="generators"):
        generate(model, [[1]], max_new_tokens=2, temperature=1.0)
    with pytest.raises(ValueError, match="top_p"):
        generate(model, [[1]], max_new_tokens=2, top_p=0.0)
    assert generate(model, [], max_new_tokens=2) == []
    assert generate(model, [[1]], max_new_tokens=0) == [[]]
