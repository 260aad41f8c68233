"""Units of text -> arrays of tokens, in this process or in several, always in the order of the units."""

import concurrent.futures
import hashlib
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from internlm2.config import ConfigError
from internlm2.sources.documents import BadRecord, Document, Unit
from internlm2.text.chat import render
from internlm2.text.tokenizer import Tokenizer, load_tokenizer

# Below this much input for each process, starting it takes longer than it saves.
BYTES_PER_WORKER = 4 << 20
_BATCH_CHARACTERS = 1 << 19


@dataclass(slots=True)
class Judgements:
    """For documents that are answers to compare: the record that each came with, its domain, and its score."""

    records: np.ndarray  # [N] int64, number of the record inside the unit; answers to one prompt share it
    domains: list[str]  # [N]
    scores: np.ndarray  # [N] float64


@dataclass(slots=True)
class EncodedUnit:
    """Tokens of the documents of one unit and what is known of each document (arrays over documents, N of them)."""

    tokens: np.ndarray  # uint16 or uint32, all documents one after another
    lengths: np.ndarray  # [N] int64, tokens
    split_hashes: np.ndarray  # [N] uint64, decides the side of the hold-out
    text_bytes: np.ndarray  # [N] int64, UTF-8 bytes of the text; 0 where only tokens are known
    files: list[str]  # [N]
    lines: np.ndarray  # [N] int64, from 1 within the unit or file; 0: the whole file
    mask: np.ndarray | None  # uint8 over tokens, 1 = no loss on it; None: loss everywhere
    bad: list[BadRecord]
    size: int  # bytes of input
    name: str  # of the unit
    lines_read: int  # lines of the unit where `lines` count from its start, else 0
    judgements: Judgements | None = None  # where documents are answers to compare


def token_type(vocab_size: int) -> np.dtype:
    """Smallest type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def encode_unit(unit: Unit, tokenizer: Tokenizer) -> EncodedUnit:
    """Read and tokenize one unit. Text becomes `<s>` tokens `</s>`, messages the chat format; tokens stay as they
    are. Of a record with answers, each one becomes a document of its own: prompt and answer.
    """
    builder = _UnitBuilder(tokenizer)
    texts: list[Document] = []
    waiting = 0
    for item in unit.documents():
        if isinstance(item, BadRecord):
            builder.bad.append(item)
        elif item.tokens is not None:
            builder.add_tokens(item)
        elif item.answers:
            builder.add_answers(item)
        elif item.messages is not None:
            builder.add_conversation(item)
        else:
            texts.append(item)
            waiting += len(item.text or "")
            if waiting >= _BATCH_CHARACTERS:
                builder.add_texts(texts)
                texts, waiting = [], 0
    builder.add_texts(texts)
    return builder.finish(unit)


def encode_units(units: Sequence[Unit], tokenizer: Tokenizer, workers: int | None) -> Iterator[EncodedUnit]:
    """Encode all units; the results come in the order of `units` whatever the number of processes (None: as many as
    pay off).
    """
    if workers is None:
        workers = min(available_cpus(), sum(unit.size for unit in units) // BYTES_PER_WORKER)
    workers = min(workers, len(units))
    if workers <= 1:
        for unit in units:
            yield encode_unit(unit, tokenizer)
        return
    # A fresh interpreter, not a fork: the parent may hold threads of torch and of the progress bar.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.path, tokenizer.aliases))
    pending: deque[concurrent.futures.Future[EncodedUnit]] = deque()
    try:
        for unit in units:
            pending.append(pool.submit(_work, unit))
            if len(pending) > 4 * workers:  # bounds what waits in memory
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise ConfigError(
            f"a tokenizing process died, most likely for want of memory: set data.workers to less than {workers}"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def available_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_worker_tokenizer: Tokenizer | None = None


def _start_worker(path: Path, aliases: dict[str, str]) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = load_tokenizer(path, aliases)


def _work(unit: Unit) -> EncodedUnit:
    assert _worker_tokenizer is not None
    return encode_unit(unit, _worker_tokenizer)


def split_hash(key: bytes) -> int:
    """64-bit hash by which documents are held out."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


