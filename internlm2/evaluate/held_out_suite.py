"""The held-out suite: bits per byte and perplexity by source, loss by position."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from omegaconf import OmegaConf

from internlm2.config import ConfigError, DataConfig, SourceConfig
from internlm2.config.evaluate import HeldOutSuite
from internlm2.data.batch import collate
from internlm2.data.corpus import Corpus
from internlm2.data.prepare import prepare
from internlm2.data.rows import IGNORE, Row
from internlm2.data.validation import long_validation_rows, validation_rows
from internlm2.evaluate.batching import batches
from internlm2.evaluate.position import LossByPosition, loss_by_position
from internlm2.evaluate.results import Headline, Result
from internlm2.evaluate.subject import Subject, stage_of
from internlm2.model.transformer import CausalLM
from internlm2.sources.documents import Document
from internlm2.sources.source import open_source
from internlm2.text.tokenizer import Tokenizer


def run(subject: Subject, suite: HeldOutSuite, seed: int) -> list[Result]:
    """A table by source, and a figure of the loss by position where documents are long enough."""
    seq_len = suite.seq_len or subject.trained_to
    if suite.texts:
        rows = {name: source_rows(name, suite, subject.tokenizer, seq_len) for name in suite.texts}
        long_rows = {name: [row for row in part if row.tokens >= seq_len // 2] for name, part in rows.items()}
    else:
        corpus, names = corpus_of(subject)
        rows = validation_rows(corpus, seq_len, suite.rows, names)
        try:
            long_rows = long_validation_rows(corpus, seq_len, suite.rows, max(2, seq_len // 2), names)
        except ConfigError:  # no document is that long: there is no figure by position
            long_rows = {}
    if not any(rows.values()):
        raise ConfigError("There is no held-out document to measure: raise data.validation_fraction of the run.")
    results = [by_source(subject, rows, suite.name, seq_len)]
    if any(long_rows.values()):
        measured = loss_by_position(subject.model, long_rows, seq_len, suite.bins)
        results.append(by_position(subject, measured, f"{suite.name}_by_position"))
    return results


def by_source(subject: Subject, rows: dict[str, list[Row]], name: str, seq_len: int) -> Result:
    """Loss, perplexity and bits per byte of each source and of all together."""
    spelled = torch.from_numpy(subject.tokenizer.token_bytes)
    table, sums = [], np.zeros(3)
    for source, part in rows.items():
        found = np.zeros(3)  # nats, tokens, bytes
        for row, losses in zip(part, row_losses(subject.model, part, subject.batch_tokens)):
            labels = torch.from_numpy(row.labels)
            found += (float(losses.sum()), int((labels >= 0).sum()), int(spelled[labels[labels >= 0]].sum()))
        sums += found
        table.append(_line(source, found))
    if len(table) > 1:
        table.append(_line("all", sums))
    return Result(
        name=name,
        title="Held-out text by source",
        rows=table,
        headline=[Headline("held-out bits per byte", float(table[-1]["bits per byte"]), better="lower")],
        note=f"Rows of at most {seq_len:,} tokens of documents that training never saw.",
    )


def row_losses(model: CausalLM, rows: list[Row], batch_tokens: int) -> list[torch.Tensor]:
    """Losses [T] (nats, 0 where there is no target) of each row, on the CPU in float64."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    for chosen in batches([row.tokens for row in rows], batch_tokens):
        batch = collate([rows[index] for index in chosen]).to(model.output_weight.device)
        with torch.no_grad():
            losses = model.token_losses(batch.ids, batch.labels, batch.cu_seqlens, batch.max_seqlen).double().cpu()
        for index, part in zip(chosen, losses.split([rows[index].tokens for index in chosen])):
            found[index] = part
    return found


