"""Packing changes where conversations lie, not what is learned from them."""

import json

import pytest
import torch

from internlm2.config import ModelConfig, RopeScalingConfig, SourceConfig
from internlm2.data.batch import collate
from internlm2.data.corpus import Corpus
from internlm2.data.rows import build_row
from internlm2.data.shards import shard_of
from internlm2.data.stream import TokenStream
from internlm2.model.transformer import CausalLM
from internlm2.sources.source import open_source
from internlm2.text.tokenizer import load_tokenizer
from internlm2.text.tokenizer_training import train_model

MODEL = ModelConfig(
    name="test", vocab_size=330, hidden_size=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate_size=64,
    norm_eps=1e-5, rope_base=1e4, rope_scaling=RopeScalingConfig(kind="none", factor=1.0),
    max_position_embeddings=256, initializer_range=0.3, tie_embeddings=False, pretrain_batch_tokens=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    (folder / "tokenizer.model").write_bytes(train_model(["user assistant question answer\n" * 40], 330))
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    turns = [
        [
            {"role": ("user", "assistant")[t % 2], "content": f"{n} " * (1 + (7 * n + t) % 9)}
            for t in range(2 + 2 * (n % 3))
        ]
        for n in range(24)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    source = open_source("chats", SourceConfig(kind="conversations", path=str(folder / "chats.jsonl")))
    shard = shard_of(source, tokenizer, folder, progress=False)
    return Corpus({"chats": shard}, tokenizer.fingerprint, 0.0, folder)


def losses_of(model, rows):
    """(summed loss, targets) and the gradient of that sum by parameter."""
    batch = collate(rows)
    model.zero_grad()
    loss, targets = model.loss(batch.ids, batch.labels, batch.cu_seqlens, batch.max_seqlen)
    loss.backward()
    return loss.item(), int(targets), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_packed_loss_is_the_token_weighted_mean_of_the_unpacked(corpus):
    shard = corpus.shard("chats")
    model = CausalLM.from_config(MODEL, attention="reference", seed=3)
    stream = TokenStream(corpus, {"chats": 1.0}, 160, long_conversations="cut")
    rows = [stream[position] for position in range(stream.pools[0].plan.rows)]
    assert len(rows) < 24
    packed, targets, gradient = losses_of(model, rows)
    alone = [losses_of(model, [build_row(shard, 0, [(n, 0, int(shard.lengths[n]))])]) for n in range(24)]
    means = torch.tensor([loss / count for loss, count, _ in alone], dtype=torch.float64)
    counts = torch.tensor([count for _, count, _ in alone], dtype=torch.float64)
    assert targets == int(counts.sum())
    assert len(set(counts.tolist())) > 5
    expected = (means * counts).sum() / counts.sum()
    assert abs(packed / targets - expected.item()) < 1e-5
    assert abs(means.mean() - expected) > 1e-4  # the plain mean over conversations is another number
    for name, grad in gradient.items():
        summed = torch.stack([gradients[name] for _, _, gradients in alone]).sum(0)
        torch.testing.assert_close(grad, summed, rtol=1e-4, atol=1e-4 * float(summed.abs().max()))