@dataclass
class _UnitBuilder:
    tokenizer: Tokenizer
    bad: list[BadRecord] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray | None] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    text_bytes: list[int] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    judged: list[tuple[int, str, float]] = field(default_factory=list)  # (record, domain, score)

    def add_texts(self, documents: list[Document]) -> None:
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        texts = [document.text or "" for document in documents]
        for document, text, ids in zip(documents, texts, self.tokenizer.encode_batch(texts)):
            content = text.encode("utf-8")
            tokens = np.empty(len(ids) + 2, token_type(self.tokenizer.vocab_size))
            tokens[0], tokens[-1] = bos, eos
            tokens[1:-1] = ids
            self._add(document, tokens, None, content, len(content))

    def add_conversation(self, document: Document) -> None:
        assert document.messages is not None
        rendered = render(document.messages, self.tokenizer)
        tokens = np.array(rendered.ids, token_type(self.tokenizer.vocab_size))
        # Bits per byte of an answer would be about the answer's bytes, not the document's: the length stays unknown.
        mask = 1 - np.array(rendered.trained, np.uint8)
        self._add(document, tokens, mask, tokens.tobytes(), 0)

    def add_answers(self, document: Document) -> None:
        prompt = document.messages or ()
        record = self.judged[-1][0] + 1 if self.judged else 0
        for answer in document.answers:
            ids = render((*prompt, *answer.turns), self.tokenizer).ids
            tokens = np.array(ids, token_type(self.tokenizer.vocab_size))
            self._add(document, tokens, None, tokens.tobytes(), 0)
            self.judged.append((record, document.domain, answer.score))

    def add_tokens(self, document: Document) -> None:
        assert document.tokens is not None
        largest = max(map(abs, document.tokens))
        if largest >= self.tokenizer.vocab_size:
            size = self.tokenizer.vocab_size
            reason = f"token id {largest} lies outside the tokenizer's {size} ids: made with another vocabulary?"
            self.bad.append(BadRecord(document.file, document.line, reason, fatal=True))
            return
        signed = np.array(document.tokens, dtype=np.int64)
        ids = np.abs(signed)
        # As InternEvo's collater: only ids above zero are targets.
        mask = (signed <= 0).astype(np.uint8) if signed.min() <= 0 else None
        self._add(document, ids.astype(token_type(self.tokenizer.vocab_size)), mask, signed.tobytes(), 0)

    def _add(
        self, document: Document, tokens: np.ndarray, mask: np.ndarray | None, content: bytes, text_bytes: int
    ) -> None:
        self.tokens.append(tokens)
        self.masks.append(mask)
        self.hashes.append(split_hash(content if document.split_key is None else document.split_key.encode("utf-8")))
        self.text_bytes.append(text_bytes)
        self.files.append(document.file)
        self.lines.append(document.line)

    def finish(self, unit: Unit) -> EncodedUnit:
        lengths = np.array([len(tokens) for tokens in self.tokens], dtype=np.int64)
        mask = None
        if any(part is not None for part in self.masks):
            mask = np.concatenate(
                [
                    np.zeros(len(tokens), np.uint8) if part is None else part
                    for tokens, part in zip(self.tokens, self.masks)
                ]
            )
        empty = np.empty(0, token_type(self.tokenizer.vocab_size))
        return EncodedUnit(
            tokens=np.concatenate(self.tokens) if self.tokens else empty,
            lengths=lengths,
            split_hashes=np.array(self.hashes, dtype=np.uint64),
            text_bytes=np.array(self.text_bytes, dtype=np.int64),
            files=self.files,
            lines=np.array(self.lines, dtype=np.int64),
            mask=mask,
            bad=self.bad,
            size=unit.size,
            name=unit.name,
            lines_read=unit.lines,
            judgements=self._judgements(),
        )

    def _judgements(self) -> Judgements | None:
        if not self.judged:
            return None
        records, domains, scores = zip(*self.judged)
        return Judgements(np.array(records, np.int64), list(domains), np.array(scores, np.float64))
