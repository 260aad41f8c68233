"""InternLM2 for transformers 5: Llama's computation, with the released layout read and written as it is.

The weights differ from Llama's in names and in wqkv, whose rows are, for each key/value head, its query heads, its
key, its value. The mapping below splits it while loading and fuses it again in save_pretrained, bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from internlm2.model.huggingface.configuration_internlm2 import InternLM2Config


def _only(tensors: Any) -> torch.Tensor:
    return tensors[0] if isinstance(tensors, list) else tensors


class SplitGroupedQKV(ConversionOps):
    """wqkv [(heads + 2 kv_heads) * head_dim, hidden] -> q, k, v."""

    def convert(
        self, input_dict: dict, source_patterns: list, target_patterns: list, config: Any = None, **_: Any
    ) -> dict:
        (wqkv,) = (_only(tensors) for tensors in input_dict.values())
        groups, dim = config.num_key_value_heads, config.head_dim
        per_group = config.num_attention_heads // groups
        grouped = wqkv.reshape(groups, per_group + 2, dim, -1)
        parts = (
            grouped[:, :per_group].reshape(groups * per_group * dim, -1),
            grouped[:, per_group].reshape(groups * dim, -1),
            grouped[:, per_group + 1].reshape(groups * dim, -1),
        )
        return {pattern: part.contiguous() for pattern, part in zip(target_patterns, parts)}

    @property
    def reverse_op(self) -> ConversionOps:
        return FuseGroupedQKV()


class FuseGroupedQKV(ConversionOps):
    """The inverse of SplitGroupedQKV."""

    def convert(
        self, input_dict: dict, source_patterns: list, target_patterns: list, config: Any = None, **_: Any
    ) -> dict:
        q, k, v = (_only(input_dict[pattern]) for pattern in source_patterns)
        groups, dim = config.num_key_value_heads, config.head_dim
        parts = (part.reshape(groups, -1, dim, part.shape[-1]) for part in (q, k, v))
        return {target_patterns[0]: torch.cat(list(parts), dim=1).reshape(-1, q.shape[-1]).contiguous()}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitGroupedQKV()


class InternLM2Model(LlamaModel):
    config_class = InternLM2Config


class InternLM2ForCausalLM(LlamaForCausalLM):
    config_class = InternLM2Config


class InternLM2ForRewardModel(LlamaPreTrainedModel):
    """One score for each sequence: the output of `v_head` at its last token, which must be the reward token.

    Which token is the last follows from the attention mask, never from ids, so that the side of the padding and a pad
    id that is also the end id change nothing.
    """

    config_class = InternLM2Config

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.v_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.reward_token_id = getattr(config, "reward_token_id", None)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutputWithPast:
        """input_ids [B, T], attention_mask [B, T] (1: a token) -> logits [B, 1] float32."""
        kwargs.setdefault("use_cache", False)
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        values = nn.functional.linear(hidden.float(), self.v_head.weight.float()).squeeze(-1)
        if attention_mask is None:
            last = torch.full((len(values),), values.shape[1] - 1, device=values.device)
        else:
            last = (attention_mask.cumsum(dim=1) * attention_mask).argmax(dim=1)
        return SequenceClassifierOutputWithPast(logits=values.gather(1, last[:, None]))

    @torch.no_grad()
    def get_score(self, tokenizer: Any, conversation: Sequence[dict[str, str]]) -> float:
        """The score of one conversation, as [{"role", "content"}]. A conditional model expects its condition as the
        first system turn (reward.json in the model's folder).
        """
        ids = tokenizer.apply_chat_template(list(conversation), tokenize=True, return_dict=False)
        if ids[-1] != self.reward_token_id:
            ids.append(self.reward_token_id)
        return float(self(torch.tensor([ids], device=self.device)).logits)

    def get_scores(self, tokenizer: Any, conversations: Sequence[Sequence[dict[str, str]]]) -> list[float]:
        """The scores of several conversations."""
        return [self.get_score(tokenizer, conversation) for conversation in conversations]

    def compare(self, tokenizer: Any, first: Sequence[dict[str, str]], second: Sequence[dict[str, str]]) -> bool:
        """Does the first conversation score higher?"""
        return self.get_score(tokenizer, first) > self.get_score(tokenizer, second)


register_checkpoint_conversion_mapping(
    "internlm2",
    [
        WeightRenaming("model.tok_embeddings", "model.embed_tokens"),
        WeightRenaming(r"^output\.", "lm_head."),
        WeightRenaming("attention_norm", "input_layernorm"),
        WeightRenaming("ffn_norm", "post_attention_layernorm"),
        WeightRenaming("attention.wo", "self_attn.o_proj"),
        WeightRenaming("feed_forward.w1", "mlp.gate_proj"),
        WeightRenaming("feed_forward.w3", "mlp.up_proj"),
        WeightRenaming("feed_forward.w2", "mlp.down_proj"),
        WeightConverter(
            "attention.wqkv.weight",
            ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
            [SplitGroupedQKV()],
        ),
    ],
    overwrite=True,
)
