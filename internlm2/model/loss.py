"""Cross entropy of T tokens over V words without ever holding T x V logits.

Tokens go through in chunks: logits, softmax and gradient of one chunk exist at a time. Softmax and sums are float32
(float64 for float64). At 32k tokens and 92,544 words the logits alone would be 12 GB in float32.
"""

from typing import Any

import torch
from torch import Tensor

from internlm2.ops.linear import onednn_float32
from internlm2.ops.processor import widens

# Logits in one chunk. At 16 MiB of float32 the C library still reuses the memory; at 32 MiB it maps fresh pages for
# every chunk, and the elementwise passes take 4 times as long (measured on glibc). On a GPU this is a good size as
# well.
CHUNK_ELEMENTS = 1 << 22


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int | None = None) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[label], a float32 scalar; labels of -100 add nothing.

    hidden [T, C], weight [V, C] of one dtype, labels [T] int64. The gradients are made in the forward pass, while a
    chunk's logits are there: three matrix products a chunk instead of the four of recomputing. weight's gradient is
    summed in float32.
    """
    _check(hidden, weight, labels)
    hidden, weight = _widened(hidden, weight)
    return _CrossEntropySum.apply(hidden, weight, labels, chunk or _chunk_tokens(weight))


def token_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, temperature: float = 1.0, chunk: int | None = None
) -> Tensor:
    """The loss of each token, [T] float32, 0 where the label is -100; log-probability of the label = minus the loss.

    For evaluation, and for objectives that weigh tokens (any gradient on the result is right: logits are recomputed).
    `temperature` divides the logits.
    """
    _check(hidden, weight, labels)
    hidden, weight = _widened(hidden, weight)
    return _TokenCrossEntropy.apply(hidden, weight, labels, temperature, False, chunk or _chunk_tokens(weight))[0]


def token_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """(log softmax(logits / temperature)[label], entropy of that distribution), each [T] float32, natural.

    What policy gradients need of T tokens; gradient flows through both. Labels are all >= 0.
    """
    _check(hidden, weight, labels)
    hidden, weight = _widened(hidden, weight)
    losses, entropy = _TokenCrossEntropy.apply(
        hidden, weight, labels, temperature, True, chunk or _chunk_tokens(weight)
    )
    return -losses, entropy


@torch.no_grad()
def token_kl(
    hidden: Tensor,
    weight: Tensor,
    other_hidden: Tensor,
    other_weight: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Exact KL(p || q) at each position over the whole vocabulary, [T] float32; p from `hidden`, q from the other."""
    size, parts = chunk or _chunk_tokens(weight), []
    hidden, weight = _widened(hidden, weight)
    other_hidden, other_weight = _widened(other_hidden, other_weight)
    for mine, theirs in zip(hidden.split(size), other_hidden.split(size), strict=True):
        p = _scaled(_product(mine, weight), temperature).log_softmax(-1)
        q = _scaled(_product(theirs, other_weight), temperature).log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            "the loss takes hidden [tokens, size], weight [vocabulary, size] and labels [tokens], "
            f"got {list(hidden.shape)}, {list(weight.shape)}, {list(labels.shape)}."
        )


