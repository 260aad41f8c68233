"""One token a row from logits, for all rows at once; each row by its own parameters and its own uniform number.

B rows, V vocabulary, K candidates. Every step works on a row by itself, so a row's token never depends on the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from internlm2.generation.parameters import SamplingParams
from internlm2.ops import extension

# Candidates to look at before the whole vocabulary is sorted: a trained model's nucleus almost always fits in 64.
CANDIDATES = (64, 1024)
# Running sums over a vocabulary are made in two steps: over blocks, then inside the chosen block.
BLOCK = 512


@dataclass
class Drawn:
    """The tokens [B] int64; their log-probabilities [B] float32 (natural) under the model's own distribution
    (temperature 1, nothing cut off: what training compares with) and under the one that was sampled from."""

    tokens: Tensor
    logprobs: Tensor
    sampling_logprobs: Tensor


def penalize(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Repetition penalty. logits [B, V], seen [B, V] bool, penalty [B, 1] -> [B, V]."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(
    logits: Tensor,
    parameters: Sequence[SamplingParams],
    uniforms: Sequence[float],
    seen: Tensor | None = None,
    *,
    vocab_size: int | None = None,
) -> Drawn:
    """logits [B, V], one SamplingParams and one number in [0, 1) a row; seen [B, V] bool where a row has a penalty.

    With `vocab_size` only ids below it are drawn, as if it had been asked for before every other truncation.

    Rows that need no sorting and no penalty, as in rollouts, are drawn by our own kernel where it is built.
    """
    if vocab_size is not None and vocab_size < logits.shape[1]:
        drawn = sample(logits[:, :vocab_size], parameters, uniforms, None if seen is None else seen[:, :vocab_size])
        return replace(drawn, logprobs=_logprob(logits.float(), drawn.tokens))
    plain = [i for i, row in enumerate(parameters) if row.repetition_penalty == 1 and (row.greedy or not row.truncates)]
    if not plain or not _has_kernel(logits):
        return _sample_by_torch(logits, parameters, uniforms, seen)
    if len(plain) == len(parameters):
        return _sample_by_kernel(logits, parameters, uniforms)
    others = sorted(set(range(len(parameters))) - set(plain))
    at, to = (torch.tensor(rows, device=logits.device) for rows in (plain, others))
    first = _sample_by_kernel(logits[at], [parameters[i] for i in plain], [uniforms[i] for i in plain])
    second = _sample_by_torch(
        logits[to], [parameters[i] for i in others], [uniforms[i] for i in others], None if seen is None else seen[to]
    )
    order = torch.cat((at, to)).argsort()
    return Drawn(
        torch.cat((first.tokens, second.tokens))[order],
        torch.cat((first.logprobs, second.logprobs))[order],
        torch.cat((first.sampling_logprobs, second.sampling_logprobs))[order],
    )


def _has_kernel(logits: Tensor) -> bool:
    return logits.dtype in (torch.bfloat16, torch.float32) and extension.native("draw_tokens", logits.device)


def _sample_by_kernel(logits: Tensor, parameters: Sequence[SamplingParams], uniforms: Sequence[float]) -> Drawn:
    temperatures = torch.tensor([row.temperature for row in parameters], dtype=torch.float32, device=logits.device)
    numbers = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)
    return Drawn(*torch.ops.internlm2.draw_tokens(logits.contiguous(), temperatures, numbers))


def _sample_by_torch(
    logits: Tensor, parameters: Sequence[SamplingParams], uniforms: Sequence[float], seen: Tensor | None
) -> Drawn:
    logits = logits.float()
    greedy = [index for index, row in enumerate(parameters) if row.greedy]
    drawn = [index for index, row in enumerate(parameters) if not row.greedy]
    shaped = logits
    if any(row.repetition_penalty != 1.0 for row in parameters):
        assert seen is not None
        shaped = penalize(logits, seen, _column([row.repetition_penalty for row in parameters], logits.device))
    if not drawn:
        tokens, sampling = shaped.argmax(-1), torch.zeros(len(logits), device=logits.device)
        return Drawn(tokens, _logprob(logits, tokens), sampling)
    if not greedy:
        tokens, sampling = _draw(shaped, parameters, uniforms)
        if shaped is logits and all(row.temperature == 1.0 and not row.truncates for row in parameters):
            return Drawn(tokens, sampling, sampling)
        return Drawn(tokens, _logprob(logits, tokens), sampling)
    tokens, sampling = shaped.argmax(-1), torch.zeros(len(logits), device=logits.device)
    at = torch.tensor(drawn, device=logits.device)
    tokens[at], sampling[at] = _draw(shaped[at], [parameters[i] for i in drawn], [uniforms[i] for i in drawn])
    return Drawn(tokens, _logprob(logits, tokens), sampling)


def _column(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)[:, None]


def _logprob(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[token] of each row, [B] float32."""
    # log_softmax works row by row; the elementwise passes of logsumexp round by where a row lies in the batch.
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def _draw(logits: Tensor, parameters: Sequence[SamplingParams], uniforms: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Tokens [B] and their log-probabilities [B] under the tempered and truncated distribution."""
    device = logits.device
    if any(row.temperature != 1.0 for row in parameters):
        logits = logits / _column([row.temperature for row in parameters], device)
    probabilities = torch.softmax(logits, dim=-1)
    cut = [index for index, row in enumerate(parameters) if row.truncates]
    if not cut:
        return _from_all(probabilities, _column(uniforms, device, torch.float64))
    if len(cut) == len(parameters):
        return _from_most_likely(probabilities, parameters, uniforms)
    tokens, logprobs = _from_all(probabilities, _column(uniforms, device, torch.float64))
    at = torch.tensor(cut, device=device)
    some = _from_most_likely(probabilities[at], [parameters[i] for i in cut], [uniforms[i] for i in cut])
    tokens[at], logprobs[at] = some
    return tokens, logprobs


def _search(weights: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose running sum exceeds targets [B, 1], and the sum before it; never an entry of weight 0."""
    sums = weights.cumsum(-1)
    # Rounding may leave the target at or above the last sum: the last entry with weight is meant.
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    index = torch.minimum(torch.searchsorted(sums, targets, right=True), last)
    return index, sums.gather(1, index) - weights.gather(1, index)


def _from_all(probabilities: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """By inverting the distribution function over the vocabulary in its own order."""
    size = probabilities.shape[1]
    whole = size // BLOCK * BLOCK
    sums = probabilities[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1, dtype=torch.float32)
    if whole < size:
        sums = torch.cat([sums, probabilities[:, whole:].sum(-1, keepdim=True)], dim=1)
    sums = sums.double()
    block, before = _search(sums, uniforms * sums.sum(-1, keepdim=True))
    offsets = block * BLOCK + torch.arange(BLOCK, device=block.device)
    inside = probabilities.gather(1, offsets.clamp_max(size - 1)).double().masked_fill_(offsets >= size, 0.0)
    index, _ = _search(inside, uniforms * sums.sum(-1, keepdim=True) - before)
    tokens = block * BLOCK + index
    return tokens[:, 0], probabilities.gather(1, tokens)[:, 0].double().log().float()


def _from_most_likely(
    probabilities: Tensor, parameters: Sequence[SamplingParams], uniforms: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Sort as few candidates as decide the truncated set; a row takes the next size up for its own needs only."""
    device, (rows, size) = probabilities.device, probabilities.shape
    tokens = torch.empty(rows, dtype=torch.long, device=device)
    logprobs = torch.empty(rows, device=device)
    todo = list(range(rows))
    for width in (*(width for width in CANDIDATES if width < size), size):
        chosen = [i for i in todo if not (width < size and width < min(parameters[i].top_k, size))]
        if not chosen:
            continue
        at = torch.tensor(chosen, device=device)
        here = probabilities if len(chosen) == rows else probabilities[at]
        values, ids = here.topk(width, dim=-1) if width < size else here.sort(dim=-1, descending=True, stable=True)
        weights, complete = _truncate(values.double(), [parameters[i] for i in chosen], whole=width == size)
        mass = weights.sum(-1, keepdim=True)
        index, _ = _search(weights, _column([uniforms[i] for i in chosen], device, torch.float64) * mass)
        done = complete.tolist()
        finished = [position for position, flag in enumerate(done) if flag]
        if finished:
            pick = torch.tensor(finished, device=device)
            target = at[pick]
            tokens[target] = ids.gather(1, index)[pick, 0]
            logprobs[target] = (weights.gather(1, index) / mass)[pick, 0].log().float()
        settled = {chosen[position] for position in finished}
        todo = [i for i in todo if i not in settled]
        if not todo:
            break
    return tokens, logprobs


def _truncate(values: Tensor, parameters: Sequence[SamplingParams], whole: bool) -> tuple[Tensor, Tensor]:
    """Probabilities [B, K] float64 in falling order -> the same with what is cut off set to 0, and which rows are
    decided: the cut lies inside the K candidates."""
    device, width = values.device, values.shape[1]
    top_k = torch.tensor([row.top_k or (1 << 40) for row in parameters], device=device)[:, None]
    weights = values.masked_fill(torch.arange(width, device=device) >= top_k, 0.0)
    known = top_k <= width  # all that top_k leaves is here
    sums = weights.cumsum(-1)
    # Without top_k, top_p counts against the whole distribution, whose mass is 1 whether or not all of it is here.
    total = torch.where(known, sums[:, -1:], torch.ones_like(sums[:, -1:]))
    if whole:
        total, known = sums[:, -1:], torch.ones_like(known)
    top_p = _column([row.top_p for row in parameters], device, torch.float64)
    min_p = _column([row.min_p for row in parameters], device, torch.float64)
    weights = weights.masked_fill((sums - weights >= top_p * total) & (top_p < 1.0), 0.0)
    weights = weights.masked_fill(weights < min_p * values[:, :1], 0.0)
    decided = known | ((top_p < 1.0) & (sums[:, -1:] >= top_p)) | (values[:, -1:] < min_p * values[:, :1])
    return weights, decided[:, 0]
