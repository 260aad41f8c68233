"""Rollouts: draws that depend on seed and place alone, log-probabilities that training computes again, long prompts."""

from dataclasses import replace

import pytest
import torch

from internlm2.config import ConfigError
from internlm2.config.ppo import PromptsConfig, PromptSourceConfig
from internlm2.data.prompts import PromptStream
from internlm2.generation.engine import Engine
from internlm2.generation.parameters import SamplingParams
from internlm2.model.transformer import CausalLM
from internlm2.rlhf.experience import each_token, plan, sequence_tokens
from internlm2.rlhf.losses import importance_weights
from internlm2.rlhf.measure import drift, sampler_logprobs
from internlm2.rlhf.rollout import collect, rollout_seed, take_questions
from internlm2.sources.toy_tokenizer import write_tokenizer
from internlm2.text.tokenizer import load_tokenizer
from tests.rlhf.tiny_policy import CONFIG


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model(tokenizer):
    return CausalLM.from_config(replace(CONFIG, vocab_size=tokenizer.vocab_size), seed=1, attention="reference")


@pytest.fixture(scope="module")
def stream():
    return PromptStream(PromptsConfig("toy", {"toy": PromptSourceConfig("toy", count=500)}, 0.1), 3)


def answers(model, tokenizer, questions, n=2, quantize="none", **changes):
    params = SamplingParams(
        max_new_tokens=8,
        stop_ids=(tokenizer.special_id("<|im_end|>"),),
        seed=rollout_seed(5, "rollout", 2),
        n=n,
        **changes,
    )
    sampler = Engine(model, quantize=quantize, vocab_size=tokenizer.vocab_size)
    return collect(sampler, questions, params, tokenizer)


def recomputed(model, rollouts, temperature=1.0):
    packs = plan([sequence_tokens(rollout) for rollout in rollouts], 200)
    return each_token(
        lambda row: model.logprobs(row.ids, row.cu_seqlens, row.max_seqlen, row.at, row.labels, temperature),
        rollouts,
        packs,
        "cpu",
    )[0]


def test_a_draw_depends_on_seed_iteration_and_place_alone(model, tokenizer, stream):
    questions, _ = take_questions(stream, 40, 6, tokenizer, 64)
    together = answers(model, tokenizer, questions)
    assert len(together) == 12
    for rank in range(2):
        mine = answers(model, tokenizer, questions[rank::2])
        wanted = [r for r in together if (r.question.position - 40) % 2 == rank]
        assert [r.tokens for r in mine] == [r.tokens for r in wanted]
    other = rollout_seed(5, "rollout", 3)
    assert other != rollout_seed(5, "rollout", 2)
    assert rollout_seed(5, "validation", 2) != rollout_seed(5, "rollout", 2)


def test_samples_of_one_prompt_differ(model, tokenizer, stream):
    questions, _ = take_questions(stream, 0, 4, tokenizer, 64)
    drawn = answers(model, tokenizer, questions, n=4)
    assert [rollout.sample for rollout in drawn[:4]] == [0, 1, 2, 3]
    assert len({tuple(rollout.tokens) for rollout in drawn[:4]}) > 1


def test_an_answer_holds_its_end_and_nothing_after_it(model, tokenizer, stream):
    questions, _ = take_questions(stream, 0, 24, tokenizer, 64)
    end = tokenizer.special_id("<|im_end|>")
    drawn = answers(model, tokenizer, questions, n=16)
    assert {rollout.finish for rollout in drawn} == {"stop", "length"}
    for rollout in drawn:
        assert end not in rollout.tokens[:-1]
        assert (rollout.tokens[-1] == end) == rollout.ended
        assert len(rollout.tokens) == len(rollout.logprobs)
        assert "<|im_end|>" not in rollout.reply.content


def test_training_computes_the_samplers_logprobs_again(model, tokenizer, stream):
    questions, _ = take_questions(stream, 0, 10, tokenizer, 64)
    drawn = answers(model, tokenizer, questions, top_p=0.9)
    again = recomputed(model, drawn)
    torch.testing.assert_close(again, sampler_logprobs(drawn, tempered=False), rtol=1e-5, atol=1e-5)
    assert drift(again, drawn, False, list)["kl"] < 1e-9


def test_a_policy_with_rows_beyond_its_tokenizer(tokenizer, stream):
    rows = tokenizer.vocab_size + 200
    padded = CausalLM.from_config(replace(CONFIG, vocab_size=rows), seed=1, attention="reference")
    questions, _ = take_questions(stream, 0, 10, tokenizer, 64)
    drawn = answers(padded, tokenizer, questions, n=4)
    assert max(max(rollout.tokens) for rollout in drawn) < tokenizer.vocab_size
    again = recomputed(padded, drawn)
    torch.testing.assert_close(again, sampler_logprobs(drawn, tempered=False), rtol=1e-5, atol=1e-5)


def test_temperature_divides_the_logits_of_sampler_and_trainer_alike(model, tokenizer, stream):
    questions, _ = take_questions(stream, 0, 10, tokenizer, 64)
    drawn = answers(model, tokenizer, questions, temperature=0.7)
    tempered = sampler_logprobs(drawn, tempered=True)
    torch.testing.assert_close(recomputed(model, drawn, 0.7), tempered, rtol=1e-5, atol=1e-5)
    assert (recomputed(model, drawn) - tempered).abs().max() > 0.01


def test_truncated_logprobs_differ_by_the_mass_of_the_nucleus(model, tokenizer, stream):
    questions, _ = take_questions(stream, 0, 10, tokenizer, 64)
    drawn = answers(model, tokenizer, questions, top_p=0.8)
    mass = (sampler_logprobs(drawn, tempered=False) - sampler_logprobs(drawn, tempered=True)).exp()
    assert (mass <= 1 + 1e-6).all()
    assert (mass >= 0.8 - 1e-6).all()
    weights = importance_weights(recomputed(model, drawn), sampler_logprobs(drawn, tempered=True), 2.0)
    torch.testing.assert_close(weights, mass, rtol=1e-4, atol=1e-4)


def test_rounded_weights_drift_and_are_corrected(model, tokenizer, stream):
    questions, _ = take_questions(stream, 0, 30, tokenizer, 64)
    drawn = answers(model, tokenizer, questions, n=4, quantize="w4")
    again = recomputed(model, drawn)
    assert drift(again, drawn, False, list)["kl"] > 1e-5
    # Weighted by pi / pi_sampler, a mean over the sampler's tokens is one over the policy's: the weights average 1.
    weights = importance_weights(again, sampler_logprobs(drawn, tempered=False), 1e9)
    assert weights.mean().item() == pytest.approx(1.0, abs=0.1)


def test_long_prompts_are_passed_over(tokenizer, stream):
    lengths = [len(q.ids) for q in take_questions(stream, 0, 60, tokenizer, 64)[0]]
    limit = sorted(lengths)[20]
    questions, position = take_questions(stream, 0, 10, tokenizer, limit)
    assert len(questions) == 10
    assert all(len(question.ids) <= limit for question in questions)
    assert position == questions[-1].position + 1
    assert position > 10
    with pytest.raises(ConfigError, match="max_prompt_tokens=2"):
        take_questions(stream, 0, 2, tokenizer, 2)
