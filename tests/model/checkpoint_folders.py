"""Checkpoint folders of every kind with random weights, written without the code under test."""

import json
from dataclasses import asdict, replace

import torch
import yaml
from safetensors.torch import save_file

from internlm2.model.config_json import write_config
from internlm2.model.initialization import initial_values
from internlm2.model.layouts import official_shapes

IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 89, 79])


def random_weights(config, dtype=torch.float32):
    """Official names to tensors; norms are away from one."""
    config = replace(config, initializer_range=0.2)
    weights = {}
    for name, shape in official_shapes(config).items():
        values = initial_values(name.replace("norm", "n"), torch.Size(shape).numel(), config, 5).view(shape)
        weights[name] = (1 + values if "norm" in name else values).to(dtype)
    return weights


def write_official(folder, config, weights, **changes):
    folder.mkdir(exist_ok=True)
    content = write_config(config, "internlm2", torch.float32, token_ids={"bos": 1, "eos": 2, "pad": 2})
    (folder / "config.json").write_text(json.dumps(content | changes))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def to_llama(config, weights):
    """The Llama names of official weights, written out by hand."""
    renamed = {
        "model.embed_tokens.weight": weights["model.tok_embeddings.weight"],
        "model.norm.weight": weights["model.norm.weight"],
    }
    if "output.weight" in weights:
        renamed["lm_head.weight"] = weights["output.weight"]
    d, r = config.head_dim, config.q_per_kv
    for i in range(config.layers):
        p = f"model.layers.{i}."
        heads = weights[p + "attention.wqkv.weight"].split(d)
        groups = [heads[g * (r + 2) : (g + 1) * (r + 2)] for g in range(config.kv_heads)]
        renamed[p + "self_attn.q_proj.weight"] = torch.cat([head for group in groups for head in group[:r]])
        renamed[p + "self_attn.k_proj.weight"] = torch.cat([group[r] for group in groups])
        renamed[p + "self_attn.v_proj.weight"] = torch.cat([group[r + 1] for group in groups])
        renamed[p + "self_attn.o_proj.weight"] = weights[p + "attention.wo.weight"]
        renamed[p + "mlp.gate_proj.weight"] = weights[p + "feed_forward.w1.weight"]
        renamed[p + "mlp.up_proj.weight"] = weights[p + "feed_forward.w3.weight"]
        renamed[p + "mlp.down_proj.weight"] = weights[p + "feed_forward.w2.weight"]
        renamed[p + "input_layernorm.weight"] = weights[p + "attention_norm.weight"]
        renamed[p + "post_attention_layernorm.weight"] = weights[p + "ffn_norm.weight"]
    return renamed


def llama_config(config, **changes):
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "rms_norm_eps": config.norm_eps,
        "intermediate_size": config.intermediate_size, "max_position_embeddings": 64, "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings, "rope_theta": config.rope_base, **changes,
    }  # fmt: skip


def write_llama(folder, config, weights, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(llama_config(config, **changes)))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def write_checkpoint(run, config, weights, pieces=3, step=7):
    """A checkpoint as the engines write it, cut into uneven fragments over two ranks' files."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"model": asdict(config), "seed": 1}))
    ranks = [{}, {}]
    for number, (name, tensor) in enumerate(weights.items()):
        flat, start = tensor.float().reshape(-1), 0
        for piece in range(pieces):
            stop = flat.numel() if piece == pieces - 1 else min(start + 5 + number, flat.numel())
            ranks[(piece + number) % 2][f"{name}|weight|{start}"] = flat[start:stop].clone()
            ranks[(piece + number) % 2][f"{name}|exp_avg|{start}"] = torch.zeros(stop - start)
            start = stop
    for rank, tensors in enumerate(ranks):
        save_file(tensors, folder / f"rank{rank:05d}.safetensors")
    index = {"format": 1, "parameters": {name: list(tensor.shape) for name, tensor in weights.items()}}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "state.json").write_text(json.dumps({"step": step}))
    return folder
