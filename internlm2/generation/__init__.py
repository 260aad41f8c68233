"""Generation: batches of prompts in, tokens with their log-probabilities out."""

from internlm2.generation.engine import Completion, Engine, Token
from internlm2.generation.parameters import SamplingParams

__all__ = ["Completion", "Engine", "SamplingParams", "Token"]
