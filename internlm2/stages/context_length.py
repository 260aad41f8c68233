"""How far back does the model look? Loss by position on long held-out documents, before and after a stage."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from internlm2.config import ConfigError
from internlm2.data.corpus import Corpus
from internlm2.data.validation import long_validation_rows
from internlm2.evaluate.position import LossByPosition, loss_by_position
from internlm2.model.transformer import CausalLM
from internlm2.model.weights import load_model
from internlm2.run.directory import RunDirectory

log = logging.getLogger(__name__)

BASELINE = "position_of_init.json"
FIGURE = "evaluation/by_position.json"


class ContextLength:
    """The same held-out documents for the weights that a stage starts from and for those that it ends with; measured
    by the rank that writes.
    """

    def __init__(self, corpus: Corpus, sources: Sequence[str], seq_len: int, rows: int, run: RunDirectory) -> None:
        self.seq_len, self.run = seq_len, run
        try:
            self.rows = long_validation_rows(corpus, seq_len, rows, max(2, seq_len // 2), sources)
        except ConfigError as error:
            log.info("no loss by position: %s", error)
            self.rows = {}

    def measure_start(self, source: Path, device: torch.device, dtype: torch.dtype, attention: str) -> None:
        """Measure the weights at `source` with the RoPE base that they were trained with; once, also over restarts."""
        if not self.rows or not self.run.writes or (self.run.path / BASELINE).exists():
            return
        model = load_model(source, device=device, dtype=dtype, attention=attention)
        measured = loss_by_position(model, self.rows, self.seq_len)
        trained_to = model.config.max_position_embeddings
        self.run.write_json(BASELINE, {"trained_to": trained_to, **asdict(measured)})

    def measure_end(self, model: CausalLM, stage: str) -> None:
        """Measure the trained model and write the figure."""
        if not self.rows or not self.run.writes:
            return
        measured = loss_by_position(model, self.rows, self.seq_len)
        curves, note = {f"after {stage}": measured}, ""
        if (self.run.path / BASELINE).exists():
            saved: dict[str, Any] = json.loads((self.run.path / BASELINE).read_text())
            before, beyond = LossByPosition(saved["width"], saved["loss"], saved["tokens"]), saved["trained_to"]
            curves[f"before {stage}"] = before
            note = (
                f"mean loss at positions from {beyond:,} on: {before.mean(beyond):.3f} before {stage}, "
                f"{measured.mean(beyond):.3f} after"
            )
            log.info("%s", note)
        figure = {
            "title": "Loss by position on held-out documents",
            "x_label": "position (tokens)",
            "y_label": "loss (nats a token)",
            "series": [_series(label, curve) for label, curve in curves.items()],
            "note": note,
        }
        self.run.write_json(FIGURE, figure)


def _series(label: str, curve: LossByPosition) -> dict[str, Any]:
    known = [number for number, tokens in enumerate(curve.tokens) if tokens]
    return {
        "label": label,
        "x": [(number + 0.5) * curve.width for number in known],
        "y": [curve.loss[number] for number in known],
    }
