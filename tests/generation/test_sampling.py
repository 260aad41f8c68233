"""What can be drawn, and how often, against transformers' processors and against exact distributions."""

import pytest
import torch

from internlm2.generation import SamplingParams
from internlm2.generation.sampling import sample


def logits_of(size: int, *, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def sweep(logits, params, points=4001, seen=None, vocab_size=None):
    """Draws with evenly spaced uniform numbers: tokens, and each token's two log-probabilities."""
    uniforms = [(i + 0.5) / points for i in range(points)]
    rows = logits.expand(points, -1)
    rows_seen = None if seen is None else seen.expand(points, -1)
    return sample(rows, [params] * points, uniforms, rows_seen, vocab_size=vocab_size)


def transformers_scores(logits, params, prompt):
    from transformers import LogitsProcessorList
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    steps = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1.0:
        steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    return steps(torch.tensor([prompt]), logits[None].clone())[0].log_softmax(-1)


CUTS = {
    "plain": SamplingParams(),
    "temperature": SamplingParams(temperature=0.7),
    "hot": SamplingParams(temperature=1.9),
    "top_k": SamplingParams(top_k=5),
    "top_k of all": SamplingParams(top_k=100000),
    "top_k beyond the first candidates": SamplingParams(top_k=200),
    "top_p": SamplingParams(top_p=0.8),
    "tiny top_p": SamplingParams(top_p=1e-6),
    "wide top_p": SamplingParams(top_p=0.999, temperature=1.7),
    "min_p": SamplingParams(min_p=0.1),
    "min_p of 1": SamplingParams(min_p=1.0),
    "top_k then top_p": SamplingParams(top_k=20, top_p=0.6),
    "all": SamplingParams(temperature=1.3, top_k=30, top_p=0.95, min_p=0.02, repetition_penalty=1.2),
    "penalty": SamplingParams(repetition_penalty=1.4),
    "reward": SamplingParams(repetition_penalty=0.7),
}


@pytest.mark.parametrize("size", [37, 1500])
@pytest.mark.parametrize("name", CUTS)
def test_distribution_is_that_of_transformers(name, size):
    params, logits, prompt = CUTS[name], logits_of(size, seed=size), [1, 4, 4, 9, 30]
    expected = transformers_scores(logits, params, prompt)
    seen = torch.zeros(size, dtype=torch.bool)
    seen[prompt] = True
    drawn = sweep(logits, params, seen=seen)
    torch.testing.assert_close(drawn.sampling_logprobs, expected[drawn.tokens], atol=2e-5, rtol=0)
    torch.testing.assert_close(drawn.logprobs, logits.log_softmax(-1)[drawn.tokens], atol=2e-5, rtol=0)
    # Evenly spaced numbers hit each token in proportion to its probability, to one point at each end of its interval.
    counts = torch.bincount(drawn.tokens, minlength=size)
    assert (counts - 4001 * expected.exp()).abs().max() <= 1.01
    assert set(drawn.tokens.tolist()) <= set(torch.isfinite(expected).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "temperature", "top_k of all", "top_p", "min_p", "penalty"])
def test_ids_beyond_the_vocabulary_have_no_part_in_the_draw(name, dtype):
    """As where their logits are -inf; only `logprobs` stay those of the whole softmax, which training computes."""
    params, logits, prompt = CUTS[name], logits_of(1500).to(dtype), [1, 4, 4, 9, 30]
    logits[1400:] += 5.0
    masked = logits.float().clone()
    masked[1400:] = -float("inf")
    seen = torch.zeros(1500, dtype=torch.bool)
    seen[prompt] = True
    drawn = sweep(logits, params, seen=seen, vocab_size=1400)
    expected = transformers_scores(masked, params, prompt)
    torch.testing.assert_close(drawn.sampling_logprobs, expected[drawn.tokens], atol=2e-5, rtol=0)
    torch.testing.assert_close(drawn.logprobs, logits.float().log_softmax(-1)[drawn.tokens], atol=2e-5, rtol=0)
    counts = torch.bincount(drawn.tokens, minlength=1500)
    assert (counts - 4001 * expected.exp()).abs().max() <= 1.01
    assert counts[1400:].sum() == 0


def test_greedy_and_sampled_rows_side_by_side():
    logits = torch.stack([logits_of(300, seed=seed) for seed in range(6)])
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(top_p=0.5),
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=3, temperature=0.5),
        SamplingParams(min_p=0.3),
    ]
    uniforms = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    together = sample(logits, params, uniforms)
    for row in range(6):
        alone = sample(logits[row : row + 1], params[row : row + 1], uniforms[row : row + 1])
        assert alone.tokens[0] == together.tokens[row]
        assert alone.logprobs[0] == together.logprobs[row]
        assert alone.sampling_logprobs[0] == together.sampling_logprobs[row]
    assert together.tokens[0] == logits[0].argmax()
    assert together.sampling_logprobs[0] == 0.0
    assert torch.allclose(together.logprobs[0], logits[0].log_softmax(-1).max(), rtol=1e-6)


def test_ties_do_not_depend_on_neighbours():
    """bfloat16 logits tie often; a neighbour that needs more candidates must not change the order of mine."""
    tied = logits_of(3000, spread=1.0).bfloat16()
    flat = torch.zeros(3000).bfloat16()
    narrow, wide = SamplingParams(top_k=40), SamplingParams(top_p=0.99)
    for number in torch.linspace(0, 0.999, 50).tolist():
        alone = sample(tied[None], [narrow], [number]).tokens[0]
        assert alone == sample(torch.stack([flat, tied]), [wide, narrow], [0.5, number]).tokens[1]


@pytest.mark.parametrize("number", [0.0, 1.0 - 2.0**-53])
@pytest.mark.parametrize("name", ["plain", "top_k", "top_p", "min_p"])
def test_the_ends_of_the_interval_draw_possible_tokens(name, number):
    logits = logits_of(700)
    logits[[0, 1, 2, -3, -2, -1]] = -float("inf")
    drawn = sample(logits[None], [CUTS[name]], [number])
    assert torch.isfinite(logits[drawn.tokens[0]])
    assert torch.isfinite(drawn.sampling_logprobs[0])


def test_frequencies_match_the_exact_distribution():
    """Chi-square of 20,000 draws with the engine's own numbers."""
    from internlm2.generation.uniform import uniform

    logits, draws = logits_of(12, spread=1.0), 20000
    for params in (SamplingParams(), SamplingParams(temperature=0.6, top_k=7), SamplingParams(top_p=0.7)):
        expected = transformers_scores(logits, params, [0]).exp()
        drawn = sample(logits.expand(draws, -1), [params] * draws, [uniform(1, row, 0, 5) for row in range(draws)])
        counts = torch.bincount(drawn.tokens, minlength=12).double()
        kept = expected > 0
        assert counts[~kept].sum() == 0
        statistic = ((counts[kept] - draws * expected[kept]) ** 2 / (draws * expected[kept])).sum()
        assert statistic < 31.3  # 11 degrees of freedom, 99.9 %
