"""The engine against a forward pass over whole sequences, and against itself at other batch sizes."""

import gc
import itertools
import weakref

import pytest
import torch

from internlm2.config import RopeScalingConfig
from internlm2.generation import Engine, SamplingParams
from internlm2.ops import dequantize_weight, quantize_weight
from tests.generation.conftest import some_prompts, tiny_model

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=14, stop_ids=(7, 8))
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, max_new_tokens=14, stop_ids=(7, 8), seed=3)


def forced_logits(model, ids):
    return model(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32)).detach().float()


def forced_logprobs(model, prompt, tokens):
    logprobs = forced_logits(model, prompt + tokens).log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]


def texts(completions):
    return [(completion.tokens, completion.finish) for completion in completions]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, SamplingParams(max_new_tokens=9, repetition_penalty=1.2, top_k=9)])
def test_logprobs_equal_a_forward_pass(model, prompts, params):
    for completion in Engine(model, max_rows=5).generate(prompts, params):
        expected = forced_logprobs(model, prompts[completion.prompt], completion.tokens)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


def test_greedy_takes_the_most_likely_token(model, prompts):
    for completion in Engine(model).generate(prompts, GREEDY):
        prompt = prompts[completion.prompt]
        best = forced_logits(model, prompt + completion.tokens).argmax(-1)[len(prompt) - 1 : -1]
        assert completion.tokens == best.tolist()
        assert completion.sampling_logprobs == [0.0] * len(completion.tokens)


def test_sampling_logprobs_are_those_of_the_tempered_distribution(model, prompts):
    params = SamplingParams(temperature=0.5, max_new_tokens=8)
    for completion in Engine(model).generate(prompts, params):
        prompt = prompts[completion.prompt]
        tempered = (forced_logits(model, prompt + completion.tokens)[len(prompt) - 1 : -1] / 0.5).log_softmax(-1)
        expected = tempered.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.sampling_logprobs), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED, SamplingParams(max_new_tokens=14, n=2, repetition_penalty=1.1)])
@pytest.mark.parametrize(("max_rows", "kv_tokens"), [(5, 65536), (64, 192)])
def test_any_batch_size_gives_the_tokens_of_one_by_one(prompts, dtype, params, max_rows, kv_tokens):
    """Bit for bit: the log-probabilities are equal as well, not only close."""
    model = tiny_model(dtype)
    alone = Engine(model, max_rows=1).generate(prompts, params)
    together = Engine(model, max_rows=max_rows, kv_tokens=kv_tokens, prefill_tokens=50).generate(prompts, params)
    assert texts(together) == texts(alone)
    assert [completion.logprobs for completion in together] == [completion.logprobs for completion in alone]


def test_neighbours_and_order_do_not_matter(model, prompts):
    whole = Engine(model, max_rows=4).generate(prompts, SAMPLED)
    chosen = [9, 2, 5]
    part = Engine(model).generate([prompts[index] for index in chosen], SAMPLED, row_ids=chosen)
    assert texts(part) == [texts(whole)[index] for index in chosen]


def test_seeds_rows_and_samples_differ(model):
    prompt = [5, 6, 9]
    params = SamplingParams(max_new_tokens=12, n=3)
    first = texts(Engine(model).generate([prompt, prompt], params))
    assert len({tuple(tokens) for tokens, _ in first}) == 6
    assert texts(Engine(model).generate([prompt, prompt], params)) == first
    other = SamplingParams(max_new_tokens=12, n=3, seed=1)
    assert texts(Engine(model).generate([prompt, prompt], other)) != first


def test_distribution_of_short_answers_is_exact():
    """Frequencies of all two-token answers against their enumerated probabilities (chi-square)."""
    model, prompt, draws = tiny_model(vocab_size=6, initializer_range=0.1), [1, 2], 3000
    for temperature, top_k in ((1.0, 0), (1.5, 4)):
        params = SamplingParams(temperature=temperature, top_k=top_k, max_new_tokens=2, n=draws, seed=11)
        answers = Engine(model, max_rows=512).generate([prompt], params)
        expected = torch.zeros(6, 6, dtype=torch.double)
        first = truncated(forced_logits(model, prompt)[-1], temperature, top_k)
        for token in range(6):
            expected[token] = first[token] * truncated(forced_logits(model, [*prompt, token])[-1], temperature, top_k)
        counts = torch.zeros(6, 6, dtype=torch.double)
        for answer in answers:
            counts[answer.tokens[0], answer.tokens[1]] += 1
        kept = expected > 0
        assert counts[~kept].sum() == 0
        statistic = ((counts - draws * expected)[kept] ** 2 / (draws * expected[kept])).sum()
        assert statistic < 66.6  # 35 degrees of freedom, 99.9 %


def truncated(logits, temperature, top_k):
    logits = logits.double() / temperature
    if top_k:
        logits[logits < logits.topk(top_k).values[-1]] = -float("inf")
    return logits.softmax(-1)


