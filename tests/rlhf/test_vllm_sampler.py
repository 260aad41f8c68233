"""The vLLM seam against a stand-in for the package: what it is given, and what comes back."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from internlm2.config import ConfigError
from internlm2.generation.parameters import SamplingParams
from internlm2.rlhf.vllm_sampler import VLLMSampler
from tests.rlhf.tiny_policy import policy


@dataclass
class FakeSamplingParams:
    """Keeps its arguments under their names, as vLLM's does."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    logprobs: int
    seed: int
    detokenize: bool
    allowed_token_ids: list[int] | None


@dataclass
class FakeLLM:
    """Answers with the prompt's last token and a stop id; its model is transformers' Llama read from the folder."""

    model: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __init__(self, model: str, **settings: Any) -> None:
        self.settings = settings
        self.network = AutoModelForCausalLM.from_pretrained(Path(model), dtype=torch.float32)

    def generate(self, inputs, settings, use_tqdm):
        self.seen = settings
        outputs = []
        for given in inputs:
            tokens = [given["prompt_token_ids"][-1], 7]
            steps = [{token: SimpleNamespace(logprob=-0.5 * token)} for token in tokens]
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=steps)]))
        return outputs

    def apply_model(self, function):
        names = dict(self.network.named_parameters())

        def load_weights(tensors):
            with torch.no_grad():
                for name, tensor in tensors:
                    names[name].copy_(tensor)

        function(SimpleNamespace(load_weights=load_weights))


@pytest.fixture
def sampler(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, FakeSamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    model = policy(dtype=torch.float32)
    return VLLMSampler(model, 64, 50), model


def agree(sampler, model):
    ids = torch.tensor([3, 9, 27, 31])
    theirs = sampler.engine.network(ids[None]).logits[0]
    return torch.allclose(model(ids, torch.tensor([0, 4], dtype=torch.int32)), theirs, atol=1e-4)


@torch.no_grad()
def test_it_runs_the_policys_weights_before_and_after_an_update(sampler):
    sampler, model = sampler
    assert agree(sampler, model)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    assert not agree(sampler, model)
    sampler.refresh()
    assert agree(sampler, model)


def test_every_answer_has_its_own_seed_and_comes_back_in_order(sampler):
    sampler, _ = sampler
    params = SamplingParams(temperature=0.7, top_p=0.9, max_new_tokens=5, stop_ids=(7,), seed=11, n=2)
    answers = sampler.generate([[1, 2], [3, 4]], params, row_ids=[70, 71])
    assert [(a.prompt, a.sample, a.tokens, a.finish) for a in answers] == [
        (0, 0, [2, 7], "stop"),
        (0, 1, [2, 7], "stop"),
        (1, 0, [4, 7], "stop"),
        (1, 1, [4, 7], "stop"),
    ]
    assert answers[2].logprobs == [-2.0, -3.5]
    seeds = [settings.seed for settings in sampler.engine.seen]
    assert len(set(seeds)) == 4
    sampler.generate([[3, 4]], params, row_ids=[71])
    assert [settings.seed for settings in sampler.engine.seen] == seeds[2:]  # whatever is drawn beside it
    first = sampler.engine.seen[0]
    assert (first.temperature, first.top_p, first.top_k, first.max_tokens, first.stop_token_ids) == (
        0.7,
        0.9,
        -1,
        5,
        [7],
    )
    assert first.allowed_token_ids is None


def test_rows_beyond_the_tokenizer_are_not_drawn(sampler):
    padded = VLLMSampler(sampler[1], 64, 40)
    padded.generate([[1, 2]], SamplingParams())
    assert padded.engine.seen[0].allowed_token_ids == list(range(40))


def test_without_vllm_it_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="pip install vllm"):
        VLLMSampler(policy(dtype=torch.float32), 64, 50)
