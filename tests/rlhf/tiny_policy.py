"""A policy that is small enough for float64, answers of it, and prompts that name domains."""

import random

import torch

from internlm2.config import ModelConfig, RopeScalingConfig
from internlm2.data.prompts import Prompt
from internlm2.model.scalar import ScalarModel
from internlm2.model.transformer import CausalLM
from internlm2.rlhf.rollout import Question, Rollout
from internlm2.text.chat import Message

CONFIG = ModelConfig(
    name="tiny",
    vocab_size=50,
    hidden_size=32,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=16,
    intermediate_size=48,
    norm_eps=1e-5,
    rope_base=10000.0,
    rope_scaling=RopeScalingConfig("none", 1.0),
    max_position_embeddings=128,
    initializer_range=0.3,  # wide: the next token depends on all that came before
    tie_embeddings=False,
    pretrain_batch_tokens=64,
)


def policy(seed: int = 0, dtype: torch.dtype = torch.float64) -> CausalLM:
    return CausalLM.from_config(CONFIG, seed=seed, dtype=dtype, attention="reference")


def critic(seed: int = 0, dtype: torch.dtype = torch.float64) -> ScalarModel:
    return ScalarModel.from_config(CONFIG, seed=seed, dtype=dtype, attention="reference")


def rollouts(count: int, seed: int = 0, longest: int = 9) -> list[Rollout]:
    """Answers of random tokens, of 1 to `longest` tokens."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        ids = [draw.randrange(CONFIG.vocab_size) for _ in range(draw.randint(1, longest))]
        tokens = [draw.randrange(CONFIG.vocab_size) for _ in range(draw.randint(1, longest))]
        logprobs = [-draw.random() for _ in tokens]
        prompt = Prompt((Message("user", f"question {number}"),), ("math", "talk")[number % 2], {}, "test")
        finish = "stop" if draw.random() < 0.7 else "length"
        made.append(Rollout(Question(number, prompt, ids), 0, tokens, logprobs, logprobs, finish))
    return made