def _widened(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 where the processor multiplies bfloat16 slowly: [T, C] and [V, C] once, not once a chunk."""
    return (hidden.float(), weight.float()) if widens(hidden, weight) else (hidden, weight)


def _chunk_tokens(weight: Tensor) -> int:
    return max(64, CHUNK_ELEMENTS // weight.shape[0])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [N, K]^T -> [M, N], float32 on CPU through oneDNN where `internlm2.ops.Linear` would take it."""
    if a.dtype == torch.float32 and a.device.type == "cpu" and onednn_float32():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.t()


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits in float32 at least, divided by the temperature; at 1 float32 logits are passed on as they are."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if temperature == 1.0 else wide / temperature


def _softmax(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """One chunk's probabilities [t, V] and losses [t] (0 where the label is -100), both float32 at least.

    loss = log-sum-exp - logit of the label; the log-sum-exp comes from the largest logit and its probability, which
    is at least 1 / V. A log-softmax and its exponential would take twice the time on CPU.
    """
    logits = _product(hidden, weight)
    largest, at = logits.max(dim=-1)
    wide = _scaled(logits, temperature)
    target = wide.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    probabilities = torch.softmax(wide, dim=-1)
    log_sum = largest.to(wide.dtype) / temperature - probabilities.gather(1, at[:, None])[:, 0].log()
    return probabilities, (log_sum - target).masked_fill_(labels < 0, 0.0)


class _Gradients:
    """Gradients of sum_t scale[t] * loss[t], added up chunk by chunk; weight's in float32."""

    def __init__(self, hidden: Tensor, weight: Tensor, wants_hidden: bool, wants_weight: bool):
        self.weight = weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.of_hidden = torch.empty_like(hidden) if wants_hidden else None
        self.of_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wants_weight else None

    @property
    def wanted(self) -> bool:
        return self.of_hidden is not None or self.of_weight is not None

    def add(self, start: int, hidden: Tensor, labels: Tensor, probabilities: Tensor, scale: Tensor) -> None:
        """One chunk; scale [t] is 0 where the label is -100. The probabilities are overwritten."""
        rows = torch.arange(len(labels), device=labels.device)
        probabilities[rows, labels.clamp_min(0)] -= 1.0
        logits = probabilities.to(hidden.dtype)
        scale = scale.to(hidden.dtype)[:, None]  # applied to [t, C] operands: nothing more passes over [t, V]
        if self.of_hidden is not None:
            self.of_hidden[start : start + len(hidden)] = _product(logits, self.weight.t()).mul_(scale)
        if self.of_weight is not None:
            self.of_weight += _product(logits.t(), (hidden * scale).t())

    def add_logits(self, start: int, hidden: Tensor, of_logits: Tensor) -> None:
        """One chunk whose gradient of the logits [t, V] is known already."""
        of_logits = of_logits.to(hidden.dtype)
        if self.of_hidden is not None:
            self.of_hidden[start : start + len(hidden)] = _product(of_logits, self.weight.t())
        if self.of_weight is not None:
            self.of_weight += _product(of_logits.t(), hidden.t())

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        return self.of_hidden, None if self.of_weight is None else self.of_weight.to(self.weight.dtype)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        gradients = _Gradients(hidden, weight, *ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part, targets = hidden[start : start + chunk], labels[start : start + chunk]
            probabilities, losses = _softmax(part, weight, targets)
            total += losses.sum()
            if gradients.wanted:
                gradients.add(start, part, targets, probabilities, targets >= 0)
        ctx.gradients = gradients.result()
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("the summed loss frees its gradients after one backward pass: compute the loss again.")
        (of_hidden, of_weight), ctx.gradients = ctx.gradients, None
        for gradient in (of_hidden, of_weight):
            if gradient is not None:
                gradient.mul_(grad)
        return of_hidden, of_weight, None, None


class _TokenCrossEntropy(torch.autograd.Function):
    """(losses [T], entropies [T] or an empty tensor where `with_entropy` is false)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, with_entropy: bool, chunk: int
    ) -> tuple[Tensor, Tensor]:
        losses, entropies = [], []
        for part, targets in zip(hidden.split(chunk), labels.split(chunk)):
            probabilities, loss = _softmax(part, weight, targets, temperature)
            losses.append(loss)
            if with_entropy:
                entropies.append(_entropy(probabilities))
        entropy = torch.cat(entropies) if with_entropy else hidden.new_empty(0)
        ctx.save_for_backward(hidden, weight, labels, entropy)
        ctx.chunk, ctx.temperature = chunk, temperature
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        return torch.cat(losses), entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, entropy = ctx.saved_tensors
        gradients = _Gradients(hidden, weight, *ctx.needs_input_grad[:2])
        if grad is None:
            grad = torch.zeros(
                len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device
            )
        for start in range(0, len(hidden), ctx.chunk):
            chunk = slice(start, start + ctx.chunk)
            targets = labels[chunk]
            probabilities, _ = _softmax(hidden[chunk], weight, targets, ctx.temperature)
            scale = grad[chunk] * (targets >= 0) / ctx.temperature
            if grad_entropy is None:
                gradients.add(start, hidden[chunk], targets, probabilities, scale)
                continue
            # d entropy / d logit = -p (log p + entropy), joined to the loss's p - onehot before the products.
            surprise = torch.where(probabilities > 0, probabilities, 1.0).log_() + entropy[chunk, None]
            of_logits = probabilities * (scale[:, None] - surprise * (grad_entropy[chunk] / ctx.temperature)[:, None])
            of_logits[torch.arange(len(targets), device=targets.device), targets.clamp_min(0)] -= scale
            gradients.add_logits(start, hidden[chunk], of_logits)
        return *gradients.result(), None, None, None, None


def _entropy(probabilities: Tensor) -> Tensor:
    """[t, V] -> [t], natural; a probability that has underflowed to 0 adds 0.

    torch.special.entr takes one logarithm at a time on CPU; `log_` takes eight.
    """
    smallest = torch.finfo(probabilities.dtype).tiny
    return probabilities.clamp_min(smallest).log_().mul_(probabilities).sum(-1).neg_()
