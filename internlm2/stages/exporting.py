"""What a stage leaves behind: export/, and adapter/ where adapters were trained."""

import logging
from pathlib import Path

from torch import nn

from internlm2.config import Config
from internlm2.engine.single import DTYPES
from internlm2.model.adapters import merged_weights, save_adapter
from internlm2.model.export import export_weights
from internlm2.model.weights import open_weights
from internlm2.run.directory import RunDirectory

log = logging.getLogger(__name__)


def export_trained(
    model: nn.Module,
    config: Config,
    directory: RunDirectory,
    *,
    checkpoint: Path | None = None,
    reward_settings: Path | None = None,
    description: str = "official InternLM2 layout",
) -> None:
    """export/ of `checkpoint` (None: the newest) or, with adapters, of `model` with these merged; adapter/ in PEFT's
    format. `model` is whole, and only the rank that writes calls this.
    """
    tokenizer = directory.path / "tokenizer"
    if config.adapter.kind == "none":
        weights = open_weights(checkpoint or directory.path)
    else:
        weights = merged_weights(model, config.adapter, tokenizer)
        save_adapter(directory.path / "adapter", config.adapter, config.model, model.named_parameters())
        log.info("adapter saved to %s (PEFT)", directory.path / "adapter")
    if config.checkpoint.export:
        written = export_weights(
            weights,
            directory.export,
            dtype=DTYPES[config.engine.dtype],
            tokenizer=tokenizer,
            reward_settings=reward_settings,
            overwrite=True,
        )
        log.info("exported to %s (%s, %s)", written.folder, description, config.engine.dtype)
