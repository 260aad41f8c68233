"""config.json of the official InternLM2 layout and of Llama-layout checkpoints, to and from ModelConfig."""

import json
from pathlib import Path
from typing import Any

import torch

from internlm2.config import ConfigError, ModelConfig, RopeScalingConfig

# Computed exactly like Llama once the switches below are off. Other families differ where no tensor would show it
# (scaled embeddings, norms with 1 + weight, logit caps), so an unknown name is refused rather than guessed.
LLAMA_LIKE = ("llama", "internlm3", "mistral")

_OFF = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "bias": (False, None),
    "qkv_bias": (False, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "num_local_experts": (None,),
    "partial_rotary_factor": (None, 1.0),
}


def read_config(folder: Path) -> tuple[ModelConfig, str]:
    """(ModelConfig, layout) of a checkpoint folder; layout is `internlm2` or `llama`.

    Understands rope in both spellings: rope_theta + rope_scaling (transformers 4) and rope_parameters (transformers 5).
    ConfigError names the key that this network cannot represent.
    """
    path = folder / "config.json"
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no config.json: it is no InternLM2-layout or Llama-layout folder.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}.") from error
    kind = stored.get("model_type")
    if kind != "internlm2" and kind not in LLAMA_LIKE:
        known = ", ".join(("internlm2", *LLAMA_LIKE))
        raise ConfigError(f"{path}: model_type {kind!r} is not computed like InternLM2; readable are {known}.")
    for key, allowed in _OFF.items():
        if stored.get(key) not in allowed:
            raise ConfigError(f"{path}: {key}={stored[key]!r} has no counterpart in InternLM2, which has none of it.")
    if stored.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"{path}: hidden_act={stored['hidden_act']!r}, but InternLM2's feed-forward layer uses silu.")
    return _parse(stored, path), "internlm2" if kind == "internlm2" else "llama"


def _parse(stored: dict[str, Any], path: Path) -> ModelConfig:
    def need(key: str) -> Any:
        if stored.get(key) is None:
            raise ConfigError(f"{path} has no {key}.")
        return stored[key]

    heads = need("num_attention_heads")
    maximum = stored.get("max_position_embeddings") or 2048
    theta, scaling = _rope(stored, path)
    return ModelConfig(
        name=path.resolve().parent.name,
        vocab_size=need("vocab_size"),
        hidden_size=need("hidden_size"),
        layers=need("num_hidden_layers"),
        heads=heads,
        kv_heads=stored.get("num_key_value_heads") or heads,
        head_dim=stored.get("head_dim") or need("hidden_size") // heads,
        intermediate_size=need("intermediate_size"),
        norm_eps=stored.get("rms_norm_eps", 1e-6),
        rope_base=theta,
        rope_scaling=scaling,
        max_position_embeddings=maximum,
        initializer_range=stored.get("initializer_range", 0.02),
        tie_embeddings=bool(stored.get("tie_word_embeddings", False)),
        pretrain_batch_tokens=4194304,  # not in the file; the report's value for 1.8B and 7B (Table 3)
    )


def _rope(stored: dict[str, Any], path: Path) -> tuple[float, RopeScalingConfig]:
    parameters = stored.get("rope_parameters") or {}
    scaling = parameters or stored.get("rope_scaling") or {}
    theta = parameters.get("rope_theta") or stored.get("rope_theta") or 10000.0
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return float(theta), RopeScalingConfig("none", 1.0)
    if kind not in ("linear", "dynamic"):
        raise ConfigError(
            f"{path}: rope type {kind!r} is not supported; InternLM2 knows none, linear and dynamic. "
            "Set it to null to use the model within the length that it was trained at."
        )
    if parameters.get("partial_rotary_factor") not in (None, 1.0):
        raise ConfigError(f"{path}: partial_rotary_factor has no counterpart in InternLM2, which rotates whole heads.")
    return float(theta), RopeScalingConfig(kind, float(scaling.get("factor", 1.0)))


def write_config(
    config: ModelConfig,
    layout: str,
    dtype: torch.dtype,
    *,
    token_ids: dict[str, int],
    keep_dynamic: bool = False,
) -> dict[str, Any]:
    """The content of config.json, by hand: transformers 5 would drop rope_theta and bias, which other engines read.

    `token_ids` holds bos, eos and pad. Dynamic NTK is left out unless `keep_dynamic`: up to max_position_embeddings it
    changes nothing, and beyond it engines disagree about it.
    """
    content: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": int(config.rope_base) if config.rope_base == int(config.rope_base) else config.rope_base,
        "rope_scaling": _rope_scaling(config, keep_dynamic),
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": token_ids["bos"],
        "eos_token_id": token_ids["eos"],
        "pad_token_id": token_ids["pad"],
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }
    if layout == "llama":
        llama = {"attention_bias": False, "mlp_bias": False, "head_dim": config.head_dim}
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **llama, **content}
    # The released files have no head_dim, and engines take hidden_size / heads: name it only where that is not so.
    uneven = {} if config.heads * config.head_dim == config.hidden_size else {"head_dim": config.head_dim}
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": "modeling_internlm2.InternLM2Model",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        },
        "model_type": "internlm2",
        "bias": False,
        **uneven,
        **content,
    }


def _rope_scaling(config: ModelConfig, keep_dynamic: bool) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling.kind == "none" or (scaling.kind == "dynamic" and not keep_dynamic):
        return None
    return {"type": scaling.kind, "factor": scaling.factor}
