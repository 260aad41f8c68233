"""vLLM as the sampler of rollouts, where it is installed. It is optional, and none of its code is needed otherwise.

The policy is handed over once as a folder in the Llama layout, which vLLM runs with its own kernels, and after each
update tensor by tensor. vLLM's arithmetic differs from the trainer's, so its drift is measured in every iteration, and
ppo.correction.weights=truncated corrects for it.
"""

import importlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from internlm2.config import ConfigError
from internlm2.generation.engine import Completion
from internlm2.generation.parameters import SamplingParams
from internlm2.model.export import export_weights
from internlm2.model.layouts import llama_shapes, split_wqkv
from internlm2.model.transformer import CausalLM
from internlm2.model.weights import Weights, model_weights
from internlm2.permutation import derive_key


class VLLMSampler:
    """`generate` and `refresh` as `internlm2.generation.Engine` has them.

    `model` is the policy with plain weights; `max_length` bounds prompt and answer together; ids below `vocab_size`
    are drawn. `sampling_logprobs` are
    those of the softmax at temperature 1, as `logprobs`: vLLM does not give those of the truncated distribution beside
    them. ConfigError where vLLM is not installed.
    """

    def __init__(self, model: CausalLM, max_length: int, vocab_size: int) -> None:
        self.vllm = _import()
        self.model = model
        self.allowed = list(range(vocab_size)) if vocab_size < model.config.vocab_size else None
        with tempfile.TemporaryDirectory(prefix="internlm2-vllm-") as folder:
            weights = model_weights(model)
            export_weights(weights, Path(folder) / "policy", layout="llama", dtype=weights.dtype)
            self.engine = self.vllm.LLM(
                model=str(Path(folder) / "policy"),
                dtype=str(weights.dtype).removeprefix("torch."),
                max_model_len=max_length,
                skip_tokenizer_init=True,  # it is given ids and gives ids back
                logprobs_mode="raw_logprobs",
                enable_prefix_caching=False,  # a cache would hold keys of weights that no longer exist
            )

    def refresh(self) -> None:
        """Load the policy's current weights into the running engine."""
        tensors = list(llama_tensors(model_weights(self.model)))
        self.engine.apply_model(lambda module: module.load_weights(tensors))

    def release(self) -> None:
        """vLLM keeps its own copy of the weights, and loads the next ones into it."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        row_ids: Sequence[int] | None = None,
    ) -> list[Completion]:
        """All answers, prompt by prompt; each has a seed of its own."""
        ids = range(len(prompts)) if row_ids is None else row_ids
        asked = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(params.n)]
        settings = [
            self.vllm.SamplingParams(
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k or -1,
                max_tokens=params.max_new_tokens,
                stop_token_ids=list(params.stop_ids),
                ignore_eos=True,  # the stop ids say what ends an answer
                logprobs=0,
                seed=derive_key(params.seed, ids[prompt], sample) >> 33,
                detokenize=False,
                allowed_token_ids=self.allowed,
            )
            for prompt, sample in asked
        ]
        inputs = [{"prompt_token_ids": list(prompts[prompt])} for prompt, _ in asked]
        outputs = self.engine.generate(inputs, settings, use_tqdm=False)
        return [self._completion(place, output, params) for place, output in zip(asked, outputs, strict=True)]

    def _completion(self, place: tuple[int, int], output: Any, params: SamplingParams) -> Completion:
        answer = output.outputs[0]
        tokens = list(answer.token_ids)
        logprobs = [float(step[token].logprob) for step, token in zip(answer.logprobs, tokens, strict=True)]
        finish = "stop" if tokens and tokens[-1] in params.stop_ids else "length"
        return Completion(place[0], place[1], tokens, logprobs, list(logprobs), finish)


def llama_tensors(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """The same tensors by their names in the Llama layout; wqkv in three."""
    for name, tensor in weights:
        names = list(llama_shapes(weights.config, name))
        parts = split_wqkv(tensor, weights.config) if len(names) == 3 else (tensor,)
        yield from zip(names, parts, strict=True)


def _import() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ConfigError(
            "ppo.rollout.engine=vllm needs vLLM, which is not installed: `pip install vllm` on a machine with a GPU, "
            "or use ppo.rollout.engine=internlm2."
        ) from error
