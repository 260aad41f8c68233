"""Tokenized documents of one source on disk: memory-mapped tokens, offsets, and what is known of each document.

A shard lies in `cache_dir/shards/<source>-<key>`; the key hashes the source's content, the tokenizer and this format,
so that nothing is tokenized twice and nothing stale is read. `content` hashes what training sees (tokens, lengths, loss
mask): it is equal on every machine.
"""

import hashlib
import json
import logging
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from internlm2.config import ConfigError
from internlm2.data.cache import build_once
from internlm2.data.encoding import EncodedUnit, encode_units, token_type
from internlm2.data.progress import with_bar, with_log
from internlm2.sources.documents import BadRecord
from internlm2.sources.source import Source
from internlm2.text.tokenizer import Tokenizer

FORMAT = 1
_SHOWN_BAD = 20
_COLUMNS = {
    "offsets": np.int64,
    "split_hashes": np.uint64,
    "text_bytes": np.int64,
    "file_index": np.int64,
    "lines": np.int64,
}
# Only where the documents are answers to compare.
_JUDGEMENT_COLUMNS = {"records": np.int64, "domain_index": np.int64, "scores": np.float64}

logger = logging.getLogger(__name__)


class Shard:
    """Read-only view of one source's tokenized documents. Document numbers run from 0 in the order of the source."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.documents: int = self.meta["documents"]
        self.total_tokens: int = self.meta["tokens"]
        self.text_bytes: int = self.meta["text_bytes"]
        self.content: str = self.meta["content"]
        self.vocab_size: int = self.meta["vocab_size"]

    @cached_property
    def tokens(self) -> np.ndarray:
        """[total_tokens] uint16 or uint32, memory-mapped."""
        return np.memmap(self.folder / "tokens.bin", token_type(self.vocab_size), mode="r")

    @cached_property
    def mask(self) -> np.ndarray | None:
        """[total_tokens] uint8, 1 = no loss on this token; None where every token counts."""
        return np.memmap(self.folder / "mask.bin", np.uint8, mode="r") if self.meta["masked_tokens"] else None

    @cached_property
    def offsets(self) -> np.ndarray:
        """[documents + 1] int64, memory-mapped: document i is tokens[offsets[i]:offsets[i + 1]]."""
        return self._column("offsets")

    @property
    def lengths(self) -> np.ndarray:
        """[documents] int64, tokens of each document."""
        return np.diff(self.offsets)

    @cached_property
    def document_bytes(self) -> np.ndarray:
        """[documents] int64, UTF-8 bytes of each document's text (0: unknown, it came as tokens)."""
        return self._column("text_bytes")

    def document(self, number: int) -> np.ndarray:
        """Tokens of one document."""
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]

    def held_out(self, fraction: float) -> np.ndarray:
        """[documents] bool: the documents whose hash falls into the first `fraction` of all hashes."""
        return self._column("split_hashes") < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))

    def origin(self, number: int) -> str:
        """`file:line` from which a document came."""
        files = json.loads((self.folder / "files.json").read_text(encoding="utf-8"))
        return BadRecord(files[self._column("file_index")[number]], int(self._column("lines")[number]), "").place

    @property
    def domains(self) -> list[str]:
        """The domains by whose standards its documents were compared; empty where they are no answers to compare."""
        return list(self.meta.get("domains", []))

    @property
    def records(self) -> np.ndarray:
        """[documents] int64: answers to one prompt have the number of their record in common."""
        return self._column("records")

    @property
    def domain_index(self) -> np.ndarray:
        """[documents] int64, index into `domains`."""
        return self._column("domain_index")

    @property
    def scores(self) -> np.ndarray:
        """[documents] float64: how good a judge found each answer, to be compared inside its record only."""
        return self._column("scores")

    def _column(self, name: str) -> np.ndarray:
        return np.memmap(self.folder / f"{name}.bin", (_COLUMNS | _JUDGEMENT_COLUMNS)[name], mode="r")


def shard_of(
    source: Source,
    tokenizer: Tokenizer,
    cache_dir: Path,
    *,
    workers: int | None = None,
    strict: bool = False,
    progress: bool = True,
    manifest: str | None = None,
) -> Shard:
    """The tokenized source, from the cache or made now.

    Bad records are skipped, counted and named in a warning; with `strict` the first one raises ConfigError. So does a
    source without any document, and ready-made tokens of another vocabulary.
    """
    manifest = manifest or source.manifest()
    key = hashlib.sha256(f"{FORMAT} {manifest} {tokenizer.fingerprint} {tokenizer.vocab_size}".encode()).hexdigest()[
        :16
    ]
    folder = cache_dir / "shards" / f"{source.name}-{key}"

    def build(temporary: Path) -> None:
        units = source.units()
        encoded = encode_units(units, tokenizer, workers)
        follow = with_bar if progress else with_log
        watched = follow(encoded, f"tokenizing {source.name}", sum(unit.size for unit in units))
        write_shard(temporary, source.name, watched, tokenizer, strict=strict)

    build_once(folder, is_complete, build)
    shard = Shard(source.name, folder)
    bad = shard.meta["bad"]
    if bad:
        message = f"{source.name}: {bad} bad record{'s' if bad > 1 else ''}, {'; '.join(shard.meta['bad_first'][:3])}"
        if strict:
            raise ConfigError(
                f"{message}. Mend or remove {'them' if bad > 1 else 'it'}, or set data.strict=false to skip."
            )
        logger.warning("%s%s; skipped", message, " ..." if bad > 3 else "")
    return shard


