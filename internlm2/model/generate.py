"""Sampling with the KV cache: batches of prompts of different lengths, one random generator a row."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from internlm2.model.transformer import CausalLM


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_ids: Collection[int] = (),
    generators: Sequence[torch.Generator] | None = None,
) -> list[list[int]]:
    """New tokens of each prompt, the stop token included where one was drawn. Arguments as in `stream`."""
    outputs: list[list[int]] = [[] for _ in prompts]
    for step in stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_ids=stop_ids,
        generators=generators,
    ):
        for row, token in step:
            outputs[row].append(token)
    return outputs


@torch.no_grad()
def stream(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_ids: Collection[int] = (),
    generators: Sequence[torch.Generator] | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Yields the (row, token) pairs of each step; a row ends with its stop token or after `max_new_tokens`.

    temperature 0 takes the most likely token. Above 0, `generators` holds one CPU generator a row: each token takes
    one number from its own row's, so what a row draws does not depend on its neighbours. `top_p` keeps the smallest
    set of most likely tokens whose probabilities sum to at least top_p.
    """
    _check(prompts, temperature, top_p, generators)
    if max_new_tokens < 1 or not prompts:
        return
    device = model.output_weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ends = lengths.cumsum(0)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), ends]).to(device, torch.int32)
    ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    # The last token is never fed back, so the cache ends one short of the full sequence.
    cache = model.model.new_cache([len(prompt) + max_new_tokens - 1 for prompt in prompts])
    hidden = model.model.prefill(ids, cu_seqlens, cache)[ends.to(device) - 1]
    rows = list(range(len(prompts)))
    stops = set(stop_ids)
    for step in range(max_new_tokens):
        draw = None if generators is None else [generators[row] for row in rows]
        tokens = sample(model.head(hidden), temperature, top_p, draw).tolist()
        yield list(zip(rows, tokens))
        alive = [index for index, token in enumerate(tokens) if token not in stops]
        if not alive or step + 1 == max_new_tokens:
            return
        if len(alive) < len(rows):
            cache.keep(torch.tensor(alive, device=device))
            rows = [rows[index] for index in alive]
        hidden = model.model.decode(torch.tensor([tokens[index] for index in alive], device=device), cache)


def sample(
    logits: Tensor, temperature: float, top_p: float = 1.0, generators: Sequence[torch.Generator] | None = None
) -> Tensor:
    """One token a row, [B] int64, from logits [B, V]."""
    if temperature == 0.0:
        return logits.argmax(-1)
    assert generators is not None
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    # Ids stay in vocabulary order where nothing is cut off: a sort of the whole vocabulary costs more than the rest.
    order = None
    if top_p < 1.0:
        probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    mass = probabilities.cumsum(-1)
    uniform = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in generators])
    threshold = uniform.to(mass.device)[:, None] * mass[:, -1:]
    chosen = torch.searchsorted(mass, threshold, right=True).clamp_max(mass.shape[-1] - 1)
    return (chosen if order is None else order.gather(-1, chosen))[:, 0]


def _check(
    prompts: Sequence[Sequence[int]], temperature: float, top_p: float, generators: Sequence[torch.Generator] | None
) -> None:
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt is empty: start it with the tokenizer's <s>.")
    if temperature < 0.0 or not 0.0 < top_p <= 1.0:
        raise ValueError(f"temperature must be at least 0 and top_p in (0, 1], got {temperature} and {top_p}.")
    if temperature > 0.0 and (generators is None or len(generators) != len(prompts)):
        raise ValueError("temperature above 0 needs `generators`, one torch.Generator for each prompt.")
