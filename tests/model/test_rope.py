"""RoPE bases against the released formula's values, and tables that grow."""

from dataclasses import replace

import pytest
import torch

from internlm2.config import ConfigError, RopeScalingConfig
from internlm2.model.rope import RopeTables, rope_base, rope_table

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("factor", "length", "expected"),
    [
        (2.0, 65536, 3.05277e6),
        (2.0, 131072, 7.21959e6),
        (2.0, 204800, 1.19546e7),
        (3.0, 131072, 1.03723e7),
        (1.0, 65536, 2.02213e6),
        (2.0, 32769, 1.00006e6),
    ],
)
def test_dynamic_ntk_base(shape, factor, length, expected):
    config = replace(shape("7b"), rope_scaling=RopeScalingConfig("dynamic", factor))
    assert rope_base(config, length) == pytest.approx(expected, rel=5e-6)


@pytest.mark.parametrize("length", [1, 4096, 32768])
def test_base_is_untouched_up_to_the_trained_length(shape, length):
    assert rope_base(replace(shape("7b"), rope_scaling=RopeScalingConfig("dynamic", 2.0)), length) == 1e6
    assert rope_base(shape("7b"), 10 * length) == 1e6


def test_dynamic_ntk_equals_transformers(tiny):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = transformers.LlamaConfig(
        head_dim=16, num_attention_heads=3, hidden_size=48, max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e6, "factor": 3.0},
    )  # fmt: skip
    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, CPU, seq_len=200)
    config = replace(tiny, rope_scaling=RopeScalingConfig("dynamic", 3.0))
    ours = rope_base(config, 200) ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    torch.testing.assert_close(ours.float(), frequencies, rtol=1e-6, atol=0)


def test_angles_are_exact_at_far_positions():
    cos, _ = rope_table(1e6, 128, 200_001)
    import math

    frequency = 1e6 ** (-2 / 128)
    assert cos[200_000, 1].item() == pytest.approx(math.cos(200_000 * frequency), abs=1e-6)


def test_tables_grow_and_stay(tiny):
    rope = RopeTables(tiny)
    short = rope.table(10, CPU)
    assert rope.table(200, CPU)[0] is short[0]
    longer = rope.table(1000, CPU)
    assert len(longer[0]) == 1024
    assert torch.equal(longer[0][: len(short[0])], short[0])
    assert rope.table(10, CPU)[0] is longer[0]


def test_a_table_made_while_sampling_serves_training(tiny):
    rope = RopeTables(tiny)
    with torch.inference_mode():
        cos, _ = rope.table(10, CPU)
    assert not cos.is_inference()


def test_stacked_tables_start_where_they_say(tiny):
    config = replace(tiny, rope_scaling=RopeScalingConfig("dynamic", 2.0))
    rope = RopeTables(config)
    lengths = [10, 100, 64, 100, 130]
    cos, sin, offsets = rope.tables(lengths, CPU)
    for length, offset in zip(lengths, offsets.tolist()):
        own_cos, own_sin = rope_table(rope_base(config, length), 16, length)
        assert torch.equal(cos[offset : offset + length], own_cos)
        assert torch.equal(sin[offset : offset + length], own_sin)
    assert len(cos) == 64 + 100 + 130
    assert rope.tables([10, 64], CPU)[2] is None


def test_head_dim_two_cannot_stretch(tiny):
    with pytest.raises(ConfigError, match="head_dim"):
        rope_base(replace(tiny, head_dim=2, rope_scaling=RopeScalingConfig("dynamic", 2.0)), 65)