def by_position(subject: Subject, measured: LossByPosition, name: str) -> Result:
    """The loss in bins of positions as a figure."""
    known = [number for number, tokens in enumerate(measured.tokens) if tokens]
    return Result(
        name=name,
        title="Loss by position on held-out documents",
        figure={
            "x_label": "position (tokens)",
            "y_label": "loss (nats a token)",
            "series": [
                {
                    "label": subject.source,
                    "x": [(number + 0.5) * measured.width for number in known],
                    "y": [measured.loss[number] for number in known],
                }
            ],
        },
        rows=[
            {
                "first position": number * measured.width,
                "loss": measured.loss[number],
                "perplexity": math.exp(min(measured.loss[number], 50.0)),
                "tokens": measured.tokens[number],
            }
            for number in known
        ],
        note=f"Each row is the beginning of one document; trained to {subject.trained_to:,} tokens.",
    )


def corpus_of(subject: Subject) -> tuple[Corpus, list[str]]:
    """The corpus that the run was trained on, with its hold-out, and the sources of its mixture."""
    stage = stage_of(subject.source)
    if stage is None:
        raise ConfigError(
            f"{subject.source} is no run with a corpus of its own: name texts, for instance +suite.texts.mine=texts/"
        )
    stored = yaml.safe_load((stage / "config.yaml").read_text(encoding="utf-8"))
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), stored["data"]))
    assert isinstance(settings, DataConfig)
    if settings.tokenizer.kind == "inherit" or not _exists(settings.tokenizer.path):
        settings.tokenizer.kind, settings.tokenizer.path = _kind(subject.tokenizer), str(subject.tokenizer.path)
    weights = settings.weights[stored["stage"]["name"]]
    names = [source for source, weight in weights.items() if weight > 0]
    tokenizer, corpus = prepare(settings, subject.model.config.vocab_size, progress=False, sources=names)
    if tokenizer.fingerprint != subject.tokenizer.fingerprint:
        raise ConfigError(f"{stage}: the corpus is tokenized with another tokenizer than the model's.")
    return corpus, names


def source_rows(name: str, suite: HeldOutSuite, tokenizer: Tokenizer, seq_len: int) -> list[Row]:
    """Rows of one document each, cut at `seq_len`: the first `rows` of a source of plain texts."""
    rows: list[Row] = []
    path = suite.texts[name]
    kind = "parquet" if path.endswith(".parquet") else "jsonl" if ".json" in Path(path).name else "text"
    for unit in open_source(name, SourceConfig(kind=kind, path=path, field=suite.field)).units():
        for document in unit.documents():
            if isinstance(document, Document) and document.plain_text is not None:
                rows.append(text_row(document.plain_text, tokenizer, seq_len, len(rows)))
            if len(rows) == suite.rows:
                return rows
    if not rows:
        raise ConfigError(f"suite.texts.{name}={path} holds no text.")
    return rows


def text_row(text: str, tokenizer: Tokenizer, seq_len: int, number: int = 0) -> Row:
    """`<s>`, the text and `</s>`, cut at `seq_len` tokens, as one row."""
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], np.int64)[: seq_len + 1]
    labels = np.append(ids[1:], IGNORE)[:seq_len]
    ids = ids[:seq_len]
    return Row(ids, labels, np.array([0, len(ids)], np.int32), np.zeros(1, np.int32), np.array([number]))


def _line(source: str, sums: np.ndarray) -> dict[str, Any]:
    nats, tokens, spelled = (float(value) for value in sums)
    loss = nats / tokens if tokens else math.nan
    bits = nats / math.log(2) / spelled if spelled else math.nan
    return {
        "source": source,
        "loss": loss,
        "perplexity": math.exp(min(loss, 50.0)),
        "bits per byte": bits,
        "tokens": int(tokens),
        "bytes": int(spelled),
    }


def _exists(path: str | None) -> bool:
    return path is None or Path(path).expanduser().exists()


def _kind(tokenizer: Tokenizer) -> str:
    return "huggingface" if tokenizer.path.suffix == ".json" else "sentencepiece"
