"""A small model with every sort of parameter that the engine treats differently, and batches for it."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from internlm2.config import OptimConfig
from internlm2.engine.base import LossSum
from internlm2.engine.single import SingleEngine

VOCABULARY, WIDTH = 29, 12

OPTIM = OptimConfig(
    lr=1e-2,
    min_lr_ratio=0.1,
    schedule="cosine",
    schedule_start=0.0,
    schedule_end=1.0,
    warmup_ratio=0.1,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    decay_embeddings=False,
    clip_grad_norm=1.0,
)


class Model(nn.Module):
    """ids [B, T] -> logits [B, T, V]: embedding, norm gain, matrix, head, and a table that must stay fp32."""

    def __init__(self, seed: int = 0, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocabulary, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = nn.RMSNorm(WIDTH)
        self.output = nn.Linear(WIDTH, vocabulary, bias=False)
        self.register_buffer("table", torch.linspace(0, 1, WIDTH))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.3, generator=generator)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.tok_embeddings(ids)
        hidden = hidden + torch.tanh(self.inner(hidden)) * self.table.to(hidden.dtype)
        return self.output(self.norm(hidden))


@dataclass
class Rows:
    """ids, labels [B, T]; label -100 bears no loss."""

    ids: torch.Tensor
    labels: torch.Tensor

    @property
    def loss_tokens(self) -> int:
        return int((self.labels != -100).sum())

    def to(self, device: torch.device) -> "Rows":
        return Rows(self.ids.to(device), self.labels.to(device))


def make_rows(count: int, seed: int = 0, length: int = 7) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (count, length), generator=generator)
    labels = (ids * 3 + 1) % VOCABULARY
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100  # rows differ in valid tokens
    return Rows(ids, labels)


def split(rows: Rows, size: int) -> list[Rows]:
    return [Rows(i, la) for i, la in zip(rows.ids.split(size), rows.labels.split(size), strict=True)]


def cross_entropy(model: nn.Module, batch: Rows) -> LossSum:
    logits = model(batch.ids).float()
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum"
    )
    right = ((logits.argmax(-1) == batch.labels) & (batch.labels != -100)).sum()
    return LossSum(losses, batch.loss_tokens, {"right": right.detach().float()})


def make_engine(model: nn.Module | None = None, dtype: str = "fp32", steps: int = 40, **changes) -> SingleEngine:
    guard = {"on_nonfinite": "skip", "spike_factor": None, "max_bad_steps": 3}
    guard |= {key: changes.pop(key) for key in list(changes) if key in guard}
    return SingleEngine(model or Model(), replace(OPTIM, **changes), steps, "cpu", dtype, **guard)