def is_complete(folder: Path) -> bool:
    """Whether a shard folder holds every file at its full size."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return meta["format"] == FORMAT and all(
            (folder / name).stat().st_size == size for name, size in meta["sizes"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_shard(
    folder: Path, name: str, encoded: Iterable[EncodedUnit], tokenizer: Tokenizer, *, strict: bool = False
) -> None:
    """Write all units into `folder`, which appears as a shard only when `meta.json`, the last file, is there."""
    with _Writer(folder, name, strict) as writer:
        for unit in encoded:
            writer.add(unit)
        if not writer.documents:
            first = f" The first bad record: {writer.bad_first[0]}." if writer.bad_first else ""
            raise ConfigError(f"data.sources.{name} holds no usable document.{first}")
        writer.finish(tokenizer)


class _Writer:
    def __init__(self, folder: Path, name: str, strict: bool) -> None:
        self.folder, self.name, self.strict = folder, name, strict
        self.documents = self.tokens = self.masked = self.text_bytes = self.bad = 0
        self.bad_first: list[str] = []
        self.files: dict[str, int] = {}
        self.lines_before: dict[str, int] = {}
        self.domains: dict[str, int] = {}
        self.records = 0
        # Apart from each other, so that the division into units leaves no trace.
        self.content = {part: hashlib.blake2b(digest_size=16) for part in ("tokens", "lengths", "masked")}
        self.streams: dict[str, BinaryIO] = {}

    def __enter__(self) -> "_Writer":
        for column in ("tokens", *_COLUMNS):
            self.streams[column] = self._open(column)
        self.streams["offsets"].write(bytes(8))
        return self

    def _open(self, column: str) -> BinaryIO:
        return open(self.folder / f"{column}.bin", "wb")

    def __exit__(self, *_: object) -> None:
        for stream in self.streams.values():
            stream.close()

    def add(self, unit: EncodedUnit) -> None:
        for record in unit.bad:
            self._add_bad(record, unit.lines_read)
        file_index = [self.files.setdefault(file, len(self.files)) for file in unit.files]
        lines = unit.lines
        if unit.lines_read:
            before = self.lines_before.get(unit.name, 0)
            lines = lines + before
            self.lines_before[unit.name] = before + unit.lines_read
        columns = {
            "tokens": unit.tokens,
            "offsets": self.tokens + np.cumsum(unit.lengths, dtype=np.int64),
            "split_hashes": unit.split_hashes,
            "text_bytes": unit.text_bytes,
            "file_index": np.array(file_index, np.int64),
            "lines": lines,
        }
        for column, values in columns.items():
            self.streams[column].write(np.ascontiguousarray(values).data)
        self._add_mask(unit)
        self._add_judgements(unit)
        self.content["tokens"].update(unit.tokens.astype("<u4").data)
        self.content["lengths"].update(unit.lengths.astype("<i8").data)
        self.documents += len(unit.lengths)
        self.tokens += len(unit.tokens)
        self.text_bytes += int(unit.text_bytes.sum())

    def _add_bad(self, record: BadRecord, lines_read: int) -> None:
        base = self.lines_before.get(record.file, 0) if lines_read else 0
        shown = f"{BadRecord(record.file, record.line + base, record.reason).place} ({record.reason})"
        if record.fatal or self.strict:
            raise ConfigError(
                f"data.sources.{self.name}: {shown}"
                + ("" if record.fatal else ". Mend or remove it, or set data.strict=false to skip such records.")
            )
        self.bad += 1
        if len(self.bad_first) < _SHOWN_BAD:
            self.bad_first.append(shown)

    def _add_mask(self, unit: EncodedUnit) -> None:
        if unit.mask is None:
            return
        if "mask" not in self.streams:
            self.streams["mask"] = self._open("mask")
        self.streams["mask"].seek(self.tokens)  # what was skipped reads as zeros
        self.streams["mask"].write(unit.mask.data)
        self.masked += int(unit.mask.sum())
        self.content["masked"].update((self.tokens + np.flatnonzero(unit.mask)).astype("<i8").data)

    def _add_judgements(self, unit: EncodedUnit) -> None:
        if unit.judgements is None:
            return
        domains = [self.domains.setdefault(domain, len(self.domains)) for domain in unit.judgements.domains]
        columns = {
            "records": self.records + unit.judgements.records,
            "domain_index": np.array(domains, np.int64),
            "scores": unit.judgements.scores,
        }
        for column, values in columns.items():
            if column not in self.streams:
                self.streams[column] = self._open(column)
                self.content[column] = hashlib.blake2b(digest_size=16)
            self.streams[column].write(np.ascontiguousarray(values).data)
        self.content["records"].update(columns["records"].astype("<i8").data)
        self.content["scores"].update(columns["scores"].astype("<f8").data)
        self.content["domain_index"].update("".join(f"{name}\0" for name in unit.judgements.domains).encode())
        self.records += int(unit.judgements.records[-1]) + 1

    def _content_hash(self) -> str:
        return hashlib.blake2b(b"".join(part.digest() for part in self.content.values()), digest_size=16).hexdigest()

    def finish(self, tokenizer: Tokenizer) -> None:
        if "mask" in self.streams:
            self.streams["mask"].truncate(self.tokens)
        self.__exit__()
        (self.folder / "files.json").write_text(json.dumps(list(self.files)), encoding="utf-8")
        meta = {
            "format": FORMAT,
            "source": self.name,
            "documents": self.documents,
            "tokens": self.tokens,
            "masked_tokens": self.masked,
            "text_bytes": self.text_bytes,
            "content": self._content_hash(),
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "domains": list(self.domains),
            "bad": self.bad,
            "bad_first": self.bad_first,
            "sizes": {path.name: path.stat().st_size for path in sorted(self.folder.iterdir())},
        }
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
