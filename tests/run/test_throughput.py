"""FLOPs against torch's own counter; MFU and peaks."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from internlm2.config import ModelConfig, RopeScalingConfig
from internlm2.model.scalar import ScalarModel
from internlm2.run.throughput import Throughput, causal_pairs, peak_flops, peak_memory_bytes, step_flops

SHAPE = ModelConfig(
    name="x",
    vocab_size=50,
    hidden_size=32,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=8,
    intermediate_size=56,
    norm_eps=1e-5,
    rope_base=1e4,
    rope_scaling=RopeScalingConfig("none", 1.0),
    max_position_embeddings=64,
    initializer_range=0.02,
    tie_embeddings=False,
    pretrain_batch_tokens=1,
)


def test_flops_equal_those_that_torch_counts():
    """Oracle: FlopCounterMode over the matrix products of such a network, with full attention: T * T pairs."""
    tokens, width, heads, kv = 16, SHAPE.hidden_size, SHAPE.heads, SHAPE.kv_heads
    qkv = nn.Linear(width, (heads + 2 * kv) * 8, bias=False)
    rest = [nn.Linear(width, width, bias=False), *(nn.Linear(width, 56, bias=False) for _ in range(2))]
    down, head = nn.Linear(56, width, bias=False), nn.Linear(width, 50, bias=False)

    hidden = torch.randn(tokens, width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        x = hidden
        for _ in range(SHAPE.layers):
            q, k, v = qkv(x).view(tokens, -1, 8).split([heads, kv, kv], dim=1)
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            scores = torch.bmm(q.transpose(0, 1), k.permute(1, 2, 0)).softmax(-1)
            x = x + rest[0](torch.bmm(scores, v.transpose(0, 1)).transpose(0, 1).reshape(tokens, width))
            x = x + down(rest[1](x).sigmoid() * rest[2](x))
        head(x).sum().backward()
    assert step_flops(SHAPE, tokens, tokens * tokens) == counter.get_total_flops()


def test_a_reward_model_has_one_output_in_place_of_the_vocabulary():
    """Oracle: FlopCounterMode over a ScalarModel, whose attention runs as plain products over the whole square."""
    tokens = 16
    model = ScalarModel.from_config(SHAPE, attention="reference", seed=0)
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(tokens), torch.tensor([0, tokens], dtype=torch.int32), tokens).sum().backward()
    assert step_flops(SHAPE, tokens, tokens * tokens, outputs=1) == counter.get_total_flops()
    meter = Throughput(SHAPE, peak=1e9, outputs=1)
    assert meter.measure(0.5, tokens, 1)["mfu"] == step_flops(SHAPE, tokens, 1, outputs=1) / 0.5e9


def test_causal_pairs():
    assert causal_pairs([4, 1]) == 4 + 3 + 2 + 1 + 1
    assert causal_pairs([]) == 0


def test_mfu_is_flops_over_what_the_devices_could_do():
    meter = Throughput(SHAPE, peak=1e9, devices=2)
    record = meter.measure(0.5, tokens=1000, pairs=4000)
    assert record["mfu"] == pytest.approx(step_flops(SHAPE, 1000, 4000) / (0.5 * 2 * 1e9))
    assert record["tokens_per_second"] == 2000
    assert record["memory_bytes"] == pytest.approx(peak_memory_bytes(), rel=0.1)
    assert Throughput(SHAPE, peak=None).measure(0.5, 1, 1)["mfu"] is None


def test_time_left_ignores_a_slow_step():
    meter = Throughput(SHAPE, None)
    assert meter.seconds_left(10) is None
    for seconds in (1.0, 1.0, 60.0, 1.0):
        meter.measure(seconds, 1, 1)
    assert meter.seconds_left(10) == 10.0


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", None),
        ("NVIDIA GH200 480GB", None),
        ("AMD EPYC 9B45", None),
    ],
)
def test_known_devices_have_a_peak_and_unknown_ones_none(name, tflops):
    assert peak_flops(name, "bf16", None) == (None if tflops is None else tflops * 1e12)
    assert peak_flops(name, "fp32", None) is None
    assert peak_flops(name, "fp32", 1.5) == 1.5e12
