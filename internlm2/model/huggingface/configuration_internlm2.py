"""Configuration of InternLM2 for transformers 5: Llama's, under the names of the released config.json."""

from typing import Any

from transformers import LlamaConfig


class InternLM2Config(LlamaConfig):
    """LlamaConfig that reads `bias` and keeps `rope_theta` as an attribute."""

    model_type = "internlm2"
    attribute_map = {"bias": "attention_bias"}  # noqa: RUF012 (transformers' own spelling)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # transformers 5 keeps the base in rope_parameters alone; SGLang reads this attribute and would fall back to
        # 10000.
        self.rope_theta = (self.rope_parameters or {}).get("rope_theta", 10000.0)
