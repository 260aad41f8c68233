"""Ranks that share a row (Ulysses) compute what one rank computes: packed sequences, every output, every engine."""

from dataclasses import replace

import pytest
import torch
from rank_training import SPLITTING, engine_config
from tiny_training import OPTIM

from internlm2.config import ModelConfig
from internlm2.config.schema import RopeScalingConfig
from internlm2.data.batch import PackedBatch
from internlm2.engine.base import LossSum
from internlm2.engine.build import build_engine
from internlm2.model.scalar import ScalarModel
from internlm2.model.transformer import CausalLM
from tests.ranks import run_ranks

SHAPE = ModelConfig(
    name="test",
    vocab_size=61,
    hidden_size=48,
    layers=2,
    heads=8,
    kv_heads=4,
    head_dim=6,
    intermediate_size=40,
    norm_eps=1e-5,
    rope_base=10_000.0,
    rope_scaling=RopeScalingConfig("none", 1.0),
    max_position_embeddings=64,
    initializer_range=0.1,
    tie_embeddings=False,
    pretrain_batch_tokens=1,
)
DYNAMIC = replace(SHAPE, rope_scaling=RopeScalingConfig("dynamic", 2.0), max_position_embeddings=16)
LENGTHS = [[5, 1, 17], [23], [2, 2, 9, 11, 1], [8, 8]]  # 23 and 25 tokens do not divide by two or four


def packed(row: int, seed: int) -> PackedBatch:
    lengths = LENGTHS[row % len(LENGTHS)]
    generator = torch.Generator().manual_seed(100 * seed + row)
    ids = torch.randint(0, SHAPE.vocab_size, (sum(lengths),), generator=generator)
    labels = (ids * 5 + 2) % SHAPE.vocab_size
    labels[torch.rand(len(labels), generator=generator) < 0.3] = -100
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    zeros = torch.zeros(len(lengths), dtype=torch.int32)
    return PackedBatch(ids, labels, bounds, max(lengths), zeros, zeros.long())


def summed(model, batch):
    """The language model's own summed loss."""
    loss = model(batch.ids, batch.cu_seqlens, batch.max_seqlen, batch.labels)
    return LossSum(loss, batch.loss_tokens, {"first": loss.detach()})


def weighted(model, batch):
    """Log-probabilities and entropies at some positions, squared: a loss that is no sum over the ranks' tokens."""
    at = torch.nonzero(batch.labels >= 0)[:, 0]
    logprobs, entropies = model.logprobs(batch.ids, batch.cu_seqlens, batch.max_seqlen, at, batch.labels[at], 0.7)
    loss = -((logprobs.mean() + 0.1 * entropies.mean()) ** 2) * len(at) + (logprobs**2).sum()
    return LossSum(loss, batch.loss_tokens, {"entropy": entropies.detach().sum()})


def by_token(model, batch):
    losses = model.token_losses(batch.ids, batch.labels, batch.cu_seqlens, batch.max_seqlen)
    return LossSum((losses**2).sum(), batch.loss_tokens, {"largest": losses.detach().max()})


def of_logits(model, batch):
    logits = model(batch.ids, batch.cu_seqlens, batch.max_seqlen)
    return LossSum(torch.logsumexp(logits, -1).square().sum(), batch.loss_tokens, {"mean": logits.detach().mean()})


def ranking(model, batch):
    """A reward model's loss: pairs of sequences by the value at their last tokens."""
    scores = model.scores(batch.ids, batch.cu_seqlens, batch.max_seqlen)
    loss = -torch.nn.functional.logsigmoid(scores[0] - scores[-1]) + scores.square().sum()
    return LossSum(loss, batch.loss_tokens, {"top": scores.detach().max()})


LOSSES = {"summed": summed, "weighted": weighted, "by_token": by_token, "of_logits": of_logits, "ranking": ranking}


def run(loss: str, name: str, degree: int, steps: int, shape: str = "plain", recompute: str = "none", dtype="fp32"):
    """Losses, gradient norms and parts of each step, an evaluation, and one step's records by rank's share of rows."""
    kind = ScalarModel if loss == "ranking" else CausalLM
    config = {"plain": SHAPE, "dynamic": DYNAMIC, "tied": replace(SHAPE, tie_embeddings=True)}[shape]
    model = kind.from_config(config, seed=3, recompute=recompute)
    settings = engine_config(name, sequence_parallel=degree, dtype=dtype, reduce_bucket=10**5, gather_bucket=10**5)
    engine = build_engine(model, settings, OPTIM, 40)
    records = []
    for step in range(steps):
        rows = [packed(row, step) for row in range(engine.data_rank, 4, engine.data_ranks)]
        result = engine.train_step(rows, LOSSES[loss])
        records.append([result.loss, result.grad_norm, float(result.loss_tokens), *result.parts.values()])
    rows = [packed(row, 50) for row in range(engine.data_rank, 4, engine.data_ranks)]
    evaluated = engine.evaluate(rows, LOSSES[loss])
    with engine.whole() as whole:  # each rank by itself, on another row
        batch = packed(engine.rank, 60)
        alone = whole(batch.ids, batch.cu_seqlens, batch.max_seqlen).sum().item()
    return [*records, [evaluated.loss, float(evaluated.tokens), *evaluated.parts.values()]], alone


def assert_same(ranks, expected) -> None:
    (records, alone), others = expected, [found for found, _ in ranks]
    assert all(other == others[0] for other in others)
    for ours, theirs in zip(others[0], records, strict=True):
        assert ours == pytest.approx(theirs, abs=SPLITTING, rel=1e-4)
    assert ranks[0][1] == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_at_degree_two(loss):
    assert_same(run_ranks(run, 2, loss, "zero1", 2, 3), run(loss, "single", 1, 3))


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_two_rows_of_two_ranks(name):
    """Gradients add up over the ranks of a row and over the rows; clipping would show a wrong factor."""
    assert_same(run_ranks(run, 4, "summed", name, 2, 4), run("summed", "single", 1, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "loss", "degree", "shape", "recompute"),
    [
        ("zero1", "summed", 4, "plain", "full"),
        ("zero2", "weighted", 4, "dynamic", "none"),
        ("zero2", "ranking", 2, "dynamic", "full"),
        ("zero1", "of_logits", 2, "tied", "none"),
        ("zero3", "weighted", 2, "tied", "full"),
    ],
)
def test_thirty_steps(name, loss, degree, shape, recompute):
    expected = run(loss, "single", 1, 30, shape)
    ranks = run_ranks(run, 4, loss, name, degree, 30, shape, recompute)
    for ours, theirs in zip(ranks[3][0], expected[0], strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=10 * SPLITTING, rel=1e-4)


@pytest.mark.slow
def test_bf16():
    expected = run("summed", "single", 1, 6, dtype="bf16")
    ranks = run_ranks(run, 4, "summed", "zero1", 2, 6, "plain", "none", "bf16")
    for ours, theirs in zip(ranks[0][0], expected[0], strict=True):
        assert ours[:2] == pytest.approx(theirs[:2], rel=2e-2)
