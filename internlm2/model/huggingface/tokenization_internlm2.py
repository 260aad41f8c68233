"""The tokenizer of folders that hold tokenizer.model alone, as the released ones do, for transformers 5."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, TokenizersBackend

from internlm2.model.chat_template import CHAT_TEMPLATE
from internlm2.model.tokenizer_export import convert_sentencepiece


class TokenizerName(PreTrainedConfig):
    """Key under which the tokenizer is registered; no model has this config."""

    model_type = "internlm2-tokenizer"


class InternLM2Tokenizer(TokenizersBackend):
    """Ids equal to SentencePiece's, `<s>` in front; named as the released tokenizer_config.json asks."""

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        model = kwargs.get("vocab_file")
        if kwargs.get("tokenizer_file") or not isinstance(model, str) or not model.endswith(".model"):
            return super().convert_to_native_format(trust_remote_code=trust_remote_code, **kwargs)
        tokenizer, special = convert_sentencepiece(Path(model))
        names = {name: name for name in special.values()}
        defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
        for key, name in defaults.items():
            if name in names:
                kwargs.setdefault(key, name)
        if "<|im_start|>" in names:
            kwargs.setdefault("chat_template", CHAT_TEMPLATE)
        # The released settings are for code that is not run here.
        for key in ("auto_map", "decode_with_prefix_space", "sp_model_kwargs", "added_tokens_decoder"):
            kwargs.pop(key, None)
        return {**kwargs, "tokenizer_object": tokenizer}
