"""The network against an independent float64 forward, transformers' Llama, and itself run another way."""

from dataclasses import replace

import pytest
import torch

from internlm2.config import ConfigError, RopeScalingConfig
from internlm2.model import CausalLM, InternLM2
from tests.oracles import transformer as oracle


def draw(*shape, high, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def bounds(*lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def build(config, dtype=torch.float64, **options):
    model = CausalLM.from_config(replace(config, initializer_range=0.2), dtype=dtype, seed=3, **options)
    with torch.no_grad():  # norms away from one, or an error in them would not show
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * torch.randn(len(parameter), generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_the_oracle(tiny, tied):
    model = build(replace(tiny, tie_embeddings=tied))
    ids = draw(23, high=131)
    ours = model(ids, bounds(23))
    torch.testing.assert_close(ours, oracle.logits(model.state_dict(), model.config, ids), rtol=0, atol=2e-6)
    assert ours.std() > 1  # the comparison is about something


def test_packed_equals_separate_forwards_and_gradients(tiny):
    lengths = (5, 1, 17, 9)
    packed, separate = build(tiny), build(tiny)
    ids, labels = draw(sum(lengths), high=131), draw(sum(lengths), high=131, seed=1)
    labels[::4] = -100
    total, count = packed.loss(ids, labels, bounds(*lengths))
    total.backward()
    parts = [separate.loss(i, t, bounds(len(i))) for i, t in zip(ids.split(lengths), labels.split(lengths))]
    sum(part[0] for part in parts).backward()
    assert int(count) == sum(int(part[1]) for part in parts) == int((labels != -100).sum())
    torch.testing.assert_close(total, sum(part[0] for part in parts).detach(), rtol=1e-12, atol=0)
    for (name, ours), other in zip(packed.named_parameters(), separate.parameters()):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_max_seqlen_is_only_a_hint(tiny):
    model, ids, cu = build(tiny), draw(20, high=131), bounds(12, 8)
    assert torch.equal(model(ids, cu), model(ids, cu, 12))


def test_recompute_gives_the_same_gradients(tiny):
    plain, again = build(tiny), build(tiny, recompute="full")
    ids, labels = draw(16, high=131), draw(16, high=131, seed=1)
    for model in (plain, again):
        model.loss(ids, labels, bounds(10, 6))[0].backward()
    for (name, ours), other in zip(plain.named_parameters(), again.parameters()):
        assert torch.equal(ours.grad, other.grad), name


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("at", [[4], [22, 0, 5, 11], [7, 7]])
def test_some_positions_equal_those_of_all_with_their_gradients(tiny, at, recompute):
    """`at` leaves out what nobody reads of the last layer, and nothing else."""
    model = CausalLM.from_config(tiny, dtype=torch.float64, seed=1, recompute=recompute)
    ids = torch.randint(131, (23,), generator=torch.Generator().manual_seed(2))
    cu, at = torch.tensor([0, 5, 6, 23], dtype=torch.int32), torch.tensor(at)
    found = []
    for hidden in (model.model(ids, cu)[at], model.model(ids, cu, 17, at)):
        gradients = torch.autograd.grad(hidden.square().sum(), list(model.model.parameters()))
        found.append([hidden.detach(), *gradients])
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-11)


def test_every_parameter_has_the_official_name(tiny):
    names = set(CausalLM.from_config(tiny, device="meta").state_dict())
    layer = {f"{part}.weight" for part in (
        "attention.wqkv", "attention.wo", "attention_norm", "ffn_norm", "feed_forward.w1",
        "feed_forward.w2", "feed_forward.w3",
    )}  # fmt: skip
    expected = {f"model.layers.{i}.{name}" for i in range(2) for name in layer}
    assert names == expected | {"model.tok_embeddings.weight", "model.norm.weight", "output.weight"}
    assert "output.weight" not in CausalLM.from_config(replace(tiny, tie_embeddings=True), device="meta").state_dict()


@pytest.mark.parametrize(
    ("name", "count", "rows"),
    [("1_8b", 1_889_110_016, 4096), ("7b", 7_737_708_544, 6144), ("20b", 19_861_149_696, 8192)],
)
def test_released_sizes_count_exactly_on_the_meta_device(shape, name, count, rows):
    model = CausalLM.from_config(shape(name), device="meta", dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == count == shape(name).parameters()["total"]
    assert model.model.layers[0].attention.wqkv.weight.shape == (rows, shape(name).hidden_size)
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_bfloat16_stays_close_to_float64(tiny):
    exact = build(tiny)
    rounded = CausalLM.from_config(exact.config, dtype=torch.bfloat16, seed=None)
    rounded.load_state_dict(exact.state_dict())
    exact.load_state_dict(rounded.state_dict())
    ids, labels = draw(40, high=131), draw(40, high=131, seed=1)
    for model in (exact, rounded):
        model.loss(ids, labels, bounds(25, 15))[0].backward()
    for (name, ours), other in zip(rounded.named_parameters(), exact.parameters()):
        error = (ours.grad.double() - other.grad).norm() / other.grad.norm()
        assert error < 0.03, (name, float(error))


def test_dynamic_ntk_uses_each_sequence_length(tiny):
    config = replace(tiny, rope_scaling=RopeScalingConfig("dynamic", 2.0))
    model = build(config)
    lengths = (40, 90, 64, 70, 90)
    ids = draw(sum(lengths), high=131)
    ours = model(ids, bounds(*lengths)).split(lengths)
    for part, logits in zip(ids.split(lengths), ours):
        ratio = max(2.0 * len(part) / 64 - 1, 1.0)
        expected = oracle.logits(model.state_dict(), config, part, base=1e6 * ratio ** (16 / 14))
        torch.testing.assert_close(logits, expected, rtol=0, atol=3e-6)


def test_linear_scaling_divides_positions(tiny):
    model = build(replace(tiny, rope_scaling=RopeScalingConfig("linear", 4.0)))
    cos, sin = model.model.rope.table(9, torch.device("cpu"))
    plain_cos, plain_sin = build(tiny).model.rope.table(9, torch.device("cpu"))
    assert torch.equal(cos[4:9:4], plain_cos[1:3])
    assert torch.equal(sin[4:9:4], plain_sin[1:3])


def test_wrong_shapes_are_named(tiny):
    with pytest.raises(ConfigError, match=r"kv_heads=4 must divide model\.heads=6"):
        InternLM2(replace(tiny, kv_heads=4))
    with pytest.raises(ConfigError, match="recompute"):
        InternLM2(tiny, recompute="half")


def test_logits_equal_transformers_llama(tiny):
    transformers = pytest.importorskip("transformers")
    model = build(tiny, dtype=torch.float32)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=131, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
            head_dim=16, intermediate_size=80, rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            attn_implementation="eager", tie_word_embeddings=False,
        )
    )  # fmt: skip
    weights = llama.state_dict()
    own = model.state_dict()
    weights["model.embed_tokens.weight"] = own["model.tok_embeddings.weight"]
    weights["model.norm.weight"], weights["lm_head.weight"] = own["model.norm.weight"], own["output.weight"]
    for i in range(2):
        p, q = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        grouped = own[p + "attention.wqkv.weight"].view(2, 5, 16, 48)
        weights[q + "q_proj.weight"] = grouped[:, :3].reshape(96, 48)
        weights[q + "k_proj.weight"] = grouped[:, 3].reshape(32, 48)
        weights[q + "v_proj.weight"] = grouped[:, 4].reshape(32, 48)
        for theirs, ours in {
            "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
            "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm",
            "post_attention_layernorm": "ffn_norm",
        }.items():  # fmt: skip
            weights[f"{p}{theirs}.weight"] = own[f"{p}{ours}.weight"]
    llama.load_state_dict(weights)
    ids = draw(30, high=131)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, bounds(30)), llama(ids[None]).logits[0], rtol=0, atol=1e-4)