def test_rows_leave_and_enter(model, prompts):
    """Never more than max_rows at work, places are refilled at once, and each row ends by its own measure."""
    engine = Engine(model, max_rows=4)
    params = [SamplingParams(temperature=0.0, max_new_tokens=1 + index % 7) for index in range(len(prompts))]
    done = [engine.submit(prompt, each)[0] for prompt, each in zip(prompts, params)]
    steps = 0
    while engine.busy:
        before = sum(bool(completion.tokens) and completion.finish is None for completion in done)
        fresh = sum(not completion.tokens for completion in done)
        tokens = engine.step()
        steps += 1
        assert len(tokens) == (min(4 - before, fresh) if before < 4 and fresh else before)
    assert steps < sum(each.max_new_tokens for each in params) / 2
    assert [len(completion.tokens) for completion in done] == [each.max_new_tokens for each in params]
    expected = [Engine(model, max_rows=1).generate([prompt], each)[0] for prompt, each in zip(prompts, params)]
    assert texts(done) == texts(expected)


def test_a_late_prompt_enters_a_running_batch(model, prompts):
    engine = Engine(model, max_rows=8)
    early = [engine.submit(prompt, GREEDY)[0] for prompt in prompts[:3]]
    for _ in range(4):
        engine.step()
    late = engine.submit(prompts[3], GREEDY)[0]
    while engine.busy:
        engine.step()
    assert texts([*early, late]) == texts(Engine(model, max_rows=1).generate(prompts[:4], GREEDY))


def test_stop_ids_end_an_answer(model, prompts):
    free = Engine(model).generate(prompts, SamplingParams(temperature=0.0, max_new_tokens=14))
    stop = free[0].tokens[5]
    params = SamplingParams(temperature=0.0, max_new_tokens=14, stop_ids=(stop, 299))
    stopped = Engine(model).generate(prompts, params)
    assert stopped[0].finish == "stop"
    for before, after in zip(free, stopped):
        at = next((index for index, token in enumerate(before.tokens) if token in (stop, 299)), None)
        assert after.tokens == (before.tokens if at is None else before.tokens[: at + 1])
        assert after.finish == ("length" if at is None else "stop")


def test_samples_of_a_prompt_share_its_reading(model, prompts, monkeypatch):
    engine = Engine(model, max_rows=64)
    read = []
    prefill = engine.network.prefill
    monkeypatch.setattr(engine.network, "prefill", lambda ids, *rest: (read.append(len(ids)), prefill(ids, *rest))[1])
    params = SamplingParams(max_new_tokens=6, n=4)
    shared = engine.generate(prompts, params)
    assert sum(read) == sum(map(len, prompts))
    assert [(answer.prompt, answer.sample) for answer in shared] == list(itertools.product(range(12), range(4)))
    # Three rows at a time: a prompt's samples are admitted apart.
    assert texts(Engine(model, max_rows=3).generate(prompts, params)) == texts(shared)


def test_stream_gives_the_same_tokens_in_order(model, prompts):
    tokens = {}
    last = {}
    for token in Engine(model, max_rows=5).stream(prompts, SAMPLED):
        assert token.completion.prompt not in last, "a token after the end"
        tokens.setdefault(token.completion.prompt, []).append(token.token)
        assert token.completion.tokens == tokens[token.completion.prompt]
        if token.finish:
            last[token.completion.prompt] = token.finish
    assert [(tokens[index], last[index]) for index in range(12)] == texts(Engine(model).generate(prompts, SAMPLED))


def test_cache_stays_within_its_budget(model):
    engine = Engine(model, max_rows=16, kv_tokens=384)
    each = [SamplingParams(temperature=0.0, max_new_tokens=count) for count in (5, 200, 9, 60, 4, 90, 3, 3)]
    prompts = some_prompts(len(each), longest=40)
    done = [engine.submit(prompt, params)[0] for prompt, params in zip(prompts, each)]
    while engine.busy:
        engine.step()
        assert engine._cache.slots * engine._cache.capacity <= 384
    assert texts(done) == texts(
        [Engine(model, max_rows=1).generate([prompt], params)[0] for prompt, params in zip(prompts, each)]
    )


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_stretched_positions(kind, prompts):
    """Under dynamic NTK each row has a base of its own; the answer to a forward pass of the row's full length."""
    scaling = RopeScalingConfig(kind=kind, factor=2.0)
    model = tiny_model(rope_scaling=scaling, max_position_embeddings=24)
    params = [SamplingParams(temperature=0.0, max_new_tokens=8 + index) for index in range(len(prompts))]
    prompts = [prompt[:20] for prompt in prompts]
    together = Engine(model, max_rows=5).generate(prompts, params)
    for prompt, completion in zip(prompts, together):
        # The row's base is that of the longest sequence it may become; the last token is never read.
        ids = prompt + completion.tokens
        expected = forced_logits(model, ids[:-1]).log_softmax(-1)[len(prompt) - 1 :]
        got = expected.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), got, atol=1e-4, rtol=0)


