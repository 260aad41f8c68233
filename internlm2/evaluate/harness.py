"""EleutherAI's lm-evaluation-harness on our checkpoints, with shared contexts scored once and continuous batching.

    pip install 'internlm2[evaluate]'
    python -m internlm2.evaluate.lm_eval --model internlm2 --model_args path=runs/demo/enhance --tasks my_task
    python -m internlm2.evaluate.lm_eval --model internlm2 --model_args path=smollm2,dtype=fp32 --tasks gsm8k_cot

The arguments are those of `lm_eval`, which has no way to find models of other packages by itself; a program that calls
`lm_eval.simple_evaluate(model="internlm2", ...)` imports this module first. `path` is whatever
`python -m internlm2.evaluate` takes. What is counted, where texts are cut and what is decoded follow the harness's own
`hf` backend, so that figures are comparable: a test holds them equal.
"""

from collections.abc import Sequence
from typing import Any

import lm_eval.models  # noqa: F401  its own models, which it forgets where another was registered first
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from internlm2.config import ConfigError
from internlm2.config.compose import compose_evaluation
from internlm2.evaluate.scoring import Group, score
from internlm2.evaluate.subject import Subject, load_subject
from internlm2.evaluate.writing import Written, write
from internlm2.generation import SamplingParams
from internlm2.text.chat import Message, render_text

NEW_TOKENS = 256  # where a task does not say: the hf backend's own default
# Keys of a task's generation_kwargs that change what is drawn, by our names.
_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
_IGNORED = {"do_sample", "until", "max_gen_toks", "max_new_tokens", "max_tokens", "num_beams", "num_return_sequences"}


@register_model("internlm2")
class InternLM2Harness(TemplateLM):
    """A run, checkpoint or export as a model of the harness.

    path        what to evaluate
    max_length  longest context + continuation; default: what the model was trained to
    others      keys of conf/evaluate.yaml, such as dtype=fp32, threads=2, batch_tokens=16384, tokenizer=FOLDER
    """

    def __init__(
        self,
        path: str,
        max_length: int | str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **keys: Any,
    ) -> None:
        super().__init__()
        if keys.get("device") in (None, "None"):
            keys.pop("device", None)
        device = str(keys.pop("device", "auto")).split(":")[0]
        overrides = [f"{key}={value}" for key, value in keys.items()]
        config = compose_evaluation([f"device={device}", *overrides])
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.subject: Subject = load_subject(str(path), config)
        self.max_length = int(max_length or self.subject.trained_to)

    @property
    def eot_token_id(self) -> int:
        return self.subject.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.subject.tokenizer.bos_id

    @property
    def max_gen_toks(self) -> int:
        return NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """Part of the harness's cache keys."""
        return self.subject.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids with `<s>` in front, unless told otherwise; markers in the text (chat templates) become their ids."""
        ids = self.subject.tokenizer.encode(string, allow_special=True)
        return ids if add_special_tokens is False else [*self.subject.first_ids(), *ids]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """ChatML without `<s>`, which encoding adds. Without a generation prompt the last turn stays open."""
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]
        text = render_text(messages, generation_prompt=add_generation_prompt, bos="")
        return text if add_generation_prompt else text.removesuffix("<|im_end|>\n")

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Sum of log-probabilities and greediness of each continuation. Equal contexts are computed once."""
        places: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise ConfigError(
                    f"a continuation of {len(continuation)} tokens exceeds max_length={self.max_length}: raise it."
                )
            places.setdefault(tuple(context[-room:]), []).append(number)
        groups = [
            Group(list(context), [requests[number][2] for number in numbers]) for context, numbers in places.items()
        ]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        scored = score(self.subject.model, groups, batch_tokens=self.subject.batch_tokens)
        for numbers, scores in zip(places.values(), scored, strict=True):
            for number, one in zip(numbers, scores, strict=True):
                found[number] = (one.total, one.greedy)
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows that do not overlap."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for request in requests:
            rolled = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            mine = [(None, *make_disjoint_window(window)) for window in rolled]
            windows += mine
            counts.append(len(mine))
        values = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(values)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to their stop texts; requests with the same settings run together."""
        found = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(number)
        for numbers in alike.values():
            for number, text in zip(numbers, self._write([requests[number].args for number in numbers]), strict=True):
                found[number] = text.text
                self.cache_hook.add_partial("generate_until", requests[number].args, text.text)
        return found

    def _write(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[Written]:
        """Requests whose settings are alike."""
        settings = dict(requests[0][1])
        until = settings.get("until") or []
        new = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or NEW_TOKENS)
        if self.max_length - new < 1:
            raise ConfigError(f"a task asks for {new} new tokens, but max_length={self.max_length}.")
        params = SamplingParams(max_new_tokens=new, stop_ids=self.subject.stop_ids, **_sampling(settings))
        prompts = [self.tok_encode(context)[-(self.max_length - new) :] for context, _ in requests]
        stops = [text for text in ([until] if isinstance(until, str) else until) if text]
        return write(self.subject.engine, self.subject.tokenizer, prompts, params, stops)


def _sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """Our sampling parameters for a task's generation_kwargs: greedy unless it asks to sample."""
    unknown = set(settings) - set(_SAMPLING) - _IGNORED
    if unknown:
        raise ConfigError(f"generation_kwargs.{min(unknown)} has no counterpart here.")
    if int(settings.get("num_beams") or 1) > 1:
        raise ConfigError("generation_kwargs.num_beams: there is no beam search here.")
    if not settings.get("do_sample", float(settings.get("temperature") or 0) > 0):
        return {"temperature": 0.0}
    return {ours: settings[theirs] for theirs, ours in _SAMPLING.items() if settings.get(theirs) is not None}