def test_tied_embeddings(prompts):
    model = tiny_model(tie_embeddings=True)
    for completion in Engine(model).generate(prompts, GREEDY):
        expected = forced_logprobs(model, prompts[completion.prompt], completion.tokens)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


def test_refresh_takes_the_new_weights(prompts):
    model = tiny_model()
    engine = Engine(model)
    before = texts(engine.generate(prompts, GREEDY))
    other = tiny_model(seed=2)
    model.load_state_dict(other.state_dict())
    engine.refresh()
    after = texts(engine.generate(prompts, GREEDY))
    assert after == texts(Engine(other).generate(prompts, GREEDY))
    assert after != before


def test_released_weights_take_no_memory_and_come_back_with_a_refresh(prompts):
    engine = Engine(tiny_model())
    before = texts(engine.generate(prompts, GREEDY))
    packed = weakref.ref(engine.network.decoder)
    engine.release()
    engine.release()
    gc.collect()
    assert packed() is None
    with pytest.raises(RuntimeError, match="call refresh"):
        engine.generate(prompts, GREEDY)
    engine.refresh()
    assert texts(engine.generate(prompts, GREEDY)) == before


def test_what_cannot_be_generated_is_refused(model):
    engine = Engine(model, kv_tokens=256)
    with pytest.raises(ValueError, match="a prompt is empty"):
        engine.generate([[1], []], GREEDY)
    with pytest.raises(ValueError, match=r"prompt of 500 tokens.*limit of 512 tokens"):
        engine.generate([[1] * 500], GREEDY)
    with pytest.raises(ValueError, match="kv_tokens=256"):
        engine.generate([[1] * 400], GREEDY)
    with pytest.raises(ValueError, match="token 300, but the vocabulary has 300"):
        engine.generate([[1, 300, 2]], GREEDY)
    with pytest.raises(ValueError, match="must be equal"):
        engine.generate([[1], [2]], [GREEDY])
    assert not engine.busy
    assert engine.generate([], GREEDY) == []
    with pytest.raises(ValueError, match="quantize must be one of"):
        Engine(model, quantize="w3")
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        Engine(model, max_rows=0)
    with pytest.raises(ValueError, match="vocab_size must be at least 1"):
        Engine(model, vocab_size=0)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, SamplingParams(max_new_tokens=14, repetition_penalty=1.1)])
def test_rows_beyond_the_tokenizer_are_not_drawn(prompts, params):
    model = tiny_model()
    with torch.no_grad():  # what would be drawn first
        model.output_weight[-20:] = 2 * model.output_weight[:20]
    assert any(token >= 280 for answer in Engine(model).generate(prompts, params) for token in answer.tokens)
    for answer in Engine(model, vocab_size=280).generate(prompts, params):
        assert max(answer.tokens) < 280
        expected = forced_logprobs(model, prompts[answer.prompt], answer.tokens)
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=0)


def test_rows_in_flight_are_not_mixed_with_a_new_call(model):
    engine = Engine(model)
    engine.submit([1, 2], GREEDY)
    engine.step()
    with pytest.raises(RuntimeError, match="in flight"):
        engine.generate([[3]], GREEDY)
    engine.clear()
    assert len(engine.generate([[3]], GREEDY)) == 1


@pytest.mark.parametrize("quantize", ["w8", "w4"])
def test_quantized_weights(prompts, quantize):
    """The engine's log-probabilities are those of a model whose matrices were rounded in the same way."""
    model = tiny_model(hidden_size=128, intermediate_size=256)
    alone = Engine(model, max_rows=1, quantize=quantize).generate(prompts, SAMPLED)
    assert texts(Engine(model, max_rows=7, quantize=quantize).generate(prompts, SAMPLED)) == texts(alone)
    rounded = tiny_model(hidden_size=128, intermediate_size=256)
    with torch.no_grad():
        for name, weight in rounded.named_parameters():
            if weight.dim() == 2 and "tok_embeddings" not in name:
                bits = 8 if quantize == "w8" or name == "output.weight" else 4
                weight.copy_(dequantize_weight(quantize_weight(weight, bits=bits), torch.float32))
    errors, distances = [], []
    for answer in alone:
        got = torch.tensor(answer.logprobs)
        errors.append(got - forced_logprobs(rounded, prompts[answer.prompt], answer.tokens))
        distances.append(got - forced_logprobs(model, prompts[answer.prompt], answer.tokens))
    # What is left is the rounding of the activations to 8 bits.
    assert (
        torch.cat(errors).abs().mean() < (0.5 if quantize == "w4" else 1.0) * torch.cat(distances).abs().mean() + 0.02
    )


def test_an_adapter_must_be_merged_first():
    model = tiny_model()
    model.model.layers[0].attention.wo = torch.nn.Sequential(model.model.layers[0].attention.wo)
    with pytest.raises(ValueError, match="merge the adapter"):
        Engine(model)
